"""Keys, signatures, sealed messages and keystreams: the papers' answers, and what an attacker may change."""

import base64
import copy
import functools
import hashlib
import hmac
import io
import itertools
import json
import pickle
import shutil
import subprocess
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from hypothesis import given, strategies

from confide.common import crypto
from confide.common.crypto import (
    BLOCK_BYTES,
    CHUNK_BYTES,
    AgreementKey,
    Identity,
    KemKey,
    Keystream,
    Scratch,
    check_agreement_key,
    deliver,
    derive,
    encapsulate,
    key_from_file,
    key_to_file,
    keyed_digest,
    public_in_file,
    receive,
    seal,
    seal_bytes,
    seal_file,
    unseal,
    unseal_bytes,
    unseal_file,
    verify,
)
from confide.common.errors import MessageError, SealError, UsageError

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "crypto.json").read_text())
SECRET = bytes(range(200, 232))
KEY = bytes(range(32))
NONCE = bytes(12)
ALICE, MALLORY = Identity(b"a" * 32), Identity(b"m" * 32)
BOB, EVE = AgreementKey(b"b" * 32), AgreementKey(b"e" * 32)
ROUTES = ["gcm", "ctr"]
# The second coordinates of Ed25519's eight points of low order; the last two are 0 and 1 once more, in another spelling.
FORGEABLE = (
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
)


def read(vector: dict[str, str]) -> dict[str, bytes]:
    return {name: bytes.fromhex(value) for name, value in vector.items() if name != "source"}


def flips(data: bytes) -> Iterator[bytes]:
    """Yield `data` with each of its bits turned over, one at a time."""
    for bit in range(8 * len(data)):
        yield (int.from_bytes(data) ^ (1 << bit)).to_bytes(len(data))


def lengths_of(data: bytes) -> Iterator[bytes]:
    """Yield every beginning of `data`, and `data` with more behind it."""
    yield from (data[:end] for end in range(len(data)))
    yield from (data + b"\0", data + data)


@pytest.mark.parametrize("vector", VECTORS["ed25519"], ids=lambda v: str(v["source"]))
def test_signatures_are_those_of_rfc_8032(vector: dict[str, str]) -> None:
    known = read(vector)

    identity = Identity(known["seed"])

    assert identity.public == known["public"]
    assert identity.sign(known["message"]) == known["signature"]
    assert identity.seed() == known["seed"]
    verify(known["public"], known["message"], known["signature"])


def test_a_signature_holds_for_one_key_one_message_and_all_its_bits() -> None:
    message = b"round 3"
    signature = ALICE.sign(message)

    forgeries = [
        *((ALICE.public, message, bad) for bad in itertools.chain(flips(signature), lengths_of(signature))),
        *((ALICE.public, bad, signature) for bad in itertools.chain(flips(message), lengths_of(message))),
        *((bad, message, signature) for bad in itertools.chain(flips(ALICE.public), lengths_of(ALICE.public))),
        (MALLORY.public, message, signature),
    ]

    for forgery in forgeries:
        with pytest.raises(MessageError):
            verify(*forgery)


@pytest.mark.parametrize("sign", [0, 0x80])
@pytest.mark.parametrize("coordinate", FORGEABLE)
def test_a_key_under_which_anybody_can_sign_is_refused(coordinate: str, sign: int) -> None:
    public = bytearray.fromhex(coordinate)
    public[31] |= sign
    points = [bytes.fromhex(each[:-2]) + bytes([int(each[-2:], 16) | bit]) for each in FORGEABLE for bit in (0, 0x80)]

    for number in range(20):
        for point in points:  # with such a key, one of these is a signature of some of these messages
            with pytest.raises(MessageError, match="point of low order, for which anybody can sign"):
                verify(bytes(public), b"approve plan %d" % number, point + bytes(32))


@pytest.mark.parametrize("vector", VECTORS["x25519"], ids=lambda v: str(v["source"]))
def test_agreements_are_those_of_rfc_7748(vector: dict[str, str]) -> None:
    known = read(vector)

    agreed = AgreementKey(known["secret"]).agree(known["peer"])

    assert agreed == known["agreed"]


@given(strategies.binary(min_size=32, max_size=32), strategies.binary(min_size=32, max_size=32))
def test_both_sides_agree_and_a_key_comes_back_from_its_secret(one: bytes, two: bytes) -> None:
    left, right = AgreementKey(one), AgreementKey(two)

    check_agreement_key(left.public)
    agreed = left.agree(right.public)

    assert agreed == right.agree(left.public)
    assert AgreementKey(left.secret()).public == left.public


@pytest.mark.parametrize("other", [lambda n: n + 2**255, lambda _: 9 + 2**255 - 19])
def test_an_x25519_key_has_one_spelling(other: Callable[[int], int]) -> None:
    public = other(int.from_bytes(AgreementKey.generate().public, "little")).to_bytes(32, "little")

    with pytest.raises(MessageError, match="one spelling"):
        check_agreement_key(public)


