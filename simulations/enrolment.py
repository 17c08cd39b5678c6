"""How a simulated federation sums: with keys of its own, made for this process, or without any protection."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Self

from confide.client.agent import Protection
from confide.client.membership import Membership
from confide.common.crypto import Entropy, Identity
from confide.common.graph import SEMI_HONEST
from confide.common.plan import Plan
from confide.common.ring import RingLayout
from confide.common.roster import Roster, read_roster
from confide.common.witness import Witness
from confide.server.summation import SecureSummation, Summation
from confide.simulations.insecure import PLAIN_SUM, InsecurePlainSum
from confide.simulations.setting import check_choices


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Enrolment:
    """A federation's keys, all in one hand, which only a simulation has.

    Attributes:
        roster: The roster, signed by an admin and read back.
        coordinator: The server's key.
        identities: The sites' keys, by name.
    """

    roster: Roster
    coordinator: Identity
    identities: Mapping[str, Identity]

    @classmethod
    def of(cls, sites: Sequence[str], entropy: Entropy = os.urandom) -> Self:
        """Return the enrolment of these sites, with keys drawn from `entropy`, fresh ones if absent."""
        admin, coordinator = Identity.generate(entropy), Identity.generate(entropy)
        identities = {site: Identity.generate(entropy) for site in sites}
        roster = Roster(
            federation="simulation",
            epoch=1,
            coordinator=coordinator.public,
            sites={site: identity.public for site, identity in identities.items()},
        )
        pinned = read_roster(roster.signed([admin]), [admin.public])
        return cls(roster=pinned, coordinator=coordinator, identities=identities)

    def member(self, site: str, plan: Plan, ring: RingLayout) -> Membership:
        """Return how that site protects its vectors; in a simulation it allows whatever the plan does."""
        return Membership(
            site=site,
            identity=self.identities[site],
            roster=self.roster,
            plan=plan,
            ring=ring,
            allowed=frozenset({SEMI_HONEST}),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Both ends of a summation.

    Attributes:
        summation: The server's.
        protections: The sites', by name.
        identities: The keys that sign the sites' ledgers, by name.
    """

    summation: Summation
    protections: Mapping[str, Protection]
    identities: Mapping[str, Identity]

    @classmethod
    def of(cls, name: str, plan: Plan, ring: RingLayout, sites: Sequence[str], entropy: Entropy = os.urandom) -> Self:
        """Return both ends of the summation of that name, with keys drawn from `entropy`.

        Raises:
            UsageError: There is none of that name.
        """
        check_choices(summation=name)
        enrolment = Enrolment.of(sites, entropy)
        if name == PLAIN_SUM:
            plain = InsecurePlainSum()
            return cls(summation=plain, protections=dict.fromkeys(sites, plain), identities=enrolment.identities)
        return cls(
            summation=SecureSummation(enrolment.roster, enrolment.coordinator, witness=Witness()),
            protections={site: enrolment.member(site, plan, ring) for site in sites},
            identities=enrolment.identities,
        )
