"""A student as a file in several formats and precisions, and what each costs in accuracy on real images."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..calibration import Calibrator
from ..data.containers import Examples
from ..errors import ArgumentError
from ..evaluation import evaluate_predictions
from ..files import replacing, write_json
from ..kinds import NOUNS, as_batch
from ..models.graphs import CARD
from ..models.network import Network, load_network, save_network
from ..priors import ClassGroups
from .onnx import (
    TOLERANCE,
    ExportError,
    check_exportable,
    deployed,
    device_card,
    dynamic_shapes,
    example_images,
    export_onnx,
    median_milliseconds,
    quiet_export,
)
from .quantising import quantise_dynamically, quantise_onnx
from .runtime import DeviceModel

FORMATS = ("onnx", "pt2", "safetensors")
PRECISIONS = ("float32", "float16", "int8")
_BATCH = 250

Answer = Callable[[Tensor], npt.NDArray[np.floating]]


def export_network(
    network: Network,
    out: Path,
    *,
    test: Examples,
    groups: ClassGroups,
    form: str = "onnx",
    precision: str = "float32",
    class_counts: Sequence[int] | None = None,
    calibration: Tensor | None = None,
    calibrator: Calibrator | None = None,
    float_images: bool = False,
    max_drop: float = 0.5,
    max_rare_drop: float = 1.0,
) -> dict[str, Any]:
    """Writes a network for use elsewhere, after it was compared with PyTorch on the test images.

    Formats: ``onnx``, raw uint8 images in, probabilities out (:func:`export_onnx`); ``pt2``, the same as a
    ``torch.export`` program; ``safetensors``, a folder of weights and ``network.json`` for
    :func:`krdistill.load_network`. Precisions: ``float32``; ``float16``, the backbone in half precision, normalisation
    and softmax in single (``pt2`` and ``safetensors`` store it in half and compute in single); ``int8``, ONNX alone
    (:func:`~krdistill.deploy.quantising.quantise_onnx`; of sentences and rows of numbers
    :func:`~krdistill.deploy.quantising.quantise_dynamically`).

    Args:
        network: the student.
        out: the file, or for ``safetensors`` the folder, to write. The report goes beside it, ``<out>.json``.
        test: real images that were not trained on.
        groups: of the classes, from the head to the tail.
        form: one of ``FORMATS``.
        precision: one of ``PRECISIONS``.
        class_counts: training images of each class, K numbers.
        calibration: for ``int8`` of a network for images, and for nothing else: uint8 ``(N, H, W, C)``
            (:func:`~krdistill.deploy.quantising.calibration_images`).
        float_images: ``onnx`` alone: the file takes float32 images in [0, 1] instead.
        calibrator: of the network, written along (``calibrator.json`` for ``safetensors``, else into the file's
            metadata); the probabilities themselves stay uncalibrated, and so does the comparison.
        max_drop: points of accuracy on all test images that may be lost.
        max_rare_drop: points that the rarest group may lose.

    Returns:
        The report: ``file``, ``format``, ``precision``, ``bytes``, ``milliseconds`` (median of one example at a time in
        ONNX Runtime; None of other formats), ``float32`` (``bytes`` and ``milliseconds`` of the file that ``int8`` was
        made from, else None), ``noun`` (what an example is), ``images``, ``largest_difference`` of the probabilities,
        ``agreement`` of the predicted class, ``before`` and ``after`` (``top1``, ``balanced_accuracy``, ``groups``,
        ``ece``, ``nll``), ``drop`` in points of ``all`` and of the ``rarest`` group (None without images) and its
        ``rarest_group``, ``allowed``, ``calibration_images``.

    Raises:
        ExportError: it loses more than is allowed, or a ``float32`` probability differs by more than 1e-4; nothing is
            written then, and the error holds the report.
        ArgumentError: an unknown format or precision, two that do not go together, or calibration images that are
            missing or of no use.
        MissingDependencyError: the ``onnx`` extra is not installed.
    """
    if form not in FORMATS or precision not in PRECISIONS:
        raise ArgumentError(
            f"Expected a format of {', '.join(FORMATS)} and a precision of {', '.join(PRECISIONS)}, got {form!r} and "
            f"{precision!r}."
        )
    if precision == "int8" and form != "onnx":
        raise ArgumentError(f"8-bit integers need ONNX Runtime: take the format onnx for int8, not {form}.")
    if form != "safetensors":
        check_exportable(network)
    static = precision == "int8" and network.kind == "image"
    if static and (calibration is None or not len(calibration)):
        raise ArgumentError("Expected calibration images for int8, got none.")
    if not static and calibration is not None:
        raise ArgumentError(
            f"Calibration images are for int8 of a network for images; {precision} of {NOUNS[network.kind]} uses none."
        )
    if float_images and (form != "onnx" or precision == "int8"):
        raise ArgumentError("Float images are for the format onnx in float32 or float16; others take uint8.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as place:
        made = Path(place) / "new" / out.name
        made.parent.mkdir()
        plain = _write(network, made, form, precision, class_counts, calibration, calibrator, float_images)
        report = compare_answers(_answer_of_network(network), _answer_of_file(made, form), test=test, groups=groups)
        files = sorted(made.iterdir()) if made.is_dir() else [made]
        report = {
            "file": out.name,
            "format": form,
            "precision": precision,
            "bytes": sum(file.stat().st_size for file in files),
            "milliseconds": _milliseconds(made, test) if form == "onnx" else None,
            "float32": None
            if plain is None
            else {"bytes": plain.stat().st_size, "milliseconds": _milliseconds(plain, test)},
            "noun": NOUNS[test.kind],
            **report,
            "allowed": {"all": max_drop, "rarest": max_rare_drop},
            "calibration_images": None if calibration is None else len(calibration),
        }
        _check(report)
        if made.is_dir():
            out.mkdir(exist_ok=True)
        for file in files:
            os.replace(file, out / file.name if made.is_dir() else out)
    write_json(out.with_name(f"{out.name}.json"), report)
    return report


def compare_answers(before: Answer, after: Answer, *, test: Examples, groups: ClassGroups) -> dict[str, Any]:
    """Compares two classifiers on the same images.

    Args:
        before: uint8 images ``(B, H, W, C)`` to probabilities ``(B, K)``.
        after: the same.
        test: the images.
        groups: of the classes, from the head to the tail.

    Returns:
        ``images``, ``largest_difference``, ``agreement``, ``before``, ``after`` and ``drop``, as in
        :func:`export_network`.

    Raises:
        ExportError: ``after`` answers numbers that are not finite.
    """
    rows = range(0, len(test), _BATCH)
    answers = [
        np.concatenate([ask(test.inputs[i : i + _BATCH]).astype(np.float64) for i in rows]) for ask in (before, after)
    ]
    broken = int((~np.isfinite(answers[1]).all(1)).sum())
    if broken:
        raise ExportError(
            f"{broken:,} of {len(test):,} answers are not finite, and PyTorch's are: the network's numbers are too "
            "large for this precision. Nothing was written. Keep float32."
        )
    scores = []
    for p in answers:
        logits = torch.from_numpy(np.log(np.maximum(p, np.finfo(np.float32).tiny)))
        found = evaluate_predictions(logits, test.labels, groups, class_names=test.class_names)
        kept = {k: found[k] for k in ("top1", "balanced_accuracy", "ece", "nll")}
        scores.append({**kept, "groups": {name: g["accuracy"] for name, g in found["groups"].items()}})
    old, new = scores
    rarest = next((name for name in reversed(groups.names) if old["groups"][name] is not None), None)
    return {
        "images": len(test),
        "largest_difference": float(np.abs(answers[0] - answers[1]).max()),
        "agreement": float((answers[0].argmax(1) == answers[1].argmax(1)).mean()),
        "before": old,
        "after": new,
        "drop": {
            "all": 100 * (old["top1"] - new["top1"]),
            "rarest": 100 * (old["groups"][rarest] - new["groups"][rarest]) if rarest is not None else None,
            "rarest_group": rarest,
        },
    }


def half_precision(network: Network) -> Network:
    """A copy with the backbone in float16; images are still normalised in float32."""
    made = copy.deepcopy(network).cpu().eval()
    made.__class__ = _HalfNetwork
    made.backbone.half()
    return made


class _HalfNetwork(Network):
    def normalise(self, images: Tensor) -> Tensor:
        rows = super().normalise(images)
        return rows.half() if rows.is_floating_point() else rows


class _StoredHalf(nn.Module):
    """A module whose backbone is stored in float16 and widened as it computes: torch is slow in half on CPUs."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.inner = deployed(network)
        self.inner.network.backbone.half()

    def forward(self, images: Tensor) -> Tensor:
        stored = (*self.inner.named_parameters(), *self.inner.named_buffers())
        wide = {name: value.float() for name, value in stored if value.dtype == torch.float16}
        answer: Tensor = torch.func.functional_call(self.inner, wide, (images,))
        return answer


