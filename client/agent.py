"""The site's worker: it holds the data, the model and the record of spends, and decides what leaves.

Whoever carries messages, Flower's client or a simulation's channel, hands it an envelope and takes one back. Nothing
else comes out. It answers one message at a time, and takes part in one attempt at one round at a time.
"""

import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Final, Protocol

import numpy as np

from confide.client.kept import Kept
from confide.client.mechanism import GivenUp, Mechanism, Randomness, Trainer
from confide.client.noise import CryptographicNoise
from confide.client.spends import Spends
from confide.common.bounds import reach
from confide.common.crypto import Keystream
from confide.common.errors import (
    AdapterError,
    ConfideError,
    DataError,
    MessageError,
    PrivacyError,
    Refused,
    UsageError,
)
from confide.common.messages import (
    Advertisement,
    Confirmation,
    Contribution,
    Envelope,
    Failure,
    Message,
    Names,
    Offer,
    Opening,
    Peers,
    Shares,
    Signatures,
    Start,
    Survivors,
    open_envelope,
    seal,
    vector_digest,
)
from confide.common.plan import Plan
from confide.common.ring import RingLayout, RingVector, encode
from confide.common.roster import Roster
from confide.common.witness import Witness

# The server makes two attempts at a round, and up to two more each time it was started anew in the middle of one. Each costs a
# site keys, a line in its trail and a record in its ledger, so that their number is no stranger's to choose.
LAST_ATTEMPT: Final = 64
_log = logging.getLogger(__name__)
_ROUNDING = 1e-6  # of float32, relative


class Attending(Protocol):
    """A site's part in one attempt, one method for each exchange; `common.secagg.SiteSide` is the real one."""

    def advertise(self) -> Advertisement:
        """Answer the offer."""
        ...

    def share(self, message: Peers) -> Shares:
        """Share what is needed if this site drops out."""
        ...

    @property
    def peers(self) -> Names:
        """Who advertised, this site included, in the order of the checkpoints it was told; known once it has shared."""
        ...

    def admit(self, message: Start) -> None:
        """Return if training may begin."""
        ...

    def mask(self, vector: RingVector) -> Contribution:
        """Return the only thing about `vector` that leaves the site."""
        ...

    def confirm(self, message: Survivors) -> Confirmation:
        """Agree to whose vectors are in the sum."""
        ...

    def open(self, message: Signatures) -> Opening:
        """Help to open the sum."""
        ...


class Protection(Protocol):
    """What hides a site's vectors on their way into sums."""

    @property
    def retries(self) -> bool:
        """Whether another attempt at the same round may follow, for which its vector must be kept."""
        ...

    @property
    def roster(self) -> Roster | None:
        """The pinned roster of those with whom it sums, or None if anybody may take part."""
        ...

    def attend(self, offer: Offer) -> Attending:
        """Return the site's part in the attempt that `offer` begins.

        Raises:
            Refused: The site takes no part in it.
        """
        ...


def fresh_noise(_: int) -> Randomness:
    """Return draws that nobody can predict or repeat, whatever the round."""
    return CryptographicNoise()


