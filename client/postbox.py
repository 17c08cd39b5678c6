"""The socket between postman and agent: whole envelopes over a Unix stream, one question per connection.

The agent's side greets whoever connects with the sites it serves; the caller names one of them and asks; the answer
comes back and the connection ends. What is not such a conversation ends the connection and nothing else.

    frame   magic, then the sizes of label, body and vector (big-endian), then these three
    label   a site's name, UTF-8; empty in the greeting
    body    an envelope's body; in the greeting canonical JSON with the sites
    vector  an envelope's vector, little-endian uint32; nothing if it has none
"""

import contextlib
import dataclasses
import json
import logging
import os
import queue
import socket
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
MOST_CONNECTIONS = 64

_MAGIC = b"confide-postbox/1\n"
_HEAD = struct.Struct(">18sHII")  # magic, label bytes, body bytes, vector words
_CREDENTIALS = struct.Struct("iII")  # process, user, group
_PATIENCE_S = 60.0  # how long a peer may take over a frame it has begun
_GLANCE_S = 0.2
_SHORT_FOLDER = 18

_log = logging.getLogger(__name__)

Answer = Callable[[Envelope], Envelope]


class Postbox:
    """The agent's end: a socket that takes questions from the same user's processes, while the `with` block lasts.

    Connections are attended by threads of their own; the answers are given by whoever calls `serve`, one at a time.
    So agents that share a model never train at once, and train in the thread they would train in without a socket.

    Args:
        path: Where the socket is made, mode 0660, in a directory that others cannot enter.
        answers: Who answers, by site.

    Raises:
        UsageError: The path is longer than sockets may have, or something is already there.
    """

    def __init__(self, path: Path, answers: Mapping[str, Answer]) -> None:
        self._path = path
        self._answers = dict(answers)
        self._questions: queue.Queue[_Question] = queue.Queue()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._listener = _listen(path)
        self._acceptor = threading.Thread(target=self._accept, name="postbox", daemon=True)

    def __enter__(self) -> Self:
        self._acceptor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the socket and every connection, and remove the file."""
        self._closed.set()
        self._acceptor.join()
        self._listener.close()
        self._path.unlink(missing_ok=True)
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
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
            except OSError:  # mostly that nobody came
                continue
            with self._lock:
                room = len(self._open) < MOST_CONNECTIONS
                if room:
                    self._open.add(connection)
            if room:
                threading.Thread(target=self._attend, args=(connection,), name="postbox-peer", daemon=True).start()
            else:
                _log.warning("a connection was closed: %d are open already", MOST_CONNECTIONS)
                connection.close()

    def _attend(self, connection: socket.socket) -> None:
        try:
            _check_peer(connection)
            _send(connection, "", Envelope(body=canonical_bytes({"sites": sorted(self._answers)})), _PATIENCE_S)
            if not connection.recv(1, socket.MSG_PEEK):
                return  # the caller wanted the names only
            site, envelope = _receive(connection, _PATIENCE_S)
            if site not in self._answers:
                raise MessageError("A question arrived for a site that is not served here.")
            question = _Question(site=site, envelope=envelope)
            self._questions.put(question)
            _send(connection, site, question.answer.result(), _PATIENCE_S)
        except (OSError, MessageError, Refused, CancelledError) as error:
            if not self._closed.is_set():
                _log.warning("a connection was closed: %s", str(error) or type(error).__name__)
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()


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


def _listen(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > LONGEST_PATH_BYTES:
        raise UsageError(
            f"The socket's path {path} has {len(os.fsencode(path))} bytes; at most {LONGEST_PATH_BYTES} are possible. "
            "Choose a shorter directory."
        )
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(os.fspath(path))
        path.chmod(0o660)  # before listen: until then nobody can connect
        listener.listen(MOST_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise UsageError(f"Cannot make the socket {path}: {error.strerror or error}.") from None
    return listener


@contextlib.contextmanager
def _called(path: Path, timeout_s: float) -> Iterator[tuple[socket.socket, tuple[str, ...]]]:
    """Give a connection to `path` and the sites of the greeting."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.settimeout(timeout_s)
            connection.connect(os.fspath(path))
            _, greeting = _receive(connection, min(timeout_s, _PATIENCE_S))
            yield connection, _greeted(greeting)
        except TimeoutError:
            raise RunError(f"The agent at {path} did not answer within {timeout_s:g} s.") from None
        except OSError as error:
            raise RunError(f"No agent answers at {path}: {error.strerror or error}. Is it running?") from None


def _greeted(greeting: Envelope) -> tuple[str, ...]:
    try:
        served = json.loads(greeting.body)["sites"]
    except (ValueError, RecursionError, TypeError, KeyError):
        served = None
    if not isinstance(served, list) or not all(isinstance(site, str) for site in served):
        raise MessageError("A greeting arrived that does not name the sites.")
    return tuple(served)


def _check_peer(connection: socket.socket) -> None:
    """Refuse other users. Where the system does not tell who calls, the directory's mode is the only door."""
    if sys.platform == "linux":
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, user, _ = _CREDENTIALS.unpack(raw)
        if user != os.getuid():
            raise Refused(f"User {user} called; only user {os.getuid()}, who runs the agent, may.")


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


def _receive(connection: socket.socket, timeout_s: float) -> tuple[str, Envelope]:
    deadline = time.monotonic() + timeout_s
    head = bytearray(_HEAD.size)
    _fill(connection, memoryview(head), deadline)
    magic, name_bytes, body_bytes, word_count = _HEAD.unpack(head)
    if magic != _MAGIC:
        raise MessageError("Something arrived that is not a frame of this version. Use equal versions on both sides.")
    _check_sizes(name_bytes, body_bytes, word_count)
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
