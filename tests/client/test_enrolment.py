"""Whose word a site takes on who belongs to a federation, and that this word never goes back."""

import json
import multiprocessing
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies

from confide.client.enrolment import MOST_ADMINS, current, federation_entry, federations, join, update
from confide.client.home import Home, replace_private
from confide.client.keys import fingerprint, make_keys, public_identity
from confide.common.canonical import canonical_bytes
from confide.common.crypto import Identity, key_to_file
from confide.common.errors import ConfideError, MessageError, Refused, UsageError
from confide.common.roster import LARGEST_ROSTER_BYTES, Roster
from tests.client.test_home import child, kill_at_line

FEDERATION, SITE = "Heart 2030", "St. Anna"
ADMINS = [Identity(bytes([9, number] * 16)) for number in range(3)]
PINNED = tuple(admin.public for admin in ADMINS)
FINGERPRINTS = [fingerprint(admin) for admin in PINNED]
COORDINATOR, NORTH = Identity(b"c" * 32).public, Identity(b"n" * 32).public


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home.create(tmp_path / "site", SITE)
    make_keys(home, b"", insecure_no_passphrase=True)
    return home


def roster(home: Home, **changes: Any) -> Roster:
    fields: dict[str, Any] = {
        "federation": FEDERATION,
        "epoch": 2,
        "coordinator": COORDINATOR,
        "sites": {SITE: public_identity(home), "north": NORTH},
    }
    return Roster(**fields | changes)


def joined(home: Home, **changes: Any) -> Roster:
    return join(home, FEDERATION, PINNED, roster(home, **changes).signed(ADMINS), fingerprints=FINGERPRINTS)


def stored(home: Home) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in home.federations.iterdir()}


def test_a_site_that_joined_has_the_roster_and_the_admins_pinned(home: Home) -> None:
    assert federations(home) == ()

    found = joined(home)

    assert found == roster(home) == current(home, FEDERATION)
    assert federations(home) == (FEDERATION,)
    entry = federation_entry(home, FEDERATION)
    assert (entry.federation, entry.epoch, entry.roster) == (FEDERATION, 2, found.digest)
    assert set(entry.admins) == {admin.hex() for admin in PINNED}
    assert (home.federations / f"{FEDERATION}.json").stat().st_mode & 0o777 == 0o600
    assert Home.open(home.root) == home


def test_what_was_seen_of_other_sites_is_no_federation(home: Home) -> None:
    home.witness.write_bytes(b"{}")

    assert federations(home) == ()
    assert Home.open(home.root) == home


def test_fingerprints_may_be_spelled_as_they_are_spoken(home: Home) -> None:
    spoken = [FINGERPRINTS[0].replace(" ", ""), FINGERPRINTS[1].replace(" ", "-"), f" {FINGERPRINTS[2]}\n"]

    join(home, FEDERATION, PINNED, roster(home).signed(ADMINS), fingerprints=spoken)

    assert current(home, FEDERATION).epoch == 2


@pytest.mark.parametrize(
    "told",
    [
        [*FINGERPRINTS[:2], fingerprint(NORTH)],
        list(reversed(FINGERPRINTS)),
        [*FINGERPRINTS[:2], FINGERPRINTS[2][:-1]],
        [*FINGERPRINTS[:2], ""],
    ],
)
def test_an_admin_whose_fingerprint_is_another_is_not_pinned(told: list[str], home: Home) -> None:
    with pytest.raises(Refused, match="has another fingerprint than the one given"):
        join(home, FEDERATION, PINNED, roster(home).signed(ADMINS), fingerprints=told)

    assert stored(home) == {}


@pytest.mark.parametrize(
    ("admins", "words"),
    [
        ((), "0 keys of admins"),
        (tuple(Identity(bytes([1, n] * 16)).public for n in range(MOST_ADMINS + 1)), "17 keys of admins"),
        ((PINNED[0], PINNED[0]), "given twice"),
        ((PINNED[0][:31],), "does not have 32 bytes"),
    ],
)
def test_admins_are_one_to_sixteen_different_keys(admins: tuple[bytes, ...], words: str, home: Home) -> None:
    with pytest.raises(UsageError, match=words):
        join(
            home, FEDERATION, admins, roster(home).signed(ADMINS), fingerprints=[fingerprint(admin) for admin in admins]
        )
    with pytest.raises(UsageError, match="2 fingerprints are given for 3 keys"):
        join(home, FEDERATION, PINNED, roster(home).signed(ADMINS), fingerprints=FINGERPRINTS[:2])

    assert stored(home) == {}


