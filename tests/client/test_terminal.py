"""What commands print: epsilon rounded against whoever spends, aligned columns, and nothing that a terminal would obey."""

import math

import pytest
from hypothesis import given, strategies

from confide.client.terminal import facts, left, paragraphs, spent, table
from confide.common.wording import plain, several


@given(strategies.floats(0, 1000))
def test_what_is_spent_is_rounded_up_and_what_is_left_is_rounded_down(epsilon: float) -> None:
    up, down = float(spent(epsilon)), float(left(epsilon))

    assert epsilon - 2e-9 <= up < epsilon + 0.001 + 1e-9
    assert epsilon - 0.001 - 1e-9 < down <= epsilon + 1e-12


@pytest.mark.parametrize(
    ("epsilon", "up", "down"),
    [
        (0.0, "0.000", "0.000"),
        (0.1, "0.100", "0.100"),
        (8.0, "8.000", "8.000"),
        (1.0001, "1.001", "1.000"),
        (1e-8, "0.001", "0.000"),
        (math.nextafter(30.0, 31.0), "30.000", "30.000"),
        (-0.5004, "-0.500", "-0.501"),
        (math.inf, "inf", "inf"),
    ],
)
def test_round_numbers_stay_what_they_are(epsilon: float, up: str, down: str) -> None:
    assert (spent(epsilon), left(epsilon)) == (up, down)


def test_columns_are_aligned_and_the_last_is_wrapped_under_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")

    table(
        ("name", "count", "what"),
        [("a", "7", "one two three four five six"), ("bcdef", "123", "x")],
        numbers=("count",),
    )

    assert capsys.readouterr().out.splitlines() == [
        "name   count  what",
        "a          7  one two three four five",
        "              six",
        "bcdef    123  x",
    ]


def test_paragraphs_and_facts_keep_within_the_terminal_but_cut_no_digest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    digest = "sha256:" + "0" * 64

    paragraphs([("Heading", ["A sentence that is longer than the terminal is wide.", digest])])
    facts([("digest", digest), ("site", "St. Anna")])

    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "Heading"
    assert all(len(line) <= 40 for line in lines if digest not in line)
    assert f"  {digest}" in lines
    assert f"  digest  {digest}" in lines
    assert "  site    St. Anna" in lines


@given(strategies.text())
def test_nothing_that_a_terminal_would_obey_is_printed(text: str) -> None:
    assert plain(text).isprintable()


def test_markup_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    table(("what",), [("[bold red]no[/] \x1b[31m",)])

    assert "[bold red]no[/] \\x1b[31m" in capsys.readouterr().out


def test_one_of_a_kind_is_told_as_one() -> None:
    assert [several(count, "record") for count in (0, 1, 2)] == ["0 records", "1 record", "2 records"]
    assert several(2, "person", "people") == "2 people"
