"""What others saw of a ledger, compared with it: the checkpoints in a witness's file, in a signed note, or in short."""

import dataclasses
import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Final

from confide.common.checkpoint import Checkpoint, read_note, read_short
from confide.common.entries import Genesis, decode
from confide.common.errors import LedgerError, MessageError, UsageError
from confide.common.ledger import Book
from confide.common.merkle import EMPTY_ROOT, Tree, leaf_hash
from confide.common.witness import Witness

_LARGEST_BYTES: Final = 1 << 26


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A checkpoint of a ledger, and where it is from.

    Attributes:
        whose: The site and federation it was seen as, or what it is.
        where: The file it is in.
        checkpoint: It.
    """

    whose: str
    where: str
    checkpoint: Checkpoint


def seen_in(path: Path, site: str, ledger: str) -> list[Seen]:
    """Return the checkpoints of one ledger that a file holds.

    Args:
        path: A witness's file, or one with a single checkpoint: a signed note, or the short form that travels.
        site: The site's name.
        ledger: The ledger's id, or empty. Of a witness's file all counts that was seen of the site or of the ledger.

    Raises:
        UsageError: It cannot be read.
        LedgerError: It is damaged, or holds no checkpoint.
    """
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise UsageError(f"{path} has more than {_LARGEST_BYTES} bytes, which no witness's file has.")
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror or error}.") from None
    if raw.startswith(b"{"):
        return _in_witness(path, raw, site, ledger)
    text = raw.decode("utf-8", "replace")
    try:
        checkpoint = read_note(text) if "\n\n" in text else read_short(text.strip())
    except MessageError as error:
        raise LedgerError(f"{path} holds no checkpoint that can be read. {error}") from None
    return [Seen(whose="a checkpoint", where=str(path), checkpoint=checkpoint)]


def replayed(lines: Iterable[bytes], seen: Sequence[Seen]) -> Book:
    """Return what the records lead to, once all of them hold, and every checkpoint stands for as many as it says.

    Raises:
        LedgerError: A record does not hold, or a checkpoint is not of these records; it is told which.
    """
    book, to_come = Book(), sorted(seen, key=lambda found: found.checkpoint.size)
    for line in lines:
        book.take(line)
        while to_come and to_come[0].checkpoint.size <= book.size:
            _agree(book, to_come.pop(0))
    for found in to_come:
        _agree(book, found)
    if not book.size:
        raise LedgerError(
            "The ledger has no record at all, not even its genesis. Take up an export or an earlier copy."
        )
    return book


def check_goes_on(book: Book, lines: Iterable[bytes], seen: Collection[Seen]) -> None:
    """Return if a ledger goes on from every checkpoint that was seen of it, in whichever federation.

    Args:
        book: What its records lead to.
        lines: Its records, which hold.
        seen: The checkpoints; who signed them is not asked, since a key may have been changed.

    Raises:
        LedgerError: One is of another ledger, of more records than there are, or of others.
    """
    roots, tree = {found.checkpoint.size: EMPTY_ROOT for found in seen}, Tree()
    for line in lines:
        tree.add(leaf_hash(line))
        if tree.size in roots:
            roots[tree.size] = tree.root
    for found in seen:
        told = found.checkpoint
        if (told.ledger, told.root) != (book.ledger, roots[told.size]):
            raise LedgerError(
                f"The ledger {book.ledger} has {book.size} records, and does not go on from what was seen of it as {found.whose}: "
                f"{told.size} records of {told.ledger} ({found.where}). An old copy or another ledger was put in its place: put "
                "the newest back. If it is lost: confide site ledger recover --old-copy"
            )


def site_and_ledger(lines: Sequence[bytes]) -> tuple[str, str]:
    """Return the site's name and the ledger's id, by the first record.

    Raises:
        LedgerError: There is none, or it is not how a ledger begins.
    """
    first = decode(lines[0]).entry if lines else None
    if not isinstance(first, Genesis):
        raise LedgerError("The first record is not a genesis, so this is no ledger, or its beginning is missing.")
    return first.site, first.ledger


def _in_witness(path: Path, raw: bytes, site: str, ledger: str) -> list[Seen]:
    held = Witness(path)
    names = [(federation, name) for federation, sites in json.loads(raw)["seen"].items() for name in sites]
    found = [(federation, name, held.last(federation, name)) for federation, name in names]
    return [
        Seen(whose=f"{name} in {federation}", where=str(path), checkpoint=checkpoint)
        for federation, name, checkpoint in found
        if checkpoint is not None and (name == site or checkpoint.ledger == ledger)
    ]


def _agree(book: Book, found: Seen) -> None:
    try:
        book.agree(found.checkpoint)
    except LedgerError as error:
        raise LedgerError(f"{found.where} ({found.whose}, {found.checkpoint.size} records): {error}") from None
