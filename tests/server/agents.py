"""A federation of real agents whose training adds a constant, and a wire between them and the server that may fail."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from confide.client.agent import Agent
from confide.client.journal import Journal
from confide.client.kept import Kept
from confide.client.mechanism import Delta, Mechanism, Randomness
from confide.client.spends import Spends
from confide.common.adapter import Floats, Layout
from confide.common.messages import Envelope, Failure, Offer, kind_of, open_envelope, seal
from confide.common.plan import Plan
from confide.common.ring import RingLayout
from confide.common.witness import Witness
from confide.server.rounds import Run
from confide.server.summation import SecureSummation
from confide.simulations.enrolment import Sums
from confide.simulations.insecure import InsecureSeededNoise
from confide.simulations.vaults import kept_entropy, open_ledger, rows_of

LAYOUT = Layout.of({"B": (2, 2), "head": (1,)})
RING = RingLayout(length=5, update_bound=10.0, max_sites=16)
SITES = ("a", "b", "c", "d")
SUMMATIONS = ("real", "insecure_plain_sum")
EXCHANGES = {
    "offer": "advertise",
    "peers": "share",
    "start": "contribute",
    "survivors": "confirm",
    "signatures": "open",
}

Behaviour = Callable[[Agent, Envelope], Envelope | None]
Moment = tuple[int, int, str]  # round, attempt, exchange
Script = Callable[[str, Moment], Behaviour]


class Steady:
    """Stands in for training: every round moves every number by the same.

    Attributes:
        move: By how much.
        starts: From where each round was trained.
        fault: What goes wrong instead, if anything.
    """

    person_count = 120
    layout_digest = LAYOUT.digest
    start = np.zeros(LAYOUT.length, np.float32)

    def __init__(self, move: float) -> None:
        self.move = move
        self.starts: list[Floats] = []
        self.fault: Exception | None = None

    def train(self, number: int, start: Floats, mechanism: Mechanism, randomness: Randomness) -> Delta:
        """Return the constant update."""
        if self.fault:
            raise self.fault
        self.starts.append(start.copy())
        return Delta(values=np.full(LAYOUT.length, self.move, np.float32))

    def evidence_of(self, number: int) -> bytes:
        """Return nothing: nothing is measured."""
        return b""


class Fresh(InsecureSeededNoise):
    """Draws that the record of spends takes for fresh ones, so that no round is trained twice; else as good as seeded."""

    name = "fresh"


@dataclasses.dataclass(kw_only=True)
class Sites:
    """A run and its sites in this process.

    Attributes:
        plan: The run's plan.
        summation: One of `SUMMATIONS`.
        names: The sites; the first moves every number by 1, the second by 2, and so on.
        ring: How updates are written as integers.
        script: What a site does at a moment; honest if absent.
        randomness: The class of each site's draws.
        folder: Where the ledgers lie; in memory only if None.
        vectors: Where vectors are kept until their round is over; in memory only if None.
        watched: Whether every site has a witness for everybody's ledger.
        witness: The server's witness, if it has one.
        moments: What was asked and when, in order.
        sent: For each moment and site, bytes down and bytes up.
    """

    plan: Plan
    summation: str = "insecure_plain_sum"
    names: tuple[str, ...] = SITES
    ring: RingLayout = RING
    script: Script = lambda site, moment: honest
    randomness: type[InsecureSeededNoise] = InsecureSeededNoise
    folder: Path | None = None
    vectors: Path | None = None
    watched: bool = False
    witness: Witness | None = None
    moments: list[Moment] = dataclasses.field(default_factory=list)
    offers: list[Offer] = dataclasses.field(default_factory=list)
    sent: dict[tuple[Moment, str], tuple[int, int]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        entropy = os.urandom if self.folder is None else kept_entropy(self.folder)
        sums = Sums.of(self.summation, self.plan, self.ring, self.names, entropy)
        summation = sums.summation
        if isinstance(summation, SecureSummation):
            summation = SecureSummation(summation.roster, summation.coordinator, witness=self.witness)
        self.run = Run(
            name="demo",
            plan=self.plan,
            layout=LAYOUT,
            ring=self.ring,
            sites=self.names,
            summation=summation,
        )
        self.trainers = {site: Steady(number) for number, site in enumerate(sorted(self.names), start=1)}
        self.protections = sums.protections
        self.identities = sums.identities
        self.witnesses = {site: Witness() for site in self.names if self.watched}
        self.ledgers: dict[str, Journal] = {}
        self.agents = {site: self.agent(site) for site in self.names}

    def agent(self, site: str) -> Agent:
        """Return the site's agent as a new process would begin it."""
        if self.folder is not None or site not in self.ledgers:
            self.ledgers[site] = open_ledger(
                self.path(site),
                site=site,
                identity=self.identities[site],
                plan=self.plan,
                run="demo",
                declared_persons=120,
            )
        return Agent(
            site=site,
            run="demo",
            plan=self.plan,
            trainer=self.trainers[site],
            declared_persons=120,
            ring=self.ring,
            randomness=lambda number: self.randomness(7, site, number),
            protection=self.protections[site],
            spends=Spends(self.ledgers[site], run="demo", plan=self.plan.digest, data=rows_of("demo")),
            kept=None if self.vectors is None else Kept(self.vectors / site, site.encode().ljust(32)),
            witness=self.witnesses.get(site),
        )

    def path(self, site: str) -> Path | None:
        """Return where a site's ledger lies."""
        return None if self.folder is None else self.folder / f"{site}.ledger"

    def shown(self, site: str) -> str:
        """Return the newest checkpoint of a site's ledger, as it travels."""
        return self.ledgers[site].checkpoint().short()

    def copy(self, site: str) -> bytes:
        """Return a copy of the file of a site's ledger; its agent is started anew."""
        path = self.path(site)
        assert path is not None
        self.ledgers[site].close()
        content = path.read_bytes()
        self.agents[site] = self.agent(site)
        return content

    def put_back(self, site: str, content: bytes) -> None:
        """Put a copy in place of a site's ledger, and start its agent anew."""
        path = self.path(site)
        assert path is not None
        self.ledgers[site].close()
        path.write_bytes(content)
        self.agents[site] = self.agent(site)

    def ask(self, messages: Mapping[str, Envelope], timeout_s: float) -> Iterator[tuple[str, Envelope]]:
        """Yield what each site answers, if anything."""
        assert timeout_s > 0
        exchange = EXCHANGES[kind_of(next(iter(messages.values())))]
        if exchange == "advertise":
            offer = open_envelope(next(iter(messages.values())))
            assert isinstance(offer, Offer)
            self.offers.append(offer)
        moment = (self.offers[-1].round, self.offers[-1].attempt, exchange)
        self.moments.append(moment)
        for site, envelope in messages.items():
            answer = self.script(site, moment)(self.agents[site], envelope)
            self.sent[moment, site] = (envelope.size_bytes, answer.size_bytes if answer else 0)
            if answer is not None:
                yield site, answer
            del answer  # before the next one is made

    def asked(self, moment: Moment) -> list[str]:
        """Return the sites that were asked at a moment."""
        return [site for when, site in self.sent if when == moment]


def honest(agent: Agent, envelope: Envelope) -> Envelope | None:
    """Answer as the agent does."""
    return agent.answer(envelope)


def unheard(agent: Agent, envelope: Envelope) -> Envelope | None:
    """Lose the question."""
    return None


def unanswered(agent: Agent, envelope: Envelope) -> Envelope | None:
    """Lose the answer."""
    agent.answer(envelope)
    return None


def refusing(agent: Agent, envelope: Envelope) -> Envelope | None:
    """Refuse whatever is asked."""
    return seal(Failure(error="Refused", sentence="The site refused."))


def when(turns: Mapping[tuple[str, Moment], Behaviour]) -> Script:
    """Return the script in which a site does at those moments what is said, and else is honest."""
    return lambda site, moment: turns.get((site, moment), honest)


def during(number: int, exchange: str, sites: Sequence[str], behaviour: Behaviour) -> Script:
    """Return the script in which, in every attempt at round `number`, those sites fail at one exchange."""

    def script(site: str, moment: Moment) -> Behaviour:
        return behaviour if site in sites and (moment[0], moment[2]) == (number, exchange) else honest

    return script
