"""`confide site ledger …`: read the ledger, verify it, export it, go on after a loss, and renew a budget."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from confide.client.opening import SITE_DIR, AsJson, NoPassphrase, PassphraseFile, SiteDir, opened, passphrase
from confide.client.signing import (
    KeyFile,
    KeyPassphraseFile,
    NoKeyPassphrase,
    SignsAs,
    person_here,
    reason_given,
    signer,
)
from confide.client.terminal import facts, left, paragraphs, print_json, sentence, spent, table
from confide.common.errors import ConfideError, LedgerError, UsageError
from confide.common.wording import command, ended, plain, several

if TYPE_CHECKING:
    from confide.client.home import Home
    from confide.client.seen import Seen
    from confide.common.ledger import Account, Book

_KEY = re.compile(r"[0-9a-fA-F]{64}")

app = typer.Typer(help="Show, verify and export the ledger, recover a lost one, renew a budget.")

Export = Annotated[
    Path | None,
    typer.Argument(help="An exported ledger; the site's own if absent.", metavar="EXPORT", show_default=False),
]
Witnesses = Annotated[
    list[Path] | None,
    typer.Option(
        "--witness",
        help="What others saw of the ledger: a witness's file, or a checkpoint as a note or in short. May be repeated.",
        metavar="FILE",
        show_default=False,
    ),
]
By = Annotated[str | None, typer.Option("--as", help="Who says so; this machine's user if absent.", metavar="NAME")]


@app.command(epilog="Example: confide site ledger show --last 20")
def show(
    kind: Annotated[
        str | None, typer.Option(help="Records of this kind only, such as reserve or approve.", metavar="KIND")
    ] = None,
    last: Annotated[int | None, typer.Option(help="So many of the newest only.", min=1, metavar="N")] = None,
    site: SiteDir = SITE_DIR,
    as_json: AsJson = False,
) -> None:
    """Show the site's ledger, a line for each record, after all of it was verified. No passphrase is needed."""
    from confide.client.home import Home
    from confide.client.journal import Journal
    from confide.client.record_line import record_line
    from confide.common.entries import KINDS, decode, utc_text

    if kind is not None and kind not in KINDS:
        raise UsageError(f"There is no kind of record {kind!r}. Known are: {', '.join(KINDS)}.")
    home = Home.open(site)
    book, lines = Journal.look_through(home.ledger)
    chosen = [line for line in lines if kind is None or json.loads(line)["kind"] == kind]
    chosen = chosen if last is None else chosen[-last:]
    if as_json:
        print_json(ledger=book.ledger, site=book.site, size=book.size, records=[json.loads(line) for line in chosen])
        return
    stamped = [decode(line) for line in chosen]
    table(
        ("no.", "time (UTC)", "kind", "what"),
        [
            (
                str(each.seq),
                utc_text(each.at).replace("T", " ").removesuffix("Z"),
                each.entry.kind,
                record_line(each.entry),
            )
            for each in stamped
        ],
        numbers=("no.",),
    )
    typer.echo(f"{len(chosen)} of {several(book.size, 'record')}")


@app.command(epilog="Example: confide site ledger verify north.jsonl --key 3b6a27bc…")
def verify(
    export: Export = None,
    witness: Witnesses = None,
    key: Annotated[
        str | None,
        typer.Option(help="The site's key, 64 hexadecimal digits, as you know it by another way.", metavar="HEX"),
    ] = None,
    site: SiteDir = SITE_DIR,
    as_json: AsJson = False,
) -> None:
    """Verify every record of a ledger by its rules, its chain and its signature, and compare what others saw of it.

    An export needs neither a site nor a database. What is wrong is named, and the exit code is 13.
    """
    from confide.client.seen import replayed, seen_in, site_and_ledger

    if key is not None and not _KEY.fullmatch(key):
        raise UsageError(
            f"--key has {len(key)} characters and is no key: 64 hexadecimal digits are. The site shows its own with: confide site key "
            "show"
        )
    if export is None:
        from confide.client.home import Home
        from confide.client.journal import Journal, salvage

        home = Home.open(site)
        Journal.look(home.ledger)  # the tables beside the records too, and the checkpoint
        lines, where, own = salvage(home.ledger), str(home.ledger), _own_witness(home)
    else:
        from confide.common.export import read_export

        lines, checkpoint = read_export(export)
        where, own = str(export), []
    of_site, ledger = site_and_ledger(lines)
    seen = [found for path in [*own, *(witness or [])] for found in seen_in(path, of_site, ledger)]
    book = replayed(lines, seen)
    if export is not None:
        book.agree(checkpoint)
    if key is not None and key.lower() != book.key.hex():
        raise LedgerError(
            f"The ledger {where} is signed by the key {book.key.hex()}, and the site's is said to be {key}. It is another's, or "
            "the site changed its key: ask it for the fingerprint."
        )
    if as_json:
        told = [{"of": found.whose, "file": found.where, "size": found.checkpoint.size} for found in seen]
        print_json(**_tree(book), seen=told)
        return
    _show_whole(book, where, seen, known=export is None or key is not None)


