"""Held-out scores of an adapter. What is evaluated on must be public, or its own budget must pay for it."""

from confide.common.adapter import Floats
from confide.common.examples import Examples
from confide.common.model import AdaptedModel
from confide.common.objective import measure
from confide.common.prefix import PrefixCache


def evaluate(
    model: AdaptedModel, adapter: Floats, examples: Examples, cache: PrefixCache | None = None
) -> dict[str, float]:
    """Return the scores of `adapter` on `examples` by name; the model is left with that adapter."""
    model.write(adapter)
    return measure(model, examples, cache)
