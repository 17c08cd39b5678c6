"""What is done to gradients in one round, what it costs, and what comes of it; no torch.

The agent knows training by these types only. `client/trainer` is what trains.
"""

import dataclasses
import math
from typing import Protocol

import numpy as np
import numpy.typing as npt

from confide.common.adapter import Floats
from confide.common.calibration import noise_multiplier
from confide.common.errors import RunError
from confide.common.plan import Privacy
from confide.common.spend import Spend


class Randomness(Protocol):
    """Where one round's draws come from. Real sites take fresh entropy; seeded kinds say so in their name."""

    name: str

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """Return independent uniform 64-bit words, (count,)."""
        ...

    def rounding_key(self) -> bytes:
        """Return the key, 32 bytes, of the keystream that updates are rounded with."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mechanism:
    """What is done to gradients in one round.

    Attributes:
        sampling_rate: q.
        clip_norm: Largest L2 norm of a person's gradient; infinite only without privacy.
        noise_multiplier: σ; noise has the standard deviation σ × clip_norm. 0 only without privacy.
        steps: Steps in the round.
        divisor: q·N with the declared N, a constant.
    """

    sampling_rate: float
    clip_norm: float
    noise_multiplier: float
    steps: int
    divisor: float

    @classmethod
    def of(cls, privacy: Privacy, declared_persons: int) -> "Mechanism":
        """Return the plan's mechanism at a site that declares so many persons."""
        return cls(
            sampling_rate=privacy.sampling_rate,
            clip_norm=privacy.clip_norm,
            noise_multiplier=noise_multiplier(privacy),
            steps=privacy.steps_per_round,
            divisor=privacy.sampling_rate * declared_persons,
        )

    @property
    def private(self) -> bool:
        """Whether gradients are clipped and noised at all."""
        return self.noise_multiplier > 0 and self.clip_norm < math.inf

    def insecure_no_noise(self) -> "Mechanism":
        """Return the same without clipping and noise: no privacy at all, for comparisons in simulations."""
        return dataclasses.replace(self, clip_norm=math.inf, noise_multiplier=0.0)

    def spend(self, number: int, randomness: str) -> Spend:
        """Return what round `number` costs.

        Raises:
            PrivacyError: The mechanism has no privacy, so no cost can be named.
        """
        return Spend(
            round=number,
            sampling_rate=self.sampling_rate,
            noise_multiplier=self.noise_multiplier,
            steps=self.steps,
            clip_norm=self.clip_norm,
            divisor=self.divisor,
            noise=randomness,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Delta:
    """New trainable weights minus received ones. It has no encoder: it cannot be sent."""

    values: Floats

    def __repr__(self) -> str:
        return f"<Delta of {len(self.values)} values>"


class GivenUp(RunError):  # noqa: N818  what became of the round
    """A round's training ended without a result.

    Attributes:
        steps_begun: How many of its steps may have looked at rows; all of them where that is not known.
    """

    def __init__(self, message: str, steps_begun: int) -> None:
        self.steps_begun = steps_begun
        super().__init__(message)


class Trainer(Protocol):
    """What an agent needs of whatever trains for it."""

    person_count: int
    layout_digest: str
    start: Floats

    def train(self, number: int, start: Floats, mechanism: Mechanism, randomness: Randomness) -> Delta:
        """Return what round `number` of private training made of `start`.

        Raises:
            GivenUp: It ended without a result, and not all of its steps had begun.
        """
        ...

    def evidence_of(self, number: int) -> bytes:
        """Return what was measured of round `number`'s training, as canonical JSON; nothing if nothing is known of it.

        It is exact, so it never leaves the site.
        """
        ...
