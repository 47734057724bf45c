"""The same seed gives the same numbers: whoever reads the images, and in whichever process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from krdistill.config import TrainConfig
from krdistill.data.cache import MappedImages
from krdistill.data.containers import DataBundle
from krdistill.data.feed import Feed
from krdistill.data.folder import load_folder
from krdistill.models.network import build_network
from krdistill.objective import Objective, classification_term
from krdistill.priors import ClassPrior
from krdistill.training.loop import Trainer
from krdistill.training.task import Task

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name, count in (("a", 30), ("b", 17), ("c", 6)):
        (root / name).mkdir()
        for i in range(count):
            pixels = rng.integers(0, 255, (14, 17, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    return root


def _trained(data: DataBundle, depth: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Every batch that two epochs are fed with, and the weights they end with."""
    train, seen = data.train, []
    network = build_network("resnet8w8", class_names=train.class_names, images=train.images, seed=0)
    task = Task(network, Objective([classification_term("cross-entropy", ClassPrior.from_counts(train.counts()))]))
    config = TrainConfig(epochs=2, batch_size=8, augmentation="crop-flip", sampler="class-balanced")
    trainer = Trainer(task, train, config, seed=3, device=CPU)
    trainer.feed = Feed(train, CPU, depth=depth)
    augment = trainer.augment

    def watched(images: torch.Tensor, index: torch.Tensor, **draw: int) -> torch.Tensor:
        made = augment(images, index, **draw)
        seen.extend((index.clone(), made.clone()))
        return made

    trainer.augment = watched  # type: ignore[assignment]
    for _ in trainer.epochs():
        pass
    return seen, list(task.state_dict().values())


def test_every_number_of_workers_gives_the_same_batches(photos: Path, tmp_path: Path) -> None:
    options = {"image_size": 12, "split_by": "none"}
    memory = load_folder(photos, cache="never", **options)  # type: ignore[arg-type]
    batches, weights = _trained(DataBundle(memory.train, memory.test), depth=4)
    for workers, depth in ((0, 1), (1, 2), (3, 9)):
        loaded = load_folder(photos, cache="always", cache_folder=tmp_path / str(workers), workers=workers, **options)  # type: ignore[arg-type]
        assert isinstance(loaded.train.images, MappedImages)
        found, ends = _trained(DataBundle(loaded.train, loaded.test), depth)
        assert len(found) == len(batches) > 20
        assert all(torch.equal(a, b) for a, b in zip(batches, found, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(weights, ends, strict=True))


def test_two_starts_of_a_process_give_the_same_numbers(tmp_path: Path) -> None:
    """Python orders sets by a seed of its own, another one at every start."""
    command = [
        sys.executable, "-m", "krdistill", "run", "digits-lt", "--data.n_max", "40", "--data.imbalance_factor", "10",
        "--train.epochs", "1", "--teacher.model", "resnet8w8", "--student.model", "resnet8w8", "--export.onnx", "false",
    ]  # fmt: skip
    for seed in ("1", "2"):
        subprocess.run(
            [*command, "--out", str(tmp_path / seed)], check=True, capture_output=True, timeout=280,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
    names = sorted(
        str(p.relative_to(tmp_path / "1")) for p in (tmp_path / "1").rglob("*") if p.suffix == ".safetensors"
    )
    assert len(names) >= 2
    for name in ("metrics.json", *names):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
