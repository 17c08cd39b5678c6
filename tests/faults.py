"""A site whose process is killed at any of its moments, started anew, and held to what it promised.

The site is a real agent in a process of its own, with ledger, vectors and witness on disk; the server and two more sites
are real too, in the process that looks on. A moment is any point at which the site touches what outlasts it: before and
after each statement that writes to the ledger, before a file is opened for writing, renamed or removed, before and after each fsync,
around each step of training, around each answer. At one of them the process kills itself with SIGKILL; or from it on the
disk is full, until the answer has left. What really
happened is known from outside: each step on data is noted in a file before it begins, each vector that is masked is noted
before it is, and the other sites' vectors are known, so an opened sum tells this site's.

Nothing here imports torch: thousands of processes are forked. Run it in a process of its own, by `sweep`.
"""

import collections
import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import logging
import mmap
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from confide.client.agent import Agent
from confide.client.journal import Journal
from confide.client.kept import Kept
from confide.client.mechanism import Delta, GivenUp, Mechanism, Randomness
from confide.client.membership import Membership
from confide.client.spends import Spends
from confide.common.accounting import planned_spend
from confide.common.adapter import Floats, Layout
from confide.common.calibration import noise_multiplier
from confide.common.canonical import canonical_bytes, sha256
from confide.common.crypto import Identity, unseal_bytes
from confide.common.entries import Commit, Mask
from confide.common.errors import ConfideError, RunError
from confide.common.export import read_export
from confide.common.filter import MOST_EPSILON, Filter, best_order
from confide.common.ledger import BOUND, COMMITTED, Book, verify
from confide.common.messages import Contribution, Envelope, Failure, Offer, Opening, kind_of, open_envelope
from confide.common.messages import vector_digest as digest_of
from confide.common.plan import Plan, read_plan, starter
from confide.common.ring import RingLayout, RingVector
from confide.common.roster import Roster
from confide.common.secagg import SiteSide
from confide.common.spend import Spend
from confide.common.witness import Witness
from confide.server.aggregate import ServerState
from confide.server.rounds import Run, run_round
from confide.server.summation import Collected, SecureSummation, Task
from tests.books import DATA, RUN, account, approval, data_set, policy

