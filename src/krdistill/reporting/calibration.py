"""Reliability before and after calibration: panels for the report, and the same as a picture file."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, PercentFormatter

from .figures import PALETTE, _drawing, _style, group_color
from .tables import clean, percent

FEWEST = 20  # a group's accuracy over fewer rows is noise, and not drawn
_PER_ROW, _PANEL = 4, (2.45, 2.35)  # inches


def draw(entry: Mapping[str, Any], path: Path, *, title: str) -> None:
    """Writes the panels of a network as one PNG file.

    Args:
        entry: its part of ``calibration.json``.
        path: the file.
        title: what the network is called.
    """
    panels = _panels(entry)
    columns = min(_PER_ROW, len(panels))
    rows = -(-len(panels) // columns)
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        mpl.rcdefaults()
        settings: Any = mpl.rcParams
        settings.update(_style("calibration"))
        figure = Figure(figsize=(columns * _PANEL[0] + 0.2, rows * _PANEL[1] + 0.5), layout="constrained")
        FigureCanvasAgg(figure)
        for i, (name, found) in enumerate(panels):
            axes = figure.add_subplot(rows, columns, i + 1)
            axes.set_axisbelow(True)
            _panel(axes, name, found)
            axes.set_xlabel("confidence" if i + columns >= len(panels) else "")
            axes.set_ylabel("accuracy" if i % columns == 0 else "")
        groups = [n for n, row in entry["before"]["groups"].items() if row is not None]
        names = list(entry["before"]["groups"])
        keys = [Line2D([], [], color=PALETTE["vermilion"], marker="o", markersize=4, label="all")]
        keys += [Line2D([], [], color=group_color(names.index(n)), linewidth=1.0, label=clean(n)) for n in groups]
        figure.legend(handles=keys, loc="outside lower left", ncols=len(keys))
        figure.suptitle(
            f"{clean(title)}: reliability on {entry['before']['images']:,} test {entry['noun']}",
            x=0.01,
            ha="left",
            fontsize=9.5,
            fontweight="bold",
        )
        figure.savefig(path, format="png", dpi=160, facecolor="white")


def panels_as_svg(entry: Mapping[str, Any], *, name: str, title: str) -> list[str]:
    """The same panels as SVG text for a page, one each; ``name`` keeps their ids apart."""
    drawn = []
    for i, (method, found) in enumerate(_panels(entry)):
        with _drawing(f"calibration-{name}-{i}", _PANEL, f"reliability of {title}, {method}") as (axes, done):
            _panel(axes, method, found)
            axes.set(xlabel="confidence", ylabel="accuracy")
        drawn.append(done())
    return drawn


def _panels(entry: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    fitted = [(name, found["after"]) for name, found in entry["methods"].items() if name != "none"]
    return [("before", entry["before"]), *fitted]


def _panel(axes: Axes, name: str, found: Mapping[str, Any]) -> None:
    """Accuracy against confidence: groups as thin lines, all as dots of the size of their share of the images."""
    axes.plot([0, 1], [0, 1], color=PALETTE["muted"], linewidth=0.9, linestyle=(0, (4, 3)))
    for g, row in enumerate(found["groups"].values()):
        if row is not None:
            c, a, count = _points(row["reliability"])
            many = count >= FEWEST
            axes.plot(c[many], a[many], color=group_color(g), linewidth=0.9)
    c, a, count = _points(found["reliability"])
    axes.plot(c, a, color=PALETTE["vermilion"], linewidth=1.2)
    axes.scatter(
        c, a, s=6 + 160 * count / max(1, found["images"]), color=PALETTE["vermilion"], linewidth=0, zorder=3,
        clip_on=False,
    )  # fmt: skip
    lean = round(100 * (found["confidence"] - found["top1"]), 1)
    words = f"ECE {percent(found['ece'])}" + (f", {'over' if lean > 0 else 'under'} by {abs(lean):.1f}" if lean else "")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title(name, pad=15)
    axes.text(0.0, 1.03, words, transform=axes.transAxes, fontsize=7.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _points(curve: Mapping[str, Sequence[Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean confidence, accuracy and images of the bins that hold any."""
    count = np.array(curve["count"], dtype=float)
    seen = count > 0
    kept = [np.array([np.nan if v is None else v for v in curve[key]])[seen] for key in ("confidence", "accuracy")]
    return kept[0], kept[1], count[seen]
