"""Facts about private training: true of the code as it is, false of each broken variant.

A fact is a function that returns if it holds and raises AssertionError if not. Ordinary tests state them of the code;
`test_broken_variants` states that they would have seen it broken.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from confide.client.agent import Agent
from confide.client.conformance import Certificate
from confide.client.gradients import GRID_BITS, ClippedSum, PersonGradients
from confide.client.mechanism import Mechanism
from confide.client.private_trainer import PrivateTrainer
from confide.client.trainer import train
from confide.common.bounds import ring_layout
from confide.common.examples import Examples, Ints
from confide.common.messages import Advertisement, Contribution, Offer, Start, open_envelope, seal
from confide.common.model import AdaptedModel
from confide.common.ring import RingLayout
from confide.common.spend import Spend
from confide.simulations.insecure import InsecurePlainSum, InsecureSeededNoise
from tests.ledgers import spends_of

FALSE_ALARM = 1e-6  # of each statistical fact, if what it is about is sound


def mechanism(**changes: float) -> Mechanism:
    plain = Mechanism(sampling_rate=0.5, clip_norm=1.0, noise_multiplier=1.0, steps=1, divisor=10.0)
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def noise_has_the_claimed_deviation(gradients: PersonGradients, *, rounds: int = 400, steps: int = 1) -> None:
    """What rounds without anybody in them move, by SGD, is Gaussian of the deviation σ C √steps / divisor.

    False alarm 1e-6 each: a two-sided chi-square test on the sum of squares, and a Kolmogorov-Smirnov test.
    """
    model = gradients.model
    sgd = dataclasses.replace(model.plan.training, optimizer="sgd", learning_rate=1.0, head_learning_rate=1.0)
    nobody = mechanism(sampling_rate=2.0**-64, clip_norm=0.25, noise_multiplier=1.5, divisor=2.0, steps=steps)
    start = np.zeros_like(model.start)
    draws = [
        train(gradients, start, nobody, sgd, InsecureSeededNoise(7, "s", number))[0].values
        for number in range(1, rounds + 1)
    ]
    scaled = np.concatenate(draws).astype(np.float64) / (1.5 * 0.25 / 2.0 * math.sqrt(steps))
    squares = float(np.square(scaled).sum())
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], len(scaled))
    assert low <= squares <= high, f"the noise's variance is {squares / len(scaled):.3f} of what is claimed"
    assert stats.kstest(scaled, "norm").pvalue > FALSE_ALARM, "the noise is not Gaussian"


def each_part_is_within_the_clip_norm(gradients: PersonGradients, clip_norm: float) -> None:
    """Nobody's part of the sum is longer than the clip norm, in exact integers, and the others are what they were."""
    for person in range(gradients.person_count):
        alone = np.array([person])
        steps = gradients.clipped_sum(alone, clip_norm).steps
        squared = sum(int(step) ** 2 for step in steps)
        assert squared <= 4**GRID_BITS, f"a part is {math.sqrt(squared) / 2**GRID_BITS:.3f} clip norms long"
        own = gradients.insecure_sum(alone)
        expected = own * min(1.0, clip_norm / float(np.linalg.norm(own)))
        error = np.linalg.norm(steps * (clip_norm / 2**GRID_BITS) - expected)
        assert error <= 1e-5 * clip_norm, "a part is not the person's gradient, shortened"


def removing_one_person_changes_the_sum_by_at_most_the_clip_norm(gradients: PersonGradients, clip_norm: float) -> None:
    """But for float32, in which a row beside others differs in the last bits from the same row alone."""
    people = np.arange(gradients.person_count)
    everyone = gradients.clipped_sum(people, clip_norm).values
    rests = (gradients.clipped_sum(np.delete(people, person), clip_norm).values for person in people)
    changes = [float(np.linalg.norm(everyone - rest)) for rest in rests]
    assert max(changes) <= clip_norm * (1 + 1e-5), (
        f"somebody changed the sum by {max(changes) / clip_norm:.3f} clip norms"
    )
    assert max(changes) > 0, "nobody changed the sum"


