"""Tables on disk: CSV, TSV, JSON lines, Parquet and saved Hugging Face datasets, read one row at a time.

Whatever the format, a cell comes out as text, or as None if it has no value, so that the same table in two formats
gives the same rows. Where a column may hold lists or bytes, a cell may also be a tuple of texts, or the bytes of a file.
Messages name files, columns, rows and types, and never what a cell holds.
"""

import csv
import datetime
import decimal
import difflib
import gzip
import importlib
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from confide.common.errors import DataError, MissingPackage

LONGEST_LINE_BYTES = 16 << 20
_ROWS_AT_ONCE = 512
_FILES_AT_ONCE = 16  # rows whose cells may be whole files, such as images
_MOST_NAMES_SHOWN = 30
_MOST_COLUMNS = 10_000
_LONGEST_NAME_SHOWN = 60

# What a column may hold, by its use. An identifier is never a fraction: 7 and 7.0 would be two persons.
Kinds = frozenset[str]
Cell = str | tuple[str, ...] | bytes
TEXT: Kinds = frozenset({"text"})
IDENTIFIER: Kinds = frozenset({"text", "whole numbers"})
LABEL: Kinds = frozenset({"text", "whole numbers", "true or false"})
ANY: Kinds = frozenset({"text", "whole numbers", "true or false", "numbers", "dates"})
NUMBER: Kinds = frozenset({"text", "whole numbers", "numbers"})
WORDS: Kinds = frozenset({"text", "lists of text"})
WORD_LABELS: Kinds = WORDS | {"lists of whole numbers"}
IMAGE: Kinds = frozenset({"text", "bytes", "images"})  # text is the path of a file


class _Everything(frozenset[str]):
    """Holds every kind, those without a name of their own included."""

    def __contains__(self, kind: object) -> bool:
        return True


# For who only needs to see that a cell changed. What has no form of its own becomes text as Python spells it.
EVERYTHING: Kinds = _Everything()

_PYTHON_KINDS = {
    str: "text",
    bool: "true or false",
    int: "whole numbers",
    float: "numbers",
    dict: "objects",
}
_FORMATS = ".csv, .tsv, .jsonl, .ndjson (each also with .gz), .parquet, or a directory written by save_to_disk"


class Row(NamedTuple):
    """One row of a table.

    Attributes:
        number: Its number in the table, from 1; a header does not count.
        line: The line of the file on which it begins, from 1; 0 if the format has no lines.
        cells: Its cells, in the order in which the columns were asked for; None where there is no value. Only a column
            whose kinds say so has other cells than text: tuples of texts for lists, bytes for bytes and images.
    """

    number: int
    line: int
    cells: tuple[Cell | None, ...]

    @property
    def place(self) -> str:
        """Where the row is, for messages."""
        return f"row {self.number} (line {self.line})" if self.line else f"row {self.number}"


def read_table(path: Path, columns: Mapping[str, Kinds]) -> Iterator[Row]:
    """Yield the rows of the table `path`, without ever holding more than a few of them.

    Whole numbers are written plainly, fractions by their shortest spelling, truth values as `true` and `false`, dates
    as 2024-12-31; a number that stands for a ClassLabel becomes its name. Null and NaN are no value, nor is a list that
    holds one. In CSV and TSV every cell is text as it stands, and an empty one is no value. An image of a saved dataset
    is its bytes, or if it has none its path.

    Args:
        path: A file of a known suffix, or a directory written by `save_to_disk`.
        columns: What is read, and what each of these columns may hold.

    Raises:
        DataError: The table cannot be read, has no rows, or lacks a column, or a column holds what it may not.
        MissingPackage: The reader of this format is not installed.
    """
    if not os.path.exists(path):  # Path.exists raises where a parent may not be entered
        raise DataError(f"There is no table {path}, or it cannot be reached.")
    number = 0
    for row in _opened(path, columns):
        number = row.number
        yield row
    if not number:
        raise DataError(f"{path} has no rows.")


