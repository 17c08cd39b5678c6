"""Secrets in shares: any threshold of them is enough, fewer say nothing, wrong ones are found."""

import hashlib
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies

from confide.common.errors import MessageError, UsageError
from confide.common.shamir import (
    LARGEST_POINT,
    LARGEST_SEARCH,
    NO_SHARE,
    SHARE_BYTES,
    Combiner,
    Entropy,
    recover,
    split,
)

P = 2**256 + 297
VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "shamir.json").read_text())["cases"]
SECRET = hashlib.sha256(b"a secret").digest()
SECRETS = strategies.binary(min_size=32, max_size=32)
POINTS = strategies.lists(strategies.integers(1, LARGEST_POINT), min_size=1, max_size=9, unique=True)


def given_bytes(stream: bytes) -> Entropy:
    def draw(count: int) -> bytes:
        assert count == len(stream)
        return stream

    return draw


def plain_shares(secret: bytes, points: list[int], entropy: bytes) -> list[bytes]:
    """Every share as the sum of its terms, power by power."""
    coefficients = [int.from_bytes(secret, "big")]
    coefficients += [int.from_bytes(entropy[i : i + 48], "big") for i in range(0, len(entropy), 48)]
    values = [sum(c * pow(x, power, P) for power, c in enumerate(coefficients)) % P for x in points]
    return [value.to_bytes(33, "big") for value in values]


def plain_value(shares: dict[int, bytes], at: int) -> int:
    """Lagrange's formula at `at`, factor by factor."""
    total = 0
    for x, share in shares.items():
        term = int.from_bytes(share, "big")
        for y in shares.keys() - {x}:
            term = term * (at - y) * pow(x - y, -1, P) % P
        total += term
    return total % P


def altered(share: bytes) -> bytes:
    """Another element of the field, chosen without regard to other shares."""
    return hashlib.sha256(share).digest().rjust(SHARE_BYTES, b"\0")


def is_secret(candidate: bytes) -> bool:
    return candidate == SECRET


def only(secret: bytes) -> Callable[[bytes], bool]:
    return lambda candidate: candidate == secret


def never(candidate: bytes) -> bool:
    return False


def shares_of(secret: bytes, threshold: int, count: int) -> dict[int, bytes]:
    points = range(1, count + 1)
    return dict(zip(points, split(secret, threshold, points), strict=True))


def counted(accept: Callable[[bytes], bool]) -> tuple[Callable[[bytes], bool], list[bytes]]:
    seen: list[bytes] = []

    def look(candidate: bytes) -> bool:
        seen.append(candidate)
        return accept(candidate)

    return look, seen


def test_the_modulus_is_the_smallest_prime_above_every_secret() -> None:
    twos = ((P - 1) & (1 - P)).bit_length() - 1

    # Fermat's test to base 3 shows that a number is composite; base 2 would pass 2^256 + 1, which is a Fermat number.
    smaller = [number for number in range(2**256, P) if pow(3, number - 1, number) == 1]
    # Miller and Rabin's test: a composite number passes 40 bases with probability at most 4^-40.
    runs = [[pow(base, (P - 1) >> halved, P) for halved in range(twos + 1)] for base in range(2, 42)]

    assert smaller == []
    assert all(run[0] == 1 and (run[-1] == 1 or P - 1 in run) for run in runs)


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: f"{case['threshold']} of {len(case['points'])}")
def test_shares_are_the_known_answers(case: dict[str, Any]) -> None:
    secret, entropy, known = bytes.fromhex(case["secret"]), bytes.fromhex(case["entropy"]), case["shares"]
    points, threshold = case["points"], case["threshold"]

    shares = split(secret, threshold, points, given_bytes(entropy))

    last = dict(zip(points[-threshold:], shares[-threshold:], strict=True))
    assert [share.hex() for share in shares] == known
    assert [share.hex() for share in plain_shares(secret, points, entropy)] == known
    assert plain_value(last, 0).to_bytes(32, "big") == secret
    assert Combiner(list(last)).combine(list(last.values())) == secret


@given(SECRETS, POINTS, strategies.data())
def test_any_threshold_of_shares_give_the_secret_back(
    secret: bytes, points: list[int], data: strategies.DataObject
) -> None:
    threshold = data.draw(strategies.integers(1, len(points)))
    shares = dict(zip(points, split(secret, threshold, points), strict=True))
    chosen = data.draw(strategies.permutations(points))[: data.draw(strategies.integers(threshold, len(points)))]

    found = Combiner(chosen).combine([shares[point] for point in chosen])

    assert found == secret
    assert plain_value({point: shares[point] for point in chosen}, 0) == int.from_bytes(secret, "big")


