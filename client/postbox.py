"""The socket between postman and agent: whole envelopes over a Unix stream, one question per connection.

The agent's side greets who may ask with the sites it serves; the caller names one of them and asks; the answer comes
back and the connection ends. What is not such a conversation ends the connection and nothing else. Who may not ask is
told nothing at all.

    frame   magic, then the sizes of label, body and vector (big-endian), then these three
    label   a site's name, UTF-8; empty in the greeting
    body    an envelope's body; in the greeting canonical JSON with the sites
    vector  an envelope's vector, little-endian uint32; nothing if it has none
"""

import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
import queue
import socket
import stat
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from confide.common.canonical import canonical_bytes
from confide.common.errors import MessageError, Refused, RunError, UsageError
from confide.common.messages import LARGEST_BODY_BYTES, Envelope, Words

LARGEST_WORDS = 1 << 26  # 256 MiB
LARGEST_LABEL_BYTES = 800  # 200 characters
LONGEST_PATH_BYTES = 103  # what every Unix allows a socket
MOST_CONNECTIONS = 64  # of the agent's own user, and as many of all others together
MOST_OF_ANOTHER_USER = 32
MOST_BYTES_OF_OTHERS = 1 << 30  # what all others together may have on its way to an answer

_MAGIC = b"confide-postbox/1\n"
_HEAD = struct.Struct(">18sHII")  # magic, label bytes, body bytes, vector words
_CREDENTIALS = struct.Struct("iII")  # process, user, group
_PATIENCE_S = 60.0  # how long a peer may take until it asks, and over each frame
_GLANCE_S = 0.2
_COMPLAINT_S = 10.0  # strangers must not fill the log
_SO_PEERGROUPS = 59  # Linux, since 4.13; Python does not name it
_MOST_GROUPS = 256  # Python takes no more; who has more is known by the primary group only
_SHORT_FOLDER = 18

_log = logging.getLogger(__name__)

Answer = Callable[[Envelope], Envelope]


