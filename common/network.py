"""The frozen base of a plan: transformers' own network for the kind of task, from a local directory.

It is loaded from safetensors, never from a hub, and no code beside it is run. Every dropout is zero: a dropout's draw
would be noise that nobody accounts for.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from confide.common.errors import MissingPackage, ModelError
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
)

# Transformers' class for each kind of task; a user of the adapter loads the base with the same one.
CLASSES = {
    TEXT_CLASSES: "AutoModelForSequenceClassification",
    REGRESSION: "AutoModelForSequenceClassification",
    TOKEN_CLASSES: "AutoModelForTokenClassification",
    CAUSAL: "AutoModelForCausalLM",
    INSTRUCTION: "AutoModelForCausalLM",
    MASKED: "AutoModelForMaskedLM",
    IMAGE_CLASSES: "AutoModelForImageClassification",
}
NF4 = "nf4"
_MOST_SETTINGS_BYTES = 1 << 20


def load_base(directory: Path, plan: Plan, dtype: torch.dtype = torch.float32) -> Any:  # noqa: ANN401  transformers' own
    """Return the plan's base model without its adapter, with every dropout at zero.

    It is what `peft.PeftModel.from_pretrained(load_base(…), adapter_directory)` needs. With pooling `own` that is the
    class of transformers that `CLASSES` names; with `mean` a `MeanPooledClassifier` around its `AutoModel`.

    Raises:
        ModelError: It cannot be loaded, or has weights missing outside its head.
        MissingPackage: The plan asks for a 4-bit base, and bitsandbytes is not installed.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    mean = plan.model.pooling == "mean"
    factory = transformers.AutoModel if mean else getattr(transformers, CLASSES[plan.task.kind])
    config = _config(directory, plan, dropout=False)
    options = _four_bits() if plan.model.quantization == NF4 else {}
    if dtype == torch.bfloat16 and device(plan).type == "cpu":
        # On processors the way back through torch's fused attention takes about ten times as long in bfloat16 as in float32.
        options["attn_implementation"] = "eager"
    try:
        base, info = factory.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # a directory can be wrong in as many ways as transformers has classes
        raise ModelError(
            f"The base model in {directory} cannot be loaded for {plan.task.kind} ({type(error).__name__}). Give a complete "
            "model of an architecture that transformers knows for this kind of task, without code of its own."
        ) from None
    absent = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    if mean:
        absent = {key for key in absent if not key.startswith("pooler.")}  # a mean has no use for it
        base = MeanPooledClassifier(base, _outputs(plan)).to(dtype)
    outside = sorted(key for key in absent if key.split(".")[0] not in head_modules(base, plan))
    if outside:
        raise ModelError(
            f"The base model in {directory} lacks weights outside its head: {', '.join(outside[:5])}. "
            "They would be random and frozen. Use a complete checkpoint of this architecture."
        )
    return base


def transformers_config(directory: Path, plan: Plan) -> Any:  # noqa: ANN401  transformers' own
    """Return the base's configuration for the plan's task as a user of merged weights needs it, dropouts included."""
    return _config(directory, plan, dropout=True)


class MeanPooledClassifier(nn.Module):
    """A sentence encoder with a linear head on the mean of its token vectors, padding left out."""

    base_model_prefix = "encoder"

    def __init__(self, encoder: Any, outputs: int) -> None:  # noqa: ANN401  any of transformers' encoders
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, outputs)
        self.config = encoder.config

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs: torch.Tensor) -> Any:  # noqa: ANN401
        """Return an output whose `logits` are (rows, outputs)."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        mask = attention_mask[..., None].to(tokens.dtype)  # (rows, longest, 1)
        pooled = (tokens * mask).sum(dim=1) / mask.sum(dim=1)  # (rows, width)
        return SequenceClassifierOutput(logits=self.classifier(pooled))

    def gradient_checkpointing_enable(self, **settings: Any) -> None:  # noqa: ANN401  transformers' own
        """Compute the encoder's layers again on the way back."""
        self.encoder.gradient_checkpointing_enable(**settings)


def head_modules(base: Any, plan: Plan) -> list[str]:  # noqa: ANN401  transformers' own
    """Return the names of the modules that make up the head; a language model's own head is part of the frozen base."""
    if plan.task.kind in LANGUAGE:
        return []
    return [
        name
        for name, child in base.named_children()
        if name != base.base_model_prefix and next(child.parameters(), None) is not None
    ]


