"""How a site's commands tell what they found: numbers of epsilon, aligned columns, headed paragraphs.

Nothing is read as markup, so a name from a plan or ledger cannot change how the rest looks.
"""

import json
import math
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Final

import typer

from confide.common.wording import plain

_PLACES: Final = Decimal("0.001")
_NOISE: Final = 1e-9
_GAP: Final = "  "


def spent(epsilon: float) -> str:
    """Spell an epsilon that is spent: three decimals, rounded up. A billionth is the machine's own rounding."""
    return _rounded(epsilon - _NOISE if epsilon > _NOISE else epsilon, ROUND_CEILING)


def left(epsilon: float) -> str:
    """Spell an epsilon that is left: three decimals, rounded down."""
    return _rounded(epsilon, ROUND_FLOOR)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[str] = ()) -> None:
    """Print rows under their headings, aligned; the last column is wrapped to the terminal.

    Args:
        head: The headings.
        rows: As many cells each.
        numbers: Headings of columns that are aligned to the right.
    """
    told = [[plain(cell) for cell in row] for row in rows]
    widths = [max(len(row[place]) for row in [head, *told]) for place in range(len(head))]
    before = sum(widths[:-1]) + len(_GAP) * (len(head) - 1)
    room = max(20, _width() - before)
    for number, row in enumerate([list(head), *told]):
        *first, last = row
        cells = [
            cell.rjust(width) if heading in numbers else cell.ljust(width)
            for cell, width, heading in zip(first, widths, head, strict=False)
        ]
        if head[-1] in numbers:
            last = last.rjust(widths[-1])
        lines = _wrapped(last, room) or [""]
        begun = _GAP.join([*cells, lines[0]]).rstrip()
        typer.echo(
            "\n".join(
                [typer.style(begun, bold=True) if number == 0 else begun, *(" " * before + line for line in lines[1:])]
            )
        )


def paragraphs(parts: Iterable[tuple[str, Iterable[str]]]) -> None:
    """Print headings, and what stands under each, indented and wrapped to the terminal; an empty line comes before each."""
    for heading, sentences in parts:
        typer.echo()
        typer.secho(plain(heading), bold=True)
        for written in (line for sentence in sentences for line in sentence.splitlines()):
            for line in _wrapped(plain(written), _width() - len(_GAP)):
                typer.echo(_GAP + line)


def facts(rows: Iterable[tuple[str, str]]) -> None:
    """Print names and what each stands for, aligned and indented; what is too long for a line is wrapped."""
    told = [(name, plain(value)) for name, value in rows]
    width = max((len(name) for name, _ in told), default=0)
    indent = len(_GAP) * 2 + width
    for name, value in told:
        lines = _wrapped(value, _width() - indent) or [""]
        typer.echo(f"{_GAP}{name.ljust(width)}{_GAP}{lines[0]}".rstrip())
        for line in lines[1:]:
            typer.echo(" " * indent + line)


def sentence(text: str) -> None:
    """Print a sentence or two, wrapped to the terminal."""
    for line in _wrapped(plain(text), _width()):
        typer.echo(line)


def minute(time: str) -> str:
    """Spell a UTC time such as 2026-11-23T04:38:07Z by its date and minute, for columns."""
    return time[:16].replace("T", " ")


def print_json(**fields: object) -> None:
    """Print one JSON object on one line, which says that all went well."""
    typer.echo(json.dumps({"status": "ok", **fields}))


def _rounded(epsilon: float, rounding: str) -> str:
    if not math.isfinite(epsilon):
        return str(epsilon)
    return str(Decimal(repr(float(epsilon))).quantize(_PLACES, rounding))


def _wrapped(text: str, width: int) -> list[str]:
    """Return the lines of a text. Digests and paths are not cut, so that they can be copied whole."""
    return textwrap.wrap(text, max(20, width), break_long_words=False, break_on_hyphens=False)


def _width() -> int:
    return shutil.get_terminal_size((100, 24)).columns
