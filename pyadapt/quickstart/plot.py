"""The picture of a run: loss of each step above, held-out accuracy below, over the same steps."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from .training import History

INK, BLUE, ORANGE, PALE = "#2b2d33", "#2f6db5", "#d9702b", "#b9cfe8"
# Steps on either side that the smooth line of the loss is a mean of.
REACH = 5


def draw(history: History, chance: float, title: str, path: Path) -> None:
    """Write a PNG of the run to `path`."""
    # A Figure with a canvas of its own: pyplot would keep state and might look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 2]})
    _draw_loss(upper, history)
    _draw_accuracy(lower, history, chance)
    upper.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=12)
    lower.set_xlabel("training step")
    for axes in (upper, lower):
        _plain_axes(axes)
    figure.align_ylabels([upper, lower])
    figure.savefig(path, dpi=160, facecolor="white")


def smoothed(values: list[float]) -> list[float]:
    """The mean around each place: centred, for a trailing one would lag behind a falling loss."""
    return [fmean(values[max(0, place - REACH) : place + REACH + 1]) for place in range(len(values))]


def _draw_loss(axes: Any, history: History) -> None:
    steps = range(1, len(history.losses) + 1)
    axes.plot(steps, history.losses, color=PALE, linewidth=1, label="each step")
    axes.plot(steps, smoothed(history.losses), color=BLUE, linewidth=2, label=f"mean of {2 * REACH + 1} steps")
    axes.set_ylabel("training loss")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, labelcolor=INK)


def _draw_accuracy(axes: Any, history: History, chance: float) -> None:
    steps, values = zip(*history.accuracies, strict=True)
    axes.plot(steps, values, color=ORANGE, linewidth=2, marker="o", markersize=6, clip_on=False, zorder=3)
    bold: dict[str, Any] = {"color": ORANGE, "fontweight": "bold"}
    for which, side, aside, rise in ((0, "left", 4, 16), (-1, "right", 0, 9)):
        above = {"xytext": (aside, rise), "textcoords": "offset points", "ha": side}
        axes.annotate(f"{values[which]:.1%}", (steps[which], values[which]), **above, **bold)
    axes.axhline(chance, color=INK, linewidth=1, linestyle=(0, (4, 3)), alpha=0.5)
    below = {"xytext": (0, -4), "textcoords": "offset points", "ha": "right", "va": "top"}
    faint: dict[str, Any] = {"color": INK, "alpha": 0.7, "fontsize": 9}
    axes.annotate("chance", (1, chance), xycoords=("axes fraction", "data"), **below, **faint)
    axes.set_ylabel("held-out accuracy")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.yaxis.set_major_locator(_quarters())


def _quarters() -> Any:
    from matplotlib.ticker import MultipleLocator

    return MultipleLocator(0.25)


def _plain_axes(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa0a8")
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=3)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.set_xlim(left=0)
