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

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from confide.client.gradients import GRID_BITS, PersonGradients
from confide.client.made_up import longest_text, made_up_images, made_up_texts, moved_away
from confide.client.mechanism import Mechanism
from confide.client.noise import CryptographicNoise
from confide.client.trainer import train
from confide.common.errors import AdapterError, ModelError
from confide.common.examples import Examples, union
from confide.common.factors import trained
from confide.common.model import AdaptedModel
from confide.common.objective import losses
from confide.common.plan import Training
from confide.common.prefix import PrefixCache

FALSE_ALARM = 1e-9  # how often sound noise is refused
Gradients = npt.NDArray[np.float64]  # (lines, width): one for each person, or their sum


# The largest relative L2 errors by what the model computes with; `docs/explanation/conformance.md` says what was measured.
_GRADIENT = {"float64": 1e-6, "float32": 1e-4, "bfloat16": 8e-2}
_LOGITS = {"float64": 1e-8, "float32": 1e-6, "bfloat16": 2e-2}  # of the exported adapter, against the model's own
_TENSOR = 3  # a single tensor's gradient may err by so many times as much
_FLOOR = 0.25  # errors are relative to a person's length, yet at least to this part of the longest person's
_STEP = 1e-4  # of the length of a clipped gradient or a step: the grid and float32 weights round
_ROUNDING = 1e-5  # of a row's scores in float64; Llama's kin compute norms and rotations in float32 all the same
_EXACT_BYTES = 1 << 30  # the largest copy of the network in float64 that is made, and the most attention in it
_DRAWS = 8192  # noise 10 % low is then missed with a probability below 1e-12
_SAMPLE = 1024  # numbers of each frozen tensor that are looked at
_CHECKS = ("trained set", "gradients", "neighbours", "clipping", "step", "noise", "export")
_ADAPTER, _RELOADED = "default", "reloaded"
_PLAIN_STEP = Training(optimizer="sgd", learning_rate=1.0, head_learning_rate=1.0, proximal=0.0)
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
            that is bfloat16 or a copy in float64 would be too large.
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Trial:
    """What is tried in a round of one kind: `alternate` trains other factors in even rounds.

    Attributes:
        model: The model.
        rows: The made-up rows.
        number: The round's number.
        active: The parameters that it trains.
        expected: The loop's gradient of each person, (persons, width).
        limit: The largest error of a gradient.
    """

    model: AdaptedModel
    rows: Examples
    number: int
    active: tuple[str, ...]
    expected: Gradients
    limit: float


def _measured(model: AdaptedModel, *, cached: bool) -> tuple[float, str]:
    """Return the largest relative error of a person's gradient, and what the loop computed with."""
    _check_trained_set(model)
    _move_away(model)
    rows, tall = _made_up(model)
    loop, precision = _Loop(model), _precision(model)
    if precision == "bfloat16" and _can_be_exact(model):
        exact = _exact(model)
        _check_rows_apart(exact, tall if _attention_bytes(exact, tall) <= _EXACT_BYTES else rows)
    caches = (None, _filled(PrefixCache(model), tall)) if cached else (None,)
    error = 0.0
    for active, number in {model.active(number): number for number in (1, 2)}.items():
        expected = loop.gradients(rows, active)
        trial = _Trial(
            model=model, rows=rows, number=number, active=active, expected=expected, limit=_GRADIENT[precision]
        )
        _check_all_reached(trial)
        for cache in caches:
            error = max(error, _check_gradients(trial, cache))
            _check_beside_the_longest(trial, tall, cache)
        _check_clipping(trial)
        _check_step(trial)
        _move_away(model)
    _check_noise(model, rows)
    _move_away(model)
    _check_export(model, rows, _LOGITS[precision])
    return error, loop.precision


