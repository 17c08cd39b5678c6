"""A base model from a local directory, the adapter on it, and the way between tensors and one flat vector.

The base model is any of Hugging Face's sequence classifiers. It is frozen, loaded from safetensors, never from a hub,
and no code beside it is run. Adapters are peft's LoRA. Where adapters sit in the top layers only, the layers below are
the same for every round and site: `PrefixCache` computes them once.
"""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from confide.common.adapter import Floats, Layout, frozen_factor, load_tensors, seeded_head
from confide.common.base import check_base
from confide.common.errors import AdapterError, ModelError
from confide.common.examples import Examples, Ints
from confide.common.plan import Plan

_ADAPTER = "default"


class AdaptedModel:
    """A frozen base model with an adapter and a head, whose trainable numbers are one flat vector.

    Attributes:
        network: The peft model, in training mode with every dropout at zero.
        layout: The order of the trainable tensors in the vector.
        trainable: The trainable parameters by name, in the layout's order.
        head: The names among them that belong to the head.
        start: The vector a run begins with, (layout.length,), float32.
        blocks: The transformer's layers.
        first_adapted: The index of the lowest layer that carries an adapter.
    """

    def __init__(self, network: Any, plan: Plan, head_modules: Sequence[str]) -> None:  # noqa: ANN401  peft has no types
        self.network = network
        self.plan = plan
        named = {_plain(name): p for name, p in network.named_parameters() if p.requires_grad}
        self.layout = Layout.of({name: tuple(p.shape) for name, p in named.items()})
        self.trainable = {name: named[name] for name, _ in self.layout.tensors}
        self.head = frozenset(name for name in named if name.split(".")[0] in head_modules)
        self.blocks = _blocks(network)
        top = plan.adapter.top_layers
        self.first_adapted = len(self.blocks) - top if top else 0
        self.start = self.read()

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        first: nn.Parameter = next(iter(self.trainable.values()))
        return first.device

    def read(self) -> Floats:
        """Return the trainable numbers as one vector, (layout.length,), float32."""
        return self.layout.flatten({name: p.detach().cpu().numpy() for name, p in self.trainable.items()})

    def write(self, vector: Floats) -> None:
        """Set the trainable numbers.

        Raises:
            AdapterError: The vector has another length.
        """
        with torch.no_grad():
            for name, part in self.layout.split(vector).items():
                self.trainable[name].copy_(torch.from_numpy(part))

    def logits(self, examples: Examples, rows: Ints, cache: "PrefixCache | None" = None) -> torch.Tensor:
        """Return one line of scores per row, (rows, labels); `rows` must not be empty."""
        batch = examples.batch(rows)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if self.network.config.__dict__.get("type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = batch.token_type_ids
        tensors = {name: torch.from_numpy(value).to(self.device) for name, value in inputs.items()}
        hidden = None if cache is None else cache.hidden(examples, rows)
        with _replaying(self, hidden):
            scores: torch.Tensor = self.network(**tensors).logits
        return scores

    def probabilities(self, examples: Examples, cache: "PrefixCache | None" = None, micro_batch: int = 256) -> Floats:
        """Return each row's class probabilities, (rows, labels), float32, in the order of the rows."""
        result = np.zeros((len(examples), len(self.plan.task.labels)), np.float32)
        order = np.argsort(examples.lengths, kind="stable")
        with torch.no_grad():
            for start in range(0, len(order), micro_batch):
                rows = order[start : start + micro_batch]
                result[rows] = self.logits(examples, rows, cache).float().softmax(-1).cpu().numpy()
        return result

    def export(self, vector: Floats, directory: Path) -> None:
        """Write `vector` as a standard PEFT directory: `adapter_config.json`, `adapter_model.safetensors`.

        `peft.PeftModel.from_pretrained(base, directory)` then gives the same logits. With pooling `own`, `base` is
        `AutoModelForSequenceClassification.from_pretrained(base_directory, num_labels=…)`; with `mean`, `load_base`.
        """
        self.write(vector)
        config = self.network.peft_config[_ADAPTER]
        config.base_model_name_or_path = self.plan.model.base
        config.inference_mode = True
        # peft keeps names in sets, whose order changes from process to process; equal runs must give equal bytes.
        config.target_modules = sorted(config.target_modules)
        config.modules_to_save = sorted(set(config.modules_to_save))
        directory.mkdir(parents=True, exist_ok=True)
        self.network.save_pretrained(directory, safe_serialization=True, save_embedding_layers=False)
        (directory / "README.md").unlink(missing_ok=True)  # peft's empty template; ours is a model card

    def import_exported(self, directory: Path) -> Floats:
        """Return the vector that `export` wrote to `directory`, checked against this model's layout and factors.

        Raises:
            AdapterError: The files are missing, damaged, of another layout, or hold other frozen factors.
        """
        tensors = {_plain(n): t for n, t in load_tensors(directory / "adapter_model.safetensors").items()}
        for name, p in self.network.named_parameters():
            if ".lora_A." in name:
                factor = tensors.pop(_plain(name), None)
                if factor is None or not np.array_equal(factor, p.detach().cpu().numpy()):
                    raise AdapterError(
                        f"The adapter in {directory} was trained with other frozen factors than the plan's seed gives. "
                        "Use the plan it was trained with."
                    )
        return self.layout.flatten(tensors)


def attach(directory: Path, plan: Plan, *, head_only: bool = False, dtype: torch.dtype = torch.float32) -> AdaptedModel:
    """Return the plan's base model with the plan's adapter on it, at the plan's start.

    Args:
        directory: The base model's local directory; its digest must be the plan's.
        plan: The plan.
        head_only: Whether the adapter stays at its start, where it does nothing, and only the head is trained.
        dtype: float32; float64 for exact tests.

    Raises:
        ModelError: The base model is missing, altered, no sequence classifier, lacks the plan's targets, or has weights
            missing outside its head.
    """
    check_base(directory, plan.model.base_digest)
    base = load_base(directory, plan, dtype)
    head = _head_modules(base)
    network = _add_lora(base, plan, head)
    with torch.no_grad():
        for name, p in network.named_parameters():
            plain = _plain(name)
            if ".lora_A." in name:
                p.copy_(torch.from_numpy(frozen_factor(plain, p.shape[0], p.shape[1], plan.adapter.seed)))
                p.requires_grad_(requires_grad=False)  # ffa: A is never trained, so never sent
            elif ".lora_B." in name:
                p.requires_grad_(not head_only)
            elif p.requires_grad and plain.split(".")[0] in head:
                p.copy_(torch.from_numpy(_head_start(plain, tuple(p.shape), plan)))
    network.to(_device(plan))
    network.train()  # per-example hooks work in training mode only; every dropout is zero
    model = AdaptedModel(network, plan, head)
    _check_longest(model)
    return model


def _check_longest(model: AdaptedModel) -> None:
    """Return if a text of max_tokens tokens goes through the model: its positions may be fewer."""
    length = model.plan.model.max_tokens
    ids = torch.ones(1, length, dtype=torch.long, device=model.device)
    try:
        with torch.no_grad():
            model.network(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (RuntimeError, ValueError, IndexError) as error:
        raise ModelError(
            f"The base model cannot read texts of [model] max_tokens = {length} tokens ({type(error).__name__}). "
            "Lower max_tokens to what the model was made for."
        ) from None


def merge(model: AdaptedModel, vector: Floats, base_directory: Path, directory: Path) -> None:
    """Write full weights, the base with the adapter folded in, that transformers loads without peft.

    Raises:
        ModelError: The plan pools by the mean, for which transformers has no class.
    """
    import copy

    if model.plan.model.pooling != "own":
        raise ModelError(
            '[model] pooling = "mean" has no class in transformers that could load merged weights. '
            "Use the adapter's directory with confide.common.model.load_base instead."
        )

    model.write(vector)
    merged = copy.deepcopy(model.network).merge_and_unload()
    for p in merged.parameters():
        p.requires_grad_(requires_grad=False)
    merged.config = _config(base_directory, model.plan, dropout=True)
    merged.config.architectures = [type(merged).__name__]
    merged.save_pretrained(directory)
    for file in base_directory.iterdir():
        if file.name.startswith(("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "spiece")):
            shutil.copyfile(file, directory / file.name)


class PrefixCache:
    """What the frozen layers below the adapters make of every token, computed once and kept in memory.

    It lies beside the token stores of `Examples`: a row's window into its token store is its window into the cache, so
    subsets and unions of cached examples need nothing more. It is as sensitive as the rows themselves.
    """

    def __init__(self, model: AdaptedModel, micro_batch: int = 64) -> None:
        self._model = model
        self._micro_batch = micro_batch
        self._stores: dict[int, tuple[object, torch.Tensor]] = {}

    @staticmethod
    def helps(model: AdaptedModel) -> bool:
        """Whether there are frozen layers below the adapters whose output can stand in for them."""
        return model.first_adapted > 0 and model.plan.compute.cache_prefix

    @property
    def size_bytes(self) -> int:
        """Memory the cache takes."""
        return sum(hidden.nbytes for _, hidden in self._stores.values())

    def add(self, examples: Examples) -> Iterator[int]:
        """Compute the rows of `examples`, yielding how many are done after each batch.

        Raises:
            ModelError: This architecture gives other logits when its lower layers are replayed.
        """
        order = np.argsort(examples.lengths, kind="stable")
        for start in range(0, len(order), self._micro_batch):
            rows = order[start : start + self._micro_batch]
            with torch.no_grad():
                hidden, logits = _prefix(self._model, examples, rows)
            for line, row in enumerate(rows):
                length = int(examples.lengths[row])
                self._window(examples, int(row), hidden.shape[-1])[:] = hidden[line, :length].cpu()
            if start == 0:
                self._check(examples, rows, logits)
            yield start + len(rows)

    def hidden(self, examples: Examples, rows: Ints) -> torch.Tensor:
        """Return the given rows' hidden states, (rows, longest, width), zero where padding is."""
        windows = [self._window(examples, int(row)) for row in rows]
        return nn.utils.rnn.pad_sequence(windows, batch_first=True).to(self._model.device)

    def _window(self, examples: Examples, row: int, width: int | None = None) -> torch.Tensor:
        tokens = examples.tokens[int(examples.store[row])]
        if id(tokens) not in self._stores:
            if width is None:
                raise ModelError("These rows were never added to the prefix cache.")
            dtype = next(iter(self._model.trainable.values())).dtype
            # The tokens are kept beside their hidden states, so that the id stays theirs.
            self._stores[id(tokens)] = (tokens, torch.empty(len(tokens), width, dtype=dtype))
        start = int(examples.starts[row])
        return self._stores[id(tokens)][1][start : start + int(examples.lengths[row])]

    def _check(self, examples: Examples, rows: Ints, logits: torch.Tensor) -> None:
        with torch.no_grad():
            replayed = self._model.logits(examples, rows, self)
        if not torch.allclose(replayed, logits, rtol=1e-4, atol=1e-5):
            raise ModelError(
                f"{type(self._model.network.get_base_model()).__name__} gives other logits when its lower layers are "
                "replayed from memory. Set [compute] cache_prefix = false for this model."
            )


def _prefix(model: AdaptedModel, examples: Examples, rows: Ints) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what enters the lowest adapted layer, (rows, longest, width), and the logits."""
    seen: list[torch.Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = model.blocks[model.first_adapted].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        logits = model.logits(examples, rows)
    finally:
        handle.remove()
    return seen[0], logits


class _Replay(nn.Module):
    """Stands in for a frozen layer: the first gives the cached hidden states, the others pass them on."""

    def __init__(self, layer: nn.Module, hidden: torch.Tensor | None) -> None:
        super().__init__()
        self._layer = [layer]  # in a list, so that it is not registered as a submodule
        self._hidden = hidden

    def forward(self, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return hidden_states if self._hidden is None else self._hidden

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  whatever the layer has, such as attention_type
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattribute__("_layer")[0], name)


@contextlib.contextmanager
def _replaying(model: AdaptedModel, hidden: torch.Tensor | None) -> Iterator[None]:
    layers = [] if hidden is None else list(model.blocks)[: model.first_adapted]
    for index, layer in enumerate(layers):
        model.blocks[index] = _Replay(layer, hidden if index == 0 else None)
    try:
        yield
    finally:
        for index, layer in enumerate(layers):
            model.blocks[index] = layer


def load_base(directory: Path, plan: Plan, dtype: torch.dtype = torch.float32) -> Any:  # noqa: ANN401  transformers' own
    """Return the plan's base model without its adapter, with every dropout at zero.

    It is what `peft.PeftModel.from_pretrained(load_base(…), adapter_directory)` needs. With pooling `own` that is
    transformers' `AutoModelForSequenceClassification`; with `mean` a `MeanPooledClassifier` around its `AutoModel`.

    Raises:
        ModelError: It cannot be loaded, or has weights missing outside its head.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    mean = plan.model.pooling == "mean"
    factory = transformers.AutoModel if mean else transformers.AutoModelForSequenceClassification
    try:
        base, info = factory.from_pretrained(
            directory,
            config=_config(directory, plan, dropout=False),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # a directory can be wrong in as many ways as transformers has classes
        raise ModelError(
            f"The base model in {directory} cannot be loaded as a text classifier ({type(error).__name__}). Give a complete "
            "model of an architecture that transformers knows, without code of its own."
        ) from None
    absent = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    if mean:
        absent = {key for key in absent if not key.startswith("pooler.")}  # a mean has no use for it
        base = MeanPooledClassifier(base, len(plan.task.labels)).to(dtype)
    outside = sorted(key for key in absent if key.split(".")[0] not in _head_modules(base))
    if outside:
        raise ModelError(
            f"The base model in {directory} lacks weights outside its head: {', '.join(outside[:5])}. "
            "They would be random and frozen. Use a complete checkpoint of this architecture."
        )
    return base


class MeanPooledClassifier(nn.Module):
    """A sentence encoder with a linear head on the mean of its token vectors, padding left out."""

    base_model_prefix = "encoder"

    def __init__(self, encoder: Any, labels: int) -> None:  # noqa: ANN401  any of transformers' encoders
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, labels)
        self.config = encoder.config

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs: torch.Tensor) -> Any:  # noqa: ANN401
        """Return an output whose `logits` are (rows, labels)."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        mask = attention_mask[..., None].to(tokens.dtype)  # (rows, longest, 1)
        pooled = (tokens * mask).sum(dim=1) / mask.sum(dim=1)  # (rows, width)
        return SequenceClassifierOutput(logits=self.classifier(pooled))


def _head_modules(base: Any) -> list[str]:  # noqa: ANN401  transformers' own
    return [
        name
        for name, child in base.named_children()
        if name != base.base_model_prefix and next(child.parameters(), None) is not None
    ]


def _config(directory: Path, plan: Plan, *, dropout: bool) -> Any:  # noqa: ANN401  transformers' own
    import transformers

    labels = plan.task.labels
    try:
        config = transformers.AutoConfig.from_pretrained(
            directory,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # a configuration can be wrong in as many ways as transformers has classes
        raise ModelError(
            f"The configuration in {directory} is not that of a model transformers knows ({type(error).__name__})."
        ) from None
    if not dropout:
        for key, value in config.to_dict().items():
            if ("dropout" in key or "pdrop" in key) and isinstance(value, float):
                setattr(config, key, 0.0)
    if config.pad_token_id is None:
        config.pad_token_id = config.eos_token_id
    return config


def _add_lora(base: Any, plan: Plan, head: Sequence[str]) -> Any:  # noqa: ANN401  peft has no types
    import peft

    layers, top = base.config.num_hidden_layers, plan.adapter.top_layers
    if top > layers:
        raise ModelError(f"[adapter] top_layers = {top}, but the base model has {layers} layers.")
    config = peft.LoraConfig(
        task_type="SEQ_CLS" if plan.model.pooling == "own" else None,
        r=plan.adapter.rank,
        lora_alpha=plan.adapter.alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(plan.adapter.targets),
        layers_to_transform=list(range(layers - top, layers)) if top else None,
        modules_to_save=list(head),
    )
    linear = {n.split(".")[-1] for n, m in base.named_modules() if isinstance(m, nn.Linear) or _is_conv1d(m)}
    unknown = sorted(set(plan.adapter.targets) - linear)
    if unknown:
        raise ModelError(
            f"[adapter] targets names {', '.join(unknown)}, which the base model does not have. "
            f"Its linear modules are {', '.join(sorted(linear))}."
        )
    try:
        return peft.get_peft_model(base, config)
    except ValueError as error:
        raise ModelError(f"The adapter does not fit the base model: {error}") from None


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # GPT-2's linear layer, with its weight transposed


def _head_start(name: str, shape: tuple[int, ...], plan: Plan) -> Floats:
    if len(shape) == 1:  # biases start at 0, the scales of a normalisation at 1
        return np.full(shape, float("norm" in name.lower() and name.endswith("weight")), np.float32)
    last = name.startswith(("classifier.weight", "classifier.out_proj", "score"))
    if last and plan.adapter.head_start == "zeros":
        return np.zeros(shape, np.float32)
    return seeded_head(name, shape, plan.adapter.seed)


def _blocks(network: nn.Module) -> nn.ModuleList:
    depth = network.config.num_hidden_layers  # type: ignore[union-attr]
    found = [m for m in network.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return found[0] if found else nn.ModuleList()


def _plain(name: str) -> str:
    """Return a parameter's name without what peft puts around it."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.", ".")
    return name.replace(f".{_ADAPTER}.", ".")


def _device(plan: Plan) -> torch.device:
    wanted = plan.compute.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    elif (wanted == "cuda" and not torch.cuda.is_available()) or (
        wanted == "mps" and not torch.backends.mps.is_available()
    ):
        raise ModelError(f'[compute] device = "{wanted}", but torch sees none here. Choose auto or cpu.')
    return torch.device(wanted)
