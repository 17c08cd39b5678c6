"""What a site refuses before any row is read, whatever was signed and approved: and that it costs nothing.

Each test has a whole site on disk and begins its real worker. What the process opens meanwhile, and which processes it
starts, is heard by Python's audit hooks, so that a table that was looked at for a moment would be found.
"""

import dataclasses
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from confide.client import enrolment, verdict
from confide.client import worker as workers
from confide.client.approval import Terms
from confide.client.home import write_private
from confide.client.mechanism import Mechanism
from confide.client.postbox import private_folder
from confide.common.crypto import Identity
from confide.common.entries import Reserve
from confide.common.errors import ConfideError, MessageError, Refused
from confide.common.messages import Failure
from confide.common.plan import read_plan
from confide.common.roster import Roster
from confide.common.signed_plan import read_signed_plan, sign_plan
from tests import living
from tests.conftest import plan_text
from tests.living import ADMIN, APPROVER, COORDINATOR, DATA, FEDERATION, NAME, PEERS, RUN, STRANGER, Living

DAY_S = 86_400


class Ear:
    """Hears what this process opens and starts, while it listens."""

    def __init__(self) -> None:
        self.listening = False
        self.opened: list[str] = []
        self.started = 0
        sys.addaudithook(self._heard)  # for the life of this process: there is no way to take one away

    @contextmanager
    def listens(self) -> Iterator[None]:
        self.opened, self.started, self.listening = [], 0, True
        try:
            yield
        finally:
            self.listening = False

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.listening and event == "open":
            self.opened.append(str(arguments[0]))
        if self.listening and event in {"subprocess.Popen", "os.fork", "os.posix_spawn"}:
            self.started += 1


@pytest.fixture(scope="module")
def ear() -> Ear:
    return Ear()


@pytest.fixture(autouse=True)
def judged_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plans be judged in this process, where it is heard what is opened."""
    monkeypatch.setattr(workers, "verdict", verdict.judged)


@pytest.fixture(scope="module")
def pattern(base_directory: Path) -> Iterator[Living]:
    """A site whose plan is approved and may run."""
    with private_folder() as folder:
        yield living.made(folder, base_directory, living.plan_text(plan_text(base_directory)))


@pytest.fixture
def site(pattern: Living) -> Iterator[Living]:
    """A copy of it, to be changed."""
    with private_folder() as folder:
        yield pattern.copied(folder)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal:
    """How a worker did not become ready."""

    error: ConfideError
    opened: tuple[str, ...]
    started: int

    @property
    def rule(self) -> str:
        """The rule that may be told outside."""
        assert isinstance(self.error, Refused)
        return self.error.rule


Begun = Callable[..., Refusal]


@pytest.fixture
def begun(site: Living, ear: Ear) -> Begun:
    """Return what begins the site's worker and returns how it was refused; that nothing was spent is seen to here."""

    def begin(**options: Any) -> Refusal:
        with site.worker(**options) as worker, ear.listens(), pytest.raises(ConfideError) as caught:
            worker.ready().__enter__()
        book = site.book
        assert not book.rounds(RUN)
        assert [account.filter.spent for account in book.accounts.values()] == [0.0]
        assert not ear.started
        return Refusal(error=caught.value, opened=tuple(ear.opened), started=ear.started)

    return begin


def no_row_was_read(refusal: Refusal) -> bool:
    return not any(path.endswith(".csv") for path in refusal.opened)


def another_run(site: Living) -> None:
    """Let the coordinator sign the same plan for a run that nobody was asked about."""
    raw = sign_plan(site.signed.toml, federation=FEDERATION, run="autumn", coordinator=COORDINATOR)
    (site.root / "plan").write_bytes(raw)


def outside(refusal: Refusal) -> str:
    """What of a refusal could leave the site."""
    return Failure.of(refusal.error).sentence