def _made_up(model: AdaptedModel) -> tuple[Examples, Examples]:
    """Return (the rows to try training on, the same and one more person's as long as the plan lets it be)."""
    plan, config = model.plan, model.network.config
    if plan.data.image:
        size = config.image_size if isinstance(config.image_size, list | tuple) else (config.image_size,) * 2
        rows = made_up_images(plan, (int(config.num_channels), int(size[0]), int(size[1])))
        return rows, rows
    pad_token = int(getattr(config, "pad_token_id", None) or 0)
    rows = made_up_texts(plan, config.vocab_size, pad_token)
    longer = plan.model.max_tokens > rows.lengths.max()
    return rows, union([rows, longest_text(plan, config.vocab_size, pad_token)]) if longer else rows


def _filled(cache: PrefixCache, rows: Examples) -> PrefixCache:
    for _ in cache.add(rows):
        pass
    return cache


def _check_trained_set(model: AdaptedModel) -> None:
    """Return if the parameters that learn are the plan's, and no others."""
    what, method = "the trained set", model.plan.adapter.method
    factors = {name for factor in model.factors for name in trained(factor, method)}
    if set(model.trainable) not in (model.head | factors, set(model.head)):
        odd = sorted(set(model.trainable) ^ (model.head | factors))
        raise _failed(what, f"{odd[0]} is trained though the method {method} does not, or is not though it does")
    apart = {id(factor.r) for factor in model.factors if factor.r is not None}  # R is no part of the network
    wanted = {id(p) for p in model.trainable.values()}
    learning = {id(p) for p in model.network.parameters() if p.requires_grad}
    still = [name for name, p in model.trainable.items() if not p.requires_grad]
    if learning != wanted - apart or still or len(wanted) != len(model.trainable):
        names = still or [n for n, p in model.network.named_parameters() if p.requires_grad != (id(p) in wanted)]
        raise _failed(what, f"{[*names, 'a weight'][0]} requires gradients and is not trained, or the reverse")
    size, sent, kept = sum(p.numel() for p in model.trainable.values()), model.layout.length, model.personal.length
    if size != sent + kept:
        raise _failed(what, f"{size} numbers are trained, but {sent} are sent and {kept} stay")


def _check_all_reached(trial: _Trial) -> None:
    """Return if each trained tensor makes a difference to somebody's loss, and a finite one."""
    for name, columns in _columns(trial).items():
        if not 0 < (longest := float(_lengths(trial.expected[:, columns]).max())) < math.inf:
            raise _failed("a person's gradient", f"that of {name} has the length {longest:g} for everyone", _OTHER_BASE)


def _check_rows_apart(exact: AdaptedModel, rows: Examples) -> None:
    """Return if a row's scores are the same alone and beside others, to a precision that bfloat16 has not."""
    with torch.no_grad():
        together = exact.logits(rows, np.arange(len(rows)))
        for row, scores in enumerate(together):
            alone = exact.logits(rows, np.array([row]))[0]  # (outputs,), or (its tokens, outputs)
            beside = scores[: len(alone)]
            error = float((beside - alone).norm() / alone.norm())
            # What is not finite beside others, training computes again alone.
            if torch.isfinite(beside).all() and not error <= _ROUNDING:
                found = f"beside others, a row's change by {error:.1e} of their length; the limit is {_ROUNDING:.0e}"
                raise _failed("the scores", found, _OTHER_BASE)


def _check_gradients(trial: _Trial, cache: PrefixCache | None) -> float:
    """Return by how much each person's gradient, computed on her own, differs from the loop's."""
    what, expected, active = _a_gradient(cache), trial.expected, trial.active
    columns, everyone = _columns(trial), np.arange(len(expected))
    gradients = PersonGradients(trial.model, trial.rows, cache=cache, micro_batch=len(trial.rows))
    alone = np.stack([gradients.insecure_sum(everyone[[person]], active) for person in everyone])
    error = _agree(what, alone, expected, trial.limit, _OTHER_BASE, columns)
    whole = gradients.insecure_sum(everyone, active)
    beside = np.stack([whole - gradients.insecure_sum(np.delete(everyone, person), active) for person in everyone])
    _agree(f"{what} beside others'", beside, expected, trial.limit, _OTHER_BASE, columns)
    mixed = trial.rows.subset(np.random.default_rng(0).permutation(len(trial.rows)))
    cut = PersonGradients(trial.model, mixed, cache=cache, micro_batch=2)  # cuts whoever has three rows
    # The persons' own lines come along, so that a sum in which they cancel is not measured by its short length.
    found = np.vstack([cut.insecure_sum(everyone, active), alone])
    wanted = np.vstack([expected.sum(axis=0), expected])
    _agree(f"{what} over micro-batches", found, wanted, trial.limit, _OTHER_BASE, columns)
    return error


