"""What a site does with what it is sent."""

import contextlib
import dataclasses
import functools
import inspect
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from confide.client.agent import LAST_ATTEMPT, Agent
from confide.client.conformance import Certificate, certify
from confide.client.journal import Journal
from confide.client.kept import Kept
from confide.client.membership import Membership
from confide.client.private_trainer import PrivateTrainer
from confide.client.spends import Spends
from confide.common.attempt import Attempt
from confide.common.bounds import ring_layout
from confide.common.checkpoint import SHORT_CHARACTERS, Checkpoint
from confide.common.crypto import Identity
from confide.common.errors import DataError, LedgerError, MessageError, PrivacyError, Refused, UsageError
from confide.common.messages import (
    Advertisement,
    Confirmation,
    Contribution,
    Envelope,
    Failure,
    MaskedVector,
    Message,
    Offer,
    Opening,
    Peers,
    Shares,
    Signatures,
    Start,
    Survivors,
    open_envelope,
    seal,
    vector_digest,
)
from confide.common.model import AdaptedModel, attach
from confide.common.plan import Plan
from confide.common.ring import RingLayout
from confide.common.witness import Witness
from confide.server.summation import SecureSummation, Task
from confide.simulations.insecure import InsecurePlainSum, InsecureSeededNoise, InsecureUnmasked
from confide.simulations.vaults import open_ledger, rows_of
from tests.conftest import MakeExamples
from tests.server.agents import EXCHANGES, LAYOUT, Behaviour, Fresh, Moment, Sites, honest, unheard

NORTH = Identity(b"n" * 32)


@pytest.fixture(scope="module")
def model(base_directory: Path, plan: Plan) -> AdaptedModel:
    return attach(base_directory, plan)


@functools.cache
def certified(model: AdaptedModel) -> Certificate:
    return certify(model, cached=False)


@pytest.fixture
def ring(model: AdaptedModel, plan: Plan) -> RingLayout:
    return ring_layout(plan, model.layout, model.head)


@pytest.fixture
def agent(model: AdaptedModel, ring: RingLayout, make_examples: MakeExamples, tmp_path: Path) -> Agent:
    return make_agent(model, ring, make_examples, tmp_path / "ledger")


class Retrying(InsecurePlainSum):
    """A sum that may be tried again."""

    retries = True


def make_agent(
    model: AdaptedModel,
    ring: RingLayout,
    make_examples: MakeExamples,
    path: Path | None,
    protection: InsecurePlainSum | None = None,
    *,
    persons: int = 30,
    declared_persons: int = 30,
) -> Agent:
    journal = open_ledger(
        path, site="north", identity=NORTH, plan=model.plan, run="tiny", declared_persons=declared_persons
    )
    return Agent(
        site="north",
        run="tiny",
        plan=model.plan,
        trainer=PrivateTrainer(certified(model), make_examples(persons, seed=1)),
        declared_persons=declared_persons,
        ring=ring,
        randomness=lambda number: InsecureSeededNoise(5, "north", number),
        protection=protection or InsecurePlainSum(),
        spends=Spends(journal, run="tiny", plan=model.plan.digest, data=rows_of("tiny")),
    )


def offer(model: AdaptedModel, ring: RingLayout, number: int = 1, attempt: int = 1) -> Offer:
    return Offer(
        run="tiny",
        plan=model.plan.digest,
        round=number,
        attempt=attempt,
        cohort=("east", "north", "south"),
        roster="insecure_plain_sum",
        layout=model.layout.digest,
        ring=ring.digest,
        signature=b"",
    )


def asked(agent: Agent, message: Message) -> Message:
    return open_envelope(agent.answer(seal(message)))


def contributed(agent: Agent, offered: Offer, adapter: np.ndarray[Any, Any]) -> Message:
    """Return what a site answers to a start, after it took up the offer."""
    taken = asked(agent, offered)
    assert isinstance(taken, Advertisement)
    return asked(agent, Start(context=taken.context, inbox=b"", adapter=adapter))


REFUSED = Failure(error="Refused", sentence="The site refused.")


