"""A site's table as the plan says it is read: rows to examples, grouped by person, for every kind of task.

Tokens or pixels go to a file without a name and are mapped from there, so that a table of any length is read with a few
numbers per row in memory. A row that cannot be used is refused or skipped as the plan says; what is skipped is counted
by reason. What becomes of a row depends on that row, the plan and the base model only, never on another row: the
guarantee is about what one person's rows can change.
"""

import array
import dataclasses
import functools
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from confide.client.images import ImageError, ImagePathError, ImageReader, load_image_reader
from confide.client.persons import identifier
from confide.client.rows import (
    EMPTY,
    LABEL_COUNT,
    MISSING,
    NO_NUMBER,
    NO_ROOM,
    OUTSIDE,
    UNKNOWN_LABEL,
    UNREADABLE,
    Faults,
    RowParser,
    Unusable,
    UsedRow,
    answer_columns,
    shown_columns,
    split,
    used_rows,
)
from confide.client.table import ANY, IDENTIFIER
from confide.client.tokenizer import Tokenizer, load_tokenizer
from confide.common.errors import DataError, ModelError, PlanError
from confide.common.examples import IGNORED, Examples, Ints
from confide.common.plan import (
    CAUSAL,
    IMAGE_CLASSES,
    INSTRUCTION,
    LANGUAGE,
    MASKED,
    REGRESSION,
    TOKEN_CLASSES,
    Plan,
)

BEYOND = "beyond max_rows_per_person"
_ROWS_AT_ONCE = 512
# Until its call returns, a tokenizer keeps some 150 bytes for each token, those beyond max_tokens included.
_CHARACTERS_AT_ONCE = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What reading a table gave.

    Attributes:
        examples: The rows that were kept, in the order of the table.
        kept: How many these are.
        read: How many rows the table has.
        skipped: How many rows were left out, by reason; reasons that did not occur are absent.
        column: The value of the extra column in each kept row, if one was asked for.
    """

    examples: Examples
    kept: int
    read: int
    skipped: Mapping[str, int]
    column: tuple[str, ...] | None = None


def read_examples(
    path: Path, plan: Plan, reader: Tokenizer | ImageReader, *, extra_column: str | None = None
) -> Reading:
    """Read the table `path` as the plan says; two readings of one file give the same examples.

    Persons are numbered in the order in which they first appear. Identifiers are compared in the one spelling that
    `persons.identifier` gives them; without a `person_id` column each row is a person. What a row's targets are is said
    in docs/howto/tasks.md for each kind of task.

    Args:
        path: A file or directory that `read_table` knows.
        plan: Says which columns are used and how, and what becomes of a row that does not fit.
        reader: That of the plan's base model, from `load_reader`.
        extra_column: A column whose values are given beside the examples, to split a simulation by.

    Raises:
        DataError: The table cannot be read, has a row the plan refuses, or no row remains.
        ModelError: The base model's tokenizer is of no use for the plan's task.
        PlanError: The plan's max_tokens leaves no room for text.

    Guarantee: a row's example does not depend on any other row.
    """
    data = plan.data
    columns = shown_columns(plan) | answer_columns(plan)
    for column, kinds in ((data.person_id, IDENTIFIER), (extra_column, ANY)):
        if column is not None:
            columns[column] = columns[column] & kinds if column in columns else kinds
    unusable = ("on_unknown_label", data.on_unknown_label)
    nothing = ("on_empty_text", data.on_empty_text)
    rules = {
        MISSING: ("on_missing", data.on_missing),
        **dict.fromkeys((UNKNOWN_LABEL, NO_NUMBER, LABEL_COUNT), unusable),
        **dict.fromkeys((EMPTY, UNREADABLE, NO_ROOM), nothing),
    }
    faults = Faults(path, rules)
    used = used_rows(path, RowParser(plan, columns, extra_column), faults)
    rows, tokens, targets = _encoded(used, _encoder(path, plan, reader, answers=True), plan, faults)
    kept, persons = _numbered(rows.persons, data.max_rows_per_person)
    beyond = len(rows.persons) - len(kept)
    skipped = faults.counts | ({BEYOND: beyond} if beyond else {})
    if not len(kept):
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
        raise DataError(f"{path}: of its {faults.read} rows none remains ({reasons}). Is this the plan's table?")
    return Reading(
        examples=_examples(rows, tokens, targets, persons, plan, reader).subset(kept),
        kept=len(kept),
        read=faults.read,
        skipped=skipped,
        column=None if extra_column is None else tuple(rows.extra[row] for row in kept),
    )


def read_texts(path: Path, plan: Plan, reader: Tokenizer | ImageReader) -> Examples:
    """Read the table `path` without answers, every row of it and in its order, for prediction.

    Only the columns of the text, or of the image, are read; labels are all 0, and each row is a person. Language models
    get no targets: texts and prompts stand open at their end, nothing is hidden. For token-classification the targets
    are 0 at each word's first token, where its label is to be read off, and IGNORED elsewhere.

    Raises:
        DataError: The table cannot be read, or one of its rows has nothing to read; nothing is skipped.
        ModelError: The base model's tokenizer is of no use for the plan's task.
        PlanError: The plan's max_tokens leaves no room for text.
    """
    faults = Faults(path, {})
    used = used_rows(path, RowParser(plan, shown_columns(plan)), faults)
    rows, tokens, targets = _encoded(used, _encoder(path, plan, reader, answers=False), plan, faults)
    return _examples(rows, tokens, targets, np.arange(faults.read), plan, reader)


def load_reader(base_directory: Path, plan: Plan) -> Tokenizer | ImageReader:
    """Return what reads rows for the base model in a directory: its tokenizer, or a reader of images.

    Raises:
        ModelError: The directory does not hold what that needs.
        MissingPackage: transformers, or Pillow, is not installed.
    """
    return load_image_reader(base_directory) if plan.task.kind == IMAGE_CLASSES else load_tokenizer(base_directory)


class _Encoded(NamedTuple):
    """A row as numbers: tokens or pixels, where its second text begins, and targets if each token has one."""

    numbers: Sequence[int] | npt.NDArray[np.uint8]
    second: int
    targets: Sequence[int] = ()


# Encodes some rows, and for each says why it cannot be used or what it is.
_Encoder = Callable[[Sequence[UsedRow]], Iterator[_Encoded | Unusable]]
_NOTHING = Unusable(EMPTY, "where the tokenizer finds nothing to read")


def _encoder(path: Path, plan: Plan, reader: Tokenizer | ImageReader, *, answers: bool) -> _Encoder:
    """Return what encodes the rows of a table for the plan's kind of task, with its answers or without."""
    kind = plan.task.kind
    if isinstance(reader, ImageReader) != (kind == IMAGE_CLASSES):
        raise ModelError(f"This reader does not suit {kind}. Take the one that `load_reader` gives for the plan.")
    if isinstance(reader, ImageReader):
        return functools.partial(_images, reader, path if path.is_dir() else path.parent)
    max_tokens = plan.model.max_tokens
    added = reader.added_tokens(pair=plan.data.text_pair is not None)
    if added >= max_tokens:
        raise PlanError(
            f"[model] max_tokens = {max_tokens} leaves no room for text: the base model's tokenizer adds {added} "
            f"tokens of its own to each row. Set it to at least {added + 1}."
        )
    if kind == TOKEN_CLASSES:
        return functools.partial(_words, reader, max_tokens)
    if kind == INSTRUCTION:
        reader.check_turns(plan.data.system)
        return functools.partial(_turns, reader, plan, answers)
    if kind == MASKED:
        reader.check_mask()
    return functools.partial(_texts, reader, plan, answers and kind in LANGUAGE)


