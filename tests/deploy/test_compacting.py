"""A file without what no runtime needs: smaller, and its answers are the same bits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from krdistill.deploy import export_onnx, quantising
from krdistill.deploy import onnx as exporting
from krdistill.deploy.compacting import compact
from krdistill.models.network import Network, build_network

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
make = onnx.helper
FLOAT = onnx.TensorProto.FLOAT


def _stored(name: str, values: Any, dtype: type = np.float32) -> Any:
    return onnx.numpy_helper.from_array(np.array(values, dtype), name)


def _model(
    nodes: list[Any], stored: list[Any], *, outputs: dict[str, tuple[Any, ...]] | None = None, **more: Any
) -> Any:
    outputs = outputs or {"y": ("n", 2)}
    graph = make.make_graph(
        nodes, "g", [make.make_tensor_value_info("b", FLOAT, ("n", 2))],
        [make.make_tensor_value_info(name, FLOAT, shape) for name, shape in outputs.items()], stored, **more,
    )  # fmt: skip
    imports = [make.make_opsetid("", 18), make.make_opsetid("com.microsoft", 1)]
    return make.make_model(graph, opset_imports=imports, ir_version=9)


def _answer(model: Any, *names: str) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    answers: list[np.ndarray] = session.run(list(names) or None, {"b": x})
    return answers


def _noted() -> Any:
    """y = clip(b * w + v) * w2 + u, where w2 is w, u is v in another shape, and nobody reads z."""
    nodes = [
        make.make_node("Mul", ["b", "w"], ["long.name.one"], name="first", doc_string="from /a/place.py"),
        make.make_node("Add", ["long.name.one", "v"], ["long.name.two"], name="second"),
        make.make_node("Clip", ["long.name.two", "", "top"], ["long.name.three"], name="third"),
        make.make_node("Mul", ["long.name.three", "w2"], ["long.name.four"], name="fourth"),
        make.make_node("Add", ["long.name.four", "u"], ["y"], name="fifth"),
    ]
    stored = [
        _stored("w", [2, 3]), _stored("v", [1, 1]), _stored("top", 4), _stored("w2", [2, 3]), _stored("u", [[1, 1]]),
        _stored("z", [7, 7]),
    ]  # fmt: skip
    inner = [make.make_tensor_value_info("long.name.one", FLOAT, ("n", 2))]
    model = _model(nodes, stored, value_info=inner, doc_string="made by hand")
    note = model.graph.node[0].metadata_props.add()
    note.key, note.value = "where", "/a/place.py"
    card = model.metadata_props.add()
    card.key, card.value = "class_names", "[]"
    return model


@pytest.mark.parametrize("rename", [False, True])
def test_what_goes_and_what_stays(rename: bool) -> None:
    model = _noted()
    before = _answer(model)[0]
    compact(model, rename=rename)
    onnx.checker.check_model(model)
    assert np.array_equal(_answer(model)[0], before)
    graph = model.graph
    # equal values of one shape are one; [1, 1] and [[1, 1]] are not
    assert sorted(tuple(i.dims) for i in graph.initializer) == [(), (1, 2), (2,), (2,)]
    written = model.SerializeToString()
    assert b"place.py" not in written and b"made by hand" not in written and b"first" not in written
    assert not graph.value_info and [e.domain for e in model.opset_import] == [""]
    assert [(p.key, p.value) for p in model.metadata_props] == [("class_names", "[]")]
    assert [i.name for i in graph.input] == ["b"] and [o.name for o in graph.output] == ["y"]
    names = [n for node in graph.node for n in (*node.input, *node.output)]
    assert graph.node[2].input[1] == "" and ("long.name.two" in names) is not rename
    if rename:
        inner = set(names) - {"", "b", "y"}
        assert len(inner) == 8 and max(map(len, inner)) == 1, "b is the input, and no other tensor's name"
    assert len(written) < len(_noted().SerializeToString())


def test_an_output_that_is_stored_keeps_its_name() -> None:
    stored = [_stored("w", [2, 3]), _stored("y", [2, 3])]
    model = _model([make.make_node("Mul", ["b", "w"], ["x"])], stored, outputs={"x": ("n", 2), "y": (2,)})
    before = _answer(model)
    compact(model, rename=True)
    onnx.checker.check_model(model)
    assert all(np.array_equal(a, b) for a, b in zip(_answer(model), before, strict=True))


def test_names_that_an_inner_graph_may_speak_of_stay() -> None:
    inner = [
        make.make_graph(
            [make.make_node(kind, ["x", "w2"], [f"{kind}.out"])], kind, [],
            [make.make_tensor_value_info(f"{kind}.out", FLOAT, ("n", 2))],
        )
        for kind in ("Add", "Mul")
    ]  # fmt: skip
    nodes = [
        make.make_node("Mul", ["b", "w"], ["x"], name="outer"),
        make.make_node("If", ["yes"], ["y"], then_branch=inner[0], else_branch=inner[1]),
    ]
    model = _model(nodes, [_stored("w", [2, 3]), _stored("w2", [2, 3]), _stored("yes", True, np.bool_)])
    before = _answer(model)[0]
    compact(model, rename=True)
    onnx.checker.check_model(model)
    assert np.array_equal(_answer(model)[0], before) and len(model.graph.initializer) == 3
    assert not model.graph.node[0].name


# Real files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> tuple[Network, torch.Tensor]:
    """The smallest student of the CIFAR family, for 100 classes, with batch statistics of its own."""
    images = torch.randint(0, 256, (64, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = build_network("resnet8", class_names=[f"class {k}" for k in range(100)], images=images, seed=0).train()
    with torch.no_grad():
        made(images.permute(0, 3, 1, 2))
    return made.eval(), images


def test_int8_is_three_times_smaller_and_both_files_answer_as_before(
    network: tuple[Network, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, images = network
    before: list[Path] = []

    def keeping(model: Any, **how: Any) -> None:
        before.append(tmp_path / f"before-{len(before)}.onnx")
        onnx.save(model, str(before[-1]))
        compact(model, **how)

    for module in (exporting, quantising):
        monkeypatch.setattr(module, "compact", keeping)
    plain = export_onnx(student, tmp_path / "plain.onnx", class_counts=range(1, 101))
    after = (plain, quantising.quantise_onnx(plain, tmp_path / "int8.onnx", images[:32]))
    raw = images.permute(0, 3, 1, 2).contiguous().numpy()
    for small, large in zip(after, before, strict=True):
        assert small.stat().st_size < large.stat().st_size
        found = []
        for path in (small, large):
            options = onnxruntime.SessionOptions()
            options.optimized_model_filepath = str(tmp_path / "run.onnx")  # what is run in the end
            options.log_severity_level = 4
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            kernels = Counter(n.op_type for n in onnx.load(str(tmp_path / "run.onnx")).graph.node)
            found.append((session.run(None, {"images": raw})[0], kernels))
        assert np.array_equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert found[0][1]["QLinearConv"] == 9, "convolutions run in integers"
    large, little = (path.stat().st_size for path in after)
    assert large < 1.03 * 4 * student.parameter_count, "next to nothing beside the weights"
    assert large >= 3.4 * little and 4 * student.parameter_count >= 3.4 * little
