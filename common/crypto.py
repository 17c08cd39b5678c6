"""Keys, signatures, sealed messages and keystreams: the only file that imports `cryptography`.

Nothing is invented here. Each function is one published primitive with its choices made: Ed25519, X25519, HKDF-SHA256,
AES-256-GCM, ML-KEM-768, HPKE, STREAM, HMAC-SHA256 and PKCS#8 with PBES2. Every check raises. A key, nonce or signature
of a wrong length is a MessageError if another party sent it and a UsageError if this program passed it; neither ever
holds a secret.

Private keys show the fingerprint of their public key and nothing else; they cannot be pickled or copied, and they equal
only themselves. Python cannot wipe memory: a key is gone when its last reference is and its memory is used again.
"""

import base64
import functools
import hmac
import io
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO, Final, NoReturn, Self, TypeVar

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

from confide.common.canonical import sha256
from confide.common.errors import MessageError, SealError, UsageError

Entropy = Callable[[int], bytes]
Verifier = Callable[[bytes, bytes, bytes], None]
KEY_BYTES = 32
PUBLIC_BYTES = 32
SIGNATURE_BYTES = 64
SEAL_BYTES = 16
NONCE_BYTES = 12
BLOCK_BYTES = 1 << 18
KEM_SEED_BYTES = 64
KEM_PUBLIC_BYTES = 1184
KEM_CIPHERTEXT_BYTES = 1088
_FIELD = 2**255 - 19  # of X25519 and Ed25519
# Points whose order divides 8. Of X25519, by the first coordinate: whatever is agreed with one is known.
_LOW_ORDER = {
    0,
    1,
    _FIELD - 1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
}
# Of Ed25519, by the second coordinate, of orders 4, 1, 2, 8 and 8. A multiple of such a point is one of at most eight, so a
# signature that holds for a message is found by trying these, without any secret.
_EIGHTH = 2707385501144840649318225287225658788936804267575313519463743609750303402022
_FORGEABLE = {0, 1, _FIELD - 1, _EIGHTH, _FIELD - _EIGHTH}
CHUNK_BYTES = 1 << 20
DELIVERY_FORMAT = b"confide-delivery/1\n"
SEALED_FORMAT = b"confide-sealed/1\n"
_SALT_BYTES = 16
LEAST_PASSPHRASE_BYTES = 15
MOST_PASSPHRASE_BYTES = 1023  # OpenSSL reads no longer ones
PASSPHRASE_ROUNDS = 600_000
LARGEST_KEY_FILE_BYTES = 1 << 12


class Identity:
    """An Ed25519 private key: who a site or a person is.

    Args:
        seed: 32 bytes.

    Source: RFC 8032, section 5.1.
    """

    __slots__ = ("_key", "public")

    def __init__(self, seed: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(_ours("An identity's seed", seed, KEY_BYTES))
        self.public: Final = self._key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls, entropy: Entropy = os.urandom) -> Self:
        """Return a new identity, its seed drawn from `entropy`."""
        return cls(entropy(KEY_BYTES))

    def sign(self, message: bytes) -> bytes:
        """Return the signature of `message`, 64 bytes. The same message always has the same signature."""
        return self._key.sign(message)

    def seed(self) -> bytes:
        """Return the secret seed, 32 bytes, to be put into a file that only its owner reads."""
        return self._key.private_bytes_raw()

    def __repr__(self) -> str:
        return _shown(self, self.public)

    def __reduce__(self) -> NoReturn:
        _stay(self)


def verify(public: bytes, message: bytes, signature: bytes) -> None:
    """Return if `signature`, 64 bytes, is that of `message` by the holder of `public`, 32 bytes.

    Raises:
        MessageError: It is not, the key or the signature is malformed, or the key is a point of low order.

    Guarantee: no key is accepted under which anybody can sign.
    Source: RFC 8032, section 5.1.7; the refusal of keys of low order is not in it.
    """
    _check_signer(public)
    try:
        key = Ed25519PublicKey.from_public_bytes(public)
        key.verify(_theirs("A signature", signature, SIGNATURE_BYTES), message)
    except (InvalidSignature, ValueError) as error:
        raise MessageError(
            f"A signature is not the one of the key {_fingerprint(public)}, or the {len(message)} bytes it stands "
            "under were changed. Discard the message, and check the key against the roster."
        ) from error


