"""A site's ledger as a value: records replayed into what they lead to, and every rule about what may come next.

`Book` is asked before a record is written (`client/journal` does so) and asked again by whoever verifies, so a record that
should not have been let in is found by an outsider who has nothing but the records. It knows no disk and no clock. The file is long because all rules stand in it: whoever audits a ledger should read one file, from top to bottom.

What the rules protect: nothing is trained that was not reserved, reserved without an approval in force, or beyond what an
account has left; a round is trained once and has one vector; nothing that was spent is ever given back but steps that
touched no data; and a ledger that was lost counts as fully spent.
"""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from confide.common.checkpoint import Checkpoint
from confide.common.crypto import verify as verify_signature
from confide.common.entries import (
    FIRST_PREV,
    LATEST,
    SEEDED,
    AccountOpened,
    Approval,
    Bind,
    Commit,
    DataSet,
    Entry,
    Federation,
    Forfeit,
    Genesis,
    Mask,
    PolicyInForce,
    Recovered,
    Refund,
    Release,
    Renewal,
    Reserve,
    Revocation,
    Rotation,
    Started,
    decode,
    encode,
    rotation_statement,
    utc_seconds,
    utc_text,
)
from confide.common.errors import LedgerError, MessageError, PrivacyError, Refused
from confide.common.filter import Filter
from confide.common.merkle import Tree, leaf_hash
from confide.common.spend import Spend

_CURRENT, _REMOVED, _LOST = "current", "removed", "lost"  # what a data set may be
RESERVED: Final = "reserved"
BOUND: Final = "bound"
COMMITTED: Final = "committed"
FORFEITED: Final = "forfeited"
REFUNDED: Final = "refunded"
CLOSED: Final = "closed"  # by a recovery
# Machines differ in the last digit of a logarithm. What is replayed may be off by this, what is appended by nothing.
_TOLERANCE = 1e-9
_DAY_S = 86_400
_REMEDY = (
    "Train on nothing that rests on it. An intact export or an earlier copy is taken up by: confide site ledger recover"
)
_ABSENT: Final = object()
_PLAIN: Final = (
    "size",
    "head",
    "at",
    "ledger",
    "site",
    "key",
    "policy",
    "recoveries",
    "recovery",
    "charges",
    "last",
)  # of a book's attributes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A budget that some persons share, and what was spent of it.

    Attributes:
        account: Its number.
        filter: Of the period it is in: limit, order, what is spent, used and left.
        period: From 1; each renewal begins the next.
        began: When the period began, or the ledger was recovered in it, in seconds since 1970, UTC.
        closed: The filters of all earlier periods as they were left.
        incomplete: Whether a lost ledger may hold more than is counted here; the period it was lost in counts as spent.
    """

    account: str
    filter: Filter
    period: int
    began: int
    closed: tuple[Filter, ...] = ()
    incomplete: bool = False

    @property
    def used(self) -> float:
        """Epsilon used in this period, at the account's delta."""
        return self.filter.used

    @property
    def left(self) -> float:
        """Epsilon left in this period, not below 0."""
        return max(0.0, self.filter.left)

    @property
    def total(self) -> float:
        """Epsilon of all periods together, at the account's delta: what its persons lost."""
        together = math.fsum([self.filter.spent, *(earlier.spent for earlier in self.closed)])
        return dataclasses.replace(self.filter, spent=math.nextafter(together, math.inf) if together else 0.0).used


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """A round of a run, from its reservation on.

    Attributes:
        reserve: What was reserved.
        state: RESERVED, BOUND, COMMITTED, FORFEITED, REFUNDED or CLOSED.
        at: When it was reserved, in seconds since 1970, UTC.
        periods: The period of each account that was charged.
        commitment: To its vector; empty before it is bound.
        attempt: The last that its vector was masked for; -1 before the first.
        evidence: The keyed digest of what was measured, or empty.
        given_back: How many of its steps touched no data.
    """

    reserve: Reserve
    state: str
    at: int
    periods: tuple[int, ...]
    commitment: str = ""
    attempt: int = -1
    evidence: str = ""
    given_back: int = 0

    @property
    def spend(self) -> Spend | None:
        """What the round cost, or None if all its steps were given back."""
        return self.reserve.spend(self.given_back) if self.given_back < self.reserve.steps else None

    @property
    def seeded(self) -> bool:
        """Whether its draws can be repeated, so that it may be gone through again."""
        return self.reserve.noise == SEEDED


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """An approval and whether it was revoked since.

    Attributes:
        approval: What was approved, by whom, until when.
        revoked: Whether a revocation, the removal of its data set or a recovery of the ledger came after it.
    """

    approval: Approval
    revoked: bool = False


