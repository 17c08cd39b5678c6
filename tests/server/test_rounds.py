"""The server's loop, with real agents, real sums on both sides, and training that adds a constant."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from confide.client.agent import Agent
from confide.common.adapter import Floats
from confide.common.errors import MessageError, RunError
from confide.common.messages import (
    Contribution,
    Envelope,
    Failure,
    MaskedVector,
    Start,
    open_envelope,
    seal,
    vector_digest,
)
from confide.common.plan import Plan
from confide.common.ring import RingLayout
from confide.server.aggregate import ServerState
from confide.server.rounds import MOST_ATTEMPTS, run_rounds
from confide.server.store import RoundRecord, Store
from tests.server.agents import (
    EXCHANGES,
    LAYOUT,
    RING,
    SITES,
    SUMMATIONS,
    Behaviour,
    Fresh,
    Moment,
    Sites,
    during,
    honest,
    refusing,
    unanswered,
    unheard,
    when,
)

START = np.zeros(5, np.float32)
WIDE = RingLayout(length=5, update_bound=100.0, max_sites=16)
NARROW = RingLayout(length=5, max_sites=16, bits=16, segments=((4, 10.0), (1, 8.0)))
SEVEN = tuple("abcdefg")


def go(sites: Sites, root: Path, start: Floats = START) -> tuple[str, Store, list[RoundRecord]]:
    store, told = Store(root), list[RoundRecord]()
    status = run_rounds(sites.run, sites, store, ServerState.begin(start, sites.plan.federation), told.append)
    return status, store, told


def adapter_of(store: Store) -> Floats:
    state = store.latest(LAYOUT)
    assert state is not None
    return state.adapter


def with_optimizer(plan: Plan, optimizer: str) -> Plan:
    return dataclasses.replace(plan, federation=dataclasses.replace(plan.federation, server_optimizer=optimizer))


def always(site: str, behaviour: Behaviour) -> Callable[[str, Moment], Behaviour]:
    return lambda other, _: behaviour if other == site else honest


@pytest.mark.parametrize("summation", SUMMATIONS)
def test_a_round_moves_the_adapter_by_the_mean_of_the_updates(plan: Plan, tmp_path: Path, summation: str) -> None:
    status, store, told = go(Sites(plan=plan, summation=summation), tmp_path)

    rounds = plan.privacy.rounds
    assert status == "completed"
    assert adapter_of(store) == pytest.approx(START + rounds * 2.5, abs=1e-5)
    assert [record.round for record in told] == list(range(1, rounds + 1))
    assert told == store.records
    for record in told:
        assert (record.present, dict(record.missing), record.void, record.attempts) == (SITES, {}, "", 1)


@pytest.mark.parametrize("summation", SUMMATIONS)
def test_each_round_starts_from_the_adapter_of_the_one_before(plan: Plan, tmp_path: Path, summation: str) -> None:
    sites = Sites(plan=plan, summation=summation)
    _, store, _ = go(sites, tmp_path)

    parents = [vector_digest(START), *(record.adapter for record in store.records)]
    assert [record.parent for record in store.records] == parents[:-1]
    for trainer in sites.trainers.values():
        assert [vector_digest(start) for start in trainer.starts] == parents[:-1]
    for number, offer in enumerate(sites.offers, start=1):
        assert (offer.run, offer.plan, offer.round, offer.attempt) == ("demo", plan.digest, number, 1)
        assert (offer.cohort, offer.layout, offer.ring) == (SITES, LAYOUT.digest, RING.digest)


@pytest.mark.parametrize("ring", [RING, NARROW], ids=["32 bits", "16 bits"])
@pytest.mark.parametrize("optimizer", ["fedavg", "fedadam"])
def test_a_secure_run_and_a_plain_one_give_the_same_bits(
    plan: Plan, tmp_path: Path, optimizer: str, ring: RingLayout
) -> None:
    same = ("round", "attempts", "parent", "adapter", "moments", "present", "void", "bounded", "saturated")
    runs: dict[str, list[dict[str, Any]]] = {}
    lost = {(1, "contribute"): "b", (2, "advertise"): "d"}  # the two exchanges that both kinds of sum have

    def script(site: str, moment: Moment) -> Behaviour:
        return unheard if lost.get((moment[0], moment[2])) == site else honest

    for summation in SUMMATIONS:
        sites = Sites(plan=with_optimizer(plan, optimizer), summation=summation, ring=ring, script=script)
        _, store, _ = go(sites, tmp_path / summation)
        runs[summation] = [dataclasses.asdict(record) for record in store.records]

    secure, plain = runs["real"], runs["insecure_plain_sum"]
    assert [{key: record[key] for key in same} for record in secure] == [
        {key: record[key] for key in same} for record in plain
    ]
    assert [record["missing"] for record in secure] == [record["missing"] for record in plain]
    assert {record["summation"] for record in secure} == {"secure_aggregation"}
    assert {record["summation"] for record in plain} == {"insecure_plain_sum"}


def test_a_dropout_is_recorded_and_the_mean_is_that_of_the_others(plan: Plan, tmp_path: Path) -> None:
    script = when({("d", (1, 1, "contribute")): unheard, ("a", (2, 1, "advertise")): refusing})
    status, store, _ = go(Sites(plan=plan, script=script), tmp_path)

    first, second, third = store.records
    assert status == "completed-degraded"
    assert (first.present, dict(first.missing)) == (("a", "b", "c"), {"d": "contribute: no answer"})
    assert (second.present, dict(second.missing)) == (("b", "c", "d"), {"a": "advertise: Refused"})
    assert (third.present, dict(third.missing)) == (SITES, {})
    assert adapter_of(store) == pytest.approx(START + 2 + 3 + 2.5, abs=1e-5)


@pytest.mark.parametrize("behaviour", [unheard, unanswered], ids=["question lost", "answer lost"])
@pytest.mark.parametrize("exchange", EXCHANGES.values())
def test_a_dropout_at_any_exchange_is_survived_and_the_sum_is_right(
    plan: Plan, tmp_path: Path, exchange: str, behaviour: Behaviour
) -> None:
    sites = Sites(plan=plan, summation="real", randomness=Fresh, script=during(1, exchange, "d", behaviour))

    status, store, _ = go(sites, tmp_path)

    # Whoever is lost after `contribute` is in the sum.
    counted = SITES if exchange in {"confirm", "open"} else ("a", "b", "c")
    mean = 2.5 if "d" in counted else 2.0
    first, *later = store.records
    assert status == "completed-degraded"
    assert (first.present, dict(first.missing)) == (counted, {"d": f"{exchange}: no answer"})
    assert (first.void, first.attempts) == ("", 1)
    assert store.adapter(first.adapter, LAYOUT) == pytest.approx(START + mean, abs=1e-5)
    assert all((record.present, dict(record.missing)) == (SITES, {}) for record in later)


@pytest.mark.parametrize("behaviour", [unheard, unanswered], ids=["question lost", "answer lost"])
@pytest.mark.parametrize("exchange", EXCHANGES.values())
def test_below_the_quorum_a_round_is_void_at_any_exchange_and_the_run_goes_on(
    plan: Plan, tmp_path: Path, exchange: str, behaviour: Behaviour
) -> None:
    sites = Sites(plan=plan, summation="real", randomness=Fresh, script=during(2, exchange, "cd", behaviour))

    status, store, _ = go(sites, tmp_path)

    before, void, after = store.records
    assert status == "completed-degraded"
    assert void.present == ()
    assert void.adapter == void.parent == before.adapter
    assert void.void == f"After `{exchange}` 2 of a cohort of 4 sites were left; 3 are needed."
    assert dict(void.missing) == {"c": f"{exchange}: no answer", "d": f"{exchange}: no answer"}
    # Nobody is asked again who may have helped to open the sum.
    assert void.attempts == (1 if exchange == "open" else MOST_ATTEMPTS)
    assert (after.present, dict(after.missing)) == (SITES, {})
    assert adapter_of(store) == pytest.approx(START + 2 * 2.5, abs=1e-5)
    assert all(len(trainer.starts) <= 3 for trainer in sites.trainers.values())


@pytest.mark.parametrize("summation", SUMMATIONS)
def test_a_round_below_min_sites_is_void_and_leaves_the_adapter_as_it_was(
    plan: Plan, tmp_path: Path, summation: str
) -> None:
    def script(site: str, moment: Moment) -> Behaviour:
        return {"c": unheard, "d": refusing}.get(site, honest) if moment[0] == 2 else honest

    status, store, _ = go(Sites(plan=plan, summation=summation, script=script), tmp_path)

    void = store.records[1]
    assert status == "completed-degraded"
    assert void.present == ()
    assert dict(void.missing) == {"c": "advertise: no answer", "d": "advertise: Refused"}
    # With secure aggregation the silent one is asked again, together with the two that are left.
    attempts, cohort = (2, 3) if summation == "real" else (1, 4)
    assert void.attempts == attempts
    assert void.void == f"After `advertise` 2 of a cohort of {cohort} sites were left; 3 are needed."
    assert void.adapter == void.parent == store.records[0].adapter
    assert adapter_of(store) == pytest.approx(START + 2 * 2.5, abs=1e-5)


def test_a_plan_that_asks_for_more_sites_than_the_quorum_is_kept(plan: Plan, tmp_path: Path) -> None:
    strict = dataclasses.replace(plan, federation=dataclasses.replace(plan.federation, min_sites=4))

    for summation in SUMMATIONS:
        sites = Sites(plan=strict, summation=summation, script=during(1, "contribute", "d", unheard))
        _, store, _ = go(sites, tmp_path / summation)

        assert store.records[0].void == "After `contribute` 3 of a cohort of 4 sites were left; 4 are needed."
        assert [record.present for record in store.records] == [(), SITES, SITES]


@pytest.mark.parametrize("optimizer", ["fedavgm", "fedadam"])
def test_a_void_round_leaves_the_optimizer_as_it_was(plan: Plan, tmp_path: Path, optimizer: str) -> None:
    def script(_: str, moment: Moment) -> Behaviour:
        return unheard if moment[0] == 2 else honest

    _, store, _ = go(Sites(plan=with_optimizer(plan, optimizer), script=script), tmp_path)

    assert store.records[1].moments == store.records[0].moments
    assert store.records[2].moments != store.records[0].moments


@pytest.mark.parametrize("summation", SUMMATIONS)
def test_a_run_of_void_rounds_only_has_failed(plan: Plan, tmp_path: Path, summation: str) -> None:
    def script(site: str, _: Moment) -> Behaviour:
        return unheard if site in "ab" else honest

    status, store, _ = go(Sites(plan=plan, summation=summation, script=script), tmp_path)

    assert status == "failed"
    assert len(store.records) == plan.privacy.rounds
    assert adapter_of(store).tobytes() == START.tobytes()


@pytest.mark.parametrize("exchange", ["advertise", "share", "contribute", "confirm"])
@pytest.mark.parametrize("behaviour", [unheard, unanswered], ids=["question lost", "answer lost"])
def test_silent_sites_are_asked_once_more_and_the_second_attempt_sums_the_same_vectors(
    plan: Plan, tmp_path: Path, exchange: str, behaviour: Behaviour
) -> None:
    turns: dict[tuple[str, Moment], Behaviour] = {(site, (1, 1, exchange)): behaviour for site in "bc"}
    sites = Sites(plan=plan, summation="real", randomness=Fresh, script=when(turns))

    status, store, _ = go(sites, tmp_path / "retried")
    _, undisturbed, _ = go(Sites(plan=plan, summation="real", randomness=Fresh), tmp_path / "undisturbed")

    first, *later = store.records
    assert status == "completed"
    assert (first.attempts, first.present, dict(first.missing), first.void) == (2, SITES, {}, "")
    assert [record.attempts for record in later] == [1, 1]
    assert [record.adapter for record in store.records] == [record.adapter for record in undisturbed.records]
    assert all(len(trainer.starts) == plan.privacy.rounds for trainer in sites.trainers.values())
    for agent in sites.agents.values():
        assert [spend.round for spend in agent.spends.spends] == [1, 2, 3]


def test_there_are_two_attempts_and_no_third(plan: Plan, tmp_path: Path) -> None:
    silent = during(1, "contribute", "efg", unheard)
    sites = Sites(plan=plan, summation="real", randomness=Fresh, names=SEVEN, ring=WIDE, script=silent)

    status, store, _ = go(sites, tmp_path)

    void, second, _ = store.records
    assert status == "completed-degraded"
    assert [(offer.round, offer.attempt, offer.cohort) for offer in sites.offers[:3]] == [
        (1, 1, SEVEN),
        (1, 2, SEVEN),
        (2, 1, SEVEN),
    ]
    assert (void.attempts, void.present) == (2, ())
    assert void.void == "After `contribute` 4 of a cohort of 7 sites were left; 5 are needed."
    assert dict(void.missing) == dict.fromkeys("efg", "contribute: no answer")
    assert void.adapter == void.parent
    assert (second.attempts, second.present, dict(second.missing)) == (1, SEVEN, {})
    assert [len(trainer.starts) for trainer in sites.trainers.values()] == [3, 3, 3, 3, 2, 2, 2]


def test_those_who_are_left_are_never_fewer_than_the_quorum_of_all(plan: Plan, tmp_path: Path) -> None:
    sites = Sites(plan=plan, summation="real", names=SEVEN, ring=WIDE, script=during(1, "share", "efg", refusing))

    _, store, _ = go(sites, tmp_path)

    void = store.records[0]
    assert (void.attempts, void.present) == (1, ())
    assert void.void == "After `share` 4 of a cohort of 7 sites were left; 5 are needed."
    assert dict(void.missing) == dict.fromkeys("efg", "share: Refused")


def test_who_refused_is_not_asked_again_in_the_same_round(plan: Plan, tmp_path: Path) -> None:
    turns: dict[tuple[str, Moment], Behaviour] = {(site, (1, 1, "share")): refusing for site in "bc"}
    turns |= {("a", (1, 1, "share")): unheard}
    sites = Sites(plan=plan, summation="real", names=SEVEN, ring=WIDE, script=when(turns))

    _, store, _ = go(sites, tmp_path)

    first = store.records[0]
    assert sites.asked((1, 2, "advertise")) == ["a", "d", "e", "f", "g"]
    assert (first.attempts, first.present) == (2, ("a", "d", "e", "f", "g"))
    assert dict(first.missing) == {"b": "share: Refused", "c": "share: Refused"}


def test_nobody_is_asked_again_in_a_plain_sum(plan: Plan, tmp_path: Path) -> None:
    sites = Sites(plan=plan, names=SEVEN, ring=WIDE, script=during(1, "contribute", "cdefg", unheard))

    _, store, _ = go(sites, tmp_path)

    assert [record.attempts for record in store.records] == [1, 1, 1]


def test_a_site_that_was_started_anew_joins_the_next_attempt_with_the_vector_it_kept(
    plan: Plan, tmp_path: Path
) -> None:
    sites = Sites(
        plan=plan, summation="real", randomness=Fresh, folder=tmp_path / "sites", vectors=tmp_path / "vectors"
    )

    def restarting(agent: Agent, envelope: Envelope) -> Envelope | None:
        sites.agents[agent.site] = sites.agent(agent.site)
        return None

    turns: dict[tuple[str, Moment], Behaviour] = {(site, (1, 1, "confirm")): restarting for site in "bc"}
    sites.script = when(turns)

    status, store, _ = go(sites, tmp_path / "run")

    assert status == "completed"
    assert [record.attempts for record in store.records] == [2, 1, 1]
    assert adapter_of(store) == pytest.approx(START + 3 * 2.5, abs=1e-5)
    assert all(len(trainer.starts) == 3 for trainer in sites.trainers.values())


def test_a_site_that_lost_its_vector_sits_the_round_out(plan: Plan, tmp_path: Path) -> None:
    sites = Sites(plan=plan, summation="real", randomness=Fresh, folder=tmp_path / "sites", names=SEVEN, ring=WIDE)

    def restarting(agent: Agent, envelope: Envelope) -> Envelope | None:
        sites.agents[agent.site] = sites.agent(agent.site)  # it kept the vector in memory only
        return None

    turns: dict[tuple[str, Moment], Behaviour] = {(site, (1, 1, "confirm")): unheard for site in "bc"}
    sites.script = when(turns | {("d", (1, 1, "confirm")): restarting})

    _, store, _ = go(sites, tmp_path / "run")

    first = store.records[0]
    assert (first.attempts, first.present, dict(first.missing)) == (2, tuple("abcefg"), {"d": "advertise: Refused"})
    assert [record.missing for record in store.records[1:]] == [{}, {}]
    assert len(sites.trainers["d"].starts) == 3


def spoiled(**changes: Any) -> Behaviour:
    """Return the behaviour of a site that changes its contribution."""

    def answer(agent: Agent, envelope: Envelope) -> Envelope | None:
        message = open_envelope(agent.answer(envelope))
        return seal(dataclasses.replace(message, **changes) if isinstance(message, Contribution) else message)

    return answer


def replaced(put: Callable[[Envelope, Envelope], Envelope]) -> Behaviour:
    """Return the behaviour of a site that puts something else in the place of its contribution."""

    def answer(agent: Agent, envelope: Envelope) -> Envelope | None:
        sent = agent.answer(envelope)
        return put(sent, envelope) if isinstance(open_envelope(envelope), Start) else sent

    return answer


MALFORMED: dict[str, Behaviour] = {
    "of another context": spoiled(context="0" * 64),
    "without a context": spoiled(context=""),
    "too short": spoiled(vector=MaskedVector(words=np.zeros(6, np.uint32))),
    "too long": spoiled(vector=MaskedVector(words=np.zeros(8, np.uint32))),
    "the question": replaced(lambda _, question: question),
    "a failure": replaced(lambda *_: seal(Failure(error="MessageError", sentence=MessageError.outside))),
    "no JSON": replaced(lambda *_: Envelope(body=b"?")),
    "nested deeply": replaced(lambda *_: Envelope(body=b"[" * 100_000)),
    "without its vector": replaced(lambda sent, _: Envelope(body=sent.body)),
    "with floats": replaced(lambda sent, _: Envelope(body=sent.body, vector=np.zeros(7, np.float32))),
    "with raw bytes": replaced(lambda sent, _: Envelope(body=sent.body + b"\n", vector=sent.vector)),
}


@pytest.mark.parametrize("summation", SUMMATIONS)
@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_contribution_counts_as_missing_and_enters_no_sum(
    plan: Plan, tmp_path: Path, case: str, summation: str
) -> None:
    status, store, _ = go(Sites(plan=plan, summation=summation, script=always("d", MALFORMED[case])), tmp_path)

    assert status == "completed-degraded"
    assert [dict(record.missing) for record in store.records] == [{"d": "contribute: MessageError"}] * 3
    assert adapter_of(store) == pytest.approx(START + 3 * 2, abs=1e-5)


@pytest.mark.parametrize(
    ("summation", "which"),
    [*((summation, "an earlier round") for summation in SUMMATIONS), ("real", "an earlier attempt")],
)
def test_a_contribution_of_another_attempt_counts_as_missing(
    plan: Plan, tmp_path: Path, summation: str, which: str
) -> None:
    kept: list[Envelope] = []

    def replaying(agent: Agent, envelope: Envelope) -> Envelope | None:
        sent = agent.answer(envelope)
        if isinstance(open_envelope(envelope), Start):
            kept.append(sent)
            return kept[0]
        return sent

    def script(site: str, moment: Moment) -> Behaviour:
        if site in "bc" and moment == (1, 1, "contribute") and which == "an earlier attempt":
            return unheard
        return replaying if site == "d" else honest

    _, store, _ = go(Sites(plan=plan, summation=summation, script=script), tmp_path)

    first, second, third = store.records
    assert dict(first.missing) == ({"d": "contribute: MessageError"} if which == "an earlier attempt" else {})
    assert dict(second.missing) == dict(third.missing) == {"d": "contribute: MessageError"}
    assert store.adapter(second.adapter, LAYOUT) - store.adapter(first.adapter, LAYOUT) == pytest.approx(2, abs=1e-5)


@pytest.mark.parametrize("summation", SUMMATIONS)
def test_a_site_with_another_ring_or_layout_takes_no_part(plan: Plan, tmp_path: Path, summation: str) -> None:
    sites = Sites(plan=plan, summation=summation)
    other = Sites(plan=plan, summation=summation, ring=dataclasses.replace(RING, update_bound=9.0))
    sites.agents["d"] = other.agents["d"]

    _, store, _ = go(sites, tmp_path)

    assert [dict(record.missing) for record in store.records] == [{"d": "advertise: Refused"}] * 3
    assert adapter_of(store) == pytest.approx(START + 3 * 2, abs=1e-5)


@pytest.mark.parametrize("summation", SUMMATIONS)
@pytest.mark.parametrize("name", ["stranger", "a"])
def test_an_answer_of_a_site_that_was_not_asked_or_has_answered_is_ignored(
    plan: Plan, tmp_path: Path, name: str, summation: str
) -> None:
    class Crowd(Sites):
        def ask(self, messages: Mapping[str, Envelope], timeout_s: float) -> Iterator[tuple[str, Envelope]]:
            for site, answer in super().ask(messages, timeout_s):
                yield site, answer
                yield name if site == "a" else site, answer

    status, store, _ = go(Crowd(plan=plan, summation=summation), tmp_path)

    assert status == "completed"
    assert store.records[0].present == SITES
    assert adapter_of(store) == pytest.approx(START + 3 * 2.5, abs=1e-5)


@pytest.mark.parametrize("summation", SUMMATIONS)
def test_bytes_are_those_of_the_site_that_sent_and_was_sent_most(plan: Plan, tmp_path: Path, summation: str) -> None:
    turns: dict[tuple[str, Moment], Behaviour] = {(site, (1, 1, "contribute")): unheard for site in "bc"}
    sites = Sites(plan=plan, summation=summation, script=when(turns))

    _, store, _ = go(sites, tmp_path)

    for record in store.records:
        downs, ups = [], []
        for attempt in range(1, record.attempts + 1):
            of_site = {
                site: [
                    size
                    for (moment, name), size in sites.sent.items()
                    if name == site and moment[:2] == (record.round, attempt)
                ]
                for site in SITES
            }
            downs.append(max(sum(down for down, _ in sizes) for sizes in of_site.values()))
            ups.append(max(sum(up for _, up in sizes) for sizes in of_site.values()))
        assert (record.bytes_down, record.bytes_up) == (sum(downs), sum(ups))
    assert store.records[1].bytes_up > 5 * 4
    assert store.records[1].bytes_down > 5 * 4
    assert all(record.seconds >= 0 for record in store.records)


def test_a_round_nobody_answered_took_no_bytes_up(plan: Plan, tmp_path: Path) -> None:
    def script(_: str, moment: Moment) -> Behaviour:
        return unheard if moment[0] == 1 else honest

    _, store, _ = go(Sites(plan=plan, script=script), tmp_path)

    assert store.records[0].bytes_up == 0
    assert store.records[0].bytes_down > 0


@pytest.mark.parametrize("summation", SUMMATIONS)
def test_a_record_tells_what_the_bounds_did(plan: Plan, tmp_path: Path, summation: str) -> None:
    tight = RingLayout(length=5, update_bound=8.0, max_sites=16)  # the fourth site's update has a norm of 8.9
    cut = RingLayout(length=5, max_sites=16, bits=16, segments=((4, 3.5), (1, 8.0)))  # four of its five numbers are 4

    _, scaled, _ = go(Sites(plan=plan, summation=summation, ring=tight), tmp_path / "scaled")
    _, clipped, _ = go(Sites(plan=plan, summation=summation, ring=cut), tmp_path / "clipped")

    assert [(record.bounded, record.saturated) for record in scaled.records] == [(0.25, 0.0)] * 3
    for record in clipped.records:
        assert record.bounded == 0.25
        assert record.saturated == pytest.approx(4 / 20, abs=1e-3)


class Stopping(Sites):
    """Sites whose server is stopped once, after everybody answered at one moment."""

    stop: Moment | None = None

    def ask(self, messages: Mapping[str, Envelope], timeout_s: float) -> Iterator[tuple[str, Envelope]]:
        yield from super().ask(messages, timeout_s)
        if self.moments[-1] == self.stop:
            raise KeyboardInterrupt


@pytest.mark.parametrize("summation", SUMMATIONS)
@pytest.mark.parametrize("optimizer", ["fedavg", "fedadam"])
@pytest.mark.parametrize("stop", [1, 2])
def test_a_run_that_was_stopped_goes_on_where_it_was(
    plan: Plan, tmp_path: Path, stop: int, optimizer: str, summation: str
) -> None:
    plan = with_optimizer(plan, optimizer)
    _, whole, _ = go(Sites(plan=plan, summation=summation), tmp_path / "whole")

    folder = tmp_path / "sites"
    stopped = Stopping(plan=plan, summation=summation, folder=folder)
    stopped.stop = (stop + 1, 1, "open" if summation == "real" else "contribute")
    with pytest.raises(KeyboardInterrupt):
        go(stopped, tmp_path / "stopped")
    sites = Sites(plan=plan, summation=summation, folder=folder)
    status, resumed, told = go(sites, tmp_path / "stopped", start=START + 100)

    assert status == "completed"
    assert adapter_of(resumed).tobytes() == adapter_of(whole).tobytes()
    assert [offer.round for offer in sites.offers] == list(range(stop + 1, 4))
    assert [record.round for record in told] == list(range(stop + 1, 4))
    assert [record.adapter for record in resumed.records] == [record.adapter for record in whole.records]


@pytest.mark.parametrize("exchange", ["advertise", "share", "contribute", "confirm"])
def test_a_server_started_anew_tries_the_round_again_with_the_same_vectors(
    plan: Plan, tmp_path: Path, exchange: str
) -> None:
    sites = Stopping(plan=plan, summation="real", randomness=Fresh)
    sites.stop = (2, 1, exchange)
    _, undisturbed, _ = go(Sites(plan=plan, summation="real", randomness=Fresh), tmp_path / "undisturbed")

    with pytest.raises(KeyboardInterrupt):
        go(sites, tmp_path / "stopped")
    status, store, _ = go(sites, tmp_path / "stopped")

    assert status == "completed"
    assert [(offer.round, offer.attempt) for offer in sites.offers] == [(1, 1), (2, 1), (2, 2), (3, 1)]
    assert [record.adapter for record in store.records] == [record.adapter for record in undisturbed.records]
    assert all(len(trainer.starts) == 3 for trainer in sites.trainers.values())


@pytest.mark.parametrize("sites_too", [False, True], ids=["server alone", "sites too"])
def test_with_fresh_noise_a_round_that_was_opened_is_not_repeated_and_the_run_goes_on(
    plan: Plan, tmp_path: Path, sites_too: bool
) -> None:
    sites = Stopping(plan=plan, summation="real", randomness=Fresh, folder=tmp_path / "sites")
    sites.stop = (2, 1, "open")
    with pytest.raises(KeyboardInterrupt):
        go(sites, tmp_path / "run")
    if sites_too:
        sites.agents = {site: sites.agent(site) for site in SITES}

    status, store, _ = go(sites, tmp_path / "run")

    void = store.records[1]
    assert status == "completed-degraded"
    assert (void.present, dict(void.missing)) == ((), dict.fromkeys(SITES, "advertise: Refused"))
    assert adapter_of(store) == pytest.approx(START + 2 * 2.5, abs=1e-5)
    for agent in sites.agents.values():
        assert [spend.round for spend in agent.spends.spends] == [1, 2, 3]


def test_a_finished_run_asks_nobody_and_ends_as_it_ended(plan: Plan, tmp_path: Path) -> None:
    go(Sites(plan=plan, script=during(1, "contribute", "d", unheard)), tmp_path)
    sites = Sites(plan=plan)

    status, _, told = go(sites, tmp_path)

    assert status == "completed-degraded"
    assert (sites.offers, told) == ([], [])


@pytest.mark.parametrize("count", [2, 17])
def test_a_run_with_fewer_or_more_sites_than_the_plan_allows_is_refused(plan: Plan, count: int) -> None:
    run = Sites(plan=plan).run

    with pytest.raises(RunError, match=f"The run has {count} sites; the plan allows 3 to 16"):
        dataclasses.replace(run, sites=tuple(f"site-{number}" for number in range(count)))


@pytest.mark.parametrize("summation", SUMMATIONS)
def test_the_sum_does_not_depend_on_the_order_in_which_sites_are_named(
    plan: Plan, tmp_path: Path, summation: str
) -> None:
    adapters = set()
    for number, order in enumerate(itertools.permutations(SITES)):
        if number % 6 == 0:
            sites = Sites(plan=plan, summation=summation, names=order)
            status, store, _ = go(sites, tmp_path / str(number))
            adapters.add(adapter_of(store).tobytes())
            assert status == "completed"

    assert len(adapters) == 1
