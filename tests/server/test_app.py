"""The channel over Flower's Grid, with the real postmen and socket, and a Grid that calls them directly."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict, UserConfig
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from confide.client.app import AGENT_SOCKET
from confide.client.app import app as postman
from confide.client.postbox import Answer, Postbox, private_folder
from confide.common.messages import Envelope, Failure, open_envelope
from confide.server.app import GridChannel


class DirectGrid(Grid):
    """Nodes that answer at once, each by a postman of its own; `tamper` may put another reply in its place."""

    def __init__(self, nodes: int, tamper: Callable[[Message, Message], Message | None]) -> None:
        self._nodes = range(100, 100 + nodes)
        self._tamper = tamper
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return self._nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            name = f"{message.metadata.message_type}-{message.metadata.dst_node_id}"
            message.metadata.__dict__["_message_id"] = name
            partition = message.metadata.dst_node_id - self._nodes[0]
            context = Context(1, partition, UserConfig({"partition-id": partition}), RecordDict(), UserConfig())
            try:
                reply = postman(message, context)
            except Exception as error:
                reply = Message(Error(code=2, reason=str(error)), reply_to=message)
            changed = self._tamper(message, reply)
            if changed is not None:
                self._replies[name] = changed
            yield name

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(name) for name in list(message_ids) if name in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError


def untouched(message: Message, reply: Message) -> Message | None:
    return reply


@pytest.fixture(autouse=True)
def _identity() -> None:
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Serve the sites a, b and c, which answer with their name and twice the vector."""

    def doubled(name: str) -> Answer:
        return lambda envelope: Envelope(
            body=name.encode(), vector=None if envelope.vector is None else envelope.vector * 2
        )

    with private_folder() as folder, serving(folder / "agents", {name: doubled(name) for name in "abc"}):
        monkeypatch.setenv(AGENT_SOCKET, str(folder / "agents"))
        yield


@contextlib.contextmanager
def serving(path: Path, answers: dict[str, Answer]) -> Iterator[None]:
    over = threading.Event()

    def serve(box: Postbox) -> None:
        while not over.is_set():
            box.serve(0.05)

    with Postbox(path, answers) as box:
        server = threading.Thread(target=serve, args=(box,))
        server.start()
        try:
            yield
        finally:
            over.set()
            server.join()


def ask(grid: Grid, sites: str, timeout_s: float = 20, patience_s: float = 0.5) -> dict[str, Envelope]:
    vector = np.array([1, 2**31 + 1], np.uint32)
    messages = {site: Envelope(body=b"to " + site.encode(), vector=vector) for site in sites}
    return dict(GridChannel(grid, patience_s=patience_s).ask(messages, timeout_s))


@pytest.mark.usefixtures("agents")
def test_every_site_gets_its_own_message_and_answers() -> None:
    answers = ask(DirectGrid(3, untouched), "cab")

    assert {site: answer.body for site, answer in answers.items()} == {"a": b"a", "b": b"b", "c": b"c"}
    vectors = [answer.vector for answer in answers.values()]
    assert [vector.tolist() for vector in vectors if vector is not None] == [[2, 2]] * 3


@pytest.mark.usefixtures("agents")
def test_a_site_without_a_node_is_absent() -> None:
    answers = ask(DirectGrid(2, untouched), "abc")

    assert sorted(answers) == ["a", "b"]


@pytest.mark.usefixtures("agents")
@pytest.mark.parametrize(
    "reply",
    [
        lambda message: Message(Error(code=5, reason="node unavailable"), reply_to=message),
        lambda message: Message(RecordDict(), reply_to=message),
        lambda message: Message(RecordDict({"body": ConfigRecord({"body": 3})}), reply_to=message),
        lambda message: None,
    ],
    ids=["an error", "an empty reply", "a reply that is no envelope", "no reply"],
)
def test_a_node_that_fails_is_absent(reply: Callable[[Message], Message | None]) -> None:
    def tamper(message: Message, honest: Message) -> Message | None:
        failing = message.metadata.message_type == "query.deliver" and message.metadata.dst_node_id == 101
        return reply(message) if failing else honest

    answers = ask(DirectGrid(3, tamper), "abc", timeout_s=2)

    assert sorted(answers) == ["a", "c"]


@pytest.mark.usefixtures("agents")
def test_who_takes_answers_slowly_loses_none_that_came_in_time() -> None:
    class Halting(DirectGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            ready = list(message_ids)
            return super().pull_messages(ready[:1] if len(ready) == 3 else ready)

    messages = {site: Envelope(body=b"") for site in "abc"}
    answers = []
    for site, _ in GridChannel(Halting(3, untouched), patience_s=5).ask(messages, timeout_s=2):
        answers.append(site)
        time.sleep(2.5 if len(answers) == 1 else 0)

    assert sorted(answers) == ["a", "b", "c"]


@pytest.mark.usefixtures("agents")
def test_a_site_is_found_again_behind_another_node() -> None:
    kinds: list[str] = []

    def tamper(message: Message, honest: Message) -> Message | None:
        kinds.append(message.metadata.message_type)
        if kinds == ["query.site", "query.deliver"]:
            return Message(Error(code=5, reason="node unavailable"), reply_to=message)
        return honest

    channel = GridChannel(DirectGrid(1, tamper), patience_s=0.5)

    first = dict(channel.ask({"a": Envelope(body=b"")}, 5))
    second = dict(channel.ask({"a": Envelope(body=b"")}, 5))

    assert (list(first), list(second)) == ([], ["a"])
    assert kinds == ["query.site", "query.deliver"] * 2


def test_what_goes_wrong_at_a_site_leaves_it_as_a_fixed_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str | None] = []

    def listen(message: Message, honest: Message) -> Message | None:
        if message.metadata.message_type == "query.site":
            told.append(honest.error.reason)
            return Message(RecordDict({"site": ConfigRecord({"name": "a"})}), reply_to=message)
        return honest

    monkeypatch.setenv(AGENT_SOCKET, "/nowhere/agents")

    answers = ask(DirectGrid(1, listen), "a")

    assert told == ["The site could not go on."]
    assert open_envelope(answers["a"]) == Failure(error="RunError", sentence="The site could not go on.")