@app.command(epilog="Example: confide site ledger export north.jsonl")
def export(
    file: Annotated[
        Path, typer.Argument(help="Where to write; an older export of this ledger is replaced.", metavar="FILE")
    ],
    site: SiteDir = SITE_DIR,
    passphrase_file: PassphraseFile = None,
    insecure_no_passphrase: NoPassphrase = False,
    as_json: AsJson = False,
) -> None:
    """Write all records and the signed checkpoint to a file that anybody can verify. It holds nothing exact about rows."""
    from confide.common.export import read_export

    with opened(site, passphrase_file, insecure_no_passphrase=insecure_no_passphrase) as vault:
        journal = vault.journal
        if file.exists():
            try:
                older = read_export(file)[1].ledger == journal.book.ledger
            except ConfideError:
                older = False
            if not older:
                raise UsageError(
                    f"{file} exists and is no export of this ledger. It is left as it is; give another FILE."
                )
        journal.export(file)
        book = journal.book
    if as_json:
        print_json(file=str(file), ledger=book.ledger, size=book.size, root=book.root.hex())
        return
    sentence(f"Wrote {several(book.size, 'record')} to {ended(str(file))}")
    typer.echo(f"Anybody can verify it: {command('confide', 'site', 'ledger', 'verify', file)}")


