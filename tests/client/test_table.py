"""Tables on disk: what cells become, whatever the format."""

import csv
import datetime
import decimal
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings, strategies

from confide.client import table
from confide.client.table import (
    ANY,
    EVERYTHING,
    IDENTIFIER,
    IMAGE,
    LABEL,
    TEXT,
    WORD_LABELS,
    WORDS,
    Kinds,
    read_table,
    table_columns,
)
from confide.common.errors import DataError


def cells(path: Path, columns: Mapping[str, Kinds] | None = None) -> list[tuple[Any, ...]]:
    return [row.cells for row in read_table(path, columns or {"text": TEXT, "label": LABEL})]


def saved(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def save_parquet(path: Path, columns: Mapping[str, object]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def in_every_format(folder: Path, columns: Mapping[str, Sequence[object]]) -> list[Path]:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        with (folder / f"rows.{suffix}").open("w", newline="") as stream:
            writer = csv.writer(stream, delimiter=delimiter)
            writer.writerow(columns)
            writer.writerows(["" if cell is None else cell for cell in row.values()] for row in rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    saved(folder / "rows.jsonl", lines)
    saved(folder / "rows.ndjson", lines)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "rows.csv.gz").write_bytes(gzip.compress((folder / "rows.csv").read_bytes()))
    save_parquet(folder / "rows.parquet", {name: list(values) for name, values in columns.items()})
    dataset = datasets.Dataset.from_dict({name: list(values) for name, values in columns.items()})
    dataset.save_to_disk(folder / "dataset")
    datasets.DatasetDict(train=dataset).save_to_disk(folder / "splits")
    names = ["csv", "tsv", "jsonl", "ndjson", "jsonl.gz", "csv.gz", "parquet"]
    return [*(folder / f"rows.{name}" for name in names), folder / "dataset", folder / "splits"]


def test_every_format_gives_the_same_cells(tmp_path: Path) -> None:
    columns: dict[str, Sequence[object]] = {
        "text": ["plain", 'with "quotes", commas\tand tabs', "two\nlines", "Grüße, 東京 🙂", None],
        "label": ["1", "0", None, "1", "0"],
        "age": [41, 7, -3, None, 10**15],
        "income": [0.1, 1e20, None, 2.5e-7, 3.0],
    }
    wanted = {"income": ANY, "age": ANY, "label": LABEL, "text": TEXT}

    read = [cells(path, wanted) for path in in_every_format(tmp_path, columns)]

    assert read[0][0] == ("0.1", "41", "1", "plain")
    assert read[0][1][3] == 'with "quotes", commas\tand tabs'
    assert read[0][2] == (None, "-3", None, "two\nlines")
    assert all(other == read[0] for other in read)


def test_cells_of_a_csv_are_text_as_it_stands(tmp_path: Path) -> None:
    path = saved(tmp_path / "rows.csv", "text,label\n007,NA\n 1e5 ,null\nTrue,\n")

    assert cells(path) == [("007", "NA"), (" 1e5 ", "null"), ("True", None)]


def test_quoted_line_breaks_count_as_one_row_and_keep_the_line_of_its_beginning(tmp_path: Path) -> None:
    path = saved(tmp_path / "rows.csv", 'text,label\n"one\n\ntwo",a\nthree,b\n')

    rows = list(read_table(path, {"text": TEXT}))

    assert [(row.number, row.line, row.cells) for row in rows] == [(1, 2, ("one\n\ntwo",)), (2, 5, ("three",))]
    assert rows[1].place == "row 2 (line 5)"


@pytest.mark.parametrize(
    "content",
    [
        b"text,label\ngood,a\nbad,b\n",
        b"\xef\xbb\xbftext,label\ngood,a\nbad,b\n",
        b'\xef\xbb\xbf"text","label"\n"good",a\nbad,b\n',
        b"text,label\r\ngood,a\r\nbad,b\r\n",
        b"text,label\ngood,a\nbad,b",
        b"\n\ntext,label\n\ngood,a\n\r\nbad,b\n\n\n",
        b",text,,label,\n1,good,,a,\n2,bad,,b,\n",
    ],
    ids=["plain", "bom", "bom-quoted", "crlf", "no-last-newline", "blank-lines", "unnamed-columns"],
)
def test_spellings_of_one_csv_give_the_same_cells(tmp_path: Path, content: bytes) -> None:
    assert cells(saved(tmp_path / "rows.csv", content)) == [("good", "a"), ("bad", "b")]


def test_a_carriage_return_inside_quotes_is_kept(tmp_path: Path) -> None:
    path = saved(tmp_path / "rows.csv", b'text,label\r\n"one\r\ntwo",a\r\n')

    assert cells(path) == [("one\r\ntwo", "a")]


def test_a_blank_line_in_a_table_of_one_column_is_a_row_without_a_value(tmp_path: Path) -> None:
    path = saved(tmp_path / "rows.csv", "text\ngood\n\nbad\n")

    assert cells(path, {"text": TEXT}) == [("good",), (None,), ("bad",)]


def test_json_lines_may_lack_keys_and_be_blank(tmp_path: Path) -> None:
    lines = '{"text": "good", "label": 1}\n\n{"label": "b", "more": {"a": [1]}}\r\n{"text": null, "label": false}'
    path = saved(tmp_path / "rows.jsonl", "\ufeff" + lines)

    rows = list(read_table(path, {"text": TEXT, "label": LABEL}))

    assert [row.cells for row in rows] == [("good", "1"), (None, "b"), (None, "false")]
    assert [(row.number, row.line) for row in rows] == [(1, 1), (2, 3), (3, 4)]


def test_not_a_number_is_no_value(tmp_path: Path) -> None:
    lines = saved(tmp_path / "rows.jsonl", '{"age": NaN}\n{"age": 2.5}\n')
    columns = save_parquet(tmp_path / "rows.parquet", {"age": [math.nan, 2.5]})

    assert cells(lines, {"age": ANY}) == cells(columns, {"age": ANY}) == [(None,), ("2.5",)]


@pytest.mark.parametrize(
    ("column", "spelled"),
    [
        (pyarrow.array(["a", None, "b"], pyarrow.large_string()), ["a", None, "b"]),
        (pyarrow.array(["a", None, "a"]).dictionary_encode(), ["a", None, "a"]),
        (pyarrow.array([7, None, 8]).dictionary_encode(), ["7", None, "8"]),
        (pyarrow.array([True, None, False]), ["true", None, "false"]),
        (pyarrow.array([0, 2**64 - 1], pyarrow.uint64()), ["0", "18446744073709551615"]),
        (pyarrow.array(np.array([0.1, 1e10, 3], np.float32)), ["0.1", "10000000000.0", "3.0"]),
        (pyarrow.array(np.array([0.1], np.float16)), ["0.1"]),
        (pyarrow.array([0.1, 1e300, 123456789.125]), ["0.1", "1e+300", "123456789.125"]),
        (pyarrow.array([decimal.Decimal("1.50"), decimal.Decimal("-0.00001")]), ["1.50000", "-0.00001"]),
        (pyarrow.array([datetime.date(2024, 2, 29), None]), ["2024-02-29", None]),
        (pyarrow.nulls(2), [None, None]),
    ],
    ids=lambda value: str(value.type) if hasattr(value, "type") else "",
)
def test_typed_values_have_one_spelling(tmp_path: Path, column: object, spelled: list[str | None]) -> None:
    path = save_parquet(tmp_path / "rows.parquet", {"value": column})

    assert cells(path, {"value": ANY}) == [(cell,) for cell in spelled]


def test_class_labels_are_read_by_name_from_datasets_and_from_parquet(tmp_path: Path) -> None:
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["neg", "pos"]))
    dataset = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    dataset.save_to_disk(tmp_path / "dataset")
    dataset.to_parquet(str(tmp_path / "rows.parquet"))

    expected = [("a", "pos"), ("b", "neg"), ("c", None)]

    assert cells(tmp_path / "dataset") == cells(tmp_path / "rows.parquet") == expected


