"""A figure of what a run costs: epsilon over rounds, and the budget it must stay under. matplotlib is loaded on use."""

import math
from pathlib import Path
from typing import Any

from confide.common.budget_report import Report
from confide.common.errors import MissingPackage, UsageError

INK, ACCENT, SOFT = "#1f2933", "#0b7285", "#adb5bd"
# The look of all figures.
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "text.color": INK,
    "axes.labelcolor": INK,
    "figure.dpi": 120,
    "svg.hashsalt": "confide",
}


def draw(found: Report, path: Path) -> None:
    """Draw epsilon over rounds, fixed and adaptive, and the budget, to a PNG or SVG file.

    Raises:
        UsageError: The name ends in neither .png nor .svg.
        MissingPackage: matplotlib is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in {".png", ".svg"}:
        raise UsageError(f"--figure {path} must end in .png or .svg.")
    try:
        import matplotlib as mpl
    except ModuleNotFoundError:
        raise MissingPackage("matplotlib", "simulate") from None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        figure = _drawn(plt, found)
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if suffix == ".svg" else None)
        plt.close(figure)


def _drawn(plt: Any, found: Report) -> Any:  # noqa: ANN401  matplotlib's pyplot and figure
    figure, axis = plt.subplots(figsize=(6.4, 3.6))
    asked, left = found.found, found.left
    rounds = [0, *(rounds for rounds, _ in found.course)]
    adaptive = [0.0, *(spent.adaptive for _, spent in found.course)]
    of_plan = asked.privacy.epsilon == found.plan.privacy.epsilon
    limit, named = asked.privacy.epsilon, "epsilon of the plan" if of_plan else "epsilon asked for"
    if left is not None:
        limit, named = left.budget, "budget"
        adaptive = [left.used, *left.course]
    axis.plot(rounds, adaptive, "--", color=INK, label="adaptive (RDP)", linewidth=1.6)
    if left is None or not left.spends:
        declared = [0.0, *(spent.declared for _, spent in found.course)]
        axis.plot(rounds, declared, color=ACCENT, label="fixed in advance", linewidth=1.6)
    axis.axhline(limit, color=SOFT, linewidth=1.2, label=f"{named}, {limit:g}", zorder=0)
    axis.set_xlim(0, rounds[-1])
    axis.set_ylim(0, 1.15 * max([limit, *(value for value in adaptive if math.isfinite(value))]))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("further rounds" if left is not None and left.spends else "rounds")
    axis.set_ylabel(f"epsilon at delta = {asked.privacy.delta:g}")
    axis.legend(frameon=False, loc="best", fontsize=9)
    plan = f"{found.plan.name}, with other numbers" if asked.changed else found.plan.name
    axis.set_title(f"{plan}: what each {found.unit} has spent by then", loc="left", fontsize=11)
    return figure
