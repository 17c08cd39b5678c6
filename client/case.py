"""A plan as a site may judge it: what its policy says, what it would cost here, who approved it, and what is still missing."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

from confide.client.approval import DAY_S, Terms, given, in_words, needed, sentences
from confide.client.judgement import Price, Refusal, judge_plan, judge_price
from confide.client.policy import Policy
from confide.client.received import Received
from confide.common.base import base_digest
from confide.common.calibration import noise_multiplier
from confide.common.entries import Approval, DataSet, utc_text
from confide.common.errors import PrivacyError, UsageError
from confide.common.explain import explain
from confide.common.ledger import Account, Book
from confide.common.plan import Plan
from confide.common.wording import command, several

UNSEEN: Final = "The base model's files were not looked at. To compare them, name their directory with --model."
_NO_DATA = "No data set is registered here. Register one: confide site data add"
_MOST_STEPS = 100_000  # of a plan that is explained although its numbers are refused; the cost of more takes its time


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A plan as this site may judge it.

    Attributes:
        policy: The site's policy.
        received: The plan.
        data: The data set it would use; None if there is none to name.
        terms: What would be approved; None without a data set.
        compared: Whether the base model's files were compared with the plan's digest.
        refusals: Every reason why not.
        price: What the rounds to come would cost; None without a data set, after the last round, or if the plan's own numbers
            do not allow to say.
        approvals: Those that cover it now.
        accounts: Those that the data set charges.
    """

    policy: Policy
    received: Received
    data: DataSet | None
    terms: Terms | None
    compared: bool
    refusals: tuple[Refusal, ...]
    price: Price | None
    approvals: tuple[Approval, ...]
    accounts: tuple[Account, ...]

    @classmethod
    def of(
        cls,
        policy: Policy,
        book: Book,
        received: Received,
        data_name: str | None,
        model: Path | None,
        now: float,
    ) -> Self:
        """Return the case of a plan, judged as it would be approved at this moment.

        Args:
            policy: The site's policy.
            book: What its ledger says.
            received: The plan.
            data_name: The data set it would use; None takes the only one there is.
            model: The base model's local directory, if its files are to be compared.
            now: Seconds since 1970 UTC.

        Raises:
            Refused: There is no such data set.
            UsageError: There are several, and none is named.
            ModelError: `model` holds no base model.
        """
        signed, data = received.signed, _data_set(book, data_name)
        privacy = signed.plan.privacy
        refusals = judge_plan(
            policy,
            signed.plan,
            base_digest=signed.plan.model.base_digest if model is None else base_digest(model),
            federation=signed.federation,
            sites_on_roster=len(received.roster.sites),
            declared_persons=privacy.min_persons if data is None else data.declared_persons,
            person_id=None if data is None else data.person_id,
        )
        to_come = privacy.rounds - len(book.rounds(signed.run))
        terms = price = None
        if data is not None:
            terms = Terms(
                ledger=book.ledger,
                recovery=book.recovery,
                plan=signed.plan,
                run=signed.run,
                federation=signed.federation,
                data=data.data,
                declared_persons=data.declared_persons,
            )
            if to_come > 0 and _is_explained(signed.plan, refusals):
                accounts = {name: book.gate(name) for name in data.accounts}
                price = Price.of(privacy, accounts, to_come)
                refusals += judge_price(price)
        return cls(
            policy=policy,
            received=received,
            data=data,
            terms=terms,
            compared=model is not None,
            refusals=refusals,
            price=price,
            approvals=() if terms is None else given(book.approvals, policy, terms, now),
            accounts=() if data is None else tuple(book.accounts[name] for name in data.accounts),
        )

    @property
    def missing(self) -> int:
        """How many more persons must approve."""
        return needed(self.policy, self.approvals)

    def need_terms(self) -> Terms:
        """Return what would be approved.

        Raises:
            UsageError: No data set is registered.
        """
        if self.terms is None:
            raise UsageError(_NO_DATA)
        return self.terms

    def tree(self) -> dict[str, object]:
        """Return what a machine may want to know of it."""
        signed = self.received.signed
        return {
            "name": signed.plan.name,
            "digest": signed.digest,
            "run": signed.run,
            "federation": signed.federation,
            "data": None if self.data is None else self.data.data,
            "allowed": not self.refusals,
            "refusals": [dataclasses.asdict(refusal) for refusal in self.refusals],
            "base_files_compared": self.compared,
            "price": None if self.price is None else dataclasses.asdict(self.price),
        }

    def sections(self, model: Path | None, now: float) -> list[tuple[str, list[str]]]:
        """Return what a person reads before approving, verdict first, and last what is to be done next.

        Args:
            model: The base model's local directory, for a forecast.
            now: Seconds since 1970 UTC.
        """
        signed = self.received.signed
        verdict = [f"{refusal.rule}: {line}" for refusal in self.refusals for line in refusal.sentence.splitlines()]
        reasons = several(len(self.refusals), "reason")
        parts = [
            (
                f"The policy refuses this plan, for {reasons}" if verdict else "What the policy says",
                verdict or ["It allows this plan."],
            )
        ]
        if not self.compared:
            parts[0][1].append(UNSEEN)
        if self.data is not None:
            parts.append(("Whose rows", list(_whose(self.data, self.accounts))))
        explained = _is_explained(signed.plan, self.refusals)
        if self.terms is not None and self.price is not None:
            expires = math.floor(now) + self.policy.approval.most_days * DAY_S
            parts += sentences(
                self.policy,
                self.terms,
                self.price,
                coordinator=self.received.roster.coordinator,
                expires=expires,
                model=model,
            )
        elif explained:
            parts.append(
                ("What it would cost", [_NO_DATA if self.data is None else "Nothing more: all its rounds were begun."])
            )
            parts += explain(signed.plan, model)
        else:
            parts.append(("What it would cost", ["That is not computed: the plan's own numbers are refused above."]))
        if self.terms is not None:
            next_step = [in_words(self.policy, self.approvals)]
            if not self.refusals and self.missing:
                next_step.append(
                    f"To approve it: {command('confide', 'site', 'plan', 'approve', signed.run, '--data', self.terms.data)} --key FILE"
                )
            parts.append(("Who approved it", next_step))
        return parts


def _whose(data: DataSet, accounts: tuple[Account, ...]) -> Iterator[str]:
    """Yield what decides whose budget a data set takes; another column or namespace would make the same people new."""
    column = f"by the column {data.person_id!r}" if data.person_id else "row by row: each row is a person of its own"
    yield f"The persons of {data.data!r}, version {data.version}, are told apart {column}, among the identifiers {data.ids!r}."
    yield f"It charges {', '.join(f'account {each.account}, in period {each.period} since {utc_text(each.began)}' for each in accounts)}."


def _data_set(book: Book, name: str | None) -> DataSet | None:
    """Return the data set that is meant; None if none is named and none is registered."""
    if name is not None:
        return book.data_set(name)
    usable = [
        data for data in book.data_sets.values() if data.event != "remove" and data.data not in book.lost_data_sets
    ]
    if len(usable) > 1:
        raise UsageError(f"Which data set? Name it with --data: {', '.join(sorted(data.data for data in usable))}.")
    return usable[0] if usable else None


def _is_explained(plan: Plan, refusals: tuple[Refusal, ...]) -> bool:
    """Return whether a plan's cost is computed: its noise can be found, and in a time that a person waits."""
    if plan.privacy.steps > _MOST_STEPS and any(refusal.rule in {"plan-privacy", "rounds"} for refusal in refusals):
        return False
    try:
        noise_multiplier(plan.privacy)
    except PrivacyError:
        return False
    return True