@pytest.mark.parametrize("point", VECTORS["x25519_low_order"])
@pytest.mark.parametrize("top_bit", [0, 0x80])  # X25519 ignores it
def test_a_point_of_low_order_is_refused(point: str, top_bit: int) -> None:
    public = bytearray.fromhex(point)
    public[31] |= top_bit

    with pytest.raises(MessageError, match="low order"):
        BOB.agree(bytes(public))
    with pytest.raises(MessageError, match="low order"):
        check_agreement_key(bytes(public))
    with pytest.raises(MessageError, match="low order"):
        deliver(b"", bytes(public), b"", ALICE)


@pytest.mark.parametrize("vector", VECTORS["hkdf_sha256"], ids=lambda v: str(v["source"]))
def test_derived_keys_are_those_of_rfc_5869(vector: dict[str, str]) -> None:
    known = read(vector)

    derived = derive(known["secret"], known["info"], len(known["derived"]))

    assert derived == known["derived"]


@given(strategies.binary(max_size=80), strategies.binary(max_size=80), strategies.integers(1, 200))
def test_derived_keys_are_hkdf_written_out_over_hmac(secret: bytes, info: bytes, length: int) -> None:
    derived = derive(secret, info, length)

    assert derived == expanded(mac(bytes(32), secret), info, length)


@pytest.mark.parametrize("length", [-1, 0, 8161])
def test_a_derived_key_has_1_to_8160_bytes(length: int) -> None:
    longest = derive(SECRET, b"", 8160)

    with pytest.raises(UsageError, match="8160"):
        derive(SECRET, b"", length)
    assert len(longest) == 8160


@pytest.mark.parametrize("vector", VECTORS["ml_kem_768"], ids=lambda v: str(v["source"]))
def test_kem_keys_are_those_of_rfc_9935(vector: dict[str, str]) -> None:
    known = read(vector)

    key = KemKey(known["seed"])

    assert key.public.startswith(known["public_begins"])
    assert len(key.public) == 1184


def test_a_kem_secret_reaches_the_holder_of_the_key_and_nobody_else() -> None:
    holder, other = KemKey(bytes(64)), KemKey(b"\1" * 64)

    ciphertext, secret = encapsulate(holder.public)

    assert (len(ciphertext), len(secret)) == (1088, 32)
    assert holder.decapsulate(ciphertext) == secret
    assert other.decapsulate(ciphertext) != secret
    assert encapsulate(holder.public)[1] != secret


def test_an_altered_kem_ciphertext_gives_the_bytes_of_implicit_rejection() -> None:
    seed = bytes(range(64))
    ciphertext, secret = encapsulate(KemKey(seed).public)
    altered = ciphertext[:-1] + bytes([ciphertext[-1] ^ 1])

    other = KemKey(seed).decapsulate(altered)

    assert other == hashlib.shake_256(seed[32:] + altered).digest(32)  # FIPS 203, algorithm 18, line 7
    assert other != secret


def test_malformed_kem_keys_and_ciphertexts_are_refused() -> None:
    holder = KemKey(bytes(64))

    for ciphertext in (b"", bytes(1087), bytes(1089)):
        with pytest.raises(MessageError, match="must have 1088"):
            holder.decapsulate(ciphertext)
    for public in (b"", bytes(1183), bytes(1185)):
        with pytest.raises(MessageError, match="must have 1184"):
            encapsulate(public)
    with pytest.raises(MessageError, match="3329"):
        encapsulate(b"\xff" * 1184)


@pytest.mark.parametrize("vector", VECTORS["aes_256_gcm"], ids=lambda v: str(v["source"]))
def test_sealed_messages_are_those_of_the_gcm_paper(vector: dict[str, str]) -> None:
    known = read(vector)

    sealed = seal(known["key"], known["nonce"], known["plaintext"], known["bound"])

    assert sealed == known["sealed"]
    assert unseal(known["key"], known["nonce"], sealed, known["bound"]) == known["plaintext"]


def test_a_sealed_message_with_any_bit_changed_is_refused() -> None:
    bound = b"from a to b"
    sealed = seal(KEY, NONCE, b"a share", bound)

    altered = [
        *((KEY, NONCE, bad, bound) for bad in itertools.chain(flips(sealed), lengths_of(sealed))),
        *((KEY, NONCE, sealed, bad) for bad in itertools.chain(flips(bound), lengths_of(bound))),
        *((KEY, bad, sealed, bound) for bad in flips(NONCE)),
        *((bad, NONCE, sealed, bound) for bad in flips(KEY)),
    ]

    for message in altered:
        with pytest.raises(MessageError, match="altered"):
            unseal(*message)


