"""A site's data sets: registered, checked, corrected, withdrawn from and removed, always under the budget of their persons.

What the ledger says of a data set holds. Beside it lie two small files for each, which only this site can use: where the
table is, and, sealed, who took back her consent. Neither may be older than the ledger: a path is taken up only if the
table there is the one that was registered, and a list of those who withdrew only if it is as new as the last version.

Who withdrew from one data set is left out of every table that is registered after it, whatever that is called; a table in
which she could not be found is refused.
"""

import contextlib
import dataclasses
import difflib
import os
import re
import tomllib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Final

from confide.client.home import read_private, replace_private
from confide.client.journal import Journal
from confide.client.mechanism import Randomness
from confide.client.persons import (
    DIGEST_BYTES,
    SAME_PERSONS,
    Persons,
    accounts_for,
    person_digest,
    read_persons,
)
from confide.client.persons import declared as rounded
from confide.client.policy import Metrics
from confide.client.readiness import Check, LabelHistogram, check_unit, examine, label_histogram
from confide.client.table import table_columns
from confide.common.crypto import derive, seal_bytes, unseal_bytes
from confide.common.disk import lock
from confide.common.entries import AccountOpened, DataSet
from confide.common.errors import DataError, Refused, SealError, UsageError
from confide.common.filter import Filter, order_for
from confide.common.plan import Plan
from confide.common.settings import read_section, setting, shown, toml_value
from confide.common.spend import Spend
from confide.common.wording import command

FORMAT: Final = "confide-data/1"
NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")  # it becomes a file's name
MOST_WITHDRAWN: Final = 10_000_000
_LARGEST_FILE_BYTES = 1 << 16
_LARGEST_LIST_BYTES = 1 << 29
_VERSION_BYTES = 8
_LIST = ".withdrawn"
_PERSONS, _SEAL = b"confide-registry/1 persons", b"confide-registry/1 withdrawn"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Current:
    """A data set as it may be used now: the table was found to be the registered one.

    Attributes:
        data: What the ledger says of it.
        path: The table.
        persons: Who is in it, those who withdrew included.
        left_out: The numbers, from 1, of the rows that must not be used: their persons took back their consent.
    """

    data: DataSet
    path: Path
    persons: Persons
    left_out: frozenset[int]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Withdrawal:
    """What a withdrawal did; the numbers stay at the site.

    Attributes:
        data: The version it made, or the newest if it made none.
        persons: How many persons it named.
        before: How many of them had withdrawn from the data set already.
        unknown: How many of them are in none of the tables that were ever registered here. They are left out as well,
            should they come.
        others: The other data sets in use from which some of them did not withdraw, and in which they are or were.
        unnamed: The other data sets in use that have rows of this one and no column of persons: whoever is in one of them
            cannot be told there.
    """

    data: DataSet
    persons: int
    before: int = 0
    unknown: int
    others: tuple[str, ...] = ()
    unnamed: tuple[str, ...] = ()


