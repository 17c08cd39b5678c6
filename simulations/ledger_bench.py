"""What a site's ledger and its agent cost: a record's way to the disk, a verification, memory at rest, a round's requests.

The agent is the real one in a process of its own, on a directory as a site has it, with rows that nobody has. The rest of
the federation is played around it.
"""

import collections
import dataclasses
import itertools
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ParamSpec, Self, TypeVar

import numpy as np
import psutil

from confide.client import enrolment, postbox
from confide.client.agent import Agent
from confide.client.approval import Terms, approve
from confide.client.child_trainer import ChildTrainer
from confide.client.home import Home, write_private
from confide.client.journal import Journal
from confide.client.judgement import enforced, starter_for
from confide.client.keys import fingerprint, make_keys
from confide.client.mechanism import Delta, Mechanism, Randomness
from confide.client.opening import opened
from confide.client.postbox import Postbox, private_folder
from confide.client.registry import Registry
from confide.client.spends import Spends
from confide.client.synthetic import write_synthetic
from confide.client.worker import STOP, Assignment, Worker
from confide.common.accounting import planned_spend
from confide.common.adapter import Floats
from confide.common.bounds import ring_layout
from confide.common.canonical import canonical_bytes, sha256
from confide.common.crypto import Identity
from confide.common.entries import (
    LATEST,
    AccountOpened,
    Approval,
    Bind,
    Commit,
    DataSet,
    Entry,
    Mask,
    PolicyInForce,
    Reserve,
    utc_text,
)
from confide.common.errors import ConfideError, RunError
from confide.common.export import read_export
from confide.common.filter import Filter
from confide.common.ledger import verify
from confide.common.messages import Envelope
from confide.common.model import AdaptedModel, attach
from confide.common.plan import read_plan
from confide.common.signed_plan import SignedPlan, read_signed_plan
from confide.common.witness import Witness
from confide.server.aggregate import ServerState
from confide.server.rounds import Run, run_rounds
from confide.server.store import RoundRecord, Store
from confide.server.summation import SecureSummation
from confide.simulations.enrolment import Enrolment
from confide.simulations.measurement import ONE_THREAD, Figure, Note, Stopwatch
from confide.simulations.rehearsal import ROSTER, Rehearsal
from confide.simulations.scenarios import demo_model, scenario
from confide.simulations.sweep import variants
from confide.simulations.vaults import open_ledger, rows_of

_MODEL_ALONE = "one process with torch, transformers, peft and the same model loaded"
_SITE, _RUN, _DATA = "site", "bench", "rows"
_TIMES = "times"  # the name by which a timed agent is asked what it measured
_BUDGET = Filter(epsilon=100.0, delta=1e-5)
_PERSONS = 1000
_RUNS = 100  # that the ledger's rounds belong to
_BLOCK_BYTES = 8192  # about what a record comes to in the database's log
_START_S = 300.0
_GLANCE_S = 0.1
_REST_S = 2.0  # after which nothing of starting is under way any more

