"""Known answers: the implementation and a reference that shares no code with it give the same bytes, those of the file."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from confide.common.attempt import Attempt
from confide.common.canonical import canonical_bytes
from confide.common.checkpoint import SHORT_CHARACTERS
from confide.common.crypto import Identity, Keystream, Scratch, derive, verify
from confide.common.graph import COMPLETE, COMPLETE_UP_TO, SEMI_HONEST, connections, neighbourhoods
from confide.common.messages import Envelope, Message, Offer, open_envelope, seal, vector_digest
from confide.common.plan import HYBRID, Federation
from confide.common.ring import RingLayout, RingVector, RingWords
from confide.common.roster import parse_roster
from confide.common.secagg import ServerSide, SiteSide, apply_masks
from confide.common.shamir import Combiner, split
from tests.cohorts import Cohort
from tests.common import secagg_reference as reference

VECTORS: dict[str, Any] = json.loads(reference.FILE.read_text(encoding="utf-8"))
Sent = dict[str, Envelope | list[Envelope | None]]


def test_the_reference_gives_every_known_answer() -> None:
    assert reference.spelled(reference.vectors()) == reference.FILE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", VECTORS["rounds"])
def test_every_message_of_a_round_has_the_bytes_of_the_known_answer(name: str) -> None:
    answer = VECTORS["rounds"][name]

    sent, total = played(name, answer)

    for kind in reference.MESSAGES:
        if (answer["key_agreement"], kind) != (HYBRID, "shares"):  # an encapsulation is never the same twice
            assert plain(sent[kind]) == expected(answer[kind]), kind
    assert total == answer["sum"]


@pytest.mark.parametrize("name", VECTORS["digests"])
def test_every_message_on_the_sparse_graph_has_the_digest_of_the_known_answer(name: str) -> None:
    answer = VECTORS["digests"][name]

    sent, total = played(name, reference.played(name, **reference.LARGE_ROUNDS[name]))

    assert {kind: digest(sent[kind]) for kind in reference.MESSAGES} == answer["messages"]
    assert total == answer["sum"]


@pytest.mark.parametrize("name", VECTORS["rounds"])
def test_the_context_of_a_round_is_the_hash_of_the_known_text(name: str) -> None:
    answer = VECTORS["rounds"][name]

    attempt = Attempt.of(offered(answer), parse_roster(answer["roster"].encode()), ring_of(answer), terms(answer))

    assert attempt.pre.hex() == answer["pre"] == hashlib.sha256(answer["pre_is_sha256_of"].encode()).hexdigest()
    assert attempt.offer.roster == reference.digest(answer["roster"].encode())
    assert attempt.offer.ring == reference.digest(answer["ring"].encode())


@pytest.mark.parametrize("route", ["gcm", "ctr"])
@pytest.mark.parametrize("case", VECTORS["keystream"], ids=lambda case: f"block {case['block']}")
def test_a_block_of_the_keystream_is_the_known_one(case: Mapping[str, Any], route: str) -> None:
    block = Keystream(bytes.fromhex(case["key"]), route).block(case["block"], Scratch()).tobytes()

    assert block[:32].hex() == case["first"]
    assert block[-32:].hex() == case["last"]
    assert hashlib.sha256(block).hexdigest() == case["sha256"]


@pytest.mark.parametrize("case", VECTORS["masking"], ids=lambda case: f"{case['size']} of {case['bits']} bits")
def test_masks_on_a_vector_that_ends_around_the_end_of_a_block_are_the_known_ones(case: Mapping[str, Any]) -> None:
    words: RingWords = np.arange(case["size"]).astype(np.uint32 if case["bits"] == 32 else np.uint16)

    apply_masks(words, [(bytes.fromhex(case["added"]), True), (bytes.fromhex(case["taken_off"]), False)], words)

    assert words[:4].tolist() == case["first"]
    assert words[-4:].tolist() == case["last"]
    assert hashlib.sha256(words.astype(words.dtype.newbyteorder("<")).tobytes()).hexdigest() == case["sha256"]


@pytest.mark.parametrize("case", VECTORS["shamir"], ids=lambda case: f"{case['threshold']} of {len(case['points'])}")
def test_shares_of_a_secret_are_the_known_ones_and_give_it_back(case: Mapping[str, Any]) -> None:
    secret, coefficients = bytes.fromhex(case["secret"]), bytes.fromhex(case["coefficients"])
    points, threshold = case["points"], case["threshold"]

    shares = split(secret, threshold, points, lambda count: coefficients[:count])

    assert [share.hex() for share in shares] == case["shares"]
    assert Combiner(points[:threshold]).combine(shares[:threshold]) == secret


@pytest.mark.parametrize("case", VECTORS["derivation"], ids=lambda case: case["what"])
def test_a_key_derived_for_a_known_use_is_the_known_one(case: Mapping[str, str]) -> None:
    key = derive(bytes.fromhex(case["secret"]), bytes.fromhex(case["info"]))

    assert key.hex() == case["key"]


@pytest.mark.parametrize("sites", VECTORS["parameters"])
def test_the_parameters_of_a_cohort_are_the_known_ones(sites: str) -> None:
    answer = VECTORS["parameters"][sites]

    among = connections(int(sites))

    found = {name: getattr(among, name) for name in ("sites", "quorum", "neighbours", "threshold", "gathered")}
    assert found | {"floor": answer["floor"]} == answer


def test_the_neighbours_on_a_circle_are_the_known_ones() -> None:
    circle = VECTORS["circle"]

    around = neighbourhoods(circle["members"], circle["k"], bytes.fromhex(circle["seed"]))

    assert {str(place): list(near) for place, near in around.items()} == circle["neighbours"]


@pytest.mark.parametrize("count", [3, 10, 50])
def test_bodies_of_messages_are_as_long_as_the_page_says(count: int) -> None:
    layout = RingLayout(length=4, max_sites=1000, update_bound=1.0)
    cohort = Cohort(count=count, ring=layout)
    whole = "sha256:" + 64 * "0"
    offer = cohort.offer(plan=whole, layout=whole)

    cohort.run(spoil=with_checkpoint)

    said = {"advertise": 447, "share": 82 * count + 74, "contribute": 317, "confirm": 194, "open": 33 * count + 125}
    assert len(seal(offer).body) == 12 * count + 483
    assert {(name, len(seal(sent).body)) for _, name, sent in cohort.transcript} == set(said.items())
    assert sum(said.values()) == 115 * count + 1157


@pytest.mark.parametrize("count", [3, 10])
def test_bodies_of_hybrid_messages_are_as_long_as_the_page_says(count: int) -> None:
    layout = RingLayout(length=4, max_sites=1000, update_bound=1.0)
    cohort = Cohort(count=count, ring=layout, terms=Federation(key_agreement=HYBRID))

    cohort.run(spoil=with_checkpoint)

    said = {
        "advertise": 1631,
        "share": 1170 * count - 1014,
        "contribute": 317,
        "confirm": 194,
        "open": 33 * count + 125,
    }
    assert {(name, len(seal(sent).body)) for _, name, sent in cohort.transcript} == set(said.items())
    assert sum(said.values()) == 1203 * count + 1253


def with_checkpoint(exchange: str, site: str, message: Any) -> Any:
    """Return a site's message; what it advertises and contributes with a checkpoint of a ledger."""
    if exchange not in {"advertise", "contribute"}:
        return message
    return dataclasses.replace(message, checkpoint=SHORT_CHARACTERS * "c")


