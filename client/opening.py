"""How a command opens a site: its directory, its keys, its ledger, and the options by which it is told where these are."""

import dataclasses
import getpass
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from confide.common.errors import UsageError

# What a command only needs once it runs is imported then, so that --help is there at once.
if TYPE_CHECKING:
    from confide.client.home import Home
    from confide.client.journal import Journal
    from confide.client.keys import Keys
    from confide.client.policy import Policy
    from confide.client.registry import Registry
    from confide.common.plan import Plan

SITE: Final = "CONFIDE_SITE"
SITE_DIR: Final = Path("site")
WAIT_S: Final = 10.0
AGENT_WAIT_S: Final = 600.0
_SIGNED: Final = b"confide-signed-plan/"  # how such a file begins, whatever its version

SiteDir = Annotated[Path, typer.Option("--site", envvar=SITE, help="The site's directory.", metavar="DIR")]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(
        help="A file, mode 0600, with the passphrase of the key; CONFIDE_PASSPHRASE_FILE names one too. Else it is asked for.",
        metavar="FILE",
    ),
]
NoPassphrase = Annotated[bool, typer.Option("--insecure-no-passphrase", help="The key's file is not encrypted.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A site whose keys and ledger are at hand.

    Attributes:
        home: Its directory.
        keys: Its keys.
        journal: Its ledger.
        registry: Its data sets.
    """

    home: "Home"
    keys: "Keys"
    journal: "Journal"
    registry: "Registry"

    def policy(self) -> "Policy":
        """Return the policy on disk, once the ledger says that it is in force."""
        from confide.client.judgement import enforced

        return enforced(self.home, self.journal)


@contextmanager
def opened(
    site: Path, passphrase_file: Path | None, *, insecure_no_passphrase: bool, wait_s: float = WAIT_S
) -> Iterator[Opened]:
    """Give the site in a directory with its keys and ledger; afterwards the ledger is closed.

    Args:
        site: The directory.
        passphrase_file: A file with the passphrase of the keys; None has it asked for.
        insecure_no_passphrase: Whether the keys are not encrypted.
        wait_s: How long to wait for another process that writes to the ledger. Who sits at a terminal rather hears after
            WAIT_S that it is busy. An agent waits AGENT_WAIT_S: registering a table of some hundred thousand persons holds
            the ledger for tens of seconds, and a round that was trained, and paid, must not be lost for it.

    Raises:
        UsageError: There is no site, something in it is too open, or no passphrase is given.
        SealError: The passphrase is another.
        LedgerError: The ledger is missing or cannot be relied on.
    """
    from confide.client.home import Home
    from confide.client.journal import Journal
    from confide.client.keys import load_keys
    from confide.client.registry import Registry

    home = Home.open(site)
    secret = b"" if insecure_no_passphrase else passphrase(passphrase_file, f"Passphrase of {home.site}'s keys: ")
    keys = load_keys(home, secret, insecure_no_passphrase=insecure_no_passphrase)
    journal = Journal.open(home.ledger, identity=keys.identity, wait_s=wait_s)
    try:
        registry = Registry(home.data, journal, keys.secret(b"data"))
        yield Opened(home=home, keys=keys, journal=journal, registry=registry)
    finally:
        journal.close()


def passphrase(file: Path | None, prompt: str, *, twice: bool = False) -> bytes:
    """Return a passphrase from a file, from the file that the environment names, or from whoever sits at the terminal.

    Raises:
        UsageError: None is given and nobody sits there, or what was typed twice differs.
    """
    from confide.client.keys import passphrase_from

    def ask() -> str:
        typed = getpass.getpass(prompt)
        if twice and getpass.getpass("Again: ") != typed:
            raise UsageError("The two passphrases differ. Type the same one twice.")
        return typed

    return passphrase_from(file, ask=ask if sys.stdin.isatty() else None)


def plan_at(file_or_run: Path | str, home: "Home | None" = None) -> "Plan":
    """Return the plan in a file, signed or not, or the one that is kept for a run.

    Args:
        file_or_run: A path; or, at a site, the name of a run whose plan was shown before.
        home: The site's directory, if there is one: it knows whose a signature must be, and that is checked then.

    Raises:
        UsageError: There is neither such a file nor such a run, or the site belongs to no federation.
        PlanError: It is not a valid plan.
        Refused: No coordinator of the site's federations signed it.
        MessageError: It is damaged.
    """
    from confide.client.received import receive
    from confide.common.plan import load_plan, read_plan

    path = Path(file_or_run)
    if not path.is_file():
        if home is not None and path.suffix != ".toml":
            return receive(home, str(file_or_run)).signed.plan
    elif (raw := path.read_bytes()).startswith(_SIGNED):
        return read_plan(raw.split(b"\n", 2)[-1]) if home is None else receive(home, str(path)).signed.plan
    return load_plan(path)
