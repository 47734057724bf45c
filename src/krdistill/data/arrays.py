"""Images that come whole: NumPy archives, and data sets of the Hugging Face library on the disk."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import ArgumentError, DataError, MissingDependencyError
from ..files import read_arrays
from ..priors import MOST_CLASSES
from .containers import ImageData, first_few
from .decoding import decode, read_headers, unreadable_message
from .listing import common_size, number_labels, part_of

_KEYS = (
    "images and labels (or train_images, train_labels), and, if wanted, class_names, groups, test_images, test_labels, "
    "val_images, val_labels"
)


def load_npz(path: str | os.PathLike[str]) -> tuple[dict[str, ImageData], list[str]]:
    """Reads a NumPy archive. Nothing in it is unpickled.

    Keys are ``images``, uint8 ``(N, H, W, C)`` or ``(N, H, W)``, and ``labels``, whole numbers ``(N,)`` or ``(N, 1)``;
    and, where there are such parts, the same with ``test_`` and ``val_`` before. ``train_images`` and ``train_labels``
    will do too. ``class_names`` are K texts; ``groups`` (``test_groups``, ``val_groups``) says which images belong
    together. A validation part without a test part is the test part.

    Returns:
        The parts, and notes. Ids are part and row, such as ``train/7``.

    Raises:
        DataError: no such file, no NumPy archive, arrays of Python objects, missing keys, or arrays that do not fit.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"{file} is not there; expected a NumPy archive with {_KEYS}.")
    try:
        with file.open("rb") as opened:
            if opened.read(6) == b"\x93NUMPY":
                raise DataError(f"{file.name} holds a single array; expected an archive (numpy.savez) with {_KEYS}.")
        arrays = read_arrays(file)
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        what = (
            "holds Python objects, which are not loaded; save plain arrays" if "pickle" in str(error) else "is damaged"
        )
        raise DataError(f"{file.name} {what} ({error}).") from error
    arrays = {key.removeprefix("train_"): value for key, value in arrays.items()}
    for key in ("images", "labels"):
        if key not in arrays:
            raise DataError(f"{file.name}: expected {_KEYS}; {key} not among {first_few(arrays)}.")
    found = ["train", *(part for part in ("test", "val") if f"{part}_images" in arrays)]
    taken = {"class_names"}
    columns: dict[str, dict[str, npt.NDArray[Any]]] = {}
    for part in found:
        prefix = "" if part == "train" else f"{part}_"
        keys = {name: f"{prefix}{name}" for name in ("images", "labels", "groups") if f"{prefix}{name}" in arrays}
        if "labels" not in keys:
            raise DataError(f"{file.name}: {prefix}images without {prefix}labels.")
        taken.update(keys.values())
        columns[part] = {name: arrays[key] for name, key in keys.items()}
        if columns[part]["labels"].ndim == 2 and columns[part]["labels"].shape[1] == 1:
            columns[part]["labels"] = columns[part]["labels"][:, 0]
    if "test" not in columns and "val" in columns:
        columns["test"] = columns.pop("val")
    names = arrays.get("class_names")
    if names is not None and (names.ndim != 1 or names.dtype.kind != "U"):
        raise DataError(f"{file.name}: expected class_names as texts, shape (K,), got {names.dtype} {names.shape}.")
    part = "train"
    try:
        for column in columns.values():
            if column["labels"].dtype.kind not in "iu":
                raise ArgumentError(f"expected labels as whole numbers, got {column['labels'].dtype}.")
        if names is None:
            K = 1 + max((int(c["labels"].max()) for c in columns.values() if c["labels"].size), default=0)
            if K > MOST_CLASSES:
                raise ArgumentError(f"expected labels below {MOST_CLASSES:,}, counted from 0, got {K - 1:,}.")
            classes = [str(k) for k in range(K)]
        else:
            classes = [str(name) for name in names]
        parts = {}
        for part, column in columns.items():
            ids = [f"{part}/{i}" for i in range(len(column["images"]))]
            data = ImageData.from_arrays(column["images"], column["labels"], classes, ids=ids, name=file.stem)
            parts[part] = _with_groups(data, column.get("groups"))
    except (ArgumentError, TypeError) as error:
        raise DataError(f"{file.name}, {part}: {error}") from error
    for part, data in parts.items():
        strange = torch.nonzero((data.counts() > 0) & (parts["train"].counts() == 0)).flatten().tolist()
        if strange:
            raise DataError(
                f"{file.name}: {len(strange):,} labels of {part} are not in train: "
                f"{first_few(classes[k] for k in strange)}."
            )
    over = sorted(set(arrays) - taken)
    return parts, [f"arrays that were passed over: {first_few(over)}"] if over else []


