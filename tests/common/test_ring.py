"""Float vectors as integers modulo 2^32 and 2^16."""

import dataclasses
import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, strategies
from hypothesis.extra import numpy as arrays

from confide.common.adapter import Floats
from confide.common.crypto import BLOCK_BYTES, Keystream, Scratch
from confide.common.errors import MessageError, PlanError
from confide.common.plan import ring_sites
from confide.common.ring import (
    RingLayout,
    RingSum,
    RingVector,
    Update,
    check_sum,
    encode,
)

RING = RingLayout(length=4, update_bound=2.0, max_sites=5)
SHORT = RingLayout(length=5, max_sites=5, bits=16, segments=((3, 2.0), (2, 0.5)))
BOTH = pytest.mark.parametrize("ring", [RING, SHORT], ids=["32 bits", "16 bits"])
WIDE = strategies.floats(-(2.0**100), 2.0**100, width=32)
BOUNDS = strategies.floats(1e-6, 1e6)

RINGS = strategies.builds(
    RingLayout, length=strategies.integers(1, 12), update_bound=BOUNDS, max_sites=strategies.integers(1, 1000)
) | strategies.builds(
    lambda segments, sites: RingLayout(
        length=sum(length for length, _ in segments), max_sites=sites, bits=16, segments=tuple(segments)
    ),
    strategies.lists(strategies.tuples(strategies.integers(1, 5), BOUNDS), min_size=1, max_size=4),
    strategies.integers(1, 1000),
)


class EveryDraw(Keystream):
    """Gives each of the 65,536 draws equally often, in order."""

    def __init__(self) -> None:
        super().__init__(bytes(32))

    def block(self, number: int, scratch: Scratch) -> npt.NDArray[np.uint8]:
        return np.tile(np.arange(1 << 16, dtype="<u2"), BLOCK_BYTES >> 17).view(np.uint8)


def stream(seed: int) -> Keystream:
    return Keystream(seed.to_bytes(32, "big"))


def added(vectors: list[RingVector]) -> RingSum:
    words = np.zeros(vectors[0].layout.size, vectors[0].layout.dtype)
    for vector in vectors:
        words += vector.words
    return RingSum(words=words, layout=vectors[0].layout, count=len(vectors))


