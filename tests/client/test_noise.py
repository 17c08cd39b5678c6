"""Noise: its law, its exactness to the last integer, who is drawn, and words that nobody can have twice."""

import copy
import json
import math
import os
import pickle
import secrets
import sys
import threading
import tracemalloc
from collections.abc import Callable, Sequence
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, strategies
from scipy import stats

from confide.client import noise
from confide.client.noise import DISTANCE_PER_DRAW, CryptographicNoise, Words, drawn, rounded_gaussian, sampling_limit
from confide.common.crypto import Keystream, Scratch, derive
from confide.common.errors import PrivacyError
from confide.simulations.insecure import InsecureSeededNoise

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "noise.json").read_text())
RATES = strategies.floats(0, 1, exclude_min=True)
GRID = 2.0**30  # grid units in a clip norm
SMALLEST = 5e-324

Integers = npt.NDArray[np.int64]


class Written:
    """Randomness that gives the words it was given, in order."""

    name = "insecure_written"

    def __init__(self, words: Sequence[int]) -> None:
        self.left = list(words)

    def words(self, count: int) -> Words:
        given, self.left = self.left[:count], self.left[count:]
        assert len(given) == count
        return np.array(given, np.uint64)

    def rounding_key(self) -> bytes:
        raise NotImplementedError


def seeded(stream: str = "noise") -> InsecureSeededNoise:
    return InsecureSeededNoise(11, stream, 1)


def cells(uniforms: Words, angles: Words) -> list[tuple[list[Decimal], list[Decimal]]]:
    """Return between which ends both magnitudes of each pair lie, at a deviation of 1, by exact arithmetic."""
    found = []
    with localcontext(Context(prec=88)):
        for uniform, angle in zip(uniforms.tolist(), angles.tolist(), strict=True):
            turn = (angle ^ (2**64 - 1) if angle >> 63 else angle) >> 1
            first, second = noise._within(uniform, turn, 64, 1.0)
            found.append((list(first), list(second)))
    return found


def test_two_of_them_never_agree() -> None:
    made = [CryptographicNoise() for _ in range(8)]

    words = np.concatenate([each.words(5000) for each in made])

    assert len(np.unique(words)) == len(words)  # of 40,000 uniform words two are equal with probability 4e-11
    assert len({each.rounding_key() for each in made}) == len(made)


def test_words_are_an_aes_keystream_under_a_key_of_fresh_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "token_bytes", lambda count: bytes(range(count)))

    made = CryptographicNoise()
    words = np.concatenate([made.words(count) for count in (0, 1, 32_767, 5, 70_000)])

    stream, scratch = Keystream(derive(bytes(range(32)), b"confide-noise/1 words")), Scratch()
    due = np.concatenate([stream.block(number, scratch).view("<u8").copy() for number in range(4)])
    assert words.dtype == np.uint64
    assert (words == due[: len(words)]).all()
    assert made.rounding_key() == derive(bytes(range(32)), b"confide-noise/1 rounding")


def test_each_bit_of_a_word_is_set_half_of_the_time() -> None:
    """False alarm 1e-6 over all 64 bits: each count of 65,536 is within 5.7 standard deviations of a half."""
    words = CryptographicNoise().words(65_536)

    counts = np.array([(words >> np.uint64(bit) & np.uint64(1)).sum() for bit in range(64)], np.int64)

    assert np.abs(counts - 32_768).max() < 5.7 * 128


def test_what_was_drawn_is_the_callers_own() -> None:
    made = CryptographicNoise()
    first = made.words(100)
    before = first.copy()

    made.words(200_000)

    assert (first == before).all()


def test_threads_are_never_given_the_same_words() -> None:
    made = CryptographicNoise()
    found: list[Words] = []
    threads = [threading.Thread(target=lambda: found.extend(made.words(37) for _ in range(2000))) for _ in range(4)]
    pause = sys.getswitchinterval()

    sys.setswitchinterval(1e-6)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(pause)

    assert len(np.unique(np.concatenate(found))) == 4 * 2000 * 37


def test_it_is_in_no_repr_no_pickle_and_no_copy() -> None:
    made = CryptographicNoise()

    assert repr(made) == str(made) == "<CryptographicNoise>"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="not pickled or copied"):
            pickle.dumps(made, protocol)
    for duplicate in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="not pickled or copied"):
            duplicate(made)


@pytest.mark.parametrize("draw", [lambda n: n.words(1), lambda n: n.rounding_key()], ids=["words", "rounding key"])
def test_a_forked_process_cannot_go_on_with_it(draw: Callable[[CryptographicNoise], object]) -> None:
    made = CryptographicNoise()
    made.words(3)

    if not (child := os.fork()):
        try:
            draw(made)
        except PrivacyError as error:
            os._exit(0 if "forked" in str(error) else 1)
        finally:
            os._exit(2)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert draw(made)


