"""Tokenised rows, grouped by person: what training and evaluation read.

The token store is one flat array that may be memory-mapped; rows are windows into it, so a subset or a union of tables
copies no text.
"""

import dataclasses
from collections.abc import Sequence
from typing import Self

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows padded to the longest of them.

    Attributes:
        input_ids: Token numbers, (rows, longest), int64; padding holds the pad token.
        attention_mask: 1 where a token is, 0 where padding is, (rows, longest), int64.
        token_type_ids: 0 for the first text, 1 for the second, (rows, longest), int64.
        labels: Class numbers, (rows,), int64.
    """

    input_ids: Ints
    attention_mask: Ints
    token_type_ids: Ints
    labels: Ints


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False, eq=False)
class Examples:
    """Tokenised rows of one or more tables.

    Attributes:
        tokens: The token stores; each flat, int32, possibly memory-mapped.
        store: Which store a row's tokens lie in, (rows,), int64.
        starts: Where in its store a row begins, (rows,), int64.
        lengths: How many tokens a row has, at least 1, (rows,), int64.
        second: At which of its tokens a row's second text begins; its length if it has none, (rows,), int64.
        labels: Class numbers, (rows,), int64.
        persons: Whose row it is, as numbers 0 to person_count - 1, (rows,), int64.
        pad_token: The token that fills shorter rows of a batch.
    """

    tokens: Sequence[npt.NDArray[np.int32]]
    store: Ints
    starts: Ints
    lengths: Ints
    second: Ints
    labels: Ints
    persons: Ints
    pad_token: int

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
        """Return the given rows padded to the longest of them; `rows` must not be empty."""
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        positions = np.arange(longest)
        mask = positions < lengths[:, None]  # (rows, longest)
        input_ids = np.full(mask.shape, self.pad_token, dtype=np.int64)
        for line, row in enumerate(rows):
            start, length = self.starts[row], self.lengths[row]
            input_ids[line, :length] = self.tokens[self.store[row]][start : start + length]
        types = (positions >= self.second[rows][:, None]) & mask
        return Batch(
            input_ids=input_ids,
            attention_mask=mask.astype(np.int64),
            token_type_ids=types.astype(np.int64),
            labels=self.labels[rows],
        )


def union(parts: Sequence[Examples]) -> Examples:
    """Return all rows of `parts`, in order; persons of different parts stay different persons."""
    stores: list[npt.NDArray[np.int32]] = []
    columns: dict[str, list[Ints]] = {
        name: [] for name in ("store", "starts", "lengths", "second", "labels", "persons")
    }
    persons = 0
    for part in parts:
        shifted = {"store": part.store + len(stores), "persons": part.persons + persons}
        for name, column in columns.items():
            column.append(shifted.get(name, getattr(part, name)))
        stores += part.tokens
        persons += part.person_count
    joined = {name: np.concatenate(column) for name, column in columns.items()}
    return Examples(tokens=stores, pad_token=parts[0].pad_token, **joined)
