"""Going on after a ledger was lost, damaged or set back: with what can be had of it, and every budget counted as spent.

What is at the ledger's place is moved aside and never deleted.
"""

import secrets
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from confide.client.home import Home
from confide.client.journal import Journal, salvage
from confide.client.keys import fingerprint, load_keys, pending_identity, public_identity, rotations_between
from confide.common.checkpoint import Checkpoint
from confide.common.crypto import Identity
from confide.common.entries import Recovered, Rotation
from confide.common.errors import LedgerError, UsageError
from confide.common.export import read_export
from confide.common.ledger import verify
from confide.common.witness import MOST_REASON, Witness

_SQLITE: Final = b"SQLite format 3\0"
_PARTS: Final = ("", "-wal", "-shm", "-journal")  # a database, and what SQLite keeps beside it


def check_needed(home: Home, *, old_copy: bool) -> None:
    """Return if the ledger at its place is not fit for use, or is said to be an old copy.

    Raises:
        UsageError: It is whole; a recovery would count every budget as spent, for nothing.
    """
    try:
        book = Journal.look(home.ledger)
    except LedgerError:
        return
    if not old_copy:
        raise UsageError(
            f"The ledger {home.ledger} is whole and has {book.size} records. A recovery would count every budget as spent. If "
            "others refuse it because they saw more of it, say so with --old-copy."
        )


def records(home: Home, source: Path | None) -> tuple[list[bytes], Checkpoint | None]:
    """Return the records to go on from, and the checkpoint that came with them, if any.

    Args:
        home: The site's directory.
        source: An export, or a copy of the ledger; None takes what can be read of the ledger at its place.

    Raises:
        UsageError: None can be read.
        LedgerError: The export is damaged.
    """
    if source is not None and not _is_database(source):
        return read_export(source)
    place = home.ledger if source is None else source
    lines = salvage(place)
    if not lines:
        raise UsageError(
            f"No record can be read from {place}. Give an export, or an earlier copy. If there is none, begin a new ledger with "
            "--nothing-left."
        )
    return lines, None


def identity_after(
    home: Home, lines: Sequence[bytes], passphrase: bytes, *, source: Path | None, insecure_no_passphrase: bool = False
) -> tuple[Identity, tuple[Rotation, ...]]:
    """Return the identity by which the ledger goes on, and what leads to it from the key at the end of these records.

    It is the one that was in force there, if the site still has it, else the present one. A new ledger takes the present one.

    Args:
        home: The site's directory.
        lines: The records to go on from; none for a new ledger.
        passphrase: Opens the keys.
        source: Where the records are from, for messages; None is the ledger at its place.
        insecure_no_passphrase: The keys are not encrypted; the passphrase is empty then.

    Raises:
        LedgerError: The records do not hold.
        UsageError: The site has neither that identity nor all changes of keys since, or there is no passphrase.
        SealError: The passphrase is another, or the file with the changes of keys is damaged.
    """
    present = public_identity(home)
    in_force, chain = present, tuple[Rotation, ...]()
    if lines:
        book = verify(lines)
        waiting = pending_identity(home)
        if book.key == waiting:
            in_force = waiting
        else:
            found = rotations_between(home, book.ledger, book.key, present)
            if found is None:
                raise UsageError(
                    f"The records in {source or home.ledger} end under the key with the fingerprint {fingerprint(book.key)}. "
                    f"{home.keys} holds the key with the fingerprint {fingerprint(present)}, and no changes of keys that lead from the "
                    "one to the other. Give an export that was written since the key was changed, or restore that directory from "
                    "its newest backup. If neither can be had, begin a new ledger with --nothing-left."
                )
            chain = found
    keys = load_keys(home, passphrase, in_force=in_force, insecure_no_passphrase=insecure_no_passphrase)
    return keys.identity, chain


def go_on(
    home: Home,
    lines: Sequence[bytes],
    identity: Identity,
    *,
    reason: str,
    by: str,
    checkpoint: Checkpoint | None = None,
    lost: Checkpoint | None = None,
    rotations: Sequence[Rotation] = (),
) -> tuple[Journal, Path | None]:
    """Return the ledger that goes on, and where the one before was moved.

    Args:
        home: The site's directory; its lock is the caller's.
        lines: The records to go on from; none begins a new ledger, which says that one was lost.
        identity: Signs it; what `identity_after` returned.
        reason: What happened.
        by: Who says so.
        checkpoint: That of the export, if there is one.
        lost: The newest that anybody saw of the ledger.
        rotations: What `identity_after` returned.

    Raises:
        LedgerError: The records do not hold, or are not those a checkpoint stands for, or nothing can be written. What was at
            the ledger's place is there again.

    Guarantee: whatever goes wrong, the file that was at the ledger's place is kept, and every account counts as spent.
    What the site's own witness saw of the ledger need not be continued from then on.
    """
    aside = _moved(home.ledger)
    try:
        if lines:
            made = Journal.restore(
                home.ledger,
                lines,
                identity=identity,
                reason=reason,
                by=by,
                checkpoint=checkpoint,
                lost=lost,
                rotations=rotations,
            )
        else:
            size, root = (0, bytes(32)) if lost is None else (lost.size, lost.root)
            recovered = Recovered(recovery=secrets.token_hex(16), size=size, root=root.hex(), reason=reason, by=by)
            made = Journal.create(home.ledger, site=home.site, identity=identity, lost=recovered)
    except BaseException:
        if aside is not None and not home.ledger.exists():
            _rename(aside, home.ledger, reversed(_PARTS))
        raise
    try:
        _let_go(home, reason)
    except BaseException:
        made.close()
        raise
    return made, aside


def _let_go(home: Home, reason: str) -> None:
    """Let the site's own witness go on from the recovered ledger; what it saw of the lost one stays in its file."""
    witness = Witness(home.witness)
    for federation in witness.federations(home.site):
        witness.forget(federation, home.site, f"Recovered: {reason}"[:MOST_REASON])


def _is_database(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(len(_SQLITE)) == _SQLITE
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror or error}.") from None


def _moved(ledger: Path) -> Path | None:
    """Move what is at the ledger's place aside, and return where it is now; None if nothing was there."""
    if not any(ledger.with_name(ledger.name + end).exists() for end in _PARTS):
        return None
    stamp, number = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()), 0
    while True:
        aside = ledger.with_name(f"{ledger.name}.before-{stamp}{f'-{number}' if number else ''}")
        if not any(aside.with_name(aside.name + end).exists() for end in _PARTS):
            break
        number += 1
    # The database goes first. Were it still there without its log, a kill in between would leave an older ledger that looks
    # whole; and a log that stays behind must not meet the new one, so whatever is left over of a kill is moved too.
    _rename(ledger, aside, _PARTS)
    return aside


def _rename(old: Path, new: Path, parts: Iterable[str]) -> None:
    """Rename a database and what SQLite keeps beside it, in this order."""
    for end in parts:
        part = old.with_name(old.name + end)
        if part.exists():
            part.rename(new.with_name(new.name + end))
