"""The frame of all benchmarks: named figures, each a median over runs, a ratio where there is a peer.

`federation` measures everything about a round but training: training is replaced by a constant update, while agents,
messages, ring, sum, server step and store are the real ones. `secagg`, `train` and `ledger` have files of their own.
"""

import dataclasses
import functools
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from confide.client.agent import Agent
from confide.client.mechanism import Delta, Mechanism, Randomness
from confide.client.spends import Spends
from confide.common.adapter import Floats, Layout
from confide.common.errors import RunError, UsageError
from confide.common.plan import Plan, load_plan
from confide.common.ring import RingLayout
from confide.server.aggregate import ServerState
from confide.server.rounds import Run
from confide.server.store import Store
from confide.simulations.enrolment import Sums
from confide.simulations.federation import run_in_process
from confide.simulations.insecure import PLAIN_SUM, InsecureSeededNoise
from confide.simulations.measurement import Figure, Note
from confide.simulations.scenarios import demo_model, scenario
from confide.simulations.setting import REAL
from confide.simulations.vaults import open_ledger, rows_of

FORMAT = "confide-bench/1"
PARAMETERS = 300_000
SITES = 10
RUNS = 3


def bench(name: str, note: Note, plan: Path | None = None, data: Path | None = None) -> dict[str, Any]:
    """Run the benchmark of that name and return what `--json` prints.

    Args:
        name: Which.
        note: Is told what is being done.
        plan: How `data` is read; for `train` only.
        data: A table to measure on; for `train` only, which otherwise takes the demo's messages.

    Raises:
        UsageError: There is none of that name, or it measures on no table.
    """
    if name not in BENCHES:
        raise UsageError(f"There is no benchmark {name!r}. Known are {', '.join(BENCHES)}.")
    measure = BENCHES[name]
    if plan is not None or data is not None:
        if measure is not train:
            raise UsageError(f"bench {name} measures on no table. Leave out --plan and --data.")
        measure = functools.partial(train, plan=plan, data=data)
    began = time.monotonic()
    figures = measure(note)
    return {
        "format": FORMAT,
        "status": "completed",
        "bench": name,
        "seconds": round(time.monotonic() - began, 1),
        "figures": {key: dataclasses.asdict(figure) for key, figure in figures.items()},
    }


def federation(note: Note) -> Mapping[str, Figure]:
    """Return what a round costs beside training, how memory grows with sites, and the cost beside usual Flower's.

    Flower's clients send their updates in the clear, so ours do too where the two are compared. A run measures ours and the peer's one after the other, so that what else the machine does falls on both; a run's
    seconds are the median of its rounds.
    """
    from confide.simulations.flower_peer import reload_rounds

    model = demo_model()
    ours: list[float] = []
    secure: list[float] = []
    theirs, growth = [], []
    for number in range(1, RUNS + 1):
        note(f"Run {number} of {RUNS}: {SITES} sites, {PARAMETERS} parameters, constant updates")
        for seconds, summation in ((ours, PLAIN_SUM), (secure, REAL)):
            with tempfile.TemporaryDirectory() as folder:
                rounds = constant_rounds(SITES, PARAMETERS, rounds=20, folder=Path(folder), summation=summation)
            seconds.append(statistics.median(rounds))
        note("  the same rounds with a Flower client that loads its base model for each message")
        theirs.append(statistics.median(reload_rounds(model, SITES, rounds=5)))
        note("  peak memory with 50 and with 5 sites, base model loaded, one process each")
        growth.append(_peak_mb(50) / _peak_mb(5))
    ratios = [their / our for their, our in zip(theirs, ours, strict=True)]
    return {
        "round_overhead_s": Figure.of(ours, "s"),
        "secure_round_overhead_s": Figure.of(secure, "s"),
        "peak_memory_sites_50_over_5": Figure.of(growth, "x", "5 sites"),
        "overhead_vs_flower_reload": Figure.of(ratios, "x", "Flower under Ray, base model loaded for each message"),
        "flower_reload_round_s": Figure.of(theirs, "s"),
    }


def secagg(note: Note) -> Mapping[str, Figure]:
    """Return what secure aggregation costs a site and the server, beside Flower's SecAgg+ and CKKS."""
    from confide.simulations.secagg_bench import measure_alone

    return measure_alone(note)


