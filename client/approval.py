"""Approval: a person's signature under a plan's terms, without which a site trains nothing.

What is signed is not a name but the terms themselves: the plan's digest, the run, the federation, the data set, the
mechanism with its divisor, and a last moment. A plan that changes in any setting has another digest and needs another
approval. The ledger records approvals and revocations, and lets no round through that none covers.
"""

import dataclasses
import functools
import math
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from confide.client.judgement import Price, Refusal, require
from confide.client.mechanism import Mechanism
from confide.client.policy import Policy
from confide.client.terminal import left, spent
from confide.common.crypto import Identity, verify
from confide.common.entries import Approval, Revocation, utc_seconds, utc_text
from confide.common.errors import MessageError, Refused
from confide.common.explain import explain
from confide.common.ledger import Standing
from confide.common.plan import Plan
from confide.common.wording import ended

DAY_S = 86_400
NONCE_BYTES = 16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What is approved, apart from who approves it and until when.

    Attributes:
        ledger: The id of this site's ledger, 32 hexadecimal digits, so that an approval counts at no other site.
        recovery: The id of that ledger's last recovery, or empty, so that none signed before a loss counts after it.
        plan: The plan.
        run: The run's name.
        federation: The federation's name.
        data: The data set's name.
        declared_persons: N, the number of persons that the site declares for it.
    """

    ledger: str
    recovery: str
    plan: Plan
    run: str
    federation: str
    data: str
    declared_persons: int

    def unsigned(self, *, by: str, key: bytes, expires: int, nonce: str) -> Approval:
        """Return these terms as an approval that nobody has signed.

        Args:
            by: Who is to sign, by name.
            key: That person's public key, 32 bytes.
            expires: When it ends, in seconds since 1970 UTC.
            nonce: 32 hexadecimal digits that no other approval has.

        Raises:
            LedgerError: The ledger has no spelling for one of the terms, such as a name of more than 200 characters.
        """
        return _unsigned(self, by, key, expires, nonce)


def approve(
    policy: Policy, terms: Terms, judged: Iterable[Refusal], *, approver: Identity, now: float, days: int
) -> Approval:
    """Return a person's signed approval of these terms, for the ledger.

    Args:
        policy: The site's.
        terms: What is approved.
        judged: What `judge_plan` and `judge_price` returned for it; with any refusal nothing is signed.
        approver: The person's key; the name is the one the policy has for it.
        now: Seconds since 1970 UTC.
        days: For how many days it holds from then on.

    Raises:
        Refused: Something was refused, the key is none of an approver's, or the days are too many.
        LedgerError: The ledger has no spelling for one of the terms.
    """
    require(judged)
    key = approver.public
    by = approver_name(policy, key.hex())
    most = policy.approval.most_days
    if not 1 <= days <= most:
        raise Refused(
            f"An approval for {days} days was asked for; [approval] most_days allows 1 to {most}. Choose fewer days.",
            "approval",
        )
    expires, nonce = math.floor(now) + days * DAY_S, secrets.token_hex(NONCE_BYTES)
    return terms.unsigned(by=by, key=key, expires=expires, nonce=nonce).signed(approver)


def check(approval: Approval, policy: Policy, terms: Terms, now: float) -> None:
    """Return if `approval` covers exactly these terms now, by somebody who may give it.

    Whether it was revoked is known to the ledger only.

    Raises:
        Refused: It does not; the message tells every term that differs, with both values.

    Guarantee: whatever is in a plan is covered, for its digest is; and whatever the mechanism follows from beside it.
    """
    by = approver_name(policy, approval.key)
    key, expires = bytes.fromhex(approval.key), utc_seconds(approval.expires)
    due = terms.unsigned(by=by, key=key, expires=expires, nonce=approval.nonce)
    other = [
        f"{field.name} is {getattr(approval, field.name)}, and would have to be {getattr(due, field.name)}"
        for field in dataclasses.fields(Approval)
        if field.name != "signature" and getattr(approval, field.name) != getattr(due, field.name)
    ]
    if other:
        raise Refused(f"The approval by {by} is one of other terms: {'; '.join(other)}. {_AGAIN}", "approval")
    remaining_s = expires - now
    if not 0 < remaining_s <= (policy.approval.most_days + 1) * DAY_S:  # a clock may be set back a little
        raise Refused(
            f"The approval by {by} holds until {approval.expires}; it is {utc_text(math.floor(now))}, and [approval] most_days allows "
            f"{policy.approval.most_days} days. {_AGAIN}",
            "approval",
        )
    try:
        _check_signature(approval)
    except MessageError:
        raise Refused(f"The signature under the approval by {by} is not that person's. {_AGAIN}", "approval") from None


def given(recorded: Iterable[Standing], policy: Policy, terms: Terms, now: float) -> tuple[Approval, ...]:
    """Return the approvals that cover these terms now, one of each person: the one that holds longest.

    Args:
        recorded: What the ledger has, as `Book.approvals`; what was revoked does not count.
        policy: The site's.
        terms: What is to be covered.
        now: Seconds since 1970 UTC.
    """
    valid: dict[str, Approval] = {}
    for approval in (standing.approval for standing in recorded if not standing.revoked):
        try:
            check(approval, policy, terms, now)
        except Refused:
            continue
        before = valid.get(approval.key)
        if before is None or utc_seconds(before.expires) < utc_seconds(approval.expires):
            valid[approval.key] = approval
    return tuple(valid.values())


def needed(policy: Policy, approvals: Sequence[Approval]) -> int:
    """Return how many more persons must approve, if these are what `given` returned."""
    return max(0, policy.approval.signatures - len({approval.key for approval in approvals}))


def in_words(policy: Policy, approvals: Sequence[Approval]) -> str:
    """Say in one or two sentences who approved, until when, and who else must; of what `given` returned."""
    more, people = needed(policy, approvals), policy.approvers
    by = "; ".join(f"{approval.by} until {approval.expires}" for approval in approvals) or "nobody"
    if not more:
        until = sorted((approval.expires for approval in approvals), reverse=True)[policy.approval.signatures - 1]
        return f"Approved by {by}. It may run until {until}."
    others = [name for key, name in people.items() if key not in {approval.key for approval in approvals}]
    who = " or ".join(others) if len(others) >= more else "somebody whom [approval] approvers must name first"
    rule = (
        ""
        if policy.approval.signatures == 1
        else " By the policy two persons must approve, each with a key of their own."
    )
    return f"Approved by {by}; {more} more must approve: {ended(who)}{rule}"


def approver_name(policy: Policy, key: str) -> str:
    """Return the name that the policy has for an approver's key of 64 hexadecimal digits.

    Raises:
        Refused: It has none.
    """
    name = policy.approvers.get(key)
    if name is None:
        raise Refused(
            f"The key {key[:16]}… may not approve; [approval] approvers names "
            f"{ended(', '.join(policy.approvers.values()) or 'nobody')} Have one of them approve, or add the key to the policy.",
            "approval",
        )
    return name


def revoke(plan_digest: str, run: str, *, by: str, reason: str) -> Revocation:
    """Return what ends every approval of a plan in a run; once the ledger has it, no exchange of that run begins.

    It needs no signature: whoever works at this machine may always stop.

    Raises:
        LedgerError: There is no reason, or it or a name is too long or not printable.
    """
    return Revocation(plan=plan_digest, run=run, by=by, reason=reason)


def sentences(
    policy: Policy, terms: Terms, price: Price, *, coordinator: bytes, expires: int, model: Path | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Yield (heading, sentences): what a person reads before approving a plan.

    Args:
        policy: The site's.
        terms: What is to be approved.
        price: What it would cost.
        coordinator: The key that the federation's coordinator signs with, 32 bytes.
        expires: When the approval would end, in seconds since 1970 UTC.
        model: The base model's local directory, for a forecast.

    Raises:
        ModelError: `model` holds no model that the plan's targets are in.
    """
    yield "What you are asked", _asked(policy, terms, coordinator, expires)
    yield "What it would cost", _cost(price, terms)
    yield "What would be left", [line for account in price.accounts for line in _left(account.account, price)]
    yield from explain(terms.plan, model)


