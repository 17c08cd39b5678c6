"""A finished adapter as a directory: standard PEFT files, the plan, a manifest of where it came from, a model card."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from confide.common.accounting import claimed
from confide.common.adapter import Floats
from confide.common.errors import PrivacyError
from confide.common.graph import SEMI_HONEST
from confide.common.messages import vector_digest
from confide.common.model import AdaptedModel
from confide.common.network import CLASSES
from confide.common.plan import (
    CAUSAL,
    IMAGE_CLASSES,
    INSTRUCTION,
    MASKED,
    REGRESSION,
    TEXT_CLASSES,
    TOKEN_CLASSES,
    Plan,
    Privacy,
)
from confide.common.spend import Spend
from confide.server.store import RoundRecord

FORMAT = "confide-manifest/1"
ONE_PROCESS = "insecure_one_process"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What one site's persons were promised, and on what it rests.

    Attributes:
        epsilon: What the recorded spends cost at `delta`.
        delta: The plan's.
        noise_multiplier: σ.
        noise: Which generator the noise came from.
        steps: Noised steps taken.
    """

    epsilon: float
    delta: float
    noise_multiplier: float
    noise: str
    steps: int


def claim(spends: Sequence[Spend], privacy: Privacy, rounds: Iterable[int]) -> Claim:
    """Return what one site's spends add up to.

    Args:
        spends: What the site recorded, at least one.
        privacy: The plan's; `accounting.claimed` says what it makes of rounds that were not made, or were made otherwise.
        rounds: Those whose sum the site is in; each must have its spend.

    Raises:
        PrivacyError: A round has none, so what was spent is not known.
    """
    unpaid = sorted(set(rounds) - {spend.round for spend in spends})
    if unpaid or not spends:
        raise PrivacyError(
            f"A site took part in rounds without a recorded spend ({unpaid or 'all'}), so what it spent is not known and "
            "nothing can be claimed. Restore the run's sites/*.jsonl."
        )
    return Claim(
        epsilon=math.ceil(claimed(spends, privacy) * 1e6) / 1e6,  # never rounded down
        delta=privacy.delta,
        noise_multiplier=min(spend.noise_multiplier for spend in spends),
        noise=spends[0].noise,
        steps=sum(spend.steps for spend in spends),
    )


