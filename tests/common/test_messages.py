"""Messages and the canonical bytes that stand for them."""

import dataclasses
import hashlib
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies
from hypothesis.extra import numpy as arrays

from confide.client.mechanism import Delta
from confide.common.canonical import canonical_bytes
from confide.common.checkpoint import SHORT_CHARACTERS
from confide.common.errors import ConfideError, DataError, MessageError, Refused
from confide.common.messages import (
    LARGEST_BODY_BYTES,
    Advertisement,
    Confirmation,
    Contribution,
    Envelope,
    Failure,
    MaskedVector,
    Message,
    Offer,
    Opening,
    Peers,
    Shares,
    Signatures,
    Start,
    Survivors,
    expect,
    kind_of,
    open_envelope,
    seal,
    vector_digest,
)
from confide.common.ring import RingLayout, RingVector

OFFER = Offer(
    run="demo",
    plan="sha256:1",
    round=1,
    attempt=1,
    cohort=("a", "b", "c"),
    roster="sha256:4",
    layout="sha256:2",
    ring="sha256:3",
    signature=b"\x00\n\xff",
)
PEERS = Peers(context="c0", adapter="sha256:5", advertisements=b"keys", checkpoints=("a", ""))
ADVERTISEMENT = Advertisement(context="c0", keys=b"keys", checkpoint="a")
START = Start(context="c1", inbox=b"boxes\n{}", adapter=np.array([0.0, -0.0, 1.5], np.float32))
CONTRIBUTION = Contribution(
    context="c1", vector=MaskedVector(words=np.array([0, 1, 2**32 - 1], np.uint32)), checkpoint="a"
)
FAILURE = Failure(error="Refused", sentence="The site refused.")

TEXTS = strategies.text(
    strategies.characters(exclude_categories=["C", "Z"], include_characters=" "), max_size=200
).filter(str.isprintable)
WHOLE = strategies.integers(0, 2**53 - 1)
LENGTHS = strategies.integers(1, 20)
RAW = strategies.binary(max_size=200)
MESSAGES = strategies.one_of(
    strategies.builds(
        Offer,
        run=TEXTS,
        plan=TEXTS,
        round=WHOLE,
        attempt=WHOLE,
        cohort=strategies.lists(TEXTS, max_size=5).map(tuple),
        roster=TEXTS,
        layout=TEXTS,
        ring=TEXTS,
        signature=RAW,
    ),
    strategies.builds(Advertisement, context=TEXTS, keys=RAW, checkpoint=TEXTS),
    strategies.builds(
        Peers,
        context=TEXTS,
        adapter=TEXTS,
        advertisements=RAW,
        checkpoints=strategies.lists(TEXTS, max_size=5).map(tuple),
    ),
    strategies.builds(Shares, context=TEXTS, sealed=RAW),
    strategies.builds(
        Start,
        context=TEXTS,
        inbox=RAW,
        adapter=arrays.arrays(
            np.float32, LENGTHS, elements=strategies.floats(width=32, allow_nan=False, allow_infinity=False)
        ),
    ),
    strategies.builds(
        Contribution,
        context=TEXTS,
        vector=strategies.builds(MaskedVector, words=arrays.arrays(np.uint32, LENGTHS)),
        checkpoint=TEXTS,
    ),
    strategies.builds(Survivors, context=TEXTS, sites=RAW),
    strategies.builds(Confirmation, context=TEXTS, signature=RAW),
    strategies.builds(Signatures, context=TEXTS, signatures=RAW),
    strategies.builds(Opening, context=TEXTS, shares=RAW),
    strategies.sampled_from(
        [
            Failure.of(error)
            for error in (Refused("No."), Refused("No.", "noise"), DataError(), ConfideError(), OSError())
        ]
    ),
)


def same(one: Message, other: Message) -> bool:
    def bits(value: object) -> object:
        plain = value.words if isinstance(value, MaskedVector) else value
        return (plain.dtype, plain.tobytes()) if isinstance(plain, np.ndarray) else plain

    names = [field.name for field in dataclasses.fields(one)]
    return type(one) is type(other) and all(bits(getattr(one, name)) == bits(getattr(other, name)) for name in names)


