"""The ledgers of simulated sites: real ones, under a policy that allows the plan and nothing else.

Nobody approves anything in a simulation; the approval in such a ledger is signed by a key that is made from the site's own.
The words that say so stand in the policy: `insecure_one_process`, and those for noise from a seed and for sums that nothing
hides.
"""

import secrets
from pathlib import Path

from confide.client.home import write_private
from confide.client.journal import Journal
from confide.common.accounting import planned_spend
from confide.common.calibration import noise_multiplier
from confide.common.canonical import canonical_bytes, sha256
from confide.common.crypto import KEY_BYTES, Entropy, Identity, derive
from confide.common.entries import SEEDED, AccountOpened, Approval, DataSet, PolicyInForce, utc_text
from confide.common.errors import PrivacyError, RunError
from confide.common.filter import MOST_EPSILON, Filter, best_order
from confide.common.plan import Plan, Privacy
from confide.common.spend import Spend
from confide.server.publish import ONE_PROCESS
from confide.simulations.insecure import PLAIN_SUM

_SECRET = "secret"  # noqa: S105  a file's name
_LAST = 253_402_300_799  # the end of the year 9999
_ROOM = 1e-6  # of the budget, for the last digits of sums


def open_ledger(
    path: Path | None, *, site: str, identity: Identity, plan: Plan, run: str, declared_persons: int
) -> Journal:
    """Return the ledger at `path`, made if absent, in which the plan's run is approved and has just room.

    A further run of a simulated site gets an account of its own: its persons are as many as anybody likes.

    Args:
        path: The file; None keeps the ledger in memory only.
        site: The site's name.
        identity: Signs its checkpoints.
        plan: The plan.
        run: The run's name.
        declared_persons: N.

    Raises:
        PrivacyError: The plan asks for more than any budget allows.
        LedgerError: The file is damaged, or another key's.
    """
    if path is not None and path.exists():
        journal = Journal.open(path, identity=identity)
    else:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        journal = Journal.create(path, site=site, identity=identity)
    known = (standing.approval for standing in journal.book.approvals)
    if (plan.digest, run) not in {(approval.plan, approval.run) for approval in known}:
        _allow(journal, identity, plan, run, declared_persons)
    return journal


def _allow(journal: Journal, identity: Identity, plan: Plan, run: str, declared_persons: int) -> None:
    """Put a policy in force that allows the plan, and approve its run on rows that are charged to a new account."""
    steward = Identity(derive(identity.seed(), b"confide simulated steward\n"))
    privacy = plan.privacy
    budget = _budget(privacy)
    account = str(len(journal.book.accounts) + 1)
    journal.append(
        PolicyInForce(
            digest=sha256(canonical_bytes({"simulated": plan.digest})),
            epsilon=budget.epsilon,
            delta=budget.delta,
            plan_epsilon=privacy.epsilon,
            plan_delta=privacy.delta,
            approvals_needed=1,
            approvers=(steward.public.hex(),),
            most_days=10**7,
            renewal_days=0,
            most_renewals=0,
            release_noise=0.0,
            words=(ONE_PROCESS, SEEDED, PLAIN_SUM),
        ),
        AccountOpened(account=account, epsilon=budget.epsilon, delta=budget.delta, order=budget.order),
        DataSet(
            data=rows_of(run),
            version=1,
            event="add",
            fingerprint=derive(identity.seed(), b"confide simulated rows\n").hex(),
            declared_persons=declared_persons,
            person_id="",
            ids="",
            accounts=(account,),
        ),
        Approval(
            ledger=journal.book.ledger,
            plan=plan.digest,
            name=plan.name,
            run=run,
            federation="",
            data=rows_of(run),
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            sampling_rate=privacy.sampling_rate,
            noise_multiplier=noise_multiplier(privacy),
            clip_norm=privacy.clip_norm,
            steps_per_round=privacy.steps_per_round,
            rounds=privacy.rounds,
            divisor=privacy.sampling_rate * declared_persons,
            by="nobody: a simulation",
            key=steward.public.hex(),
            expires=utc_text(_LAST),
            nonce=secrets.token_hex(16),
        ).signed(steward),
    )


def rows_of(run: str) -> str:
    """Return what a simulated site's data set of a run is called."""
    return f"rows of {run}"


def kept_entropy(folder: Path) -> Entropy:
    """Return a source that gives the same bytes each time this folder's run goes on: its sites keep their keys.

    Raises:
        RunError: What the folder holds is no secret of a simulation's.
    """
    path = folder / _SECRET
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_private(path, Identity.generate().seed())
    secret = path.read_bytes()
    if len(secret) != KEY_BYTES:
        raise RunError(f"{path} has {len(secret)} bytes, and must have {KEY_BYTES}. Begin the simulation anew.")
    drawn = 0

    def entropy(count: int) -> bytes:
        nonlocal drawn
        drawn += 1
        return derive(secret, f"confide simulated key {drawn}\n".encode(), count)

    return entropy


def _budget(privacy: Privacy) -> Filter:
    """Return the budget that has room for the plan once."""
    order = best_order(privacy)
    rounds: list[Spend] = [planned_spend(privacy)] * privacy.rounds
    used = Filter(epsilon=MOST_EPSILON, delta=privacy.delta, order=order).after(rounds).used * (1 + _ROOM)
    if used > MOST_EPSILON:
        raise PrivacyError(
            f"A plan of epsilon {privacy.epsilon:g} costs {used:.3g} in a Rényi filter; a budget has at most {MOST_EPSILON:g}. "
            "Lower [privacy] epsilon."
        )
    return Filter(epsilon=used, delta=privacy.delta, order=order)
