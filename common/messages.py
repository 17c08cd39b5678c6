"""What server and site say to each other: typed messages, and the canonical bytes that stand for them.

A message on the wire is an `Envelope`: canonical JSON, which begins with a format and names its kind; after a line
break the message's raw bytes, if its kind has any; and beside them at most one vector of uint32. Parsing is by hand and
strict: unknown kinds, missing, extra or mistyped fields are refused. There is no pickle and nothing names code.

    exchange     server to site    site to server
    A advertise  Offer             Advertisement
    B share      Peers             Shares
    C contribute Start             Contribution
    D confirm    Survivors         Confirmation
    E open       Signatures        Opening

Instead of any answer a site may send a `Failure`.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import Any, ClassVar, Self, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from confide.common.canonical import canonical_bytes, sha256
from confide.common.errors import RULES, ConfideError, MessageError, Refused

FORMAT = "confide-message/1"
LARGEST_BODY_BYTES = 1 << 21
_MOST_NAMES = 1000
Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint32]
Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Envelope:
    """A message as it travels: `body` is JSON and raw bytes, `vector` is (n,), uint32, or None."""

    body: bytes
    vector: Words | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of body and vector together."""
        return len(self.body) + (0 if self.vector is None else self.vector.nbytes)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MaskedVector:
    """The only vector of a site's that can be sent: its words mean nothing but as part of a sum.

    A Delta and a RingVector have no way into a message; a type checker sees to that.
    """

    words: Words

    def __repr__(self) -> str:
        return f"<MaskedVector of {len(self.words)} words>"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Server to site: an attempt at a round begins, with this cohort, under these terms.

    Attributes:
        run: The run's name.
        plan: The plan's digest.
        round: From 1.
        attempt: From 1; another attempt at the same round sums the same vectors.
        cohort: The names of all sites that are asked, sorted.
        roster: The roster's digest.
        layout: The digest of the adapter's layout.
        ring: The digest of the ring's layout.
        signature: The coordinator's, over all of the above.
    """

    kind: ClassVar[str] = "offer"
    run: str
    plan: str
    round: int
    attempt: int
    cohort: Names
    roster: str
    layout: str
    ring: str
    signature: bytes

    @property
    def terms(self) -> dict[str, object]:
        """Everything but the signature."""
        return {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "signature"
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Advertisement:
    """Site to server: the public keys of this attempt, signed, and how far the site's ledger has come.

    Attributes:
        context: What the attempt is.
        keys: Public keys and signature.
        checkpoint: The newest checkpoint of the site's ledger in its short form; empty where there is no ledger.
    """

    kind: ClassVar[str] = "advertisement"
    context: str
    keys: bytes
    checkpoint: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    """Server to site: everybody's advertisements, and which adapter the round starts from.

    Attributes:
        context: What the attempt is.
        adapter: The adapter's digest.
        advertisements: Place, public keys and signature of each site that advertised, in the order of their places.
        checkpoints: The checkpoints that came with them, in the same order.
    """

    kind: ClassVar[str] = "peers"
    context: str
    adapter: str
    advertisements: bytes
    checkpoints: Names = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Site to server: a commitment, and a sealed box of key shares for each neighbour."""

    kind: ClassVar[str] = "shares"
    context: str
    sealed: bytes


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """Server to site: the boxes addressed to it, and the adapter to train from."""

    kind: ClassVar[str] = "start"
    context: str
    inbox: bytes
    adapter: Floats

    @functools.cached_property
    def adapter_digest(self) -> str:
        """SHA-256 of the adapter's little-endian bytes; computed once, when it is first asked for."""
        return vector_digest(self.adapter)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contribution:
    """Site to server: a vector for the sum.

    Attributes:
        context: The attempt, with everybody's keys.
        vector: The vector.
        checkpoint: The newest checkpoint of the site's ledger, in which the round's spend is; empty where there is none.
    """

    kind: ClassVar[str] = "contribution"
    context: str
    vector: MaskedVector
    checkpoint: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Survivors:
    """Server to site: whose vectors are in the sum."""

    kind: ClassVar[str] = "survivors"
    context: str
    sites: bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Confirmation:
    """Site to server: its signature on the survivors."""

    kind: ClassVar[str] = "confirmation"
    context: str
    signature: bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Signatures:
    """Server to site: the sites' signatures on the survivors; with enough of them the sum may be opened."""

    kind: ClassVar[str] = "signatures"
    context: str
    signatures: bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """Site to server: exactly one share for each neighbour and itself."""

    kind: ClassVar[str] = "opening"
    context: str
    shares: bytes = dataclasses.field(repr=False)  # secret until they reach the server


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Site to server: it did not take part, and which class of error or rule was why. Never more than that."""

    kind: ClassVar[str] = "failure"
    error: str
    sentence: str

    @classmethod
    def of(cls, error: Exception) -> Self:
        """Return what may leave a site of `error`: its class in `common/errors`, a fixed sentence, and a rule's name."""
        kinds = (kind for kind in type(error).__mro__ if kind.__module__ == ConfideError.__module__)
        known = next(kinds, ConfideError) if isinstance(error, ConfideError) else ConfideError
        rule = error.rule if isinstance(error, Refused) else ""
        return cls(error=known.__name__, sentence=_sentence(known, rule))

    @property
    def rule(self) -> str:
        """The rule that a refusal follows from, one of `RULES`, or nothing."""
        return next((rule for rule in RULES if self.sentence == _sentence(Refused, rule)), "")


