"""Sweeps: which plans a sweep makes of one, and what it sums up."""

from pathlib import Path

import pytest

from confide.common.errors import PlanError, UsageError
from confide.common.plan import read_plan
from confide.simulations.sweep import draw, summed, variants


def test_every_combination_is_a_plan_that_differs_in_what_was_varied_only(plan_file: Path) -> None:
    plan = plan_file.read_bytes()

    found = variants(plan, ["privacy.epsilon=1,3.5", "adapter.method=ffa,fedit"])

    assert [variant.name for variant in found] == [
        "epsilon=1,method=ffa",
        "epsilon=1,method=fedit",
        "epsilon=3.5,method=ffa",
        "epsilon=3.5,method=fedit",
    ]
    read = [read_plan(variant.plan) for variant in found]
    assert [(p.privacy.epsilon, p.adapter.method) for p in read] == [
        (1.0, "ffa"),
        (1.0, "fedit"),
        (3.5, "ffa"),
        (3.5, "fedit"),
    ]
    assert len({p.digest for p in read}) == 4


def test_a_sweep_that_varies_nothing_keeps_the_plans_digest(plan_file: Path) -> None:
    (variant,) = variants(plan_file.read_bytes(), [])

    assert read_plan(variant.plan).digest == read_plan(plan_file.read_bytes()).digest
    assert variant.name == "as-planned"


@pytest.mark.parametrize(
    ("vary", "fragment"),
    [
        (["epsilon=1"], "must be section.key="),
        (["privacy.epsilon"], "must be section.key="),
        (["privacy.epsilon=1", "privacy.epsilon=2"], "name each key once"),
        (["a.b=1,2"] * 1 + [f"x.k{n}=1,2,3,4" for n in range(5)], "at most 1000"),
    ],
)
def test_a_malformed_setting_to_vary_is_refused(plan_file: Path, vary: list[str], fragment: str) -> None:
    with pytest.raises(UsageError, match=fragment):
        variants(plan_file.read_bytes(), vary)


def test_lists_and_quoted_texts_keep_their_commas(plan_file: Path) -> None:
    found = variants(plan_file.read_bytes(), ['adapter.targets=["query","value"],["query"]'])

    assert [read_plan(variant.plan).adapter.targets for variant in found] == [("query", "value"), ("query",)]
    assert [variant.name for variant in found] == ["targets=query+value", "targets=query"]


@pytest.mark.parametrize("text", ["../../elsewhere", "/etc", "a/b", "x" * 200])
def test_a_name_is_one_folder_whatever_the_value(plan_file: Path, text: str) -> None:
    (variant,) = variants(plan_file.read_bytes(), [f"data.text={text}"])

    assert "/" not in variant.name
    assert len(variant.name) < 255
    assert variant.changes == {"data.text": text}


def test_values_that_share_what_a_name_can_hold_have_names_of_their_own(plan_file: Path) -> None:
    found = variants(plan_file.read_bytes(), ["data.text=a/b,a:b,a_b"])

    assert len({variant.name for variant in found}) == 3


@pytest.mark.parametrize(
    ("words", "fragment"), [("privacy.epsilon=1,1", "a value twice"), ("name.x=1", "no section of a plan")]
)
def test_what_cannot_be_varied_is_refused(plan_file: Path, words: str, fragment: str) -> None:
    with pytest.raises(UsageError, match=fragment):
        variants(plan_file.read_bytes(), [words])


@pytest.mark.parametrize("plan", [b"\xff\xfe", b"a = ["])
def test_what_is_no_plan_is_refused(plan: bytes) -> None:
    with pytest.raises(PlanError):
        variants(plan, ["privacy.epsilon=1"])


@pytest.mark.parametrize("words", ["privacy.epsilon=0", "privacy.epsilonn=1", "nothing.at_all=1"])
def test_a_combination_that_is_no_plan_is_refused_before_anything_runs(plan_file: Path, words: str) -> None:
    with pytest.raises(PlanError):
        variants(plan_file.read_bytes(), [words])


def test_mean_and_spread_are_those_of_the_score_that_decides(plan_file: Path, tmp_path: Path) -> None:
    found = variants(plan_file.read_bytes(), ["privacy.epsilon=1,8"])
    runs = {
        variant.name: [
            {"score": "accuracy", "measured": {"federated": {"accuracy": value + place, "macro-f1": 0.0}}}
            for value in (0.1, 0.2, 0.6)
        ]
        for place, variant in enumerate(found)
    }

    total = summed(runs, [0, 1, 2])
    draw(total, found, tmp_path / "sweep.png")

    assert total["results"]["epsilon=8"]["federated"] == pytest.approx({"mean": 1.3, "lowest": 1.1, "highest": 1.6})
    assert (total["score"], total["seeds"]) == ("accuracy", [0, 1, 2])
    assert (tmp_path / "sweep.png").stat().st_size > 1000
