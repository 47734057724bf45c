"""The price of a distillation step: with the teacher asked, from a bank, and in a plain loop.

    python benchmarks/step.py [--threads N] [--rounds N] [--steps N] [--device cpu] [--json PATH] [--quick]

Two pairs of networks, 32 x 32 images of 100 classes, batch 64. Per pair, in turns within every round:

``bare``       teacher forward, student forward, cross-entropy, backward, SGD on one batch that is ready: the limit
``student``    training the student alone (recipe ``none``): augmentation, step and log included
``krdistill``  training with the recipe ``krdistill``, the teacher asked in every step
``bank``       the same from a view bank on disk
``compiled``   training the student alone with ``train.compile default``; the time it takes to compile is apart
``plain``      distillation as the field's repositories write it: a DataLoader with workers, crop and flip image by
               image in Pillow, float images, the teacher asked in the loop under ``no_grad``, KL and cross-entropy as
               separate torch calls, loss and accuracy read back by ``.item()`` in every step

Ratios are taken within a round, then their median over the rounds; the spread is their quartiles. The plain loop's
workers start anew in every round, and its first steps are not timed, so that its queue is as in a long epoch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from krdistill.bank import Answers, Coding, build_bank
from krdistill.config import TrainConfig
from krdistill.data.augment import build_augmentation
from krdistill.data.containers import DataBundle, Examples, ImageData
from krdistill.data.long_tail import long_tail_counts
from krdistill.models.network import Network, build_network
from krdistill.models.teacher import Teacher
from krdistill.recipes import recipe
from krdistill.runfolder import environment
from krdistill.stages import build_task, measure, profile_teacher
from krdistill.training.loop import Trainer
from krdistill.training.task import place

BATCH, CLASSES, SIDE = 64, 100, 32
PAIRS = (("resnet32x4", "resnet8x4"), ("resnet56", "resnet20"))
BARS = {  # what must be reached on two cores: numerator, denominator, comparison, figure by pair
    "krdistill / bare": ("krdistill", "bare", (1.03, 1.03)),
    "bank / student": ("bank", "student", (1.05, 1.05)),
    "plain / bank": ("plain", "bank", (2.5, 2.0)),
}
WARM = 3


def images(n_max: int) -> DataBundle:
    """Long-tailed noise in whole batches: the values of the pixels do not matter for speed."""
    counts = [int(n) for n in long_tail_counts(CLASSES, n_max, profile="exp", imbalance_factor=10)]
    counts[0] += -sum(counts) % BATCH
    labels = torch.repeat_interleave(torch.arange(CLASSES), torch.tensor(counts))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (len(labels), SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
    train = ImageData.from_arrays(pixels, labels, [str(k) for k in range(CLASSES)])
    return DataBundle(train=train, test=train.subset(torch.arange(200)))


class PlainImages(Dataset[tuple[Tensor, int]]):
    """Images one by one, cropped and flipped in Pillow, as float tensors."""

    def __init__(self, data: Examples, mean: Tensor, std: Tensor) -> None:
        self.pixels, self.labels = data.inputs.numpy(), data.labels.tolist()
        self.mean, self.std = mean.view(3, 1, 1), std.view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = ImageOps.expand(Image.fromarray(self.pixels[i]), SIDE // 8)
        left, top = torch.randint(0, SIDE // 4 + 1, (2,)).tolist()
        image = image.crop((left, top, left + SIDE, top + SIDE))
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255
        return (x - self.mean) / self.std, self.labels[i]


def plain_loop(
    data: Examples, teacher: Network, student: Network, workers: int, device: torch.device
) -> Callable[[int], float]:
    """Seconds of so many steps of the plain loop."""
    mean, std = student.mean.flatten().cpu(), student.std.flatten().cpu()
    big, small = teacher.backbone, student.backbone
    optimizer = torch.optim.SGD(small.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    plain = PlainImages(data, mean, std)

    def run(steps: int) -> float:
        drawn = RandomSampler(plain, replacement=True, num_samples=BATCH * (WARM + steps + 2 * max(1, workers)))
        loader = DataLoader(plain, BATCH, sampler=drawn, num_workers=workers, pin_memory=device.type == "cuda")
        big.eval()
        small.train()
        right = seen = 0
        total = 0.0
        started = time.perf_counter()
        for i, (x, y) in enumerate(loader):
            if i == WARM:
                _wait(device)
                started = time.perf_counter()
            x, y = x.to(device), y.to(device)
            logits = small(x)
            with torch.no_grad():
                answer = big(x)
            kl = F.kl_div(F.log_softmax(logits / 4, 1), F.softmax(answer / 4, 1), reduction="batchmean") * 16
            loss = F.cross_entropy(logits, y) + kl
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
            right += (logits.argmax(1) == y).sum().item()
            seen += len(y)
            if i + 1 == WARM + steps:
                break
        assert i + 1 == WARM + steps
        _wait(device)
        return time.perf_counter() - started

    return run


def bare_loop(teacher: Network, student: Network, device: torch.device) -> Callable[[int], float]:
    """Seconds of so many steps of the two networks alone, on one batch that is ready."""
    x = torch.rand(BATCH, 3, SIDE, SIDE, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.arange(BATCH, device=device) % CLASSES
    big, small = teacher.backbone.eval(), student.backbone.train()
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.SGD(small.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, fused=fused)

    def run(steps: int) -> float:
        for i in range(steps + 1):
            if i == 1:
                _wait(device)
                started = time.perf_counter()
            with torch.inference_mode():
                big(x)
            loss = F.cross_entropy(small(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        _wait(device)
        return time.perf_counter() - started

    return run


def our_loop(trainer: Trainer) -> Callable[[int], float]:
    """Seconds of so many steps of a trainer, as its epochs run them."""
    epoch = iter(range(10**6))

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for number in epoch:
            trainer.epoch = number % trainer.config.epochs
            yield from trainer.feed.run(trainer.batches(trainer.epoch))

    source = batches()

    def run(steps: int) -> float:
        trainer.task.train()
        started = 0.0
        for i in range(steps + 1):
            if i == 1:
                _wait(trainer.device)
                started = time.perf_counter()
            index, pixels, labels = next(source)
            trainer._add(trainer.step(trainer.epoch, i, index, pixels, labels))
        _wait(trainer.device)
        return time.perf_counter() - started

    return run


def measure_pair(
    names: tuple[str, str], data: DataBundle, arguments: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """Seconds per step of every loop, and the ratios of the bars."""
    device = torch.device(arguments.device)
    prior, groups = measure(data, "thirds")
    train = TrainConfig(
        epochs=1000, batch_size=BATCH, augmentation="crop-flip", precision=arguments.precision, evaluate_every=1000
    )

    def network(name: str, seed: int) -> Network:
        made = build_network(name, class_names=data.class_names, images=data.train.inputs, seed=seed)
        place(made, device)
        return made

    teacher = Teacher(network(names[0], 0), class_names=data.class_names)
    profile = profile_teacher(teacher, data, device=device)

    def trainer(name: str, answers: Answers | None = None, compiled: str = "none") -> Trainer:
        entry = recipe(name)
        task = build_task(
            entry, entry.resolve({}), network(names[1], 1), data, prior, groups, teacher=teacher, profile=profile
        )
        config = train.model_copy(update={"compile": compiled})
        return Trainer(task, data.train, config, seed=0, device=device, answers=answers)

    bank = build_bank(
        teacher, data.train, build_augmentation("crop-flip", SIDE), views=2, root=folder, seed=0,
        coding=Coding(CLASSES, teacher.feature_dim), device=device,
    )  # fmt: skip
    bare_pair = Teacher(network(names[0], 0), class_names=data.class_names).network, network(names[1], 1)
    plain_pair = [network(names[0], 0), network(names[1], 1)]
    for made in plain_pair:
        cast(nn.Module, made).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    jobs: dict[str, Callable[[int], float]] = {
        "bare": bare_loop(*bare_pair, device),
        "student": our_loop(trainer("none")),
        "krdistill": our_loop(trainer("krdistill")),
        "bank": our_loop(trainer("krdistill", bank)),
        "plain": plain_loop(data.train, plain_pair[0], plain_pair[1], arguments.workers, device),
    }
    started = time.perf_counter()
    jobs["compiled"] = our_loop(trainer("none", compiled="default"))
    compiling = time.perf_counter() - started
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(-1, arguments.rounds):  # the first round warms up
        for name, job in jobs.items():
            taken = job(arguments.steps) / arguments.steps
            if number >= 0:
                seconds[name].append(taken)
        print(f"{names[0]} to {names[1]}: round {number + 1} of {arguments.rounds}", flush=True)

    def ratio(a: str, b: str) -> dict[str, float]:
        values = [x / y for x, y in zip(seconds[a], seconds[b], strict=True)]
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
        return {"median": middle, "lower_quartile": low, "upper_quartile": high}

    return {
        "teacher": names[0],
        "student": names[1],
        "seconds_to_compile": compiling,
        "seconds_per_step": {name: statistics.median(values) for name, values in seconds.items()},
        "ratios": {label: ratio(a, b) for label, (a, b, _) in BARS.items()}
        | {
            "krdistill / student": ratio("krdistill", "student"),
            "plain / krdistill": ratio("plain", "krdistill"),
            "compiled / student": ratio("compiled", "student"),
        },
        "bars": {label: figures[PAIRS.index(names)] for label, (_, _, figures) in BARS.items()},
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads for torch (default 2)")
    parser.add_argument("--workers", type=int, default=2, help="of the plain loop's DataLoader (default 2)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds (default 9)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each loop in a round (default 6)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"], help="of our loops")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--quick", action="store_true", help="one round of one step: does it run?")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.steps = 1, 1
    torch.set_num_threads(arguments.threads)
    data = images(10)  # some 400 images: what is timed is steps
    results = []
    for names in PAIRS:
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure_pair(names, data, arguments, Path(folder)))
    for row in results:
        print(f"\n{row['teacher']} to {row['student']}: seconds per step of {BATCH} images")
        print("  " + ", ".join(f"{name} {value:.3f}" for name, value in row["seconds_per_step"].items()))
        for label, value in row["ratios"].items():
            bar = f"   (bar {row['bars'][label]:g})" if label in row["bars"] else ""
            spread = f"[{value['lower_quartile']:.3f}, {value['upper_quartile']:.3f}]"
            print(f"  {label:<22}{value['median']:.3f}  {spread}{bar}")
    if arguments.json:
        provenance = {
            **environment(torch.device(arguments.device)), "batch": BATCH, "classes": CLASSES,
            "rounds": arguments.rounds, "steps": arguments.steps, "workers": arguments.workers,
            "precision": arguments.precision,
        }  # fmt: skip
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"provenance": provenance, "pairs": results}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
