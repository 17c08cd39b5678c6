"""A whole site from its first command on, with its agent in a process of its own and the rest of a federation rehearsed."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from confide.client.home import Home, replace_private
from confide.client.journal import Journal
from confide.client.keys import approver_in_file, fingerprint
from confide.client.policy import approver_entry
from confide.client.running import call_agent
from confide.client.trail import verify_trail
from confide.common.errors import ConfideError
from confide.server.store import RoundRecord
from confide.simulations.rehearsal import ROSTER, Rehearsal
from tests.conftest import plan_text, run

pytestmark = pytest.mark.slow  # real agents, in processes of their own

WAIT_S = 120.0
START = "from confide.common.cli import main; main()"


class Steward:
    """Somebody who makes a site in the directory `root` and works with it, by its commands alone."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model = root, model
        self.site, self.plan = root / "site", root / "plan.toml"
        text = plan_text(model).replace("# person_id =", 'person_id = "who"').replace("rounds = 3", "rounds = 4")
        self.plan.write_text(text, encoding="utf-8")

    def read(self, *words: object) -> int:
        return run("site", *words, "--site", self.site)

    def do(self, *words: object) -> None:
        assert self.read(*words, "--insecure-no-passphrase") == 0

    def told(self, capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
        capsys.readouterr()
        assert self.read(*words, "--json") == 0
        tree: dict[str, Any] = json.loads(capsys.readouterr().out)
        return tree

    @property
    def socket(self) -> Path:
        return self.site / "run" / "agent.sock"

    @property
    def rehearsal(self) -> Rehearsal:
        return Rehearsal(self.root / "rehearsal")

    def begin(self) -> None:
        """All that comes before a first plan can run."""
        self.do("init", "north")
        assert run("site", "key", "approver", "Anna Huber", "--out", self._key, "--insecure-no-key-passphrase") == 0
        key = Journal.look(self.site / "ledger.db").key.hex()
        assert run("simulate", "rehearsal", "begin", self.root / "rehearsal", "--site", "north", "--key", key) == 0
        admin = self.rehearsal.admin.public
        words = ("--admin", admin.hex(), "--fingerprint", fingerprint(admin))
        self.do("join", self.root / "rehearsal" / ROSTER, *words)
        self.decide(self.sign("first"))
        table = self.root / "made-up.csv"
        assert run("site", "data", "synthetic", self.plan, "--out", table, "--persons", 60) == 0
        self.do("data", "add", "made-up", table, "--person-id", "who", "--plan", self.plan)

    def decide(self, signed: Path) -> None:
        """Put the narrowest policy in force that allows the plan and names Anna, with room for a few such plans."""
        new = self.root / "policy.toml"
        assert self.read("policy", "new", "--for", signed, "--out", new) == 0
        entry = approver_entry(*approver_in_file(self._key))
        text = new.read_text(encoding="utf-8").replace("approvers = []", f'approvers = ["{entry}"]')
        lines = ["epsilon = 60.0" if line.startswith("epsilon =") else line for line in text.splitlines()]
        replace_private(self.site / "policy.toml", "\n".join([*lines, ""]).encode())
        assert self.read("policy", "check") == 0
        self.do("policy", "apply")

    def sign(self, name: str) -> Path:
        """The plan, signed for a run."""
        out = self.root / f"{name}.plan"
        where = self.root / "rehearsal"
        assert run("simulate", "rehearsal", "plan", where, self.plan, "--run", name, "--out", out) == 0
        return out

    def approve(self, signed: Path) -> None:
        assert self.read("plan", "show", signed) == 0
        words = ("--key", self._key, "--insecure-no-key-passphrase", "--model", self.model)
        self.do("plan", "approve", signed, "--data", "made-up", *words)

    @contextlib.contextmanager
    def agent(self, plan: object, *, ready: bool = True) -> Iterator[subprocess.Popen[bytes]]:
        """The agent, in a process of its own; once it serves, or else once it can be asked."""
        words = ("site", "agent", plan, "--model", self.model, "--site", self.site, "--insecure-no-passphrase")
        log = self.root / "agent.log"
        with (
            log.open("ab") as stream,
            subprocess.Popen(
                [sys.executable, "-c", START, *map(str, words)], stderr=stream, start_new_session=True
            ) as process,
        ):
            try:
                waits(lambda: process.poll() is not None or self._serves(ready=ready))
                assert process.poll() is None, log.read_text(encoding="utf-8")
                yield process
            finally:
                process.kill()

    def _serves(self, *, ready: bool) -> bool:
        try:
            doing = json.loads(call_agent(Home.open(self.site), "status"))["doing"]
        except ConfideError:
            return False
        return bool(doing == ("idle" if ready else "loading"))

    @property
    def _key(self) -> Path:
        return self.root / "anna.pem"


def waits(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def steward(tmp_path_factory: pytest.TempPathFactory, base_directory: Path) -> Steward:
    root = tmp_path_factory.mktemp("steward", numbered=True)
    root.chmod(0o700)
    steward = Steward(root, base_directory)
    steward.begin()
    return steward


def test_a_steward_goes_the_whole_way_and_what_she_changes_holds_from_the_next_exchange_on(
    steward: Steward, capsys: pytest.CaptureFixture[str]
) -> None:
    signed = steward.sign("whole")
    steward.approve(signed)
    before = steward.told(capsys, "budget")["accounts"][0]["left"]
    withdrawn = steward.root / "withdrawn.txt"
    with (steward.root / "made-up.csv").open(encoding="utf-8", newline="") as stream:
        withdrawn.write_text("\n".join(sorted({row["who"] for row in csv.DictReader(stream)})[:3]), encoding="utf-8")
    records = list[RoundRecord]()

    def changes(record: RoundRecord) -> None:
        records.append(record)
        if record.round == 1:
            steward.do("data", "withdraw", "made-up", "--ids-file", withdrawn)
        if record.round == 3:
            steward.do("plan", "revoke", "whole", "--reason", "A patient objected.")

    with steward.agent("whole") as process:
        running = steward.told(capsys, "status")["agent"]
        status = steward.rehearsal.run(signed.read_bytes(), model=steward.model, agent=steward.socket, told=changes)
        assert steward.read("stop") == 0
        assert process.wait(WAIT_S) == 0

    assert (running["doing"], running["run"], running["data"]) == ("idle", "whole", "made-up")
    assert status == "completed-degraded"
    assert [bool(record.present) for record in records] == [True, True, True, False]
    assert records[3].missing["north"] == "advertise: Refused"
    (run_now,) = [entry for entry in steward.told(capsys, "status")["runs"] if entry["run"] == "whole"]
    assert (run_now["begun"], run_now["rounds"], run_now["why"]) == (3, 4, "revoked")
    (account,) = steward.told(capsys, "budget")["accounts"]
    (charge,) = [each for each in account["charges"] if each["what"] == "run whole"]
    assert (charge["count"], charge["now"]) == (3, pytest.approx(before - account["left"]))
    trail = [json.loads(line) for path in sorted((steward.site / "log").glob("*.jsonl")) for line in path.open()]
    assert [entry["version"] for entry in trail if entry["event"] == "rows-loaded"] == [2]
    assert any(entry.get("rule") == "approval" for entry in trail)
    assert verify_trail(steward.site / "log").last == len(trail)
    assert steward.read("ledger", "verify") == 0
    assert steward.read("watch", "--once") == 0
    assert not list((steward.site / "run").iterdir())


def test_the_federation_s_adapter_can_be_judged_by_its_directory(
    steward: Steward, capsys: pytest.CaptureFixture[str]
) -> None:
    signed, adapter = steward.sign("judged"), steward.rehearsal.adapter_of("judged")
    steward.approve(signed)
    with steward.agent(signed) as process:
        where = steward.root / "rehearsal"
        words = (where, signed, "--model", steward.model, "--agent", steward.socket)
        assert run("simulate", "rehearsal", "run", *words) == 0
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 0
    held_out = steward.root / "held-out.csv"
    assert run("site", "data", "synthetic", steward.plan, "--out", held_out, "--persons", 20, "--seed", 9) == 0

    tables = ("--held-out", held_out, "--data", "made-up", "--model", steward.model)
    found = steward.told(capsys, "evaluate", adapter, *tables, "--own", adapter, "--insecure-no-passphrase")

    assert found["registered"] == 0
    assert found["rows"] == sum(1 for _ in held_out.open(encoding="utf-8")) - 1
    assert set(found["scores"]) == {"untrained", "own", "federated"}


def test_an_agent_that_was_killed_can_be_started_again_and_ends_in_order_when_it_is_told(steward: Steward) -> None:
    signed = steward.sign("again")
    steward.approve(signed)

    with steward.agent("again") as process:
        assert steward.read("agent", "again", "--model", steward.model, "--insecure-no-passphrase") == 2
        os.kill(process.pid, signal.SIGKILL)
        process.wait(WAIT_S)
    assert steward.socket.exists()
    with steward.agent("again") as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
    with steward.agent("again", ready=False) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0

    assert not list((steward.site / "run").iterdir())
