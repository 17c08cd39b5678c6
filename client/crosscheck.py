"""A second opinion on epsilon: Opacus' PRV accountant, which shares neither code nor method with ours.

It may take any amount of time and memory, so it runs in a process of its own that is cut off at both. That it did not
come to an end says nothing against the number; that it came to another one does.
"""

import contextlib
import dataclasses
import json
import math
import os
import resource
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from confide.common.accounting import cost
from confide.common.errors import PrivacyError
from confide.common.spend import Spend

# How far PRV may lie from PLD: as a part of it, or in epsilon, whichever is more. Both are bounds, PRV's to within 0.01.
RELATIVE, ABSOLUTE = 0.03, 0.02
_EPSILON_ERROR = 0.01
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Opinion:
    """What PRV says.

    Attributes:
        epsilon: Its upper bound, or None if it came to none.
        reason: Why there is none: `timeout`, `memory` or `failed: ` and the class of what went wrong; else empty.
    """

    epsilon: float | None
    reason: str = ""


def crosscheck(spends: Iterable[Spend], delta: float, *, timeout_s: float = 60.0, memory_mb: int = 2048) -> Opinion:
    """Return PRV's opinion on what `spends` cost; where it has one, it agrees with PLD.

    Args:
        spends: What happened, of one site.
        delta: Above 0, below 1.
        timeout_s: Seconds of wall time, those for loading Opacus included, about four.
        memory_mb: MiB that the computation may take beyond the loaded libraries.

    Raises:
        PrivacyError: The two differ by more than RELATIVE and ABSOLUTE, so one of them is wrong; or delta is out of range.
    """
    events = tuple(spends)
    ours = cost(events, delta).pld
    opinion = prv(events, delta, timeout_s=timeout_s, memory_mb=memory_mb)
    if opinion.epsilon is None or math.isinf(ours):
        return opinion
    allowed = max(ABSOLUTE, RELATIVE * ours)
    if abs(opinion.epsilon - ours) > allowed:
        raise PrivacyError(
            f"Two accountants disagree: PLD says epsilon = {ours:.4g} and Opacus' PRV {opinion.epsilon:.4g} at delta = "
            f"{delta:g}; they may differ by {allowed:.2g}. Claim neither. Report this with the versions of dp-accounting and opacus."
        )
    return opinion


def prv(spends: Iterable[Spend], delta: float, *, timeout_s: float = 60.0, memory_mb: int = 2048) -> Opinion:
    """Return epsilon by Opacus' PRV accountant, or why there is none, after at most about `timeout_s` seconds.

    Source: Gopi, Lee, Wutschitz 2021 (arXiv 2106.02848), as in Opacus.
    """
    steps: Counter[tuple[float, float]] = Counter()
    for spend in spends:
        steps[spend.noise_multiplier, spend.sampling_rate] += spend.steps
    if not steps:
        return Opinion(epsilon=0.0)
    asked = {"history": [(*key, count) for key, count in steps.items()], "delta": delta, "memory_mb": memory_mb}
    command = [sys.executable, "-W", "ignore", "-m", __spec__.name, json.dumps(asked)]
    try:
        # At the limit the child is killed by its handle; a signal handler inside would wait for compiled code to return.
        done = subprocess.run(  # noqa: S603  these are our own words
            command, capture_output=True, text=True, check=False, timeout=timeout_s, env=os.environ | _ONE_THREAD
        )
    except subprocess.TimeoutExpired:
        return Opinion(epsilon=None, reason="timeout")
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
        return Opinion(epsilon=answer["epsilon"], reason=answer["reason"])
    except (IndexError, ValueError, KeyError, TypeError):
        return Opinion(epsilon=None, reason=f"failed: exit {done.returncode}")


def _child(asked: str) -> None:
    """Compute in this process, which is made for it, and print the answer."""
    warnings.simplefilter("ignore")
    question = json.loads(asked)
    from opacus.accountants import PRVAccountant

    _limit_memory(question["memory_mb"] << 20)
    epsilon, reason = None, ""
    try:
        accountant = PRVAccountant()
        accountant.history = [tuple(entry) for entry in question["history"]]
        found = float(accountant.get_epsilon(question["delta"], eps_error=_EPSILON_ERROR))
        if math.isfinite(found) and found >= 0:
            epsilon = found
        else:
            reason = "failed: NoEpsilon"  # it is known to give negative ones
    except MemoryError:
        reason = "memory"
    except Exception as error:  # whatever goes wrong in there, its class is the answer
        reason = f"failed: {type(error).__name__}"
    print(json.dumps({"epsilon": epsilon, "reason": reason}))


def _limit_memory(more_bytes: int) -> None:
    """Let this process take so much more memory than it has; where the system knows no such limit, time alone limits."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()
    except OSError:
        return
    size = resource.getpagesize()
    for kind, held in ((resource.RLIMIT_AS, int(pages[0])), (resource.RLIMIT_DATA, int(pages[5]))):
        with contextlib.suppress(ValueError, OSError):  # a lower limit is set from outside, which is as good
            resource.setrlimit(kind, (held * size + more_bytes, held * size + more_bytes))


if __name__ == "__main__":
    _child(sys.argv[1])
