"""A signed plan: the coordinator's word, for one federation and one run, on bytes that people read."""

import json
import tomllib
from typing import Any

import pytest
from hypothesis import given, settings, strategies

from confide.common import signed_plan
from confide.common.canonical import canonical_bytes
from confide.common.crypto import Identity
from confide.common.errors import ConfideError, MessageError, PlanError, Refused, UsageError
from confide.common.plan import LARGEST_PLAN_BYTES, Plan, read_plan, starter
from confide.common.signed_plan import LARGEST_SIGNED_PLAN_BYTES, read_signed_plan, sign_plan

COORDINATOR, MALLORY = Identity(b"c" * 32), Identity(b"m" * 32)
TOML = starter("demo", "tiny-bert", "sha256:" + "0" * 64, ["query", "value"]).encode()
OTHER_TOML = TOML.replace(b'name = "demo"', b'name = "else"')
SIGNED = sign_plan(TOML, federation="Heart 2030", run="spring", coordinator=COORDINATOR)
HEAD: dict[str, str] = json.loads(SIGNED.split(b"\n")[1])


def put_together(head: object, toml: bytes = TOML, form: bytes = b"confide-signed-plan/1") -> bytes:
    spelled = head if isinstance(head, bytes) else canonical_bytes(head)  # type: ignore[arg-type]
    return form + b"\n" + spelled + b"\n" + toml


def signed_anyway(toml: bytes, digest: str, **names: str) -> bytes:
    """Return what a coordinator could make who does not keep to `sign_plan`."""
    named = {"federation": "Heart 2030", "run": "spring", "digest": digest} | names
    statement = b"confide-signed-plan/1 signature\n" + canonical_bytes(named) + b"\n" + toml
    return put_together(named | {"signature": COORDINATOR.sign(statement).hex()}, toml)


def test_a_signed_plan_is_read_as_it_was() -> None:
    found = read_signed_plan(SIGNED, COORDINATOR.public, federation="Heart 2030")

    assert found.plan == read_plan(TOML)
    assert found.toml == TOML
    assert (found.federation, found.run, found.digest) == ("Heart 2030", "spring", read_plan(TOML).digest)
    assert read_signed_plan(SIGNED, COORDINATOR.public) == found


def test_the_bytes_that_people_read_stand_in_it_as_they_are() -> None:
    form, head, toml = SIGNED.split(b"\n", 2)

    assert form == b"confide-signed-plan/1"
    assert json.loads(head).keys() == {"federation", "run", "digest", "signature"}
    assert tomllib.loads(toml.decode()) == tomllib.loads(TOML.decode())
    assert toml == TOML
    assert signed_anyway(TOML, HEAD["digest"]) == SIGNED


def test_another_keys_signature_is_refused() -> None:
    forged = sign_plan(TOML, federation="Heart 2030", run="spring", coordinator=MALLORY)

    with pytest.raises(MessageError, match="A signature is not the one of the key"):
        read_signed_plan(forged, COORDINATOR.public)
    for public in (MALLORY.public, b"", bytes(32)):
        with pytest.raises(MessageError):
            read_signed_plan(SIGNED, public)


@pytest.mark.parametrize(
    "changes",
    [
        {"federation": "Heart 2031"},
        {"run": "autumn"},
        {"digest": read_plan(OTHER_TOML).digest},
        {"signature": "00" * 64},
        {"signature": COORDINATOR.sign(TOML).hex()},
    ],
)
def test_the_signature_covers_federation_run_and_digest(changes: dict[str, str]) -> None:
    with pytest.raises(MessageError, match="A signature is not the one"):
        read_signed_plan(put_together(HEAD | changes), COORDINATOR.public)


@pytest.mark.parametrize(
    "toml", [OTHER_TOML, TOML + b"\n", TOML + b"# harmless", TOML[:-1], TOML.replace(b"\n", b"\r\n"), b""]
)
def test_the_signature_covers_every_byte_of_the_plan_comments_too(toml: bytes) -> None:
    with pytest.raises(MessageError, match="A signature is not the one"):
        read_signed_plan(put_together(HEAD, toml), COORDINATOR.public)


def test_a_plan_for_another_federation_of_the_same_coordinator_is_refused() -> None:
    with pytest.raises(Refused, match="for the federation Heart 2030, not for Lung 2030") as caught:
        read_signed_plan(SIGNED, COORDINATOR.public, federation="Lung 2030")

    assert caught.value.rule == "federation"


def test_a_digest_that_is_not_the_plans_is_refused_though_it_is_signed() -> None:
    with pytest.raises(MessageError, match="whose digest is sha256:"):
        read_signed_plan(signed_anyway(TOML, read_plan(OTHER_TOML).digest), COORDINATOR.public)


def test_what_is_signed_and_no_plan_is_a_plan_error() -> None:
    for toml in (b"", b"\xff", b"[[[", TOML.replace(b"[privacy]", b"[privacie]"), b"a" * (LARGEST_PLAN_BYTES + 1)):
        with pytest.raises(PlanError):
            read_signed_plan(signed_anyway(toml, HEAD["digest"]), COORDINATOR.public)


