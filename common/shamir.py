"""A secret in shares, of which any `threshold` give it back and fewer say nothing about it.

The field is GF(p) with p = 2^256 + 297, the smallest prime above every 32-byte secret. The secret is the value at 0 of a
polynomial of degree threshold - 1 whose other coefficients are random; the share of point x is its value at x.

Python's integers do not run in constant time. Points, and so the course of every loop, are public; what a local clock
may still see is the size of single numbers modulo p. Whoever can time this process that finely is on the machine that
holds the secrets anyway.

Source: Shamir, "How to share a secret", Communications of the ACM 22 (1979).
"""

import itertools
import math
import operator
import os
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence

from confide.common.errors import MessageError, UsageError

Entropy = Callable[[int], bytes]
SECRET_BYTES = 32
SHARE_BYTES = 33
NO_SHARE = b"\xff" * SHARE_BYTES  # "I hold no share"; larger than p, so it is no share of anything
LARGEST_POINT = 1 << 16
LARGEST_SEARCH = 2000  # subsets that `recover` tries at most, after the likeliest one

_PRIME = 2**256 + 297
_COEFFICIENT_BYTES = 48
_LAZY = 16  # steps of Horner's rule between two reductions modulo p; numbers grow to about 530 bits


def split(secret: bytes, threshold: int, points: Sequence[int], entropy: Entropy = os.urandom) -> list[bytes]:
    """Return one share of `secret` for each point, in the order of `points`.

    The coefficient of x^i is the big-endian number in bytes 48·(i - 1) to 48·i of one draw of entropy, modulo p. It is
    within statistical distance 2^-129 of uniform.

    Args:
        secret: 32 bytes.
        threshold: How many shares give the secret back, 1 to the number of points.
        points: Where the shares lie; public, distinct, 1 to 2^16.
        entropy: Draws that many random bytes.

    Returns:
        Shares of 33 bytes, big-endian numbers below p.

    Raises:
        UsageError: The secret, the threshold, the points or the entropy are not as above.

    Guarantee:
        Fewer than `threshold` shares are within statistical distance 2^-113 of uniform, whatever the secret is.
    """
    _check_points(points)
    if len(secret) != SECRET_BYTES:
        raise UsageError(f"A secret of {len(secret)} bytes cannot be split; it must have {SECRET_BYTES}.")
    if not 1 <= threshold <= len(points):
        raise UsageError(f"A threshold of {threshold} of {len(points)} shares cannot be; choose 1 to {len(points)}.")
    due = _COEFFICIENT_BYTES * (threshold - 1)
    drawn = entropy(due)
    if len(drawn) != due:
        raise UsageError(f"The entropy gave {len(drawn)} bytes where {due} were asked for; use os.urandom.")
    coefficients = [secret, *(drawn[i : i + _COEFFICIENT_BYTES] for i in range(0, due, _COEFFICIENT_BYTES))]
    falling = [int.from_bytes(coefficient) % _PRIME for coefficient in reversed(coefficients)]
    steps = [falling[i : i + _LAZY] for i in range(0, threshold, _LAZY)]
    return [_value(steps, point).to_bytes(SHARE_BYTES) for point in points]


