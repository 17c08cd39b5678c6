"""What a simulation may do and an institution may not. Every name here says so wherever it shows.

`InsecurePlainSum` adds ring vectors that nothing hides; the arithmetic is that of the masked sum, bit for bit.
`InsecureSeededNoise` draws noise from a number, so that a simulation can be repeated to the same bytes.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from confide.client.spends import SEEDED
from confide.common.errors import MessageError
from confide.common.messages import Contribution, Envelope, Failure, Offer, expect, open_envelope, seal
from confide.common.ring import RingLayout, RingSum, RingVector
from confide.server.rounds import Channel, Collected


class InsecurePlainSum:
    """Both ends of a sum without masks: the site sends its ring vector as it is, the server adds."""

    name = "insecure_plain_sum"
    retries = False  # what was sent in the clear need not be sent again

    def protect(self, vector: RingVector, offer: Offer) -> Contribution:
        """Return the vector, unprotected."""
        return Contribution(
            run=offer.run,
            round=offer.round,
            attempt=offer.attempt,
            ring=vector.layout.digest,
            protection=self.name,
            words=vector.words,
        )

    def collect(
        self, channel: Channel, offer: Offer, sites: Sequence[str], ring: RingLayout, least: int, timeout_s: float
    ) -> Collected:
        """Return the sum over those sites that took part, if they are at least `least`."""
        envelope = seal(offer)
        total = np.zeros(ring.length, np.uint32)
        present: list[str] = []
        missing = dict.fromkeys(sorted(sites), "no answer")
        bytes_up = 0
        awaited = set(sites)
        for site, answer in channel.ask(dict.fromkeys(sites, envelope), timeout_s):
            if site not in awaited:
                continue  # nobody is summed twice, nor who was not asked
            awaited.remove(site)
            try:
                contribution = _contribution(answer, site, offer, ring)
            except MessageError as error:
                missing[site] = type(error).__name__
                continue
            if isinstance(contribution, Failure):
                missing[site] = contribution.error
                continue
            total += contribution.words
            present.append(site)
            del missing[site]
            bytes_up = answer.size_bytes
        enough = len(present) >= least
        return Collected(
            total=RingSum(words=total, layout=ring, count=len(present)) if enough else None,
            present=tuple(sorted(present)),
            missing=missing,
            bytes_up=bytes_up,
            bytes_down=envelope.size_bytes,
        )


def _contribution(answer: Envelope, site: str, offer: Offer, ring: RingLayout) -> Contribution | Failure:
    message = open_envelope(answer)
    if isinstance(message, Failure):
        return message
    expect(message, Contribution)
    assert isinstance(message, Contribution)
    due = (offer.run, offer.round, offer.attempt, ring.digest, InsecurePlainSum.name, ring.length)
    found = (message.run, message.round, message.attempt, message.ring, message.protection, len(message.words))
    if found != due:
        raise MessageError(f"Site {site} sent a contribution to something else than round {offer.round} of this run.")
    return message


class InsecureSeededNoise:
    """Draws fixed by a seed, a stream and a round: equal on every repetition, hence no protection.

    Streams are independent of each other: the generator (Philox, 256 bits of key and counter) is keyed by a hash of all
    three.

    Args:
        seed: The simulation's seed.
        stream: Whose draws, such as `federated/site-1`.
        number: The round.
    """

    name = SEEDED

    def __init__(self, seed: int, stream: str, number: int) -> None:
        digest = hashlib.sha256(f"confide-simulation/1|{seed}|{stream}|{number}".encode()).digest()
        self._generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(int.from_bytes(digest, "big"))))

    def uniforms(self, count: int) -> npt.NDArray[np.float64]:
        """Return independent uniforms in [0, 1), (count,)."""
        return self._generator.random(count)

    def gaussian(self, count: int) -> npt.NDArray[np.float64]:
        """Return independent standard normals, (count,)."""
        return self._generator.standard_normal(count)