def test_lists_of_texts_are_cells_where_a_column_may_hold_them(tmp_path: Path) -> None:
    rows = [["a", "b c"], [], None, ["d", None]]
    lines = saved(tmp_path / "rows.jsonl", "".join(json.dumps({"words": row}) + "\n" for row in rows))
    columns = save_parquet(tmp_path / "rows.parquet", {"words": rows})
    large = save_parquet(
        tmp_path / "large.parquet", {"words": pyarrow.array(rows, pyarrow.large_list(pyarrow.string()))}
    )
    datasets.Dataset.from_dict({"words": rows}).save_to_disk(tmp_path / "dataset")

    read = [cells(path, {"words": WORDS}) for path in (lines, columns, large, tmp_path / "dataset")]

    assert read[0] == [(("a", "b c"),), ((),), (None,), (None,)]
    assert all(other == read[0] for other in read)


def test_lists_of_whole_numbers_are_spelled_and_lists_of_class_labels_named(tmp_path: Path) -> None:
    numbers = {"tags": [[0, 1], [1]]}
    features = datasets.Features(tags=datasets.Sequence(datasets.ClassLabel(names=["O", "PLACE"])))
    named = datasets.Dataset.from_dict({"tags": [[0, 1], [-1, 1]]}, features=features)
    named.save_to_disk(tmp_path / "dataset")
    named.to_parquet(str(tmp_path / "named.parquet"))
    lines = saved(tmp_path / "rows.jsonl", '{"tags": [0, 1]}\n{"tags": [1]}\n')

    for path in (save_parquet(tmp_path / "rows.parquet", numbers), lines):
        assert cells(path, {"tags": WORD_LABELS}) == [(("0", "1"),), (("1",),)]
    for path in (tmp_path / "dataset", tmp_path / "named.parquet"):
        assert cells(path, {"tags": WORD_LABELS}) == [(("O", "PLACE"),), (None,)]


