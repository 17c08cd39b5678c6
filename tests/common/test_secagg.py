"""Secure aggregation among honest sites: the sum is exact, whoever drops out, and what is sent looks like nothing."""

import dataclasses
import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from confide.common.attempt import places
from confide.common.errors import MessageError, Refused
from confide.common.graph import connections
from confide.common.messages import Contribution, Signatures, Survivors, seal, vector_digest
from confide.common.plan import Federation
from confide.common.ring import RingLayout, RingWords
from confide.common.secagg import ServerSide, apply_masks
from tests.cohorts import ADAPTER, EXCHANGES, Cohort


def ring(bits: int = 32, length: int = 21, max_sites: int = 1000) -> RingLayout:
    if bits == 32:
        return RingLayout(length=length, max_sites=max_sites, update_bound=1.0)
    return RingLayout(length=length, max_sites=min(max_sites, 100), bits=16, segments=((length, 1.0),))


@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize("count", [3, 4, 5, 10, 64])
def test_the_masked_sum_is_the_integer_sum(count: int, bits: int) -> None:
    cohort = Cohort(count=count, ring=ring(bits))

    total, server = cohort.run()

    assert total.words.tolist() == cohort.total(cohort.names)
    assert total.count == count
    assert server.suspects == ()


@settings(max_examples=60)
@given(strategies.data())
def test_the_masked_sum_is_the_integer_sum_of_the_survivors_whoever_drops_out_where(
    data: strategies.DataObject,
) -> None:
    count = data.draw(strategies.integers(3, 12))
    bits = data.draw(strategies.sampled_from([32, 16]))
    cohort = Cohort(count=count, ring=ring(bits, length=data.draw(strategies.integers(1, 40))), seed=count)
    spare = count - connections(count).quorum
    lost = data.draw(strategies.lists(strategies.sampled_from(cohort.names), unique=True, max_size=spare))
    dropouts: dict[str, list[str]] = {name: [] for name in EXCHANGES}
    for site in lost:
        dropouts[data.draw(strategies.sampled_from(EXCHANGES))].append(site)

    total, _ = cohort.run(dropouts)

    before = {site for name in ("advertise", "share", "contribute") for site in dropouts[name]}
    assert total.words.tolist() == cohort.total([name for name in cohort.names if name not in before])


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_below_the_quorum_nothing_is_opened(exchange: str) -> None:
    cohort = Cohort(count=5, ring=ring())

    with pytest.raises((Refused, MessageError), match="needed"):
        cohort.run({exchange: cohort.names[:2]})


def test_a_large_cohort_sums_over_the_sparse_graph_and_loses_some_sites_everywhere() -> None:
    cohort = Cohort(count=70, ring=ring(length=9), terms=Federation(max_sites=70, graph="semi_honest_graph"))
    dropouts = {name: [f"site-{17 * number + 3:04}"] for number, name in enumerate(EXCHANGES[:4])}

    total, _ = cohort.run(dropouts)

    before = {site for name in EXCHANGES[:3] for site in dropouts[name]}
    assert total.words.tolist() == cohort.total([name for name in cohort.names if name not in before])
    assert connections(70).neighbours < 69


def test_the_boxes_of_the_hybrid_key_agreement_open_too() -> None:
    cohort = Cohort(count=4, ring=ring(), terms=Federation(key_agreement="x25519+ml-kem-768"))

    total, _ = cohort.run({"contribute": cohort.names[:1]})

    assert total.words.tolist() == cohort.total(cohort.names[1:])


def test_the_order_in_which_answers_arrive_does_not_matter() -> None:
    cohort = Cohort(count=4, ring=ring())
    attempt = cohort.begun()
    server = ServerSide(attempt, vector_digest(ADAPTER))
    sites = {name: cohort.site(name, attempt) for name in cohort.names}
    backwards = cohort.names[::-1]

    for name in backwards:
        server.advertised(name, sites[name].advertise())
    peers = server.peers()
    for name in cohort.names:
        server.shared(name, sites[name].share(peers))
    for name in backwards:
        sites[name].admit(server.start(name, ADAPTER))
        server.contributed(name, sites[name].mask(cohort.vectors[name]))
    survivors = server.survivors()
    for name in cohort.names:
        server.confirmed(name, sites[name].confirm(survivors))
    signatures = server.signatures()
    for name in backwards:
        server.opened(name, sites[name].open(signatures))

    assert server.total().words.tolist() == cohort.total(cohort.names)


def test_another_attempt_masks_the_same_vector_with_other_masks() -> None:
    first, second = (Cohort(count=3, ring=ring(), attempt=attempt) for attempt in (1, 2))

    totals = [cohort.run()[0].words.tolist() for cohort in (first, second)]

    sent = [
        {
            site: message.vector.words.tolist()
            for site, _, message in cohort.transcript
            if isinstance(message, Contribution)
        }
        for cohort in (first, second)
    ]
    assert totals[0] == totals[1]
    assert all(sent[0][site] != sent[1][site] for site in first.names)


def test_what_is_sent_is_statistically_uniform() -> None:
    # Chi-square over the 256 values of a byte, at 4 x 40,000 bytes of vectors of zeros: 255 degrees of freedom, so above 400
    # with probability below 1e-7; the same for all the bytes of sealed shares and openings.
    layout = ring(length=10_000)
    cohort = Cohort(count=4, ring=layout)
    for vector in cohort.vectors.values():
        vector.words[:] = 0

    cohort.run()

    for site in cohort.names:
        sent = next(m for s, _, m in cohort.transcript if s == site and isinstance(m, Contribution))
        assert chi_square(sent.vector.words.tobytes()) < 400
    lone = [m.vector.words for _, _, m in cohort.transcript if isinstance(m, Contribution)]
    for size in (2, 3, 4):
        for some in itertools.combinations(lone, size):  # pair masks hide each subset's sum, self masks that of all
            assert chi_square(np.sum(some, axis=0, dtype=np.uint32).tobytes()) < 400


