"""The numbers of a run as rows of text, for the terminal and for the report. Imports the standard library alone."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NA = "n/a"


@dataclass(frozen=True)
class NetworkRow:
    """One network of ``metrics.json``.

    Attributes:
        key: its place in the run and in ``predictions.npz``: ``teacher``, ``student``, ``baselines/<key>`` ...
        label: what it is called in tables and figures.
        metrics: its part of ``metrics.json``.
    """

    key: str
    label: str
    metrics: Mapping[str, Any]

    @property
    def is_student(self) -> bool:
        return not self.key.startswith("teacher")

    @property
    def name(self) -> str:
        """What it is called within a sentence."""
        return self.label.removeprefix("student, ") if self.is_student else f"the {self.label}"


@dataclass(frozen=True)
class Column:
    """A column of the comparison: its header, and its cells as text with the numbers behind them.

    Attributes:
        header: short enough for a terminal.
        title: what it means.
        cells: one text per network.
        values: one number (or None) per network.
        better: ``high`` or ``low`` where one end is better, else None.
    """

    header: str
    title: str
    cells: tuple[str, ...]
    values: tuple[float | None, ...]
    better: str | None = None


def comparison_rows(metrics: Mapping[str, Any], noun: str = "images") -> tuple[list[str], list[list[str]]]:
    """The comparison of every network of a run.

    Args:
        metrics: what ``metrics.json`` holds.
        noun: what its data are, in a word.

    Returns:
        Headers, and one row per network: its name, then accuracy by group, over all images, class-balanced, harmonic
        mean over the classes, worst class, calibration error, parameters and the best epoch (by the name of the part
        that chose it). The last epoch is what everything but that last column speaks of. None is "n/a".
    """
    rows = networks(metrics)
    columns = comparison_columns(rows, noun)
    cells = zip(*(c.cells for c in columns), strict=True)
    return ["network", *(c.header for c in columns)], [[n.label, *c] for n, c in zip(rows, cells, strict=True)]


def networks(metrics: Mapping[str, Any]) -> list[NetworkRow]:
    """The networks of a run, in the order they are shown: teachers, baselines, the student."""
    found = []
    for key, label in (("teacher", "teacher"), ("teacher_rectified", "teacher, rectified")):
        if metrics.get(key):
            found.append(NetworkRow(key, label, metrics[key]))
    for key, row in (metrics.get("baselines") or {}).items():
        found.append(NetworkRow(f"baselines/{key}", clean(f"student, {key}"), row))
    if metrics.get("student"):
        row = metrics["student"]
        found.append(NetworkRow("student", clean(f"student, {row.get('recipe') or 'ours'}"), row))
    return found


def group_names(rows: Sequence[NetworkRow]) -> list[str]:
    """The groups of classes, in order."""
    return list(rows[0].metrics.get("groups", {})) if rows else []


def comparison_columns(rows: Sequence[NetworkRow], noun: str = "images") -> list[Column]:
    """The columns of :func:`comparison_rows` with the numbers behind them."""

    def column(header: str, title: str, values: list[float | None], better: str | None = "high") -> Column:
        return Column(header, title, tuple(percent(v) for v in values), tuple(values), better)

    made = []
    for name in group_names(rows):
        values = [r.metrics["groups"].get(name, {}).get("accuracy") for r in rows]
        made.append(column(clean(name), f"mean accuracy of the classes of group {clean(name)}", values))
    for key, header, title in (
        ("top1", "all", f"accuracy over all {noun}"),
        ("balanced_accuracy", "balanced", "mean of the classes' accuracies"),
        ("harmonic_mean", "harmonic", "harmonic mean of the classes' accuracies; 0 where one class is never right"),
    ):
        made.append(column(header, title, [r.metrics.get(key) for r in rows]))
    worst = [(r.metrics.get("worst_class") or {}).get("accuracy") for r in rows]
    made.append(column("worst", "accuracy of the worst class", worst))
    made.append(column("ECE", "expected calibration error", [r.metrics.get("ece") for r in rows], "low"))
    sizes = [r.metrics.get("parameters") for r in rows]
    made.append(Column("params", "parameters", tuple(count(s) for s in sizes), tuple(sizes), None))
    work = [r.metrics.get("macs") for r in rows]
    if any(work):
        made.append(
            Column("MACs", "multiply-accumulates of one example", tuple(count(m) for m in work), tuple(work), None)
        )
    bests = [r.metrics.get("best") for r in rows]
    parts = {chosen_on(r.metrics) for r in rows if r.metrics.get("best")}
    shared = parts.pop() if len(parts) == 1 else None
    cells = [_best_cell(r.metrics, shared) for r in rows]
    header = f"best on {shared}" if shared else "best epoch"
    title = f"best epoch, chosen on {shared}" if shared else "best epoch, and the part that chose it"
    made.append(Column(header, title, tuple(cells), tuple(b["top1"] if b else None for b in bests), None))
    return made


def calibration_rows(
    entry: Mapping[str, Any], methods: Sequence[str] | None = None
) -> list[tuple[list[str], list[list[str]]]]:
    """How a network is calibrated, before and after.

    Args:
        entry: its part of ``calibration.json``.
        methods: which; by default all that are there.

    Returns:
        Headers and rows, first over all images, then of each group.
    """
    shown = [m for m in (entry["methods"] if methods is None else methods) if m != "none"]
    lines = [("before", entry["before"]), *((m, entry["methods"][m]["after"]) for m in shown)]
    made = []
    for name in (None, *entry["before"]["groups"]):
        rows = [(label, found if name is None else found["groups"][name]) for label, found in lines]
        images = rows[0][1]["images"] if rows[0][1] is not None else 0
        title = f"{'all' if name is None else clean(name)}, {images:,} {entry['noun']}"
        head = [title, *(h for _, h, _ in _CALIBRATION)]
        cells = [[_calibration_cell(row, key, form) for key, _, form in _CALIBRATION] for _, row in rows]
        made.append((head, [[label, *c] for (label, _), c in zip(rows, cells, strict=True)]))
    return made


_CALIBRATION = (
    ("top1", "accuracy", "{:.1%}"),
    ("confidence", "confidence", "{:.1%}"),
    ("ece", "ECE", "{:.2%}"),
    ("balanced_ece", "balanced ECE", "{:.2%}"),
    ("adaptive_ece", "adaptive ECE", "{:.2%}"),
    ("classwise_ece", "class-wise ECE", "{:.3%}"),
    ("brier", "Brier", "{:.4f}"),
    ("nll", "NLL", "{:.3f}"),
)


def _calibration_cell(row: Mapping[str, Any] | None, key: str, form: str) -> str:
    return NA if row is None else form.format(row[key])


def summary_sentences(metrics: Mapping[str, Any], noun: str = "images") -> list[str]:
    """What a run came to, in sentences: how good the student is, and against whom."""
    rows = {r.key: r for r in networks(metrics)}
    student = rows.get("student")
    if student is None:
        return []
    m = student.metrics
    about = ", ".join(str(v) for v in (m.get("model"), f"{count(m.get('parameters'))} parameters") if v)
    lines = [
        f"The student ({about}) is right on {percent(m.get('top1'))} of the {m['images']:,} {m.get('split', 'test')} "
        f"{noun}{_worst_words(m['worst_class'])}."
    ]
    others = [r for r in (reference(metrics), rows.get("teacher")) if r is not None]

    def compare(where: str, value: Callable[[Mapping[str, Any]], float | None]) -> str:
        against = " and ".join(f"{points(value(m), value(r.metrics))} {r.name}" for r in others)
        return f"{where} it reaches {percent(value(m))}" + (f": {against}." if against else ".")

    known = [g for g in group_names([student]) if m["groups"][g]["accuracy"] is not None]
    if known:
        rarest = known[-1]
        name = f"{clean(rarest)}-shot" if rarest in ("many", "few") else clean(rarest)
        lines.append(compare(f"On the {name} classes", lambda row: row["groups"][rarest]["accuracy"]))
    lines.append(compare(f"Over all {noun}", lambda row: row["top1"]))
    return lines


def reference(metrics: Mapping[str, Any]) -> NetworkRow | None:
    """The baseline that the student is held against: ``kd`` where it was trained, else the first one, else none."""
    found = [r for r in networks(metrics) if r.key.startswith("baselines/")]
    for row in found:
        if row.key == "baselines/kd":
            return row
    return found[0] if found else None


def points(value: float | None, other: float | None) -> str:
    """The difference of two fractions in percentage points.

    >>> points(0.412, 0.291), points(0.2, 0.2004), points(0.1, None)
    ('12.1 points above', 'level with', 'not comparable with')
    """
    if value is None or other is None:
        return "not comparable with"
    gap = round(100 * (value - other), 1)
    return f"{abs(gap):.1f} points {'above' if gap > 0 else 'below'}" if gap else "level with"


def percent(value: float | None) -> str:
    """A fraction in percent with one decimal; None is "n/a".

    >>> percent(0.4567), percent(None)
    ('45.7%', 'n/a')
    """
    return NA if value is None else f"{100 * value:.1f}%"


def count(value: float | None) -> str:
    """A large number, short.

    >>> count(999), count(78042), count(23_500_000), count(None)
    ('999', '78.0k', '23.5M', 'n/a')
    """
    if value is None:
        return NA
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:g}"


def clean(text: object) -> str:
    """Text that can be shown: what cannot (control characters, line breaks, lone surrogates, characters that turn the
    direction of the text after them) becomes U+FFFD.

    >>> clean("two\\nlines")
    'two�lines'
    """
    return "".join("\ufffd" if unicodedata.category(c) in _UNSHOWN or c in _TURNING else c for c in str(text))


_UNSHOWN = {"Cc", "Cs", "Zl", "Zp"}
_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufffe\uffff"  # and what XML cannot hold


def chosen_on(row: Mapping[str, Any]) -> str:
    """The part of the data that chose a network's best epoch."""
    return str((row.get("best") or {}).get("chosen_on") or row.get("split") or "test")


def _worst_words(worst: Mapping[str, Any]) -> str:
    shared = worst.get("classes", 1)
    if worst["accuracy"] == 0:
        return f", but never on {clean(worst['name'])}" + (f" and {shared - 1} more classes" if shared > 1 else "")
    return f"; its worst class is {clean(worst['name'])} with {percent(worst['accuracy'])}"


def _best_cell(row: Mapping[str, Any], shared: str | None) -> str:
    best = row.get("best")
    if not best:
        return NA
    return f"{percent(best['top1'])} @{best['epoch']}" + ("" if shared else f" {chosen_on(row)}")
