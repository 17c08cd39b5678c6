"""What server and site say to each other: typed messages, and the canonical bytes that stand for them.

A message on the wire is an `Envelope`: canonical JSON, which begins with a format and names its kind, and at most one
vector of uint32. Parsing is by hand and strict: unknown kinds, missing, extra or mistyped fields are refused. There is
no pickle and nothing names code.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from confide.common.canonical import canonical_bytes, sha256
from confide.common.errors import ConfideError, MessageError

FORMAT = "confide-message/1"
LARGEST_BODY_BYTES = 1 << 20
Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint32]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Envelope:
    """A message as it travels: `body` is canonical JSON, `vector` is (n,), uint32, or None."""

    body: bytes
    vector: Words | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of body and vector together."""
        return len(self.body) + (0 if self.vector is None else self.vector.nbytes)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Offer:
    """Server to site: take part in this round, starting from this adapter."""

    kind: ClassVar[str] = "offer"
    run: str
    plan: str  # the plan's digest
    round: int
    attempt: int
    sites: int  # the cohort's size
    layout: str  # the digest of the adapter's layout
    adapter: Floats

    @property
    def adapter_digest(self) -> str:
        """SHA-256 of the adapter's little-endian bytes."""
        return vector_digest(self.adapter)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contribution:
    """Site to server: a vector for the sum. Its words mean nothing but as part of that sum."""

    kind: ClassVar[str] = "contribution"
    run: str
    round: int
    attempt: int
    ring: str  # the digest of the ring's layout
    protection: str  # what hides the vector; `insecure_plain_sum` if nothing does
    words: Words


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Site to server: it did not take part, and which class of error was why. Never more than that."""

    kind: ClassVar[str] = "failure"
    error: str
    sentence: str

    @classmethod
    def of(cls, error: Exception) -> Self:
        """Return what may leave a site of `error`: its class if it is ours, and a fixed sentence."""
        known = type(error) if isinstance(error, ConfideError) else ConfideError
        return cls(error=known.__name__, sentence=known.outside)


Message = Offer | Contribution | Failure
_KINDS: dict[str, type[Message]] = {message.kind: message for message in (Offer, Contribution, Failure)}


def vector_digest(vector: Floats | Words) -> str:
    """Return SHA-256 over a vector's little-endian bytes."""
    little = np.ascontiguousarray(vector, dtype=vector.dtype.newbyteorder("<"))
    return sha256(little.view(np.uint8).data)


def seal(message: Message) -> Envelope:
    """Return the envelope of `message`."""
    fields = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
    vector = next((value for value in fields.values() if isinstance(value, np.ndarray)), None)
    plain = {name: value for name, value in fields.items() if value is not vector or vector is None}
    return Envelope(
        body=canonical_bytes({"format": FORMAT, "kind": message.kind, **plain}),
        vector=None if vector is None else np.ascontiguousarray(vector).view(np.uint32),
    )


def open_envelope(envelope: Envelope) -> Message:
    """Return the message in `envelope`.

    Raises:
        MessageError: It is not one: too large, not canonical JSON, of an unknown kind, or a field is missing, too many,
            of the wrong type or not finite.
    """
    if len(envelope.body) > LARGEST_BODY_BYTES:
        raise MessageError(
            f"A message of {len(envelope.body)} bytes arrived; at most {LARGEST_BODY_BYTES} are allowed."
        )
    fields = _parse(envelope.body)
    if fields.pop("format", None) != FORMAT:
        raise MessageError(f"A message of another format arrived; this side speaks {FORMAT}. Use equal versions.")
    kind = fields.pop("kind", None)
    message = _KINDS.get(kind) if isinstance(kind, str) else None
    if message is None:
        raise MessageError(f"A message of an unknown kind arrived; known are {', '.join(_KINDS)}.")
    for field in dataclasses.fields(message):
        if field.type in {Floats, Words}:
            if field.name in fields:
                raise MessageError(f"A {message.kind} arrived whose {field.name} is text and no vector.")
            fields[field.name] = _vector(envelope.vector, np.float32 if field.type is Floats else np.uint32)
    _check_fields(message, fields)
    if envelope.vector is not None and not any(isinstance(value, np.ndarray) for value in fields.values()):
        raise MessageError(f"A vector came with a {message.kind}, which has none.")
    return message(**fields)


def expect(message: Message, kind: type[Message]) -> None:
    """Return if `message` is of the class `kind`.

    Raises:
        MessageError: It is of another.
    """
    if not isinstance(message, kind):
        raise MessageError(f"A message of kind {message.kind!r} arrived where {kind.kind!r} was due.")


def _parse(body: bytes) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads(body)
    except (ValueError, RecursionError):
        raise MessageError("A message arrived that is not JSON.") from None
    try:
        canonical = isinstance(fields, dict) and canonical_bytes(fields) == body
    except (ValueError, RecursionError):
        canonical = False
    if not canonical:
        raise MessageError("A message arrived that is not canonical JSON.")
    return fields


def _vector(words: Words | None, dtype: type[np.float32] | type[np.uint32]) -> Floats | Words:
    if words is None or words.dtype != np.uint32 or words.ndim != 1 or words.size == 0:
        raise MessageError("A message arrived without its vector of uint32.")
    if dtype is np.uint32:
        return words
    floats: Floats = words.view(np.float32)
    if not np.isfinite(floats).all():
        raise MessageError("A message arrived whose vector is not finite.")
    return floats


def _check_fields(message: type[Message], fields: Mapping[str, object]) -> None:
    due = {field.name: field.type for field in dataclasses.fields(message)}
    if set(fields) != set(due):
        raise MessageError(f"A {message.kind} arrived with missing or extra fields; due are {', '.join(due)}.")
    for name, kind in due.items():
        value = fields[name]
        if kind is str and not (isinstance(value, str) and len(value) <= 200 and value.isprintable()):
            raise MessageError(
                f"A {message.kind} arrived whose {name} is not a printable text of at most 200 characters."
            )
        if kind is int and not (type(value) is int and 0 <= value < 2**53):
            raise MessageError(f"A {message.kind} arrived whose {name} is not a whole number from 0 to 2^53.")