def layers(network: nn.Module) -> nn.ModuleList:
    """Return the transformer's layers, lowest first; empty if the network does not keep them in one list."""
    depth = getattr(network.config, "num_hidden_layers", 0)
    found = [m for m in network.modules() if isinstance(m, nn.ModuleList) and len(m) == depth > 0]
    return found[0] if found else nn.ModuleList()


def most_tokens(config: Any) -> int | None:  # noqa: ANN401  transformers' own
    """Return how many tokens a row may have by the base's configuration; None if it does not say.

    Rotations of position that are made anew for longer batches end where they would be: beyond, a row's scores would
    change with the longest row beside it.

    Source: LongRoPE, Ding et al. 2024 (arXiv 2402.13753), and NTK-aware scaling, as transformers computes both.
    """
    limits = [getattr(config, "max_position_embeddings", None)]
    rotations = getattr(config, "rope_parameters", None) or {}
    for settings in (rotations, *rotations.values()):  # one for all layers, or one for each type of layer
        if isinstance(settings, dict) and settings.get("rope_type") == "longrope":
            limits.append(settings.get("original_max_position_embeddings"))
    return min((limit for limit in limits if limit is not None and limit > 0), default=None)


def pixel_scale(directory: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (mean, standard deviation) that the base expects of each channel, of pixels between 0 and 1.

    They are read from `preprocessor_config.json`; without that file they are one half, as ViT has them.

    Raises:
        ModelError: The file is no such configuration.
    """
    path = directory / "preprocessor_config.json"
    if not path.exists():
        return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    try:
        if path.stat().st_size > _MOST_SETTINGS_BYTES:
            raise ValueError
        settings = json.loads(path.read_bytes())
        mean = tuple(float(value) for value in settings["image_mean"])
        deviation = tuple(float(value) for value in settings["image_std"])
        if not len(mean) == len(deviation) == 3 or min(deviation) <= 0 or not np.isfinite([mean, deviation]).all():
            raise ValueError
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise ModelError(
            f"{path} does not say how pixels are scaled. It needs image_mean and image_std, three numbers each."
        ) from None
    return mean, deviation


def device(plan: Plan) -> torch.device:
    """Return where the plan's training runs.

    Raises:
        ModelError: The plan asks for what torch does not see here, or for a 4-bit base without a GPU.
    """
    wanted = plan.compute.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    elif (wanted == "cuda" and not torch.cuda.is_available()) or (
        wanted == "mps" and not torch.backends.mps.is_available()
    ):
        raise ModelError(f'[compute] device = "{wanted}", but torch sees none here. Choose auto or cpu.')
    if plan.model.quantization == NF4 and wanted != "cuda":
        raise ModelError('[model] quantization = "nf4" needs a CUDA GPU, and torch sees none here. Set it to "none".')
    return torch.device(wanted)


def _outputs(plan: Plan) -> int:
    return 1 if plan.task.kind == REGRESSION else len(plan.task.labels)


def _config(directory: Path, plan: Plan, *, dropout: bool) -> Any:  # noqa: ANN401  transformers' own
    import transformers

    labels = plan.task.labels
    options: dict[str, Any] = {}
    if plan.task.kind == REGRESSION:
        options = {"num_labels": 1, "problem_type": "regression"}
    elif plan.task.kind not in LANGUAGE:
        options = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
        }
    try:
        config = transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:  # a configuration can be wrong in as many ways as transformers has classes
        raise ModelError(
            f"The configuration in {directory} is not that of a model transformers knows ({type(error).__name__})."
        ) from None
    if not dropout:
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float):  # dropout, drop_path, layerdrop, …
                setattr(config, key, 0.0)
        if hasattr(config, "use_cache"):
            config.use_cache = False  # keys and values of earlier tokens are for generating, not for training
    _name_padding(config)
    return config


def _name_padding(config: Any) -> None:  # noqa: ANN401  transformers' own
    """Let the configuration name a pad token of the vocabulary: decoders' classifiers find a row's last token by it."""
    size = getattr(config, "vocab_size", 0)
    ends = getattr(config, "eos_token_id", None)  # one token, or several
    candidates = [getattr(config, "pad_token_id", None), *(ends if isinstance(ends, list) else [ends]), 0]
    if size:
        config.pad_token_id = next(token for token in candidates if token is not None and 0 <= token < size)


def _four_bits() -> dict[str, Any]:
    """Return the settings of a base in 4-bit NormalFloat with double quantisation (Dettmers et al. 2023, QLoRA)."""
    import importlib.util

    import transformers

    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackage("bitsandbytes", "gpu")
    return {
        "quantization_config": transformers.BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type=NF4,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        "device_map": {"": "cuda"},
    }
