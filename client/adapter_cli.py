"""`confide adapter …`: show, evaluate, use, merge and export a trained adapter. For anyone who has the base model."""

import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from confide.common.adapter import Floats
from confide.common.cli import quiet_libraries
from confide.common.errors import AdapterError, UsageError
from confide.common.messages import vector_digest
from confide.common.plan import LANGUAGE, MASKED, REGRESSION, TOKEN_CLASSES, Plan, load_plan

if TYPE_CHECKING:
    from confide.client.images import ImageReader
    from confide.client.tokenizer import Tokenizer
    from confide.common.examples import Examples
    from confide.common.model import AdaptedModel

app = typer.Typer()

AdapterDir = Annotated[Path, typer.Argument(help="An adapter's directory.", metavar="ADAPTER")]
ModelDir = Annotated[Path, typer.Option("--model", help="The base model's local directory.", metavar="DIR")]
DataFile = Annotated[Path, typer.Option("--data", help="A table in the plan's form.", metavar="FILE")]
OutDir = Annotated[Path, typer.Option("--out", help="A directory that does not exist yet.", metavar="DIR")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


@app.command(epilog="Example: confide adapter show runs/demo/adapter")
def show(adapter: AdapterDir, as_json: AsJson = False) -> None:
    """Show where an adapter came from and what it claims."""
    manifest = _manifest(adapter)
    if as_json:
        typer.echo(json.dumps(manifest))
        return
    typer.echo(f"{manifest['plan']['name']}: {manifest['status']}, {len(manifest['lineage'])} rounds")
    typer.echo(f"  adapter  {manifest['adapter']}\n  plan     {manifest['plan']['digest']}")
    typer.echo(f"  base     {manifest['base']['name']} {manifest['base']['digest']}")
    for site, claim in manifest["claims"].items():
        typer.echo(f"  {site}: epsilon {claim['epsilon']:.3f} at delta {claim['delta']:g}, noise {claim['noise']}")
    for name, value in manifest["scores"].items():
        typer.echo(f"  {name} {value:.4f}")
    for word in manifest["weakened_by"]:
        typer.echo(f"  weakened by {word}")


@app.command(epilog="Example: confide adapter evaluate runs/demo/adapter --model ./MiniLM --data held-out.csv")
def evaluate(adapter: AdapterDir, model: ModelDir, data: DataFile, as_json: AsJson = False) -> None:
    """Score an adapter on a table of your own."""
    quiet_libraries()
    from confide.client.data import load_reader, read_examples
    from confide.common.model import attach
    from confide.common.objective import measure

    plan = _plan(adapter)
    adapted = attach(model, plan)
    adapted.write(_vector(adapted, adapter))
    reading = read_examples(data, plan, load_reader(model, plan))
    found = measure(adapted, reading.examples)
    if as_json:
        typer.echo(json.dumps({"status": "ok", "rows": reading.kept, "skipped": dict(reading.skipped), **found}))
        return
    for name, value in found.items():
        typer.echo(f"{name} {value:.4f}")
    skipped = "".join(f", {count} skipped ({reason})" for reason, count in reading.skipped.items())
    typer.echo(f"{reading.kept} rows{skipped}")


@app.command(
    epilog="Example: confide adapter predict runs/demo/adapter --model ./MiniLM --data new.csv --out answers.csv"
)
def predict(
    adapter: AdapterDir,
    model: ModelDir,
    data: DataFile,
    out: Annotated[Path | None, typer.Option(help="A CSV file to write; standard output if absent.")] = None,
    tokens: Annotated[int, typer.Option(help="The most tokens a language model says.", min=1, max=4096)] = 64,
) -> None:
    """Say what the model makes of each row, as CSV, in the order of the rows.

    Classes: the label and the probability of every label. Regression: the number. Token classes: a label for each word.
    Language models: what they go on with.
    """
    quiet_libraries()
    from confide.client.data import load_reader, read_texts
    from confide.common.model import attach

    if out is not None and out.exists():
        raise UsageError(f"{out} exists and is left as it is. Give another --out.")
    plan = _plan(adapter)
    adapted = attach(model, plan)
    adapted.write(_vector(adapted, adapter))
    reader = load_reader(model, plan)
    header, rows = _predictions(adapted, read_texts(data, plan, reader), reader, tokens)
    if out is None:
        csv.writer(sys.stdout, lineterminator="\n").writerows([header, *rows])
        return
    with out.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    typer.echo(f"Wrote {len(rows)} predictions to {out}.")


@app.command(epilog="Example: confide adapter merge runs/demo/adapter --model ./MiniLM --out ./merged")
def merge(adapter: AdapterDir, model: ModelDir, out: OutDir) -> None:
    """Fold an adapter into the base model's weights; transformers then loads the result without peft."""
    quiet_libraries()
    from confide.common.model import attach
    from confide.common.model import merge as merge_into

    _fresh(out)
    plan = _plan(adapter)
    adapted = attach(model, plan)
    merge_into(adapted, _vector(adapted, adapter), model, out)
    typer.echo(f"Wrote full weights to {out}.")


@app.command(
    epilog="Example: confide adapter export runs/demo/adapters/3f…e1.safetensors --plan plan.toml --model ./MiniLM --out ./v3"
)
def export(
    version: Annotated[Path, typer.Argument(help="A stored version of an adapter.", metavar="FILE")],
    plan: Annotated[Path, typer.Option(help="The plan it was trained with.", metavar="FILE")],
    model: ModelDir,
    out: OutDir,
) -> None:
    """Write any stored version of an adapter, such as that after round 3, as a standard PEFT directory."""
    quiet_libraries()
    from confide.common.adapter import load_vector
    from confide.common.model import attach

    _fresh(out)
    adapted = attach(model, load_plan(plan))
    adapted.export(load_vector(version, adapted.layout), out)
    (out / "plan.toml").write_bytes(plan.read_bytes())
    typer.echo(f"Wrote a PEFT adapter to {out}.")


def _predictions(
    adapted: "AdaptedModel", examples: "Examples", reader: "Tokenizer | ImageReader", tokens: int
) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a table of predictions."""
    from confide.client.tokenizer import Tokenizer
    from confide.common.objective import continued, numbers, probabilities, word_classes

    labels, kind = adapted.plan.task.labels, adapted.plan.task.kind
    if kind == MASKED:
        raise UsageError(
            "masked-lm adapts a base to a kind of text and answers no questions. Merge the adapter, and train a "
            "classifier on the result."
        )
    if isinstance(reader, Tokenizer) and kind in LANGUAGE:
        return ["text"], [[reader.decode(row)] for row in continued(adapted, examples, tokens)]
    if kind == REGRESSION:
        return ["number"], [[f"{number:.6g}"] for number in numbers(adapted, examples)]
    if kind == TOKEN_CLASSES:
        return ["labels"], [[" ".join(labels[word] for word in row)] for row in word_classes(adapted, examples)]
    chances = probabilities(adapted, examples)
    header = ["label", *(f"probability {label}" for label in labels)]
    return header, [[labels[line.argmax()], *(f"{chance:.6f}" for chance in line)] for line in chances]


def _vector(adapted: "AdaptedModel", adapter: Path) -> Floats:
    """Return the adapter's vector, which must be the one its manifest speaks of, if it has one."""
    vector = adapted.import_exported(adapter)
    if (adapter / "manifest.json").exists() and _manifest(adapter)["adapter"] != vector_digest(vector):
        raise AdapterError(
            f"The weights in {adapter} are not those its manifest speaks of, so its claims are not about them. "
            "Take the directory anew from the run that made it."
        )
    return vector


def _plan(adapter: Path) -> Plan:
    if not (adapter / "plan.toml").is_file():
        raise AdapterError(f"{adapter} holds no plan.toml, so it is not an adapter's directory that Confide wrote.")
    plan = load_plan(adapter / "plan.toml")
    if (adapter / "manifest.json").exists() and _manifest(adapter)["plan"]["digest"] != plan.digest:
        raise AdapterError(f"The plan in {adapter} is not the one its manifest speaks of. Take the directory anew.")
    return plan


def _manifest(adapter: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((adapter / "manifest.json").read_bytes())
        if manifest["format"] != "confide-manifest/1" or not _well_formed(manifest):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise AdapterError(
            f"{adapter} holds no readable manifest.json. Give the adapter/ directory of a run; a version written by "
            "`confide adapter export` has no manifest of its own."
        ) from None
    return dict(manifest)


def _well_formed(manifest: dict[str, Any]) -> bool:
    claims = manifest["claims"].values()
    return (
        isinstance(manifest["adapter"], str)
        and all(isinstance(manifest[part][key], str) for part in ("plan", "base") for key in ("name", "digest"))
        and all(isinstance(claim["epsilon"], float) and isinstance(claim["delta"], float) for claim in claims)
        and all(isinstance(claim["noise"], str) for claim in claims)
        and all(isinstance(value, float) for value in manifest["scores"].values())
        and isinstance(manifest["status"], str)
        and isinstance(manifest["lineage"], list)
        and isinstance(manifest["weakened_by"], list)
    )


def _fresh(out: Path) -> None:
    if out.exists():
        raise UsageError(f"{out} exists and is left as it is. Give another --out.")
