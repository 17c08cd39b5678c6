"""How long a privacy decision and a privacy report take.

A decision is what a site makes before each round: may this be spent under the budget, after so much was spent before.
A report is the tight epsilon of a long run. Both are processor seconds of one thread, and nothing is remembered from
one run to the next.
"""

import dataclasses

from confide.common import calibration, pld, renyi
from confide.common.accounting import cost
from confide.common.filter import Filter
from confide.common.spend import Spend
from confide.simulations.measurement import Figure, Note, Stopwatch

EARLIER = 100_000
STEPS = 10_000
MECHANISMS = 701  # distinct ones among the earlier spends
RUNS = 15
_RUNS_OF_A_REPORT = 5
_DELTA = 1e-5
# (sampling rate, noise multiplier) of long runs, from generous to strict; a report's figure is over all of them.
_LONG_RUNS = ((0.01, 1.0), (0.1, 4.0), (0.001, 0.6), (0.02, 0.8), (0.5, 20.0))


def accounting_figures(note: Note) -> dict[str, Figure]:
    """Return `gate_ms` and `report_s`."""
    note(f"A decision after {EARLIER} spends of {MECHANISMS} mechanisms")
    decided = gate()
    note(f"A report on {STEPS} equal steps")
    return {"gate_ms": decided, "report_s": report()}


def gate(earlier: int = EARLIER, runs: int = RUNS) -> Figure:
    """Return the milliseconds of one decision and its count, for a round with a mechanism never seen before."""
    before = Filter(epsilon=50.0, delta=_DELTA).after(
        _spend(number, 0.001, 0.7 + number % MECHANISMS / 1000) for number in range(1, earlier + 1)
    )
    milliseconds = []
    for run in range(runs):
        asked = _spend(earlier + 1, 0.001, 2.0 + run / 1000)
        watch = Stopwatch()
        with watch:
            before.with_spend(asked)
        milliseconds.append(1000 * watch.seconds)
    return Figure.of(milliseconds, "ms")


def report(steps: int = STEPS, runs: int = _RUNS_OF_A_REPORT) -> Figure:
    """Return the seconds that epsilon by PLD and RDP takes for equal steps; the median is over mechanisms and runs."""
    seconds = []
    for run in range(runs):
        rate, noise = _LONG_RUNS[run % len(_LONG_RUNS)]
        _forget()
        watch = Stopwatch()
        with watch:
            cost([dataclasses.replace(_spend(1, rate, noise), steps=steps)], _DELTA)
        seconds.append(watch.seconds)
    return Figure.of(seconds, "s")


def _forget() -> None:
    """Empty everything that accounting remembers."""
    for module in (calibration, pld, renyi):
        for thing in vars(module).values():
            if hasattr(thing, "cache_clear"):
                thing.cache_clear()


def _spend(number: int, rate: float, noise: float) -> Spend:
    return Spend(
        round=number,
        sampling_rate=rate,
        noise_multiplier=noise,
        steps=1,
        clip_norm=1.0,
        divisor=100.0,
        noise="planned",
    )
