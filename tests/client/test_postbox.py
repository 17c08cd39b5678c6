"""The socket between postman and agent, with real sockets and, on the other end, whatever comes."""

import contextlib
import os
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from confide.client import postbox
from confide.client.postbox import Answer, Postbox, private_folder
from confide.common.errors import MessageError, RunError, UsageError
from confide.common.messages import LARGEST_BODY_BYTES, Envelope

HEAD = struct.Struct(">18sHII")


@pytest.fixture
def folder() -> Iterator[Path]:
    with private_folder() as path:
        yield path


@contextlib.contextmanager
def served(path: Path, group: int | None = None, hold_s: float = 0.0, **answers: Answer) -> Iterator[Postbox]:
    """Give a postbox that is served by another thread."""
    over = threading.Event()

    def serve(box: Postbox) -> None:
        while not over.is_set():
            box.serve(0.05)

    with Postbox(path, answers, group, hold_s=hold_s) as box:
        server = threading.Thread(target=serve, args=(box,))
        server.start()
        try:
            yield box
        finally:
            over.set()
            server.join()


def echo(envelope: Envelope) -> Envelope:
    return envelope


def raw(path: Path, *pieces: bytes, finish: bool = True) -> bytes:
    """Return what comes back after the greeting when `pieces` are sent as they are."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        _, label, body, words = HEAD.unpack(connection.recv(HEAD.size, socket.MSG_WAITALL))
        connection.recv(label + body + 4 * words, socket.MSG_WAITALL)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for piece in pieces:
                connection.sendall(piece)
            if finish:
                connection.shutdown(socket.SHUT_WR)
            return connection.recv(1 << 16)
    return b""


@pytest.mark.parametrize("words", [1, 1_000_000])
def test_body_and_vector_arrive_as_they_were_sent(folder: Path, words: int) -> None:
    vector = np.random.default_rng(1).integers(0, 2**32, words, dtype=np.uint32)

    with served(folder / "agent", north=echo):
        answer = postbox.call(folder / "agent", "north", Envelope(body=b"a body", vector=vector), 30)

    assert answer.body == b"a body"
    assert answer.vector is not None
    assert answer.vector.dtype == np.uint32
    np.testing.assert_array_equal(answer.vector, vector)


def test_an_envelope_without_a_vector_stays_without(folder: Path) -> None:
    with served(folder / "agent", north=echo):
        answer = postbox.call(folder / "agent", "north", Envelope(body=b"a body"), 30)

    assert answer.vector is None


def test_each_site_is_answered_by_its_own(folder: Path) -> None:
    def signed(name: bytes) -> Answer:
        return lambda envelope: Envelope(body=name + envelope.body)

    with served(folder / "agent", south=signed(b"south "), north=signed(b"north ")):
        names = postbox.sites(folder / "agent")
        bodies = [postbox.call(folder / "agent", name, Envelope(body=b"hears"), 30).body for name in names]

    assert names == ("north", "south")
    assert bodies == [b"north hears", b"south hears"]


def test_agents_are_asked_one_at_a_time_in_the_serving_thread(folder: Path) -> None:
    threads: list[int] = []

    def note(envelope: Envelope) -> Envelope:
        threads.append(threading.get_ident())
        return envelope

    callers = [
        threading.Thread(target=postbox.call, args=(folder / "agent", name, Envelope(body=b"{}"), 30))
        for name in ("a", "b", "c") * 3
    ]
    with Postbox(folder / "agent", {"a": note, "b": note, "c": note}) as box:
        for caller in callers:
            caller.start()
        for _ in callers:
            assert box.serve(30)
        for caller in callers:
            caller.join()

    assert threads == [threading.get_ident()] * len(callers)


def test_the_socket_is_for_user_and_group_and_its_folder_for_the_user(folder: Path) -> None:
    with Postbox(folder / "agent", {"north": echo}):
        modes = [stat.S_IMODE(path.stat().st_mode) for path in (folder / "agent", folder)]

    assert modes == [0o660, 0o700]
    assert not (folder / "agent").exists()


@pytest.mark.parametrize(
    "frame",
    [
        b"GET / HTTP/1.1\r\n\r\n" * 10,
        b"confide-postbox/1",
        HEAD.pack(b"confide-postbox/2\n", 5, 2, 0) + b"north{}",
        HEAD.pack(b"confide-postbox/1\n", 5, 2, 0) + b"no",
        HEAD.pack(b"confide-postbox/1\n", 5, 2, 9) + b"north{}" + bytes(35),
        HEAD.pack(b"confide-postbox/1\n", 5, LARGEST_BODY_BYTES + 1, 0) + b"north{}",
        HEAD.pack(b"confide-postbox/1\n", 5, 2, 2**32 - 1) + b"north{}",
        HEAD.pack(b"confide-postbox/1\n", 2**16 - 1, 2, 0) + b"north{}",
        HEAD.pack(b"confide-postbox/1\n", 5, 2, 0) + b"\xff\xff\xff\xff\xff{}",
        HEAD.pack(b"confide-postbox/1\n", 5, 2, 0) + b"south{}",
    ],
    ids=[
        *("another protocol", "half a head", "another version", "half a body", "half a vector", "a body too large"),
        *("a vector too large", "a label too large", "a label not UTF-8", "a site not served"),
    ],
)
def test_a_malformed_frame_ends_its_connection_and_harms_nobody(folder: Path, frame: bytes) -> None:
    with served(folder / "agent", north=echo):
        answer = raw(folder / "agent", frame)
        after = postbox.call(folder / "agent", "north", Envelope(body=b"still here"), 30)

    assert answer == b""
    assert after.body == b"still here"


def test_a_silent_connection_keeps_nobody_waiting(folder: Path) -> None:
    with served(folder / "agent", north=echo), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as idle:
        idle.connect(str(folder / "agent"))

        answer = postbox.call(folder / "agent", "north", Envelope(body=b"a body"), 30)

    assert answer.body == b"a body"


def test_who_only_looks_whether_somebody_is_there_leaves_no_trace(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with served(folder / "agent", north=echo):
        for _ in range(postbox.MOST_CONNECTIONS - 1):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as glance:
                glance.connect(str(folder / "agent"))
        postbox.call(folder / "agent", "north", Envelope(body=b"a body"), 30)

    assert not caplog.records


def test_an_answer_that_fails_ends_its_connection_only(folder: Path) -> None:
    def fail(envelope: Envelope) -> Envelope:
        raise ValueError

    with served(folder / "agent", north=fail, south=echo):
        with pytest.raises(MessageError, match="ended in the middle"):
            postbox.call(folder / "agent", "north", Envelope(body=b"a body"), 30)
        answer = postbox.call(folder / "agent", "south", Envelope(body=b"a body"), 30)

    assert answer.body == b"a body"


@pytest.mark.parametrize(
    "envelope",
    [
        Envelope(body=bytes(LARGEST_BODY_BYTES + 1)),
        Envelope(body=b"", vector=np.zeros(0, np.uint32)),
        Envelope(body=b"", vector=np.zeros((2, 2), np.uint32)),
        Envelope(body=b"", vector=np.zeros(postbox.LARGEST_WORDS + 1, np.uint32)),
    ],
    ids=["a body too large", "an empty vector", "a matrix", "a vector too large"],
)
def test_what_is_no_envelope_is_not_sent(folder: Path, envelope: Envelope) -> None:
    with served(folder / "agent", north=echo), pytest.raises(MessageError):
        postbox.call(folder / "agent", "north", envelope, 30)


def test_a_caller_learns_why_there_is_no_answer(folder: Path) -> None:
    with pytest.raises(RunError, match="No agent answers"):
        postbox.sites(folder / "agent")
    with served(folder / "agent", north=echo), pytest.raises(RunError, match="does not serve the site 'south'"):
        postbox.call(folder / "agent", "south", Envelope(body=b""), 30)
    with Postbox(folder / "agent", {"north": echo}), pytest.raises(RunError, match=r"within 0\.1 s"):
        postbox.call(folder / "agent", "north", Envelope(body=b""), 0.1)


def test_a_path_too_long_for_a_socket_is_refused(folder: Path) -> None:
    deep = folder / ("d" * 100)
    deep.mkdir()

    with pytest.raises(UsageError, match="Choose a shorter directory"):
        Postbox(deep / "agent", {"north": echo})


def test_a_private_folder_has_room_for_sockets_wherever_temporary_files_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("d" * 100)))

    with private_folder() as path, Postbox(path / "agent", {"north": echo}):
        pass

    assert not path.exists()


as_root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="only root can become another user, and only Linux is asked"
)
STRANGER, GROUP, OTHER_GROUP = 54_321, 54_322, 54_323
CALLER = """
import os, socket, sys, time
path, user, primary, *more = sys.argv[1], *map(int, sys.argv[2:])
os.setgroups(more); os.setgid(primary); os.setuid(user)
connections = []
for _ in range({count}):
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(path)
    connection.settimeout(10)
    connections.append(connection)
{then}
"""


def called_as(path: Path, *numbers: int, count: int = 1, then: str = "print(connection.recv(99))") -> str:
    """Return what a process prints that calls as another user: user, primary group, further groups."""
    with calling_as(path, *numbers, count=count, then=then) as caller:
        return caller.communicate(timeout=30)[0].strip()


def calling_as(path: Path, *numbers: int, count: int, then: str) -> "subprocess.Popen[str]":
    script = CALLER.format(count=count, then=then)
    command = [sys.executable, "-c", script, str(path), *map(str, numbers)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def opened(folder: Path) -> Path:
    """Let the group into the folder, as the site's directory does."""
    os.chown(folder, -1, GROUP)
    folder.chmod(0o750)
    return folder / "agent"


