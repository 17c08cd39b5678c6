"""`confide plan budget` and `confide plan explain`, as a person at a terminal meets them."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from confide.common.accounting import cost, planned_cost, planned_spend
from confide.common.budget import left, spent_before, what_if
from confide.common.calibration import noise_multiplier
from confide.common.errors import PrivacyError, UsageError
from confide.common.explain import explain
from confide.common.filter import Filter, order_for
from confide.common.plan import Plan, load_plan
from tests.common.spending import spent_file
from tests.conftest import run

DEMO = Path(__file__).parents[2] / "simulations" / "messages.toml"


@pytest.fixture(scope="module")
def demo() -> Plan:
    return load_plan(DEMO)


def asked(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert run("plan", "budget", DEMO, "--json", *arguments) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_budget_tells_the_cost_after_each_stretch_and_what_else_it_would_cost(
    demo: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = asked(capsys)

    assert answer["noise_multiplier"] == noise_multiplier(demo.privacy) == 0.7688
    assert [stop["round"] for stop in answer["course"]] == list(range(1, 11))
    for stop in answer["course"]:
        spent = planned_cost(demo.privacy, stop["round"])
        assert (stop["pld"], stop["rdp"]) == (spent.pld, spent.rdp)
    assert answer["conversions"]["replace_one"] == pytest.approx(9.90, abs=0.01)
    assert answer["conversions"]["sites"]["2"] == planned_cost(demo.privacy, 20).declared
    assert answer["left"] is answer["forecast"] is None
    assert answer["changed"] == {}


def test_budget_in_words_has_a_table_and_conversions(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "budget", DEMO) == 0

    told = capsys.readouterr().out
    assert re.search(r"^ +10 +40 +8\.000 +9\.718 *$", told, re.MULTILINE)
    assert re.search(r"^ +8\.000  a row replaced by nothing, as above$", told, re.MULTILINE)
    assert re.search(r"^ +9\.897  a row replaced by another row$", told, re.MULTILINE)
    assert "?  somebody with several rows: ask with --rows-per-person K" in told
    assert all(line == line.rstrip() for line in told.splitlines())


def test_another_epsilon_tells_the_noise_it_needs(demo: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    answer = asked(capsys, "--epsilon", 4)

    needed = noise_multiplier(dataclasses.replace(demo.privacy, epsilon=4.0))
    assert answer["changed"] == {
        "epsilon": {"plan": 8.0, "here": 4.0},
        "noise_multiplier": {"plan": 0.7688, "here": needed},
    }
    assert answer["epsilon"]["declared"] <= 4


def test_another_noise_tells_what_it_costs(demo: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    answer = asked(capsys, "--noise", 1.5)

    assert answer["noise_multiplier"] == 1.5
    assert answer["epsilon"]["declared"] == cost([planned_spend(demo.privacy, 10, 1.5)], 1e-5).declared


def test_other_rounds_steps_and_rates_keep_epsilon_and_change_the_noise(
    demo: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    fewer = what_if(demo, rounds=5)
    denser = asked(capsys, "--rounds", 5, "--steps", 8, "--sampling-rate", 0.2)

    assert fewer.changed[0] == ("rounds", 10.0, 5.0)
    assert fewer.noise < 0.7688
    assert fewer.cost().declared <= 8
    assert (denser["rounds"], denser["steps_per_round"], denser["sampling_rate"]) == (5, 8, 0.2)
    assert denser["changed"]["steps_per_round"] == {"plan": 4.0, "here": 8.0}
    assert denser["noise_multiplier"] > 0.7688
    assert denser["epsilon"]["declared"] <= 8


def test_the_rounds_a_budget_leaves_are_those_a_filter_lets_through(demo: Plan) -> None:
    found = what_if(demo)
    one = planned_spend(demo.privacy)

    answer = left(found, 12.0, [one] * 3)

    gate = Filter(epsilon=12.0, delta=1e-5, order=order_for(12.0, 1e-5, one)).after([one] * 3)
    for _ in range(answer.rounds):
        gate = gate.with_spend(one)
    with pytest.raises(PrivacyError):
        gate.with_spend(one)
    assert answer.spends == 3


@pytest.mark.parametrize("budget", [3.0, 8.0, 20.0])
@pytest.mark.parametrize("before", [0, 2])
def test_the_rounds_left_if_fixed_in_advance_are_the_most_that_fit(demo: Plan, budget: float, before: int) -> None:
    spent = [planned_spend(demo.privacy)] * before

    answer = left(what_if(demo), budget, spent)

    most = answer.declared_rounds
    assert most is not None
    assert most >= answer.rounds
    if most:
        assert planned_cost(demo.privacy, before + most).declared <= budget
    assert planned_cost(demo.privacy, before + most + 1).declared > budget


def test_a_budget_that_is_overspent_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "budget", DEMO, "--budget", 2, "--spent-rounds", 5) == 0

    told = " ".join(capsys.readouterr().out.split())
    assert re.search(r"5 rounds spent before; they have used [\d.]+ of 2, which is more than the budget\.", told)
    assert "0 more rounds like these can follow" in told


def test_what_a_site_spent_is_read_from_its_exported_ledger(
    demo: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = spent_file(tmp_path, demo, 3)

    assert [spend.round for spend in spent_before(path)] == [1, 2, 3]
    by_file = asked(capsys, "--budget", 12, "--spent", path)
    assert by_file["left"] == asked(capsys, "--budget", 12, "--spent-rounds", 3)["left"]
    assert asked(capsys, "--budget", 12, "--spent", path, "--account", 1)["left"] == by_file["left"]
    assert run("plan", "budget", DEMO, "--budget", 12, "--spent", path, "--account", 2) == 2


def test_an_exported_ledger_that_was_changed_is_refused(
    demo: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = spent_file(tmp_path, demo, 3)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"steps":4', b'"steps":1', 1))
    assert path.read_bytes() != raw

    assert run("plan", "budget", DEMO, "--budget", 12, "--spent", path) == 13
    assert "the ledger" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--epsilon", "4", "--noise", "1"], 2, "Leave one of them out"),
        (["--noise", "0"], 2, "outside its range"),
        (["--noise", "nan"], 2, "outside its range"),
        (["--epsilon", "1000"], 2, "outside its range"),
        (["--rounds", "0"], 2, "outside its range"),
        (["--rounds", "100000", "--steps", "1000"], 2, "at most 1000000 are allowed"),
        (["--sampling-rate", "2"], 2, "outside its range"),
        (["--budget", "0"], 2, "outside its range"),
        (["--spent-rounds", "3"], 2, "Give one with --budget"),
        (["--budget", "9", "--account", "1"], 2, "Give one with --spent"),
        (["--budget", "9", "--spent-rounds", "0"], 2, "outside its range"),
        (["--budget", "9", "--spent", "nowhere.jsonl"], 2, "Cannot read the export"),
        (["--rows-per-person", "1"], 2, "outside its range"),
        (["--figure", "epsilon.pdf"], 2, "must end in .png or .svg"),
        (["--epsilon", "1e-6"], 7, "cannot be reached"),
        (["--budget", "1e-9"], 7, "has no room"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_asked_is_refused_in_words(
    arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("plan", "budget", DEMO, *arguments) == code

    assert says in capsys.readouterr().err


def test_a_noise_too_small_to_certify_is_told_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "epsilon.svg"

    answer = asked(capsys, "--noise", 1e-7, "--budget", 12, "--figure", figure)

    assert answer["course"][-1] == {"round": 10, "pld": None, "rdp": None}
    assert answer["conversions"]["replace_one"] is None
    assert answer["left"]["rounds"] == answer["left"]["declared_rounds"] == 0
    assert answer["left"]["course"] == [None] * 10
    assert figure.exists()


def test_several_rows_of_one_person_are_told_on_request(demo: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    answer = asked(capsys, "--sampling-rate", 1, "--noise", 20, "--rounds", 1, "--rows-per-person", 2)

    told = answer["conversions"]["rows_per_person"]
    everybody = dataclasses.replace(demo.privacy, sampling_rate=1.0)
    # Without sampling, two rows move the sum by two clip norms, which is as if there were half the noise.
    assert told["rows"] == 2
    assert told["epsilon"] == pytest.approx(cost([planned_spend(everybody, 1, 10.0)], 1e-5).pld, rel=0.01)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_figure_is_drawn_and_equal_each_time(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / f"first.{suffix}", tmp_path / f"second.{suffix}"

    asked(capsys, "--figure", first, "--budget", 12)
    asked(capsys, "--figure", second, "--budget", 12)

    assert first.read_bytes() == second.read_bytes()
    assert len(first.read_bytes()) > 1000


def test_without_matplotlib_the_figure_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    assert run("plan", "budget", DEMO, "--figure", tmp_path / "epsilon.png") == 11

    assert "confide[simulate]" in capsys.readouterr().err


def test_a_what_if_without_changes_is_the_plan(demo: Plan) -> None:
    assert what_if(demo, rounds=10).changed == ()
    assert what_if(demo).privacy == demo.privacy
    with pytest.raises(UsageError):
        what_if(demo, epsilon=float("nan"))


def test_explain_states_unit_neighbours_divisor_and_conversions(demo: Plan) -> None:
    sections = {heading: " ".join(sentences) for heading, sentences in explain(demo)}

    for fragment in (
        "The unit is the row: each is drawn, cut and counted on its own",
        "N, only sets the constant 0.1 × N by which the noised sum is divided.",
        "gradients are replaced by zeros",
        "only Poisson sampling is counted",
        "a delta below 1e-12",
    ):
        assert fragment in sections["What is guaranteed"]
    for fragment in ("epsilon = 9.90", "10.76 at 2, 13.02 at 3", "more than k times epsilon"):
        assert fragment in sections["What else it would cost"]
    assert "/ √d times as long as the noise" in sections["What is to be expected"]


def test_explain_of_persons_says_what_belongs_together(demo: Plan) -> None:
    by_person = dataclasses.replace(demo, data=dataclasses.replace(demo.data, person_id="who", max_rows_per_person=5))

    sections = {heading: " ".join(sentences) for heading, sentences in explain(by_person)}

    assert "all her rows, up to 5, are drawn together" in sections["What is guaranteed"]
    assert "Of one person at most 5 rows are used, the first in the table" in sections["On what"]
    assert "k times epsilon" not in sections["What else it would cost"]


def test_explain_leaves_conversions_of_long_runs_to_budget(demo: Plan) -> None:
    long = dataclasses.replace(demo, privacy=dataclasses.replace(demo.privacy, epsilon=1.0, rounds=501))

    sections = dict(explain(long))

    assert "confide plan budget PLAN" in sections["What else it would cost"][0]


def test_explain_with_a_model_counts_its_trained_numbers(demo: Plan, plan: Plan, base_directory: Path) -> None:
    plan = dataclasses.replace(plan, privacy=demo.privacy)

    told = dict(explain(plan, base_directory))["What is to be expected"][0]

    # Two layers, two modules of 16 outputs at rank 2, and three labels on 16 wide with their biases.
    assert f"With {2 * 2 * 16 * 2 + 3 * 17} trained numbers" in told
