"""A small finished run on real digits, and a hand-made file whose answers can be worked out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from krdistill.config import load_config
from krdistill.pipeline import prepare, run

SMALL: dict[str, Any] = {
    "name": "small",
    "data": {"source": "digits", "profile": "exp", "imbalance_factor": 20, "groups": "thirds"},
    "teacher": {"model": "resnet8"},
    "student": {"model": "resnet8"},
    "train": {"epochs": 1, "batch_size": 64, "augmentation": "crop-only", "evaluate_every": 1},
    "recipe": "kd-balanced",
    "baselines": [],
    "export": {"onnx": True},
}


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("runs") / "small"
    run(prepare(load_config(SMALL, [("student.train.epochs", "8")])), folder, report=False)
    return folder


@pytest.fixture
def brightness_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file of two classes by default: logits are 0 and the mean of the pixels in [0, 1]."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")

    def write(
        name: str = "bright.onnx",
        *,
        shape: tuple[Any, ...] = ("batch", 3, 4, 4),
        dtype: int = onnx.TensorProto.UINT8,
        slope: tuple[float, ...] = (0.0, 1.0),
        metadata: dict[str, Any] | None = None,
        more_inputs: int = 0,
    ) -> Path:
        make = onnx.helper
        K = len(slope)
        weights = onnx.numpy_helper.from_array(np.array([slope], np.float32) / 255, "slope")
        axes = onnx.numpy_helper.from_array(np.arange(1, len(shape)), "axes")
        flat = onnx.numpy_helper.from_array(np.array([-1, 1]), "flat")
        graph = make.make_graph(
            [
                make.make_node("Cast", ["pixels"], ["x"], to=onnx.TensorProto.FLOAT),
                make.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=1),
                make.make_node("Reshape", ["mean", "flat"], ["row"]),
                make.make_node("MatMul", ["row", "slope"], ["z"]),
                make.make_node("Softmax", ["z"], ["p"], axis=1),
            ],
            "bright",
            [
                make.make_tensor_value_info("pixels", dtype, shape),
                *(make.make_tensor_value_info(f"more{i}", dtype, shape) for i in range(more_inputs)),
            ],
            [make.make_tensor_value_info("p", onnx.TensorProto.FLOAT, ("batch", K))],
            [weights, axes, flat],
        )
        model = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=9)
        for key, value in ({"class_names": ["dark", "light"]} if metadata is None else metadata).items():
            entry = model.metadata_props.add()
            entry.key, entry.value = key, json.dumps(value)
        onnx.checker.check_model(model)
        onnx.save(model, str(tmp_path / name))
        return tmp_path / name

    return write