def _texts(tokenizer: Tokenizer, plan: Plan, learned: bool, batch: Sequence[UsedRow]) -> Iterator[_Encoded | Unusable]:
    """Encode texts; `learned` says whether their own tokens are the answers."""
    max_tokens = plan.model.max_tokens
    pairs = [used.pair for used in batch if used.pair is not None]
    rows, seconds = tokenizer.encode([str(used.shown) for used in batch], pairs or None, max_tokens)
    added = tokenizer.added_tokens(pair=bool(pairs))
    for row, second in zip(rows, seconds, strict=True):
        if len(row) <= added:
            yield _NOTHING
        elif not learned:
            whole = tokenizer.opened(row) if plan.task.kind == CAUSAL else row
            yield _Encoded(whole, min(second, len(whole)))
        elif plan.task.kind == CAUSAL:
            whole = tokenizer.closed(row, max_tokens)
            # The first token follows none, so a row of one has nothing to learn.
            yield _Encoded(whole, len(whole), whole) if len(whole) > 1 else _NOTHING
        else:
            hidden, targets = tokenizer.hide(row, plan.task.mask_rate, plan.adapter.seed)
            yield _Encoded(hidden, second, targets) if max(targets) != IGNORED else _NOTHING


def _turns(tokenizer: Tokenizer, plan: Plan, answers: bool, batch: Sequence[UsedRow]) -> Iterator[_Encoded | Unusable]:
    """Encode prompts, with their answers or without."""
    prompts, told = [str(used.shown) for used in batch], [used.answer for used in batch]
    max_tokens = plan.model.max_tokens
    rows, begins = tokenizer.encode_turns(prompts, told if answers else None, plan.data.system, max_tokens)
    for row, begin in zip(rows, begins, strict=True):
        if begin >= (len(row) if answers else max_tokens):
            yield Unusable(NO_ROOM, "where the prompt fills max_tokens")
        else:
            yield _Encoded(row, len(row), [IGNORED] * begin + row[begin:] if answers else ())


def _words(tokenizer: Tokenizer, max_tokens: int, batch: Sequence[UsedRow]) -> Iterator[_Encoded | Unusable]:
    """Encode words, each with its label at its first token; without labels with 0 there."""
    rows, firsts = tokenizer.encode_words([split(used.shown) for used in batch], max_tokens)
    for used, row, places in zip(batch, rows, firsts, strict=True):
        targets = [IGNORED] * len(row)
        for place, word in places.items():
            targets[place] = used.word_labels[word] if used.word_labels else 0
        yield _Encoded(row, len(row), targets) if places else _NOTHING