def table_columns(path: Path) -> tuple[str, ...]:
    """Return the names of a table's columns, each once and in order; a column without a name is left out.

    JSON lines are read to their end, because any line may have a key that none had before.

    Raises:
        DataError: The table cannot be read, has no columns or more than 10,000, or two have the same name.
        MissingPackage: The reader of this format is not installed.
    """
    if not os.path.exists(path):
        raise DataError(f"There is no table {path}, or it cannot be reached.")
    names = _names(path)
    # A first line may be somebody's row, so that no name is shown.
    columns = tuple(dict.fromkeys(name for name in names if name))
    if not columns:
        raise DataError(f"{path} has no named columns. The first line of a CSV file must name them.")
    if len(columns) > _MOST_COLUMNS:
        raise DataError(f"{path} has more than {_MOST_COLUMNS} columns. Leave out what no plan uses.")
    if len(columns) < sum(map(bool, names)):
        raise DataError(f"{path} has two columns of the same name, or no header. Name each column once.")
    return columns


def _names(path: Path) -> list[str]:
    if path.is_dir():
        return list(_saved_dataset(path).features.arrow_schema.names)
    match path.name.lower().removesuffix(".gz").rpartition(".")[2]:
        case "csv" | "tsv" as form:
            records = _records(path, "," if form == "csv" else "\t")
            return next((fields for _, fields in records if fields), [])
        case "jsonl" | "ndjson":
            keys: dict[str, None] = {}
            for line, text in enumerate(_lines(path), start=1):
                if not text.isspace() and len(keys) <= _MOST_COLUMNS:
                    keys.update(dict.fromkeys(_parsed(path, line, text)))
            return list(keys)
        case "parquet" if path.suffix.lower() == ".parquet":
            with _parquet_file(path) as file:
                return list(file.schema_arrow.names)
    raise _unknown_format(path)


def _opened(path: Path, columns: Mapping[str, Kinds]) -> Iterator[Row]:
    if path.is_dir():
        return _read_saved(path, columns)
    match path.name.lower().removesuffix(".gz").rpartition(".")[2]:
        case "csv":
            return _read_csv(path, columns, ",")
        case "tsv":
            return _read_csv(path, columns, "\t")
        case "jsonl" | "ndjson":
            return _read_jsonl(path, columns)
        case "parquet" if path.suffix.lower() == ".parquet":
            return _read_parquet(path, columns)
    raise _unknown_format(path)


def _unknown_format(path: Path) -> DataError:
    return DataError(f"{path} is of no format that can be read. Known are {_FORMATS}.")


def _read_csv(path: Path, columns: Mapping[str, Kinds], delimiter: str) -> Iterator[Row]:
    records = _records(path, delimiter)
    _, header = next(((line, fields) for line, fields in records if fields), (0, []))
    if not header:
        raise DataError(f"{path} is empty. Its first line must name the columns.")
    # A file without a header begins with somebody's row, which must not be shown as a list of column names.
    _check_columns(path, header, columns, surely_names=False)
    places = [header.index(column) for column in columns]
    number = 0
    for line, fields in records:
        if not fields and len(header) > 1:
            continue  # A blank line. In a table of one column it is a row without a value.
        number += 1
        if len(fields or [""]) != len(header):
            raise DataError(
                f"{path}: row {number} (line {line}) has {len(fields)} fields, but the header has {len(header)}. "
                "Put fields that hold the separator or a line break in double quotes."
            )
        yield Row(number, line, tuple((fields[place] or None) if fields else None for place in places))


