"""`confide plan budget` and `confide plan explain`, as a person at a terminal meets them."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from confide.client.spends import SpendLog
from confide.common.accounting import cost, planned_cost, planned_spend
from confide.common.budget import left, what_if
from confide.common.calibration import noise_multiplier
from confide.common.errors import PrivacyError, UsageError
from confide.common.explain import explain
from confide.common.filter import Filter, order_for
from confide.common.plan import Plan, load_plan
from confide.common.spend import read_spent
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
    assert "9.897  a row replaced by another" in told
    assert "ask with --rows-per-person K" in told


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


def test_other_rounds_steps_and_rates_keep_epsilon_and_change_the_noise(capsys: pytest.CaptureFixture[str]) -> None:
    more = asked(capsys, "--rounds", 20)
    bigger = asked(capsys, "--steps", 8, "--sampling-rate", 0.05)

    assert more["changed"]["rounds"] == {"plan": 10, "here": 20}
    assert more["noise_multiplier"] > 0.7688
    assert more["epsilon"]["declared"] <= 8
    assert (bigger["steps_per_round"], bigger["sampling_rate"]) == (8, 0.05)
    assert bigger["noise_multiplier"] < 0.7688


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


@pytest.mark.parametrize("budget", [3.0, 8.0, 12.0, 40.0])
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
    assert "which is more than the budget" in told
    assert "0 rounds of this plan can follow" in told


def spent_file(folder: Path, plan: Plan, rounds: int) -> Path:
    path = folder / "north.jsonl"
    log = SpendLog(path)
    for number in range(1, rounds + 1):
        log.reserve(dataclasses.replace(planned_spend(plan.privacy), round=number), "sha256:" + "0" * 64)
        log.bind(number, "sha256:" + "1" * 64)
        log.open(number)
    return path


def test_a_sites_record_of_spends_is_read_as_the_site_reads_it(
    demo: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = spent_file(tmp_path, demo, 3)

    assert read_spent(path) == SpendLog(path).spends
    by_file = asked(capsys, "--budget", 12, "--spent", path)
    assert by_file["left"] == asked(capsys, "--budget", 12, "--spent-rounds", 3)["left"]


def test_a_torn_last_line_never_happened_unless_it_lacks_only_its_end(demo: Plan, tmp_path: Path) -> None:
    path = spent_file(tmp_path, demo, 2)
    whole = path.read_bytes()
    extra = dataclasses.replace(planned_spend(demo.privacy), round=3)
    SpendLog(path).reserve(extra, "sha256:" + "0" * 64)
    longer = path.read_bytes()

    for cut, rounds in ((len(whole) + 20, 2), (len(longer) - 1, 3), (len(longer), 3)):
        path.write_bytes(longer[:cut])
        assert len(read_spent(path)) == rounds


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw.replace(b'"steps":4', b'"steps":0', 1),
        lambda raw: raw.replace(b'"steps":4', b'"steps":4.0', 1),
        lambda raw: raw.replace(b'"round":1', b'"round":true', 1),
        lambda raw: raw.replace(b'"round":2', b'"round":1'),
        lambda raw: raw.replace(b'"sampling_rate":0.1', b'"sampling_rate":"0.1"', 1),
        lambda raw: raw.replace(b'"noise_multiplier":', b'"noise_multiplier": ', 1),
        lambda raw: raw.replace(b"confide-spend/1", b"confide-spend/2", 1),
        lambda raw: b"\n" + raw,
        lambda raw: b"[]\n" + raw,
        lambda raw: raw[1:],
    ],
)
def test_a_damaged_record_of_spends_is_refused(spoil: Any, demo: Plan, tmp_path: Path) -> None:
    path = spent_file(tmp_path, demo, 2)
    spoiled = spoil(path.read_bytes())
    assert spoiled != path.read_bytes()
    path.write_bytes(spoiled)

    with pytest.raises(PrivacyError, match=r"Line \d of the spend record .* is damaged"):
        read_spent(path)


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
        (["--budget", "9", "--spent-rounds", "0"], 2, "outside its range"),
        (["--budget", "9", "--spent", "nowhere.jsonl"], 2, "Cannot read the spend record"),
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


def test_a_noise_too_small_to_certify_is_told_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    answer = asked(capsys, "--noise", 0.001)

    assert answer["course"][-1]["pld"] is None
    assert answer["conversions"]["replace_one"] is None


def test_several_rows_of_one_person_are_told_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    told = asked(capsys, "--rows-per-person", 2)["conversions"]["rows_per_person"]

    assert told["rows"] == 2
    assert told["epsilon"] == pytest.approx(17.86, abs=0.02)


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
    long = dataclasses.replace(demo, privacy=dataclasses.replace(demo.privacy, rounds=1000))

    sections = dict(explain(long))

    assert "confide plan budget PLAN" in sections["What else it would cost"][0]


def test_explain_with_a_model_counts_its_trained_numbers(plan_file: Path, base_directory: Path) -> None:
    plan = load_plan(plan_file)

    told = dict(explain(plan, base_directory))["What is to be expected"][0]

    # Two layers, two modules of 16 outputs at rank 2, and three labels on 16 wide with their biases.
    assert f"With {2 * 2 * 16 * 2 + 3 * 17} trained numbers" in told
