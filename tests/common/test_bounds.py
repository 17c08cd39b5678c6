"""What a plan predicts of an update, and the ring that follows from it."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from confide.common.adapter import Layout
from confide.common.bounds import predicted, predicted_norm, reach, ring_layout
from confide.common.calibration import noise_multiplier
from confide.common.plan import Plan
from confide.common.ring import RingLayout, Update
from confide.server.aggregate import ServerState, step

LAYOUT = Layout.of({"B": (3, 3), "C": (2,), "head": (4,), "z": (1,)})
SQUARES = 12 * 0.5**2 + 4 * 2.0**2


def changed(plan: Plan, optimizer: str, steps: int = 2, **federation: Any) -> Plan:
    return dataclasses.replace(
        plan,
        federation=dataclasses.replace(plan.federation, **federation),
        privacy=dataclasses.replace(plan.privacy, steps_per_round=steps),
        training=dataclasses.replace(plan.training, optimizer=optimizer, learning_rate=0.5, head_learning_rate=2.0),
    )


def sgd_noise(plan: Plan) -> float:
    """Return the standard deviation of one number after one round of SGD with learning rate 1."""
    privacy = plan.privacy
    deviation = noise_multiplier(privacy) * privacy.clip_norm / (privacy.sampling_rate * privacy.min_persons)
    return deviation * math.sqrt(privacy.steps_per_round)


def test_the_plan_may_name_the_update_bound(plan: Plan) -> None:
    ring = ring_layout(changed(plan, "adam", update_bound=3.25), LAYOUT, ["head"])

    assert ring == RingLayout(length=16, update_bound=3.25, max_sites=plan.federation.max_sites)


@pytest.mark.parametrize(("steps", "moves"), [(1, 1.0), (2, 1.2 * math.sqrt(2)), (100, 12.0)])
def test_with_adam_the_update_bound_is_three_times_what_noise_is_predicted_to_move(
    plan: Plan, steps: int, moves: float
) -> None:
    given_plan = changed(plan, "adam", steps)

    ring = ring_layout(given_plan, LAYOUT, ["head"])

    assert predicted_norm(given_plan, LAYOUT, ["head"]) == pytest.approx(moves * math.sqrt(SQUARES))
    assert ring.update_bound == pytest.approx(3 * moves * math.sqrt(SQUARES))


def test_with_sgd_the_update_bound_is_three_times_signal_and_noise_at_the_smallest_site(plan: Plan) -> None:
    given_plan = changed(plan, "sgd")

    ring = ring_layout(given_plan, LAYOUT, iter(["head"]))

    signal = 2.0 * given_plan.privacy.steps_per_round * given_plan.privacy.clip_norm
    noise = sgd_noise(given_plan) * math.sqrt(SQUARES)
    assert predicted_norm(given_plan, LAYOUT, ["head"]) == pytest.approx(noise + signal)
    assert ring.update_bound == pytest.approx(3 * (noise + signal))


def test_with_16_bits_each_run_of_one_learning_rate_is_a_segment_of_eight_predicted_rms(plan: Plan) -> None:
    adam = ring_layout(changed(plan, "adam", ring_bits=16), LAYOUT, ["head"])
    sgd_plan = changed(plan, "sgd", ring_bits=16)
    sgd = ring_layout(sgd_plan, LAYOUT, iter(["head"]))

    moves = 8 * 1.2 * math.sqrt(2)
    spread = sgd_plan.privacy.steps_per_round * sgd_plan.privacy.clip_norm / math.sqrt(16)
    per_rate = 8 * (sgd_noise(sgd_plan) + spread)
    assert (adam.bits, adam.length, adam.update_bound) == (16, 16, None)
    assert [size for size, _ in adam.segments] == [11, 4, 1]
    assert [bound for _, bound in adam.segments] == pytest.approx([moves * 0.5, moves * 2.0, moves * 0.5])
    assert [bound for _, bound in sgd.segments] == pytest.approx([per_rate * 0.5, per_rate * 2.0, per_rate * 0.5])


@pytest.mark.parametrize("steps", [1, 2, 4, 16, 64, 256])
@pytest.mark.parametrize("deviation", [1e-3, 1e3])
def test_adam_moves_numbers_under_pure_noise_as_far_as_predicted_within_a_quarter(
    plan: Plan, steps: int, deviation: float
) -> None:
    # The rms of 5,000 independent numbers is within 5 % of its expectation: false alarms are below 1e-5.
    generator = torch.Generator().manual_seed(steps)
    weights = torch.nn.Parameter(torch.zeros(5000))
    optimizer = torch.optim.Adam([weights], lr=1e-2)

    for _ in range(steps):
        weights.grad = deviation * torch.randn(5000, generator=generator)
        optimizer.step()

    measured = float(weights.detach().square().mean().sqrt())
    noise, signal = predicted(changed(plan, "adam", steps), 1e-2)
    assert 0.75 <= noise / measured <= 1.25
    assert signal == 0


@pytest.mark.parametrize("optimizer", ["fedavg", "fedavgm", "fedadam"])
@pytest.mark.parametrize("bits", [32, 16])
def test_no_server_that_keeps_to_the_plan_gets_further_than_reach(plan: Plan, optimizer: str, bits: int) -> None:
    federation = dataclasses.replace(plan.federation, server_optimizer=optimizer, server_learning_rate=0.7)
    ring = (
        RingLayout(length=6, update_bound=2.0, max_sites=16)
        if bits == 32
        else RingLayout(length=6, max_sites=16, bits=16, segments=((2, 0.5), (4, 1.0)))
    )
    largest = np.full(6, 2 / np.sqrt(6)) if bits == 32 else np.array([0.5, 0.5, 1, 1, 1, 1])
    state = ServerState.begin(np.zeros(6, np.float32), federation)

    for number in range(1, 30):
        update = Update(mean=largest.astype(np.float32), count=3, bounded=0.0, saturated=0.0)
        state = step(state, update, federation)

        assert np.linalg.norm(state.adapter) <= reach(federation, ring, number)
    if optimizer == "fedavg":
        assert np.linalg.norm(state.adapter) >= 0.95 * reach(federation, ring, 29)
