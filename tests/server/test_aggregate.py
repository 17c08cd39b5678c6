"""The server's optimizers: equal to slow, obvious ones in float64."""

import dataclasses
import math

import numpy as np
import pytest

from confide.common.adapter import Floats
from confide.common.plan import Federation
from confide.common.ring import Update
from confide.server.aggregate import ServerState, step

START = np.array([1.0, -2.0, 0.0, 1e-4], np.float32)
MEANS = [
    np.array([0.5, -0.25, 0.0, 1e-6], np.float32),
    np.array([0.5, 0.75, 0.0, -1e-3], np.float32),
    np.array([-1.0, 0.125, 3.0, 0.0], np.float32),
]


def federation(optimizer: str, rate: float = 1.0, momentum: float | None = None) -> Federation:
    return Federation(server_optimizer=optimizer, server_learning_rate=rate, server_momentum=momentum)


def run(settings: Federation, start: Floats = START) -> ServerState:
    state = ServerState.begin(start, settings)
    for mean in MEANS:
        state = step(state, Update(mean=mean, count=3), settings)
    return state


def slow_momentum(rate: float, beta: float) -> list[float]:
    """FedAvgM, Hsu et al. 2019: v ← β·v + Δ, x ← x + η·v."""
    adapter = []
    for place, value in enumerate(START.tolist()):
        x, v = value, 0.0
        for mean in MEANS:
            v = beta * v + float(mean[place])
            x = x + rate * v
        adapter.append(x)
    return adapter


def slow_adam(rate: float, beta: float) -> list[float]:
    """FedAdam, Reddi et al. 2021, Algorithm 2, with β2 = 0.99 and τ = 0.001, without bias correction."""
    adapter = []
    for place, value in enumerate(START.tolist()):
        x, m, v = value, 0.0, 0.0
        for mean in MEANS:
            change = float(mean[place])
            m = beta * m + (1 - beta) * change
            v = 0.99 * v + (1 - 0.99) * change**2
            x = x + rate * m / (math.sqrt(v) + 1e-3)
        adapter.append(x)
    return adapter


def test_fedavg_takes_the_mean() -> None:
    settings = federation("fedavg")

    state = step(ServerState.begin(START, settings), Update(mean=MEANS[0], count=3), settings)

    assert np.array_equal(state.adapter, START + MEANS[0])
    assert state.moments == {}


def test_fedavg_with_a_rate_takes_that_part_of_the_mean() -> None:
    assert np.allclose(run(federation("fedavg", rate=0.5)).adapter, START + sum(MEANS) / np.float32(2), atol=1e-6)


@pytest.mark.parametrize(("rate", "momentum"), [(1.0, None), (0.3, 0.5), (1.0, 0.0), (2.0, 0.99)])
def test_fedavgm_equals_a_slow_reference(rate: float, momentum: float | None) -> None:
    state = run(federation("fedavgm", rate, momentum))

    assert state.adapter == pytest.approx(
        slow_momentum(rate, 0.9 if momentum is None else momentum), rel=1e-5, abs=1e-6
    )
    assert set(state.moments) == {"first"}


@pytest.mark.parametrize(("rate", "momentum"), [(1.0, None), (0.03, 0.5), (0.1, 0.0), (2.0, 0.99)])
def test_fedadam_equals_a_slow_reference(rate: float, momentum: float | None) -> None:
    state = run(federation("fedadam", rate, momentum))

    assert state.adapter == pytest.approx(slow_adam(rate, 0.9 if momentum is None else momentum), rel=1e-4, abs=1e-5)
    assert set(state.moments) == {"first", "second"}


def test_momentum_of_zero_is_fedavg() -> None:
    assert np.array_equal(run(federation("fedavgm", momentum=0.0)).adapter, run(federation("fedavg")).adapter)


@pytest.mark.parametrize("optimizer", ["fedavg", "fedavgm", "fedadam"])
def test_an_update_of_nothing_moves_nothing_at_the_start(optimizer: str) -> None:
    settings = federation(optimizer)

    state = step(ServerState.begin(START, settings), Update(mean=np.zeros_like(START), count=3), settings)

    assert np.array_equal(state.adapter, START)


@pytest.mark.parametrize("optimizer", ["fedavg", "fedavgm", "fedadam"])
def test_a_step_stays_in_float32_and_leaves_the_state_before_as_it_was(optimizer: str) -> None:
    settings = federation(optimizer, rate=0.7)
    before = step(ServerState.begin(START, settings), Update(mean=MEANS[0], count=3), settings)
    kept = {name: moment.copy() for name, moment in before.moments.items()} | {"adapter": before.adapter.copy()}

    after = step(before, Update(mean=MEANS[1], count=3), settings)

    assert {vector.dtype for vector in (after.adapter, *after.moments.values())} == {np.dtype(np.float32)}
    assert np.array_equal(before.adapter, kept["adapter"])
    assert all(np.array_equal(before.moments[name], kept[name]) for name in before.moments)
    assert not np.array_equal(after.adapter, before.adapter)


@pytest.mark.parametrize("optimizer", ["fedavg", "fedavgm", "fedadam"])
def test_what_the_server_does_does_not_depend_on_how_many_sites_are_in_the_mean(optimizer: str) -> None:
    settings = federation(optimizer)
    state = ServerState.begin(START, settings)
    update = Update(mean=MEANS[0], count=3)

    few, many = step(state, update, settings), step(state, dataclasses.replace(update, count=16), settings)

    assert np.array_equal(few.adapter, many.adapter)
