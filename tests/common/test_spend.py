"""Spends: what no training has is refused, a record is read as the site wrote it, the noise sampler is paid for."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from confide.client.noise import DISTANCE_PER_DRAW as DISTANCE_OF_THE_SAMPLER
from confide.client.spends import SpendLog
from confide.common.errors import PrivacyError
from confide.common.filter import MOST_EPSILON
from confide.common.renyi import rdp_check
from confide.common.spend import DISTANCE_PER_DRAW, RESERVED_FOR_NOISE, Spend, read_spent
from tests.common.spending import SPEND, library_epsilon, spend, spent_file

ONE = spend(0.1, 0.7688, 4)


def altered(key: str, value: object) -> Spend:
    changes: dict[str, Any] = {key: value}
    return dataclasses.replace(SPEND, **changes)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -1.0])
@pytest.mark.parametrize("key", ["sampling_rate", "noise_multiplier", "clip_norm", "divisor"])
def test_a_spend_that_is_no_training_is_refused(key: str, bad: float) -> None:
    with pytest.raises(PrivacyError, match="No training costs what this says"):
        altered(key, bad)


@pytest.mark.parametrize(("key", "bad"), [("sampling_rate", 1.0000001), ("steps", 0), ("steps", -1), ("round", 0)])
def test_a_spend_beyond_its_limits_is_refused(key: str, bad: float) -> None:
    with pytest.raises(PrivacyError, match="No training costs what this says"):
        altered(key, bad)


def test_a_torn_last_line_never_happened_unless_it_lacks_only_its_end(tmp_path: Path) -> None:
    path = spent_file(tmp_path, ONE, 2)
    whole = path.read_bytes()
    extra = dataclasses.replace(ONE, round=3)
    SpendLog(path).reserve(extra, "sha256:" + "0" * 64)
    longer = path.read_bytes()

    for cut, rounds in ((len(whole) + 20, 2), (len(longer) - 1, 3), (len(longer), 3)):
        path.write_bytes(longer[:cut])
        assert len(read_spent(path)) == rounds


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw.replace(b'"steps":4', b'"steps":0', 1),
        lambda raw: raw.replace(b'"steps":4', b'"steps":4.0', 1),
        lambda raw: raw.replace(b'"round":1', b'"round":true', 1),
        lambda raw: raw.replace(b'"round":2', b'"round":1'),
        lambda raw: raw.replace(b'"sampling_rate":0.1', b'"sampling_rate":"0.1"', 1),
        lambda raw: raw.replace(b'"noise_multiplier":', b'"noise_multiplier": ', 1),
        lambda raw: raw.replace(b"confide-spend/1", b"confide-spend/2", 1),
        lambda raw: b"\n" + raw,
        lambda raw: b"[]\n" + raw,
        lambda raw: raw[1:],
    ],
)
def test_a_damaged_record_of_spends_is_refused(spoil: Any, tmp_path: Path) -> None:
    path = spent_file(tmp_path, ONE, 2)
    spoiled = spoil(path.read_bytes())
    assert spoiled != path.read_bytes()
    path.write_bytes(spoiled)

    with pytest.raises(PrivacyError, match=r"Line \d of the spend record .* is damaged"):
        read_spent(path)


def test_the_reserve_of_delta_pays_for_the_noise_sampler() -> None:
    draws, smallest_delta = 2.0**60, 1e-12

    shift = (1 + math.exp(MOST_EPSILON)) * draws * DISTANCE_PER_DRAW

    assert DISTANCE_PER_DRAW >= DISTANCE_OF_THE_SAMPLER
    assert shift < RESERVED_FOR_NOISE * smallest_delta
    assert rdp_check([SPEND], 1e-5) == pytest.approx(
        library_epsilon(0.1, 2.0, 40, 1e-5 * (1 - RESERVED_FOR_NOISE)), abs=1e-11
    )
