"""The site's agent as a process: it opens the vault, makes sure that it may serve a plan, and answers until it is stopped.

Before any row is read it has looked at everything that could forbid the plan: whose signature it bears, the policy as it is
on disk, who approved it, the base model's digest, the table's fingerprint, the budget. Policy, approvals and budget are
looked at again before every message, so what a steward changes holds from the next exchange on.

It holds keys, ledger and sockets, and no model: that is the child's (`client/child_trainer`).
"""

import dataclasses
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Final

from confide.client import enrolment
from confide.client.agent import Agent
from confide.client.approval import Terms, given, needed
from confide.client.child_trainer import ChildTrainer
from confide.client.gauges import Gauges
from confide.client.home import Home
from confide.client.journal import Journal, software
from confide.client.judgement import Price, Refusal, enforced, judge_offer, judge_plan, judge_price, require
from confide.client.kept import Kept
from confide.client.keys import Keys
from confide.client.link import Load
from confide.client.membership import Membership
from confide.client.policy import Policy
from confide.client.postbox import Postbox
from confide.client.readiness import check_unit
from confide.client.registry import Current, Registry
from confide.client.seen import check_goes_on, seen_in
from confide.client.spends import Spends
from confide.client.trail import Trail
from confide.common.base import base_digest
from confide.common.bounds import ring_layout
from confide.common.calibration import noise_multiplier, remember
from confide.common.canonical import canonical_bytes
from confide.common.entries import DataSet, Started
from confide.common.errors import DataError, LedgerError, Refused
from confide.common.filter import Filter
from confide.common.messages import (
    Contribution,
    Envelope,
    Failure,
    Message,
    Offer,
    Peers,
    Signatures,
    Start,
    Survivors,
    kind_of,
    open_envelope,
)
from confide.common.plan import Plan
from confide.common.signed_plan import SignedPlan
from confide.common.witness import Witness

