"""Many runs of one plan: some of its settings varied, each combination with several seeds, and what came of them."""

import dataclasses
import hashlib
import itertools
import re
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from confide.common.errors import UsageError
from confide.common.plan import read_plan
from confide.common.settings import toml_value

FORMAT = "confide-sweep/1"
_MOST_RUNS = 1000
_LONGEST_NAME = 120  # file systems take 255 bytes
_NOT_FOR_NAMES = re.compile(r"[^A-Za-z0-9 ._=,+-]")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One combination of settings.

    Attributes:
        changes: The values of the plan's keys, such as `privacy.epsilon`; empty for the plan as it is.
        plan: The plan with these, as TOML.
    """

    changes: Mapping[str, object]
    plan: bytes

    @property
    def name(self) -> str:
        """Its name, of which a folder can be made: what a name cannot hold is replaced, and a digest tells such apart."""
        words = (f"{key.rpartition('.')[2]}={_words(value)}" for key, value in self.changes.items())
        whole = ",".join(words) or "as-planned"
        plain = _NOT_FOR_NAMES.sub("_", whole)[:_LONGEST_NAME]
        return whole if plain == whole else f"{plain}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def variants(plan: bytes, vary: Sequence[str]) -> list[Variant]:
    """Return every combination of the given settings.

    Args:
        plan: A plan, as TOML.
        vary: Each `section.key=value,value,…`, the values spelled as in TOML; texts without commas may go without quotes.

    Raises:
        UsageError: One is malformed or names a value twice, or there are too many combinations.
        PlanError: The plan or a combination is not valid.
    """
    read_plan(plan)
    axes: dict[str, list[object]] = {}
    for words in vary:
        key, _, values = words.partition("=")
        if key.count(".") != 1 or not values.strip() or key in axes:
            raise UsageError(
                f"--vary {words!r} must be section.key=value,value and name each key once, such as "
                "--vary privacy.epsilon=1,3,8"
            )
        axes[key] = _values(values)
    combinations = [dict(zip(axes, chosen, strict=True)) for chosen in itertools.product(*axes.values())]
    if len(combinations) > _MOST_RUNS:
        raise UsageError(f"--vary gives {len(combinations)} combinations; at most {_MOST_RUNS} are run at once.")
    tree = tomllib.loads(plan.decode())
    found = [Variant(changes=changes, plan=_altered(tree, changes)) for changes in combinations]
    for variant in found:
        read_plan(variant.plan)
    if len({variant.name for variant in found}) < len(found):
        raise UsageError("--vary names a value twice, so two combinations are the same. Name each value once.")
    return found


def summed(results: Mapping[str, Sequence[Mapping[str, Any]]], seeds: Sequence[int]) -> dict[str, Any]:
    """Return what `--json` prints: of every variant mean, lowest and highest of the score that decides.

    Args:
        results: The contents of `run.json` of each variant's runs, by the variant's name.
        seeds: The runs' seeds.
    """
    first = next(iter(results.values()))[0]
    return {
        "format": FORMAT,
        "status": "completed",
        "score": first["score"],
        "seeds": list(seeds),
        "results": {name: _spread(runs) for name, runs in results.items()},
    }


def _spread(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    rows = {}
    for name in runs[0]["measured"]:
        values = [run["measured"][name][run["score"]] for run in runs]
        rows[name] = {"mean": statistics.fmean(values), "lowest": min(values), "highest": max(values)}
    return rows


def draw(total: Mapping[str, Any], found: Sequence[Variant], path: Path) -> None:
    """Draw the federated score over the first varied setting, a line for each combination of the others, as PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    axis_key = next(iter(found[0].changes))
    lines: dict[str, list[tuple[object, Mapping[str, float]]]] = {}
    for variant in found:
        others = {key: value for key, value in variant.changes.items() if key != axis_key}
        label = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in others.items()) or "federated"
        lines.setdefault(label, []).append((variant.changes[axis_key], total["results"][variant.name]["federated"]))
    figure, axis = plt.subplots(figsize=(6.4, 3.8))
    ticks = list(dict.fromkeys(str(variant.changes[axis_key]) for variant in found))
    for shift, (label, points) in enumerate(lines.items()):
        places = [ticks.index(str(value)) + 0.04 * (shift - len(lines) / 2) for value, _ in points]
        means = [row["mean"] for _, row in points]
        spread = [
            [row["mean"] - row["lowest"] for _, row in points],
            [row["highest"] - row["mean"] for _, row in points],
        ]
        axis.errorbar(places, means, yerr=spread, fmt="o-", markersize=4, linewidth=1.2, capsize=2, label=label)
    axis.set_xticks(range(len(ticks)), ticks)
    axis.set_xlabel(axis_key.rpartition(".")[2].replace("_", " "))
    axis.set_ylabel(total["score"])
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    if len(lines) > 1:
        axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, bbox_inches="tight", dpi=120)
    plt.close(figure)


def _words(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _values(words: str) -> list[object]:
    """Return the values, which may be lists or quoted texts with commas of their own."""
    try:
        return list(tomllib.loads(f"values = [{words}]")["values"])
    except tomllib.TOMLDecodeError:
        return [_value(word) for word in words.split(",")]


def _value(word: str) -> object:
    try:
        return tomllib.loads(f"value = {word}")["value"]
    except tomllib.TOMLDecodeError:
        return word


def _altered(tree: Mapping[str, Any], changes: Mapping[str, object]) -> bytes:
    """Return the plan with the changes, as TOML; comments are not kept."""
    sections: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        held = sections.setdefault(section, {})
        if not isinstance(held, dict):
            raise UsageError(f"--vary {key} names no section of a plan, but its key {section!r}, which is not varied.")
        held[name] = value
    lines = [f"{key} = {toml_value(value)}" for key, value in sections.items() if not isinstance(value, dict)]
    for key, value in sections.items():
        if isinstance(value, dict):
            lines += ["", f"[{key}]", *(f"{name} = {toml_value(entry)}" for name, entry in value.items())]
    return ("\n".join(lines) + "\n").encode()
