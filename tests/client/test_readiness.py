"""Whether a table suits a plan: exact for the steward, and for others constants, bits and noised numbers only."""

import csv
import dataclasses
import json
import math
import typing
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings, strategies

from confide.client import readiness
from confide.client.journal import Journal
from confide.client.noise import CryptographicNoise
from confide.client.policy import LABEL_HISTOGRAM, Metrics
from confide.client.readiness import (
    DECLARED_CHECKS,
    ROW_CHECKS,
    Check,
    Spread,
    examine,
    label_histogram,
    readiness_report,
)
from confide.client.registry import Registry
from confide.client.rows import EMPTY, MISSING, NO_ROOM, UNKNOWN_LABEL, UNREADABLE
from confide.client.synthetic import write_synthetic
from confide.common.accounting import cost
from confide.common.canonical import canonical_bytes
from confide.common.crypto import Identity
from confide.common.entries import DataSet, PolicyInForce, Release
from confide.common.errors import DataError, LedgerError, Refused, UsageError
from confide.common.plan import (
    IMAGE_CLASSES,
    INSTRUCTION,
    REGRESSION,
    TEXT_CLASSES,
    TOKEN_CLASSES,
    Plan,
    read_plan,
    starter,
)

Row = tuple[str, str, str]
LABELS = ("no", "perhaps", "yes")


def plan_for(kind: str = TEXT_CLASSES, *, min_persons: int = 2, max_tokens: int = 16, **data: Any) -> Plan:
    plan = read_plan(starter("test", "tiny", "sha256:" + "0" * 64, ["query"], kind).encode())
    usual: dict[str, Any] = {"person_id": "patient", "on_missing": "skip"}
    return dataclasses.replace(
        plan,
        model=dataclasses.replace(plan.model, max_tokens=max_tokens),
        task=dataclasses.replace(plan.task, labels=() if kind in {REGRESSION, INSTRUCTION} else LABELS),
        data=dataclasses.replace(plan.data, **(usual | data)),
        privacy=dataclasses.replace(plan.privacy, min_persons=min_persons),
    )


