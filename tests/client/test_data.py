"""Tables to examples: what is kept, what is skipped, what is refused, and what a refusal says."""

import contextlib
import csv
import dataclasses
import gzip
import json
import os
import re
import string
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from confide.client.data import load_reader, read_examples, read_texts
from confide.client.images import ImageReader
from confide.client.tokenizer import FIXED_DATE, Tokenizer, load_tokenizer
from confide.common.base import base_digest
from confide.common.errors import DataError, ModelError, PlanError
from confide.common.examples import IGNORED, Examples
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
    "[MASK]",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    backend = tokenizers.Tokenizer(models.WordPiece({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    directory = tmp_path_factory.mktemp("base")
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Tokenizer:
    return load_tokenizer(base)


def letters(*merges: tuple[str, str], **special: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer as GPT-2's, which adds nothing to a text; "Ġ" is a space and "Ċ" a line break."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = ["".join(merge) for merge in merges]
    vocabulary = {letter: number for number, letter in enumerate([*alphabet, *merged, *special.values()])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, list(merges)))
    backend.normalizer = normalizers.Replace("~", "")
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)  # type: ignore[no-untyped-call]


def metaspaces() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama's: "▁" stands for a space and before the first word, "<s>" is put first, nothing last."""
    vocabulary = {
        piece: number for number, piece in enumerate(["<unk>", "<s>", "</s>", "▁", *string.ascii_letters, "\n"])
    }
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


CHAT = (
    "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chatting(template: str = CHAT, *merges: tuple[str, str]) -> Tokenizer:
    backend = letters(*merges, eos_token="<end>")
    backend.chat_template = template
    return Tokenizer(backend, 0)


def shown_by(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    return "".join(tokenizer._backend.convert_ids_to_tokens(list(tokens))).replace("Ġ", " ").replace("Ċ", "\n")


def task_plan(kind: str, *, max_tokens: int = 32, **settings: Any) -> Plan:
    """A plan for a kind of task whose starter is changed in [task] and [data]."""
    plan = read_plan(starter("test", "tiny", "sha256:" + "0" * 64, ["query"], kind).encode())
    task = {key: settings.pop(key) for key in ("labels", "center", "scale", "mask_rate") if key in settings}
    return dataclasses.replace(
        plan,
        model=dataclasses.replace(plan.model, max_tokens=max_tokens),
        task=dataclasses.replace(plan.task, **task),
        data=dataclasses.replace(plan.data, **settings),
    )


def rows_of(examples: Examples) -> list[tuple[list[int], list[int], float]]:
    """Return (tokens, targets, label) of each row."""
    rows = range(len(examples))
    windows = [(slice(examples.starts[row], examples.starts[row] + examples.lengths[row])) for row in rows]
    targets = examples.targets[0] if examples.targets else np.empty(0, np.int32)
    return [
        (examples.tokens[0][window].tolist(), targets[window].tolist(), float(label))
        for window, label in zip(windows, examples.labels, strict=True)
    ]


def learned(examples: Examples, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Return (what the model reads, what of it is learned) of each row; "·" stands where nothing is."""
    return [
        (
            shown_by(tokenizer, tokens),
            "".join("·" if target == IGNORED else shown_by(tokenizer, [target]) for target in targets),
        )
        for tokens, targets, _ in rows_of(examples)
    ]


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
    types = examples.batch(np.array([0, 1])).token_type_ids
    assert types is not None
    assert types.tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1]]


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


def test_an_identifier_spelled_with_other_accents_is_the_same_person(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"text": "good", "label": "pos", "who": unicodedata.normalize(form, "Müller")} for form in ("NFC", "NFD")]

    examples = read_examples(save_lines(tmp_path / "rows.jsonl", *rows), plan_of(person_id="who"), tokenizer).examples

    assert examples.persons.tolist() == [0, 0]


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
    "parquet bytes as text": ("a.parquet", parquet_bytes(text=[b"x"], label=[CANARY]), "column 'text' holds bytes"),
    "parquet list as text": ("a.parquet", parquet_bytes(text=[[CANARY]], label=["a"]), "holds lists of text, but"),
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
        (dataset_of_lists, "column 'text' holds lists of text"),
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
    heavy = ("torch", "transformers", "datasets", "pyarrow", "tokenizers", "PIL")
    program = f"import sys, confide.client.data; sys.exit(any(name in sys.modules for name in {heavy}))"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# Causal language modelling.


def test_the_answers_of_a_causal_model_are_its_own_tokens_and_its_end_token(tmp_path: Path) -> None:
    tokenizer = Tokenizer(letters(eos_token="<end>"), 0)
    path = saved(tmp_path / "rows.csv", "text\nab c\nd\n")

    examples = read_examples(path, task_plan("causal-lm"), tokenizer).examples

    assert learned(examples, tokenizer) == [("ab c<end>", "ab c<end>"), ("d<end>", "d<end>")]
    assert examples.labels.tolist() == [0, 0]
    assert examples.second.tolist() == examples.lengths.tolist()


def test_a_tokenizer_that_begins_a_text_keeps_its_begin_token(tmp_path: Path) -> None:
    tokenizer = Tokenizer(metaspaces(), 0)
    path = saved(tmp_path / "rows.csv", "text\nab c\n")

    examples = read_examples(path, task_plan("causal-lm"), tokenizer).examples

    assert learned(examples, tokenizer) == [("<s>▁ab▁c</s>", "<s>▁ab▁c</s>")]


def test_a_tokenizer_with_an_end_token_of_its_own_gets_no_second_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = saved(tmp_path / "rows.csv", "text\ngood day\n")

    examples = read_examples(path, task_plan("causal-lm"), tokenizer).examples

    assert words(examples, tokenizer) == ["[CLS] good day [SEP]"]


def test_a_text_that_is_cut_off_has_no_end_token(tmp_path: Path) -> None:
    tokenizer = Tokenizer(letters(eos_token="<end>"), 0)
    path = saved(tmp_path / "rows.csv", "text\nabc\nabcd\nab\n")

    examples = read_examples(path, task_plan("causal-lm", max_tokens=3), tokenizer).examples

    assert [text for text, _ in learned(examples, tokenizer)] == ["abc", "abc", "ab<end>"]


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [(Tokenizer(letters(pad_token="<pad>"), 0), "a"), (Tokenizer(letters(eos_token="<end>"), 0), "~")],
    ids=["one token follows none", "nothing is left of the text"],
)
def test_a_text_with_nothing_to_learn_is_empty(tmp_path: Path, tokenizer: Tokenizer, text: str) -> None:
    path = saved(tmp_path / "rows.csv", f"text\n{text}\nabc\n")

    reading = read_examples(path, task_plan("causal-lm", on_empty_text="skip"), tokenizer)

    assert (reading.kept, reading.skipped) == (1, {"empty text": 1})


def closing() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that puts its end token after every text."""
    backend = letters(eos_token="<end>")
    backend.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", backend.eos_token_id)]
    )
    return backend


@pytest.mark.parametrize("backend", [letters(eos_token="<end>"), closing()], ids=["open", "closing"])
def test_a_text_for_prediction_stands_open_at_its_end(tmp_path: Path, backend: PreTrainedTokenizerFast) -> None:
    tokenizer = Tokenizer(backend, 0)
    path = saved(tmp_path / "rows.csv", "text\nab\n")
    ((whole, _, _),) = rows_of(read_examples(path, task_plan("causal-lm"), tokenizer).examples)

    examples = read_texts(path, task_plan("causal-lm"), tokenizer)

    assert shown_by(tokenizer, whole) == "ab<end>"
    assert shown_by(tokenizer, examples.tokens[0].tolist()) == "ab"
    assert examples.second.tolist() == [2]
    assert not examples.targets


def test_tokens_are_said_as_text_without_special_ones() -> None:
    tokenizer = Tokenizer(closing(), 0)

    (tokens,), _ = tokenizer.encode(["two words"], None, 99)

    assert tokenizer.decode(tokens) == "two words"


# Masked language modelling.

SENTENCES = [f"{one} {two} days 12 {three} {one}" for one in ("good", "bad") for two in ("age", ",") for three in "13"]


def masked(path: Path, tokenizer: Tokenizer, sentences: Sequence[str], **settings: Any) -> Examples:
    saved(path, "text\n" + "".join(f'"{sentence}"\n' for sentence in sentences))
    return read_examples(path, task_plan("masked-lm", **settings), tokenizer).examples


def test_hidden_tokens_are_the_targets_and_all_else_stays(tmp_path: Path, tokenizer: Tokenizer) -> None:
    plain = read_texts(
        saved(tmp_path / "plain.csv", "text\n" + "".join(f'"{sentence}"\n' for sentence in SENTENCES)),
        task_plan("masked-lm"),
        tokenizer,
    )

    examples = masked(tmp_path / "rows.csv", tokenizer, SENTENCES, mask_rate=0.3)

    for (tokens, targets, _), (before, nothing, _) in zip(rows_of(examples), rows_of(plain), strict=True):
        hidden = [place for place, target in enumerate(targets) if target != IGNORED]
        assert len(hidden) == round(0.3 * (len(before) - 2))
        assert [targets[place] for place in hidden] == [before[place] for place in hidden]
        assert not {0, len(before) - 1} & set(hidden)  # [CLS] and [SEP] are never hidden
        assert all(tokens[place] == before[place] for place in range(len(before)) if place not in hidden)
        assert nothing == []


def test_of_hidden_tokens_eight_in_ten_are_masked_and_one_in_ten_is_any_token() -> None:
    """Three counts of 20000 draws, each within five standard deviations: false alarm below 3 × 6e-7."""
    tokenizer = Tokenizer(letters(mask_token="<mask>"), 0)
    mask = tokenizer._backend.mask_token_id
    draws = np.array([tokenizer.hide([7, 8, 9, number % 256, number // 256], 0.2, 3) for number in range(20_000)])

    tokens, targets = draws[:, 0], draws[:, 1]

    hidden = targets != IGNORED
    assert (hidden.sum(axis=1) == 1).all()
    now, before = tokens[hidden], targets[hidden]
    for count, share in (((now == mask).sum(), 0.8), ((now == before).sum(), 0.1 + 0.1 / 256)):
        assert abs(count - 20_000 * share) < 5 * (20_000 * share * (1 - share)) ** 0.5
    other = now[(now != mask) & (now != before)]
    assert abs(other.mean() - 127.5) < 5 * (256**2 / 12 / len(other)) ** 0.5
    places = hidden.sum(axis=0)
    assert (abs(places - 4000) < 5 * (20_000 * 0.2 * 0.8) ** 0.5 + 1).all()


def test_what_is_hidden_is_equal_on_two_readings_and_another_with_another_seed(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    row = [2, 4, 5, 6, 4, 5, 14, 8, 9, 3]

    first = masked(tmp_path / "rows.csv", tokenizer, SENTENCES)
    second = masked(tmp_path / "rows.csv", tokenizer, SENTENCES)

    assert rows_of(first) == rows_of(second)
    assert len({tuple(tokenizer.hide(row, 0.15, seed)[1]) for seed in range(30)}) > 3


def test_what_is_hidden_in_a_row_does_not_depend_on_any_other_row(tmp_path: Path, tokenizer: Tokenizer) -> None:
    together = rows_of(masked(tmp_path / "rows.csv", tokenizer, SENTENCES, mask_rate=0.3))

    alone = [rows_of(masked(tmp_path / "one.csv", tokenizer, [sentence], mask_rate=0.3))[0] for sentence in SENTENCES]

    assert alone == together
    assert len({tuple(targets) for _, targets, _ in together}) > 1


def test_at_least_one_token_is_hidden_and_a_text_of_unknown_ones_is_empty(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = saved(tmp_path / "rows.csv", "text\ngood\nxyz xyz\n")

    reading = read_examples(path, task_plan("masked-lm", mask_rate=0.01, on_empty_text="skip"), tokenizer)

    assert [targets for _, targets, _ in rows_of(reading.examples)] == [[IGNORED, WORDS.index("good"), IGNORED]]
    assert reading.skipped == {"empty text": 1}


def test_a_tokenizer_without_a_mask_token_cannot_hide(tmp_path: Path) -> None:
    path = saved(tmp_path / "rows.csv", "text\nabc\n")

    with pytest.raises(ModelError, match="no mask token"):
        read_examples(path, task_plan("masked-lm"), Tokenizer(letters(eos_token="<end>"), 0))


# Instructions.


def test_only_the_answer_and_what_closes_it_are_learned(tmp_path: Path) -> None:
    tokenizer = chatting()
    path = saved(tmp_path / "rows.csv", "text,answer\nhi you,I am\n x, y \n")

    examples = read_examples(path, task_plan("instruction", max_tokens=99), tokenizer).examples

    assert learned(examples, tokenizer) == [
        (
            "<|user|>hi you<|end|>\n<|assistant|>I am<|end|>\n",
            "·" * len("<|user|>hi you<|end|>\n<|assistant|>") + "I am<|end|>\n",
        ),
        ("<|user|>x<|end|>\n<|assistant|>y<|end|>\n", "·" * len("<|user|>x<|end|>\n<|assistant|>") + "y<|end|>\n"),
    ]


def test_the_system_text_stands_before_every_prompt_and_is_not_learned(tmp_path: Path) -> None:
    tokenizer = chatting()
    path = saved(tmp_path / "rows.csv", "text,answer\nq,r\n")

    examples = read_examples(path, task_plan("instruction", max_tokens=99, system="Be kind."), tokenizer).examples

    ((text, targets),) = learned(examples, tokenizer)
    assert text == "<|system|>Be kind.<|end|>\n<|user|>q<|end|>\n<|assistant|>r<|end|>\n"
    assert targets.lstrip("·") == "r<|end|>\n"


@pytest.mark.parametrize(
    ("tokenizer", "system", "shown", "answered"),
    [
        (Tokenizer(letters(eos_token="<end>"), 0), None, "ask\n\nsay<end>", "say<end>"),
        (Tokenizer(letters(eos_token="<end>"), 0), "Be.", "Be.\n\nask\n\nsay<end>", "say<end>"),
        (Tokenizer(letters(pad_token="<pad>"), 0), None, "ask\n\nsay", "say"),
        (Tokenizer(metaspaces(), 0), None, "<s>▁ask\n\nsay</s>", "say</s>"),
    ],
    ids=["GPT-2", "system", "no end token", "Llama"],
)
def test_without_a_chat_template_blank_lines_part_prompt_and_answer(
    tmp_path: Path, tokenizer: Tokenizer, system: str | None, shown: str, answered: str
) -> None:
    path = saved(tmp_path / "rows.csv", "text,answer\nask,say\n")

    examples = read_examples(path, task_plan("instruction", system=system), tokenizer).examples

    ((text, targets),) = learned(examples, tokenizer)
    assert text == shown
    assert targets.lstrip("·") == answered
    assert targets.count("·") == len(shown.removesuffix(answered).replace("<s>", "s"))


@pytest.mark.parametrize(
    "tokenizer", [chatting(), Tokenizer(letters(eos_token="<end>"), 0), Tokenizer(metaspaces(), 0)]
)
def test_a_prompt_for_prediction_is_what_comes_before_the_answer_in_training(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = saved(tmp_path / "rows.csv", "text,answer\nask me,say\n")
    plan = task_plan("instruction", max_tokens=99, system="Be.")

    prompts = read_texts(path, plan, tokenizer)

    ((tokens, targets, _),) = rows_of(read_examples(path, plan, tokenizer).examples)
    assert prompts.tokens[0].tolist() == tokens[: targets.count(IGNORED)]
    assert not prompts.targets


def test_a_token_that_holds_the_end_of_the_prompt_is_not_learned(tmp_path: Path) -> None:
    template = "{% for turn in messages %}A{{ turn.content }}|{% endfor %}{{ 'A' if add_generation_prompt }}"
    tokenizer = chatting(template, ("A", "b"))
    path = saved(tmp_path / "rows.csv", "text,answer\nq,bx\n")

    examples = read_examples(path, task_plan("instruction", max_tokens=99), tokenizer).examples

    ((text, targets),) = learned(examples, tokenizer)
    assert text == "Aq|Abx|"
    assert targets == "····x|"  # "Ab" is one token


def test_an_answer_wholly_beyond_max_tokens_is_counted_by_a_reason_of_its_own(tmp_path: Path) -> None:
    tokenizer = Tokenizer(letters(eos_token="<end>"), 0)
    path = saved(tmp_path / "rows.csv", "text,answer\nabcdefgh,yes\nabcdefghijkl,yes\nabc,yes\n")

    reading = read_examples(path, task_plan("instruction", max_tokens=12, on_empty_text="skip"), tokenizer)

    assert [targets.lstrip("·") for _, targets in learned(reading.examples, tokenizer)] == ["ye", "yes<end>"]
    assert reading.skipped == {"answer beyond max_tokens": 1}
    with pytest.raises(
        DataError, match=r"answer beyond max_tokens in 1 of 3 rows .*Raise \[model\] max_tokens, or let"
    ):
        read_examples(path, task_plan("instruction", max_tokens=12), tokenizer)
    with pytest.raises(DataError, match=r"answer beyond max_tokens in 1 of 3 rows .*Raise \[model\] max_tokens\.$"):
        read_texts(path, task_plan("instruction", max_tokens=12), tokenizer)


def test_blank_answers_are_empty_and_absent_ones_are_missing(tmp_path: Path) -> None:
    path = saved(tmp_path / "rows.csv", 'text,answer\nq," "\nq,\nq,r\n')
    plan = task_plan("instruction", on_empty_text="skip", on_missing="skip")

    reading = read_examples(path, plan, Tokenizer(letters(eos_token="<end>"), 0))

    assert reading.skipped == {"empty text": 1, "missing value": 1}


FORGETS = "{% for turn in messages %}{{ turn.content }}|{% endfor %}{{ messages | length }}"
ALTERS = (
    "{% if messages[-1].role == 'assistant' %}[answered]{% endif %}"
    "{% for turn in messages %}{{ turn.content }}|{% endfor %}"
)
OPENS = CHAT.replace("<|assistant|>{%", "<|assistant|><think>{%")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT
DROPS_SYSTEM = CHAT.replace("in messages %}", "in messages if turn.role != 'system' %}")
MERGES = CHAT.replace("<|assistant|>{%", "<|assistant|>N{%").replace(
    "{{ turn.content", "{{ 'N' if turn.role == 'assistant' }}{{ turn.content"
)


@pytest.mark.parametrize(
    ("template", "system", "fragment"),
    [
        (FORGETS, None, "changes the prompt when an answer follows it"),
        (ALTERS, None, "changes the prompt when an answer follows it"),
        (OPENS, None, "changes the prompt when an answer follows it"),
        (MERGES, None, "changes the prompt when an answer follows it"),
        (NO_SYSTEM, "Be.", r"fails on a system turn \(TemplateError\)"),
        (DROPS_SYSTEM, "Be.", r"leaves out \[data\] system"),
        ("{{ messages.nothing.at_all }}", None, r"fails on these turns \(UndefinedError\)"),
        ("{{ ''.__class__.__mro__ }}", None, r"fails on these turns \(SecurityError\)"),
        ("{% for turn in messages %", None, r"fails on these turns \(TemplateSyntaxError\)"),
    ],
    ids=["length", "alters", "opens", "merges", "no system", "drops system", "undefined", "sandbox", "syntax"],
)
def test_a_chat_template_that_cannot_be_used_is_refused_before_any_row_is_read(
    tmp_path: Path, template: str, system: str | None, fragment: str
) -> None:
    tokenizer = chatting(template, ("N", "N"))

    with pytest.raises(ModelError, match=fragment):
        read_examples(tmp_path / "no-such-table.csv", task_plan("instruction", system=system), tokenizer)


def test_a_template_that_changes_one_prompt_is_refused_without_showing_it(tmp_path: Path) -> None:
    tokenizer = chatting(
        CHAT + f"{{% if '{CANARY}' in messages[0].content and messages | length == 1 %}}!{{% endif %}}"
    )
    path = saved(tmp_path / "rows.csv", f"text,answer\n{CANARY},r\n")

    with pytest.raises(ModelError, match="changes the prompt") as caught:
        read_examples(path, task_plan("instruction"), tokenizer)

    assert CANARY not in str(caught.value)


def test_a_template_that_asks_for_the_date_is_told_the_same_every_day(tmp_path: Path) -> None:
    tokenizer = chatting("{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}" + CHAT)
    path = saved(tmp_path / "rows.csv", "text,answer\nq,r\n")

    examples = read_examples(path, task_plan("instruction", max_tokens=99), tokenizer).examples

    assert learned(examples, tokenizer)[0][0].startswith(f"{FIXED_DATE}<|user|>q")


def test_a_saved_chat_template_is_used_and_covered_by_the_digest_of_the_base(tmp_path: Path) -> None:
    backend = letters(eos_token="<end>")
    backend.chat_template = CHAT
    backend.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    tokenizer, digest = load_tokenizer(tmp_path), base_digest(tmp_path)

    (tmp_path / "chat_template.jinja").write_text(CHAT + "!")

    assert tokenizer.encode_turns(["q"], None, None, 99)[1] == [len("<|user|>q<|end|>\n<|assistant|>")]
    assert base_digest(tmp_path) != digest


# Token classification.

TAGS = ("O", "PLACE", "DAY")


def tagged(folder: Path, texts: Sequence[Sequence[str]], tags: Sequence[Sequence[str]]) -> list[Path]:
    """Write words and their labels in every form in which they may come."""
    rows = list(zip(texts, tags, strict=True))
    lines = "".join(f'"{" ".join(text)}",{"  ".join(tag)}\n' for text, tag in rows)
    save_lines(folder / "lists.jsonl", *({"text": text, "label": tag} for text, tag in rows))
    save_lines(folder / "mixed.jsonl", *({"text": " ".join(text), "label": tag} for text, tag in rows))
    columns: dict[str, Any] = {"text": list(map(list, texts)), "label": list(map(list, tags))}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "lists.parquet")
    datasets.Dataset.from_dict(columns).save_to_disk(folder / "saved")
    named = datasets.Features(
        text=datasets.Sequence(datasets.Value("string")), label=datasets.Sequence(datasets.ClassLabel(names=list(TAGS)))
    )
    datasets.Dataset.from_dict(columns, features=named).save_to_disk(folder / "named")
    return [
        saved(folder / "rows.csv", "text,label\n" + lines),
        *(folder / name for name in ("lists.jsonl", "mixed.jsonl", "lists.parquet", "saved", "named")),
    ]


def test_a_label_stands_at_the_first_token_of_its_word(tmp_path: Path, tokenizer: Tokenizer) -> None:
    paths = tagged(tmp_path, [["good", "days,", "12"], ["night"]], [["O", "DAY", "PLACE"], ["DAY"]])

    read = [read_examples(path, task_plan("token-classification", labels=TAGS), tokenizer).examples for path in paths]

    assert words(read[0], tokenizer) == ["[CLS] good day ##s , 1 ##2 [SEP]", "[CLS] night [SEP]"]
    none = IGNORED
    assert [targets for _, targets, _ in rows_of(read[0])] == [[none, 0, 2, none, none, 1, none, none], [none, 2, none]]
    assert read[0].labels.tolist() == [0, 0]
    assert all(rows_of(other) == rows_of(read[0]) for other in read)


@pytest.mark.parametrize(
    ("tokenizer", "labelled"),
    [
        (Tokenizer(letters(eos_token="<end>"), 0), ["a", "Ã", "c"]),
        (Tokenizer(letters(("Ġ", "c"), eos_token="<end>"), 0), ["a", "Ã", "Ġc"]),
        (Tokenizer(metaspaces(), 0), ["▁", "<unk>", "c"]),
    ],
    ids=["a space of its own", "a space before its word", "a space before the first word"],
)
def test_words_are_found_again_whatever_becomes_of_spaces(
    tmp_path: Path, tokenizer: Tokenizer, labelled: list[str]
) -> None:
    path = saved(tmp_path / "rows.csv", "text,label\nab é c,O DAY PLACE\n")

    examples = read_examples(path, task_plan("token-classification", labels=TAGS), tokenizer).examples

    ((tokens, targets, _),) = rows_of(examples)
    places = [place for place, target in enumerate(targets) if target != IGNORED]
    assert [targets[place] for place in places] == [0, 2, 1]
    assert tokenizer._backend.convert_ids_to_tokens([tokens[place] for place in places]) == labelled


def test_words_beyond_max_tokens_have_no_label(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = saved(tmp_path / "rows.csv", "text,label\ngood bad night,O DAY PLACE\n")

    examples = read_examples(path, task_plan("token-classification", labels=TAGS, max_tokens=4), tokenizer).examples

    assert words(examples, tokenizer) == ["[CLS] good bad [SEP]"]
    assert rows_of(examples)[0][1] == [IGNORED, 0, 2, IGNORED]


def test_words_for_prediction_say_where_labels_are_to_be_read_off(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = saved(tmp_path / "rows.csv", "text\ngood days\n")

    examples = read_texts(path, task_plan("token-classification", labels=TAGS), tokenizer)

    assert rows_of(examples)[0][1] == [IGNORED, 0, 0, IGNORED, IGNORED]


def test_labels_that_do_not_fit_their_words_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows: list[dict[str, object]] = [
        {"text": ["good", "day"], "label": ["O", "DAY"]},
        {"text": ["good", "day"], "label": ["O"]},
        {"text": ["good"], "label": ["O", CANARY]},
        {"text": ["good"], "label": [CANARY]},
        {"text": ["good", None], "label": ["O", "O"]},
        {"text": [], "label": []},
        {"text": ["", " "], "label": ["O", "O"]},
    ]
    path = save_lines(tmp_path / "rows.jsonl", *rows)
    plan = task_plan("token-classification", labels=TAGS)
    skipping = task_plan(
        "token-classification", labels=TAGS, on_missing="skip", on_unknown_label="skip", on_empty_text="skip"
    )

    reading = read_examples(path, skipping, tokenizer)

    assert reading.kept == 1
    assert reading.skipped == {
        "labels that are not as many as the words": 2,
        "unknown label": 1,
        "missing value": 1,
        "empty text": 2,
    }
    with pytest.raises(
        DataError, match=r"labels that are not as many as the words in 2 of 7 rows \(first in"
    ) as caught:
        read_examples(path, plan, tokenizer)
    assert CANARY not in str(caught.value)


# Regression.


def test_answers_are_centered_and_scaled(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"text": "good", "label": 120.0}, {"text": "bad", "label": 80.5}, {"text": "day", "label": -1e3}]
    plan = task_plan("regression", center=100.0, scale=10.0)

    read = [read_examples(path, plan, tokenizer).examples for path in in_every_format(tmp_path, rows)]

    assert read[0].labels.tolist() == [2.0, np.float32(-1.95), -110.0]
    assert read[0].labels.dtype == np.float32
    assert not read[0].targets
    assert all(same(examples, read[0]) for examples in read)


@pytest.mark.parametrize("answer", [CANARY, "1,5", "inf", "-Infinity", "1_000", "1e39", "0x10"])
def test_an_answer_that_is_no_number_is_counted_and_not_shown(
    tmp_path: Path, tokenizer: Tokenizer, answer: str
) -> None:
    path = saved(tmp_path / "rows.csv", f'text,label\ngood," 1e3 "\nbad,"{answer}"\nday,7\n')

    reading = read_examples(path, task_plan("regression", on_unknown_label="skip"), tokenizer)

    assert reading.examples.labels.tolist() == [1000, 7]
    assert reading.skipped == {"answer that is no number": 1}
    with pytest.raises(
        DataError, match=r"answer that is no number in 1 of 3 rows .*on_unknown_label = \"skip\""
    ) as caught:
        read_examples(path, task_plan("regression"), tokenizer)
    assert answer not in str(caught.value).replace(str(path), "")


def test_whole_numbers_are_answers_and_truth_values_are_not(tmp_path: Path, tokenizer: Tokenizer) -> None:
    whole = save_lines(tmp_path / "whole.jsonl", {"text": "good", "label": 3}, {"text": "bad", "label": "4"})
    truth = save_lines(tmp_path / "truth.jsonl", {"text": "good", "label": True})

    assert read_examples(whole, task_plan("regression"), tokenizer).examples.labels.tolist() == [3, 4]
    with pytest.raises(DataError, match="'label' holds true or false"):
        read_examples(truth, task_plan("regression"), tokenizer)


def test_numbers_for_prediction_need_no_answer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = saved(tmp_path / "rows.csv", "text,more\ngood,bad\n")

    examples = read_texts(path, task_plan("regression", text_pair="more", center=5.0), tokenizer)

    assert words(examples, tokenizer) == ["[CLS] good [SEP] bad [SEP]"]
    assert examples.labels.tolist() == [0.0]


# Every kind of task.

TABLES: dict[str, tuple[str, list[str]]] = {
    "text-classification": ("text,label", ["good day,positive", "bad,negative", "good 12,positive", "day,negative"]),
    "regression": ("text,label", ["good day,3", "bad,4.5", "good 12,-1", "day,0"]),
    "token-classification": (
        "text,label",
        ["good day,positive negative", "bad,negative", "good 12,positive positive", "day,negative"],
    ),
    "causal-lm": ("text", ["good day", "bad", "good 12 12 12", "day"]),
    "masked-lm": ("text", ["good day", "bad", "good 12 12 12", "day"]),
    "instruction": ("text,answer", ["good day,bad", "bad,good day", "good 12,12 12 12", "day,1"]),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_row_s_example_does_not_depend_on_any_other_row(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    header, lines = TABLES[kind]
    plan = task_plan(kind)
    everyone = rows_of(
        read_examples(saved(tmp_path / "all.csv", "\n".join([header, *lines])), plan, tokenizer).examples
    )

    for left_out in range(len(lines)):
        others = [*lines[:left_out], *lines[left_out + 1 :]]
        path = saved(tmp_path / "others.csv", "\n".join([header, *reversed(others)]))

        read = rows_of(read_examples(path, plan, tokenizer).examples)

        assert read == [*everyone[:left_out], *everyone[left_out + 1 :]][::-1]


@pytest.mark.parametrize("kind", TABLES)
def test_every_kind_groups_rows_by_person_and_keeps_them_in_files_without_a_name(
    tmp_path: Path, tokenizer: Tokenizer, kind: str
) -> None:
    header, lines = TABLES[kind]
    rows = [f"{line},{who}" for line, who in zip(lines, "abab", strict=True)]
    path = saved(tmp_path / "rows.csv", "\n".join([f"{header},who", *rows]))

    reading = read_examples(path, task_plan(kind, person_id="who", max_rows_per_person=1), tokenizer)

    assert reading.examples.persons.tolist() == [0, 1]
    assert reading.skipped == {"beyond max_rows_per_person": 2}
    assert all(isinstance(store, np.memmap) for store in (*reading.examples.tokens, *reading.examples.targets))
    assert reading.examples.batch(np.array([1, 0])).labels.dtype == (np.float32 if kind == "regression" else np.int64)


def test_the_reader_of_a_plan_is_the_tokenizer_of_its_base(base: Path) -> None:
    assert isinstance(load_reader(base, task_plan("causal-lm")), Tokenizer)


def test_a_reader_of_another_kind_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = saved(tmp_path / "rows.csv", "text,image,label\na,b,negative\n")

    for plan, reader in (
        (task_plan("image-classification"), tokenizer),
        (task_plan("text-classification"), ImageReader(2, 2)),
    ):
        with pytest.raises(ModelError, match="does not suit"):
            read_examples(path, plan, reader)


def test_a_tokenizer_that_cuts_on_the_left_is_made_to_cut_on_the_right(tmp_path: Path) -> None:
    backend = letters(eos_token="<end>")
    backend.truncation_side = "left"
    backend.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)

    tokens, _ = tokenizer.encode(["abcd"], None, 2)

    assert shown_by(tokenizer, tokens[0]) == "ab"


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory can be reset on Linux only")
def test_a_table_is_read_in_a_fraction_of_its_size(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.csv"
    with path.open("w") as stream:
        stream.write("who,text,label,unused\n")
        stream.writelines(f"p{number % 40_000},good day,pos,{number:0>400}\n" for number in range(120_000))
    plan = plan_of(person_id="who")
    read_texts(saved(tmp_path / "warm.csv", "text\n" + "good\n" * 2000), plan, tokenizer)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident_bytes()

    reading = read_examples(path, plan, tokenizer)

    peak = int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024
    assert reading.kept == 120_000
    assert reading.examples.person_count == 40_000
    assert peak - before < path.stat().st_size / 2
