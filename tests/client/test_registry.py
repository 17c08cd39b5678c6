"""Data sets under the budgets of their persons: whose accounts are charged, what a version is, who is left out."""

import contextlib
import csv
import dataclasses
import itertools
import json
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies

from confide.client.home import replace_private
from confide.client.journal import Journal
from confide.client.persons import person_digest, read_persons
from confide.client.policy import LABEL_HISTOGRAM, Metrics
from confide.client.registry import Registry, read_identifiers
from confide.common.crypto import Identity
from confide.common.entries import Approval, PolicyInForce, Release, Reserve
from confide.common.errors import DataError, Refused, SealError, UsageError
from confide.common.filter import order_for
from confide.common.plan import Plan, read_plan, starter
from confide.common.spend import Spend

SITE, APPROVER = Identity(bytes(32)), Identity(bytes([1] * 32))
SECRET = bytes(range(32))
NOW = 1_800_000_000.0
SPEND = Spend(
    round=1, sampling_rate=0.1, noise_multiplier=2.0, steps=4, clip_norm=1.0, divisor=1.0, noise="cryptographic"
)


def new_journal(path: Path | None = None) -> Journal:
    journal = Journal.create(path, site="St. Anna", identity=SITE, clock=lambda: NOW)
    journal.append(
        PolicyInForce(
            digest="sha256:" + "0" * 64,
            epsilon=8.0,
            delta=1e-5,
            plan_epsilon=8.0,
            plan_delta=1e-5,
            approvals_needed=1,
            approvers=(APPROVER.public.hex(),),
            most_days=10**5,
            renewal_days=0,
            most_renewals=0,
            release_noise=0.1,
            words=(),
        )
    )
    return journal


@pytest.fixture
def journal() -> Journal:
    return new_journal()


@pytest.fixture
def registry(journal: Journal, tmp_path: Path) -> Registry:
    return Registry(tmp_path / "data", journal, SECRET)


def table(
    path: Path, persons: Iterable[str], text: str = "text", columns: Sequence[str] = ("patient", "text", "label")
) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        rows = [(person, f"{text} of {person}", "yes" if place % 2 else "no") for place, person in enumerate(persons)]
        csv.writer(stream).writerows([columns, *rows])
    return path


def named(*numbers: int) -> list[str]:
    return [f"p{number}" for number in numbers]


def plan_for(**data: Any) -> Plan:
    plan = read_plan(starter("test", "tiny", "sha256:" + "0" * 64, ["query"]).encode())
    return dataclasses.replace(
        plan,
        task=dataclasses.replace(plan.task, labels=("no", "yes")),
        data=dataclasses.replace(plan.data, **data),
        privacy=dataclasses.replace(plan.privacy, min_persons=2, sampling_rate=0.5),
    )


def approval(journal: Journal, data: str, divisor: float = 1.0) -> Approval:
    return Approval(
        ledger=journal.book.ledger,
        plan="sha256:" + "1" * 64,
        name="test",
        run="run-1",
        federation="",
        data=data,
        epsilon=8.0,
        delta=1e-5,
        sampling_rate=0.1,
        noise_multiplier=2.0,
        clip_norm=1.0,
        steps_per_round=4,
        rounds=3,
        divisor=divisor,
        by="Dr. Vogel",
        key=APPROVER.public.hex(),
        expires="2030-01-01T00:00:00Z",
        nonce="9d" * 16,
    ).signed(APPROVER)


def test_a_table_whose_persons_are_not_known_opens_an_account_with_the_policy_s_budget(
    registry: Registry, journal: Journal, tmp_path: Path
) -> None:
    data = registry.add("letters", table(tmp_path / "a.csv", named(1, 2, 3)), "patient", typical=SPEND)

    (account,) = journal.book.accounts.values()
    assert (data.version, data.event, data.declared_persons, data.person_id) == (1, "add", 3, "patient")
    assert data.accounts == (account.account,) == ("1",)
    assert (account.filter.epsilon, account.filter.delta) == (8.0, 1e-5)
    assert account.filter.order == order_for(8.0, 1e-5, SPEND)


def test_tables_that_share_nobody_have_budgets_of_their_own(registry: Registry, tmp_path: Path) -> None:
    first = registry.add("letters", table(tmp_path / "a.csv", named(1, 2)), "patient")
    second = registry.add("notes", table(tmp_path / "b.csv", named(3, 4)), "patient")

    assert (first.accounts, second.accounts) == (("1",), ("2",))


