from __future__ import annotations

import itertools
import json
import re
import warnings
import xml.etree.ElementTree as ET
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from synthetic_run import MakeRun, long_tail

from krdistill.reporting import figures
from krdistill.reporting.figures import PALETTE, Classes
from krdistill.reporting.tables import NetworkRow, networks

SVG = "{http://www.w3.org/2000/svg}"
NASTY = [
    "$x^2$",
    "$",
    "a & b",
    "<script>alert(1)</script>",
    "tab\there\x00",
    "\u732b",
    'id="figure_1" #23272e',
    "\\frac",
]


def texts(svg: str) -> list[str]:
    return ["".join(t.itertext()) for t in ET.fromstring(svg).iter(f"{SVG}text")]


def classes(K: int, *, factor: float = 100, names: list[str] | None = None) -> Classes:
    counts = long_tail(K, factor)
    index = [0 if n > 100 else 1 if n >= 20 else 2 for n in counts]
    return Classes(names or [f"class {k}" for k in range(K)], counts, ("many", "medium", "few"), index)


def view(K: int, low: float = 0.2) -> dict[str, Any]:
    ratio = np.geomspace(3, low, K).tolist()
    return {"ratio": ratio, "groups": {n: {"ratio": r} for n, r in (("many", 2.0), ("medium", 1.0), ("few", None))}}


def network(key: str, per_class: list[float | None], label: str = "") -> NetworkRow:
    return NetworkRow(key, label or key, {"per_class": per_class, "top1": 0.5})


def colours(svg: str) -> set[str]:
    root = ET.fromstring(svg)
    return {c for e in root.iter() for v in e.attrib.values() for c in re.findall(r"#[0-9a-f]{6}\b", v)}


def bar_count(svg: str, colour: str) -> int:
    """Closed outlines filled with a colour."""
    found = 0
    for path in ET.fromstring(svg).iter(f"{SVG}path"):
        if f"fill: var(--{colour}," in path.get("style", ""):
            found += path.get("d", "").count("z")
    return found


@pytest.mark.parametrize("K", [2, 10, 100, 1000])
def test_every_class_is_drawn_in_its_group_colour(K: int) -> None:
    made = classes(K)
    svg = figures.class_histogram(made)
    for g in range(3):
        assert bar_count(svg, f"group-{g + 1}") == list(made.group_of).count(g)
    named = [t for t in texts(svg) if re.fullmatch(r"class \d+", t)]
    assert len(named) == (K if K <= 30 else 0)  # more names than that cannot be read
    assert len(svg) < 250_000


def test_the_colours_follow_the_page() -> None:
    svg = figures.class_histogram(classes(10)) + figures.teacher_bias(classes(10), view(10), view(10))
    for part in svg.split("</svg>")[:-1]:
        assert colours(part + "</svg>") <= set(PALETTE.values())
        styles = re.sub(r"var\(--[\w-]+, #[0-9a-f]{6}\)", "", part)
        assert not re.search(r"#[0-9a-f]{6}", styles)
        assert "<style" not in part and "<?xml" not in part and "<!DOCTYPE" not in part


def test_ids_of_two_figures_do_not_meet() -> None:
    parts = [figures.class_histogram(classes(10)), figures.teacher_bias(classes(10), view(10), None)]
    found = [{e.get("id") for e in ET.fromstring(p).iter() if e.get("id")} for p in parts]
    assert found[0] and found[1] and not found[0] & found[1]
    for svg, ids in zip(parts, found, strict=True):
        used = set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg))
        assert used and used <= ids


def test_class_names_are_text_and_nothing_else() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = figures.class_histogram(classes(8, names=NASTY))
    shown = texts(svg)
    for name in (
        "$x^2$",
        "$",
        "a & b",
        "<script>alert(1…",
        "tab\ufffdhere\ufffd",
        "\u732b",
        'id="figure_1" #…',
        "\\frac",
    ):
        assert name in shown
    assert "<script" not in svg


def test_the_users_settings_are_left_alone() -> None:
    mpl.rcParams["font.size"] = 31
    try:
        with_settings = figures.class_histogram(classes(10))
        assert mpl.rcParams["font.size"] == 31
    finally:
        mpl.rcParams["font.size"] = mpl.rcParamsDefault["font.size"]
    assert with_settings == figures.class_histogram(classes(10))  # and they change nothing; twice the same text
    import sys

    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_classes_stand_by_group_then_count() -> None:
    made = Classes(list("abcd"), [5, 500, 30, 600], ("many", "medium", "few"), [2, 0, 1, 0])
    assert made.order.tolist() == [3, 1, 2, 0]
    shown = [t for t in texts(figures.class_histogram(made)) if t in "abcd"]
    assert shown == ["d", "b", "c", "a"]


def test_teacher_bias_names_every_group_that_has_classes() -> None:
    svg = figures.teacher_bias(classes(10), view(10), view(10))
    assert {"many: 2.00× → 2.00×", "medium: 1.00× → 1.00×", "few: n/a"} <= set(texts(svg))
    assert {"teacher", "rectified"} <= set(texts(svg))
    alone = figures.teacher_bias(classes(10, factor=10), view(10, low=1e-9), None)
    assert "rectified" not in texts(alone)
    assert not any("few" in t for t in texts(alone))
    absent = {**view(10), "ratio": [None] * 9 + [2.0]}
    assert "1×" in texts(figures.teacher_bias(classes(10), absent, absent))