def _records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (the line on which it begins, its fields) for every record of a CSV file; a blank line has no fields."""
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_LINE_BYTES))
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}: the row that begins on line {line} {_csv_fault(str(error))}") from None
        yield line, fields


def _csv_fault(error: str) -> str:
    if "expected after" in error:
        return "goes on after a closing quote. Write a double quote inside a quoted field twice."
    if "new-line character" in error:
        return "holds a lone carriage return outside quotes. End lines with LF or CRLF."
    return "opens a double quote that is not closed. Write a double quote inside a quoted field twice."


def _read_jsonl(path: Path, columns: Mapping[str, Kinds]) -> Iterator[Row]:
    number = 0
    absent = list(columns)
    seen: dict[str, None] = {}
    for line, text in enumerate(_lines(path), start=1):
        if text.isspace():
            continue
        number += 1
        record = _parsed(path, line, text)
        if absent:
            absent = [column for column in absent if column not in record]
            seen.update(dict.fromkeys(list(record)[:1000]) if len(seen) < 1000 else {})
        yield Row(number, line, tuple(_json_cell(path, line, record, *column) for column in columns.items()))
    if number:
        present = dict.fromkeys([*seen, *(column for column in columns if column not in absent)])
        _check_columns(path, list(present), columns)


def _parsed(path: Path, line: int, text: str) -> dict[str, object]:
    try:
        record = json.loads(text, object_pairs_hook=_distinct)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: line {line} is not JSON (at character {error.pos + 1}). Each line must hold one object."
        ) from None
    except KeyError:
        raise DataError(f"{path}: line {line} names a key twice in one object. Keep one of them.") from None
    except (ValueError, RecursionError):
        raise DataError(
            f"{path}: line {line} holds a number too long or objects too deeply nested to be read."
        ) from None
    if not isinstance(record, dict):
        raise DataError(f'{path}: line {line} is JSON, but not an object. Write each row as {{"column": value, …}}.')
    return record


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise KeyError
    return record


def _json_cell(path: Path, line: int, record: dict[str, object], column: str, kinds: Kinds) -> Cell | None:
    value = record.get(column)
    if value is None or _spelled(value) is None:
        return None
    found = _json_kind(value)
    if found not in kinds:
        raise _wrong_kind(path, column, f"{found} (first in line {line})", kinds)
    cell = _listed_cell(value) if isinstance(value, list) else _spelled(value)
    characters = cell if isinstance(cell, str) else "".join(cell or ())
    if not characters.isascii():
        try:
            characters.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{path}: line {line}, column {column!r} holds half of a surrogate pair, which is no character. "
                "Write the file as UTF-8."
            ) from None
    return cell


def _json_kind(value: object) -> str:
    if not isinstance(value, list):
        return _PYTHON_KINDS[type(value)]
    kinds = {type(entry) for entry in value if entry is not None} or {str}
    return f"lists of {_PYTHON_KINDS[kinds.pop()]}" if kinds in ({str}, {int}) else "lists of other values"


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file, with their ends and without a byte order mark."""
    offset = 0
    number = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            while raw := stream.readline(LONGEST_LINE_BYTES + 1):
                number += 1
                line = _decoded(path, number, offset, raw)
                yield line.removeprefix("\ufeff") if number == 1 else line
                offset += len(raw)
    except (EOFError, zlib.error):
        raise DataError(f"{path}: the compressed file ends early or is damaged. Write it anew.") from None
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.") from None


def _decoded(path: Path, number: int, offset: int, raw: bytes) -> str:
    if len(raw) > LONGEST_LINE_BYTES:
        raise DataError(f"{path}: line {number} is longer than {LONGEST_LINE_BYTES >> 20} MiB, the longest allowed.")
    wide = offset == 0 and raw.startswith((b"\xff\xfe", b"\xfe\xff"))
    if wide or b"\0" in raw:
        raise DataError(
            f"{path}: line {number} holds zero bytes, so this is UTF-16 or no text. "
            f"Convert it: iconv -f UTF-16 -t UTF-8 {path.name} > utf8-{path.name}"
        )
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: line {number} is not UTF-8 (byte {offset + error.start} of the file). "
            f"Convert it, for example: iconv -f WINDOWS-1252 -t UTF-8 {path.name} > utf8-{path.name}"
        ) from None


def _read_parquet(path: Path, columns: Mapping[str, Kinds]) -> Iterator[Row]:
    with _parquet_file(path) as file:
        batches = file.iter_batches(batch_size=_rows_at_once(columns), columns=list(columns))
        yield from _arrow_rows(path, file.schema_arrow, batches, columns)


def _parquet_file(path: Path) -> Any:  # noqa: ANN401  pyarrow has no types
    pyarrow, parquet = _package("pyarrow"), _package("pyarrow.parquet")
    try:
        return parquet.ParquetFile(path, memory_map=True)
    except (OSError, pyarrow.ArrowException):
        raise DataError(f"{path} is not Parquet, or is damaged or encrypted. Write it anew.") from None


def _read_saved(path: Path, columns: Mapping[str, Kinds]) -> Iterator[Row]:
    saved = _saved_dataset(path)
    batches = saved.with_format("arrow").iter(batch_size=_rows_at_once(columns))
    yield from _arrow_rows(path, saved.features.arrow_schema, batches, columns)


