"""What the balanced classifier that answers for the teacher costs to fit, and what its penalty does, as classes grow.

    python benchmarks/refit.py [--threads N] [--json PATH] [--quick]

``cost``     one evaluation of the objective and its gradient, whole in float64 and in pieces in float32, each in a
             process of its own, so that its peak resident memory is its own; up to the size of ImageNet-LT
``penalty``  accuracy on new features of a classifier fitted with the default penalty and with a fixed one

Features are synthetic: Gaussian clouds about random class centres, cut at zero as after a ReLU; class sizes fall
exponentially. New features are noisier than those fitted to, as a trained network's are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from anchors import peak_mib
from scipy.optimize import minimize
from torch import Tensor

from krdistill.rectify import classifier_refit, refit_classifier
from krdistill.runfolder import environment

SIZES = ((10_847, 100, 64), (20_000, 1_000, 256), (115_846, 1_000, 512))
PENALTIES = ((10_847, 100, 100.0), (20_000, 1_000, 256.0))  # images, classes, imbalance factor
FIXED = 1e-5
SEEDS = (0, 1, 2)
WAYS = {"whole, float64": 1 << 62, "pieces, float32": 0}


def class_sizes(images: int, classes: int, imbalance_factor: float) -> Tensor:
    """Images per class, at least two."""
    share = imbalance_factor ** -(torch.arange(classes) / (classes - 1))
    return (share / share.sum() * images).round().clamp_min(2).long()


def draw(centres: Tensor, sizes: Tensor, noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Features and labels."""
    labels = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    clouds = centres[labels] + noise * torch.randn(len(labels), centres.shape[1], generator=generator)
    return clouds.relu_(), labels


def cost(images: int, classes: int, dim: int, way: str, evaluations: int, threads: int) -> dict[str, float]:
    """Seconds of an evaluation, and peak memory of this process with all that is imported and the features."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % classes
    features = torch.rand(images, dim, generator=generator)  # clouds would take more memory than what is measured
    features[:, :4] += 4 * torch.rand(classes, 4, generator=generator)[labels]
    taken: list[float] = []

    def timed(value: Any, start: Any, **options: Any) -> Any:
        def clocked(x: Any) -> Any:
            begin = time.perf_counter()
            found = value(x)
            taken.append(time.perf_counter() - begin)
            return found

        return minimize(clocked, start, **options)

    classifier_refit._WHOLE = WAYS[way]
    classifier_refit.minimize = timed
    refit_classifier(features, labels, classes, max_steps=evaluations)
    return {"seconds": statistics.median(taken[1:]), "mib": peak_mib()}


def penalty(images: int, classes: int, imbalance_factor: float, seed: int) -> dict[str, Any]:
    """Accuracy over all classes and over the rarest third, by the default penalty and by a fixed one."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 64, generator=generator)
    features, labels = draw(centres, class_sizes(images, classes, imbalance_factor), 1.0, generator)
    new, truth = draw(centres, torch.full((classes,), 20), 1.2, generator)
    rare = truth >= classes - classes // 3
    result: dict[str, Any] = {}
    for name, given in (("default", None), ("fixed", FIXED)):
        weight, bias = refit_classifier(features, labels, classes, weight_decay=given)
        right = ((new @ weight.T + bias).argmax(1) == truth).double()
        result[name] = {"all": float(right.mean()), "rarest third": float(right[rare].mean())}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads for torch (default 1)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--quick", action="store_true", help="small sizes, once: does it run?")
    parser.add_argument("--cost", nargs=5, metavar=("N", "K", "D", "WAY", "EVALUATIONS"), help="this alone, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.cost:
        N, K, D, way, evaluations = arguments.cost
        print(json.dumps(cost(int(N), int(K), int(D), way, int(evaluations), arguments.threads)))
        return
    costs = []
    for N, K, D in ((500, 20, 8),) if arguments.quick else SIZES:
        row: dict[str, Any] = {"images": N, "classes": K, "width": D}
        for way in WAYS:
            command = [
                sys.executable,
                __file__,
                "--threads",
                str(arguments.threads),
                "--cost",
                *map(str, (N, K, D, way, 3)),
            ]
            row[way] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        costs.append(row)
        shown = "; ".join(f"{way} {row[way]['seconds']:.3f} s, {row[way]['mib']:,.0f} MiB" for way in WAYS)
        print(f"{N:,} x {K:,} x {D}: {shown}", flush=True)
    penalties = []
    for N, K, factor in ((600, 30, 20.0),) if arguments.quick else PENALTIES:
        sizes = class_sizes(N, K, factor)
        found = [penalty(N, K, factor, seed) for seed in (SEEDS[:1] if arguments.quick else SEEDS)]
        penalties.append(
            {
                "images": int(sizes.sum()),
                "classes": K,
                "largest": int(sizes[0]),
                "smallest": int(sizes[-1]),
                "seeds": found,
            }
        )
        print(penalties[-1], flush=True)
    if arguments.json:
        provenance = {**environment(torch.device("cpu")), "fixed": FIXED, "seeds": list(SEEDS)}
        text = json.dumps({"provenance": provenance, "cost": costs, "penalty": penalties}, indent=1)
        arguments.json.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
