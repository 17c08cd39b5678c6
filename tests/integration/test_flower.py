"""The engine that goes through Flower: real agents, a real SuperLink, real postmen on Ray."""

import contextlib
import re
import socket
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from confide.client.agent import Agent
from confide.client.conformance import certify
from confide.common.errors import RunError
from confide.common.model import AdaptedModel, attach
from confide.common.plan import Plan, read_plan
from confide.server.aggregate import ServerState
from confide.server.rounds import Run
from confide.server.store import RoundRecord, Store
from confide.simulations.federation import Engine, Federation, run_in_process
from confide.simulations.flower import run_through_flower
from tests.conftest import MakeExamples, plan_text

pytestmark = pytest.mark.slow


@pytest.fixture
def text(base_directory: Path) -> str:
    """The tiny plan, with a server optimizer whose memory must survive between rounds."""
    return re.sub(
        r"^server_optimizer = .*$", 'server_optimizer = "fedadam"', plan_text(base_directory), flags=re.MULTILINE
    )


@pytest.fixture
def plan(text: str) -> Plan:
    return read_plan(text.encode())


@pytest.fixture
def federation(base_directory: Path, plan: Plan, make_examples: MakeExamples) -> Federation:
    certificate = certify(attach(base_directory, plan), cached=False)
    sites = {f"clinic-{number}": make_examples(40, seed=number, persons=30) for number in range(3)}
    return Federation(name="tiny", certificate=certificate, sites=sites, cache=None, seed=11, summation="real")


def started(federation: Federation, root: Path, text: str) -> tuple[Run, Mapping[str, Agent], Store, ServerState]:
    """Return what an engine needs to run the federation in `root`."""
    store = Store(root)
    (root / "plan.toml").write_text(text)
    model: AdaptedModel = federation.model
    return *federation.begin(root), store, ServerState.begin(model.start, federation.plan.federation)


class Witness:
    """Takes note of the records it is told, and of the processes and ports it sees below this process."""

    def __init__(self) -> None:
        self.records: list[RoundRecord] = []
        self.before = set(psutil.Process().children(recursive=True))
        self.processes: set[psutil.Process] = set()
        self.ports: set[tuple[str, int]] = set()
        self.postmen: dict[int, bool] = {}  # whether each has torch in memory

    def told(self, record: RoundRecord) -> None:
        self.records.append(record)
        for process in set(psutil.Process().children(recursive=True)) - self.before:
            self.processes.add(process)
            with contextlib.suppress(psutil.Error):  # it may be gone by now
                listening = [c.laddr for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
                self.ports.update((address.ip, address.port) for address in listening)
                if process.name().startswith("ray::Client"):
                    self.postmen[process.pid] = any("torch" in mapped.path for mapped in process.memory_maps())

    def left(self) -> list[psutil.Process]:
        """Return the processes that were seen and still run."""
        return [p for p in self.processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def run_to_end(engine: Engine, federation: Federation, root: Path, text: str) -> tuple[str, list[RoundRecord]]:
    run, agents, store, start = started(federation, root, text)
    status = engine(run, agents, store, start, lambda _: None)
    return status, store.records


def adapters(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((root / "adapters").iterdir())}


def test_both_engines_give_bit_equal_adapters_and_flower_leaves_nothing_behind(
    federation: Federation, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    witness = Witness()
    run, agents, store, start = started(federation, tmp_path / "flower", text)

    status = run_through_flower(run, agents, store, start, witness.told)
    plain_status, plain_records = run_to_end(run_in_process, federation, tmp_path / "plain", text)

    assert status == plain_status == "completed"
    assert witness.records == store.records
    assert {record.summation for record in (*store.records, *plain_records)} == {"secure_aggregation"}
    assert [record.adapter for record in store.records] == [record.adapter for record in plain_records]
    assert [record.moments for record in store.records] == [record.moments for record in plain_records]
    assert adapters(tmp_path / "flower") == adapters(tmp_path / "plain")
    assert len(adapters(tmp_path / "plain")) == len(plain_records) == 3
    assert witness.left() == []
    assert witness.postmen
    assert not any(witness.postmen.values())
    assert {ip.removeprefix("::ffff:") for ip, _ in witness.ports} == {"127.0.0.1"}
    for _, port in witness.ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
    assert not (tmp_path / "home" / ".flwr").exists()


def test_a_run_that_was_interrupted_leaves_nothing_and_goes_on_to_the_same_bytes(
    federation: Federation, text: str, tmp_path: Path
) -> None:
    witness = Witness()

    def interrupt(record: RoundRecord) -> None:
        witness.told(record)
        raise KeyboardInterrupt

    run, agents, store, start = started(federation, tmp_path / "flower", text)

    with pytest.raises(KeyboardInterrupt):
        run_through_flower(run, agents, store, start, interrupt)
    left, done = witness.left(), len(Store(tmp_path / "flower").records)
    status, records = run_to_end(run_through_flower, federation, tmp_path / "flower", text)
    _, plain_records = run_to_end(run_in_process, federation, tmp_path / "plain", text)

    assert left == []
    assert done == 1
    assert status == "completed"
    assert [record.adapter for record in records] == [record.adapter for record in plain_records]


def test_a_run_that_fails_inside_flower_says_why(federation: Federation, text: str, tmp_path: Path) -> None:
    run, agents, store, start = started(federation, tmp_path / "flower", text)
    (tmp_path / "flower" / "plan.toml").unlink()

    with pytest.raises(RunError, match=r"Cannot read the plan .*plan\.toml"):
        run_through_flower(run, agents, store, start, lambda _: None)

    assert (tmp_path / "flower" / "flower.log").stat().st_size > 0
    assert Store(tmp_path / "flower").records == []
