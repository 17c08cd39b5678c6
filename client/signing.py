"""How a command gets the key of a person who approves: the options that name it, and her own passphrase."""

import getpass
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from confide.common.errors import UsageError

MOST_REASON: Final = 2000  # as in the ledger

if TYPE_CHECKING:
    from confide.client.keys import Approver

KeyFile = Annotated[Path, typer.Option("--key", help="The key file of the person who signs.", metavar="FILE")]
SignsAs = Annotated[str | None, typer.Option("--as", help="Who signs; the key must be this person's.", metavar="NAME")]
KeyPassphraseFile = Annotated[
    Path | None,
    typer.Option(
        help="A file, mode 0600, with the passphrase of the person's key. Else it is asked for.", metavar="FILE"
    ),
]
NoKeyPassphrase = Annotated[
    bool, typer.Option("--insecure-no-key-passphrase", help="The person's key file is not encrypted.")
]


def person_here(name: str | None) -> str:
    """Return the name under which somebody at this machine is recorded: the one given, else the user's."""
    if name:
        return name
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name
        return f"user {os.getuid()}"


def reason_given(reason: str, *, flag: str = "--reason", most: int = MOST_REASON) -> str:
    """Return a reason as it is recorded, without white space around it; ask for it before any key is opened.

    Args:
        reason: What was typed.
        flag: The option that it was typed for.
        most: How many characters it may have.

    Raises:
        UsageError: It is empty, too long, or not on one line of printable characters.
    """
    told = reason.strip()
    if 1 <= len(told) <= most and told.isprintable():
        return told
    found = "holds a line break or another character that cannot be printed" if told and not told.isprintable() else ""
    raise UsageError(
        f"{flag} {found or f'has {len(told)} characters'}; a reason has 1 to {most} printable characters, on one line. Say in a "
        "sentence or two why."
    )


def signer(key: Path, passphrase_file: Path | None, name: str | None, *, insecure_no_passphrase: bool) -> "Approver":
    """Return the person whose key is in the file `key`.

    The site's passphrase does not stand in for hers: none is taken from the environment.

    Args:
        key: The person's key file.
        passphrase_file: Holds its passphrase; it is asked for if that is absent and somebody sits at the terminal.
        name: Whose key it must be; None if any person's will do.
        insecure_no_passphrase: The file is not encrypted.

    Raises:
        UsageError: The key is another person's, a file is missing or too open, or no passphrase is given.
        SealError: The passphrase is another.
    """
    from confide.client.keys import approver_in_file, load_approver, passphrase_from

    whose, _ = approver_in_file(key)
    if name is not None and name != whose:
        raise UsageError(f"The key in {key} belongs to {whose!r}, not to {name!r}. Give the person's own key file.")
    if insecure_no_passphrase:
        return load_approver(key, b"", insecure_no_passphrase=True)
    if passphrase_file is None and not sys.stdin.isatty():
        raise UsageError(
            f"No passphrase of {whose}'s key is given. Name a file that holds it, mode 0600, with --key-passphrase-file."
        )
    secret = passphrase_from(
        passphrase_file, environment={}, ask=lambda: getpass.getpass(f"Passphrase of {whose}'s key: ")
    )
    return load_approver(key, secret)
