"""A figure of a site's budgets over time: epsilon used, record by record, and the limit. matplotlib is loaded on use."""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from confide.client.standing import Point
from confide.common.budget_figure import ACCENT, INK, SOFT, STYLE
from confide.common.errors import MissingPackage, UsageError

_COLORS = (ACCENT, "#c2570c", "#5f3dc4", "#2b8a3e", "#a61e4d")
_KINDS = (".png", ".svg")
_MINUTES_S, _DAYS_S = 600, 864_000


def check_figure(path: Path) -> None:
    """Return if a figure can be drawn to this file; asked before anything long begins.

    Raises:
        UsageError: The name ends in neither .png nor .svg, or its directory is not there.
        MissingPackage: matplotlib is not installed.
    """
    from importlib.util import find_spec

    if path.suffix.lower() not in _KINDS:
        raise UsageError(f"--figure {path} must end in {' or '.join(_KINDS)}.")
    if not path.parent.is_dir():
        raise UsageError(f"--figure {path}: there is no directory {path.parent}. Make it, or choose another place.")
    if find_spec("matplotlib") is None:
        raise MissingPackage("matplotlib", "simulate")


def draw(points: Sequence[Point], site: str, path: Path) -> None:
    """Draw what each account had used after each record, and its limit, to a PNG or SVG file.

    Args:
        points: From `standing.course`.
        site: The site's name, for the title.
        path: The file; what is there is replaced.

    Raises:
        UsageError: No account was opened yet, or as for `check_figure`.
        MissingPackage: matplotlib is not installed.
    """
    check_figure(path)
    if not points:
        raise UsageError("No account was opened yet, so there is nothing to draw. Register data first.")
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        figure = _drawn(plt, points, site)
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        plt.close(figure)


def _drawn(plt: Any, points: Sequence[Point], site: str) -> Any:  # noqa: ANN401  matplotlib's pyplot and figure
    figure, axis = plt.subplots(figsize=(6.4, 3.6))
    end = max(point.at for point in points)
    for place, account in enumerate(dict.fromkeys(point.account for point in points)):
        own = [point for point in points if point.account == account]
        color = _COLORS[place % len(_COLORS)]
        times = [_time(point.at) for point in own]
        used = [point.used for point in own]
        axis.step([*times, _time(end)], [*used, used[-1]], where="post", color=color, label=f"account {account}")
        axis.plot(times, used, ".", color=color, markersize=3)
        for begun in (point for point in own if point.kind == "renew"):
            axis.axvline(_time(begun.at), color=SOFT, linewidth=0.8, linestyle=":")
    limits = sorted({point.epsilon for point in points})
    for limit in limits:
        axis.axhline(limit, color=SOFT if len(limits) == 1 else INK, linewidth=1.2, zorder=0)
        axis.annotate(
            f"limit {limit:g}",
            xy=(1, limit),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 2),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=9,
        )
    axis.set_ylim(0, 1.1 * max(*limits, *(point.used for point in points)))
    axis.set_ylabel("epsilon used, in the period")
    axis.xaxis.set_major_formatter(_formatter(end - min(point.at for point in points)))
    axis.set_xlabel("times are UTC")
    axis.legend(frameon=False, loc="best", fontsize=9)
    axis.set_title(f"{site}: what the persons of its data have spent", loc="left", fontsize=11)
    figure.autofmt_xdate()
    return figure


def _formatter(span_s: int) -> Any:  # noqa: ANN401  matplotlib's
    """Return how ticks are spelled: each names its day and month, with the time or the year as the span needs."""
    from matplotlib import dates

    spelled: Any = dates.DateFormatter
    if span_s < _MINUTES_S:
        return spelled("%d %b %H:%M:%S")
    return spelled("%d %b %H:%M" if span_s < _DAYS_S else "%d %b %Y")


def _time(at: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(at, datetime.UTC)
