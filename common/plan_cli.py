"""`confide plan …`: write, check, explain, compare plans, and ask what they cost. Needs neither torch nor data."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from confide.common.base import base_digest, check_base, model_type
from confide.common.errors import UsageError
from confide.common.plan import SCORES, TEXT_CLASSES, Plan, differences, load_plan, read_plan, starter

app = typer.Typer()

PlanFile = Annotated[Path, typer.Argument(help="The plan, a TOML file.", metavar="PLAN")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
ModelDir = Annotated[Path | None, typer.Option("--model", help="The base model's local directory.", metavar="DIR")]

# Modules that usually carry adapters, by architecture.
_TARGETS = {
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "xlm-roberta": ["query", "value"],
    "electra": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "modernbert": ["Wqkv"],
    "gpt2": ["c_attn"],
}
_OTHER_TARGETS = ["q_proj", "v_proj"]


@app.command(epilog="Example: confide plan new --model ./MiniLM --out plan.toml")
def new(
    model: ModelDir = None,
    name: Annotated[str, typer.Option(help="The plan's name: a-z, 0-9 and -.")] = "my-plan",
    task: Annotated[str, typer.Option(help=f"What is learned: {', '.join(SCORES)}.", metavar="KIND")] = TEXT_CLASSES,
    out: Annotated[Path | None, typer.Option(help="Where to write; standard output if absent.")] = None,
) -> None:
    """Write a commented starter plan."""
    if task not in SCORES:
        raise UsageError(f"There is no kind of task {task!r}. Known are {', '.join(SCORES)}.")
    if model is None:
        text = starter(name, "NAME-OF-THE-BASE-MODEL", "sha256:" + "0" * 64, ["query", "value"], task)
    else:
        targets = _TARGETS.get(model_type(model), _OTHER_TARGETS)
        text = starter(name, model.resolve().name, base_digest(model), targets, task)
    read_plan(text.encode())  # a bad name is told here, not by the next command
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        with out.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise UsageError(f"{out} exists and is left as it is. Give another --out.") from None
    except OSError as error:
        raise UsageError(f"Cannot write {out}: {error.strerror or error}.") from None
    typer.echo(f"Wrote {out}. Next: edit it, then run: confide plan check {out}")


@app.command(epilog="Example: confide plan check plan.toml")
def check(plan: PlanFile, model: ModelDir = None, as_json: AsJson = False) -> None:
    """Check a plan's structure, and with --model also the base model's digest."""
    found = load_plan(plan)
    if model is not None:
        check_base(model, found.model.base_digest)
    if as_json:
        typer.echo(json.dumps({"status": "ok", "name": found.name, "digest": found.digest}))
    else:
        typer.echo(f"The plan {found.name!r} is well-formed.\ndigest {found.digest}")


@app.command(epilog="Example: confide plan explain plan.toml")
def explain(plan: PlanFile, model: ModelDir = None, as_json: AsJson = False) -> None:
    """Say in plain sentences what a plan does, what leaves a site, what is guaranteed and what to expect."""
    from confide.common.explain import explain as sections

    found = load_plan(plan)
    parts = dict(sections(found, model))
    if as_json:
        typer.echo(json.dumps({"status": "ok", "name": found.name, "digest": found.digest, "sections": parts}))
        return
    _show(found, parts.items())


@app.command(epilog="Example: confide plan budget plan.toml --budget 12 --spent run/sites/north.jsonl")
def budget(
    plan: PlanFile,
    epsilon: Annotated[
        float | None, typer.Option(help="Ask for the noise that keeps the whole run under this epsilon.", metavar="E")
    ] = None,
    noise: Annotated[
        float | None, typer.Option(help="Ask what this noise multiplier would cost.", metavar="SIGMA")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds, in place of the plan's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of a round, in place of the plan's.")] = None,
    sampling_rate: Annotated[
        float | None, typer.Option(help="Sampling rate, in place of the plan's.", metavar="Q")
    ] = None,
    limit: Annotated[
        float | None, typer.Option("--budget", help="Ask how many rounds this epsilon leaves.", metavar="E")
    ] = None,
    spent: Annotated[
        Path | None,
        typer.Option(help="A site's exported ledger, whose spends count before the budget.", metavar="FILE"),
    ] = None,
    account: Annotated[
        str | None, typer.Option(help="Which of that ledger's accounts, if it has several.", metavar="N")
    ] = None,
    spent_rounds: Annotated[
        int | None, typer.Option(help="So many rounds of the plan count as spent before the budget.")
    ] = None,
    rows_per_person: Annotated[
        int | None,
        typer.Option(help="Ask what somebody with so many rows of her own risks; takes seconds.", metavar="K"),
    ] = None,
    model: ModelDir = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw epsilon over rounds to this .png or .svg file.", metavar="FILE")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a plan costs after each stretch of rounds, what else it could cost, and what a budget leaves."""
    from confide.common.accounting import planned_spend
    from confide.common.budget import spent_before, what_if
    from confide.common.budget_figure import draw
    from confide.common.budget_report import report

    found = load_plan(plan)
    if limit is None and (spent is not None or spent_rounds is not None):
        raise UsageError("--spent and --spent-rounds count under a budget. Give one with --budget E.")
    if account is not None and spent is None:
        raise UsageError("--account chooses within a ledger. Give one with --spent FILE.")
    if spent_rounds is not None and not 1 <= spent_rounds <= 100_000:
        raise UsageError(f"--spent-rounds {spent_rounds} is outside its range (1 to 100000).")
    spends = list(spent_before(spent, account)) if spent is not None else []
    spends += [planned_spend(found.privacy)] * (spent_rounds or 0)
    asked = what_if(
        found, epsilon=epsilon, noise=noise, rounds=rounds, steps_per_round=steps, sampling_rate=sampling_rate
    )
    answer = report(found, asked, budget=limit, spent=spends, rows_per_person=rows_per_person, model=model)
    if figure is not None:
        draw(answer, figure)
    if as_json:
        typer.echo(json.dumps(answer.tree()))
        return
    _show(found, answer.sections())
    if figure is not None:
        typer.echo(f"\nWrote {figure}.")


def _show(plan: Plan, parts: Iterable[tuple[str, list[str]]]) -> None:
    """Print headings and what stands under them, wrapped to the terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(f"Plan {plan.name}", style="bold"))
    console.print(Text(plan.digest, style="dim"))
    for heading, sentences in parts:
        console.print()
        console.print(Text(heading, style="bold"))
        for sentence in sentences:
            for line in Text(sentence).wrap(console, max(1, console.width - 2)):
                line.rstrip()
                console.print(Text("  ") + line)


@app.command(epilog="Example: confide plan diff old.toml new.toml")
def diff(
    old: Annotated[Path, typer.Argument(help="A plan.", metavar="OLD")],
    new: Annotated[Path, typer.Argument(help="Another plan.", metavar="NEW")],
    as_json: AsJson = False,
) -> None:
    """Show every setting in which two plans differ."""
    before, after = load_plan(old), load_plan(new)
    rows = differences(before, after)
    if as_json:
        listed = [{"key": key, "old": old_value, "new": new_value} for key, old_value, new_value in rows]
        typer.echo(json.dumps({"status": "ok", "same_digest": before.digest == after.digest, "differences": listed}))
        return
    for key, old_value, new_value in rows:
        typer.echo(f"{key}\n  - {old_value}\n  + {new_value}")
    same = "the same digest" if before.digest == after.digest else "different digests"
    typer.echo(f"{len(rows)} difference{'' if len(rows) == 1 else 's'}; {same}.")