@given(MESSAGES)
def test_every_message_opens_to_what_was_sealed(message: Message) -> None:
    opened = open_envelope(seal(message))

    assert same(opened, message)


@given(MESSAGES)
def test_equal_messages_have_equal_bytes(message: Message) -> None:
    envelope = seal(message)

    again = seal(open_envelope(envelope))

    assert again.body == envelope.body
    assert again.size_bytes == envelope.size_bytes


def test_a_body_is_the_documented_json() -> None:
    assert seal(FAILURE).body == (
        b'{"error":"Refused","format":"confide-message/1","kind":"failure","sentence":"The site refused."}'
    )
    assert seal(CONTRIBUTION).body == (
        b'{"checkpoint":"a","context":"c1","format":"confide-message/1","kind":"contribution"}'
    )


def test_raw_bytes_stand_behind_the_json_and_a_line_break() -> None:
    assert seal(START).body == b'{"context":"c1","format":"confide-message/1","kind":"start"}\nboxes\n{}'
    assert seal(OFFER).body == (
        b'{"attempt":1,"cohort":["a","b","c"],"format":"confide-message/1","kind":"offer","layout":"sha256:2",'
        b'"plan":"sha256:1","ring":"sha256:3","roster":"sha256:4","round":1,"run":"demo"}\n\x00\n\xff'
    )


def test_the_vector_of_a_message_stands_beside_its_body() -> None:
    floats, words = seal(START).vector, seal(CONTRIBUTION).vector

    assert floats is not None
    assert words is not None
    assert floats.tolist() == [0, 1 << 31, 0x3FC00000]  # IEEE 754
    assert words.tolist() == [0, 1, 2**32 - 1]
    assert [seal(message).vector for message in (OFFER, PEERS, FAILURE)] == [None] * 3


def test_the_size_counts_body_and_vector() -> None:
    envelope = seal(START)

    assert envelope.size_bytes == len(envelope.body) + 3 * 4
    assert seal(FAILURE).size_bytes == len(seal(FAILURE).body)


def test_the_digest_of_a_vector_is_over_its_little_endian_bytes() -> None:
    vector = np.array([1.0, -2.0], np.float32)

    assert vector_digest(vector) == "sha256:" + hashlib.sha256(b"\0\0\x80\x3f\0\0\0\xc0").hexdigest()
    assert vector_digest(vector.astype(">f4")) == vector_digest(vector)
    assert START.adapter_digest == vector_digest(START.adapter)


def test_the_terms_of_an_offer_are_all_of_it_but_the_signature() -> None:
    assert {**OFFER.terms, "signature": OFFER.signature} == dataclasses.asdict(OFFER)
    assert "signature" not in OFFER.terms


def changed(message: Message, **fields: object) -> bytes:
    """Return the canonical body of `message` with fields changed, or left out where they are None; its raw bytes stay."""
    text, line_break, raw = seal(message).body.partition(b"\n")
    whole = {**json.loads(text), **fields}
    return canonical_bytes({name: value for name, value in whole.items() if value is not None}) + line_break + raw


