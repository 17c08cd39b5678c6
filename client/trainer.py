"""One site's private training: DP-SGD on the adapter.

In each step every person is drawn with probability q, on her own; her gradient is the mean over her rows and is
clipped; the clipped gradients are summed in integers, noise is added once, and the sum is divided by the constant q·N.
What follows (FedProx's pull, Adam, the server, the ring) is post-processing. A step whose draw is empty is noise alone,
and is taken and counted as any other.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from confide.client.gradients import GRID_BITS, PersonGradients
from confide.client.mechanism import Delta, Mechanism, Randomness
from confide.client.noise import drawn, rounded_gaussian
from confide.common.adapter import Floats
from confide.common.errors import PrivacyError
from confide.common.model import AdaptedModel
from confide.common.plan import Training


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What the site saw of its own training; exact, so it stays in the site.

    Attributes:
        batch_sizes: Persons drawn in each step.
        clipped: Person-gradients that were scaled down.
        non_finite: Person-gradients that were not finite and hence counted as zero.
    """

    batch_sizes: tuple[int, ...]
    clipped: int
    non_finite: int


def train(
    gradients: PersonGradients,
    start: Floats,
    mechanism: Mechanism,
    training: Training,
    randomness: Randomness,
    number: int = 1,
    before_step: Callable[[int], None] | None = None,
) -> tuple[Delta, Evidence]:
    """Return what round `number` of private training made of `start`.

    Args:
        gradients: The site's model and examples.
        start: The global adapter, (d,), float32.
        mechanism: Sampling, clipping and noise.
        training: Optimizer and learning rates.
        randomness: Fresh for this round.
        number: The round's number, from 1; some methods train other factors in other rounds.
        before_step: Called with each step's number, from 1, before the step draws persons or looks at a row.

    Guarantee: the delta is post-processing of `mechanism.steps` Poisson-subsampled Gaussian mechanisms of sensitivity
    clip_norm per person, whatever the data; `mechanism.spend` is its cost.
    Source: Abadi et al. 2016 (arXiv 1607.00133), Algorithm 1, with Poisson sampling and a constant divisor. FedProx: Li et
    al. 2020 (arXiv 1812.06127), Sec. 3.2; its pull toward the round's start looks at no row and acts outside the clip.
    """
    model = gradients.model
    model.write(start)
    active = model.active(number)
    before = {name: model.trainable[name].detach().clone() for name in active}
    optimizer = _optimizer(model, active, training)
    sizes, clipped, non_finite = [], 0, 0
    for step in range(1, mechanism.steps + 1):
        if before_step is not None:
            before_step(step)
        persons = drawn(randomness, mechanism.sampling_rate, gradients.person_count)
        if mechanism.private:
            total = gradients.clipped_sum(persons, mechanism.clip_norm, active)
            gradient = _noised(total.steps, mechanism, randomness)
            clipped, non_finite = clipped + total.clipped, non_finite + total.non_finite
        else:
            gradient = gradients.insecure_sum(persons, active)
        _set_gradient(model, active, gradient / mechanism.divisor)
        for name in active if training.proximal else ():
            parameter = model.trainable[name]
            parameter.grad.add_(parameter.detach() - before[name], alpha=training.proximal)  # type: ignore[union-attr]
        optimizer.step()
        model.settle()
        sizes.append(len(persons))
    delta = Delta(values=model.read() - start)
    return delta, Evidence(batch_sizes=tuple(sizes), clipped=clipped, non_finite=non_finite)


def _noised(steps: npt.NDArray[np.int64], mechanism: Mechanism, randomness: Randomness) -> npt.NDArray[np.float64]:
    """Return the sum with its noise, in the gradients' own unit.

    The sum is whole, so that adding rounded noise is rounding what an exact Gaussian was added to.
    """
    noise = rounded_gaussian(randomness, mechanism.noise_multiplier * 2**GRID_BITS, len(steps))
    noised: npt.NDArray[np.float64] = (steps + noise) * (mechanism.clip_norm / 2**GRID_BITS)
    return noised


def _optimizer(model: AdaptedModel, active: tuple[str, ...], training: Training) -> torch.optim.Optimizer:
    groups = [
        {
            "params": [model.trainable[name] for name in active if (name in model.head) == is_head],
            "lr": training.head_learning_rate if is_head else training.learning_rate,
        }
        for is_head in (False, True)
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.Adam(groups) if training.optimizer == "adam" else torch.optim.SGD(groups)


def _set_gradient(model: AdaptedModel, active: tuple[str, ...], gradient: npt.NDArray[np.float64]) -> None:
    if not np.isfinite(gradient).all():
        raise PrivacyError("The noised gradient is not finite; the round is given up before anything leaves.")
    start = 0
    for name in active:
        parameter = model.trainable[name]
        part = gradient[start : start + parameter.numel()].astype(np.float32)
        parameter.grad = torch.from_numpy(part).view(parameter.shape).to(parameter)
        start += parameter.numel()
