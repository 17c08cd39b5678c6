"""How the sites' vectors become their sum: what one attempt at a round asks of them, exchange by exchange."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeVar

from confide.common.adapter import Floats
from confide.common.attempt import Attempt
from confide.common.crypto import Identity, Verifier, verify
from confide.common.errors import MessageError, Refused, RunError
from confide.common.graph import SEMI_HONEST
from confide.common.messages import (
    Advertisement,
    Confirmation,
    Contribution,
    Envelope,
    Failure,
    Message,
    Offer,
    Opening,
    Shares,
    expect,
    open_envelope,
    seal,
)
from confide.common.plan import Plan
from confide.common.ring import RingLayout, RingSum, check_sum
from confide.common.roster import Roster
from confide.common.secagg import ServerSide
from confide.common.witness import Witness

SILENT = "no answer"

_log = logging.getLogger(__name__)
_M = TypeVar("_M", bound=Message)
_S = TypeVar("_S", Advertisement, Contribution)  # what shows a checkpoint


class Channel(Protocol):
    """Carries messages to sites and their answers back."""

    def ask(self, messages: Mapping[str, Envelope], timeout_s: float) -> Iterator[tuple[str, Envelope]]:
        """Send the messages, then yield each answer with its site as it comes, until all are there or time is up.

        Nothing is kept of an answer that was yielded, so a sum taken on the way needs no more memory for more sites.
        """
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """One attempt at one round.

    Attributes:
        run: The run's name.
        plan: Its plan.
        round: From 1.
        attempt: From 1.
        cohort: The sites to ask, sorted.
        layout: The digest of the adapter's layout.
        ring: The ring's layout.
        adapter: Where the round starts from.
        parent: Its digest.
        training_s: How long sites may take to train.
        answer_s: How long they may take over any other exchange.
    """

    run: str
    plan: Plan
    round: int
    attempt: int
    cohort: tuple[str, ...]
    layout: str
    ring: RingLayout
    adapter: Floats
    parent: str
    training_s: float
    answer_s: float

    def offer(self, roster: str, signature: bytes = b"") -> Offer:
        """Return the offer of this attempt."""
        return Offer(
            run=self.run,
            plan=self.plan.digest,
            round=self.round,
            attempt=self.attempt,
            cohort=self.cohort,
            roster=roster,
            layout=self.layout,
            ring=self.ring.digest,
            signature=signature,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What one attempt gave.

    Attributes:
        summation: How it was done; a word that a record, a manifest and a model card repeat.
        total: The sum, or None if it could not be opened.
        present: The sites in the sum, sorted.
        missing: Where and why sites were lost, as `exchange: reason`; who is lost after `contribute` is in the sum.
        void: Why there is no sum; empty if there is one.
        again: The sites to ask in another attempt at the round; none if it was opened, or if no other can succeed.
        bytes_up: Bytes that the site which sent most sent.
        bytes_down: Bytes that the site which was sent most was sent.
    """

    summation: str
    total: RingSum | None
    present: tuple[str, ...]
    missing: Mapping[str, str]
    void: str
    again: tuple[str, ...]
    bytes_up: int
    bytes_down: int


class Summation(Protocol):
    """Turns the sites' vectors into their sum."""

    def collect(self, channel: Channel, task: Task) -> Collected:
        """Return what one attempt at the sum gave."""
        ...


class SecureSummation:
    """Secure aggregation: what comes in is masked, what comes out is the sum.

    Args:
        roster: The federation's roster.
        coordinator: The key that signs offers; its public half is on the roster.
        check: Verifies signatures.
        witness: Remembers how far each site's ledger had come, before it trains and when its vector arrives; a site whose
            ledger has gone back is not in the sum. With None nobody looks, and sites need no ledger.
    """

    def __init__(
        self, roster: Roster, coordinator: Identity, check: Verifier = verify, witness: Witness | None = None
    ) -> None:
        self.roster = roster
        self.coordinator = coordinator
        self._check = check
        self._witness = witness

    def collect(self, channel: Channel, task: Task) -> Collected:
        """Return what one attempt at the sum gave; it needs five exchanges and a quorum in each."""
        attempt = self._attempt(task)
        offer = dataclasses.replace(attempt.offer, signature=self.coordinator.sign(attempt.offered))
        side = ServerSide(attempt, task.parent, self._check)
        talk = Conversation(channel, task.cohort, attempt.floor)
        total, void = None, ""
        try:
            with self._witnessed(side.advertised) as advertised:
                talk.ask("advertise", lambda _: offer, Advertisement, advertised, task.answer_s, attempt.gathered)
            peers = side.peers()
            talk.ask("share", lambda _: peers, Shares, side.shared, task.answer_s)
            start = partial(side.start, adapter=task.adapter)
            with self._witnessed(side.contributed) as contributed:
                talk.ask("contribute", start, Contribution, contributed, task.training_s)
            survivors, present = side.survivors(), talk.present
            talk.ask("confirm", lambda _: survivors, Confirmation, side.confirmed, task.answer_s)
            signatures = side.signatures()
            talk.ask("open", lambda _: signatures, Opening, side.opened, task.answer_s)
            total = side.total()
            check_sum(total)
        except (MessageError, Refused) as error:
            total, present, void = None, (), str(error)
        return Collected(
            summation=SEMI_HONEST if attempt.connections.graph == SEMI_HONEST else "secure_aggregation",
            total=total,
            present=present,
            void=void,
            again=() if talk.exchange == "open" else talk.willing(attempt.gathered),
            missing=dict.fromkeys(side.suspects, "open: wrong shares") | talk.missing,
            bytes_up=talk.bytes_up,
            bytes_down=talk.bytes_down,
        )

    @contextlib.contextmanager
    def _witnessed(self, take: Callable[[str, _S], None]) -> Iterator[Callable[[str, _S], None]]:
        """Give what takes an answer if the ledger it shows is not behind what was seen; in the end all are remembered."""
        told: dict[str, tuple[bytes, str]] = {}

        def weighed(site: str, message: _S) -> None:
            if self._witness is not None:
                shown = self.roster.sites[site], message.checkpoint
                self._witness.weigh(self.roster.federation, site, *shown)
                told[site] = shown  # the site signed it, so it counts even if the rest of its answer is no good
            take(site, message)

        try:
            yield weighed
        finally:
            if self._witness is not None:  # on disk before any site hears more, and if too few answered as well
                self._witness.see_all(self.roster.federation, told)

    def _attempt(self, task: Task) -> Attempt:
        offer = task.offer(self.roster.digest)
        try:
            return Attempt.of(offer, self.roster, task.ring, task.plan.federation)
        except (MessageError, Refused) as error:
            raise RunError(f"The run's sites do not fit the federation's roster. {error}") from None


