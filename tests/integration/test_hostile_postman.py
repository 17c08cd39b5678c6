"""Whoever holds the wire to a real agent, its socket or its neighbours' keys, gets a fixed sentence and costs nothing.

One real worker with its sockets and its child serves all of these tests. After every attack the ledger is what it was,
and the agent completes an honest round.
"""

import dataclasses
import itertools
import json
import os
import random
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from confide.client import postbox
from confide.client.agent import LAST_ATTEMPT
from confide.client.postbox import private_folder
from confide.client.trail import Allowance, verify_trail
from confide.client.worker import METRICS, STATUS, STOP, Worker
from confide.common.canonical import canonical_bytes
from confide.common.crypto import Identity
from confide.common.errors import ConfideError
from confide.common.messages import (
    LARGEST_BODY_BYTES,
    Advertisement,
    Confirmation,
    Contribution,
    Envelope,
    Failure,
    MaskedVector,
    Message,
    Opening,
    Peers,
    Shares,
    Signatures,
    Start,
    Survivors,
    kind_of,
    open_envelope,
    seal,
)
from confide.common.model import attach
from tests import living
from tests.conftest import plan_text
from tests.evil import spoiled
from tests.living import ADMIN, NAME, PEERS, RUN, STRANGER, Living, Others, failure

pytestmark = pytest.mark.slow  # a real agent with its child

ROOT = sys.platform == "linux" and os.geteuid() == 0
as_root = pytest.mark.skipif(not ROOT, reason="only root can become another user, and only Linux is asked")
POSTMAN, GROUP, OTHER_GROUP = 54_321, 54_322, 54_323
HEAD = struct.Struct(">18sHII")
MAGIC = b"confide-postbox/1\n"
DIGEST = "sha256:" + "5" * 64


class Scene:
    """A real agent that serves, and the rest of its federation."""

    def __init__(self, site: Living, worker: Worker, others: Others) -> None:
        self.site = site
        self.worker = worker
        self.others = others
        self.round = 0  # the last one that was begun

    @contextmanager
    def attacked(self, rounds: int = 0) -> Iterator[None]:
        """What happens in it costs nothing but these rounds; afterwards an honest round gives a sum with the site in it."""
        before = self.site.book
        yield
        after = self.site.book
        assert len(after.rounds(RUN)) == len(before.rounds(RUN)) + rounds
        if not rounds:
            assert after.accounts["1"].filter.spent == before.accounts["1"].filter.spent
        self.honest()

    def honest(self) -> None:
        """Run a round without anybody hostile."""
        self.round += 1
        record = self.others.round(self.round)
        assert NAME in record.present, (record.void, record.missing)
        assert self.site.rounds[self.round].state == "committed"

    def refused(self, message: Message) -> Failure:
        """Return the failure that answers this message."""
        return failure(self.site.told(message))


@pytest.fixture(scope="module")
def scene(base_directory: Path) -> Iterator[Scene]:
    with private_folder() as folder:
        group = GROUP if ROOT else None
        site = living.made(folder, base_directory, living.plan_text(plan_text(base_directory), rounds=80), group=group)
        others = Others(site, attach(base_directory, site.signed.plan))
        with site.served(group=group) as worker:
            scene = Scene(site, worker, others)
            scene.honest()
            yield scene


def is_nothing(raw: bytes) -> bool:
    """Whether what came back is no more than nothing, or a failure with a fixed sentence."""
    if not raw:
        return True
    magic, name, body, words = HEAD.unpack(raw[: HEAD.size])
    assert (magic, words) == (MAGIC, 0)
    assert len(raw) == HEAD.size + name + body
    return isinstance(
        open_envelope(Envelope(body=raw[HEAD.size + name :])), Failure
    )  # opened only if it is a known one


