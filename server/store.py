"""A run on disk: adapters by their digest, one record per round, and from them the way back after a stop.

    RUN/plan.toml                      the plan as it was given
    RUN/adapters/HEX.safetensors       each version of the adapter, named by its digest
    RUN/moments/0007-NAME.safetensors  the server optimizer's memory after the last round, if it has any
    RUN/rounds/0007.json               one record per round; a round counts once its record is here
    RUN/attempts.json                  the attempt begun last; a server started anew never repeats its number

Every file is written whole or not at all, the record last.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from confide.common.adapter import Floats, Layout, load_vector, save_vector
from confide.common.canonical import canonical_bytes
from confide.common.disk import READABLE, whole
from confide.common.errors import AdapterError, RunError
from confide.common.messages import vector_digest
from confide.server.aggregate import ServerState

FORMAT = "confide-round/1"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RoundRecord:
    """What a round did: the manifest of the adapter version it made.

    Attributes:
        round: From 1.
        attempts: How often the sum was tried since the server was last started.
        parent: Digest of the adapter before.
        adapter: Digest of the adapter after; the parent's if the round was void.
        moments: Digests of the server optimizer's memory after, by name.
        present: Sites in the sum, sorted; none if the round was void.
        missing: In which exchange and why each other site was lost, as `exchange: reason`, the reason a class of error,
            `no answer` or `wrong shares`. A site lost after `contribute` is in the sum and is named here as well.
        void: Why there is no sum; empty if there is one.
        summation: How the sum came about, such as `secure_aggregation` or `insecure_plain_sum`.
        bounded: The share of sites whose update was longer than the ring encodes and was scaled down, or cut.
        saturated: The share of entries that were cut, over all sites; 16-bit rings only.
        bytes_up: Bytes that the site which sent most sent, over all attempts.
        bytes_down: Bytes that the site which was sent most was sent, over all attempts.
        seconds: How long the round took.
    """

    round: int
    attempts: int
    parent: str
    adapter: str
    moments: Mapping[str, str]
    present: tuple[str, ...]
    missing: Mapping[str, str]
    void: str
    summation: str
    bounded: float
    saturated: float
    bytes_up: int
    bytes_down: int
    seconds: float


class Store:
    """One run's directory.

    Args:
        root: The directory; created if absent.

    Raises:
        RunError: A record in it is damaged or missing.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("adapters", "moments", "rounds"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        self.records: list[RoundRecord] = []
        self.refresh()

    def begin_attempt(self, number: int) -> int:
        """Return the number of a new attempt at round `number`, from 1, once it is on disk.

        Raises:
            RunError: The file of the last attempt is damaged.
        """
        path = self.root / "attempts.json"
        try:
            last = json.loads(path.read_bytes()) if path.exists() else {"round": number, "attempt": 0}
            attempt = last["attempt"] + 1 if last["round"] == number else 1
            if type(attempt) is not int:
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise RunError(f"{path} is damaged. Remove it; sites may then refuse one round.") from None
        with whole(path, READABLE) as draft:
            draft.write_bytes(canonical_bytes({"round": number, "attempt": attempt}))
        return attempt

    def refresh(self) -> list[RoundRecord]:
        """Read the records that another process added since, and return them."""
        fresh = []
        while (path := self._record(len(self.records) + 1)).exists():
            record = _read_record(path, len(self.records) + 1)
            if self.records and record.parent != self.records[-1].adapter:
                raise RunError(f"The record {path} does not follow the one before it. Restore the missing file.")
            fresh.append(record)
            self.records.append(record)
        names = [path.stem for path in (self.root / "rounds").glob("*.json")]
        later = [name for name in names if name.isdecimal() and int(name) > len(self.records) + 1]
        if later and not self._record(len(self.records) + 1).exists():
            raise RunError(
                f"{self.root} holds round {min(later)} but not the record before it. Restore the missing file, or begin anew "
                "in another directory."
            )
        return fresh

    def latest(self, layout: Layout) -> ServerState | None:
        """Return the state after the last recorded round, or None before the first.

        Raises:
            RunError: The adapter or the optimizer's memory is missing or altered.
        """
        if not self.records:
            return None
        last = self.records[-1]
        moments = {
            name: self._load(self._moment(last.round, name), digest, layout) for name, digest in last.moments.items()
        }
        return ServerState(adapter=self.adapter(last.adapter, layout), moments=moments)

    def adapter(self, digest: str, layout: Layout) -> Floats:
        """Return the adapter with this digest.

        Raises:
            RunError: It is missing or altered.
        """
        return self._load(self._adapter(digest), digest, layout)

    def commit(self, state: ServerState, record: RoundRecord, layout: Layout) -> None:
        """Return once the round is on disk, the record last."""
        number = record.round
        if not self._adapter(record.adapter).exists():
            with whole(self._adapter(record.adapter), READABLE) as path:
                save_vector(path, state.adapter, layout)
        for name, moment in state.moments.items():
            with whole(self._moment(number, name), READABLE) as path:
                save_vector(path, moment, layout)
        with whole(self._record(number), READABLE) as path:
            path.write_bytes(_spelled(record))
        self.records.append(record)
        for stale in (self.root / "moments").glob(f"{number - 1:04}-*.safetensors"):
            stale.unlink()

    def _load(self, path: Path, digest: str, layout: Layout) -> Floats:
        try:
            vector = load_vector(path, layout)
        except AdapterError as error:
            raise RunError(f"The run in {self.root} cannot go on: {error}") from None
        if vector_digest(vector) != digest:
            raise RunError(f"{path} is not what the run's records say. Restore it, or begin anew elsewhere.")
        return vector

    def _record(self, number: int) -> Path:
        return self.root / "rounds" / f"{number:04}.json"

    def _moment(self, number: int, name: str) -> Path:
        return self.root / "moments" / f"{number:04}-{name}.safetensors"

    def _adapter(self, digest: str) -> Path:
        return self.root / "adapters" / f"{digest.removeprefix('sha256:')}.safetensors"


def _read_record(path: Path, number: int) -> RoundRecord:
    try:
        raw = path.read_bytes()
        fields = json.loads(raw)
        if fields.pop("format") != FORMAT or fields["round"] != number:
            raise ValueError
        record = RoundRecord(**{**fields, "present": tuple(fields["present"])})
        if _spelled(record) != raw or any(type(fields[name]) is not kind for name, kind in _KINDS.items()):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise RunError(
            f"The record {path} is damaged. Restore it, or remove it and all later ones to repeat those rounds."
        ) from None
    return record


_KINDS = {
    "round": int,
    "attempts": int,
    "parent": str,
    "adapter": str,
    "moments": dict,
    "present": list,
    "missing": dict,
    "void": str,
    "summation": str,
    "bounded": float,
    "saturated": float,
    "bytes_up": int,
    "bytes_down": int,
    "seconds": float,
}


def _spelled(record: RoundRecord) -> bytes:
    return canonical_bytes({"format": FORMAT, **dataclasses.asdict(record)}) + b"\n"
