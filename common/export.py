"""A ledger as a file for others: a line for each record, and last the site's signed checkpoint over them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from confide.common.canonical import canonical_bytes
from confide.common.checkpoint import Checkpoint, read_note
from confide.common.disk import whole
from confide.common.errors import LedgerError, MessageError, UsageError

EXPORT_FORMAT: Final = "confide-checkpoint/1"
LARGEST_EXPORT_BYTES: Final = 1 << 32


def write_export(path: Path, lines: Iterable[bytes], checkpoint: Checkpoint, key: bytes) -> None:
    """Write records and checkpoint to a file that `read_export` reads: a line for each record, and the signed note last.

    Args:
        path: The file; what is there is replaced.
        lines: All records that the checkpoint stands for, without line breaks.
        checkpoint: Over them.
        key: The key that signed it, 32 bytes.

    Raises:
        UsageError: The file cannot be written.
    """
    try:
        with whole(path) as draft:
            draft.touch(mode=0o600)
            with draft.open("wb") as stream:
                for line in lines:
                    stream.write(line + b"\n")
                stream.write(canonical_bytes({"format": EXPORT_FORMAT, "note": checkpoint.note(key)}) + b"\n")
    except OSError as error:
        raise UsageError(f"Cannot write the export {path}: {error.strerror or error}. Choose another place.") from None


def read_export(path: Path) -> tuple[list[bytes], Checkpoint]:
    """Return the records of an export, without line breaks, and its checkpoint; pass both to `ledger.verify`.

    Raises:
        UsageError: The file cannot be read.
        LedgerError: It does not end with a checkpoint in its one spelling, or is larger than LARGEST_EXPORT_BYTES.
    """
    try:
        if path.stat().st_size > LARGEST_EXPORT_BYTES:
            raise LedgerError(f"{path} has more than {LARGEST_EXPORT_BYTES} bytes, which no ledger's export has.")
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"Cannot read the export {path}: {error.strerror or error}. Give a ledger's export.") from None
    if lines.pop() or not lines:
        raise LedgerError(
            f"{path} does not end with a line break: it was cut short. Ask the site for the export again."
        )
    last = lines.pop()
    try:
        fields = json.loads(last.decode("ascii"))
        if canonical_bytes(fields) != last or fields.keys() != {"format", "note"} or fields["format"] != EXPORT_FORMAT:
            raise ValueError
        return lines, read_note(fields["note"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, MessageError):
        raise LedgerError(
            f"The last line of {path} is not a checkpoint of the format {EXPORT_FORMAT}: the export was cut short or changed. "
            "Ask the site for it again."
        ) from None
