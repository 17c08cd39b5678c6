"""The benchmark of training: ours and the peers do the same work, and stock Opacus has the same clipped sums.

No figure of speed is judged here.
"""

import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from confide.client.gradients import PersonGradients
from confide.common.errors import RunError, UsageError
from confide.common.examples import Examples, Ints
from confide.common.model import AdaptedModel, attach
from confide.simulations import bench, train_bench, train_ground, train_memory
from confide.simulations.measurement import Figure
from confide.simulations.train_bench import (
    LARGEST_ERRORS,
    batch_figures,
    compare_sums,
    measure_alone,
    measure_demo,
    step_figures,
)
from confide.simulations.train_ground import Ground, PrivateSteps, Sizes, bench_plan, even_rows, write_adapter
from confide.simulations.train_memory import peak_bytes
from confide.simulations.train_peers import LEARNING_RATE, PlainLora, padded, rows_of, stock_lora

TINY = Sizes(
    logical_batch=24,
    micro_batch=5,
    tokens=9,
    step_rows=12,
    step_pairs=1,
    memory_pairs=1,
    batch_pairs=1,
    pool=60,
    rank=2,
    away=4.0,
)


@pytest.fixture
def ground(base_directory: Path, plan_file: Path, table: Path) -> Ground:
    return Ground(base=base_directory, plan=plan_file, data=table)


