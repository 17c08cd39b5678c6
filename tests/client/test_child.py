"""Training in a process that can be killed: what the parent then knows, and what the child never does.

Most of these tests speak with a stand-in for the child, which needs no torch and misbehaves as it is told.
"""

import contextlib
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from confide.client import child, child_trainer, link
from confide.client.child_trainer import ChildTrainer
from confide.client.link import Load
from confide.client.mechanism import GivenUp, Mechanism, Trainer
from confide.client.noise import CryptographicNoise
from confide.client.persons import SAME_PERSONS, person_digest, read_persons
from confide.common.adapter import Floats
from confide.common.canonical import canonical_bytes
from confide.common.errors import MessageError, ModelError, Refused, RunError, UsageError
from confide.common.model import attach
from confide.common.plan import read_plan
from tests.conftest import LABELS, WORDS, plan_text

KEY = bytes(range(32))
MECHANISM = Mechanism(sampling_rate=0.5, clip_norm=1.0, noise_multiplier=1.0, steps=2, divisor=10.0)
ENDLESS = dataclasses.replace(MECHANISM, steps=10_000_000)
HEAVY = ("torch", "transformers", "peft", "opacus", "flwr")


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ninety rows of thirty persons."""
    random = np.random.default_rng(4)
    lines = [f"{' '.join(random.choice(WORDS, 4))},{LABELS[row % 3]}, p{row % 30} " for row in range(90)]
    path = tmp_path_factory.mktemp("table") / "rows.csv"
    path.write_text("\n".join(["text,label,whose", *lines]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def load(base_directory: Path, people: Path) -> Load:
    """What a real child loads: a method that keeps something at the site; one person has withdrawn."""
    text = plan_text(base_directory).replace('method = "ffa"', 'method = "share-a"')
    text = text.replace('label = "label"', 'label = "label"\nperson_id = "whose"')
    assert {"share-a", "whose"} <= set(text.split('"'))
    return Load(
        plan=text.encode(),
        model=base_directory,
        table=people,
        person_column="whose",
        ids=SAME_PERSONS,
        person_key=KEY,
        withdrawn=digests("p3"),
        fingerprint=True,
        personal=people.parent / "personal",
    )


@pytest.fixture(scope="module")
def trainer(load: Load) -> Iterator[ChildTrainer]:
    """A real child."""
    with ChildTrainer(load, deadline_s=60, load_s=120) as made:
        yield made


def digests(*persons: str) -> frozenset[bytes]:
    return frozenset(person_digest(KEY, SAME_PERSONS, person) for person in persons)


def test_an_agent_imports_no_torch() -> None:
    names = ("agent", "child", "postbox", "trail", "gauges")
    script = f"import sys, {', '.join(f'confide.client.{name}' for name in names)}; print(*sys.modules)"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert not set(HEAVY) & set(done.stdout.split())


def test_a_child_tells_what_the_model_is_and_loads_only_those_who_have_not_withdrawn(
    trainer: ChildTrainer, load: Load, base_directory: Path
) -> None:
    as_the_agent_sees_it: Trainer = trainer
    model = attach(base_directory, read_plan(load.plan))

    assert as_the_agent_sees_it.person_count == 29
    assert as_the_agent_sees_it.layout_digest == model.layout.digest
    np.testing.assert_array_equal(trainer.start, model.start)
    assert trainer.layout == model.layout
    assert frozenset(trainer.head) == model.head
    assert trainer.fingerprint == read_persons(load.table, "whose", KEY).fingerprint


def test_a_child_loads_once_and_trains_many_rounds_with_fresh_noise(trainer: ChildTrainer) -> None:
    process = trainer.process

    deltas = [trainer.train(number, trainer.start, MECHANISM, CryptographicNoise()) for number in (1, 2, 3)]

    assert trainer.process == process
    assert all(delta.values.shape == trainer.start.shape for delta in deltas)
    assert all(np.count_nonzero(delta.values) == len(delta.values) for delta in deltas)
    assert not np.array_equal(deltas[0].values, deltas[2].values)


def test_exact_evidence_comes_back_for_the_sites_own_use(trainer: ChildTrainer) -> None:
    trainer.train(1, trainer.start, dataclasses.replace(MECHANISM, sampling_rate=1.0, steps=3), CryptographicNoise())

    evidence = trainer.evidence[1]
    assert evidence["batch_sizes"] == (29, 29, 29)
    assert evidence["non_finite"] == 0
    assert evidence.keys() == {"batch_sizes", "clipped", "non_finite"}
    assert json.loads(trainer.evidence_of(1)) == {**evidence, "batch_sizes": [29, 29, 29]}
    assert trainer.evidence_of(99) == b""


def test_a_child_draws_only_noise_that_nobody_can_repeat_and_never_trains_without(trainer: ChildTrainer) -> None:
    process = trainer.process

    class Seeded(CryptographicNoise):
        name = "insecure_seeded_noise"

    with pytest.raises(Refused, match="insecure_seeded_noise was asked"):
        trainer.train(1, trainer.start, MECHANISM, Seeded())
    with pytest.raises(Refused, match="never trains without"):
        trainer.train(1, trainer.start, MECHANISM.insecure_no_noise(), CryptographicNoise())

    assert trainer.process == process


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_child_is_given_no_secret_of_the_environment_and_leads_its_own_session(trainer: ChildTrainer) -> None:
    assert trainer.process is not None

    names = {entry.partition(b"=")[0] for entry in Path(f"/proc/{trainer.process}/environ").read_bytes().split(b"\0")}

    assert b"HF_HUB_OFFLINE" in names
    assert all(
        not name or name.decode().startswith((*child_trainer._PASSED, *child_trainer._SETTINGS)) for name in names
    )
    assert not any("PASS" in prefix or "CONFIDE" in prefix for prefix in child_trainer._PASSED)
    assert os.getsid(trainer.process) == trainer.process != os.getsid(0)


def test_a_real_round_is_stopped_from_another_thread_and_the_next_one_leaves_out_who_withdrew(
    trainer: ChildTrainer, load: Load
) -> None:
    before = trainer.process

    given_up = stopped(trainer, lambda: threading.Timer(0.5, trainer.stop).start())
    trainer.change(dataclasses.replace(load, withdrawn=digests("p3", "p4", "unknown")))
    delta, persons = trainer.train(2, trainer.start, MECHANISM, CryptographicNoise()), trainer.person_count
    trainer.change(load)  # as the other tests know it

    assert 1 <= given_up.steps_begun < ENDLESS.steps
    assert "told to stop" in str(given_up)
    assert before is not None
    assert gone(before)
    assert persons == 28
    assert len(delta.values) == len(trainer.start)


def test_what_stays_at_the_site_is_kept_where_the_site_says(trainer: ChildTrainer, load: Load) -> None:
    trainer.train(7, trainer.start, MECHANISM, CryptographicNoise())

    assert load.personal is not None
    assert "personal-7.safetensors" in {path.name for path in load.personal.iterdir()}


def test_another_base_model_than_the_plans_is_refused_in_the_class_and_words_of_the_child(load: Load) -> None:
    digest = read_plan(load.plan).model.base_digest
    other = load.plan.replace(digest.encode(), b"sha256:" + b"0" * 64)

    with pytest.raises(ModelError, match="the plan names sha256:0000"):
        ChildTrainer(dataclasses.replace(load, plan=other), deadline_s=60)


def test_who_has_withdrawn_must_be_told_from_the_rows() -> None:
    def described(**changes: object) -> Load:
        return dataclasses.replace(
            Load(plan=b"", model=Path("m"), table=Path("t")),
            **changes,  # type: ignore[arg-type]
        )

    with pytest.raises(UsageError, match="no column"):
        described(withdrawn=digests("p1"), person_key=KEY)
    with pytest.raises(UsageError, match="person_key"):
        described(withdrawn=digests("p1"), person_column="whose")
    with pytest.raises(UsageError, match="person_key"):
        described(fingerprint=True)
    with pytest.raises(UsageError, match="32 bytes"):
        described(withdrawn=frozenset({b"short"}), person_column="whose", person_key=KEY)


def test_no_key_and_no_person_is_shown(load: Load) -> None:
    shown = repr(load)

    assert "person_key" not in shown
    assert "withdrawn" not in shown
    assert KEY.hex() not in shown


# The stand-in: it answers the load, and then does what the test says with the round.
PRELUDE = """
import os, struct, sys, time
import numpy as np
from confide.client import child
from confide.client.child import _end_with_the_parent
from confide.client.link import _HEAD, _MAGIC, Link, raw
import socket
link = Link(socket.socket(fileno=int(sys.argv[1])))
_end_with_the_parent(link)
load = link.receive()
start = np.zeros(4, np.float32)
ready = {"persons": 9, "layout": [["w", [4]]], "head": ["w"], "fingerprint": ""}
def tell():
    link.send("ready", ready, raw(start))
    return link.receive()
