"""`confide simulate …`: a whole federation on this machine, live, with its results and figures."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from confide.common.cli import quiet_libraries
from confide.common.errors import ConfideError, RunError, UsageError
from confide.simulations import rehearsal_cli
from confide.simulations.scenarios import SCENARIOS, demo_model, scenario

if TYPE_CHECKING:
    from confide.simulations.setting import Setting
    from confide.simulations.shelf import Shelf
    from confide.simulations.sweep import Variant

app = typer.Typer()
app.add_typer(rehearsal_cli.app, name="rehearsal")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Seed = Annotated[int, typer.Option(min=0, help="Fixes the split and every draw.")]
Threads = Annotated[int, typer.Option(min=0, max=1024, help="Processor threads; 0 leaves it to the plan.")]
Out = Annotated[Path | None, typer.Option(help="The run's directory; runs/NAME-TIME if absent.", metavar="DIR")]
Engine = Annotated[str, typer.Option(help="How messages travel: in-process or flower.")]
Summation = Annotated[
    str,
    typer.Option(help="How updates are summed: real, with all the cryptography, or insecure_plain_sum, without any."),
]
Noise = Annotated[
    str,
    typer.Option(
        help="Where the federation's noise comes from: insecure_seeded_noise, which can be repeated, or cryptographic."
    ),
]
Compare = Annotated[
    bool, typer.Option("--compare", help="Also train the head alone, all rows pooled, and those without privacy.")
]
HeadOnly = Annotated[bool, typer.Option("--head-only", help="Also run the federation with its head only.")]
ScoreEvery = Annotated[int, typer.Option(min=0, help="Score after every so many rounds; 0 only at the end.")]


@app.command(
    epilog="Example: confide simulate run plan.toml --model ./MiniLM --data rows.csv --sites 5 --split dirichlet"
)
def run(
    context: typer.Context,
    plan: Annotated[Path | None, typer.Argument(help="The plan, a TOML file.", metavar="PLAN")] = None,
    model: Annotated[
        Path | None, typer.Option(help="The base model's local directory; the demo's MiniLM if absent.", metavar="DIR")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The table of all sites' rows.", metavar="FILE")] = None,
    test: Annotated[Path | None, typer.Option(help="A table of held-out rows.", metavar="FILE")] = None,
    test_share: Annotated[float, typer.Option(help="Share of persons held out, without --test.")] = 0.2,
    sites: Annotated[int, typer.Option(min=1, max=1000, help="How many sites; not for --split column.")] = 3,
    split: Annotated[str, typer.Option(help="How rows are shared out: column, iid, dirichlet or quantity.")] = "iid",
    column: Annotated[str | None, typer.Option(help="The column that names each row's site.")] = None,
    concentration: Annotated[float, typer.Option(help="The Dirichlet parameter; smaller is more uneven.")] = 0.5,
    seed: Seed = 0,
    engine: Engine = "in-process",
    summation: Summation = "real",
    noise: Noise = "insecure_seeded_noise",
    threads: Threads = 0,
    alone: Annotated[bool, typer.Option(help="Also train each site alone, with the same privacy.")] = True,
    head_only: HeadOnly = False,
    compare: Compare = False,
    score_every: ScoreEvery = 1,
    out: Out = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this directory.", metavar="DIR")] = None,
    as_json: AsJson = False,
) -> None:
    """Run a federation on one table, split into sites."""
    given = {name for name in context.params if context.get_parameter_source(name) == ParameterSource.COMMANDLINE}
    if resume is not None:
        if extra := sorted(given - {"resume", "as_json"}):
            raise UsageError(
                f"--resume takes everything from the run's directory; leave out {', '.join(map(_flag, extra))}."
            )
        _run(resume, as_json=as_json)
        return
    unused = {
        "sites": split == "column",
        "column": split != "column",
        "concentration": split not in {"dirichlet", "quantity"},
        "test_share": test is not None,
    }
    if idle := sorted(name for name in given if unused.get(name)):
        other = "--test" if idle == ["test_share"] else f"--split {split}"
        raise UsageError(f"{', '.join(map(_flag, idle))} has no effect with {other}. Leave it out.")
    if plan is None or data is None:
        raise UsageError("Give a PLAN and --data FILE. To see a run without either: confide simulate demo")
    from confide.simulations.setting import Setting, begin, check_choices

    check_choices(split=split, engine=engine, summation=summation, noise=noise)
    if not 0 < test_share < 1:
        raise UsageError(f"--test-share {test_share:g} is outside its range: above 0, below 1.")
    if not 0 < concentration <= 1e6:
        raise UsageError(f"--concentration {concentration:g} is outside its range: above 0, at most 1000000.")
    for path in filter(None, (plan, data, test)):
        if not path.exists():
            raise UsageError(f"There is no file {path}.")
    directory = out or _directory(plan.stem)
    setting = Setting(
        model=(model or demo_model()).resolve(),
        data=data.resolve(),
        test=test.resolve() if test else None,
        test_share=test_share,
        split=split,
        column=column,
        sites=sites,
        concentration=concentration,
        seed=seed,
        engine=engine,
        summation=summation,
        noise=noise,
        threads=threads,
        alone=alone,
        head_only=head_only or compare,
        compare=compare,
        score_every=score_every,
    )
    begin(directory, plan, setting)
    _run(directory, as_json=as_json)


@app.command(epilog="Example: confide simulate demo --compare")
def demo(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(SCENARIOS)}.", metavar="NAME")] = "messages",
    seed: Seed = 0,
    engine: Engine = "in-process",
    summation: Summation = "real",
    noise: Noise = "insecure_seeded_noise",
    threads: Threads = 0,
    compare: Compare = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Watch three institutions fine-tune a real model on real text, each under its own epsilon."""
    directory = out or _directory(name)
    _begin_demo(
        name,
        directory,
        seed=seed,
        engine=engine,
        summation=summation,
        noise=noise,
        threads=threads,
        compare=compare,
    )
    if not as_json:
        Console(highlight=False, markup=False).print(
            f"{scenario(name).says} Real data, real model, simulated sites.\n", highlight=False
        )
    _run(directory, as_json=as_json)


