from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from krdistill.cli import main
from krdistill.config import load_config
from krdistill.data import DataBundle, ImageData
from krdistill.deploy import DeviceModel, export_network
from krdistill.deploy.exporting import compare_answers, half_precision
from krdistill.deploy.onnx import ExportError
from krdistill.deploy.quantising import calibration_images
from krdistill.errors import ArgumentError
from krdistill.models.network import Network, file_network, load_network
from krdistill.priors import ClassGroups
from krdistill.stages import load_configured_data, measure

onnx = pytest.importorskip("onnx")


def _call(*args: str | Path) -> int:
    try:
        main([str(a) for a in args])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture(scope="module")
def data(finished_run: Path) -> DataBundle:
    return load_configured_data(load_config(str(finished_run / "config.yaml")).data)


@pytest.fixture(scope="module")
def groups(data: DataBundle) -> ClassGroups:
    return measure(data, "thirds")[1]


@pytest.fixture
def student(finished_run: Path) -> Network:
    return load_network(finished_run / "student").eval()


def test_int8_by_the_command(
    finished_run: Path, data: DataBundle, groups: ClassGroups, capsys: pytest.CaptureFixture[str]
) -> None:
    loose = ("--max-drop", "10", "--max-rare-drop", "20")  # the little student of this test is no yardstick
    assert _call("export", finished_run, "--precision", "int8", *loose) == 0
    shown = capsys.readouterr().out
    path = finished_run / "exports" / "student-int8.onnx"
    assert sorted(p.name for p in path.parent.iterdir()) == ["student-int8.onnx", "student-int8.onnx.json"]
    assert path.stat().st_size < 0.5 * (finished_run / "student.onnx").stat().st_size
    report = json.loads(path.with_name("student-int8.onnx.json").read_text(encoding="utf-8"))

    # The report, worked out again from the files alone.
    labels = data.test.labels.numpy()
    answers = {}
    for key, file in (("before", finished_run / "student.onnx"), ("after", path)):
        answers[key] = p = DeviceModel(file)(data.test.images.numpy())
        right = p.argmax(1) == labels
        assert report[key]["top1"] == pytest.approx(right.mean())
        for g, name in enumerate(groups.names):
            classes = [k for k in range(10) if groups.index[k] == g]
            want = np.mean([right[labels == k].mean() for k in classes])
            assert report[key]["groups"][name] == pytest.approx(want)
            assert f"{100 * want:.2f}%" in shown
    assert report["agreement"] == pytest.approx((answers["before"].argmax(1) == answers["after"].argmax(1)).mean())
    assert report["largest_difference"] == pytest.approx(np.abs(answers["before"] - answers["after"]).max(), abs=1e-5)
    assert report["agreement"] > 0.8 and 1e-4 < report["largest_difference"] < 0.5
    tail = report["drop"]["rarest_group"]
    assert tail == groups.names[-1]
    assert report["drop"]["rarest"] == pytest.approx(
        100 * (report["before"]["groups"][tail] - report["after"]["groups"][tail])
    )
    assert report["calibration_images"] == min(512, len(data.train))

    model = onnx.load(str(path))
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    makers = {n.output[0]: n for n in model.graph.node}
    layers = [n for n in model.graph.node if n.op_type in ("Conv", "Gemm")]
    assert len(layers) == 10  # eight, and two shortcuts
    for node in layers:
        coded = makers[node.input[1]]
        weights, steps, zeros = (stored[name] for name in coded.input)
        assert coded.op_type == "DequantizeLinear" and weights.dtype == np.int8 and not zeros.any()
        assert steps.size == (weights.shape[0] if node.op_type == "Conv" else max(steps.size, 1))
        assert np.abs(weights.astype(int)).max() <= 64
    assert DeviceModel(path).class_counts == DeviceModel(finished_run / "student.onnx").class_counts


