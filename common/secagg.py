"""Secure aggregation: the server learns the sum of the sites' vectors, and nothing else.

Two pure state machines, one for a site and one for the server, for one attempt at one round. They take and return
typed messages; they know no network, no disk and no clock, and randomness is an argument. Each site hides its vector x
under a mask of its own and one for each neighbour, modulo the ring:

    y(u) = x(u) + PRG(b(u)) + Σ over neighbours v > u of PRG(s(u,v)) − Σ over neighbours v < u of PRG(s(u,v))

In the sum the pair masks cancel. What is left, the self masks and the pair masks shared with sites that dropped out,
the server takes off with secrets that a threshold of sites gives it, share by share. A site gives one kind of share
for each peer, once, and only for a set of survivors that more than two thirds of the roster have signed.

    A advertise   two public keys, signed over what the round is
    B share       shares of b(u) and of the secret key behind s(u,·), sealed for each neighbour
    C contribute  the masked vector
    D confirm     a signature on the survivors
    E open        for each survivor a share of its b, for each who dropped out a share of its secret key

Source: Bonawitz et al. 2017 ("Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS), figure 4, in
the variant against active adversaries; the sparse graph of Bell et al. 2020 (CCS). The page "Protocol" has every byte.
"""

import contextlib
import os
from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial

import numpy as np

from confide.common.attempt import (
    LEAST_SITES,
    Attempt,
    Gathering,
    places,
    read_advertisement,
    read_gathering,
    read_places,
    read_records,
)
from confide.common.crypto import (
    BLOCK_BYTES,
    KEM_CIPHERTEXT_BYTES,
    NONCE_BYTES,
    PUBLIC_BYTES,
    SIGNATURE_BYTES,
    AgreementKey,
    Entropy,
    Identity,
    KemKey,
    Keystream,
    Scratch,
    Verifier,
    derive,
    encapsulate,
    seal,
    unseal,
    verify,
)
from confide.common.errors import MessageError, Refused
from confide.common.messages import (
    Advertisement,
    Confirmation,
    Contribution,
    Floats,
    MaskedVector,
    Names,
    Opening,
    Peers,
    Shares,
    Signatures,
    Start,
    Survivors,
)
from confide.common.ring import RingSum, RingVector, RingWords, fresh
from confide.common.shamir import NO_SHARE, SECRET_BYTES, SHARE_BYTES, Combiner, recover, split

_COMMITMENT_BYTES = 32
_PLACE_BYTES = 2
_OVER = "nothing more"

Mask = tuple[bytes, bool]  # the key of its keystream, and whether it is added or taken off


