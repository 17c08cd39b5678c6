"""What is computed once of the layers below the adapters stands in for them exactly."""

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from confide.common.errors import ModelError
from confide.common.examples import Examples, union
from confide.common.model import AdaptedModel
from confide.common.objective import probabilities
from confide.common.plan import CAUSAL, IMAGE_CLASSES, TEXT_CLASSES
from confide.common.prefix import PrefixCache, replaying
from tests.families import IMAGE, PAIRS, make_examples, make_model, tolerance

Build = Callable[..., AdaptedModel]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Return a maker of tiny models with adapters in the top layer that makes each once."""
    return functools.cache(functools.partial(make_model, tmp_path_factory.mktemp("families"), top_layers=1))


def filled(model: AdaptedModel, *parts: Examples) -> PrefixCache:
    cache = PrefixCache(model, micro_batch=4)
    for part in parts:
        assert list(cache.add(part)) == [*range(4, len(part), 4), len(part)]
    return cache


def seen(logits: torch.Tensor, examples: Examples) -> torch.Tensor:
    """Return the logits but for those at padding."""
    if logits.ndim < 3:
        return logits
    return torch.cat([line[: int(length)] for line, length in zip(logits, examples.lengths, strict=True)])


@pytest.mark.parametrize(("family", "kind"), PAIRS)
def test_replaying_the_frozen_prefix_changes_no_logits(family: str, kind: str, build: Build) -> None:
    model, examples = build(family, kind), make_examples(kind)
    rows = np.arange(len(examples))
    cache = filled(model, examples)

    with torch.no_grad():
        replayed = seen(cache.forward(examples, rows, examples.batch(rows)), examples)
        plain = seen(model.logits(examples, rows), examples)

    assert (replayed - plain).abs().max() <= tolerance(family) * plain.abs().max() * len(rows)
    assert PrefixCache.helps(model)
    assert model.first_adapted == 2
    positions = 5 * len(examples) if kind == IMAGE_CLASSES else examples.lengths.sum()
    assert cache.size_bytes == positions * 16 * 8


@pytest.mark.parametrize(("family", "kind"), [("bert", TEXT_CLASSES), ("vit", IMAGE_CLASSES)])
def test_subsets_and_unions_of_cached_examples_are_cached(family: str, kind: str, build: Build) -> None:
    model = build(family, kind)
    first, second = make_examples(kind, seed=1), make_examples(kind, 7, seed=2)
    cache = filled(model, first, second)

    part = union([second, first]).subset(np.array([12, 1, 4, 7]))

    assert cache.holds(part)
    np.testing.assert_allclose(probabilities(model, part, cache), probabilities(model, part), atol=2e-6)


def test_the_lower_layers_are_not_computed_again(build: Build) -> None:
    model, examples = build("bert", TEXT_CLASSES), make_examples(TEXT_CLASSES)
    cache, rows = filled(model, examples), np.arange(3)
    calls = list[int]()
    handles = [
        block.register_forward_pre_hook(lambda *_, layer=layer: calls.append(layer))
        for layer, block in enumerate(model.blocks)
    ]

    cache.forward(examples, rows, examples.batch(rows))

    for handle in handles:
        handle.remove()
    assert calls == [2]


def test_the_layers_are_in_their_places_after_an_exception(build: Build) -> None:
    model = build("bert", TEXT_CLASSES)
    before = list(model.blocks)

    def fail() -> None:
        with replaying(model, torch.zeros(1, 1, 16)):
            assert list(model.blocks)[:2] != before[:2]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()

    assert list(model.blocks) == before


def test_rows_that_were_never_added_have_no_prefix(build: Build) -> None:
    cache, examples = PrefixCache(build("bert", TEXT_CLASSES)), make_examples(TEXT_CLASSES)

    assert not cache.holds(examples)
    with pytest.raises(ModelError, match="never added"):
        cache.hidden(examples, np.array([0]))


def test_adapters_in_every_layer_leave_nothing_to_keep(build: Build) -> None:
    assert not PrefixCache.helps(build("bert", TEXT_CLASSES, top_layers=0))
    assert not PrefixCache.helps(build("bert", TEXT_CLASSES, top_layers=3))
    assert not PrefixCache.helps(build("bert", TEXT_CLASSES, cache_prefix=False))


def test_a_model_whose_upper_layers_read_more_than_what_enters_them_is_refused(build: Build) -> None:
    model, examples = build("llama", CAUSAL), make_examples(CAUSAL)
    lower = model.blocks[0]
    around = list[torch.Tensor]()

    class Leaking(nn.Module):
        def forward(self, hidden_states: torch.Tensor, *rest: object, **more: object) -> torch.Tensor:
            result: torch.Tensor = lower(hidden_states, *rest, **more)
            around[:] = [result]
            return result

    class Reading(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, hidden_states: torch.Tensor, *rest: object, **more: object) -> torch.Tensor:
            result: torch.Tensor = self.layer(hidden_states, *rest, **more)
            return result + (around.pop() if around else 0)

    top = model.blocks[2]
    model.blocks[0], model.blocks[2] = Leaking(), Reading(top)
    try:
        with pytest.raises(ModelError, match=r"gives other logits when its lower layers are replayed"):
            list(PrefixCache(model).add(examples))
    finally:
        model.blocks[0], model.blocks[2] = lower, top


def test_images_that_share_a_store_keep_apart(build: Build) -> None:
    model, examples = build("vit", IMAGE_CLASSES), make_examples(IMAGE_CLASSES)
    cache = filled(model, examples)

    hidden = cache.hidden(examples, np.array([3, 0, 3]))

    assert hidden.shape == (3, (IMAGE[1] // 4) * (IMAGE[2] // 4) + 1, 16)
    assert torch.equal(hidden[0], hidden[2])
    assert not torch.equal(hidden[0], hidden[1])


def test_hidden_states_are_zero_where_padding_is(build: Build) -> None:
    model, examples = build("bert", TEXT_CLASSES), make_examples(TEXT_CLASSES)
    rows = np.array([int(examples.lengths.argmin()), int(examples.lengths.argmax())])

    hidden = filled(model, examples).hidden(examples, rows)

    shortest = int(examples.lengths.min())
    assert hidden[0, :shortest].all()
    assert not hidden[0, shortest:].any()
    assert hidden[1].all()
