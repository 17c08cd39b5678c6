"""Rows of a table as the plan uses them: what is shown of a row, what is to be told, and what makes it of no use."""

import dataclasses
import math
import string
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from confide.client.table import (
    ANY,
    IMAGE,
    LABEL,
    NUMBER,
    TEXT,
    WORD_LABELS,
    WORDS,
    Cell,
    Kinds,
    Row,
    read_table,
)
from confide.common.errors import DataError
from confide.common.plan import REGRESSION, TOKEN_CLASSES, Plan, template_columns

MISSING, UNKNOWN_LABEL, EMPTY = "missing value", "unknown label", "empty text"
NO_NUMBER, LABEL_COUNT = "answer that is no number", "labels that are not as many as the words"
UNREADABLE, NO_ROOM, OUTSIDE = "unreadable image", "answer beyond max_tokens", "image outside the table's directory"


class Unusable(Exception):  # noqa: N818  not an error: it is counted, and the plan says what follows
    """A row cannot be used."""

    def __init__(self, reason: str, where: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.where = where


class Faults:
    """Counts the rows that cannot be used, to the table's end: one message then tells all there is to mend."""

    def __init__(self, path: Path, rules: Mapping[str, tuple[str, str]]) -> None:
        """Take for each reason (the plan's key, "skip" or "refuse"); a reason without a rule is refused."""
        self.read = 0
        self.counts: dict[str, int] = {}
        self._path = path
        self._rules = rules
        self._first: dict[str, str] = {}

    def add(self, row: Row, fault: Unusable) -> None:
        """Count a row that cannot be used."""
        self.counts[fault.reason] = self.counts.get(fault.reason, 0) + 1
        self._first.setdefault(fault.reason, f"first in {row.place}, {fault.where}")

    @property
    def refused(self) -> list[str]:
        """The reasons that occurred and that the plan does not skip."""
        return [reason for reason in self.counts if self._rules.get(reason, ("", "refuse"))[1] == "refuse"]

    def check(self) -> None:
        """Return if no row was refused.

        Raises:
            DataError: Some were; each reason is told with how many they are and what to do.
        """
        sentences = []
        for reason in self.refused:
            where = f"{reason} in {self.counts[reason]} of {self.read} rows ({self._first[reason]})"
            remedy = "Raise [model] max_tokens" if reason == NO_ROOM else "Mend the table"
            if reason in self._rules:
                remedy += f', or let the plan leave such rows out: {self._rules[reason][0]} = "skip" in [data]'
            sentences.append(f"{self._path}: {where}. {remedy}.")
        if sentences:
            raise DataError("\n".join(sentences))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UsedRow:
    """A row that can be used, before it is encoded: what is shown of it, and what is to be told."""

    row: Row
    shown: Cell
    pair: str | None
    label: float
    word_labels: tuple[int, ...]
    answer: str
    person: str | None
    extra: str

    @property
    def size(self) -> int:
        """How many letters the text has."""
        return sum(map(len, self.shown)) if isinstance(self.shown, tuple) else len(self.shown)


def shown_columns(plan: Plan) -> dict[str, Kinds]:
    """Return the columns that the model is shown."""
    data = plan.data
    if data.template is not None:
        return dict.fromkeys(template_columns(data.template), ANY)
    if data.image is not None:
        return {data.image: IMAGE}
    kinds = WORDS if plan.task.kind == TOKEN_CLASSES else TEXT
    return {column: kinds for column in (data.text, data.text_pair) if column is not None}


def answer_columns(plan: Plan) -> dict[str, Kinds]:
    """Return the columns that hold what is to be told."""
    kinds = {REGRESSION: NUMBER, TOKEN_CLASSES: WORD_LABELS}.get(plan.task.kind, LABEL)
    columns = {plan.data.label: kinds, plan.data.answer: TEXT}
    return {column: kinds for column, kinds in columns.items() if column is not None}


def used_rows(path: Path, parser: "RowParser", faults: Faults) -> Iterator[UsedRow]:
    """Yield the rows that can be used, and count the others."""
    for row in read_table(path, parser.columns):
        faults.read = row.number
        try:
            used = parser.parsed(row)
        except Unusable as fault:
            faults.add(row, fault)
        else:
            yield used


class RowParser:
    """Takes rows of a table apart as the plan says; where the answer is not read it is 0."""

    def __init__(self, plan: Plan, columns: Mapping[str, Kinds], extra_column: str | None = None) -> None:
        self.columns = columns
        self._task = plan.task
        self._data = plan.data
        self._extra_column = extra_column
        self._labels = {label: number for number, label in enumerate(plan.task.labels)}
        # In these a blank is a fault of its own; elsewhere it is no value.
        self._texts = {plan.data.text, plan.data.text_pair, plan.data.answer, plan.data.image}
        # Not str.format, which would read {a.b} as an attribute of a cell instead of the column's name.
        parts = string.Formatter().parse(plan.data.template or "")
        self._pieces = [(literal, column) for literal, column, _, _ in parts]

    def parsed(self, row: Row) -> UsedRow:
        """Return what is used of the row.

        Raises:
            Unusable: It cannot be used.
        """
        data = self._data
        cells = {column: cell for column, cell in zip(self.columns, row.cells, strict=True) if cell is not None}
        plain = {column: cell for column, cell in cells.items() if isinstance(cell, str)}
        blank = (column for column, cell in plain.items() if column not in self._texts and not cell.strip())
        missing = next((column for column in self.columns if column not in cells), None) or next(blank, None)
        if missing is not None:
            raise Unusable(MISSING, f"column {missing!r}")
        shown = self._shown(cells, plain)
        label = 0.0
        word_labels: tuple[int, ...] = ()
        if data.label is not None and data.label in self.columns:
            if self._task.kind == TOKEN_CLASSES:
                word_labels = self._word_labels(cells[data.label], shown)
            else:
                label = self._label(plain[data.label])
        answer = plain.get(data.answer or "", "")
        if _blank(shown) or (data.answer in self.columns and not answer.strip()):
            raise Unusable(EMPTY, "in a column of the text")
        return UsedRow(
            row=row,
            shown=shown,
            pair=plain.get(data.text_pair or ""),
            label=label,
            word_labels=word_labels,
            answer=answer,
            person=plain.get(data.person_id or ""),
            extra=plain.get(self._extra_column or "", ""),
        )

    def _shown(self, cells: Mapping[str, Cell], plain: Mapping[str, str]) -> Cell:
        """Return the text, the words or the image."""
        data = self._data
        if data.template is not None:
            return "".join(literal + ("" if column is None else plain[column]) for literal, column in self._pieces)
        shown = cells[data.image or data.text or ""]
        if self._task.kind == TOKEN_CLASSES:
            return split(shown)
        if data.text_pair is not None and not plain[data.text_pair].strip():
            return ""
        return shown

    def _label(self, cell: str) -> float:
        """Return the number of a class, or a standardised answer."""
        if self._task.kind != REGRESSION:
            if cell not in self._labels:
                raise Unusable(UNKNOWN_LABEL, f"column {self._data.label!r}")
            return self._labels[cell]
        try:
            # Python would also read 1_000, which is no number elsewhere.
            answer = math.nan if "_" in cell else (float(cell) - self._task.center) / self._task.scale
        except ValueError:
            answer = math.nan
        if not abs(answer) <= float(np.finfo(np.float32).max):
            raise Unusable(NO_NUMBER, f"column {self._data.label!r}")
        return answer

    def _word_labels(self, cell: Cell, words: Cell) -> tuple[int, ...]:
        names = split(cell)
        if len(names) != len(words):
            raise Unusable(LABEL_COUNT, f"column {self._data.label!r}")
        if not all(name in self._labels for name in names):
            raise Unusable(UNKNOWN_LABEL, f"column {self._data.label!r}")
        return tuple(self._labels[name] for name in names)


def split(cell: Cell) -> tuple[str, ...]:
    """Return the entries of a list, or what white space separates."""
    return cell if isinstance(cell, tuple) else tuple(str(cell).split())


def _blank(shown: Cell) -> bool:
    if isinstance(shown, tuple):
        return not any(word.strip() for word in shown)
    return not shown.strip() if isinstance(shown, str) else False