class AgreementKey:
    """An X25519 private key, with which two parties agree on a secret.

    Args:
        secret: 32 bytes.

    Source: RFC 7748, sections 5 and 6.1.
    """

    __slots__ = ("_key", "public")

    def __init__(self, secret: bytes) -> None:
        self._key = X25519PrivateKey.from_private_bytes(_ours("An agreement key's secret", secret, KEY_BYTES))
        self.public: Final = self._key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls, entropy: Entropy = os.urandom) -> Self:
        """Return a new key, drawn from `entropy`."""
        return cls(entropy(KEY_BYTES))

    def secret(self) -> bytes:
        """Return the secret, 32 bytes; secure aggregation shares it among the peers."""
        return self._key.private_bytes_raw()

    def agree(self, public: bytes) -> bytes:
        """Return the 32 bytes that only the holders of this key and of the key of `public` can compute.

        They are not uniform, and they are equal for every purpose: pass them through `derive`.

        Raises:
            MessageError: `public` is not 32 bytes, or is a point of low order, with which the result would be known.
        """
        peer = X25519PublicKey.from_public_bytes(_theirs("An X25519 public key", public, PUBLIC_BYTES))
        try:
            return self._key.exchange(peer)
        except ValueError as error:
            raise MessageError(_low_order(public)) from error

    def __repr__(self) -> str:
        return _shown(self, self.public)

    def __reduce__(self) -> NoReturn:
        _stay(self)


class KemKey:
    """An ML-KEM-768 private key: agreement that a quantum computer would not undo, to go beside an AgreementKey.

    Args:
        seed: 64 bytes.

    Source: FIPS 203, section 7, with the parameters of ML-KEM-768.
    """

    __slots__ = ("_key", "public")

    def __init__(self, seed: bytes) -> None:
        self._key = MLKEM768PrivateKey.from_seed_bytes(_ours("An ML-KEM-768 seed", seed, KEM_SEED_BYTES))
        self.public: Final = self._key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls, entropy: Entropy = os.urandom) -> Self:
        """Return a new key, its seed drawn from `entropy`."""
        return cls(entropy(KEM_SEED_BYTES))

    def decapsulate(self, ciphertext: bytes) -> bytes:
        """Return the 32 bytes that `encapsulate` returned beside this ciphertext of 1088 bytes.

        A ciphertext that was altered gives other bytes, not an error: only what is sealed under them shows it.

        Raises:
            MessageError: It is of another length.
        """
        return self._key.decapsulate(_theirs("An ML-KEM-768 ciphertext", ciphertext, KEM_CIPHERTEXT_BYTES))

    def __repr__(self) -> str:
        return _shown(self, self.public)

    def __reduce__(self) -> NoReturn:
        _stay(self)


def encapsulate(public: bytes) -> tuple[bytes, bytes]:
    """Return a ciphertext of 1088 bytes for the holder of `public`, and the secret of 32 bytes that it carries.

    The randomness is the operating system's: FIPS 203 lets no caller choose it.

    Raises:
        MessageError: `public` is not an ML-KEM-768 public key of 1184 bytes.
    """
    try:
        key = MLKEM768PublicKey.from_public_bytes(_theirs("An ML-KEM-768 public key", public, KEM_PUBLIC_BYTES))
    except ValueError as error:
        raise MessageError(
            f"The {KEM_PUBLIC_BYTES} bytes with the fingerprint {_fingerprint(public)} are not an ML-KEM-768 public "
            "key: a coefficient is not below 3329. Exclude the peer that sent it."
        ) from error
    secret, ciphertext = key.encapsulate()
    return ciphertext, secret


def check_agreement_key(public: bytes) -> None:
    """Return if `public` is an X25519 public key in its one spelling with which somebody can agree on a secret.

    Raises:
        MessageError: It is malformed, of low order, or not below the field's prime: X25519 takes such numbers for others.

    Source: the list under "How do I validate Curve25519 public keys?" in Bernstein, "A state-of-the-art Diffie-Hellman
    function"; a test agrees with each.
    """
    coordinate = int.from_bytes(_theirs("An X25519 public key", public, PUBLIC_BYTES), "little")
    if coordinate % 2**255 % _FIELD in _LOW_ORDER:
        raise MessageError(_low_order(public))
    if coordinate >= _FIELD:
        raise MessageError(
            f"The X25519 public key {_fingerprint(public)} is not in its one spelling, below 2^255 - 19."
        )