def sent(path: Path, raw: bytes) -> bytes:
    """Return all that comes back for these bytes, after the greeting."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(30)
        connection.connect(os.fspath(path))
        _, name, body, _ = HEAD.unpack(exactly(connection, HEAD.size))
        exactly(connection, name + body)
        try:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has hung up on us already
        answer = bytearray()
        try:
            while part := connection.recv(1 << 16):
                answer += part
        except ConnectionResetError:
            pass
        return bytes(answer)


def exactly(connection: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        part = connection.recv(size - len(found))
        assert part
        found += part
    return bytes(found)


def frame(
    label: bytes = NAME.encode(),
    body: bytes = b"{}",
    vector: bytes = b"",
    *,
    magic: bytes = MAGIC,
    sizes: tuple[int, int, int] | None = None,
) -> bytes:
    sizes = sizes or (len(label), len(body), len(vector) // 4)
    return HEAD.pack(magic, *sizes) + label + body + vector


FRAMES = {
    "nothing at all": b"",
    "the beginning of a head": MAGIC[:7],
    "another protocol": b"GET / HTTP/1.1\r\nHost: agent\r\n\r\n",
    "another version": frame(magic=b"confide-postbox/2\n"),
    "a head and nothing more": HEAD.pack(MAGIC, 4, 100, 0),
    "half a body": frame(body=b"{", sizes=(4, 100, 0)),
    "half a vector": frame(vector=b"\0" * 8, sizes=(4, 2, 1000)),
    "the largest sizes there are": frame(sizes=(0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)),
    "a body beyond the limit": frame(sizes=(4, LARGEST_BODY_BYTES + 1, 0)),
    "a vector beyond the limit": frame(sizes=(4, 2, postbox.LARGEST_WORDS + 1)),
    "the largest vector allowed, of which little comes": frame(sizes=(4, 2, postbox.LARGEST_WORDS)),
    "a label beyond the limit": frame(sizes=(postbox.LARGEST_LABEL_BYTES + 1, 2, 0)),
    "a label that is no text": frame(label=b"\xff\xfe"),
    "no label": frame(label=b""),
    "another site": frame(label=b"peer-111"),
    "what the steward may ask": frame(label=b"stop"),
    "two frames": frame() + frame(),
    "a vector nobody asked for": frame(vector=b"\0" * 400),
}


@pytest.mark.parametrize("raw", FRAMES.values(), ids=FRAMES)
def test_a_frame_that_is_none_gets_nothing_and_costs_nothing(scene: Scene, raw: bytes) -> None:
    size = scene.site.book.size

    answer = sent(scene.site.home.agent_socket, raw)

    assert is_nothing(answer)
    assert scene.site.book.size == size
    assert scene.site.answers()


def test_random_and_spoiled_frames_get_nothing_and_cost_nothing(scene: Scene) -> None:
    draws = random.Random(11)
    honest = [
        frame(body=envelope.body, vector=b"" if envelope.vector is None else envelope.vector.tobytes())
        for envelope, _ in scene.others.heard[:5]
    ]

    def attack() -> bytes:
        match draws.randrange(4):
            case 0:
                return draws.randbytes(draws.randrange(400))
            case 1:
                sizes = (draws.randrange(1 << 16), draws.getrandbits(32), draws.getrandbits(32))
                return frame(sizes=sizes) + draws.randbytes(draws.randrange(100))
            case 2:
                raw = bytearray(draws.choice(honest))
                for _ in range(draws.randrange(1, 6)):
                    raw[draws.randrange(len(raw))] = draws.randrange(256)
                return bytes(raw)
            case _:
                raw = bytearray(draws.choice(honest))
                return bytes(raw[: draws.randrange(len(raw))])

    with scene.attacked():
        for _ in range(150):
            raw = attack()
            assert is_nothing(sent(scene.site.home.agent_socket, raw)), raw


@settings(
    max_examples=80,
    phases=[Phase.generate],  # to shrink would ask the agent thousands of times
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_envelopes_that_were_honest_once_and_are_spoiled_get_a_fixed_sentence(
    scene: Scene, data: st.DataObject
) -> None:
    which = data.draw(st.integers(0, 4))
    envelope = data.draw(spoiled(scene.others.heard[which][0]))
    spent = scene.site.rounds.keys()

    try:
        answer = scene.site.asked(dataclasses.replace(envelope, vector=wire(envelope.vector)))
    except ConfideError:
        pass  # it was no frame at all, or the agent hung up
    else:
        assert isinstance(open_envelope(answer), Failure)
    assert scene.site.rounds.keys() == spent


def wire(vector: Any) -> Any:
    """A vector that a frame can carry; which types arrive is the postbox's part."""
    return vector if vector is None or (vector.dtype == np.uint32 and vector.ndim == 1 and vector.size) else None


