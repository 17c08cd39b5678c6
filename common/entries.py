"""What a site's ledger records: one kind of entry per event, each with one spelling as a line of canonical JSON.

An entry says what happened or was decided; whether it may stand where it stands is asked in `common/ledger`. On its line
it is stamped with its number, the digest of the line before it, and a time:

    {"format": "confide-ledger/1", "seq": 7, "prev": "sha256:…", "at": "2026-11-23T02:40:00Z", "kind": "bind", …}

Numbers, keyed digests, names and declared constants are all there is: nothing exact about rows ever enters. A line is
read strictly: of all bytes that a lenient reader would take for an entry, one spelling is accepted.
"""

import dataclasses
import datetime
import functools
import json
import math
import operator
import re
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final, Self

from confide.common.canonical import canonical_bytes
from confide.common.checkpoint import MOST_RECORDS
from confide.common.crypto import Identity
from confide.common.errors import LedgerError
from confide.common.merkle import leaf_hash
from confide.common.spend import Spend

FORMAT: Final = "confide-ledger/1"
FIRST_PREV: Final = "sha256:" + "0" * 64  # what the first record follows on
SEEDED: Final = "insecure_seeded_noise"  # the one kind of draws that can be repeated; simulations only
LARGEST_RECORD_BYTES: Final = 1 << 16
LATEST: Final = 253_402_300_799  # the last second of the year 9999, in seconds since 1970
_STAMP: Final = ("format", "seq", "prev", "at", "kind")
_EPOCH = datetime.datetime(1970, 1, 1)  # without a zone, since it is spelled without one
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """What a field's value must be: of one type, and such that `holds`."""

    type: type
    holds: Callable[[Any], object]
    says: str


def _field(form: _Form, default: object = dataclasses.MISSING) -> Any:  # noqa: ANN401  as dataclasses.field itself
    return dataclasses.field(metadata={"form": form}, default=default)


def _form(kind: type, says: str, holds: Callable[[Any], object]) -> _Form:
    return _Form(type=kind, holds=holds, says=says)


def _like(pattern: str, says: str) -> _Form:
    return _form(str, says, re.compile(pattern).fullmatch)


def _text(longest: int) -> _Form:
    return _form(
        str,
        f"1 to {longest} printable characters without a space at either end",
        lambda value: 0 < len(value) <= longest and value.isprintable() and value == value.strip(),
    )


def _or_nothing(form: _Form) -> _Form:
    return _form(str, f"{form.says}, or empty", lambda value: not value or form.holds(value))


def _whole(least: int, most: int) -> _Form:
    return _form(int, f"a whole number from {least} to {most}", lambda value: least <= value <= most)


def _real(most: float = math.inf, *, below: float = math.inf) -> _Form:
    # A subnormal number has lost digits, so what is computed from it may vanish.
    says = "a finite number above 0, not subnormal" + (f", at most {most:g}" if most < math.inf else "")
    says += f", below {below:g}" if below < math.inf else ""
    return _form(float, says, lambda value: sys.float_info.min <= value <= most and value < below)


def _several(each: _Form, most: int, *, distinct: bool = True) -> _Form:
    return _form(
        tuple,
        f"up to {most}{' different' if distinct else ''} values, each {each.says}",
        lambda values: (
            len(values) <= most
            and all(type(value) is each.type and each.holds(value) for value in values)
            and (not distinct or len(set(values)) == len(values))
        ),
    )


