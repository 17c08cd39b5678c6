"""The verdict on a plan: found out in a process that ends with it, whatever becomes of it."""

import dataclasses
import multiprocessing
import time

import pytest

from confide.client.verdict import Question, judged, verdict
from confide.common.calibration import noise_multiplier
from confide.common.errors import RunError
from confide.common.filter import Filter, best_order
from tests.books import data_set
from tests.policies import DIGEST, FEDERATION, PLAN, policy


def question(rounds: int = 0, *, spent: bool = False, **settings: object) -> Question:
    gate = Filter(epsilon=12.0, delta=1e-5, order=best_order(PLAN.privacy))
    return Question(
        policy=policy(**settings),
        plan=PLAN,
        federation=FEDERATION,
        sites=5,
        data=data_set(declared_persons=2000, person_id="patient"),
        base=DIGEST,
        accounts={"1": dataclasses.replace(gate, spent=gate.left) if spent else gate},
        rounds=rounds,
    )


def test_a_verdict_from_another_process_is_the_one_that_would_be_found_here() -> None:
    allowed, refused = question(), question(privacy__most_rounds=1)

    found = verdict(allowed), verdict(refused)

    assert found == (judged(allowed), judged(refused))
    assert found[0].refusals == ()
    assert found[0].noise == noise_multiplier(PLAN.privacy)
    assert [each.rule for each in found[1].refusals] == ["rounds"]
    assert found[1].noise == 0.0
    assert not multiprocessing.active_children()


def test_the_price_is_judged_of_the_rounds_that_are_to_come() -> None:
    assert judged(question(rounds=1)).refusals == judged(question(spent=True)).refusals == ()
    assert [each.rule for each in judged(question(rounds=1, spent=True)).refusals] == ["budget"]


def test_a_process_that_finds_no_verdict_in_time_is_killed() -> None:
    began = time.monotonic()

    with pytest.raises(TimeoutError, match=r"could not be judged within 0\.01 s"):
        verdict(question(), limit_s=0.01)

    assert time.monotonic() - began < 10
    assert not multiprocessing.active_children()


def test_a_process_that_ends_without_a_verdict_is_an_error_in_words() -> None:
    broken = question()
    object.__setattr__(broken, "data", None)

    with pytest.raises(RunError, match="ended with code 1 and without a verdict"):
        verdict(broken)
