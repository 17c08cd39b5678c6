"""A made-up site whose agent really runs, and the rest of its federation, played by whoever tests it.

The site has everything a site has: keys, ledger, policy, an approver, a federation, rows and an approved plan. Its agent
is the real worker with its real sockets and its real child, in a thread of this process or in a process of its own. The
server is real as well; the two other sites are real agents that train on nothing.
"""

import contextlib
import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from confide.client import enrolment, postbox
from confide.client import worker as workers
from confide.client.agent import Agent
from confide.client.approval import Terms, approve, revoke
from confide.client.home import Home, replace_private, write_private
from confide.client.journal import Journal
from confide.client.judgement import enforced, starter_for
from confide.client.keys import fingerprint, load_keys, make_keys
from confide.client.mechanism import Delta, Mechanism, Randomness
from confide.client.membership import Membership
from confide.client.policy import approver_entry
from confide.client.registry import Registry
from confide.client.verdict import judged, verdict
from confide.client.worker import STATUS, STOP, Assignment, Worker
from confide.common.accounting import planned_spend
from confide.common.adapter import Floats, Layout
from confide.common.bounds import ring_layout
from confide.common.crypto import Identity
from confide.common.entries import Entry
from confide.common.errors import MessageError, RunError
from confide.common.ledger import Book, Round
from confide.common.messages import Envelope, Failure, Message, Offer, kind_of, open_envelope, seal
from confide.common.plan import Plan
from confide.common.ring import RingLayout
from confide.common.roster import Roster
from confide.common.signed_plan import SignedPlan, read_signed_plan, sign_plan
from confide.common.witness import Witness
from confide.server.rounds import Run, run_round
from confide.server.store import RoundRecord
from confide.server.summation import SecureSummation

if TYPE_CHECKING:
    from confide.common.model import AdaptedModel

NAME, FEDERATION, RUN, DATA = "anna", "heart-2030", "spring", "letters"
PERSONS = 60
ADMIN, COORDINATOR, APPROVER, STRANGER = (Identity(bytes([number]) * 32) for number in (101, 102, 103, 104))
PEERS = {f"peer-{number}": Identity(bytes([number]) * 32) for number in (111, 112)}
_START_S = 120.0
_SERVE = "import sys; from tests import living; living.serve(*sys.argv[1:])"
_ROOT = Path(__file__).parents[1]