@pytest.mark.parametrize(
    ("form", "precision", "close"),
    [
        ("onnx", "float16", 2e-2), ("pt2", "float32", 1e-6), ("pt2", "float16", 2e-2), ("safetensors", "float32", 0),
        ("safetensors", "float16", 2e-2),
    ],
)  # fmt: skip
def test_other_formats_and_precisions_answer_as_pytorch_does(
    form: str, precision: str, close: float, student: Network, data: DataBundle, groups: ClassGroups, tmp_path: Path
) -> None:
    before = {k: v.clone() for k, v in student.state_dict().items()}
    out = tmp_path / {"onnx": "s.onnx", "pt2": "s.pt2", "safetensors": "s"}[form]
    report = export_network(
        student, out, test=data.test, groups=groups, form=form, precision=precision,
        class_counts=data.train.counts().tolist(), max_drop=2, max_rare_drop=2,
    )  # fmt: skip
    assert report["largest_difference"] <= close and report["agreement"] > 0.98
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([out.name, f"{out.name}.json"])
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items()), "the student was changed"
    files = sorted(out.iterdir()) if out.is_dir() else [out]
    assert report["bytes"] == sum(f.stat().st_size for f in files)
    if form == "pt2":
        program = torch.export.load(out)
        weights = {v.dtype for v in program.state_dict.values() if (v.ndim == 4 and v.shape[1] > 1) or v.ndim == 2}
        assert weights == {torch.float16 if precision == "float16" else torch.float32}
        for n in (1, 5):
            raw = data.test.images[:n].permute(0, 3, 1, 2).contiguous()
            p = program.module()(raw)
            assert p.shape == (n, 10) and p.dtype == torch.float32
        if precision == "float32":  # and it can be a teacher
            again = file_network(out, class_names=data.train.class_names, images=data.train.images)
            with torch.no_grad():
                got = again.eval()(raw).logits.softmax(1)
            torch.testing.assert_close(got, p, atol=1e-5, rtol=0)
            assert again.class_names == student.class_names
    if form == "safetensors":
        again = load_network(out)
        assert again.class_names == student.class_names
        for name, value in again.backbone.state_dict().items():
            want = student.backbone.state_dict()[name]
            want = want.half().to(want.dtype) if precision == "float16" and want.is_floating_point() else want
            assert torch.equal(value, want), name


def test_half_precision_normalises_in_single(student: Network, data: DataBundle) -> None:
    half = half_precision(student)
    assert half.mean.dtype == torch.float32 and next(half.backbone.parameters()).dtype == torch.float16
    assert next(student.backbone.parameters()).dtype == torch.float32
    raw = data.test.images[:4].permute(0, 3, 1, 2)
    assert torch.equal(half.normalise(raw), student.normalise(raw).half())


def test_a_file_names_no_place_of_this_machine(finished_run: Path) -> None:
    content = (finished_run / "student.onnx").read_bytes()
    assert not re.findall(rb"[\w/.-]+\.py", content)


def test_a_file_that_loses_too_much_is_not_written(
    student: Network, data: DataBundle, groups: ClassGroups, tmp_path: Path
) -> None:
    with torch.no_grad():  # the same for every class, so that the softmax forgets it; float16 rounds the rest away
        student.backbone.get_parameter("head.weight").add_(500)
    out = tmp_path / "s"
    how = {"test": data.test, "groups": groups, "form": "safetensors", "precision": "float16"}
    with pytest.raises(ExportError, match=r"loses .* points of accuracy on all test images .*--max-drop") as caught:
        export_network(student, out, **how)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    report = caught.value.report
    assert report is not None and report["drop"]["all"] > 0.5
    suggested = float(str(caught.value).split("--max-drop ")[1].rstrip("."))
    export_network(student, out, **how, max_drop=suggested, max_rare_drop=100)  # type: ignore[arg-type]
    assert out.is_dir()