def signed(words: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    return words.view(f"i{words.itemsize}").astype(np.int64)


def bounds(ring: RingLayout) -> npt.NDArray[np.float64]:
    """Return each entry's bound."""
    if ring.update_bound is not None:
        return np.full(ring.length, ring.update_bound)
    return np.concatenate([np.full(length, bound) for length, bound in ring.segments])


def bounded(update: Floats, ring: RingLayout) -> npt.NDArray[np.float64]:
    """Return what of an update fits the ring."""
    values = update.astype(np.float64)
    if ring.update_bound is None:
        return np.clip(values, -bounds(ring), bounds(ring))
    return values * min(1.0, ring.update_bound / max(float(np.linalg.norm(values)), 1e-300))


def drawn(ring: RingLayout, data: strategies.DataObject) -> list[Floats]:
    count = data.draw(strategies.integers(1, min(6, ring.max_sites)))
    return [data.draw(arrays.arrays(np.float32, ring.length, elements=WIDE)) for _ in range(count)]


@given(RINGS, strategies.data(), strategies.integers(0, 2**32))
def test_the_decoded_sum_is_the_mean_of_the_updates_within_one_ring_unit(
    ring: RingLayout, data: strategies.DataObject, seed: int
) -> None:
    updates = drawn(ring, data)

    decoded = Update.decode(added([encode(update, ring, stream(seed + i)) for i, update in enumerate(updates)]))

    mean = np.mean([bounded(update, ring) for update in updates], axis=0)
    assert decoded.count == len(updates)
    assert decoded.mean.dtype == np.float32
    assert (np.abs(decoded.mean - mean) <= bounds(ring) / ring.largest + np.abs(mean).max() * 2**-23).all()


@given(RINGS, strategies.data(), strategies.integers(0, 2**32))
def test_the_ring_sum_is_the_integer_sum_modulo_the_ring_and_never_wraps(
    ring: RingLayout, data: strategies.DataObject, seed: int
) -> None:
    vectors = [encode(update, ring, stream(seed + i)) for i, update in enumerate(drawn(ring, data))]

    total = added(vectors)

    whole = sum(signed(vector.words) for vector in vectors)
    assert all(np.abs(signed(vector.words)).max() <= ring.largest + 1 for vector in vectors)
    assert (total.words.astype(np.int64) == whole % 2**ring.bits).all()
    assert (signed(total.words) == whole).all()


@given(RINGS, strategies.data(), strategies.integers(0, 2**32))
def test_every_sum_of_honest_vectors_is_taken(ring: RingLayout, data: strategies.DataObject, seed: int) -> None:
    total = added([encode(update, ring, stream(seed + i)) for i, update in enumerate(drawn(ring, data))])

    check_sum(total)


@pytest.mark.parametrize("sites", [1, 2, 3, 5, 16, 64, 1000])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [32, 16])
def test_the_sum_of_as_many_sites_as_the_ring_has_room_for_does_not_wrap_at_the_bound(
    sites: int, sign: int, bits: int
) -> None:
    ring = {
        32: RingLayout(length=1, update_bound=0.3, max_sites=sites),
        16: RingLayout(length=1, max_sites=sites, bits=16, segments=((1, 0.3),)),
    }[bits]
    vector = encode(np.array([sign * 1e30], np.float32), ring, stream(sites))
    words = vector.words.copy()
    words[0] = np.int64(sign * (ring.largest + 1)).astype(ring.dtype)

    farthest = Update.decode(added([dataclasses.replace(vector, words=words)] * sites))

    assert farthest.mean[0] == pytest.approx(sign * 0.3 * (1 + 1 / ring.largest), rel=1e-6)
    assert Update.decode(added([vector] * sites)).mean[0] == pytest.approx(sign * 0.3, rel=1e-6)
    assert sites * (ring.largest + 1) <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize("bits", [32, 16])
def test_the_expected_entry_is_within_2_to_the_minus_17_of_its_value(bits: int) -> None:
    count, parts = 1 << 16, np.array([0, 1, 0.5, -0.25, 1 / 3, 1e-4, 1 - 1e-4, 2**-17, 3 * 2**-18])
    values = np.repeat(parts + np.array([0, 7, -7, 1000, -1000, 3, -3, 0, 1]), count)
    ring = RingLayout(length=len(values), update_bound=1e6, max_sites=1000)
    if bits == 16:
        ring = RingLayout(length=len(values), max_sites=16, bits=16, segments=((len(values), 2046.0),))
    unit = bounds(ring)[0] / ring.largest
    update = (values * unit).astype(np.float32)

    entries = signed(encode(update, ring, EveryDraw()).words)[: ring.length]

    exact = update.astype(np.float64) / unit
    bias = (entries - exact).reshape(-1, count).mean(axis=1)
    assert np.abs(bias).max() <= 2**-17 + 1e-9
    assert np.abs(entries - exact).max() < 1


def test_stochastic_rounding_with_a_keystream_is_unbiased() -> None:
    # A mean of n Bernoulli(p) leaves p ± (6·√(p(1-p)/n) + 2^-17) with probability 2e-9; four: false alarm below 1e-8.
    ring, count = RingLayout(length=80_000, update_bound=1.0, max_sites=1000), 20_000
    unit = 1 / ring.largest
    update = np.repeat((np.array([3.1, 1000.5, -76.1, -0.25]) * unit).astype(np.float32), count)

    entries = signed(encode(update, ring, stream(1)).words)[: ring.length]

    exact = update.astype(np.float64) / unit
    p = exact - np.floor(exact)
    off = (entries - exact).reshape(4, count).mean(axis=1)
    assert (np.abs(off) <= 6 * np.sqrt(p * (1 - p) / count).reshape(4, count)[:, 0] + 2**-17).all()


