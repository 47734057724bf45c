"""ONNX export with the normalisation inside the graph, verified against PyTorch."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import KrdistillError, MissingDependencyError
from ..files import replacing
from ..models.network import Network

TOLERANCE = 1e-4


class ExportError(KrdistillError):
    """The exported file does not answer as the network does."""


class _Deployed(nn.Module):
    """uint8 images ``(B, C, H, W)`` to class probabilities ``(B, K)``: what the device runs."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return torch.softmax(self.network(images).logits, dim=1)


def export_onnx(network: Network, path: Path) -> Path:
    """Writes an ONNX file that takes raw images.

    Input ``images``: uint8 ``(batch, C, H, W)``, values 0 to 255, batch dynamic. Output ``probabilities``: float32
    ``(batch, K)``. The class names, in order, are in the file's metadata under ``class_names`` (JSON).

    Raises:
        MissingDependencyError: the ``onnx`` extra is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"Exporting to ONNX needs the package {error.name}: pip install 'krdistill[onnx]'."
        ) from None
    module = _deployed(network)
    height, width = network.image_size
    example = torch.zeros(2, network.channels, height, width, dtype=torch.uint8)
    with replacing(path) as part, _quiet():
        torch.onnx.export(
            module,
            (example,),
            str(part),
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        model = onnx.load(str(part))
        card = {k: v for k, v in network.card().items() if k != "architecture"}
        card["class_names"] = list(network.class_names)
        for key, value in card.items():
            entry = model.metadata_props.add()
            entry.key, entry.value = key, json.dumps(value, ensure_ascii=False)
        onnx.checker.check_model(model)
        onnx.save(model, str(part))
    return path


def verify_onnx(path: Path, network: Network, images: Tensor, *, batch_size: int = 250) -> dict[str, Any]:
    """Compares ONNX Runtime with PyTorch on real images.

    Args:
        path: the exported file.
        network: what it was exported from.
        images: uint8 ``(N, H, W, C)``.

    Returns:
        ``largest_difference`` of the probabilities, ``agreement`` of the predicted class, ``images``, ``bytes``,
        ``opset``, ``milliseconds_per_image`` (batch 1, median) and a ``sentence`` that says it in words.

    Raises:
        ExportError: the largest difference is above 1e-4.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"Checking the export needs the package {error.name}: pip install 'krdistill[onnx]'."
        ) from None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    module = _deployed(network)
    largest, agree = 0.0, 0
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size].permute(0, 3, 1, 2).contiguous()
        with torch.inference_mode():
            ours = module(batch).numpy()
        theirs = session.run(None, {"images": batch.numpy()})[0]
        largest = max(largest, float(np.abs(ours - theirs).max()))
        agree += int((ours.argmax(1) == theirs.argmax(1)).sum())
    if not largest <= TOLERANCE:
        raise ExportError(
            f"{path} differs from PyTorch by {largest:.2e} in probability (allowed {TOLERANCE:g}). Do not deploy it; "
            "please report the network it came from."
        )
    one = images[:1].permute(0, 3, 1, 2).contiguous().numpy()
    times = []
    for _ in range(50):
        started = time.perf_counter()
        session.run(None, {"images": one})
        times.append(time.perf_counter() - started)
    size = path.stat().st_size
    return {
        "file": path.name,
        "bytes": size,
        "opset": max(e.version for e in onnx.load(str(path)).opset_import if e.domain in ("", "ai.onnx")),
        "images": len(images),
        "largest_difference": largest,
        "agreement": agree / len(images),
        "milliseconds_per_image": round(1000 * float(np.median(times[10:])), 4),
        "sentence": f"{path.name}: ONNX Runtime agrees with PyTorch on {agree:,} of {len(images):,} test images "
        f"(largest difference {largest:.1e}), {size / 1024:.0f} KiB",
    }


def _deployed(network: Network) -> _Deployed:
    """A plain copy: weights on the CPU, contiguous, in evaluation mode; the network stays as it is."""
    module = copy.deepcopy(_Deployed(network)).cpu().eval()
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()
    return module


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's chatter is of no use to a user; errors still come through."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
