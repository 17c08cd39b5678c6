"""The frozen base as transformers loads it: from a local directory, without dropout, on a device that is there."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from confide.common.errors import MissingPackage, ModelError
from confide.common.model import attach
from confide.common.network import (
    CLASSES,
    device,
    head_modules,
    layers,
    load_base,
    most_tokens,
    pixel_scale,
    transformers_config,
)
from confide.common.plan import CAUSAL, IMAGE_CLASSES, LANGUAGE, REGRESSION, SCORES, TEXT_CLASSES, TOKEN_CLASSES
from tests.families import LABELS, LAYERS, PAIRS, make_plan, save_base


@pytest.mark.parametrize(("family", "kind"), PAIRS)
def test_every_family_has_its_layers_its_head_and_no_dropout(family: str, kind: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", family, kind)
    network = load_base(base, make_plan(base, family, kind))

    head = head_modules(network, make_plan(base, family, kind))

    assert isinstance(network, getattr(transformers, CLASSES[kind])._model_mapping[type(network.config)])
    assert len(layers(network)) == LAYERS
    assert {m.p for m in network.modules() if isinstance(m, nn.Dropout)} <= {0.0}
    assert (head == []) == (kind in LANGUAGE)
    if head:
        assert {name.split(".")[0] for name, _ in network.named_parameters()} == {*head, network.base_model_prefix}


def test_every_kind_of_task_has_a_class() -> None:
    assert set(CLASSES) == set(SCORES)
    assert all(hasattr(transformers, name) for name in CLASSES.values())


def test_layers_are_never_left_out_at_random_and_merged_weights_keep_their_settings(tmp_path: Path) -> None:
    config = transformers.OPTConfig(
        vocab_size=23,
        hidden_size=16,
        word_embed_proj_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=24,
        max_position_embeddings=40,
        layerdrop=0.5,
        dropout=0.25,
    )
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path)
    plan = make_plan(tmp_path, "llama", CAUSAL)

    loaded = load_base(tmp_path, plan).config

    assert (loaded.layerdrop, loaded.dropout) == (0.0, 0.0)
    kept = transformers_config(tmp_path, plan)
    assert (kept.layerdrop, kept.dropout) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("named", "padding"),
    [
        ({"pad_token_id": 7}, 7),
        ({"pad_token_id": None, "eos_token_id": 3}, 3),
        ({"pad_token_id": None, "eos_token_id": [4, 3]}, 4),
        ({"pad_token_id": None, "eos_token_id": None}, 0),
        ({"pad_token_id": -1, "eos_token_id": 3}, 3),
        ({"pad_token_id": None, "eos_token_id": 500}, 0),
    ],
)
def test_a_pad_token_of_the_vocabulary_is_always_named(named: dict[str, Any], padding: int, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", TEXT_CLASSES)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | named))

    assert load_base(base, make_plan(base, "llama", TEXT_CLASSES)).config.pad_token_id == padding


def test_a_configuration_says_the_plans_labels_or_that_one_number_is_predicted(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "bert", TEXT_CLASSES)

    classes, number = (transformers_config(base, make_plan(base, "bert", kind)) for kind in (TOKEN_CLASSES, REGRESSION))

    assert classes.id2label == dict(enumerate(LABELS))
    assert (number.num_labels, number.problem_type) == (1, "regression")


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({}, None),
        ({"max_position_embeddings": 512}, 512),
        ({"max_position_embeddings": 512, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, 512),
        ({"max_position_embeddings": 512, "rope_parameters": None}, 512),
        (
            {
                "max_position_embeddings": 512,
                "rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 64},
            },
            64,
        ),
        (
            {
                "max_position_embeddings": 512,
                "rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": 64},
            },
            512,  # its rotations are the same for every length
        ),
        (
            {
                "max_position_embeddings": 512,
                "rope_parameters": {
                    "full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 32},
                    "sliding_attention": {"rope_type": "default"},
                },
            },
            32,
        ),
    ],
)
def test_a_text_has_no_more_tokens_than_rotations_stay_the_same_for(settings: dict[str, Any], most: int | None) -> None:
    class Settings:
        pass

    config = Settings()
    vars(config).update(settings)

    assert most_tokens(config) == most


def test_pixels_are_scaled_as_the_base_says(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    assert pixel_scale(tmp_path) == ((0.5,) * 3, (0.5,) * 3)

    path.write_text(json.dumps({"image_mean": [0.4, 0.5, 0.6], "image_std": [0.1, 0.2, 0.3]}))

    assert pixel_scale(tmp_path) == ((0.4, 0.5, 0.6), (0.1, 0.2, 0.3))


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "{}",
        "[]",
        '{"image_mean": [0.5], "image_std": [0.5]}',
        '{"image_mean": [0, 0, 0], "image_std": [0, 1, 1]}',
        '{"image_mean": [0, 0, 0], "image_std": [1, 1, NaN]}',
        '{"image_mean": "abc", "image_std": [1, 1, 1]}',
        " " * (1 << 20) + "{}",
    ],
)
def test_a_scale_of_pixels_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(content)

    with pytest.raises(ModelError, match="does not say how pixels are scaled"):
        pixel_scale(tmp_path)


def test_4_bits_without_a_gpu_are_refused_before_the_base_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base", "bert", TEXT_CLASSES)
    plan = make_plan(base, "bert", TEXT_CLASSES, quantization="nf4")
    monkeypatch.setattr("confide.common.model.load_base", None)

    with pytest.raises(ModelError, match='quantization = "nf4" needs a CUDA GPU'):
        attach(base, plan)


def test_4_bits_without_bitsandbytes_name_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "base", "bert", TEXT_CLASSES)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)

    with pytest.raises(MissingPackage, match="bitsandbytes"):
        load_base(base, make_plan(base, "bert", TEXT_CLASSES, quantization="nf4"))


@pytest.mark.parametrize("wanted", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "base", "bert", TEXT_CLASSES)
    plan = make_plan(base, "bert", TEXT_CLASSES, device=wanted)
    for module in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(module, "is_available", lambda: False)

    with pytest.raises(ModelError, match=f'device = "{wanted}", but torch sees none'):
        device(plan)
    auto = dataclasses.replace(plan, compute=dataclasses.replace(plan.compute, device="auto"))
    assert device(auto) == torch.device("cpu")


def test_a_model_without_a_depth_takes_no_top_layers(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1])
    transformers.ResNetModel(config).save_pretrained(tmp_path)

    for top, fragment in ((0, "targets names query, which the base model does not have"), (1, "has 0 layers")):
        with pytest.raises(ModelError, match=fragment):
            attach(tmp_path, make_plan(tmp_path, "vit", IMAGE_CLASSES, targets=("query",), top_layers=top))