def test_a_round_has_so_many_attempts_and_no_more(
    model: AdaptedModel, ring: RingLayout, make_examples: MakeExamples
) -> None:
    agent = make_agent(model, ring, make_examples, None, Retrying())

    last = asked(agent, offer(model, ring, attempt=LAST_ATTEMPT))
    beyond = asked(agent, offer(model, ring, attempt=LAST_ATTEMPT + 1))
    following = asked(agent, offer(model, ring, number=2))

    assert isinstance(last, Advertisement)
    assert beyond == REFUSED
    assert isinstance(following, Advertisement)


def test_every_message_is_consented_to_with_the_offer_of_its_attempt(
    model: AdaptedModel, ring: RingLayout, make_examples: MakeExamples
) -> None:
    heard: list[tuple[str, Offer | None]] = []
    agent = make_agent(model, ring, make_examples, None, Retrying())
    agent._consent = lambda message, offered: heard.append((message.kind, offered))
    first, refused = offer(model, ring), dataclasses.replace(offer(model, ring, attempt=2), run="another")

    asked(agent, Survivors(context="x", sites=b""))
    contributed(agent, first, model.start)
    asked(agent, refused)
    asked(agent, Survivors(context="x", sites=b""))

    assert heard == [
        ("survivors", None),
        ("offer", first),
        ("start", first),
        ("offer", refused),
        ("survivors", first),
    ]


