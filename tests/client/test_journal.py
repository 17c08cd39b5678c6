"""The ledger on disk: one transaction for gate and record, and nothing that can be done to the file goes unnoticed."""

import contextlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from confide.client.journal import Journal, salvage
from confide.common.entries import SEEDED, Forfeit, Recovered, Refund, Reserve, Revocation, Rotation, Started
from confide.common.errors import LedgerError, Refused, UsageError
from confide.common.export import read_export
from confide.common.ledger import BOUND, COMMITTED, RESERVED, Book, verify
from tests.books import (
    DATA,
    DAY_S,
    NOW,
    PERSONS,
    PLAN,
    RECOVERY,
    RUN,
    SITE,
    STRANGER,
    Clock,
    a_round,
    account,
    approval,
    begun,
    bind,
    commit,
    data_set,
    mask,
    policy,
    renewal,
    reserve,
)

ROOT = Path(__file__).parents[2]
NEW_PERSONS = [bytes([9, number] * 16) for number in range(3)]
REVOKED = Revocation(plan=PLAN, run=RUN, by="Dr. Weiß", reason="The board withdrew.")
LOST = Recovered(recovery=RECOVERY, size=40, root="5c" * 32, reason="The disk failed.", by="IT")


def opened(path: Path, **settings: Any) -> Journal:
    defaults: dict[str, Any] = {"identity": SITE, "clock": Clock(), "wait_s": 5.0}
    return Journal.open(path, **defaults | settings)