def test_a_roster_that_a_pinned_admin_did_not_sign_is_refused_at_joining_and_later(home: Home) -> None:
    for signers in (ADMINS[:2], [*ADMINS[:2], Identity(bytes(32))], []):
        with pytest.raises(Refused, match="not signed by the pinned admin"):
            join(home, FEDERATION, PINNED, roster(home).signed(signers), fingerprints=FINGERPRINTS)
    assert stored(home) == {}
    joined(home)
    before = stored(home)

    for signers in (ADMINS[:2], ADMINS[1:], [Identity(bytes(32))], []):
        with pytest.raises(Refused, match="not signed by the pinned admin"):
            update(home, FEDERATION, roster(home, epoch=3).signed(signers))
    for raw in (b"", b"{}", b"\xff", b"[" * 10_000, b" " * (LARGEST_ROSTER_BYTES + 1)):
        with pytest.raises(MessageError):
            update(home, FEDERATION, raw)

    assert stored(home) == before


def test_a_roster_of_another_federation_or_without_this_site_and_its_key_is_refused(home: Home) -> None:
    wrong: dict[str, dict[str, Any]] = {
        "not of Heart 2030": {"federation": "Lung 2030"},
        "does not have it": {"sites": {"north": NORTH}},
        "has it with the key": {"sites": {SITE: NORTH}},
    }

    for words, changes in wrong.items():
        with pytest.raises(Refused, match=words) as caught:
            joined(home, **changes)
        assert caught.value.rule == "federation"
    assert stored(home) == {}
    joined(home)
    for words, changes in wrong.items():
        with pytest.raises(Refused, match=words):
            update(home, FEDERATION, roster(home, epoch=3, **changes).signed(ADMINS))
    assert current(home, FEDERATION).epoch == 2


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(offers=strategies.lists(strategies.tuples(strategies.integers(1, 6), strategies.booleans()), max_size=8))
def test_a_roster_is_only_ever_followed_by_one_of_a_later_epoch(offers: list[tuple[int, bool]], home: Home) -> None:
    for path in home.federations.iterdir():
        path.unlink()
    in_force = joined(home, epoch=1)

    for epoch, alone in offers:
        sites = {SITE: public_identity(home)} | ({} if alone else {"north": NORTH})
        offered = roster(home, epoch=epoch, sites=sites)
        if epoch > in_force.epoch or offered == in_force:
            in_force = update(home, FEDERATION, offered.signed(ADMINS))
            assert in_force == offered
        else:
            with pytest.raises(Refused, match=f"is of epoch {epoch}, and the one in force is of epoch") as caught:
                update(home, FEDERATION, offered.signed(ADMINS))
            assert caught.value.rule == "federation"
        assert current(home, FEDERATION) == in_force


def test_a_federation_is_joined_once_and_its_admins_stay_pinned(home: Home) -> None:
    joined(home)
    mallory = Identity(b"m" * 32)

    with pytest.raises(UsageError, match="belongs to the federation Heart 2030 already"):
        join(
            home,
            FEDERATION,
            (mallory.public,),
            roster(home, epoch=9).signed([mallory]),
            fingerprints=[fingerprint(mallory.public)],
        )

    assert current(home, FEDERATION).epoch == 2


def test_a_federation_that_was_not_joined_is_said_to_be_none(home: Home) -> None:
    joined(home)

    for call in (current, federation_entry):
        with pytest.raises(UsageError, match="does not belong to the federation Lung 2030; it belongs to Heart 2030"):
            call(home, "Lung 2030")
    with pytest.raises(UsageError, match="does not belong"):
        update(home, "Lung 2030", roster(home).signed(ADMINS))


@pytest.mark.parametrize("name", ["", ".", "..", "../keys/identity", "a/b", "a\0b", " a", "a\n"])
def test_a_federations_name_is_never_a_path(name: str, home: Home) -> None:
    for call in (current, federation_entry):
        with pytest.raises(UsageError, match="is no name"):
            call(home, name)
    with pytest.raises(UsageError, match="is no name"):
        update(home, name, b"")
    with pytest.raises((UsageError, Refused)):
        join(home, name, PINNED, roster(home).signed(ADMINS), fingerprints=FINGERPRINTS)


def test_a_site_whose_key_was_changed_asks_for_a_roster_with_the_new_one(home: Home) -> None:
    joined(home)
    other = Identity(b"o" * 32)
    replace_private(home.identity, key_to_file(other, b"", insecure_no_passphrase=True))

    with pytest.raises(
        Refused, match=rf"has the key {fingerprint(other.public)}, and the roster .* has it with the key"
    ):
        current(home, FEDERATION)
    update(home, FEDERATION, roster(home, epoch=3).signed(ADMINS))

    assert current(home, FEDERATION).sites[SITE] == other.public


