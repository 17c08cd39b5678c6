"""Private training broken on purpose, one way after the other: the facts that hold of the real code fail of each."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional as F

from confide.client import gradients as gradients_module
from confide.client import trainer as trainer_module
from confide.client.conformance import Certificate, certify
from confide.client.gradients import GRID_BITS, PersonGradients
from confide.client.mechanism import Delta, Mechanism, Randomness
from confide.client.noise import drawn, rounded_gaussian
from confide.client.private_trainer import PrivateTrainer
from confide.client.spends import Spends
from confide.client.trainer import train
from confide.common.adapter import Floats
from confide.common.examples import IGNORED, Batch, Ints
from confide.common.model import AdaptedModel, attach
from confide.common.plan import CAUSAL, Plan
from confide.common.spend import Spend
from confide.simulations.insecure import InsecureSeededNoise
from tests import families
from tests.client import facts
from tests.client.facts import mechanism
from tests.conftest import MakeExamples


@pytest.fixture
def model(base_directory: Path, plan: Plan) -> AdaptedModel:
    return attach(base_directory, plan)


@pytest.fixture
def gradients(model: AdaptedModel, make_examples: MakeExamples) -> PersonGradients:
    """Those of ten persons with several short rows."""
    return PersonGradients(model, make_examples(20, seed=1, persons=10, longest=5), micro_batch=4)


def noise_off(randomness: Randomness, deviation: float, count: int) -> npt.NDArray[np.int64]:
    return np.zeros(count, np.int64)


def noise_a_tenth_too_low(randomness: Randomness, deviation: float, count: int) -> npt.NDArray[np.int64]:
    return rounded_gaussian(randomness, 0.9 * deviation, count)


def uniform_noise(randomness: Randomness, deviation: float, count: int) -> npt.NDArray[np.int64]:
    """Of the right variance, yet not Gaussian."""
    uniform = randomness.words(count).astype(np.float64) * 2.0**-64 - 0.5
    rounded: npt.NDArray[np.int64] = np.rint(uniform * np.sqrt(12) * deviation).astype(np.int64)
    return rounded


@pytest.mark.parametrize(
    ("broken", "seen"),
    [
        (noise_off, r"variance is 0\.000"),
        (noise_a_tenth_too_low, r"variance is 0\.8"),
        (uniform_noise, "not Gaussian"),
    ],
)
def test_noise_that_is_off_or_too_low_or_of_another_law_is_seen(
    gradients: PersonGradients, monkeypatch: pytest.MonkeyPatch, broken: Any, seen: str
) -> None:
    """False alarm 1e-6; the noise of 200 rounds."""
    facts.noise_has_the_claimed_deviation(gradients, rounds=200)

    monkeypatch.setattr(trainer_module, "rounded_gaussian", broken)

    with pytest.raises(AssertionError, match=seen):
        facts.noise_has_the_claimed_deviation(gradients, rounds=200)


def not_clipped(values: torch.Tensor, norms: torch.Tensor, clip_norm: float) -> torch.Tensor:
    whole: torch.Tensor = (values.double() * (2**GRID_BITS / clip_norm)).trunc()
    return whole.sum(dim=0).to(torch.int64)


def clipped_by_number(values: torch.Tensor, norms: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """Each number is kept within the clip norm, not their length."""
    return not_clipped(values.clamp(-clip_norm, clip_norm), norms, clip_norm)


def clipped_a_millionth_too_long(values: torch.Tensor, norms: torch.Tensor, clip_norm: float) -> torch.Tensor:
    factors = torch.clamp(clip_norm * (1 + 1e-6) / norms, max=1.0)
    return not_clipped(values.double() * factors[:, None], norms, clip_norm)


@pytest.mark.parametrize("broken", [not_clipped, clipped_by_number, clipped_a_millionth_too_long])
def test_gradients_that_are_not_clipped_are_seen(
    gradients: PersonGradients, monkeypatch: pytest.MonkeyPatch, broken: Any
) -> None:
    facts.each_part_is_within_the_clip_norm(gradients, 0.1)

    monkeypatch.setattr(gradients_module, "_grid_sum", broken)

    with pytest.raises(AssertionError, match="clip norms long"):
        facts.each_part_is_within_the_clip_norm(gradients, 0.1)


def test_a_row_clipped_in_a_persons_place_is_seen(
    gradients: PersonGradients, model: AdaptedModel, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts.each_part_is_within_the_clip_norm(gradients, 0.1)
    examples = make_examples(20, seed=1, persons=10, longest=5)
    by_row = PersonGradients(model, dataclasses.replace(examples, persons=np.arange(20)))
    by_person, clipped_sum = PersonGradients(model, examples), by_row.clipped_sum

    def of_rows(persons: Ints, *settings: Any) -> Any:
        return clipped_sum(np.flatnonzero(np.isin(examples.persons, persons)), *settings)

    monkeypatch.setattr(by_person, "clipped_sum", of_rows)

    with pytest.raises(AssertionError, match="clip norms long"):
        facts.each_part_is_within_the_clip_norm(by_person, 0.1)


def sizes_of(gradients: PersonGradients, sampling_rate: float, steps: int = 400) -> tuple[int, ...]:
    """Return how many were drawn in each of some steps; who was is not looked at, to be quick."""
    model, seeded = gradients.model, InsecureSeededNoise(3, "s", 1)
    drawing = mechanism(sampling_rate=sampling_rate, steps=steps)
    nothing = gradients.clipped_sum(np.empty(0, np.int64), 1.0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gradients, "clipped_sum", lambda *_: nothing)
        return train(gradients, model.start, drawing, model.plan.training, seeded)[1].batch_sizes


def test_shuffled_batches_are_seen(gradients: PersonGradients, monkeypatch: pytest.MonkeyPatch) -> None:
    """False alarm 1e-6; 400 steps of which each takes the next fifth of the shuffled persons."""
    facts.persons_are_drawn_one_by_one(sizes_of(gradients, 0.2), 10, 0.2)
    left = list[int]()

    def next_slice(randomness: Randomness, sampling_rate: float, count: int) -> Ints:
        if not left:
            left.extend(np.argsort(randomness.words(count)).tolist())
        taken = [left.pop() for _ in range(round(sampling_rate * count))]
        return np.sort(np.array(taken, np.int64))

    monkeypatch.setattr(trainer_module, "drawn", next_slice)

    with pytest.raises(AssertionError, match=r"variance is 0\.000 of the binomial's"):
        facts.persons_are_drawn_one_by_one(sizes_of(gradients, 0.2), 10, 0.2)


def test_a_sampling_rate_four_times_too_big_is_seen(
    gradients: PersonGradients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """False alarm 1e-6; 400 steps."""
    facts.persons_are_drawn_one_by_one(sizes_of(gradients, 0.1), 10, 0.1)

    def eager(randomness: Randomness, sampling_rate: float, count: int) -> Ints:
        return drawn(randomness, 4 * sampling_rate, count)

    monkeypatch.setattr(trainer_module, "drawn", eager)

    with pytest.raises(AssertionError, match=r"0\.(3[89]|4[01])\d of all were drawn, not 0\.1"):
        facts.persons_are_drawn_one_by_one(sizes_of(gradients, 0.1), 10, 0.1)


def test_a_draw_that_prefers_some_persons_is_seen() -> None:
    """False alarm 1e-6; 300 draws of 20 persons, half of them with 0.4 and half with 0.6."""
    random = np.random.default_rng(0)
    fair = (random.random((300, 20)) < 0.5).sum(axis=0).astype(np.float64)
    biased = (random.random((300, 20)) < np.repeat([0.4, 0.6], 10)).sum(axis=0).astype(np.float64)

    facts.all_are_drawn_equally_often(fair, 300, 0.5)

    with pytest.raises(AssertionError, match="how often persons are drawn varies"):
        facts.all_are_drawn_equally_often(biased, 300, 0.5)


def mean_over_the_tokens_of_the_batch(kind: str, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """What a language model's own loss is: one person's many tokens make the others' fewer count less."""
    assert batch.targets is not None
    targets = torch.from_numpy(batch.targets)[:, 1:]
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return each.sum(dim=1) / (targets != IGNORED).sum()


