"""What notes each row's gradient: it refuses what it cannot see through, and leaves a model as it was."""

import functools
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import numpy.typing as npt
import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from confide.client.gradients import PersonGradients
from confide.client.recorder import Recorder
from confide.common.errors import ModelError
from confide.common.examples import Batch, Examples
from confide.common.model import AdaptedModel, attach
from confide.common.objective import losses
from confide.common.plan import CAUSAL, FEDIT, IMAGE_CLASSES, R_ONLY, TEXT_CLASSES
from tests.families import make_examples, make_model, make_plan, row_gradients

Build = Callable[..., AdaptedModel]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Return a maker of tiny models, a new one each time."""
    return functools.partial(make_model, tmp_path_factory.mktemp("families"))


@pytest.fixture
def bert(build: Build) -> AdaptedModel:
    return build("bert", TEXT_CLASSES)


def recorded(model: AdaptedModel, examples: Examples) -> npt.NDArray[np.float64]:
    """Return each row's gradient as the recorder notes it, all rows in one batch."""
    recorder, batch = Recorder(model), examples.batch(np.arange(len(examples)))
    with recorder.on(tuple(model.trainable)):
        each = losses(model.plan.task.kind, model.forward(batch), batch)
        return np.concatenate([part.flatten(1).double().numpy() for _, part in recorder.noted(each)], axis=1)


def traces(model: AdaptedModel) -> list[object]:
    """Return what a recorder could have left on a model: methods of its own, hooks, gradients, weights."""
    modules = list(model.network.modules())
    return [
        [m for m in modules if "forward" in vars(m)],
        [m for m in modules if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks],
        [name for name, p in model.network.named_parameters() if p.grad is not None],
        [p.requires_grad for p in model.network.parameters()],
        [p.detach().clone().numpy().tobytes() for p in model.network.parameters()],
        [type(block) for block in model.blocks],
    ]


def test_nothing_is_left_on_the_model(bert: AdaptedModel) -> None:
    examples, before = make_examples(TEXT_CLASSES), traces(bert)

    recorded(bert, examples)
    PersonGradients(bert, examples).clipped_sum(np.arange(5), 1.0)

    assert traces(bert) == before
    assert before[:3] == [[], [], []]


