"""The vault under faults: killed at any moment, without room on the disk, stopped, too slow, with a clock that goes back.

The sweeps of `tests/faults` kill a site at hundreds of its moments; the rest is about the real worker with its child. At
every point of all of them the ledger counts at least what really happened, and the site works on.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from confide.client import worker as workers
from confide.client.home import replace_private
from confide.client.postbox import private_folder
from confide.client.verdict import Question, Verdict, judged
from confide.client.worker import Worker
from confide.common.entries import Reserve, Started, utc_text
from confide.common.errors import Refused, UsageError
from confide.common.ledger import BOUND, COMMITTED, FORFEITED, REFUNDED, Round
from confide.common.messages import Failure, Survivors, open_envelope
from confide.common.model import attach
from confide.server.store import RoundRecord
from tests import faults, living
from tests.conftest import plan_text
from tests.living import NAME, RUN, Living, Others, until

STEPS = 60  # so that a round takes long enough for something to happen in its middle
DAY_S = 86_400
COUNTED = {"reserved", BOUND, COMMITTED, FORFEITED}

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def nothing_broken(outcomes: list[faults.Outcome]) -> bool:
    broken = [outcome for outcome in outcomes if outcome.broken]
    assert not broken, f"{len(broken)} of {len(outcomes)}, the first: {broken[0]}"
    return True


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[faults.Outcome]]:
    """Runs to the end with faults at some of all moments."""
    return faults.sweep(tmp_path_factory.mktemp("faults"), {"once": 64, "twice": 12, "full": 24})


def test_wherever_a_site_is_killed_its_ledger_counts_at_least_what_happened_and_it_works_on(
    swept: dict[str, list[faults.Outcome]],
) -> None:
    outcomes = swept["once"]

    assert nothing_broken(outcomes)
    assert len(outcomes) >= 48
    assert {outcome.deaths for outcome in outcomes} == {1}
    assert {outcome.round for outcome in outcomes} == set(range(1, faults.ROUNDS + 1))
    assert len({outcome.where for outcome in outcomes}) >= 12


def test_a_site_that_is_killed_again_while_it_starts_anew_works_on(swept: dict[str, list[faults.Outcome]]) -> None:
    outcomes = swept["twice"]

    assert nothing_broken(outcomes)
    assert Counter(outcome.deaths for outcome in outcomes)[2] >= 8


def test_wherever_the_disk_is_full_nothing_is_trained_on_its_word_and_the_site_works_on_without_a_new_start(
    swept: dict[str, list[faults.Outcome]],
) -> None:
    outcomes = swept["full"]

    assert nothing_broken(outcomes)
    assert len(outcomes) >= 18
    assert {outcome.deaths for outcome in outcomes} == {0}


@pytest.mark.slow
@pytest.mark.parametrize(("rounds", "least"), [((1, 2), 180), ((3, 4), 80), ((5, 6), 140)])
def test_at_every_moment_of_a_run_a_site_may_be_killed(tmp_path: Path, rounds: tuple[int, int], least: int) -> None:
    outcomes = faults.sweep(tmp_path, {"once": 10_000}, rounds=rounds, to_the_end=False)["once"]

    assert nothing_broken(outcomes)
    assert {outcome.round for outcome in outcomes} == set(rounds)
    assert len(outcomes) >= least


@pytest.mark.slow
@pytest.mark.parametrize(("how", "most", "least"), [("twice", 10_000, 80), ("full", 100, 60), ("anywhere", 50, 50)])
def test_at_many_moments_of_a_run_there_may_be_a_fault(tmp_path: Path, how: str, most: int, least: int) -> None:
    outcomes = faults.sweep(tmp_path, {how: most}, to_the_end=False)[how]

    assert nothing_broken(outcomes)
    assert len(outcomes) >= least


@dataclasses.dataclass(kw_only=True)
class Ward:
    """A real site, the rest of its federation, and how many rounds were begun."""

    site: Living
    others: Others
    round: int = 0

    def run(self) -> RoundRecord:
        """Run the next round."""
        self.round += 1
        return self.others.round(self.round)

    def works_on(self) -> bool:
        """Whether the next round has a sum with the site in it."""
        record = self.run()
        assert NAME in record.present, (record.void, record.missing)
        return self.known.state == COMMITTED

    @property
    def known(self) -> Round:
        """What the ledger says of the last round."""
        return self.site.rounds[self.round]

    def in_training(self, then: Callable[[], object], after_s: float = 0.08) -> RoundRecord:
        """Run the next round, and do something while the site trains."""
        timers: list[threading.Timer] = []

        def watch(kind: str) -> None:
            if kind == "start" and not timers:
                timers.append(threading.Timer(after_s, then))
                timers[0].start()

        self.others.before = watch
        try:
            return self.run()
        finally:
            self.others.before = lambda kind: None
            for timer in timers:
                timer.join()

    def before(self, exchange: str, then: Callable[[], object]) -> RoundRecord:
        """Run the next round, and do something once before the site is asked that."""
        done: list[object] = []

        def watch(kind: str) -> None:
            if kind == exchange and not done:
                done.append(then())

        self.others.before = watch
        try:
            return self.run()
        finally:
            self.others.before = lambda kind: None

    def told(self, kind: str) -> Failure | None:
        """The failure with which the site last answered that, if it was one."""
        answer = next(answer for asked, answer in reversed(self.others.heard) if open_envelope(asked).kind == kind)
        message = open_envelope(answer)
        return message if isinstance(message, Failure) else None


@contextlib.contextmanager
def a_ward(base_directory: Path, steps: int = STEPS) -> Iterator[Ward]:
    with private_folder() as folder:
        text = living.plan_text(plan_text(base_directory), rounds=30, steps_per_round=steps)
        site = living.made(folder, base_directory, text)
        yield Ward(site=site, others=Others(site, attach(base_directory, site.signed.plan)))


@pytest.fixture(scope="module")
def pattern(base_directory: Path) -> Iterator[Ward]:
    with a_ward(base_directory) as ward:
        yield ward


@pytest.fixture(scope="module")
def served(pattern: Ward) -> Iterator[tuple[Ward, Worker]]:
    """A site whose agent is served in a thread of this process, for tests that leave it at work."""
    with pattern.site.served() as worker:
        yield pattern, worker


@pytest.fixture(scope="module")
def swift(base_directory: Path) -> Iterator[tuple[Ward, Worker]]:
    """Another one, whose rounds are short, for tests in which nothing happens in the middle of training."""
    with a_ward(base_directory, steps=2) as ward, ward.site.served() as worker:
        yield ward, worker


def true_steps(known: Round) -> int:
    """How many steps of a round the ledger counts."""
    return known.reserve.steps - known.given_back if known.state in COUNTED | {REFUNDED} else 0


@linux
def test_a_child_that_is_killed_in_training_costs_the_steps_it_had_begun_and_the_agent_answers_on(
    served: tuple[Ward, Worker],
) -> None:
    ward, worker = served
    process = worker._trainer.process
    assert process is not None

    record = ward.in_training(lambda: os.kill(process, signal.SIGKILL))

    assert not record.present
    assert ward.known.state == REFUNDED
    assert true_steps(ward.known) < STEPS
    assert ward.told("start") == Failure(error="RunError", sentence="The site could not go on.")
    until(lambda: worker._trainer.process not in {None, process})  # before any round would have to wait for it
    following = worker._trainer.process
    assert ward.works_on()
    assert worker._trainer.process == following


@linux
def test_a_child_that_does_not_start_between_rounds_is_told_of_and_not_started_over_and_over(
    served: tuple[Ward, Worker],
) -> None:
    ward, worker = served
    load, process = worker._trainer._load, worker._trainer.process
    assert process is not None

    worker._trainer._load = dataclasses.replace(load, table=ward.site.root / "nowhere.csv")
    ward.in_training(lambda: os.kill(process, signal.SIGKILL))
    until(lambda: b"could not be started" in ward.site.status())
    tried = worker._tried
    time.sleep(1)  # in which it is idle for five glances
    again = worker._tried
    worker._trainer._load = load

    assert again == tried
    assert ward.works_on()
    until(lambda: b"could not be started" not in ward.site.status())


@pytest.mark.slow
def test_a_round_that_takes_longer_than_the_owner_allows_is_given_up_and_the_agent_answers_on(
    served: tuple[Ward, Worker],
) -> None:
    ward, worker = served
    allowed = worker._trainer._deadline_s
    try:
        worker._trainer._deadline_s = 0.1
        record = ward.run()
    finally:
        worker._trainer._deadline_s = allowed

    assert not record.present
    assert ward.known.state == REFUNDED
    assert true_steps(ward.known) < STEPS
    assert ward.works_on()


@pytest.mark.slow
def test_a_disk_without_room_is_refused_and_once_there_is_room_the_same_agent_works_on(
    served: tuple[Ward, Worker],
) -> None:
    ward, worker = served
    connection = worker._journal._connection
    pages, most = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "max_page_count"))
    connection.execute(f"PRAGMA max_page_count = {pages}")  # SQLite then says what it says on a disk that is full
    try:
        while (record := ward.run()).present:
            pass
        health = json.loads(ward.site.status())
        fuller = ward.run()  # by now not even a Reserve has room
        while ward.round in ward.site.rounds:
            fuller = ward.run()
    finally:
        connection.execute(f"PRAGMA max_page_count = {most}")

    assert not record.present
    assert not fuller.present
    assert ward.told("start") == Failure(
        error="LedgerError", sentence="The site cannot vouch for its record of spends."
    )
    assert health["status"] == "failing"
    assert ward.round not in ward.site.rounds
    assert worker._trainer.evidence.keys().isdisjoint({ward.round})  # nothing was trained
    assert ward.works_on()
    assert json.loads(ward.site.status())["status"] == "ok"


def test_a_second_agent_on_the_same_directory_is_refused_in_this_process_or_another(
    served: tuple[Ward, Worker],
) -> None:
    ward, _ = served

    with pytest.raises(UsageError, match="one agent at a time works on it") as caught, ward.site.worker():
        raise AssertionError
    second = ward.site.started()
    _, said = second.communicate(timeout=60)

    assert str(os.getpid()) in str(caught.value)
    assert second.returncode == 1
    assert f"is in use by process {os.getpid()}".encode() in said
    assert ward.works_on()


def test_a_revocation_stops_the_next_exchange_and_a_new_approval_lets_the_next_round_begin(
    served: tuple[Ward, Worker],
) -> None:
    ward, _ = served

    record = ward.before("start", ward.site.revoke)
    told, reserved = ward.told("start"), ward.round in ward.site.rounds
    ward.site.approve(29)

    assert not record.present
    assert told is not None
    assert told.rule == "approval"
    assert not reserved
    assert ward.works_on()


def test_a_policy_that_is_narrowed_while_the_agent_runs_holds_from_the_next_exchange_on(
    served: tuple[Ward, Worker],
) -> None:
    ward, _ = served

    record = ward.before("start", lambda: ward.site.change_policy(targets='["query"]'))
    told, reserved = ward.told("start"), ward.round in ward.site.rounds
    ward.site.change_policy(targets='["query", "value"]')

    assert not record.present
    assert told is not None
    assert told.rule == "targets"
    assert not reserved
    assert ward.works_on()


CHANGES: dict[str, dict[str, object]] = {
    "hours": {"windows": "[]"},
    "cohort": {"known_sites": f'["stranger {living.STRANGER.public.hex()}"]', "fewest_known": 1},
}


@pytest.mark.parametrize("exchange", ["peers", "start"])
@pytest.mark.parametrize("rule", CHANGES)
def test_the_terms_of_an_offer_are_judged_again_at_every_exchange_before_training(
    swift: tuple[Ward, Worker], rule: str, exchange: str
) -> None:
    ward, _ = swift
    content = ward.site.home.policy.read_bytes()

    record = ward.before(exchange, lambda: ward.site.change_policy(**CHANGES[rule]))
    told, reserved = ward.told(exchange), ward.round in ward.site.rounds
    replace_private(ward.site.home.policy, content)

    assert not record.present
    assert told is not None
    assert told.rule == rule
    assert not reserved
    assert ward.works_on()


@pytest.mark.parametrize("exchange", ["survivors", "signatures"])
def test_after_training_all_terms_of_an_offer_hold_but_the_hours(swift: tuple[Ward, Worker], exchange: str) -> None:
    ward, _ = swift
    content = ward.site.home.policy.read_bytes()

    summed = ward.before(exchange, lambda: ward.site.change_policy(**CHANGES["hours"]))
    replace_private(ward.site.home.policy, content)
    refused = ward.before(exchange, lambda: ward.site.change_policy(**CHANGES["cohort"]))
    told = ward.told(exchange)
    replace_private(ward.site.home.policy, content)

    assert NAME in summed.present
    assert NAME not in refused.present
    assert told is not None
    assert told.rule == "cohort"
    assert ward.known.state == BOUND
    assert ward.works_on()


def test_nothing_is_trained_on_rows_of_an_older_version_and_the_next_offer_loads_the_new_one(
    swift: tuple[Ward, Worker],
) -> None:
    ward, worker = swift

    def withdraw() -> None:
        with ward.site.registry() as registry:
            registry.withdraw(living.DATA, ["p59"])

    before, persons = worker._version, worker._trainer.person_count
    record = ward.before("start", withdraw)
    told, reserved = ward.told("start"), ward.round in ward.site.rounds

    assert not record.present
    assert told is not None
    assert told.rule == "data"
    assert not reserved
    assert ward.works_on()
    assert (worker._version, worker._trainer.person_count) == (before + 1, persons - 1)


def test_what_was_found_of_a_plan_is_remembered_though_it_was_refused(
    swift: tuple[Ward, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    ward, _ = swift
    asked: list[Question] = []

    def counted(question: Question) -> Verdict:
        asked.append(question)
        return judged(question)

    monkeypatch.setattr(workers, "verdict", counted)
    ward.site.change_policy(targets='["query"]')
    junk = [ward.site.told(Survivors(context="x", sites=b"")) for _ in range(5)]
    ward.site.change_policy(targets='["query", "value"]')

    assert [living.failure(each).rule for each in junk] == ["targets"] * 5
    assert len(asked) == 1
    assert ward.works_on()
    assert len(asked) == 2


def test_a_plan_that_takes_too_long_to_judge_is_refused_for_now_and_is_not_judged_at_every_message(
    swift: tuple[Ward, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    ward, worker = swift
    asked: list[Question] = []

    def never(question: Question) -> Verdict:
        asked.append(question)
        raise TimeoutError("The plan could not be judged within 120 s.")

    monkeypatch.setattr(workers, "verdict", never)
    worker._judged = None
    junk = [ward.site.told(Survivors(context="x", sites=b"")) for _ in range(5)]
    monkeypatch.setattr(workers, "verdict", judged)
    later = time.monotonic() + 601
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: later, time=time.time))

    assert [living.failure(each).rule for each in junk] == ["compute"] * 5
    assert len(asked) == 1
    assert ward.works_on()


def test_a_trail_that_cannot_be_written_begins_no_attempt_and_swallows_no_answer(swift: tuple[Ward, Worker]) -> None:
    ward, worker = swift
    folder = worker.trail._folder

    def full() -> None:
        worker.trail._folder = Path("/dev/null/log")

    begun = ward.before("start", full)
    health = json.loads(ward.site.status())
    refused = ward.run()
    told, reserved = ward.told("offer"), ward.round in ward.site.rounds
    worker.trail._folder = folder

    assert NAME in begun.present
    assert health["status"] == "failing"
    assert "The trail cannot be written; no further attempt is begun." in health["reasons"]
    assert not refused.present
    assert told == Failure(error="RunError", sentence="The site could not go on.")
    assert not reserved
    assert ward.works_on()
    assert json.loads(ward.site.status())["status"] == "ok"


@pytest.mark.slow
def test_rows_that_may_not_be_used_are_not_trained_on_by_going_on_with_an_older_attempt(
    served: tuple[Ward, Worker],
) -> None:
    ward, worker = served
    content, version = ward.site.table.read_bytes(), worker._version
    heard: list[Failure | None] = []

    def change_and_offer() -> None:
        """Register a version whose table is exchanged afterwards, and offer the next round in the middle of this one."""
        ward.site.table.write_bytes(content.replace(b"good", b"great", 3))
        with ward.site.registry() as registry:
            registry.add(living.DATA, ward.site.table, "patient")
        ward.site.table.write_bytes(content.replace(b"good", b"awful", 3))
        offer = ward.others.signed(ward.others.offer(ward.round, attempt=60))
        told = ward.site.told(offer)
        heard.append(told if isinstance(told, Failure) else None)

    record = ward.before("start", change_and_offer)
    told, reserved = ward.told("start"), ward.round in ward.site.rounds
    ward.site.table.write_bytes(content.replace(b"good", b"great", 3))

    assert heard[0] is not None
    assert heard[0].rule == "data"
    assert not record.present
    assert told is not None
    assert told.rule == "data"
    assert not reserved
    assert ward.works_on()
    assert worker._version == version + 1


@pytest.mark.slow
def test_withdrawals_that_leave_too_few_persons_hold_from_the_next_round_on_until_there_are_more(
    served: tuple[Ward, Worker],
) -> None:
    ward, worker = served
    with ward.site.registry() as registry:
        registry.withdraw(living.DATA, ["p1", "p2"])
    assert ward.works_on()
    left = worker._trainer.person_count
    with ward.site.registry() as registry:
        registry.withdraw(living.DATA, [f"p{number}" for number in range(living.PERSONS // 2 + 1)])

    record = ward.run()
    told, reserved = ward.told("offer"), ward.round in ward.site.rounds
    living.write_rows(ward.site.table, ward.others.plan, persons=living.PERSONS + 31)
    with ward.site.registry() as registry:
        registry.add(living.DATA, ward.site.table, "patient")

    assert left == living.PERSONS - 2
    assert not record.present
    assert told is not None
    assert told.rule == "data"
    assert not reserved
    assert ward.works_on()


@dataclasses.dataclass
class Clock:
    """Shows what it is set to."""

    shown: float

    def __call__(self) -> float:
        return self.shown


@pytest.fixture(scope="module")
def clocked(base_directory: Path) -> Iterator[tuple[Ward, Worker, Clock]]:
    """A site whose agent's clock is set by the tests."""
    clock = Clock(time.time())
    with a_ward(base_directory, steps=2) as ward, ward.site.served(clock=clock) as worker:
        yield ward, worker, clock


