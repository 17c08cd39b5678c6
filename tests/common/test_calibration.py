"""From epsilon to noise: the smallest that is enough, and the same for whoever recomputes it."""

import dataclasses
import math

import pytest
from hypothesis import given, strategies

from confide.common.accounting import cost
from confide.common.calibration import _smallest, noise_by_rdp, noise_multiplier
from confide.common.errors import PrivacyError
from confide.common.plan import Privacy
from confide.common.renyi import rdp_check
from tests.common.spending import PRIVACY, spend


# Where a search by ratios alone goes wrong: few steps at a small rate, long runs at a tiny delta.
@pytest.mark.parametrize(
    ("epsilon", "delta", "rate", "steps"),
    [
        (8.0, 1e-5, 0.1, 40),
        (1.0, 1e-6, 0.001, 40),
        (0.1, 1e-6, 0.1, 1),
        (0.1, 1e-12, 0.1, 1000),
        (1.0, 1e-12, 1.0, 1),
        (8.0, 1e-12, 1.0, 40),
        (30.0, 1e-5, 0.5, 10),
    ],
)
def test_the_noise_multiplier_is_the_smallest_to_four_decimals(
    epsilon: float, delta: float, rate: float, steps: int
) -> None:
    privacy = Privacy(
        epsilon=epsilon, delta=delta, sampling_rate=rate, steps_per_round=steps, rounds=1, min_persons=1000
    )

    noise = noise_multiplier(privacy)

    assert noise == round(noise, 4)
    assert cost([spend(rate, noise, steps)], delta).epsilon <= epsilon
    assert cost([spend(rate, round(noise - 1e-4, 4), steps)], delta).epsilon > epsilon


@given(strategies.integers(1000, 10**8), strategies.floats(0.2, 3), strategies.integers(0, 10**6))
def test_the_search_for_noise_finds_the_smallest_unit_that_fits(root: int, power: float, above: int) -> None:
    def epsilon(units: int) -> float:
        return math.inf if units < root / 2 else (root / units) ** power

    found = _smallest(epsilon, 1.0, root + above)

    assert found == root


def test_the_noise_multiplier_of_the_starter_is_pinned() -> None:
    assert noise_multiplier(PRIVACY) == 0.7688


def test_the_noise_multiplier_never_falls_below_a_tenth() -> None:
    loose = dataclasses.replace(PRIVACY, epsilon=100.0, delta=0.01, sampling_rate=0.001, steps_per_round=1, rounds=1)

    assert noise_multiplier(loose) == 0.1


def test_an_epsilon_no_noise_reaches_is_refused() -> None:
    strict = dataclasses.replace(PRIVACY, epsilon=1e-6, delta=1e-12)

    with pytest.raises(PrivacyError, match=r"cannot be reached in 40 steps at sampling rate 0.1. Raise epsilon"):
        noise_multiplier(strict)


def test_splitting_a_run_into_rounds_in_another_way_needs_the_same_noise() -> None:
    other = dataclasses.replace(PRIVACY, steps_per_round=10, rounds=4)

    assert noise_multiplier(other) == noise_multiplier(PRIVACY)


def test_noise_does_not_depend_on_clip_norm_or_persons() -> None:
    other = dataclasses.replace(PRIVACY, clip_norm=0.01, min_persons=99_999)

    assert noise_multiplier(other) == noise_multiplier(PRIVACY)


def test_the_noise_that_rdp_asks_for_is_the_smallest_to_four_decimals() -> None:
    noise = noise_by_rdp(PRIVACY)

    assert noise == pytest.approx(0.824, abs=5e-4)
    assert rdp_check([spend(0.1, noise, 40)], 1e-5) <= 8.0 < rdp_check([spend(0.1, noise - 1e-4, 40)], 1e-5)
