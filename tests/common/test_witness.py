"""The witness: what it refuses, what it remembers over a restart, and what becomes of its file."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies

from confide.common.canonical import canonical_bytes
from confide.common.checkpoint import SHORT_CHARACTERS, Checkpoint
from confide.common.crypto import Identity
from confide.common.errors import LedgerError, Refused, UsageError
from confide.common.witness import FORMAT, Forgotten, Witness

ANNA, NORTH = Identity(b"a" * 32), Identity(b"n" * 32)
ONE, OTHER = "01" * 16, "02" * 16
HEART = "Heart 2030"


def short(size: int, root: int = 0, ledger: str = ONE, identity: Identity = ANNA, charges: int = 0) -> str:
    return Checkpoint.sign(ledger, size, bytes([root]) * 32, charges, identity).short()


def shown(witness: Witness, size: int, root: int = 0, ledger: str = ONE, charges: int = 0) -> Checkpoint:
    return witness.see(HEART, "anna", ANNA.public, short(size, root, ledger, charges=charges))


def refuses(witness: Witness, text: str, message: str, key: bytes = ANNA.public, site: str = "anna") -> None:
    with pytest.raises(Refused, match=message) as caught:
        witness.see(HEART, site, key, text)
    assert caught.value.rule == "ledger"
    with pytest.raises(Refused, match=message):
        witness.weigh(HEART, site, key, text)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "federation" / "witness.json"


def test_a_ledger_that_grows_or_stands_still_is_accepted(path: Path) -> None:
    witness = Witness(path)

    for size, root in ((0, 0), (5, 1), (5, 1), (6, 2), (2**53 - 1, 3)):
        assert shown(witness, size, root) == witness.last(HEART, "anna")

    assert witness.last(HEART, "nobody") is None
    assert repr(witness) == "<Witness of 1 sites>"


def test_what_was_seen_is_refused_when_it_goes_back_and_a_restart_does_not_forget_it(path: Path) -> None:
    shown(Witness(path), 5, 1)

    for witness in (Witness(path), Witness(path)):
        refuses(witness, short(4, 1), "has 4 records; it had 5 when it was last seen")
        refuses(witness, short(0), "An old copy was put in its place")
        refuses(witness, short(5, 2), "There are two of it")
        refuses(witness, short(6, 1, OTHER), f"is of the ledger {OTHER}; the one seen before is {ONE}")
        assert witness.last(HEART, "anna") == Checkpoint.sign(ONE, 5, b"\x01" * 32, 0, ANNA)


def test_a_ledger_that_has_grown_and_forgotten_a_round_is_refused_and_a_restart_does_not_forget_it(path: Path) -> None:
    shown(Witness(path), 9, 1, charges=3)

    for witness in (Witness(path), Witness(path)):
        for size in (10, 11, 2**53 - 1):
            refuses(witness, short(size, 2, charges=2), "has 2 charges; it had 3 when it was last seen")
        refuses(witness, short(9, 1, charges=2), "of which 2 charge an account; of as many it were 3 before")
        refuses(witness, short(9, 1, charges=4), "of which 4 charge an account; of as many it were 3 before")
        refuses(witness, short(8, 1, charges=4), "has 8 records; it had 9")

    for size, charges in ((9, 3), (10, 3), (12, 3), (16, 4)):
        root = 1 if size == 9 else 2
        assert shown(Witness(path), size, root, charges=charges) == Witness(path).last(HEART, "anna")


def test_a_missing_malformed_or_badly_signed_checkpoint_is_refused() -> None:
    witness = Witness()

    refuses(witness, "", "takes no part")
    refuses(witness, "x", "cannot be trusted")
    refuses(witness, "A" * SHORT_CHARACTERS, "cannot be trusted")
    refuses(witness, short(5, identity=NORTH), "cannot be trusted")
    refuses(witness, short(5), "cannot be trusted", key=NORTH.public)
    refuses(witness, short(5), "cannot be trusted", key=b"")
    assert witness.last(HEART, "anna") is None


def test_a_site_that_rotated_its_key_goes_on_with_its_ledger() -> None:
    witness = Witness()
    shown(witness, 5, 1)

    witness.see(HEART, "anna", NORTH.public, short(7, 2, identity=NORTH))

    refuses(witness, short(8), "cannot be trusted", key=NORTH.public)
    refuses(witness, short(6, identity=NORTH), "it had 7", key=NORTH.public)


def test_federations_and_sites_are_apart(path: Path) -> None:
    witness = Witness(path)
    shown(witness, 5)

    witness.see("Heart 2031", "anna", ANNA.public, short(2))
    witness.see(HEART, "north", ANNA.public, short(3, ledger=OTHER))

    again = Witness(path)
    assert [
        seen and seen.size
        for seen in (again.last(HEART, "anna"), again.last("Heart 2031", "anna"), again.last(HEART, "north"))
    ] == [5, 2, 3]


def test_weighing_remembers_nothing(path: Path) -> None:
    witness = Witness(path)

    witness.weigh(HEART, "anna", ANNA.public, short(5))

    assert witness.last(HEART, "anna") is None
    assert not path.exists()


def test_many_are_seen_with_one_write_and_those_before_a_refused_one_are_remembered(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    monkeypatch.setattr(os, "fsync", written.append)
    told = {f"site {number}": (ANNA.public, short(number)) for number in range(1, 40)}

    Witness(path).see_all(HEART, told)
    assert len(written) == 2  # the file and its folder

    with pytest.raises(Refused, match="site 20"):
        Witness(path).see_all(HEART, {site: (ANNA.public, short(60 if site != "site 20" else 3)) for site in told})
    sizes = [seen.size for site in told if (seen := Witness(path).last(HEART, site))]
    assert sizes == [60] * 19 + list(range(20, 40))

    Witness(path).see_all(HEART, {"site 1": (ANNA.public, short(60))})
    assert len(written) == 4  # nothing new, nothing written


def test_a_site_whose_ledger_was_lost_may_begin_another_when_the_admins_say_so(path: Path) -> None:
    witness = Witness(path)
    lost = shown(witness, 5, 1)

    assert witness.forget(HEART, "anna", "Fire on 3 May; agreed by both admins.") == lost
    assert Witness(path).last(HEART, "anna") is None
    shown(Witness(path), 1, 7, OTHER)

    again = Witness(path)
    assert again.forgotten(HEART, "anna") == (
        Forgotten(checkpoint=lost, reason="Fire on 3 May; agreed by both admins."),
    )
    refuses(again, short(9, 1), f"the one seen before is {OTHER}")
    refuses(again, short(0, 7, OTHER), "it had 1 when")


def test_a_site_that_recovers_an_older_copy_goes_on_from_there_when_the_admins_say_so(path: Path) -> None:
    witness = Witness(path)
    shown(witness, 5, 1)
    refuses(witness, short(4, 2), "the admins must say so")
    witness.forget(HEART, "anna", "The disk failed; recovered from the export of 2 May.")

    refuses(witness, short(4, identity=NORTH), "cannot be trusted")
    shown(witness, 4, 2)

    refuses(Witness(path), short(3, 1), "it had 4")
    refuses(Witness(path), short(4, 1), "There are two of it")
    assert shown(Witness(path), 5, 3) == Witness(path).last(HEART, "anna")
    assert len(Witness(path).forgotten(HEART, "anna")) == 1


@pytest.mark.parametrize("reason", ["", "  ", "a\nb", "\x1b[2J", "x" * 201])
def test_forgetting_takes_a_reason(reason: str) -> None:
    witness = Witness()
    shown(witness, 5)

    with pytest.raises(UsageError, match="Say in a sentence how the ledger was lost"):
        witness.forget(HEART, "anna", reason)
    assert witness.last(HEART, "anna") is not None


def test_what_was_never_seen_cannot_be_forgotten() -> None:
    witness = Witness()
    shown(witness, 5)
    witness.forget(HEART, "anna", "Lost.")

    for site in ("anna", "north"):
        with pytest.raises(UsageError, match="there is none to forget"):
            witness.forget(HEART, site, "Lost.")
    assert witness.forgotten(HEART, "north") == ()


def written(path: Path) -> Any:
    witness = Witness(path)
    shown(witness, 5)
    witness.forget(HEART, "anna", "Lost.")
    shown(witness, 1, 0, OTHER)
    return json.loads(path.read_bytes())


def of_anna(tree: Any, **changes: object) -> bytes:
    fields = tree["seen"][HEART]["anna"]
    return canonical_bytes({**tree, "seen": {HEART: {"anna": {**fields, **changes}}}})


DAMAGES: dict[str, Any] = {
    "nothing": lambda tree: b"",
    "cut off": lambda tree: canonical_bytes(tree)[:-1],
    "no text": lambda tree: b"\xff",
    "a list": lambda tree: b"[]",
    "white space": lambda tree: json.dumps(tree, sort_keys=True).encode(),
    "a line break": lambda tree: canonical_bytes(tree) + b"\n",
    "another format": lambda tree: canonical_bytes({**tree, "format": "confide-witness/2"}),
    "a field beside": lambda tree: canonical_bytes({**tree, "note": ""}),
    "nested deeply": lambda tree: b'{"format":"confide-witness/1","seen":' + b"[" * 100_000,
    "seen a list": lambda tree: canonical_bytes({**tree, "seen": []}),
    "a federation of nobody": lambda tree: canonical_bytes({**tree, "seen": {**tree["seen"], "empty": {}}}),
    "a site of nothing": lambda tree: of_anna(tree, last="", forgotten=[]),
    "a checkpoint changed": lambda tree: of_anna(tree, last="x" * SHORT_CHARACTERS),
    "a checkpoint cut off": lambda tree: of_anna(tree, last=short(5)[:-4]),
    "a number for a checkpoint": lambda tree: of_anna(tree, last=1),
    "a list for a checkpoint": lambda tree: of_anna(tree, last=[]),
    "a field beside a site's": lambda tree: of_anna(tree, note=""),
    "no reason": lambda tree: of_anna(tree, forgotten=[{"checkpoint": short(5)}]),
    "a number for a reason": lambda tree: of_anna(tree, forgotten=[{"checkpoint": short(5), "reason": 1}]),
    "forgotten ones as a mapping": lambda tree: of_anna(tree, forgotten={}),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_file_is_refused_and_not_begun_anew(path: Path, case: str) -> None:
    damaged = DAMAGES[case](written(path))
    path.write_bytes(damaged)

    with pytest.raises(LedgerError, match="not begun anew"):
        Witness(path)
    assert path.read_bytes() == damaged


def test_the_file_is_canonical_and_says_its_format(path: Path) -> None:
    tree = written(path)

    assert tree["format"] == FORMAT
    assert canonical_bytes(tree) == path.read_bytes()
    assert tree["seen"][HEART]["anna"] == {
        "last": short(1, ledger=OTHER),
        "forgotten": [{"checkpoint": short(5), "reason": "Lost."}],
    }


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="cannot be read"):
        Witness(tmp_path)


def test_what_cannot_be_written_is_not_accepted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    witness = Witness(path)
    shown(witness, 5)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(LedgerError, match="No space left on device"):
            shown(witness, 6)
        with pytest.raises(LedgerError, match="No space left on device"):
            witness.forget(HEART, "anna", "Lost.")

    for each in (witness, Witness(path)):
        last = each.last(HEART, "anna")
        assert last is not None
        assert last.size == 5
    assert [found.name for found in path.parent.iterdir()] == ["witness.json"]


def test_threads_that_show_at_once_leave_the_newest(path: Path) -> None:
    witness = Witness(path)

    def show(start: int) -> None:
        for size in range(start, 60, 3):
            try:
                shown(witness, size)
            except Refused:
                continue

    threads = [threading.Thread(target=show, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for each in (witness, Witness(path)):
        last = each.last(HEART, "anna")
        assert last is not None
        assert last.size == 59


@settings(max_examples=100)
@given(
    strategies.lists(
        strategies.tuples(strategies.integers(2, 6), strategies.integers(0, 1), strategies.integers(0, 2)), max_size=12
    )
)
def test_of_one_ledger_never_two_roots_at_one_size_a_smaller_size_or_fewer_reserved_rounds_are_accepted(
    shows: list[tuple[int, int, int]],
) -> None:
    witness, accepted = Witness(), list[tuple[int, int, int]]()

    for size, root, charges in shows:
        follows = not accepted or (size > accepted[-1][0] and charges >= accepted[-1][2])
        again = bool(accepted) and accepted[-1] == (size, root, charges)
        try:
            shown(witness, size, root, charges=charges)
        except Refused:
            assert not follows
            assert not again
            continue
        assert follows or again
        accepted.append((size, root, charges))

    for place in (0, 2):
        column = [each[place] for each in accepted]
        assert column == sorted(column)
    assert len(set(accepted)) == len({size for size, _, _ in accepted})


@settings(max_examples=200)
@given(strategies.text(max_size=200), strategies.binary(max_size=40))
def test_a_hostile_text_raises_only_our_refusal(text: str, key: bytes) -> None:
    with pytest.raises(Refused):
        Witness().see(HEART, "anna", key, text)


def test_only_its_owner_reads_what_a_witness_remembers(path: Path) -> None:
    before = os.umask(0o022)
    try:
        shown(Witness(path), 1)
    finally:
        os.umask(before)

    assert path.stat().st_mode & 0o777 == 0o600
