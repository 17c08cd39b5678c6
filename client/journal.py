"""The ledger on a site's disk: one SQLite file, in which the gate's decision and its record are one transaction.

Records are only ever added. Whoever adds one holds SQLite's write lock, takes in what other processes added meanwhile, asks
`ledger.Book`, writes the record and the newly signed checkpoint, and returns when both are on disk. A crash at any moment
leaves all of it or nothing.

Beside the records lie tables that never leave the site. `person` says which account each person belongs to, by keyed
hashes; `member` who was ever in which data set. Each data set's newest record holds a digest over its persons, so that a
table that was lost or changed is noticed before it could give anybody a fresh budget. `evidence` holds what was measured
in a round, sealed by the caller.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import secrets
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Self

from confide.common.checkpoint import Checkpoint, read_short
from confide.common.crypto import Identity
from confide.common.disk import sync_folder
from confide.common.entries import (
    LATEST,
    Bind,
    Commit,
    DataSet,
    Entry,
    Forfeit,
    Genesis,
    Mask,
    Recovered,
    Refund,
    Rotation,
)
from confide.common.errors import LedgerError, MessageError, Refused, UsageError
from confide.common.export import write_export
from confide.common.ledger import Book, verify
from confide.common.merkle import leaf_hash

SCHEMA_VERSION: Final = 1
HASH_BYTES: Final = 32
_APPLICATION: Final = 0x43464C31  # marks the file as a ledger of ours
_SCHEMA: Final = (
    "CREATE TABLE record (seq INTEGER PRIMARY KEY, line BLOB NOT NULL)",
    "CREATE TABLE checkpoint (one INTEGER PRIMARY KEY CHECK (one = 1), short TEXT NOT NULL)",
    "CREATE TABLE person (hash BLOB PRIMARY KEY, account TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE member (data TEXT NOT NULL, hash BLOB NOT NULL, PRIMARY KEY (data, hash)) WITHOUT ROWID",
    "CREATE TABLE evidence (seq INTEGER PRIMARY KEY, run TEXT NOT NULL, round INTEGER NOT NULL, sealed BLOB NOT NULL)",
    "CREATE INDEX evidence_of ON evidence (run, round)",
    "CREATE TRIGGER record_stays BEFORE UPDATE ON record BEGIN SELECT RAISE(ABORT, 'records are only added'); END",
    "CREATE TRIGGER record_is_kept BEFORE DELETE ON record BEGIN SELECT RAISE(ABORT, 'records are only added'); END",
)
_PERSONS_FORMAT: Final = b"confide-persons/1\n"
_ACCOUNT_BYTES: Final = 8
# How long a training took depends on who was drawn, so what ends it bears the time of the record before.
_UNTIMED: Final = (Bind, Mask, Forfeit, Refund)
_RECOVER: Final = "Nothing may be trained on it. Keep the file, and take up an export or an earlier copy with: confide site ledger recover"


class Journal:
    """A site's ledger, open for writing. Make one with `create`, `open` or `restore`.

    Several processes may have it open; each is told what the others wrote when it writes or calls `sync`. Threads of one
    process wait for each other.

    Attributes:
        book: What the records lead to, as of the last `sync` or `append`. It is for reading only.
        path: The file; None if the ledger is in memory only.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        *,
        path: Path | None,
        identity: Identity,
        clock: Callable[[], float],
        wait_s: float,
        read: "_Read",
    ) -> None:
        self.book: Final = read.book
        self.path: Final = path
        self._connection = connection
        self._identity = identity
        self._clock = clock
        self._wait_s = wait_s
        self._checkpoint = read.checkpoint
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._file = None if path is None else _files(path)
        self._broken = ""  # why nothing more may be appended

    @classmethod
    def create(
        cls,
        path: Path | None,
        *,
        site: str,
        identity: Identity,
        clock: Callable[[], float] = time.time,
        wait_s: float = 10.0,
        lost: Recovered | None = None,
    ) -> Self:
        """Return a new ledger, with its genesis on disk.

        Args:
            path: Where it is to lie, in a directory that exists; nothing may be there. None keeps it in memory only.
            site: The site's name.
            identity: Signs its checkpoints.
            clock: Gives the time, in seconds since 1970.
            wait_s: How long to wait for another process that writes.
            lost: If the site had a ledger before that is gone: what is known of it. Every account that is opened in the new
                one then counts as fully spent until it is renewed.

        Raises:
            LedgerError: There is something at `path`, or it cannot be written.
        """
        genesis = Genesis(ledger=secrets.token_hex(16), site=site, key=identity.public.hex(), software=software())
        entries: tuple[Entry, ...] = (genesis,) if lost is None else (genesis, lost)
        return cls._begin(path, (), entries, identity, clock, wait_s)

    @classmethod
    def open(
        cls, path: Path, *, identity: Identity, clock: Callable[[], float] = time.time, wait_s: float = 10.0
    ) -> Self:
        """Return the ledger at `path` after everything in it was verified.

        Args:
            path: The file.
            identity: The one whose key the ledger has in force.
            clock: Gives the time, in seconds since 1970.
            wait_s: How long to wait for another process that writes.

        Raises:
            LedgerError: There is no ledger, others may read it, it is damaged, its checkpoint does not hold, or its key is
                another.

        Guarantee: a record that was changed, left out or should not have been let in, and a table beside the records that
        was lost or changed, are found before the ledger is used.
        """
        _check_file(path)
        connection = _connect(path, wait_s)
        try:
            read = _read(connection, path)
            if identity.public != read.book.key:
                raise LedgerError(
                    f"The ledger {path} is signed by the key {read.book.key.hex()[:16]}…; this site's identity is "
                    f"{identity.public.hex()[:16]}…. Use the identity that the ledger was last rotated to."
                )
            return cls(connection, path=path, identity=identity, clock=clock, wait_s=wait_s, read=read)
        except BaseException:
            connection.close()
            raise

    @classmethod
    def restore(
        cls,
        path: Path,
        lines: Sequence[bytes],
        *,
        identity: Identity,
        reason: str,
        by: str,
        checkpoint: Checkpoint | None = None,
        lost: Checkpoint | None = None,
        rotations: Sequence[Rotation] = (),
        clock: Callable[[], float] = time.time,
        wait_s: float = 10.0,
    ) -> Self:
        """Return a ledger that goes on from an export, or from what `salvage` found, with every account fully spent.

        What came after the export is lost, and so is who was in which account. So all approvals are void, every data set
        must be registered again, and no account has budget, those that are opened later included, until it is renewed.

        Args:
            path: Where it is to lie; nothing may be there.
            lines: The export's records, without line breaks.
            identity: The one whose key the ledger had in force at the end of these records, or of `rotations`.
            reason: What happened.
            by: Who says so.
            checkpoint: The export's.
            lost: The newest that a peer or the server saw of this ledger, if it is known.
            rotations: What leads from the key in force at the end of these records to the present one. They are recorded
                again, before the recovery.
            clock: Gives the time, in seconds since 1970.
            wait_s: How long to wait for another process that writes.

        Raises:
            LedgerError: The records do not hold, are not those the checkpoints stand for, or are another key's; the rotations
                do not follow on them; or there is something at `path`, or it cannot be written.
        """
        book = verify(lines, checkpoint)
        size, root = book.size, book.root
        if lost is not None and lost.ledger != book.ledger:
            raise LedgerError(f"The lost checkpoint is of the ledger {lost.ledger}, the export of {book.ledger}.")
        if lost is not None and lost.size <= book.size:
            verify(lines, lost)
        try:
            for rotation in rotations:
                book.record(rotation, book.at)
        except Refused as error:
            raise LedgerError(f"The changes of keys that are kept do not follow on the export. {error}") from None
        if identity.public != book.key:
            raise LedgerError(
                f"The export's ledger is signed by the key {book.key.hex()[:16]}…; the identity given is "
                f"{identity.public.hex()[:16]}…. Give the identity that was in force at its end."
            )
        known = (size, root) if lost is None else max((size, root), (lost.size, lost.root))
        recovered = Recovered(recovery=secrets.token_hex(16), size=known[0], root=known[1].hex(), reason=reason, by=by)
        return cls._begin(path, lines, (*rotations, recovered), identity, clock, wait_s)

    @staticmethod
    def look(path: Path) -> Book:
        """Return what a ledger's records lead to, without a key and without writing; everything is verified as in `open`.

        Raises:
            LedgerError: As for `open`.
        """
        return Journal.look_through(path)[0]

    @staticmethod
    def look_through(path: Path) -> tuple[Book, list[bytes]]:
        """Return what `look` does, and with it all records, without line breaks: both of one moment, read once.

        Raises:
            LedgerError: As for `open`.
        """
        _check_file(path)
        lines: list[bytes] = []
        with contextlib.closing(_connect(path, 10.0, write=False)) as connection:
            return _read(connection, path, lines).book, lines

    def __repr__(self) -> str:
        return f"<Journal of {self.path or 'memory'}: {self.book.size} records>"

    def append(
        self,
        *entries: Entry,
        persons: Mapping[str, Iterable[bytes]] | None = None,
        evidence: bytes | None = None,
    ) -> tuple[Entry, ...]:
        """Return what was recorded, once it is on disk, the checkpoint over it included: all of the entries or none.

        What an entry leaves open is filled in: accounts and spent of a Reserve or Release, registered of a DataSet. A
        seeded simulation's repetition of a Reserve is not recorded again.

        Args:
            *entries: What to record, in this order; each must be allowed after those before it.
            persons: With one DataSet: keyed hashes of its persons, 32 bytes each, by the account that those join who belong
                to none yet. Those who do stay where they are, in an account that the data set must charge.
            evidence: With one Commit that names evidence: what was measured, sealed.

        Raises:
            Refused: A rule forbids it, and says which. Nothing was recorded.
            LedgerError: Another process keeps the ledger longer than wait_s, or it cannot be written, or it was changed from
                outside. Nothing may be done on the word of these entries. If it is not known whether they were recorded,
                nothing more is until the ledger is opened anew.
            UsageError: `persons` or `evidence` is given without the one entry it belongs to.

        Guarantee: gate and record are one transaction, on disk before this returns; a crash leaves all of it or nothing.
        """
        return self._append(entries, persons, evidence, self._identity)

    def rotate(self, identity: Identity) -> None:
        """Return once the ledger is signed by another identity; both sign that it is.

        Raises:
            LedgerError: As for `append`.
            Refused: It is the same identity.
        """
        with self._lock:
            self._append((Rotation.between(self.book.ledger, self._identity, identity),), None, None, identity)
            self._identity = identity

    def sync(self) -> None:
        """Take in what other processes appended.

        Raises:
            LedgerError: What they appended does not hold, or the file was replaced.
        """
        with self._lock:
            self._check_usable()
            try:
                self._execute("BEGIN")
                self._take_in()
            finally:
                self._roll_back()

    def checkpoint(self) -> Checkpoint:
        """Return the checkpoint over all records of `book`, signed by the site."""
        return self._checkpoint

    def lines(self) -> list[bytes]:
        """Return all records of `book`, without line breaks."""
        with self._lock, self._told():
            rows = self._connection.execute("SELECT line FROM record WHERE seq <= ? ORDER BY seq", (self.book.size,))
            return [bytes(line) for (line,) in rows]

    def export(self, path: Path) -> None:
        """Write all records of `book` and the checkpoint over them to a file that `export.read_export` reads.

        Raises:
            UsageError: The file cannot be written.
            LedgerError: The ledger cannot be read.
        """
        with self._lock:
            write_export(path, self.lines(), self._checkpoint, self.book.key)

    def accounts_of(self, hashes: Iterable[bytes]) -> frozenset[str]:
        """Return the accounts that any of these persons belongs to, by keyed hashes of 32 bytes."""
        with self._lock, self._told():
            found = (
                self._connection.execute("SELECT account FROM person WHERE hash = ?", (person,)).fetchone()
                for person in hashes
            )
            return frozenset(row[0] for row in found if row is not None)

    def shares(self, data: str, hashes: Iterable[bytes]) -> bool:
        """Return whether any of these persons or rows is or was in a data set, by keyed hashes of 32 bytes."""
        with self._lock, self._told():
            return any(
                self._connection.execute("SELECT 1 FROM member WHERE data = ? AND hash = ?", (data, person)).fetchone()
                for person in hashes
            )

    def overlap(self, data: str, other: str) -> bool:
        """Return whether two data sets have or had a person or a row in common."""
        with self._lock, self._told():
            found = self._connection.execute(
                # CROSS JOIN keeps the order, so that each of the first is looked up among the second by the primary key.
                "SELECT 1 FROM member AS one CROSS JOIN member AS two ON two.hash = one.hash "
                "WHERE one.data = ? AND two.data = ? LIMIT 1",
                (data, other),
            )
            return found.fetchone() is not None

    def evidence(self, run: str, number: int) -> bytes | None:
        """Return what was measured in a round, as it was sealed, or None if nothing was kept."""
        with self._lock, self._told():
            row = self._connection.execute(
                "SELECT sealed FROM evidence WHERE run = ? AND round = ? ORDER BY seq DESC LIMIT 1", (run, number)
            ).fetchone()
            return None if row is None else bytes(row[0])

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._broken = self._broken or "It was closed."
            self._connection.close()

    @classmethod
    def _begin(
        cls,
        path: Path | None,
        lines: Sequence[bytes],
        entries: tuple[Entry, ...],
        identity: Identity,
        clock: Callable[[], float],
        wait_s: float,
    ) -> Self:
        """Return a new ledger that begins with `lines`, whole or not at all."""
        if path is None:
            connection = _connect(None, wait_s)
            _fill(connection, lines, entries, identity, clock)
            return cls(
                connection, path=None, identity=identity, clock=clock, wait_s=wait_s, read=_read(connection, None)
            )
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
        try:
            os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW, 0o600))
            with contextlib.closing(_connect(draft, wait_s)) as connection:
                _fill(connection, lines, entries, identity, clock)
            descriptor = os.open(draft, os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.link(draft, path)  # unlike a rename, it never takes another ledger's place
        except FileExistsError:
            raise LedgerError(
                f"There is a file at {path} already; a ledger is never written over. Open it, or move it away and keep it."
            ) from None
        except OSError as error:
            raise LedgerError(
                f"The ledger {path} cannot be made: {error.strerror or error}. Mend that, and try again."
            ) from None
        except sqlite3.Error as error:
            raise LedgerError(_why(error, path, wait_s)) from None
        finally:
            for part in (draft, *_beside(draft)):
                part.unlink(missing_ok=True)
        sync_folder(path.parent)
        return cls.open(path, identity=identity, clock=clock, wait_s=wait_s)

    def _append(
        self,
        entries: tuple[Entry, ...],
        persons: Mapping[str, Iterable[bytes]] | None,
        evidence: bytes | None,
        signer: Identity,
    ) -> tuple[Entry, ...]:
        _check_belongings(entries, persons, evidence)
        with self._lock:
            self._check_usable()
            try:
                self._execute("BEGIN IMMEDIATE")
                self._take_in()
                with self.book.trial():
                    recorded = self._record(entries, persons, evidence)
                    if not recorded:
                        return ()
                    if signer.public != self.book.key:
                        raise LedgerError(
                            f"The ledger {self.path or ''} is now signed by the key {self.book.key.hex()[:16]}…, and this process has "
                            f"{signer.public.hex()[:16]}…. Start it anew with the identity in force; rotate with: confide site key rotate"
                        )
                    checkpoint = _signed(self.book, signer)
                    self._execute("INSERT OR REPLACE INTO checkpoint VALUES (1, ?)", checkpoint.short())
                    self._commit()
                self._checkpoint = checkpoint
            finally:
                self._roll_back()
            return recorded

    def _record(
        self, entries: tuple[Entry, ...], persons: Mapping[str, Iterable[bytes]] | None, evidence: bytes | None
    ) -> tuple[Entry, ...]:
        """Put the entries into the open transaction, and into the book, and return them complete."""
        now, recorded = _now(self._clock, self.book.at), list[Entry]()
        for entry in entries:
            if self.book.repeats(entry):
                continue
            due = self._registered(entry, persons) if isinstance(entry, DataSet) else entry
            line = self.book.record(due, self.book.at if isinstance(due, _UNTIMED) else now)
            self._execute("INSERT INTO record VALUES (?, ?)", self.book.size, line)
            if evidence is not None and isinstance(entry, Commit):
                row = (self.book.size, entry.run, entry.round, evidence)
                self._execute("INSERT INTO evidence VALUES (?, ?, ?, ?)", *row)
            recorded.append(self.book.last or due)
        return tuple(recorded)

    def _registered(self, entry: DataSet, persons: Mapping[str, Iterable[bytes]] | None) -> DataSet:
        """Put the persons into their tables, and return the entry with the digest of all who were ever in the data set."""
        for account, hashes in (persons or {}).items():
            if account not in self.book.accounts:
                raise Refused(f"Persons were to join the account {account}, which is not open.", "data")
            for person in hashes:
                if type(person) is not bytes or len(person) != HASH_BYTES:
                    raise UsageError(f"A person's keyed hash has {HASH_BYTES} bytes; one of another form was given.")
                self._execute("INSERT OR IGNORE INTO person VALUES (?, ?)", person, account)
                self._execute("INSERT OR IGNORE INTO member VALUES (?, ?)", entry.data, person)
        with self._told():
            digest, accounts = _persons_of(self._connection, entry.data, self.path)
        if beyond := accounts - set(entry.accounts):
            raise Refused(
                f"The data set {entry.data!r} would charge the accounts ({', '.join(entry.accounts)}), but persons who are or were "
                f"in it belong to ({', '.join(sorted(beyond, key=int))}) too. Charge these as well.",
                "data",
            )
        if entry.registered not in {"", digest}:
            raise Refused(
                f"The data set {entry.data!r} was given with the digest {entry.registered[:16]}… of its persons; theirs is "
                f"{digest[:16]}…. Leave it empty: the journal fills it in.",
                "data",
            )
        return dataclasses.replace(entry, registered=digest)

    def _take_in(self) -> None:
        """Take in what others appended, within a transaction."""
        book = self.book
        try:
            with self._told():
                rows = self._connection.execute(
                    "SELECT seq, line FROM record WHERE seq >= ? ORDER BY seq", (book.size,)
                )
                seq, line = rows.fetchone() or (0, b"")
                if seq != book.size or f"sha256:{leaf_hash(line).hex()}" != book.head:
                    raise LedgerError(
                        f"The ledger {self.path or ''} no longer holds the record {book.size} that this process knows: the file "
                        f"was put back or changed. {_RECOVER}"
                    )
                fresh = False
                for seq, line in rows:
                    _take(book, seq, line)
                    fresh = True
                if fresh:
                    self._checkpoint = _stored(self._connection, book, self.path)
        except LedgerError as error:
            self._broken = self._broken or str(error)
            raise

    def _commit(self) -> None:
        self._broken = "The last write was interrupted, and it is not known whether it is on disk."
        try:
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            if _is(error, "SQLITE_FULL", "SQLITE_BUSY"):
                self._broken = ""  # SQLite has undone it
                raise LedgerError(_why(error, self.path, self._wait_s)) from None
            raise LedgerError(
                f"{_why(error, self.path, self._wait_s)} Whether it was recorded shows when the ledger is opened anew."
            ) from None
        self._broken = ""

    def _roll_back(self) -> None:
        if self._connection.in_transaction:
            try:
                self._connection.execute("ROLLBACK")
            except sqlite3.Error as error:
                self._broken = self._broken or _why(error, self.path, self._wait_s)

    def _check_usable(self) -> None:
        if self._broken:
            raise LedgerError(
                f"The ledger {self.path or 'in memory'} cannot be used any more. {self._broken} Open it anew."
            )
        if os.getpid() != self._process:
            raise LedgerError(
                "A ledger cannot be used by a process that was forked from the one that opened it. Open it there."
            )
        if self.path is not None and _files(self.path) != self._file:
            self._broken = f"The file {self.path}, or the -wal beside it, was removed or replaced while it was open."
            raise LedgerError(f"{self._broken} {_RECOVER}")

    def _execute(self, statement: str, *values: object) -> None:
        with self._told():
            self._connection.execute(statement, values)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Say what an error of SQLite's means for a ledger."""
        try:
            yield
        except sqlite3.Error as error:
            said = _why(error, self.path, self._wait_s)
            if not _is(error, "SQLITE_FULL", "SQLITE_BUSY"):
                self._broken = self._broken or said
            raise LedgerError(said) from None


def salvage(path: Path) -> list[bytes]:
    """Return the first records of a damaged ledger, as many as can be read and hold; pass them to `Journal.restore`.

    There may be none. What was signed is not looked at: a recovery counts everything as spent.
    """
    book, lines = Book(), []
    with contextlib.suppress(LedgerError, sqlite3.Error, OSError):
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        with contextlib.closing(connection):
            for seq, line in connection.execute("SELECT seq, line FROM record ORDER BY seq"):
                _take(book, seq, line)
                lines.append(line)
    return lines


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """A ledger's file after all in it was verified."""

    book: Book
    checkpoint: Checkpoint


def _read(connection: sqlite3.Connection, path: Path | None, lines: list[bytes] | None = None) -> _Read:
    """Return what a ledger's file holds, all from one moment; its records are put into `lines`, if that is given.

    Raises:
        LedgerError: Any of it does not hold.
    """
    book, kept = Book(), set[int]()
    try:
        connection.execute("BEGIN")
        _check_schema(connection, path)
        for seq, line in connection.execute("SELECT seq, line FROM record ORDER BY seq"):
            entry = _take(book, seq, line)
            if lines is not None:
                lines.append(line)
            if isinstance(entry, Commit) and entry.evidence:
                kept.add(seq)
        if not book.size:
            raise LedgerError(f"The ledger {path or ''} has no record at all. {_RECOVER}")
        checkpoint = _stored(connection, book, path)
        for data, entry in book.data_sets.items():
            if data in book.lost_data_sets:
                continue
            digest, accounts = _persons_of(connection, data, path)
            if digest != entry.registered or not accounts <= set(entry.accounts):
                raise LedgerError(
                    f"The persons of the data set {data!r} in {path or 'the ledger'} are not those that were registered, so who "
                    f"has spent what is not known. {_RECOVER}"
                )
        if any(seq not in kept for (seq,) in connection.execute("SELECT seq FROM evidence")):
            raise LedgerError(f"The ledger {path or ''} holds evidence of a round that committed to none. {_RECOVER}")
        connection.execute("ROLLBACK")
    except sqlite3.Error as error:
        raise LedgerError(_why(error, path, 0)) from None
    return _Read(book=book, checkpoint=checkpoint)


def _check_schema(connection: sqlite3.Connection, path: Path | None) -> None:
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    found = {row[0] for row in connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
    if application != _APPLICATION or found == set():
        raise LedgerError(f"{path} is not a ledger of Confide's. Give the site's own. {_RECOVER}")
    if version != SCHEMA_VERSION:
        raise LedgerError(
            f"The ledger {path} is of the schema version {version}; this software reads {SCHEMA_VERSION}. Use the version of "
            "Confide that wrote it."
        )
    if found != set(_SCHEMA):
        raise LedgerError(f"The tables of the ledger {path} are not those it was made with. {_RECOVER}")


def _take(book: Book, seq: object, line: object) -> Entry:
    if type(line) is not bytes or seq != book.size + 1:
        raise LedgerError(f"Record {book.size + 1} of the ledger is missing. {_RECOVER}")
    return book.take(line)


def _stored(connection: sqlite3.Connection, book: Book, path: Path | None) -> Checkpoint:
    """Return the checkpoint that is kept beside the records, after it was found to stand for them."""
    row = connection.execute("SELECT short FROM checkpoint").fetchone()
    try:
        checkpoint = read_short(row[0] if row is not None and type(row[0]) is str else "")
    except MessageError:
        raise LedgerError(f"The checkpoint in the ledger {path or ''} is missing or damaged. {_RECOVER}") from None
    book.agree(checkpoint)
    return checkpoint


def _signed(book: Book, identity: Identity) -> Checkpoint:
    return Checkpoint.sign(book.ledger, book.size, book.root, book.charges, identity)


def _persons_of(connection: sqlite3.Connection, data: str, path: Path | None) -> tuple[str, set[str]]:
    """Return the digest over all persons who were ever in a data set, with their accounts, and these accounts.

    Hashes are keyed, so the digest tells nobody who is among them: SHA-256 over the format and, sorted by hash, each
    person's hash and the number of her account in 8 bytes.
    """
    digest, accounts = hashlib.sha256(_PERSONS_FORMAT), dict[str, bytes]()
    for person, account in connection.execute(
        "SELECT member.hash, person.account FROM member LEFT JOIN person ON person.hash = member.hash "
        "WHERE member.data = ? ORDER BY member.hash",
        (data,),
    ):
        number = accounts.get(account)
        if number is None:
            if type(account) is not str or not account.isdecimal() or not 0 < int(account) < 2 ** (8 * _ACCOUNT_BYTES):
                raise LedgerError(
                    f"A person of the data set {data!r} in {path or 'the ledger'} has no account. {_RECOVER}"
                )
            number = accounts[account] = int(account).to_bytes(_ACCOUNT_BYTES)
        digest.update(person + number)
    return digest.hexdigest(), set(accounts)


def _fill(
    connection: sqlite3.Connection,
    lines: Sequence[bytes],
    entries: tuple[Entry, ...],
    identity: Identity,
    clock: Callable[[], float],
) -> None:
    """Make the tables, and put in the first records and the checkpoint over them, in one transaction."""
    book = Book()
    connection.execute("BEGIN IMMEDIATE")
    for statement in _SCHEMA:
        connection.execute(statement)
    for line in lines:
        book.take(line)
        connection.execute("INSERT INTO record VALUES (?, ?)", (book.size, line))
    at = _now(clock, book.at)
    for entry in entries:
        line = book.record(entry, at)
        connection.execute("INSERT INTO record VALUES (?, ?)", (book.size, line))
    connection.execute("INSERT INTO checkpoint VALUES (1, ?)", (_signed(book, identity).short(),))
    connection.execute(f"PRAGMA application_id = {_APPLICATION}")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.execute("COMMIT")


def _connect(path: Path | None, wait_s: float, *, write: bool = True) -> sqlite3.Connection:
    """Return a connection to a file that exists, or to memory, that has each commit on disk before it returns."""
    where = ":memory:" if path is None else f"{path.absolute().as_uri()}?mode={'rw' if write else 'ro'}"
    try:
        connection = sqlite3.connect(where, uri=True, isolation_level=None, timeout=wait_s, check_same_thread=False)
        try:
            connection.execute("PRAGMA trusted_schema = OFF")
            if write:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
        except BaseException:
            connection.close()
            raise
    except sqlite3.Error as error:
        raise LedgerError(_why(error, path, wait_s)) from None
    return connection


def _check_file(path: Path) -> None:
    """Return if the file is there, a file, and its owner's alone."""
    try:
        found = path.lstat()
    except OSError as error:
        raise LedgerError(
            f"There is no ledger at {path}: {error.strerror or error}. A new site makes one with: confide site init. If there was "
            "one: confide site ledger recover"
        ) from None
    if not stat.S_ISREG(found.st_mode) or any(part.is_symlink() for part in _beside(path)):
        raise LedgerError(f"{path} is not a file, or leads elsewhere by a link. Put the ledger itself there.")
    if found.st_mode & 0o077:
        raise LedgerError(
            f"Others may read or change the ledger {path} (mode {found.st_mode & 0o777:03o}). Do: chmod 600 {path}"
        )


def _check_belongings(
    entries: tuple[Entry, ...], persons: Mapping[str, Iterable[bytes]] | None, evidence: bytes | None
) -> None:
    if persons is not None and sum(isinstance(entry, DataSet) for entry in entries) != 1:
        raise UsageError("Persons are registered together with one data set; give its entry, and no second one.")
    if evidence is not None and sum(isinstance(entry, Commit) and entry.evidence != "" for entry in entries) != 1:
        raise UsageError("Evidence is kept together with one commit that holds its keyed digest; give that.")


def _now(clock: Callable[[], float], last: int) -> int:
    """Return the time in whole seconds; where the clock was put back, that of the last record."""
    now = clock()
    if not now <= LATEST:  # not a number is not, either
        raise LedgerError(
            f"The clock shows {now:g} seconds since 1970, which is after the year 9999. Set this machine's clock."
        )
    return last if now < last else math.floor(now)


def _why(error: sqlite3.Error, path: Path | None, wait_s: float) -> str:
    where = path or "in memory"
    if _is(error, "SQLITE_BUSY", "SQLITE_LOCKED"):
        return f"Another process has held the ledger {where} for {wait_s:g} seconds. Nothing was recorded; try again later."
    if _is(error, "SQLITE_FULL"):
        return f"There is no room on the disk for the ledger {where}. Nothing was recorded; make room, and try again."
    if _is(error, "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_AUTH"):
        return f"The ledger {where} cannot be written. See that file and directory are this user's and the disk takes writes."
    if _is(error, "SQLITE_IOERR"):
        return f"The disk reports an error for the ledger {where} ({_name(error)}). Mend it, then start anew."
    return f"The ledger {where} is damaged ({_name(error)}). {_RECOVER}"


def _is(error: sqlite3.Error, *names: str) -> bool:
    return any(_name(error) == name or _name(error).startswith(f"{name}_") for name in names)


def _name(error: sqlite3.Error) -> str:
    """Return SQLite's name for what went wrong; Python's own refusals have none."""
    return str(getattr(error, "sqlite_errorname", type(error).__name__))


def _files(path: Path) -> tuple[tuple[int, int] | None, ...]:
    """Return which files an open ledger is. Without its log the newest records are lost, and a second writer keeps none out."""
    return tuple(map(_identified, (path, *_beside(path)[:2])))


def _identified(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _beside(path: Path) -> tuple[Path, ...]:
    return tuple(path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal"))


@functools.cache
def software() -> str:
    """Return what a record says of who wrote it."""
    from importlib.metadata import version

    return f"confide {version('confide')}"