def _check_beside_the_longest(trial: _Trial, tall: Examples, cache: PrefixCache | None) -> None:
    """Return if the last person's gradient is what it is, however long a text of somebody else is beside hers."""
    last, longest = len(trial.expected) - 1, tall.person_count - 1
    if last == longest:
        return
    gradients = PersonGradients(trial.model, tall, cache=cache, micro_batch=2)
    both, other = (gradients.insecure_sum(np.array(of), trial.active) for of in ([last, longest], [longest]))
    what = f"{_a_gradient(cache)} beside the longest text"
    _agree(what, (both - other)[None], trial.expected[[last]], trial.limit, _OTHER_BASE, _columns(trial))


def _check_clipping(trial: _Trial) -> None:
    """Return if persons are clipped to a norm that half of them exceed, and summed, as the loop says."""
    clip_norm, clipped = _clipped(trial.expected)
    everyone, limit = np.arange(len(clipped)), max(trial.limit, _STEP)
    gradients = PersonGradients(trial.model, trial.rows, micro_batch=len(trial.rows))
    parts = [gradients.clipped_sum(everyone[[person]], clip_norm, trial.active) for person in everyone]
    longest = max(_squared_length(part.steps) for part in parts)
    if longest > 4**GRID_BITS:
        length = math.sqrt(longest) / 2**GRID_BITS
        raise _failed("clipping", f"a person's part has {length:.9f} times the clip norm; the limit is 1 exactly")
    _agree("a clipped gradient", np.stack([part.values for part in parts]), clipped, limit, _REPORT)
    cut = PersonGradients(trial.model, trial.rows, micro_batch=2)
    whole = cut.clipped_sum(everyone, clip_norm, trial.active).values[None]
    sums = np.sum([part.values for part in parts], axis=0)[None]
    _agree("the clipped sum", whole, sums, limit, _REPORT)
    if cut.clipped_sum(everyone[:0], clip_norm, trial.active).steps.any():
        raise _failed("clipping", "the sum over nobody is not 0")


def _check_step(trial: _Trial) -> None:
    """Return if one step moves what the round trains by the clipped sum over the divisor, and nothing else."""
    model, active = trial.model, trial.active
    clip_norm, clipped = _clipped(trial.expected)
    step = Mechanism(
        sampling_rate=1.0, clip_norm=clip_norm, noise_multiplier=2.0**-GRID_BITS, steps=1, divisor=clip_norm
    )
    before, still = _flat(model, active), _samples(model, active)
    gradients = PersonGradients(model, trial.rows)
    _, evidence = train(gradients, model.read(), step, _PLAIN_STEP, CryptographicNoise(), trial.number)
    if evidence.batch_sizes != (len(clipped),):
        found = f"of {len(clipped)} persons, each drawn with q = 1, {evidence.batch_sizes} took part"
        raise _failed("the step", found)
    for name, (parameter, sample) in still.items():
        if not torch.equal(_sample(parameter), sample):
            raise _failed("the step", f"{name} is not trained in this round and moved all the same")
    moved, wanted = _flat(model, active) - before, -clipped.sum(axis=0) / clip_norm
    _agree("what a step moves", moved[None], wanted[None], max(trial.limit, _STEP), _REPORT)


