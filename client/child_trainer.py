"""Training in a process of its own: it can be killed at any moment, and the agent beside it imports no torch.

The child (`client/child`) loads model and rows once and trains many rounds. Between the two goes one Unix socket pair
(`client/link`). The child ends when the parent does; what it knows goes with it.
"""

import contextlib
import dataclasses
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from confide.client.link import GLANCE_S, Ended, Link, Load, Message, floats, raw
from confide.client.mechanism import Delta, GivenUp, Mechanism, Randomness
from confide.client.noise import CRYPTOGRAPHIC
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
from confide.common.plan import read_plan

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
_ERRORS = {
    kind.__name__: kind for kind in (UsageError, PlanError, DataError, ModelError, AdapterError, PrivacyError, RunError)
}


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
            child = self._child
            return None if child is None or child.link.ended else child.process.pid

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
                    raise Ended
                watch = self._watch(self._deadline_s, f"round {number}")
                link.send("train", _terms(number, mechanism), raw(start), self._deadline_s)
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
            fields, digests = self._load.sent()
            child.link.send("load", fields, digests, self._load_s)
            self._accept(_Loaded.of(_answer(child.link, "ready", self._watch(self._load_s, "loading"))))
        except (OSError, Ended) as error:
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

    def _taken(self, reply: Message, progress: "_Progress") -> Delta:
        sizes, values = reply.fields["batch_sizes"], floats(reply.payload)
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
                raise Ended(f"{what} took longer than {limit_s:g} s.")
            if self._memory_mb is not None and child is not None and now - looked > GLANCE_S:
                looked = now
                if (held := child.memory_mb()) > self._memory_mb:
                    raise Ended(f"the child took {held} MiB of memory; {self._memory_mb} are allowed.")

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
    link: Link, kind: str, watch: Callable[[], None], note: "Callable[[Message], None] | None" = None
) -> Message:
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Child:
    process: subprocess.Popen[bytes]
    link: Link

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

    def note(self, message: Message) -> None:
        if message.fields["begun"] != self.begun + 1 or self.begun == self.steps:
            self.begun = self.steps
            raise MessageError("The child told of steps that do not follow each other.")
        self.begun += 1

    def drain(self, link: Link, *, whole: bool) -> None:
        """Count what a dead child had told before."""
        try:
            while whole:
                message = link.receive()
                if message.kind == "step":
                    self.note(message)
        except Ended:
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
    def of(cls, message: Message) -> Self:
        fields = message.fields
        try:
            layout = Layout.of({name: tuple(map(int, shape)) for name, shape in fields["layout"]})
            found = cls(
                person_count=fields["persons"],
                layout=layout,
                head=tuple(map(str, fields["head"])),
                start=floats(message.payload),
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
    return _Child(process=process, link=Link(ours))


def _terms(number: int, mechanism: Mechanism) -> dict[str, object]:
    terms = {name: float(value) for name, value in dataclasses.asdict(mechanism).items()}
    return {**terms, "steps": int(mechanism.steps), "round": int(number)}
