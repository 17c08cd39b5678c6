"""Files are whole or absent."""

from pathlib import Path

import pytest

from confide.common.disk import append, lock, whole


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "record"
    path.write_text("before")

    with whole(path) as draft:
        draft.write_text("after")
        assert path.read_text() == "before"

    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "record"
    path.write_text("before")

    def fail_half_way() -> None:
        with whole(path) as draft:
            draft.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()

    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_lines_are_appended_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log"

    append(path, b"one\n")
    append(path, b"two\n")

    assert path.read_bytes() == b"one\ntwo\n"


def test_a_locked_folder_is_kept_to_one(tmp_path: Path) -> None:
    held = lock(tmp_path)

    with pytest.raises(BlockingIOError):
        lock(tmp_path)

    held.close()
    lock(tmp_path).close()
