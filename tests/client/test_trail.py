"""The trail: whole, in order, and nothing in it that does not belong there."""

import json
import logging
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from confide.client import trail as module
from confide.client.trail import Allowance, Trail, TrailHandler, verify_trail
from confide.common.canonical import canonical_bytes
from confide.common.errors import RunError, UsageError

NOON = 1_795_435_200  # 2026-11-23T12:00:00Z


def written(folder: Path, events: int = 5, **settings: int) -> Trail:
    trail = Trail(folder, clock=lambda: NOON, **settings)
    for number in range(1, events + 1):
        trail.record("round-refused", {"round": number, "rule": "budget"})
    return trail


def only(folder: Path) -> Path:
    (path,) = folder.glob("*.jsonl")
    return path


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_bytes().splitlines()]


def test_an_event_is_one_canonical_line_in_a_file_for_its_owner_only(tmp_path: Path) -> None:
    Trail(tmp_path / "log", clock=lambda: NOON).record("round-refused", {"rule": "budget", "round": 3, "late": False})

    path = only(tmp_path / "log")
    assert path.read_bytes() == (
        b'{"at":"2026-11-23T12:00:00Z","event":"round-refused","format":"confide-trail/1","late":false,'
        b'"prev":"sha256:' + b"0" * 64 + b'","round":3,"rule":"budget","seq":1}\n'
    )
    assert [stat.S_IMODE(each.stat().st_mode) for each in (path, path.parent)] == [0o600, 0o700]


def test_a_trail_goes_on_where_it_ended(tmp_path: Path) -> None:
    written(tmp_path, 2)
    written(tmp_path, 3)

    checked = verify_trail(tmp_path)

    assert (checked.files, checked.first, checked.last) == (1, 1, 5)
    assert [line["seq"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_full_file_is_followed_by_the_next_in_the_same_chain(tmp_path: Path) -> None:
    written(tmp_path, 10, largest_bytes=600)
    written(tmp_path, 10, largest_bytes=600)

    checked = verify_trail(tmp_path)

    files = sorted(path.name for path in tmp_path.glob("*.jsonl"))
    assert files[0] == "trail-000001.jsonl"
    assert checked.files == len(files) > 3
    assert checked.last == 20
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("*.jsonl")} == {0o600}


def test_old_files_may_be_removed_and_the_rest_says_where_it_begins(tmp_path: Path) -> None:
    written(tmp_path, 10, largest_bytes=600)
    (tmp_path / "trail-000001.jsonl").unlink()

    checked = verify_trail(tmp_path)

    assert 1 < checked.first < checked.last == 10


def change(number: int) -> Callable[[list[bytes]], list[bytes]]:
    return lambda all_lines: [
        line.replace(b"budget", b"cohort") if place == number else line for place, line in enumerate(all_lines, start=1)
    ]


@pytest.mark.parametrize(
    ("tamper", "named"),
    [
        (change(3), "Line 4 of"),
        (lambda found: found[:2] + found[3:], "Line 3 of"),
        (lambda found: found[1:], "Line 1 of"),
        (lambda found: [found[0], found[2], found[1], *found[3:]], "Line 2 of"),
        (lambda found: [*found[:3], found[2], *found[3:]], "Line 4 of"),
        (lambda found: [*found[:2], b"{}\n", *found[2:]], "Line 3 of"),
        (lambda found: [*found[:2], b"\n", *found[2:]], "Line 3 of"),
        (lambda found: [*found[:2], found[2].replace(b":", b": ", 1), *found[3:]], "Line 3 of"),
        (lambda found: [*found[:4], found[4][:-1]], "Line 5 of .* torn"),
        (lambda found: [], "is empty"),
    ],
)
def test_the_first_damaged_line_is_named(
    tmp_path: Path, tamper: Callable[[list[bytes]], list[bytes]], named: str
) -> None:
    written(tmp_path)
    path = only(tmp_path)
    path.write_bytes(b"".join(tamper(path.read_bytes().splitlines(keepends=True))))

    with pytest.raises(RunError, match=named):
        verify_trail(tmp_path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_byte_can_be_changed_unseen_but_in_the_last_line(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "log"
    if not folder.exists():
        written(folder)
    path = only(folder)
    before = path.read_bytes()
    place = data.draw(st.integers(0, before.rindex(b"\n", 0, -1)))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != before[place]))

    try:
        path.write_bytes(before[:place] + bytes([other]) + before[place + 1 :])
        with pytest.raises(RunError, match="trail-000001"):
            verify_trail(folder)
    finally:
        path.write_bytes(before)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    written(tmp_path, 12, largest_bytes=600)
    (tmp_path / "trail-000002.jsonl").unlink()

    with pytest.raises(RunError, match=r"before trail-000003\.jsonl is missing"):
        verify_trail(tmp_path)


def test_lines_missing_at_the_end_show_by_the_head_that_was_noted(tmp_path: Path) -> None:
    written(tmp_path)
    noted = verify_trail(tmp_path)
    path = only(tmp_path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))

    assert verify_trail(tmp_path).head != noted.head


@pytest.mark.parametrize("cut", [1, 30])
def test_a_line_torn_by_a_crash_is_put_aside_and_the_trail_says_so(tmp_path: Path, cut: int) -> None:
    written(tmp_path)
    path = only(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])

    Trail(tmp_path).record("started")

    last = whole.splitlines(keepends=True)[-1]
    mended, started = lines(tmp_path)[-2:]
    assert verify_trail(tmp_path).last == 6
    assert (mended["event"], mended["bytes"], started["event"]) == ("mended", len(last) - cut, "started")
    aside = tmp_path / str(mended["aside"])
    assert aside.read_bytes() == last[:-cut]
    assert stat.S_IMODE(aside.stat().st_mode) == 0o600


