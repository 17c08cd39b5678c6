"""The base model, the adapter on it, and what is exported."""

import dataclasses
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn

from confide.common.adapter import frozen_factor
from confide.common.base import base_digest
from confide.common.errors import AdapterError, ModelError
from confide.common.examples import Examples
from confide.common.model import AdaptedModel, attach, merge
from confide.common.network import CLASSES, load_base
from confide.common.objective import probabilities
from confide.common.plan import (
    ALTERNATE,
    CAUSAL,
    FEDIT,
    FFA,
    LANGUAGE,
    MASKED,
    R_ONLY,
    REGRESSION,
    SHARE_A,
    TEXT_CLASSES,
    Plan,
    load_plan,
)
from tests.conftest import MakeExamples
from tests.families import LABELS, PAIRS, base_of, make_examples, make_model, make_plan, save_base

FAMILY_AND_KIND = pytest.mark.parametrize(("family", "kind"), PAIRS)
# What each method lets peft's file hold is another thing, so one encoder and one decoder go through all of them.
METHODS = [
    (family, kind, method)
    for family, kind in (("bert", TEXT_CLASSES), ("llama", CAUSAL))
    for method in (FFA, FEDIT, ALTERNATE, SHARE_A, R_ONLY)
]
Build = Callable[..., AdaptedModel]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tiny base models of all families lie."""
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def build(families: Path) -> Build:
    """Return a maker of tiny models in float32."""
    return functools.partial(make_model, families, dtype=torch.float32)


def loaded_plainly(directory: Path, model: AdaptedModel) -> Any:
    """Return what transformers makes of a directory with the class that is named for the kind of task."""
    kind = model.plan.task.kind
    labels = {} if kind in LANGUAGE else {"num_labels": 1 if kind == REGRESSION else len(LABELS)}
    return getattr(transformers, CLASSES[kind]).from_pretrained(directory, **labels)


def plain_logits(network: Any, model: AdaptedModel, examples: Examples) -> torch.Tensor:
    """Return what a network makes of the examples one by one, as a user would ask it: (rows, …)."""
    answers = []
    for row in range(len(examples)):
        batch = examples.batch(np.array([row]))
        inputs: dict[str, torch.Tensor] = {}
        if batch.pixels is not None:
            inputs = {"pixel_values": torch.from_numpy(batch.pixels).float() / 127.5 - 1}
        elif batch.input_ids is not None:
            inputs = {"input_ids": torch.from_numpy(batch.input_ids)}
        with torch.no_grad():
            answers.append(network.eval()(**inputs).logits[0])
    return nn.utils.rnn.pad_sequence(answers, batch_first=True)


def own_logits(model: AdaptedModel, examples: Examples) -> torch.Tensor:
    """Return what the model makes of the examples in one batch, zero where padding is: (rows, …)."""
    batch = examples.batch(np.arange(len(examples)))
    with torch.no_grad():
        logits = model.forward(batch)
    if logits.ndim == 3 and batch.attention_mask is not None:
        logits = logits * torch.from_numpy(batch.attention_mask)[..., None]
    return logits


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@FAMILY_AND_KIND
def test_the_export_loads_with_plain_peft_and_gives_equal_logits(
    family: str, kind: str, tmp_path: Path, build: Build, families: Path
) -> None:
    model, examples = build(family, kind), make_examples(kind)
    expected = own_logits(model, examples)

    model.export(model.read(), tmp_path)
    network = peft.PeftModel.from_pretrained(loaded_plainly(base_of(families, family, kind), model), tmp_path)

    assert_near(plain_logits(network, model, examples), expected)


@FAMILY_AND_KIND
def test_merged_weights_load_without_peft_and_give_equal_logits(
    family: str, kind: str, tmp_path: Path, build: Build, families: Path
) -> None:
    model, examples = build(family, kind), make_examples(kind)
    expected = own_logits(model, examples)

    merge(model, model.read(), base_of(families, family, kind), tmp_path)

    assert_near(plain_logits(loaded_plainly(tmp_path, model), model, examples), expected)
    assert_near(own_logits(model, examples), expected)


@pytest.mark.parametrize(("family", "kind", "method"), METHODS)
def test_what_any_method_exports_is_what_it_trained_and_comes_back(
    family: str, kind: str, method: str, tmp_path: Path, build: Build, families: Path
) -> None:
    model, examples = build(family, kind, method=method), make_examples(kind)
    vector, own = model.read(), model.read(model.personal)
    expected = own_logits(model, examples)

    model.export(vector, tmp_path, own)
    network = peft.PeftModel.from_pretrained(loaded_plainly(base_of(families, family, kind), model), tmp_path)
    fresh = attach(base_of(families, family, kind), model.plan)
    back = fresh.import_exported(tmp_path)

    assert_near(plain_logits(network, model, examples), expected)
    np.testing.assert_array_equal(back, vector)
    np.testing.assert_array_equal(fresh.read(fresh.personal), own)
    assert torch.equal(own_logits(fresh, examples), expected)
    assert (own.size > 0) == (method == SHARE_A)


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama"])
def test_a_mean_pooled_export_loads_with_plain_peft_over_load_base(
    family: str, tmp_path: Path, build: Build, families: Path
) -> None:
    model, examples = build(family, TEXT_CLASSES, pooling="mean"), make_examples(TEXT_CLASSES)
    base = base_of(families, family, TEXT_CLASSES)
    expected = own_logits(model, examples)

    model.export(model.read(), tmp_path / "adapter")
    network = peft.PeftModel.from_pretrained(load_base(base, model.plan), tmp_path / "adapter").eval()

    for row in range(len(examples)):
        batch = examples.batch(np.array([row]))
        assert batch.input_ids is not None
        assert batch.attention_mask is not None
        with torch.no_grad():
            logits = network(
                input_ids=torch.from_numpy(batch.input_ids), attention_mask=torch.from_numpy(batch.attention_mask)
            ).logits
        assert_near(logits[0], expected[row])
    with pytest.raises(ModelError, match="no class in transformers"):
        merge(model, model.read(), base, tmp_path / "merged")


@pytest.mark.parametrize(("family", "kind"), [("bert", MASKED), ("roberta", MASKED), ("gpt2", CAUSAL)])
def test_a_head_that_shares_its_embeddings_stays_frozen_and_shared(family: str, kind: str, build: Build) -> None:
    model = build(family, kind)

    network = model.network.get_base_model()

    assert network.get_output_embeddings().weight is network.get_input_embeddings().weight
    assert not network.get_input_embeddings().weight.requires_grad
    assert model.head == frozenset()


def somewhere(model: AdaptedModel) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.random.default_rng(0).normal(0, 0.2, model.layout.length).astype(np.float32)


def test_merged_weights_keep_the_labels_names_and_the_tokenizer(
    tmp_path: Path, base_directory: Path, plan: Plan, make_examples: MakeExamples
) -> None:
    model = attach(base_directory, plan)
    vector, examples = somewhere(model), make_examples(5, seed=1)

    merge(model, vector, base_directory, tmp_path / "merged")
    full = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()

    batch = examples.batch(np.arange(5))
    with torch.no_grad():
        expected = model.logits(examples, np.arange(5))
        found = full(
            input_ids=torch.from_numpy(batch.input_ids), attention_mask=torch.from_numpy(batch.attention_mask)
        ).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert full.config.id2label == {0: "negative", 1: "neutral", 2: "positive"}
    assert (tmp_path / "merged" / "tokenizer.json").exists()


def test_the_exported_adapter_comes_back_as_the_same_vector(tmp_path: Path, base_directory: Path, plan: Plan) -> None:
    model = attach(base_directory, plan)
    vector = somewhere(model)
    model.export(vector, tmp_path)

    np.testing.assert_array_equal(model.import_exported(tmp_path), vector)


def test_two_processes_export_the_same_bytes(tmp_path: Path, base_directory: Path, plan_file: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from confide.common.model import attach; "
        "from confide.common.plan import load_plan; "
        "model = attach(Path(sys.argv[1]), load_plan(Path(sys.argv[2]))); model.export(model.start, Path(sys.argv[3]))"
    )
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(base_directory), str(plan_file), str(tmp_path / "other")],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "1"},  # this process draws its own
    )

    model = attach(base_directory, load_plan(plan_file))
    model.export(model.start, tmp_path / "own")

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_an_adapter_of_another_seed_is_refused(tmp_path: Path, base_directory: Path, plan: Plan) -> None:
    other = dataclasses.replace(plan, adapter=dataclasses.replace(plan.adapter, seed=1))
    model = attach(base_directory, other)
    model.export(somewhere(model), tmp_path)

    with pytest.raises(AdapterError, match="holds other factors"):
        attach(base_directory, plan).import_exported(tmp_path)


def test_ffa_trains_b_and_the_head_and_fixes_a_by_the_seed(base_directory: Path, plan: Plan) -> None:
    model = attach(base_directory, plan)

    names = [name for name, _ in model.layout.tensors]
    assert names == sorted(names)
    assert {name.rsplit(".", 2)[-2] for name in names} == {"lora_B", "classifier"}
    assert {name.split(".")[3] for name in names if "lora_B" in name} == {"2", "3"}
    factors = {n: p for n, p in model.network.named_parameters() if ".lora_A." in n}
    assert len(factors) == 4
    for name, p in factors.items():
        plain = name.removeprefix("base_model.model.").replace(".default.", ".")
        assert not p.requires_grad
        np.testing.assert_array_equal(p.detach().numpy(), frozen_factor(plain, 2, 16, plan.adapter.seed))


def test_the_start_is_the_same_whatever_torch_drew_before(base_directory: Path, plan: Plan) -> None:
    seeded = dataclasses.replace(plan, adapter=dataclasses.replace(plan.adapter, head_start="seeded"))
    torch.manual_seed(1)
    first = attach(base_directory, seeded).start
    torch.manual_seed(2)
    second = attach(base_directory, seeded).start

    np.testing.assert_array_equal(first, second)
    assert np.count_nonzero(first) == 3 * 16
    assert not attach(base_directory, plan).start.any()


def test_the_head_alone_can_be_trained(base_directory: Path, plan: Plan) -> None:
    model = attach(base_directory, plan, head_only=True)

    assert [name for name, _ in model.layout.tensors] == ["classifier.bias", "classifier.weight"]
    assert model.head == {"classifier.bias", "classifier.weight"}


def test_dropout_is_off_while_training(base_directory: Path, plan: Plan, make_examples: MakeExamples) -> None:
    model = attach(base_directory, plan)
    model.write(somewhere(model))
    examples = make_examples(6, seed=1)

    assert model.network.training
    np.testing.assert_array_equal(probabilities(model, examples), probabilities(model, examples))


def altered(directory: Path, base: Path) -> Path:
    shutil.copytree(base, directory)
    return directory


def test_another_model_under_the_same_name_is_refused(tmp_path: Path, base_directory: Path, plan: Plan) -> None:
    copy = altered(tmp_path / "copy", base_directory)
    with (copy / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x01")

    with pytest.raises(ModelError, match="but the plan names"):
        attach(copy, plan)


@pytest.mark.parametrize(
    ("targets", "top_layers", "fragment"),
    [
        (("query", "nonsense"), 2, "nonsense"),
        (("query",), 9, "has 4 layers"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    base_directory: Path, plan: Plan, targets: tuple[str, ...], top_layers: int, fragment: str
) -> None:
    adapter = dataclasses.replace(plan.adapter, targets=targets, top_layers=top_layers)

    with pytest.raises(ModelError, match=fragment):
        attach(base_directory, dataclasses.replace(plan, adapter=adapter))


@pytest.mark.parametrize(
    ("family", "kind", "reads"),
    [("bert", TEXT_CLASSES, 40), ("roberta", TEXT_CLASSES, 38), ("gpt2", CAUSAL, 40), ("llama", CAUSAL, 40)],
)
def test_texts_longer_than_the_model_can_read_are_refused_before_any_row(
    family: str, kind: str, reads: int, build: Build
) -> None:
    assert build(family, kind, max_tokens=reads).plan.model.max_tokens == reads

    with pytest.raises(ModelError, match=rf"cannot read texts of \[model\] max_tokens = {reads + 1} tokens"):
        build(family, kind, max_tokens=reads + 1)


@pytest.mark.parametrize(
    ("rotation", "most"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, 40),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                "original_max_position_embeddings": 20,
            },
            20,
        ),
        ({"rope_type": "linear", "factor": 2.0}, 40),
    ],
)
def test_rotations_that_would_change_with_the_longest_row_are_refused(
    rotation: dict[str, Any], most: int, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", "llama", CAUSAL, rope_parameters={"rope_theta": 1e4, **rotation})
    attach(base, make_plan(base, "llama", CAUSAL, max_tokens=most))

    with pytest.raises(ModelError, match=f"but {most} at most"):
        attach(base, make_plan(base, "llama", CAUSAL, max_tokens=most + 1))


def test_a_directory_with_an_adapter_in_it_is_no_base(tmp_path: Path, base_directory: Path, plan: Plan) -> None:
    copy = altered(tmp_path / "copy", base_directory)
    (copy / "adapter_config.json").write_text("{}")

    with pytest.raises(ModelError, match=r"holds an adapter_config\.json"):
        attach(copy, plan)


def test_weights_missing_outside_the_head_are_refused(tmp_path: Path, base_directory: Path, plan: Plan) -> None:
    from safetensors.torch import load_file, save_file

    copy = altered(tmp_path / "copy", base_directory)
    weights = load_file(copy / "model.safetensors")
    del weights["pooler.dense.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    fitted = dataclasses.replace(plan, model=dataclasses.replace(plan.model, base_digest=base_digest(copy)))

    with pytest.raises(ModelError, match=r"lacks weights outside its head: bert\.pooler\.dense\.weight"):
        attach(copy, fitted)


@pytest.mark.parametrize(
    ("family", "kind", "lacking"), [("llama", CAUSAL, "lm_head.weight"), ("bert", MASKED, "cls.predictions")]
)
def test_a_language_model_without_its_own_head_is_refused(family: str, kind: str, lacking: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", family, TEXT_CLASSES)

    with pytest.raises(ModelError, match=f"lacks weights outside its head: {lacking}"):
        attach(base, make_plan(base, family, kind))


def test_a_task_without_a_head_cannot_train_the_head_alone(families: Path, build: Build) -> None:
    plan = build("gpt2", CAUSAL).plan

    with pytest.raises(ModelError, match="causal-lm trains no head"):
        attach(base_of(families, "gpt2", CAUSAL), plan, head_only=True)


@pytest.mark.parametrize("content", ["{}", "not json", '{"model_type": "no-such-model"}'])
def test_a_damaged_configuration_is_refused(tmp_path: Path, base_directory: Path, plan: Plan, content: str) -> None:
    copy = altered(tmp_path / "copy", base_directory)
    (copy / "config.json").write_text(content)
    fitted = dataclasses.replace(plan, model=dataclasses.replace(plan.model, base_digest=base_digest(copy)))

    with pytest.raises(ModelError, match="configuration"):
        attach(copy, fitted)


def test_damaged_weights_are_refused(tmp_path: Path, base_directory: Path, plan: Plan) -> None:
    copy = altered(tmp_path / "copy", base_directory)
    (copy / "model.safetensors").write_bytes(b"not safetensors")
    fitted = dataclasses.replace(plan, model=dataclasses.replace(plan.model, base_digest=base_digest(copy)))

    with pytest.raises(ModelError, match="cannot be loaded"):
        attach(copy, fitted)
