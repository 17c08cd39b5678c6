"""Real sites, a server that plays against them, and a reckoning of all that server could learn.

The server of these tests speaks envelopes, as one would over the network. It keeps every answer, and it has puppets:
sites of the roster that do as it says. The sites are real agents; the harness also looks into them, which no server can,
so as to know every secret and to search all that was sent for it.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies

from confide.client.agent import Agent
from confide.client.kept import Kept
from confide.client.mechanism import Delta, Mechanism, Randomness
from confide.client.membership import Membership
from confide.client.spends import Spends
from confide.common.adapter import Floats, Layout
from confide.common.attempt import LEAST_SITES, PROTOCOL, Attempt, Gathering, places
from confide.common.canonical import canonical_bytes
from confide.common.crypto import Identity, verify
from confide.common.errors import MessageError, Refused
from confide.common.graph import connections
from confide.common.messages import (
    LARGEST_BODY_BYTES,
    Advertisement,
    Confirmation,
    Contribution,
    Envelope,
    Failure,
    Message,
    Offer,
    Opening,
    Peers,
    Shares,
    Signatures,
    Start,
    Survivors,
    open_envelope,
    seal,
    vector_digest,
)
from confide.common.plan import HYBRID, Plan, load_plan
from confide.common.ring import RingLayout
from confide.common.roster import Roster
from confide.common.secagg import SiteSide
from confide.common.shamir import NO_SHARE
from confide.server.aggregate import ServerState
from confide.server.rounds import Run, run_round
from confide.server.store import RoundRecord
from confide.server.summation import Channel, Collected, SecureSummation, Task
from confide.simulations.enrolment import Enrolment
from confide.simulations.scenarios import scenario
from confide.simulations.vaults import open_ledger, rows_of
from tests.cohorts import EXCHANGES

LAYOUT = Layout.of({"B": (2, 2), "head": (1,)})
START: Floats = np.arange(LAYOUT.length, dtype=np.float32)
OTHER: Floats = START + 1
RING = RingLayout(length=LAYOUT.length, update_bound=10.0, max_sites=16)
PERSONS = 10_000
RUN = "run"
KEPT_KEY = bytes(range(32))

remembered = functools.lru_cache(maxsize=65_536)(verify)  # the same signature is verified once; a wrong one every time


def plan_for(min_sites: int = 3, max_sites: int = 16, **changes: Any) -> Plan:
    """Return a plan of many short rounds."""
    plan = load_plan(scenario("messages").plan)
    return dataclasses.replace(
        plan,
        privacy=dataclasses.replace(plan.privacy, rounds=40, steps_per_round=1),
        federation=dataclasses.replace(plan.federation, min_sites=min_sites, max_sites=max_sites, **changes),
    )


def names(count: int) -> tuple[str, ...]:
    """Return so many names of sites, in the order of their places."""
    return tuple(f"site-{number:02}" for number in range(count))


class Draws:
    """Randomness that no record takes for a seeded simulation's."""

    name = "test_entropy"

    def __init__(self) -> None:
        self._generator = np.random.default_rng(int.from_bytes(os.urandom(16)))

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """Return uniform words."""
        return self._generator.integers(0, 2**64, count, dtype=np.uint64)

    def rounding_key(self) -> bytes:
        """Return a key nobody knows."""
        return os.urandom(32)


class Wandering:
    """Stands in for training: each time the update is another, so that two trainings never pass for one."""

    person_count = PERSONS
    layout_digest = LAYOUT.digest
    start = START

    def __init__(self) -> None:
        self.trained = 0
        self.dies: Callable[[], None] = lambda: None

    def train(self, number: int, start: Floats, mechanism: Mechanism, randomness: Randomness) -> Delta:
        """Return a random update."""
        self.trained += 1
        self.dies()
        return Delta(values=(randomness.words(LAYOUT.length) / 2**64 - 0.5).astype(np.float32))

    def evidence_of(self, number: int) -> bytes:
        """Return nothing: nothing is measured."""
        return b""


