"""What training cost: from spends to epsilon, and from a target epsilon to the noise it needs.

A `Spend` is what happened; epsilon is what it cost. Neighbouring is zero-out: one person's rows are replaced by nothing
while all public constants (sampling rate, steps, divisor) stay. Two accountants of the library dp-accounting do the
work, Rényi DP and privacy loss distributions; both are upper bounds, so the smaller one holds. A third, small one of
our own checks the first.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from confide.common.errors import PrivacyError
from confide.common.plan import Privacy

# Noise multipliers are public numbers that people compare, so they have four decimals.
_NOISE_UNITS = 10_000
_SMALLEST_NOISE = 0.1
_LARGEST_NOISE = 10_000.0
# Rényi orders at which cost is computed. All are integers: at fractional ones the library's series may not converge.
RDP_ORDERS = (*range(2, 65), 72, 80, 96, 112, 128, 160, 192, 256, 384, 512, 1024, 4096)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spend:
    """What a site's training in one round did to its persons' privacy.

    Attributes:
        round: The round's number, from 1.
        sampling_rate: q, the probability with which each person took part in each step, above 0, at most 1.
        noise_multiplier: σ: the noise's standard deviation over the clip norm, above 0.
        steps: Noised steps, empty ones included, at least 1.
        clip_norm: The largest L2 norm of one person's gradient.
        divisor: The constant by which the noised sum was divided, q·N.
        noise: Which generator the noise came from.
    """

    round: int
    sampling_rate: float
    noise_multiplier: float
    steps: int
    clip_norm: float
    divisor: float
    noise: str

    def __post_init__(self) -> None:
        sound = (
            self.round >= 1
            and 0 < self.sampling_rate <= 1
            and 0 < self.noise_multiplier < math.inf
            and self.steps >= 1
            and 0 < self.clip_norm < math.inf
            and 0 < self.divisor < math.inf
        )
        if not sound:
            raise PrivacyError(
                f"No training costs what this says: {self}. All numbers must be positive and finite, q ≤ 1."
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Epsilon at one delta, by two accountants; both are upper bounds."""

    rdp: float
    pld: float
    delta: float

    @property
    def epsilon(self) -> float:
        """The claim for a run that went as its plan declared: the smaller of the two bounds."""
        return min(self.rdp, self.pld)


def cost(spends: Iterable[Spend], delta: float) -> Cost:
    """Return what all `spends` together cost a person; nothing spent costs 0.

    Args:
        spends: What happened, in any order; of one site and one data set.
        delta: Above 0, below 1.

    Raises:
        PrivacyError: delta is out of range.

    Guarantee: epsilon at delta under zero-out neighbouring for the Poisson-subsampled Gaussian, fixed in advance.
    Source: RDP: Mironov, Talwar, Zhang 2019 (arXiv 1908.10530), Sec. 3.3; conversion: Canonne, Kamath, Steinke 2020
    (arXiv 2004.00010), Prop. 12. PLD: Doroshenko et al. 2022 (arXiv 2207.04380).
    """
    if not 0 < delta < 1:
        raise PrivacyError(f"delta = {delta:g} is outside its range (above 0, below 1).")
    steps: Counter[tuple[float, float]] = Counter()
    for spend in spends:
        steps[spend.sampling_rate, spend.noise_multiplier] += spend.steps
    return _cost(tuple(sorted((*key, count) for key, count in steps.items())), delta)


def planned_cost(privacy: Privacy, rounds: int | None = None) -> Cost:
    """Return what a site spends in `rounds` rounds of a plan, all of them by default."""
    rounds = privacy.rounds if rounds is None else rounds
    if rounds == 0:
        return Cost(rdp=0.0, pld=0.0, delta=privacy.delta)
    steps = privacy.steps_per_round * rounds
    return _cost(((privacy.sampling_rate, noise_multiplier(privacy), steps),), privacy.delta)


@functools.cache
def noise_multiplier(privacy: Privacy) -> float:
    """Return the smallest noise multiplier, to four decimals, with which the whole plan costs at most its epsilon.

    It follows from epsilon, delta, sampling rate and steps alone, so anyone can recompute it, and it is found once for
    the whole run: cost composes over all rounds.

    Raises:
        PrivacyError: No noise reaches the epsilon asked for.
    """
    import dp_accounting

    def epsilon(units: int) -> float:
        return _cost(((privacy.sampling_rate, units / _NOISE_UNITS, privacy.steps),), privacy.delta).epsilon

    if _rdp(((privacy.sampling_rate, _SMALLEST_NOISE, privacy.steps),), privacy.delta) <= privacy.epsilon:
        return _SMALLEST_NOISE
    try:
        # The Rényi bound is fast and never below the smaller of the two, so the noise it asks for is enough.
        enough = dp_accounting.calibrate_dp_mechanism(
            _rdp_accountant,
            lambda noise: dp_accounting.SelfComposedDpEvent(_event(privacy.sampling_rate, noise), privacy.steps),
            target_epsilon=privacy.epsilon,
            target_delta=privacy.delta,
            bracket_interval=dp_accounting.ExplicitBracketInterval(_SMALLEST_NOISE, _LARGEST_NOISE),
            tol=0.5 / _NOISE_UNITS,
        )
    except (ValueError, OverflowError):
        raise PrivacyError(
            f"epsilon = {privacy.epsilon:g} at delta = {privacy.delta:g} cannot be reached in {privacy.steps} steps at "
            f"sampling rate {privacy.sampling_rate:g}. Raise epsilon or delta, or lower rounds or sampling_rate."
        ) from None
    return _smallest(epsilon, privacy.epsilon, math.ceil(enough * _NOISE_UNITS) + 1) / _NOISE_UNITS


