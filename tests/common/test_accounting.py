"""Accounting: from spends to epsilon, and from epsilon to the noise it needs."""

import dataclasses
import itertools
import math
import warnings
from typing import Any

import pytest
from hypothesis import given, settings, strategies

from confide.common.accounting import (
    RDP_ORDERS,
    Spend,
    _smallest,
    cost,
    noise_multiplier,
    planned_cost,
    rdp_check,
)
from confide.common.errors import PrivacyError
from confide.common.plan import Privacy

SPEND = Spend(
    round=1,
    sampling_rate=0.1,
    noise_multiplier=2.0,
    steps=40,
    clip_norm=1.0,
    divisor=100.0,
    noise="insecure_seeded_noise",
)
PRIVACY = Privacy(epsilon=8.0, delta=1e-5, sampling_rate=0.1, steps_per_round=4, rounds=10, min_persons=1000)
# (sampling rate, noise multiplier, steps), from generous to strict.
GRID = [(0.01, 0.6, 500), (0.05, 1.0, 200), (0.1, 2.0, 1000), (0.3, 4.0, 100), (1.0, 8.0, 40)]


def spend(rate: float, noise: float, steps: int) -> Spend:
    return dataclasses.replace(SPEND, sampling_rate=rate, noise_multiplier=noise, steps=steps)


def altered(key: str, value: object) -> Spend:
    changes: dict[str, Any] = {key: value}
    return dataclasses.replace(SPEND, **changes)


def event_rdp(rate: float, noise: float, steps: int, delta: float, orders: tuple[int, ...]) -> float:
    """The same by dp-accounting, put together by hand."""
    import dp_accounting
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant(orders, dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)), steps)
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize(("rate", "noise", "steps"), GRID)
@pytest.mark.parametrize("delta", [1e-5, 1e-9])
def test_our_own_rdp_equals_that_of_dp_accounting(rate: float, noise: float, steps: int, delta: float) -> None:
    event = spend(rate, noise, steps)

    ours = rdp_check([event], delta)

    assert ours == pytest.approx(cost([event], delta).rdp, abs=1e-6)
    assert ours == pytest.approx(event_rdp(rate, noise, steps, delta, RDP_ORDERS), abs=1e-6)


@pytest.mark.parametrize("order", [2, 3, 17, 64, 4096])
def test_our_own_rdp_equals_that_of_dp_accounting_at_each_order(order: int) -> None:
    for rate, noise, steps in GRID[:-1]:
        ours = rdp_check([spend(rate, noise, steps)], 1e-5, [order])

        assert ours == pytest.approx(event_rdp(rate, noise, steps, 1e-5, (order,)), rel=1e-9, abs=1e-6)


