"""Accounting: from spends to epsilon, and what a run may claim."""

import dataclasses
import itertools
import math
from typing import Any

import pytest

from confide.common.accounting import as_declared, claimed, cost, planned_cost, planned_spend
from confide.common.calibration import noise_multiplier
from confide.common.conversions import replace_one_cost, several_rows_cost
from confide.common.errors import PrivacyError
from confide.common.filter import MOST_EPSILON, Filter, best_order
from confide.common.plan import Privacy
from confide.common.pld import LEAST_PLD_DELTA
from confide.common.renyi import rdp_check
from confide.common.spend import Spend
from confide.server.publish import claim
from tests.common.spending import GRID, PRIVACY, SPEND, many_unlike, spend


def test_epsilon_is_the_smaller_of_two_upper_bounds() -> None:
    for rate, noise, steps in GRID:
        spent = cost([spend(rate, noise, steps)], 1e-5)

        assert spent.epsilon == min(spent.rdp, spent.pld)
        assert spent.rdp == pytest.approx(spent.pld, rel=0.6)


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


def test_cost_composes_over_all_rounds_and_not_per_round() -> None:
    noise = noise_multiplier(PRIVACY)
    one_round = [spend(0.1, noise, 4)]
    rounds = [dataclasses.replace(one_round[0], round=number) for number in range(1, 11)]

    whole = cost(rounds, PRIVACY.delta)

    assert whole == cost([spend(0.1, noise, 40)], PRIVACY.delta)
    assert whole == planned_cost(PRIVACY)
    assert whole.epsilon <= PRIVACY.epsilon
    assert whole.epsilon < 10 * cost(one_round, PRIVACY.delta).epsilon


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


def test_a_delta_below_what_loss_distributions_certify_leaves_rdp_alone() -> None:
    tiny = cost([SPEND], LEAST_PLD_DELTA / 2)

    assert tiny.pld == math.inf
    assert tiny.declared == tiny.adaptive == tiny.rdp < math.inf
    for conversion in (replace_one_cost, lambda spends, delta: several_rows_cost(spends, delta, 2)):
        with pytest.raises(
            PrivacyError, match=r"cannot be certified: privacy loss distributions hold for delta of at least 1e-12"
        ):
            conversion([SPEND], LEAST_PLD_DELTA / 2)


# Numbers at the edges: (sampling rate, noise multiplier, steps, delta).
EDGES = [
    (5e-324, 1.0, 10**6, 1e-5),
    (5e-324, 1.0, 1, 5e-324),
    (1e-12, 1e6, 10**6, 1e-12),
    (0.1, 1e6, 10**6, 1e-12),
    (0.1, 1e300, 1, 1e-5),
    (1.0, 1e300, 10**6, 1e-5),
    (0.1, 2.0, 1, 5e-324),
    (0.1, 2.0, 40, 0.5),
    (1.0, 2.0, 40, 0.5),
    (0.1, 2.0, 1, 1 - 2**-53),
    (1.0, 1e-3, 1, 1e-5),
    (0.1, 0.02, 1, 1e-5),
    (1.0, 1.0, 10**6, 1e-5),
]


