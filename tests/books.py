"""A made-up site: its identity, policy, approvers, an approved plan, and the ledger that all of it stands in."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from confide.client.journal import Journal
from confide.common.checkpoint import Checkpoint
from confide.common.crypto import Identity
from confide.common.entries import (
    SEEDED,
    AccountOpened,
    Approval,
    Bind,
    Commit,
    DataSet,
    Entry,
    Federation,
    Genesis,
    Mask,
    PolicyInForce,
    Renewal,
    Reserve,
    utc_seconds,
)
from confide.common.ledger import Book

SITE = Identity(bytes([1] * 32))
STEWARD, SECOND, STRANGER = (Identity(bytes([number] * 32)) for number in (2, 3, 4))
LEDGER = "0f" * 16
RECOVERY = "4a" * 16
PLAN, START, ROSTER = ("sha256:" + digits * 32 for digits in ("a1", "b2", "c3"))
RUN, DATA = "heart-2026", "patients"
NOW = utc_seconds("2026-11-23T02:40:00Z")
EXPIRES = "2027-01-01T00:00:00Z"
DAY_S = 86_400
PERSONS = [bytes([5, number] * 16) for number in range(8)]


class Clock:
    """A clock that shows what it was set to."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def genesis(**changes: Any) -> Genesis:
    fields: dict[str, Any] = {"ledger": LEDGER, "site": "St. Anna", "key": SITE.public.hex(), "software": "confide 0"}
    return Genesis(**fields | changes)


def policy(**changes: Any) -> PolicyInForce:
    fields: dict[str, Any] = {
        "digest": "sha256:" + "d4" * 32,
        "epsilon": 10.0,
        "delta": 1e-5,
        "plan_epsilon": 8.0,
        "plan_delta": 1e-5,
        "approvals_needed": 1,
        "approvers": (STEWARD.public.hex(), SECOND.public.hex()),
        "most_days": 10**6,
        "renewal_days": 365,
        "most_renewals": 2,
        "release_noise": 1.0,
        "words": (SEEDED,),
    }
    return PolicyInForce(**fields | changes)


def account(number: int = 1, **changes: Any) -> AccountOpened:
    fields: dict[str, Any] = {"account": str(number), "epsilon": 10.0, "delta": 1e-5, "order": 6}
    return AccountOpened(**fields | changes)


def data_set(**changes: Any) -> DataSet:
    fields: dict[str, Any] = {
        "data": DATA,
        "version": 1,
        "event": "add",
        "fingerprint": "e5" * 32,
        "declared_persons": 1200,
        "person_id": "patient",
        "ids": "patients of St. Anna",
        "accounts": ("1",),
        "registered": "f6" * 32,
    }
    return DataSet(**fields | changes)


def approval(approver: Identity = STEWARD, *, ledger: str = LEDGER, **changes: Any) -> Approval:
    """An approval of 40 rounds of 4 steps each in no federation, as in a simulation; signed."""
    fields: dict[str, Any] = {
        "ledger": ledger,
        "recovery": "",
        "plan": PLAN,
        "name": "heart",
        "run": RUN,
        "federation": "",
        "data": DATA,
        "epsilon": 8.0,
        "delta": 1e-5,
        "sampling_rate": 0.1,
        "noise_multiplier": 2.0,
        "clip_norm": 1.0,
        "steps_per_round": 4,
        "rounds": 40,
        "divisor": 120.0,
        "by": "Dr. Müller",
        "key": approver.public.hex(),
        "expires": EXPIRES,
        "nonce": "9d" * 16,
    }
    return Approval(**fields | changes).signed(approver)


def reserve(number: int = 1, **changes: Any) -> Reserve:
    fields: dict[str, Any] = {
        "run": RUN,
        "plan": PLAN,
        "data": DATA,
        "version": 1,
        "round": number,
        "sampling_rate": 0.1,
        "noise_multiplier": 2.0,
        "steps": 4,
        "clip_norm": 1.0,
        "divisor": 120.0,
        "noise": "cryptographic",
        "start": START,
        "roster": ROSTER,
    }
    return Reserve(**fields | changes)


def renewal(period: int = 2, approver: Identity = STEWARD, *, ledger: str = LEDGER, **changes: Any) -> Renewal:
    fields: dict[str, Any] = {
        "ledger": ledger,
        "recovery": "",
        "account": "1",
        "period": period,
        "reason": "A new year's admissions; the ethics board agreed on 3 November.",
        "by": "Dr. Müller",
        "key": approver.public.hex(),
    }
    return Renewal(**fields | changes).signed(approver)


def bind(number: int = 1, digits: str = "11") -> Bind:
    return Bind(run=RUN, round=number, commitment="sha256:" + digits * 32)


def federation(**changes: Any) -> Federation:
    fields: dict[str, Any] = {"federation": "Heart 2030", "epoch": 1, "roster": ROSTER, "admins": ()}
    return Federation(**fields | changes)


def mask(number: int = 1, attempt: int = 1) -> Mask:
    return Mask(run=RUN, round=number, attempt=attempt, digest="sha256:" + "22" * 32)


def commit(number: int = 1, evidence: str = "") -> Commit:
    return Commit(run=RUN, round=number, evidence=evidence)


def beginning() -> list[Entry]:
    """All that comes before the first round, genesis included."""
    return [genesis(), policy(), account(), data_set(), approval()]


def written(entries: Iterable[Entry], at: int = NOW) -> tuple[Book, list[bytes]]:
    """The book that these entries lead to, a second apart, and their lines."""
    book = Book()
    return book, [book.record(entry, at + second) for second, entry in enumerate(entries)]


def a_round(number: int) -> list[Entry]:
    return [reserve(number), bind(number), mask(number), commit(number)]


def signed(book: Book, identity: Identity = SITE) -> Checkpoint:
    return Checkpoint.sign(book.ledger, book.size, book.root, book.charges, identity)


def begun(path: Path | None = None, clock: Clock | None = None, **changes: Any) -> Journal:
    """A journal in which the plan is approved; `changes` are the policy's."""
    journal = Journal.create(path, site="St. Anna", identity=SITE, clock=clock or Clock(), wait_s=5.0)
    fill(journal, **changes)
    return journal


def fill(journal: Journal, **changes: Any) -> None:
    """Put in force a policy, open an account, register eight persons' data and approve the plan."""
    journal.append(policy(**changes), account(epsilon=changes.get("epsilon", 10.0)))
    journal.append(data_set(registered=""), persons={"1": PERSONS})
    journal.append(approval(ledger=journal.book.ledger))


def many(rounds: int) -> list[Entry]:
    """A ledger's entries with this many whole rounds, each of them cheap."""
    cheap: dict[str, Any] = {"sampling_rate": 1e-4, "noise_multiplier": 20.0, "divisor": 1.0}
    entries = [*beginning()[:-1], approval(**cheap, rounds=10**6, steps_per_round=1)]
    for number in range(1, rounds + 1):
        first, *rest = a_round(number)
        assert isinstance(first, Reserve)
        entries += [dataclasses.replace(first, **cheap, steps=1), *rest]
    return entries
