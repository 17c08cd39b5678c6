"""An agent beside files of its site that are of different days, or that change while it runs."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from confide.client import enrolment
from confide.client.home import replace_private
from confide.client.judgement import policy_of
from confide.client.postbox import private_folder
from confide.common.crypto import Identity
from confide.common.entries import Started
from confide.common.errors import LedgerError, Refused
from confide.common.messages import Failure, Survivors, open_envelope, seal
from confide.common.roster import Roster
from confide.common.witness import Witness
from tests import living
from tests.conftest import plan_text
from tests.living import ADMIN, DATA, FEDERATION, NAME, Living, failure


@pytest.fixture
def site(base_directory: Path) -> Iterator[Living]:
    with private_folder() as folder:
        yield living.made(folder, base_directory, living.plan_text(plan_text(base_directory)))


def test_a_ledger_older_than_what_the_site_noted_of_it_in_another_federation_serves_nothing(site: Living) -> None:
    content = site.home.ledger.read_bytes()
    site.record(Started(process="ab" * 16, software="confide 0"))
    with site.journal() as journal:
        newest, key = journal.checkpoint().short(), journal.book.key
    Witness(site.home.witness).see("Lung 2031", NAME, key, newest)
    replace_private(site.home.ledger, content)

    with site.worker() as worker, pytest.raises(LedgerError, match=r"as anna in Lung 2031.*An old copy"):
        worker.ready().__enter__()


def test_a_roster_older_than_the_ledgers_serves_nothing_and_a_newer_one_is_recorded(site: Living) -> None:
    path = site.home.federations / f"{FEDERATION}.json"
    first, old = site.roster, path.read_bytes()
    sites = {**first.sites, "peer-new": Identity(bytes([120]) * 32).public}
    newer = Roster(federation=FEDERATION, epoch=2, coordinator=first.coordinator, sites=sites)
    enrolment.update(site.home, FEDERATION, newer.signed([ADMIN]))
    assert site.book.federations[FEDERATION].epoch == 1  # whoever was to record it was killed

    with site.worker() as worker, worker.ready():
        pass
    replace_private(path, old)

    assert site.book.federations[FEDERATION].roster == newer.digest
    with site.worker() as worker, pytest.raises(Refused, match="does not follow on that of epoch 2") as refused:
        worker.ready().__enter__()
    assert refused.value.rule == "federation"


def test_a_limit_that_a_running_agent_cannot_change_stops_it_until_it_is_started_again(site: Living) -> None:
    asked, told = seal(Survivors(context="x", sites=b"")), []
    original = site.home.policy.read_bytes()

    with site.worker() as worker, worker.ready() as answer:
        told.append(open_envelope(answer(asked)))
        for setting in ({"hold_s": 7000}, {"round_s": 50}, {"memory_mb": 7000}):
            replace_private(site.home.policy, original)
            site.change_policy(**setting)
            told.append(open_envelope(answer(asked)))

    assert [each.rule for each in told if isinstance(each, Failure)] == ["", *["compute"] * 3]


def test_a_policy_that_others_may_write_or_that_lies_elsewhere_allows_nothing_from_the_next_message_on(
    site: Living,
) -> None:
    asked, told, path = seal(Survivors(context="x", sites=b"")), [], site.home.policy
    content, elsewhere = path.read_bytes(), site.root / "elsewhere.toml"
    elsewhere.write_bytes(content)

    with site.worker() as worker, worker.ready() as answer:
        told.append(open_envelope(answer(asked)))
        path.chmod(0o666)
        told.append(open_envelope(answer(asked)))
        path.unlink()
        path.symlink_to(elsewhere)
        told.append(open_envelope(answer(asked)))
        path.unlink()
        os.mkfifo(path, 0o600)
        told.append(open_envelope(answer(asked)))
        path.unlink()
        told.append(open_envelope(answer(asked)))

    assert [failure(each).error for each in told] == ["Refused", *["UsageError"] * 4]


def test_rows_of_more_persons_than_the_policys_delta_is_for_are_not_accepted(site: Living) -> None:
    site.change_policy(delta=0.005)
    data = site.book.data_set(DATA)
    rows: Any = SimpleNamespace(data=data, path=site.table)

    with site.worker() as worker:
        worker._policy = policy_of(site.home)
        worker._accept(cast(Any, SimpleNamespace(fingerprint=data.fingerprint, person_count=199)), rows)
        with pytest.raises(Refused, match=r"has 200 persons; the policy's \[budget\] delta = 0.005") as refused:
            worker._accept(cast(Any, SimpleNamespace(fingerprint=data.fingerprint, person_count=200)), rows)

    assert refused.value.rule == "budget"
