"""Randomness that nobody can predict, and what training draws with it: who takes part, and Gaussian noise as integers.

A real-valued Gaussian added in floating point leaves gaps that tell what was below it. Here noise is an integer whose
law is known: a real Gaussian, rounded. `docs/explanation/noise.md` says why the accountants' numbers hold for it.
"""

import decimal
import functools
import os
import secrets
import threading
from decimal import Decimal
from fractions import Fraction
from typing import Final, NoReturn

import numpy as np
import numpy.typing as npt

from confide.client.mechanism import Randomness
from confide.common.crypto import KEY_BYTES, Keystream, Scratch, derive
from confide.common.errors import PrivacyError
from confide.common.examples import Ints

Words = npt.NDArray[np.uint64]

CRYPTOGRAPHIC: Final = "cryptographic"
# In grid units: above 10,000 · 2^30, the largest noise multiplier there is. Below it no result reaches 2^49, and float64
# can tell where between two integers a value lies.
LARGEST_DEVIATION: Final = 2.0**44
# Total variation between one draw and the rounded Gaussian, if words are uniform and `_MARGIN` holds. They differ only
# where `_exact` gives up. In the square of (uniform, angle) each boundary k + 1/2 is a monotone curve, which crosses fewer
# than 2^513 of the 2^512 × 2^510 cells. A cell is given up if such a curve, or one of the two that lie 2^-1700 beside it
# (the slack of the arithmetic), crosses it, or if it lies between them. Two outputs of a pair have fewer than 2^50
# boundaries within reach, so this has a probability below 2^50 · 3 · 2^-509 + 2^-512 + 2^-1600 < 2^-457. Stated is far
# more: even (1 + e^100) · 2^60 draws times this stay below 2^-95.
DISTANCE_PER_DRAW: Final = 2.0**-300

_WORDS = b"confide-noise/1 words"
_ROUNDING = b"confide-noise/1 rounding"
_PAIRS = 1 << 14  # Box-Muller's pairs gone through at once: their float64 copies stay in the cache
_MOST_BITS = 512

# How far float64 may be off, over deviation · (radius + 1 / (16 · radius)). In units of 2^-53 · deviation · radius, and
# if numpy's log, sin and cos err by 4 units in the last place (its own data for float64 list 1): log 4, sqrt 1, products
# 2, the angle 4, sin or cos 4, together 15, where the margin has 128. The uniform is rounded to 53 bits and cut off at
# 64. That moves its logarithm by up to 2^-53 + 2^-64 / uniform, and the radius by that over the radius: by 1.5 of these
# units where the uniform is below 1/2 and the radius below `_TAIL`; by little more than 2^-53 · deviation / radius
# elsewhere, where the margin has 8 times that. So the margin is 7 times what can happen. In tests a 17th of it is used by
# random words, and an 11th by the worst there are: the largest uniform below 1.
_MARGIN = 2.0**-46
_TAIL = 4.7  # beyond this radius the uniform is below 2^-15.9, and its 64 bits are too few for the margin
_LEAST_RADIUS = 2.0**-27  # below the radius of the largest uniform under 1 in float64


class CryptographicNoise:
    """Draws that follow from 32 fresh bytes of the operating system, by AES-256 in counter mode.

    Make one for each round. It is never stored or restored, cannot be copied or pickled, and shows nothing of itself.

    Raises:
        PrivacyError: On use in a process forked from the one that made it: both would draw the same.

    Guarantee: two of them never agree, and whoever can tell their words from uniform ones can tell AES-256 from a random
    function.
    Source: NIST SP 800-38A, section 6.5; RFC 5869 for the two keys.
    """

    __slots__ = ("_left", "_lock", "_next", "_process", "_rounding_key", "_scratch", "_stream")
    name = CRYPTOGRAPHIC

    def __init__(self) -> None:
        secret = secrets.token_bytes(KEY_BYTES)
        self._stream = Keystream(derive(secret, _WORDS))
        self._rounding_key = derive(secret, _ROUNDING)
        self._scratch = Scratch()
        self._left: Words = np.empty(0, "<u8")  # what is not yet handed out of the last block
        self._next = 0
        self._lock = threading.Lock()  # two threads must not be given the same words
        self._process = os.getpid()

    def words(self, count: int) -> Words:
        """Return independent uniform 64-bit words, (count,); none is returned twice."""
        self._stay_home()
        found = np.empty(count, np.uint64)
        filled = 0
        with self._lock:
            while filled < count:
                if not len(self._left):
                    self._left = self._stream.block(self._next, self._scratch).view("<u8")
                    self._next += 1
                taken = self._left[: count - filled]
                found[filled : filled + len(taken)] = taken
                self._left = self._left[len(taken) :]
                filled += len(taken)
        return found

    def rounding_key(self) -> bytes:
        """Return the key, 32 bytes, of the keystream that updates are rounded with; it tells nothing of the words."""
        self._stay_home()
        return self._rounding_key

    def _stay_home(self) -> None:
        if os.getpid() != self._process:
            raise PrivacyError(
                f"Noise made in process {self._process} was asked for in process {os.getpid()}, forked from it; both would "
                "draw the same. Make it in the process that trains."
            )

    def __repr__(self) -> str:
        return "<CryptographicNoise>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("A CryptographicNoise is not pickled or copied: two of them would draw the same noise.")


