"""The peak memory of a step, with and without privacy, each taken in a process of its own.

A peak is how far resident memory rises above what it was before the steps, with the model loaded. It is the kernel's own
count, whose peak Linux can begin anew.
"""

import ctypes
import gc
import os
import re
import subprocess
from pathlib import Path

import numpy as np

from confide.common.errors import RunError
from confide.simulations.measurement import ONE_THREAD
from confide.simulations.train_ground import Ground, Sizes, command, steps_of

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def peaks_are_kept() -> bool:
    """Return whether this system keeps the peak that is needed; Linux does."""
    return _CLEAR_REFS.exists()


def peak_alone(side: str, ground: Ground, sizes: Sizes, adapter: Path) -> int:
    """Return what `peak_bytes` does, measured in a process of its own whose libraries have one thread each.

    Raises:
        RunError: That process failed.
    """
    done = subprocess.run(  # noqa: S603  these are our own words
        command(_SCRIPT, ground, sizes, side, str(adapter)),
        env=os.environ | ONE_THREAD,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RunError(f"The process that measures memory ended with {done.returncode}: {done.stderr[-500:]}")
    return int(done.stdout.splitlines()[-1])


_SCRIPT = """
import pathlib, sys, torch
from confide.simulations.train_ground import told
from confide.simulations.train_memory import peak_bytes
torch.set_num_threads(1)
print(peak_bytes(sys.argv[2], *told(sys.argv[1]), pathlib.Path(sys.argv[3])))
"""


def peak_bytes(side: str, ground: Ground, sizes: Sizes, adapter: Path) -> int:
    """Return how far the memory of this process rises in two steps of `step_rows` rows above what it was before them.

    A step on two rows is taken first and does not count: after it the libraries' code is resident, and so is what an
    optimizer keeps.

    Args:
        side: One that `steps_of` knows.
        ground: What is trained on what.
        sizes: Of the steps.
        adapter: The directory that `write_adapter` wrote.

    Raises:
        RunError: The system does not say how much memory this process has.
    """
    steps = steps_of(side, ground, sizes, adapter)
    steps.through(np.arange(2))
    steps.move()
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # else steps would fill, unseen, what loading took and gave back
    before = _status_bytes("VmRSS")
    _CLEAR_REFS.write_text("5")  # the peak begins anew from here (man 5 proc)
    for _ in range(2):
        steps.through(np.arange(sizes.step_rows))
        steps.move()
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RunError(f"{_STATUS} does not say {key}; peak memory cannot be measured on this system.")
    return int(found[1]) * 1024
