"""Judging: whether a federation's adapter serves this site better than one of its own would, on rows that neither saw.

Everything here is exact, and stays at the site. An adapter of the site's own never leaves it, so no budget is charged for
it; it is trained with the plan's noise all the same, so that the two are compared on equal terms.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from confide.client.child_trainer import ChildTrainer
from confide.client.data import Reading, load_reader, read_examples
from confide.client.link import Load
from confide.client.mechanism import Mechanism
from confide.client.noise import CryptographicNoise
from confide.client.personal import Personal
from confide.client.persons import person_digest, read_persons
from confide.client.readiness import check_unit
from confide.common.adapter import Floats
from confide.common.errors import AdapterError, DataError, UsageError
from confide.common.examples import Examples
from confide.common.messages import vector_digest
from confide.common.model import AdaptedModel, attach
from confide.common.objective import measure
from confide.common.plan import Plan, load_plan

if TYPE_CHECKING:
    from confide.client.opening import Opened

UNTRAINED: Final = "untrained"
OWN: Final = "own"
FEDERATED: Final = "federated"
_ROUND_S = 7 * 86_400.0  # no server waits for it


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """How adapters did on held-out rows. These are exact numbers: they stay at the site.

    Attributes:
        score: The score that decides for this kind of task.
        rows: How many rows were scored.
        skipped: How many rows were left out, by reason, as the plan says.
        registered: How many rows were left out because their persons are registered at this site.
        scores: By UNTRAINED, OWN and FEDERATED: every score by its name.
        own: Where the site's own adapter lies.
        trained: Whether it was trained just now.
    """

    score: str
    rows: int
    skipped: Mapping[str, int]
    registered: int
    scores: Mapping[str, Mapping[str, float]]
    own: Path
    trained: bool


def judge(
    site: "Opened",
    adapter: Path,
    *,
    held_out: Path,
    model: Path,
    data: str,
    own: Path | None = None,
    run: str = "",
    told: Callable[[int, int], None] = lambda done, total: None,
) -> Judged:
    """Return how the federated adapter, the site's own and the untrained start do on held-out rows.

    Args:
        site: The site, opened.
        adapter: The federated adapter's directory, as `server/publish` writes it.
        held_out: A table in the plan's form. Rows of persons who are registered at this site are left out.
        model: The base model's local directory.
        data: The data set that an own adapter is trained on, by its name in the registry.
        own: An adapter of the site's own; if absent the one that was trained before on this version of the data set, or
            else one is trained now, by as many rounds as the plan has and with its noise, and kept in the site.
        run: The run that the adapter came from; needed where the plan's method keeps a part of each adapter at its site.
        told: Called with the rounds that are done and all rounds while an own adapter is trained.

    Raises:
        AdapterError: A directory holds no adapter for this model, or not the one its manifest speaks of.
        ModelError: The base model is not the plan's.
        Refused: The data set is not registered, its table changed, or the plan tells persons apart by another column.
        DataError: A table cannot be read, or no held-out row is left.
        UsageError: What the site keeps of the run's adapter is needed and not there.

    Guarantee: nobody whose rows may have been learned from is among those that are judged on.
    """
    plan = _plan(adapter)
    entry = site.journal.book.data_set(data)
    check_unit(entry, plan)
    adapted = attach(model, plan)
    shared = _vector(adapted, adapter)
    personal = _personal(site, adapted, run)
    reading, examples, registered = _held_out(site, held_out, plan, model, data)
    scores = {UNTRAINED: _scored(adapted, adapted.start, adapted.personal_start, examples)}
    place = own or site.home.personal / "own" / f"{data}-v{entry.version}-{plan.digest[7:19]}"
    trained = own is None and not place.exists()
    if trained:
        _train(site, plan, adapter / "plan.toml", model, data, adapted, place, told)
    scores[OWN] = _own(place, plan, model, examples)
    scores[FEDERATED] = _scored(adapted, shared, personal, examples)
    return Judged(
        score=plan.task.decides,
        rows=len(examples),
        skipped=reading.skipped,
        registered=registered,
        scores=scores,
        own=place,
        trained=trained,
    )


def _held_out(site: "Opened", path: Path, plan: Plan, model: Path, data: str) -> tuple[Reading, Examples, int]:
    """Return the held-out rows, those of persons who are not registered here, and how many rows the others had."""
    entry, key = site.journal.book.data_set(data), site.registry.person_key
    persons = read_persons(path, entry.person_id or None, key, entry.ids)
    registered = frozenset(person for person in persons.known_by() if site.journal.accounts_of((person,)))
    count = len(persons.rows_of(registered))
    if count and not entry.person_id:
        raise DataError(
            f"{count} rows of {path} are registered at this site, so they may have been learned from and prove nothing. Take "
            "them out of the held-out table."
        )
    reading = read_examples(path, plan, load_reader(model, plan), extra_column=entry.person_id or None)
    if not count:
        return reading, reading.examples, 0
    column = reading.column or ()
    known = {whose: person_digest(key, entry.ids, whose) in registered for whose in set(column)}
    kept = np.array([row for row, whose in enumerate(column) if not known[whose]], np.int64)
    if not len(kept):
        raise DataError(
            f"All rows of {path} are of persons who are registered at this site, so they may have been learned from and prove "
            "nothing. Hold out rows of others."
        )
    return reading, reading.examples.subset(kept), count


def _train(
    site: "Opened",
    plan: Plan,
    plan_file: Path,
    model: Path,
    data: str,
    adapted: AdaptedModel,
    place: Path,
    told: Callable[[int, int], None],
) -> None:
    """Train an adapter of the site's own on a registered data set, without those who withdrew, and keep it at `place`."""
    rows = site.registry.current(data)
    draft = place.with_name(f".{place.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True, mode=0o700)
    try:
        load = Load(
            plan=plan_file.read_bytes(),
            model=model,
            table=rows.path,
            person_column=rows.data.person_id,
            ids=rows.data.ids,
            person_key=site.registry.person_key,
            withdrawn=site.registry.excluded(data),
            fingerprint=True,
            personal=draft / "rounds" if adapted.personal.length else None,
        )
        mechanism, rounds = Mechanism.of(plan.privacy, rows.data.declared_persons), plan.privacy.rounds
        told(0, rounds)
        with ChildTrainer(load, deadline_s=_ROUND_S) as trainer:
            if trainer.fingerprint != rows.data.fingerprint:
                raise DataError(
                    f"The table {rows.path} changed while it was read. Register it again: confide site data add"
                )
            vector = trainer.start
            for number in range(1, rounds + 1):
                vector = vector + trainer.train(number, vector, mechanism, CryptographicNoise()).values
                told(number, rounds)
        kept = Personal(adapted.personal, adapted.personal_start, load.personal).latest
        adapted.export(vector, draft, kept if adapted.personal.length else None)
        shutil.copyfile(plan_file, draft / "plan.toml")
        draft.replace(place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _own(place: Path, plan: Plan, model: Path, examples: Examples) -> dict[str, float]:
    """Return the scores of the site's own adapter, which may be of another plan for the same task."""
    own_plan = _plan(place)
    if (own_plan.task, own_plan.data) != (plan.task, plan.data):
        raise AdapterError(
            f"The adapter in {place} was trained for another task, or on other columns, than the federation's. Give one of the "
            "same [task] and [data], or leave out --own."
        )
    if own_plan.model != plan.model:
        raise AdapterError(f"The adapter in {place} is for another base model, or reads it otherwise. Leave out --own.")
    adapted = attach(model, own_plan)
    vector = _vector(adapted, place)
    return _scored(adapted, vector, adapted.read(adapted.personal), examples)


def _scored(adapted: AdaptedModel, vector: Floats, personal: Floats, examples: Examples) -> dict[str, float]:
    adapted.write(vector)
    adapted.write(personal, adapted.personal)
    return measure(adapted, examples)


def _personal(site: "Opened", adapted: AdaptedModel, run: str) -> Floats:
    """Return what the site keeps of the run's adapter; the start if the plan's method keeps nothing."""
    if not adapted.personal.length:
        return adapted.personal_start
    folder = site.home.personal / run
    if not run or not folder.is_dir():
        raise UsageError(
            f"The method {adapted.plan.adapter.method} keeps a part of each adapter at its site, and {folder} holds none. Name "
            "the run that the adapter came from, in which this site took part: --run"
        )
    return Personal(adapted.personal, adapted.personal_start, folder).latest


def _plan(directory: Path) -> Plan:
    if not (directory / "plan.toml").is_file():
        raise AdapterError(f"{directory} holds no plan.toml, so it is not an adapter's directory that Confide wrote.")
    return load_plan(directory / "plan.toml")


def _vector(adapted: AdaptedModel, directory: Path) -> Floats:
    """Return the adapter's vector, which must be the one its manifest speaks of, if it has one."""
    vector, manifest = adapted.import_exported(directory), directory / "manifest.json"
    if manifest.exists():
        try:
            fields = json.loads(manifest.read_bytes())
            told = fields["adapter"], fields["plan"]["digest"]
        except (ValueError, KeyError, TypeError, RecursionError):
            told = "", ""
        if told != (vector_digest(vector), adapted.plan.digest):
            raise AdapterError(
                f"The weights or the plan in {directory} are not those its manifest speaks of. Take the directory anew."
            )
    return vector
