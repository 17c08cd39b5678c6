"""The verdict on a plan, found out in a process that ends with it: the libraries it takes are larger than all of the agent.

That process has so much time and no more, since the agent answers nobody meanwhile.
"""

import dataclasses
from collections.abc import Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Final

from confide.client.judgement import Price, Refusal, judge_plan, judge_price
from confide.client.policy import Policy
from confide.common.calibration import noise_multiplier
from confide.common.entries import DataSet
from confide.common.errors import RunError
from confide.common.filter import Filter
from confide.common.plan import Plan

JUDGING_S: Final = 120.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a verdict rests on.

    Attributes:
        policy: The site's.
        plan: The plan.
        federation: The name of the federation whose coordinator signed it.
        sites: How many sites that federation's pinned roster has.
        data: The data set, as the ledger has it.
        base: The digest of the base model's files on this site's disk.
        accounts: The filters of the accounts that the data set charges, by name.
        rounds: For how many rounds these must have room; with 0 the price is not judged.
    """

    policy: Policy
    plan: Plan
    federation: str
    sites: int
    data: DataSet
    base: str
    accounts: Mapping[str, Filter]
    rounds: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was found out.

    Attributes:
        refusals: Every reason why not.
        noise: The plan's noise multiplier; 0 if there is a refusal.
    """

    refusals: tuple[Refusal, ...]
    noise: float


def verdict(question: Question, limit_s: float = JUDGING_S) -> Verdict:
    """Return the verdict on a plan, from a process of its own.

    Raises:
        TimeoutError: There is none after `limit_s` seconds; the process was killed.
        RunError: The process ended without one.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(theirs, question), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(limit_s):
            raise TimeoutError(f"The plan could not be judged within {limit_s:g} s.")
        found = ours.recv()
    except EOFError:
        process.join()
        raise RunError(
            f"The process that judges the plan ended with code {process.exitcode} and without a verdict. Look at what it wrote to the "
            "standard error, and whether this machine has memory left."
        ) from None
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()
    assert isinstance(found, Verdict)
    return found


def judged(question: Question) -> Verdict:
    """Return the verdict, found out in this process."""
    refusals = judge_plan(
        question.policy,
        question.plan,
        base_digest=question.base,
        federation=question.federation,
        sites_on_roster=question.sites,
        declared_persons=question.data.declared_persons,
        person_id=question.data.person_id,
    )
    if not refusals and question.rounds > 0:
        refusals = judge_price(Price.of(question.plan.privacy, question.accounts, question.rounds))
    return Verdict(refusals=refusals, noise=0.0 if refusals else noise_multiplier(question.plan.privacy))


def _tell(to: "Connection", question: Question) -> None:
    to.send(judged(question))