def _check_noise(model: AdaptedModel, rows: Examples) -> None:
    """Return if steps for which nobody is drawn move the weights by noise of the variance asked for.

    Source: Wilson and Hilferty 1931, "The distribution of chi-square", for the band of a sum of squares.
    """
    active = model.active(1)
    gradients = PersonGradients(model, rows)
    nobody = Mechanism(sampling_rate=2.0**-64, clip_norm=1.0, noise_multiplier=1.0, steps=1, divisor=1.0)
    zeros = np.zeros(model.layout.length, np.float32)
    squares, count, seen = 0.0, 0, set[bytes]()
    while count < _DRAWS or len(seen) < 2:
        model.write(np.zeros(model.personal.length, np.float32), model.personal)
        train(gradients, zeros, nobody, _PLAIN_STEP, CryptographicNoise())
        noise = _flat(model, active)
        squares, count = squares + float(noise @ noise), count + len(noise)
        if noise.tobytes() in seen:
            raise _failed("the noise", "two rounds drew the same")
        seen.add(noise.tobytes())
    far = statistics.NormalDist().inv_cdf(1 - FALSE_ALARM / 2)
    low, high = ((1 - 2 / (9 * count) + side * math.sqrt(2 / (9 * count))) ** 3 for side in (-far, far))
    if not low <= squares / count <= high:
        found = f"its variance is {squares / count:.3f} of what it should be, outside {low:.3f} to {high:.3f}"
        raise _failed("the noise", found)


def _check_export(model: AdaptedModel, rows: Examples, limit: float) -> None:
    """Return if peft makes of the exported adapter what the model is, and the vector comes back."""
    vector, own = model.read(), model.read(model.personal)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        directory = Path(name)
        expected = model.logits(rows, np.arange(len(rows))).double()
        model.export(vector, directory, own)
        found = _reloaded(model, rows, directory).double()
        if not (error := float((found - expected).norm() / expected.norm())) <= limit:
            told = f"reloaded, it changes logits by {error:.1e} of their length; the limit is {limit:.0e}"
            raise _failed("the export", told)
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft says that there is an adapter already
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

    A model in bfloat16 is told by a loop in bfloat16: the way there, whose rounding is most of the error, is then the
    same. One in float64 would be off by more than many a fault is.

    Attributes:
        precision: What it computes with.
    """

    def __init__(self, model: AdaptedModel) -> None:
        self.precision, self._model = _precision(model), model
        # R is no part of the network, so its gradient follows from that of B = frame R.
        self._frames = {f"{f.name}.lora_R.weight": f.frame for f in model.factors if f.frame is not None}
        b = {f"{f.name}.lora_R.weight": f.b for f in model.factors if f.r is not None}
        self._leaves: dict[str, nn.Parameter] = {name: b.get(name, p) for name, p in model.trainable.items()}
        if self.precision != "bfloat16" and _can_be_exact(model):
            self.precision, self._model = "float64", _exact(model)
            copies = dict(zip(map(id, model.network.parameters()), self._model.network.parameters(), strict=True))
            self._leaves = {name: copies[id(p)] for name, p in self._leaves.items()}

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
        found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        parts = []
        for name, gradient in zip(active, found, strict=True):
            wide, frame = gradient.detach().cpu().double(), self._frames.get(name)
            parts.append((wide if frame is None else frame.cpu().double().T @ wide).reshape(-1).numpy())
        return np.concatenate(parts)


def _can_be_exact(model: AdaptedModel) -> bool:
    """Return whether a copy of the network in float64 is small enough; one in 4 bits has none."""
    size = 8 * sum(p.numel() for p in model.network.parameters())
    return model.plan.model.quantization == "none" and size <= _EXACT_BYTES


def _attention_bytes(exact: AdaptedModel, rows: Examples) -> int:
    """Return what one layer's attention over all rows together takes, before and after its softmax."""
    heads = int(getattr(exact.network.config, "num_attention_heads", 16))
    return 2 * 8 * len(rows) * heads * int(rows.lengths.max()) ** 2


