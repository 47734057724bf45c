"""The figures of a report, as SVG text that is set into the page.

Colours and text follow the page: every colour of the drawing is one of ``PALETTE`` and becomes a CSS variable of that
name, so a figure reads on a light and on a dark page and in print. Text stays text. matplotlib is used through its
objects, with its own defaults, whatever the user's settings are.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from ..evaluation import reliability_curve
from .tables import NA, NetworkRow, clean, percent

# Name of the CSS variable to colour on a light page; the page's style sheet holds both schemes. Networks take Okabe and
# Ito's colours, which stay apart in every common colour blindness; the groups' colours differ in lightness too.
PALETTE = {
    "ink": "#23272e",
    "muted": "#6b7280",
    "line": "#d9dde3",
    "band": "#f1f3f6",
    "grey": "#7b828c",
    "purple": "#b8639a",
    "vermilion": "#d55e00",
    "blue": "#0072b2",
    "green": "#009e73",
    "orange": "#c98a00",
    "sky": "#3b9fd6",
    "group-1": "#31538f",
    "group-2": "#1f968b",
    "group-3": "#a58a00",
    "group-4": "#7d5ba6",
    "group-5": "#a0522d",
}
LABELLED_CLASSES = 30  # above this, classes are not named on an axis
WIDE, PANEL, SMALL = (7.6, 3.0), (4.2, 2.6), (3.1, 2.6)  # inches; the page scales them to its columns
LOWEST_RATIO = 1 / 128
_BASELINES = ("blue", "green", "orange", "sky")
_NAMED = {"teacher": "grey", "teacher_rectified": "purple", "student": "vermilion"}
_VARIABLES = {colour: f"var(--{name}, {colour})" for name, colour in PALETTE.items()}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


@dataclass(frozen=True)
class Classes:
    """What a figure over the classes needs: names, training counts and the groups' index, in class order, and what is
    counted, in a word."""

    names: Sequence[str]
    counts: Sequence[int]
    groups: Sequence[str]
    group_of: Sequence[int]
    noun: str = "images"

    @property
    def order(self) -> np.ndarray:
        """Classes by group and then by training images, most first: the order along every class axis."""
        return np.lexsort((-np.asarray(self.counts), np.asarray(self.group_of)))


def network_colors(rows: Sequence[NetworkRow]) -> dict[str, str]:
    """Key to colour, the same in every figure of a report."""
    baselines = [r.key for r in rows if r.key not in _NAMED]
    chosen = {key: _BASELINES[i % len(_BASELINES)] for i, key in enumerate(baselines)}
    return {r.key: PALETTE[_NAMED.get(r.key) or chosen[r.key]] for r in rows}


def group_color(index: int) -> str:
    return PALETTE[f"group-{index % 5 + 1}"]


# Figures over the classes ---------------------------------------------------------------------------------------------


def class_histogram(classes: Classes) -> str:
    """Training images (or sentences, rows) of every class, on a log scale, coloured by group."""
    with _drawing("classes", WIDE, f"training {classes.noun} of every class") as (axes, done):
        counts = np.asarray(classes.counts, dtype=float)[classes.order]
        group_of = np.asarray(classes.group_of)[classes.order]
        K = len(counts)
        low = 0.5 if counts.min() <= 1 else 10 ** np.floor(np.log10(counts.min()))
        axes.set_yscale("log")
        axes.set_ylim(low, counts.max() * 1.6)
        for g in range(len(classes.groups)):
            x = np.flatnonzero(group_of == g)
            if len(x):
                _columns(axes, x, counts[x], group_color(g), base=low)
        if K <= 14:
            for at, n in enumerate(counts.tolist()):
                axes.annotate(f"{n:,.0f}", (at, max(n, low)), (0, 2), textcoords="offset points", ha="center")
        axes.set_ylabel(f"training {classes.noun} (log scale)")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 1 else ""))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if counts.max() < 100 * low else (1,), numticks=12))
        axes.yaxis.set_minor_locator(NullLocator())
        _class_axis(axes, classes)
        _bands(axes, classes)
    return done()


def teacher_bias(classes: Classes, before: Mapping[str, Any], after: Mapping[str, Any] | None) -> str:
    """The teacher's class-balanced mean prediction over the fair share, before and after rectification."""
    with _drawing("bias", WIDE, "mean prediction of every class over its fair share") as (axes, done):
        order = classes.order
        small = len(order) <= LABELLED_CLASSES
        x = np.arange(len(order))
        axes.set_yscale("log", base=2)
        views = [("teacher", before, "grey", "o")]
        if after:
            views.append(("rectified", after, "purple", "D"))
        drawn = []
        for label, view, color, marker in views:
            ratio = np.array([np.nan if r is None else max(r, LOWEST_RATIO) for r in view["ratio"]])[order]
            axes.plot(
                x, ratio, marker, color=PALETTE[color], markersize=5.5 if small else 2.6, markeredgewidth=0, label=label
            )
            drawn.append(ratio)
        if small and len(drawn) == 2:
            axes.vlines(x, *drawn, color=PALETTE["line"], linewidth=1, zorder=1)
        axes.axhline(1, color=PALETTE["ink"], linewidth=0.9, zorder=1.5)
        values = np.concatenate(drawn)
        low, high = min(0.5, np.nanmin(values)), max(2.0, np.nanmax(values))
        axes.set_ylim(low / 1.3, high * 1.3)
        axes.yaxis.set_major_locator(FixedLocator([2.0**e for e in range(-7, 14)]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}×" if v >= 1 else f"1/{1 / v:g}×"))
        axes.set_ylabel("probability / fair share")
        _class_axis(axes, classes)

        def words(name: str) -> str:
            a = before["groups"].get(name, {}).get("ratio")
            b = (after or {}).get("groups", {}).get(name, {}).get("ratio")
            return NA if a is None else f"{a:.2f}×" + (f" → {b:.2f}×" if b is not None else "")

        _bands(axes, classes, words)
        axes.legend(loc="lower left", handletextpad=0.2)  # the head lies above 1, so there is room below
    return done()


def class_gain(classes: Classes, student: NetworkRow, other: NetworkRow, colors: Mapping[str, str]) -> str:
    """Per-class accuracy of the student minus another network's, in points; a bar has the winner's colour."""
    with _drawing("gain", WIDE, f"accuracy of {student.label} minus {other.label}") as (axes, done):
        order = classes.order
        gain = 100 * (_array(student.metrics["per_class"]) - _array(other.metrics["per_class"]))
        x, y = np.arange(len(order)), gain[order]
        for part, winner in ((y > 0, student), (y < 0, other)):
            if part.any():
                _columns(axes, x[part], y[part], colors[winner.key])
        axes.axhline(0, color=PALETTE["ink"], linewidth=0.9)
        seen = y[~np.isnan(y)]
        low, high = min([-5.0, *seen]), max([5.0, *seen])
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:+.0f}" if v else "0"))
        axes.set_ylabel("gain in points")
        _class_axis(axes, classes)
        group_of = np.asarray(classes.group_of)

        def words(name: str) -> str:
            mine = gain[group_of == list(classes.groups).index(name)]
            mine = mine[~np.isnan(mine)]
            return f"{mine.mean():+.1f} points" if len(mine) else NA

        _bands(axes, classes, words)
    return done()


