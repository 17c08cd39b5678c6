"""What the benchmark of training measures on: a base, a plan and rows, and the sides that take steps on them.

All sides begin at the same numbers, away from the start of a run. A process that measures on its own is told ground and
sizes in its arguments.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from confide.client.data import read_examples
from confide.client.gradients import GRID_BITS, PersonGradients
from confide.client.noise import CryptographicNoise, rounded_gaussian
from confide.client.tokenizer import load_tokenizer
from confide.common.base import base_digest
from confide.common.errors import UsageError
from confide.common.examples import Examples, Ints
from confide.common.model import AdaptedModel, attach
from confide.common.plan import Plan, load_plan
from confide.common.prefix import PrefixCache
from confide.simulations.train_peers import LEARNING_RATE, PlainLora, rows_of, stock_lora

CLIP_NORM, NOISE_MULTIPLIER = 1.0, 1.0
OURS, PLAIN, FROZEN = "ours", "plain", "frozen"  # the sides of a private step and of plain ones


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What is trained on what.

    Attributes:
        base: The base model's directory: a text encoder that transformers classifies with.
        plan: A plan for text classification; its columns, labels, targets and max_tokens count, its base and privacy don't.
        data: A table as that plan reads it.
    """

    base: Path
    plan: Path
    data: Path


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured; the figures' names stand for these sizes.

    Attributes:
        logical_batch: Rows of a step.
        micro_batch: Rows that go through a model at once, ours and a peer's.
        tokens: Of each row where all have the same length.
        step_rows: How many rows of the logical batch are timed where private and plain steps are compared.
        step_pairs: How often these are taken by turns.
        memory_pairs: How often the memory of these is taken.
        batch_pairs: How often ours and Opacus take a whole logical batch by turns.
        pool: How many of the table's rows those batches are drawn from.
        rank: Of the adapter.
        away: How far the trained numbers are from a run's start, where B is zero and gradients are special; a standard
            deviation.
    """

    logical_batch: int = 256
    micro_batch: int = 32
    tokens: int = 128
    step_rows: int = 32
    step_pairs: int = 21
    memory_pairs: int = 5
    batch_pairs: int = 9
    pool: int = 2048
    rank: int = 8
    away: float = 0.02


class Steps(Protocol):
    """A side whose steps are measured."""

    def through(self, rows: Ints) -> None:
        """Add these rows' gradients to the logical batch."""
        ...

    def move(self) -> None:
        """Move the weights and begin a new logical batch."""
        ...


def steps_of(side: str, ground: Ground, sizes: Sizes, adapter: Path) -> Steps:
    """Return one side on rows of one length, at the numbers that `write_adapter` wrote.

    Args:
        side: OURS; PLAIN, the peer that trains both factors; or FROZEN, the peer whose factors A rest as in ours.
        ground: What is trained on what; its table isn't read.
        sizes: `step_rows` rows of `tokens` tokens, and the micro-batch.
        adapter: The directory that `write_adapter` wrote.
    """
    plan = bench_plan(ground, sizes, max_tokens=sizes.tokens, half=False)
    labels = len(plan.task.labels)
    rows = even_rows(sizes.step_rows, sizes.tokens, labels=labels, words=_config(ground)["vocab_size"])
    if side != OURS:
        network = stock_lora(ground.base, adapter, labels=labels, train_a=side == PLAIN)
        return PlainLora(network, rows_of(rows), sizes.micro_batch)
    model = attach(ground.base, plan)
    model.write(model.import_exported(adapter))
    return PrivateSteps(model, rows, None, sizes.micro_batch)


class PrivateSteps:
    """The product's private steps, each row a person of her own.

    Args:
        model: The base model with the adapter.
        examples: The rows.
        cache: Their frozen prefix, if it is computed.
        micro_batch: Rows that go through the model at once.
    """

    def __init__(self, model: AdaptedModel, examples: Examples, cache: PrefixCache | None, micro_batch: int) -> None:
        self._model = model
        self._gradients = PersonGradients(model, examples, cache=cache, micro_batch=micro_batch)
        self._optimizer = torch.optim.Adam(model.trainable.values(), lr=LEARNING_RATE)
        self._randomness = CryptographicNoise()
        self._sum = np.zeros(model.layout.length)
        self._rows = 0

    def through(self, rows: Ints) -> None:
        """Add the clipped gradients of these rows, given by number."""
        self._sum += self._gradients.clipped_sum(rows, CLIP_NORM).values
        self._rows += len(rows)

    def move(self) -> None:
        """Add noise, divide, take Adam's step and begin a new batch."""
        steps = rounded_gaussian(self._randomness, NOISE_MULTIPLIER * 2**GRID_BITS, len(self._sum))
        noise = steps * (CLIP_NORM / 2**GRID_BITS)
        gradient = ((self._sum + noise) / self._rows).astype(np.float32)
        for name, part in self._model.layout.split(gradient).items():
            parameter = self._model.trainable[name]
            parameter.grad = torch.from_numpy(np.ascontiguousarray(part)).to(parameter)
        self._optimizer.step()
        self._sum[:], self._rows = 0, 0


