"""`confide site …`: what a steward does with a site: make it, join a federation, run its agent, watch it, see what it spent."""

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from confide.client import consent_cli, data_cli, key_cli, ledger_cli, standing_cli
from confide.client.opening import (
    AGENT_WAIT_S,
    SITE_DIR,
    AsJson,
    NoPassphrase,
    PassphraseFile,
    SiteDir,
    opened,
    passphrase,
)
from confide.client.running import call_agent
from confide.client.terminal import facts, sentence, table
from confide.common.cli import quiet_libraries
from confide.common.errors import MessageError, Refused, UsageError
from confide.common.wording import command, ended, plain, several

if TYPE_CHECKING:
    from confide.common.ledger import Book

app = typer.Typer()
app.add_typer(standing_cli.app)
app.add_typer(consent_cli.plan_app, name="plan", no_args_is_help=True)
app.add_typer(consent_cli.policy_app, name="policy", no_args_is_help=True)
app.add_typer(data_cli.app, name="data", no_args_is_help=True)
app.add_typer(ledger_cli.app, name="ledger", no_args_is_help=True)
app.add_typer(key_cli.app, name="key", no_args_is_help=True)

ModelDir = Annotated[Path, typer.Option("--model", help="The base model's local directory.", metavar="DIR")]

_KEY = re.compile(r"[0-9a-fA-F]{64}")


@app.command(epilog="Example: confide site init north --site /srv/confide/north")
def init(
    name: Annotated[str, typer.Argument(help="The site's name, as it will stand on rosters.", metavar="NAME")],
    site: SiteDir = SITE_DIR,
    postman_group: Annotated[
        str | None,
        typer.Option(help="The group of whoever carries messages, if that is another user.", metavar="GROUP"),
    ] = None,
    passphrase_file: PassphraseFile = None,
    insecure_no_passphrase: NoPassphrase = False,
    as_json: AsJson = False,
) -> None:
    """Make a new site: its directory, its keys, its ledger, and a policy that allows nothing yet."""
    from confide.client.home import Home, write_private
    from confide.client.journal import Journal
    from confide.client.keys import fingerprint, make_keys
    from confide.client.policy import starter
    from confide.common.crypto import Identity, key_to_file

    group = _group(postman_group)
    Home.check_new(site, name)
    secret = b"" if insecure_no_passphrase else passphrase(passphrase_file, "A new passphrase: ", twice=True)
    # A passphrase that does not do is found out before anything is made.
    key_to_file(Identity.generate(), secret, insecure_no_passphrase=insecure_no_passphrase)
    home = Home.create(site, name, postman_group=group)
    keys = make_keys(home, secret, insecure_no_passphrase=insecure_no_passphrase)
    journal = Journal.create(home.ledger, site=name, identity=keys.identity)
    ledger = journal.book.ledger
    journal.close()
    write_private(home.policy, starter(name).encode())
    public = keys.identity.public
    if as_json:
        told = {"site": name, "directory": str(home.root), "key": public.hex(), "fingerprint": fingerprint(public)}
        typer.echo(json.dumps({"status": "ok", **told, "ledger": ledger, "words": list(keys.words)}))
        return
    where = () if site == SITE_DIR else ("--site", site)
    sentence(f"The site {name} is in {ended(str(site))}")
    facts([("key", public.hex()), ("fingerprint", fingerprint(public)), ("ledger", ledger)])
    sentence(
        "Whoever puts this site on a roster needs the key, and compares the fingerprint with you by telephone. Keep a copy of "
        f"{home.keys} and of the passphrase in another place: without them nothing here can be opened again."
    )
    if keys.words:
        sentence("The keys are not encrypted: whoever reads the disk can speak for this site.")
    typer.echo("Next:")
    typer.echo('  1. make a key for each person who may approve plans: confide site key approver "NAME" --out FILE')
    typer.echo(f"  2. edit {site / 'policy.toml'}, then: {command('confide', 'site', 'policy', 'check', *where)}")
    join = command("confide", "site", "join", "ROSTER", "--admin", "KEY", *where)
    typer.echo(f"  3. with the federation's roster: {join}")


