"""Scores: equal to scikit-learn's."""

import math

import numpy as np
import pytest
from hypothesis import given, strategies
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, r2_score, roc_auc_score

from confide.common.adapter import Floats
from confide.common.examples import Ints
from confide.common.plan import SCORES
from confide.common.score import (
    auroc,
    class_scores,
    higher_is_better,
    language_scores,
    number_scores,
    token_class_scores,
)


def drawn(seed: int, rows: int, classes: int, absent: int) -> tuple[Floats, Ints]:
    """Draw probabilities in exact eighths, so that many tie, and labels without the first `absent` classes."""
    random = np.random.default_rng(seed)
    probabilities = (random.multinomial(8, [1 / classes] * classes, rows) / 8).astype(np.float32)
    return probabilities, random.integers(absent, classes, rows)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("classes", "absent"), [(2, 0), (2, 1), (3, 0), (3, 1), (7, 0), (7, 4)])
@pytest.mark.parametrize("rows", [1, 20, 300])
def test_accuracy_and_macro_f1_equal_those_of_scikit_learn(rows: int, classes: int, absent: int, seed: int) -> None:
    probabilities, labels = drawn(seed, rows, classes, absent)
    guesses = probabilities.argmax(axis=1)

    ours = class_scores(probabilities, labels)

    assert ours["accuracy"] == pytest.approx(accuracy_score(labels, guesses))
    assert ours["macro-f1"] == pytest.approx(f1_score(labels, guesses, average="macro", zero_division=0))


@pytest.mark.parametrize("seed", range(5))
def test_auroc_of_two_classes_equals_that_of_scikit_learn(seed: int) -> None:
    probabilities, labels = drawn(seed, 300, 2, 0)

    assert auroc(probabilities, labels) == pytest.approx(roc_auc_score(labels, probabilities[:, 1]))


@pytest.mark.parametrize("seed", range(5))
def test_auroc_of_many_classes_equals_one_against_the_rest_of_scikit_learn(seed: int) -> None:
    probabilities, labels = drawn(seed, 300, 5, 0)

    ours = auroc(probabilities, labels)

    assert ours == pytest.approx(roc_auc_score(labels, probabilities, multi_class="ovr", average="macro"))


@pytest.mark.parametrize("seed", range(5))
def test_auroc_leaves_out_classes_without_rows(seed: int) -> None:
    probabilities, labels = drawn(seed, 300, 5, 2)

    ours = auroc(probabilities, labels)

    each = [roc_auc_score(labels == k, probabilities[:, k]) for k in (2, 3, 4)]
    assert ours == pytest.approx(np.mean(each))


def test_auroc_counts_ties_half() -> None:
    level = np.full((4, 2), 0.5, np.float32)

    assert auroc(level, np.array([0, 1, 1, 0])) == 0.5


@pytest.mark.parametrize("classes", [2, 3])
def test_auroc_is_a_half_where_all_rows_are_of_one_class(classes: int) -> None:
    assert auroc(np.eye(classes, dtype=np.float32), np.ones(classes, np.int64)) == 0.5


def test_perfect_and_worst_guesses_score_one_and_zero() -> None:
    labels = np.array([0, 1, 2, 0, 1, 2])
    right = np.eye(3, dtype=np.float32)[labels]

    assert set(class_scores(right, labels).values()) == {1.0}
    assert class_scores(np.eye(3, dtype=np.float32)[(labels + 1) % 3], labels)["macro-f1"] == 0
    assert auroc(1 - right[:, :2], labels % 2) == 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("classes", "absent"), [(2, 0), (5, 2)])
def test_scores_of_words_equal_those_of_scikit_learn(classes: int, absent: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    guesses, labels = random.integers(0, classes, 400), random.integers(absent, classes, 400)

    ours = token_class_scores(guesses, labels, classes)

    assert ours["accuracy"] == pytest.approx(accuracy_score(labels, guesses))
    assert ours["macro-f1"] == pytest.approx(f1_score(labels, guesses, average="macro", zero_division=0))
    assert set(ours) == {"accuracy", "macro-f1"}


@given(
    strategies.lists(
        strategies.tuples(strategies.floats(-1e6, 1e6), strategies.floats(-1e6, 1e6)), min_size=2, max_size=30
    )
)
def test_scores_of_numbers_equal_those_of_scikit_learn(rows: list[tuple[float, float]]) -> None:
    predictions, answers = np.array(rows).T

    ours = number_scores(predictions, answers)

    assert ours["mae"] == pytest.approx(mean_absolute_error(answers, predictions))
    assert ours["r2"] == pytest.approx(r2_score(answers, predictions))


@pytest.mark.parametrize(("prediction", "r2"), [(3.0, 1.0), (4.0, 0.0)])
def test_r2_of_equal_answers_is_one_where_all_is_right_and_else_zero(prediction: float, r2: float) -> None:
    assert number_scores(np.full(4, prediction), np.full(4, 3.0))["r2"] == r2


def test_large_answers_that_hardly_differ_keep_their_digits() -> None:
    answers = np.array([1e9, 1e9 + 8])

    assert number_scores(answers + 8, answers) == pytest.approx({"r2": 1 - 128 / 32, "mae": 8})


def test_perplexity_is_e_to_the_mean_nats_per_token_so_long_rows_weigh_more() -> None:
    ours = language_scores(np.array([3 * math.log(2), 1 * math.log(32)]), np.array([2, 0]), np.array([3, 1]))

    assert ours == pytest.approx({"perplexity": 4.0, "accuracy": 0.5})


@pytest.mark.parametrize("vocabulary", [2, 50_000])
def test_guessing_evenly_has_the_perplexity_of_the_vocabulary(vocabulary: int) -> None:
    tokens = np.array([5, 9])

    ours = language_scores(tokens * math.log(vocabulary), np.zeros(2, np.int64), tokens)

    assert ours["perplexity"] == pytest.approx(vocabulary)


@pytest.mark.parametrize(("nats", "count"), [(1e9, 1), (math.inf, 1), (math.nan, 1), (0.0, 0)])
def test_perplexity_is_a_finite_number_whatever_the_losses(nats: float, count: int) -> None:
    ours = language_scores(np.array([nats]), np.array([0]), np.array([count]))

    assert ours == {"perplexity": math.exp(700), "accuracy": 0.0}


def test_every_score_a_plan_may_name_is_given_and_says_which_way_is_better() -> None:
    labels, level = np.array([0, 1]), np.full((2, 2), 0.5, np.float32)
    given_scores = {
        "text-classification": class_scores(level, labels),
        "image-classification": class_scores(level, labels),
        "token-classification": token_class_scores(labels, labels, 2),
        "regression": number_scores(labels * 1.0, labels * 1.0),
        **dict.fromkeys(("causal-lm", "instruction", "masked-lm"), language_scores(labels * 1.0, labels, labels + 1)),
    }

    assert {kind: set(found) for kind, found in given_scores.items()} == {k: set(names) for k, names in SCORES.items()}
    assert {name for names in SCORES.values() for name in names if not higher_is_better(name)} == {"perplexity", "mae"}