def write_adapter(ground: Ground, sizes: Sizes, directory: Path) -> None:
    """Write the adapter that steps on rows of one length begin with, as peft reads it."""
    _begin(ground, sizes, bench_plan(ground, sizes, max_tokens=sizes.tokens, half=False), directory, torch.float32)


def model_and_rows(
    ground: Ground, sizes: Sizes, adapter: Path, dtype: torch.dtype, *, half: bool
) -> tuple[AdaptedModel, Examples, PrefixCache | None]:
    """Return ours on the table: the model, `pool` rows of it, and their frozen layers computed if `half`.

    Args:
        ground: What is trained on what.
        sizes: The pool, and what `bench_plan` takes.
        adapter: The directory that the model's adapter is written to, for the peer to begin with.
        dtype: Of all numbers.
        half: Whether adapters are in the top half of the layers only.
    """
    plan = bench_plan(ground, sizes, max_tokens=None, half=half)
    model = _begin(ground, sizes, plan, adapter, dtype)
    examples = read_examples(ground.data, plan, load_tokenizer(ground.base)).examples
    pool = examples.subset(np.random.default_rng(0).permutation(len(examples))[: sizes.pool])
    pool = dataclasses.replace(pool, persons=np.arange(len(pool)))
    cache = PrefixCache(model) if half else None
    if cache:
        for _ in cache.add(pool):
            pass
    return model, pool, cache


def _begin(ground: Ground, sizes: Sizes, plan: Plan, adapter: Path, dtype: torch.dtype) -> AdaptedModel:
    """Return the model away from its start, and write its adapter for the peers."""
    model = attach(ground.base, plan, dtype=dtype)
    away = np.random.default_rng(0).normal(0, sizes.away, model.layout.length)
    vector = (model.start + away).astype(np.float32)
    model.export(vector, adapter)
    model.write(vector)
    return model


def bench_plan(ground: Ground, sizes: Sizes, *, max_tokens: int | None, half: bool) -> Plan:
    """Return the ground's plan for its base, without mean pooling, which transformers has no class for.

    Args:
        ground: What is trained on what.
        sizes: The rank and the micro-batch.
        max_tokens: How many tokens of a row are read; as the plan says if None.
        half: Whether adapters are in the top half of the layers only.

    Raises:
        UsageError: The plan is not for text classification.
    """
    plan = load_plan(ground.plan)
    if plan.task.kind != "text-classification":
        raise UsageError(f"bench train compares text classification; {ground.plan} is for {plan.task.kind}.")
    depth = _config(ground)["num_hidden_layers"]
    return dataclasses.replace(
        plan,
        model=dataclasses.replace(
            plan.model,
            base_digest=base_digest(ground.base),
            max_tokens=max_tokens or plan.model.max_tokens,
            pooling="own",
        ),
        adapter=dataclasses.replace(
            plan.adapter,
            method="ffa",
            rank=sizes.rank,
            targets=("query", "value"),
            top_layers=depth // 2 if half else 0,
        ),
        compute=dataclasses.replace(plan.compute, device="cpu", micro_batch=sizes.micro_batch),
    )


def _config(ground: Ground) -> dict[str, int]:
    config: dict[str, int] = json.loads((ground.base / "config.json").read_bytes())
    return config


def even_rows(count: int, tokens: int, *, labels: int, words: int) -> Examples:
    """Return rows that all have so many tokens, drawn with their classes by a fixed seed."""
    random = np.random.default_rng(1)
    starts, lengths = np.arange(count) * tokens, np.full(count, tokens)
    return Examples(
        tokens=[random.integers(1, words, count * tokens).astype(np.int32)],
        store=np.zeros(count, np.int64),
        starts=starts,
        lengths=lengths,
        second=lengths.copy(),
        labels=random.integers(0, labels, count),
        persons=np.arange(count),
        pad_token=0,
    )


def command(script: str, ground: Ground, sizes: Sizes, *others: str) -> list[str]:
    """Return the command that runs a script in a process of its own; `told` reads its first argument there.

    Such a process is to be given ONE_THREAD in its environment: libraries read how many threads they may have when they
    are loaded.
    """
    paths = {name: str(path.resolve()) for name, path in dataclasses.asdict(ground).items()}
    words = json.dumps({"ground": paths, "sizes": dataclasses.asdict(sizes)})
    return [sys.executable, "-W", "ignore", "-c", script, words, *others]


def told(words: str) -> tuple[Ground, Sizes]:
    """Return the ground and the sizes that `command` told this process."""
    known = json.loads(words)
    return Ground(**{name: Path(path) for name, path in known["ground"].items()}), Sizes(**known["sizes"])