def no_person_changes_anothers_gradient(gradients: PersonGradients) -> None:
    """What is left of a sum without one person is the sum of what the others have alone."""
    people = np.arange(gradients.person_count)
    alone = np.stack([gradients.insecure_sum(people[[person]]) for person in people])
    exact = 1e-9 if gradients.model.dtype.itemsize == 8 else 1e-5
    for person in people:
        rest = gradients.insecure_sum(np.delete(people, person))
        expected = np.delete(alone, person, axis=0).sum(axis=0)
        error = np.linalg.norm(rest - expected) / np.linalg.norm(expected)
        assert error <= exact, f"beside others, gradients differ by {error:.1e} of their length"


def persons_are_drawn_one_by_one(sizes: Sequence[int], people: int, sampling_rate: float) -> None:
    """How many are drawn in all is binomial, and how much batches differ in size is too: they are no shuffled slices.

    False alarm 1e-6 each: an exact binomial test, and a two-sided chi-square test on the sizes' dispersion.
    """
    drawn, places = int(np.sum(sizes)), people * len(sizes)
    chance = stats.binomtest(drawn, places, sampling_rate).pvalue
    assert chance > FALSE_ALARM, f"{drawn / places:.3f} of all were drawn, not {sampling_rate:g}"
    squares = np.square(np.array(sizes) - sampling_rate * people).sum()
    dispersion = float(squares / (people * sampling_rate * (1 - sampling_rate)))
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], len(sizes))
    assert low <= dispersion <= high, f"the sizes' variance is {dispersion / len(sizes):.3f} of the binomial's"


def all_are_drawn_equally_often(counts: npt.NDArray[np.float64], steps: int, sampling_rate: float) -> None:
    """False alarm 1e-6: a two-sided chi-square test on how often each person was drawn."""
    variance = steps * sampling_rate * (1 - sampling_rate)
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], len(counts))
    spread = float(np.square(counts - steps * sampling_rate).sum() / variance)
    assert low <= spread <= high, f"how often persons are drawn varies {spread / len(counts):.3f} times as it should"


def every_step_is_logged(spends: Sequence[Spend], executed: int) -> None:
    """The record of spends has as many steps as looked at rows, each round once."""
    assert len({spend.round for spend in spends}) == len(spends), "a round is logged twice"
    logged = sum(spend.steps for spend in spends)
    assert logged == executed, f"{executed} steps were taken and {logged} logged"


def logged_and_executed(
    certificate: Certificate, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> tuple[tuple[Spend, ...], int]:
    """Return what an agent logged of the plan's rounds, and how many steps looked at the rows meanwhile."""
    model, looked = certificate.model, list[int]()
    ring = ring_layout(model.plan, model.layout, model.head)
    agent = Agent(
        site="north",
        run="tiny",
        plan=model.plan,
        trainer=PrivateTrainer(certificate, examples),
        declared_persons=examples.person_count,
        ring=ring,
        randomness=lambda number: InsecureSeededNoise(5, "north", number),
        protection=InsecurePlainSum(),
        spends=spends_of(model.plan, "tiny", persons=examples.person_count),
    )
    clipped_sum = PersonGradients.clipped_sum

    def noted(self: PersonGradients, persons: Ints, clip_norm: float, active: tuple[str, ...] | None) -> ClippedSum:
        looked.append(len(persons))
        return clipped_sum(self, persons, clip_norm, active)

    with monkeypatch.context() as patched:
        patched.setattr(PersonGradients, "clipped_sum", noted)
        for number in range(1, model.plan.privacy.rounds + 1):
            taken = open_envelope(agent.answer(seal(_offer(model, ring, number))))
            assert isinstance(taken, Advertisement)
            done = open_envelope(agent.answer(seal(Start(context=taken.context, inbox=b"", adapter=model.start))))
            assert isinstance(done, Contribution), f"round {number} was not trained: {done}"
    return agent.spends.spends, len(looked)


def _offer(model: AdaptedModel, ring: RingLayout, number: int) -> Offer:
    return Offer(
        run="tiny",
        plan=model.plan.digest,
        round=number,
        attempt=1,
        cohort=("east", "north", "south"),
        roster="insecure_plain_sum",
        layout=model.layout.digest,
        ring=ring.digest,
        signature=b"",
    )