class Book:
    """What a ledger's records lead to. It is empty until a Genesis is taken in.

    Attributes:
        size: How many records there are.
        head: `sha256:` and the leaf hash of the last record.
        at: The time of the last record, in seconds since 1970, UTC.
        ledger: The ledger's id.
        site: The site's name.
        key: The Ed25519 public key that signs checkpoints now, 32 bytes.
        policy: The policy in force, or None.
        recoveries: How often the ledger was recovered.
        recovery: The id of the last of these, or empty.
        charges: How many of the records charge an account, by a round, whatever became of it, or by a noised statistic.
        last: The last record's entry, or None.
    """

    def __init__(self) -> None:
        self.size = 0
        self.head = FIRST_PREV
        self.at = 0
        self.ledger = ""
        self.site = ""
        self.key = b""
        self.policy: PolicyInForce | None = None
        self.recoveries = 0
        self.recovery = ""
        self.charges = 0
        self.last: Entry | None = None
        self._tree = Tree()
        self._accounts: dict[str, Account] = {}
        self._data_sets: dict[str, DataSet] = {}
        self._states: dict[str, str] = {}  # of each data set
        self._federations: dict[str, Federation] = {}
        self._approvals: dict[tuple[str, str, str], tuple[Standing, ...]] = {}
        self._rounds: dict[str, dict[int, Round]] = {}
        self._last_round: dict[str, int] = {}  # the last that was reserved of each run
        self._releases: dict[int, tuple[Release, tuple[int, ...]]] = {}
        self._drawn: dict[str, bool] = {}  # by agents and recoveries, each once
        self._ended_runs: dict[str, bool] = {}  # by a recovery: what was trained of them is not known
        # What a change replaced, so that it can be undone: table, key, value before. None while nothing is on trial.
        self._replaced: list[tuple[dict[Any, Any], Any, Any]] | None = None

    def __repr__(self) -> str:
        return f"<Book of the ledger {self.ledger or 'not begun'}: {self.size} records>"

    @property
    def root(self) -> bytes:
        """The Merkle root over all records, 32 bytes."""
        return self._tree.root

    @property
    def accounts(self) -> Mapping[str, Account]:
        """All accounts, by their numbers."""
        return MappingProxyType(self._accounts)

    @property
    def data_sets(self) -> Mapping[str, DataSet]:
        """The newest entry of each data set there ever was; `data_set` gives only what may be used."""
        return MappingProxyType(self._data_sets)

    @property
    def lost_data_sets(self) -> frozenset[str]:
        """Those that a recovery came after: who is in them is not known until they are registered again."""
        return frozenset(data for data, state in self._states.items() if state == _LOST)

    @property
    def federations(self) -> Mapping[str, Federation]:
        """The newest entry of each federation."""
        return MappingProxyType(self._federations)

    @property
    def approvals(self) -> tuple[Standing, ...]:
        """All approvals, those of one plan, run and data set together."""
        return tuple(standing for several in self._approvals.values() for standing in several)

    @property
    def runs(self) -> tuple[str, ...]:
        """The names of all runs that anything was reserved for."""
        return tuple(run for run, rounds in self._rounds.items() if rounds)

    @property
    def releases(self) -> tuple[Release, ...]:
        """All noised statistics that left the site."""
        return tuple(release for release, _ in self._releases.values())

    def data_set(self, data: str) -> DataSet:
        """Return a data set's newest entry.

        Raises:
            Refused: It is not registered, was removed, or must be registered again after a recovery.
        """
        known, state = self._data_sets.get(data), self._states.get(data)
        if known is None or state != _CURRENT:
            what = "was lost with the ledger and must be registered again" if state == _LOST else "is not registered"
            raise Refused(f"The data set {data!r} {what}. Register it: confide site data add", "data")
        return known

    def rounds(self, run: str) -> Mapping[int, Round]:
        """Return all rounds of a run, by their numbers; none for a run that is not known."""
        return MappingProxyType(self._rounds.get(run, {}))

    def spends(self, run: str) -> tuple[Spend, ...]:
        """Return what a run cost, by rounds. A round all of whose steps were given back is not among them."""
        rounds = self._rounds.get(run, {})
        return tuple(spend for number in sorted(rounds) if (spend := rounds[number].spend) is not None)

    def charged(self, account: str, period: int | None = None) -> tuple[Spend, ...]:
        """Return all that was charged to an account, in one period or in all; what a lost ledger held is not known."""
        rounds = [
            (entry.reserve.accounts, entry.periods, entry.spend)
            for several in self._rounds.values()
            for entry in several.values()
        ]
        released = [(release.accounts, periods, release.spend()) for release, periods in self._releases.values()]
        return tuple(
            spend
            for accounts, periods, spend in [*rounds, *released]
            if spend is not None and account in accounts and period in {None, periods[accounts.index(account)]}
        )

    def now(self, told: float) -> float:
        """Return what time it is for this ledger, which never goes back, when a clock tells `told`."""
        return max(told, float(self.at))

    def gate(self, account: str) -> Filter:
        """Return the filter that lets spends of an open account through: its own, or a smaller one if the policy became narrower.

        Its limit is never above what the account was opened with; it is full where the policy leaves no room at its order.
        """
        own, policy = self._accounts[account].filter, self.policy
        if policy is None or (policy.epsilon >= own.epsilon and policy.delta >= own.delta):
            return own
        try:
            return dataclasses.replace(
                own, epsilon=min(own.epsilon, policy.epsilon), delta=min(own.delta, policy.delta)
            )
        except PrivacyError:
            return own.exhausted()

    def in_force(self, plan: str, run: str, data: str, at: int) -> Approval | None:
        """Return the newest approval of those that let a plan's run use a data set, or None if too few are in force.

        An approval is in force until it expires or is revoked, while its key is among the policy's approvers and the policy
        allows what the plan claims. As many as the policy needs, by different keys, must agree in all terms.

        Args:
            plan: The plan's digest.
            run: The run's name.
            data: The data set's name.
            at: Seconds since 1970, UTC.
        """
        if self.policy is None:
            return None
        agreed: dict[tuple[object, ...], set[str]] = {}
        found = None
        for standing in self._approvals.get((plan, run, data), ()):
            approval = standing.approval
            if standing.revoked or utc_seconds(approval.expires) <= at or approval.key not in self.policy.approvers:
                continue
            if approval.epsilon > self.policy.plan_epsilon or approval.delta > self.policy.plan_delta:
                continue
            keys = agreed.setdefault(approval.terms, set())
            keys.add(approval.key)
            if len(keys) >= self.policy.approvals_needed:
                found = approval
        return found

    def repeats(self, entry: Entry) -> bool:
        """Return whether a seeded simulation reserves a round again just as before; it is not recorded again."""
        if not isinstance(entry, Reserve) or entry.noise != SEEDED:
            return False
        known = self._rounds.get(entry.run, {}).get(entry.round)
        if known is None or known.state not in {RESERVED, BOUND, COMMITTED}:
            return False
        accounts, spent = entry.accounts or known.reserve.accounts, known.reserve.spent
        return dataclasses.replace(entry, accounts=accounts, spent=spent) == known.reserve

    def check(self, entry: Entry, at: int) -> None:
        """Return if the entry may come next; nothing changes.

        Args:
            entry: As for `record`.
            at: Seconds since 1970, UTC, not before the last record.

        Raises:
            Refused: A rule forbids it; the refusal has the rule's name.
            LedgerError: `at` is before the last record, or out of range.
        """
        before = self._begin()
        try:
            self._let_in(entry, at, 0.0)
        finally:
            self._undo(before)

    def record(self, entry: Entry, at: int) -> bytes:
        """Return the line of the entry, which is the newest record from here on.

        Args:
            entry: What is recorded. Where a Reserve or Release lacks accounts or spent, these are filled in.
            at: Seconds since 1970, UTC, not before the last record.

        Raises:
            Refused: A rule forbids it; the refusal has the rule's name. Nothing changes.
            LedgerError: It has no place on a line: `at` is out of range, or the line too long. Nothing changes.
        """
        before = self._begin()
        try:
            whole_entry = self._let_in(entry, at, 0.0)
            line = encode(whole_entry, self.size + 1, self.head, at)
        except BaseException:
            self._undo(before)
            raise
        self._keep(before)
        self._append(whole_entry, leaf_hash(line), at)
        return line

    def take(self, line: bytes) -> Entry:
        """Return the entry of a line, which is the newest record from here on.

        Args:
            line: The ledger's next line, without a line break.

        Raises:
            LedgerError: It is not this ledger's next record, or should not have been let in. Nothing changes.
        """
        number = self.size + 1
        try:
            stamped = decode(line)
        except LedgerError as error:
            raise LedgerError(f"Record {number} of the ledger was changed or is damaged. {error} {_REMEDY}") from None
        kind = stamped.entry.kind
        if stamped.seq != number:
            raise LedgerError(
                f"Record {number} of the ledger says that it is number {stamped.seq}: records are missing, repeated or in "
                f"another order. {_REMEDY}"
            )
        if stamped.prev != self.head:
            raise LedgerError(
                f"The ledger's chain is broken at record {number}: it follows on {stamped.prev[:23]}…, and the record before "
                f"it is {self.head[:23]}…. One of the two was changed, or comes from another ledger. {_REMEDY}"
            )
        if stamped.at < self.at:
            raise LedgerError(
                f"At record {number} of the ledger time goes back, from {utc_text(self.at)} to {utc_text(stamped.at)}. {_REMEDY}"
            )
        try:
            self._let_in(stamped.entry, stamped.at, _TOLERANCE)
        except Refused as error:
            raise LedgerError(
                f"Record {number} of the ledger, of kind {kind}, should not have been let in. {error} {_REMEDY}"
            ) from None
        self._append(stamped.entry, stamped.leaf, stamped.at)
        return stamped.entry

    def agree(self, checkpoint: Checkpoint) -> None:
        """Return if a checkpoint stands for exactly these records and is signed by the key in force.

        Raises:
            LedgerError: It is another ledger's, of another size, has another root or another number of charges, or is
                not signed by the key.
        """
        if checkpoint.ledger != self.ledger:
            raise LedgerError(
                f"The checkpoint is of the ledger {checkpoint.ledger}, and this is {self.ledger}. Give the checkpoint of this "
                "ledger, or the ledger of this checkpoint."
            )
        if checkpoint.size > self.size:
            raise LedgerError(
                f"The ledger has {self.size} records, and its checkpoint stands for {checkpoint.size}: this is an older copy, "
                f"or it was cut short. {_REMEDY}"
            )
        if checkpoint.size < self.size:
            raise LedgerError(
                f"The ledger has {self.size} records, and its checkpoint stands for {checkpoint.size}: the last ones were "
                f"added without the site's signature. {_REMEDY}"
            )
        if checkpoint.root != self.root:
            raise LedgerError(
                f"The ledger was forked: its {self.size} records have the root {self.root.hex()[:16]}…, and the checkpoint over "
                f"as many has {checkpoint.root.hex()[:16]}…. The last record was changed, or all were rewritten. {_REMEDY}"
            )
        try:
            checkpoint.verify(self.key)
        except MessageError:
            raise LedgerError(
                f"The checkpoint at record {self.size} is not signed by the ledger's key {self.key.hex()[:16]}…. Whoever made "
                f"it is not the site. {_REMEDY}"
            ) from None
        if checkpoint.charges != self.charges:
            raise LedgerError(
                f"Of the ledger's {self.size} records {self.charges} charge an account, and its checkpoint says "
                f"{checkpoint.charges}: the site signed what its records do not say. {_REMEDY}"
            )

    @contextlib.contextmanager
    def trial(self) -> Iterator[None]:
        """Take back all that is recorded within it if an error leaves it."""
        tree, before = copy.deepcopy(self._tree), self._begin()
        try:
            yield
        except BaseException:
            self._undo(before)
            self._tree = tree
            raise
        self._keep(before)

    def _let_in(self, entry: Entry, at: int, tolerance: float) -> Entry:
        """Apply the entry if the rules allow it, and return it complete; the stamp and the tree are not touched.

        Each rule's function raises before it changes anything.
        """
        if at < self.at:
            raise LedgerError(f"The time {utc_text(at)} is before that of the last record, {utc_text(self.at)}.")
        if isinstance(entry, Genesis) is not (self.size == 0):
            raise Refused(
                "A ledger begins with a genesis, and has one only. Make a ledger with: confide site init", "ledger"
            )
        if isinstance(entry, Reserve):
            return self._reserve(entry, at, tolerance)
        if isinstance(entry, Release):
            return self._release(entry, tolerance)
        _RULES[type(entry)](self, entry, at)
        return entry

    def _append(self, entry: Entry, leaf: bytes, at: int) -> None:
        self._tree.add(leaf)
        self.size += 1
        self.head = f"sha256:{leaf.hex()}"
        self.at = at
        self.last = entry

    def _genesis(self, entry: Genesis, at: int) -> None:
        self.ledger, self.site, self.key = entry.ledger, entry.site, bytes.fromhex(entry.key)

    def _policy(self, entry: PolicyInForce, at: int) -> None:
        self.policy = entry

    def _account(self, entry: AccountOpened, at: int) -> None:
        policy, due = self._need_policy(), str(len(self._accounts) + 1)
        if entry.account != due:
            raise Refused(f"The account {entry.account} was to be opened; the next one is {due}.", "ledger")
        if entry.epsilon > policy.epsilon or entry.delta > policy.delta:
            raise Refused(
                f"An account of epsilon {entry.epsilon:g} at delta {entry.delta:g} was to be opened; the policy allows "
                f"{policy.epsilon:g} at {policy.delta:g}. Open a smaller one, or change the policy.",
                "budget",
            )
        try:
            budget = Filter(epsilon=entry.epsilon, delta=entry.delta, order=entry.order)
        except PrivacyError as error:
            raise Refused(str(error), "budget") from None
        # Who was in a lost ledger is not known, so the persons of a new account may have spent everything there.
        lost = self.recoveries > 0
        account = Account(
            account=due, filter=budget.exhausted() if lost else budget, period=1, began=at, incomplete=lost
        )
        self._put(self._accounts, due, account)

    def _data(self, entry: DataSet, at: int) -> None:
        known, current = self._data_sets.get(entry.data), self._states.get(entry.data) == _CURRENT
        due = 1 if known is None else known.version + 1
        if entry.version != due:
            raise Refused(
                f"Version {entry.version} of the data set {entry.data!r} was given; the next is {due}.", "data"
            )
        if entry.event == "add" and current:
            raise Refused(f"The data set {entry.data!r} is registered already; record a change of it.", "data")
        if entry.event != "add":
            current_accounts = self.data_set(entry.data).accounts
            if entry.event == "remove" and entry.accounts != current_accounts:
                raise Refused(f"Removing {entry.data!r} changes no account; name the same.", "data")
        if not entry.accounts or not entry.registered:
            raise Refused(f"The data set {entry.data!r} names no account, or not the digest of its persons.", "data")
        for account in entry.accounts:
            if account not in self._accounts:
                raise Refused(f"The data set {entry.data!r} names the account {account}, which is not open.", "data")
        if known is not None and (gone := set(known.accounts) - set(entry.accounts)):
            raise Refused(
                f"The data set {entry.data!r} would no longer charge ({', '.join(sorted(gone, key=int))}), which it charged before. "
                "Who was in it may still be: charge these as well.",
                "data",
            )
        self._put(self._data_sets, entry.data, entry)
        self._put(self._states, entry.data, _REMOVED if entry.event == "remove" else _CURRENT)
        recast = known is not None and (entry.person_id, entry.ids) != (known.person_id, known.ids)
        if entry.event == "remove" or recast:  # else a table of other persons would be approved unseen
            for key in [key for key in self._approvals if key[2] == entry.data]:
                self._revoke_all(key)

    def _federation(self, entry: Federation, at: int) -> None:
        known = self._federations.get(entry.federation)
        if known is not None and (
            entry.epoch < known.epoch or (entry.epoch == known.epoch and entry.roster != known.roster)
        ):
            raise Refused(
                f"The roster of epoch {entry.epoch} of {entry.federation!r} does not follow on that of epoch {known.epoch}. "
                "Ask the federation for its newest roster.",
                "federation",
            )
        self._put(self._federations, entry.federation, entry)

    def _approve(self, entry: Approval, at: int) -> None:
        policy = self._need_policy()
        self.data_set(entry.data)
        if entry.epsilon > policy.plan_epsilon or entry.delta > policy.plan_delta:
            raise Refused(
                f"The plan asks for epsilon {entry.epsilon:g} at delta {entry.delta:g}; the policy allows a plan "
                f"{policy.plan_epsilon:g} at {policy.plan_delta:g}. Ask for a smaller plan, or change the policy.",
                "plan-privacy",
            )
        remaining_s = utc_seconds(entry.expires) - at
        if remaining_s <= 0:
            raise Refused(f"The approval ends at {entry.expires}, which is over. Approve it until later.", "approval")
        if remaining_s > (policy.most_days + 1) * _DAY_S:  # a clock may be set back a little
            raise Refused(
                f"The approval would hold until {entry.expires}; the policy allows {policy.most_days} days. Approve it for fewer.",
                "approval",
            )
        if entry.run in self._ended_runs:
            raise Refused(
                f"The run {entry.run!r} was begun or approved before this ledger was lost, and which of its rounds were trained is "
                "not known. Ask its coordinator to sign the plan for another run.",
                "approval",
            )
        self._signed_here(entry, "approval")
        for standings in self._approvals.values():
            for other in (standing.approval for standing in standings if not standing.revoked):
                if other.run == entry.run and other.federation != entry.federation:
                    raise Refused(
                        f"A run {entry.run!r} of the federation {other.federation!r} is approved; a run's rounds are told apart by "
                        f"its name, so {entry.federation!r} must call its own differently. Ask its coordinator.",
                        "approval",
                    )
        several = self._approvals.get((entry.plan, entry.run, entry.data), ())
        # Else whoever kept the bytes could undo a revocation, or a recovery, without asking the approver.
        if any(standing.revoked and standing.approval.statement() == entry.statement() for standing in several):
            raise Refused("This approval was revoked. Approve the plan anew: confide site plan approve", "approval")
        self._put(self._approvals, (entry.plan, entry.run, entry.data), (*several, Standing(approval=entry)))

    def _revoke(self, entry: Revocation, at: int) -> None:
        keys = [key for key in self._approvals if key[:2] == (entry.plan, entry.run)]
        if not keys:
            raise Refused(
                f"No approval of the run {entry.run!r} of this plan is recorded; none can be revoked.", "approval"
            )
        for key in keys:
            self._revoke_all(key)

    def _start(self, entry: Started, at: int) -> None:
        if entry.process in self._drawn:
            raise Refused("An agent starts with a number that was drawn before: its randomness is not fresh.", "ledger")
        self._put(self._drawn, entry.process, True)

    def _reserve(self, entry: Reserve, at: int, tolerance: float) -> Reserve:
        policy, data = self._need_policy(), self.data_set(entry.data)
        approval = self.in_force(entry.plan, entry.run, entry.data, at)
        if approval is None:
            raise Refused(
                f"Too few approvals of the run {entry.run!r} on the data set {entry.data!r} are in force for this plan; the "
                f"policy needs {policy.approvals_needed}. Approve it: confide site plan approve",
                "approval",
            )
        if entry.version != data.version:
            raise Refused(
                f"Version {entry.version} of the data set {entry.data!r} would be trained on; it is at version {data.version}, from "
                "which somebody may have withdrawn. Load its rows again.",
                "data",
            )
        approved = (
            approval.sampling_rate,
            approval.noise_multiplier,
            approval.clip_norm,
            approval.steps_per_round,
            approval.divisor,
        )
        asked = (entry.sampling_rate, entry.noise_multiplier, entry.clip_norm, entry.steps, entry.divisor)
        if asked != approved:
            raise Refused(
                f"Round {entry.round} would train with (sampling rate, noise multiplier, clip norm, steps, divisor) {asked}; "
                f"approved are {approved}. A changed plan needs a new approval.",
                "approval",
            )
        if entry.noise.startswith("insecure_") and entry.noise not in policy.words:
            raise Refused(
                f"The noise would be {entry.noise!r}, which protects nobody, and the policy's words do not allow it.",
                "noise",
            )
        if entry.roster.startswith("insecure_") and entry.roster not in policy.words:
            raise Refused(
                f"The sum would be {entry.roster!r}, which hides no site's vector, and the policy's words do not allow it.",
                "federation",
            )
        known = self._federations.get(approval.federation)
        pinned = "" if known is None else known.roster
        if approval.federation and not entry.roster.startswith("insecure_") and entry.roster != pinned:
            raise Refused(
                f"The sum would be under the roster {entry.roster[:23]}…, and the newest on record of {approval.federation!r} is "
                f"{pinned[:23] or 'none'}…. Join with the newest roster: confide site join",
                "federation",
            )
        if entry.round > approval.rounds:
            raise Refused(f"Round {entry.round} was offered; the plan has {approval.rounds} rounds.", "rounds")
        newest = self._last_round.get(entry.run, 0)
        if entry.round <= newest:
            raise Refused(
                f"Round {entry.round} of the run {entry.run!r} was to be reserved after round {newest}; a round is trained "
                "once, and rounds do not go back.",
                "rounds",
            )
        accounts = data.accounts
        spent = self._charge(accounts, entry, entry.spend(), tolerance)
        if not (entry.accounts and entry.spent):
            entry = dataclasses.replace(entry, accounts=accounts, spent=spent)
        periods = tuple(self._accounts[account].period for account in accounts)
        rounds = self._rounds.get(entry.run)
        if rounds is None:
            rounds = {}
            self._put(self._rounds, entry.run, rounds)
        self._put(rounds, entry.round, Round(reserve=entry, state=RESERVED, at=at, periods=periods))
        self._put(self._last_round, entry.run, entry.round)
        self.charges += 1
        return entry

    def _release(self, entry: Release, tolerance: float) -> Release:
        policy, accounts = self._need_policy(), self.data_set(entry.data).accounts
        if not policy.release_noise or entry.noise_multiplier < policy.release_noise:
            due = f"at least {policy.release_noise:g}" if policy.release_noise else "that none is released"
            raise Refused(
                f"{entry.what!r} was to be released with a noise multiplier of {entry.noise_multiplier:g}; the policy's rule is "
                f"{due}. Release it with more noise, or change the policy.",
                "noise",
            )
        spent = self._charge(accounts, entry, entry.spend(), tolerance)
        if not (entry.accounts and entry.spent):
            entry = dataclasses.replace(entry, accounts=accounts, spent=spent)
        periods = tuple(self._accounts[account].period for account in accounts)
        self._put(self._releases, self.size + 1, (entry, periods))
        self.charges += 1
        return entry

    def _charge(
        self, accounts: tuple[str, ...], entry: Reserve | Release, spend: Spend, tolerance: float
    ) -> tuple[float, ...]:
        """Count a spend in every account, if every account admits it, and return what each has spent then.

        Where the entry tells more than is computed, that holds; where it tells less, it is refused. What is new (a tolerance
        of 0) may leave its accounts and sums open; what is replayed may not.
        """
        told: tuple[float | None, ...] = entry.spent
        if not tolerance and not told:
            told = (None,) * len(accounts)
        named = entry.accounts == accounts or not (tolerance or entry.accounts)
        if not named or len(told) != len(accounts):
            raise Refused(
                f"The accounts ({', '.join(entry.accounts)}) were to be charged; the data set {entry.data!r} is charged to "
                f"({', '.join(accounts)}), and each has its sum.",
                "budget",
            )
        changed = []
        for name, sum_told in zip(accounts, told, strict=True):
            account = self._accounts[name]
            gate = self.gate(name)
            after, room = account.filter.after((spend,)), gate.room * (1 + tolerance) if gate.left > 0 else 0.0
            if not tolerance or not after.spent <= room:
                _admitted(account, gate, spend)
            if sum_told is not None and not after.spent * (1 - _TOLERANCE) <= sum_told <= room:
                raise Refused(
                    f"The account {name} would have spent {sum_told:.6g} as recorded; it is {after.spent:.6g} by the spends, "
                    f"and {room:.6g} is its room. A spend is never counted for less than it is.",
                    "budget",
                )
            if sum_told is not None and sum_told > after.spent:
                after = dataclasses.replace(after, spent=sum_told)
            changed.append(dataclasses.replace(account, filter=after))
        for account in changed:
            self._put(self._accounts, account.account, account)
        return tuple(account.filter.spent for account in changed)

    def _bind(self, entry: Bind, at: int) -> None:
        known = self._known(entry.run, entry.round, "bound", {RESERVED}, {BOUND, COMMITTED})
        self._change(known, state=BOUND, commitment=entry.commitment, attempt=-1)

    def _mask(self, entry: Mask, at: int) -> None:
        known = self._known(entry.run, entry.round, "masked", {BOUND}, {COMMITTED})
        if entry.attempt <= known.attempt and not known.seeded:
            raise Refused(
                f"Round {entry.round} of the run {entry.run!r} was to be masked for attempt {entry.attempt} after attempt "
                f"{known.attempt}; attempts do not go back.",
                "ledger",
            )
        self._change(known, attempt=entry.attempt)

    def _commit(self, entry: Commit, at: int) -> None:
        known = self._known(entry.run, entry.round, "committed", {BOUND}, {COMMITTED})
        self._change(known, state=COMMITTED, evidence=entry.evidence)

    def _forfeit(self, entry: Forfeit, at: int) -> None:
        known = self._known(entry.run, entry.round, "forfeited", {RESERVED})
        self._change(known, state=FORFEITED)

    def _refund(self, entry: Refund, at: int) -> None:
        known = self._known(entry.run, entry.round, "given back", {RESERVED})
        if entry.steps > known.reserve.steps:
            raise Refused(
                f"{entry.steps} steps of round {entry.round} were to be given back; it has {known.reserve.steps}.",
                "ledger",
            )
        untouched = dataclasses.replace(known.reserve.spend(), steps=entry.steps)
        for name, period in zip(known.reserve.accounts, known.periods, strict=True):
            account = self._accounts[name]
            if account.period == period:  # what an earlier period has spent stays as it was closed
                self._put(self._accounts, name, dataclasses.replace(account, filter=account.filter.without(untouched)))
        self._change(known, state=REFUNDED, given_back=entry.steps)

    def _renew(self, entry: Renewal, at: int) -> None:
        policy, account = self._need_policy(), self._accounts.get(entry.account)
        if account is None:
            raise Refused(f"The account {entry.account} was to be renewed; it is not open.", "budget")
        if entry.period != account.period + 1:
            raise Refused(
                f"Period {entry.period} of the account {entry.account} was to begin; it is in period {account.period}.",
                "budget",
            )
        if not policy.renewal_days or account.period > policy.most_renewals:
            raise Refused(
                f"The account {entry.account} was renewed {account.period - 1} times; the policy allows "
                f"{policy.most_renewals if policy.renewal_days else 0}. What is spent stays spent.",
                "budget",
            )
        due = account.began + policy.renewal_days * _DAY_S
        if at < due:
            raise Refused(
                f"The account {entry.account} may be renewed {policy.renewal_days} days after its period began, not before "
                f"{utc_text(min(due, LATEST))}.",
                "budget",
            )
        self._signed_here(entry, "renewal")
        renewed = dataclasses.replace(
            account,
            filter=dataclasses.replace(account.filter, spent=0.0),
            period=entry.period,
            began=at,
            closed=(*account.closed, account.filter),
        )
        self._put(self._accounts, entry.account, renewed)

    def _rotate(self, entry: Rotation, at: int) -> None:
        statement = rotation_statement(self.ledger, self.key.hex(), entry.key)
        if entry.key == self.key.hex():
            raise Refused("The key was to be replaced by itself; make a new one.", "ledger")
        for key, signature, whose in ((self.key.hex(), entry.by_old, "old"), (entry.key, entry.by_new, "new")):
            _signed(key, statement, signature, f"rotation, by its {whose} key,", "ledger")
        self.key = bytes.fromhex(entry.key)

    def _recover(self, entry: Recovered, at: int) -> None:
        if entry.recovery in self._drawn:
            raise Refused("A recovery has the id of an earlier one; draw another.", "ledger")
        self._put(self._drawn, entry.recovery, True)
        self.recoveries += 1
        self.recovery = entry.recovery
        for name, account in list(self._accounts.items()):
            # When its period truly began may have been lost as well.
            spent = dataclasses.replace(account, filter=account.filter.exhausted(), began=at, incomplete=True)
            self._put(self._accounts, name, spent)
        for rounds in self._rounds.values():
            for known in list(rounds.values()):
                if known.state in {RESERVED, BOUND}:
                    self._change(known, state=CLOSED)
        for run in (*self._rounds, *(run for _, run, _ in self._approvals)):
            self._put(self._ended_runs, run, True)
        for key in self._approvals:
            self._revoke_all(key)
        for data in self._states:
            self._put(self._states, data, _LOST)

    def _need_policy(self) -> PolicyInForce:
        if self.policy is None:
            raise Refused(
                "No policy is in force, so nothing is allowed. Put one in force: confide site policy", "approval"
            )
        return self.policy

    def _signed_here(self, entry: Approval | Renewal, what: str) -> None:
        """Return if the entry is for this ledger, and signed by one of the policy's approvers."""
        rule = "approval" if isinstance(entry, Approval) else "budget"
        if entry.ledger != self.ledger:
            raise Refused(
                f"The {what} is for the ledger {entry.ledger}; this is {self.ledger}. Sign one for this.", rule
            )
        if entry.recovery != self.recovery:
            raise Refused(
                f"The {what} was signed {_since(entry.recovery)}, and counts for the ledger as it was then; this one goes on "
                f"{_since(self.recovery)}. What was signed before a loss does not count after it: sign another.",
                rule,
            )
        if entry.key not in self._need_policy().approvers:
            raise Refused(
                f"The {what} is by the key {entry.key[:16]}…, which is none of the policy's approvers'. Let one of them sign.",
                rule,
            )
        _signed(entry.key, entry.statement(), entry.signature, what, rule)

    def _known(
        self, run: str, number: int, what: str, states: set[str], seeded_states: frozenset[str] | set[str] = frozenset()
    ) -> Round:
        """Return the round if it is in one of the states; a seeded one may also be in one of the others."""
        known = self._rounds.get(run, {}).get(number)
        if known is None:
            raise Refused(f"Round {number} of the run {run!r} was to be {what}; it was never reserved.", "ledger")
        if known.state not in states and not (known.seeded and known.state in seeded_states):
            raise Refused(
                f"Round {number} of the run {run!r} was to be {what}; it is {known.state}, and must be "
                f"{' or '.join(sorted(states))}.",
                "ledger",
            )
        return known

    def _revoke_all(self, key: tuple[str, str, str]) -> None:
        revoked = tuple(Standing(approval=standing.approval, revoked=True) for standing in self._approvals[key])
        self._put(self._approvals, key, revoked)

    def _change(self, known: Round, **changes: Any) -> None:  # noqa: ANN401  as dataclasses.replace
        reserve = known.reserve
        self._put(self._rounds[reserve.run], reserve.round, dataclasses.replace(known, **changes))

    def _put(self, table: dict[Any, Any], key: Any, value: Any) -> None:  # noqa: ANN401  any of the tables
        if self._replaced is not None:
            self._replaced.append((table, key, table.get(key, _ABSENT)))
        table[key] = value

    def _begin(self) -> tuple[Any, ...]:
        """Put what follows on trial, and return what `_undo` and `_keep` need."""
        outer, self._replaced = self._replaced, []
        return outer, {name: getattr(self, name) for name in _PLAIN}

    def _undo(self, before: tuple[Any, ...]) -> None:
        for table, key, value in reversed(self._replaced or ()):
            if value is _ABSENT:
                del table[key]
            else:
                table[key] = value
        self._replaced = before[0]
        for name, value in before[1].items():
            setattr(self, name, value)

    def _keep(self, before: tuple[Any, ...]) -> None:
        replaced, self._replaced = self._replaced, before[0]
        if self._replaced is not None and replaced is not None:
            self._replaced.extend(replaced)


