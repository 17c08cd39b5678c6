"""The postman: what Flower runs at a site. It carries sealed envelopes between Flower and the site's agent.

It imports Flower, the standard library and the messages, so a bundle that Flower puts beside it finds no data, no key
and no model here. Where the agent listens is the site's own business: the environment says so, never a message.
"""

import logging
import os
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from confide.client import postbox
from confide.common.errors import MessageError, RunError, UsageError
from confide.common.messages import Envelope, Failure, seal

AGENT_SOCKET = "CONFIDE_AGENT_SOCKET"

_log = logging.getLogger(__name__)

app = ClientApp()  # a plain assignment: Flower looks for it in the source before it imports


@app.query("site")
def tell_site(message: Message, context: Context) -> Message:
    """Reply with the name of the site behind this node."""
    try:
        name = _site(_socket(), context)
    except Exception:
        _log.exception("the site's name is not known")
        raise RunError(RunError.outside) from None  # Flower tells the server what an exception says
    return Message(RecordDict({"site": ConfigRecord({"name": name})}), reply_to=message)


@app.query("deliver")
def deliver(message: Message, context: Context) -> Message:
    """Hand the envelope to the agent, and reply with the agent's; what goes wrong leaves as a fixed sentence."""
    try:
        socket = _socket()
        answer = postbox.call(socket, _site(socket, context), _envelope(message.content), message.metadata.ttl)
    except Exception as error:
        _log.exception("an envelope was not delivered")
        answer = seal(Failure.of(error))
    return Message(_records(answer), reply_to=message)


def _socket() -> Path:
    path = os.environ.get(AGENT_SOCKET)
    if not path:
        raise UsageError(f"The variable {AGENT_SOCKET} is not set. Set it to the socket of the site's agent.")
    return Path(path)


def _site(socket: Path, context: Context) -> str:
    """Return the one site the agent serves; in a simulation it serves all, and the partition says which is ours."""
    served = postbox.sites(socket)
    if len(served) == 1:
        return served[0]
    partition = context.node_config.get("partition-id")
    if not isinstance(partition, int) or not 0 <= partition < len(served):
        raise RunError(f"The agent serves {len(served)} sites, and partition-id = {partition} names none of them.")
    return served[partition]


def _records(envelope: Envelope) -> RecordDict:
    """Return Flower's form of an envelope; the vector is an array, for these are sent in pieces and bytes are not."""
    records = RecordDict({"body": ConfigRecord({"body": envelope.body})})
    if envelope.vector is not None:
        words = envelope.vector.astype("<u4", copy=False)
        array = Array(dtype="uint32", shape=words.shape, stype="little-endian", data=words.tobytes())
        records["vector"] = ArrayRecord({"words": array})
    return records


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
