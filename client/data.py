"""A site's table as the plan says it is read: rows to tokenised examples, grouped by person.

Tokens go to a file without a name and are mapped from there, so that a table of any length is read with a few numbers
per row in memory. A row that cannot be used is refused or skipped as the plan says; what is skipped is counted by
reason.
"""

import array
import dataclasses
import hashlib
import itertools
import string
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from confide.client.table import ANY, IDENTIFIER, LABEL, TEXT, Kinds, Row, read_table
from confide.common.errors import DataError, MissingPackage, ModelError, PlanError
from confide.common.examples import Examples, Ints
from confide.common.plan import Data, Plan, template_columns

MISSING, UNKNOWN_LABEL, EMPTY = "missing value", "unknown label", "empty text"
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


class Tokenizer:
    """The tokenizer of a base model. Make one with `load_tokenizer`.

    Attributes:
        pad_token: The token that fills shorter rows of a batch.
    """

    def __init__(self, backend: object, pad_token: int) -> None:
        self._backend = backend
        self.pad_token = pad_token

    def added_tokens(self, *, pair: bool) -> int:
        """Return how many tokens of its own it adds to a text, or to a pair of texts."""
        return int(self._backend.num_special_tokens_to_add(pair=pair))  # type: ignore[attr-defined]

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None, max_tokens: int
    ) -> tuple[list[list[int]], list[int]]:
        """Return the tokens of each row, and at which of them its second text begins (their number if none does).

        Args:
            texts: The text of each row.
            pairs: The second text of each row, or None.
            max_tokens: How many tokens of a row are kept; of a pair, the longer text is cut first.
        """
        encoded = self._backend(  # type: ignore[operator]
            list(texts),
            None if pairs is None else list(pairs),
            truncation="longest_first",
            max_length=max_tokens,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        tokens: list[list[int]] = encoded["input_ids"]
        if pairs is None:
            return tokens, [len(row) for row in tokens]
        sequences = (row.sequence_ids for row in encoded.encodings)
        return tokens, [row.index(1) if 1 in row else len(row) for row in sequences]


def load_tokenizer(base_directory: Path) -> Tokenizer:
    """Return the tokenizer in the directory of a base model; nothing is downloaded and no code of it is run.

    A tokenizer without a pad token, as GPT-2 and Llama have, pads with its end-of-text token.

    Raises:
        ModelError: There is none that can be read, it has no `tokenizer.json`, or no token that could pad.
        MissingPackage: transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingPackage("transformers", "site") from None
    if not base_directory.is_dir():
        raise ModelError(f"There is no model directory {base_directory}. Give a local path; nothing is downloaded.")
    try:
        backend = AutoTokenizer.from_pretrained(
            str(base_directory), local_files_only=True, trust_remote_code=False, use_fast=True
        )
    except Exception as error:  # its readers raise bare Exception, among many others
        raise ModelError(
            f"The tokenizer in {base_directory} cannot be read ({type(error).__name__}). It needs tokenizer.json and "
            "tokenizer_config.json; tokenizers that bring their own code are refused."
        ) from None
    if not backend.is_fast:
        raise ModelError(
            f"The tokenizer in {base_directory} has no tokenizer.json. Load it once with transformers and save it "
            "with save_pretrained, which writes one."
        )
    pad_token = backend.eos_token_id if backend.pad_token_id is None else backend.pad_token_id
    if pad_token is None:
        raise ModelError(
            f"The tokenizer in {base_directory} has neither a pad nor an end-of-text token, so rows of different "
            "length cannot share a batch. Name one in its tokenizer_config.json as pad_token."
        )
    return Tokenizer(backend, int(pad_token))


def read_examples(path: Path, plan: Plan, tokenizer: Tokenizer, *, extra_column: str | None = None) -> Reading:
    """Read the table `path` as the plan says; two readings of one file give the same examples.

    Persons are numbered in the order in which they first appear. Identifiers are compared as text, without the white
    space around them; without a `person_id` column each row is a person.

    Args:
        path: A file or directory that `read_table` knows.
        plan: Says which columns are used and how, and what becomes of a row that does not fit.
        tokenizer: That of the plan's base model.
        extra_column: A column whose values are given beside the examples, to split a simulation by.

    Raises:
        DataError: The table cannot be read, has a row the plan refuses, or no row remains.
        PlanError: The plan's max_tokens leaves no room for text.
    """
    data = plan.data
    columns = _text_columns(data)
    for column, kinds in ((data.label, LABEL), (data.person_id, IDENTIFIER), (extra_column, ANY)):
        if column is not None:
            columns[column] = columns.get(column, ANY) & kinds
    rules = {
        MISSING: ("on_missing", data.on_missing),
        UNKNOWN_LABEL: ("on_unknown_label", data.on_unknown_label),
        EMPTY: ("on_empty_text", data.on_empty_text),
    }
    faults = _Faults(path, rules)
    rows, tokens = _tokenised(_used_rows(path, plan, columns, extra_column, faults), plan, tokenizer, faults)
    kept, persons = _numbered(rows.persons, data.max_rows_per_person)
    beyond = len(rows.persons) - len(kept)
    skipped = faults.counts | ({BEYOND: beyond} if beyond else {})
    if not len(kept):
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
        raise DataError(f"{path}: of its {faults.read} rows none remains ({reasons}). Is this the plan's table?")
    return Reading(
        examples=_examples(rows, tokens, persons, tokenizer.pad_token).subset(kept),
        kept=len(kept),
        read=faults.read,
        skipped=skipped,
        column=None if extra_column is None else tuple(rows.extra[row] for row in kept),
    )


def read_texts(path: Path, plan: Plan, tokenizer: Tokenizer) -> Examples:
    """Read the texts of the table `path`, every row of it and in its order, for prediction.

    Only the columns of the text are read; labels are all 0, and each row is a person.

    Raises:
        DataError: The table cannot be read, or one of its rows has no text; nothing is skipped.
        PlanError: The plan's max_tokens leaves no room for text.
    """
    faults = _Faults(path, {})
    used_rows = _used_rows(path, plan, _text_columns(plan.data), None, faults)
    rows, tokens = _tokenised(used_rows, plan, tokenizer, faults)
    return _examples(rows, tokens, np.arange(faults.read), tokenizer.pad_token)


class _Faults:
    """Counts the rows that cannot be used, to the table's end: one message then tells all there is to mend."""

    def __init__(self, path: Path, rules: Mapping[str, tuple[str, str]]) -> None:
        """Take for each reason (the plan's key, "skip" or "refuse"); a reason without a rule is refused."""
        self.read = 0
        self.counts: dict[str, int] = {}
        self._path = path
        self._rules = rules
        self._first: dict[str, str] = {}

    def add(self, reason: str, row: Row, where: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self._first.setdefault(reason, f"first in {row.place}, {where}")

    @property
    def refused(self) -> list[str]:
        return [reason for reason in self.counts if self._rules.get(reason, ("", "refuse"))[1] == "refuse"]

    def check(self) -> None:
        """Raise if any row was refused."""
        sentences = []
        for reason in self.refused:
            where = f"{reason} in {self.counts[reason]} of {self.read} rows ({self._first[reason]})"
            remedy = "Mend the table"
            if reason in self._rules:
                remedy += f', or let the plan leave such rows out: {self._rules[reason][0]} = "skip" in [data]'
            sentences.append(f"{self._path}: {where}. {remedy}.")
        if sentences:
            raise DataError("\n".join(sentences))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _UsedRow:
    """A row that can be used, before it is tokenised."""

    row: Row
    text: str
    pair: str | None
    label: int
    person: str | None
    extra: str


def _text_columns(data: Data) -> dict[str, Kinds]:
    if data.template is not None:
        return dict.fromkeys(template_columns(data.template), ANY)
    return {column: TEXT for column in (data.text, data.text_pair) if column is not None}


def _used_rows(
    path: Path, plan: Plan, columns: Mapping[str, Kinds], extra_column: str | None, faults: _Faults
) -> Iterator[_UsedRow]:
    """Yield the rows that can be used, and count the others; where the label is not read it is 0."""
    data = plan.data
    labels = {label: number for number, label in enumerate(plan.task.labels)}
    texts = [column for column in (data.text, data.text_pair) if column is not None]
    # Not str.format, which would read {a.b} as an attribute of a cell instead of the column's name.
    pieces = [(literal, column) for literal, column, _, _ in string.Formatter().parse(data.template or "")]
    for row in read_table(path, columns):
        faults.read = row.number
        cells = {column: cell for column, cell in zip(columns, row.cells, strict=True) if cell is not None}
        # In a text column a blank is a fault of its own; elsewhere it is no value.
        blank = (column for column, cell in cells.items() if column not in texts and not cell.strip())
        missing = next((column for column in columns if column not in cells), None) or next(blank, None)
        if missing is not None:
            faults.add(MISSING, row, f"column {missing!r}")
            continue
        label = labels.get(cells[data.label]) if data.label in columns else 0
        if label is None:
            faults.add(UNKNOWN_LABEL, row, f"column {data.label!r}")
            continue
        rendered = (literal + ("" if column is None else cells[column]) for literal, column in pieces)
        parts = [cells[column] for column in texts] or ["".join(rendered)]
        if not all(part.strip() for part in parts):
            faults.add(EMPTY, row, "in a column of the text")
            continue
        yield _UsedRow(
            row=row,
            text=parts[0],
            pair=parts[1] if len(parts) > 1 else None,
            label=label,
            person=None if data.person_id is None else cells.get(data.person_id),
            extra="" if extra_column is None else cells[extra_column],
        )


class _Rows:
    """A few numbers for each row, 8 bytes each, whatever the row holds."""

    def __init__(self) -> None:
        self.lengths = array.array("q")
        self.second = array.array("q")
        self.labels = array.array("q")
        self.persons = array.array("Q")
        self.extra: list[str] = []
        self._values: dict[str, str] = {}

    def add(self, used: _UsedRow, length: int, second: int) -> None:
        # Of an identifier 64 bits are kept. Should two persons ever share them (chance 3e-6 among ten million), they
        # are sampled and clipped as one, which protects both no less.
        person = len(self.persons)
        if used.person is not None:
            digest = hashlib.blake2b(used.person.strip().encode(), digest_size=8)
            person = int.from_bytes(digest.digest(), "big")
        self.lengths.append(length)
        self.second.append(second)
        self.labels.append(used.label)
        self.persons.append(person)
        self.extra.append(self._values.setdefault(used.extra, used.extra))  # equal values share one object


def _tokenised(
    used_rows: Iterator[_UsedRow], plan: Plan, tokenizer: Tokenizer, faults: _Faults
) -> tuple[_Rows, npt.NDArray[np.int32]]:
    """Return the rows and the tokens of all of them, end to end, mapped from a file without a name."""
    max_tokens = plan.model.max_tokens
    added = tokenizer.added_tokens(pair=plan.data.text_pair is not None)
    if added >= max_tokens:
        raise PlanError(
            f"[model] max_tokens = {max_tokens} leaves no room for text: the base model's tokenizer adds {added} "
            f"tokens of its own to each row. Set it to at least {added + 1}."
        )
    rows = _Rows()
    try:
        # Only this process can reach the file, and it is gone when the process ends, however it ends.
        with tempfile.TemporaryFile() as file:
            for batch in _batches(used_rows):
                if not faults.refused:  # else the rest is only counted
                    file.write(_encoded(batch, rows, tokenizer, max_tokens, faults).tobytes())
            faults.check()
            file.flush()
            return rows, np.memmap(file, dtype=np.int32, mode="r") if rows.lengths else np.empty(0, np.int32)
    except OSError as error:
        raise DataError(
            f"Cannot write tokens to {tempfile.gettempdir()}: {error.strerror or error}. "
            "Free space there, or set TMPDIR to a directory with room for 4 bytes per token."
        ) from None


def _batches(used_rows: Iterator[_UsedRow]) -> Iterator[list[_UsedRow]]:
    batch: list[_UsedRow] = []
    characters = 0
    for used in used_rows:
        batch.append(used)
        characters += len(used.text) + len(used.pair or "")
        if len(batch) == _ROWS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encoded(
    batch: Sequence[_UsedRow], rows: _Rows, tokenizer: Tokenizer, max_tokens: int, faults: _Faults
) -> npt.NDArray[np.int32]:
    """Return the tokens of a batch, end to end, and add its rows to `rows`."""
    pairs = [used.pair for used in batch if used.pair is not None]
    tokens, seconds = tokenizer.encode([used.text for used in batch], pairs or None, max_tokens)
    for used, row, second in zip(batch, tokens, seconds, strict=True):
        if row:
            rows.add(used, len(row), second)
        else:
            faults.add(EMPTY, used.row, "where the tokenizer finds nothing to read")
    return np.fromiter(itertools.chain.from_iterable(tokens), dtype=np.int32)


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


def _examples(rows: _Rows, tokens: npt.NDArray[np.int32], persons: Ints, pad_token: int) -> Examples:
    lengths = np.frombuffer(rows.lengths, dtype=np.int64)
    return Examples(
        tokens=[tokens],
        store=np.zeros(len(lengths), dtype=np.int64),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        second=np.frombuffer(rows.second, dtype=np.int64),
        labels=np.frombuffer(rows.labels, dtype=np.int64),
        persons=persons,
        pad_token=pad_token,
    )