class Postbox:
    """The agent's end: a socket that takes questions while the `with` block lasts.

    Connections are attended by threads of their own; the answers are given by whoever calls `serve`, one at a time.
    So agents that share a model never train at once, and train in the thread they would train in without a socket.

    Admitted are processes of the agent's own user and, with a group, those that were members of it when they connected,
    as the kernel noted then. Root is no exception: it can become the agent's user, and a rule without exceptions is easier
    to check. Where the system does not tell who calls (other than Linux), the modes of directory and socket are the only
    door.

    With `hold_s` an answer leaves at exactly that time after its question had arrived, whether it succeeded or failed. One
    that is not ready then leaves after the next whole multiple. So from when answers come a caller learns nothing, not
    even by asking again meanwhile, as long as nothing takes longer than `hold_s`: see to that with a deadline on training.
    Every exchange takes at least that long then.

    Args:
        path: Where the socket is made, mode 0660, in a directory that others cannot enter.
        answers: Who answers, by site.
        group: The number of the group whose members may ask too; the socket is given to it. Its directory must be open to
            the group, mode 0750, as `Home.create` makes it.
        hold_s: After how many seconds answers leave; 0 as soon as they are ready.

    Raises:
        UsageError: The path is longer than sockets may have, something is already there, or the directory or the socket
            cannot be what the group needs.

    Guarantee: who is neither the agent's user nor a member of the group gets not a byte.
    Guarantee: other users cannot keep the agent's own user from asking.
    """

    def __init__(
        self, path: Path, answers: Mapping[str, Answer], group: int | None = None, *, hold_s: float = 0.0
    ) -> None:
        if not 0 <= hold_s < math.inf:
            raise UsageError(f"Answers cannot be held for {hold_s:g} s. Give a time of at least 0.")
        self._path = path
        self._answers = dict(answers)
        self._group = group
        self._hold_s = hold_s
        self._questions: queue.Queue[_Question] = queue.Queue()
        self._visits: set[_Visit] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._complaints = _Complaints()
        self._listener = _listen(path, group)
        self._acceptor = threading.Thread(target=self._accept, name="postbox", daemon=True)

    def __enter__(self) -> Self:
        self._acceptor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the socket and every connection, and remove the file; what is held is never sent."""
        self._closed.set()
        self._acceptor.join()
        self._listener.close()
        self._path.unlink(missing_ok=True)
        with self._lock:
            for visit in self._visits:
                with contextlib.suppress(OSError):
                    visit.connection.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(queue.Empty):
                while True:
                    self._questions.get_nowait().answer.cancel()

    def serve(self, timeout_s: float) -> bool:
        """Answer the next question in the calling thread; return whether one came within `timeout_s`."""
        try:
            question = self._questions.get(timeout=timeout_s)
        except queue.Empty:
            return False
        try:
            question.answer.set_result(self._answers[question.site](question.envelope))
        except Exception:
            _log.exception("site %s gave no answer", question.site)
            question.answer.cancel()
        except BaseException:
            question.answer.cancel()
            raise
        return True

    def _accept(self) -> None:
        self._listener.settimeout(_GLANCE_S)
        while not self._closed.is_set():
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:  # nobody came
                continue
            except OSError as error:  # such as too many open files: others must end first
                self._complaints.log(f"no connection could be taken: {error.strerror or error}")
                self._closed.wait(_GLANCE_S)
                continue
            try:
                visit = _Visit(connection=connection, user=_admitted(connection, self._group))
                self._let_in(visit)
                threading.Thread(target=self._attend, args=(visit,), name="postbox-peer", daemon=True).start()
            except (OSError, Refused, RuntimeError) as error:  # RuntimeError: no thread could be started
                self._complaints.log(f"a connection was closed: {error}")
                self._let_out(connection)

    def _let_in(self, visit: "_Visit") -> None:
        own = visit.user == os.geteuid()
        with self._lock:
            beside = [other.user for other in self._visits if (other.user == os.geteuid()) == own]
            if len(beside) >= MOST_CONNECTIONS or (not own and beside.count(visit.user) >= MOST_OF_ANOTHER_USER):
                raise Refused(f"User {visit.user} has {beside.count(visit.user)} of {len(beside)} connections open.")
            self._visits.add(visit)

    def _let_out(self, connection: socket.socket) -> None:
        with self._lock:
            self._visits = {visit for visit in self._visits if visit.connection is not connection}
        connection.close()

    def _attend(self, visit: "_Visit") -> None:
        connection = visit.connection
        try:
            if not self._greet(connection):
                return
            site, envelope = _receive(connection, _PATIENCE_S, lambda size: self._make_room(visit, size))
            arrived = time.monotonic()
            if site not in self._answers:
                raise MessageError("A question arrived for a site that is not served here.")
            answer = self._asked(_Question(site=site, envelope=envelope))
            self._hold_until_due(arrived)
            _send(connection, site, answer.result(), _PATIENCE_S)
        except (OSError, MessageError, Refused, CancelledError) as error:
            if not self._closed.is_set():
                self._complaints.log(f"a connection was closed: {str(error) or type(error).__name__}")
        finally:
            self._let_out(connection)

    def _greet(self, connection: socket.socket) -> bool:
        """Tell a caller the names of the sites. Return whether more comes: who only looks who is here has gone by then."""
        try:
            _send(connection, "", Envelope(body=canonical_bytes({"sites": sorted(self._answers)})), _PATIENCE_S)
            return bool(connection.recv(1, socket.MSG_PEEK))
        except (BrokenPipeError, ConnectionResetError):
            return False

    def _make_room(self, visit: "_Visit", size: int) -> None:
        """Return if a frame of so many bytes may be taken in; it counts until the connection ends."""
        with self._lock:
            visit.size_bytes = size
            if visit.user != os.geteuid():
                held = sum(other.size_bytes for other in self._visits if other.user != os.geteuid())
                if held > MOST_BYTES_OF_OTHERS:
                    visit.size_bytes = 0
                    raise Refused(
                        f"Other users have {held} bytes under way; at most {MOST_BYTES_OF_OTHERS} are allowed."
                    )

    def _asked(self, question: "_Question") -> Future[Envelope]:
        """Return the answer, or that there is none, once that is known."""
        with self._lock:  # closing cancels what is in the queue, and nothing enters it afterwards
            if self._closed.is_set():
                raise CancelledError
            self._questions.put(question)
        with contextlib.suppress(CancelledError):
            question.answer.exception()  # waits, and raises only if there is no answer
        return question.answer

    def _hold_until_due(self, arrived: float) -> None:
        """Return at the next whole multiple of `hold_s` after `arrived`.

        Raises:
            CancelledError: The postbox was closed meanwhile.
        """
        if self._hold_s:
            passed = time.monotonic() - arrived
            due = arrived + self._hold_s * max(1, math.ceil(passed / self._hold_s))
            if self._closed.wait(max(0.0, due - time.monotonic())):
                raise CancelledError


def call(path: Path, site: str, envelope: Envelope, timeout_s: float) -> Envelope:
    """Return the answer of `site`, which is served at `path`, to `envelope`.

    Raises:
        MessageError: What came back is not an answer, or the envelope is too large to be sent.
        RunError: Nobody answers there, not within `timeout_s`, or not for this site.
    """
    with _called(path, timeout_s) as (connection, served):
        if site not in served:
            raise RunError(f"The agent at {path} does not serve the site {site!r}; it serves {', '.join(served)}.")
        _send(connection, site, envelope, timeout_s)
        label, answer = _receive(connection, timeout_s)
    if label != site:
        raise MessageError("An answer arrived from another site than the one that was asked.")
    return answer


def sites(path: Path, timeout_s: float = 10.0) -> tuple[str, ...]:
    """Return the names of the sites served at `path`, sorted.

    Raises:
        MessageError: Who answers there is no agent.
        RunError: Nobody answers there, or not within `timeout_s`.
    """
    with _called(path, timeout_s) as (_, served):
        return served


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """Give a directory of mode 0700, removed afterwards, whose path is short enough for sockets in it."""
    usual = tempfile.gettempdir()
    place = usual if len(os.fsencode(usual)) <= _SHORT_FOLDER else "/tmp"  # noqa: S108  the directory is made 0700
    with tempfile.TemporaryDirectory(prefix="confide-", dir=place, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Question:
    site: str
    envelope: Envelope
    answer: Future[Envelope] = dataclasses.field(default_factory=Future)


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class _Visit:
    connection: socket.socket
    user: int
    size_bytes: int = 0  # of its question


class _Complaints:
    """Warnings about callers, one in `_COMPLAINT_S` at most; the next one tells how many were left out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = 0.0
        self._left_out = 0

    def log(self, text: str) -> None:
        with self._lock:
            now = time.monotonic()
            if now < self._next:
                self._left_out += 1
                return
            left_out, self._left_out, self._next = self._left_out, 0, now + _COMPLAINT_S
        _log.warning("%s%s", text, f" ({left_out} more such were not told)" if left_out else "")