@pytest.mark.parametrize(
    ("wrong", "limit"),
    [
        (Identity, 32),
        (AgreementKey, 32),
        (KemKey, 64),
        (lambda value: Identity.generate(lambda _: value), 32),
        (lambda value: AgreementKey.generate(lambda _: value), 32),
        (lambda value: KemKey.generate(lambda _: value), 64),
        (lambda value: seal(value, NONCE, b"", b""), 32),
        (lambda value: unseal(value, NONCE, bytes(16), b""), 32),
        (lambda value: seal(KEY, value, b"", b""), 12),
        (lambda value: unseal(KEY, value, bytes(16), b""), 12),
        (Keystream, 32),
        (lambda value: seal_bytes(b"", value, b""), 32),
        (lambda value: seal_bytes(b"", KEY, b"", lambda _: value), 16),
        (lambda value: unseal_bytes(seal_bytes(b"", KEY, b""), value, b""), 32),
    ],
)
def test_a_key_of_ours_of_a_wrong_length_is_a_usage_error_that_names_the_length(
    wrong: Callable[[bytes], object], limit: int
) -> None:
    for length in (0, limit - 1, limit + 1, 2 * limit):
        with pytest.raises(UsageError, match=f"has {length} bytes, and must have {limit}"):
            wrong(bytes(length))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda value: verify(value, b"", bytes(64)),
        BOB.agree,
        lambda value: deliver(b"", value, b"", ALICE),
        lambda value: receive(deliver(b"", BOB.public, b"", ALICE), BOB, b"", value),
    ],
)
def test_a_key_of_theirs_of_a_wrong_length_is_a_message_error_that_names_the_length(
    wrong: Callable[[bytes], object],
) -> None:
    for length in (0, 31, 33, 64):
        with pytest.raises(MessageError, match=f"has {length} bytes, and must have 32"):
            wrong(bytes(length))


