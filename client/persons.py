"""Who is in a table, known by keyed hashes, and which budgets follow from that.

Outside its tables a site keeps no identifier. A person is a keyed hash of her identifier within a namespace, a row one of
its whole content; without the site's key neither can be computed or checked.
"""

import dataclasses
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from confide.client.table import EVERYTHING, IDENTIFIER, Cell, read_table, table_columns
from confide.common.crypto import keyed_digest

DIGEST_BYTES = 32
SAME_PERSONS = "person"  # the usual namespace: equal identifiers are one person in all of a site's tables
_NOBODY = bytes(DIGEST_BYTES)
_PERSON, _ROW, _TABLE = b"confide-person/1", b"confide-row/1", b"confide-table/1"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Persons:
    """The persons of one table. A row without an identifier, or without any value, is nobody's: no plan can use it.

    Attributes:
        rows: How many rows the table has.
        count: How many persons: distinct identifiers, or without a column of persons the rows that are somebody's.
        nobodys: How many rows are nobody's.
        fingerprint: 64 hexadecimal digits that stand for all rows and whose each is, in whatever order.
        digests: Whose each row is, in the order of the table, 32 bytes for each; zeros for nobody.
        contents: What each row holds, likewise; zeros for nothing. Without a column of persons it equals `digests`.
    """

    rows: int
    count: int
    nobodys: int
    fingerprint: str
    digests: bytes = dataclasses.field(repr=False)
    contents: bytes = dataclasses.field(repr=False)

    def known_by(self) -> Iterator[bytes]:
        """Yield each hash by which these persons are found again: their own, and those of their rows.

        Rows are among them so that a table registered a second time without its column of persons is recognised.
        """
        both = self.digests if self.digests == self.contents else self.digests + self.contents
        yield from _distinct(both)

    def besides(self, persons: Collection[bytes]) -> int:
        """Return how many there are if those with these hashes are left out."""
        return sum(person not in persons for person in _distinct(self.digests)) if persons else self.count

    def rows_of(self, persons: Collection[bytes]) -> frozenset[int]:
        """Return the numbers, from 1, of the rows that belong to the persons with these hashes."""
        rows = (self.digests[start : start + DIGEST_BYTES] for start in range(0, len(self.digests), DIGEST_BYTES))
        return (
            frozenset(number for number, row in enumerate(rows, start=1) if row in persons) if persons else frozenset()
        )

    @property
    def repeated(self) -> int:
        """How many rows hold exactly what an earlier one holds."""
        return self.rows - len(np.unique(_each(self.contents)))


def read_persons(path: Path, person_id: str | None, key: bytes, ids: str = SAME_PERSONS) -> Persons:
    """Read who is in the table `path`, a row at a time; of each row 64 bytes stay in memory, and for a moment some 300.

    Identifiers are compared as `client/data` compares them, by `identifier`.

    Args:
        path: A file or directory that `read_table` knows.
        person_id: The column that says whose row it is; None makes each row a person.
        key: The site's own, 32 bytes.
        ids: The namespace: what the identifiers are identifiers of. Equal ones in two namespaces are two persons.

    Raises:
        DataError: The table cannot be read, has no rows, or lacks the column.
        MissingPackage: The reader of this format is not installed.

    Guarantee: the fingerprint does not depend on the order of rows.
    """
    columns = dict.fromkeys(sorted(table_columns(path)), EVERYTHING)
    if person_id is not None and person_id not in columns:
        for _ in read_table(path, {person_id: IDENTIFIER}):
            pass  # this raises, and names the nearest column if there is one
    if person_id is not None:
        columns[person_id] = IDENTIFIER
    place = None if person_id is None else list(columns).index(person_id)
    digests, contents = bytearray(), bytearray()
    for row in read_table(path, columns):
        content = row_digest(key, ids, dict(zip(columns, row.cells, strict=True)))
        contents += content
        if place is not None:
            named = row.cells[place]
            digests += person_digest(key, ids, named) if isinstance(named, str) and named.strip() else _NOBODY
    return _persons(bytes(contents if place is None else digests), bytes(contents), key, named=place is not None)


