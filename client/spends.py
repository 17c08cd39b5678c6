"""A site's record of what its training cost: append-only, written to disk before the first private gradient.

Beside each round's spend it remembers how far the round went: reserved before training, bound once there is a vector,
opened before the site helps to open the sum. A round that was reserved and never bound is spent all the same.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from confide.common.canonical import canonical_bytes
from confide.common.disk import append, whole
from confide.common.errors import PrivacyError, Refused
from confide.common.spend import Spend

FORMAT = "confide-spend/1"
SEEDED = "insecure_seeded_noise"  # the one kind of draws that can be repeated
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError, PrivacyError)


@dataclasses.dataclass(slots=True)
class _Round:
    spend: Spend
    start: str
    roster: str
    bound: str | None = None  # the commitment to its vector
    opened: bool = False


class SpendLog:
    """Spends of one site in one run, at most one per round, each bound to the adapter that training started from.

    Args:
        path: The file of canonical JSON lines; created if absent. None keeps the record in memory only.

    Raises:
        PrivacyError: The file is damaged.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._rounds: dict[int, _Round] = {}
        self._broken = False
        if path is not None and path.exists():
            self._read(path)

    @property
    def spends(self) -> tuple[Spend, ...]:
        """All spends, in the order of rounds."""
        return tuple(self._rounds[number].spend for number in sorted(self._rounds))

    def start(self, number: int) -> str | None:
        """Return the digest of the adapter that round was trained from, or None if it was not trained."""
        return self._rounds[number].start if number in self._rounds else None

    def commitment(self, number: int) -> str | None:
        """Return the commitment to the vector of round `number`, or None if it has none."""
        return self._rounds[number].bound if number in self._rounds else None

    def admit(self, number: int, *, kept: bool, roster: str = "") -> None:
        """Return if the site may take part in another attempt at round `number`.

        Only a seeded simulation may go through a round again that it has trained or opened: it gives the same bytes.

        Args:
            number: The round.
            kept: Whether the round's vector is at hand, so that no training is needed.
            roster: The digest of the roster that it would be summed under.

        Raises:
            Refused: A later round was begun, this one's sum was opened, it was trained and its vector is gone, or it was
                trained for a sum under another roster: under two rosters two sums could be opened.
        """
        known = self._rounds.get(number)
        self._check_order(number)
        if known is None or known.spend.noise == SEEDED:
            return
        if known.opened:
            raise Refused(f"The sum of round {number} was opened with this site's help; that happens once a round.")
        if known.roster != roster:
            raise Refused(f"Round {number} was begun under another roster; it ends under the one it was begun under.")
        if known.bound is None or not kept:
            raise Refused(f"Round {number} was begun and its vector is gone; a round is trained once.")

    def reserve(self, spend: Spend, start: str, roster: str = "") -> None:
        """Return once `spend` is on disk; only then may the round be trained.

        A round is trained once. Only a seeded simulation may train it again, at the same cost and from the same adapter:
        its draws are the same too, so it gives the same bytes.

        Args:
            spend: What the round costs.
            start: The digest of the adapter that training starts from.
            roster: The digest of the roster that the round is summed under.

        Raises:
            Refused: The round was reserved before, or a later one was.
            PrivacyError: The record cannot be written; nothing may be trained.
        """
        known = self._rounds.get(spend.round)
        if known is not None and (known.spend, known.start) == (spend, start) and spend.noise == SEEDED:
            return
        if known is not None:
            raise Refused(f"Round {spend.round} was reserved before; a round is trained once, from one adapter.")
        self._check_order(spend.round)
        self._write("reserve", "Nothing was trained.", start=start, roster=roster, **dataclasses.asdict(spend))
        self._rounds[spend.round] = _Round(spend, start, roster)

    def bind(self, number: int, commitment: str) -> None:
        """Return once it is on disk that round `number` has its vector; every attempt at the round masks this one.

        Args:
            number: A round that was reserved.
            commitment: A salted digest of the vector.

        Raises:
            PrivacyError: The record cannot be written; the vector must not be used.
        """
        self._write("bind", "The round's vector is not used.", round=number, commitment=commitment)
        self._rounds[number].bound = commitment

    def open(self, number: int) -> None:
        """Return once it is on disk that this site helps to open the sum of round `number`.

        Args:
            number: A round that was reserved.

        Raises:
            PrivacyError: The record cannot be written; the help must not leave.
        """
        self._write("open", "The sum is not opened with this site's help.", round=number)
        self._rounds[number].opened = True

    def _check_order(self, number: int) -> None:
        if number < max(self._rounds, default=0):
            raise Refused(f"Round {number} is offered after round {max(self._rounds)}; rounds do not go back.")

    def _read(self, path: Path) -> None:
        lines = path.read_bytes().splitlines(keepends=True)
        torn = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        for number, line in enumerate(lines, start=1):
            try:
                self._replay(line)
            except _UNREADABLE:
                raise PrivacyError(
                    f"Line {number} of the spend record {path} is damaged, so what was spent is not known. The site must "
                    "leave this run. An older copy of the file would let it train and open rounds a second time."
                ) from None
        if torn:
            # A crash cut it short. What it announces had not begun, for that waits until the line is on disk; yet a line
            # that lacks nothing but its end is kept, since to count too much is safe.
            try:
                self._replay(torn + b"\n")
                lines.append(torn + b"\n")
            except _UNREADABLE:
                pass
            with whole(path) as draft:
                draft.write_bytes(b"".join(lines))

    def _write(self, event: str, consequence: str, **fields: object) -> None:
        if self._path is None:
            return
        if self._broken:
            raise PrivacyError(
                f"An earlier write to {self._path} failed. Mend the disk and start the site anew. {consequence}"
            )
        try:
            append(self._path, _line({"event": event, **fields}))
        except OSError as error:
            self._broken = True
            raise PrivacyError(
                f"Cannot write the spend record {self._path}: {error.strerror or error}. {consequence}"
            ) from None

    def _replay(self, line: bytes) -> None:
        """Take in one line of the file."""
        fields: dict[str, Any] = json.loads(line)
        if fields.pop("format") != FORMAT or _line(fields) != line:
            raise ValueError
        match fields.pop("event"):
            case "reserve":
                start, roster = fields.pop("start"), fields.pop("roster")
                spend = Spend(**fields)
                if spend.round in self._rounds:
                    raise ValueError
                self._rounds[spend.round] = _Round(spend, start, roster)
            case "bind":
                known, commitment = self._rounds[_number(fields)], fields.pop("commitment")
                known.bound = commitment
                if fields or not isinstance(commitment, str):
                    raise ValueError
            case "open":
                self._rounds[_number(fields)].opened = True
                if fields:
                    raise ValueError
            case _:
                raise ValueError


def _line(fields: Mapping[str, object]) -> bytes:
    return canonical_bytes({"format": FORMAT, **fields}) + b"\n"


def _number(fields: dict[str, Any]) -> int:
    """Take the round out of a line's fields."""
    number = fields.pop("round")
    if type(number) is not int:  # true is 1 to a dict
        raise ValueError
    return number