@dataclasses.dataclass(kw_only=True)
class Part:
    """A site's part in one attempt, seen from inside.

    Attributes:
        side: Its state machine.
        seed: The secret of its own mask.
        pair: The secret of its pair masks.
        held: By place, the shares it holds of the two.
        gathering: Those it shared with, once it did.
        vector: Its vector, once it was sent under masks.
        opened: Whether it helped to open the sum.
    """

    side: SiteSide
    seed: bytes
    pair: bytes
    box: bytes
    held: dict[int, tuple[bytes, bytes]] = dataclasses.field(default_factory=dict)
    gathering: Gathering | None = None
    vector: npt.NDArray[Any] | None = None
    opened: bool = False

    @property
    def attempt(self) -> Attempt:
        """The attempt."""
        return self.side._attempt

    @property
    def place(self) -> int:
        """The site's place in its cohort."""
        return self.side._place


class Hospital:
    """An honest site: an agent that can be started anew on the same disk, and all it was sent and has sent.

    Args:
        site: Its name.
        protection: How it protects its vectors.
        run: The run's name.
        folder: Its disk; without one a new agent remembers nothing.
    """

    def __init__(self, site: str, protection: Membership, run: str = RUN, folder: Path | None = None) -> None:
        self.site = site
        self.trainer = Wandering()
        self.parts: list[Part] = []
        self.talk: list[tuple[Envelope, Envelope]] = []
        self.kept: Callable[[], Kept] = lambda: Kept(self.disk("kept"), KEPT_KEY if folder else b"", run)
        self._protection = protection
        self._run = run
        self._folder = folder
        self.restart()

    def disk(self, name: str) -> Path | None:
        """Return where the site keeps something."""
        return self._folder / self.site / name if self._folder else None

    def restart(self) -> None:
        """Start the site's agent as a new process would."""
        ledger = open_ledger(
            self.disk("ledger"),
            site=self.site,
            identity=self._protection.identity,
            plan=self._protection.plan,
            run=self._run,
            declared_persons=PERSONS,
        )
        self.agent = Agent(
            site=self.site,
            run=self._run,
            plan=self._protection.plan,
            trainer=self.trainer,
            declared_persons=PERSONS,
            ring=self._protection.ring,
            randomness=lambda number: Draws(),
            protection=self._protection,
            spends=Spends(ledger, run=self._run, plan=self._protection.plan.digest, data=rows_of(self._run)),
            kept=self.kept(),
        )

    @property
    def trained(self) -> int:
        """How often it trained, over all its agents."""
        return self.trainer.trained

    def answer(self, envelope: Envelope) -> Envelope:
        """Return what the agent answers."""
        answer = self.agent.answer(envelope)
        self.talk.append((envelope, answer))
        self._look(open_envelope(answer))
        return answer

    def asked(self, message: Message) -> Message:
        """Return the answer to a message."""
        return open_envelope(self.answer(seal(message)))

    def sent(self, secret: bytes) -> bool:
        """Return whether these bytes are in anything the site has ever sent."""
        return any(
            secret in answer.body or (answer.vector is not None and secret in answer.vector.tobytes())
            for _, answer in self.talk
        )

    def _look(self, answer: Message) -> None:
        side = self.agent._attending
        if isinstance(answer, Opening):
            self.parts[-1].opened = True
        if not isinstance(side, SiteSide):
            return
        if not self.parts or self.parts[-1].side is not side:
            keys = side._keys
            assert keys is not None
            self.parts.append(Part(side=side, seed=keys.seed, pair=keys.pair.secret(), box=keys.box.secret()))
        part = self.parts[-1]
        part.held |= side._keys.held if side._keys else {}
        part.gathering = getattr(side, "_gathering", None)
        if isinstance(answer, Contribution):
            number = part.attempt.offer.round
            vector = self.agent._kept.get(number, part.attempt.ring, self.agent.spends.commitment(number))
            assert vector is not None
            part.vector = vector.words.copy()


