"""The self-test before training: does private training do what it promises on the very model at hand?

It runs before any row of the site is touched, on rows made up from a fixed seed, so what it finds tells nothing about
data. Whatever fails, nothing is trained. `docs/explanation/conformance.md` says what it can see and what it cannot.
"""

import contextlib
import copy
import dataclasses
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from confide.client.gradients import GRID_BITS, PersonGradients
from confide.client.mechanism import Mechanism
from confide.client.noise import CryptographicNoise
from confide.client.trainer import train
from confide.common.errors import AdapterError, ModelError
from confide.common.examples import IGNORED, Examples, Ints, Pixels
from confide.common.factors import trained
from confide.common.model import AdaptedModel
from confide.common.objective import losses
from confide.common.plan import CAUSAL, LANGUAGE, REGRESSION, TOKEN_CLASSES, Plan, Training
from confide.common.prefix import PrefixCache

FALSE_ALARM = 1e-9  # how often sound noise is refused
Gradients = npt.NDArray[np.float64]  # (persons, width): a line for each person

# The largest relative L2 error of gradients, by what the model computes with. Measured were up to 1e-7 in float64, where
# Llama's kin compute norms and rotations in float32 all the same, 2e-6 in float32, and 2e-2 in bfloat16, which has 8 bits.
# A single tensor may err by `_TENSOR` times as much.
_LIMITS = {"float64": 1e-6, "float32": 1e-4, "bfloat16": 5e-2}
_TENSOR = 4
_LOGITS = 1e-2  # of these limits: logits of equal weights differ by the order of sums at most
_FLOOR = 0.1  # errors are relative to a person's length, yet at least to this part of the longest person's
_STEP = 1e-4  # of the length of a clipped gradient or a step: the grid and float32 weights round
_EXACT_BYTES = 1 << 30  # the largest copy of the network in float64 that is made
_DRAWS = 8192  # noise 10 % low is then missed with a probability below 1e-12
_SEED = 20_240_229
_OWNERS = (0, 1, 1, 2, 3, 1)
_PARTS = (1.0, 0.3, 0.6, 0.7, 0.45, 0.85)  # of the longest text
_LONGEST = 24
_SAMPLE = 1024  # numbers of each frozen tensor that are looked at
_CHECKS = ("trained set", "noise", "gradients", "neighbours", "clipping", "step", "export")
_ADAPTER, _RELOADED = "default", "reloaded"
_OTHER_BASE = (
    "This model cannot be trained privately by this version. Choose another base model or other [adapter] targets."
)
_REPORT = "Training on this machine does not do what it promises. Report this as a fault."


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Certificate:
    """That a model passed the self-test; training takes this instead of a model. Only `certify` makes one.

    Attributes:
        model: The model that was tested, this very object.
        cached: Whether gradients with a cached prefix were tested too.
        gradient_error: The largest relative L2 error of a person's gradient.
        loop_precision: What the gradients it is told by were computed with: float64, or the model's own precision where
            a copy in float64 would be too large.
        seconds: How long the test took.
        checks: What was checked.
    """

    model: AdaptedModel = dataclasses.field(repr=False)
    cached: bool
    gradient_error: float
    loop_precision: str
    seconds: float
    checks: tuple[str, ...]


def certify(model: AdaptedModel, *, cached: bool) -> Certificate:
    """Return a certificate that private training is exact on this model; the model is left as it was.

    Args:
        model: The base model with the adapter, as it will be trained.
        cached: Whether training will take the layers below the adapters from a `PrefixCache`.

    Raises:
        ModelError: Something is not as promised; the message says what, by how much, and the limit.

    Guarantee: a model whose per-person gradients, clipping, step, noise or export is not as promised on the made-up rows
    gets no certificate. Sound noise is refused with a probability below 1e-9.
    """
    began = time.monotonic()
    if cached and not model.first_adapted:
        raise ModelError(
            "The adapters reach down to the first layer, so there is no prefix to cache. Train without a cache."
        )
    try:
        with _as_it_was(model):
            error, precision = _measured(model, cached=cached)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as fault:
        found = f"it cannot be run on this model ({type(fault).__name__})"
        raise _failed("training", found, _OTHER_BASE) from fault
    return Certificate(
        model=model,
        cached=cached,
        gradient_error=error,
        loop_precision=precision,
        seconds=time.monotonic() - began,
        checks=(*_CHECKS, "cached prefix") if cached else _CHECKS,
    )