@pytest.mark.parametrize("split", [(), (1, 32_767, 70_000), (131_071, 131_072, 200_001)])
def test_entry_i_is_rounded_with_the_two_keystream_bytes_at_2_i(split: tuple[int, ...]) -> None:
    length, scratch = 270_001, Scratch()
    update = np.random.default_rng(3).standard_normal(length).astype(np.float32) * 0.1
    ring = RingLayout(length=length, update_bound=1e3, max_sites=16)
    if split:
        sizes = np.diff([0, *split, length]).tolist()
        segments = tuple((size, 0.5 + 0.1 * place) for place, size in enumerate(sizes))
        ring = RingLayout(length=length, max_sites=16, bits=16, segments=segments)

    words = encode(update, ring, stream(9)).words

    raw = b"".join(stream(9).block(number, scratch).tobytes() for number in range(3))
    uniforms = (np.frombuffer(raw, "<u2")[:length] + 0.5) / 65536
    due = np.floor(bounded(update, ring) * (ring.largest / bounds(ring)) + uniforms)
    # Two ways to compute a product differ in its last bit, and with it one entry in 2^22 may round the other way.
    assert np.count_nonzero(signed(words)[:length] != due) <= 3


@pytest.mark.parametrize("length", [1e-3, 1.9999, 2.001, 1e30])
def test_an_update_longer_than_the_bound_is_scaled_down_and_told(length: float) -> None:
    update = (np.array([3, -4, 0, 0]) / 5 * length).astype(np.float32)

    vector = encode(update, RING, stream(0))

    decoded = Update.decode(added([vector]))
    norm = float(np.linalg.norm(decoded.mean.astype(np.float64)))
    assert vector.bounded == (length > 2)
    assert decoded.bounded == (length > 2)
    assert (vector.saturated, decoded.saturated) == (0, 0)
    assert norm == pytest.approx(min(length, 2.0), abs=1e-6)
    assert decoded.mean / norm == pytest.approx([0.6, -0.8, 0, 0], abs=1e-5)


def test_an_update_as_long_as_the_bound_is_not_scaled_down() -> None:
    vector = encode(np.array([0, -2, 0, 0], np.float32), RING, stream(0))

    assert not vector.bounded
    assert signed(vector.words).tolist() == [0, -RING.largest, 0, 0, 0, 0]


def test_with_16_bits_numbers_beyond_their_segments_bound_are_cut_and_counted() -> None:
    fitting = encode(np.array([2, -2, 0, 0.5, -0.5], np.float32), SHORT, stream(1))
    cut = encode(np.array([2.1, -1e30, 0, 0.51, -0.5], np.float32), SHORT, stream(2))

    full, half = SHORT.largest, Update.decode(added([fitting, cut]))
    assert signed(fitting.words).tolist() == [full, -full, 0, full, -full, 0, 0, 0]
    assert signed(cut.words).tolist() == [full, -full, 0, full, -full, 1, round(0.6 * full), 0]
    assert (fitting.bounded, fitting.saturated) == (False, 0)
    assert cut.bounded
    assert cut.saturated == pytest.approx(0.6, abs=1 / full)
    assert half.mean.tolist() == [2, -2, 0, 0.5, -0.5]
    assert half.bounded == 0.5
    assert half.saturated == pytest.approx(0.3, abs=1 / full)


@BOTH
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_is_refused(ring: RingLayout, value: float) -> None:
    update = np.zeros(ring.length, np.float32)
    update[-1] = value

    with pytest.raises(MessageError, match="not finite"):
        encode(update, ring, stream(0))


