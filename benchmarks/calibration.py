"""How well calibration fitted on a long-tailed validation part holds on a balanced test set.

    python benchmarks/calibration.py [--sets cifar100-lt,banking77-lt] [--seeds N] [--runs FOLDER] [--json PATH]

A fifth of every class is put aside for validation. ``cifar100-lt``: imbalance factor 100, 16x16 pixels; ResNet-20
teaches ResNet-8 by krdistill, beside a ResNet-8 that learns from labels alone; 20 epochs each. ``banking77-lt``:
imbalance factor 50, questions to a bank; a frozen MiniLM encoder teaches a bag of n-grams.
Every network is calibrated by every method. Beside them stands what no method may know, the temperature under which
the test labels are likeliest (``oracle``); and head-to-tail calibration with other alphas than the paper's.

On sentences, which have one view, students are taught by the teacher's calibrated answers too (``taught``): by kd, and
by krdistill-lrd, which removes the class prior from them.

Runs that are in FOLDER already are not trained again. The file is written from a clean source tree alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from krdistill.answering import answer_run
from krdistill.calibrating import ask, calibrate
from krdistill.calibration import METHODS, Calibrator
from krdistill.calibration.head_to_tail import (
    class_statistics,
    head_classes,
    importance_weights,
    transferred_statistics,
)
from krdistill.calibration.temperature import best_temperature
from krdistill.config import load_config
from krdistill.evaluation import evaluate_calibration
from krdistill.evaluation.calibration import MEASURES
from krdistill.pipeline import prepare, run
from krdistill.runfolder import METRICS, environment

SETS: dict[str, list[tuple[str, str]]] = {
    "cifar100-lt": [
        ("data.image_size", "16"),
        ("train.epochs", "20"),
        ("train.evaluate_every", "20"),
        ("train.compile", "none"),
    ],
    "banking77-lt": [("train.evaluate_every", "100")],
}
COMMON = [
    ("name", "calibration"),
    ("data.val_fraction", "0.2"),
    ("recipe", "krdistill"),
    ("student.train.sampler", "instance"),
    ("baselines", "[none]"),
    ("export.onnx", "false"),
]
NETWORKS = ("teacher", "none", "student")
TAUGHT = ("banking77-lt",)
TEACHERS = (None, "temperature", "balanced-temperature", "head-to-tail")
TEACHING = ("kd", "krdistill-lrd")
ALPHAS = (1.0, 0.998, 0.99, 0.95, 0.9)


def measure(folder: Path, network: str) -> dict[str, Any]:
    """Every method on one network of a run, and what explains the temperatures."""
    judged = ask(folder, network, features=True)
    found = calibrate(judged, tuple(METHODS))
    rows = {"before": found["before"], **{m: e["after"] for m, e in found["methods"].items() if m != "none"}}
    z, y = judged.val.logits.double().numpy(), judged.val_labels.numpy()
    K = z.shape[1]

    def at(T: float) -> dict[str, Any]:
        made = Calibrator("temperature", K, {"temperature": T})
        return evaluate_calibration(made(judged.test.logits), judged.test_labels, judged.groups)

    temperatures = {
        m: e["calibrator"]["parameters"]["temperature"]
        for m, e in found["methods"].items()
        if m in ("temperature", "balanced-temperature", "head-to-tail")
    }
    temperatures["oracle"] = best_temperature(judged.test.logits.double().numpy(), judged.test_labels.numpy())
    rows["oracle"] = at(temperatures["oracle"])
    assert judged.train is not None
    known = class_statistics(judged.train.feature.double().numpy(), judged.train_labels.numpy(), K)
    features, head = judged.val.feature.double().numpy(), head_classes(known.counts)
    transfer = []
    for alpha in ALPHAS:
        weights = importance_weights(features, y, known, transferred_statistics(known, head, alpha=alpha))
        T, tail = best_temperature(z, y, weights), weights[~head[y]]
        transfer.append(
            {
                "alpha": alpha,
                "temperature": T,
                "tail_weight": float(tail.mean()),
                "at_upper_clip": float((tail > 4.999).mean()),
                "ece": at(T)["ece"],
            }
        )
    correct = z.argmax(1) == y
    parts = {name: part for name, part in (("head", head[y]), ("tail", ~head[y]))}
    return {
        "validation": {
            name: {"images": int(part.sum()), "top1": float(correct[part].mean())} for name, part in parts.items()
        },
        "temperatures": temperatures,
        "methods": {name: _kept(row) for name, row in rows.items()},
        "transfer": transfer,
    }


def teach(name: str, folder: Path, seed: str) -> dict[str, Any]:
    """Accuracies of students of the run's teacher, as it is and calibrated: recipe to method to group."""
    made: dict[str, Any] = {recipe: {} for recipe in TEACHING}
    for method in TEACHERS:
        path, _ = answer_run(folder, calibrated=method, out=folder / f"answers-{method}.npz")
        for recipe in TEACHING:
            given = [*COMMON, *SETS[name], ("seed", seed), ("recipe", recipe), ("baselines", "[]")]
            config = load_config(name, [*given, ("teacher.answers", str(path)), ("bank.views", "0")])
            student = run(prepare(config), folder / f"taught-{recipe}-{method}", report=False)["student"]
            groups = {n: g["accuracy"] for n, g in student["groups"].items() if g is not None}
            made[recipe][method or "none"] = {"all": student["top1"], **groups}
    return made


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    """The figures of a row and of its groups, without the curves."""
    keys = ("top1", "confidence", *MEASURES)
    groups = {n: None if g is None else {k: g[k] for k in keys} for n, g in row["groups"].items()}
    return {**{k: row[k] for k in keys}, "groups": groups}


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation over the seeds (0 for one)."""
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def summarise(seeds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Network to method to measure to mean and spread, over all and by group."""
    first = next(iter(seeds.values()))
    made: dict[str, Any] = {}

    def over(get: Callable[[dict[str, Any]], float]) -> dict[str, float]:
        return spread([get(found) for found in seeds.values()])

    for network in NETWORKS:
        made[network] = {}
        for method, row in first[network]["methods"].items():
            made[network][method] = {
                k: over(lambda s, n=network, m=method, k=k: s[n]["methods"][m][k])  # type: ignore[misc]
                for k in ("top1", "confidence", *MEASURES)
            }
            made[network][method]["groups"] = {
                g: {
                    k: over(lambda s, n=network, m=method, g=g, k=k: s[n]["methods"][m]["groups"][g][k])  # type: ignore[misc]
                    for k in ("ece", "nll")
                }
                for g, found in row["groups"].items()
                if found is not None
            }
    return made


