"""A ledger's record in a line of plain words, for a person who reads the ledger. The whole record is its JSON."""

from collections.abc import Callable
from typing import Any, Final

from confide.common.entries import (
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
)
from confide.common.wording import several


def record_line(entry: Entry) -> str:
    """Say in a line what a record says, and nothing beyond."""
    return _LINES[type(entry)](entry)


def _policy(entry: PolicyInForce) -> str:
    return (
        f"epsilon {entry.epsilon:g} at delta {entry.delta:g} for an account, {entry.plan_epsilon:g} for a plan; "
        f"{entry.approvals_needed} of {several(len(entry.approvers), 'approver')} must approve"
    )


def _data(entry: DataSet) -> str:
    return (
        f"{entry.data}, version {entry.version} ({entry.event}): {several(entry.declared_persons, 'person')} declared, "
        f"{_accounts(entry.accounts)}"
    )


def _reserve(entry: Reserve) -> str:
    return (
        f"{_round(entry)} on {entry.data}: {several(entry.steps, 'step')}, q {entry.sampling_rate:g}, σ "
        f"{entry.noise_multiplier:g}, {_accounts(entry.accounts)}"
    )


def _round(entry: Reserve | Bind | Mask | Commit | Forfeit | Refund) -> str:
    return f"{entry.run}, round {entry.round}"


def _accounts(names: tuple[str, ...]) -> str:
    return f"account{'' if len(names) == 1 else 's'} {', '.join(names)}"


def _short(key: str) -> str:
    return f"{key[:16]}…"


_LINES: Final[dict[type[Entry], Callable[[Any], str]]] = {
    Genesis: lambda entry: f"the ledger of {entry.site} begins, key {_short(entry.key)}",
    PolicyInForce: _policy,
    AccountOpened: lambda entry: (
        f"account {entry.account}: epsilon {entry.epsilon:g} at delta {entry.delta:g}, order {entry.order}"
    ),
    DataSet: _data,
    Federation: lambda entry: f"{entry.federation}, epoch {entry.epoch}, {several(len(entry.admins), 'admin')}",
    Approval: lambda entry: f"{entry.by} approves {entry.name} for {entry.run} on {entry.data} until {entry.expires}",
    Revocation: lambda entry: f"{entry.by} revokes {entry.run}: {entry.reason}",
    Started: lambda entry: ", ".join((entry.software, *entry.words)),
    Reserve: _reserve,
    Bind: lambda entry: f"{_round(entry)}: the vector is fixed",
    Mask: lambda entry: f"{_round(entry)}: masked for attempt {entry.attempt}",
    Commit: lambda entry: f"{_round(entry)}: helps to open the sum",
    Forfeit: lambda entry: f"{_round(entry)}: lost, counts in full: {entry.reason}",
    Refund: lambda entry: f"{_round(entry)}: {several(entry.steps, 'step')} given back",
    Release: lambda entry: f"{entry.what} of {entry.data}: σ {entry.noise_multiplier:g}, {_accounts(entry.accounts)}",
    Renewal: lambda entry: f"{entry.by} renews account {entry.account}, period {entry.period}: {entry.reason}",
    Rotation: lambda entry: f"key {_short(entry.key)} follows",
    Recovered: lambda entry: f"{entry.by} recovers a ledger of {several(entry.size, 'record')}: {entry.reason}",
}