# A setting of the policy that is narrower than the plan, the rule, and what the person at the machine is told.
NARROWER = (
    ("plan_epsilon", 7.5, "plan-privacy", ("[privacy] epsilon = 8", "[budget] plan_epsilon", "7.5")),
    ("plan_delta", 1e-4, "plan-privacy", ("[privacy] delta = 0.001", "[budget] plan_delta", "0.0001")),
    ("largest_sampling_rate", 0.25, "plan-privacy", ("sampling_rate = 0.5", "largest_sampling_rate", "0.25")),
    ("largest_clip_norm", 0.5, "plan-privacy", ("clip_norm = 1", "largest_clip_norm", "0.5")),
    ("fewest_persons", 31, "plan-privacy", ("min_persons = 30", "fewest_persons", "31")),
    ("most_rounds", 39, "rounds", ("rounds = 40", "most_rounds", "39")),
    ("most_steps_per_round", 1, "rounds", ("steps_per_round = 2", "most_steps_per_round", "1")),
    ("smallest_noise_multiplier", 99.0, "noise", ("noise multiplier is", "smallest_noise_multiplier", "99")),
    ("epsilon", 8.0, "budget", ("asks for epsilon = 8 and costs", "[budget] epsilon is 8")),
    ("base_digests", "[]", "base-model", ("base_digest", "[model] base_digests allows nothing")),
    ("targets", '["query"]', "targets", ('"value"', "[model] targets allows query")),
    ("methods", '["fedit"]', "targets", ('"ffa"', "[model] methods allows fedit")),
    ("largest_rank", 1, "targets", ("rank = 2", "largest_rank", "1")),
    ("tasks", '["regression"]', "task", ("text-classification", "[model] tasks allows regression")),
    ("fewest_summed", 4, "cohort", ("min_sites = 3", "fewest_summed", "4")),
    ("fewest_cohort", 4, "cohort", ("roster has 3 sites", "fewest_cohort")),
    ("federations", '["heart-2031"]', "federation", (FEDERATION, "allows heart-2031")),
    ("devices", '["cuda"]', "compute", ("device", "[compute] devices allows cuda")),
    ("memory_mb", 16, "compute", ("memory", "[compute] memory_mb", "16")),
    ("largest_learning_rate", 1e-4, "plan-privacy", ("learning_rate", "largest_learning_rate", "0.0001")),
)


@pytest.mark.parametrize(("setting", "value", "rule", "told"), NARROWER, ids=[each[0] for each in NARROWER])
def test_an_approved_plan_that_asks_for_more_than_the_policy_allows_is_refused_before_any_row_is_read(
    site: Living, begun: Begun, setting: str, value: object, rule: str, told: tuple[str, ...]
) -> None:
    site.change_policy(**{setting: value})

    refusal = begun()

    assert refusal.rule == rule
    assert all(words in str(refusal.error) for words in told), str(refusal.error)
    assert outside(refusal) == f"The site refused. It follows its rule on: {rule}."
    assert no_row_was_read(refusal)


# A setting of a plan that is signed by the coordinator and approved, under a policy that is for a smaller one.
LARGER = (
    ("rounds", 41, "rounds"),
    ("steps_per_round", 3, "rounds"),
    ("clip_norm", 2.0, "plan-privacy"),
    ("sampling_rate", 0.6, "plan-privacy"),
    ("targets", '["query", "key"]', "targets"),
    ("rank", 3, "targets"),
    ("min_persons", 20, "plan-privacy"),
)


@pytest.mark.parametrize(("setting", "value", "rule"), LARGER, ids=[each[0] for each in LARGER])
def test_a_larger_plan_is_refused_though_somebody_approved_it(
    site: Living, begun: Begun, base_directory: Path, setting: str, value: object, rule: str
) -> None:
    site.plan_of(living.plan_text(plan_text(base_directory), **{setting: value}))
    site.approve()

    refusal = begun()

    assert refusal.rule == rule
    assert no_row_was_read(refusal)


def test_an_approval_that_pretends_other_noise_than_follows_from_the_plan_counts_for_nothing(
    begun: Begun, site: Living, base_directory: Path
) -> None:
    site.plan_of(living.plan_text(plan_text(base_directory), learning_rate=1e-3))
    signed, privacy = site.signed, site.signed.plan.privacy
    terms = Terms(
        ledger=site.book.ledger,
        recovery="",
        plan=signed.plan,
        run=RUN,
        federation=FEDERATION,
        data=DATA,
        declared_persons=living.PERSONS,
    )
    true = terms.unsigned(by="Anna Huber", key=APPROVER.public, expires=int(time.time()) + DAY_S, nonce="9d" * 16)
    less = dataclasses.replace(true, noise_multiplier=Mechanism.of(privacy, living.PERSONS).noise_multiplier / 2)
    site.record(less.signed(APPROVER))

    refusal = begun()

    assert refusal.rule == "approval"
    assert no_row_was_read(refusal)


