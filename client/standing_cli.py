"""`confide site status`, `watch` and `budget`: what runs, what it cost, what is left. None of them needs a passphrase."""

import contextlib
import dataclasses
import io
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from confide.client.opening import SITE_DIR, AsJson, SiteDir, plan_at
from confide.client.running import call_agent
from confide.client.terminal import facts, left, minute, paragraphs, sentence, spent, table
from confide.common.errors import MessageError, RunError
from confide.common.wording import plain, several

if TYPE_CHECKING:
    from confide.client.home import Home
    from confide.client.standing import AccountStanding, RunStanding, SiteStanding
    from confide.common.plan import Plan

app = typer.Typer()


@app.command(epilog="Example: confide site status")
def status(site: SiteDir = SITE_DIR, as_json: AsJson = False) -> None:
    """Show whether an agent runs and what it does, what each account has left, and how far each run is."""
    from confide.client.home import Home
    from confide.client.standing import tree

    home = Home.open(site)
    found, running = _standing(home), _asked(home)
    if as_json:
        typer.echo(json.dumps({"status": "ok", **tree(found), "agent": running}))
        return
    _show_status(found, running)


@app.command(epilog="Example: confide site watch --every 5")
def watch(
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.5, max=3600)] = 3.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
    site: SiteDir = SITE_DIR,
) -> None:
    """Show the same as `status`, live, until Ctrl-C."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from confide.client.home import Home

    home = Home.open(site)

    def look() -> str:
        written = io.StringIO()
        with contextlib.redirect_stdout(written):
            typer.echo(time.strftime("%H:%M:%S"))
            _show_status(_standing(home), _asked(home))
        return written.getvalue()

    if once:
        typer.echo(look(), nl=False)
        return
    screen = Live(Text(look()), console=Console(highlight=False, markup=False), auto_refresh=False)
    with contextlib.suppress(KeyboardInterrupt), screen as live:
        while True:
            time.sleep(every)
            live.update(Text(look()), refresh=True)


@app.command(epilog="Example: confide site budget --figure budget.png")
def budget(
    plan: Annotated[
        str | None,
        typer.Option(
            help="Ask how many rounds of this plan would fit, signed or not; or a run whose plan was shown.",
            metavar="PLAN",
        ),
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw what was used over time to this .png or .svg file.", metavar="FILE")
    ] = None,
    site: SiteDir = SITE_DIR,
    as_json: AsJson = False,
) -> None:
    """Show what every account spent, on what, what it has left, and how many more rounds of each plan fit."""
    from confide.client.budget_course import check_figure, draw
    from confide.client.home import Home
    from confide.client.journal import salvage
    from confide.client.standing import course, tree

    if figure is not None:
        check_figure(figure)
    home = Home.open(site)
    asked = None if plan is None else plan_at(plan, home)
    found = _standing(home)
    fitting = {} if asked is None else _fitting(home, asked)
    points = course(salvage(home.ledger)[: found.records]) if as_json or figure is not None else ()
    if figure is not None:
        draw(points, found.site, figure)
    if as_json:
        of_plan = None if asked is None else {"name": asked.name, "digest": asked.digest, "rounds_that_fit": fitting}
        told = {**tree(found), "plan": of_plan, "course": [dataclasses.asdict(point) for point in points]}
        typer.echo(json.dumps({"status": "ok", **told}))
        return
    _show_budget(found)
    if asked is not None:
        typer.echo()
        for account, rounds in fitting.items():
            sentence(
                f"{several(rounds, 'round')} of the plan {asked.name!r} would fit into account {account}; it has {asked.privacy.rounds}."
            )
    if figure is not None:
        typer.echo(f"\nWrote {figure}.")


def _show_status(found: "SiteStanding", running: "Mapping[str, Any] | None") -> None:
    from confide.common.entries import utc_text

    typer.secho(f"Site {plain(found.site)}", bold=True)
    rows = [("agent", "none runs")]
    if running is not None:
        since = utc_text(int(running["since"]))
        doing = (
            f"{running['doing']} since {since}; run {running['run']}, data set {running['data']}; {running['status']}"
        )
        rows = [("agent", doing), *(("", reason) for reason in running["reasons"])]
    facts([*rows, ("ledger", f"{several(found.records, 'record')}, the last at {utc_text(found.at)}")])
    typer.echo()
    _show_accounts(found.accounts)
    typer.echo()
    _show_runs(found.runs)


def _show_accounts(accounts: "tuple[AccountStanding, ...]") -> None:
    if not accounts:
        sentence("No account is open. The first is opened when data are registered: confide site data add")
        return
    table(
        ("account", "limit", "used", "left", "in all periods", "data sets"),
        [
            (
                account.account,
                f"{account.epsilon:g} at {account.delta:g}",
                spent(account.used),
                left(account.left),
                f"{spent(account.total)}{' and more' if account.incomplete else ''}",
                ", ".join(account.data) or "none in use",
            )
            for account in accounts
        ],
        numbers=("account", "used", "left", "in all periods"),
    )
    for account in accounts:
        if not account.used and account.conversion > 0:
            sentence(
                f"The first round that is charged to account {account.account} takes {spent(account.conversion)} besides its own "
                "cost, once, because of how budgets are counted; what is left is what comes after that."
            )


def _show_runs(runs: "tuple[RunStanding, ...]") -> None:
    from confide.common.entries import utc_text

    if not runs:
        sentence("No plan was approved yet. Read one: confide site plan show")
        return
    table(
        ("run", "plan", "data set", "begun", "may come", "would fit", "approved (UTC)"),
        [
            (
                run.run,
                run.name,
                run.data,
                f"{run.begun} of {run.rounds}",
                str(run.to_come),
                str(run.fits),
                f"until {minute(utc_text(run.until))}" if run.until is not None else f"no: {run.why}",
            )
            for run in runs
        ],
        numbers=("begun", "may come", "would fit"),
    )
    lost = [f"{run.run} {run.lost}" for run in runs if run.lost]
    if lost:
        sentence(f"Rounds that came to nothing, and count as far as they touched rows: {', '.join(lost)}.")


def _show_budget(found: "SiteStanding") -> None:
    from confide.common.entries import utc_text

    typer.secho(f"Site {plain(found.site)}", bold=True)
    if not found.accounts:
        typer.echo()
        _show_accounts(found.accounts)
    for account in found.accounts:
        lines = [
            f"Used {spent(account.used)} of epsilon {account.epsilon:g} at delta {account.delta:g} in period {account.period}, "
            f"which began at {utc_text(account.began)}. Left {left(account.left)}.",
            f"In all periods together: {spent(account.total)}."
            + (" A ledger was lost, so there may be more." if account.incomplete else ""),
        ]
        if account.conversion > 0:
            lines.append(
                f"Counting itself takes {spent(account.conversion)} of each period, once; the rest adds up from what is below."
            )
        paragraphs([(f"Account {account.account}, of {', '.join(account.data) or 'no data set in use'}", lines)])
        if account.charges:
            table(
                ("  charged for", "times", "now", "in all periods"),
                [
                    (f"  {charge.what}", str(charge.count), spent(charge.now), spent(charge.total))
                    for charge in account.charges
                ],
                numbers=("times", "now", "in all periods"),
            )
    typer.echo()
    _show_runs(found.runs)


def _standing(home: "Home") -> "SiteStanding":
    from confide.client.journal import Journal
    from confide.client.standing import SiteStanding

    book = Journal.look(home.ledger)
    return SiteStanding.of(book, book.now(time.time()))


def _fitting(home: "Home", plan: "Plan") -> dict[str, int]:
    """Return how many rounds of a plan fit into each account."""
    from confide.client.journal import Journal
    from confide.client.standing import rounds_that_fit
    from confide.common.accounting import planned_spend

    book, one = Journal.look(home.ledger), planned_spend(plan.privacy)
    return {name: rounds_that_fit(book.gate(name), one) for name in book.accounts}


def _asked(home: "Home") -> dict[str, Any] | None:
    """Return what the agent says of itself, or None if none answers."""
    try:
        told = json.loads(call_agent(home, "status"))
    except (RunError, MessageError, ValueError):
        return None
    return dict(told)