def table(path: Path, rows: Sequence[Row], columns: Sequence[str] = ("patient", "text", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return path


ROWS: list[Row] = [
    ("p1", "good", "yes"),
    ("p1", "good day", "yes"),
    ("p1", "good night", "no"),
    ("p2", "a much longer text than any of the others in this table", "no"),
    ("p3", "bad", "maybe"),
    ("p4", " ", "no"),
    ("", "nobody's", "yes"),
]


def new_journal() -> Journal:
    journal = Journal.create(None, site="St. Anna", identity=Identity(bytes(32)), clock=lambda: 1_800_000_000.0)
    policy = PolicyInForce(
        digest="sha256:" + "0" * 64,
        epsilon=8.0,
        delta=1e-5,
        plan_epsilon=8.0,
        plan_delta=1e-5,
        approvals_needed=1,
        approvers=(),
        most_days=10**5,
        renewal_days=0,
        most_renewals=0,
        release_noise=0.1,
        words=(),
    )
    journal.append(policy)
    return journal


KEY = Registry(Path(), new_journal(), bytes(32)).person_key


def allowing(least: float | None) -> Metrics:
    return Metrics(leave=() if least is None else (LABEL_HISTOGRAM,), smallest_noise_multiplier=least or 1.0)


def registered(journal: Journal, path: Path, folder: Path) -> DataSet:
    return Registry(folder / "data", journal, bytes(32)).add("letters", path, "patient")


class Seeded:
    """Words of a seeded generator, so that a statistical test gives the same every time."""

    name = "seeded"

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        return self._random.integers(0, 2**64, count, dtype=np.uint64)

    def rounding_key(self) -> bytes:
        raise NotImplementedError


class Silent:
    """Noise of (nearly) nothing: the largest uniform, whose radius is the smallest."""

    name = "silent"

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        return np.full(count, 2**64 - 1, np.uint64)

    def rounding_key(self) -> bytes:
        raise NotImplementedError


def test_the_steward_sees_what_the_plan_would_read_and_what_stands_in_its_way(tmp_path: Path) -> None:
    check = examine(table(tmp_path / "a.csv", ROWS), plan_for(max_rows_per_person=2), declared_persons=4, repeated=0)

    assert (check.rows, check.usable, check.persons, check.withdrawn) == (7, 4, 2, 0)
    assert check.unusable == {UNKNOWN_LABEL: 1, EMPTY: 1, MISSING: 1}
    assert check.rows_per_person == Spread(1, 3, 3, 3)
    assert check.beyond_cap == (1, 1)
    assert check.labels == {"no": 2, "perhaps": 0, "yes": 2}
    assert check.characters == Spread(4, 10, 55, 55)
    assert (check.tokens, check.cut_off) == (None, None)
    refusals = [fault.partition(": ")[2].partition(" in ")[0] for fault in check.faults]
    assert refusals == [UNKNOWN_LABEL, EMPTY]  # missing values are skipped, as the plan says


def test_a_table_without_a_fault_has_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    plan = plan_for()
    write_synthetic(plan, path, 30)

    check = examine(path, plan, declared_persons=30)

    assert (check.faults, check.unusable) == ((), {})
    assert (check.persons, check.usable) == (30, 40)


def test_too_few_persons_and_a_delta_that_promises_nothing_are_faults(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", ROWS[:4])
    large_delta = dataclasses.replace(plan_for(), privacy=dataclasses.replace(plan_for().privacy, delta=0.6))

    (few,) = examine(path, plan_for(min_persons=3), declared_persons=3).faults
    (declared_few,) = examine(path, plan_for(min_persons=2), declared_persons=1).faults
    (delta,) = examine(path, large_delta, declared_persons=2).faults

    assert "has 2 persons with usable rows" in few
    assert "1 are declared" in declared_few
    assert "delta = 0.6 is not below one over 2 persons" in delta


def test_a_missing_column_of_the_plan_s_ends_the_check(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'texts'.*Did you mean 'text'\?"):
        examine(table(tmp_path / "a.csv", ROWS), plan_for(text="texts"), declared_persons=4)


def test_rows_that_are_left_out_play_no_part(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", ROWS)

    check = examine(path, plan_for(), declared_persons=4, left_out={1, 2, 3, 5, 6})

    assert (check.rows, check.withdrawn, check.usable, check.persons) == (7, 5, 1, 1)
    assert check.labels == {"no": 1, "perhaps": 0, "yes": 0}
    assert check.unusable == {MISSING: 1}


def test_with_a_model_tokens_are_counted_and_what_is_cut_off(base_directory: Path, tmp_path: Path) -> None:
    rows = [("p1", "good day", "yes"), ("p2", "bad " * 30, "no"), ("p3", "fine", "no"), ("p4", "late", "maybe")]

    check = examine(table(tmp_path / "a.csv", rows), plan_for(), declared_persons=4, model=base_directory)

    assert check.tokens == Spread(3, 4, 32, 32)
    assert check.cut_off == pytest.approx(1 / 3)
    assert check.unusable == {UNKNOWN_LABEL: 1}
    assert len(check.faults) == 1
    assert UNKNOWN_LABEL in check.faults[0]


def test_with_a_model_rows_are_found_that_only_it_cannot_read(base_directory: Path, tmp_path: Path) -> None:
    prompts = [("p1", "good", "fine"), ("p2", "bad " * 30, "late"), ("p3", "late", "good")]
    plan = plan_for(INSTRUCTION)

    check = examine(
        table(tmp_path / "a.csv", prompts, ("patient", "text", "answer")),
        plan,
        declared_persons=3,
        model=base_directory,
    )

    assert check.unusable == {NO_ROOM: 1}
    assert "Raise [model] max_tokens" in check.faults[0]


def test_images_are_tried_and_have_no_tokens(tmp_path: Path) -> None:
    plan = plan_for(IMAGE_CLASSES)
    (tmp_path / "config.json").write_text('{"image_size": 8}')
    write_synthetic(plan, tmp_path / "rows.csv", 6)
    (tmp_path / "rows-images" / "000002.png").write_bytes(b"not an image")

    check = examine(tmp_path / "rows.csv", plan, declared_persons=6, model=tmp_path)

    assert check.unusable == {UNREADABLE: 1}
    assert check.tokens is None
    assert sum(check.labels.values()) == 8


def test_labels_of_words_are_counted_word_by_word(tmp_path: Path) -> None:
    rows = [("p1", "good day", "yes no"), ("p2", "bad", "no"), ("p3", "bad day", "no")]

    check = examine(table(tmp_path / "a.csv", rows), plan_for(TOKEN_CLASSES), declared_persons=3)

    assert check.labels == {"no": 2, "perhaps": 0, "yes": 1}
    assert check.unusable == {"labels that are not as many as the words": 1}


def data_set(**changes: Any) -> DataSet:
    fields: dict[str, Any] = {
        "data": "letters",
        "version": 3,
        "event": "change",
        "fingerprint": "a" * 64,
        "declared_persons": 1300,
        "person_id": "patient",
        "ids": "person",
        "accounts": ("1",),
        "registered": "b" * 64,
    }
    return DataSet(**(fields | changes))


def found(**changes: Any) -> Check:
    fields: dict[str, Any] = {
        "rows": 12_347,
        "withdrawn": 17,
        "repeated": 23,
        "usable": 12_319,
        "unusable": {MISSING: 11},
        "persons": 1357,
        "rows_per_person": Spread(1, 7, 19, 41),
        "beyond_cap": (0, 0),
        "labels": {"no": 4211, "perhaps": 3907, "yes": 4201},
        "characters": Spread(31, 211, 733, 1511),
        "tokens": Spread(13, 61, 239, 523),
        "cut_off": 0.0177,
        "faults": (),
    }
    return Check(**(fields | changes))


def test_of_the_rows_a_report_tells_nothing_but_the_checks_that_were_named() -> None:
    plan = plan_for(min_persons=1000)

    reports = [
        readiness_report(data_set(), plan, check=check)
        for check in (found(), found(persons=3, labels={"no": 0, "perhaps": 0, "yes": 0}, unusable={EMPTY: 4}), None)
    ]

    assert len(set(reports)) == 1
    report = json.loads(reports[0])
    assert canonical_bytes(report) == reports[0]
    assert report == {
        "format": "confide-readiness/1",
        "plan": plan.digest,
        "data": "letters",
        "version": 3,
        "declared_persons": 1300,
        "unit": "person",
        "checks": dict.fromkeys(DECLARED_CHECKS, "pass"),
        "not_told": list(ROW_CHECKS),
        "labels": None,
    }


def test_a_report_that_tells_everything_holds_bits_and_no_exact_number() -> None:
    report = readiness_report(data_set(), plan_for(min_persons=1000), check=found(), tell=ROW_CHECKS)

    assert json.loads(report)["checks"] == dict.fromkeys((*DECLARED_CHECKS, *ROW_CHECKS), "pass")
    exact = (12_347, 17, 23, 12_319, 1357, 41, 4211, 3907, 4201, 1511, 523)
    told = set(json.dumps(json.loads(report) | {"plan": ""}).replace(",", " ").replace("}", " ").split())
    assert not told & {str(number) for number in exact}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("readable", {"unusable": {UNKNOWN_LABEL: 1}}),
        ("readable", {"unusable": {"image outside the table's directory": 1}}),
        ("enough-persons", {"persons": 999}),
        ("every-label", {"labels": {"no": 1, "perhaps": 0, "yes": 4}}),
        ("within-cap", {"beyond_cap": (1, 1)}),
    ],
)
def test_each_check_on_rows_fails_for_its_own_reason_only(name: str, changes: dict[str, Any]) -> None:
    plan = plan_for(min_persons=1000)

    checks = json.loads(readiness_report(data_set(), plan, check=found(**changes), tell=ROW_CHECKS))["checks"]
    told_alone = json.loads(readiness_report(data_set(), plan, check=found(**changes), tell=[name]))

    assert [check for check, passed in checks.items() if passed == "fail"] == [name]
    assert told_alone["checks"] == dict.fromkeys(DECLARED_CHECKS, "pass") | {name: "fail"}
    assert told_alone["not_told"] == [other for other in ROW_CHECKS if other != name]


@pytest.mark.parametrize(
    ("name", "data", "plan"),
    [
        ("same-unit", {"person_id": ""}, {}),
        ("declared-persons", {"declared_persons": 990}, {}),
        ("delta", {"declared_persons": 200_000}, {}),
    ],
)
def test_each_check_on_what_is_declared_fails_for_its_own_reason_only(
    name: str, data: dict[str, Any], plan: dict[str, Any]
) -> None:
    checks = json.loads(readiness_report(data_set(**data), plan_for(min_persons=1000, **plan)))["checks"]

    assert [check for check, passed in checks.items() if passed == "fail"] == [name]


def test_checks_that_do_not_exist_or_were_not_made_are_not_told() -> None:
    with pytest.raises(UsageError, match="no check 'persons'"):
        readiness_report(data_set(), plan_for(), check=found(), tell=["persons"])
    with pytest.raises(UsageError, match="has to be checked first"):
        readiness_report(data_set(), plan_for(), tell=["readable"])


def test_persons_are_counted_whatever_the_spelling_of_their_accents(tmp_path: Path) -> None:
    rows: list[Row] = [(unicodedata.normalize(form, "Müller"), "good", "yes") for form in ("NFC", "NFD")]

    check = examine(table(tmp_path / "a.csv", rows), plan_for(), declared_persons=1)

    assert check.persons == 1


def test_a_histogram_counts_each_person_as_one_and_says_its_noise_and_cost(tmp_path: Path) -> None:
    journal, path = new_journal(), table(tmp_path / "a.csv", ROWS)
    data = registered(journal, path, tmp_path)

    histogram = label_histogram(
        path,
        plan_for(),
        data,
        journal,
        noise_multiplier=20.0,
        metrics=allowing(10.0),
        person_key=KEY,
        randomness=Silent(),
    )

    # p1 is two thirds of a "yes" and a third of a "no", p2 one "no"; rounded to whole numbers.
    assert histogram.counts == {"no": 1, "perhaps": 0, "yes": 1}
    (release,) = journal.book.releases
    assert (release.data, release.what, release.noise_multiplier) == ("letters", "label-histogram", 20.0)
    assert histogram.epsilon == cost([release.spend()], plan_for().privacy.delta).epsilon
    told = json.loads(readiness_report(data, plan_for(), labels=histogram))["labels"]
    assert told == {
        "counts": {"no": 1, "perhaps": 0, "yes": 1},
        "noise_multiplier": 20.0,
        "delta": plan_for().privacy.delta,
        "epsilon": histogram.epsilon,
    }


def test_the_ledger_holds_the_release_before_any_noised_number_exists(tmp_path: Path) -> None:
    journal, path = new_journal(), table(tmp_path / "a.csv", ROWS)
    data = registered(journal, path, tmp_path)
    seen: list[int] = []

    class Watching(Silent):
        def words(self, count: int) -> npt.NDArray[np.uint64]:
            seen.append(len(journal.book.releases))
            return super().words(count)

    label_histogram(
        path,
        plan_for(),
        data,
        journal,
        noise_multiplier=20.0,
        metrics=allowing(10.0),
        person_key=KEY,
        randomness=Watching(),
    )
    assert set(seen) == {1}

    journal.close()
    with pytest.raises(LedgerError):
        label_histogram(
            path,
            plan_for(),
            data,
            journal,
            noise_multiplier=20.0,
            metrics=allowing(10.0),
            person_key=KEY,
            randomness=Watching(),
        )
    assert len(seen) == 1  # no noise was drawn for what the ledger did not take


def test_a_histogram_that_an_account_has_no_room_for_does_not_leave(tmp_path: Path) -> None:
    journal, path = new_journal(), table(tmp_path / "a.csv", ROWS)
    data = registered(journal, path, tmp_path)

    with pytest.raises(Refused) as caught:
        label_histogram(path, plan_for(), data, journal, noise_multiplier=0.1, metrics=allowing(0.1), person_key=KEY)

    assert caught.value.rule == "budget"
    assert journal.book.releases == ()


@pytest.mark.parametrize(
    ("noise", "least", "rule"),
    [(9.99, 10.0, "noise"), (math.nan, 10.0, "noise"), (math.inf, 10.0, "noise"), (20.0, None, "data")],
)
def test_a_histogram_beyond_the_policy_does_not_leave(
    tmp_path: Path, noise: float, least: float | None, rule: str
) -> None:
    journal, path = new_journal(), table(tmp_path / "a.csv", ROWS)
    data = registered(journal, path, tmp_path)

    with pytest.raises(Refused) as caught:
        label_histogram(
            path, plan_for(), data, journal, noise_multiplier=noise, metrics=allowing(least), person_key=KEY
        )

    assert caught.value.rule == rule
    assert journal.book.releases == ()


def test_the_rows_that_a_histogram_counts_are_those_whose_fingerprint_was_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, path = new_journal(), table(tmp_path / "a.csv", ROWS)
    data = registered(journal, path, tmp_path)
    read = readiness._read

    def exchanged(*arguments: Any) -> int:
        table(path, [("p9", "somebody else's", "yes")])
        return read(*arguments)

    label_histogram(path, plan_for(), data, journal, noise_multiplier=20.0, metrics=allowing(10.0), person_key=KEY)
    monkeypatch.setattr(readiness, "_read", exchanged)
    with pytest.raises(DataError, match="changed while it was read, and nothing was released"):
        label_histogram(path, plan_for(), data, journal, noise_multiplier=20.0, metrics=allowing(10.0), person_key=KEY)

    assert len(journal.book.releases) == 1


def test_a_histogram_counts_no_person_as_several(tmp_path: Path) -> None:
    journal, path = new_journal(), table(tmp_path / "a.csv", ROWS)
    data = registered(journal, path, tmp_path)

    with pytest.raises(Refused, match="was registered by the column 'patient'"):
        label_histogram(
            path, plan_for(person_id=None), data, journal, noise_multiplier=20.0, metrics=allowing(10.0), person_key=KEY
        )

    assert journal.book.releases == ()


def test_a_task_without_labels_has_no_histogram(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="regression has no labels to count"):
        label_histogram(
            tmp_path,
            plan_for(REGRESSION),
            data_set(),
            new_journal(),
            noise_multiplier=20.0,
            metrics=allowing(1.0),
            person_key=KEY,
        )


PERSON = strategies.lists(strategies.sampled_from(LABELS), min_size=1, max_size=6)


@settings(max_examples=25)
@given(strategies.lists(PERSON, min_size=1, max_size=5))
def test_what_one_person_s_rows_can_change_has_an_l2_norm_of_at_most_1_before_noise(
    tmp_path_factory: pytest.TempPathFactory, persons: list[list[str]]
) -> None:
    from confide.client.readiness import _GRID, _read, _Seen
    from confide.client.rows import Faults

    folder, plan = tmp_path_factory.mktemp("norm"), plan_for()
    rows = [(f"p{number}", "text", label) for number, labels in enumerate(persons) for label in labels]

    def shares(left_out: set[int]) -> npt.NDArray[np.int64]:
        seen = _Seen(plan)
        _read(table(folder / "a.csv", rows), plan, left_out, Faults(folder, {}), seen)
        return seen.shares()

    whole, without = shares(set()), shares(set(range(1, 1 + len(persons[0]))))

    assert np.linalg.norm((whole - without) / _GRID) <= 1
    expected = [persons[0].count(label) / len(persons[0]) for label in LABELS]
    assert np.allclose((whole - without) / _GRID, expected, atol=2.0**-20)


def test_the_noise_of_a_histogram_has_the_deviation_that_is_charged(tmp_path: Path) -> None:
    """900 draws of a rounded Gaussian; each bound fails for right noise with a probability below 1e-6."""
    journal, path = new_journal(), table(tmp_path / "a.csv", ROWS)
    data = registered(journal, path, tmp_path)
    randomness = Seeded(11)
    sigma, draws = 50.0, 300

    class Taking:
        def append(self, release: Release) -> None:
            assert release.noise_multiplier == sigma

    counts = [
        label_histogram(
            path,
            plan_for(),
            data,
            typing.cast(Journal, Taking()),  # 300 releases are more than any budget has room for
            noise_multiplier=sigma,
            metrics=allowing(1.0),
            person_key=KEY,
            randomness=randomness,
        ).counts
        for _ in range(draws)
    ]

    noise = np.array([list(count.values()) for count in counts], np.float64) - np.array([4 / 3, 0, 2 / 3])
    assert abs(noise.mean()) < 4.9 * sigma / math.sqrt(noise.size)
    # The variance of n draws spreads as sigma² · sqrt(2 / n); its law's tails are near enough to a Gaussian's for 6.
    assert abs(noise.var() / sigma**2 - 1) < 6 * math.sqrt(2 / noise.size)


def test_by_default_the_noise_is_cryptographic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, path = new_journal(), table(tmp_path / "a.csv", ROWS)
    data = registered(journal, path, tmp_path)
    made: list[CryptographicNoise] = []

    class Counted(CryptographicNoise):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr("confide.client.readiness.CryptographicNoise", Counted)
    label_histogram(path, plan_for(), data, journal, noise_multiplier=20.0, metrics=allowing(10.0), person_key=KEY)

    assert len(made) == 1