@app.command(epilog='Example: confide site ledger recover north.jsonl --reason "The disk failed."')
def recover(
    source: Annotated[
        Path | None,
        typer.Argument(
            help="An export, or an earlier copy of the ledger; what can be read of the damaged one if absent.",
            metavar="EXPORT",
            show_default=False,
        ),
    ] = None,
    reason: Annotated[str, typer.Option(help="What happened, for the ledger.", metavar="TEXT")] = "",
    by: By = None,
    witness: Witnesses = None,
    old_copy: Annotated[
        bool, typer.Option("--old-copy", help="The ledger is whole, but others saw more of it than it holds.")
    ] = False,
    nothing_left: Annotated[
        bool, typer.Option("--nothing-left", help="No record can be had any more: begin a new ledger.")
    ] = False,
    site: SiteDir = SITE_DIR,
    passphrase_file: PassphraseFile = None,
    insecure_no_passphrase: NoPassphrase = False,
    as_json: AsJson = False,
) -> None:
    """Go on after the ledger was lost or damaged. Every budget then counts as spent until it is renewed.

    What is at the ledger's place is moved aside, never deleted. All approvals are void, and data are registered again.
    """
    from confide.client.home import Home
    from confide.client.judgement import enforced
    from confide.client.recovery import check_needed, go_on, identity_after, records
    from confide.client.seen import seen_in, site_and_ledger

    if not reason.strip():
        raise UsageError('A recovery needs a reason, for the ledger, such as: --reason "The disk failed."')
    why = reason_given(reason)
    if nothing_left and source is not None:
        raise UsageError(f"{source} is given, and --nothing-left. Leave one of them out.")
    home = Home.open(site)
    with home.lock():
        check_needed(home, old_copy=old_copy)
        lines, checkpoint = ([], None) if nothing_left else records(home, source)
        secret = b"" if insecure_no_passphrase else passphrase(passphrase_file, f"Passphrase of {home.site}'s keys: ")
        identity, rotations = identity_after(
            home, lines, secret, source=source, insecure_no_passphrase=insecure_no_passphrase
        )
        of_site, ledger = site_and_ledger(lines) if lines else (home.site, "")
        paths = [*_own_witness(home), *(witness or [])]
        seen = [found.checkpoint for path in paths for found in seen_in(path, of_site, ledger)]
        lost = max(seen, key=lambda each: each.size, default=None)
        journal, aside = go_on(
            home,
            lines,
            identity,
            reason=why,
            by=person_here(by),
            checkpoint=checkpoint,
            lost=lost,
            rotations=rotations,
        )
        try:
            if journal.book.policy is None:
                enforced(home, journal)
            book = journal.book
        finally:
            journal.close()
    if as_json:
        print_json(
            ledger=book.ledger,
            records=len(lines),
            rotations=len(rotations),
            size=book.size,
            moved_aside=None if aside is None else str(aside),
            data_sets_to_register=sorted(book.lost_data_sets),
            accounts=sorted(book.accounts, key=int),
        )
        return
    sentence(
        f"The ledger goes on with {several(len(lines), 'record')}, and one that says it was recovered."
        if lines
        else "A new ledger begins, and says that one was lost before."
    )
    if rotations:
        sentence(
            f"{several(len(rotations), 'change')} of the site's key since then {'is' if len(rotations) == 1 else 'are'} recorded "
            "again, as both keys signed it."
        )
    if aside is not None:
        sentence(f"What was in its place is kept: {aside}")
    data = ", ".join(sorted(book.lost_data_sets))
    steps = [
        "Every account counts as fully spent. An approver may renew one if the policy allows it: confide site ledger renew",
        f"Register the data again: {data}." if data else "Register the data again: confide site data add",
        "Who withdrew before is known by the files data/*.withdrawn only. If these may be lost too, or older than what was lost, "
        "name again all who ever withdrew, before anything is approved: confide site data withdraw",
        "All approvals are void. Read and approve again what is to run.",
        "Tell the admins of each federation: its server and sites refuse this ledger until they let go of what they saw of the "
        "one before.",
    ]
    paragraphs([("What follows", steps)])


@app.command(epilog='Example: confide site ledger renew 1 --key anna.pem --reason "The admissions of a new year."')
def renew(
    account: Annotated[str, typer.Argument(help="The account's number.", metavar="ACCOUNT")],
    key: KeyFile,
    reason: Annotated[str, typer.Option(help="Why its persons may lose that much again.", metavar="TEXT")],
    signs_as: SignsAs = None,
    key_passphrase_file: KeyPassphraseFile = None,
    insecure_no_key_passphrase: NoKeyPassphrase = False,
    site: SiteDir = SITE_DIR,
    passphrase_file: PassphraseFile = None,
    insecure_no_passphrase: NoPassphrase = False,
    as_json: AsJson = False,
) -> None:
    """Begin an account's next period with its whole budget, if the policy allows it, signed by an approver.

    What its persons lost before stays lost: the sum over all periods is shown beside it.
    """
    from confide.client.approval import approver_name
    from confide.common.entries import Renewal

    why = reason_given(reason)
    with opened(site, passphrase_file, insecure_no_passphrase=insecure_no_passphrase) as vault:
        policy, book = vault.policy(), vault.journal.book
        if account not in book.accounts:
            raise UsageError(f"There is no account {account!r}. Open are: {', '.join(book.accounts) or 'none'}.")
        person = signer(key, key_passphrase_file, signs_as, insecure_no_passphrase=insecure_no_key_passphrase)
        renewal = Renewal(
            ledger=book.ledger,
            recovery=book.recovery,
            account=account,
            period=book.accounts[account].period + 1,
            reason=why,
            by=approver_name(policy, person.identity.public.hex()),
            key=person.identity.public.hex(),
        )
        vault.journal.append(renewal.signed(person.identity))
        renewed = book.accounts[account]
    if as_json:
        print_json(**_account_tree(renewed), by=renewal.by)
        return
    sentence(
        f"{renewal.by} renewed account {account}: its period {renewed.period} begins with epsilon = {renewed.filter.epsilon:g} at "
        f"delta = {renewed.filter.delta:g}. Over all periods its persons have lost {spent(renewed.total)}."
    )