@pytest.fixture
def adapter(ground: Ground, tmp_path: Path) -> Path:
    """The adapter that all sides of the steps begin with."""
    write_adapter(ground, TINY, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def model(ground: Ground, adapter: Path) -> AdaptedModel:
    """Ours at the numbers of that adapter."""
    model = attach(ground.base, bench_plan(ground, TINY, max_tokens=9, half=False))
    model.write(model.import_exported(adapter))
    return model


@pytest.fixture
def rows() -> Examples:
    return even_rows(12, 9, labels=3, words=19)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_clipped_sum_is_that_of_stock_opacus(ground: Ground, dtype: str, half: bool) -> None:
    found = compare_sums(ground, TINY, dtype, half=half)

    assert 0 < found.error <= LARGEST_ERRORS[dtype]
    assert 0.2 < found.clipped / found.rows < 0.8  # so some are scaled down and some are not


def test_a_clipped_sum_that_lacks_a_person_gives_no_figure(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = PersonGradients.clipped_sum

    def off(self: PersonGradients, persons: Ints, *others: Any) -> Any:
        return exact(self, persons, *others) if len(persons) < 2 else exact(self, persons[1:], *others)

    monkeypatch.setattr(PersonGradients, "clipped_sum", off)

    with pytest.raises(RunError, match="clipped sum differs from Opacus's by"):
        batch_figures(lambda _: None, ground, TINY)


def test_the_peer_begins_where_ours_does_and_trains_the_same_numbers(
    ground: Ground, adapter: Path, model: AdaptedModel, rows: Examples
) -> None:
    peer = stock_lora(ground.base, adapter, labels=3, train_a=False)
    inputs, labels = padded(rows_of(rows))

    with torch.no_grad():
        theirs, ours = peer(**inputs).logits, model.logits(rows, np.arange(12))

    assert torch.equal(labels, torch.from_numpy(rows.labels))
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    assert float(ours.std(dim=0).min()) > 1e-4  # no two rows alike, as they would be if tokens were not read
    assert trained(peer) == dict(model.layout.tensors)
    assert all(module.p == 0 for module in peer.modules() if isinstance(module, nn.Dropout))


def test_the_plain_peer_trains_both_factors_where_ours_trains_one(ground: Ground, adapter: Path) -> None:
    both = trained(stock_lora(ground.base, adapter, labels=3, train_a=True))
    one = trained(stock_lora(ground.base, adapter, labels=3, train_a=False))

    assert {name.replace("lora_A", "lora_B") for name in both.keys() - one.keys()} == {
        name for name in one if "lora_B" in name
    }


def test_the_plain_peer_takes_the_gradient_of_the_mean_loss_whatever_its_micro_batches(
    ground: Ground, adapter: Path, rows: Examples
) -> None:
    gradients = []
    for micro_batch in (12, 5):
        network = stock_lora(ground.base, adapter, labels=3, train_a=True)
        PlainLora(network, rows_of(rows), micro_batch).through(np.arange(12))
        gradients.append(torch.cat([p.grad.ravel() for p in network.parameters() if p.grad is not None]))

    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    assert float(gradients[0].norm()) > 0.1


def test_a_private_step_is_adams_with_the_clipped_sum_and_noise_over_the_rows(
    model: AdaptedModel, rows: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = model.read()
    noise = np.random.default_rng(0).normal(0, 1, model.layout.length)
    monkeypatch.setattr(
        train_ground, "rounded_gaussian", lambda _, deviation, count: np.rint(deviation * noise[:count])
    )
    total = PersonGradients(model, rows, micro_batch=5).clipped_sum(np.arange(12), 1.0).values
    expected = torch.nn.Parameter(torch.from_numpy(begun.copy()))
    expected.grad = torch.from_numpy(((total + noise) / 12).astype(np.float32))
    torch.optim.Adam([expected], lr=LEARNING_RATE).step()
    steps = PrivateSteps(model, rows, None, 5)

    steps.through(np.arange(7))
    steps.through(np.arange(7, 12))
    steps.move()

    np.testing.assert_allclose(model.read(), expected.detach().numpy(), rtol=0, atol=1e-6)
    assert float(np.abs(model.read() - begun).min()) > LEARNING_RATE / 2


def test_the_figures_of_steps_and_of_batches_are_the_promised_ones(ground: Ground) -> None:
    notes: list[str] = []

    figures = {**step_figures(notes.append, ground, TINY), **batch_figures(notes.append, ground, TINY)}

    assert figures.keys() == {
        "step_over_nonprivate",
        "step_over_nonprivate_same_factors",
        "batch_speedup_vs_opacus",
        "cached_speedup_vs_opacus",
        "clipped_sum_error_float32",
        "clipped_sum_error_float64",
    }
    assert all(figure.value > 0 and figure.runs == 1 and figure.peer for figure in figures.values())
    assert len([note for note in notes if note.startswith("Pair 1 of 1")]) == 3


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux keeps the peak that is needed")
def test_the_peak_holds_what_a_step_takes_and_not_what_was_taken_before(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hungry:
        def through(self, rows: Ints) -> None:
            np.ones(len(rows) << 20)  # 8 MiB a row

        def move(self) -> None:
            pass

    monkeypatch.setattr(train_memory, "steps_of", lambda *_: Hungry())
    np.ones(40 << 20)

    peak = peak_bytes("ours", ground, dataclasses.replace(TINY, step_rows=6), Path())

    assert 0.95 <= peak / (6 * 8 * 2**20) < 1.25


@pytest.mark.slow
def test_a_process_of_its_own_measures_all_figures_of_training(ground: Ground) -> None:
    notes: list[str] = []

    figures = measure_alone(notes.append, ground, TINY)

    memory = {"memory_over_nonprivate", "memory_over_nonprivate_same_factors"}
    assert {name for name in figures if "memory" in name} == (memory if sys.platform == "linux" else set())
    assert len(figures.keys() - memory) == 6
    assert all(figure.value > 0 for figure in figures.values())
    assert any("peak memory" in note for note in notes) or sys.platform != "linux"


def test_a_process_of_its_own_that_fails_gives_no_figure_of_training(ground: Ground) -> None:
    with pytest.raises(RunError, match=r"ended with 1: .*absent.toml"):
        measure_alone(lambda _: None, dataclasses.replace(ground, plan=Path("absent.toml")), TINY)


def test_bench_train_joins_the_figures_of_training_and_of_its_accounts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def measured(_: object, plan: Path | None, data: Path | None) -> dict[str, Figure]:
        asked.append((plan, data))
        return {"step_over_nonprivate": Figure.of([1.0], "x")}

    accounts = types.SimpleNamespace(accounting_figures=lambda _: {"gate_ms": Figure.of([2.0], "ms")})
    monkeypatch.setattr(train_bench, "measure_demo", measured)
    monkeypatch.setitem(sys.modules, "confide.simulations.accounting_bench", accounts)

    result = bench.bench("train", lambda _: None, Path("plan.toml"), Path("rows.csv"))

    assert list(result["figures"]) == ["step_over_nonprivate", "gate_ms"]
    assert asked == [(Path("plan.toml"), Path("rows.csv"))]


def test_a_benchmark_that_measures_on_no_table_refuses_one() -> None:
    with pytest.raises(UsageError, match="bench secagg measures on no table"):
        bench.bench("secagg", lambda _: None, None, Path("rows.csv"))


def test_a_table_without_a_plan_is_refused() -> None:
    with pytest.raises(UsageError, match="Give both --plan and --data"):
        measure_demo(lambda _: None, None, Path("rows.csv"))


def trained(peer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what a peer trains, by the names ours has for them."""
    return {
        name.removeprefix("base_model.model.").replace(".modules_to_save.", ".").replace(".default.", "."): tuple(
            p.shape
        )
        for name, p in peer.named_parameters()
        if p.requires_grad
    }