class Conversation:
    """Asks the sites of one attempt, exchange by exchange, and notes who was lost where.

    Args:
        channel: How sites are reached.
        cohort: The sites.
        least: How many must be left after each exchange.

    Attributes:
        present: The sites that answered every exchange so far.
        missing: Where and why the others were lost.
        exchange: The last exchange that was begun.
    """

    def __init__(self, channel: Channel, cohort: Sequence[str], least: int) -> None:
        self._channel = channel
        self._cohort = tuple(cohort)
        self._least = least
        self._up = dict.fromkeys(cohort, 0)
        self._down = dict.fromkeys(cohort, 0)
        self.present = tuple(cohort)
        self.missing: dict[str, str] = {}
        self.exchange = ""

    def willing(self, least: int) -> tuple[str, ...]:
        """Return the sites that answered well or not at all, for another attempt; none if they are fewer than `least`.

        Who did not answer may have been started anew meanwhile. Who refused, or sent what does not fit, is not asked again.
        """
        some = tuple(site for site in self._cohort if self.missing.get(site, SILENT).endswith(SILENT))
        return some if len(some) >= least else ()

    @property
    def bytes_up(self) -> int:
        """Bytes that the site which sent most sent."""
        return max(self._up.values())

    @property
    def bytes_down(self) -> int:
        """Bytes that the site which was sent most was sent."""
        return max(self._down.values())

    def ask(
        self,
        exchange: str,
        question: Callable[[str], Message],
        kind: type[_M],
        take: Callable[[str, _M], None],
        timeout_s: float,
        least: int = 0,
    ) -> None:
        """Send every site that is present its question and take each answer as it comes.

        Args:
            exchange: The exchange's name.
            question: Gives a site's message; the same object for all is sealed once.
            kind: The class of message that is due.
            take: Takes a site's answer; a MessageError or a refusal that it raises loses the site and nothing else.
            timeout_s: How long to wait for answers.
            least: How many must be left after this exchange, if more than after each.

        Raises:
            MessageError: Fewer sites are left than are needed.
        """
        self.exchange = exchange
        envelopes = _sealed({site: question(site) for site in self.present})
        lost = dict.fromkeys(self.present, f"{exchange}: {SILENT}")
        awaited = set(self.present)
        for site, answer in self._channel.ask(envelopes, timeout_s):
            if site in awaited:  # nobody is heard twice, nor who was not asked
                awaited.remove(site)
                self._up[site] += answer.size_bytes
                fault = _taken(site, answer, kind, take)
                if fault:
                    lost[site] = f"{exchange}: {fault}"
                else:
                    del lost[site]
            del answer  # before the next one is made
        for site, envelope in envelopes.items():
            self._down[site] += envelope.size_bytes
        self.missing |= lost
        self.present = tuple(site for site in self.present if site not in lost)
        needed = max(self._least, least)
        if len(self.present) < needed:
            raise MessageError(
                f"After `{exchange}` {len(self.present)} of a cohort of {len(self._cohort)} sites were left; {needed} are "
                "needed."
            )


def _sealed(messages: Mapping[str, Message]) -> dict[str, Envelope]:
    sealed: dict[int, Envelope] = {}  # mostly one message for all
    for message in messages.values():
        if id(message) not in sealed:
            sealed[id(message)] = seal(message)
    return {site: sealed[id(message)] for site, message in messages.items()}


def _taken(site: str, answer: Envelope, kind: type[_M], take: Callable[[str, _M], None]) -> str:
    """Return why the answer could not be taken, as a class of error, or nothing."""
    try:
        message = open_envelope(answer)
        if isinstance(message, Failure):
            return message.error
        take(site, expect(message, kind))
    except (MessageError, Refused) as error:
        _log.warning("site %s was lost: %s", site, error)
        return type(error).__name__
    return ""
