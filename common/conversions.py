"""What a run costs if something else is compared than a person's rows and nothing in their place.

A person may be replaced by another, be at several sites, or have several rows in a run that protects single rows.
"""

import dataclasses
import math
from collections.abc import Iterable

from confide.common.accounting import Cost, cost
from confide.common.errors import PrivacyError, UsageError
from confide.common.pld import LEAST_PLD_DELTA, MOST_PLD_EPSILON, certifiable, grid_width, pld_epsilon
from confide.common.renyi import MOST_MECHANISMS, our_rdp_epsilon
from confide.common.spend import Spend, checked, mechanisms_of, reserved

SITES = (2, 3)  # for how many sites of one person the cost is told
MOST_ROWS = 64


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Conversions:
    """The whole run's epsilon where something else is compared; infinite where none can be certified.

    Attributes:
        replace_one: A person's rows replaced by another's.
        sites: The same person at so many sites, by their number.
        rows: So many rows of one person in a run that protects single rows, if asked for.
    """

    replace_one: float
    sites: dict[int, float]
    rows: tuple[int, float] | None = None

    @classmethod
    def of(cls, spend: Spend, delta: float, rows: int | None = None) -> "Conversions":
        """Return the conversions for a run that is this spend.

        Raises:
            UsageError: `rows` is out of range.
            PrivacyError: The cost of the rows cannot be certified.
        """
        if rows is not None and not 2 <= rows <= MOST_ROWS:
            raise UsageError(f"--rows-per-person {rows} is outside its range (2 to {MOST_ROWS}).")
        try:
            replaced = replace_one_cost([spend], delta)
        except PrivacyError:
            replaced = math.inf
        return cls(
            replace_one=replaced,
            sites={sites: several_sites_cost([spend], delta, sites).declared for sites in SITES},
            rows=None if rows is None else (rows, several_rows_cost([spend], delta, rows)),
        )


def replace_one_cost(spends: Iterable[Spend], delta: float) -> float:
    """Return epsilon if a person's rows are replaced by another person's, instead of by nothing.

    Raises:
        PrivacyError: delta is out of range, or PLD certifies nothing here and Rényi DP has no bound to offer.

    Source: the dominating pairs of Doroshenko et al. 2022, for replacement under Poisson sampling.
    """
    mechanisms = mechanisms_of(spends)
    epsilon = pld_epsilon(mechanisms, checked(delta), "REPLACE_ONE") if mechanisms else 0.0
    return _certified(epsilon, delta, "replacing a person by another")


def several_sites_cost(spends: Iterable[Spend], delta: float, sites: int) -> Cost:
    """Return what all `spends` cost a person who is at `sites` sites, each of which spends the same.

    Each site adds its own noise and each update counts as seen, so it is as if one site took `sites` times the steps.
    """
    return cost([dataclasses.replace(spend, steps=spend.steps * sites) for spend in spends], delta)


def several_rows_cost(spends: Iterable[Spend], delta: float, rows: int) -> float:
    """Return epsilon for somebody with `rows` rows that count as a person each, in a run that protects single rows.

    Each row is drawn on its own and may add clip_norm, so a step moves by j clip norms with the binomial probability of
    j. It takes seconds: 1 to 10 on one core.

    Raises:
        PrivacyError: delta is out of range, or PLD certifies nothing here.

    Source: Ganesh 2024 (arXiv 2401.10294), the mixture of Gaussians.
    """
    from dp_accounting import GaussianDpEvent, NeighboringRelation, pld
    from dp_accounting.dp_event import MixtureOfGaussiansDpEvent

    mechanisms = mechanisms_of(spends)
    # Rows together lose at least as much as apart. A grid of this width errs by parts in ten thousand, and always up.
    least = rows * our_rdp_epsilon(mechanisms, checked(delta))
    if not mechanisms or not certifiable(mechanisms, delta, least):
        return _certified(math.inf if mechanisms else 0.0, delta, f"{rows} rows of one person")
    accountant = pld.PLDAccountant(
        neighboring_relation=NeighboringRelation.REPLACE_SPECIAL,
        value_discretization_interval=max(grid_width(mechanisms, 0.0), least / 5000),
    )
    for rate, noise, steps in mechanisms:
        if rate == 1:
            accountant.compose(GaussianDpEvent(noise / rows), steps)
            continue
        chances = [math.comb(rows, j) * rate**j * (1 - rate) ** (rows - j) for j in range(rows + 1)]
        accountant.compose(MixtureOfGaussiansDpEvent(noise, list(range(rows + 1)), chances), steps)
    return max(0.0, float(accountant.get_epsilon(reserved(delta))))


def _certified(epsilon: float, delta: float, what: str) -> float:
    if math.isfinite(epsilon):
        return epsilon
    raise PrivacyError(
        f"The cost of {what} at delta = {delta:g} cannot be certified: privacy loss distributions hold for delta of at "
        f"least {LEAST_PLD_DELTA:g}, an epsilon up to {MOST_PLD_EPSILON:g} and up to {MOST_MECHANISMS} distinct mechanisms, and "
        "Rényi DP has no bound for it. Raise delta or the noise."
    )
