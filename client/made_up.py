"""What the self-test runs on: rows that no site has, and weights away from a run's start, both from a fixed seed.

Rows are of unlike lengths, and one person has several. No torch is needed to make them.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from confide.common.adapter import Floats, Layout
from confide.common.examples import IGNORED, Examples, Ints
from confide.common.plan import CAUSAL, LANGUAGE, REGRESSION, TOKEN_CLASSES, Plan

SEED = 20_240_229
_OWNERS = (0, 1, 1, 2, 3, 1)
_PARTS = (1.0, 0.3, 0.6, 0.7, 0.45, 0.85)  # of the longest text
_LONGEST = 24
_FAR = 4.0  # where the answers of regression lie around, in standard deviations


def made_up_texts(plan: Plan, words: int, pad_token: int) -> Examples:
    """Return six random texts of four persons, one of whom has three, with random answers.

    Args:
        plan: The plan; its longest text bounds theirs.
        words: How many tokens the base model knows.
        pad_token: The one among them that no text holds.
    """
    longest = min(plan.model.max_tokens, _LONGEST)
    lengths = np.maximum(np.ceil(longest * np.array(_PARTS)).astype(np.int64), min(2, longest))
    return _texts(plan, words, pad_token, lengths, _OWNERS, np.random.default_rng(SEED))


def longest_text(plan: Plan, words: int, pad_token: int) -> Examples:
    """Return one random text of one person, as long as the plan lets texts be."""
    return _texts(plan, words, pad_token, np.array([plan.model.max_tokens]), (0,), np.random.default_rng(SEED + 1))


def made_up_images(plan: Plan, shape: tuple[int, int, int]) -> Examples:
    """Return six random images of four persons, one of whom has three, with random answers.

    Args:
        plan: The plan.
        shape: (channels, height, width).
    """
    random = np.random.default_rng(SEED)
    lengths = np.full(len(_OWNERS), math.prod(shape))
    pixels = random.integers(0, 256, int(lengths.sum()), dtype=np.uint8)
    return Examples(
        tokens=[pixels],
        store=np.zeros(len(lengths), np.int64),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        second=lengths,
        labels=_labels(plan, len(lengths), random),
        persons=np.array(_OWNERS, np.int64),
        pad_token=0,
        image=shape,
    )


def moved_away(layout: Layout, start: Floats, scales: Mapping[str, float]) -> Floats:
    """Return trained numbers away from the start of a run, where B and the head are 0 and gradients special.

    Args:
        layout: Their order.
        start: What the run starts with, (layout.length,), float32.
        scales: By how much a tensor is multiplied in the model, by name; 1 if it is not there.
    """
    random, vector = np.random.default_rng(SEED), start.copy()
    for name, part in layout.split(vector).items():  # views of it
        spread = (0.1 if part.ndim == 1 else 0.3 / math.sqrt(part.shape[-1])) / max(1.0, scales.get(name, 1.0))
        part[:] = part + random.normal(0, spread, part.shape)
    return vector


def _texts(
    plan: Plan, words: int, pad_token: int, lengths: Ints, owners: tuple[int, ...], random: np.random.Generator
) -> Examples:
    tokens = random.integers(0, words - 1, int(lengths.sum()), dtype=np.int32)
    tokens += tokens >= pad_token
    by_token = plan.task.kind in {*LANGUAGE, TOKEN_CLASSES}
    return Examples(
        tokens=[tokens],
        store=np.zeros(len(lengths), np.int64),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        second=np.where(np.arange(len(lengths)) % 2, lengths, lengths // 2),
        labels=_labels(plan, len(lengths), random),
        persons=np.array(owners, np.int64),
        pad_token=pad_token,
        targets=[_answers(plan, tokens, lengths, random)] if by_token else (),
    )


def _labels(plan: Plan, count: int, random: np.random.Generator) -> npt.NDArray[Any]:
    """Return an answer to each row.

    A number lies far from what the model says: near it the error would be small, and its rounding all of the gradient.
    """
    if plan.task.kind == REGRESSION:
        return (random.choice([-_FAR, _FAR], count) + random.normal(size=count)).astype(np.float32)
    return random.integers(0, max(1, len(plan.task.labels)), count)


def _answers(plan: Plan, tokens: npt.NDArray[np.int32], lengths: Ints, random: np.random.Generator) -> npt.NDArray[Any]:
    """Return an answer at each token; but for plain language models a third of the tokens has none, the last ones have."""
    kind = plan.task.kind
    answers = tokens.copy() if kind in LANGUAGE else random.integers(0, len(plan.task.labels), len(tokens))
    if kind != CAUSAL:
        silent = random.random(len(tokens)) < 1 / 3
        silent[np.cumsum(lengths) - 1] = False
        answers[silent] = IGNORED
    return answers.astype(np.int32)
