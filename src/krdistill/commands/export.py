"""`krdistill export`: the student of a finished run as a file, checked on the run's test images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError, RunFolderError
from ..kinds import NOUNS
from .shared import make_console, needs_packages

if TYPE_CHECKING:
    from rich.console import Console

_SUFFIX = {"onnx": ".onnx", "pt2": ".pt2", "safetensors": ""}


@click.command()
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option(
    "--format", "form", type=click.Choice(["onnx", "pt2", "safetensors"]), default="onnx", show_default=True
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(["float32", "float16", "int8"]), default="float32", show_default=True
)  # fmt: skip
@click.option(
    "--calibration", type=click.Choice(["balanced", "natural"]),
    help="Training images that int8 is calibrated on: equally many of every class, or as they come; sentences and "
    "rows need none. [default: balanced]",
)  # fmt: skip
@click.option("--float-images", is_flag=True, help="The file takes float images in [0, 1], not uint8; onnx alone.")
@click.option("--out", type=click.Path(path_type=Path), help="File, or folder for safetensors. [default: RUN/exports]")
@click.option(
    "--max-drop", type=click.FloatRange(0, 100), default=0.5, show_default=True,
    help="Points of accuracy on all test examples that may be lost.",
)  # fmt: skip
@click.option(
    "--max-rare-drop", type=click.FloatRange(0, 100), default=1.0, show_default=True,
    help="Points that the rarest group may lose.",
)  # fmt: skip
def export(
    run_folder: Path, form: str, precision: str, calibration: str | None, float_images: bool, out: Path | None,
    max_drop: float, max_rare_drop: float,
) -> None:  # fmt: skip
    """Write the student of a run for use elsewhere, and check it on the run's test images.

    onnx takes raw images of any batch size and gives probabilities (see predict); pt2 is the same for torch;
    safetensors is a folder of weights for krdistill.load_network. What the file loses against PyTorch is printed and
    written beside it as JSON; one that loses more than is allowed is not written.
    """
    if precision == "int8" and form != "onnx":
        raise ConfigError("--precision int8 needs ONNX Runtime: leave --format onnx.")
    if calibration is not None and precision != "int8":
        raise ConfigError("--calibration is for --precision int8.")
    if float_images and (form != "onnx" or precision == "int8"):
        raise ConfigError("--float-images is for --format onnx in float32 or float16.")
    name = "student" + ("" if precision == "float32" else f"-{precision}") + ("-float-images" if float_images else "")
    out = out or run_folder / "exports" / (name + _SUFFIX[form] if form != "safetensors" else f"{name}-safetensors")
    if form == "safetensors" and out.is_file():
        raise ConfigError(f"--out: {out} is a file; safetensors writes a folder.")
    if form != "safetensors" and (out.is_dir() or out.suffix != _SUFFIX[form]):
        raise ConfigError(f"--out: expected a file *{_SUFFIX[form]}, got {out}.")
    with needs_packages():
        from ..calibrating import student_calibrator
        from ..config import load_config
        from ..deploy.exporting import export_network
        from ..deploy.onnx import ExportError
        from ..deploy.quantising import calibration_images
        from ..files import read_json
        from ..models.network import load_network
        from ..models.registry import parse_model
        from ..runfolder import CONFIG, DONE, SPLIT
        from ..stages import load_configured_data, measure
    if not (run_folder / CONFIG).is_file() or not (run_folder / "student" / DONE).is_file():
        raise RunFolderError(f"No trained student in {run_folder}. Expected the folder of a finished run.")
    config = load_config(str(run_folder / CONFIG))
    console = make_console()
    with console.status("exporting"):
        data = load_configured_data(config.data)
        if data.split["checksum"] != read_json(run_folder / SPLIT)["checksum"]:
            raise RunFolderError(
                f"The data of {run_folder} changed since it was run (another split checksum), so the export cannot be "
                "checked on its test images. Restore them, or run it again."
            )
        prior, groups = measure(data, config.data.groups)
        network = load_network(run_folder / "student", allow_factories=[parse_model(config.student.model).name])
        calibrator = student_calibrator(run_folder)
        if calibration is not None and network.kind != "image":
            raise ConfigError(f"--calibration is for images; int8 of {NOUNS[network.kind]} needs none.")
        static = precision == "int8" and network.kind == "image"
        images = calibration_images(data.train, kind=calibration or "balanced") if static else None
        try:
            report = export_network(
                network, out, test=data.test, groups=groups, form=form, precision=precision,
                class_counts=prior.counts.tolist(), calibration=images, calibrator=calibrator, max_drop=max_drop,
                max_rare_drop=max_rare_drop, float_images=float_images,
            )  # fmt: skip
        except ExportError as error:
            if error.report is not None:
                _print(console, error.report)
            raise
    _print(console, report)
    if calibrator is not None:
        console.print(f"with the calibrator {calibrator.words()}: krdistill predict --calibrated", highlight=False)
    console.print(f"\n{report['format']}  {out}  ({_cost(report)})", highlight=False, soft_wrap=True)


def _cost(report: dict[str, Any]) -> str:
    """Size and time, for int8 beside those of float32."""
    plain = report["float32"]
    size = f"{report['bytes'] / 1024:,.0f} KiB"
    if report["milliseconds"] is None:
        return size
    one = f"{report['milliseconds']:.2f} ms per {report['noun'][:-1]}"
    if plain is None:
        return f"{size}, {one}"
    return f"{size}, {one}; float32: {plain['bytes'] / 1024:,.0f} KiB, {plain['milliseconds']:.2f} ms"


def _print(console: Console, report: dict[str, Any]) -> None:
    from ..console import print_table

    old, new = report["before"], report["after"]
    noun = report["noun"]
    pairs = [(f"all test {noun}", old["top1"], new["top1"])]
    pairs += [(f"group {name}", old["groups"][name], new["groups"][name]) for name in old["groups"]]
    pairs += [("calibration error", old["ece"], new["ece"])]
    rows = [
        [name, *(f"{100 * v:.2f}%" for v in (a, b)), f"{round(100 * (b - a), 2) + 0.0:+.2f}"]
        if a is not None
        else [name, *["n/a"] * 3]
        for name, a, b in pairs
    ]
    print_table(console, [f"accuracy, {report['images']:,} {noun}", "PyTorch", report["precision"], "points"], rows)
    console.print(
        f"same class on {100 * report['agreement']:.2f}% of the {noun}, largest difference of a probability "
        f"{report['largest_difference']:.1e}",
        highlight=False,
    )
