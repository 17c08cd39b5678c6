"""What secure aggregation costs a site and the server, beside Flower's SecAgg+ and CKKS on the same vectors.

Rounds are whole: the server is the real one with its messages, sites are memberships with real keys, and each mean is
compared with the plain one before its figure counts. Only training and the network are left out. A site's cost is
agreeing to the offer, encoding, all five answers and writing them; not its reading of the adapter's message, which it
gets in any kind of federation. The server's cost is everything from offer to mean update.

All costs are processor seconds of one thread, taken in one process, ours and a peer's by turns. A ratio is one of
neighbours in time.
"""

import collections
import dataclasses
import functools
import itertools
import json
import math
import os
import sys
import tracemalloc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from confide.client.membership import Membership
from confide.common.crypto import BLOCK_BYTES, KEY_BYTES, Keystream, Scratch, Verifier, verify
from confide.common.errors import MissingPackage, RunError
from confide.common.graph import SEMI_HONEST, connections
from confide.common.messages import (
    Envelope,
    Floats,
    Message,
    Offer,
    Peers,
    Signatures,
    Start,
    Survivors,
    open_envelope,
    seal,
    vector_digest,
)
from confide.common.plan import load_plan
from confide.common.ring import RingLayout, Update, encode
from confide.common.secagg import SiteSide, apply_masks
from confide.server.summation import Collected, SecureSummation, Task
from confide.simulations.enrolment import Enrolment
from confide.simulations.measurement import Cost, Figure, Note, Stopwatch, figures_alone
from confide.simulations.scenarios import scenario
from confide.simulations.secagg_peers import FLOWER_STEP, Ckks, flower_round

