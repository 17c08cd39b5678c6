"""The roster: who belongs to a federation, on the admins' word."""

import json
from typing import Any

import pytest
from hypothesis import given, settings, strategies

from confide.common.canonical import canonical_bytes
from confide.common.crypto import Identity
from confide.common.errors import ConfideError, MessageError, Refused, UsageError
from confide.common.roster import LARGEST_ROSTER_BYTES, MOST_SITES, Roster, parse_roster, read_roster

ADMINS = [Identity(bytes([9, number] * 16)) for number in range(3)]
PINNED = [admin.public for admin in ADMINS]


def key(number: int) -> bytes:
    return Identity(number.to_bytes(32)).public


def roster(**changes: Any) -> Roster:
    fields: dict[str, Any] = {
        "federation": "Heart 2030",
        "epoch": 2,
        "coordinator": key(1),
        "sites": {"St. Anna": key(2), "north-clinic_3": key(3)},
    }
    return Roster(**fields | changes)


def test_a_roster_signed_by_all_pinned_admins_is_read_as_it_was() -> None:
    assert read_roster(roster().signed(ADMINS), PINNED) == roster()
    assert parse_roster(roster().canonical()) == roster()


def test_signatures_of_admins_that_are_not_pinned_do_not_matter() -> None:
    assert read_roster(roster().signed(ADMINS), PINNED[:1]) == roster()


@pytest.mark.parametrize("signers", [ADMINS[:0], ADMINS[:2], ADMINS[1:], [*ADMINS[:2], Identity(bytes(32))]])
def test_a_roster_without_the_signature_of_every_pinned_admin_is_refused(signers: list[Identity]) -> None:
    with pytest.raises(Refused, match=r"Heart 2030, epoch 2, is not signed by the pinned admin [0-9a-f]{16}…"):
        read_roster(roster().signed(signers), PINNED)


def test_a_signature_on_another_roster_or_for_another_purpose_is_refused() -> None:
    other = json.loads(roster(epoch=3).signed(ADMINS))["signatures"]
    bare = {admin.public.hex(): admin.sign(roster().canonical()).hex() for admin in ADMINS}

    for signatures in (other, bare):
        raw = canonical_bytes({"roster": json.loads(roster().canonical()), "signatures": signatures})
        with pytest.raises(Refused, match="not signed by the pinned admin"):
            read_roster(raw, PINNED)


def test_without_a_pinned_admin_no_roster_is_trusted() -> None:
    with pytest.raises(UsageError, match="No admin's key is pinned"):
        read_roster(roster().signed(ADMINS), [])


def test_whatever_is_in_a_roster_is_in_its_digest() -> None:
    digests = {
        changed.digest
        for changed in (
            roster(),
            roster(federation="Heart 2031"),
            roster(epoch=3),
            roster(coordinator=key(4)),
            roster(sites={"St. Anna": key(2)}),
            roster(sites={"St. Anna": key(3), "north-clinic_3": key(2)}),
            roster(sites={"St. Anna": key(2), "north-clinic_4": key(3)}),
        )
    }

    assert len(digests) == 7
    assert roster().digest == roster(sites=dict(reversed(list(roster().sites.items())))).digest


MALFORMED: dict[str, dict[str, Any]] = {
    "no site": {"sites": {}},
    "too many sites": {"sites": {f"site {n}": key(n + 2) for n in range(MOST_SITES + 1)}},
    "epoch 0": {"epoch": 0},
    "a short key": {"sites": {"a": bytes(31)}},
    "a short coordinator's key": {"coordinator": bytes(33)},
    "one key twice": {"sites": {"a": key(2), "b": key(2)}},
    "the coordinator as a site": {"sites": {"a": key(1), "b": key(2)}},
    "names that differ in case": {"sites": {"anna": key(2), "Anna": key(3)}},
    **{
        f"the name {name!r}": {"sites": {name: key(2)}}
        for name in ("", ".", "..", "../a", "a/b", "a\n", " a", "a ", "-a", "a\0b", "ä", "a" * 64)
    },
    "a federation without a name": {"federation": ""},
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_roster_that_contradicts_itself_cannot_be_made(case: str) -> None:
    with pytest.raises(UsageError, match="The roster cannot be used"):
        roster(**MALFORMED[case])


def tree() -> Any:
    return json.loads(roster().signed(ADMINS))


def inside(**changes: Any) -> bytes:
    return canonical_bytes(tree() | {"roster": tree()["roster"] | changes})


COORDINATOR = key(1).hex()
RESPELLED: dict[str, bytes] = {
    "white space": json.dumps(tree(), sort_keys=True).encode(),
    "order of keys": json.dumps(dict(reversed(list(tree().items()))), separators=(",", ":")).encode(),
    "another format": inside(format="confide-roster/2"),
    "another field": inside(admins=[]),
    "a field beside": canonical_bytes(tree() | {"note": ""}),
    "a field missing": canonical_bytes({"roster": tree()["roster"]}),
    "an epoch as text": inside(epoch="2"),
    "an epoch as float": inside(epoch=2.0),
    "an epoch as bool": inside(epoch=True),
    "a key in capitals": inside(coordinator=COORDINATOR.upper()),
    "a key with spaces": inside(coordinator=" " + COORDINATOR),
    "sites as a list": inside(sites=["St. Anna"]),
    "signatures as a list": canonical_bytes(tree() | {"signatures": []}),
    "a signature that is no hex": canonical_bytes(tree() | {"signatures": {PINNED[0].hex(): "xy"}}),
    "nested deeply": b'{"roster":' + b"[" * 100_000,
    "a list": b"[]",
    "no text": b"\xff",
}


@pytest.mark.parametrize("case", RESPELLED)
def test_a_roster_in_another_spelling_than_its_one_is_no_roster(case: str) -> None:
    with pytest.raises(MessageError, match="not in the one spelling of the format confide-roster/1"):
        read_roster(RESPELLED[case], PINNED)


def test_a_roster_beyond_the_largest_is_not_even_parsed() -> None:
    with pytest.raises(MessageError, match="at most 1048576"):
        read_roster(b" " * (LARGEST_ROSTER_BYTES + 1), PINNED)


@settings(max_examples=200)
@given(strategies.data())
def test_no_changed_byte_leaves_a_roster_that_is_read_as_another(data: strategies.DataObject) -> None:
    raw = bytearray(roster().signed(ADMINS[:1]))
    for _ in range(data.draw(strategies.integers(1, 3))):
        raw[data.draw(strategies.integers(0, len(raw) - 1))] = data.draw(strategies.integers(0, 255))

    try:
        found = read_roster(bytes(raw), PINNED[:1])
    except ConfideError:
        return
    assert found == roster()