def test_what_no_crash_can_have_done_is_not_mended(tmp_path: Path) -> None:
    written(tmp_path)
    path = only(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"budget", b"cohort") + b"{}\n")

    with pytest.raises(RunError, match=r"last line of .* is damaged"):
        Trail(tmp_path)


def test_what_was_recorded_is_on_disk_before_record_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trail, synced = written(tmp_path, 1), list[int]()
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", noted)

    trail.record("started")

    assert synced == [only(tmp_path).stat().st_size]


def test_a_full_disk_is_told_and_leaves_a_trail_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trail = written(tmp_path, 2)

    def full(path: Path, line: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module, "append", full)
        with pytest.raises(RunError, match="No space left"):
            trail.record("started")
    trail.record("started")

    assert verify_trail(tmp_path).last == 3


def test_several_processes_write_one_chain(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from confide.client.trail import Trail
for number in range(20):
    Trail(Path(sys.argv[1]), largest_bytes=2000).record("started", {"number": number})
"""
    writers = [subprocess.Popen([sys.executable, "-c", script, tmp_path]) for _ in range(2)]
    trail = Trail(tmp_path, largest_bytes=2000)
    for number in range(20):
        trail.record("here", {"number": number})

    assert [writer.wait(30) for writer in writers] == [0, 0]
    assert verify_trail(tmp_path).last == 60


@pytest.mark.parametrize(
    ("event", "fields"),
    [
        ("Round", {}),
        ("round refused", {}),
        ("", {}),
        ("started", {"seq": 1}),
        ("started", {"prev": "x"}),
        ("started", {"Name": 1}),
        ("started", {"key": b"secret"}),
        ("started", {"row": ["text", "label"]}),
        ("started", {"row": {"text": 1}}),
        ("started", {"value": None}),
        ("started", {"value": float("nan")}),
        ("started", {"value": float("inf")}),
        ("started", {"value": 1 << 63}),
        ("started", {f"field{number}": 1 for number in range(33)}),
    ],
)
def test_only_few_plain_values_under_plain_names_are_recorded(
    tmp_path: Path, event: str, fields: dict[str, str]
) -> None:
    trail = written(tmp_path, 1)

    with pytest.raises(UsageError):
        trail.record(event, fields)

    assert verify_trail(tmp_path).last == 1


def test_a_refused_value_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="key is a bytes") as caught:
        Trail(tmp_path).record("started", {"key": b"secret"})  # type: ignore[dict-item]

    assert "secret" not in str(caught.value)


def test_long_text_is_cut_and_shows_it(tmp_path: Path) -> None:
    Trail(tmp_path).record("started", {"text": "\0" * 5000})

    assert lines(tmp_path)[0]["text"] == "\0" * 999 + "…"
    assert verify_trail(tmp_path).last == 1


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(st.characters(codec=None), max_size=50), number=st.integers(-(2**62), 2**62), share=st.floats(-1, 1)
)
def test_whatever_is_recorded_is_found_again(tmp_path: Path, text: str, number: int, share: float) -> None:
    trail = Trail(tmp_path)

    trail.record("started", {"text": text, "number": number, "share": share})

    last = lines(tmp_path)[-1]
    assert (last["text"], last["number"], last["share"]) == (text, number, share)
    assert verify_trail(tmp_path).last == last["seq"]
    assert canonical_bytes(last)


def logger_to(trail: Trail, clock: Callable[[], float]) -> logging.Logger:
    logger = logging.Logger("confide.client.postbox")
    logger.addHandler(TrailHandler(trail, clock=clock))
    return logger


def test_warnings_of_the_package_are_in_the_trail_without_what_an_exception_says(tmp_path: Path) -> None:
    logger = logger_to(Trail(tmp_path), lambda: 0.0)

    logger.info("not this")
    logger.warning("closed %d of them", 3)
    try:
        raise ValueError("Mrs Smith, 12 May")
    except ValueError:
        logger.exception("no answer")

    first, second = lines(tmp_path)
    assert (first["event"], first["level"], first["logger"]) == ("log", "warning", "confide.client.postbox")
    assert first["text"] == "closed 3 of them"
    assert (second["level"], second["text"], second["exception"]) == ("error", "no answer", "ValueError")
    assert "Smith" not in only(tmp_path).read_text(encoding="utf-8")


def test_nobody_who_can_cause_warnings_can_fill_the_disk(tmp_path: Path) -> None:
    now = 0.0
    logger = logger_to(Trail(tmp_path), lambda: now)

    for _ in range(100):
        logger.warning("again")
    now = 61.0
    logger.warning("once more")

    assert len(lines(tmp_path)) == module.LINES_A_MINUTE + 1
    assert lines(tmp_path)[-1]["left_out"] == 40


def test_a_trail_takes_so_many_lines_a_minute_and_tells_how_many_were_left_out() -> None:
    now = 0.0
    allowance = Allowance(clock=lambda: now)

    taken = [allowance.take() for _ in range(70)]
    now = 60.0
    following = [allowance.take() for _ in range(2)]

    assert taken == [{}] * 60 + [None] * 10
    assert following == [{"left_out": 10}, {}]


def test_a_warning_that_cannot_be_written_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logger_to(Trail(tmp_path / "log"), lambda: 0.0)
    (tmp_path / "log").rename(tmp_path / "elsewhere")
    (tmp_path / "log").touch()

    logger.warning("lost")

    assert "lost" in capsys.readouterr().err


def test_a_trail_that_is_not_there_cannot_be_verified(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be read"):
        verify_trail(tmp_path / "absent")

    assert verify_trail(tmp_path).last == 0
