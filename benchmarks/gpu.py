"""The paper-size pair on one GPU: steps beside their limit, and the full CIFAR-100-LT schedule, in commands of minutes.

    python benchmarks/gpu.py pack cifar100-lt.npz                      (here: some 40 MB, from $KRDISTILL_DATA)
    python benchmarks/gpu.py run cifar100-lt.npz --out DIR [--state DIR] [--minutes 9] [--epochs 240]   (there)

``run`` writes into ``--out``, as files of at most 15 MiB: ``gpu.json`` with what was measured so far, and the run
folder in parts. Give the folder of an earlier command as ``--state`` and it goes on: finished networks are not trained
again, and an unfinished training goes on from its last checkpoint where that is among the parts. It stops by itself
when its minutes are over. Order: the card's measured ceiling (bfloat16 matrix products), ``benchmarks/step.py`` in
float32 and bfloat16, then resnet32x4, its bank, and resnet8x4 by kd, kd-balanced and krdistill in the schedule of the
preset ``cifar100-lt-paper``.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from krdistill.config import load_config
from krdistill.data import DataBundle, load_data
from krdistill.data.containers import ImageData
from krdistill.events import Events
from krdistill.pipeline import Plan, check_names, run
from krdistill.runfolder import environment
from krdistill.stages import measure
from krdistill.training.task import best_device

PART_BYTES, STATE_BYTES = 15 * 2**20, 60 * 2**20


class TimeIsUpError(Exception):
    """The command's minutes are over; what is on the disk is whole."""


def pack(path: Path, factor: float) -> None:
    """CIFAR-100-LT's training and test images in one file, compressed without loss."""
    data = load_data("cifar100", profile="exp", imbalance_factor=factor)
    arrays: dict[str, Any] = {"class_names": np.array(data.class_names), "factor": np.array(factor)}
    for part, images in (("train", data.train), ("test", data.test)):
        packed = []
        for pixels in images.inputs.numpy():
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "webp", lossless=True, quality=100, method=4)
            packed.append(buffer.getvalue())
        arrays[f"{part}_sizes"] = np.array([len(p) for p in packed])
        arrays[f"{part}_images"] = np.frombuffer(b"".join(packed), dtype=np.uint8)
        arrays[f"{part}_labels"] = images.labels.numpy().astype(np.int16)
        arrays[f"{part}_ids"] = np.array(images.ids)
    np.savez(path, **arrays)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {len(data.train):,} + {len(data.test):,} images")


def unpack(path: Path) -> DataBundle:
    """What :func:`pack` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        parts, names = {}, tuple(stored["class_names"].tolist())
        for part in ("train", "test"):
            ends = stored[f"{part}_sizes"].cumsum()
            whole = stored[f"{part}_images"].tobytes()
            pixels = [
                np.asarray(Image.open(io.BytesIO(whole[end - size : end])).convert("RGB"))
                for end, size in zip(ends, stored[f"{part}_sizes"], strict=True)
            ]
            parts[part] = ImageData(
                torch.from_numpy(np.stack(pixels)), torch.from_numpy(stored[f"{part}_labels"].astype(np.int64)),
                names, tuple(stored[f"{part}_ids"].tolist()), "cifar100",
            )  # fmt: skip
        split = {"profile": "exp", "imbalance_factor": float(stored["factor"])}
    return DataBundle(train=parts["train"], test=parts["test"], name="cifar100", split=split)


def ceiling(device: torch.device) -> float:
    """TFLOP/s of large bfloat16 matrix products: what the card does at its best."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(10):
        _wait(device)
        started = time.perf_counter()
        for _ in range(5):
            a @ b
        _wait(device)
        best = max(best, 5 * 2 * n**3 / (time.perf_counter() - started) / 1e12)
    return best