OBJECTS: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"\x80\x04K\x01.",
    "a list": b"[]",
    "a number": b"7",
    "no format": canonical_bytes({"kind": "offer"}),
    "another format": canonical_bytes({"format": "confide-message/2", "kind": "offer"}),
    "an unknown kind": canonical_bytes({"format": "confide-message/1", "kind": "export_rows"}),
    "a kind that is no text": canonical_bytes({"format": "confide-message/1", "kind": ["offer"]}),
    "a kind of a surrogate": b'{"format":"confide-message/1","kind":"\\ud800"}',
    "a kind of a million letters": canonical_bytes({"format": "confide-message/1", "kind": "x" * 1_000_000}),
    "a class name": canonical_bytes({"format": "confide-message/1", "kind": "confide.client.journal.Journal"}),
    "missing fields": canonical_bytes({"format": "confide-message/1", "kind": "offer"}),
    "not canonical": b'{ "format": "confide-message/1", "kind": "offer" }',
    "deeply nested": b'{"format":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a repeated key": b'{"format":"confide-message/1","format":"confide-message/1","kind":"offer"}',
    "not a number": b'{"format":"confide-message/1","kind":"offer","round":NaN}',
}


@pytest.mark.parametrize("body", OBJECTS.values(), ids=OBJECTS)
def test_a_message_that_is_none_gets_a_fixed_sentence(scene: Scene, body: bytes) -> None:
    size = scene.site.book.size

    answer = open_envelope(scene.site.asked(Envelope(body=body)))

    assert failure(answer) == Failure(error="MessageError", sentence="The site received a malformed message.")
    assert scene.site.book.size == size


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("round", "1"),
        ("round", -1),
        ("round", 1.0),
        ("round", True),
        ("round", 2**53),
        ("cohort", "anna"),
        ("cohort", [["anna"]]),
        ("cohort", ["x"] * 1001),
        ("cohort", ["x" * 201]),
        ("run", None),
        ("run", "spring\n"),
        ("plan", {"digest": DIGEST}),
        ("__class__", "x"),
    ],
)
def test_a_field_of_a_wrong_type_gets_a_fixed_sentence(scene: Scene, field: str, value: object) -> None:
    envelope = seal(scene.others.signed(scene.others.offer(scene.round + 1)))
    text, _, raw = envelope.body.partition(b"\n")
    body = canonical_bytes({**json.loads(text), field: value}) + b"\n" + raw

    answer = open_envelope(scene.site.asked(Envelope(body=body)))

    assert failure(answer).error == "MessageError"


def test_what_is_meant_for_the_server_is_refused(scene: Scene) -> None:
    vector = MaskedVector(words=np.zeros(scene.others.ring.size, np.uint32))
    for_the_server: list[Message] = [
        Advertisement(context="00", keys=b"k"),
        Shares(context="00", sealed=b"s"),
        Contribution(context="00", vector=vector),
        Confirmation(context="00", signature=b"s"),
        Opening(context="00", shares=b"s"),
        Failure(error="Refused", sentence="The site refused."),
    ]

    with scene.attacked():
        told = [scene.refused(message) for message in for_the_server]

    assert told == [Failure(error="Refused", sentence="The site refused.")] * 6


def test_what_follows_an_offer_is_refused_without_one(scene: Scene) -> None:
    adapter = scene.others.state.adapter
    orphans: list[Message] = [
        Peers(context="00" * 32, adapter=DIGEST, advertisements=b""),
        Start(context="00" * 32, inbox=b"", adapter=adapter),
        Survivors(context="00" * 32, sites=b""),
        Signatures(context="00" * 32, signatures=b""),
    ]

    with scene.attacked():
        told = {scene.refused(message).error for message in orphans}

    assert told <= {"Refused", "MessageError"}


def test_every_message_that_was_ever_sent_is_refused_when_it_comes_again(scene: Scene) -> None:
    heard = list(scene.others.heard)

    with scene.attacked():
        told = {failure(open_envelope(scene.site.asked(envelope))).error for envelope, _ in heard}

    assert len(heard) >= 5
    assert told <= {"Refused", "MessageError"}


