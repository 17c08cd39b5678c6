"""Per-person gradients: each person's own, clipped, rounded to a grid, and summed in integers.

All rows of a person count together: her gradient is the mean over her rows. It is clipped, and then cut toward zero to
multiples of clip_norm / 2^30, so that it never grows; the sum is exact whatever its order. What noise is added to is
thus a vector of integers, of which one person changes at most 2^30 in L2.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from confide.client.recorder import Recorder
from confide.common.errors import DataError, ModelError
from confide.common.examples import Examples, Ints
from confide.common.model import AdaptedModel
from confide.common.objective import losses
from confide.common.prefix import PrefixCache

GRID_BITS = 30  # a person's clipped gradient is at most 2^30 grid steps long
MOST_PERSONS = 1 << 30  # so that no sum of so many grows beyond 63 bits


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClippedSum:
    """The sum of clipped person-gradients. Sensitive: to be noised and forgotten at once.

    Attributes:
        steps: (d,), int64, in grid steps.
        grid: The grid's step, clip_norm / 2^30.
        clipped: Person-gradients that were scaled down.
        non_finite: Person-gradients that were not finite and hence count as zero.
    """

    steps: npt.NDArray[np.int64]
    grid: float
    clipped: int
    non_finite: int

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """The sum in the gradients' own unit, (d,)."""
        return self.steps.astype(np.float64) * self.grid

    def __repr__(self) -> str:
        return f"<ClippedSum of {len(self.steps)} values>"


class PersonGradients:
    """Per-person gradients of one site's examples on one model.

    Args:
        model: The base model with the adapter.
        examples: The site's rows, at least one.
        cache: Where the frozen prefix of the rows lies, if it was computed.
        micro_batch: The most rows that go through the model at once; it changes speed and memory only.

    Raises:
        DataError: There are no rows, or too many persons.
        ModelError: A trained weight belongs to a layer without exact per-row gradients, or the cache to another model.
    """

    def __init__(
        self, model: AdaptedModel, examples: Examples, cache: PrefixCache | None = None, micro_batch: int | None = None
    ) -> None:
        if len(examples) == 0:
            raise DataError("A site without rows cannot train. Give it rows, or leave it out.")
        if examples.person_count > MOST_PERSONS:
            raise DataError(f"A site may have at most {MOST_PERSONS} persons; it has {examples.person_count}.")
        if cache is not None and cache.model is not model:
            raise ModelError(
                "The prefix cache belongs to another model. Take one beside this model: cache.beside(model)."
            )
        self.model = model
        self.person_count = examples.person_count
        self._examples = examples
        self._cache = cache
        self._most_rows = micro_batch or model.plan.compute.micro_batch
        self._recorder = Recorder(model)
        self._rows = np.argsort(examples.persons, kind="stable")  # person after person
        self._row_counts = np.bincount(examples.persons)
        self._first_row = np.cumsum(self._row_counts) - self._row_counts
        self._longest = np.maximum.reduceat(examples.lengths[self._rows], self._first_row)
        # Norms and sums are float64, which Apple's GPUs lack.
        self._where = torch.device("cpu") if model.device.type == "mps" else model.device

    def clipped_sum(self, persons: Ints, clip_norm: float, active: tuple[str, ...] | None = None) -> ClippedSum:
        """Return the sum of the given persons' clipped gradients; no persons give zeros.

        A person's gradient is the mean over her rows, accumulated over micro-batches before it is clipped. Rows run
        through the model sorted by length, which changes nothing but the padding.

        Args:
            persons: Numbers of persons, each at most once.
            clip_norm: Above 0, finite.
            active: The parameters whose gradients are taken, sorted as the model's; all if absent.

        Guarantee: each person's part of the sum is at most 2^30 grid steps long in L2, that is clip_norm, exactly. A
        gradient that is not finite counts as zero.
        """
        active = tuple(self.model.trainable) if active is None else active
        width = sum(self.model.trainable[name].numel() for name in active)
        total = torch.zeros(width, dtype=torch.int64, device=self._where)
        clipped = non_finite = 0
        with self._recorder.on(active):
            for gradients in self._of_each(persons, width):
                norms = _norms(gradients)
                finite = torch.isfinite(norms)
                gradients[~finite] = 0
                total += _grid_sum(gradients, norms, clip_norm)
                clipped += int((norms[finite] > clip_norm).sum())
                non_finite += int((~finite).sum())
        return ClippedSum(
            steps=total.cpu().numpy(), grid=clip_norm / 2**GRID_BITS, clipped=clipped, non_finite=non_finite
        )

    def insecure_sum(self, persons: Ints, active: tuple[str, ...] | None = None) -> npt.NDArray[np.float64]:
        """Return the sum of the given persons' gradients as they are, (d,), neither clipped nor rounded: no privacy."""
        active = tuple(self.model.trainable) if active is None else active
        width = sum(self.model.trainable[name].numel() for name in active)
        total = torch.zeros(width, dtype=torch.float64, device=self._where)
        with self._recorder.on(active):
            for gradients in self._of_each(persons, width):
                total += gradients.sum(dim=0, dtype=torch.float64)
        return total.cpu().numpy()

    def _of_each(self, persons: Ints, width: int) -> Iterator[torch.Tensor]:
        """Yield the persons' gradients, (some persons, width), the persons with the shortest rows first.

        The recorder must be on the model.
        """
        ordered = persons[np.argsort(self._longest[persons], kind="stable")]
        counts = self._row_counts[ordered]
        owner = np.repeat(np.arange(len(ordered)), counts)  # (rows,): whose row it is, in the order of `ordered`
        rows = self._rows[
            np.arange(len(owner)) + np.repeat(self._first_row[ordered] - np.cumsum(counts) + counts, counts)
        ]
        carry = torch.zeros(width, dtype=self.model.dtype, device=self._where)
        for window in self._windows(rows, width):
            owners = owner[window]
            gradients = self._person_sums(rows[window], owners, width)
            gradients[0] += carry  # what earlier micro-batches hold of the first person
            carry.zero_()
            if window.stop < len(rows) and owner[window.stop] == owners[-1]:
                carry += gradients[-1]
                gradients = gradients[:-1]
            yield gradients

    def _windows(self, rows: Ints, width: int) -> Iterator[slice]:
        """Yield windows of `rows` that fit into the plan's memory together, each at least one row."""
        start, lengths = 0, self._examples.lengths[rows]
        budget = self.model.plan.compute.memory_mb * 2**20
        while start < len(rows):
            longest = np.maximum.accumulate(lengths[start : start + self._most_rows])
            needed = np.arange(1, len(longest) + 1) * (
                self.model.row_bytes(longest) + 2 * width * self.model.dtype.itemsize
            )
            fitting = max(1, int(np.searchsorted(needed, budget, side="right")))
            yield slice(start, min(start + fitting, len(rows)))
            start += fitting

    def _person_sums(self, rows: Ints, owners: Ints, width: int) -> torch.Tensor:
        """Return, for each person in `owners`, the sum over the given rows of her mean-weighted gradients.

        What is not finite is computed again, row by row: numbers may overflow at padding, where nothing was made to keep
        them small, and alone a row has none. So whether a row counts does not depend on the rows beside it.
        """
        line = np.cumsum(np.diff(owners, prepend=owners[0]) != 0)  # (rows,): owners are in order
        sums = self._sums_together(rows, line, width, self._cache)
        if len(rows) > 1:
            for person in np.flatnonzero(~torch.isfinite(sums.sum(dim=1)).cpu().numpy()):
                sums[person] = 0
                for row in rows[line == person]:
                    sums[person] += self._sums_together(np.array([row]), np.zeros(1, np.int64), width, None)[0]
        return sums

    def _sums_together(self, rows: Ints, line: Ints, width: int, cache: PrefixCache | None) -> torch.Tensor:
        """Return the sums over the rows of each line of their mean-weighted gradients, (lines, width)."""
        batch = self._examples.batch(rows)
        logits = self.model.forward(batch) if cache is None else cache.forward(self._examples, rows, batch)
        each = losses(self.model.plan.task.kind, logits, batch)  # (rows,)
        weights = 1.0 / self._row_counts[self._examples.persons[rows]]
        sums = torch.empty(int(line[-1]) + 1, width, dtype=self.model.dtype, device=self._where)
        start = 0
        for _, gradient in self._recorder.noted(each * torch.from_numpy(weights).to(each)):
            part = sums[:, start : start + gradient[0].numel()]
            if len(part) == len(gradient):  # one row of each person
                part.copy_(gradient.flatten(1))
            else:
                part.zero_().index_add_(0, torch.from_numpy(line).to(self._where), gradient.flatten(1).to(sums))
            start += part.shape[1]
        return sums


