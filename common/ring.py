"""Float vectors as integers modulo 2^32, so that a sum of many is exact and can be masked.

A site's update is bounded in L2 norm, scaled, rounded to integers and written modulo 2^32. Sums of such vectors
are exact; the sum of at most `max_sites` of them cannot wrap, which `RingLayout` proves before a round begins.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Self

import numpy as np
import numpy.typing as npt

from confide.common.accounting import noise_multiplier
from confide.common.adapter import Layout
from confide.common.canonical import canonical_bytes, sha256
from confide.common.errors import MessageError, PlanError
from confide.common.plan import Plan

RING_BITS = 32
_BLOCK = 1 << 14  # entries encoded at once

Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint32]
# Draws that many independent uniforms in [0, 1), float64.
Uniforms = Callable[[int], npt.NDArray[np.float64]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RingLayout:
    """How a vector is laid out in the ring; equal at all sites and the server.

    Attributes:
        length: Entries of the vector.
        update_bound: Largest L2 norm that is encoded.
        max_sites: How many vectors may be summed.
    """

    length: int
    update_bound: float
    max_sites: int

    def __post_init__(self) -> None:
        if self.length < 1 or self.max_sites < 1 or not 0 < self.update_bound < math.inf:
            raise PlanError(
                f"A ring of {self.length} entries, bound {self.update_bound:g} and {self.max_sites} sites cannot be: "
                "all three must be positive and finite."
            )
        if not math.isfinite(self.scale):
            raise PlanError(
                f"The update bound {self.update_bound:g} is too small to be written in integers. "
                "Raise [federation] update_bound or the learning rates."
            )
        if self.largest < 1:
            raise PlanError(
                f"A {RING_BITS}-bit ring has no room for the sum of {self.max_sites} sites. "
                "Lower [federation] max_sites."
            )

    @property
    def largest(self) -> int:
        """The largest magnitude an entry may have, so that max_sites × (largest + 1) stays below 2^31.

        The + 1 is what stochastic rounding may add. Hence the sum of max_sites vectors never wraps.
        """
        return int(2 ** (RING_BITS - 1) - 1) // self.max_sites - 1

    @property
    def scale(self) -> float:
        """Ring units per unit of the vector."""
        return self.largest / self.update_bound

    @property
    def digest(self) -> str:
        """SHA-256 over the layout."""
        return sha256(canonical_bytes({"format": "confide-ring/1", "bits": RING_BITS, **dataclasses.asdict(self)}))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RingVector:
    """One site's update in the ring. It is not masked yet, so it has no way out of the site."""

    words: Words
    layout: RingLayout
    bounded: bool  # whether the update was longer than update_bound and had to be scaled down

    def __repr__(self) -> str:
        return f"<RingVector of {self.layout.length} entries>"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RingSum:
    """The exact sum of `count` ring vectors."""

    words: Words
    layout: RingLayout
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.count <= self.layout.max_sites:
            raise MessageError(
                f"A sum of {self.count} vectors was offered; the ring has room for 1 to {self.layout.max_sites}."
            )
        if self.words.shape != (self.layout.length,) or self.words.dtype != np.uint32:
            raise MessageError(
                f"A sum of shape {self.words.shape}, {self.words.dtype} was offered; "
                f"({self.layout.length},), uint32 was due."
            )

    def __repr__(self) -> str:
        return f"<RingSum of {self.count} vectors of {self.layout.length} entries>"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Update:
    """The mean of the sites' updates: what the server learns of a round.

    Attributes:
        mean: (length,), float32.
        count: How many sites are in it.
    """

    mean: Floats
    count: int

    @classmethod
    def decode(cls, total: RingSum) -> Self:
        """Return the mean update that a sum stands for; the exact inverse of the scale, up to float32 rounding."""
        signed = total.words.view(np.int32).astype(np.float64)
        return cls(mean=(signed / (total.layout.scale * total.count)).astype(np.float32), count=total.count)


def ring_layout(plan: Plan, layout: Layout, head: Iterable[str]) -> RingLayout:
    """Return the ring layout of a plan for an adapter of this layout, `head` naming the head's tensors.

    The update bound is the plan's, or else follows from it: with Adam a coordinate moves by at most about its learning
    rate per step; with SGD it is three times the predicted norm of signal and noise at the smallest allowed site.
    """
    bound = plan.federation.update_bound
    if bound is None:
        names = frozenset(head)
        training, privacy = plan.training, plan.privacy
        squares = sum(
            math.prod(shape) * (training.head_learning_rate if name in names else training.learning_rate) ** 2
            for name, shape in layout.tensors
        )
        if training.optimizer == "adam":
            bound = privacy.steps_per_round * math.sqrt(squares)
        else:
            divisor = privacy.sampling_rate * privacy.min_persons
            noise = (
                math.sqrt(squares * privacy.steps_per_round) * noise_multiplier(privacy) * privacy.clip_norm / divisor
            )
            signal = max(training.learning_rate, training.head_learning_rate)
            bound = 3 * (noise + signal * privacy.steps_per_round * privacy.clip_norm)
    return RingLayout(length=layout.length, update_bound=bound, max_sites=plan.federation.max_sites)


def encode(update: Floats, layout: RingLayout, uniforms: Uniforms) -> RingVector:
    """Return `update` in the ring, unbiased: the expected decoded value is the update, scaled down if too long.

    Args:
        update: (length,), float32, finite.
        layout: The ring's layout.
        uniforms: Where stochastic rounding takes its randomness from.

    Raises:
        MessageError: The vector has another length or holds a value that is not finite.

    Source: stochastic rounding as in Bonawitz et al. 2017 (arXiv 1611.04482) followed by Agarwal et al. 2018.
    """
    if update.shape != (layout.length,):
        raise MessageError(f"An update of shape {update.shape} was to be encoded; ({layout.length},) was due.")
    blocks = [slice(start, start + _BLOCK) for start in range(0, layout.length, _BLOCK)]  # each stays in the cache
    norm = math.sqrt(sum(float(np.dot(v, v)) for v in (update[block].astype(np.float64) for block in blocks)))
    if not math.isfinite(norm):
        raise MessageError("An update with a value that is not finite was to be encoded.")
    bounded = norm > layout.update_bound
    factor = layout.scale * (layout.update_bound / norm if bounded else 1.0)
    words = np.empty(layout.length, np.int32)
    for block in blocks:
        values = update[block].astype(np.float64)
        values *= factor
        below = np.floor(values)
        values -= below
        words[block] = below  # the layout proves that it fits, with the one that rounding may add
        words[block] += uniforms(len(values)) < values
    return RingVector(words=words.view(np.uint32), layout=layout, bounded=bounded)
