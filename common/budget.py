"""What-if questions about a plan's privacy: what it costs with other numbers, and what a budget leaves.

Everything follows from the plan's numbers and, where a site asks for itself, from its ledger.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from confide.common.accounting import Cost, cost, planned_spend
from confide.common.calibration import noise_multiplier
from confide.common.errors import UsageError
from confide.common.export import read_export
from confide.common.filter import MOST_EPSILON, Filter, order_for
from confide.common.ledger import verify
from confide.common.plan import Plan, Privacy
from confide.common.settings import read_section
from confide.common.spend import Spend

MOST_ROUNDS = 1_000_000
# Loss distributions of more distinct mechanisms take longer than an answer at a terminal should.
_MOST_MECHANISMS = 4
_POINTS = 10


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """A plan's privacy with some numbers replaced.

    Attributes:
        privacy: The numbers; its epsilon is the one asked for.
        noise: The noise multiplier: what these numbers ask for, or the one given.
        changed: (name, the plan's value, the value here) of all that differs, the noise included.
    """

    privacy: Privacy
    noise: float
    changed: tuple[tuple[str, float, float], ...]

    def cost(self, rounds: int | None = None) -> Cost:
        """Return what so many rounds cost, all of them by default."""
        rounds = self.privacy.rounds if rounds is None else rounds
        return cost([planned_spend(self.privacy, rounds, self.noise)], self.privacy.delta)

    @property
    def whole(self) -> Spend:
        """All rounds as one spend."""
        return planned_spend(self.privacy, self.privacy.rounds, self.noise)


def what_if(
    plan: Plan,
    *,
    epsilon: float | None = None,
    noise: float | None = None,
    rounds: int | None = None,
    steps_per_round: int | None = None,
    sampling_rate: float | None = None,
) -> WhatIf:
    """Return the plan's privacy with the given numbers in place of its own.

    Args:
        plan: The plan.
        epsilon: Asks for the noise that keeps the whole run under it.
        noise: A noise multiplier; the run then costs what it costs.
        rounds: Rounds of the run.
        steps_per_round: Steps of a round.
        sampling_rate: q.

    Raises:
        UsageError: A number is out of its range, or both epsilon and noise are given.
        PrivacyError: No noise reaches the epsilon asked for.
    """
    if epsilon is not None and noise is not None:
        raise UsageError(
            f"--epsilon {epsilon:g} asks for the noise and --noise {noise:g} gives it. Leave one of them out."
        )
    if noise is not None and not 0 < noise < math.inf:
        raise UsageError(f"--noise {noise:g} is outside its range (above 0, finite).")
    given = {"epsilon": epsilon, "rounds": rounds, "steps_per_round": steps_per_round, "sampling_rate": sampling_rate}
    asked = {name: value for name, value in given.items() if value is not None}
    problems: list[str] = []
    privacy = read_section(Privacy, "privacy", dataclasses.asdict(plan.privacy) | asked, problems)
    if privacy is not None and privacy.steps > MOST_ROUNDS:
        problems.append(f"rounds × steps_per_round = {privacy.steps} steps; at most {MOST_ROUNDS} are allowed.")
    if problems or privacy is None:
        raise UsageError("\n".join(problems))
    found = noise_multiplier(privacy) if noise is None else noise
    changed = [(name, float(getattr(plan.privacy, name)), float(value)) for name, value in asked.items()]
    before = noise_multiplier(plan.privacy)
    if found != before:
        changed.append(("noise_multiplier", before, found))
    return WhatIf(privacy=privacy, noise=found, changed=tuple(change for change in changed if change[1] != change[2]))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What a budget leaves.

    Attributes:
        budget: Epsilon.
        spends: How many rounds were spent before.
        used: How much of the budget a filter counts as used by them.
        order: The filter's Rényi order, fixed by the budget and the round's mechanism.
        course: How much it counts as used after each of `stops`.
        rounds: How many more rounds a filter lets through, whatever was seen before.
        declared_rounds: How many more there could be if all of them, and what was spent, had been fixed in advance; None
            if too much was spent in different ways to tell.
    """

    budget: float
    spends: int
    used: float
    course: tuple[float, ...]
    order: int
    rounds: int
    declared_rounds: int | None


def left(found: WhatIf, budget: float, spent: Sequence[Spend] = ()) -> Left:
    """Return how many more rounds of the plan fit under a budget at the plan's delta.

    Raises:
        UsageError: The budget is out of range.
        PrivacyError: It has no room at all.
    """
    if not 0 < budget <= MOST_EPSILON:
        raise UsageError(f"--budget {budget:g} is outside its range (above 0, at most {MOST_EPSILON:g}).")
    delta = found.privacy.delta
    one = planned_spend(found.privacy, 1, found.noise)
    gate = Filter(epsilon=budget, delta=delta, order=order_for(budget, delta, one)).after(spent)
    each = gate.after([one]).spent - gate.spent
    rounds = min(MOST_ROUNDS, max(0, math.floor(gate.left / each)))
    declared = None
    if len({(spend.sampling_rate, spend.noise_multiplier) for spend in spent}) <= _MOST_MECHANISMS:
        declared = _declared_rounds(found, budget, spent, rounds)
    return Left(
        budget=budget,
        spends=len(spent),
        used=gate.used,
        course=tuple(
            gate.after([planned_spend(found.privacy, stop, found.noise)]).used for stop in stops(found.privacy.rounds)
        ),
        order=gate.order,
        rounds=rounds,
        declared_rounds=declared,
    )


def spent_before(export: Path, account: str | None = None) -> tuple[Spend, ...]:
    """Return what was charged to an account in its present period, by an exported ledger, which is verified.

    Args:
        export: The file, such as `sites/NAME.jsonl` of a simulation's run.
        account: The account's number; the only one there is if absent.

    Raises:
        UsageError: The file cannot be read, or it is not clear which account is meant.
        LedgerError: The ledger does not hold, so what was spent is not known.
    """
    lines, checkpoint = read_export(export)
    book = verify(lines, checkpoint)
    if account is None and len(book.accounts) == 1:
        (account,) = book.accounts
    if account not in book.accounts:
        raise UsageError(
            f"The ledger {export} has the accounts {', '.join(book.accounts) or 'of nobody'}. Choose one with --account."
        )
    assert account is not None
    return book.charged(account, book.accounts[account].period)


def _declared_rounds(found: WhatIf, budget: float, spent: Sequence[Spend], known: int) -> int:
    """Return the most rounds that cost at most the budget with what was spent, if fixed in advance; at least `known`."""

    def epsilon(rounds: int) -> float:
        more = [planned_spend(found.privacy, rounds, found.noise)] if rounds else []
        return cost([*spent, *more], found.privacy.delta).declared

    low, at_low, high = known, epsilon(known), max(2, 2 * known)
    while (at_high := epsilon(high)) <= budget:
        if high >= MOST_ROUNDS:
            return MOST_ROUNDS
        low, at_low, high = high, at_high, min(2 * high, MOST_ROUNDS)
    turn = 0
    while high - low > 1:
        turn += 1
        guess = (low + high) // 2
        if turn % 3 and at_low < budget and math.isfinite(at_high):
            # Epsilon over rounds is nearly straight. Every third guess halves the bracket all the same.
            guess = low + round((high - low) * (budget - at_low) / (at_high - at_low))
        guess = min(max(guess, low + 1), high - 1)
        at_guess = epsilon(guess)
        if at_guess <= budget:
            low, at_low = guess, at_guess
        else:
            high, at_high = guess, at_guess
    return low


def stops(rounds: int) -> list[int]:
    """Return some of the rounds, evenly chosen, the first and the last included."""
    stride = max(1, round(rounds / _POINTS))
    return sorted({1, *range(stride, rounds, stride), rounds})
