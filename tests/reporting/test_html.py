from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_run import MakeRun

from krdistill.errors import KrdistillError, MissingDependencyError, RunFolderError
from krdistill.files import read_json, write_json
from krdistill.reporting import write_report

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """A page's tags, and its text by section."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.sections: dict[str, list[str]] = {"": []}
        self.section = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
            self.sections[self.section] = []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "section":
            self.section = ""

    def handle_data(self, data: str) -> None:
        if "style" not in self.open[-1:]:
            self.sections[self.section].append(data)

    def text(self, section: str) -> str:
        return " ".join(" ".join(self.sections[section]).split())


def page(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


SECTIONS = [
    *("comparison", "classes", "teacher", "groups", "gain"),
    *("reliability", "confusion", "training", "device", "provenance"),
]


def left_out(made: Page) -> set[str]:
    return {section for section in SECTIONS if "Left out" in made.text(section)}


def test_the_whole_page(reported_run: Path) -> None:
    metrics, diagnosis = (
        read_json(reported_run / "metrics.json"),
        read_json(reported_run / "teacher" / "diagnosis.json"),
    )
    made = Page((reported_run / "report.html").read_text(encoding="utf-8"))
    assert [s for s in made.sections if s] == SECTIONS
    assert not left_out(made)
    table = made.text("comparison")
    for part in (metrics["teacher"], metrics["student"], *metrics["baselines"].values()):
        for value in (part["top1"], part["groups"]["few"]["accuracy"], part["ece"], part["best"]["top1"]):
            assert f"{100 * value:.1f}%" in table
    assert "best epoch, chosen on test" in table
    assert "many > 100, medium 20-100, few < 20 training images" in table
    for sentence in diagnosis["verdict"]:
        assert sentence in made.text("teacher")
    shares = " → ".join(f"{diagnosis[when]['groups']['few']['ratio']:.2f}" for when in ("before", "after"))
    assert shares in made.text("teacher")
    assert "student, kd" in made.text("gain")
    assert f"{100 * metrics['student']['group_confusion']['few']['many']:.1f}%" in made.text("confusion")
    assert "images corrected" in made.text("training") and "How often error correction fired" in made.text("training")
    assert "0123456789ab" in made.text("provenance") and "data.source digits" in made.text("provenance")
    assert "agrees with PyTorch" in made.text("device")
    assert made.tags.count("svg") == 2 + 1 + 4 + 5 + 4 + 2 + 1
    assert (reported_run / "report.html").stat().st_size < 400_000


def test_one_file_without_scripts_or_network(reported_run: Path) -> None:
    text = (reported_run / "report.html").read_text(encoding="utf-8")
    made = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(made.tags)
    assert not [a for a in made.attributes if a[0] in {"src", "href"} or a[0].startswith("on")]
    for address in re.findall(r"https?://[^\s\"'<>]+", text):
        assert address.startswith(("http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"))
    links = [v for k, v in made.attributes if k.endswith("href")]
    assert all(v and v.startswith("#") for v in links)
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text and "@media print" in text


def test_every_colour_of_a_figure_is_known_to_the_page(reported_run: Path) -> None:
    text = (reported_run / "report.html").read_text(encoding="utf-8")
    used = set(re.findall(r"var\(--([\w-]+)", text))
    for scheme in re.findall(r":root \{(.*?)\}", text, flags=re.DOTALL):
        assert used - {"share"} <= set(re.findall(r"--([\w-]+):", scheme))


NAMES = {  # a class's name, and how it is shown
    "<script>alert('x')</script>": "<script>alert('x')</script>",
    "$\\alpha$": "$\\alpha$",
    'a"b': 'a"b',
    "nul\x00": "nul\ufffd",
    "esc\x1b": "esc\ufffd",
    "\udcff": "\ufffd",
    "two\nlines": "two\ufffdlines",
    "&amp;": "&amp;",
    "\u202eevil": "\ufffdevil",
    "{{ 7 * 7 }}": "{{ 7 * 7 }}",
}


def test_class_names_cannot_break_the_page(make_run: MakeRun) -> None:
    run = make_run(names=[n.encode("utf-8", "replace").decode() for n in NAMES])
    split = (run / "split.json").read_text(encoding="utf-8").replace('"?"', '"\\udcff"')
    assert "\\udcff" in split
    (run / "split.json").write_text(split, encoding="utf-8")
    text = write_report(run).read_text(encoding="utf-8")
    made = Page(text)
    assert "script" not in made.tags
    assert not set(text) & {"\x00", "\x1b", "\u202e", "\udcff"}
    table = made.text("gain").partition("Every class")[2]
    assert [shown for shown in NAMES.values() if f" {shown} " not in table] == []


OPTIONAL = {
    "split.json": {"classes"},
    "teacher/diagnosis.json": {"teacher"},
    "predictions.npz": {"reliability"},
    "log.jsonl": {"training"},
    "export.json": {"device"},
    "provenance.json": {"provenance"},
    "config.yaml": set(),
}


@pytest.mark.parametrize("kept", [*OPTIONAL, "none of them"])
def test_missing_files_leave_their_section_out(make_run: MakeRun, kept: str) -> None:
    run = make_run(baselines=["kd"])
    for name in OPTIONAL:
        if name != kept:
            (run / name).unlink()
    made = page(run)
    assert left_out(made) == set().union({"gain"}, *OPTIONAL.values()) - OPTIONAL.get(kept, set()) - (
        {"gain"} if kept == "split.json" else set()
    )
    assert ("Configuration left out" in made.text("provenance")) == (kept != "config.yaml")
    assert "student, krdistill" in made.text("comparison")


def test_what_is_answered_where_the_student_must_be_sure(make_run: MakeRun) -> None:
    run = make_run(baselines=[])
    with np.load(run / "predictions.npz") as stored:
        labels, guess, sure = (stored[k] for k in ("labels", "student.prediction", "student.confidence"))
    answered = sure >= 0.5
    want = f"0.5 {100 * answered.mean():.1f}%, right {100 * (guess == labels)[answered].mean():.1f}%"
    assert want in page(run).text("reliability")


def test_a_part_that_needs_two_files(lean_run: Path) -> None:
    (lean_run / "split.json").unlink()
    assert left_out(page(lean_run)) == {"classes", "teacher", "gain", "reliability", "training"}


@pytest.mark.parametrize("part", ["baselines", "teacher", "teacher_rectified", "student"])
def test_missing_networks(lean_run: Path, part: str) -> None:
    metrics = read_json(lean_run / "metrics.json")
    del metrics[part]
    write_json(lean_run / "metrics.json", metrics)
    made = page(lean_run)
    assert ("Left out" in made.text("gain")) == (part == "student")
    if part == "baselines":
        assert 'minus that of "teacher"' in made.text("gain")


def test_a_teacher_that_was_not_rectified_or_seen_on_training_images(make_run: MakeRun) -> None:
    run = make_run(baselines=[])
    path = run / "teacher" / "diagnosis.json"
    write_json(path, {**read_json(path), "after": None, "training": None, "rectified_by": None, "views": None})
    shown = page(run).text("teacher")
    assert "→" not in shown and "n/a" in shown


@pytest.mark.parametrize(("K", "factor", "empty"), [(2, 100, "medium"), (100, 10, "few"), (1000, 100, "")])
def test_sizes_and_an_empty_group(make_run: MakeRun, K: int, factor: float, empty: str) -> None:
    run = make_run(K=K, factor=factor, n_max=500 if K < 1000 else 110, per_class=4, baselines=["kd"])
    (run / "log.jsonl").unlink()
    made = page(run)
    assert (run / "report.html").stat().st_size < 1_500_000
    assert len(re.findall(r" n/a(?!:)", made.text("groups"))) == (4 if empty else 0)
    assert not empty or f"{empty}: 0 classes" in made.text("groups")
    assert f"Every class ({K})" in made.text("gain")


def test_a_class_without_test_images(lean_run: Path) -> None:
    run = lean_run
    metrics = read_json(run / "metrics.json")
    for row in (metrics["student"], metrics["teacher"], *metrics["baselines"].values(), metrics["teacher_rectified"]):
        row["per_class"][9] = None
    write_json(run / "metrics.json", metrics)
    assert "class 9 few 5 40 n/a n/a n/a n/a" in page(run).text("gain")


def test_no_metrics_names_the_stage(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    (run / "metrics.json").unlink()
    with pytest.raises(RunFolderError, match=r"No metrics\.json .* evaluation stage"):
        write_report(run)
    with pytest.raises(RunFolderError, match="No folder"):
        write_report(tmp_path / "nowhere")
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    "name", ["metrics.json", "split.json", "teacher/diagnosis.json", "predictions.npz", "config.yaml"]
)
def test_a_damaged_file_is_named(make_run: MakeRun, name: str) -> None:
    run = make_run()
    content = (run / name).read_bytes()
    (run / name).write_bytes(b"a: [1" if name == "config.yaml" else content[: len(content) // 2])
    with pytest.raises(RunFolderError, match=f"{Path(name).name} is damaged"):
        write_report(run)


def test_files_that_do_not_fit_each_other(make_run: MakeRun) -> None:
    run = make_run()
    (run / "split.json").write_bytes((make_run("other", K=12) / "split.json").read_bytes())
    with pytest.raises(RunFolderError, match=r"10 classes, split\.json of 12"):
        write_report(run)
    run = make_run("third")
    arrays: dict[str, Any] = {"labels": np.zeros(3), "student.prediction": np.zeros(4)}
    np.savez(run / "predictions.npz", **arrays)
    with pytest.raises(RunFolderError, match=r"predictions\.npz is damaged"):
        write_report(run)
    write_json(run / "metrics.json", {"split_checksum": "a"})
    with pytest.raises(RunFolderError, match="names no network"):
        write_report(run)


def test_a_log_that_a_killed_run_left(make_run: MakeRun) -> None:
    run = make_run(baselines=[])
    (run / "predictions.npz").unlink()
    with (run / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write('17\n{"stage": "student", "epo')
    assert "loss: student, krdistill" in page(run).text("training")


def test_a_report_is_written_whole_and_again(lean_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = lean_run
    path = write_report(run)
    first = path.read_bytes()
    assert path == run / "report.html"
    assert write_report(run).read_bytes() == first  # the same files give the same page
    from krdistill.reporting import html

    def fail(*_: Any, **__: Any) -> None:
        raise KrdistillError("no")

    monkeypatch.setattr(html.figures, "class_histogram", fail)
    with pytest.raises(KrdistillError):
        write_report(run)
    assert path.read_bytes() == first
    assert not [p for p in run.iterdir() if p.name.startswith(".")]


def test_the_page_is_made_from_the_files_alone(lean_run: Path) -> None:
    run = lean_run
    metrics = read_json(run / "metrics.json")
    metrics["student"]["top1"] = 0.12345
    (run / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    assert "12.3%" in page(run).text("comparison")


def test_a_missing_package_is_named(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    monkeypatch.delitem(sys.modules, "krdistill.reporting.html", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingDependencyError, match=r"jinja2.*pip install 'krdistill\[train\]'"):
        write_report(run)


def _exported(run: Path) -> dict[str, Any]:
    scores = {"top1": 0.75, "groups": {"many": 0.9, "medium": 0.8, "few": 0.5}}
    report = {
        "file": "student-<b>int8.onnx", "precision": "int8", "bytes": 2048, "before": scores, "agreement": 0.985,
        "after": {"top1": 0.74, "groups": {**scores["groups"], "few": 0.45}}, "largest_difference": 0.125,
        "drop": {"all": 1.0, "rarest": 5.0, "rarest_group": "few"},
    }  # fmt: skip
    (run / "exports").mkdir(exist_ok=True)
    write_json(run / "exports" / "student-int8.onnx.json", report)
    return report


def test_exports_and_what_they_cost_are_shown(lean_run: Path) -> None:
    _exported(lean_run)
    measured = {
        "file": "student.onnx", "bytes": 4096, "parameters": 1500, "macs": 2_500_000, "processor": "a processor",
        "runs": [{"threads": 1, "batch": 32, "median_ms": 1.5, "p95_ms": 2.25, "peak_bytes": 3 * 2**20}],
    }  # fmt: skip
    write_json(lean_run / "student.onnx.device.json", measured)
    made = Page(write_report(lean_run).read_text(encoding="utf-8"))
    text = " ".join(made.text("device").split())
    assert "student-<b>int8.onnx int8 2 KiB 75.0% 74.0% 50.0% 45.0% 1.2e-01 98.5%" in text
    assert "student.onnx a processor 4 KiB 1.5k 2.5M 1 32 1.500 ms 2.250 ms 3.0 MiB" in text


def test_damaged_records_of_exports_are_told(lean_run: Path) -> None:
    report = _exported(lean_run)
    del report["after"]
    write_json(lean_run / "exports" / "student-int8.onnx.json", report)
    with pytest.raises(RunFolderError, match="record of an exported file is damaged"):
        write_report(lean_run)


@pytest.mark.parametrize(("kind", "noun"), [("text", "sentences"), ("features", "rows")])
def test_a_run_on_other_data_speaks_of_no_images(kind: str, noun: str, make_run: MakeRun) -> None:
    run = make_run(baselines=["kd"])
    split = read_json(run / "split.json")
    rule = split["groups"]["rule"].replace("images", noun)
    write_json(run / "split.json", {**split, "kind": kind, "groups": {**split["groups"], "rule": rule}})
    diagnosis = read_json(run / "teacher" / "diagnosis.json")
    write_json(run / "teacher" / "diagnosis.json", {**diagnosis, "views": f"training {noun}"})
    text = write_report(run).read_text(encoding="utf-8")
    assert "images" not in text
    for words in ("test {}", "training {} (log scale)", "all {}", "Over all {}", "{} corrected"):
        assert words.format(noun) in text, words