def train(note: Note, plan: Path | None = None, data: Path | None = None) -> Mapping[str, Figure]:
    """Return what private training costs beside peft's LoRA and Opacus, and how long its accounts take."""
    from confide.simulations.accounting_bench import accounting_figures
    from confide.simulations.train_bench import measure_demo

    return {**measure_demo(note, plan, data), **accounting_figures(note)}


def ledger(note: Note) -> Mapping[str, Figure]:
    """Return what a site's ledger and its agent cost beside training."""
    from confide.simulations.ledger_bench import measure_demo

    return measure_demo(note)


BENCHES: dict[str, Callable[[Note], Mapping[str, Figure]]] = {
    "federation": federation,
    "secagg": secagg,
    "train": train,
    "ledger": ledger,
}


class ConstantTrainer:
    """Stands in for training: every round moves every parameter by the same."""

    person_count = 10_000

    def __init__(self, layout: Layout) -> None:
        self.layout_digest = layout.digest
        self.start = np.zeros(layout.length, np.float32)
        self._length = layout.length

    def train(self, number: int, start: Floats, mechanism: Mechanism, randomness: Randomness) -> Delta:
        """Return the constant update."""
        return Delta(values=np.full(self._length, 1e-4, np.float32))

    def evidence_of(self, number: int) -> bytes:
        """Return nothing: nothing was trained."""
        return b""


def constant_rounds(sites: int, parameters: int, rounds: int, folder: Path, summation: str = REAL) -> list[float]:
    """Return the seconds of each round, from the end of the one before, of a run in `folder`; the first is left out."""
    layout = Layout.of({"constant": (parameters,)})
    plan = _bench_plan(rounds + 1)
    ring = RingLayout(length=parameters, update_bound=1.0, max_sites=plan.federation.max_sites)
    names = tuple(f"site-{number:03}" for number in range(sites))
    sums = Sums.of(summation, plan, ring, names)
    run = Run(name="bench", plan=plan, layout=layout, ring=ring, sites=names, summation=sums.summation)
    agents = {name: _constant_agent(name, plan, layout, ring, folder, sums) for name in names}
    store = Store(folder)
    start = ServerState.begin(np.zeros(parameters, np.float32), plan.federation)
    ends: list[float] = []
    status = run_in_process(run, agents, store, start, lambda _: ends.append(time.perf_counter()))
    if status != "completed":
        raise RunError(f"In the benchmark a site did not take part: {[dict(r.missing) for r in store.records]}.")
    return [after - before for before, after in itertools.pairwise(ends)]


def _constant_agent(site: str, plan: Plan, layout: Layout, ring: RingLayout, folder: Path, sums: Sums) -> Agent:
    persons = ConstantTrainer.person_count
    journal = open_ledger(
        folder / "sites" / f"{site}.ledger",
        site=site,
        identity=sums.identities[site],
        plan=plan,
        run="bench",
        declared_persons=persons,
    )
    return Agent(
        site=site,
        run="bench",
        plan=plan,
        trainer=ConstantTrainer(layout),
        declared_persons=persons,
        ring=ring,
        randomness=lambda number: InsecureSeededNoise(0, site, number),
        protection=sums.protections[site],
        spends=Spends(journal, run="bench", plan=plan.digest, data=rows_of("bench")),
    )


def _bench_plan(rounds: int) -> Plan:
    plan = load_plan(scenario("messages").plan)
    return dataclasses.replace(
        plan,
        privacy=dataclasses.replace(plan.privacy, rounds=rounds, steps_per_round=1),
        federation=dataclasses.replace(plan.federation, max_sites=64),
    )


_MEMORY = """
import json, pathlib, resource, sys, tempfile
from confide.common.model import attach
from confide.common.plan import load_plan
from confide.simulations.bench import constant_rounds, PARAMETERS
from confide.simulations.scenarios import demo_model, scenario
model = attach(demo_model(), load_plan(scenario("messages").plan))
with tempfile.TemporaryDirectory() as folder:
    constant_rounds(int(sys.argv[1]), PARAMETERS, rounds=3, folder=pathlib.Path(folder))
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
"""


def _peak_mb(sites: int) -> float:
    """Return the peak resident memory, in MiB, of a process that runs so many sites with the base model loaded."""
    done = subprocess.run(  # noqa: S603  these are our own words
        [sys.executable, "-W", "ignore", "-c", _MEMORY, str(sites)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RunError(f"The process that measures memory ended with {done.returncode}: {done.stderr[-500:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))