def test_gain_by_class() -> None:
    made = classes(10)
    mine: list[float | None] = [0.5, 0.5, 0.5, 0.5, 0.2, 0.5, 0.5, 0.9, None, 0.1]
    other: list[float | None] = [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.4, 0.1, 0.2, None]
    student, kd = network("student", mine), network("baselines/kd", other, "student, kd")
    svg = figures.class_gain(made, student, kd, figures.network_colors([kd, student]))
    assert bar_count(svg, "vermilion") == 2
    assert bar_count(svg, "blue") == 1
    assert {"many: +0.0 points", "medium: -6.7 points", "few: +80.0 points"} <= set(texts(svg))
    nothing = network("student", [None] * 10)
    assert "few: n/a" in texts(figures.class_gain(made, nothing, kd, figures.network_colors([nothing, kd])))


def test_group_bars_say_not_available_for_an_empty_group(make_run: MakeRun) -> None:
    rows = networks(json.loads((make_run(K=20, factor=10) / "metrics.json").read_text(encoding="utf-8")))
    panels = figures.group_bars(rows)
    assert len(panels) == 4
    assert texts(panels[2]).count("n/a") == len(rows)
    assert "few: 0 classes" in texts(panels[2])
    assert f"{100 * rows[-1].metrics['top1']:.1f}%" in texts(panels[3])
    assert bar_count(panels[2], "vermilion") == 0 and bar_count(panels[3], "vermilion") == 1


def test_reliability_panels_show_only_networks_with_predictions() -> None:
    rows = [network("teacher", []), network("student", [])]
    arrays = {
        "labels": np.array([0, 1, 1, 0]),
        "student.prediction": np.array([0, 1, 0, 0]),
        "student.confidence": np.array([0.9, 0.8, 1.0, 0.6], dtype=np.float32),
    }
    panels = figures.reliability(rows, arrays)
    assert len(panels) == 1
    assert "overconfident by 7.5 points" in texts(panels[0])
    arrays["student.confidence"] = np.array([0.5, 0.5, 0.5, 0.5])
    assert "underconfident by 25.0 points" in texts(figures.reliability(rows, arrays)[0])


def line(stage: str, epoch: int, **more: Any) -> dict[str, Any]:
    return {
        "stage": stage,
        "epoch": epoch,
        "epochs": 3,
        "loss": {"total": 2.0 / epoch, "kd": 1.0 / epoch, "ce": 0.5},
        **more,
    }


def test_training_curves_name_each_line_at_its_end() -> None:
    rows = [network("teacher", []), network("student", [], "student, krdistill")]
    log = [line("student", e, test={"top1": 0.1 * e, "groups": {"many": 0.2, "few": None}}) for e in (1, 2, 3)]
    panels = figures.training_curves([line("teacher", 1, test=None), *log], rows)
    titles = [texts(p)[-1] if "loss" not in "".join(texts(p)) else "loss" for p in panels]
    assert len(panels) == 4, titles
    assert {"total", "kd", "ce", "loss: student, krdistill"} <= set(texts(panels[1]))
    assert {"krdistill", "test accuracy"} <= set(texts(panels[2]))
    assert "teacher" not in texts(panels[2])  # it was never evaluated on the way
    assert {"many", "few: n/a"} <= set(texts(panels[3]))


def test_training_curves_of_validation_images_say_so() -> None:
    log = [line("student", e, val={"top1": 0.1, "groups": {"many": 0.2}}) for e in (1, 2)]
    panels = figures.training_curves(log, [network("student", [], "student, kd")])
    assert "validation accuracy" in texts(panels[1])
    assert not any("test accuracy" in t for p in panels for t in texts(p))


def test_correction_rates() -> None:
    rows = [network("student", [], "student, krdistill")]
    log = [line("teacher", 1), line("student", 1, correction_rate={"many": 0.01, "medium": None, "few": 0.3})]
    panels = figures.correction_rates(log, rows)
    assert len(panels) == 1
    assert {"many", "medium: n/a", "few", "images corrected", "student, krdistill"} <= set(texts(panels[0]))
    assert figures.correction_rates([line("student", 1)], rows) == []


@pytest.mark.parametrize("places", [[0.5], [0.5, 0.5, 0.5], [0.0, 0.01, 0.99, 1.0], [0.95, 0.97, 1.0], []])
def test_names_at_the_ends_lie_apart(places: list[float]) -> None:
    moved = figures._apart(places, 0.085)
    assert len(moved) == len(places)
    assert all(b - a >= 0.085 - 1e-9 for a, b in itertools.pairwise(moved))
    assert all(0 <= m <= 1 for m in moved)


def test_a_network_keeps_its_colour() -> None:
    rows = [network(k, []) for k in ("teacher", "teacher_rectified", *(f"baselines/{i}" for i in range(6)), "student")]
    found = figures.network_colors(rows)
    assert found["student"] == PALETTE["vermilion"] and found["teacher"] == PALETTE["grey"]
    assert len({found[f"baselines/{i}"] for i in range(4)} | {found["student"], found["teacher"]}) == 6