def _with_groups(data: ImageData, groups: npt.NDArray[Any] | None) -> ImageData:
    from dataclasses import replace

    if groups is None:
        return data
    if groups.ndim != 1 or groups.dtype.kind not in "Uiu":
        raise ArgumentError(
            f"Expected groups as texts or whole numbers, shape (N,), got {groups.dtype} {groups.shape}."
        )
    return replace(data, units=tuple(map(str, groups.tolist())))


def is_hub_folder(folder: Path) -> bool:
    """Whether ``datasets.Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` made this folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    )


class _Encoded(Sequence[bytes]):
    """The files in a column of images, read when asked for."""

    def __init__(self, dataset: Any, column: str) -> None:
        self.dataset, self.column = dataset, column

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        cell = self.dataset[i][self.column] or {}
        if cell.get("bytes") is not None:
            return cell["bytes"]
        return Path(cell["path"]) if cell.get("path") else b""


class _Some(Sequence[bytes]):
    """Some of them."""

    def __init__(self, files: _Encoded, rows: Sequence[int]) -> None:
        self.files, self.rows = files, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        return self.files[self.rows[i]]


def open_hub(path: str | os.PathLike[str]) -> tuple[str, tuple[str, ...], dict[str, tuple[_Encoded, Any, Any]]]:
    """A data set that ``save_to_disk`` of the Hugging Face library ``datasets`` wrote, unopened images.

    Returns:
        Its name, its class names, and for every part the image files, the class numbers, int64 ``(N,)``, and the
        groups, or None.

    Raises:
        DataError: no such data set, no column of images, no column of labels, several labels of one image, or other
            parts than train, test and validation.
        MissingDependencyError: ``datasets`` is not installed.
    """
    folder = Path(path).expanduser()
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError(
            f"{folder} is a data set of the Hugging Face library, which is not installed: "
            "pip install 'krdistill[datasets]'."
        ) from None
    try:
        opened = datasets.load_from_disk(os.fspath(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} cannot be read as a data set: {str(error).splitlines()[0]}.") from error
    splits: Mapping[str, Any] = opened if isinstance(opened, datasets.DatasetDict) else {"train": opened}
    named: dict[str, Any] = {}
    for name, dataset in splits.items():
        part = part_of(name)
        if part is None or part in named:
            raise DataError(f"{folder.name}: expected the parts train, test and validation, got {first_few(splits)}.")
        named[part] = dataset
    if "train" not in named:
        raise DataError(f"{folder.name} has no part train, only {first_few(splits)}.")
    if "test" not in named and "val" in named:
        named["test"] = named.pop("val")
    features = named["train"].features
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    image = images[0] if len(images) == 1 else next((n for n in ("image", "img") if n in images), None)
    if image is None:
        raise DataError(f"{folder.name}: expected one column of images, named image, among {first_few(features)}.")
    marked = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    label = next((n for n in ("label", "labels") if n in features), marked[0] if len(marked) == 1 else None)
    if label is None:
        raise DataError(f"{folder.name}: expected one column of labels, named label, among {first_few(features)}.")
    parts: dict[str, tuple[_Encoded, Any, Any]] = {}
    raw: dict[str, list[Any]] = {}
    for part, dataset in named.items():
        if image not in dataset.features or label not in dataset.features:
            raise DataError(f"{folder.name}: {part} lacks the column {image} or {label} of train.")
        raw[part] = dataset.with_format(None).select_columns([label])[:][label]
        if any(isinstance(cell, (list, dict)) for cell in raw[part][:1]):
            raise DataError(f"{folder.name}: several labels of one image (column {label}) are not supported.")
        none = sum(cell is None or cell == -1 or cell == "" for cell in raw[part])
        if none:
            raise DataError(f"{folder.name}: {none:,} images of {part} have no label; leave them, or the part, out.")
        groups = dataset.select_columns(["group"])[:]["group"] if "group" in dataset.features else None
        files = _Encoded(dataset.select_columns([image]).cast_column(image, datasets.Image(decode=False)), image)
        parts[part] = (files, None, None if groups is None else ["" if g is None else str(g) for g in groups])
    if isinstance(features[label], datasets.ClassLabel):
        names = tuple(str(name) for name in features[label].names)
        numbers = {part: np.array(cells, dtype=np.int64) for part, cells in raw.items()}
        for part, found in numbers.items():
            strange = sorted(set(found.tolist()) - set(numbers["train"].tolist()))
            if strange:
                raise DataError(
                    f"{folder.name}: {len(strange):,} labels of {part} are not in train: "
                    f"{first_few(names[k] for k in strange)}."
                )
    else:
        names, numbers = number_labels({part: list(map(str, cells)) for part, cells in raw.items()}, folder.name)
    return folder.resolve().name, names, {part: (f, numbers[part], g) for part, (f, _, g) in parts.items()}


def load_hub(
    path: str | os.PathLike[str], *, image_size: int | None = None, on_unreadable: str = "error"
) -> tuple[dict[str, ImageData], list[str]]:
    """Reads a data set that ``save_to_disk`` of the Hugging Face library ``datasets`` wrote, into memory.

    The column of images is the only one, or the one named ``image``; the column of labels is ``label``, or the only
    ``ClassLabel``; a column ``group`` says which images belong together. Images are decoded as a folder's are.

    Args:
        path: the folder.
        image_size: side in pixels; None if all have the same size.
        on_unreadable: ``error``, or ``skip`` to leave images out that cannot be decoded.

    Returns:
        The parts, and notes. Ids are part and row, such as ``train/7``.

    Raises:
        DataError: as :func:`open_hub`; unreadable images; different sizes and no ``image_size``.
        MissingDependencyError: ``datasets`` is not installed.
    """
    name, classes, found = open_hub(path)
    headers = {part: read_headers(files) for part, (files, _, _) in found.items()}
    readable = [header for there, _ in headers.values() for header in there if header is not None]
    failures = {part: dict(failed) for part, (_, failed) in headers.items()}
    ids = {part: [f"{part}/{i}" for i in range(len(files))] for part, (files, _, _) in found.items()}
    _refuse(failures, ids, name, on_unreadable, not readable)
    size = common_size(readable) if image_size is None else (image_size, image_size)
    channels = 1 if all(header.grey for header in readable) else 3
    parts, kept = {}, {}
    for part, (files, _, _) in found.items():
        there = [i for i in range(len(files)) if i not in failures[part]]
        pixels, failed = decode(_Some(files, there), size=size, channels=channels, resize=image_size is not None)
        failures[part].update({there[i]: why for i, why in failed.items()})
        whole = [i for i in range(len(there)) if i not in failed]
        kept[part] = [there[i] for i in whole], pixels if len(whole) == len(there) else pixels[whole]
    _refuse(failures, ids, name, on_unreadable, not all(len(rows) for rows, _ in kept.values()))
    for part, (_, labels, groups) in found.items():
        rows, pixels = kept[part]
        parts[part] = ImageData(
            torch.from_numpy(pixels),
            torch.from_numpy(labels[rows]),
            classes,
            tuple(ids[part][i] for i in rows),
            name,
            None if groups is None else tuple(groups[i] for i in rows),
        )
    skipped = [ids[part][i] for part, failed in failures.items() for i in sorted(failed)]
    return parts, [f"{len(skipped):,} unreadable images were left out: {first_few(skipped)}"] if skipped else []


def _refuse(
    failures: Mapping[str, Mapping[int, str]],
    ids: Mapping[str, Sequence[str]],
    name: str,
    on_unreadable: str,
    none: bool,
) -> None:
    if none or (on_unreadable == "error" and any(failures.values())):
        every = [i for part in ids for i in ids[part]]
        starts = dict(zip(ids, np.cumsum([0, *(len(found) for found in ids.values())]).tolist(), strict=False))
        joined = {starts[part] + i: why for part, failed in failures.items() for i, why in failed.items()}
        raise DataError(unreadable_message(every, joined, name))
