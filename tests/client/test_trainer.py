"""The guarantee of one site's training: gradients, clipping, sampling, noise."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional as F

from confide.client.conformance import certify
from confide.client.gradients import ClippedSum, PersonGradients
from confide.client.mechanism import Mechanism
from confide.client.trainer import train
from confide.common.calibration import noise_multiplier
from confide.common.errors import DataError, ModelError, PrivacyError
from confide.common.examples import Examples, Ints
from confide.common.model import AdaptedModel, attach
from confide.common.objective import probabilities
from confide.common.plan import Plan
from confide.common.prefix import PrefixCache
from confide.simulations.insecure import InsecureSeededNoise
from tests.client import facts
from tests.client.facts import mechanism
from tests.conftest import MakeExamples


@pytest.fixture
def exact(base_directory: Path, plan: Plan) -> AdaptedModel:
    """The tiny model in float64, away from its start, where B and head are zero and gradients special."""
    model = attach(base_directory, plan, dtype=torch.float64)
    model.write(np.random.default_rng(1).normal(0, 0.3, model.layout.length).astype(np.float32))
    return model


@pytest.fixture
def model(base_directory: Path, plan: Plan) -> AdaptedModel:
    return attach(base_directory, plan)


def one_at_a_time(model: AdaptedModel, examples: Examples) -> npt.NDArray[np.float64]:
    """The obvious way: one row, one backward pass, one gradient. Returns (rows, d)."""
    gradients = []
    for row in range(len(examples)):
        model.network.zero_grad()
        logits = model.logits(examples, np.array([row]))
        F.cross_entropy(logits, torch.tensor([examples.labels[row]])).backward()  # type: ignore[no-untyped-call]
        parts = [p.grad.reshape(-1) for p in model.trainable.values() if p.grad is not None]
        gradients.append(torch.cat(parts).double().numpy())
    model.network.zero_grad()
    return np.stack(gradients)


@pytest.mark.parametrize("micro_batch", [1, 3, 64])
@pytest.mark.parametrize("persons", [None, 7])
@pytest.mark.parametrize("cached", [False, True])
def test_the_clipped_sum_equals_a_float64_loop_over_single_rows(
    exact: AdaptedModel, make_examples: MakeExamples, micro_batch: int, persons: int | None, cached: bool
) -> None:
    examples = make_examples(23, seed=5, persons=persons)
    rows = one_at_a_time(exact, examples)
    per_person = np.stack([rows[examples.persons == p].mean(axis=0) for p in range(examples.person_count)])
    norms = np.linalg.norm(per_person, axis=1)
    clip = 1.0001 * float(np.median(norms))  # half of the persons are clipped, so both branches run
    expected = (per_person * np.minimum(1, clip / norms)[:, None]).sum(axis=0)
    cache = PrefixCache(exact) if cached else None
    if cache:
        list(cache.add(examples))

    gradients = PersonGradients(exact, examples, cache=cache, micro_batch=micro_batch)
    total = gradients.clipped_sum(np.arange(examples.person_count), clip)

    assert np.linalg.norm(total.values - expected) <= 1e-6 * np.linalg.norm(expected)
    assert total.clipped == (norms > clip).sum()


@pytest.mark.parametrize("persons", [None, 5])
def test_one_row_more_changes_no_other_rows_gradient(
    exact: AdaptedModel, make_examples: MakeExamples, persons: int | None
) -> None:
    gradients = PersonGradients(exact, make_examples(12, seed=3, persons=persons))

    facts.no_person_changes_anothers_gradient(gradients)


@pytest.mark.parametrize("clip", [1e-3, 0.1, 1.0])
def test_adding_or_removing_one_person_changes_the_sum_by_at_most_clip_norm(
    model: AdaptedModel, make_examples: MakeExamples, clip: float
) -> None:
    gradients = PersonGradients(model, make_examples(30, seed=8, persons=9), micro_batch=4)

    facts.removing_one_person_changes_the_sum_by_at_most_the_clip_norm(gradients, clip)


@pytest.mark.parametrize("clip", [1e-3, 0.1, 1.0])
def test_each_persons_part_is_at_most_clip_norm_long_in_exact_integers(
    model: AdaptedModel, make_examples: MakeExamples, clip: float
) -> None:
    gradients = PersonGradients(model, make_examples(20, seed=8, persons=6), micro_batch=4)

    facts.each_part_is_within_the_clip_norm(gradients, clip)


def test_nobody_drawn_gives_zeros_without_a_forward_pass(model: AdaptedModel, make_examples: MakeExamples) -> None:
    gradients = PersonGradients(model, make_examples(5, seed=0))

    total = gradients.clipped_sum(np.array([], dtype=np.int64), 1.0)

    assert not total.values.any()


def test_an_empty_batch_is_still_noised_stepped_and_counted(model: AdaptedModel, make_examples: MakeExamples) -> None:
    examples = make_examples(5, seed=0)
    never = mechanism(sampling_rate=1e-12, steps=3)
    gradients = PersonGradients(model, examples)

    delta, evidence = train(gradients, model.start, never, model.plan.training, InsecureSeededNoise(0, "s", 1))

    assert evidence.batch_sizes == (0, 0, 0)
    assert np.count_nonzero(delta.values) == model.layout.length
    assert never.spend(1, "x").steps == 3


def test_a_gradient_that_is_not_finite_counts_as_zero(exact: AdaptedModel, make_examples: MakeExamples) -> None:
    examples = make_examples(6, seed=2)
    gradients = PersonGradients(exact, examples)
    expected = gradients.clipped_sum(np.array([0, 1, 3, 4, 5]), 0.5).values
    with torch.no_grad():
        embeddings = exact.network.get_input_embeddings().weight
        start = examples.starts[2]
        poisoned = dataclasses.replace(examples, tokens=[examples.tokens[0].copy()])
        poisoned.tokens[0][start : start + examples.lengths[2]] = 4  # [MASK], which no other row holds
        embeddings[4] = math.nan

    total = PersonGradients(exact, poisoned).clipped_sum(np.arange(6), 0.5)

    assert total.non_finite == 1
    np.testing.assert_allclose(total.values, expected, atol=0.5 * 2.0**-30)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_noise_has_the_claimed_standard_deviation(
    model: AdaptedModel, make_examples: MakeExamples, steps: int
) -> None:
    """False alarm 1e-6 each: a two-sided chi-square test and a KS test on the noise of 400 rounds of some steps."""
    gradients = PersonGradients(model, make_examples(4, seed=0))

    facts.noise_has_the_claimed_deviation(gradients, rounds=400, steps=steps)


def test_the_sampler_includes_each_person_with_probability_q(model: AdaptedModel, make_examples: MakeExamples) -> None:
    """False alarm 1e-6 each: how many are drawn in all, and how batch sizes spread (binomial, not fixed)."""
    gradients = PersonGradients(model, make_examples(20, seed=1, longest=4))
    drawing = mechanism(sampling_rate=0.3, steps=200)

    _, evidence = train(gradients, model.start, drawing, model.plan.training, InsecureSeededNoise(3, "s", 1))

    assert len(evidence.batch_sizes) == 200
    facts.persons_are_drawn_one_by_one(evidence.batch_sizes, 20, 0.3)


def test_no_person_is_drawn_more_often_than_others(
    model: AdaptedModel, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """False alarm 1e-6: a chi-square test on how often each of 20 persons is in a batch of 300."""
    gradients = PersonGradients(model, make_examples(20, seed=1, longest=4))
    counts, nothing = np.zeros(20), gradients.clipped_sum(np.empty(0, np.int64), 1.0)

    def counted(persons: Ints, clip_norm: float, active: tuple[str, ...]) -> ClippedSum:
        counts[persons] += 1
        return nothing

    monkeypatch.setattr(gradients, "clipped_sum", counted)
    train(gradients, model.start, mechanism(steps=300), model.plan.training, InsecureSeededNoise(4, "s", 1))

    facts.all_are_drawn_equally_often(counts, 300, 0.5)


def test_every_step_that_is_taken_is_logged(
    model: AdaptedModel, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = certify(model, cached=False)

    spends, executed = facts.logged_and_executed(certificate, make_examples(30, seed=1), monkeypatch)

    facts.every_step_is_logged(spends, executed)
    assert executed == model.plan.privacy.rounds * model.plan.privacy.steps_per_round


def test_each_step_is_told_of_before_it_draws_or_looks_at_a_row(
    model: AdaptedModel, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients, told = PersonGradients(model, make_examples(20, seed=1)), list[object]()
    seeded, looked = InsecureSeededNoise(0, "s", 1), gradients.clipped_sum

    def noted(persons: Ints, clip_norm: float, active: tuple[str, ...]) -> ClippedSum:
        told.append("looked")
        return looked(persons, clip_norm, active)

    def drawn(randomness: InsecureSeededNoise, rate: float, count: int) -> Ints:
        told.append("drew")
        return np.arange(3)

    monkeypatch.setattr(gradients, "clipped_sum", noted)
    monkeypatch.setattr("confide.client.trainer.drawn", drawn)
    train(gradients, model.start, mechanism(steps=2), model.plan.training, seeded, before_step=told.append)

    assert told == [1, "drew", "looked", 2, "drew", "looked"]


def test_the_divisor_is_constant_whatever_was_drawn(exact: AdaptedModel, make_examples: MakeExamples) -> None:
    examples = make_examples(6, seed=4)
    sgd = dataclasses.replace(exact.plan.training, optimizer="sgd", learning_rate=1.0, head_learning_rate=1.0)
    gradients = PersonGradients(exact, examples)
    start = exact.read()
    expected = -gradients.clipped_sum(np.arange(6), 1.0).values / 37.0

    delta, _ = train(
        gradients,
        start,
        mechanism(sampling_rate=1.0, divisor=37.0, noise_multiplier=1e-9),
        sgd,
        InsecureSeededNoise(0, "s", 1),
    )

    np.testing.assert_allclose(delta.values, expected, atol=1e-6)


def test_the_mechanism_takes_q_and_the_noise_of_the_whole_run_from_the_plan(plan: Plan) -> None:
    made = Mechanism.of(plan.privacy, declared_persons=120)

    assert made.sampling_rate == plan.privacy.sampling_rate
    assert made.noise_multiplier == noise_multiplier(plan.privacy)
    assert made.divisor == plan.privacy.sampling_rate * 120
    assert made.steps == plan.privacy.steps_per_round


def test_training_without_noise_has_no_spend(plan: Plan) -> None:
    bare = Mechanism.of(plan.privacy, 100).insecure_no_noise()

    with pytest.raises(PrivacyError):
        bare.spend(1, "x")


def test_a_second_round_on_the_same_model_gives_the_same_gradients(
    exact: AdaptedModel, make_examples: MakeExamples
) -> None:
    examples = make_examples(9, seed=6)
    first = PersonGradients(exact, examples)
    expected = first.clipped_sum(np.arange(9), 0.3).values

    again = PersonGradients(exact, examples).clipped_sum(np.arange(9), 0.3).values

    np.testing.assert_array_equal(again, expected)


def test_only_the_adapter_moves(model: AdaptedModel, make_examples: MakeExamples) -> None:
    frozen = {n: p.detach().clone() for n, p in model.network.named_parameters() if not p.requires_grad}
    gradients = PersonGradients(model, make_examples(20, seed=1))

    delta, _ = train(gradients, model.start, mechanism(steps=3), model.plan.training, InsecureSeededNoise(0, "s", 1))

    assert np.count_nonzero(delta.values) == model.layout.length
    after = dict(model.network.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in frozen.items())


def test_training_learns_what_the_rows_hold(model: AdaptedModel, make_examples: MakeExamples) -> None:
    examples = make_examples(200, seed=9)
    clear = dataclasses.replace(examples, labels=(examples.tokens[0][examples.starts + 1] % 3).astype(np.int64))
    gradients = PersonGradients(model, clear)
    quick = dataclasses.replace(model.plan.training, learning_rate=0.05, head_learning_rate=0.1)
    model.write(model.start)
    before = _loss(model, clear)

    train(
        gradients,
        model.start,
        mechanism(sampling_rate=1.0, steps=30, divisor=200.0, noise_multiplier=1e-9),
        quick,
        InsecureSeededNoise(0, "s", 1),
    )

    assert _loss(model, clear) < 0.8 * before


def _loss(model: AdaptedModel, examples: Examples) -> float:
    chances = probabilities(model, examples)[np.arange(len(examples)), examples.labels]
    return float(-np.log(chances).mean())


def test_a_module_without_exact_per_example_gradients_is_refused(
    model: AdaptedModel, make_examples: MakeExamples
) -> None:
    embedding = model.network.get_input_embeddings().weight
    embedding.requires_grad_(True)
    model.trainable["embedding"] = embedding

    with pytest.raises(ModelError, match=r"embedding \(Embedding\)"):
        PersonGradients(model, make_examples(4, seed=0))


def test_a_frozen_module_that_mixes_rows_is_refused(model: AdaptedModel, make_examples: MakeExamples) -> None:
    model.network.add_module("mixing", torch.nn.BatchNorm1d(16).requires_grad_(False))

    with pytest.raises(ModelError, match="holds BatchNorm1d, which mixes the rows of a batch"):
        PersonGradients(model, make_examples(4, seed=0))


def test_a_site_without_rows_cannot_train(model: AdaptedModel, make_examples: MakeExamples) -> None:
    nobody = make_examples(4, seed=0).subset(np.array([], dtype=np.int64))

    with pytest.raises(DataError, match="without rows"):
        PersonGradients(model, nobody)


def test_deltas_and_sums_do_not_print_their_values(model: AdaptedModel, make_examples: MakeExamples) -> None:
    gradients = PersonGradients(model, make_examples(4, seed=0))

    delta, _ = train(gradients, model.start, mechanism(), model.plan.training, InsecureSeededNoise(0, "s", 1))

    assert repr(delta) == f"<Delta of {model.layout.length} values>"
    assert "[" not in repr(gradients.clipped_sum(np.arange(4), 1.0))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
