"""`confide site key …`: show the site's key, change it, make keys for those who approve, change the passphrase."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from confide.client.opening import SITE_DIR, AsJson, NoPassphrase, PassphraseFile, SiteDir, passphrase
from confide.client.signing import KeyPassphraseFile, NoKeyPassphrase
from confide.client.terminal import facts, paragraphs, print_json, sentence
from confide.common.errors import UsageError
from confide.common.wording import ended

if TYPE_CHECKING:
    from confide.client.home import Home

app = typer.Typer(help="Show and change the site's key and its passphrase, and make keys for those who approve.")


@app.command(epilog="Example: confide site key show")
def show(site: SiteDir = SITE_DIR, as_json: AsJson = False) -> None:
    """Show the public key by which others know the site, and its fingerprint. No passphrase is needed."""
    from confide.client.home import Home
    from confide.client.keys import fingerprint

    home = Home.open(site)
    key, pending = _public_keys(home)
    if as_json:
        print_json(
            site=home.site,
            key=key.hex(),
            fingerprint=fingerprint(key),
            pending=None if pending is None else pending.hex(),
        )
        return
    facts([("site", home.site), ("key", key.hex()), ("fingerprint", fingerprint(key))])
    if pending is not None:
        facts([("pending", fingerprint(pending))])
        sentence("A change of keys was interrupted. Complete it: confide site key rotate")


@app.command(epilog="Example: confide site key rotate")
def rotate(
    site: SiteDir = SITE_DIR,
    passphrase_file: PassphraseFile = None,
    insecure_no_passphrase: NoPassphrase = False,
    as_json: AsJson = False,
) -> None:
    """Change the site's key: old and new both sign that one follows the other, and the ledger records it.

    Until the federation's admins sign a roster with the new key the site sits out. So change it between runs, unless the
    old one was stolen. A change that was interrupted is completed.
    """
    from confide.client.home import Home
    from confide.client.journal import Journal
    from confide.client.keys import complete_rotation, fingerprint, load_keys, public_identity
    from confide.client.keys import rotate as make_next

    home = Home.open(site)
    with home.lock():
        secret = b"" if insecure_no_passphrase else passphrase(passphrase_file, f"Passphrase of {home.site}'s keys: ")
        keys = load_keys(home, secret, insecure_no_passphrase=insecure_no_passphrase)
        old = keys.identity.public
        journal = Journal.open(home.ledger, identity=keys.identity)
        try:
            if old == public_identity(home):  # else the ledger has the new one already
                new, _ = make_next(
                    home, secret, journal.book.ledger, in_force=old, insecure_no_passphrase=insecure_no_passphrase
                )
                journal.rotate(new)
            now = journal.book.key
        finally:
            journal.close()
        complete_rotation(home, now)
    if as_json:
        print_json(site=home.site, old=old.hex(), key=now.hex(), fingerprint=fingerprint(now))
        return
    sentence(
        "The site's key was changed." if old != now else "A change of the site's key that was interrupted is complete."
    )
    facts([("site", home.site), ("key", now.hex()), ("fingerprint", fingerprint(now))])
    paragraphs(
        [
            (
                "What follows",
                [
                    "Tell the admins of each federation this fingerprint, and ask for a roster with the new key. Until then the "
                    "site takes part in no round.",
                    "Back up the directory of keys anew: the backup from before cannot open the ledger any more.",
                    "Write a new export of the ledger: confide site ledger export FILE",
                ],
            )
        ]
    )


@app.command(epilog='Example: confide site key approver "Anna Huber" --out anna.pem')
def approver(
    name: Annotated[str, typer.Argument(help="The person's name, as the policy is to have it.", metavar="NAME")],
    out: Annotated[Path, typer.Option(help="The new key file; nothing may be there.", metavar="FILE")],
    key_passphrase_file: KeyPassphraseFile = None,
    insecure_no_key_passphrase: NoKeyPassphrase = False,
    as_json: AsJson = False,
) -> None:
    """Make a key for a person who approves plans, and print the entry that the policy needs. It needs no site.

    The passphrase is the person's own: let her type it, and keep the file where only she can use it.
    """
    import getpass
    import sys

    from confide.client.keys import fingerprint, make_approver, passphrase_from
    from confide.client.policy import approver_entry
    from confide.common.settings import toml_value

    approver_entry(name, bytes(32))  # a name that the policy would refuse is told before a key is made

    def ask() -> str:
        typed = getpass.getpass(f"New passphrase of {name}'s key: ")
        if getpass.getpass("Again: ") != typed:
            raise UsageError("The two passphrases differ. Type the same one twice.")
        return typed

    secret = b""
    if not insecure_no_key_passphrase:
        asked = ask if sys.stdin.isatty() else None
        if key_passphrase_file is None and asked is None:
            raise UsageError(
                "No passphrase for the new key is given. Name a file that holds it, mode 0600, with --key-passphrase-file."
            )
        secret = passphrase_from(key_passphrase_file, environment={}, ask=asked)
    made = make_approver(out, name, secret, insecure_no_passphrase=insecure_no_key_passphrase)
    public = made.identity.public
    entry = approver_entry(name, public)
    if as_json:
        print_json(name=name, key=public.hex(), fingerprint=fingerprint(public), file=str(out), policy=entry)
        return
    sentence(f"Wrote {out}, the key of {ended(name)}")
    facts([("key", public.hex()), ("fingerprint", fingerprint(public))])
    typer.echo("\nAdd it to [approval] approvers in the policy:\n")
    typer.echo(f"  {toml_value(entry)},")


@app.command("passphrase", epilog="Example: confide site key passphrase")
def change(
    new_passphrase_file: Annotated[
        Path | None,
        typer.Option(help="A file, mode 0600, with the new passphrase. Else it is asked for.", metavar="FILE"),
    ] = None,
    site: SiteDir = SITE_DIR,
    passphrase_file: PassphraseFile = None,
    insecure_no_passphrase: NoPassphrase = False,
    as_json: AsJson = False,
) -> None:
    """Change the passphrase of all keys of the site. A change that was interrupted is completed."""
    import getpass
    import sys

    from confide.client.home import Home
    from confide.client.keys import change_passphrase, passphrase_from

    home = Home.open(site)

    def ask() -> str:
        typed = getpass.getpass(f"New passphrase of {home.site}'s keys: ")
        if getpass.getpass("Again: ") != typed:
            raise UsageError("The two passphrases differ. Type the same one twice.")
        return typed

    if new_passphrase_file is None and not sys.stdin.isatty():
        raise UsageError(
            "No new passphrase is given. Name a file that holds it, mode 0600, with --new-passphrase-file."
        )
    old = (
        b"" if insecure_no_passphrase else passphrase(passphrase_file, f"Passphrase of {home.site}'s keys until now: ")
    )
    change_passphrase(home, old, passphrase_from(new_passphrase_file, environment={}, ask=ask))
    if as_json:
        print_json(site=home.site, keys=str(home.keys))
        return
    sentence(
        f"All keys in {home.keys} open with the new passphrase, and with it only. Backups open with the old one still: destroy "
        "them if somebody may know it."
    )


def _public_keys(home: "Home") -> tuple[bytes, bytes | None]:
    """Return the public key in force, and that of a change that is not complete, if there is one."""
    from confide.client.home import read_private
    from confide.client.journal import Journal
    from confide.client.keys import public_identity
    from confide.common.crypto import LARGEST_KEY_FILE_BYTES, Identity, public_in_file

    key = public_identity(home)
    if not home.next_identity.exists():
        return key, None
    following = public_in_file(read_private(home.next_identity, LARGEST_KEY_FILE_BYTES), Identity)
    return Journal.look(home.ledger).key, following