def test_another_model_under_the_same_name_is_refused_before_any_row_is_read(
    site: Living, begun: Begun, base_directory: Path, tmp_path: Path
) -> None:
    other = tmp_path / base_directory.name
    shutil.copytree(base_directory, other)
    weights = next(other.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)

    refusal = begun(model=other)

    assert refusal.rule == "base-model"
    assert "Another model under the same name" in str(refusal.error)
    assert site.signed.plan.model.base_digest in str(refusal.error)
    assert no_row_was_read(refusal)


def test_a_roster_of_fewer_sites_than_may_be_summed_is_refused_before_any_row_is_read(
    site: Living, begun: Begun
) -> None:
    smaller = Roster(
        federation=FEDERATION,
        epoch=2,
        coordinator=COORDINATOR.public,
        sites={NAME: site.roster.sites[NAME], "peer-111": PEERS["peer-111"].public},
    )
    enrolment.update(site.home, FEDERATION, smaller.signed([ADMIN]))

    refusal = begun()

    assert refusal.rule == "cohort"
    assert "roster has 2 sites; at least 3 are needed" in str(refusal.error)
    assert no_row_was_read(refusal)


def test_a_plan_that_nobody_approved_is_refused_before_any_row_is_read(site: Living, begun: Begun) -> None:
    another_run(site)

    refusal = begun()

    assert refusal.rule == "approval"
    assert "is not approved for the data set 'letters'" in str(refusal.error)
    assert no_row_was_read(refusal)


def test_a_plan_that_changed_in_any_setting_is_not_the_approved_one(
    site: Living, begun: Begun, base_directory: Path
) -> None:
    before = site.signed.digest
    site.plan_of(living.plan_text(plan_text(base_directory), learning_rate=1e-3))

    refusal = begun()

    assert site.signed.digest != before
    assert refusal.rule == "approval"
    assert no_row_was_read(refusal)


def test_an_approval_that_has_ended_is_refused_before_any_row_is_read(site: Living, begun: Begun) -> None:
    later = time.time() + 31 * DAY_S

    refusal = begun(clock=lambda: later)

    assert refusal.rule == "approval"
    assert no_row_was_read(refusal)


def test_an_approval_that_has_ended_does_not_come_back_with_a_clock_that_is_put_back(
    site: Living, begun: Begun
) -> None:
    later = time.time() + 31 * DAY_S
    site.change_policy(most_rounds=41)
    begun(clock=lambda: later)  # the policy is recorded, and the time with it

    refusal = begun()

    assert site.book.at >= int(later)
    assert refusal.rule == "approval"
    assert no_row_was_read(refusal)


def test_a_revoked_approval_is_refused_before_any_row_is_read(site: Living, begun: Begun) -> None:
    site.revoke()

    refusal = begun()

    assert refusal.rule == "approval"
    assert no_row_was_read(refusal)


def test_an_approval_by_somebody_whom_the_policy_no_longer_names_is_refused_before_any_row_is_read(
    site: Living, begun: Begun
) -> None:
    site.change_policy(approvers=f'["Ben Ito {STRANGER.public.hex()}"]')

    refusal = begun()

    assert refusal.rule == "approval"
    assert no_row_was_read(refusal)


def test_where_two_persons_must_approve_one_is_not_enough(site: Living, begun: Begun) -> None:
    second = Identity(bytes([105]) * 32)
    site.change_policy(
        signatures=2, approvers=f'["Anna Huber {APPROVER.public.hex()}", "Ben Ito {second.public.hex()}"]'
    )

    refusal = begun()

    assert refusal.rule == "approval"
    assert "has too few approvals for the data set 'letters'. Approved by Anna Huber until 20" in str(refusal.error)
    assert "; 1 more must approve: Ben Ito. By the policy two persons must approve" in str(refusal.error)
    assert no_row_was_read(refusal)