def _measured(model: AdaptedModel, *, cached: bool) -> tuple[float, str]:
    """Return the largest relative error of a person's gradient, and what the loop computed with."""
    _check_trained_set(model)
    rows = _made_up(model)
    _check_noise(model, rows)
    _move_away(model)
    loop = _Loop(model)
    caches = (None, _filled(PrefixCache(model), rows)) if cached else (None,)
    error = 0.0
    for active, number in {model.active(number): number for number in (1, 2)}.items():
        expected = loop.gradients(rows, active)
        _check_all_reached(model, active, expected)
        for cache in caches:
            error = max(error, _check_gradients(model, rows, cache, active, expected))
        _check_clipping(model, rows, active, expected)
        _check_step(model, rows, number, expected)
        _move_away(model)
    _check_export(model, rows)
    return error, loop.precision


def _filled(cache: PrefixCache, rows: Examples) -> PrefixCache:
    for _ in cache.add(rows):
        pass
    return cache


def _check_trained_set(model: AdaptedModel) -> None:
    """Return if the parameters that learn are the plan's, and no others."""
    method = model.plan.adapter.method
    factors = {name for factor in model.factors for name in trained(factor, method)}
    if set(model.trainable) not in (model.head | factors, set(model.head)):
        odd = sorted(set(model.trainable) ^ (model.head | factors))
        raise _failed(
            "the trained set", f"{odd[0]} is trained though the method {method} does not, or is not though it does"
        )
    apart = {id(factor.r) for factor in model.factors if factor.r is not None}  # R is no part of the network
    wanted = {id(p) for p in model.trainable.values()}
    learning = {id(p) for p in model.network.parameters() if p.requires_grad}
    still = [name for name, p in model.trainable.items() if not p.requires_grad]
    if learning != wanted - apart or still or len(wanted) != len(model.trainable):
        names = still or [n for n, p in model.network.named_parameters() if p.requires_grad != (id(p) in wanted)]
        raise _failed(
            "the trained set", f"{[*names, 'a weight'][0]} requires gradients and is not trained, or the reverse"
        )
    size = sum(p.numel() for p in model.trainable.values())
    if size != model.layout.length + model.personal.length:
        raise _failed(
            "the trained set",
            f"{size} numbers are trained, but {model.layout.length} are sent and {model.personal.length} stay",
        )


def _check_all_reached(model: AdaptedModel, active: tuple[str, ...], expected: Gradients) -> None:
    """Return if each trained tensor makes a difference to somebody's loss, and a finite one."""
    start = 0
    for name in active:
        part = expected[:, start : start + model.trainable[name].numel()]
        start += part.shape[1]
        if not 0 < (longest := float(np.linalg.norm(part, axis=1).max())) < math.inf:
            raise _failed("a person's gradient", f"that of {name} has the length {longest:g} for everyone", _OTHER_BASE)


def _check_gradients(
    model: AdaptedModel, rows: Examples, cache: PrefixCache | None, active: tuple[str, ...], expected: Gradients
) -> float:
    """Return by how much each person's gradient, computed on her own, differs from the loop's."""
    what = "a person's gradient" + (" with the cached prefix" if cache else "")
    limit, everyone = _limit(model), np.arange(len(expected))
    gradients = PersonGradients(model, rows, cache=cache, micro_batch=len(rows))
    alone = np.stack([gradients.insecure_sum(everyone[[person]], active) for person in everyone])
    error = _agree(what, model, active, alone, expected, limit, _OTHER_BASE)
    whole = gradients.insecure_sum(everyone, active)
    others = (gradients.insecure_sum(np.delete(everyone, person), active) for person in everyone)
    beside = np.stack([whole - rest for rest in others])
    _agree(f"{what} beside others'", model, active, beside, expected, limit, _OTHER_BASE)
    mixed = rows.subset(np.random.default_rng(_SEED).permutation(len(rows)))
    cut = PersonGradients(model, mixed, cache=cache, micro_batch=2)  # cuts whoever has three rows
    sums = cut.insecure_sum(everyone, active)[None]
    _agree(f"{what} over micro-batches", model, active, sums, expected.sum(axis=0)[None], limit, _OTHER_BASE)
    return error