@pytest.mark.parametrize("name", ["three sites, 32 bits", "five sites, 32 bits", "three sites, 32 bits, hybrid"])
def test_bodies_from_the_server_are_as_long_as_the_page_says(name: str) -> None:
    answer = VECTORS["rounds"][name]

    sent, _ = played(name, answer)

    n, hybrid = answer["sites"], answer["key_agreement"] == HYBRID
    said = {
        "peers": 1489 * n + 223 if hybrid else 305 * n + 223,
        "start": 1172 * n - 1049 if hybrid else 84 * n + 39,
        "survivors": 2 * n + 127,
        "signatures": 66 * (2 * n // 3 + 1) + 128,
    }
    found = {kind: sent[kind] for kind in said}
    assert {
        (kind, len(one.body))
        for kind, of in found.items()
        for one in (of if isinstance(of, list) else [of])
        if one is not None
    } == set(said.items())


def played(name: str, answer: Mapping[str, Any]) -> tuple[Sent, list[int]]:
    """Play the round with both sides of the implementation on the inputs of `answer`; give what was sent, and the sum."""
    roster, ring = parse_roster(answer["roster"].encode()), ring_of(answer)
    offer = offered(answer)
    attempt = Attempt.of(offer, roster, ring, terms(answer))
    adapter = np.frombuffer(bytes.fromhex(answer["adapter"]), "<f4").astype(np.float32)
    coordinator = Identity(bytes.fromhex(answer["coordinator_seed"]))
    check = functools.cache(verify)  # the server and every site would verify the same signatures
    server = ServerSide(attempt, vector_digest(adapter), check)
    sites = [
        SiteSide(attempt, site, Identity(bytes.fromhex(seed)), check, reference.Stream(f"{name} site {place}").draw)
        for place, (site, seed) in enumerate(zip(offer.cohort, answer["identity_seeds"], strict=True))
    ]
    left = [place for place in range(len(sites)) if place not in answer["lost_before_contribute"]]
    sent: Sent = {"offer": seal(Offer(**offer.terms, signature=coordinator.sign(attempt.offered)))}  # type: ignore[arg-type]

    def answers(of: Sequence[int], ask: Callable[[SiteSide], Any]) -> list[Any]:
        return [ask(site) if place in of else None for place, site in enumerate(sites)]

    def taken(kind: str, found: Sequence[Message | None], take: Callable[[str, Any], None]) -> None:
        sent[kind] = [None if one is None else seal(one) for one in found]
        for site, one in zip(offer.cohort, found, strict=True):
            if one is not None:
                take(site, one)

    advertisements = [
        dataclasses.replace(site.advertise(), checkpoint=checkpoint)
        for site, checkpoint in zip(sites, shown(answer), strict=True)
    ]
    taken("advertisement", advertisements, server.advertised)
    peers = server.peers()
    sent["peers"] = seal(peers)
    shares = answers(range(len(sites)), lambda site: site.share(peers))
    if attempt.hybrid:
        assert [len(seal(one).body) for one in shares] == [len(envelope_of(one).body) for one in answer["shares"]]
        shares = [open_envelope(envelope_of(one)) for one in answer["shares"]]
    taken("shares", shares, server.shared)
    starts = {place: server.start(offer.cohort[place], adapter) for place in left}
    sent["start"] = [seal(starts[place]) if place in starts else None for place in range(len(sites))]
    for place, start in starts.items():
        sites[place].admit(start)
    x = {
        id(site): RingVector(words=np.array(answer["vectors"][place], ring.dtype), layout=ring)
        for place, site in enumerate(sites)
    }
    contributions = [
        one and dataclasses.replace(one, checkpoint=checkpoint)
        for one, checkpoint in zip(answers(left, lambda site: site.mask(x[id(site)])), shown(answer), strict=True)
    ]
    taken("contribution", contributions, server.contributed)
    survivors = server.survivors()
    sent["survivors"] = seal(survivors)
    taken("confirmation", answers(left, lambda site: site.confirm(survivors)), server.confirmed)
    signatures = server.signatures()
    sent["signatures"] = seal(signatures)
    taken("opening", answers(left, lambda site: site.open(signatures)), server.opened)
    return sent, server.total().words.tolist()


def shown(answer: Mapping[str, Any]) -> list[str]:
    """Return the checkpoints that the sites of a round show."""
    return [json.loads(advertisement["text"])["checkpoint"] for advertisement in answer["advertisement"]]


def offered(answer: Mapping[str, Any]) -> Offer:
    """Return the offer of a round, not signed yet."""
    offer = json.loads(answer["pre_is_sha256_of"])["offer"]
    return Offer(**offer | {"cohort": tuple(offer["cohort"])}, signature=b"")


def terms(answer: Mapping[str, Any]) -> Federation:
    """Return the terms of a round's plan."""
    graph = COMPLETE if answer["sites"] <= COMPLETE_UP_TO else SEMI_HONEST
    return Federation(
        min_sites=answer["min_sites"],
        max_sites=1000,
        ring_bits=answer["bits"],
        key_agreement=answer["key_agreement"],
        graph=graph,
    )


def ring_of(answer: Mapping[str, Any]) -> RingLayout:
    """Return the ring of a round."""
    ring = json.loads(answer["ring"])
    assert ring.pop("format") == "confide-ring/1"
    layout = RingLayout(**ring | {"segments": tuple(map(tuple, ring["segments"]))})
    assert layout.digest == reference.digest(canonical_bytes({"format": "confide-ring/1", **ring}))
    return layout


def envelope_of(message: Mapping[str, str]) -> Envelope:
    """Return a message of the file as an envelope."""
    vector = np.frombuffer(bytes.fromhex(message["vector"]), "<u4").astype(np.uint32) if "vector" in message else None
    return Envelope(body=reference.body_of(message), vector=vector)


def plain(sent: Envelope | list[Envelope | None]) -> Any:
    """Return what was sent in bytes: body and vector, or a list of these."""
    if isinstance(sent, list):
        return [None if one is None else plain(one) for one in sent]
    return sent.body, b"" if sent.vector is None else sent.vector.astype("<u4").tobytes()


def expected(message: Any) -> Any:
    """Return what the file says in the form of `plain`."""
    if isinstance(message, list):
        return [None if one is None else expected(one) for one in message]
    return reference.body_of(message), bytes.fromhex(message.get("vector", ""))


def digest(sent: Envelope | list[Envelope | None]) -> str:
    """Return the digest that the file keeps of all messages of a kind."""
    hashed = hashlib.sha256()
    for body, vector in filter(None, plain(sent if isinstance(sent, list) else [sent])):
        hashed.update(len(body).to_bytes(8, "big") + body + vector)
    return hashed.hexdigest()