@pytest.mark.parametrize("where", ["forward", "backward", "sum"])
def test_nothing_is_left_on_the_model_after_an_exception(
    where: str, bert: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, before = make_examples(TEXT_CLASSES), traces(bert)
    gradients = PersonGradients(bert, examples, micro_batch=2)

    def broken(*_: object) -> Any:
        assert len([m for m in bert.network.modules() if "forward" in vars(m)]) == len(bert.factors) + 1
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "forward":
            patch.setattr(bert, "forward", broken)
        elif where == "backward":
            patch.setattr(Recorder, "note", broken)
        else:
            patch.setattr("confide.client.gradients._grid_sum", broken)
        with pytest.raises(KeyboardInterrupt) as kept:  # with its frames, and what they refer to, as a debugger would
            gradients.clipped_sum(np.arange(5), 1.0)

    assert traces(bert) == before
    assert kept.tb is not None
    assert gradients.clipped_sum(np.arange(5), 1.0).steps.any()


def test_a_method_that_was_on_a_layer_before_is_there_after(bert: AdaptedModel) -> None:
    layer = bert.factors[0].layer
    layer.forward = own = MethodType(type(layer).forward, layer)

    recorded(bert, make_examples(TEXT_CLASSES))

    assert vars(layer)["forward"] is own


def test_the_head_alone_goes_back_through_no_layer_below_it(tmp_path: Path) -> None:
    plain = make_model(tmp_path, "bert", TEXT_CLASSES)
    directory = next(tmp_path.iterdir())
    model = attach(directory, plain.plan, head_only=True, dtype=torch.float64)
    model.write(np.ones(model.layout.length, np.float32))
    needed = list[bool]()
    handle = model.blocks[-1].register_forward_hook(lambda *given: needed.append(given[2].requires_grad))
    examples = make_examples(TEXT_CLASSES)

    found = recorded(model, examples)

    handle.remove()
    assert needed == [False]
    np.testing.assert_allclose(found, row_gradients(model, examples), atol=1e-12)


@pytest.mark.parametrize("method", [FEDIT, R_ONLY])
@pytest.mark.parametrize(("family", "kind"), [("bert", TEXT_CLASSES), ("llama", CAUSAL)])
def test_a_base_that_is_no_plain_linear_layer_is_not_folded_and_gives_the_same(
    method: str, family: str, kind: str, build: Build
) -> None:
    class Kept(nn.Linear):  # as layers in 4 bits are linear layers of another kind
        pass

    model, examples = build(family, kind, method=method), make_examples(kind)
    expected = recorded(model, examples)
    for factors in model.factors:
        factors.layer.base_layer.__class__ = Kept

    found = recorded(model, examples)

    assert 0 < np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


def test_gradients_are_float32_where_the_base_computes_in_bfloat16(build: Build) -> None:
    model = build("modernbert", TEXT_CLASSES, dtype=torch.float32, precision="bfloat16", method=FEDIT)
    recorder, batch = Recorder(model), make_examples(TEXT_CLASSES).batch(np.arange(4))

    with recorder.on(tuple(model.trainable)):
        noted = list(recorder.noted(losses(TEXT_CLASSES, model.forward(batch), batch)))

    assert [name for name, _ in noted] == list(model.trainable)
    assert {part.dtype for _, part in noted} == {torch.float32}
    assert all(part.shape == (4, *model.trainable[name].shape) for name, part in noted)


def test_batch_statistics_are_refused(tmp_path: Path) -> None:
    config = transformers.MobileViTConfig(
        image_size=32,
        patch_size=2,
        hidden_sizes=[8, 8, 8],
        neck_hidden_sizes=[4, 4, 4, 4, 4, 4, 8],
        num_attention_heads=2,
    )
    transformers.MobileViTModel(config).save_pretrained(tmp_path)
    model = attach(tmp_path, make_plan(tmp_path, "vit", IMAGE_CLASSES, targets=("query",)))

    with pytest.raises(ModelError, match="holds BatchNorm2d, which mixes the rows of a batch"):
        PersonGradients(model, make_examples(IMAGE_CLASSES))


class Scale(nn.Module):
    """A trained weight outside the layers that the recorder knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :3] * self.weight


@pytest.mark.parametrize("layer", [Scale(), nn.RMSNorm(3), nn.Conv1d(1, 1, 1), nn.Embedding(3, 3)])
def test_trained_weights_of_layers_not_known_are_refused(layer: nn.Module, bert: AdaptedModel) -> None:
    head = bert.network.base_model.model.classifier
    head.modules_to_save["default"] = layer
    parameters = {f"classifier.{name}": p for name, p in layer.named_parameters()}
    odd = AdaptedModel(bert.network, bert.plan, bert.factors, parameters)

    with pytest.raises(ModelError, match=rf"belong to others: classifier \({type(layer).__name__}\)"):
        Recorder(odd)


def test_a_trained_weight_that_is_in_no_layer_is_refused(bert: AdaptedModel) -> None:
    loose = {f"classifier.{name}": nn.Parameter(torch.ones(3)) for name in ("bias", "weight", "loose")}

    with pytest.raises(ModelError, match=r"classifier\.loose \(no layer\)"):
        Recorder(AdaptedModel(bert.network, bert.plan, bert.factors, loose))


def attention_of(model: AdaptedModel) -> Any:
    """Return the attention of BERT's topmost layer."""
    topmost: Any = model.blocks[-1]
    return topmost.attention.self


class Flat(nn.Module):
    """Goes through a layer with all rows' tokens in one long row of rows, as experts do."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat: torch.Tensor = self.layer(x.flatten(0, 1))
        return flat.view(*x.shape[:2], -1)


class Turned(nn.Module):
    """Goes through a layer with tokens before rows."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned: torch.Tensor = self.layer(x.transpose(0, 1))
        return turned.transpose(0, 1)


@pytest.mark.parametrize("wrapper", [Flat, Turned])
def test_a_model_that_does_not_keep_rows_apart_is_refused(
    wrapper: Callable[[nn.Module], nn.Module], bert: AdaptedModel
) -> None:
    attention = attention_of(bert)
    attention.value = wrapper(attention.value)

    with pytest.raises(ModelError, match=r"value\.lora_B\.weight came with \d+ gradients for 13 rows"):
        recorded(bert, make_examples(TEXT_CLASSES, 13))  # more rows than tokens: a square batch would tell nothing


def test_a_layer_gone_through_with_one_row_for_all_is_refused(bert: AdaptedModel) -> None:
    """Added to what is known of each row, its one gradient would be spread over all of them without a word."""
    attention = attention_of(bert)
    layer = attention.value

    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = layer(x) + layer(x.mean(dim=0, keepdim=True))
            return result

    attention.value = Twice()

    with pytest.raises(ModelError, match="came with 1 gradients for 11 rows"):
        recorded(bert, make_examples(TEXT_CLASSES))


@pytest.mark.parametrize("also_called", [False, True])
def test_a_head_used_by_its_weight_and_not_called_is_refused(also_called: bool, bert: AdaptedModel) -> None:
    wrapper = bert.network.base_model.model.classifier
    layer = wrapper.modules_to_save["default"]

    def by_weight(x: torch.Tensor) -> torch.Tensor:
        scores = F.linear(x, layer.weight, layer.bias)
        return scores + layer(x) if also_called else scores

    wrapper.forward = by_weight

    with pytest.raises(ModelError, match=r"uses classifier\.bias beside the layer that holds it"):
        recorded(bert, make_examples(TEXT_CLASSES))
    assert all(p.grad is None for p in bert.network.parameters())


def test_a_weight_that_is_not_used_is_refused(bert: AdaptedModel) -> None:
    attention = attention_of(bert)
    attention.value = attention.value.base_layer

    with pytest.raises(ModelError, match=r"No gradient came back to .*layer\.2\.attention\.self\.value\.lora_B"):
        recorded(bert, make_examples(TEXT_CLASSES))


def test_scores_that_no_trained_weight_reaches_are_refused(bert: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = bert.forward

    def apart(batch: Batch) -> torch.Tensor:
        return forward(batch).detach()

    monkeypatch.setattr(bert, "forward", apart)

    with pytest.raises(ModelError, match="No gradient came back to"):
        recorded(bert, make_examples(TEXT_CLASSES))


@pytest.mark.parametrize(
    ("more", "fragment"),
    [
        ({"use_dora": True}, "is DoRA on a Linear"),
        ({"lora_bias": True}, "is LoRA with a bias on a Linear"),
        ({"target_modules": ["query", "word_embeddings"]}, "is LoRA on a Embedding"),
    ],
)
def test_an_adapter_that_is_not_plain_lora_on_a_linear_layer_is_refused(
    more: dict[str, object], fragment: str, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = peft.LoraConfig
    monkeypatch.setattr(peft, "LoraConfig", lambda **settings: config(**(settings | more)))

    with pytest.raises(ModelError, match=fragment):
        build("bert", TEXT_CLASSES)


def test_an_adapter_on_a_convolution_is_refused(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    config = peft.LoraConfig
    monkeypatch.setattr(
        peft, "LoraConfig", lambda **settings: config(**(settings | {"target_modules": ["q_proj", "projection"]}))
    )

    with pytest.raises(ModelError, match="is LoRA on a Conv2d"):
        build("vit", IMAGE_CLASSES)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(("family", "target"), [("gpt2", "lm_head"), ("bert", "decoder")])
def test_an_adapter_on_a_head_that_shares_its_embeddings_is_refused(family: str, target: str, build: Build) -> None:
    kind = CAUSAL if family == "gpt2" else "masked-lm"

    with pytest.raises(ModelError, match=f"names .*{target}, whose weight another module of the base model shares"):
        build(family, kind, targets=(target,))


def test_gradients_from_before_do_not_add_up(bert: AdaptedModel) -> None:
    examples = make_examples(TEXT_CLASSES)
    expected = recorded(bert, examples)
    for p in bert.trainable.values():
        p.grad = torch.ones_like(p)  # as the optimizer's last step leaves them

    np.testing.assert_array_equal(recorded(bert, examples), expected)


def test_settings_of_another_round_do_not_stay(build: Build) -> None:
    model, examples = build("bert", TEXT_CLASSES, method="alternate"), make_examples(TEXT_CLASSES)
    recorder, batch = Recorder(model), examples.batch(np.arange(3))
    names = list[set[str]]()

    for number in (1, 2):
        with recorder.on(model.active(number)):
            names.append({name for name, _ in recorder.noted(losses(TEXT_CLASSES, model.forward(batch), batch))})

    assert names == [set(model.active(1)), set(model.active(2))]
    assert names[0] & names[1] == model.head