class Puppet:
    """A site of the roster that does what the server wants: it signs everything, and gives every share it holds.

    However few take part, it takes part with them.
    """

    def __init__(self, site: str, identity: Identity) -> None:
        self.site = site
        self.identity = identity
        self._entropy: dict[bytes, bytes] = {}

    def side(self, attempt: Attempt) -> SiteSide:
        """Return a state machine that advertises; within one attempt its keys are always the same."""
        seed = self._entropy.setdefault(attempt.pre, os.urandom(32))
        lenient = dataclasses.replace(attempt.connections, threshold=1, gathered=0)
        attempt = dataclasses.replace(attempt, floor=0, connections=lenient)
        return SiteSide(attempt, self.site, self.identity, remembered, random.Random(seed).randbytes)

    def sign(self, gathering: Gathering, survivors: bytes) -> bytes:
        """Return a signature on any survivors."""
        return self.identity.sign(gathering.confirmed(survivors))


class EvilServer:
    """Whoever holds the coordinator's key and the wire.

    Args:
        count: How many sites are on the roster.
        puppets: The places of those that are puppets.
        plan: The plan.
        ring: The ring's layout.
        run: The run's name.
        folder: Where the sites' disks are; without it they remember nothing.
        enrolment: An enrolment made before; a new one if absent.
        allowed: What the sites' owners allow.
    """

    def __init__(
        self,
        count: int,
        puppets: Collection[int] = (),
        *,
        plan: Plan | None = None,
        ring: RingLayout = RING,
        run: str = RUN,
        folder: Path | None = None,
        enrolment: Enrolment | None = None,
        allowed: frozenset[str] = frozenset(),
    ) -> None:
        self.names = names(count)
        self.plan = plan or plan_for()
        self.ring = ring
        self.run = run
        self.enrolment = enrolment or Enrolment.of(self.names)
        bad = {self.names[place] for place in puppets}
        self.puppets = {site: Puppet(site, self.enrolment.identities[site]) for site in sorted(bad)}
        self.hospitals = {
            site: Hospital(site, self.member(site, allowed), run, folder) for site in self.names if site not in bad
        }

    def member(self, site: str, allowed: frozenset[str] = frozenset()) -> Membership:
        """Return how a site protects its vectors."""
        member = self.enrolment.member(site, self.plan, self.ring)
        return dataclasses.replace(member, allowed=allowed, check=remembered)

    @property
    def roster(self) -> Roster:
        """The sites' pinned roster."""
        return self.enrolment.roster

    def offer(self, cohort: Sequence[str] | None = None, number: int = 1, attempt: int = 1, **changes: Any) -> Offer:
        """Return an offer with the coordinator's signature on whatever it says."""
        offer = Offer(
            run=self.run,
            plan=self.plan.digest,
            round=number,
            attempt=attempt,
            cohort=tuple(self.names if cohort is None else cohort),
            roster=self.roster.digest,
            layout=LAYOUT.digest,
            ring=self.ring.digest,
            signature=b"",
        )
        return self.signed(dataclasses.replace(offer, **changes))

    def signed(self, offer: Offer, signer: Identity | None = None, roster: Roster | None = None) -> Offer:
        """Return the offer, signed; under another roster than the sites' if one is given."""
        offered = self.begun(offer, roster).offered
        return dataclasses.replace(offer, signature=(signer or self.enrolment.coordinator).sign(offered))

    def begun(self, offer: Offer, roster: Roster | None = None) -> Attempt:
        """Return the attempt that an offer begins, or would begin if an honest side did not refuse it.

        So the signature on an unfit offer is right, and a site that took it would be played on with.
        """
        roster, terms = roster or self.roster, self.plan.federation
        try:
            return Attempt.of(offer, roster, self.ring, terms)
        except (MessageError, Refused):
            among = connections(len(roster.sites))
            floor = max(among.quorum, terms.min_sites, LEAST_SITES)
            parameters = {"floor": floor, "key_agreement": terms.key_agreement, **dataclasses.asdict(among)}
            spelled = canonical_bytes({"format": PROTOCOL, "offer": offer.terms, "parameters": parameters})
            return Attempt(
                offer=offer,
                keys=tuple(roster.sites.get(site, b"") for site in offer.cohort),
                ring=self.ring,
                floor=floor,
                hybrid=terms.key_agreement == HYBRID,
                connections=among,
                pre=hashlib.sha256(spelled).digest(),
            )

    def play(self, cohort: Sequence[str] | None = None, number: int = 1, attempt: int = 1) -> "Play":
        """Return an attempt to be played; nobody was told of it yet."""
        return Play(self, self.offer(cohort, number, attempt))

    def honest(self, cohort: Iterable[str] | None = None) -> list[str]:
        """Return the honest sites of a cohort."""
        return [site for site in (self.names if cohort is None else cohort) if site in self.hospitals]