class SiteSide:
    """A site's part in one attempt: its methods are called once each, in this order, and any error ends the attempt.

    The keys of the attempt live in this object only, and are let go with the last step or the first error.

    Args:
        attempt: The attempt.
        site: The site's name, in the cohort.
        identity: The key whose public half is on the roster.
        check: Verifies signatures; a simulation of many sites may give one that remembers those it verified.
        entropy: Where keys and shares come from.

    Guarantee: at most one kind of share of each peer ever leaves this object.
    """

    def __init__(
        self,
        attempt: Attempt,
        site: str,
        identity: Identity,
        check: Verifier = verify,
        entropy: Entropy = os.urandom,
    ) -> None:
        self._attempt = attempt
        self._place = attempt.offer.cohort.index(site)
        self._identity = identity
        self._check = check
        self._entropy = entropy
        self._due = "advertise"
        self._keys: _Keys | None = _Keys(attempt, entropy)
        self._gathering: Gathering
        self._advertised = self._confirmed = b""  # what this site sent and signed
        self._survivors: frozenset[int] = frozenset()
        self._listed = b""  # what this site and the other survivors sign

    def __repr__(self) -> str:
        return f"<SiteSide in round {self._attempt.offer.round}: {self._due} is due>"

    def advertise(self) -> Advertisement:
        """Return this attempt's public keys, signed."""
        with self._step("advertise", then="share") as keys:
            self._advertised = keys.public + self._identity.sign(self._attempt.advertised(self._place, keys.public))
            return Advertisement(context=self._attempt.pre.hex(), keys=self._advertised)

    def share(self, message: Peers) -> Shares:
        """Return a sealed box of shares for each neighbour, once every advertisement was verified.

        Raises:
            MessageError: An advertisement is malformed, forged or repeated, or this site's own is not among them, or
                checkpoints are not one for each.
            Refused: Too few sites advertised.
        """
        with self._step("share", then="admit") as keys:
            gathering = read_gathering(self._attempt, message, self._check, self._place, self._advertised)
            self._gathering = gathering
            self._suffice(len(gathering.public), "advertised", self._attempt.gathered)
            peers = gathering.neighbours[self._place]
            points = [_point(peer) for peer in (*peers, self._place)]
            threshold = self._attempt.connections.threshold
            of_seed = split(keys.seed, threshold, points, self._entropy)
            of_pair = split(keys.pair.secret(), threshold, points, self._entropy)
            keys.held[self._place] = (of_seed[-1], of_pair[-1])
            boxes = [
                self._sealed(keys, peer, one + other) for peer, one, other in zip(peers, of_seed, of_pair, strict=False)
            ]
            commitment = gathering.commitment(self._place, keys.seed)
            return Shares(context=gathering.ctx.hex(), sealed=commitment + b"".join(boxes))

    @property
    def peers(self) -> Names:
        """The sites that advertised, this one included, in the order of their places; known once it has shared."""
        return tuple(self._attempt.offer.cohort[place] for place in self._gathering.public)

    def admit(self, message: Start) -> None:
        """Return if training may begin: enough peers have sealed a box to this site in this very context.

        A box opens only if its sender saw the same cohort, keys and adapter. A peer whose box does not open stays in the
        masks, and this site will hold no share of it.

        Raises:
            MessageError: The message belongs to another attempt, is malformed, or brings another adapter.
            Refused: Too few boxes open.
        """
        with self._step("admit", then="mask") as keys:
            gathering = self._gathering
            self._same(message.context)
            if message.adapter_digest != gathering.adapter:
                raise MessageError("The adapter that arrived is not the one this attempt was bound to.")
            inbox = read_records(message.inbox, _PLACE_BYTES + self._attempt.box_bytes, self._attempt)
            if not inbox.keys() <= set(gathering.neighbours[self._place]):
                raise MessageError("A box arrived from a site that is no neighbour in this attempt.")
            for peer, box in inbox.items():
                try:
                    shares = self._unsealed(keys, peer, box)
                    keys.held[peer] = (shares[:SHARE_BYTES], shares[SHARE_BYTES:])
                except MessageError:
                    keys.held[peer] = (NO_SHARE, NO_SHARE)
            opened = sum(shares != (NO_SHARE, NO_SHARE) for shares in keys.held.values())
            if opened < max(self._attempt.connections.threshold, LEAST_SITES):
                raise Refused(
                    f"Only {opened} sites, this one included, hold shares of one context; "
                    f"{self._attempt.connections.threshold} are needed. Some were shown other keys or another adapter."
                )

    def mask(self, vector: RingVector) -> Contribution:
        """Return the vector under its masks."""
        with self._step("mask", then="confirm") as keys:
            if vector.layout != self._attempt.ring:
                raise MessageError("A vector of another ring than this attempt's was to be masked.")
            gathering, place = self._gathering, self._place
            masks = [(derive(keys.seed, gathering.own(place)), True)]
            masks += [
                (derive(keys.pair.agree(gathering.mask_key(peer)), gathering.pair(place, peer)), place < peer)
                for peer in keys.held
                if peer != place
            ]
            words = fresh(len(vector.words), vector.words.dtype)
            apply_masks(vector.words, masks, words)
            return Contribution(
                context=gathering.ctx.hex(), vector=MaskedVector(words=self._attempt.ring.packed(words))
            )

    def confirm(self, message: Survivors) -> Confirmation:
        """Return this site's signature on the survivors, the only one it gives in this attempt.

        Raises:
            MessageError: The message belongs to another attempt or is malformed, or names a site that shared no keys.
            Refused: This site is not among the survivors, or they are too few.
        """
        with self._step("confirm", then="open") as keys:
            gathering = self._gathering
            self._same(message.context)
            survivors = set(read_places(message.sites, self._attempt))
            strangers = survivors - gathering.public.keys()
            strangers |= survivors & set(gathering.neighbours[self._place]) - keys.held.keys()
            if strangers:
                raise MessageError("The survivors named hold a site that shared no keys in this attempt.")
            if self._place not in survivors:
                raise Refused("This site is not among the survivors named, so it does not help to open their sum.")
            self._suffice(len(survivors), "are left", self._attempt.floor)
            self._survivors, self._listed = frozenset(survivors), gathering.confirmed(message.sites)
            self._confirmed = self._identity.sign(self._listed)
            return Confirmation(context=gathering.ctx.hex(), signature=self._confirmed)

    def open(self, message: Signatures) -> Opening:
        """Return one share for each neighbour and this site, and let go of every key.

        Raises:
            MessageError: The message belongs to another attempt, or a signature is malformed, forged or no survivor's.
            Refused: Too few survivors signed the survivors that this site signed.
        """
        with self._step("open", then=_OVER) as keys:
            gathering = self._gathering
            self._same(message.context)
            signatures = read_records(message.signatures, _PLACE_BYTES + SIGNATURE_BYTES, self._attempt)
            self._suffice(len(signatures), "signed", self._attempt.floor)
            for place, signature in signatures.items():
                if place not in self._survivors:
                    raise MessageError("A site that is no survivor signed the survivors.")
                if (place, signature) != (self._place, self._confirmed):  # its own needs no check
                    self._check(self._attempt.keys[place], self._listed, signature)
            shares = (
                of_seed if peer in self._survivors else of_pair
                for peer, (of_seed, of_pair) in sorted(keys.held.items())
            )
            return Opening(context=gathering.ctx.hex(), shares=b"".join(shares))

    @contextlib.contextmanager
    def _step(self, name: str, *, then: str) -> Iterator["_Keys"]:
        """Give the keys for one step. If it fails they are gone, and with them the attempt."""
        keys = self._keys
        if self._due != name or keys is None:
            raise Refused(f"In this attempt {self._due} is due at this site, not {name}.")
        self._due, self._keys = _OVER, None
        yield keys
        self._due, self._keys = then, None if then == _OVER else keys

    def _suffice(self, count: int, did: str, least: int) -> None:
        if count < least:
            sites = self._attempt.connections.sites
            raise Refused(f"Only {count} of the {sites} sites on the roster {did}; {least} are needed.")

    def _same(self, context: str) -> None:
        if context != self._gathering.ctx.hex():
            raise MessageError("A message of another attempt arrived, or of one with other keys or another adapter.")

    def _sealed(self, keys: "_Keys", peer: int, shares: bytes) -> bytes:
        secret, ciphertext = keys.agreed(self._gathering, peer), b""
        if keys.kem:
            ciphertext, encapsulated = encapsulate(self._gathering.kem_key(peer))
            secret += encapsulated
        key = derive(secret, self._gathering.box(self._place, peer) + ciphertext)
        return ciphertext + seal(key, _nonce(self._place), shares, self._gathering.addressed(self._place, peer))

    def _unsealed(self, keys: "_Keys", peer: int, box: bytes) -> bytes:
        secret, ciphertext = keys.agreed(self._gathering, peer), b""
        if keys.kem:
            ciphertext, box = box[:KEM_CIPHERTEXT_BYTES], box[KEM_CIPHERTEXT_BYTES:]
            secret += keys.kem.decapsulate(ciphertext)
        key = derive(secret, self._gathering.box(self._place, peer) + ciphertext)
        return unseal(key, _nonce(peer), box, self._gathering.addressed(peer, self._place))


