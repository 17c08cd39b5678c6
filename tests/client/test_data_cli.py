"""`confide site data`: what a steward sees of the tables, and what may leave."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from confide.client.home import replace_private
from confide.client.journal import Journal
from confide.client.policy import starter
from confide.client.synthetic import write_synthetic
from confide.common.entries import Release
from confide.common.plan import load_plan
from tests.conftest import run
from tests.sites import DATA, NAME, RUN, Site, copied, made, plan_text


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return made(tmp_path_factory.mktemp("site") / "s")


@pytest.fixture
def site(template: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("COLUMNS", "200")
    return copied(template, tmp_path / "s")


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(plan_text(), encoding="utf-8")
    return path


@pytest.fixture
def others(tmp_path: Path, plan: Path) -> Path:
    """A table of persons whom the site does not know."""
    path = tmp_path / "others.csv"
    write_synthetic(load_plan(plan), path, 130, seed=7)
    return path


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    (line,) = capsys.readouterr().out.splitlines()
    tree: dict[str, Any] = json.loads(line)
    return tree


def persons(site: Site) -> list[str]:
    """The persons in the site's table."""
    with (site.root / "letters.csv").open(encoding="utf-8", newline="") as stream:
        return list(dict.fromkeys(row["patient"] for row in csv.DictReader(stream)))


def size(site: Site) -> int:
    return Journal.look(site.home.ledger).size