class Registry:
    """The data sets of one site.

    Args:
        folder: Where the two files of each data set lie; mode 0700.
        journal: The site's ledger.
        secret: 32 bytes of the site's own that never change: with others nobody would be recognised.
    """

    def __init__(self, folder: Path, journal: Journal, secret: bytes) -> None:
        self._folder = folder
        self._journal = journal
        self._person_key = derive(secret, _PERSONS)
        self._seal_key = derive(secret, _SEAL)

    def __repr__(self) -> str:
        return f"<Registry in {self._folder}>"

    @property
    def person_key(self) -> bytes:
        """The key of the persons' digests, 32 bytes; secret. Whoever reads rows needs it to leave out who withdrew."""
        return self._person_key

    def add(
        self,
        name: str,
        table: Path,
        person_id: str | None = None,
        ids: str = SAME_PERSONS,
        declared: int | None = None,
        *,
        typical: Spend | None = None,
        fewest: int = 1,
    ) -> DataSet:
        """Register a table, or the next version of one, and return what the ledger now says of it.

        Its persons are looked for among all that were ever registered here. The data set charges the accounts of those
        who are found and of its earlier versions; the others join the first of these. If there are none an account is
        opened with the epsilon and delta of the policy in force. An unchanged table makes no version; only its path is noted.

        Those of its persons who withdrew from any other data set have withdrawn from this one from here on.

        Args:
            name: What it is called: 1 to 63 of a-z, 0-9 and -.
            table: A file or directory that `read_table` knows.
            person_id: The column that says whose row it is, as plans must name it; None makes each row a person.
            ids: The namespace of identifiers and rows: equal ones are the same person's within it, and not across.
            declared: How many persons the site makes public; the count to two leading digits, rounded down, if absent.
            typical: A spend of the usual kind, for which a new account's Rényi order is chosen.
            fewest: How many persons it must be declared with at least.

        Raises:
            UsageError: A name is malformed, `declared` is not to two digits, above the count, or above what a running plan
                was approved with; or persons withdrew, from this data set or from another whose rows the table has, by a
                column or namespace by which they would not be found in it.
            DataError: The table cannot be read, lacks the column, or has no person left.
            Refused: It would be declared with fewer persons than `fewest`, no policy is in force, or the ledger does not allow
                it.
            SealError: A list of those who withdrew, be it another data set's, is missing, damaged or older than the ledger.

        Guarantee: every person's account is charged, whatever the data set is called and whichever version it is. Whoever
        withdrew from one data set is left out of every table that is registered afterwards, whatever it is called.
        """
        _check_name("data set", name)
        _check_name("namespace", ids)
        place = _Place(path=_spelled(table), column=person_id or "", ids=ids, version=1)
        try:
            persons = read_persons(table, person_id, self._person_key, ids)
        except DataError:
            _check_person_id(table, person_id)
            raise
        with self._alone():
            before = self._journal.book.data_sets.get(name)
            own = self._withdrawn(name, before)
            if own and before is not None and (before.person_id, before.ids) != (place.column, ids):
                raise _not_found(before, name, place)
            elsewhere = self._elsewhere(name)
            for other, gone in elsewhere.items():
                self._check_found(other, gone, persons, name, place)
            withdrawn = own | frozenset().union(*elsewhere.values()).intersection(persons.known_by())
            entry = DataSet(
                data=name,
                version=before.version + 1 if before is not None else 1,
                event="change" if self._is_current(name) else "add",
                fingerprint=persons.fingerprint,
                declared_persons=self._declared(before, persons.besides(withdrawn), declared),
                person_id=place.column,
                ids=ids,
                accounts=(),
            )
            if before is not None and entry.event == "change" and withdrawn == own and _equal(entry, before, declared):
                self._note(before, place)
                return before
            if entry.declared_persons < fewest:
                raise Refused(
                    f"{name!r} would be declared with {entry.declared_persons} persons; the policy's [privacy] fewest_persons asks for "
                    f"{fewest}, so no plan could use it. Give more data, or change the policy if you mean to allow fewer.",
                    "data",
                )
            charged = accounts_for(
                self._journal.accounts_of(persons.known_by()),
                before.accounts if before is not None else (),
                unused=str(len(self._journal.book.accounts) + 1),
            )
            opened = (self._opening(charged.joined, typical),) if charged.opened else ()
            self._keep_withdrawn(name, entry.version, withdrawn)
            self._journal.append(
                *opened,
                dataclasses.replace(entry, accounts=charged.accounts),
                persons={charged.joined: persons.known_by()},
            )
            recorded = self._journal.book.data_sets[name]
            self._note(recorded, place)
            return recorded

    def current(self, name: str) -> Current:
        """Return a data set as it may be used now, after its whole table was read and compared with the ledger.

        Raises:
            Refused: It is not registered, or its table is not the one that was.
            DataError: The table cannot be read.
            SealError: The list of those who withdrew is missing, damaged or older than the ledger.
            UsageError: The file with the table's path is missing or damaged.
        """
        self._journal.sync()
        data = self._journal.book.data_set(name)
        withdrawn = self._withdrawn(name, data)
        place = self._place(name)
        persons = read_persons(Path(place.path), data.person_id or None, self._person_key, data.ids)
        if persons.fingerprint != data.fingerprint:
            raise Refused(
                f"The table {place.path} is not the one that was registered as version {data.version} of {name!r}. Look at what "
                "changed, and register it again: confide site data add",
                "data",
            )
        # The site may have been stopped after the ledger took a version and before this file did.
        self._note(data, place)
        return Current(data=data, path=Path(place.path), persons=persons, left_out=persons.rows_of(withdrawn))

    def check(self, name: str, plan: Plan, model: Path | None = None) -> Check:
        """Return what the data set holds as the plan reads it, for the steward alone; see `examine`.

        Raises:
            Refused: As for `current` and `check_unit`.
            DataError: The table cannot be read, or lacks a column of the plan's.
            ModelError: The base model's tokenizer is of no use for the plan's task.
            PlanError: The plan's max_tokens leaves no room for text.
            SealError: As for `current`.
            UsageError: As for `current`.
        """
        held = self.current(name)
        check_unit(held.data, plan)
        return examine(
            held.path,
            plan,
            declared_persons=held.data.declared_persons,
            left_out=held.left_out,
            repeated=held.persons.repeated,
            model=model,
        )

    def release_labels(
        self,
        name: str,
        plan: Plan,
        *,
        noise_multiplier: float,
        metrics: Metrics,
        randomness: Randomness | None = None,
    ) -> LabelHistogram:
        """Charge a noised histogram of the data set's labels to its accounts, and then return it; see `label_histogram`.

        Raises:
            Refused: As for `current`; or the policy or an account does not allow it.
            UsageError: As for `current`, or the plan's task has no labels.
            DataError: The table cannot be read, or lacks a column of the plan's.
            SealError: As for `current`.
            LedgerError: The ledger cannot be written.
        """
        held = self.current(name)
        return label_histogram(
            held.path,
            plan,
            held.data,
            self._journal,
            noise_multiplier=noise_multiplier,
            metrics=metrics,
            person_key=self._person_key,
            left_out=held.left_out,
            randomness=randomness,
        )

    def withdraw(self, name: str, identifiers: Iterable[str], *, anew: bool = False) -> Withdrawal:
        """Leave persons out of a data set from the next round on, in all versions to come as well, and record it.

        Tables that are registered from then on leave them out too, whatever they are called; data sets that are in use
        already are named in what is returned. Where all had withdrawn before, nothing is recorded. The list is on disk, sealed, before the ledger has the version. What was learned of them before stays learned, and
        stays under the bound that their account states; `docs/howto/data.md` says so to stewards.

        Args:
            name: The data set.
            identifiers: The persons', as in the table's column of persons; white space around them does not count, nor how accents are spelled.
            anew: The list was lost: these are all who ever withdrew. Without this word a lost list is an error.

        Raises:
            Refused: The data set is not registered, or the ledger does not allow it.
            UsageError: It has no column of persons, or nobody is named.
            SealError: The list of those who withdrew before is missing, damaged or older than the ledger.

        Guarantee: once the ledger has the version, no row of these persons is among those that may be used.
        """
        with self._alone():
            book = self._journal.book
            data = book.data_sets[name] if anew and name in book.data_sets else book.data_set(name)
            if not data.person_id:
                raise UsageError(
                    f"{name!r} has no column of persons, so nobody can be told by an identifier. Take the rows out of the "
                    "table, and register it again: confide site data add"
                )
            wanted = (identifier for identifier in identifiers if identifier.strip())
            named = {person_digest(self._person_key, data.ids, identifier) for identifier in wanted}
            if not named and not anew:
                raise UsageError(f"Nobody is named who withdraws from {name!r}. Give at least one identifier.")
            already = frozenset() if anew else self._withdrawn(name, data)
            withdrawn = named | already
            unknown = sum(not self._journal.accounts_of([person]) for person in named)
            others, unnamed = self._also_in(data, named)
            if not self._is_current(name):  # a list that was lost is needed before the data set can be registered again
                self._keep_withdrawn(name, data.version, withdrawn)
            elif anew or withdrawn != already:
                data = self._record(data, "withdraw", withdrawn)
            return Withdrawal(
                data=data,
                persons=len(named),
                before=len(named & already),
                unknown=unknown,
                others=others,
                unnamed=unnamed,
            )

    def remove(self, name: str) -> DataSet:
        """Take a data set out of use. Its persons, their accounts and who withdrew are kept; its table is not touched.

        Raises:
            Refused: It is not registered.
            UsageError: Another process is changing data sets.
            SealError: The list of those who withdrew is missing, damaged or older than the ledger.
        """
        with self._alone():
            data = self._journal.book.data_set(name)
            removed = self._record(data, "remove", self._withdrawn(name, data))
            self._file(name).unlink(missing_ok=True)
            return removed

    def excluded(self, name: str) -> frozenset[bytes]:
        """Return the hashes of all persons who withdrew from a data set.

        Raises:
            SealError: Their list is missing, damaged or older than the ledger.
        """
        self._journal.sync()
        return self._withdrawn(name, self._journal.book.data_sets.get(name))

    def left_out_by_others(self, name: str) -> tuple[int, tuple[str, ...]]:
        """Return how many persons who are or were in a data set withdrew from others, and so from this one, and from which.

        Raises:
            SealError: A list of those who withdrew is missing, damaged or older than the ledger.
        """
        own = self.excluded(name)
        here: dict[bytes, bool] = {}
        found = []
        for other, gone in self._elsewhere(name).items():
            for person in gone & own:
                here.setdefault(person, self._journal.shares(name, [person]))
            if any(here[person] for person in gone & own):
                found.append(other)
        return sum(here.values()), tuple(found)

    def _elsewhere(self, name: str) -> dict[str, frozenset[bytes]]:
        """Return who withdrew from every other data set: from those that the ledger knows, and by every list that is there."""
        book = self._journal.book
        lists = {path.name.removesuffix(_LIST) for path in self._folder.glob(f"*{_LIST}")}
        others = {*book.data_sets, *filter(NAME.fullmatch, lists)} - {name}
        return {other: self._withdrawn(other, book.data_sets.get(other)) for other in sorted(others)}

    def _check_found(self, other: str, gone: Collection[bytes], persons: Persons, name: str, place: "_Place") -> None:
        """Return if whoever withdrew from another data set would be found in a table that has rows of it.

        Raises:
            UsageError: She would not, or it cannot be known.
        """
        book = self._journal.book
        data, before = book.data_sets.get(other), book.data_sets.get(name)
        if not gone or data is None or data.ids != place.ids or data.person_id == place.column:
            return
        known = before is not None and (before.person_id, before.ids) == (place.column, place.ids)
        if other in book.lost_data_sets and not known:
            again = command("confide", "site", "data", "add", other, "TABLE", "--person-id", data.person_id)
            raise UsageError(
                f"Persons withdrew from {other!r} by the column {data.person_id!r}, and who was in it was lost with the ledger, so "
                f"it is not known whether this table has rows of theirs. Register {other!r} again first: {again}"
            )
        for person, row in _each_row(persons):
            # A row is known by its content, and its person only if she is called here as she is there.
            if person == bytes(DIGEST_BYTES) or not self._journal.shares(other, [row]):
                continue
            if person == row or not self._journal.shares(other, [person]):
                raise _not_found(data, name, place)

    def _also_in(self, data: DataSet, named: Collection[bytes]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the other data sets in use that hold these persons, and those that may hold them and cannot tell."""
        book = self._journal.book
        others = [other for name, other in book.data_sets.items() if other.ids == data.ids and self._is_current(name)]
        held, unnamed = [], []
        for other in others:
            if other.data == data.data:
                continue
            if not other.person_id:
                if self._journal.overlap(data.data, other.data):
                    unnamed.append(other.data)
                continue
            gone: Collection[bytes] = ()
            with contextlib.suppress(SealError):  # of a list that is lost the steward is told when it is needed
                gone = self._withdrawn(other.data, other)
            if self._journal.shares(other.data, (person for person in named if person not in gone)):
                held.append(other.data)
        return tuple(held), tuple(unnamed)

    def _record(self, data: DataSet, event: str, withdrawn: Collection[bytes]) -> DataSet:
        """Make the next version of a data set whose table stays; the list of those who withdrew is never behind it."""
        self._keep_withdrawn(data.data, data.version + 1, withdrawn)
        self._journal.append(dataclasses.replace(data, version=data.version + 1, event=event, registered=""))
        return self._journal.book.data_sets[data.data]

    def _is_current(self, name: str) -> bool:
        try:
            self._journal.book.data_set(name)
        except Refused:
            return False
        return True

    def _declared(self, before: DataSet | None, count: int, asked: int | None) -> int:
        """Return the number to declare; it does not rise while a plan runs that was approved with the one before."""
        if not count:
            raise DataError(
                "No person is left in the table to register. Check its column of persons, and who withdrew."
            )
        if asked is not None and not (1 <= asked <= count and asked == rounded(asked)):
            raise UsageError(
                f"{asked} persons cannot be declared: a number of two digits and zeros is, below 100 of one, and never more than there are "
                "persons in the table. Leave it out to have one chosen."
            )
        constant = rounded(count) if asked is None else asked
        if before is None or constant <= before.declared_persons or not self._runs(before.data):
            return constant
        if asked is not None:
            raise UsageError(
                f"{asked} persons cannot be declared while a plan may run that was approved with {before.declared_persons}: its "
                "divisor follows from that. Leave it out, or revoke the plan first."
            )
        return before.declared_persons

    def _runs(self, name: str) -> bool:
        book = self._journal.book
        approvals = (standing.approval for standing in book.approvals)
        return any(
            book.in_force(approval.plan, approval.run, name, book.at) for approval in approvals if approval.data == name
        )

    def _opening(self, account: str, typical: Spend | None) -> AccountOpened:
        policy = self._journal.book.policy
        if policy is None:
            raise Refused(
                "No policy is in force, so it is not said what persons may lose. Put one in force first.", "budget"
            )
        if typical is None:
            order = Filter(epsilon=policy.epsilon, delta=policy.delta).order
        else:
            order = order_for(policy.epsilon, policy.delta, typical)
        return AccountOpened(account=account, epsilon=policy.epsilon, delta=policy.delta, order=order)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from changing data sets: they could write a list in which somebody is missing."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            held = lock(self._folder)
        except BlockingIOError:
            raise UsageError("Another process is changing this site's data sets. Wait until it is done.") from None
        with held:
            self._journal.sync()
            yield

    def _withdrawn(self, name: str, data: DataSet | None) -> frozenset[bytes]:
        """Return the hashes of those who withdrew; `data` is what the ledger says, or None if it knows nothing."""
        path = self._list(name)
        if not path.exists():
            if data is None:
                return frozenset()
            raise _no_list(path, name, "is missing")
        sealed = read_private(path, _LARGEST_LIST_BYTES)
        try:
            plain = unseal_bytes(sealed, self._seal_key, _purpose(name))
        except SealError:
            if data is None:
                raise SealError(
                    f"The list of those who withdrew from {name!r}, {path}, is damaged or sealed with another key, and the ledger knows "
                    "no such data set. Restore its newest copy, or move it away if nobody withdrew from one of that name."
                ) from None
            raise _no_list(path, name, "is damaged or sealed with another key") from None
        version, persons = int.from_bytes(plain[:_VERSION_BYTES]), plain[_VERSION_BYTES:]
        if data is not None and version < data.version:
            raise _no_list(path, name, f"is of version {version}, and the ledger is at {data.version}")
        return frozenset(persons[start : start + DIGEST_BYTES] for start in range(0, len(persons), DIGEST_BYTES))

    def _keep_withdrawn(self, name: str, version: int, persons: Collection[bytes]) -> None:
        if len(persons) > MOST_WITHDRAWN:
            raise UsageError(f"{len(persons)} persons withdrew from {name!r}; at most {MOST_WITHDRAWN} can be kept.")
        plain = version.to_bytes(_VERSION_BYTES) + b"".join(sorted(persons))
        replace_private(self._list(name), seal_bytes(plain, self._seal_key, _purpose(name)))

    def _place(self, name: str) -> "_Place":
        path = self._file(name)
        if not path.exists():
            raise UsageError(
                f"{path} is missing, so it is not known where the table of {name!r} is. Register the same table again; an "
                "unchanged one makes no new version: confide site data add"
            )
        problems: list[str] = []
        place = None
        try:
            tree = tomllib.loads(read_private(path, _LARGEST_FILE_BYTES).decode())
            if tree.pop("format", None) == FORMAT:
                place = read_section(_Place, "data", tree, problems)
        except (ValueError, RecursionError):
            pass
        if place is None:
            raise UsageError(
                f"{path} is damaged ({problems[0] if problems else f'it is not of the format {FORMAT}'}). Remove it, and register "
                "the same table again: confide site data add"
            )
        return place

    def _note(self, data: DataSet, place: "_Place") -> None:
        """Let the file beside the ledger say what the ledger says, and where the table is."""
        right = _Place(path=place.path, column=data.person_id, ids=data.ids, version=data.version)
        fields = {"format": FORMAT} | dataclasses.asdict(right)
        content = "".join(f"{key} = {toml_value(value)}\n" for key, value in fields.items()).encode()
        path = self._file(data.data)
        if not path.exists() or read_private(path, _LARGEST_FILE_BYTES) != content:
            replace_private(path, content)

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.toml"

    def _list(self, name: str) -> Path:
        return self._folder / f"{name}{_LIST}"


def read_identifiers(path: Path) -> list[str]:
    """Return the identifiers in a text file, one on each line; blank lines do not count.

    Raises:
        UsageError: The file cannot be read as UTF-8 text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"Cannot read {path}: {why or error}. Give UTF-8 text with one identifier a line.") from None
    return [line.strip() for line in lines if line.strip()]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where the table of a data set is, and what the ledger said of it when this was written."""

    path: str = setting("The table's absolute path.", at_least=1, at_most=4096)
    column: str = setting("The column of persons; empty if each row is one.", at_most=200)
    ids: str = setting("The namespace of identifiers.", at_least=1, at_most=200)
    version: int = setting("The version.", at_least=1)


def _equal(entry: DataSet, before: DataSet, asked: int | None) -> bool:
    """Return whether a table is what was registered before; what is declared is left as it is unless it is asked for."""
    fields = ("fingerprint", "person_id", "ids", *(() if asked is None else ("declared_persons",)))
    return all(getattr(entry, field) == getattr(before, field) for field in fields)


def _check_name(what: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{shown(name)} is no {what}'s name: 1 to 63 of a-z, 0-9 and -, beginning with a letter or digit."
        )


def _check_person_id(table: Path, person_id: str | None) -> None:
    """Return if the table has the column of persons."""
    columns = table_columns(table)
    if person_id is None or person_id in columns:
        return
    close = difflib.get_close_matches(
        person_id.strip().casefold(), {name.strip().casefold(): name for name in columns}, n=1
    )
    near = next((name for name in columns if close and name.strip().casefold() == close[0]), "")
    hint = (
        f"Did you mean {near!r}?" if near else "Give the one that says whose row it is, spelled as the table spells it."
    )
    raise DataError(f"{table} has no column {person_id!r}, which --person-id names. {hint}")


def _spelled(table: Path) -> str:
    path = os.path.abspath(table)
    if not path.isprintable():
        raise UsageError("The table's path holds a character that cannot be printed. Rename it or its directory.")
    return path


def _purpose(name: str) -> bytes:
    return f"confide-withdrawn/1 {name}\n".encode()


def _no_list(path: Path, name: str, what: str) -> SealError:
    again = command("confide", "site", "data", "withdraw", name, "--anew", "--ids-file", "FILE")
    return SealError(
        f"The list of those who withdrew from {name!r}, {path}, {what}. Restore its newest copy. If there is none, name all who "
        f"ever withdrew: {again}"
    )


def _not_found(data: DataSet, name: str, place: "_Place") -> UsageError:
    """Return what is said where persons withdrew from `data` who would not be found in a table."""
    by = f"the column {place.column!r}" if place.column else "no column of persons"
    ids = () if data.ids == SAME_PERSONS else ("--ids", data.ids)
    add = command("confide", "site", "data", "add", name, place.path, "--person-id", data.person_id, *ids)
    return UsageError(
        f"Persons withdrew from {data.data!r} by the column {data.person_id!r} of the namespace {data.ids!r}, and would not be "
        f"found in this table by {by} of {place.ids!r}. Register it by that column: {add}"
    )


def _each_row(persons: Persons) -> Iterator[tuple[bytes, bytes]]:
    """Yield for each row the hash of its person and that of its content."""
    for start in range(0, len(persons.digests), DIGEST_BYTES):
        yield persons.digests[start : start + DIGEST_BYTES], persons.contents[start : start + DIGEST_BYTES]