class Watch(Events):
    """Stops the run when the time is up."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    def stage(self, name: str, detail: str) -> None:
        print(f"{time.strftime('%H:%M:%S')}  {name}  {detail}", flush=True)

    def progress(self, name: str, done: int, total: int) -> None:
        if time.monotonic() > self.deadline:
            raise TimeIsUpError

    def note(self, text: str) -> None:
        print(f"  {text}", flush=True)


def save_state(folder: Path, out: Path) -> None:
    """The run folder in parts; its checkpoints only where all of it stays small."""
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and "bank" not in p.parts)
    with tempfile.TemporaryFile() as whole:
        with tarfile.open(fileobj=whole, mode="w:gz", compresslevel=1) as tar:
            for path in sorted(folder.rglob("*")):
                skipped = "bank" in path.relative_to(folder).parts or path.suffix == ".lock"
                if path.is_file() and not skipped and (size < STATE_BYTES or "checkpoints" not in path.parts):
                    tar.add(path, path.relative_to(folder))
        whole.seek(0)
        for old in out.glob("state.*"):
            old.unlink()
        for number in range(100):
            part = whole.read(PART_BYTES)
            if not part:
                return
            (out / f"state.{number:02d}").write_bytes(part)


def restore_state(state: Path | None, folder: Path) -> None:
    parts = sorted(state.glob("state.*")) if state is not None and state.is_dir() else []
    if parts:
        with tarfile.open(fileobj=io.BytesIO(b"".join(p.read_bytes() for p in parts)), mode="r:gz") as tar:
            tar.extractall(folder, filter="data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("data", type=Path)
    packing.add_argument("--imbalance-factor", type=float, default=100)
    running = commands.add_parser("run")
    running.add_argument("data", type=Path)
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--state", type=Path)
    running.add_argument("--minutes", type=float, default=9)
    running.add_argument("--epochs", type=int, default=240)
    running.add_argument("--seed", type=int, default=0)
    running.add_argument("--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"))
    running.add_argument("--skip-steps", action="store_true", help="only the training")
    arguments = parser.parse_args()
    if arguments.command == "pack":
        pack(arguments.data, arguments.imbalance_factor)
        return
    deadline = time.monotonic() + 60 * arguments.minutes
    device = best_device("auto")
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    earlier = arguments.state / "gpu.json" if arguments.state else out / "gpu.json"
    found: dict[str, Any] = json.loads(earlier.read_text("utf-8")) if earlier.is_file() else {}
    found["provenance"] = environment(device)

    def note() -> None:
        (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    if "ceiling_tflops" not in found:
        found["ceiling_tflops"] = ceiling(device)
        note()
    for precision in ("float32", "bfloat16") if device.type == "cuda" and not arguments.skip_steps else ():
        if f"step_{precision}" not in found:
            target = out / f"step-{precision}.json"
            script = [str(Path(__file__).parent / "step.py"), "--device", "cuda", "--precision", precision]
            subprocess.run([sys.executable, *script, "--steps", "30", "--json", str(target)], check=True)
            found[f"step_{precision}"] = json.loads(target.read_text("utf-8"))
            target.unlink()
            note()
    data = unpack(arguments.data)
    keys = [("seed", str(arguments.seed)), ("train.epochs", str(arguments.epochs)), ("export.onnx", "false"),
            ("baselines", "[kd, kd-balanced]"), *map(tuple, arguments.set)]  # fmt: skip
    config = load_config("cifar100-lt-paper", keys)
    recipe, options, baselines = check_names(config)
    prior, groups = measure(data, config.data.groups)
    plan = Plan(config, data, prior, groups, recipe, options, baselines, device)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "run"
        restore_state(arguments.state, folder)
        try:
            found["metrics"] = run(plan, folder, events=Watch(deadline), report=False)
            found["finished"] = True
        except TimeIsUpError:
            found["finished"] = False
            print("the time is up; give --state to go on", flush=True)
        found["seconds"] = json.loads((folder / "provenance.json").read_text("utf-8")).get("seconds", {})
        save_state(folder, out)
    note()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