RMS = 1e-3  # of the updates' entries
MASKS = 10
EXCHANGES = 5
DROPPED = (0, 1)  # the places of those who drop out where two do
_CHECKED = 1 << 20  # entries of a mean that are checked at once
_FLOWER = "Flower's SecAgg+, without network and signatures"
_CKKS = "TenSEAL CKKS, N = 8192"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured; the figures' names stand for these sizes.

    Attributes:
        sites: Of a usual cohort.
        parameters: Of a usual vector.
        pairs: How often ours and a peer are measured by turns.
        mask_pairs: The same for masks, which take milliseconds.
        more_sites: Of a cohort whose bytes are counted.
        many_sites: Of a cohort that runs one round; a twentieth of it drops out, spread over the exchanges.
        many_parameters: Of its vectors.
        long_parameters: Of the longest vector, summed by three sites.
        long_rounds: How many rounds of it.
    """

    sites: int = 10
    parameters: int = 1_000_000
    pairs: int = 7
    mask_pairs: int = 25
    more_sites: int = 50
    many_sites: int = 1000
    many_parameters: int = 100_000
    long_parameters: int = 50_000_000
    long_rounds: int = 3


def measure_alone(note: Note, sizes: Sizes = Sizes()) -> dict[str, Figure]:
    """Return what `measure` does, measured in a process of its own whose libraries have one thread each.

    Raises:
        RunError: That process failed.
    """
    return figures_alone([sys.executable, "-W", "ignore", "-c", _ALONE, json.dumps(dataclasses.asdict(sizes))], note)


_ALONE = """
import dataclasses, json, pathlib, sys
from confide.simulations.secagg_bench import Sizes, measure
figures = measure(lambda line: print(line, file=sys.stderr, flush=True), Sizes(**json.loads(sys.argv[1])))
plain = {name: dataclasses.asdict(figure) for name, figure in figures.items()}
pathlib.Path(sys.argv[2]).write_text(json.dumps(plain))
"""


def measure(note: Note, sizes: Sizes) -> dict[str, Figure]:
    """Return all figures, measured in this process.

    Raises:
        RunError: A round failed, or its mean is not the plain one.
    """
    return {
        **_masks(note, sizes),
        **_beside_peers(note, sizes),
        **_bytes(note, sizes),
        **_many(note, sizes),
        **_long(note, sizes),
    }


def _masks(note: Note, sizes: Sizes) -> dict[str, Figure]:
    note(f"{MASKS} masks on {sizes.parameters} numbers, beside their keystream and as many additions")
    masks = [(os.urandom(KEY_BYTES), number % 2 == 0) for number in range(MASKS)]
    words = np.zeros(sizes.parameters, np.uint32)
    scratch, blocks = Scratch(), np.ones((2, BLOCK_BYTES // 4), np.uint32)
    ratios = []
    for _ in range(sizes.mask_pairs):
        ours, floor = Stopwatch(), Stopwatch()
        with ours:
            apply_masks(words, masks, words)
        streams = [Keystream(key) for key, _ in masks]
        with floor:
            _masks_floor(streams, sizes.parameters, scratch, blocks)
        ratios.append(ours.seconds / floor.seconds)
    return {"mask_over_floor": Figure.of(ratios, "x", "keystream and additions in cache")}


def _masks_floor(streams: Sequence[Keystream], length: int, scratch: Scratch, blocks: npt.NDArray[np.uint32]) -> None:
    """Make all keystream in one buffer, and add as many entries within two blocks that stay in the cache."""
    for number, start in enumerate(range(0, length, blocks.shape[1])):
        part, mask = blocks[:, : length - start]
        for stream in streams:
            stream.block(number, scratch)
            np.add(part, mask, out=part)


def _beside_peers(note: Note, sizes: Sizes) -> dict[str, Figure]:
    updates = _updates(sizes.sites, sizes.parameters)
    cohort = Cohort(sizes.sites, _ring32(sizes.parameters, sizes.sites))
    threshold = connections(sizes.sites).threshold
    try:
        ckks = Ckks()
    except MissingPackage as error:
        note(str(error))
        ckks = None
    found: dict[str, list[float]] = {}

    def add(**values: float) -> None:
        for name, value in values.items():
            found.setdefault(name, []).append(value)

    for number in range(1, sizes.pairs + 1):
        note(f"Pair {number} of {sizes.pairs}: {sizes.sites} sites, {sizes.parameters} numbers, then {_FLOWER}")
        ours = cohort.round(updates)
        theirs = _flower(updates, threshold, ())
        add(client_s=ours.cost.site_s, server_s=ours.cost.server_s)
        add(flower_client_s=theirs.site_s, flower_server_s=theirs.server_s)
        if ckks:
            seconds, size = ckks.send(updates[0])
            add(speedup_vs_ckks=seconds / ours.cost.site_s, bytes_ratio_vs_ckks=size / ours.bytes_up)
        add(client_speedup_vs_flower=theirs.site_s / ours.cost.site_s)
        add(server_speedup_vs_flower=theirs.server_s / ours.cost.server_s)
        ours = cohort.round(updates, answers=dict.fromkeys(DROPPED, 2))
        theirs = _flower(updates, threshold, DROPPED)
        add(server_2_drops_s=ours.cost.server_s, flower_server_2_drops_s=theirs.server_s)
        add(server_speedup_vs_flower_2_drops=theirs.server_s / ours.cost.server_s)
    return {name: Figure.of(values, "s" if name.endswith("_s") else "x", _peer(name)) for name, values in found.items()}


def _flower(updates: Sequence[Floats], threshold: int, dropped: Collection[int]) -> Cost:
    mean, cost = flower_round(updates, threshold, dropped)
    _agree("Flower's", mean, [update for place, update in enumerate(updates) if place not in dropped], FLOWER_STEP)
    return cost


def _peer(name: str) -> str:
    return _FLOWER if "vs_flower" in name else _CKKS if "vs_ckks" in name else ""


def _bytes(note: Note, sizes: Sizes) -> dict[str, Figure]:
    note(f"Bytes that a site sends in a round of {sizes.sites} and of {sizes.more_sites} sites")

    def sent(sites: int, ring: RingLayout) -> int:
        return Cohort(sites, ring).round(_updates(3, ring.length)).bytes_up

    length = sizes.parameters
    narrow = RingLayout(length=length, max_sites=sizes.sites, bits=16, segments=((length, 8 * RMS),))
    wide_bytes, narrow_bytes = sent(sizes.sites, _ring32(length, sizes.sites)), sent(sizes.sites, narrow)
    short = 1000  # what is beside the vector is the same for any length
    more_bytes = sent(sizes.more_sites, _ring32(short, sizes.more_sites))
    return {
        "bytes_per_param_32": Figure.of([wide_bytes / length], "B"),
        "bytes_per_param_16": Figure.of([narrow_bytes / length], "B"),
        "bytes_beyond_vector": Figure.of([wide_bytes - 4 * length], "B"),
        "bytes_beyond_vector_50": Figure.of([more_bytes - 4 * short], "B"),
    }


def _many(note: Note, sizes: Sizes) -> dict[str, Figure]:
    sites, length = sizes.many_sites, sizes.many_parameters
    note(f"One round of {sites} sites, {length} numbers, a twentieth drops out; one check of each distinct signature")
    # In this process everybody would check the same signatures; the rest of the cryptography is done by each site.
    cohort = Cohort(sites, _ring32(length, sites), check=functools.cache(verify))
    dropouts = {place: number % EXCHANGES for number, place in enumerate(range(0, sites, 20))}
    outcome = cohort.round(_updates(7, length), answers=dropouts, record=True)
    note("  the server's memory in that round")
    beyond = cohort.server_peak_bytes(outcome) - cohort.vector_bytes
    return {
        "sites_1000_round_s": Figure.of([outcome.cost.site_s * sites + outcome.cost.server_s], "s"),
        "sites_1000_server_mb": Figure.of([beyond / 1e6], "MB"),
    }


def _long(note: Note, sizes: Sizes) -> dict[str, Figure]:
    length = sizes.long_parameters
    cohort = Cohort(3, _ring32(length, 3))
    updates = _updates(1, length)
    seconds = []
    for number in range(1, sizes.long_rounds + 1):
        note(f"Round {number} of {sizes.long_rounds}: 3 sites, {length} numbers")
        seconds.append(cohort.round(updates).cost.server_s)
    note("  the server's memory in such a round")
    peak = cohort.server_peak_bytes(cohort.round(updates, record=True))
    return {
        "params_50m_server_s": Figure.of(seconds, "s"),
        "params_50m_peak_vectors": Figure.of([peak / cohort.vector_bytes], "vectors"),
    }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a round gave that was measured.

    Attributes:
        mean: (n,), the mean of the updates of those who are in the sum.
        cost: Processor seconds.
        bytes_up: Bytes that the site which sent most sent.
        answers: What each site answered, by name and in order; empty if it was not to be recorded.
    """

    mean: Floats
    cost: Cost
    bytes_up: int
    answers: Mapping[str, Sequence[Envelope]]


