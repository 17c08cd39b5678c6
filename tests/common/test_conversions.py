"""Conversions: what a run costs if something else is compared."""

import functools

import pytest

from confide.common.accounting import cost
from confide.common.conversions import replace_one_cost, several_rows_cost, several_sites_cost
from tests.common.spending import spend

RUN = [spend(0.1, 0.7688, 40)]


@functools.cache
def cost_of_rows(rows: int) -> float:
    """What the run costs somebody with so many rows; most of a second each."""
    return several_rows_cost(RUN, 1e-5, rows)


def test_conversions_are_those_of_the_library() -> None:
    # By the same library (PLD), put together by hand: an accountant with the neighbouring relation and the event.
    assert cost(RUN, 1e-5).declared == pytest.approx(8.00, abs=0.01)
    assert replace_one_cost(RUN, 1e-5) == pytest.approx(9.90, abs=0.01)
    assert several_sites_cost(RUN, 1e-5, 2).declared == pytest.approx(10.76, abs=0.01)
    assert several_sites_cost(RUN, 1e-5, 3).declared == pytest.approx(13.02, abs=0.01)
    assert cost_of_rows(2) == pytest.approx(17.86, abs=0.01)
    assert cost_of_rows(3) == pytest.approx(29.03, abs=0.01)


def test_without_sampling_conversions_are_those_of_the_gaussian() -> None:
    one = [spend(1.0, 5.0, 100)]

    # The sum moves by twice the clip norm if a person is replaced, and by k of them if she has k rows.
    assert replace_one_cost(one, 1e-5) == pytest.approx(cost([spend(1.0, 2.5, 100)], 1e-5).pld, rel=1e-3)
    assert several_rows_cost(one, 1e-5, 3) == pytest.approx(cost([spend(1.0, 5 / 3, 100)], 1e-5).pld, rel=1e-3)
    assert several_sites_cost(one, 1e-5, 2) == cost([spend(1.0, 5.0, 200)], 1e-5)


def test_several_rows_of_one_person_cost_more_than_as_many_times_epsilon() -> None:
    alone = cost(RUN, 1e-5).declared

    assert cost_of_rows(1) == pytest.approx(alone, rel=1e-3)
    assert cost_of_rows(2) > 2 * alone
    assert cost_of_rows(3) > 3 * alone


def test_conversions_of_nothing_cost_nothing() -> None:
    assert replace_one_cost([], 1e-5) == several_rows_cost([], 1e-5, 2) == several_sites_cost([], 1e-5, 2).declared == 0