class Play:
    """One attempt as an evil server plays it: each step with whom it likes, and with what it likes to tell them."""

    def __init__(self, server: EvilServer, offer: Offer) -> None:
        self.server = server
        self.offer = offer
        self.attempt = server.begun(offer)
        self.advertised: dict[int, bytes] = {}
        self.checkpoints: dict[int, str] = {}
        self.boxes: dict[bytes, dict[int, dict[int, bytes]]] = {}  # by context, sender and receiver
        self.signatures: dict[tuple[bytes, bytes], dict[int, bytes]] = {}  # by context and survivors

    @property
    def cohort(self) -> tuple[str, ...]:
        """The sites it is about."""
        return self.offer.cohort

    def place(self, site: str) -> int:
        """Return a site's place in the cohort."""
        return self.cohort.index(site)

    def ask(self, site: str, message: Message) -> Message:
        """Send a message to an honest site."""
        return self.server.hospitals[site].asked(message)

    def advertise(self, sites: Iterable[str] | None = None) -> dict[str, Message]:
        """Offer the attempt to these sites, all by default; take what they advertise, and what all puppets do."""
        answers = {
            site: self.ask(site, self.offer) for site in self.server.honest(self.cohort if sites is None else sites)
        }
        for site in self.server.puppets.keys() & set(self.cohort):
            answers[site] = self.server.puppets[site].side(self.attempt).advertise()
        for site, answer in answers.items():
            if isinstance(answer, Advertisement):
                self.advertised[self.place(site)] = answer.keys
                self.checkpoints[self.place(site)] = answer.checkpoint
        return answers

    def gathering(self, adapter: Floats = START, of: Iterable[str] | None = None) -> Gathering:
        """Return the context of these sites' advertisements, all by default, and an adapter."""
        told = self.advertised if of is None else {self.place(site): self.advertised[self.place(site)] for site in of}
        return Gathering.of(self.attempt, vector_digest(adapter), told, self.checkpoints)

    def share(self, gathering: Gathering, sites: Iterable[str] | None = None) -> dict[str, Message]:
        """Have these sites and all puppets share in that context."""
        answers = {
            site: self.ask(site, gathering.message)
            for site in self.server.honest(self.cohort if sites is None else sites)
        }
        for site in self.server.puppets.keys() & set(self.cohort):
            side = self.server.puppets[site].side(self.attempt)
            side.advertise()
            answers[site] = side.share(gathering.message)
        boxes = self.boxes.setdefault(gathering.ctx, {})
        for site, answer in answers.items():
            if isinstance(answer, Shares):
                boxes[self.place(site)] = self.dealt(gathering, site, answer)
        return answers

    def dealt(self, gathering: Gathering, site: str, shares: Shares) -> dict[int, bytes]:
        """Return the boxes in a site's shares, by receiver."""
        size, sealed = self.attempt.box_bytes, shares.sealed[32:]
        receivers = gathering.neighbours[self.place(site)]
        return {peer: sealed[number * size : (number + 1) * size] for number, peer in enumerate(receivers)}

    def inbox(self, gathering: Gathering, site: str, senders: Iterable[str] | None = None) -> dict[int, bytes]:
        """Return the boxes for a site, by sender; of all senders by default."""
        dealt, place = self.boxes[gathering.ctx], self.place(site)
        wanted = dealt.keys() if senders is None else {self.place(sender) for sender in senders}
        return {sender: dealt[sender][place] for sender in sorted(wanted) if sender != place}

    def start(self, gathering: Gathering, inbox: Mapping[int, bytes], adapter: Floats = START) -> Start:
        """Return the message that begins training."""
        raw = b"".join(places([sender]) + box for sender, box in sorted(inbox.items()))
        return Start(context=gathering.ctx.hex(), inbox=raw, adapter=adapter)

    def contribute(
        self,
        gathering: Gathering,
        sites: Iterable[str] | None = None,
        senders: Iterable[str] | None = None,
        adapter: Floats = START,
    ) -> dict[str, Message]:
        """Have these honest sites contribute, all by default, with the boxes of those senders."""
        chosen = None if senders is None else tuple(senders)
        return {
            site: self.ask(site, self.start(gathering, self.inbox(gathering, site, chosen), adapter))
            for site in self.server.honest(self.cohort if sites is None else sites)
        }

    def survivors(self, sites: Iterable[str]) -> bytes:
        """Return how survivors are written."""
        return places(sorted(self.place(site) for site in sites))

    def confirm(
        self, gathering: Gathering, sites: Iterable[str] | None = None, survivors: Iterable[str] | None = None
    ) -> dict[str, Message]:
        """Have these sites, all by default, confirm those survivors, all by default; and every puppet."""
        raw = self.survivors(self.cohort if survivors is None else survivors)
        message = Survivors(context=gathering.ctx.hex(), sites=raw)
        answers = {
            site: self.ask(site, message) for site in self.server.honest(self.cohort if sites is None else sites)
        }
        signed = self.signatures.setdefault((gathering.ctx, raw), {})
        for site, answer in answers.items():
            if isinstance(answer, Confirmation):
                signed[self.place(site)] = answer.signature
        for site in self.server.puppets.keys() & set(self.cohort):
            signed[self.place(site)] = self.server.puppets[site].sign(gathering, raw)
        return answers

    def opening(self, gathering: Gathering, survivors: Iterable[str] | None = None) -> Signatures:
        """Return the message that asks to open the sum of those survivors, with all their signatures at hand."""
        raw = self.survivors(self.cohort if survivors is None else survivors)
        signed = sorted(self.signatures.get((gathering.ctx, raw), {}).items())
        return Signatures(
            context=gathering.ctx.hex(),
            signatures=b"".join(places([place]) + signature for place, signature in signed),
        )

    def open(
        self, gathering: Gathering, sites: Iterable[str] | None = None, survivors: Iterable[str] | None = None
    ) -> dict[str, Message]:
        """Have these sites, all by default, open the sum of those survivors, all by default."""
        message = self.opening(gathering, None if survivors is None else tuple(survivors))
        return {site: self.ask(site, message) for site in self.server.honest(self.cohort if sites is None else sites)}

    def until(self, exchange: str) -> Gathering:
        """Play honestly, up to and with that exchange, and return the context."""
        self.advertise()
        gathering = self.gathering()
        for step in EXCHANGES[1 : EXCHANGES.index(exchange) + 1]:
            getattr(self, step)(gathering)
        return gathering


