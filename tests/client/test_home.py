"""A site's directory: closed to others, whole or not there, and one agent's at a time."""

import contextlib
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, strategies

from confide.client.home import FORMAT, Home, read_private, replace_private, write_private
from confide.common.errors import ConfideError, UsageError

SITE = "St. Anna"
FOLDERS = {"keys", "keys/approvers", "data", "plans", "federations", "rounds", "personal", "log"}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@contextlib.contextmanager
def umask(bits: int) -> Iterator[None]:
    before = os.umask(bits)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.create(tmp_path / "site", SITE)


def child(work: Callable[[], object]) -> int:
    """Do `work` in a process of its own and return how that ended: its exit code, or minus the signal."""
    process = os.fork()
    if not process:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.parametrize("bits", [0o000, 0o022, 0o077, 0o777])
def test_everything_is_made_with_its_mode_whatever_the_umask_is(bits: int, tmp_path: Path) -> None:
    with umask(bits):
        home = Home.create(tmp_path / "site", SITE)
        home.lock().close()
        write_private(home.policy, b"")
        replace_private(home.policy, b"new")

    assert {str(path.relative_to(home.root)) for path in home.root.rglob("*") if path.is_dir()} == FOLDERS | {"run"}
    assert mode(home.root) == 0o700
    assert {mode(home.root / name) for name in FOLDERS} == {0o700}
    assert mode(home.run) == 0o750
    assert {mode(path) for path in home.root.rglob("*") if path.is_file()} == {0o600}
    assert Home.open(home.root) == home


def test_a_group_of_postmen_may_pass_to_the_sockets_and_read_nothing(tmp_path: Path) -> None:
    home = Home.create(tmp_path / "site", SITE, postman_group=os.getegid())

    assert (mode(home.root), mode(home.run)) == (0o710, 0o750)
    assert {path.lstat().st_gid for path in (home.root, home.run)} == {os.getegid()}
    assert Home.open(home.root) == home


