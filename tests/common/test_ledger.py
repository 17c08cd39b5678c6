"""The ledger as a value: every rule, whoever asks, and whatever is done to the records afterwards."""

import dataclasses
import itertools
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies

from confide.common.checkpoint import Checkpoint, read_note
from confide.common.entries import (
    FIRST_PREV,
    KINDS,
    SEEDED,
    Entry,
    Federation,
    Forfeit,
    Recovered,
    Refund,
    Release,
    Reserve,
    Revocation,
    Rotation,
    Started,
    decode,
    encode,
    utc_seconds,
    utc_text,
)
from confide.common.errors import LedgerError, Refused, UsageError
from confide.common.ledger import BOUND, CLOSED, COMMITTED, FORFEITED, REFUNDED, RESERVED, Book, verify
from confide.common.merkle import leaf_hash
from confide.common.renyi import RDP_ORDERS, renyi_divergence
from confide.common.spend import Spend
from confide.simulations.insecure import PLAIN_SUM
from tests.books import (
    DATA,
    DAY_S,
    EXPIRES,
    LEDGER,
    NOW,
    PLAN,
    RECOVERY,
    ROSTER,
    RUN,
    SECOND,
    SITE,
    START,
    STEWARD,
    STRANGER,
    a_round,
    account,
    approval,
    beginning,
    bind,
    commit,
    data_set,
    federation,
    genesis,
    many,
    mask,
    policy,
    renewal,
    reserve,
    signed,
    written,
)

LATER = NOW + 1000
VECTOR = Path(__file__).parents[1] / "vectors" / "ledger.json"
RECOVERED = Recovered(recovery=RECOVERY, size=40, root="5c" * 32, reason="The disk failed.", by="IT")


def after(*entries: Entry) -> Book:
    """The book of the made-up site after its beginning and these entries."""
    return written([*beginning(), *entries])[0]


def test_a_book_tells_what_its_records_lead_to() -> None:
    book, lines = written([*beginning(), *a_round(1), reserve(2), bind(2)])

    assert (book.size, book.ledger, book.site, book.key) == (11, LEDGER, "St. Anna", SITE.public)
    assert book.at == NOW + 10
    assert book.head == f"sha256:{leaf_hash(lines[-1]).hex()}"
    assert book.last == bind(2)
    assert book.charges == 2
    assert book.policy == policy()
    assert book.data_set(DATA) == data_set()
    assert [standing.approval for standing in book.approvals] == [approval()]
    assert {number: known.state for number, known in book.rounds(RUN).items()} == {1: COMMITTED, 2: BOUND}
    assert book.rounds(RUN)[2].commitment == bind(2).commitment
    assert book.spends(RUN) == (reserve(1).spend(), reserve(2).spend()) == book.charged("1")
    assert book.runs == (RUN,)
    assert book.rounds("another") == {}
    assert book.accounts["1"].filter.spent == book.rounds(RUN)[2].reserve.spent[0]
    assert 0 < book.accounts["1"].used < 10
    assert book.accounts["1"].left == pytest.approx(10 - book.accounts["1"].used)


def test_records_replayed_lead_to_the_same_and_the_checkpoint_agrees() -> None:
    book, lines = written([*beginning(), *a_round(1), reserve(2), Refund(run=RUN, round=2, steps=3)])

    again = verify(lines, signed(book))

    assert state(again) == state(book)


def state(book: Book) -> tuple[object, ...]:
    """All that a book tells."""
    return (
        (book.size, book.head, book.root, book.at, book.ledger, book.site, book.key, book.policy),
        (book.recoveries, book.charges),
        (dict(book.accounts), dict(book.data_sets), dict(book.federations), book.approvals, book.releases, book.last),
        {run: (dict(book.rounds(run)), book.spends(run)) for run in book.runs},
        (book.lost_data_sets, book.charged("1")),
    )


