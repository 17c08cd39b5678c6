"""The Rényi filter, which guards a budget where what comes next may depend on what was seen before.

Nothing but Rényi divergences of one order is added up, so a decision takes a fraction of a millisecond, however much
was spent before. The order must be fixed before anything is spent; two functions find a good one.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Self

import numpy as np

from confide.common.calibration import noise_multiplier
from confide.common.errors import PrivacyError
from confide.common.plan import Privacy
from confide.common.renyi import RDP_ORDERS, Vector, conversion, renyi_divergence
from confide.common.spend import Spend, checked, reserved

MOST_EPSILON = 100.0  # the most a plan or a budget may have
_PLACES = {order: place for place, order in enumerate(RDP_ORDERS)}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Decides whether more may be spent under a budget, where each spend may depend on all that was seen before.

    It adds up Rényi divergences of one order and stops before they pass what (epsilon, delta) has room for. The order
    is fixed when the filter is made: the proof needs it, and one chosen by looking at the spends would not be covered.
    It is a plain value: what it knows is in its four fields.

    Attributes:
        epsilon: The budget, above 0, at most MOST_EPSILON.
        delta: Of the budget, above 0, below 1.
        order: One of RDP_ORDERS; 0 takes the one at which noise without sampling has the most room. `best_order` finds
            the best for a plan.
        spent: The Rényi divergence of all spends so far, never rounded down.

    Raises:
        PrivacyError: A field is out of range, or the budget has no room at that order.

    Guarantee: all that was let through together is (epsilon, delta), though each spend was chosen after seeing what the
    earlier ones gave.
    Source: Feldman, Zrnic 2021 (arXiv 2008.11193), the Rényi filter of a fixed order; conversion as in `renyi.rdp_epsilon`.
    """

    epsilon: float
    delta: float
    order: int = 0
    spent: float = 0.0

    def __post_init__(self) -> None:
        checked(self.delta)
        if not 0 < self.epsilon <= MOST_EPSILON:
            raise PrivacyError(f"The budget epsilon = {self.epsilon:g} is outside its range (above 0, at most 100).")
        if not self.spent >= 0:
            raise _impossible(self.spent)
        if self.order == 0:
            object.__setattr__(self, "order", _roomiest(self.epsilon, self.delta, np.array(RDP_ORDERS, np.float64)))
        if self.order not in RDP_ORDERS:
            raise PrivacyError(f"The Rényi order {self.order} is none of those that are counted: {RDP_ORDERS}.")
        if self.epsilon <= self._conversion:
            raise PrivacyError(
                f"A budget of epsilon = {self.epsilon:g} at delta = {self.delta:g} has no room at the Rényi order "
                f"{self.order}: {self._conversion:.3g} goes into the conversion. Raise the budget, or take another order."
            )

    @property
    def used(self) -> float:
        """The smallest epsilon of a budget under which the same would have been let through; 0 for nothing."""
        return self.spent + self._conversion if self.spent else 0.0

    @property
    def left(self) -> float:
        """How much of the budget's epsilon is left; negative if more was spent than it allows."""
        return self.room - self.spent

    @property
    def at_any_stop(self) -> float:
        """An epsilon for what was spent, whenever one stops and whatever one saw; 0 for nothing.

        The budget plays no part in it. With probability 1 - delta the privacy loss is below this at every moment of a run.
        That is more than a filter promises, which knows its budget in advance, and so the number is larger than `used`.

        Source: Ville's inequality for exp((α - 1)(loss - divergence)), a supermartingale at a fixed order α: the odometers
        of Whitehouse, Ramdas, Rogers, Wu 2023 (arXiv 2203.05481) rest on it; with Mironov 2017 (arXiv 1702.07476), Prop. 3.
        """
        return self.spent - math.log(reserved(self.delta)) / (self.order - 1) if self.spent else 0.0

    def admits(self, spend: Spend) -> None:
        """Return if `spend` fits under the budget.

        Raises:
            PrivacyError: It does not.
        """
        needed = self._divergence(spend)
        if needed <= self.left:
            return
        steps = max(0, math.floor(self.left / (needed / spend.steps))) if math.isfinite(needed) else 0
        raise PrivacyError(
            f"Round {spend.round} would cost {needed:.4g} of epsilon, but of the budget {self.epsilon:g} at delta = "
            f"{self.delta:g} only {max(0.0, self.left):.4g} is left, enough for {steps} of its {spend.steps} steps. Raise the "
            "budget, take fewer steps, or train with more noise or a lower sampling rate."
        )

    def with_spend(self, spend: Spend) -> Self:
        """Return the filter with `spend` let through.

        Raises:
            PrivacyError: It does not fit under the budget.
        """
        self.admits(spend)
        return self.after((spend,))

    def after(self, spends: Iterable[Spend]) -> Self:
        """Return the filter with `spends` counted, let through or not: what has happened has happened."""
        spent = self.spent
        for spend in spends:
            spent = math.nextafter(spent + self._divergence(spend), math.inf)
        return self._with(spent)

    def without(self, spend: Spend) -> Self:
        """Return the filter with `spend` taken back, which was counted and touched no data.

        Guarantee: never less than what the other spends come to, whatever rounding does.

        Raises:
            PrivacyError: The filter has spent less than that.
        """
        given_back = math.nextafter(self._divergence(spend), 0.0)
        return self._with(math.nextafter(self.spent - given_back, math.inf))

    def exhausted(self) -> Self:
        """Return the filter with its whole budget spent, and more if more was."""
        return self._with(max(self.spent, math.nextafter(self.room, math.inf)))

    @property
    def room(self) -> float:
        """The Rényi divergence that the whole budget has room for."""
        return self.epsilon - self._conversion

    @property
    def _conversion(self) -> float:
        return _conversion_at(self.order, self.delta)

    def _with(self, spent: float) -> Self:
        """Return the filter with another `spent`; the rest was checked before, and a ledger does this 10⁵ times."""
        if not spent >= 0:
            raise _impossible(spent)
        changed = object.__new__(type(self))
        for name, value in (("epsilon", self.epsilon), ("delta", self.delta), ("order", self.order), ("spent", spent)):
            object.__setattr__(changed, name, value)
        return changed

    def _divergence(self, spend: Spend) -> float:
        vector = renyi_divergence(spend.sampling_rate, spend.noise_multiplier)
        return spend.steps * float(vector[_PLACES[self.order]])


def best_order(privacy: Privacy) -> int:
    """Return the Rényi order at which the whole plan costs least; it follows from the plan, so it is fixed in advance."""
    divergence = privacy.steps * renyi_divergence(privacy.sampling_rate, noise_multiplier(privacy))
    orders = np.array(RDP_ORDERS, np.float64)
    return RDP_ORDERS[int(np.argmin(divergence + conversion(orders, privacy.delta)))]


def order_for(epsilon: float, delta: float, spend: Spend) -> int:
    """Return the Rényi order at which a budget of (epsilon, delta) has room for the most spends like this one."""
    return _roomiest(epsilon, delta, renyi_divergence(spend.sampling_rate, spend.noise_multiplier))


@functools.lru_cache(maxsize=1024)
def _conversion_at(order: int, delta: float) -> float:
    return float(conversion(order, delta))


def _impossible(spent: float) -> PrivacyError:
    return PrivacyError(f"A filter cannot have spent {spent}; it must be 0 or more.")


def _roomiest(epsilon: float, delta: float, divergence: Vector) -> int:
    room = epsilon - conversion(np.array(RDP_ORDERS, np.float64), delta)
    return RDP_ORDERS[int(np.argmax(room / divergence))]