def _listen(path: Path, group: int | None) -> socket.socket:
    if len(os.fsencode(path)) > LONGEST_PATH_BYTES:
        raise UsageError(
            f"The socket's path {path} has {len(os.fsencode(path))} bytes; at most {LONGEST_PATH_BYTES} are possible. "
            "Choose a shorter directory."
        )
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    bound = False
    try:
        _check_folder(path.parent, group)
        listener.bind(os.fspath(path))
        bound = True
        if group is not None:
            os.chown(path, -1, group)
        path.chmod(0o660)  # before listen: until then nobody can connect
        listener.listen(MOST_CONNECTIONS)
    except (OSError, UsageError) as error:
        listener.close()
        if bound:
            path.unlink(missing_ok=True)
        if isinstance(error, UsageError):
            raise
        remedy = " Run as a member of the group, or as root." if error.errno == errno.EPERM and bound else ""
        raise UsageError(f"Cannot make the socket {path}: {error.strerror or error}.{remedy}") from None
    return listener


def _check_folder(folder: Path, group: int | None) -> None:
    """Return if others cannot enter the socket's directory, and the group, if there is one, can and no more than that."""
    status = folder.stat()
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o027:
        raise UsageError(
            f"{folder} has mode {mode:04o}, which lets others at the agent's socket. Mend it with: "
            f"chmod {mode & ~0o027:04o} {folder}"
        )
    if group is not None and (status.st_gid != group or not mode & 0o010):
        raise UsageError(
            f"{folder} is not open to group {group}, whose members are to use the socket in it. Mend it with: "
            f"chgrp {group} {folder} && chmod 0750 {folder}"
        )


