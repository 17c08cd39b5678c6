"""The server's loop: offer a round, collect a sum, step, record; for as many rounds as the plan has.

The server sees sums only. How they come about is the `Summation`'s business, how messages travel the `Channel`'s; the
loop is the same in a simulation and between institutions.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from confide.common.adapter import Layout
from confide.common.errors import RunError
from confide.common.messages import vector_digest
from confide.common.plan import Plan
from confide.common.ring import RingLayout, Update
from confide.server.aggregate import ServerState, step
from confide.server.store import RoundRecord, Store
from confide.server.summation import Channel, Collected, Summation, Task

MOST_ATTEMPTS = 2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What stays the same over a run's rounds."""

    name: str
    plan: Plan
    layout: Layout
    ring: RingLayout
    sites: tuple[str, ...]
    summation: Summation
    training_s: float = 3600.0
    answer_s: float = 120.0

    def __post_init__(self) -> None:
        federation = self.plan.federation
        if not federation.min_sites <= len(self.sites) <= federation.max_sites:
            raise RunError(
                f"The run has {len(self.sites)} sites; the plan allows {federation.min_sites} to "
                f"{federation.max_sites}. "
                "Change the number of sites, or [federation] min_sites and max_sites."
            )


def run_rounds(
    run: Run, channel: Channel, store: Store, start: ServerState, told: Callable[[RoundRecord], None]
) -> str:
    """Run the rounds that the store does not hold yet, and return how the run ended.

    Args:
        run: What is run.
        channel: How sites are reached.
        store: Where each round is recorded before the next begins.
        start: The state before the first round.
        told: Called with each new record.

    Returns:
        `completed`; `completed-degraded` if in some round a site was missing; `failed` if no round gave a sum.
    """
    state = store.latest(run.layout) or start
    for number in range(len(store.records) + 1, run.plan.privacy.rounds + 1):
        state, record = run_round(run, channel, state, number, partial(store.begin_attempt, number))
        store.commit(state, record, run.layout)
        told(record)
    return status_of(store.records)


def status_of(records: Sequence[RoundRecord]) -> str:
    """Return how a run with these records ended, in the words of `run_rounds`."""
    if not any(record.present for record in records):
        return "failed"
    return "completed-degraded" if any(record.missing for record in records) else "completed"


def run_round(
    run: Run, channel: Channel, state: ServerState, number: int, begin_attempt: Callable[[], int]
) -> tuple[ServerState, RoundRecord]:
    """Run one round; a round without a sum leaves the state as it was and is recorded as void.

    Args:
        run: What is run.
        channel: How sites are reached.
        state: The state before.
        number: The round.
        begin_attempt: Gives the number of each attempt, never one twice.
    """
    began = time.monotonic()
    task = Task(
        run=run.name,
        plan=run.plan,
        round=number,
        attempt=0,
        cohort=tuple(sorted(run.sites)),
        layout=run.layout.digest,
        ring=run.ring,
        adapter=state.adapter,
        parent=vector_digest(state.adapter),
        training_s=run.training_s,
        answer_s=run.answer_s,
    )
    tried = list(_attempts(run, channel, task, begin_attempt))
    last = tried[-1]
    update = None if last.total is None else Update.decode(last.total)
    if update is not None:
        state = step(state, update, run.plan.federation)
    before = {site: why for attempt in tried[:-1] for site, why in attempt.missing.items() if site not in last.present}
    record = RoundRecord(
        round=number,
        attempts=len(tried),
        parent=task.parent,
        adapter=vector_digest(state.adapter),
        moments={name: vector_digest(moment) for name, moment in state.moments.items()},
        present=last.present,
        missing=before | dict(last.missing),
        void=last.void,
        summation=last.summation,
        bounded=update.bounded if update else 0.0,
        saturated=update.saturated if update else 0.0,
        bytes_up=sum(attempt.bytes_up for attempt in tried),
        bytes_down=sum(attempt.bytes_down for attempt in tried),
        seconds=time.monotonic() - began,
    )
    return state, record


def _attempts(run: Run, channel: Channel, task: Task, begin_attempt: Callable[[], int]) -> Iterator[Collected]:
    """Try to sum the round, and once more if it failed before it was opened; sites mask the same vectors again."""
    for _ in range(MOST_ATTEMPTS):
        collected = run.summation.collect(channel, dataclasses.replace(task, attempt=begin_attempt()))
        yield collected
        if not collected.again:
            return
        task = dataclasses.replace(task, cohort=collected.again)
