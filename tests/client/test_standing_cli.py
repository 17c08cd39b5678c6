"""`confide site status`, `watch` and `budget` on a site whose agent trained some rounds."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from confide.client.journal import Journal
from confide.client.standing import SiteStanding
from confide.client.terminal import left, spent
from tests.conftest import run
from tests.sites import DATA, NAME, RUN, Site, copied, made, plan_text


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = made(tmp_path_factory.mktemp("site") / "s")
    assert site.approve(site.plan, "--data", DATA) == 0
    site.train(1, 2)
    return site


@pytest.fixture
def site(template: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("COLUMNS", "200")
    return copied(template, tmp_path / "s")


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    (line,) = capsys.readouterr().out.splitlines()
    tree: dict[str, Any] = json.loads(line)
    return tree


def test_status_says_what_runs_what_is_left_and_how_far_each_run_is(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert site.read("status") == 0
    text = capsys.readouterr().out
    assert site.read("status", "--json") == 0
    tree = told(capsys)

    found = SiteStanding.of(Journal.look(site.home.ledger), 0)
    (account,) = found.accounts
    for said in ("none runs", "2 of 3", f"{spent(account.used)}", left(account.left), "until 2"):
        assert said in text
    assert tree["agent"] is None
    assert tree["site"] == NAME
    assert tree["accounts"][0]["used"] == account.used
    assert (tree["runs"][0]["begun"], tree["runs"][0]["to_come"]) == (2, 1)


def test_watching_once_shows_the_same_as_status(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert site.read("status") == 0
    status = capsys.readouterr().out
    assert site.read("watch", "--once") == 0
    time_of_day, _, watched = capsys.readouterr().out.partition("\n")

    assert len(time_of_day) == 8
    assert watched == status


def test_a_revoked_run_is_said_to_be(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert site.do("plan", "revoke", RUN, "--reason", "A doubt.") == 0
    capsys.readouterr()

    assert site.read("status") == 0

    assert "no: revoked" in capsys.readouterr().out


def test_a_new_account_is_explained(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, table = tmp_path / "plan.toml", tmp_path / "others.csv"
    plan.write_text(plan_text(), encoding="utf-8")
    assert site.do("data", "synthetic", plan, "--out", table) == 2  # it needs no keys, so it takes no passphrase
    capsys.readouterr()

    assert run("site", "data", "synthetic", plan, "--out", table, "--seed", 8) == 0
    assert site.do("data", "add", "others", table, "--person-id", "patient", "--plan", plan) == 0
    capsys.readouterr()
    assert site.read("status") == 0

    assert "besides its own cost, once, because of how budgets are counted" in capsys.readouterr().out


def test_the_budget_says_what_was_charged_for_what_and_how_it_went(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure, plan = tmp_path / "budget.svg", tmp_path / "plan.toml"
    plan.write_text(plan_text(), encoding="utf-8")

    assert site.read("budget", "--figure", figure, "--plan", plan) == 0
    text = capsys.readouterr().out
    assert site.read("budget", "--json", "--plan", site.plan) == 0
    tree = told(capsys)

    fits = tree["runs"][0]["fits"]
    assert f"run {RUN}" in text
    assert f"{fits} rounds of the plan 'heart' would fit into account 1; it has 3." in text
    assert figure.exists()
    assert tree["plan"]["rounds_that_fit"] == {"1": fits}
    assert [point["kind"] for point in tree["course"]] == ["account", "reserve", "reserve"]
    assert tree["course"][-1]["used"] == tree["accounts"][0]["used"]
    assert tree["accounts"][0]["charges"][0]["count"] == 2


def test_a_budget_before_any_data_says_how_one_is_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--site", tmp_path / "new")
    assert run("site", "init", "north", *where, "--insecure-no-passphrase") == 0
    capsys.readouterr()

    assert run("site", "budget", *where) == 0
    assert "No account is open" in capsys.readouterr().out
    assert run("site", "budget", *where, "--figure", tmp_path / "f.png") == 2
    assert "nothing to draw" in capsys.readouterr().err


def test_a_ledger_that_was_changed_is_not_summed_up(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    with sqlite3.connect(site.home.ledger) as connection:
        connection.execute("DROP TRIGGER record_stays")
        connection.execute("UPDATE record SET line = replace(line, 'heart', 'heavy') WHERE seq = 6")

    for command in ("status", "budget", "watch"):
        assert site.read(command, *(["--once"] if command == "watch" else [])) == 13
