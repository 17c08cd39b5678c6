"""One run in a site's ledger: what is written when, and what may still be done with a round, before and after a restart."""

import dataclasses
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from confide.client.journal import Journal
from confide.client.mechanism import Mechanism
from confide.client.spends import Spends, evidence_purpose
from confide.common.crypto import keyed_digest, unseal_bytes
from confide.common.entries import SEEDED
from confide.common.errors import LedgerError, Refused, SealError
from confide.common.export import read_export
from confide.common.ledger import BOUND, FORFEITED, REFUNDED, RESERVED, Book, verify
from confide.common.plan import Plan
from confide.common.spend import Spend
from confide.simulations.vaults import rows_of
from tests.ledgers import KEY, spends_of

START, COMMITMENT, MASKED = ("sha256:" + digit * 64 for digit in "123")
ROSTER, OTHER = "sha256:" + "a" * 64, "sha256:" + "b" * 64
FRESH = "cryptographic"
EVENTS = ("reserve", "bind", "mask", "commit")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "north.ledger"


def spend(plan: Plan, number: int = 1, noise: str = FRESH) -> Spend:
    return Mechanism.of(plan.privacy, 30).spend(number, noise)


def after(plan: Plan, path: Path | None, *events: str, number: int = 1, noise: str = FRESH) -> Spends:
    """Return the run after these events of a round."""
    spends = spends_of(plan, "tiny", path)
    for event in events:
        match event:
            case "reserve":
                spends.reserve(spend(plan, number, noise), START, ROSTER)
            case "bind":
                spends.bind(number, COMMITMENT)
            case "mask":
                spends.mask(number, 1, MASKED)
            case "commit":
                spends.commit(number)
    return spends


def admitted(spends: Spends, number: int, *, kept: bool = True) -> bool:
    try:
        spends.admit(number, kept=kept, roster=ROSTER)
    except Refused:
        return False
    return True


def look(path: Path) -> Book:
    return Journal.look(path)


@pytest.mark.parametrize("count", range(1, 5))
def test_what_was_written_outlives_a_kill_right_after_it(plan: Plan, path: Path, count: int) -> None:
    spends_of(plan, "tiny", path)
    child = multiprocessing.get_context("fork").Process(target=_write_and_die, args=(plan, path, EVENTS[:count]))

    child.start()
    child.join()

    assert child.exitcode == -signal.SIGKILL
    known = look(path).rounds("tiny")[1]
    assert known.state == ("reserved", "bound", "bound", "committed")[count - 1]
    assert (known.attempt == 1) == (count >= 3)
    assert look(path).spends("tiny") == (spend(plan),)


def _write_and_die(plan: Plan, path: Path, events: tuple[str, ...]) -> None:
    after(plan, path, *events)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_round_is_trained_once_even_after_a_restart(plan: Plan, path: Path) -> None:
    after(plan, path, "reserve")

    for start in (START, COMMITMENT):
        with pytest.raises(Refused, match="a round is trained once"):
            spends_of(plan, "tiny", path).reserve(spend(plan), start, ROSTER)

    assert look(path).spends("tiny") == (spend(plan),)


@pytest.mark.parametrize(
    "changes",
    [{"noise_multiplier": 0.1}, {"steps": 1}, {"sampling_rate": 0.9}, {"clip_norm": 2.0}, {"divisor": 1.0}],
)
def test_a_round_that_costs_something_else_than_was_approved_is_refused(
    plan: Plan, path: Path, changes: dict[str, float]
) -> None:
    spends = spends_of(plan, "tiny", path)
    other = dataclasses.replace(spend(plan), **changes)  # type: ignore[arg-type]

    with pytest.raises(Refused, match="A changed plan needs a new approval") as refused:
        spends.reserve(other, START, ROSTER)

    assert refused.value.rule == "approval"
    assert spends.spends == ()


def test_another_plan_or_run_than_was_approved_spends_nothing(plan: Plan, path: Path) -> None:
    journal = Journal.open(_made(plan, path), identity=KEY)

    for run, digest in (("other", plan.digest), ("tiny", "sha256:" + "0" * 64)):
        spends = Spends(journal, run=run, plan=digest, data="rows of tiny")
        with pytest.raises(Refused, match="approvals of the run"):
            spends.reserve(spend(plan), START, ROSTER)

    assert journal.book.runs == ()


