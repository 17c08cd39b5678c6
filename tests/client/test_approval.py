"""Approval: what was signed may run, and nothing that differs from it in anything."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given as given_that
from hypothesis import settings, strategies

from confide.client.approval import DAY_S, Terms, approve, check, given, in_words, needed, revoke, sentences
from confide.client.judgement import Price, Refusal, judge_plan, judge_price, starter_for
from confide.client.mechanism import Mechanism
from confide.client.policy import Policy, read_policy
from confide.client.terminal import spent
from confide.common import plan as plans
from confide.common.accounting import planned_cost
from confide.common.crypto import Identity
from confide.common.entries import AccountOpened, Approval, DataSet, Federation, Genesis, Reserve, utc_text
from confide.common.errors import LedgerError, Refused
from confide.common.filter import best_order
from confide.common.ledger import Book, Standing
from confide.common.messages import Failure
from confide.common.plan import Plan, read_plan

DIGEST = "sha256:" + "12345678" * 8
NOW = 1_795_435_200  # 23 November 2026, 12:00 UTC
LEDGER = "0123456789abcdef" * 2
PLAN = read_plan(plans.starter("heart", "tiny", DIGEST, ["query", "value"]).encode())
ANNA, BEN, EVE, SITE = (Identity(bytes([number]) * 32) for number in (1, 2, 3, 4))
NAMES = (f"Anna Huber {ANNA.public.hex()}", f"Ben Ito {BEN.public.hex()}")


def policy(signatures: int = 1, approvers: tuple[str, ...] = NAMES, **replaced: str) -> Policy:
    text = starter_for(PLAN, "St. Anna", ["heart-2030"], approvers)
    for old, new in ({"signatures = 1": f"signatures = {signatures}"} | replaced).items():
        text = text.replace(old, new)
    return read_policy(text.encode())


def wide(signatures: int = 1) -> Policy:
    """Return a policy under which a data set may lose epsilon 30 by all plans together."""
    narrow = policy(signatures)
    return dataclasses.replace(narrow, budget=dataclasses.replace(narrow.budget, epsilon=30.0))


def terms(**changes: Any) -> Terms:
    fields: dict[str, Any] = {
        "ledger": LEDGER,
        "recovery": "",
        "plan": PLAN,
        "run": "heart-1",
        "federation": "heart-2030",
        "data": "cardiology",
        "declared_persons": 2000,
    }
    return Terms(**fields | changes)


def signed(approver: Identity = ANNA, days: int = 30, now: float = NOW, **changes: Any) -> Approval:
    return approve(policy(), terms(**changes), (), approver=approver, now=now, days=days)


def changed(section: str, **values: Any) -> Plan:
    return dataclasses.replace(PLAN, **{section: dataclasses.replace(getattr(PLAN, section), **values)})


def test_an_approval_states_the_plans_mechanism_and_covers_it() -> None:
    approval = signed()

    assert approval.plan == PLAN.digest
    assert approval.by == "Anna Huber"
    assert approval.expires == utc_text(NOW + 30 * DAY_S)
    mechanism = Mechanism.of(PLAN.privacy, 2000)
    assert (approval.sampling_rate, approval.noise_multiplier, approval.clip_norm, approval.divisor) == (
        mechanism.sampling_rate,
        mechanism.noise_multiplier,
        mechanism.clip_norm,
        mechanism.divisor,
    )
    assert (approval.steps_per_round, approval.rounds) == (4, 10)
    check(approval, policy(), terms(), NOW)


OTHER_FIELDS: dict[str, Any] = {
    "ledger": "f" * 32,
    "recovery": "1" * 32,
    "plan": DIGEST,
    "name": "lung",
    "run": "heart-2",
    "federation": "heart-2031",
    "data": "oncology",
    "epsilon": 7.0,
    "delta": 1e-6,
    "sampling_rate": 0.2,
    "noise_multiplier": 0.1,
    "clip_norm": 2.0,
    "steps_per_round": 5,
    "rounds": 11,
    "divisor": 100.0,
    "by": "Ben Ito",
    "key": BEN.public.hex(),
    "expires": utc_text(NOW + 60 * DAY_S),
    "nonce": "1" * 32,
    "signature": "0" * 128,
}


def test_every_field_of_an_approval_is_tried_below() -> None:
    assert OTHER_FIELDS.keys() == {field.name for field in dataclasses.fields(Approval)}


@pytest.mark.parametrize("field", OTHER_FIELDS)
def test_an_approval_that_was_altered_in_any_field_covers_nothing(field: str) -> None:
    altered = dataclasses.replace(signed(), **{field: OTHER_FIELDS[field]})

    with pytest.raises(Refused, match="Have the plan approved again") as refused:
        check(altered, policy(), terms(), NOW)

    assert refused.value.rule == "approval"
    assert Failure.of(refused.value).sentence == "The site refused. It follows its rule on: approval."


@pytest.mark.parametrize("field", sorted(OTHER_FIELDS.keys() - {"by", "key", "expires", "nonce", "signature"}))
def test_terms_that_differ_are_told_with_both_values_even_if_the_signature_is_right(field: str) -> None:
    other = dataclasses.replace(signed(), **{field: OTHER_FIELDS[field]}).signed(ANNA)

    with pytest.raises(Refused) as refused:
        check(other, policy(), terms(), NOW)

    assert f"{field} is {OTHER_FIELDS[field]}, and would have to be {getattr(signed(), field)}" in str(refused.value)


CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "one round more": ("privacy", {"rounds": 11}),
    "a larger epsilon": ("privacy", {"epsilon": 9.0}),
    "another seed": ("adapter", {"seed": 1}),
    "another text column": ("data", {"text": "diagnosis"}),
    "other labels": ("task", {"labels": ("a", "b")}),
    "a smaller quorum": ("federation", {"min_sites": 4}),
    "another learning rate": ("training", {"learning_rate": 0.005}),
    "another base": ("model", {"base_digest": "sha256:" + "0" * 64}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_in_a_plan_is_covered_so_a_changed_one_needs_a_new_approval(change: str) -> None:
    section, values = CHANGES[change]
    other = terms(plan=changed(section, **values))

    with pytest.raises(Refused, match="plan is sha256:"):
        check(signed(), policy(), other, NOW)


def test_what_changes_speed_only_needs_no_new_approval() -> None:
    check(signed(), policy(), terms(plan=changed("compute", micro_batch=8)), NOW)


def test_the_mechanism_follows_from_what_is_beside_the_plan_too() -> None:
    with pytest.raises(Refused, match=r"divisor is 200\.0, and would have to be 190\.0"):
        check(signed(), policy(), terms(declared_persons=1900), NOW)


def test_who_is_no_approver_approves_nothing() -> None:
    with pytest.raises(Refused, match=r"may not approve; .* names Anna Huber, Ben Ito") as refused:
        approve(policy(), terms(), (), approver=EVE, now=NOW, days=30)
    with pytest.raises(Refused, match="names nobody"):
        approve(policy(approvers=()), terms(), (), approver=ANNA, now=NOW, days=30)

    assert refused.value.rule == "approval"


def test_nothing_is_signed_that_a_rule_refuses() -> None:
    refusal = Refusal(rule="rounds", sentence="Too many rounds.")

    with pytest.raises(Refused, match="Too many rounds") as refused:
        approve(policy(), terms(), [refusal], approver=ANNA, now=NOW, days=30)

    assert refused.value.rule == "rounds"


@pytest.mark.parametrize("days", [0, -1, 91, 10**9])
def test_an_approval_holds_for_some_days_and_no_more_than_the_policy_allows(days: int) -> None:
    with pytest.raises(Refused, match=f"for {days} days was asked for; .* allows 1 to 90"):
        signed(days=days)


def test_an_approval_ends_at_its_last_second() -> None:
    approval = signed(days=1, now=NOW + 0.9)

    check(approval, policy(), terms(), NOW + DAY_S - 1)
    with pytest.raises(Refused, match=f"holds until {approval.expires}"):
        check(approval, policy(), terms(), NOW + DAY_S)


def test_an_approval_beyond_the_longest_days_counts_for_nothing_though_it_is_signed() -> None:
    forever = dataclasses.replace(signed(), expires=utc_text(NOW + 3650 * DAY_S)).signed(ANNA)

    with pytest.raises(Refused, match="most_days allows 90 days"):
        check(forever, policy(), terms(), NOW)


def test_an_approver_whom_the_policy_no_longer_names_no_longer_counts() -> None:
    with pytest.raises(Refused, match="may not approve"):
        check(signed(), policy(approvers=NAMES[1:]), terms(), NOW)


def recorded(*approvals: Approval) -> list[Standing]:
    return [Standing(approval=approval) for approval in approvals]


def test_two_persons_must_approve_if_the_policy_says_so_and_one_person_twice_is_one() -> None:
    two = policy(signatures=2)
    once = given(recorded(signed(days=10), signed(days=30)), two, terms(), NOW)
    both = given(recorded(signed(), signed(BEN, days=20)), two, terms(), NOW)

    assert [approval.expires for approval in once] == [signed(days=30).expires]
    assert needed(two, once) == 1
    assert needed(two, both) == 0
    assert needed(policy(), once) == 0
    assert needed(two, ()) == 2
    assert needed(two, (signed(days=10), signed(days=30))) == 1


def test_who_approved_and_who_else_must_is_told_in_words() -> None:
    two = policy(signatures=2)
    anna, ben = signed(), signed(BEN, days=20)

    assert in_words(two, ()) == (
        "Approved by nobody; 2 more must approve: Anna Huber or Ben Ito. By the policy two persons must approve, each with "
        "a key of their own."
    )
    assert f"Approved by Anna Huber until {anna.expires}; 1 more must approve: Ben Ito." in in_words(two, [anna])
    assert in_words(two, [anna, ben]).endswith(f"It may run until {ben.expires}.")
    assert in_words(policy(), [anna, ben]).endswith(f"It may run until {anna.expires}.")
    assert "[approval] approvers must name first" in in_words(policy(approvers=()), ())


def test_what_was_revoked_has_expired_or_is_of_other_terms_is_not_given() -> None:
    worthless = [
        Standing(approval=signed(), revoked=True),
        *recorded(signed(days=1, now=NOW - DAY_S), signed(run="heart-2"), dataclasses.replace(signed(), rounds=99)),
    ]

    assert given(worthless, policy(), terms(), NOW) == ()


def test_a_revocation_needs_a_reason() -> None:
    revocation = revoke(PLAN.digest, "heart-1", by="Anna Huber", reason="A patient objected.")

    assert (revocation.plan, revocation.run) == (PLAN.digest, "heart-1")
    for reason in ("", " ", "\x1b[2J", "a" * 5000):
        with pytest.raises(LedgerError, match="reason"):
            revoke(PLAN.digest, "heart-1", by="Anna Huber", reason=reason)


def begun(found: Policy) -> Book:
    """Return a ledger with a data set that has one account."""
    book = Book()
    book.record(Genesis(ledger=LEDGER, site="St. Anna", key=SITE.public.hex(), software="test"), NOW)
    book.record(found.in_force(), NOW)
    budget = found.budget
    order = best_order(PLAN.privacy)
    book.record(AccountOpened(account="1", epsilon=budget.epsilon, delta=budget.delta, order=order), NOW)
    book.record(
        DataSet(
            data="cardiology",
            version=1,
            event="add",
            fingerprint="a" * 64,
            declared_persons=2000,
            person_id="",
            ids="",
            accounts=("1",),
            registered="b" * 64,
        ),
        NOW,
    )
    book.record(Federation(federation="heart-2030", epoch=1, roster=DIGEST, admins=()), NOW)
    return book


def price_in(book: Book, data: str = "cardiology") -> Price:
    return Price.of(PLAN.privacy, {name: book.accounts[name].filter for name in book.data_set(data).accounts})


def reserve(approval: Approval, number: int, run: str = "heart-1") -> Reserve:
    return Reserve(
        run=run,
        plan=approval.plan,
        data=approval.data,
        version=1,
        round=number,
        sampling_rate=approval.sampling_rate,
        noise_multiplier=approval.noise_multiplier,
        steps=approval.steps_per_round,
        clip_norm=approval.clip_norm,
        divisor=approval.divisor,
        noise="cryptographic",
        start=DIGEST,
        roster=DIGEST,
    )


def test_what_was_approved_runs_to_its_last_round_and_what_was_not_runs_in_no_ledger() -> None:
    book = begun(policy())
    judged = judge_plan(
        policy(),
        PLAN,
        base_digest=DIGEST,
        federation="heart-2030",
        sites_on_roster=3,
        declared_persons=2000,
        person_id="",
    )
    approval = approve(policy(), terms(), (*judged, *judge_price(price_in(book))), approver=ANNA, now=NOW, days=30)

    with pytest.raises(Refused, match="Too few approvals"):
        book.record(reserve(approval, 1), NOW)
    book.record(approval, NOW)
    for number in range(1, 11):
        book.record(reserve(approval, number), NOW)

    with pytest.raises(Refused, match="the plan has 10 rounds"):
        book.record(reserve(approval, 11), NOW)
    assert price_in(book).fits == 0
    assert [refusal.rule for refusal in judge_price(price_in(book))] == ["budget"]


def test_in_the_ledger_too_the_second_person_is_needed_and_a_revocation_ends_it() -> None:
    two = policy(signatures=2)
    book = begun(two)
    approval = approve(two, terms(), (), approver=ANNA, now=NOW, days=30)

    book.record(approval, NOW)
    with pytest.raises(Refused, match="Too few approvals"):
        book.record(reserve(approval, 1), NOW)
    book.record(approve(two, terms(), (), approver=BEN, now=NOW, days=20), NOW)
    book.record(reserve(approval, 1), NOW)
    assert needed(two, given(book.approvals, two, terms(), NOW)) == 0

    book.record(revoke(PLAN.digest, "heart-1", by="Anna Huber", reason="A patient objected."), NOW)
    with pytest.raises(Refused, match="Too few approvals"):
        book.record(reserve(approval, 2), NOW)
    assert given(book.approvals, two, terms(), NOW) == ()


@settings(max_examples=15)
@given_that(strategies.integers(0, 10))
def test_so_many_plans_as_the_price_says_the_ledger_lets_through_and_not_one_more(before: int) -> None:
    book = begun(wide())
    run_rounds(book, "past", before)
    promised = price_in(book).fits

    for number in range(promised):
        run_rounds(book, f"run-{number}", 10)

    with pytest.raises(Refused) as refused:
        run_rounds(book, "one more", 10)
    assert refused.value.rule == "budget"


def run_rounds(book: Book, run: str, rounds: int) -> None:
    approval = approve(wide(), terms(run=run), (), approver=ANNA, now=NOW, days=30)
    book.record(approval, NOW)
    for number in range(1, rounds + 1):
        book.record(reserve(approval, number, run), NOW)


def test_before_approving_one_reads_what_is_asked_what_it_costs_what_is_left_and_what_leaves() -> None:
    book = begun(wide(signatures=2))
    price = price_in(book)

    told = dict(sentences(wide(signatures=2), terms(), price, coordinator=EVE.public, expires=NOW + 30 * DAY_S))

    asked, cost, left = (" ".join(told[heading]) for heading in list(told)[:3])
    for words in (
        "'heart' may run at St. Anna on the data set 'cardiology', in the run 'heart-1' of the federation 'heart-2030'",
        PLAN.digest,
        EVE.public.hex(),
        "2000 persons",
        "divided by 200",
        "2026-12-23T12:00:00Z",
        "2 persons must approve",
    ):
        assert words in asked
    assert (
        f"epsilon = 8 at delta = 1e-05. As declared, 10 rounds cost {spent(planned_cost(PLAN.privacy).declared)}"
        in cost
    )
    assert f"charged {spent(price.adaptive)}" in cost
    assert "epsilon = 30 at delta = 1e-05. 0.000 is used now" in left
    assert f"{spent(price.accounts[0].after)} would be afterwards" in left
    assert f"{price.fits} such plans would fit" in left
    assert list(told)[:3] == ["What you are asked", "What it would cost", "What would be left"]
    assert {
        "What is trained",
        "On what",
        "What leaves a site",
        "What is guaranteed",
        "Who must take part",
    } <= told.keys()


def test_a_plan_that_does_not_fit_says_so_in_what_would_be_left() -> None:
    book = begun(policy())
    approval = signed()
    book.record(approval, NOW)
    book.record(reserve(approval, 1), NOW)

    told = dict(sentences(policy(), terms(), price_in(book), coordinator=EVE.public, expires=NOW + DAY_S))

    assert "The plan does not fit" in told["What would be left"][0]
    assert "One person's approval is enough." in told["What you are asked"]