def publish(
    model: AdaptedModel,
    adapter: Floats,
    directory: Path,
    *,
    plan_file: Path,
    status: str,
    records: Sequence[RoundRecord],
    claims: Mapping[str, Claim],
    scores: Mapping[str, float],
    simulated: bool = False,
) -> None:
    """Write `adapter` to `directory`; nothing in it depends on clocks or machines, so equal runs give equal bytes."""
    model.export(adapter, directory)
    plan = model.plan
    (directory / "plan.toml").write_bytes(plan_file.read_bytes())
    words = weakened(records, claims, simulated=simulated)
    manifest = {
        "format": FORMAT,
        "plan": {"name": plan.name, "digest": plan.digest},
        "base": {"name": plan.model.base, "digest": plan.model.base_digest},
        "layout": model.layout.digest,
        "adapter": vector_digest(adapter),
        "status": status,
        "weakened_by": words,
        "claims": {site: dataclasses.asdict(claim) for site, claim in sorted(claims.items())},
        "scores": dict(scores),
        "lineage": [
            {
                "round": record.round,
                "parent": record.parent,
                "adapter": record.adapter,
                "present": list(record.present),
                "missing": dict(record.missing),
                "summation": record.summation,
            }
            for record in records
        ],
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(_card(model, status, records, claims, scores, words), encoding="utf-8")


def weakened(records: Sequence[RoundRecord], claims: Mapping[str, Claim], *, simulated: bool = False) -> list[str]:
    """Return the words for what weakens the guarantee; none for a run that nothing weakens.

    Args:
        records: The run's rounds.
        claims: What each site claims.
        simulated: Whether all sites' rows and keys were in one process.
    """
    words = {record.summation for record in records} | {claim.noise for claim in claims.values()}
    if simulated and not any(word.startswith("insecure_") for word in words):
        words.add(ONE_PROCESS)  # the others say as much
    return sorted(word for word in words if word.startswith("insecure_") or word == SEMI_HONEST)


def _card(
    model: AdaptedModel,
    status: str,
    records: Sequence[RoundRecord],
    claims: Mapping[str, Claim],
    scores: Mapping[str, float],
    words: Sequence[str],
) -> str:
    plan = model.plan
    insecure = [f"`{word}`" for word in words if word != SEMI_HONEST]
    warning = ""
    if insecure:
        warning += (
            f"**This is the product of a simulation.** It was weakened by {', '.join(insecure)}; the claims below are "
            "about its arithmetic and protect nobody.\n\n"
        )
    if SEMI_HONEST in words:
        warning += (
            f"Updates were summed over a sparse graph (`{SEMI_HONEST}`), which hides them from a server that keeps to the "
            "protocol, not from one that does not.\n\n"
        )
    rows = "\n".join(
        f"| {site} | {claim.epsilon:.3f} | {claim.delta:g} | {claim.noise_multiplier:g} | {claim.steps} |"
        for site, claim in sorted(claims.items())
    )
    unit = "person (all rows of one " + f"`{plan.data.person_id}`)" if plan.data.person_id else "row"
    shown = "\n".join(f"- {name}: {value:.4f}" for name, value in scores.items())
    head = " and a head" if model.head else ""
    labels = f" Labels: {', '.join(plan.task.labels)}." if plan.task.labels else ""
    personal = (
        "\n\nEach site keeps its own factors B. Here they are 0, so that this adapter is of use only together with a site's."
        if model.personal.length
        else ""
    )
    limit = "" if plan.data.image else f"Texts longer than {plan.model.max_tokens} tokens were cut in training. "
    return f"""---
base_model: {plan.model.base}
library_name: peft
pipeline_tag: {_PIPELINES[plan.task.kind]}
tags: [lora, federated-learning, differential-privacy]
---

# {plan.name}

{plan.purpose}

{warning}A low-rank adapter{head} for `{plan.model.base}` ({plan.task.kind}), trained by {len(claims)} sites in
{len(records)} rounds (`{status}`).{labels}{personal}

## Privacy

One {unit} of a site is protected with:

| site | epsilon | delta | noise multiplier | steps |
|---|---|---|---|---|
{rows}

Poisson sampling with rate {plan.privacy.sampling_rate:g}, clip norm {plan.privacy.clip_norm:g}, zero-out neighbouring,
composed over all rounds. Recompute it from `manifest.json` and `plan.toml`.

## Scores on held-out rows

{shown or "None were measured."}

## Use

```python
from peft import PeftModel
{_loading(plan)}
model = PeftModel.from_pretrained(base, "path/to/this/directory").eval()
```

{limit}`manifest.json` holds the digests of the plan, of
the base model and of every version this one descends from.

## Limits

The adapter shows what the sites' data have in common. It was judged on the scores above and on nothing else.
"""


def _loading(plan: Plan) -> str:
    """Return the lines that load the base model."""
    if plan.model.pooling != "own":
        return (
            "from pathlib import Path\n\nfrom confide.common.network import load_base\n"
            "from confide.common.plan import load_plan\n\n"
            f'base = load_base(Path("path/to/{plan.model.base}"), load_plan(Path("path/to/this/directory/plan.toml")))'
        )
    name, outputs = CLASSES[plan.task.kind], len(plan.task.labels) or int(plan.task.kind == REGRESSION)
    size = f", num_labels={outputs}" if outputs else ""
    return f'from transformers import {name}\n\nbase = {name}.from_pretrained("path/to/{plan.model.base}"{size})'


# What model hubs call the kinds of task.
_PIPELINES = {
    TEXT_CLASSES: "text-classification",
    REGRESSION: "text-classification",
    TOKEN_CLASSES: "token-classification",
    IMAGE_CLASSES: "image-classification",
    CAUSAL: "text-generation",
    INSTRUCTION: "text-generation",
    MASKED: "fill-mask",
}