def derive(secret: bytes, info: bytes, length: int = KEY_BYTES) -> bytes:
    """Return `length` bytes that stand for `secret` in the one use that `info` names.

    Args:
        secret: Bytes hard to guess, not necessarily uniform. There is no salt.
        info: Names the use, and everything that must be equal on both sides.
        length: From 1 to 8160 bytes.

    Raises:
        UsageError: `length` is out of range.

    Source: RFC 5869, with SHA-256.
    """
    if not 1 <= length <= 255 * KEY_BYTES:
        raise UsageError(f"A key of {length} bytes cannot be derived; HKDF-SHA256 gives 1 to 8160 bytes. Ask for 32.")
    return HKDF(algorithm=SHA256(), length=length, salt=None, info=info).derive(secret)


def keyed_digest(key: bytes, *parts: bytes) -> bytes:
    """Return 32 bytes that stand for `parts`, and that nobody can compute or check without `key`.

    Before each part stands its length, 8 bytes, big-endian; so no other parts give the same bytes.

    Args:
        key: 32 uniform bytes.
        parts: Any bytes.

    Source: RFC 2104, with SHA-256.
    """
    told = b"".join(len(part).to_bytes(8) + part for part in parts)
    return hmac.digest(_ours("A digest's key", key, KEY_BYTES), told, "sha256")


def seal(key: bytes, nonce: bytes, plaintext: bytes, bound: bytes) -> bytes:
    """Return `plaintext`, encrypted and authenticated together with `bound`; it is SEAL_BYTES longer.

    Args:
        key: 32 uniform bytes.
        nonce: 12 bytes, never used twice with one key: a second use gives both plaintexts away.
        plaintext: Any bytes.
        bound: What must be the same at unsealing; it is authenticated but not part of the result.

    Source: NIST SP 800-38D, AES-256-GCM with a tag of 16 bytes.
    """
    return _aes(key).encrypt(_ours("A nonce", nonce, NONCE_BYTES), plaintext, bound)


def unseal(key: bytes, nonce: bytes, sealed: bytes, bound: bytes) -> bytes:
    """Return the plaintext of what `seal` made with the same key, nonce and bound bytes.

    Raises:
        MessageError: It was altered, or sealed with another key or nonce or for another purpose.
    """
    try:
        return _aes(key).decrypt(_ours("A nonce", nonce, NONCE_BYTES), sealed, bound)
    except InvalidTag as error:
        raise MessageError(
            f"A sealed message of {len(sealed)} bytes was altered, or was sealed with another key or for another "
            "purpose. Discard it; if it comes again, the two sides do not take part in the same attempt."
        ) from error


def deliver(plaintext: bytes, public_kem_key: bytes, purpose: bytes, sender: Identity) -> bytes:
    """Return an envelope that only the holder of an AgreementKey opens, and that shows who sent it.

    Encryption alone would not show that, since anybody may encrypt to a public key: the sender signs the purpose, the
    recipient and the ciphertext. The sender's key is also bound into the encryption, so that nobody can take the
    signature off and put an own one on. An envelope may be shown again: let the purpose name the occasion.

    Args:
        plaintext: Any bytes; the envelope is 131 bytes longer.
        public_kem_key: The recipient's AgreementKey.public, 32 bytes.
        purpose: What the plaintext is for; the recipient must name the same.
        sender: Signs.

    Raises:
        MessageError: The recipient's key is malformed or of low order.

    Source: RFC 9180, section 6.1, base mode with DHKEM(X25519), HKDF-SHA256 and AES-256-GCM; its ephemeral key is the
    operating system's.
    """
    recipient = _theirs("A recipient's key", public_kem_key, PUBLIC_BYTES)
    try:
        ciphertext = _hpke().encrypt(
            plaintext, X25519PublicKey.from_public_bytes(recipient), _info(sender.public, purpose)
        )
    except ValueError as error:
        raise MessageError(_low_order(recipient)) from error
    return DELIVERY_FORMAT + sender.sign(_delivered(purpose, recipient, ciphertext)) + ciphertext


def receive(envelope: bytes, private_key: AgreementKey, purpose: bytes, sender_public: bytes) -> bytes:
    """Return the plaintext of an envelope from `deliver`; nothing is decrypted before the signature holds.

    Raises:
        MessageError: The envelope was altered, or is another sender's, another recipient's or for another purpose.
    """
    body = len(DELIVERY_FORMAT) + SIGNATURE_BYTES
    if not envelope.startswith(DELIVERY_FORMAT):
        raise MessageError(
            f"{len(envelope)} bytes are not an envelope: they do not begin with {DELIVERY_FORMAT!r}. Ask the sender for "
            "it again, and check that both sides run the same version."
        )
    ciphertext = envelope[body:]
    signature = envelope[len(DELIVERY_FORMAT) : body]
    verify(sender_public, _delivered(purpose, private_key.public, ciphertext), signature)
    try:
        return _hpke().decrypt(ciphertext, private_key._key, _info(sender_public, purpose))
    except (InvalidTag, ValueError) as error:
        raise MessageError(
            f"An envelope of {len(envelope)} bytes is signed by {_fingerprint(sender_public)} and still does not open: "
            "the sender made it wrongly. Ask for another."
        ) from error


