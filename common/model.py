"""A frozen base with an adapter on it, and the way between trained tensors and flat vectors.

Adapters are peft's LoRA; which factors of them are trained is the plan's method. What is exported is peft's standard
format.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from confide.common.adapter import Floats, Layout, load_tensors, load_vector, save_vector, seeded_head
from confide.common.base import check_base
from confide.common.errors import AdapterError, ModelError
from confide.common.examples import Batch, Examples, Ints
from confide.common.factors import Factors, add_factors, plain, rests, stays, trained
from confide.common.network import (
    device,
    head_modules,
    layers,
    load_base,
    most_tokens,
    pixel_scale,
    transformers_config,
)
from confide.common.plan import LANGUAGE, R_ONLY, Plan

_ADAPTER = "default"
_TRAINED = "trained.safetensors"  # beside peft's files where those do not hold the trained numbers themselves


class AdaptedModel:
    """A frozen base model with an adapter and a head, whose trained numbers are flat vectors.

    Attributes:
        network: The peft model, in training mode with every dropout at zero.
        plan: The plan.
        factors: The low-rank factors of every adapted layer.
        trainable: The trained parameters by name, float32 whatever the base computes with.
        head: The names among them that belong to the head.
        layout: The order of the trained tensors that are sent.
        personal: The order of those that stay at the site; empty but with the method `share-a`.
        start: The vector a run begins with, (layout.length,), float32.
        personal_start: What the personal ones begin with, (personal.length,), float32.
        blocks: The transformer's layers.
        first_adapted: The index of the lowest layer that carries an adapter.
    """

    def __init__(
        self,
        network: Any,  # noqa: ANN401  peft has no types
        plan: Plan,
        factors: Sequence[Factors],
        head: dict[str, nn.Parameter],
        pixels: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    ) -> None:
        self.network = network
        self.plan = plan
        self.factors = tuple(factors)
        method = plan.adapter.method
        named = dict(head)
        for factor in self.factors:
            named |= {name: p for name, p in factor.names.items() if p.requires_grad}
        self.trainable = {name: named[name] for name in sorted(named)}
        self.head = frozenset(head)
        shapes = {name: tuple(p.shape) for name, p in self.trainable.items()}
        self.layout = Layout.of({name: shape for name, shape in shapes.items() if not stays(name, method)})
        self.personal = Layout.of({name: shape for name, shape in shapes.items() if stays(name, method)})
        self.blocks = layers(network)
        top = plan.adapter.top_layers
        self.first_adapted = len(self.blocks) - top if top else 0
        self._pixels = pixels
        self.start, self.personal_start = self.read(), self.read(self.personal)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        first: nn.Parameter = next(iter(self.trainable.values()))
        return first.device

    @property
    def dtype(self) -> torch.dtype:
        """What the trained numbers are kept in: float32, or float64 in exact tests."""
        first: nn.Parameter = next(iter(self.trainable.values()))
        return first.dtype

    def active(self, round_number: int) -> tuple[str, ...]:
        """Return the names of the parameters that round trains, sorted."""
        return tuple(name for name in self.trainable if not rests(name, self.plan.adapter.method, round_number))

    def read(self, layout: Layout | None = None) -> Floats:
        """Return the trained numbers as one vector, (layout.length,), float32; those that are sent if not told else."""
        layout = layout or self.layout
        return layout.flatten({name: self.trainable[name].detach().cpu().numpy() for name, _ in layout.tensors})

    def write(self, vector: Floats, layout: Layout | None = None) -> None:
        """Set the trained numbers; those that are sent if not told else.

        Raises:
            AdapterError: The vector has another length.
        """
        with torch.no_grad():
            for name, part in (layout or self.layout).split(vector).items():
                self.trainable[name].copy_(torch.from_numpy(part))
        self.settle()

    def settle(self) -> None:
        """Let peft's factors be what the trained numbers make them; due after each change of these."""
        for factor in self.factors:
            factor.settle()

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the scores of a batch, float32 or wider: (rows, outputs), or (rows, longest, outputs) of tokens."""
        bfloat16 = self.plan.compute.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            scores: torch.Tensor = self.network(**self._inputs(batch)).logits
        return scores.float() if bfloat16 else scores

    def logits(self, examples: Examples, rows: Ints) -> torch.Tensor:
        """Return the scores of the given rows; `rows` must not be empty."""
        return self.forward(examples.batch(rows))

    def row_bytes(self, lengths: Ints) -> Ints:
        """Return about how many bytes a row of each of these lengths takes on its way through the adapted layers.

        Args:
            lengths: Tokens, padding included; pixels for images.

        Source: Korthikanti et al. 2022 (arXiv 2205.05198), Sec. 4, without what dropout and the squares of the length
        take, which fused attention does not keep; it agrees with what was measured of MiniLM within a quarter, while
        small Llamas and GPT-2s took up to twice as much.
        """
        config = self.network.config
        width = int(config.hidden_size)
        inner = int(getattr(config, "intermediate_size", None) or getattr(config, "hidden_dim", None) or 4 * width)
        depth = (len(self.blocks) or int(config.num_hidden_layers)) - self.first_adapted
        each = 9 * width + 2 * inner
        # A layer that is computed again is there with what comes back and with the gaps that freed memory leaves.
        numbers = width * depth + 3 * each if self.plan.compute.gradient_checkpointing else each * depth
        if self.plan.task.kind in LANGUAGE:
            numbers += 3 * int(config.vocab_size)  # scores, their gradient and the loss's own copy
        positions = lengths
        if self.plan.data.image:
            positions = np.full_like(lengths, (int(config.image_size) // int(config.patch_size)) ** 2 + 1)
        return positions * numbers * self.dtype.itemsize

    def export(self, vector: Floats, directory: Path, personal: Floats | None = None) -> None:
        """Write `vector` as a standard PEFT directory: `adapter_config.json`, `adapter_model.safetensors`.

        With the method `share-a` it is a site's own adapter if that site's `personal` numbers are given; without them the
        factors B are 0 and the adapter does nothing until a site puts in its own.

        `peft.PeftModel.from_pretrained(base, directory)` then gives the same logits. With pooling `own`, `base` is
        loaded by the class that `network.CLASSES` names; with `mean`, by `network.load_base`.
        """
        self.write(vector)
        self.write(self.personal_start if personal is None else personal, self.personal)
        config = self.network.peft_config[_ADAPTER]
        config.base_model_name_or_path = self.plan.model.base
        config.inference_mode = True
        # peft keeps names in sets, whose order changes from process to process; equal runs must give equal bytes.
        config.target_modules = sorted(config.target_modules)
        config.modules_to_save = sorted(set(config.modules_to_save)) if config.modules_to_save else None
        directory.mkdir(parents=True, exist_ok=True)
        self.network.save_pretrained(directory, safe_serialization=True, save_embedding_layers=False)
        (directory / "README.md").unlink(missing_ok=True)  # peft's empty template; ours is a model card
        if self.plan.adapter.method == R_ONLY:
            save_vector(directory / _TRAINED, vector, self.layout)

    def import_exported(self, directory: Path) -> Floats:
        """Return the vector that `export` wrote to `directory`, checked against this model's layout and factors.

        The model is left with it, and with the personal numbers that were written beside it.

        Raises:
            AdapterError: The files are missing, damaged, of another layout, or hold other frozen factors.
        """
        tensors = {plain(n): t for n, t in load_tensors(directory / "adapter_model.safetensors").items()}
        if self.plan.adapter.method == R_ONLY:
            vector = load_vector(directory / _TRAINED, self.layout)
        else:
            vector = self.layout.flatten({n: t for n, t in tensors.items() if n in dict(self.layout.tensors)})
            mine = {n: t for n, t in tensors.items() if n in dict(self.personal.tensors)}
            self.write(self.personal.flatten(mine), self.personal)
        self.write(vector)
        for factor in self.factors:
            for name, p in ((f"{factor.name}.lora_A.weight", factor.a), (f"{factor.name}.lora_B.weight", factor.b)):
                found = tensors.pop(name, None)
                if found is None or not np.array_equal(found, p.detach().cpu().numpy()):
                    raise AdapterError(
                        f"The adapter in {directory} holds other factors than the plan's seed and its trained numbers "
                        "give. Use the plan it was trained with."
                    )
        if unknown := sorted(set(tensors) - self.head):
            raise AdapterError(f"The adapter in {directory} holds tensors this plan does not train: {unknown[0]}.")
        return vector

    def _inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        if batch.pixels is not None:
            mean, deviation = self._pixels or ((0.5,) * 3, (0.5,) * 3)
            pixels = torch.from_numpy(batch.pixels).to(self.device).to(self.dtype) / 255  # (rows, 3, height, width)
            shape = (1, 3, 1, 1)
            shift, scale = (torch.tensor(v, dtype=self.dtype, device=self.device) for v in (mean, deviation))
            return {"pixel_values": (pixels - shift.view(shape)) / scale.view(shape)}
        # Padding holds the pad token the network knows, whatever the tokenizer's is: by it decoders' classifiers find
        # where a row ends, which must not move with the length of the row beside it.
        ids = np.where(batch.attention_mask == 1, batch.input_ids, self.network.config.pad_token_id)
        inputs = {"input_ids": ids, "attention_mask": batch.attention_mask}
        if self.network.config.__dict__.get("type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = batch.token_type_ids
        return {name: torch.from_numpy(value).to(self.device) for name, value in inputs.items() if value is not None}


def attach(directory: Path, plan: Plan, *, head_only: bool = False, dtype: torch.dtype = torch.float32) -> AdaptedModel:
    """Return the plan's base model with the plan's adapter on it, at the plan's start.

    Args:
        directory: The base model's local directory; its digest must be the plan's.
        plan: The plan.
        head_only: Whether the adapter stays at its start, where it does nothing, and only the head is trained.
        dtype: float32; float64 for exact tests.

    Raises:
        ModelError: The base model is missing, altered, of no use for the plan's task, lacks the plan's targets, or has
            weights missing outside its head; or nothing would be trained.
    """
    check_base(directory, plan.model.base_digest)
    bfloat16 = plan.compute.precision == "bfloat16"
    where = device(plan)
    base = load_base(directory, plan, torch.bfloat16 if bfloat16 else dtype)
    head = head_modules(base, plan)
    network, factors = add_factors(base, plan, head)
    for p in network.parameters():
        p.requires_grad = False
    for factor in factors:
        for name in () if head_only else trained(factor, plan.adapter.method):
            factor.names[name].requires_grad = True
    heads = _heads(network, head, plan, dtype)
    if head_only and not heads:
        raise ModelError(f"{plan.task.kind} trains no head, so without its adapter nothing would be trained.")
    if where.type != "cpu":
        network.to(where)
        factors = tuple(_moved(factor, where) for factor in factors)
    network.train()  # layers are computed again on the way back in training mode only; every dropout is zero
    if plan.compute.gradient_checkpointing:
        network.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    pixels = pixel_scale(directory) if plan.data.image else None
    model = AdaptedModel(network, plan, factors, heads, pixels)
    _check_longest(model)
    return model


def merge(model: AdaptedModel, vector: Floats, base_directory: Path, directory: Path) -> None:
    """Write full weights, the base with the adapter folded in, that transformers loads without peft.

    Raises:
        ModelError: The plan pools by the mean, for which transformers has no class, or its base is kept in 4 bits.
    """
    import copy

    if model.plan.model.pooling != "own":
        raise ModelError(
            '[model] pooling = "mean" has no class in transformers that could load merged weights. '
            "Use the adapter's directory with confide.common.network.load_base instead."
        )
    if model.plan.model.quantization != "none":
        raise ModelError(
            "Nothing can be folded into a base in 4 bits without loss. Use the adapter's directory as it is."
        )
    model.write(vector)
    merged = copy.deepcopy(model.network).merge_and_unload()
    for p in merged.parameters():
        p.requires_grad = False
    merged.config = transformers_config(base_directory, model.plan)
    merged.config.architectures = [type(merged).__name__]
    merged.save_pretrained(directory)
    for file in base_directory.iterdir():
        if file.name.startswith(_BESIDE_WEIGHTS):
            shutil.copyfile(file, directory / file.name)


# What a merged model needs of its base beside the weights, by how the files' names begin.
_BESIDE_WEIGHTS = (
    "tokenizer",
    "vocab",
    "merges",
    "special_tokens",
    "added_tokens",
    "spiece",
    "chat_template",
    "preprocessor_config",
)


def _heads(network: nn.Module, head: Sequence[str], plan: Plan, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Return the head's parameters at the plan's start, by name, kept in `dtype` and requiring gradients."""
    found = {}
    for name, p in network.named_parameters():
        short = plain(name)
        if ".modules_to_save." in name and short.split(".")[0] in head:
            p.data = torch.from_numpy(_head_start(short, tuple(p.shape), plan)).to(dtype)
            p.requires_grad = True
            found[short] = p
    return found


