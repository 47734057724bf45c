"""What an ONNX file costs where it runs: size, multiply-accumulates, memory, time. Nothing here imports torch."""

from __future__ import annotations

import json
import math
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import KrdistillError, MissingDependencyError, ModelError
from .runtime import open_session

_DTYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(float16)": np.float16}
_SENTENCE = 64  # bytes; those of Banking77 have 59 in the mean
_WARM_UP, _LEAST, _MOST = 5, 30, 2000


def measure_file(
    path: Path, *, threads: Sequence[int] = (1, 2), batches: Sequence[int] = (1, 32), seconds: float = 1.0
) -> dict[str, Any]:
    """Measures an ONNX file with one input of images, rows of numbers or sentences on this machine's CPU.

    Every combination of threads and batch runs in a process of its own, on random images; rows; or sentences of 64
    letters.

    Args:
        path: the file.
        threads: of ONNX Runtime within an operator.
        batches: images at a time; a file with a fixed batch is measured at that alone.
        seconds: how long each is repeated, at least 30 times.

    Returns:
        ``file``, ``bytes``, ``parameters`` and ``macs`` (see :func:`count_graph`), ``processor``, and ``runs``, a
        list of ``threads``, ``batch``, ``repeats``, ``median_ms`` and ``p95_ms`` of a whole batch,
        ``images_per_second`` (at the median) and ``peak_bytes``: what the process needed at most beyond ONNX Runtime
        itself.

    Raises:
        ModelError: no such file, a damaged one, or one that takes something else.
        MissingDependencyError: the ``onnx`` extra is not installed.
        KrdistillError: a measuring process died.
    """
    fixed = _shape(open_session(path), path)[0]
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        **count_graph(path),
        "processor": processor_name(),
        "runs": [_elsewhere(path, t, b, seconds) for t in threads for b in ([fixed] if fixed else batches)],
    }