def seal_file(source: BinaryIO, target: BinaryIO, key: bytes, purpose: bytes, entropy: Entropy = os.urandom) -> None:
    """Write all of `source` to `target`, sealed, in chunks of 1 MiB and with a few of them in memory.

    The format is `confide-sealed/1` and a line break, a salt of 16 bytes, and the chunks, each followed by a tag of 16
    bytes. From the key, these 33 bytes and the purpose, HKDF makes 32 bytes of key and 7 of nonce prefix that are this
    file's own. A chunk's nonce is the prefix, its number (4 bytes, big-endian), and 1 if it is the last, 0 if not; so
    chunks cannot be exchanged, left out, cut off or added. The first chunk is bound to the header.

    Args:
        source: Read from where it stands; up to 2^32 chunks, 4 PiB.
        target: Buffered; written from where it stands.
        key: 32 uniform bytes, for as many files as there are.
        purpose: What the file is; it must be named again at unsealing.
        entropy: Gives the salt.

    Source: STREAM of Hoang, Reyhanitabar, Rogaway, Vizár, Online Authenticated-Encryption and its Nonce-Reuse
    Misuse-Resistance, 2015, section 7.
    """
    header = SEALED_FORMAT + _ours("A salt", entropy(_SALT_BYTES), _SALT_BYTES)
    cipher, prefix = _file_cipher(header, key, purpose)
    target.write(header)
    for nonce, bound, chunk in _chunks(source, CHUNK_BYTES, header, prefix):
        target.write(cipher.encrypt(nonce, chunk, bound))


def unseal_file(source: BinaryIO, target: BinaryIO, key: bytes, purpose: bytes) -> None:
    """Write to `target` what was sealed into `source`.

    Each chunk is verified before it is written, but only the last one shows that none is missing: after an error,
    discard `target`.

    Args:
        source: What `seal_file` wrote, from where it stands to its end.
        target: Buffered; written from where it stands.
        key: As at sealing.
        purpose: As at sealing.

    Raises:
        SealError: The file is damaged, incomplete or too long, or the key or the purpose is another.
    """
    header = _read(source, len(SEALED_FORMAT) + _SALT_BYTES)
    if not header.startswith(SEALED_FORMAT) or len(header) != len(SEALED_FORMAT) + _SALT_BYTES:
        raise SealError(
            f"This is not a sealed file: it does not begin with {SEALED_FORMAT!r} and {_SALT_BYTES} bytes of salt. "
            "Check that the path is the right one, and that the same version of Confide wrote it."
        )
    cipher, prefix = _file_cipher(header, key, purpose)
    for number, (nonce, bound, chunk) in enumerate(_chunks(source, CHUNK_BYTES + SEAL_BYTES, header, prefix)):
        try:
            target.write(cipher.decrypt(nonce, chunk, bound))
        except InvalidTag as error:
            raise SealError(
                f"Chunk {number} of a sealed file, {len(chunk)} bytes, does not open: the file is damaged or cut off, "
                f"or it was sealed with another key or not as {purpose!r}. Use the key it was sealed with, or a copy "
                "of the file."
            ) from error


def seal_bytes(plaintext: bytes, key: bytes, purpose: bytes, entropy: Entropy = os.urandom) -> bytes:
    """Return what `seal_file` would write for `plaintext`."""
    target = io.BytesIO()
    seal_file(io.BytesIO(plaintext), target, key, purpose, entropy)
    return target.getvalue()


def unseal_bytes(sealed: bytes, key: bytes, purpose: bytes) -> bytes:
    """Return what `seal_bytes` was given; raises as `unseal_file` does."""
    target = io.BytesIO()
    unseal_file(io.BytesIO(sealed), target, key, purpose)
    return target.getvalue()


_Key = TypeVar("_Key", Identity, AgreementKey)


