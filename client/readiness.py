"""Whether a table suits a plan: all there is to see, for the steward's eyes only, and the little that others may be told.

What is told are constants that the site declares and whether a check passed. Numbers of rows leave as a histogram of
labels only, noised and charged to the ledger like a round of training.
"""

import array
import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from confide.client.data import BEYOND, load_reader, read_examples
from confide.client.journal import Journal
from confide.client.judgement import judge_release, other_unit, require
from confide.client.mechanism import Randomness
from confide.client.noise import CryptographicNoise, rounded_gaussian
from confide.client.persons import identifier, read_persons
from confide.client.policy import LABEL_HISTOGRAM, Metrics
from confide.client.rows import (
    EMPTY,
    LABEL_COUNT,
    MISSING,
    NO_NUMBER,
    NO_ROOM,
    UNKNOWN_LABEL,
    UNREADABLE,
    Faults,
    RowParser,
    Unusable,
    UsedRow,
    answer_columns,
    shown_columns,
)
from confide.client.table import IDENTIFIER, read_table
from confide.common.accounting import cost
from confide.common.canonical import canonical_bytes
from confide.common.entries import DataSet, Release
from confide.common.errors import DataError, Refused, UsageError
from confide.common.examples import Ints
from confide.common.plan import CLASSES, IMAGE_CLASSES, Plan

FORMAT: Final = "confide-readiness/1"
# These follow from the plan and from what the site declares: whether they pass tells nothing about rows.
DECLARED_CHECKS: Final = ("same-unit", "declared-persons", "delta")
# Each of these is a fact about rows, though one bit of it.
ROW_CHECKS: Final = ("readable", "enough-persons", "every-label", "within-cap")
_GRID = 1 << 20  # parts into which a person is shared among labels
_REFUSED = ("", "refuse")  # what becomes of a row if the plan has no key for the reason
_LONGEST_TEXT = 8192  # tokens; the most a plan can read