def taken(answers: Mapping[str, Message]) -> list[str]:
    """Return the sites whose answer is no failure."""
    return sorted(site for site, answer in answers.items() if not isinstance(answer, Failure))


def errors(answers: Mapping[str, Message]) -> set[str]:
    """Return the classes of the failures; `none` stands for an answer that is none."""
    return {answer.error if isinstance(answer, Failure) else "none" for answer in answers.values()}


Sum = tuple[int, frozenset[str]]  # round and sites


def assert_nothing_revealed(server: EvilServer, *opened: Sum) -> None:
    """Return if server and puppets together can compute nothing of the honest vectors but these sums.

    Every share, seed and key of every honest site is known here, so all that was ever sent is searched for its bytes, in
    whatever message they are; what a puppet could open in its boxes counts as known. Secrets of which a threshold of
    shares is known are known, and with them the masks that follow. What is left is linear algebra: the combinations of
    masked vectors in which no unknown mask is left must be combinations of the sums in `opened`.

    Args:
        server: The server, with its sites.
        opened: Sums that were opened by the rules, by round and sites; puppets in them do not matter.
    """
    for hospital in server.hospitals.values():
        for part in hospital.parts:
            for secret in (part.seed, part.pair, part.box):
                assert not any(other.sent(secret) for other in server.hospitals.values())
            if part.vector is not None:
                assert not hospital.sent(part.vector.tobytes())
            assert not (_known(server, part, kind=0) and _known(server, part, kind=1))
    learned, variables = _learned(server)
    due = np.array([[(site, number) in _members(server, sums) for site, number in variables] for sums in opened], float)
    due = due.reshape(len(opened), len(variables))
    assert _rank(np.vstack([due, learned])) == _rank(due), f"learned {learned} of {variables}"