@given(SECRETS, POINTS, strategies.data())
def test_the_share_of_another_point_follows_from_the_others(
    secret: bytes, points: list[int], data: strategies.DataObject
) -> None:
    threshold = data.draw(strategies.integers(1, len(points)))
    shares = dict(zip(points, split(secret, threshold, points), strict=True))
    known = points[:threshold]
    combiner = Combiner(known)

    found = {point: combiner.share_at(point, [shares[x] for x in known]) for point in points[threshold:]}

    assert found == {point: shares[point] for point in points[threshold:]}


@given(SECRETS, SECRETS, strategies.integers(2, 6), strategies.data())
def test_one_share_less_than_the_threshold_fits_every_secret_equally(
    secret: bytes, other: bytes, threshold: int, data: strategies.DataObject
) -> None:
    # Through threshold - 1 shares and any secret at 0 goes exactly one polynomial of degree threshold - 1. Here it is
    # found for another secret and given to `split`, which then deals the same shares. All coefficients are equally
    # likely, so the shares are too, whatever the secret is.
    points = data.draw(
        strategies.lists(
            strategies.integers(1, LARGEST_POINT), min_size=threshold - 1, max_size=threshold - 1, unique=True
        )
    )
    unused = next(x for x in range(1, LARGEST_POINT) if x not in points)
    held = split(secret, threshold, [*points, unused])[:-1]

    fitting = _coefficients(other, dict(zip(points, held, strict=True)))
    again = split(other, threshold, [*points, unused], given_bytes(b"".join(c.to_bytes(48, "big") for c in fitting)))

    assert again[:-1] == held


def _coefficients(secret: bytes, shares: dict[int, bytes]) -> list[int]:
    """Coefficients of x, x², … of the polynomial through `secret` at 0 and the shares, by Gauss's elimination."""
    start = int.from_bytes(secret, "big")
    rows = [
        [*(pow(x, power, P) for power in range(1, len(shares) + 1)), (int.from_bytes(share, "big") - start) % P]
        for x, share in shares.items()
    ]
    for column in range(len(rows)):
        pivot = next(i for i in range(column, len(rows)) if rows[i][column])
        rows[column], rows[pivot] = rows[pivot], rows[column]
        inverse = pow(rows[column][column], -1, P)
        rows[column] = [entry * inverse % P for entry in rows[column]]
        for i, row in enumerate(rows):
            if i != column:
                rows[i] = [(entry - row[column] * own) % P for entry, own in zip(row, rows[column], strict=True)]
    return [row[-1] for row in rows]


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32], ids=["zeros", "ones"])
def test_shares_below_the_threshold_look_uniform_whatever_the_secret(secret: bytes) -> None:
    # Chi-square over the 256 values of a byte: a fair source exceeds 414.6 with probability below 1e-9, at each of two secrets.
    draw = np.random.default_rng(1).bytes
    two = [split(secret, 3, [1, 2, 65536], draw)[:2] for _ in range(2000)]

    seen = np.bincount(np.frombuffer(b"".join(share[1:] for pair in two for share in pair), np.uint8), minlength=256)

    expected = seen.sum() / 256
    assert float(((seen - expected) ** 2 / expected).sum()) < 414.6


def test_two_splits_of_a_secret_have_no_share_in_common() -> None:
    one, other = split(SECRET, 2, range(1, 6)), split(SECRET, 2, range(1, 6))

    assert not set(one) & set(other)


@pytest.mark.parametrize(("count", "threshold"), [(4, 3), (5, 3), (6, 4), (7, 5), (8, 4)])
def test_every_choice_of_wrong_shares_is_found_and_blamed(count: int, threshold: int) -> None:
    shares = shares_of(SECRET, threshold, count)

    for wrong in range(count - threshold + 1):
        for corrupt in itertools.combinations(shares, wrong):
            sent = {point: altered(share) if point in corrupt else share for point, share in shares.items()}
            assert recover(sent, threshold, is_secret) == (SECRET, frozenset(corrupt))


@pytest.mark.parametrize(("count", "threshold"), [(6, 2), (6, 3), (7, 3), (8, 4)])
def test_two_sites_that_collude_cannot_put_the_blame_on_others(count: int, threshold: int) -> None:
    shares = shares_of(SECRET, threshold, count)
    for one, other in itertools.combinations(shares, 2):
        for rest in itertools.combinations(sorted(shares.keys() - {one, other}), threshold - 2):
            # Their errors cancel in this subset, so it gives the secret although two of its shares are wrong.
            subset = sorted({one, other, *rest})
            zero = dict.fromkeys(subset, bytes(33))
            pull = {x: plain_value(zero | {x: (1).to_bytes(33, "big")}, 0) for x in (one, other)}
            sent = dict(shares)
            for x, error in ((one, pull[other]), (other, -pull[one])):
                sent[x] = ((int.from_bytes(shares[x], "big") + error) % P).to_bytes(33, "big")
            assert Combiner(subset).combine([sent[x] for x in subset]) == SECRET

            found, blamed = recover(sent, threshold, is_secret)

            unseen = Combiner(sorted(sent)).combine([sent[x] for x in sorted(sent)]) == SECRET
            assert (found, blamed) == (SECRET, frozenset() if unseen else frozenset({one, other}))


