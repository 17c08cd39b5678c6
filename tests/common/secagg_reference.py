"""A slow and obvious secure aggregation that follows the page "Protocol" and shares no code with Confide.

Numbers are Python's, one word at a time. One function plays the server and all sites of an attempt, and keeps what each
of them sends. With the entropy fixed every byte is fixed: `python -m tests.common.secagg_reference` writes
tests/vectors/secagg.json anew.
"""

import base64
import hashlib
import hmac
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

FILE = Path(__file__).parents[1] / "vectors" / "secagg.json"
P = 2**256 + 297
BLOCK = 2**18
HYBRID = "x25519+ml-kem-768"
NO_SHARE = b"\xff" * 33

Json = dict[str, Any]


def vectors() -> Json:
    """Return all that tests/vectors/secagg.json holds."""
    return {
        "about": "Known answers of confide-secagg/1, computed by tests/common/secagg_reference.py. Bytes are hexadecimal.",
        "entropy": (
            "Every secret is drawn from a stream that has a name. Its bytes are SHA-256(seed || c) for c = 0, 1, 2, ... in "
            "8 bytes, big-endian, end to end; the seed is SHA-256 of 'confide-secagg/1 vectors ' and the name. In a round "
            "the stream of a site is named '<round> site <place>', and is drawn in this order: box key 32, pair key 32, KEM "
            "seed 64 (hybrid only), seed 32, coefficients for the seed 48 (t - 1), coefficients for the pair key 48 "
            "(t - 1). An encapsulation cannot be fixed; so in the hybrid round a KEM ciphertext is 1088 bytes of the "
            "stream '<round> ciphertext <sender> <receiver>', which nobody encapsulated, and its secret is what "
            "decapsulation makes of it (implicit rejection, FIPS 203). A site's checkpoint is the base64 of 128 bytes of the "
            "stream '<round> checkpoint <place>', the same when it advertises and when it contributes: the protocol hands it on "
            "and does not read it."
        ),
        "keystream": keystream_cases(),
        "masking": masking_cases(),
        "shamir": shamir_cases(),
        "derivation": derivation_cases(),
        "parameters": {str(sites): parameters(sites, 3) for sites in (3, 4, 5, 10, 64, 65, 100, 200)},
        "circle": circle_case(),
        "rounds": {name: played(name, **how) for name, how in ROUNDS.items()},
        "digests": {name: digested(played(name, **how)) for name, how in LARGE_ROUNDS.items()},
    }


ROUNDS: dict[str, Json] = {
    "three sites, 32 bits": {"sites": 3, "bits": 32},
    "three sites, 16 bits": {"sites": 3, "bits": 16},
    "five sites, 32 bits": {"sites": 5, "bits": 32},
    "five sites, 16 bits": {"sites": 5, "bits": 16},
    "five sites, 32 bits, one lost before contribute": {"sites": 5, "bits": 32, "lost": (1,)},
    "five sites, 16 bits, one lost before contribute": {"sites": 5, "bits": 16, "lost": (1,)},
    "three sites, 32 bits, hybrid": {"sites": 3, "bits": 32, "agreement": HYBRID},
}
LARGE_ROUNDS: dict[str, Json] = {
    "66 sites on the sparse graph, 32 bits, one lost before contribute": {"sites": 66, "bits": 32, "lost": (7,)},
}


