"""The server's loop, with real sums on both sides and sites that send constant updates."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from confide.common.adapter import Floats, Layout
from confide.common.errors import RunError
from confide.common.messages import Contribution, Envelope, Failure, Offer, open_envelope, seal, vector_digest
from confide.common.plan import Plan
from confide.common.ring import RingLayout, encode
from confide.server.aggregate import ServerState
from confide.server.rounds import Run, run_rounds
from confide.server.store import RoundRecord, Store
from confide.simulations.insecure import InsecurePlainSum

LAYOUT = Layout.of({"B": (2, 2), "head": (1,)})
RING = RingLayout(length=5, update_bound=10.0, max_sites=16)
START = np.arange(5, dtype=np.float32)
SITES = ("a", "b", "c", "d")
UPDATES: dict[str, Floats] = {site: np.full(5, number, np.float32) for number, site in enumerate(SITES, start=1)}

Spoil = Callable[[Contribution], Contribution]
Behaviour = Callable[[Offer], Envelope | None]


def honest(site: str, ring: RingLayout = RING) -> Behaviour:
    def answer(offer: Offer) -> Envelope:
        vector = encode(UPDATES[site], ring, np.random.default_rng(offer.round).random)
        return seal(InsecurePlainSum().protect(vector, offer))

    return answer


def silent(_: Offer) -> None:
    return None


def refusing(_: Offer) -> Envelope:
    return seal(Failure(error="Refused", sentence="The site refused."))


def spoiled(**changes: Any) -> Behaviour:
    def answer(offer: Offer) -> Envelope:
        sent = honest("d")(offer)
        assert sent is not None
        message = open_envelope(sent)
        assert isinstance(message, Contribution)
        return seal(dataclasses.replace(message, **changes))

    return answer


@dataclasses.dataclass(kw_only=True)
class Sites:
    """A channel to sites in this process; `turns` says what a site does in a round, else it is honest."""

    turns: Mapping[tuple[str, int], Behaviour] = dataclasses.field(default_factory=dict)
    offers: list[Offer] = dataclasses.field(default_factory=list)
    asked: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    sent: list[int] = dataclasses.field(default_factory=list)

    def ask(self, messages: Mapping[str, Envelope], timeout_s: float) -> Iterator[tuple[str, Envelope]]:
        assert timeout_s > 0
        for site, envelope in messages.items():
            offer = open_envelope(envelope)
            assert isinstance(offer, Offer)
            self.offers.append(offer)
            self.asked.append((offer.round, len(envelope.body) + offer.adapter.nbytes))
            answer = self.turns.get((site, offer.round), honest(site))(offer)
            if answer is not None:
                self.sent.append(len(answer.body) + (0 if answer.vector is None else answer.vector.nbytes))
                yield site, answer


def always(site: str, behaviour: Behaviour) -> dict[tuple[str, int], Behaviour]:
    return {(site, number): behaviour for number in range(1, 100)}


@pytest.fixture
def run(plan: Plan) -> Run:
    return Run(name="demo", plan=plan, layout=LAYOUT, ring=RING, sites=SITES, summation=InsecurePlainSum())


def go(run: Run, sites: Sites, root: Path, start: Floats = START) -> tuple[str, Store, list[RoundRecord]]:
    store, told = Store(root), list[RoundRecord]()
    status = run_rounds(run, sites, store, ServerState.begin(start, run.plan.federation), told.append)
    return status, store, told


def adapter_of(store: Store) -> Floats:
    state = store.latest(LAYOUT)
    assert state is not None
    return state.adapter


def test_a_round_moves_the_adapter_by_the_mean_of_the_updates(run: Run, tmp_path: Path) -> None:
    status, store, told = go(run, Sites(), tmp_path)

    rounds = run.plan.privacy.rounds
    assert status == "completed"
    assert adapter_of(store) == pytest.approx(START + rounds * 2.5, abs=1e-5)
    assert [record.round for record in told] == list(range(1, rounds + 1))
    assert told == store.records
    assert all((record.present, dict(record.missing)) == (SITES, {}) for record in told)


def test_each_round_starts_from_the_adapter_of_the_one_before(run: Run, tmp_path: Path) -> None:
    sites = Sites()
    _, store, _ = go(run, sites, tmp_path)

    parents = [vector_digest(START), *(record.adapter for record in store.records)]
    assert [record.parent for record in store.records] == parents[:-1]
    for offer in sites.offers:
        assert offer.adapter_digest == parents[offer.round - 1]
        assert (offer.run, offer.plan, offer.sites) == ("demo", run.plan.digest, 4)
        assert (offer.attempt, offer.layout) == (1, LAYOUT.digest)


def test_a_dropout_is_recorded_and_the_mean_is_that_of_the_others(run: Run, tmp_path: Path) -> None:
    status, store, _ = go(run, Sites(turns={("d", 1): silent, ("a", 2): refusing}), tmp_path)

    first, second, third = store.records
    assert status == "completed-degraded"
    assert (first.present, dict(first.missing)) == (("a", "b", "c"), {"d": "no answer"})
    assert (second.present, dict(second.missing)) == (("b", "c", "d"), {"a": "Refused"})
    assert (third.present, dict(third.missing)) == (SITES, {})
    assert adapter_of(store) == pytest.approx(START + 2 + 3 + 2.5, abs=1e-5)


def test_a_round_below_min_sites_is_void_and_leaves_the_adapter_as_it_was(run: Run, tmp_path: Path) -> None:
    status, store, _ = go(run, Sites(turns={("c", 2): silent, ("d", 2): refusing}), tmp_path)

    void = store.records[1]
    assert status == "completed-degraded"
    assert void.present == ()
    assert dict(void.missing) == {"c": "no answer", "d": "Refused"}
    assert void.adapter == void.parent == store.records[0].adapter
    assert adapter_of(store) == pytest.approx(START + 2 * 2.5, abs=1e-5)


@pytest.mark.parametrize("optimizer", ["fedavgm", "fedadam"])
def test_a_void_round_leaves_the_optimizer_as_it_was(run: Run, tmp_path: Path, optimizer: str) -> None:
    federation = dataclasses.replace(run.plan.federation, server_optimizer=optimizer)
    run = dataclasses.replace(run, plan=dataclasses.replace(run.plan, federation=federation))
    nobody = {(site, 2): silent for site in SITES}

    _, store, _ = go(run, Sites(turns=nobody), tmp_path)

    assert store.records[1].moments == store.records[0].moments
    assert store.records[2].moments != store.records[0].moments


def test_a_run_of_void_rounds_only_has_failed(run: Run, tmp_path: Path) -> None:
    turns = always("a", silent) | always("b", silent)

    status, store, _ = go(run, Sites(turns=turns), tmp_path)

    assert status == "failed"
    assert len(store.records) == run.plan.privacy.rounds
    assert adapter_of(store).tobytes() == START.tobytes()


MALFORMED: dict[str, Behaviour] = {
    "of another round": spoiled(round=2),
    "of another run": spoiled(run="other"),
    "of another attempt": spoiled(attempt=2),
    "of another ring": spoiled(ring="sha256:" + "0" * 64),
    "of another protection": spoiled(protection="masked"),
    "too short": spoiled(words=np.zeros(4, np.uint32)),
    "too long": spoiled(words=np.zeros(6, np.uint32)),
    "an offer": seal,
    "no JSON": lambda _: Envelope(body=b"?"),
    "nested deeply": lambda _: Envelope(body=b"[" * 100_000),
    "without its vector": lambda offer: Envelope(body=(honest("d")(offer) or Envelope(body=b"")).body),
    "with floats": lambda offer: Envelope(
        body=(honest("d")(offer) or Envelope(body=b"")).body,
        vector=np.zeros(5, np.float32),
    ),
    "of a ring of another bound": honest("d", dataclasses.replace(RING, update_bound=9.0)),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_contribution_counts_as_missing_and_enters_no_sum(run: Run, tmp_path: Path, case: str) -> None:
    status, store, _ = go(run, Sites(turns=always("d", MALFORMED[case])), tmp_path)

    missing = [dict(record.missing) for record in store.records]
    assert status == "completed-degraded"
    # A contribution that names round 2 is what it should be in round 2.
    assert missing == [{} if case == "of another round" and n == 2 else {"d": "MessageError"} for n in (1, 2, 3)]
    moved = 3 * 2 + (0.5 if case == "of another round" else 0)
    assert adapter_of(store) == pytest.approx(START + moved, abs=1e-5)


@pytest.mark.parametrize("name", ["stranger", "a"])
def test_an_answer_of_a_site_that_was_not_asked_or_has_answered_is_ignored(run: Run, tmp_path: Path, name: str) -> None:
    class Crowd(Sites):
        def ask(self, messages: Mapping[str, Envelope], timeout_s: float) -> Iterator[tuple[str, Envelope]]:
            for site, answer in super().ask(messages, timeout_s):
                yield site, answer
                yield name if site == "a" else site, answer

    status, store, _ = go(run, Crowd(), tmp_path)

    assert status == "completed"
    assert store.records[0].present == SITES
    assert adapter_of(store) == pytest.approx(START + 3 * 2.5, abs=1e-5)


def test_bytes_are_those_that_were_sent(run: Run, tmp_path: Path) -> None:
    sites = Sites()

    _, store, _ = go(run, sites, tmp_path)

    assert [(record.round, record.bytes_down) for record in store.records for _ in SITES] == sites.asked
    assert [record.bytes_up for record in store.records for _ in SITES] == sites.sent
    assert all(record.bytes_up > 5 * 4 and record.bytes_down > 5 * 4 for record in store.records)
    assert all(record.seconds >= 0 for record in store.records)


def test_a_round_nobody_answered_took_no_bytes_up(run: Run, tmp_path: Path) -> None:
    _, store, _ = go(run, Sites(turns={(site, 1): silent for site in SITES}), tmp_path)

    assert store.records[0].bytes_up == 0
    assert store.records[0].bytes_down > 0


@pytest.mark.parametrize("optimizer", ["fedavg", "fedadam"])
@pytest.mark.parametrize("stop", [1, 2])
def test_a_run_that_was_stopped_goes_on_where_it_was(run: Run, tmp_path: Path, stop: int, optimizer: str) -> None:
    federation = dataclasses.replace(run.plan.federation, server_optimizer=optimizer)
    run = dataclasses.replace(run, plan=dataclasses.replace(run.plan, federation=federation))
    _, whole, _ = go(run, Sites(), tmp_path / "whole")

    class Stopping(Sites):
        def ask(self, messages: Mapping[str, Envelope], timeout_s: float) -> Iterator[tuple[str, Envelope]]:
            yield from super().ask(messages, timeout_s)
            if self.offers[-1].round > stop:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(run, Stopping(), tmp_path / "stopped")
    sites = Sites()
    status, resumed, told = go(run, sites, tmp_path / "stopped", start=START + 100)

    assert status == "completed"
    assert adapter_of(resumed).tobytes() == adapter_of(whole).tobytes()
    assert sorted({offer.round for offer in sites.offers}) == list(range(stop + 1, 4))
    assert [record.round for record in told] == list(range(stop + 1, 4))
    assert [record.adapter for record in resumed.records] == [record.adapter for record in whole.records]


def test_a_finished_run_asks_nobody_and_ends_as_it_ended(run: Run, tmp_path: Path) -> None:
    go(run, Sites(turns={("d", 1): silent}), tmp_path)
    sites = Sites()

    status, _, told = go(run, sites, tmp_path)

    assert status == "completed-degraded"
    assert (sites.offers, told) == ([], [])


@pytest.mark.parametrize("count", [2, 17])
def test_a_run_with_fewer_or_more_sites_than_the_plan_allows_is_refused(run: Run, count: int) -> None:
    with pytest.raises(RunError, match=f"The run has {count} sites; the plan allows 3 to 16"):
        dataclasses.replace(run, sites=tuple(f"site-{number}" for number in range(count)))


def test_the_sum_does_not_depend_on_the_order_in_which_sites_are_named(run: Run, tmp_path: Path) -> None:
    adapters = set()
    for number, order in enumerate(itertools.permutations(SITES)):
        if number % 6 == 0:
            _, store, _ = go(dataclasses.replace(run, sites=order), Sites(), tmp_path / str(number))
            adapters.add(adapter_of(store).tobytes())

    assert len(adapters) == 1