MALFORMED_BODIES = {
    "empty": b"",
    "no JSON": b"offer",
    "no text": b"\xff\xfe",
    "cut short": seal(FAILURE).body[:-1],
    "two values": seal(FAILURE).body * 2,
    "a list": b"[]",
    "a text": b'"failure"',
    "a number": b"1",
    "null": b"null",
    "no fields": b"{}",
    "white space": seal(FAILURE).body.replace(b",", b", "),
    "a line break after": seal(FAILURE).body + b"\n",
    "raw bytes where none are due": seal(FAILURE).body + b"\nraw",
    "raw bytes alone": b"\nraw",
    "a byte order mark": b"\xef\xbb\xbf" + seal(FAILURE).body,
    "UTF-16": seal(FAILURE).body.decode().encode("utf-16"),
    "another order": b'{"format":"confide-message/1","error":"","kind":"failure","sentence":""}',
    "a key twice": seal(FAILURE).body.replace(b'{"error":"Refused"', b'{"error":"Refused","error":"Refused"'),
    "another key twice": seal(FAILURE).body.replace(b'{"error":"Refused"', b'{"error":"Other","error":"Refused"'),
    "another spelling of a letter": seal(FAILURE).body.replace(b"Refused", b"Re\\u0066used"),
    "unescaped letters": changed(OFFER, run="é").replace(b"\\u00e9", "é".encode()),
    "not a number": seal(OFFER).body.replace(b'"round":1', b'"round":NaN'),
    "infinity": seal(OFFER).body.replace(b'"round":1', b'"round":Infinity'),
    "a number of 5000 digits": seal(OFFER).body.replace(b'"round":1', b'"round":' + b"1" * 5000),
    "nested deeply": b"[" * 100_000,
    "nested deeply in a field": changed(OFFER, run="?").replace(b'"?"', b"[" * 50_000 + b"]" * 50_000),
    "nested deeply as the kind": changed(FAILURE, kind="?").replace(b'"?"', b"[" * 50_000 + b"]" * 50_000),
    "too large": changed(FAILURE, sentence="a" * LARGEST_BODY_BYTES),
    "no format": changed(FAILURE, format=None),
    "another format": changed(FAILURE, format="confide-message/2"),
    "format a list": changed(FAILURE, format=["confide-message/1"]),
    "no kind": changed(FAILURE, kind=None),
    "an unknown kind": changed(FAILURE, kind="delta"),
    "a class for a kind": changed(FAILURE, kind="Failure"),
    "kind a list": changed(FAILURE, kind=["failure"]),
    "a field missing": changed(FAILURE, sentence=None),
    "a field too many": changed(FAILURE, path="/data"),
    "a number for a text": changed(OFFER, run=1),
    "a bool for a text": changed(OFFER, run=True),
    "a list for a text": changed(OFFER, run=["demo"]),
    "a text too long": changed(OFFER, run="a" * 201),
    "a text with a terminal's escape": changed(OFFER, run="\x1b[2J"),
    "a text with a line break": changed(OFFER, run="a\nb"),
    "a text with an unpaired surrogate": changed(OFFER, run="\ud800"),
    "a text with a right-to-left override": changed(OFFER, run="\u202egnp"),
    "a failure of an unknown class": changed(FAILURE, error="OSError"),
    "a failure of no class": changed(FAILURE, error=""),
    "a failure of another module's class": changed(FAILURE, error="confide.common.errors.Refused"),
    "a failure with another class's sentence": changed(FAILURE, error="DataError"),
    "a failure with a sentence of its own": changed(FAILURE, sentence="The site refused, as 4711 was in it."),
    "a failure with a number for a class": changed(FAILURE, error=1),
    "a failure with a list for a sentence": changed(FAILURE, sentence=["The site refused."]),
}


@pytest.mark.parametrize("case", MALFORMED_BODIES)
@pytest.mark.parametrize("vector", [None, np.zeros(3, np.uint32)], ids=["bare", "with a vector"])
def test_a_malformed_body_is_refused(case: str, vector: np.ndarray[tuple[int], np.dtype[np.uint32]] | None) -> None:
    with pytest.raises(MessageError):
        open_envelope(Envelope(body=MALFORMED_BODIES[case], vector=vector))


