"""Training in a process of its own: it can be killed at any moment, and the agent beside it imports no torch.

The child loads model and rows once and trains many rounds. Between the two goes one Unix socket pair. The child ends
when the parent does; what it knows goes with it.

    frame    magic, then the sizes of body and payload (big-endian), then these two
    body     canonical JSON: `kind`, and exactly the fields of that kind
    payload  little-endian float32 of a vector, digests of 32 bytes each, or nothing

Both halves are here, since they must agree on every byte: first the parent's, then the frames, then the child's.
"""

import contextlib
import ctypes
import dataclasses
import gc
import json
import logging
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from confide.client.mechanism import Delta, GivenUp, Mechanism, Randomness
from confide.client.noise import CRYPTOGRAPHIC, CryptographicNoise
from confide.client.persons import DIGEST_BYTES, person_digest, read_persons
from confide.common.adapter import Floats, Layout
from confide.common.canonical import canonical_bytes
from confide.common.errors import (
    AdapterError,
    ConfideError,
    DataError,
    MessageError,
    ModelError,
    PlanError,
    PrivacyError,
    Refused,
    RunError,
    UsageError,
)
from confide.common.plan import Plan, read_plan

if TYPE_CHECKING:
    from confide.client.private_trainer import PrivateTrainer
    from confide.common.examples import Examples

