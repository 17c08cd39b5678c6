"""A finished adapter as a directory: standard PEFT files, the plan, a manifest of where it came from, a model card."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from confide.common.accounting import Spend, cost
from confide.common.adapter import Floats
from confide.common.errors import PrivacyError
from confide.common.graph import SEMI_HONEST
from confide.common.messages import vector_digest
from confide.common.model import AdaptedModel
from confide.server.store import RoundRecord

FORMAT = "confide-manifest/1"


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


def claim(spends: Sequence[Spend], delta: float, rounds: Iterable[int]) -> Claim:
    """Return what one site's spends add up to.

    Args:
        spends: What the site recorded, at least one.
        delta: The plan's.
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
        epsilon=math.ceil(cost(spends, delta).epsilon * 1e6) / 1e6,  # never rounded down
        delta=delta,
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
) -> None:
    """Write `adapter` to `directory`; nothing in it depends on clocks or machines, so equal runs give equal bytes."""
    model.export(adapter, directory)
    plan = model.plan
    (directory / "plan.toml").write_bytes(plan_file.read_bytes())
    manifest = {
        "format": FORMAT,
        "plan": {"name": plan.name, "digest": plan.digest},
        "base": {"name": plan.model.base, "digest": plan.model.base_digest},
        "layout": model.layout.digest,
        "adapter": vector_digest(adapter),
        "status": status,
        "weakened_by": weakened(records, claims),
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
    (directory / "README.md").write_text(_card(model, status, records, claims, scores), encoding="utf-8")


def weakened(records: Sequence[RoundRecord], claims: Mapping[str, Claim]) -> list[str]:
    """Return the words for what weakens the guarantee; none for a run that nothing weakens."""
    words = {record.summation for record in records} | {claim.noise for claim in claims.values()}
    return sorted(word for word in words if word.startswith("insecure_") or word == SEMI_HONEST)


def _card(
    model: AdaptedModel,
    status: str,
    records: Sequence[RoundRecord],
    claims: Mapping[str, Claim],
    scores: Mapping[str, float],
) -> str:
    plan = model.plan
    words = weakened(records, claims)
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
    loading = (
        "from transformers import AutoModelForSequenceClassification\n\n"
        f'base = AutoModelForSequenceClassification.from_pretrained("path/to/{plan.model.base}", '
        f"num_labels={len(plan.task.labels)})"
        if plan.model.pooling == "own"
        else "from pathlib import Path\n\nfrom confide.common.model import load_base\n"
        "from confide.common.plan import load_plan\n\n"
        f'base = load_base(Path("path/to/{plan.model.base}"), load_plan(Path("path/to/this/directory/plan.toml")))'
    )
    return f"""---
base_model: {plan.model.base}
library_name: peft
pipeline_tag: text-classification
tags: [lora, federated-learning, differential-privacy]
---

# {plan.name}

{plan.purpose}

{warning}A low-rank adapter and a classification head for `{plan.model.base}`, trained by {len(claims)} sites in
{len(records)} rounds (`{status}`). Labels: {", ".join(plan.task.labels)}.

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
{loading}
model = PeftModel.from_pretrained(base, "path/to/this/directory").eval()
```

Texts longer than {plan.model.max_tokens} tokens were cut in training. `manifest.json` holds the digests of the plan, of
the base model and of every version this one descends from.

## Limits

The adapter shows what the sites' data have in common. It was judged on the scores above and on nothing else.
"""
