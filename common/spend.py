"""What a site's training did to its persons' privacy, in the form in which it is counted.

A `Spend` is what happened; what it cost is said by `common/accounting`. The accountants look only at its mechanism:
sampling rate, noise multiplier and steps. The delta they work with is a little smaller than the one that is claimed,
because a site's noise is not drawn from the exact law.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable

from confide.common.errors import PrivacyError

# A site's noise is not drawn from the exact law, but from one this close to it in total variation (`client/noise`).
DISTANCE_PER_DRAW = 2.0**-300
# The part of delta that pays for it. If all draws together are η from the exact law, what is (ε, δ) with the exact one
# is (ε, δ + (1 + e^ε) η) with ours. At epsilon 100 and 2^60 draws, more than any plan can ask for, that is below 2^-95,
# and a billionth of the smallest delta of a plan, 1e-12, is above 2^-70.
RESERVED_FOR_NOISE = 1e-9
# Noise below this is counted as none, so that no power of it leaves the range of floats.
LEAST_NOISE_COUNTED = 1e-6
# Cost falls with noise and grows with the sampling rate. What lies beyond these is counted as if it were at them.
_MOST_NOISE_COUNTED, _LEAST_RATE_COUNTED = 1e6, 1e-12

Mechanisms = tuple[tuple[float, float, int], ...]  # (sampling rate, noise multiplier, steps)


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


def mechanisms_of(spends: Iterable[Spend]) -> Mechanisms:
    """Return the mechanisms of all spends, equal ones together, brought to the range that is counted."""
    steps: Counter[tuple[float, float]] = Counter()
    for spend in spends:
        steps[spend.sampling_rate, spend.noise_multiplier] += spend.steps
    within: Counter[tuple[float, float]] = Counter()
    for key, count in steps.items():
        within[counted(*key)] += count
    return tuple(sorted((*key, count) for key, count in within.items()))


def counted(rate: float, noise: float) -> tuple[float, float]:
    """Return sampling rate and noise multiplier brought to the range that is counted; this never lowers the cost."""
    return max(rate, _LEAST_RATE_COUNTED), min(noise, _MOST_NOISE_COUNTED)


def checked(delta: float) -> float:
    """Return delta.

    Raises:
        PrivacyError: It is not above 0 and below 1.
    """
    if not 0 < delta < 1:
        raise PrivacyError(f"delta = {delta:g} is outside its range (above 0, below 1).")
    return delta


def reserved(delta: float) -> float:
    """Return what is left of delta after the noise sampler's part."""
    return delta * (1 - RESERVED_FOR_NOISE)
