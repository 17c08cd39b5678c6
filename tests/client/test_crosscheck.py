"""The second opinion: it agrees where it comes to an end, and is cut off in time where it does not."""

import json
import time
import warnings

import pytest

from confide.client.crosscheck import ABSOLUTE, RELATIVE, Opinion, _child, crosscheck, prv
from confide.common.accounting import cost
from confide.common.errors import PrivacyError
from tests.common.spending import SPEND, spend

UNLIKE = [spend(0.1, 2.0, 40), spend(0.02, 1.0, 100)]


@pytest.mark.parametrize(
    ("rate", "noise", "steps"),
    [(0.1, 0.7688, 40), (0.01, 1.0, 1000), (0.01, 0.8, 200), (0.05, 1.0, 200), (0.1, 3.0, 400)],
)
def test_pld_agrees_with_the_prv_accountant_of_opacus(rate: float, noise: float, steps: int) -> None:
    # In this process, which has its libraries loaded; these cases are known to come to an end.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import PRVAccountant

        accountant = PRVAccountant()
        accountant.history = [(noise, rate, steps)]
        theirs = float(accountant.get_epsilon(1e-5, eps_error=0.01))

    assert theirs == pytest.approx(cost([spend(rate, noise, steps)], 1e-5).pld, rel=RELATIVE)


def test_prv_agrees_with_pld_within_three_percent() -> None:
    # Asked as a site would ask, in another process.
    opinion = crosscheck(UNLIKE, 1e-5)

    assert opinion.reason == ""
    assert opinion.epsilon == pytest.approx(cost(UNLIKE, 1e-5).pld, rel=RELATIVE, abs=ABSOLUTE)


def test_a_case_that_explodes_is_cut_off_in_time_and_reported() -> None:
    explosive = [spend(0.5, 0.5, 10_000)]

    began = time.monotonic()
    by_time = prv(explosive, 1e-5, timeout_s=0.5, memory_mb=1 << 14)
    took = time.monotonic() - began
    by_memory = prv(explosive, 1e-5, memory_mb=256)

    assert by_time == Opinion(epsilon=None, reason="timeout")
    assert took < 9
    assert by_memory == Opinion(epsilon=None, reason="memory")


def test_what_goes_wrong_inside_is_told_by_its_class(capsys: pytest.CaptureFixture[str]) -> None:
    # What the child does, done in this process, with a limit of memory that no machine reaches.
    _child(json.dumps({"history": [(2.0, 0.1, 40)], "delta": 2.0, "memory_mb": 1 << 30}))

    answer = json.loads(capsys.readouterr().out)
    assert answer["epsilon"] is None
    assert answer["reason"].startswith("failed: ")


def test_nothing_spent_needs_no_second_opinion() -> None:
    assert prv([], 1e-5) == crosscheck([], 1e-5) == Opinion(epsilon=0.0)


def test_an_opinion_that_differs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself, without a second process: a number 10 % off is refused in either direction."""
    ours = cost([SPEND], 1e-5).pld

    for theirs in (0.9 * ours, 1.1 * ours):
        monkeypatch.setattr("confide.client.crosscheck.prv", lambda *_, theirs=theirs, **__: Opinion(epsilon=theirs))

        with pytest.raises(PrivacyError, match="Two accountants disagree"):
            crosscheck([SPEND], 1e-5)
