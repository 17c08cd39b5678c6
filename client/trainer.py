"""One site's private training: DP-SGD on the adapter, with Opacus's per-example gradients.

In each step every person is drawn with probability q, on her own; her gradient is the mean over her rows and is
clipped; the clipped gradients are summed, noise is added once, and the sum is divided by the constant q·N. What
follows (Adam, the server, the ring) is post-processing. A step whose draw is empty is noise alone, and is taken and
counted as any other.
"""

import dataclasses
from collections.abc import Sequence
from contextlib import closing

import numpy as np
import numpy.typing as npt
import torch
from opacus.grad_sample import GradSampleHooks
from torch import nn
from torch.nn import functional as F

from confide.client.mechanism import Delta, Mechanism, Randomness
from confide.common.adapter import Floats
from confide.common.errors import DataError, ModelError, PrivacyError
from confide.common.examples import Examples, Ints
from confide.common.model import AdaptedModel, PrefixCache
from confide.common.plan import Training

_SUPPORTED = (nn.Linear, nn.LayerNorm)
_MIXES_ROWS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClippedSum:
    """The sum of clipped person-gradients, (d,), float64. Sensitive: to be noised and forgotten at once."""

    values: npt.NDArray[np.float64]
    clipped: int
    non_finite: int

    def __repr__(self) -> str:
        return f"<ClippedSum of {len(self.values)} values>"


def train(
    gradients: "PersonGradients",
    start: Floats,
    mechanism: Mechanism,
    training: Training,
    randomness: Randomness,
) -> tuple[Delta, Evidence]:
    """Return what one round of private training made of `start`.

    Args:
        gradients: The site's model and examples.
        start: The global adapter, (d,), float32.
        mechanism: Sampling, clipping and noise.
        training: Optimizer and learning rates.
        randomness: Fresh for this round.

    Guarantee: the delta is post-processing of `mechanism.steps` Poisson-subsampled Gaussian mechanisms of sensitivity
    clip_norm per person, whatever the data; `mechanism.spend` is its cost.
    Source: Abadi et al. 2016 (arXiv 1607.00133), Algorithm 1, with Poisson sampling and a constant divisor.
    """
    model = gradients.model
    model.write(start)
    optimizer = _optimizer(model, training)
    sizes, clipped, non_finite = [], 0, 0
    with closing(gradients):
        for _ in range(mechanism.steps):
            drawn = np.flatnonzero(randomness.uniforms(gradients.person_count) < mechanism.sampling_rate)
            total = gradients.clipped_sum(drawn, mechanism.clip_norm)
            _set_gradient(model, _noised(total, mechanism, randomness) / mechanism.divisor)
            optimizer.step()
            sizes.append(len(drawn))
            clipped, non_finite = clipped + total.clipped, non_finite + total.non_finite
    delta = Delta(values=model.read() - start)
    return delta, Evidence(batch_sizes=tuple(sizes), clipped=clipped, non_finite=non_finite)


def _noised(total: ClippedSum, mechanism: Mechanism, randomness: Randomness) -> npt.NDArray[np.float64]:
    if mechanism.noise_multiplier == 0:
        return total.values
    deviation = mechanism.noise_multiplier * mechanism.clip_norm
    return total.values + deviation * randomness.gaussian(len(total.values))


class PrivateTrainer:
    """Trains one site's rows by DP-SGD, as `train` does.

    Args:
        model: The base model with the adapter; several sites of a simulation may share one.
        examples: The site's rows, at least one.
        cache: Where the frozen prefix of the rows lies, if it was computed.
    """

    def __init__(self, model: AdaptedModel, examples: Examples, cache: PrefixCache | None = None) -> None:
        self._gradients = PersonGradients(model, examples, cache, model.plan.compute.micro_batch)
        self.person_count = examples.person_count
        self.layout_digest = model.layout.digest

    def train(self, start: Floats, mechanism: Mechanism, randomness: Randomness) -> Delta:
        """Return what one round of private training made of `start`."""
        delta, _ = train(self._gradients, start, mechanism, self._gradients.model.plan.training, randomness)
        return delta