@pytest.mark.parametrize("corrupt", [(1,), (64,), (3, 4), (1, 30, 31, 64), (2, 3, 5, 7, 11)])
def test_wrong_shares_among_many_are_found_and_blamed(corrupt: tuple[int, ...]) -> None:
    sent = shares_of(SECRET, 43, 64)
    sent.update({point: altered(sent[point]) for point in corrupt})
    accept, tried = counted(is_secret)

    found = recover(sent, 43, accept)

    assert found == (SECRET, frozenset(corrupt))
    assert len(tried) <= 1 + LARGEST_SEARCH


def test_right_shares_cost_one_combination_and_their_coefficients_are_computed_once() -> None:
    combinations, combiners = [], dict[tuple[int, ...], Combiner]()
    first: Combiner | None = None

    for number in range(5):
        secret = hashlib.sha256(bytes([number])).digest()
        accept, tried = counted(only(secret))
        assert recover(shares_of(secret, 7, 10), 7, accept, combiners=combiners) == (secret, frozenset())
        combinations.append(len(tried))
        first = first or combiners[tuple(range(1, 11))]

    assert combinations == [1] * 5
    assert combiners == {tuple(range(1, 11)): first}


def test_who_was_wrong_before_is_left_out_of_the_next_first_combination() -> None:
    suspects, combinations = frozenset[int](), []
    for number, corrupt in enumerate([(2,), (9,), (2, 9), ()]):
        secret = hashlib.sha256(bytes([number])).digest()
        sent = shares_of(secret, 7, 10)
        sent.update({point: altered(sent[point]) for point in corrupt})
        accept, tried = counted(only(secret))
        found, wrong = recover(sent, 7, accept, suspects)
        assert (found, wrong) == (secret, frozenset(corrupt))
        suspects |= wrong
        combinations.append(len(tried))

    assert combinations[0] > 1
    assert combinations[1] > 1
    assert combinations[2:] == [1, 1]


def test_a_suspect_whose_share_is_right_is_not_blamed_again() -> None:
    shares = shares_of(SECRET, 3, 6)
    shares[5] = altered(shares[5])

    assert recover(shares, 3, is_secret, suspects={2, 5}) == (SECRET, frozenset({5}))


@pytest.mark.parametrize("count", [8, 40])
def test_wrong_suspicion_does_not_hide_the_secret(count: int) -> None:
    threshold = count // 2
    sent = shares_of(SECRET, threshold, count)
    sent[1] = altered(sent[1])

    found = recover(sent, threshold, is_secret, suspects=range(threshold + 1, count + 1))

    assert found == (SECRET, frozenset({1}))


@pytest.mark.parametrize("suspects", [(), (1, 2, 3), (1, 2, 3, 4, 5, 6, 7)])
def test_all_subsets_are_tried_if_there_are_few_and_those_with_suspects_last(suspects: tuple[int, ...]) -> None:
    shares = shares_of(SECRET, 5, 7)
    forged = {point: altered(share) for point, share in shares.items()}
    accept, tried = counted(never)

    with pytest.raises(MessageError, match="too many are wrong"):
        recover(forged, 5, accept, suspects)

    due = {
        Combiner(subset).combine([forged[point] for point in subset]): len(set(subset) & set(suspects))
        for subset in itertools.combinations(forged, 5)
    }
    later = [due[candidate] for candidate in tried if candidate in due]
    assert set(tried) >= set(due)
    assert later == sorted(later)


@pytest.mark.parametrize("suspects", [(), range(1, 11), range(1, 9), range(1, 21)])
def test_the_search_is_bounded_and_tries_nothing_twice(suspects: tuple[int, ...]) -> None:
    shares = {point: altered(share) for point, share in shares_of(SECRET, 10, 20).items()}
    accept, tried = counted(never)

    with pytest.raises(MessageError, match="too many are wrong"):
        recover(shares, 10, accept, suspects)

    assert math.comb(20, 10) > LARGEST_SEARCH
    assert LARGEST_SEARCH // 2 <= len(tried) <= 1 + LARGEST_SEARCH
    assert len(set(tried)) == len(tried)


