"""Every row's own gradient of the trained weights, from one backward pass.

While a `Recorder` is on a model, the trained layers run as autograd functions of ours. On the way back they note each
row's part of a weight's gradient, where autograd would have summed all rows', and pass on what lower layers need. So
it costs what ordinary training costs: the same matrix products, one backward pass. A plain float32 base goes one better:
W + s B A is folded once a step, and a layer is one product instead of three.

Source: Goodfellow 2015 (arXiv 1510.01799): a row's gradient of a linear layer is the product of what went in and what
came back.
"""

import contextlib
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from confide.common.errors import ModelError
from confide.common.factors import Factors, is_conv1d, plain
from confide.common.model import AdaptedModel

_MIXES_ROWS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


class Recorder:
    """Notes each row's gradient of the parameters that a round trains.

    It changes the model inside `on` only, so sites of a simulation can share one.

    Args:
        model: The base model with the adapter.

    Raises:
        ModelError: A trained weight belongs to a layer without exact per-row gradients, or a layer mixes rows.
    """

    def __init__(self, model: AdaptedModel) -> None:
        self._model = model
        self._heads = dict(_head_layers(model))
        self._noted: dict[str, torch.Tensor] = {}
        self._active: frozenset[str] = frozenset()
        self._rows = 0  # of the pass back that is under way
        # The way back must pass through layers whose input needs no gradient, so each takes this as a second input.
        self._anchor = torch.zeros((), device=model.device, requires_grad=True)
        _check_rows_apart(model)

    @contextlib.contextmanager
    def on(self, active: tuple[str, ...]) -> Iterator[None]:
        """Be on the model inside a `with`, for the parameters of these names; weights are folded as they are now."""
        self._active = frozenset(active)
        before: list[tuple[nn.Module, dict[str, Any]]] = []
        try:
            for factors in self._model.factors:
                if self._active.isdisjoint(factors.names):
                    continue  # with the head alone trained, nothing need go back this far
                before.append((factors.layer, _own_forward(factors.layer)))
                factors.layer.forward = MethodType(_adapted(self, factors, self._folded(factors)), factors.layer)
            for name, layer in self._heads.items():
                before.append((layer, _own_forward(layer)))
                layer.forward = MethodType(_trained_layer(self, name), layer)
            yield
        finally:
            for layer, own in before:
                layer.__dict__.pop("forward", None)
                layer.__dict__.update(own)
            self._noted.clear()

    def _folded(self, factors: Factors) -> torch.Tensor | None:
        """Return a layer's whole weight, if its base is plain numbers as wide as training's own."""
        base = factors.layer.base_layer
        exact = type(base) is nn.Linear or is_conv1d(base)
        return factors.folded() if exact and base.weight.dtype == self._model.dtype else None

    def noted(self, losses: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Go back from the rows' losses; yield each parameter's gradient for each row, (rows, *shape).

        They are float32 or wider, and come in the order of the model's trained parameters, whose own `grad` is cleared.

        Args:
            losses: (rows,), of rows that went through the model inside `on`.

        Raises:
            ModelError: A parameter got no gradient for each row, or gradients that its layer did not see.
        """
        self._noted.clear()
        self._rows = len(losses)
        trainable = self._model.trainable
        for p in trainable.values():
            p.grad = None
        if losses.requires_grad:
            losses.sum().backward()  # type: ignore[no-untyped-call]
        # What goes through the layers reaches no parameter. What does reach one is the sum over all rows, unclipped.
        beside = [name for name, p in trainable.items() if p.grad is not None]
        for name in beside:
            trainable[name].grad = None
        if beside:
            raise ModelError(
                f"The model uses {beside[0]} beside the layer that holds it, so no gradient of its own is known for each "
                "row. It cannot be trained privately."
            )
        for name in trainable:
            if name not in self._active:
                continue
            gradient = self._noted.pop(name, None)
            if gradient is None:
                raise ModelError(
                    f"No gradient came back to {name}: the model does not use that weight. Choose other [adapter] targets."
                )
            yield name, gradient

    def wants(self, name: str) -> bool:
        """Return whether this parameter's gradients are noted."""
        return name in self._active

    def note(self, name: str, gradient: torch.Tensor) -> None:
        """Add to what is noted for a parameter: a layer may be gone through more than once.

        Raises:
            ModelError: It is not one gradient for each row.
        """
        if len(gradient) != self._rows:
            raise ModelError(
                f"{name} came with {len(gradient)} gradients for {self._rows} rows: this model does not keep the rows of a "
                "batch apart. It cannot be trained privately."
            )
        known = self._noted.get(name)
        self._noted[name] = gradient if known is None else known + gradient

    @property
    def anchor(self) -> torch.Tensor:
        """Something that needs a gradient."""
        return self._anchor


def _own_forward(layer: nn.Module) -> dict[str, Any]:
    """Return the forward method that was put on this very layer before, if any, by name."""
    return {key: value for key, value in layer.__dict__.items() if key == "forward"}


def _adapted(recorder: Recorder, factors: Factors, folded: torch.Tensor | None) -> Any:
    """Return the forward method of an adapted layer."""

    def forward(layer: Any, x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        if folded is not None:
            bias = layer.base_layer.bias
            return _AdaptedLinear.apply(x, recorder.anchor, recorder, factors, folded, bias)  # type: ignore[no-untyped-call,no-any-return]
        beside: torch.Tensor = _Beside.apply(x, recorder.anchor, recorder, factors)  # type: ignore[no-untyped-call]
        result: torch.Tensor = layer.base_layer(x)
        return result + beside.to(result.dtype)

    return forward


class _AdaptedLinear(torch.autograd.Function):
    """y = x (W + s B A)ᵀ + bias, with W + s B A folded into one weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,  # (rows, …, in)
        anchor: torch.Tensor,
        recorder: Recorder,
        factors: Factors,
        folded: torch.Tensor,  # (out, in)
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        _remember(ctx, x, recorder, factors)
        ctx.folded = folded
        return F.linear(x, folded, bias)  # (rows, …, out)

    @staticmethod
    def backward(ctx: Any, back: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _note_factors(ctx, back)
        return (back @ ctx.folded if ctx.needs_input_grad[0] else None), None, None, None, None, None


class _Beside(torch.autograd.Function):
    """y = s x Aᵀ Bᵀ, beside a base layer that is not plain float numbers of training's own width."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor, recorder: Recorder, factors: Factors) -> torch.Tensor:
        inner = _remember(ctx, x, recorder, factors)
        return (inner @ _outer(factors).to(inner.dtype).T) * factors.scale  # (rows, …, out)

    @staticmethod
    def backward(ctx: Any, back: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _note_factors(ctx, back)
        down = None
        if ctx.needs_input_grad[0]:
            a, b = ctx.factors.a.detach().to(back.dtype), _outer(ctx.factors).to(back.dtype)
            down = ((back @ b) @ a * ctx.factors.scale).to(ctx.came_as)
        return down, None, None, None


def _remember(ctx: Any, x: torch.Tensor, recorder: Recorder, factors: Factors) -> torch.Tensor:
    """Save what the way back needs and return x Aᵀ: x itself, which is large, is kept only where A is trained."""
    inner = x @ factors.a.detach().to(x.dtype).T  # (rows, …, rank)
    ctx.recorder, ctx.factors, ctx.came_as = recorder, factors, x.dtype
    ctx.save_for_backward(inner, x if recorder.wants(f"{factors.name}.lora_A.weight") else None)
    return inner


def _note_factors(ctx: Any, back: torch.Tensor) -> None:
    """Note each row's gradient of A, B or R from what came back, (rows, …, out)."""
    recorder, factors = ctx.recorder, ctx.factors
    inner, x = ctx.saved_tensors
    a, b, r = (f"{factors.name}.lora_{letter}.weight" for letter in "ABR")
    if recorder.wants(b):
        recorder.note(b, _products(back, inner, factors.scale))  # (rows, out, rank)
    if recorder.wants(r):
        recorder.note(r, _products(back @ factors.frame.to(back.dtype), inner, factors.scale))  # (rows, rank, rank)
    if recorder.wants(a):
        recorder.note(a, _products(back @ _outer(factors).to(back.dtype), x, factors.scale))  # (rows, rank, in)


def _products(back: torch.Tensor, ahead: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Return each row's sum over its positions of scale × back ⊗ ahead, float32 or wider: (rows, back, ahead)."""
    back, ahead = (_wide(t) for t in (back, ahead))
    if back.ndim == 2:
        return (back * scale)[:, :, None] * ahead[:, None, :]
    return torch.bmm(back.flatten(1, -2).transpose(1, 2), ahead.flatten(1, -2)).mul_(scale)


def _outer(factors: Factors) -> torch.Tensor:
    """Return B as the trained numbers make it, (out, rank)."""
    if factors.r is None or factors.frame is None:
        return factors.b.detach()
    return factors.frame @ factors.r.detach()


def _wide(numbers: torch.Tensor) -> torch.Tensor:
    return numbers if numbers.dtype == torch.float64 else numbers.float()


def _trained_layer(recorder: Recorder, name: str) -> Any:
    """Return the forward method of a layer of the head."""

    def forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
        if isinstance(layer, nn.LayerNorm):
            # Only scale and shift are trained; what is before them is left to autograd.
            x = F.layer_norm(_wide(x), layer.normalized_shape, None, None, layer.eps)
            return _Scaled.apply(x, recorder.anchor, recorder, name, layer)  # type: ignore[no-untyped-call,no-any-return]
        return _Linear.apply(x, recorder.anchor, recorder, name, layer)  # type: ignore[no-untyped-call,no-any-return]

    return forward


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + bias, with W and the bias trained."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, anchor: torch.Tensor, recorder: Recorder, name: str, layer: Any
    ) -> torch.Tensor:
        ctx.recorder, ctx.name, ctx.came_as = recorder, name, x.dtype
        ctx.weight = layer.weight.detach()
        ctx.save_for_backward(x)
        bias = None if layer.bias is None else layer.bias.detach()
        return F.linear(x.to(ctx.weight.dtype), ctx.weight, bias)

    @staticmethod
    def backward(ctx: Any, back: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        recorder, (x,) = ctx.recorder, ctx.saved_tensors
        if recorder.wants(f"{ctx.name}.weight"):
            recorder.note(f"{ctx.name}.weight", _products(back, x))  # (rows, out, in)
        if recorder.wants(f"{ctx.name}.bias"):
            recorder.note(f"{ctx.name}.bias", _over_positions(back, 1))  # (rows, out)
        down = (back.to(ctx.weight.dtype) @ ctx.weight).to(ctx.came_as) if ctx.needs_input_grad[0] else None
        return down, None, None, None, None


class _Scaled(torch.autograd.Function):
    """y = w x + b, number by number, with w and b trained."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, anchor: torch.Tensor, recorder: Recorder, name: str, layer: Any
    ) -> torch.Tensor:
        ctx.recorder, ctx.name = recorder, name
        ctx.weight = layer.weight.detach()
        ctx.save_for_backward(x)
        y: torch.Tensor = x * ctx.weight
        return y if layer.bias is None else y + layer.bias.detach()

    @staticmethod
    def backward(ctx: Any, back: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        recorder, (x,) = ctx.recorder, ctx.saved_tensors
        own = ctx.weight.ndim
        if recorder.wants(f"{ctx.name}.weight"):
            recorder.note(f"{ctx.name}.weight", _over_positions(back * x, own))  # (rows, *shape)
        if recorder.wants(f"{ctx.name}.bias"):
            recorder.note(f"{ctx.name}.bias", _over_positions(back, own))
        return (back * ctx.weight if ctx.needs_input_grad[0] else None), None, None, None, None


def _over_positions(numbers: torch.Tensor, own: int) -> torch.Tensor:
    """Return the sum over all dimensions but the first and the last `own`."""
    between = tuple(range(1, numbers.ndim - own))
    return _wide(numbers).sum(dim=between) if between else _wide(numbers)


def _head_layers(model: AdaptedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, layer) for the layers of the head that hold its parameters.

    Raises:
        ModelError: One of them is no linear layer or layer norm.
    """
    known = (nn.Linear, nn.LayerNorm)
    unsupported, reached = [], set[str]()
    for path, layer in model.network.named_modules():
        name = plain(path)
        held = [f"{name}.{key}" for key, p in layer.named_parameters(recurse=False) if p.requires_grad]
        held = [key for key in held if key in model.head]
        if not held:
            continue
        reached.update(held)
        if type(layer) in known:
            yield name, layer
        else:
            unsupported.append(f"{name} ({type(layer).__name__})")
    trained = {name for factors in model.factors for name in factors.names}
    owners = {id(p): type(m).__name__ for m in model.network.modules() for p in m.parameters(recurse=False)}
    elsewhere = sorted(set(model.trainable) - trained - reached)
    unsupported += [f"{name} ({owners.get(id(model.trainable[name]), 'no layer')})" for name in elsewhere]
    if unsupported:
        raise ModelError(
            f"Per-person gradients are exact for {', '.join(k.__name__ for k in known)} and plain LoRA only; these trained "
            f"weights belong to others: {', '.join(unsupported)}. Choose another base model or other [adapter] targets."
        )


def _check_rows_apart(model: AdaptedModel) -> None:
    mixing = sorted({type(m).__name__ for m in model.network.modules() if isinstance(m, _MIXES_ROWS)})
    if mixing:
        raise ModelError(
            f"The base model holds {', '.join(mixing)}, which mixes the rows of a batch: one person would change another's "
            "gradient. Use a model without batch statistics."
        )