@app.command(epilog="Example: confide site join roster.json --admin 9ab3…")
def join(
    roster: Annotated[Path, typer.Argument(help="The federation's roster, signed by its admins.", metavar="ROSTER")],
    admin: Annotated[
        list[str] | None,
        typer.Option(
            help="An admin's key, 64 hexadecimal digits; once for each admin. Not needed for a newer roster.",
            metavar="KEY",
        ),
    ] = None,
    fingerprint: Annotated[
        list[str] | None,
        typer.Option(
            help="An admin's fingerprint as that person told it to you, in the order of the keys. Else you are asked.",
            metavar="DIGITS",
        ),
    ] = None,
    site: SiteDir = SITE_DIR,
    passphrase_file: PassphraseFile = None,
    insecure_no_passphrase: NoPassphrase = False,
    as_json: AsJson = False,
) -> None:
    """Join a federation by pinning its admins' keys; or, in one that the site belongs to, take up a newer roster."""
    from confide.client import enrolment
    from confide.client.keys import fingerprint as fingerprint_of
    from confide.common.roster import read_roster

    admins = tuple(map(_key, admin or ()))
    raw = _read(roster)
    if fingerprint and not admins:
        raise UsageError("--fingerprint is of a key that is given with --admin. Give both, or neither.")
    with opened(site, passphrase_file, insecure_no_passphrase=insecure_no_passphrase) as vault:
        home = vault.home
        if admins:
            federation = read_roster(raw, admins).federation
            told = fingerprint or _compared(admins, as_json=as_json)
            found = enrolment.join(home, federation, admins, raw, fingerprints=told)
        else:
            federation = _federation_in(raw)
            found = enrolment.update(home, federation, raw)
        entry = enrolment.federation_entry(home, federation)
        if vault.journal.book.federations.get(federation) != entry:
            vault.journal.append(entry)
    marks = [fingerprint_of(bytes.fromhex(key)) for key in entry.admins]
    coordinator = fingerprint_of(found.coordinator)
    if as_json:
        seen = {
            "federation": federation,
            "epoch": found.epoch,
            "sites": sorted(found.sites),
            "admins": list(entry.admins),
        }
        typer.echo(json.dumps({"status": "ok", **seen, "fingerprints": marks, "coordinator": coordinator}))
        return
    typer.echo(f"{plain(home.site)} belongs to the federation {plain(federation)}, epoch {found.epoch}.")
    facts(
        [
            ("sites", ", ".join(sorted(found.sites))),
            *(("admin", mark) for mark in marks),
            ("coordinator", coordinator),
        ]
    )
    sentence("These are fingerprints. The admins vouch for the coordinator and for every site; nobody else does.")
    typer.echo(
        f"Next: name {federation!r} in [federation] federations of the policy, if its plans are to be judged at all."
    )


@app.command(epilog="Example: confide site agent spring --data letters --model ./MiniLM")
def agent(
    plan: Annotated[
        str, typer.Argument(help="A plan signed by its coordinator; or a run whose plan was shown.", metavar="PLAN")
    ],
    model: ModelDir,
    data: Annotated[
        str | None, typer.Option(help="The data set; not needed if the run is approved for one only.", metavar="NAME")
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(help="The group whose members may bring messages, beside this user.", metavar="GROUP"),
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            help="Serve metrics for Prometheus at this port of this machine; 0 takes a free one.", min=0, max=65535
        ),
    ] = None,
    site: SiteDir = SITE_DIR,
    passphrase_file: PassphraseFile = None,
    insecure_no_passphrase: NoPassphrase = False,
) -> None:
    """Run the site's agent for one plan until it is stopped: by Ctrl-C, by SIGTERM, or by `confide site stop`."""
    from confide.client.received import keep, receive
    from confide.client.running import ended_by_signals, metrics_page, told
    from confide.client.worker import Assignment, Worker

    members = _group(group)
    with (
        opened(site, passphrase_file, insecure_no_passphrase=insecure_no_passphrase, wait_s=AGENT_WAIT_S) as vault,
        vault.home.lock(),
    ):
        home = vault.home
        home.check()
        received = receive(home, plan)
        keep(home, received)
        signed = received.signed
        chosen = data or _data_of(vault.journal.book, signed.digest, signed.run)
        worker = Worker(
            home,
            vault.keys,
            vault.journal,
            Assignment(signed=signed, data=chosen, model=model.resolve()),
            group=members,
        )
        with told(worker), ended_by_signals(worker):
            if metrics_port is None:
                worker.serve()
                return
            with metrics_page(worker, home, vault.keys, metrics_port):
                worker.serve()


@app.command(epilog="Example: confide site stop")
def stop(
    wait: Annotated[
        float, typer.Option(help="For how many seconds to wait until it has ended.", min=0, max=86_400)
    ] = 60.0,
    site: SiteDir = SITE_DIR,
    as_json: AsJson = False,
) -> None:
    """Stop the agent. A round under way is given up; steps of it that had not begun are not counted."""
    from confide.client.home import Home

    home = Home.open(site)
    call_agent(home, "stop")
    deadline = time.monotonic() + wait
    while (running := home.control_socket.exists()) and time.monotonic() < deadline:
        time.sleep(0.05)
    if as_json:
        typer.echo(json.dumps({"status": "ok", "stopped": not running}))
        return
    if running:
        sentence("It was told to stop, and has not ended yet. While it loads rows it ends when they are loaded.")
    else:
        typer.echo("The agent has stopped.")