_Given = ParamSpec("_Given")
_Got = TypeVar("_Got")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured; the figures' names stand for these sizes.

    Attributes:
        records: In the ledger before a record is timed.
        appends: How many records are timed.
        verifications: How often the export is verified.
        memory_pairs: How often the memory of the agent and of its peer is taken by turns.
        rounds: How many rounds the agent is asked for, after one that does not count.
        persons: In the agent's table.
    """

    records: int = 100_000
    appends: int = 200
    verifications: int = 3
    memory_pairs: int = 3
    rounds: int = 30
    persons: int = 100


def measure_demo(note: Note) -> dict[str, Figure]:
    """Return all figures, the agent's with the demo's model and plan.

    Raises:
        MissingPackage: The demo's model is not installed.
        RunError: The agent did not answer, or took no part in a round.
    """
    return measure(note, Sizes(), scenario("messages").plan.read_bytes(), demo_model())


def measure(note: Note, sizes: Sizes, plan: bytes, model: Path) -> dict[str, Figure]:
    """Return all figures; those of memory only where the system tells them, which Linux does.

    Args:
        note: Is told what is being done.
        sizes: How much is measured.
        plan: What the agent serves, as TOML; rounds and persons become those of `sizes`.
        model: The plan's base model.

    Raises:
        RunError: The agent did not answer, or took no part in a round.
    """
    (changed,) = variants(plan, (f"privacy.rounds={sizes.rounds + 1}", f"privacy.min_persons={sizes.persons // 2}"))
    with private_folder() as folder:
        note(f"Files lie on {_file_system(folder)}; what a write to disk takes is that disk's")
        figures = ledger_figures(note, sizes, folder)
        site = MadeUpSite.begin(folder, changed.plan, model, sizes.persons)
        if hasattr(psutil.Process, "memory_maps") and Path("/proc/self/smaps").exists():
            figures |= memory_figures(note, sizes, site)
        else:
            note("This system does not tell what is in a process's memory, so the figures of memory are left out")
        return figures | socket_figures(note, sizes, site)


def ledger_figures(note: Note, sizes: Sizes, folder: Path) -> dict[str, Figure]:
    """Return `append_ms`, `fsync_ms` and `verify_s`; the ledger is made in `folder`."""
    note(f"A ledger of {sizes.records} records")
    export, steward = folder / "export.jsonl", Identity.generate()
    journal = Journal.create(folder / "ledger.db", site=_SITE, identity=Identity.generate())
    try:
        journal.append(*_approved(journal.book.ledger, steward))
        entries = _rounds()
        journal.append(*itertools.islice(entries, sizes.records - journal.book.size))
        note(f"  {sizes.appends} more, one by one")
        appends = []
        for entry in itertools.islice(entries, sizes.appends):
            began = time.perf_counter()
            journal.append(entry)
            appends.append(1000 * (time.perf_counter() - began))
        journal.export(export)
    finally:
        journal.close()
    blocks = _block_ms(folder / "blocks", sizes.appends)
    note("  its verification")
    verified = []
    for _ in range(sizes.verifications):
        watch = Stopwatch()
        with watch:
            verify(*read_export(export))
        verified.append(watch.seconds)
    return {
        "append_ms": Figure.of(appends, "ms"),
        "fsync_ms": Figure.of(blocks, "ms"),
        "verify_s": Figure.of(verified, "s"),
    }


def memory_figures(note: Note, sizes: Sizes, site: "MadeUpSite") -> dict[str, Figure]:
    """Return `agent_idle_mb`, and the two memories of which it is the difference."""
    ours, theirs = [], []
    for number in range(1, sizes.memory_pairs + 1):
        note(f"Memory of an idle agent and of its model alone, {number} of {sizes.memory_pairs}")
        with site.agent() as agent:
            time.sleep(_REST_S)
            ours.append(held_mb((agent, *agent.children(recursive=True))))
        with site.model_alone() as peer:
            time.sleep(_REST_S)
            theirs.append(held_mb((peer,)))
    return {
        "agent_idle_mb": Figure.of([our - their for our, their in zip(ours, theirs, strict=True)], "MB", _MODEL_ALONE),
        "agent_mb": Figure.of(ours, "MB"),
        "model_mb": Figure.of(theirs, "MB"),
    }


def socket_figures(note: Note, sizes: Sizes, site: "MadeUpSite") -> dict[str, Figure]:
    """Return `socket_ms`, and how much of it the socket itself takes."""
    note(f"{sizes.rounds} rounds through an agent's socket")
    with site.timed_agent():
        rounds = site.rounds()[1:]
    return {
        "socket_ms": Figure.of([1000 * (times.asked_s - times.training_s) for times in rounds], "ms"),
        "socket_alone_ms": Figure.of([1000 * (times.asked_s - times.answering_s) for times in rounds], "ms"),
    }


def held_mb(processes: Iterable[psutil.Process]) -> float:
    """Return the memory that would be free without these processes, in units of 10⁶ bytes.

    That is what is each one's own, and each file's pages once, of the one process that has most of them; whoever else has
    them too plays no part.
    """
    own, files = 0, collections.Counter[str]()
    for process in processes:
        mapped = collections.Counter[str]()
        for part in process.memory_maps(grouped=False):
            own += part.anonymous
            mapped[part.path] += part.rss - part.anonymous
        files |= mapped  # the larger count of each
    return (own + files.total()) / 1e6


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RoundTimes:
    """Where the time of one round's requests to an agent went.

    Attributes:
        asked_s: From each question to its answer as the postman sees it, all of them together.
        answering_s: The part of it in which the agent worked on the answers.
        training_s: The part of that in which it waited for its child's training.
    """

    asked_s: float
    answering_s: float
    training_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MadeUpSite:
    """A site's directory, in which a plan's run is approved for made-up rows, and the federation that asks for it.

    Attributes:
        home: The directory.
        federation: The federation.
        signed: The file with the signed plan.
        model: The base model's local directory.
    """

    home: Home
    federation: Rehearsal
    signed: Path
    model: Path

    @classmethod
    def begin(cls, folder: Path, plan_toml: bytes, model: Path, persons: int) -> Self:
        """Make one in `folder`, as its steward and the federation's admin would together."""
        plan, steward = read_plan(plan_toml), Identity.generate()
        home = Home.create(folder / "site", _SITE)
        keys = make_keys(home, b"", insecure_no_passphrase=True)
        federation = Rehearsal.begin(folder / "federation", _SITE, keys.identity.public)
        name, admin = federation.roster.federation, federation.admin.public
        roster = (federation.directory / ROSTER).read_bytes()
        enrolment.join(home, name, (admin,), roster, fingerprints=[fingerprint(admin)])
        write_private(home.policy, starter_for(plan, _SITE, [name], [f"The steward {steward.public.hex()}"]).encode())
        write_synthetic(plan, folder / "rows.csv", persons)
        signed = folder / "plan.signed"
        signed.write_bytes(federation.sign(plan_toml, _RUN))
        journal = Journal.create(home.ledger, site=_SITE, identity=keys.identity)
        try:
            policy = enforced(home, journal)
            registry = Registry(home.data, journal, keys.secret(b"data"))
            spend, person_id = planned_spend(plan.privacy), plan.data.person_id
            data = registry.add(_DATA, folder / "rows.csv", person_id, typical=spend)
            terms = Terms(
                ledger=journal.book.ledger,
                recovery="",
                plan=plan,
                run=_RUN,
                federation=name,
                data=_DATA,
                declared_persons=data.declared_persons,
            )
            approval = approve(policy, terms, (), approver=steward, now=time.time(), days=1)
            journal.append(enrolment.federation_entry(home, name), approval)
        finally:
            journal.close()
        return cls(home=home, federation=federation, signed=signed, model=model)

    @contextmanager
    def agent(self) -> Iterator[psutil.Process]:
        """Give the agent's process once it answers; afterwards it has been told to stop."""
        with _started(_AGENT, self._arguments, self._answers) as process:
            yield process
            postbox.call(self.home.control_socket, STOP, Envelope(body=b""), _START_S)
            process.wait(_START_S)

    @contextmanager
    def timed_agent(self) -> Iterator[psutil.Process]:
        """Give an agent's process that measures how long it answers and trains; see `rounds`."""
        with _started(_TIMED_AGENT, self._arguments, self._answers) as process:
            yield process

    @contextmanager
    def model_alone(self) -> Iterator[psutil.Process]:
        """Give a process that has loaded the model, and nothing of ours that trains it."""
        plan, loaded = self.signed.with_name("plan.toml"), self.signed.with_name("loaded")
        plan.write_bytes(self._plan().toml)
        loaded.unlink(missing_ok=True)
        with _started(_MODEL, [str(plan), str(self.model), str(loaded)], loaded.exists) as process:
            yield process

    def rounds(self) -> list[RoundTimes]:
        """Play the whole run with a timed agent, and return the times of each round.

        Raises:
            RunError: The agent took no part in a round.
        """
        plan = self._plan().plan
        adapted = attach(self.model, plan)
        run = Run(
            name=_RUN,
            plan=plan,
            layout=adapted.layout,
            ring=ring_layout(plan, adapted.layout, adapted.head),
            sites=tuple(sorted(self.federation.roster.sites)),
            summation=SecureSummation(self.federation.roster, self.federation.coordinator, witness=Witness()),
        )
        postman = _Postman(self.home.agent_socket, self._others(run, adapted))
        store, times = Store(self.signed.with_name("run")), list[RoundTimes]()

        def ended(record: RoundRecord) -> None:
            if _SITE not in record.present:
                raise RunError(f"In the benchmark the agent took no part in round {record.round}: {record.missing}.")
            times.append(postman.times())

        run_rounds(run, postman, store, ServerState.begin(adapted.start, plan.federation), ended)
        return times

    def _others(self, run: Run, adapted: AdaptedModel) -> dict[str, Agent]:
        """Return the agents of the federation's other sites, which are real too but for their training."""
        federation, persons = self.federation, run.plan.privacy.min_persons
        enrolled = Enrolment(roster=federation.roster, coordinator=federation.coordinator, identities=federation.peers)
        agents = {}
        for name, identity in federation.peers.items():
            journal = open_ledger(
                None, site=name, identity=identity, plan=run.plan, run=run.name, declared_persons=persons
            )
            agents[name] = Agent(
                site=name,
                run=run.name,
                plan=run.plan,
                trainer=_Idler(adapted, persons),
                declared_persons=persons,
                ring=run.ring,
                protection=enrolled.member(name, run.plan, run.ring),
                spends=Spends(journal, run=run.name, plan=run.plan.digest, data=rows_of(run.name)),
            )
        return agents

    def _plan(self) -> SignedPlan:
        return read_signed_plan(self.signed.read_bytes(), self.federation.coordinator.public)

    def _answers(self) -> bool:
        with suppress(ConfideError):
            return postbox.sites(self.home.agent_socket) != ()
        return False

    @property
    def _arguments(self) -> tuple[str, ...]:
        return (str(self.home.root), str(self.signed), self.federation.coordinator.public.hex(), str(self.model))