@pytest.mark.parametrize("shape", [(3,), (5,), (4, 1), ()])
def test_an_update_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(MessageError, match=r"\(4,\) was due"):
        encode(np.zeros(shape, np.float32), RING, stream(0))


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (np.zeros(5, np.uint32), 1),
        (np.zeros((6, 1), np.uint32), 1),
        (np.zeros(6, np.int32), 1),
        (np.zeros(6, np.uint16), 1),
        (np.zeros(6, np.uint32), 0),
        (np.zeros(6, np.uint32), 6),
    ],
    ids=["short", "matrix", "signed", "narrow", "nobody", "too many"],
)
def test_a_sum_that_does_not_fit_the_ring_is_refused(words: npt.NDArray[np.uint32], count: int) -> None:
    with pytest.raises(MessageError, match="was offered"):
        RingSum(words=words, layout=RING, count=count)


@pytest.mark.parametrize("length", [1, 2, 4, 5])
@pytest.mark.parametrize("bits", [32, 16])
def test_words_travel_as_whole_uint32_and_come_back_without_a_copy(length: int, bits: int) -> None:
    ring = RingLayout(length=length, max_sites=3, update_bound=1.0)
    if bits == 16:
        ring = RingLayout(length=length, max_sites=3, bits=16, segments=((length, 1.0),))
    words = encode(np.full(length, 0.1, np.float32), ring, stream(0)).words

    wire = ring.packed(words)
    back = ring.unpacked(wire)

    assert wire.dtype == np.uint32
    assert len(wire) == (length + 2 if bits == 32 else math.ceil((length + 2) / 2))
    assert back.dtype == ring.dtype
    assert back.tolist() == words.tolist()
    assert np.shares_memory(words, wire)
    assert np.shares_memory(wire, back)


@BOTH
def test_a_wire_or_words_of_another_length_or_type_are_refused(ring: RingLayout) -> None:
    wire: Any = ring.packed(np.zeros(ring.size, ring.dtype))
    short: Any = np.zeros(ring.size - 1, ring.dtype)
    other: Any = np.zeros(ring.size, np.int32)

    for wrong in (wire[:-1], np.append(wire, wire[:1]), wire.astype(np.uint64), wire.reshape(1, -1)):
        with pytest.raises(MessageError, match=r"A vector of shape .* uint32 was due"):
            ring.unpacked(wrong)
    for words in (short, other):
        with pytest.raises(MessageError, match="Words of shape"):
            ring.packed(words)


GARBAGE: dict[str, tuple[RingLayout, int, int, str]] = {
    "32 bits, a large entry": (RING, 0, 3 * RING.largest + 7, "larger than they can be"),
    "32 bits, a large negative entry": (RING, 3, -3 * RING.largest - 7, "larger than they can be"),
    "32 bits, more bounded than there are": (RING, 4, 4, "4 bounded updates"),
    "32 bits, fewer bounded than none": (RING, 4, -1, "-1 bounded updates"),
    "32 bits, more cut than there is": (RING, 5, 3 * RING.largest + 1, "of entries cut"),
    "32 bits, less cut than nothing": (RING, 5, -1, "of entries cut"),
    "16 bits, a large entry": (SHORT, 0, 3 * (SHORT.largest + 1) + 1, "larger than they can be"),
    "16 bits, the largest negative entry": (SHORT, 4, -(2**15), "larger than they can be"),
    "16 bits, more bounded than there are": (SHORT, 5, 4, "4 bounded updates"),
    "16 bits, more cut than there is": (SHORT, 6, 3 * SHORT.largest + 1, "of entries cut"),
    "16 bits, something behind": (SHORT, 7, 1, "fills up its last word is 1"),
}


@pytest.mark.parametrize("case", GARBAGE)
def test_a_sum_that_no_honest_sites_can_have_is_refused(case: str) -> None:
    ring, place, value, fragment = GARBAGE[case]
    total = added([encode(np.zeros(ring.length, np.float32), ring, stream(site)) for site in range(3)])
    check_sum(total)
    total.words[place] = np.int64(value).astype(ring.dtype)

    with pytest.raises(MessageError, match=fragment) as caught:
        check_sum(total)

    assert "which one, the sum does not tell" in str(caught.value)