def test_keys_are_drawn_from_the_entropy_that_is_passed() -> None:
    def entropy(count: int) -> bytes:
        return bytes(range(count))

    assert Identity.generate(entropy).seed() == bytes(range(32))
    assert AgreementKey.generate(entropy).secret() == bytes(range(32))
    assert KemKey.generate(entropy).public == KemKey(bytes(range(64))).public
    assert Identity.generate().public != Identity.generate().public
    assert AgreementKey.generate().public != AgreementKey.generate().public
    assert KemKey.generate().public != KemKey.generate().public


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("number", [0, 1, 1 << 32, (1 << 96) - 1])
def test_a_keystream_block_is_aes_of_each_counter_block(route: str, number: int) -> None:
    counters = b"".join(
        number.to_bytes(12, "little") + (2 + place).to_bytes(4, "big") for place in range(BLOCK_BYTES // 16)
    )
    by_the_book = Cipher(algorithms.AES256(KEY), modes.ECB()).encryptor().update(counters)

    block = Keystream(KEY, route).block(number, Scratch())

    assert block.shape == (BLOCK_BYTES,)
    assert block.dtype == np.uint8
    assert block.tobytes() == by_the_book


@pytest.mark.parametrize("route", ROUTES)
def test_keystream_blocks_are_those_written_down(route: str) -> None:
    known, scratch = VECTORS["keystream"], Scratch()
    stream = Keystream(bytes.fromhex(known["key"]), route)

    for vector in known["blocks"]:
        block = stream.block(vector["number"], scratch)

        assert block[:16].tobytes().hex() == vector["first"]
        assert block[-16:].tobytes().hex() == vector["last"]


@pytest.mark.parametrize("route", ROUTES)
def test_a_keystream_begins_with_what_the_gcm_paper_adds_to_zeros(route: str) -> None:
    paper = next(read(vector) for vector in VECTORS["aes_256_gcm"] if "14" in vector["source"])

    block = Keystream(paper["key"], route).block(0, Scratch())

    assert block[:16].tobytes() == paper["sealed"][:16]


@given(strategies.lists(strategies.integers(0, 2**96 - 1), min_size=2, max_size=5), strategies.booleans())
def test_blocks_do_not_depend_on_order_on_route_or_on_what_the_scratch_held(numbers: list[int], first: bool) -> None:
    scratch = Scratch()
    scratch.output[:] = 0xAA
    streams = [Keystream(KEY, ROUTES[first]), Keystream(KEY, ROUTES[not first])]

    forward = [streams[0].block(number, scratch)[:100].tobytes() for number in numbers]
    backward = [streams[1].block(number, scratch)[:100].tobytes() for number in reversed(numbers)]

    assert forward == backward[::-1]
    assert len(set(forward)) == len(set(numbers))


def test_a_block_is_a_view_into_the_scratch_and_leaves_the_zeros_alone() -> None:
    scratch = Scratch()

    for route in ROUTES:
        block = Keystream(KEY, route).block(7, scratch)

        assert np.shares_memory(block, scratch.output)
        assert scratch.zeros == bytes(BLOCK_BYTES)


@pytest.mark.parametrize("number", [-1, 1 << 96])
def test_a_block_number_out_of_range_is_refused(number: int) -> None:
    with pytest.raises(UsageError, match=f"no block {number}"):
        Keystream(KEY).block(number, Scratch())


def test_a_route_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'chacha'.*gcm, ctr"):
        Keystream(KEY, "chacha")


@pytest.mark.parametrize(("slow", "fast"), [("gcm", "ctr"), ("ctr", "gcm")])
def test_the_faster_route_is_taken_and_measured_once(slow: str, fast: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def slowed(make: Callable[[bytes], Any], key: bytes) -> Callable[[bytes, Scratch], None]:
        measured.append(slow)

        def fill(nonce: bytes, scratch: Scratch) -> None:
            time.sleep(0.005)
            make(key)(nonce, scratch)

        return fill

    monkeypatch.setitem(crypto._ROUTES, slow, functools.partial(slowed, crypto._ROUTES[slow]))
    crypto.fastest_route.cache_clear()
    try:
        chosen = crypto.fastest_route()
        Keystream(KEY).block(0, Scratch())
        Keystream(KEY).block(1, Scratch())
    finally:
        crypto.fastest_route.cache_clear()

    assert chosen == fast
    assert measured == [slow]


@given(strategies.binary(max_size=300), strategies.binary(max_size=40))
def test_an_envelope_opens_for_its_recipient(plaintext: bytes, purpose: bytes) -> None:
    envelope = deliver(plaintext, BOB.public, purpose, ALICE)

    assert receive(envelope, BOB, purpose, ALICE.public) == plaintext
    assert len(envelope) == len(plaintext) + 131
    assert envelope.startswith(b"confide-delivery/1\n")


def test_an_envelope_of_an_earlier_release_still_opens() -> None:
    known = read(VECTORS["delivery"])

    plaintext = receive(
        known["envelope"],
        AgreementKey(known["recipient_secret"]),
        known["purpose"],
        Identity(known["sender_seed"]).public,
    )

    assert plaintext == known["plaintext"]


def test_an_envelope_is_a_signature_and_rfc_9180_written_out_over_hmac() -> None:
    envelope = deliver(b"the key of the run", BOB.public, b"run key", ALICE)
    start, signature, ephemeral, ciphertext = envelope[:19], envelope[19:83], envelope[83:115], envelope[115:]

    kem, suite = b"KEM\x00\x20", b"HPKE\x00\x20\x00\x01\x00\x02"
    extracted = labeled_extract(kem, b"", b"eae_prk", BOB.agree(ephemeral))
    shared = labeled_expand(kem, extracted, b"shared_secret", ephemeral + BOB.public, 32)
    info = labeled_extract(suite, b"", b"info_hash", start + ALICE.public + b"run key")
    schedule = b"\x00" + labeled_extract(suite, b"", b"psk_id_hash", b"") + info
    secret = labeled_extract(suite, shared, b"secret", b"")
    key = labeled_expand(suite, secret, b"key", schedule, 32)
    nonce = labeled_expand(suite, secret, b"base_nonce", schedule, 12)

    assert unseal(key, nonce, ciphertext, b"") == b"the key of the run"
    signed = start + (7).to_bytes(8) + b"run key" + BOB.public + ephemeral + ciphertext
    verify(ALICE.public, signed, signature)


def test_an_envelope_with_any_bit_changed_is_refused() -> None:
    envelope = deliver(b"five.", BOB.public, b"run key", ALICE)

    for altered in itertools.chain(flips(envelope), lengths_of(envelope)):
        with pytest.raises(MessageError):
            receive(altered, BOB, b"run key", ALICE.public)


def test_an_envelope_is_for_one_recipient_one_purpose_and_from_one_sender() -> None:
    envelope = deliver(b"five.", BOB.public, b"run key", ALICE)

    for key, purpose, sender in [
        (EVE, b"run key", ALICE.public),
        (BOB, b"run", ALICE.public),
        (BOB, b"run key", MALLORY.public),
    ]:
        with pytest.raises(MessageError):
            receive(envelope, key, purpose, sender)


def test_nobody_can_sign_the_envelope_of_another_as_an_own_one() -> None:
    envelope = deliver(b"five.", BOB.public, b"run key", ALICE)
    start, ciphertext = envelope[:19], envelope[83:]
    stolen = start + MALLORY.sign(start + (7).to_bytes(8) + b"run key" + BOB.public + ciphertext) + ciphertext

    with pytest.raises(MessageError, match="does not open"):
        receive(stolen, BOB, b"run key", MALLORY.public)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES])