@as_root
@pytest.mark.parametrize("groups", [(GROUP,), (OTHER_GROUP, GROUP), (OTHER_GROUP, 7, GROUP, 9)])
def test_a_member_of_the_group_is_greeted_whichever_of_its_groups_it_is(folder: Path, groups: tuple[int, ...]) -> None:
    with served(opened(folder), group=GROUP, north=echo):
        greeting = called_as(folder / "agent", STRANGER, *groups)

    assert greeting.startswith("b'confide-postbox/1")


@as_root
@pytest.mark.parametrize("numbers", [(STRANGER, OTHER_GROUP), (STRANGER, OTHER_GROUP, 7, 9), (1, GROUP + 9)])
def test_who_is_neither_the_agents_user_nor_a_member_of_the_group_gets_not_a_byte(
    folder: Path, numbers: tuple[int, ...]
) -> None:
    with served(opened(folder), group=GROUP, north=echo):
        folder.chmod(0o755)  # as if every other door had been left open
        (folder / "agent").chmod(0o666)
        heard = called_as(folder / "agent", *numbers)
        after = postbox.call(folder / "agent", "north", Envelope(body=b"still here"), 30)

    assert heard == "b''"
    assert after.body == b"still here"


@as_root
def test_without_a_group_other_users_get_not_a_byte(folder: Path) -> None:
    with served(folder / "agent", north=echo):
        folder.chmod(0o755)
        (folder / "agent").chmod(0o666)
        heard = called_as(folder / "agent", STRANGER, GROUP)

    assert heard == "b''"


