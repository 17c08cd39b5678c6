"""The base model, the adapter on it, and what is exported."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

from confide.common.adapter import frozen_factor
from confide.common.base import base_digest
from confide.common.errors import AdapterError, ModelError
from confide.common.model import AdaptedModel, attach, merge
from confide.common.network import load_base
from confide.common.objective import probabilities
from confide.common.plan import Plan
from confide.common.prefix import PrefixCache
from tests.conftest import MakeExamples, save_tokenizer

FAMILIES = {
    "bert": (transformers.BertConfig, transformers.BertModel, ("query", "value")),
    "roberta": (transformers.RobertaConfig, transformers.RobertaModel, ("query", "value")),
    "distilbert": (transformers.DistilBertConfig, transformers.DistilBertModel, ("q_lin", "v_lin")),
    "modernbert": (transformers.ModernBertConfig, transformers.ModernBertModel, ("Wqkv",)),
    "gpt2": (transformers.GPT2Config, transformers.GPT2Model, ("c_attn",)),
    "llama": (transformers.LlamaConfig, transformers.LlamaModel, ("q_proj", "v_proj")),
}


def small(family: str, directory: Path, plan: Plan) -> Plan:
    """Write a tiny random model of `family` and return the plan for it."""
    config_class, model_class, targets = FAMILIES[family]
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    if family == "distilbert":
        sizes = {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24}
    if family == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    if family == "modernbert":
        tokens |= {"cls_token_id": 2, "sep_token_id": 3}
    torch.manual_seed(3)
    model_class(config_class(vocab_size=19, max_position_embeddings=40, **sizes, **tokens)).save_pretrained(directory)
    save_tokenizer(directory)
    return dataclasses.replace(
        plan,
        model=dataclasses.replace(plan.model, base=family, base_digest=base_digest(directory)),
        adapter=dataclasses.replace(plan.adapter, targets=targets, top_layers=1),
    )


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama"])
def test_a_mean_pooled_export_loads_with_plain_peft_over_load_base(
    family: str, tmp_path: Path, plan: Plan, make_examples: MakeExamples
) -> None:
    fitted = small(family, tmp_path / "base", plan)
    fitted = dataclasses.replace(fitted, model=dataclasses.replace(fitted.model, pooling="mean"))
    model = attach(tmp_path / "base", fitted)
    vector, examples = somewhere(model), make_examples(5, seed=1)
    model.write(vector)
    cache = PrefixCache(model)
    list(cache.add(examples))
    expected = probabilities(model, examples)

    model.export(vector, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(load_base(tmp_path / "base", fitted), tmp_path / "adapter").eval()

    np.testing.assert_allclose(probabilities(model, examples, cache), expected, atol=2e-6)
    for row in range(5):
        batch = examples.batch(np.array([row]))
        with torch.no_grad():
            logits = loaded(
                input_ids=torch.from_numpy(batch.input_ids), attention_mask=torch.from_numpy(batch.attention_mask)
            ).logits
        np.testing.assert_allclose(logits.softmax(-1)[0].numpy(), expected[row], atol=1e-6)
    with pytest.raises(ModelError, match="no class in transformers"):
        merge(model, vector, tmp_path / "base", tmp_path / "merged")


def somewhere(model: AdaptedModel) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.random.default_rng(0).normal(0, 0.2, model.layout.length).astype(np.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_loads_with_plain_peft_and_gives_identical_logits(
    family: str, tmp_path: Path, plan: Plan, make_examples: MakeExamples
) -> None:
    fitted = small(family, tmp_path / "base", plan)
    model = attach(tmp_path / "base", fitted)
    vector, examples = somewhere(model), make_examples(5, seed=1)
    model.write(vector)
    rows = np.arange(5)
    with torch.no_grad():
        expected = model.logits(examples, rows)

    model.export(vector, tmp_path / "adapter")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()

    batch = examples.batch(rows)
    base.config.pad_token_id = 0
    with torch.no_grad():
        found = loaded(
            input_ids=torch.from_numpy(batch.input_ids), attention_mask=torch.from_numpy(batch.attention_mask)
        ).logits
    assert torch.equal(found, expected)
    assert expected.std() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_replaying_the_frozen_prefix_changes_no_logits(
    family: str, tmp_path: Path, plan: Plan, make_examples: MakeExamples
) -> None:
    model = attach(tmp_path / "base", small(family, tmp_path / "base", plan))
    model.write(somewhere(model))
    examples = make_examples(20, seed=2)
    cache = PrefixCache(model, micro_batch=6)
    list(cache.add(examples))

    plain, replayed = probabilities(model, examples), probabilities(model, examples, cache)

    np.testing.assert_allclose(replayed, plain, atol=2e-6)
    assert model.first_adapted == 2
    assert cache.size_bytes == examples.lengths.sum() * 16 * 4


def test_subsets_of_cached_examples_are_cached(base_directory: Path, plan: Plan, make_examples: MakeExamples) -> None:
    model = attach(base_directory, plan)
    examples = make_examples(9, seed=2)
    cache = PrefixCache(model)
    list(cache.add(examples))

    part = examples.subset(np.array([7, 1, 4]))

    np.testing.assert_allclose(probabilities(model, part, cache), probabilities(model, part), atol=2e-6)


def test_rows_that_were_never_added_have_no_prefix(
    base_directory: Path, plan: Plan, make_examples: MakeExamples
) -> None:
    cache = PrefixCache(attach(base_directory, plan))

    with pytest.raises(ModelError, match="never added"):
        cache.hidden(make_examples(2, seed=0), np.array([0]))


def test_merged_weights_give_the_adapters_logits(
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
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, str(base_directory), str(plan_file), str(tmp_path / seed)],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


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


def test_texts_longer_than_the_model_can_read_are_refused_before_any_row(base_directory: Path, plan: Plan) -> None:
    long = dataclasses.replace(plan, model=dataclasses.replace(plan.model, max_tokens=41))

    with pytest.raises(ModelError, match=r"cannot read texts of \[model\] max_tokens = 41 tokens"):
        attach(base_directory, long)


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
