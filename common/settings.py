"""The reader of strict TOML: every key is declared once, with its type, its range and its meaning.

A section of a plan is a frozen dataclass whose fields are made by `setting`. From that one declaration come the parser,
its error messages, the commented starter file and the reference page.
"""

import dataclasses
import math
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, TypeVar

Section = TypeVar("Section")
_MOST_DOTS = 100  # in one key; the parser's time grows with their square


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """What a key is for and what it may hold."""

    says: str
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] | tuple[int, ...] = ()
    example: object = None

    @property
    def limit(self) -> str:
        """The permitted range in words, such as `above 0, at most 1`."""
        bounds = (
            ("above", self.above),
            ("at least", self.at_least),
            ("below", self.below),
            ("at most", self.at_most),
        )
        words = [
            f"{word} {bound if isinstance(bound, int) else format(bound, 'g')}"
            for word, bound in bounds
            if bound is not None
        ]
        if self.choices:
            words.append("one of " + ", ".join(map(str, self.choices)))
        return ", ".join(words)


def setting(
    says: str,
    *,
    default: object = dataclasses.MISSING,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    choices: tuple[str, ...] | tuple[int, ...] = (),
    example: object = None,
) -> Any:  # noqa: ANN401  like dataclasses.field, it stands for a value of the field's type
    """Declare one key.

    Args:
        says: What the key means, as one sentence for the person who writes the plan.
        default: Its value when absent; without one the key is required.
        above: Exclusive lower bound of a number.
        at_least: Inclusive lower bound of a number, or of the length of a list or text.
        below: Exclusive upper bound of a number.
        at_most: Inclusive upper bound of a number, or of the length of a list or text.
        choices: The only texts or whole numbers allowed.
        example: What a starter file shows for a required key.
    """
    meaning = Meaning(
        says=says,
        above=above,
        at_least=at_least,
        below=below,
        at_most=at_most,
        choices=choices,
        example=example,
    )
    return dataclasses.field(default=default, metadata={"meaning": meaning})


def read_tree(raw: bytes, *, subject: str, kind: str) -> dict[str, Any]:
    """Return the tree of a TOML file's bytes.

    Args:
        raw: The bytes; their number is for the caller to limit.
        subject: What begins a sentence about them, such as `The plan`.
        kind: What they should be, such as `one` or `a policy`.

    Raises:
        ValueError: They are no TOML, or such as takes the parser too long; the message is a sentence for the person who
            wrote it.
    """
    if max((line.split(b"=")[0].count(b".") for line in raw.split(b"\n")), default=0) > _MOST_DOTS:
        raise ValueError(f"{subject} is nested too deeply to be {kind}.")
    try:
        return tomllib.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{subject} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        if str(error).startswith(("Cannot overwrite", "Cannot declare")):
            where = str(error).rpartition("(")[2].removesuffix(")")
            raise ValueError(f"{subject} gives a key or a section twice ({where}). Leave one of the two out.") from None
        raise ValueError(f"{subject} is not valid TOML: {error}.") from None
    except RecursionError:
        raise ValueError(f"{subject} is nested too deeply to be {kind}.") from None
    except ValueError:  # Python reads no number of more than 4300 digits
        raise ValueError(f"{subject} holds a number of too many digits to be read.") from None


def read_section(section: type[Section], name: str, raw: Mapping[str, object], problems: list[str]) -> Section | None:
    """Read one TOML table; every fault is appended to `problems`, and None is returned if there was one.

    Args:
        section: A dataclass declared with `setting`.
        name: The table's name, for messages.
        raw: The table as the TOML parser gave it.
        problems: Where the faults go, one sentence each.
    """
    hints = typing.get_type_hints(section)
    fields = {field.name: field for field in dataclasses.fields(section)}  # type: ignore[arg-type]
    before = len(problems)
    for key in raw:
        if key not in fields:
            near = _nearest(key, fields)
            hint = f"Did you mean {near!r}?" if near else f"Known keys: {', '.join(fields)}."
            problems.append(f"[{name}] has no key {key!r}. {hint}")
    values: dict[str, object] = {}
    for key, field in fields.items():
        meaning: Meaning = field.metadata["meaning"]
        if key not in raw:
            if field.default is dataclasses.MISSING:
                problems.append(f"[{name}] lacks {key!r}: {meaning.says} Add it{_example(key, meaning)}.")
            continue
        fault, value = _read_value(hints[key], raw[key], meaning)
        if fault:
            problems.append(f"[{name}] {key} = {shown(raw[key])} {fault}. It means: {meaning.says}")
        values[key] = value
    return section(**values) if len(problems) == before else None