def tampered(path: Path, *statements: tuple[str, tuple[object, ...]]) -> None:
    """Do to the file what only somebody with a database tool can."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        for statement, values in statements:
            connection.execute(statement, values)
        for _, sql in triggers:
            connection.execute(sql)
        connection.commit()


def test_what_was_appended_is_there_when_the_file_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    journal = begun(path)
    recorded = journal.append(*a_round(1), reserve(2))

    again = opened(path)

    assert again.book.size == journal.book.size == 10
    assert (again.book.root, again.book.head) == (journal.book.root, journal.book.head)
    assert again.checkpoint() == journal.checkpoint()
    assert again.checkpoint().charges == again.book.charges == 2
    assert {number: known.state for number, known in again.book.rounds(RUN).items()} == {1: COMMITTED, 2: RESERVED}
    assert again.book.rounds(RUN)[2].reserve == recorded[-1]
    assert isinstance(recorded[0], Reserve)
    assert recorded[0].accounts == ("1",)
    assert recorded[0].spent[0] > 0
    assert Journal.look(path).root == journal.book.root
    assert verify(journal.lines(), journal.checkpoint()).root == journal.book.root


def test_a_ledger_in_memory_is_the_same_without_a_file() -> None:
    journal = begun()

    journal.append(*a_round(1))

    assert journal.path is None
    assert verify(journal.lines(), journal.checkpoint()).spends(RUN) == (reserve(1).spend(),)


def test_only_its_owner_may_read_the_file_and_its_companions(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    before = os.umask(0)
    try:
        journal = begun(path)
    finally:
        os.umask(before)

    assert {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {
        "ledger.db": 0o600,
        "ledger.db-wal": 0o600,
        "ledger.db-shm": 0o600,
    }
    journal.close()
    assert [file.name for file in tmp_path.iterdir()] == ["ledger.db"]
    for mode in (0o640, 0o604, 0o660):
        path.chmod(mode)
        for refused in (lambda: opened(path), lambda: Journal.look(path)):
            with pytest.raises(LedgerError, match=rf"Others may read or change the ledger .* \(mode {mode:03o}\)"):
                refused()


def test_each_commit_waits_for_the_disk(tmp_path: Path) -> None:
    journal = begun(tmp_path / "ledger.db")

    # FULL syncs the write-ahead log at each commit; NORMAL would not.
    assert journal._connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert journal._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_link_a_directory_or_nothing_is_no_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    begun(path).close()
    (tmp_path / "link").symlink_to(path)

    for other in (tmp_path / "link", tmp_path):
        with pytest.raises(LedgerError, match="is not a file, or leads elsewhere by a link"):
            opened(other)
    with pytest.raises(LedgerError, match=r"There is no ledger at .*confide site ledger recover"):
        opened(tmp_path / "absent")
    (tmp_path / "ledger.db-wal").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LedgerError, match="leads elsewhere by a link"):
        opened(path)


def test_a_ledger_is_never_made_in_the_place_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    begun(path).close()
    before = path.read_bytes()

    with pytest.raises(LedgerError, match=r"There is a file at .* already; a ledger is never written over"):
        Journal.create(path, site="St. Anna", identity=SITE)

    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["ledger.db"]
    with pytest.raises(LedgerError, match="cannot be made: No such file or directory"):
        Journal.create(tmp_path / "absent" / "ledger.db", site="St. Anna", identity=SITE)


def test_a_ledger_of_another_identity_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    begun(path).close()

    with pytest.raises(LedgerError, match="this site's identity is"):
        opened(path, identity=STRANGER)


def test_what_a_rule_forbids_is_not_recorded_and_neither_is_what_came_with_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    journal = begun(path)
    was = (journal.book.size, journal.book.root, journal.book.accounts["1"], journal.checkpoint())

    assert journal.book.charges == 0
    for entries in ((reserve(1), bind(1), reserve(41)), (reserve(1), bind(2)), (approval(),)):
        with pytest.raises(Refused):
            journal.append(*entries)

    assert (journal.book.size, journal.book.root, journal.book.accounts["1"], journal.checkpoint()) == was
    assert journal.book.rounds(RUN) == {}
    assert journal.book.charges == 0
    journal.append(reserve(1))
    assert opened(path).book.root == journal.book.root


def test_a_seeded_simulations_repetition_is_not_recorded_again() -> None:
    journal = begun()
    journal.append(reserve(1, noise=SEEDED))
    before = journal.book.root

    assert journal.append(reserve(1, noise=SEEDED)) == ()

    assert journal.book.root == before
    assert journal.book.charges == journal.checkpoint().charges == 1


def test_how_long_a_training_took_is_in_no_record(tmp_path: Path) -> None:
    clock = Clock()
    journal = begun(tmp_path / "ledger.db", clock)

    times = list[int]()
    for entry in (reserve(1), bind(1), mask(1), commit(1), reserve(2), Forfeit(run=RUN, round=2, reason="Killed.")):
        journal.append(entry)
        times.append(journal.book.at - int(NOW))
        clock.now += 37

    assert times == [0, 0, 0, 111, 148, 148]


def test_a_clock_that_goes_back_never_makes_the_ledgers_time_go_back(tmp_path: Path) -> None:
    clock = Clock()
    journal = begun(tmp_path / "ledger.db", clock)

    times = []
    for number, now in enumerate((NOW + 10.9, NOW - 10**9, NOW + 5, NOW + 11, -5.0), start=1):
        clock.now = now
        journal.append(reserve(number))
        times.append(journal.book.at)

    assert times == [NOW + 10, NOW + 10, NOW + 10, NOW + 11, NOW + 11]
    for broken in (float("nan"), float("inf"), 1e12):
        clock.now = broken
        with pytest.raises(LedgerError, match="Set this machine's clock"):
            journal.append(reserve(6))
    clock.now = NOW + 12
    journal.append(reserve(6))


def test_an_export_holds_all_records_and_nothing_that_stays_at_the_site(tmp_path: Path) -> None:
    journal = begun(tmp_path / "ledger.db")
    journal.append(reserve(1), bind(1), mask(1))
    journal.append(commit(1, "8b" * 32), evidence=b"sealed evidence")

    journal.export(tmp_path / "export.jsonl")

    lines, checkpoint = read_export(tmp_path / "export.jsonl")
    assert verify(lines, checkpoint).root == journal.book.root
    raw = (tmp_path / "export.jsonl").read_bytes()
    assert b"sealed evidence" not in raw
    assert not any(person.hex().encode() in raw or person in raw for person in PERSONS)


def test_evidence_is_kept_beside_its_commit_and_only_there(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    journal = begun(path)
    journal.append(reserve(1), bind(1))

    for entries in ((mask(1),), (commit(1),), ()):
        with pytest.raises(UsageError, match="kept together with one commit"):
            journal.append(*entries, evidence=b"sealed")
    journal.append(commit(1, "8b" * 32), evidence=b"sealed")

    assert opened(path).evidence(RUN, 1) == b"sealed"
    assert journal.evidence(RUN, 2) is None
    journal.close()
    tampered(path, ("UPDATE evidence SET seq = 3", ()))
    with pytest.raises(LedgerError, match="evidence of a round that committed to none"):
        opened(path)


def test_a_person_belongs_to_one_account_for_good_and_it_must_be_charged(tmp_path: Path) -> None:
    journal = begun(tmp_path / "ledger.db")
    two = (account(2), data_set(data="others", accounts=("2",), registered=""))

    with pytest.raises(
        Refused, match=r"would charge the accounts \(2\), but persons who are or were in it belong to \(1\) too"
    ):
        journal.append(*two, persons={"2": [*NEW_PERSONS, PERSONS[0]]})
    assert journal.accounts_of(NEW_PERSONS) == frozenset()
    journal.append(*two, persons={"2": NEW_PERSONS})
    both = data_set(data="all", accounts=("1", "2"), registered="")
    journal.append(both, persons={"2": [*NEW_PERSONS, *PERSONS]})

    assert journal.accounts_of(PERSONS) == {"1"}
    assert journal.accounts_of(NEW_PERSONS) == {"2"}
    assert journal.accounts_of([PERSONS[0], NEW_PERSONS[0], bytes(32)]) == {"1", "2"}
    assert journal.accounts_of([]) == frozenset()
    assert opened(tmp_path / "ledger.db").accounts_of(PERSONS) == {"1"}


def test_a_person_who_left_a_data_set_is_still_charged_by_it() -> None:
    journal = begun()
    journal.append(account(2))

    withdrawn = data_set(version=2, event="withdraw", registered="")
    journal.append(withdrawn, persons={"1": PERSONS[:2]})
    with pytest.raises(Refused, match=r"belong to \(1\) too"):
        journal.append(data_set(version=3, event="change", accounts=("2",), registered=""))

    assert journal.accounts_of(PERSONS[2:]) == {"1"}


def test_persons_come_with_one_data_set_and_have_keyed_hashes() -> None:
    journal = begun()
    changed = data_set(version=2, event="change", registered="")

    for entries in ((), (reserve(1),), (changed, data_set(data="b"))):
        with pytest.raises(UsageError, match="together with one data set"):
            journal.append(*entries, persons={"1": NEW_PERSONS})
    malformed: tuple[Any, ...] = (b"short", bytes(33), "x" * 32, bytearray(32))
    for person in malformed:
        with pytest.raises(UsageError, match="has 32 bytes"):
            journal.append(changed, persons={"1": [person]})
    with pytest.raises(Refused, match="the account 7, which is not open"):
        journal.append(changed, persons={"7": NEW_PERSONS})
    with pytest.raises(Refused, match="Leave it empty: the journal fills it in"):
        journal.append(data_set(version=2, event="change"), persons={"1": NEW_PERSONS})

    assert journal.accounts_of(NEW_PERSONS) == frozenset()
    assert journal.book.data_sets[DATA].version == 1


LOSSES = {
    "the table of persons": ("DELETE FROM person", ()),
    "the table of who is where": ("DELETE FROM member", ()),
    "one person": ("DELETE FROM person WHERE hash = ?", (PERSONS[3],)),
    "one person's place": ("DELETE FROM member WHERE hash = ?", (PERSONS[3],)),
    "the account of one": ("UPDATE person SET account = '2' WHERE hash = ?", (PERSONS[3],)),
    "a person's hash": ("UPDATE member SET hash = ? WHERE hash = ?", (bytes(32), PERSONS[3])),
    "one person more": ("INSERT INTO member VALUES (?, ?)", (DATA, bytes(32))),
}


@pytest.mark.parametrize("what", LOSSES)
@pytest.mark.parametrize("removed", [False, True])
def test_persons_that_were_lost_or_changed_beside_the_records_are_noticed(
    tmp_path: Path, what: str, removed: bool
) -> None:
    path = tmp_path / "ledger.db"
    journal = begun(path)
    journal.append(account(2))
    if removed:
        journal.append(data_set(version=2, event="remove", registered=""))
    journal.close()
    opened(path).close()

    tampered(path, LOSSES[what])

    for look in (lambda: opened(path), lambda: Journal.look(path)):
        with pytest.raises(
            LedgerError, match=r"(are not those that were registered|has no account).*confide site ledger recover"
        ):
            look()


def test_a_byte_changed_in_any_record_on_the_disk_is_found(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    journal = begun(path)
    journal.append(*a_round(1))
    lines = journal.lines()
    journal.close()
    generator = random.Random(7)

    for number, line in enumerate(lines, start=1):
        for _ in range(3):
            place = generator.randrange(len(line))
            changed = line[:place] + bytes([line[place] ^ (1 << generator.randrange(8))]) + line[place + 1 :]
            tampered(path, ("UPDATE record SET line = ? WHERE seq = ?", (changed, number)))
            with pytest.raises(LedgerError, match=rf"ecord ({number}|{number + 1})\b|was forked"):
                opened(path)
        tampered(path, ("UPDATE record SET line = ? WHERE seq = ?", (line, number)))
    opened(path).close()


TAMPERED: dict[str, tuple[list[tuple[str, tuple[object, ...]]], str]] = {
    "the last record cut off": (
        [("DELETE FROM record WHERE seq = 9", ())],
        "has 8 records, and its checkpoint stands for 9",
    ),
    "a record cut out": ([("DELETE FROM record WHERE seq = 4", ())], "Record 4 of the ledger is missing"),
    "all records gone": ([("DELETE FROM record", ())], "no record at all"),
    "a record of text": (
        [("UPDATE record SET line = CAST(line AS TEXT) WHERE seq = 4", ())],
        "Record 4 of the ledger is missing",
    ),
    "records exchanged": (
        [
            ("UPDATE record SET seq = -1 WHERE seq = 4", ()),
            ("UPDATE record SET seq = 4 WHERE seq = 5", ()),
            ("UPDATE record SET seq = 5 WHERE seq = -1", ()),
        ],
        "Record 4 of the ledger says that it is number 5",
    ),
    "no checkpoint": ([("DELETE FROM checkpoint", ())], "The checkpoint in the ledger .* is missing or damaged"),
    "a checkpoint of nonsense": ([("UPDATE checkpoint SET short = 'x'", ())], "is missing or damaged"),
    "a checkpoint of a number": (
        [("UPDATE checkpoint SET short = CAST(x'00ff' AS BLOB)", ())],
        "is missing or damaged",
    ),
    "a table too many": ([("CREATE TABLE more (x)", ())], "tables of the ledger .* are not those it was made with"),
    "a trigger": (
        [("CREATE TRIGGER quiet AFTER INSERT ON record BEGIN DELETE FROM evidence; END", ())],
        "tables of the ledger .* are not those it was made with",
    ),
    "a table lost": ([("DROP TABLE evidence", ())], "tables of the ledger .* are not those it was made with"),
    "a later version": ([("PRAGMA user_version = 2", ())], "is of the schema version 2; this software reads 1"),
    "another program's file": ([("PRAGMA application_id = 7", ())], "is not a ledger of Confide's"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_tampering_with_the_file_is_found_and_named(tmp_path: Path, what: str) -> None:
    statements, words = TAMPERED[what]
    path = tmp_path / "ledger.db"
    journal = begun(path)
    journal.append(*a_round(1))
    journal.close()

    tampered(path, *statements)

    for look in (lambda: opened(path), lambda: Journal.look(path)):
        with pytest.raises(LedgerError, match=words):
            look()


def test_records_are_neither_changed_nor_deleted_by_a_mistaken_statement(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    begun(path).close()

    with contextlib.closing(sqlite3.connect(path)) as connection:
        for statement in ("DELETE FROM record", "UPDATE record SET line = x'00'"):
            with pytest.raises(sqlite3.IntegrityError, match="records are only added"):
                connection.execute(statement)


def test_a_file_with_any_bytes_changed_opens_as_it_was_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    journal = begun(path)
    journal.append(*a_round(1))
    root, at = journal.book.root, path.stat()
    journal.close()
    raw = path.read_bytes()
    generator = random.Random(8)

    refused = 0
    for _ in range(150):
        place = generator.randrange(len(raw))
        noise = generator.randbytes(generator.choice([1, 1, 1, 64]))
        path.write_bytes(raw[:place] + noise + raw[place + len(noise) :])
        try:
            with contextlib.closing(opened(path)) as again:
                assert again.book.root == root
                assert again.accounts_of(PERSONS) == {"1"}
        except LedgerError:
            refused += 1
    assert refused > 10
    assert at.st_size <= len(raw)


@pytest.mark.parametrize("raw", [b"", b"no database", b"SQLite format 3\x00" + bytes(100), bytes(8192)])
def test_a_file_that_is_no_ledger_is_refused_with_a_way_out(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(raw)
    path.chmod(0o600)

    for look in (lambda: opened(path), lambda: Journal.look(path)):
        with pytest.raises(LedgerError, match="confide site ledger recover"):
            look()
    assert salvage(path) == []


def test_an_older_copy_of_the_file_does_not_pass_for_the_ledger_against_a_witnessed_checkpoint(tmp_path: Path) -> None:
    path, copy = tmp_path / "ledger.db", tmp_path / "copy.db"
    journal = begun(path)
    journal.close()
    shutil.copy2(path, copy)
    journal = opened(path)
    journal.append(reserve(1))
    witnessed = journal.checkpoint()

    older = opened(copy)

    with pytest.raises(LedgerError, match="this is an older copy, or it was cut short"):
        verify(older.lines(), witnessed)


def test_a_ledger_that_is_put_back_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    path, copy = tmp_path / "ledger.db", tmp_path / "copy.db"
    begun(path).close()
    shutil.copy2(path, copy)
    journal = opened(path)
    journal.append(reserve(1))

    copy.replace(path)

    for act in (lambda: journal.append(reserve(2)), journal.sync):
        with pytest.raises(LedgerError, match="was removed or replaced while it was open"):
            act()


@pytest.mark.parametrize("end", ["-wal", "-shm"])
def test_what_sqlite_keeps_beside_an_open_ledger_is_missed_when_it_is_removed(tmp_path: Path, end: str) -> None:
    path = tmp_path / "ledger.db"
    journal = begun(path)
    path.with_name(path.name + end).unlink()

    for act in (lambda: journal.append(reserve(2)), journal.sync):
        with pytest.raises(LedgerError, match="was removed or replaced while it was open"):
            act()

    journal.close()
    assert Journal.look(path).size == journal.book.size


def test_records_that_vanish_while_it_is_open_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    journal = begun(path)
    journal.append(reserve(1))

    tampered(path, ("DELETE FROM record WHERE seq = 6", ()))

    for words in ("no longer holds the record 6", "cannot be used any more"):
        with pytest.raises(LedgerError, match=words):
            journal.append(reserve(2))


def test_what_another_process_wrote_is_taken_in_before_anything_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    agent = begun(path)
    command = opened(path)
    agent.append(reserve(1))

    command.append(REVOKED)
    with pytest.raises(Refused, match="Too few approvals"):
        agent.append(reserve(2))

    assert agent.book.root == command.book.root
    assert agent.checkpoint() == command.checkpoint()
    agent.append(bind(1))
    command.sync()
    assert command.book.rounds(RUN)[1].state == BOUND
    assert command.checkpoint() == agent.checkpoint()


def test_what_another_process_wrote_without_the_key_is_not_taken_in(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    journal = begun(path)
    forger = Book()
    for line in journal.lines():
        forger.take(line)
    forged = forger.record(reserve(1), NOW)

    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("INSERT INTO record VALUES (?, ?)", (forger.size, forged))
        connection.commit()

    for words in ("stands for 5", "cannot be used any more"):
        with pytest.raises(LedgerError, match=words):
            journal.sync()


def test_a_writer_waits_for_another_and_then_refuses_clearly(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    begun(path).close()
    journal = opened(path, wait_s=0.2)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")

        began = time.monotonic()
        with pytest.raises(
            LedgerError, match=r"Another process has held the ledger .* for 0.2 seconds. Nothing was recorded"
        ):
            journal.append(reserve(1))
        assert time.monotonic() - began >= 0.2
        Journal.look(path)  # reading does not wait

        other.execute("ROLLBACK")
    journal.append(reserve(1))
    assert opened(path).book.size == 6


def append_rounds(path: str) -> None:
    """What a writer in its own process does: reserve, bind and commit rounds, those that another has not begun."""
    journal = opened(Path(path), wait_s=60.0)
    done = 0
    for number in range(1, 16):
        with contextlib.suppress(Refused):
            journal.append(reserve(number))
            journal.append(bind(number))
            journal.append(commit(number))
            done += 1
    print(done)


def test_concurrent_writers_neither_lose_a_record_nor_reserve_a_round_twice(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    begun(path).close()

    writers = [child("append_rounds", path) for _ in range(3)]
    done = [int(told(writer)) for writer in writers]

    book = opened(path).book
    assert sum(done) == len(book.spends(RUN)) == len(book.rounds(RUN)) > 0
    assert all(known.state == COMMITTED for known in book.rounds(RUN).values())
    assert book.size == 5 + 3 * len(book.rounds(RUN))


def test_threads_of_one_process_wait_for_each_other(tmp_path: Path) -> None:
    journal = begun(tmp_path / "ledger.db")

    def start(number: int) -> None:
        journal.append(Started(process=f"{number:032x}", software="confide 0"))

    threads = [threading.Thread(target=start, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert journal.book.size == 5 + 12
    assert opened(tmp_path / "ledger.db").book.root == journal.book.root


def test_a_forked_process_cannot_use_the_ledger_of_the_one_it_came_from(tmp_path: Path) -> None:
    journal = begun(tmp_path / "ledger.db")
    journal._process += 1  # as it is after a fork

    with pytest.raises(LedgerError, match="forked"):
        journal.append(reserve(1))


def test_a_rotation_is_signed_by_the_new_key_from_its_own_record_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    journal = begun(path)
    agent = opened(path)

    journal.rotate(STRANGER)
    journal.append(reserve(1))

    assert journal.book.key == STRANGER.public
    assert opened(path, identity=STRANGER).book.root == journal.book.root
    with pytest.raises(LedgerError, match="this site's identity is"):
        opened(path)
    with pytest.raises(LedgerError, match="Start it anew with the identity in force"):
        agent.append(reserve(2))
    with pytest.raises(LedgerError, match="rotate with"):
        journal.append(Rotation.between(journal.book.ledger, STRANGER, SITE))
    journal.append(reserve(2))


def test_a_full_disk_leaves_nothing_half_done_and_the_ledger_works_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    journal = begun(path)
    journal._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    pages = journal._connection.execute("PRAGMA page_count").fetchone()[0]
    journal._connection.execute(f"PRAGMA max_page_count = {pages}")

    full, number = "", 0
    while not full:
        number += 1
        was = (journal.book.size, journal.book.root, journal.book.accounts["1"], journal.checkpoint())
        try:
            journal.append(*a_round(number))
        except LedgerError as error:
            full = str(error)

    assert "There is no room on the disk for the ledger" in full
    assert "Nothing was recorded; make room" in full
    assert (journal.book.size, journal.book.root, journal.book.accounts["1"], journal.checkpoint()) == was
    assert opened(path).book.root == journal.book.root
    journal._connection.execute("PRAGMA max_page_count = 100000")
    journal.append(*a_round(40))
    assert opened(path).book.root == journal.book.root


def append_until_full(path: str) -> None:
    """Append rounds in a process that may not make a file longer than it is now; print what happened."""
    journal = opened(Path(path))
    limit = max(file.stat().st_size for file in Path(path).parent.iterdir()) + 10_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    done = 0
    try:
        for number in range(1, 40):
            journal.append(reserve(number))
            done = number
    except LedgerError as error:
        first = str(error)
    try:
        journal.append(reserve(done + 1))
        second = "appended"
    except LedgerError as error:
        second = str(error)
    print(json.dumps([done, journal.book.size, first, second]))


def test_a_failed_write_refuses_all_further_ones_until_the_ledger_is_opened_anew(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    begun(path).close()

    done, size, first, second = json.loads(told(child("append_until_full", path)))

    assert 0 < done < 39
    assert size == 5 + done
    assert "The disk reports an error" in first or "no room on the disk" in first
    assert "cannot be used any more" in second or "no room on the disk" in second or "The disk reports" in second
    again = opened(path)
    assert again.book.size in {size, size + 1}  # never fewer than were told to be on disk
    again.append(reserve(39))


def child(function: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a function of this file in a process of its own."""
    program = f"import sys; from tests.client.test_journal import {function}; {function}(*sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def told(process: subprocess.Popen[str]) -> str:
    """Wait for a process and return what it printed."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


def test_a_file_that_may_only_be_read_is_looked_at_and_not_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    begun(path).close()
    journal = opened(path)

    journal._connection.execute("PRAGMA query_only = ON")
    with pytest.raises(LedgerError, match=r"cannot be written\. See that file and directory are this user's"):
        journal.append(reserve(1))

    assert journal.book.size == 5
    assert Journal.look(path).size == 5
    journal.close()
    if os.geteuid():  # root writes to whatever it likes
        path.chmod(0o400)
        with pytest.raises(LedgerError, match="cannot be written"):
            opened(path).append(reserve(1))


def test_a_closed_ledger_says_so(tmp_path: Path) -> None:
    journal = begun(tmp_path / "ledger.db")
    journal.close()

    with pytest.raises(LedgerError, match=r"It was closed\. Open it anew"):
        journal.append(reserve(1))


class Dying:
    """A connection that kills its process before or after its n-th statement."""

    def __init__(self, connection: sqlite3.Connection, point: int) -> None:
        self._connection = connection
        self._left = point

    @property
    def in_transaction(self) -> bool:
        return self._connection.in_transaction

    def execute(self, statement: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        self._die()
        cursor = self._connection.execute(statement, values)
        self._die()
        return cursor

    def _die(self) -> None:
        self._left -= 1
        if self._left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def take_part(folder: Path, point: int) -> None:
    """What an agent does from its start: it settles what is open, and takes part in three rounds.

    What it truly does to rows, and what leaves the site, it writes to another file at the very moment it does it.
    """
    journal = opened(folder / "ledger.db")
    journal._connection.execute("PRAGMA synchronous = OFF")  # a kill does not lose what the system was given
    dying: Any = Dying(journal._connection, point)  # it has all that a journal needs
    journal._connection = dying
    journal.append(Started(process=os.urandom(16).hex(), software="confide 0"))
    rounds = journal.book.rounds(RUN)
    for number, known in rounds.items():
        if known.state == RESERVED:
            journal.append(Forfeit(run=RUN, round=number, reason="The agent was killed."))
        if known.state == BOUND:
            journal.append(mask(number, known.attempt + 1))
            happened(folder, "sent", number, known.commitment)
            journal.append(commit(number))
            happened(folder, "opened", number)
    for number in itertools.islice(itertools.count(max(rounds, default=0) + 1), 3):
        journal.append(reserve(number))
        gives_up = number % 4 == 3
        happened(folder, "trained", number, 3 if gives_up else 4)
        if gives_up:
            journal.append(Refund(run=RUN, round=number, steps=1))
            continue
        commitment = os.urandom(1).hex()
        journal.append(bind(number, commitment))
        journal.append(mask(number, 1))
        happened(folder, "sent", number, bind(number, commitment).commitment)
        journal.append(commit(number))
        happened(folder, "opened", number)
    journal.close()


def happened(folder: Path, *what: object) -> None:
    with (folder / "truth").open("a") as stream:
        stream.write(json.dumps(what) + "\n")


def die_everywhere(folder: str) -> None:
    """Kill an agent at every statement of every append in turn; print how many were killed, and at which sizes."""
    sizes = []
    for point in itertools.count():
        agent = os.fork()
        if agent == 0:
            try:
                take_part(Path(folder), point)
            finally:
                os._exit(0)
        _, status = os.waitpid(agent, 0)
        if not os.WIFSIGNALED(status):
            break
        with contextlib.closing(opened(Path(folder) / "ledger.db")) as journal:
            held(journal.book, Path(folder) / "truth")
            sizes.append(journal.book.size)
    print(json.dumps(sizes))


def held(book: Book, truth: Path) -> None:
    """Fail if the ledger tells less than what truly happened."""
    lines = truth.read_text().splitlines() if truth.exists() else []
    steps, sent = dict[int, int](), dict[int, set[str]]()
    for kind, number, *rest in map(json.loads, lines):
        known = book.rounds(RUN)[number]
        if kind == "trained":
            assert number not in steps, "A round was trained twice."
            steps[number] = rest[0]
        elif kind == "sent":
            sent.setdefault(number, set()).add(rest[0])
            assert sent[number] == {known.commitment}, "Two vectors of one round left the site."
        else:
            assert known.state == COMMITTED
    recorded = {spend.round: spend.steps for spend in book.spends(RUN)}
    for number, count in steps.items():
        assert recorded[number] >= count, "The ledger counts less than what was trained."


def test_an_agent_killed_at_every_statement_never_counts_less_than_it_did_and_binds_one_vector(tmp_path: Path) -> None:
    """kill -9 before begin, after it, before and after each insert, before and after commit, at every append."""
    path = tmp_path / "ledger.db"
    begun(path, epsilon=100.0).close()
    grow(path)

    sizes = json.loads(told(child("die_everywhere", tmp_path)))

    assert len(sizes) > 100
    assert sizes == sorted(sizes)
    journal = opened(path)
    held(journal.book, tmp_path / "truth")
    number = max(journal.book.rounds(RUN)) + 1
    journal.append(*a_round(number))


def grow(path: Path) -> None:
    """Make room for many rounds: an approval of more of them, under a larger account."""
    with contextlib.closing(opened(path)) as journal:
        journal.append(approval(ledger=journal.book.ledger, rounds=10_000, expires="2027-01-02T00:00:00Z"))


def test_a_ledger_restored_from_an_export_gives_no_budget_until_it_is_renewed(tmp_path: Path) -> None:
    clock = Clock()
    journal = begun(tmp_path / "ledger.db", clock)
    journal.append(*a_round(1))
    lines, early = journal.lines(), journal.checkpoint()
    journal.append(reserve(2))
    witnessed = journal.checkpoint()

    restored = Journal.restore(
        tmp_path / "restored.db",
        lines,
        identity=SITE,
        reason="The disk failed on Monday.",
        by="IT",
        checkpoint=early,
        lost=witnessed,
        clock=clock,
    )

    assert restored.book.ledger == journal.book.ledger
    assert restored.book.last == Recovered(
        recovery=restored.book.recovery,
        size=witnessed.size,
        root=witnessed.root.hex(),
        reason="The disk failed on Monday.",
        by="IT",
    )
    assert restored.book.accounts["1"].left == 0
    assert restored.accounts_of(PERSONS) == frozenset()
    # Whoever is registered again, as of old or under a new account, has no budget before a renewal.
    restored.append(account(2))
    restored.append(data_set(version=2, accounts=("1",), registered=""), persons={"1": PERSONS})
    restored.append(data_set(data="b", accounts=("2",), registered=""), persons={"2": NEW_PERSONS})
    fresh: dict[str, Any] = {
        "ledger": restored.book.ledger,
        "recovery": restored.book.recovery,
        "expires": "2029-01-01T00:00:00Z",
        "run": "b",
    }
    restored.append(approval(**fresh), approval(**fresh, data="b"))
    book = restored.book
    for data in (DATA, "b"):
        with pytest.raises(Refused, match="is not enough"):
            restored.append(reserve(2, run="b", data=data, version=book.data_sets[data].version))
    clock.now += 366 * DAY_S
    restored.append(renewal(ledger=restored.book.ledger, recovery=restored.book.recovery))
    restored.append(reserve(2, run="b", version=2))
    assert opened(tmp_path / "restored.db", clock=clock).book.root == restored.book.root


def test_an_export_that_does_not_hold_is_not_restored(tmp_path: Path) -> None:
    journal = begun(tmp_path / "ledger.db")
    journal.append(*a_round(1))
    lines, checkpoint = journal.lines(), journal.checkpoint()
    another = begun()

    def restore(given: list[bytes], **settings: Any) -> None:
        defaults: dict[str, Any] = {"identity": SITE, "reason": "Lost.", "by": "IT", "clock": Clock()}
        Journal.restore(tmp_path / "restored.db", given, **defaults | settings)

    cases: list[tuple[list[bytes], dict[str, Any], str]] = [
        (lines[:-1], {"checkpoint": checkpoint}, "older copy"),
        ([*lines[:3], *lines[4:]], {}, "Record 4 of the ledger says"),
        ([], {}, "no record at all"),
        (lines, {"identity": STRANGER}, "Give the identity that was in force"),
        (lines, {"lost": another.checkpoint()}, "The lost checkpoint is of the ledger"),
        (another.lines(), {"checkpoint": checkpoint}, "The checkpoint is of the ledger"),
    ]
    for given, settings, words in cases:
        with pytest.raises(LedgerError, match=words):
            restore(given, **settings)
    assert not (tmp_path / "restored.db").exists()
    restore(lines)
    with pytest.raises(LedgerError, match="never written over"):
        restore(lines)


def test_what_can_be_read_of_a_damaged_ledger_is_salvaged(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    journal = begun(path)
    journal.append(*a_round(1))
    lines = journal.lines()
    journal.close()
    tampered(path, ("UPDATE record SET line = x'00' WHERE seq = 8", ()), ("DELETE FROM checkpoint", ()))

    assert salvage(path) == lines[:7]
    assert salvage(tmp_path / "absent") == []
    Journal.restore(tmp_path / "restored.db", salvage(path), identity=SITE, reason="Damaged.", by="IT", clock=Clock())


def test_a_new_ledger_for_a_lost_one_begins_with_its_loss_and_gives_no_budget(tmp_path: Path) -> None:
    clock = Clock()
    journal = Journal.create(tmp_path / "ledger.db", site="St. Anna", identity=SITE, clock=clock, lost=LOST)

    journal.append(policy(), account())
    journal.append(data_set(registered=""), persons={"1": PERSONS})
    journal.append(approval(ledger=journal.book.ledger, recovery=journal.book.recovery, expires="2029-01-01T00:00:00Z"))

    with pytest.raises(Refused, match="is not enough"):
        journal.append(reserve(1))
    clock.now += 365 * DAY_S
    journal.append(renewal(ledger=journal.book.ledger, recovery=journal.book.recovery))
    journal.append(reserve(1))
    assert opened(tmp_path / "ledger.db", clock=clock).book.accounts["1"].period == 2


def test_two_ledgers_never_have_the_same_id(tmp_path: Path) -> None:
    ids = {Journal.create(None, site="St. Anna", identity=SITE).book.ledger for _ in range(4)}

    assert len(ids) == 4


def test_a_journal_shows_where_it_lies_and_nothing_of_what_is_in_it(tmp_path: Path) -> None:
    assert repr(begun(tmp_path / "ledger.db")) == f"<Journal of {tmp_path / 'ledger.db'}: 5 records>"
    assert repr(begun()) == "<Journal of memory: 5 records>"


@pytest.fixture(autouse=True)
def _no_part_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.glob("*.part"))
    assert not list(tmp_path.glob(".*.part*"))