# Panels ---------------------------------------------------------------------------------------------------------------


def group_bars(rows: Sequence[NetworkRow], noun: str = "images") -> list[str]:
    """One panel per group of classes, and one over all images: accuracy of every network."""
    colors = network_colors(rows)
    names = list(rows[0].metrics["groups"])
    panels: list[tuple[str, list[float | None]]] = []
    for name in names:
        first = rows[0].metrics["groups"][name]
        title = f"{clean(name)}: {first['classes']} class{'' if first['classes'] == 1 else 'es'}"
        panels.append((title, [r.metrics["groups"].get(name, {}).get("accuracy") for r in rows]))
    panels.append((f"all {noun}", [r.metrics["top1"] for r in rows]))
    top = max([0.05, *(v for _, values in panels for v in values if v is not None)])
    drawn = []
    for i, (title, values) in enumerate(panels):
        size = (PANEL[0], 0.62 + 0.24 * len(rows))
        with _drawing(f"group-{i}", size, f"accuracy, {title}") as (axes, done):
            y = np.arange(len(rows))
            for row, at, value in zip(rows, y, values, strict=True):
                if value is not None:
                    axes.barh(at, value, color=colors[row.key], height=0.68)
                axes.annotate(
                    percent(value), (value or 0.0, at), (3, 0), textcoords="offset points", va="center",
                    color=PALETTE["ink" if value is not None else "muted"],
                )  # fmt: skip
            axes.set_yticks(y, [_short(r.label, 24) for r in rows])
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.set_xlim(0, min(1.0, top) * 1.18)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="y", visible=False)
            axes.set_title(title)
        drawn.append(done())
    return drawn


