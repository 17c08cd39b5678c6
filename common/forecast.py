"""Trouble foreseen from a plan's numbers: how long the signal is beside the noise, in one step and over the run.

A step's sum of clipped gradients is at most q·N clip norms long, and that long only if all persons pull the same way;
the noise is σ √d clip norms long, d being how many numbers are trained. Over T steps of n sites the signal grows as
T·n and the noise as √(T·n). No torch: d is counted from the headers of the base model's files.
"""

import dataclasses
import json
import math
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from confide.common.accounting import cost, planned_spend
from confide.common.base import model_type
from confide.common.calibration import noise_by_rdp, noise_multiplier
from confide.common.errors import ModelError, PrivacyError
from confide.common.plan import Adapter, Plan

# How much of q·N clip norms the sum of gradients has. Measured at the start of the example plans, over 300 rows: 0.21
# for `messages`, 0.42 for `insurance`. It falls as training goes on.
ALIGNMENT = 0.2
# The ratio over the run from which noise leaves room to learn. Three sites of 1,200 of the demo's messages reached a
# macro-F1 of 0.62 where it was 4.0 (epsilon 8) and 2.0 (epsilon 1, one noise for all three), and 0.49 where it was 1.15.
FINE = 1.5
# The ratio under which nothing is learned. Drawing 8 persons a step at epsilon 4 for 5 rounds gives 0.15, and collapses.
COLLAPSE = 0.25
_FINE, _WEAK, _COLLAPSES = "fine", "weak", "bound to collapse"
_LARGEST_HEADER_BYTES = 100 << 20
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    StopIteration,
    RecursionError,
    struct.error,
)
_MOST_ROUNDS_FACTOR = 16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What is to be expected of a run.

    Attributes:
        trained: How many numbers are trained, d.
        persons: Of one site, N.
        sites: How many sites are summed, n.
        noise_multiplier: σ.
        per_step: The signal's length over the noise's, in one step of one site.
        over_run: The same over all steps of all sites.
        verdict: `fine`, `weak` or `bound to collapse`.
        remedies: What would make it fine, each by itself, the cheapest first; empty if it is.
    """

    trained: int
    persons: int
    sites: int
    noise_multiplier: float
    per_step: float
    over_run: float
    verdict: str
    remedies: tuple[str, ...]

    @property
    def sentences(self) -> list[str]:
        """The forecast in words."""
        says = {
            _FINE: "The noise leaves room to learn.",
            _WEAK: "The noise is long beside the signal: expect much less than without privacy.",
            _COLLAPSES: "BOUND TO COLLAPSE: what is learned drowns in noise, and the run would spend its budget for nothing.",
        }
        return [
            f"{says[self.verdict]} With {self.trained} trained numbers, {self.persons} persons at each of {self.sites} sites and "
            f"gradients that agree to {ALIGNMENT:.0%}, the signal is {self.per_step:.2g} times as long as the noise in one step, "
            f"and {self.over_run:.2g} times over the run; {FINE:g} or more is fine, below {COLLAPSE:g} runs collapse.",
            *(f"It would be fine with {remedy}." for remedy in self.remedies),
        ]


def forecast(plan: Plan, directory: Path, *, persons: int | None = None, noise: float | None = None) -> Forecast:
    """Return what is to be expected of a run of `plan` on the base model in `directory`.

    Args:
        plan: The plan.
        directory: The base model's local directory.
        persons: Of one site; the plan's min_persons by default.
        noise: The noise multiplier, if it is not to be the plan's.

    Raises:
        ModelError: The directory holds no model that the plan's targets are in.
    """
    trained = trained_numbers(plan, directory)
    persons = plan.privacy.min_persons if persons is None else persons
    noise = noise_multiplier(plan.privacy) if noise is None else noise
    per_step = _at_one(plan, persons, noise) / math.sqrt(trained)
    over_run = per_step * math.sqrt(plan.privacy.steps * plan.federation.min_sites)
    verdict = _FINE if over_run >= FINE else _WEAK if over_run >= COLLAPSE else _COLLAPSES
    remedies = () if verdict == _FINE else tuple(_remedies(plan, directory, persons, noise, trained, over_run))
    return Forecast(
        trained=trained,
        persons=persons,
        sites=plan.federation.min_sites,
        noise_multiplier=noise,
        per_step=per_step,
        over_run=over_run,
        verdict=verdict,
        remedies=remedies,
    )


def without_model(plan: Plan) -> str:
    """Return the forecast as a sentence in which the number of trained numbers stays a letter."""
    privacy, sites = plan.privacy, plan.federation.min_sites
    over_run = _at_one(plan, privacy.min_persons, noise_multiplier(privacy)) * math.sqrt(privacy.steps * sites)
    return (
        f"Over the run of {sites} sites with {privacy.min_persons} persons each, and with gradients that agree to "
        f"{ALIGNMENT:.0%}, the signal is {over_run:.3g} / √d times as long as the noise, d being how many numbers are trained. "
        f"Up to d = {_rounded((over_run / FINE) ** 2)} is fine; from d = {_rounded((over_run / COLLAPSE) ** 2)} on the run is "
        "bound to collapse. With --model DIR, d is counted."
    )


def _at_one(plan: Plan, persons: int, noise: float) -> float:
    """Signal over noise in one step if one number were trained."""
    return ALIGNMENT * plan.privacy.sampling_rate * persons / noise


def _remedies(plan: Plan, directory: Path, persons: int, noise: float, trained: int, over_run: float) -> Iterator[str]:
    """Yield what would bring the run to FINE, each by itself."""
    short = FINE / over_run
    room = trained / short**2
    yield from _smaller_adapters(plan, directory, room)
    yield f"{_rounded(math.ceil(persons * short), up=True)} persons at each site instead of {persons}"
    yield f"{_rounded(math.ceil(plan.federation.min_sites * short**2), up=True)} sites instead of {plan.federation.min_sites}"
    needed = noise / short
    try:
        dearer = cost([planned_spend(plan.privacy, plan.privacy.rounds, needed)], plan.privacy.delta).declared
    except PrivacyError:
        dearer = math.inf
    if dearer <= 100:
        yield f"epsilon = {dearer:.3g} instead of {plan.privacy.epsilon:g}, that is a noise multiplier of {needed:.3g}"
    for key, value in (("sampling_rate", _larger_rate(plan, short)), ("rounds", _more_rounds(plan, short))):
        if value:
            yield f"{key} = {value:g} instead of {getattr(plan.privacy, key):g}, at the same epsilon and with more work"


def _smaller_adapters(plan: Plan, directory: Path, room: float) -> Iterator[str]:
    """Yield the largest of each kind of smaller adapter that trains at most `room` numbers."""
    adapter = plan.adapter

    def fits(**changes: Any) -> int:  # noqa: ANN401  fields of an adapter
        """The count if it fits, else 0."""
        changed = dataclasses.replace(plan, adapter=dataclasses.replace(adapter, **changes))
        count = trained_numbers(changed, directory)
        return count if count <= room else 0

    found = _Base.read(directory).targets(dataclasses.replace(adapter, top_layers=0))
    depth = max(layer for layer, _, _ in found) + 1
    tops = range((adapter.top_layers or depth) - 1, 0, -1)
    ranks = [rank for rank in (128, 64, 32, 16, 8, 4, 2, 1) if rank < adapter.rank]
    for key, values in (("top_layers", tops), ("rank", ranks)):
        for value in values:
            if count := fits(**{key: value}):
                yield f"{count} trained numbers: {key} = {value} in [adapter]"
                break
    if adapter.method != "r-only" and (count := fits(method="r-only")):
        yield f'{count} trained numbers: method = "r-only" in [adapter]'


def _larger_rate(plan: Plan, short: float) -> float:
    """Return a sampling rate that would make up for a run that is `short` times too weak, or 0 if none does.

    Noise grows more slowly than the rate while the rate is small.
    """
    privacy = plan.privacy
    before = noise_by_rdp(privacy)
    for factor in (1.5, 2, 3, 4, 6, 8):
        rate = privacy.sampling_rate * factor
        if rate > 1:
            break
        more = dataclasses.replace(privacy, sampling_rate=rate)
        if factor * before / noise_by_rdp(more) >= short:
            return rate
    return 0.0


def _more_rounds(plan: Plan, short: float) -> int:
    """Return how many rounds would make up for a run that is `short` times too weak, or 0 if no sensible number would.

    More rounds need more noise in each, so they gain much less than their number; most gain nothing.
    """
    privacy = plan.privacy
    before = noise_by_rdp(privacy)
    factor = 2
    while factor <= _MOST_ROUNDS_FACTOR and privacy.steps * factor <= 1_000_000:
        more = dataclasses.replace(privacy, rounds=privacy.rounds * factor)
        if math.sqrt(factor) * before / noise_by_rdp(more) >= short:
            return more.rounds
        factor *= 2
    return 0


def trained_numbers(plan: Plan, directory: Path) -> int:
    """Return how many numbers the plan trains on the base model in `directory`; all of them are clipped and noised.

    Raises:
        ModelError: The directory holds no model that the plan's targets are in.
    """
    base, adapter = _Base.read(directory), plan.adapter
    targets = base.targets(adapter)
    if not targets:
        raise ModelError(
            f"[adapter] targets names {', '.join(adapter.targets)}, and the base model in {directory} has no such weights in "
            "the layers that carry adapters. Name linear modules of this model."
        )
    rank = adapter.rank
    per_module: Callable[[int, int], int]
    match adapter.method:
        case "ffa":
            per_module = lambda _, outputs: rank * outputs  # noqa: E731  a formula is told best in place
        case "r-only":
            per_module = lambda _, __: rank * rank  # noqa: E731
        case _:  # both factors: fedit, alternate over two rounds, share-a though it sends A only
            per_module = lambda inputs, outputs: rank * (inputs + outputs)  # noqa: E731
    return sum(per_module(inputs, outputs) for _, inputs, outputs in targets) + base.head(plan)


# Architectures whose classifier has a dense layer of its own before the last one.
_DENSE_HEADS = {"roberta", "xlm-roberta", "camembert", "electra", "distilbert"}
# Decoders score with one matrix and no bias.
_NO_BIAS = {"gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi3"}
# Heads of other tasks that a checkpoint may hold; they are left out or made anew when it is loaded for this one.
_OTHER_HEADS = {"cls", "lm_head", "classifier", "score", "pre_classifier", "head", "discriminator_predictions"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Base:
    """A base model as its files tell it: its architecture, and each weight's shape."""

    kind: str
    hidden: int
    classifier_bias: bool
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def read(cls, directory: Path) -> "_Base":
        """Read `config.json` and the headers of the safetensors files.

        Raises:
            ModelError: One of them is missing or damaged.
        """
        kind = model_type(directory)
        try:
            config = json.loads((directory / "config.json").read_bytes())
            hidden = next(config[key] for key in ("hidden_size", "dim", "n_embd", "d_model") if key in config)
            shapes: dict[str, tuple[int, ...]] = {}
            for file in sorted(directory.glob("*.safetensors")):
                shapes |= _shapes(file)
            if not shapes or type(hidden) is not int:
                raise ValueError
        except _UNREADABLE as error:
            raise ModelError(
                f"The base model in {directory} cannot be measured ({type(error).__name__}): config.json or the header of a "
                "*.safetensors file is missing or damaged. Give a complete model in Hugging Face's layout."
            ) from None
        return cls(kind=kind, hidden=hidden, classifier_bias=bool(config.get("classifier_bias", False)), shapes=shapes)

    def targets(self, adapter: Adapter) -> list[tuple[int, int, int]]:
        """Return (layer, inputs, outputs) of every module that carries an adapter."""
        found = []
        for name, shape in self.shapes.items():
            place = re.search(r"\.(\d+)\.", f".{name}")
            module = name.removesuffix(".weight").rsplit(".", 1)[-1]
            if not name.endswith(".weight") or module not in adapter.targets or len(shape) != 2:
                continue
            if place is None and name.split(".")[0] in _OTHER_HEADS:
                continue
            # GPT-2 keeps its linear layers transposed.
            outputs, inputs = reversed(shape) if self.kind == "gpt2" else shape
            # What is outside the layers, such as a pooler, carries an adapter only if all layers do.
            found.append((int(place[1]) if place else -1, inputs, outputs))
        depth = max((layer for layer, _, _ in found), default=-1) + 1
        first = depth - adapter.top_layers if adapter.top_layers else -1
        return [target for target in found if target[0] >= first]

    def head(self, plan: Plan) -> int:
        """Return how many numbers the task's head has; a language model's head is part of the frozen base."""
        if plan.task.kind in {"causal-lm", "instruction", "masked-lm"}:
            return 0
        outputs = 1 if plan.task.kind == "regression" else len(plan.task.labels)
        last = outputs * (self.hidden + 1)
        if plan.model.pooling == "mean" or plan.task.kind in {"token-classification", "image-classification"}:
            return last
        if self.kind == "modernbert":  # a dense layer, with a bias if the configuration says so, and a norm without one
            return last + self.hidden * (self.hidden + 1 + self.classifier_bias)
        if self.kind in _DENSE_HEADS:
            return last + self.hidden * (self.hidden + 1)
        return last - outputs * (self.kind in _NO_BIAS)


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a safetensors file, from its header."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > _LARGEST_HEADER_BYTES:
            raise ValueError
        header = json.loads(stream.read(length))
    return {
        name: tuple(int(size) for size in entry["shape"]) for name, entry in header.items() if name != "__metadata__"
    }


def _rounded(value: float, *, up: bool = False) -> str:
    """Return a whole number to three digits, for people."""
    if value < 1:
        return "0"
    unit = 10 ** max(0, math.floor(math.log10(value)) - 2)
    return str((math.ceil if up else math.floor)(value / unit) * unit)
