"""Tiny random models of every family for every kind of task, plans for them, rows to learn from, and the obvious loop.

The loop is what training is compared with: one row, one forward pass, one loss written out here, plain autograd.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from confide.common.base import base_digest
from confide.common.examples import IGNORED, Batch, Examples
from confide.common.model import AdaptedModel, attach
from confide.common.network import CLASSES
from confide.common.plan import (
    CAUSAL,
    IMAGE_CLASSES,
    INSTRUCTION,
    LANGUAGE,
    MASKED,
    REGRESSION,
    TEXT_CLASSES,
    TOKEN_CLASSES,
    Plan,
    read_plan,
    starter,
)

FloatArray = npt.NDArray[np.float64]

LAYERS, WORDS, LABELS = 3, 23, ("no", "perhaps", "yes")
IMAGE = (3, 8, 8)
_PAD, _BOS, _EOS = 0, 2, 3
_WIDE = {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 24}
_FEW_KEYS = _WIDE | {"num_key_value_heads": 1}
# What each family's configuration is called and made with, and the modules that carry adapters.
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "bert": ("Bert", _WIDE, ("query", "value")),
    "roberta": ("Roberta", _WIDE | {"pad_token_id": 1}, ("query", "value")),
    "distilbert": ("DistilBert", {"dim": 16, "n_layers": LAYERS, "n_heads": 2, "hidden_dim": 24}, ("q_lin", "v_lin")),
    "modernbert": ("ModernBert", _WIDE | {"cls_token_id": _BOS, "sep_token_id": _EOS}, ("Wqkv", "Wo")),
    "albert": ("Albert", _WIDE | {"embedding_size": 8, "classifier_dropout_prob": 0.1}, ("query", "value")),
    "gpt2": ("GPT2", {"n_embd": 16, "n_layer": LAYERS, "n_head": 2}, ("c_attn", "c_fc")),
    "llama": ("Llama", _FEW_KEYS, ("q_proj", "v_proj", "down_proj")),
    "mistral": ("Mistral", _FEW_KEYS | {"sliding_window": 4}, ("q_proj", "v_proj")),
    "qwen2": ("Qwen2", _FEW_KEYS, ("q_proj", "v_proj")),
    "qwen3": ("Qwen3", _FEW_KEYS | {"head_dim": 8}, ("q_proj", "v_proj")),
    "vit": ("ViT", _WIDE | {"image_size": IMAGE[1], "patch_size": 4}, ("q_proj", "v_proj")),
}
ENCODERS = ("bert", "roberta", "distilbert", "modernbert")
DECODERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
# Each family with each kind of task it is for.
PAIRS: tuple[tuple[str, str], ...] = (
    *((family, kind) for kind in (TEXT_CLASSES, REGRESSION) for family in (*ENCODERS, "gpt2", "llama")),
    *((family, TOKEN_CLASSES) for family in ENCODERS),
    *((family, kind) for kind in (CAUSAL, INSTRUCTION) for family in DECODERS),
    *((family, MASKED) for family in ENCODERS),
    ("vit", IMAGE_CLASSES),
)
# These compute their norms and rotations in float32 whatever their weights are.
PARTLY_FLOAT32 = ("llama", "mistral", "qwen2", "qwen3", "modernbert")


def tolerance(family: str) -> float:
    """Return how far, relative to its length, a gradient may be from the loop's in float64."""
    return 1e-6 if family in PARTLY_FLOAT32 else 1e-12


def save_base(directory: Path, family: str, kind: str, **changes: object) -> Path:
    """Write a tiny random base model for the kind of task, if it is not there yet; return its directory."""
    if directory.exists():
        return directory
    name, sizes, _ = FAMILIES[family]
    texts = {"vocab_size": WORDS, "max_position_embeddings": 40, "pad_token_id": _PAD}
    texts |= {"bos_token_id": _BOS, "eos_token_id": _EOS}
    settings = ({} if kind == IMAGE_CLASSES else texts) | sizes | changes
    config = getattr(transformers, f"{name}Config")(**settings)
    whole = CLASSES[kind] if kind in LANGUAGE else "AutoModel"  # a head is the plan's; a language model brings its own
    torch.manual_seed(3)
    model = getattr(transformers, whole).from_config(config)
    with torch.no_grad():
        for p in model.parameters():  # weights as small as initialisation's would make all gradients alike
            p.add_(torch.randn_like(p), alpha=0.1)
    model.save_pretrained(directory)
    return directory


def base_of(root: Path, family: str, kind: str) -> Path:
    """Return the directory below `root` in which `make_model` keeps its base."""
    return root / f"{family}-{'masked' if kind == MASKED else 'causal' if kind in LANGUAGE else 'plain'}"


