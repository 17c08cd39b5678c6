"""One run in the site's ledger: what its rounds cost, how far each went, and what may still be done with them.

Beside each round's spend the ledger remembers how far the round went: reserved before training, bound once there is a
vector, masked for each attempt, committed before the site helps to open the sum. A round that was reserved and never bound
is spent all the same.
"""

from pathlib import Path

from confide.client.journal import Journal
from confide.common.crypto import keyed_digest, seal_bytes
from confide.common.entries import Bind, Commit, Forfeit, Mask, Refund, Reserve
from confide.common.errors import Refused
from confide.common.ledger import BOUND, COMMITTED, RESERVED, Round
from confide.common.spend import Spend


class Spends:
    """A run's part of the site's ledger.

    Args:
        journal: The ledger.
        run: The run's name.
        plan: The plan's digest.
        data: The data set that the run trains on.
        version: The version of it whose rows are at hand; whoever loads others sets `version`.
        key: 32 bytes of the site's own, with which what was measured of a round's training is sealed; what is measured is
            not kept if it is absent.
    """

    def __init__(self, journal: Journal, *, run: str, plan: str, data: str, version: int = 1, key: bytes = b"") -> None:
        self.version = version
        self._journal = journal
        self._run = run
        self._plan = plan
        self._data = data
        self._key = key

    @property
    def checkpoint(self) -> str:
        """The newest signed checkpoint of the whole ledger, in its short form."""
        return self._journal.checkpoint().short()

    @property
    def spends(self) -> tuple[Spend, ...]:
        """What the run cost so far, in the order of rounds."""
        return self._journal.book.spends(self._run)

    @property
    def begun(self) -> int:
        """How many of the run's rounds were reserved, whatever became of them."""
        return len(self._journal.book.rounds(self._run))

    @property
    def last_attempt(self) -> tuple[int, int]:
        """The newest round and attempt that a masked vector left for, or was about to; (0, 0) if there is none."""
        masked = [
            (number, known.attempt)
            for number, known in self._journal.book.rounds(self._run).items()
            if known.attempt >= 0 and not known.seeded
        ]
        return max(masked, default=(0, 0))

    def start(self, number: int) -> str | None:
        """Return the digest of the adapter that round was trained from, or None if it was not trained."""
        known = self._round(number)
        return None if known is None else known.reserve.start

    def commitment(self, number: int) -> str | None:
        """Return the commitment to the vector of round `number`, or None if it has none."""
        known = self._round(number)
        return None if known is None else known.commitment or None

    def admit(self, number: int, *, kept: bool, roster: str) -> None:
        """Return if the site may take part in another attempt at round `number`.

        Only a seeded simulation may go through a round again that it has trained or opened: it gives the same bytes.

        Args:
            number: The round.
            kept: Whether the round's vector is at hand, so that no training is needed.
            roster: The digest of the roster that it would be summed under.

        Raises:
            Refused: A later round was begun, this one's sum was opened, it was trained and its vector is gone, it was trained
                under another plan or on another data set, whose approval is not this one's, or it was trained for a sum under
                another roster: under two rosters two sums could be opened.
        """
        rounds = self._journal.book.rounds(self._run)
        last = max(rounds, default=0)
        if number < last:
            raise Refused(f"Round {number} is offered after round {last}; rounds do not go back.", "rounds")
        known = rounds.get(number)
        if known is None or known.seeded:
            return
        if known.state == COMMITTED:
            raise Refused(f"The sum of round {number} was opened with this site's help; that happens once a round.")
        if (known.reserve.plan, known.reserve.data) != (self._plan, self._data):
            raise Refused(
                f"Round {number} of the run {self._run!r} was begun under another plan or on another data set; it ends as it was "
                "begun. Give each plan a run of its own.",
                "approval",
            )
        if known.reserve.roster != roster:
            raise Refused(f"Round {number} was begun under another roster; it ends under the one it was begun under.")
        if known.state != BOUND or not kept:
            raise Refused(f"Round {number} was begun and its vector is gone; a round is trained once.", "rounds")

    def reserve(self, spend: Spend, start: str, roster: str) -> None:
        """Return once `spend` is in the ledger, on disk; only then may the round be trained.

        A round is trained once. Only a seeded simulation may train it again, at the same cost and from the same adapter:
        its draws are the same too, so it gives the same bytes.

        Args:
            spend: What the round costs.
            start: The digest of the adapter that training starts from.
            roster: The digest of the roster that the round is summed under.

        Raises:
            Refused: The ledger does not let it in: no approval is in force, the rows are not those of the newest version, the
                budget has no room, or the round was reserved before.
            LedgerError: The ledger cannot be written; nothing may be trained.
        """
        self._journal.append(
            Reserve(
                run=self._run,
                plan=self._plan,
                data=self._data,
                version=self.version,
                round=spend.round,
                sampling_rate=spend.sampling_rate,
                noise_multiplier=spend.noise_multiplier,
                steps=spend.steps,
                clip_norm=spend.clip_norm,
                divisor=spend.divisor,
                noise=spend.noise,
                start=start,
                roster=roster,
            )
        )

    def bind(self, number: int, commitment: str) -> None:
        """Return once it is on disk that round `number` has its vector; every attempt at the round masks this one.

        Args:
            number: A round that was reserved.
            commitment: A salted digest of the vector.

        Raises:
            LedgerError: The ledger cannot be written; the vector must not be used.
        """
        self._journal.append(Bind(run=self._run, round=number, commitment=commitment))

    def mask(self, number: int, attempt: int, digest: str) -> None:
        """Return once it is on disk which masked vector leaves for an attempt; it costs nothing.

        Args:
            number: A round that was bound.
            attempt: The attempt.
            digest: Of the masked vector.

        Raises:
            LedgerError: The ledger cannot be written; the vector must not leave.
        """
        self._journal.append(Mask(run=self._run, round=number, attempt=attempt, digest=digest))

    def commit(self, number: int, evidence: bytes = b"") -> None:
        """Return once it is on disk that this site helps to open the sum of round `number`; nothing follows for the round.

        Args:
            number: A round that was bound.
            evidence: What the site measured of its training. It is exact, so it is sealed and never leaves the site; in the
                record stands a keyed digest of it.

        Raises:
            LedgerError: The ledger cannot be written; the help must not leave.
        """
        if not (evidence and self._key):
            self._journal.append(Commit(run=self._run, round=number, evidence=""))
            return
        purpose = evidence_purpose(self._run, number)
        digest = keyed_digest(self._key, purpose, evidence).hex()
        sealed = seal_bytes(evidence, self._key, purpose)
        self._journal.append(Commit(run=self._run, round=number, evidence=digest), evidence=sealed)

    def give_up(self, number: int, untouched: int, reason: str) -> None:
        """Return once it is on disk that round `number` has no vector; a round that has one, or was given up, stays as it is.

        Args:
            number: A round that was reserved.
            untouched: How many of its last steps have looked at no row, for certain; these are not counted.
            reason: Why, for the site's own people.

        Raises:
            LedgerError: The ledger cannot be written; the round counts in full.
        """
        known = self._round(number)
        if known is None or known.state != RESERVED or known.seeded:
            return
        if untouched:
            self._journal.append(Refund(run=self._run, round=number, steps=untouched))
        else:
            self._journal.append(Forfeit(run=self._run, round=number, reason=reason))

    def settle(self) -> None:
        """Return once every round that was begun and never bound is written down as lost; for a site that starts anew.

        Raises:
            LedgerError: The ledger cannot be written.
        """
        for number, known in tuple(self._journal.book.rounds(self._run).items()):
            if known.state == RESERVED:
                self.give_up(number, 0, "The agent ended before the round had its vector.")

    def export(self, path: Path) -> None:
        """Write the whole ledger to a file that anyone can verify.

        Raises:
            UsageError: The file cannot be written.
        """
        self._journal.export(path)

    def _round(self, number: int) -> Round | None:
        return self._journal.book.rounds(self._run).get(number)


def evidence_purpose(run: str, number: int) -> bytes:
    """Return what a round's sealed evidence is bound to."""
    return f"confide-evidence/1 run {run} round {number}\n".encode()
