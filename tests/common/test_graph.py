"""Who shares with whom: enough neighbours that none is exposed or stuck, and the same on every machine."""

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Collection, Mapping
from fractions import Fraction

import pytest
from hypothesis import given, strategies

from confide.common.errors import UsageError
from confide.common.graph import (
    COMPLETE,
    COMPLETE_UP_TO,
    LARGEST_COHORT,
    SEMI_HONEST,
    connections,
    neighbourhoods,
    survives,
)

SEED = hashlib.sha256(b"all advertisements").digest()
SEEDS = strategies.binary(min_size=32, max_size=32)
SPARSE = range(COMPLETE_UP_TO + 1, 1001)
PRIVACY, CORRECTNESS = Fraction(1, 2**40), Fraction(1, 2**30)


def plain_tail(least: int, of: int, among: int, drawn: int) -> Fraction:
    """The chance of `least` or more marked sites among those drawn, one site after another without putting back."""
    ways = [1]  # by how many marked ones were drawn so far
    for taken in range(drawn):
        after = [0] * (taken + 2)
        for hit, way in enumerate(ways):
            after[hit] += way * max(among - of - (taken - hit), 0)
            after[hit + 1] += way * max(of - hit, 0)
        ways = after
    return Fraction(sum(ways[least:]), math.perm(among, drawn))