@app.command(epilog="Example: confide simulate sweep messages --vary privacy.epsilon=1,3,8 --seeds 0,1,2")
def sweep(
    plan: Annotated[str, typer.Argument(help=f"A plan's file, or one of {', '.join(SCENARIOS)}.", metavar="PLAN")],
    vary: Annotated[
        list[str] | None, typer.Option(help="A setting and its values; may be given again.", metavar="SECTION.KEY=V,V")
    ] = None,
    seeds: Annotated[str, typer.Option(help="The seeds, with commas between them.")] = "0,1,2",
    model: Annotated[
        Path | None, typer.Option(help="The base model's local directory; the demo's MiniLM if absent.", metavar="DIR")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The table of all sites' rows.", metavar="FILE")] = None,
    test: Annotated[Path | None, typer.Option(help="A table of held-out rows.", metavar="FILE")] = None,
    sites: Annotated[int, typer.Option(min=1, max=1000, help="How many sites; not for --split column.")] = 3,
    split: Annotated[str, typer.Option(help="How rows are shared out: column, iid, dirichlet or quantity.")] = "iid",
    column: Annotated[str | None, typer.Option(help="The column that names each row's site.")] = None,
    concentration: Annotated[float, typer.Option(help="The Dirichlet parameter; smaller is more uneven.")] = 0.5,
    summation: Summation = "real",
    noise: Noise = "insecure_seeded_noise",
    threads: Threads = 0,
    alone: Annotated[bool, typer.Option(help="Also train each site alone, with the same privacy.")] = False,
    head_only: HeadOnly = False,
    compare: Compare = False,
    score_every: ScoreEvery = 0,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Run a plan or a scenario once for each seed and combination of settings, and show mean and spread.

    Runs that are complete in --out are not run again, so a sweep that was stopped goes on where it was.
    """
    from confide.simulations.setting import Setting, check_choices
    from confide.simulations.shelf import Shelf
    from confide.simulations.sweep import draw, summed, variants

    check_choices(split=split, summation=summation, noise=noise)
    if not 0 < concentration <= 1e6:
        raise UsageError(f"--concentration {concentration:g} is outside its range: above 0, at most 1000000.")
    numbers = _seeds(seeds)
    root = out or _directory(f"{Path(plan).stem}-sweep")
    plan_file = Path(plan)
    if plan in SCENARIOS:
        if data is not None or test is not None or model is not None:
            raise UsageError(f"The scenario {plan} brings its model and tables; leave out --model, --data and --test.")
        chosen = scenario(plan)
        (data, test), plan_file = chosen.prepare(root / "data"), chosen.plan
        split, column, sites = "column", chosen.column, 3
    if data is None:
        raise UsageError("Give --data FILE with a plan of your own.")
    for path in filter(None, (plan_file, data, test)):
        if not path.exists():
            raise UsageError(f"There is no file {path}.")
    setting = Setting(
        model=(model or demo_model()).resolve(),
        data=data.resolve(),
        test=test.resolve() if test else None,
        test_share=0.2,
        split=split,
        column=column,
        sites=sites,
        concentration=concentration,
        seed=0,
        engine="in-process",
        summation=summation,
        noise=noise,
        threads=threads,
        alone=alone,
        head_only=head_only or compare,
        compare=compare,
        score_every=score_every,
    )
    found, shelf = variants(plan_file.read_bytes(), vary or []), Shelf()
    results = {
        variant.name: [_once(variant, setting, seed, root, as_json=as_json, shelf=shelf) for seed in numbers]
        for variant in found
    }
    total = summed(results, numbers)
    (root / "sweep.json").write_text(json.dumps(total, indent=2) + "\n", encoding="utf-8")
    if len(found) > 1:
        draw(total, found, root / "sweep.png")
    if as_json:
        _print_json(total)
        return
    table = Table(title=f"{Path(plan).stem}: {total['score']} over seeds {seeds}", title_justify="left", box=None)
    for heading in ("", "", "mean", "lowest", "highest"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, rows in total["results"].items():
        for label, row in rows.items():
            table.add_row(name, label, *(f"{row[key]:.3f}" for key in ("mean", "lowest", "highest")))
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(f"All runs and sweep.json are in {root}.")


def _once(
    variant: "Variant", setting: "Setting", seed: int, root: Path, *, as_json: bool, shelf: "Shelf"
) -> dict[str, Any]:
    """Return the contents of `run.json` of one run of a sweep; what is done already is not done again."""
    from confide.common.plan import load_plan, read_plan
    from confide.simulations.setting import begin, read_setting

    directory, setting = root / variant.name / f"seed-{seed}", dataclasses.replace(setting, seed=seed)
    if not (directory / "setting.json").exists():
        source = root / variant.name / "plan.toml"
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_bytes(variant.plan)
        begin(directory, source, setting)
    elif read_setting(directory) != setting or load_plan(directory / "plan.toml") != read_plan(variant.plan):
        raise RunError(
            f"The run in {directory} was begun with another plan or other options, so it is no part of this sweep. Go on "
            "with those it was begun with, or give another --out."
        )
    if not (directory / "run.json").exists():
        if not as_json:
            Console(highlight=False, markup=False).print(f"{variant.name}, seed {seed}", style="bold")
        _run(directory, as_json=as_json, show=False, shelf=shelf)
    result: dict[str, Any] = json.loads((directory / "run.json").read_bytes())
    return result


def _seeds(words: str) -> list[int]:
    try:
        numbers = [int(word) for word in words.split(",")]
    except ValueError:
        raise UsageError(f"--seeds {words!r} is not a list of whole numbers such as 0,1,2.") from None
    if len(set(numbers)) != len(numbers) or min(numbers) < 0:
        raise UsageError("--seeds needs different numbers, none below 0.")
    return numbers


@app.command(epilog="Example: confide simulate bench federation --json")
def bench(
    name: Annotated[str, typer.Argument(help="Which benchmark: federation, secagg, ledger or train.", metavar="NAME")],
    plan: Annotated[
        Path | None, typer.Option(help="For train: the plan that says how --data is read.", metavar="PLAN")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="For train: a table to measure on; the demo's messages if absent.", metavar="FILE"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure speed and memory, beside a peer where there is one."""
    from confide.simulations.bench import bench as measure

    quiet_libraries()
    result = measure(name, lambda line: typer.echo(line, err=True), plan, data)
    if as_json:
        _print_json(result)
        return
    table = Table(title=f"bench {name}, {result['seconds']:.0f} s", title_justify="left", box=None, pad_edge=False)
    for heading in ("", "median", "", "lowest", "highest", "runs"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    figures: dict[str, Any] = result["figures"]
    peers = list(dict.fromkeys(figure["peer"] for figure in figures.values() if figure["peer"]))
    for key, figure in figures.items():
        median, low, high = (f"{value:.4g}" for value in (figure["value"], *figure["spread"]))
        mark = f" [{peers.index(figure['peer']) + 1}]" if figure["peer"] else ""
        table.add_row(key + mark, median, figure["unit"], low, high, str(figure["runs"]))
    console = Console(highlight=False, markup=False)
    console.print(table)
    for number, peer in enumerate(peers, start=1):
        console.print(f"[{number}] beside {peer}")


def _directory(name: str) -> Path:
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _flag(name: str) -> str:
    return {"plan": "PLAN", "as_json": "--json"}.get(name, f"--{name.replace('_', '-')}")


def _begin_demo(
    name: str, directory: Path, *, seed: int, engine: str, summation: str, noise: str, threads: int, compare: bool
) -> None:
    """Make the run's directory and the scenario's tables in it."""
    from confide.simulations.setting import Setting, begin, check_choices, check_fresh

    check_choices(engine=engine, summation=summation, noise=noise)
    chosen, model = scenario(name), demo_model()
    check_fresh(directory)
    data, test = chosen.prepare(directory / "data")
    setting = Setting(
        model=model,
        data=data.resolve(),
        test=test.resolve(),
        test_share=0.2,
        split="column",
        column=chosen.column,
        sites=3,
        concentration=0.5,
        seed=seed,
        engine=engine,
        summation=summation,
        noise=noise,
        threads=threads,
        alone=True,
        head_only=compare,
        compare=compare,
        score_every=1,
    )
    begin(directory, chosen.plan, setting)


def _run(directory: Path, *, as_json: bool, show: bool = True, shelf: "Shelf | None" = None) -> None:
    """Run or resume the run in `directory`, live; leave it resumable on Ctrl-C."""
    quiet_libraries()
    watch = _Screen(quiet=as_json)
    try:
        from confide.simulations.figures import draw
        from confide.simulations.study import Study

        with watch:
            result = Study(directory, watch, shelf).run()
            draw(result, directory / "figures")
    except KeyboardInterrupt:
        typer.echo(f"\nStopped. Go on with: confide simulate run --resume {directory}", err=True)
        if json.loads((directory / "setting.json").read_bytes())["noise"] == "cryptographic":
            typer.echo("A round that was interrupted is sat out then: such noise is never drawn twice.", err=True)
        raise
    except ConfideError:
        if (directory / "rounds").exists():
            typer.echo(f"The run's directory is {directory}.", err=True)
        raise
    if show and as_json:
        _print_json(result)
    elif show:
        _show(result, directory)


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")


class _Screen:
    """Progress on the terminal; silent if told so."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(stderr=quiet, quiet=quiet, highlight=False, markup=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[doing]}", style="dim"),
            console=self._console,
            disable=quiet,
        )
        self._task: Any = None

    def __enter__(self) -> "_Screen":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def phase(self, title: str, total: int) -> None:
        self._task = self._progress.add_task(title, total=total, doing="")

    def advance(self, steps: int = 1, doing: str = "") -> None:
        self._progress.update(self._task, advance=steps, doing=doing)

    def note(self, line: str) -> None:
        self._progress.console.print(line, style="dim")


def _show(result: dict[str, Any], directory: Path) -> None:
    console = Console(highlight=False, markup=False)
    scores, measured, name = result["scores"], result["measured"], result["score"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    shown = [score for score in dict.fromkeys((name, "accuracy")) if score in measured["federated"]]
    for heading in (*shown, f"epsilon (δ = {result['delta']:g})"):
        table.add_column(heading, justify="right")
    spent = max(result["epsilon"].values())
    whole = f"{result['epsilon_by_round'][-1]['epsilon']:.2f}"  # those who train alone miss no round
    rows = [("untrained", "untrained", "0")]
    rows += [(f"{site} alone", f"alone/{site}", whole) for site in scores.get("alone", {})]
    rows += [
        (label, key, epsilon)
        for label, key, epsilon in (
            ("federated, head only", "head_only", whole),
            ("all rows pooled", "pooled", whole),
            ("all rows pooled, not private", "pooled_not_private", "unbounded"),
        )
        if key in scores
    ]
    rows.append(("federated", "federated", f"{spent:.2f}"))
    for label, key, epsilon in rows:
        style = "bold" if key == "federated" else ""
        found = measured[key]
        table.add_row(label, *(f"{found[score]:.3f}" for score in shown), epsilon, style=style)
    console.print()
    console.print(table)
    console.print()
    spending = ", ".join(f"{site} {epsilon:.2f}" for site, epsilon in result["epsilon"].items())
    if len(result["epsilon"]) > 10 and len(set(result["epsilon"].values())) == 1:
        spending = f"{spent:.2f} at each of {len(result['epsilon'])} sites"
    console.print(
        f"{result['status']}: {result['rounds']} rounds, {result['seconds']:.0f} s. Epsilon spent: {spending}."
    )
    console.print(
        f"Each site sent {result['bytes_up_per_site_round'] / 1000:.1f} kB and received "
        f"{result['bytes_down_per_site_round'] / 1000:.1f} kB a round."
    )
    how = {record["summation"] for record in result["round_records"]}
    if how == {"secure_aggregation"}:
        console.print("Updates were masked: the server could open the sum of each round, and nothing else.")
    elif how == {"semi_honest_graph"}:
        console.print(
            "Updates were masked, over a sparse graph: that holds against a server that keeps to the protocol."
        )
    else:
        console.print("Updates were not masked: whoever adds them sees each site's.")
    if result["weakened_by"]:
        console.print(f"This is a simulation, weakened by: {', '.join(result['weakened_by'])}.", style="yellow")
    if result["skipped"]:
        skipped = ", ".join(f"{count} {reason}" for reason, count in result["skipped"].items())
        console.print(f"Rows left out, as the plan says: {skipped}.")
    console.print(f"Adapter, figures and run.json are in {directory}.")
