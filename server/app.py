"""Flower as a channel: envelopes to sites over Flower's Grid, and the answers back.

A site is found by asking each node once which site is behind it. What a node says of itself proves nothing; it decides
only where an envelope is sent.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Set

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from confide.common.errors import MessageError
from confide.common.messages import Envelope, Words

_POLL_S = 0.05

_log = logging.getLogger(__name__)


class GridChannel:
    """A `Channel` over the nodes of a Flower run.

    Args:
        grid: What Flower gives a ServerApp.
        patience_s: How long a round waits at most for nodes of sites that are not known yet.
    """

    def __init__(self, grid: Grid, patience_s: float = 60.0) -> None:
        self._grid = grid
        self._patience_s = patience_s
        self._nodes: dict[str, int] = {}  # by site

    def ask(self, messages: Mapping[str, Envelope], timeout_s: float) -> Iterator[tuple[str, Envelope]]:
        """Yield each answer with its site as it comes; a site whose node failed or is unknown is left out."""
        deadline = time.monotonic() + timeout_s
        self._find(messages.keys(), min(deadline, time.monotonic() + self._patience_s))
        sites = {self._nodes[site]: site for site in messages if site in self._nodes}
        vectors = {id(envelope.vector): envelope.vector for envelope in messages.values()}
        arrays = {key: _array(vector) for key, vector in vectors.items() if vector is not None}  # mostly one for all
        contents = {
            node: _records(messages[site], arrays.get(id(messages[site].vector))) for node, site in sites.items()
        }
        for node, reply in self._exchange(contents, "query.deliver", deadline):
            site = sites[node]
            if reply.has_error():
                _log.warning("site %s gave no answer: %s", site, reply.error.reason)
                del self._nodes[site]  # it may come back as another node
                continue
            try:
                answer = _envelope(reply.content)
            except MessageError as error:
                _log.warning("site %s gave no answer: %s", site, error)
                continue
            yield site, answer

    def _find(self, sites: Set[str], deadline: float) -> None:
        """Learn the nodes of `sites`, as far as they are there before the deadline."""
        while not sites <= self._nodes.keys() and time.monotonic() < deadline:
            known = set(self._nodes.values())
            fresh = {node: RecordDict() for node in self._grid.get_node_ids() if node not in known}
            for node, reply in self._exchange(fresh, "query.site", deadline):
                name = None if reply.has_error() else reply.content.get("site", ConfigRecord()).get("name")
                if isinstance(name, str):
                    self._nodes.setdefault(name, node)
            time.sleep(_POLL_S)

    def _exchange(
        self, contents: Mapping[int, RecordDict], kind: str, deadline: float
    ) -> Iterator[tuple[int, Message]]:
        """Send each node its content and yield the replies that come before the deadline, each with its node."""
        time_left_s = deadline - time.monotonic()
        if not contents or time_left_s <= 0:
            return
        questions = [Message(content, node, kind, ttl=time_left_s) for node, content in contents.items()]
        waiting = {name for name in self._grid.push_messages(questions) if name}
        over = False
        while waiting and not over:
            over = time.monotonic() >= deadline  # asked before pulling: who takes replies slowly loses none by it
            for reply in self._grid.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                yield reply.metadata.src_node_id, reply
            time.sleep(_POLL_S)


def _records(envelope: Envelope, array: ArrayRecord | None) -> RecordDict:
    """Return Flower's form of an envelope; the vector is an array, for these are sent in pieces and bytes are not."""
    records = RecordDict({"body": ConfigRecord({"body": envelope.body})})
    if array is not None:
        records["vector"] = array
    return records


def _array(vector: Words) -> ArrayRecord:
    words = vector.astype("<u4", copy=False)
    array = Array(dtype="uint32", shape=words.shape, stype="little-endian", data=words.tobytes())
    return ArrayRecord({"words": array})


def _envelope(records: RecordDict) -> Envelope:
    try:
        body = records.config_records["body"]["body"]
        data = [record["words"].data for record in records.array_records.values()]
        vectors = [np.frombuffer(words, "<u4").astype(np.uint32, copy=False) for words in data]
    except (KeyError, ValueError):
        raise MessageError("A message arrived that holds no envelope.") from None
    if not isinstance(body, bytes) or len(vectors) > 1:
        raise MessageError("A message arrived that holds no envelope.")
    return Envelope(body=body, vector=vectors[0] if vectors else None)