def key_to_file(
    key: Identity | AgreementKey,
    passphrase: bytes,
    *,
    insecure_no_passphrase: bool = False,
    entropy: Entropy = os.urandom,
) -> bytes:
    """Return what a key's file holds: the private key as PKCS#8 in PEM, and after it the public key.

    The private key is encrypted by PBES2: AES-256-CBC under PBKDF2 with HMAC-SHA256, PASSPHRASE_ROUNDS iterations and
    a salt of 16 bytes. It is assembled here because the library's own choice has 2048 iterations: a graphics processor
    tries millions of passphrases a second against these. Other programs read the file all the same. CBC does not show
    damage; the public key does, and whoever has no passphrase can still tell whose key it is. An agreement key is
    written clamped (RFC 7748, section 5): `secret` of the key that is read may differ in the five bits that agreement
    ignores.

    Args:
        key: The key.
        passphrase: LEAST_PASSPHRASE_BYTES to MOST_PASSPHRASE_BYTES.
        insecure_no_passphrase: Without encryption; the passphrase is empty then. Whoever reads the file has the key.
        entropy: Gives salt and initialisation vector, 32 bytes.

    Raises:
        UsageError: The passphrase is too short or too long, or it is given or missing against the word.

    Source: RFC 5958, section 2; RFC 8018, sections 5.2 and 6.2; RFC 8410, sections 4 and 7; RFC 7468, sections 10, 11
    and 13; the least length is that of NIST SP 800-63B-4, section 3.1.1.2, for a password that stands alone.
    """
    _check_word(passphrase, insecure_no_passphrase=insecure_no_passphrase)
    plain = _private_form(type(key), key._key.private_bytes_raw())
    if insecure_no_passphrase:
        return _key_file(plain, encrypted=False, public=_public_form(type(key), key.public))
    if not LEAST_PASSPHRASE_BYTES <= len(passphrase) <= MOST_PASSPHRASE_BYTES:
        raise UsageError(
            f"The passphrase has {len(passphrase)} bytes; {LEAST_PASSPHRASE_BYTES} to {MOST_PASSPHRASE_BYTES} are needed. "
            "Take five words drawn by dice, or let a password keeper make one."
        )
    drawn = _ours("A salt and an initialisation vector", entropy(2 * _SALT_BYTES), 2 * _SALT_BYTES)
    salt, start = drawn[:_SALT_BYTES], drawn[_SALT_BYTES:]
    cipher = _passphrase_cipher(passphrase, salt, start).encryptor()
    sealed = cipher.update(plain + _PADDING) + cipher.finalize()
    return _key_file(_encrypted_form(salt, start, sealed), encrypted=True, public=_public_form(type(key), key.public))


def key_from_file(raw: bytes, kind: type[_Key], passphrase: bytes, *, insecure_no_passphrase: bool = False) -> _Key:
    """Return the key in `raw`, which `key_to_file` made in this one spelling; PKCS#8 of other programs is not taken.

    Args:
        raw: The file's content.
        kind: Identity or AgreementKey.
        passphrase: As at writing.
        insecure_no_passphrase: Take a key that is not encrypted; the passphrase is empty then.

    Raises:
        SealError: The passphrase is another, the file is damaged, or it holds a key of another kind.
        UsageError: The key is encrypted and no passphrase is given, or it is not and one is, or the word is missing.

    Guarantee: a key file with any bit turned over is refused.
    """
    private, encrypted, public = _read_key_file(raw, kind)
    if encrypted and not passphrase:
        raise UsageError(f"The key {_fingerprint(public)} is encrypted. Give its passphrase.")
    if not encrypted and passphrase:
        raise UsageError(
            f"The key {_fingerprint(public)} is not encrypted, but a passphrase is given. Check that the file is the "
            "right one; if it is, whoever could read it has the key."
        )
    _check_word(passphrase, insecure_no_passphrase=insecure_no_passphrase)
    plain = private
    if encrypted:
        salt, start, sealed = (private[place] for place in _encrypted_places())
        cipher = _passphrase_cipher(passphrase, salt, start).decryptor()
        plain = (cipher.update(sealed) + cipher.finalize()).removesuffix(
            _PADDING
        )  # with another it stays, and is too long
    key = kind(plain[-KEY_BYTES:])
    if key.public != public or plain != _private_form(kind, plain[-KEY_BYTES:]):
        raise SealError(
            f"The private key of {_fingerprint(public)} does not open: the passphrase is another, or the file is damaged. "
            "Give the passphrase the key was made with, or take the file from a backup."
        )
    return key


def public_in_file(raw: bytes, kind: type[Identity | AgreementKey]) -> bytes:
    """Return the public key, 32 bytes, that a file of `key_to_file` names; no passphrase is needed, and nothing proven.

    Raises:
        SealError: It is not a file of a key of this kind.
    """
    return _read_key_file(raw, kind)[2]