@app.command(epilog="Example: confide site evaluate ./v3 --held-out held-out.csv --model ./MiniLM --data letters")
def evaluate(
    adapter: Annotated[Path, typer.Argument(help="The federated adapter's directory.", metavar="ADAPTER")],
    held_out: Annotated[
        Path, typer.Option(help="A table in the plan's form, of persons not registered here.", metavar="FILE")
    ],
    model: ModelDir,
    data: Annotated[str, typer.Option(help="The data set that an adapter of your own learns from.", metavar="NAME")],
    own: Annotated[
        Path | None, typer.Option(help="An adapter of your own; if absent one is trained, once.", metavar="DIR")
    ] = None,
    run: Annotated[
        str,
        typer.Option(help="The run the adapter came from; only where the plan's method is share-a.", metavar="NAME"),
    ] = "",
    site: SiteDir = SITE_DIR,
    passphrase_file: PassphraseFile = None,
    insecure_no_passphrase: NoPassphrase = False,
    as_json: AsJson = False,
) -> None:
    """Compare the federated adapter with one of the site's own, on rows that neither learned from. Nothing leaves."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    quiet_libraries()
    from confide.client.judging import FEDERATED, OWN, UNTRAINED, judge

    progress = Progress(
        TextColumn("training an adapter of the site's own"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True, highlight=False, markup=False),
        disable=as_json,
        transient=True,
    )
    with opened(site, passphrase_file, insecure_no_passphrase=insecure_no_passphrase) as vault, progress:
        bars: list[Any] = []

        def told(done: int, total: int) -> None:
            if not bars:
                bars.append(progress.add_task("", total=total))
            progress.update(bars[0], completed=done)

        found = judge(vault, adapter, held_out=held_out, model=model.resolve(), data=data, own=own, run=run, told=told)
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "status": "ok",
                    "score": found.score,
                    "rows": found.rows,
                    "skipped": dict(found.skipped),
                    "registered": found.registered,
                    "scores": {name: dict(scores) for name, scores in found.scores.items()},
                    "own": str(found.own),
                    "trained": found.trained,
                }
            )
        )
        return
    names = list(dict.fromkeys((found.score, *found.scores[FEDERATED])))
    named = {UNTRAINED: "untrained", OWN: "the site's own", FEDERATED: "federated"}
    rows = [(says, *(f"{found.scores[name][score]:.4f}" for score in names)) for name, says in named.items()]
    table(("", *names), rows, numbers=names)
    skipped = "".join(f", {count} skipped ({reason})" for reason, count in found.skipped.items())
    typer.echo(f"{several(found.rows, 'row')}{skipped}.")
    if found.registered:
        sentence(
            f"{several(found.registered, 'row')} left out: their persons are registered here, so they may have been learned from."
        )
    how = (
        f"It was trained now, by the plan's steps and with its noise, and is in {found.own}."
        if found.trained
        else f"It is in {found.own}."
    )
    sentence(
        f"{how} It never leaves the site, so no budget is charged for it. Keep it, and these exact numbers, out of whatever "
        "you send."
    )


def _group(name: str | None) -> int | None:
    """Return the number of a group that is given by name or number."""
    import grp

    if name is None:
        return None
    try:
        return int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
    except KeyError:
        raise UsageError(f"There is no group {name!r} on this machine. Make it, or give another.") from None


def _key(text: str) -> bytes:
    if not _KEY.fullmatch(text):
        raise UsageError(f"--admin {text[:20]}… is not a key of 64 hexadecimal digits. Ask the admin for it.")
    return bytes.fromhex(text)


def _compared(admins: tuple[bytes, ...], *, as_json: bool) -> list[str]:
    """Return the admins' fingerprints, once the steward says that they are what the admins told."""
    import sys

    from confide.client.keys import fingerprint

    if as_json or not sys.stdin.isatty():
        raise UsageError(
            "Nobody is here to compare fingerprints. Give each admin's, as that person told it to you, with --fingerprint."
        )
    marks = [fingerprint(admin) for admin in admins]
    typer.echo("These are the fingerprints of the admins' keys:")
    for mark in marks:
        typer.echo(f"  {mark}")
    if not typer.confirm("Did each admin tell you the same, by telephone or face to face?"):
        raise UsageError(
            "Nothing was joined. Ask the admins for their fingerprints, on a way that the sender of the keys does not control."
        )
    return marks


def _federation_in(raw: bytes) -> str:
    """Return whose roster it says that it is; who signed it is checked later."""
    try:
        name = json.loads(raw)["roster"]["federation"]
    except (ValueError, KeyError, TypeError, RecursionError):
        name = None
    if not isinstance(name, str):
        raise MessageError("The file is not a roster. Ask the federation's admins for the one that they signed.")
    return name


def _data_of(book: "Book", plan: str, run: str) -> str:
    """Return the one data set that a plan's run was approved for."""
    approvals = (standing.approval for standing in book.approvals if not standing.revoked)
    found = sorted({approval.data for approval in approvals if (approval.plan, approval.run) == (plan, run)})
    if not found:
        raise Refused(
            f"The run {run!r} of this plan is not approved. Read it and approve it: confide site plan approve",
            "approval",
        )
    if len(found) > 1:
        raise UsageError(f"The run {run!r} was approved for {', '.join(found)}. Name the one it is to use with --data.")
    return found[0]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror or error}. Check the path.") from None
