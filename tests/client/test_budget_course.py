"""The figure of a site's budgets over time."""

import sys
from pathlib import Path

import pytest

from confide.client.budget_course import check_figure, draw
from confide.client.standing import Point, course
from confide.common.errors import MissingPackage, UsageError
from tests.books import a_round, account, beginning, written


@pytest.fixture
def points() -> tuple[Point, ...]:
    return course(written([*beginning(), account(2, epsilon=6.0), *a_round(1), *a_round(2)])[1])


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_figure_is_drawn_and_equal_each_time(suffix: str, points: tuple[Point, ...], tmp_path: Path) -> None:
    first, second = tmp_path / f"first.{suffix}", tmp_path / f"second.{suffix}"

    draw(points, "St. Anna", first)
    draw(points, "St. Anna", second)

    assert first.read_bytes() == second.read_bytes()
    assert len(first.read_bytes()) > 5000


def test_the_figure_names_every_account(points: tuple[Point, ...], tmp_path: Path) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none"}):
        draw(points, "St. Anna", tmp_path / "f.svg")

    text = (tmp_path / "f.svg").read_text(encoding="utf-8")
    for said in ("account 1", "account 2", "limit 6", "limit 10", "St. Anna"):
        assert said in text


def test_without_accounts_there_is_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to draw"):
        draw((), "St. Anna", tmp_path / "f.png")


@pytest.mark.parametrize("name", ["f.pdf", "f", "no/directory/f.png"])
def test_a_file_that_cannot_be_drawn_to_is_refused_before_anything_is_done(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--figure"):
        check_figure(tmp_path / name)


def test_without_matplotlib_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(MissingPackage, match=r"confide\[simulate\]"):
        check_figure(tmp_path / "f.png")
