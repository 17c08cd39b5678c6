"""The site's agent as a process: it opens the vault, makes sure that it may serve a plan, and answers until it is stopped.

Before any row is read it has looked at everything that could forbid the plan: whose signature it bears, the policy as it is
on disk, who approved it, the base model's digest, the table's fingerprint, the budget. Policy, approvals and the terms of the
attempt's offer are looked at again before every message, so what a steward changes holds from the next exchange on. The
budget is looked at by the ledger, in the transaction that reserves a round.

It holds keys, ledger and sockets, and no model: that is the child's (`client/child_trainer`).
"""

import dataclasses
import logging
import math
import operator
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from confide.client import enrolment
from confide.client.agent import Agent
from confide.client.approval import DAY_S, Terms, given, in_words, needed
from confide.client.child_trainer import ChildTrainer
from confide.client.gauges import Gauges
from confide.client.home import Home
from confide.client.journal import Journal, software
from confide.client.judgement import Refusal, enforced, judge_hours, judge_offer, require
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
from confide.client.trail import Allowance, Trail, Value
from confide.client.verdict import Question, verdict
from confide.common.base import base_digest
from confide.common.bounds import ring_layout
from confide.common.calibration import remember
from confide.common.canonical import canonical_bytes
from confide.common.entries import Started, utc_text
from confide.common.errors import ConfideError, DataError, LedgerError, Refused, RunError
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
    seal,
)
from confide.common.roster import Roster
from confide.common.signed_plan import SignedPlan
from confide.common.witness import Witness