def test_one_person_in_common_makes_two_tables_share_a_budget_and_newcomers_join_it(
    registry: Registry, tmp_path: Path
) -> None:
    registry.add("letters", table(tmp_path / "a.csv", named(1, 2)), "patient")
    second = registry.add("notes", table(tmp_path / "b.csv", ["p3", " p2 "], "other"), "patient")
    third = registry.add("images", table(tmp_path / "c.csv", named(3, 5), "third"), "patient")

    assert second.accounts == ("1",)
    assert third.accounts == ("1",)  # p3 was new in the second table, and its account is hers from there on


def test_a_table_with_persons_of_two_accounts_charges_both(
    registry: Registry, journal: Journal, tmp_path: Path
) -> None:
    registry.add("letters", table(tmp_path / "a.csv", named(1, 2)), "patient")
    registry.add("notes", table(tmp_path / "b.csv", named(3, 4)), "patient")
    both = registry.add("merged", table(tmp_path / "c.csv", named(2, 3, 6), "new"), "patient")

    journal.append(Release(data="merged", what="label-histogram", noise_multiplier=20.0))

    assert both.accounts == ("1", "2")
    assert all(account.used > 0 for account in journal.book.accounts.values())
    assert registry.add("later", table(tmp_path / "d.csv", named(6, 7), "newest"), "patient").accounts == ("1",)


def test_what_was_spent_on_one_table_is_spent_on_every_table_of_its_persons(
    registry: Registry, journal: Journal, tmp_path: Path
) -> None:
    registry.add("letters", table(tmp_path / "a.csv", named(1, 2)), "patient")
    journal.append(Release(data="letters", what="label-histogram", noise_multiplier=0.8))

    registry.add("copies", table(tmp_path / "b.csv", named(2, 9), "other"), "patient")

    with pytest.raises(Refused) as caught:
        journal.append(Release(data="copies", what="label-histogram", noise_multiplier=0.8))
    assert caught.value.rule == "budget"


