"""A site's membership in a federation: with whom it sums, on whose word, and with how many at least."""

import dataclasses

from confide.common.attempt import Attempt
from confide.common.crypto import Identity, Verifier, verify
from confide.common.errors import Refused, UsageError
from confide.common.graph import SEMI_HONEST
from confide.common.messages import Offer
from confide.common.plan import Plan
from confide.common.ring import RingLayout
from confide.common.roster import Roster
from confide.common.secagg import SiteSide


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """How a site protects its vectors: secure aggregation with the members of its pinned roster, and nothing else.

    Attributes:
        site: The site's name.
        identity: The key whose public half the roster holds for it.
        roster: The roster that the site pinned.
        plan: The plan the site agreed to.
        ring: How updates are written as integers.
        allowed: The words of what the site's owner allows although it weakens the guarantee; `semi_honest_graph` is
            the only one there is.
        check: Verifies signatures.

    Raises:
        UsageError: The roster does not hold the site with this key.
    """

    site: str
    identity: Identity
    roster: Roster
    plan: Plan
    ring: RingLayout
    allowed: frozenset[str] = frozenset()
    check: Verifier = verify
    retries: bool = True

    def __post_init__(self) -> None:
        if self.roster.sites.get(self.site) != self.identity.public:
            raise UsageError(
                f"The roster of {self.roster.federation}, epoch {self.roster.epoch}, does not hold site {self.site} with the "
                "key at hand. Use the key that was enrolled, or ask for the current roster."
            )

    def attend(self, offer: Offer) -> SiteSide:
        """Return the site's part in the attempt that `offer` begins.

        Raises:
            MessageError: The offer does not fit roster or ring, or is not signed by the federation's coordinator.
            Refused: The cohort is too small or without this site, or its graph needs a word that is not allowed here.
        """
        attempt = Attempt.of(offer, self.roster, self.ring, self.plan.federation)
        self.check(self.roster.coordinator, attempt.offered, offer.signature)
        graph = attempt.connections.graph
        if self.site not in offer.cohort:
            raise Refused(f"Site {self.site} is offered a round whose cohort it is not in.")
        if graph == SEMI_HONEST and not (self.plan.federation.graph == graph and graph in self.allowed):
            raise Refused(
                f"A roster of {attempt.connections.sites} sites is summed over a {graph}, which withstands only a server that "
                "keeps to the protocol. Plan and site must both allow it by that word."
            )
        return SiteSide(attempt, self.site, self.identity, self.check)
