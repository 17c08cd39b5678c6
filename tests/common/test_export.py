"""A ledger's export: read as it was written, or refused."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from confide.common import export as exports
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


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\n" * 100_000, "Line 1 of .* has 0 bytes, and a record has at least 128"),
        (b"{" * (1 << 24) + b"\n", "Line 1 of .* has more than 65536 bytes"),
        (b'{"seq":1}\n' * 1000, "Line 1 of .* has 9 bytes"),
    ],
    ids=["empty lines", "one endless line", "short lines"],
)
def test_of_a_file_that_is_no_export_no_more_is_read_than_shows_it(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "export.jsonl"
    path.write_bytes(content)
    tracemalloc.start()

    with pytest.raises(LedgerError, match=told):
        read_export(path)

    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_what_is_longer_than_an_export_may_be_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book, lines = SMALL
    path = tmp_path / "export.jsonl"
    write_export(path, lines, signed(book), book.key)
    monkeypatch.setattr(exports, "LARGEST_EXPORT_BYTES", path.stat().st_size - 1)

    with pytest.raises(LedgerError, match="bytes, which no ledger's export has"):
        read_export(path)


def test_an_export_that_cannot_be_read_or_written_is_a_matter_of_its_path(tmp_path: Path) -> None:
    book, lines = SMALL

    with pytest.raises(UsageError, match="Cannot read the export"):
        read_export(tmp_path / "absent")
    with pytest.raises(UsageError, match="Cannot write the export"):
        write_export(tmp_path / "absent" / "export", lines, signed(book), book.key)
