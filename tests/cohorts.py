"""A cohort for tests of secure aggregation: keys, an offer, both sides, and a round with dropouts at any exchange."""

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from confide.common.attempt import Attempt
from confide.common.crypto import Entropy, Identity
from confide.common.messages import Floats, Message, Offer, vector_digest
from confide.common.plan import Federation
from confide.common.ring import RingLayout, RingSum, RingVector
from confide.common.roster import Roster
from confide.common.secagg import ServerSide, SiteSide

EXCHANGES = ("advertise", "share", "contribute", "confirm", "open")
ADAPTER: Floats = np.arange(4, dtype=np.float32)


def named(count: int) -> tuple[str, ...]:
    """Return so many names of sites, in order."""
    return tuple(f"site-{number:04}" for number in range(count))


@dataclasses.dataclass(kw_only=True)
class Cohort:
    """Sites with keys and vectors, and the server they talk to."""

    count: int
    ring: RingLayout
    terms: Federation = dataclasses.field(default_factory=Federation)
    round: int = 1
    attempt: int = 1
    entropy: Entropy = os.urandom
    seed: int = 0

    def __post_init__(self) -> None:
        self.names = named(self.count)
        self.identities = {
            name: Identity(bytes([1]) + index.to_bytes(31, "big")) for index, name in enumerate(self.names)
        }
        self.coordinator = Identity(bytes([2] * 32))
        self.roster = Roster(
            federation="test",
            epoch=1,
            coordinator=self.coordinator.public,
            sites={name: identity.public for name, identity in self.identities.items()},
        )
        draws = np.random.default_rng(self.seed)
        self.vectors = {name: self.vector(draws) for name in self.names}
        self.transcript: list[tuple[str, str, Message]] = []  # site, exchange, what it sent

    def vector(self, draws: np.random.Generator) -> RingVector:
        """Return a vector of entries that the ring allows, the tail left at nothing."""
        words = np.zeros(self.ring.size, self.ring.dtype)
        largest = self.ring.largest + 1
        words[: self.ring.length] = draws.integers(-largest, largest + 1, self.ring.length).astype(self.ring.dtype)
        return RingVector(words=words, layout=self.ring)

    def offer(self, **changes: Any) -> Offer:
        """Return the signed offer of this attempt."""
        offer = Offer(
            run="run",
            plan="sha256:plan",
            round=self.round,
            attempt=self.attempt,
            cohort=self.names,
            roster=self.roster.digest,
            layout="sha256:layout",
            ring=self.ring.digest,
            signature=b"",
        )
        offer = dataclasses.replace(offer, **changes)
        begun = Attempt.of(offer, self.roster, self.ring, self.terms)
        return dataclasses.replace(offer, signature=self.coordinator.sign(begun.offered))

    def begun(self, **changes: Any) -> Attempt:
        """Return the attempt that the offer begins."""
        return Attempt.of(self.offer(**changes), self.roster, self.ring, self.terms)

    def site(self, name: str, attempt: Attempt | None = None) -> SiteSide:
        """Return one site's side."""
        return SiteSide(attempt or self.begun(), name, self.identities[name], entropy=self.entropy)

    def total(self, names: Collection[str]) -> list[int]:
        """Return the integer sum of those sites' vectors, modulo the ring."""
        columns = zip(*(self.vectors[name].words.tolist() for name in names), strict=True)
        return [sum(column) % 2**self.ring.bits for column in columns]

    def run(
        self,
        dropouts: Mapping[str, Collection[str]] | None = None,
        spoil: Callable[[str, str, Any], Any] = lambda exchange, site, message: message,
    ) -> tuple[RingSum, ServerSide]:
        """Run a whole round and return the sum.

        Args:
            dropouts: By exchange, the sites that are gone from there on.
            spoil: Changes what a site sends in an exchange.
        """
        gone: set[str] = set()
        left = list(self.names)
        attempt = self.begun()
        server = ServerSide(attempt, vector_digest(ADAPTER))
        sites = {name: self.site(name, attempt) for name in self.names}

        def exchange(name: str, ask: Callable[[str], Any], take: Callable[[str, Any], None]) -> None:
            gone.update((dropouts or {}).get(name, ()))
            left[:] = [site for site in left if site not in gone]
            for site in left:
                answer = spoil(name, site, ask(site))
                self.transcript.append((site, name, answer))
                take(site, answer)

        exchange("advertise", lambda site: sites[site].advertise(), server.advertised)
        peers = server.peers()
        exchange("share", lambda site: sites[site].share(peers), server.shared)

        def contribute(site: str) -> Any:
            sites[site].admit(server.start(site, ADAPTER))
            return sites[site].mask(self.vectors[site])

        exchange("contribute", contribute, server.contributed)
        survivors = server.survivors()
        exchange("confirm", lambda site: sites[site].confirm(survivors), server.confirmed)
        signatures = server.signatures()
        exchange("open", lambda site: sites[site].open(signatures), server.opened)
        return server.total(), server