@given(RATES)
@example(1.0)
@example(SMALLEST)
@example(2.0**-64)
@example(math.nextafter(1, 0))
def test_each_is_drawn_with_a_probability_never_above_q_and_at_most_two_to_the_minus_64_below(rate: float) -> None:
    limit = sampling_limit(rate)

    assert Fraction(limit, 2**64) <= Fraction(rate) < Fraction(limit + 1, 2**64)


@given(RATES.filter(lambda rate: 1 > rate >= 2.0**-64))
def test_exactly_the_words_below_the_limit_draw(rate: float) -> None:
    limit = sampling_limit(rate)

    found = drawn(Written([limit, limit - 1, 2**64 - 1, 0]), rate, 4)

    assert found.dtype == np.int64
    assert found.tolist() == [1, 3]


def test_a_rate_of_one_draws_everyone() -> None:
    assert drawn(Written([]), 1, 1000).tolist() == list(range(1000))
    assert drawn(seeded(), 1.0, 0).tolist() == []


@pytest.mark.parametrize("rate", [SMALLEST, 1e-300, math.nextafter(2.0**-64, 0)])
def test_a_rate_below_the_width_of_a_word_draws_nobody(rate: float) -> None:
    assert drawn(Written([0, 1, 2**64 - 1]), rate, 3).tolist() == []


@pytest.mark.parametrize("rate", [0.0, -0.0, -0.1, math.nextafter(1, 2), 2.0, math.inf, -math.inf, math.nan])
def test_a_sampling_rate_out_of_range_is_refused(rate: float) -> None:
    with pytest.raises(PrivacyError, match="sampling rate"):
        drawn(seeded(), rate, 3)


@pytest.mark.parametrize("rate", [0.003, 0.1, 0.5, 0.97])
def test_people_are_drawn_independently_of_each_other_and_of_earlier_steps(rate: float) -> None:
    """False alarm 1e-6 each: how many are drawn in all; how batch sizes spread; how often each person is drawn."""
    people, steps, randomness = 400, 500, seeded(f"drawn {rate}")

    taken = np.zeros((steps, people), bool)
    for step in range(steps):
        taken[step, drawn(randomness, rate, people)] = True

    assert stats.binomtest(int(taken.sum()), people * steps, rate).pvalue > 1e-6
    for counts, trials in ((taken.sum(axis=1), people), (taken.sum(axis=0), steps)):
        dispersion = np.square(counts - rate * trials).sum() / (trials * rate * (1 - rate))
        # Chi-square in the limit; its spread is a little wider for a binomial of a small mean.
        wide = math.sqrt(len(counts) * (2 + (1 - 6 * rate * (1 - rate)) / (trials * rate * (1 - rate))))
        assert abs(dispersion - len(counts)) < 5.5 * wide


def places(values: Integers, deviation: float) -> npt.NDArray[np.float64]:
    return np.asarray(stats.norm.cdf(values / deviation))


def check_variance(values: Integers, deviation: float) -> None:
    """Return if the sum of squares is that of Gaussians of this deviation, rounded; wrong alarm 1e-6."""
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], len(values))
    assert low <= np.square(values / math.hypot(deviation, math.sqrt(1 / 12))).sum() <= high


@pytest.mark.parametrize("sigma", [0.1, 0.7688, 30.0])
def test_the_noise_is_the_gaussian(sigma: float) -> None:
    """False alarm 1e-6 each: KS and chi-square over 256 equal bins, the mean, and the sum of squares, of 200,000 draws."""
    deviation, count = sigma * GRID, 200_000

    values = rounded_gaussian(seeded(f"{sigma}"), deviation, count)

    assert values.dtype == np.int64
    assert values.shape == (count,)
    assert stats.kstest(values / deviation, "norm").pvalue > 1e-6
    assert stats.chisquare(np.bincount((places(values, deviation) * 256).astype(int), minlength=256)).pvalue > 1e-6
    assert abs(values.mean()) < 4.9 * deviation / math.sqrt(count)
    check_variance(values, deviation)


@pytest.mark.parametrize("deviation", [0.3, 1.7, 12.0])
def test_the_noise_is_the_gaussian_rounded_where_integers_show(deviation: float) -> None:
    """False alarm 1e-6 each: chi-square against the exact probabilities of integers, 200,000 draws."""
    count = 200_000

    values = rounded_gaussian(seeded(f"rounded {deviation}"), deviation, count)

    edges = np.arange(-math.ceil(4 * deviation) - 0.5, math.ceil(4 * deviation) + 1)
    inner = np.array([math.erf(edge / deviation / math.sqrt(2)) / 2 for edge in edges])
    due = count * np.diff([-0.5, *inner, 0.5])
    found = np.histogram(values, [-np.inf, *edges, np.inf])[0]
    large = due >= 5
    chi_square = (np.square(found - due)[large] / due[large]).sum()
    assert chi_square < stats.chi2.isf(1e-6, large.sum() - 1)
    assert found[~large].sum() < 5 * (~large).sum() + 40


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_noise_of_a_variance_ten_percent_off_is_caught(share: float) -> None:
    values = rounded_gaussian(seeded("off"), math.sqrt(share) * GRID, 75_000)

    with pytest.raises(AssertionError):
        check_variance(values, GRID)


