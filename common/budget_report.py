"""The answer of `confide plan budget`: what a run costs and what a budget leaves, for a terminal and for machines."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from confide.common.accounting import Cost
from confide.common.budget import MOST_ROUNDS, Left, WhatIf, left, stops
from confide.common.conversions import Conversions
from confide.common.forecast import Forecast, forecast
from confide.common.plan import Plan
from confide.common.spend import Spend


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The answer to a what-if question; `sections` yields it for a terminal, `tree` for machines."""

    plan: Plan
    found: WhatIf
    course: tuple[tuple[int, Cost], ...]
    conversions: Conversions
    left: Left | None
    forecast: Forecast | None

    @property
    def unit(self) -> str:
        """Whom epsilon is told of: `person`, or `row` where rows of one person are not known to be hers."""
        return "person" if self.plan.data.person_id else "row"

    @property
    def whole(self) -> Cost:
        """The cost of the whole run."""
        return self.course[-1][1]

    def tree(self) -> dict[str, Any]:
        """Return what `--json` prints; what cannot be certified is null."""
        privacy = self.found.privacy
        rows = self.conversions.rows
        return {
            "status": "ok",
            "name": self.plan.name,
            "digest": self.plan.digest,
            "unit": self.unit,
            "noise_multiplier": self.found.noise,
            "sampling_rate": privacy.sampling_rate,
            "steps_per_round": privacy.steps_per_round,
            "rounds": privacy.rounds,
            "delta": privacy.delta,
            "changed": {name: {"plan": before, "here": after} for name, before, after in self.found.changed},
            "epsilon": {"declared": _finite(self.whole.declared), "adaptive": _finite(self.whole.adaptive)},
            "course": [
                {"round": rounds, "pld": _finite(spent.pld), "rdp": _finite(spent.rdp)} for rounds, spent in self.course
            ],
            "conversions": {
                "replace_one": _finite(self.conversions.replace_one),
                "sites": {str(sites): _finite(value) for sites, value in self.conversions.sites.items()},
                "rows_per_person": None if rows is None else {"rows": rows[0], "epsilon": rows[1]},
            },
            "left": None if self.left is None else _left_tree(self.left),
            "forecast": None if self.forecast is None else dataclasses.asdict(self.forecast),
        }

    def sections(self) -> Iterator[tuple[str, list[str]]]:
        """Yield (heading, lines) for a terminal."""
        if self.found.changed:
            yield (
                "What is changed",
                [
                    f"{name.replace('_', ' ')}: {before:g} in the plan, {after:g} here"
                    for name, before, after in self.found.changed
                ],
            )
        yield f"What it costs each {self.unit}", self._course()
        yield "What it costs if something else is compared", self._converted()
        if self.left is not None:
            yield f"Under a budget of epsilon {self.left.budget:g}", self._left(self.left)
        if self.forecast is not None:
            yield "What is to be expected", self.forecast.sentences

    def _course(self) -> list[str]:
        privacy = self.found.privacy
        table = [f"{'after round':>11}  {'steps':>8}  {'fixed':>8}  {'adaptive':>8}"]
        table += [
            f"{rounds:>11}  {rounds * privacy.steps_per_round:>8}  {_epsilon(spent.declared):>8}  {_epsilon(spent.adaptive):>8}"
            for rounds, spent in self.course
        ]
        return [
            f"Epsilon at delta = {privacy.delta:g}, for noise multiplier {self.found.noise:g} and sampling rate "
            f"{privacy.sampling_rate:g}:",
            *table,
            "fixed: if all rounds were declared in advance; it holds if fewer are made. The smaller of two bounds, privacy "
            "loss distributions (PLD) and Rényi DP (RDP).",
            "adaptive: the budget it takes if each round may depend on what earlier ones gave. RDP alone.",
        ]

    def _converted(self) -> list[str]:
        found, unit = self.conversions, self.unit
        compared = [
            (_epsilon(self.whole.declared), f"a {unit} replaced by nothing, as above"),
            (_epsilon(found.replace_one), f"a {unit} replaced by another {unit}"),
            *(
                (_epsilon(value), f"the same {unit} at {sites} sites, each with its own noise")
                for sites, value in found.sites.items()
            ),
        ]
        if found.rows is not None:
            rows, value = found.rows
            times = _epsilon(rows * self.whole.declared)
            compared.append(
                (_epsilon(value), f"somebody with {rows} rows; {rows} times a single row's epsilon is {times}")
            )
        elif unit == "row":
            compared.append(("?", "somebody with several rows: ask with --rows-per-person K"))
        return ["Epsilon of the whole run, fixed in advance:", *(f"{value:>8}  {what}" for value, what in compared)]

    def _left(self, found: Left) -> list[str]:
        lines = []
        if found.spends:
            over = ", which is more than the budget" if found.used > found.budget else ""
            lines.append(
                f"{_rounds(found.spends)} spent before; they have used {_epsilon(found.used)} of {found.budget:g}{over}."
            )
        lines.append(
            f"{_rounds(found.rounds, ' more')} like these can follow, whatever is seen on the way. A Rényi filter of order "
            f"{found.order} counts them, at delta = {self.found.privacy.delta:g}."
        )
        if found.declared_rounds is not None:
            lines.append(
                f"{_rounds(found.declared_rounds, ' more')} could follow if all of them{', and those before,' * bool(found.spends)} "
                "had been fixed in advance."
            )
        return lines


def report(
    plan: Plan,
    found: WhatIf,
    *,
    budget: float | None = None,
    spent: Sequence[Spend] = (),
    rows_per_person: int | None = None,
    model: Path | None = None,
) -> Report:
    """Return what the run costs, what it costs if other things are compared, and what the budget leaves.

    Raises:
        UsageError: A number is out of range.
        PrivacyError: What is asked for cannot be certified.
        ModelError: `model` holds no model that the plan's targets are in.
    """
    changed = dataclasses.replace(plan, privacy=found.privacy)
    return Report(
        plan=plan,
        found=found,
        conversions=Conversions.of(found.whole, found.privacy.delta, rows_per_person),
        course=tuple((rounds, found.cost(rounds)) for rounds in stops(found.privacy.rounds)),
        left=None if budget is None else left(found, budget, spent),
        forecast=None if model is None else forecast(changed, model, noise=found.noise),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _left_tree(found: Left) -> dict[str, Any]:
    return dataclasses.asdict(found) | {"used": _finite(found.used), "course": [_finite(used) for used in found.course]}


def _epsilon(value: float) -> str:
    return f"{value:.3f}" if value < 1000 else "> 1000"


def _rounds(count: int, more: str = "") -> str:
    return f"{'At least ' if count >= MOST_ROUNDS else ''}{count}{more} round{'' if count == 1 else 's'}"