def _saved_dataset(path: Path) -> Any:  # noqa: ANN401  datasets has no types
    pyarrow, datasets = _package("pyarrow"), _package("datasets")
    if not any(os.path.isfile(path / name) for name in ("state.json", "dataset_dict.json")):
        raise DataError(f"The directory {path} is no saved dataset. Known are {_FORMATS}.")
    try:
        saved = datasets.load_from_disk(str(path), keep_in_memory=False)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, pyarrow.ArrowException):
        raise DataError(f"{path} is a damaged dataset, or has no rows or not all of its files. Save it anew.") from None
    if isinstance(saved, datasets.DatasetDict):
        if len(saved) != 1:
            raise DataError(
                f"{path} holds {len(saved)} splits ({', '.join(map(_shown, saved))}), and must hold one. "
                "Give the directory of one split."
            )
        saved = next(iter(saved.values()))
    return saved


def _rows_at_once(columns: Mapping[str, Kinds]) -> int:
    return _FILES_AT_ONCE if any("bytes" in kinds for kinds in columns.values()) else _ROWS_AT_ONCE


def _arrow_rows(
    path: Path,
    schema: Any,  # noqa: ANN401  pyarrow has no types
    batches: Iterator[Any],
    columns: Mapping[str, Kinds],
) -> Iterator[Row]:
    """Yield the rows of record batches or tables; `schema` also says which integers stand for names."""
    pyarrow = _package("pyarrow")
    _check_columns(path, schema.names, columns)
    classes = {column: _class_names(schema, column) for column in columns}
    for column, kinds in columns.items():
        found = _arrow_kind(schema.field(column).type)
        if classes[column] is not None:
            found = found.replace("whole numbers", "text")
        if found != "nothing" and found not in kinds:
            raise _wrong_kind(path, column, found, kinds)
    number = 0
    batches = iter(batches)
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            cells = [_arrow_cells(batch.column(column), classes[column]) for column in columns]
        except (OSError, ValueError, pyarrow.ArrowException):  # a UnicodeDecodeError is a ValueError
            raise DataError(f"{path} is damaged somewhere after row {number}. Write it anew.") from None
        for row in zip(*cells, strict=True):
            number += 1
            yield Row(number, 0, row)


def _class_names(schema: Any, column: str) -> list[str] | None:  # noqa: ANN401  pyarrow has no types
    """Return the names of a ClassLabel column, or of one of lists of them, as Hugging Face datasets keep them, or None."""
    if _arrow_kind(schema.field(column).type) not in {"whole numbers", "lists of whole numbers"}:
        return None
    try:
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]
        feature = feature.get("feature", feature)
        if feature["_type"] == "ClassLabel":
            return [str(name) for name in feature["names"]]
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    return None


def _arrow_kind(kind: Any) -> str:  # noqa: ANN401, PLR0911  pyarrow has no types; one line for each kind
    is_a = _package("pyarrow").types
    if is_a.is_dictionary(kind):
        return _arrow_kind(kind.value_type)
    if is_a.is_string(kind) or is_a.is_large_string(kind) or is_a.is_string_view(kind):
        return "text"
    if is_a.is_boolean(kind):
        return "true or false"
    if is_a.is_integer(kind):
        return "whole numbers"
    if is_a.is_floating(kind) or is_a.is_decimal(kind):
        return "numbers"
    if is_a.is_date(kind):
        return "dates"
    if is_a.is_binary(kind) or is_a.is_large_binary(kind) or is_a.is_binary_view(kind):
        return "bytes"
    if is_a.is_struct(kind) and {field.name: _arrow_kind(field.type) for field in kind} in _IMAGE_FIELDS:
        return "images"
    if _is_list(kind):
        found = _arrow_kind(kind.value_type).replace("nothing", "text")  # lists of nothing are empty
        if found in {"text", "whole numbers"}:
            return f"lists of {found}"
    return "nothing" if is_a.is_null(kind) else f"values of type {_cut(str(kind))}"


# How Hugging Face datasets keep an image; either part may be absent from a row, and then from all of them.
_IMAGE_FIELDS = (
    {"bytes": "bytes", "path": "text"},
    {"bytes": "nothing", "path": "text"},
    {"bytes": "bytes", "path": "nothing"},
    {"bytes": "bytes"},
)


