"""Whole simulations from the command line, on the tiny model."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import peft
import pytest
import torch
import transformers

from confide.client.conformance import certify
from confide.common.messages import vector_digest
from confide.common.model import attach
from confide.common.plan import load_plan
from confide.server.aggregate import ServerState
from confide.server.rounds import run_rounds
from confide.server.store import RoundRecord, Store
from confide.simulations.federation import Federation, InProcessChannel, run_in_process
from tests.conftest import BY_CLINIC, MakeExamples, run, simulate


@pytest.fixture
def finished(
    tmp_path: Path, plan_file: Path, base_directory: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    code = simulate(tmp_path / "run", plan_file, base_directory, table, *BY_CLINIC, "--compare")
    assert code == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_a_run_says_everything_it_did(finished: dict[str, Any], tmp_path: Path) -> None:
    clinics = {"clinic-0", "clinic-1", "clinic-2"}

    assert finished["status"] == "completed"
    assert finished["rounds"] == 3
    assert set(finished["scores"]) == {
        "untrained",
        "federated",
        "alone",
        "pooled",
        "pooled_not_private",
        "head_only",
    }
    assert set(finished["scores"]["alone"]) == set(finished["epsilon"]) == set(finished["sites"]) == clinics
    assert finished["epsilon_target"] == 8.0
    assert finished["delta"] == 1e-3
    assert finished["seconds"] > 0
    vector_bytes = 4 * finished["trained_numbers"]
    # Keys, shares and signatures: at most 115 bytes for each of three sites, and 1024; 172 for a checkpoint of the ledger.
    assert vector_bytes < finished["bytes_up_per_site_round"] < vector_bytes + 115 * 3 + 1024 + 172
    assert finished["weakened_by"] == ["insecure_seeded_noise"]
    for record in finished["round_records"]:
        assert (record["summation"], record["attempts"], record["void"]) == ("secure_aggregation", 1, "")
        assert (record["bounded"], record["saturated"]) == (0.0, 0.0)
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == finished
    for figure in ("rounds.png", "rounds.svg", "sites.png", "sites.svg"):
        assert (tmp_path / "run" / "figures" / figure).stat().st_size > 5000


def test_the_reported_epsilon_equals_an_independent_recomputation_from_the_recorded_events(
    finished: dict[str, Any],
) -> None:
    for site, events in finished["spends"].items():
        accountant = dp_accounting.pld.PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
        for event in events:
            step = dp_accounting.PoissonSampledDpEvent(
                event["sampling_rate"], dp_accounting.GaussianDpEvent(event["noise_multiplier"])
            )
            accountant.compose(step, event["steps"])

        assert len(events) == 3
        assert sum(event["steps"] for event in events) == 6
        assert finished["epsilon"][site] == pytest.approx(accountant.get_epsilon(finished["delta"]), rel=2e-3)
        assert finished["epsilon"][site] <= 8.0


def test_the_adapter_directory_is_standard_peft_with_manifest_and_card(
    finished: dict[str, Any], tmp_path: Path, base_directory: Path
) -> None:
    adapter = tmp_path / "run" / "adapter"
    manifest = json.loads((adapter / "manifest.json").read_text())

    base = transformers.AutoModelForSequenceClassification.from_pretrained(base_directory, num_labels=3)
    loaded = peft.PeftModel.from_pretrained(base, adapter).eval()

    plan = load_plan(adapter / "plan.toml")
    model = attach(base_directory, plan)
    vector = model.import_exported(adapter)
    model.write(vector)
    inputs = {"input_ids": torch.tensor([[2, 5, 8, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model.network(**inputs).logits)
    assert manifest["adapter"] == vector_digest(vector) == finished["round_records"][-1]["adapter"]
    assert manifest["plan"]["digest"] == plan.digest
    assert manifest["lineage"][0]["adapter"] == manifest["lineage"][1]["parent"]
    assert manifest["weakened_by"] == ["insecure_seeded_noise"]
    assert {version["summation"] for version in manifest["lineage"]} == {"secure_aggregation"}
    assert "insecure_seeded_noise" in (adapter / "README.md").read_text()
    assert str(tmp_path) not in (adapter / "README.md").read_text() + (adapter / "adapter_config.json").read_text()


def files(directory: Path) -> Mapping[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_a_run_without_masks_gives_the_same_bits_and_says_that_nothing_hid_them(
    tmp_path: Path, plan_file: Path, base_directory: Path, table: Path
) -> None:
    for name in ("real", "insecure_plain_sum"):
        more = (*BY_CLINIC, "--no-alone", "--summation", name)
        assert simulate(tmp_path / name, plan_file, base_directory, table, *more) == 0

    secure, plain = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("real", "insecure_plain_sum"))
    for key in ("scores", "epsilon", "spends", "history", "status"):
        assert secure[key] == plain[key]
    assert [r["adapter"] for r in secure["round_records"]] == [r["adapter"] for r in plain["round_records"]]
    assert files(tmp_path / "real" / "adapters") == files(tmp_path / "insecure_plain_sum" / "adapters")
    assert plain["weakened_by"] == ["insecure_plain_sum", "insecure_seeded_noise"]
    assert "insecure_plain_sum" in (tmp_path / "insecure_plain_sum" / "adapter" / "README.md").read_text()
    assert "insecure_plain_sum" not in (tmp_path / "real" / "adapter" / "README.md").read_text()


# The channel is used five times a round: the seventh time for keys, the eighth for training, the tenth to open the sum.
@pytest.mark.parametrize(("optimizer", "stop"), [("fedavg", 7), ("fedavg", 8), ("fedadam", 10)])
def test_a_run_stopped_in_any_round_resumes_to_the_same_bytes(
    tmp_path: Path,
    plan_file: Path,
    base_directory: Path,
    table: Path,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
    stop: int,
) -> None:
    text = plan_file.read_text().replace('server_optimizer = "fedavg"', f'server_optimizer = "{optimizer}"')
    plan_file.write_text(text)
    assert simulate(tmp_path / "whole", plan_file, base_directory, table, *BY_CLINIC) == 0

    asked = 0
    answer = InProcessChannel.ask

    def interrupted(self: InProcessChannel, *args: Any, **kwargs: Any) -> Any:
        nonlocal asked
        asked += 1
        answers = list(answer(self, *args, **kwargs))
        if asked == stop:  # all sites have answered in the second round, the server has not recorded it
            raise KeyboardInterrupt
        return iter(answers)

    monkeypatch.setattr(InProcessChannel, "ask", interrupted)
    assert simulate(tmp_path / "stopped", plan_file, base_directory, table, *BY_CLINIC) == 130
    assert run("simulate", "run", "--resume", tmp_path / "stopped", "--json") == 0

    assert files(tmp_path / "stopped" / "adapter") == files(tmp_path / "whole" / "adapter")
    whole, stopped = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "stopped"))
    for key in ("scores", "epsilon", "spends", "history", "status"):
        assert stopped[key] == whole[key]


def test_a_run_whose_table_changed_is_not_resumed(
    tmp_path: Path, plan_file: Path, base_directory: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate(tmp_path / "run", plan_file, base_directory, table, *BY_CLINIC, "--no-alone") == 0
    table.write_text(table.read_text() + "good,positive,clinic-1\n")

    assert run("simulate", "run", "--resume", tmp_path / "run") == 10

    assert "has changed since it began" in capsys.readouterr().err


def test_a_run_whose_plan_changed_is_not_resumed(
    tmp_path: Path, plan_file: Path, base_directory: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate(tmp_path / "run", plan_file, base_directory, table, *BY_CLINIC, "--no-alone") == 0
    kept = tmp_path / "run" / "plan.toml"
    kept.write_text(kept.read_text().replace("epsilon = 8.0", "epsilon = 2.0"))

    assert run("simulate", "run", "--resume", tmp_path / "run") == 10

    assert "The plan of the run in" in capsys.readouterr().err


def test_nothing_is_claimed_when_a_ledger_is_lost(
    tmp_path: Path, plan_file: Path, base_directory: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate(tmp_path / "run", plan_file, base_directory, table, *BY_CLINIC, "--no-alone") == 0
    for left in (tmp_path / "run" / "sites").glob("clinic-1.ledger*"):
        left.unlink()

    assert run("simulate", "run", "--resume", tmp_path / "run") == 7

    assert "nothing can be claimed" in capsys.readouterr().err


def test_a_start_that_failed_may_be_made_anew_in_the_same_place(
    tmp_path: Path, plan_file: Path, base_directory: Path, table: Path
) -> None:
    (tmp_path / "wrong.csv").write_text("text,label\ngood,unknown\n")
    assert simulate(tmp_path / "run", plan_file, base_directory, tmp_path / "wrong.csv", "--no-alone") == 4

    assert simulate(tmp_path / "run", plan_file, base_directory, table, "--no-alone") == 0


def test_a_directory_that_cannot_be_made_is_a_clear_error(
    tmp_path: Path, plan_file: Path, base_directory: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")

    assert simulate(tmp_path / "file" / "run", plan_file, base_directory, table) == 2

    assert "Cannot write to" in capsys.readouterr().err


def test_another_seed_gives_another_adapter(tmp_path: Path, plan_file: Path, base_directory: Path, table: Path) -> None:
    simulate(tmp_path / "a", plan_file, base_directory, table, *BY_CLINIC, "--no-alone")
    simulate(tmp_path / "b", plan_file, base_directory, table, *BY_CLINIC, "--no-alone", "--seed", 1)

    a, b = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("a", "b"))
    assert a["round_records"][-1]["adapter"] != b["round_records"][-1]["adapter"]
    assert "alone" not in a["scores"]


@pytest.mark.parametrize("split", ["iid", "dirichlet", "quantity"])
def test_every_split_runs(tmp_path: Path, plan_file: Path, base_directory: Path, table: Path, split: str) -> None:
    uneven = () if split == "iid" else ("--concentration", 20)
    more = ("--split", split, "--sites", 4, "--no-alone", *uneven)

    assert simulate(tmp_path / "run", plan_file, base_directory, table, *more) == 0

    result = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(result["sites"]) == 4
    assert sum(site["rows"] for site in result["sites"].values()) + result["test_rows"] == 90


def test_a_held_out_table_is_used_whole(tmp_path: Path, plan_file: Path, base_directory: Path, table: Path) -> None:
    shutil.copy(table, tmp_path / "test.csv")

    simulate(tmp_path / "run", plan_file, base_directory, table, "--test", tmp_path / "test.csv", "--no-alone")

    result = json.loads((tmp_path / "run" / "run.json").read_text())
    assert result["test_rows"] == 90
    assert sum(site["rows"] for site in result["sites"].values()) == 90


@pytest.mark.parametrize(
    ("summation", "one", "two"),
    [
        ("real", 3, (8, 11)),  # the eleventh use of the channel is the second attempt at the second round
        ("insecure_plain_sum", 2, (4,)),
    ],
)
def test_dropouts_are_told_and_void_rounds_leave_the_adapter_as_it_was(
    tmp_path: Path,
    base_directory: Path,
    plan_file: Path,
    make_examples: MakeExamples,
    summation: str,
    one: int,
    two: tuple[int, ...],
) -> None:
    plan = load_plan(plan_file)
    sites = {f"site-{n}": make_examples(20, seed=n) for n in range(4)}
    certificate = certify(attach(base_directory, plan), cached=False)
    federation = Federation(name="tiny", certificate=certificate, sites=sites, cache=None, seed=0, summation=summation)
    store, told = Store(tmp_path), list[RoundRecord]()
    run, agents = federation.begin(tmp_path / "sites")
    dropouts = {one: frozenset({"site-1"})} | dict.fromkeys(two, frozenset({"site-1", "site-2"}))
    start = ServerState.begin(federation.model.start, plan.federation)

    status = run_rounds(run, InProcessChannel(agents, dropouts), store, start, told.append)

    assert status == "completed-degraded"
    assert told[0].present == ("site-0", "site-2", "site-3")
    assert told[0].missing == {"site-1": "contribute: no answer"}
    assert told[1].present == ()
    assert told[1].missing == {"site-1": "contribute: no answer", "site-2": "contribute: no answer"}
    assert told[1].attempts == len(two)
    assert told[1].void == "After `contribute` 2 of a cohort of 4 sites were left; 3 are needed."
    assert told[1].adapter == told[1].parent == told[0].adapter
    assert told[2].missing == {}
    assert told[2].adapter != told[2].parent


def test_prefix_cache_and_micro_batch_do_not_change_what_is_learned(
    tmp_path: Path, base_directory: Path, plan_file: Path, make_examples: MakeExamples
) -> None:
    plan = load_plan(plan_file)
    sites = {f"site-{n}": make_examples(20, seed=n) for n in range(3)}
    adapters = []
    for micro_batch in (4, 64):
        compute = dataclasses.replace(plan.compute, micro_batch=micro_batch)
        model = attach(base_directory, dataclasses.replace(plan, compute=compute))
        federation = Federation(
            name="tiny",
            certificate=certify(model, cached=False),
            sites=sites,
            cache=None,
            seed=0,
            summation="real",
        )
        directory = tmp_path / str(micro_batch)
        store = Store(directory)
        start = ServerState.begin(model.start, plan.federation)
        run_in_process(*federation.begin(directory), store, start, lambda _: None)
        state = store.latest(model.layout)
        assert state is not None
        adapters.append(state.adapter)

    np.testing.assert_allclose(adapters[0], adapters[1], atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        (("simulate", "run"), 2, "Give a PLAN"),
        (("simulate", "run", "{plan}", "--model", "{base}"), 2, "--data"),
        (("simulate", "run", "no.toml", "--model", "{base}", "--data", "{table}"), 2, "no file no.toml"),
        (("simulate", "run", "{plan}", "--model", "{base}", "--data", "no.csv"), 2, "no file no.csv"),
        (("simulate", "run", "{plan}", "--model", "no-model", "--data", "{table}", "--out", "{out}"), 5, "no model"),
        (("simulate", "run", "{plan}", "--model", "{base}", "--data", "{table}", "--split", "odd"), 2, "no split 'odd'"),
        (("simulate", "run", "{plan}", "--model", "{base}", "--data", "{table}", "--engine", "odd"), 2, "no engine 'odd'"),
        (("simulate", "run", "{plan}", "--data", "{table}", "--summation", "odd"), 2, "no summation 'odd'. Known are real"),
        (("simulate", "run", "{plan}", "--model", "{base}", "--data", "{table}", "--column", "clinic"), 2, "--column"),
        (
            ("simulate", "run", "{plan}", "--model", "{base}", "--data", "{table}", "--split", "column", "--out", "{out}"),
            2,
            "needs --column",
        ),
        (
            (
                "simulate", "run", "{plan}", "--model", "{base}", "--data", "{table}", "--split", "column",
                "--column", "town", "--out", "{out}",
            ),
            4,
            "town",
        ),
        (
            ("simulate", "run", "{plan}", "--model", "{base}", "--data", "{table}", "--sites", "2", "--out", "{out}"),
            2,
            "split into 2 sites; the plan allows 3 to 16",
        ),
        (
            ("simulate", "run", "{plan}", "--model", "{base}", "--data", "{table}", "--sites", "9", "--out", "{out}"),
            4,
            "at least 10",
        ),
        (
            (
                "simulate", "run", "{plan}", "--model", "{base}", "--data", "{table}", "--test-share", "1.5",
                "--out", "{out}",
            ),
            2,
            "--test-share 1.5",
        ),
        (
            (
                "simulate", "run", "{plan}", "--model", "{base}", "--data", "{table}", "--concentration", "nan",
                "--out", "{out}",
            ),
            2,
            "--concentration",
        ),
        (("simulate", "run", "--resume", "{out}"), 10, "no run to resume"),
        (("simulate", "run", "{plan}", "--resume", "{out}"), 2, "--resume"),
        (("simulate", "run", "--resume", "{out}", "--compare", "--seed", "3"), 2, "leave out --compare, --seed"),
        (
            ("simulate", "run", "{plan}", "--data", "{table}", "--split", "column", "--column", "x", "--sites", "4"),
            2,
            "--sites has no effect with --split column",
        ),
        (("simulate", "run", "{plan}", "--data", "{table}", "--concentration", "1"), 2, "no effect with --split iid"),
        (("simulate", "run", "--resume", "{out}", "--summation", "real"), 2, "leave out --summation"),
        (("simulate", "demo", "nothing"), 2, "no scenario 'nothing'"),
        (("simulate", "demo", "--summation", "odd", "--out", "{out}"), 2, "no summation 'odd'"),
        (("simulate", "sweep", "messages", "--seeds", "a"), 2, "--seeds"),
        (("simulate", "sweep", "messages", "--seeds", "1,1"), 2, "--seeds"),
        (("simulate", "sweep", "messages", "--data", "{table}"), 2, "brings its model and tables"),
        (("simulate", "sweep", "{plan}"), 2, "Give --data FILE"),
        (("simulate", "sweep", "{plan}", "--data", "{table}", "--vary", "epsilon=1"), 2, "section.key="),
    ],
)  # fmt: skip
def test_wrong_calls_say_what_is_wrong(
    tmp_path: Path, plan_file: Path, base_directory: Path, table: Path, capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...], code: int, fragment: str,
) -> None:  # fmt: skip
    places = {"plan": plan_file, "base": base_directory, "table": table, "out": tmp_path / "out"}

    found = run(*(argument.format(**places) for argument in arguments))

    told = capsys.readouterr().err
    assert found == code
    assert fragment in told
    assert "Traceback" not in told


@pytest.mark.parametrize("name", ["", "../../etc", "a/b", "line\nbreak", ".", "x" * 64, "naïve"])
def test_a_site_whose_name_is_no_name_is_refused(
    tmp_path: Path, plan_file: Path, base_directory: Path, table: Path, name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    quoted = '"' + name + '"' if "\n" in name else name
    table.write_text(table.read_text().replace("clinic-2", quoted))

    code = simulate(tmp_path / "run", plan_file, base_directory, table, *BY_CLINIC)

    assert code in {2, 4}
    told = capsys.readouterr().err
    assert "Rename the sites" in told or "missing value" in told
    assert not list(tmp_path.glob("**/*.jsonl"))


def test_a_directory_that_holds_a_run_is_not_overwritten(
    tmp_path: Path, plan_file: Path, base_directory: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simulate(tmp_path / "run", plan_file, base_directory, table, "--no-alone")
    before = files(tmp_path / "run")

    assert simulate(tmp_path / "run", plan_file, base_directory, table, "--no-alone") == 10

    assert "--resume" in capsys.readouterr().err
    assert files(tmp_path / "run") == before


def test_a_sweep_runs_each_combination_once_and_goes_on_where_it_was(
    tmp_path: Path, plan_file: Path, base_directory: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        *("simulate", "sweep", plan_file, "--model", base_directory, "--data", table, "--out", tmp_path / "sweep"),
        *("--seeds", "0,1", "--vary", "privacy.rounds=1,2", "--threads", 1, "--json"),
    ]

    assert run(*words) == 0
    first = json.loads(capsys.readouterr().out)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").rglob("run.json")}
    assert run(*words) == 0
    again = json.loads(capsys.readouterr().out)

    assert first == again
    assert set(first["results"]) == {"rounds=1", "rounds=2"}
    assert len(before) == 4
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").rglob("run.json")}
    alone = tmp_path / "alone"
    assert simulate(alone, tmp_path / "sweep/rounds=2/plan.toml", base_directory, table, "--seed", 1, "--no-alone") == 0
    same = json.loads(capsys.readouterr().out)["scores"]["federated"]
    assert json.loads((tmp_path / "sweep/rounds=2/seed-1/run.json").read_bytes())["scores"]["federated"] == same
