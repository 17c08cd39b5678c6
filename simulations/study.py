"""One simulated run from tables to results: the federation itself, and what it is compared with.

Every comparison is trained by the same code on the same rows, with the same plan: each site alone, all rows pooled,
all rows pooled without privacy, and the federation with its head only.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from confide.client.agent import Agent
from confide.client.conformance import Certificate, certify
from confide.client.mechanism import Mechanism
from confide.client.personal import Personal
from confide.client.persons import declared
from confide.client.private_trainer import PrivateTrainer
from confide.common.accounting import planned_cost
from confide.common.adapter import Floats
from confide.common.calibration import noise_multiplier
from confide.common.disk import READABLE, lock, whole
from confide.common.errors import RunError
from confide.common.examples import Examples, union
from confide.common.messages import Envelope, Start, kind_of
from confide.common.model import AdaptedModel, attach
from confide.common.plan import IMAGE_CLASSES, TEXT_CLASSES, Plan, load_plan
from confide.common.prefix import PrefixCache
from confide.server.aggregate import ServerState
from confide.server.evaluate import evaluate
from confide.server.publish import Claim, claim, publish, weakened
from confide.server.store import RoundRecord, Store
from confide.simulations.cohort import read_cohort
from confide.simulations.federation import Engine, Federation, personal_folder, run_in_process
from confide.simulations.insecure import InsecureSeededNoise
from confide.simulations.setting import check_choices, read_setting
from confide.simulations.shelf import Shelf

RUN_FORMAT = "confide-run/1"
_EPSILON_POINTS = 12


class Watch(Protocol):
    """Whoever wants to see a run as it goes."""

    def phase(self, title: str, total: int) -> None:
        """A stretch of work begins that has `total` steps."""
        ...

    def advance(self, steps: int = 1, doing: str = "") -> None:
        """Some of its steps are done; `doing` says what was."""
        ...

    def note(self, line: str) -> None:
        """Something worth a line happened."""
        ...


class Study:
    """A run in its directory. Make the directory with `begin` first.

    Args:
        directory: The run's directory.
        watch: Who is told of progress.
        shelf: What other runs of this process have read and computed already.
    """

    def __init__(self, directory: Path, watch: Watch, shelf: Shelf | None = None) -> None:
        import torch

        self.directory = directory
        self.setting = read_setting(directory)
        self.plan = load_plan(directory / "plan.toml")
        if threads := self.setting.threads or self.plan.compute.threads:
            torch.set_num_threads(threads)
        try:
            self._lock = lock(directory)
        except BlockingIOError:
            raise RunError(f"Another process is running the run in {directory}. Wait for it, or stop it.") from None
        self._watch = watch
        self._began = time.monotonic()
        watch.phase("Loading the base model, its self-test, and the rows", 4)
        self.model = attach(self.setting.model, self.plan)
        watch.advance()
        self.certificate = _certified(self.model)
        watch.advance()
        shelf = shelf or Shelf()
        self.cohort = read_cohort(self.setting, self.plan, shelf)
        watch.advance(2)
        self.cache = self._prefix(shelf.cache(self.model))
        self._store = Store(directory)
        self._history: list[dict[str, object]] = []
        self._spent: dict[str, list[dict[str, object]]] = {}

    def run(self) -> dict[str, object]:
        """Do what is not done yet, and return the contents of `run.json`."""
        scores: dict[str, object] = {"untrained": self._score("untrained", lambda: self.model.start)}
        adapter, status, claims = self._federated(self.directory, self.certificate)
        scores["federated"] = self._score("federated", lambda: adapter, self._personal())
        if self.setting.alone:
            scores["alone"] = {site: self._score(f"alone/{site}", self._alone(site)) for site in self.cohort.sites}
        if self.setting.compare:
            everyone = union(list(self.cohort.sites.values()))
            scores["pooled"] = self._score("pooled", lambda: self._trained("pooled", everyone))
            scores["pooled_not_private"] = self._score(
                "pooled_not_private", lambda: self._trained("pooled_not_private", everyone, private=False)
            )
        if self.setting.head_only and self.model.head:  # a language model has none of its own to train
            scores["head_only"] = self._head_only()
        self._publish(adapter, status, claims)
        return self._write(scores, status, claims)

    def _prefix(self, cache: PrefixCache | None) -> PrefixCache | None:
        parts = [*self.cohort.sites.values(), self.cohort.test]
        parts = [] if cache is None else [part for part in parts if not cache.holds(part)]
        if cache is None or not parts:
            return cache
        self._watch.phase("Computing the frozen layers once", sum(map(len, parts)))
        for part in parts:
            before = 0
            for done in cache.add(part):
                self._watch.advance(done - before)
                before = done
        return cache

    def _cache_of(self, model: AdaptedModel) -> PrefixCache | None:
        return self.cache if self.cache is None or model is self.model else self.cache.beside(model)

    def _federated(self, directory: Path, certificate: Certificate) -> tuple[Floats, str, dict[str, Claim]]:
        """Return the last adapter, how the run ended, and what each site's persons are promised."""
        model = certificate.model
        federation = Federation(
            name=self.plan.name,
            certificate=certificate,
            sites=self.cohort.sites,
            cache=self._cache_of(model),
            seed=self.setting.seed,
            summation=self.setting.summation,
            noise=self.setting.noise,
            purpose="federated" if model is self.model else "head-only",
        )
        store = self._store if directory == self.directory else Store(directory)
        run, agents = federation.begin(directory / "sites")
        start = ServerState.begin(model.start, self.plan.federation)
        rounds = self.plan.privacy.rounds
        title = "Federated rounds" if model is self.model else "Federated rounds, head only"
        self._watch.phase(title, rounds * len(agents))
        for record in store.records:
            self._told(record, model, store)
            self._watch.advance(len(agents))
        watched = {site: _Watched(site, agent, self._watch) for site, agent in agents.items()}
        engine = _engine(self.setting.engine) if model is self.model else run_in_process  # comparisons need no Flower
        status = engine(run, watched, store, start, lambda record: self._told(record, model, store))
        state = store.latest(model.layout)
        if state is None or status == "failed":
            raise RunError(
                "The run failed: in no round did enough sites take part. Each site's reason is in "
                f"{directory}/rounds; the full one is in this program's log."
            )
        for site, agent in agents.items():
            agent.spends.export(directory / "sites" / f"{site}.jsonl")
        if model is self.model:
            self._spent = {
                site: [dataclasses.asdict(spend) for spend in agent.spends.spends] for site, agent in agents.items()
            }
        claims = {
            site: claim(agent.spends.spends, self.plan.privacy, [r.round for r in store.records if site in r.present])
            for site, agent in agents.items()
            if agent.spends.spends or any(site in r.present for r in store.records)
        }
        return state.adapter, status, claims

    def _told(self, record: RoundRecord, model: AdaptedModel, store: Store) -> None:
        if not self.setting.score_every or record.round % self.setting.score_every:
            return
        adapter = store.adapter(record.adapter, model.layout)
        found = self._evaluated(model, adapter, self._personal() if model is self.model else ())
        if model is self.model:
            self._history.append({"round": record.round, **found})
        void = "" if record.present else " (void)"
        missing = "".join(f", {site} lost at {why}" for site, why in record.missing.items())
        names = [name for name in dict.fromkeys((self.plan.task.decides, "accuracy")) if name in found]
        shown = "  ".join(f"{name} {found[name]:.3f}" for name in names)
        self._watch.note(f"round {record.round:>3}  {shown}  {len(record.present)} sites{void}{missing}")

    def _alone(self, site: str) -> Callable[[], Floats]:
        return lambda: self._trained(f"alone/{site}", self.cohort.sites[site])

    def _trained(self, name: str, examples: Examples, *, private: bool = True) -> Floats:
        """Return what the plan's training makes of one party's rows, without any federation."""
        mechanism = Mechanism.of(self.plan.privacy, declared(examples.person_count))
        if not private:
            mechanism = mechanism.insecure_no_noise()
        rounds = self.plan.privacy.rounds
        self._watch.phase(f"For comparison: {name.replace('/', ' ').replace('_', ' ')}", rounds)
        adapter = self.model.start
        trainer = PrivateTrainer(self.certificate, examples, self.cache)
        for number in range(1, rounds + 1):
            randomness = InsecureSeededNoise(self.setting.seed, name, number)
            adapter = adapter + trainer.train(number, adapter, mechanism, randomness).values
            self._watch.advance()
        return adapter

    def _head_only(self) -> float:
        def trained() -> Floats:
            model = attach(self.setting.model, self.plan, head_only=True)
            self.model.write(self.model.personal_start, self.model.personal)
            head, _, _ = self._federated(self.directory / "head-only", _certified(model))
            return self.model.layout.flatten({**self.model.layout.split(self.model.start), **model.layout.split(head)})

        return self._score("head_only", trained)

    def _personal(self) -> tuple[Floats, ...]:
        """Return what each site's adapter has of its own by now; nothing if all of an adapter is shared."""
        model, folder = self.model, self.directory / "sites"
        if not model.personal.length:
            return ()
        folders = (personal_folder(folder, site) for site in self.cohort.sites)
        return tuple(Personal(model.personal, model.personal_start, place).latest for place in folders)

    def _evaluated(self, model: AdaptedModel, adapter: Floats, personal: Sequence[Floats]) -> dict[str, float]:
        """Return the scores of an adapter; where sites have parts of their own, the mean over the sites."""
        found = []
        for own in personal or (model.read(model.personal),):
            model.write(own, model.personal)
            found.append(evaluate(model, adapter, self.cohort.test, self._cache_of(model)))
        return {name: float(np.mean([scores[name] for scores in found])) for name in found[0]}

    def _score(self, name: str, adapter: Callable[[], Floats], personal: Sequence[Floats] = ()) -> float:
        """Return the plan's score of an adapter, from the run's directory if it was measured before."""
        path = self.directory / "scores" / f"{name}.json"
        if not path.exists():
            found = self._evaluated(self.model, adapter(), personal)
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole(path, READABLE) as draft:
                draft.write_text(json.dumps(found), encoding="utf-8")
        value = float(json.loads(path.read_bytes())[self.plan.task.decides])
        if name != "federated":
            self._watch.note(f"{name.replace('/', ' ').replace('_', ' ')}: {self.plan.task.decides} {value:.3f}")
        return value

    def _publish(self, adapter: Floats, status: str, claims: Mapping[str, Claim]) -> None:
        publish(
            self.model,
            adapter,
            self.directory / "adapter",
            plan_file=self.directory / "plan.toml",
            status=status,
            records=self._store.records,
            claims=claims,
            scores=self._measured()["federated"],
            simulated=True,
        )
        for site, own in zip(self.cohort.sites, self._personal(), strict=False):
            folder = self.directory / "personal" / site
            self.model.export(adapter, folder, own)
            shutil.copyfile(self.directory / "plan.toml", folder / "plan.toml")

    def _measured(self) -> dict[str, dict[str, float]]:
        """Every score of everything that was evaluated, by name."""
        folder = self.directory / "scores"
        return {
            str(path.relative_to(folder).with_suffix("")): json.loads(path.read_bytes())
            for path in sorted(folder.rglob("*.json"))
        }

    def _write(self, scores: Mapping[str, object], status: str, claims: Mapping[str, Claim]) -> dict[str, object]:
        plan, records = self.plan, self._store.records
        result: dict[str, object] = {
            "format": RUN_FORMAT,
            "status": status,
            "plan": {"name": plan.name, "digest": plan.digest},
            "base": {"name": plan.model.base, "digest": plan.model.base_digest},
            "score": plan.task.decides,
            "scores": dict(scores),
            "measured": self._measured(),
            "epsilon": {site: claim.epsilon for site, claim in claims.items()},
            "epsilon_target": plan.privacy.epsilon,
            "delta": plan.privacy.delta,
            "noise_multiplier": noise_multiplier(plan.privacy),
            "epsilon_by_round": _epsilon_by_round(plan),
            "rounds": len(records),
            "seconds": round(time.monotonic() - self._began, 3),
            "bytes_up_per_site_round": max(record.bytes_up for record in records),
            "bytes_down_per_site_round": max(record.bytes_down for record in records),
            "trained_numbers": self.model.layout.length,
            "weakened_by": weakened(records, claims, simulated=True),
            "sites": {
                site: {
                    "rows": len(examples),
                    "persons": examples.person_count,
                    "declared_persons": declared(examples.person_count),
                    "labels": _label_counts(examples, plan),
                }
                for site, examples in self.cohort.sites.items()
            },
            "test_rows": len(self.cohort.test),
            "skipped": dict(self.cohort.skipped),
            "history": self._history,
            "round_records": [dataclasses.asdict(record) for record in records],
            "spends": self._spent,
            "setting": json.loads((self.directory / "setting.json").read_bytes()),
            "adapter": str(self.directory / "adapter"),
        }
        with whole(self.directory / "run.json", READABLE) as draft:
            draft.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        return result