def person_digest(key: bytes, ids: str, value: str) -> bytes:
    """Return the 32 bytes by which the person with this identifier, in whatever spelling, is known."""
    return keyed_digest(key, _PERSON, ids.encode(), identifier(value).encode())


def identifier(value: str) -> str:
    """Return the one spelling of a person's identifier, by which persons are told apart everywhere.

    White space around it does not count, nor whether an accented letter is written as one character or as a letter with an
    accent after it (Unicode's NFC): programs differ in that, and the same person must not have two budgets.
    """
    return unicodedata.normalize("NFC", value.strip())


def row_digest(key: bytes, ids: str, cells: Mapping[str, Cell | None]) -> bytes:
    """Return the 32 bytes by which a row is known: of every cell with its column, in the order of names.

    Columns without a value do not count, so a column that is empty throughout may come and go. A row without any value
    has 32 zeros: tables often end with such rows, and two tables do not share a person because of them.
    """
    parts: list[bytes] = []
    for column in sorted(cells):
        cell = cells[column]
        if cell is not None:
            entries = cell if isinstance(cell, tuple) else (cell,)
            spelled = [entry if isinstance(entry, bytes) else entry.encode() for entry in entries]
            # How many entries follow, and of which kind, so that no other cells give the same parts.
            form = f"{type(cell).__name__} {len(spelled)}".encode()
            parts += [column.encode("utf-8", "surrogatepass"), form, *spelled]
    return keyed_digest(key, _ROW, ids.encode(), *parts) if parts else _NOBODY


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Charged:
    """Which accounts a data set charges.

    Attributes:
        accounts: All of them, in the order of their numbers.
        joined: The one among them that persons join who belong to none.
        opened: Whether that one has to be opened first.
    """

    accounts: tuple[str, ...]
    joined: str
    opened: bool


def accounts_for(overlap: Collection[str], before: Collection[str], unused: str) -> Charged:
    """Return which accounts a data set charges.

    Args:
        overlap: The accounts its persons belong to already.
        before: Those that earlier versions of it charge. They stay, though nobody of them may be left.
        unused: The number of the next account to be opened.

    Guarantee: every person's account is among those that are charged.
    """
    accounts = tuple(sorted({*overlap, *before}, key=int)) or (unused,)
    return Charged(accounts=accounts, joined=accounts[0], opened=not (overlap or before))


def declared(persons: int) -> int:
    """Return the number of persons a site makes public: two leading digits, below 100 persons one, rounded down.

    So from 10 persons on it is not their exact number, except by chance.
    """
    unit = declared_unit(persons)
    return persons // unit * unit


def declared_unit(persons: int) -> int:
    """Return what the number of so many persons is rounded to."""
    return int(10 ** max(0, len(str(persons)) - (2 if persons >= 100 else 1)))


def _persons(digests: bytes, contents: bytes, key: bytes, *, named: bool) -> Persons:
    whose = _each(digests)
    nobodys = int(np.count_nonzero(whose == np.void(_NOBODY)))
    return Persons(
        rows=len(whose),
        count=sum(1 for _ in _distinct(digests)) if named else len(whose) - nobodys,
        nobodys=nobodys,
        fingerprint=keyed_digest(key, _TABLE, _sorted_pairs(digests, contents)).hex(),
        digests=digests,
        contents=contents,
    )


def _sorted_pairs(first: bytes, second: bytes) -> bytes:
    halves = [np.frombuffer(half, np.uint8).reshape(-1, DIGEST_BYTES) for half in (first, second)]
    pairs = np.concatenate(halves, axis=1)  # (rows, 64)
    return np.sort(pairs.view(f"V{2 * DIGEST_BYTES}").reshape(-1)).tobytes()


def _distinct(digests: bytes) -> Iterator[bytes]:
    return (digest for digest in map(bytes, np.unique(_each(digests))) if digest != _NOBODY)


def _each(digests: bytes) -> npt.NDArray[Any]:
    return np.frombuffer(digests, f"V{DIGEST_BYTES}")
