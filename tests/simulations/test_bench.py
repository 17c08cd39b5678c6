"""The frame of the benchmarks, and what their constant rounds do. No figure is judged here."""

import itertools
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from confide.client.agent import Agent
from confide.common.adapter import Floats, Layout
from confide.common.errors import RunError, UsageError
from confide.common.messages import Contribution, Envelope, Failure, Offer, Words, open_envelope, seal
from confide.common.ring import RingLayout, RingSum, Update
from confide.server.store import Store
from confide.simulations import bench
from confide.simulations.bench import Figure, constant_rounds


def test_a_figure_is_the_median_of_its_runs_with_the_lowest_and_the_highest() -> None:
    figure = Figure.of([3.0, 1.0, 10.0, 2.0], "s", "a peer")

    assert figure == Figure(value=2.5, unit="s", peer="a peer", runs=4, spread=(1.0, 10.0))
    assert Figure.of([7.0], "x") == Figure(value=7.0, unit="x", peer="", runs=1, spread=(7.0, 7.0))


def test_a_benchmark_is_one_object_of_named_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []

    def quick(note: bench.Note) -> Mapping[str, Figure]:
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


def test_constant_rounds_sum_exactly_what_the_agents_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[int, dict[str, Words]] = defaultdict(dict)
    answer = Agent.answer

    def witnessed(self: Agent, envelope: Envelope) -> Envelope:
        reply = answer(self, envelope)
        offer, contribution = open_envelope(envelope), open_envelope(reply)
        assert isinstance(offer, Offer)
        assert isinstance(contribution, Contribution)
        sent[offer.round][self.site] = contribution.words.copy()
        return reply

    monkeypatch.setattr(Agent, "answer", witnessed)

    seconds = constant_rounds(4, 50, rounds=2, folder=tmp_path)

    assert len(seconds) == 2
    assert {number: sorted(words) for number, words in sent.items()} == {
        number: ["site-000", "site-001", "site-002", "site-003"] for number in (1, 2, 3)
    }
    assert len({words.tobytes() for round_words in sent.values() for words in round_words.values()}) == 12
    ring = RingLayout(length=50, update_bound=1.0, max_sites=64)
    adapters = [np.zeros(50, np.float32), *adapters_of(tmp_path)]
    for number, (before, after) in enumerate(itertools.pairwise(adapters), start=1):
        total = sum(sent[number].values(), np.zeros(50, np.uint32))
        mean = Update.decode(RingSum(words=total, layout=ring, count=4)).mean
        assert mean == pytest.approx(np.full(50, 1e-4), rel=1e-3)
        np.testing.assert_array_equal(after, before + mean)


def test_a_benchmark_with_a_site_that_fails_gives_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Agent.answer

    def failing(self: Agent, envelope: Envelope) -> Envelope:
        return seal(Failure.of(OSError())) if self.site == "site-001" else answer(self, envelope)

    monkeypatch.setattr(Agent, "answer", failing)

    with pytest.raises(RunError, match="a site did not take part"):
        constant_rounds(4, 50, rounds=1, folder=tmp_path)


def adapters_of(root: Path) -> list[Floats]:
    """Return the adapter after each round of the run in `root`."""
    store = Store(root)
    layout = Layout.of({"constant": (50,)})
    return [store.adapter(record.adapter, layout) for record in store.records]