MORTAL, PEERS = "mortal", ("peer-1", "peer-2")
SITES = (MORTAL, *PEERS)
PERSONS = 120
LAYOUT = Layout.of({"B": (2, 2), "head": (1,)})
RING = RingLayout(length=LAYOUT.length, update_bound=600.0, max_sites=16)
START: Floats = np.arange(LAYOUT.length, dtype=np.float32)
# What happens in the rounds if nobody is killed; whatever is not said ends well.
RETRIED, GIVES_UP, FAILS, ROUNDS = 2, 3, 4, 6
VOID = frozenset({GIVES_UP, FAILS})
STEPS = 3
KEPT_KEY = bytes(range(32))
NOW = 1_795_435_200.0
_NEVER = 0
_KILLED = (-signal.SIGKILL, -signal.SIGALRM)
_TAKING_ROOM = (
    "before INSERT",
    "before COMMIT",
    "before a file",
    "before os.rename",
    "before os.mkdir",
    "before fsync",
)
_WRITING = ("PRAGMA journal_mode", "BEGIN IMMEDIATE", "INSERT", "COMMIT")
_ROOT = Path(__file__).parents[1]
_FORK = multiprocessing.get_context("fork")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a run in which the site was killed.

    Attributes:
        how: The kind of fault.
        round: The round that was to be under way.
        moment: The moment of the fault, from that round's beginning on, startup included; negative if a clock ran out.
        again: The moment at which the site that was started anew was killed, or 0.
        where: What the site was about to do, or had just done; at both kills if there were two.
        deaths: How often it was killed.
        broken: Every promise that was broken, a sentence each.
    """

    how: str
    round: int
    moment: int
    again: int
    where: str
    deaths: int
    broken: tuple[str, ...]


def sweep(
    folder: Path, most: Mapping[str, int], *, rounds: Iterable[int] = range(1, ROUNDS + 1), to_the_end: bool = True
) -> dict[str, list[Outcome]]:
    """Return the outcomes of runs with faults at moments that are spread evenly over the rounds, by the kind of fault.

    Args:
        folder: Where the sites' disks lie.
        most: How many runs at most of each kind: `once`, killed at a moment; `twice`, killed a second time while it
            starts anew; `anywhere`, ended when a clock runs out, be it in the middle of SQLite's own work; or `full`,
            where nobody is killed, and the disk has no room from a moment on until the answer has left.
        rounds: In which rounds there are faults.
        to_the_end: Whether all rounds that are left are run after it, not only those up to the next with a sum.
    """
    script = "import sys; from tests import faults; faults.main(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), json.dumps(dict(most)), json.dumps([*rounds]), "end" * to_the_end],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    outcomes: dict[str, list[Outcome]] = {how: [] for how in most}
    for line in done.stdout.splitlines():
        fields = json.loads(line)
        outcomes[fields["how"]].append(Outcome(**{**fields, "broken": tuple(fields["broken"])}))
    return outcomes


def main(folder: str, most: str, rounds: str, to_the_end: str) -> None:
    """Print each outcome of a sweep as a line of JSON."""
    assert "torch" not in sys.modules
    logging.disable(logging.CRITICAL)
    base = Path(folder) / "base"
    ground = Ground.begin(base)
    state = ServerState.begin(START, ground.plan.federation)
    shutil.copytree(base, Path(folder) / "warm")
    _live(ground, Path(folder) / "warm", state, 1, RETRIED, expected=())  # what is computed once need not be again
    lives = []  # at the beginning of each round: the disks, the server's state, and how many moments the round has
    for number in range(1, ROUNDS + 1):
        disks = Path(folder) / f"before-{number}"
        shutil.copytree(base, disks)
        expected = () if number in VOID else (number,)
        told = _apart(functools.partial(_live, ground, base, state, number, number, expected=expected))
        assert not told.broken, told.broken
        lives.append((number, disks, state, told.moments))
        state = told.state
    faulty = [life for life in lives if life[0] in json.loads(rounds)]
    for how, count in json.loads(most).items():
        for life in _PLANS[how](faulty, count):
            outcome = _lived(ground, Path(folder) / "run", how, life, to_the_end=bool(to_the_end))
            print(json.dumps(dataclasses.asdict(outcome)), flush=True)


_Life = tuple[int, Path, ServerState, list[str]]
_Planned = tuple[int, Path, ServerState, tuple[int, ...]]


def _lived(ground: "Ground", folder: Path, how: str, planned: _Planned, *, to_the_end: bool) -> Outcome:
    """Return the outcome of one run, in a copy of the disks as they were when its round began."""
    number, disks, state, moments = planned
    shutil.copytree(disks, folder)
    later = [other for other in range(number + 1, ROUNDS + 1) if other not in VOID]
    last = ROUNDS if to_the_end else min(later, default=ROUNDS)
    faults: dict[str, Any] = {"full": moments[0]} if how == "full" else {"deaths": moments}
    told = _apart(functools.partial(_live, ground, folder, state, number, last, expected=later, **faults))
    shutil.rmtree(folder)
    return Outcome(
        how=how,
        round=number,
        moment=moments[0],
        again=moments[1] if len(moments) > 1 else 0,
        where="; ".join(told.where),
        deaths=told.deaths,
        broken=tuple(told.broken),
    )


def _once(lives: Sequence[_Life], most: int) -> Iterator[_Planned]:
    """Yield runs with one kill each, at every moment, or at every second or third and so on if there are too many."""
    every = [
        (number, disks, state, (moment,))
        for number, disks, state, moments in lives
        for moment in range(1, len(moments) + 1)
    ]
    stride = max(1, -(-len(every) // most))
    yield from every[stride // 2 :: stride]


def _twice(lives: Sequence[_Life], most: int) -> Iterator[_Planned]:
    """Yield runs in which the site is killed once in its work, and again at each moment of its new start.

    The first kill is at each kind of moment that leaves something to be settled.
    """
    number, disks, state, moments = lives[0]
    starting = moments.index("ready") + 1
    told = [place for place, moment in enumerate(moments, start=1) if moment in {"in a step", "after training"}]
    after = [
        place for place, moment in enumerate(moments, start=1) if moment == "after COMMIT" and place > starting
    ]  # reserved, bound, masked, committed
    every = [
        (number, disks, state, (first, again))
        for first in (*after, *told[-2:])
        for again in range(1, starting + 12)  # some more: what is to be settled is written as well
    ]
    stride = max(1, -(-len(every) // most))
    yield from every[stride // 2 :: stride]


def _anywhere(lives: Sequence[_Life], most: int) -> Iterator[_Planned]:
    """Yield runs that end when a clock runs out; a negative moment is a number of microseconds."""
    draws = random.Random(5)
    for _ in range(most):
        number, disks, state, moments = draws.choice([life for life in lives if life[0] not in VOID])
        yield number, disks, state, (-draws.randint(1_000, 600 * len(moments)),)


def _full(lives: Sequence[_Life], most: int) -> Iterator[_Planned]:
    """Yield runs in which the disk is full from a moment on at which something is written."""
    every = [
        (number, disks, state, (moment,))
        for number, disks, state, moments in lives
        for moment, what in enumerate(moments, start=1)
        if moment > moments.index("ready") + 1 and what.startswith(_TAKING_ROOM)
    ]
    stride = max(1, -(-len(every) // most))
    yield from every[stride // 2 :: stride]


_PLANS = {"once": _once, "twice": _twice, "anywhere": _anywhere, "full": _full}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What stays the same: the plan, everybody's keys."""

    plan: Plan
    coordinator: Identity
    identities: Mapping[str, Identity]
    roster: Roster

    @classmethod
    def begin(cls, folder: Path) -> "Ground":
        """Make the sites' disks, and on each a ledger in which the plan is approved."""
        plan = read_plan(starter("faults", "none", "sha256:" + "0" * 64, ["query"]).encode())
        privacy = dataclasses.replace(plan.privacy, rounds=ROUNDS, steps_per_round=STEPS, min_persons=100, delta=1e-4)
        federation = dataclasses.replace(plan.federation, min_sites=3, max_sites=16)
        plan = dataclasses.replace(plan, privacy=privacy, federation=federation)
        identities = {site: Identity.generate() for site in SITES}
        coordinator = Identity.generate()
        roster = Roster(
            federation="faults",
            epoch=1,
            coordinator=coordinator.public,
            sites={site: identity.public for site, identity in identities.items()},
        )
        ground = cls(plan=plan, coordinator=coordinator, identities=identities, roster=roster)
        for site in SITES:
            (folder / site).mkdir(parents=True)
            ground._approve(folder / site / "ledger", site)
        return ground

    def _approve(self, path: Path, site: str) -> None:
        privacy = self.plan.privacy
        gate = Filter(epsilon=MOST_EPSILON, delta=privacy.delta, order=best_order(privacy))
        just_room = gate.after([planned_spend(privacy)] * ROUNDS).used * (1 + 1e-6)
        budget: dict[str, Any] = {"epsilon": just_room, "delta": privacy.delta}
        journal = Journal.create(path, site=site, identity=self.identities[site], clock=lambda: NOW)
        journal.append(policy(**budget, plan_delta=privacy.delta), account(**budget, order=gate.order))
        journal.append(data_set(registered="", declared_persons=PERSONS), persons={"1": [bytes([7] * 32)]})
        journal.append(
            approval(
                ledger=journal.book.ledger,
                plan=self.plan.digest,
                delta=privacy.delta,
                noise_multiplier=noise_multiplier(privacy),
                sampling_rate=privacy.sampling_rate,
                steps_per_round=STEPS,
                rounds=ROUNDS,
                divisor=privacy.sampling_rate * PERSONS,
            )
        )
        journal.close()

    def agent(
        self, folder: Path, site: str, trainer: "Touching", protection: Membership, *, kept: Kept, witness: Witness
    ) -> Agent:
        """Return a site's agent as a new process begins it, from what is on its disk."""
        journal = Journal.open(folder / "ledger", identity=self.identities[site], clock=lambda: NOW)
        agent = Agent(
            site=site,
            run=RUN,
            plan=self.plan,
            trainer=trainer,
            declared_persons=PERSONS,
            ring=RING,
            protection=protection,
            spends=Spends(journal, run=RUN, plan=self.plan.digest, data=DATA, key=bytes(32)),
            kept=kept,
            witness=witness,
            consent=lambda message, offer: journal.sync(),
        )
        agent.spends.settle()
        return agent

    def member(self, site: str, masked: Path | None = None) -> "Noting":
        """Return how a site protects its vectors; which it masks is noted in a file, if one is given."""
        return Noting(
            site=site,
            identity=self.identities[site],
            roster=self.roster,
            plan=self.plan,
            ring=RING,
            notes=None if masked is None else os.open(masked, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600),
        )