def test_numbers_too_large_for_a_precision_are_said_so(
    student: Network, data: DataBundle, groups: ClassGroups, tmp_path: Path
) -> None:
    with torch.no_grad():
        student.backbone.get_parameter("head.bias").add_(1e6)
    with pytest.raises(ExportError, match="500 of 500 answers are not finite"):
        export_network(
            student, tmp_path / "s", test=data.test, groups=groups, form="safetensors", precision="float16"
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_what_does_not_go_together_is_refused(
    student: Network, data: DataBundle, groups: ClassGroups, tmp_path: Path
) -> None:
    for options, said in (
        ({"form": "tflite"}, "tflite"),
        ({"precision": "int4"}, "int4"),
        ({"form": "pt2", "precision": "int8"}, "ONNX Runtime"),
        ({"precision": "int8"}, "calibration images"),
        ({"class_counts": [1, 2]}, "10 class counts"),
    ):
        with pytest.raises(ArgumentError, match=said):
            export_network(student, tmp_path / "s.onnx", test=data.test, groups=groups, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--format", "pt2", "--precision", "int8"), "leave --format onnx"),
        (("--calibration", "natural"), "--precision int8"),
        (("--out", "student.bin"), "*.onnx"),
        (("--format", "safetensors", "--out", "{run}/config.yaml"), "writes a folder"),
        (("--max-drop", "-1"), "--max-drop"),
    ],
)
def test_mistakes_on_the_command_line(
    finished_run: Path, args: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _call("export", finished_run, *(a.format(run=finished_run) for a in args)) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_folders_that_cannot_be_exported(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _call("export", tmp_path) == 2
    assert "No trained student" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(finished_run, other)
    split = json.loads((other / "split.json").read_text(encoding="utf-8"))
    (other / "split.json").write_text(json.dumps({**split, "checksum": "0" * 64}), encoding="utf-8")
    assert _call("export", other, "--format", "safetensors") == 2
    assert "changed since it was run" in capsys.readouterr().err
    assert not (other / "exports" / "student-safetensors").exists()


# Calibration and comparison -------------------------------------------------------------------------------------------


def _numbered(labels: list[int]) -> ImageData:
    """Images whose pixel is their row number."""
    rows = torch.arange(len(labels), dtype=torch.uint8).reshape(-1, 1, 1, 1)
    names = tuple(f"c{k}" for k in range(max(labels) + 1))
    return ImageData(rows, torch.tensor(labels), names, tuple(map(str, range(len(labels)))), "numbered")


def test_balanced_calibration_takes_equally_many_of_every_class() -> None:
    labels = [0] * 60 + [1] * 20 + [2] * 3
    state = torch.random.get_rng_state()
    for count, want in ((9, [3, 3, 3]), (20, None), (43, [20, 20, 3]), (83, [60, 20, 3]), (999, [60, 20, 3])):
        rows = calibration_images(_numbered(labels), count=count).flatten().tolist()
        assert len(set(rows)) == len(rows) == min(count, 83)
        got = np.bincount([labels[r] for r in rows], minlength=3).tolist()
        assert got == want if want else (got[2] == 3 and abs(got[0] - got[1]) <= 1)
    natural = calibration_images(_numbered(labels), kind="natural", count=40).flatten().tolist()
    assert np.bincount([labels[r] for r in natural], minlength=3)[0] > 20
    assert natural == calibration_images(_numbered(labels), kind="natural", count=40).flatten().tolist()
    assert natural != calibration_images(_numbered(labels), kind="natural", count=40, seed=1).flatten().tolist()
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(ArgumentError, match="'head'"):
        calibration_images(_numbered(labels), kind="head")


def test_comparison_worked_out_by_hand() -> None:
    test = _numbered([0, 0, 1, 2])
    groups = ClassGroups(("many", "few"), torch.tensor([0, 1, 1]), "by hand")
    right = np.array([[0.8, 0.1, 0.1], [0.6, 0.2, 0.2], [0.1, 0.7, 0.2], [0.1, 0.1, 0.8]], np.float32)
    worse = right.copy()
    worse[2] = [0.5, 0.3, 0.2]
    found = compare_answers(
        lambda images: right[images.flatten()], lambda images: worse[images.flatten()], test=test, groups=groups
    )
    assert found["images"] == 4 and found["agreement"] == 0.75
    assert found["largest_difference"] == pytest.approx(0.4)
    assert found["before"]["groups"] == {"many": 1.0, "few": 1.0}
    assert found["after"]["groups"] == {"many": 1.0, "few": 0.5}
    assert found["after"]["nll"] == pytest.approx(-np.log([0.8, 0.6, 0.3, 0.8]).mean(), abs=1e-6)
    assert found["drop"] == {"all": 25.0, "rarest": 50.0, "rarest_group": "few"}
