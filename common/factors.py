"""The low-rank factors of an adapter, and which of them a plan trains.

An adapted linear layer computes W x + s B A x, with A (rank, in) and B (out, rank); s is alpha / rank. What is trained
decides how much noise there is to bear, what is sent, and whether the mean of the sites' factors is the mean of their
products.
"""

import dataclasses
from collections import Counter
from typing import Any

import torch
from torch import nn

from confide.common.adapter import frozen_factor
from confide.common.errors import ModelError
from confide.common.plan import ALTERNATE, FFA, R_ONLY, SHARE_A, Plan

_ADAPTER = "default"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factors:
    """The factors of one adapted layer.

    Attributes:
        name: The layer's name in the base model.
        layer: Peft's layer; its `base_layer` holds W.
        scale: s.
        a: A, (rank, in), float32.
        b: B, (out, rank), float32; with `r-only` it is `frame` times R and not trained itself.
        r: R, (rank, rank), only with `r-only`.
        frame: B's fixed factor, (out, rank), only with `r-only`.
    """

    name: str
    layer: Any
    scale: float
    a: nn.Parameter
    b: nn.Parameter
    r: nn.Parameter | None
    frame: torch.Tensor | None

    @property
    def names(self) -> dict[str, nn.Parameter]:
        """The factors that any method trains, by the name they have in layouts."""
        named = {f"{self.name}.lora_A.weight": self.a, f"{self.name}.lora_B.weight": self.b}
        return named if self.r is None else {f"{self.name}.lora_R.weight": self.r}

    def settle(self) -> None:
        """Let B be what R makes it."""
        if self.r is not None and self.frame is not None:
            with torch.no_grad():
                self.b.copy_(self.frame @ self.r)

    def folded(self) -> torch.Tensor:
        """Return W + s B A, (out, in): the layer's whole weight."""
        with torch.no_grad():
            b = self.b if self.r is None or self.frame is None else self.frame @ self.r
            weight: torch.Tensor = self.layer.base_layer.weight
            return torch.addmm(weight.T if is_conv1d(self.layer.base_layer) else weight, b, self.a, alpha=self.scale)


def add_factors(base: Any, plan: Plan, head: list[str]) -> tuple[Any, tuple[Factors, ...]]:  # noqa: ANN401  peft has no types
    """Return (the peft model, its factors at the plan's start), with only what the plan trains requiring gradients.

    A is orthonormal and follows from the plan's seed; B, or R, starts at zero.

    Raises:
        ModelError: The base lacks the plan's targets, or they are no plain linear layers of their own weights.
    """
    network = _add_lora(base, plan, head)
    owners = Counter(id(p) for module in network.modules() for p in module.parameters(recurse=False))
    factors = []
    for name, layer in network.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        _check_linear(name, layer)
        if owners[id(layer.base_layer.weight)] > 1:
            raise ModelError(
                f"[adapter] targets names {plain(name)}, whose weight another module of the base model shares, as heads "
                "share their embeddings' table. Folded into it, the adapter would change both. Choose other targets."
            )
        factors.append(_start(plain(name), layer, plan))
    return network, tuple(factors)


def trained(factors: Factors, method: str) -> set[str]:
    """Return the names of the factors that the method trains in some round."""
    names = set(factors.names)
    return {name for name in names if ".lora_A." not in name} if method == FFA else names


def rests(name: str, method: str, round_number: int) -> bool:
    """Return whether a factor is left as it is in that round: `alternate` trains B in odd rounds and A in even ones.

    Source: RoLoRA, Chen et al. 2024 (arXiv 2409.02346), Sec. 3.
    """
    if method != ALTERNATE:
        return False
    return (".lora_A." if round_number % 2 else ".lora_B.") in name


def stays(name: str, method: str) -> bool:
    """Return whether a trained factor never leaves the site: `share-a` keeps B.

    Source: FedSA-LoRA, Guo et al. 2025 (arXiv 2410.01463), Sec. 4.
    """
    return method == SHARE_A and ".lora_B." in name


def plain(name: str) -> str:
    """Return a parameter's or module's name without what peft puts around it."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.", ".")
    return name.replace(f".{_ADAPTER}.", ".").removesuffix(f".{_ADAPTER}")


def is_conv1d(module: nn.Module) -> bool:
    """Return whether this is GPT-2's linear layer, which keeps its weight transposed."""
    return type(module).__name__ == "Conv1D"


def _start(name: str, layer: Any, plan: Plan) -> Factors:  # noqa: ANN401  peft has no types
    a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
    rank, seed = plan.adapter.rank, plan.adapter.seed
    r, frame = None, None
    with torch.no_grad():
        a.copy_(torch.from_numpy(frozen_factor(f"{name}.lora_A.weight", rank, a.shape[1], seed)))
        b.zero_()
        if plan.adapter.method == R_ONLY:
            frame = torch.from_numpy(frozen_factor(f"{name}.lora_B.weight", rank, b.shape[0], seed).T.copy()).to(b)
            r = nn.Parameter(torch.zeros(rank, rank, dtype=b.dtype, device=b.device))
    return Factors(name=name, layer=layer, scale=layer.scaling[_ADAPTER], a=a, b=b, r=r, frame=frame)


def _check_linear(name: str, layer: Any) -> None:  # noqa: ANN401  peft has no types
    base = layer.base_layer
    known = isinstance(base, nn.Linear) or is_conv1d(base)
    kinds = {"DoRA": layer.use_dora, "LoRA with a bias": getattr(layer, "lora_bias", {})}
    odd = [kind for kind, used in kinds.items() if used.get(_ADAPTER, False)]
    if odd or not known:
        raise ModelError(
            f"The adapter at {plain(name)} is {odd[0] if odd else 'LoRA'} on a {type(base).__name__}. Per-person gradients "
            "are exact for plain LoRA on linear layers only. Choose other [adapter] targets."
        )


def _add_lora(base: Any, plan: Plan, head: list[str]) -> Any:  # noqa: ANN401  peft has no types
    import peft

    depth, top = getattr(base.config, "num_hidden_layers", 0), plan.adapter.top_layers
    if top > depth:
        raise ModelError(f"[adapter] top_layers = {top}, but the base model has {depth} layers.")
    config = peft.LoraConfig(
        task_type=_TASKS.get(plan.task.kind) if plan.model.pooling == "own" else None,
        r=plan.adapter.rank,
        lora_alpha=plan.adapter.alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(plan.adapter.targets),
        layers_to_transform=list(range(depth - top, depth)) if top else None,
        modules_to_save=head or None,
    )
    linear = {n.split(".")[-1] for n, m in base.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m)}
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


# What peft calls the kinds of task it knows; the others need no class of peft's own.
_TASKS = {
    "text-classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "causal-lm": "CAUSAL_LM",
    "instruction": "CAUSAL_LM",
}
