"""What benchmarks are made of: a figure, a note on the way, and a watch of processor time."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Self

Note = Callable[[str], None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured number.

    Attributes:
        value: The median.
        unit: `s`, `x` for a ratio, and so on.
        peer: What it is compared with; empty for a figure of our own.
        runs: How many runs the median is over.
        spread: The lowest and the highest of them.
    """

    value: float
    unit: str
    peer: str
    runs: int
    spread: tuple[float, float]

    @classmethod
    def of(cls, values: Sequence[float], unit: str, peer: str = "") -> Self:
        """Return the figure of these runs."""
        return cls(
            value=statistics.median(values), unit=unit, peer=peer, runs=len(values), spread=(min(values), max(values))
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Processor seconds of one round of a summation.

    Attributes:
        site_s: Of one site: what all sites took, over how many were asked.
        server_s: Of the server.
    """

    site_s: float
    server_s: float


class Stopwatch:
    """Adds up the processor seconds, of all threads of this process, that pass inside its `with` statements.

    What else the machine does is left out, so far as it doesn't take caches and memory away.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    def __enter__(self) -> Self:
        self._began = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.process_time() - self._began