def played(name: str, sites: int, bits: int, lost: Sequence[int] = (), agreement: str = "x25519") -> Json:
    """Play an attempt from the offer to the sum and return what went in, what was sent, and what came out.

    Args:
        name: Names its streams.
        sites: n.
        bits: The width of a word.
        lost: The places that share keys and then do not contribute.
        agreement: The plan's key_agreement.
    """
    hybrid = agreement == HYBRID
    everyone = list(range(sites))
    cohort = [f"site-{place:02}" for place in everyone]
    coordinator = stream(f"{name} coordinator", 32)
    identities = [stream(f"{name} identity {place}", 32) for place in everyone]
    ring = ring_of(bits, entries=5, most=max(16, sites))
    adapter = stream(f"{name} adapter", 16).replace(b"\xff", b"\xfe").replace(b"\x7f", b"\x7e")  # finite float32
    x = [vector_of(f"{name} vector {place}", bits, ring) for place in everyone]
    roster = {
        "format": "confide-roster/1",
        "federation": "vectors",
        "epoch": 1,
        "coordinator": ed25519_public(coordinator).hex(),
        "sites": {site: ed25519_public(seed).hex() for site, seed in zip(cohort, identities, strict=True)},
    }

    # The contexts, as far as they are known before any key is.
    rule = parameters(sites, 3) | {"key_agreement": agreement}
    t, floor = int(rule["threshold"]), int(rule["floor"])
    offer: Json = {
        "run": "vectors",
        "plan": digest(b"plan"),
        "round": 2,
        "attempt": 3,
        "cohort": cohort,
        "roster": digest(canonical(roster)),
        "layout": digest(b"layout"),
        "ring": digest(canonical(ring)),
    }
    pre_text = canonical({"format": "confide-secagg/1", "offer": offer, "parameters": rule})
    pre = hashlib.sha256(pre_text).digest()

    # A: every site draws its keys and signs the public ones.
    streams = [Stream(f"{name} site {place}") for place in everyone]
    box_secret, pair_secret, kem, seed, keys, advertised = [], [], [], [], [], []
    for place in everyone:
        box_secret.append(streams[place].draw(32))
        pair_secret.append(streams[place].draw(32))
        kem.append(MLKEM768PrivateKey.from_seed_bytes(streams[place].draw(64)) if hybrid else None)
        seed.append(streams[place].draw(32))
        key = kem[place]
        keys.append(
            x25519_public(box_secret[place])
            + x25519_public(pair_secret[place])
            + (b"" if key is None else key.public_key().public_bytes_raw())
        )
        signature = sign(identities[place], label("advertisement") + pre + u16(place) + keys[place])
        advertised.append(keys[place] + signature)

    checkpoints = [base64.b64encode(Stream(f"{name} checkpoint {place}").draw(128)).decode() for place in everyone]

    # B: with all advertisements there is ctx, and everybody's neighbours; each site shares its two secrets.
    told = b"".join(u16(place) + advertised[place] for place in everyone)
    ctx = hashlib.sha256(label("context") + pre + digest(adapter).encode() + b"\n" + told).digest()
    graph_seed = hashlib.sha256(label("graph") + pre + told).digest()
    joined = neighbours(everyone, int(rule["neighbours"]), graph_seed)
    seed_shares: dict[int, dict[int, bytes]] = {}  # by owner, then by holder
    pair_shares: dict[int, dict[int, bytes]] = {}
    box: dict[tuple[int, int], bytes] = {}  # by sender and receiver
    shared, derived = [], []
    for u in everyone:
        holders = [*joined[u], u]
        points = [holder + 1 for holder in holders]
        of_seed = split(seed[u], t, points, streams[u].draw(48 * (t - 1)))
        of_pair = split(pair_secret[u], t, points, streams[u].draw(48 * (t - 1)))
        seed_shares[u] = dict(zip(holders, of_seed, strict=True))
        pair_shares[u] = dict(zip(holders, of_pair, strict=True))
        for v in joined[u]:
            agreed, ciphertext = x25519(box_secret[u], keys[v][:32]), b""
            private = kem[v]
            if private is not None:
                ciphertext = stream(f"{name} ciphertext {u} {v}", 1088)
                agreed += private.decapsulate(ciphertext)
            key_of_box = hkdf(agreed, label("box") + ctx + u16(min(u, v)) + u16(max(u, v)) + ciphertext)
            address = label("address") + ctx + u16(u) + u16(v)
            plain = seed_shares[u][v] + pair_shares[u][v]
            box[u, v] = ciphertext + AESGCM(key_of_box).encrypt(u.to_bytes(12, "big"), plain, address)
            derived.append(
                {"from": u, "to": v, "agreed": agreed.hex(), "key": key_of_box.hex(), "bound": address.hex()}
            )
        commitment = hashlib.sha256(label("commitment") + ctx + u16(u) + seed[u]).digest()
        shared.append(commitment + b"".join(box[u, v] for v in joined[u]))

    # C: each site that is left masks its vector, one word after the other.
    self_key = [hkdf(seed[u], label("self mask") + ctx + u16(u)) for u in everyone]

    def pair_key(secret: bytes, u: int, v: int) -> bytes:
        return hkdf(x25519(secret, keys[v][32:64]), label("pair mask") + ctx + u16(min(u, v)) + u16(max(u, v)))

    survivors = [u for u in everyone if u not in lost]
    y: dict[int, list[int]] = {}
    for u in survivors:
        y[u] = masked(
            x[u], [(self_key[u], 1), *((pair_key(pair_secret[u], u, v), sign_of(v - u)) for v in joined[u])], bits
        )

    # D and E: everybody who is left signs who is left, and gives one share for each.
    listed = b"".join(u16(u) for u in survivors)
    confirmed = {u: sign(identities[u], label("survivors") + ctx + listed) for u in survivors}
    opened = {
        u: [seed_shares[v][u] if v in survivors else pair_shares[v][u] for v in sorted([u, *joined[u]])]
        for u in survivors
    }

    # The server has y and these shares, and nothing else of what stands above but what is public.
    total = [sum(word) % 2**bits for word in zip(*y.values(), strict=True)]
    for u in everyone:
        holders = [v for v in sorted([u, *joined[u]]) if v in survivors]
        given = {v + 1: opened[v][sorted([v, *joined[v]]).index(u)] for v in holders}
        secret = combine(dict(list(given.items())[:t]))
        if u in survivors:
            assert hashlib.sha256(label("commitment") + ctx + u16(u) + secret).digest() == shared[u][:32]
            total = masked(total, [(hkdf(secret, label("self mask") + ctx + u16(u)), -1)], bits)
        else:
            assert x25519_public(secret) == keys[u][32:64]
            ends = [v for v in joined[u] if v in survivors]
            total = masked(total, [(pair_key(secret, u, v), sign_of(v - u)) for v in ends], bits)
    assert len(survivors) >= floor
    assert total == [sum(words) % 2**bits for words in zip(*(x[u] for u in survivors), strict=True)]

    context = ctx.hex()
    start = {u: b"".join(u16(v) + box[v, u] for v in joined[u]) for u in survivors}
    signed = b"".join(u16(u) + confirmed[u] for u in survivors[:floor])
    raw_adapter = adapter.hex()
    return {
        "sites": sites,
        "bits": bits,
        "key_agreement": agreement,
        "min_sites": 3,
        "lost_before_contribute": list(lost),
        "coordinator_seed": coordinator.hex(),
        "identity_seeds": [one.hex() for one in identities],
        "roster": canonical(roster).decode(),
        "ring": canonical(ring).decode(),
        "adapter": raw_adapter,
        "vectors": x,
        "pre_is_sha256_of": pre_text.decode(),
        "pre": pre.hex(),
        "ctx": context,
        "graph_seed": graph_seed.hex(),
        "seeds": [one.hex() for one in seed],
        "pair_secrets": [one.hex() for one in pair_secret],
        "boxes": derived,
        "self_mask_keys": [key.hex() for key in self_key],
        "pair_mask_keys": {
            f"{u} {v}": pair_key(pair_secret[u], u, v).hex() for u in everyone for v in joined[u] if u < v
        },
        "offer": message("offer", sign(coordinator, label("offer") + pre), **offer),
        "advertisement": [
            message("advertisement", raw, context=pre.hex(), checkpoint=shown)
            for raw, shown in zip(advertised, checkpoints, strict=True)
        ],
        "peers": message("peers", told, context=pre.hex(), adapter=digest(adapter), checkpoints=checkpoints),
        "shares": [message("shares", raw, context=context) for raw in shared],
        "start": [message("start", start[u], raw_adapter, context=context) if u in start else None for u in everyone],
        "contribution": [
            message("contribution", None, little(y[u], bits).hex(), context=context, checkpoint=checkpoints[u])
            if u in y
            else None
            for u in everyone
        ],
        "survivors": message("survivors", listed, context=context),
        "confirmation": [
            message("confirmation", confirmed[u], context=context) if u in confirmed else None for u in everyone
        ],
        "signatures": message("signatures", signed, context=context),
        "opening": [
            message("opening", b"".join(opened[u]), context=context) if u in opened else None for u in everyone
        ],
        "sum": total,
    }


