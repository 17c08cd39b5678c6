"""What a simulation may do and an institution may not. Every name here says so wherever it shows.

`InsecurePlainSum` adds ring vectors that nothing hides; the arithmetic is that of the masked sum, bit for bit.
`InsecureSeededNoise` draws noise from a number, so that a simulation can be repeated to the same bytes.
"""

import hashlib

import numpy as np
import numpy.typing as npt

from confide.common.canonical import canonical_bytes
from confide.common.entries import SEEDED
from confide.common.errors import MessageError, Refused
from confide.common.messages import (
    Advertisement,
    Confirmation,
    Contribution,
    MaskedVector,
    Names,
    Offer,
    Opening,
    Peers,
    Shares,
    Signatures,
    Start,
    Survivors,
)
from confide.common.ring import RingSum, RingVector, check_sum
from confide.common.roster import Roster
from confide.server.summation import Channel, Collected, Conversation, Task

PLAIN_SUM = "insecure_plain_sum"


class InsecurePlainSum:
    """Both ends of a sum without masks: the site sends its ring vector as it is, the server adds.

    It needs `min_sites` sites and no quorum, so with dropouts it may sum rounds that secure aggregation voids.
    Of the exchanges only `advertise` and `contribute` take place. The word stands in the offer for the roster, so that
    neither end ever takes part in another's protocol by mistake.
    """

    retries = False  # what was sent in the clear need not be sent again
    roster: Roster | None = None  # anybody may take part

    def attend(self, offer: Offer) -> "InsecureUnmasked":
        """Return the site's part in the attempt that `offer` begins."""
        if offer.roster != PLAIN_SUM:
            raise Refused(f"An offer arrived that is not for a sum by {PLAIN_SUM}.")
        return InsecureUnmasked(_context(offer))

    def collect(self, channel: Channel, task: Task) -> Collected:
        """Return the sum over those sites that took part, if they are enough."""
        offer = task.offer(roster=PLAIN_SUM)
        context = _context(offer)
        start = Start(context=context, inbox=b"", adapter=task.adapter)
        words = np.zeros(task.ring.size, task.ring.dtype)

        def add(site: str, message: Contribution) -> None:
            if message.context != context:
                raise MessageError(f"Site {site} sent a contribution to something else than round {task.round}.")
            words[:] += task.ring.unpacked(message.vector.words)

        def note(site: str, message: Advertisement) -> None:
            if (message.context, message.keys) != (context, b""):
                raise MessageError(f"Site {site} does not take part in a sum by {PLAIN_SUM}.")

        talk = Conversation(channel, task.cohort, least=task.plan.federation.min_sites)
        total, void = None, ""
        try:
            talk.ask("advertise", lambda _: offer, Advertisement, note, task.answer_s)
            talk.ask("contribute", lambda _: start, Contribution, add, task.training_s)
            total = RingSum(words=words, layout=task.ring, count=len(talk.present))
            check_sum(total)
        except MessageError as error:
            total, void = None, str(error)
        return Collected(
            summation=PLAIN_SUM,
            total=total,
            present=() if total is None else talk.present,
            missing=talk.missing,
            void=void,
            again=(),
            bytes_up=talk.bytes_up,
            bytes_down=talk.bytes_down,
        )


class InsecureUnmasked:
    """A site's part in a sum that nothing hides."""

    peers: Names = ()  # it learns of none

    def __init__(self, context: str) -> None:
        self._context = context

    def advertise(self) -> Advertisement:
        """Return no keys."""
        return Advertisement(context=self._context, keys=b"")

    def share(self, message: Peers) -> Shares:
        """Refuse: there is nothing to share."""
        raise _nothing(message.kind)

    def admit(self, message: Start) -> None:
        """Return if the start belongs to this attempt."""
        if message.context != self._context:
            raise MessageError("The start of another attempt arrived.")

    def mask(self, vector: RingVector) -> Contribution:
        """Return the vector as it is."""
        return Contribution(context=self._context, vector=MaskedVector(words=vector.layout.packed(vector.words)))

    def confirm(self, message: Survivors) -> Confirmation:
        """Refuse: there is nothing to open."""
        raise _nothing(message.kind)

    def open(self, message: Signatures) -> Opening:
        """Refuse: there is nothing to open."""
        raise _nothing(message.kind)


def _context(offer: Offer) -> str:
    return hashlib.sha256(canonical_bytes(offer.terms)).hexdigest()


def _nothing(kind: str) -> Refused:
    return Refused(f"A sum by {PLAIN_SUM} has no {kind}.")


class InsecureSeededNoise:
    """Draws fixed by a seed, a stream and a round: equal on every repetition, hence no protection.

    Streams are independent of each other: the generator (Philox, 256 bits of key and counter) is keyed by a hash of all
    three. Its words are integers, so they are equal on every machine, and so is what `client/noise` makes of them.

    Args:
        seed: The simulation's seed.
        stream: Whose draws, such as `federated/site-1`.
        number: The round.
    """

    name = SEEDED

    def __init__(self, seed: int, stream: str, number: int) -> None:
        digest = hashlib.sha256(f"confide-simulation/1|{seed}|{stream}|{number}".encode()).digest()
        self._rounding_key = hashlib.sha256(b"confide-simulation/1 rounding\n" + digest).digest()
        # What numpy's distributions make of a generator may change between its versions; the raw words may not.
        self._generator = np.random.Philox(np.random.SeedSequence(int.from_bytes(digest, "big")))

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """Return independent uniform 64-bit words, (count,)."""
        return self._generator.random_raw(count)

    def rounding_key(self) -> bytes:
        """Return the key, 32 bytes, of the keystream that updates are rounded with."""
        return self._rounding_key