def _check_clipping(model: AdaptedModel, rows: Examples, active: tuple[str, ...], expected: Gradients) -> None:
    """Return if persons are clipped to a norm that half of them exceed, and summed, as the loop says."""
    clip_norm, clipped = _clipped(expected)
    gradients = PersonGradients(model, rows, micro_batch=1)
    everyone = np.arange(len(expected))
    parts = [gradients.clipped_sum(everyone[[person]], clip_norm, active) for person in everyone]
    longest = max(_squared_length(part.steps) for part in parts)
    if longest > 4**GRID_BITS:
        length = math.sqrt(longest) / 2**GRID_BITS
        raise _failed("clipping", f"a person's part has {length:.9f} times the clip norm; the limit is 1 exactly")
    limit = max(_limit(model), _STEP)
    _agree("a clipped gradient", model, (), np.stack([part.values for part in parts]), clipped, limit, _REPORT)
    whole = gradients.clipped_sum(everyone, clip_norm, active)
    sums = np.sum([part.steps for part in parts], axis=0) * whole.grid
    _agree("the clipped sum", model, (), whole.values[None], sums[None], limit, _REPORT)
    if gradients.clipped_sum(everyone[:0], clip_norm, active).steps.any():
        raise _failed("clipping", "the sum over nobody is not 0")


def _check_step(model: AdaptedModel, rows: Examples, number: int, expected: Gradients) -> None:
    """Return if one step moves what round `number` trains by the clipped sum over the divisor, and nothing else."""
    clip_norm, clipped = _clipped(expected)
    active = model.active(number)
    gradients = PersonGradients(model, rows)
    step = Mechanism(
        sampling_rate=1.0, clip_norm=clip_norm, noise_multiplier=2.0**-GRID_BITS, steps=1, divisor=clip_norm
    )
    before, still = _flat(model, active), _samples(model, active)
    _, evidence = train(gradients, model.read(), step, _PLAIN_STEP, CryptographicNoise(), number)
    if evidence.batch_sizes != (len(expected),):
        raise _failed(
            "the step", f"of {len(expected)} persons, each drawn with q = 1, {evidence.batch_sizes} took part"
        )
    for name, (parameter, sample) in still.items():
        if not torch.equal(_sample(parameter), sample):
            raise _failed("the step", f"{name} is not trained in this round and moved all the same")
    moved = _flat(model, active) - before
    limit = max(_limit(model), _STEP)
    _agree("what a step moves", model, (), moved[None], -clipped.sum(axis=0)[None] / clip_norm, limit, _REPORT)


def _check_noise(model: AdaptedModel, rows: Examples) -> None:
    """Return if steps for which nobody is drawn move the weights by noise of the variance asked for.

    Source: Wilson and Hilferty 1931, "The distribution of chi-square", for the band of a sum of squares.
    """
    active = model.active(1)
    gradients = PersonGradients(model, rows)
    nobody = Mechanism(sampling_rate=2.0**-64, clip_norm=1.0, noise_multiplier=1.0, steps=1, divisor=1.0)
    for layout in (model.layout, model.personal):
        model.write(np.zeros(layout.length, np.float32), layout)
    zeros = model.read()
    squares, count, seen = 0.0, 0, set[bytes]()
    while count < _DRAWS or len(seen) < 2:
        train(gradients, zeros, nobody, _PLAIN_STEP, CryptographicNoise())
        noise = _flat(model, active)
        model.write(np.zeros(model.personal.length, np.float32), model.personal)
        squares, count = squares + float(noise @ noise), count + len(noise)
        if noise.tobytes() in seen:
            raise _failed("the noise", "two rounds drew the same")
        seen.add(noise.tobytes())
    far = statistics.NormalDist().inv_cdf(1 - FALSE_ALARM / 2)
    low, high = ((1 - 2 / (9 * count) + side * math.sqrt(2 / (9 * count))) ** 3 for side in (-far, far))
    if not low <= squares / count <= high:
        raise _failed(
            "the noise", f"its variance is {squares / count:.3f} of what it should be, outside {low:.3f} to {high:.3f}"
        )


