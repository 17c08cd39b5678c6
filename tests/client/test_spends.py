"""The record of spends: durable before training, never two costs for a round, and no way back into one that is over."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from confide.client.spends import SpendLog
from confide.common.errors import PrivacyError, Refused
from confide.common.spend import Spend

START = "sha256:" + "0" * 64
COMMITMENT = "sha256:" + "2" * 64


def spend(number: int, steps: int = 4, noise: str = "insecure_seeded_noise") -> Spend:
    return Spend(
        round=number,
        sampling_rate=0.1,
        noise_multiplier=0.7688,
        steps=steps,
        clip_norm=1.0,
        divisor=120.0,
        noise=noise,
    )


def test_a_reserved_spend_is_on_disk_when_reserve_returns(tmp_path: Path) -> None:
    path = tmp_path / "new" / "spends.jsonl"
    log = SpendLog(path)
    assert not path.exists()

    log.reserve(spend(1), START)

    assert SpendLog(path).spends == (spend(1),)
    assert json.loads(path.read_bytes()) == {
        "format": "confide-spend/1",
        "event": "reserve",
        "start": START,
        "roster": "",
        **dataclasses.asdict(spend(1)),
    }


def test_a_reserved_spend_outlives_the_process(tmp_path: Path) -> None:
    path = tmp_path / "spends.jsonl"
    program = (
        "import os, sys; from pathlib import Path; from confide.client.spends import SpendLog; "
        "from confide.common.spend import Spend; "
        f"SpendLog(Path(sys.argv[1])).reserve({spend(1)!r}, 'start'); os._exit(9)"
    )

    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)

    assert done.returncode == 9
    assert SpendLog(path).spends == (spend(1),)


EVENTS: dict[str, Callable[[SpendLog], None]] = {
    "reserve": lambda log: log.reserve(spend(1, noise="fresh"), START),
    "bind": lambda log: log.bind(1, COMMITMENT),
    "open": lambda log: log.open(1),
}


def after(path: Path | None, *events: str) -> SpendLog:
    """Return a record in which a round of fresh noise went through these events."""
    log = SpendLog(path)
    for event in events:
        EVENTS[event](log)
    return log


@pytest.mark.parametrize("event", EVENTS)
def test_every_event_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str) -> None:
    synced: list[bytes] = []
    path = tmp_path / "spends.jsonl"
    log = after(path, *itertools.takewhile(lambda earlier: earlier != event, EVENTS))
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.read_bytes()))

    EVENTS[event](log)

    assert synced[0] == path.read_bytes()
    assert json.loads(synced[0].splitlines()[-1])["event"] == event
    assert synced[0].endswith(b"\n")


def test_reserving_the_same_spend_again_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "spends.jsonl"
    log = SpendLog(path)
    log.reserve(spend(1), START)
    before = path.read_bytes()

    log.reserve(spend(1), START)
    SpendLog(path).reserve(spend(1), START)

    assert path.read_bytes() == before
    assert log.spends == (spend(1),)


def test_another_cost_for_a_recorded_round_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "spends.jsonl"
    SpendLog(path).reserve(spend(1), START)
    before = path.read_bytes()

    with pytest.raises(Refused, match="Round 1 was reserved before"):
        SpendLog(path).reserve(spend(1, steps=5), START)

    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("again", "start"),
    [
        (spend(1, noise="cryptographic"), START),  # fresh draws would average out
        (spend(1), "sha256:" + "1" * 64),  # the same draws on another adapter would cancel out
    ],
)
def test_a_round_is_trained_once_even_after_a_restart(tmp_path: Path, again: Spend, start: str) -> None:
    path = tmp_path / "spends.jsonl"
    SpendLog(path).reserve(dataclasses.replace(spend(1), noise=again.noise), START)

    with pytest.raises(Refused, match="a round is trained once, from one adapter"):
        SpendLog(path).reserve(again, start)


def test_rounds_do_not_go_back(tmp_path: Path) -> None:
    log = SpendLog(tmp_path / "spends.jsonl")
    log.reserve(spend(3), START)

    with pytest.raises(Refused, match="Round 2 is offered after round 3"):
        log.reserve(spend(2), START)


CONSEQUENCES = {
    "reserve": "Nothing was trained",
    "bind": "The round's vector is not used",
    "open": "The sum is not opened with this site's help",
}


@pytest.mark.parametrize("event", EVENTS)
def test_a_failed_write_leaves_the_record_whole_and_nothing_follows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str
) -> None:
    path = tmp_path / "spends.jsonl"
    log = after(path, *itertools.takewhile(lambda earlier: earlier != event, EVENTS))
    before = path.read_bytes() if path.exists() else b""

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(PrivacyError, match=rf"No space left on device\. {CONSEQUENCES[event]}"):
            EVENTS[event](log)
    with pytest.raises(PrivacyError, match="An earlier write"):
        EVENTS[event](log)

    assert path.read_bytes() == before
    assert SpendLog(path).spends == log.spends


def admitted(log: SpendLog, number: int, *, kept: bool = False) -> bool:
    try:
        log.admit(number, kept=kept)
    except Refused:
        return False
    return True


@pytest.mark.parametrize("again", [False, True], ids=["same process", "started anew"])
@pytest.mark.parametrize(
    ("events", "kept", "admits"),
    [
        ((), False, True),
        (("reserve",), False, False),
        (("reserve",), True, False),  # a vector that was never bound is not this round's
        (("reserve", "bind"), True, True),
        (("reserve", "bind"), False, False),
        (("reserve", "bind", "open"), True, False),
        (("reserve", "bind", "open"), False, False),
    ],
    ids=lambda value: "+".join(value) or "nothing" if isinstance(value, tuple) else str(value),
)
def test_a_site_takes_part_again_only_in_a_round_that_has_its_vector_and_was_not_opened(
    tmp_path: Path, events: tuple[str, ...], kept: bool, admits: bool, again: bool
) -> None:
    log = after(tmp_path / "spends.jsonl", *events)

    found = admitted(SpendLog(tmp_path / "spends.jsonl") if again else log, 1, kept=kept)

    assert found == admits


@pytest.mark.parametrize("again", [False, True], ids=["same process", "started anew"])
def test_a_round_ends_under_the_roster_it_was_begun_under(tmp_path: Path, again: bool) -> None:
    log = SpendLog(tmp_path / "spends.jsonl")
    log.reserve(spend(1, noise="fresh"), START, "sha256:one")
    log.bind(1, COMMITMENT)

    found = SpendLog(tmp_path / "spends.jsonl") if again else log

    found.admit(1, kept=True, roster="sha256:one")
    with pytest.raises(Refused, match="another roster"):
        found.admit(1, kept=True, roster="sha256:other")


def test_a_refusal_says_which_way_the_round_went(tmp_path: Path) -> None:
    with pytest.raises(
        Refused, match=r"The sum of round 1 was opened with this site's help; that happens once a round"
    ):
        after(None, *EVENTS).admit(1, kept=True)
    with pytest.raises(Refused, match="Round 1 was begun and its vector is gone; a round is trained once"):
        after(None, "reserve").admit(1, kept=False)


@pytest.mark.parametrize("again", [False, True], ids=["same process", "started anew"])
def test_no_earlier_round_is_entered_once_a_later_one_was_begun(tmp_path: Path, again: bool) -> None:
    log = after(tmp_path / "spends.jsonl", "reserve", "bind")
    log.reserve(spend(3), START)

    found = SpendLog(tmp_path / "spends.jsonl") if again else log

    for number in (1, 2):
        with pytest.raises(Refused, match=f"Round {number} is offered after round 3"):
            found.admit(number, kept=True)
    assert admitted(found, 3)
    assert admitted(found, 4)


def test_a_seeded_simulation_may_go_through_its_last_round_again(tmp_path: Path) -> None:
    log = SpendLog(tmp_path / "spends.jsonl")
    log.reserve(spend(1), START)
    log.bind(1, COMMITMENT)
    log.open(1)

    assert admitted(log, 1)
    assert admitted(SpendLog(tmp_path / "spends.jsonl"), 1)


def test_the_adapter_a_round_was_trained_from_is_known_after_a_restart(tmp_path: Path) -> None:
    log = after(tmp_path / "spends.jsonl", *EVENTS)

    starts = [(known.start(1), known.start(2)) for known in (log, SpendLog(tmp_path / "spends.jsonl"))]

    assert starts == [(START, None)] * 2


def test_spends_are_given_in_the_order_of_rounds(tmp_path: Path) -> None:
    log = SpendLog(tmp_path / "spends.jsonl")

    log.reserve(spend(1), START)
    log.reserve(spend(2), START)

    assert log.spends == (spend(1), spend(2))
    assert SpendLog(tmp_path / "spends.jsonl").spends == (spend(1), spend(2))


def test_a_record_without_a_file_is_kept_in_memory() -> None:
    log = SpendLog()

    log.reserve(spend(1), START)

    assert log.spends == (spend(1),)


def line(fields: dict[str, object]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def event(name: str, **fields: object) -> bytes:
    return line({"format": "confide-spend/1", "event": name, **fields})


def test_the_lines_below_are_damaged_by_what_was_changed_in_them(tmp_path: Path) -> None:
    path = tmp_path / "spends.jsonl"
    SpendLog(path).reserve(spend(1), START)
    reserved = event("reserve", start=START, roster="", **dataclasses.asdict(spend(2)))

    with path.open("ab") as stream:
        stream.write(reserved + event("bind", round=1, commitment=COMMITMENT) + event("open", round=1))

    assert SpendLog(path).spends == (spend(1), spend(2))


def lines() -> list[bytes]:
    base = {
        "format": "confide-spend/1",
        "event": "reserve",
        "start": START,
        "roster": "",
        **dataclasses.asdict(spend(2)),
    }

    def with_(**changes: object) -> bytes:
        return line({**base, **changes})

    whole = with_()
    return [
        b"\n",
        b"{}\n",
        b"[1]\n",
        b"null\n",
        b"\xff\n",
        b"[" * 5000 + b"\n",
        whole + whole,
        with_(format="confide-spend/2"),
        with_(steps=-1),
        with_(sampling_rate=2.0),
        with_(noise_multiplier=float("nan")),
        with_(steps="4"),
        with_(extra=1),
        with_(round=1),  # the round of the line before
        with_(round=1, steps=1),
        whole.replace(b",", b", "),
        whole.replace(b'"steps":4', b'"steps":400,"steps":4'),
        with_(event="spend"),
        with_(event="bind"),
        event("reserve", roster="", **dataclasses.asdict(spend(2))),
        event("bind", round=2, commitment=COMMITMENT),  # of a round that was not reserved
        event("bind", round=1),
        event("bind", commitment=COMMITMENT),
        event("bind", round=True, commitment=COMMITMENT),
        event("bind", round=1, commitment=5),
        event("bind", round=1, commitment=COMMITMENT, extra=1),
        event("open", round=2),
        event("open", round=1, extra=1),
        event("open"),
        line({"format": "confide-spend/1", "start": START, "roster": "", **dataclasses.asdict(spend(2))}),
    ]


@pytest.mark.parametrize("case", range(len(lines())))
def test_a_damaged_record_is_refused_whole(tmp_path: Path, case: int) -> None:
    path = tmp_path / "spends.jsonl"
    SpendLog(path).reserve(spend(1), START)
    with path.open("ab") as stream:
        stream.write(lines()[case])

    with pytest.raises(
        PrivacyError, match=r"Line [23] of the spend record .* is damaged, so what was spent is not known"
    ):
        SpendLog(path)


@pytest.mark.parametrize("left", [1, 20, -2])
def test_a_last_line_that_a_crash_cut_short_never_happened(tmp_path: Path, left: int) -> None:
    path = tmp_path / "spends.jsonl"
    SpendLog(path).reserve(spend(1, noise="fresh"), START)
    sound = path.read_bytes()
    path.write_bytes(sound + event("reserve", start=START, roster="", **dataclasses.asdict(spend(2)))[:left])

    log = SpendLog(path)

    assert log.spends == (spend(1, noise="fresh"),)
    assert path.read_bytes() == sound
    log.reserve(spend(2, noise="fresh"), START)
    assert len(SpendLog(path).spends) == 2


def test_a_last_line_that_lacks_nothing_but_its_end_counts(tmp_path: Path) -> None:
    path = tmp_path / "spends.jsonl"
    log = after(path, *EVENTS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])

    again = SpendLog(path)

    assert again.spends == log.spends
    assert path.read_bytes() == whole
    assert not admitted(again, 1, kept=True)