class Spread(NamedTuple):
    """How some whole numbers spread: the least, the middle one, the one that nine in ten do not exceed, the most."""

    least: int
    median: int
    ninth_decile: int
    most: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What a table holds, as a plan reads it. These are exact numbers: they stay at the site.

    Attributes:
        rows: How many rows the table has.
        withdrawn: How many of them are left out because their persons took back their consent.
        repeated: How many hold exactly what an earlier row holds.
        usable: How many the plan can use.
        unusable: How many it cannot, by reason.
        persons: Whose the usable rows are; without a column of persons each row is one.
        rows_per_person: Of usable rows.
        beyond_cap: Persons with more usable rows than max_rows_per_person, and how many rows of theirs are left out.
        labels: How many usable rows have each of the plan's labels; of token-classification, how many words.
        characters: Of the texts; of images, bytes or the length of their paths.
        tokens: Of the texts, cut off nowhere below 8192; None if no model was given or it reads images.
        cut_off: The share of rows that are longer than max_tokens; None like `tokens`.
        faults: What stands in the plan's way, one sentence each with its remedy; empty if nothing does.
    """

    rows: int
    withdrawn: int
    repeated: int
    usable: int
    unusable: Mapping[str, int]
    persons: int
    rows_per_person: Spread | None
    beyond_cap: tuple[int, int]
    labels: Mapping[str, int]
    characters: Spread | None
    tokens: Spread | None
    cut_off: float | None
    faults: tuple[str, ...]


def check_unit(data: DataSet, plan: Plan) -> None:
    """Return if the plan protects what the budget of the data set belongs to.

    Raises:
        Refused: It tells persons apart by another column than the one they were registered by.
    """
    if (plan.data.person_id or "") != data.person_id:
        raise Refused(other_unit(plan, data.person_id, data.data), "data")


def examine(
    path: Path,
    plan: Plan,
    *,
    declared_persons: int,
    left_out: Collection[int] = (),
    repeated: int = 0,
    model: Path | None = None,
) -> Check:
    """Return what the table `path` holds for the plan; rows that it would refuse are counted, not refused.

    Args:
        path: A file or directory that `read_table` knows.
        plan: The plan.
        declared_persons: N, as the site declares it.
        left_out: The numbers of rows that are not to be read, from 1.
        repeated: How many rows are exact repetitions; it is passed through.
        model: The directory of the base model, whose tokenizer then counts tokens and whose reader tries every row.

    Raises:
        DataError: The table cannot be read, lacks a column of the plan's, or has one that holds what it may not.
        ModelError: The base model's tokenizer is of no use for the plan's task.
        PlanError: The plan's max_tokens leaves no room for text.
    """
    faults = Faults(path, _rules(plan))
    seen = _Seen(plan)
    withdrawn = _read(path, plan, left_out, faults, seen)
    unusable, found, tokens = dict(faults.counts), _sentences(faults.check), None
    if model is not None:
        unusable, found, tokens = _by_model(path, plan, model)
    rows_of_each = seen.rows_of_each()
    beyond = np.maximum(rows_of_each - plan.data.max_rows_per_person, 0)
    return Check(
        rows=faults.read,
        withdrawn=withdrawn,
        repeated=repeated,
        usable=len(seen.characters),
        unusable=unusable,
        persons=len(rows_of_each),
        rows_per_person=_spread(rows_of_each),
        beyond_cap=(int(np.count_nonzero(beyond)), int(beyond.sum())),
        labels=dict(zip(plan.task.labels, map(int, seen.labels()), strict=True)),
        characters=_spread(np.frombuffer(seen.characters, np.int64)),
        tokens=_spread(tokens),
        cut_off=None if tokens is None else float(np.mean(tokens > plan.model.max_tokens)),
        faults=(*found, *_misfits(len(rows_of_each), declared_persons, plan)),
    )


def readiness_report(
    data: DataSet,
    plan: Plan,
    *,
    check: Check | None = None,
    tell: Collection[str] = (),
    labels: "LabelHistogram | None" = None,
) -> bytes:
    """Return what others may be told of a data set, as one line of canonical JSON in the format `confide-readiness/1`.

    It names the plan, what the ledger declares of the data set, and "pass" or "fail" for each check that is told. The
    limits are the plan's, so they are public. Whether a check on rows passes is a fact about the rows all the same: one
    person may decide it, and no noise hides that. So each of ROW_CHECKS is told only if the steward names it, and the
    others are listed as not told.

    Args:
        data: The data set as the ledger has it.
        plan: The plan.
        check: What `examine` found; it is needed to tell any of ROW_CHECKS.
        tell: Which of ROW_CHECKS to tell.
        labels: A noised histogram from `label_histogram`, which was charged when it was made.

    Raises:
        UsageError: `tell` names another check, or one without `check`.

    Guarantee: of the rows the report tells nothing but the checks that were named and the noised histogram.
    """
    if unknown := sorted(set(tell) - set(ROW_CHECKS)):
        raise UsageError(f"There is no check {unknown[0]!r} on rows. Name some of {', '.join(ROW_CHECKS)}, or none.")
    if tell and check is None:
        raise UsageError(f"To tell whether {sorted(tell)[0]} passes, the table has to be checked first.")
    declared, privacy = data.declared_persons, plan.privacy
    passes = {
        "same-unit": (plan.data.person_id or "") == data.person_id,
        "declared-persons": declared >= privacy.min_persons,
        "delta": privacy.delta * declared < 1,
    }
    if check is not None:
        about_rows = {
            "readable": not any(_rules(plan).get(reason, _REFUSED)[1] == "refuse" for reason in check.unusable),
            "enough-persons": check.persons >= privacy.min_persons,
            "every-label": all(check.labels.values()),
            "within-cap": check.beyond_cap == (0, 0),
        }
        passes |= {name: about_rows[name] for name in tell}
    return canonical_bytes(
        {
            "format": FORMAT,
            "plan": plan.digest,
            "data": data.data,
            "version": data.version,
            "declared_persons": declared,
            "unit": "person" if data.person_id else "row",
            "checks": {name: "pass" if passed else "fail" for name, passed in passes.items()},
            "not_told": [name for name in ROW_CHECKS if name not in tell],
            "labels": None if labels is None else labels.told(),
        }
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LabelHistogram:
    """How many persons have each label, noised.

    Attributes:
        counts: By label, whole numbers; noise may make them negative. A person with several labels is shared among them.
        noise_multiplier: The standard deviation of the noise, in persons.
        delta: Of `epsilon`.
        epsilon: What this release alone cost each person at that delta.
    """

    counts: Mapping[str, int]
    noise_multiplier: float
    delta: float
    epsilon: float

    def told(self) -> dict[str, object]:
        """Return it as a report states it."""
        return dataclasses.asdict(self) | {"counts": dict(self.counts)}


def label_histogram(
    path: Path,
    plan: Plan,
    data: DataSet,
    journal: Journal,
    *,
    noise_multiplier: float,
    metrics: Metrics,
    person_key: bytes,
    left_out: Collection[int] = (),
    randomness: Randomness | None = None,
) -> LabelHistogram:
    """Charge a noised histogram of labels to the ledger, and then return it.

    Each person counts as one, shared among the plan's labels as her usable rows are; of token-classification, as her
    words are. Shares are rounded down to multiples of 2^-20, so that everything is summed in whole numbers.

    Args:
        path: The table.
        plan: Says which rows can be used and what the labels are.
        data: The data set as the ledger has it.
        journal: The site's ledger; every account of the data set is charged.
        noise_multiplier: The noise's standard deviation over what one person can change; so it is in persons.
        metrics: What the policy allows to leave, and with how much noise.
        person_key: `Registry.person_key`, by which it is seen that the table is still the registered one once it was read.
        left_out: The numbers of rows that are not to be read.
        randomness: Where the noise comes from; fresh draws of the operating system's if absent.

    Raises:
        UsageError: The plan's task has no labels.
        Refused: The policy does not allow it, an account has no room for it, or the plan tells persons apart by another
            column than the one they were registered by.
        LedgerError: The ledger cannot be written.
        DataError: The table cannot be read, or is not the registered one any more.

    Guarantee: the rows that are counted are those whose fingerprint the ledger has.
    Guarantee: the ledger holds the release before any noised number exists.
    Guarantee: what one person's rows can change has an L2 norm of at most 1 before noise.
    """
    if plan.task.kind not in CLASSES:
        raise UsageError(f"{plan.task.kind} has no labels to count. Only {', '.join(CLASSES)} do.")
    check_unit(data, plan)  # by another unit one person would count as several
    require(judge_release(metrics, LABEL_HISTOGRAM, noise_multiplier))
    seen = _Seen(plan)
    _read(path, plan, left_out, Faults(path, {}), seen)
    shares = seen.shares()
    _check_same(path, data, person_key)
    release = Release(data=data.data, what=LABEL_HISTOGRAM, noise_multiplier=noise_multiplier)
    journal.append(release)
    noise = rounded_gaussian(randomness or CryptographicNoise(), noise_multiplier * _GRID, len(shares))
    return LabelHistogram(
        counts=dict(zip(plan.task.labels, np.rint((shares + noise) / _GRID).astype(np.int64).tolist(), strict=True)),
        noise_multiplier=noise_multiplier,
        delta=plan.privacy.delta,
        epsilon=cost([release.spend()], plan.privacy.delta).epsilon,
    )


class _Seen:
    """What is counted of usable rows: a few numbers for each."""

    def __init__(self, plan: Plan) -> None:
        self.characters = array.array("q")
        self._plan = plan
        self._owners = array.array("q")  # a row's person
        self._persons: dict[str, int] = {}
        # One entry for each label that a row has: whose it is, which, and how often.
        self._whose, self._which, self._often = (array.array("q") for _ in range(3))

    def add(self, used: UsedRow) -> None:
        owner = len(self._owners)
        if used.person is not None:
            owner = self._persons.setdefault(identifier(used.person), len(self._persons))
        self._owners.append(owner)
        self.characters.append(used.size + len(used.pair or "") + len(used.answer))
        if self._plan.task.kind in CLASSES:
            for label, count in Counter(used.word_labels or (int(used.label),)).items():
                self._whose.append(owner)
                self._which.append(label)
                self._often.append(count)

    def rows_of_each(self) -> Ints:
        """Return how many usable rows each person has."""
        return np.unique(np.frombuffer(self._owners, np.int64), return_counts=True)[1]

    def labels(self) -> Ints:
        """Return how often each label occurs."""
        counts = np.zeros(len(self._plan.task.labels), np.int64)
        np.add.at(counts, np.frombuffer(self._which, np.int64), np.frombuffer(self._often, np.int64))
        return counts

    def shares(self) -> Ints:
        """Return the sum of all persons' shares of each label, in parts of `_GRID`."""
        whose, which, often = (np.frombuffer(part, np.int64) for part in (self._whose, self._which, self._often))
        labels = len(self._plan.task.labels)
        pairs, places = np.unique(whose * labels + which, return_inverse=True)  # (person, label), each once
        of_pair = np.zeros(len(pairs), np.int64)
        np.add.at(of_pair, places, often)
        of_person = np.zeros(int(whose.max(initial=-1)) + 1, np.int64)
        np.add.at(of_person, pairs // labels, of_pair)
        sums = np.zeros(labels, np.int64)
        np.add.at(sums, pairs % labels, of_pair * _GRID // of_person[pairs // labels])
        return sums


def _read(path: Path, plan: Plan, left_out: Collection[int], faults: Faults, seen: _Seen) -> int:
    """Count every row of the table; return how many were left out."""
    columns = shown_columns(plan) | answer_columns(plan)
    if plan.data.person_id is not None:
        columns[plan.data.person_id] = IDENTIFIER
    parser = RowParser(plan, columns)
    withdrawn = 0
    for row in read_table(path, columns):
        faults.read = row.number
        if row.number in left_out:
            withdrawn += 1
            continue
        try:
            seen.add(parser.parsed(row))
        except Unusable as fault:
            faults.add(row, fault)
    return withdrawn


def _check_same(path: Path, data: DataSet, key: bytes) -> None:
    """Return if the rows that were just read are the registered ones: others' budgets would not have been charged."""
    if read_persons(path, data.person_id or None, key, data.ids).fingerprint != data.fingerprint:
        raise DataError(
            f"The table {path} changed while it was read, and nothing was released of it. Let it be, or register it again: "
            "confide site data add"
        )


def _by_model(path: Path, plan: Plan, model: Path) -> tuple[dict[str, int], list[str], Ints | None]:
    """Return (how many rows are of no use, by reason; what is refused; the tokens of each row), as a run would read it."""
    reader = load_reader(model, plan)
    skipping = dataclasses.replace(plan.data, on_missing="skip", on_unknown_label="skip", on_empty_text="skip")
    lenient = dataclasses.replace(plan, data=skipping)
    found = _sentences(lambda: read_examples(path, plan, reader))
    skipped = dict(read_examples(path, lenient, reader).skipped)
    skipped.pop(BEYOND, None)
    if plan.task.kind == IMAGE_CLASSES:
        return skipped, found, None
    roomy = dataclasses.replace(lenient, model=dataclasses.replace(plan.model, max_tokens=_LONGEST_TEXT))
    return skipped, found, read_examples(path, roomy, reader).examples.lengths


def _sentences(step: Callable[[], object]) -> list[str]:
    try:
        step()
    except DataError as error:
        return str(error).splitlines()
    return []


def _misfits(persons: int, declared: int, plan: Plan) -> Iterator[str]:
    privacy = plan.privacy
    if min(persons, declared) < privacy.min_persons:
        yield (
            f"The table has {persons} persons with usable rows, of whom {declared} are declared; the plan asks for at least "
            f"{privacy.min_persons}. Register more, or ask for a plan with a lower min_persons."
        )
    if privacy.delta * max(persons, declared) >= 1:
        yield (
            f"The plan's delta = {privacy.delta:g} is not below one over {max(persons, declared)} persons, so it would "
            "promise them nothing. Ask for a plan with a lower delta."
        )


def _rules(plan: Plan) -> dict[str, tuple[str, str]]:
    """Return for each reason the plan's key and what it says."""
    data = plan.data
    return {
        MISSING: ("on_missing", data.on_missing),
        **dict.fromkeys((UNKNOWN_LABEL, NO_NUMBER, LABEL_COUNT), ("on_unknown_label", data.on_unknown_label)),
        **dict.fromkeys((EMPTY, UNREADABLE, NO_ROOM), ("on_empty_text", data.on_empty_text)),
    }


def _spread(numbers: Ints | None) -> Spread | None:
    if numbers is None or not len(numbers):
        return None
    return Spread(*(int(part) for part in np.quantile(numbers, (0, 0.5, 0.9, 1), method="higher")))
