"""The model card: its figures are the run's, its head is what the Hub reads, and no name in it becomes markup."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from synthetic_run import MakeRun

from krdistill.reporting.html import read_run
from krdistill.reporting.model_card import md, model_card

NETWORK: dict[str, Any] = {
    "class_names": [f"class {k}" for k in range(10)], "image_size": [32, 32], "channels": 3,
    "architecture": {"name": "resnet8x4"},
}  # fmt: skip
HOSTILE = [
    "<script>alert(1)</script>",
    "![x](http://evil.example/x.png)",
    "[click](javascript:alert(1))",
    "a|b|c",
    "`code`",
    "**bold** _soft_ ~~gone~~",
    "www.evil.example and https://evil.example",
    "two\n## lines",
    "&lt;img&gt; $x$ \\",
    "\n---\nlicense: mit\n---",
]


def _card(run: Path, **options: Any) -> str:
    return model_card(read_run(run), NETWORK, title="A run", **options)


def _split(card: str) -> tuple[dict[str, Any], str]:
    _, head, body = re.split(r"^---$", card, maxsplit=2, flags=re.M)
    return yaml.safe_load(head), body


def _shown(body: str) -> tuple[str, list[list[str]]]:
    """The text that a reader sees, and the rows of all tables."""
    text, rows, row = [], [], []
    for token in MarkdownIt("gfm-like", {"linkify": False, "html": True}).parse(body):
        if token.type == "inline":
            assert token.children is not None
            words = "".join(c.content for c in token.children)
            text.append(words)
            row.append(words)
        elif token.type == "tr_open":
            row = []
        elif token.type == "tr_close":
            rows.append(row)
            row = []
    return "\n".join(text), rows


def _tokens(body: str) -> set[str]:
    found = MarkdownIt("gfm-like", {"linkify": False, "html": True}).parse(body)
    return {t.type for t in found} | {c.type for t in found for c in t.children or ()}


def test_the_figures_are_those_of_the_metrics(make_run: MakeRun) -> None:
    run = make_run()
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    head, body = _split(_card(run, license="apache-2.0"))
    student = metrics["student"]
    scores = {m["name"]: m["value"] for m in head["model-index"][0]["results"][0]["metrics"]}
    assert scores["Accuracy"] == pytest.approx(student["top1"], abs=1e-6)
    for name, group in student["groups"].items():
        assert scores[f"Accuracy, {name} classes"] == pytest.approx(group["accuracy"], abs=1e-6)
    assert head["license"] == "apache-2.0" and head["library_name"] == "krdistill"
    text, rows = _shown(body)
    table = {row[0]: row for row in rows}
    headers = table["network"]
    known = {"teacher": metrics["teacher"], "student, krdistill": student, "student, kd": metrics["baselines"]["kd"]}
    for label, m in known.items():
        for name, group in m["groups"].items():
            assert table[label][headers.index(name)] == f"{100 * group['accuracy']:.1f}%"
        assert table[label][headers.index("all")] == f"{100 * m['top1']:.1f}%"
        assert table[label][1] == m["model"]
    split = json.loads((run / "split.json").read_text(encoding="utf-8"))
    assert f"{sum(split['counts']):,} training images of 10 classes" in text
    many = [n for n, g in zip(split["class_names"], split["groups"]["index"], strict=True) if g == 0]
    assert table["many"][-1] == ", ".join(many) and table["many"][1] == str(len(many))
    assert f"Its worst class is {student['worst_class']['name']}" in text
    assert table["commit"][1] == "0123456789ab" and table["seed"][1] == "0"
    assert "2409.07694" in text and split["groups"]["rule"] in text


def test_no_licence_is_claimed_that_nobody_gave(make_run: MakeRun) -> None:
    head, _ = _split(_card(make_run()))
    assert "license" not in head


def test_the_hub_reads_the_head(make_run: MakeRun) -> None:
    hub = pytest.importorskip("huggingface_hub")
    run = make_run()
    data = hub.ModelCard(_card(run, license="mit")).data
    results = {r.metric_name: r for r in data.eval_results}
    top1 = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["student"]["top1"]
    assert data.license == "mit" and data.pipeline_tag == "image-classification" and data.model_name == "A run"
    assert results["Accuracy"].metric_value == pytest.approx(top1, abs=1e-6)
    assert results["Accuracy"].dataset_split == "test"


def test_hostile_names_are_text(make_run: MakeRun) -> None:
    plain = _card(make_run("plain"))
    run = make_run("hostile", names=HOSTILE)
    for file in ("split.json", "metrics.json"):
        value = json.loads((run / file).read_text(encoding="utf-8"))
        if file == "split.json":
            value["name"] = HOSTILE[0] + HOSTILE[1]
        else:
            value["student"]["recipe"] = value["baselines"]["kd"]["recipe"] = "|<b>`"
            value["baselines"][HOSTILE[0]] = value["baselines"].pop("kd")
        (run / file).write_text(json.dumps(value), encoding="utf-8")
    card = _card(run)
    head, body = _split(card)
    assert "license" not in head and head["model-index"][0]["results"][0]["dataset"]["name"].startswith("<script>")
    expected = _tokens(_split(plain)[1])
    assert _tokens(body) <= expected and not {"html_inline", "html_block", "image"} & expected
    text, rows = _shown(body)
    for name in HOSTILE:
        assert name.replace("\n", "\ufffd") in text, name
    widths = [len(row) for row in _shown(_split(plain)[1])[1]]
    assert [len(row) for row in rows] == widths
    assert not re.search(r"(?<!\\)https?://evil|www\.evil", body), "a link by itself"


def test_what_a_run_lacks_is_left_out(lean_run: Path) -> None:
    (lean_run / "split.json").unlink()
    (lean_run / "provenance.json").unlink()
    metrics = json.loads((lean_run / "metrics.json").read_text(encoding="utf-8"))
    del metrics["teacher"], metrics["teacher_rectified"]
    (lean_run / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    text, _ = _shown(_split(_card(lean_run))[1])
    assert "trained without a teacher" in text and "Nothing more is known" in text


def test_places_of_one_machine_are_not_told(make_run: MakeRun) -> None:
    run = make_run()
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    metrics["student"]["model"] = "hf:/home/somebody/nets/tiny?weights=/home/somebody/w.safetensors"
    (run / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    card = _card(run)
    assert "hf:tiny" in card and "somebody" not in card


@pytest.mark.parametrize("text", ["plain", "3.5 (a) - b, c: d", "a_b", "x" * 300])
def test_text_without_markup_reads_the_same(text: str) -> None:
    assert _shown(md(text))[0] == text
