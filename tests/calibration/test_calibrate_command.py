"""From a finished run to calibrated predictions on files: krdistill calibrate, export, predict, report."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from command_line import told
from krdistill.calibrating import ask, calibrate_run, student_calibrator
from krdistill.calibration import METHODS, Calibrator
from krdistill.config import load_config
from krdistill.errors import ConfigError, ModelError, RunFolderError
from krdistill.pipeline import prepare, run

SMALL: dict[str, Any] = {
    "name": "small",
    "data": {"source": "digits", "profile": "exp", "imbalance_factor": 20, "val_fraction": 0.2, "groups": "thirds"},
    "teacher": {"model": "mlp64"},
    "student": {"model": "mlp64"},
    "train": {"epochs": 3, "batch_size": 64, "augmentation": "none", "evaluate_every": 3},
    "recipe": "kd",
    "baselines": ["none"],
    "export": {"onnx": False},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated") / "small"
    run(prepare(load_config(SMALL, [])), folder)
    return folder


def test_all_methods_and_then_one(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = told(capsys, ["calibrate", str(finished), "--method", "all"])
    assert code == 0, err
    for word in (*METHODS, "head,", "tail,", "adaptive ECE", "none yet: give one --method alone to choose it"):
        assert word in out or word == "none"
    stored = json.loads((finished / "calibration.json").read_text())
    entry = stored["networks"]["student"]
    assert list(entry["methods"]) == list(METHODS)
    assert entry["method"] is None
    assert student_calibrator(finished) is None
    known = json.loads((finished / "metrics.json").read_text())["student"]
    assert entry["before"]["ece"] == pytest.approx(known["ece"], abs=1e-6)
    assert entry["before"]["nll"] == pytest.approx(known["nll"], rel=1e-6)
    assert entry["methods"]["none"]["after"] == entry["before"]
    assert stored["fitted_on"]["images"] == json.loads((finished / "split.json").read_text())["val_images"]
    with Image.open(finished / "calibration-student.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(2**24) or []) > 50  # something is drawn

    code, out, _ = told(capsys, ["calibrate", str(finished), "--method", "temperature"])
    assert code == 0 and "student's own  temperature (T " in out
    again = json.loads((finished / "calibration.json").read_text())["networks"]["student"]
    assert again["methods"]["vector"] == entry["methods"]["vector"]
    assert again["methods"]["temperature"]["calibrator"] == entry["methods"]["temperature"]["calibrator"]
    chosen = student_calibrator(finished)
    assert chosen is not None and chosen.method == "temperature"

    code, out, _ = told(capsys, ["report", str(finished)])
    assert code == 0
    page = (finished / "report.html").read_text()
    assert "temperature is its own" in page and "class-wise ECE" in page and "calibration-n0-0" in page


@pytest.mark.parametrize("network", ["teacher", "none"])
def test_other_networks(network: str, finished: Path) -> None:
    found = calibrate_run(finished, ["head-to-tail", "temperature"], network=network)
    assert set(found["methods"]) == {"head-to-tail", "temperature"}
    assert (finished / f"calibration-{network}.png").is_file()
    assert found["methods"]["temperature"]["after"]["top1"] == found["before"]["top1"]
    judged = ask(finished, network, features=False)
    fitted = Calibrator.from_dict(found["methods"]["temperature"]["calibrator"])
    nll = -torch.log(fitted(judged.test.logits))[torch.arange(len(judged.test_labels)), judged.test_labels].mean()
    assert found["methods"]["temperature"]["after"]["nll"] == pytest.approx(float(nll))


def test_the_calibrator_travels(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    calibrate_run(finished, ["vector"])
    file = tmp_path / "student.onnx"
    code, out, err = told(capsys, ["export", str(finished), "--out", str(file)])
    assert code == 0, err
    assert "with the calibrator vector: krdistill predict --calibrated" in out
    judged = ask(finished, "student", features=False)
    data = prepare(load_config(str(finished / "config.yaml"))).data.test
    names = []
    for i in range(8):
        names.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(data.inputs[i].numpy().squeeze()).save(names[-1])
    answers = {}
    for flags in ([], ["--calibrated"]):
        table = tmp_path / f"answers{len(flags)}.csv"
        code, _, err = told(capsys, ["predict", str(file), *names, "--top", "10", "--out", str(table), *flags])
        assert code == 0, err
        with table.open(newline="") as rows:
            answers[len(flags)] = [
                {row["class" + s]: float(row["probability" + s]) for s in ("", *(f"_{n}" for n in range(2, 11)))}
                for row in csv.DictReader(rows)
            ]
    logits = judged.test.logits[:8]
    fitted = student_calibrator(finished)
    assert fitted is not None
    for number, expected in ((0, logits.softmax(1)), (1, fitted(logits))):
        got = np.array([[row[name] for name in data.class_names] for row in answers[number]])
        assert got == pytest.approx(expected.numpy(), abs=1e-5)
    assert not np.allclose(logits.softmax(1).numpy(), fitted(logits).numpy(), atol=1e-3)


def test_other_formats_take_it_along(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibrate_run(finished, ["temperature"])
    out = tmp_path / "weights"
    code, _, err = told(capsys, ["export", str(finished), "--format", "safetensors", "--out", str(out)])
    assert code == 0, err
    assert Calibrator.load(out / "calibrator.json") == student_calibrator(finished)


def test_it_is_shared_with_the_student(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    from krdistill import HubNetwork, load_network
    from krdistill.sharing import share_run

    calibrate_run(finished, ["vector"])
    fitted = student_calibrator(finished)
    assert fitted is not None
    folder = share_run(finished, tmp_path / "shared")
    assert Calibrator.load(folder / "calibrator.json") == fitted
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "Beside the weights lies a calibrator, vector," in card and "calibrated=True" in card
    rows = prepare(load_config(str(finished / "config.yaml"))).data.test.inputs[:50].permute(0, 3, 1, 2)
    with torch.inference_mode():
        logits = load_network(folder).eval()(rows).logits
        assert torch.equal(HubNetwork.from_pretrained(folder)(rows).logits, logits)
        sure = HubNetwork.from_pretrained(folder, calibrated=True)(rows).logits.softmax(1)
    torch.testing.assert_close(sure, fitted(logits).float(), atol=1e-6, rtol=1e-5)


def test_a_run_without_a_calibrator_shares_none(finished: Path, tmp_path: Path) -> None:
    from krdistill.sharing import share_run

    kept = (finished / "calibration.json").read_text() if (finished / "calibration.json").is_file() else None
    (finished / "calibration.json").unlink(missing_ok=True)
    try:
        folder = share_run(finished, tmp_path / "shared")
    finally:
        if kept is not None:
            (finished / "calibration.json").write_text(kept)
    assert not (folder / "calibrator.json").exists()
    assert "calibrator" not in (folder / "README.md").read_text(encoding="utf-8")


def test_a_file_without_a_calibrator_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    make = onnx.helper
    nodes = [
        make.make_node("Cast", ["pixels"], ["x"], to=onnx.TensorProto.FLOAT),
        make.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=1),
        make.make_node("Reshape", ["mean", "flat"], ["row"]),
        make.make_node("MatMul", ["row", "slope"], ["z"]),
        make.make_node("Softmax", ["z"], ["p"], axis=1),
    ]
    values = {"axes": np.arange(1, 4), "flat": np.array([-1, 1]), "slope": np.array([[0, 1]], np.float32)}
    graph = make.make_graph(
        nodes, "bright", [make.make_tensor_value_info("pixels", onnx.TensorProto.UINT8, ("batch", 3, 4, 4))],
        [make.make_tensor_value_info("p", onnx.TensorProto.FLOAT, ("batch", 2))],
        [onnx.numpy_helper.from_array(v, k) for k, v in values.items()],
    )  # fmt: skip
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=9)
    model.metadata_props.add(key="class_names", value='["dark", "light"]')
    file = tmp_path / "bright.onnx"
    onnx.save(model, str(file))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    code, _, err = told(capsys, ["predict", str(file), str(tmp_path / "a.png"), "--calibrated"])
    assert code == 2 and "holds no calibrator" in err and "krdistill calibrate RUN" in err
    for stored, expected in (
        ({"method": "temperature", "num_classes": 2, "parameters": {}}, "expected a temperature above 0"),
        ({"method": "none", "num_classes": 3, "parameters": {}}, "expected a calibrator of 2 classes, got one of 3"),
    ):
        while len(model.metadata_props) > 1:
            model.metadata_props.pop()
        model.metadata_props.add(key="calibrator", value=json.dumps(stored))
        onnx.save(model, str(file))
        code, _, err = told(capsys, ["predict", str(file), str(tmp_path / "a.png")])
        assert code == 2 and expected in err


def test_without_a_validation_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {k: v for k, v in SMALL["data"].items() if k != "val_fraction"}
    train = {**SMALL["train"], "epochs": 1, "evaluate_every": 1}
    folder = tmp_path / "small"
    run(prepare(load_config({**SMALL, "data": data, "train": train, "baselines": []}, [])), folder, report=False)
    code, _, err = told(capsys, ["calibrate", str(folder), "--method", "temperature"])
    assert code == 2 and "has no validation part" in err and "--data.val_fraction" in err
    assert not (folder / "calibration.json").exists()


def test_mistakes_are_explained(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, expected in (
        ([str(finished), "--method", "temprature"], "Did you mean 'temperature'"),
        ([str(finished), "--method", "all", "--method", "ets"], "leave the others out"),
        ([str(finished), "--method", "ets", "--network", "kd"], "Unknown network 'kd'"),
        ([str(tmp_path), "--method", "ets"], "no run folder"),
    ):
        code, _, err = told(capsys, ["calibrate", *args])
        assert code == 2 and expected in err, err
    with pytest.raises(ConfigError, match="at least one"):
        calibrate_run(finished, [])


def test_damage_and_other_weights_are_noticed(finished: Path) -> None:
    calibrate_run(finished, ["temperature"])
    path = finished / "calibration.json"
    whole = path.read_text()
    try:
        for text, expected in (
            ("{", "is damaged"),
            (json.dumps({"networks": {"student": {}}}), "is damaged"),
            (whole.replace('"temperature": ', '"hot": '), "is damaged"),
            (whole.replace('"weights": "', '"weights": "0'), "fitted to other weights"),
        ):
            path.write_text(text)
            with pytest.raises(RunFolderError, match=expected):
                student_calibrator(finished)
        path.write_text(whole.replace('"weights": "', '"weights": "0'))
        assert list(calibrate_run(finished, ["none"])["methods"]) == ["none"]  # what was there is of another network
    finally:
        path.unlink()


def test_stored_answers_of_a_teacher(tmp_path: Path) -> None:
    from krdistill.data import load_data

    d = SMALL["data"]
    data = load_data("digits", profile="exp", imbalance_factor=20, val_fraction=d["val_fraction"])
    parts = [data.train, data.val, data.test]
    ids = [name for part in parts if part is not None for name in part.ids]
    labels = torch.cat([part.labels for part in parts if part is not None])
    rng = np.random.default_rng(0)
    logits = (3 * rng.normal(size=(len(ids), 10)) + 4 * np.eye(10)[labels]).astype(np.float32)
    for features in (False, True):
        file, folder = tmp_path / f"answers{features}.npz", tmp_path / f"run{features}"
        more = {"features": logits} if features else {}
        np.savez(file, logits=logits, ids=np.array(ids), **more)
        train = {**SMALL["train"], "epochs": 1, "evaluate_every": 1}
        given = {**SMALL, "teacher": {"answers": str(file)}, "train": train, "baselines": []}
        run(prepare(load_config(given, [])), folder, report=False)
        found = calibrate_run(folder, ["temperature"], network="teacher")
        assert found["methods"]["temperature"]["after"]["nll"] < found["before"]["nll"]
        if features:
            made = calibrate_run(folder, ["head-to-tail"], network="teacher")["methods"]["head-to-tail"]
            assert made["calibrator"]["parameters"]["temperature"] > 1
        else:
            with pytest.raises(ModelError, match="hold no features"):
                calibrate_run(folder, ["head-to-tail"], network="teacher")
