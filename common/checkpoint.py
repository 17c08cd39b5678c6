"""A checkpoint: how many records a ledger has, the Merkle root over them and how many of them charge an account, signed.

What is signed is the body of a note, four lines:

    confide-ledger/0f0e…        the origin, with the ledger's id
    1204                        how many records
    0Wv3kZ…=                    the root, in base64
    charges 17                  how many records charge an account

As a note it is followed by an empty line and the signature, which any tool for transparency logs verifies. Between
sites and server the same travels as 172 characters of base64: id (16 bytes), size (8, big-endian), root (32), charges
(8, big-endian) and signature (64). Each form has one spelling only.

The fourth line is for those who see only checkpoints: records that cost nothing make a ledger longer, and no root says
what it stands for, but what was charged never becomes less.

Source: C2SP signed-note v1.0.0 and tlog-checkpoint v1.0.0, with Ed25519, one signature and one extension line.
"""

import base64
import binascii
import dataclasses
import hashlib
import re
from typing import Final, Self

from confide.common.crypto import PUBLIC_BYTES, SIGNATURE_BYTES, Identity, verify
from confide.common.errors import MessageError
from confide.common.merkle import HASH_BYTES

LEDGER_ID: Final = re.compile(r"[0-9a-f]{32}")
SHORT_CHARACTERS = 172
MOST_RECORDS = 2**53 - 1  # whole numbers that every reader of JSON keeps exact
_ORIGIN = "confide-ledger/"
_ED25519 = b"\x01"
_ID_BYTES = 16
_COUNT_BYTES = 8
_KEY_ID_BYTES = 4
_NOTE = re.compile(
    r"confide-ledger/(?P<ledger>[0-9a-f]{32})\n"
    r"(?P<size>0|[1-9][0-9]{0,15})\n"
    r"(?P<root>[A-Za-z0-9+/]{43}=)\n"
    r"charges (?P<charges>0|[1-9][0-9]{0,15})\n"
    r"\n"
    r"— confide-ledger/(?P=ledger) (?P<signature>[A-Za-z0-9+/]{91}=)\n"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A ledger at one moment. That a signature is here says nothing; `verify` does.

    Attributes:
        ledger: The ledger's id, 32 hexadecimal digits.
        size: How many records it has, from 0 to 2^53 - 1.
        root: The Merkle root over them, 32 bytes.
        charges: How many of them charge an account, by a round or by a noised statistic, from 0 to `size`.
        signature: Ed25519, over `text()`, 64 bytes.

    Raises:
        MessageError: One of them is out of its range.
    """

    ledger: str
    size: int
    root: bytes
    charges: int
    signature: bytes

    def __post_init__(self) -> None:
        faults = {
            "the ledger's id is not 32 hexadecimal digits": not LEDGER_ID.fullmatch(self.ledger),
            f"the size {self.size} is not from 0 to 2^53 - 1": not 0 <= self.size <= MOST_RECORDS,
            f"{self.charges} of {self.size} records charge an account": not 0 <= self.charges <= self.size,
            f"the root has {len(self.root)} bytes, not {HASH_BYTES}": len(self.root) != HASH_BYTES,
            f"the signature has {len(self.signature)} bytes, not {SIGNATURE_BYTES}": len(self.signature)
            != SIGNATURE_BYTES,
        }
        if found := [fault for fault, there in faults.items() if there]:
            raise MessageError(f"A checkpoint cannot be used: {'; '.join(found)}. Ask its site for another.")

    @classmethod
    def sign(cls, ledger: str, size: int, root: bytes, charges: int, identity: Identity) -> Self:
        """Return the checkpoint of a ledger, signed by `identity`. The same values always give the same bytes."""
        signature = identity.sign(_text(ledger, size, root, charges))
        return cls(ledger=ledger, size=size, root=root, charges=charges, signature=signature)

    @property
    def origin(self) -> str:
        """What names the ledger in a note, and its key."""
        return _ORIGIN + self.ledger

    def text(self) -> bytes:
        """Return the body of the note, which is what is signed."""
        return _text(self.ledger, self.size, self.root, self.charges)

    def verify(self, key: bytes) -> None:
        """Return if the holder of `key`, 32 bytes, signed this checkpoint.

        Raises:
            MessageError: It did not, or the key is malformed.
        """
        verify(key, self.text(), self.signature)

    def note(self, key: bytes) -> str:
        """Return the signed note; the key's name is the origin, as the format asks for.

        Args:
            key: The Ed25519 public key, 32 bytes, that the signature is of; only 4 bytes of its hash are in the note.
        """
        signed = base64.b64encode(_key_id(self.origin, key) + self.signature).decode()
        return f"{self.text().decode()}\n— {self.origin} {signed}\n"

    def short(self) -> str:
        """Return the form that travels: 172 printable characters."""
        size, charges = (count.to_bytes(_COUNT_BYTES) for count in (self.size, self.charges))
        return base64.b64encode(bytes.fromhex(self.ledger) + size + self.root + charges + self.signature).decode()


def read_note(text: str, key: bytes | None = None) -> Checkpoint:
    """Return the checkpoint in a signed note.

    Args:
        text: What `Checkpoint.note` returned. A note that has been signed by witnesses too is not read.
        key: The key it must be signed by; without one nothing is verified, not even the key's id.

    Raises:
        MessageError: It is no such note in its one spelling, or is not signed by `key`.
    """
    found = _NOTE.fullmatch(text)
    if found is None:
        raise MessageError(
            f"A text of {len(text)} characters is not the signed note of a ledger's checkpoint, or is spelled in another "
            "way. Ask for the note as the site's software wrote it."
        )
    signed = _decoded(found["signature"])
    checkpoint = Checkpoint(
        ledger=found["ledger"],
        size=int(found["size"]),
        root=_decoded(found["root"]),
        charges=int(found["charges"]),
        signature=signed[_KEY_ID_BYTES:],
    )
    if key is not None:
        if signed[:_KEY_ID_BYTES] != _key_id(checkpoint.origin, key):
            raise MessageError(
                f"The note of {checkpoint.origin} is signed by the key with the id {signed[:_KEY_ID_BYTES].hex()}; the one "
                f"due has the id {_key_id(checkpoint.origin, key).hex()}. Check the key against the roster."
            )
        checkpoint.verify(key)
    return checkpoint


def read_short(text: str) -> Checkpoint:
    """Return the checkpoint that `Checkpoint.short` gave `text` for. It says nothing about who signed it.

    Raises:
        MessageError: It is no checkpoint in its one spelling.
    """
    if len(text) != SHORT_CHARACTERS:
        raise MessageError(f"A checkpoint of {len(text)} characters arrived; {SHORT_CHARACTERS} are due. Discard it.")
    raw = _decoded(text)
    ledger, rest = raw[:_ID_BYTES], raw[_ID_BYTES:]
    size, rest = rest[:_COUNT_BYTES], rest[_COUNT_BYTES:]
    root, rest = rest[:HASH_BYTES], rest[HASH_BYTES:]
    return Checkpoint(
        ledger=ledger.hex(),
        size=int.from_bytes(size),
        root=root,
        charges=int.from_bytes(rest[:_COUNT_BYTES]),
        signature=rest[_COUNT_BYTES:],
    )


def _text(ledger: str, size: int, root: bytes, charges: int) -> bytes:
    return f"{_ORIGIN}{ledger}\n{size}\n{base64.b64encode(root).decode()}\ncharges {charges}\n".encode()


def _key_id(name: str, key: bytes) -> bytes:
    if len(key) != PUBLIC_BYTES:
        raise MessageError(f"An Ed25519 public key has {PUBLIC_BYTES} bytes, not {len(key)}. Pass the raw bytes.")
    return hashlib.sha256(name.encode() + b"\n" + _ED25519 + key).digest()[:_KEY_ID_BYTES]


def _decoded(text: str) -> bytes:
    """Return the bytes of base64 in its one spelling: the unused last bits are 0."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if not raw or base64.b64encode(raw).decode() != text:
        raise MessageError("A checkpoint arrived whose base64 is not in its one spelling. Discard it.")
    return raw
