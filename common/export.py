"""A ledger as a file for others: a line for each record, and last the site's signed checkpoint over them."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from confide.common.canonical import canonical_bytes
from confide.common.checkpoint import Checkpoint, read_note
from confide.common.disk import whole
from confide.common.entries import LARGEST_RECORD_BYTES
from confide.common.errors import LedgerError, MessageError, UsageError

EXPORT_FORMAT: Final = "confide-checkpoint/1"
LARGEST_EXPORT_BYTES: Final = 1 << 32
LEAST_RECORD_BYTES: Final = 128  # a record holds the digest of the one before it, and four fields more


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
        with whole(path) as draft, draft.open("wb") as stream:
            for line in lines:
                stream.write(line + b"\n")
            stream.write(canonical_bytes({"format": EXPORT_FORMAT, "note": checkpoint.note(key)}) + b"\n")
    except OSError as error:
        raise UsageError(f"Cannot write the export {path}: {error.strerror or error}. Choose another place.") from None


def read_export(path: Path) -> tuple[list[bytes], Checkpoint]:
    """Return the records of an export, without line breaks, and its checkpoint; pass both to `ledger.verify`.

    It is read line by line, and what cannot be a record ends that: whatever somebody sends as an export, no more than about
    twice its size is ever in memory.

    Raises:
        UsageError: The file cannot be read.
        LedgerError: A line cannot be a record by its length, the last one is no checkpoint in its one spelling, or the file is
            larger than LARGEST_EXPORT_BYTES.
    """
    try:
        lines = list(_lines(path))
    except OSError as error:
        raise UsageError(f"Cannot read the export {path}: {error.strerror or error}. Give a ledger's export.") from None
    last = lines.pop() if lines else b""
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


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of an export without their breaks; each has a length that a record may have."""
    number = size = 0
    with path.open("rb") as stream:
        while line := stream.readline(LARGEST_RECORD_BYTES + 2):
            number, size = number + 1, size + len(line)
            if size > LARGEST_EXPORT_BYTES:
                raise LedgerError(f"{path} has more than {LARGEST_EXPORT_BYTES} bytes, which no ledger's export has.")
            if len(line) > LARGEST_RECORD_BYTES + 1:
                raise LedgerError(
                    f"Line {number} of {path} has more than {LARGEST_RECORD_BYTES} bytes, the most that a record has: the "
                    "export was cut short or changed. Ask the site for it again."
                )
            if not line.endswith(b"\n"):
                raise LedgerError(
                    f"{path} does not end with a line break: it was cut short. Ask the site for the export again."
                )
            if len(line) <= LEAST_RECORD_BYTES:
                raise LedgerError(
                    f"Line {number} of {path} has {len(line) - 1} bytes, and a record has at least {LEAST_RECORD_BYTES}: the "
                    "export was cut short or changed. Ask the site for it again."
                )
            yield line[:-1]
