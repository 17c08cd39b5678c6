"""The sites of a simulated run: one table split as the setting says, and the held-out rows beside it."""

import dataclasses
from collections.abc import Mapping

from confide.client.data import Reading
from confide.common.errors import DataError, UsageError
from confide.common.examples import Examples, Ints
from confide.common.plan import IMAGE_CLASSES, TEXT_CLASSES, Plan
from confide.common.roster import SITE_NAME
from confide.simulations import partition
from confide.simulations.setting import SPLITS, Setting
from confide.simulations.shelf import Shelf


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """Who takes part, and what all are judged by.

    Attributes:
        sites: Each site's rows, by name.
        test: The held-out rows.
        skipped: How many rows were left out, by reason.
    """

    sites: Mapping[str, Examples]
    test: Examples
    skipped: Mapping[str, int]


def read_cohort(setting: Setting, plan: Plan, shelf: Shelf) -> Cohort:
    """Read the setting's tables and split them.

    Raises:
        DataError: A table does not fit the plan, or a site has fewer persons than the plan asks for.
        UsageError: The split cannot be made, or gives a number of sites that the plan does not allow.
    """
    column = setting.column if setting.split == "column" else None
    reading = shelf.reading(setting.data, setting.model, plan, column)
    skipped = dict(reading.skipped)
    if setting.test is None:
        rows, test_rows = partition.held_out(reading.examples, setting.test_share, setting.seed)
        test = reading.examples.subset(test_rows)
    else:
        held_out = shelf.reading(setting.test, setting.model, plan)
        skipped |= {f"{reason} (test)": count for reason, count in held_out.skipped.items()}
        rows, test = None, held_out.examples
    sites = _split(reading, rows, setting, plan)
    _check(sites, plan)
    return Cohort(sites=sites, test=test, skipped=skipped)


def _split(reading: Reading, rows: Ints | None, setting: Setting, plan: Plan) -> dict[str, Examples]:
    """Share out the given rows, or all of them."""
    examples = reading.examples if rows is None else reading.examples.subset(rows)
    least, seed = plan.privacy.min_persons, setting.seed
    match setting.split:
        case "column":
            if reading.column is None:
                raise UsageError("--split column needs --column NAME: the column that names each row's site.")
            values = reading.column if rows is None else tuple(reading.column[row] for row in rows)
            parts = partition.by_column(values)
        case "iid":
            parts = partition.iid(examples, setting.sites, seed)
        case "dirichlet" if plan.task.kind not in {TEXT_CLASSES, IMAGE_CLASSES}:
            raise UsageError(f"--split dirichlet needs one label for each row, and {plan.task.kind} has none. Use iid.")
        case "dirichlet":
            parts = partition.dirichlet(examples, setting.sites, setting.concentration, least, seed)
        case "quantity":
            parts = partition.quantity(examples, setting.sites, setting.concentration, least, seed)
        case unknown:
            raise UsageError(f"There is no split {unknown!r}. Known are {', '.join(SPLITS)}.")
    return {site: examples.subset(part) for site, part in parts.items()}


def _check(sites: Mapping[str, Examples], plan: Plan) -> None:
    federation, least = plan.federation, plan.privacy.min_persons
    if not federation.min_sites <= len(sites) <= federation.max_sites:
        raise UsageError(
            f"The table was split into {len(sites)} sites; the plan allows {federation.min_sites} to "
            f"{federation.max_sites}. Change --sites or --column, or [federation] min_sites and max_sites."
        )
    if any(not SITE_NAME.fullmatch(site) for site in sites):
        raise UsageError(
            "The column that names the sites holds a value that cannot be a name: 1 to 63 letters, digits, spaces and "
            "any of . _ - are allowed, beginning and ending with a letter or digit. Rename the sites."
        )
    if len({site.lower() for site in sites}) < len(sites):
        raise UsageError("Two sites' names differ in upper and lower case only. Rename one of them.")
    for site, examples in sites.items():
        if examples.person_count < least:
            raise DataError(
                f"Site {site} has {examples.person_count} persons; the plan asks for at least {least}. Lower [privacy] "
                "min_persons, make fewer sites, or give the site more data."
            )