@pytest.mark.slow
def test_a_clock_that_goes_back_while_the_agent_runs_takes_the_ledger_nowhere(
    clocked: tuple[Ward, Worker, Clock],
) -> None:
    ward, _, clock = clocked
    clock.shown = ward.site.book.at + DAY_S

    assert ward.works_on()
    before = ward.site.book.at
    clock.shown -= DAY_S / 2
    assert ward.works_on()
    same = ward.site.book.at
    clock.shown += 2.5 * DAY_S
    assert ward.works_on()

    assert same == before
    assert ward.site.book.at == before + 2 * DAY_S


@pytest.mark.slow
def test_where_the_ledgers_time_is_far_ahead_of_the_clock_no_approval_is_relied_on(
    clocked: tuple[Ward, Worker, Clock],
) -> None:
    ward, worker, clock = clocked
    began = clock.shown = ward.site.book.at + DAY_S

    clock.shown += 20 * DAY_S  # for a moment, by a mistake of whoever sets clocks
    assert ward.works_on()
    clock.shown = began
    record = ward.run()
    told, reserved = ward.told("offer"), ward.round in ward.site.rounds
    with pytest.raises(Refused) as caught:
        worker._approved()
    clock.shown = began + 19.5 * DAY_S
    assert ward.works_on()

    assert not record.present
    assert told is not None
    assert told.rule == "approval"
    assert not reserved
    for moment in (began, began + 20 * DAY_S):
        assert utc_text(int(moment)) in str(caught.value)
    assert "the clock was wrong once, or is now" in str(caught.value)


