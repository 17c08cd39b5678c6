"""`confide site plan …` and `confide site policy …`: what a site's owner allows, and what somebody there approves."""

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from confide.client.opening import SITE_DIR, AsJson, NoPassphrase, PassphraseFile, SiteDir, opened
from confide.client.signing import (
    KeyFile,
    KeyPassphraseFile,
    NoKeyPassphrase,
    SignsAs,
    person_here,
    reason_given,
    signer,
)
from confide.client.terminal import facts, minute, paragraphs, print_json, sentence, spent, table
from confide.common.errors import UsageError
from confide.common.wording import command, plain, several

if TYPE_CHECKING:
    from confide.client.home import Home
    from confide.common.accounting import Cost
    from confide.common.entries import PolicyInForce
    from confide.common.ledger import Book
    from confide.common.plan import Plan
    from confide.common.signed_plan import SignedPlan

plan_app = typer.Typer(help="Read the plans of a federation, approve them, and take an approval back.")
policy_app = typer.Typer(help="Write, check and put in force what this site allows.")

PlanGiven = Annotated[
    str,
    typer.Argument(help="A plan signed by its coordinator; or a run whose plan was shown before.", metavar="PLAN"),
]
Data = Annotated[
    str | None, typer.Option(help="The data set it would use; not needed if there is only one.", metavar="NAME")
]
ModelDir = Annotated[
    Path | None, typer.Option("--model", help="The base model's local directory, to compare its files.", metavar="DIR")
]


@plan_app.command(epilog="Example: confide site plan show spring.plan --data letters")
def show(
    plan: PlanGiven,
    data: Data = None,
    model: ModelDir = None,
    site: SiteDir = SITE_DIR,
    as_json: AsJson = False,
) -> None:
    """Say what a plan does, what the policy says to it, what it would cost here, and who approved it so far.

    The plan's signature is checked, and a copy is kept, so that later commands may name its run. No passphrase is needed.
    """
    from confide.client.case import Case
    from confide.client.home import Home
    from confide.client.journal import Journal
    from confide.client.judgement import policy_of
    from confide.client.received import keep, receive

    home = Home.open(site)
    received = receive(home, plan)
    book, policy = Journal.look(home.ledger), policy_of(home)
    copy = keep(home, received)
    now = book.now(time.time())
    case = Case.of(policy, book, received, data, model, now)
    sections = case.sections(model, now)
    if as_json:
        approvals = [{"by": each.by, "until": each.expires} for each in case.approvals]
        print_json(
            **case.tree(),
            copy=str(copy),
            approvals=approvals,
            signatures_missing=case.missing,
            sections={heading: list(told) for heading, told in sections},
        )
        return
    signed = received.signed
    typer.secho(f"Plan {plain(signed.plan.name)}", bold=True)
    facts([("digest", signed.digest), ("run", signed.run), ("federation", signed.federation), ("kept as", str(copy))])
    paragraphs(sections)


@plan_app.command(epilog="Example: confide site plan diff summer.plan spring")
def diff(
    new: Annotated[str, typer.Argument(help="A signed plan, or a run whose plan was shown before.", metavar="PLAN")],
    old: Annotated[
        str | None,
        typer.Argument(
            help="The one to compare it with; the last approved one of its name or run if absent.", metavar="OLD"
        ),
    ] = None,
    site: SiteDir = SITE_DIR,
    as_json: AsJson = False,
) -> None:
    """Show in which settings a plan differs from another, or from what was approved last, and how its price differs."""
    from confide.client.home import Home
    from confide.client.received import receive
    from confide.common.accounting import planned_cost
    from confide.common.plan import differences

    home = Home.open(site)
    now = receive(home, new).signed
    before = _approved_before(home, now) if old is None else receive(home, old).signed.plan
    rows = differences(before, now.plan)
    costs = [_cost(name, planned_cost(which.privacy), which) for name, which in (("old", before), ("new", now.plan))]
    if as_json:
        print_json(
            same_digest=before.digest == now.digest,
            old=before.digest,
            new=now.digest,
            differences=[{"key": key, "old": old_value, "new": new_value} for key, old_value, new_value in rows],
            price=dict(costs),
        )
        return
    facts([("old", f"{before.name}  {before.digest}"), ("new", f"{now.plan.name}  {now.digest}")])
    typer.echo()
    for key, old_value, new_value in rows:
        typer.echo(f"{key}\n  - {plain(old_value)}\n  + {plain(new_value)}")
    same = (
        "the same digest. An approval is for one run: confide site plan list shows which are approved"
        if before.digest == now.digest
        else "different digests: it needs approval"
    )
    sentence(f"{several(len(rows), 'difference')}; {same}.")
    typer.echo()
    (_, was), (_, is_now) = costs
    table(
        ("epsilon of the whole run", "old", "new"),
        [(_COSTS[key], spent(was[key]), spent(is_now[key])) for key in _COSTS],
        numbers=("old", "new"),
    )


