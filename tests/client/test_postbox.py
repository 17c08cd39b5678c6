"""The socket between postman and agent, with real sockets and, on the other end, whatever comes."""

import contextlib
import socket
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

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
def served(path: Path, **answers: Answer) -> Iterator[Postbox]:
    """Give a postbox that is served by another thread."""
    over = threading.Event()

    def serve(box: Postbox) -> None:
        while not over.is_set():
            box.serve(0.05)

    with Postbox(path, answers) as box:
        server = threading.Thread(target=serve, args=(box,))
        server.start()
        try:
            yield box
        finally:
            over.set()
            server.join()


def echo(envelope: Envelope) -> Envelope:
    return envelope


def raw(path: Path, *pieces: bytes) -> bytes:
    """Return what comes back after the greeting when `pieces` are sent as they are."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        _, label, body, words = HEAD.unpack(connection.recv(HEAD.size, socket.MSG_WAITALL))
        connection.recv(label + body + 4 * words, socket.MSG_WAITALL)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for piece in pieces:
                connection.sendall(piece)
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
