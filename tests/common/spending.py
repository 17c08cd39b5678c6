"""Spends and a plan to count with, and the library's own answer to compare with."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from confide.client.mechanism import Mechanism
from confide.common.plan import Plan, Privacy
from confide.common.renyi import RDP_ORDERS
from confide.common.spend import Spend
from tests.ledgers import spends_of

SPEND = Spend(
    round=1,
    sampling_rate=0.1,
    noise_multiplier=2.0,
    steps=40,
    clip_norm=1.0,
    divisor=100.0,
    noise="insecure_seeded_noise",
)
PRIVACY = Privacy(epsilon=8.0, delta=1e-5, sampling_rate=0.1, steps_per_round=4, rounds=10, min_persons=1000)
# (sampling rate, noise multiplier, steps), from generous to strict.
GRID = [(0.01, 0.6, 500), (0.05, 1.0, 200), (0.1, 2.0, 1000), (0.3, 4.0, 100), (1.0, 8.0, 40)]


def spend(rate: float, noise: float, steps: int) -> Spend:
    return dataclasses.replace(SPEND, sampling_rate=rate, noise_multiplier=noise, steps=steps)


def many_unlike() -> list[Spend]:
    """A hundred thousand spends of 701 mechanisms."""
    unlike = [spend(0.001, 0.7 + number / 1000, 1) for number in range(701)]
    return [unlike[number % 701] for number in range(100_000)]


def spent_file(folder: Path, plan: Plan, rounds: int) -> Path:
    """The exported ledger of a site that went through so many rounds of this plan."""
    spends = spends_of(plan, "run", persons=plan.privacy.min_persons)
    one = Mechanism.of(plan.privacy, plan.privacy.min_persons).spend(1, "cryptographic")
    for number in range(1, rounds + 1):
        spends.reserve(dataclasses.replace(one, round=number), "sha256:" + "0" * 64, "sha256:" + "0" * 64)
        spends.bind(number, "sha256:" + "1" * 64)
        spends.commit(number)
    spends.export(folder / "north.jsonl")
    return folder / "north.jsonl"


def library_epsilon(rate: float, noise: float, steps: int, delta: float, orders: tuple[int, ...] = RDP_ORDERS) -> float:
    """Epsilon by the Rényi accountant of dp-accounting."""
    return float(library_accountant(rate, noise, steps, orders).get_epsilon(delta))


def library_divergences(rate: float, noise: float, steps: int = 1) -> npt.NDArray[np.float64]:
    """Rényi divergences by dp-accounting at RDP_ORDERS."""
    return np.array(library_accountant(rate, noise, steps, RDP_ORDERS).rdp)


def library_accountant(rate: float, noise: float, steps: int, orders: tuple[int, ...]) -> Any:
    """The Rényi accountant of dp-accounting after so many steps, put together by hand."""
    import dp_accounting
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant(orders, dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)), steps)
    return accountant
