"""The self-test before training: sound models pass it, and each way of being broken is refused by name."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from confide.client import conformance, gradients, recorder, trainer
from confide.client.conformance import Certificate, certify
from confide.client.mechanism import Mechanism
from confide.client.noise import drawn, rounded_gaussian
from confide.client.private_trainer import PrivateTrainer
from confide.common.errors import ModelError
from confide.common.examples import IGNORED, Batch
from confide.common.factors import Factors
from confide.common.model import AdaptedModel, attach
from confide.common.objective import losses
from confide.common.plan import (
    CAUSAL,
    IMAGE_CLASSES,
    INSTRUCTION,
    LANGUAGE,
    MASKED,
    R_ONLY,
    REGRESSION,
    TEXT_CLASSES,
    TOKEN_CLASSES,
)
from confide.common.prefix import PrefixCache
from confide.simulations.insecure import InsecureSeededNoise
from tests import families
from tests.conftest import MakeExamples

METHODS = ("ffa", "fedit", "alternate", "share-a", "r-only")
Break = Callable[[AdaptedModel, pytest.MonkeyPatch], None]
Make = Callable[..., AdaptedModel]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the families' base models are kept."""
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def make(bases: Path) -> Make:
    """Return what makes a BERT of two layers, adapters in the upper one, with the settings it is told.

    Whoever asks for the same settings shares the model, and must leave it as it was.
    """
    directory = families.save_base(bases / "two-layers", "bert", TEXT_CLASSES, num_hidden_layers=2)

    @functools.cache
    def made(method: str = "ffa", **settings: object) -> AdaptedModel:
        plan = families.make_plan(directory, "bert", TEXT_CLASSES, method=method, top_layers=1, rank=8, **settings)
        return attach(directory, plan)

    return made


@pytest.fixture
def model(make: Make) -> AdaptedModel:
    return make()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_passes_and_the_model_is_left_as_it_was(make: Make, method: str) -> None:
    model = make(method)
    families.move(model)
    before = anatomy(model)

    certificate = certify(model, cached=True)

    assert certificate.model is model
    assert certificate.cached
    assert 0 < certificate.gradient_error < 1e-5
    assert certificate.loop_precision == "float64"
    assert len(certificate.checks) == 8
    assert_equal(anatomy(model), before)


@pytest.mark.parametrize(
    ("family", "kind", "precision"),
    [
        ("modernbert", REGRESSION, "float32"),  # a head of several layers
        ("gpt2", CAUSAL, "float32"),  # weights kept transposed, and a tied head
        ("bert", MASKED, "float32"),
        ("vit", IMAGE_CLASSES, "float32"),
        ("modernbert", TOKEN_CLASSES, "bfloat16"),  # peft keeps the norm of a reloaded head in bfloat16
        ("distilbert", REGRESSION, "bfloat16"),
        ("llama", INSTRUCTION, "bfloat16"),  # keys shared between heads
    ],
)
def test_every_kind_of_task_passes(bases: Path, family: str, kind: str, precision: str) -> None:
    model = families.make_model(bases, family, kind, dtype=torch.float32, top_layers=1, precision=precision)

    certificate = certify(model, cached=precision == "float32")

    assert certificate.loop_precision == ("bfloat16" if precision == "bfloat16" else "float64")
    assert 0 < certificate.gradient_error < (5e-2 if precision == "bfloat16" else 1e-5)
    assert (model.head == frozenset()) == (kind in LANGUAGE)


def test_a_base_too_large_for_float64_is_tested_in_its_own_precision(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conformance, "_EXACT_BYTES", 0)

    certificate = certify(make(R_ONLY), cached=False)

    assert certificate.loop_precision == "float32"
    assert certificate.gradient_error < 1e-5


def test_a_model_whose_layers_are_computed_again_passes(make: Make) -> None:
    assert certify(make(gradient_checkpointing=True), cached=False).gradient_error < 1e-5


def test_a_model_of_which_only_the_head_is_trained_passes(bases: Path, model: AdaptedModel) -> None:
    model = attach(bases / "two-layers", model.plan, head_only=True)

    assert certify(model, cached=False).gradient_error < 1e-5


