"""Images per second of decoding a folder once and of reading it back, beside decoding it in every epoch.

    python benchmarks/decode.py [--threads N] [--rounds N] [--images N] [--json PATH] [--quick]

JPEG files of 500 x 375 pixels, cut from photographs, at 224 x 224, batch 64. Everything takes turns, round by round,
so that a busy machine slows all alike; medians over the rounds, ratios within the run:

``decode once``   building the cache, its file on the disk, with 0 (in this process), 1 and 2 worker processes, their
                  start included
``cached epoch``  every image once in random order from the mapped file: by plain indexing, and by the feed that reads
                  ahead. The file is in the system's memory, as after a first epoch on a machine where it fits
``DataLoader``    an epoch of torch's, decoding and resizing with Pillow in 0, 1 and 2 persistent workers, their start
                  not included
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from krdistill.data.cache import build_cache
from krdistill.data.containers import ImageData
from krdistill.data.feed import Feed

BATCH, SIDE, SOURCE = 64, 224, (500, 375)
REFERENCE = "DataLoader, 2 workers"


class Files(Dataset[Tensor]):
    """Decodes an image file whenever it is asked for."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Tensor:
        with Image.open(self.paths[row]) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(fitted))


def photographs(folder: Path, count: int) -> list[Path]:
    """JPEG files, each another part of a photograph."""
    numbers = np.random.RandomState(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    paths = [folder / f"{i:05}.jpg" for i in range(count)]
    for i, path in enumerate(paths):
        photo = photos[i % len(photos)]
        left, top = (numbers.randint(0, have - want + 1) for have, want in zip(photo.size, SOURCE, strict=True))
        photo.crop((left, top, left + SOURCE[0], top + SOURCE[1])).save(path, quality=90)
    return paths


def measure(folder: Path, count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Per job: images per second, and how many times as many as the DataLoader with two workers."""
    (folder / "jpeg").mkdir()
    paths = photographs(folder / "jpeg", count)

    def build(name: str, workers: int) -> Any:
        return build_cache(folder / name, paths, size=(SIDE, SIDE), channels=3, resize=True, workers=workers)

    images = build("kept", 0).images
    data = ImageData(images, torch.zeros(count, dtype=torch.int64), ("photograph",), tuple(map(str, paths)))
    feed = Feed(data, torch.device("cpu"))

    def order(seed: int) -> tuple[Tensor, ...]:
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).split(BATCH)

    def once(workers: int) -> Callable[[int], int]:
        return lambda seed: len(build(f"{workers}-{seed}", workers).images)

    def loader(workers: int) -> Callable[[int], int]:
        generator = torch.Generator().manual_seed(0)
        made = DataLoader(
            Files(paths), BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0, generator=generator
        )
        return lambda seed: sum(len(batch) for batch in made)

    jobs: dict[str, Callable[[int], int]] = {
        "decode once, in this process": once(0),
        "decode once, 1 worker": once(1),
        "decode once, 2 workers": once(2),
        "cached epoch, indexing": lambda seed: sum(len(data.images[rows]) for rows in order(seed)),
        "cached epoch, feed": lambda seed: sum(len(batch) for _, batch, _ in feed.run(order(seed))),
        "DataLoader, 0 workers": loader(0),
        "DataLoader, 1 worker": loader(1),
        REFERENCE: loader(2),
    }
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for seed in range(-1, rounds):  # the first warms up
        for name, job in jobs.items():
            begin = time.perf_counter()
            if job(seed) != count:
                raise SystemExit(f"{name}: not every image came")
            if seed >= 0:
                seconds[name].append(time.perf_counter() - begin)
        for built in folder.glob("[012]-*"):
            shutil.rmtree(built) if built.is_dir() else built.unlink()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        name: {"images_per_second": count / median, "times_data_loader": medians[REFERENCE] / median}
        for name, median in medians.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads for torch (default 1)")
    parser.add_argument("--rounds", type=int, default=5, help="passes over the images per job (default 5)")
    parser.add_argument("--images", type=int, default=1024, help="image files (default 1024)")
    parser.add_argument("--quick", action="store_true", help="one round of 96 images: does it run at all")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    count, rounds = (96, 1) if arguments.quick else (arguments.images, arguments.rounds)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), count, rounds)
    print(f"{'':<32}{'images/s':>12}{'x DataLoader':>14}")
    for name, row in results.items():
        print(f"{name:<32}{row['images_per_second']:>12,.0f}{row['times_data_loader']:>14.1f}")
    if arguments.json:
        provenance = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pillow": PIL.__version__,
            "machine": platform.machine(),
            "system": platform.system(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "batch": BATCH,
            "image": [SIDE, SIDE, 3],
            "source": [*SOURCE],
            "images": count,
            "rounds": rounds,
            "unix_time": int(time.time()),
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"provenance": provenance, "results": results}, indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