@pytest.mark.parametrize(
    "body",
    [
        changed(OFFER, round=True),
        changed(OFFER, round=1.0),
        changed(OFFER, round="1"),
        changed(OFFER, round=-1),
        changed(OFFER, round=2**53),
        changed(OFFER, roster=None),
        changed(OFFER, run=7),
        changed(OFFER, more=1),
        changed(OFFER, cohort=None),
        changed(OFFER, cohort="abc"),
        changed(OFFER, cohort={"a": 1}),
        changed(OFFER, cohort=["a", 1]),
        changed(OFFER, cohort=["a", ["b"]]),
        changed(OFFER, cohort=["a", "\n"]),
        changed(OFFER, cohort=["a" * 201]),
        changed(OFFER, cohort=["a"] * 1001),
        changed(OFFER, signature="00"),
        changed(OFFER, signature=""),
        changed(OFFER).partition(b"\n")[0],  # without its raw bytes
    ],
)
def test_an_offer_with_a_mistyped_field_is_refused(body: bytes) -> None:
    open_envelope(Envelope(body=changed(OFFER)))
    open_envelope(Envelope(body=changed(OFFER, cohort=["a" * 200] * 1000)))

    with pytest.raises(MessageError):
        open_envelope(Envelope(body=body))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (ADVERTISEMENT, {"checkpoint": None}),
        (ADVERTISEMENT, {"checkpoint": 1}),
        (ADVERTISEMENT, {"checkpoint": ["a"]}),
        (ADVERTISEMENT, {"checkpoint": "a" * 201}),
        (ADVERTISEMENT, {"checkpoint": "a\n"}),
        (PEERS, {"checkpoints": None}),
        (PEERS, {"checkpoints": "a"}),
        (PEERS, {"checkpoints": {"a": ""}}),
        (PEERS, {"checkpoints": ["a", 1]}),
        (PEERS, {"checkpoints": ["a", None]}),
        (PEERS, {"checkpoints": ["a" * 201]}),
        (PEERS, {"checkpoints": [""] * 1001}),
    ],
)
def test_a_message_with_a_mistyped_or_missing_checkpoint_is_refused(message: Message, change: dict[str, Any]) -> None:
    open_envelope(Envelope(body=changed(message)))

    body = changed(message, **change)

    with pytest.raises(MessageError):
        open_envelope(Envelope(body=body))


def test_the_checkpoints_of_the_largest_federation_fit_into_a_message() -> None:
    hybrid = bytes(1000 * (2 + 1248 + 64))
    peers = dataclasses.replace(PEERS, advertisements=hybrid, checkpoints=(SHORT_CHARACTERS * "c",) * 1000)

    assert same(open_envelope(seal(peers)), peers)


@pytest.mark.parametrize(
    "body",
    [
        changed(START, adapter="zeros"),
        changed(START, adapter=[0.0, 0.0, 0.0]),
        changed(START, inbox="boxes"),
        changed(START, context=None),
        changed(START, context=1),
        changed(START).partition(b"\n")[0],
        changed(CONTRIBUTION, vector=[0, 0, 0]),
        changed(CONTRIBUTION, vector=""),
        changed(CONTRIBUTION) + b"\n",
    ],
)
def test_a_message_whose_vector_or_raw_bytes_are_elsewhere_than_due_is_refused(body: bytes) -> None:
    for message in (START, CONTRIBUTION):
        open_envelope(Envelope(body=changed(message), vector=np.zeros(3, np.uint32)))

    with pytest.raises(MessageError):
        open_envelope(Envelope(body=body, vector=np.zeros(3, np.uint32)))


def test_nesting_of_every_depth_is_refused_as_a_malformed_message() -> None:
    for depth in range(1, 1200):
        nested = b"[" * depth + b"]" * depth
        for body in (changed(OFFER, run="?"), changed(FAILURE, kind="?")):
            with pytest.raises(MessageError):
                open_envelope(Envelope(body=body.replace(b'"?"', nested)))


@given(strategies.binary(max_size=200))
def test_arbitrary_bytes_are_refused(body: bytes) -> None:
    with pytest.raises(MessageError):
        open_envelope(Envelope(body=body))


@given(MESSAGES, strategies.data())
def test_a_message_with_one_byte_changed_opens_differently_or_not_at_all(
    message: Message, data: strategies.DataObject
) -> None:
    envelope = seal(message)
    place = data.draw(strategies.integers(0, len(envelope.body) - 1))
    byte = data.draw(strategies.integers(0, 255).filter(lambda byte: byte != envelope.body[place]))
    body = envelope.body[:place] + bytes([byte]) + envelope.body[place + 1 :]

    try:
        opened = open_envelope(dataclasses.replace(envelope, body=body))
    except MessageError:
        return

    assert not same(opened, message)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_adapter_that_is_not_finite_is_refused(value: float) -> None:
    envelope = seal(dataclasses.replace(START, adapter=np.array([0, value], np.float32)))

    with pytest.raises(MessageError, match="not finite"):
        open_envelope(envelope)