def test_with_32_bits_a_sum_is_judged_by_its_length_not_by_its_entries() -> None:
    ring = RingLayout(length=100, update_bound=1.0, max_sites=5)
    words = np.zeros(ring.size, np.uint32)
    words[:100] = ring.largest // 9  # 100 of these are 10/9 of the bound long

    with pytest.raises(MessageError, match="larger than they can be"):
        check_sum(RingSum(words=words, layout=ring, count=1))
    check_sum(RingSum(words=words, layout=ring, count=2))


@pytest.mark.parametrize("bits", [32, 16])
def test_no_whole_vector_is_made_but_the_result(bits: int) -> None:
    length = 2_000_000
    ring = RingLayout(length=length, max_sites=3, update_bound=1.0)
    if bits == 16:
        ring = RingLayout(length=length, max_sites=3, bits=16, segments=((length, 1.0),))
    update, small = np.full(length, 1e-4, np.float32), 3 << 20
    total = added([encode(update, ring, stream(0))])

    def peak(work: Callable[[], object]) -> int:
        tracemalloc.start()
        work()
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    assert peak(lambda: encode(update, ring, stream(0))) < ring.dtype.itemsize * ring.size + small
    assert peak(lambda: check_sum(total)) < small
    assert peak(lambda: Update.decode(total)) < 4 * length + small


@pytest.mark.parametrize(
    "change",
    [
        {"length": 0},
        {"max_sites": 0},
        {"max_sites": -1},
        {"max_sites": 2**31},
        {"update_bound": 0.0},
        {"update_bound": -1.0},
        {"update_bound": math.nan},
        {"update_bound": math.inf},
        {"update_bound": 1e-305},
        {"update_bound": 1e-270},
        {"update_bound": None},
        {"bits": 16},
        {"bits": 24},
        {"segments": ((4, 1.0),)},
    ],
)
def test_a_ring_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        dataclasses.replace(RING, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 32},
        {"update_bound": 1.0},
        {"segments": ()},
        {"segments": ((3, 2.0),)},
        {"segments": ((3, 2.0), (3, 0.5))},
        {"segments": ((5, 2.0), (0, 0.5))},
        {"segments": ((3, 2.0), (2, 0.0))},
        {"segments": ((3, 2.0), (2, math.nan))},
        {"segments": ((3, 2.0), (2, 1e-305))},
        {"max_sites": 2**14},
    ],
)
def test_a_ring_of_16_bits_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        dataclasses.replace(SHORT, **change)


def test_the_digest_changes_with_every_part_of_the_ring() -> None:
    changes: list[dict[str, Any]] = [{}, {"length": 5}, {"update_bound": 2.1}, {"max_sites": 6}]
    short: list[dict[str, Any]] = [{}, {"max_sites": 6}, {"segments": ((2, 2.0), (3, 0.5))}]
    short += [{"segments": ((3, 2.0), (2, 0.6))}, {"segments": ((3, 2.0), (3, 0.5)), "length": 6}]

    digests = {dataclasses.replace(RING, **change).digest for change in changes}
    digests |= {dataclasses.replace(SHORT, **change).digest for change in short}

    assert len(digests) == 9


@BOTH
def test_what_is_shown_of_a_ring_vector_is_its_size_only(ring: RingLayout) -> None:
    vector = encode(np.full(ring.length, 0.3, np.float32), ring, stream(0))

    assert repr(vector) == f"<RingVector of {ring.length} entries>"
    assert repr(added([vector])) == f"<RingSum of 1 vectors of {ring.length} entries>"


def test_at_the_most_sites_a_plan_may_have_16_bits_blur_a_predicted_update_by_a_thousandth_of_its_variance() -> None:
    sites, length = ring_sites(16), 200_000
    ring = RingLayout(length=length, max_sites=sites, bits=16, segments=((length, 8.0),))
    update = np.random.default_rng(5).standard_normal(length).astype(np.float32)

    vector = encode(update, ring, stream(5))

    blur = Update.decode(added([vector])).mean - update
    assert not vector.bounded
    assert float(np.mean(blur.astype(np.float64) ** 2)) < 1e-3
