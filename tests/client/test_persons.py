"""Who is in a table: keyed hashes that tell nothing, and the accounts that follow from them."""

import csv
import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings, strategies

from confide.client.persons import SAME_PERSONS, accounts_for, declared, person_digest, read_persons, row_digest
from confide.client.table import Cell
from confide.common.crypto import keyed_digest
from confide.common.errors import DataError

KEY, OTHER_KEY = bytes(range(32)), bytes(32)
ROWS = [("p1", "good", "1"), ("p2", "bad", "0"), (" p1 ", "late", "0"), ("", "nobody's", "1"), ("  ", "nor this", "1")]


def written(path: Path, rows: Sequence[Sequence[str]], columns: Sequence[str] = ("patient", "text", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return written(tmp_path / "rows.csv", ROWS)


def test_a_person_is_her_identifier_without_white_space_around_it(table: Path) -> None:
    persons = read_persons(table, "patient", KEY)

    assert (persons.rows, persons.count, persons.nobodys) == (5, 2, 2)
    assert persons.digests[:32] == persons.digests[64:96] == person_digest(KEY, "person", "p1")
    assert persons.rows_of({person_digest(KEY, "person", "p1")}) == {1, 3}
    assert persons.besides({person_digest(KEY, "person", "p1")}) == 1
    assert persons.besides({person_digest(KEY, "person", "p3")}) == 2


def test_without_a_column_of_persons_each_row_is_one(table: Path) -> None:
    persons = read_persons(table, None, KEY)

    assert (persons.rows, persons.count, persons.nobodys) == (5, 5, 0)
    assert persons.digests == persons.contents


def test_rows_without_any_value_are_nobody_s_and_make_no_two_tables_overlap(tmp_path: Path) -> None:
    first = read_persons(written(tmp_path / "a.csv", [("p1", "a", "1"), ("", "", "")]), None, KEY)
    second = read_persons(written(tmp_path / "b.csv", [("p2", "b", "1"), ("", "", "")]), None, KEY)

    assert (first.count, first.nobodys) == (1, 1)
    assert not set(first.known_by()) & set(second.known_by())


def test_a_person_is_known_by_her_hash_and_by_those_of_her_rows(table: Path) -> None:
    by_person, by_row = read_persons(table, "patient", KEY), read_persons(table, None, KEY)

    assert len(set(by_person.known_by())) == len(list(by_person.known_by())) == 2 + 5
    assert set(by_row.known_by()) < set(by_person.known_by())


def test_identifiers_and_rows_of_another_namespace_are_other_persons(table: Path) -> None:
    clinic, register = (set(read_persons(table, "patient", KEY, ids).known_by()) for ids in ("clinic", "register"))

    assert len(clinic) == len(register)
    assert not clinic & register


def test_without_the_site_s_key_no_hash_can_be_computed(table: Path) -> None:
    ours, theirs = (read_persons(table, "patient", key) for key in (KEY, OTHER_KEY))

    assert not set(ours.known_by()) & set(theirs.known_by())
    assert ours.fingerprint != theirs.fingerprint


def test_nothing_of_a_table_is_in_the_repr_of_its_persons(table: Path) -> None:
    shown = repr(read_persons(table, "patient", KEY))

    assert len(shown) < 200
    assert "p1" not in shown


CELLS = strategies.one_of(
    strategies.none(),
    strategies.text(max_size=6),
    strategies.lists(strategies.text(max_size=3), max_size=3).map(tuple),
    strategies.binary(max_size=6),
)


@given(strategies.dictionaries(strategies.text(max_size=4), CELLS, max_size=4), strategies.randoms())
def test_a_row_s_hash_does_not_depend_on_the_order_of_columns(cells: dict[str, Cell | None], random: object) -> None:
    shuffled = list(cells.items())
    random.shuffle(shuffled)  # type: ignore[attr-defined]

    assert row_digest(KEY, "person", dict(shuffled)) == row_digest(KEY, "person", cells)


@given(
    strategies.dictionaries(strategies.text(max_size=4), CELLS, max_size=3),
    strategies.dictionaries(strategies.text(max_size=4), CELLS, max_size=3),
)
def test_two_rows_have_the_same_hash_only_if_they_hold_the_same(
    first: Mapping[str, Cell | None], second: Mapping[str, Cell | None]
) -> None:
    held = [{column: cell for column, cell in row.items() if cell is not None} for row in (first, second)]

    assert (row_digest(KEY, "person", first) == row_digest(KEY, "person", second)) == (held[0] == held[1])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"a": "b"}, {"ab": ""}),
        ({"a": "b", "c": "d"}, {"a": "bcd"}),
        ({"a": ("b", "c")}, {"a": ("bc",)}),
        ({"a": ("b",)}, {"a": "b"}),
        ({"a": b"b"}, {"a": "b"}),
        ({"a": ()}, {"a": ""}),
        ({"a": ("str 1", "x")}, {"a": "str 1"}),
    ],
)
def test_cells_that_look_alike_when_joined_are_told_apart(first: dict[str, Cell], second: dict[str, Cell]) -> None:
    assert row_digest(KEY, "person", first) != row_digest(KEY, "person", second)


@settings(max_examples=25)
@given(strategies.lists(strategies.sampled_from(ROWS), min_size=1, max_size=12), strategies.randoms())
def test_the_fingerprint_does_not_depend_on_the_order_of_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]], random: object
) -> None:
    folder = tmp_path_factory.mktemp("order")
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]

    first = read_persons(written(folder / "a.csv", rows), "patient", KEY)
    second = read_persons(written(folder / "b.csv", shuffled), "patient", KEY)

    assert first.fingerprint == second.fingerprint
    assert (first.count, first.nobodys, first.repeated) == (second.count, second.nobodys, second.repeated)
    assert first.repeated == len(rows) - len(set(rows))