ENDS: dict[str, Callable[[Ward, "subprocess.Popen[bytes]"], RoundRecord | None]] = {
    "idle": lambda ward, process: process.kill(),
    "training": lambda ward, process: ward.in_training(process.kill),
    "stopped": lambda ward, process: ward.in_training(ward.site.stop),
    "peers": lambda ward, process: ward.before("peers", lambda: killed(process)),
    "survivors": lambda ward, process: ward.before("survivors", lambda: killed(process)),
    "signatures": lambda ward, process: ward.before("signatures", lambda: killed(process)),
}


def settled_after(ward: Ward, *ends: str) -> Iterator[Round | None]:
    """End an agent after another, and yield what the next one made of the round that was under way, if it had begun."""
    for last, end in itertools.pairwise(["", *ends, ""]):
        with ward.site.process() as process:
            if last:
                yield ward.site.rounds.get(ward.round)
            assert ward.works_on(), last
            if end:
                started = children(process.pid)
                record = ENDS[end](ward, process)
                code = process.wait(30)
                until(functools.partial(gone, started), 10)
                assert started, end
                assert record is None or not record.present, end
                assert code == (0 if end == "stopped" else -signal.SIGKILL), end


@pytest.mark.slow
@linux
def test_an_agent_that_ends_in_training_or_idle_leaves_no_child_behind_and_a_new_one_works_on(
    base_directory: Path,
) -> None:
    with a_ward(base_directory) as ward:
        _, forfeited, stopped = settled_after(ward, "idle", "training", "stopped")

    assert forfeited is not None
    assert forfeited.state == FORFEITED
    assert true_steps(forfeited) == STEPS
    assert stopped is not None
    assert stopped.state == REFUNDED
    assert true_steps(stopped) < STEPS