def verify(lines: Iterable[bytes], checkpoint: Checkpoint | None = None) -> Book:
    """Return what a ledger's records lead to, once each is found to follow on the one before and to keep every rule.

    Without a checkpoint, records that are missing at the end, or a ledger that was rewritten as a whole, are not noticed.

    Args:
        lines: The records, without line breaks.
        checkpoint: One that the site signed, the newest that is known. If there are more records than it stands for, the
            first ones must be those it stands for; nothing is said of who wrote the others.

    Raises:
        LedgerError: It names the first record that is wrong, and what is wrong with it.

    Guarantee: a byte changed, a record left out, repeated or put in another order, a rule broken, a tail cut off and a past
    rewritten are all found, the last two against a checkpoint.
    """
    book = Book()
    agreed = checkpoint is None
    for line in lines:
        book.take(line)
        if checkpoint is not None and book.size == checkpoint.size:
            book.agree(checkpoint)
            agreed = True
    if not book.size:
        raise LedgerError(f"The ledger has no record at all, not even its genesis. {_REMEDY}")
    if checkpoint is not None and not agreed:
        book.agree(checkpoint)
    return book


def _since(recovery: str) -> str:
    return f"after the recovery {recovery[:8]}…" if recovery else "before any recovery"


def _admitted(account: Account, gate: Filter, spend: Spend) -> None:
    try:
        gate.admits(spend)
    except PrivacyError as error:
        raise Refused(
            f"The account {account.account}, in its period {account.period}, is not enough. {error}", "budget"
        ) from None


def _signed(key: str, statement: bytes, signature: str, what: str, rule: str) -> None:
    try:
        verify_signature(bytes.fromhex(key), statement, bytes.fromhex(signature))
    except MessageError:
        raise Refused(f"The {what} is not signed by the key {key[:16]}… that it names. Sign it again.", rule) from None


_RULES: Final[dict[type[Entry], Callable[[Book, Any, int], None]]] = {
    Genesis: Book._genesis,
    PolicyInForce: Book._policy,
    AccountOpened: Book._account,
    DataSet: Book._data,
    Federation: Book._federation,
    Approval: Book._approve,
    Revocation: Book._revoke,
    Started: Book._start,
    Bind: Book._bind,
    Mask: Book._mask,
    Commit: Book._commit,
    Forfeit: Book._forfeit,
    Refund: Book._refund,
    Renewal: Book._renew,
    Rotation: Book._rotate,
    Recovered: Book._recover,
}
