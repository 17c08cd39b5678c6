"""The benchmark of ledger and agent measures real ones, and only those that did their work. No figure is judged here."""

import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from confide.client.journal import Journal
from confide.client.postbox import private_folder
from confide.common.entries import SEEDED
from confide.common.errors import RunError
from confide.common.export import read_export
from confide.common.ledger import COMMITTED, verify
from confide.simulations import bench, ledger_bench
from confide.simulations.ledger_bench import MadeUpSite, Sizes, held_mb, ledger_figures, measure
from confide.simulations.measurement import Figure

TINY = Sizes(records=500, appends=8, verifications=2, memory_pairs=1, rounds=2, persons=20)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory that is short enough for sockets."""
    with private_folder() as path:
        yield path


def test_the_benchmark_of_the_ledger_is_one_of_the_known(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = Figure.of([1.5], "ms")
    monkeypatch.setattr(ledger_bench, "measure_demo", lambda note: {"append_ms": figure})

    result = bench.bench("ledger", lambda _: None)

    assert result["figures"] == {"append_ms": dataclasses.asdict(figure)}


def test_each_timed_append_is_a_record_of_a_whole_ledger_that_had_the_size_before(folder: Path) -> None:
    figures = ledger_figures(lambda _: None, TINY, folder)

    book = verify(*read_export(folder / "export.jsonl"))
    rounds = [known for run in book.runs for known in book.rounds(run).values()]
    assert book.size == TINY.records + TINY.appends
    assert Journal.look(folder / "ledger.db").root == book.root
    assert len({known.reserve.noise_multiplier for known in rounds}) == len(book.runs) == 100
    assert [known.state for known in rounds].count(COMMITTED) == len(rounds)
    assert not any(known.reserve.noise == SEEDED for known in rounds)  # those would be let through twice
    assert {name: figure.runs for name, figure in figures.items()} == {"append_ms": 8, "fsync_ms": 8, "verify_s": 2}
    assert all(figure.spread[0] > 0 for figure in figures.values())


def test_the_memory_of_several_processes_has_the_pages_of_each_file_once() -> None:
    command = [sys.executable, "-c", "import numpy; print(flush=True); input()"]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as one,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other,
    ):
        for process in (one, other):
            assert process.stdout is not None
            process.stdout.readline()
        first, second = psutil.Process(one.pid), psutil.Process(other.pid)

        alone, together = held_mb([first]), held_mb([first, second])

        own = sum(part.anonymous for part in second.memory_maps(grouped=False)) / 1e6
        assert alone == pytest.approx(first.memory_info().rss / 1e6, rel=0.02)
        assert together == pytest.approx(alone + own, rel=0.02)
        one.communicate(b"\n")
        other.communicate(b"\n")


def test_an_agent_that_cannot_begin_gives_no_figure_and_says_why(
    folder: Path, plan_file: Path, base_directory: Path
) -> None:
    site = MadeUpSite.begin(folder, plan_file.read_bytes(), base_directory, persons=20)
    site.home.policy.unlink()

    with pytest.raises(RunError, match=r"(?s)did not begin: .*Without a policy, nothing is allowed"), site.agent():
        pass


@pytest.mark.slow
def test_real_agents_give_every_figure_that_the_page_names(plan_file: Path, base_directory: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "bench-json.md").read_text(encoding="utf-8")
    section = page.partition("## `ledger`")[2].partition("\n## ")[0]
    notes: list[str] = []

    figures = measure(notes.append, TINY, plan_file.read_bytes(), base_directory)

    assert figures.keys() == set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))
    idle, agent, model = (figures[name].value for name in ("agent_idle_mb", "agent_mb", "model_mb"))
    assert idle == pytest.approx(agent - model)
    assert min(agent, model) > 0
    assert figures["socket_ms"].value >= figures["socket_alone_ms"].value > 0
    assert figures["socket_ms"].runs == TINY.rounds
    assert re.search(r"Files lie on \w+", notes[0])


@pytest.mark.slow
def test_a_timed_agent_trains_each_round_and_spends_it(folder: Path, plan_file: Path, base_directory: Path) -> None:
    site = MadeUpSite.begin(folder, plan_file.read_bytes(), base_directory, persons=20)

    with site.timed_agent():
        times = site.rounds()

    rounds = Journal.look(site.home.ledger).rounds("bench")
    assert [known.state for known in rounds.values()] == [COMMITTED] * 3
    assert len(times) == 3
    assert all(each.asked_s > each.answering_s > each.training_s > 0 for each in times)


@pytest.mark.slow
def test_an_agent_that_takes_no_part_in_a_round_gives_no_figure(
    folder: Path, plan_file: Path, base_directory: Path
) -> None:
    site = MadeUpSite.begin(folder, plan_file.read_bytes(), base_directory, persons=20)

    with site.timed_agent():
        site.home.policy.unlink()

        with pytest.raises(RunError, match="took no part in round 1"):
            site.rounds()