def test_the_search_takes_the_same_course_every_time() -> None:
    sent = {point: altered(share) for point, share in shares_of(SECRET, 10, 20).items()}
    courses = []
    for _ in range(2):
        accept, tried = counted(never)
        with pytest.raises(MessageError):
            recover(sent, 10, accept)
        courses.append(tried)

    assert courses[0] == courses[1]


def test_no_share_counts_as_absent_and_is_not_blamed() -> None:
    shares = shares_of(SECRET, 3, 5)
    shares.update({2: NO_SHARE, 4: NO_SHARE})

    assert recover(shares, 3, is_secret) == (SECRET, frozenset())


MALFORMED = [b"", bytes(32), bytes(34), P.to_bytes(33, "big"), b"\xfe" + b"\xff" * 32]


@pytest.mark.parametrize("share", MALFORMED, ids=["empty", "short", "long", "p", "large"])
def test_a_malformed_share_is_blamed_and_the_others_give_the_secret(share: bytes) -> None:
    shares = shares_of(SECRET, 3, 5)
    shares[2] = share

    assert recover(shares, 3, is_secret) == (SECRET, frozenset({2}))


@pytest.mark.parametrize("share", [*MALFORMED, NO_SHARE], ids=["empty", "short", "long", "p", "large", "none"])
def test_what_is_no_element_of_the_field_is_not_combined(share: bytes) -> None:
    combiner = Combiner([1, 2])

    with pytest.raises(MessageError, match="no element of the field"):
        combiner.combine([bytes(33), share])
    with pytest.raises(MessageError, match="no element of the field"):
        combiner.share_at(3, [bytes(33), share])


@pytest.mark.parametrize("number", [2**256, P - 1])
def test_what_is_too_large_to_be_a_secret_is_refused(number: int) -> None:
    with pytest.raises(MessageError, match="give no secret of 32 bytes"):
        Combiner([1]).combine([number.to_bytes(33, "big")])


def test_a_share_that_gives_no_secret_does_not_end_the_search() -> None:
    shares = {1: (2**256).to_bytes(33, "big"), 2: shares_of(SECRET, 1, 1)[1]}

    assert recover(shares, 1, is_secret) == (SECRET, frozenset({1}))


@pytest.mark.parametrize("absent", [NO_SHARE, b"", P.to_bytes(33, "big"), None], ids=["none", "empty", "p", "absent"])
def test_too_few_shares_give_nothing(absent: bytes | None) -> None:
    shares = shares_of(SECRET, 4, 5)
    sent = {point: share if point <= 3 else absent for point, share in shares.items()}

    with pytest.raises(MessageError, match=r"3 usable shares .* 4 are needed"):
        recover({point: share for point, share in sent.items() if share is not None}, 4, is_secret)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "Points of shares are none"),
        ([0, 1], "Points of shares are 0 to 1"),
        ([-1], "Points of shares are -1 to -1"),
        ([1, LARGEST_POINT + 1], "Points of shares are 1 to 65537"),
        ([7, 3, 7], "3 points of shares have 2 different values"),
    ],
)
def test_points_that_cannot_be_are_refused(points: list[int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Combiner(points)
    with pytest.raises(UsageError, match=message):
        split(SECRET, 1, points)


@pytest.mark.parametrize("threshold", [-1, 0, 4])
def test_a_threshold_that_cannot_be_is_refused(threshold: int) -> None:
    with pytest.raises(UsageError, match=f"A threshold of {threshold} of 3 shares cannot be"):
        split(SECRET, threshold, [1, 2, 3])


def test_nothing_is_recovered_with_a_threshold_of_none() -> None:
    with pytest.raises(UsageError, match="A threshold of 0 shares"):
        recover(shares_of(SECRET, 1, 2), 0, is_secret)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_secret_of_another_size_is_refused_and_not_shown(size: int) -> None:
    with pytest.raises(UsageError, match=f"{size} bytes cannot be split") as refusal:
        split(b"\x41" * size, 1, [1])

    assert "A" * 8 not in str(refusal.value)
    assert "41" * 8 not in str(refusal.value)


def test_entropy_that_gives_too_little_is_refused() -> None:
    with pytest.raises(UsageError, match="47 bytes where 96 were asked for"):
        split(SECRET, 3, [1, 2, 3], lambda _: bytes(47))


@pytest.mark.parametrize("count", [1, 3])
def test_more_or_fewer_shares_than_points_are_refused(count: int) -> None:
    with pytest.raises(UsageError, match=f"{count} shares were given for 2 points"):
        Combiner([1, 2]).combine([bytes(33)] * count)


@pytest.mark.parametrize("point", [0, 1, 2, LARGEST_POINT + 1])
def test_the_share_of_a_point_that_cannot_be_is_refused(point: int) -> None:
    with pytest.raises(UsageError, match="of shares"):
        Combiner([1, 2]).share_at(point, [bytes(33)] * 2)