STATUS: Final = "status"
METRICS: Final = "metrics"
STOP: Final = "stop"
_GLANCE_S = 0.2
_ASKED = frozenset(message.kind for message in (Offer, Peers, Start, Survivors, Signatures))
_TRAINED = (Survivors, Signatures)  # these come after training
_AGAIN_S = 60.0  # between two attempts to start a child that does not start
_UNJUDGED_S = 600.0  # for which a plan is refused that took too long to judge

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
        self._at_start: tuple[float, ...]  # what of the policy cannot change while the agent runs
        self._model_digest = ""
        self._judged: _Judged | None = None
        # The last offer that was allowed, and by what.
        self._allowed: tuple[Policy | None, Roster | None, Offer | None] = (None, None, None)
        self._version = 0  # of the rows that the child has; 0 if it has none that may be used
        self._declared = 0  # the N that the approval is for
        self.serving = False
        self.trail = Trail(home.log, clock=clock)
        self.gauges = Gauges(home.site, clock=clock)
        self._offers, self._answers, self._failures = Allowance(), Allowance(), Allowance()
        self._tried = -math.inf  # when a child was last tried to be started between rounds

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
        self._check_goes_on()
        self._policy = enforced(self._home, self._journal)
        self._at_start = _lasting(self._policy)
        roster = enrolment.current(self._home, signed.federation)
        joined = enrolment.federation_entry(self._home, signed.federation)
        if self._journal.book.federations.get(signed.federation) != joined:  # it lets in no roster of an earlier epoch
            self._journal.append(joined)
        self._model_digest = base_digest(self._model)
        self._judge(roster, rounds=plan.privacy.rounds - len(self._journal.book.rounds(signed.run)))
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
                    self._revive()
                    self._measure()
            self._note("agent-stopped", {"run": self._signed.run})

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
        told_kind, at = kind_of(envelope), self._clock()
        kind = told_kind if told_kind in _ASKED else "unreadable"  # whatever a stranger wrote there is not repeated
        self._tell("training" if kind == Start.kind else "answering")
        begun = agent.spends.begun
        try:
            answer = self._answered(agent, kind, envelope)
        finally:
            self._tell("idle")
        seconds = max(0.0, self._clock() - at)
        told = open_envelope(answer)
        self._count(kind, told, agent.spends.begun - begun, seconds)
        self._record(kind, told)
        _log.info(
            "%s: %s in %.1f s",
            kind,
            f"{told.error} {told.rule}".strip() if isinstance(told, Failure) else "answered",
            seconds,
        )
        self._measure()
        return answer

    def _count(self, kind: str, told: Message, begun: int, seconds: float) -> None:
        """Tell the gauges of a message that was answered, and of the rounds that were begun for it."""
        for _ in range(begun):
            self.gauges.spent()
        if begun > 0 and isinstance(told, Contribution):
            self.gauges.trained(seconds)
        if not isinstance(told, Failure):
            self.gauges.answered(kind)
            self.gauges.mended("ledger")
            return
        self.gauges.refused(told.rule)
        if told.error == LedgerError.__name__:
            self.gauges.trouble("ledger", "The ledger cannot be read or written; nothing is trained.", failing=True)

    def _answered(self, agent: Agent, kind: str, envelope: Envelope) -> Envelope:
        """Return the agent's answer. That an attempt was offered is in the trail first: without room there nothing begins."""
        if kind == Offer.kind and (left_out := self._offers.take()) is not None:
            try:
                self.trail.record("offered", left_out)
            except RunError as error:
                self._untold(error)
                return seal(Failure.of(error))
            self.gauges.mended("trail")
        return agent.answer(envelope)

    def _record(self, kind: str, told: Message) -> None:
        """Write an answer to the trail, unless there were too many within this minute; how many were left out is told."""
        failed = isinstance(told, Failure)
        if not failed and kind != Start.kind:  # offers have a line already, what follows on a start is in the ledger
            return
        left_out = (self._failures if failed else self._answers).take()
        if left_out is None:
            return
        fields: dict[str, Value] = {"asked": kind, "answered": told.kind}
        if isinstance(told, Failure):
            fields |= {"error": told.error, "rule": told.rule}
        self._note("message", fields | left_out)

    def _note(self, event: str, fields: Mapping[str, Value]) -> None:
        """Write to the trail what has happened already. If that fails it is told otherwise, and what is going on goes on."""
        try:
            self.trail.record(event, fields)
        except RunError as error:
            self._untold(error)
        else:
            self.gauges.mended("trail")

    def _untold(self, error: RunError) -> None:
        self.gauges.trouble("trail", "The trail cannot be written; no further attempt is begun.", failing=True)
        _log.warning("%s", error)

    def _consent(self, message: Message, offer: Offer | None) -> None:
        """Return if the site's owner still allows this, whatever was allowed before.

        What was trained is paid: hours that end do not keep it from being summed. Everything else holds to the end.
        """
        self._journal.sync()
        self._policy = enforced(self._home, self._journal)
        if _lasting(self._policy) != self._at_start:
            raise Refused(
                "The policy's [answers] hold_s or [compute] round_s or memory_mb changed since this agent was started, which still "
                "has the old ones. Stop it, and start it again.",
                "compute",
            )
        roster = enrolment.current(self._home, self._signed.federation)
        self._judge(roster)
        self._approved()
        if offer is not None:
            self._judge_offer(offer, roster, trained=isinstance(message, _TRAINED))
        if isinstance(message, Offer):
            self._reload()
        elif not self._version:  # an offer brought rows that may not be used, and was refused
            raise Refused(f"The rows of {self._data!r} could not be loaded. The next offer tries again.", "data")
        elif isinstance(message, Start):
            self._check_version()

    def _judge_offer(self, offer: Offer, roster: Roster, *, trained: bool) -> None:
        """Return if the policy allows the round that is offered; but for the hours once, until policy or roster change."""
        basis, now = (self._policy, roster, offer), self._clock()
        if all(map(operator.is_, self._allowed, basis)):
            found = judge_hours(self._policy, now)
        else:
            found = judge_offer(self._policy, self._signed.plan, offer, roster, now)
        require(each for each in found if not (each.rule == "hours" and trained))
        self._allowed = basis

    def _check_version(self) -> None:
        """Return if the rows that the child has are those of the newest version: somebody may have withdrawn meanwhile."""
        newest = self._journal.book.data_set(self._data).version
        if newest != self._version:
            raise Refused(
                f"The child holds version {self._version} of the data set {self._data!r}, and the ledger has version {newest} by now. "
                "Nothing is trained on the old one; the next offer loads the new one.",
                "data",
            )

    def _judge(self, roster: Roster, *, rounds: int = 0) -> None:
        """Return if the policy allows the plan on the data as they are, and the budget has room for so many rounds.

        What was found is remembered, whether it allows the plan or not, until policy, data or roster change: so messages that
        lead to nothing start no process each.
        """
        book = self._journal.book
        data = book.data_set(self._data)
        basis = self._policy, data.version, roster.digest
        known = self._judged
        if known is None or known.basis != basis or time.monotonic() > known.until or rounds:
            question = Question(
                policy=self._policy,
                plan=self._signed.plan,
                federation=self._signed.federation,
                sites=len(roster.sites),
                data=data,
                base=self._model_digest,
                accounts={name: book.gate(name) for name in data.accounts},
                rounds=rounds,
            )
            known = self._judged = self._found(question, basis)
        require(known.refusals)

    def _found(self, question: Question, basis: "_Basis") -> "_Judged":
        try:
            found = verdict(question)
        except TimeoutError as error:
            late = Refusal(
                rule="compute",
                sentence=f"{error} It is refused for now, and judged again after {_UNJUDGED_S:g} s. See what else this machine does, or "
                "ask for a plan of fewer steps.",
            )
            return _Judged(basis=basis, refusals=(late,), until=time.monotonic() + _UNJUDGED_S)
        if not found.refusals:
            remember(question.plan.privacy, found.noise)
        return _Judged(basis=basis, refusals=found.refusals)

    def _approved(self) -> None:
        signed, book = self._signed, self._journal.book
        self._check_clock()
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
        if valid and needed(self._policy, valid):
            raise Refused(
                f"The run {signed.run!r} of the plan {signed.plan.name!r} has too few approvals for the data set {self._data!r}. "
                f"{in_words(self._policy, valid)} Approve it: confide site plan approve",
                "approval",
            )
        if not valid or book.in_force(signed.digest, signed.run, self._data, int(now)) is None:
            raise Refused(
                f"The run {signed.run!r} of the plan {signed.plan.name!r} is not approved for the data set {self._data!r}, or no "
                "longer. Read it and approve it: confide site plan approve",
                "approval",
            )

    def _check_clock(self) -> None:
        """Return if the ledger's time is not far ahead of this machine's: until then no approval would come to its end."""
        last, now = self._journal.book.at, self._clock()
        if last - now > DAY_S:
            raise Refused(
                f"The ledger's last record is of {utc_text(last)}, and this machine's clock says {utc_text(int(now))}, which is more "
                "than a day earlier: the clock was wrong once, or is now. Approvals cannot be timed until it has caught up. If it "
                "is wrong now, set it; if it was wrong then, wait until that time.",
                "approval",
            )

    def _check_goes_on(self) -> None:
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
        if self._policy.budget.delta * trainer.person_count >= 1:
            raise Refused(
                f"The data set {self._data!r} has {trainer.person_count} persons; the policy's [budget] delta = "
                f"{self._policy.budget.delta:g} is not below one over that. Lower it.",
                "budget",
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
        self._note("rows-loaded", {"data": self._data, "version": rows.data.version})

    def _revive(self) -> None:
        """Start a child if there is none, since a round was given up: how long loading takes is then in no round's answer.

        Rows that are not the newest any more are not loaded; the next offer loads the others. After a failure it is tried again
        a minute later.
        """
        if self._trainer.process is not None:
            self.gauges.mended("child")
            return
        now = time.monotonic()
        if not self._version or now - self._tried < _AGAIN_S:
            return
        self._tried = now
        self._tell("loading")
        try:
            self._journal.sync()
            self._check_version()
            self._trainer.load()
        except ConfideError as error:
            if not self._stopped.is_set():
                self.gauges.trouble("child", "The child that trains could not be started; it is tried again.")
                _log.warning("no child could be started between rounds: %s", error)
        else:
            self._tried = -math.inf
            self.gauges.mended("child")
        finally:
            self._tell("idle")

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


_Basis = tuple[Policy, int, str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Judged:
    """What was found out of the plan.

    Attributes:
        basis: The policy, the version of the data and the digest of the roster that it was found out by.
        refusals: Every reason why not.
        until: When it has to be found out again, by a clock that never goes back.
    """

    basis: _Basis
    refusals: tuple[Refusal, ...]
    until: float = math.inf


def _lasting(policy: Policy) -> tuple[float, ...]:
    """Return what of a policy an agent has once it was started, whatever is written there later."""
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
