"""`confide plan …`: write, check, explain and compare plans. Needs neither torch nor data."""

import json
from pathlib import Path
from typing import Annotated

import typer

from confide.common.base import base_digest, check_base, model_type
from confide.common.errors import UsageError
from confide.common.plan import differences, load_plan, read_plan, starter

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
    out: Annotated[Path | None, typer.Option(help="Where to write; standard output if absent.")] = None,
) -> None:
    """Write a commented starter plan."""
    if model is None:
        text = starter(name, "NAME-OF-THE-BASE-MODEL", "sha256:" + "0" * 64, ["query", "value"])
    else:
        targets = _TARGETS.get(model_type(model), _OTHER_TARGETS)
        text = starter(name, model.resolve().name, base_digest(model), targets)
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
def explain(plan: PlanFile, as_json: AsJson = False) -> None:
    """Say in plain sentences what a plan does, what leaves a site and what is guaranteed."""
    from confide.common.explain import explain as sections

    found = load_plan(plan)
    parts = dict(sections(found))
    if as_json:
        typer.echo(json.dumps({"status": "ok", "name": found.name, "digest": found.digest, "sections": parts}))
        return
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(f"Plan {found.name}", style="bold"))
    console.print(Text(found.digest, style="dim"))
    for heading, sentences in parts.items():
        console.print()
        console.print(Text(heading, style="bold"))
        for sentence in sentences:
            console.print(Padding(Text(sentence), (0, 0, 0, 2)))


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