STATUS: Final = "status"
METRICS: Final = "metrics"
STOP: Final = "stop"
_GLANCE_S = 0.2
_ASKED = frozenset(message.kind for message in (Offer, Peers, Start, Survivors, Signatures))
_RECORDED = frozenset({Offer.kind, Start.kind})  # what follows from these is in the ledger; a line waits for the disk
_FAILURES_A_MINUTE = 60  # that the trail takes: nobody who brings messages can fill the disk

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What an agent is to serve.

    Attributes:
        signed: The plan, as its coordinator signed it.
        data: The data set, by its name in the registry.
        model: The base model's local directory.
    """

    signed: SignedPlan
    data: str
    model: Path


class Worker:
    """A site's agent for one plan; `ready` makes it fit to answer, `serve` answers.

    Args:
        home: The site's directory; its lock is the caller's.
        keys: The site's keys.
        journal: The site's ledger.
        assignment: What is served.
        group: The number of the group whose members may bring messages, beside this user; None for nobody.
        clock: Gives the seconds since 1970.

    Attributes:
        serving: Whether it is past everything that could forbid the plan, and past loading.
        trail: Where what it does is written down.
        gauges: What it tells of itself.
    """

    def __init__(
        self,
        home: Home,
        keys: Keys,
        journal: Journal,
        assignment: Assignment,
        *,
        group: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._home = home
        self._keys = keys
        self._journal = journal
        self._signed, self._data, self._model = assignment.signed, assignment.data, assignment.model
        self._group = group
        self._clock = clock
        self._registry = Registry(home.data, journal, keys.secret(b"data"))
        self._stopped = threading.Event()
        self._doing, self._since = "starting", clock()
        self._policy: Policy
        self._fixed: tuple[float, ...]  # what of the policy cannot change while the agent runs
        self._base = ""  # the digest of the base model's files
        self._judged: tuple[Policy, int] | None = None  # the policy, and the version of the data, that allowed it
        self._version = 0  # of the rows that the child has; 0 if it has none that may be used
        self._declared = 0  # the N that the approval is for
        self.serving = False
        self.trail = Trail(home.log, clock=clock)
        self.gauges = Gauges(home.site, clock=clock)
        self._minute = self._failures = self._left_out = 0  # of the messages that were answered by a failure

    @contextmanager
    def ready(self) -> "Iterator[Callable[[Envelope], Envelope]]":
        """Give what answers messages, once everything that could forbid the plan has been looked at and rows are loaded.

        Raises:
            Refused: The policy, the approvals, the budget or the federation forbid it; the rule and both values are told.
            ModelError: The base model is not the plan's, or did not pass its self-test.
            DataError: The rows do not fit the plan.
            LedgerError: The ledger cannot be relied on.
        """
        signed, plan = self._signed, self._signed.plan
        self._journal.sync()
        self._whole()
        self._policy = enforced(self._home, self._journal)
        self._fixed = _fixed(self._policy)
        roster = enrolment.current(self._home, signed.federation)
        joined = enrolment.federation_entry(self._home, signed.federation)
        if self._journal.book.federations.get(signed.federation) != joined:  # it lets in no roster of an earlier epoch
            self._journal.append(joined)
        self._base = base_digest(self._model)
        self._judge(rounds=plan.privacy.rounds - len(self._journal.book.rounds(signed.run)))
        self._approved()
        rows = self._rows()
        self._journal.append(Started(process=secrets.token_hex(16), software=software(), words=self._keys.words))
        self._tell("loading")
        compute = self._policy.compute
        trainer = ChildTrainer(self._load(rows), deadline_s=compute.round_s, memory_mb=compute.memory_mb or None)
        with trainer:
            self._accept(trainer, rows)
            self._trainer = trainer
            ring = ring_layout(plan, trainer.layout, trainer.head)
            agent = Agent(
                site=self._home.site,
                run=signed.run,
                plan=plan,
                trainer=trainer,
                declared_persons=rows.data.declared_persons,
                ring=ring,
                protection=Membership(
                    site=self._home.site,
                    identity=self._keys.identity,
                    roster=roster,
                    plan=plan,
                    ring=ring,
                    allowed=frozenset(self._policy.federation.words),
                ),
                spends=Spends(
                    self._journal,
                    run=signed.run,
                    plan=signed.digest,
                    data=self._data,
                    version=self._version,
                    key=self._keys.secret(b"evidence"),
                ),
                kept=Kept(self._home.rounds / signed.run, self._keys.secret(b"rounds"), signed.run),
                witness=Witness(self._home.witness),
                consent=self._consent,
            )
            self._spends = agent.spends
            self._spends.settle()
            self._tell("idle")
            self._measure()
            yield lambda envelope: self._answer(agent, envelope)

    def serve(self) -> None:
        """Answer the postman and this machine's steward until `stop`; the steward also while rows are loaded.

        Raises:
            ConfideError: As for `ready`.
            UsageError: A socket cannot be made.
        """
        for socket in (self._home.agent_socket, self._home.control_socket):
            socket.unlink(missing_ok=True)  # of an agent that was killed: the site's lock is held by this one
        with ExitStack() as stack:
            control = stack.enter_context(Postbox(self._home.control_socket, self._control()))
            stack.enter_context(_served(control))
            answer = stack.enter_context(self.ready())
            box = stack.enter_context(
                Postbox(
                    self._home.agent_socket,
                    {self._home.site: answer},
                    self._group,
                    hold_s=self._policy.answers.hold_s,
                )
            )
            self.serving = True
            self.trail.record("agent-ready", {"run": self._signed.run, "plan": self._signed.digest, "data": self._data})
            _log.info("ready for the run %s: data set %s, version %d", self._signed.run, self._data, self._version)
            while not self._stopped.is_set():
                if not box.serve(_GLANCE_S):
                    self._measure()
            self.trail.record("agent-stopped", {"run": self._signed.run})

    def stop(self) -> None:
        """End `serve`, from whatever thread; a round under way is given up, and steps it had not begun are not counted.

        Loading is not cut short by it.
        """
        self._stopped.set()
        if self.serving:
            self._trainer.stop()

    def status(self) -> dict[str, object]:
        """Return what the agent does, since when, and how it is; nothing exact about rows."""
        return {
            "site": self._home.site,
            "run": self._signed.run,
            "plan": self._signed.digest,
            "plan_name": self._signed.plan.name,
            "federation": self._signed.federation,
            "data": self._data,
            "doing": self._doing,
            "since": self._since,
            **self.gauges.health(),
        }

    def _answer(self, agent: Agent, envelope: Envelope) -> Envelope:
        told_kind, began = kind_of(envelope), self._clock()
        kind = told_kind if told_kind in _ASKED else "unreadable"  # whatever a stranger wrote there is not repeated
        self._tell("training" if kind == Start.kind else "answering")
        spent = len(agent.spends.spends)
        try:
            answer = agent.answer(envelope)
        finally:
            self._tell("idle")
        seconds = max(0.0, self._clock() - began)
        told = open_envelope(answer)
        spent = len(agent.spends.spends) - spent
        self._count(kind, told, spent, seconds)
        if isinstance(told, Failure):
            self._record_failure(kind, told)
        elif kind in _RECORDED:
            self.trail.record("message", {"asked": kind, "answered": told.kind})
        _log.info(
            "%s: %s in %.1f s",
            kind,
            f"{told.error} {told.rule}".strip() if isinstance(told, Failure) else "answered",
            seconds,
        )
        self._measure()
        return answer

    def _count(self, kind: str, told: Message, spent: int, seconds: float) -> None:
        """Tell the gauges of a message that was answered."""
        for _ in range(spent):
            self.gauges.spent()
        if spent > 0 and isinstance(told, Contribution):
            self.gauges.trained(seconds)
        if not isinstance(told, Failure):
            self.gauges.answered(kind)
            self.gauges.mended("ledger")
            return
        self.gauges.refused(told.rule)
        if told.error == LedgerError.__name__:
            self.gauges.trouble("ledger", "The ledger cannot be read or written; nothing is trained.", failing=True)

    def _record_failure(self, kind: str, told: Failure) -> None:
        """Write a failure to the trail, unless there were too many within this minute; how many were left out is told."""
        minute = int(time.monotonic() // 60)
        if minute != self._minute:
            self._minute, self._failures = minute, 0
        self._failures += 1
        if self._failures > _FAILURES_A_MINUTE:
            self._left_out += 1
            return
        fields: dict[str, str | int | float | bool] = {
            "asked": kind,
            "answered": told.kind,
            "error": told.error,
            "rule": told.rule,
        }
        if self._left_out:
            fields["left_out"], self._left_out = self._left_out, 0
        self.trail.record("message", fields)

    def _consent(self, message: Message) -> None:
        """Return if the site's owner still allows this, whatever was allowed before."""
        self._journal.sync()
        self._policy = enforced(self._home, self._journal)
        if _fixed(self._policy) != self._fixed:
            raise Refused(
                "The policy's [answers] hold_s or [compute] round_s or memory_mb changed since this agent was started, which still "
                "has the old ones. Stop it, and start it again.",
                "compute",
            )
        self._judge()
        self._approved()
        if isinstance(message, Offer):
            plan = self._signed.plan
            roster = enrolment.current(self._home, self._signed.federation)
            require(judge_offer(self._policy, plan, message, roster, self._clock()))
            self._reload()
        elif not self._version:  # an offer brought rows that may not be used, and was refused
            raise Refused(f"The rows of {self._data!r} could not be loaded. The next offer tries again.", "data")

    def _judge(self, *, rounds: int = 0) -> None:
        """Return if the policy allows the plan on the data as they are, and the budget has room for so many rounds.

        It is found out in a process that ends with it: the libraries it takes are larger than all the rest of the agent.
        What was allowed is judged again when policy or data have changed.
        """
        book = self._journal.book
        data = book.data_set(self._data)
        if self._judged == (self._policy, data.version) and not rounds:
            return
        question = _Question(
            policy=self._policy,
            plan=self._signed.plan,
            federation=self._signed.federation,
            sites=len(enrolment.current(self._home, self._signed.federation).sites),
            data=data,
            base=self._base,
            accounts={name: book.gate(name) for name in data.accounts},
            rounds=rounds,
        )
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
            refusals, noise = apart.submit(_judged, question).result()
        require(refusals)
        remember(self._signed.plan.privacy, noise)
        self._judged = self._policy, data.version

    def _approved(self) -> None:
        signed, book = self._signed, self._journal.book
        now = book.now(self._clock())  # an approval that has ended does not come back with a clock that is put back
        terms = Terms(
            ledger=book.ledger,
            recovery=book.recovery,
            plan=signed.plan,
            run=signed.run,
            federation=signed.federation,
            data=self._data,
            declared_persons=self._declared or book.data_set(self._data).declared_persons,
        )
        valid = given(book.approvals, self._policy, terms, now)
        if needed(self._policy, valid) or book.in_force(signed.digest, signed.run, self._data, int(now)) is None:
            raise Refused(
                f"The run {signed.run!r} of the plan {signed.plan.name!r} is not approved for the data set {self._data!r}, or no "
                "longer. Read it and approve it: confide site plan approve",
                "approval",
            )

    def _whole(self) -> None:
        """Return if the ledger goes on from what this site noted of it, in its other federations too."""
        if self._home.witness.exists():
            book = self._journal.book
            seen = seen_in(self._home.witness, self._home.site, book.ledger)
            check_goes_on(book, self._journal.lines(), seen)

    def _rows(self) -> Current:
        """Return the registered rows, once it is found that enough persons are left of them; no child has seen them."""
        rows, least = self._registry.current(self._data), self._signed.plan.privacy.min_persons
        check_unit(rows.data, self._signed.plan)
        left = rows.persons.besides(self._registry.excluded(self._data))
        if left < least:
            raise Refused(self._too_few(left, least), "data")
        return rows

    def _too_few(self, left: int, least: int) -> str:
        return (
            f"The data set {self._data!r} has {left} persons whose rows may be used; the plan's [privacy] min_persons asks for "
            f"{least}. Ask for a plan that needs fewer, or register more."
        )

    def _load(self, rows: Current) -> Load:
        return Load(
            plan=self._signed.toml,
            model=self._model,
            table=rows.path,
            person_column=rows.data.person_id,
            ids=rows.data.ids,
            person_key=self._registry.person_key,
            withdrawn=self._registry.excluded(self._data),
            fingerprint=True,
            personal=self._home.personal / self._signed.run,
        )

    def _accept(self, trainer: ChildTrainer, rows: Current) -> None:
        """Return if the child read the rows that were registered, and enough persons are left of them."""
        least = self._signed.plan.privacy.min_persons
        if trainer.fingerprint != rows.data.fingerprint:
            raise DataError(
                f"The table {rows.path} changed while it was read. Register it again: confide site data add"
            )
        if trainer.person_count < least:
            raise Refused(self._too_few(trainer.person_count, least), "data")
        if self._signed.plan.privacy.delta * trainer.person_count >= 1:
            raise Refused(
                f"The data set {self._data!r} has {trainer.person_count} persons; the plan's delta = "
                f"{self._signed.plan.privacy.delta:g} is not below one over that. Ask for a plan with a lower delta.",
                "plan-privacy",
            )
        self._version = rows.data.version
        self._declared = self._declared or rows.data.declared_persons

    def _reload(self) -> None:
        """Let the child have the rows of the newest version: what changed, or was withdrawn, holds from this round on."""
        if self._journal.book.data_set(self._data).version == self._version:
            return
        self._version = 0  # whatever fails from here on, nothing is trained on rows that were not accepted
        rows = self._rows()
        self._tell("loading")
        self._trainer.change(self._load(rows))
        self._accept(self._trainer, rows)
        self._spends.version = self._version
        self.trail.record("rows-loaded", {"data": self._data, "version": rows.data.version})

    def _tell(self, doing: str) -> None:
        self._doing, self._since = doing, self._clock()

    def _measure(self) -> None:
        book = self._journal.book
        self.gauges.ledger(book.size)
        for name, account in book.accounts.items():
            self.gauges.budget(name, account.used, account.left)
        self.gauges.child("training" if self._doing == "training" else "ready" if self._trainer.process else "absent")

    def _control(self) -> Mapping[str, Callable[[Envelope], Envelope]]:
        def stop(_: Envelope) -> Envelope:
            self.stop()
            return Envelope(body=canonical_bytes({"status": "stopping"}))

        return {
            STATUS: lambda _: Envelope(body=canonical_bytes(self.status())),
            METRICS: lambda _: Envelope(body=self.gauges.text()),
            STOP: stop,
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """What a judgement rests on."""

    policy: Policy
    plan: Plan
    federation: str
    sites: int
    data: DataSet
    base: str
    accounts: Mapping[str, Filter]
    rounds: int


def _judged(question: _Question) -> tuple[tuple[Refusal, ...], float]:
    """Return every refusal, and the plan's noise multiplier, 0 if there is a refusal."""
    refusals = judge_plan(
        question.policy,
        question.plan,
        base_digest=question.base,
        federation=question.federation,
        sites_on_roster=question.sites,
        declared_persons=question.data.declared_persons,
        person_id=question.data.person_id,
    )
    if not refusals and question.rounds > 0:
        refusals = judge_price(Price.of(question.plan.privacy, question.accounts, question.rounds))
    return refusals, 0.0 if refusals else noise_multiplier(question.plan.privacy)


def _fixed(policy: Policy) -> tuple[float, ...]:
    return policy.answers.hold_s, policy.compute.round_s, policy.compute.memory_mb


@contextmanager
def _served(box: Postbox) -> Iterator[None]:
    """Answer what comes to a postbox in a thread of its own while the `with` block lasts."""
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            box.serve(_GLANCE_S)

    thread = threading.Thread(target=serve, name="control", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