@pytest.mark.parametrize(("rate", "noise", "steps", "delta"), EDGES)
def test_epsilon_is_never_negative_nor_no_number(rate: float, noise: float, steps: int, delta: float) -> None:
    spent = cost([spend(rate, noise, steps)], delta)

    assert spent.rdp >= 0
    assert spent.pld >= 0
    assert 0 <= spent.declared < math.inf
    assert rdp_check([spend(rate, noise, steps)], delta) == pytest.approx(spent.rdp, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("noise", [5e-324, 1e-310, 1e-200, 1e-7])
def test_next_to_no_noise_costs_everything(noise: float) -> None:
    for rate in (5e-324, 0.1, 1.0):
        assert cost([spend(rate, noise, 1)], 1e-5).declared == math.inf


def test_a_huge_noise_at_a_tiny_delta_still_costs_something() -> None:
    assert 0 < cost([spend(0.1, 1e6, 1)], 1e-300).declared < 0.2


def test_a_hundred_thousand_unlike_spends_are_composed() -> None:
    spends = many_unlike()

    total = cost(spends, 1e-5)

    assert total.declared == total.rdp == rdp_check(spends, 1e-5)
    assert rdp_check([spend(0.001, 1.4, 100_000)], 1e-5) < total.rdp < rdp_check([spend(0.001, 0.7, 100_000)], 1e-5)


@pytest.mark.parametrize(("rate", "noise"), [(0.1, 4.0), (0.001, 0.5), (0.5, 2.0)])
def test_a_report_on_ten_thousand_steps_has_both_bounds(rate: float, noise: float) -> None:
    spent = cost([spend(rate, noise, 10_000)], 1e-5)

    assert spent.pld < spent.rdp


def test_a_run_of_the_whole_plan_claims_what_the_plan_declared() -> None:
    spends = rounds_of(PRIVACY, range(1, 11))

    assert as_declared(spends, PRIVACY)
    assert claimed(spends, PRIVACY) == planned_cost(PRIVACY).declared <= PRIVACY.epsilon
    assert claimed([], PRIVACY) == 0


@pytest.mark.parametrize("made", [[1], [3, 7], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7, 8, 10]])
def test_missed_and_void_rounds_never_raise_the_claim_nor_lower_it_below_what_was_spent(made: list[int]) -> None:
    spends = rounds_of(PRIVACY, made)

    told = claimed(spends, PRIVACY)

    assert as_declared(spends, PRIVACY)
    assert cost(spends, PRIVACY.delta).declared <= told <= planned_cost(PRIVACY).declared


def test_a_run_of_few_rounds_claims_less_than_the_plan() -> None:
    long = dataclasses.replace(PRIVACY, rounds=100, steps_per_round=10)

    told = claimed(rounds_of(long, [1]), long)

    assert told == Filter(epsilon=100, delta=long.delta, order=best_order(long)).after(rounds_of(long, [1])).at_any_stop
    assert told < 0.9 * planned_cost(long).declared


def test_the_manifest_claims_what_was_declared_and_rounds_it_up() -> None:
    whole, some = rounds_of(PRIVACY, range(1, 11)), rounds_of(PRIVACY, [1, 2])

    for spends in (whole, some):
        found = claim(spends, PRIVACY, [1, 2])

        assert 0 <= found.epsilon - claimed(spends, PRIVACY) < 1e-6 + 1e-12
    with pytest.raises(PrivacyError, match="without a recorded spend"):
        claim(some, PRIVACY, [1, 2, 3])


def rounds_of(privacy: Privacy, numbers: Any) -> list[Spend]:
    return [dataclasses.replace(planned_spend(privacy), round=number) for number in numbers]


CHANGED: dict[str, list[Spend]] = {
    "more noise": [dataclasses.replace(one, noise_multiplier=0.9) for one in rounds_of(PRIVACY, range(1, 11))],
    "less noise once": [
        *rounds_of(PRIVACY, range(1, 10)),
        dataclasses.replace(planned_spend(PRIVACY), round=10, noise_multiplier=0.7),
    ],
    "more steps once": [
        *rounds_of(PRIVACY, range(1, 10)),
        dataclasses.replace(planned_spend(PRIVACY), round=10, steps=5),
    ],
    "a round beyond the last": rounds_of(PRIVACY, range(1, 12)),
    "a round twice": rounds_of(PRIVACY, [1, 1, 2]),
    "four times the rate": [dataclasses.replace(one, sampling_rate=0.4) for one in rounds_of(PRIVACY, range(1, 11))],
}


@pytest.mark.parametrize("case", CHANGED)
def test_what_the_plan_did_not_declare_is_claimed_by_rdp_alone(case: str) -> None:
    spends = CHANGED[case]

    told = claimed(spends, PRIVACY)

    assert not as_declared(spends, PRIVACY)
    gate = Filter(epsilon=MOST_EPSILON, delta=PRIVACY.delta, order=best_order(PRIVACY)).after(spends)
    assert told == gate.at_any_stop > gate.used >= cost(spends, PRIVACY.delta).rdp - 1e-9
