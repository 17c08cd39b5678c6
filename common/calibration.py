"""From a target epsilon to the noise it needs: the smallest noise multiplier with which a whole plan stays under it.

It follows from epsilon, delta, sampling rate and steps alone, so anyone can recompute it.
"""

import functools
import math
from collections.abc import Callable

from confide.common.errors import PrivacyError
from confide.common.plan import Privacy
from confide.common.pld import pld_epsilon
from confide.common.renyi import our_rdp_epsilon, rdp_epsilon
from confide.common.spend import Mechanisms

# Noise multipliers are public numbers that people compare, so they have four decimals: the search is over whole units.
_NOISE_UNITS = 10_000
_SMALLEST_NOISE = 0.1
_LARGEST_NOISE = 10_000.0


_remembered: dict[Privacy, float] = {}


def noise_multiplier(privacy: Privacy) -> float:
    """Return the smallest noise multiplier, to four decimals, with which the whole plan costs at most its epsilon.

    It is found once for the whole run: cost composes over all rounds.

    Raises:
        PrivacyError: No noise reaches the epsilon asked for.
    """
    return _remembered[privacy] if privacy in _remembered else _noise_multiplier(privacy)


def remember(privacy: Privacy, noise: float) -> None:
    """Let `noise_multiplier` give back what another process of this site has found, without the libraries that find it.

    A site's agent is long-lived, and they take more memory than all the rest of it.
    """
    _remembered[privacy] = noise


@functools.cache
def _noise_multiplier(privacy: Privacy) -> float:
    units = round(noise_by_rdp(privacy) * _NOISE_UNITS)
    # The Rényi bound is never below the smaller of the two, so the noise it asks for is enough.
    found = _smallest(lambda noise: _smaller_bound(privacy, noise), privacy.epsilon, units)
    while _declared(privacy, found) > privacy.epsilon:  # our Rényi sum may differ by rounding
        found += 1
    return found / _NOISE_UNITS


@functools.cache
def noise_by_rdp(privacy: Privacy) -> float:
    """Return the smallest noise multiplier, to four decimals, that the Rényi bound alone asks for; in milliseconds.

    It is what a `Filter` needs that is to let the whole plan through under the plan's epsilon.

    Raises:
        PrivacyError: No noise reaches the epsilon asked for.
    """

    def by_rdp(units: int) -> float:
        return our_rdp_epsilon(_whole(privacy, units), privacy.delta)

    least, most = round(_SMALLEST_NOISE * _NOISE_UNITS), round(_LARGEST_NOISE * _NOISE_UNITS)
    if by_rdp(least) <= privacy.epsilon:
        return _SMALLEST_NOISE
    if by_rdp(most) > privacy.epsilon:
        raise PrivacyError(
            f"epsilon = {privacy.epsilon:g} at delta = {privacy.delta:g} cannot be reached in {privacy.steps} steps at "
            f"sampling rate {privacy.sampling_rate:g}. Raise epsilon or delta, or lower rounds or sampling_rate."
        )
    return _smallest(by_rdp, privacy.epsilon, most) / _NOISE_UNITS


def _smaller_bound(privacy: Privacy, units: int) -> float:
    """What the plan costs with so much noise; by our own Rényi arithmetic, which a search can afford."""
    mechanisms = _whole(privacy, units)
    return min(our_rdp_epsilon(mechanisms, privacy.delta), pld_epsilon(mechanisms, privacy.delta))


def _declared(privacy: Privacy, units: int) -> float:
    """What the plan costs with so much noise, by the bounds that are claimed."""
    mechanisms = _whole(privacy, units)
    return min(rdp_epsilon(mechanisms, privacy.delta), pld_epsilon(mechanisms, privacy.delta))


def _whole(privacy: Privacy, units: int) -> Mechanisms:
    return ((privacy.sampling_rate, units / _NOISE_UNITS, privacy.steps),)


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
