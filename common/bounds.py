"""How large a site's update may be in the ring: what a plan says, or what it predicts of noise and signal."""

import itertools
import math
from collections.abc import Iterable, Iterator

from confide.common.adapter import Layout
from confide.common.calibration import noise_multiplier
from confide.common.plan import Federation, Plan
from confide.common.ring import RingLayout

BOUND_PER_NORM = 3  # the default update_bound, in predicted norms
BOUND_PER_RMS = 8  # a segment's bound, in predicted rms values of its entries


def ring_layout(plan: Plan, layout: Layout, head: Iterable[str]) -> RingLayout:
    """Return the ring layout of a plan for an adapter of this layout, `head` naming the head's tensors.

    With 32 bits the update bound is the plan's, or else BOUND_PER_NORM times `predicted_norm`. With 16 bits a segment
    is a run of tensors with one learning rate, bounded by BOUND_PER_RMS times the predicted rms of its entries.
    """
    federation = plan.federation
    if federation.ring_bits == 32:
        bound = federation.update_bound or BOUND_PER_NORM * predicted_norm(plan, layout, head)
        return RingLayout(length=layout.length, update_bound=bound, max_sites=federation.max_sites)
    segments = []
    for rate, run in itertools.groupby(_rates(plan, layout, head), key=lambda entry: entry[1]):
        noise, signal = predicted(plan, rate)
        rms = noise + signal / math.sqrt(layout.length)
        segments.append((sum(size for size, _ in run), BOUND_PER_RMS * rms))
    return RingLayout(length=layout.length, max_sites=federation.max_sites, bits=16, segments=tuple(segments))


def reach(federation: Federation, ring: RingLayout, rounds: int) -> float:
    """Return how far an adapter can be from its start, in L2, after so many rounds of a server that keeps to the plan.

    Each round's mean update is within the ring's bound. FedAvg takes it times the server's step size; momentum β adds at
    most 1 / (1 - β) of them up; Adam moves a number by at most 10 (1 - β) √(Σ_k (β² / 0.99)^k) step sizes, by the
    inequality of Cauchy and Schwarz between its two moments.
    """
    bound = (
        math.sqrt(sum(size * limit**2 for size, limit in ring.segments)) if ring.segments else ring.update_bound or 0
    )
    beta = 0.9 if federation.server_momentum is None else federation.server_momentum
    match federation.server_optimizer:
        case "fedavgm":
            bound *= min(rounds, 1 / (1 - beta))
        case "fedadam":
            moments = math.sqrt(sum((beta**2 / 0.99) ** k for k in range(rounds)))
            bound = math.sqrt(ring.length) * 10 * (1 - beta) * moments
    return 1.01 * rounds * federation.server_learning_rate * bound  # a hundredth for rounding


def predicted_norm(plan: Plan, layout: Layout, head: Iterable[str]) -> float:
    """Return the L2 norm of noise and signal that a round's update is predicted to have at the smallest allowed site."""
    moves = [(size, *predicted(plan, rate)) for size, rate in _rates(plan, layout, head)]
    return math.sqrt(sum(size * noise**2 for size, noise, _ in moves)) + max(signal for _, _, signal in moves)


def predicted(plan: Plan, learning_rate: float) -> tuple[float, float]:
    """Return (noise, signal): how far a round moves the numbers of one learning rate at the smallest allowed site.

    Noise is the root of the mean square of one number. With Adam it is min(T, 1.2 √T) learning rates after T steps,
    whatever the gradients' noise: measured, and right within 25 % from 1 to 256 steps. With SGD it is √T learning rates
    times σ × clip_norm / divisor.

    Signal is an L2 norm: with SGD that of T gradients of length clip_norm that all point the same way. With Adam it is
    0: gradients that all agree move a number by T learning rates, which BOUND_PER_NORM covers up to 12 steps and
    BOUND_PER_RMS up to 92; updates beyond are scaled down or cut, and the round's record says so.
    """
    privacy, steps = plan.privacy, plan.privacy.steps_per_round
    if plan.training.optimizer == "adam":
        return min(steps, 1.2 * math.sqrt(steps)) * learning_rate, 0.0
    divisor = privacy.sampling_rate * privacy.min_persons
    noise = math.sqrt(steps) * noise_multiplier(privacy) * privacy.clip_norm / divisor
    return noise * learning_rate, steps * privacy.clip_norm * learning_rate


def _rates(plan: Plan, layout: Layout, head: Iterable[str]) -> Iterator[tuple[int, float]]:
    """Yield (size, learning rate) of each tensor, in the layout's order."""
    names, training = frozenset(head), plan.training
    for name, shape in layout.tensors:
        yield math.prod(shape), training.head_learning_rate if name in names else training.learning_rate