@pytest.mark.parametrize("value", [["a", 1], [1.5], [True], [["a"]], [{"a": 1}], {"a": 1}])
def test_lists_of_other_values_are_refused(tmp_path: Path, value: object) -> None:
    lines = saved(tmp_path / "rows.jsonl", json.dumps({"words": value}))

    with pytest.raises(DataError, match=r"column 'words' holds (lists of other values|objects) \(first in line 1\)"):
        cells(lines, {"words": WORD_LABELS})


def test_half_a_character_in_a_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="half of a surrogate pair"):
        cells(saved(tmp_path / "rows.jsonl", '{"words": ["a", "\\ud83d"]}'), {"words": WORDS})


def test_images_are_bytes_or_paths(tmp_path: Path) -> None:
    both = {"image": [{"bytes": b"one", "path": "a.png"}, {"bytes": None, "path": "b.png"}, None]}
    schema = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])

    for columns, expected in (
        (both, [(b"one",), ("b.png",), (None,)]),
        ({"image": pyarrow.array(both["image"], schema)}, [(b"one",), ("b.png",), (None,)]),
        ({"image": [{"bytes": None, "path": "b.png"}]}, [("b.png",)]),
        ({"image": [{"bytes": b"one", "path": None}]}, [(b"one",)]),
        ({"image": [b"one", None]}, [(b"one",), (None,)]),
        ({"image": pyarrow.array([b"one"], pyarrow.large_binary())}, [(b"one",)]),
        ({"image": ["b.png"]}, [("b.png",)]),
    ):
        assert cells(save_parquet(tmp_path / "rows.parquet", columns), {"image": IMAGE}) == expected