@pytest.mark.parametrize(("rate", "noise", "steps"), [(0.01, 0.8, 200), (0.05, 1.0, 200), (0.1, 3.0, 400)])
def test_pld_agrees_with_the_prv_accountant_of_opacus(rate: float, noise: float, steps: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import PRVAccountant

        accountant = PRVAccountant()
        accountant.history = [(noise, rate, steps)]
        theirs = float(accountant.get_epsilon(1e-5, eps_error=0.01, delta_error=1e-8))

    ours = cost([spend(rate, noise, steps)], 1e-5).pld

    assert ours == pytest.approx(theirs, rel=0.03)


@pytest.mark.parametrize(("noise", "steps"), [(2.0, 1), (8.0, 40), (0.7, 1)])
def test_without_sampling_the_cost_is_that_of_the_exact_gaussian(noise: float, steps: int) -> None:
    # Balle and Wang 2018 (arXiv 1805.06530), Theorem 8, for sensitivity 1 and σ / √steps.
    def exact_delta(epsilon: float) -> float:
        sigma = noise / math.sqrt(steps)
        one, two = 1 / (2 * sigma) - epsilon * sigma, -1 / (2 * sigma) - epsilon * sigma
        return normal(one) - math.exp(epsilon) * normal(two)

    spent = cost([spend(1.0, noise, steps)], 1e-5)

    assert exact_delta(spent.pld) <= 1e-5 <= exact_delta(spent.pld * 0.99)
    assert spent.rdp >= spent.pld
    assert spent.epsilon == spent.pld


def normal(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def test_epsilon_is_the_smaller_of_two_upper_bounds() -> None:
    for rate, noise, steps in GRID:
        spent = cost([spend(rate, noise, steps)], 1e-5)

        assert spent.epsilon == min(spent.rdp, spent.pld)
        assert spent.rdp == pytest.approx(spent.pld, rel=0.6)


# Here the older calibration failed or gave one unit too much: few steps at a small rate, long runs at a tiny delta.
@pytest.mark.parametrize(
    ("epsilon", "delta", "rate", "steps"),
    [
        (8.0, 1e-5, 0.1, 40),
        (1.0, 1e-6, 0.001, 40),
        (1.0, 1e-6, 0.001, 1000),
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
    loose = dataclasses.replace(PRIVACY, epsilon=100.0, sampling_rate=0.001, steps_per_round=1, rounds=1)

    assert noise_multiplier(loose) == 0.1


def test_an_epsilon_no_noise_reaches_is_refused() -> None:
    strict = dataclasses.replace(PRIVACY, epsilon=1e-6, delta=1e-12)

    with pytest.raises(PrivacyError, match=r"cannot be reached in 40 steps at sampling rate 0.1. Raise epsilon"):
        noise_multiplier(strict)


def test_cost_composes_over_all_rounds_and_not_per_round() -> None:
    noise = noise_multiplier(PRIVACY)
    one_round = [spend(0.1, noise, 4)]
    rounds = [dataclasses.replace(one_round[0], round=number) for number in range(1, 11)]

    whole = cost(rounds, PRIVACY.delta)

    assert whole == cost([spend(0.1, noise, 40)], PRIVACY.delta)
    assert whole == planned_cost(PRIVACY)
    assert whole.epsilon <= PRIVACY.epsilon
    assert whole.epsilon < 10 * cost(one_round, PRIVACY.delta).epsilon


def test_splitting_a_run_into_rounds_in_another_way_needs_the_same_noise() -> None:
    other = dataclasses.replace(PRIVACY, steps_per_round=10, rounds=4)

    assert noise_multiplier(other) == noise_multiplier(PRIVACY)


def test_noise_does_not_depend_on_clip_norm_or_persons() -> None:
    other = dataclasses.replace(PRIVACY, clip_norm=0.01, min_persons=99_999)

    assert noise_multiplier(other) == noise_multiplier(PRIVACY)


def test_the_cost_of_a_part_of_the_plan_grows_to_the_whole() -> None:
    parts = [planned_cost(PRIVACY, rounds).epsilon for rounds in range(11)]

    assert parts[0] == 0
    assert all(less < more for less, more in itertools.pairwise(parts))
    assert parts[10] <= PRIVACY.epsilon


def test_nothing_spent_costs_nothing() -> None:
    assert cost([], 1e-5).epsilon == 0
    assert rdp_check([], 1e-5) == 0


def test_the_order_of_spends_does_not_matter() -> None:
    spends = [spend(0.1, 2.0, 10), spend(0.05, 1.0, 3), spend(0.1, 2.0, 7)]

    assert cost(spends, 1e-5) == cost(spends[::-1], 1e-5)


def test_unlike_spends_cost_more_than_each_and_no_more_than_their_sum() -> None:
    first, second = spend(0.1, 2.0, 40), spend(0.02, 0.9, 100)

    both = cost([first, second], 1e-5)

    alone = [cost([first], 1e-5), cost([second], 1e-5)]
    assert max(one.epsilon for one in alone) < both.epsilon
    assert both.epsilon < sum(one.epsilon for one in alone)  # at twice the delta: basic composition
    assert rdp_check([first, second], 1e-5) == pytest.approx(both.rdp, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    strategies.floats(0.001, 1), strategies.floats(0.5, 50), strategies.integers(1, 500), strategies.integers(1, 500)
)
def test_cost_grows_with_steps_and_rate_and_falls_with_noise(rate: float, noise: float, less: int, more: int) -> None:
    base = rdp_check([spend(rate, noise, less)], 1e-5)

    assert base <= rdp_check([spend(rate, noise, less + more)], 1e-5)
    assert base <= rdp_check([spend(min(1.0, rate * 1.5), noise, less)], 1e-5) + 1e-9
    assert base >= rdp_check([spend(rate, noise * 1.5, less)], 1e-5)


def test_cost_grows_with_steps_in_both_accountants() -> None:
    costs = [cost([spend(0.1, 2.0, steps)], 1e-5) for steps in (1, 10, 100, 1000, 1001)]

    assert all(less.rdp < more.rdp for less, more in itertools.pairwise(costs))
    # At 1001 steps the grid of the loss becomes finer, and with it the bound tighter.
    assert all(less.pld < more.pld for less, more in itertools.pairwise(costs[:-1]))


def test_a_delta_of_a_half_and_a_huge_noise_cost_next_to_nothing() -> None:
    assert cost([spend(0.1, 2.0, 1)], 0.5).epsilon == 0
    assert 0 <= cost([spend(0.1, 1e6, 1)], 1e-5).epsilon < 0.02
    assert 0 <= cost([spend(1.0, 1e6, 1)], 1e-5).epsilon < 0.02


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, math.nan, math.inf])
def test_a_delta_that_is_no_probability_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyError, match=r"delta = .* is outside its range"):
        cost([SPEND], delta)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -1.0])
@pytest.mark.parametrize("key", ["sampling_rate", "noise_multiplier", "clip_norm", "divisor"])
def test_a_spend_that_is_no_training_is_refused(key: str, bad: float) -> None:
    with pytest.raises(PrivacyError, match="No training costs what this says"):
        altered(key, bad)


@pytest.mark.parametrize(("key", "bad"), [("sampling_rate", 1.0000001), ("steps", 0), ("steps", -1), ("round", 0)])
def test_a_spend_beyond_its_limits_is_refused(key: str, bad: float) -> None:
    with pytest.raises(PrivacyError, match="No training costs what this says"):
        altered(key, bad)
