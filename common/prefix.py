"""What the frozen layers below the adapters make of every row, computed once.

Where adapters sit in the top layers only, the layers below give the same for every round and site. It is as sensitive as
the rows themselves, so it stays in memory, or in a file that is encrypted with a key in memory.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from confide.common.errors import ModelError
from confide.common.examples import Batch, Examples, Ints
from confide.common.hidden import Hidden
from confide.common.model import AdaptedModel


class PrefixCache:
    """The hidden states that enter the lowest adapted layer, for every token of every row that was added.

    It lies beside the token stores of `Examples`: a row's window into its token store is its window into the cache, so
    subsets and unions of cached examples need nothing more.
    """

    def __init__(self, model: AdaptedModel, micro_batch: int = 64) -> None:
        self.model = model
        self._micro_batch = micro_batch
        self._stores: dict[int, tuple[object, Hidden]] = {}
        self._known: dict[int, set[int]] = {}  # of each store, where the rows that were computed begin
        self._positions: dict[int, int] = {}  # of each store, how many positions an image has; 0 for texts

    def beside(self, model: AdaptedModel) -> "PrefixCache":
        """Return a cache for another model with the same layers below its adapters, sharing what was computed."""
        other = PrefixCache(model, self._micro_batch)
        other._stores, other._known, other._positions = self._stores, self._known, self._positions
        return other

    def holds(self, examples: Examples) -> bool:
        """Return whether all rows of `examples` were computed."""
        starts = zip(examples.store.tolist(), examples.starts.tolist(), strict=True)
        return all(start in self._known.get(id(examples.tokens[store]), ()) for store, start in starts)

    @staticmethod
    def helps(model: AdaptedModel) -> bool:
        """Whether there are frozen layers below the adapters whose output can stand in for them."""
        return model.first_adapted > 0 and model.plan.compute.cache_prefix

    @property
    def size_bytes(self) -> int:
        """What the cache takes, in memory or on disk."""
        return sum(hidden.size_bytes for _, hidden in self._stores.values())

    def add(self, examples: Examples) -> Iterator[int]:
        """Compute the rows of `examples`, yielding how many are done after each batch.

        Raises:
            ModelError: This architecture gives other logits when its lower layers are replayed.
        """
        order = np.argsort(examples.lengths, kind="stable")
        for start in range(0, len(order), self._micro_batch):
            rows = order[start : start + self._micro_batch]
            batch = examples.batch(rows)
            with torch.no_grad():
                hidden, logits = self._prefix(batch)
            positions = hidden.shape[1] if examples.image else 0
            for line, row in enumerate(rows):
                kept, start_of_row, length = self._window(examples, int(row), hidden.shape[-1], positions)
                kept.put(start_of_row, hidden[line, :length])
                store = examples.tokens[int(examples.store[row])]
                self._known.setdefault(id(store), set()).add(int(examples.starts[row]))
            if start == 0:
                self._check(examples, rows, batch, logits)
            yield start + len(rows)

    def hidden(self, examples: Examples, rows: Ints) -> torch.Tensor:
        """Return the given rows' hidden states, (rows, longest, width), zero where padding is."""
        windows = [kept.get(start, length) for kept, start, length in (self._window(examples, int(r)) for r in rows)]
        return nn.utils.rnn.pad_sequence(windows, batch_first=True).to(self.model.device)

    def forward(self, examples: Examples, rows: Ints, batch: Batch) -> torch.Tensor:
        """Return what the model makes of the given rows, whose batch this is, their lower layers replayed."""
        with replaying(self.model, self.hidden(examples, rows)):
            return self.model.forward(batch)

    def _window(self, examples: Examples, row: int, width: int = 0, positions: int = 0) -> tuple[Hidden, int, int]:
        """Return where a row's hidden states are kept: (the store, its first position, how many positions).

        Args:
            examples: The rows.
            row: Which of them.
            width: Numbers per position if the store is made where there is none; 0 if it must be there already.
            positions: How many positions an image has; 0 for texts, whose tokens are their positions.
        """
        tokens = examples.tokens[int(examples.store[row])]
        start, length = int(examples.starts[row]), int(examples.lengths[row])
        if id(tokens) not in self._stores:
            if not width:
                raise ModelError("These rows were never added to the prefix cache.")
            compute = self.model.plan.compute
            total = len(tokens) // length * positions if positions else len(tokens)
            dtype = torch.bfloat16 if compute.precision == "bfloat16" else self.model.dtype
            size = self.size_bytes + total * width * dtype.itemsize
            # The tokens are kept beside their hidden states, so that the id stays theirs.
            kept = Hidden(total, width, dtype, in_memory=size <= compute.cache_mb << 20)
            self._stores[id(tokens)] = (tokens, kept)
            self._positions[id(tokens)] = positions
        _, hidden = self._stores[id(tokens)]
        if each := self._positions[id(tokens)]:
            return hidden, start // length * each, each
        return hidden, start, length

    def _prefix(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what enters the lowest adapted layer, (rows, longest, width), and the logits."""
        model, seen = self.model, list[torch.Tensor]()

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        handle = model.blocks[model.first_adapted].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            logits = model.forward(batch)
        finally:
            handle.remove()
        return seen[0], logits

    def _check(self, examples: Examples, rows: Ints, batch: Batch, logits: torch.Tensor) -> None:
        with torch.no_grad():
            replayed = self.forward(examples, rows, batch)
        coarse = self.model.plan.compute.precision == "bfloat16"
        if not torch.allclose(_seen(batch, replayed), _seen(batch, logits), *_CLOSE[coarse]):
            raise ModelError(
                f"{type(self.model.network.get_base_model()).__name__} gives other logits when its lower layers are "
                "replayed from memory. Set [compute] cache_prefix = false for this model."
            )


_CLOSE = {False: (1e-4, 1e-5), True: (5e-2, 5e-2)}  # relative and absolute; bfloat16 has 8 bits


def _seen(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    """Return the logits without those at padding, which nobody reads and which may differ."""
    if logits.ndim < 3 or batch.attention_mask is None:
        return logits
    return logits[torch.from_numpy(batch.attention_mask).bool().to(logits.device)]


class _Replay(nn.Module):
    """Stands in for a frozen layer: the first gives the cached hidden states, the others pass them on."""

    def __init__(self, layer: nn.Module, hidden: torch.Tensor | None) -> None:
        super().__init__()
        self._layer = [layer]  # in a list, so that it is not registered as a submodule
        self._hidden = hidden

    def forward(self, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return hidden_states if self._hidden is None else self._hidden

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  whatever the layer has, such as attention_type
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattribute__("_layer")[0], name)


@contextlib.contextmanager
def replaying(model: AdaptedModel, hidden: torch.Tensor) -> Iterator[None]:
    """Let cached hidden states, (rows, longest, width), stand in for the layers below the adapters inside a `with`."""
    lower = list(model.blocks)[: model.first_adapted]
    for index in range(len(lower)):
        model.blocks[index] = _Replay(lower[index], hidden if index == 0 else None)
    try:
        yield
    finally:
        for index, layer in enumerate(lower):
            model.blocks[index] = layer
