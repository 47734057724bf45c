"""CIFAR-10 and CIFAR-100 from their upstream files ("python version")."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from .containers import ImageData, LoadedImages

# The function that rebuilds an array, by whichever name this NumPy has it.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
_LAYOUTS: dict[str, dict[str, Any]] = {
    "cifar10": {
        "train": tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test": ("test_batch",),
        "meta": "batches.meta",
        "labels": "labels",
        "names": "label_names",
    },
    "cifar100": {
        "train": ("train",),
        "test": ("test",),
        "meta": "meta",
        "labels": "fine_labels",
        "names": "fine_label_names",
    },
}


def load_cifar(folder: Path, files: Mapping[str, str | None], *, name: str) -> LoadedImages:
    """Reads CIFAR-10 or CIFAR-100.

    The upstream files are pickles, and a pickle may hold code. So a file is opened only if its checksum is the
    published one, and even then nothing but NumPy arrays and plain data can be made from it.

    Args:
        folder: ``cifar-10-batches-py`` or ``cifar-100-python``.
        files: name of each file to its md5 checksum (:data:`krdistill.data.SOURCES` has the published ones).
        name: ``cifar10`` or ``cifar100``.

    Returns:
        Training and test part in upstream order; the classes of CIFAR-100 are the fine ones. Ids are ``train/0``,
        ``train/1``, ...

    Raises:
        DataError: a file is missing, has another checksum, or does not hold what it should.

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    layout = _LAYOUTS[name]
    names = tuple(_field(_read(folder, layout["meta"], files), layout["names"], folder / layout["meta"]))
    parts = []
    for part in ("train", "test"):
        pixels, labels = [], []
        for filename in layout[part]:
            content = _read(folder, filename, files)
            rows = _field(content, "data", folder / filename)
            marks = _field(content, layout["labels"], folder / filename)
            if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.shape != (len(marks), 3072):
                raise DataError(f"{folder / filename}: expected {len(marks)} rows of 3072 uint8 pixels.")
            pixels.append(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            labels += marks
        parts.append(
            ImageData(
                torch.from_numpy(np.concatenate(pixels) if len(pixels) > 1 else np.ascontiguousarray(pixels[0])),
                torch.tensor(labels, dtype=torch.int64),
                names,
                tuple(f"{part}/{i}" for i in range(len(labels))),
                name,
            )
        )
    return LoadedImages(parts[0], parts[1])


class _PlainUnpickler(pickle.Unpickler):
    """Makes NumPy arrays and plain data, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which no upstream file does") from None


def _read(folder: Path, filename: str, files: Mapping[str, str | None]) -> dict[str, Any]:
    path = folder / filename
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    md5 = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    if md5 != files[filename]:
        raise DataError(
            f"{path} is not the upstream file and was not opened: its md5 is {md5}, expected {files[filename]}. "
            f"Remove {folder} and download it again."
        )
    try:
        content = _PlainUnpickler(io.BytesIO(raw), encoding="latin1").load()
    except Exception as error:  # a pickle can fail in any way
        raise DataError(f"{path} cannot be read as a CIFAR file: {error}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} cannot be read as a CIFAR file: expected a dict, got {type(content).__name__}.")
    return content


def _field(content: dict[str, Any], key: str, path: Path) -> Any:
    if key not in content:
        raise DataError(f"{path} has no field {key!r}; it has {', '.join(sorted(map(str, content)))}.")
    return content[key]
