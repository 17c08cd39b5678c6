"""A witness remembers the last checkpoint it saw of each site's ledger, and refuses one that goes back behind it.

A site that is set back to an old copy of its ledger has forgotten what it spent. The ledger alone does not show it, but
the server and the other sites can tell: each keeps a witness, and each sees every site's checkpoint when a round begins.

Neither records nor charges, which are the rounds charges and the statistics released, ever become fewer. Charges are asked
for because a ledger that was set back soon grows beyond what was seen of it by records that cost nothing, such as an
agent's starts; but it reserves no round before its checkpoint was accepted.

What stays open: a witness sees two numbers and a root, so it cannot tell whether a larger ledger continues the smaller one
it saw before. One that was set back and then charged as often as was seen of it where other witnesses look, such as in
another federation, is accepted here. That it is another one is shown by `common.merkle.verify_consistency`, or by its export.
"""

import dataclasses
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from confide.common.canonical import canonical_bytes
from confide.common.checkpoint import Checkpoint, read_short
from confide.common.disk import whole
from confide.common.errors import LedgerError, MessageError, Refused, UsageError

FORMAT = "confide-witness/1"
MOST_REASON = 200


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """That a site no longer has to continue what was seen of its ledger.

    Attributes:
        checkpoint: The last one seen.
        reason: Why, in the words of whoever said so.
    """

    checkpoint: Checkpoint
    reason: str


