"""One attempt at a round of secure aggregation: what both sides know of it, and the contexts everything is bound to.

`pre` says what the round is; it exists before any key does. `ctx` adds the adapter the round starts from and all
advertisements. Keys, boxes, masks, commitments and signatures of one context mean nothing in any other: neither in
another attempt, round or run, nor with another cohort, plan, adapter or set of keys.
"""

import dataclasses
import functools
import hashlib
import struct
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Self

from confide.common.canonical import canonical_bytes
from confide.common.crypto import (
    KEM_CIPHERTEXT_BYTES,
    KEM_PUBLIC_BYTES,
    PUBLIC_BYTES,
    SEAL_BYTES,
    SIGNATURE_BYTES,
    Verifier,
    check_agreement_key,
)
from confide.common.errors import MessageError, Refused
from confide.common.graph import Connections, connections, neighbourhoods
from confide.common.messages import Offer, Peers
from confide.common.plan import HYBRID, Federation
from confide.common.ring import RingLayout
from confide.common.roster import Roster
from confide.common.shamir import SHARE_BYTES

PROTOCOL = "confide-secagg/1"
LEAST_SITES = 3  # with two, each would learn the other's vector from the sum

_PLACE = struct.Struct(">H")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """An attempt before it begins. Inside it sites are called by their place in the cohort, from 0.

    Attributes:
        offer: The offer.
        keys: Each site's Ed25519 public key, in the order of the cohort.
        ring: The ring's layout.
        floor: How many sites must survive and sign who did: the quorum, and not fewer than the plan's min_sites.
        hybrid: Whether boxes are sealed with X25519 and ML-KEM-768 together, or with X25519 alone.
        connections: Who shares with whom, and how many must agree, of all sites on the roster.
        pre: SHA-256 over all of it.
    """

    offer: Offer
    keys: tuple[bytes, ...]
    ring: RingLayout
    floor: int
    hybrid: bool
    connections: Connections
    pre: bytes

    @classmethod
    def of(cls, offer: Offer, roster: Roster, ring: RingLayout, terms: Federation) -> Self:
        """Return the attempt that `offer` begins.

        Args:
            offer: The offer.
            roster: The federation's roster.
            ring: The ring's layout.
            terms: The plan's `[federation]`.

        How many must agree follows from the roster and not from the cohort, which the server chooses: otherwise it could
        choose a few sites and helpers of its own, or open two sums of one round over two parts of the sites.

        Raises:
            MessageError: The cohort is unsorted, repeats a site or names one that is not on the roster, or roster or
                ring are others than the offer's.
            Refused: The cohort is too small a part of the roster.
        """
        if offer.roster != roster.digest or offer.ring != ring.digest:
            raise MessageError(f"The offer of round {offer.round} names another roster or ring than this side's.")
        if list(offer.cohort) != sorted(set(offer.cohort)) or not set(offer.cohort) <= roster.sites.keys():
            raise MessageError(f"The offer of round {offer.round} names a cohort that is no sorted part of the roster.")
        among = connections(len(roster.sites))
        floor = max(among.quorum, terms.min_sites, LEAST_SITES)
        if len(offer.cohort) < max(floor, among.gathered):
            raise Refused(
                f"Round {offer.round} is offered to {len(offer.cohort)} of the {among.sites} sites on the roster; at least "
                f"{max(floor, among.gathered)} must be asked."
            )
        parameters = {"floor": floor, "key_agreement": terms.key_agreement, **dataclasses.asdict(among)}
        spelled = canonical_bytes({"format": PROTOCOL, "offer": offer.terms, "parameters": parameters})
        return cls(
            offer=offer,
            keys=tuple(roster.sites[site] for site in offer.cohort),
            ring=ring,
            floor=floor,
            hybrid=terms.key_agreement == HYBRID,
            connections=among,
            pre=hashlib.sha256(spelled).digest(),
        )

    @property
    def gathered(self) -> int:
        """How many sites must advertise before keys are shared."""
        return max(self.floor, self.connections.gathered)

    @property
    def offered(self) -> bytes:
        """What the coordinator signs."""
        return _label("offer") + self.pre

    def advertised(self, place: int, public: bytes) -> bytes:
        """Return what the site in that place signs when it advertises its public keys."""
        return _label("advertisement") + self.pre + places([place]) + public

    @property
    def public_bytes(self) -> int:
        """How long a site's public keys are: X25519 for boxes, X25519 for masks, and ML-KEM-768 if hybrid."""
        return 2 * PUBLIC_BYTES + (KEM_PUBLIC_BYTES if self.hybrid else 0)

    @property
    def box_bytes(self) -> int:
        """How long a sealed box of two shares is."""
        return 2 * SHARE_BYTES + SEAL_BYTES + (KEM_CIPHERTEXT_BYTES if self.hybrid else 0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gathering:
    """Those who advertised, with their keys, and the adapter the round starts from.

    Attributes:
        attempt: The attempt.
        adapter: The adapter's digest.
        public: The public keys, by place.
        message: The message that tells sites all this.
        ctx: SHA-256 over all of it.
        neighbours: Who shares with whom, by place, each sorted.
    """

    attempt: Attempt
    adapter: str
    public: Mapping[int, bytes]
    message: Peers
    ctx: bytes
    neighbours: Mapping[int, tuple[int, ...]]

    @classmethod
    def of(
        cls,
        attempt: Attempt,
        adapter: str,
        advertisements: Mapping[int, bytes],
        checkpoints: Mapping[int, str] = MappingProxyType({}),
    ) -> Self:
        """Return the gathering of these advertisements, each verified before.

        Args:
            attempt: The attempt.
            adapter: The adapter's digest.
            advertisements: Public keys and signature, by place.
            checkpoints: What each site showed of its ledger, by place; nothing if absent. No context holds them: each is
                signed for itself, and what they say is for witnesses to judge.
        """
        told = b"".join(places([place]) + advertisements[place] for place in sorted(advertisements))
        ctx = hashlib.sha256(_label("context") + attempt.pre + adapter.encode() + b"\n" + told).digest()
        # The graph follows from everybody's keys, so neither the server nor a site chooses who is whose neighbour.
        seed = hashlib.sha256(_label("graph") + attempt.pre + told).digest()
        return cls(
            attempt=attempt,
            adapter=adapter,
            public={place: advertisements[place][: attempt.public_bytes] for place in sorted(advertisements)},
            message=Peers(
                context=attempt.pre.hex(),
                adapter=adapter,
                advertisements=told,
                checkpoints=tuple(checkpoints.get(place, "") for place in sorted(advertisements)),
            ),
            ctx=ctx,
            neighbours=_neighbourhoods(tuple(sorted(advertisements)), attempt.connections.neighbours, seed),
        )

    def box_key(self, place: int) -> bytes:
        """Return the X25519 key under which boxes for that place are sealed."""
        return self.public[place][:PUBLIC_BYTES]

    def mask_key(self, place: int) -> bytes:
        """Return the X25519 key of that place's pair masks."""
        return self.public[place][PUBLIC_BYTES : 2 * PUBLIC_BYTES]

    def kem_key(self, place: int) -> bytes:
        """Return the ML-KEM-768 key of that place; hybrid only."""
        return self.public[place][2 * PUBLIC_BYTES :]

    def box(self, one: int, other: int) -> bytes:
        """Return what the key of boxes between two places is derived for; the same from both ends."""
        return self._bound("box", *sorted((one, other)))

    def pair(self, one: int, other: int) -> bytes:
        """Return what the mask between two places is derived for; the same from both ends."""
        return self._bound("pair mask", *sorted((one, other)))

    def own(self, place: int) -> bytes:
        """Return what the mask of one place is derived for."""
        return self._bound("self mask", place)

    def addressed(self, sender: int, receiver: int) -> bytes:
        """Return what a box is bound to, beside its key: who sends it to whom."""
        return self._bound("address", sender, receiver)

    def commitment(self, place: int, seed: bytes) -> bytes:
        """Return the commitment to a self mask's seed, 32 bytes."""
        return hashlib.sha256(self._bound("commitment", place) + seed).digest()

    def confirmed(self, survivors: bytes) -> bytes:
        """Return what a site signs when it confirms the survivors."""
        return self._bound("survivors") + survivors

    def _bound(self, purpose: str, *of: int) -> bytes:
        return _label(purpose) + self.ctx + places(of)


def read_advertisement(attempt: Attempt, place: int, keys: bytes, verify: Verifier) -> None:
    """Return if `keys` are the public keys of the site in that place, signed by it for this attempt.

    Raises:
        MessageError: They are not.
    """
    if len(keys) != attempt.public_bytes + SIGNATURE_BYTES:
        due = attempt.public_bytes + SIGNATURE_BYTES
        raise MessageError(f"Site {attempt.offer.cohort[place]} advertised {len(keys)} bytes of keys; {due} are due.")
    public, signature = keys[: attempt.public_bytes], keys[attempt.public_bytes :]
    for start in (0, PUBLIC_BYTES):
        check_agreement_key(public[start : start + PUBLIC_BYTES])
    verify(attempt.keys[place], attempt.advertised(place, public), signature)


def read_gathering(attempt: Attempt, message: Peers, verify: Verifier, place: int, own: bytes) -> Gathering:
    """Return the gathering that `message` tells, once each advertisement in it was verified.

    Args:
        attempt: The attempt.
        message: What the server sent.
        verify: Verifies signatures.
        place: Who reads it.
        own: What that site advertised itself.

    Raises:
        MessageError: The message belongs to another attempt, or an advertisement is malformed, forged or repeated, or
            the reader's own is not among them, or checkpoints are not one for each.
    """
    if message.context != attempt.pre.hex():
        raise MessageError("The advertisements of another attempt arrived.")
    size = _PLACE.size + attempt.public_bytes + SIGNATURE_BYTES
    advertisements = read_records(message.advertisements, size, attempt)
    if advertisements.get(place) != own:
        raise MessageError("The advertisements of this attempt do not hold the one that this site sent.")
    if len(message.checkpoints) != len(advertisements):
        raise MessageError(
            f"{len(message.checkpoints)} checkpoints arrived with {len(advertisements)} advertisements; one is due with each."
        )
    for peer, keys in advertisements.items():
        if peer != place:
            read_advertisement(attempt, peer, keys, verify)
    told = dict(zip(advertisements, message.checkpoints, strict=True))
    gathering = Gathering.of(attempt, message.adapter, advertisements, told)
    keys_told = [key for peer in gathering.public for key in (gathering.box_key(peer), gathering.mask_key(peer))]
    if len(set(keys_told)) < len(keys_told):
        raise MessageError("Two advertisements of this attempt hold the same key.")
    return gathering


def places(of: Iterable[int]) -> bytes:
    """Return places as bytes, two each, big-endian."""
    return b"".join(map(_PLACE.pack, of))


def read_places(raw: bytes, attempt: Attempt) -> tuple[int, ...]:
    """Return the places in `raw`.

    Raises:
        MessageError: They are not strictly ascending, or outside the cohort.
    """
    return tuple(read_records(raw, _PLACE.size, attempt))


def read_records(raw: bytes, size: int, attempt: Attempt) -> dict[int, bytes]:
    """Return what stands behind each place in `raw`, a row of records of `size` bytes that begin with a place.

    Raises:
        MessageError: The length is no multiple of `size`, or places are not strictly ascending or outside the cohort.
    """
    if not raw or len(raw) % size:
        raise MessageError(f"A list of {len(raw)} bytes arrived; its records have {size} bytes each.")
    records: dict[int, bytes] = {}
    last = -1
    for start in range(0, len(raw), size):
        (place,) = _PLACE.unpack_from(raw, start)
        if not last < place < len(attempt.keys):
            raise MessageError("A list arrived whose sites are not in ascending order, or not in the cohort.")
        records[place] = raw[start + _PLACE.size : start + size]
        last = place
    return records


def _label(purpose: str) -> bytes:
    """Return the head of everything that is hashed, signed or derived, so that no two purposes share bytes."""
    return f"{PROTOCOL} {purpose}\n".encode()


@functools.lru_cache(maxsize=4)  # in a simulation every site of a cohort asks for the same graph
def _neighbourhoods(members: tuple[int, ...], degree: int, seed: bytes) -> Mapping[int, tuple[int, ...]]:
    return neighbourhoods(members, degree, seed)
