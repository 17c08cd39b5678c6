"""Privacy loss distributions (PLD): the tighter bound, for what was fixed in advance.

The library dp-accounting composes the distribution of one step's privacy loss with itself, on a grid that errs upward.
This file says where the result holds, and how fine the grid must be.
"""

import functools
import math
from typing import Any

from confide.common.renyi import MOST_MECHANISMS, our_rdp_epsilon
from confide.common.spend import Mechanisms, reserved

# The library composes loss distributions by Fourier transforms in float64, whose rounding no bound of its covers. It is
# about 1e-15 of probability, so a delta below this cannot be certified by PLD.
LEAST_PLD_DELTA = 1e-12
# Beyond this epsilon nothing is promised to anyone, and a loss distribution would fill the memory.
MOST_PLD_EPSILON = 1000.0


@functools.lru_cache(maxsize=4096)
def pld_epsilon(mechanisms: Mechanisms, delta: float, relation: str = "REPLACE_SPECIAL") -> float:
    """Return epsilon by the library's loss distributions; infinite where they do not hold.

    Args:
        mechanisms: At least one.
        delta: Above 0, below 1.
        relation: The name of the library's neighbouring relation; zero-out if not told otherwise.

    Guarantee: epsilon at delta for the Poisson-subsampled Gaussian, fixed in advance.
    Source: Doroshenko et al. 2022 (arXiv 2207.04380).
    """
    from dp_accounting.pld import privacy_loss_distribution

    by_rdp = our_rdp_epsilon(mechanisms, delta)
    if not certifiable(mechanisms, delta, by_rdp):
        return math.inf
    width = grid_width(mechanisms, by_rdp)
    total = privacy_loss_distribution.identity(width)
    for rate, noise, steps in mechanisms:
        if rate == 1:
            part = _loss(1.0, noise / math.sqrt(steps), width, relation)
        else:
            part = _loss(rate, noise, width, relation).self_compose(steps)
        total = total.compose(part)
    return max(0.0, float(total.get_epsilon_for_delta(reserved(delta))))


def certifiable(mechanisms: Mechanisms, delta: float, epsilon: float) -> bool:
    """Return whether loss distributions can say anything about mechanisms that cost about `epsilon`."""
    return delta >= LEAST_PLD_DELTA and len(mechanisms) <= MOST_MECHANISMS and epsilon <= MOST_PLD_EPSILON


def grid_width(mechanisms: Mechanisms, epsilon: float) -> float:
    """Return the width of a cell of the privacy loss grid.

    The more steps are composed, the finer it must be to stay tight; the larger epsilon, the coarser it may be, so that the
    grid has at most some 200,000 cells up to epsilon.
    """
    steps = sum(count for _, _, count in mechanisms)
    return max(5e-4 if steps <= 1000 else 1e-4, epsilon / 200_000)


@functools.lru_cache(maxsize=16)
def _loss(rate: float, noise: float, width: float, relation: str) -> Any:  # noqa: ANN401  dp-accounting has no types
    """Return the loss distribution of one step; making it takes longer than composing it ten thousand times."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=noise,
        value_discretization_interval=width,
        sampling_prob=rate,
        neighboring_relation=NeighboringRelation[relation],
    )
