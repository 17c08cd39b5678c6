"""A site's record of what its training cost: append-only, written to disk before the first private gradient."""

import dataclasses
import json
from pathlib import Path

from confide.common.accounting import Spend
from confide.common.canonical import canonical_bytes
from confide.common.disk import append
from confide.common.errors import PrivacyError, Refused

FORMAT = "confide-spend/1"
SEEDED = "insecure_seeded_noise"  # the one kind of draws that can be repeated


class SpendLog:
    """Spends of one site in one run, at most one per round, each bound to the adapter that training started from.

    Args:
        path: The file of canonical JSON lines; created if absent. None keeps the record in memory only.

    Raises:
        PrivacyError: The file is damaged.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._reserved: dict[int, tuple[Spend, str]] = {}
        self._broken = False
        if path is not None and path.exists():
            # A line that a crash cut short has no line break; were it taken, the next one would be written into it.
            for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
                spend, start = _read(line, path, number)
                if spend.round in self._reserved:
                    raise _damaged(path, number)
                self._reserved[spend.round] = (spend, start)

    @property
    def spends(self) -> tuple[Spend, ...]:
        """All spends, in the order of rounds."""
        return tuple(self._reserved[number][0] for number in sorted(self._reserved))

    def reserve(self, spend: Spend, start: str) -> None:
        """Return once `spend` is on disk; only then may the round be trained.

        A round is trained once. Only a seeded simulation may train it again, at the same cost and from the same adapter:
        its draws are the same too, so it gives the same bytes.

        Args:
            spend: What the round costs.
            start: The digest of the adapter that training starts from.

        Raises:
            Refused: The round was reserved before, or a later one was.
            PrivacyError: The record cannot be written; nothing may be trained.
        """
        known = self._reserved.get(spend.round)
        if known == (spend, start) and spend.noise == SEEDED:
            return
        if known is not None:
            raise Refused(f"Round {spend.round} was reserved before; a round is trained once, from one adapter.")
        if spend.round < max(self._reserved, default=0):
            raise Refused(f"Round {spend.round} is offered after round {max(self._reserved)}; rounds do not go back.")
        if self._broken:
            raise PrivacyError(f"An earlier write to {self._path} failed. Mend the disk and start the site anew.")
        if self._path is not None:
            try:
                append(self._path, _line(spend, start))
            except OSError as error:
                self._broken = True
                raise PrivacyError(
                    f"Cannot write the spend record {self._path}: {error.strerror or error}. Nothing was trained."
                ) from None
        self._reserved[spend.round] = (spend, start)


def _line(spend: Spend, start: str) -> bytes:
    return canonical_bytes({"format": FORMAT, "start": start, **dataclasses.asdict(spend)}) + b"\n"


def _read(line: bytes, path: Path, number: int) -> tuple[Spend, str]:
    try:
        fields = json.loads(line)
        if fields.pop("format") != FORMAT:
            raise ValueError
        start = fields.pop("start")
        spend = Spend(**fields)
        if _line(spend, start) != line:
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, PrivacyError):
        raise _damaged(path, number) from None
    return spend, start


def _damaged(path: Path, number: int) -> PrivacyError:
    return PrivacyError(
        f"Line {number} of the spend record {path} is damaged. Restore the file from a copy; without it what was "
        "spent is not known."
    )
