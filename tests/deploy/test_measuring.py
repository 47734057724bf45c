from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from krdistill.cli import main
from krdistill.deploy.measuring import count_graph, measure_file
from krdistill.deploy.quantising import quantise_onnx
from krdistill.errors import ModelError
from krdistill.models.network import load_network

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
FLOAT = onnx.TensorProto.FLOAT


def _file(path: Path, nodes: list[Any], weights: dict[str, tuple[int, ...]], shape: tuple[Any, ...]) -> Path:
    make = onnx.helper
    stored = [onnx.numpy_helper.from_array(np.ones(s, np.float32), name) for name, s in weights.items()]
    graph = make.make_graph(
        nodes, "g", [make.make_tensor_value_info("x", FLOAT, shape)], [make.make_empty_tensor_value_info("y")], stored
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(path))
    return path


def _node(kind: str, *names: str, **attributes: Any) -> Any:
    return onnx.helper.make_node(kind, names[:-1], names[-1:], **attributes)


def test_multiply_accumulates_by_hand(tmp_path: Path) -> None:
    nodes = [
        _node("Conv", "x", "w1", "b1", "a", pads=[1, 1, 1, 1]),  # 8x8 outputs x 4 channels x (3 x 3x3)
        _node("Conv", "a", "w2", "c", group=4, strides=[2, 2], pads=[1, 1, 1, 1]),  # 4x4 x 4 x (1 x 3x3)
        _node("ConvTranspose", "c", "w3", "d", strides=[2, 2]),  # 4x4 inputs x 4 channels x (5 x 2x2)
        _node("GlobalAveragePool", "d", "e"),
        _node("Flatten", "e", "f"),
        _node("Gemm", "f", "w4", "b4", "h", transB=1),  # 6 x 5
        _node("MatMul", "h", "w5", "y"),  # 6 x 7
    ]
    shapes = {
        "w1": (4, 3, 3, 3),
        "b1": (4,),
        "w2": (4, 1, 3, 3),
        "w3": (4, 5, 2, 2),
        "w4": (6, 5),
        "b4": (6,),
        "w5": (6, 7),
    }
    path = _file(tmp_path / "a.onnx", nodes, shapes, ("batch", 3, 8, 8))
    assert count_graph(path) == {
        "macs": 64 * 4 * 27 + 16 * 4 * 9 + 16 * 4 * 20 + 30 + 42,
        "parameters": 108 + 4 + 36 + 80 + 30 + 6 + 42,
    }


def test_shapes_that_stay_open_are_said_so(tmp_path: Path) -> None:
    path = _file(tmp_path / "a.onnx", [_node("Conv", "x", "w", "y")], {"w": (4, 3, 3, 3)}, ("batch", 3, "h", "w"))
    assert count_graph(path) == {"macs": None, "parameters": 108}
    with pytest.raises(ModelError, match="known size"):
        measure_file(path)


def test_counts_of_a_student_are_pytorchs_and_int8_changes_neither(finished_run: Path, tmp_path: Path) -> None:
    network = load_network(finished_run / "student").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    found = count_graph(finished_run / "student.onnx")
    assert found["macs"] == counter.get_total_flops() // 2
    noted = json.loads((finished_run / "export.json").read_text(encoding="utf-8"))
    assert found == {k: noted[k] for k in found} and "M multiply-accumulates" in noted["sentence"]
    # A normalisation layer's four numbers per channel become one bias; 3 more normalise the image.
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert found["parameters"] == network.parameter_count - sum(m.num_features for m in norms) + 3
    images = torch.randint(0, 256, (8, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    quantised = quantise_onnx(finished_run / "student.onnx", tmp_path / "q.onnx", images)
    assert count_graph(quantised) == found


def test_memory_and_time_grow_with_the_weights(tmp_path: Path) -> None:
    runs = []
    for width in (16, 2048):
        nodes = [_node("Flatten", "x", "f"), _node("MatMul", "f", "w1", "a"), _node("MatMul", "a", "w2", "y")]
        weights: dict[str, tuple[int, ...]] = {"w1": (192, width), "w2": (width, 4096)}
        path = _file(tmp_path / f"{width}.onnx", nodes, weights, ("batch", 3, 8, 8))
        found = measure_file(path, threads=(1,), batches=(2,), seconds=0.05)
        assert found["bytes"] == path.stat().st_size and found["macs"] == width * (192 + 4096)
        (run,) = found["runs"]
        assert (run["threads"], run["batch"]) == (1, 2) and run["repeats"] >= 30
        assert 0 < run["median_ms"] <= run["p95_ms"]
        assert run["images_per_second"] == pytest.approx(2000 / run["median_ms"])
        runs.append(run)
    assert runs[1]["median_ms"] > 2 * runs[0]["median_ms"]
    more = 4 * (2048 - 16) * (192 + 4096)  # bytes of weights
    assert 0.9 * more < runs[1]["peak_bytes"] - runs[0]["peak_bytes"] < 6 * more


def test_command_without_torch(brightness_file: Callable[..., Path]) -> None:
    code = (
        "import sys\nsys.modules['torch'] = None\nfrom krdistill.cli import main\nmain(sys.argv[1:])\n"
        "assert not {'scipy', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, "bench-device", str(brightness_file()), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(r["threads"], r["batch"]) for r in found["runs"]] == [(1, 1), (1, 32), (2, 1), (2, 32)]
    assert found["macs"] == 2 and found["parameters"] == 2


def test_a_fixed_batch_is_measured_as_it_is_and_printed(
    brightness_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = brightness_file("fixed.onnx", shape=(4, 3, 4, 4))
    found = measure_file(path, threads=(1,), seconds=0.01)
    assert [r["batch"] for r in found["runs"]] == [4]
    assert [r["images_per_second"] for r in found["runs"]] == [pytest.approx(4000 / found["runs"][0]["median_ms"])]


def test_files_that_cannot_be_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    for path, said in ((tmp_path / "gone.onnx", "not there"), (tmp_path / "text.onnx", "cannot be opened")):
        with pytest.raises(SystemExit, match="2"):
            main(["bench-device", str(path)])
        assert said in capsys.readouterr().err
    with pytest.raises(ModelError, match="cannot be read"):
        count_graph(tmp_path / "text.onnx")