class Moments:
    """Counts the moments at which this process could be killed, and kills it at one of them.

    Attributes:
        passed: What each was, where nobody is to be killed.
    """

    def __init__(self, shared: mmap.mmap, deadly: int = _NEVER, full: int = _NEVER) -> None:
        self._shared = shared
        self._deadly = deadly
        self._full = full
        self._is_full = False
        self._count = 0
        self.passed: list[str] = []

    def __call__(self, what: str) -> None:
        """Note that this moment has come; it may be the last."""
        self._count += 1
        self.passed.append(what)
        if self._count in {self._deadly, self._full} - {_NEVER}:
            self._shared[: len(what)] = what.encode()
            if self._count == self._deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            self._is_full = True
        if self._is_full and what.startswith(("before INSERT", "before COMMIT")):
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorname = "SQLITE_FULL"
            raise error
        if self._is_full and what.startswith(_TAKING_ROOM):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if what == "after an answer left":
            self._is_full = False

    def watch(self) -> None:
        """Let everything that this process does to its disk be a moment."""
        moment = self
        if self._deadly < 0:
            signal.setitimer(signal.ITIMER_REAL, -self._deadly / 1e6)  # nobody hears its signal, which ends the process

        class Watched(sqlite3.Connection):
            def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
                if not sql.startswith(_WRITING):  # nothing outlasts a look
                    return super().execute(sql, parameters)
                what = " ".join(sql.split()[:2])
                moment(f"before {what}")
                cursor = super().execute(sql, parameters)
                moment(f"after {what}")
                return cursor

        sync = os.fsync

        def watched_sync(descriptor: int) -> None:
            moment("before fsync")
            sync(descriptor)
            moment("after fsync")

        patch = pytest.MonkeyPatch()
        patch.setattr(os, "fsync", watched_sync)
        patch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=Watched))
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self("before a file is opened")
        elif event in {"os.rename", "os.remove", "os.mkdir", "os.link", "os.truncate"}:
            self(f"before {event}")


