"""What a ledger records: one spelling for every entry, and nothing that is not exactly one."""

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings, strategies

from confide.common.canonical import canonical_bytes
from confide.common.crypto import verify
from confide.common.entries import (
    FIRST_PREV,
    FORMAT,
    KINDS,
    LARGEST_RECORD_BYTES,
    LATEST,
    Approval,
    Bind,
    Entry,
    Federation,
    Forfeit,
    Recovered,
    Refund,
    Release,
    Renewal,
    Reserve,
    Revocation,
    Rotation,
    Started,
    decode,
    encode,
    rotation_statement,
    utc_seconds,
    utc_text,
)
from confide.common.errors import LedgerError
from confide.common.merkle import leaf_hash
from tests.books import (
    LEDGER,
    NOW,
    PLAN,
    RECOVERY,
    ROSTER,
    RUN,
    SITE,
    STEWARD,
    STRANGER,
    account,
    approval,
    bind,
    commit,
    data_set,
    genesis,
    mask,
    policy,
    renewal,
    reserve,
)

PREV = "sha256:" + "9a" * 32
SAMPLES: list[Entry] = [
    genesis(),
    policy(),
    account(),
    data_set(),
    Federation(federation="Heart 2030", epoch=2, roster=ROSTER, admins=(STEWARD.public.hex(),)),
    approval(),
    Revocation(plan=PLAN, run=RUN, by="Dr. Müller", reason="Der Ethikrat tagt noch."),
    Started(process="7e" * 16, software="confide 0"),
    reserve(accounts=("1", "2"), spent=(0.25, 1e-300)),
    bind(),
    mask(),
    commit(evidence="8b" * 32),
    Forfeit(run=RUN, round=1, reason="The agent was killed."),
    Refund(run=RUN, round=1, steps=3),
    Release(data="patients", what="label histogram", noise_multiplier=50.0, accounts=("1",), spent=(0.5,)),
    renewal(),
    Rotation.between(LEDGER, SITE, STRANGER),
    Recovered(recovery=RECOVERY, size=10, root="5c" * 32, reason="The disk failed.", by="IT"),
]
RESERVED = encode(reserve(accounts=("1",), spent=(0.25,)), 7, PREV, NOW)


def test_there_is_a_sample_of_every_kind() -> None:
    assert {entry.kind for entry in SAMPLES} == set(KINDS)


@pytest.mark.parametrize("entry", SAMPLES, ids=lambda entry: entry.kind)
def test_an_entry_is_read_as_it_was_written_and_its_line_is_canonical(entry: Entry) -> None:
    line = encode(entry, 7, PREV, NOW)

    stamped = decode(line)

    assert (stamped.entry, stamped.seq, stamped.prev, stamped.at) == (entry, 7, PREV, NOW)
    assert stamped.leaf == leaf_hash(line)
    assert canonical_bytes(json.loads(line)) == line
    assert json.loads(line)["format"] == FORMAT
    assert json.loads(line)["kind"] == entry.kind


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"round":1', b'"round": 1'),
        (b'"round":1', b'"round":1.0'),
        (b'"round":1', b'"round":true'),
        (b'"round":1', b'"round":"1"'),
        (b'"round":1', b'"round":01'),
        (b'"round":1', b'"round":-1'),
        (b'"round":1', b'"round":0'),
        (b'"round":1', b'"round":1,"round":1'),
        (b'"round":1', b'"round":2,"round":1'),
        (b'"round":1', b'"round":null'),
        (b'"round":1', b'"round":[1]'),
        (b'"round":1', b'"round":1' + b"0" * 5000),
        (b'"sampling_rate":0.1', b'"sampling_rate":0.10'),
        (b'"sampling_rate":0.1', b'"sampling_rate":1e-1'),
        (b'"sampling_rate":0.1', b'"sampling_rate":1'),
        (b'"sampling_rate":0.1', b'"sampling_rate":1.5'),
        (b'"sampling_rate":0.1', b'"sampling_rate":NaN'),
        (b'"sampling_rate":0.1', b'"sampling_rate":-Infinity'),
        (b'"divisor":120.0', b'"divisor":120'),
        (b'"divisor":120.0', b'"divisor":1e999'),
        (b'"divisor":120.0', b'"divisor":Infinity'),
        (b'"divisor":120.0', b'"divisor":5e-324'),
        (b'"divisor":120.0', b'"divisor":-0.0'),
        (b'"spent":[0.25]', b'"spent":0.25'),
        (b'"spent":[0.25]', b'"spent":[[0.25]]'),
        (b'"spent":[0.25]', b'"spent":[true]'),
        (b'"spent":[0.25]', b'"spent":{"0":0.25}'),
        (b'"spent":[0.25]', b'"spent":[0.25,]'),
        (b'"accounts":["1"]', b'"accounts":"1"'),
        (b'"accounts":["1"]', b'"accounts":["01"]'),
        (b'"accounts":["1"]', b'"accounts":["1","1"]'),
        (b'"run":"heart-2026"', b'"run":"\\u0068eart-2026"'),
        (b'"run":"heart-2026"', b'"run":"h\xc3\xa4rt"'),
        (b'"run":"heart-2026"', b'"run":"\\ud800"'),
        (b'"run":"heart-2026"', b'"run":"heart\\n2026"'),
        (b'"run":"heart-2026"', b'"run":" heart"'),
        (b'"run":"heart-2026"', b'"run":""'),
        (b'"run":"heart-2026"', b'"run":"heart-2026","extra":1'),
        (b'"run":"heart-2026",', b""),
        (b'"plan":"sha256:a1', b'"plan":"sha256:A1'),
        (b'"kind":"reserve"', b'"kind":"Reserve"'),
        (b'"kind":"reserve"', b'"kind":["reserve"]'),
        (b'"kind":"reserve"', b'"kind":"bind"'),
        (b'"kind":"reserve",', b""),
        (b'"format":"confide-ledger/1"', b'"format":"confide-ledger/2"'),
        (b'"format":"confide-ledger/1",', b""),
        (b'"seq":7', b'"seq":7.0'),
        (b'"seq":7', b'"seq":0'),
        (b'"seq":7', b'"seq":true'),
        (b'"seq":7,', b""),
        (b'"prev":"sha256:', b'"prev":"SHA256:'),
        (b'"at":"2026-11-23T02:40:00Z"', b'"at":"2026-11-23T02:40:00+00:00"'),
        (b'"at":"2026-11-23T02:40:00Z"', b'"at":"2026-11-23 02:40:00Z"'),
        (b'"at":"2026-11-23T02:40:00Z"', b'"at":"2026-02-30T02:40:00Z"'),
        (b'"at":"2026-11-23T02:40:00Z"', b'"at":"2026-11-23T24:00:00Z"'),
        (b'"at":"2026-11-23T02:40:00Z"', b'"at":"1969-11-23T02:40:00Z"'),
        (b'"at":"2026-11-23T02:40:00Z"', b'"at":0'),
        (b"{", b" {"),
        (b"}", b"}\n"),
        (b"}", b"}}"),
        (b"{", b"[" * 100_000),
        (b"{", b"\xef\xbb\xbf{"),
    ],
)
def test_a_line_in_another_spelling_is_no_record(old: bytes, new: bytes) -> None:
    assert RESERVED.count(old) == 1
    decode(RESERVED)

    with pytest.raises(LedgerError, match=r"."):
        decode(RESERVED.replace(old, new))