def test_a_round_that_is_played_to_its_end_is_not_opened_a_second_time_by_a_new_attempt(scene: Scene) -> None:
    offer = scene.others.offer(scene.round, attempt=64)

    with scene.attacked():
        told = scene.refused(scene.others.signed(offer))

    assert told.error == "Refused"


@pytest.mark.parametrize(
    "signer", [STRANGER, ADMIN, PEERS["peer-111"], None], ids=["stranger", "admin", "peer", "none"]
)
def test_an_offer_that_the_coordinator_did_not_sign_is_refused(scene: Scene, signer: Identity | None) -> None:
    offer = scene.others.offer(scene.round + 1, attempt=50)
    offer = dataclasses.replace(offer, signature=bytes(64)) if signer is None else scene.others.signed(offer, signer)

    with scene.attacked():
        told = scene.refused(offer)

    assert told.error == "MessageError"


COHORTS = {
    "of two": (NAME, "peer-111"),
    "of one real site and a crowd that nobody enrolled": (NAME, *(f"sybil-{number}" for number in range(9))),
    "without this site": ("peer-111", "peer-112"),
    "that is not sorted": ("peer-111", "peer-112", NAME),
    "with one site twice": (NAME, "peer-111", "peer-111"),
    "of nobody": (),
}


@pytest.mark.parametrize("cohort", COHORTS.values(), ids=COHORTS)
def test_a_cohort_is_refused(scene: Scene, cohort: tuple[str, ...]) -> None:
    offer = scene.others.signed(scene.others.offer(scene.round + 1, attempt=50, cohort=cohort))

    with scene.attacked():
        told = scene.refused(offer)

    assert told.error in {"Refused", "MessageError"}


def test_a_roster_full_of_keys_is_a_cohort_of_one_where_the_owner_asks_for_sites_she_knows(scene: Scene) -> None:
    known = f'["North Clinic {STRANGER.public.hex()}"]'

    with scene.attacked():
        scene.site.change_policy(known_sites=known, fewest_known=1)
        try:
            told = scene.refused(scene.others.signed(scene.others.offer(scene.round + 1, attempt=50)))
        finally:
            scene.site.change_policy(known_sites="[]", fewest_known=0)

    assert told.rule == "cohort"


OFFERS: dict[str, dict[str, Any]] = {
    "of another run": {"run": "autumn"},
    "of another plan": {"plan": DIGEST},
    "under another roster": {"roster": DIGEST},
    "of another layout": {"layout": DIGEST},
    "in another ring": {"ring": DIGEST},
    "of round zero": {"round": 0},
    "of a round beyond the plan": {"round": 81},
    "of a round far beyond it": {"round": 2**53 - 1},
    "of an old round": {"round": 1, "attempt": 10_000},
    "of an attempt that was": {"attempt": 0},
}


@pytest.mark.parametrize("changes", OFFERS.values(), ids=OFFERS)
def test_an_offer_is_refused_whoever_signed_it(scene: Scene, changes: dict[str, Any]) -> None:
    offer = dataclasses.replace(scene.others.offer(scene.round + 1, attempt=50), **changes)
    if changes == {"attempt": 0}:
        offer = dataclasses.replace(offer, round=scene.round)

    with scene.attacked():
        told = scene.refused(scene.others.signed(offer))

    assert told.error in {"Refused", "MessageError"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38, 1e6])
