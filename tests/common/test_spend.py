"""Spends: what no training has is refused, and the noise sampler is paid for."""

import dataclasses
import math
from typing import Any

import pytest

from confide.client.noise import DISTANCE_PER_DRAW as DISTANCE_OF_THE_SAMPLER
from confide.common.errors import PrivacyError
from confide.common.filter import MOST_EPSILON
from confide.common.renyi import rdp_check
from confide.common.spend import DISTANCE_PER_DRAW, RESERVED_FOR_NOISE, Spend
from tests.common.spending import SPEND, library_epsilon


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


def test_the_reserve_of_delta_pays_for_the_noise_sampler() -> None:
    draws, smallest_delta = 2.0**60, 1e-12

    shift = (1 + math.exp(MOST_EPSILON)) * draws * DISTANCE_PER_DRAW

    assert DISTANCE_PER_DRAW >= DISTANCE_OF_THE_SAMPLER
    assert shift < RESERVED_FOR_NOISE * smallest_delta
    assert rdp_check([SPEND], 1e-5) == pytest.approx(
        library_epsilon(0.1, 2.0, 40, 1e-5 * (1 - RESERVED_FOR_NOISE)), abs=1e-11
    )
