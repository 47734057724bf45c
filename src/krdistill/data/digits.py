"""The handwritten digits that come with scikit-learn: real images without a download."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..errors import MissingDependencyError
from .containers import FeatureData, ImageData, LoadedImages
from .selection import choose

_TEST_PER_CLASS = 50


def load_digits(*, test_seed: int = 0) -> LoadedImages:
    """1,797 handwritten digits, grey 8x8, ten classes.

    Upstream pixels are whole numbers from 0 to 16; here ``round(255 * x / 16)``. There is no upstream test part: 50
    images per class are put aside as one, which leaves 124 to 133 per class for training.

    Args:
        test_seed: which images those are.

    Returns:
        Training and test part, in upstream order; ids are ``digits/<upstream row>``.

    Raises:
        MissingDependencyError: scikit-learn is not installed.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998;
    ``sklearn.datasets.load_digits``.
    """
    raw = _upstream()
    pixels = np.rint(raw.images * (255 / 16)).astype(np.uint8)[..., None]
    data = ImageData(
        torch.from_numpy(pixels),
        torch.from_numpy(raw.target.astype(np.int64)),
        tuple(str(k) for k in range(10)),
        tuple(f"digits/{i}" for i in range(len(pixels))),
        "digits",
    )
    chosen = choose(data, [_TEST_PER_CLASS] * 10, test_seed, "test")
    return LoadedImages(data.subset(~chosen), data.subset(chosen))


def load_digit_features() -> FeatureData:
    """The same digits as rows of 64 numbers, 0 to 16: how much of each of 8x8 fields is ink. No part is put aside.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    raw = _upstream()
    return FeatureData(
        torch.from_numpy(raw.data.astype(np.float32)),
        torch.from_numpy(raw.target.astype(np.int64)),
        tuple(str(k) for k in range(10)),
        tuple(f"digits/{i}" for i in range(len(raw.data))),
        "digits-features",
    )


def _upstream() -> Any:
    try:
        from sklearn import datasets
    except ImportError:
        raise MissingDependencyError(
            "The digits come with scikit-learn, which is not installed: pip install 'krdistill[train]'."
        ) from None
    return datasets.load_digits()
