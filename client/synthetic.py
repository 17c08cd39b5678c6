"""Made-up rows in a plan's schema, so that a site can try everything out before a row of its own is read.

They follow from the plan and a seed alone. Words are made of syllables and mean nothing, answers are drawn without
regard to what they answer: whoever learns from such rows learns nothing.
"""

import csv
import io
import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from confide.common.disk import READABLE, whole
from confide.common.errors import MissingPackage, UsageError
from confide.common.plan import REGRESSION, TOKEN_CLASSES, Plan, template_columns

MOST_ROWS = 10_000_000
Value = str | int | float | tuple[str, ...] | bytes
_SYLLABLES = [onset + vowel for onset in "bdfgklmnprstv" for vowel in "aeiou"]
_LONGEST_WORD, _MOST_WORDS = 6, 24
_IMAGE_SIDE = 32


def synthetic_rows(plan: Plan, persons: int, seed: int) -> Iterator[dict[str, Value]]:
    """Yield made-up rows that the plan can read: a value for each column it names.

    Labels are uniform among the plan's, numbers to predict lie around its center. Images are the bytes of PNG files,
    labels for words are tuples. Where the plan names a column of persons, every third person has two rows.

    Args:
        plan: Whose columns, labels and task are used.
        persons: How many persons, from 1 to MOST_ROWS.
        seed: Another one gives other rows of other persons.

    Raises:
        UsageError: The number is out of range.
        MissingPackage: Pillow is not installed, and the plan reads images.

    Guarantee: the same arguments give the same rows, and nothing else plays a part.
    """
    if not 1 <= persons <= MOST_ROWS:
        raise UsageError(f"{persons} persons cannot be made up; 1 to {MOST_ROWS} can. Ask for as many as a test needs.")
    return _rows(plan, persons, seed)


def write_synthetic(plan: Plan, path: Path, persons: int, *, seed: int = 0) -> None:
    """Write made-up rows to `path`, and images to a directory beside it; what was there is replaced.

    Args:
        plan: As for `synthetic_rows`.
        path: Ends with .csv or .jsonl.
        persons: As for `synthetic_rows`.
        seed: As for `synthetic_rows`.

    Raises:
        UsageError: The path has another ending or cannot be written, or a label holds white space where a CSV file
            separates labels by it.
        MissingPackage: As for `synthetic_rows`.
    """
    form = path.suffix.lower()
    if form not in {".csv", ".jsonl"}:
        raise UsageError(f"Made-up rows are not written as {path.name}. Give a path that ends with .csv or .jsonl.")
    if (
        form == ".csv"
        and plan.task.kind == TOKEN_CLASSES
        and any(len(label.split()) != 1 for label in plan.task.labels)
    ):
        raise UsageError(
            f"A label of the plan holds white space, which separates labels in {path.name}. Give a path that ends with .jsonl."
        )
    rows = synthetic_rows(plan, persons, seed)
    try:
        with whole(path, READABLE) as draft, draft.open("w", encoding="utf-8", newline="") as stream:
            write = _csv_lines(stream) if form == ".csv" else _json_lines(stream)
            for number, row in enumerate(rows, start=1):
                write({column: _beside(path, number, value) for column, value in row.items()})
    except OSError as error:
        raise UsageError(f"Cannot write made-up rows to {path}: {error.strerror or error}.") from None


def _rows(plan: Plan, persons: int, seed: int) -> Iterator[dict[str, Value]]:
    data = plan.data
    draws = random.Random(f"confide-synthetic/1 {seed}")  # noqa: S311  nothing secret is drawn
    for person in range(persons):
        for _ in range(2 if data.person_id is not None and person % 3 == 2 and data.max_rows_per_person > 1 else 1):
            row = _row(plan, draws)
            if data.person_id is not None:
                row[data.person_id] = f"made-up-{seed}-{person + 1}"
            yield row


def _row(plan: Plan, draws: random.Random) -> dict[str, Value]:
    data, task = plan.data, plan.task
    room = plan.model.max_tokens // (_LONGEST_WORD + 1)  # so that even a tokenizer of letters cuts nothing off
    words = _words(draws, draws.randint(1, max(1, min(_MOST_WORDS, room // (1 if data.answer is None else 2)))))
    row: dict[str, Value] = {}
    if data.template is not None:
        for place, column in enumerate(template_columns(data.template)):
            row[column] = draws.randint(0, 99) if place % 2 == 0 else _words(draws, 1)[0]
    if data.text is not None:
        row[data.text] = " ".join(words)
    if data.text_pair is not None:
        row[data.text_pair] = " ".join(_words(draws, len(words)))
    if data.image is not None:
        row[data.image] = _png(draws)
    if data.answer is not None:
        row[data.answer] = " ".join(_words(draws, draws.randint(1, 3)))
    if data.label is not None and task.kind == REGRESSION:
        row[data.label] = task.center + task.scale * draws.gauss(0, 1)
    elif data.label is not None and task.kind == TOKEN_CLASSES:
        row[data.label] = tuple(draws.choice(task.labels) for _ in words)
    elif data.label is not None:
        row[data.label] = draws.choice(task.labels)
    return row


def _words(draws: random.Random, count: int) -> list[str]:
    return ["".join(draws.choices(_SYLLABLES, k=draws.randint(1, _LONGEST_WORD // 2))) for _ in range(count)]


def _png(draws: random.Random) -> bytes:
    try:
        from PIL import Image
    except ImportError:
        raise MissingPackage("pillow", "site") from None
    target = io.BytesIO()
    side = (_IMAGE_SIDE, _IMAGE_SIDE)
    Image.frombytes("RGB", side, draws.randbytes(3 * _IMAGE_SIDE**2)).save(target, "PNG")
    return target.getvalue()


def _beside(path: Path, number: int, value: Value) -> Value:
    """Return a value as it stands in a table; an image goes to a file, of which the table has the path."""
    if not isinstance(value, bytes):
        return value
    file = path.parent / f"{path.stem}-images" / f"{number:06}.png"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(value)
    return file.relative_to(path.parent).as_posix()


def _csv_lines(stream: io.TextIOBase) -> Callable[[Mapping[str, Value]], None]:
    writer = csv.writer(stream, lineterminator="\n")
    begun = False

    def write(row: Mapping[str, Value]) -> None:
        nonlocal begun
        if not begun:
            writer.writerow(row)
            begun = True
        writer.writerow(" ".join(value) if isinstance(value, tuple) else value for value in row.values())

    return write


def _json_lines(stream: io.TextIOBase) -> Callable[[Mapping[str, Value]], None]:
    def write(row: Mapping[str, Value]) -> None:
        stream.write(json.dumps(row, ensure_ascii=False) + "\n")

    return write
