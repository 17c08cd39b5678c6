"""How people are told something on a terminal: text that it cannot obey, commands that a shell takes as they stand."""

import shlex


def plain(text: str) -> str:
    """Return the text with everything that a terminal would obey, such as escape sequences, shown instead."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def command(*words: object) -> str:
    """Return a command to be copied: names and paths with spaces or signs of the shell's own are in quotes."""
    return shlex.join(map(str, words))


def several(count: int, one: str, many: str = "") -> str:
    """Spell a count with its noun: `1 record`, `2 records`."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def ended(text: str) -> str:
    """Return the end of a sentence with its full stop; a name that ends in one, such as `Huber jr.`, gets no second."""
    return text if text.endswith(".") else f"{text}."