def tampered(tree: dict[str, Any], how: str) -> bytes:
    mallory = Identity(b"m" * 32)
    if how == "another admin is pinned":
        tree["admins"] = sorted([*tree["admins"], mallory.public.hex()])
    elif how == "an admin is left out":
        tree["admins"] = tree["admins"][:2]
        tree["roster"]["roster"]["epoch"] = 9
    elif how == "admins in another order":
        tree["admins"] = tree["admins"][::-1]
    elif how == "no admins":
        tree["admins"] = []
    elif how == "another epoch":
        tree["roster"]["roster"]["epoch"] = 9
    elif how == "another federation":
        tree["federation"] = "Lung 2030"
    elif how == "a field beside":
        tree["more"] = 1
    elif how == "white space":
        return json.dumps(tree).encode()
    else:
        return {"empty": b"", "no text": b"\xff", "nested": b"[" * 10_000, "a list": b"[]", "large": b" " * (1 << 21)}[
            how
        ]
    return canonical_bytes(tree)


@pytest.mark.parametrize(
    "how",
    [
        "another admin is pinned",
        "an admin is left out",
        "admins in another order",
        "no admins",
        "another epoch",
        "another federation",
        "a field beside",
        "white space",
        "empty",
        "no text",
        "nested",
        "a list",
        "large",
    ],
)
def test_a_file_that_was_changed_by_hand_is_refused(how: str, home: Home) -> None:
    joined(home)
    path = home.federations / f"{FEDERATION}.json"
    path.write_bytes(tampered(json.loads(path.read_bytes()), how))

    for call in (current, federation_entry):
        with pytest.raises(UsageError):
            call(home, FEDERATION)
    with pytest.raises(UsageError):
        update(home, FEDERATION, roster(home, epoch=3).signed(ADMINS))


def test_one_federations_file_does_not_do_for_another(home: Home) -> None:
    joined(home)
    (home.federations / f"{FEDERATION}.json").rename(home.federations / "Lung 2030.json")

    with pytest.raises(UsageError, match="is damaged, or was written by hand"):
        current(home, "Lung 2030")


def test_a_file_that_is_too_open_or_a_link_is_refused(home: Home, tmp_path: Path) -> None:
    joined(home)
    path = home.federations / f"{FEDERATION}.json"

    path.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 0600"):
        current(home, FEDERATION)
    path.chmod(0o600)
    path.rename(tmp_path / "there")
    path.symlink_to(tmp_path / "there")
    with pytest.raises(UsageError, match="symbolic link"):
        current(home, FEDERATION)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=strategies.data())
def test_no_changed_byte_of_the_file_is_more_than_an_error_of_ours(data: strategies.DataObject, home: Home) -> None:
    path = home.federations / f"{FEDERATION}.json"
    if not path.exists():
        joined(home)
        path.with_suffix(".original").write_bytes(path.read_bytes())
    raw = bytearray(path.with_suffix(".original").read_bytes())
    for _ in range(data.draw(strategies.integers(1, 3))):
        raw[data.draw(strategies.integers(0, len(raw) - 1))] = data.draw(strategies.integers(0, 255))
    path.write_bytes(bytes(raw))

    try:
        found = current(home, FEDERATION)
    except ConfideError:
        return
    assert found == roster(home)


def test_of_two_who_join_at_once_one_does(home: Home) -> None:
    barrier = threading.Barrier(2)
    outcomes: list[str] = []

    def one(epoch: int) -> None:
        barrier.wait()
        try:
            outcomes.append(f"joined {joined(home, epoch=epoch).epoch}")
        except UsageError:
            outcomes.append("refused")

    threads = [threading.Thread(target=one, args=(epoch,)) for epoch in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(outcomes) == [f"joined {current(home, FEDERATION).epoch}", "refused"]


def _update_to(root: Path, epochs: list[int]) -> None:
    home = Home.open(root)
    for epoch in epochs:
        try:
            update(home, FEDERATION, roster(home, epoch=epoch).signed(ADMINS))
        except Refused:
            continue


def test_of_many_who_update_at_once_the_latest_epoch_stays(home: Home) -> None:
    joined(home, epoch=1)
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_update_to, args=(home.root, list(range(2 + each, 32, 3)))) for each in range(3)
    ]

    for process in processes:
        process.start()
    for process in processes:
        process.join()

    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert current(home, FEDERATION).epoch == 31


def test_an_update_killed_at_any_line_leaves_the_old_roster_or_the_new_one(home: Home) -> None:
    joined(home, epoch=1)
    seen: set[int] = set()
    number, code = 0, -1
    while code:
        number += 1
        epoch = current(home, FEDERATION).epoch + 1
        offered = roster(home, epoch=epoch).signed(ADMINS)

        def work(number: int = number, offered: bytes = offered) -> None:
            kill_at_line(number, "client/home.py", "common/disk.py")
            update(home, FEDERATION, offered)

        code = child(work)
        assert code in {0, -signal.SIGKILL}
        found = current(home, FEDERATION).epoch
        assert found in {epoch - 1, epoch}
        seen.add(found - epoch)
    assert seen == {-1, 0}
    assert number > 50