_AGAIN = "Have the plan approved again."


def _asked(policy: Policy, terms: Terms, coordinator: bytes, expires: int) -> list[str]:
    plan, signatures = terms.plan, policy.approval.signatures
    return [
        f"Whether the plan {plan.name!r} may run at {policy.site} on the data set {terms.data!r}, in the run {terms.run!r} of "
        f"the federation {terms.federation!r}.",
        f"The plan's digest is {plan.digest}. If anything in the plan changes, so does the digest, and this approval does "
        "not cover it.",
        f"Who coordinates holds the key {coordinator.hex()}. Compare it with what the federation told you by another way.",
        f"The data set is declared with {terms.declared_persons} persons. The noised sum of a step is divided by "
        f"{plan.privacy.sampling_rate * terms.declared_persons:g}, whoever is drawn.",
        f"An approval given now would hold until {utc_text(expires)}. It can be revoked before; that stops the next exchange, "
        "and takes back nothing that was sent.",
        "One person's approval is enough."
        if signatures == 1
        else f"{signatures} persons must approve, each with a key of their own.",
    ]


def _cost(price: Price, terms: Terms) -> list[str]:
    rounds = terms.plan.privacy.rounds
    told = [
        f"The plan asks for epsilon = {price.asked:g} at delta = {price.delta:g}. As declared, {price.rounds} rounds "
        f"cost {spent(price.declared)}; that is what the run may claim.",
        f"A budget is charged {spent(price.adaptive)} for them. It is more because a budget is spent by plans that may be chosen "
        "after seeing what earlier ones gave, and is counted by a Rényi filter.",
        "Rounds that come to nothing count in full once training was allowed to begin.",
    ]
    if price.rounds < rounds:
        told.insert(
            0, f"Of {rounds} rounds {rounds - price.rounds} were begun and are paid; what follows is of the others."
        )
    return told


