"""What runs in one process share: tables that were read, and frozen prefixes that were computed."""

from pathlib import Path

from confide.client.data import Reading, load_reader, read_examples
from confide.common.model import AdaptedModel
from confide.common.plan import Plan
from confide.common.prefix import PrefixCache


class Shelf:
    """Keeps what was read and computed, for as long as it lives; so the runs of a sweep do it once."""

    def __init__(self) -> None:
        self._readings: dict[object, Reading] = {}
        self._caches: dict[object, PrefixCache] = {}

    def reading(self, table: Path, model: Path, plan: Plan, column: str | None = None) -> Reading:
        """Return the table as the plan reads it for the base model in a directory; see `read_examples`."""
        key = (table, model, plan.model, plan.data, plan.task, plan.adapter.seed, column)
        if key not in self._readings:
            self._readings[key] = read_examples(table, plan, load_reader(model, plan), extra_column=column)
        return self._readings[key]

    def cache(self, model: AdaptedModel) -> PrefixCache | None:
        """Return where the frozen prefix of rows is kept for this model; None if it has none worth keeping."""
        if not PrefixCache.helps(model):
            return None
        plan = model.plan
        key = (plan.model, plan.task.kind, model.first_adapted, plan.compute.precision)
        if key not in self._caches:
            self._caches[key] = PrefixCache(model, plan.compute.micro_batch)
        return self._caches[key].beside(model)
