"""Kills real runs with SIGKILL at random moments, has them go on, and compares what they come to.

    python tests/crash/harness.py --kills 200 --json benchmarks/results/crash.json

Every run is the whole job on a long-tailed cut of real digits: teacher, diagnosis, stored answers, two students,
evaluation, report. One run is never stopped. The others are killed several times each, in moments drawn from a seed:
first a stage (all alike, so that short ones are met as often as long ones), then a moment within it. When they have
been let through to their end, they must have the metrics, the log, the weights, the predictions and the stored answers
of the first, bit for bit, and nothing left over.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # torch imports it where it trains; here, so that it is not done again in every process

import krdistill.reporting  # noqa: F401
from krdistill import stages
from krdistill.config import load_config
from krdistill.events import Events
from krdistill.files import half_written, write_json
from krdistill.pipeline import prepare, run
from krdistill.runfolder import environment

CONFIG: dict[str, Any] = {
    "name": "crash",
    "data": {"source": "digits", "profile": "exp", "imbalance_factor": 10, "groups": "thirds", "n_max": 60},
    "teacher": {"model": "resnet8w8"},
    "student": {"model": "resnet8w8"},
    "train": {"epochs": 3, "batch_size": 32, "augmentation": "crop-only", "evaluate_every": 1},
    "recipe": "krdistill",
    "baselines": ["kd"],
    "bank": {"views": 2},
    "export": {"onnx": False},
}
CHECKPOINT_SECONDS = 0.02
KILLS_PER_RUN = 5
LIMIT_SECONDS = 120.0  # of one attempt; it is hanging then
OPENING = "opening"


class Telling(Events):
    """Says which stage begins, through a pipe."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def stage(self, name: str, detail: str) -> None:
        os.write(self.pipe, f"{name}\n".encode())


class Attempt:
    """A process that runs the job in a folder."""

    def __init__(self, folder: Path) -> None:
        self.pipe, told = os.pipe()
        self.began = time.monotonic()
        self.pid = os.fork()
        if self.pid:
            os.close(told)
            return
        status = 1
        try:
            os.close(self.pipe)
            with (folder.parent / f"{folder.name}.txt").open("a") as printed:
                for stream in (1, 2):
                    os.dup2(printed.fileno(), stream)
            stages.CHECKPOINT_SECONDS = CHECKPOINT_SECONDS
            run(prepare(load_config(CONFIG)), folder, events=Telling(told))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def heard(self, seconds: float) -> list[str] | None:
        """Stages that began within some seconds; None where the process has ended."""
        if not select.select([self.pipe], [], [], max(0.0, seconds))[0]:
            return []
        said = os.read(self.pipe, 4096).decode()
        return said.split() if said else None

    def follow(self) -> dict[str, float]:
        """Waits for its end: when each stage began, in seconds from its start, and ``""``: the end."""
        found = {OPENING: 0.0}
        while (said := self.heard(LIMIT_SECONDS)) is not None:
            if not said:
                self.kill()
                raise RuntimeError(f"nothing was heard for {LIMIT_SECONDS:g} seconds")
            found.update(dict.fromkeys(said, time.monotonic() - self.began))
        found[""] = time.monotonic() - self.began
        return found

    def kill(self) -> bool:
        """Whether the process was alive still."""
        os.kill(self.pid, signal.SIGKILL)
        return os.WIFSIGNALED(self.end())

    def end(self) -> int:
        os.close(self.pipe)
        return os.waitpid(self.pid, 0)[1]


def kill_in(folder: Path, moment: tuple[int, float], lengths: Mapping[str, float]) -> str | None:
    """Has the job go on in a folder, and kills it in a stage, or the next one that is left: which; None if none was."""
    order = list(lengths)
    attempt, met = Attempt(folder), OPENING
    while order.index(met) < moment[0]:
        said = attempt.heard(LIMIT_SECONDS)
        if said is None:
            attempt.end()
            return None
        met = max((met, *said), key=order.index)
    time.sleep(moment[1] * lengths[met])
    return met if attempt.kill() else None


def differences(a: Path, b: Path) -> list[str]:
    """What a run has otherwise than the one that was never stopped."""
    found = []
    names = ["metrics.json", *(str(p.relative_to(a)) for p in a.rglob("*") if p.suffix in (".safetensors", ".bin"))]
    found += [n for n in names if not (b / n).is_file() or (a / n).read_bytes() != (b / n).read_bytes()]
    logs = [[json.loads(line) for line in (p / "log.jsonl").read_text().splitlines()] for p in (a, b)]
    for line in (line for log in logs for line in log):
        del line["seconds"]
    found += ["log.jsonl"] if logs[0] != logs[1] else []
    with np.load(a / "predictions.npz") as first, np.load(b / "predictions.npz") as second:
        same = first.files == second.files and all(np.array_equal(first[n], second[n]) for n in first.files)
    found += [] if same else ["predictions.npz"]
    files = [{str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()} for f in (a, b)]
    found += [f"{name} (left over or missing)" for name in sorted(files[0] ^ files[1])]
    return found + [f"{p.name} (half written)" for p in b.rglob(".*") if half_written(p) is not None]


def torture(root: Path, kills: int, seed: int) -> dict[str, Any]:
    """Does it; the result says how many kills met which stage, and what differed in which run."""
    began, rng, provenance = time.monotonic(), random.Random(seed), environment(torch.device("cpu"))
    whole = root / "whole"
    first = Attempt(whole)
    times = first.follow()
    if first.end():
        raise RuntimeError((root / "whole.txt").read_text())
    bounds = [*times.values()]
    lengths = {name: b - a for name, a, b in zip(times, bounds, bounds[1:], strict=False)}
    met: Counter[str] = Counter()
    wrong: dict[str, list[str]] = {}
    runs = 0
    while met.total() < kills:
        folder = root / f"run-{runs}"
        number = min(KILLS_PER_RUN, kills - met.total())
        for moment in sorted((rng.randrange(len(lengths)), rng.random()) for _ in range(number)):
            stage = kill_in(folder, moment, lengths)
            met.update([stage] if stage is not None else [])
        last = Attempt(folder)
        last.follow()
        found = ["it does not go on"] if last.end() else differences(whole, folder)
        if found:
            wrong[f"run-{runs}"] = [*found, (root / f"run-{runs}.txt").read_text()[-2000:]]
        else:
            shutil.rmtree(folder)
        runs += 1
    return {
        "kills": met.total(),
        "runs": runs,
        "by_stage": {name: met[name] for name in lengths},
        "stage_seconds": {name: round(s, 3) for name, s in lengths.items()},
        "runs_that_differ": wrong,
        "seed": seed,
        "checkpoint_seconds": CHECKPOINT_SECONDS,
        "config": CONFIG,
        "seconds": round(time.monotonic() - began, 1),
        "provenance": provenance,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the result goes")
    given = parser.parse_args()
    torch.set_num_threads(1)  # the runs are forked off: no thread may be lost on the way
    prepare(load_config(CONFIG))  # imports what all of them need
    root = Path(tempfile.mkdtemp(prefix="krdistill-crash-"))
    result = torture(root, given.kills, given.seed)
    if given.json:
        write_json(given.json, result)
    print(json.dumps({k: v for k, v in result.items() if k not in ("config", "provenance")}, indent=1))
    if result["runs_that_differ"]:
        sys.exit(f"Some runs differ; they are kept in {root}.")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