def test_all_rounds_of_the_plan_fit_and_none_beyond(plan: Plan, path: Path) -> None:
    rounds = plan.privacy.rounds
    for number in range(1, rounds + 1):
        after(plan, path, *EVENTS, number=number)
    spends = spends_of(plan, "tiny", path)

    with pytest.raises(Refused, match=f"the plan has {rounds} rounds"):
        spends.reserve(spend(plan, rounds + 1), START, ROSTER)

    assert [one.round for one in spends.spends] == list(range(1, rounds + 1))
    assert 0 < look(path).accounts["1"].left < 1e-4


@pytest.mark.parametrize("again", [False, True], ids=["same process", "started anew"])
@pytest.mark.parametrize(
    ("events", "kept", "admits"),
    [
        ((), False, True),
        (("reserve",), True, False),
        (("reserve",), False, False),
        (("reserve", "bind"), True, True),
        (("reserve", "bind"), False, False),
        (("reserve", "bind", "mask"), True, True),
        (EVENTS, True, False),
        (EVENTS, False, False),
    ],
    ids=lambda value: "+".join(value) or "nothing" if isinstance(value, tuple) else str(value),
)
def test_a_site_takes_part_again_only_in_a_round_that_has_its_vector_and_was_not_opened(
    plan: Plan, path: Path, events: tuple[str, ...], kept: bool, admits: bool, again: bool
) -> None:
    spends = after(plan, path, *events)

    found = admitted(spends_of(plan, "tiny", path) if again else spends, 1, kept=kept)

    assert found == admits


def test_a_round_ends_under_the_roster_it_was_begun_under(plan: Plan, path: Path) -> None:
    after(plan, path, "reserve", "bind")

    found = spends_of(plan, "tiny", path)

    found.admit(1, kept=True, roster=ROSTER)
    with pytest.raises(Refused, match="another roster"):
        found.admit(1, kept=True, roster=OTHER)


def test_a_round_ends_under_the_plan_and_on_the_data_it_was_begun_with(plan: Plan, path: Path) -> None:
    after(plan, path, "reserve", "bind")
    journal = Journal.open(path, identity=KEY)

    for digest, data in ((OTHER, rows_of("tiny")), (plan.digest, "other")):
        with pytest.raises(Refused, match="was begun under another plan or on another data set") as refused:
            Spends(journal, run="tiny", plan=digest, data=data).admit(1, kept=True, roster=ROSTER)
        assert refused.value.rule == "approval"

    Spends(journal, run="tiny", plan=plan.digest, data=rows_of("tiny")).admit(1, kept=True, roster=ROSTER)


def test_a_refusal_says_which_way_the_round_went(plan: Plan) -> None:
    with pytest.raises(Refused, match=r"The sum of round 1 was opened with this site's help"):
        after(plan, None, *EVENTS).admit(1, kept=True, roster=ROSTER)
    with pytest.raises(Refused, match="Round 1 was begun and its vector is gone; a round is trained once"):
        after(plan, None, "reserve").admit(1, kept=False, roster=ROSTER)


def test_no_earlier_round_is_entered_once_a_later_one_was_begun(plan: Plan, path: Path) -> None:
    after(plan, path, "reserve", "bind")
    after(plan, path, "reserve", number=3)

    found = spends_of(plan, "tiny", path)

    for number in (1, 2):
        with pytest.raises(Refused, match=f"Round {number} is offered after round 3"):
            found.admit(number, kept=True, roster=ROSTER)
    assert not admitted(found, 3)
    assert admitted(found, 4)


def test_a_seeded_simulation_may_go_through_its_last_round_again_at_no_cost(plan: Plan, path: Path) -> None:
    after(plan, path, *EVENTS, noise=SEEDED)
    used = look(path).accounts["1"].used

    again = spends_of(plan, "tiny", path)
    assert admitted(again, 1, kept=False)
    after(plan, path, *EVENTS, noise=SEEDED)

    assert look(path).accounts["1"].used == used > 0
    assert len(again.spends) == 1


def test_a_round_never_has_two_vectors(plan: Plan, path: Path) -> None:
    after(plan, path, "reserve", "bind")

    with pytest.raises(Refused, match="was to be bound; it is bound"):
        spends_of(plan, "tiny", path).bind(1, MASKED)

    assert spends_of(plan, "tiny", path).commitment(1) == COMMITMENT