class _Postman:
    """Asks the other sites in this process, and the agent through its socket, with a watch in hand."""

    def __init__(self, socket: Path, others: Mapping[str, Agent]) -> None:
        self._socket = socket
        self._others = others
        self._asked_s = 0.0

    def ask(self, messages: Mapping[str, Envelope], timeout_s: float) -> Iterator[tuple[str, Envelope]]:
        for site, message in messages.items():
            if site in self._others:
                yield site, self._others[site].answer(message)
                continue
            began = time.perf_counter()
            answer = postbox.call(self._socket, site, message, timeout_s)
            self._asked_s += time.perf_counter() - began
            yield site, answer

    def times(self) -> RoundTimes:
        """Return the times since this was asked last."""
        told = json.loads(postbox.call(self._socket, _TIMES, Envelope(body=b""), _START_S).body)
        asked_s, self._asked_s = self._asked_s, 0.0
        return RoundTimes(asked_s=asked_s, **told)


class _Idler:
    """A trainer that leaves every adapter as it is."""

    def __init__(self, adapted: AdaptedModel, persons: int) -> None:
        self.person_count = persons
        self.layout_digest = adapted.layout.digest
        self.start = adapted.start

    def train(self, number: int, start: Floats, mechanism: Mechanism, randomness: Randomness) -> Delta:
        return Delta(values=np.zeros_like(start))

    def evidence_of(self, number: int) -> bytes:
        return b""


