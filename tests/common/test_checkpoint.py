"""A checkpoint: the note that other software reads, the short form that travels, and texts that are neither."""

import base64
import dataclasses
import hashlib
from typing import Any

import pytest
from hypothesis import given, settings, strategies

from confide.common.checkpoint import MOST_RECORDS, SHORT_CHARACTERS, Checkpoint, read_note, read_short
from confide.common.crypto import Identity, verify
from confide.common.errors import MessageError
from confide.common.merkle import EMPTY_ROOT

ANNA, MALLORY = Identity(b"a" * 32), Identity(b"m" * 32)
LEDGER = "0f" * 16
CHECKPOINT = Checkpoint.sign(LEDGER, 1204, bytes(range(32)), 17, ANNA)
NOTE = CHECKPOINT.note(ANNA.public)
SIZES = strategies.integers(0, MOST_RECORDS)
BYTES32 = strategies.binary(min_size=32, max_size=32)

# Notes and keys that the Go project and others publish to test against.
PUBLISHED = [
    (
        "example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k",
        "This is an example message.\n\n— example.com/foo "
        "Uw2QOkn8srV1yJGh2VYRlL1Tnagv1YEq6TfXppzi2ONncAlTgK7Ztg1ERYNZXsYjOBH3mFXmRKuwHjG1Yu72IneyaQM=\n",
    ),
    (
        "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",
        "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n\n"
        "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n",
    ),
]


def plain_open(note: str, verifier: str) -> str:
    """C2SP signed-note, as it is written, for one signature; `verifier` is name, key id and key, as software lists it."""
    name, key_id, typed = verifier.split("+", 2)
    text, _, line = note.rpartition("\n\n")
    dash, signer, signed = line.removesuffix("\n").split(" ")
    raw = base64.b64decode(signed, validate=True)
    due = hashlib.sha256(name.encode() + b"\n" + base64.b64decode(typed)).digest()[:4]
    assert (dash, signer, raw[:4].hex(), raw[:4]) == ("—", name, key_id, due)
    verify(base64.b64decode(typed)[1:], text.encode() + b"\n", raw[4:])
    return text + "\n"


def verifier_of(checkpoint: Checkpoint, key: bytes) -> str:
    typed = b"\x01" + key
    key_id = hashlib.sha256(checkpoint.origin.encode() + b"\n" + typed).hexdigest()[:8]
    return f"{checkpoint.origin}+{key_id}+{base64.b64encode(typed).decode()}"


@pytest.mark.parametrize(("verifier", "note"), PUBLISHED)
def test_the_plain_reader_of_this_test_opens_published_notes(verifier: str, note: str) -> None:
    assert plain_open(note, verifier) + "\n" == note[: note.index("— ")]


def test_a_note_is_one_that_other_software_opens() -> None:
    text = plain_open(NOTE, verifier_of(CHECKPOINT, ANNA.public))

    origin, size, root, extension = text.splitlines()
    assert (origin, size, extension) == (f"confide-ledger/{LEDGER}", "1204", "charges 17")
    assert base64.b64decode(root) == bytes(range(32))


@given(strategies.binary(min_size=16, max_size=16), SIZES, SIZES, BYTES32)
def test_both_forms_are_read_as_they_were_written(ledger: bytes, one: int, another: int, root: bytes) -> None:
    checkpoint = Checkpoint.sign(ledger.hex(), max(one, another), root, min(one, another), ANNA)

    short, note = checkpoint.short(), checkpoint.note(ANNA.public)

    assert read_short(short) == read_note(note) == read_note(note, ANNA.public) == checkpoint
    assert len(short) == SHORT_CHARACTERS <= 200
    assert short.isascii()
    assert short.isprintable()
    read_short(short).verify(ANNA.public)


def test_an_empty_ledger_has_a_checkpoint() -> None:
    empty = Checkpoint.sign(LEDGER, 0, EMPTY_ROOT, 0, ANNA)

    assert b"\n0\n" in empty.text()
    assert read_note(empty.note(ANNA.public), ANNA.public) == read_short(empty.short()) == empty


@pytest.mark.parametrize(
    "change",
    [{"ledger": "0e" * 16}, {"size": 1203}, {"root": bytes(32)}, {"charges": 18}, {"signature": bytes(64)}],
)
def test_whatever_is_in_a_checkpoint_is_signed(change: dict[str, Any]) -> None:
    changed = dataclasses.replace(CHECKPOINT, **change)

    with pytest.raises(MessageError, match="signature"):
        changed.verify(ANNA.public)
    with pytest.raises(MessageError, match="signature"):
        read_note(changed.note(ANNA.public), ANNA.public)


def test_a_checkpoint_signed_by_another_key_is_refused() -> None:
    with pytest.raises(MessageError, match="signature"):
        CHECKPOINT.verify(MALLORY.public)
    with pytest.raises(MessageError, match=r"signed by the key with the id [0-9a-f]{8}; the one due"):
        read_note(NOTE, MALLORY.public)
    with pytest.raises(MessageError, match="signature"):
        read_note(CHECKPOINT.note(MALLORY.public), MALLORY.public)  # the id of one key, the signature of another
    for key in (b"", bytes(31), bytes(33)):
        with pytest.raises(MessageError, match="32 bytes"):
            read_note(NOTE, key)
        with pytest.raises(MessageError, match="must have 32"):
            CHECKPOINT.verify(key)