@app.command(
    epilog='Example: confide site ledger forget rehearsal south --reason "Its disk failed; Dr. Huber and we agreed."'
)
def forget(
    federation: Annotated[str, typer.Argument(help="The federation's name.", metavar="FEDERATION")],
    peer: Annotated[str, typer.Argument(help="The site whose ledger was lost.", metavar="SITE")],
    reason: Annotated[str, typer.Option(help="How it was lost, and who agreed; it is kept.", metavar="TEXT")],
    site: SiteDir = SITE_DIR,
    as_json: AsJson = False,
) -> None:
    """Let another site of a federation go on, whose ledger was lost and recovered; else this site refuses it.

    What it shows next is accepted if it signed it. So let it recover first, which counts all its budgets as spent, and hear of
    it from its people. No agent may run meanwhile.
    """
    from confide.client.home import Home
    from confide.common.witness import MOST_REASON, Witness

    why = reason_given(reason, most=MOST_REASON)
    home = Home.open(site)
    with home.lock():
        last = Witness(home.witness).forget(federation, peer, why)
    if as_json:
        print_json(federation=federation, site=peer, records=last.size, reason=why)
        return
    sentence(
        f"Whatever ledger {peer} of {federation} shows next is accepted. The last one seen had {several(last.size, 'record')}."
    )


def _show_whole(book: "Book", where: str, seen: "Sequence[Seen]", *, known: bool) -> None:
    from confide.client.keys import fingerprint
    from confide.common.entries import utc_text

    typer.secho(
        f"The ledger of {plain(book.site)} is whole: {several(book.size, 'record')}, each by the rules.", bold=True
    )
    facts(
        [
            ("in", where),
            ("ledger", book.ledger),
            ("root", book.root.hex()),
            ("signed by", book.key.hex()),
            ("fingerprint", fingerprint(book.key)),
            ("last record", utc_text(book.at)),
            ("recovered", "never" if not book.recoveries else several(book.recoveries, "time")),
        ]
    )
    if not known:
        typer.echo()
        sentence("Compare the key with the one that you know of this site, such as on a roster, or give it with --key.")
    if book.accounts:
        typer.echo()
        _show_accounts(book.accounts)
    if seen:
        typer.echo()
        table(
            ("seen elsewhere, and agrees", "records", "file"),
            [(found.whose, str(found.checkpoint.size), found.where) for found in seen],
            numbers=("records",),
        )


def _show_accounts(accounts: "Mapping[str, Account]") -> None:
    rows = [
        (
            f"{account.account}{' *' if account.incomplete else ''}",
            str(account.period),
            f"{account.filter.epsilon:g}",
            f"{account.filter.delta:g}",
            spent(account.used),
            left(account.left),
            spent(account.total),
        )
        for account in accounts.values()
    ]
    numbers = ("period", "epsilon", "delta", "used", "left", "in all periods")
    table(("account", *numbers), rows, numbers=numbers)
    for account in accounts.values():
        if not account.used:
            sentence(
                f"Nothing of account {account.account} is used in this period. The first spend takes "
                f"{spent(account.filter.epsilon - account.filter.room)} beside its own cost, once, for the counting."
            )
    if any(account.incomplete for account in accounts.values()):
        sentence("* A ledger was lost: more may have been spent than is counted here.")


def _own_witness(home: "Home") -> list[Path]:
    """Return the file in which the site itself notes how far ledgers had come, if there is one."""
    return [home.witness] if home.witness.exists() else []


def _tree(book: "Book") -> dict[str, object]:
    return {
        "site": book.site,
        "ledger": book.ledger,
        "size": book.size,
        "root": book.root.hex(),
        "key": book.key.hex(),
        "recoveries": book.recoveries,
        "accounts": [_account_tree(account) for account in book.accounts.values()],
    }


def _account_tree(account: "Account") -> dict[str, object]:
    return {
        "account": account.account,
        "period": account.period,
        "epsilon": account.filter.epsilon,
        "delta": account.filter.delta,
        "used": account.used,
        "left": account.left,
        "total": account.total,
        "incomplete": account.incomplete,
    }
