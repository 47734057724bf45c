"""What a step and a bank cost as classes, width, data and processes grow.

    python benchmarks/scaling.py [--threads N] [--rounds N] [--json PATH] [--quick]

``loss``       forward and backward of KRDistill's objective on random outputs of 128 images, over K and D
``bank``       a bank's size, the rate of reading its batches in random order, and of its checksum, over N
``processes``  one epoch of a small run (digits scaled to 32 x 32, resnet20 to resnet20) on 1 and 2 processes of one
               thread each, at the same global batch
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from krdistill.bank import Coding, build_bank
from krdistill.data.augment import build_augmentation
from krdistill.data.containers import ImageData
from krdistill.data.long_tail import long_tail_counts
from krdistill.objective import ObjectiveContext, TeacherProfile
from krdistill.outputs import Outputs, Step
from krdistill.priors import ClassPrior
from krdistill.recipes import recipe
from krdistill.runfolder import environment

BATCH = 128
SIZES = ((100, 64), (100, 256), (100, 2048), (1000, 256), (8142, 256))
ROWS = (10_000, 100_000)


def _median(job: Callable[[], Any], rounds: int) -> float:
    taken = []
    for number in range(-2, rounds):
        started = time.perf_counter()
        job()
        if number >= 0:
            taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def loss_cost(K: int, D: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of KRDistill's loss and its gradient."""
    counts = long_tail_counts(K, 500, profile="exp", imbalance_factor=100)
    prior = ClassPrior.from_counts(counts)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    labels = torch.arange(BATCH) % K
    means = torch.nn.functional.normalize(noise(K, D), dim=1)
    rows = torch.arange(2 * K) % K
    profile = TeacherProfile(means, noise(2 * K, K) if K < 2000 else noise(K, K), rows[: 2 * K if K < 2000 else K],
                             "noise", noise(BATCH, D), labels)  # fmt: skip
    entry = recipe("krdistill")
    context = ObjectiveContext(prior, prior.groups("thirds"), D, profile)
    objective = entry.build(entry.resolve({}), context)
    logits, feature = noise(BATCH, K).requires_grad_(), noise(BATCH, D).requires_grad_()
    answer = Outputs(noise(BATCH, K), noise(BATCH, D))

    def job() -> None:
        objective(Step(Outputs(logits, feature), labels, answer, labels, 0.5)).total().mean().backward()

    return {"classes": K, "width": D, "milliseconds": 1e3 * _median(job, rounds)}


class _Answers(nn.Module):
    """Answers at once: what is timed is the bank."""

    def __init__(self, K: int, D: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(256, K + D), requires_grad=False)
        self.K = K

    def forward(self, images: torch.Tensor) -> Outputs:
        both = self.table[images.flatten(1)[:, 0].long()]
        return Outputs(both[:, : self.K], both[:, self.K :])


def bank_cost(rows: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Size and speed of a bank of one view of 100 classes and 64 features."""
    images = torch.randint(0, 256, (rows, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = ImageData.from_arrays(images, torch.arange(rows) % 100, [str(k) for k in range(100)])
    coding, device = Coding(100, 64), torch.device("cpu")
    started = time.perf_counter()
    bank = build_bank(
        _Answers(100, 64), data, build_augmentation("crop-flip", 8), views=1, root=folder / str(rows), seed=0,
        coding=coding, device=device,
    )  # fmt: skip
    built = time.perf_counter() - started
    started = time.perf_counter()
    bank.check(0)
    checked = time.perf_counter() - started
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    batches = iter([order[i : i + BATCH] for i in range(0, rows - BATCH, BATCH)] * 50)
    read = _median(lambda: bank.read(0, next(batches), device), max(50, rounds))
    return {
        "images": rows, "mib": bank.bytes / 2**20, "images_per_second_written": rows / built,
        "images_per_second_read": BATCH / read, "seconds_to_check": checked,
    }  # fmt: skip


_RUN = ["-m", "krdistill", "run", "digits-lt", "--data.profile", "none", "--data.imbalance_factor", "1",
        "--data.image_size", "32", "--teacher.model", "resnet20", "--student.model", "resnet20",
        "--train.epochs", "2", "--train.batch_size",
        "128", "--baselines", "[]", "--bank.views", "0", "--export.onnx", "false", "--device", "cpu"]  # fmt: skip


def process_cost(processes: int) -> dict[str, Any]:
    """Seconds of the second epoch of distillation, by the run's own log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, *(start if processes > 1 else []), *_RUN, "--out", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    return {
        "processes": processes,
        "seconds": next(x["seconds"] for x in lines if x["stage"] == "student" and x["epoch"] == 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads for torch (default 1)")
    parser.add_argument("--rounds", type=int, default=20, help="rounds (default 20)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes, once: does it run?")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rounds = 1 if arguments.quick else arguments.rounds
    loss = [loss_cost(K, D, rounds) for K, D in (SIZES[:1] if arguments.quick else SIZES)]
    with tempfile.TemporaryDirectory() as folder:
        banks = [bank_cost(n, rounds, Path(folder)) for n in ((1000,) if arguments.quick else ROWS)]
    processes = [process_cost(n) for n in ((1,) if arguments.quick else (1, 2))]
    for row in (*loss, *banks, *processes):
        print("  ".join(f"{name} {value:,.3g}" for name, value in row.items()))
    if arguments.json:
        provenance = {**environment(torch.device("cpu")), "batch": BATCH, "rounds": rounds}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"provenance": provenance, "loss": loss, "bank": banks, "processes": processes}, indent=1)
        arguments.json.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