def test_nothing_of_a_plan_is_parsed_before_its_signature_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []

    def watched(raw: bytes) -> Plan:
        parsed.append(raw)
        return read_plan(raw)

    monkeypatch.setattr(signed_plan, "read_plan", watched)

    with pytest.raises(MessageError):
        read_signed_plan(put_together(HEAD, OTHER_TOML), COORDINATOR.public)
    assert parsed == []
    read_signed_plan(SIGNED, COORDINATOR.public)
    assert parsed == [TOML]


RESPELLED: dict[str, bytes] = {
    "nothing": b"",
    "the format only": b"confide-signed-plan/1\n",
    "a bare plan": TOML,
    "another format": put_together(HEAD, form=b"confide-signed-plan/2"),
    "a format with a space": put_together(HEAD, form=b"confide-signed-plan/1 "),
    "white space": put_together(json.dumps(HEAD, sort_keys=True).encode()),
    "order of keys": put_together(json.dumps(dict(reversed(list(HEAD.items()))), separators=(",", ":")).encode()),
    "a field beside": put_together(HEAD | {"note": ""}),
    "a field missing": put_together({name: HEAD[name] for name in ("federation", "run", "digest")}),
    "a run as a number": put_together(HEAD | {"run": 1}),
    "a run as a list": put_together(HEAD | {"run": ["spring"]}),
    "a signature in capitals": put_together(HEAD | {"signature": HEAD["signature"].upper()}),
    "a signature with spaces": put_together(HEAD | {"signature": " " + HEAD["signature"]}),
    "a signature that is no text": put_together(HEAD | {"signature": 5}),
    "a list": put_together(b"[]"),
    "a text": put_together(b'""'),
    "no JSON": put_together(b"{"),
    "no text": put_together(b"\xff"),
    "nested deeply": put_together(b"[" * 1000),
    "a head without end": put_together(canonical_bytes(HEAD | {"note": "x" * 2000})),
    "Windows line breaks": SIGNED.replace(b"\n", b"\r\n"),
    "a number of many digits": put_together(b"9" * 1000),
}


@pytest.mark.parametrize("case", RESPELLED)
def test_a_signed_plan_in_another_spelling_than_its_one_is_none(case: str) -> None:
    with pytest.raises(MessageError, match="not in the one spelling of the format confide-signed-plan/1"):
        read_signed_plan(RESPELLED[case], COORDINATOR.public)


@pytest.mark.parametrize("name", ["", ".", "..", "../spring", "a/b", "a\n", " a", "ä", "a" * 64, "a\0b", "\ud800"])
def test_a_name_that_could_be_a_path_is_neither_signed_nor_read(name: str) -> None:
    for fields in ({"run": name}, {"federation": name}):
        with pytest.raises(UsageError, match="is no name"):
            sign_plan(TOML, coordinator=COORDINATOR, **{"federation": "Heart 2030", "run": "spring"} | fields)
        with pytest.raises(MessageError, match="a name in it is malformed"):
            read_signed_plan(signed_anyway(TOML, HEAD["digest"], **fields), COORDINATOR.public)


def test_what_is_no_plan_is_not_signed() -> None:
    with pytest.raises(PlanError):
        sign_plan(b"", federation="Heart 2030", run="spring", coordinator=COORDINATOR)


def test_the_largest_plan_is_read_and_what_is_larger_is_not_even_looked_at() -> None:
    largest = TOML + b"#" * (LARGEST_PLAN_BYTES - len(TOML))
    longest: dict[str, Any] = {"federation": "f" * 63, "run": "r" * 63}
    signed = sign_plan(largest, coordinator=COORDINATOR, **longest)

    assert len(signed) <= LARGEST_SIGNED_PLAN_BYTES
    assert read_signed_plan(signed, COORDINATOR.public).toml == largest
    with pytest.raises(MessageError, match=f"at most {LARGEST_SIGNED_PLAN_BYTES}"):
        read_signed_plan(SIGNED + b"#" * LARGEST_SIGNED_PLAN_BYTES, COORDINATOR.public)


@settings(max_examples=200)
@given(strategies.data())
def test_no_changed_byte_leaves_a_signed_plan_that_is_read_as_another(data: strategies.DataObject) -> None:
    raw = bytearray(SIGNED)
    for _ in range(data.draw(strategies.integers(1, 3))):
        at = data.draw(strategies.integers(0, 400) | strategies.integers(0, len(raw) - 1))
        raw[at] = data.draw(strategies.integers(0, 255))

    try:
        found = read_signed_plan(bytes(raw), COORDINATOR.public)
    except ConfideError:
        return
    assert bytes(raw) == SIGNED
    assert found.toml == TOML


@given(strategies.binary(max_size=300))
def test_any_bytes_are_at_most_an_error_of_ours(raw: bytes) -> None:
    for text in (raw, put_together(raw), put_together(raw, raw)):
        with pytest.raises(MessageError):
            read_signed_plan(text, COORDINATOR.public)
