"""Tiny ImageNet from its upstream folder."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from ..errors import DataError
from .containers import ImageData, LoadedImages
from .decoding import decode, unreadable_message

_SIDE = 64


def load_tiny_imagenet(folder: Path, *, image_size: int | None = None, on_unreadable: str = "error") -> LoadedImages:
    """Reads Tiny ImageNet.

    Classes are the identifiers of ``wnids.txt``, sorted, under their first name in ``words.txt``. The test part is
    upstream's validation part: the labels of upstream's test part are not published. Grey images become RGB.

    Args:
        folder: ``tiny-imagenet-200``.
        image_size: side in pixels; by default 64, the size of the files.
        on_unreadable: ``error``, or ``skip`` to leave out files that cannot be decoded.

    Raises:
        DataError: a class has no folder, the annotations name an unknown class, or files are missing or unreadable.

    Source: Le and Yang, "Tiny ImageNet Visual Recognition Challenge", Stanford CS231n, 2015.
    """
    wnids = sorted(line.strip() for line in _lines(folder / "wnids.txt") if line.strip())
    label = {wnid: k for k, wnid in enumerate(wnids)}
    names = _class_names(folder, wnids)
    notes: list[str] = []

    train: list[tuple[str, int]] = []
    for wnid in wnids:
        images = folder / "train" / wnid / "images"
        if not images.is_dir():
            raise DataError(f"{images} does not exist, but {folder / 'wnids.txt'} lists {wnid}.")
        files = sorted((f.name for f in images.iterdir() if f.suffix == ".JPEG"), key=_numbers)
        train += [(f"train/{wnid}/images/{f}", label[wnid]) for f in files]

    test: list[tuple[str, int]] = []
    annotations = folder / "val" / "val_annotations.txt"
    for number, line in enumerate(_lines(annotations), start=1):
        if not line.strip():
            continue
        filename, wnid, *_ = [*line.split("\t"), ""]
        if wnid not in label:
            raise DataError(f"{annotations}, line {number}: expected a class of wnids.txt, got {wnid!r}.")
        test.append((f"val/images/{filename}", label[wnid]))

    parts = []
    for part, rows in (("train", train), ("val", test)):
        if not rows:
            raise DataError(f"{folder / part} holds no images.")
        pixels, failures = decode(
            [folder / path for path, _ in rows],
            size=(image_size or _SIDE,) * 2,
            channels=3,
            resize=image_size not in (None, _SIDE),
        )
        ids = [path for path, _ in rows]
        labels = torch.tensor([k for _, k in rows])
        if failures:
            message = unreadable_message(ids, failures, str(folder))
            if on_unreadable == "error" or len(failures) == len(rows):
                raise DataError(message)
            notes.append(f"{len(failures):,} unreadable images of {part} were left out")
        data = np.array([i not in failures for i in range(len(rows))])
        parts.append(
            ImageData(
                torch.from_numpy(pixels if data.all() else pixels[data]),
                labels[torch.from_numpy(data)],
                names,
                tuple(path for path, kept in zip(ids, data, strict=True) if kept),
                "tiny-imagenet",
            )
        )
    return LoadedImages(parts[0], parts[1], None, tuple(notes))


def _class_names(folder: Path, wnids: list[str]) -> tuple[str, ...]:
    words = next((folder / f for f in ("words.txt", "words_200.txt") if (folder / f).is_file()), None)
    if words is None:
        return tuple(wnids)
    names = dict(line.rstrip("\n").split("\t", 1) for line in _lines(words) if "\t" in line)
    first = [names.get(wnid, wnid).split(",")[0].strip() for wnid in wnids]
    # Two of ImageNet's classes may share a name ("crane"): then the identifier tells them apart.
    return tuple(f"{n} ({w})" if first.count(n) > 1 else n for n, w in zip(first, wnids, strict=True))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", name))