def test_a_removed_data_set_leaves_its_persons_in_their_account(registry: Registry, tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", named(1, 2))
    registry.add("letters", path, "patient")
    removed = registry.remove("letters")

    with pytest.raises(Refused, match="not registered"):
        registry.current("letters")
    again = registry.add("notes", path, "patient")
    back = registry.add("letters", path, "patient")

    assert (removed.version, removed.event) == (2, "remove")
    assert again.accounts == back.accounts == ("1",)
    assert (back.version, back.event) == (3, "add")


def test_a_changed_table_is_another_version_under_the_same_accounts(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    first = registry.add("letters", table(path, named(1, 2)), "patient")
    second = registry.add("letters", table(path, named(1, 2, 3)), "patient")
    third = registry.add("letters", table(path, named(7, 8)), "patient")  # nobody of them is left

    assert [(data.version, data.event) for data in (first, second, third)] == [(1, "add"), (2, "change"), (3, "change")]
    assert first.accounts == second.accounts == third.accounts == ("1",)
    assert len({first.fingerprint, second.fingerprint, third.fingerprint}) == 3


def test_an_unchanged_table_makes_no_version_and_may_lie_elsewhere(
    registry: Registry, journal: Journal, tmp_path: Path
) -> None:
    first = registry.add("letters", table(tmp_path / "a.csv", named(1, 2)), "patient")
    size = journal.book.size
    (tmp_path / "a.csv").rename(tmp_path / "moved.csv")

    again = registry.add("letters", tmp_path / "moved.csv", "patient")

    assert again == first
    assert journal.book.size == size
    assert registry.current("letters").path == tmp_path / "moved.csv"


def test_a_version_with_persons_of_another_account_charges_that_as_well(registry: Registry, tmp_path: Path) -> None:
    registry.add("letters", table(tmp_path / "a.csv", named(1, 2)), "patient")
    registry.add("notes", table(tmp_path / "b.csv", named(3)), "patient")

    changed = registry.add("notes", table(tmp_path / "b.csv", named(3, 1), "new"), "patient")

    assert changed.accounts == ("1", "2")


def test_the_same_table_without_its_column_of_persons_is_recognised(registry: Registry, tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", named(1, 2))
    by_person = registry.add("letters", path, "patient")

    by_row = registry.add("rows", path)
    by_label = registry.add("labels", path, "label")

    assert by_person.accounts == by_row.accounts == by_label.accounts == ("1",)


def test_equal_identifiers_of_another_namespace_are_other_persons(registry: Registry, tmp_path: Path) -> None:
    first = registry.add("letters", table(tmp_path / "a.csv", named(1, 2)), "patient", ids="patient-number")
    second = registry.add("invoices", table(tmp_path / "b.csv", named(1, 2)), "patient", ids="invoice-number")

    assert (first.accounts, second.accounts) == (("1",), ("2",))


def test_another_site_s_secret_recognises_nobody(registry: Registry, journal: Journal, tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", named(1, 2))
    first = registry.add("letters", path, "patient")

    another = read_persons(path, "patient", Registry(tmp_path / "data", journal, bytes(32)).person_key)

    assert first.fingerprint != another.fingerprint
    assert not journal.accounts_of(another.known_by())


TABLES = strategies.lists(strategies.frozensets(strategies.integers(0, 12), min_size=1), min_size=1, max_size=6)


@settings(max_examples=20)
@given(TABLES, strategies.lists(strategies.sampled_from(["a", "b", "c"]), min_size=6, max_size=6))
def test_every_person_s_account_is_charged_whatever_the_data_set_is_called(
    tmp_path_factory: pytest.TempPathFactory, tables: list[frozenset[int]], names: list[str]
) -> None:
    folder, journal = tmp_path_factory.mktemp("any"), new_journal()
    registry = Registry(folder / "data", journal, SECRET)
    charges: dict[int, set[frozenset[str]]] = {}

    for place, (persons, name) in enumerate(zip(tables, names, strict=False)):
        data = registry.add(name, table(folder / "t.csv", named(*persons), f"version {place}"), "patient")
        for person in persons:
            charges.setdefault(person, set()).add(frozenset(data.accounts))

    # One account is common to all that a person was ever in, so all of it together is bounded by that one.
    assert all(frozenset.intersection(*several) for several in charges.values())


def test_no_record_of_the_ledger_holds_a_number_of_rows_or_persons_an_identifier_or_a_path(
    registry: Registry, journal: Journal, tmp_path: Path
) -> None:
    path = table(tmp_path / "a.csv", named(*range(1357)))
    registry.add("letters", path, "patient")
    registry.withdraw("letters", ["p1", "p2", "unknown"])
    table(path, named(*range(1402)))
    registry.add("letters", path, "patient")
    registry.remove("letters")

    lines = journal.lines()
    records = [json.loads(line) for line in lines if json.loads(line)["kind"] == "data"]
    assert [record["event"] for record in records] == ["add", "withdraw", "change", "remove"]
    assert [record["declared_persons"] for record in records] == [1300, 1300, 1400, 1400]
    for record in records:
        assert record.keys() == {
            *("format", "seq", "prev", "at", "kind", "data", "version", "event", "fingerprint", "declared_persons"),
            *("person_id", "ids", "accounts", "registered"),
        }
    plain = re.sub(rb"[0-9a-f]{32,}", b"", b"\n".join(lines))  # a digest may hold any four digits
    assert not any(secret in plain for secret in (b"1357", b"1402", b"1355", b'"p1"', bytes(tmp_path.name, "utf-8")))
    assert person_digest(registry._person_key, "person", "p1").hex().encode() not in plain


def test_the_declared_number_is_the_steward_s_or_two_digits_of_the_count(registry: Registry, tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", named(*range(137)))

    assert registry.add("letters", path, "patient").declared_persons == 130
    assert registry.add("letters", path, "patient", declared=50).declared_persons == 50
    assert (
        registry.add("letters", path, "patient").declared_persons == 50
    )  # nothing changed, so nothing is declared anew
    for wrong in (0, -1, 140, 135):
        with pytest.raises(UsageError, match=f"{wrong} persons cannot be declared"):
            registry.add("letters", path, "patient", declared=wrong)


def test_a_version_does_not_raise_what_a_running_plan_was_approved_with(
    registry: Registry, journal: Journal, tmp_path: Path
) -> None:
    path = table(tmp_path / "a.csv", named(*range(20)))
    registry.add("letters", path, "patient")
    journal.append(approval(journal, "letters"))

    grown = registry.add("letters", table(path, named(*range(40))), "patient")
    with pytest.raises(UsageError, match="while a plan may run that was approved with 20"):
        registry.add("letters", path, "patient", declared=40)
    shrunk = registry.add("letters", table(path, named(*range(15))), "patient")

    assert (grown.declared_persons, shrunk.declared_persons) == (20, 10)


def test_a_table_that_changed_on_disk_is_refused_until_it_is_registered_again(
    registry: Registry, tmp_path: Path
) -> None:
    path = table(tmp_path / "a.csv", named(1, 2))
    registry.add("letters", path, "patient")
    assert registry.current("letters").left_out == frozenset()

    table(path, named(1, 2), "TEXT")

    with pytest.raises(
        Refused, match=r"not the one that was registered as version 1 .* confide site data add"
    ) as caught:
        registry.current("letters")
    assert caught.value.rule == "data"
    registry.add("letters", path, "patient")
    assert registry.current("letters").data.version == 2


def test_withdrawn_persons_are_left_out_and_stay_out_of_later_versions(registry: Registry, tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", named(1, 2, 3, 2))
    registry.add("letters", path, "patient")

    done = registry.withdraw("letters", [" p2 ", "p3"])

    assert (done.data.version, done.data.event, done.persons, done.unknown) == (2, "withdraw", 2, 0)
    assert registry.current("letters").left_out == {2, 3, 4}
    registry.remove("letters")
    table(path, named(1, 2, 5))
    registry.add("letters", path, "patient")
    assert registry.current("letters").left_out == {2}
    assert len(registry.excluded("letters")) == 2


def test_a_withdrawal_changes_no_account_and_not_what_is_declared(
    registry: Registry, journal: Journal, tmp_path: Path
) -> None:
    first = registry.add("letters", table(tmp_path / "a.csv", named(1, 2)), "patient")
    journal.append(Release(data="letters", what="label-histogram", noise_multiplier=20.0))
    used = journal.book.accounts["1"].used

    after = registry.withdraw("letters", ["p1"]).data

    assert (after.accounts, after.declared_persons, after.fingerprint) == (("1",), 2, first.fingerprint)
    assert journal.book.accounts["1"].used == used > 0


def test_whoever_is_unknown_is_told_by_number_and_left_out_should_she_come(registry: Registry, tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", named(1, 2))
    registry.add("letters", path, "patient")

    done = registry.withdraw("letters", ["p1", "SECRET-A", "SECRET-B"])

    assert (done.persons, done.unknown) == (3, 2)
    assert "SECRET" not in repr(done)
    registry.add("letters", table(path, ["p2", "SECRET-A"]), "patient")
    assert registry.current("letters").left_out == {2}


def test_the_list_of_those_who_withdrew_is_sealed_and_nobody_else_may_read_it(
    registry: Registry, tmp_path: Path
) -> None:
    registry.add("letters", table(tmp_path / "a.csv", named(1, 2)), "patient")
    registry.withdraw("letters", ["p2"])

    for name in ("letters.toml", "letters.withdrawn"):
        assert stat.S_IMODE((tmp_path / "data" / name).stat().st_mode) == 0o600
    raw = (tmp_path / "data" / "letters.withdrawn").read_bytes()
    (withdrawn,) = registry.excluded("letters")
    assert withdrawn not in raw
    assert b"p2" not in raw


def test_an_older_or_missing_list_of_those_who_withdrew_is_refused(registry: Registry, tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", named(1, 2, 3))
    registry.add("letters", path, "patient")
    file = tmp_path / "data" / "letters.withdrawn"
    older = file.read_bytes()
    registry.withdraw("letters", ["p2"])

    def refused() -> None:
        for use in (
            lambda: registry.current("letters"),
            lambda: registry.excluded("letters"),
            lambda: registry.add("letters", path, "patient"),
            lambda: registry.withdraw("letters", ["p3"]),
            lambda: registry.remove("letters"),
        ):
            with pytest.raises(SealError):
                use()

    file.write_bytes(older)
    refused()
    file.write_bytes(b"confide-sealed/1\n" + bytes(100))
    refused()
    file.unlink()
    refused()

    registry.withdraw("letters", ["p2"], anew=True)
    assert registry.current("letters").left_out == {2}


def test_a_lost_list_of_a_removed_data_set_can_be_made_anew_before_it_is_registered_again(
    registry: Registry, journal: Journal, tmp_path: Path
) -> None:
    path = table(tmp_path / "a.csv", named(1, 2))
    registry.add("letters", path, "patient")
    registry.remove("letters")
    (tmp_path / "data" / "letters.withdrawn").unlink()
    size = journal.book.size

    with pytest.raises(SealError, match="--anew"):
        registry.add("letters", path, "patient")
    done = registry.withdraw("letters", ["p1"], anew=True)

    assert (journal.book.size, done.data.event) == (size, "remove")
    registry.add("letters", path, "patient")
    assert registry.current("letters").left_out == {1}


def test_a_list_of_another_data_set_is_not_taken_for_this_one_s(registry: Registry, tmp_path: Path) -> None:
    for name, number in (("letters", 1), ("notes", 2)):
        registry.add(name, table(tmp_path / f"{name}.csv", named(number)), "patient")

    (tmp_path / "data" / "letters.withdrawn").write_bytes((tmp_path / "data" / "notes.withdrawn").read_bytes())

    with pytest.raises(SealError):
        registry.current("letters")


def test_by_another_column_or_namespace_those_who_withdrew_would_not_be_found_so_it_is_refused(
    registry: Registry, tmp_path: Path
) -> None:
    path = table(tmp_path / "a.csv", named(1, 2))
    registry.add("letters", path, "patient")
    registry.withdraw("letters", ["p1"])

    for other in ({"person_id": "text"}, {"person_id": None}, {"person_id": "patient", "ids": "clinic"}):
        with pytest.raises(UsageError, match="would not be found"):
            registry.add("letters", path, **other)


def test_whoever_withdrew_from_one_data_set_is_left_out_of_every_table_that_is_registered_afterwards(
    registry: Registry, tmp_path: Path
) -> None:
    path = table(tmp_path / "a.csv", named(1, 2, 3))
    registry.add("letters", path, "patient")
    registry.withdraw("letters", ["p2", "p9"])

    copy = registry.add("copy", path, "patient")
    other = registry.add("other", table(tmp_path / "b.csv", named(3, 9, 4), "other", ("case", "text", "label")), "case")
    registry.add("newer", path, "patient")

    assert (copy.declared_persons, other.declared_persons) == (2, 2)
    assert registry.current("copy").left_out == {2}
    assert registry.current("other").left_out == {2}
    assert registry.left_out_by_others("other") == (1, ("letters",))
    assert registry.left_out_by_others("newer") == (1, ("copy", "letters"))


def test_a_removed_data_set_s_withdrawals_follow_its_persons_too(registry: Registry, tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", named(1, 2))
    registry.add("letters", path, "patient")
    registry.withdraw("letters", ["p2"])
    registry.remove("letters")

    registry.add("copy", path, "patient")

    assert registry.current("copy").left_out == {2}


def test_an_unchanged_table_becomes_a_version_if_somebody_withdrew_elsewhere_meanwhile(
    registry: Registry, tmp_path: Path
) -> None:
    path = table(tmp_path / "a.csv", named(1, 2))
    registry.add("letters", path, "patient")
    registry.add("copy", path, "patient")
    registry.withdraw("letters", ["p2"])
    before = registry.current("copy").left_out

    again = registry.add("copy", path, "patient")

    assert before == frozenset()
    assert again.version == 2
    assert registry.current("copy").left_out == {2}


def test_a_list_of_any_data_set_that_is_missing_damaged_or_old_lets_nothing_be_registered(
    registry: Registry, tmp_path: Path
) -> None:
    registry.add("letters", table(tmp_path / "a.csv", named(1, 2)), "patient")
    other, file = table(tmp_path / "b.csv", named(7, 8)), tmp_path / "data" / "letters.withdrawn"
    older = file.read_bytes()
    registry.withdraw("letters", ["p2"])

    for content in (older, b"confide-sealed/1\n" + bytes(100), None):
        file.write_bytes(content) if content is not None else file.unlink()
        with pytest.raises(SealError, match="withdraw letters --anew --ids-file FILE"):
            registry.add("other", other, "patient")
    registry.withdraw("letters", ["p2"], anew=True)
    assert registry.add("other", other, "patient").version == 1


@pytest.mark.parametrize("other", [None, "text", "label"])
def test_a_table_with_rows_of_a_data_set_is_refused_if_those_who_withdrew_would_not_be_found_in_it(
    registry: Registry, tmp_path: Path, other: str | None
) -> None:
    path = table(tmp_path / "a.csv", named(1, 2, 3))
    registry.add("letters", path, "patient")
    registry.add("copy", path, other)  # nobody had withdrawn yet
    registry.withdraw("letters", ["p2"])

    with pytest.raises(UsageError, match=r"Persons withdrew from 'letters' by .* add hidden \S+ --person-id patient"):
        registry.add("hidden", path, other)
    with pytest.raises(UsageError, match="would not be found in this table"):
        registry.add("copy", table(tmp_path / "b.csv", named(1, 4)), other)


def test_a_table_without_rows_of_those_who_withdrew_s_data_set_may_have_another_column_or_none(
    registry: Registry, tmp_path: Path
) -> None:
    registry.add("letters", table(tmp_path / "a.csv", named(1, 2)), "patient")
    registry.withdraw("letters", ["p2"])
    other = table(tmp_path / "b.csv", named(1, 2), "of other content")

    assert registry.add("rows", other).declared_persons == 2
    assert registry.add("cases", other, "text").declared_persons == 2


def test_after_a_loss_a_table_that_may_hide_somebody_waits_until_the_lost_data_set_is_back(
    registry: Registry, journal: Journal, tmp_path: Path
) -> None:
    path = table(tmp_path / "a.csv", named(1, 2))
    registry.add("letters", path, "patient")
    registry.withdraw("letters", ["p2"])
    recovered = Journal.restore(
        tmp_path / "ledger.db", journal.lines(), identity=SITE, reason="Lost.", by="Anna", clock=lambda: NOW
    )
    after = Registry(tmp_path / "data", recovered, SECRET)

    with pytest.raises(UsageError, match="Register 'letters' again first: confide site data add letters TABLE"):
        after.add("rows", path)
    after.add("letters", path, "patient")
    with pytest.raises(UsageError, match="would not be found"):
        after.add("rows", path)


def test_a_withdrawal_names_the_other_data_sets_that_its_persons_are_in(registry: Registry, tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", named(1, 2, 3))
    registry.add("letters", path, "patient")
    registry.add("copy", path, "patient")
    registry.add("rows", path)
    registry.add("strangers", table(tmp_path / "b.csv", named(7)), "patient")
    registry.add("clinic", path, "patient", "clinic")
    registry.add("removed", path, "patient")
    registry.remove("removed")

    first = registry.withdraw("letters", ["p2"])
    second = registry.withdraw("copy", ["p2"])
    third = registry.withdraw("letters", ["p2", "p3"])

    assert (first.others, first.unnamed) == (("copy",), ("rows",))
    assert (second.others, second.unnamed) == ((), ("rows",))
    assert third.others == ("copy",)


def test_who_had_withdrawn_already_makes_no_version(registry: Registry, journal: Journal, tmp_path: Path) -> None:
    registry.add("letters", table(tmp_path / "a.csv", named(1, 2, 3)), "patient")
    registry.withdraw("letters", ["p2"])
    size = journal.book.size

    again = registry.withdraw("letters", [" p2"])
    more = registry.withdraw("letters", ["p2", "p3"])

    assert (again.data.version, again.persons, again.before) == (2, 1, 1)
    assert (more.data.version, more.persons, more.before) == (3, 2, 1)
    assert journal.book.size == size + 1


def test_a_data_set_that_no_plan_could_use_is_refused_before_an_account_is_opened(
    registry: Registry, journal: Journal, tmp_path: Path
) -> None:
    size = journal.book.size

    with pytest.raises(Refused, match=r"declared with 2 persons; .* fewest_persons asks for 3") as caught:
        registry.add("letters", table(tmp_path / "a.csv", named(1, 2)), "patient", fewest=3)

    assert caught.value.rule == "data"
    assert journal.book.size == size
    assert not (tmp_path / "data" / "letters.withdrawn").exists()


def test_rows_without_a_column_of_persons_are_withdrawn_by_taking_them_out(registry: Registry, tmp_path: Path) -> None:
    registry.add("letters", table(tmp_path / "a.csv", named(1, 2)))

    with pytest.raises(UsageError, match="Take the rows out of the table"):
        registry.withdraw("letters", ["p1"])


def test_nobody_and_everybody_cannot_withdraw_unnoticed(registry: Registry, tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", named(1, 2))
    registry.add("letters", path, "patient")

    with pytest.raises(UsageError, match="Nobody is named"):
        registry.withdraw("letters", ["", "  "])
    with pytest.raises(Refused, match="not registered"):
        registry.withdraw("absent", ["p1"])
    registry.withdraw("letters", named(1, 2))
    with pytest.raises(DataError, match="No person is left"):
        registry.add("letters", table(path, named(1, 2), "new"), "patient")


class Stopped(BaseException):
    """Stands for the end of a process: no code of ours catches it."""


@pytest.mark.parametrize("moment", [1, 2, 3, 4, 5, 6])
def test_a_site_stopped_at_any_write_never_forgets_a_withdrawal_that_is_in_the_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    path = table(tmp_path / "a.csv", named(1, 2, 3))
    journal = new_journal(tmp_path / "ledger.db")
    registry = Registry(tmp_path / "data", journal, SECRET)
    registry.add("letters", path, "patient")
    changed = table(tmp_path / "b.csv", named(1, 2, 3), "new")
    writes = itertools.count(1)

    def stopping(write: Callable[..., object]) -> Callable[..., object]:
        def stopped(*arguments: object, **options: object) -> object:
            if next(writes) == moment:
                raise Stopped
            return write(*arguments, **options)

        return stopped

    with monkeypatch.context() as patch:
        patch.setattr("confide.client.registry.replace_private", stopping(replace_private))
        patch.setattr(journal, "append", stopping(journal.append))
        with pytest.raises(Stopped) if moment <= 5 else contextlib.nullcontext():
            registry.withdraw("letters", ["p2"])
            registry.add("letters", changed, "patient")
    journal.close()

    with contextlib.closing(Journal.open(tmp_path / "ledger.db", identity=SITE, clock=lambda: NOW)) as journal:
        registry = Registry(tmp_path / "data", journal, SECRET)
        recorded = journal.book.data_sets["letters"]
        assert recorded.version == {1: 1, 2: 1, 3: 2, 4: 2, 5: 3, 6: 3}[moment]
        if moment == 5:  # the ledger has the new table, and nothing says where it is
            with pytest.raises(Refused, match="register it again"):
                registry.current("letters")
            assert registry.add("letters", changed, "patient") == recorded
        assert registry.current("letters").left_out == ({2} if moment > 1 else set())


def test_a_file_beside_the_ledger_that_is_behind_is_brought_up_and_one_that_is_damaged_refused(
    registry: Registry, tmp_path: Path
) -> None:
    path = table(tmp_path / "a.csv", named(1, 2))
    registry.add("letters", path, "patient")
    file = tmp_path / "data" / "letters.toml"
    behind = file.read_text()
    registry.add("letters", table(path, named(1, 2, 3)), "patient")
    right = file.read_text()

    file.write_text(behind)
    assert registry.current("letters").data.version == 2
    assert file.read_text() == right
    for content in ("", "path = 3", right + 'extra = "x"\n', right.replace("version = 2", "version = true"), "\0"):
        file.write_text(content)
        with pytest.raises(UsageError, match="is damaged"):
            registry.current("letters")
    file.unlink()
    with pytest.raises(UsageError, match="not known where the table"):
        registry.current("letters")
    registry.add("letters", path, "patient")
    assert file.read_text() == right


def test_two_processes_do_not_change_data_sets_at_once(registry: Registry, journal: Journal, tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", named(1, 2))
    registry.add("letters", path, "patient")

    with registry._alone(), pytest.raises(UsageError, match="Another process"):
        Registry(tmp_path / "data", journal, SECRET).withdraw("letters", ["p1"])


@pytest.mark.parametrize("name", ["", "A", "../letters", "a b", "-a", "a" * 64, "a.toml"])
def test_names_that_are_no_file_s_name_are_refused(registry: Registry, tmp_path: Path, name: str) -> None:
    path = table(tmp_path / "a.csv", named(1))

    with pytest.raises(UsageError, match="is no data set's name"):
        registry.add(name, path, "patient")
    with pytest.raises(UsageError, match="is no namespace's name"):
        registry.add("letters", path, "patient", ids=name)


@pytest.mark.parametrize(("column", "said"), [("nosuch", "says whose row it is"), ("patent", "Did you mean 'patient'")])
def test_a_column_of_persons_that_is_not_there_is_said_to_be_the_one_that_person_id_names(
    registry: Registry, tmp_path: Path, column: str, said: str
) -> None:
    path = table(tmp_path / "a.csv", named(1, 2))

    with pytest.raises(DataError, match=f"has no column '{column}', which --person-id names. .*{said}"):
        registry.add("letters", path, column)


def test_without_a_policy_nothing_is_registered(tmp_path: Path) -> None:
    journal = Journal.create(None, site="St. Anna", identity=SITE, clock=lambda: NOW)

    with pytest.raises(Refused, match="No policy is in force"):
        Registry(tmp_path / "data", journal, SECRET).add("letters", table(tmp_path / "a.csv", named(1)), "patient")

    assert journal.book.size == 1


def test_a_plan_that_tells_persons_apart_by_another_column_is_refused(registry: Registry, tmp_path: Path) -> None:
    registry.add("letters", table(tmp_path / "a.csv", named(1, 2, 3)), "patient")

    for person_id in (None, "text_id"):
        with pytest.raises(Refused, match="was registered by the column 'patient'") as caught:
            registry.check("letters", plan_for(person_id=person_id))
        assert caught.value.rule == "data"
    assert registry.check("letters", plan_for(person_id="patient")).persons == 3


def test_a_check_leaves_out_those_who_withdrew(registry: Registry, tmp_path: Path) -> None:
    registry.add("letters", table(tmp_path / "a.csv", [*named(1, 2, 3), "p3"]), "patient")
    registry.withdraw("letters", ["p3"])

    check = registry.check("letters", plan_for(person_id="patient"))

    assert (check.rows, check.withdrawn, check.usable, check.persons) == (4, 2, 2, 2)


def test_a_histogram_of_labels_leaves_out_those_who_withdrew_and_is_charged_to_every_account(
    registry: Registry, journal: Journal, tmp_path: Path
) -> None:
    registry.add("letters", table(tmp_path / "a.csv", named(1)), "patient")
    registry.add("notes", table(tmp_path / "b.csv", named(2)), "patient")
    registry.add("merged", table(tmp_path / "c.csv", named(1, 2, *range(3, 500)), "new"), "patient")
    registry.withdraw("merged", named(*range(3, 500, 2)))  # p1 is "no", p2 "yes", and so on

    allowed = Metrics(leave=(LABEL_HISTOGRAM,), smallest_noise_multiplier=5.0)
    histogram = registry.release_labels("merged", plan_for(person_id="patient"), noise_multiplier=5.0, metrics=allowed)

    # Six deviations of the noise: each bound fails with a probability below 1e-8.
    assert abs(histogram.counts["no"] - 1) < 30
    assert abs(histogram.counts["yes"] - 249) < 30
    assert [account.used > 0 for account in journal.book.accounts.values()] == [True, True]


def test_identifiers_are_read_a_line_each(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_bytes("\ufeffp1\r\n\n p2 \np3".encode())

    assert read_identifiers(tmp_path / "ids.txt") == ["p1", "p2", "p3"]
    (tmp_path / "ids.txt").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "ids.txt", tmp_path / "absent.txt"):
        with pytest.raises(UsageError, match="one identifier a line"):
            read_identifiers(path)


def test_a_round_is_charged_to_every_account_of_the_data_set(
    registry: Registry, journal: Journal, tmp_path: Path
) -> None:
    registry.add("letters", table(tmp_path / "a.csv", named(1, 2)), "patient")
    registry.add("notes", table(tmp_path / "b.csv", named(3)), "patient")
    registry.add("merged", table(tmp_path / "c.csv", named(1, 3), "new"), "patient")
    journal.append(approval(journal, "merged"))

    journal.append(
        Reserve(
            run="run-1",
            plan="sha256:" + "1" * 64,
            data="merged",
            version=1,
            round=1,
            sampling_rate=0.1,
            noise_multiplier=2.0,
            steps=4,
            clip_norm=1.0,
            divisor=1.0,
            noise="cryptographic",
            start="sha256:" + "2" * 64,
            roster="sha256:" + "3" * 64,
        )
    )

    assert [account.filter.spent > 0 for account in journal.book.accounts.values()] == [True, True]