def test_draws_are_independent_within_pairs_across_blocks_and_across_calls() -> None:
    """False alarm 1e-6 over all: correlations of draws, of their squares and of their signs, of 300,000 draws."""
    randomness, deviation = seeded("lags"), GRID
    values = np.concatenate([rounded_gaussian(randomness, deviation, count) for count in (200_001, 99_999)]) / deviation
    kinds = (values, (np.square(values) - 1) / math.sqrt(2), np.sign(values))
    # A block has 2^14 pairs; the second values of its pairs follow all the first. The last block of the first call is
    # shorter: 1,697 pairs, of which one value is left over.
    lags = (1, 2, 3, 1_697, 1 << 14, (1 << 14) - 1, (1 << 14) + 1, 1 << 15, 99_999)

    found = [
        float(one[:-lag] @ other[lag:]) / math.sqrt(len(one) - lag) for one in kinds for other in kinds for lag in lags
    ]

    assert np.abs(found).max() < 5.8  # 81 nearly Gaussian statistics


def test_exact_arithmetic_agrees_with_another_librarys() -> None:
    for case in VECTORS["pairs"]["cases"]:
        uniform, angle = (int(word, 16) for word in case["words"])
        turn = (angle ^ (2**64 - 1) if angle >> 63 else angle) >> 1
        centre = 1 << 447

        with localcontext(Context(prec=536)):
            ends = noise._within(uniform << 448 | centre, turn << 448 | centre, 512, 1.0)
            errors = [abs(abs(Decimal(value)) - low) for (low, _), value in zip(ends, case["values"], strict=True)]
            widths = [high - low for low, high in ends]

        assert max(errors) < Decimal("1e-57")
        assert 0 < min(widths) <= max(widths) < Decimal("1e-120")


def test_the_margin_is_more_than_eight_times_what_float64_errs() -> None:
    """The cells of the words are part of the error. Words are random, and all that could be a corner."""
    random = seeded("margin").words(21_000)
    uniforms = [(1 << bit) + move for bit in range(1, 64) for move in (-2, -1, 0, 1, 2)]
    uniforms += [2**64 - uniform for uniform in uniforms if uniform > 0] + [0, 1, 2**63, 2**64 - 1]
    angles = [(eighth << 61) + move for eighth in range(8) for move in (-3, -2, -1, 0, 1, 2, 3)]
    corners = [(uniforms[i % len(uniforms)] % 2**64, angles[i % len(angles)] % 2**64) for i in range(4000)]
    words = np.concatenate([random.reshape(-1, 2), np.array(corners, np.uint64)])  # (pairs, 2)

    values, margins = noise._approximate(words[:, 0].copy(), words[:, 1].copy(), 1.0)

    worst = 0.0
    for pair, ends in enumerate(cells(words[:, 0], words[:, 1])):
        for value, (low, high) in zip(values[:, pair].tolist(), ends, strict=True):
            if margins[pair] < math.inf:
                error = max(abs(Decimal(abs(value)) - low), abs(Decimal(abs(value)) - high))
                worst = max(worst, float(error) / float(margins[pair]))
    assert 8 * worst < 1


