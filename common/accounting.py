"""What training cost: from spends to epsilon, and what a run may claim.

A `Spend` is what happened; epsilon is what it cost. Neighbouring is zero-out: one person's rows are replaced by nothing
while all public constants (sampling rate, steps, divisor) stay. Two accountants of the library dp-accounting do the
work, Rényi DP (`common/renyi`) and privacy loss distributions (`common/pld`); both are upper bounds, so the smaller one
holds for what was fixed in advance. Where nothing was fixed, `common/filter` decides whether more may be spent.

From here the other questions lead on: which noise an epsilon needs (`common/calibration`), what it would be if other
things were compared (`common/conversions`), and what a plan could be instead (`common/budget`).
"""

import dataclasses
from collections.abc import Iterable

from confide.common.calibration import noise_multiplier
from confide.common.filter import MOST_EPSILON, Filter, best_order
from confide.common.plan import Privacy
from confide.common.pld import pld_epsilon
from confide.common.renyi import rdp_epsilon
from confide.common.spend import Spend, checked, mechanisms_of


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Epsilon at one delta, by two accountants; both are upper bounds, and infinite where they cannot say.

    Attributes:
        rdp: By Rényi DP.
        pld: By privacy loss distributions. Infinite where these certify nothing: delta below
            `pld.LEAST_PLD_DELTA`, an epsilon beyond a thousand, or too many distinct mechanisms.
        delta: The delta.
    """

    rdp: float
    pld: float
    delta: float

    @property
    def declared(self) -> float:
        """The cost if all was fixed in advance: the smaller of the two bounds. It also covers stopping earlier."""
        return min(self.rdp, self.pld)

    @property
    def adaptive(self) -> float:
        """The smallest budget of a `Filter` that lets all this through, however it was chosen on the way.

        The filter's order must have been fixed in advance to be the best one for this.
        """
        return self.rdp

    @property
    def epsilon(self) -> float:
        """The same as `declared`."""
        return self.declared


def cost(spends: Iterable[Spend], delta: float) -> Cost:
    """Return what all `spends` together cost a person; nothing spent costs 0.

    Args:
        spends: What happened, in any order; of one site and one data set.
        delta: Above 0, below 1. Below `pld.LEAST_PLD_DELTA` only Rényi DP says anything.

    Raises:
        PrivacyError: delta is out of range.

    Guarantee: epsilon at delta under zero-out neighbouring for the Poisson-subsampled Gaussian, fixed in advance.
    Source: RDP: Mironov, Talwar, Zhang 2019 (arXiv 1908.10530), Sec. 3.3; conversion: Canonne, Kamath, Steinke 2020
    (arXiv 2004.00010), Prop. 12. PLD: Doroshenko et al. 2022 (arXiv 2207.04380).
    """
    mechanisms = mechanisms_of(spends)
    checked(delta)
    if not mechanisms:
        return Cost(rdp=0.0, pld=0.0, delta=delta)
    return Cost(rdp=rdp_epsilon(mechanisms, delta), pld=pld_epsilon(mechanisms, delta), delta=delta)


def planned_cost(privacy: Privacy, rounds: int | None = None) -> Cost:
    """Return what a site spends in `rounds` rounds of a plan, all of them by default."""
    rounds = privacy.rounds if rounds is None else rounds
    if rounds == 0:
        return Cost(rdp=0.0, pld=0.0, delta=privacy.delta)
    return cost([planned_spend(privacy, rounds)], privacy.delta)


def planned_spend(privacy: Privacy, rounds: int = 1, noise: float | None = None) -> Spend:
    """Return what `rounds` rounds of a plan are, as if they were one.

    Args:
        privacy: The plan's.
        rounds: At least 1.
        noise: The noise multiplier, if it is not to be the plan's.
    """
    return Spend(
        round=1,
        sampling_rate=privacy.sampling_rate,
        noise_multiplier=noise_multiplier(privacy) if noise is None else noise,
        steps=privacy.steps_per_round * rounds,
        clip_norm=privacy.clip_norm,
        divisor=privacy.sampling_rate * privacy.min_persons,
        noise="planned",
    )


def claimed(spends: Iterable[Spend], privacy: Privacy) -> float:
    """Return the epsilon that a run of this plan may claim for one site that spent this; nothing spent costs 0.

    Where each spend is one round of the plan, each round at most once, the whole plan's cost is claimed, by the smaller
    bound: what the site sent is a part of what the whole plan sends, whoever dropped rounds and whatever they had seen.
    If few rounds were made, `Filter.at_any_stop` may be smaller. It holds too, for it bounds the loss at all moments
    together; its order is the plan's best, so it is fixed in advance.

    Where some spend is none of the plan's, `Filter.at_any_stop` alone is claimed.

    Guarantee: holds for a run stopped early because of what it showed, and for noise changed on the way.
    """
    events = tuple(spends)
    if not events:
        return 0.0
    stopped = Filter(epsilon=MOST_EPSILON, delta=privacy.delta, order=best_order(privacy)).after(events).at_any_stop
    return min(planned_cost(privacy).declared, stopped) if as_declared(events, privacy) else stopped


def as_declared(spends: Iterable[Spend], privacy: Privacy) -> bool:
    """Return whether each spend is one round of the plan, and none comes twice or is beyond the last."""
    events = tuple(spends)
    rounds = {spend.round for spend in events}
    step = (privacy.sampling_rate, noise_multiplier(privacy), privacy.steps_per_round)
    return (
        len(rounds) == len(events)
        and max(rounds, default=0) <= privacy.rounds
        and all((spend.sampling_rate, spend.noise_multiplier, spend.steps) == step for spend in events)
    )