_NAME = _text(200)
_REASON = _text(2000)
_ID = _like(r"[0-9a-f]{32}", "32 hexadecimal digits")
_KEY = _like(r"[0-9a-f]{64}", "64 hexadecimal digits")
_SIGNATURE = _or_nothing(_like(r"[0-9a-f]{128}", "128 hexadecimal digits"))
_DIGEST = _like(r"sha256:[0-9a-f]{64}", "sha256: and 64 hexadecimal digits")
_ROSTER = _like(
    r"sha256:[0-9a-f]{64}|insecure_[a-z_]{1,60}", "sha256: and 64 hexadecimal digits, or a word for sums without masks"
)
_ACCOUNT = _like(r"[1-9][0-9]{0,8}", "the number of an account, from 1")
_ACCOUNTS = _several(_ACCOUNT, 1000)
_SPENT = _several(_real(), 1000, distinct=False)
_KEYS = _several(_KEY, 100)
_COUNT = _whole(1, 10**9)
_WORDS = _several(_NAME, 100)
_EPSILON, _DELTA, _RATE, _POSITIVE = _real(100.0), _real(below=1.0), _real(1.0), _real()
_NOISE = _form(float, f"0, or {_POSITIVE.says}", lambda value: value == 0 or _POSITIVE.holds(value))
_UNTIL = _form(str, "a time as in 2026-11-23T02:40:00Z", lambda value: _is_time(value))  # noqa: PLW0108  defined below
_NO_TUPLE: Final[tuple[()]] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Genesis:
    """The ledger begins; always record 1, and only there.

    Attributes:
        ledger: The ledger's id, 32 hexadecimal digits, drawn at random.
        site: The site's name.
        key: The Ed25519 public key that signs checkpoints, 64 hexadecimal digits.
        software: What made it, with its version.
    """

    kind: ClassVar[str] = "genesis"
    ledger: str = _field(_ID)
    site: str = _field(_NAME)
    key: str = _field(_KEY)
    software: str = _field(_NAME)

    def __post_init__(self) -> None:
        _check(self)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PolicyInForce:
    """From here on the site's policy is this one.

    Attributes:
        digest: Of the policy's file.
        epsilon: What an account may spend in a period, above 0, at most 100. One that was opened with less keeps less.
        delta: Of that, above 0, below 1; likewise.
        plan_epsilon: The most a plan may ask for.
        plan_delta: Of that.
        approvals_needed: How many of the approvers must approve a plan, from 1.
        approvers: Their Ed25519 public keys, 64 hexadecimal digits each.
        most_days: For how many days an approval may hold.
        renewal_days: How many days an account's period lasts at least; 0 if none is ever renewed.
        most_renewals: How often an account may be renewed.
        release_noise: The smallest noise multiplier that a statistic is released with; 0 if none is.
        words: What is allowed although it weakens a guarantee, by its words.
    """

    kind: ClassVar[str] = "policy"
    digest: str = _field(_DIGEST)
    epsilon: float = _field(_EPSILON)
    delta: float = _field(_DELTA)
    plan_epsilon: float = _field(_EPSILON)
    plan_delta: float = _field(_DELTA)
    approvals_needed: int = _field(_whole(1, 100))
    approvers: tuple[str, ...] = _field(_KEYS)
    most_days: int = _field(_whole(1, 10**7))
    renewal_days: int = _field(_whole(0, 100_000))
    most_renewals: int = _field(_whole(0, 10**6))
    release_noise: float = _field(_NOISE)
    words: tuple[str, ...] = _field(_WORDS)

    def __post_init__(self) -> None:
        _check(self)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AccountOpened:
    """There is another account: a budget that some persons share.

    Attributes:
        account: "1" for the first, then "2" and so on.
        epsilon: What it may spend in a period.
        delta: Of that.
        order: The one Rényi order at which it counts; fixed here, before anything is spent.
    """

    kind: ClassVar[str] = "account"
    account: str = _field(_ACCOUNT)
    epsilon: float = _field(_EPSILON)
    delta: float = _field(_DELTA)
    order: int = _field(_whole(2, 4096))

    def __post_init__(self) -> None:
        _check(self)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """A data set was registered, or is another version from here on.

    Attributes:
        data: Its name at the site.
        version: From 1; each event makes the next.
        event: "add", "change", "withdraw" (persons took back their consent) or "remove".
        fingerprint: A keyed digest of the content, 64 hexadecimal digits.
        declared_persons: The public constant N that the site declares.
        person_id: The column that says whose a row is; empty if each row is a person.
        ids: The namespace that the persons' identifiers are of.
        accounts: Those that a spend on it is charged to.
        registered: The digest of all persons it ever had (`client/journal`), 64 hexadecimal digits; the journal fills it in.
    """

    kind: ClassVar[str] = "data"
    data: str = _field(_NAME)
    version: int = _field(_COUNT)
    event: str = _field(_like("add|change|withdraw|remove", "add, change, withdraw or remove"))
    fingerprint: str = _field(_KEY)
    declared_persons: int = _field(_COUNT)
    person_id: str = _field(_or_nothing(_NAME))
    ids: str = _field(_or_nothing(_NAME))
    accounts: tuple[str, ...] = _field(_ACCOUNTS)
    registered: str = _field(_or_nothing(_KEY), default="")

    def __post_init__(self) -> None:
        _check(self)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Federation:
    """The site belongs to a federation, under this roster.

    Attributes:
        federation: Its name.
        epoch: The roster's.
        roster: The roster's digest.
        admins: The pinned admins' Ed25519 public keys, 64 hexadecimal digits each.
    """

    kind: ClassVar[str] = "federation"
    federation: str = _field(_NAME)
    epoch: int = _field(_COUNT)
    roster: str = _field(_DIGEST)
    admins: tuple[str, ...] = _field(_KEYS)

    def __post_init__(self) -> None:
        _check(self)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """A person at the site approved a plan for one run on one data set.

    Attributes:
        ledger: The id of the ledger it is for, so that it counts at no other site.
        recovery: The id of that ledger's last recovery, or empty, so that none that was signed before a loss counts after it.
        plan: The plan's digest.
        name: The plan's name.
        run: The run's name.
        federation: The federation's; empty in a simulation.
        data: The data set that may be used.
        epsilon: What the plan claims to cost.
        delta: Of that.
        sampling_rate: q.
        noise_multiplier: σ.
        clip_norm: The largest norm of a person's gradient.
        steps_per_round: Optimizer steps in a round.
        rounds: How many the run has.
        divisor: q·N.
        by: Who approves, by name.
        key: Her Ed25519 public key, 64 hexadecimal digits.
        expires: When the approval ends, as in 2026-11-23T02:40:00Z.
        nonce: Drawn at random, 32 hexadecimal digits, so that one given anew differs from one that was revoked.
        signature: Over `statement()`, 128 hexadecimal digits; empty until it is signed.
    """

    kind: ClassVar[str] = "approve"
    ledger: str = _field(_ID)
    recovery: str = _field(_or_nothing(_ID), default="")
    plan: str = _field(_DIGEST)
    name: str = _field(_NAME)
    run: str = _field(_NAME)
    federation: str = _field(_or_nothing(_NAME))
    data: str = _field(_NAME)
    epsilon: float = _field(_EPSILON)
    delta: float = _field(_DELTA)
    sampling_rate: float = _field(_RATE)
    noise_multiplier: float = _field(_POSITIVE)
    clip_norm: float = _field(_POSITIVE)
    steps_per_round: int = _field(_COUNT)
    rounds: int = _field(_COUNT)
    divisor: float = _field(_POSITIVE)
    by: str = _field(_NAME)
    key: str = _field(_KEY)
    expires: str = _field(_UNTIL)
    nonce: str = _field(_ID)
    signature: str = _field(_SIGNATURE, default="")

    def __post_init__(self) -> None:
        _check(self)

    def statement(self) -> bytes:
        """Return what the approver signs: everything but the signature."""
        return b"confide-approval/1\n" + _unsigned(self)

    def signed(self, approver: Identity) -> Self:
        """Return the approval with the signature of `approver`, whose key it must name."""
        return dataclasses.replace(self, signature=approver.sign(self.statement()).hex())

    @property
    def terms(self) -> tuple[object, ...]:
        """What several approvers must agree on: all but who approves and until when."""
        return _TERMS(self)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Revocation:
    """All approvals of a plan's run that were recorded so far are void.

    Attributes:
        plan: The plan's digest.
        run: The run's name.
        by: Who revokes.
        reason: Why.
    """

    kind: ClassVar[str] = "revoke"
    plan: str = _field(_DIGEST)
    run: str = _field(_NAME)
    by: str = _field(_NAME)
    reason: str = _field(_REASON)

    def __post_init__(self) -> None:
        _check(self)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """An agent was started; all its randomness is fresh from here on.

    Attributes:
        process: Drawn at random by the agent, 32 hexadecimal digits.
        software: What it runs, with its version.
        words: What weakens it, by its words, such as keys that no passphrase protects.
    """

    kind: ClassVar[str] = "start"
    process: str = _field(_ID)
    software: str = _field(_NAME)
    words: tuple[str, ...] = _field(_WORDS, default=_NO_TUPLE)

    def __post_init__(self) -> None:
        _check(self)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """A round's cost is spent; only now may it be trained.

    Attributes:
        run: The run's name.
        plan: The plan's digest.
        data: The data set.
        version: The version of it that is trained on.
        round: From 1.
        sampling_rate: q.
        noise_multiplier: σ.
        steps: Noised steps.
        clip_norm: The largest norm of a person's gradient.
        divisor: q·N.
        noise: Which generator the noise comes from.
        start: The digest of the adapter that training starts from.
        roster: The digest of the roster that the round is summed under, or the word for a sum without one.
        accounts: Those that are charged: the data set's. The book fills them in where there are none.
        spent: What each account's filter has spent afterwards, never rounded down. The book fills it in.
    """

    kind: ClassVar[str] = "reserve"
    run: str = _field(_NAME)
    plan: str = _field(_DIGEST)
    data: str = _field(_NAME)
    version: int = _field(_COUNT)
    round: int = _field(_COUNT)
    sampling_rate: float = _field(_RATE)
    noise_multiplier: float = _field(_POSITIVE)
    steps: int = _field(_COUNT)
    clip_norm: float = _field(_POSITIVE)
    divisor: float = _field(_POSITIVE)
    noise: str = _field(_NAME)
    start: str = _field(_DIGEST)
    roster: str = _field(_ROSTER)
    accounts: tuple[str, ...] = _field(_ACCOUNTS, default=_NO_TUPLE)
    spent: tuple[float, ...] = _field(_SPENT, default=_NO_TUPLE)

    def __post_init__(self) -> None:
        _check(self)

    def spend(self, given_back: int = 0) -> Spend:
        """Return the spend, less the steps that were given back; these must be fewer than all."""
        return Spend(
            round=self.round,
            sampling_rate=self.sampling_rate,
            noise_multiplier=self.noise_multiplier,
            steps=self.steps - given_back,
            clip_norm=self.clip_norm,
            divisor=self.divisor,
            noise=self.noise,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bind:
    """A reserved round has its vector; every attempt at the round masks this one.

    Attributes:
        run: The run's name.
        round: The round.
        commitment: A salted digest of the vector.
    """

    kind: ClassVar[str] = "bind"
    run: str = _field(_NAME)
    round: int = _field(_COUNT)
    commitment: str = _field(_DIGEST)

    def __post_init__(self) -> None:
        _check(self)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """A bound vector was masked for an attempt; this costs nothing.

    Attributes:
        run: The run's name.
        round: The round.
        attempt: From 1, or from 0.
        digest: Of the masked vector.
    """

    kind: ClassVar[str] = "mask"
    run: str = _field(_NAME)
    round: int = _field(_COUNT)
    attempt: int = _field(_whole(0, 10**9))
    digest: str = _field(_DIGEST)

    def __post_init__(self) -> None:
        _check(self)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """The site helps to open a round's sum; nothing follows for this round.

    Attributes:
        run: The run's name.
        round: The round.
        evidence: A keyed digest of what the site measured and keeps to itself, 64 hexadecimal digits, or empty.
    """

    kind: ClassVar[str] = "commit"
    run: str = _field(_NAME)
    round: int = _field(_COUNT)
    evidence: str = _field(_or_nothing(_KEY))

    def __post_init__(self) -> None:
        _check(self)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Forfeit:
    """A reserved round was lost before it had a vector; it counts in full.

    Attributes:
        run: The run's name.
        round: The round.
        reason: Why.
    """

    kind: ClassVar[str] = "forfeit"
    run: str = _field(_NAME)
    round: int = _field(_COUNT)
    reason: str = _field(_REASON)

    def __post_init__(self) -> None:
        _check(self)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Refund:
    """A reserved round was given up before it had a vector; the steps that touched no data do not count.

    Attributes:
        run: The run's name.
        round: The round.
        steps: How many of its steps touched no data.
    """

    kind: ClassVar[str] = "refund"
    run: str = _field(_NAME)
    round: int = _field(_COUNT)
    steps: int = _field(_COUNT)

    def __post_init__(self) -> None:
        _check(self)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A noised statistic of a data set leaves the site: one step of the Gaussian mechanism on everybody.

    Attributes:
        data: The data set.
        what: What is released, in words.
        noise_multiplier: σ: the noise's standard deviation over what one person may change.
        accounts: As of a Reserve.
        spent: As of a Reserve.
    """

    kind: ClassVar[str] = "release"
    data: str = _field(_NAME)
    what: str = _field(_REASON)
    noise_multiplier: float = _field(_POSITIVE)
    accounts: tuple[str, ...] = _field(_ACCOUNTS, default=_NO_TUPLE)
    spent: tuple[float, ...] = _field(_SPENT, default=_NO_TUPLE)

    def __post_init__(self) -> None:
        _check(self)

    def spend(self) -> Spend:
        """Return what it costs, as a round of one step with everybody in it."""
        return Spend(
            round=1,
            sampling_rate=1.0,
            noise_multiplier=self.noise_multiplier,
            steps=1,
            clip_norm=1.0,
            divisor=1.0,
            noise=self.what,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Renewal:
    """An account's next period begins, with its whole budget.

    Attributes:
        ledger: The id of the ledger it is for.
        recovery: As of an Approval.
        account: The account.
        period: Its new period, from 2.
        reason: Why its persons may lose that much privacy again.
        by: Who renews, by name.
        key: Her Ed25519 public key, 64 hexadecimal digits.
        signature: Over `statement()`, 128 hexadecimal digits; empty until it is signed.
    """

    kind: ClassVar[str] = "renew"
    ledger: str = _field(_ID)
    recovery: str = _field(_or_nothing(_ID))
    account: str = _field(_ACCOUNT)
    period: int = _field(_whole(2, 10**6))
    reason: str = _field(_REASON)
    by: str = _field(_NAME)
    key: str = _field(_KEY)
    signature: str = _field(_SIGNATURE, default="")

    def __post_init__(self) -> None:
        _check(self)

    def statement(self) -> bytes:
        """Return what the approver signs: everything but the signature."""
        return b"confide-renewal/1\n" + _unsigned(self)

    def signed(self, approver: Identity) -> Self:
        """Return the renewal with the signature of `approver`, whose key it must name."""
        return dataclasses.replace(self, signature=approver.sign(self.statement()).hex())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """From here on, this record included, checkpoints are signed by another key.

    Attributes:
        key: The new Ed25519 public key, 64 hexadecimal digits.
        by_old: The old key's signature over `rotation_statement`, 128 hexadecimal digits.
        by_new: The new key's.
    """

    kind: ClassVar[str] = "rotate"
    key: str = _field(_KEY)
    by_old: str = _field(_SIGNATURE)
    by_new: str = _field(_SIGNATURE)

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def between(cls, ledger: str, old: Identity, new: Identity) -> Self:
        """Return the entry by which a ledger goes from one key to another; both sign it."""
        statement = rotation_statement(ledger, old.public.hex(), new.public.hex())
        return cls(key=new.public.hex(), by_old=old.sign(statement).hex(), by_new=new.sign(statement).hex())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """A ledger was lost or damaged. Every account counts as fully spent, and all rounds and approvals are closed.

    Attributes:
        recovery: Drawn at random, 32 hexadecimal digits: of two recoveries from one copy, each knows its own approvals.
        size: How many records the lost one is known to have had.
        root: The Merkle root over these, 64 hexadecimal digits.
        reason: What happened.
        by: Who says so.
    """

    kind: ClassVar[str] = "recover"
    recovery: str = _field(_ID)
    size: int = _field(_whole(0, MOST_RECORDS))
    root: str = _field(_KEY)
    reason: str = _field(_REASON)
    by: str = _field(_NAME)

    def __post_init__(self) -> None:
        _check(self)


Entry = (
    Genesis
    | PolicyInForce
    | AccountOpened
    | DataSet
    | Federation
    | Approval
    | Revocation
    | Started
    | Reserve
    | Bind
    | Mask
    | Commit
    | Forfeit
    | Refund
    | Release
    | Renewal
    | Rotation
    | Recovered
)
KINDS: Final[dict[str, type[Entry]]] = {entry.kind: entry for entry in typing.get_args(Entry)}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stamped:
    """An entry in its place.

    Attributes:
        seq: Its number, from 1.
        prev: `sha256:` and the leaf hash of the line before; FIRST_PREV for the first.
        at: When it was recorded, in seconds since 1970, UTC.
        entry: The entry.
        leaf: The leaf hash of its own line, 32 bytes.
    """

    seq: int
    prev: str
    at: int
    entry: Entry
    leaf: bytes


def encode(entry: Entry, seq: int, prev: str, at: int) -> bytes:
    """Return the entry's line, without a line break.

    Args:
        entry: The entry.
        seq: Its number, from 1.
        prev: `sha256:` and 64 hexadecimal digits.
        at: Seconds since 1970, UTC, to the year 9999.

    Raises:
        LedgerError: The stamp is out of range, or the line would be longer than LARGEST_RECORD_BYTES.
    """
    kind = type(entry)
    fields = dict(zip(_NAMES[kind], _VALUES[kind](entry), strict=True))
    fields.update(format=FORMAT, seq=seq, prev=prev, at=utc_text(at), kind=entry.kind)
    line = _spelled(fields)
    if len(line) > LARGEST_RECORD_BYTES:
        raise LedgerError(
            f"A record of kind {entry.kind} would have {len(line)} bytes; {LARGEST_RECORD_BYTES} are allowed. Use shorter "
            "texts, or fewer accounts for a data set."
        )
    return line


def decode(line: bytes) -> Stamped:
    """Return the entry whose line this is, with its stamp. Whether it may stand there is for `ledger.Book` to say.

    Raises:
        LedgerError: The line is not an entry in its one spelling.
    """
    if len(line) > LARGEST_RECORD_BYTES:
        raise LedgerError(f"A record has {len(line)} bytes; {LARGEST_RECORD_BYTES} are allowed.")
    try:
        fields = json.loads(line.decode("ascii"))
    except (ValueError, RecursionError):
        raise LedgerError("A record is not JSON in ASCII.") from None
    if type(fields) is not dict or fields.get("format") != FORMAT:
        raise LedgerError(f"A record is not of the format {FORMAT}.")
    kind = fields.get("kind")
    entry_type = KINDS.get(kind) if type(kind) is str else None
    if entry_type is None:
        raise LedgerError(f"A record is of the unknown kind {_shown(kind)}. A later version may have written it.")
    del fields["format"], fields["kind"]
    seq, prev, at = fields.pop("seq", None), fields.pop("prev", None), fields.pop("at", None)
    if type(seq) is not int or not 1 <= seq <= MOST_RECORDS:
        raise LedgerError(f"A record's number is {_shown(seq)}; it must be a whole number from 1.")
    if type(prev) is not str or not _DIGEST.holds(prev):
        raise LedgerError(f"A record's prev is {_shown(prev)}; it must be {_DIGEST.says}.")
    if type(at) is not str:
        raise LedgerError(f"A record's time is {_shown(at)}; it must be {_UNTIL.says}.")
    seconds = utc_seconds(at)
    if fields.keys() != _NAME_SETS[entry_type]:
        lacking, beyond = _NAME_SETS[entry_type] - fields.keys(), fields.keys() - _NAME_SETS[entry_type]
        raise LedgerError(
            f"A record of kind {kind} lacks the fields {_shown(sorted(lacking))} and has {_shown(sorted(beyond))} beyond "
            "those it should have."
        )
    entry = entry_type(**fields)
    if encode(entry, seq, prev, seconds) != line:
        raise LedgerError(f"A record of kind {kind} is not in its one spelling.")
    return Stamped(seq=seq, prev=prev, at=seconds, entry=entry, leaf=leaf_hash(line))


def rotation_statement(ledger: str, old: str, new: str) -> bytes:
    """Return what both keys sign when one takes the other's place; keys as 64 hexadecimal digits."""
    return b"confide-rotation/1\n" + canonical_bytes({"ledger": ledger, "old": old, "new": new})


@functools.lru_cache(maxsize=4096)
def utc_text(at: int) -> str:
    """Return seconds since 1970 as in 2026-11-23T02:40:00Z.

    Raises:
        LedgerError: They are below 0 or beyond the year 9999.
    """
    if type(at) is not int or not 0 <= at <= LATEST:
        raise LedgerError(f"The time {_shown(at)} is out of range (1970 to 9999). Set this machine's clock.")
    return f"{(_EPOCH + datetime.timedelta(seconds=at)).isoformat()}Z"


@functools.lru_cache(maxsize=4096)
def utc_seconds(text: str) -> int:
    """Return the seconds since 1970 of a time as in 2026-11-23T02:40:00Z.

    Raises:
        LedgerError: It is spelled in another way, there is no such time, or it is before 1970.
    """
    try:
        seconds = int(datetime.datetime.fromisoformat(text).timestamp()) if _TIME.fullmatch(text) else -1
    except ValueError:
        seconds = -1
    if seconds < 0 or utc_text(seconds) != text:  # some versions of Python take 24:00:00 for the next day
        raise LedgerError(f"{_shown(text)} is not {_UNTIL.says}, from 1970 on.")
    return seconds


def _is_time(text: str) -> bool:
    try:
        utc_seconds(text)
    except LedgerError:
        return False
    return True


def _check(entry: Entry) -> None:
    """Return if all fields are what they should be; a list becomes a tuple, and a whole number a real one."""
    for name, form in _FORMS[type(entry)]:
        value = getattr(entry, name)
        if type(value) is not form.type:
            value = _brought(value, form.type)
            object.__setattr__(entry, name, value)
        if type(value) is not form.type or not form.holds(value):
            raise LedgerError(
                f"The field {name} of a record of kind {entry.kind} is {_shown(value)}; due is {form.says}."
            )


def _brought(value: object, due: type) -> object:
    """Return a value of the type that is due, if that changes nothing about it."""
    if due is tuple and isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return tuple(value)
    if due is float and isinstance(value, int | float) and type(value) is not bool:
        try:
            return float(value) if float(value) == value else value
        except OverflowError:
            return value
    return value


def _unsigned(entry: Approval | Renewal) -> bytes:
    fields = dict(zip(_NAMES[type(entry)], _VALUES[type(entry)](entry), strict=True))
    del fields["signature"]
    return canonical_bytes(fields)


def _shown(value: object) -> str:
    """Return a value for a message: short, and of printable ASCII whatever it is."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # a number of more digits than Python spells, or a list without end
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}…"


# The encoder is made once: `canonical_bytes` makes one for each call, and a ledger calls it 10⁵ times.
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _spelled(fields: dict[str, object]) -> bytes:
    """Return `canonical_bytes(fields)`."""
    return _ENCODER.encode(fields).encode()


_FORMS: Final = {
    entry: tuple((field.name, field.metadata["form"]) for field in dataclasses.fields(entry))
    for entry in KINDS.values()
}
_NAMES: Final = {entry: tuple(name for name, _ in forms) for entry, forms in _FORMS.items()}
_NAME_SETS: Final = {entry: frozenset(names) for entry, names in _NAMES.items()}
_VALUES: Final[dict[type[Entry], Callable[[Any], tuple[Any, ...]]]] = {
    entry: operator.attrgetter(*names) for entry, names in _NAMES.items()
}
_TERMS: Final[Callable[[Any], tuple[object, ...]]] = operator.attrgetter(
    *(name for name in _NAMES[Approval] if name not in {"by", "key", "expires", "nonce", "signature"})
)
