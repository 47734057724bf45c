"""What a student learns from a small set in place of a long-tailed one, with and without ADSA.

    python benchmarks/condense.py [--sets digits,cifar] [--seeds N] [--ipc 10,50] [--json PATH]

``digits``: digits-lt as it ships (imbalance factor 50). ``cifar``: CIFAR-100-LT at 16x16 pixels, ten classes (every
tenth), imbalance factor 100. A teacher is trained by cross-entropy on the long-tailed set; random, herding and
distribution matching make 10 and 50 images of every class of it; the teacher labels them, as it is (``soft``) and
rectified by ADSA (``adsa``); the student learns from the small set alone by kd, and by hard labels alone (``hard``).
Beside them stands the student on the whole set. Accuracies on the balanced test set, over all and by the groups of the
long-tailed set (head, medium, tail thirds).

The file is written from a clean source tree alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from krdistill.condense import METHODS, CondenseOptions, condense_images, soft_labels, write_condensed
from krdistill.config import RunConfig, load_config
from krdistill.data import ImageData, load_images
from krdistill.data.augment import augmentation_of
from krdistill.files import read_json
from krdistill.models.network import load_network
from krdistill.pipeline import Plan, prepare, run
from krdistill.runfolder import METRICS, environment
from krdistill.training.loop import collect_outputs

PLAIN = [("recipe", "kd"), ("baselines", "[none]"), ("export.onnx", "false"), ("train.evaluate_every", "1000")]
SETS: dict[str, dict[str, Any]] = {
    "digits": {
        "preset": "digits-lt",
        "overrides": PLAIN,
        "matching": {"iterations": 1000, "width": 64, "real_batch": 128},
        "steps": 1000,
    },
    "cifar": {
        "preset": "cifar10-lt",
        "overrides": [
            *PLAIN,
            ("teacher.model", "resnet8w32"),
            ("student.model", "resnet8"),
            ("teacher.train.epochs", "40"),
            ("student.train.epochs", "40"),
        ],
        "matching": {"iterations": 500, "width": 64, "real_batch": 64},
        "steps": 800,
    },
}


def configured(name: str, seed: int, place: Path, extra: list[tuple[str, str]] | None = None) -> RunConfig:
    """The configuration of a set's run; CIFAR-100's ten classes are put into an archive first."""
    given = [*SETS[name]["overrides"], ("seed", str(seed)), *(extra or [])]
    if name == "cifar":
        archive = place / "cifar10x16.npz"
        if not archive.is_file():
            loaded = load_images("cifar100", image_size=16)
            parts = [part.keep_classes(torch.arange(0, 100, 10)) for part in (loaded.train, loaded.test)]
            arrays = [(f"{n}_{k}", v) for n, p in zip(("train", "test"), parts, strict=True)
                      for k, v in (("images", p.inputs.numpy()), ("labels", p.labels.numpy()))]  # fmt: skip
            np.savez(archive, class_names=np.array(parts[0].class_names), **dict(arrays))  # type: ignore[arg-type]
        given = [("data.source", str(archive)), *given]
    return load_config(SETS[name]["preset"], given)


def accuracies(row: dict[str, Any]) -> dict[str, float]:
    """A network's accuracy over all classes, and by the groups of the long-tailed set."""
    return {"all": row["balanced_accuracy"], **{name: group["accuracy"] for name, group in row["groups"].items()}}


def students(config: RunConfig, folder: Path) -> dict[str, dict[str, float]]:
    """Runs a configuration; accuracies of its student and its baselines."""
    metrics = run(prepare(config), folder, report=False)
    return {k: accuracies(row) for k, row in {"student": metrics["student"], **metrics["baselines"]}.items()}


def measure(name: str, seed: int, ipcs: list[int], place: Path) -> dict[str, Any]:
    """Everything of one set and seed."""
    whole = place / f"{name}-{seed}"
    known = prepare(configured(name, seed, place))
    reference = students(known.config, whole)
    plan = prepare(configured(name, seed, place, [("teacher.run", str(whole))]))
    teacher = read_json(whole / METRICS)["teacher"]
    found: dict[str, Any] = {
        "counts": plan.prior.counts.tolist(),
        "teacher": accuracies(teacher),
        "whole": {"soft": reference["student"], "hard": reference["none"]},
    }
    for ipc in ipcs:
        for method in METHODS:
            found[f"{method}-{ipc}"] = one(name, plan, whole, method, ipc, place / f"{name}-{seed}-{method}-{ipc}")
            shown = {k: round(v["all"], 4) for k, v in found[f"{method}-{ipc}"].items() if "all" in v}
            print(f"{name} seed {seed} {method} {ipc}: {shown}", flush=True)
    return found


