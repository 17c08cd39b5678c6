"""The peers of the benchmark of training: peft's LoRA without privacy, and Opacus, both as they are sold.

Either takes the classifier that transformers makes of the base model's directory and the adapter that peft reads from
its own files. Nothing of ours is in them but their start: the same numbers as ours. Dropout is off, as it is in ours, which
makes the peers no slower. Rows of a batch are padded to the longest of them.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler

from confide.common.adapter import Layout
from confide.common.examples import Examples, Ints

LEARNING_RATE = 2e-3

Row = tuple[torch.Tensor, int]  # (tokens, int64; class number)


def rows_of(examples: Examples) -> list[Row]:
    """Return the tokens and the class of each row, in order."""
    windows = zip(examples.store, examples.starts, examples.lengths, examples.labels, strict=True)
    return [
        (torch.from_numpy(examples.tokens[store][start : start + length].astype(np.int64)), int(label))
        for store, start, length, label in windows
    ]


def stock_lora(
    base: Path, adapter: Path, *, labels: int, train_a: bool, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Return transformers' classifier with peft's adapter on it, in training mode, with every dropout at zero.

    Args:
        base: The directory of a text encoder.
        adapter: The directory of a LoRA adapter with its classifier, as peft writes them.
        labels: How many classes there are.
        train_a: Whether the factors A are trained too, as LoRA usually does.
        dtype: Of all numbers.
    """
    import transformers
    from peft import PeftConfig, PeftModel

    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = PeftConfig.from_pretrained(adapter)
    config.inference_mode = False
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=labels, local_files_only=True, dtype=dtype
    )
    network: nn.Module = PeftModel.from_pretrained(classifier, adapter, is_trainable=True, config=config)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name, parameter in network.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(train_a)
    return network.train()


class PlainLora:
    """Training without privacy: the mean loss over a logical batch, its gradient added up over micro-batches, Adam.

    Args:
        network: What `stock_lora` gave.
        rows: All rows that may be asked for.
        micro_batch: Rows that go through the network at once.
    """

    def __init__(self, network: nn.Module, rows: Sequence[Row], micro_batch: int) -> None:
        self._network = network
        self._rows = rows
        self._micro_batch = micro_batch
        self._optimizer = torch.optim.Adam(_trained(network), lr=LEARNING_RATE)

    def through(self, rows: Ints) -> None:
        """Add the gradient of the mean loss over these rows, given by number, in their order."""
        for start in range(0, len(rows), self._micro_batch):
            inputs, labels = padded([self._rows[row] for row in rows[start : start + self._micro_batch]])
            loss = F.cross_entropy(self._network(**inputs).logits, labels) * (len(labels) / len(rows))
            loss.backward()  # type: ignore[no-untyped-call]

    def move(self) -> None:
        """Move the weights and begin a new batch."""
        self._optimizer.step()
        self._optimizer.zero_grad()


class StockOpacus:
    """Opacus by its documented path: `PrivacyEngine.make_private` with hooks, `BatchMemoryManager`, dynamic padding.

    The logical batches are given rather than drawn, so that ours has the same. `BatchMemoryManager` cuts them in the
    order of their rows.

    Args:
        network: What `stock_lora` gave; the hooks stay on it.
        rows: All rows that may be asked for.
        clip_norm: Above 0.
        noise_multiplier: At least 0.
        micro_batch: The largest physical batch.
    """

    def __init__(
        self, network: nn.Module, rows: Sequence[Row], *, clip_norm: float, noise_multiplier: float, micro_batch: int
    ) -> None:
        from opacus import PrivacyEngine

        self._drawn = _Drawn()
        self._named = dict(network.named_parameters())
        self._micro_batch = micro_batch
        self._network, self._optimizer, self._loader = PrivacyEngine().make_private(
            module=network,
            optimizer=torch.optim.Adam(_trained(network), lr=LEARNING_RATE),
            data_loader=DataLoader(_Table(rows), batch_sampler=self._drawn, collate_fn=padded),
            noise_multiplier=noise_multiplier,
            max_grad_norm=clip_norm,
            poisson_sampling=False,
        )

    def step(self, rows: Ints) -> None:
        """Take one step on the logical batch of these rows, given by number."""
        from opacus.utils.batch_memory_manager import BatchMemoryManager

        self._drawn.rows = [int(row) for row in rows]
        self._optimizer.expected_batch_size = len(rows)
        with BatchMemoryManager(
            data_loader=self._loader, max_physical_batch_size=self._micro_batch, optimizer=self._optimizer
        ) as batches:
            for inputs, labels in batches:
                loss = F.cross_entropy(self._network(**inputs).logits, labels)
                loss.backward()  # type: ignore[no-untyped-call]
                self._optimizer.step()  # moves the weights after the last of a logical batch only
                self._optimizer.zero_grad()

    def clipped_sum(self, rows: Ints, layout: Layout) -> npt.NDArray[np.float64]:
        """Return the sum of the rows' clipped gradients before noise, (layout.length,), and take the step."""
        sums: dict[str, npt.NDArray[np.float64]] = {}

        def keep(_: object) -> None:
            for name, parameter in self._named.items():
                if parameter.requires_grad:
                    sums[_plain(name)] = parameter.summed_grad.detach().double().numpy().ravel()  # type: ignore[attr-defined]

        account = self._optimizer.step_hook
        self._optimizer.attach_step_hook(keep)
        try:
            self.step(rows)
        finally:
            self._optimizer.attach_step_hook(account)
        return np.concatenate([sums.pop(name) for name, _ in layout.tensors])


def padded(rows: Sequence[Row]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return what the network reads, (rows, longest) each, and the class numbers, (rows,)."""
    tokens = [row for row, _ in rows]
    mask = [torch.ones_like(row) for row in tokens]
    pad = nn.utils.rnn.pad_sequence
    inputs = {"input_ids": pad(tokens, batch_first=True), "attention_mask": pad(mask, batch_first=True)}
    return inputs, torch.tensor([label for _, label in rows])


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _plain(name: str) -> str:
    """Return a parameter's name without what peft puts around it."""
    return name.removeprefix("base_model.model.").replace(".modules_to_save.", ".").replace(".default.", ".")


class _Drawn(Sampler[list[int]]):
    """Gives one logical batch: whatever rows were last set."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __iter__(self) -> Iterator[list[int]]:
        yield self.rows

    def __len__(self) -> int:
        return 1


class _Table(torch.utils.data.Dataset[Any]):
    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Row:
        return self._rows[number]
