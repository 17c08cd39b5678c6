"""The filter: no more is let through than the budget, and what happened is counted at any stop."""

import dataclasses
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from confide.common.accounting import planned_cost, planned_spend
from confide.common.errors import PrivacyError
from confide.common.filter import MOST_EPSILON, Filter, best_order, order_for
from confide.common.renyi import RDP_ORDERS, rdp_check, renyi_divergence
from tests.common.spending import PRIVACY, SPEND, spend

# Budget, spends that are offered one after the other.
BUDGETS = strategies.floats(0.5, 20)
OFFERS = strategies.lists(
    strategies.tuples(
        strategies.sampled_from([0.01, 0.1, 1.0]), strategies.floats(0.6, 20), strategies.integers(1, 50)
    ),
    max_size=20,
)


@settings(max_examples=50)
@given(BUDGETS, OFFERS)
def test_a_filter_never_lets_through_more_than_its_budget(
    epsilon: float, offers: list[tuple[float, float, int]]
) -> None:
    gate, admitted = Filter(epsilon=epsilon, delta=1e-5), []
    for offer in offers:
        try:
            gate = gate.with_spend(spend(*offer))
        except PrivacyError:
            assert gate.after([spend(*offer)]).used > epsilon - 1e-9
        else:
            admitted.append(spend(*offer))

    assert gate.used <= epsilon
    assert gate.used <= gate.at_any_stop
    assert gate == Filter(epsilon=epsilon, delta=1e-5).after(admitted)
    # The order was fixed before anything was seen, so it may not be the best for what came.
    assert rdp_check(admitted, 1e-5) <= gate.used + 1e-9


def test_a_filter_with_the_plans_order_lets_the_plan_through_and_no_step_more() -> None:
    whole, order = planned_cost(PRIVACY).adaptive, best_order(PRIVACY)
    one = planned_spend(PRIVACY)

    gate = Filter(epsilon=whole + 1e-6, delta=PRIVACY.delta, order=order)
    for _ in range(PRIVACY.rounds):
        gate = gate.with_spend(one)

    assert gate.used == pytest.approx(whole, abs=1e-6)
    assert gate.left == pytest.approx(0, abs=2e-6)
    with pytest.raises(PrivacyError, match=r"enough for 0 of its 4 steps. Raise the budget"):
        gate.with_spend(one)


def test_a_filter_says_what_is_left_and_for_how_many_steps_it_is_enough() -> None:
    gate = Filter(epsilon=9.0, delta=1e-5, order=3).after([spend(0.1, 0.7688, 32)])

    with pytest.raises(
        PrivacyError,
        match=r"Round 1 would cost 0\.98\d+ of epsilon, but of the budget 9 at delta = 1e-05 only 0\.265 is left, enough for 2 of its 8",
    ):
        gate.admits(spend(0.1, 0.7688, 8))
    gate.admits(spend(0.1, 0.7688, 2))


def test_a_filter_counts_what_happened_even_beyond_its_budget() -> None:
    gate = Filter(epsilon=1.0, delta=1e-5).after([spend(1.0, 1.0, 100)])

    assert gate.used > 1
    assert gate.left < 0
    with pytest.raises(PrivacyError, match="only 0 is left"):
        gate.admits(spend(0.01, 10.0, 1))


def test_a_filter_is_a_plain_value_that_goes_on_from_its_four_fields() -> None:
    gate = Filter(epsilon=8.0, delta=1e-5).after([SPEND])

    again = Filter(**dataclasses.asdict(gate))

    assert again == gate
    assert again.with_spend(SPEND) == gate.with_spend(SPEND)
    assert set(dataclasses.asdict(gate)) == {"epsilon", "delta", "order", "spent"}


def test_a_filter_with_a_spend_of_no_noise_says_no() -> None:
    with pytest.raises(PrivacyError, match="would cost inf"):
        Filter(epsilon=100.0, delta=1e-5).admits(spend(0.1, 5e-324, 1))