def show(name: str, found: dict[str, Any], seeds: dict[str, dict[str, Any]]) -> None:
    """Prints a set's figures."""
    for network, methods in found.items():
        print(f"{f'{name} {network}':<25}" + "".join(f"{m:>16}" for m in MEASURES) + f"{'T':>9}")
        for method, row in methods.items():
            T = [s[network]["temperatures"].get(method) for s in seeds.values()]
            shown = f"{statistics.mean(T):9.3f}" if None not in T else ""
            print(f"{method:<25}" + "".join(f"{row[m]['mean']:9.4f} ± {row[m]['std']:.4f}" for m in MEASURES) + shown)
        for i, alpha in enumerate(ALPHAS):
            at = [s[network]["transfer"][i] for s in seeds.values()]
            words = ", ".join(f"{k} {statistics.mean(v[k] for v in at):.3f}" for k in at[0] if k != "alpha")
            print(f"  alpha {alpha}: {words}")
        print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--runs", type=Path, help="keep the runs here, as NAME-seed<N>; by default they are removed")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    provenance = environment(torch.device("cpu"))
    if arguments.json and str(provenance["git"] or "").endswith("-dirty"):
        parser.error("the source has changes that no commit holds; commit them first, or leave --json out")
    names = arguments.sets.split(",")
    if unknown := set(names) - set(SETS):
        parser.error(f"--sets: expected some of {', '.join(SETS)}, got {', '.join(sorted(unknown))}")
    kept: dict[str, Any] = {"provenance": provenance, "sets": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            seeds: dict[str, dict[str, Any]] = {}
            for seed in range(arguments.seeds):
                folder = (arguments.runs or Path(scratch)) / f"{name}-seed{seed}"
                if not (folder / METRICS).is_file():
                    config = load_config(name, [*COMMON, *SETS[name], ("seed", str(seed))])
                    run(prepare(config), folder, report=False)
                seeds[str(seed)] = {network: measure(folder, network) for network in NETWORKS}
            found = summarise(seeds)
            kept["sets"][name] = {"config": dict([*COMMON, *SETS[name]]), "summary": found, "seeds": seeds}
            show(name, found, seeds)
            if name in TAUGHT:
                place = arguments.runs or Path(scratch)
                kept["sets"][name]["taught"] = {s: teach(name, place / f"{name}-seed{s}", s) for s in seeds}
                print(json.dumps(kept["sets"][name]["taught"], indent=1), flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(kept, indent=1, allow_nan=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
