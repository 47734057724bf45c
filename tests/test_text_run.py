"""Sentences and rows of numbers through the whole job: a run, its file for the device, and predictions with it."""

from __future__ import annotations

import ast
import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from command_line import told
from krdistill import Distiller
from krdistill.cli import main
from krdistill.config import load_config
from krdistill.data import DataBundle, FeatureData, load_data
from krdistill.deploy import export_network
from krdistill.deploy.inputs import listed_entries
from krdistill.deploy.measuring import count_graph, measure_file
from krdistill.deploy.onnx import ExportError, export_onnx
from krdistill.deploy.predicting import predict
from krdistill.deploy.runtime import DeviceModel
from krdistill.errors import ArgumentError, ConfigError, DataError, ModelError
from krdistill.kinds import encode_texts
from krdistill.models.network import build_network, load_network
from krdistill.pipeline import estimate_seconds, prepare, run
from krdistill.sharing import share_run
from krdistill.stages import StoppedError

SCHEDULE = {"epochs": 6, "batch_size": 16, "optimizer": "adamw", "lr": 0.02, "augmentation": "word-dropout"}
ASKS = {
    "card": ("where is my card", "my card did not come", "when will the card arrive", "card not here yet"),
    "lost": ("I lost it", "someone stole my wallet", "it was stolen", "cannot find it, lost"),
    "rate": ("what is the exchange rate", "how many euros for a dollar", "rate of the pound", "do you exchange yen"),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of three classes, 40, 16 and 8 of them, and 8 of each to test on."""
    path = tmp_path_factory.mktemp("text") / "asks.csv"
    rows = []
    for (label, texts), n in zip(ASKS.items(), (40, 16, 8), strict=True):
        rows += [(f"{texts[i % 4]} {'please ' * (i // 4 % 3)}{i}", label, "train") for i in range(n)]
        rows += [(f"hello, {texts[i % 4]} {100 + i}", label, "test") for i in range(8)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label", "split"), *rows])
    return path


def config(table: Path, **more: Any) -> dict[str, Any]:
    return {
        "data": {"source": str(table), "groups": "thirds"}, "teacher": {"model": "text_cnn16"},
        "student": {"model": "ngram256x8"}, "train": dict(SCHEDULE), "recipe": "krdistill", "baselines": ["kd"],
        "bank": {"views": 3}, **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    out = tmp_path_factory.mktemp("run") / "text"
    plan = prepare(load_config(config(table)))
    assert set(estimate_seconds(plan, out)) == {"teacher", "bank", "classifier", "baselines/kd", "student"}
    run(plan, out, report=True)
    return out


def test_a_run_on_sentences(finished: Path, table: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["teacher"]["top1"] > 0.8 and metrics["student"]["top1"] > 0.8
    assert metrics["student"]["parameters"] < 10_000 and (finished / "report.html").is_file()
    network = load_network(finished / "student")
    assert network.kind == "text" and network.class_names == ("card", "lost", "rate")
    before = (finished / "student" / "model.safetensors").read_bytes()
    again = finished.parent / "again"
    run(prepare(load_config(config(table))), again, report=False)
    assert (again / "student" / "model.safetensors").read_bytes() == before


def test_the_file_for_the_device_answers_as_the_student_does(finished: Path, table: Path) -> None:
    data = load_data(table)
    network, model = load_network(finished / "student").eval(), DeviceModel(finished / "student.onnx")
    assert model.kind == "text" and model.class_counts == (40, 16, 8)
    texts = ["where is my card", "a", "ÄÖ ?!", "x" * 900, *(f"{t}, please" for ts in ASKS.values() for t in ts)]
    with torch.no_grad():
        ours = network(torch.from_numpy(encode_texts(texts))).logits.softmax(1).numpy()
    np.testing.assert_allclose(model(encode_texts(texts)), ours, atol=1e-5)
    for text, p in zip(texts, ours, strict=True):  # whatever else is in the batch
        np.testing.assert_allclose(model(encode_texts([text]))[0], p, atol=1e-5)
    measured = measure_file(finished / "student.onnx", threads=(1,), batches=(1,), seconds=0.05)
    assert measured["runs"][0]["batch"] == 1 and measured["bytes"] < 100_000
    p = model(data.test.inputs.numpy())
    assert (p.argmax(1) == data.test.labels.numpy()).mean() > 0.8


def test_predictions_for_sentences(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lines.txt").write_text("where is my card\n\nsomeone stole it, lost\n", encoding="utf-8")
    (tmp_path / "table.tsv").write_text("id\ttext\n1\twhat is the rate\n", encoding="utf-8")
    (tmp_path / "none.csv").write_text("a,b\n1,2\n")
    given = [str(tmp_path / name) for name in ("lines.txt", "table.tsv", "none.csv", "gone.txt")]
    with pytest.raises(SystemExit) as stopped:
        main(["predict", str(finished / "student.onnx"), *given])
    shown = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert stopped.value.code == 3 and [r["class"] for r in shown] == ["card", "", "lost", "rate", "", ""]
    assert shown[0]["text"] == "where is my card" and shown[1]["error"] == "an empty sentence"
    assert "expected a column 'text', got a, b" in shown[4]["error"] and "no such file" in shown[5]["error"]
    model = DeviceModel(finished / "student.onnx")
    lines = io.BytesIO(b"exchange rate of the dollar?\r\nmy card\n")
    found = list(predict(model, listed_entries(["-"], "text", 1, lines), top=2))
    assert [p.classes[0] for p in found] == ["rate", "card"] and found[0].path == "exchange rate of the dollar?"


def test_predicting_needs_no_torch(finished: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from krdistill.deploy.runtime import DeviceModel; "
        "from krdistill.deploy.predicting import predict; from krdistill.deploy.inputs import listed_entries; "
        f"model = DeviceModel(Path({str(finished / 'student.onnx')!r})); import io; "
        "print(next(iter(predict(model, listed_entries(['-'], 'text', 1, io.BytesIO(b'my card'))))).classes[0]); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "card", done.stderr


def test_other_formats(finished: Path, table: Path, tmp_path: Path) -> None:
    plan = prepare(load_config(config(table)))
    network = load_network(finished / "student")
    for form, precision in (("onnx", "float16"), ("pt2", "float32"), ("safetensors", "float32")):
        out = tmp_path / f"{form}-{precision}{'' if form == 'safetensors' else '.' + form}"
        report = export_network(
            network, out, test=plan.data.test, groups=plan.groups, form=form, precision=precision, max_drop=5,
            max_rare_drop=15,
        )  # fmt: skip
        assert report["agreement"] > 0.9 and report["images"] == 24


def _stored(path: Path) -> tuple[dict[str, np.ndarray], Any]:
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(str(path)).graph
    return {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}, graph


@pytest.mark.parametrize("who", ["student", "teacher"])  # a bag of n-grams, and convolutions over words
def test_int8_for_sentences(finished: Path, table: Path, tmp_path: Path, who: str) -> None:
    plan = prepare(load_config(config(table)))
    network, out = load_network(finished / who).eval(), tmp_path / "small.onnx"
    report = export_network(
        network, out, test=plan.data.test, groups=plan.groups, precision="int8", class_counts=[40, 16, 8],
        max_drop=5, max_rare_drop=15,
    )  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.onnx", "small.onnx.json"]
    plain = export_onnx(network, tmp_path / "plain.onnx", class_counts=[40, 16, 8])
    assert report["bytes"] == out.stat().st_size
    assert report["float32"]["bytes"] == plain.stat().st_size and report["float32"]["milliseconds"] > 0
    assert report["noun"] == "sentences" and report["milliseconds"] > 0 and report["calibration_images"] is None
    assert count_graph(out)["parameters"] == count_graph(plain)["parameters"]

    # The report, worked out again from the files alone; the limits that were allowed are limits.
    model, labels = DeviceModel(out), plan.data.test.labels.numpy()
    assert model.class_names == network.class_names and model.class_counts == (40, 16, 8)
    p, before = (DeviceModel(path)(plan.data.test.inputs.numpy()) for path in (out, plain))
    assert report["after"]["top1"] == pytest.approx((p.argmax(1) == labels).mean())
    assert report["before"]["top1"] == pytest.approx((before.argmax(1) == labels).mean())
    for k, name in enumerate(plan.groups.names):  # a class each
        assert report["after"]["groups"][name] == pytest.approx((p.argmax(1) == labels)[labels == k].mean())
    assert report["largest_difference"] == pytest.approx(np.abs(p - before).max(), abs=1e-5)
    assert 1e-5 < report["largest_difference"] < 0.1 and report["agreement"] > 0.95
    for i, row in enumerate(plan.data.test.inputs.numpy()):  # one at a time, as on a device
        np.testing.assert_allclose(model(row[None])[0], p[i], atol=0.02)

    # Weights: what is stored comes back within a step, by the file's own scales.
    stored, graph = _stored(out)
    weights = {name: value.detach().numpy() for name, value in network.backbone.named_parameters() if value.ndim > 1}
    gathers = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Gather"}
    seen = 0
    for node in graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        looked_up = node.input[0] in gathers
        coded = stored[gathers[node.input[0]] if looked_up else node.input[0]]
        zero = stored[node.input[2]].astype(int) if len(node.input) > 2 else 0
        scale = stored[node.input[1]] if looked_up else stored[node.input[1]][:, None, None]  # of channels
        want = next(w for w in weights.values() if w.shape == coded.shape)
        # Half a step; of a table, whose zero is a whole number of steps too, another half.
        assert (np.abs((coded.astype(int) - zero) * scale - want) <= (1.001 if looked_up else 0.501) * scale).all()
        assert coded.dtype == (np.uint8 if looked_up else np.int8)
        seen += 1
    products = [n for n in graph.node if n.op_type == "MatMulInteger"]
    for node in products:
        assert stored[node.input[1]].dtype == np.int8 and np.abs(stored[node.input[1]].astype(int)).max() <= 64
    assert seen + len(products) == len(weights), "every table, kernel and matrix"
    assert not [v for v in stored.values() if v.dtype == np.float32 and v.ndim > 1 and v.size > 100]


def test_int8_that_loses_too_much_is_not_written(finished: Path, table: Path, tmp_path: Path) -> None:
    plan = prepare(load_config(config(table)))
    network = load_network(finished / "student")
    bag = network.backbone.get_submodule("stem.0")
    grams = torch.zeros(256, 1).requires_grad_()  # which n-grams the test sentences have: those that get a gradient
    answer = torch.func.functional_call(bag, {"table": grams}, (plan.data.test.inputs,))
    (gradient,) = torch.autograd.grad(answer.sum(), grams)
    unused = int((gradient == 0).nonzero()[0, 0])
    with torch.no_grad():  # a vector that no test sentence has, and whose size takes all steps of the table
        network.backbone.get_parameter("stem.0.table")[unused] = 1e4
    with pytest.raises(ExportError, match=r"int8 loses .* points of accuracy on all test sentences") as caught:
        export_network(network, tmp_path / "a.onnx", test=plan.data.test, groups=plan.groups, precision="int8")
    assert not list(tmp_path.iterdir())
    assert caught.value.report is not None and caught.value.report["before"]["top1"] > 0.8


def test_int8_by_the_command(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "small.onnx"
    loose = ("--max-drop", "5", "--max-rare-drop", "15", "--out", str(out))
    code, shown, err = told(capsys, ["export", str(finished), "--precision", "int8", *loose])
    assert code == 0, err
    words = " ".join(shown.split())
    assert "accuracy, 24 sentences" in words and "all test sentences" in words and "ms per sentence; float32:" in words
    code, shown, err = told(capsys, ["predict", str(out), "--top", "2", str(_lines(tmp_path))])
    assert code == 0 and [r["class"] for r in csv.DictReader(io.StringIO(shown))] == ["card", "lost", "rate"], err
    code, _, err = told(capsys, ["export", str(finished), "--precision", "int8", "--calibration", "natural", *loose])
    assert code == 2 and "--calibration is for images; int8 of sentences needs none" in err
    plan = prepare(load_config(str(finished / "config.yaml")))
    with pytest.raises(ArgumentError, match="int8 of sentences uses none"):
        export_network(
            load_network(finished / "student"), out, test=plan.data.test, groups=plan.groups, precision="int8",
            calibration=plan.data.train.inputs,
        )  # fmt: skip


def _lines(folder: Path) -> Path:
    path = folder / "asks.txt"
    path.write_text("where is my card\nsomeone stole my wallet\nexchange rate of the dollar\n", encoding="utf-8")
    return path


def _table_of_rows(folder: Path) -> Path:
    write = "\n".join(f"{i},{i % 7},{label}" for i, label in enumerate([*ASKS] * 10))
    (folder / "rows.csv").write_text(f"a,b,label\n{write}\n")
    return folder / "rows.csv"


def _check_shared(run_folder: Path, folder: Path, task: str, given: Path, classes: set[str]) -> None:
    """The card says the task, and what it tells the reader to do works."""
    pytest.importorskip("huggingface_hub")
    share_run(run_folder, folder)
    card = (folder / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["pipeline_tag"] == head["model-index"][0]["results"][0]["task"]["type"] == task
    code = card.partition("```python\n")[2].partition("```")[0].replace("path/to/this/folder", str(folder))
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert set(ast.literal_eval(done.stdout)) <= classes
    words = card.partition("```console\n")[2].partition("\n```")[0].split()
    assert words[:3] == ["krdistill", "predict", "model.onnx"] and Path(words[3]).suffix == given.suffix
    main(["predict", str(folder / words[2]), str(given), "--out", str(given.parent / "answers.csv")])
    with (given.parent / "answers.csv").open(newline="") as file:
        assert {r["class"] for r in csv.DictReader(file)} <= classes


def test_a_student_for_sentences_is_shared(finished: Path, tmp_path: Path) -> None:
    _check_shared(finished, tmp_path / "shared", "text-classification", _lines(tmp_path), set(ASKS))


def test_what_does_not_go_together(table: Path, finished: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], words: str, **more: Any) -> None:
        with pytest.raises(error, match=words):
            prepare(load_config(config(table, **more)))

    refused(ArgumentError, "'crop-flip' is for images; for sentences", train={**SCHEDULE, "augmentation": "crop-flip"})
    refused(ArgumentError, "Unknown augmentation 'word-drop'", train={**SCHEDULE, "augmentation": "word-drop"})
    refused(ConfigError, "only images can be mixed", train={**SCHEDULE, "mixup": 0.2}, bank={"views": 0})
    refused(ModelError, "'resnet8' is for images, the data are sentences", student={"model": "resnet8"})
    refused(
        ModelError,
        r"takes sentences, uint8 \(B, L\); the data are rows, float32 \(B, D\) = \(B, 2\)",
        data={"source": str(_table_of_rows(tmp_path))},
        teacher={"file": str(finished / "student.onnx")},
        student={"model": "linear"},
        train={**SCHEDULE, "augmentation": "none"},
    )
    refused(
        ModelError,
        "takes sentences; the data are rows of 2 numbers",
        data={"source": str(_table_of_rows(tmp_path))},
        teacher={"run": str(finished)},
        student={"model": "linear"},
        train={**SCHEDULE, "augmentation": "none"},
    )


def _bert(folder: Path) -> Path:
    """A real, small BERT with random weights that knows the words of the table."""
    transformers = pytest.importorskip("transformers")
    words = sorted({w for ts in ASKS.values() for t in ts for w in t.lower().split()})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    torch.manual_seed(0)
    small = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(small).save_pretrained(folder)
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_an_encoder_is_fine_tuned_and_taken_over(table: Path, tmp_path: Path) -> None:
    folder = _bert(tmp_path / "bert")
    named = f"hf:{folder}?weights=pretrained"
    teacher = {"model": named, "train": {"augmentation": "none", "epochs": 8, "lr": 0.003}}
    short: dict[str, Any] = {"baselines": [], "bank": {"views": 2}, "export": {"onnx": False}}
    plan = prepare(load_config(config(table, teacher=teacher, **short)))
    assert any("pretrained" in note for note in plan.notes)
    metrics = run(plan, tmp_path / "out", report=False)
    assert metrics["teacher"]["top1"] > 0.8 and metrics["student"]["top1"] > 0.6
    trained = load_network(tmp_path / "out" / "teacher").eval()
    before = dict(
        build_network(named, class_names=trained.class_names, images=plan.data.train.inputs).named_parameters()
    )
    moved = [k for k, p in trained.named_parameters() if not torch.equal(p, before[k])]
    assert "backbone.base.embeddings.word_embeddings.weight" in moved and len(moved) > 15  # not the head alone
    shutil.rmtree(folder)  # the run folder holds all that a later run needs
    again = {"teacher": {"run": str(tmp_path / "out")}, "recipe": "kd", **short, "bank": {"views": 0}}
    schedule = {**SCHEDULE, "epochs": 1}
    taken = run(prepare(load_config(config(table, **again, train=schedule))), tmp_path / "again", report=False)
    assert taken["teacher"]["top1"] == metrics["teacher"]["top1"]


def test_a_training_with_dropout_goes_on_as_if_never_stopped(table: Path, tmp_path: Path) -> None:
    folder = _bert(tmp_path / "bert")
    student = {"model": f"hf:{folder}", "train": {**SCHEDULE, "epochs": 2, "lr": 0.002}}
    with pytest.raises(ConfigError, match=r"export\.onnx: the student hf:.* given sentences as texts"):
        prepare(load_config(config(table, student=student)))
    more: dict[str, Any] = {"recipe": "none", "baselines": [], "export": {"onnx": False}, "bank": {"views": 0}}
    quick = {"model": "ngram64x4", "train": {**SCHEDULE, "epochs": 1}}
    plan = prepare(load_config(config(table, student=student, teacher=quick, **more)))
    run(plan, tmp_path / "whole", report=False)

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == 11  # within the student's training

    asked = 0
    with pytest.raises(StoppedError, match="of student"):
        run(plan, tmp_path / "halves", report=False, stop=stop)
    torch.rand(1000)  # whatever else the process drew meanwhile
    run(plan, tmp_path / "halves", report=False)
    both = [(tmp_path / name / "student" / "model.safetensors").read_bytes() for name in ("whole", "halves")]
    assert both[0] == both[1]


def test_files_and_answers_teach_sentences(finished: Path, table: Path, tmp_path: Path) -> None:
    file = str(finished / "student.onnx")
    short: dict[str, Any] = {
        "baselines": [], "export": {"onnx": False}, "bank": {"views": 0}, "train": {**SCHEDULE, "epochs": 2}
    }  # fmt: skip
    plan = prepare(load_config(config(table, teacher={"file": file}, **short)))
    metrics = run(plan, tmp_path / "file", report=False)
    known = json.loads((finished / "metrics.json").read_text())
    assert metrics["teacher"]["top1"] == pytest.approx(known["student"]["top1"], abs=1e-6)
    assert load_network(tmp_path / "file" / "teacher").kind == "text"
    logits = torch.cat(
        [load_network(finished / "student").eval()(p.inputs).logits for p in (plan.data.train, plan.data.test)]
    )
    stored = {"ids": [*plan.data.train.ids, *plan.data.test.ids], "logits": logits.detach().numpy()}
    np.savez(tmp_path / "answers.npz", **stored)
    metrics = run(
        prepare(load_config(config(table, teacher={"answers": str(tmp_path / "answers.npz")}, recipe="kd", **short))),
        tmp_path / "answers", report=False,
    )  # fmt: skip
    assert metrics["teacher"]["top1"] == pytest.approx(known["student"]["top1"], abs=1e-6)
    np.savez(tmp_path / "few.npz", ids=stored["ids"][1:], logits=stored["logits"][1:])
    with pytest.raises(DataError, match=r"no answers to 1 of the 64 train sentences.*All training sentences need one"):
        prepare(load_config(config(table, teacher={"answers": str(tmp_path / "few.npz")}, **short)))


def test_a_frozen_encoder_teaches(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KRDISTILL_CACHE", str(tmp_path / "cache"))
    folder = _bert(tmp_path / "bert")
    teacher = {"model": f"embedding:{folder}", "train": {"augmentation": "none", "epochs": 60, "lr": 0.1}}
    plan = prepare(load_config(config(table, teacher=teacher, baselines=[], bank={"views": 2}, export={"onnx": False})))
    estimate_seconds(plan, tmp_path / "out")
    metrics = run(plan, tmp_path / "out", report=False)
    assert metrics["teacher"]["top1"] > 0.6 and metrics["student"]["top1"] > 0.6
    with pytest.raises(ExportError, match="no file for a device can hold it"):
        export_onnx(load_network(tmp_path / "out" / "teacher"), tmp_path / "t.onnx")


def test_a_run_on_rows_of_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    rng = np.random.default_rng(0)
    centres, y = rng.normal(size=(4, 5)) * 3, np.repeat(np.arange(4), (60, 30, 12, 5))
    x = (centres[y] + rng.normal(size=(len(y), 5))) * [1, 1000, 0.01, 1, 1]
    test_y = np.repeat(np.arange(4), 20)
    test = (centres[test_y] + rng.normal(size=(80, 5))) * [1, 1000, 0.01, 1, 1]
    np.savez(tmp_path / "rows.npz", x_train=x, y_train=y, x_test=test, y_test=test_y)
    plan = prepare(load_config({
        "data": {"source": str(tmp_path / "rows.npz"), "groups": "thirds"}, "teacher": {"model": "mlp_32_32"},
        "student": {"model": "mlp_8"}, "train": {"epochs": 15, "batch_size": 16, "augmentation": "none"},
        "recipe": "krdistill", "baselines": ["simkd", "crd"],
    }))  # fmt: skip
    metrics = run(plan, tmp_path / "run", report=False)
    assert metrics["student"]["top1"] > 0.85 and metrics["baselines"]["crd"]["top1"] > 0.7
    model = DeviceModel(tmp_path / "run" / "student.onnx")
    assert model.kind == "features" and model.channels == 5
    p = model(test.astype(np.float32))
    assert (p.argmax(1) == test_y).mean() == pytest.approx(metrics["student"]["top1"], abs=0.02)
    loose = ["--max-drop", "3", "--max-rare-drop", "6"]
    code, shown, err = told(capsys, ["export", str(tmp_path / "run"), "--precision", "int8", *loose])
    assert code == 0 and "ms per row; float32:" in " ".join(shown.split()), err
    int8 = DeviceModel(tmp_path / "run" / "exports" / "student-int8.onnx")
    assert int8.kind == "features" and np.abs(int8(test.astype(np.float32)) - p).max() < 0.1
    with (tmp_path / "given.csv").open("w", newline="") as file:
        csv.writer(file).writerows([list("abcde"), *test[:3].tolist()])
    _check_shared(
        tmp_path / "run", tmp_path / "shared", "tabular-classification", tmp_path / "given.csv", set("0123")
    )  # fmt: skip
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["a", "b", "label", "c", "d", "e"], *([*r[:2], "?", *r[2:]] for r in test[:3].tolist())]
        )
        file.write("1,2,x,old,4,5\n1,2,x,nan,4,5\n")
    (tmp_path / "few.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit):
        main(["predict", str(tmp_path / "run" / "student.onnx"), str(tmp_path / "rows.csv"), str(tmp_path / "few.csv")])
    shown = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [r["class"] for r in shown[:3]] == [str(k) for k in p[:3].argmax(1)] and shown[0]["row"].endswith(
        "rows.csv:2"
    )
    assert [r["error"] for r in shown[3:]] == [
        "expected a number in every column", "NaN, infinity or a number that is too large",
        "expected 5 columns of numbers, got 2",
    ]  # fmt: skip


def test_sentences_and_rows_as_one_object(table: Path) -> None:
    schedule = {"epochs": 5, "augmentation": "none", "optimizer": "adamw", "lr": 0.02, "batch_size": 16}
    distiller = Distiller("ngram512x16", "ngram128x8", train=schedule, groups="thirds").fit(table)
    assert distiller.evaluate()["top1"] > 0.7
    p = distiller.predict(["where is my card", "someone stole my wallet", "exchange rate of the euro"])
    assert p.shape == (3, 3) and p.argmax(1).tolist() == [0, 1, 2]
    with pytest.raises(ArgumentError, match="Expected sentences"):
        distiller.predict(torch.zeros(2, 8, 8, 1, dtype=torch.uint8))
    x, y = torch.randn(60, 3), torch.arange(60) % 2
    x[:, 0] += 4 * y
    rows = FeatureData(x, y, ("a", "b"), tuple(map(str, range(60))))
    own = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    distiller = Distiller(None, own, recipe="none", train={**schedule, "epochs": 20}).fit(DataBundle(rows, rows))
    assert (distiller.predict(x).argmax(1) == y).float().mean() > 0.9
