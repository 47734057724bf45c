"""8-bit integers: an ONNX file quantised after training; for images, calibrated on some of every class."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.containers import Examples
from ..errors import ArgumentError, MissingDependencyError
from ..rng import generator
from .compacting import compact

CALIBRATION_IMAGES = 512
_BATCH = 32
# What 8-bit kernels exist for. The normalisation before the first convolution and the softmax stay in float32.
_OPERATORS = (
    "Add", "AveragePool", "Clip", "Concat", "Conv", "Flatten", "Gemm", "GlobalAveragePool", "MatMul", "MaxPool", "Relu",
    "Reshape", "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip


def calibration_images(
    data: Examples, *, kind: str = "balanced", count: int = CALIBRATION_IMAGES, seed: int = 0
) -> Tensor:
    """Training images from which activation ranges are measured.

    Args:
        data: the training images.
        kind: ``balanced`` takes equally many of every class, as far as it has them, so that the ranges of the rare
            classes' activations are seen too; ``natural`` draws from all images alike.
        count: how many, at most.
        seed: of the draw.

    Returns:
        uint8, shape ``(min(count, N), H, W, C)``.

    Raises:
        ArgumentError: another ``kind``.
    """
    if kind not in ("balanced", "natural"):
        raise ArgumentError(f"Expected a calibration set that is 'balanced' or 'natural', got {kind!r}.")
    order = torch.randperm(len(data), generator=generator(seed, "calibration"))
    if kind == "balanced":
        labels = data.labels[order]
        by_class = labels.argsort(stable=True)
        counts = torch.bincount(labels, minlength=data.num_classes)
        first = counts.cumsum(0) - counts
        turn = torch.empty_like(by_class)  # the how manieth of its class an image is
        turn[by_class] = torch.arange(len(data)) - first[labels[by_class]]
        order = order[turn.argsort(stable=True)]
    return data.subset(order[:count].sort().values).inputs


def quantise_onnx(source: Path, target: Path, images: Tensor) -> Path:
    """Writes an ONNX file for images that computes with 8-bit integers: ONNX Runtime's static quantisation, QDQ format.

    Weights are int8, symmetric, one scale per output channel, in 7 bits, so that sums of products do not saturate on
    processors without VNNI; activations are uint8, over the range that they have on the calibration images.

    Args:
        source: a file that :func:`~krdistill.deploy.export_onnx` wrote.
        target: the file to write; its metadata are those of ``source``.
        images: calibration images, uint8 ``(N, H, W, C)``.

    Raises:
        MissingDependencyError: the ``onnx`` extra is not installed.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference", 2018, arXiv 1712.05877.
    """
    try:
        import onnx
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise MissingDependencyError(
            f"Quantisation needs the package {error.name}: pip install 'krdistill[onnx]'."
        ) from None

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._parts = iter(images.split(_BATCH))

        def get_next(self) -> dict[str, Any] | None:
            part = next(self._parts, None)
            return None if part is None else {"images": np.ascontiguousarray(part.permute(0, 3, 1, 2).numpy())}

    with tempfile.TemporaryDirectory() as place, _quiet():
        prepared = Path(place) / "prepared.onnx"
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared), str(target), Reader(), quant_format=QuantFormat.QDQ, op_types_to_quantize=list(_OPERATORS),
            per_channel=True, reduce_range=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            extra_options={"WeightSymmetric": True},
        )  # fmt: skip
    model = onnx.load(str(target))
    _finish(model, source, target)
    return target


def quantise_dynamically(source: Path, target: Path) -> Path:
    r"""Writes an ONNX file for sentences or rows whose weights are 8-bit integers; nothing has to be calibrated.

    Matrix products are those of ONNX Runtime's dynamic quantisation: int8 weights, symmetric, one scale per column, in
    7 bits as in :func:`quantise_onnx`; activations become uint8 as they come, over their range in the batch, so that
    the last digits of an answer depend on what else is asked at the same time. Tables of vectors (of n-grams, of words)
    are uint8 with one scale and zero point, and the rows that are looked up are floats again. Convolutions keep int8
    weights, one scale per channel, and compute in floats,

    .. math:: w \approx s_c\, q, \qquad s_c = \max |w_c| / 127,\quad q = \operatorname{round}(w / s_c),

    because ONNX Runtime's integer convolution over words takes several times as long.

    Args:
        source: a file that :func:`~krdistill.deploy.export_onnx` wrote.
        target: the file to write; its metadata are those of ``source``.

    Raises:
        MissingDependencyError: the ``onnx`` extra is not installed.

    Source: as :func:`quantise_onnx`; the ranges as they come: "Dynamic quantization", documentation of ONNX Runtime.
    """
    try:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise MissingDependencyError(
            f"Quantisation needs the package {error.name}: pip install 'krdistill[onnx]'."
        ) from None
    with tempfile.TemporaryDirectory() as place, _quiet():
        tables = Path(place) / "tables.onnx"
        # What is looked up is summed in floats, so a table may have all 8 bits.
        quantize_dynamic(source, tables, op_types_to_quantize=["Gather"])
        quantize_dynamic(
            tables, target, op_types_to_quantize=["MatMul"], per_channel=True, reduce_range=True,
            weight_type=QuantType.QInt8,
        )  # fmt: skip
    model = onnx.load(str(target))
    _store_kernels(model)
    _finish(model, source, target)
    return target


def _store_kernels(model: Any) -> None:
    """Kernels of convolutions as int8, one scale per output channel, to be read as floats."""
    from onnx import helper, numpy_helper

    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    kernels = dict.fromkeys(n.input[1] for n in graph.node if n.op_type == "Conv" and n.input[1] in stored)
    for name in kernels:
        weight = numpy_helper.to_array(stored[name])
        largest = np.abs(weight).reshape(len(weight), -1).max(1)
        scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
        coded = np.rint(weight / scale.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.int8)
        graph.initializer.remove(stored[name])
        names = [f"{name}_quantized", f"{name}_scale"]
        graph.initializer.extend((numpy_helper.from_array(coded, names[0]), numpy_helper.from_array(scale, names[1])))
        graph.node.insert(0, helper.make_node("DequantizeLinear", names, [name], axis=0))


def _finish(model: Any, source: Path, target: Path) -> None:
    """Writes a quantised model with the metadata of the file that it was made from, and nothing superfluous."""
    import onnx

    del model.metadata_props[:]
    model.metadata_props.extend(onnx.load(str(source)).metadata_props)
    compact(model, rename=True)
    onnx.checker.check_model(model)
    onnx.save(model, str(target))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser logs to the root logger."""
    before = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(before)