def test_a_sealed_file_gives_back_what_was_sealed(size: int) -> None:
    plaintext = (bytes(range(251)) * (size // 251 + 1))[:size]

    sealed = seal_bytes(plaintext, KEY, b"adapter")

    assert unseal_bytes(sealed, KEY, b"adapter") == plaintext
    assert len(sealed) == 33 + size + 16 * max(1, -(-size // CHUNK_BYTES))


def test_a_sealed_file_is_the_one_written_down() -> None:
    known = read(VECTORS["sealed_file"])

    sealed = seal_bytes(known["plaintext"], known["key"], known["purpose"], lambda _: known["salt"])

    assert sealed == known["sealed"]


def test_a_sealed_file_is_its_format_written_out_over_unseal() -> None:
    plaintext = bytes(CHUNK_BYTES) + b"the rest"

    sealed = seal_bytes(plaintext, KEY, b"adapter")

    header, first, last = sealed[:33], sealed[33 : 33 + CHUNK_BYTES + 16], sealed[33 + CHUNK_BYTES + 16 :]
    own = expanded(mac(bytes(32), KEY), header + b"adapter", 39)
    assert header[:17] == b"confide-sealed/1\n"
    assert unseal(own[:32], own[32:] + b"\0\0\0\0\0", first, header) == bytes(CHUNK_BYTES)
    assert unseal(own[:32], own[32:] + b"\0\0\0\1\1", last, b"") == b"the rest"


def test_the_same_file_is_never_sealed_to_the_same_bytes() -> None:
    one, two = (seal_bytes(b"row", KEY, b"ledger") for _ in range(2))

    assert one[33:] != two[33:]


def test_a_sealed_file_with_any_bit_changed_is_refused() -> None:
    sealed = seal_bytes(b"seven rows", KEY, b"ledger")

    for altered in itertools.chain(flips(sealed), lengths_of(sealed)):
        with pytest.raises(SealError):
            unseal_bytes(altered, KEY, b"ledger")


def test_a_sealed_file_opens_with_one_key_and_for_one_purpose() -> None:
    sealed = seal_bytes(b"seven rows", KEY, b"ledger")

    for key, purpose in [(SECRET, b"ledger"), (KEY, b"adapter"), (KEY, b"ledge"), (KEY, b"")]:
        with pytest.raises(SealError, match="another key"):
            unseal_bytes(sealed, key, purpose)


def test_sealed_chunks_cannot_be_left_out_exchanged_repeated_or_taken_from_another_file() -> None:
    plaintext = bytes(2 * CHUNK_BYTES) + b"end"
    sealed, other = (seal_bytes(plaintext, KEY, b"adapter") for _ in range(2))
    cut = CHUNK_BYTES + 16
    header, one, two, end = sealed[:33], sealed[33:][:cut], sealed[33:][cut : 2 * cut], sealed[33:][2 * cut :]

    forgeries = {
        "cut after the header": header,
        "cut after one chunk": header + one,
        "cut after two chunks": header + one + two,
        "cut inside a chunk": header + one + two[:-1],
        "first left out": header + two + end,
        "second left out": header + one + end,
        "exchanged": header + two + one + end,
        "repeated": header + one + one + two + end,
        "last repeated": sealed + end,
        "more behind": sealed + b"\0",
        "a whole file behind": sealed + other,
        "end of another file": header + one + two + other[33 + 2 * cut :],
        "header of another file": other[:33] + one + two + end,
    }

    for name, forged in forgeries.items():
        with pytest.raises(SealError):
            pytest.fail(f"{name}: {len(unseal_bytes(forged, KEY, b'adapter'))} bytes")
    assert header + one + two + end == sealed


def test_nothing_of_a_damaged_chunk_or_behind_it_is_written() -> None:
    sealed = bytearray(seal_bytes(b"1" * CHUNK_BYTES + b"2" * CHUNK_BYTES + b"3", KEY, b"adapter"))
    sealed[33 + CHUNK_BYTES + 16 + 5] ^= 1
    target = io.BytesIO()

    with pytest.raises(SealError, match="Chunk 1 "):
        unseal_file(io.BytesIO(sealed), target, KEY, b"adapter")

    assert target.getvalue() == b"1" * CHUNK_BYTES


def test_a_file_that_is_not_sealed_is_called_that() -> None:
    for data in (b"", b"{}", b"confide-sealed/1\n", b"confide-sealed/2\n" + bytes(100)):
        with pytest.raises(SealError, match="not a sealed file"):
            unseal_bytes(data, KEY, b"ledger")


class Pipe(io.BytesIO):
    """Gives fewer bytes than it is asked for, as a pipe may."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(min(size or 0, 300_001))


def test_a_source_may_give_its_bytes_in_pieces() -> None:
    plaintext, sealed, opened = b"piece" * 500_000, io.BytesIO(), io.BytesIO()

    seal_file(Pipe(plaintext), sealed, KEY, b"adapter")
    unseal_file(Pipe(sealed.getvalue()), opened, KEY, b"adapter")

    assert opened.getvalue() == plaintext


def test_a_long_file_is_sealed_and_unsealed_in_a_few_chunks_of_memory(tmp_path: Path) -> None:
    plain, sealed, opened = (tmp_path / name for name in ("plain", "sealed", "opened"))
    with plain.open("wb") as stream:
        stream.truncate(24 * CHUNK_BYTES)

    tracemalloc.start()
    try:
        with plain.open("rb") as source, sealed.open("wb") as target:
            seal_file(source, target, KEY, b"adapter")
        with sealed.open("rb") as source, opened.open("wb") as target:
            unseal_file(source, target, KEY, b"adapter")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 5 * CHUNK_BYTES
    assert opened.stat().st_size == 24 * CHUNK_BYTES


def secrets() -> list[object]:
    scratch = Scratch()
    stream = Keystream(SECRET)
    stream.block(0, scratch)
    return [Identity(SECRET), AgreementKey(SECRET), KemKey(SECRET + SECRET), stream, scratch]


@given(strategies.lists(strategies.binary(max_size=40)))
def test_a_keyed_digest_is_hmac_over_parts_with_their_lengths_before_them(parts: list[bytes]) -> None:
    digest = keyed_digest(KEY, *parts)

    told = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    assert digest == mac(KEY, told)
    assert digest != keyed_digest(SECRET, *parts)


FEW_PARTS = strategies.lists(strategies.binary(max_size=3), max_size=4)


@given(FEW_PARTS, FEW_PARTS)
def test_other_parts_have_another_keyed_digest_even_if_they_join_to_the_same_bytes(
    one: list[bytes], two: list[bytes]
) -> None:
    assert (keyed_digest(KEY, *one) == keyed_digest(KEY, *two)) == (one == two)
    assert keyed_digest(KEY, *one, b"a", b"b") != keyed_digest(KEY, *one, b"ab")
    assert keyed_digest(KEY, *one, b"") != keyed_digest(KEY, *one)


PASSPHRASE = b"correct horse battery staple"
KINDS = pytest.mark.parametrize("kind", [Identity, AgreementKey])


def open_file(key: Identity | AgreementKey) -> bytes:
    return key_to_file(key, b"", insecure_no_passphrase=True)


def secret_of(key: Identity | AgreementKey) -> bytes:
    return key.seed() if isinstance(key, Identity) else key.secret()


def clamped(secret: bytes) -> bytes:
    """Return an X25519 secret as RFC 7748, section 5, decodes it."""
    return bytes([secret[0] & 248, *secret[1:31], (secret[31] & 127) | 64])


@KINDS
def test_a_key_comes_back_from_its_file_and_names_its_public_half_without_a_passphrase(kind: Any) -> None:
    key = kind(SECRET)

    sealed, bare = key_to_file(key, PASSPHRASE), open_file(key)

    again = [
        key_from_file(sealed, kind, PASSPHRASE),
        key_from_file(bare, kind, b"", insecure_no_passphrase=True),
    ]
    expected = SECRET if kind is Identity else clamped(SECRET)
    assert [secret_of(each) for each in again] == [expected, expected]
    assert [each.public for each in again] == [key.public] * 2
    assert public_in_file(sealed, kind) == public_in_file(bare, kind) == key.public
    assert key_to_file(key, PASSPHRASE) != sealed  # another salt


def test_a_key_file_is_that_of_rfc_8410() -> None:
    private = "MC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC"  # section 10.3
    public = "MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE="  # section 10.1

    raw = open_file(Identity(base64.b64decode(private)[-32:]))

    assert raw.decode() == (
        f"-----BEGIN PRIVATE KEY-----\n{private}\n-----END PRIVATE KEY-----\n"
        f"-----BEGIN PUBLIC KEY-----\n{public}\n-----END PUBLIC KEY-----\n"
    )


@KINDS
def test_other_programs_read_an_encrypted_key_file(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(key_to_file(kind(clamped(SECRET)), PASSPHRASE))

    loaded: Any = load_pem_private_key(path.read_bytes(), PASSPHRASE)

    assert loaded.private_bytes_raw() == clamped(SECRET)
    if openssl := shutil.which("openssl"):
        call = [openssl, "pkey", "-in", str(path), "-passin", "stdin", "-pubout"]
        shown = subprocess.run(call, input=PASSPHRASE, capture_output=True, check=True)
        assert path.read_bytes().endswith(shown.stdout)


def private_part(raw: bytes) -> bytes:
    """Return the DER of the private key in a file."""
    return base64.b64decode(raw.split(b"KEY-----\n")[1].split(b"-----")[0])


def with_private_part(raw: bytes, der: bytes) -> bytes:
    """Return the file with another DER in place of the private key's."""
    begin, text, rest = raw.partition(b"KEY-----\n")[0], base64.b64encode(der), raw[raw.index(b"-----END ") :]
    return begin + b"KEY-----\n" + b"".join(text[at : at + 64] + b"\n" for at in range(0, len(text), 64)) + rest


def test_a_passphrase_is_stretched_600_000_times() -> None:
    der = private_part(key_to_file(Identity(SECRET), PASSPHRASE))

    salt, start, sealed = der[35:51], der[85:101], der[103:]
    key = hashlib.pbkdf2_hmac("sha256", PASSPHRASE, salt, 600_000)
    opener = Cipher(algorithms.AES256(key), modes.CBC(start)).decryptor()
    assert (opener.update(sealed) + opener.finalize())[16:48] == SECRET


def test_a_key_file_with_any_bit_turned_over_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crypto, "PASSPHRASE_ROUNDS", 1 << 16)  # a tenth of the time
    sealed, bare = key_to_file(Identity(SECRET), PASSPHRASE), open_file(AgreementKey(SECRET))
    der = private_part(sealed)

    # One bit of each byte where the passphrase is stretched each time, else all of them.
    damaged = [sealed[:at] + bytes([byte ^ 1 << at % 8]) + sealed[at + 1 :] for at, byte in enumerate(sealed)]
    damaged += [
        with_private_part(sealed, der[:at] + bytes([byte ^ 1 << at % 8]) + der[at + 1 :]) for at, byte in enumerate(der)
    ]

    for raw in damaged:
        with pytest.raises((SealError, UsageError)):
            key_from_file(raw, Identity, PASSPHRASE)
    for raw in flips(bare):
        with pytest.raises((SealError, UsageError)):
            key_from_file(raw, AgreementKey, b"", insecure_no_passphrase=True)


@pytest.mark.parametrize("bit", [0, 1, 2, 254, 255])
def test_the_bits_that_agreement_ignores_are_not_ignored_in_a_file(bit: int) -> None:
    bare = open_file(AgreementKey(SECRET))
    other = (int.from_bytes(clamped(SECRET), "little") ^ (1 << bit)).to_bytes(32, "little")

    raw = with_private_part(bare, private_part(bare)[:-32] + other)

    with pytest.raises(SealError, match="damaged"):
        key_from_file(raw, AgreementKey, b"", insecure_no_passphrase=True)


def test_a_key_file_needs_its_passphrase_its_kind_and_its_word() -> None:
    sealed, bare = key_to_file(Identity(SECRET), PASSPHRASE), open_file(Identity(SECRET))
    refusals: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (SealError, "passphrase is another", lambda: key_from_file(sealed, Identity, PASSPHRASE + b"!")),
        (SealError, "passphrase is another", lambda: key_from_file(sealed, Identity, b"x" * 5000)),
        (UsageError, "Give its passphrase", lambda: key_from_file(sealed, Identity, b"")),
        (UsageError, "Give its passphrase", lambda: key_from_file(sealed, Identity, b"", insecure_no_passphrase=True)),
        (UsageError, "is not encrypted, but", lambda: key_from_file(bare, Identity, PASSPHRASE)),
        (UsageError, "say insecure_no_passphrase", lambda: key_from_file(bare, Identity, b"")),
        (SealError, "another kind", lambda: key_from_file(sealed, AgreementKey, PASSPHRASE)),
        (SealError, "another kind", lambda: key_from_file(bare, AgreementKey, b"", insecure_no_passphrase=True)),
        (SealError, "another kind", lambda: public_in_file(sealed, AgreementKey)),
        (UsageError, "say insecure_no_passphrase", lambda: key_to_file(ALICE, b"")),
        (UsageError, "Leave one of the two", lambda: key_to_file(ALICE, PASSPHRASE, insecure_no_passphrase=True)),
        (UsageError, "14 bytes; 15 to 1023", lambda: key_to_file(ALICE, b"x" * 14)),
        (UsageError, "1024 bytes; 15 to 1023", lambda: key_to_file(ALICE, b"x" * 1024)),
        (UsageError, "must have 32", lambda: key_to_file(ALICE, PASSPHRASE, entropy=lambda _: b"")),
    ]

    for error, words, call in refusals:
        with pytest.raises(error, match=words):
            call()


@given(strategies.binary(max_size=300) | strategies.text("ABab01+/=\n-", max_size=300).map(str.encode))
def test_what_is_no_key_file_is_a_seal_error(raw: bytes) -> None:
    private, public = b"-----%b PRIVATE KEY-----\n", b"-----%b PUBLIC KEY-----\n"
    around = [part % word for part in (private, public) for word in (b"BEGIN", b"END")]
    framed = around[0] + raw + around[1] + around[2] + raw + around[3]

    for text in (raw, framed, framed.replace(b" PRIVATE", b" ENCRYPTED PRIVATE")):
        with pytest.raises(SealError):
            public_in_file(text, Identity)


def spellings(secret: bytes) -> list[str]:
    return [secret.hex(), repr(secret)[2:-1], base64.b64encode(secret).decode()[:40], str(list(secret))[1:-1]]


@pytest.mark.parametrize("holder", secrets(), ids=lambda holder: type(holder).__name__)
def test_a_secret_is_in_no_repr_no_pickle_and_no_copy(holder: object) -> None:
    texts = [repr(holder), str(holder), f"{holder}", repr([holder])]

    assert not any(spelling in text for text in texts for spelling in spellings(SECRET))
    assert not hasattr(holder, "__dict__")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="not pickled"):
            pickle.dumps(holder, protocol)
    for duplicate in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="not pickled or copied"):
            duplicate(holder)


