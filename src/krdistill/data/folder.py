"""A folder of images, one sub-folder per class: anybody's own data."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..errors import DataError
from .containers import LoadedImages, first_few
from .listing import ListedPart, Listing, load_listed, part_of
from .sources import CacheUse, SplitBy

IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
_CLUTTER = frozenset(("thumbs.db", "desktop.ini", "__macosx"))


def load_folder(
    path: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    on_unreadable: str = "error",
    test_fraction: float | None = None,
    test_seed: int = 0,
    split_by: SplitBy = "none",
    cache: CacheUse = "auto",
    cache_folder: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> LoadedImages:
    """Reads a folder of images, into memory or, where they are many, through a cache of decoded images.

    Either ``PATH/train/<class>/...`` with ``PATH/test/<class>/...`` or ``PATH/val/<class>/...`` (where there are both,
    ``val`` is the validation part), or ``PATH/<class>/...``, of which a test part is put aside. Below a class folder,
    images may lie at any depth; links are followed. Classes are numbered by sorted name. Hidden files are passed over.

    Images are turned upright (EXIF), transparent parts become white, 16-bit ones are scaled to 8 bits. They are grey
    if every single one is, else RGB.

    The test part that is put aside is as balanced over the classes as it can be, since accuracy on it is read class by
    class: ``test_fraction * N / K`` images of every class, but at most half of the class. A class with a single image
    keeps it for training and has none in the test part; a note says so.

    Args:
        path: the folder.
        image_size: side in pixels (see :func:`krdistill.data.load_images`); None if all have the same size.
        on_unreadable: ``error``, or ``skip`` to leave out files that cannot be decoded.
        test_fraction: share of the images put aside for testing where there is no test part; 0.2 by default.
        test_seed: which images those are. An image's lot depends on its path alone, so that images added later move
            few others across.
        split_by: what no split separates (see :func:`krdistill.data.load_images`).
        cache: whether the images are decoded once into a memory-mapped file (:mod:`krdistill.data.cache`), which gives
            the same pixels, splits and checksums: ``always``, ``never``, or ``auto``, where they take more than
            :data:`~krdistill.data.cache.CACHE_ABOVE` bytes.
        cache_folder: holds the caches; by default ``$KRDISTILL_CACHE``, else ``~/.cache/krdistill/images``.
        workers: processes that decode into a cache; by default one per processor, 0 decodes in this one.
        on_progress: called with the images decoded into the cache so far and their number.

    Returns:
        The parts, and notes on what was left out. Ids are paths under ``path``.

    Raises:
        DataError: no such folder, no classes, no images, unreadable images, different sizes and no ``image_size``,
            a training and a test part with different classes, or images that fit neither into memory nor on the disk.
        ArgumentError: ``test_fraction`` outside (0, 1), or given although there is a test part; a wrong ``cache`` or
            ``workers``.
    """
    return load_listed(
        list_folder(path),
        image_size=image_size,
        on_unreadable=on_unreadable,
        test_fraction=test_fraction,
        test_seed=test_seed,
        split_by=split_by,
        cache=cache,
        cache_folder=cache_folder,
        workers=workers,
        on_progress=on_progress,
    )


def list_folder(path: str | os.PathLike[str]) -> Listing:
    """The image files of a folder (layouts: :func:`load_folder`), unopened.

    Raises:
        DataError: no such folder, no classes, no images, or parts with different classes.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"{root} is {'a file' if root.exists() else 'not there'}; expected a folder of class folders.")
    folders = _part_folders(root)
    classes = _classes(folders)
    notes: list[str] = []
    parts: dict[str, ListedPart] = {}
    for part, folder in folders.items():
        found = _scan(folder, classes, notes)
        if not found:
            raise DataError(f"{folder} holds no images (known suffixes: {', '.join(sorted(IMAGE_SUFFIXES))}).")
        paths = [image for image, _ in found]
        ids = [image.relative_to(root).as_posix() for image in paths]
        parts[part] = ListedPart(paths, ids, np.array([k for _, k in found], dtype=np.int64))
    return Listing(root.resolve().name, root, tuple(classes), parts, tuple(notes))