def _members(server: EvilServer, sums: Sum) -> set[tuple[str, int]]:
    return {(site, sums[0]) for site in sums[1] if site in server.hospitals}


def _learned(server: EvilServer) -> tuple[npt.NDArray[np.float64], list[tuple[str, int]]]:
    """Return the combinations of honest vectors that can be computed, and what their columns are: site and round."""
    parts = [
        (site, part)
        for site, hospital in server.hospitals.items()
        for part in hospital.parts
        if part.vector is not None and part.gathering is not None
    ]
    by_place = {
        (part.gathering.ctx, part.place): part
        for hospital in server.hospitals.values()
        for part in hospital.parts
        if part.gathering is not None
    }
    variables = sorted({(site, part.attempt.offer.round) for site, part in parts})
    vectors = np.zeros((len(parts), len(variables)))
    masks: dict[object, int] = {}
    terms: list[tuple[int, object, int]] = []
    for row, (site, part) in enumerate(parts):
        vectors[row, variables.index((site, part.attempt.offer.round))] = 1
        assert part.gathering is not None
        ctx = part.gathering.ctx
        if not _known(server, part, kind=0):
            terms.append((row, (ctx, part.place), 1))
        for peer in part.held.keys() - {part.place}:
            other = by_place.get((ctx, peer))
            if part.attempt.offer.cohort[peer] in server.puppets:
                continue
            if not (_known(server, part, kind=1) or (other is not None and _known(server, other, kind=1))):
                pair = (ctx, min(peer, part.place), max(peer, part.place))
                terms.append((row, pair, 1 if part.place < peer else -1))
    for _, mask, _ in terms:
        masks.setdefault(mask, len(masks))
    hidden = np.zeros((len(parts), len(masks)))
    for row, mask, sign in terms:
        hidden[row, masks[mask]] = sign
    return _left_null_space(hidden) @ vectors, variables


def _known(server: EvilServer, part: Part, kind: int) -> bool:
    """Return whether a threshold of shares of a secret is known; kind 0 is the own mask's seed, 1 the pair masks' key."""
    if part.gathering is None:
        return False
    points = {place for place in part.gathering.public if part.attempt.offer.cohort[place] in server.puppets}
    for hospital in server.hospitals.values():
        for holder in hospital.parts:
            if holder.gathering is not None and holder.gathering.ctx == part.gathering.ctx:
                share = holder.held.get(part.place, (NO_SHARE, NO_SHARE))[kind]
                if share != NO_SHARE and hospital.sent(share):
                    points.add(holder.place)
    return len(points) >= part.attempt.connections.threshold


