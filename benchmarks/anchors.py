"""Time, memory and quality of balanced anchors and their alignment.

    python benchmarks/anchors.py [--threads N] [--json PATH]

Every size runs in a process of its own, so that its peak resident memory is its own. Class means are synthetic:
superclasses with a decaying spectrum, cut at zero like features after a ReLU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZES = ((100, 64), (1000, 512), (8142, 512))
TEMPERATURE = 0.07


def peak_mib() -> float:
    """Peak resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def measure(num_classes: int, dim: int, threads: int) -> dict[str, Any]:
    """One size, in this process."""
    import torch
    from torch.nn import functional as F

    from krdistill.anchors import align_anchors, balanced_anchors

    if threads:
        torch.set_num_threads(threads)
    K, D = num_classes, dim

    def quality(anchors: Any) -> dict[str, float]:
        uniformity, largest, nearest, total = 0.0, -1.0, 0.0, 0.0
        for start in range(0, K, 512):
            cosine = anchors[start : start + 512].float() @ anchors.float().T
            diagonal = cosine.diagonal(start)
            total += float(cosine.double().sum() - diagonal.double().sum())
            diagonal.fill_(-math.inf)
            top = cosine.amax(1)
            largest = max(largest, float(top.max()))
            nearest += float(top.sum()) / K
            uniformity += float((cosine / TEMPERATURE).logsumexp(1).sum()) / K
        return {
            "mean_cosine": total / (K * (K - 1)),
            "mean_nearest_cosine": nearest,
            "max_cosine": largest,
            "uniformity": uniformity - math.log(K - 1),
        }

    generator = torch.Generator().manual_seed(1)
    parents = torch.randn(max(2, K // 10), D, generator=generator)
    means = parents[torch.arange(K) % len(parents)] + 0.7 * torch.randn(K, D, generator=generator)
    means *= torch.arange(1, D + 1).rsqrt()
    means = means @ torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
    means = F.normalize(torch.relu(means + 0.3 * means.std()), dim=1)
    at_start = peak_mib()

    begin = time.perf_counter()
    anchors = balanced_anchors(K, D)
    seconds = time.perf_counter() - begin
    anchors_peak = peak_mib()
    result: dict[str, Any] = {
        "num_classes": K,
        "dim": D,
        "threads": torch.get_num_threads(),
        "peak_mib_at_start": at_start,
        "balanced_anchors": {"seconds": seconds, "peak_mib": anchors_peak, **quality(anchors)},
        "random_unit_vectors": quality(F.normalize(torch.randn(K, D, generator=generator), dim=1)),
    }
    begin = time.perf_counter()
    aligned = align_anchors(anchors, means)
    result["align_anchors"] = {
        "seconds": time.perf_counter() - begin,
        "peak_mib": peak_mib(),
        "mean_cosine_to_class_before": float((anchors * means).sum(1).mean()),
        "mean_cosine_to_class_after": float((aligned * means).sum(1).mean()),
        "max_cosine": quality(aligned)["max_cosine"],
    }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the measurements here")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; by default torch's own choice")
    parser.add_argument("--size", type=int, nargs=2, metavar=("K", "D"), help="measure this size alone, print JSON")
    options = parser.parse_args()
    if options.size:
        num_classes, dim = options.size
        print(json.dumps(measure(num_classes, dim, options.threads)))
        return
    results = []
    for K, D in SIZES:
        command = [sys.executable, __file__, "--size", str(K), str(D), "--threads", str(options.threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout)
        results.append(row)
        made, turned, chance = row["balanced_anchors"], row["align_anchors"], row["random_unit_vectors"]
        print(
            f"K {K:5d}  D {D:4d}  anchors {made['seconds']:7.2f} s  {made['peak_mib']:6.0f} MiB  "
            f"max cos {made['max_cosine']:+.4f} (random {chance['max_cosine']:+.4f})  "
            f"uniformity {made['uniformity']:+.4f} (random {chance['uniformity']:+.4f})  |  "
            f"align {turned['seconds']:6.2f} s  {turned['peak_mib']:6.0f} MiB  "
            f"cos to class {turned['mean_cosine_to_class_before']:+.3f} -> {turned['mean_cosine_to_class_after']:+.3f}",
            flush=True,
        )
    if options.json:
        import scipy
        import torch

        provenance = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "scipy": scipy.__version__,
            "machine": platform.machine(),
            "system": platform.system(),
            "cpus": os.cpu_count(),
            "threads": results[0]["threads"],
            "uniformity_temperature": TEMPERATURE,
            "unix_time": int(time.time()),
        }
        options.json.write_text(json.dumps({"provenance": provenance, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