def test_a_round_is_trained_once_and_every_attempt_sends_the_same_vector(
    model: AdaptedModel, ring: RingLayout, make_examples: MakeExamples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = make_agent(model, ring, make_examples, tmp_path / "ledger", Retrying())
    first = contributed(agent, offer(model, ring), model.start)
    spent = agent.spends.spends
    monkeypatch.setattr(PrivateTrainer, "train", None)  # training again would fail

    again = contributed(agent, offer(model, ring, attempt=2), model.start)

    assert isinstance(first, Contribution)
    assert isinstance(again, Contribution)
    np.testing.assert_array_equal(first.vector.words, again.vector.words)
    assert first.context != again.context
    assert agent.spends.spends == spent
    assert len(spent) == 1


def test_the_spend_is_on_disk_before_the_first_private_gradient(
    agent: Agent, model: AdaptedModel, ring: RingLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def look(*_: object, **__: object) -> None:
        seen.append(len(Journal.look(tmp_path / "ledger").spends("tiny")))
        raise DataError("stopped before any gradient")

    monkeypatch.setattr(PrivateTrainer, "train", look)
    answer = contributed(agent, offer(model, ring), model.start)

    assert seen == [1]
    assert isinstance(answer, Failure)


@pytest.mark.parametrize("protection", [InsecurePlainSum(), Retrying()], ids=["one attempt", "several"])
def test_a_round_is_never_trained_from_two_adapters(
    model: AdaptedModel, ring: RingLayout, make_examples: MakeExamples, tmp_path: Path, protection: InsecurePlainSum
) -> None:
    agent = make_agent(model, ring, make_examples, tmp_path / "ledger", protection)
    contributed(agent, offer(model, ring), model.start)

    answer = contributed(agent, offer(model, ring, attempt=2), model.start + 1)

    assert isinstance(answer, Failure)
    assert len(agent.spends.spends) == 1


@pytest.mark.parametrize(("number", "away", "fits"), [(1, 0.0, True), (1, 1.0, False), (2, 0.9, True), (2, 1.2, False)])
def test_an_adapter_that_the_plans_rounds_cannot_lead_to_is_refused_and_costs_nothing(
    model: AdaptedModel, ring: RingLayout, make_examples: MakeExamples, number: int, away: float, fits: bool
) -> None:
    agent = make_agent(model, ring, make_examples, None)
    step = np.zeros_like(model.start)
    step[0] = away * (ring.update_bound or 0)

    answer = contributed(agent, offer(model, ring, number=number), model.start + step)

    assert isinstance(answer, Contribution if fits else Failure)
    assert len(agent.spends.spends) == fits


def test_a_restarted_simulation_repeats_an_interrupted_round_to_the_same_bytes(
    agent: Agent, model: AdaptedModel, ring: RingLayout, make_examples: MakeExamples, tmp_path: Path
) -> None:
    first = contributed(agent, offer(model, ring), model.start)

    restarted = make_agent(model, ring, make_examples, tmp_path / "ledger")
    again = contributed(restarted, offer(model, ring), model.start)

    assert isinstance(first, Contribution)
    assert isinstance(again, Contribution)
    np.testing.assert_array_equal(first.vector.words, again.vector.words)
    assert restarted.spends.spends == agent.spends.spends


@pytest.mark.parametrize(
    "change",
    [
        {"run": "another"},
        {"plan": "sha256:" + "0" * 64},
        {"layout": "sha256:" + "0" * 64},
        {"ring": "sha256:" + "0" * 64},
        {"roster": "sha256:" + "0" * 64},
        {"round": 0},
        {"round": 4},
        {"cohort": ("north", "south")},
        {"cohort": tuple(f"site-{number:02}" for number in range(17))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_offer_outside_the_plan_is_refused_and_costs_nothing(
    agent: Agent, model: AdaptedModel, ring: RingLayout, change: dict[str, Any]
) -> None:
    answer = asked(agent, dataclasses.replace(offer(model, ring), **change))
    after = asked(agent, Start(context="", inbox=b"", adapter=model.start))

    assert answer == after == REFUSED
    assert agent.spends.spends == ()


@pytest.mark.parametrize(("number", "attempt"), [(2, 2), (2, 1), (1, 3)])
def test_an_attempt_is_made_once_and_none_follows_a_later_one(
    agent: Agent, model: AdaptedModel, ring: RingLayout, number: int, attempt: int
) -> None:
    assert isinstance(asked(agent, offer(model, ring, 2, 2)), Advertisement)

    assert asked(agent, offer(model, ring, number, attempt)) == REFUSED
    assert isinstance(asked(agent, offer(model, ring, 2, 3)), Advertisement)


@pytest.mark.parametrize(
    "message",
    [
        Peers(context="", adapter="", advertisements=b""),
        Start(context="", inbox=b"", adapter=np.zeros(3, np.float32)),
        Survivors(context="", sites=b""),
        Signatures(context="", signatures=b""),
    ],
    ids=lambda message: message.kind,
)
def test_nothing_is_answered_before_an_offer(agent: Agent, message: Message) -> None:
    answer = asked(agent, message)

    assert answer == REFUSED
    assert agent.spends.spends == ()


@pytest.mark.parametrize(
    "message",
    [
        Advertisement(context="", keys=b""),
        Shares(context="", sealed=b""),
        Contribution(context="", vector=MaskedVector(words=np.zeros(3, np.uint32))),
        Confirmation(context="", signature=b""),
        Opening(context="", shares=b""),
    ],
    ids=lambda message: message.kind,
)
def test_what_sites_send_is_not_taken_by_a_site(agent: Agent, model: AdaptedModel, message: Message) -> None:
    assert asked(agent, message) == REFUSED


def test_a_start_that_is_not_admitted_costs_nothing(agent: Agent, model: AdaptedModel, ring: RingLayout) -> None:
    asked(agent, offer(model, ring))

    answer = asked(agent, Start(context="0" * 64, inbox=b"", adapter=model.start))

    assert answer == Failure(error="MessageError", sentence=MessageError.outside)
    assert agent.spends.spends == ()


@pytest.mark.parametrize(
    "envelope",
    [
        Envelope(body=b""),
        Envelope(body=b"\xff" * 100),
        Envelope(body=b"{}"),
        seal(Failure.of(ValueError())),
        Envelope(body=b"[" * 100_000),
    ],
)
def test_garbage_gets_a_fixed_sentence_and_the_agent_lives_on(
    agent: Agent, model: AdaptedModel, ring: RingLayout, envelope: Envelope
) -> None:
    taken = asked(agent, offer(model, ring))
    assert isinstance(taken, Advertisement)

    answer = open_envelope(agent.answer(envelope))
    after = asked(agent, Start(context=taken.context, inbox=b"", adapter=model.start))

    assert isinstance(answer, Failure)
    assert answer.sentence in {MessageError.outside, Refused.outside}
    assert isinstance(after, Contribution)


def test_an_adapter_of_another_length_fails_without_details_costs_nothing_and_ends_the_attempt(
    agent: Agent, model: AdaptedModel, ring: RingLayout
) -> None:
    answer = contributed(agent, offer(model, ring), np.ones(3, np.float32))

    assert answer == Failure(error="AdapterError", sentence="The adapter offered does not fit the plan.")
    assert agent.spends.spends == ()
    assert agent._attending is None


def test_one_message_is_answered_at_a_time(
    model: AdaptedModel, ring: RingLayout, make_examples: MakeExamples, tmp_path: Path
) -> None:
    inside, together = list[int](), list[int]()

    class Slow(InsecurePlainSum):
        def attend(self, offer: Offer) -> InsecureUnmasked:
            inside.append(1)
            time.sleep(0.02)
            together.append(len(inside))
            inside.pop()
            return super().attend(offer)

    agent = make_agent(model, ring, make_examples, None, Slow())
    callers = [
        threading.Thread(target=asked, args=(agent, offer(model, ring, attempt=attempt))) for attempt in range(1, 5)
    ]

    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()

    assert together
    assert set(together) == {1}


def secure(plan: Plan, root: Path, script: Callable[[str, Moment], Behaviour] | None = None) -> Sites:
    """Return a federation of four that sums securely, with fresh noise, and keeps all that must be kept on disk."""
    return Sites(
        plan=plan,
        summation="real",
        randomness=Fresh,
        folder=root / "sites",
        vectors=root / "vectors",
        script=script or (lambda *_: honest),
    )


def tried(sites: Sites, number: int = 1, attempt: int = 1, adapter: np.ndarray[Any, Any] | None = None) -> Any:
    """Return what one attempt at a sum gave."""
    start = np.zeros(5, np.float32) if adapter is None else adapter
    task = Task(
        run="demo",
        plan=sites.plan,
        round=number,
        attempt=attempt,
        cohort=sites.names,
        layout=LAYOUT.digest,
        ring=sites.ring,
        adapter=start,
        parent=vector_digest(start),
        training_s=1.0,
        answer_s=1.0,
    )
    return sites.run.summation.collect(sites, task)


def events(sites: Sites, site: str = "d") -> list[str]:
    """Return the kinds of what a site's ledger on disk holds of its rounds."""
    with contextlib.closing(Journal.open(path_of(sites, site), identity=sites.identities[site])) as journal:
        kinds = [json.loads(line)["kind"] for line in journal.lines()]
    return kinds[kinds.index("approve") + 1 :]


def path_of(sites: Sites, site: str) -> Path:
    path = sites.path(site)
    assert path is not None
    return path


def test_each_stage_of_a_round_is_on_disk_when_its_answer_leaves(plan: Plan, tmp_path: Path) -> None:
    seen: dict[str, list[str]] = {}

    def noting(agent: Agent, envelope: Envelope) -> Envelope | None:
        answer = agent.answer(envelope)
        seen[open_envelope(envelope).kind] = events(sites)
        return answer

    sites = secure(plan, tmp_path, lambda site, _: noting if site == "d" else honest)

    collected = tried(sites)

    assert collected.present == ("a", "b", "c", "d")
    assert seen == {
        "offer": [],
        "peers": [],
        "start": ["reserve", "bind", "mask"],
        "survivors": ["reserve", "bind", "mask"],
        "signatures": ["reserve", "bind", "mask", "commit"],
    }


@pytest.mark.parametrize(("kind", "last"), [("start", 0), ("start", 1), ("start", 2), ("signatures", 0)])
def test_what_cannot_be_recorded_does_not_leave(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, last: int
) -> None:
    answers: list[Message] = []

    def on_a_full_disk(agent: Agent, envelope: Envelope) -> Envelope | None:
        if open_envelope(envelope).kind != kind:
            return agent.answer(envelope)
        left, write = [last], Journal.append

        def full(self: Journal, *entries: Any, **beside: Any) -> Any:
            if left[0] == 0:
                raise LedgerError("No space left on device")
            left[0] -= 1
            return write(self, *entries, **beside)

        with monkeypatch.context() as patched:
            patched.setattr(Journal, "append", full)
            answer = agent.answer(envelope)
        answers.append(open_envelope(answer))
        return answer

    sites = secure(plan, tmp_path, lambda site, _: on_a_full_disk if site == "d" else honest)

    collected = tried(sites)

    assert answers == [Failure(error="LedgerError", sentence=LedgerError.outside)]
    assert dict(collected.missing) == {"d": f"{EXCHANGES[kind]}: LedgerError"}
    assert len(sites.trainers["d"].starts) == (0 if (kind, last) == ("start", 0) else 1)
    assert "commit" not in events(sites)


@pytest.mark.parametrize("again", [False, True], ids=["same process", "started anew"])
def test_a_site_helps_to_open_the_sum_of_a_round_once(plan: Plan, tmp_path: Path, again: bool) -> None:
    sites = secure(plan, tmp_path)
    assert tried(sites).total is not None
    if again:
        sites.agents = {site: sites.agent(site) for site in sites.names}

    collected = tried(sites, attempt=2)

    assert dict(collected.missing) == dict.fromkeys(sites.names, "advertise: Refused")
    assert events(sites) == ["reserve", "bind", "mask", "commit"]
    assert tried(sites, number=2).total is not None


def test_the_question_that_opened_a_sum_is_not_answered_again(plan: Plan, tmp_path: Path) -> None:
    answers: list[Message] = []

    def twice(agent: Agent, envelope: Envelope) -> Envelope | None:
        first = agent.answer(envelope)
        if open_envelope(envelope).kind == "signatures":
            answers.extend(open_envelope(answer) for answer in (first, agent.answer(envelope)))
        return first

    tried(secure(plan, tmp_path, lambda site, _: twice if site == "d" else honest))

    assert isinstance(answers[0], Opening)
    assert answers[1] == REFUSED


def test_a_site_started_anew_masks_the_vector_it_kept_and_spends_nothing(plan: Plan, tmp_path: Path) -> None:
    sites = secure(plan, tmp_path, lambda _, moment: unheard if moment[1:] == (1, "confirm") else honest)
    assert tried(sites).total is None
    sites.agents["d"] = sites.agent("d")

    collected = tried(sites, attempt=2)

    assert collected.present == sites.names
    assert len(sites.trainers["d"].starts) == 1
    assert [spend.round for spend in sites.agents["d"].spends.spends] == [1]


def test_a_kept_vector_goes_with_its_round(plan: Plan, tmp_path: Path) -> None:
    sites = secure(plan, tmp_path, lambda _, moment: unheard if moment[2] == "confirm" else honest)
    tried(sites)
    kept = Kept(tmp_path / "vectors" / "d", b"d".ljust(32))
    before = kept.holds(1)
    sites.script = lambda *_: honest

    tried(sites, attempt=2)

    assert before
    assert not kept.holds(1)
    assert list((tmp_path / "vectors" / "d").iterdir()) == []


def test_with_fresh_noise_a_round_whose_training_failed_is_spent_and_not_trained_again(
    plan: Plan, tmp_path: Path
) -> None:
    sites = secure(plan, tmp_path)
    sites.trainers["d"].fault = DataError("a row that cannot be trained on")
    first = tried(sites)
    sites.trainers["d"].fault = None

    for agent in (sites.agents["d"], sites.agent("d")):
        sites.agents["d"] = agent
        again = tried(sites, attempt=2)

        assert dict(first.missing) == {"d": "contribute: DataError"}
        assert dict(again.missing)["d"] == "advertise: Refused"
        assert [spend.round for spend in agent.spends.spends] == [1]
        assert sites.trainers["d"].starts == []


def test_an_adapter_that_the_cohort_was_not_told_of_costs_nothing(plan: Plan, tmp_path: Path) -> None:
    def other(agent: Agent, envelope: Envelope) -> Envelope | None:
        message = open_envelope(envelope)
        if isinstance(message, Start):
            message = dataclasses.replace(message, adapter=message.adapter + 1)
        return agent.answer(seal(message))

    sites = secure(plan, tmp_path, lambda site, _: other if site == "d" else honest)

    collected = tried(sites)

    assert dict(collected.missing) == {"d": "contribute: MessageError"}
    assert (sites.agents["d"].spends.spends, sites.trainers["d"].starts) == ((), [])


def test_another_attempt_from_another_adapter_sends_no_vector(plan: Plan, tmp_path: Path) -> None:
    sites = secure(plan, tmp_path, lambda _, moment: unheard if moment[1:] == (1, "confirm") else honest)
    tried(sites)

    collected = tried(sites, attempt=2, adapter=np.ones(5, np.float32))

    assert dict(collected.missing) == dict.fromkeys(sites.names, "contribute: Refused")
    assert all(len(trainer.starts) == 1 for trainer in sites.trainers.values())


def test_a_forged_offer_does_not_end_the_attempt_under_way(plan: Plan, tmp_path: Path) -> None:
    answers: list[Message] = []

    def disturbed(agent: Agent, envelope: Envelope) -> Envelope | None:
        answer = agent.answer(envelope)
        if isinstance(open_envelope(envelope), Peers):
            forged = dataclasses.replace(sites.offers[-1], attempt=2)  # still signed for the first attempt
            answers.append(asked(agent, forged))
        return answer

    sites = secure(plan, tmp_path, lambda site, _: disturbed if site == "d" else honest)

    collected = tried(sites)

    assert answers == [Failure(error="MessageError", sentence=MessageError.outside)]
    assert collected.present == sites.names


@pytest.mark.parametrize(
    "change", [{"round": 2, "attempt": 1}, {"round": 1, "attempt": 2}, {"run": "other", "round": 2}]
)
def test_a_forged_offer_takes_from_a_site_nothing_that_it_kept(
    plan: Plan, tmp_path: Path, change: dict[str, Any]
) -> None:
    sites = secure(plan, tmp_path, lambda _, moment: unheard if moment[1:] == (1, "confirm") else honest)
    tried(sites)
    forged = dataclasses.replace(sites.offers[-1], signature=bytes(64), **change)

    answer = asked(sites.agents["d"], forged)

    assert isinstance(answer, Failure)
    assert tried(sites, attempt=2).present == sites.names
    assert len(sites.trainers["d"].starts) == 1


def watched(
    plan: Plan,
    root: Path | None = None,
    script: Callable[[str, Moment], Behaviour] = lambda *_: honest,
    vectors: Path | None = None,
) -> Sites:
    """Return a federation of four in which every site has a witness, and the server has none."""
    return Sites(
        plan=plan,
        summation="real",
        randomness=Fresh,
        folder=None if root is None else root / "sites",
        watched=True,
        script=script,
        vectors=vectors,
    )


def changed_peers(change: Callable[[Peers], Peers], answers: list[Message]) -> Behaviour:
    """Return the behaviour of a site that is told other peers, and whose answers are noted."""

    def answer(agent: Agent, envelope: Envelope) -> Envelope | None:
        message = open_envelope(envelope)
        if not isinstance(message, Peers):
            return agent.answer(envelope)
        answers.append(asked(agent, change(message)))
        return seal(answers[-1])

    return answer


LEDGER = Failure(error="Refused", sentence="The site refused. It follows its rule on: ledger.")


def test_a_site_shows_its_newest_checkpoint_and_remembers_everybodys(plan: Plan) -> None:
    sites = watched(plan)
    before = {site: sites.shown(site) for site in sites.names}

    assert tried(sites).present == sites.names

    for site in sites.names:
        for peer in sites.names:
            last = sites.witnesses[site].last("simulation", peer)
            assert last is not None
            assert (last.short() == before[peer]) == (peer != site)
        own = sites.witnesses[site].last("simulation", site)
        assert own is not None
        assert own.size == sites.ledgers[site].book.size


def test_a_site_shares_no_keys_with_one_whose_ledger_has_gone_back(plan: Plan, tmp_path: Path) -> None:
    answers: list[Message] = []
    sites = watched(plan, tmp_path)
    copy = sites.copy("d")
    for number in (1, 2):
        tried(sites, number)
    sites.witnesses["d"] = Witness()  # its whole disk is put back
    sites.put_back("d", copy)
    sites.script = lambda site, _: changed_peers(lambda peers: peers, answers) if site != "d" else honest

    collected = tried(sites, number=3)

    assert dict(collected.missing) == dict.fromkeys("abc", "share: Refused")
    assert answers == [LEDGER] * 3
    assert all(len(trainer.starts) == 2 for trainer in sites.trainers.values())
    assert all(len(agent.spends.spends) == 2 for site, agent in sites.agents.items() if site != "d")


def test_a_site_that_refused_a_ledger_has_left_the_attempt(plan: Plan) -> None:
    answers: list[Message] = []

    def insisting(agent: Agent, envelope: Envelope) -> Envelope | None:
        message = open_envelope(envelope)
        if not isinstance(message, Peers):
            return agent.answer(envelope)
        without = dataclasses.replace(message, checkpoints=("", *message.checkpoints[1:]))
        answers.extend(asked(agent, each) for each in (without, message))
        return None

    tried(watched(plan, script=lambda site, _: insisting if site == "d" else honest))

    assert answers == [LEDGER, REFUSED]


def test_a_site_whose_own_ledger_was_put_back_finds_it_out_before_it_answers(plan: Plan, tmp_path: Path) -> None:
    sites = watched(plan, tmp_path)
    copy = sites.copy("d")
    tried(sites)
    sites.put_back("d", copy)

    collected = tried(sites, number=2)

    assert dict(collected.missing) == {"d": "advertise: Refused"}
    assert collected.present == ("a", "b", "c")
    assert len(sites.trainers["d"].starts) == 1


def test_a_ledger_put_back_to_before_it_helped_to_open_opens_no_second_sum(plan: Plan, tmp_path: Path) -> None:
    ledger, vector = tmp_path / "sites" / "d.ledger", tmp_path / "vectors" / "d" / "000001.vector"
    copies: list[bytes] = []

    def copied(agent: Agent, envelope: Envelope) -> Envelope | None:
        if isinstance(open_envelope(envelope), Signatures):
            with contextlib.closing(sqlite3.connect(ledger)) as connection:
                copies.extend((connection.serialize(), vector.read_bytes()))
        return agent.answer(envelope)

    sites = watched(plan, tmp_path, lambda site, _: copied if site == "d" else honest, vectors=tmp_path / "vectors")
    tried(sites)
    before, kept = copies
    vector.write_bytes(kept)
    sites.put_back("d", before)
    sites.agents["d"].spends.admit(1, kept=True, roster=sites.offers[0].roster)  # by the ledger alone it might

    collected = tried(sites, attempt=2)

    assert collected.missing["d"] == "advertise: Refused"
    assert len(copies) == 2


TOLD: dict[str, Callable[[tuple[str, ...]], tuple[str, ...]]] = {
    "nothing of one": lambda told: ("", *told[1:]),
    "two exchanged": lambda told: (told[1], told[0], *told[2:]),
    "one twice": lambda told: (told[1], told[1], *told[2:]),
    "garbage": lambda told: ("x" * SHORT_CHARACTERS, *told[1:]),
}


@pytest.mark.parametrize("case", TOLD)
def test_a_server_that_hides_or_exchanges_checkpoints_gets_no_shares(plan: Plan, case: str) -> None:
    answers: list[Message] = []
    change = changed_peers(lambda peers: dataclasses.replace(peers, checkpoints=TOLD[case](peers.checkpoints)), answers)

    collected = tried(watched(plan, script=lambda site, _: change if site == "d" else honest))

    assert answers == [LEDGER]
    assert dict(collected.missing) == {"d": "share: Refused"}


def test_a_server_that_shows_an_older_checkpoint_of_a_peer_gets_no_shares(plan: Plan) -> None:
    answers: list[Message] = []
    sites = watched(plan)
    old = sites.shown("a")
    for number in (1, 2):
        tried(sites, number)
    change = changed_peers(lambda peers: dataclasses.replace(peers, checkpoints=(old, *peers.checkpoints[1:])), answers)
    sites.script = lambda site, _: change if site == "d" else honest

    tried(sites, number=3)

    assert answers == [LEDGER]


@pytest.mark.parametrize("told", [(), ("",) * 3, ("",) * 5, ("", "", "", "mine")], ids=["none", "3", "5", "another"])
def test_checkpoints_that_are_not_one_for_each_peer_or_not_what_a_site_showed_are_refused_without_a_witness_too(
    plan: Plan, tmp_path: Path, told: tuple[str, ...]
) -> None:
    answers: list[Message] = []
    change = changed_peers(lambda peers: dataclasses.replace(peers, checkpoints=told), answers)

    tried(secure(plan, tmp_path, lambda site, _: change if site == "d" else honest))

    assert answers == [Failure(error="MessageError", sentence=MessageError.outside)]


def test_with_a_witness_a_site_takes_no_part_beside_one_that_shows_no_ledger(plan: Plan) -> None:
    def hiding(agent: Agent, envelope: Envelope) -> Envelope | None:
        message = open_envelope(agent.answer(envelope))
        return seal(dataclasses.replace(message, checkpoint="") if isinstance(message, Advertisement) else message)

    sites = watched(plan, script=lambda site, _: hiding if site == "d" else honest)

    assert dict(tried(sites).missing) == dict.fromkeys("abc", "share: Refused") | {"d": "share: MessageError"}


def test_a_ledger_that_cannot_be_read_keeps_its_site_out_and_the_attempt_under_way_goes_on(plan: Plan) -> None:
    answers: list[Message] = []

    def damaged(self: Journal) -> Checkpoint:
        raise LedgerError("record 4711 is damaged")

    def disturbed(agent: Agent, envelope: Envelope) -> Envelope | None:
        if isinstance(open_envelope(envelope), Peers):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Journal, "checkpoint", damaged)
                answers.append(asked(agent, signed(sites, attempt=2)))
        return agent.answer(envelope)

    sites = watched(plan, script=lambda site, _: disturbed if site == "d" else honest)

    collected = tried(sites)

    assert answers == [Failure(error="LedgerError", sentence=LedgerError.outside)]
    assert collected.present == sites.names


def signed(sites: Sites, **changes: Any) -> Offer:
    """Return the last offer with changes, signed again by the coordinator."""
    summation, member = sites.run.summation, sites.protections["d"]
    assert isinstance(summation, SecureSummation)
    assert isinstance(member, Membership)
    changed = dataclasses.replace(sites.offers[-1], **changes)
    begun = Attempt.of(changed, summation.roster, sites.ring, sites.plan.federation)
    return dataclasses.replace(changed, signature=summation.coordinator.sign(begun.offered))


def test_what_a_witness_cannot_write_is_not_answered(plan: Plan, tmp_path: Path) -> None:
    answers: list[Message] = []
    sites = watched(plan)
    sites.witnesses["d"] = Witness(tmp_path / "witness.json")
    sites.agents["d"] = sites.agent("d")

    def on_a_full_disk(agent: Agent, envelope: Envelope) -> Envelope | None:
        if not isinstance(open_envelope(envelope), Peers):
            return agent.answer(envelope)

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", full)
            answers.append(asked(agent, open_envelope(envelope)))
        return seal(answers[-1])

    sites.script = lambda site, _: on_a_full_disk if site == "d" else honest

    collected = tried(sites)

    assert answers == [Failure(error="LedgerError", sentence=LedgerError.outside)]
    assert dict(collected.missing) == {"d": "share: LedgerError"}


@pytest.mark.parametrize(
    "change", [{"round": 2, "attempt": 1}, {"round": 1, "attempt": 2}, {"run": "other", "round": 2}, {}]
)
def test_a_spoofed_repeated_or_stale_offer_records_and_charges_nothing(plan: Plan, change: dict[str, Any]) -> None:
    sites = watched(plan)
    tried(sites)
    before, spent = sites.shown("d"), sites.agents["d"].spends.spends
    forged = dataclasses.replace(sites.offers[-1], **change)  # with the signature of the one it was made of

    answer = asked(sites.agents["d"], forged)

    assert isinstance(answer, Failure)
    assert sites.shown("d") == before
    assert sites.agents["d"].spends.spends == spent


def test_a_witness_without_a_roster_is_refused(
    model: AdaptedModel, ring: RingLayout, make_examples: MakeExamples
) -> None:
    spends = make_agent(model, ring, make_examples, None).spends

    with pytest.raises(UsageError, match="knows nobody's key"):
        Agent(
            site="north",
            run="tiny",
            plan=model.plan,
            trainer=PrivateTrainer(certified(model), make_examples(30, seed=1)),
            declared_persons=30,
            ring=ring,
            protection=InsecurePlainSum(),
            spends=spends,
            witness=Witness(),
        )


def test_a_site_below_the_plans_least_persons_does_not_take_part(
    model: AdaptedModel, ring: RingLayout, make_examples: MakeExamples
) -> None:
    with pytest.raises(DataError, match="has 9 persons; the plan asks for at least 10"):
        make_agent(model, ring, make_examples, None, persons=9, declared_persons=9)


def test_a_site_too_large_for_the_plans_delta_does_not_take_part(
    model: AdaptedModel, ring: RingLayout, make_examples: MakeExamples
) -> None:
    with pytest.raises(PrivacyError, match=r"delta = 0\.001 is not below 1 / 1000"):
        make_agent(model, ring, make_examples, None, declared_persons=1000)


def test_the_agent_loads_no_torch() -> None:
    code = "import sys, confide.client.agent; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_site_draws_what_nobody_can_repeat_unless_it_is_told_otherwise() -> None:
    parameter = inspect.signature(Agent).parameters["randomness"].default

    first, second = parameter(1), parameter(1)

    assert first.name == "cryptographic"
    assert (first.words(4) != second.words(4)).all()
