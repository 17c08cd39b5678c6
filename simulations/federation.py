"""A whole federation in one process: one agent per site, one frozen base model for all, the server's own loop."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from confide.client.agent import Agent, Protection
from confide.client.conformance import Certificate
from confide.client.mechanism import Randomness
from confide.client.noise import CRYPTOGRAPHIC, CryptographicNoise
from confide.client.persons import declared
from confide.client.private_trainer import PrivateTrainer
from confide.client.spends import Spends
from confide.common.bounds import ring_layout
from confide.common.crypto import Identity
from confide.common.entries import SEEDED
from confide.common.examples import Examples
from confide.common.messages import Envelope
from confide.common.model import AdaptedModel
from confide.common.plan import Plan
from confide.common.prefix import PrefixCache
from confide.common.ring import RingLayout
from confide.common.witness import Witness
from confide.server.aggregate import ServerState
from confide.server.rounds import Run, run_rounds
from confide.server.store import RoundRecord, Store
from confide.simulations.enrolment import Enrolment, Sums
from confide.simulations.insecure import InsecureSeededNoise
from confide.simulations.setting import check_choices
from confide.simulations.vaults import kept_entropy, open_ledger, rows_of


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Federation:
    """The institutions of a simulation, with their rows.

    Attributes:
        name: The run's name; part of every message.
        certificate: That the base model and adapter, which all share, passed the self-test.
        sites: Each site's rows, by name.
        cache: The frozen prefix of all rows, if it was computed.
        seed: Fixes every draw of every site, if the noise is seeded.
        summation: How vectors are summed, one of `SUMMATIONS`.
        noise: Where the sites' draws come from, one of `NOISES`. Only seeded ones can be repeated: with cryptographic ones
            a site sits out a round that was interrupted.
        purpose: Tells this federation's draws from those of others with the same seed.
    """

    name: str
    certificate: Certificate
    sites: Mapping[str, Examples]
    cache: PrefixCache | None
    seed: int
    summation: str
    noise: str = SEEDED
    purpose: str = "federated"

    @property
    def model(self) -> AdaptedModel:
        """The base model and adapter that all share."""
        return self.certificate.model

    @property
    def plan(self) -> Plan:
        """The plan of the run."""
        return self.model.plan

    @property
    def ring(self) -> RingLayout:
        """How updates are written as integers."""
        return ring_layout(self.plan, self.model.layout, self.model.head)

    def begin(self, directory: Path) -> tuple[Run, dict[str, Agent]]:
        """Return what the server runs, and one agent per site; their ledgers and keys are kept under `directory`.

        Raises:
            UsageError: There is no summation or no noise of that name.
        """
        check_choices(noise=self.noise)
        names = tuple(sorted(self.sites))
        sums = Sums.of(self.summation, self.plan, self.ring, names, kept_entropy(directory))
        run = Run(
            name=self.name,
            plan=self.plan,
            layout=self.model.layout,
            ring=self.ring,
            sites=names,
            summation=sums.summation,
        )
        return run, {
            site: self._agent(site, directory, sums.protections[site], sums.identities[site]) for site in names
        }

    def agents(self, directory: Path, enrolment: Enrolment, ledgers: Path) -> dict[str, Agent]:
        """Return one agent per site for a federation that others belong to as well.

        Args:
            directory: Where what belongs to this run is kept.
            enrolment: The federation's; a site keeps its key from run to run.
            ledgers: Where the sites' ledgers are, which therefore last longer than a run as well.
        """
        return {
            site: self._agent(
                site,
                directory,
                enrolment.member(site, self.plan, self.ring),
                enrolment.identities[site],
                ledgers=ledgers,
            )
            for site in self.sites
        }

    def _agent(
        self, site: str, directory: Path, protection: Protection, identity: Identity, *, ledgers: Path | None = None
    ) -> Agent:
        def randomness(number: int) -> Randomness:
            if self.noise == CRYPTOGRAPHIC:
                return CryptographicNoise()
            return InsecureSeededNoise(self.seed, f"{self.purpose}/{site}", number)

        persons = declared(self.sites[site].person_count)
        journal = open_ledger(
            (ledgers or directory) / f"{site}.ledger",
            site=site,
            identity=identity,
            plan=self.plan,
            run=self.name,
            declared_persons=persons,
        )
        return Agent(
            site=site,
            run=self.name,
            plan=self.plan,
            trainer=PrivateTrainer(self.certificate, self.sites[site], self.cache, personal_folder(directory, site)),
            declared_persons=persons,
            ring=self.ring,
            randomness=randomness,
            protection=protection,
            spends=Spends(journal, run=self.name, plan=self.plan.digest, data=rows_of(self.name)),
            witness=None if protection.roster is None else Witness(),
        )


def personal_folder(directory: Path, site: str) -> Path:
    """Return where a site keeps what of its adapter never leaves it; `directory` is that of the sites' records."""
    return directory / f"{site}-personal"


class Site(Protocol):
    """Whatever answers for a site: its agent, or one who watches it."""

    def answer(self, envelope: Envelope) -> Envelope:
        """Return the site's answer."""
        ...


Engine = Callable[[Run, Mapping[str, Site], Store, ServerState, Callable[[RoundRecord], None]], str]


def run_in_process(
    run: Run,
    agents: Mapping[str, Site],
    store: Store,
    start: ServerState,
    told: Callable[[RoundRecord], None],
) -> str:
    """Run the rounds with agents called directly, and return how the run ended. This is the default engine."""
    return run_rounds(run, InProcessChannel(agents), store, start, told)


class InProcessChannel:
    """Hands each message to the site's agent, one site after the other.

    Args:
        agents: The sites.
        dropouts: The sites that do not answer, by the how-manieth time the channel is used, from 1.
    """

    def __init__(self, agents: Mapping[str, Site], dropouts: Mapping[int, frozenset[str]] | None = None) -> None:
        self._agents = agents
        self._dropouts = dropouts or {}
        self._asked = 0

    def ask(self, messages: Mapping[str, Envelope], timeout_s: float) -> Iterator[tuple[str, Envelope]]:
        """Yield every site's answer but the scheduled dropouts'; in one process nobody is late."""
        self._asked += 1
        absent = self._dropouts.get(self._asked, frozenset())
        for site, message in messages.items():
            if site not in absent:
                yield site, self._agents[site].answer(message)
