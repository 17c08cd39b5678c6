"""What private training costs, beside peft's LoRA without privacy and beside Opacus, on the same rows.

A logical batch is one step's rows; each row is a person of her own. Ours is a step as the default method `ffa` takes it, in
which the factors A rest: the clipped sum over the batch, cryptographic noise for each trained number, the division, Adam.
What a round does once is left out: taking the adapter, drawing the persons, giving the update. A peer's step goes from
rows to moved weights as well. Both stand at the same numbers, away from the start of a run, where B is zero.

All costs are processor seconds of one thread, taken in one process, the sides in random order. A ratio is one of
neighbours in time. Memory is taken in a process for each side.
"""

import ctypes
import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from confide.client.data import read_examples
from confide.client.gradients import GRID_BITS, PersonGradients
from confide.client.noise import CryptographicNoise, rounded_gaussian
from confide.client.tokenizer import load_tokenizer
from confide.common.base import base_digest
from confide.common.errors import RunError, UsageError
from confide.common.examples import Examples, Ints
from confide.common.model import AdaptedModel, attach
from confide.common.plan import Plan, load_plan
from confide.common.prefix import PrefixCache
from confide.simulations.measurement import Figure, Note, Stopwatch
from confide.simulations.scenarios import demo_model, scenario
from confide.simulations.train_peers import LEARNING_RATE, PlainLora, StockOpacus, rows_of, stock_lora

