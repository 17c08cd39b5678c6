"""What a site spent, what it has left and how far its runs are: what follows from its ledger, as numbers for people.

Nothing here decides anything. `common/ledger` does, by the same filters, and it counts in full what was reserved.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from confide.common.entries import Approval, utc_seconds
from confide.common.errors import Refused
from confide.common.filter import Filter
from confide.common.ledger import CLOSED, FORFEITED, REFUNDED, Account, Book, Round
from confide.common.spend import Spend

MOST_ROUNDS: Final = 1_000_000  # of what fits; more are told as so many
_ROUNDING = 1e-9  # relative; more than what adding up a million rounds one by one can come to


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """What one thing took of an account.

    Attributes:
        what: A run's name with the word `run` before it, or `noised statistics`.
        count: How many of its rounds, or how many statistics, were charged in all periods.
        now: Epsilon in the present period. What several things take adds up, and the account's conversion comes once
            beside it.
        total: Epsilon in all periods.
    """

    what: str
    count: int
    now: float
    total: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AccountStanding:
    """A budget and what became of it.

    Attributes:
        account: Its number.
        data: The data sets in use that charge it.
        epsilon: The limit of a period.
        delta: Of that.
        order: The Rényi order by which it is counted.
        period: Which one it is in, from 1.
        began: When that began, in seconds since 1970 UTC.
        used: Epsilon used in it.
        left: Epsilon left in it. A budget that nothing was taken from has `conversion` less than its limit left.
        conversion: What turning divergences into epsilon takes, once in each period.
        total: Epsilon of all periods together.
        incomplete: Whether a ledger that was lost may hold more than is counted here.
        charges: What took how much.
    """

    account: str
    data: tuple[str, ...]
    epsilon: float
    delta: float
    order: int
    period: int
    began: int
    used: float
    left: float
    conversion: float
    total: float
    incomplete: bool
    charges: tuple[Charge, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunStanding:
    """A run that somebody approved, on one data set, and how far it is.

    Attributes:
        run: Its name.
        plan: The plan's digest.
        name: The plan's name.
        federation: The federation's name.
        data: The data set.
        rounds: How many rounds are approved.
        begun: How many were begun.
        lost: How many of these came to nothing. They count all the same, but for steps that touched no row.
        last: The last round that was begun; 0 before the first. Rounds never go back.
        until: When it ends to be approved, in seconds since 1970 UTC; None if it is not approved now.
        why: Why it is not: `the ledger was recovered`, `the data set was removed`, `revoked`, `expired`, `signatures are
            missing`, `the policy does not cover it`; else empty.
        fits: How many more rounds like its own the accounts of the data set have room for, whatever is approved.
    """

    run: str
    plan: str
    name: str
    federation: str
    data: str
    rounds: int
    begun: int
    lost: int
    last: int
    until: int | None
    why: str
    fits: int

    @property
    def to_come(self) -> int:
        """How many rounds may still come: those after the last one, as far as they are approved and fit."""
        return 0 if self.until is None else min(self.rounds - self.last, self.fits)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SiteStanding:
    """What a site's ledger says of its budgets and runs.

    Attributes:
        site: The site's name.
        ledger: The ledger's id.
        records: How many it has.
        at: When the last was written, in seconds since 1970 UTC.
        accounts: In the order of their numbers.
        runs: In the order in which they were approved first.
    """

    site: str
    ledger: str
    records: int
    at: int
    accounts: tuple[AccountStanding, ...]
    runs: tuple[RunStanding, ...]

    @classmethod
    def of(cls, book: Book, now: float) -> "SiteStanding":
        """Return how a site stands.

        Args:
            book: What its ledger's records lead to.
            now: Seconds since 1970 UTC; approvals hold until then.
        """
        first: dict[tuple[str, str, str], Approval] = {}
        for standing in book.approvals:
            approval = standing.approval
            first.setdefault((approval.run, approval.plan, approval.data), approval)
        return cls(
            site=book.site,
            ledger=book.ledger,
            records=book.size,
            at=book.at,
            accounts=tuple(_account(book, account) for account in book.accounts.values()),
            runs=tuple(_run(book, approval, math.floor(now)) for approval in first.values()),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """How an account stood after a record that changed it.

    Attributes:
        record: The record's number.
        at: Seconds since 1970 UTC.
        account: The account's number.
        period: The period it was in then.
        kind: The record's kind, such as `reserve`.
        run: Whose round it was, if it was a run's.
        epsilon: The limit.
        used: Epsilon used in that period.
        left: Epsilon left in it.
    """

    record: int
    at: int
    account: str
    period: int
    kind: str
    run: str
    epsilon: float
    used: float
    left: float


def course(lines: Iterable[bytes]) -> tuple[Point, ...]:
    """Return how the accounts of a ledger stood after each record that changed one of them.

    Args:
        lines: The ledger's records, without line breaks.

    Raises:
        LedgerError: They do not hold.
    """
    book, points, before = Book(), list[Point](), dict[str, Account]()
    for line in lines:
        entry = book.take(line)
        for name, account in book.accounts.items():
            if before.get(name) is not account:
                before[name] = account
                points.append(
                    Point(
                        record=book.size,
                        at=book.at,
                        account=name,
                        period=account.period,
                        kind=entry.kind,
                        run=getattr(entry, "run", ""),
                        epsilon=account.filter.epsilon,
                        used=account.used,
                        left=account.left,
                    )
                )
    return tuple(points)


def rounds_that_fit(gate: Filter, spend: Spend) -> int:
    """Return how many more spends like this one a filter lets through, at most MOST_ROUNDS."""
    each = _alone(gate, spend) * (1 + _ROUNDING)
    if not each:
        return MOST_ROUNDS
    return min(MOST_ROUNDS, math.floor(max(0.0, gate.left) / each)) if math.isfinite(each) else 0


def _account(book: Book, account: Account) -> AccountStanding:
    gate = book.gate(account.account)
    return AccountStanding(
        account=account.account,
        data=tuple(name for name in book.data_sets if account.account in _accounts(book, name)),
        epsilon=gate.epsilon,
        delta=gate.delta,
        order=gate.order,
        period=account.period,
        began=account.began,
        used=account.used,
        left=max(0.0, gate.left),
        conversion=gate.epsilon - gate.room,
        total=account.total,
        incomplete=account.incomplete,
        charges=tuple(_charges(book, account)),
    )


def _charges(book: Book, account: Account) -> list[Charge]:
    number, gate = account.account, account.filter
    found, of_runs = [], {period: Counter[Spend]() for period in (None, account.period)}
    for run in book.runs:
        spends: dict[int | None, list[Spend]] = {period: [] for period in of_runs}
        for entry in book.rounds(run).values():
            if entry.spend is not None and number in entry.reserve.accounts:
                spends[None].append(entry.spend)
                if _period(entry, number) == account.period:
                    spends[account.period].append(entry.spend)
        for period, several in spends.items():
            of_runs[period].update(several)
        if spends[None]:
            found.append(_charge(gate, f"run {run}", spends[account.period], spends[None]))
    released = {
        period: list((Counter(book.charged(number, period)) - counted).elements())
        for period, counted in of_runs.items()
    }
    if released[None]:
        found.append(_charge(gate, "noised statistics", released[account.period], released[None]))
    return found


def _charge(gate: Filter, what: str, now: list[Spend], total: list[Spend]) -> Charge:
    return Charge(
        what=what,
        count=len(total),
        now=math.fsum(_alone(gate, spend) for spend in now),
        total=math.fsum(_alone(gate, spend) for spend in total),
    )


def _period(entry: Round, account: str) -> int:
    return entry.periods[entry.reserve.accounts.index(account)]


def _run(book: Book, approval: Approval, now: int) -> RunStanding:
    rounds = {
        number: entry for number, entry in book.rounds(approval.run).items() if entry.reserve.plan == approval.plan
    }
    covering = book.in_force(approval.plan, approval.run, approval.data, now)
    spend = _spend(approval if covering is None else covering)
    gates = [book.gate(account) for account in _accounts(book, approval.data)]
    return RunStanding(
        run=approval.run,
        plan=approval.plan,
        name=approval.name,
        federation=approval.federation,
        data=approval.data,
        rounds=approval.rounds,
        begun=len(rounds),
        lost=sum(entry.state in {FORFEITED, REFUNDED, CLOSED} for entry in rounds.values()),
        last=max(rounds, default=0),
        until=None if covering is None else _until(book, covering, now),
        why="" if covering is not None else _why(book, approval, now),
        fits=min((rounds_that_fit(gate, spend) for gate in gates), default=0),
    )


def _until(book: Book, covering: Approval, now: int) -> int:
    """Return when too few of the approvals that agree with this one are left."""
    assert book.policy is not None  # nothing is in force without one
    last: dict[str, int] = {}
    for approval in (standing.approval for standing in book.approvals if not standing.revoked):
        ends = utc_seconds(approval.expires)
        if approval.terms == covering.terms and approval.key in book.policy.approvers and ends > now:
            last[approval.key] = max(last.get(approval.key, 0), ends)
    return sorted(last.values(), reverse=True)[book.policy.approvals_needed - 1]


def _why(book: Book, approval: Approval, now: int) -> str:
    """Return why a run is not approved."""
    several = [
        standing
        for standing in book.approvals
        if (standing.approval.run, standing.approval.plan, standing.approval.data)
        == (approval.run, approval.plan, approval.data)
    ]
    standing = [known.approval for known in several if not known.revoked]
    if not standing:
        return _voided(book, [known.approval for known in several])
    if all(utc_seconds(known.expires) <= now for known in standing):
        return "expired"
    policy = book.policy
    covered = policy is not None and any(
        known.key in policy.approvers and known.epsilon <= policy.plan_epsilon and known.delta <= policy.plan_delta
        for known in standing
    )
    return "signatures are missing" if covered else "the policy does not cover it"


def _voided(book: Book, approvals: list[Approval]) -> str:
    """Return what made all of these approvals void."""
    data = book.data_sets.get(approvals[0].data)
    if all(approval.recovery != book.recovery for approval in approvals) or approvals[0].data in book.lost_data_sets:
        return "the ledger was recovered"
    return "the data set was removed" if data is not None and data.event == "remove" else "revoked"


def _accounts(book: Book, data: str) -> tuple[str, ...]:
    """Return the accounts that a data set charges; none if it may not be used."""
    try:
        return book.data_set(data).accounts
    except Refused:
        return ()


def _spend(approval: Approval) -> Spend:
    return Spend(
        round=1,
        sampling_rate=approval.sampling_rate,
        noise_multiplier=approval.noise_multiplier,
        steps=approval.steps_per_round,
        clip_norm=approval.clip_norm,
        divisor=approval.divisor,
        noise="",
    )


def _alone(gate: Filter, spend: Spend) -> float:
    """Return what a spend takes of a filter, as if it were the only one."""
    return dataclasses.replace(gate, spent=0.0).after((spend,)).spent


def tree(found: SiteStanding) -> dict[str, object]:
    """Return a site's standing as `--json` prints it."""
    accounts: list[Mapping[str, object]] = [dataclasses.asdict(account) for account in found.accounts]
    runs = [dataclasses.asdict(run) | {"to_come": run.to_come} for run in found.runs]
    return {
        "site": found.site,
        "ledger": {"id": found.ledger, "records": found.records, "at": found.at},
        "accounts": accounts,
        "runs": runs,
    }