def exposed(sites: int, k: int, t: int) -> Fraction:
    """A bound on the chance that some site has t or more corrupt neighbours, a tenth missing from the circle."""
    return sites * plain_tail(t, sites // 10, sites - sites // 10 - 1, k)


def stuck(sites: int, k: int, t: int) -> Fraction:
    """A bound on the chance that fewer than t neighbours of some site survive a tenth of dropouts."""
    return sites * plain_tail(k - t + 1, sites // 10, sites - 1, k)


def parted(sites: int, k: int) -> Fraction:
    """The bound of `connections` on the chance that the honest survivors are not connected."""
    return sites * Fraction(1, 5) ** (k // 2)


def parted_at_two_places(sites: int, k: int, gone: int) -> Fraction:
    """A closer bound: both ends of a part that is cut off need k/2 sites in a row, out of the `gone`."""
    pairs = Fraction(sites * (sites - k - 1), 2)
    return pairs * Fraction(math.perm(gone, k), math.perm(sites, k)) if gone >= k else Fraction(0)


def plain_circle(members: Collection[int], seed: bytes) -> list[int]:
    """The order on the circle, as the docstring of `neighbourhoods` says it."""
    stream = b"".join(hashlib.sha256(b"confide-graph/1" + seed + bytes(7) + bytes([c])).digest() for c in range(200))
    words = [stream[2 * i] * 256 + stream[2 * i + 1] for i in range(len(stream) // 2)]
    circle = sorted(members)
    for i in reversed(range(1, len(circle))):
        while words[0] >= 65536 // (i + 1) * (i + 1):
            words.pop(0)
        j = words.pop(0) % (i + 1)
        circle[i], circle[j] = circle[j], circle[i]
    return circle


def connected(graph: Mapping[int, Collection[int]], removed: Collection[int]) -> bool:
    left = set(graph) - set(removed)
    reached: set[int] = set()
    edge = set(list(left)[:1])
    while edge:
        reached |= edge
        edge = {other for site in edge for other in graph[site]} & left - reached
    return reached == left


@pytest.mark.parametrize(
    ("sites", "quorum"), [(3, 3), (4, 3), (5, 4), (6, 5), (10, 7), (64, 43), (65, 44), (1000, 667)]
)
def test_the_quorum_is_more_than_two_thirds_of_the_whole_cohort(sites: int, quorum: int) -> None:
    assert connections(sites).quorum == quorum


def test_two_quorums_have_more_than_a_third_in_common_and_no_smaller_number_would_do() -> None:
    for sites in range(3, 1001):
        quorum = connections(sites).quorum
        assert quorum <= sites
        assert 3 * (2 * quorum - sites) > sites
        assert 3 * (2 * (quorum - 1) - sites) <= sites


def test_any_two_quorums_of_small_cohorts_share_an_honest_site() -> None:
    for sites in range(3, 8):
        quorums = list(itertools.combinations(range(sites), connections(sites).quorum))
        for corrupt in itertools.combinations(range(sites), (sites - 1) // 3):
            assert all(set(one) & set(other) - set(corrupt) for one in quorums for other in quorums)


@pytest.mark.parametrize("sites", [3, 4, 5, 10, 63, 64])
def test_up_to_64_sites_everyone_shares_with_everyone_and_the_threshold_is_the_quorum(sites: int) -> None:
    among = connections(sites)

    assert (among.sites, among.neighbours, among.threshold) == (sites, sites - 1, among.quorum)
    assert among.graph == COMPLETE


@pytest.mark.parametrize(
    ("sites", "k", "t"), [(65, 40, 20), (100, 42, 21), (200, 42, 21), (500, 48, 26), (1000, 54, 29)]
)
def test_neighbours_and_threshold_of_large_cohorts_are_the_known_ones(sites: int, k: int, t: int) -> None:
    among = connections(sites)

    assert (among.neighbours, among.threshold) == (k, t)
    assert among.graph == SEMI_HONEST


@pytest.mark.parametrize("sites", [*SPARSE[::37], 1000, 2000])
def test_neighbours_are_the_fewest_that_keep_privacy_and_correctness(sites: int) -> None:
    among = connections(sites)

    def suffices(k: int, t: int) -> bool:
        return exposed(sites, k, t) + parted(sites, k) <= PRIVACY and stuck(sites, k, t) <= CORRECTNESS

    k, t = among.neighbours, among.threshold
    assert suffices(k, t)
    assert not any(suffices(k, smaller) for smaller in range(k // 2, t))
    assert not any(suffices(k - 2, other) for other in range((k - 2) // 2, k - 1))


def test_privacy_holds_with_40_bits_for_as_many_dropouts_as_the_quorum_allows() -> None:
    for sites in SPARSE:
        among = connections(sites)
        k, corrupt = among.neighbours, sites // 10
        for present in (among.gathered, sites):
            exposed_there = present * plain_tail(among.threshold, corrupt, present - 1, k)
            gone = corrupt + present - among.quorum
            assert exposed_there + parted_at_two_places(present, k, gone) <= PRIVACY


@pytest.mark.parametrize("sites", [65, 100, 500, 1000])
def test_privacy_holds_with_40_bits_for_every_circle_that_may_be_drawn(sites: int) -> None:
    among = connections(sites)

    chances = [
        present * plain_tail(among.threshold, sites // 10, present - 1, among.neighbours)
        for present in range(among.gathered, sites + 1, max(1, sites // 30))
    ]

    assert among.gathered == sites - sites // 10
    assert max(chances) + parted(sites, among.neighbours) <= PRIVACY


def test_a_circle_is_parted_only_by_two_runs_of_half_the_neighbours() -> None:
    for members, k in ((8, 2), (9, 4), (10, 4), (11, 6)):
        graph = neighbourhoods(range(members), k, SEED)
        circle = plain_circle(range(members), SEED)
        for gone in itertools.chain.from_iterable(itertools.combinations(range(members), c) for c in range(members)):
            left = sorted(set(range(members)) - set(gone))
            gaps = [(after - before - 1) % members for before, after in itertools.pairwise([*left, left[0]])]
            parts = sum(gap >= k // 2 for gap in gaps) >= 2
            assert connected(graph, [circle[place] for place in gone]) == (not parts or len(left) == 1)


@pytest.mark.parametrize(
    ("sites", "dropouts"), [(3, 0), (4, 1), (5, 1), (6, 1), (7, 2), (64, 21), (65, 6), (100, 10), (1000, 100)]
)
def test_a_cohort_survives_so_many_dropouts(sites: int, dropouts: int) -> None:
    assert survives(sites) == dropouts


@pytest.mark.parametrize("sites", [*range(3, 65), *SPARSE[::50]])
def test_after_the_dropouts_that_a_cohort_survives_every_secret_can_be_opened(sites: int) -> None:
    among, left = connections(sites), sites - survives(sites)

    assert left >= among.quorum
    if among.graph == COMPLETE:
        # The secret of one who dropped out is opened by all who survive, its owner's share being lost.
        assert left >= among.threshold
    else:
        assert stuck(sites, among.neighbours, among.threshold) <= CORRECTNESS


@pytest.mark.parametrize("sites", [-1, 0, 1, 2, LARGEST_COHORT + 1])
def test_a_cohort_that_cannot_be_is_refused(sites: int) -> None:
    with pytest.raises(UsageError, match=f"A roster of {sites} sites cannot be; allowed are 3 to 65536"):
        connections(sites)


@given(strategies.sets(strategies.integers(0, 2000), min_size=1, max_size=40), strategies.integers(1, 12), SEEDS)
def test_the_graph_is_symmetric_and_regular_and_as_its_description_says(
    members: set[int], half: int, seed: bytes
) -> None:
    k = 2 * half
    circle = plain_circle(members, seed)

    graph = neighbourhoods(list(members), k, seed)

    assert set(graph) == members
    for place, member in enumerate(circle):
        near = {circle[(place + step) % len(circle)] for step in range(-half, half + 1)} - {member}
        assert graph[member] == tuple(sorted(near if k < len(members) - 1 else members - {member}))
        assert len(graph[member]) == min(k, len(members) - 1)
        assert all(member in graph[other] for other in graph[member])


@given(strategies.permutations(range(30)), SEEDS)
def test_the_graph_does_not_depend_on_the_order_in_which_members_are_told(members: list[int], seed: bytes) -> None:
    assert neighbourhoods(members, 4, seed) == neighbourhoods(range(30), 4, seed)


def test_a_cohort_of_a_thousand_has_the_known_graph() -> None:
    k = connections(1000).neighbours

    graph = neighbourhoods(range(1000), k, SEED)

    circle = plain_circle(range(1000), SEED)
    around = [circle[place - 500] for place in range(500 - k // 2, 500 + k // 2 + 1) if place != 500]
    assert graph[circle[0]] == tuple(sorted(around))
    assert {len(near) for near in graph.values()} == {54}
    assert circle[:8] == [684, 396, 788, 174, 725, 850, 57, 43]


@pytest.mark.parametrize(("members", "k"), [(1, 2), (2, 1), (3, 2), (5, 4), (5, 7), (64, 63)])
def test_with_neighbours_enough_for_all_the_graph_is_complete(members: int, k: int) -> None:
    graph = neighbourhoods(range(members), k, SEED)

    assert graph == {site: tuple(other for other in range(members) if other != site) for site in range(members)}


def test_every_pair_is_equally_likely_to_be_neighbours() -> None:
    # On a circle of 7 two sites are neighbours with probability 1/3. A count leaves 6 standard deviations with
    # probability 2e-9; 21 pairs: false alarm below 1e-7.
    graphs = 3000
    pairs: Counter[tuple[int, int]] = Counter()

    for number in range(graphs):
        graph = neighbourhoods(range(7), 2, hashlib.sha256(number.to_bytes(4, "big")).digest())
        pairs.update((site, other) for site, near in graph.items() for other in near if site < other)

    assert len(pairs) == 21
    spread = math.sqrt(graphs * 1 / 3 * 2 / 3)
    assert max(abs(count - graphs / 3) for count in pairs.values()) <= 6 * spread


@pytest.mark.parametrize("k", [-2, 0, 1, 3, 5])
def test_a_circle_with_an_odd_number_of_neighbours_or_none_is_refused(k: int) -> None:
    with pytest.raises(UsageError, match=f"Each of 7 members cannot have {k} neighbours"):
        neighbourhoods(range(7), k, SEED)


@pytest.mark.parametrize("seed", [b"", SEED[:31], SEED + b"x"])
def test_a_seed_of_another_size_is_refused(seed: bytes) -> None:
    with pytest.raises(UsageError, match=f"seed has 32 bytes; {len(seed)} were given"):
        neighbourhoods(range(7), 2, seed)


@pytest.mark.parametrize("members", [[1, 2, 1], range(LARGEST_COHORT + 1)], ids=["twice", "too many"])
def test_members_that_cannot_be_joined_are_refused(members: list[int]) -> None:
    with pytest.raises(UsageError, match=f"{len(members)} members cannot be joined"):
        neighbourhoods(members, 2, SEED)
