"""What goes between a site's agent and its child: one socket pair, and the messages that both must read alike.

frame    magic, then the sizes of body and payload (big-endian), then these two
body     canonical JSON: `kind`, and exactly the fields of that kind
payload  little-endian float32 of a vector, digests of 32 bytes each, or nothing
"""

import dataclasses
import json
import select
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from confide.client.persons import DIGEST_BYTES
from confide.common.adapter import Floats
from confide.common.canonical import canonical_bytes
from confide.common.errors import MessageError, RunError, UsageError

LONGEST_TEXT: Final = 4000
GLANCE_S: Final = 0.2
_MAGIC = b"confide-child/1\n"
_HEAD = struct.Struct(">16sIQ")  # magic, body bytes, payload bytes
_LARGEST_BODY_BYTES = 1 << 24
_LARGEST_PAYLOAD_BYTES = 1 << 30
_FIELDS: Final[Mapping[str, Mapping[str, type]]] = {
    "load": {
        **dict.fromkeys(("plan", "model", "table", "person_column", "ids", "person_key", "personal"), str),
        "fingerprint": bool,
    },
    "ready": {"persons": int, "layout": list, "head": list, "fingerprint": str},
    "train": {
        **dict.fromkeys(("round", "steps"), int),
        **dict.fromkeys(("sampling_rate", "clip_norm", "noise_multiplier", "divisor"), float),
    },
    "step": {"begun": int},
    "trained": {"round": int, "batch_sizes": list, "clipped": int, "non_finite": int},
    "failed": {"error": str, "text": str},
    "log": {"level": int, "logger": str, "text": str},
}
_WITH_PAYLOAD = frozenset({"load", "ready", "train", "trained"})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a child loads.

    Attributes:
        plan: The plan's TOML; its `[compute]` is the site's own.
        model: The base model's directory; its digest must be the plan's.
        table: The site's rows.
        person_column: The column that names whose row it is; "" if the table has none.
        ids: The namespace of the identifiers, as `person_digest` takes it.
        person_key: The key of the person digests and of the fingerprint, 32 bytes; nothing if neither is needed.
        withdrawn: The digests of persons whose rows are left out.
        fingerprint: Whether the child tells the table's fingerprint, as `read_persons` finds it.
        personal: Where what never leaves the site is kept between rounds; None keeps it in the child.

    Raises:
        UsageError: Persons have withdrawn and cannot be told from the rows, or a digest is malformed.
    """

    plan: bytes = dataclasses.field(repr=False)
    model: Path
    table: Path
    person_column: str = ""
    ids: str = ""
    person_key: bytes = dataclasses.field(default=b"", repr=False)
    withdrawn: frozenset[bytes] = dataclasses.field(default=frozenset(), repr=False)
    fingerprint: bool = False
    personal: Path | None = None

    def __post_init__(self) -> None:
        if self.withdrawn and not self.person_column:
            raise UsageError(
                "Persons have withdrawn, and there is no column to tell their rows by. Give person_column, or a table "
                "without these persons."
            )
        if (self.withdrawn or self.fingerprint) and not self.person_key:
            raise UsageError("Persons and tables are told by keyed digests. Give person_key.")
        if any(len(digest) != DIGEST_BYTES for digest in self.withdrawn):
            raise UsageError(f"A person's digest has {DIGEST_BYTES} bytes; one of another length was given.")

    @classmethod
    def of(cls, message: "Message") -> Self:
        """Return what a message tells a child to load."""
        fields, digests = message.fields, bytes(message.payload)
        starts = range(0, len(digests), DIGEST_BYTES)
        return cls(
            plan=fields["plan"].encode(),
            model=Path(fields["model"]),
            table=Path(fields["table"]),
            person_column=fields["person_column"],
            ids=fields["ids"],
            person_key=bytes.fromhex(fields["person_key"]),
            withdrawn=frozenset(digests[start : start + DIGEST_BYTES] for start in starts),
            fingerprint=fields["fingerprint"],
            personal=Path(fields["personal"]) if fields["personal"] else None,
        )

    def sent(self) -> tuple[dict[str, object], bytes]:
        """Return the fields and the payload of the message that tells a child to load this."""
        fields = {
            "plan": self.plan.decode(),
            "model": str(self.model.absolute()),
            "table": str(self.table.absolute()),
            "person_column": self.person_column,
            "ids": self.ids,
            "person_key": self.person_key.hex(),
            "personal": "" if self.personal is None else str(self.personal.absolute()),
        }
        return {**fields, "fingerprint": self.fingerprint}, b"".join(sorted(self.withdrawn))


class Ended(RunError):  # noqa: N818  no fault by itself
    """The other end of a link is closed, or must be."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Message:
    """What one end told the other: a kind, exactly its fields, and what they do not hold.

    Attributes:
        kind: One of those above.
        fields: Of the types that the kind has.
        payload: The bytes after the body.
    """

    kind: str
    fields: Mapping[str, Any]
    payload: bytearray


