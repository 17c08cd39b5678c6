"""The trail: what an agent did, line by line, for whoever must look into it later. It stays at the site.

Each line is canonical JSON and holds the SHA-256 of the line before, from file to file, so that nothing inside can be
changed, left out or moved unseen. That lines are missing at the end no such chain can show: note `Checked.head` elsewhere
from time to time.

    {"at":"2026-11-23T02:40:00Z","event":"refused","format":"confide-trail/1","prev":"sha256:…","round":3,"seq":17}
"""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from confide.common.canonical import canonical_bytes, sha256
from confide.common.disk import append, whole
from confide.common.errors import RunError, UsageError

FORMAT: Final = "confide-trail/1"
LONGEST_TEXT = 1000
MOST_FIELDS = 32
LARGEST_FILE_BYTES = 16 << 20
LINES_A_MINUTE = 60  # of one kind: nobody who can cause them can fill the disk
_FIRST = "sha256:" + "0" * 64
_FILE = re.compile(r"trail-(\d{6})\.jsonl")
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")
_RESERVED = frozenset({"format", "seq", "prev", "at", "event"})
_LONGEST_LINE_BYTES = 1 << 20

Value = str | int | float | bool


class Trail:
    """A trail in a directory, in files `trail-000001.jsonl` and so on, mode 0600; several processes may write to it.

    Only numbers, truth values and short texts enter it. Whoever records never gives rows, secrets or exact figures of
    training: the trail is for more eyes than those are.

    Args:
        folder: Where it is; made, mode 0700, if absent.
        clock: Gives the seconds since 1970. It may go back, and then the trail shows that.
        largest_bytes: A file that has so many is followed by the next.

    Raises:
        RunError: It cannot be read or written, or its last line is damaged otherwise than by a crash.

    Guarantee: what `record` returned from is on disk. A line torn by a crash is put aside beside its file, and the trail
    says so.
    """

    def __init__(
        self, folder: Path, *, clock: Callable[[], float] = time.time, largest_bytes: int = LARGEST_FILE_BYTES
    ) -> None:
        self._folder = folder
        self._clock = clock
        self._largest_bytes = largest_bytes
        self._lock = threading.Lock()
        self._end = _End()
        with self._alone():
            pass  # what a crash left is mended now

    def record(self, event: str, fields: Mapping[str, Value] | None = None) -> None:
        """Return once it is on disk that `event` happened. Texts beyond LONGEST_TEXT characters are cut.

        Args:
            event: A word such as `round-refused`: lower-case letters, digits, - and _.
            fields: What belongs to it, by names of the same form; at most MOST_FIELDS.

        Raises:
            RunError: It cannot be written.
            UsageError: A name or a value is not what may be recorded.
        """
        checked = _checked(event, fields or {})
        with self._alone():
            self._write(event, checked)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep every other writer out, and know the trail's end: another process may have moved it."""
        with self._lock:
            try:
                self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                descriptor = os.open(self._folder / ".trail.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
                with open(descriptor, "wb") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    self._catch_up()
                    yield
            except OSError as error:
                self._end = _End()
                raise RunError(
                    f"The trail in {self._folder} cannot be written: {error.strerror or error}. Make room there, or let "
                    "this user write to it."
                ) from None

    def _catch_up(self) -> None:
        files = _files(self._folder)
        if not files:
            self._end = _End()
            return
        path, size = files[-1], files[-1].stat().st_size
        if (path, size) == (self._end.path, self._end.size):
            return
        lines = path.read_bytes().splitlines(keepends=True)
        torn = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        if lines:
            seq, _ = _parsed(lines[-1], path)
            self._end = _End(path=path, size=size - len(torn), seq=seq, head=sha256(lines[-1]))
        elif torn:
            raise RunError(f"{path} holds no whole line. Put the files of this trail aside; a new one then begins.")
        else:
            raise RunError(f"{path} is empty. Remove it; the trail then goes on in the file before it.")
        if torn:
            self._put_aside(path, size - len(torn), torn)

    def _put_aside(self, path: Path, size: int, torn: bytes) -> None:
        aside = path.with_name(f"{path.stem}-{size}.torn")
        with whole(aside) as draft:
            draft.write_bytes(torn)
        with path.open("r+b") as stream:
            stream.truncate(size)
            os.fsync(stream.fileno())
        self._write("mended", {"aside": aside.name, "bytes": len(torn)})

    def _write(self, event: str, fields: Mapping[str, Value]) -> None:
        end = self._end
        at = datetime.datetime.fromtimestamp(int(self._clock()), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        told = {"format": FORMAT, "seq": end.seq + 1, "prev": end.head, "at": at, "event": event, **fields}
        line = canonical_bytes(told) + b"\n"
        path, size = end.path, end.size
        if path is None or size >= self._largest_bytes:
            number = 1 if path is None else _number(path) + 1
            path, size = self._folder / f"trail-{number:06}.jsonl", 0
            with whole(path) as draft:  # so that a file has its first line from its first moment
                draft.write_bytes(line)
        else:
            append(path, line)
        self._end = _End(path=path, size=size + len(line), seq=end.seq + 1, head=sha256(line))


class Allowance:
    """How many lines of one kind a trail takes: LINES_A_MINUTE. What is beyond is counted, and told with the next line.

    Args:
        a_minute: How many lines a minute.
        clock: Gives seconds that never go back.
    """

    def __init__(self, a_minute: int = LINES_A_MINUTE, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._a_minute = a_minute
        self._clock = clock
        self._began = -math.inf
        self._taken = self._left_out = 0

    def take(self) -> dict[str, Value] | None:
        """Return what the next line shall hold besides: how many were left out before it; None if it is left out too."""
        now = self._clock()
        if now - self._began >= 60:
            self._began, self._taken = now, 0
        if self._taken >= self._a_minute:
            self._left_out += 1
            return None
        self._taken += 1
        left_out, self._left_out = self._left_out, 0
        return {"left_out": left_out} if left_out else {}


class TrailHandler(logging.Handler):
    """Writes warnings to a trail, as the event `log`, as many as an Allowance allows. Of an exception it writes the class.

    Args:
        trail: The trail.
        level: From which level on.
        clock: Gives seconds that never go back.
    """

    def __init__(
        self, trail: Trail, level: int = logging.WARNING, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(level)
        self._trail = trail
        self._allowance = Allowance(clock=clock)

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record; one that cannot be written is told to the standard error, as handlers do."""
        try:
            if (left_out := self._allowance.take()) is None:
                return
            fields: dict[str, Value] = {
                "level": record.levelname.lower(),
                "logger": record.name,
                "text": record.getMessage(),
            }
            if record.exc_info and record.exc_info[0] is not None:
                fields["exception"] = record.exc_info[0].__name__
            self._trail.record("log", fields | left_out)
        except Exception:
            self.handleError(record)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What `verify_trail` found.

    Attributes:
        files: How many files.
        first: The number of the first record; above 1 if older files were removed.
        last: The number of the last record; 0 if there is none.
        head: The SHA-256 of the last line; to be noted elsewhere, where it shows later whether lines are missing at the end.
    """

    files: int
    first: int
    last: int
    head: str


def verify_trail(folder: Path) -> Checked:
    """Return what a trail holds, if every line of it is what was written.

    The oldest files may have been removed; what is left is then checked from its first line on.

    Raises:
        RunError: A line or a file is damaged, missing, added or moved; the first of them is named.
    """
    files = _files(folder)
    first, seq, head = 1, 0, _FIRST
    for place, path in enumerate(files):
        if place and _number(path) != _number(files[place - 1]) + 1:
            raise RunError(f"In {folder} the file before {path.name} is missing.")
        number = 0
        for number, line in enumerate(_lines(path), start=1):
            found, prev = _parsed(line, path, number)
            if place == 0 and number == 1 and found > 1 and _number(path) > 1:
                first, seq, head = found, found - 1, prev
            if (found, prev) != (seq + 1, head):
                raise RunError(f"Line {number} of {path} does not follow the line before it.")
            seq, head = found, sha256(line)
        if not number:
            raise RunError(f"{path} is empty.")
    return Checked(files=len(files), first=first, last=seq, head=head)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _End:
    """Where a trail ends."""

    path: Path | None = None
    size: int = 0
    seq: int = 0
    head: str = _FIRST


def _checked(event: str, fields: Mapping[str, Value]) -> dict[str, Value]:
    if not _NAME.fullmatch(event) or not all(_NAME.fullmatch(name) for name in fields) or _RESERVED & fields.keys():
        raise UsageError(
            "Names in a trail are up to 40 lower-case letters, digits, - and _, and none of "
            f"{', '.join(sorted(_RESERVED))}; here are {event!r} and {', '.join(fields)}."
        )
    if len(fields) > MOST_FIELDS:
        raise UsageError(f"An event has {len(fields)} fields; at most {MOST_FIELDS} are allowed.")
    checked: dict[str, Value] = {}
    for name, value in fields.items():
        if type(value) not in (str, int, float, bool) or (isinstance(value, float) and not math.isfinite(value)):
            raise UsageError(
                f"{name} is a {type(value).__name__}; a trail takes text, finite numbers and truth values."
            )
        if type(value) is int and abs(value) >= 1 << 63:
            raise UsageError(f"{name} is a number of {value.bit_length()} bits; a trail takes those of 63.")
        checked[name] = (
            value[: LONGEST_TEXT - 1] + "…" if isinstance(value, str) and len(value) > LONGEST_TEXT else value
        )
    return checked


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if _FILE.fullmatch(path.name))
    except OSError as error:
        raise RunError(f"The trail in {folder} cannot be read: {error.strerror or error}.") from None


def _number(path: Path) -> int:
    return int(path.name[6:12])


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as stream:
            while line := stream.readline(_LONGEST_LINE_BYTES):
                yield line
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}.") from None


def _parsed(line: bytes, path: Path, number: int = 0) -> tuple[int, str]:
    """Return a line's number and what it says of the line before."""
    try:
        tree = json.loads(line)
        if canonical_bytes(tree) + b"\n" == line and tree["format"] == FORMAT and type(tree["seq"]) is int:
            return tree["seq"], str(tree["prev"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    which = f"Line {number}" if number else "The last line"
    if not line.endswith(b"\n"):
        raise RunError(f"{which} of {path} is torn. If a crash tore it, the agent mends that when it writes next.")
    raise RunError(f"{which} of {path} is damaged.")
