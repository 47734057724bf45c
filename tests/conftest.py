"""Shared fixtures: real data sets, where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder named by ``KRDISTILL_DATA``; tests that need real data sets are skipped without it."""
    named = os.environ.get("KRDISTILL_DATA")
    if not named:
        pytest.skip("KRDISTILL_DATA names no folder of data sets")
    if not Path(named).is_dir():
        pytest.skip(f"KRDISTILL_DATA names {named}, which is no folder")
    return Path(named)


@pytest.fixture(scope="session")
def cifar100_root(data_root: Path) -> Path:
    """The data root, if CIFAR-100 is in it."""
    return _having(data_root, "cifar-100-python/train", "cifar100")


@pytest.fixture(scope="session")
def tiny_imagenet_root(data_root: Path) -> Path:
    """The data root, if Tiny ImageNet is in it."""
    return _having(data_root, "tiny-imagenet-200/val/val_annotations.txt", "tiny-imagenet")


def _having(root: Path, file: str, name: str) -> Path:
    if not (root / file).exists():
        pytest.skip(f"{root} has no {file}; `krdistill data download {name} --root {root}` fetches it")
    return root