def test_an_empty_directory_becomes_the_sites_and_is_closed(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir(mode=0o755)

    home = Home.create(tmp_path / "site", SITE, clock=lambda: 1795401600.9)

    assert mode(home.root) == 0o700
    assert home.created == "2026-11-23T02:40:00Z"
    assert Home.open(tmp_path / "site") == home


def test_a_directory_that_is_not_empty_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("")
    tmp_path.chmod(0o755)

    with pytest.raises(UsageError, match='is not empty: it holds "letter"'):
        Home.create(tmp_path, SITE)

    assert [path.name for path in tmp_path.iterdir()] == ["letter"]
    assert mode(tmp_path) == 0o755


@pytest.mark.parametrize("site", ["", ".", "../a", "a/b", "a\n", " a", "ä", "a" * 64, "a\0"])
def test_a_sites_name_is_one_that_rosters_have(site: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no name"):
        Home.create(tmp_path / "site", site)

    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize("place", ["none/site", "file/site", "file", "a\0b"])
def test_a_place_where_no_directory_can_be_is_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(UsageError):
        Home.create(tmp_path / place, SITE)
    with pytest.raises(UsageError):
        Home.open(tmp_path / place)


def test_a_path_too_long_for_the_sockets_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    room = 103 - len(os.fsencode(tmp_path / "x" / "run" / "control.sock")) + 1

    Home.create(tmp_path / ("x" * room), SITE)
    with pytest.raises(UsageError, match=r"would have 104 bytes, and at most 103 .* 1 bytes shorter"):
        Home.create(tmp_path / ("x" * (room + 1)), SITE)

    assert not (tmp_path / ("x" * (room + 1))).exists()
    (tmp_path / ("x" * room)).rename(tmp_path / ("y" * (room + 1)))
    with pytest.raises(UsageError, match="lies too deep"):
        Home.open(tmp_path / ("y" * (room + 1)))


def test_of_many_who_make_one_site_at_once_one_does_and_the_others_are_refused(tmp_path: Path) -> None:
    for attempt in range(20):
        made: list[str] = []
        refused: list[UsageError] = []
        barrier = threading.Barrier(4)

        def create(site: str, root: Path, made: list[str] = made, refused: list[UsageError] = refused) -> None:
            barrier.wait()  # noqa: B023  the threads are joined in the same turn
            try:
                made.append(Home.create(root, site).site)
            except UsageError as error:
                refused.append(error)

        threads = [threading.Thread(target=create, args=(f"site {n}", tmp_path / f"{attempt}")) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert len(made) == 1
        assert len(refused) == 3
        assert Home.open(tmp_path / f"{attempt}").site == made[0]


def kill_at_line(number: int, *files: str) -> None:
    """Have this process killed before the line that is the `number`th it executes in these files."""
    left = number

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith(files):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


@pytest.mark.slow
def test_a_creation_killed_at_any_line_leaves_a_site_or_none_and_never_half_of_one(tmp_path: Path) -> None:
    outcomes: list[int] = []
    number = 0
    while not outcomes or outcomes[-1]:
        number += 1
        root = tmp_path / f"{number}"

        def create(number: int = number, root: Path = root) -> None:
            kill_at_line(number, "client/home.py")
            Home.create(root, SITE)

        outcomes.append(child(create))
        if root.exists() and (root / "site.toml").exists():
            assert Home.open(root).site == SITE
        else:
            with pytest.raises(UsageError):
                Home.open(root)
    assert set(outcomes[:-1]) == {-signal.SIGKILL}
    assert number > 50


TOO_OPEN = {
    "the directory": (".", 0o750, "0700"),
    "the keys": ("keys", 0o701, "0700"),
    "the approvers' keys": ("keys/approvers", 0o770, "0700"),
    "the sockets": ("run", 0o755, "0750"),
    "the sockets' group": ("run", 0o770, "0750"),
    "the name": ("site.toml", 0o644, "0600"),
    "the policy": ("policy.toml", 0o620, "0600"),
    "a key": ("keys/identity.pem", 0o640, "0600"),
    "an approver's key": ("keys/approvers/weiss.pem", 0o604, "0600"),
    "what the ledger's database puts beside it": ("ledger.db-wal", 0o660, "0600"),
    "the rounds": ("rounds", 0o777, "0700"),
}


@pytest.mark.parametrize("case", TOO_OPEN)
def test_what_is_too_open_is_refused_with_the_line_that_mends_it(case: str, home: Home) -> None:
    name, bits, mended = TOO_OPEN[case]
    path = home.root / name
    if not path.exists():
        write_private(path, b"")
    path.chmod(bits)

    with pytest.raises(UsageError) as caught:
        Home.open(home.root)

    line = f"chmod {mended} {path}"
    assert str(caught.value).endswith(line)
    assert os.system(line) == 0
    assert Home.open(home.root) == home


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a directory to any group")
def test_a_directory_that_a_postman_s_group_may_pass_through_stays_so_when_it_is_mended(home: Home) -> None:
    os.chown(home.root, -1, os.getegid() + 1)
    home.root.chmod(0o755)

    with pytest.raises(UsageError, match=f"chmod 0710 {home.root}"):
        Home.open(home.root)


def test_a_directory_that_is_a_site_s_already_is_said_to_be(home: Home) -> None:
    write_private(home.identity, b"")

    with pytest.raises(UsageError, match=f"{home.root} is the site {home.site} already"):
        Home.check_new(home.root, "another")


@pytest.mark.parametrize("name", ["site.toml", "keys", "keys/identity.pem", "ledger.db", "run", "log"])
def test_a_symbolic_link_is_refused_wherever_it_points(name: str, home: Home, tmp_path: Path) -> None:
    path, there = home.root / name, tmp_path / "there"
    if path.exists():
        path.rename(there)
    else:
        write_private(there, b"")
    path.symlink_to(there)

    with pytest.raises(UsageError, match=f"{path.name} is a symbolic link"):
        Home.open(home.root)


def test_a_directory_that_is_a_symbolic_link_is_refused(home: Home, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(home.root)
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")

    with pytest.raises(UsageError, match="is a symbolic link"):
        Home.open(tmp_path / "link")
    for name in ("link", "nowhere"):
        with pytest.raises(UsageError):
            Home.create(tmp_path / name, SITE)


def test_another_users_directory_is_refused_even_to_root(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: home.root.stat().st_uid + 1)

    with pytest.raises(UsageError, match=r"belongs to user .* mend it with: chown"):
        Home.open(home.root)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a file away")
@pytest.mark.parametrize("name", [".", "site.toml", "keys", "keys/identity.pem"])
def test_what_was_given_to_another_user_is_refused(name: str, home: Home) -> None:
    write_private(home.identity, b"")
    os.chown(home.root / name, 12345, -1)

    with pytest.raises(UsageError, match="belongs to user 12345"):
        Home.open(home.root)


@pytest.mark.parametrize("name", [*sorted(FOLDERS), "run", "site.toml"])
def test_a_part_that_is_missing_or_of_another_kind_is_named(name: str, home: Home) -> None:
    path = home.root / name
    path.rename(home.root.parent / "away")

    with pytest.raises(UsageError, match=path.name if name != "site.toml" else "no site.toml"):
        Home.open(home.root)

    os.mkfifo(path, 0o600)
    with pytest.raises(UsageError, match="neither the file nor the directory"):
        Home.open(home.root)


GOOD = f'format = "{FORMAT}"\nname = "{SITE}"\ncreated = "2026-11-23T02:40:00Z"\n'
MALFORMED = {
    "empty": b"",
    "no TOML": b"[[[",
    "no text": b"\xff\xfe",
    "another format": GOOD.replace("site/1", "site/2").encode(),
    "no format": GOOD.split("\n", 1)[1].encode(),
    "a key beside": f"{GOOD}more = 1\n".encode(),
    "a name that is a number": GOOD.replace(f'"{SITE}"', "1").encode(),
    "a name that is a path": GOOD.replace(SITE, "../a").encode(),
    "a name with a line break": GOOD.replace(SITE, "a\\n").encode(),
    "a time that is a date": GOOD.replace('"2026-11-23T02:40:00Z"', "2026-11-23T02:40:00Z").encode(),
    "another time": GOOD.replace("02:40:00Z", "02:40:00+01:00").encode(),
    "nested deeply": b"a = " + b"[" * 4000,
    "a number too long": GOOD.replace(f'"{SITE}"', "9" * 4000).encode(),
    "too large": GOOD.encode() + b"#" * 4096,
    "many dots": b".".join([b"a"] * 2000) + b" = 1",
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_site_toml_that_is_not_one_is_refused(case: str, home: Home) -> None:
    (home.root / "site.toml").write_bytes(MALFORMED[case])

    with pytest.raises(UsageError, match=r"site.toml"):
        Home.open(home.root)


@given(strategies.binary(max_size=200), strategies.integers(0, len(GOOD)))
def test_no_site_toml_is_more_than_an_error_of_ours(raw: bytes, at: int) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        home = Home.create(Path(folder) / "site", SITE)
        for content in (raw, GOOD.encode()[:at] + raw + GOOD.encode()[at:]):
            (home.root / "site.toml").write_bytes(content)
            with contextlib.suppress(ConfideError):
                assert Home.open(home.root).root == home.root


def test_comments_in_a_site_toml_are_fine(home: Home) -> None:
    (home.root / "site.toml").write_text(f"# ours\n\n{GOOD}")

    assert Home.open(home.root).created == "2026-11-23T02:40:00Z"


def test_a_second_agent_is_refused_until_the_first_has_ended(home: Home) -> None:
    process = os.fork()
    if not process:
        with home.lock():
            (home.root.parent / "held").touch()
            time.sleep(60)
        os._exit(0)
    while not (home.root.parent / "held").exists():
        time.sleep(0.01)

    with pytest.raises(UsageError, match=rf"{SITE} .* is in use by process {process}: one agent at a time"):
        home.lock()
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    with home.lock(), pytest.raises(UsageError, match=f"in use by process {os.getpid()}:"):
        Home.open(home.root).lock()
    home.lock().close()


def test_a_lock_follows_no_symbolic_link(home: Home, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (home.root / ".lock").symlink_to(tmp_path / "victim")

    with pytest.raises(UsageError, match="cannot be opened"):
        home.lock()

    assert (tmp_path / "victim").read_text() == "mine"


def test_a_private_file_is_never_replaced_by_a_new_one(tmp_path: Path) -> None:
    write_private(tmp_path / "key", b"first")
    (tmp_path / "link").symlink_to(tmp_path / "none")

    for name in ("key", "link"):
        with pytest.raises(FileExistsError):
            write_private(tmp_path / name, b"second")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "link"]
    assert read_private(tmp_path / "key", 5) == b"first"


def test_a_private_file_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    import resource

    write_private(tmp_path / "old", b"old")

    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # what a full disk would do
        for write in (write_private, replace_private):
            with pytest.raises(UsageError, match="cannot be written"):
                write(tmp_path / ("new" if write is write_private else "old"), b"x" * 101)

    assert child(fill) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert read_private(tmp_path / "old", 3) == b"old"
    with pytest.raises(UsageError, match="cannot be written"):
        write_private(tmp_path / "none" / "new", b"")


def test_a_private_file_is_read_if_it_is_a_private_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "key"
    write_private(path, b"12345")
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "folder").mkdir(mode=0o700)
    os.mkfifo(tmp_path / "pipe", 0o600)

    assert read_private(path, 5) == b"12345"
    path.chmod(0o400)
    assert read_private(path, 5) == b"12345"
    for name, words in (
        ("link", "symbolic link"),
        ("folder", "neither"),
        ("pipe", "neither"),
        ("none", "not there"),
        ("a\0b", "not there"),
    ):
        with pytest.raises(UsageError, match=words):
            read_private(tmp_path / name, 5)
    with pytest.raises(UsageError, match="more than 4 bytes"):
        read_private(path, 4)
    path.chmod(0o640)
    with pytest.raises(UsageError, match=f"chmod 0600 {path}"):
        read_private(path, 5)
    path.chmod(0o600)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(UsageError, match="belongs to user"):
        read_private(path, 5)
