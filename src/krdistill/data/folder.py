"""A folder of images, one sub-folder per class: anybody's own data."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from ..errors import ArgumentError, DataError
from .cache import CACHE_ABOVE, Cache, build_cache, cache_key, cache_root, open_cache
from .containers import ImageData, LoadedImages, first_few
from .decoding import Header, decode, read_headers, unreadable_message
from .selection import choose
from .sources import CacheUse

IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
_CLUTTER = frozenset(("thumbs.db", "desktop.ini", "__macosx"))
_PARTS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "val": ("val", "valid", "validation"),
}


def load_folder(
    path: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    on_unreadable: str = "error",
    test_fraction: float | None = None,
    test_seed: int = 0,
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
    if cache not in ("auto", "always", "never"):
        raise ArgumentError(f"Expected cache to be 'auto', 'always' or 'never', got {cache!r}.")
    if workers is not None and (not isinstance(workers, int) or workers < 0):
        raise ArgumentError(f"Expected workers to be a whole number, at least 0, got {workers!r}.")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"{root} is {'a file' if root.exists() else 'not there'}; expected a folder of class folders.")
    if test_fraction is not None and not 0 < test_fraction < 1:
        raise ArgumentError(f"Expected test_fraction between 0 and 1, got {test_fraction}.")
    folders = _part_folders(root)
    if test_fraction is not None and len(folders) > 1:
        raise ArgumentError(f"test_fraction does not apply: {folders['test']} is the test part.")
    classes = _classes(folders)
    notes: list[str] = []
    rows = {part: _scan(folder, classes, notes) for part, folder in folders.items()}
    for part, found in rows.items():
        if not found:
            raise DataError(f"{folders[part]} holds no images (known suffixes: {', '.join(sorted(IMAGE_SUFFIXES))}).")
    parts = _decode_parts(
        root, rows, classes, image_size, on_unreadable, notes, cache, cache_root(cache_folder), workers, on_progress
    )
    if "test" not in parts:
        parts["train"], parts["test"] = _carve_test(parts["train"], test_fraction or 0.2, test_seed, notes)
    return LoadedImages(parts["train"], parts["test"], parts.get("val"), tuple(notes))


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
        part = next((p for p, names in _PARTS.items() if folder.name.lower() in names), None)
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


def _decode_parts(
    root: Path,
    rows: dict[str, list[tuple[Path, int]]],
    classes: Sequence[str],
    image_size: int | None,
    on_unreadable: str,
    notes: list[str],
    cache: CacheUse,
    caches: Path,
    workers: int | None,
    on_progress: Callable[[int, int], None] | None,
) -> dict[str, ImageData]:
    paths = {part: [path for path, _ in found] for part, found in rows.items()}
    ids = {part: [path.relative_to(root).as_posix() for path in found] for part, found in paths.items()}
    starts = dict(zip(paths, accumulate((len(found) for found in paths.values()), initial=0), strict=False))
    all_paths = [path for found in paths.values() for path in found]
    all_ids = [i for found in ids.values() for i in found]
    # Colours are not known before the files are opened, but three channels are the most there can be.
    small = image_size is not None and len(all_paths) * image_size**2 * 3 <= CACHE_ABOVE
    may_cache = cache == "always" or (cache == "auto" and not small)
    place = caches / cache_key(all_paths, all_ids, image_size) if may_cache else caches
    decoded: Cache | None = open_cache(place) if may_cache else None
    pixels: dict[str, torch.Tensor] = {}
    failures: dict[str, dict[int, str]] = {}
    if decoded is None:
        headers: dict[str, list[Header | None]] = {}
        for part, found in paths.items():
            headers[part], failures[part] = read_headers(found)
        readable = [header for found in headers.values() for header in found if header is not None]
        if not readable or (on_unreadable == "error" and any(failures.values())):
            raise DataError(unreadable_message(all_ids, _joined(failures, ids), str(root)))
        size = _common_size(readable) if image_size is None else (image_size, image_size)
        channels = 1 if all(header.grey for header in readable) else 3
        resize = image_size is not None
        if cache == "always" or (may_cache and len(readable) * size[0] * size[1] * channels > CACHE_ABOVE):
            decoded = build_cache(
                place,
                all_paths,
                size=size,
                channels=channels,
                resize=resize,
                unreadable=_joined(failures, ids),
                workers=workers,
                on_progress=on_progress,
            )
    for part, found in paths.items():
        if decoded is not None:
            own = range(starts[part], starts[part] + len(found))
            failures[part] = {i: decoded.unreadable[row] for i, row in enumerate(own) if row in decoded.unreadable}
            kept = [row for row in own if row not in decoded.unreadable]
            pixels[part] = decoded.images.select_rows(torch.tensor(kept, dtype=torch.int64))
            continue
        there = [i for i in range(len(found)) if i not in failures[part]]
        array, failed = decode([found[i] for i in there], size=size, channels=channels, resize=resize)
        keep = np.array([i not in failed for i in range(len(there))], dtype=bool)
        pixels[part] = torch.from_numpy(array if keep.all() else array[keep])
        failures[part].update({there[i]: why for i, why in failed.items()})
    if any(failures.values()):
        if on_unreadable == "error":
            again = f" (Decoded images are kept in {place}; remove it to try these files again.)" if decoded else ""
            raise DataError(unreadable_message(all_ids, _joined(failures, ids), str(root)) + again)
        skipped = [ids[part][i] for part, failed in failures.items() for i in sorted(failed)]
        notes.append(f"{len(skipped):,} unreadable images were left out: {first_few(skipped)}")

    parts = {}
    for part, found_rows in rows.items():
        kept = [i for i in range(len(found_rows)) if i not in failures[part]]
        if not kept:
            raise DataError(unreadable_message(ids[part], failures[part], part))
        parts[part] = ImageData(
            pixels[part],
            torch.tensor([found_rows[i][1] for i in kept]),
            tuple(classes),
            tuple(ids[part][i] for i in kept),
            root.resolve().name,
        )
    return parts


def _joined(failures: dict[str, dict[int, str]], ids: dict[str, list[str]]) -> dict[int, str]:
    """Failures of all parts, by position in the parts' ids put one after the other."""
    joined, offset = {}, 0
    for part, found in ids.items():
        joined.update({offset + i: why for i, why in failures[part].items()})
        offset += len(found)
    return joined


