"""Tables to examples: what is kept, what is skipped, what is refused, and what a refusal says."""

import contextlib
import csv
import dataclasses
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from confide.client.data import Tokenizer, load_tokenizer, read_examples, read_texts
from confide.common.errors import DataError, ModelError, PlanError
from confide.common.examples import Examples
from confide.common.plan import Plan, read_plan, starter

CANARY = "SECRETCELL"
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "good",
    "bad",
    "day",
    "##s",
    "age",
    "income",
    ",",
    "1",
    "##2",
    "3",
    "night",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    backend = tokenizers.Tokenizer(models.WordPiece({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    directory = tmp_path_factory.mktemp("base")
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Tokenizer:
    return load_tokenizer(base)


def letters(**special: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer as GPT-2's, which adds nothing to a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*alphabet, *special.values()])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.normalizer = normalizers.Replace("~", "")
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)  # type: ignore[no-untyped-call]


def plan_of(max_tokens: int = 16, labels: Sequence[str] = ("neg", "pos"), **data: object) -> Plan:
    plan = read_plan(starter("test", "tiny", "sha256:" + "0" * 64, ["query"]).encode())
    if "template" in data:
        data["text"] = None
    return dataclasses.replace(
        plan,
        model=dataclasses.replace(plan.model, max_tokens=max_tokens),
        task=dataclasses.replace(plan.task, labels=tuple(labels)),
        data=dataclasses.replace(plan.data, **data),  # type: ignore[arg-type]
    )


def saved(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def save_lines(path: Path, *rows: Mapping[str, object]) -> Path:
    return saved(path, "".join(json.dumps(row) + "\n" for row in rows))


def words(examples: Examples, tokenizer: Tokenizer) -> list[str]:
    pieces = (examples.tokens[0][start : start + n] for start, n in zip(examples.starts, examples.lengths, strict=True))
    return [" ".join(WORDS[token] for token in piece) for piece in pieces]


def same(one: Examples, other: Examples) -> bool:
    names = ("store", "starts", "lengths", "second", "labels", "persons")
    columns = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)
    return columns and np.array_equal(one.tokens[0], other.tokens[0]) and one.pad_token == other.pad_token


def in_every_format(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        with (folder / f"rows.{suffix}").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    save_lines(folder / "rows.jsonl", *rows)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "rows.parquet")
    datasets.Dataset.from_dict(columns).save_to_disk(folder / "saved")
    return [*(folder / f"rows.{suffix}" for suffix in ("csv", "tsv", "jsonl", "parquet")), folder / "saved"]


def test_a_row_becomes_the_tokens_and_the_label_the_plan_says(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = saved(tmp_path / "rows.csv", "text,label\ngood days,pos\nbad night good night,neg\n")

    reading = read_examples(path, plan_of(max_tokens=5), tokenizer)

    assert words(reading.examples, tokenizer) == ["[CLS] good day ##s [SEP]", "[CLS] bad night good [SEP]"]
    assert reading.examples.labels.tolist() == [1, 0]
    assert reading.examples.persons.tolist() == [0, 1]
    assert reading.examples.second.tolist() == reading.examples.lengths.tolist() == [5, 5]
    assert (reading.kept, reading.read, dict(reading.skipped), reading.column) == (2, 2, {}, None)
    assert reading.examples.tokens[0].dtype == np.int32


def test_every_format_gives_the_same_examples(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [
        {"who": 7, "text": "good\nday, good", "label": "pos", "site": "a"},
        {"who": 12, "text": 'bad "night"', "label": "neg", "site": "b"},
        {"who": 7, "text": "Grüße 東京 🙂", "label": "pos", "site": "a"},
    ]
    plan = plan_of(person_id="who")

    readings = [read_examples(path, plan, tokenizer, extra_column="site") for path in in_every_format(tmp_path, rows)]

    assert readings[0].examples.persons.tolist() == [0, 1, 0]
    assert readings[0].column == ("a", "b", "a")
    assert all(same(reading.examples, readings[0].examples) for reading in readings)
    assert all(reading.column == readings[0].column for reading in readings)


def test_two_readings_of_one_file_are_equal(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = "".join(f"{number % 700},good {number % 13},{'pos' if number % 3 else 'neg'}\n" for number in range(2000))
    path = saved(tmp_path / "rows.csv", "who,text,label\n" + rows)
    plan = plan_of(person_id="who", max_rows_per_person=2)

    first, second = read_examples(path, plan, tokenizer), read_examples(path, plan, tokenizer)

    assert same(first.examples, second.examples)
    assert first.kept == 1400
    assert first.examples.person_count == 700


def test_the_second_text_begins_after_the_first(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = saved(tmp_path / "rows.csv", "text,more,label\ngood day,bad,pos\nbad,good night good night good,neg\n")

    examples = read_examples(path, plan_of(max_tokens=7, text_pair="more"), tokenizer).examples

    assert words(examples, tokenizer) == [
        "[CLS] good day [SEP] bad [SEP]",
        "[CLS] bad [SEP] good night good [SEP]",
    ]
    assert examples.second.tolist() == [4, 3]
    assert examples.batch(np.array([0, 1])).token_type_ids.tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1]]


def test_a_pair_for_a_tokenizer_without_marks_is_split_where_the_second_text_begins(tmp_path: Path) -> None:
    letters(eos_token="<end>").save_pretrained(tmp_path)
    path = saved(tmp_path / "rows.csv", "text,more,label\nabc,de,pos\n")

    examples = read_examples(path, plan_of(text_pair="more"), load_tokenizer(tmp_path)).examples

    assert (examples.lengths.tolist(), examples.second.tolist()) == ([5], [3])


def test_a_template_turns_a_row_into_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"age": 12, "income.yearly": 3, "label": "pos"}, {"age": 1, "income.yearly": 12, "label": "neg"}]
    plan = plan_of(template="Age {age}, income {income.yearly}")

    read = [read_examples(path, plan, tokenizer).examples for path in in_every_format(tmp_path, rows)]

    assert words(read[0], tokenizer) == ["[CLS] age 1 ##2 , income 3 [SEP]", "[CLS] age 1 , income 1 ##2 [SEP]"]
    assert all(same(examples, read[0]) for examples in read)


def test_a_template_never_looks_inside_a_cell(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = saved(tmp_path / "rows.csv", "age.__class__,age,label\ngood,{age},pos\n")

    examples = read_examples(path, plan_of(template="{age.__class__} {{day}}"), tokenizer).examples

    assert words(examples, tokenizer) == ["[CLS] good [UNK] day [UNK] [SEP]"]


def test_integer_labels_are_matched_by_their_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = save_lines(tmp_path / "rows.jsonl", {"text": "good", "label": 3}, {"text": "bad", "label": "1"})

    assert read_examples(path, plan_of(labels=("1", "3")), tokenizer).examples.labels.tolist() == [1, 0]


def test_class_labels_are_matched_by_name_whatever_their_number(tmp_path: Path, tokenizer: Tokenizer) -> None:
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["pos", "neg"]))
    rows = {"text": ["good", "bad", "day"], "label": [0, 1, -1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")

    reading = read_examples(tmp_path / "saved", plan_of(on_missing="skip"), tokenizer)

    assert reading.examples.labels.tolist() == [1, 0]
    assert reading.skipped == {"missing value": 1}


def test_the_same_identifier_as_number_and_as_text_is_one_person(tmp_path: Path, tokenizer: Tokenizer) -> None:
    people = [7, "7", " 7 ", "007", 8]
    rows = [{"text": "good", "label": "pos", "who": who} for who in people]

    examples = read_examples(save_lines(tmp_path / "rows.jsonl", *rows), plan_of(person_id="who"), tokenizer).examples

    assert examples.persons.tolist() == [0, 0, 0, 1, 2]


def test_later_rows_of_a_person_are_left_out_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = "b,good,pos\na,good,pos\nb,bad,neg\n,day,pos\nb,night,pos\nb,night,pos\na,day,neg\n"
    path = saved(tmp_path / "rows.csv", "who,text,label\n" + rows)
    plan = plan_of(person_id="who", max_rows_per_person=2, on_missing="skip")

    reading = read_examples(path, plan, tokenizer, extra_column="who")

    assert [text.split()[1] for text in words(reading.examples, tokenizer)] == ["good", "good", "bad", "day"]
    assert reading.examples.persons.tolist() == [0, 1, 0, 1]
    assert reading.skipped == {"missing value": 1, "beyond max_rows_per_person": 2}
    assert (reading.kept, reading.read) == (4, 7)
    assert reading.column == ("b", "a", "b", "a")


def test_skipped_rows_are_counted_by_reason(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = save_lines(
        tmp_path / "rows.jsonl",
        {"text": "good", "label": "pos"},
        {"text": None, "label": "pos"},
        {"text": "good"},
        {"text": "good", "label": ""},
        {"text": "good", "label": "POS"},
        {"text": "", "label": "pos"},
        {"text": " \t\n ", "label": "neg"},
    )
    plan = plan_of(on_missing="skip", on_unknown_label="skip", on_empty_text="skip")

    reading = read_examples(path, plan, tokenizer)

    assert reading.skipped == {"missing value": 3, "unknown label": 1, "empty text": 2}
    assert (reading.kept, reading.read) == (1, 7)
    assert reading.kept + sum(reading.skipped.values()) == reading.read


def test_a_text_in_which_the_tokenizer_finds_nothing_is_empty(tmp_path: Path) -> None:
    letters(pad_token="<pad>").save_pretrained(tmp_path)
    path = saved(tmp_path / "rows.csv", "text,label\n~~,pos\nab,pos\n")

    reading = read_examples(path, plan_of(on_empty_text="skip"), load_tokenizer(tmp_path))

    assert reading.examples.lengths.tolist() == [2]
    assert reading.skipped == {"empty text": 1}


def test_what_is_refused_is_counted_to_the_end_of_the_table(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = "good,pos\n,pos\ngood,neutral\n ,pos\n" * 400
    path = saved(tmp_path / "rows.csv", "text,label\n" + rows)

    with pytest.raises(DataError) as caught:
        read_examples(path, plan_of(on_empty_text="skip"), tokenizer)

    assert str(caught.value).splitlines() == [
        f"{path}: missing value in 400 of 1600 rows (first in row 2 (line 3), column 'text'). Mend the table, or let "
        'the plan leave such rows out: on_missing = "skip" in [data].',
        f"{path}: unknown label in 400 of 1600 rows (first in row 3 (line 4), column 'label'). Mend the table, or let "
        'the plan leave such rows out: on_unknown_label = "skip" in [data].',
    ]


def test_texts_for_prediction_need_no_label_and_keep_their_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = saved(tmp_path / "rows.csv", "text\n" + "good\nbad\n" * 600)

    examples = read_texts(path, plan_of(person_id="who", on_missing="skip", max_rows_per_person=1), tokenizer)

    assert [text.split()[1] for text in words(examples, tokenizer)] == ["good", "bad"] * 600
    assert not examples.labels.any()
    assert examples.person_count == 1200


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("text\ngood\n\nbad\n", "missing value in 1 of 3 rows (first in row 2 (line 3), column 'text')"),
        ('text\ngood\n"  "\n', "empty text in 1 of 2 rows (first in row 2 (line 3)"),
        ("label\npos\n", "no column 'text'"),
    ],
)
def test_a_row_without_text_stops_prediction(tmp_path: Path, tokenizer: Tokenizer, content: str, fragment: str) -> None:
    skipping = plan_of(on_missing="skip", on_empty_text="skip")

    with pytest.raises(DataError, match=re.escape(fragment)):
        read_texts(saved(tmp_path / "rows.csv", content), skipping, tokenizer)


def parquet_bytes(**columns: object) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return bytes(sink.getvalue())


def two_columns_of_one_name() -> bytes:
    sink = pyarrow.BufferOutputStream()
    text = pyarrow.array([CANARY])
    pyarrow.parquet.write_table(pyarrow.table([text, text, text], names=["text", "label", "text"]), sink)
    return bytes(sink.getvalue())


def line(**row: object) -> str:
    return json.dumps(row) + "\n"


GOOD = line(text=CANARY, label="pos")
MALFORMED: dict[str, tuple[str, str | bytes, str]] = {
    "csv empty": ("a.csv", "", "a.csv is empty"),
    "csv of blank lines": ("a.csv", "\n\n\n", "a.csv is empty"),
    "csv header only": ("a.csv", "text,label\n", "a.csv has no rows"),
    "csv missing column": (
        "a.csv",
        f"text,lable\n{CANARY},pos\n",
        "no column 'label'. It has 'text', 'lable'. Did you",
    ),
    "csv without a header": ("a.csv", f"{CANARY},pos\n{CANARY},neg\n", "first line has 2 fields and must name"),
    "csv duplicate column": ("a.csv", f"text,label,text\n{CANARY},pos,x\n", "two columns named 'text'"),
    "csv short row": ("a.csv", f"text,label\n{CANARY},pos\n{CANARY}\n", "row 2 (line 3) has 1 fields, but the header"),
    "csv long row": ("a.csv", f"text,label\n{CANARY}, and,pos\n", "row 1 (line 2) has 3 fields"),
    "csv open quote": ("a.csv", f'text,label\n"{CANARY},pos\nx,neg\n', "begins on line 2 opens a double quote"),
    "csv text after quote": ("a.csv", f'text,label\n"{CANARY}"s,pos\n', "line 2 goes on after a closing quote"),
    "csv carriage returns": ("a.csv", f"text,label\r{CANARY},pos\r", "lone carriage return"),
    "csv Latin-1": ("a.csv", f"text,label\n{CANARY} é,pos\n".encode("latin-1"), "line 2 is not UTF-8 (byte 22"),
    "csv UTF-16": ("a.csv", f"text,label\n{CANARY},pos\n".encode("utf-16"), "iconv -f UTF-16"),
    "csv UTF-16 unmarked": ("a.csv", f"text,label\n{CANARY},pos\n".encode("utf-16-be"), "line 1 holds zero bytes"),
    "csv missing text": ("a.csv", f"text,label,x\n,pos,{CANARY}\n", "missing value in 1 of 1 rows"),
    "csv missing label": ("a.csv", f"text,label\n{CANARY},\n", "(first in row 1 (line 2), column 'label')"),
    "csv unknown label": ("a.csv", f"text,label\ngood,{CANARY}\n", "unknown label in 1 of 1 rows"),
    "csv empty text": ("a.csv", f"text,label,x\n  ,pos,{CANARY}\n", "empty text in 1 of 1 rows"),
    "tsv with commas": ("a.tsv", f"text,label\n{CANARY},pos\n", "first line has 1 fields"),
    "gzip of nothing": ("a.csv.gz", f"text,label\n{CANARY},pos\n", "Cannot read"),
    "gzip cut short": ("a.csv.gz", gzip.compress(f"text,label\n{CANARY},pos\n".encode())[:-9], "ends early or is dam"),
    "unknown suffix": ("a.xlsx", CANARY, "no format that can be read. Known are .csv, .tsv, .jsonl"),
    "no suffix": ("table", CANARY, "table is of no format"),
    "jsonl empty": ("a.jsonl", "", "a.jsonl has no rows"),
    "jsonl malformed": ("a.jsonl", GOOD + f'{{"text": {CANARY}}}\n', "line 2 is not JSON (at character 10)"),
    "jsonl two objects": ("a.jsonl", GOOD.strip() + GOOD, "line 1 is not JSON (at character 39)"),
    "jsonl list": ("a.jsonl", GOOD + f'["{CANARY}", "pos"]\n', "line 2 is JSON, but not an object"),
    "jsonl duplicate key": ("a.jsonl", f'{{"text": "x", "text": "{CANARY}"}}\n', "line 1 names a key twice"),
    "jsonl column never there": (
        "a.jsonl",
        GOOD.replace("label", "class"),
        "no column 'label'. It has 'text', 'class'",
    ),
    "jsonl number as text": ("a.jsonl", GOOD + line(text=12345, label="pos"), "holds whole numbers (first in line 2)"),
    "jsonl list as text": ("a.jsonl", line(text=[CANARY], label="pos"), "'text' holds lists"),
    "jsonl object as label": ("a.jsonl", line(text="x", label={CANARY: 1}), "'label' holds objects"),
    "jsonl fraction as label": ("a.jsonl", line(text=CANARY, label=1.0), "'label' holds numbers"),
    "jsonl half a character": (
        "a.jsonl",
        f'{{"text": "{CANARY} \\ud83d", "label": "pos"}}',
        "half of a surrogate pair",
    ),
    "jsonl deep": ("a.jsonl", '{"text": ' + "[" * 100_000, "too deeply nested"),
    "jsonl endless number": ("a.jsonl", '{"text": ' + "1" * 5000 + "}", "line 1 holds a number too long"),
    "jsonl not UTF-8": ("a.jsonl", GOOD.encode() + b'{"text": "\xff"}', "line 2 is not UTF-8"),
    "parquet of text": ("a.parquet", f"text,label\n{CANARY},pos\n", "a.parquet is not Parquet"),
    "parquet cut short": ("a.parquet", parquet_bytes(text=[CANARY])[:-5], "is not Parquet, or is damaged"),
    "parquet without rows": (
        "a.parquet",
        parquet_bytes(text=pyarrow.array([], "str"), label=[]),
        "parquet has no rows",
    ),
    "parquet missing column": ("a.parquet", parquet_bytes(text=[CANARY]), "no column 'label'. It has 'text'."),
    "parquet duplicate column": ("a.parquet", two_columns_of_one_name(), "two columns named 'text'"),
    "parquet number as text": (
        "a.parquet",
        parquet_bytes(text=[1], label=[CANARY]),
        "holds whole numbers, but is used",
    ),
    "parquet bytes as text": ("a.parquet", parquet_bytes(text=[b"x"], label=[CANARY]), "holds values of type binary"),
    "parquet list as text": ("a.parquet", parquet_bytes(text=[[CANARY]], label=["a"]), "values of type list<"),
    "parquet date as label": (
        "a.parquet",
        parquet_bytes(text=[CANARY], label=pyarrow.array([0], "date32")),
        "column 'label' holds dates, but is used where only text, true or false, whole numbers can be",
    ),
    "parquet null": (
        "a.parquet",
        parquet_bytes(text=[CANARY], label=pyarrow.nulls(1)),
        "(first in row 1, column 'label')",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_table_is_refused_in_words_of_its_own_without_a_cell(
    tmp_path: Path, tokenizer: Tokenizer, case: str
) -> None:
    name, content, fragment = MALFORMED[case]

    with pytest.raises(DataError, match=re.escape(fragment)) as caught:
        read_examples(saved(tmp_path / name, content), plan_of(), tokenizer)

    assert caught.value.exit_code == 4
    assert str(tmp_path) in str(caught.value)
    assert CANARY not in str(caught.value)
    assert "12345" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def folder_of_nothing(path: Path) -> None:
    path.mkdir()


def dataset_of_two_splits(path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": [CANARY], "label": ["pos"]})
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(path)


def dataset_without_its_table(path: Path) -> None:
    datasets.Dataset.from_dict({"text": [CANARY], "label": ["pos"]}).save_to_disk(path)
    next(path.glob("*.arrow")).unlink()


def dataset_of_lists(path: Path) -> None:
    datasets.Dataset.from_dict({"text": [[CANARY]], "label": ["pos"]}).save_to_disk(path)


def dataset_without_rows(path: Path) -> None:
    datasets.Dataset.from_dict({"text": [CANARY], "label": ["pos"]}).select([]).save_to_disk(path)


def dataset_with_damaged_state(path: Path) -> None:
    datasets.Dataset.from_dict({"text": [CANARY], "label": ["pos"]}).save_to_disk(path)
    (path / "state.json").write_text("{")


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda path: None, "There is no table"),
        (folder_of_nothing, "is no saved dataset"),
        (dataset_of_two_splits, "holds 2 splits ('train', 'test'), and must hold one"),
        (dataset_without_its_table, "not all of its files"),
        (dataset_with_damaged_state, "is a damaged dataset"),
        (dataset_of_lists, "column 'text' holds values of type list<"),
        (dataset_without_rows, "or has no rows"),
    ],
)
def test_a_malformed_dataset_is_refused_in_words_of_its_own_without_a_cell(
    tmp_path: Path, tokenizer: Tokenizer, make: Callable[[Path], None], fragment: str
) -> None:
    make(tmp_path / "saved")

    with pytest.raises(DataError, match=re.escape(fragment)) as caught:
        read_examples(tmp_path / "saved", plan_of(), tokenizer)

    assert CANARY not in str(caught.value)


@pytest.mark.parametrize("fragment", ["Mend the table", "none remains"])
def test_a_table_of_which_nothing_remains_is_refused(tmp_path: Path, tokenizer: Tokenizer, fragment: str) -> None:
    path = saved(tmp_path / "rows.csv", "text,label\ngood,neutral\n,pos\n")
    rule = "skip" if fragment == "none remains" else "refuse"

    with pytest.raises(DataError, match=fragment):
        read_examples(path, plan_of(on_missing=rule, on_unknown_label=rule), tokenizer)


def test_identifiers_that_are_fractions_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = save_lines(tmp_path / "rows.jsonl", {"text": "good", "label": "pos", "who": 7.0})

    with pytest.raises(DataError, match="column 'who' holds numbers"):
        read_examples(path, plan_of(person_id="who"), tokenizer)


def test_tokens_lie_in_a_file_without_a_name_and_cannot_be_changed(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    path = saved(tmp_path / "rows.csv", "text,label\ngood,pos\n")

    examples = read_examples(path, plan_of(), tokenizer).examples

    assert isinstance(examples.tokens[0], np.memmap)
    assert not examples.tokens[0].flags.writeable
    assert list(scratch.iterdir()) == []


def test_a_full_disk_is_said_in_words(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    path = saved(tmp_path / "rows.csv", "text,label\ngood,pos\n")

    with pytest.raises(DataError, match=r"Cannot write tokens to .*absent.*TMPDIR"):
        read_examples(path, plan_of(), tokenizer)


@pytest.mark.parametrize(("pair", "least"), [(None, 3), ("text", 4)])
def test_max_tokens_must_leave_room_for_text(
    tmp_path: Path, tokenizer: Tokenizer, pair: str | None, least: int
) -> None:
    path = saved(tmp_path / "rows.csv", "text,label\ngood,pos\n")

    with pytest.raises(PlanError, match=f"Set it to at least {least}"):
        read_examples(path, plan_of(max_tokens=least - 1, text_pair=pair), tokenizer)


def test_a_tokenizer_without_pad_token_pads_with_its_end_token(tmp_path: Path) -> None:
    written = letters(eos_token="<end>")
    written.save_pretrained(tmp_path)

    assert load_tokenizer(tmp_path).pad_token == written.eos_token_id


def without_end_token(directory: Path) -> None:
    letters().save_pretrained(directory)


def with_its_own_code(directory: Path) -> None:
    letters(pad_token="<pad>").save_pretrained(directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "mine.py").write_text(f"open({str(directory / 'ran')!r}, 'w')\nraise SystemExit\n")


def with_damaged_vocabulary(directory: Path) -> None:
    letters(pad_token="<pad>").save_pretrained(directory)
    (directory / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda directory: directory.rmdir(), "no model directory"),
        (lambda directory: None, "cannot be read"),
        (with_damaged_vocabulary, "cannot be read"),
        (without_end_token, "neither a pad nor an end-of-text token"),
    ],
)
def test_a_tokenizer_that_cannot_serve_is_refused(tmp_path: Path, make: Callable[[Path], None], fragment: str) -> None:
    directory = tmp_path / "base"
    directory.mkdir()
    make(directory)

    with pytest.raises(ModelError, match=fragment):
        load_tokenizer(directory)


def test_code_that_comes_with_a_tokenizer_never_runs(tmp_path: Path) -> None:
    with_its_own_code(tmp_path)

    with contextlib.suppress(ModelError):
        load_tokenizer(tmp_path)

    assert not (tmp_path / "ran").exists()


def test_importing_data_loads_no_heavy_package() -> None:
    heavy = ("torch", "transformers", "datasets", "pyarrow", "tokenizers")
    program = f"import sys, confide.client.data; sys.exit(any(name in sys.modules for name in {heavy}))"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory can be reset on Linux only")
def test_a_table_is_read_in_a_fraction_of_its_size(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.csv"
    with path.open("w") as stream:
        stream.write("who,text,label,unused\n")
        stream.writelines(f"p{number % 100_000},good day,pos,{number:0>400}\n" for number in range(300_000))
    plan = plan_of(person_id="who")
    read_texts(saved(tmp_path / "warm.csv", "text\n" + "good\n" * 2000), plan, tokenizer)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident_bytes()

    reading = read_examples(path, plan, tokenizer)

    peak = int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024
    assert reading.kept == 300_000
    assert reading.examples.person_count == 100_000
    assert peak - before < path.stat().st_size / 2