def drawn(randomness: Randomness, sampling_rate: float, count: int) -> Ints:
    """Return who takes part in a step: the indices, ascending, of those drawn out of `count`, each on her own.

    Args:
        randomness: Gives one word for each; none if the rate is 1.
        sampling_rate: q, above 0, at most 1.
        count: How many there are.

    Raises:
        PrivacyError: The rate is out of range.

    Guarantee: each is drawn with a probability of exactly floor(q · 2^64) / 2^64, which is never above q.
    """
    limit = sampling_limit(sampling_rate)
    if limit == 1 << 64:
        return np.arange(count, dtype=np.int64)
    return np.flatnonzero(randomness.words(count) < np.uint64(limit)).astype(np.int64, copy=False)


def sampling_limit(sampling_rate: float) -> int:
    """Return how many of the 2^64 words draw a person: floor(q · 2^64), by exact arithmetic.

    Raises:
        PrivacyError: The rate is out of range.
    """
    if not 0 < sampling_rate <= 1:
        raise PrivacyError(
            f"A sampling rate of {float(sampling_rate)!r} is outside its range (above 0, at most 1). Set [privacy] sampling_rate."
        )
    return int(Fraction(sampling_rate) * 2**64)


def rounded_gaussian(randomness: Randomness, deviation: float, count: int) -> npt.NDArray[np.int64]:
    """Return independent Gaussians, each rounded to the nearest integer, (count,), int64.

    Box and Muller's pairs are computed in float64. What lies too near to the middle between two integers for float64 to
    tell the side, about 4 in 100,000 draws at a deviation of 2^30 and in proportion to it, is decided by exact arithmetic,
    which draws further bits of the same uniforms where it needs them. So the result does not depend on the last bits of
    float64, and the same words give the same integers on every machine.

    Args:
        randomness: Gives two words for each pair, in blocks, and seldom more.
        deviation: Standard deviation before rounding, above 0, at most LARGEST_DEVIATION.
        count: How many.

    Raises:
        PrivacyError: The deviation is out of range; or a draw was undecided after 512 bits, as happens to nobody.

    Guarantee: each draw is within DISTANCE_PER_DRAW in total variation of round(N(0, deviation²)).
    Source: Box and Muller 1958, A Note on the Generation of Random Normal Deviates.
    """
    if not 0 < deviation <= LARGEST_DEVIATION:
        raise PrivacyError(
            f"Noise of the standard deviation {deviation:g} grid units cannot be drawn; the range is above 0, at most "
            "2^44. Change the plan's epsilon, or choose a coarser grid."
        )
    found = np.empty(count, np.int64)
    for start in range(0, count, 2 * _PAIRS):
        block = found[start : start + 2 * _PAIRS]
        pairs = (len(block) + 1) // 2
        block[:] = _pairs(randomness, float(deviation), pairs).reshape(-1)[: len(block)]
    return found


def _pairs(randomness: Randomness, deviation: float, pairs: int) -> npt.NDArray[np.int64]:
    """Return both integers of each pair, (2, pairs)."""
    words = randomness.words(2 * pairs)
    uniforms, angles = words[:pairs], words[pairs:]
    values, margins = _approximate(uniforms, angles, deviation)
    nearest = np.rint(values)
    undecided = ~(np.abs(values - nearest) < 0.5 - margins)  # (2, pairs)
    integers = nearest.astype(np.int64)
    for pair in np.flatnonzero(undecided.any(axis=0)):
        integers[:, pair] = _exact(int(uniforms[pair]), int(angles[pair]), deviation, randomness)
    return integers


