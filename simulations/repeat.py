"""What several runs with different seeds have in common: mean and spread of each score."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def summary(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return mean, lowest and highest of every score, by name.

    Args:
        results: Contents of `run.json` of runs of the same plan.
    """
    names = list(results[0]["measured"])
    rows = {}
    for name in names:
        values = [result["measured"][name][result["score"]] for result in results]
        rows[name] = {"mean": statistics.fmean(values), "lowest": min(values), "highest": max(values)}
    return rows