CLIP_NORM, NOISE_MULTIPLIER = 1.0, 1.0
LARGEST_ERRORS = {"float32": 1e-4, "float64": 1e-6}
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)
_OURS, _PLAIN, _FROZEN = "ours", "plain", "frozen"
_PEERS = {
    _PLAIN: "peft's LoRA without privacy, A and B trained",
    _FROZEN: "peft's LoRA without privacy, A frozen as in ours",
}
_OPACUS = "Opacus with hooks, BatchMemoryManager and dynamic padding"
_PROBES = 15  # rows whose gradients say where sums are clipped to be compared
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A clipped sum of ours beside stock Opacus's.

    Attributes:
        error: The L2 distance of the two over the length of Opacus's.
        rows: How many rows it is over.
        clipped: How many of them were scaled down.
    """

    error: float
    rows: int
    clipped: int


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


def measure_demo(note: Note, plan: Path | None = None, data: Path | None = None) -> dict[str, Figure]:
    """Return what `measure_alone` does for the demo's model, on the table `data` or else on the demo's messages.

    Raises:
        UsageError: Of plan and table only one is given.
        MissingPackage: The demo's packages are not installed.
        RunError: The process that measures failed.
    """
    if (plan is None) != (data is None):
        raise UsageError(
            "A table goes with the plan that says how it is read. Give both --plan and --data, or neither."
        )
    with tempfile.TemporaryDirectory() as folder:
        if plan is None or data is None:
            messages = scenario("messages")
            plan, data = messages.plan, messages.prepare(Path(folder))[0]
        return measure_alone(note, Ground(base=demo_model(), plan=plan, data=data))


def measure_alone(note: Note, ground: Ground, sizes: Sizes = Sizes()) -> dict[str, Figure]:
    """Return what `measure` does, measured in a process of its own whose libraries have one thread each.

    Libraries read how many threads they may have when they are loaded, which here they are already.

    Raises:
        RunError: That process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "figures.json"
        said = []
        with subprocess.Popen(  # noqa: S603  these are our own words
            [*_PYTHON, _ALONE, _words(ground, sizes), str(result)],
            env=os.environ | ONE_THREAD,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            for line in process.stderr or ():
                said.append(line.rstrip())
                note(said[-1])
        if process.returncode != 0:
            raise RunError(f"The process that measures ended with {process.returncode}: {' '.join(said)[-500:]}")
        figures = json.loads(result.read_bytes())
    return {name: Figure(**{**figure, "spread": tuple(figure["spread"])}) for name, figure in figures.items()}


_PYTHON = (sys.executable, "-W", "ignore", "-c")
_ALONE = """
import dataclasses, json, pathlib, sys, torch
from confide.simulations.train_bench import measure, spelled
torch.set_num_threads(1)
figures = measure(lambda line: print(line, file=sys.stderr, flush=True), *spelled(sys.argv[1]))
plain = {name: dataclasses.asdict(figure) for name, figure in figures.items()}
pathlib.Path(sys.argv[2]).write_text(json.dumps(plain))
"""


def measure(note: Note, ground: Ground, sizes: Sizes) -> dict[str, Figure]:
    """Return all figures, measured in this process.

    Raises:
        RunError: Opacus gives another clipped sum, or a process that measures memory failed.
    """
    return {
        **step_figures(note, ground, sizes),
        **memory_figures(note, ground, sizes),
        **batch_figures(note, ground, sizes),
    }


def step_figures(note: Note, ground: Ground, sizes: Sizes) -> dict[str, Figure]:
    """Return what a private step costs over a plain one, on rows of one length.

    Either goes through the logical batch in micro-batches and then moves the weights once. Of each, `step_rows` of the
    batch are timed and scaled up to it; moving the weights is timed on its own and added once. Noise is part of that,
    so it is amortised over the logical batch.
    """
    rows, share = np.arange(sizes.step_rows), sizes.logical_batch / sizes.step_rows
    found: dict[str, list[float]] = {name: [] for name in (_OURS, *_PEERS)}
    with tempfile.TemporaryDirectory() as adapter:
        write_adapter(ground, sizes, Path(adapter))
        sides = {name: _side(name, ground, sizes, Path(adapter)) for name in found}
        for number in range(sizes.step_pairs + 1):
            if number:  # the one before the first is for warming up
                note(
                    f"Pair {number} of {sizes.step_pairs}: steps with and without privacy, {sizes.tokens} tokens a row"
                )
            for name in np.random.default_rng().permutation(list(found)):
                through, move = Stopwatch(), Stopwatch()
                with through:
                    sides[name].through(rows)
                with move:
                    sides[name].move()
                if number:
                    found[name].append(share * through.seconds + move.seconds)
    return _over_peers("step_over_nonprivate", found)


def memory_figures(note: Note, ground: Ground, sizes: Sizes) -> dict[str, Figure]:
    """Return the peak memory of private steps over that of plain ones, each above what the loaded model takes.

    Every peak is of a process of its own, by its kernel's own count of resident memory; so this needs Linux.

    Raises:
        RunError: Such a process failed.
    """
    if not _CLEAR_REFS.exists():
        note("Only Linux keeps the peak of resident memory that is needed here; the figures of memory are left out.")
        return {}
    found: dict[str, list[float]] = {name: [] for name in (_OURS, *_PEERS)}
    with tempfile.TemporaryDirectory() as adapter:
        write_adapter(ground, sizes, Path(adapter))
        for number in range(1, sizes.memory_pairs + 1):
            note(f"Pair {number} of {sizes.memory_pairs}: peak memory with and without privacy, a process each")
            for name in np.random.default_rng().permutation(list(found)):
                done = subprocess.run(  # noqa: S603  these are our own words
                    [*_PYTHON, _MEMORY, _words(ground, sizes), str(name), adapter],
                    env=os.environ | ONE_THREAD,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode != 0:
                    raise RunError(
                        f"The process that measures memory ended with {done.returncode}: {done.stderr[-500:]}"
                    )
                found[name].append(float(done.stdout.splitlines()[-1]))
    return _over_peers("memory_over_nonprivate", found)


_MEMORY = """
import pathlib, sys, torch
from confide.simulations.train_bench import peak_bytes, spelled
torch.set_num_threads(1)
print(peak_bytes(sys.argv[2], *spelled(sys.argv[1]), pathlib.Path(sys.argv[3])))
"""


def peak_bytes(name: str, ground: Ground, sizes: Sizes, adapter: Path) -> int:
    """Return how far the memory of this process rises in two steps of `step_rows` rows above what it was before them.

    A step on two rows is taken first and does not count: after it the libraries' code is resident, and so is what an
    optimizer keeps.
    """
    side = _side(name, ground, sizes, adapter)
    side.through(np.arange(2))
    side.move()
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # else steps would fill, unseen, what loading took and gave back
    before = _status_bytes("VmRSS")
    _CLEAR_REFS.write_text("5")  # the peak begins anew from here (man 5 proc)
    for _ in range(2):
        side.through(np.arange(sizes.step_rows))
        side.move()
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RunError(f"{_STATUS} does not say {key}; peak memory cannot be measured on this system.")
    return int(found[1]) * 1024


def _over_peers(name: str, found: dict[str, list[float]]) -> dict[str, Figure]:
    return {
        name: Figure.of(_ratios(found[_OURS], found[_PLAIN]), "x", _PEERS[_PLAIN]),
        f"{name}_same_factors": Figure.of(_ratios(found[_OURS], found[_FROZEN]), "x", _PEERS[_FROZEN]),
    }


def batch_figures(note: Note, ground: Ground, sizes: Sizes) -> dict[str, Figure]:
    """Return how many times Opacus's cost for a whole logical batch of the table's rows is ours, and how sums differ.

    The second speed-up is with adapters in the top half of the layers on both sides, the layers below having been
    computed once by ours.

    Raises:
        RunError: The clipped sums of the two differ by more than LARGEST_ERRORS.
    """
    errors = {
        f"clipped_sum_error_{dtype}": Figure.of(
            [max(_checked(note, ground, sizes, dtype, half=half) for half in (False, True))], "relative L2", _OPACUS
        )
        for dtype in LARGEST_ERRORS
    }
    return {
        "batch_speedup_vs_opacus": Figure.of(_speedups(note, ground, sizes, half=False), "x", _OPACUS),
        "cached_speedup_vs_opacus": Figure.of(_speedups(note, ground, sizes, half=True), "x", _OPACUS),
        **errors,
    }


def _checked(note: Note, ground: Ground, sizes: Sizes, dtype: str, *, half: bool) -> float:
    found = compare_sums(ground, sizes, dtype, half=half)
    where = f"{dtype}, adapters in {_layers(half=half)}"
    note(
        f"Clipped sums differ from Opacus's by {found.error:.1e}: {where}, {found.clipped} of {found.rows} rows clipped"
    )
    if not found.error <= LARGEST_ERRORS[dtype]:  # nor may it be NaN
        raise RunError(
            f"The clipped sum differs from Opacus's by {found.error:.1e} of its length ({where}), more than "
            f"{LARGEST_ERRORS[dtype]:g}. Unequal work has no ratio of speeds; report this as a fault."
        )
    return found.error


def compare_sums(ground: Ground, sizes: Sizes, dtype: str, *, half: bool) -> Comparison:
    """Return how our clipped sum over one logical batch differs from Opacus's.

    Rows are clipped at the median length of a few gradients, so that about half of them are, yet at 1 at least: Opacus
    divides by a length plus 1e-6, which below 1 would show.

    Args:
        ground: What is trained on what.
        sizes: The logical batch and the micro-batch.
        dtype: float32 or float64.
        half: Whether adapters are in the top half of the layers only, and ours has the layers below cached.
    """
    precision: torch.dtype = getattr(torch, dtype)
    with tempfile.TemporaryDirectory() as adapter:
        model, pool, cache = _table(ground, sizes, Path(adapter), precision, half=half)
        labels = len(model.plan.task.labels)
        peer = stock_lora(ground.base, Path(adapter), labels=labels, train_a=False, dtype=precision)
    drawn = _draw(pool, sizes, np.random.default_rng(2))  # the same rows each time, so that the error is too
    gradients = PersonGradients(model, pool, cache=cache, micro_batch=sizes.micro_batch)
    lengths = [np.linalg.norm(gradients.insecure_sum(row)) for row in drawn[:_PROBES, None]]
    clip_norm = max(1.0, float(np.median(lengths)))
    ours = gradients.clipped_sum(drawn, clip_norm)
    opacus = StockOpacus(
        peer, rows_of(pool), clip_norm=clip_norm, noise_multiplier=NOISE_MULTIPLIER, micro_batch=sizes.micro_batch
    )
    theirs = opacus.clipped_sum(drawn, model.layout)
    error = float(np.linalg.norm(ours.values - theirs) / np.linalg.norm(theirs))
    return Comparison(error=error, rows=len(drawn), clipped=ours.clipped)


def _speedups(note: Note, ground: Ground, sizes: Sizes, *, half: bool) -> list[float]:
    with tempfile.TemporaryDirectory() as adapter:
        model, pool, cache = _table(ground, sizes, Path(adapter), torch.float32, half=half)
        peer = stock_lora(ground.base, Path(adapter), labels=len(model.plan.task.labels), train_a=False)
    ours = PrivateSteps(model, pool, cache, sizes.micro_batch)
    opacus = StockOpacus(
        peer, rows_of(pool), clip_norm=CLIP_NORM, noise_multiplier=NOISE_MULTIPLIER, micro_batch=sizes.micro_batch
    )

    def our_step(rows: Ints) -> None:
        ours.through(rows)
        ours.move()

    ratios = []
    for number in range(sizes.batch_pairs + 1):
        if number:  # the one before the first is for warming up
            note(f"Pair {number} of {sizes.batch_pairs}: batches of the table, adapters in {_layers(half=half)}")
        drawn = _draw(pool, sizes, np.random.default_rng())
        watches = {our_step: Stopwatch(), opacus.step: Stopwatch()}
        turns = list(watches.items())
        for turn in np.random.default_rng().permutation(len(turns)):
            step, watch = turns[turn]
            with watch:
                step(drawn)
        if number:
            ratios.append(watches[opacus.step].seconds / watches[our_step].seconds)
    return ratios


class Steps(Protocol):
    """A side whose steps are timed."""

    def through(self, rows: Ints) -> None:
        """Add these rows' gradients to the logical batch."""
        ...

    def move(self) -> None:
        """Move the weights and begin a new logical batch."""
        ...


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


def _side(name: str, ground: Ground, sizes: Sizes, adapter: Path) -> Steps:
    """Return ours or a plain peer, on rows of one length, at the numbers that `write_adapter` wrote."""
    plan = bench_plan(ground, sizes, max_tokens=sizes.tokens, half=False)
    labels = len(plan.task.labels)
    rows = even_rows(sizes.step_rows, sizes.tokens, labels=labels, words=_config(ground)["vocab_size"])
    if name != _OURS:
        network = stock_lora(ground.base, adapter, labels=labels, train_a=name == _PLAIN)
        return PlainLora(network, rows_of(rows), sizes.micro_batch)
    model = attach(ground.base, plan)
    model.write(model.import_exported(adapter))
    return PrivateSteps(model, rows, None, sizes.micro_batch)


def write_adapter(ground: Ground, sizes: Sizes, directory: Path) -> None:
    """Write the adapter that steps on rows of one length begin with, as peft reads it."""
    _begin(ground, sizes, bench_plan(ground, sizes, max_tokens=sizes.tokens, half=False), directory, torch.float32)


def _table(
    ground: Ground, sizes: Sizes, adapter: Path, dtype: torch.dtype, *, half: bool
) -> tuple[AdaptedModel, Examples, PrefixCache | None]:
    """Return the model, rows of the table and, with the top half adapted, their cache; write the adapter for the peer."""
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


def _draw(pool: Examples, sizes: Sizes, random: np.random.Generator) -> Ints:
    """Return a logical batch in random order, as a shuffled loader gives it to the peer."""
    return random.permutation(len(pool))[: sizes.logical_batch]


def _layers(*, half: bool) -> str:
    return "the top half of the layers" if half else "all layers"


def _ratios(upper: Sequence[float], lower: Sequence[float]) -> list[float]:
    return [above / below for above, below in zip(upper, lower, strict=True)]


def _words(ground: Ground, sizes: Sizes) -> str:
    paths = {name: str(path.resolve()) for name, path in dataclasses.asdict(ground).items()}
    return json.dumps({"ground": paths, "sizes": dataclasses.asdict(sizes)})


def spelled(words: str) -> tuple[Ground, Sizes]:
    """Return the ground and the sizes that a process of ours was told in its arguments."""
    told = json.loads(words)
    return Ground(**{name: Path(path) for name, path in told["ground"].items()}), Sizes(**told["sizes"])