@pytest.mark.parametrize("signer", [STRANGER, ADMIN, APPROVER, PEERS["peer-111"]])
def test_a_plan_that_another_than_the_coordinator_signed_is_not_even_parsed(
    site: Living, signer: Identity, base_directory: Path
) -> None:
    text = living.plan_text(plan_text(base_directory)).encode()
    raw = sign_plan(text, federation=FEDERATION, run=RUN, coordinator=signer)

    with pytest.raises(MessageError):
        read_signed_plan(raw, site.roster.coordinator)
    assert read_signed_plan(raw, signer.public).plan == read_plan(text)


def test_a_plan_without_a_column_of_persons_is_refused_where_whole_persons_are_protected(
    site: Living, begun: Begun, base_directory: Path
) -> None:
    text = living.plan_text(plan_text(base_directory)).replace('person_id = "patient"', "")
    site.plan_of(text)
    site.approve()

    refusal = begun()

    assert refusal.rule == "plan-privacy"
    assert "whole_persons" in str(refusal.error)
    assert "registered by the column 'patient'" in str(refusal.error)
    assert no_row_was_read(refusal)


def test_a_budget_that_other_runs_have_used_up_is_refused_before_any_row_is_read(site: Living, ear: Ear) -> None:
    mechanism = Mechanism.of(site.signed.plan.privacy, living.PERSONS)
    site.record(
        Reserve(
            run=RUN,
            plan=site.signed.digest,
            data=DATA,
            version=1,
            round=1,
            sampling_rate=mechanism.sampling_rate,
            noise_multiplier=mechanism.noise_multiplier,
            steps=mechanism.steps,
            clip_norm=mechanism.clip_norm,
            divisor=mechanism.divisor,
            noise="cryptographic",
            start="sha256:" + "0" * 64,
            roster=site.roster.digest,
        )
    )
    before = site.book.accounts["1"].used
    # Another run of the same plan has all its rounds to come, and there is just room for one run.
    another_run(site)
    site.approve()

    with site.worker() as worker, ear.listens(), pytest.raises(Refused) as caught:
        worker.ready().__enter__()

    assert caught.value.rule == "budget"
    assert "account 1" in str(caught.value)
    assert not any(path.endswith(".csv") for path in ear.opened)
    assert site.book.accounts["1"].used == before > 0


def test_a_table_that_changed_on_disk_is_found_before_anything_is_trained_on_it(
    site: Living, begun: Begun, tmp_path: Path, pattern: Living
) -> None:
    content = pattern.table.read_bytes()
    try:
        pattern.table.write_bytes(content.replace(b"good", b"bad", 1))
        refusal = begun()
    finally:
        pattern.table.write_bytes(content)

    assert refusal.rule == "data"
    assert "is not the one that was registered as version 1" in str(refusal.error)
    assert "good" not in str(refusal.error)


def test_withdrawals_that_leave_fewer_persons_than_the_plan_asks_for_are_found_before_a_child_is_started(
    site: Living, begun: Begun
) -> None:
    gone = living.PERSONS // 2 + 1
    with site.registry() as registry:
        registry.withdraw(DATA, [f"p{number}" for number in range(gone)])

    refusal = begun()

    assert refusal.rule == "data"
    assert "29 persons" in str(refusal.error)
    assert "asks for 30" in str(refusal.error)
    assert outside(refusal) == "The site refused. It follows its rule on: data."


def test_a_data_set_that_was_removed_is_refused_before_any_row_is_read(site: Living, begun: Begun) -> None:
    with site.registry() as registry:
        registry.remove(DATA)

    refusal = begun()

    assert refusal.rule == "data"
    assert no_row_was_read(refusal)


@pytest.mark.parametrize("content", [None, b"", b"format = 1\n", b"\xff\xfe"])
def test_without_a_valid_policy_nothing_is_allowed(site: Living, begun: Begun, content: bytes | None) -> None:
    policy = site.home.policy
    policy.unlink()
    if content is not None:
        write_private(policy, content)

    refusal = begun()

    assert "olicy" in str(refusal.error)
    assert outside(refusal) == "The site could not go on."
    assert no_row_was_read(refusal)


def test_the_same_site_without_any_of_this_would_read_its_rows(site: Living, ear: Ear) -> None:
    with site.worker() as worker, ear.listens():
        worker._rows()

    assert any(path.endswith("rows.csv") for path in ear.opened)