_PR_SET_PDEATHSIG = 1
_GLANCE_S = 0.2
_COMMAND = "import sys; from confide.client.child import serve; serve(int(sys.argv[1]))"
# What the child is given of the parent's environment, by how the names begin. A passphrase is not among it.
_PASSED = (
    *("PATH", "HOME", "TMPDIR", "LANG", "LC_", "PYTHON", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "DYLD_"),
    *("OMP_", "MKL_", "OPENBLAS_", "KMP_", "CUDA", "NVIDIA", "HIP_", "ROC", "TORCH", "PYTORCH_"),
)
_SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a child loads.

    Attributes:
        plan: The plan's TOML; its `[compute]` is the site's own.
        model: The base model's directory; its digest must be the plan's.
        table: The site's rows.
        person_column: The column that names whose row it is; "" if the table has none.
        ids: The namespace of the identifiers, as `person_digest` takes it.
        person_key: The key of the person digests and of the fingerprint, 32 bytes; nothing if neither is needed.
        withdrawn: The digests of persons whose rows are left out.
        fingerprint: Whether the child tells the table's fingerprint, as `read_persons` finds it.
        personal: Where what never leaves the site is kept between rounds; None keeps it in the child.

    Raises:
        UsageError: Persons have withdrawn and cannot be told from the rows, or a digest is malformed.
    """

    plan: bytes = dataclasses.field(repr=False)
    model: Path
    table: Path
    person_column: str = ""
    ids: str = ""
    person_key: bytes = dataclasses.field(default=b"", repr=False)
    withdrawn: frozenset[bytes] = dataclasses.field(default=frozenset(), repr=False)
    fingerprint: bool = False
    personal: Path | None = None

    def __post_init__(self) -> None:
        if self.withdrawn and not self.person_column:
            raise UsageError(
                "Persons have withdrawn, and there is no column to tell their rows by. Give person_column, or a table "
                "without these persons."
            )
        if (self.withdrawn or self.fingerprint) and not self.person_key:
            raise UsageError("Persons and tables are told by keyed digests. Give person_key.")
        if any(len(digest) != DIGEST_BYTES for digest in self.withdrawn):
            raise UsageError(f"A person's digest has {DIGEST_BYTES} bytes; one of another length was given.")


class ChildTrainer:
    """What an agent trains with: a child process that holds model and rows. It is ready once this is made.

    The system ends the child with the parent (Linux), and the child ends itself when the socket does (everywhere).

    Args:
        load: What the child loads.
        deadline_s: How long a round may take. Whoever holds answers to a fixed time chooses less than that time.
        load_s: How long loading may take. A round that must first start a child may take both.
        memory_mb: The most resident memory of the child, mapped files included, in MiB; beyond it is killed. None sets
            no limit. It is looked at a few times a second, so the limit of a control group is the harder one.

    Attributes:
        person_count: How many persons the rows belong to, those who withdrew not among them.
        layout: The order of the adapter's tensors; with `head` what `ring_layout` takes.
        layout_digest: Its digest.
        head: The names of the head's tensors.
        start: The adapter that a run begins with, (layout.length,), float32.
        fingerprint: The table's, 64 hexadecimal digits; "" if it was not asked for.
        evidence: What the site saw of its own training, by round: `batch_sizes`, `clipped`, `non_finite`. Exact, so it
            stays in the site.

    Raises:
        ConfideError: The child could not load, in the class and words of what went wrong there.
        UsageError: There is a limit of memory, and this system does not tell how much a process has.

    Guarantee: when a round is given up, no step beyond `steps_begun` has looked at a row.
    """

    def __init__(self, load: Load, *, deadline_s: float, load_s: float = 3600.0, memory_mb: int | None = None) -> None:
        if memory_mb is not None and not Path("/proc/self/statm").exists():
            raise UsageError("This system does not tell how much memory a process has. Set no limit of memory.")
        self._load = load
        self._deadline_s = deadline_s
        self._load_s = load_s
        self._memory_mb = memory_mb
        self._child: _Child | None = None
        self._pid_lock = threading.Lock()  # a pid is killed only while it is surely ours: before it is waited for
        self._turn = threading.Lock()  # one round at a time
        self._told_to_stop = False
        self._closed = False
        # Linux ends the child with the thread that started it, so that thread must last.
        self._starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="confide-child")
        self.evidence: dict[int, dict[str, int | tuple[int, ...]]] = {}
        self._known: _Loaded | None = None
        try:
            self.load()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ChildTrainer of {self.layout.length} numbers>"

    @property
    def process(self) -> int | None:
        """The child's process id, or None if there is no child now."""
        with self._pid_lock:
            return None if self._child is None else self._child.process.pid

    def load(self) -> None:
        """Return once a child is ready; one that is there stays. Between rounds this costs no round its time.

        Raises:
            ConfideError: It could not load.
        """
        with self._turn:
            self._ready()

    def change(self, load: Load) -> None:
        """Let a new child load other rows, under the same plan: persons withdrew, or the table has a new version.

        Raises:
            ConfideError: It could not load. The next round tries again.
            UsageError: The plan is another one.
        """
        if read_plan(load.plan).digest != read_plan(self._load.plan).digest:
            raise UsageError("A child trains for one plan. Make a new ChildTrainer for another.")
        with self._turn:
            self._end()
            self._load, self._known = load, None
            self._ready()

    def train(self, number: int, start: Floats, mechanism: Mechanism, randomness: Randomness) -> Delta:
        """Return what round `number` of private training made of `start`.

        The child draws noise of its own, fresh for this round; of `randomness` only the kind is looked at.

        Raises:
            GivenUp: The child died, was stopped, took too long or too much memory, or could not go on. The next round is
                given a new one.
            Refused: The mechanism has no privacy, or the draws are to be other than cryptographic.
        """
        if randomness.name != CRYPTOGRAPHIC or not mechanism.private:
            raise Refused(f"A child draws {CRYPTOGRAPHIC} noise and never trains without; {randomness.name} was asked.")
        with self._turn:
            progress = _Progress(number, mechanism.steps)
            try:
                link = self._ready().link
                if self._told_to_stop:
                    raise _Ended
                watch = self._watch(self._deadline_s, f"round {number}")
                link.send("train", _terms(number, mechanism), _raw(start), self._deadline_s)
                return self._taken(_answer(link, "trained", watch, progress.note), progress)
            except (ConfideError, OSError) as error:
                why = self._why(error, self._end(progress, whole=not isinstance(error, MessageError)))
                raise GivenUp(
                    f"Round {number} was given up after {progress.begun} of its {mechanism.steps} steps had begun: {why}",
                    progress.begun,
                ) from None
            except BaseException:
                self._end()
                raise

    def evidence_of(self, number: int) -> bytes:
        """Return the evidence of round `number` as canonical JSON; nothing if there is none."""
        evidence = self.evidence.get(number)
        return b"" if evidence is None else canonical_bytes(evidence)

    def stop(self) -> None:
        """Kill the child, from whatever thread: the round under way, or else the next one, is given up.

        The round after that starts a new child.
        """
        with self._pid_lock:
            self._told_to_stop = True
            if self._child is not None:
                self._child.kill()

    def close(self) -> None:
        """End the child for good."""
        self._closed = True
        self.stop()
        with self._turn:
            self._end()
        self._starter.shutdown()

    def _ready(self) -> "_Child":
        """Return a child that has loaded; a new one if there is none or it has died."""
        if self._closed:
            raise RunError("This trainer was closed.")
        if self._child is not None and not self._child.link.ended:
            return self._child
        self._end()
        child = self._starter.submit(_start, read_plan(self._load.plan).compute.threads).result()
        with self._pid_lock:
            self._child = child
            if self._told_to_stop:  # while it was being started
                child.kill()
        try:
            fields, digests = _described(self._load)
            child.link.send("load", fields, digests, self._load_s)
            self._accept(_Loaded.of(_answer(child.link, "ready", self._watch(self._load_s, "loading"))))
        except (OSError, _Ended) as error:
            status = self._end()
            raise RunError(f"The child could not load: {self._why(error, status)}") from None
        except BaseException:
            self._end()
            raise
        return child

    def _accept(self, loaded: "_Loaded") -> None:
        """Take over what a child told of what it loaded; it must not change while nobody said so."""
        known = self._known
        if known is not None and not known.equals(loaded):
            raise DataError(
                "The table or the model has changed since it was loaded first. Register the new version of the table, or "
                "put back what was there."
            )
        self._known = loaded
        self.person_count, self.layout, self.head = loaded.person_count, loaded.layout, loaded.head
        self.layout_digest, self.start, self.fingerprint = loaded.layout.digest, loaded.start, loaded.fingerprint

    def _taken(self, reply: "_Message", progress: "_Progress") -> Delta:
        sizes, values = reply.fields["batch_sizes"], _floats(reply.payload)
        whole = isinstance(sizes, list) and all(type(size) is int and 0 <= size <= self.person_count for size in sizes)
        if reply.fields["round"] != progress.number or not whole or len(sizes) != progress.steps:
            raise MessageError("The child told of another round than the one it was given.")
        if progress.begun != progress.steps or values.shape != self.start.shape or not np.isfinite(values).all():
            raise MessageError("The child gave back no update of the adapter it was given.")
        counts = {name: int(reply.fields[name]) for name in ("clipped", "non_finite")}
        self.evidence[progress.number] = {"batch_sizes": tuple(sizes), **counts}
        return Delta(values=values)

    def _watch(self, limit_s: float, what: str) -> Callable[[], None]:
        """Return what looks after the child: it raises when time is over, or the child has grown too large."""
        deadline, looked, child = time.monotonic() + limit_s, 0.0, self._child

        def watch() -> None:
            nonlocal looked
            now = time.monotonic()
            if now > deadline:
                raise _Ended(f"{what} took longer than {limit_s:g} s.")
            if self._memory_mb is not None and child is not None and now - looked > _GLANCE_S:
                looked = now
                if (held := child.memory_mb()) > self._memory_mb:
                    raise _Ended(f"the child took {held} MiB of memory; {self._memory_mb} are allowed.")

        return watch

    def _why(self, error: Exception, status: int | None) -> str:
        if self._told_to_stop:
            self._told_to_stop = False
            return "it was told to stop."
        if str(error) and not isinstance(error, ConnectionError):
            return str(error)
        if status == -signal.SIGKILL:
            return "the child was killed, perhaps because the machine ran out of memory."
        return f"the child ended ({signal.Signals(-status).name if status and status < 0 else f'code {status}'})."

    def _end(self, progress: "_Progress | None" = None, *, whole: bool = True) -> int | None:
        """Kill the child and whatever it started, wait for it, and return how it ended; None if there was none.

        A dead child does nothing that it has not told of, so what it had told is counted then. `whole` is whether all that
        it told until now was understood; if not, every step counts.
        """
        with self._pid_lock:
            child, self._child = self._child, None
            if child is None:
                return None
            child.kill()
            status = child.process.wait()
        if progress is not None:
            progress.drain(child.link, whole=whole)
        child.link.close()
        return status