def test_a_table_is_registered_under_an_account_of_its_own_persons(
    site: Site, plan: Path, others: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("data", "add", "others", others, "--person-id", "patient", "--plan", plan)
    assert site.do(*arguments) == 0
    text = capsys.readouterr().out
    assert site.do(*arguments) == 0
    again = capsys.readouterr().out
    assert site.read("data", "list", "--json") == 0

    assert "others, version 1: declared with 130 persons, by the column patient." in text
    assert "It charges account 2: epsilon 30 at delta 0.001. It was opened now" in text
    assert "version 1 already, and unchanged" in again
    listed = {entry["data"]: entry for entry in told(capsys)["data_sets"]}
    assert listed["others"] == {
        "data": "others",
        "version": 1,
        "state": "in use",
        "declared_persons": 130,
        "person_id": "patient",
        "ids": "person",
        "accounts": ["2"],
    }
    assert listed[DATA]["accounts"] == ["1"]


def test_persons_who_are_known_bring_their_account(
    site: Site, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    copy = tmp_path / "copy.csv"
    copy.write_bytes((site.root / "letters.csv").read_bytes())

    assert site.do("data", "add", "renamed", copy, "--person-id", "patient", "--json") == 0

    found = told(capsys)
    assert (found["accounts"], found["opened"]) == (["1"], [])


def test_no_budget_is_opened_under_a_policy_that_nobody_has_looked_at(
    site: Site, others: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_private(site.home.policy, starter(NAME).encode())
    before = size(site)

    assert site.do("data", "add", "others", others, "--person-id", "patient") == 9

    assert "nobody has decided what persons may lose" in capsys.readouterr().err
    assert size(site) == before


def test_under_the_policy_of_a_new_site_nothing_is_recorded(
    tmp_path: Path, others: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--site", tmp_path / "n", "--insecure-no-passphrase")
    assert run("site", "init", "north", *where) == 0

    assert run("site", "data", "add", "others", others, "--person-id", "patient", *where) == 9

    assert Journal.look(tmp_path / "n" / "ledger.db").size == 1
    assert not list((tmp_path / "n" / "data").glob("others*"))


def test_a_check_shows_exact_numbers_and_what_stands_in_the_plan_s_way(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    larger = tmp_path / "larger.toml"
    larger.write_text(plan_text(min_persons=5000, delta=1e-5), encoding="utf-8")

    assert site.do("data", "check", DATA, site.plan) == 0
    fine = capsys.readouterr().out
    assert site.do("data", "check", DATA, larger, "--json") == 0

    assert "160 rows, of which the plan can use 160, of 120 persons" in fine
    assert "Nothing stands in the plan's way" in fine
    assert "Do not send them on" in fine
    found = told(capsys)
    assert found["persons"] == 120
    assert sum(found["labels"].values()) == 160
    assert "the plan asks for at least 5000" in " ".join(found["faults"])


def test_who_withdraws_is_counted_and_not_named(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (site.root / "letters.csv").open(encoding="utf-8", newline="") as stream:
        person = next(csv.DictReader(stream))["patient"]
    names = tmp_path / "names.txt"
    names.write_text(f"{person}\nnobody\n", encoding="utf-8")

    assert site.do("data", "withdraw", DATA, "--ids-file", names) == 0
    text = capsys.readouterr().out
    assert site.do("data", "check", DATA, site.plan, "--json") == 0

    assert "2 persons withdrawn from letters, version 2" in text
    assert "1 of them was never in a table of this site, and is left out should that person come." in text
    assert person not in text
    assert told(capsys)["persons"] == 119


def test_who_withdrew_elsewhere_is_left_out_of_a_copy_and_that_is_said(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names, others = tmp_path / "names.txt", tmp_path / "my names.txt"
    names.write_text("\n".join(persons(site)[:2]), encoding="utf-8")
    others.write_text(persons(site)[3], encoding="utf-8")
    copy = ("data", "add", "copy", site.root / "letters.csv", "--person-id", "patient")

    assert site.do("data", "withdraw", DATA, "--ids-file", names) == 0
    capsys.readouterr()
    assert site.do(*copy, "--json") == 0
    added = told(capsys)
    assert site.do("data", "withdraw", DATA, "--ids-file", others) == 0
    named = capsys.readouterr().out
    assert site.do("data", "withdraw", DATA, "--ids-file", others) == 0
    again = capsys.readouterr().out
    assert site.do(*copy) == 0
    text = capsys.readouterr().out
    assert site.do("data", "withdraw", DATA, "--ids-file", others, "--json") == 0

    assert added["withdrawn_elsewhere"] == {"persons": 2, "data_sets": [DATA]}
    assert "are in copy too, and are still used there." in named
    assert f"\n  confide site data withdraw copy --ids-file '{others}'\n" in named
    assert "1 person had withdrawn from letters already; nothing changed." in again
    assert "3 persons of this table withdrew from letters; they are left out here too." in text
    assert told(capsys) == {
        "status": "ok",
        "data": DATA,
        "version": 3,
        "persons": 1,
        "before": 1,
        "unknown": 0,
        "others": [],
        "unnamed": [],
    }


def test_a_table_of_fewer_persons_than_the_policy_asks_for_opens_no_account(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "few.csv"
    few.write_text("patient,text,label\na,b,negative\n", encoding="utf-8")

    assert site.do("data", "add", "few", few, "--person-id", "patient") == 9

    assert "declared with 1 persons; the policy's [privacy] fewest_persons asks for 50" in capsys.readouterr().err
    assert list(Journal.look(site.home.ledger).accounts) == ["1"]


def test_a_plan_may_be_named_by_its_run(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert site.do("data", "check", DATA, RUN) == 2
    assert "no plan is kept for a run of that name" in capsys.readouterr().err
    assert site.read("plan", "show", site.plan) == 0

    assert site.do("data", "check", DATA, RUN) == 0
    assert site.do("data", "report", DATA, RUN, "--out", tmp_path / "ready.json") == 0
    assert site.read("budget", "--plan", RUN) == 0
    assert site.do("data", "add", "copy", site.root / "letters.csv", "--person-id", "patient", "--plan", RUN) == 0


def test_a_file_that_is_not_there_is_told_in_the_system_s_words(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert site.do("data", "withdraw", DATA, "--ids-file", "nofile") == 2

    assert "Cannot read nofile: No such file or directory." in capsys.readouterr().err


def test_a_data_set_that_was_removed_is_said_to_be(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert site.do("data", "remove", DATA) == 0
    assert "cannot be used any more" in capsys.readouterr().out
    assert site.read("data", "list") == 0
    assert "removed" in capsys.readouterr().out
    assert site.do("data", "check", DATA, site.plan) == 9


def test_made_up_rows_can_be_registered_as_they_are(
    site: Site, plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made-up.csv"

    assert site.read("data", "list") == 0
    assert _synthetic(plan, out) == 0
    assert "--person-id patient" in capsys.readouterr().out
    assert site.do("data", "add", "made-up", out, "--person-id", "patient", "--plan", plan) == 0

    assert _synthetic(plan, out) == 2
    assert "exists and is left as it is" in capsys.readouterr().err


def _synthetic(plan: Path, out: Path) -> int:
    return run("site", "data", "synthetic", plan, "--out", out, "--persons", 60, "--seed", 3)


def test_a_signed_plan_serves_for_made_up_rows(site: Site, tmp_path: Path) -> None:
    assert _synthetic(site.plan, tmp_path / "made-up.csv") == 0


def test_the_report_tells_only_what_is_declared_and_what_is_named(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, more = tmp_path / "plain.json", tmp_path / "more.json"
    before = size(site)

    assert site.do("data", "report", DATA, site.plan, "--out", plain) == 0
    assert site.do("data", "report", DATA, site.plan, "--out", more, "--tell", "every-label") == 0

    assert json.loads(plain.read_bytes())["checks"] == {
        "same-unit": "pass",
        "declared-persons": "pass",
        "delta": "pass",
    }
    assert json.loads(more.read_bytes())["checks"]["every-label"] == "pass"
    assert "within-cap" in json.loads(more.read_bytes())["not_told"]
    assert size(site) == before
    assert "may leave the site" in capsys.readouterr().out


def test_a_histogram_is_charged_before_it_is_told(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ready.json"

    assert site.do("data", "report", DATA, site.plan, "--out", out, "--histogram") == 9
    assert not out.exists()
    site.change_policy(leave='["label-histogram"]')
    assert site.do("data", "report", DATA, site.plan, "--out", out, "--histogram") == 0

    (release,) = Journal.look(site.home.ledger).releases
    assert isinstance(release, Release)
    labels = json.loads(out.read_bytes())["labels"]
    assert labels["noise_multiplier"] == release.noise_multiplier == 10.0
    assert "was charged to the accounts of letters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--tell", "everything"), "there is no such check"),
        (("--noise", 3), "Give it with --histogram"),
    ],
)
def test_a_report_that_cannot_be_asked_for_is_refused(
    site: Site, words: tuple[object, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert site.do("data", "report", DATA, site.plan, "--out", tmp_path / "r.json", *words) == 2

    assert says in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()