def _check_export(model: AdaptedModel, rows: Examples) -> None:
    """Return if peft makes of the exported adapter what the model is, and the vector comes back."""
    everyone, vector, own = np.arange(len(rows)), model.read(), model.read(model.personal)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        directory = Path(name)
        expected = model.logits(rows, everyone)
        model.export(vector, directory, own)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft says that there is an adapter already
            found = _reloaded(model, rows, directory)
        error, limit = _relative(found, expected), _LOGITS * _limit(model)
        if not error <= limit:
            raise _failed(
                "the export", f"reloaded, it changes logits by {error:.1e} of their length; the limit is {limit:.0e}"
            )
        try:
            same = np.array_equal(model.import_exported(directory), vector)
        except AdapterError as fault:
            raise _failed("the export", f"it does not come back: {fault}") from None
        if not same or not np.array_equal(model.read(model.personal), own):
            raise _failed("the export", "other numbers come back")


def _reloaded(model: AdaptedModel, rows: Examples, directory: Path) -> torch.Tensor:
    """Return the logits with the adapter in `directory` beside the model's own, which is put back."""
    network = model.network
    try:
        network.load_adapter(str(directory), _RELOADED, torch_device=str(model.device))
        network.set_adapter(_RELOADED, inference_mode=True)
        return model.logits(rows, np.arange(len(rows)))
    except Exception as fault:  # peft has as many ways to fail as files can be wrong
        raise _failed("the export", f"peft cannot load it ({type(fault).__name__})") from fault
    finally:
        network.set_adapter(_ADAPTER, inference_mode=True)
        if _RELOADED in network.peft_config:
            network.delete_adapter(_RELOADED)


class _Loop:
    """The obvious way to gradients: one row, one pass back by autograd, nothing of the recorder.

    Attributes:
        precision: What it computes with.
    """

    def __init__(self, model: AdaptedModel) -> None:
        plan, network = model.plan, model.network
        exact = plan.model.quantization == "none" and 8 * sum(p.numel() for p in network.parameters()) <= _EXACT_BYTES
        self.precision = "float64" if exact else _precision(model)
        self._model = model
        if exact:
            self._model = copy.copy(model)
            self._model.network = copy.deepcopy(network).cpu().double()
            self._model.plan = dataclasses.replace(plan, compute=dataclasses.replace(plan.compute, precision="float32"))
        copies = dict(zip(map(id, network.parameters()), self._model.network.parameters(), strict=True))
        self._frames = {f"{f.name}.lora_R.weight": f.frame for f in model.factors if f.frame is not None}
        # R is no part of the network, so its gradient follows from that of B = frame R.
        b = {f"{f.name}.lora_R.weight": f.b for f in model.factors if f.r is not None}
        self._leaves: dict[str, nn.Parameter] = {
            name: copies[id(b.get(name, p))] for name, p in model.trainable.items()
        }
        if exact:
            self._model.trainable = self._leaves  # where `AdaptedModel` looks for its device and width

    def gradients(self, rows: Examples, active: tuple[str, ...]) -> Gradients:
        """Return the mean of each person's rows' gradients, (persons, width)."""
        leaves = [self._leaves[name] for name in active]
        before = [leaf.requires_grad for leaf in leaves]
        try:
            for leaf in leaves:
                leaf.requires_grad_(True)
            each = np.stack([self._of_row(rows, row, active) for row in range(len(rows))])
        finally:
            for leaf, flag in zip(leaves, before, strict=True):
                leaf.requires_grad_(flag)
        return np.stack([each[rows.persons == person].mean(axis=0) for person in range(rows.person_count)])

    def _of_row(self, rows: Examples, row: int, active: tuple[str, ...]) -> npt.NDArray[np.float64]:
        batch = rows.batch(np.array([row]))
        loss = losses(self._model.plan.task.kind, self._model.forward(batch), batch).sum()
        leaves = [self._leaves[name] for name in active]
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        parts = []
        for name, leaf, gradient in zip(active, leaves, found, strict=True):
            wide = (torch.zeros_like(leaf) if gradient is None else gradient).detach().cpu().double()
            frame = self._frames.get(name)
            parts.append((wide if frame is None else frame.cpu().double().T @ wide).reshape(-1).numpy())
        return np.concatenate(parts)