def test_a_mean_loss_over_the_tokens_of_a_batch_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.make_model(tmp_path, "gpt2", CAUSAL)
    gradients = PersonGradients(model, families.make_examples(CAUSAL, 8, persons=6))
    facts.no_person_changes_anothers_gradient(gradients)

    monkeypatch.setattr(gradients_module, "losses", mean_over_the_tokens_of_the_batch)

    with pytest.raises(AssertionError, match="beside others, gradients differ by"):
        facts.no_person_changes_anothers_gradient(gradients)


@pytest.fixture
def certificate(model: AdaptedModel) -> Certificate:
    return certify(model, cached=False)


def logs_a_step_less(self: Mechanism, number: int, randomness: str) -> Spend:
    return Spend(
        round=number,
        sampling_rate=self.sampling_rate,
        noise_multiplier=self.noise_multiplier,
        steps=self.steps - 1,
        clip_norm=self.clip_norm,
        divisor=self.divisor,
        noise=randomness,
    )


def trains_a_step_more(
    self: PrivateTrainer, number: int, start: Floats, planned: Mechanism, randomness: Randomness
) -> Delta:
    more = dataclasses.replace(planned, steps=planned.steps + 1)
    return train(self._gradients, start, more, self._gradients.model.plan.training, randomness, number)[0]


def forgets_later_rounds(self: Spends, spend: Spend, start: str, roster: str) -> None:
    if spend.round == 1:
        reserve(self, spend, start, roster)


reserve = Spends.reserve


@pytest.mark.parametrize(
    ("owner", "method", "broken", "seen"),
    [
        (Mechanism, "spend", logs_a_step_less, "round 1 was not trained: .* rule on: approval"),
        (PrivateTrainer, "train", trains_a_step_more, "9 steps were taken and 6 logged"),
        (Spends, "reserve", forgets_later_rounds, "6 steps were taken and 2 logged"),
    ],
)
def test_steps_that_are_not_logged_are_seen(
    certificate: Certificate,
    make_examples: MakeExamples,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    method: str,
    broken: Any,
    seen: str,
) -> None:
    examples = make_examples(30, seed=1, longest=4)
    facts.every_step_is_logged(*facts.logged_and_executed(certificate, examples, monkeypatch))

    monkeypatch.setattr(owner, method, broken)

    with pytest.raises(AssertionError, match=seen):
        facts.every_step_is_logged(*facts.logged_and_executed(certificate, examples, monkeypatch))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