MALFORMED: dict[str, dict[str, Any]] = {
    "a short id": {"ledger": "0f" * 15},
    "an id in capitals": {"ledger": "0F" * 16},
    "an id with a line break": {"ledger": "0f" * 16 + "\n"},
    "a negative size": {"size": -1},
    "a size beyond what JSON keeps": {"size": 2**53},
    "a negative number of rounds": {"charges": -1},
    "more rounds than records": {"charges": 1205},
    "a short root": {"root": bytes(31)},
    "a short signature": {"signature": bytes(63)},
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_checkpoint_out_of_range_cannot_be_made(case: str) -> None:
    with pytest.raises(MessageError, match="A checkpoint cannot be used"):
        dataclasses.replace(CHECKPOINT, **MALFORMED[case])


ROOT = base64.b64encode(CHECKPOINT.root).decode()
NO_NOTES: dict[str, str] = {
    "nothing": "",
    "no signature": CHECKPOINT.text().decode(),
    "a line break missing": NOTE.removesuffix("\n"),
    "a line break too many": NOTE + "\n",
    "line breaks of another system": NOTE.replace("\n", "\r\n"),
    "white space": NOTE.replace("1204\n", "1204 \n"),
    "two hyphens": NOTE.replace("—", "--"),
    "a leading zero": NOTE.replace("1204", "01204"),
    "a sign": NOTE.replace("1204", "+1204"),
    "digits of another script": NOTE.replace("1204", "١٢٠٤"),
    "too many records": NOTE.replace("1204", str(2**53)),
    "another extension line before": NOTE.replace(f"{ROOT}\n", f"{ROOT}\nmore\n"),
    "another extension line behind": NOTE.replace("charges 17\n", "charges 17\nmore\n"),
    "no extension line": NOTE.replace("charges 17\n", ""),
    "an extension line of another name": NOTE.replace("charges 17", "rounds 17"),
    "an extension line without a number": NOTE.replace("charges 17", "charges"),
    "a leading zero of rounds": NOTE.replace("charges 17", "charges 017"),
    "two spaces": NOTE.replace("charges 17", "charges  17"),
    "more rounds than records": NOTE.replace("charges 17", "charges 1205"),
    "another name for the key": NOTE.replace(f"— confide-ledger/{LEDGER}", "— north"),
    "another ledger's name for the key": NOTE.replace(f"— confide-ledger/{LEDGER}", f"— confide-ledger/{'0e' * 16}"),
    "another origin": NOTE.replace("confide-ledger", "example.com"),
    "an id in capitals": NOTE.replace(LEDGER, LEDGER.upper()),
    "a root without its padding": NOTE.replace(ROOT, ROOT.rstrip("=")),
    "a root in another spelling": NOTE.replace(ROOT, ROOT[:-2] + "9="),
    "a signature that is cut off": NOTE[:-5] + "\n",
    "two signatures": NOTE + NOTE.splitlines()[-1] + "\n",
    "very long": "x" * 1_000_000,
}


@pytest.mark.parametrize("case", NO_NOTES)
def test_a_note_in_another_spelling_than_its_one_is_no_note(case: str) -> None:
    with pytest.raises(MessageError):
        read_note(NO_NOTES[case])


RAW = base64.b64decode(CHECKPOINT.short())
NO_SHORTS: dict[str, str] = {
    "nothing": "",
    "one character less": CHECKPOINT.short()[:-1],
    "one character more": CHECKPOINT.short() + "A",
    "a line break": CHECKPOINT.short()[:-1] + "\n",
    "a byte less, padded": base64.b64encode(RAW[:-1]).decode(),
    "two bytes less, padded": base64.b64encode(RAW[:-2]).decode(),
    "letters for the web": base64.urlsafe_b64encode(b"\xff" * 128).decode(),
    "another script": "é" * SHORT_CHARACTERS,
    "too many records": base64.b64encode(RAW[:16] + (2**53).to_bytes(8) + RAW[24:]).decode(),
    "the most records": base64.b64encode(RAW[:16] + b"\xff" * 8 + RAW[24:]).decode(),
    "more rounds than records": base64.b64encode(RAW[:56] + (1205).to_bytes(8) + RAW[64:]).decode(),
    "the most rounds": base64.b64encode(RAW[:56] + b"\xff" * 8 + RAW[64:]).decode(),
    "no rounds": base64.b64encode(RAW[:56] + RAW[64:]).decode(),
    "without its padding": CHECKPOINT.short().rstrip("="),
}


@pytest.mark.parametrize("case", NO_SHORTS)
def test_a_short_form_in_another_spelling_than_its_one_is_none(case: str) -> None:
    with pytest.raises(MessageError):
        read_short(NO_SHORTS[case])


@settings(max_examples=300)
@given(
    strategies.text(max_size=300)
    | strategies.text("ABCabc019+/", min_size=171, max_size=171).map(lambda text: f"{text}=")
)
def test_a_hostile_text_raises_only_our_error(text: str) -> None:
    for read in (read_note, read_short):
        try:
            found = read(text)
        except MessageError:
            continue
        assert text in {found.short(), found.note(ANNA.public)}


@settings(max_examples=300)
@given(strategies.data())
def test_no_changed_character_leaves_a_checkpoint_that_verifies(data: strategies.DataObject) -> None:
    text = data.draw(strategies.sampled_from([CHECKPOINT.short(), NOTE]))
    place = data.draw(strategies.integers(0, len(text) - 1))
    letters = strategies.sampled_from("AZaz09+/=\n—") | strategies.characters(codec="utf-8")
    letter = data.draw(letters.filter(lambda letter: letter != text[place]))
    changed = text[:place] + letter + text[place + 1 :]

    with pytest.raises(MessageError):
        trusted(changed)


def trusted(text: str) -> Checkpoint:
    """Read a text of either form as one that Anna signed."""
    if "\n\n" in text:
        return read_note(text, ANNA.public)
    checkpoint = read_short(text)
    checkpoint.verify(ANNA.public)
    return checkpoint
