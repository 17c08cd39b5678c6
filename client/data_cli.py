"""`confide site data …`: register tables, look at them, correct them, and tell others that they are ready."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from confide.client.opening import SITE_DIR, AsJson, NoPassphrase, PassphraseFile, SiteDir, opened, plan_at
from confide.client.terminal import print_json, sentence, spent, table
from confide.common.cli import quiet_libraries
from confide.common.errors import Refused, UsageError
from confide.common.wording import command, several

if TYPE_CHECKING:
    from confide.client.home import Home
    from confide.client.opening import Opened
    from confide.client.policy import Policy
    from confide.client.readiness import Check, Spread
    from confide.common.entries import DataSet
    from confide.common.ledger import Book
    from confide.common.spend import Spend

app = typer.Typer(help="Register tables, look at them, correct them, and tell others that they are ready.")

Name = Annotated[str, typer.Argument(help="What the data set is called: a-z, 0-9 and -.", metavar="NAME")]
PlanFile = Annotated[Path, typer.Argument(help="The plan, a TOML file.", metavar="PLAN")]
PlanGiven = Annotated[
    str, typer.Argument(help="The plan, signed or not; or a run whose plan was shown before.", metavar="PLAN")
]
ModelDir = Annotated[Path | None, typer.Option("--model", help="The base model's local directory.", metavar="DIR")]


@app.command(epilog="Example: confide site data add letters ./letters.csv --person-id patient --plan plan.toml")
def add(
    name: Name,
    table: Annotated[Path, typer.Argument(help="A CSV, JSONL or Parquet file, or a directory.", metavar="TABLE")],
    person_id: Annotated[
        str | None, typer.Option(help="The column that says whose row it is; without it each row is a person.")
    ] = None,
    ids: Annotated[
        str, typer.Option(help="What the identifiers identify; equal ones of another kind are others.", metavar="KIND")
    ] = "person",
    declared: Annotated[
        int | None,
        typer.Option(
            help="How many persons to make public; two digits and zeros, below 100 one, no more than there are.", min=1
        ),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            help="A plan of the usual kind, or a run whose plan was shown; a new budget is then counted as suits it best.",
            metavar="PLAN",
        ),
    ] = None,
    site: SiteDir = SITE_DIR,
    passphrase_file: PassphraseFile = None,
    insecure_no_passphrase: NoPassphrase = False,
    as_json: AsJson = False,
) -> None:
    """Register a table, or the next version of one, under the budget of its persons."""
    with opened(site, passphrase_file, insecure_no_passphrase=insecure_no_passphrase) as vault:
        typical = None if plan is None else _typical(vault.home, plan)
        policy = _decided(vault)
        known = set(vault.journal.book.accounts)
        before = vault.journal.book.data_sets.get(name)
        found = vault.registry.add(
            name, table, person_id, ids, declared, typical=typical, fewest=policy.privacy.fewest_persons
        )
        fresh = [account for account in found.accounts if account not in known]
        left_out, others = vault.registry.left_out_by_others(name)
        book = vault.journal.book
    if as_json:
        elsewhere = {"persons": left_out, "data_sets": list(others)}
        print_json(opened=fresh, withdrawn_elsewhere=elsewhere, **_tree(found, book))
        return
    if before == found:
        sentence(f"{name} is registered as version {found.version} already, and unchanged. Only its path was noted.")
        return
    unit = f"persons, by the column {found.person_id}" if found.person_id else "persons; each row counts as one"
    sentence(f"{name}, version {found.version}: declared with {found.declared_persons} {unit}.")
    for account in found.accounts:
        gate = book.accounts[account].filter
        opened_now = (
            " It was opened now, with the policy's [budget], and keeps that for good." if account in fresh else ""
        )
        sentence(f"It charges account {account}: epsilon {gate.epsilon:g} at delta {gate.delta:g}.{opened_now}")
    if left_out:
        sentence(
            f"{several(left_out, 'person')} of this table withdrew from {' and '.join(others)}; "
            f"{'they are' if left_out > 1 else 'that person is'} left out here too."
        )
    if not person_id:
        sentence("No column of persons was named: somebody with several rows is protected one row at a time.")
    check = command("confide", "site", "data", "check", name, "PLAN")
    typer.echo(f"Next: look at it as a plan would read it: {check}")


@app.command(epilog="Example: confide site data check letters plan.toml --model ./MiniLM")
def check(
    name: Name,
    plan: PlanGiven,
    model: ModelDir = None,
    site: SiteDir = SITE_DIR,
    passphrase_file: PassphraseFile = None,
    insecure_no_passphrase: NoPassphrase = False,
    as_json: AsJson = False,
) -> None:
    """Show what a data set holds as a plan reads it. These are exact numbers about people: they stay here."""
    if model is not None:
        quiet_libraries()
    with opened(site, passphrase_file, insecure_no_passphrase=insecure_no_passphrase) as vault:
        asked = plan_at(plan, vault.home)
        found = vault.registry.check(name, asked, model)
    if as_json:
        told = dataclasses.asdict(found) | {
            "unusable": dict(found.unusable),
            "labels": dict(found.labels),
            **{part: _spread(getattr(found, part)) for part in ("rows_per_person", "characters", "tokens")},
        }
        typer.echo(json.dumps({"status": "ok", "data": name, "plan": asked.digest, **told}))
        return
    for line in _told(name, found):
        sentence(line)
    sentence("These are exact numbers about people. Do not send them on.")


@app.command("list", epilog="Example: confide site data list")
def list_(site: SiteDir = SITE_DIR, as_json: AsJson = False) -> None:
    """Show all data sets, as the ledger has them."""
    from confide.client.home import Home
    from confide.client.journal import Journal

    book = Journal.look(Home.open(site).ledger)
    found = [_tree(entry, book) for entry in book.data_sets.values()]
    if as_json:
        typer.echo(json.dumps({"status": "ok", "data_sets": found}))
        return
    if not found:
        typer.echo("No data set is registered. Register one with: confide site data add")
        return
    table(
        ("data set", "version", "state", "persons declared", "by the column", "accounts"),
        [
            (
                entry.data,
                str(entry.version),
                _state(entry, book),
                str(entry.declared_persons),
                entry.person_id or "(each row)",
                ", ".join(entry.accounts),
            )
            for entry in book.data_sets.values()
        ],
        numbers=("version", "persons declared"),
    )


@app.command(epilog="Example: confide site data withdraw letters --ids-file withdrawn.txt")
def withdraw(
    name: Name,
    ids_file: Annotated[
        Path, typer.Option(help="Who takes back consent: one identifier on each line.", metavar="FILE")
    ],
    anew: Annotated[
        bool, typer.Option("--anew", help="The list of those who withdrew was lost; the file names all of them.")
    ] = False,
    site: SiteDir = SITE_DIR,
    passphrase_file: PassphraseFile = None,
    insecure_no_passphrase: NoPassphrase = False,
    as_json: AsJson = False,
) -> None:
    """Leave persons out from the next round on, for good. What was learned before stays learned."""
    from confide.client.registry import read_identifiers

    identifiers = read_identifiers(ids_file)
    with opened(site, passphrase_file, insecure_no_passphrase=insecure_no_passphrase) as vault:
        found = vault.registry.withdraw(name, identifiers, anew=anew)
    if as_json:
        print_json(
            data=name,
            version=found.data.version,
            persons=found.persons,
            before=found.before,
            unknown=found.unknown,
            others=list(found.others),
            unnamed=list(found.unnamed),
        )
        return
    fresh = found.persons - found.before
    if fresh or anew:
        sentence(
            f"{several(fresh, 'person')} withdrawn from {name}, version {found.data.version}. From the next round on no row of "
            "theirs is read; an agent that runs takes that up by itself."
        )
    if found.before:
        sentence(
            f"{several(found.before, 'person')} had withdrawn from {name} already{'' if fresh else '; nothing changed'}."
        )
    if found.unknown:
        sentence(
            f"{found.unknown} of them {'was never' if found.unknown == 1 else 'were never'} in a table of this site, and "
            f"{'is' if found.unknown == 1 else 'are'} left out should {'that person' if found.unknown == 1 else 'they'} come. Is "
            "there a misspelling?"
        )
    for other in found.others:
        sentence(f"Some of them are in {other} too, and are still used there. To withdraw them there as well:")
        typer.echo(f"  {command('confide', 'site', 'data', 'withdraw', other, '--ids-file', ids_file)}")
    for other in found.unnamed:
        sentence(
            f"Rows of {name} are in {other} too, which has no column of persons, so nobody can be left out there. Register it by "
            "that column, which leaves them out, or take it out of use: confide site data remove"
        )
        typer.echo(
            f"  {command('confide', 'site', 'data', 'add', other, 'TABLE', '--person-id', found.data.person_id)}"
        )
    sentence("What was learned before stays learned, within the epsilon that their account shows.")


@app.command(epilog="Example: confide site data remove letters")
def remove(
    name: Name,
    site: SiteDir = SITE_DIR,
    passphrase_file: PassphraseFile = None,
    insecure_no_passphrase: NoPassphrase = False,
    as_json: AsJson = False,
) -> None:
    """Take a data set out of use. The table is not touched, and its persons' budget stays as it is."""
    with opened(site, passphrase_file, insecure_no_passphrase=insecure_no_passphrase) as vault:
        found = vault.registry.remove(name)
    if as_json:
        typer.echo(json.dumps({"status": "ok", "data": name, "version": found.version}))
        return
    sentence(
        f"{name} cannot be used any more (version {found.version}). Its table is where it was; its persons keep what is left "
        "of their budget, under whatever name they are registered again."
    )


