"""What a site's agent trains with: a model that passed the self-test, the site's rows, and what stays at the site."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from confide.client.conformance import Certificate
from confide.client.gradients import PersonGradients
from confide.client.mechanism import Delta, Mechanism, Randomness
from confide.client.personal import Personal
from confide.client.trainer import Evidence, train
from confide.common.adapter import Floats
from confide.common.canonical import canonical_bytes
from confide.common.errors import ModelError
from confide.common.examples import Examples
from confide.common.prefix import PrefixCache


class PrivateTrainer:
    """Trains one site's rows by DP-SGD, as `train` does.

    Args:
        certificate: That the model passed the self-test; several sites of a simulation may share one.
        examples: The site's rows, at least one.
        cache: Where the frozen prefix of the rows lies, if it was computed.
        personal: Where what stays at the site is kept between rounds, if the plan's method has such; in memory if absent.
        before_step: Called with each step's number, from 1, before the step draws persons or looks at a row.

    Attributes:
        evidence: What the site saw of its own training in each round; exact, so it stays in the site.

    Raises:
        ModelError: There is a cache, and the model was not tested with one.
    """

    def __init__(
        self,
        certificate: Certificate,
        examples: Examples,
        cache: PrefixCache | None = None,
        personal: Path | None = None,
        before_step: Callable[[int], None] | None = None,
    ) -> None:
        model = certificate.model
        if cache is not None and not certificate.cached:
            raise ModelError(
                "The model passed its self-test without a cached prefix, so it is not trained with one. "
                "Give certify(…, cached=True), or no cache."
            )
        self._gradients = PersonGradients(model, examples, cache)
        self._personal = Personal(model.personal, model.personal_start, personal)
        self._before_step = before_step
        self.evidence: dict[int, Evidence] = {}
        self.person_count = examples.person_count
        self.layout_digest = model.layout.digest
        self.start = model.start

    def train(self, number: int, start: Floats, mechanism: Mechanism, randomness: Randomness) -> Delta:
        """Return what round `number` of private training made of `start`."""
        model = self._gradients.model
        model.write(self._personal.before(number), model.personal)
        delta, self.evidence[number] = train(
            self._gradients, start, mechanism, model.plan.training, randomness, number, self._before_step
        )
        self._personal.keep(number, model.read(model.personal))
        return delta

    def evidence_of(self, number: int) -> bytes:
        """Return what was measured of round `number`'s training, as canonical JSON; nothing if nothing is known of it."""
        evidence = self.evidence.get(number)
        return b"" if evidence is None else canonical_bytes(dataclasses.asdict(evidence))