@as_root
def test_modes_alone_keep_others_out_of_the_groups_socket(folder: Path) -> None:
    with Postbox(opened(folder), {"north": echo}, GROUP):
        status = (folder / "agent").stat()
        heard = called_as(
            folder / "agent",
            STRANGER,
            OTHER_GROUP,
            count=0,
            then="try: socket.socket(socket.AF_UNIX).connect(path)\nexcept PermissionError: print('no entry')",
        )

    assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, GROUP)
    assert heard == "no entry"


@as_root
def test_other_users_cannot_keep_the_agents_own_user_from_asking(folder: Path) -> None:
    with served(opened(folder), group=GROUP, north=echo):
        greeted = "print(sum(each.recv(1) == b'c' for each in connections), flush=True); input()"
        with calling_as(folder / "agent", STRANGER, GROUP, count=80, then=greeted) as stranger:
            assert stranger.stdout is not None
            heard = stranger.stdout.readline()
            answer = postbox.call(folder / "agent", "north", Envelope(body=b"a body"), 30)
            stranger.communicate("\n", timeout=30)

    assert int(heard) == postbox.MOST_OF_ANOTHER_USER
    assert answer.body == b"a body"


@as_root
def test_what_other_users_send_may_not_fill_the_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postbox, "MOST_BYTES_OF_OTHERS", 3000)
    head = HEAD.pack(b"confide-postbox/1\n", 5, 2, 300)
    half = f"for each in connections: each.recv(99); each.sendall({head!r})\n"

    with served(opened(folder), group=GROUP, north=echo):
        heard = called_as(
            folder / "agent",
            *(STRANGER, GROUP),
            count=4,
            then=half + "time.sleep(0.3)\nfor each in connections: each.settimeout(0.1)\nopen_still = 0\n"
            "for each in connections:\n try: each.recv(1)\n except TimeoutError: open_still += 1\nprint(open_still)",
        )
        vector = np.arange(900, dtype=np.uint32)
        answer = postbox.call(folder / "agent", "north", Envelope(body=b"", vector=vector), 30)

    assert int(heard) == 2
    assert answer.vector is not None


