"""What benchmarks are made of: a figure, a note on the way, and a watch of processor time."""

import dataclasses
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from confide.common.errors import RunError

Note = Callable[[str], None]
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)


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


def figures_alone(command: Sequence[str], note: Note) -> dict[str, Figure]:
    """Return the figures that a process of its own measures, whose libraries have one thread each.

    Libraries read how many threads they may have when they are loaded, which here they are already.

    Args:
        command: What it runs; the file to which it must write its figures, as JSON, comes behind as the last argument.
        note: Is told each line that it says on standard error.

    Raises:
        RunError: That process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "figures.json"
        said = []
        with subprocess.Popen(  # noqa: S603  these are our own words
            [*command, str(result)],
            env=os.environ | ONE_THREAD,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            for line in process.stderr or ():
                said.append(line.rstrip())
                note(said[-1])
        if process.returncode != 0:
            raise RunError(f"The process that measures ended with {process.returncode}: {' '.join(said)[-500:]}")
        figures = json.loads(result.read_bytes())
    return {name: Figure(**{**figure, "spread": tuple(figure["spread"])}) for name, figure in figures.items()}
