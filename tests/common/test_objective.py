"""The loss of a row for every kind of task, and scores of a model."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from confide.common.errors import DataError
from confide.common.examples import IGNORED, Batch, Examples
from confide.common.model import AdaptedModel
from confide.common.objective import continued, losses, measure, numbers, probabilities, word_classes
from confide.common.plan import (
    CAUSAL,
    IMAGE_CLASSES,
    INSTRUCTION,
    LANGUAGE,
    MASKED,
    REGRESSION,
    SCORES,
    TEXT_CLASSES,
    TOKEN_CLASSES,
)
from confide.common.prefix import PrefixCache
from tests.families import LABELS, WORDS, make_examples, make_model, own_loss

KINDS = pytest.mark.parametrize("kind", list(SCORES))
# A small family for each kind of task.
FOR = {TEXT_CLASSES: "bert", REGRESSION: "bert", TOKEN_CLASSES: "bert", MASKED: "bert", IMAGE_CLASSES: "vit"}
FOR |= {CAUSAL: "llama", INSTRUCTION: "llama"}
Build = Callable[..., AdaptedModel]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Return a maker of a tiny model for a kind of task that makes each once."""
    make = functools.partial(make_model, tmp_path_factory.mktemp("families"))
    return functools.cache(lambda kind, **changes: make(FOR[kind], kind, **changes))


