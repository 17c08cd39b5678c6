"""One table split into sites and a held-out test set.

All rows of a person stay together, unless a column says where each row lies: then she is a person at each of her sites.
"""

from collections.abc import Sequence

import numpy as np

from confide.common.errors import UsageError
from confide.common.examples import Examples, Ints

_TRIES = 100


def held_out(examples: Examples, share: float, seed: int) -> tuple[Ints, Ints]:
    """Return (training rows, test rows): a random `share` of the persons is held out.

    Raises:
        UsageError: The share is not between 0 and 1, or leaves one side empty.
    """
    persons = np.random.default_rng([seed, 1]).permutation(examples.person_count)
    cut = round(share * len(persons))
    if not 0 < cut < len(persons):
        raise UsageError(
            f"A test share of {share:g} of {len(persons)} persons leaves one side empty. Give 0.01 to 0.99."
        )
    test = np.isin(examples.persons, persons[:cut])
    return np.flatnonzero(~test), np.flatnonzero(test)


def by_column(values: Sequence[str]) -> dict[str, Ints]:
    """Return the rows of each site, where `values` names each row's site."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(values):
        rows.setdefault(name, []).append(row)
    return {name: np.array(rows[name], dtype=np.int64) for name in sorted(rows)}


def iid(examples: Examples, sites: int, seed: int) -> dict[str, Ints]:
    """Return sites of equal size (to within one person) drawn at random."""
    order = np.random.default_rng([seed, 2]).permutation(examples.person_count)
    return _sites(examples, np.array_split(order, sites))


def dirichlet(examples: Examples, sites: int, concentration: float, least: int, seed: int) -> dict[str, Ints]:
    """Return sites with unlike label mixes: each label's persons are shared out by a draw from a Dirichlet distribution.

    Args:
        examples: The rows; a person counts with the label of her first row.
        sites: How many sites.
        concentration: The Dirichlet parameter α; 0.1 is very uneven, 100 nearly even.
        least: The fewest persons a site may get; draws are repeated until all have them.
        seed: Fixes the draw.

    Raises:
        UsageError: No draw gave every site `least` persons.

    Source: Hsu et al. 2019 (arXiv 1909.06335), Sec. 3.
    """
    random = np.random.default_rng([seed, 3])
    _, first = np.unique(examples.persons, return_index=True)
    labels = examples.labels[first]
    for _ in range(_TRIES):
        parts: list[list[Ints]] = [[] for _ in range(sites)]
        for label in np.unique(labels):
            persons = random.permutation(np.flatnonzero(labels == label))
            cuts = (np.cumsum(random.dirichlet([concentration] * sites))[:-1] * len(persons)).round().astype(int)
            for part, piece in zip(parts, np.split(persons, cuts), strict=True):
                part.append(piece)
        groups = [np.concatenate(part) for part in parts]
        if min(map(len, groups)) >= least:
            return _sites(examples, groups)
    raise UsageError(
        f"In {_TRIES} draws no Dirichlet split (concentration {concentration:g}) gave each of {sites} sites the plan's "
        f"{least} persons. Raise --concentration, lower --sites, or lower [privacy] min_persons."
    )


def quantity(examples: Examples, sites: int, concentration: float, least: int, seed: int) -> dict[str, Ints]:
    """Return sites of unlike size and equal label mix: `least` persons each, the rest by a Dirichlet draw.

    Raises:
        UsageError: There are fewer than sites × least persons.
    """
    random = np.random.default_rng([seed, 4])
    spare = examples.person_count - sites * least
    if spare < 0:
        raise UsageError(
            f"{examples.person_count} persons cannot give {sites} sites the plan's {least} each. Lower --sites or "
            "[privacy] min_persons."
        )
    shares = np.cumsum(random.dirichlet([concentration] * sites))[:-1]
    cuts = least * np.arange(1, sites) + (shares * spare).round().astype(int)
    return _sites(examples, np.split(random.permutation(examples.person_count), cuts))


def _sites(examples: Examples, groups: Sequence[Ints]) -> dict[str, Ints]:
    width = len(str(len(groups)))
    return {
        f"site-{index:0{width}}": np.flatnonzero(np.isin(examples.persons, group))
        for index, group in enumerate(groups, start=1)
    }
