"""The process beside an agent that holds model and rows and trains: what `client/child_trainer` starts and may kill.

It loads once, and trains round after round. Whatever fails ends it, once it has told what it was; others' words may hold
rows, so these it keeps to itself.
"""

import contextlib
import ctypes
import dataclasses
import gc
import logging
import os
import resource
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from confide.client.link import LONGEST_TEXT, Ended, Link, Load, Message, floats, raw
from confide.client.mechanism import Mechanism
from confide.client.noise import CryptographicNoise
from confide.client.persons import person_digest, read_persons
from confide.common.errors import ConfideError, DataError, MessageError, RunError
from confide.common.plan import Plan, read_plan

if TYPE_CHECKING:
    from confide.client.private_trainer import PrivateTrainer
    from confide.common.examples import Examples

_PR_SET_PDEATHSIG = 1


def serve(descriptor: int) -> None:
    """Be the child at the other end of the socket `descriptor`: load once, train round after round, end with the parent.

    Whatever fails ends the child, once it has told what it was.
    """
    os.set_inheritable(descriptor, False)
    link = Link(socket.socket(fileno=descriptor))
    _end_with_the_parent(link)
    logging.getLogger("confide").addHandler(_Telling(link))
    try:
        trainer = _loaded(link)
        while True:
            _train(link, trainer)
    except Ended:
        pass
    except BaseException as error:
        with contextlib.suppress(OSError):
            link.send("failed", _told(error))
        raise SystemExit(1) from None


def _loaded(link: Link) -> "PrivateTrainer":
    """Load what the parent describes, and tell it what there is. The self-test comes before the first row."""
    from confide.client.conformance import certify
    from confide.client.private_trainer import PrivateTrainer
    from confide.common.model import attach
    from confide.common.prefix import PrefixCache

    load = Load.of(_expected(link, "load"))
    plan = read_plan(load.plan)
    model = attach(load.model, plan)
    cached = PrefixCache.helps(model)
    certificate = certify(model, cached=cached)
    examples, fingerprint = _rows(load, plan)
    cache = PrefixCache(model, plan.compute.micro_batch) if cached else None
    for _ in cache.add(examples) if cache is not None else ():
        pass
    trainer = PrivateTrainer(
        certificate, examples, cache, load.personal, lambda step: link.send("step", {"begun": step})
    )
    told = {
        "persons": examples.person_count,
        "layout": [[name, list(shape)] for name, shape in model.layout.tensors],
        "head": sorted(model.head),
        "fingerprint": fingerprint,
    }
    _let_go()
    link.send("ready", told, raw(model.start))
    return trainer


def _let_go() -> None:
    """Give back the memory that loading and the self-test needed and nothing needs any more."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # only the C library of most Linux systems can be asked
        ctypes.CDLL(None).malloc_trim(0)


def _train(link: Link, trainer: "PrivateTrainer") -> None:
    """Train the next round; each step is told of before it begins."""
    order = _expected(link, "train")
    terms = dict(order.fields)
    number = terms.pop("round")
    delta = trainer.train(number, floats(order.payload), Mechanism(**terms), CryptographicNoise())
    evidence = dataclasses.asdict(trainer.evidence.pop(number))
    link.send("trained", {"round": number, **evidence}, raw(delta.values))


def _expected(link: Link, kind: str) -> Message:
    message = link.receive()
    if message.kind != kind:
        raise MessageError(f"The agent sent {message.kind!r} where {kind!r} was due.")
    return message


def _rows(load: Load, plan: Plan) -> "tuple[Examples, str]":
    """Return the rows of those who have not withdrawn, and the fingerprint of the very table they were read from."""
    from confide.client.data import load_reader, read_examples

    fingerprint = _fingerprint(load)
    reading = read_examples(load.table, plan, load_reader(load.model, plan), extra_column=load.person_column or None)
    examples = reading.examples
    if load.withdrawn:
        column = reading.column or ()
        gone = {whose for whose in set(column) if person_digest(load.person_key, load.ids, whose) in load.withdrawn}
        kept = np.array([row for row, whose in enumerate(column) if whose not in gone], np.int64)
        if not len(kept):
            raise DataError(f"{load.table}: all persons have withdrawn, so no row remains.")
        examples = examples.subset(kept)
    if _fingerprint(load) != fingerprint:
        raise DataError(f"{load.table} changed while it was read. Let it be, and try again.")
    return examples, fingerprint


def _fingerprint(load: Load) -> str:
    if not load.fingerprint:
        return ""
    return read_persons(load.table, load.person_column or None, load.person_key, load.ids).fingerprint


class _Telling(logging.Handler):
    """Sends what the package's own loggers say to the parent. Our messages hold no rows; those of libraries stay."""

    def __init__(self, link: Link) -> None:
        super().__init__(logging.INFO)
        self._link = link

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()[:LONGEST_TEXT]
        with contextlib.suppress(OSError):
            self._link.send("log", {"level": record.levelno, "logger": record.name, "text": text})


def _told(error: BaseException) -> dict[str, object]:
    """Return what the parent is told of an error: our own words, or where it happened; others' words may hold rows."""
    if isinstance(error, ConfideError):
        return {"error": type(error).__name__, "text": str(error)[:LONGEST_TEXT]}
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}, line {frame.lineno}"
    text = f"{type(error).__name__} in {place}. What it says may hold rows, so it is not told."
    return {"error": RunError.__name__, "text": text}


def _end_with_the_parent(link: Link) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no rows in a core dump
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")  # rather this process than the agent
    threading.Thread(target=_end_at_hang_up, args=(link,), daemon=True).start()


def _end_at_hang_up(link: Link) -> None:
    link.wait_for_the_end()
    os.killpg(os.getpid(), signal.SIGKILL)  # it leads its session
