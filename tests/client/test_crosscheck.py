"""The second opinion: it agrees where it comes to an end, and is cut off in time where it does not."""

import dataclasses
import time

import pytest

from confide.client.crosscheck import ABSOLUTE, RELATIVE, Opinion, crosscheck, prv
from confide.common.accounting import cost
from confide.common.errors import PrivacyError
from confide.common.spend import Spend

SPEND = Spend(
    round=1,
    sampling_rate=0.1,
    noise_multiplier=2.0,
    steps=40,
    clip_norm=1.0,
    divisor=100.0,
    noise="insecure_seeded_noise",
)


def spend(rate: float, noise: float, steps: int) -> Spend:
    return dataclasses.replace(SPEND, sampling_rate=rate, noise_multiplier=noise, steps=steps)


@pytest.mark.parametrize(
    "events",
    [
        [spend(0.1, 0.7688, 40)],
        [spend(0.01, 1.0, 1000)],
        [spend(0.1, 2.0, 40), spend(0.02, 1.0, 100)],
    ],
    ids=["starter", "long", "unlike"],
)
def test_prv_agrees_with_pld_within_three_percent(events: list[Spend]) -> None:
    opinion = crosscheck(events, 1e-5)

    assert opinion.reason == ""
    assert opinion.epsilon == pytest.approx(cost(events, 1e-5).pld, rel=RELATIVE, abs=ABSOLUTE)


def test_a_case_that_explodes_is_cut_off_in_time_and_reported() -> None:
    explosive = [spend(0.5, 0.5, 10_000)]

    began = time.monotonic()
    by_time = prv(explosive, 1e-5, timeout_s=2, memory_mb=1 << 14)
    took = time.monotonic() - began
    by_memory = prv(explosive, 1e-5, memory_mb=256)

    assert by_time == Opinion(epsilon=None, reason="timeout")
    assert took < 10
    assert by_memory == Opinion(epsilon=None, reason="memory")


def test_what_goes_wrong_inside_is_told_by_its_class() -> None:
    opinion = prv([spend(0.1, 2.0, 40)], 2.0)  # no delta at all

    assert opinion.epsilon is None
    assert opinion.reason.startswith("failed: ")


def test_nothing_spent_needs_no_second_opinion() -> None:
    assert prv([], 1e-5) == crosscheck([], 1e-5) == Opinion(epsilon=0.0)


def test_an_opinion_that_differs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself, without a second process: a number 10 % off is refused in either direction."""
    ours = cost([SPEND], 1e-5).pld

    for theirs in (0.9 * ours, 1.1 * ours):
        monkeypatch.setattr("confide.client.crosscheck.prv", lambda *_, theirs=theirs, **__: Opinion(epsilon=theirs))

        with pytest.raises(PrivacyError, match="Two accountants disagree"):
            crosscheck([SPEND], 1e-5)
