"""The site's worker: it holds the data, the model and the record of spends, and decides what leaves.

Whoever carries messages, Flower's client or a simulation's channel, hands it an envelope and takes one back. Nothing
else comes out. It answers one message at a time.
"""

import logging
import threading
from collections.abc import Callable
from typing import Protocol

from confide.client.mechanism import Mechanism, Randomness, Trainer
from confide.client.spends import SpendLog
from confide.common.errors import ConfideError, DataError, PrivacyError, Refused
from confide.common.messages import Contribution, Envelope, Failure, Message, Offer, open_envelope, seal
from confide.common.plan import Plan
from confide.common.ring import RingLayout, RingVector, encode

_log = logging.getLogger(__name__)


class Protection(Protocol):
    """What hides a site's vector on its way into the sum."""

    name: str
    retries: bool  # whether another attempt at the same round may follow, for which the vector must be kept

    def protect(self, vector: RingVector, offer: Offer) -> Contribution:
        """Return the only thing about `vector` that leaves the site."""
        ...


class Agent:
    """One site in one run.

    Args:
        site: The site's name.
        run: The run's name; offers of another are refused.
        plan: The plan the site agreed to; offers under another are refused.
        trainer: Holds the model and the site's rows, and trains on them.
        declared_persons: N, the rounded public number of persons that sets the divisor q·N.
        ring: How updates are written as integers.
        randomness: Gives each round's source of draws.
        protection: What hides the site's vector.
        spends: The record of what training cost.

    Raises:
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
        randomness: Callable[[int], Randomness],
        protection: Protection,
        spends: SpendLog,
    ) -> None:
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
        self._kept: dict[int, RingVector] = {}
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
        if isinstance(message, Offer):
            return self._contribute(message)
        raise Refused(f"Site {self.site} takes offers only; it was sent a {message.kind}.")

    def _contribute(self, offer: Offer) -> Contribution:
        """Train once per (run, round); a further attempt of that round protects the same vector again."""
        self._check(offer)
        vector = self._kept.get(offer.round) or self._train(offer)
        self._kept = {offer.round: vector} if self._protection.retries else {}  # earlier rounds' are forgotten
        return self._protection.protect(vector, offer)

    def _train(self, offer: Offer) -> RingVector:
        randomness = self._randomness(offer.round)
        self.spends.reserve(self._mechanism.spend(offer.round, randomness.name), offer.adapter_digest)
        delta = self._trainer.train(offer.adapter, self._mechanism, randomness)
        return encode(delta.values, self._ring, randomness.uniforms)

    def _check(self, offer: Offer) -> None:
        plan = self._plan
        faults = {
            "the run is another one": offer.run != self._run,
            "the plan is another one": offer.plan != self._plan_digest,
            "the adapter's layout is another one": offer.layout != self._trainer.layout_digest,
            "the round is outside the plan": not 1 <= offer.round <= plan.privacy.rounds,
            "the cohort is smaller than the plan allows": offer.sites < plan.federation.min_sites,
            "the cohort is larger than the ring has room for": offer.sites > plan.federation.max_sites,
        }
        for fault, found in faults.items():
            if found:
                raise Refused(f"Site {self.site} refuses round {offer.round}: {fault}.")