def _write(
    network: Network, out: Path, form: str, precision: str, counts: Sequence[int] | None, calibration: Tensor | None,
    calibrator: Calibrator | None, float_images: bool,
) -> Path | None:  # fmt: skip
    """Writes the file or folder; of int8, gives the file in float32 that it was made from, one folder up."""
    if form == "safetensors":
        save_network(half_precision(network) if precision == "float16" else network, out)
        if calibrator is not None:
            calibrator.save(out / "calibrator.json")
    elif form == "pt2":
        card = json.dumps(device_card(network, counts, calibrator), ensure_ascii=False)
        module = _StoredHalf(network).eval() if precision == "float16" else deployed(network)
        with replacing(out) as part, quiet_export():
            program = torch.export.export(module, (example_images(network),), dynamic_shapes=dynamic_shapes(network))
            torch.export.save(program, part, extra_files={CARD: card})
    elif precision == "int8":
        plain = export_onnx(network, out.parents[1] / "float32.onnx", class_counts=counts, calibrator=calibrator)
        if calibration is None:
            quantise_dynamically(plain, out)
        else:
            quantise_onnx(plain, out, calibration)
        return plain
    else:
        stored = half_precision(network) if precision == "float16" else network
        export_onnx(stored, out, class_counts=counts, calibrator=calibrator, float_images=float_images)
    return None


