"""Judging a federation's adapter against the site's own, on rows of nobody whom the site has registered."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

from confide.client.home import Home, write_private
from confide.client.journal import Journal
from confide.client.judgement import enforced, starter_for
from confide.client.judging import FEDERATED, OWN, UNTRAINED, Judged, judge
from confide.client.keys import load_keys, make_keys
from confide.client.opening import Opened
from confide.client.registry import Registry
from confide.client.synthetic import write_synthetic
from confide.common.accounting import planned_spend
from confide.common.errors import AdapterError, DataError, Refused, UsageError
from confide.common.model import attach
from confide.common.plan import read_plan
from tests.conftest import plan_text

DATA = "letters"


def _plan(base: Path, method: str = "ffa") -> str:
    text = (
        plan_text(base).replace("# person_id =", 'person_id = "who"').replace('method = "ffa"', f'method = "{method}"')
    )
    return text.replace("rounds = 3", "rounds = 1")


class Setting:
    """A site with registered rows, an adapter that a federation might have made, and rows that are held out."""

    def __init__(self, root: Path, base: Path, text: str) -> None:
        self.root, self.base = root, base
        self.plan = plan = read_plan(text.encode())
        self.column = plan.data.person_id or ""
        self.home = Home.create(root / "site", "north")
        keys = make_keys(self.home, b"", insecure_no_passphrase=True)
        write_private(self.home.policy, starter_for(plan, "north").encode())
        self.table, self.held_out = root / "rows.csv", root / "held-out.csv"
        for path, persons, seed in ((self.table, 30, 1), (self.held_out, 20, 2)):
            write_synthetic(plan, path, persons, seed=seed)
        self.journal = Journal.create(self.home.ledger, site="north", identity=keys.identity)
        enforced(self.home, self.journal)
        self.registry = Registry(self.home.data, self.journal, keys.secret(b"data"))
        self.registry.add(DATA, self.table, self.column or None, typical=planned_spend(plan.privacy))
        self.adapter = root / "adapter"
        model = attach(base, plan)
        model.export(model.start + np.float32(0.25), self.adapter)
        (self.adapter / "plan.toml").write_text(text, encoding="utf-8")

    @property
    def opened(self) -> Opened:
        keys = load_keys(self.home, b"", insecure_no_passphrase=True)
        return Opened(home=self.home, keys=keys, journal=self.journal, registry=self.registry)

    def judge(self, *, held_out: Path | None = None, own: Path | None = None, run: str = "") -> Judged:
        return judge(
            self.opened, self.adapter, held_out=held_out or self.held_out, model=self.base, data=DATA, own=own, run=run
        )


@pytest.fixture
def setting(tmp_path: Path, base_directory: Path) -> Setting:
    return Setting(tmp_path, base_directory, _plan(base_directory))


def _persons(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def _mixed(setting: Setting, extra: int) -> Path:
    """The held-out table, and the first rows of the registered one."""
    rows, path = [*_persons(setting.held_out), *_persons(setting.table)[:extra]], setting.root / "mixed.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_an_adapter_of_the_site_s_own_is_trained_once_stays_in_the_site_and_costs_nothing(setting: Setting) -> None:
    before, rows = setting.journal.book.size, len(_persons(setting.held_out))

    first = setting.judge()
    again = setting.judge()

    assert setting.journal.book.size == before
    assert (first.rows, first.registered, dict(first.skipped)) == (rows, 0, {})
    assert set(first.scores) == {UNTRAINED, OWN, FEDERATED}
    assert all(first.score in scores for scores in first.scores.values())
    assert setting.home.personal in first.own.parents
    assert (first.trained, again.trained) == (True, False)
    assert again.scores == first.scores
    assert not (setting.home.personal.stat().st_mode & 0o077)


def test_nobody_whose_rows_may_have_been_learned_from_is_among_those_that_are_judged_on(setting: Setting) -> None:
    extra = 4
    alone = setting.judge(own=setting.adapter)

    mixed = setting.judge(held_out=_mixed(setting, extra), own=setting.adapter)

    assert mixed.registered == extra
    assert mixed.scores == alone.scores
    with pytest.raises(DataError, match="All rows of"):
        setting.judge(held_out=setting.table, own=setting.adapter)


def test_who_left_the_table_since_is_still_known(setting: Setting) -> None:
    gone, *rest = _persons(setting.table)
    with setting.table.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, gone)
        writer.writeheader()
        writer.writerows(row for row in rest if row[setting.column] != gone[setting.column])
    mixed = setting.root / "mixed.csv"
    with mixed.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, gone)
        writer.writeheader()
        writer.writerows([gone, *_persons(setting.held_out)])
    setting.registry.add(DATA, setting.table, setting.column)

    found = setting.judge(held_out=mixed, own=setting.adapter)

    assert found.registered == 1


def test_the_federated_adapter_is_scored_as_it_is(setting: Setting) -> None:
    same = setting.judge(own=setting.adapter)

    assert same.scores[OWN] == same.scores[FEDERATED]
    assert not same.trained


def test_a_data_set_that_is_not_registered_or_of_another_unit_is_refused(
    setting: Setting, base_directory: Path
) -> None:
    with pytest.raises(Refused, match="is not registered"):
        judge(setting.opened, setting.adapter, held_out=setting.held_out, model=base_directory, data="none")
    by_rows = plan_text(base_directory)
    (setting.adapter / "plan.toml").write_text(by_rows, encoding="utf-8")
    with pytest.raises(Refused, match="tells persons apart row by row"):
        setting.judge(own=setting.adapter)


def test_weights_that_are_not_the_manifest_s_are_refused(setting: Setting) -> None:
    (setting.adapter / "manifest.json").write_text('{"adapter": "sha256:00", "plan": {"digest": "sha256:00"}}')

    with pytest.raises(AdapterError, match="its manifest speaks of"):
        setting.judge(own=setting.adapter)


def test_an_own_adapter_for_another_task_is_refused(setting: Setting) -> None:
    own = setting.root / "own"
    shutil.copytree(setting.adapter, own)
    text = (own / "plan.toml").read_text(encoding="utf-8")
    (own / "plan.toml").write_text(text.replace('"positive"', '"splendid"'), encoding="utf-8")

    with pytest.raises(AdapterError, match="another task"):
        setting.judge(own=own)


def test_a_table_that_changed_is_not_trained_on(setting: Setting) -> None:
    with setting.table.open("a", encoding="utf-8") as stream:
        stream.write("the service was,neutral,made-up-1-1\n")

    with pytest.raises(Refused, match="is not the one that was registered"):
        setting.judge()

    assert not list(setting.home.personal.iterdir())


def test_who_withdrew_is_not_learned_from(setting: Setting) -> None:
    setting.registry.withdraw(DATA, {row[setting.column] for row in _persons(setting.table)})

    with pytest.raises(DataError, match="all persons have withdrawn"):
        setting.judge()

    assert not list((setting.home.personal / "own").iterdir())


def test_rows_without_a_column_of_persons_must_be_others_altogether(tmp_path: Path, base_directory: Path) -> None:
    setting = Setting(tmp_path, base_directory, plan_text(base_directory).replace("rounds = 3", "rounds = 1"))

    assert setting.judge(own=setting.adapter).registered == 0
    with pytest.raises(DataError, match="2 rows of"):
        setting.judge(held_out=_mixed(setting, 2), own=setting.adapter)


def test_what_a_site_keeps_of_a_shared_adapter_is_named_by_its_run(tmp_path: Path, base_directory: Path) -> None:
    setting = Setting(tmp_path, base_directory, _plan(base_directory, "share-a"))

    with pytest.raises(UsageError, match="--run"):
        setting.judge(own=setting.adapter)
