"""A run's figures, as PNG and SVG: score and epsilon per round, and score by site."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from confide.common.budget_figure import ACCENT, INK, SOFT, STYLE

_SHARES = ("accuracy", "macro-f1", "auroc")  # scores that lie between 0 and 1


def draw(result: Mapping[str, Any], directory: Path) -> list[Path]:
    """Draw the figures of a run's `run.json` and return the files written."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    directory.mkdir(parents=True, exist_ok=True)
    written = []
    with plt.rc_context(STYLE):
        for name, figure in (("rounds", _rounds(plt, result)), ("sites", _sites(plt, result))):
            for suffix in ("png", "svg"):
                path = directory / f"{name}.{suffix}"
                figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if suffix == "svg" else None)
                written.append(path)
            plt.close(figure)
    return written


def _rounds(plt: Any, result: Mapping[str, Any]) -> Any:  # noqa: ANN401  matplotlib's pyplot and figure
    figure, score_axis = plt.subplots(figsize=(6.4, 3.6))
    name = result["score"]
    history = [{"round": 0, name: result["scores"]["untrained"]}, *result["history"]]
    score_axis.plot([h["round"] for h in history], [h[name] for h in history], "o-", color=ACCENT, markersize=4)
    score_axis.set_xlabel("round")
    score_axis.set_ylabel(name, color=ACCENT)
    if name in _SHARES:
        score_axis.set_ylim(0, 1)
    score_axis.xaxis.get_major_locator().set_params(integer=True)
    epsilon_axis = score_axis.twinx()
    epsilon_axis.spines["right"].set_visible(True)
    spent = [{"round": 0, "epsilon": 0.0}, *result["epsilon_by_round"]]
    epsilon_axis.plot([s["round"] for s in spent], [s["epsilon"] for s in spent], "--", color=INK, linewidth=1.2)
    epsilon_axis.axhline(result["epsilon_target"], color=SOFT, linewidth=0.8)
    epsilon_axis.set_ylim(0, result["epsilon_target"] * 1.1)
    epsilon_axis.set_ylabel(f"epsilon spent by each site (δ = {result['delta']:g})")
    score_axis.set_title(f"{result['plan']['name']}: score and epsilon per round", loc="left", fontsize=11)
    return figure


def _sites(plt: Any, result: Mapping[str, Any]) -> Any:  # noqa: ANN401  matplotlib's pyplot and figure
    scores = result["scores"]
    bars = [("untrained", scores["untrained"], SOFT)]
    bars += [(f"{site}\nalone", value, SOFT) for site, value in scores.get("alone", {}).items()]
    bars += [
        (label, scores[key], SOFT)
        for key, label in (("head_only", "federated,\nhead only"), ("pooled", "pooled"))
        if key in scores
    ]
    if "pooled_not_private" in scores:
        bars.append(("pooled,\nnot private", scores["pooled_not_private"], SOFT))
    bars.append(("federated", scores["federated"], ACCENT))
    figure, axis = plt.subplots(figsize=(max(6.4, 1.05 * len(bars)), 3.6))
    places = range(len(bars))
    drawn = axis.bar(places, [value for _, value, _ in bars], color=[color for _, _, color in bars], width=0.65)
    axis.bar_label(drawn, fmt="%.3f", padding=2, fontsize=9)
    axis.set_xticks(places, [label for label, _, _ in bars], fontsize=9)
    axis.set_ylabel(result["score"])
    if result["score"] in _SHARES:
        axis.set_ylim(0, 1)
    axis.set_title(
        f"{result['plan']['name']}: who reaches what at epsilon {result['epsilon_target']:g}", loc="left", fontsize=11
    )
    return figure