def make_plan(directory: Path, family: str, kind: str, **changes: object) -> Plan:
    """Return a plan for the base in a directory; `changes` are settings by name, whatever section they are in."""
    plan = read_plan(starter("tiny", family, base_digest(directory), FAMILIES[family][2], kind).encode())
    labels = LABELS if plan.task.labels else ()
    settings: dict[str, object] = {"max_tokens": 16, "rank": 2, "labels": labels, "device": "cpu", **changes}
    for section in ("model", "adapter", "task", "compute"):
        old = getattr(plan, section)
        known = {key: value for key, value in settings.items() if hasattr(old, key)}
        plan = dataclasses.replace(plan, **{section: dataclasses.replace(old, **known)})
    return plan


def make_model(
    root: Path, family: str, kind: str, *, dtype: torch.dtype = torch.float64, **changes: object
) -> AdaptedModel:
    """Return a tiny model away from its start, where B and the head are zero and gradients special."""
    directory = save_base(base_of(root, family, kind), family, kind)
    model = attach(directory, make_plan(directory, family, kind, **changes), dtype=dtype)
    move(model)
    return model


def move(model: AdaptedModel, seed: int = 1) -> None:
    """Set all trained numbers, those that stay at a site included, to random ones."""
    random = np.random.default_rng(seed)
    for layout in (model.layout, model.personal):
        model.write(random.normal(0, 0.3, layout.length).astype(np.float32), layout)


def make_examples(kind: str, rows: int = 11, seed: int = 0, *, persons: int | None = None) -> Examples:
    """Return random rows of unlike lengths, of as many persons as told, some of whom have several; else one each."""
    random = np.random.default_rng(seed)
    several = () if persons is None else random.integers(0, persons, rows - persons)
    owners = np.concatenate([np.arange(rows if persons is None else persons), several]).astype(np.int64)
    image = IMAGE if kind == IMAGE_CLASSES else None
    lengths = np.full(rows, np.prod(IMAGE)) if image else random.integers(3, 13, rows)
    size = int(lengths.sum())
    store: Any = random.integers(0, 256, size).astype(np.uint8)
    if not image:
        store = random.integers(5, WORDS, size).astype(np.int32)
    targets: list[npt.NDArray[np.int32]] = []
    if kind in {*LANGUAGE, TOKEN_CLASSES}:
        answers = store if kind in {CAUSAL, INSTRUCTION} else random.integers(0, 3, size)
        kept = random.random(size) < (1.0 if kind == CAUSAL else 0.6)
        targets = [np.where(kept, answers, IGNORED).astype(np.int32)]
    return Examples(
        tokens=[store],
        store=np.zeros(rows, np.int64),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths.astype(np.int64),
        second=lengths.astype(np.int64),
        labels=random.normal(size=rows).astype(np.float32) if kind == REGRESSION else random.integers(0, 3, rows),
        persons=owners,
        pad_token=_PAD,
        targets=targets,
        image=image,
    )


def own_loss(kind: str, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the loss of the one row of a batch, word by word."""
    logits = logits.double()
    if kind == REGRESSION:
        return 0.5 * (logits[0, 0] - float(batch.labels[0])) ** 2
    if batch.targets is None:
        return -logits[0].log_softmax(-1)[int(batch.labels[0])]
    shift = 1 if kind in {CAUSAL, INSTRUCTION} else 0
    parts = [
        -logits[0, place - shift].log_softmax(-1)[int(target)]
        for place, target in enumerate(batch.targets[0])
        if place >= shift and target != IGNORED
    ]
    return torch.stack(parts).mean() if parts else logits.sum() * 0


def row_gradients(model: AdaptedModel, examples: Examples, active: Sequence[str] | None = None) -> FloatArray:
    """Return each row's gradient of the trained numbers, (rows, d), by the obvious loop."""
    active = tuple(model.trainable) if active is None else active
    lines = []
    for row in range(len(examples)):
        batch = examples.batch(np.array([row]))
        with _products_of_r(model):
            loss = own_loss(model.plan.task.kind, model.forward(batch), batch)
            parameters = [model.trainable[name] for name in active]
            parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        lines.append(torch.cat([part.flatten() for part in parts]).double().numpy())
    return np.stack(lines)


def person_gradients(model: AdaptedModel, examples: Examples, active: Sequence[str] | None = None) -> FloatArray:
    """Return each person's gradient, the mean over her rows, (persons, d), by the obvious loop."""
    rows = row_gradients(model, examples, active)
    return np.stack([rows[examples.persons == person].mean(axis=0) for person in range(examples.person_count)])


@contextlib.contextmanager
def _products_of_r(model: AdaptedModel) -> Iterator[None]:
    """Let peft's B be frame × R inside a `with`, as a function of R that autograd can go through."""
    layers = [(factor.layer.lora_B["default"], factor) for factor in model.factors if factor.r is not None]
    for layer, factor in layers:
        assert factor.frame is not None
        assert factor.r is not None
        del layer.weight
        layer.weight = factor.frame @ factor.r
    try:
        yield
    finally:
        for layer, factor in layers:
            del layer.weight
            layer.weight = factor.b