def _approximate(
    uniforms: Words, angles: Words, deviation: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return both values of each pair, (2, pairs), and by how much they may be off, (pairs,).

    A word of `uniforms` holds the leading 64 bits of a uniform in (0, 1). A word of `angles` holds, from its top, the sign
    of the second value, 62 bits of a quarter turn, and the sign of the first value.
    """
    uniform = (uniforms | np.uint64(1)).astype(np.float64) * 2.0**-64  # within its cell, and never 0
    radius = np.sqrt(-2.0 * np.log(uniform))
    angle = (angles.view(np.int64) >> 1) * (np.pi * 2.0**-63)  # in [-π/2, π/2)
    values = np.empty((2, len(uniforms)))
    np.cos(angle, out=values[0])
    np.sin(angle, out=values[1])
    values[0].view(np.uint64)[:] ^= angles << np.uint64(63)  # the lowest bit becomes the sign's
    values *= deviation * radius
    margins = (radius + 0.0625 / np.maximum(radius, _LEAST_RADIUS)) * (deviation * _MARGIN)
    margins[radius > _TAIL] = np.inf
    return values, margins


def _exact(uniform: int, angle: int, deviation: float, randomness: Randomness) -> tuple[int, int]:
    """Return both integers of the pair that begins with these words, whatever further words that takes.

    How long it takes depends on the words alone, not on what the noise will be added to.
    """
    signs = (-1 if angle & 1 else 1, -1 if angle >> 63 else 1)
    turn = (angle if signs[1] > 0 else ~angle) >> 1 & (1 << 62) - 1  # a negative one is mirrored
    for bits in range(64, _MOST_BITS + 1, 64):
        if uniform:  # before the first bit that is set, the radius has no bound
            with decimal.localcontext(decimal.Context(prec=bits + 24)):
                within = [[_rounded(end) for end in ends] for ends in _within(uniform, turn, bits, deviation)]
            if all(low == high for low, high in within):
                return signs[0] * within[0][0], signs[1] * within[1][0]
        more = randomness.words(2)
        uniform, turn = uniform << 64 | int(more[0]), turn << 64 | int(more[1])
    raise PrivacyError(
        f"A draw of noise was undecided after {_MOST_BITS} bits, which has a probability below 2^-300: the source of "
        "randomness is broken. Use nothing that was drawn from it."
    )


def _within(uniform: int, turn: int, bits: int, deviation: float) -> tuple[tuple[Decimal, Decimal], ...]:
    """Return between which ends the magnitudes of both values lie, whatever bits follow.

    It computes in the current context, which must have `bits` + 24 digits. A fraction of so many bits has as many
    decimal digits, so the ends of cells are exact. Each of some hundred operations errs by less than 2 units in the last
    digit, on values below 30 deviations; the slack is 10^9 units of one deviation.

    Args:
        uniform: The leading `bits` bits of a uniform in (0, 1), not all 0.
        turn: The leading `bits` - 2 bits of the part of a quarter turn.
        bits: At least 64.
        deviation: Of the Gaussian.
    """
    far, near = ((-2 * (Decimal(end) / (1 << bits)).ln()).sqrt() for end in (uniform, uniform + 1))
    first, last = (_cos_sin(_pi(bits + 24) * end / (1 << bits - 1)) for end in (turn, turn + 1))
    slack = Decimal(10) ** -(bits + 15)
    scale = Decimal(deviation)
    return (
        (scale * (near * last[0] - slack), scale * (far * first[0] + slack)),  # the cosine falls over a quarter turn
        (scale * (near * first[1] - slack), scale * (far * last[1] + slack)),
    )


def _rounded(value: Decimal) -> int:
    return int((value + Decimal("0.5")).to_integral_value(decimal.ROUND_FLOOR))


def _cos_sin(angle: Decimal) -> tuple[Decimal, Decimal]:
    """Return cosine and sine of an angle in [0, π/2], by their series, in the current context."""
    cosine, sine, term, power = Decimal(1), Decimal(0), Decimal(1), 0
    least = Decimal(10) ** -decimal.getcontext().prec
    while term >= least:
        power += 1
        term = term * angle / power
        match power % 4:
            case 0:
                cosine += term
            case 1:
                sine += term
            case 2:
                cosine -= term
            case _:
                sine -= term
    return cosine, sine


@functools.cache
def _pi(digits: int) -> Decimal:
    """Return π to so many digits, by Machin's formula in integers: π / 4 = 4 arctan(1/5) - arctan(1/239)."""
    unit = 10 ** (digits + 10)

    def arctan(inverse: int) -> int:
        power, odd, total = unit // inverse, 1, 0
        while power:
            total += power // odd if odd % 4 == 1 else -(power // odd)
            power, odd = power // inverse**2, odd + 2
        return total

    with decimal.localcontext(decimal.Context(prec=digits + 10)):
        return Decimal(16 * arctan(5) - 4 * arctan(239)).scaleb(-(digits + 10))
