"""Who shares keys with whom on a roster, and how many must agree.

Up to 64 sites everyone shares with everyone, which withstands a server that lies. On larger rosters each site shares
with a few neighbours on a random circle; that is safe only against a server that follows the protocol and looks on,
hence the graph's name.

Source: Bell, Bonawitz, Gascón, Lepoint, Raykova, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead",
ACM CCS 2020: the semi-honest protocol.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

from confide.common.errors import UsageError

COMPLETE_UP_TO = 64
COMPLETE, SEMI_HONEST = "complete", "semi_honest_graph"
SEED_BYTES = 32
LARGEST_COHORT = 1 << 16

CORRUPT = Fraction(1, 10)  # the part of the sites that may look on together with the server; gamma in the paper
DROPPED = Fraction(1, 10)  # the part of the sites that may drop out without the round being lost; delta
PRIVACY_BITS = 40  # sigma
CORRECTNESS_BITS = 30  # eta


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Connections:
    """How a roster hangs together; equal on every machine.

    A site splits its secrets into one share for each neighbour and one for itself.

    Attributes:
        sites: n, all sites on the roster.
        neighbours: k, with how many others each site shares keys; n - 1 in the complete graph, else even.
        threshold: t, how many shares of a neighbourhood open a secret.
        gathered: How many must advertise before keys are shared: the quorum, or on a circle n − ⌊n/10⌋.
        quorum: How many sites must survive, and sign who did, before a sum is opened: ⌊2n/3⌋ + 1.
    """

    sites: int
    neighbours: int
    threshold: int
    gathered: int
    quorum: int

    @property
    def graph(self) -> str:
        """`complete`, or `semi_honest_graph` where sites share keys with some others only."""
        return COMPLETE if self.neighbours == self.sites - 1 else SEMI_HONEST


@functools.cache
def connections(sites: int) -> Connections:
    """Return how a roster of so many sites hangs together.

    Up to 64 sites the graph is complete and the threshold is the quorum. Above, k is the smallest even number for which
    some threshold satisfies the bounds below, and t the smallest such threshold from k/2 upward. The bounds hold for any
    n/10 sites that are corrupt and any n/10 that drop out, rounded down, if both were fixed before the circle was drawn.
    They are computed in exact fractions.

    - Privacy: except with probability 2^-40, no site has t or more corrupt neighbours (a hypergeometric tail, summed
      over n sites, on the smallest circle there is: of those who did not drop out), and the honest survivors stay
      connected (to part the circle, k/2 sites in a row must be corrupt or dropped: at each of n places this has
      probability at most (1/10 + 1/10)^(k/2)).
    - Correctness: except with probability 2^-30, each site has t neighbours that survive. Its own share is not counted,
      because a site that dropped out does not send it.

    If more drop out once keys are shared, down to the quorum, privacy holds with the same 40 bits (shown by test up to
    1000 sites, counting that the circle must be cut at two places), but the round is probably lost. If more than a tenth
    is missing from the circle itself, the corrupt ones are too large a part of it; hence `gathered`.

    Args:
        sites: n, 3 to 2^16.

    Raises:
        UsageError: The number of sites is out of range.

    Guarantee:
        Two quorums have more than n/3 sites in common, so if fewer than n/3 are corrupt they share an honest one.
    """
    if not 3 <= sites <= LARGEST_COHORT:
        raise UsageError(
            f"A roster of {sites} sites cannot be; allowed are 3 to {LARGEST_COHORT}. "
            "Of two sites each would learn the other's update from the sum."
        )
    quorum = 2 * sites // 3 + 1
    if sites <= COMPLETE_UP_TO:
        return Connections(sites=sites, neighbours=sites - 1, threshold=quorum, gathered=quorum, quorum=quorum)
    neighbours, threshold = next(_sufficient(sites))
    gathered = sites - math.floor(sites * DROPPED)
    return Connections(sites=sites, neighbours=neighbours, threshold=threshold, gathered=gathered, quorum=quorum)


def survives(sites: int) -> int:
    """Return how many dropouts a roster survives: 0 of 3 sites, 1 of 4 to 6.

    In the complete graph a quorum is all that is needed. On a circle every neighbourhood must keep its threshold, which
    is sure up to 2^-30 for a tenth of the sites only.

    Args:
        sites: n, 3 to 2^16.

    Raises:
        UsageError: The number of sites is out of range.
    """
    among = connections(sites)
    return sites - among.quorum if among.graph == COMPLETE else math.floor(sites * DROPPED)


def neighbourhoods(members: Sequence[int], k: int, seed: bytes) -> dict[int, tuple[int, ...]]:
    """Return the neighbours of each member, ascending: a k-regular circle in random order, or everyone if k is enough.

    The ascending list of members is shuffled: for i from its last index down to 1, entry i is exchanged with entry j,
    where j = w mod (i + 1) and w is the next word of a stream that is below the largest multiple of i + 1 not above
    2^16; larger words are passed over. The stream is SHA-256("confide-graph/1" ‖ seed ‖ c) for c = 0, 1, 2, …, an
    8-byte big-endian number, each digest read as 16 big-endian words of 2 bytes. Then each member is joined to the k/2
    next and the k/2 previous on the circle (the Harary graph H(k, m)).

    Args:
        members: The sites that take part, in any order; distinct, at most 2^16 of them.
        k: Neighbours per member, at least 1. If it is at least all other members, the graph is complete; else even.
        seed: 32 bytes that no site and no server chose alone: the SHA-256 over all advertisements.

    Raises:
        UsageError: Members, k or seed are not as above.
    """
    if len(set(members)) != len(members) or len(members) > LARGEST_COHORT:
        raise UsageError(f"{len(members)} members cannot be joined; they must be distinct, at most {LARGEST_COHORT}.")
    if len(seed) != SEED_BYTES:
        raise UsageError(f"A graph's seed has {SEED_BYTES} bytes; {len(seed)} were given.")
    present = sorted(members)
    if k >= len(present) - 1:
        return {member: tuple(other for other in present if other != member) for member in present}
    if k < 2 or k % 2:
        raise UsageError(
            f"Each of {len(present)} members cannot have {k} neighbours on a circle; choose an even number."
        )
    circle = _shuffled(present, seed)
    return {
        member: tuple(sorted(circle[(place + step) % len(circle)] for step in range(-k // 2, k // 2 + 1) if step))
        for place, member in enumerate(circle)
    }


def _sufficient(sites: int) -> Iterator[tuple[int, int]]:
    """Give every (k, t) that satisfies the bounds of `connections`, the smallest k first, t from k/2 upward."""
    corrupt, dropped = math.floor(sites * CORRUPT), math.floor(sites * DROPPED)
    for k in itertools.count(2, 2):
        parted = sites * (CORRUPT + DROPPED) ** (k // 2)
        if parted > Fraction(1, 2**PRIVACY_BITS):
            continue
        for t in range(k // 2, k + 1):
            exposed = sites * _at_least(t, of=corrupt, among=sites - dropped - 1, drawn=k)
            stuck = sites * _at_least(k - t + 1, of=dropped, among=sites - 1, drawn=k)
            if exposed + parted <= Fraction(1, 2**PRIVACY_BITS) and stuck <= Fraction(1, 2**CORRECTNESS_BITS):
                yield k, t


def _at_least(least: int, *, of: int, among: int, drawn: int) -> Fraction:
    """Return the probability that `drawn` sites out of `among` hold `least` or more of the marked `of`."""
    ways = sum(math.comb(of, hit) * math.comb(among - of, drawn - hit) for hit in range(least, min(of, drawn) + 1))
    return Fraction(ways, math.comb(among, drawn))


def _shuffled(members: Sequence[int], seed: bytes) -> list[int]:
    circle = list(members)
    words = _words(seed)
    for last in range(len(circle) - 1, 0, -1):
        # Without passing over the largest words, small remainders would come up more often.
        fair = (1 << 16) - (1 << 16) % (last + 1)
        place = next(word for word in words if word < fair) % (last + 1)
        circle[last], circle[place] = circle[place], circle[last]
    return circle


def _words(seed: bytes) -> Iterator[int]:
    for counter in itertools.count():
        digest = hashlib.sha256(b"confide-graph/1" + seed + counter.to_bytes(8)).digest()
        yield from (int.from_bytes(digest[i : i + 2]) for i in range(0, len(digest), 2))