def _norms(gradients: torch.Tensor) -> torch.Tensor:
    """Return the L2 norm of each line, (persons,), summed in float64."""
    squares = torch.zeros(len(gradients), dtype=torch.float64, device=gradients.device)
    for part in _parts(gradients):
        squares += gradients[:, part].double().square().sum(dim=1)
    return squares.sqrt_()


def _grid_sum(gradients: torch.Tensor, norms: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """Clip each line, cut it toward zero to the grid, and return the sum in grid steps, (d,), int64.

    Args:
        gradients: (persons, d), finite.
        norms: Their L2 norms, (persons,), float64.
        clip_norm: C.

    Guarantee: the part of each line is at most 2^30 long in L2, exactly.
    """
    # Summed in float64, the norm of d numbers errs by less than d 2^-52 of itself, whatever the order. So the target lies
    # below the limit by more than norms and products can err; cutting toward zero only shortens. Whatever came of it, a
    # line is counted only if it was seen to be surely within the limit.
    margin = max(2.0**-26, gradients.shape[1] * 2.0**-52)
    factors = torch.clamp(clip_norm * (1 - 4 * margin) / norms, max=1.0)  # a norm of 0 gives infinity, hence 1
    scale = factors * (2**GRID_BITS / clip_norm)
    squares = torch.zeros_like(norms)
    total = torch.empty(gradients.shape[1], dtype=torch.int64, device=gradients.device)
    for part in _parts(gradients):
        steps = (gradients[:, part].double() * scale[:, None]).trunc_()
        # Whole numbers of at most 2^30: a float64 holds the sum of 2^23 of them exactly.
        total[part] = steps.sum(dim=0).to(torch.int64)
        squares += steps.square_().sum(dim=1)
    sure = squares.sqrt_() <= 2**GRID_BITS * (1 - margin)
    if not sure.all():
        return _grid_sum(gradients[sure], norms[sure], clip_norm)
    return total


def _parts(gradients: torch.Tensor) -> Iterator[slice]:
    """Yield runs of columns so few that what is computed of them stays in a processor's cache."""
    size = 1 << (20 if gradients.device.type == "cpu" else 26)
    columns = max(1, size // (8 * max(1, len(gradients))))
    for start in range(0, gradients.shape[1], columns):
        yield slice(start, start + columns)
