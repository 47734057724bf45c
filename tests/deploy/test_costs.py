"""What a run's networks cost, side by side: real files, really measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from command_line import told
from krdistill.costing import measure_run
from krdistill.deploy.costs import measure_networks
from krdistill.errors import ArgumentError, RunFolderError
from krdistill.files import read_json
from krdistill.models.network import build_network
from krdistill.reporting import write_report

pytestmark = pytest.mark.xdist_group("deploy")


def test_teacher_and_student_in_two_precisions(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    code, out, err = told(capsys, ["bench-device", str(run), "--save"])
    assert code == 0, err
    found = read_json(run / "device.json")
    assert [(f["network"], f["precision"]) for f in found["files"]] == [
        ("teacher", "float32"), ("teacher", "int8"), ("student", "float32"), ("student", "int8"),
    ]  # fmt: skip
    assert found["left_out"] == {}
    teacher, small, student, least = found["files"]
    assert teacher["bytes"] > small["bytes"] and student["bytes"] > least["bytes"]
    assert teacher["macs"] == small["macs"] and student["macs"] == least["macs"]
    metrics = read_json(run / "metrics.json")
    assert (teacher["macs"], student["macs"]) == (metrics["teacher"]["macs"], metrics["student"]["macs"])
    for file in found["files"]:
        assert [(r["threads"], r["batch"]) for r in file["runs"]] == [(1, 1), (1, 32), (2, 1), (2, 32)]
        assert f"{file['network']}, {file['precision']}" in out
    report = write_report(run).read_text(encoding="utf-8")
    for name in ("teacher.onnx", "teacher-int8.onnx", "student-int8.onnx"):
        assert f">{name}<" in report
    assert not list(run.rglob("teacher*.onnx"))  # they were written to be measured
    (run / "device.json").write_text('{"files": 3}', encoding="utf-8")
    with pytest.raises(RunFolderError, match="Measure it again"):
        write_report(run)


def test_a_network_that_no_file_can_hold_is_left_out(finished_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(run / "teacher")
    rows = build_network("mlp_8", class_names=("a", "b"), images=torch.randn(20, 5))
    rows.takes_texts = True
    found = measure_networks({"rows": rows}, seconds=0.01)
    assert found["files"] == [] and "no graph of operations" in found["left_out"]["rows"]
    found = measure_run(run, seconds=0.01)
    assert {f["network"] for f in found["files"]} == {"student"} and "no network of its teacher" in str(found)


def test_networks_of_rows_need_no_calibration() -> None:
    network = build_network("mlp_8", class_names=("a", "b"), images=torch.randn(20, 5))
    found = measure_networks({"mlp": network}, threads=(1,), batches=(3,), seconds=0.01)
    assert [f["precision"] for f in found["files"]] == ["float32", "int8"] and not found["left_out"]
    assert [r["batch"] for f in found["files"] for r in f["runs"]] == [3, 3]


def test_mistakes(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = build_network("resnet8w8", class_names=("a", "b"), images=torch.zeros(4, 8, 8, 3, dtype=torch.uint8))
    with pytest.raises(ArgumentError, match="expected images to measure int8"):
        measure_networks({"net": images})
    with pytest.raises(ArgumentError, match="float32, int8, got int4"):
        measure_networks({"net": images}, precisions=("int4",))
    code, _, err = told(capsys, ["bench-device", str(tmp_path)])
    assert code == 2 and "expected an .onnx file or the folder of a finished run" in err
    run = shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(run / "student")
    code, _, err = told(capsys, ["bench-device", str(run), "--json"])
    assert code == 2 and "No trained student" in err


def test_as_json(finished_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import krdistill.costing as costing

    real = costing.measure_run
    monkeypatch.setattr(costing, "measure_run", lambda run, **given: real(run, seconds=0.01, **given))
    code, out, err = told(capsys, ["bench-device", str(finished_run), "--json"])
    assert code == 0, err
    assert len(json.loads(out)["files"]) == 4 and not (finished_run / "device.json").exists()
