"""The server's loop: offer a round, collect a sum, step, record; for as many rounds as the plan has.

The server sees sums only. How they come about is the `Summation`'s business, how messages travel the `Channel`'s; the
loop is the same in a simulation and between institutions.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from confide.common.adapter import Layout
from confide.common.errors import RunError
from confide.common.messages import Envelope, Offer, vector_digest
from confide.common.plan import Plan
from confide.common.ring import RingLayout, RingSum, Update
from confide.server.aggregate import ServerState, step
from confide.server.store import RoundRecord, Store


class Channel(Protocol):
    """Carries messages to sites and their answers back."""

    def ask(self, messages: Mapping[str, Envelope], timeout_s: float) -> Iterator[tuple[str, Envelope]]:
        """Send the messages, then yield each answer with its site as it comes, until all are there or time is up.

        Nothing is kept of an answer that was yielded, so a sum taken on the way needs no more memory for more sites.
        """
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What one attempt at a sum gave.

    Attributes:
        total: The sum, or None if too few sites took part for it to be opened.
        present: The sites in the sum, sorted.
        missing: Why each other site is not in it, as a class of error or `no answer`.
        bytes_up: Bytes each present site sent.
        bytes_down: Bytes each site was sent.
    """

    total: RingSum | None
    present: tuple[str, ...]
    missing: Mapping[str, str]
    bytes_up: int
    bytes_down: int


class Summation(Protocol):
    """Turns the sites' vectors into their sum."""

    name: str

    def collect(
        self, channel: Channel, offer: Offer, sites: Sequence[str], ring: RingLayout, least: int, timeout_s: float
    ) -> Collected:
        """Return the sum over those sites that took part, if they are at least `least`."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What stays the same over a run's rounds."""

    name: str
    plan: Plan
    layout: Layout
    ring: RingLayout
    sites: tuple[str, ...]
    summation: Summation
    timeout_s: float = 3600.0

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
        state, record = run_round(run, channel, state, number)
        store.commit(state, record, run.layout)
        told(record)
    return status_of(store.records)


def status_of(records: Sequence[RoundRecord]) -> str:
    """Return how a run with these records ended, in the words of `run_rounds`."""
    if not any(record.present for record in records):
        return "failed"
    return "completed-degraded" if any(record.missing for record in records) else "completed"


def run_round(run: Run, channel: Channel, state: ServerState, number: int) -> tuple[ServerState, RoundRecord]:
    """Run one round; a round without a sum leaves the state as it was and is recorded as void."""
    began = time.monotonic()
    offer = Offer(
        run=run.name,
        plan=run.plan.digest,
        round=number,
        attempt=1,
        sites=len(run.sites),
        layout=run.layout.digest,
        adapter=state.adapter,
    )
    collected = run.summation.collect(channel, offer, run.sites, run.ring, run.plan.federation.min_sites, run.timeout_s)
    parent = offer.adapter_digest
    if collected.total is not None:
        state = step(state, Update.decode(collected.total), run.plan.federation)
    record = RoundRecord(
        round=number,
        parent=parent,
        adapter=vector_digest(state.adapter),
        moments={name: vector_digest(moment) for name, moment in state.moments.items()},
        present=collected.present if collected.total is not None else (),
        missing=dict(collected.missing),
        summation=run.summation.name,
        bytes_up=collected.bytes_up,
        bytes_down=collected.bytes_down,
        seconds=time.monotonic() - began,
    )
    return state, record