def _smallest(epsilon: Callable[[int], float], target: float, high: int) -> int:
    """Return the noise, in units, that costs at most `target` while one unit less costs more; `high` costs less."""
    least = round(_SMALLEST_NOISE * _NOISE_UNITS)
    low, at_low, at_high = high, 0.0, epsilon(high)
    while at_low <= target:
        if low == least:
            return least
        low = max(least, low * 9 // 10)
        at_low = epsilon(low)
        if at_low <= target:
            high, at_high = low, at_low
    turn = 0
    while high - low > 1:
        turn += 1
        guess = (low + high) // 2
        if turn % 3 and 0 < at_high < target and at_low < math.inf:
            # Epsilon over noise is nearly straight on logarithmic axes. Every third guess halves the bracket all the same.
            part = math.log(at_low / target) / math.log(at_low / at_high)
            guess = round(low * (high / low) ** part)
        guess = min(max(guess, low + 1), high - 1)
        at_guess = epsilon(guess)
        if at_guess <= target:
            high, at_high = guess, at_guess
        else:
            low, at_low = guess, at_guess
    return high


def _rdp_accountant() -> Any:  # noqa: ANN401  dp-accounting has no types
    from dp_accounting import NeighboringRelation, rdp

    return rdp.RdpAccountant(RDP_ORDERS, NeighboringRelation.REPLACE_SPECIAL)


def _pld_accountant(step: float) -> Any:  # noqa: ANN401  dp-accounting has no types
    from dp_accounting import NeighboringRelation, pld

    return pld.PLDAccountant(
        neighboring_relation=NeighboringRelation.REPLACE_SPECIAL, value_discretization_interval=step
    )


def _pld_step(steps: int) -> float:
    """Width of the privacy loss grid: the more steps are composed, the finer it must be to stay tight."""
    return 5e-4 if steps <= 1000 else 1e-4


@functools.lru_cache(maxsize=4096)
def _cost(mechanisms: tuple[tuple[float, float, int], ...], delta: float) -> Cost:
    """Cost of (sampling rate, noise multiplier, steps) triples."""
    if not mechanisms:
        return Cost(rdp=0.0, pld=0.0, delta=delta)
    by_pld = _pld_accountant(_pld_step(sum(steps for _, _, steps in mechanisms)))
    for rate, noise, steps in mechanisms:
        by_pld.compose(_event(rate, noise), steps)
    return Cost(rdp=_rdp(mechanisms, delta), pld=max(0.0, float(by_pld.get_epsilon(delta))), delta=delta)


def _rdp(mechanisms: tuple[tuple[float, float, int], ...], delta: float) -> float:
    by_rdp = _rdp_accountant()
    for rate, noise, steps in mechanisms:
        by_rdp.compose(_event(rate, noise), steps)
    return max(0.0, float(by_rdp.get_epsilon(delta)))


def _event(rate: float, noise: float) -> Any:  # noqa: ANN401  dp-accounting has no types
    import dp_accounting

    gaussian = dp_accounting.GaussianDpEvent(noise)
    return gaussian if rate == 1 else dp_accounting.PoissonSampledDpEvent(rate, gaussian)


def rdp_check(spends: Iterable[Spend], delta: float, orders: Sequence[int] = RDP_ORDERS) -> float:
    """Return epsilon by our own Rényi accountant at integer orders; it must not lie below the library's RDP value.

    Source: Mironov, Talwar, Zhang 2019 (arXiv 1908.10530), Eq. 4 and Sec. 3.3 for integer orders; conversion as in
    `cost`.
    """
    events = tuple(spends)
    if not events:
        return 0.0
    best = math.inf
    for order in orders:
        total = sum(e.steps * _sampled_gaussian_rdp(e.sampling_rate, e.noise_multiplier, order) for e in events)
        epsilon = total + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
        best = min(best, epsilon)
    return max(0.0, best)


@functools.lru_cache(maxsize=65_536)
def _sampled_gaussian_rdp(rate: float, noise: float, order: int) -> float:
    """RDP of the sampled Gaussian at an integer order α: log Σ_k C(α,k) (1-q)^(α-k) q^k exp(k(k-1)/2σ²) / (α-1)."""
    if rate == 1:
        return order / (2 * noise**2)
    terms = [
        math.lgamma(order + 1)
        - math.lgamma(k + 1)
        - math.lgamma(order - k + 1)
        + (order - k) * math.log1p(-rate)
        + k * math.log(rate)
        + k * (k - 1) / (2 * noise**2)
        for k in range(order + 1)
    ]
    largest = max(terms)
    return (largest + math.log(math.fsum(math.exp(term - largest) for term in terms))) / (order - 1)