@app.command(epilog="Example: confide site data synthetic plan.toml --persons 1000 --out made-up.csv")
def synthetic(
    plan: PlanFile,
    out: Annotated[Path, typer.Option(help="A .csv or .jsonl file that does not exist yet.", metavar="FILE")],
    persons: Annotated[
        int | None, typer.Option(help="How many persons; twice the plan's min_persons if absent.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Another one gives other rows.", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Write made-up rows in a plan's schema, to try everything without a row of your own."""
    from confide.client.synthetic import write_synthetic

    asked = plan_at(plan)
    _fresh(out)
    count = 2 * asked.privacy.min_persons if persons is None else persons
    write_synthetic(asked, out, count, seed=seed)
    if as_json:
        typer.echo(json.dumps({"status": "ok", "out": str(out), "persons": count, "person_id": asked.data.person_id}))
        return
    column = ("--person-id", asked.data.person_id) if asked.data.person_id else ()
    sentence(f"Wrote rows of {several(count, 'person')} that nobody has to {out}. Nothing can be learned from them.")
    typer.echo(f"Next: {command('confide', 'site', 'data', 'add', 'made-up', out, *column, '--plan', plan)}")


@app.command(epilog="Example: confide site data report letters plan.toml --out ready.json --tell enough-persons")
def report(
    name: Name,
    plan: PlanGiven,
    out: Annotated[Path, typer.Option(help="A file that does not exist yet; it may leave the site.", metavar="FILE")],
    tell: Annotated[
        list[str] | None,
        typer.Option(
            help="A check on rows to tell as pass or fail: readable, enough-persons, every-label or within-cap. May be given "
            "again. One person may decide it, and no noise hides that.",
            metavar="CHECK",
        ),
    ] = None,
    histogram: Annotated[
        bool, typer.Option("--histogram", help="Add a noised histogram of labels, which the budget is charged for.")
    ] = False,
    noise: Annotated[
        float | None,
        typer.Option(help="The histogram's noise, in persons; the policy's smallest if absent.", metavar="SIGMA"),
    ] = None,
    model: ModelDir = None,
    site: SiteDir = SITE_DIR,
    passphrase_file: PassphraseFile = None,
    insecure_no_passphrase: NoPassphrase = False,
    as_json: AsJson = False,
) -> None:
    """Write the readiness report: what is declared, and whether it suits the plan. Of rows it tells what you name."""
    from confide.client.readiness import ROW_CHECKS, readiness_report

    if noise is not None and not histogram:
        raise UsageError("--noise is the histogram's. Give it with --histogram.")
    wanted = tuple(dict.fromkeys(tell or ()))
    if unknown := [check for check in wanted if check not in ROW_CHECKS]:
        raise UsageError(f"--tell {unknown[0]}: there is no such check. There are {', '.join(ROW_CHECKS)}.")
    _fresh(out)
    with opened(site, passphrase_file, insecure_no_passphrase=insecure_no_passphrase) as vault:
        asked, policy = plan_at(plan, vault.home), vault.policy()
        found = vault.registry.check(name, asked, model) if wanted else None
        labels = None
        if histogram:
            sigma = policy.metrics.smallest_noise_multiplier if noise is None else noise
            labels = vault.registry.release_labels(name, asked, noise_multiplier=sigma, metrics=policy.metrics)
        told = readiness_report(vault.journal.book.data_set(name), asked, check=found, tell=wanted, labels=labels)
    out.write_bytes(told + b"\n")
    if as_json:
        typer.echo(json.dumps({"status": "ok", "out": str(out), "report": json.loads(told)}))
        return
    for check, result in json.loads(told)["checks"].items():
        typer.echo(f"{result:>4}  {check}")
    if labels is not None:
        sentence(
            f"The histogram has noise of {labels.noise_multiplier:g} persons. It costs each person epsilon "
            f"{spent(labels.epsilon)} by itself, and was charged to the accounts of {name}."
        )
    typer.echo(f"Wrote {out}. It may leave the site; what it tells, and nothing else, is in it.")


def _decided(vault: "Opened") -> "Policy":
    """Return the policy if somebody has decided what persons may lose: an account keeps the budget that it is opened with.

    Raises:
        Refused: The policy is still the one that `confide site init` wrote.
    """
    from confide.client.policy import load_policy, read_policy, starter

    if load_policy(vault.home.policy) == read_policy(starter(vault.home.site).encode()):
        raise Refused(
            f"The policy {vault.home.policy} is still the one that was written for a new site, so nobody has decided what "
            "persons may lose; a budget that is opened now would stay as it stands there. Edit [budget] and the rest first.",
            "budget",
        )
    return vault.policy()  # what it says of budgets is in the ledger before an account is opened


def _typical(home: "Home", plan: str) -> "Spend":
    from confide.common.accounting import planned_spend

    return planned_spend(plan_at(plan, home).privacy)


def _tree(entry: "DataSet", book: "Book") -> dict[str, object]:
    return {
        "data": entry.data,
        "version": entry.version,
        "state": _state(entry, book),
        "declared_persons": entry.declared_persons,
        "person_id": entry.person_id,
        "ids": entry.ids,
        "accounts": list(entry.accounts),
    }


def _state(entry: "DataSet", book: "Book") -> str:
    if entry.data in book.lost_data_sets:
        return "lost"
    return "removed" if entry.event == "remove" else "in use"


def _told(name: str, found: "Check") -> Iterable[str]:
    """Yield what a check found, for a terminal."""
    yield f"{name}: {several(found.rows, 'row')}, of which the plan can use {found.usable}, of {several(found.persons, 'person')}."
    if found.withdrawn:
        yield f"  {several(found.withdrawn, 'row is', 'rows are')} left out: their persons took back their consent."
    if found.repeated:
        yield f"  {several(found.repeated, 'row holds', 'rows hold')} exactly what an earlier one holds."
    for reason, count in found.unusable.items():
        yield f"  {several(count, 'row is', 'rows are')} of no use: {reason}."
    if any(found.beyond_cap):
        persons, rows = found.beyond_cap
        yield (
            f"  {several(persons, 'person has', 'persons have')} more rows than the plan takes; "
            f"{several(rows, 'row is', 'rows are')} left out."
        )
    for what, spread in (
        ("rows of a person", found.rows_per_person),
        ("characters", found.characters),
        ("tokens", found.tokens),
    ):
        if spread is not None:
            yield (
                f"  {what}: {spread.least} to {spread.most}, half of them up to {spread.median}, nine in ten up to "
                f"{spread.ninth_decile}."
            )
    if found.cut_off:
        yield f"  {found.cut_off:.1%} of the texts are longer than the plan reads, and are cut off."
    if found.labels:
        yield f"  labels: {_listed(found.labels)}."
    yield from (f"! {fault}" for fault in found.faults)
    if not found.faults:
        yield "Nothing stands in the plan's way."


def _spread(spread: "Spread | None") -> dict[str, int] | None:
    return None if spread is None else spread._asdict()


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{label} {count}" for label, count in counts.items())


def _fresh(out: Path) -> None:
    if out.exists():
        raise UsageError(f"{out} exists and is left as it is. Give another --out.")
