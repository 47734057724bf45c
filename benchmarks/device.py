"""What a student costs where it runs: time beside its teacher's and PyTorch's, size, and what has to be installed.

    python benchmarks/device.py [--rounds N] [--seconds S] [--only PART ...] [--json PATH] [--quick]

Images of 32 x 32 (resnet20 as teacher, resnet8 as student) and sentences of 64 letters (ngram and text_cnn; their
teacher, an encoder, is no file for a device), 100 classes. Time does not depend on what was learned, so these networks
have random weights. Parts:

``latency``   ONNX Runtime, every file in float32 and int8, one thread and two, one example and 32: median and 95th
              percentile, every measurement in a process of its own (``krdistill bench-device``)
``eager``     one example in ONNX Runtime and in PyTorch as it comes, in turns within one process, for the students
``size``      bytes of every file, and of the float32 weights alone, the least that any float32 file could have
``accuracy``  what int8 costs: small students trained here (scikit-learn's digits, and Banking77 where
              ``$KRDISTILL_DATA`` has it), before and after, over all and for the rarest group
``install``   bytes of ``krdistill[runtime]`` and all it needs, from the package index, with the bytecode that pip
              writes unless told ``--no-compile`` and without; and a prediction with that alone

Files take turns, round by round; ratios are taken within a round, then their median and quartiles over the rounds.
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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from krdistill import Distiller
from krdistill.data import DataBundle, load_data
from krdistill.deploy.exporting import export_network
from krdistill.deploy.measuring import measure_file
from krdistill.deploy.onnx import deployed, export_onnx
from krdistill.deploy.quantising import calibration_images, quantise_dynamically, quantise_onnx
from krdistill.deploy.runtime import open_session
from krdistill.kinds import as_batch, encode_texts
from krdistill.models.network import Network, build_network
from krdistill.runfolder import environment

ROOT = Path(__file__).resolve().parents[1]
CLASSES, SIDE, LENGTH = 100, 32, 64
TEACHERS = {"resnet8": "resnet20", "ngram": None, "text_cnn": None}  # by student
THREADS, BATCHES = (1, 2), (1, 32)
PARTS = ("latency", "eager", "size", "accuracy", "install")
BARS = {  # what must be reached
    "size": 3.0,  # float32 : int8 of the students
    "eager": 1.0,  # PyTorch : ONNX Runtime in float32, one example
    "install_bytes": 150_000_000,
}
_BURST = 40  # calls of one side before the other has its turn
_PREDICT = "import sys; from krdistill.cli import main; sys.modules['torch'] = None; main(sys.argv[1:])"


def examples(name: str) -> torch.Tensor:
    """Noise in the shape of images, or of sentences."""
    rng = np.random.default_rng(0)
    if name.startswith("resnet"):
        return torch.from_numpy(rng.integers(0, 256, (256, SIDE, SIDE, 3), dtype=np.uint8))
    letters = rng.integers(ord("a"), ord("z") + 1, (256, LENGTH), dtype=np.uint8)
    letters[:, 5::6] = ord(" ")
    return torch.from_numpy(encode_texts([row.tobytes().decode() for row in letters]))


def network(name: str) -> Network:
    """An untrained network whose batch statistics are those of the examples."""
    rows = examples(name)
    made = build_network(name, class_names=[f"class {k}" for k in range(CLASSES)], images=rows, seed=0).train()
    with torch.no_grad():
        for part in rows.split(64):
            made(as_batch(part))
    return made.eval()


def write_files(networks: Mapping[str, Network], folder: Path) -> dict[str, dict[str, Path]]:
    """Every network as ``float32`` and ``int8``."""
    files = {}
    for name, made in networks.items():
        plain = export_onnx(made, folder / f"{name}.onnx", class_counts=[1] * CLASSES)
        small = folder / f"{name}-int8.onnx"
        if made.kind == "image":
            quantise_onnx(plain, small, examples(name)[:64])
        else:
            quantise_dynamically(plain, small)
        files[name] = {"float32": plain, "int8": small}
    return files


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Of two sides that took turns: the quotient of every round, then median and quartiles."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def latency(files: Mapping[str, Mapping[str, Path]], rounds: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of a batch in ONNX Runtime, and ratios of int8 to float32 and of teacher to student."""
    settings = [(t, b) for t in THREADS for b in BATCHES]
    taken: dict[tuple[str, str, int, int], list[tuple[float, float]]] = {}
    for number in range(rounds):
        for t, b in settings:
            for name, precisions in files.items():
                for precision, path in precisions.items():
                    (run,) = measure_file(path, threads=(t,), batches=(b,), seconds=seconds)["runs"]
                    taken.setdefault((name, precision, t, b), []).append((run["median_ms"], run["p95_ms"]))
        print(f"latency: round {number + 1} of {rounds}", flush=True)
    medians = {key: [m for m, _ in values] for key, values in taken.items()}
    return {
        "runs": [
            {
                "model": name, "precision": precision, "threads": t, "batch": b,
                "median_ms": statistics.median(medians[name, precision, t, b]),
                "p95_ms": statistics.median(p for _, p in values),
            }
            for (name, precision, t, b), values in taken.items()
        ],
        "ratios": [
            {
                "student": small, "threads": t, "batch": b,
                "float32 / int8": ratio(medians[small, "float32", t, b], medians[small, "int8", t, b]),
                **{
                    f"{big} / {precision}": ratio(medians[big, "float32", t, b], medians[small, precision, t, b])
                    for precision in ("float32", "int8")
                    if big
                },
            }
            for small, big in TEACHERS.items()
            for t, b in settings
        ],
    }  # fmt: skip


