"""Scores: equal to scikit-learn's."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from confide.common.adapter import Floats
from confide.common.examples import Ints
from confide.common.score import auroc, scores


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

    ours = scores(probabilities, labels)

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

    assert set(scores(right, labels).values()) == {1.0}
    assert scores(np.eye(3, dtype=np.float32)[(labels + 1) % 3], labels)["macro-f1"] == 0
    assert auroc(1 - right[:, :2], labels % 2) == 0