def _subfolders(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir(), key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}.") from error
    return [e for e in entries if not e.name.startswith(".") and e.name.lower() not in _CLUTTER and e.is_dir()]


def _part_folders(root: Path) -> dict[str, Path]:
    """Part (train, test, val) to its folder; train alone where there is no split yet."""
    found: dict[str, Path] = {}
    others = []
    for folder in _subfolders(root):
        part = part_of(folder.name)
        # A class may be called "train": its folder then holds images, not folders.
        if part is None or not _subfolders(folder):
            others.append(folder)
        elif part in found:
            raise DataError(f"{root} has two {part} parts, {found[part].name} and {folder.name}; keep one.")
        else:
            found[part] = folder
    if not found:
        return {"train": root}
    if "train" not in found:
        raise DataError(f"{root} has {next(iter(found.values())).name}/ but no train/ with class folders.")
    others = [folder for folder in others if any(_walk(folder)[0])]
    if others:
        raise DataError(
            f"{root} has {found['train'].name}/ with folders in it, and images in {first_few(f.name for f in others)} "
            "too. Expected either parts (train, test, val), each with class folders, or class folders only."
        )
    if "test" not in found and "val" in found:
        found["test"] = found.pop("val")
    return found


def _classes(folders: dict[str, Path]) -> list[str]:
    """Sorted names of the class folders, which every part must have."""
    train = folders["train"]
    classes = [f.name for f in _subfolders(train)]
    if len(classes) < 2:
        images = sum(e.suffix.lower() in IMAGE_SUFFIXES for e in train.iterdir())
        loose = f" and {images:,} images outside of any" if images else ""
        raise DataError(
            f"Expected at least two class folders in {train}, as in {train}/<class>/<image>, got {len(classes)}{loose}."
        )
    for part, folder in folders.items():
        there = {f.name for f in _subfolders(folder)}
        extra, missing = sorted(there.difference(classes)), sorted(set(classes) - there)
        if extra or missing:
            only = [
                f"{first_few(names)} only in {place}" for names, place in ((missing, train), (extra, folder)) if names
            ]
            raise DataError(
                f"{train.name} and {part} have different class folders: {'; '.join(only)}. Rename them alike; where a "
                "class really has no images in a part, give it an empty folder there."
            )
    return classes


def _scan(folder: Path, classes: Sequence[str], notes: list[str]) -> list[tuple[Path, int]]:
    """Image files with their class numbers."""
    rows: list[tuple[Path, int]] = []
    foreign: Counter[str] = Counter()
    for k, name in enumerate(classes):
        images, others = _walk(folder / name)
        if not images and others:
            kinds = first_few(sorted({f"*{o.suffix}" if o.suffix else o.name for o in others}))
            raise DataError(
                f"{folder / name} holds no images, only {kinds}; known suffixes are "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}. Convert or remove the files."
            )
        rows += [(image, k) for image in images]
        foreign.update(o.suffix for o in others)
    if foreign:
        kinds = ", ".join(f"{count:,} {suffix or 'without suffix'}" for suffix, count in foreign.most_common())
        notes.append(f"{folder.name}: files that are no images were passed over ({kinds})")
    return rows


def _walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """Image files and other files at any depth, sorted; a folder that links lead to twice is entered once."""
    images: list[Path] = []
    others: list[Path] = []
    seen = set()

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error

    for place, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        stat = os.stat(place)
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = [f for f in folders if not f.startswith(".") and f.lower() not in _CLUTTER]
        for name in files:
            if not name.startswith(".") and name.lower() not in _CLUTTER:
                (images if Path(name).suffix.lower() in IMAGE_SUFFIXES else others).append(Path(place, name))
    return sorted(images), sorted(others)
