"""A site's record of what its training cost: append-only, written to disk before the first private gradient."""

import dataclasses
import json
from pathlib import Path

from confide.common.accounting import Spend
from confide.common.canonical import canonical_bytes
from confide.common.disk import append
from confide.common.errors import PrivacyError

FORMAT = "confide-spend/1"


class SpendLog:
    """Spends of one site in one run, at most one per round.

    Args:
        path: The file of canonical JSON lines; created if absent. None keeps the record in memory only.

    Raises:
        PrivacyError: The file is damaged.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._spends: dict[int, Spend] = {}
        if path is not None and path.exists():
            # A line that a crash cut short has no line break; were it taken, the next one would be written into it.
            for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
                spend = _read(line, path, number)
                if spend.round in self._spends:
                    raise _damaged(path, number)
                self._spends[spend.round] = spend

    @property
    def spends(self) -> tuple[Spend, ...]:
        """All spends, in the order of rounds."""
        return tuple(self._spends[number] for number in sorted(self._spends))

    def reserve(self, spend: Spend) -> None:
        """Return once `spend` is on disk. Reserving the same spend for its round again costs nothing.

        Raises:
            PrivacyError: Another spend is recorded for that round.
        """
        known = self._spends.get(spend.round)
        if known == spend:
            return
        if known is not None:
            raise PrivacyError(
                f"Round {spend.round} is already recorded with another cost; it cannot be trained again."
            )
        if self._path is not None:
            append(self._path, _line(spend))
        self._spends[spend.round] = spend


def _line(spend: Spend) -> bytes:
    return canonical_bytes({"format": FORMAT, **dataclasses.asdict(spend)}) + b"\n"


def _read(line: bytes, path: Path, number: int) -> Spend:
    try:
        fields = json.loads(line)
        if fields.pop("format") != FORMAT:
            raise ValueError
        spend = Spend(**fields)
        if _line(spend) != line:
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, PrivacyError):
        raise _damaged(path, number) from None
    return spend


def _damaged(path: Path, number: int) -> PrivacyError:
    return PrivacyError(
        f"Line {number} of the spend record {path} is damaged. Restore the file from a copy; without it what was "
        "spent is not known."
    )
