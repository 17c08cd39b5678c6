"""Per-person gradients on every family of models and kind of task: equal to a loop over single rows, whatever the batch."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies
from torch.nn import functional as F

from confide.client.gradients import GRID_BITS, PersonGradients, _grid_sum
from confide.common.examples import Batch, Examples, Ints
from confide.common.model import AdaptedModel, attach
from confide.common.plan import (
    ALTERNATE,
    CAUSAL,
    FEDIT,
    FFA,
    IMAGE_CLASSES,
    MASKED,
    R_ONLY,
    REGRESSION,
    SHARE_A,
    TEXT_CLASSES,
    TOKEN_CLASSES,
)
from confide.common.prefix import PrefixCache
from tests.families import (
    PAIRS,
    WORDS,
    FloatArray,
    make_examples,
    make_model,
    make_plan,
    move,
    person_gradients,
    row_gradients,
    save_base,
    tolerance,
)

PERSONS = 5
EVERYONE = np.arange(PERSONS)
FAMILY_AND_KIND = pytest.mark.parametrize(("family", "kind"), PAIRS)
Build = Callable[..., AdaptedModel]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Return a maker of tiny models that makes each once."""
    return functools.cache(functools.partial(make_model, tmp_path_factory.mktemp("families")))


def off(found: FloatArray, expected: FloatArray) -> float:
    """Return the error relative to the length."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def clipped(lines: FloatArray, clip_norm: float) -> FloatArray:
    total: FloatArray = (lines * np.minimum(1, clip_norm / np.linalg.norm(lines, axis=1))[:, None]).sum(axis=0)
    return total


def filled(cache: PrefixCache, examples: Examples) -> PrefixCache:
    assert list(cache.add(examples))[-1] == len(examples)
    return cache


@FAMILY_AND_KIND
def test_gradients_and_their_clipped_sum_equal_a_loop_over_single_rows(family: str, kind: str, build: Build) -> None:
    model, examples = build(family, kind), make_examples(kind, persons=PERSONS)
    loop = person_gradients(model, examples)
    clip = 1.0001 * float(np.median(np.linalg.norm(loop, axis=1)))  # some persons are clipped and some are not

    for micro_batch in (1, 4, 64):  # the first two cut persons
        gradients = PersonGradients(model, examples, micro_batch=micro_batch)
        exact, total = gradients.insecure_sum(EVERYONE), gradients.clipped_sum(EVERYONE, clip)

        assert off(exact, loop.sum(axis=0)) <= tolerance(family)
        assert off(total.values, clipped(loop, clip)) <= max(1e-6, tolerance(family))
        assert 0 < total.clipped == (np.linalg.norm(loop, axis=1) > clip).sum() < PERSONS
        assert total.non_finite == 0


@FAMILY_AND_KIND
def test_a_cached_prefix_gives_the_same_gradients(family: str, kind: str, build: Build) -> None:
    model, examples = build(family, kind, top_layers=1), make_examples(kind, persons=PERSONS)
    cache = filled(PrefixCache(model, micro_batch=4), examples)

    found = PersonGradients(model, examples, cache=cache, micro_batch=4).insecure_sum(EVERYONE)

    assert off(found, person_gradients(model, examples).sum(axis=0)) <= tolerance(family)


@FAMILY_AND_KIND
def test_rows_beside_it_and_their_padding_change_no_rows_gradient(family: str, kind: str, build: Build) -> None:
    model, examples = build(family, kind), make_examples(kind)
    gradients, rows = PersonGradients(model, examples), np.arange(len(examples))
    alone = np.stack([gradients.insecure_sum(rows[[row]]) for row in rows])
    everyone = gradients.insecure_sum(rows)

    without = np.stack([gradients.insecure_sum(np.delete(rows, row)) for row in rows])

    slack = tolerance(family) * np.linalg.norm(alone, axis=1).max() * len(rows)
    assert np.abs(everyone - without - alone).max() <= slack
    shortest, longest = rows[[examples.lengths.argmin()]], rows[[examples.lengths.argmax()]]
    beside = gradients.insecure_sum(np.concatenate([shortest, longest]))  # the shortest, padded as far as it goes
    assert np.abs(beside - alone[longest[0]] - alone[shortest[0]]).max() <= slack


@pytest.mark.parametrize(("family", "kind"), [("bert", TEXT_CLASSES), ("llama", CAUSAL), ("gpt2", CAUSAL)])
@pytest.mark.parametrize("method", [FFA, FEDIT, ALTERNATE, SHARE_A, R_ONLY])
def test_every_method_equals_the_loop_in_odd_and_even_rounds(method: str, family: str, kind: str, build: Build) -> None:
    model, examples = build(family, kind, method=method), make_examples(kind, persons=PERSONS)
    letters = {FFA: "B", R_ONLY: "R"}.get(method, "AB")

    for number in (1, 2):
        active = model.active(number)
        found = PersonGradients(model, examples, micro_batch=4).insecure_sum(EVERYONE, active)

        assert off(found, person_gradients(model, examples, active).sum(axis=0)) <= tolerance(family)
        turn = letters if method != ALTERNATE else "BA"[number - 1]
        assert {name.split(".")[-2] for name in active if name not in model.head} == {f"lora_{c}" for c in turn}
        assert model.head <= set(active)


@pytest.mark.parametrize(("family", "kind"), [("bert", TEXT_CLASSES), ("llama", CAUSAL), ("vit", IMAGE_CLASSES)])
def test_an_empty_batch_gives_zeros_without_a_forward_pass(
    family: str, kind: str, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family, kind)
    gradients = PersonGradients(model, make_examples(kind))
    monkeypatch.setattr(model, "forward", None)

    total = gradients.clipped_sum(np.array([], np.int64), 1.0)

    assert total.steps.shape == (model.layout.length,)
    assert not total.steps.any()


def test_a_layer_gone_through_many_times_adds_up(build: Build) -> None:
    model, examples = build("albert", TEXT_CLASSES), make_examples(TEXT_CLASSES, persons=PERSONS)
    assert len(model.factors) == 2  # one layer's query and value, gone through three times

    found = PersonGradients(model, examples, micro_batch=4).insecure_sum(EVERYONE)

    assert off(found, person_gradients(model, examples).sum(axis=0)) <= 1e-12


@pytest.mark.parametrize("named", [{"pad_token_id": None}, {"pad_token_id": -1}, {"eos_token_id": [3, 4]}])
def test_another_pad_token_than_the_tokenizers_moves_no_decoders_answer(
    named: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = save_base(
        tmp_path_factory.mktemp("pad") / "base", "llama", TEXT_CLASSES, **({"pad_token_id": None} | named)
    )
    model = attach(directory, make_plan(directory, "llama", TEXT_CLASSES), dtype=torch.float64)
    move(model)
    examples = make_examples(TEXT_CLASSES, persons=PERSONS)
    assert model.network.config.pad_token_id != examples.pad_token

    found = PersonGradients(model, examples).insecure_sum(EVERYONE)

    assert off(found, person_gradients(model, examples).sum(axis=0)) <= tolerance("llama")


@FAMILY_AND_KIND
def test_bfloat16_gradients_are_autograds_own_in_bfloat16(family: str, kind: str, build: Build) -> None:
    model = build(family, kind, dtype=torch.float32, precision="bfloat16")
    examples = make_examples(kind, persons=PERSONS)
    loop = person_gradients(model, examples)

    gradients = PersonGradients(model, examples, micro_batch=4)
    found = np.stack([gradients.insecure_sum(EVERYONE[[person]]) for person in EVERYONE])

    assert max(off(mine, its) for mine, its in zip(found, loop, strict=True)) <= 5e-2
    assert {p.dtype for p in model.trainable.values()} == {torch.float32}
    assert {p.dtype for p in model.network.parameters() if not p.requires_grad} >= {torch.bfloat16}


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("bert", TEXT_CLASSES),
        ("roberta", REGRESSION),
        ("distilbert", TOKEN_CLASSES),
        ("bert", MASKED),
        ("vit", IMAGE_CLASSES),
    ],
)
def test_bfloat16_gradients_are_near_those_of_float32(family: str, kind: str, cached: bool, build: Build) -> None:
    """Other families' tiny random weights, once rounded to 8 bits, are other models; these are not."""
    top = 1 if cached else 0
    model = build(family, kind, dtype=torch.float32, precision="bfloat16", top_layers=top)
    exact = build(family, kind, dtype=torch.float32, top_layers=top)
    examples = make_examples(kind, persons=PERSONS)
    cache = filled(PrefixCache(model), examples) if cached else None

    found = PersonGradients(model, examples, cache=cache).insecure_sum(EVERYONE)

    assert off(found, person_gradients(exact, examples).sum(axis=0)) <= 5e-2
    assert cache is None or cache.hidden(examples, EVERYONE).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("family", "kind"), [("bert", TEXT_CLASSES), ("gpt2", CAUSAL), ("llama", CAUSAL), ("vit", IMAGE_CLASSES)]
)
def test_layers_computed_again_on_the_way_back_change_nothing(
    family: str, kind: str, cached: bool, build: Build
) -> None:
    top = 2 if cached else 0
    kept, again = (build(family, kind, top_layers=top, gradient_checkpointing=again) for again in (False, True))
    examples, passes = make_examples(kind, persons=PERSONS), list[int]()
    caches = [filled(PrefixCache(model), examples) if cached else None for model in (kept, again)]
    expected = PersonGradients(kept, examples, caches[0], 4).insecure_sum(EVERYONE)
    inside = next(again.blocks[-1].children())
    handle = inside.register_forward_pre_hook(lambda *_: passes.append(1))

    found = PersonGradients(again, examples, caches[1], 4).insecure_sum(EVERYONE)

    handle.remove()
    assert off(found, expected) <= 1e-12
    assert len(passes) == 2 * 3  # eleven rows, four at once