def test_a_private_key_shows_the_fingerprint_of_its_public_key() -> None:
    shown = {repr(key): hashlib.sha256(key.public).hexdigest()[:16] for key in (ALICE, BOB, KemKey(bytes(64)))}

    for text, fingerprint in shown.items():
        assert f" sha256:{fingerprint}>" in text


def test_private_keys_are_compared_by_identity_and_never_by_value() -> None:
    for one, other in zip(secrets(), secrets(), strict=True):
        assert one != other
        assert one == one  # noqa: PLR0124  the fact that is claimed


def test_a_secret_is_in_no_error() -> None:
    envelope = deliver(SECRET, BOB.public, b"", ALICE)
    sealed, filed = seal(SECRET, NONCE, SECRET, b""), seal_bytes(SECRET, SECRET, b"")
    failing: list[Callable[[], object]] = [
        lambda: Identity(SECRET + b"\0"),
        lambda: AgreementKey(SECRET + b"\0"),
        lambda: KemKey(SECRET),
        lambda: Keystream(SECRET + b"\0"),
        lambda: Keystream(SECRET, "none"),
        lambda: Keystream(SECRET).block(-1, Scratch()),
        lambda: seal(SECRET + b"\0", NONCE, SECRET, b""),
        lambda: seal(SECRET, SECRET, SECRET, b""),
        lambda: unseal(SECRET, NONCE, sealed, b"other"),
        lambda: seal_bytes(SECRET, SECRET + b"\0", b""),
        lambda: unseal_bytes(filed, SECRET, b"other"),
        lambda: derive(SECRET, b"", 0),
        lambda: AgreementKey(SECRET).agree(bytes(32)),
        lambda: deliver(SECRET, bytes(32), b"", Identity(SECRET)),
        lambda: receive(envelope, AgreementKey(SECRET), b"", ALICE.public),
        lambda: KemKey(SECRET + SECRET).decapsulate(b""),
        lambda: keyed_digest(SECRET + b"\0", SECRET),
        lambda: key_to_file(Identity(SECRET), SECRET[:14]),
        lambda: key_to_file(Identity(SECRET), SECRET, insecure_no_passphrase=True),
        lambda: key_to_file(Identity(SECRET), b""),
        lambda: key_from_file(open_file(Identity(SECRET)), Identity, SECRET),
        lambda: key_from_file(open_file(Identity(SECRET)), Identity, b""),
        lambda: key_from_file(open_file(Identity(SECRET)), AgreementKey, b"", insecure_no_passphrase=True),
        lambda: key_from_file(open_file(Identity(SECRET))[:-1], Identity, b"", insecure_no_passphrase=True),
        lambda: key_from_file(key_to_file(Identity(SECRET), SECRET), Identity, PASSPHRASE),
    ]

    for call in failing:
        with pytest.raises((MessageError, UsageError, SealError)) as caught:
            call()
        text = "".join(traceback.format_exception(caught.value))
        assert not any(spelling in text for spelling in spellings(SECRET))


def mac(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, "sha256")


def expanded(key: bytes, info: bytes, length: int) -> bytes:
    """Return HKDF-Expand, RFC 5869, section 2.3."""
    parts = [b""]
    for number in range(1, -(-length // 32) + 1):
        parts.append(mac(key, parts[-1] + info + bytes([number])))
    return b"".join(parts)[:length]


def labeled_extract(suite: bytes, salt: bytes, label: bytes, secret: bytes) -> bytes:
    """Return LabeledExtract, RFC 9180, section 4."""
    return mac(salt, b"HPKE-v1" + suite + label + secret)


def labeled_expand(suite: bytes, key: bytes, label: bytes, info: bytes, length: int) -> bytes:
    """Return LabeledExpand, RFC 9180, section 4."""
    return expanded(key, length.to_bytes(2) + b"HPKE-v1" + suite + label + info, length)