def _answer(
    link: "_Link", kind: str, watch: Callable[[], None], note: "Callable[[_Message], None] | None" = None
) -> "_Message":
    """Return the child's message of this kind; `note` takes what it tells of steps before, the log what it warns of.

    Raises:
        ConfideError: The child failed, in the class and words of what went wrong there; or it ended.
    """
    while True:
        message = link.receive(watch)
        fields = message.fields
        if message.kind == kind:
            return message
        if message.kind == "log":
            name = fields["logger"] if fields["logger"].startswith("confide.") else __name__
            logging.getLogger(name).log(fields["level"], "in the child: %s", fields["text"])
        elif message.kind == "failed":
            raise _ERRORS.get(fields["error"], RunError)(fields["text"])
        elif message.kind == "step" and note is not None:
            note(message)
        else:
            raise MessageError(f"The child sent {message.kind!r} where {kind!r} was due.")


class _Ended(RunError):  # noqa: N818  no fault by itself
    """The child ended, or must end."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Child:
    process: subprocess.Popen[bytes]
    link: "_Link"

    def kill(self) -> None:
        """Kill the session that the child leads. It must not have been waited for: then its number is nobody else's."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def memory_mb(self) -> int:
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_bytes().split()[1])
        except (OSError, IndexError):  # it has just ended
            return 0
        return pages * os.sysconf("SC_PAGE_SIZE") >> 20


