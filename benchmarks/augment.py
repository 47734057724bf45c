"""Images per second of the augmentations, beside a loop over single images in Pillow.

    python benchmarks/augment.py [--threads N] [--rounds N] [--json PATH]

Batches of 128 colour images of 32 x 32 pixels, uint8, channels-last, as training has them. Everything takes turns,
round by round, so that a busy machine slows all alike; medians over the rounds, ratios within the run. Pillow's loop
does crop and flip alone: image from array, pad, crop, flip half, back to an array, stack.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
import torch
from PIL import Image, ImageOps

from krdistill.data.augment import build_augmentation, mixup
from krdistill.data.augment_names import list_augmentations

BATCH, SIDE, PADDING = 128, 32, 4
PILLOW = "Pillow loop, crop-flip"


def pillow_crop_flip(pixels: npt.NDArray[np.uint8], numbers: random.Random) -> torch.Tensor:
    """Crop and flip, image by image."""
    views = []
    for array in pixels:
        image = ImageOps.expand(Image.fromarray(array), PADDING)
        left, top = numbers.randint(0, 2 * PADDING), numbers.randint(0, 2 * PADDING)
        image = image.crop((left, top, left + SIDE, top + SIDE))
        if numbers.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        views.append(np.asarray(image))
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Per augmentation: images per second, and how many times as many as Pillow's loop."""
    pixels = np.random.RandomState(0).randint(0, 256, (BATCH, SIDE, SIDE, 3)).astype(np.uint8)
    images, index, numbers = torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.arange(BATCH), random.Random(0)

    def by_name(name: str) -> Callable[[int], Any]:
        augment = build_augmentation(name, SIDE)
        return lambda epoch: augment(images, index, seed=0, epoch=epoch)

    jobs: dict[str, Callable[[int], Any]] = {PILLOW: lambda epoch: pillow_crop_flip(pixels, numbers)}
    jobs |= {name: by_name(name) for name in list_augmentations() if name != "none"}
    jobs["mixup"] = lambda epoch: mixup(images, alpha=0.4, seed=0, epoch=epoch, step=0)
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for epoch in range(-3, rounds):  # the first three warm up
        for name, job in jobs.items():
            begin = time.perf_counter()
            job(epoch)
            if epoch >= 0:
                seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        name: {"images_per_second": BATCH / median, "times_pillow_crop_flip": medians[PILLOW] / median}
        for name, median in medians.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads for torch (default 1)")
    parser.add_argument("--rounds", type=int, default=200, help="batches per augmentation (default 200)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = measure(arguments.rounds)
    print(f"{'':<24}{'images/s':>12}{'x Pillow':>10}")
    for name, row in results.items():
        print(f"{name:<24}{row['images_per_second']:>12,.0f}{row['times_pillow_crop_flip']:>10.1f}")
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
            "rounds": arguments.rounds,
            "unix_time": int(time.time()),
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"provenance": provenance, "results": results}, indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