Message = (
    Offer
    | Advertisement
    | Peers
    | Shares
    | Start
    | Contribution
    | Survivors
    | Confirmation
    | Signatures
    | Opening
    | Failure
)
_KINDS: dict[str, type[Message]] = {message.kind: message for message in get_args(Message)}
_VECTORS: frozenset[object] = frozenset({Floats, MaskedVector})
_M = TypeVar("_M", bound=Message)


def vector_digest(vector: Floats | Words) -> str:
    """Return SHA-256 over a vector's little-endian bytes."""
    little = np.ascontiguousarray(vector, dtype=vector.dtype.newbyteorder("<"))
    return sha256(little.view(np.uint8).data)


def seal(message: Message) -> Envelope:
    """Return the envelope of `message`."""
    plain: dict[str, object] = {}
    raw, vector = b"", None
    for field in dataclasses.fields(message):
        value = getattr(message, field.name)
        if isinstance(value, bytes):
            raw = b"\n" + value
        elif isinstance(value, MaskedVector | np.ndarray):
            words = value.words if isinstance(value, MaskedVector) else value
            vector = np.ascontiguousarray(words).view(np.uint32)
        else:
            plain[field.name] = value
    return Envelope(body=canonical_bytes({"format": FORMAT, "kind": message.kind, **plain}) + raw, vector=vector)


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
    text, line_break, raw = envelope.body.partition(b"\n")
    fields = _parse(text)
    if fields.pop("format", None) != FORMAT:
        raise MessageError(f"A message of another format arrived; this side speaks {FORMAT}. Use equal versions.")
    kind = fields.pop("kind", None)
    message = _KINDS.get(kind) if isinstance(kind, str) else None
    if message is None:
        raise MessageError(f"A message of an unknown kind arrived; known are {', '.join(_KINDS)}.")
    due = {field.name: field.type for field in dataclasses.fields(message)}
    for name, form in due.items():
        beside = raw if form is bytes else _vector(envelope.vector, form) if form in _VECTORS else None
        if beside is not None:
            if name in fields:
                raise MessageError(f"A {message.kind} arrived whose {name} is among its texts.")
            fields[name] = beside
    if set(fields) != set(due):
        raise MessageError(f"A {message.kind} arrived with missing or extra fields; due are {', '.join(due)}.")
    if bool(line_break) != (bytes in due.values()):
        raise MessageError(f"A {message.kind} arrived with raw bytes where none are due, or without those that are.")
    if envelope.vector is not None and not _VECTORS & set(due.values()):
        raise MessageError(f"A vector came with a {message.kind}, which has none.")
    opened = message(**{name: _plain(fields[name], due[name], message.kind, name) for name in due})
    if isinstance(opened, Failure):
        _check_known(opened)
    return opened


def kind_of(envelope: Envelope) -> str:
    """Return the kind that `envelope` says it is, or nothing; for those who look on and do not open it."""
    try:
        return str(json.loads(envelope.body.partition(b"\n")[0])["kind"])
    except (ValueError, RecursionError, TypeError, KeyError):
        return ""


def expect(message: Message, kind: type[_M]) -> _M:
    """Return `message`, which is of the class `kind`.

    Raises:
        MessageError: It is of another.
    """
    if not isinstance(message, kind):
        raise MessageError(f"A message of kind {message.kind!r} arrived where {kind.kind!r} was due.")
    return message


def _parse(text: bytes) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError):
        raise MessageError("A message arrived that is not JSON.") from None
    try:
        canonical = isinstance(fields, dict) and canonical_bytes(fields) == text
    except (ValueError, RecursionError):
        canonical = False
    if not canonical:
        raise MessageError("A message arrived that is not canonical JSON.")
    return fields


def _vector(words: Words | None, form: object) -> Floats | MaskedVector:
    if words is None or words.dtype != np.uint32 or words.ndim != 1 or words.size == 0:
        raise MessageError("A message arrived without its vector of uint32.")
    if form is MaskedVector:
        return MaskedVector(words=words)
    floats: Floats = words.view(np.float32)
    if not np.isfinite(floats).all():
        raise MessageError("A message arrived whose vector is not finite.")
    return floats


def _plain(value: Any, form: object, kind: str, name: str) -> Any:  # noqa: ANN401  of the form that is checked
    """Return a field's value if it is of its form."""
    if form is str and not _is_text(value):
        raise MessageError(f"A {kind} arrived whose {name} is not a printable text of at most 200 characters.")
    if form is int and not (type(value) is int and 0 <= value < 2**53):
        raise MessageError(f"A {kind} arrived whose {name} is not a whole number from 0 to 2^53.")
    if form == Names:
        if not (isinstance(value, list) and len(value) <= _MOST_NAMES and all(map(_is_text, value))):
            raise MessageError(f"A {kind} arrived whose {name} is not a list of at most {_MOST_NAMES} names.")
        return tuple(value)
    return value


def _check_known(failure: Failure) -> None:
    """Refuse a failure that says anything else than a class of ours and its sentence: it is shown and recorded."""
    kinds = [kind for kind in _errors(ConfideError) if kind.__name__ == failure.error]
    if not any(failure.sentence == _sentence(kind, rule) for kind in kinds for rule in ("", *RULES)):
        raise MessageError("A failure arrived whose class and sentence are not known. Use equal versions.")


def _sentence(kind: type[ConfideError], rule: str) -> str:
    """Return the fixed sentence of a class, or of a refusal by a rule."""
    return f"{kind.outside} It follows its rule on: {rule}." if rule and issubclass(kind, Refused) else kind.outside


def _errors(kind: type[ConfideError]) -> Iterator[type[ConfideError]]:
    """Yield a class of error and all below it."""
    yield kind
    for below in kind.__subclasses__():
        yield from _errors(below)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 200 and value.isprintable()