def _agree(
    what: str,
    model: AdaptedModel,
    active: tuple[str, ...],
    found: Gradients,
    expected: Gradients,
    limit: float,
    remedy: str,
) -> float:
    """Return the largest relative L2 error of a line.

    Each tensor of `active` counts on its own too, so that the fault of a small one is not lost beside a large one.

    Raises:
        ModelError: An error exceeds its limit.
    """
    errors, start = [("all of it", _line_errors(found, expected), limit)], 0
    for name in active:
        stop = start + model.trainable[name].numel()
        errors.append((name, _line_errors(found[:, start:stop], expected[:, start:stop]), _TENSOR * limit))
        start = stop
    # An error that is no number is the worst.
    name, error, allowed = max(errors, key=lambda one: one[1] / one[2] if math.isfinite(one[1]) else math.inf)
    if not error <= allowed:
        found_out = f"it is off by {error:.1e} of its length in {name}; the limit is {allowed:.0e}"
        raise _failed(what, found_out, remedy)
    return errors[0][1]


def _line_errors(found: Gradients, expected: Gradients) -> float:
    lengths = np.linalg.norm(expected, axis=1)
    return float((np.linalg.norm(found - expected, axis=1) / np.maximum(lengths, _FLOOR * lengths.max())).max())


def _failed(what: str, found: str, remedy: str = _REPORT) -> ModelError:
    return ModelError(f"The self-test of {what} failed: {found}. Nothing was trained, and no row was touched. {remedy}")


def _clipped(expected: Gradients) -> tuple[float, Gradients]:
    """Return a norm that half of the persons exceed, and their gradients clipped to it."""
    norms = np.linalg.norm(expected, axis=1)
    clip_norm = float(np.median(norms))
    return clip_norm, expected * np.minimum(1, clip_norm / norms)[:, None]


def _squared_length(steps: npt.NDArray[np.int64]) -> int:
    """Return the exact sum of squares of fewer than 2^30 integers."""
    if (most := int(np.abs(steps).max(initial=0))) >= 1 << 31:
        return most**2
    high, low = np.abs(steps) >> 16, np.abs(steps) & 0xFFFF
    return (int(high @ high) << 32) + (int(high @ low) << 17) + int(low @ low)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def _limit(model: AdaptedModel) -> float:
    return _LIMITS[_precision(model)]


def _precision(model: AdaptedModel) -> str:
    """Return what the model computes with; a base in 4 bits computes in bfloat16."""
    if model.plan.compute.precision == "bfloat16" or model.plan.model.quantization != "none":
        return "bfloat16"
    return "float64" if model.dtype == torch.float64 else "float32"


_PLAIN_STEP = Training(optimizer="sgd", learning_rate=1.0, head_learning_rate=1.0, proximal=0.0)