def anatomy(model: AdaptedModel) -> dict[str, Any]:
    """Everything that a self-test might leave changed."""
    config = model.network.peft_config["default"]
    return {
        "weights": {name: value.clone() for name, value in model.network.state_dict().items()},
        "vector": (model.read().tobytes(), model.read(model.personal).tobytes()),
        "learning": {name: p.requires_grad for name, p in model.network.named_parameters()},
        "gradients": {name: p.grad for name, p in model.trainable.items()},
        "modules": [name for name, _ in model.network.named_modules()],
        "own methods": [name for name, module in model.network.named_modules() if "forward" in vars(module)],
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.network.modules()),
        "training": {name: module.training for name, module in model.network.named_modules()},
        "settings": (list(model.network.peft_config), dict(vars(config)), model.network.active_adapter),
    }


def assert_equal(after: dict[str, Any], before: dict[str, Any]) -> None:
    weights, was = after.pop("weights"), before.pop("weights")
    assert weights.keys() == was.keys()
    assert all(torch.equal(value, was[name]) for name, value in weights.items())
    assert after == before


def test_the_model_is_left_as_it_was_though_it_failed(model: AdaptedModel) -> None:
    before = anatomy(model)

    with pytest.MonkeyPatch.context() as monkeypatch:
        lose_a_tensor(model, monkeypatch)
        with pytest.raises(ModelError, match="the export failed: reloaded, it changes logits by"):
            certify(model, cached=False)

    assert_equal(anatomy(model), before)


