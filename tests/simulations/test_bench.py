"""The frame of the benchmarks, and what their constant rounds do. No figure is judged here."""

import dataclasses
import importlib.util
import itertools
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from confide.client.agent import Agent
from confide.common.adapter import Floats, Layout
from confide.common.errors import RunError, UsageError
from confide.common.messages import Contribution, Envelope, Failure, open_envelope, seal
from confide.common.ring import RingLayout
from confide.server.store import Store
from confide.simulations import bench, secagg_bench
from confide.simulations.bench import constant_rounds
from confide.simulations.measurement import Figure, Note
from confide.simulations.secagg_bench import Cohort, Sizes, measure, measure_alone
from confide.simulations.secagg_peers import FLOWER_STEP, Ckks, flower_round

TINY = Sizes(
    sites=7,
    parameters=300,
    pairs=1,
    mask_pairs=1,
    more_sites=8,
    many_sites=70,
    many_parameters=50,
    long_parameters=500,
    long_rounds=1,
)


def test_a_figure_is_the_median_of_its_runs_with_the_lowest_and_the_highest() -> None:
    figure = Figure.of([3.0, 1.0, 10.0, 2.0], "s", "a peer")

    assert figure == Figure(value=2.5, unit="s", peer="a peer", runs=4, spread=(1.0, 10.0))
    assert Figure.of([7.0], "x") == Figure(value=7.0, unit="x", peer="", runs=1, spread=(7.0, 7.0))


def test_a_benchmark_is_one_object_of_named_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []

    def quick(note: Note) -> Mapping[str, Figure]:
        note("measuring")
        return {"speed": Figure.of([2.0, 4.0], "x", "a snail")}

    monkeypatch.setitem(bench.BENCHES, "quick", quick)

    result = json.loads(json.dumps(bench.bench("quick", notes.append)))

    assert notes == ["measuring"]
    assert result.pop("seconds") >= 0
    assert result == {
        "format": "confide-bench/1",
        "status": "completed",
        "bench": "quick",
        "figures": {"speed": {"value": 3.0, "unit": "x", "peer": "a snail", "runs": 2, "spread": [2.0, 4.0]}},
    }


def test_an_unknown_benchmark_is_refused_and_the_known_are_named() -> None:
    with pytest.raises(UsageError, match=r"no benchmark 'speed'. Known are federation"):
        bench.bench("speed", lambda _: None)


def test_constant_rounds_add_the_constant_update_and_every_vector_that_is_sent_is_masked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []
    answer = Agent.answer

    def witnessed(self: Agent, envelope: Envelope) -> Envelope:
        reply = answer(self, envelope)
        if isinstance(message := open_envelope(reply), Contribution):
            sent.append(message.vector.words.tobytes())
        return reply

    monkeypatch.setattr(Agent, "answer", witnessed)

    seconds = constant_rounds(4, 50, rounds=2, folder=tmp_path)

    assert len(seconds) == 2
    assert len(sent) == len(set(sent)) == 3 * 4
    adapters = [np.zeros(50, np.float32), *adapters_of(tmp_path)]
    for before, after in itertools.pairwise(adapters):
        assert after - before == pytest.approx(np.full(50, 1e-4), rel=1e-3)


def test_a_benchmark_with_a_site_that_fails_gives_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Agent.answer

    def failing(self: Agent, envelope: Envelope) -> Envelope:
        return seal(Failure.of(OSError())) if self.site == "site-001" else answer(self, envelope)

    monkeypatch.setattr(Agent, "answer", failing)

    with pytest.raises(RunError, match="a site did not take part"):
        constant_rounds(4, 50, rounds=1, folder=tmp_path)