def random_scores(kind: str, batch: Batch, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    outputs = WORDS if kind in LANGUAGE else 1 if kind == REGRESSION else len(LABELS)
    shape = (len(batch.labels), outputs) if batch.targets is None else (*batch.targets.shape, outputs)
    return torch.randn(shape, dtype=torch.float64)


@KINDS
def test_a_rows_loss_is_what_its_kind_of_task_says(kind: str) -> None:
    examples = make_examples(kind)
    rows = np.arange(len(examples))
    scores = random_scores(kind, examples.batch(rows), seed=1)

    found = losses(kind, scores, examples.batch(rows))

    each = [own_loss(kind, scores[[row]], examples.batch(rows[[row]])).item() for row in rows]
    np.testing.assert_allclose(found.numpy(), each, rtol=1e-12, atol=1e-15)


@KINDS
def test_a_rows_loss_depends_on_that_rows_scores_and_answers_only(kind: str) -> None:
    examples = make_examples(kind)
    batch = examples.batch(np.arange(len(examples)))
    scores, others = random_scores(kind, batch, seed=1), random_scores(kind, batch, seed=2)
    others[4] = scores[4]
    order = np.roll(np.arange(len(examples)), 3)
    order[order == 4], order[4] = order[4], 4  # every other place holds another row
    other = examples.subset(order).batch(np.arange(len(order)))

    before, after = losses(kind, scores, batch), losses(kind, others, other)

    assert before[4] == after[4]
    assert (before != after).sum() == len(order) - 1


@pytest.mark.parametrize("kind", [CAUSAL, INSTRUCTION, MASKED, TOKEN_CLASSES])
def test_a_row_without_targets_has_loss_and_gradient_zero(kind: str) -> None:
    batch = make_examples(kind).batch(np.arange(3))
    assert batch.targets is not None
    batch.targets[1] = IGNORED
    scores = random_scores(kind, batch, seed=1).requires_grad_()

    found = losses(kind, scores, batch)
    found.sum().backward()  # type: ignore[no-untyped-call]

    assert found[1] == 0
    assert scores.grad is not None
    assert not scores.grad[1].any()
    assert scores.grad[0].any()


def test_the_first_token_of_a_text_is_never_learned() -> None:
    batch = make_examples(CAUSAL).batch(np.arange(3))
    scores = random_scores(CAUSAL, batch, seed=1)
    assert batch.targets is not None
    other = dataclasses.replace(batch, targets=batch.targets.copy())
    assert other.targets is not None
    other.targets[:, 0] = IGNORED
    single = Batch(
        input_ids=None, attention_mask=None, token_type_ids=None, labels=np.zeros(1), targets=batch.targets[:1, :1]
    )

    assert torch.equal(losses(CAUSAL, scores, batch), losses(CAUSAL, scores, other))
    assert losses(CAUSAL, scores[:1, :1], single).tolist() == [0.0]


@KINDS
@pytest.mark.parametrize("cached", [False, True])
def test_scores_do_not_depend_on_how_many_rows_go_at_once_or_on_the_cache(
    kind: str, cached: bool, build: Build
) -> None:
    model, examples = build(kind, top_layers=1), make_examples(kind)
    cache = PrefixCache(model) if cached else None
    if cache:
        list(cache.add(examples))

    scores = measure(model, examples, cache, micro_batch=48)

    assert set(SCORES[kind]) <= set(scores)
    alone = measure(model, examples, micro_batch=1)
    assert scores == pytest.approx(alone, rel=1e-6)


def test_perplexity_is_e_to_the_mean_loss_of_all_tokens(build: Build) -> None:
    model, examples = build(CAUSAL), make_examples(CAUSAL)
    batch = examples.batch(np.arange(len(examples)))
    assert batch.targets is not None
    tokens = torch.from_numpy((batch.targets[:, 1:] != IGNORED).sum(axis=1))

    with torch.no_grad():
        nats = (losses(CAUSAL, model.forward(batch), batch) * tokens).sum() / tokens.sum()

    assert measure(model, examples)["perplexity"] == pytest.approx(math.exp(float(nats)), rel=1e-6)


def scored(answers: Any, kind: str, build: Build, **changes: object) -> dict[str, float]:
    """Return the scores of rows whose answers are these."""
    examples = make_examples(kind)
    changed = {"labels": answers} if kind != TOKEN_CLASSES else {"targets": [answers]}
    return measure(build(kind, **changes), dataclasses.replace(examples, **changed))


def test_answers_that_are_what_the_model_says_get_the_best_scores(build: Build) -> None:
    texts, words = make_examples(TEXT_CLASSES), make_examples(TOKEN_CLASSES)
    said = probabilities(build(TEXT_CLASSES), texts)
    of_words = word_classes(build(TOKEN_CLASSES), words)
    answers = words.targets[0].copy()
    answers[answers != IGNORED] = np.concatenate(of_words)

    assert said.shape == (len(texts), len(LABELS))
    np.testing.assert_allclose(said.sum(axis=1), 1, atol=1e-6)
    assert scored(said.argmax(axis=1), TEXT_CLASSES, build)["accuracy"] == 1
    assert sum(map(len, of_words)) == (answers != IGNORED).sum() < len(answers)
    assert scored(answers, TOKEN_CLASSES, build) == {"accuracy": 1, "macro-f1": 1}


def test_regression_is_scored_in_the_answers_own_unit(build: Build) -> None:
    examples, unit = make_examples(REGRESSION), {"center": 50.0, "scale": 20.0}
    standardised = numbers(build(REGRESSION), examples)
    model = build(REGRESSION, **unit)

    assert np.allclose(numbers(model, examples), standardised * 20 + 50)
    perfect = scored(standardised.astype(np.float32), REGRESSION, build, **unit)
    assert perfect["r2"] == pytest.approx(1)
    assert perfect["mae"] == pytest.approx(0, abs=1e-4)
    off_by_one = scored((standardised + 1).astype(np.float32), REGRESSION, build, **unit)
    assert off_by_one["mae"] == pytest.approx(20, rel=1e-5)


def test_answers_come_in_the_order_of_the_rows(build: Build) -> None:
    model, examples = build(TEXT_CLASSES), make_examples(TEXT_CLASSES)
    order = np.argsort(-examples.lengths, kind="stable")

    turned: Examples = examples.subset(order)

    np.testing.assert_allclose(
        probabilities(model, turned, micro_batch=3), probabilities(model, examples)[order], atol=1e-7
    )


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_text_goes_on_with_the_likeliest_token_each_time(precision: str, checkpointing: bool, tmp_path: Path) -> None:
    model = make_model(
        tmp_path, "llama", CAUSAL, dtype=torch.float32, precision=precision, gradient_checkpointing=checkpointing
    )
    examples = make_examples(CAUSAL, 3)

    found = continued(model, examples, 4)

    for row, said in enumerate(found):
        batch = examples.batch(np.array([row]))
        assert batch.input_ids is not None
        for token in said:
            with torch.no_grad():
                scores = model.forward(dataclasses.replace(batch, attention_mask=np.ones_like(batch.input_ids)))[0, -1]
            assert scores[token] >= scores.max() - 0.05 * scores.std()  # bfloat16 may take another near the first
            batch = dataclasses.replace(batch, input_ids=np.append(batch.input_ids, [[token]], axis=1))
        assert len(said) == 4 or said[-1] == model.network.config.eos_token_id
    assert model.network.training


def test_rows_without_an_answer_for_each_token_are_refused(build: Build) -> None:
    with pytest.raises(DataError, match="no answer for each token"):
        measure(build(TOKEN_CLASSES), make_examples(TEXT_CLASSES))