@plan_app.command(epilog="Example: confide site plan approve spring --data letters --key anna.pem --days 30")
def approve(
    plan: PlanGiven,
    key: KeyFile,
    data: Data = None,
    signs_as: SignsAs = None,
    days: Annotated[
        int | None,
        typer.Option(
            help="For how many days it holds; as many as the policy allows if absent. One in force is prolonged only if this is "
            "given.",
            metavar="N",
        ),
    ] = None,
    model: ModelDir = None,
    key_passphrase_file: KeyPassphraseFile = None,
    insecure_no_key_passphrase: NoKeyPassphrase = False,
    site: SiteDir = SITE_DIR,
    passphrase_file: PassphraseFile = None,
    insecure_no_passphrase: NoPassphrase = False,
    as_json: AsJson = False,
) -> None:
    """Approve a plan for one run on one data set, with the key of a person whom the policy names; the ledger records it.

    Nothing is signed that the policy refuses or the budget has no room for, or that this person approved already, unless for
    longer by --days. Read the plan before: confide site plan show
    """
    from confide.client.approval import approve as sign
    from confide.client.approval import in_words
    from confide.client.case import UNSEEN, Case
    from confide.client.received import keep, receive

    with opened(site, passphrase_file, insecure_no_passphrase=insecure_no_passphrase) as vault:
        received = receive(vault.home, plan)
        policy, book = vault.policy(), vault.journal.book
        now = book.now(time.time())
        case = Case.of(policy, book, received, data, model, now)
        person = signer(key, key_passphrase_file, signs_as, insecure_no_passphrase=insecure_no_key_passphrase)
        approval = sign(
            policy,
            case.need_terms(),
            case.refusals,
            approver=person.identity,
            now=now,
            days=policy.approval.most_days if days is None else days,
        )
        if signs_as not in {None, approval.by}:
            raise UsageError(
                f"The policy has this key for {approval.by!r}, not for {signs_as!r}. Correct one of the two."
            )
        before = next((each for each in case.approvals if each.key == approval.key), None)
        already = before is not None and (days is None or approval.expires <= before.expires)
        if before is not None and already:
            approval = before
        else:
            vault.journal.append(approval)
        keep(vault.home, received)
        case = Case.of(policy, book, received, approval.data, model, now)
    if as_json:
        print_json(
            run=approval.run,
            plan=approval.plan,
            data=approval.data,
            by=approval.by,
            until=approval.expires,
            recorded=not already,
            signatures_missing=case.missing,
            base_files_compared=case.compared,
        )
        return
    if already:
        sentence(
            f"{approval.by} approved this plan for the run {approval.run} on {approval.data} already, until {approval.expires}, so "
            f"nothing was recorded. {in_words(policy, case.approvals)}"
        )
        return
    enough = "One person's approval is enough; an agent may serve it."
    sentence(
        f"{approval.by} approved the plan {approval.name} for the run {approval.run} on {approval.data}, until "
        f"{approval.expires}. {enough if len(case.approvals) == 1 and not case.missing else in_words(policy, case.approvals)}"
    )
    if not case.compared:
        sentence(f"{UNSEEN} An agent compares them before it starts.")


