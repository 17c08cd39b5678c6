"""What is learned: the loss of each row for every kind of task, and how good a model's answers are.

A row's loss is a function of that row alone. A language model's own loss is a mean over the tokens of the whole batch,
which would let one person's row scale another's gradient; it is never used.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from confide.common.adapter import Floats
from confide.common.errors import DataError
from confide.common.examples import IGNORED, Batch, Examples, Ints
from confide.common.model import AdaptedModel
from confide.common.plan import CAUSAL, INSTRUCTION, LANGUAGE, REGRESSION, TOKEN_CLASSES
from confide.common.prefix import PrefixCache
from confide.common.score import class_scores, language_scores, number_scores, token_class_scores


def losses(kind: str, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return one loss per row, (rows,): what training makes small.

    Classes: cross-entropy. Numbers: half the squared error, in the plan's scale. Tokens: the mean cross-entropy over the
    row's own targets; a row without any has loss 0. A causal model's target is the token after the one it reads.

    Args:
        kind: The plan's kind of task.
        logits: (rows, outputs), or (rows, longest, outputs) where tokens are the answers.
        batch: The rows.

    Guarantee: a row's loss depends on that row's scores and answers only.
    """
    if kind == REGRESSION:
        answers = torch.from_numpy(batch.labels).to(logits)
        return (logits[:, 0] - answers).square() / 2
    if batch.targets is None:
        return F.cross_entropy(logits, torch.from_numpy(batch.labels).to(logits.device), reduction="none")
    scores, targets = _aligned(kind, logits, batch)
    each = F.cross_entropy(scores.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")  # (rows, longest)
    return each.sum(dim=1) / (targets != IGNORED).sum(dim=1).clamp(min=1)


def measure(
    model: AdaptedModel, examples: Examples, cache: PrefixCache | None = None, micro_batch: int = 256
) -> dict[str, float]:
    """Return every score of the model as it is on the examples, by name."""
    kind, task = model.plan.task.kind, model.plan.task
    if kind in LANGUAGE:
        return language_scores(*_language(model, examples, cache, micro_batch))
    if kind == TOKEN_CLASSES:
        guesses, labels = [], []
        for _, batch, logits in _answers(model, examples, cache, micro_batch):
            targets = _targets(batch)
            guesses.append(logits.argmax(-1).cpu().numpy()[targets != IGNORED])
            labels.append(targets[targets != IGNORED])
        return token_class_scores(np.concatenate(guesses), np.concatenate(labels), len(task.labels))
    if kind == REGRESSION:
        return number_scores(
            numbers(model, examples, cache, micro_batch), examples.labels.astype(np.float64) * task.scale + task.center
        )
    return class_scores(probabilities(model, examples, cache, micro_batch), examples.labels)


def probabilities(
    model: AdaptedModel, examples: Examples, cache: PrefixCache | None = None, micro_batch: int = 256
) -> Floats:
    """Return each row's class probabilities, (rows, classes), float32, in the order of the rows."""
    result = np.zeros((len(examples), len(model.plan.task.labels)), np.float32)
    for rows, _, logits in _answers(model, examples, cache, micro_batch):
        result[rows] = logits.float().softmax(-1).cpu().numpy()
    return result


def numbers(
    model: AdaptedModel, examples: Examples, cache: PrefixCache | None = None, micro_batch: int = 256
) -> npt.NDArray[np.float64]:
    """Return the number predicted for each row, (rows,), in the answers' own unit."""
    result = np.zeros(len(examples))
    for rows, _, logits in _answers(model, examples, cache, micro_batch):
        result[rows] = logits[:, 0].double().cpu().numpy()
    return result * model.plan.task.scale + model.plan.task.center


def word_classes(
    model: AdaptedModel, examples: Examples, cache: PrefixCache | None = None, micro_batch: int = 256
) -> list[Ints]:
    """Return the class of every word of every row, in the order of the rows; words begin where targets stand."""
    result: list[Ints] = [np.empty(0, np.int64)] * len(examples)
    for rows, batch, logits in _answers(model, examples, cache, micro_batch):
        guesses = logits.argmax(-1).cpu().numpy()  # (rows, longest)
        for line, row in enumerate(rows):
            result[int(row)] = guesses[line][_targets(batch)[line] != IGNORED]
    return result


def continued(model: AdaptedModel, examples: Examples, most_tokens: int) -> list[list[int]]:
    """Return the tokens a language model goes on with after each row, always the likeliest one, to its end token.

    Args:
        model: A causal model.
        examples: Texts that stand open at their end.
        most_tokens: At most so many are said.
    """
    result = []
    model.network.eval()  # layers that are computed again while training keep nothing of the tokens before
    try:
        # One by one: padding on the right would come between a text and its continuation.
        for row in range(len(examples)):
            ids = torch.from_numpy(examples.batch(np.array([row])).input_ids).to(model.device)
            with torch.no_grad():
                said = model.network.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=most_tokens,
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=examples.pad_token,
                )
            result.append(said[0, ids.shape[1] :].tolist())
    finally:
        model.network.train()
    return result


def _language(
    model: AdaptedModel, examples: Examples, cache: PrefixCache | None, micro_batch: int
) -> tuple[npt.NDArray[np.float64], Ints, Ints]:
    """Return (summed nats, right guesses, targets) of each row."""
    nats, right, tokens = np.zeros(len(examples)), np.zeros(len(examples), np.int64), np.zeros(len(examples), np.int64)
    # Scores over a whole vocabulary are large, so fewer rows go at once.
    for rows, batch, logits in _answers(model, examples, cache, max(1, micro_batch // 16)):
        scores, targets = _aligned(model.plan.task.kind, logits, batch)
        learned = targets != IGNORED
        each = F.cross_entropy(scores.transpose(1, 2).float(), targets, ignore_index=IGNORED, reduction="none")
        nats[rows] = each.double().sum(dim=1).cpu().numpy()
        right[rows] = ((scores.argmax(-1) == targets) & learned).sum(dim=1).cpu().numpy()
        tokens[rows] = learned.sum(dim=1).cpu().numpy()
    return nats, right, tokens


def _answers(
    model: AdaptedModel, examples: Examples, cache: PrefixCache | None, micro_batch: int
) -> Iterator[tuple[Ints, Batch, torch.Tensor]]:
    """Yield (rows, their batch, their logits) for all rows, the shortest first."""
    order = np.argsort(examples.lengths, kind="stable")
    for start in range(0, len(order), micro_batch):
        rows = order[start : start + micro_batch]
        batch = examples.batch(rows)
        with torch.no_grad():
            yield rows, batch, model.forward(batch) if cache is None else cache.forward(examples, rows, batch)


def _aligned(kind: str, logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (scores, targets) so that the scores at a position are about the target at the same position."""
    targets = torch.from_numpy(_targets(batch)).to(logits.device)
    if kind in {CAUSAL, INSTRUCTION}:
        return logits[:, :-1], targets[:, 1:]
    return logits, targets


def _targets(batch: Batch) -> Ints:
    if batch.targets is None:
        raise DataError("These rows have no answer for each token. Read them with the plan of this model.")
    return batch.targets