def one(name: str, plan: Plan, teacher: Path, method: str, ipc: int, place: Path) -> dict[str, Any]:
    """One small set, labelled in both ways."""
    data, seed, settings = plan.data.train, plan.config.seed, SETS[name]
    assert isinstance(data, ImageData)
    network = load_network(teacher / "teacher")
    augmentation = plan.config.student.train.augmentation
    started = time.perf_counter()
    matching = settings["matching"] if method == "dm" else {}
    steps = matching.get("iterations")
    small = condense_images(
        data, CondenseOptions(ipc, method, iterations=steps), seed=seed, flip="flip" in augmentation,
        features=collect_outputs(network, data, device=plan.device)[1],
        **{k: v for k, v in matching.items() if k != "iterations"},
    )  # fmt: skip
    made: dict[str, Any] = {"cost": {"seconds": round(time.perf_counter() - started, 1)}}
    ids = tuple(f"train/{i}" for i in range(len(small.labels)))
    images = ImageData(small.images, small.labels, data.class_names, ids, "condensed")
    for rectify, key in (("none", "soft"), ("adsa", "adsa")):
        logits, record = soft_labels(
            network, images, plan.prior.log_prior, rectify=rectify,
            augment=augmentation_of(augmentation, images), seed=seed, device=plan.device,
        )  # fmt: skip
        folder = place / key
        folder.mkdir(parents=True, exist_ok=True)
        write_condensed(folder, plan, images, logits)
        epochs = max(1, settings["steps"] // -(-len(images) // min(plan.config.student.train.batch_size, len(images))))
        config = load_config(
            str(folder / "run.yaml"),
            [("baselines", "[none]" if key == "soft" else "[]"), ("student.train.epochs", str(epochs)),
             ("student.train.evaluate_every", str(epochs))],
        )  # fmt: skip
        scores = students(config, folder / "run")
        made[key] = {**scores["student"], "labels": record}
        if "none" in scores:
            made["hard"] = scores["none"]
    return made


def summarise(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Row to labels to group to mean and spread over the seeds."""
    made: dict[str, Any] = {}
    for row in (r for r in seeds[0] if r not in ("counts", "teacher")):
        made[row] = {}
        for key in (k for k in ("hard", "soft", "adsa") if k in seeds[0][row]):
            made[row][key] = {}
            for group in (g for g in seeds[0][row][key] if g != "labels"):
                values = [s[row][key][group] for s in seeds]
                made[row][key][group] = {
                    "mean": statistics.mean(values),
                    "std": statistics.stdev(values) if len(values) > 1 else 0.0,
                }
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ipc", default="10,50")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    names = arguments.sets.split(",")
    if unknown := set(names) - set(SETS):
        parser.error(f"--sets: expected some of {', '.join(SETS)}, got {', '.join(sorted(unknown))}")
    provenance = environment(torch.device("cpu"))
    if arguments.json and str(provenance["git"] or "").endswith("-dirty"):
        parser.error("the source has changes that no commit holds; commit them first, or leave --json out")
    ipcs = [int(n) for n in arguments.ipc.split(",")]
    kept: dict[str, Any] = {"provenance": provenance, "settings": SETS, "sets": {}}
    with tempfile.TemporaryDirectory() as place:
        for name in names:
            seeds = [measure(name, seed, ipcs, Path(place)) for seed in range(arguments.seeds)]
            kept["sets"][name] = {"summary": summarise(seeds), "seeds": seeds}
            print(f"\n{name:<24}" + "".join(f"{g:>16}" for g in seeds[0]["teacher"]))
            for row, labels in kept["sets"][name]["summary"].items():
                for key, groups in labels.items():
                    cells = "".join(f"{100 * g['mean']:9.1f} ± {100 * g['std']:4.1f}" for g in groups.values())
                    print(f"{f'{row} {key}':<24}{cells}")
            print(flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(kept, indent=1, allow_nan=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