class ServerSide:
    """The server's part in one attempt: it hands messages on, adds masked vectors, and takes the last masks off.

    For each exchange it takes the sites' answers one by one, in any order, and then gives the next exchange's message.
    An answer that does not fit raises MessageError and leaves everything as it was, so that the site is simply missing.
    The checkpoints of ledgers that come with advertisements it hands on unread.

    Args:
        attempt: The attempt.
        adapter: The digest of the adapter that the round starts from.
        check: Verifies signatures.
    """

    def __init__(self, attempt: Attempt, adapter: str, check: Verifier = verify) -> None:
        self._attempt = attempt
        self._adapter = adapter
        self._check = check
        self._public: set[bytes] = set()
        self._advertised: dict[int, bytes] = {}
        self._checkpoints: dict[int, str] = {}
        self._gathering: Gathering
        self._commitments: dict[int, bytes] = {}
        self._inboxes: dict[int, dict[int, bytes]] = {}  # by receiver, then by sender
        self._total: RingWords | None = None
        self._contributed: set[int] = set()
        self._survivors: frozenset[int] = frozenset()
        self._listed = b""  # what the survivors sign
        self._signatures: dict[int, bytes] = {}
        self._opened: set[int] = set()
        self._shares: dict[int, dict[int, bytes]] = {}  # by owner of the secret, then by the point of the share
        self._suspects: set[int] = set()  # points whose shares were wrong
        self._combiners: dict[tuple[int, ...], Combiner] = {}

    def advertised(self, site: str, message: Advertisement) -> None:
        """Take a site's advertisement."""
        attempt = self._attempt
        place = self._of(site, self._advertised, message.context, attempt.pre)
        read_advertisement(attempt, place, message.keys, self._check)
        box, pair = message.keys[:PUBLIC_BYTES], message.keys[PUBLIC_BYTES : 2 * PUBLIC_BYTES]
        if len({box, pair} - self._public) < 2:
            raise MessageError(f"Site {site} advertised a key that was advertised already.")
        if attempt.hybrid:  # a key that nobody can use would stop all who share with this site
            encapsulate(message.keys[2 * PUBLIC_BYTES : attempt.public_bytes])
        self._public |= {box, pair}
        self._advertised[place] = message.keys
        self._checkpoints[place] = message.checkpoint

    def peers(self) -> Peers:
        """Return what every site that advertised is sent next."""
        self._gathering = Gathering.of(self._attempt, self._adapter, self._advertised, self._checkpoints)
        return self._gathering.message

    def shared(self, site: str, message: Shares) -> None:
        """Take a site's boxes."""
        place = self._of(site, self._commitments, message.context, self._gathering.ctx)
        peers, size = self._gathering.neighbours[place], self._attempt.box_bytes
        due = _COMMITMENT_BYTES + size * len(peers)
        if len(message.sealed) != due:
            raise MessageError(f"Site {site} sent {len(message.sealed)} bytes of boxes; {due} are due.")
        self._commitments[place] = message.sealed[:_COMMITMENT_BYTES]
        for number, peer in enumerate(peers):
            start = _COMMITMENT_BYTES + number * size
            self._inboxes.setdefault(peer, {})[place] = message.sealed[start : start + size]

    def start(self, site: str, adapter: Floats) -> Start:
        """Return what a site that shared is sent next."""
        place = self._attempt.offer.cohort.index(site)
        inbox = sorted(self._inboxes.get(place, {}).items())
        return Start(
            context=self._gathering.ctx.hex(),
            inbox=b"".join(places([sender]) + box for sender, box in inbox),
            adapter=adapter,
        )

    def contributed(self, site: str, message: Contribution) -> None:
        """Add a site's masked vector to the sum."""
        place = self._of(site, self._contributed, message.context, self._gathering.ctx)
        words = self._attempt.ring.unpacked(message.vector.words)
        if self._total is None:
            self._total = fresh(len(words), words.dtype)
            self._total[:] = words
        else:
            self._total += words
        self._contributed.add(place)

    def survivors(self) -> Survivors:
        """Return what every site in the sum is sent next."""
        self._survivors, sites = frozenset(self._contributed), places(sorted(self._contributed))
        self._listed = self._gathering.confirmed(sites)
        return Survivors(context=self._gathering.ctx.hex(), sites=sites)

    def confirmed(self, site: str, message: Confirmation) -> None:
        """Take a site's signature on the survivors."""
        place = self._of(site, self._signatures, message.context, self._gathering.ctx)
        if place not in self._survivors:
            raise MessageError(f"Site {site} signed survivors that it is not one of.")
        self._check(self._attempt.keys[place], self._listed, message.signature)
        self._signatures[place] = message.signature

    def signatures(self) -> Signatures:
        """Return what every site that confirmed is sent last: as many signatures as are needed."""
        signed = sorted(self._signatures.items())[: self._attempt.floor]
        return Signatures(
            context=self._gathering.ctx.hex(),
            signatures=b"".join(places([place]) + signature for place, signature in signed),
        )

    def opened(self, site: str, message: Opening) -> None:
        """Take a site's shares."""
        place = self._of(site, self._opened, message.context, self._gathering.ctx)
        owners = sorted({place, *self._inboxes.get(place, {})})
        if len(message.shares) != SHARE_BYTES * len(owners):
            due = SHARE_BYTES * len(owners)
            raise MessageError(f"Site {site} sent {len(message.shares)} bytes of shares; {due} are due.")
        self._opened.add(place)
        for number, owner in enumerate(owners):
            share = message.shares[number * SHARE_BYTES : (number + 1) * SHARE_BYTES]
            if share != NO_SHARE:
                self._shares.setdefault(owner, {})[_point(place)] = share

    @property
    def suspects(self) -> tuple[str, ...]:
        """The sites that sent a wrong share. It is no proof against any of them: the dealer may have dealt it wrong."""
        return tuple(self._attempt.offer.cohort[point - 1] for point in sorted(self._suspects))

    def total(self) -> RingSum:
        """Return the sum of the survivors' vectors; the masked sum is used up.

        Raises:
            MessageError: Too few shares of a secret arrived, or they are wrong: nothing can be opened.
        """
        total = self._total
        if total is None:
            raise MessageError("No site's vector arrived, so there is no sum to open.")
        gathering = self._gathering
        masks: list[Mask] = []
        for place in sorted(self._survivors):
            seed = self._secret(place, partial(self._is_seed, place))
            masks.append((derive(seed, gathering.own(place)), False))
        for place in sorted(self._commitments.keys() - self._survivors):
            if ends := [peer for peer in gathering.neighbours[place] if peer in self._survivors]:
                lost = AgreementKey(self._secret(place, partial(self._is_pair_key, place)))
                masks += [
                    (derive(lost.agree(gathering.mask_key(peer)), gathering.pair(peer, place)), peer > place)
                    for peer in ends
                ]
        self._total = None
        apply_masks(total, masks, total)
        return RingSum(words=total, layout=self._attempt.ring, count=len(self._survivors))

    def _secret(self, place: int, accept: Callable[[bytes], bool]) -> bytes:
        """Return a site's secret from the shares that arrived; who sent wrong ones is trusted last from then on."""
        shares, threshold = self._shares.get(place, {}), self._attempt.connections.threshold
        try:
            secret, wrong = recover(shares, threshold, accept, self._suspects, self._combiners)
        except MessageError as error:
            raise MessageError(f"A secret of site {self._attempt.offer.cohort[place]} is lost: {error}") from None
        self._suspects |= wrong
        return secret

    def _is_seed(self, place: int, found: bytes) -> bool:
        return self._gathering.commitment(place, found) == self._commitments[place]

    def _is_pair_key(self, place: int, found: bytes) -> bool:
        return AgreementKey(found).public == self._gathering.mask_key(place)

    def _of(self, site: str, taken: Container[int], context: str, due: bytes) -> int:
        """Return the place of a site whose answer is the first of its kind and belongs to this attempt."""
        place = self._attempt.offer.cohort.index(site)
        if place in taken:
            raise MessageError(f"Site {site} answered twice.")
        if context != due.hex():
            raise MessageError(f"Site {site} answered for another attempt, or was shown other keys or another adapter.")
        return place


