"""What a site noted of its own ledger, against a ledger that was put in its place, and what a recovery does about it."""

from pathlib import Path

import pytest

from confide.client.home import Home
from confide.client.journal import Journal
from confide.client.keys import make_keys
from confide.client.recovery import go_on
from confide.client.seen import check_goes_on, seen_in
from confide.common.crypto import Identity
from confide.common.entries import Started
from confide.common.errors import LedgerError, Refused
from confide.common.witness import Witness
from tests.books import SITE, Clock, a_round, beginning, reserve, signed, written

FEDERATIONS = ("Heart 2030", "Lung 2031")


def noted(path: Path, *shorts: str) -> Path:
    """The file of a witness that saw St. Anna's ledger, one checkpoint in each federation."""
    witness = Witness(path)
    for federation, short in zip(FEDERATIONS, shorts, strict=False):
        witness.see(federation, "St. Anna", SITE.public, short)
    return path


def test_a_ledger_goes_on_from_all_that_was_seen_of_it(tmp_path: Path) -> None:
    early, _ = written(beginning())
    late, lines = written([*beginning(), *a_round(1)])
    path = noted(tmp_path / "witness", signed(early).short(), signed(late).short())

    check_goes_on(late, lines, seen_in(path, "St. Anna", late.ledger))


def test_a_ledger_put_back_to_before_another_federations_round_is_refused(tmp_path: Path) -> None:
    late, _ = written([*beginning(), *a_round(1)])
    early, lines = written(beginning())
    path = noted(tmp_path / "witness", signed(late).short(), signed(early).short())
    Witness(path).weigh(FEDERATIONS[1], "St. Anna", SITE.public, signed(early).short())  # there it may

    with pytest.raises(LedgerError, match=r"as St\. Anna in Heart 2030: 9 records .* An old copy"):
        check_goes_on(early, lines, seen_in(path, "St. Anna", early.ledger))


def test_a_ledger_that_was_put_back_and_has_grown_since_is_refused(tmp_path: Path) -> None:
    seen, _ = written([*beginning(), *a_round(1)])
    grown, lines = written([*beginning(), reserve(1, start="sha256:" + "e7" * 32), *a_round(2), *a_round(3)])
    path = noted(tmp_path / "witness", signed(seen).short())
    Witness(path).weigh(FEDERATIONS[0], "St. Anna", SITE.public, signed(grown).short())  # two numbers do not tell

    with pytest.raises(LedgerError, match="does not go on from what was seen"):
        check_goes_on(grown, lines, seen_in(path, "St. Anna", grown.ledger))


def test_after_a_recovery_the_sites_own_witness_lets_the_ledger_go_on(tmp_path: Path) -> None:
    home = Home.create(tmp_path / "site", "St. Anna")
    identity = make_keys(home, b"", insecure_no_passphrase=True).identity
    lines, newest = _two_starts(home, identity)
    witness = Witness(home.witness)
    for federation in FEDERATIONS:
        witness.see(federation, "St. Anna", identity.public, newest)

    journal, _ = go_on(home, lines, identity, reason="The disk failed.", by="IT")

    again = Witness(home.witness)
    shown = journal.checkpoint().short()
    for federation in FEDERATIONS:
        with pytest.raises(Refused, match="An old copy"):
            witness.weigh(federation, "St. Anna", identity.public, shown)
        again.see(federation, "St. Anna", identity.public, shown)
        assert [each.reason for each in again.forgotten(federation, "St. Anna")] == ["Recovered: The disk failed."]
    check_goes_on(journal.book, journal.lines(), seen_in(home.witness, "St. Anna", journal.book.ledger))
    journal.close()


def _two_starts(home: Home, identity: Identity) -> tuple[list[bytes], str]:
    """A ledger's first record, and the newest checkpoint that was seen of it."""
    journal = Journal.create(home.ledger, site="St. Anna", identity=identity, clock=Clock())
    lines = journal.lines()
    for process in ("ab", "cd", "ef"):
        journal.append(Started(process=process * 16, software="confide 0"))
    newest = journal.checkpoint().short()
    journal.close()
    return lines, newest