MESSAGES = (
    "offer", "advertisement", "peers", "shares", "start", "contribution", "survivors", "confirmation", "signatures", "opening"
)  # fmt: skip


def digested(found: Json) -> Json:
    """Return a round with only the SHA-256 of all messages of a kind, in the order of places, each behind its length."""
    return {
        "pre": found["pre"],
        "ctx": found["ctx"],
        "messages": {kind: kind_digest(found[kind]) for kind in MESSAGES},
        "sum": found["sum"],
    }


def kind_digest(of: Json | list[Json | None]) -> str:
    """Return SHA-256 over messages: for each the length of its body in 8 bytes, big-endian, its body and its vector."""
    hashed = hashlib.sha256()
    for one in of if isinstance(of, list) else [of]:
        if one is not None:
            body = body_of(one)
            hashed.update(len(body).to_bytes(8, "big") + body + bytes.fromhex(one.get("vector", "")))
    return hashed.hexdigest()


def message(kind: str, raw: bytes | None, vector: str | None = None, **fields: Any) -> Json:
    """Return a message: its text, its raw bytes if its kind has any, and its vector if it has one."""
    found: Json = {"text": canonical({"format": "confide-message/1", "kind": kind, **fields}).decode()}
    if raw is not None:
        found["raw"] = raw.hex()
    if vector is not None:
        found["vector"] = vector
    return found


