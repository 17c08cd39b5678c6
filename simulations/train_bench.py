"""What private training costs, beside peft's LoRA without privacy and beside Opacus, on the same rows.

A logical batch is one step's rows; each row is a person of her own. Ours is a step as the default method `ffa` takes it, in
which the factors A rest: the clipped sum over the batch, cryptographic noise for each trained number, the division, Adam.
What a round does once is left out: taking the adapter, drawing the persons, giving the update. A peer's step goes from
rows to moved weights as well.

All costs are processor seconds of one thread, taken in one process, the sides in random order. A ratio is one of
neighbours in time. Memory is taken in a process for each side.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from confide.client.gradients import PersonGradients
from confide.common.errors import RunError, UsageError
from confide.common.examples import Examples, Ints
from confide.simulations.measurement import Figure, Note, Stopwatch, figures_alone
from confide.simulations.scenarios import demo_model, scenario
from confide.simulations.train_ground import (
    CLIP_NORM,
    FROZEN,
    NOISE_MULTIPLIER,
    OURS,
    PLAIN,
    Ground,
    PrivateSteps,
    Sizes,
    command,
    model_and_rows,
    steps_of,
    write_adapter,
)
from confide.simulations.train_memory import peak_alone, peaks_are_kept
from confide.simulations.train_peers import StockOpacus, rows_of, stock_lora

LARGEST_ERRORS = {"float32": 1e-4, "float64": 1e-6}
_PEERS = {
    PLAIN: "peft's LoRA without privacy, A and B trained",
    FROZEN: "peft's LoRA without privacy, A frozen as in ours",
}
_OPACUS = "Opacus with hooks, BatchMemoryManager and dynamic padding"
_FULL = Sizes()
_PROBES = 15  # rows whose gradients say where sums are clipped to be compared


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


def measure_alone(note: Note, ground: Ground, sizes: Sizes = _FULL) -> dict[str, Figure]:
    """Return what `measure` does, measured in a process of its own whose libraries have one thread each.

    Raises:
        RunError: That process failed.
    """
    return figures_alone(command(_SCRIPT, ground, sizes), note)


_SCRIPT = """
import dataclasses, json, pathlib, sys, torch
from confide.simulations.train_bench import measure
from confide.simulations.train_ground import told
torch.set_num_threads(1)
figures = measure(lambda line: print(line, file=sys.stderr, flush=True), *told(sys.argv[1]))
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
    found: dict[str, list[float]] = {side: [] for side in (OURS, *_PEERS)}
    with tempfile.TemporaryDirectory() as adapter:
        write_adapter(ground, sizes, Path(adapter))
        sides = {side: steps_of(side, ground, sizes, Path(adapter)) for side in found}
    for steps in sides.values():  # the first of each is for warming up
        steps.through(rows)
        steps.move()
    for number in range(1, sizes.step_pairs + 1):
        note(f"Pair {number} of {sizes.step_pairs}: steps with and without privacy, {sizes.tokens} tokens a row")
        for side in np.random.default_rng().permutation(list(found)):
            through, move = Stopwatch(), Stopwatch()
            with through:
                sides[side].through(rows)
            with move:
                sides[side].move()
            found[side].append(share * through.seconds + move.seconds)
    return _over_peers("step_over_nonprivate", found)


def memory_figures(note: Note, ground: Ground, sizes: Sizes) -> dict[str, Figure]:
    """Return the peak memory of private steps over that of plain ones, each above what the loaded model takes.

    Every peak is of a process of its own, and only Linux keeps it; elsewhere there are no such figures.

    Raises:
        RunError: Such a process failed.
    """
    if not peaks_are_kept():
        note("Only Linux keeps the peak of resident memory that is needed here; the figures of memory are left out.")
        return {}
    found: dict[str, list[float]] = {side: [] for side in (OURS, *_PEERS)}
    with tempfile.TemporaryDirectory() as adapter:
        write_adapter(ground, sizes, Path(adapter))
        for number in range(1, sizes.memory_pairs + 1):
            note(f"Pair {number} of {sizes.memory_pairs}: peak memory with and without privacy, a process each")
            for side in np.random.default_rng().permutation(list(found)):
                found[side].append(peak_alone(str(side), ground, sizes, Path(adapter)))
    return _over_peers("memory_over_nonprivate", found)


def _over_peers(name: str, found: dict[str, list[float]]) -> dict[str, Figure]:
    return {
        name: Figure.of(_ratios(found[OURS], found[PLAIN]), "x", _PEERS[PLAIN]),
        f"{name}_same_factors": Figure.of(_ratios(found[OURS], found[FROZEN]), "x", _PEERS[FROZEN]),
    }


def _ratios(upper: Sequence[float], lower: Sequence[float]) -> list[float]:
    return [above / below for above, below in zip(upper, lower, strict=True)]


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
    batch_only = dataclasses.replace(sizes, pool=sizes.logical_batch)  # nothing is computed for rows not compared
    with tempfile.TemporaryDirectory() as adapter:
        model, pool, cache = model_and_rows(ground, batch_only, Path(adapter), precision, half=half)
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
        model, pool, cache = model_and_rows(ground, sizes, Path(adapter), torch.float32, half=half)
        peer = stock_lora(ground.base, Path(adapter), labels=len(model.plan.task.labels), train_a=False)
    ours = PrivateSteps(model, pool, cache, sizes.micro_batch)
    opacus = StockOpacus(
        peer, rows_of(pool), clip_norm=CLIP_NORM, noise_multiplier=NOISE_MULTIPLIER, micro_batch=sizes.micro_batch
    )

    def our_step(rows: Ints) -> None:
        ours.through(rows)
        ours.move()

    sides = (our_step, opacus.step)
    for step in sides:  # one micro-batch is enough for warming up
        step(_draw(pool, sizes, np.random.default_rng())[: sizes.micro_batch])
    ratios = []
    for number in range(1, sizes.batch_pairs + 1):
        note(f"Pair {number} of {sizes.batch_pairs}: batches of the table, adapters in {_layers(half=half)}")
        drawn = _draw(pool, sizes, np.random.default_rng())
        watches = [Stopwatch() for _ in sides]
        for turn in np.random.default_rng().permutation(len(sides)):
            with watches[turn]:
                sides[turn](drawn)
        ratios.append(watches[1].seconds / watches[0].seconds)
    return ratios


def _draw(pool: Examples, sizes: Sizes, random: np.random.Generator) -> Ints:
    """Return a logical batch in random order, as a shuffled loader gives it to the peer."""
    return random.permutation(len(pool))[: sizes.logical_batch]


def _layers(*, half: bool) -> str:
    return "the top half of the layers" if half else "all layers"