def apply_masks(words: RingWords, masks: Sequence[Mask], out: RingWords) -> None:
    """Write `words` with the masks added, or taken off, to `out`.

    A mask is the keystream of its key, read as little-endian words. The words are gone through once, a block at a time,
    so that a block stays in the processor's cache while all masks are put on it.

    Args:
        words: (n,), uint32 or uint16, contiguous.
        masks: At least one; for each its key, 32 bytes used for this one vector only, and whether it is added.
        out: (n,), of the same type; may be `words`.
    """
    scratch = Scratch()
    streams = [(Keystream(key), np.add if added else np.subtract) for key, added in masks]
    step = BLOCK_BYTES // words.itemsize
    kind = words.dtype.newbyteorder("<")
    for number, start in enumerate(range(0, len(words), step)):
        part, masked = words[start : start + step], out[start : start + step]
        for stream, put in streams:
            put(part, stream.block(number, scratch).view(kind)[: len(part)], out=masked)
            part = masked


class _Keys:
    """A site's secrets of one attempt, and the shares of its peers' that it holds."""

    def __init__(self, attempt: Attempt, entropy: Entropy) -> None:
        self.box = AgreementKey.generate(entropy)
        self.pair = AgreementKey.generate(entropy)
        self.kem = KemKey.generate(entropy) if attempt.hybrid else None
        self.seed = entropy(SECRET_BYTES)
        self._agreed: dict[int, bytes] = {}
        self.held: dict[int, tuple[bytes, bytes]] = {}  # by place: shares of its self mask's seed and of its pair key

    @property
    def public(self) -> bytes:
        return self.box.public + self.pair.public + (self.kem.public if self.kem else b"")

    def agreed(self, gathering: Gathering, peer: int) -> bytes:
        """Return what the keys of boxes from and to a peer come from; agreed once for both directions."""
        if peer not in self._agreed:
            self._agreed[peer] = self.box.agree(gathering.box_key(peer))
        return self._agreed[peer]

    def __repr__(self) -> str:
        return "<keys of one attempt>"


def _point(place: int) -> int:
    """Return where a place's shares are evaluated; the secret itself is at 0."""
    return place + 1


def _nonce(sender: int) -> bytes:
    """Return the nonce of a box: a key seals one box in each direction."""
    return sender.to_bytes(NONCE_BYTES, "big")