def eager(
    networks: Mapping[str, Network], files: Mapping[str, Mapping[str, Path]], rounds: int
) -> list[dict[str, Any]]:
    """One example at a time: PyTorch as it comes beside ONNX Runtime, for the students."""
    found = []
    before = torch.get_num_threads()
    for name in TEACHERS:
        one = as_batch(examples(name)[:1]).contiguous()
        module = deployed(networks[name])
        for threads in THREADS:
            torch.set_num_threads(threads)
            jobs: dict[str, Callable[[], object]] = {"torch": partial(module, one)}
            for precision, path in files[name].items():
                session = open_session(path, threads=threads)
                feed = {session.get_inputs()[0].name: one.numpy()}
                jobs[precision] = partial(session.run, None, feed)
            taken: dict[str, list[float]] = {side: [] for side in jobs}
            with torch.inference_mode():
                for number in range(-1, rounds):  # the first round warms up
                    for side, job in jobs.items():
                        times = []
                        for _ in range(_BURST):
                            started = time.perf_counter()
                            job()
                            times.append(time.perf_counter() - started)
                        if number >= 0:
                            taken[side].append(1000 * statistics.median(times))
            found.append(
                {
                    "model": name, "threads": threads,
                    "median_ms": {side: statistics.median(values) for side, values in taken.items()},
                    "torch / float32": ratio(taken["torch"], taken["float32"]),
                    "torch / int8": ratio(taken["torch"], taken["int8"]),
                }
            )  # fmt: skip
    torch.set_num_threads(before)
    return found


def size(networks: Mapping[str, Network], files: Mapping[str, Mapping[str, Path]]) -> list[dict[str, Any]]:
    """Bytes of the files, and how many times smaller int8 is than the file in float32, and than its weights alone."""
    rows = []
    for name, precisions in files.items():
        float32, int8 = (precisions[p].stat().st_size for p in ("float32", "int8"))
        weights = 4 * networks[name].parameter_count
        rows.append(
            {
                "model": name, "parameters": networks[name].parameter_count, "float32_bytes": float32,
                "int8_bytes": int8, "weights_bytes": weights, "float32 / int8": float32 / int8,
                "weights / int8": weights / int8,
            }
        )  # fmt: skip
    return rows


def accuracy(epochs: int) -> list[dict[str, Any]]:
    """What int8 loses on students that were trained: points over all and of the rarest group."""
    asked: list[tuple[str, DataBundle, dict[str, Any]]] = [
        ("resnet8", load_data("digits", profile="exp", imbalance_factor=20), {"augmentation": "crop-only"})
    ]
    root = os.environ.get("KRDISTILL_DATA")
    if root and (Path(root) / "text" / "banking77_train.csv").is_file():
        sentences = load_data("banking77", profile="exp", imbalance_factor=50, n_max=105)
        schedule = {"augmentation": "none", "optimizer": "adamw", "lr": 0.01, "weight_decay": 0.01}
        asked += [(name, sentences, schedule) for name in ("ngram", "text_cnn")]
    rows = []
    for name, data, schedule in asked:
        train = {"epochs": epochs, "batch_size": 64, "evaluate_every": epochs, **schedule}
        distiller = Distiller(None, name, "none", train=train, groups="thirds").fit(data)
        assert distiller.student_ is not None
        images = calibration_images(data.train) if data.train.kind == "image" else None
        with tempfile.TemporaryDirectory() as folder:
            report = export_network(
                distiller.student_, Path(folder) / "int8.onnx", test=data.test, groups=distiller.groups_,
                precision="int8", calibration=images, max_drop=100, max_rare_drop=100,
            )  # fmt: skip
        kept = ("noun", "images", "agreement", "largest_difference", "before", "after", "drop", "bytes", "float32")
        rows.append({"model": name, "data": data.train.name, **{key: report[key] for key in kept}})
        print(f"accuracy: {name} on {data.train.name}", flush=True)
    return rows


