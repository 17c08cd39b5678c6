"""The record of spends: durable before training, never two costs for a round."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from confide.client.spends import SpendLog
from confide.common.accounting import Spend
from confide.common.errors import PrivacyError, Refused

START = "sha256:" + "0" * 64


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
    assert json.loads(path.read_bytes())["format"] == "confide-spend/1"


def test_a_reserved_spend_outlives_the_process(tmp_path: Path) -> None:
    path = tmp_path / "spends.jsonl"
    program = (
        "import os, sys; from pathlib import Path; from confide.client.spends import SpendLog; "
        "from confide.common.accounting import Spend; "
        f"SpendLog(Path(sys.argv[1])).reserve({spend(1)!r}, 'start'); os._exit(9)"
    )

    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)

    assert done.returncode == 9
    assert SpendLog(path).spends == (spend(1),)


def test_reserve_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    path = tmp_path / "spends.jsonl"
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.read_bytes()))

    SpendLog(path).reserve(spend(1), START)

    assert synced[0] == path.read_bytes()
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


def test_a_failed_write_reserves_nothing_and_leaves_the_record_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "spends.jsonl"
    log = SpendLog(path)
    log.reserve(spend(1), START)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(PrivacyError, match=r"No space left on device\. Nothing was trained"):
            log.reserve(spend(2), START)
    with pytest.raises(PrivacyError, match="An earlier write"):
        log.reserve(spend(2), START)

    assert SpendLog(path).spends == (spend(1),)


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


def lines() -> list[bytes]:
    base = {"format": "confide-spend/1", "start": START, **dataclasses.asdict(spend(2))}

    def with_(**changes: object) -> bytes:
        return json.dumps({**base, **changes}, sort_keys=True, separators=(",", ":")).encode() + b"\n"

    whole = with_()
    return [
        b"\n",
        b"{}\n",
        b"[1]\n",
        b"null\n",
        b"\xff\n",
        b"[" * 5000 + b"\n",
        whole[:-20],
        whole[:-1],  # cut short just before its line break
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
    ]


@pytest.mark.parametrize("case", range(len(lines())))
def test_a_damaged_record_is_refused_whole(tmp_path: Path, case: int) -> None:
    path = tmp_path / "spends.jsonl"
    SpendLog(path).reserve(spend(1), START)
    with path.open("ab") as stream:
        stream.write(lines()[case])

    with pytest.raises(PrivacyError, match=r"Line [23] of the spend record .* is damaged. Restore the file"):
        SpendLog(path)