class Scratch:
    """The buffers that keystreams are produced in, used over and over; one per thread.

    Attributes:
        zeros: (BLOCK_BYTES,), what is encrypted; bytes, so that nobody can write to it.
        output: (BLOCK_BYTES + 16,), uint8; the room at the end is for what a route appends.
    """

    __slots__ = ("output", "zeros")

    def __init__(self) -> None:
        self.zeros = bytes(BLOCK_BYTES)
        self.output: npt.NDArray[np.uint8] = np.zeros(BLOCK_BYTES + SEAL_BYTES, np.uint8)

    def __repr__(self) -> str:
        return f"<Scratch of {BLOCK_BYTES} bytes>"

    def __reduce__(self) -> NoReturn:
        _stay(self)  # what it holds is a keystream


class Keystream:
    """The keystream of one key, in blocks of BLOCK_BYTES that can be had in any order.

    Block j is AES-256-CTR over zeros; its first counter block is j as 12 little-endian bytes and then 00 00 00 02, and
    the last 4 bytes count upward, big-endian. These are also the bytes that AES-256-GCM adds to a plaintext, and on
    processors with wide AES instructions GCM makes them about twice as fast: hence two routes to the same bytes.
    A key that seals messages must never be a keystream's key as well.

    Args:
        key: 32 uniform bytes.
        route: "gcm", "ctr", or None for the one that is faster on this machine.

    Source: NIST SP 800-38A, section 6.5; SP 800-38D, section 7.1, where the counter of a plaintext begins with 2.
    """

    __slots__ = ("_fill",)

    def __init__(self, key: bytes, route: str | None = None) -> None:
        name = fastest_route() if route is None else route
        if name not in _ROUTES:
            raise UsageError(f"There is no keystream route {name!r}. Choose one of {', '.join(_ROUTES)}.")
        self._fill = _ROUTES[name](_ours("A keystream's key", key, KEY_BYTES))

    def block(self, number: int, scratch: Scratch) -> npt.NDArray[np.uint8]:
        """Return block `number`, from 0 to 2^96 - 1: (BLOCK_BYTES,), uint8.

        It is a view into `scratch`, valid until that is used again.
        """
        if not 0 <= number < 1 << 96:
            raise UsageError(f"A keystream has no block {number}. Blocks go from 0 to 2^96 - 1.")
        self._fill(number.to_bytes(NONCE_BYTES, "little"), scratch)
        return scratch.output[:BLOCK_BYTES]

    def __repr__(self) -> str:
        return "<Keystream>"

    def __reduce__(self) -> NoReturn:
        _stay(self)


@functools.cache
def fastest_route() -> str:
    """Return the route that makes keystream faster here, measured once per process in about a millisecond."""
    scratch = Scratch()

    def seconds(route: str) -> float:
        stream, times = Keystream(bytes(KEY_BYTES), route), []
        for number in range(5):
            start = time.perf_counter()
            stream.block(number, scratch)
            times.append(time.perf_counter() - start)
        return min(times)  # whatever else the machine does only adds

    return min(_ROUTES, key=seconds)


_Fill = Callable[[bytes, Scratch], None]


def _by_gcm(key: bytes) -> _Fill:
    cipher = AESGCM(key)

    def fill(nonce: bytes, scratch: Scratch) -> None:
        cipher.encrypt_into(nonce, scratch.zeros, None, scratch.output.data)

    return fill


def _by_ctr(key: bytes) -> _Fill:
    algorithm = algorithms.AES256(key)

    def fill(nonce: bytes, scratch: Scratch) -> None:
        counter = modes.CTR(nonce + b"\x00\x00\x00\x02")
        Cipher(algorithm, counter).encryptor().update_into(scratch.zeros, scratch.output.data)

    return fill


_ROUTES: dict[str, Callable[[bytes], _Fill]] = {"gcm": _by_gcm, "ctr": _by_ctr}


@functools.cache
def _hpke() -> Suite:
    return Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def _info(sender: bytes, purpose: bytes) -> bytes:
    return DELIVERY_FORMAT + sender + purpose


def _delivered(purpose: bytes, recipient: bytes, ciphertext: bytes) -> bytes:
    """Return what a sender signs; the purpose's length stands before it, so that no other parts give the same bytes."""
    return DELIVERY_FORMAT + len(purpose).to_bytes(8) + purpose + recipient + ciphertext


