"""A rehearsal: the rest of a federation, played on this machine around one site's real agent.

A steward who wants to see an agent at work before an institution does it for real has nobody to work with. Here the
admin, the coordinator, the server and the other sites are made up; the site, its agent, its vault and its socket are
the real ones. The other sites train too, on rows that nobody has. What the site spends in a rehearsal is spent: register
made-up rows for it, not real ones.

    DIR/keys.json                the federation's keys, and which site is the real one
    DIR/roster.json              its roster, signed by the admin
    DIR/witness.json             the checkpoints of ledgers that its server has seen
    DIR/sites                    the made-up sites' ledgers, one each for all runs
    DIR/runs/RUN/plan.signed     what is run, and rounds and adapters as in every run's store
    DIR/runs/RUN/adapter         the adapter after the last round, as PEFT reads it
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Self

from confide.client import postbox
from confide.client.conformance import certify
from confide.client.data import load_reader, read_examples
from confide.client.persons import declared_unit
from confide.client.running import listens
from confide.client.synthetic import write_synthetic
from confide.common.canonical import canonical_bytes
from confide.common.crypto import PUBLIC_BYTES, Identity
from confide.common.disk import READABLE, whole
from confide.common.errors import MessageError, RunError, UsageError
from confide.common.examples import Examples
from confide.common.messages import Envelope, kind_of
from confide.common.model import attach
from confide.common.plan import Plan
from confide.common.prefix import PrefixCache
from confide.common.roster import SITE_NAME, Roster
from confide.common.settings import shown
from confide.common.signed_plan import read_signed_plan, sign_plan
from confide.common.witness import Witness
from confide.server.aggregate import ServerState
from confide.server.rounds import Run, run_rounds
from confide.server.store import RoundRecord, Store
from confide.server.summation import SecureSummation
from confide.simulations.enrolment import Enrolment
from confide.simulations.federation import Federation

FORMAT = "confide-rehearsal/1"
ROSTER = "roster.json"
_KEYS, _WITNESS, _SIGNED = "keys.json", "witness.json", "plan.signed"
_PEERS = ("made-up-1", "made-up-2", "made-up-3", "made-up-4", "made-up-5")
LEAST_PEERS, MOST_PEERS = 2, len(_PEERS)


class Rehearsal:
    """A made-up federation in its directory, with one real site on its roster. Make the directory with `begin`.

    Args:
        directory: The federation's.

    Raises:
        UsageError: There is none in it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            fields = json.loads((directory / _KEYS).read_bytes())
            if fields["format"] != FORMAT:
                raise ValueError
            self.admin, self.coordinator = (Identity(bytes.fromhex(fields[name])) for name in ("admin", "coordinator"))
            self.peers = {name: Identity(bytes.fromhex(seed)) for name, seed in fields["peers"].items()}
            self.site, key = str(fields["site"]), bytes.fromhex(fields["key"])
            self.roster = Roster(
                federation=fields["federation"],
                epoch=1,
                coordinator=self.coordinator.public,
                sites={self.site: key, **{name: peer.public for name, peer in self.peers.items()}},
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(
                f"{directory} holds no rehearsal. Make one with: confide simulate rehearsal begin DIR"
            ) from None

    @classmethod
    def begin(cls, directory: Path, site: str, key: bytes, *, federation: str = "rehearsal", peers: int = 2) -> Self:
        """Make a federation of one real site and some made-up ones, and return it; its roster is in `roster.json`.

        Args:
            directory: Where; it must not exist.
            site: The real site's name.
            key: Its Ed25519 public key, 32 bytes, as `confide site init` shows it.
            federation: The federation's name.
            peers: How many made-up sites stand beside it, 2 to 5.

        Raises:
            UsageError: The directory exists, a name or the key is malformed, or the number is out of range.
        """
        if not LEAST_PEERS <= peers <= MOST_PEERS:
            raise UsageError(f"--peers {peers} is outside its range: {LEAST_PEERS} to {MOST_PEERS}.")
        if len(key) != PUBLIC_BYTES:
            raise UsageError(
                f"The site's key has {len(key)} bytes, and must have {PUBLIC_BYTES}: 64 hexadecimal digits."
            )
        for name in (site, federation):
            if not SITE_NAME.fullmatch(name):
                raise UsageError(f"{shown(name)} is no name: 1 to 63 letters, digits, spaces and . _ - are allowed.")
        if site.lower() in _PEERS:
            raise UsageError(f"{site} is the name of a made-up site. Rehearse with the name that your site has.")
        try:
            directory.mkdir(parents=True, mode=0o700)
        except FileExistsError:
            raise UsageError(f"{directory} exists and is left as it is. Give another directory.") from None
        fields = {
            "format": FORMAT,
            "federation": federation,
            "site": site,
            "key": key.hex(),
            "admin": Identity.generate().seed().hex(),
            "coordinator": Identity.generate().seed().hex(),
            "peers": {name: Identity.generate().seed().hex() for name in _PEERS[:peers]},
        }
        with whole(directory / _KEYS) as draft:
            draft.write_bytes(canonical_bytes(fields))
        begun = cls(directory)
        with whole(directory / ROSTER, READABLE) as draft:
            draft.write_bytes(begun.roster.signed([begun.admin]))
        return begun

    def sign(self, plan_toml: bytes, run: str) -> bytes:
        """Return the plan, signed by the coordinator for the run of that name."""
        return sign_plan(plan_toml, federation=self.roster.federation, run=run, coordinator=self.coordinator)

    def run(
        self,
        signed: bytes,
        *,
        model: Path,
        agent: Path,
        told: Callable[[RoundRecord], None] = lambda record: None,
        asked: Callable[[str, str], None] = lambda site, kind: None,
    ) -> str:
        """Run a signed plan's rounds that were not run yet, and return how the run ended, as `run_rounds` says.

        The adapter after the last round is then in `adapter_of(run)`.

        Args:
            signed: What `sign` returned.
            model: The base model's local directory, for the made-up sites.
            agent: The socket of the real site's agent, which must serve this plan.
            told: Called with each new record.
            asked: Called before each message, with the site and the message's kind.

        Raises:
            MessageError: The plan is not signed by this rehearsal's coordinator.
            ModelError: The base model is not the plan's.
            RunError: No agent answers at the socket, or it serves another site; or another plan was run by that name.
        """
        plan = read_signed_plan(signed, self.coordinator.public)
        if not listens(agent):
            raise RunError(f"No agent answers at {agent}. Start one with: confide site agent")
        if postbox.sites(agent) != (self.site,):
            raise RunError(f"The agent at {agent} does not serve the site {self.site} of this rehearsal.")
        root = self._begun(plan.run, signed)
        adapted = attach(model, plan.plan)
        cache = PrefixCache(adapted, plan.plan.compute.micro_batch) if PrefixCache.helps(adapted) else None
        rows = {name: self._rows(name, root, plan.plan, model) for name in self.peers}
        if cache is not None:
            for part in rows.values():
                for _ in cache.add(part):
                    pass
        federation = Federation(
            name=plan.run,
            certificate=certify(adapted, cached=cache is not None),
            sites=rows,
            cache=cache,
            seed=0,
            summation="real",
            noise="cryptographic",
        )
        enrolment = Enrolment(roster=self.roster, coordinator=self.coordinator, identities=self.peers)
        agents = federation.agents(root / "sites", enrolment, self.directory / "sites")
        store = Store(root)
        run = Run(
            name=plan.run,
            plan=plan.plan,
            layout=adapted.layout,
            ring=federation.ring,
            sites=tuple(sorted(self.roster.sites)),
            summation=SecureSummation(self.roster, self.coordinator, witness=Witness(self.directory / _WITNESS)),
        )
        answers: dict[str, Callable[[Envelope, float], Envelope]] = {
            name: lambda envelope, _, agent=agent: agent.answer(envelope)  # type: ignore[misc]
            for name, agent in agents.items()
        }
        answers[self.site] = lambda envelope, timeout_s: postbox.call(agent, self.site, envelope, timeout_s)
        start = ServerState.begin(adapted.start, plan.plan.federation)
        status = run_rounds(run, _Channel(answers, asked), store, start, told)
        state = store.latest(adapted.layout)
        adapted.export(start.adapter if state is None else state.adapter, self.adapter_of(plan.run))
        (self.adapter_of(plan.run) / "plan.toml").write_bytes(plan.toml)
        return status

    def adapter_of(self, run: str) -> Path:
        """Return where the adapter of a run lies once it has ended."""
        return self.directory / "runs" / run / "adapter"

    def rounds_of(self, run: str) -> int:
        """Return how many rounds of a run are recorded."""
        return len(Store(self.directory / "runs" / run).records)

    def _begun(self, run: str, signed: bytes) -> Path:
        """Return a run's directory, once it is sure that what is run in it is what was begun in it."""
        root = self.directory / "runs" / run
        root.mkdir(parents=True, exist_ok=True)
        if not (root / _SIGNED).exists():
            with whole(root / _SIGNED, READABLE) as draft:
                draft.write_bytes(signed)
        if (root / _SIGNED).read_bytes() != signed:
            raise RunError(
                f"A run {run!r} of another plan was begun in {root}. Sign this plan for a run of another name, with --run."
            )
        return root

    def _rows(self, name: str, root: Path, plan: Plan, model: Path) -> Examples:
        """Return a made-up site's rows."""
        table = root / "rows" / name / "rows.jsonl"
        if not table.exists():
            table.parent.mkdir(parents=True, exist_ok=True)
            write_synthetic(plan, table, _persons(plan), seed=_PEERS.index(name))
        return read_examples(table, plan, load_reader(model, plan)).examples


class _Channel:
    """Asks the made-up sites in this process and the real one through its socket; who does not answer is silent."""

    def __init__(
        self, answers: Mapping[str, Callable[[Envelope, float], Envelope]], asked: Callable[[str, str], None]
    ) -> None:
        self._answers = answers
        self._asked = asked

    def ask(self, messages: Mapping[str, Envelope], timeout_s: float) -> Iterator[tuple[str, Envelope]]:
        for site, message in messages.items():
            self._asked(site, kind_of(message))
            with contextlib.suppress(RunError, MessageError):  # an agent that ended in the middle of its answer
                yield site, self._answers[site](message, timeout_s)


def _persons(plan: Plan) -> int:
    """Return the fewest persons whose number, as it is declared, is what the plan asks for."""
    least = plan.privacy.min_persons
    unit = declared_unit(least)
    return -(-least // unit) * unit
