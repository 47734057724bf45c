"""What students of finished runs lose as files for a device, over all classes and by group.

    python benchmarks/quantised.py RUN [RUN ...] --json benchmarks/results/quantised.json

Every run's student is exported to ONNX as float32 and as int8, the latter calibrated on training images drawn evenly
from the classes (``balanced``) and as they come (``natural``), and judged on the run's test part. Nothing is refused
here, however much is lost. The file is written from a clean source tree alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from krdistill.config import load_config
from krdistill.deploy.exporting import export_network
from krdistill.deploy.quantising import calibration_images
from krdistill.files import read_json
from krdistill.models.network import load_network
from krdistill.runfolder import CONFIG, PROVENANCE, environment
from krdistill.stages import load_configured_data, measure

KEPT = ("bytes", "images", "largest_difference", "agreement", "drop", "before", "after")


def exported(run: Path, place: Path) -> dict[str, Any]:
    """The reports of one run's files."""
    config = load_config(str(run / CONFIG))
    data = load_configured_data(config.data)
    prior, groups = measure(data, config.data.groups)
    network = load_network(run / "student")
    found: dict[str, Any] = {
        "model": config.student.model, "recipe": config.recipe.name, "seed": config.seed,
        "split_checksum": data.split["checksum"], "trained_at": read_json(run / PROVENANCE)["git"],
    }  # fmt: skip
    for name, kind in (("float32", None), ("int8, balanced", "balanced"), ("int8, natural", "natural")):
        report = export_network(
            network, place / f"{name}.onnx", test=data.test, groups=groups,
            precision="float32" if kind is None else "int8", class_counts=prior.counts.tolist(),
            calibration=None if kind is None else calibration_images(data.train, kind=kind),
            max_drop=100, max_rare_drop=100,
        )  # fmt: skip
        found[name] = {k: report[k] for k in KEPT}
    return found


def points(found: list[dict[str, Any]], name: str) -> dict[str, list[float | None]]:
    """Points lost (below 0) or gained by a kind of file, over all and by group, run by run."""

    def change(report: dict[str, Any], group: str | None) -> float | None:
        old, new = (report[k]["top1"] if group is None else report[k]["groups"][group] for k in ("before", "after"))
        return None if old is None else 100 * (new - old)

    groups = found[0][name]["before"]["groups"]
    made = {"all": [change(f[name], None) for f in found]}
    return made | {g: [change(f[name], g) for f in found] for g in groups}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    provenance = environment(torch.device("cpu"))
    if arguments.json and str(provenance["git"] or "").endswith("-dirty"):
        parser.error("the source has changes that no commit holds; commit them first, or leave --json out")
    with tempfile.TemporaryDirectory() as place:
        found = [exported(run, Path(place)) for run in arguments.runs]
    for name in ("float32", "int8, balanced", "int8, natural"):
        size = statistics.mean(f[name]["bytes"] for f in found) / 1024
        told = {
            g: ", ".join("n/a" if v is None else f"{v:+.2f}" for v in each) for g, each in points(found, name).items()
        }
        print(f"{name}: {size:.1f} KiB; points {told}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        kept = {"provenance": provenance, "runs": found}
        arguments.json.write_text(json.dumps(kept, indent=1, allow_nan=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
