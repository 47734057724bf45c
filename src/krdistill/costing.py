"""What the networks of a finished run cost where they run: its teacher's beside its student's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .config import load_config
from .deploy.costs import measure_networks
from .deploy.quantising import calibration_images
from .errors import RunFolderError
from .models.network import load_network
from .models.registry import parse_model
from .runfolder import CONFIG, DONE, SPLIT
from .stages import load_configured_data


def measure_run(run: Path, *, seconds: float = 1.0, on_step: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Measures teacher and student of a finished run as ONNX files, float32 and int8, on this machine's CPU.

    Args:
        run: the run folder.
        seconds: how long each measurement is repeated.
        on_step: hears what is done, in words.

    Returns:
        As :func:`~krdistill.deploy.costs.measure_networks`. A teacher of whom only answers are known is among
        ``left_out``.

    Raises:
        RunFolderError: no finished run.
        MissingDependencyError: the ``onnx`` extra is not installed.
    """
    if not (run / CONFIG).is_file() or not (run / SPLIT).is_file() or not (run / "student" / DONE).is_file():
        raise RunFolderError(f"No trained student in {run}. Expected the folder of a finished run.")
    config = load_config(str(run / CONFIG))
    named = [parse_model(part.model).name for part in (config.teacher, config.student)]
    networks, missing = {}, {}
    for name in ("teacher", "student"):
        if (run / name / "network.json").is_file():
            networks[name] = load_network(run / name, allow_factories=named)
        else:
            missing[name] = f"{run} holds no network of its {name}."
    images = None
    if any(network.kind == "image" for network in networks.values()):
        if on_step is not None:
            on_step("reading the data")
        images = calibration_images(load_configured_data(config.data).train)
    found = measure_networks(networks, calibration=images, seconds=seconds, on_step=on_step)
    return {**found, "left_out": {**missing, **found["left_out"]}}