def processor_name() -> str:
    """The processor, by the name it gives itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:  # another system than Linux
        pass
    return platform.processor() or platform.machine()


def count_graph(path: Path) -> dict[str, int | None]:
    """Counts what is stored and what is computed, from the graph.

    Returns:
        ``parameters``: numbers stored in the file as weights, biases and constants of floating point, or as the
        integers that stand for them; scales and zero points of quantisation are not counted. Normalisation layers that
        were folded into convolutions are gone. ``macs``: multiply-accumulates of all convolutions and matrix products
        for one image; None where shape inference leaves one of them open.

    Raises:
        ModelError: a damaged file.
        MissingDependencyError: the ``onnx`` extra is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise MissingDependencyError(
            "Counting in an ONNX file needs the package onnx: pip install 'krdistill[onnx]'."
        ) from None
    try:
        model = onnx.load(str(path))
        graph = model.graph
        stored = {i.name for i in graph.initializer}
        for value in graph.input:
            dims = value.type.tensor_type.shape.dim
            if value.name not in stored and dims:
                dims[0].dim_value = 1
        del graph.value_info[:]  # shapes that hold for the symbolic batch
        for value in graph.output:
            value.type.tensor_type.ClearField("shape")
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception as error:  # protobuf's and onnx's own
        raise ModelError(f"{path} cannot be read as an ONNX file ({str(error).splitlines()[0][:200]}).") from None
    shapes: dict[str, tuple[int, ...]] = {i.name: tuple(i.dims) for i in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            shapes.setdefault(value.name, tuple(d.dim_value for d in dims))
    macs: int | None = 0
    for node in graph.node:
        own = _macs(node, shapes)
        macs = None if macs is None or own is None else macs + own
    return {"parameters": _parameters(graph), "macs": macs}


def _macs(node: Any, shapes: dict[str, tuple[int, ...]]) -> int | None:
    """Multiply-accumulates of one node; None where its shapes are not known."""
    attributes = {a.name: a for a in node.attribute}
    data, weight = {"QLinearConv": (0, 3), "QLinearMatMul": (0, 3)}.get(node.op_type, (0, 1))
    if node.op_type not in ("Conv", "ConvInteger", "ConvTranspose", "QLinearConv", "Gemm", "MatMul", "MatMulInteger",
                            "QLinearMatMul"):  # fmt: skip
        return 0
    x, w, y = (shapes.get(name) for name in (node.input[data], node.input[weight], node.output[0]))
    if x is None or w is None or y is None:
        return None
    if node.op_type == "ConvTranspose":  # every input value meets the kernel of every output channel of its group
        return math.prod(x) * math.prod(w[1:])
    if "Conv" in node.op_type:  # every output value is a sum over the kernel
        return math.prod(y) * math.prod(w[1:])
    if node.op_type == "Gemm":
        across = attributes["transA"].i if "transA" in attributes else 0
        return math.prod(y) * x[0 if across else 1]
    return math.prod(y) * x[-1]


def _parameters(graph: Any) -> int:
    import onnx

    kinds = onnx.TensorProto
    ranges = {n.output[1] for n in graph.node if n.op_type == "DynamicQuantizeLinear"}
    steps = set()
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            steps.update(node.input[1:])
        elif node.op_type in ("MatMulInteger", "ConvInteger"):
            steps.update(node.input[2:])
        elif node.op_type == "Mul" and ranges & set(node.input):  # scale of the activations by that of the weights
            steps.update(node.input)
    coded = {n.input[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    numbers = {kinds.FLOAT, kinds.FLOAT16, kinds.DOUBLE, kinds.BFLOAT16, kinds.INT8, kinds.UINT8}
    return sum(
        math.prod(i.dims)
        for i in graph.initializer
        if i.name not in steps and (i.data_type in numbers or i.name in coded)
    )


def _shape(session: Any, path: Path) -> list[Any]:
    """Shape of what a file takes; the batch is None where it is free, and sentences have a usual length."""
    inputs = session.get_inputs()
    sizes = inputs[0].shape[1:] if len(inputs) == 1 and inputs[0].type in _DTYPES else []
    if inputs and inputs[0].type == "tensor(uint8)" and len(sizes) == 1 and not isinstance(sizes[0], int):
        sizes = [_SENTENCE]
    if len(sizes) not in (1, 3) or not all(isinstance(n, int) for n in sizes):
        found = ", ".join(f"{i.name}: {i.type} {i.shape}" for i in inputs)
        raise ModelError(
            f"{path} takes {found}; expected one input of images (batch, C, H, W) of a known size, of rows (batch, D), "
            "or of sentences (batch, length)."
        )
    batch = inputs[0].shape[0]
    return [batch if isinstance(batch, int) else None, *sizes]


def _elsewhere(path: Path, threads: int, batch: int, seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "krdistill.deploy.measuring", str(path), str(threads), str(batch), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise KrdistillError(f"Measuring {path} at batch {batch} failed (status {done.returncode}): {last}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _measure(path: Path, threads: int, batch: int, seconds: float) -> dict[str, Any]:
    import onnxruntime  # noqa: F401  # what it takes itself is not the file's

    before, _ = _memory()
    session = open_session(path, threads=threads)
    given = session.get_inputs()[0]
    noise = np.random.default_rng(0).integers(0, 256, (batch, *_shape(session, path)[1:]), dtype=np.uint8)
    if noise.ndim == 2 and given.type == "tensor(uint8)":
        noise = np.where(noise % 6, ord("a") + noise % 26, ord(" ")).astype(np.uint8)  # words of some five letters
    feed = {given.name: noise if given.type == "tensor(uint8)" else (noise / 255).astype(_DTYPES[given.type])}
    for _ in range(_WARM_UP):
        session.run(None, feed)
    times: list[float] = []
    while len(times) < _LEAST or (sum(times) < seconds and len(times) < _MOST):
        started = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - started)
    median = float(np.median(times))
    return {
        "threads": threads,
        "batch": batch,
        "repeats": len(times),
        "median_ms": 1000 * median,
        "p95_ms": 1000 * float(np.percentile(times, 95)),
        "images_per_second": batch / median,
        "peak_bytes": max(0, _memory()[1] - before),
    }


def _memory() -> tuple[int, int]:
    """Resident memory of this process, now and at most, in bytes."""
    try:
        # Of this process alone: what getrusage gives under Linux begins with the parent's.
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmRSS:", "VmHWM:"))}
        return 1024 * kib["VmRSS"], 1024 * kib["VmHWM"]
    except (OSError, KeyError):  # macOS knows the most only, in bytes
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most, most


if __name__ == "__main__":
    file, *numbers = sys.argv[1:]
    print(json.dumps(_measure(Path(file), int(numbers[0]), int(numbers[1]), float(numbers[2]))))
