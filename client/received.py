"""Signed plans at a site: found by file or by run, verified against the pinned coordinators, and kept.

A plan that was read is copied to the site's directory, so that later commands may name its run. Copies are never
replaced: another plan for the same run is kept beside the first. What is done with a plan is said by its digest, in the
ledger.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from confide.client.enrolment import current, federations
from confide.client.home import Home, read_private, write_private
from confide.common.errors import ConfideError, MessageError, PlanError, Refused, UsageError
from confide.common.plan import Plan, read_plan
from confide.common.roster import SITE_NAME, Roster
from confide.common.signed_plan import LARGEST_SIGNED_PLAN_BYTES, SignedPlan, read_signed_plan

_SUFFIX: Final = ".plan"
_DIGITS: Final = slice(7, 23)  # of a digest, in a copy's name


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A plan that a coordinator whom this site knows signed.

    Attributes:
        signed: The plan.
        raw: Its bytes, as they were signed.
        roster: The roster in force of its federation.
    """

    signed: SignedPlan
    raw: bytes
    roster: Roster


def receive(home: Home, file_or_run: str) -> Received:
    """Return the signed plan in a file, or the one that is kept for a run, once its signature is verified.

    Args:
        home: The site's directory.
        file_or_run: A path, or the name of a run whose plan was kept.

    Raises:
        UsageError: There is neither such a file nor a plan kept for such a run, or several are kept for it, or the site
            belongs to no federation.
        Refused: No coordinator of this site's federations signed it, or the site is not on their rosters with its key.
        MessageError: It is not a signed plan.
        PlanError: It was signed, and is no valid plan here.
    """
    path = _found(home, file_or_run)
    raw = _read(path)
    if not raw.startswith(b"confide-signed-plan/"):
        raise MessageError(
            f"{path} is not a signed plan. If it is a plan's TOML, ask the federation's coordinator for the signed file: only "
            "what is signed may run. To read it, use: confide plan explain"
        )
    known = federations(home)
    if not known:
        raise UsageError(
            f"The site {home.site} belongs to no federation, so no coordinator's signature can be checked. Join first: "
            "confide site join"
        )
    faults = []
    for federation in known:
        try:
            roster = current(home, federation)
            return Received(
                signed=read_signed_plan(raw, roster.coordinator, federation=federation), raw=raw, roster=roster
            )
        except PlanError:
            raise
        except ConfideError as error:
            faults.append(f"{federation}: {error}")
    raise Refused(
        "\n".join(
            [f"The signature of {path} was verified for none of the federations that {home.site} belongs to.", *faults]
        ),
        rule="federation",
    )


def keep(home: Home, received: Received) -> Path:
    """Return where the site has its copy of the plan, which is made if it is not there.

    Raises:
        UsageError: It cannot be written, or the file of that name holds something else.
    """
    signed = received.signed
    path = home.plans / f"{signed.run}.{signed.digest[_DIGITS]}{_SUFFIX}"
    with contextlib.suppress(FileExistsError):
        write_private(path, received.raw)
        return path
    kept = read_private(path, LARGEST_SIGNED_PLAN_BYTES)
    if kept != received.raw and _plan_in(kept).digest != signed.digest:
        raise UsageError(f"{path} holds another plan than its name says. Move it away, and try again.")
    return path


def kept_plan(home: Home, digest: str) -> Plan | None:
    """Return the plan of that digest of which there is a copy, or None. Who signed it was checked when it was kept."""
    for path in home.plans.glob(f"*.{digest[_DIGITS]}{_SUFFIX}"):
        with contextlib.suppress(ConfideError):
            plan = _plan_in(read_private(path, LARGEST_SIGNED_PLAN_BYTES))
            if plan.digest == digest:
                return plan
    return None


def kept_runs(home: Home) -> tuple[str, ...]:
    """Return the names of all runs that a plan is kept for."""
    return tuple(sorted({run for run, _ in _kept(home)}))


def _found(home: Home, file_or_run: str) -> Path:
    path = Path(file_or_run)
    if path.is_file():
        return path
    copies = [copy for run, copy in _kept(home) if run == file_or_run]
    if len(copies) > 1:
        raise UsageError(
            f"Several plans are kept for the run {file_or_run!r}: {', '.join(map(str, sorted(copies)))}. Name the file you mean."
        )
    if not copies:
        runs = ", ".join(kept_runs(home)) or "none yet; read a plan first: confide site plan show"
        raise UsageError(
            f"There is no file {file_or_run}, and no plan is kept for a run of that name. Kept are: {runs}."
        )
    return copies[0]


def _kept(home: Home) -> Iterator[tuple[str, Path]]:
    for path in home.plans.glob(f"*{_SUFFIX}"):
        run = path.name.removesuffix(_SUFFIX).rpartition(".")[0]
        if SITE_NAME.fullmatch(run):
            yield run, path


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(LARGEST_SIGNED_PLAN_BYTES + 1)
    except OSError as error:
        raise UsageError(f"Cannot read the plan {path}: {error.strerror or error}.") from None


def _plan_in(raw: bytes) -> Plan:
    """Return the plan in a copy; it stands after two lines."""
    return read_plan(raw.split(b"\n", 2)[-1])