@pytest.mark.parametrize("raw", [b"", b"null", b"[]", b"1", b'"x"', b"{}", b"\x00", b"\xff\xfe", b"{" * 60_000])
def test_what_is_no_record_at_all_is_named_and_does_no_harm(raw: bytes) -> None:
    with pytest.raises(LedgerError, match=r"A record (is not|is of|has)"):
        decode(raw)


def spelled_again(line: bytes) -> bytes | None:
    """The line of what a line is read as, or None if it is refused, in words that can be shown."""
    try:
        stamped = decode(line)
    except LedgerError as error:
        message = str(error)
    else:
        return encode(stamped.entry, stamped.seq, stamped.prev, stamped.at)
    assert message.isprintable()
    assert len(message) < 1000
    return None


@settings(max_examples=300)
@given(strategies.binary(max_size=200) | strategies.text(max_size=200).map(str.encode), strategies.integers(0, 700))
def test_hostile_bytes_are_a_ledger_error_or_the_one_spelling_of_an_entry(raw: bytes, place: int) -> None:
    for line in (raw, RESERVED[:place] + raw + RESERVED[place + len(raw) :], RESERVED[:place] + raw + RESERVED[place:]):
        assert spelled_again(line) in {line, None}


@settings(max_examples=100)
@given(
    strategies.recursive(
        strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | strategies.text(),
        lambda inner: (
            strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(), inner, max_size=3)
        ),
        max_leaves=6,
    ),
    strategies.sampled_from(sorted(json.loads(RESERVED))),
)
def test_a_field_of_any_other_value_is_a_ledger_error_or_the_one_spelling(value: object, name: str) -> None:
    line = json.dumps(json.loads(RESERVED) | {name: value}, sort_keys=True, separators=(",", ":")).encode()

    assert spelled_again(line) in {line, None}


NO_NUMBERS = [math.nan, math.inf, -math.inf, -1.0, 0.0, -0.0, 5e-324, 1e-310, True, "0.1", None, 10**400]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("name", ["sampling_rate", "noise_multiplier", "clip_norm", "divisor"])
def test_a_spend_of_no_finite_positive_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(
        LedgerError, match=f"The field {name} of a record of kind reserve is .*; due is a finite number above 0"
    ):
        reserve(**{name: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0, 5e-324, True, None])
def test_a_sum_of_no_finite_positive_number_is_refused(value: Any) -> None:
    with pytest.raises(LedgerError, match="The field spent"):
        reserve(accounts=("1",), spent=(value,))


