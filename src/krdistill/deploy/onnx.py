"""ONNX export with the normalisation inside the graph, verified against PyTorch."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..calibration import Calibrator
from ..errors import ArgumentError, KrdistillError, MissingDependencyError
from ..files import replacing
from ..kinds import MAX_BYTES, NOUNS, as_batch
from ..models.network import Network
from .compacting import compact
from .measuring import count_graph

TOLERANCE = 1e-4


class ExportError(KrdistillError):
    """The exported file does not answer as the network does.

    Attributes:
        report: what was measured, where anything was.
    """

    def __init__(self, message: str, report: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.report = report


class Deployed(nn.Module):
    """uint8 images ``(B, C, H, W)``, or another kind's batch, to class probabilities ``(B, K)``: what a device runs."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return torch.softmax(self.network(images).logits.float(), dim=1)


def export_onnx(
    network: Network, path: Path, *, class_counts: Sequence[int] | None = None, calibrator: Calibrator | None = None,
    float_images: bool = False,
) -> Path:  # fmt: skip
    """Writes an ONNX file that takes raw images, sentences or rows of numbers.

    Input ``images``: uint8 ``(batch, C, H, W)``, values 0 to 255, batch dynamic; or ``sentences``: uint8
    ``(batch, length)``, UTF-8 bytes with zeros behind them, both dynamic (the hashing of n-grams is in the graph); or
    ``rows``: float32 ``(batch, D)``, as they were before standardisation. Output ``probabilities``: float32
    ``(batch, K)``. The class names, in order, are in the file's metadata under ``class_names`` (JSON), and so are mean,
    std, image size and, where they are given, ``class_counts``.

    Args:
        network: the student.
        path: the file to write.
        class_counts: training images of each class, K numbers: what ``krdistill predict --prior natural`` needs.
        calibrator: goes into the metadata; ``krdistill predict --calibrated`` applies it to the probabilities.
        float_images: ``images`` are float32 in [0, 1] instead, for a device whose camera gives them so.

    Raises:
        ArgumentError: another number of class counts than of classes, or float images of what takes none.
        MissingDependencyError: the ``onnx`` extra is not installed.
    """
    if float_images and network.kind != "image":
        raise ArgumentError(f"float_images is for images; this network takes {NOUNS[network.kind]}.")
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"Exporting to ONNX needs the package {error.name}: pip install 'krdistill[onnx]'."
        ) from None
    check_exportable(network)
    card, module = device_card(network, class_counts, calibrator), deployed(network)
    example = example_images(network)
    if float_images:  # what is done to them outside is nothing; the file that says so can teach
        example = example.float()
        card |= {"mean": [0.0] * network.channels, "std": [1.0] * network.channels, "float_images": True}
    with replacing(path) as part, quiet_export():
        torch.onnx.export(
            module,
            (example,),
            str(part),
            input_names=[NOUNS[network.kind]],
            output_names=["probabilities"],
            dynamic_shapes=dynamic_shapes(network),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        model = onnx.load(str(part))
        compact(model)  # the exporter notes where in the source a node comes from, paths and all
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
        images: uint8 ``(N, H, W, C)``, or rows of another kind.

    Returns:
        ``largest_difference`` of the probabilities, ``agreement`` of the predicted class, ``images``, ``bytes``,
        ``opset``, ``parameters`` and ``macs`` (:func:`~krdistill.deploy.measuring.count_graph`),
        ``milliseconds_per_image`` (batch 1, median) and a ``sentence`` that says it in words.

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
    module, name = deployed(network), NOUNS[network.kind]
    largest, agree = 0.0, 0
    for start in range(0, len(images), batch_size):
        batch = as_batch(images[start : start + batch_size]).contiguous()
        with torch.inference_mode():
            ours = module(batch).numpy()
        theirs = session.run(None, {name: batch.numpy()})[0]
        largest = max(largest, float(np.abs(ours - theirs).max()))
        agree += int((ours.argmax(1) == theirs.argmax(1)).sum())
    if not largest <= TOLERANCE:
        raise ExportError(
            f"{path} differs from PyTorch by {largest:.2e} in probability (allowed {TOLERANCE:g}). Do not deploy it; "
            "please report the network it came from."
        )
    one = as_batch(images[:1]).contiguous().numpy()
    one = one if network.kind != "text" else one[:, : max(1, int((one != 0).sum()))]
    milliseconds = median_milliseconds(lambda: session.run(None, {name: one}))
    size, counts = path.stat().st_size, count_graph(path)
    work = f", {counts['macs'] / 1e6:,.2f} M multiply-accumulates" if counts["macs"] is not None else ""
    return {
        "file": path.name,
        "bytes": size,
        "opset": max(e.version for e in onnx.load(str(path)).opset_import if e.domain in ("", "ai.onnx")),
        **counts,
        "images": len(images),
        "largest_difference": largest,
        "agreement": agree / len(images),
        "milliseconds_per_image": round(milliseconds, 4),
        "sentence": f"{path.name}: ONNX Runtime agrees with PyTorch on {agree:,} of {len(images):,} test {name} "
        f"(largest difference {largest:.1e}), {size / 1024:.0f} KiB{work} and {milliseconds:.2f} ms per {name[:-1]}",
    }


def median_milliseconds(job: Callable[[], object]) -> float:
    """Median time of something done 40 times, after ten that warm up."""
    times = []
    for _ in range(50):
        started = time.perf_counter()
        job()
        times.append(time.perf_counter() - started)
    return 1000 * float(np.median(times[10:]))


def device_card(
    network: Network, class_counts: Sequence[int] | None, calibrator: Calibrator | None = None
) -> dict[str, Any]:
    """What a file says of itself, as plain data: the network's card, its calibrator, how frequent its classes were."""
    card = {k: v for k, v in network.card().items() if k != "architecture"}
    if calibrator is not None:
        if calibrator.num_classes != network.num_classes:
            raise ArgumentError(
                f"Expected a calibrator of {network.num_classes} classes, got {calibrator.num_classes}."
            )
        card["calibrator"] = calibrator.as_dict()
    if class_counts is None:
        return card
    if len(class_counts) != network.num_classes:
        raise ArgumentError(f"Expected {network.num_classes} class counts, got {len(class_counts)}.")
    return {**card, "class_counts": [int(n) for n in class_counts]}


def check_exportable(network: Network) -> None:
    """Refuses a network that no file for a device can hold.

    Raises:
        ExportError: it asks a tokeniser or an encoder that no graph of operations holds.
    """
    if hasattr(network.backbone, "embeds") or network.takes_texts:
        texts = "takes sentences as texts, which no graph of operations does"
        what = texts if network.takes_texts else "asks a sentence encoder that is no part of it"
        raise ExportError(
            f"This network {what}, so no file for a device can hold it. Distil it into a student such as ngram, and "
            "export that."
        )


def example_images(network: Network) -> Tensor:
    """Two raw images, or two examples of another kind, to trace the network with."""
    if network.kind != "image":
        return network.example_inputs()
    return torch.zeros(2, network.channels, *network.image_size, dtype=torch.uint8)


def dynamic_shapes(network: Network) -> dict[str, Any]:
    """What of a network's input may have any size: the batch, and of sentences the length."""
    free: dict[int, Any] = {0: torch.export.Dim("batch")}
    if network.kind == "text":
        free[1] = torch.export.Dim("length", min=4, max=MAX_BYTES)
    return {"images": free}


def deployed(network: Network) -> Deployed:
    """A plain copy: weights on the CPU, contiguous, in evaluation mode; the network stays as it is."""
    module = copy.deepcopy(Deployed(network)).cpu().eval()
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()
    return module


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
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