@pytest.mark.parametrize(
    "rows",
    [
        ROWS[:-1],
        [*ROWS, ROWS[0]],
        [("p2", "good", "1"), *ROWS[1:]],
        [("p1", "good!", "1"), *ROWS[1:]],
        [("p1", "good", "0"), *ROWS[1:]],
        [("p1", "bad", "0"), ("p2", "good", "1"), *ROWS[2:]],  # two persons exchange their rows
    ],
)
def test_whatever_changes_in_a_table_changes_its_fingerprint(table: Path, rows: list[tuple[str, str, str]]) -> None:
    before = read_persons(table, "patient", KEY).fingerprint

    assert read_persons(written(table, rows), "patient", KEY).fingerprint != before


def test_the_same_rows_in_another_format_or_order_of_columns_are_the_same_table(tmp_path: Path, table: Path) -> None:
    columns = ("label", "patient", "text")
    reordered = written(tmp_path / "reordered.csv", [(label, person, text) for person, text, label in ROWS], columns)
    lines = [
        dict(zip(("text", "patient", "label"), (text, person, label), strict=True)) for person, text, label in ROWS
    ]
    # An empty cell of a CSV file is no value; in JSON that is null.
    spelled = "".join(json.dumps({key: value or None for key, value in line.items()}) + "\n" for line in lines)
    (tmp_path / "rows.jsonl").write_text(spelled)
    parquet = {key: [line[key] or None for line in lines] for key in lines[0]}
    pyarrow.parquet.write_table(pyarrow.table(parquet), tmp_path / "rows.parquet")

    found = [read_persons(path, "patient", KEY) for path in (table, reordered, tmp_path / "rows.jsonl")]
    found.append(read_persons(tmp_path / "rows.parquet", "patient", KEY))

    assert len({persons.fingerprint for persons in found}) == 1


def test_a_missing_column_of_persons_is_named_with_the_nearest_there_is(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"patient": "p1", "text": "a"}\n')

    with pytest.raises(DataError, match=r"no column 'patients'.*Did you mean 'patient'\?"):
        read_persons(tmp_path / "rows.jsonl", "patients", KEY)


def test_a_table_without_a_header_is_refused_and_its_first_row_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"

    for line in ("SECRET,good,1", "SECRET,SECRET,1"):
        path.write_text(f"{line}\np2,bad,0\n")
        with pytest.raises(DataError) as caught:
            read_persons(path, "patient", KEY)
        assert "header" in str(caught.value)
        assert "SECRET" not in str(caught.value)


def test_a_column_of_fractions_is_no_column_of_persons(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"patient": 7.5, "text": "SECRET"}\n')

    with pytest.raises(DataError, match="'patient' holds numbers") as caught:
        read_persons(tmp_path / "rows.jsonl", "patient", KEY)

    assert "SECRET" not in str(caught.value)


def test_columns_that_no_plan_could_use_count_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    digests = set()
    for extra in ('{"deep": [1, {"x": null}]}', '{"deep": [1, {"x": 2}]}', "[0.5, 0.25]", "[0.5]"):
        path.write_text(f'{{"text": "a", "extra": {extra}}}\n')
        digests.add(read_persons(path, None, KEY).fingerprint)

    assert len(digests) == 4


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_person_is_the_same_however_the_accents_of_her_identifier_are_spelled(
    tmp_path: Path, form: Literal["NFC", "NFD"]
) -> None:
    name = "José Müller"
    composed, apart = unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)
    one = written(tmp_path / "one.csv", [(unicodedata.normalize(form, name), "x", "0")])
    both = written(tmp_path / "both.csv", [(composed, "y", "0"), (f"{apart} ", "z", "1")])

    person = read_persons(one, "patient", KEY).digests
    found = read_persons(both, "patient", KEY)

    assert composed != apart
    assert found.count == 1
    assert found.digests == 2 * person == 2 * person_digest(KEY, SAME_PERSONS, apart)


def test_an_identifier_in_ascii_has_the_hash_that_it_always_had() -> None:
    expected = keyed_digest(KEY, b"confide-person/1", b"person", b"AT-4711")

    assert person_digest(KEY, SAME_PERSONS, " AT-4711\n") == expected


def test_whoever_overlaps_nobody_opens_an_account() -> None:
    charged = accounts_for(frozenset(), (), "3")

    assert (charged.accounts, charged.joined, charged.opened) == (("3",), "3", True)


def test_newcomers_join_the_first_account_and_all_are_charged() -> None:
    charged = accounts_for(frozenset({"10", "2"}), ("9",), "11")

    assert (charged.accounts, charged.joined, charged.opened) == (("2", "9", "10"), "2", False)


@given(
    strategies.frozensets(strategies.integers(1, 50).map(str)),
    strategies.frozensets(strategies.integers(1, 50).map(str)),
)
def test_every_person_s_account_is_among_those_that_are_charged(
    overlap: frozenset[str], before: frozenset[str]
) -> None:
    charged = accounts_for(overlap, tuple(before), "51")

    assert set(charged.accounts) >= overlap | before
    assert charged.joined in charged.accounts
    assert charged.opened == (charged.accounts == ("51",))


@pytest.mark.parametrize(
    ("persons", "public"),
    [
        (1, 1),
        (9, 9),
        (10, 10),
        (57, 50),
        (99, 90),
        (100, 100),
        (109, 100),
        (123, 120),
        (1299, 1200),
        (999_999, 990_000),
    ],
)
def test_two_digits_of_the_number_of_persons_are_made_public_and_below_100_persons_one(
    persons: int, public: int
) -> None:
    assert declared(persons) == public
    assert declared(public) == public