def _read_value(hint: object, value: object, meaning: Meaning) -> tuple[str, object]:
    """Return (what is wrong or "", the value converted)."""
    if isinstance(hint, UnionType):
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if hint is bool:
        return ("" if isinstance(value, bool) else "is not true or false"), value
    if hint is str:
        return _text_fault(value, meaning), value
    if hint in {int, float}:
        return _number(hint, value, meaning)
    if not isinstance(value, Sequence) or isinstance(value, str):
        return "is not a list", value
    items = [_text_fault(item, Meaning(says="", at_least=1)) for item in value]
    fault = next((f"holds an entry that {item}" for item in items if item), "")
    if not fault and len(set(value)) != len(value):
        fault = "names an entry twice"
    return fault or _size_fault(len(value), meaning, "entries"), tuple(value)


def _text_fault(value: object, meaning: Meaning) -> str:
    if not isinstance(value, str):
        return "is not text in quotes"
    if meaning.choices and value not in meaning.choices:
        near = _nearest(value, map(str, meaning.choices))
        return f"is not {meaning.limit}" + (f" (did you mean {near!r}?)" if near else "")
    if holds_control(value):
        return "holds a control character"
    return _size_fault(len(value), meaning, "characters")


def _number(hint: object, value: object, meaning: Meaning) -> tuple[str, object]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "is not a number", value
    if hint is int and not isinstance(value, int):
        return "is not a whole number", value
    if isinstance(value, float) and not math.isfinite(value):
        return "is not a finite number", value
    if meaning.choices and value not in meaning.choices:
        return f"is not {meaning.limit}", value
    outside = (
        (meaning.above is not None and value <= meaning.above)
        or (meaning.at_least is not None and value < meaning.at_least)
        or (meaning.below is not None and value >= meaning.below)
        or (meaning.at_most is not None and value > meaning.at_most)
    )
    if outside:  # before the conversion, which has no room for a whole number of 400 digits
        return f"is outside its range ({meaning.limit})", value
    return "", float(value) if hint is float else value


def _size_fault(size: int, meaning: Meaning, unit: str) -> str:
    if meaning.at_least is not None and size < meaning.at_least:
        return f"has {size} {unit}, and needs at least {meaning.at_least:g}"
    if meaning.at_most is not None and size > meaning.at_most:
        return f"has {size} {unit}, and may have at most {meaning.at_most:g}"
    return ""


def _nearest(word: str, known: typing.Iterable[str]) -> str | None:
    from difflib import get_close_matches

    return next(iter(get_close_matches(word, list(known), n=1, cutoff=0.6)), None)


def holds_control(text: str) -> bool:
    """Return whether `text` holds a control character (C0, DEL, C1) other than line break and tab."""
    return any(ord(character) < 32 or 127 <= ord(character) < 160 for character in text if character not in "\n\t")


def shown(value: object) -> str:
    """Spell `value` for a message, cut to 60 characters."""
    try:
        text = toml_value(value)
    except (ValueError, RecursionError):  # Python spells neither numbers of 5000 digits nor endless nesting
        return "(too long to show)"
    return text if len(text) <= 60 else text[:57] + "..."


def _example(key: str, meaning: Meaning) -> str:
    return f", for example: {key} = {toml_value(meaning.example)}" if meaning.example is not None else ""


def toml_value(value: object) -> str:
    """Spell a str, bool, int, float or list of these as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
        return f'"{escaped}"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return str(value)


def reference(sections: Mapping[str, type]) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield (section, key, default, range, meaning) for every key of these sections, for a reference page."""
    for name, section in sections.items():
        for field in dataclasses.fields(section):
            meaning: Meaning = field.metadata["meaning"]
            default = "required" if field.default is dataclasses.MISSING else "absent"
            if field.default is not dataclasses.MISSING and field.default is not None:
                default = toml_value(field.default)
            yield name, field.name, default, meaning.limit, meaning.says
