"""What a site does with what it is sent."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from confide.client.agent import Agent
from confide.client.spends import SpendLog
from confide.client.trainer import PrivateTrainer
from confide.common.errors import DataError, PrivacyError
from confide.common.messages import Contribution, Envelope, Failure, Message, Offer, open_envelope, seal
from confide.common.model import AdaptedModel, attach
from confide.common.plan import Plan
from confide.common.ring import RingLayout, ring_layout
from confide.simulations.insecure import InsecurePlainSum, InsecureSeededNoise
from tests.conftest import MakeExamples


@pytest.fixture
def model(base_directory: Path, plan: Plan) -> AdaptedModel:
    return attach(base_directory, plan)


@pytest.fixture
def ring(model: AdaptedModel, plan: Plan) -> RingLayout:
    return ring_layout(plan, model.layout, model.head)


@pytest.fixture
def agent(model: AdaptedModel, ring: RingLayout, make_examples: MakeExamples, tmp_path: Path) -> Agent:
    return make_agent(model, ring, make_examples, tmp_path / "spends.jsonl")


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
    return Agent(
        site="north",
        run="tiny",
        plan=model.plan,
        trainer=PrivateTrainer(model, make_examples(persons, seed=1)),
        declared_persons=declared_persons,
        ring=ring,
        randomness=lambda number: InsecureSeededNoise(5, "north", number),
        protection=protection or InsecurePlainSum(),
        spends=SpendLog(path),
    )


def offer(model: AdaptedModel, number: int = 1) -> Offer:
    return Offer(
        run="tiny",
        plan=model.plan.digest,
        round=number,
        attempt=1,
        sites=3,
        layout=model.layout.digest,
        adapter=model.start,
    )


def asked(agent: Agent, message: Message) -> Message:
    return open_envelope(agent.answer(seal(message)))


def test_a_round_is_trained_once_and_every_attempt_sends_the_same_vector(
    model: AdaptedModel, ring: RingLayout, make_examples: MakeExamples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = make_agent(model, ring, make_examples, tmp_path / "spends.jsonl", Retrying())
    first = asked(agent, offer(model))
    spent = agent.spends.spends
    monkeypatch.setattr(PrivateTrainer, "train", None)  # training again would fail

    again = asked(agent, dataclasses.replace(offer(model), attempt=2))

    assert isinstance(first, Contribution)
    assert isinstance(again, Contribution)
    np.testing.assert_array_equal(first.words, again.words)
    assert (first.attempt, again.attempt) == (1, 2)
    assert agent.spends.spends == spent
    assert len(spent) == 1


def test_the_spend_is_on_disk_before_the_first_private_gradient(
    agent: Agent, model: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def look(*_: object, **__: object) -> None:
        seen.append(len(SpendLog(tmp_path / "spends.jsonl").spends))
        raise DataError("stopped before any gradient")

    monkeypatch.setattr(PrivateTrainer, "train", look)
    answer = asked(agent, offer(model))

    assert seen == [1]
    assert isinstance(answer, Failure)


def test_a_round_is_never_trained_from_two_adapters(agent: Agent, model: AdaptedModel) -> None:
    asked(agent, offer(model))

    answer = asked(agent, dataclasses.replace(offer(model), adapter=model.start + 1))

    assert answer == Failure(error="Refused", sentence="The site refused.")


def test_a_restarted_simulation_repeats_an_interrupted_round_to_the_same_bytes(
    agent: Agent, model: AdaptedModel, ring: RingLayout, make_examples: MakeExamples, tmp_path: Path
) -> None:
    first = asked(agent, offer(model))

    restarted = make_agent(model, ring, make_examples, tmp_path / "spends.jsonl")
    again = asked(restarted, offer(model))

    assert isinstance(first, Contribution)
    assert isinstance(again, Contribution)
    np.testing.assert_array_equal(first.words, again.words)
    assert restarted.spends.spends == agent.spends.spends


@pytest.mark.parametrize(
    "change",
    [
        {"run": "another"},
        {"plan": "sha256:" + "0" * 64},
        {"layout": "sha256:" + "0" * 64},
        {"round": 0},
        {"round": 4},
        {"sites": 2},
        {"sites": 17},
    ],
)
def test_an_offer_outside_the_plan_is_refused_and_costs_nothing(
    agent: Agent, model: AdaptedModel, change: dict[str, object]
) -> None:
    answer = asked(agent, dataclasses.replace(offer(model), **change))  # type: ignore[arg-type]

    assert answer == Failure(error="Refused", sentence="The site refused.")
    assert agent.spends.spends == ()


@pytest.mark.parametrize(
    "envelope",
    [
        Envelope(body=b""),
        Envelope(body=b"\xff" * 100),
        Envelope(body=b"{}"),
        seal(Failure(error="x", sentence="y")),
        Envelope(body=b"[" * 100_000),
    ],
)
def test_garbage_gets_a_fixed_sentence_and_the_agent_lives_on(
    agent: Agent, model: AdaptedModel, envelope: Envelope
) -> None:
    answer = open_envelope(agent.answer(envelope))

    assert isinstance(answer, Failure)
    assert isinstance(asked(agent, offer(model)), Contribution)


def test_an_adapter_of_another_length_fails_without_details(agent: Agent, model: AdaptedModel) -> None:
    answer = asked(agent, dataclasses.replace(offer(model), adapter=np.ones(3, np.float32)))

    assert answer == Failure(error="AdapterError", sentence="The adapter offered does not fit the plan.")


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
