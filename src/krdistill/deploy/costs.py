"""What networks cost where they run, side by side: each written as files of the asked precisions, and measured."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ArgumentError, ModelError
from ..models.network import Network
from .measuring import measure_file
from .onnx import ExportError, check_exportable, export_onnx
from .quantising import quantise_dynamically, quantise_onnx

COSTED = ("float32", "int8")


def measure_networks(
    networks: Mapping[str, Network], *, calibration: Tensor | None = None, precisions: Sequence[str] = COSTED,
    threads: Sequence[int] = (1, 2), batches: Sequence[int] = (1, 32), seconds: float = 1.0,
    on_step: Callable[[str], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Writes every network as an ONNX file of every precision, and measures the files on this machine's CPU.

    What int8 costs in accuracy is another question: ``krdistill export`` answers it before it leaves a file behind.
    The files are gone afterwards.

    Args:
        networks: by the names that the files get.
        calibration: images for int8 of networks for images, uint8 ``(N, H, W, C)``; others need none.
        precisions: of ``float32`` and ``int8``.
        threads, batches, seconds: see :func:`~krdistill.deploy.measuring.measure_file`.
        on_step: hears what is measured, in words.

    Returns:
        ``files``, a list of what :func:`~krdistill.deploy.measuring.measure_file` says of each, with ``network`` and
        ``precision``; and ``left_out``, by network (or network and precision) why there is no file of it.

    Raises:
        ArgumentError: another precision, or no images to calibrate int8 with.
        MissingDependencyError: the ``onnx`` extra is not installed.
    """
    if unknown := set(precisions) - set(COSTED):
        raise ArgumentError(f"precisions: expected some of {', '.join(COSTED)}, got {', '.join(sorted(unknown))}.")
    images = [name for name, network in networks.items() if network.kind == "image"]
    if "int8" in precisions and images and (calibration is None or not len(calibration)):
        raise ArgumentError(f"calibration: expected images to measure int8 of {images[0]} with, got none.")
    say = on_step or (lambda words: None)
    files: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as place:
        for name, network in networks.items():
            plain = Path(place) / f"{name.replace('/', '-')}.onnx"
            try:
                check_exportable(network)
                say(f"writing the {name}")
                export_onnx(network, plain)
            except (ExportError, ModelError) as error:
                left_out[name] = str(error)
                continue
            for precision in precisions:
                path = plain
                if precision == "int8":
                    path = plain.with_name(f"{plain.stem}-int8.onnx")
                    try:
                        if network.kind == "image":
                            assert calibration is not None
                            quantise_onnx(plain, path, calibration)
                        else:
                            quantise_dynamically(plain, path)
                    except (ExportError, ModelError) as error:
                        left_out[f"{name}, int8"] = str(error)
                        continue
                say(f"measuring the {name}, {precision}")
                found = measure_file(path, threads=threads, batches=batches, seconds=seconds)
                files.append({"network": name, "precision": precision, **found})
    return {"files": files, "left_out": left_out}
