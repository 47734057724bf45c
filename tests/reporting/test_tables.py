from __future__ import annotations

import doctest
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import MakeRun

from krdistill.reporting import tables
from krdistill.reporting.tables import clean, comparison_rows, networks, reference, summary_sentences


def row(top1: float, few: float | None, **more: Any) -> dict[str, Any]:
    return {
        "images": 1000, "split": "test", "top1": top1, "balanced_accuracy": top1, "harmonic_mean": 0.1, "ece": 0.05,
        "worst_class": {"name": "newt", "accuracy": 0.0, "classes": 3}, "model": "resnet8", "parameters": 78_042,
        "groups": {"many": {"classes": 3, "images": 30, "accuracy": 0.8, "ece": 0.1},
                   "few": {"classes": 2, "images": 20, "accuracy": few, "ece": None}},
        "best": {"epoch": 25, "top1": top1 + 0.01, "chosen_on": "test"}, **more,
    }  # fmt: skip


def metrics(**more: Any) -> dict[str, Any]:
    return {
        "teacher": row(0.7, 0.2, parameters=7_433_860), "student": row(0.65, 0.412, recipe="krdistill"),
        "baselines": {"none": row(0.5, 0.1), "kd": row(0.6, 0.291)}, "split_checksum": "ab", **more,
    }  # fmt: skip


def test_rows() -> None:
    headers, rows = comparison_rows(metrics())
    assert headers == [
        "network", "many", "few", "all", "balanced", "harmonic", "worst", "ECE", "params", "best on test",
    ]  # fmt: skip
    assert [r[0] for r in rows] == ["teacher", "student, none", "student, kd", "student, krdistill"]
    assert rows[-1][1:] == ["80.0%", "41.2%", "65.0%", "65.0%", "10.0%", "0.0%", "5.0%", "78.0k", "66.0% @25"]
    assert all(isinstance(cell, str) for r in rows for cell in r)
    assert all(len(r) == len(headers) for r in rows)


def test_none_is_not_available() -> None:
    headers, rows = comparison_rows({"student": row(0.5, None, best=None, parameters=None, ece=None)})
    cells = dict(zip(headers, rows[0], strict=True))
    assert [cells[h] for h in ("few", "ECE", "params", "best epoch")] == ["n/a"] * 4
    assert cells["network"] == "student, ours"


def test_the_part_that_chose_the_best_epoch_is_named() -> None:
    validation = {"epoch": 3, "top1": 0.5, "chosen_on": "validation"}
    headers, _ = comparison_rows({"student": row(0.5, 0.1, best=validation)})
    assert headers[-1] == "best on validation"
    headers, rows = comparison_rows(metrics(teacher=row(0.5, 0.1, best=validation)))
    assert headers[-1] == "best epoch"
    assert (rows[0][-1], rows[-1][-1]) == ("50.0% @3 validation", "66.0% @25 test")
    unnamed = row(0.5, 0.1, best={"epoch": 3, "top1": 0.5}, split="validation")
    assert comparison_rows({"student": unnamed})[0][-1] == "best on validation"


def test_a_run_without_baselines_or_teacher() -> None:
    cases: list[dict[str, Any]] = [{}, {"baselines": {}}, {"baselines": None}]
    for missing in cases:
        _, rows = comparison_rows({"student": row(0.5, 0.1), **missing})
        assert len(rows) == 1
    assert comparison_rows({})[1] == []
    assert reference({"student": row(0.5, 0.1)}) is None
    assert summary_sentences({"teacher": row(0.5, 0.1)}) == []


def test_the_reference_is_kd_where_there_is_one() -> None:
    assert reference(metrics()).key == "baselines/kd"  # type: ignore[union-attr]
    assert reference(metrics(baselines={"bkd": row(0.1, 0.1), "none": row(0.2, 0.1)})).key == "baselines/bkd"  # type: ignore[union-attr]


def test_summary() -> None:
    assert summary_sentences(metrics()) == [
        "The student (resnet8, 78.0k parameters) is right on 65.0% of the 1,000 test images, "
        "but never on newt and 2 more classes.",
        "On the few-shot classes it reaches 41.2%: 12.1 points above kd and 21.2 points above the teacher.",
        "Over all images it reaches 65.0%: 5.0 points above kd and 5.0 points below the teacher.",
    ]
    alone = summary_sentences({"student": row(0.5, None, worst_class={"name": "eel", "accuracy": 0.25, "classes": 1})})
    assert alone[0].endswith("test images; its worst class is eel with 25.0%.")
    assert alone[1] == "On the many-shot classes it reaches 80.0%."  # the few-shot group is empty


def test_a_real_metrics_file(make_run: MakeRun) -> None:
    stored = json.loads((make_run(K=12, factor=10) / "metrics.json").read_text(encoding="utf-8"))
    headers, rows = comparison_rows(stored)
    assert [n.key for n in networks(stored)] == [
        "teacher", "teacher_rectified", "baselines/none", "baselines/kd", "student",
    ]  # fmt: skip
    cells = dict(zip(headers, rows[-1], strict=True))
    assert cells["few"] == "n/a"
    assert cells["all"] == f"{100 * stored['student']['top1']:.1f}%"
    assert rows[1][-1] == "n/a"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("caf\u00e9 \u732b", "caf\u00e9 \u732b"),
        ("a\nb\tc\x00\x1b[31m", "a\ufffdb\ufffdc\ufffd\ufffd[31m"),
        ("evil\u202etxt", "evil\ufffdtxt"),
        ("\udcff\uffff", "\ufffd\ufffd"),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"),
        (7, "7"),
    ],
)
def test_clean(text: object, shown: str) -> None:
    assert clean(text) == shown


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(tables).failed == 0


def test_the_terminal_needs_no_torch_for_a_table() -> None:
    code = (
        "import sys, krdistill.reporting, krdistill.reporting.tables\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'jinja2'} & set(sys.modules)\nassert not heavy, heavy"
    )
    root = str(Path(tables.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={"PYTHONPATH": root}
    )
    assert done.returncode == 0, done.stderr