class Touching:
    """Stands in for training: every step notes in a file that it touches data, before it would."""

    person_count = PERSONS
    layout_digest = LAYOUT.digest
    start = START

    def __init__(self, touched: Path | None = None, moment: Callable[[str], None] = lambda what: None) -> None:
        self._touched = -1 if touched is None else os.open(touched, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._moment = moment

    def train(self, number: int, start: Floats, mechanism: Mechanism, randomness: Randomness) -> Delta:
        """Return a random update, unless this is a round that is to fail."""
        self._moment("before training")
        training = os.urandom(8).hex()
        mortal = self._touched >= 0
        for step in range(1, mechanism.steps + 1):
            if mortal and number == GIVES_UP and step == 2:
                raise GivenUp("The child was stopped.", steps_begun=1)
            self._moment("before a step")
            if mortal:
                os.write(self._touched, f"{number} {training}\n".encode())
            self._moment("in a step")
        if mortal and number == FAILS:
            raise RunError("The child sent nonsense.")
        self._moment("after training")
        return Delta(values=np.frombuffer(os.urandom(LAYOUT.length), np.uint8).astype(np.float32))

    def evidence_of(self, number: int) -> bytes:
        """Return some evidence."""
        return canonical_bytes({"round": number})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noting(Membership):
    """A membership that notes each vector in a file before it is masked."""

    notes: int | None = None

    def attend(self, offer: Offer) -> SiteSide:
        """Return the site's part, which notes."""
        side = Membership.attend(self, offer)
        mask = side.mask

        def noted(vector: RingVector) -> Contribution:
            if self.notes is not None:
                os.write(self.notes, f"{offer.round} {offer.attempt} {sha256(vector.words.tobytes())}\n".encode())
            return mask(vector)

        side.mask = noted  # type: ignore[method-assign]
        return side


class Listening(SecureSummation):
    """The honest server's summation; it keeps what the last attempt gave."""

    last: Collected

    def collect(self, channel: Any, task: Task) -> Collected:
        """Return what one attempt gave."""
        self.last = super().collect(channel, task)
        return self.last


@dataclasses.dataclass(kw_only=True)
class Told:
    """What a world tells when it ends."""

    state: ServerState
    broken: list[str]
    where: list[str]
    deaths: int
    moments: list[str]


class World:
    """The server, two peers, and the mortal site in its process.

    Args:
        ground: What stays the same.
        folder: The sites' disks.
        deaths: At which moments the mortal is killed: its first process, its second and so on.
        full: From which moment on of the first process there is no room on the disk.
    """

    def __init__(self, ground: Ground, folder: Path, deaths: Sequence[int], full: int) -> None:
        self.ground = ground
        self.folder = folder
        self.broken: list[str] = []
        self.where: list[str] = []
        self.died = 0
        self.moments: list[str] = []
        self.sent: list[tuple[int, int, str]] = []  # round, attempt, digest of each masked vector that arrived
        self.opened: list[int] = []  # rounds that the mortal helped to open, in the order in which that was heard
        self.server = Listening(ground.roster, ground.coordinator, witness=Witness(folder / "witness"))
        self.peers = {
            site: ground.agent(folder / site, site, Touching(), ground.member(site), kept=Kept(), witness=Witness())
            for site in PEERS
        }
        self._deaths = list(deaths)
        self._full = full
        self._now = (0, 0)  # round and attempt
        self._vectors: dict[str, Any] = {}
        self._start()

    def run(self, state: ServerState, number: int) -> ServerState:
        """Run a round, and return the server's new state; whether it was void is remembered."""
        run = Run(
            name=RUN,
            plan=self.ground.plan,
            layout=LAYOUT,
            ring=RING,
            sites=SITES,
            summation=self.server,
            training_s=30,
            answer_s=30,
        )
        attempts = itertools.count(1)
        state, record = run_round(run, self, state, number, attempts.__next__)
        self.void = record.void
        total = self.server.last.total
        if total is not None:
            rest = total.words - sum(self._vectors[site] for site in PEERS)
            self._expect(
                (number, sha256(rest.tobytes())) in {(noted[0], noted[2]) for noted in self._noted()},
                f"the opened sum of round {number} holds another vector than the one that was masked",
            )
        return state

    def ask(self, messages: Mapping[str, Envelope], timeout_s: float) -> Iterator[tuple[str, Envelope]]:
        """Yield who answers."""
        for site, envelope in messages.items():
            kind = kind_of(envelope)
            if kind == Offer.kind:
                offer = open_envelope(envelope)
                assert isinstance(offer, Offer)
                self._now = (offer.round, offer.attempt)
            if site == PEERS[1] and kind == "survivors" and self._now == (RETRIED, 1):
                continue  # it is not reached, so the round is tried again
            answer = self._asked(envelope) if site == MORTAL else self.peers[site].answer(envelope)
            if answer is None:
                continue
            if site in PEERS and kind == "start" and not isinstance(open_envelope(answer), Failure):
                peer, number = self.peers[site], self._now[0]
                kept = peer._kept.get(number, RING, peer.spends.commitment(number))
                assert kept is not None
                self._vectors[site] = kept.words.copy()
            yield site, answer

    def end(self) -> None:
        """Let the mortal end in peace, and look at everything once more."""
        with contextlib.suppress(EOFError, OSError):  # it may have ended once its last answer had left
            self._link.send(None)
            self.moments = self._link.recv()
        self._process.join()
        if self._process.exitcode:
            self._bury()
        for peer in self.peers.values():
            peer.spends._journal.close()
        self.look()
        path = self.folder / MORTAL / "ledger"
        journal = Journal.open(path, identity=self.ground.identities[MORTAL])
        journal.export(self.folder / "export")
        journal.close()
        exported = verify(*read_export(self.folder / "export"))
        self._expect(exported.root == Journal.look(path).root, "the export is another ledger")
        self._expect_order([entry for _, entry in _entries(self.folder / "export")])

    def look(self) -> None:
        """Compare what the ledger says with what really happened."""
        try:
            book = Journal.look(self.folder / MORTAL / "ledger")
        except ConfideError as error:
            self.broken.append(f"the ledger does not hold: {error}")
            return
        self._expect_counted(book)
        self._expect_bound(book)

    def _expect_counted(self, book: Book) -> None:
        rounds = book.rounds(RUN)
        steps, trainings = collections.Counter[int](), collections.defaultdict[int, set[str]](set)
        for line in _lines(self.folder / MORTAL / "touched"):
            round_number, training = line.split()
            steps[int(round_number)] += 1
            trainings[int(round_number)].add(training)
        true = []
        for number, touched in sorted(steps.items()):
            self._expect(len(trainings[number]) == 1, f"round {number} was trained {len(trainings[number])} times")
            known = rounds.get(number)
            if known is None:
                self.broken.append(f"round {number} touched data and is not in the ledger")
                continue
            counted = known.reserve.steps - known.given_back
            self._expect(counted >= touched, f"round {number} touched data in {touched} steps; {counted} are counted")
            reserved = known.reserve.spend(0)
            true.append(dataclasses.replace(reserved, steps=touched))
        self._expect_filter(book, true)

    def _expect_filter(self, book: Book, true: Iterable[Spend]) -> None:
        gate = book.accounts["1"].filter
        really = dataclasses.replace(gate, spent=0.0).after(true).used
        self._expect(gate.used >= really, f"the ledger counts epsilon = {gate.used}; it was {really}")

    def _expect_bound(self, book: Book) -> None:
        rounds = book.rounds(RUN)
        vectors = collections.defaultdict[int, set[str]](set)
        for number, _, vector in self._noted():
            vectors[number].add(vector)
            self._expect(
                rounds[number].commitment != "" if number in rounds else False,
                f"a vector of round {number} was masked before it was bound",
            )
        for number, several in vectors.items():
            self._expect(len(several) == 1, f"{len(several)} vectors of round {number} were masked")
        for number, known in rounds.items():
            path = self.folder / MORTAL / "rounds" / f"{number:06}.vector"
            if known.state != BOUND or not path.exists():
                continue
            plain = unseal_bytes(path.read_bytes(), KEPT_KEY, f"confide-kept/1 run {RUN} round {number}\n".encode())
            self._expect(sha256(plain) == known.commitment, f"the vector kept for round {number} is not the bound one")
            self._expect(vectors[number] <= {sha256(plain[32:])}, f"what was masked of round {number} is not bound")
        for number, attempt, _ in self.sent:
            self._expect(
                number in rounds and rounds[number].attempt >= attempt,
                f"attempt {attempt} at round {number} left, and is not in the ledger",
            )
        for number in self.opened:
            self._expect(
                number in rounds and rounds[number].state == COMMITTED,
                f"the sum of round {number} was opened, and the ledger does not say so",
            )

    def _expect_order(self, entries: Sequence[Any]) -> None:
        """Every masked vector that left is in the ledger, and nothing was masked after its sum was opened."""
        committed: set[int] = set()
        masked: set[tuple[int, int, str]] = set()
        for entry in entries:
            if isinstance(entry, Commit):
                committed.add(entry.round)
            if isinstance(entry, Mask):
                masked.add((entry.round, entry.attempt, entry.digest))
                self._expect(entry.round not in committed, f"round {entry.round} was masked after its sum was opened")
        self._expect(set(self.sent) <= masked, "a masked vector left that is not in the ledger")

    def _expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.broken.append(otherwise)

    def _noted(self) -> list[tuple[int, int, str]]:
        lines = (line.split() for line in _lines(self.folder / MORTAL / "masked"))
        return [(int(number), int(attempt), vector) for number, attempt, vector in lines]

    def _asked(self, envelope: Envelope) -> Envelope | None:
        """Return the mortal's answer, or None if it died over it; a new process is then there for the next message."""
        if not self._process.is_alive():
            self._revive()
        try:
            self._link.send(envelope.body)
            self._link.send(envelope.vector)
            answer = Envelope(body=self._link.recv(), vector=self._link.recv())
        except (EOFError, OSError):
            self._revive()
            return None
        told = open_envelope(answer)
        if isinstance(told, Contribution):
            self._expect(self._now[0] not in self.opened, f"round {self._now[0]} was masked after its sum was opened")
            self.sent.append((*self._now, digest_of(told.vector.words)))
        if isinstance(told, Opening):
            self.opened.append(self._now[0])
        return answer

    def _revive(self) -> None:
        self._process.join()
        self._bury()
        self._start()
        self.look()

    def _bury(self) -> None:
        self.died += 1
        self.where.append(bytes(self._shared).partition(b"\0")[0].decode())
        self._expect(self._process.exitcode in _KILLED, f"the site ended with {self._process.exitcode}")

    def _start(self) -> None:
        """Start the mortal's process and wait until it is ready; one that dies before is started again."""
        while True:
            ours, theirs = _FORK.Pipe()
            self._link, self._shared = ours, mmap.mmap(-1, 4096)
            deadly = self._deaths.pop(0) if self._deaths else _NEVER
            moments, self._full = Moments(self._shared, deadly, self._full), _NEVER
            folder = self.folder / MORTAL
            self._process = _FORK.Process(target=_mortal, args=(self.ground, folder, theirs, ours, moments))
            self._process.start()
            theirs.close()
            with contextlib.suppress(EOFError, OSError):
                assert ours.recv() == "ready"
                return
            self._process.join()
            if self._process.exitcode not in _KILLED:
                raise AssertionError(f"the site does not start: {self._process.exitcode}")
            self._bury()


def _mortal(ground: Ground, folder: Path, link: Connection, others: Connection, moments: Moments) -> None:
    """Be the mortal site until the end of the link."""
    others.close()
    trainer = Touching(folder / "touched", moments)
    member = ground.member(MORTAL, folder / "masked")
    moments.watch()
    kept, witness = Kept(folder / "rounds", KEPT_KEY, RUN), Witness(folder / "witness")
    agent = ground.agent(folder, MORTAL, trainer, member, kept=kept, witness=witness)
    moments("ready")
    link.send("ready")
    while (body := link.recv()) is not None:
        moments("before a message is heard")
        answer = agent.answer(Envelope(body=body, vector=link.recv()))
        moments("before an answer leaves")
        link.send(answer.body)
        link.send(answer.vector)
        moments("after an answer left")
    link.send(moments.passed)


def _live(
    ground: Ground,
    folder: Path,
    state: ServerState,
    first: int,
    last: int,
    *,
    expected: Sequence[int],
    deaths: Sequence[int] = (),
    full: int = _NEVER,
) -> Told:
    """Return what is told of these rounds, of which the expected ones must have a sum if the site lives through them."""
    world = World(ground, folder, deaths, full)
    for number in range(first, last + 1):
        died = world.died
        state = world.run(state, number)
        if (
            number in expected and world.void and world.died == died
        ):  # a clock may run out in a later round than was meant
            world.broken.append(f"round {number} has no sum: {world.void}")
    world.end()
    if full:
        world.where.append(bytes(world._shared).partition(b"\0")[0].decode())
    return Told(state=state, broken=world.broken, where=world.where, deaths=world.died, moments=world.moments)


def _apart(work: Callable[[], Told]) -> Told:
    """Return what `work` returns in a process of its own: who opens a ledger does not fork."""
    ours, theirs = _FORK.Pipe(duplex=False)

    def run() -> None:
        theirs.send(work())

    process = _FORK.Process(target=run)
    process.start()
    theirs.close()
    try:
        told = ours.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"a world ended with {process.exitcode}") from None
    process.join()
    assert isinstance(told, Told)
    return told


def _entries(export: Path) -> Iterator[tuple[bytes, Any]]:
    book = Book()
    for line in read_export(export)[0]:
        yield line, book.take(line)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
