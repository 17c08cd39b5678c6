"""Rényi divergences: ours and the library's are the same, at every order and on a grid of mechanisms."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from confide.common.accounting import cost
from confide.common.renyi import RDP_ORDERS, rdp_check, rdp_epsilon, renyi_divergence
from tests.common.spending import GRID, library_divergences, library_epsilon, spend


@pytest.mark.parametrize(("rate", "noise", "steps"), GRID)
@pytest.mark.parametrize("delta", [1e-5, 1e-9])
def test_our_own_rdp_equals_that_of_dp_accounting(rate: float, noise: float, steps: int, delta: float) -> None:
    event = spend(rate, noise, steps)

    ours = rdp_check([event], delta)

    assert ours == pytest.approx(cost([event], delta).rdp, abs=1e-6)
    assert ours == pytest.approx(library_epsilon(rate, noise, steps, delta), abs=1e-6)


@pytest.mark.parametrize("order", [2, 3, 17, 64, 4096])
def test_our_own_rdp_equals_that_of_dp_accounting_at_each_order(order: int) -> None:
    for rate, noise, steps in GRID[:-1]:
        ours = rdp_check([spend(rate, noise, steps)], 1e-5, [order])

        assert ours == pytest.approx(library_epsilon(rate, noise, steps, 1e-5, (order,)), rel=1e-9, abs=1e-6)


@pytest.mark.parametrize("rate", [1e-3, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("noise", [0.5, 0.8, 1.0, 2.0, 8.0])
def test_both_rdp_accountants_agree_on_the_published_grid(rate: float, noise: float) -> None:
    from dp_accounting import rdp

    one_step = library_divergences(rate, noise)

    for steps, delta in itertools.product([1, 100, 3000, 100_000], [1e-5, 1e-8]):
        theirs = rdp.compute_epsilon(RDP_ORDERS, steps * one_step, delta)[0]
        assert rdp_check([spend(rate, noise, steps)], delta) == pytest.approx(theirs, rel=1e-6, abs=1e-6)
        assert rdp_epsilon(((rate, noise, steps),), delta) == pytest.approx(theirs, rel=1e-6, abs=1e-6)


def test_the_library_composes_equal_steps_by_adding_their_divergences() -> None:
    for rate, noise, steps in GRID:
        np.testing.assert_allclose(
            library_divergences(rate, noise, steps=steps), steps * library_divergences(rate, noise), rtol=1e-12
        )


def test_the_librarys_divergences_are_ours_at_every_order() -> None:
    for rate, noise in ((1e-3, 0.5), (0.1, 0.7688), (0.5, 3.0)):
        ours, theirs = renyi_divergence(rate, noise), library_divergences(rate, noise)

        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
        assert (ours >= theirs - 1e-15).all()


@settings(max_examples=30)
@given(
    strategies.floats(0.001, 1), strategies.floats(0.5, 50), strategies.integers(1, 500), strategies.integers(1, 500)
)
def test_cost_grows_with_steps_and_rate_and_falls_with_noise(rate: float, noise: float, less: int, more: int) -> None:
    base = rdp_check([spend(rate, noise, less)], 1e-5)

    assert base <= rdp_check([spend(rate, noise, less + more)], 1e-5)
    assert base <= rdp_check([spend(min(1.0, rate * 1.5), noise, less)], 1e-5) + 1e-9
    assert base >= rdp_check([spend(rate, noise * 1.5, less)], 1e-5)