def _left(name: str, price: Price) -> Iterator[str]:
    account = next(account for account in price.accounts if account.account == name)
    budget = f"epsilon = {account.epsilon:g} at delta = {account.delta:g}"
    if account.fits < 1:
        yield (
            f"Account {name} has a budget of {budget}, of which {spent(account.used)} is used. The plan does not fit: it would "
            f"bring it to {spent(account.after)}."
        )
        return
    yield (
        f"Account {name} has a budget of {budget}. {spent(account.used)} is used now, {spent(account.after)} would be afterwards, "
        f"and {left(account.left)} would be left."
    )
    such = "such plan" if account.fits == 1 else "such plans"
    yield f"{account.fits} {such} would fit into what is left now, this one included."


@functools.lru_cache(maxsize=64)  # an agent asks for the same terms before every message
def _unsigned(terms: Terms, by: str, key: bytes, expires: int, nonce: str) -> Approval:
    privacy, mechanism = terms.plan.privacy, Mechanism.of(terms.plan.privacy, terms.declared_persons)
    return Approval(
        ledger=terms.ledger,
        recovery=terms.recovery,
        plan=terms.plan.digest,
        name=terms.plan.name,
        run=terms.run,
        federation=terms.federation,
        data=terms.data,
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        sampling_rate=mechanism.sampling_rate,
        noise_multiplier=mechanism.noise_multiplier,
        clip_norm=mechanism.clip_norm,
        steps_per_round=mechanism.steps,
        rounds=privacy.rounds,
        divisor=mechanism.divisor,
        by=by,
        key=key.hex(),
        expires=utc_text(expires),
        nonce=nonce,
    )


@functools.lru_cache(maxsize=64)  # as above; a signature that does not hold is looked at each time
def _check_signature(approval: Approval) -> None:
    verify(bytes.fromhex(approval.key), approval.statement(), bytes.fromhex(approval.signature))
