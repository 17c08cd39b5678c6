"""A ledger's export: read as it was written, or refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from confide.common.entries import Refund
from confide.common.errors import LedgerError, UsageError
from confide.common.export import read_export, write_export
from confide.common.ledger import verify
from tests.books import RUN, a_round, beginning, reserve, signed, written

SMALL = written([*beginning(), *a_round(1), reserve(2), Refund(run=RUN, round=2, steps=3)])


def test_an_export_is_read_as_it_was_written(tmp_path: Path) -> None:
    book, lines = SMALL
    path = tmp_path / "export.jsonl"

    write_export(path, lines, signed(book), book.key)
    again, checkpoint = read_export(path)

    assert (again, checkpoint) == (lines, signed(book))
    assert verify(again, checkpoint).size == book.size
    assert path.stat().st_mode & 0o777 == 0o600
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw[:-1],
        lambda raw: raw + b"\n",
        lambda raw: raw + b"{}\n",
        lambda raw: b"",
        lambda raw: b"\n",
        lambda raw: raw[: raw.rindex(b"{")],
        lambda raw: raw.replace(b"confide-checkpoint/1", b"confide-checkpoint/2"),
        lambda raw: raw.replace(b'"note":"', b'"note":" '),
        lambda raw: raw.replace(b'"note":', b'"note": '),
        lambda raw: raw.replace(b'"note":"', b'"note":["') + b"\n",
        lambda raw: raw + b"[" * 100_000 + b"\n",
        lambda raw: raw + b"\xff\n",
    ],
)
def test_an_export_that_does_not_end_with_its_checkpoint_is_refused(
    tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    book, lines = SMALL
    path = tmp_path / "export.jsonl"
    write_export(path, lines, signed(book), book.key)
    path.write_bytes(change(path.read_bytes()))

    with pytest.raises(LedgerError, match=r"cut short"):
        read_export(path)


def test_an_export_that_cannot_be_read_or_written_is_a_matter_of_its_path(tmp_path: Path) -> None:
    book, lines = SMALL

    with pytest.raises(UsageError, match="Cannot read the export"):
        read_export(tmp_path / "absent")
    with pytest.raises(UsageError, match="Cannot write the export"):
        write_export(tmp_path / "absent" / "export", lines, signed(book), book.key)