class PersonGradients:
    """Per-person gradients of one site's examples on one model.

    Hooks are on the model from the first gradient until `close`, so that sites may take turns on a shared model.

    Args:
        model: The base model with the adapter.
        examples: The site's rows, at least one.
        cache: Where the frozen prefix of the rows lies, if it was computed.
        micro_batch: Rows that go through the model at once; it changes speed and memory only.

    Raises:
        DataError: There are no rows.
        ModelError: A trainable weight belongs to a module without exact per-example gradients.
    """

    def __init__(
        self, model: AdaptedModel, examples: Examples, cache: PrefixCache | None = None, micro_batch: int = 64
    ) -> None:
        if len(examples) == 0:
            raise DataError("A site without rows cannot train. Give it rows, or leave it out.")
        self.model = model
        self.person_count = examples.person_count
        self._examples = examples
        self._cache = cache
        self._micro_batch = micro_batch
        _check_supported(model)
        self._rows = np.argsort(examples.persons, kind="stable")  # person after person
        self._row_counts = np.bincount(examples.persons)
        self._first_row = np.cumsum(self._row_counts) - self._row_counts
        self._longest = np.maximum.reduceat(examples.lengths[self._rows], self._first_row)
        self._hooks: GradSampleHooks | None = None

    def close(self) -> None:
        """Take the hooks off the model."""
        if self._hooks is not None:
            self._hooks.cleanup()
            self._hooks = None

    def _open(self) -> None:
        if self._hooks is None:
            # Not strict: frozen modules may hold buffers, such as position numbers; trainable ones are checked above.
            self._hooks = GradSampleHooks(self.model.network, loss_reduction="sum", strict=False)
            self._hooks.enable_hooks()

    def clipped_sum(self, persons: Ints, clip_norm: float) -> ClippedSum:
        """Return the sum of the given persons' clipped gradients; no persons give zeros.

        A person's gradient is the mean over her rows, accumulated over micro-batches before it is clipped. Rows run
        through the model sorted by length, which changes nothing but the padding.

        Args:
            persons: Numbers of persons, each at most once.
            clip_norm: Above 0; infinite for no clipping.

        Guarantee: adding or removing one person changes the sum by at most clip_norm in L2, up to float rounding. A
        gradient that is not finite counts as zero.
        """
        self._open()
        dtype = next(iter(self.model.trainable.values())).dtype
        total = torch.zeros(self.model.layout.length, dtype=dtype, device=self.model.device)
        carry = torch.zeros_like(total)  # what earlier micro-batches hold of the first person of the next
        clipped = non_finite = 0
        ordered = persons[np.argsort(self._longest[persons], kind="stable")]
        counts = self._row_counts[ordered]
        owner = np.repeat(np.arange(len(ordered)), counts)  # (rows,): whose row it is, in the order of `ordered`
        rows = self._rows[
            np.arange(len(owner)) + np.repeat(self._first_row[ordered] - np.cumsum(counts) + counts, counts)
        ]
        for start in range(0, len(rows), self._micro_batch):
            window = slice(start, start + self._micro_batch)
            owners = owner[window]
            gradient = self._person_sums(rows[window], owners)  # (persons in window, d)
            gradient[0] += carry
            carry.zero_()
            if window.stop < len(rows) and owner[window.stop] == owners[-1]:
                carry += gradient[-1]
                gradient = gradient[:-1]
            finite = torch.isfinite(gradient).all(dim=1)
            gradient[~finite] = 0
            norms = torch.linalg.vector_norm(gradient, dim=1, dtype=torch.float64)  # (persons,)
            factors = torch.clamp(clip_norm / norms, max=1.0)  # a norm of 0 gives infinity, hence 1
            total += factors.to(dtype) @ gradient
            clipped += int((norms > clip_norm).sum())
            non_finite += int((~finite).sum())
        return ClippedSum(values=total.double().cpu().numpy(), clipped=clipped, non_finite=non_finite)

    def _person_sums(self, rows: Ints, owners: Ints) -> torch.Tensor:
        """Return, for each person in `owners`, the sum over the given rows of her mean-weighted gradients."""
        weights = 1.0 / self._row_counts[self._examples.persons[rows]]
        logits = self.model.logits(self._examples, rows, self._cache)
        labels = torch.from_numpy(self._examples.labels[rows]).to(logits.device)
        # One loss per row, never the model's own: a mean over the batch would tie rows to their neighbours.
        losses = F.cross_entropy(logits, labels, reduction="none")  # (rows,)
        (losses * torch.from_numpy(weights).to(losses)).sum().backward()  # type: ignore[no-untyped-call]
        per_row = []
        for name, parameter in self.model.trainable.items():
            sample = getattr(parameter, "grad_sample", None)
            if sample is None or len(sample) != len(rows):
                raise ModelError(
                    f"No per-example gradient was computed for {name}; this model cannot be trained privately."
                )
            per_row.append(sample.reshape(len(rows), -1))
            parameter.grad_sample = parameter.grad = None
        gradients = torch.cat(per_row, dim=1)  # (rows, d)
        _, line = np.unique(owners, return_inverse=True)
        sums = gradients.new_zeros(int(line[-1]) + 1, gradients.shape[1])
        return sums.index_add_(0, torch.from_numpy(line).to(gradients.device), gradients)


def _check_supported(model: AdaptedModel) -> None:
    mixing = sorted({type(m).__name__ for m in model.network.modules() if isinstance(m, _MIXES_ROWS)})
    if mixing:
        raise ModelError(
            f"The base model holds {', '.join(mixing)}, which mixes the rows of a batch: one person would change another's "
            "gradient. Use a model without batch statistics."
        )
    owners: dict[int, nn.Module] = {}
    for module in model.network.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = module
    unsupported: Sequence[str] = [
        f"{name} ({type(owners[id(p)]).__name__})"
        for name, p in model.trainable.items()
        if not isinstance(owners[id(p)], _SUPPORTED)
    ]
    if unsupported:
        raise ModelError(
            f"Per-example gradients are exact for {', '.join(m.__name__ for m in _SUPPORTED)} only; these trainable "
            f"weights belong to others: {', '.join(unsupported)}. Choose other [adapter] targets."
        )


def _optimizer(model: AdaptedModel, training: Training) -> torch.optim.Optimizer:
    groups = [
        {
            "params": [p for name, p in model.trainable.items() if (name in model.head) == is_head],
            "lr": training.head_learning_rate if is_head else training.learning_rate,
        }
        for is_head in (False, True)
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.Adam(groups) if training.optimizer == "adam" else torch.optim.SGD(groups)


def _set_gradient(model: AdaptedModel, gradient: npt.NDArray[np.float64]) -> None:
    if not np.isfinite(gradient).all():
        raise PrivacyError("The noised gradient is not finite; the round is given up before anything leaves.")
    for name, part in model.layout.split(gradient.astype(np.float32)).items():
        parameter = model.trainable[name]
        parameter.grad = torch.from_numpy(np.ascontiguousarray(part)).to(parameter)