def _left_null_space(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    if not matrix.size:
        return np.eye(len(matrix))
    left, values, _ = np.linalg.svd(matrix)
    return left[:, int((values > 1e-9).sum()) :].T


def _rank(matrix: npt.NDArray[np.float64]) -> int:
    return int(np.linalg.matrix_rank(matrix, tol=1e-9)) if matrix.size else 0


def spoken(hospital: Hospital, kind: type[Message]) -> list[Message]:
    """Return all messages of one kind that a site has sent."""
    return [message for message in (open_envelope(answer) for _, answer in hospital.talk) if isinstance(message, kind)]


def opened(server: EvilServer) -> set[Sum]:
    """Return every sum that at least one honest site has helped to open."""
    return {_sum(part) for hospital in server.hospitals.values() for part in hospital.parts if part.opened}


def completed(server: EvilServer) -> set[Sum]:
    """Return every sum that so many honest sites have helped to open that with the puppets they are enough."""
    helpers: dict[tuple[bytes, Sum], list[Part]] = {}
    for hospital in server.hospitals.values():
        for part in hospital.parts:
            if part.opened and part.gathering is not None:
                helpers.setdefault((part.gathering.ctx, _sum(part)), []).append(part)
    return {sums for (_, sums), parts in helpers.items() if _enough(server, parts)}


def _sum(part: Part) -> Sum:
    cohort = part.attempt.offer.cohort
    return part.attempt.offer.round, frozenset(cohort[place] for place in part.side._survivors)


def _enough(server: EvilServer, helpers: Sequence[Part]) -> bool:
    attempt, gathering = helpers[0].attempt, helpers[0].gathering
    assert gathering is not None
    colluding = sum(attempt.offer.cohort[place] in server.puppets for place in gathering.public)
    return len(helpers) + colluding >= attempt.connections.threshold


def trainings(server: EvilServer) -> dict[str, int]:
    """Return how often each honest site trained."""
    return {site: hospital.trained for site, hospital in server.hospitals.items()}


JUNK = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers(-(2**70), 2**70)
    | strategies.floats(allow_nan=False, allow_infinity=False)
    | strategies.text(strategies.characters(), max_size=8),
    lambda inner: (
        strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)


@strategies.composite
def spoiled(draw: strategies.DrawFn, envelope: Envelope) -> Envelope:
    """Return the envelope, changed in one place or another."""
    body, vector = bytearray(envelope.body), envelope.vector
    where = draw(strategies.integers(0, len(body) - 1))
    match draw(strategies.integers(0, 9)):
        case 0:
            body[where] ^= 1 << draw(strategies.integers(0, 7))
        case 1:
            del body[where : where + draw(strategies.integers(1, 200))]
        case 2:
            body[where:where] = draw(strategies.binary(min_size=1, max_size=200))
        case 3:
            del body[where:]
        case 4:
            body += bytes(LARGEST_BODY_BYTES)
        case 5:
            body[:] = draw(strategies.binary(max_size=300))
        case 6 | 7:
            text, line_break, raw = bytes(body).partition(b"\n")
            fields = json.loads(text)
            fields[draw(strategies.sampled_from([*fields, "extra"]))] = draw(JUNK)
            body[:] = canonical_bytes(fields) + line_break + raw
        case 8:
            text, line_break, raw = bytes(body).partition(b"\n")
            body[:] = text + line_break + draw(strategies.binary(max_size=len(raw) + 8))
        case _:
            some: list[Any] = [
                None,
                np.zeros(0, np.uint32),
                np.zeros(3, np.uint32),
                np.zeros(5, np.uint64),
                np.zeros((5, 1), np.uint32),
                np.full(5, np.nan, np.float32).view(np.uint32),
                np.full(5, 1e38, np.float32).view(np.uint32),
            ]
            vector = draw(strategies.sampled_from(some))
    return Envelope(body=bytes(body), vector=vector)


class Killed(BaseException):
    """The site's process ends here and now; nothing in it can catch this."""


Spoil = Callable[[Part, Any], Message | Envelope | Sequence[Message | Envelope]]
Death = Callable[[Hospital], None]


def before(hospital: Hospital) -> None:
    """End before the question is heard."""
    raise Killed


class Listening(SecureSummation):
    """The honest server's summation; it keeps what each attempt gave."""

    def __init__(self, server: EvilServer) -> None:
        super().__init__(server.roster, server.enrolment.coordinator, remembered)
        self.collected: list[Collected] = []

    def collect(self, channel: Channel, task: Task) -> Collected:
        """Return what one attempt gave."""
        self.collected.append(super().collect(channel, task))
        return self.collected[-1]


class Round:
    """An honest server and its wire: some sites on it spoil what they send, some are killed and started anew.

    Args:
        server: The sites, and the keys of the server that here is honest.
        rogues: What a site makes of an answer of its agent's, by site and exchange.
        deaths: Who ends where, by site, attempt and exchange: before the question is heard, while the agent works on it,
            or, with None, once the answer is made and before it leaves. A new agent is started in the same moment.
    """

    def __init__(
        self,
        server: EvilServer,
        rogues: Mapping[tuple[str, str], Spoil] | None = None,
        deaths: Mapping[tuple[str, int, str], Death | None] | None = None,
    ) -> None:
        self.server = server
        self.rogues = rogues or {}
        self.deaths = deaths or {}
        self.summation = Listening(server)
        self.state = ServerState.begin(START, server.plan.federation)
        self.moment = (0, "")

    def run(self, number: int = 1) -> RoundRecord:
        """Run a round and return its record."""
        run = Run(
            name=self.server.run,
            plan=self.server.plan,
            layout=LAYOUT,
            ring=self.server.ring,
            sites=self.server.names,
            summation=self.summation,
            training_s=1.0,
            answer_s=1.0,
        )
        self.summation.collected.clear()
        self.state, record = run_round(run, self, self.state, number, itertools.count(1).__next__)
        return record

    def ask(self, messages: Mapping[str, Envelope], timeout_s: float) -> Iterator[tuple[str, Envelope]]:
        """Yield the answers of those who live to send one."""
        question = open_envelope(next(iter(messages.values())))
        exchange = ASKED[type(question)]
        attempt = question.attempt if isinstance(question, Offer) else self.moment[0]
        self.moment = (attempt, exchange)
        for site, envelope in messages.items():
            hospital = self.server.hospitals[site]
            try:
                if death := self.deaths.get((site, *self.moment)):
                    death(hospital)
                answer = hospital.answer(envelope)
                if (site, *self.moment) in self.deaths:
                    raise Killed
            except Killed:
                hospital.restart()
                continue
            spoiled: Any = answer
            if spoil := self.rogues.get((site, exchange)):
                spoiled = spoil(hospital.parts[-1], open_envelope(answer))
            for each in spoiled if isinstance(spoiled, list | tuple) else [spoiled]:
                yield site, each if isinstance(each, Envelope) else seal(each)

    @property
    def sums_are_exact(self) -> bool:
        """Whether the sum is that of the vectors which the sites in it kept, and the adapter has moved by it."""
        last = self.summation.collected[-1]
        assert last.total is not None
        parts = [self.server.hospitals[site].parts[-1] for site in last.present]
        whole = np.zeros_like(last.total.words)
        for part in parts:
            assert part.vector is not None
            whole += part.vector
        return bool((last.total.words == whole).all())


ASKED: dict[type[Message], str] = {
    Offer: "advertise",
    Peers: "share",
    Start: "contribute",
    Survivors: "confirm",
    Signatures: "open",
}