class Combiner:
    """Gives back secrets whose shares lie at one tuple of points; made once, used for many secrets.

    Args:
        points: Distinct, 1 to 2^16, as many as the threshold or more.

    Raises:
        UsageError: The points are not as above.
    """

    __slots__ = ("_coefficients", "points")

    def __init__(self, points: Sequence[int]) -> None:
        _check_points(points)
        self.points = tuple(points)
        # The coefficient of point x is the product, over all other points y, of y / (y - x).
        numerator = _product(self.points)
        below = [x * _product(y - x for y in self.points if y != x) % _PRIME for x in self.points]
        self._coefficients = [numerator * inverse % _PRIME for inverse in _inverses(below)]

    def combine(self, shares: Sequence[bytes]) -> bytes:
        """Return the secret of 32 bytes, or 32 bytes that mean nothing if a share is wrong.

        Args:
            shares: One share of 33 bytes per point, in the order of `points`.

        Raises:
            UsageError: There are more or fewer shares than points.
            MessageError: A share is no element of the field, or what they give is no secret.
        """
        if len(shares) != len(self.points):
            raise UsageError(f"{len(shares)} shares were given for {len(self.points)} points; give one for each.")
        total: int = sum(map(operator.mul, self._coefficients, map(_element, shares))) % _PRIME
        if total >> (8 * SECRET_BYTES):
            raise MessageError(
                f"The shares of {len(shares)} sites give no secret of {SECRET_BYTES} bytes: at least one is wrong. "
                "Leave some out and try the others."
            )
        return total.to_bytes(SECRET_BYTES)

    def share_at(self, point: int, shares: Sequence[bytes]) -> bytes:
        """Return the share that belongs at another point, 33 bytes, if all `shares` are right.

        Args:
            point: 1 to 2^16, none of `points`.
            shares: As for `combine`.

        Raises:
            UsageError: The point is one of `points` or out of range.
            MessageError: A share is no element of the field.
        """
        _check_points((*self.points, point))
        # Lagrange at `point`, out of the coefficients at 0: each gains x / (x - point) and the product of (y - point) / y.
        inverses = _inverses([(x - point) % _PRIME for x in self.points])
        weights = map(operator.mul, self._coefficients, map(operator.mul, self.points, inverses))
        total: int = sum(weight % _PRIME * _element(share) for weight, share in zip(weights, shares, strict=True))
        moved: int = _product(y - point for y in self.points) * pow(_product(self.points), -1, _PRIME)
        return (total * moved % _PRIME).to_bytes(SHARE_BYTES)


def recover(
    shares: Mapping[int, bytes],
    threshold: int,
    accept: Callable[[bytes], bool],
    suspects: Collection[int] = (),
    combiners: MutableMapping[tuple[int, ...], Combiner] | None = None,
) -> tuple[bytes, frozenset[int]]:
    """Return the secret that `accept` recognises, although some shares are wrong, and the points of the wrong ones.

    All shares of points that are not suspect are combined first, so if they are right one combination is all. After that
    come subsets of `threshold` shares in a fixed order, those with fewer suspects first: all subsets if there are at
    most 2000, else at most 2000 of them. With w wrong among m shares a subset is free of them with probability about
    ((m - threshold) / m)^w.

    What is sure is the secret, as sure as `accept`. A blamed point is a lead and no proof: whoever dealt the share may
    have dealt it wrong. Sites that collude can choose wrong shares whose errors cancel in some subset, so that right
    shares seem wrong. Therefore the search goes on until only suspects are left out or (m + threshold) / 2 shares agree,
    which no second polynomial can reach if at most (m - threshold) / 2 are wrong. If more are, or the search is cut
    short, the largest agreement found decides, and sites that collude may put the blame on others. Errors that cancel
    in the first combination do no harm and are not seen.

    Args:
        shares: Point to share. `NO_SHARE` counts as absent; a malformed share counts as wrong.
        threshold: How many shares the secret was split for, at least 1.
        accept: Whether 32 bytes are the secret; it is called with wrong ones too.
        suspects: Points whose shares were wrong before. They are tried last, and blamed only for what they sent now.
        combiners: Keeps what depends on the points alone. Give the same one for all secrets of the same sites.

    Raises:
        UsageError: The threshold or a point is out of range.
        MessageError: There are too few shares, or no subset that was tried gives a secret that is accepted.
    """
    if threshold < 1:
        raise UsageError(f"A threshold of {threshold} shares cannot be; it must be at least 1.")
    offered = {point: shares[point] for point in sorted(shares) if shares[point] != NO_SHARE}
    sound = {point: share for point, share in offered.items() if _is_element(share)}
    if len(sound) < threshold:
        raise MessageError(
            f"{len(sound)} usable shares of a secret arrived; {threshold} are needed. The round cannot be opened."
        )
    known: MutableMapping[tuple[int, ...], Combiner] = {} if combiners is None else combiners
    doubted, tried = frozenset(suspects), set[tuple[int, ...]]()
    found: tuple[bytes, frozenset[int]] | None = None
    for points in _likely(tuple(sound), threshold, doubted):
        if points in tried:
            continue
        tried.add(points)
        combiner = known.get(points) or Combiner(points)
        chosen = [sound[point] for point in points]
        try:
            secret = combiner.combine(chosen)
        except MessageError:
            continue
        if not accept(secret):
            continue
        rest = sound.keys() - set(points)
        wrong = frozenset(point for point in rest if sound[point] != combiner.share_at(point, chosen))
        if found is None or len(wrong) < len(found[1]):
            found = secret, wrong
            known[points] = combiner  # only what worked is kept: the next secret of these sites begins with it
        if rest <= doubted or 2 * (len(sound) - len(wrong)) >= len(sound) + threshold:
            break
    if found is None:
        raise MessageError(
            f"No {threshold} of {len(sound)} shares that were tried give the secret: too many are wrong. "
            "The round cannot be opened."
        )
    secret, wrong = found
    return secret, wrong | (offered.keys() - sound.keys())