class Cohort:
    """Sites and a server in this process, with keys of their own and rounds as often as wanted.

    Args:
        sites: How many.
        ring: The ring of their vectors.
        check: Verifies signatures, at the sites and at the server.
    """

    def __init__(self, sites: int, ring: RingLayout, check: Verifier = verify) -> None:
        names = tuple(f"site-{number:04}" for number in range(sites))
        enrolment = Enrolment.of(names)
        plan = load_plan(scenario("messages").plan)
        federation = dataclasses.replace(plan.federation, max_sites=1000, graph=SEMI_HONEST)
        plan = dataclasses.replace(plan, federation=federation)
        self._ring = ring
        self._members = {name: dataclasses.replace(enrolment.member(name, plan, ring), check=check) for name in names}
        self._summation = SecureSummation(enrolment.roster, enrolment.coordinator, check)
        self._task = Task(
            run="bench",
            plan=plan,
            round=1,
            attempt=1,
            cohort=names,
            layout="sha256:bench",
            ring=ring,
            adapter=np.zeros(ring.length, np.float32),
            parent=vector_digest(np.zeros(ring.length, np.float32)),
            training_s=0,
            answer_s=0,
        )

    @property
    def vector_bytes(self) -> int:
        """Bytes of one vector in the ring."""
        return self._ring.size * self._ring.dtype.itemsize

    def round(
        self, updates: Sequence[Floats], answers: Mapping[int, int] | None = None, *, record: bool = False
    ) -> Outcome:
        """Return what a round gave and what it cost.

        Args:
            updates: (n,), float32, each; the sites take them in turn.
            answers: By place, how many exchanges a site answers before it drops out, 0 to 4; all others answer all 5.
            record: Whether to keep the answers.

        Raises:
            RunError: The sum could not be opened, or its mean is not that of the updates.
        """
        updates_of = dict(zip(self._members, itertools.cycle(updates), strict=False))
        sites = [
            Site(self._members[name], update, (answers or {}).get(place, EXCHANGES), record=record)
            for place, (name, update) in enumerate(updates_of.items())
        ]
        server = Stopwatch()
        with server:
            collected, mean = self._serve({site.name: site.answer for site in sites})
        step = (self._ring.update_bound or max(bound for _, bound in self._ring.segments)) / self._ring.largest
        _agree("Ours", mean, [updates_of[name] for name in collected.present], step)
        away = sum(site.away.seconds for site in sites)
        return Outcome(
            mean=mean,
            cost=Cost(site_s=sum(site.work.seconds for site in sites) / len(sites), server_s=server.seconds - away),
            bytes_up=collected.bytes_up,
            answers={site.name: site.answers for site in sites},
        )

    def server_peak_bytes(self, outcome: Outcome) -> int:
        """Return the most memory that the server of a recorded round takes: it goes through the same answers again.

        An answer counts while the server has it. The adapter does not, as the server has it between rounds too.
        """
        recorded = {name: iter(answers) for name, answers in outcome.answers.items()}

        def echo(name: str, _: Envelope) -> Envelope | None:
            answer = next(recorded[name], None)
            return answer and _copy(answer)

        tracemalloc.start()
        try:
            self._serve({name: functools.partial(echo, name) for name in recorded})
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def _serve(self, sites: Mapping[str, "Answering"]) -> tuple[Collected, Floats]:
        collected = self._summation.collect(_Channel(sites), self._task)
        if collected.total is None:
            raise RunError(f"A round of the benchmark could not be opened: {collected.void}")
        return collected, Update.decode(collected.total).mean


