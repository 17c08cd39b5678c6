"""Rows as numbers, grouped by person: what training and evaluation read.

The store of tokens, or of pixels, is one flat array that may be memory-mapped; rows are windows into it, so a subset or
a union of tables copies neither text nor images.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

IGNORED = -100  # a target that is not learned; torch's cross-entropy leaves this number out by itself


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of text padded to the longest of them, or images.

    Attributes:
        input_ids: Token numbers, (rows, longest), int64; padding, on the right, holds the pad token. None for images.
        attention_mask: 1 where a token is, 0 where padding is, (rows, longest), int64. None for images.
        token_type_ids: 0 for the first text, 1 for the second, (rows, longest), int64. None for images.
        labels: Class numbers, (rows,), int64, or the answers of regression, (rows,), float32.
        targets: The answer at each token, (rows, longest), int64, IGNORED where nothing is learned, padding included;
            None if a row has one answer. A causal model's targets stand where the token itself stands: whoever compares
            them with scores shifts by one, and the first of a row is never compared.
        pixels: Images, (rows, channels, height, width), uint8; None for texts.
    """

    input_ids: Ints | None
    attention_mask: Ints | None
    token_type_ids: Ints | None
    labels: npt.NDArray[Any]
    targets: Ints | None = None
    pixels: Pixels | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False, eq=False)
class Examples:
    """Rows of one or more tables.

    Attributes:
        tokens: The stores; each flat, possibly memory-mapped; int32 tokens, or uint8 pixels.
        store: Which store a row lies in, (rows,), int64.
        starts: Where in its store a row begins, (rows,), int64.
        lengths: How many tokens or pixel values a row has, at least 1, (rows,), int64.
        second: At which of its tokens a row's second text begins; its length if it has none, (rows,), int64.
        labels: Class numbers, (rows,), int64, or the standardised answers of regression, (rows,), float32; zeros where
            `targets` are the answers.
        persons: Whose row it is, as numbers 0 to person_count - 1, (rows,), int64.
        pad_token: The token that fills shorter rows of a batch.
        targets: The answer at each token, int32, IGNORED where nothing is learned: one array beside each of `tokens`, in
            which a row has the same window; empty if a row has one answer.
        image: (channels, height, width) of the images if rows are images: a window then holds these, flattened.
    """

    tokens: Sequence[npt.NDArray[np.int32] | Pixels]
    store: Ints
    starts: Ints
    lengths: Ints
    second: Ints
    labels: npt.NDArray[Any]
    persons: Ints
    pad_token: int
    targets: Sequence[npt.NDArray[np.int32]] = ()
    image: tuple[int, int, int] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"<Examples: {len(self)} rows of {self.person_count} persons>"

    @property
    def person_count(self) -> int:
        """How many persons the rows belong to."""
        return int(self.persons.max()) + 1 if len(self) else 0

    def subset(self, rows: Ints) -> Self:
        """Return the given rows, in the given order; persons are numbered anew."""
        _, persons = np.unique(self.persons[rows], return_inverse=True)
        return dataclasses.replace(
            self,
            store=self.store[rows],
            starts=self.starts[rows],
            lengths=self.lengths[rows],
            second=self.second[rows],
            labels=self.labels[rows],
            persons=persons.astype(np.int64),
        )

    def batch(self, rows: Ints) -> Batch:
        """Return the given rows, texts padded to the longest of them; `rows` must not be empty.

        Guarantee: what a batch holds of a row depends on that row only, but for the padding on its right.
        """
        if self.image is not None:
            return self._images(rows, self.image)
        lengths = self.lengths[rows]
        positions = np.arange(int(lengths.max()))
        mask = positions < lengths[:, None]  # (rows, longest)
        types = (positions >= self.second[rows][:, None]) & mask
        return Batch(
            input_ids=self._padded(self.tokens, rows, mask.shape, self.pad_token),
            attention_mask=mask.astype(np.int64),
            token_type_ids=types.astype(np.int64),
            labels=self.labels[rows],
            targets=self._padded(self.targets, rows, mask.shape, IGNORED) if self.targets else None,
        )

    def _padded(self, stores: Sequence[npt.NDArray[Any]], rows: Ints, shape: tuple[int, ...], filler: int) -> Ints:
        padded = np.full(shape, filler, dtype=np.int64)
        for line, row in enumerate(rows):
            start, length = self.starts[row], self.lengths[row]
            padded[line, :length] = stores[self.store[row]][start : start + length]
        return padded

    def _images(self, rows: Ints, shape: tuple[int, int, int]) -> Batch:
        pixels = np.empty((len(rows), *shape), dtype=np.uint8)
        for line, row in enumerate(rows):
            start = self.starts[row]
            pixels[line] = self.tokens[self.store[row]][start : start + self.lengths[row]].reshape(shape)
        return Batch(input_ids=None, attention_mask=None, token_type_ids=None, labels=self.labels[rows], pixels=pixels)


def union(parts: Sequence[Examples]) -> Examples:
    """Return all rows of `parts`, in order; persons of different parts stay different persons.

    Args:
        parts: At least one; all read with the same plan.

    Raises:
        ValueError: Some have targets or images of another size and others do not.
    """
    if len({(part.image, bool(part.targets)) for part in parts}) != 1:
        raise ValueError("Examples of different kinds of tasks cannot be joined. Read all of them with one plan.")
    stores: list[npt.NDArray[np.int32] | Pixels] = []
    targets: list[npt.NDArray[np.int32]] = []
    columns: dict[str, list[npt.NDArray[Any]]] = {
        name: [] for name in ("store", "starts", "lengths", "second", "labels", "persons")
    }
    persons = 0
    for part in parts:
        shifted = {"store": part.store + len(stores), "persons": part.persons + persons}
        for name, column in columns.items():
            column.append(shifted.get(name, getattr(part, name)))
        stores += part.tokens
        targets += part.targets
        persons += part.person_count
    joined = {name: np.concatenate(column) for name, column in columns.items()}
    return Examples(tokens=stores, targets=targets, pad_token=parts[0].pad_token, image=parts[0].image, **joined)