@settings(max_examples=100)
@given(OFFERS, strategies.integers(0, 19), strategies.integers(1, 50))
def test_what_is_taken_back_leaves_never_less_than_what_the_other_spends_come_to(
    offers: list[tuple[float, float, int]], which: int, steps: int
) -> None:
    """Compared with the exact sum, as fractions of the same divergences."""
    offers = [*offers, (0.1, 2.0, steps)]
    rate, noise, whole = offers[which % len(offers)]
    back = min(steps, whole)

    gate = Filter(epsilon=100.0, delta=1e-5, order=8).after(spend(*offer) for offer in offers)
    gate = gate.without(spend(rate, noise, back))

    place = RDP_ORDERS.index(8)
    exact = sum(Fraction(float(renyi_divergence(q, sigma)[place])) * count for q, sigma, count in offers)
    rest = exact - Fraction(float(renyi_divergence(rate, noise)[place])) * back
    assert Fraction(gate.spent) >= rest
    assert gate.spent == pytest.approx(float(rest), rel=1e-9, abs=1e-9)


def test_more_than_was_spent_is_not_taken_back() -> None:
    with pytest.raises(PrivacyError, match="cannot have spent -"):
        Filter(epsilon=8.0, delta=1e-5).after([spend(0.1, 2.0, 1)]).without(spend(0.1, 2.0, 2))


def test_an_exhausted_filter_lets_nothing_through_and_forgets_nothing() -> None:
    gate = Filter(epsilon=8.0, delta=1e-5).after([SPEND]).exhausted()

    assert gate.left < 0
    assert gate.used == pytest.approx(8.0)
    assert gate.room < gate.spent
    with pytest.raises(PrivacyError, match="only 0 is left"):
        gate.admits(spend(1e-12, 1e6, 1))
    beyond = Filter(epsilon=1.0, delta=1e-5).after([spend(1.0, 1.0, 100)])
    assert beyond.exhausted() == beyond


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"epsilon": 0.0}, "outside its range"),
        ({"epsilon": math.nan}, "outside its range"),
        ({"epsilon": MOST_EPSILON + 1}, "outside its range"),
        ({"delta": 0.0}, "outside its range"),
        ({"delta": math.nan}, "outside its range"),
        ({"order": 5000}, "none of those that are counted"),
        ({"order": 1}, "none of those that are counted"),
        ({"spent": -1.0}, "0 or more"),
        ({"spent": math.nan}, "0 or more"),
        ({"epsilon": 1e-4, "order": 2}, "has no room"),
        ({"epsilon": 1e-9, "delta": 1e-300}, "has no room"),
    ],
)
def test_a_filter_that_could_not_hold_is_refused(fields: dict[str, Any], says: str) -> None:
    given_fields: dict[str, Any] = {"epsilon": 8.0, "delta": 1e-5} | fields

    with pytest.raises(PrivacyError, match=says):
        Filter(**given_fields)


def test_the_order_for_a_round_admits_at_least_as_many_rounds_as_any_other() -> None:
    one = planned_spend(PRIVACY)

    best = order_for(12.0, 1e-5, one)

    def rounds(order: int) -> float:
        gate = Filter(epsilon=12.0, delta=1e-5, order=order)
        return gate.left / gate.after([one]).spent

    assert rounds(best) >= max(rounds(order) for order in range(2, 33))


def test_the_loss_stays_below_at_any_stop_at_all_moments_together() -> None:
    """Whoever stops when the loss looks worst is still covered; false alarms: 1e-6."""
    runs, steps, noise, delta = 20_000, 100, 10.0, 0.01
    random = np.random.default_rng(5)
    # The privacy loss of a Gaussian mechanism is Gaussian itself: mean 1/2σ², variance 1/σ² a step.
    losses = np.cumsum(random.normal(1 / (2 * noise**2), 1 / noise, (runs, steps)), axis=1)
    gate, bounds = Filter(epsilon=10.0, delta=delta), []
    for _ in range(steps):
        gate = gate.after([spend(1.0, noise, 1)])
        bounds.append(gate.at_any_stop)

    beyond = int((losses >= np.array(bounds)).any(axis=1).sum())

    expected = runs * delta
    assert beyond <= expected + 4.8 * math.sqrt(expected)