def step(number):
    link.send("step", {"begun": number})
def trained(values=start, **changes):
    told = {"round": 1, "batch_sizes": [3, 4], "clipped": 1, "non_finite": 0, **changes}
    link.send("trained", told, values if isinstance(values, bytes) else raw(values))
"""

Standing = Callable[..., ChildTrainer]


@pytest.fixture
def standing(
    load: Load, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Standing]:
    """Return a maker of trainers whose child is a stand-in that runs the given lines."""
    made = contextlib.ExitStack()

    def make(lines: str, **limits: float) -> ChildTrainer:
        monkeypatch.setattr(child_trainer, "_COMMAND", PRELUDE + textwrap.dedent(lines))
        described = dataclasses.replace(load, fingerprint=False, withdrawn=frozenset())
        return made.enter_context(ChildTrainer(described, **{"deadline_s": 20, "load_s": 20, **limits}))  # type: ignore[arg-type]

    with made:
        yield make


def stopped(trainer: ChildTrainer, end: Callable[[], object], mechanism: Mechanism = ENDLESS) -> GivenUp:
    """Return how a round is given up that `end` ends."""
    end()
    with pytest.raises(GivenUp) as caught:
        trainer.train(1, trainer.start, mechanism, CryptographicNoise())
    return caught.value


def gone(process: int) -> bool:
    """Return whether a process has ended, within a few seconds."""
    for _ in range(100):
        try:
            os.kill(process, 0)
            if sys.platform == "linux" and " Z " in Path(f"/proc/{process}/stat").read_text(encoding="utf-8"):
                if (
                    len(os.listdir(f"/proc/{process}/task")) == 1
                ):  # its other threads, which hold its files, are gone too
                    return True  # nobody has waited for it yet
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def test_a_round_that_keeps_to_the_protocol_is_taken(standing: Standing) -> None:
    trainer = standing("tell(); step(1); step(2); trained(start + 1); link.receive()")

    delta = trainer.train(1, trainer.start, MECHANISM, CryptographicNoise())

    assert delta.values.tolist() == [1, 1, 1, 1]
    assert trainer.evidence[1] == {"batch_sizes": (3, 4), "clipped": 1, "non_finite": 0}


@pytest.mark.parametrize(
    ("lines", "begun", "why"),
    [
        ("os._exit(3)", 0, "code 3"),
        ("step(1); os._exit(3)", 1, "code 3"),
        ("step(1); os.kill(os.getpid(), 9)", 1, "perhaps because the machine ran out of memory"),
        ("step(1); link.send('failed', {'error': 'DataError', 'text': 'in words'})", 1, "in words"),
        ("step(1); link.send('failed', {'error': 'GivenUp', 'text': 'no class of ours'})", 1, "no class of ours"),
        ("step(1); trained()", 2, "no update"),
        ("step(1); step(2); trained(round=2)", 2, "another round"),
        ("step(1); step(2); trained(batch_sizes=[1])", 2, "another round"),
        ("step(1); step(2); trained(batch_sizes=[1, 10])", 2, "another round"),
        ("step(1); step(2); trained(batch_sizes=[1, True])", 2, "another round"),
        ("step(1); step(2); trained(np.zeros(5, np.float32))", 2, "no update"),
        ("step(1); step(2); trained(start + np.nan)", 2, "no update"),
        ("step(1); step(2); trained(bytes(15))", 2, "in the middle of a number"),
        ("step(2)", 2, "do not follow"),
        ("step(1); step(1)", 2, "do not follow"),
        ("step(1); step(2); step(3)", 2, "do not follow"),
        ("link.send('ready', ready, raw(start))", 2, "where 'trained' was due"),
        ("link._connection.sendall(b'x' * 100)", 2, "no frame"),
        ("link._connection.sendall(_HEAD.pack(_MAGIC, 1 << 31, 0))", 2, "no frame"),
        ("link._connection.sendall(_HEAD.pack(_MAGIC, 2, 1 << 40) + b'{}')", 2, "no frame"),
        ("link._connection.sendall(_HEAD.pack(_MAGIC, 20, 0) + b'{'); os._exit(0)", 2, "in the middle of a message"),
        ("link._connection.sendall(_HEAD.pack(_MAGIC, 2, 0) + b'{}')", 2, "no message"),
    ],
)
def test_a_child_that_dies_or_misbehaves_costs_the_steps_it_told_of_or_else_all(
    standing: Standing, lines: str, begun: int, why: str
) -> None:
    trainer = standing(f"tell(); {lines}; time.sleep(30)")

    given_up = stopped(trainer, lambda: None, MECHANISM)

    assert given_up.steps_begun == begun
    assert why in str(given_up)
    assert isinstance(given_up, RunError)
    assert trainer.process is None
    assert 1 not in trainer.evidence


def test_no_step_beyond_steps_begun_has_looked_at_a_row(standing: Standing, tmp_path: Path) -> None:
    """The stand-in writes down each step after it told of it, as the trainer looks at rows; it is killed at any moment."""
    note = tmp_path / "looked"
    trainer = standing(
        f"""
        tell()
        note = os.open({str(note)!r}, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for number in range(1, 10_000_000):
            step(number)
            os.pwrite(note, struct.pack("<Q", number), 0)
        """
    )

    for delay in np.random.default_rng(1).uniform(0.0, 0.05, 8):
        given_up = stopped(trainer, threading.Timer(float(delay), trainer.stop).start)
        looked = int.from_bytes(note.read_bytes() if note.exists() else b"", "little")

        assert looked <= given_up.steps_begun <= looked + 1
        note.unlink(missing_ok=True)


def test_a_round_that_takes_too_long_is_killed(standing: Standing) -> None:
    trainer = standing("tell(); step(1); time.sleep(60)", deadline_s=0.3)
    process, began = trainer.process, time.monotonic()

    given_up = stopped(trainer, lambda: None)

    assert time.monotonic() - began < 5
    assert given_up.steps_begun == 1
    assert "longer than 0.3 s" in str(given_up)
    assert process is not None
    assert gone(process)


def test_a_round_whose_time_is_over_in_the_middle_of_a_message_costs_the_steps_that_had_begun_and_no_more(
    standing: Standing,
) -> None:
    trainer = standing(
        """
        tell()
        number = 0
        while True:
            number += 1
            step(number)
            time.sleep(0.01)
        """,
        deadline_s=0.3,
    )

    for _ in range(3):
        given_up = stopped(trainer, lambda: None)

        assert 1 <= given_up.steps_begun <= 35
        assert "longer than 0.3 s" in str(given_up)


def test_a_child_that_does_not_take_in_what_it_is_sent_is_killed(standing: Standing) -> None:
    trainer = standing("link.send('ready', ready, raw(start)); time.sleep(60)", deadline_s=0.5)

    with pytest.raises(GivenUp) as caught:
        trainer.train(1, np.zeros(10_000_000, np.float32), MECHANISM, CryptographicNoise())

    assert caught.value.steps_begun == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_child_that_takes_too_much_memory_is_killed(standing: Standing) -> None:
    trainer = standing("tell(); step(1); held = b'x' * (500 << 20); time.sleep(60)", memory_mb=400)

    given_up = stopped(trainer, lambda: None)

    assert given_up.steps_begun == 1
    assert "400 are allowed" in str(given_up)


def test_an_order_to_stop_is_not_lost_between_two_rounds(standing: Standing) -> None:
    trainer = standing("tell(); step(1); step(2); trained(); link.receive()")

    trainer.stop()
    given_up = stopped(trainer, lambda: None, MECHANISM)
    delta = trainer.train(1, trainer.start, MECHANISM, CryptographicNoise())

    assert given_up.steps_begun == 0
    assert "told to stop" in str(given_up)
    assert len(delta.values) == 4


def test_a_child_that_died_between_rounds_costs_no_round(standing: Standing) -> None:
    trainer = standing("tell(); step(1); step(2); trained(); link.receive()")
    first = trainer.process
    assert first is not None

    os.kill(first, signal.SIGKILL)
    assert gone(first)
    delta = trainer.train(1, trainer.start, MECHANISM, CryptographicNoise())

    assert len(delta.values) == 4
    assert trainer.process != first


def test_a_child_that_cannot_load_says_why_and_leaves_nothing_behind(standing: Standing) -> None:
    before = set(threading.enumerate())

    with pytest.raises(ModelError, match="in words"):
        standing("link.send('failed', {'error': 'ModelError', 'text': 'in words'})")
    with pytest.raises(RunError, match=r"could not load: the child ended \(code 7\)"):
        standing("os._exit(7)")
    with pytest.raises(RunError, match=r"loading took longer than 0\.5 s"):
        standing("time.sleep(60)", load_s=0.5)
    with pytest.raises(MessageError, match="cannot be"):
        standing("ready['persons'] = 0; tell()")

    assert set(threading.enumerate()) <= before


def test_rows_that_change_between_two_loads_are_not_trained_unsaid(standing: Standing, tmp_path: Path) -> None:
    mark = tmp_path / "seen"
    trainer = standing(
        f"mark = {str(mark)!r}; ready['persons'] = 5 if os.path.exists(mark) else 9; tell(); time.sleep(9)"
    )
    mark.touch()

    stopped(trainer, threading.Timer(0.1, trainer.stop).start)
    given_up = stopped(trainer, lambda: None)

    assert given_up.steps_begun == 0
    assert "has changed since it was loaded" in str(given_up)


def test_a_child_that_dies_between_rounds_is_known_to_be_gone_at_once(standing: Standing) -> None:
    trainer = standing("tell()")
    process = trainer.process
    assert process is not None

    os.kill(process, signal.SIGKILL)

    assert gone(process)
    assert trainer.process is None
    trainer.load()
    assert trainer.process not in {None, process}


def test_a_closed_trainer_trains_nothing(standing: Standing) -> None:
    trainer = standing("tell()")

    trainer.close()

    assert trainer.process is None
    assert stopped(trainer, lambda: None).steps_begun == 0


def test_a_trainer_stays_with_its_plan(standing: Standing, load: Load) -> None:
    trainer = standing("tell()")

    with pytest.raises(UsageError, match="one plan"):
        trainer.change(dataclasses.replace(load, plan=load.plan.replace(b"rounds = 3", b"rounds = 4")))


def test_what_the_child_warns_of_is_in_the_parents_log(standing: Standing, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    trainer = standing(
        """
        tell()
        import logging
        logging.getLogger("confide").addHandler(child._Telling(link))
        logging.getLogger("confide.client.data").warning("of %d kinds", 2)
        logging.getLogger("transformers").warning("a row")
        step(1); step(2); trained()
        """
    )

    trainer.train(1, trainer.start, MECHANISM, CryptographicNoise())

    told = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert told == [("confide.client.data", "WARNING", "in the child: of 2 kinds")]


def test_words_of_others_are_kept_back_for_they_may_hold_rows() -> None:
    try:
        raise ValueError("Mrs Smith, 12 May")
    except ValueError as error:
        told = child._told(error)

    assert "Smith" not in str(told)
    assert "ValueError in test_child.py, line" in str(told)


@pytest.mark.parametrize("end", ["os._exit(1)", "os.kill(os.getpid(), 9)"])
def test_a_child_ends_when_its_parent_dies(load: Load, tmp_path: Path, end: str) -> None:
    script = f"""
import os, sys, time
from pathlib import Path
from confide.client import child_trainer
from confide.client.link import Load
child_trainer._COMMAND = {PRELUDE!r} + "tell(); step(1)\\nwhile True: pass"
plan = Path({str(tmp_path / "plan")!r}).read_bytes()
trainer = child_trainer.ChildTrainer(Load(plan=plan, model=Path("m"), table=Path("t")), deadline_s=60)
print(trainer.process, flush=True)
{end}
"""
    (tmp_path / "plan").write_bytes(load.plan)

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert gone(int(done.stdout))


@settings(max_examples=200)
@given(body=st.binary(max_size=200) | st.sampled_from([b'{"kind":"step","begun":1}', b"[]", b"NaN", b'{"kind":[]}']))
def test_what_is_no_message_is_refused_whatever_it_is(body: bytes) -> None:
    with pytest.raises(MessageError, match="no message"):
        link._read(body, bytearray())


@given(begun=st.integers(1, 2**63), more=st.dictionaries(st.text(max_size=5), st.integers(), max_size=2))
def test_a_message_has_one_spelling_and_exactly_its_fields(begun: int, more: dict[str, int]) -> None:
    body = canonical_bytes({**more, "kind": "step", "begun": begun})

    if set(more) <= {"kind", "begun"}:
        assert link._read(body, bytearray()).fields == {"begun": begun}
        with pytest.raises(MessageError):
            link._read(body + b" ", bytearray())
        with pytest.raises(MessageError):
            link._read(body, bytearray(4))
    else:
        with pytest.raises(MessageError):
            link._read(body, bytearray())


@given(values=st.lists(st.floats(width=32, allow_nan=False), max_size=9))
def test_vectors_travel_bit_for_bit(values: list[float]) -> None:
    vector: Floats = np.array(values, np.float32)

    assert link.floats(bytearray(link.raw(vector))).tobytes() == vector.tobytes()