def _images(reader: ImageReader, folder: Path, batch: Sequence[UsedRow]) -> Iterator[_Encoded | Unusable]:
    for used in batch:
        try:
            pixels = reader.read(used.shown if isinstance(used.shown, bytes) else str(used.shown), folder)
        except ImagePathError:
            yield Unusable(OUTSIDE, "in the column of the image")
        except ImageError:
            yield Unusable(UNREADABLE, "in the column of the image")
        else:
            yield _Encoded(pixels.reshape(-1), pixels.size)


class _Rows:
    """A few numbers for each row, 8 bytes each, whatever the row holds."""

    def __init__(self) -> None:
        self.lengths = array.array("q")
        self.second = array.array("q")
        self.labels = array.array("d")  # a class number is exact in it
        self.persons = array.array("Q")
        self.extra: list[str] = []
        self._values: dict[str, str] = {}

    def add(self, used: UsedRow, length: int, second: int) -> None:
        # Of an identifier 64 bits are kept. Should two persons ever share them (chance 3e-6 among ten million), they
        # are sampled and clipped as one, which protects both no less.
        person = len(self.persons)
        if used.person is not None:
            digest = hashlib.blake2b(identifier(used.person).encode(), digest_size=8)
            person = int.from_bytes(digest.digest(), "big")
        self.lengths.append(length)
        self.second.append(second)
        self.labels.append(used.label)
        self.persons.append(person)
        self.extra.append(self._values.setdefault(used.extra, used.extra))  # equal values share one object


def _encoded(
    used_rows: Iterator[UsedRow], encode: _Encoder, plan: Plan, faults: Faults
) -> tuple[_Rows, npt.NDArray[Any], npt.NDArray[np.int32] | None]:
    """Return the rows, the tokens or pixels of all of them, end to end, and their targets if each token has one.

    Both are mapped from files without a name.
    """
    rows = _Rows()
    dtype = np.uint8 if plan.task.kind == IMAGE_CLASSES else np.int32
    try:
        # Only this process can reach the files, and they are gone when the process ends, however it ends.
        with tempfile.TemporaryFile() as numbers, tempfile.TemporaryFile() as targets:
            for batch in _batches(used_rows):
                if faults.refused:
                    continue  # the rest is only counted
                for used, row in zip(batch, encode(batch), strict=True):
                    if isinstance(row, Unusable):
                        faults.add(used.row, row)
                        continue
                    rows.add(used, len(row.numbers), row.second)
                    numbers.write(np.asarray(row.numbers, dtype=dtype).tobytes())
                    targets.write(np.asarray(row.targets, dtype=np.int32).tobytes())
            faults.check()
            numbers.flush()
            targets.flush()
            if not rows.lengths:
                return rows, np.empty(0, dtype), None
            told = np.memmap(targets, dtype=np.int32, mode="r") if targets.tell() else None
            return rows, np.memmap(numbers, dtype=dtype, mode="r"), told
    except OSError as error:
        raise DataError(
            f"Cannot write tokens to {tempfile.gettempdir()}: {error.strerror or error}. "
            "Free space there, or set TMPDIR to a directory with room for 8 bytes per token, or 1 per pixel value."
        ) from None


def _batches(used_rows: Iterator[UsedRow]) -> Iterator[list[UsedRow]]:
    batch: list[UsedRow] = []
    characters = 0
    for used in used_rows:
        batch.append(used)
        characters += used.size + len(used.pair or "") + len(used.answer)
        if len(batch) == _ROWS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _numbered(identifiers: "array.array[int]", most_rows: int) -> tuple[Ints, Ints]:
    """Return (the rows kept, whose each row is); of each person the first `most_rows` rows are kept."""
    keys = np.frombuffer(identifiers, dtype=np.uint64)
    _, first, person, count = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    by_person = np.argsort(person, kind="stable")
    rank = np.empty(len(person), dtype=np.int64)  # how many rows of the same person come before
    rank[by_person] = np.arange(len(person)) - np.repeat(np.cumsum(count) - count, count)
    appearance = np.empty(len(first), dtype=np.int64)
    appearance[np.argsort(first)] = np.arange(len(first))
    return np.flatnonzero(rank < most_rows), appearance[person]


def _examples(
    rows: _Rows,
    numbers: npt.NDArray[Any],
    targets: npt.NDArray[np.int32] | None,
    persons: Ints,
    plan: Plan,
    reader: Tokenizer | ImageReader,
) -> Examples:
    lengths = np.frombuffer(rows.lengths, dtype=np.int64)
    return Examples(
        tokens=[numbers],
        store=np.zeros(len(lengths), dtype=np.int64),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        second=np.frombuffer(rows.second, dtype=np.int64),
        labels=np.frombuffer(rows.labels, dtype=np.float64).astype(
            np.float32 if plan.task.kind == REGRESSION else np.int64
        ),
        persons=persons,
        pad_token=0 if isinstance(reader, ImageReader) else reader.pad_token,
        targets=() if targets is None else [targets],
        image=reader.shape if isinstance(reader, ImageReader) else None,
    )