def _exact(model: AdaptedModel) -> AdaptedModel:
    """Return a copy for forward passes in float64."""
    exact, plan = copy.copy(model), model.plan
    exact.network = copy.deepcopy(model.network).cpu().double()
    exact.plan = dataclasses.replace(plan, compute=dataclasses.replace(plan.compute, precision="float32"))
    # Where `AdaptedModel` looks for its device and width.
    exact.trainable = {name: nn.Parameter(p.detach().cpu().double()) for name, p in model.trainable.items()}
    return exact


def _agree(
    what: str,
    found: Gradients,
    expected: Gradients,
    limit: float,
    remedy: str,
    columns: dict[str, slice] | None = None,
) -> float:
    """Return the largest relative L2 error of a line.

    Each tensor with `columns` counts on its own too, so that the fault of a small one is not lost beside a large one.

    Raises:
        ModelError: An error exceeds its limit.
    """
    errors = [("all of it", error := _error(found, expected), limit)]
    for name, part in (columns or {}).items():
        errors.append((name, _error(found[:, part], expected[:, part]), _TENSOR * limit))
    # An error that is no number is the worst.
    name, worst, allowed = max(errors, key=lambda one: one[1] / one[2] if math.isfinite(one[1]) else math.inf)
    if not worst <= allowed:
        raise _failed(what, f"it is off by {worst:.1e} of its length in {name}; the limit is {allowed:.0e}", remedy)
    return error


def _error(found: Gradients, expected: Gradients) -> float:
    lengths = _lengths(expected)
    return float((_lengths(found - expected) / np.maximum(lengths, _FLOOR * lengths.max())).max())


def _lengths(lines: Gradients) -> npt.NDArray[np.float64]:
    length: npt.NDArray[np.float64] = np.linalg.norm(lines, axis=1)
    return length


def _columns(trial: _Trial) -> dict[str, slice]:
    """Return where each trained tensor lies in a gradient."""
    stops = np.cumsum([trial.model.trainable[name].numel() for name in trial.active]).tolist()
    return dict(zip(trial.active, map(slice, [0, *stops], stops), strict=False))


def _a_gradient(cache: PrefixCache | None) -> str:
    return "a person's gradient" + (" with the cached prefix" if cache else "")


def _failed(what: str, found: str, remedy: str = _REPORT) -> ModelError:
    return ModelError(f"The self-test of {what} failed: {found}. Nothing was trained, and no row was touched. {remedy}")


def _clipped(expected: Gradients) -> tuple[float, Gradients]:
    """Return a norm that half of the persons exceed, and their gradients clipped to it."""
    norms = _lengths(expected)
    clip_norm = float(np.median(norms))
    return clip_norm, expected * np.minimum(1, clip_norm / norms)[:, None]


def _squared_length(steps: npt.NDArray[np.int64]) -> int:
    """Return the exact sum of squares of fewer than 2^30 integers."""
    if (most := int(np.abs(steps).max(initial=0))) >= 1 << 31:
        return most**2
    high, low = np.abs(steps) >> 16, np.abs(steps) & 0xFFFF
    return (int(high @ high) << 32) + (int(high @ low) << 17) + int(low @ low)


def _precision(model: AdaptedModel) -> str:
    """Return what the model computes with; a base in 4 bits computes in bfloat16."""
    if model.plan.compute.precision == "bfloat16" or model.plan.model.quantization != "none":
        return "bfloat16"
    return "float64" if model.dtype == torch.float64 else "float32"


def _move_away(model: AdaptedModel) -> None:
    """Move the trained numbers away from the start of a run, where B and the head are 0 and gradients special."""
    scales = {f"{factor.name}.lora_{letter}.weight": factor.scale for factor in model.factors for letter in "BR"}
    for layout, start in ((model.layout, model.start), (model.personal, model.personal_start)):
        model.write(moved_away(layout, start, scales), layout)


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
