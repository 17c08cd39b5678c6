"""Splits of one table: all rows once, persons whole, draws fixed by the seed."""

from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import given, strategies

from confide.common.errors import UsageError
from confide.common.examples import Examples, Ints
from confide.simulations.partition import by_column, dirichlet, held_out, iid, quantity

Split = Callable[[Examples, int], dict[str, Ints]]
SPLITS: dict[str, Split] = {
    "iid": lambda rows, seed: iid(rows, 4, seed),
    "dirichlet": lambda rows, seed: dirichlet(rows, 4, 0.5, 5, seed),
    "quantity": lambda rows, seed: quantity(rows, 4, 0.5, 5, seed),
}


def examples(persons: list[int], labels: list[int] | None = None) -> Examples:
    count = len(persons)
    return Examples(
        tokens=[np.ones(1, np.int32)],
        store=np.zeros(count, np.int64),
        starts=np.zeros(count, np.int64),
        lengths=np.ones(count, np.int64),
        second=np.ones(count, np.int64),
        labels=np.array(labels if labels is not None else [person % 3 for person in persons], np.int64),
        persons=np.array(persons, np.int64),
        pad_token=0,
    )


def many(seed: int = 0, persons: int = 150, rows: int = 400) -> Examples:
    random = np.random.default_rng(seed)
    owners = np.concatenate([np.arange(persons), random.integers(0, persons, rows - persons)])
    return examples(random.permutation(owners).tolist(), random.integers(0, 3, rows).tolist())


def owners(rows: Examples, sites: Mapping[str, Ints]) -> list[set[int]]:
    return [set(rows.persons[part].tolist()) for part in sites.values()]


def same(one: Mapping[str, Ints], other: Mapping[str, Ints]) -> bool:
    return list(one) == list(other) and all(np.array_equal(one[site], other[site]) for site in one)


@pytest.mark.parametrize("split", SPLITS)
@given(seed=strategies.integers(0, 10_000))
def test_every_row_is_used_once_and_no_person_is_split_over_sites(split: str, seed: int) -> None:
    rows = many(seed)

    sites = SPLITS[split](rows, seed)

    assert list(sites) == ["site-1", "site-2", "site-3", "site-4"]
    assert sorted(np.concatenate(list(sites.values())).tolist()) == list(range(len(rows)))
    assert sum(len(persons) for persons in owners(rows, sites)) == rows.person_count
    assert max(Counter(person for persons in owners(rows, sites) for person in persons).values()) == 1


@pytest.mark.parametrize("split", SPLITS)
def test_the_seed_fixes_the_draw(split: str) -> None:
    rows = many()

    assert same(SPLITS[split](rows, 1), SPLITS[split](rows, 1))
    assert not same(SPLITS[split](rows, 1), SPLITS[split](rows, 2))


def test_site_names_are_padded_so_that_they_sort() -> None:
    sites = iid(many(), 12, 0)

    assert list(sites) == sorted(sites)
    assert next(iter(sites)) == "site-01"


@pytest.mark.parametrize("sites", [1, 3, 7, 150])
def test_iid_sites_are_of_equal_size_to_within_one_person(sites: int) -> None:
    rows = many()

    sizes = [len(persons) for persons in owners(rows, iid(rows, sites, 0))]

    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("concentration", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("least", [1, 10, 20])
def test_a_dirichlet_split_gives_every_site_the_least_persons(concentration: float, least: int) -> None:
    rows = many()

    for seed in range(5):
        sizes = [len(persons) for persons in owners(rows, dirichlet(rows, 4, concentration, least, seed))]

        assert min(sizes) >= least


def test_a_dirichlet_split_is_the_more_uneven_the_smaller_its_concentration() -> None:
    # Widest gap between sites in the share of label 0, mean of 20 draws; it is 0.1 or 0.9 to within a few hundredths.
    rows = examples(list(range(3000)))

    def gap(concentration: float, seed: int) -> float:
        sites = dirichlet(rows, 4, concentration, 1, seed).values()
        shares = [float((rows.labels[part] == 0).mean()) for part in sites]
        return max(shares) - min(shares)

    even = np.mean([gap(100.0, seed) for seed in range(20)])
    uneven = np.mean([gap(0.1, seed) for seed in range(20)])

    assert even < 0.2
    assert uneven > 0.5


def test_a_dirichlet_split_counts_a_person_with_her_first_label() -> None:
    rows = examples([0, 0, 1, 1, 2, 3], [0, 1, 1, 0, 0, 1])

    sites = dirichlet(rows, 2, 100.0, 2, 0)

    for persons in owners(rows, sites):
        assert len(persons & {0, 2}) == 1  # first label 0
        assert len(persons & {1, 3}) == 1  # first label 1


def test_a_dirichlet_split_that_cannot_give_the_least_is_refused() -> None:
    with pytest.raises(UsageError, match=r"In 100 draws no Dirichlet split .* the plan's 38 persons"):
        dirichlet(many(), 4, 1.0, 38, 0)


def test_a_quantity_split_gives_the_least_and_differs_in_size() -> None:
    rows = many()

    sizes = [sorted(map(len, owners(rows, quantity(rows, 4, 0.5, 20, seed)))) for seed in range(20)]

    assert min(min(each) for each in sizes) >= 20
    assert max(max(each) - min(each) for each in sizes) > 30
    assert {sum(each) for each in sizes} == {rows.person_count}


def test_a_quantity_split_may_need_every_person() -> None:
    rows = examples(list(range(20)))

    assert [len(persons) for persons in owners(rows, quantity(rows, 4, 0.5, 5, 0))] == [5, 5, 5, 5]
    with pytest.raises(UsageError, match="20 persons cannot give 4 sites the plan's 6 each"):
        quantity(rows, 4, 0.5, 6, 0)


def test_by_column_gives_each_row_to_the_site_its_column_names() -> None:
    sites = by_column(["north", "south", "north", "east"])

    assert {site: rows.tolist() for site, rows in sites.items()} == {"east": [3], "north": [0, 2], "south": [1]}


@given(strategies.integers(0, 10_000), strategies.sampled_from([0.1, 0.2, 0.5, 0.9]))
def test_held_out_rows_and_the_others_are_all_rows_and_share_no_person(seed: int, share: float) -> None:
    rows = many(seed)

    training, test = held_out(rows, share, seed)

    assert sorted([*training.tolist(), *test.tolist()]) == list(range(len(rows)))
    assert not set(rows.persons[training].tolist()) & set(rows.persons[test].tolist())
    assert len(set(rows.persons[test].tolist())) == round(share * rows.person_count)


def test_the_seed_fixes_what_is_held_out() -> None:
    rows = many()

    assert np.array_equal(held_out(rows, 0.2, 1)[1], held_out(rows, 0.2, 1)[1])
    assert not np.array_equal(held_out(rows, 0.2, 1)[1], held_out(rows, 0.2, 2)[1])


@pytest.mark.parametrize("share", [-0.5, 0.0, 0.001, 0.999, 1.0, 1.5])
def test_a_share_that_leaves_one_side_empty_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match="leaves one side empty"):
        held_out(many(), share, 0)