def test_the_benchmark_of_secure_aggregation_is_one_of_the_known(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = Figure.of([8.0], "x")
    monkeypatch.setattr(secagg_bench, "measure_alone", lambda note: {"client_speedup_vs_flower": figure})

    result = bench.bench("secagg", lambda _: None)

    assert result["figures"] == {"client_speedup_vs_flower": dataclasses.asdict(figure)}


def test_a_process_of_its_own_measures_every_figure_that_the_page_names() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "bench-json.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\w+)` \|", page.partition("## `secagg`")[2], re.MULTILINE))
    with_ckks = importlib.util.find_spec("tenseal") is not None
    notes: list[str] = []

    figures = measure_alone(notes.append, TINY)

    assert figures.keys() == {name for name in named if with_ckks or "ckks" not in name}
    assert all(figure.value > 0 for figure in figures.values())
    assert any("70 sites" in note for note in notes)


def test_a_process_of_its_own_that_fails_gives_no_figure() -> None:
    with pytest.raises(RunError, match=r"ended with 1: .*A roster of 2 sites cannot be"):
        measure_alone(lambda _: None, dataclasses.replace(TINY, sites=2))


@pytest.mark.parametrize("dropped", [(), (0, 3)])
def test_flower_and_both_rings_compute_the_mean_of_those_who_are_left(dropped: tuple[int, ...]) -> None:
    updates = updates_of(7, 300)
    due = np.mean([update for place, update in enumerate(updates) if place not in dropped], axis=0)
    wide = RingLayout(length=300, update_bound=1.0, max_sites=7)
    narrow = RingLayout(length=300, max_sites=7, bits=16, segments=((300, 0.01),))

    flower, cost = flower_round(updates, 5, dropped)
    rounds = {ring: Cohort(7, ring).round(updates, dict.fromkeys(dropped, 2)) for ring in (wide, narrow)}

    assert flower == pytest.approx(due, abs=FLOWER_STEP)
    assert rounds[wide].mean == pytest.approx(due, abs=1.0 / wide.largest)
    assert rounds[narrow].mean == pytest.approx(due, abs=0.01 / narrow.largest)
    assert min(cost.site_s, cost.server_s) > 0
    assert all(min(outcome.cost.site_s, outcome.cost.server_s) > 0 for outcome in rounds.values())


def test_a_peer_that_computes_another_mean_gives_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(*arguments: Any) -> Any:
        mean, cost = flower_round(*arguments)
        return mean + 2 * FLOWER_STEP, cost

    monkeypatch.setattr(secagg_bench, "flower_round", off)

    with pytest.raises(RunError, match="Flower's mean is off by"):
        measure(lambda _: None, TINY)


def test_without_tenseal_there_is_a_note_and_no_figure_of_ckks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tenseal", None)
    notes: list[str] = []

    figures = measure(notes.append, TINY)

    assert not [name for name in figures if "ckks" in name]
    assert any("confide[ckks]" in note for note in notes)


def test_what_ckks_sends_is_timed_counted_and_decrypts_to_the_update() -> None:
    pytest.importorskip("tenseal")

    seconds, size = Ckks().send(updates_of(1, 5000)[0])

    assert seconds > 0
    assert size > 2 * 100_000  # two ciphertexts, as one holds 4096 numbers


def test_a_recorded_round_shows_that_the_server_holds_two_vectors_at_a_time() -> None:
    cohort = Cohort(4, RingLayout(length=1_000_000, update_bound=3.0, max_sites=4))
    outcome = cohort.round(updates_of(2, 1_000_000), {1: 3}, record=True)

    peak = cohort.server_peak_bytes(outcome)

    assert {site: len(answers) for site, answers in outcome.answers.items()} == {
        "site-0000": 5,
        "site-0001": 3,
        "site-0002": 5,
        "site-0003": 5,
    }
    assert 2 <= peak / cohort.vector_bytes < 2.5


def updates_of(count: int, length: int) -> list[Floats]:
    """Return updates whose numbers are mostly below 0.003."""
    return [np.float32(1e-3) * np.random.default_rng(seed).standard_normal(length, np.float32) for seed in range(count)]


def adapters_of(root: Path) -> list[Floats]:
    """Return the adapter after each round of the run in `root`."""
    store = Store(root)
    layout = Layout.of({"constant": (50,)})
    return [store.adapter(record.adapter, layout) for record in store.records]
