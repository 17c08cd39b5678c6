"""`confide simulate rehearsal …`: the rest of a federation, made up, for a site that wants to see its agent at work."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from confide.common.cli import quiet_libraries
from confide.common.errors import RunError, UsageError
from confide.common.wording import command

if TYPE_CHECKING:
    from confide.server.store import RoundRecord

app = typer.Typer(help="Play the rest of a federation around one real site's agent.", no_args_is_help=True)

_NO_SUM = "No round gave a sum, so nothing was learned. The rounds tell who was missing, and where."

Directory = Annotated[Path, typer.Argument(help="The rehearsal's directory.", metavar="DIR")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


@app.command(epilog="Example: confide simulate rehearsal begin ./rehearsal --site north --key 5f0c…")
def begin(
    directory: Directory,
    site: Annotated[str, typer.Option(help="The real site's name.", metavar="NAME")],
    key: Annotated[str, typer.Option(help="Its key: 64 hexadecimal digits, as `confide site init` shows it.")],
    peers: Annotated[int, typer.Option(help="How many made-up sites stand beside it, 2 to 5.", min=2, max=5)] = 2,
    federation: Annotated[str, typer.Option(help="What the made-up federation is called.")] = "rehearsal",
    as_json: AsJson = False,
) -> None:
    """Make up a federation with one real site on its roster."""
    from confide.client.keys import fingerprint
    from confide.simulations.rehearsal import ROSTER, Rehearsal

    try:
        public = bytes.fromhex(key)
    except ValueError:
        raise UsageError("--key is not 64 hexadecimal digits. Take it from: confide site key show") from None
    begun = Rehearsal.begin(directory, site, public, federation=federation, peers=peers)
    admin, roster = begun.admin.public, directory / ROSTER
    told = {
        "federation": federation,
        "roster": str(roster),
        "admin": admin.hex(),
        "fingerprint": fingerprint(admin),
        "sites": sorted(begun.roster.sites),
    }
    if as_json:
        typer.echo(json.dumps({"status": "ok", **told}))
        return
    typer.echo(f"The federation {federation} was made up: {', '.join(sorted(begun.roster.sites))}.")
    typer.echo(f"Its admin's key is {admin.hex()}\nand that key's fingerprint {fingerprint(admin)}")
    typer.echo("Keys that a made-up federation holds protect nobody: rehearse with made-up rows.")
    typer.echo(f"Next: {command('confide', 'site', 'join', roster, '--admin', admin.hex())}")


@app.command(epilog="Example: confide simulate rehearsal plan ./rehearsal plan.toml --run try-1 --out try-1.signed")
def plan(
    directory: Directory,
    plan_file: Annotated[Path, typer.Argument(help="The plan, a TOML file.", metavar="PLAN")],
    run: Annotated[str, typer.Option(help="What the run is called; another name for another run.", metavar="NAME")],
    out: Annotated[Path, typer.Option(help="A file that does not exist yet.", metavar="FILE")],
    as_json: AsJson = False,
) -> None:
    """Sign a plan for a run, as a federation's coordinator does."""
    from confide.common.plan import load_plan
    from confide.simulations.rehearsal import Rehearsal

    asked, rehearsal = load_plan(plan_file), Rehearsal(directory)
    sites, least, most = len(rehearsal.roster.sites), asked.federation.min_sites, asked.federation.max_sites
    if not least <= sites <= most:
        raise UsageError(
            f"The plan asks for {least} to {most} sites, and the rehearsal has {sites}. Begin another with --peers."
        )
    signed = rehearsal.sign(plan_file.read_bytes(), run)
    try:
        with out.open("xb") as stream:
            stream.write(signed)
    except FileExistsError:
        raise UsageError(f"{out} exists and is left as it is. Give another --out.") from None
    if as_json:
        typer.echo(json.dumps({"status": "ok", "out": str(out), "run": run, "plan": asked.digest}))
        return
    typer.echo(f"Wrote {out}: the plan {asked.name!r}, signed for the run {run!r}.")
    typer.echo(f"Next: {command('confide', 'site', 'plan', 'show', out)}")


@app.command(
    "run",
    epilog="Example: confide simulate rehearsal run ./rehearsal try-1.signed --model ./MiniLM --agent site/run/agent.sock",
)
def run_(
    directory: Directory,
    signed: Annotated[Path, typer.Argument(help="A plan that `rehearsal plan` signed.", metavar="SIGNED")],
    model: Annotated[Path, typer.Option(help="The base model's local directory.", metavar="DIR")],
    agent: Annotated[Path, typer.Option(help="The socket of the site's agent: SITE/run/agent.sock.", metavar="SOCKET")],
    as_json: AsJson = False,
) -> None:
    """Run the plan's rounds with the made-up sites and the real site's agent; run again, it goes on where it was."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    quiet_libraries()
    from confide.common.signed_plan import read_signed_plan
    from confide.simulations.rehearsal import Rehearsal

    rehearsal = Rehearsal(directory)
    try:
        raw = signed.read_bytes()
    except OSError as error:
        raise UsageError(
            f"Cannot read {signed}: {error.strerror or error}. Sign a plan with: confide simulate rehearsal plan"
        ) from None
    found = read_signed_plan(raw, rehearsal.coordinator.public)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[doing]}", style="dim"),
        console=Console(stderr=as_json, quiet=as_json, highlight=False, markup=False),
        disable=as_json,
    )
    records: list[RoundRecord] = []
    with progress:
        done = rehearsal.rounds_of(found.run)
        task = progress.add_task("rounds", total=found.plan.privacy.rounds, completed=done, doing="loading")

        def told(record: "RoundRecord") -> None:
            records.append(record)
            progress.update(task, advance=1)
            progress.console.print(_line(record), style="dim")

        status = rehearsal.run(
            raw,
            model=model.resolve(),
            agent=agent,
            told=told,
            asked=lambda site, kind: progress.update(task, doing=f"{kind} to {site}"),
        )
        progress.update(task, doing="")
    adapter = rehearsal.adapter_of(found.run)
    if as_json:
        rounds = [
            {"round": r.round, "present": list(r.present), "missing": dict(r.missing), "void": r.void} for r in records
        ]
        failed = {"error": RunError.__name__, "message": _NO_SUM} if status == "failed" else {}
        told_of = {"status": status, "run": found.run, "rounds": rounds, "adapter": str(adapter)}
        typer.echo(json.dumps(told_of | failed))
    else:
        typer.echo(f"{status}: {len(records)} rounds now, {done} before. The adapter is in {adapter}.")
        if any(rehearsal.site in record.missing for record in records):
            typer.echo(f"Why {rehearsal.site} was missing, its agent tells in its own lines and in its trail.")
    if status == "failed":
        raise typer.Exit(RunError.exit_code)


def _line(record: "RoundRecord") -> str:
    """Return one line about a round."""
    missing = ", ".join(f"{site} at {why}" for site, why in record.missing.items())
    what = f"summed over {len(record.present)} sites" if record.present else "void"
    return f"round {record.round:>3}  {what} in {record.seconds:.1f} s{f'; missing: {missing}' if missing else ''}"