def install(files: Mapping[str, Mapping[str, Path]]) -> dict[str, Any]:
    """Installs ``krdistill[runtime]`` into an empty folder, and predicts with nothing but that."""
    with tempfile.TemporaryDirectory() as place:
        target = Path(place) / "installed"
        command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--target", str(target)]
        subprocess.run([*command, f"{ROOT}[runtime]"], check=True)
        sizes: dict[str, int] = {}
        bytecode = 0
        for path in target.rglob("*"):
            if path.is_file() and not path.is_symlink():
                first = path.relative_to(target).parts[0]
                sizes[first] = sizes.get(first, 0) + path.stat().st_size
                bytecode += path.stat().st_size if path.suffix == ".pyc" else 0
        image = Path(place) / "image.png"
        Image.new("RGB", (SIDE, SIDE)).save(image)
        file = files["resnet8"]["int8"]
        # Without this environment's packages (-S); those that were just installed are all there is.
        done = subprocess.run(
            [sys.executable, "-S", "-c", _PREDICT, "predict", str(file), str(image), "--format", "jsonl"],
            env={**os.environ, "PYTHONPATH": str(target), "PYTHONNOUSERSITE": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode or "class" not in json.loads(done.stdout):
            sys.exit(f"krdistill[runtime] by itself cannot predict: {done.stderr.strip()[-500:]}")
    largest = dict(sorted(sizes.items(), key=lambda item: -item[1])[:8])
    return {"bytes": sum(sizes.values()), "bytecode": bytecode, "largest": largest, "torch": "torch" in sizes}


def show(found: Mapping[str, Any]) -> None:
    """Prints what was measured."""
    for row in found.get("latency", {}).get("runs", ()):
        print(
            f"{row['model']:<10}{row['precision']:<9}{row['threads']} thread(s), batch {row['batch']:<4}"
            f"{row['median_ms']:9.3f} ms   p95 {row['p95_ms']:9.3f} ms"
        )
    for row in found.get("latency", {}).get("ratios", ()):
        words = ", ".join(f"{k} {v['median']:.2f}" for k, v in row.items() if isinstance(v, dict))
        print(f"{row['student']}, {row['threads']} thread(s), batch {row['batch']}: {words}")
    for row in found.get("eager", ()):
        words = ", ".join(f"{k} {v:.3f} ms" for k, v in row["median_ms"].items())
        bar = f"torch / float32 {row['torch / float32']['median']:.2f} (bar {BARS['eager']:g})"
        print(f"{row['model']}, {row['threads']} thread(s), one example: {words}; {bar}")
    for row in found.get("size", ()):
        print(
            f"{row['model']:<10}{row['float32_bytes'] / 1024:8.1f} KiB, int8 {row['int8_bytes'] / 1024:8.1f} KiB: "
            f"{row['float32 / int8']:.2f} times (bar {BARS['size']:g})"
        )
    for row in found.get("accuracy", ()):
        drop = row["drop"]
        print(
            f"{row['model']} on {row['data']}: int8 loses {drop['all']:.2f} points of "
            f"{100 * row['before']['top1']:.1f}, {drop['rarest']:.2f} on {drop['rarest_group']}"
        )
    if "install" in found:
        own = found["install"]
        words = ", ".join(f"{name} {n / 1e6:.1f}" for name, n in own["largest"].items())
        bare = (own["bytes"] - own["bytecode"]) / 1e6
        print(
            f"krdistill[runtime]: {bare:.1f} MB (bar {BARS['install_bytes'] / 1e6:g}), "
            f"with the bytecode that pip writes {own['bytes'] / 1e6:.1f}: {words}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="rounds (default 7)")
    parser.add_argument("--seconds", type=float, default=0.3, help="of every measurement of a file (default 0.3)")
    parser.add_argument("--epochs", type=int, default=20, help="of the students of accuracy (default 20)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts (default all)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--quick", action="store_true", help="one short round, one epoch: does it run?")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.seconds, arguments.epochs = 1, 0.01, 1
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        names = dict.fromkeys(name for pair in TEACHERS.items() for name in pair[::-1] if name)
        networks = {name: network(name) for name in names}
        files = write_files(networks, Path(folder))
        if "latency" in arguments.only:
            found["latency"] = latency(files, arguments.rounds, arguments.seconds)
        if "eager" in arguments.only:
            found["eager"] = eager(networks, files, arguments.rounds)
        if "size" in arguments.only:
            found["size"] = size(networks, files)
        if "accuracy" in arguments.only:
            found["accuracy"] = accuracy(arguments.epochs)
        if "install" in arguments.only:
            found["install"] = install(files)
    show(found)
    if arguments.json:
        provenance = {
            **environment(torch.device("cpu")), "classes": CLASSES, "rounds": arguments.rounds,
            "seconds": arguments.seconds, "epochs": arguments.epochs,
        }  # fmt: skip
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(
            json.dumps({"provenance": provenance, "bars": BARS, **found}, indent=1) + "\n", "utf-8"
        )


if __name__ == "__main__":
    main()