class Link:
    """One end of the socket between parent and child."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._begun, self._filled = bytearray(), 0  # the next message, as far as it was taken in when `watch` raised

    @property
    def ended(self) -> bool:
        """Whether the other end is closed, whatever there may still be to read."""
        return bool(self._hung_up().poll(0))

    def wait_for_the_end(self) -> None:
        """Return when the other end is closed."""
        self._hung_up().poll()

    def send(self, kind: str, fields: Mapping[str, object], payload: bytes = b"", limit_s: float | None = None) -> None:
        """Return when the message is on its way: what was sent is read by the other side even if this one dies now.

        Raises:
            OSError: The other side has ended, or takes nothing within `limit_s`.
            ValueError: The message cannot be spelled.
        """
        body = canonical_bytes({"kind": kind, **fields})
        with self._sending:
            self._connection.settimeout(limit_s)
            self._connection.sendall(_HEAD.pack(_MAGIC, len(body), len(payload)) + body)
            self._connection.sendall(payload)

    def receive(self, watch: Callable[[], None] | None = None) -> Message:
        """Return the next message; `watch` is called several times a second until it has come, and may raise.

        Raises:
            MessageError: What arrives is no message, or only the beginning of one.
            Ended: The other end was closed before it.
        """
        if not self._fill(_HEAD.size, watch):
            raise Ended
        magic, body_bytes, payload_bytes = _HEAD.unpack_from(self._begun)
        if magic != _MAGIC or body_bytes > _LARGEST_BODY_BYTES or payload_bytes > _LARGEST_PAYLOAD_BYTES:
            raise MessageError("Something arrived between agent and child that is no frame.")
        self._fill(_HEAD.size + body_bytes + payload_bytes, watch)
        frame, self._begun, self._filled = self._begun, bytearray(), 0
        body = bytes(frame[_HEAD.size : _HEAD.size + body_bytes])
        del frame[: _HEAD.size + body_bytes]
        return _read(body, frame)

    def close(self) -> None:
        """Let go of this end; the other one sees it."""
        self._connection.close()

    def _fill(self, size: int, watch: Callable[[], None] | None) -> bool:
        """Take in the next message up to so many bytes; return False if the other end was closed before the first of them."""
        self._connection.settimeout(None if watch is None else GLANCE_S)
        self._begun.extend(bytes(max(0, size - len(self._begun))))
        while self._filled < size:
            if watch is not None:
                watch()
            try:
                count = self._connection.recv_into(memoryview(self._begun)[self._filled :])
            except TimeoutError:
                continue
            except ConnectionResetError:  # it was closed before it had read everything
                count = 0
            if not count and self._filled:
                raise MessageError("The child ended in the middle of a message.")
            if not count:
                return False
            self._filled += count
        return True

    def _hung_up(self) -> select.poll:
        poll = select.poll()
        poll.register(self._connection, 0)  # that it was closed is told unasked
        return poll


def _read(body: bytes, payload: bytearray) -> Message:
    try:
        fields = json.loads(body)
        canonical = isinstance(fields, dict) and canonical_bytes(fields) == body
    except (ValueError, RecursionError):
        canonical = False
    kind = str(fields.pop("kind", None)) if canonical else ""
    types = _FIELDS.get(kind, {})
    sound = types and fields.keys() == types.keys() and all(type(fields[name]) is types[name] for name in types)
    if not sound or (payload and kind not in _WITH_PAYLOAD):
        raise MessageError("Something arrived between agent and child that is no message of theirs.")
    return Message(kind=kind, fields=fields, payload=payload)


def raw(vector: Floats) -> bytes:
    """Return a vector as a payload: little-endian float32, bit for bit."""
    return np.ascontiguousarray(vector, "<f4").tobytes()


def floats(payload: bytearray) -> Floats:
    """Return the vector that a payload holds, (length,), float32.

    Raises:
        MessageError: It ends in the middle of a number.
    """
    if len(payload) % 4:
        raise MessageError("A vector arrived between agent and child that ends in the middle of a number.")
    return np.frombuffer(payload, "<f4").astype(np.float32)