def test_what_is_known_of_a_round_is_known_after_a_restart(plan: Plan, path: Path) -> None:
    after(plan, path, "reserve", "bind", "mask")

    found = spends_of(plan, "tiny", path)

    assert (found.start(1), found.commitment(1), found.last_attempt) == (START, COMMITMENT, (1, 1))
    assert (found.start(2), found.commitment(2)) == (None, None)
    assert spends_of(plan, "tiny").last_attempt == (0, 0)


def test_steps_that_looked_at_no_row_are_given_back_and_the_round_is_closed(plan: Plan, path: Path) -> None:
    spends = after(plan, path, "reserve")
    whole = look(path).accounts["1"].filter.spent

    spends.give_up(1, plan.privacy.steps_per_round - 1, "It ended.")

    known = look(path).rounds("tiny")[1]
    assert known.state == REFUNDED
    assert known.spend == dataclasses.replace(spend(plan), steps=1)
    one = whole / plan.privacy.steps_per_round
    assert one <= look(path).accounts["1"].filter.spent < one * (1 + 1e-9)
    assert not admitted(spends, 1)


def test_a_round_given_up_in_its_last_step_counts_in_full(plan: Plan, path: Path) -> None:
    spends = after(plan, path, "reserve")

    spends.give_up(1, 0, "It ended.")

    assert look(path).rounds("tiny")[1].state == FORFEITED
    assert spends.spends == (spend(plan),)


def test_a_round_that_has_its_vector_is_not_given_up(plan: Plan, path: Path) -> None:
    spends = after(plan, path, "reserve", "bind")

    spends.give_up(1, 1, "It ended.")

    assert look(path).rounds("tiny")[1].state == BOUND
    assert spends.spends == (spend(plan),)


def test_a_site_that_starts_anew_writes_down_what_it_lost_and_counts_it_in_full(plan: Plan, path: Path) -> None:
    after(plan, path, *EVENTS)
    after(plan, path, "reserve", number=2)
    assert look(path).rounds("tiny")[2].state == RESERVED

    spends_of(plan, "tiny", path).settle()
    spends_of(plan, "tiny", path).settle()

    book = look(path)
    assert book.rounds("tiny")[2].state == FORFEITED
    assert book.spends("tiny") == (spend(plan, 1), spend(plan, 2))


def test_evidence_is_sealed_and_its_record_is_a_keyed_digest(plan: Plan, path: Path) -> None:
    after(plan, path, "reserve", "bind")
    journal = Journal.open(path, identity=KEY)
    key, evidence = bytes(range(32)), b'{"batch_sizes":[17]}'

    Spends(journal, run="tiny", plan=plan.digest, data="rows of tiny", key=key).commit(1, evidence)

    purpose = evidence_purpose("tiny", 1)
    sealed = journal.evidence("tiny", 1)
    assert sealed is not None
    assert unseal_bytes(sealed, key, purpose) == evidence
    assert look(path).rounds("tiny")[1].evidence == keyed_digest(key, purpose, evidence).hex()
    assert not any(b"batch_sizes" in line for line in journal.lines())
    with pytest.raises(SealError):
        unseal_bytes(sealed, bytes(32), purpose)


def test_the_export_of_a_run_can_be_verified_by_anyone(plan: Plan, path: Path, tmp_path: Path) -> None:
    spends = after(plan, path, *EVENTS)

    spends.export(tmp_path / "north.jsonl")

    assert verify(*read_export(tmp_path / "north.jsonl")).spends("tiny") == spends.spends


def test_the_checkpoint_shown_is_that_of_the_last_record(plan: Plan, path: Path) -> None:
    spends = after(plan, path, "reserve")
    before = spends.checkpoint

    spends.bind(1, COMMITMENT)

    assert spends.checkpoint != before
    assert len(spends.checkpoint) <= 200


def test_nothing_is_written_on_a_closed_ledger(plan: Plan, path: Path) -> None:
    journal = Journal.open(_made(plan, path), identity=KEY)
    spends = Spends(journal, run="tiny", plan=plan.digest, data="rows of tiny")
    journal.close()

    with pytest.raises(LedgerError):
        spends.reserve(spend(plan), START, ROSTER)


def _made(plan: Plan, path: Path) -> Path:
    spends_of(plan, "tiny", path)
    return path