class Agent:
    """One site in one run.

    Args:
        site: The site's name.
        run: The run's name; offers of another are refused.
        plan: The plan the site agreed to; offers under another are refused.
        trainer: Holds the model and the site's rows, and trains on them.
        declared_persons: N, the rounded public number of persons that sets the divisor q·N.
        ring: How updates are written as integers.
        protection: What hides the site's vectors.
        spends: The run's part of the site's ledger: what training cost, and the rounds whose sum was opened.
        kept: Where a round's vector is kept until the round is over; in memory only if absent.
        randomness: Gives each round's source of draws; fresh ones from the operating system's entropy if absent.
        witness: Remembers how far each site's ledger had come, this site's as well. The site shares no keys in an attempt
            in which one has gone back, or is not shown. With None nobody looks.
        consent: Called with every message before anything is done about it, and with the offer of the attempt it is of, if there
            is one; what it raises is the answer.

    Raises:
        UsageError: There is a witness, and no roster whose keys would tell whose ledger it sees.
        DataError: The site has fewer persons than the plan asks for.
        PrivacyError: The plan's delta is not below one over the site's number of persons.
    """

    def __init__(
        self,
        *,
        site: str,
        run: str,
        plan: Plan,
        trainer: Trainer,
        declared_persons: int,
        ring: RingLayout,
        protection: Protection,
        spends: Spends,
        kept: Kept | None = None,
        randomness: Callable[[int], Randomness] = fresh_noise,
        witness: Witness | None = None,
        consent: Callable[[Message, Offer | None], None] = lambda message, offer: None,
    ) -> None:
        if witness is not None and protection.roster is None:
            raise UsageError(
                f"Site {site} was given a witness, and sums without a roster, so it knows nobody's key. Leave the witness "
                "out, or sum with a federation."
            )
        if min(trainer.person_count, declared_persons) < plan.privacy.min_persons:
            raise DataError(
                f"Site {site} has {min(trainer.person_count, declared_persons)} persons; the plan asks for at least "
                f"{plan.privacy.min_persons}. Lower [privacy] min_persons, or give the site more data."
            )
        largest = max(trainer.person_count, declared_persons)
        if plan.privacy.delta * largest >= 1:
            raise PrivacyError(
                f"Site {site} has {largest} persons; the plan's delta = {plan.privacy.delta:g} is not below 1 / {largest}, "
                "so it would promise that site nothing. Lower [privacy] delta."
            )
        self.site = site
        self.spends = spends
        self._run = run
        self._plan = plan
        self._plan_digest = plan.digest
        self._trainer = trainer
        self._mechanism = Mechanism.of(plan.privacy, declared_persons)
        self._ring = ring
        self._randomness = randomness
        self._protection = protection
        self._kept = kept or Kept()
        self._shown = ""  # the checkpoint that this site showed in the attempt
        self._witness = witness
        self._consent = consent
        self._attempt = spends.last_attempt  # round and attempt; a site that was started anew goes through none again
        self._roster = ""
        self._offer: Offer | None = None  # of the attempt, once it was found to be the coordinator's
        self._attending: Attending | None = None
        self._lock = threading.Lock()

    def answer(self, envelope: Envelope) -> Envelope:
        """Return the answer to `envelope`; what goes wrong leaves as a class and a fixed sentence."""
        with self._lock:
            try:
                return seal(self._dispatch(open_envelope(envelope)))
            except Exception as error:  # a site never dies of a message; what happened is told here, not outside
                _log.log(
                    logging.WARNING if isinstance(error, ConfideError) else logging.ERROR,
                    "site %s did not take part: %s",
                    self.site,
                    error,
                    exc_info=not isinstance(error, ConfideError),
                )
                return seal(Failure.of(error))

    def _dispatch(self, message: Message) -> Message:
        self._consent(message, message if isinstance(message, Offer) else self._offer)
        match message:
            case Offer():
                return self._attend(message)
            case Peers():
                return self._share(message)
            case Start():
                return self._contribute(message)
            case Survivors():
                return self._present().confirm(message)
            case Signatures():
                return self._open(message)
            case _:
                raise Refused(f"Site {self.site} is sent no {message.kind}; it sends them.")

    def _attend(self, offer: Offer) -> Advertisement:
        """Begin an attempt; whatever attempt came before is over."""
        self._check(offer)
        self.spends.admit(offer.round, kept=self._kept.holds(offer.round), roster=offer.roster)
        attending = self._protection.attend(offer)
        shown = self.spends.checkpoint
        self._see({self.site: shown})  # a site that was set back to an old copy finds it out before the others do
        self._attending, self._shown, self._offer = attending, shown, offer
        self._attempt, self._roster = (offer.round, offer.attempt), offer.roster
        self._kept.forget_all_but(offer.round)
        return dataclasses.replace(attending.advertise(), checkpoint=shown)

    def _share(self, message: Peers) -> Shares:
        """Share keys with those whose ledgers are not behind what was seen of them; nothing leaves if one is."""
        attending = self._present()
        shares = attending.share(message)
        self._attending = None  # a ledger that is refused ends the attempt, and its keys with it
        told = dict(zip(attending.peers, message.checkpoints, strict=True))
        if told[self.site] != self._shown:
            raise MessageError("The checkpoints of this attempt do not hold the one that this site showed.")
        self._see(told)
        self._attending = attending
        return shares

    def _see(self, told: Mapping[str, str]) -> None:
        """Return once the witness, if there is one, has accepted and remembered these checkpoints, by site."""
        roster = self._protection.roster
        if self._witness is not None and roster is not None:
            self._witness.see_all(roster.federation, {site: (roster.sites[site], told[site]) for site in told})

    def _contribute(self, start: Start) -> Contribution:
        """Train once per round; a further attempt at that round masks the same vector again."""
        attending, (number, attempt) = self._present(), self._attempt
        self._attending = None  # whatever fails from here on ends the attempt, and its keys with it
        if len(start.adapter) != self._ring.length:
            raise AdapterError(f"An adapter of {len(start.adapter)} numbers arrived; {self._ring.length} are due.")
        attending.admit(start)
        vector = self._kept.get(number, self._ring, self.spends.commitment(number))
        if vector is None:
            vector = self._train(number, start)
        elif self.spends.start(number) != start.adapter_digest:
            raise Refused(f"Round {number} was trained from another adapter; it is trained once, from one adapter.")
        contribution = attending.mask(vector)
        if self._protection.retries:
            self.spends.mask(number, attempt, vector_digest(contribution.vector.words))
        shown = self.spends.checkpoint  # with this round's spend in it; what was shown before could be put back
        self._see({self.site: shown})
        self._attending = attending
        return dataclasses.replace(contribution, checkpoint=shown)

    def _check_start(self, start: Start, number: int) -> None:
        """Return if the plan's rounds can lead to this adapter.

        One with enormous numbers would blow up what a row's gradient owes to rounding, and with it what the rows beside it
        do to that.
        """
        limit = reach(self._plan.federation, self._ring, number - 1)
        away = float(np.linalg.norm(start.adapter.astype(np.float64) - self._trainer.start))
        if not away <= limit + _ROUNDING * float(np.linalg.norm(self._trainer.start)):
            raise AdapterError(
                f"The adapter of round {number} is {away:.3g} away from the plan's start; {number - 1} rounds lead at most "
                f"{limit:.3g} away. The server has not kept to the plan."
            )

    def _train(self, number: int, start: Start) -> RingVector:
        self._check_start(start, number)
        randomness = self._randomness(number)
        self.spends.reserve(self._mechanism.spend(number, randomness.name), start.adapter_digest, self._roster)
        untouched = 0
        try:
            delta = self._trainer.train(number, start.adapter, self._mechanism, randomness)
            vector = encode(delta.values, self._ring, Keystream(randomness.rounding_key()))
            commitment = self._kept.put(number, vector)
        except Exception as error:
            if isinstance(error, GivenUp):
                untouched = self._mechanism.steps - error.steps_begun
            self.spends.give_up(number, untouched, f"It ended with {type(error).__name__}.")
            raise
        if self._protection.retries:
            self.spends.bind(number, commitment)
        return vector

    def _open(self, message: Signatures) -> Opening:
        """Help to open the sum. That this was done is on disk before the help leaves, and there is no second time."""
        opening = self._present().open(message)
        number = self._attempt[0]
        self.spends.commit(number, self._trainer.evidence_of(number))
        self._attempt, self._attending = (number + 1, 0), None
        self._kept.forget_all_but(number + 1)
        self._see({self.site: self.spends.checkpoint})  # a ledger put back to before this could open a second sum
        return opening

    def _present(self) -> Attending:
        if self._attending is None:
            raise Refused(f"Site {self.site} takes part in no attempt now; an offer must come first.")
        return self._attending

    def _check(self, offer: Offer) -> None:
        plan = self._plan
        faults = {
            "the run is another one": offer.run != self._run,
            "the plan is another one": offer.plan != self._plan_digest,
            "the adapter's layout is another one": offer.layout != self._trainer.layout_digest,
            "the ring is another one": offer.ring != self._ring.digest,
            "the round is outside the plan": not 1 <= offer.round <= plan.privacy.rounds,
            f"its attempts end with number {LAST_ATTEMPT}": offer.attempt > LAST_ATTEMPT,
            "the attempt was made before": (offer.round, offer.attempt) <= self._attempt,
            "the cohort is smaller than the plan allows": len(offer.cohort) < plan.federation.min_sites,
            "the cohort is larger than the ring has room for": len(offer.cohort) > plan.federation.max_sites,
        }
        for fault, found in faults.items():
            if found:
                raise Refused(f"Site {self.site} refuses round {offer.round}: {fault}.")