def chi_square(raw: bytes) -> float:
    expected = len(raw) / 256
    return sum((count - expected) ** 2 / expected for count in (Counter(raw).get(value, 0) for value in range(256)))


def test_keystreams_are_added_and_taken_off_wherever_blocks_end() -> None:
    for dtype, sizes in ((np.uint32, (1, 65_535, 65_536, 65_537, 200_000)), (np.uint16, (2, 131_072, 131_074))):
        for size in sizes:
            words: RingWords = np.arange(size).astype(dtype)
            before = words.copy()

            apply_masks(words, [(b"k" * 32, True), (b"l" * 32, False)], words)
            changed = int(np.count_nonzero(words != before))
            apply_masks(words, [(b"l" * 32, True), (b"k" * 32, False)], words)

            assert words.tolist() == before.tolist()
            assert changed > 0.99 * size - 1


def test_steps_out_of_order_are_refused() -> None:
    cohort = Cohort(count=3, ring=ring())
    site = cohort.site(cohort.names[0])

    with pytest.raises(Refused, match="advertise is due"):
        site.mask(cohort.vectors[cohort.names[0]])

    site.advertise()
    with pytest.raises(Refused, match="share is due"):
        site.advertise()


def test_a_failed_step_ends_the_attempt_and_lets_go_of_the_keys() -> None:
    cohort = Cohort(count=3, ring=ring())
    attempt = cohort.begun()
    site = cohort.site(cohort.names[0], attempt)
    server = ServerSide(attempt, vector_digest(ADAPTER))
    server.advertised(cohort.names[0], site.advertise())

    with pytest.raises(Refused, match="advertised"):
        site.share(server.peers())

    with pytest.raises(Refused, match="nothing more is due"):
        site.share(server.peers())


def test_a_sites_own_signature_counts_for_nobody_else() -> None:
    cohort = Cohort(count=4, ring=ring())
    attempt = cohort.begun()
    server = ServerSide(attempt, vector_digest(ADAPTER))
    sites = {name: cohort.site(name, attempt) for name in cohort.names}
    for name, site in sites.items():
        server.advertised(name, site.advertise())
    peers = server.peers()
    for name, site in sites.items():
        server.shared(name, site.share(peers))
    victim, name = sites[cohort.names[0]], cohort.names[0]
    victim.admit(server.start(name, ADAPTER))
    victim.mask(cohort.vectors[name])
    confirmed = victim.confirm(Survivors(context=server.start(name, ADAPTER).context, sites=places(range(3))))

    copied = b"".join(places([place]) + confirmed.signature for place in range(3))

    with pytest.raises(MessageError, match="signature"):
        victim.open(Signatures(context=confirmed.context, signatures=copied))


def test_no_secret_shows_in_what_is_printed() -> None:
    cohort = Cohort(count=3, ring=ring())
    site = cohort.site(cohort.names[0])

    shown = repr(site) + repr(site.__dict__)

    for secret in (site._keys.seed, site._keys.pair.secret(), site._keys.box.secret()):  # type: ignore[union-attr]
        assert secret.hex() not in shown
        assert repr(secret) not in shown


def test_what_a_site_sends_beside_its_vector_is_at_most_115_bytes_per_site_and_1024() -> None:
    for count in (3, 10, 50):
        cohort = Cohort(count=count, ring=ring())

        cohort.run()

        for site in cohort.names:
            sent = [seal(message) for name, _, message in cohort.transcript if name == site]
            beside = sum(len(envelope.body) for envelope in sent)
            assert beside <= 115 * count + 1024


def test_the_context_is_the_hash_the_page_says() -> None:
    cohort = Cohort(count=3, ring=ring())
    attempt = cohort.begun()
    server = ServerSide(attempt, vector_digest(ADAPTER))
    for name in cohort.names:
        server.advertised(name, cohort.site(name, attempt).advertise())

    peers = server.peers()

    head = b"confide-secagg/1 context\n" + attempt.pre + vector_digest(ADAPTER).encode() + b"\n"
    assert server._gathering.ctx == hashlib.sha256(head + peers.advertisements).digest()


def test_checkpoints_are_handed_on_unread_and_in_the_order_of_the_sites_that_advertised() -> None:
    cohort = Cohort(count=5, ring=ring())
    attempt = cohort.begun()
    server, sites = ServerSide(attempt, vector_digest(ADAPTER)), {}
    for name in reversed(cohort.names[:4]):
        sites[name] = cohort.site(name, attempt)
        server.advertised(name, dataclasses.replace(sites[name].advertise(), checkpoint=f"of {name}"))

    peers = server.peers()
    sites["site-0000"].share(peers)

    assert peers.checkpoints == tuple(f"of {name}" for name in cohort.names[:4])
    assert sites["site-0000"].peers == cohort.names[:4]


@pytest.mark.parametrize("told", [(), ("",) * 3, ("",) * 5])
def test_checkpoints_that_are_not_one_for_each_advertisement_end_the_attempt(told: tuple[str, ...]) -> None:
    cohort = Cohort(count=4, ring=ring())
    attempt = cohort.begun()
    server = ServerSide(attempt, vector_digest(ADAPTER))
    sites = [cohort.site(name, attempt) for name in cohort.names]
    for name, site in zip(cohort.names, sites, strict=True):
        server.advertised(name, site.advertise())
    peers = server.peers()

    with pytest.raises(MessageError, match="one is due with each"):
        sites[0].share(dataclasses.replace(peers, checkpoints=told))
    with pytest.raises(Refused):
        sites[0].share(peers)
