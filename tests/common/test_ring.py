"""Float vectors as integers modulo 2^32."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies
from hypothesis.extra import numpy as arrays

from confide.common.accounting import noise_multiplier
from confide.common.adapter import Floats, Layout
from confide.common.errors import MessageError, PlanError
from confide.common.plan import Plan
from confide.common.ring import RingLayout, RingSum, RingVector, Uniforms, Update, encode, ring_layout

RING = RingLayout(length=4, update_bound=2.0, max_sites=5)
WIDE = strategies.floats(-(2.0**100), 2.0**100, width=32)


def seeded(seed: int) -> Uniforms:
    return np.random.default_rng(seed).random


def constant(value: float) -> Uniforms:
    return lambda count: np.full(count, value)


def added(vectors: list[RingVector]) -> RingSum:
    words = np.zeros(vectors[0].layout.length, np.uint32)
    for vector in vectors:
        words += vector.words
    return RingSum(words=words, layout=vectors[0].layout, count=len(vectors))


def bounded(update: Floats, bound: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    values = update.astype(np.float64)
    return values * min(1.0, bound / max(float(np.linalg.norm(values)), 1e-300))


RINGS = strategies.builds(
    RingLayout,
    length=strategies.integers(1, 12),
    update_bound=strategies.floats(1e-6, 1e6),
    max_sites=strategies.integers(1, 1000),
)


@given(RINGS, strategies.data(), strategies.integers(0, 2**32))
def test_the_decoded_sum_is_the_mean_of_the_updates_within_one_ring_unit(
    ring: RingLayout, data: strategies.DataObject, seed: int
) -> None:
    count = data.draw(strategies.integers(1, min(6, ring.max_sites)))
    updates = [data.draw(arrays.arrays(np.float32, ring.length, elements=WIDE)) for _ in range(count)]

    decoded = Update.decode(added([encode(update, ring, seeded(seed + i)) for i, update in enumerate(updates)]))

    mean = np.mean([bounded(update, ring.update_bound) for update in updates], axis=0)
    unit = ring.update_bound / ring.largest
    assert decoded.count == count
    assert decoded.mean.dtype == np.float32
    assert np.abs(decoded.mean - mean).max() <= unit + np.abs(mean).max() * 2**-23


@given(RINGS, strategies.data(), strategies.integers(0, 2**32))
def test_the_ring_sum_is_the_integer_sum_modulo_2_to_the_32_and_never_wraps(
    ring: RingLayout, data: strategies.DataObject, seed: int
) -> None:
    count = data.draw(strategies.integers(1, min(6, ring.max_sites)))
    updates = [data.draw(arrays.arrays(np.float32, ring.length, elements=WIDE)) for _ in range(count)]
    vectors = [encode(update, ring, seeded(seed + i)) for i, update in enumerate(updates)]

    total = added(vectors)

    for place in range(ring.length):
        signed = [int(v.words[place]) - (1 << 32 if int(v.words[place]) >> 31 else 0) for v in vectors]
        assert all(abs(value) <= ring.largest + 1 for value in signed)
        assert int(total.words[place]) == sum(signed) % 2**32
        assert -(2**31) <= sum(signed) < 2**31
        assert int(total.words.view(np.int32)[place]) == sum(signed)


@pytest.mark.parametrize("sites", [1, 2, 3, 5, 16, 64, 1000])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_sum_of_as_many_sites_as_the_ring_has_room_for_does_not_wrap_at_the_bound(sites: int, sign: int) -> None:
    ring = RingLayout(length=1, update_bound=0.3, max_sites=sites)
    draw = constant(0.0 if sign > 0 else math.nextafter(1, 0))  # rounds away from zero wherever it can
    vector = encode(np.array([sign * 1e30], np.float32), ring, draw)
    farthest = dataclasses.replace(vector, words=np.array([sign * (ring.largest + 1)], np.int64).astype(np.uint32))

    total = added([farthest] * sites)

    assert Update.decode(total).mean[0] == pytest.approx(sign * 0.3, rel=sites * 1e-6)
    assert Update.decode(added([vector] * sites)).mean[0] == pytest.approx(sign * 0.3, rel=sites * 1e-6)
    assert sites * (ring.largest + 1) < 2**31


def test_stochastic_rounding_is_unbiased() -> None:
    # A mean of n Bernoulli(p) leaves p ± 6·√(p(1-p)/n) with probability 2e-9; four entries: false alarm below 1e-8.
    ring = RingLayout(length=4, update_bound=1.0, max_sites=1000)
    parts = np.array([0.1, 0.5, 0.9, -0.25])
    update = ((np.array([3, 1000, -77, 0]) + parts) / ring.scale).astype(np.float32)
    exact = update.astype(np.float64) * ring.scale
    draw, rounds = seeded(1), 20_000

    mean = np.mean([encode(update, ring, draw).words.view(np.int32).astype(np.float64) for _ in range(rounds)], axis=0)

    p = exact - np.floor(exact)
    assert (np.abs(mean - exact) <= 6 * np.sqrt(p * (1 - p) / rounds)).all()


def test_rounding_goes_to_one_of_the_two_nearest_integers() -> None:
    update = (np.array([2.25, -2.25, 7.0, -7.0]) / RING.scale).astype(np.float32)
    exact = update.astype(np.float64) * RING.scale

    up = encode(update, RING, constant(0.0)).words.view(np.int32)
    down = encode(update, RING, constant(math.nextafter(1, 0))).words.view(np.int32)

    assert up.tolist() == np.ceil(exact).tolist()
    assert down.tolist() == np.floor(exact).tolist()


@pytest.mark.parametrize("length", [1e-3, 1.9999, 2.001, 1e30])
def test_an_update_longer_than_the_bound_is_scaled_down_and_flagged(length: float) -> None:
    update = (np.array([3, -4, 0, 0]) / 5 * length).astype(np.float32)

    vector = encode(update, RING, seeded(0))

    decoded = Update.decode(added([vector])).mean
    norm = float(np.linalg.norm(decoded.astype(np.float64)))
    assert vector.bounded == (length > 2)
    assert norm == pytest.approx(min(length, 2.0), abs=1e-6)
    assert decoded / norm == pytest.approx([0.6, -0.8, 0, 0], abs=1e-5)


def test_an_update_as_long_as_the_bound_is_not_scaled_down() -> None:
    vector = encode(np.array([0, -2, 0, 0], np.float32), RING, seeded(0))

    assert not vector.bounded
    assert vector.words.view(np.int32).tolist() == [0, -RING.largest, 0, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(MessageError, match="not finite"):
        encode(np.array([0, value, 0, 0], np.float32), RING, seeded(0))


@pytest.mark.parametrize("shape", [(3,), (5,), (4, 1), ()])
def test_an_update_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(MessageError, match=r"\(4,\) was due"):
        encode(np.zeros(shape, np.float32), RING, seeded(0))


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (np.zeros(3, np.uint32), 1),
        (np.zeros((4, 1), np.uint32), 1),
        (np.zeros(4, np.int32), 1),
        (np.zeros(4, np.uint64), 1),
        (np.zeros(4, np.uint32), 0),
        (np.zeros(4, np.uint32), 6),
    ],
    ids=["short", "matrix", "signed", "wide", "nobody", "too many"],
)
def test_a_sum_that_does_not_fit_the_ring_is_refused(
    words: np.ndarray[tuple[int, ...], np.dtype[np.uint32]], count: int
) -> None:
    with pytest.raises(MessageError, match="was offered"):
        RingSum(words=words, layout=RING, count=count)


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
    ],
)
def test_a_ring_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        dataclasses.replace(RING, **change)


def test_the_digest_changes_with_every_part_of_the_ring() -> None:
    changes: list[dict[str, Any]] = [{}, {"length": 5}, {"update_bound": 2.1}, {"max_sites": 6}]

    assert len({dataclasses.replace(RING, **change).digest for change in changes}) == 4


def test_what_is_shown_of_a_ring_vector_is_its_size_only() -> None:
    vector = encode(np.ones(4, np.float32), RING, seeded(0))

    assert repr(vector) == "<RingVector of 4 entries>"
    assert repr(added([vector])) == "<RingSum of 1 vectors of 4 entries>"


def with_federation(plan: Plan, update_bound: float | None, optimizer: str) -> Plan:
    return dataclasses.replace(
        plan,
        federation=dataclasses.replace(plan.federation, update_bound=update_bound),
        training=dataclasses.replace(plan.training, optimizer=optimizer, learning_rate=0.5, head_learning_rate=2.0),
    )


LAYOUT = Layout.of({"B": (3, 3), "head": (4,)})


def test_the_plan_may_name_the_update_bound(plan: Plan) -> None:
    ring = ring_layout(with_federation(plan, 3.25, "adam"), LAYOUT, ["head"])

    assert ring == RingLayout(length=13, update_bound=3.25, max_sites=plan.federation.max_sites)


def test_with_adam_the_update_bound_is_the_longest_way_its_steps_can_go(plan: Plan) -> None:
    ring = ring_layout(with_federation(plan, None, "adam"), LAYOUT, ["head"])

    assert ring.update_bound == pytest.approx(plan.privacy.steps_per_round * math.sqrt(9 * 0.5**2 + 4 * 2.0**2))


def test_with_sgd_the_update_bound_is_three_times_signal_and_noise_at_the_smallest_site(plan: Plan) -> None:
    ring = ring_layout(with_federation(plan, None, "sgd"), LAYOUT, ["head"])

    privacy = plan.privacy
    divisor = privacy.sampling_rate * privacy.min_persons
    noise = noise_multiplier(privacy) * privacy.clip_norm / divisor
    noised = noise * math.sqrt(privacy.steps_per_round * (9 * 0.5**2 + 4 * 2.0**2))
    assert ring.update_bound == pytest.approx(3 * (noised + 2.0 * privacy.steps_per_round * privacy.clip_norm))