@contextlib.contextmanager
def _called(path: Path, timeout_s: float) -> Iterator[tuple[socket.socket, tuple[str, ...]]]:
    """Give a connection to `path` and the sites of the greeting."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            _connect(connection, path, timeout_s)
            _, greeting = _receive(connection, min(timeout_s, _PATIENCE_S))
            yield connection, _greeted(greeting)
        except TimeoutError:
            raise RunError(f"The agent at {path} did not answer within {timeout_s:g} s.") from None
        except OSError as error:
            raise RunError(f"No agent answers at {path}: {error.strerror or error}. Is it running?") from None


def _connect(connection: socket.socket, path: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    connection.settimeout(timeout_s)
    while True:
        try:
            connection.connect(os.fspath(path))
        except BlockingIOError:  # many others are at the door
            if time.monotonic() > deadline:
                raise TimeoutError from None
            time.sleep(0.01)
        else:
            return


def _greeted(greeting: Envelope) -> tuple[str, ...]:
    try:
        served = json.loads(greeting.body)["sites"]
    except (ValueError, RecursionError, TypeError, KeyError):
        served = None
    if not isinstance(served, list) or not all(isinstance(site, str) for site in served):
        raise MessageError("A greeting arrived that does not name the sites.")
    return tuple(served)


def _admitted(connection: socket.socket, group: int | None) -> int:
    """Return the user who called.

    The kernel noted user and groups when the caller connected. What a process does afterwards, or who gets its number when
    it has ended, changes nothing; that is why /proc is not asked.

    Raises:
        Refused: It is another user than the agent's, and no member of the group.
    """
    if sys.platform != "linux":
        return os.geteuid()
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, primary = _CREDENTIALS.unpack(raw)
    if user == os.geteuid() or (group is not None and group in (primary, *_supplementary(connection))):
        return int(user)
    who = f"user {os.geteuid()}, who runs the agent" + ("" if group is None else f", and members of group {group}")
    raise Refused(f"User {user} called, and was told nothing; only {who} may.")


def _supplementary(connection: socket.socket) -> tuple[int, ...]:
    """Return the caller's further groups; none where the kernel is too old to tell."""
    item = struct.Struct("I")
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUPS * item.size)
    except OSError:
        return ()
    return tuple(group for (group,) in item.iter_unpack(raw))


def _send(connection: socket.socket, label: str, envelope: Envelope, timeout_s: float) -> None:
    name = label.encode()
    words = np.empty(0, np.uint32) if envelope.vector is None else envelope.vector
    if words.dtype != np.uint32 or words.ndim != 1 or (envelope.vector is not None and not words.size):
        raise MessageError(f"A vector of shape {words.shape}, {words.dtype} was to be sent; (n,), uint32 was due.")
    _check_sizes(len(name), len(envelope.body), words.size)
    connection.settimeout(timeout_s)
    connection.sendall(_HEAD.pack(_MAGIC, len(name), len(envelope.body), words.size) + name + envelope.body)
    if words.size:
        connection.sendall(np.ascontiguousarray(words, "<u4").data.cast("B"))


def _receive(
    connection: socket.socket, timeout_s: float, make_room: Callable[[int], None] = lambda _: None
) -> tuple[str, Envelope]:
    """Return the label and the envelope of the next frame; `make_room` is asked before it is taken in, and may raise."""
    deadline = time.monotonic() + timeout_s
    head = bytearray(_HEAD.size)
    _fill(connection, memoryview(head), deadline)
    magic, name_bytes, body_bytes, word_count = _HEAD.unpack(head)
    if magic != _MAGIC:
        raise MessageError("Something arrived that is not a frame of this version. Use equal versions on both sides.")
    _check_sizes(name_bytes, body_bytes, word_count)
    make_room(name_bytes + body_bytes + 4 * word_count)
    text = bytearray(name_bytes + body_bytes)
    _fill(connection, memoryview(text), deadline)
    words = np.empty(word_count, "<u4")
    _fill(connection, words.data.cast("B"), deadline)
    try:
        label = text[:name_bytes].decode()
    except UnicodeDecodeError:
        raise MessageError("A frame arrived whose label is not UTF-8.") from None
    vector: Words | None = words.astype(np.uint32, copy=False) if word_count else None
    return label, Envelope(body=bytes(text[name_bytes:]), vector=vector)


def _check_sizes(label_bytes: int, body_bytes: int, words: int) -> None:
    for what, size, limit in (
        ("label bytes", label_bytes, LARGEST_LABEL_BYTES),
        ("body bytes", body_bytes, LARGEST_BODY_BYTES),
        ("vector words", words, LARGEST_WORDS),
    ):
        if size > limit:
            raise MessageError(f"A frame has {size} {what}; at most {limit} are allowed.")


def _fill(connection: socket.socket, buffer: memoryview, deadline: float) -> None:
    """Fill `buffer` from the connection."""
    filled = 0
    while filled < len(buffer):
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        count = connection.recv_into(buffer[filled:])
        if not count:
            raise MessageError("A connection ended in the middle of a frame.")
        filled += count