@pytest.mark.parametrize(
    "vector",
    [
        None,
        np.zeros(0, np.uint32),
        np.zeros((2, 2), np.uint32),
        np.zeros(3, np.int32),
        np.zeros(3, np.float32),
        np.zeros(3, np.uint64),
        np.zeros(3, np.object_),
    ],
    ids=["none", "empty", "matrix", "signed", "floats", "wide", "objects"],
)
@pytest.mark.parametrize("message", [START, CONTRIBUTION], ids=["start", "contribution"])
def test_a_message_without_its_vector_of_uint32_is_refused(
    message: Message, vector: np.ndarray[tuple[int, ...], np.dtype[np.uint32]] | None
) -> None:
    with pytest.raises(MessageError, match="without its vector of uint32"):
        open_envelope(Envelope(body=seal(message).body, vector=vector))


@pytest.mark.parametrize("message", [OFFER, PEERS, FAILURE], ids=lambda message: message.kind)
def test_a_vector_that_comes_with_a_message_without_one_is_refused(message: Message) -> None:
    with pytest.raises(MessageError, match=f"A vector came with a {message.kind}"):
        open_envelope(Envelope(body=seal(message).body, vector=np.zeros(3, np.uint32)))


def test_a_message_of_another_kind_than_due_is_refused() -> None:
    expect(OFFER, Offer)

    with pytest.raises(MessageError, match="'offer' arrived where 'contribution' was due"):
        expect(OFFER, Contribution)


SECRET = "patient 4711, /data/rows.csv"


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (DataError(SECRET), "DataError"),
        (Refused(SECRET), "Refused"),
        (ConfideError(SECRET), "ConfideError"),
        (ValueError(SECRET), "ConfideError"),
        (FileNotFoundError(2, SECRET, SECRET), "ConfideError"),
        (KeyError(SECRET), "ConfideError"),
    ],
)
def test_a_failure_holds_a_class_and_a_fixed_sentence_and_never_the_text_of_the_error(
    error: Exception, name: str
) -> None:
    failure = Failure.of(error)

    assert failure.error == name
    assert failure.sentence in {type(error).outside if isinstance(error, ConfideError) else ConfideError.outside}
    for word in ("4711", "patient", "data/", "rows.csv"):
        assert word not in repr(failure)
        assert word.encode() not in seal(failure).body


def test_every_error_of_the_tree_can_leave_a_site_as_a_failure() -> None:
    kinds: list[type[ConfideError]] = [ConfideError, *ConfideError.__subclasses__()]
    for kind in kinds:
        failure = Failure(error=kind.__name__, sentence=kind.outside)

        assert same(open_envelope(seal(failure)), failure)


@given(MESSAGES)
def test_the_kind_is_told_without_opening(message: Message) -> None:
    assert kind_of(seal(message)) == message.kind


@pytest.mark.parametrize("body", [b"", b"?", b"1", b"[]", b"{}", b"\xff", b"[" * 100_000, b"\n" + seal(FAILURE).body])
def test_what_is_no_message_has_no_kind(body: bytes) -> None:
    assert kind_of(Envelope(body=body)) == ""


def test_a_delta_has_no_encoder_so_it_cannot_be_sealed() -> None:
    delta = Delta(values=np.zeros(3, np.float32))

    assert not hasattr(delta, "kind")
    with pytest.raises(AttributeError, match="kind"):
        seal(delta)  # type: ignore[arg-type]  # that mypy objects is half of the fact


def test_a_ring_vector_that_is_not_masked_cannot_be_sealed() -> None:
    layout = RingLayout(length=3, update_bound=1.0, max_sites=3)
    bare = RingVector(words=np.zeros(layout.size, np.uint32), layout=layout)

    with pytest.raises(AttributeError, match="kind"):
        seal(bare)  # type: ignore[arg-type]  # that mypy objects is half of the fact
    with pytest.raises(TypeError):
        seal(Contribution(context="c1", vector=bare))  # type: ignore[arg-type]


def test_a_masked_vector_shows_only_its_length() -> None:
    shown = repr(MaskedVector(words=np.array([4711, 4712], np.uint32)))

    assert shown == "<MaskedVector of 2 words>"
    assert "4711" not in repr(Contribution(context="c1", vector=MaskedVector(words=np.array([4711], np.uint32))))


def test_the_shares_in_an_opening_are_not_shown() -> None:
    assert "secret" not in repr(Opening(context="c", shares=b"secret"))
