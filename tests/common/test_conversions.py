"""Conversions: what a run costs if something else is compared."""

import pytest

from confide.common.accounting import cost
from confide.common.conversions import replace_one_cost, several_rows_cost, several_sites_cost
from tests.common.spending import spend

# By the same library, put together by hand: q = 0.01, σ = 1, 1000 steps, delta 1e-5 (PLD).
BASE = [(0.01, 1.0, 1000)]


def test_conversions_are_those_of_the_library() -> None:
    one = [spend(*BASE[0])]

    assert cost(one, 1e-5).declared == pytest.approx(1.83, abs=0.01)
    assert replace_one_cost(one, 1e-5) == pytest.approx(2.84, abs=0.01)
    assert several_sites_cost(one, 1e-5, 2).declared == pytest.approx(2.59, abs=0.01)
    assert several_sites_cost(one, 1e-5, 3).declared == pytest.approx(3.19, abs=0.01)
    assert several_rows_cost(one, 1e-5, 2) == pytest.approx(3.98, abs=0.01)
    assert several_rows_cost(one, 1e-5, 3) == pytest.approx(6.34, abs=0.01)


def test_without_sampling_conversions_are_those_of_the_gaussian() -> None:
    one = [spend(1.0, 5.0, 100)]

    # The sum moves by twice the clip norm if a person is replaced, and by k of them if she has k rows.
    assert replace_one_cost(one, 1e-5) == pytest.approx(cost([spend(1.0, 2.5, 100)], 1e-5).pld, rel=1e-3)
    assert several_rows_cost(one, 1e-5, 3) == pytest.approx(cost([spend(1.0, 5 / 3, 100)], 1e-5).pld, rel=1e-3)
    assert several_sites_cost(one, 1e-5, 2) == cost([spend(1.0, 5.0, 200)], 1e-5)


def test_several_rows_of_one_person_cost_more_than_as_many_times_epsilon() -> None:
    one = [spend(0.1, 0.7688, 40)]

    alone = cost(one, 1e-5).declared
    assert several_rows_cost(one, 1e-5, 1) == pytest.approx(alone, rel=1e-3)
    assert several_rows_cost(one, 1e-5, 2) > 2 * alone


def test_conversions_of_nothing_cost_nothing() -> None:
    assert replace_one_cost([], 1e-5) == several_rows_cost([], 1e-5, 2) == several_sites_cost([], 1e-5, 2).declared == 0