@dataclasses.dataclass(slots=True)
class _Progress:
    """How many steps of a round have begun. The child tells of each before it begins."""

    number: int
    steps: int
    begun: int = 0

    def note(self, message: "_Message") -> None:
        if message.fields["begun"] != self.begun + 1 or self.begun == self.steps:
            self.begun = self.steps
            raise MessageError("The child told of steps that do not follow each other.")
        self.begun += 1

    def drain(self, link: "_Link", *, whole: bool) -> None:
        """Count what a dead child had told before."""
        try:
            while whole:
                message = link.receive()
                if message.kind == "step":
                    self.note(message)
        except _Ended:
            return
        except (ConfideError, OSError):
            pass
        self.begun = self.steps


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Loaded:
    person_count: int
    layout: Layout
    head: tuple[str, ...]
    start: Floats
    fingerprint: str

    @classmethod
    def of(cls, message: "_Message") -> Self:
        fields = message.fields
        try:
            layout = Layout.of({name: tuple(map(int, shape)) for name, shape in fields["layout"]})
            found = cls(
                person_count=fields["persons"],
                layout=layout,
                head=tuple(map(str, fields["head"])),
                start=_floats(message.payload),
                fingerprint=fields["fingerprint"],
            )
        except (TypeError, ValueError):
            found = None
        if found is None or found.person_count < 1 or found.start.shape != (found.layout.length,):
            raise MessageError("The child told of a model that cannot be.")
        return found

    def equals(self, other: "_Loaded") -> bool:
        same = (self.person_count, self.layout, self.head, self.fingerprint)
        others = (other.person_count, other.layout, other.head, other.fingerprint)
        return same == others and np.array_equal(self.start, other.start)