class Site:
    """A site for one round: it takes part as its membership says, with an update that is given.

    Args:
        member: Its membership.
        update: (n,), float32.
        exchanges: How many it answers before it drops out.
        record: Whether to keep its answers.

    Attributes:
        work: The watch of what counts as its cost.
        away: The watch of all time that the server waits for it.
        answers: What it answered, if that is kept.
    """

    def __init__(self, member: Membership, update: Floats, exchanges: int, *, record: bool) -> None:
        self.name = member.site
        self.work, self.away = Stopwatch(), Stopwatch()
        self.answers: list[Envelope] = []
        self._member = member
        self._update = update
        self._left = exchanges
        self._record = record
        self._side: SiteSide

    def answer(self, envelope: Envelope) -> Envelope | None:
        """Return the site's answer, or None if it dropped out."""
        if not self._left:
            return None
        self._left -= 1
        with self.away:
            message = open_envelope(envelope)
            if isinstance(message, Start):
                _ = message.adapter_digest  # a site writes it beside its spend, however it sums
            with self.work:
                answer = seal(self._answer(message))
            if self._record:
                self.answers.append(answer)
        return answer

    def _answer(self, message: Message) -> Message:
        match message:
            case Offer():
                self._side = self._member.attend(message)
                return self._side.advertise()
            case Peers():
                return self._side.share(message)
            case Start():
                self._side.admit(message)
                return self._side.mask(encode(self._update, self._member.ring, Keystream(os.urandom(KEY_BYTES))))
            case Survivors():
                return self._side.confirm(message)
            case Signatures():
                return self._side.open(message)
        raise RunError(f"A message of kind {message.kind!r} arrived at a site of the benchmark.")


Answering = Callable[[Envelope], Envelope | None]


class _Channel:
    """Hands messages to the sites of this process, one after the other."""

    def __init__(self, sites: Mapping[str, Answering]) -> None:
        self._sites = sites

    def ask(self, messages: Mapping[str, Envelope], timeout_s: float) -> Iterator[tuple[str, Envelope]]:
        """Yield each site's answer, unless it dropped out."""
        for site, message in messages.items():
            answer = self._sites[site](message)
            if answer is not None:
                yield site, answer
            del answer  # the server has it now, and may let go of it


def _copy(answer: Envelope) -> Envelope:
    """Return the answer in memory of its own, as if it had just come in."""
    vector = None if answer.vector is None else answer.vector.copy()
    return Envelope(body=bytes(bytearray(answer.body)), vector=vector)


def _updates(count: int, length: int) -> list[Floats]:
    return [RMS * np.random.default_rng(seed).standard_normal(length, np.float32) for seed in range(count)]


def _ring32(length: int, sites: int) -> RingLayout:
    return RingLayout(length=length, update_bound=3 * RMS * math.sqrt(length), max_sites=sites)


def _agree(whose: str, mean: npt.NDArray[np.floating[Any]], updates: Sequence[Floats], step: float) -> None:
    """Return if `mean` is that of the updates; rounding moves it by less than a step.

    Raises:
        RunError: It is not.
    """
    times = collections.Counter(map(id, updates))
    distinct = {id(update): update for update in updates}
    for start in range(0, len(mean), _CHECKED):
        part = slice(start, start + _CHECKED)
        due = np.zeros(len(mean[part]))
        for key, update in distinct.items():
            due += times[key] / len(updates) * update[part].astype(np.float64)
        error = float(np.abs(mean[part] - due).max())
        if error > step + 1e-6 * RMS:  # the second is what float32 rounds
            raise RunError(
                f"{whose} mean is off by {error:g}; at most a step of {step:g} was due. Its figures would mean nothing."
            )
