from __future__ import annotations

from pathlib import Path

import pytest

from krdistill.data import LoadedImages, load_images


@pytest.fixture(scope="session")
def cifar100(cifar100_root: Path) -> LoadedImages:
    """CIFAR-100, uncut, read once."""
    return load_images("cifar100", root=cifar100_root)
