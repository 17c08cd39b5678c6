"""Simulations whose noise nobody can repeat: what they say, and what is lost when they are interrupted."""

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from confide.common.accounting import planned_cost
from confide.common.errors import UsageError
from confide.common.plan import load_plan
from confide.simulations.federation import InProcessChannel
from confide.simulations.setting import check_choices
from tests.conftest import BY_CLINIC, run, simulate

CRYPTOGRAPHIC = (*BY_CLINIC, "--no-alone", "--noise", "cryptographic")


def result(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "run.json").read_bytes())
    return found


def test_a_run_with_cryptographic_noise_is_never_the_same_twice_and_weakened_by_its_one_process_only(
    tmp_path: Path, plan_file: Path, base_directory: Path, table: Path
) -> None:
    for name in ("one", "two"):
        assert simulate(tmp_path / name, plan_file, base_directory, table, *CRYPTOGRAPHIC) == 0

    one, two = result(tmp_path / "one"), result(tmp_path / "two")
    manifest = json.loads((tmp_path / "one" / "adapter" / "manifest.json").read_bytes())
    assert one["weakened_by"] == manifest["weakened_by"] == ["insecure_one_process"]
    assert {claim["noise"] for claim in manifest["claims"].values()} == {"cryptographic"}
    assert "insecure_seeded_noise" not in (tmp_path / "one" / "adapter" / "README.md").read_text()
    assert one["setting"]["noise"] == "cryptographic"
    assert one["epsilon"] == two["epsilon"]
    adapters = [record["adapter"] for done in (one, two) for record in done["round_records"]]
    assert len(set(adapters)) == len(adapters) == 6


def recorded(ledger: Path) -> list[bytes]:
    with contextlib.closing(sqlite3.connect(ledger)) as connection:
        return [line for (line,) in connection.execute("SELECT line FROM record ORDER BY seq")]


# The channel is used five times a round: the eighth time for training, the tenth to open the sum.
@pytest.mark.parametrize(
    ("stop", "reason"),
    [
        (8, "Round 2 was begun and its vector is gone; a round is trained once."),
        (10, "The sum of round 2 was opened with this site's help; that happens once a round."),
    ],
)
def test_an_interrupted_round_is_sat_out_paid_for_and_told(
    tmp_path: Path,
    plan_file: Path,
    base_directory: Path,
    table: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    stop: int,
    reason: str,
) -> None:
    asked = 0
    answer = InProcessChannel.ask

    def interrupted(self: InProcessChannel, *args: Any, **kwargs: Any) -> Any:
        nonlocal asked
        asked += 1
        answers = list(answer(self, *args, **kwargs))
        if asked == stop:
            raise KeyboardInterrupt
        return iter(answers)

    monkeypatch.setattr(InProcessChannel, "ask", interrupted)
    assert simulate(tmp_path / "run", plan_file, base_directory, table, *CRYPTOGRAPHIC) == 130
    assert "interrupted is sat out" in capsys.readouterr().err
    ledgers = sorted((tmp_path / "run" / "sites").glob("*.ledger"))
    before = [recorded(path) for path in ledgers]

    assert run("simulate", "run", "--resume", tmp_path / "run", "--json") == 0

    found = result(tmp_path / "run")
    first, second, third = found["round_records"]
    assert found["status"] == "completed-degraded"
    assert first["missing"] == third["missing"] == {}
    assert second["present"] == []
    assert second["missing"] == {f"clinic-{n}": "advertise: Refused" for n in range(3)}
    assert second["adapter"] == second["parent"] == first["adapter"]
    assert caplog.text.count(reason) == 3
    # What was spent on the lost round stays spent, and nothing is spent on it again.
    plan = load_plan(plan_file)
    for path, old in zip(ledgers, before, strict=True):
        assert recorded(path)[: len(old)] == old
    for site, spends in found["spends"].items():
        assert [spend["round"] for spend in spends] == [1, 2, 3]
        assert found["epsilon"][site] == pytest.approx(planned_cost(plan.privacy).epsilon, abs=2e-6)


def test_a_run_begun_before_there_was_a_choice_of_noise_is_not_resumed(
    tmp_path: Path, plan_file: Path, base_directory: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate(tmp_path / "run", plan_file, base_directory, table, *BY_CLINIC, "--no-alone") == 0
    kept = tmp_path / "run" / "setting.json"
    fields = json.loads(kept.read_bytes())
    assert fields.pop("noise") == "insecure_seeded_noise"
    kept.write_text(json.dumps({**fields, "format": "confide-setting/1"}))

    assert run("simulate", "run", "--resume", tmp_path / "run") == 10

    assert "do not say where its noise comes from" in capsys.readouterr().err


def test_a_noise_that_does_not_exist_is_refused(tmp_path: Path, plan_file: Path, table: Path) -> None:
    assert run("simulate", "run", plan_file, "--data", table, "--noise", "odd", "--out", tmp_path / "out") == 2
    with pytest.raises(UsageError, match=r"no noise 'odd'\. Known are insecure_seeded_noise, cryptographic"):
        check_choices(noise="odd")
