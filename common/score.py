"""How good predictions are: of classes, of a label at each token, of language and of numbers."""

import math

import numpy as np
import numpy.typing as npt

from confide.common.adapter import Floats
from confide.common.examples import Ints

_LARGEST_EXPONENT = 700.0  # e^700 is near the largest float; a worse model is no worse in any way that matters
_LOWER_IS_BETTER = frozenset({"perplexity", "mae"})


def higher_is_better(score: str) -> bool:
    """Return whether a higher value of this score is the better one; of perplexity and mae the lower one is."""
    return score not in _LOWER_IS_BETTER


def class_scores(probabilities: Floats, labels: Ints) -> dict[str, float]:
    """Return accuracy, macro-F1 and AUROC by name; each is between 0 and 1, and higher is better.

    Args:
        probabilities: (rows, classes), each row summing to 1; at least one row.
        labels: True classes, (rows,).
    """
    guesses = probabilities.argmax(axis=1)
    return token_class_scores(guesses, labels, probabilities.shape[1]) | {"auroc": auroc(probabilities, labels)}


def token_class_scores(guesses: Ints, labels: Ints, classes: int) -> dict[str, float]:
    """Return accuracy and macro-F1 by name; each is between 0 and 1, and higher is better.

    Every word counts once, on its own: this is not the score of whole spans of words.

    Args:
        guesses: Guessed classes of all words of all rows, flat, at least one.
        labels: True classes, as many; IGNORED is left out already.
        classes: How many classes there are.
    """
    return {"accuracy": float((guesses == labels).mean()), "macro-f1": macro_f1(guesses, labels, classes)}


def language_scores(losses: npt.NDArray[np.float64], right: Ints, tokens: Ints) -> dict[str, float]:
    """Return perplexity, of which lower is better, and accuracy, of which higher is better.

    Perplexity is e to the mean loss per token, over all tokens of all rows, so long rows weigh more. It is always a
    finite number: a mean above 700 nats, or one that is no number, counts as 700. Accuracy is the share of tokens that
    were the likeliest guess. Without a single token perplexity is that largest one, and accuracy 0.

    Args:
        losses: Each row's cross-entropy summed over its tokens, in nats, (rows,), float64.
        right: How many of each row's tokens were guessed, (rows,).
        tokens: How many of each row's tokens were to be guessed, (rows,).
    """
    count = int(tokens.sum())
    mean = float(losses.sum()) / count if count else math.inf
    return {
        "perplexity": math.exp(mean if mean < _LARGEST_EXPONENT else _LARGEST_EXPONENT),  # NaN is not less either
        "accuracy": int(right.sum()) / count if count else 0.0,
    }


def number_scores(predictions: npt.NDArray[np.float64], answers: npt.NDArray[np.float64]) -> dict[str, float]:
    """Return r2, at most 1, of which higher is better, and mae, at least 0, of which lower is better.

    r2 = 1 - Σ(answer - prediction)² / Σ(answer - mean answer)². If all answers are equal it is 1 where every prediction
    is right, else 0. mae is the mean of |answer - prediction|.

    Args:
        predictions: Predicted numbers, (rows,), in the answers' own unit, not standardised; at least one.
        answers: True numbers, (rows,), in the same unit.
    """
    missed, spread = ((answers - predictions) ** 2).sum(), ((answers - answers.mean()) ** 2).sum()
    r2 = 1 - missed / spread if spread > 0 else float(missed == 0)
    return {"r2": float(r2), "mae": float(np.abs(answers - predictions).mean())}


def macro_f1(guesses: Ints, labels: Ints, classes: int) -> float:
    """Return the mean over classes of F1 = 2·TP / (2·TP + FP + FN); classes neither true nor guessed are left out."""
    right = np.bincount(labels[guesses == labels], minlength=classes)
    guessed, true = np.bincount(guesses, minlength=classes), np.bincount(labels, minlength=classes)
    seen = guessed + true > 0
    return float((2 * right[seen] / (guessed + true)[seen]).mean())


def auroc(probabilities: Floats, labels: Ints) -> float:
    """Return the area under the ROC curve: of class 1 if there are two, else the mean of one class against the rest.

    Ties count half; classes without both kinds of rows are left out, and 0.5 is returned if all are.

    Source: Hanley and McNeil 1982, by the rank statistic of Mann and Whitney.
    """
    classes = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    areas = [_area(probabilities[:, k], labels == k) for k in classes if 0 < (labels == k).sum() < len(labels)]
    return float(np.mean(areas)) if areas else 0.5


def _area(values: Floats, positive: npt.NDArray[np.bool_]) -> float:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # mean rank of each value, from 1
    n = int(positive.sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(values) - n)))