def test_an_adapter_that_the_rounds_cannot_lead_to_is_not_trained_from(scene: Scene, value: float) -> None:
    others = scene.others
    state = others.state
    adapter = state.adapter.copy()
    adapter[len(adapter) // 2] = value

    with scene.attacked():
        scene.round += 1
        others.state = dataclasses.replace(state, adapter=adapter)
        record = others.round(scene.round)
        others.state = state
        told = told_at(others, "start")

    assert not record.present
    assert failure(told).error == ("AdapterError" if np.isfinite(value) else "MessageError")


@pytest.mark.parametrize("change", ["shorter", "longer", "other", "NaN"])
def test_an_adapter_that_is_exchanged_on_the_way_is_not_trained_from(scene: Scene, change: str) -> None:
    others = scene.others

    def exchanged(envelope: Envelope, timeout_s: float) -> Envelope:
        message = open_envelope(envelope)
        if isinstance(message, Start):
            adapter = {
                "shorter": message.adapter[:-1],
                "longer": np.append(message.adapter, np.float32(0)),
                "other": message.adapter + np.float32(1e-3),
                "NaN": np.full_like(message.adapter, np.nan),
            }[change]
            envelope = seal(Start(context=message.context, inbox=message.inbox, adapter=adapter))
        return scene.site.asked(envelope, timeout_s)

    with scene.attacked():
        scene.round += 1
        others.asked = exchanged
        record = others.round(scene.round)
        others.asked = scene.site.asked
        told = told_at(others, "start")

    assert not record.present
    assert failure(told).error == ("MessageError" if change in {"other", "NaN"} else "AdapterError")


def told_at(others: Others, kind: str) -> Message:
    """What the site answered when it was last asked that."""
    return next(open_envelope(answer) for asked, answer in reversed(others.heard) if kind_of(asked) == kind)


def test_noise_on_the_wire_in_the_middle_of_a_round_does_not_even_disturb_it(scene: Scene) -> None:
    def noise(kind: str) -> None:
        for body in (b"", b"{}", OBJECTS["an unknown kind"]):
            assert isinstance(open_envelope(scene.site.asked(Envelope(body=body))), Failure)
        assert isinstance(scene.site.told(Confirmation(context="00", signature=b"s")), Failure)
        assert isinstance(scene.site.told(scene.others.offer(scene.round, attempt=60)), Failure)

    scene.others.before = noise
    try:
        scene.honest()
    finally:
        scene.others.before = lambda kind: None


def test_of_many_bad_messages_the_trail_takes_few_and_counts_the_rest(scene: Scene) -> None:
    lines = trail(scene.site)

    with scene.attacked():
        for _ in range(200):
            scene.site.asked(Envelope(body=b"junk"))

    told = trail(scene.site)[len(lines) :]
    assert sum(line.get("error") == "MessageError" for line in told) <= 2 * 60
    assert {line["asked"] for line in told if line["event"] == "message"} <= {
        *("offer", "peers", "start", "survivors", "signatures"),
        "unreadable",
    }
    verify_trail(scene.site.home.log)


def test_of_many_good_messages_the_trail_takes_few_too_and_a_round_has_so_many_attempts_and_no_more(
    scene: Scene,
) -> None:
    scene.worker._offers = Allowance(3, clock=lambda: 0.0)
    lines, number = trail(scene.site), scene.round + 1

    with scene.attacked():
        beyond = scene.refused(scene.others.signed(scene.others.offer(number, attempt=LAST_ATTEMPT + 1)))
        told = [
            scene.site.told(scene.others.signed(scene.others.offer(number, attempt=attempt)))
            for attempt in range(1, 61)
        ]
        written = trail(scene.site)[len(lines) :]
        scene.others._attempts[number] = itertools.count(61)

    assert beyond.error == "Refused"
    assert all(isinstance(answer, Advertisement) for answer in told)
    assert sum(line["event"] == "offered" for line in written) == 3
    assert not any(line.get("answered") == "advertisement" for line in written)  # an offer has one line


def trail(site: Living) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(site.home.log.glob("*.jsonl")) for line in path.open("rb")]


def test_no_answer_ever_tells_a_path_a_value_or_a_row(scene: Scene) -> None:
    bodies = [answer.body for _, answer in scene.others.heard]
    bodies += [sent(scene.site.home.agent_socket, raw) for raw in FRAMES.values()]

    for secret in (os.fsencode(scene.site.root), b"rows.csv", b"the service was good", b"Traceback", b"patient"):
        assert not any(secret in body for body in bodies)


@pytest.mark.parametrize("label", ["", "shutdown", "STOP", NAME, "../stop", "export"])
def test_the_steward_s_socket_knows_three_questions_and_no_other(scene: Scene, label: str) -> None:
    answer = sent(scene.site.home.control_socket, frame(label=label.encode()))

    assert answer == b""
    assert {STATUS, METRICS, STOP} == {"status", "metrics", "stop"}
    assert json.loads(scene.site.status())["site"] == NAME


CALLER = """
import os, socket, sys
path, user, primary, *more = sys.argv[1], *map(int, sys.argv[2:])
os.setgroups(more); os.setgid(primary); os.setuid(user)
connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
connection.settimeout(20)
try:
    connection.connect(path)
    connection.sendall(sys.stdin.buffer.read())
    connection.shutdown(socket.SHUT_WR)
    heard = b""
    while part := connection.recv(65536):
        heard += part
except OSError as error:
    heard = type(error).__name__.encode()
sys.stdout.buffer.write(heard)
"""