def _common_size(headers: Sequence[Header]) -> tuple[int, int]:
    sizes = Counter(header.size for header in headers)
    if len(sizes) == 1:
        return headers[0].size
    common = [f"{W}x{H} ({count:,})" for (H, W), count in sizes.most_common(4)]
    more = f" and {len(sizes) - 4:,} more sizes" if len(sizes) > 4 else ""
    raise DataError(
        f"The images have different sizes: {', '.join(common)}{more}. Set image_size (data.image_size in a "
        "configuration) to the side in pixels that all are to have, such as 64."
    )


def _carve_test(data: ImageData, fraction: float, seed: int, notes: list[str]) -> tuple[ImageData, ImageData]:
    counts = data.counts().tolist()
    target = max(1, round(fraction * len(data) / sum(n > 0 for n in counts)))
    chosen = choose(data, [min(target, n // 2) for n in counts], seed, "test")
    if not chosen.any():
        raise DataError(f"{data.name}: no class has two images, so there is nothing to test on. Add a test folder.")
    notes.append(f"{int(chosen.sum()):,} of {len(data):,} images were put aside as test part")
    single = [name for name, n in zip(data.class_names, counts, strict=True) if n == 1]
    if single:
        notes.append(f"no test image, since there is only one image: {first_few(single)}")
    return data.subset(~chosen), data.subset(chosen)