def reliability(rows: Sequence[NetworkRow], predictions: Mapping[str, np.ndarray]) -> list[str]:
    """One panel per network: accuracy against confidence; the size of a dot is its share of the images."""
    colors = network_colors(rows)
    labels = predictions["labels"]
    drawn = []
    for i, row in enumerate(rows):
        if f"{row.key}.prediction" not in predictions or f"{row.key}.confidence" not in predictions:
            continue
        confidence = predictions[f"{row.key}.confidence"]
        correct = predictions[f"{row.key}.prediction"] == labels
        curve = reliability_curve(confidence, correct)
        with _drawing(f"reliability-{i}", SMALL, f"reliability of {row.label}") as (axes, done):
            axes.plot([0, 1], [0, 1], color=PALETTE["muted"], linewidth=0.9, linestyle=(0, (4, 3)))
            c, a = _array(curve["confidence"]), _array(curve["accuracy"])
            seen = ~np.isnan(c)
            axes.vlines(c[seen], a[seen], c[seen], color=PALETTE["line"], linewidth=1.2, zorder=1)
            axes.plot(c[seen], a[seen], color=colors[row.key], linewidth=1.1)
            share = np.asarray(curve["count"], dtype=float) / max(1, len(labels))
            axes.scatter(
                c[seen], a[seen], s=8 + 220 * share[seen], color=colors[row.key], linewidth=0, zorder=3, clip_on=False
            )
            lean = float(confidence.mean() - correct.mean())
            words = f"ECE {percent(row.metrics.get('ece'))}"
            if abs(lean) >= 0.0005:
                words += f"\n{'over' if lean > 0 else 'under'}confident by {abs(100 * lean):.1f} points"
            place: dict[str, Any] = {"x": 0.97, "y": 0.04, "ha": "right"}
            if lean > 0:  # the curve lies below the diagonal: there is room above
                place = {"x": 0.03, "y": 0.97, "va": "top"}
            axes.text(s=words, transform=axes.transAxes, linespacing=1.35, **place)
            axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
            axes.set_title(_short(row.label, 34))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
                axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        drawn.append(done())
    return drawn