def _moved(factor: Factors, where: torch.device) -> Factors:
    """Return the factors with R and its frame, which are no part of the network, where the network is."""
    import dataclasses

    if factor.r is None or factor.frame is None:
        return factor
    r = nn.Parameter(factor.r.detach().to(where), requires_grad=factor.r.requires_grad)
    return dataclasses.replace(factor, r=r, frame=factor.frame.to(where))


def _check_longest(model: AdaptedModel) -> None:
    """Return if a text of max_tokens tokens goes through the model: its positions may be fewer."""
    if model.plan.data.image:
        return
    length, config = model.plan.model.max_tokens, model.network.config
    if length > (most := most_tokens(config) or length):
        raise ModelError(
            f"The base model cannot read texts of [model] max_tokens = {length} tokens, but {most} at most. "
            "Lower max_tokens."
        )
    # RoBERTa, for one, counts positions from beyond its pad token's number and gives padding none.
    ids = np.full((1, length), int(config.pad_token_id == 0), np.int64)
    zeros = np.zeros_like(ids)
    batch = Batch(
        input_ids=ids,
        attention_mask=np.ones_like(ids),
        token_type_ids=zeros,
        labels=zeros[0, :1],
        targets=None,
        pixels=None,
    )
    try:
        with torch.no_grad():
            model.forward(batch)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ModelError(
            f"The base model cannot read texts of [model] max_tokens = {length} tokens ({type(error).__name__}). "
            "Lower max_tokens to what the model was made for."
        ) from None


def _head_start(name: str, shape: tuple[int, ...], plan: Plan) -> Floats:
    if len(shape) == 1:  # biases start at 0, the scales of a normalisation at 1
        return np.full(shape, float("norm" in name.lower() and name.endswith("weight")), np.float32)
    last = name.startswith(("classifier.weight", "classifier.out_proj", "score"))
    if last and plan.adapter.head_start == "zeros":
        return np.zeros(shape, np.float32)
    return seeded_head(name, shape, plan.adapter.seed)
