"""What a ledger says of budgets and runs, as numbers for people."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings, strategies

from confide.client.standing import RunStanding, SiteStanding, course, rounds_that_fit, tree
from confide.common.entries import Commit, Forfeit, Recovered, Refund, Release, Revocation, utc_seconds
from confide.common.errors import PrivacyError, Refused
from confide.common.filter import Filter
from confide.common.ledger import Book
from confide.common.spend import Spend
from tests.books import (
    DATA,
    EXPIRES,
    LEDGER,
    NOW,
    PLAN,
    RECOVERY,
    RUN,
    SECOND,
    a_round,
    account,
    approval,
    beginning,
    data_set,
    genesis,
    policy,
    renewal,
    reserve,
    written,
)

YEAR_S = 366 * 86_400


def standing(book: Book, now: int = NOW) -> SiteStanding:
    return SiteStanding.of(book, now)


def run_of(book: Book, now: int = NOW) -> RunStanding:
    (found,) = standing(book, now).runs
    return found


def test_a_new_budget_has_less_left_than_its_limit_by_the_conversion() -> None:
    book, _ = written([genesis(), policy(), account(), data_set()])

    (found,) = standing(book).accounts

    assert (found.account, found.data, found.period, found.used, found.total) == ("1", (DATA,), 1, 0.0, 0.0)
    assert 0 < found.conversion < found.epsilon == 10.0
    assert found.left == pytest.approx(found.epsilon - found.conversion)
    assert found.charges == ()


def test_what_each_thing_took_adds_up_to_what_is_used() -> None:
    release = Release(data=DATA, what="label-histogram", noise_multiplier=20.0)
    book, _ = written([*beginning(), *a_round(1), *a_round(2), release])

    (found,) = standing(book).accounts

    assert [(charge.what, charge.count) for charge in found.charges] == [(f"run {RUN}", 2), ("noised statistics", 1)]
    assert found.conversion + sum(charge.now for charge in found.charges) == pytest.approx(found.used, rel=1e-9)
    assert found.used + found.left == pytest.approx(found.epsilon)
    assert all(charge.now == charge.total for charge in found.charges)


def test_a_renewal_begins_a_new_period_and_hides_nothing_of_the_old_one() -> None:
    late = approval(ledger=LEDGER, expires="2029-01-01T00:00:00Z")
    book, _ = written([*beginning()[:-1], late, *a_round(1), *a_round(2)])
    before = standing(book).accounts[0]
    for entry in (renewal(), *a_round(3)):
        book.record(entry, NOW + YEAR_S)

    (found,) = standing(book, NOW + YEAR_S).accounts

    (charge,) = found.charges
    assert (found.period, charge.count) == (2, 3)
    assert found.used < before.used < found.total
    assert charge.now == pytest.approx(charge.total / 3)


def test_a_run_tells_how_far_it_is_and_until_when_it_may_go_on() -> None:
    book, _ = written([*beginning(), *a_round(1), reserve(3), Forfeit(run=RUN, round=3, reason="It ended.")])

    found = run_of(book)

    assert (found.run, found.plan, found.data, found.rounds) == (RUN, PLAN, DATA, 40)
    assert (found.begun, found.lost, found.last) == (2, 1, 3)
    assert (found.until, found.why) == (utc_seconds(EXPIRES), "")
    assert found.to_come == min(37, found.fits)


def test_a_round_that_is_being_trained_is_begun_and_not_lost() -> None:
    book, _ = written([*beginning(), reserve(1)])

    assert (run_of(book).begun, run_of(book).lost) == (1, 0)


def test_steps_that_touched_no_row_are_not_among_the_charges() -> None:
    book, _ = written([*beginning(), reserve(1), Refund(run=RUN, round=1, steps=4)])

    (found,) = standing(book).accounts

    assert found.charges == ()
    assert run_of(book).lost == 1


@pytest.mark.parametrize(
    ("entries", "now", "why"),
    [
        ([Revocation(plan=PLAN, run=RUN, by="Dr. Müller", reason="A doubt.")], NOW, "revoked"),
        ([], utc_seconds(EXPIRES), "expired"),
        ([policy(approvals_needed=2)], NOW, "signatures are missing"),
        ([policy(approvers=(SECOND.public.hex(),))], NOW, "the policy does not cover it"),
        ([policy(plan_epsilon=1.0)], NOW, "the policy does not cover it"),
    ],
    ids=["revoked", "expired", "one of two", "another approver", "a smaller plan"],
)
def test_why_a_run_may_not_go_on_is_said(entries: list[Any], now: int, why: str) -> None:
    book, _ = written([*beginning(), *entries])

    found = run_of(book, now)

    assert (found.until, found.why, found.to_come) == (None, why, 0)


def test_with_two_signatures_a_run_ends_when_the_first_of_them_does() -> None:
    late = "2028-01-01T00:00:00Z"
    two = approval(), approval(SECOND, expires=late)
    book, _ = written([genesis(), policy(approvals_needed=2), account(), data_set(), *two])

    assert run_of(book).until == utc_seconds(EXPIRES)


def test_a_data_set_that_is_not_in_use_leaves_no_round() -> None:
    removed = data_set(version=2, event="remove")
    book, _ = written([*beginning(), removed])

    found = standing(book)

    assert found.runs[0].fits == 0
    assert found.runs[0].why == "the data set was removed"
    assert found.accounts[0].data == ()


def test_after_a_loss_an_account_has_nothing_left_and_may_have_spent_more() -> None:
    book, _ = written([*beginning(), *a_round(1)])
    book.record(
        Recovered(recovery=RECOVERY, size=book.size, root=book.root.hex(), reason="The disk failed.", by="IT"), NOW + 60
    )

    found = standing(book)

    assert (found.accounts[0].left, found.accounts[0].incomplete) == (0.0, True)
    assert found.runs[0].why == "the ledger was recovered"
    book.record(data_set(version=2), NOW + 120)
    assert standing(book).runs[0].why == "the ledger was recovered"


@given(
    epsilon=strategies.floats(3, 50),
    rate=strategies.floats(0.01, 1),
    noise=strategies.floats(0.6, 20),
    steps=strategies.integers(1, 50),
    before=strategies.integers(0, 5),
)
@settings(max_examples=60)
def test_as_many_rounds_as_fit_are_let_through_and_nearly_no_more(
    epsilon: float, rate: float, noise: float, steps: int, before: int
) -> None:
    spend = Spend(
        round=1, sampling_rate=rate, noise_multiplier=noise, steps=steps, clip_norm=1.0, divisor=1.0, noise=""
    )
    gate = Filter(epsilon=epsilon, delta=1e-5).after([dataclasses.replace(spend, steps=1)] * before)

    fits = rounds_that_fit(gate, spend)

    for _ in range(min(fits, 200)):
        gate = gate.with_spend(spend)
    if fits <= 200:
        with pytest.raises(PrivacyError):
            gate.with_spend(dataclasses.replace(spend, steps=steps + 1))


def test_the_ledger_lets_in_exactly_the_rounds_that_are_said_to_fit() -> None:
    book, _ = written([*beginning()[:-1], approval(rounds=1000)])
    fits = run_of(book).to_come

    for number in range(1, fits + 1):
        book.record(reserve(number), NOW + 60)

    assert 100 < fits < 1000
    with pytest.raises(Refused, match="is not enough"):
        book.record(reserve(fits + 1), NOW + 60)


def test_the_course_has_a_point_for_each_record_that_changed_an_account() -> None:
    late = approval(ledger=LEDGER, expires="2029-01-01T00:00:00Z")
    entries = [*beginning()[:-1], late, *a_round(1), reserve(2)]
    book, lines = written(entries)
    lines += [book.record(entry, NOW + YEAR_S) for entry in (Refund(run=RUN, round=2, steps=1), renewal())]

    points = course(lines)

    assert [(point.kind, point.run) for point in points] == [
        ("account", ""),
        ("reserve", RUN),
        ("reserve", RUN),
        ("refund", RUN),
        ("renew", ""),
    ]
    used = [point.used for point in points]
    assert used[0] == used[4] == 0 < used[1] < used[3] < used[2]
    assert [point.period for point in points] == [1, 1, 1, 1, 2]
    assert points[-1].record == book.size
    assert [point.at for point in points] == sorted(point.at for point in points)


def test_the_tree_is_plain_and_complete() -> None:
    book, _ = written([*beginning(), *a_round(1), reserve(2)])

    found: Any = tree(standing(book))

    assert found["site"] == "St. Anna"
    assert found["ledger"] == {"id": LEDGER, "records": book.size, "at": book.at}
    assert found["accounts"][0]["charges"][0]["what"] == f"run {RUN}"
    assert found["runs"][0]["to_come"] == 38 < found["runs"][0]["fits"]


def test_commits_change_no_account() -> None:
    book, lines = written([*beginning(), *a_round(1)])

    assert isinstance(book.last, Commit)
    assert len(course(lines)) == 2