def test_memory_bounds_how_many_rows_go_at_once_and_changes_no_sum(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, examples = build("bert", TEXT_CLASSES), make_examples(TEXT_CLASSES, 30, persons=12)
    everyone = np.arange(12)
    expected = PersonGradients(model, examples).insecure_sum(everyone)
    shapes = list[tuple[int, ...]]()
    forward = model.forward

    def watched(batch: Batch) -> torch.Tensor:
        assert batch.input_ids is not None
        shapes.append(batch.input_ids.shape)
        return forward(batch)

    compute = dataclasses.replace(model.plan.compute, memory_mb=31)
    monkeypatch.setattr(model, "forward", watched)
    monkeypatch.setattr(model, "plan", dataclasses.replace(model.plan, compute=compute))
    monkeypatch.setattr(model, "row_bytes", lambda lengths: lengths << 20)  # a MiB for each token
    gradients = PersonGradients(model, examples)
    found = gradients.insecure_sum(everyone)

    assert all(rows * longest < 31 for rows, longest in shapes)
    assert 30 / 10 < len(shapes) < 30
    assert off(found, expected) <= 1e-12
    shapes.clear()
    monkeypatch.setattr(model, "row_bytes", lambda lengths: lengths << 30)  # a row alone is beyond the limit
    assert off(gradients.insecure_sum(everyone), expected) <= 1e-12
    assert [rows for rows, _ in shapes] == [1] * 30


def test_longer_rows_take_more_memory_and_gradients_kept_less_take_less(build: Build) -> None:
    lengths = np.array([8, 16])
    whole, top, again, words = (
        build(family, kind, **changes).row_bytes(lengths)
        for family, kind, changes in (
            ("bert", TEXT_CLASSES, {}),
            ("bert", TEXT_CLASSES, {"top_layers": 1}),
            ("albert", TEXT_CLASSES, {}),
            ("bert", MASKED, {}),
        )
    )

    assert whole.tolist() == [8 * 3 * (9 * 16 + 2 * 24) * 8, 16 * 3 * (9 * 16 + 2 * 24) * 8]
    assert (top * 3 == whole).all()
    assert (again == whole).all()  # ALBERT keeps one layer and goes through it as often
    assert (words - whole == lengths * 3 * WORDS * 8).all()


@contextlib.contextmanager
def overwritten(table: torch.Tensor, line: int, value: float) -> Iterator[None]:
    """Let one line of a table hold another value inside a `with`."""
    before = table[line].clone()
    with torch.no_grad():
        table[line] = value
    try:
        yield
    finally:
        with torch.no_grad():
            table[line] = before


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("micro_batch", [3, 64])
@pytest.mark.parametrize(
    ("family", "kind"),
    [("bert", TEXT_CLASSES), ("modernbert", TEXT_CLASSES), ("llama", CAUSAL), ("distilbert", TOKEN_CLASSES)],
)
def test_a_row_that_is_not_finite_counts_as_zero_and_poisons_no_other(
    family: str, kind: str, micro_batch: int, value: float, build: Build
) -> None:
    model, examples = build(family, kind), make_examples(kind, persons=PERSONS)
    store = np.where(examples.tokens[0] == WORDS - 1, 5, examples.tokens[0]).astype(np.int32)  # one word for one row
    victim = int(examples.persons[7])
    store[examples.starts[7]] = WORDS - 1
    examples = dataclasses.replace(examples, tokens=[store])
    expected = person_gradients(model, examples)
    rest = EVERYONE[victim != EVERYONE]

    with overwritten(model.network.get_input_embeddings().weight, WORDS - 1, value):
        gradients = PersonGradients(model, examples, micro_batch=micro_batch)
        total, spared = gradients.clipped_sum(EVERYONE, 1.0), gradients.clipped_sum(rest, 1.0)

    assert total.non_finite == 1
    assert spared.non_finite == 0
    assert off(total.values, clipped(expected[rest], 1.0)) <= max(1e-6, tolerance(family))
    assert np.abs(total.steps - spared.steps).max() <= 1e-6 * 2**GRID_BITS


@pytest.mark.parametrize(("family", "kind"), [("bert", TEXT_CLASSES), ("distilbert", TOKEN_CLASSES), ("llama", CAUSAL)])
def test_numbers_that_overflow_at_padding_cost_no_row_its_gradient(family: str, kind: str, build: Build) -> None:
    """Else whether a row counts would depend on the length of another person's."""
    model, examples = build(family, kind), make_examples(kind, persons=PERSONS)
    expected = PersonGradients(model, examples).clipped_sum(EVERYONE, 1.0)
    padding = model.network.config.pad_token_id
    assert padding not in examples.tokens[0]

    with overwritten(model.network.get_input_embeddings().weight, padding, math.inf):
        found = PersonGradients(model, examples).clipped_sum(EVERYONE, 1.0)

    assert found.non_finite == 0
    assert np.abs(found.steps - expected.steps).max() <= 1e-6 * 2**GRID_BITS


def test_the_order_in_which_rows_lie_changes_no_sum(build: Build) -> None:
    model, examples = build("bert", TEXT_CLASSES), make_examples(TEXT_CLASSES, persons=PERSONS)
    shuffled = examples.subset(np.random.default_rng(0).permutation(len(examples)))
    again = np.array([int(shuffled.persons[shuffled.starts == start][0]) for start in examples.starts])
    renamed = np.array([again[examples.persons == person][0] for person in EVERYONE])

    found = PersonGradients(model, shuffled, micro_batch=3).insecure_sum(renamed[:3])

    assert off(found, PersonGradients(model, examples).insecure_sum(EVERYONE[:3])) <= 1e-12


def test_the_rows_of_a_person_count_as_their_mean(build: Build) -> None:
    model, examples = build("bert", TEXT_CLASSES), make_examples(TEXT_CLASSES, persons=PERSONS)
    rows = row_gradients(model, examples)
    several = int(np.bincount(examples.persons).argmax())
    assert (examples.persons == several).sum() > 2

    found = PersonGradients(model, examples, micro_batch=1).insecure_sum(np.array([several]))

    assert off(found, rows[examples.persons == several].mean(axis=0)) <= 1e-12


# A line of numbers and by how much all of them are scaled: from denormal to the largest float32.
LINES = strategies.lists(
    strategies.tuples(
        strategies.lists(strategies.floats(-1, 1, width=32), min_size=3, max_size=3), strategies.integers(-150, 127)
    ),
    min_size=1,
    max_size=6,
)
CLIPS = strategies.floats(1e-6, 1e6)
DTYPES = strategies.sampled_from([torch.float32, torch.float64])


def lines_of(drawn: list[tuple[list[float], int]], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([[math.ldexp(x, scale) for x in line] for line, scale in drawn], dtype=torch.float64).to(dtype)


def grid(lines: torch.Tensor, clip_norm: float) -> Ints:
    """Return what the lines come to in grid steps."""
    norms = torch.linalg.vector_norm(lines, dim=1, dtype=torch.float64)
    return _grid_sum(lines.clone(), norms, clip_norm).numpy()


@given(LINES, CLIPS, DTYPES)
def test_each_line_of_the_grid_is_at_most_2_to_the_30_long_exactly(
    drawn: list[tuple[list[float], int]], clip: float, dtype: torch.dtype
) -> None:
    for line in lines_of(drawn, dtype):
        steps = grid(line[None], clip)

        assert sum(int(step) ** 2 for step in steps) <= 4**GRID_BITS


@given(LINES, CLIPS, DTYPES)
def test_the_grid_cuts_toward_zero_by_less_than_a_step_and_keeps_signs(
    drawn: list[tuple[list[float], int]], clip: float, dtype: torch.dtype
) -> None:
    step = clip / 2**GRID_BITS
    for line in lines_of(drawn, dtype):
        steps, values = grid(line[None], clip), line.double().numpy()

        factor = min(1.0, clip / np.linalg.norm(values)) if values.any() else 1.0
        exact = values * factor
        # A product in float32 errs in its 24th bit, and what is clipped is aimed a little below the limit.
        rounded = np.abs(exact) * (2.0**-20 if dtype == torch.float32 else 2.0**-23)
        assert (np.abs(steps * step - exact) <= step * (1 + 1e-9) + rounded).all()
        assert (np.abs(steps) * step <= np.abs(exact) * (1 + 2.0**-23)).all()
        assert (steps * np.sign(values) >= 0).all()
        assert not steps[values == 0].any()
        assert (grid(-line[None], clip) == -steps).all()


@given(strategies.integers(0, 2**32), CLIPS, DTYPES)
def test_lines_on_the_clip_norm_itself_are_kept(seed: int, clip: float, dtype: torch.dtype) -> None:
    line = np.random.default_rng(seed).normal(size=1000)
    line *= clip / np.linalg.norm(line)

    steps = grid(torch.from_numpy(line)[None].to(dtype), clip)

    assert (1 - 2.0**-19) * 4**GRID_BITS <= sum(int(step) ** 2 for step in steps) <= 4**GRID_BITS


@given(LINES, CLIPS, DTYPES, strategies.randoms(use_true_random=False))
def test_the_grid_sum_is_the_sum_of_its_lines_in_any_order_and_any_micro_batches(
    drawn: list[tuple[list[float], int]], clip: float, dtype: torch.dtype, random: Any
) -> None:
    lines = lines_of(drawn, dtype)
    order = random.sample(range(len(lines)), len(lines))
    cut = random.randint(0, len(lines))

    whole = grid(lines, clip)

    assert (whole == grid(lines[order], clip)).all()
    assert (whole == sum(grid(line[None], clip) for line in lines)).all()
    assert (whole == grid(lines[:cut], clip) + grid(lines[cut:], clip)).all()


def test_a_loss_that_is_the_mean_over_the_batchs_tokens_is_not_ours(build: Build) -> None:
    """What transformers' own loss would do: the shorter row's part shrinks as the row beside it grows."""
    model, examples = build("gpt2", CAUSAL), make_examples(CAUSAL)
    batch = examples.batch(np.array([int(examples.lengths.argmin()), int(examples.lengths.argmax())]))
    assert batch.targets is not None
    scores, targets = model.forward(batch)[:, :-1], torch.from_numpy(batch.targets)[:, 1:]
    over_all = F.cross_entropy(scores.transpose(1, 2), targets)
    own = PersonGradients(model, examples).insecure_sum(np.arange(2))

    theirs = torch.autograd.grad(over_all * 2, list(model.trainable.values()))

    assert off(torch.cat([part.flatten() for part in theirs]).numpy(), own) > 0.1


@pytest.mark.parametrize("believed", [0.5, math.nan, 0.0])
def test_a_line_whose_length_was_misjudged_counts_as_zero(believed: float) -> None:
    lines = torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=torch.float64)

    steps = _grid_sum(lines, torch.tensor([believed * 5, 0.5], dtype=torch.float64), 1.0)

    assert (steps == torch.tensor([3, 4]) * 2**GRID_BITS // 10).all()