@pytest.mark.slow
@linux
def test_an_agent_that_is_killed_between_exchanges_leaves_no_child_behind_and_a_new_one_works_on(
    base_directory: Path,
) -> None:
    with a_ward(base_directory) as ward:
        before_training, *after_training = settled_after(ward, "peers", "survivors", "signatures")

    assert before_training is None
    assert [known and known.state for known in after_training] == [BOUND, BOUND]


def killed(process: "subprocess.Popen[bytes]") -> int:
    process.kill()
    return process.wait()


def children(process: int) -> list[int]:
    """The processes that a process started and that are there."""
    found: list[int] = []
    for task in Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread has just ended
            found += map(int, (task / "children").read_text().split())
    return found


def gone(processes: list[int]) -> bool:
    return all(state(process) == b"Z" for process in processes)


def state(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except OSError:
        return b"Z"


@pytest.mark.slow
@linux
def test_a_disk_that_reports_errors_is_refused_and_after_a_new_start_the_site_works_on(base_directory: Path) -> None:
    with a_ward(base_directory) as ward:
        with ward.site.process() as process:
            assert ward.works_on()
            log = ward.site.home.ledger.with_name("ledger.db-wal").stat().st_size
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (log, resource.RLIM_INFINITY))
            record = ward.run()
            refused = ward.told("start")
            book = ward.site.book
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            alive = process.poll() is None and ward.site.answers()
        with ward.site.served():
            assert ward.works_on()

    assert not record.present
    assert refused is not None
    assert refused.error == "LedgerError"
    assert ward.round - 1 not in book.rounds(RUN)
    assert alive