def _file_cipher(header: bytes, key: bytes, purpose: bytes) -> tuple[AESGCM, bytes]:
    """Return a file's own cipher and nonce prefix; the header has a fixed length, so the two parts stay apart."""
    own = derive(_ours("A file's key", key, KEY_BYTES), header + purpose, KEY_BYTES + 7)
    return AESGCM(own[:KEY_BYTES]), own[KEY_BYTES:]


def _chunks(source: BinaryIO, size: int, header: bytes, prefix: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Yield nonce, bound bytes and content of each chunk; a file without content has one empty chunk."""
    number, chunk = 0, _read(source, size)
    while True:
        following = _read(source, size)
        yield prefix + number.to_bytes(4) + bytes([not following]), b"" if number else header, chunk
        if not following:
            return
        number, chunk = number + 1, following


def _read(source: BinaryIO, size: int) -> bytes:
    """Return `size` bytes, fewer only at the end: one read of a pipe may give fewer before that."""
    data = source.read(size)
    while len(data) < size and (more := source.read(size - len(data))):
        data += more
    return data


# The object identifiers of RFC 8018 and RFC 8410, as the standard's DER has them.
_PBES2, _PBKDF2 = bytes.fromhex("06092a864886f70d01050d"), bytes.fromhex("06092a864886f70d01050c")
_HMAC_SHA256, _AES_256_CBC = bytes.fromhex("06082a864886f70d02090500"), bytes.fromhex("060960864801650304012a")
_NAMES: dict[type[Identity | AgreementKey], bytes] = {
    Identity: bytes.fromhex("06032b6570"),
    AgreementKey: bytes.fromhex("06032b656e"),
}
_PADDING = bytes([16]) * 16  # of CBC, after the three whole blocks of a private key's form
_KEY_FILE = re.compile(
    rb"-----BEGIN (ENCRYPTED )?PRIVATE KEY-----\n([A-Za-z0-9+/=\n]{1,1000})-----END (?:ENCRYPTED )?PRIVATE KEY-----\n"
    rb"-----BEGIN PUBLIC KEY-----\n([A-Za-z0-9+/=\n]{1,100})-----END PUBLIC KEY-----\n"
)


def _read_key_file(raw: bytes, kind: type[Identity | AgreementKey]) -> tuple[bytes, bool, bytes]:
    """Return the private part's DER, whether it is encrypted, and the public key; the spelling is checked."""
    found = _KEY_FILE.fullmatch(raw) if len(raw) <= LARGEST_KEY_FILE_BYTES else None
    if found is None:
        raise SealError(
            f"These {len(raw)} bytes are not a key file: a private and a public key in PEM, as Confide writes them, stand "
            "in it and nothing else. Check that the path is the right one, or take the file from a backup."
        )
    encrypted = found[1] is not None
    private, public = _from_base64(found[2]), _from_base64(found[3])
    key = public[-PUBLIC_BYTES:]
    if encrypted:
        expected = _encrypted_form(*(private[place] for place in _encrypted_places()))
    else:
        expected = _private_form(kind, private[-KEY_BYTES:])
    one_spelling = private == expected and public == _public_form(kind, key)
    if not one_spelling or _key_file(private, encrypted=encrypted, public=public) != raw:
        raise SealError(
            f"A key file of {len(raw)} bytes is damaged, or holds a key of another kind than {kind.__name__}. Check that "
            "the path is the right one, or take the file from a backup."
        )
    return private, encrypted, key


def _passphrase_cipher(passphrase: bytes, salt: bytes, start: bytes) -> Cipher[modes.CBC]:
    stretching = PBKDF2HMAC(algorithm=SHA256(), length=KEY_BYTES, salt=salt, iterations=PASSPHRASE_ROUNDS)
    return Cipher(algorithms.AES256(stretching.derive(passphrase)), modes.CBC(start))


def _key_file(private: bytes, *, encrypted: bool, public: bytes) -> bytes:
    return _pem(b"ENCRYPTED PRIVATE KEY" if encrypted else b"PRIVATE KEY", private) + _pem(b"PUBLIC KEY", public)


def _pem(name: bytes, der: bytes) -> bytes:
    text = base64.b64encode(der)
    lines = b"".join(text[at : at + 64] + b"\n" for at in range(0, len(text), 64))
    return b"-----BEGIN " + name + b"-----\n" + lines + b"-----END " + name + b"-----\n"


def _from_base64(text: bytes) -> bytes:
    try:
        return base64.b64decode(text)
    except ValueError:
        return b""  # which is no key's form


def _private_form(kind: type[Identity | AgreementKey], secret: bytes) -> bytes:
    """Return a private key's DER, 48 bytes (RFC 8410, section 7)."""
    return _der(0x30, b"\x02\x01\x00", _der(0x30, _NAMES[kind]), _der(0x04, _der(0x04, _one_secret(kind, secret))))


def _one_secret(kind: type[Identity | AgreementKey], secret: bytes) -> bytes:
    """Return the secret, clamped for X25519: damage to bits that it ignores would change what is derived from it."""
    if kind is Identity or len(secret) != KEY_BYTES:
        return secret
    return bytes([secret[0] & 0xF8, *secret[1:31], secret[31] & 0x7F | 0x40])


def _public_form(kind: type[Identity | AgreementKey], public: bytes) -> bytes:
    """Return a public key's DER, 44 bytes (RFC 8410, section 4)."""
    return _der(0x30, _der(0x30, _NAMES[kind]), _der(0x03, b"\0", public))


def _encrypted_form(salt: bytes, start: bytes, sealed: bytes) -> bytes:
    """Return an encrypted private key's DER (RFC 5958, section 3, with the parameters of RFC 8018, appendix A)."""
    rounds = _der(0x02, PASSPHRASE_ROUNDS.to_bytes(3))
    stretching = _der(0x30, _PBKDF2, _der(0x30, _der(0x04, salt), rounds, _der(0x30, _HMAC_SHA256)))
    cipher = _der(0x30, _AES_256_CBC, _der(0x04, start))
    return _der(0x30, _der(0x30, _PBES2, _der(0x30, stretching, cipher)), _der(0x04, sealed))


@functools.cache
def _encrypted_places() -> tuple[slice, slice, slice]:
    """Return where salt, initialisation vector and encrypted key stand in the form, whose lengths never change."""
    marks = b"S" * 16, b"I" * 16, b"K" * 64
    form = _encrypted_form(*marks)
    salt, start, sealed = (slice(form.index(mark), form.index(mark) + len(mark)) for mark in marks)
    return salt, start, sealed


def _der(tag: int, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return bytes([tag, *([] if len(content) < 128 else [0x81]), len(content)]) + content


def _check_word(passphrase: bytes, *, insecure_no_passphrase: bool) -> None:
    if insecure_no_passphrase and passphrase:
        raise UsageError("A passphrase is given beside insecure_no_passphrase. Leave one of the two out.")
    if not insecure_no_passphrase and not passphrase:
        raise UsageError(
            "No passphrase is given for a private key. Give one, or say insecure_no_passphrase if the disk alone guards it."
        )


def _aes(key: bytes) -> AESGCM:
    return AESGCM(_ours("A sealing key", key, KEY_BYTES))


def _ours(what: str, value: bytes, length: int) -> bytes:
    """Return a value of this program's if it has the length; its bytes may be secret, so they are not shown."""
    if len(value) != length:
        raise UsageError(f"{what} has {len(value)} bytes, and must have {length}. Pass the raw bytes, not their text.")
    return value


def _theirs(what: str, value: bytes, length: int) -> bytes:
    """Return a value that another party sent if it has the length."""
    if len(value) != length:
        raise MessageError(f"{what} has {len(value)} bytes, and must have {length}. Discard the message it came in.")
    return value


def _check_signer(public: bytes) -> None:
    """Return if `public` is 32 bytes, and no point of low order in whatever spelling: the sign, or one above 2^255 - 20."""
    spelled = int.from_bytes(_theirs("An Ed25519 public key", public, PUBLIC_BYTES), "little")
    if spelled % 2**255 % _FIELD in _FORGEABLE:
        raise MessageError(
            f"The Ed25519 public key {_fingerprint(public)} is a point of low order, for which anybody can sign. No honest key "
            "generation makes one: refuse it, and ask whoever gave it to you for another, by another way."
        )


def _fingerprint(public: bytes) -> str:
    return sha256(public)[:23]  # "sha256:" and 16 digits


def _low_order(public: bytes) -> str:
    return (
        f"The X25519 public key {_fingerprint(public)} is a point of low order; whatever is agreed with it is known to "
        "everybody. No honest key generation makes one: exclude the peer that sent it."
    )


def _shown(key: object, public: bytes) -> str:
    return f"<{type(key).__name__} {_fingerprint(public)}>"


def _stay(key: object) -> NoReturn:
    raise TypeError(f"A {type(key).__name__} is not pickled or copied: its secret would lie where nobody guards it.")