def _milliseconds(path: Path, test: Examples) -> float:
    """Median time of one example at a time, of the first of the test part."""
    model, one = DeviceModel(path), test.inputs[:1].numpy()
    if test.kind == "text":
        one = one[:, : max(1, int((one != 0).sum()))]
    return round(median_milliseconds(lambda: model(one)), 4)


def _answer_of_network(network: Network) -> Answer:
    module = deployed(network)

    def answer(images: Tensor) -> npt.NDArray[np.floating]:
        with torch.inference_mode():
            p: npt.NDArray[np.floating] = module(as_batch(images).contiguous()).numpy()
        return p

    return answer


def _answer_of_file(path: Path, form: str) -> Answer:
    """Reads back what was written, as whoever uses it would."""
    if form == "safetensors":
        return _answer_of_network(load_network(path, allow_factories=True))  # made by this very process
    if form == "onnx":
        model = DeviceModel(path)
        return lambda images: model(images.numpy())
    module = torch.export.load(path).module()

    def answer(images: Tensor) -> npt.NDArray[np.floating]:
        with torch.inference_mode():
            p: npt.NDArray[np.floating] = module(as_batch(images).contiguous()).numpy()
        return p

    return answer


def _check(report: dict[str, Any]) -> None:
    name, precision, drop, allowed = report["file"], report["precision"], report["drop"], report["allowed"]
    if precision == "float32" and not report["largest_difference"] <= TOLERANCE:
        raise ExportError(
            f"{name} differs from PyTorch by {report['largest_difference']:.2e} in probability (allowed "
            f"{TOLERANCE:g}). Nothing was written; please report the network it came from.",
            report,
        )
    for key, where in (("all", f"all test {report['noun']}"), ("rarest", f"the rarest group, {drop['rarest_group']}")):
        # A hair above the limit is rounding, not accuracy.
        if drop[key] is not None and not drop[key] <= allowed[key] + 1e-9:
            option = "--max-drop" if key == "all" else "--max-rare-drop"
            raise ExportError(
                f"{name} in {precision} loses {drop[key]:.2f} points of accuracy on {where} (allowed "
                f"{allowed[key]:g}). Nothing was written. Keep a higher precision, or allow it with {option} "
                f"{drop[key] + 0.005:.2f}.",
                report,
            )