class Witness:
    """The last checkpoints seen, by federation and site; usable by several threads, for one process.

    Args:
        path: Where they are kept: canonical JSON, replaced whole. Nothing has been seen if there is no file yet. None
            keeps them in memory only.

    Raises:
        LedgerError: The file is damaged. It is not begun anew: whoever could damage it could then show an old ledger.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._seen: dict[tuple[str, str], _Seen] = {} if path is None else _read(path)

    def __repr__(self) -> str:
        return f"<Witness of {len(self._seen)} sites>"

    def see(self, federation: str, site: str, key: bytes, short: str) -> Checkpoint:
        """Return the checkpoint of a site's ledger once it is accepted and remembered, on disk if there is one.

        Args:
            federation: The federation's name.
            site: The site's name.
            key: The site's Ed25519 public key, 32 bytes, by the roster in force.
            short: The checkpoint as it travels; see `Checkpoint.short`.

        Raises:
            Refused: It is missing, malformed, not signed by the site, of another ledger than before, has fewer records or
                fewer charges than the last one seen, or as many records with another root or other charges;
                the rule is `ledger`.
            LedgerError: It could not be written, and is not remembered.

        Guarantee: of one ledger never two roots at one size, a smaller size or fewer charges are accepted after what
        was seen, but for what the admins had forgotten in between.
        """
        return self.see_all(federation, {site: (key, short)})[site]

    def see_all(self, federation: str, told: Mapping[str, tuple[bytes, str]]) -> dict[str, Checkpoint]:
        """Return the checkpoints of several sites, as `see` does, with one write for all.

        Args:
            federation: The federation's name.
            told: Each site's key and checkpoint, by its name.

        Raises:
            Refused: As `see`, for the first that is refused; those before it are remembered all the same.
            LedgerError: They could not be written, and none is remembered.
        """
        found: dict[str, Checkpoint] = {}
        with self._lock:
            try:
                for site, (key, short) in told.items():
                    found[site] = self._weighed(federation, site, key, short)
            finally:
                self._remember(federation, found)
        return found

    def weigh(self, federation: str, site: str, key: bytes, short: str) -> Checkpoint:
        """Return the checkpoint that `see` would accept, without remembering it; raises as that does."""
        with self._lock:
            return self._weighed(federation, site, key, short)

    def last(self, federation: str, site: str) -> Checkpoint | None:
        """Return the last checkpoint seen, which the site's ledger must continue, or None if there is none."""
        return self._seen.get((federation, site), _NOTHING).last

    def federations(self, site: str) -> tuple[str, ...]:
        """Return the names of the federations in which a site's ledger must continue something, in order."""
        return tuple(sorted(federation for (federation, name), of in self._seen.items() if name == site and of.last))

    def forgotten(self, federation: str, site: str) -> tuple[Forgotten, ...]:
        """Return what the site no longer has to continue, the first first."""
        return self._seen.get((federation, site), _NOTHING).forgotten

    def forget(self, federation: str, site: str, reason: str) -> Checkpoint:
        """Let a site that has lost its ledger begin another or go on with an older copy; return the last one seen.

        This is for the federation's admins to say, to each witness, and for nobody else: whatever the site shows next is
        accepted if the site signed it. So let the site first recover its ledger, which counts every budget as spent.

        Args:
            federation: The federation's name.
            site: The site's name.
            reason: Why, in 1 to 200 printable characters; it is kept beside that checkpoint.

        Raises:
            UsageError: Nothing was seen of this site, or the reason is no such text.
            LedgerError: It could not be written, and nothing is forgotten.
        """
        if not (reason.strip() and len(reason) <= MOST_REASON and reason.isprintable()):
            raise UsageError(
                f"A reason of {len(reason)} characters was given; it must have 1 to {MOST_REASON} printable ones. Say in "
                "a sentence how the ledger was lost and who agreed."
            )
        with self._lock:
            seen = self._seen.get((federation, site), _NOTHING)
            if seen.last is None:
                raise UsageError(
                    f"This witness holds no ledger that site {site} of {federation} must continue, so there is none to "
                    "forget. Check both names."
                )
            forgotten = (*seen.forgotten, Forgotten(checkpoint=seen.last, reason=reason))
            self._write({(federation, site): _Seen(last=None, forgotten=forgotten)})
            return seen.last

    def _weighed(self, federation: str, site: str, key: bytes, short: str) -> Checkpoint:
        whose = f"site {site} of {federation}"
        if not short:
            raise _refused(f"The ledger of {whose} was shown by no checkpoint. A site without a ledger takes no part.")
        try:
            checkpoint = read_short(short)
            checkpoint.verify(key)
        except MessageError as error:
            raise _refused(f"The checkpoint of {whose} cannot be trusted. {error}") from None
        last = self._seen.get((federation, site), _NOTHING).last
        if last and checkpoint.ledger != last.ledger:
            raise _refused(
                f"The checkpoint of {whose} is of the ledger {checkpoint.ledger}; the one seen before is {last.ledger}. If "
                "that one was lost, the federation's admins must say so to each witness."
            )
        if last and checkpoint.size < last.size:
            raise _refused(
                f"The ledger of {whose} has {checkpoint.size} records; it had {last.size} when it was last seen. An old copy "
                "was put in its place: put the newest back. If it is lost, recover the ledger, and the admins must say so."
            )
        if last and checkpoint.size == last.size and checkpoint.root != last.root:
            raise _refused(
                f"The ledger of {whose} has {last.size} records with the root {checkpoint.root.hex()}; with as many it had "
                f"the root {last.root.hex()} before. There are two of it: find out which one counted every spend."
            )
        if last and checkpoint.size == last.size and checkpoint.charges != last.charges:
            raise _refused(
                f"The ledger of {whose} has {last.size} records, of which {checkpoint.charges} charge an account; of as many it "
                f"were {last.charges} before. There are two of it: find out which one counted every spend."
            )
        if last and checkpoint.charges < last.charges:
            raise _refused(
                f"The ledger of {whose} has {checkpoint.charges} charges; it had {last.charges} when it was last seen. "
                "An old copy was put in its place and has grown since: put the newest back. If it is lost, recover the ledger, "
                "and the admins must say so."
            )
        return checkpoint

    def _remember(self, federation: str, found: Mapping[str, Checkpoint]) -> None:
        news: dict[tuple[str, str], _Seen] = {}
        for site, checkpoint in found.items():
            seen = self._seen.get((federation, site), _NOTHING)
            if seen.last is None or seen.last.size < checkpoint.size:
                news[federation, site] = _Seen(last=checkpoint, forgotten=seen.forgotten)
        if news:
            self._write(news)

    def _write(self, news: "Mapping[tuple[str, str], _Seen]") -> None:
        """Put the news on disk, and only then into memory, so that nothing is accepted that a restart would forget."""
        seen = {**self._seen, **news}
        if self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with whole(self._path) as draft:
                    draft.write_bytes(_spelled(seen))
            except OSError as error:
                raise LedgerError(
                    f"The witness file {self._path} cannot be written: {error.strerror}. Nothing is accepted that it does "
                    "not remember: make room or mend the permissions."
                ) from error
        self._seen = seen


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What was seen of one site.

    Attributes:
        last: The last checkpoint, which its ledger must continue; None if that was forgotten.
        forgotten: Those it need not continue.
    """

    last: Checkpoint | None
    forgotten: tuple[Forgotten, ...]


_NOTHING = _Seen(last=None, forgotten=())


def _refused(message: str) -> Refused:
    return Refused(message, rule="ledger")


def _spelled(seen: Mapping[tuple[str, str], _Seen]) -> bytes:
    tree: dict[str, dict[str, object]] = {}
    for (federation, site), of in seen.items():
        tree.setdefault(federation, {})[site] = {
            "last": of.last.short() if of.last else "",
            "forgotten": [{"checkpoint": each.checkpoint.short(), "reason": each.reason} for each in of.forgotten],
        }
    return canonical_bytes({"format": FORMAT, "seen": tree})


def _read(path: Path) -> dict[tuple[str, str], _Seen]:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise LedgerError(f"The witness file {path} cannot be read: {error.strerror}. Mend its permissions.") from error
    try:
        seen = _parsed(raw)
        one_spelling = _spelled(seen) == raw
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, MessageError):
        one_spelling = False
    if not one_spelling:
        raise LedgerError(
            f"The witness file {path}, {len(raw)} bytes, is damaged or not in the one spelling of {FORMAT}. Put back its "
            "newest copy. It is not begun anew: then any old ledger could be shown."
        )
    return seen


def _parsed(raw: bytes) -> dict[tuple[str, str], _Seen]:
    tree: Any = json.loads(raw)
    return {
        (federation, site): _of(fields) for federation, sites in tree["seen"].items() for site, fields in sites.items()
    }


def _of(fields: Any) -> _Seen:  # noqa: ANN401  of the form that is checked
    forgotten = tuple(
        Forgotten(checkpoint=read_short(each["checkpoint"]), reason=str(each["reason"])) for each in fields["forgotten"]
    )
    if not (fields["last"] or forgotten):
        raise ValueError
    return _Seen(last=read_short(fields["last"]) if fields["last"] else None, forgotten=forgotten)