def _likely(points: tuple[int, ...], threshold: int, suspects: frozenset[int]) -> Iterator[tuple[int, ...]]:
    """Give subsets of `points`, each ascending, the likeliest to be right first."""
    trusted = [point for point in points if point not in suspects]
    doubted = [point for point in points if point in suspects]
    if len(trusted) >= threshold:
        yield tuple(trusted)
    # It chooses what to try and no secret; a fixed seed makes every server take the same course.
    chance = random.Random(0)  # noqa: S311
    if math.comb(len(points), threshold) <= LARGEST_SEARCH:
        subsets = list(itertools.combinations(points, threshold))
        chance.shuffle(subsets)
        yield from sorted(subsets, key=lambda subset: len(suspects.intersection(subset)))
        return
    from_trusted = min(threshold, len(trusted))
    for _ in range(LARGEST_SEARCH // 2):
        yield tuple(sorted(chance.sample(trusted, from_trusted) + chance.sample(doubted, threshold - from_trusted)))
    # Suspicion may be wrong, so the other half of the search does not listen to it.
    for _ in range(LARGEST_SEARCH // 2):
        yield tuple(sorted(chance.sample(points, threshold)))


def _check_points(points: Sequence[int]) -> None:
    if not points or min(points) < 1 or max(points) > LARGEST_POINT:
        span = f"{min(points)} to {max(points)}" if points else "none"
        raise UsageError(f"Points of shares are {span}; they must lie within 1 to {LARGEST_POINT}, one or more.")
    if len(set(points)) != len(points):
        raise UsageError(f"{len(points)} points of shares have {len(set(points))} different values; all must differ.")


def _value(steps: Iterable[Sequence[int]], point: int) -> int:
    """Evaluate by Horner's rule, highest coefficient first. To reduce once per step, not per coefficient, halves the time."""
    total = 0
    for step in steps:
        for coefficient in step:
            total = total * point + coefficient
        total %= _PRIME
    return total


def _product(factors: Iterable[int]) -> int:
    return math.prod(factors) % _PRIME


def _inverses(numbers: Sequence[int]) -> list[int]:
    """Invert all `numbers` modulo p at the price of one inversion (Montgomery's trick)."""
    running = list(itertools.accumulate(numbers, lambda left, right: left * right % _PRIME, initial=1))
    inverse = pow(running.pop(), -1, _PRIME)
    inverses = []
    for before, number in zip(reversed(running), reversed(numbers), strict=True):
        inverses.append(inverse * before % _PRIME)
        inverse = inverse * number % _PRIME
    inverses.reverse()
    return inverses


def _is_element(share: bytes) -> bool:
    return len(share) == SHARE_BYTES and int.from_bytes(share) < _PRIME


def _element(share: bytes) -> int:
    number = int.from_bytes(share)
    if len(share) != SHARE_BYTES or number >= _PRIME:
        raise MessageError(
            f"A share of {len(share)} bytes is no element of the field; due are {SHARE_BYTES} bytes, below 2^256 + 297."
        )
    return number