@pytest.mark.slow
def test_a_ledger_that_takes_no_writes_lets_nothing_be_trained(base_directory: Path) -> None:
    with a_ward(base_directory) as ward:
        with ward.site.served() as worker:
            assert ward.works_on()
            worker._journal._connection.execute("PRAGMA query_only = ON")  # SQLite then says SQLITE_READONLY
            record = ward.run()
            told = ward.told("start")
            trained = worker._trainer.evidence.keys()
            begun = ward.round in ward.site.rounds
        with ward.site.served():
            assert ward.works_on()

    assert not record.present
    assert told is not None
    assert told.error == "LedgerError"
    assert not begun
    assert ward.round - 1 not in trained


@pytest.mark.slow
def test_another_process_that_holds_the_ledger_is_waited_for(swift: tuple[Ward, Worker]) -> None:
    ward, _ = swift
    assert ward.works_on()
    before = Counter(map(type, entries(ward.site)))
    held = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(ward.site.home.ledger)], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    )
    assert held.stdout is not None
    assert held.stdout.readline() == b"held\n"

    try:
        assert ward.works_on()
    finally:
        held.communicate()

    more = Counter(map(type, entries(ward.site))) - before
    assert more[Reserve] == 1
    assert more[Started] == 0


HOLD = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
time.sleep(2)
connection.execute("ROLLBACK")
"""


def entries(site: Living) -> Iterator[object]:
    """What the ledger holds."""
    from confide.common.entries import decode

    with contextlib.closing(sqlite3.connect(site.home.ledger)) as connection:
        for (line,) in connection.execute("SELECT line FROM record ORDER BY seq"):
            yield decode(line).entry
