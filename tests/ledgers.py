"""Ledgers of sites in tests: real ones, in which a plan's run is approved and has just room."""

from pathlib import Path

from confide.client.spends import Spends
from confide.common.crypto import Identity
from confide.common.plan import Plan
from confide.simulations.vaults import open_ledger, rows_of

KEY = Identity(bytes([9] * 32))


def spends_of(
    plan: Plan, run: str, path: Path | None = None, *, site: str = "north", persons: int = 30, key: Identity = KEY
) -> Spends:
    """Return the run's part of a site's ledger at `path`, or in memory, made if absent."""
    journal = open_ledger(path, site=site, identity=key, plan=plan, run=run, declared_persons=persons)
    return Spends(journal, run=run, plan=plan.digest, data=rows_of(run))