def training_curves(log: Sequence[Mapping[str, Any]], rows: Sequence[NetworkRow]) -> list[str]:
    """Panels of the trainings: each one's loss terms, every network's accuracy, the student's accuracy by group."""
    known = network_colors(rows)
    labels = {r.key: r.label for r in rows}
    stages = list(dict.fromkeys(str(line["stage"]) for line in log))
    stages.sort(key=lambda s: list(labels).index(s) if s in labels else len(labels))
    drawn = []
    shades = [PALETTE[n] for n in ("ink", "blue", "green", "orange", "purple", "sky")]
    for i, stage in enumerate(stages):
        lines = [line for line in log if line["stage"] == stage and line.get("loss")]
        names = list(dict.fromkeys(name for line in lines for name in line["loss"]))
        names = [n for n in names if n != "total" or len(names) != 2]  # one term alone is the total
        if not lines or not names:
            continue
        names.sort(key=lambda n: n != "total")
        with _drawing(f"loss-{i}", PANEL, f"training loss, {labels.get(stage, stage)}") as (axes, done):
            curves = []
            for name, color in zip(names, shades * (1 + len(names) // len(shades)), strict=False):
                points = [(line["epoch"], line["loss"].get(name)) for line in lines]
                curves.append((clean(name), color, points))
            _curves(axes, curves)
            axes.set(title=f"loss: {_short(labels.get(stage, clean(stage)), 28)}", xlabel="epoch", ylabel="mean loss")
        drawn.append(done())
    part = "validation" if any(line.get("val") for line in log) else "test"
    key = "val" if part == "validation" else "test"
    with _drawing("accuracy", PANEL, f"{part} accuracy by epoch") as (axes, done):
        curves = []
        for stage in stages:
            points = [(line["epoch"], line[key]["top1"]) for line in log if line["stage"] == stage and line.get(key)]
            if points:
                label = labels.get(stage, clean(stage)).removeprefix("student, ")
                curves.append((label, known.get(stage, PALETTE["muted"]), points))
        _curves(axes, curves)
        axes.set(title=f"{part} accuracy", xlabel="epoch", ylabel="accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if curves:
        drawn.append(done())
    judged = [line for line in log if line["stage"] == "student" and line.get(key)]
    if judged:
        groups = list(judged[-1][key].get("groups", {}))
        with _drawing("student-groups", PANEL, f"the student's {part} accuracy by group") as (axes, done):
            _curves(axes, _by_group(groups, [(line["epoch"], line[key].get("groups", {})) for line in judged]))
            axes.set(title=f"student, {part} accuracy by group", xlabel="epoch", ylabel="accuracy")
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        drawn.append(done())
    return drawn


def correction_rates(
    log: Sequence[Mapping[str, Any]], rows: Sequence[NetworkRow], noun: str = "images"
) -> list[str]:  # fmt: skip
    """One panel per training in which error correction was counted: how often it fired, by group and epoch."""
    labels = {r.key: r.label for r in rows}
    drawn = []
    stages = dict.fromkeys(str(line["stage"]) for line in log if line.get("correction_rate"))
    for i, stage in enumerate(stages):
        lines = [line for line in log if line["stage"] == stage and line.get("correction_rate")]
        groups = list(lines[-1]["correction_rate"])
        with _drawing(f"correction-{i}", PANEL, f"error correction, {labels.get(stage, stage)}") as (axes, done):
            _curves(axes, _by_group(groups, [(line["epoch"], line["correction_rate"]) for line in lines]))
            axes.set(title=_short(labels.get(stage, clean(stage)), 34), xlabel="epoch", ylabel=f"{noun} corrected")
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        drawn.append(done())
    return drawn


# Parts of a drawing ---------------------------------------------------------------------------------------------------


@contextmanager
def _drawing(name: str, size: tuple[float, float], title: str) -> Iterator[tuple[Axes, Callable[[], str]]]:
    """Gives axes to draw on and a function that gives the finished SVG after the block."""
    result: list[str] = []
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser has fonts of its own
        mpl.rcdefaults()
        settings: Any = mpl.rcParams
        settings.update(_style(name))
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        yield axes, lambda: result[0]
        buffer = io.StringIO()
        metadata: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    result.append(_inline(buffer.getvalue(), name, title))


def _style(name: str) -> dict[str, Any]:
    quiet = dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), PALETTE["line"])
    dark = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), PALETTE["ink"])
    return {
        **quiet,
        **dark,
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,  # a class may be called $x$
        "font.size": 8.0,
        "axes.titlesize": 8.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": PALETTE["line"],
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.4,
        "legend.frameon": False,
        "figure.constrained_layout.w_pad": 0.02,
        "figure.constrained_layout.h_pad": 0.02,
    }


def _inline(svg: str, name: str, title: str) -> str:
    """A stand-alone SVG made fit to stand in a page: ids of its own, colours as variables, no fixed size."""
    root = ET.fromstring(svg)
    for child in list(root):
        if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}defs") and child.find(".//*[@id]") is None:
            root.remove(child)  # the latter is a style for "*", which would reach the whole page
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key.endswith("href") and value.startswith("#"):
                element.set(key, f"#{name}-{value[1:]}")
            else:
                value = re.sub(r"url\(#", f"url(#{name}-", value)
                element.set(key, re.sub(r"#[0-9a-f]{6}", lambda m: _VARIABLES.get(m[0], m[0]), value))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    root.set("role", "img")
    root.set("aria-label", clean(title))
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    return ET.tostring(root, encoding="unicode")


def _columns(axes: Axes, x: np.ndarray, y: np.ndarray, color: str, base: float = 0.0) -> None:
    """Bars at whole numbers, as one shape: a thousand classes cost one path."""
    width = 0.38 if len(axes.lines) == 0 and x.max() < LABELLED_CLASSES else 0.5
    corners = [
        [(a - width, base), (a - width, b), (a + width, b), (a + width, base)] for a, b in zip(x, y, strict=True)
    ]

    codes = np.tile([Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY], len(corners))
    points = np.array([[*c, c[0]] for c in corners], dtype=float).reshape(-1, 2)
    axes.add_patch(PathPatch(Outline(points, codes), facecolor=color, linewidth=0))