def test_a_struct_that_is_no_image_is_refused(tmp_path: Path) -> None:
    path = save_parquet(tmp_path / "rows.parquet", {"image": [{"bytes": b"one", "size": 3}]})

    with pytest.raises(DataError, match="column 'image' holds values of type struct<"):
        cells(path, {"image": IMAGE})


def test_a_shuffled_dataset_is_read_in_its_own_order(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": ["0", "1", "2"]})
    dataset.select([2, 0]).save_to_disk(tmp_path / "dataset")

    assert cells(tmp_path / "dataset") == [("c", "2"), ("a", "0")]


def test_rows_are_numbered_across_batches(tmp_path: Path) -> None:
    count = 3 * table._ROWS_AT_ONCE + 1
    path = save_parquet(tmp_path / "rows.parquet", {"value": list(range(count))})

    rows = list(read_table(path, {"value": ANY}))

    assert [row.number for row in rows] == list(range(1, count + 1))
    assert rows[-1].cells == (str(count - 1),)


def test_columns_with_dots_and_nested_neighbours_are_told_apart(tmp_path: Path) -> None:
    path = save_parquet(tmp_path / "rows.parquet", {"a.b": ["flat"], "a": [{"b": "nested"}]})

    assert cells(path, {"a.b": TEXT}) == [("flat",)]


def test_suffixes_are_read_in_any_case(tmp_path: Path) -> None:
    assert cells(saved(tmp_path / "ROWS.CSV", "text,label\ngood,a\n")) == [("good", "a")]


def test_an_identifier_cannot_be_a_fraction(tmp_path: Path) -> None:
    path = save_parquet(tmp_path / "rows.parquet", {"who": [7.0, 8.0]})

    with pytest.raises(DataError, match="column 'who' holds numbers, but is used where only text, whole numbers"):
        cells(path, {"who": IDENTIFIER})


def test_a_missing_column_is_named_with_those_present_and_the_nearest(tmp_path: Path) -> None:
    path = saved(tmp_path / "rows.csv", "Text ,label,age\ngood,a,3\n")

    with pytest.raises(DataError, match=r"no column 'text'\. It has 'Text ', 'label', 'age'\. Did you mean 'Text '\?"):
        cells(path)


def test_a_first_line_that_is_no_header_is_not_shown(tmp_path: Path) -> None:
    path = saved(tmp_path / "rows.csv", "SECRETCELL of a person,SECRETCELL\nmore,a\n")

    with pytest.raises(DataError, match="is the header missing") as caught:
        cells(path)

    assert "SECRETCELL" not in str(caught.value)


def test_where_one_column_is_asked_for_nothing_is_said_of_a_missing_header(tmp_path: Path) -> None:
    path = saved(tmp_path / "rows.csv", "patient,text\na,b\n")

    with pytest.raises(DataError, match="has no column 'nosuch'") as caught:
        list(read_table(path, {"nosuch": IDENTIFIER}))

    assert "header" not in str(caught.value)


def test_many_columns_are_not_all_listed(tmp_path: Path) -> None:
    path = saved(tmp_path / "rows.jsonl", json.dumps({f"column{number}": 1 for number in range(500)}) + "\n")

    with pytest.raises(DataError, match="and 470 more") as caught:
        cells(path)

    assert len(str(caught.value)) < 1000


def test_a_line_longer_than_the_limit_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "rows.jsonl", '{"text": "' + "x" * table.LONGEST_LINE_BYTES + '"}\n')

    with pytest.raises(DataError, match="line 1 is longer than 16 MiB"):
        cells(path)


def test_a_text_longer_than_the_csv_module_allows_by_itself_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "rows.csv", "text,label\n" + "x" * 200_000 + ",a\n")

    assert len(cells(path)[0][0] or "") == 200_000