def _made_up(model: AdaptedModel) -> Examples:
    """Return six rows of four persons, one of whom has three, that no site has: random tokens or pixels and answers."""
    plan, random, count = model.plan, np.random.default_rng(_SEED), len(_OWNERS)
    labels: npt.NDArray[Any] = random.integers(0, max(1, len(plan.task.labels)), count)
    if plan.task.kind == REGRESSION:
        labels = random.normal(size=count).astype(np.float32)
    store, lengths, image = _pixels(model, random) if plan.data.image else (*_tokens(model, random), None)
    by_token = plan.task.kind in LANGUAGE or plan.task.kind == TOKEN_CLASSES
    return Examples(
        tokens=[store],
        store=np.zeros(count, np.int64),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        second=np.where(np.arange(count) % 2, lengths, lengths // 2),
        labels=labels,
        persons=np.array(_OWNERS, np.int64),
        pad_token=_pad_token(model),
        targets=[_answers(plan, store.astype(np.int32), lengths, random)] if by_token else (),
        image=image,
    )


def _pixels(model: AdaptedModel, random: np.random.Generator) -> tuple[Pixels, Ints, tuple[int, int, int]]:
    """Return (pixels, how many each image has, the shape of an image)."""
    config = model.network.config
    height, width = config.image_size if isinstance(config.image_size, list | tuple) else (config.image_size,) * 2
    shape = (int(config.num_channels), int(height), int(width))
    lengths = np.full(len(_OWNERS), math.prod(shape))
    return random.integers(0, 256, int(lengths.sum()), dtype=np.uint8), lengths, shape


def _tokens(model: AdaptedModel, random: np.random.Generator) -> tuple[npt.NDArray[np.int32], Ints]:
    """Return (tokens, how many each text has), of unlike lengths."""
    longest = min(model.plan.model.max_tokens, _LONGEST)
    lengths = np.maximum(np.ceil(longest * np.array(_PARTS)).astype(np.int64), min(2, longest))
    tokens = random.integers(0, model.network.config.vocab_size - 1, int(lengths.sum()), dtype=np.int32)
    return tokens + (tokens >= _pad_token(model)), lengths  # padding is no token of a text


def _answers(plan: Plan, tokens: npt.NDArray[np.int32], lengths: Ints, random: np.random.Generator) -> npt.NDArray[Any]:
    """Return an answer at each token; but for plain language models a third of the tokens has none, the last ones have."""
    kind = plan.task.kind
    answers = tokens.copy() if kind in LANGUAGE else random.integers(0, len(plan.task.labels), len(tokens))
    if kind != CAUSAL:
        silent = random.random(len(tokens)) < 1 / 3
        silent[np.cumsum(lengths) - 1] = False
        answers[silent] = IGNORED
    return answers.astype(np.int32)


def _pad_token(model: AdaptedModel) -> int:
    return int(getattr(model.network.config, "pad_token_id", None) or 0)


def _move_away(model: AdaptedModel) -> None:
    """Move the trained numbers away from the start of a run, where B and head are 0 and gradients special."""
    random = np.random.default_rng(_SEED)
    scales = {f"{factor.name}.lora_{letter}.weight": factor.scale for factor in model.factors for letter in "BR"}
    for layout, start in ((model.layout, model.start), (model.personal, model.personal_start)):
        vector = start.copy()
        for name, part in layout.split(vector).items():  # views of it
            spread = 0.1 if part.ndim == 1 else 0.3 / math.sqrt(part.shape[-1])
            np.add(
                part,
                random.normal(0, spread / max(1.0, scales.get(name, 1.0)), part.shape),
                out=part,
                casting="same_kind",
            )
        model.write(vector, layout)


def _flat(model: AdaptedModel, active: tuple[str, ...]) -> npt.NDArray[np.float64]:
    return np.concatenate([model.trainable[name].detach().cpu().double().numpy().ravel() for name in active])


def _samples(model: AdaptedModel, active: tuple[str, ...]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return everything that a round does not train and some numbers of each, by name."""
    learning = {id(model.trainable[name]) for name in active}
    # B is made of R, and moves with it.
    learning |= {id(f.b) for f in model.factors if f.r is not None and id(f.r) in learning}
    still: dict[str, torch.Tensor] = {name: p for name, p in model.trainable.items() if name not in active}
    still |= dict(model.network.named_buffers())
    still |= {name: p for name, p in model.network.named_parameters() if id(p) not in learning}
    return {name: (p, _sample(p)) for name, p in still.items()}


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // _SAMPLE)].clone()


@contextlib.contextmanager
def _as_it_was(model: AdaptedModel) -> Iterator[None]:
    """Put back, when the `with` ends, the trained numbers, their gradients, what learns, and the network's settings."""
    values = {name: (p.detach().clone(), p.grad) for name, p in model.trainable.items()}
    learning = [(p, p.requires_grad) for p in model.network.parameters()]
    modes = [(module, module.training) for module in model.network.modules()]  # peft sets them when it loads
    settings = vars(model.network.peft_config[_ADAPTER])
    saved = dict(settings)
    try:
        yield
    finally:
        for p, flag in learning:
            p.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for name, (value, gradient) in values.items():
                model.trainable[name].copy_(value)
                model.trainable[name].grad = gradient
        model.settle()
        settings.update(saved)