def one_factor_forgotten(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two layers notes nothing of its factor; its gradient is a ten-thousandth of the head's."""
    note = recorder.Recorder.note

    def forgetful(self: recorder.Recorder, name: str, gradient: torch.Tensor) -> None:
        note(self, name, gradient * 0 if "layer.1.attention.self.query" in name else gradient)

    monkeypatch.setattr(recorder.Recorder, "note", forgetful)


def one_gradient_is_no_number(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    note = recorder.Recorder.note

    def broken(self: recorder.Recorder, name: str, gradient: torch.Tensor) -> None:
        note(self, name, gradient * torch.nan if "layer.1.attention.self.query" in name else gradient)

    monkeypatch.setattr(recorder.Recorder, "note", broken)


def another_scale(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    products = recorder._products
    monkeypatch.setattr(recorder, "_products", lambda *a: products(*a) * 1.01)


def one_factor_twice_as_long(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a scale of alpha / sqrt(rank) would make it beside one of alpha / rank."""
    note = recorder.Recorder.note

    def longer(self: recorder.Recorder, name: str, gradient: torch.Tensor) -> None:
        note(self, name, gradient * 2 if "layer.1.attention.self.query" in name else gradient)

    monkeypatch.setattr(recorder.Recorder, "note", longer)


def rows_share_their_mean(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes into the head has something of all rows of the batch, as batch statistics would bring it."""
    change = before(lambda x: x + 0.1 * x.mean(dim=0, keepdim=True))
    monkeypatch.setitem(model.network.get_base_model().classifier._forward_pre_hooks, 10**6, change)


def rows_share_a_mean_above(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, in the topmost layer, where every position has the mean of the rows' first one."""
    change = before(lambda x: x + 0.5 * x[:, :1].mean(dim=0, keepdim=True))
    monkeypatch.setitem(model.blocks[-1]._forward_pre_hooks, 10**6, change)


def layers_know_the_longest_row(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    change = before(lambda x: x * (1 + x.shape[1]))
    monkeypatch.setitem(model.blocks[-1]._forward_pre_hooks, 10**6, change)


def layers_change_much_with_a_longer_row(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    change_with_a_longer_row(model, monkeypatch, 4.0)


def change_with_a_longer_row(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """As rotations of position do that are made anew for a batch with a row longer than those made up."""
    topmost: Any = model.blocks[-1]
    change = before(lambda x: x * (factor if x.shape[1] > 24 else 1.0))
    monkeypatch.setitem(topmost.intermediate._forward_pre_hooks, 10**6, change)


def padding_is_averaged(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    change = before(lambda x: x + x.mean(dim=1, keepdim=True))
    monkeypatch.setitem(model.blocks[-1]._forward_pre_hooks, 10**6, change)


def before(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., tuple[Any, ...]]:
    """Return a hook that changes what goes into a layer."""
    return lambda _, args: (change(args[0]), *args[1:])


def padding_is_read(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = AdaptedModel._inputs

    def unmasked(self: AdaptedModel, batch: Any) -> dict[str, torch.Tensor]:
        return {name: torch.ones_like(v) if "mask" in name else v for name, v in inputs(self, batch).items()}

    monkeypatch.setattr(AdaptedModel, "_inputs", unmasked)


def carry_forgotten(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a person's rows are cut in two micro-batches, the second half only counts."""
    of_each = gradients.PersonGradients._of_each

    def forgetful(self: gradients.PersonGradients, *settings: Any) -> Iterator[torch.Tensor]:
        for part in of_each(self, *settings):
            yield part[:1] if self._most_rows == 2 else part

    monkeypatch.setattr(gradients.PersonGradients, "_of_each", forgetful)


def cache_off_by_a_little(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = PrefixCache.hidden
    monkeypatch.setattr(PrefixCache, "_check", lambda *_: None)
    monkeypatch.setattr(PrefixCache, "hidden", lambda *a: hidden(*a) * 1.01)


def clipping_off(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_rounded(values: torch.Tensor, norms: torch.Tensor, clip_norm: float) -> torch.Tensor:
        steps: torch.Tensor = (values.double() * (2**gradients.GRID_BITS / clip_norm)).trunc()
        return steps.sum(dim=0).to(torch.int64)

    monkeypatch.setattr(gradients, "_grid_sum", only_rounded)


def clipped_too_short(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    grid_sum = gradients._grid_sum
    monkeypatch.setattr(gradients, "_grid_sum", lambda values, norms, clip: grid_sum(values, norms * 1.1, clip))


def nobody_counts(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum over nobody is not empty."""
    clipped_sum = gradients.PersonGradients.clipped_sum

    def haunted(self: Any, persons: Any, *settings: Any) -> Any:
        found = clipped_sum(self, persons, *settings)
        return found if len(persons) else dataclasses.replace(found, steps=found.steps + 1)

    monkeypatch.setattr(gradients.PersonGradients, "clipped_sum", haunted)


def step_twice_as_long(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    noised = trainer._noised
    monkeypatch.setattr(
        trainer, "_noised", lambda steps, mechanism, randomness: noised(2 * steps, mechanism, randomness)
    )


def nobody_moves(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum is lost before the noise is added."""
    noised = trainer._noised
    monkeypatch.setattr(
        trainer, "_noised", lambda steps, mechanism, randomness: noised(0 * steps, mechanism, randomness)
    )


def somebody_left_out(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "drawn", lambda *a: drawn(*a)[1:])


def frozen_weight_moves(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    settle, frozen = AdaptedModel.settle, model.network.get_input_embeddings().weight
    monkeypatch.setattr(frozen, "data", frozen.data.clone())

    def loose(self: AdaptedModel) -> None:
        settle(self)
        with torch.no_grad():
            frozen.add_(1e-3)

    monkeypatch.setattr(AdaptedModel, "settle", loose)


def noise_off(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "rounded_gaussian", lambda r, d, n: rounded_gaussian(r, 1.0, n))


def noise_a_tenth_too_low(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "rounded_gaussian", lambda r, d, n: rounded_gaussian(r, 0.9 * d, n))


def noise_repeated(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance, "CryptographicNoise", lambda: InsecureSeededNoise(1, "s", 1))


def lose_a_tensor(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    export = AdaptedModel.export

    def lossy(self: AdaptedModel, vector: Any, directory: Path, personal: Any = None) -> None:
        export(self, vector, directory, personal)
        file = directory / "adapter_model.safetensors"
        tensors = load_file(file)
        del tensors[sorted(tensors)[0]]
        save_file(tensors, file)

    monkeypatch.setattr(AdaptedModel, "export", lossy)


def export_half_of_it(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    export = AdaptedModel.export
    monkeypatch.setattr(AdaptedModel, "export", lambda self, vector, *where: export(self, vector / 2, *where))


def export_as_half_floats(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    export = AdaptedModel.export

    def coarse(self: AdaptedModel, vector: Any, directory: Path, personal: Any = None) -> None:
        export(self, vector, directory, personal)
        file = directory / "adapter_model.safetensors"
        save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)

    monkeypatch.setattr(AdaptedModel, "export", coarse)


def export_nothing(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdaptedModel, "export", lambda *_: None)


def other_numbers_come_back(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    come_back = AdaptedModel.import_exported
    monkeypatch.setattr(AdaptedModel, "import_exported", lambda *a: come_back(*a) + np.float32(1e-6))


def another_weight_learns(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.network.get_input_embeddings().weight, "requires_grad", True)


def a_trained_weight_is_frozen(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next(iter(model.trainable.values())), "requires_grad", False)


def a_factor_is_left_out(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(model.trainable, next(name for name in model.trainable if ".lora_B." in name))


def a_tensor_is_not_sent(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "layout", dataclasses.replace(model.layout, tensors=model.layout.tensors[1:]))


def the_head_is_not_used(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    head = model.network.get_base_model().classifier
    monkeypatch.setitem(head._forward_hooks, 10**6, lambda _, args, scores: args[0][:, : scores.shape[1]])


def no_row_goes_through(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def falling(*_: Any) -> torch.Tensor:
        raise RuntimeError

    monkeypatch.setattr(AdaptedModel, "forward", falling)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            one_factor_forgotten,
            r"a person's gradient failed: it is off by 1\.0e\+00 of its length in \S*layer\.1\S*query",
        ),
        (one_gradient_is_no_number, r"a person's gradient failed: it is off by nan of its length in"),
        (
            another_scale,
            r"a person's gradient failed: it is off by \d\.\de-0[23] of its length in .*; the limit is \de-04",
        ),
        (rows_share_their_mean, r"a person's gradient failed: it is off by"),
        (padding_is_read, r"a person's gradient failed: it is off by"),
        (padding_is_averaged, r"a person's gradient failed: it is off by"),
        (layers_know_the_longest_row, r"a person's gradient failed: it is off by"),
        (carry_forgotten, r"a person's gradient over micro-batches failed: it is off by"),
        (cache_off_by_a_little, r"a person's gradient with the cached prefix failed: it is off by"),
        (clipping_off, r"clipping failed: a person's part has \d+\.\d+ times the clip norm; the limit is 1 exactly"),
        (clipped_too_short, r"a clipped gradient failed: it is off by 9\.1e-02 of its length in all of it"),
        (nobody_counts, r"clipping failed: the sum over nobody is not 0"),
        (step_twice_as_long, r"what a step moves failed: it is off by 1\.0e\+00"),
        (nobody_moves, r"what a step moves failed: it is off by 1\.0e\+00"),
        (somebody_left_out, r"the step failed: of 4 persons, each drawn with q = 1, \(3,\) took part"),
        (frozen_weight_moves, r"the step failed: \S*word_embeddings\.weight is not trained in this round and moved"),
        (noise_off, r"the noise failed: its variance is 0\.000 of what it should be, outside 0\.9"),
        (noise_a_tenth_too_low, r"the noise failed: its variance is 0\.[78]\d\d of what it should be"),
        (noise_repeated, r"the noise failed: two rounds drew the same"),
        (export_as_half_floats, r"the export failed: reloaded, it changes logits by \d\.\de-0\d of their length"),
        (export_nothing, r"the export failed: peft cannot load it"),
        (other_numbers_come_back, r"the export failed: other numbers come back"),
        (another_weight_learns, r"the trained set failed: \S*word_embeddings\.weight requires gradients"),
        (
            a_trained_weight_is_frozen,
            r"the trained set failed: \S*lora_B\.weight requires gradients and is not trained, or",
        ),
        (a_factor_is_left_out, r"the trained set failed: \S*lora_B\.weight is trained though the method ffa does not"),
        (a_tensor_is_not_sent, r"the trained set failed: \d+ numbers are trained, but \d+ are sent and 0 stay"),
        (the_head_is_not_used, r"a person's gradient failed: that of classifier\.bias has the length 0 for everyone"),
        (no_row_goes_through, r"it cannot be run on this model \(RuntimeError\)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_broken_gets_no_certificate_and_is_told(
    model: AdaptedModel, monkeypatch: pytest.MonkeyPatch, break_it: Break, message: str
) -> None:
    """False alarm of the noise's own check: 1e-9; noise 10 % low is missed with a probability below 1e-12."""
    break_it(model, monkeypatch)

    with pytest.raises(ModelError, match=message) as told:
        certify(model, cached=break_it is cache_off_by_a_little)

    assert "Nothing was trained, and no row was touched." in str(told.value)


def test_rows_that_share_something_beside_each_other_only_are_seen(
    model: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault that shows only where rows of several persons go through the model together."""
    summed = gradients.PersonGradients._person_sums

    def leaking(self: Any, rows: Any, owners: Any, width: int) -> torch.Tensor:
        found = summed(self, rows, owners, width)
        return found + 0.01 * (found.sum(dim=0) - found)

    monkeypatch.setattr(gradients.PersonGradients, "_person_sums", leaking)

    with pytest.raises(ModelError, match=r"a person's gradient beside others' failed: it is off by"):
        certify(model, cached=False)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            one_factor_forgotten,
            r"a person's gradient failed: it is off by 1\.0e\+00 of its length in \S*layer\.1\S*query",
        ),
        (one_factor_twice_as_long, r"a person's gradient failed: it is off by .* of its length in \S*layer\.1\S*query"),
        (rows_share_their_mean, r"the scores failed: beside others, a row's change by"),
        (padding_is_averaged, r"the scores failed: beside others, a row's change by"),
        (layers_know_the_longest_row, r"the scores failed: beside others, a row's change by"),
        (carry_forgotten, r"a person's gradient over micro-batches failed: it is off by"),
        (export_half_of_it, r"the export failed: reloaded, it changes logits by"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_broken_gets_no_certificate_in_bfloat16_either(
    make: Make, monkeypatch: pytest.MonkeyPatch, break_it: Break, message: str
) -> None:
    model = make(precision="bfloat16")
    break_it(model, monkeypatch)

    with pytest.raises(ModelError, match=message):
        certify(model, cached=False)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_mean_loss_over_the_tokens_of_a_batch_gets_no_certificate(
    bases: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    model = families.make_model(bases, "gpt2", CAUSAL, dtype=torch.float32, precision=precision)
    for module in (gradients, conformance):
        monkeypatch.setattr(module, "losses", mean_over_the_tokens_of_the_batch)

    with pytest.raises(ModelError, match=r"a person's gradient failed: it is off by"):
        certify(model, cached=False)


def mean_over_the_tokens_of_the_batch(kind: str, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    assert batch.targets is not None
    tokens = torch.from_numpy((batch.targets[:, 1:] != IGNORED).sum(axis=1))  # (rows,)
    return losses(kind, logits, batch) * tokens / tokens.sum()


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("float32", r"a person's gradient beside the longest text failed: it is off by"),
        ("bfloat16", r"the scores failed: beside others, a row's change by"),
    ],
)
def test_layers_that_change_a_little_with_a_row_longer_than_those_made_up_get_no_certificate(
    make: Make, monkeypatch: pytest.MonkeyPatch, precision: str, message: str
) -> None:
    model = make(max_tokens=32, precision=precision)
    change_with_a_longer_row(model, monkeypatch, 1.01)

    with pytest.raises(ModelError, match=message):
        certify(model, cached=True)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (rows_share_a_mean_above, r"a person's gradient failed: it is off by"),
        (padding_is_averaged, r"a person's gradient( beside others')? failed: it is off by"),
        (layers_change_much_with_a_longer_row, r"a person's gradient beside the longest text failed: it is off by"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_network_in_bfloat16_too_large_for_a_copy_is_seen_to_mix_rows(
    make: Make, monkeypatch: pytest.MonkeyPatch, break_it: Break, message: str
) -> None:
    model = make(max_tokens=32, precision="bfloat16")
    break_it(model, monkeypatch)
    monkeypatch.setattr(conformance, "_EXACT_BYTES", 0)

    with pytest.raises(ModelError, match=message):
        certify(model, cached=False)


@pytest.mark.parametrize("max_tokens", [3, 6])
def test_a_layer_that_turns_rows_and_positions_gets_no_certificate(
    make: Make, monkeypatch: pytest.MonkeyPatch, max_tokens: int
) -> None:
    """No scores change, but in a square batch persons would get each other's gradients, and the recorder see nothing.

    Of so few tokens the batches of three rows and of six are square.
    """
    model = make(max_tokens=max_tokens)
    topmost: Any = model.blocks[-1]
    attention = topmost.attention.self
    monkeypatch.setitem(attention._modules, "value", Turned(attention.value))

    with pytest.raises(ModelError, match=r"value\.lora_B\.weight came with \d+ gradients for 1 rows"):
        certify(model, cached=False)


class Turned(nn.Module):
    """Goes through a layer with positions before rows."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(x.transpose(0, 1))
        return result.transpose(0, 1)


def test_a_frame_that_does_not_fit_r_gets_no_certificate(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `r-only` the self-test's loop goes through B, and B must be what R makes it."""
    monkeypatch.setattr(Factors, "settle", lambda _: None)

    with pytest.raises(ModelError, match="failed"):
        certify(make(R_ONLY), cached=False)


def test_a_factor_that_rests_and_moves_gets_no_certificate(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """`alternate` trains A in even rounds only."""
    monkeypatch.setattr(trainer, "_optimizer", restless)

    with pytest.raises(ModelError, match=r"lora_[AB]\.weight is not trained in this round and moved"):
        certify(make("alternate"), cached=False)


def restless(model: AdaptedModel, active: Any, training: Any) -> torch.optim.Optimizer:
    def move_all(*_: object) -> None:
        with torch.no_grad():
            for parameter in model.trainable.values():
                parameter.add_(1e-3)

    optimizer = torch.optim.SGD([model.trainable[name] for name in active], lr=training.learning_rate)
    optimizer.register_step_post_hook(move_all)
    return optimizer


def test_a_model_without_a_prefix_is_not_certified_with_one(bases: Path) -> None:
    model = families.make_model(bases, "bert", TEXT_CLASSES)

    with pytest.raises(ModelError, match="there is no prefix to cache"):
        certify(model, cached=True)


@pytest.fixture(scope="module")
def certificate(make: Make) -> Certificate:
    return certify(make(), cached=False)


def test_training_with_a_cache_needs_a_certificate_for_it(
    certificate: Certificate, make_examples: MakeExamples
) -> None:
    examples, cache = make_examples(12, seed=1), PrefixCache(certificate.model)
    list(cache.add(examples))

    with pytest.raises(ModelError, match="self-test without a cached prefix"):
        PrivateTrainer(certificate, examples, cache)


def test_a_trainer_keeps_what_it_saw_of_each_round(certificate: Certificate, make_examples: MakeExamples) -> None:
    private = PrivateTrainer(certificate, make_examples(12, seed=1))
    mechanism = Mechanism(sampling_rate=0.5, clip_norm=1e-3, noise_multiplier=1.0, steps=3, divisor=6.0)

    for number in (1, 2):
        private.train(number, certificate.model.start, mechanism, InsecureSeededNoise(0, "s", number))

    assert set(private.evidence) == {1, 2}
    assert all(len(evidence.batch_sizes) == 3 for evidence in private.evidence.values())
    assert all(evidence.clipped == sum(evidence.batch_sizes) for evidence in private.evidence.values())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