def test_the_byte_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "rows.csv", b"text,label\ngood,a\nSECRETCELL \xe9,b\n")

    with pytest.raises(DataError, match=r"line 3 is not UTF-8 \(byte 29 of the file\).*iconv") as caught:
        cells(path)

    assert path.read_bytes()[29] == 0xE9
    assert "SECRETCELL" not in str(caught.value)


@pytest.fixture(scope="module")
def well_formed(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, bytes]:
    columns = {"text": ["SECRETCELL", 'a "b"\nc', None] * 9, "label": ["SECRETCELL", None, "é"] * 9}
    paths = in_every_format(tmp_path_factory.mktemp("well-formed"), columns)
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


@settings(max_examples=150)
@given(data=strategies.data())
def test_a_damaged_file_is_read_or_refused_and_never_shown(
    well_formed: Mapping[str, bytes], tmp_path_factory: pytest.TempPathFactory, data: strategies.DataObject
) -> None:
    name = data.draw(strategies.sampled_from(sorted(well_formed)))
    content = bytearray(well_formed[name])
    start = data.draw(strategies.integers(0, len(content)))
    content[start : start + data.draw(strategies.integers(0, 9))] = data.draw(strategies.binary(max_size=9))
    path = saved(tmp_path_factory.getbasetemp() / name, bytes(content))

    try:
        cells(path)
    except DataError as error:
        shown = str(error)
    else:
        shown = ""

    assert "SECRETCELL" not in shown.partition("It has")[0]


def test_the_columns_of_a_table_are_listed_whatever_its_format(tmp_path: Path) -> None:
    columns: dict[str, Sequence[object]] = {"text": ["a", None], "label": ["0", "1"], "age": [4, 5]}

    assert {table_columns(path) for path in in_every_format(tmp_path, columns)} == {("text", "label", "age")}


def test_a_key_of_the_last_line_is_a_column_too(tmp_path: Path) -> None:
    path = saved(tmp_path / "rows.jsonl", '{"a": 1}\n\n{"b": 2, "a": 1}\n')

    assert table_columns(path) == ("a", "b")


def test_columns_without_a_name_are_left_out(tmp_path: Path) -> None:
    assert table_columns(saved(tmp_path / "rows.csv", ",text,,label\n1,a,2,b\n")) == ("text", "label")


@pytest.mark.parametrize("content", ["", "\n\n", ",,\n1,2,3\n", "SECRET,SECRET\n1,2\n"])
def test_a_header_that_names_no_columns_is_refused_without_being_shown(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError) as caught:
        table_columns(saved(tmp_path / "rows.csv", content))

    assert "SECRET" not in str(caught.value)


def test_tables_that_are_not_there_or_of_no_format_have_no_columns(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no table"):
        table_columns(tmp_path / "rows.csv")
    with pytest.raises(DataError, match="of no format that can be read"):
        table_columns(saved(tmp_path / "rows.txt", "a,b\n1,2\n"))


def test_more_columns_than_anyone_uses_are_refused(tmp_path: Path) -> None:
    lines = (json.dumps({f"column {number}-{key}": 1 for key in range(1000)}) + "\n" for number in range(11))

    with pytest.raises(DataError, match="more than 10000 columns"):
        table_columns(saved(tmp_path / "rows.jsonl", "".join(lines)))


def test_everything_takes_what_no_column_of_a_plan_may_hold(tmp_path: Path) -> None:
    values = {"deep": [{"x": [1, None]}], "mixed": [[0.5, 0.25]], "when": [datetime.datetime(2024, 5, 1, 8)]}
    columns = dict.fromkeys(values, EVERYTHING)
    lines = saved(tmp_path / "rows.jsonl", json.dumps(values | {"when": 1.5}, default=str) + "\n")

    of_parquet = cells(save_parquet(tmp_path / "rows.parquet", values), columns)
    of_lines = cells(lines, columns)

    assert of_parquet == [("{'x': [1, None]}", ("0.5", "0.25"), "2024-05-01T08:00:00")]
    assert len(of_lines) == 1
    assert None not in of_lines[0]