_AGENT = """
import sys
from pathlib import Path
from confide.client.opening import opened
from confide.client.worker import Assignment, Worker
from confide.common.signed_plan import read_signed_plan
site, signed, coordinator, model = sys.argv[1:]
plan = read_signed_plan(Path(signed).read_bytes(), bytes.fromhex(coordinator))
assignment = Assignment(signed=plan, data="rows", model=Path(model))
with opened(Path(site), None, insecure_no_passphrase=True) as its, its.home.lock():
    Worker(its.home, its.keys, its.journal, assignment).serve()
"""
_TIMED_AGENT = """
import sys
from confide.simulations.ledger_bench import serve_timed
serve_timed(*sys.argv[1:])
"""
_MODEL = """
import sys
from pathlib import Path
import torch, transformers, peft
from confide.common.model import attach
from confide.common.plan import read_plan
plan, model, loaded = map(Path, sys.argv[1:])
kept = attach(model, read_plan(plan.read_bytes()))
loaded.touch()
sys.stdin.read()  # until whoever measures is gone
"""


def serve_timed(site: str, signed: str, coordinator: str, model: str) -> None:
    """Be the agent of a made-up site until this process is ended; under the name `times` it tells how long it took."""
    answering, training = _Clock(), _Clock()
    ChildTrainer.train = training.over(ChildTrainer.train)  # type: ignore[method-assign]
    plan = read_signed_plan(Path(signed).read_bytes(), bytes.fromhex(coordinator))

    def times(_: Envelope) -> Envelope:
        told = {"answering_s": answering.taken(), "training_s": training.taken()}
        return Envelope(body=canonical_bytes(told))

    with opened(Path(site), None, insecure_no_passphrase=True) as its, its.home.lock():
        worker = Worker(its.home, its.keys, its.journal, Assignment(signed=plan, data=_DATA, model=Path(model)))
        with (
            worker.ready() as answer,
            Postbox(its.home.agent_socket, {_SITE: answering.over(answer), _TIMES: times}) as box,
        ):
            while True:
                box.serve(_START_S)


class _Clock:
    """Adds up how long the calls of functions take."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def over(self, function: Callable[_Given, _Got]) -> Callable[_Given, _Got]:
        """Return the function with its calls counted."""

        def counted(*arguments: _Given.args, **named: _Given.kwargs) -> _Got:
            began = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self._seconds += time.perf_counter() - began

        return counted

    def taken(self) -> float:
        """Return the seconds since this was asked last."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


