"""An agent as it runs in a terminal or under a supervisor: how it is stopped, what it says, and how others reach it."""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

from confide.common.errors import ConfideError, Refused, RunError

if TYPE_CHECKING:
    from confide.client.home import Home
    from confide.client.keys import Keys
    from confide.client.worker import Worker

METRICS_TOKEN: Final = "metrics.token"  # noqa: S105  a file's name
_CALL_S = 10.0
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_log = logging.getLogger(__name__)


def call_agent(home: "Home", what: str) -> bytes:
    """Return what the agent of this site answers to its steward; `what` is one of those that `client/worker` names.

    Raises:
        RunError: No agent runs, or it does not answer in time.
        MessageError: Who answers is no agent.
    """
    from confide.client.postbox import call
    from confide.common.messages import Envelope

    if not listens(home.control_socket):
        raise RunError(f"No agent of {home.site} runs on this machine. Start one with: confide site agent")
    return call(home.control_socket, what, Envelope(body=b"{}"), _CALL_S).body


def listens(path: Path) -> bool:
    """Return whether somebody listens at a socket; one that a killed agent left behind is there, and nobody does."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_CALL_S)
        try:
            connection.connect(os.fspath(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:  # it is busy, or not ours: whoever calls it is told
            return True
    return True


@contextlib.contextmanager
def told(worker: "Worker") -> Iterator[None]:
    """Tell in short lines on the standard error what happens meanwhile, and warnings to the trail as well.

    What ends the agent is in the trail too, by its class and rule.
    """
    from confide.client.trail import TrailHandler

    lines = logging.StreamHandler(sys.stderr)
    lines.setLevel(logging.INFO)
    lines.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    logger, handlers = logging.getLogger("confide"), (lines, TrailHandler(worker.trail))
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
        _log.info("the agent has stopped")
    except ConfideError as error:
        rule = error.rule if isinstance(error, Refused) else ""
        with contextlib.suppress(RunError):  # what went wrong first is what is told
            worker.trail.record("agent-refused", {"error": type(error).__name__, "rule": rule, "text": str(error)})
        raise
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
        logger.level, logger.propagate = before


@contextlib.contextmanager
def ended_by_signals(worker: "Worker") -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and a terminal that is closed end what the agent does in the body, in order."""

    def end(number: int, frame: FrameType | None) -> None:
        if not worker.serving:
            raise _Interrupted
        # Not here: what was interrupted may hold a lock that stopping needs.
        threading.Thread(target=worker.stop, name="stop", daemon=True).start()

    before = {kind: signal.signal(kind, end) for kind in _ENDS}
    try:
        with contextlib.suppress(_Interrupted):
            yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextlib.contextmanager
def metrics_page(worker: "Worker", home: "Home", keys: "Keys", port: int) -> Iterator[Path]:
    """Serve the agent's metrics on this machine meanwhile, and give the file with the token that a reader must send.

    Raises:
        UsageError: The port is taken.
    """
    from confide.client.home import replace_private

    token, file = keys.secret(b"metrics").hex(), home.keys / METRICS_TOKEN
    with worker.gauges.serve(port, token) as page:
        replace_private(file, f"{token}\n".encode())
        worker.trail.record("metrics", {"port": page.port})
        _log.info("metrics are at http://127.0.0.1:%d/metrics for who sends the token in %s", page.port, file)
        yield file


class _Interrupted(BaseException):
    """The agent was told to end before it served."""
