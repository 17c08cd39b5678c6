"""How good predictions are: accuracy, macro-F1 and AUROC, from class probabilities."""

import numpy as np
import numpy.typing as npt

from confide.common.adapter import Floats
from confide.common.examples import Ints


def scores(probabilities: Floats, labels: Ints) -> dict[str, float]:
    """Return every score by name; each is between 0 and 1, and higher is better.

    Args:
        probabilities: (rows, classes), each row summing to 1; at least one row.
        labels: True classes, (rows,).
    """
    guesses = probabilities.argmax(axis=1)
    return {
        "accuracy": float((guesses == labels).mean()),
        "macro-f1": macro_f1(guesses, labels, probabilities.shape[1]),
        "auroc": auroc(probabilities, labels),
    }


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
