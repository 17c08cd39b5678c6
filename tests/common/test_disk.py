"""Files are whole or absent."""

import os
import secrets
from pathlib import Path

import pytest

from confide.common.disk import READABLE, append, lock, whole


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


def test_a_file_is_for_its_owner_only_unless_it_is_said_to_be_readable(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with whole(tmp_path / "own") as draft:
            assert draft.stat().st_mode & 0o777 == 0o600
            draft.write_text("mine")
        with whole(tmp_path / "public", READABLE) as draft:
            draft.write_text("anybody's")
    finally:
        os.umask(before)

    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "public").stat().st_mode & 0o777 == 0o644


def test_a_draft_is_a_new_file_under_a_name_that_nobody_knows_before(tmp_path: Path) -> None:
    names = set()

    for _ in range(3):
        with whole(tmp_path / "record") as draft:
            assert draft.lstat().st_size == 0
            draft.write_text("whole")
            names.add(draft.name)

    assert len(names) == 3
    assert all(len(name) == len(".record..part") + 16 for name in names)


def test_a_link_under_the_drafts_name_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr(secrets, "token_hex", lambda size: "guessed")
    (tmp_path / ".record.guessed.part").symlink_to(victim)

    with pytest.raises(FileExistsError), whole(tmp_path / "record"):
        pass

    assert victim.read_text() == "precious"
    assert not (tmp_path / "record").exists()


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
