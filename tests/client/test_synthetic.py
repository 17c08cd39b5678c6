"""Made-up rows: read as the plan says, for every kind of task, and made from the plan alone."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from confide.client.data import read_examples, read_texts
from confide.client.images import ImageReader
from confide.client.synthetic import MOST_ROWS, synthetic_rows, write_synthetic
from confide.client.tokenizer import Tokenizer
from confide.common.errors import UsageError
from confide.common.plan import (
    CLASSES,
    IMAGE_CLASSES,
    INSTRUCTION,
    REGRESSION,
    SCORES,
    TEXT_CLASSES,
    TOKEN_CLASSES,
    Plan,
    read_plan,
    starter,
)

PERSONS = 30


def plan_for(kind: str, **data: Any) -> Plan:
    plan = read_plan(starter("test", "tiny", "sha256:" + "0" * 64, ["query"], kind).encode())
    labels = ("no", "perhaps", "yes") if kind in CLASSES else ()
    task = dataclasses.replace(plan.task, labels=labels)
    if kind == REGRESSION:
        task = dataclasses.replace(task, center=70.0, scale=15.0)
    return dataclasses.replace(plan, task=task, data=dataclasses.replace(plan.data, **data))


@pytest.fixture(scope="module")
def letters() -> Tokenizer:
    """A tokenizer that makes a token of every letter: no word is unknown to it, and texts are as long as they can be."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>", "pad_token": "<pad>"}
    backend = tokenizers.Tokenizer(
        models.BPE({letter: n for n, letter in enumerate([*alphabet, *special.values()])}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **special), 0)  # type: ignore[no-untyped-call]


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in SCORES},
    "persons": (TEXT_CLASSES, {"person_id": "patient"}),
    "pair": (TEXT_CLASSES, {"text_pair": "reply"}),
    "template": (REGRESSION, {"text": None, "template": "Age {age}, ward {ward}, {{stay}} {days}."}),
    "prompt from a template": (INSTRUCTION, {"text": None, "template": "{letter}?", "system": "Be brief."}),
    "images of persons": (IMAGE_CLASSES, {"person_id": "patient"}),
}


@pytest.mark.parametrize("form", ["csv", "jsonl"])
@pytest.mark.parametrize(("kind", "data"), SHAPES.values(), ids=SHAPES.keys())
def test_made_up_rows_are_read_as_the_plan_says_and_none_is_left_out(
    kind: str, data: dict[str, Any], form: str, letters: Tokenizer, tmp_path: Path
) -> None:
    plan = plan_for(kind, **data)
    reader = ImageReader(8, 8) if kind == IMAGE_CLASSES else letters

    write_synthetic(plan, tmp_path / f"rows.{form}", PERSONS)

    reading = read_examples(tmp_path / f"rows.{form}", plan, reader)
    assert reading.skipped == {}
    assert reading.examples.person_count == PERSONS
    assert reading.kept == (PERSONS * 4 // 3 if plan.data.person_id else PERSONS)
    assert len(read_texts(tmp_path / f"rows.{form}", plan, reader)) == reading.kept


def test_every_label_occurs_and_numbers_lie_around_the_plan_s_center() -> None:
    labels = {row["label"] for row in synthetic_rows(plan_for(TEXT_CLASSES), 60, 1)}
    of_words = {label for row in synthetic_rows(plan_for(TOKEN_CLASSES), 60, 1) for label in row["label"]}  # type: ignore[union-attr]
    numbers = [float(row["label"]) for row in synthetic_rows(plan_for(REGRESSION), 60, 1)]  # type: ignore[arg-type]

    assert labels == of_words == {"no", "perhaps", "yes"}
    assert 55 < sum(numbers) / 60 < 85
    assert max(numbers) > 70 > min(numbers)


def test_the_same_arguments_give_the_same_rows_and_another_seed_others(tmp_path: Path) -> None:
    plan = plan_for(IMAGE_CLASSES, person_id="patient")

    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        write_synthetic(plan, tmp_path / name / "rows.csv", 5, seed=seed)

    files = {
        name: {file.relative_to(tmp_path / name): file.read_bytes() for file in (tmp_path / name).rglob("*.*")}
        for name in "abc"
    }
    assert files["a"] == files["b"]
    assert len(files["a"]) == 7
    assert all(files["a"][name] != files["c"][name] for name in files["a"])


def test_another_seed_makes_up_other_persons() -> None:
    plan = plan_for(TEXT_CLASSES, person_id="patient")

    first, second = ({row["patient"] for row in synthetic_rows(plan, 9, seed)} for seed in (0, 1))

    assert len(first) == len(second) == 9
    assert not first & second


def test_labels_with_white_space_go_to_json_lines_only(letters: Tokenizer, tmp_path: Path) -> None:
    plan = plan_for(TOKEN_CLASSES)
    plan = dataclasses.replace(plan, task=dataclasses.replace(plan.task, labels=("begin drug", "none")))

    with pytest.raises(UsageError, match=r"white space, which separates labels in rows\.csv"):
        write_synthetic(plan, tmp_path / "rows.csv", 5)
    write_synthetic(plan, tmp_path / "rows.jsonl", 5)

    assert read_examples(tmp_path / "rows.jsonl", plan, letters).kept == 5
    assert not (tmp_path / "rows.csv").exists()


def test_a_person_has_one_row_where_the_plan_takes_one_of_each() -> None:
    rows = list(synthetic_rows(plan_for(TEXT_CLASSES, person_id="patient", max_rows_per_person=1), 9, 0))

    assert len({row["patient"] for row in rows}) == len(rows) == 9


@pytest.mark.parametrize("persons", [0, -1, MOST_ROWS + 1])
def test_a_number_of_persons_that_cannot_be_made_up_is_refused(persons: int) -> None:
    with pytest.raises(UsageError, match=f"{persons} persons cannot be made up"):
        synthetic_rows(plan_for(TEXT_CLASSES), persons, 0)


def test_other_endings_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ends with \.csv or \.jsonl"):
        write_synthetic(plan_for(TEXT_CLASSES), tmp_path / "rows.parquet", 3)
    with pytest.raises(UsageError, match="No such file"):
        write_synthetic(plan_for(TEXT_CLASSES), tmp_path / "absent" / "rows.csv", 3)

    assert list(tmp_path.iterdir()) == []


def test_numbers_stay_numbers_in_json_lines(tmp_path: Path) -> None:
    plan = plan_for(REGRESSION, text=None, template="Age {age}, ward {ward}.")

    write_synthetic(plan, tmp_path / "rows.jsonl", 3)

    row = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])
    assert [type(row[column]) for column in ("age", "ward", "label")] == [int, str, float]