class _Watched:
    """A site's agent; what it trained is told."""

    def __init__(self, site: str, agent: Agent, watch: Watch) -> None:
        self._site = site
        self._agent = agent
        self._watch = watch

    def answer(self, envelope: Envelope) -> Envelope:
        """Return the agent's answer."""
        answer = self._agent.answer(envelope)
        if kind_of(envelope) == Start.kind:
            self._watch.advance(doing=self._site)
        return answer


def _certified(model: AdaptedModel) -> Certificate:
    """Return what the self-test says of a model; all sites train the same one, so it is tested once."""
    return certify(model, cached=PrefixCache.helps(model))


def _engine(name: str) -> Engine:
    if name == "flower":
        from confide.simulations.flower import run_through_flower

        return run_through_flower
    check_choices(engine=name)
    return run_in_process


def _label_counts(examples: Examples, plan: Plan) -> dict[str, int]:
    """How many rows have each label, where a row has one."""
    if plan.task.kind not in {TEXT_CLASSES, IMAGE_CLASSES}:
        return {}
    return {label: int((examples.labels == index).sum()) for index, label in enumerate(plan.task.labels)}


def _epsilon_by_round(plan: Plan) -> list[dict[str, float]]:
    """What has been spent after some rounds, evenly chosen, the last included."""
    rounds = plan.privacy.rounds
    stride = max(1, rounds // _EPSILON_POINTS)
    chosen = sorted({*range(stride, rounds, stride), rounds})
    return [{"round": n, "epsilon": round(planned_cost(plan.privacy, n).epsilon, 6)} for n in chosen]