Asked = Callable[[Envelope, float], Envelope]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Living:
    """The directory `root` holds the site, its table and the signed plan; `model` is the base model's."""

    root: Path
    model: Path

    @property
    def home(self) -> Home:
        """The site's directory."""
        return Home.open(self.root / "site")

    @property
    def table(self) -> Path:
        """Its rows."""
        return self.root / "rows.csv"

    @property
    def signed(self) -> SignedPlan:
        """The plan, as signed."""
        return read_signed_plan((self.root / "plan").read_bytes(), COORDINATOR.public)

    @property
    def roster(self) -> Roster:
        """The roster in force."""
        return enrolment.current(self.home, FEDERATION)

    @property
    def book(self) -> Book:
        """What the ledger says now, as anybody finds it who verifies it."""
        return Journal.look(self.home.ledger)

    @property
    def rounds(self) -> Mapping[int, Round]:
        """The run's rounds in the ledger."""
        return self.book.rounds(RUN)

    def plan_of(self, text: str) -> None:
        """Let the plan be another, signed by the coordinator."""
        (self.root / "plan").write_bytes(
            sign_plan(text.encode(), federation=FEDERATION, run=RUN, coordinator=COORDINATOR)
        )

    def assignment(self, model: Path | None = None) -> Assignment:
        """What the agent is to serve."""
        return Assignment(signed=self.signed, data=DATA, model=model or self.model)

    @contextlib.contextmanager
    def journal(self, clock: Callable[[], float] = time.time) -> Iterator[Journal]:
        """The ledger, open."""
        journal = Journal.open(self.home.ledger, identity=self._keys.identity, clock=clock)
        try:
            yield journal
        finally:
            journal.close()

    @contextlib.contextmanager
    def registry(self) -> Iterator[Registry]:
        """The data sets, open."""
        with self.journal() as journal:
            yield Registry(self.home.data, journal, self._keys.secret(b"data"))

    def record(self, *entries: Entry) -> None:
        """Add to the ledger."""
        with self.journal() as journal:
            journal.append(*entries)

    def approve(self, days: float = 30, *, now: float | None = None, approver: Identity = APPROVER) -> None:
        """Have the plan approved for so many days from now on."""
        with self.journal() as journal:
            policy = enforced(self.home, journal)
            book, signed = journal.book, self.signed
            terms = Terms(
                ledger=book.ledger,
                recovery=book.recovery,
                plan=signed.plan,
                run=signed.run,
                federation=signed.federation,
                data=DATA,
                declared_persons=book.data_set(DATA).declared_persons,
            )
            given = approve(policy, terms, (), approver=approver, now=now or time.time(), days=int(days))
            journal.append(given)

    def revoke(self) -> None:
        """Take back every approval of the plan."""
        self.record(revoke(self.signed.digest, RUN, by="Anna Huber", reason="A test."))

    def change_policy(self, **settings: object) -> None:
        """Change settings in the policy's file, such as most_rounds, where they first stand, and nothing else."""
        lines = self.home.policy.read_text(encoding="utf-8").splitlines()
        for key, value in settings.items():
            places = [number for number, line in enumerate(lines) if line.startswith(f"{key} = ")]
            lines[places[0]] = f"{key} = {value}"
        replace_private(self.home.policy, "\n".join([*lines, ""]).encode())

    def copied(self, root: Path) -> "Living":
        """Return a copy of it, to be changed; its table is where it was."""
        shutil.copytree(self.root / "site", root / "site", symlinks=True)
        shutil.copy(self.root / "plan", root / "plan")
        return Living(root=root, model=self.model)

    @contextlib.contextmanager
    def worker(self, **options: Any) -> Iterator[Worker]:
        """The agent, as a process makes it, with the site's lock held; it judges plans in this process, if not told else."""
        home, journal_clock = self.home, options.get("clock", time.time)
        model, judge = options.pop("model", None), options.pop("judge", judged)
        judging = mock.patch.object(workers, "verdict", judge)
        with judging, home.lock(), self.journal(journal_clock) as journal:
            yield Worker(home, self._keys, journal, self.assignment(model), **options)

    @contextlib.contextmanager
    def served(self, **options: Any) -> Iterator[Worker]:
        """The agent, served in a thread of this process; in the end it is stopped."""
        faults: list[BaseException] = []

        def serve(worker: Worker) -> None:
            try:
                worker.serve()
            except BaseException as error:
                faults.append(error)

        with self.worker(**options) as worker:
            thread = threading.Thread(target=serve, args=(worker,), daemon=True)
            thread.start()
            until(lambda: worker.serving or not thread.is_alive())
            try:
                if not faults:
                    yield worker
            finally:
                worker.stop()
                thread.join(_START_S)
            if faults:
                raise faults[0]

    @contextlib.contextmanager
    def process(self) -> "Iterator[subprocess.Popen[bytes]]":
        """The agent in a process of its own, ready; in the end it is killed if it is still there."""
        process = self.started()
        try:
            until(lambda: self.answers() or process.poll() is not None)
            assert process.poll() is None, process.communicate()[1].decode()
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def started(self) -> "subprocess.Popen[bytes]":
        """Start the agent in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(self.root), str(self.model)],
            cwd=_ROOT,
            env={**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def answers(self) -> bool:
        """Whether an agent is there."""
        try:
            return postbox.sites(self.home.agent_socket, 5) == (NAME,)
        except (RunError, MessageError):
            return False

    def asked(self, envelope: Envelope, timeout_s: float = 60.0) -> Envelope:
        """What the agent answers through its socket."""
        return postbox.call(self.home.agent_socket, NAME, envelope, timeout_s)

    def told(self, message: Message) -> Message:
        """What the agent answers to a message."""
        return open_envelope(self.asked(seal(message)))

    def status(self) -> bytes:
        """What the agent tells its steward."""
        return postbox.call(self.home.control_socket, STATUS, Envelope(body=b"{}"), 10).body

    def stop(self) -> None:
        """Stop the agent as its steward does."""
        postbox.call(self.home.control_socket, STOP, Envelope(body=b"{}"), 10)

    @property
    def _keys(self) -> Any:
        return load_keys(self.home, b"", insecure_no_passphrase=True)


def serve(root: str, model: str) -> None:
    """Be the agent of the site in `root` until it is stopped."""
    living = Living(root=Path(root), model=Path(model))
    with living.worker(judge=verdict) as worker:
        worker.serve()


def made(root: Path, model: Path, plan_text: str, *, group: int | None = None) -> Living:
    """Make such a site in the directory `root`; its plan is approved.

    Args:
        root: A directory with a short path, for sockets.
        model: The base model's.
        plan_text: The plan, with `person_id` and labels.
        group: The number of the postman's group, if it is to have one.
    """
    living = Living(root=root, model=model)
    living.plan_of(plan_text)
    plan = living.signed.plan
    write_rows(living.table, plan)
    home = Home.create(root / "site", NAME, postman_group=group)
    keys = make_keys(home, b"", insecure_no_passphrase=True)
    approvers = [approver_entry("Anna Huber", APPROVER.public)]
    write_private(home.policy, starter_for(plan, NAME, [FEDERATION], approvers).encode())
    roster = Roster(
        federation=FEDERATION,
        epoch=1,
        coordinator=COORDINATOR.public,
        sites={NAME: keys.identity.public, **{name: peer.public for name, peer in PEERS.items()}},
    )
    pins = [fingerprint(ADMIN.public)]
    enrolment.join(home, FEDERATION, (ADMIN.public,), roster.signed([ADMIN]), fingerprints=pins)
    Journal.create(home.ledger, site=NAME, identity=keys.identity).close()
    with living.journal() as journal:
        enforced(home, journal)
        journal.append(enrolment.federation_entry(home, FEDERATION))
    with living.registry() as registry:
        registry.add(DATA, living.table, "patient", typical=planned_spend(plan.privacy))
    living.approve()
    return living


def plan_text(tiny: str, **settings: object) -> str:
    """The tiny plan with its column of persons and more rounds; settings such as rounds replace its own."""
    changes = {"rounds": 40, "min_persons": PERSONS // 2, **settings}
    text = tiny.replace('label = "label"', 'label = "label"\nperson_id = "patient"')
    lines = text.splitlines()
    for key, value in changes.items():
        places = [number for number, line in enumerate(lines) if line.startswith((f"{key} = ", f"# {key} = "))]
        assert places, key
        lines[places[0]] = f"{key} = {value}"
    return "\n".join([*lines, ""])


def write_rows(path: Path, plan: Plan, persons: int = PERSONS, text: str = "the service was good") -> None:
    """Write one row of each person."""
    labels = plan.task.labels
    rows = [f"{text},{labels[number % len(labels)]},p{number}" for number in range(persons)]
    path.write_text("\n".join(["text,label,patient", *rows, ""]), encoding="utf-8")


class Others:
    """The server and the two other sites of a living site's federation.

    Args:
        living: The site.
        adapted: The base model with the plan's adapter.
    """

    def __init__(self, living: Living, adapted: "AdaptedModel") -> None:
        from confide.server.aggregate import ServerState

        self.living = living
        self.plan = living.signed.plan
        self.layout: Layout = adapted.layout
        self.ring: RingLayout = ring_layout(self.plan, adapted.layout, adapted.head)
        self.start: Floats = adapted.start
        self.state = ServerState.begin(adapted.start, self.plan.federation)
        self.summation = SecureSummation(living.roster, COORDINATOR, witness=Witness())
        self.peers = {name: self._peer(name) for name in PEERS}
        self.asked: Asked = living.asked
        self.before: Callable[[str], None] = lambda kind: None  # called before the site is asked anything
        self.heard: list[tuple[Envelope, Envelope]] = []
        self._attempts: dict[int, Iterator[int]] = {}  # by round

    def offer(self, number: int, attempt: int = 1, **changes: Any) -> Offer:
        """An offer to all three, not signed."""
        offer = Offer(
            run=RUN,
            plan=self.plan.digest,
            round=number,
            attempt=attempt,
            cohort=tuple(sorted([NAME, *PEERS])),
            roster=self.living.roster.digest,
            layout=self.layout.digest,
            ring=self.ring.digest,
            signature=b"",
        )
        return dataclasses.replace(offer, **changes)

    def signed(self, offer: Offer, signer: Identity = COORDINATOR) -> Offer:
        """The offer, signed whatever it says, as an honest side would sign it that did not refuse it."""
        from tests.evil import EvilServer

        terms: Any = SimpleNamespace(roster=self.living.roster, plan=self.plan, ring=self.ring)
        attempt = EvilServer.begun(terms, offer)
        return dataclasses.replace(offer, signature=signer.sign(attempt.offered))

    def round(self, number: int) -> RoundRecord:
        """Run a round, and return its record."""
        run = Run(
            name=RUN,
            plan=self.plan,
            layout=self.layout,
            ring=self.ring,
            sites=tuple(sorted([NAME, *PEERS])),
            summation=self.summation,
            training_s=60.0,
            answer_s=60.0,
        )
        attempts = self._attempts.setdefault(number, itertools.count(1))
        self.state, record = run_round(run, self, self.state, number, attempts.__next__)
        return record

    def ask(self, messages: Mapping[str, Envelope], timeout_s: float) -> Iterator[tuple[str, Envelope]]:
        """Yield who answers; the site itself is asked last."""
        for site, envelope in sorted(messages.items(), key=lambda each: each[0] == NAME):
            if site != NAME:
                yield site, self.peers[site].answer(envelope)
                continue
            self.before(kind_of(envelope))
            with contextlib.suppress(RunError, MessageError):
                answer = self.asked(envelope, timeout_s)
                self.heard.append((envelope, answer))
                yield site, answer

    def _peer(self, name: str) -> Agent:
        from tests.ledgers import spends_of

        protection = Membership(
            site=name, identity=PEERS[name], roster=self.living.roster, plan=self.plan, ring=self.ring
        )
        return Agent(
            site=name,
            run=RUN,
            plan=self.plan,
            trainer=_Idle(self.layout, self.start),
            declared_persons=PERSONS,
            ring=self.ring,
            protection=protection,
            spends=spends_of(self.plan, RUN, site=name, persons=PERSONS, key=PEERS[name]),
        )


class _Idle:
    """Stands in for training: nothing moves."""

    person_count = PERSONS

    def __init__(self, layout: Layout, start: Floats) -> None:
        self.layout_digest = layout.digest
        self.start = start

    def train(self, number: int, start: Floats, mechanism: Mechanism, randomness: Randomness) -> Delta:
        """Return no change."""
        return Delta(values=np.zeros(len(self.start), np.float32))

    def evidence_of(self, number: int) -> bytes:
        """Return nothing."""
        return b""


def failure(answer: Message) -> Failure:
    """The failure that this answer must be."""
    assert isinstance(answer, Failure), answer
    return answer


def until(holds: Callable[[], bool], limit_s: float = _START_S) -> None:
    """Return when it holds."""
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.02)