# What is refused, after what, by which rule, and in which words.
REFUSED: dict[str, tuple[Sequence[Entry], Entry, str, str]] = {
    "a second genesis": ([], genesis(), "ledger", "has one only"),
    "an account too large": ([], account(2, epsilon=10.1), "budget", "the policy allows 10 at 1e-05"),
    "an account of larger delta": ([], account(2, delta=2e-5), "budget", "the policy allows 10 at 1e-05"),
    "an account without room": ([], account(2, epsilon=0.1), "budget", "has no room at the Rényi order 6"),
    "an account at no order": ([], account(2, order=65), "budget", "none of those that are counted"),
    "an account out of turn": ([], account(3), "ledger", "the next one is 2"),
    "a data set twice": ([], data_set(version=2), "data", "registered already"),
    "a version left out": ([], data_set(version=3, event="change"), "data", "the next is 2"),
    "a change of nothing": ([], data_set(data="new", event="change"), "data", "is not registered"),
    "a data set that leaves an account out": (
        [account(2)],
        data_set(version=2, event="change", accounts=("2",)),
        "data",
        "would no longer charge (1)",
    ),
    "a data set that leaves an account out when it comes back": (
        [account(2), data_set(version=2, event="remove")],
        data_set(version=3, accounts=("2",)),
        "data",
        "would no longer charge (1)",
    ),
    "a data set of no account": ([], data_set(version=2, event="change", accounts=()), "data", "names no account"),
    "a data set of no persons": (
        [],
        data_set(version=2, event="change", registered=""),
        "data",
        "the digest of its persons",
    ),
    "a data set of another account": (
        [],
        data_set(version=2, event="change", accounts=("1", "7")),
        "data",
        "account 7, which is not",
    ),
    "a roster of before": (
        [Federation(federation="Heart 2030", epoch=2, roster=ROSTER, admins=())],
        Federation(federation="Heart 2030", epoch=1, roster=ROSTER, admins=()),
        "federation",
        "does not follow on that of epoch 2",
    ),
    "another roster of the same epoch": (
        [Federation(federation="Heart 2030", epoch=2, roster=ROSTER, admins=())],
        Federation(federation="Heart 2030", epoch=2, roster=START, admins=()),
        "federation",
        "does not follow",
    ),
    "an approval by a stranger": ([], approval(STRANGER), "approval", "none of the policy's approvers"),
    "an approval for another ledger": ([], approval(ledger="1" * 32), "approval", "is for the ledger 1111"),
    "an approval from before a loss": (
        [],
        approval(recovery=RECOVERY),
        "approval",
        "signed after the recovery 4a4a4a4a",
    ),
    "an approval without signature": (
        [],
        dataclasses.replace(approval(), signature=""),
        "approval",
        "is not signed by the key",
    ),
    "an approval with another's signature": (
        [],
        dataclasses.replace(approval(), signature=approval(SECOND).signature),
        "approval",
        "is not signed by the key",
    ),
    "an approval of changed terms": (
        [],
        dataclasses.replace(approval(), rounds=41),
        "approval",
        "is not signed by the key",
    ),
    "an approval of an expensive plan": (
        [],
        approval(epsilon=8.5),
        "plan-privacy",
        "the policy allows a plan 8 at 1e-05",
    ),
    "an approval of a likely failure": (
        [],
        approval(delta=2e-5),
        "plan-privacy",
        "the policy allows a plan 8 at 1e-05",
    ),
    "an approval for unknown data": ([], approval(data="other"), "data", "'other' is not registered"),
    "an approval that is over": ([], approval(expires=utc_text(LATER)), "approval", "which is over"),
    "a revocation of nothing": (
        [],
        Revocation(plan=START, run=RUN, by="Dr. Weiß", reason="No."),
        "approval",
        "none can be revoked",
    ),
    "a start with old randomness": (
        [Started(process="7e" * 16, software="confide 0")],
        Started(process="7e" * 16, software="confide 1"),
        "ledger",
        "its randomness is not fresh",
    ),
    "a recovery by an old id": ([RECOVERED], RECOVERED, "ledger", "the id of an earlier one"),
    "another plan": ([], reserve(plan=START), "approval", "Too few approvals"),
    "another run": ([], reserve(run="b"), "approval", "Too few approvals"),
    "unknown data": ([], reserve(data="b"), "data", "'b' is not registered"),
    "more sampling": ([], reserve(sampling_rate=0.2), "approval", "A changed plan needs a new approval"),
    "less noise": ([], reserve(noise_multiplier=1.9), "approval", "A changed plan"),
    "more noise": ([], reserve(noise_multiplier=2.1), "approval", "A changed plan"),
    "less clipping": ([], reserve(clip_norm=2.0), "approval", "A changed plan"),
    "more steps": ([], reserve(steps=5), "approval", "A changed plan"),
    "another divisor": ([], reserve(divisor=119.0), "approval", "A changed plan"),
    "weak noise": ([policy(words=())], reserve(noise=SEEDED), "noise", "words do not allow it"),
    "a sum that hides nothing": ([], reserve(roster=PLAIN_SUM), "federation", "hides no site's vector"),
    "a round too many": ([], reserve(41), "rounds", "the plan has 40 rounds"),
    "a round again": ([reserve(1)], reserve(1), "rounds", "after round 1"),
    "a round again after its refund": (
        [reserve(1), Refund(run=RUN, round=1, steps=4)],
        reserve(1),
        "rounds",
        "after round 1",
    ),
    "a round before": ([reserve(3)], reserve(2), "rounds", "after round 3"),
    "a seeded round with another start": (
        [reserve(1, noise=SEEDED)],
        reserve(1, noise=SEEDED, start=PLAN),
        "rounds",
        "trained once",
    ),
    "other accounts": ([account(2)], reserve(accounts=("2",)), "budget", "is charged to (1)"),
    "accounts of nobody": ([account(2)], reserve(accounts=("1", "2")), "budget", "is charged to (1)"),
    "sums for other accounts": ([], reserve(spent=(1.0, 2.0)), "budget", "each has its sum"),
    "a sum too small": ([], reserve(spent=(0.01,)), "budget", "never counted for less than it is"),
    "a sum beyond the room": ([], reserve(spent=(9.9,)), "budget", "never counted for less"),
    "a spend beyond the budget": (
        [approval(steps_per_round=4000)],
        reserve(steps=4000),
        "budget",
        "The account 1, in its period 1, is not enough. Round 1 would cost",
    ),
    "a spend beyond the budget of a policy that became narrower": (
        [reserve(1), policy(epsilon=1.83)],
        reserve(2),
        "budget",
        "of the budget 1.83 at delta = 1e-05 only",
    ),
    "a spend at a delta that became narrower": (
        [reserve(1), policy(epsilon=2.27, delta=1e-6)],
        reserve(2),
        "budget",
        "of the budget 2.27 at delta = 1e-06 only",
    ),
    "a spend where a narrower policy leaves no room": ([policy(epsilon=0.5)], reserve(1), "budget", "only 0 is left"),
    "a spend without noise": (
        [approval(noise_multiplier=1e-300)],
        reserve(noise_multiplier=1e-300),
        "budget",
        "would cost inf",
    ),
    "a bind of nothing": ([], bind(1), "ledger", "never reserved"),
    "a bind after a bind": ([reserve(1), bind(1)], bind(1, "33"), "ledger", "it is bound, and must be reserved"),
    "a bind after a commit": ([*a_round(1)], bind(1, "33"), "ledger", "it is committed"),
    "a bind after a forfeit": (
        [reserve(1), Forfeit(run=RUN, round=1, reason="x")],
        bind(1),
        "ledger",
        "it is forfeited",
    ),
    "a bind after a refund": ([reserve(1), Refund(run=RUN, round=1, steps=1)], bind(1), "ledger", "it is refunded"),
    "a mask of nothing": ([], mask(1), "ledger", "never reserved"),
    "a mask before a bind": ([reserve(1)], mask(1), "ledger", "must be bound"),
    "a mask for an attempt again": ([reserve(1), bind(1), mask(1, 2)], mask(1, 2), "ledger", "attempts do not go back"),
    "a mask for an attempt before": (
        [reserve(1), bind(1), mask(1, 2)],
        mask(1, 1),
        "ledger",
        "attempts do not go back",
    ),
    "a mask after a commit": ([*a_round(1)], mask(1, 9), "ledger", "it is committed"),
    "a commit of nothing": ([], commit(1), "ledger", "never reserved"),
    "a commit before a bind": ([reserve(1)], commit(1), "ledger", "must be bound"),
    "a commit again": ([*a_round(1)], commit(1), "ledger", "it is committed"),
    "a forfeit of nothing": ([], Forfeit(run=RUN, round=1, reason="x"), "ledger", "never reserved"),
    "a forfeit after a bind": ([reserve(1), bind(1)], Forfeit(run=RUN, round=1, reason="x"), "ledger", "it is bound"),
    "a refund of nothing": ([], Refund(run=RUN, round=1, steps=1), "ledger", "never reserved"),
    "a refund after a bind": ([reserve(1), bind(1)], Refund(run=RUN, round=1, steps=1), "ledger", "it is bound"),
    "a refund of more than all": ([reserve(1)], Refund(run=RUN, round=1, steps=5), "ledger", "it has 4"),
    "a second refund": (
        [reserve(1), Refund(run=RUN, round=1, steps=1)],
        Refund(run=RUN, round=1, steps=1),
        "ledger",
        "it is refunded",
    ),
    "a release of unknown data": (
        [],
        Release(data="b", what="labels", noise_multiplier=50.0),
        "data",
        "'b' is not registered",
    ),
    "a release beyond the budget": (
        [policy(release_noise=0.1)],
        Release(data=DATA, what="labels", noise_multiplier=0.1),
        "budget",
        "The account 1, in its period 1, is not enough",
    ),
    "a release with less noise than the policy's": (
        [],
        Release(data=DATA, what="labels", noise_multiplier=0.9),
        "noise",
        "a noise multiplier of 0.9; the policy's rule is at least 1",
    ),
    "a release where the policy has none": (
        [policy(release_noise=0.0)],
        Release(data=DATA, what="labels", noise_multiplier=50.0),
        "noise",
        "that none is released",
    ),
    "rows of an earlier version": (
        [data_set(version=2, event="withdraw")],
        reserve(version=1),
        "data",
        "it is at version 2, from which somebody may have withdrawn",
    ),
    "rows of a version to come": ([], reserve(version=2), "data", "it is at version 1"),
    "an approval for longer than the policy allows": (
        [policy(most_days=30)],
        approval(nonce="8c" * 16),
        "approval",
        "the policy allows 30 days",
    ),
    "a sum in a federation without a roster on record": (
        [policy(), approval(run="b", federation="Heart 2030")],
        reserve(run="b"),
        "federation",
        "the newest on record of 'Heart 2030' is none",
    ),
    "a sum under an older roster": (
        [approval(run="b", federation="Heart 2030"), federation(), federation(epoch=2, roster=START)],
        reserve(run="b"),
        "federation",
        "Join with the newest roster",
    ),
    "a release that tells too little": (
        [],
        Release(data=DATA, what="labels", noise_multiplier=2.0, accounts=("1",), spent=(1e-9,)),
        "budget",
        "never counted for less",
    ),
    "a renewal of nothing": ([], renewal(account="2"), "budget", "it is not open"),
    "a renewal too early": ([], renewal(), "budget", "not before 2027-11-23T02:40:02Z"),
    "a renewal of a period left out": ([], renewal(3), "budget", "it is in period 1"),
    "a renewal that no policy allows": ([policy(renewal_days=0)], renewal(), "budget", "the policy allows 0"),
    "a renewal too many": ([policy(most_renewals=0)], renewal(), "budget", "the policy allows 0"),
    "a rotation to the same key": ([], Rotation.between(LEDGER, SITE, SITE), "ledger", "make a new one"),
    "a rotation by another key": ([], Rotation.between(LEDGER, STRANGER, STEWARD), "ledger", "by its old key"),
    "a rotation for another ledger": ([], Rotation.between("1" * 32, SITE, STRANGER), "ledger", "by its old key"),
    "a rotation the new key did not sign": (
        [],
        dataclasses.replace(
            Rotation.between(LEDGER, SITE, STRANGER), by_new=Rotation.between(LEDGER, SITE, STRANGER).by_old
        ),
        "ledger",
        "by its new key",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_rule_forbids_is_refused_by_name_and_changes_nothing(what: str) -> None:
    before, entry, rule, words = REFUSED[what]
    book = after(*before)
    was = state(book)

    for ask in (book.check, book.record):
        with pytest.raises(Refused) as caught:
            ask(entry, LATER)
        assert caught.value.rule == rule
        assert words in str(caught.value)

    assert state(book) == was


@pytest.mark.parametrize("what", REFUSED)
def test_verify_finds_a_record_that_should_not_have_been_let_in(what: str) -> None:
    before, entry, _, words = REFUSED[what]
    book, lines = written([*beginning(), *before])
    if isinstance(entry, Reserve | Release) and not entry.accounts:
        entry = dataclasses.replace(entry, accounts=("1",), spent=entry.spent or (5.0,))
    forged = encode(entry, book.size + 1, book.head, LATER)

    with pytest.raises(
        LedgerError, match=f"Record {book.size + 1} of the ledger, of kind {entry.kind}, should not have been let in"
    ) as caught:
        verify([*lines, forged])

    assert words in str(caught.value) or "never counted for less" in str(caught.value)


def test_nothing_is_allowed_before_a_genesis_and_before_a_policy() -> None:
    for entry in beginning()[1:]:
        with pytest.raises(Refused, match="A ledger begins with a genesis"):
            Book().record(entry, NOW)
    for entry in (account(), approval(), reserve()):
        with pytest.raises(Refused, match=r"No policy is in force|is not registered"):
            written([genesis()])[0].record(entry, NOW)


def test_the_record_of_a_spend_that_leaves_its_sums_open_is_not_taken_in() -> None:
    book, lines = written(beginning())

    forged = encode(reserve(), book.size + 1, book.head, LATER)

    with pytest.raises(LedgerError, match="each has its sum"):
        verify([*lines, forged])


def test_asking_changes_nothing_and_recording_what_was_allowed_succeeds() -> None:
    book = after()
    was = state(book)

    book.check(reserve(), LATER)

    assert state(book) == was
    book.record(reserve(), LATER)
    assert book.rounds(RUN)[1].state == RESERVED


def test_what_was_tried_together_is_taken_back_together() -> None:
    book = after()
    was = state(book)

    def together() -> None:
        with book.trial():
            for entry in (*a_round(1), Rotation.between(LEDGER, SITE, STRANGER), RECOVERED, policy(words=()), bind(2)):
                book.record(entry, LATER)

    with pytest.raises(Refused, match="never reserved"):
        together()

    assert state(book) == was
    book.record(reserve(), LATER)


@pytest.mark.parametrize("recast", [{"person_id": "visit"}, {"ids": "visits of St. Anna"}])
def test_a_table_in_which_others_are_the_persons_must_be_approved_anew(recast: dict[str, str]) -> None:
    book, _ = written([*beginning(), data_set(version=2, event="change"), reserve(1, version=2)])

    book.record(data_set(version=3, event="change", **recast), LATER)

    with pytest.raises(Refused, match="Too few approvals"):
        book.check(reserve(2, version=3), LATER)


def test_a_wider_policy_gives_an_account_no_more_than_it_was_opened_with() -> None:
    book, _ = written([*beginning(), policy(epsilon=2.5)])
    narrow = book.gate("1")

    book.record(policy(epsilon=50.0, delta=1e-4), LATER)

    assert (narrow.epsilon, book.gate("1").epsilon, book.gate("1").delta) == (2.5, 10.0, 1e-5)


def test_a_second_person_must_agree_where_the_policy_asks_for_two() -> None:
    two: list[Entry] = [policy(approvals_needed=2), approval()]

    book = after(*two)
    with pytest.raises(Refused, match="the policy needs 2"):
        book.check(reserve(), LATER)
    for again in (approval(), approval(SECOND, rounds=39), approval(SECOND, run="b"), approval(SECOND, plan=START)):
        with pytest.raises(Refused, match="the policy needs 2"):
            after(*two, again).check(reserve(), LATER)

    after(*two, approval(SECOND, by="Dr. Weiß", expires="2026-12-24T00:00:00Z")).check(reserve(), LATER)


def test_an_approval_ends_when_it_expires() -> None:
    book = after()

    book.check(reserve(), utc_seconds(EXPIRES) - 1)
    with pytest.raises(Refused, match="Too few approvals"):
        book.check(reserve(), utc_seconds(EXPIRES))


def test_a_revocation_ends_all_approvals_of_a_run_and_a_new_one_is_needed() -> None:
    revoked = Revocation(plan=PLAN, run=RUN, by="Dr. Weiß", reason="The board withdrew.")
    book = after(reserve(1), approval(SECOND), revoked)

    with pytest.raises(Refused, match="Too few approvals"):
        book.check(reserve(2), LATER)
    with pytest.raises(Refused, match="This approval was revoked") as caught:
        book.check(approval(), LATER)
    assert caught.value.rule == "approval"
    assert book.in_force(PLAN, RUN, DATA, LATER) is None
    book.check(bind(1), LATER)  # the round that was begun may end

    book.record(approval(nonce="8c" * 16), LATER)
    book.check(reserve(2), LATER)


def test_a_stricter_policy_ends_what_it_no_longer_allows() -> None:
    for change in (
        {"plan_epsilon": 7.0},
        {"plan_delta": 1e-6},
        {"approvers": (SECOND.public.hex(),)},
        {"approvals_needed": 2},
    ):
        with pytest.raises(Refused, match="Too few approvals"):
            after(policy(**change)).check(reserve(), LATER)


def test_the_newest_approval_in_force_says_what_may_be_trained() -> None:
    book = after(approval(SECOND, divisor=130.0, expires="2026-12-24T00:00:00Z"))

    book.check(reserve(divisor=130.0), LATER)
    with pytest.raises(Refused, match="A changed plan needs a new approval"):
        book.check(reserve(), LATER)
    book.check(reserve(), utc_seconds("2026-12-24T00:00:00Z"))


def test_a_spend_must_fit_in_every_account_of_its_data_set_and_counts_in_each() -> None:
    small = account(2, epsilon=2.5)
    both = data_set(version=2, event="change", accounts=("1", "2"))
    book = after(reserve(1), small, both, reserve(2, version=2))

    first, second = (book.accounts[name].filter for name in ("1", "2"))
    assert first.spent == book.rounds(RUN)[2].reserve.spent[0] > second.spent == book.rounds(RUN)[2].reserve.spent[1]
    assert book.charged("1") == book.spends(RUN)
    assert book.charged("2") == book.spends(RUN)[1:]
    number = 3
    while book.accounts["2"].left > book.rounds(RUN)[2].reserve.spent[1]:
        book.record(reserve(number, version=2), LATER)
        number += 1
    with pytest.raises(Refused, match="The account 2, in its period 1, is not enough"):
        book.record(reserve(number, version=2), LATER)
    assert first.epsilon > book.accounts["1"].used < 10


def test_a_removed_data_set_is_not_trained_on_and_its_account_stays_as_it_was() -> None:
    removed = data_set(version=2, event="remove")
    book = after(reserve(1), removed)

    for entry in (reserve(2), Release(data=DATA, what="labels", noise_multiplier=50.0), approval(run="b")):
        with pytest.raises(Refused, match="'patients' is not registered"):
            book.check(entry, LATER)
    assert book.accounts["1"].used > 1
    book.check(bind(1), LATER)  # the round that was begun may end


def test_a_table_that_comes_under_a_removed_ones_name_must_be_approved_anew() -> None:
    book = after(
        approval(SECOND), data_set(data="others"), approval(data="others"), data_set(version=2, event="remove")
    )
    book.record(data_set(version=3, fingerprint="9b" * 32), LATER)

    assert [(standing.approval.data, standing.revoked) for standing in book.approvals] == [
        (DATA, True),
        (DATA, True),
        ("others", False),
    ]
    assert book.in_force(PLAN, RUN, DATA, LATER) is None
    with pytest.raises(Refused, match="Too few approvals"):
        book.check(reserve(), LATER)
    with pytest.raises(Refused, match="This approval was revoked"):
        book.check(approval(), LATER)
    book.check(reserve(data="others"), LATER)

    book.record(approval(nonce="8c" * 16), LATER)
    book.check(reserve(version=3), LATER)


@pytest.mark.parametrize("event", ["change", "withdraw"])
def test_another_version_of_a_data_set_is_still_approved(event: str) -> None:
    after(data_set(version=2, event=event)).check(reserve(version=2), LATER)


def test_a_sum_that_hides_nothing_is_reserved_for_only_where_the_policy_has_its_word() -> None:
    book = after(policy(words=(PLAIN_SUM,)))

    book.check(reserve(roster=PLAIN_SUM), LATER)
    with pytest.raises(Refused, match="'insecure_plain_sum_too', which hides no site's vector"):
        book.check(reserve(roster="insecure_plain_sum_too"), LATER)


def test_charges_are_counted_once_whatever_became_of_them() -> None:
    book = after(
        *a_round(1),
        reserve(2),
        Refund(run=RUN, round=2, steps=4),
        reserve(4),
        Forfeit(run=RUN, round=4, reason="Killed."),
        Release(data=DATA, what="labels", noise_multiplier=50.0),
        Started(process="7e" * 16, software="confide 0"),
        reserve(5),
        RECOVERED,
    )

    assert book.charges == 5
    assert [after(*entries).charges for entries in ([], [reserve(1)], [reserve(1), bind(1)])] == [0, 1, 1]


def test_a_release_counts_as_one_step_on_everybody() -> None:
    released = Release(data=DATA, what="label histogram", noise_multiplier=50.0)
    book = after(released)

    exact = renyi_divergence(1.0, 50.0)[RDP_ORDERS.index(6)]
    assert book.accounts["1"].filter.spent == math.nextafter(exact, math.inf)
    assert book.releases == (dataclasses.replace(released, accounts=("1",), spent=(math.nextafter(exact, math.inf),)),)
    assert book.charged("1") == (released.spend(),)
    assert released.spend().sampling_rate == 1.0


def test_steps_that_touched_no_data_are_given_back_and_no_more() -> None:
    whole = after(reserve(1), reserve(2))
    book = after(reserve(1), reserve(2), Refund(run=RUN, round=2, steps=3))

    one = renyi_divergence(0.1, 2.0)[RDP_ORDERS.index(6)]
    assert book.rounds(RUN)[2].state == REFUNDED
    assert [spend.steps for spend in book.spends(RUN)] == [4, 1]
    given_back = whole.accounts["1"].filter.spent - book.accounts["1"].filter.spent
    assert given_back == pytest.approx(3 * one)
    assert Fraction(book.accounts["1"].filter.spent) >= 5 * Fraction(float(one))


def test_a_round_given_back_as_a_whole_is_among_no_spends() -> None:
    book = after(reserve(1), Refund(run=RUN, round=1, steps=4), reserve(2), Forfeit(run=RUN, round=2, reason="Killed."))

    assert [spend.round for spend in book.spends(RUN)] == [2]
    assert book.rounds(RUN)[1].spend is None
    assert book.rounds(RUN)[2].state == FORFEITED
    assert book.charged("1") == (reserve(2).spend(),)


def test_a_seeded_round_may_be_gone_through_again_and_no_other() -> None:
    seeded = reserve(1, noise=SEEDED)
    book = after(seeded, bind(1), mask(1, 3), commit(1))

    for entry in (
        bind(1, "33"),
        mask(1, 1),
        commit(1),
        bind(1),
        mask(1, 1),
        mask(1, 1),
        commit(1),
        commit(1),
        mask(1, 0),
    ):
        book.record(entry, LATER)

    assert book.repeats(seeded)
    assert not book.repeats(reserve(1, noise=SEEDED, start=PLAN))
    assert not book.repeats(reserve(2, noise=SEEDED))
    assert not after(reserve(1)).repeats(reserve(1))
    assert not after(seeded, Forfeit(run=RUN, round=1, reason="x")).repeats(seeded)
    assert book.rounds(RUN)[1].commitment == bind(1).commitment
    assert len(book.spends(RUN)) == 1


def test_a_renewal_begins_a_period_with_the_whole_budget_and_the_total_stays_visible() -> None:
    book = after(reserve(1))
    year = NOW + 2 + 365 * DAY_S
    used = book.accounts["1"].used

    with pytest.raises(Refused, match="not before"):
        book.check(renewal(), year - 1)
    for entry, words in (
        (renewal(approver=STRANGER), "none of the policy's approvers"),
        (dataclasses.replace(renewal(), reason="Because."), "is not signed by the key"),
        (renewal(ledger="1" * 32), "is for the ledger"),
        (renewal(recovery=RECOVERY), "What was signed before a loss"),
    ):
        with pytest.raises(Refused, match=words) as caught:
            book.check(entry, year)
        assert caught.value.rule == "budget"
    book.record(renewal(), year)

    renewed = book.accounts["1"]
    assert (renewed.period, renewed.began, renewed.used, renewed.filter.order) == (2, year, 0.0, 6)
    assert [earlier.used for earlier in renewed.closed] == [used]
    assert renewed.total == pytest.approx(used)
    book.record(approval(expires="2029-01-01T00:00:00Z"), year)
    book.record(reserve(2), year)
    assert book.accounts["1"].total > used > 1
    assert [len(book.charged("1", period)) for period in (1, 2, None)] == [1, 1, 2]
    with pytest.raises(Refused, match="not before"):
        book.check(renewal(3), year + 1)
    book.record(renewal(3), year + 365 * DAY_S)
    with pytest.raises(Refused, match="was renewed 2 times; the policy allows 2"):
        book.check(renewal(4), year + 3 * 365 * DAY_S)


def test_what_is_given_back_after_a_renewal_is_not_given_to_the_new_period() -> None:
    year = NOW + 366 * DAY_S
    book = after(reserve(1))
    closed = book.accounts["1"].filter
    book.record(renewal(), year)

    book.record(Refund(run=RUN, round=1, steps=4), year)

    assert book.accounts["1"].filter.spent == 0
    assert book.accounts["1"].closed == (closed,)


def test_a_ledger_that_was_lost_counts_as_fully_spent_until_renewed() -> None:
    book = after(reserve(1), reserve(2), bind(2), RECOVERED)

    lost = book.accounts["1"]
    assert (book.recoveries, lost.left, lost.incomplete) == (1, 0.0, True)
    assert lost.used >= 10
    assert {number: known.state for number, known in book.rounds(RUN).items()} == {1: CLOSED, 2: CLOSED}
    assert book.in_force(PLAN, RUN, DATA, LATER) is None
    assert book.lost_data_sets == {DATA}
    forbidden: list[tuple[Entry, str]] = [
        (reserve(3), "was lost with the ledger and must be registered again"),
        (Refund(run=RUN, round=1, steps=4), "it is closed"),
        (bind(1), "it is closed"),
        (mask(2), "it is closed"),
        (approval(recovery=RECOVERY, run="b"), "was lost with the ledger"),
        (renewal(), "What was signed before a loss"),
    ]
    for entry, words in forbidden:
        with pytest.raises(Refused, match=words):
            book.check(entry, LATER + 366 * DAY_S)

    book.record(account(2), LATER)
    for again in (
        data_set(version=2, accounts=("1", "2")),
        approval(recovery=RECOVERY, expires="2029-01-01T00:00:00Z", run="b"),
    ):
        book.record(again, LATER)
    later: dict[str, Any] = {"run": "b", "version": 2}
    tiny = Release(data=DATA, what="labels", noise_multiplier=1e6)
    for number, at in (("1", LATER), ("2", LATER + 365 * DAY_S)):
        assert book.accounts[number].left == 0
        for spending in (reserve(3, **later), tiny):
            with pytest.raises(Refused, match=f"The account {number}, in its period 1, is not enough"):
                book.check(spending, at)
        book.record(renewal(recovery=RECOVERY, account=number), LATER + 365 * DAY_S)
    book.record(reserve(3, **later), LATER + 365 * DAY_S)
    assert book.accounts["1"].total > 10
    assert book.accounts["2"].incomplete


def test_a_run_that_a_lost_ledger_knew_is_not_gone_on_with_under_its_name() -> None:
    again = data_set(version=2)
    book = after(reserve(1), approval(run="only approved", nonce="8c" * 16), RECOVERED, again)

    for run in (RUN, "only approved"):
        with pytest.raises(Refused, match="Ask its coordinator to sign the plan for another run") as caught:
            book.check(approval(recovery=RECOVERY, run=run), LATER)
        assert caught.value.rule == "approval"

    book.check(approval(recovery=RECOVERY, run="another"), LATER)


def test_after_a_recovery_an_account_is_renewed_no_sooner_than_if_its_period_began_then() -> None:
    book = after(reserve(1))
    lost = NOW + 366 * DAY_S
    book.record(RECOVERED, lost)

    with pytest.raises(Refused, match="may be renewed 365 days after its period began"):
        book.check(renewal(recovery=RECOVERY), lost + 365 * DAY_S - 1)

    book.check(renewal(recovery=RECOVERY), lost + 365 * DAY_S)


def test_what_was_signed_after_one_recovery_does_not_count_after_another_of_the_same_copy() -> None:
    entries: list[Entry] = [genesis(), policy(), account(), data_set()]
    signed = approval(recovery=RECOVERY, expires="2029-01-01T00:00:00Z"), renewal(recovery=RECOVERY)
    again = data_set(version=2)
    first, _ = written([*entries, RECOVERED, again])
    second, _ = written([*entries, dataclasses.replace(RECOVERED, recovery="8f" * 16), again])
    year = NOW + 366 * DAY_S

    for entry in signed:
        first.check(entry, year)

    for entry in signed:
        with pytest.raises(
            Refused, match=r"signed after the recovery 4a4a4a4a…, and .* on after the recovery 8f8f8f8f…"
        ):
            second.check(entry, year)


def test_a_new_ledger_for_a_lost_one_gives_no_budget_that_was_not_renewed() -> None:
    entries: list[Entry] = [genesis(), RECOVERED, policy(), account(), data_set(), approval(recovery=RECOVERY)]
    book, lines = written(entries)

    with pytest.raises(Refused, match="is not enough"):
        book.check(reserve(), LATER)
    book.record(renewal(recovery=RECOVERY), NOW + 366 * DAY_S)

    assert book.accounts["1"].period == 2
    assert verify(lines).accounts["1"].left == 0


def test_checkpoints_are_signed_by_the_key_that_the_last_rotation_names() -> None:
    book, lines = written(
        [*beginning(), Rotation.between(LEDGER, SITE, STRANGER), Rotation.between(LEDGER, STRANGER, SECOND)]
    )

    verify(lines, signed(book, SECOND))
    for earlier in (SITE, STRANGER):
        with pytest.raises(LedgerError, match="The checkpoint at record 7 is not signed by the ledger's key"):
            verify(lines, signed(book, earlier))


def test_time_in_a_ledger_does_not_go_back() -> None:
    book, lines = written(beginning())

    for ask in (book.check, book.record):
        with pytest.raises(LedgerError, match="is before that of the last record"):
            ask(reserve(), book.at - 1)
    forged = encode(policy(), book.size + 1, book.head, book.at - 1)
    with pytest.raises(
        LedgerError, match="At record 6 of the ledger time goes back, from 2026-11-23T02:40:04Z to 2026-11-23T02:40:03Z"
    ):
        verify([*lines, forged])
    book.record(reserve(), book.at)


# What may happen, as (kind, number): a round of fewer steps than reserved, a release, a renewal, a recovery.
HAPPENINGS = strategies.lists(
    strategies.one_of(
        strategies.tuples(strategies.just("round"), strategies.integers(0, 4)),
        strategies.tuples(strategies.just("trained, given back"), strategies.integers(0, 4)),
        strategies.tuples(strategies.just("release"), strategies.integers(1, 60)),
        strategies.tuples(strategies.just("renew"), strategies.integers(0, 400)),
        strategies.tuples(strategies.just("recover"), strategies.just(0)),
    ),
    max_size=25,
)


@settings(max_examples=60)
@given(HAPPENINGS, strategies.sampled_from([1.0, 2.0, 5.0]), strategies.sampled_from([0.7, 2.0, 40.0]))
def test_ledger_epsilon_is_never_below_true_epsilon(
    happenings: list[tuple[str, int]], epsilon: float, noise: float
) -> None:
    """What is spent in a period is compared with the exact sum of what was truly done to rows in it, as fractions."""
    entries: list[Entry] = [
        genesis(),
        policy(epsilon=epsilon, most_renewals=9),
        account(epsilon=epsilon, order=16),
        data_set(),
    ]
    entries.append(approval(noise_multiplier=noise, rounds=100, expires="2999-01-01T00:00:00Z"))
    book, lines = written(entries)
    at, truth, open_budget, run, version = LATER, Fraction(0), True, RUN, 1
    for number, (kind, amount) in enumerate(happenings, start=1):
        before = book.accounts["1"].filter.spent
        try:
            if kind == "release":
                lines.append(book.record(Release(data=DATA, what="labels", noise_multiplier=float(amount)), at))
                truth += Fraction(float(renyi_divergence(1.0, float(amount))[RDP_ORDERS.index(16)]))
            elif kind == "renew":
                at += amount * DAY_S
                period = book.accounts["1"].period + 1
                lines.append(book.record(renewal(period, recovery=book.recovery), at))
                truth, open_budget = Fraction(0), True
            elif kind == "recover":
                lines.append(book.record(dataclasses.replace(RECOVERED, recovery=f"{number:032x}"), at))
                open_budget, run, version = False, f"run {number}", version + 1
                again = approval(
                    run=run,
                    noise_multiplier=noise,
                    rounds=100,
                    recovery=book.recovery,
                    expires="2999-01-01T00:00:00Z",
                )
                lines += [book.record(entry, at) for entry in (data_set(version=version), again)]
            else:
                lines.append(book.record(reserve(number, run=run, version=version, noise_multiplier=noise), at))
                assert open_budget
                steps = amount if kind == "trained, given back" else 4
                truth += steps * Fraction(float(renyi_divergence(0.1, noise)[RDP_ORDERS.index(16)]))
                if steps < 4:
                    lines.append(book.record(Refund(run=run, round=number, steps=4 - steps), at))
                elif amount:
                    ended = (bind(number), mask(number), commit(number))
                    lines += [book.record(dataclasses.replace(entry, run=run), at) for entry in ended]
            if kind in {"release", "round"}:
                assert book.accounts["1"].filter.spent > before  # no spend is lost in rounding
        except Refused:
            assert book.accounts["1"].filter.spent == before

        spent = book.accounts["1"].filter
        assert Fraction(spent.spent) >= truth
        assert spent.used <= epsilon + 1e-12 or not open_budget

    assert state(verify(lines, signed(book))) == state(book)


@settings(max_examples=60)
@given(
    strategies.floats(allow_nan=True, allow_infinity=True, allow_subnormal=True),
    strategies.floats(allow_nan=True, allow_infinity=True, allow_subnormal=True),
    strategies.integers(-1, 10**10),
)
def test_a_spend_of_any_numbers_is_refused_or_raises_what_is_spent(rate: float, noise: float, steps: int) -> None:
    book = after()
    before = book.accounts["1"].filter.spent
    changes: dict[str, Any] = {"sampling_rate": rate, "noise_multiplier": noise}

    try:
        book.record(approval(**changes, steps_per_round=steps, run="any"), LATER)
        book.record(reserve(**changes, steps=steps, run="any"), LATER)
    except (Refused, LedgerError):
        assert book.accounts["1"].filter.spent == before
    else:
        assert before < book.accounts["1"].filter.spent <= book.accounts["1"].filter.room


@pytest.mark.parametrize(("rate", "noise"), [(sys.float_info.min, 1e300), (1e-12, 1e6), (1.0, 1e150)])
def test_the_smallest_spend_still_counts_beside_the_largest(rate: float, noise: float) -> None:
    changes: dict[str, Any] = {"sampling_rate": rate, "noise_multiplier": noise}
    book = after(
        *(reserve(number) for number in range(1, 20)), approval(**changes, steps_per_round=1, run="tiny", rounds=1000)
    )

    sums = [book.accounts["1"].filter.spent]
    for number in range(1, 200):
        book.record(reserve(number, **changes, steps=1, run="tiny"), LATER)
        sums.append(book.accounts["1"].filter.spent)

    assert all(low < high for low, high in itertools.pairwise(sums))


def test_a_larger_sum_than_is_computed_is_taken_as_told() -> None:
    book, lines = written([*beginning(), reserve(1, spent=(1.5,)), reserve(2)])

    assert book.accounts["1"].filter.spent > 1.5
    assert verify(lines, signed(book)).accounts["1"] == book.accounts["1"]


def test_a_machine_whose_logarithm_differs_in_the_last_digit_verifies_the_same_ledger() -> None:
    book, lines = written([*beginning(), reserve(1)])
    told = book.accounts["1"].filter.spent

    for other in (math.nextafter(told, 0), told * (1 + 1e-13)):
        line = encode(reserve(1, accounts=("1",), spent=(other,)), 6, f"sha256:{leaf_hash(lines[4]).hex()}", NOW + 5)
        again = verify([*lines[:5], line])
        assert again.accounts["1"].filter.spent == max(other, told)


def flipped(line: bytes, place: int, bit: int) -> bytes:
    return line[:place] + bytes([line[place] ^ (1 << bit)]) + line[place + 1 :]


SMALL = written([*beginning(), *a_round(1), reserve(2), Refund(run=RUN, round=2, steps=3)])


def test_a_byte_changed_anywhere_is_found_and_its_record_is_named() -> None:
    """Every byte of every record of a small ledger, one bit each."""
    book, lines = SMALL
    checkpoint = signed(book)
    generator = random.Random(5)
    before = [Book()]
    for line in lines:
        before.append(verify(lines[: before[-1].size + 1]))
        assert before[-1].last == decode(line).entry

    for number, line in enumerate(lines):
        for place in range(len(line)):
            changed = [*lines[:number], flipped(line, place, generator.randrange(8)), *lines[number + 1 :]]
            with pytest.raises(LedgerError) as caught:
                replay(before, number, changed, checkpoint)
            message = str(caught.value)
            assert any(f"ecord {named}" in message for named in (number + 1, number + 2)) or (
                number == len(lines) - 1 and "was forked" in message
            )


def replay(before: list[Book], number: int, lines: list[bytes], checkpoint: Checkpoint) -> None:
    """As `verify`, but from record `number` on, on what the ones before lead to."""
    book = before[number]
    if number == 0:
        verify(lines, checkpoint)
        return
    with book.trial():
        for line in lines[number:]:
            book.take(line)
        book.agree(checkpoint)
        raise UsageError("The change was not found.")


def test_changes_anywhere_in_a_larger_ledger_are_found() -> None:
    book, lines = written(many(50))
    checkpoint = signed(book)
    generator = random.Random(6)

    for _ in range(60):
        number = generator.randrange(len(lines))
        line = lines[number]
        changed = flipped(line, generator.randrange(len(line)), generator.randrange(8))
        with pytest.raises(
            LedgerError, match=rf"record ({number + 1}|{number + 2})\b|Record ({number + 1}|{number + 2})\b|was forked"
        ):
            verify([*lines[:number], changed, *lines[number + 1 :]], checkpoint)


TAMPERED: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "two records exchanged": (
        lambda lines: [*lines[:5], lines[6], lines[5], *lines[7:]],
        "Record 6 of the ledger says that it is number 7",
    ),
    "a record left out": (lambda lines: [*lines[:5], *lines[6:]], "Record 6 of the ledger says that it is number 7"),
    "a record repeated": (lambda lines: [*lines[:6], *lines[5:]], "Record 7 of the ledger says that it is number 6"),
    "the genesis left out": (lambda lines: lines[1:], "Record 1 of the ledger says that it is number 2"),
    "a record of another ledger": (
        lambda lines: [*lines[:6], encode(mask(1), 7, FIRST_PREV, NOW + 6), *lines[7:]],
        "chain is broken at record 7",
    ),
    "the end cut off": (
        lambda lines: lines[:-1],
        "has 10 records, and its checkpoint stands for 11: this is an older copy",
    ),
    "all but the beginning cut off": (lambda lines: lines[:5], "has 5 records, and its checkpoint stands for 11"),
    "everything cut off": (lambda _: [], "no record at all"),
    "a line break": (
        lambda lines: [*lines[:5], lines[5] + b"\n", *lines[6:]],
        "Record 6 of the ledger was changed or is damaged",
    ),
    "an empty record": (
        lambda lines: [*lines[:5], b"", *lines[5:]],
        "Record 6 of the ledger was changed or is damaged",
    ),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_tampering_is_found_and_named(what: str) -> None:
    change, words = TAMPERED[what]
    book, lines = SMALL

    with pytest.raises(LedgerError, match=words) as caught:
        verify(change(lines), signed(book))

    assert "confide site ledger recover" in str(caught.value)


def test_a_past_that_was_rewritten_as_a_whole_is_found_against_the_checkpoint() -> None:
    book, _ = SMALL
    forked, lines = written([*beginning(), *a_round(1), reserve(2), Refund(run=RUN, round=2, steps=4)])

    verify(lines)
    with pytest.raises(LedgerError, match="The ledger was forked: its 11 records have the root"):
        verify(lines, signed(book))
    longer = [*lines, forked.record(reserve(3), LATER)]
    with pytest.raises(LedgerError, match="The ledger was forked"):
        verify(longer, signed(book))


def test_an_earlier_checkpoint_holds_for_the_records_it_stands_for() -> None:
    book, lines = SMALL
    early = signed(verify(lines[:6]))

    assert verify(lines, early).size == book.size
    with pytest.raises(LedgerError, match="added without the site's signature"):
        book.agree(early)


def test_a_checkpoint_of_another_ledger_or_key_is_refused() -> None:
    book, lines = SMALL

    with pytest.raises(LedgerError, match="The checkpoint is of the ledger 1111"):
        verify(lines, Checkpoint.sign("1" * 32, book.size, book.root, book.charges, SITE))
    with pytest.raises(LedgerError, match="is not signed by the ledger's key"):
        verify(lines, signed(book, STRANGER))
    with pytest.raises(LedgerError, match="stands for 0"):
        verify(lines, Checkpoint.sign(LEDGER, 0, book.root, 0, SITE))
    for charges in (0, book.charges - 1, book.charges + 1):
        checkpoint = Checkpoint.sign(LEDGER, book.size, book.root, charges, SITE)
        with pytest.raises(LedgerError, match=f"11 records 2 charge an account, and its checkpoint says {charges}"):
            verify(lines, checkpoint)


def test_a_ledger_written_by_the_first_version_still_verifies_byte_for_byte() -> None:
    vector = json.loads(VECTOR.read_bytes())
    lines = [line.encode() for line in vector["lines"]]

    book = verify(lines, read_note(vector["note"], SITE.public))

    stamped = [decode(line) for line in lines]
    assert [encode(each.entry, each.seq, each.prev, each.at) for each in stamped] == lines
    assert (book.root.hex(), book.head) == (vector["root"], vector["head"])
    assert {each.entry.kind for each in stamped} == set(KINDS)
    assert book.accounts["1"].total == pytest.approx(vector["total_epsilon"], rel=1e-9)


def test_verifying_needs_no_torch_and_no_database() -> None:
    program = (
        "import sys; import confide.common.ledger; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'sqlite3', 'dp_accounting', 'scipy')))"
    )

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_spend_from_the_book_is_the_one_that_accountants_count() -> None:
    assert after(reserve(3)).spends(RUN) == (
        Spend(
            round=3,
            sampling_rate=0.1,
            noise_multiplier=2.0,
            steps=4,
            clip_norm=1.0,
            divisor=120.0,
            noise="cryptographic",
        ),
    )


def test_a_run_of_one_name_is_approved_in_one_federation_only() -> None:
    book = after(approval(run="b", federation="Heart 2030"))
    other = approval(run="b", federation="Lung 2031", plan="sha256:" + "9" * 64)

    with pytest.raises(Refused, match="must call its own differently") as refused:
        book.check(other, book.at)

    assert refused.value.rule == "approval"
    book.check(approval(federation="Lung 2031", run="lung-1", plan="sha256:" + "9" * 64), book.at)


def test_for_a_ledger_time_never_goes_back() -> None:
    book, _ = written(beginning())

    assert book.now(0.0) == book.at
    assert book.now(book.at + 5.5) == book.at + 5.5