def _start(threads: int) -> _Child:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    passed = {name: value for name, value in os.environ.items() if name.startswith(_PASSED)}
    count = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")} if threads else {}
    with theirs:
        process = subprocess.Popen(  # noqa: S603  the interpreter that runs this, and words of this file
            [sys.executable, "-P", "-c", _COMMAND, str(theirs.fileno())],
            env={**passed, **_SETTINGS, **count},
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            # Libraries may print what they work on, which may be rows. What we have to say comes through the socket.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    return _Child(process=process, link=_Link(ours))


def _terms(number: int, mechanism: Mechanism) -> dict[str, object]:
    terms = {name: float(value) for name, value in dataclasses.asdict(mechanism).items()}
    return {**terms, "steps": int(mechanism.steps), "round": int(number)}


def _described(load: Load) -> tuple[dict[str, object], bytes]:
    fields = {
        "plan": load.plan.decode(),
        "model": str(load.model.absolute()),
        "table": str(load.table.absolute()),
        "person_column": load.person_column,
        "ids": load.ids,
        "person_key": load.person_key.hex(),
        "personal": "" if load.personal is None else str(load.personal.absolute()),
    }
    return {**fields, "fingerprint": load.fingerprint}, b"".join(sorted(load.withdrawn))


_MAGIC = b"confide-child/1\n"
_HEAD = struct.Struct(">16sIQ")  # magic, body bytes, payload bytes
_LARGEST_BODY_BYTES = 1 << 24
_LARGEST_PAYLOAD_BYTES = 1 << 30
_LONGEST_TEXT = 4000
_FIELDS: Final[Mapping[str, Mapping[str, type]]] = {
    "load": {
        **dict.fromkeys(("plan", "model", "table", "person_column", "ids", "person_key", "personal"), str),
        "fingerprint": bool,
    },
    "ready": {"persons": int, "layout": list, "head": list, "fingerprint": str},
    "train": {
        **dict.fromkeys(("round", "steps"), int),
        **dict.fromkeys(("sampling_rate", "clip_norm", "noise_multiplier", "divisor"), float),
    },
    "step": {"begun": int},
    "trained": {"round": int, "batch_sizes": list, "clipped": int, "non_finite": int},
    "failed": {"error": str, "text": str},
    "log": {"level": int, "logger": str, "text": str},
}
_WITH_PAYLOAD = frozenset({"load", "ready", "train", "trained"})
_ERRORS = {
    kind.__name__: kind for kind in (UsageError, PlanError, DataError, ModelError, AdapterError, PrivacyError, RunError)
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class _Message:
    kind: str
    fields: Mapping[str, Any]
    payload: bytearray


class _Link:
    """One end of the socket between parent and child."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._begun, self._filled = bytearray(), 0  # the next message, as far as it was taken in when `watch` raised

    @property
    def ended(self) -> bool:
        """Whether the other end is closed, whatever there may still be to read."""
        return bool(self._hung_up().poll(0))

    def wait_for_the_end(self) -> None:
        """Return when the other end is closed."""
        self._hung_up().poll()

    def send(self, kind: str, fields: Mapping[str, object], payload: bytes = b"", limit_s: float | None = None) -> None:
        """Return when the message is on its way: what was sent is read by the other side even if this one dies now.

        Raises:
            OSError: The other side has ended, or takes nothing within `limit_s`.
            ValueError: The message cannot be spelled.
        """
        body = canonical_bytes({"kind": kind, **fields})
        with self._sending:
            self._connection.settimeout(limit_s)
            self._connection.sendall(_HEAD.pack(_MAGIC, len(body), len(payload)) + body)
            self._connection.sendall(payload)

    def receive(self, watch: Callable[[], None] | None = None) -> _Message:
        """Return the next message; `watch` is called several times a second until it has come, and may raise.

        Raises:
            MessageError: What arrives is no message, or only the beginning of one.
            _Ended: The other end was closed before it.
        """
        if not self._fill(_HEAD.size, watch):
            raise _Ended
        magic, body_bytes, payload_bytes = _HEAD.unpack_from(self._begun)
        if magic != _MAGIC or body_bytes > _LARGEST_BODY_BYTES or payload_bytes > _LARGEST_PAYLOAD_BYTES:
            raise MessageError("Something arrived between agent and child that is no frame.")
        self._fill(_HEAD.size + body_bytes + payload_bytes, watch)
        frame, self._begun, self._filled = self._begun, bytearray(), 0
        body = bytes(frame[_HEAD.size : _HEAD.size + body_bytes])
        del frame[: _HEAD.size + body_bytes]
        return _read(body, frame)

    def close(self) -> None:
        self._connection.close()

    def _fill(self, size: int, watch: Callable[[], None] | None) -> bool:
        """Take in the next message up to so many bytes; return False if the other end was closed before the first of them."""
        self._connection.settimeout(None if watch is None else _GLANCE_S)
        self._begun.extend(bytes(max(0, size - len(self._begun))))
        while self._filled < size:
            if watch is not None:
                watch()
            try:
                count = self._connection.recv_into(memoryview(self._begun)[self._filled :])
            except TimeoutError:
                continue
            except ConnectionResetError:  # it was closed before it had read everything
                count = 0
            if not count and self._filled:
                raise MessageError("The child ended in the middle of a message.")
            if not count:
                return False
            self._filled += count
        return True

    def _hung_up(self) -> select.poll:
        poll = select.poll()
        poll.register(self._connection, 0)  # that it was closed is told unasked
        return poll


def _read(body: bytes, payload: bytearray) -> _Message:
    try:
        fields = json.loads(body)
        canonical = isinstance(fields, dict) and canonical_bytes(fields) == body
    except (ValueError, RecursionError):
        canonical = False
    kind = str(fields.pop("kind", None)) if canonical else ""
    types = _FIELDS.get(kind, {})
    sound = types and fields.keys() == types.keys() and all(type(fields[name]) is types[name] for name in types)
    if not sound or (payload and kind not in _WITH_PAYLOAD):
        raise MessageError("Something arrived between agent and child that is no message of theirs.")
    return _Message(kind=kind, fields=fields, payload=payload)


def _raw(vector: Floats) -> bytes:
    return np.ascontiguousarray(vector, "<f4").tobytes()


def _floats(payload: bytearray) -> Floats:
    if len(payload) % 4:
        raise MessageError("A vector arrived between agent and child that ends in the middle of a number.")
    return np.frombuffer(payload, "<f4").astype(np.float32)


def serve(descriptor: int) -> None:
    """Be the child at the other end of the socket `descriptor`: load once, train round after round, end with the parent.

    Whatever fails ends the child, once it has told what it was.
    """
    os.set_inheritable(descriptor, False)
    link = _Link(socket.socket(fileno=descriptor))
    _end_with_the_parent(link)
    logging.getLogger("confide").addHandler(_Telling(link))
    try:
        trainer = _loaded(link)
        while True:
            _train(link, trainer)
    except _Ended:
        pass
    except BaseException as error:
        with contextlib.suppress(OSError):
            link.send("failed", _told(error))
        raise SystemExit(1) from None


def _loaded(link: _Link) -> "PrivateTrainer":
    """Load what the parent describes, and tell it what there is. The self-test comes before the first row."""
    from confide.client.conformance import certify
    from confide.client.private_trainer import PrivateTrainer
    from confide.common.model import attach
    from confide.common.prefix import PrefixCache

    load = _load_of(_expected(link, "load"))
    plan = read_plan(load.plan)
    model = attach(load.model, plan)
    cached = PrefixCache.helps(model)
    certificate = certify(model, cached=cached)
    examples, fingerprint = _rows(load, plan)
    cache = PrefixCache(model, plan.compute.micro_batch) if cached else None
    for _ in cache.add(examples) if cache is not None else ():
        pass
    trainer = PrivateTrainer(
        certificate, examples, cache, load.personal, lambda step: link.send("step", {"begun": step})
    )
    told = {
        "persons": examples.person_count,
        "layout": [[name, list(shape)] for name, shape in model.layout.tensors],
        "head": sorted(model.head),
        "fingerprint": fingerprint,
    }
    _let_go()
    link.send("ready", told, _raw(model.start))
    return trainer


def _let_go() -> None:
    """Give back the memory that loading and the self-test needed and nothing needs any more."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # only the C library of most Linux systems can be asked
        ctypes.CDLL(None).malloc_trim(0)


def _train(link: _Link, trainer: "PrivateTrainer") -> None:
    """Train the next round; each step is told of before it begins."""
    order = _expected(link, "train")
    terms = dict(order.fields)
    number = terms.pop("round")
    delta = trainer.train(number, _floats(order.payload), Mechanism(**terms), CryptographicNoise())
    evidence = dataclasses.asdict(trainer.evidence.pop(number))
    link.send("trained", {"round": number, **evidence}, _raw(delta.values))


def _expected(link: _Link, kind: str) -> _Message:
    message = link.receive()
    if message.kind != kind:
        raise MessageError(f"The agent sent {message.kind!r} where {kind!r} was due.")
    return message


def _load_of(message: _Message) -> Load:
    fields, digests = message.fields, bytes(message.payload)
    starts = range(0, len(digests), DIGEST_BYTES)
    return Load(
        plan=fields["plan"].encode(),
        model=Path(fields["model"]),
        table=Path(fields["table"]),
        person_column=fields["person_column"],
        ids=fields["ids"],
        person_key=bytes.fromhex(fields["person_key"]),
        withdrawn=frozenset(digests[start : start + DIGEST_BYTES] for start in starts),
        fingerprint=fields["fingerprint"],
        personal=Path(fields["personal"]) if fields["personal"] else None,
    )


def _rows(load: Load, plan: Plan) -> "tuple[Examples, str]":
    """Return the rows of those who have not withdrawn, and the fingerprint of the very table they were read from."""
    from confide.client.data import load_reader, read_examples

    fingerprint = _fingerprint(load)
    reading = read_examples(load.table, plan, load_reader(load.model, plan), extra_column=load.person_column or None)
    examples = reading.examples
    if load.withdrawn:
        column = reading.column or ()
        gone = {whose for whose in set(column) if person_digest(load.person_key, load.ids, whose) in load.withdrawn}
        kept = np.array([row for row, whose in enumerate(column) if whose not in gone], np.int64)
        if not len(kept):
            raise DataError(f"{load.table}: all persons have withdrawn, so no row remains.")
        examples = examples.subset(kept)
    if _fingerprint(load) != fingerprint:
        raise DataError(f"{load.table} changed while it was read. Let it be, and try again.")
    return examples, fingerprint


def _fingerprint(load: Load) -> str:
    if not load.fingerprint:
        return ""
    return read_persons(load.table, load.person_column or None, load.person_key, load.ids).fingerprint


class _Telling(logging.Handler):
    """Sends what the package's own loggers say to the parent. Our messages hold no rows; those of libraries stay."""

    def __init__(self, link: _Link) -> None:
        super().__init__(logging.INFO)
        self._link = link

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()[:_LONGEST_TEXT]
        with contextlib.suppress(OSError):
            self._link.send("log", {"level": record.levelno, "logger": record.name, "text": text})


def _told(error: BaseException) -> dict[str, object]:
    """Return what the parent is told of an error: our own words, or where it happened; others' words may hold rows."""
    if isinstance(error, ConfideError):
        return {"error": type(error).__name__, "text": str(error)[:_LONGEST_TEXT]}
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}, line {frame.lineno}"
    text = f"{type(error).__name__} in {place}. What it says may hold rows, so it is not told."
    return {"error": RunError.__name__, "text": text}


def _end_with_the_parent(link: _Link) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no rows in a core dump
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")  # rather this process than the agent
    threading.Thread(target=_end_at_hang_up, args=(link,), daemon=True).start()


def _end_at_hang_up(link: _Link) -> None:
    link.wait_for_the_end()
    os.killpg(os.getpid(), signal.SIGKILL)  # it leads its session