def _is_list(kind: Any) -> bool:  # noqa: ANN401  pyarrow has no types
    is_a = _package("pyarrow").types
    return bool(is_a.is_list(kind) or is_a.is_large_list(kind) or is_a.is_fixed_size_list(kind))


def _arrow_cells(array: Any, names: list[str] | None) -> Sequence[Cell | None]:  # noqa: ANN401  pyarrow has no types
    values = array.to_pylist()
    is_a = _package("pyarrow").types
    if _is_list(array.type):
        named = [
            value if value is None or names is None else [_class_name(entry, names) for entry in value]
            for value in values
        ]
        return [None if value is None else _listed_cell(value) for value in named]
    if names is not None:
        return [_class_name(value, names) for value in values]
    if is_a.is_binary(array.type) or is_a.is_large_binary(array.type) or is_a.is_binary_view(array.type):
        return list(values)
    if _arrow_kind(array.type) == "images":
        return [None if value is None else value["bytes"] or value.get("path") for value in values]
    if is_a.is_float32(array.type) or is_a.is_float16(array.type):
        # The shortest spelling of 0.1 in single precision is 0.1; widened to double it would be 0.10000000149.
        narrow = np.float32 if is_a.is_float32(array.type) else np.float16
        values = [None if value is None else float(str(narrow(value))) for value in values]
    return [_spelled(value) for value in values]


def _class_name(value: int | None, names: list[str]) -> str | None:
    """Return the name that `value` stands for; -1 is how a ClassLabel says that there is none."""
    return names[value] if value is not None and 0 <= value < len(names) else None


def _listed_cell(entries: Sequence[object]) -> tuple[str, ...] | None:
    spelled = [_spelled(entry) for entry in entries]
    return None if None in spelled else tuple(entry for entry in spelled if entry is not None)


def _spelled(value: object) -> str | None:
    """Return a value as the text of its cell, or None if it is none."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return None if math.isnan(value) else repr(value)
    if isinstance(value, decimal.Decimal):
        return format(value, "f")
    if isinstance(value, datetime.date):
        return value.isoformat()
    return str(value)


def _check_columns(path: Path, present: Sequence[str], wanted: Iterable[str], *, surely_names: bool = True) -> None:
    """Raise if a wanted column is missing, or a name stands for two columns; columns without a name may be many."""
    near = {column: _near(column, present) for column in wanted}
    # A first line without one wanted name may be a row of data, which must not be shown; a near name alone proves nothing.
    folded = {name.strip().casefold() for name in present}
    surely_names = surely_names or any(column.strip().casefold() in folded for column in near)
    missing = [column for column in near if column not in present]
    if missing and not surely_names and len(near) == 1:
        raise DataError(
            f"{path} has no column {_listed(missing)}. Its first line must name the columns, each as it is asked for."
        )
    if missing and not surely_names:
        raise DataError(
            f"{path} has no column {_listed(missing)}, nor any other that the plan uses. "
            f"Its first line has {len(present)} fields and must name the columns; is the header missing?"
        )
    if missing:
        hints = "".join(f" Did you mean {_shown(near[column])}?" for column in missing if near[column])
        raise DataError(f"{path} has no column {_listed(missing)}. It has {_listed(present)}.{hints}")
    twice = next((name for place, name in enumerate(present) if name and name in present[:place]), None)
    if twice is not None:
        raise DataError(f"{path} has two columns named {_shown(twice)}. Rename or remove one.")


def _near(column: str, present: Sequence[str]) -> str:
    folded = {name.strip().casefold(): name for name in present if name}
    close = difflib.get_close_matches(column.strip().casefold(), folded, n=1, cutoff=0.7)
    return column if column in present else folded[close[0]] if close else ""


def _wrong_kind(path: Path, column: str, found: str, kinds: Kinds) -> DataError:
    return DataError(
        f"{path}: column {column!r} holds {found}, but is used where only {', '.join(sorted(kinds))} can be. "
        "Convert the column, or name another in the plan."
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(_shown(name) for name in names[:_MOST_NAMES_SHOWN])
    more = len(names) - _MOST_NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown or "none"


def _shown(name: str) -> str:
    return repr(_cut(name))


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME_SHOWN else name[: _LONGEST_NAME_SHOWN - 1] + "…"


def _package(name: str) -> Any:  # noqa: ANN401  a module without types
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingPackage(name.partition(".")[0], "site") from None
