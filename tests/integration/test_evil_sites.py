"""Sites that break the rules, and sites that die, against an honest server: it loses such a site and no other."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from confide.client.kept import Kept
from confide.common.crypto import AgreementKey
from confide.common.errors import Refused
from confide.common.messages import (
    LARGEST_BODY_BYTES,
    Advertisement,
    Confirmation,
    Contribution,
    Envelope,
    Failure,
    MaskedVector,
    Message,
    Opening,
    Survivors,
    seal,
    vector_digest,
)
from confide.common.ring import RingVector
from confide.common.shamir import SHARE_BYTES
from tests.cohorts import EXCHANGES
from tests.evil import (
    START,
    Death,
    EvilServer,
    Hospital,
    Killed,
    Part,
    Round,
    Spoil,
    assert_nothing_revealed,
    before,
    opened,
    plan_for,
    spoiled,
    spoken,
    trainings,
)

ROGUE = "site-00"
NO_KEYS = b"\xfe" * SHARE_BYTES  # beyond the field


def others(server: EvilServer) -> tuple[str, ...]:
    return tuple(site for site in server.names if site != ROGUE)


def change(**fields: Any) -> Spoil:
    return lambda part, message: dataclasses.replace(message, **fields)


def garbage_vector(part: Part, message: Any) -> Any:
    words = np.frombuffer(os.urandom(message.vector.words.nbytes), np.uint32)
    return dataclasses.replace(message, vector=MaskedVector(words=words))


def test_a_garbage_vector_voids_the_round_and_names_nobody() -> None:
    server = EvilServer(4)
    wire = Round(server, {(ROGUE, "contribute"): garbage_vector})

    record = wire.run()

    assert "cannot be the sum of 4 honest vectors" in record.void
    assert ROGUE not in record.void
    assert (record.present, dict(record.missing), record.attempts) == ((), {}, 1)
    assert record.adapter == record.parent == vector_digest(START)
    assert wire.state.adapter.tobytes() == START.tobytes()
    wire.rogues = {}
    assert wire.run(2).present == server.names
    assert wire.sums_are_exact


def dealt_wrongly(receivers: int, shares: Callable[[], bytes]) -> Spoil:
    """Return a dealer who gives its first receivers boxes that open well, with other shares in them."""

    def spoil(part: Part, message: Any) -> Any:
        size, head = part.attempt.box_bytes, 32
        raw = bytearray(message.sealed)
        assert part.gathering is not None
        keys = part.side._keys
        assert keys is not None
        for number, peer in enumerate(part.gathering.neighbours[part.place][:receivers]):
            box = part.side._sealed(keys, peer, shares())
            raw[head + number * size : head + (number + 1) * size] = box
        return dataclasses.replace(message, sealed=bytes(raw))

    return spoil


WRONG_SHARES = {
    "random": lambda: b"\0" + os.urandom(32) + b"\0" + os.urandom(32),
    "beyond the field": lambda: NO_KEYS + NO_KEYS,
    "that say there is none": lambda: b"\xff" * 2 * SHARE_BYTES,
}


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("shares", WRONG_SHARES)
def test_shares_dealt_wrongly_to_as_many_as_may_be_missing_do_no_harm(shares: str, drops: bool) -> None:
    server = EvilServer(7)  # five of seven shares are needed; one who drops out does not give its own
    wrong = 1 if drops else 2
    rogues: dict[tuple[str, str], Spoil] = {(ROGUE, "share"): dealt_wrongly(wrong, WRONG_SHARES[shares])}
    if drops:
        rogues[ROGUE, "contribute"] = lambda part, message: []
    wire = Round(server, rogues)

    record = wire.run()

    # Those who hold the wrong shares are named, although the dealer is to blame: it is a lead and no proof.
    named = () if shares == "that say there is none" else server.names[1 : 1 + wrong]
    assert dict(record.missing) == dict.fromkeys(named, "open: wrong shares") | (
        {ROGUE: "contribute: no answer"} if drops else {}
    )
    assert record.present == (others(server) if drops else server.names)
    assert wire.sums_are_exact


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("shares", WRONG_SHARES)
def test_shares_dealt_wrongly_to_more_void_the_round_which_names_the_dealer(shares: str, drops: bool) -> None:
    server = EvilServer(7)
    wrong = 2 if drops else 3
    rogues: dict[tuple[str, str], Spoil] = {(ROGUE, "share"): dealt_wrongly(wrong, WRONG_SHARES[shares])}
    if drops:
        rogues[ROGUE, "contribute"] = lambda part, message: []
    wire = Round(server, rogues)

    record = wire.run()

    assert f"A secret of site {ROGUE} is lost" in record.void
    assert dict(record.missing) == ({ROGUE: "contribute: no answer"} if drops else {})
    assert record.adapter == record.parent
    assert record.attempts == 1
    assert_nothing_revealed(server, (1, frozenset(others(server) if drops else server.names)))


def revealed_wrongly(part: Part, message: Any) -> Any:
    count = len(message.shares) // SHARE_BYTES
    return dataclasses.replace(message, shares=b"".join(b"\0" + os.urandom(32) for _ in range(count)))


@pytest.mark.parametrize(("count", "wrong"), [(4, 1), (5, 1), (7, 1), (7, 2), (10, 3)])
def test_wrong_shares_revealed_by_as_many_as_may_be_missing_leave_the_sum_exact_and_are_named(
    count: int, wrong: int
) -> None:
    server = EvilServer(count)
    wire = Round(server, {(site, "open"): revealed_wrongly for site in server.names[:wrong]})

    record = wire.run()

    assert wire.sums_are_exact
    assert record.present == server.names
    assert dict(record.missing) == dict.fromkeys(server.names[:wrong], "open: wrong shares")


@pytest.mark.parametrize(("count", "wrong"), [(3, 1), (4, 2), (7, 3)])
def test_wrong_shares_revealed_by_more_void_the_round(count: int, wrong: int) -> None:
    server = EvilServer(count)
    wire = Round(server, {(site, "open"): revealed_wrongly for site in server.names[:wrong]})

    record = wire.run()

    assert "is lost" in record.void
    assert (record.present, record.adapter) == ((), record.parent)
    assert record.attempts == 1


def low_order(which: int) -> Spoil:
    def spoil(part: Part, message: Any) -> Any:
        keys = [AgreementKey.generate().public, AgreementKey.generate().public]
        keys[which] = b"\1" + bytes(31)
        return advertised(part, b"".join(keys))

    return spoil


def advertised(part: Part, public: bytes) -> Message:
    signature = part.side._identity.sign(part.attempt.advertised(part.place, public))
    return Advertisement(context=part.attempt.pre.hex(), keys=public + signature)


def one_key_twice(part: Part, message: Any) -> Any:
    return advertised(part, 2 * message.keys[:32])


BAD_ADVERTISEMENTS: dict[str, Spoil] = {
    "a box key of low order": low_order(0),
    "a mask key of low order": low_order(1),
    "one key twice": one_key_twice,
    "a forged signature": lambda part, message: dataclasses.replace(message, keys=message.keys[:-64] + bytes(64)),
    "no keys": change(keys=b""),
    "another attempt's": change(context="0" * 64),
}


@pytest.mark.parametrize("case", BAD_ADVERTISEMENTS)
def test_a_site_with_unfit_keys_is_lost_at_once_and_no_other(case: str) -> None:
    server = EvilServer(4)
    wire = Round(server, {(ROGUE, "advertise"): BAD_ADVERTISEMENTS[case]})

    record = wire.run()

    assert dict(record.missing) == {ROGUE: "advertise: MessageError"}
    assert record.present == others(server)
    assert wire.sums_are_exact
    assert trainings(server)[ROGUE] == 0


def test_a_site_that_repeats_anothers_keys_is_lost_and_not_the_other() -> None:
    server = EvilServer(4)
    copied: list[bytes] = []

    def heard(part: Part, message: Any) -> Any:
        copied.append(message.keys[:64])
        return message

    wire = Round(
        server,
        {
            (ROGUE, "advertise"): heard,
            ("site-03", "advertise"): lambda part, message: advertised(part, copied[0]),
        },
    )

    record = wire.run()

    assert dict(record.missing) == {"site-03": "advertise: MessageError"}
    assert wire.sums_are_exact


def signs(survivors: bytes) -> Spoil:
    def spoil(part: Part, message: Any) -> Any:
        assert part.gathering is not None
        return dataclasses.replace(message, signature=part.side._identity.sign(part.gathering.confirmed(survivors)))

    return spoil


BAD_CONFIRMATIONS: dict[str, Spoil] = {
    "forged": change(signature=bytes(64)),
    "too short": change(signature=b""),
    "of other survivors": signs(b"\0\0\0\1\0\2"),
    "of another attempt": change(context="0" * 64),
}


@pytest.mark.parametrize("case", BAD_CONFIRMATIONS)
def test_a_site_with_a_wrong_signature_is_lost_and_its_vector_stays_in_the_sum(case: str) -> None:
    server = EvilServer(4)
    wire = Round(server, {(ROGUE, "confirm"): BAD_CONFIRMATIONS[case]})

    record = wire.run()

    assert dict(record.missing) == {ROGUE: "confirm: MessageError"}
    assert record.present == server.names
    assert wire.sums_are_exact


BAD_ENVELOPES: dict[str, Callable[[Envelope], Envelope]] = {
    "oversized": lambda envelope: dataclasses.replace(envelope, body=envelope.body + bytes(LARGEST_BODY_BYTES)),
    "a byte too long": lambda envelope: dataclasses.replace(envelope, body=envelope.body + b"?"),
    "a byte too short": lambda envelope: dataclasses.replace(envelope, body=envelope.body[:-1]),
    "cut in half": lambda envelope: dataclasses.replace(envelope, body=envelope.body[: len(envelope.body) // 2]),
    "empty": lambda envelope: Envelope(body=b""),
    "with no vector or one too many": lambda envelope: Envelope(
        body=envelope.body, vector=np.zeros(7, np.uint32) if envelope.vector is None else None
    ),
    "with a vector of another length": lambda envelope: Envelope(body=envelope.body, vector=np.zeros(8, np.uint32)),
    "with a vector of another type": lambda envelope: Envelope(
        body=envelope.body,
        vector=np.zeros(7, np.float64),
    ),
    "an answer of another kind": lambda envelope: seal(
        Confirmation(context="", signature=b"")
        if b'"confirmation"' not in envelope.body
        else Opening(context="", shares=b"")
    ),
    "a question": lambda envelope: seal(Survivors(context="", sites=b"")),
}


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("case", BAD_ENVELOPES)
def test_a_site_that_sends_something_else_than_is_due_is_lost_there_and_no_other(case: str, exchange: str) -> None:
    server = EvilServer(4)
    wire = Round(server, {(ROGUE, exchange): lambda part, message: BAD_ENVELOPES[case](seal(message))})

    record = wire.run()

    assert dict(record.missing) == {ROGUE: f"{exchange}: MessageError"}
    assert record.present == (server.names if exchange in ("confirm", "open") else others(server))
    assert record.attempts == 1
    assert wire.sums_are_exact
    assert_nothing_revealed(server, (1, frozenset(record.present)))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_site_that_answers_twice_is_heard_once(exchange: str) -> None:
    server = EvilServer(4)
    wire = Round(server, {(ROGUE, exchange): lambda part, message: [message, message, seal(message)]})

    record = wire.run()

    assert (record.present, dict(record.missing)) == (server.names, {})
    assert wire.sums_are_exact


def test_a_box_of_another_length_loses_its_sender() -> None:
    server = EvilServer(4)
    wire = Round(
        server,
        {(ROGUE, "share"): lambda part, message: dataclasses.replace(message, sealed=message.sealed[:-82])},
    )

    assert dict(wire.run().missing) == {ROGUE: "share: MessageError"}
    assert wire.sums_are_exact


def test_with_three_sites_boxes_that_do_not_open_void_the_round_before_anybody_trains() -> None:
    server = EvilServer(3)
    size = 32 + 2 * 82
    wire = Round(server, {(ROGUE, "share"): change(sealed=bytes(size))})

    record = wire.run()

    # The record names those who refused: the boxes are sealed, so the server cannot see whose fault it is.
    assert dict(record.missing) == dict.fromkeys(others(server), "contribute: Refused")
    assert record.adapter == record.parent
    assert trainings(server) == {ROGUE: 1} | dict.fromkeys(others(server), 0)


@pytest.mark.parametrize("text", ["<b>", "no answer", "x" * 200])
def test_what_a_site_calls_its_failure_is_recorded_only_if_it_is_a_class_of_error(text: str) -> None:
    server = EvilServer(4)
    wire = Round(server, {(ROGUE, "contribute"): lambda part, message: Failure(error=text, sentence=text)})

    assert dict(wire.run().missing) == {ROGUE: "contribute: MessageError"}


@settings(max_examples=120)
@given(strategies.data())
def test_whatever_a_site_sends_the_sum_of_the_others_is_exact_or_the_round_is_void(data: strategies.DataObject) -> None:
    exchange = data.draw(strategies.sampled_from(EXCHANGES))
    server = EvilServer(4)
    wire = Round(server, {(ROGUE, exchange): lambda part, message: data.draw(spoiled(seal(message)))})

    record = wire.run()

    if record.void:
        assert record.adapter == record.parent
        assert exchange in ("share", "contribute")  # garbage of the right length; else a quorum can do without it
    else:
        assert set(record.missing) <= {ROGUE}
        assert set(others(server)) <= set(record.present)
        assert wire.sums_are_exact


def in_training(hospital: Hospital) -> None:
    """End in the middle of training: the round is reserved, and there is no vector."""

    def dies() -> None:
        hospital.trainer.dies = lambda: None
        raise Killed

    hospital.trainer.dies = dies


class Dying(Kept):
    """Ends once the vector is on disk, before that is recorded."""

    def put(self, number: int, vector: RingVector) -> str:
        super().put(number, vector)
        raise Killed


def before_binding(hospital: Hospital) -> None:
    assert hospital.disk("kept") is not None
    hospital.agent._kept = Dying(hospital.disk("kept"), bytes(range(32)), hospital.agent._run)


class Clinging(Kept):
    """Ends when it should let go of a vector."""

    def forget_all_but(self, number: int) -> None:
        raise Killed


def while_letting_go(hospital: Hospital) -> None:
    """End once it is recorded that the sum is opened, with the vector still on disk."""
    hospital.agent._kept = Clinging(hospital.disk("kept"), bytes(range(32)), hospital.agent._run)


def once_answered(hospital: Hospital) -> None:
    """End when the answer is made; it never leaves."""


DEATHS: dict[str, tuple[str, Death]] = {
    "before it heard the offer": ("advertise", before),
    "before it shared": ("share", before),
    "after it shared": ("share", once_answered),
    "before it trained": ("contribute", before),
    "in training": ("contribute", in_training),
    "before the vector was recorded": ("contribute", before_binding),
    "after the vector was recorded": ("contribute", once_answered),
    "after it confirmed": ("confirm", once_answered),
    "before it opened": ("open", before),
    "before it let go of the vector": ("open", while_letting_go),
    "after it opened": ("open", once_answered),
}
IN_THE_SUM = ("confirm", "open")
VECTOR_LOST = ("in training", "before the vector was recorded")


@pytest.mark.parametrize("case", DEATHS)
def test_a_site_that_dies_is_a_dropout_of_that_attempt_and_takes_part_in_the_next_round(
    case: str, tmp_path: Path
) -> None:
    server = EvilServer(4, folder=tmp_path)
    exchange, death = DEATHS[case]
    wire = Round(server, deaths={(ROGUE, 1, exchange): death})

    first = wire.run()
    exact = wire.sums_are_exact
    wire.deaths = {}
    second = wire.run(2)

    assert dict(first.missing) == {ROGUE: f"{exchange}: no answer"}
    assert first.present == (server.names if exchange in IN_THE_SUM else others(server))
    assert exact
    assert (second.present, dict(second.missing)) == (server.names, {})
    assert wire.sums_are_exact
    trained = 1 if (death is before and exchange not in IN_THE_SUM) or exchange == "share" else 2
    assert trainings(server) == {ROGUE: trained} | dict.fromkeys(others(server), 2)
    assert_nothing_revealed(server, (1, frozenset(first.present)), (2, frozenset(server.names)))


@pytest.mark.parametrize("case", DEATHS)
def test_what_a_site_that_died_may_do_in_the_next_attempt(case: str, tmp_path: Path) -> None:
    """Two die, so that of four too few are left and there is a second attempt, which both are asked to."""
    server = EvilServer(4, folder=tmp_path)
    exchange, death = DEATHS[case]
    wire = Round(server, deaths={(site, 1, exchange): death for site in server.names[:2]})

    record = wire.run()
    hospital = server.hospitals[ROGUE]

    if exchange == "open":  # some have opened: there is no further attempt
        assert (record.attempts, record.present) == (1, ())
        assert dict(record.missing) == dict.fromkeys(server.names[:2], "open: no answer")
    elif case in VECTOR_LOST:
        assert (record.attempts, record.present) == (2, ())
        assert dict(record.missing) == dict.fromkeys(server.names[:2], "advertise: Refused")
    else:
        assert (record.attempts, record.present, dict(record.missing)) == (2, server.names, {})
        assert wire.sums_are_exact
    assert set(trainings(server).values()) == {1}
    vectors = [part.vector.tobytes() for part in hospital.parts if part.vector is not None]
    assert len(set(vectors)) <= 1
    sent = [seal(message).vector for message in spoken(hospital, Contribution)]
    assert len({words.tobytes() for words in sent if words is not None}) == len(sent)
    assert_nothing_revealed(server, *opened(server))


@pytest.mark.parametrize("death", [once_answered, while_letting_go])
def test_a_site_that_opened_and_died_refuses_every_further_attempt_at_the_round(death: Death, tmp_path: Path) -> None:
    server = EvilServer(4, folder=tmp_path)
    Round(server, deaths={(ROGUE, 1, "open"): death}).run()
    hospital = server.hospitals[ROGUE]

    left = len(list((tmp_path / ROGUE / "kept").iterdir()))
    answers = [hospital.asked(server.offer(attempt=attempt)) for attempt in (1, 2, 3)]

    assert all(isinstance(answer, Failure) and answer.error == "Refused" for answer in answers)
    assert hospital.trained == 1
    assert left == (0 if death is once_answered else 1)


def test_a_site_whose_vector_is_in_memory_only_sits_the_round_out_after_a_restart(tmp_path: Path) -> None:
    server = EvilServer(4, folder=tmp_path)
    for hospital in server.hospitals.values():
        hospital.kept = Kept
        hospital.restart()
    wire = Round(server, deaths={(site, 1, "confirm"): before for site in server.names[:2]})

    record = wire.run()

    assert dict(record.missing) == dict.fromkeys(server.names[:2], "advertise: Refused")
    assert set(trainings(server).values()) == {1}


@pytest.mark.parametrize("damage", ["another key", "another run", "cut", "changed"])
def test_a_site_that_cannot_read_its_vector_any_more_says_so_and_does_not_train(damage: str, tmp_path: Path) -> None:
    server = EvilServer(4, folder=tmp_path)
    hospital = server.hospitals[ROGUE]

    def damaged(_: Hospital) -> None:
        (path,) = (tmp_path / ROGUE / "kept").glob("*.vector")
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:-1])
        if damage == "changed":
            path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
        key = bytes(32) if damage == "another key" else bytes(range(32))
        run = "another" if damage == "another run" else server.run
        hospital.kept = lambda: Kept(tmp_path / ROGUE / "kept", key, run)
        raise Killed

    wire = Round(server, deaths={(ROGUE, 1, "confirm"): damaged, ("site-01", 1, "confirm"): before})
    record = wire.run()

    assert record.attempts == 2
    assert dict(record.missing) == {ROGUE: "contribute: SealError"}
    assert record.present == others(server)
    assert wire.sums_are_exact
    assert hospital.trained == 1


def test_a_second_attempt_asks_the_silent_again_sums_who_came_back_and_records_who_was_lost_where(
    tmp_path: Path,
) -> None:
    server = EvilServer(5, folder=tmp_path)  # four are needed
    a, b, c, d, e = server.names
    wire = Round(server, deaths={(d, 1, "contribute"): once_answered, (e, 1, "contribute"): in_training})

    record = wire.run()

    assert [dict(attempt.missing) for attempt in wire.summation.collected] == [
        {d: "contribute: no answer", e: "contribute: no answer"},
        {e: "advertise: Refused"},
    ]
    assert [attempt.again for attempt in wire.summation.collected] == [server.names, ()]
    assert (record.attempts, record.present, record.void) == (2, (a, b, c, d), "")
    assert dict(record.missing) == {e: "advertise: Refused"}
    assert wire.sums_are_exact
    assert set(trainings(server).values()) == {1}
    first, second = (part.vector for part in server.hospitals[d].parts)
    assert first is not None
    assert second is not None
    assert first.tobytes() == second.tobytes()
    assert_nothing_revealed(server, (1, frozenset((a, b, c, d))))
    wire.deaths = {}
    assert wire.run(2).present == server.names
    assert trainings(server) == dict.fromkeys(server.names, 2)


def test_two_attempts_that_fail_leave_the_adapter_as_it_was_and_no_site_trained_twice(tmp_path: Path) -> None:
    server = EvilServer(7, folder=tmp_path, plan=plan_for(min_sites=3))  # of seven, five are needed
    silent = server.names[4:]
    deaths: dict[tuple[str, int, str], Death | None] = {(site, 1, "confirm"): before for site in silent}
    deaths |= {(site, 2, "contribute"): once_answered for site in silent}
    wire = Round(server, deaths=deaths)

    record = wire.run()

    assert [attempt.again for attempt in wire.summation.collected] == [server.names, server.names]
    assert (record.attempts, record.present) == (2, ())
    assert dict(record.missing) == dict.fromkeys(silent, "contribute: no answer")
    assert "4 of a cohort of 7 sites were left; 5 are needed" in record.void
    assert record.adapter == record.parent == vector_digest(START)
    assert wire.state.adapter.tobytes() == START.tobytes()
    assert set(trainings(server).values()) == {1}
    assert_nothing_revealed(server)
    wire.deaths = {}
    assert wire.run(2).present == server.names
    assert wire.sums_are_exact
    assert trainings(server) == dict.fromkeys(server.names, 2)
    assert_nothing_revealed(server, (2, frozenset(server.names)))


UNFIT: dict[str, Spoil] = {
    "garbage": lambda part, message: Envelope(body=b"?"),
    "a refusal": lambda part, message: Failure.of(Refused("no")),
    "a failure that calls itself silence": lambda part, message: Failure(error="no answer", sentence="no answer"),
}


@pytest.mark.parametrize("exchange", EXCHANGES[:-1])
@pytest.mark.parametrize("case", UNFIT)
def test_who_sent_something_unfit_is_not_asked_again_and_who_fell_silent_is(
    case: str, exchange: str, tmp_path: Path
) -> None:
    server = EvilServer(7, folder=tmp_path)  # of seven, five are needed
    deaths: dict[tuple[str, int, str], Death | None] = {(site, 1, exchange): before for site in server.names[5:]}
    wire = Round(server, {(ROGUE, exchange): UNFIT[case]}, deaths)

    record = wire.run()

    why = "Refused" if case == "a refusal" else "MessageError"
    assert wire.summation.collected[0].again == others(server)
    assert (record.attempts, record.present) == (2, others(server))
    assert dict(record.missing) == {ROGUE: f"{exchange}: {why}"}
    assert wire.sums_are_exact
    assert {site: trained for site, trained in trainings(server).items() if site != ROGUE} == dict.fromkeys(
        others(server), 1
    )
    assert_nothing_revealed(server, (1, frozenset(others(server))))


@pytest.mark.parametrize("exchange", EXCHANGES[:-1])
def test_there_is_no_second_attempt_if_too_few_would_be_asked(exchange: str) -> None:
    server = EvilServer(7)
    wire = Round(server, {(site, exchange): UNFIT["garbage"] for site in server.names[:3]})

    record = wire.run()

    assert [attempt.again for attempt in wire.summation.collected] == [()]
    assert (record.attempts, record.present, record.adapter) == (1, (), record.parent)
    assert dict(record.missing) == dict.fromkeys(server.names[:3], f"{exchange}: MessageError")
    assert set(trainings(server).values()) == ({1} if exchange in ("contribute", "confirm") else {0})
    assert_nothing_revealed(server)