@pytest.mark.parametrize("value", [0, -1, 10**9 + 1, 2**70, True, 1.0, math.nan, "1", None])
@pytest.mark.parametrize("name", ["round", "steps"])
def test_a_count_out_of_its_range_is_refused(name: str, value: Any) -> None:
    with pytest.raises(LedgerError, match=f"The field {name} .* due is a whole number from 1 to 1000000000"):
        reserve(**{name: value})


@pytest.mark.parametrize("text", ["", " ", "a ", "a\nb", "a\x00", "\ud800", "\u202e", "x" * 201, b"a", 1, None])
def test_a_name_that_could_not_be_shown_is_refused(text: Any) -> None:
    with pytest.raises(LedgerError, match="The field run"):
        Bind(run=text, round=1, commitment=PREV)


def test_the_message_of_a_refused_value_is_short_and_ascii_whatever_the_value_is() -> None:
    endless: list[Any] = []
    endless.append(endless)
    values: tuple[Any, ...] = ("ü\ud800" * 10_000, 10**5000, endless, [b"\xff"] * 1000)

    for value in values:
        with pytest.raises(LedgerError) as caught:
            Bind(run=value, round=1, commitment=PREV)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 300


def test_a_whole_number_given_for_a_real_one_and_a_list_for_a_tuple_are_brought_to_the_one_spelling() -> None:
    entry = reserve(divisor=120, noise_multiplier=2, accounts=["1"], spent=[0.25])

    assert entry == reserve(accounts=("1",), spent=(0.25,))
    assert encode(entry, 7, PREV, NOW) == RESERVED
    assert type(entry.divisor) is float


def test_a_record_longer_than_the_limit_is_neither_written_nor_read() -> None:
    wide = reserve(accounts=tuple(map(str, range(10**8, 10**8 + 1000))), spent=(1.2345678901234567e-300,) * 1000)
    full = dataclasses.replace(wide, run="\U0001f600" * 200, data="\U0001f600" * 200, noise="\U0001f600" * 200)
    line = encode(full, 1, FIRST_PREV, NOW)
    assert len(line) < LARGEST_RECORD_BYTES
    assert decode(line).entry == full

    with pytest.raises(LedgerError, match="65537 bytes; 65536 are allowed"):
        decode(b" " * (LARGEST_RECORD_BYTES + 1))


@settings(max_examples=100)
@given(strategies.integers(0, LATEST))
def test_a_time_is_spelled_in_one_way(at: int) -> None:
    text = utc_text(at)

    assert utc_seconds(text) == at
    assert len(text) == len("2026-11-23T02:40:00Z")


@pytest.mark.parametrize("at", [-1, LATEST + 1, 1.0, True, 2**80])
def test_a_time_before_1970_or_after_9999_has_no_spelling(at: Any) -> None:
    with pytest.raises(LedgerError, match="Set this machine's clock"):
        utc_text(at)


@pytest.mark.parametrize(
    ("entry", "changes"),
    [
        (
            approval(),
            {
                "ledger": "1" * 32,
                "recovery": "2" * 32,
                "plan": ROSTER,
                "name": "b",
                "run": "b",
                "federation": "b",
                "data": "b",
                "epsilon": 1.0,
                "delta": 1e-6,
                "sampling_rate": 0.2,
                "noise_multiplier": 3.0,
                "clip_norm": 2.0,
                "steps_per_round": 5,
                "rounds": 41,
                "divisor": 1.0,
                "by": "b",
                "key": "1" * 64,
                "expires": "2027-01-01T00:00:01Z",
                "nonce": "3" * 32,
            },
        ),
        (
            renewal(),
            {
                "ledger": "1" * 32,
                "recovery": "2" * 32,
                "account": "2",
                "period": 3,
                "reason": "b",
                "by": "b",
                "key": "1" * 64,
            },
        ),
    ],
    ids=["approval", "renewal"],
)
def test_whoever_signs_signs_every_field(entry: Approval | Renewal, changes: dict[str, Any]) -> None:
    fields = {field.name for field in dataclasses.fields(entry)}
    assert fields == {*changes, "signature"}

    statements = {dataclasses.replace(entry, **{name: value}).statement() for name, value in changes.items()}

    assert len(statements | {entry.statement()}) == len(changes) + 1
    verify(STEWARD.public, entry.statement(), bytes.fromhex(entry.signature))


def test_approvals_agree_in_their_terms_whoever_gives_them_and_until_whenever() -> None:
    other = approval(STRANGER, by="Dr. Weiß", expires="2028-01-01T00:00:00Z")

    assert other.terms == approval().terms
    assert approval(rounds=41).terms != approval().terms


def test_both_keys_sign_a_rotation() -> None:
    entry = Rotation.between(LEDGER, SITE, STRANGER)

    statement = rotation_statement(LEDGER, SITE.public.hex(), STRANGER.public.hex())

    verify(SITE.public, statement, bytes.fromhex(entry.by_old))
    verify(STRANGER.public, statement, bytes.fromhex(entry.by_new))


def test_a_reserves_spend_is_less_by_the_steps_that_were_given_back() -> None:
    assert reserve().spend().steps == 4
    assert reserve().spend(3) == dataclasses.replace(reserve().spend(), steps=1)
    assert isinstance(SAMPLES[8], Reserve)