def body_of(found: Mapping[str, str]) -> bytes:
    """Return the body of a message that `message` made."""
    text = found["text"].encode()
    return text + b"\n" + bytes.fromhex(found["raw"]) if "raw" in found else text


class Stream:
    """Bytes that look random and follow from a name."""

    def __init__(self, name: str) -> None:
        self._seed = hashlib.sha256(b"confide-secagg/1 vectors " + name.encode()).digest()
        self._drawn = 0

    def draw(self, count: int) -> bytes:
        """Return the next bytes."""
        start, self._drawn = self._drawn, self._drawn + count
        blocks = range(start // 32, self._drawn // 32 + 1)
        stretch = b"".join(hashlib.sha256(self._seed + c.to_bytes(8, "big")).digest() for c in blocks)
        return stretch[start % 32 :][:count]


def stream(name: str, count: int) -> bytes:
    """Return the first bytes of the stream of that name."""
    return Stream(name).draw(count)


def canonical(value: Mapping[str, object]) -> bytes:
    """Return the one spelling of `value`."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def digest(data: bytes) -> str:
    """Return a digest as text."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def label(purpose: str) -> bytes:
    """Return what everything begins with that is signed, hashed or derived for."""
    return b"confide-secagg/1 " + purpose.encode() + b"\n"


def u16(number: int) -> bytes:
    """Return two bytes, big-endian."""
    return number.to_bytes(2, "big")


def hkdf(secret: bytes, info: bytes) -> bytes:
    """Return 32 bytes: extract with a salt of zeros, then the first block of expand (RFC 5869)."""
    extracted = hmac.digest(bytes(32), secret, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def x25519(secret: bytes, public: bytes) -> bytes:
    """Return what the two keys agree on."""
    return X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(public))


def x25519_public(secret: bytes) -> bytes:
    """Return the public key."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def ed25519_public(seed: bytes) -> bytes:
    """Return the public key."""
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


def sign(seed: bytes, what: bytes) -> bytes:
    """Return the signature, once it was verified."""
    signature = Ed25519PrivateKey.from_private_bytes(seed).sign(what)
    Ed25519PublicKey.from_public_bytes(ed25519_public(seed)).verify(signature, what)
    return signature


def keystream(key: bytes, block: int) -> bytes:
    """Return one block of a key's keystream."""
    counter = block.to_bytes(12, "little") + b"\x00\x00\x00\x02"
    return Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor().update(bytes(BLOCK))


def prg(key: bytes, count: int, bits: int) -> Iterator[int]:
    """Yield words of a key's keystream."""
    width = bits // 8
    for block in range(-(-count * width // BLOCK)):
        drawn = keystream(key, block)[: count * width - block * BLOCK]
        for start in range(0, len(drawn), width):
            yield int.from_bytes(drawn[start : start + width], "little")


def masked(words: Sequence[int], masks: Iterable[tuple[bytes, int]], bits: int) -> list[int]:
    """Return the words under masks, each added (1) or taken off (-1)."""
    result = list(words)
    for key, way in masks:
        result = [(word + way * mask) % 2**bits for word, mask in zip(result, prg(key, len(words), bits), strict=True)]
    return result


def sign_of(number: int) -> int:
    """Return 1 or -1."""
    return 1 if number > 0 else -1


def little(words: Iterable[int], bits: int) -> bytes:
    """Return words as little-endian bytes; two of 16 bits are thus one of 32 whose lower half is the first."""
    return b"".join(word.to_bytes(bits // 8, "little") for word in words)


def split(secret: bytes, threshold: int, points: Iterable[int], drawn: bytes) -> list[bytes]:
    """Return the value of the polynomial at each point."""
    coefficients = [int.from_bytes(secret, "big")]
    coefficients += [int.from_bytes(drawn[48 * (i - 1) : 48 * i], "big") % P for i in range(1, threshold)]
    return [
        (sum(coefficient * x**i for i, coefficient in enumerate(coefficients)) % P).to_bytes(33, "big") for x in points
    ]


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Return the value at 0 of the polynomial through the shares."""
    total = 0
    for x, share in shares.items():
        term = int.from_bytes(share, "big")
        for y in shares:
            if y != x:
                term = term * y * pow(y - x, -1, P)
        total += term
    return (total % P).to_bytes(32, "big")


def parameters(sites: int, min_sites: int) -> Json:
    """Return what `pre` says of a cohort of so many sites, but for the key agreement."""
    quorum = 2 * sites // 3 + 1
    found = {"sites": sites, "quorum": quorum, "floor": max(quorum, min_sites, 3)}
    if sites <= 64:
        return found | {"neighbours": sites - 1, "threshold": quorum, "gathered": quorum}
    k, t = next(pair for pair in _sufficient(sites))
    return found | {"neighbours": k, "threshold": t, "gathered": sites - sites // 10}


def _sufficient(sites: int) -> Iterator[tuple[int, int]]:
    marked = sites // 10

    def hit(least: int, among: int, drawn: int) -> Fraction:
        ways = [math.comb(marked, m) * math.comb(among - marked, drawn - m) for m in range(least, drawn + 1)]
        return Fraction(sum(ways), math.comb(among, drawn))

    for k in range(2, sites, 2):
        parted = sites * Fraction(1, 5) ** (k // 2)
        for t in range(k // 2, k + 1):
            exposed = sites * hit(t, sites - marked - 1, k)
            stuck = sites * hit(k - t + 1, sites - 1, k)
            if parted + exposed <= Fraction(1, 2**40) and stuck <= Fraction(1, 2**30):
                yield k, t


def neighbours(members: Sequence[int], k: int, seed: bytes) -> dict[int, list[int]]:
    """Return everybody's neighbours, ascending."""
    if k >= len(members) - 1:
        return {u: [v for v in members if v != u] for u in members}
    circle = list(members)
    words = _words(seed)
    for i in range(len(circle) - 1, 0, -1):
        word = next(words)
        while word >= 2**16 // (i + 1) * (i + 1):
            word = next(words)
        j = word % (i + 1)
        circle[i], circle[j] = circle[j], circle[i]
    around = {}
    for at, u in enumerate(circle):
        after = [circle[(at + step) % len(circle)] for step in range(1, k // 2 + 1)]
        before = [circle[(at - step) % len(circle)] for step in range(1, k // 2 + 1)]
        around[u] = sorted(after + before)
    return around


def _words(seed: bytes) -> Iterator[int]:
    counter = 0
    while True:
        block = hashlib.sha256(b"confide-graph/1" + seed + counter.to_bytes(8, "big")).digest()
        for start in range(0, 32, 2):
            yield int.from_bytes(block[start : start + 2], "big")
        counter += 1


def ring_of(bits: int, entries: int, most: int) -> Json:
    """Return a ring of the width, for that many sites at most."""
    ring: Json = {"format": "confide-ring/1", "bits": bits, "length": entries, "max_sites": most}
    if bits == 32:
        return ring | {"update_bound": 1.5, "segments": []}
    return ring | {"update_bound": None, "segments": [[entries - 2, 0.5], [2, 0.25]]}


def vector_of(name: str, bits: int, ring: Json) -> list[int]:
    """Return a site's words: entries of any size, a flag, a count, and with 16 bits what fills up the last 32."""
    entries = int(ring["length"])
    width = bits // 8
    drawn = stream(name, width * entries)
    words = [int.from_bytes(drawn[width * i : width * (i + 1)], "big") for i in range(entries)]
    words += [1, 77]
    return [*words, 0] if bits == 16 and len(words) % 2 else words


def keystream_cases() -> list[Json]:
    """Return the ends of some blocks and the digest of each."""
    key = stream("keystream", 32)
    cases = []
    for number in (0, 1, 2, 2**32):
        block = keystream(key, number)
        ends = {"first": block[:32].hex(), "last": block[-32:].hex(), "sha256": hashlib.sha256(block).hexdigest()}
        cases.append({"key": key.hex(), "block": number, **ends})
    return cases


def masking_cases() -> list[Json]:
    """Return vectors of the words 0, 1, 2, … under two masks, that end before, at and after the end of a block."""
    plus, minus = stream("mask added", 32), stream("mask taken off", 32)
    cases = []
    for bits, sizes in ((32, (1, 7, 65_535, 65_536, 65_537)), (16, (2, 131_070, 131_072, 131_074))):
        for size in sizes:
            words = masked([i % 2**bits for i in range(size)], [(plus, 1), (minus, -1)], bits)
            cases.append(
                {
                    "bits": bits,
                    "size": size,
                    "added": plus.hex(),
                    "taken_off": minus.hex(),
                    "first": words[:4],
                    "last": words[-4:],
                    "sha256": hashlib.sha256(little(words, bits)).hexdigest(),
                }
            )
    return cases


def shamir_cases() -> list[Json]:
    """Return shares of a secret for the points that a site of a cohort uses: its neighbours', then its own."""
    cases = []
    for sites, threshold, own in ((3, 3, 0), (4, 3, 3), (5, 4, 2), (10, 7, 9)):
        name = f"shamir {threshold} of {sites}"
        secret, drawn = stream(f"{name} secret", 32), stream(f"{name} coefficients", 48 * (threshold - 1))
        points = [place + 1 for place in range(sites) if place != own] + [own + 1]
        shares = split(secret, threshold, points, drawn)
        assert combine(dict(list(zip(points, shares, strict=True))[-threshold:])) == secret
        cases.append(
            {
                "secret": secret.hex(),
                "threshold": threshold,
                "points": points,
                "coefficients": drawn.hex(),
                "shares": [share.hex() for share in shares],
            }
        )
    return cases


def derivation_cases() -> list[Json]:
    """Return, for a context of its own, the bytes of every info and what HKDF makes of a secret with it."""
    ctx, secret = stream("derivation context", 32), stream("derivation secret", 32)
    infos = {
        "self mask of 258": label("self mask") + ctx + u16(258),
        "pair mask of 3 and 258": label("pair mask") + ctx + u16(3) + u16(258),
        "box between 3 and 258": label("box") + ctx + u16(3) + u16(258),
    }
    return [
        {"what": what, "secret": secret.hex(), "info": info.hex(), "key": hkdf(secret, info).hex()}
        for what, info in infos.items()
    ]


def circle_case() -> Json:
    """Return who is whose neighbour among 70 places with gaps."""
    members, k, seed = [place for place in range(72) if place not in {5, 40}], 6, stream("circle", 32)
    around = {str(u): near for u, near in neighbours(members, k, seed).items()}
    return {
        "members": members,
        "k": k,
        "seed": seed.hex(),
        "neighbours": dict(sorted(around.items(), key=lambda u: int(u[0]))),
    }


def spelled(value: Json) -> str:
    """Return the file's text: an object's members on lines of their own, down to the messages, and the rest on one."""

    def lines(of: object, depth: int) -> str:
        if depth and isinstance(of, dict):
            inner = ",\n".join(
                f"{' ' * (4 - depth)}{json.dumps(name)}: {lines(one, depth - 1)}" for name, one in of.items()
            )
            return "{\n" + inner + "\n" + " " * (3 - depth) + "}"
        return json.dumps(of)

    return lines(value, 3) + "\n"


if __name__ == "__main__":
    FILE.write_text(spelled(vectors()), encoding="utf-8")