@plan_app.command(epilog='Example: confide site plan revoke spring --reason "A patient objected."')
def revoke(
    run: Annotated[str, typer.Argument(help="The run's name.", metavar="RUN")],
    reason: Annotated[str, typer.Option(help="Why, for the ledger.", metavar="TEXT")],
    name: Annotated[
        str | None, typer.Option("--as", help="Who revokes; this machine's user if absent.", metavar="NAME")
    ] = None,
    site: SiteDir = SITE_DIR,
    passphrase_file: PassphraseFile = None,
    insecure_no_passphrase: NoPassphrase = False,
    as_json: AsJson = False,
) -> None:
    """End every approval of a run. Its next exchange does not begin; what was sent before stays sent, and spent."""
    from confide.client.approval import revoke as revocation

    why = reason_given(reason)
    with opened(site, passphrase_file, insecure_no_passphrase=insecure_no_passphrase) as vault:
        held = [
            standing.approval
            for standing in vault.journal.book.approvals
            if standing.approval.run == run and not standing.revoked
        ]
        if not held:
            runs = sorted({each.approval.run for each in vault.journal.book.approvals if not each.revoked})
            raise UsageError(
                f"No approval of a run {run!r} is recorded that was not revoked. Approved are: {', '.join(runs) or 'none'}."
            )
        plans = dict.fromkeys(approval.plan for approval in held)
        by = person_here(name)
        vault.journal.append(*(revocation(digest, run, by=by, reason=why) for digest in plans))
    if as_json:
        print_json(run=run, plans=list(plans), approvals=len(held), by=by)
        return
    sentence(
        f"Revoked {several(len(held), 'approval')} of the run {run}. No exchange of it begins from now on; what was sent stays "
        "sent, and what was spent stays spent."
    )


@plan_app.command("list", epilog="Example: confide site plan list")
def list_runs(site: SiteDir = SITE_DIR, as_json: AsJson = False) -> None:
    """List the runs that were approved or shown here: their state, their rounds, and what they cost so far."""
    from confide.client.home import Home
    from confide.client.journal import Journal
    from confide.client.received import kept_runs
    from confide.client.standing import SiteStanding
    from confide.common.entries import utc_text

    home = Home.open(site)
    book = Journal.look(home.ledger)
    standing = SiteStanding.of(book, book.now(time.time()))
    rows = [
        {
            "run": run.run,
            "plan": run.name,
            "digest": run.plan,
            "data": run.data,
            "state": "approved" if run.until is not None else run.why,
            "until": None if run.until is None else utc_text(run.until),
            "begun": run.begun,
            "rounds": run.rounds,
            "to_come": run.to_come,
            "charged": max(
                (
                    charge.total
                    for account in standing.accounts
                    for charge in account.charges
                    if charge.what == f"run {run.run}"
                ),
                default=0.0,
            ),
        }
        for run in standing.runs
    ]
    known = {run.run for run in standing.runs}
    shown = [run for run in kept_runs(home) if run not in known]
    if as_json:
        print_json(runs=rows, not_approved=shown)
        return
    if not rows and not shown:
        sentence("No plan was shown or approved here yet. Begin with: confide site plan show FILE")
        return
    table(
        ("run", "plan", "data", "rounds", "charged", "state (UTC)"),
        [
            *(
                (
                    str(row["run"]),
                    str(row["plan"]),
                    str(row["data"]),
                    f"{row['begun']} of {row['rounds']}",
                    spent(float(str(row["charged"]))),
                    f"approved until {minute(str(row['until']))}" if row["until"] else str(row["state"]),
                )
                for row in rows
            ),
            *((run, "", "", "", "", "not approved") for run in shown),
        ],
        numbers=("rounds", "charged"),
    )
    if any(row["begun"] for row in rows):
        sentence(
            "What is charged to an account adds up; the counting itself takes some more of it, once. In all: confide site budget"
        )