def _class_axis(axes: Axes, classes: Classes) -> None:
    K = len(classes.names)
    axes.set_xlim(-0.6, K - 0.4)
    axes.grid(axis="x", visible=False)
    if K <= LABELLED_CLASSES:
        names = [_short(classes.names[k], 16) for k in classes.order]
        turned = sum(len(n) + 2 for n in names) > 95
        axes.set_xticks(range(K), names, rotation=40 if turned else 0, ha="right" if turned else "center")
        if turned:
            for label in axes.get_xticklabels():
                label.set_rotation_mode("anchor")
        axes.tick_params(axis="x", length=0)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel(f"{K:,} classes, most training images first")


def _bands(axes: Axes, classes: Classes, words: Callable[[str], str] | None = None) -> None:
    """Names the groups along a class axis, with a band behind every second one."""
    group_of = np.asarray(classes.group_of)[classes.order]
    K = len(group_of)
    for g, name in enumerate(classes.groups):
        x = np.flatnonzero(group_of == g)
        if not len(x):
            continue
        if g % 2:
            axes.axvspan(x[0] - 0.5, x[-1] + 0.5, color=PALETTE["band"], linewidth=0, zorder=0)
        text = (
            f"{clean(name)}: {words(name)}" if words else f"{clean(name)}: {len(x)} class{'es' if len(x) > 1 else ''}"
        )
        wide = len(x) / K * 115 > len(text)  # characters that fit over the group's part of the axis
        if not wide:
            text = text.replace(": ", "\n").replace(" → ", "\n→ ")
        axes.text(
            (x[0] + x[-1]) / 2, 1.015, text, transform=axes.get_xaxis_transform(), ha="center", va="bottom",
            color=PALETTE["ink"], fontsize=7.5,
        )  # fmt: skip


Curve = tuple[str, str, Sequence[tuple[float, "float | None"]]]


def _curves(axes: Axes, curves: Sequence[Curve]) -> None:
    """Lines over epochs, each named at its end; names that would meet are moved apart."""
    ends: list[tuple[str, str, float | None]] = []
    for label, color, points in curves:
        x = np.array([p[0] for p in points], dtype=float)
        y = _array([p[1] for p in points])
        seen = ~np.isnan(y)
        if not seen.any():
            ends.append((label, color, None))
            continue
        axes.plot(x[seen], y[seen], color=color, marker="o" if seen.sum() == 1 else None, markersize=3)
        ends.append((label, color, float(y[seen][-1])))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.margins(x=0.02)
    lowest = min((float(v) for _, _, points in curves for _, v in points if v is not None), default=0.0)
    low, high = (0.0 if lowest >= 0 else axes.get_ylim()[0]), axes.get_ylim()[1]
    axes.set_ylim(low, high)
    ends.sort(key=lambda e: (e[2] is not None, e[2] or 0.0))  # a curve without a value is named at the bottom
    places = _apart([0.0 if v is None else (v - low) / (high - low) for _, _, v in ends], step=0.085)
    for (label, color, value), at in zip(ends, places, strict=True):
        text = _short(label, 18) + (f": {NA}" if value is None else "")
        axes.text(1.02, at, text, transform=axes.transAxes, va="center", color=color, fontsize=7.5)


def _apart(places: Sequence[float], step: float) -> list[float]:
    """Rising places, moved as little as it takes to lie ``step`` apart and, if there is room, in [0, 1]."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + step) if moved else max(place, 0.0))
    top = 1.0
    for i in range(len(moved) - 1, -1, -1):
        moved[i] = min(moved[i], top)
        top = moved[i] - step
    return moved


def _by_group(groups: Sequence[str], points: Sequence[tuple[float, Mapping[str, float | None]]]) -> list[Curve]:
    return [(clean(n), group_color(g), [(epoch, row.get(n)) for epoch, row in points]) for g, n in enumerate(groups)]


def _array(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], dtype=float)


def _short(text: str, limit: int) -> str:
    text = clean(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"
