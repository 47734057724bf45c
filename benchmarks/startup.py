"""How long the command line takes to answer, beside an empty Python.

    python benchmarks/startup.py [--rounds N] [--json PATH]

Each command is started anew as its own process, in turns, round by round; medians. ``peak`` is the largest resident
memory of a short run of the preset ``cifar100-lt`` (one epoch of teacher and student), where the data are at hand.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from krdistill.runfolder import environment

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "krdistill --help": ["-m", "krdistill", "--help"],
    "krdistill list": ["-m", "krdistill", "list"],
    "krdistill run --help": ["-m", "krdistill", "run", "--help"],
}
BAR_SECONDS = 0.5
_PEAK = """
import resource, sys
from pathlib import Path
from krdistill.config import load_config
from krdistill.pipeline import prepare, run
run(prepare(load_config("cifar100-lt", [("train.epochs", "1"), ("baselines", "[]")])), Path(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def seconds(rounds: int) -> dict[str, float]:
    """Median wall time of each command."""
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(-1, rounds):  # the first round warms the disk's cache
        for name, arguments in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            if number >= 0:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in taken.items()}


def peak_mib() -> float | None:
    """Peak resident memory of one epoch of CIFAR-100-LT, teacher and student, export and report included."""
    if not os.environ.get("KRDISTILL_DATA"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", _PEAK, str(Path(folder) / "run")], check=True, capture_output=True, text=True
        )
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return float(done.stdout.split()[-1]) / unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="starts of each command (default 15)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"seconds": seconds(arguments.rounds), "bar_seconds": BAR_SECONDS, "peak_mib": peak_mib()}
    for name, value in found["seconds"].items():
        print(f"{name:<24}{value:.3f} s")
    if found["peak_mib"] is not None:
        print(f"{'peak of a CIFAR run':<24}{found['peak_mib']:.0f} MiB")
    if arguments.json:
        provenance = {**environment(torch.device("cpu")), "rounds": arguments.rounds}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"provenance": provenance, **found}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