@policy_app.command(epilog="Example: confide site policy new --for spring.plan --out policy.new.toml")
def new(
    wanted: Annotated[
        str | None,
        typer.Option(
            "--for", help="A plan, signed or not, or a shown run: the narrowest policy that allows it.", metavar="PLAN"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write; standard output if absent.", metavar="FILE")] = None,
    site: SiteDir = SITE_DIR,
    as_json: AsJson = False,
) -> None:
    """Write a commented policy: one that allows nothing, or with --for the narrowest one that allows a plan.

    What is there is never replaced. Read it line by line before you keep it.
    """
    from confide.client.home import Home, write_private
    from confide.client.policy import read_policy, starter

    home = Home.open(site)
    text = starter(home.site) if wanted is None else _narrowest(home, wanted)
    found = read_policy(text.encode())
    if out is not None:
        try:
            write_private(out, text.encode())
        except FileExistsError:
            raise UsageError(f"{out} exists and is left as it is. Give another --out.") from None
    if as_json:
        print_json(digest=found.digest, file=None if out is None else str(out), policy=text)
    elif out is None:
        typer.echo(text, nl=False)
    else:
        sentence(f"Wrote {out}. Read it line by line, and change it.")
        typer.echo(f"Next: see what it allows: {command('confide', 'site', 'policy', 'check', out)}")


@policy_app.command(epilog="Example: confide site policy check")
def check(
    file: Annotated[
        Path | None, typer.Argument(help="A policy; the site's own if absent.", metavar="FILE", show_default=False)
    ] = None,
    site: SiteDir = SITE_DIR,
    as_json: AsJson = False,
) -> None:
    """Read a policy, and say in sentences what it allows and whether it is in force."""
    from confide.client.enrolment import federations
    from confide.client.home import Home
    from confide.client.journal import Journal
    from confide.client.permission import gaps, permission, strangers
    from confide.client.policy import load_policy

    home = Home.open(site)
    path = home.policy if file is None else file
    policy, force = load_policy(path), Journal.look(home.ledger).policy
    if policy.site != home.site:
        raise UsageError(f"The policy {path} is for the site {policy.site!r}, and this is {home.site!r}.")
    missing, in_force = gaps(policy), force == policy.in_force()
    notes = strangers(policy, federations(home))
    if as_json:
        print_json(
            policy=str(path),
            digest=policy.digest,
            in_force=in_force,
            missing=missing,
            notes=notes,
            sections=dict(permission(policy)),
        )
        return
    sentence(f"The policy {path} is well-formed.")
    facts([("digest", policy.digest), ("in force", "yes" if in_force else "no")])
    paragraphs(permission(policy))
    if missing:
        paragraphs([("What is missing, so that no plan can run", missing)])
    if notes:
        paragraphs([("What to look at", notes)])
    if not in_force:
        typer.echo()
        sentence("It is not in force yet. " + _into_force(home, path))


@policy_app.command(epilog="Example: confide site policy apply")
def apply(
    site: SiteDir = SITE_DIR,
    passphrase_file: PassphraseFile = None,
    insecure_no_passphrase: NoPassphrase = False,
    as_json: AsJson = False,
) -> None:
    """Put the site's policy in force: from here on the ledger judges by it, and says so.

    An agent does the same before every exchange, so this is for telling at once what follows from a change.
    """
    with opened(site, passphrase_file, insecure_no_passphrase=insecure_no_passphrase) as vault:
        book = vault.journal.book
        now = math.floor(book.now(time.time()))
        before, approved = book.policy, _approved(book, now)
        policy = vault.policy()
        after, stopped = book.policy, sorted(approved - _approved(book, now))
        record = book.size
    changed = before != after
    changes = _changes(before, after)
    if as_json:
        print_json(
            digest=policy.digest, changed=changed, record=record if changed else None, changes=changes, stopped=stopped
        )
        return
    if not changed:
        sentence("This policy was in force already.")
        return
    sentence(f"The policy {policy.digest} is in force, by record {record} of the ledger.")
    for key, (was, is_now) in changes.items():
        typer.echo(f"{key}\n  - {was}\n  + {is_now}")
    if stopped:
        sentence(f"No longer approved under it: {', '.join(stopped)}.")


_COSTS = {"asked": "asked for", "declared": "run as declared", "charged": "as a budget is charged"}


def _approved_before(home: "Home", signed: "SignedPlan") -> "Plan":
    """Return the plan of the newest approval of the same name or run, of another plan if there is one, and not its own."""
    from confide.client.journal import Journal
    from confide.client.received import kept_plan

    plan, run = signed.plan, signed.run
    approvals = [
        standing.approval
        for standing in Journal.look(home.ledger).approvals
        if plan.name == standing.approval.name or run == standing.approval.run
    ]
    earlier = [approval for approval in approvals if (approval.plan, approval.run) != (plan.digest, run)]
    others = [approval for approval in earlier if approval.plan != plan.digest] or earlier
    if approvals and not others:
        raise UsageError(
            f"There is no earlier approved plan to compare with: of those called {plan.name!r} or for the run {run!r}, only this "
            "one was approved here. Name the one to compare with."
        )
    if not others:
        raise UsageError(
            f"No plan called {plan.name!r}, and none for the run {run!r}, was approved here. Name the one to compare with."
        )
    last = others[-1]
    found = kept_plan(home, last.plan)
    if found is None:
        raise UsageError(
            f"The plan that was approved last, {last.plan}, is not kept here. Name its signed file as the second argument."
        )
    return found


def _cost(name: str, cost: "Cost", plan: "Plan") -> tuple[str, dict[str, float]]:
    return name, {"asked": plan.privacy.epsilon, "declared": cost.declared, "charged": cost.adaptive}


def _narrowest(home: "Home", wanted: str) -> str:
    from confide.client.judgement import starter_for
    from confide.client.received import receive
    from confide.common.plan import load_plan

    if wanted.endswith(".toml"):
        return starter_for(load_plan(Path(wanted)), home.site, (), _known_approvers(home))
    signed = receive(home, wanted).signed
    return starter_for(signed.plan, home.site, [signed.federation], _known_approvers(home))


def _known_approvers(home: "Home") -> tuple[str, ...]:
    """Return those whom the policy on disk names, or whose key files lie in the site's directory."""
    from confide.client.keys import approver_in_file
    from confide.client.policy import approver_entry, load_policy

    try:
        named = load_policy(home.policy).approval.approvers
    except UsageError:
        named = ()
    return named or tuple(approver_entry(*approver_in_file(path)) for path in sorted(home.approvers.glob("*.pem")))


def _into_force(home: "Home", path: Path) -> str:
    if path.absolute() != home.policy.absolute():
        return f"Put it in the place of {home.policy}, mode 0600, and run: confide site policy apply"
    return "An agent puts it in force before its next exchange; at once does: confide site policy apply"


def _approved(book: "Book", now: int) -> set[str]:
    """Return what is approved now, each as `RUN on DATA`."""
    approvals = [standing.approval for standing in book.approvals]
    return {
        f"{approval.run} on {approval.data}"
        for approval in approvals
        if book.in_force(approval.plan, approval.run, approval.data, now) is not None
    }


def _changes(before: "PolicyInForce | None", after: "PolicyInForce | None") -> dict[str, tuple[str, str]]:
    """Return what differs in what the ledger knows of two policies; most of a policy it knows by the digest only."""

    def told(policy: "PolicyInForce | None") -> Mapping[str, Any]:
        return {} if policy is None else dataclasses.asdict(policy)

    was, is_now = told(before), told(after)
    return {
        key: (_spelled(was.get(key, "nothing")), _spelled(value))
        for key, value in is_now.items()
        if was.get(key) != value
    }


def _spelled(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