def test_a_directory_that_lets_others_in_or_the_group_out_is_refused(folder: Path) -> None:
    group = os.getegid()

    with pytest.raises(UsageError, match=rf"is not open to group {group}.*chmod 0750"):
        Postbox(folder / "agent", {"north": echo}, group)
    folder.chmod(0o770)
    with pytest.raises(UsageError, match=r"has mode 0770.*chmod 0750"):
        Postbox(folder / "agent", {"north": echo}, group)
    folder.chmod(0o701)
    with pytest.raises(UsageError, match="has mode 0701"):
        Postbox(folder / "agent", {"north": echo})

    assert not (folder / "agent").exists()


def test_who_does_not_ask_is_let_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postbox, "_PATIENCE_S", 0.3)

    with served(folder / "agent", north=echo) as box:
        began = time.monotonic()
        heard = raw(folder / "agent", finish=False)
        waited = time.monotonic() - began

    assert heard == b""
    assert 0.25 < waited < 5
    assert not box._visits


def test_a_frame_that_comes_byte_by_byte_has_one_deadline_for_all_of_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postbox, "_PATIENCE_S", 0.5)
    frame = HEAD.pack(b"confide-postbox/1\n", 5, 2, 9) + b"north{}" + bytes(36)
    began = time.monotonic()

    with served(folder / "agent", north=echo), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as slow:
        slow.connect(str(folder / "agent"))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for byte in frame:
                slow.sendall(bytes([byte]))
                time.sleep(0.05)

    assert 0.4 < time.monotonic() - began < 0.05 * len(frame)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    magic=st.sampled_from([b"confide-postbox/1\n", b"confide-postbox/0\n"]),
    sizes=st.tuples(st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
    rest=st.binary(max_size=300),
)
def test_no_frame_that_can_be_made_up_gets_an_answer_or_ends_the_postbox(
    fuzzed: Path, magic: bytes, sizes: tuple[int, int, int], rest: bytes
) -> None:
    answer = raw(fuzzed, HEAD.pack(magic, *sizes) + rest)

    assert answer == b""
    assert postbox.sites(fuzzed) == ("nobody_guesses_this_site",)


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Path]:
    with private_folder() as path, served(path / "agent", nobody_guesses_this_site=echo):
        yield path / "agent"