def called_as(path: Path, raw: bytes, *numbers: int) -> bytes:
    """What is heard by another user, primary group and further groups, that sends these bytes."""
    done = subprocess.run(
        [sys.executable, "-c", CALLER, str(path), *map(str, numbers)], input=raw, capture_output=True, check=True
    )
    return done.stdout


@contextmanager
def open_doors(site: Living, path: Path) -> Iterator[None]:
    """Let every mode on the way to a socket be as if somebody had been careless."""
    places = (site.root, site.root / "site", site.root / "site" / "run", path)
    modes = [(place, place.stat().st_mode) for place in places]
    try:
        for place, _ in modes:
            place.chmod(0o777)
        yield
    finally:
        for place, mode in modes:
            place.chmod(mode & 0o7777)


@as_root
@pytest.mark.parametrize("numbers", [(POSTMAN, OTHER_GROUP), (POSTMAN, OTHER_GROUP, 7, 9), (1, GROUP + 9)])
def test_a_member_of_no_group_gets_not_a_byte_of_the_agent_even_if_every_door_is_open(
    scene: Scene, numbers: tuple[int, ...]
) -> None:
    path = scene.site.root / "site" / "run" / "agent.sock"
    with open_doors(scene.site, path):
        heard = called_as(path, frame(), *numbers)

    assert heard in {b"", b"ConnectionResetError", b"BrokenPipeError"}
    with scene.attacked():
        assert called_as(path, frame(), *numbers) == b"PermissionError"


@as_root
def test_a_postman_of_the_group_gets_answers_and_not_a_byte_of_the_steward_s_socket(scene: Scene) -> None:
    agent, control = (scene.site.root / "site" / "run" / name for name in ("agent.sock", "control.sock"))
    scene.site.root.chmod(0o711)  # where the site's directory lies may be passed through
    try:
        with scene.attacked():
            greeted = called_as(agent, frame(body=b"junk"), POSTMAN, GROUP)
            shut_out = called_as(control, frame(label=b"stop"), POSTMAN, GROUP)
            with open_doors(scene.site, control):
                heard = called_as(control, frame(label=b"stop"), POSTMAN, GROUP)
    finally:
        scene.site.root.chmod(0o700)

    assert greeted.startswith(MAGIC)
    assert b"The site received a malformed message." in greeted
    assert shut_out == b"PermissionError"
    assert heard in {b"", b"ConnectionResetError", b"BrokenPipeError"}
    assert json.loads(scene.site.status())["doing"] == "idle"


@as_root
def test_another_user_can_read_nothing_of_the_site_though_it_may_pass_through(scene: Scene) -> None:
    script = """
import os, sys
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[3]))
found = []
for name in ("", "ledger.db", "ledger.db-wal", "policy.toml", "keys", "keys/identity.pem", "data", "log", "rounds", "personal"):
    path = os.path.join(sys.argv[1], name)
    try:
        os.listdir(path) if os.path.isdir(path) else open(path).close()
        found.append(name)
    except OSError:
        pass
print(found)
"""
    scene.site.root.chmod(0o711)
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, str(scene.site.root / "site"), str(GROUP), str(POSTMAN)],
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        scene.site.root.chmod(0o700)

    assert done.stdout.strip() == "[]"


@settings(
    max_examples=600,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_many_more_envelopes_that_are_spoiled_get_a_fixed_sentence(scene: Scene, data: st.DataObject) -> None:
    test_envelopes_that_were_honest_once_and_are_spoiled_get_a_fixed_sentence.hypothesis.inner_test(scene, data)  # type: ignore[attr-defined]


def test_after_all_of_this_the_ledger_holds(scene: Scene) -> None:
    scene.honest()
    while len(scene.site.book.rounds(RUN)) <= 10:  # where few tests were run here before this one
        scene.honest()

    book = scene.site.book

    assert len(book.rounds(RUN)) > 10
    assert all(known.state == "committed" for known in book.rounds(RUN).values())
    assert scene.worker.gauges.health()["status"] == "ok"