@contextmanager
def _started(script: str, arguments: Sequence[str], ready: Callable[[], bool]) -> Iterator[psutil.Process]:
    """Give a process that runs `script` once it is ready; afterwards it is ended.

    Raises:
        RunError: It ended before, or took too long.
    """
    with tempfile.TemporaryFile() as said:
        command = [sys.executable, "-W", "ignore", "-c", script, *arguments]
        process = subprocess.Popen(  # noqa: S603  these are our own words
            command, env=os.environ | ONE_THREAD, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said
        )
        try:
            deadline = time.monotonic() + _START_S
            while not ready():
                if process.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    raise RunError(f"A process of the benchmark did not begin: {said.read().decode()[-500:]}")
                time.sleep(_GLANCE_S)
            yield psutil.Process(process.pid)
        finally:
            process.kill()
            process.wait()


def _approved(ledger: str, steward: Identity) -> Iterator[Entry]:
    """Yield what comes before the rounds: a policy, a data set with its account, and the approvals of all runs."""
    epsilon, delta, key = _BUDGET.epsilon, _BUDGET.delta, steward.public.hex()
    yield PolicyInForce(
        digest=sha256(b"policy"),
        epsilon=epsilon,
        delta=delta,
        plan_epsilon=epsilon,
        plan_delta=delta,
        approvals_needed=1,
        approvers=(key,),
        most_days=10**7,
        renewal_days=0,
        most_renewals=0,
        release_noise=0.0,
        words=(),
    )
    yield AccountOpened(account="1", epsilon=epsilon, delta=delta, order=_BUDGET.order)
    yield DataSet(
        data=_DATA,
        version=1,
        event="add",
        fingerprint=key,
        declared_persons=_PERSONS,
        person_id="",
        ids="",
        accounts=("1",),
    )
    for run in range(_RUNS):
        reserve = _reserve(run, 1)
        yield Approval(
            ledger=ledger,
            plan=reserve.plan,
            name="bench",
            run=reserve.run,
            federation="",
            data=_DATA,
            epsilon=epsilon,
            delta=delta,
            sampling_rate=reserve.sampling_rate,
            noise_multiplier=reserve.noise_multiplier,
            clip_norm=reserve.clip_norm,
            steps_per_round=reserve.steps,
            rounds=10**6,
            divisor=reserve.divisor,
            by="The steward",
            key=key,
            expires=utc_text(LATEST),
            nonce=secrets.token_hex(16),
        ).signed(steward)


def _rounds() -> Iterator[Entry]:
    """Yield the records of whole rounds without end, one round of each run after the other."""
    for number, run in ((number, run) for number in itertools.count(1) for run in range(_RUNS)):
        reserve = _reserve(run, number)
        yield reserve
        yield Bind(run=reserve.run, round=number, commitment=sha256(f"vector {run} {number}".encode()))
        yield Mask(run=reserve.run, round=number, attempt=1, digest=sha256(f"masked {run} {number}".encode()))
        yield Commit(run=reserve.run, round=number, evidence="")


def _reserve(run: int, number: int) -> Reserve:
    """Return the reservation of a round so cheap that 10⁵ records of them stay under the budget; each run's is another."""
    return Reserve(
        run=f"run {run}",
        plan=sha256(f"plan {run}".encode()),
        data=_DATA,
        version=1,
        round=number,
        sampling_rate=0.001,
        noise_multiplier=4.0 + run / 1000,
        steps=4,
        clip_norm=1.0,
        divisor=0.001 * _PERSONS,
        noise="cryptographic",
        start=sha256(f"adapter {run} {number}".encode()),
        roster=sha256(b"roster"),
    )


def _block_ms(path: Path, count: int) -> list[float]:
    """Return how long the disk takes, in ms, for each of `count` bare blocks at the end of a file."""
    block, milliseconds = os.urandom(_BLOCK_BYTES), []
    with path.open("wb", buffering=0) as stream:
        for _ in range(count):
            began = time.perf_counter()
            stream.write(block)
            os.fsync(stream.fileno())
            milliseconds.append(1000 * (time.perf_counter() - began))
    return milliseconds


def _file_system(folder: Path) -> str:
    """Return the kind of the file system that a directory is on."""
    mounted = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next(
        (mounted[place] for place in (folder.resolve(), *folder.resolve().parents) if place in mounted), "a disk"
    )