def test_the_log_is_not_filled_by_strangers(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with served(folder / "agent", north=echo):
        for _ in range(20):
            raw(folder / "agent", b"GET / HTTP/1.1\r\n\r\n" * 10)

    assert len(caplog.records) == 1


HOLD_S = 0.5
LATE_S = 0.3  # how late a busy machine may be


@pytest.mark.parametrize("works_s", [0.0, 0.1, 0.4])
def test_an_answer_leaves_at_a_fixed_time_however_long_it_took(folder: Path, works_s: float) -> None:
    def work(envelope: Envelope) -> Envelope:
        time.sleep(works_s)
        return envelope

    with served(folder / "agent", hold_s=HOLD_S, north=work):
        taken = timed(folder / "agent", "north")

    assert HOLD_S <= taken < HOLD_S + LATE_S


def test_a_failure_leaves_at_the_same_time_as_an_answer(folder: Path) -> None:
    def fail(envelope: Envelope) -> Envelope:
        raise ValueError

    with served(folder / "agent", hold_s=HOLD_S, north=fail):
        taken = timed(folder / "agent", "north")

    assert HOLD_S <= taken < HOLD_S + LATE_S


def test_an_answer_that_took_too_long_leaves_at_the_next_multiple(folder: Path) -> None:
    def work(envelope: Envelope) -> Envelope:
        time.sleep(1.3 * HOLD_S)
        return envelope

    with served(folder / "agent", hold_s=HOLD_S, north=work):
        taken = timed(folder / "agent", "north")

    assert 2 * HOLD_S <= taken < 2 * HOLD_S + LATE_S


def test_a_held_answer_keeps_nobody_waiting_and_asking_meanwhile_tells_nothing(folder: Path) -> None:
    taken: dict[str, float] = {}

    def work(envelope: Envelope) -> Envelope:
        time.sleep(0.2)
        return envelope

    def ask(site: str, delay: float) -> None:
        time.sleep(delay)
        taken[site] = timed(folder / "agent", site)

    with served(folder / "agent", hold_s=HOLD_S, north=work, south=echo, west=echo):
        callers = [
            threading.Thread(target=ask, args=each) for each in (("north", 0.0), ("south", 0.05), ("west", 0.25))
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()

    assert all(HOLD_S <= each < HOLD_S + LATE_S for each in taken.values())
    assert len(taken) == 3


def test_closing_ends_at_once_and_what_is_held_is_never_sent(folder: Path) -> None:
    ended = threading.Event()

    def ask() -> None:
        with contextlib.suppress(MessageError, RunError):
            postbox.call(folder / "agent", "north", Envelope(body=b""), 60)
            return
        ended.set()

    caller = threading.Thread(target=ask)
    with served(folder / "agent", hold_s=3600, north=echo):
        caller.start()
        time.sleep(0.3)
        began = time.monotonic()
    caller.join(5)

    assert time.monotonic() - began < 2
    assert ended.is_set()


def test_a_question_that_nobody_answers_ends_with_the_postbox(folder: Path) -> None:
    caller = threading.Thread(target=timed, args=(folder / "agent", "north"))

    with Postbox(folder / "agent", {"north": echo}):
        caller.start()
        time.sleep(0.2)
    caller.join(5)

    assert not caller.is_alive()


@pytest.mark.parametrize("hold_s", [-1.0, float("inf"), float("nan")])
def test_answers_are_held_for_a_time(folder: Path, hold_s: float) -> None:
    with pytest.raises(UsageError, match="Give a time"):
        Postbox(folder / "agent", {"north": echo}, hold_s=hold_s)


BODY = Envelope(body=b"a body")


def timed(path: Path, site: str) -> float:
    """Return after how many seconds a conversation ends."""
    began = time.monotonic()
    with contextlib.suppress(MessageError):
        postbox.call(path, site, BODY, 30)
    return time.monotonic() - began