@pytest.mark.parametrize("deviation", [0.6, GRID, 50 * GRID])
def test_float64_and_exact_arithmetic_round_to_the_same_integers(
    deviation: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = rounded_gaussian(seeded("same"), deviation, 7_000)
    monkeypatch.setattr(noise, "_MARGIN", math.inf)

    slow = rounded_gaussian(seeded("same"), deviation, 7_000)

    assert (fast == slow).all()


@pytest.mark.parametrize("deviation", [GRID, 300 * GRID])
def test_the_last_bits_of_float64_change_no_integer_and_no_further_word(
    deviation: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So machines whose logarithms and cosines differ in the last bits draw the same noise from the same words."""
    one, other = seeded("bits"), seeded("bits")
    wrong = np.random.default_rng(0)
    expected = rounded_gaussian(one, deviation, 60_000)
    approximate = noise._approximate

    def elsewhere(uniforms: Words, angles: Words, scale: float) -> Any:
        values, margins = approximate(uniforms, angles, scale)
        return values + wrong.uniform(-0.8, 0.8, values.shape) * np.minimum(margins, 0.5), margins

    monkeypatch.setattr(noise, "_approximate", elsewhere)

    assert (rounded_gaussian(other, deviation, 60_000) == expected).all()
    assert other.words(1) == one.words(1)


def test_at_the_largest_deviation_every_integer_is_the_nearest() -> None:
    deviation, count = noise.LARGEST_DEVIATION, 400
    words = seeded("large").words(count)

    values = rounded_gaussian(Written(words.tolist()), deviation, count)

    half = count // 2
    for pair, ends in enumerate(cells(words[:half], words[half:])):
        for value, (low, high) in zip(np.abs(values.reshape(2, half)[:, pair]).tolist(), ends, strict=True):
            assert Decimal(deviation) * low - Decimal("0.5") <= value <= Decimal(deviation) * high + Decimal("0.5")


@pytest.mark.parametrize("zeros", [64, 128, 300])
def test_a_tail_beyond_the_first_word_is_reached_by_further_words(zeros: int) -> None:
    """The uniform is 2^-(`zeros` + 1): its leading words are 0."""
    whole, bit = divmod(zeros, 64)
    uniform = [0] * whole + [1 << 63 - bit]
    angle = [1 << 62] + [0] * whole  # half a quarter turn; the sine is positive, the cosine too
    more = [word for pair in zip(uniform[1:], angle[1:], strict=True) for word in pair]
    source = Written([uniform[0], angle[0], *more, *[0, 0] * 2])

    values = rounded_gaussian(source, GRID, 2)

    assert values / GRID == pytest.approx([math.sqrt((zeros + 1) * math.log(2))] * 2, abs=1e-8)
    assert len(source.left) in {2, 4}  # at most one pair of words after the first bit that is set


def test_what_the_first_words_leave_open_is_decided_by_the_words_that_follow() -> None:
    """The first cell holds many boundaries, so what follows chooses between integers, and all in order."""
    fractions = [0, 1, 2**62, 2**63, 2**64 - 2, 2**64 - 1]

    values = [
        rounded_gaussian(Written([1, 0, fraction, 0, *[2**63] * 8]), GRID, 2).tolist()[0] for fraction in fractions
    ]

    # The uniform is (1 + fraction / 2^64) / 2^64 and the cosine is 1, so the value is the radius.
    due = [GRID * math.sqrt(2 * math.log(2) * 64 - 2 * math.log1p(fraction / 2**64)) for fraction in fractions]
    assert np.abs(np.array(values) - due).max() <= 1
    assert values == sorted(values, reverse=True)
    assert values[0] - values[-1] > 2**26


def test_a_source_that_is_broken_gives_no_noise() -> None:
    with pytest.raises(PrivacyError, match="undecided after 512 bits"):
        rounded_gaussian(Written([0] * 100), GRID, 2)


def test_distance_and_all_draws_of_a_lifetime_cost_less_than_a_billionth_of_the_smallest_delta() -> None:
    assert (1 + math.exp(100)) * 2.0**60 * DISTANCE_PER_DRAW < 1e-9 * 1e-12


@pytest.mark.parametrize("count", [0, 1, 2, 3, (1 << 15) - 1, 1 << 15, (1 << 15) + 1, 100_000])
def test_as_many_are_drawn_as_are_asked_for_two_of_each_pair(count: int) -> None:
    randomness = seeded()

    values = rounded_gaussian(randomness, 1e-3 * GRID, count)

    assert values.shape == (count,)
    assert np.count_nonzero(values) >= count - 1
    if count < 1 << 15:  # too few for one to be undecided with this seed
        plain = seeded()
        plain.words(count + count % 2)
        assert randomness.words(1) == plain.words(1)


@pytest.mark.parametrize("deviation", [0.0, -1.0, math.nan, math.inf, -math.inf, math.nextafter(2.0**44, math.inf)])
def test_a_deviation_out_of_range_is_refused(deviation: float) -> None:
    with pytest.raises(PrivacyError, match="range is above 0, at most"):
        rounded_gaussian(seeded(), deviation, 3)


@pytest.mark.parametrize("deviation", [SMALLEST, 1e-300, 0.05])
def test_a_deviation_far_below_one_gives_zeros(deviation: float) -> None:
    assert not rounded_gaussian(seeded(), deviation, 1000).any()


def test_memory_beyond_the_result_does_not_grow_with_the_count() -> None:
    made = CryptographicNoise()
    rounded_gaussian(made, GRID, 100)

    tracemalloc.start()
    values = rounded_gaussian(made, GRID, 1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < values.nbytes + 4 * 2**20


def test_cryptographic_noise_is_the_gaussian_too() -> None:
    """False alarm 1e-6 each: KS, and the sum of squares, of 75,000 draws."""
    values = rounded_gaussian(CryptographicNoise(), GRID, 75_000)

    assert stats.kstest(values / GRID, "norm").pvalue > 1e-6
    check_variance(values, GRID)
