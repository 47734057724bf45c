"""Image files with their labels, before any of them is opened; and from there to images in memory or in a cache.

Folders, manifests and the field's list files all become a :class:`Listing`, so that they share one way of decoding.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ..errors import ArgumentError, DataError
from ..kinds import NOUNS
from .cache import CACHE_ABOVE, Cache, build_cache, cache_key, cache_root, open_cache
from .containers import Examples, ImageData, LoadedImages, first_few
from .decoding import Header, decode, read_headers, unreadable_message
from .selection import lot
from .sources import CacheUse, SplitBy

PART_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "val": ("val", "valid", "validation"),
}


@dataclass(frozen=True, eq=False)
class ListedPart:
    """The image files of one part.

    Attributes:
        paths: the files.
        ids: their paths as the source has them, one per file.
        labels: int64, shape ``(N,)``.
        groups: the group (patient, camera) of each file, where the source names one.
    """

    paths: Sequence[Path]
    ids: Sequence[str]
    labels: npt.NDArray[np.int64]
    groups: Sequence[str] | None = None


@dataclass(frozen=True, eq=False)
class Listing:
    """What a source names, unopened.

    Attributes:
        name: name of the data set.
        place: the folder or file it comes from, for messages.
        class_names: K names.
        parts: ``train``, and ``test`` and ``val`` where the source has them.
        notes: what the reader should know.
        root: what relative paths start from, where paths are named in a file and may therefore be wrong; None where
            the files were found by looking.
    """

    name: str
    place: Path
    class_names: tuple[str, ...]
    parts: Mapping[str, ListedPart]
    notes: tuple[str, ...] = ()
    root: Path | None = None


def part_of(name: str) -> str | None:
    """``train``, ``test`` or ``val`` for one of the names that people give these parts; None for any other."""
    return next((part for part, names in PART_NAMES.items() if name.strip().lower() in names), None)


def check_spelling(labels: Mapping[str, int], where: str) -> None:
    """Refuses class names that differ in case or white space alone.

    Args:
        labels: class names as they are written, with how often.
        where: the source, for the message.
    """
    spellings: dict[str, list[str]] = {}
    for label in labels:
        spellings.setdefault(" ".join(label.split()).casefold(), []).append(label)
    twice = [" and ".join(f"{s!r} ({labels[s]:,})" for s in found) for found in spellings.values() if len(found) > 1]
    if twice:
        raise DataError(
            f"{where}: the same class in different spellings: {first_few(twice)}. Write every class in one way, or, "
            "if they are different classes, give them names that differ in more than case and white space."
        )


def sorted_names(labels: Iterable[str]) -> list[str]:
    """Class names in order: as numbers where all are whole numbers, else as text."""
    names = sorted(set(labels))
    return sorted(names, key=int) if all(n.isascii() and n.isdigit() for n in names) else names


def number_labels(
    labels: Mapping[str, Sequence[str]], where: str
) -> tuple[tuple[str, ...], dict[str, npt.NDArray[np.int64]]]:
    """Labels as texts to class names, in the order of :func:`sorted_names`, and class numbers.

    Args:
        labels: of every part, as they are written; ``train`` is one of them.
        where: the source, for messages.

    Returns:
        K names without white space around them, and the class numbers of every part.

    Raises:
        DataError: spellings that differ in case or white space alone, fewer than two classes, or a label of another
            part that ``train`` lacks.
    """
    check_spelling(Counter(label for found in labels.values() for label in found), where)
    known = {label.strip() for label in labels["train"]}
    for part, found in labels.items():
        strange = Counter(label.strip() for label in found if label.strip() not in known)
        if strange:
            raise DataError(
                f"{where}: {len(strange):,} labels of {part} are not in train: "
                f"{first_few(f'{name!r} ({count:,})' for name, count in strange.items())}. Correct them, give the "
                "classes training images, or leave these rows out."
            )
    if len(known) < 2:
        raise DataError(f"{where}: expected at least two classes, got {len(known)} ({first_few(known)}).")
    names = sorted_names(known)
    number = {name: k for k, name in enumerate(names)}
    return tuple(names), {
        part: np.array([number[label.strip()] for label in found], dtype=np.int64) for part, found in labels.items()
    }


def val_as_test(parts: dict[str, ListedPart]) -> dict[str, ListedPart]:
    """A validation part without a test part beside it is the test part."""
    if "test" not in parts and "val" in parts:
        return {"test" if part == "val" else part: found for part, found in parts.items()}
    return parts


def missing_files(listing: Listing) -> list[str]:
    """The named files that are not there, as paths."""
    return [str(path) for part in listing.parts.values() for path in part.paths if not path.exists()]


def missing_message(listing: Listing, missing: Sequence[str]) -> str:
    """One error for all the named files that are not there."""
    total = sum(len(part.paths) for part in listing.parts.values())
    return (
        f"{len(missing):,} of {total:,} images that {listing.place.name} names are not there, such as {missing[0]}. "
        f"Relative paths start from {listing.root}; another start is given by root (data.root in a configuration). "
        "Files that are gone for good are left out with on_unreadable='skip' (data.on_unreadable)."
    )


def load_listing(
    listing: Listing,
    *,
    image_size: int | None,
    on_unreadable: str,
    cache: CacheUse,
    caches: Path,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, ImageData], list[str]]:
    """Decodes the files of a listing, into memory or, where they are many, through a cache of decoded images.

    Args:
        listing: the files.
        image_size, on_unreadable, cache, workers, on_progress: see :func:`krdistill.data.folder.load_folder`.
        caches: the folder that holds the caches.

    Returns:
        The images of every part, and notes.

    Raises:
        DataError: files that are not there or unreadable, different sizes and no ``image_size``, or images that fit
            neither into memory nor on the disk.
    """
    notes = list(listing.notes)
    if listing.root is not None:
        missing = missing_files(listing)
        if missing and (on_unreadable == "error" or len(missing) == sum(len(p.paths) for p in listing.parts.values())):
            raise DataError(missing_message(listing, missing))
    root = str(listing.place)
    paths = {part: list(found.paths) for part, found in listing.parts.items()}
    ids = {part: list(found.ids) for part, found in listing.parts.items()}
    starts = dict(zip(paths, itertools.accumulate((len(found) for found in paths.values()), initial=0), strict=False))
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
            raise DataError(unreadable_message(all_ids, _joined(failures, ids), root))
        size = common_size(readable) if image_size is None else (image_size, image_size)
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
            raise DataError(unreadable_message(all_ids, _joined(failures, ids), root) + again)
        skipped = [ids[part][i] for part, failed in failures.items() for i in sorted(failed)]
        notes.append(f"{len(skipped):,} unreadable images were left out: {first_few(skipped)}")

    parts = {}
    for part, listed in listing.parts.items():
        kept = [i for i in range(len(listed.paths)) if i not in failures[part]]
        if not kept:
            raise DataError(unreadable_message(ids[part], failures[part], part))
        parts[part] = ImageData(
            pixels[part],
            torch.from_numpy(listed.labels[kept]),
            listing.class_names,
            tuple(ids[part][i] for i in kept),
            listing.name,
            None if listed.groups is None else tuple(listed.groups[i] for i in kept),
        )
    return parts, notes


def load_listed(
    listing: Listing,
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
    """A listing to images in parts: :func:`load_listing`, then :func:`finish`.

    Args and errors are those of :func:`krdistill.data.folder.load_folder`.
    """
    if cache not in ("auto", "always", "never"):
        raise ArgumentError(f"Expected cache to be 'auto', 'always' or 'never', got {cache!r}.")
    if workers is not None and (not isinstance(workers, int) or workers < 0):
        raise ArgumentError(f"Expected workers to be a whole number, at least 0, got {workers!r}.")
    check_test_fraction(test_fraction, listing.parts, str(listing.place))
    parts, notes = load_listing(
        listing,
        image_size=image_size,
        on_unreadable=on_unreadable,
        cache=cache,
        caches=cache_root(cache_folder),
        workers=workers,
        on_progress=on_progress,
    )
    return finish(parts, notes, split_by, test_fraction, test_seed)


def check_test_fraction(test_fraction: float | None, parts: Container[str], where: str) -> None:
    """Refuses a ``test_fraction`` outside (0, 1), or one that would have no effect."""
    if test_fraction is not None and not 0 < test_fraction < 1:
        raise ArgumentError(f"Expected test_fraction between 0 and 1, got {test_fraction}.")
    if test_fraction is not None and "test" in parts:
        raise ArgumentError(f"test_fraction does not apply: {where} has a test part of its own.")


def finish(
    parts: Mapping[str, Examples],
    notes: Sequence[str],
    split_by: SplitBy = "none",
    test_fraction: float | None = None,
    test_seed: int = 0,
) -> LoadedImages:
    """Binds the images that belong together, and puts a test part aside where there is none.

    The test part has ``test_fraction * N / K`` images of every class, but at most half of the class; images of one
    unit stay together (:func:`krdistill.data.selection.lot`).

    Args:
        parts: the images; their ``units`` are the groups that the source names.
        notes: what is known so far.
        split_by: ``none``, ``group`` or ``duplicates`` (see :func:`krdistill.data.load_images`).
        test_fraction: share of the images; 0.2 by default.
        test_seed: which images those are.

    Raises:
        ArgumentError: as :func:`check_test_fraction`.
        DataError: groups that are not named, or that lie in two parts; or no image can be put aside.
    """
    check_test_fraction(test_fraction, parts, parts["train"].name)
    parts, found = bind(parts, split_by)
    return put_test_aside(parts, [*notes, *found], test_fraction, test_seed)


def put_test_aside(
    parts: Mapping[str, Examples], notes: Sequence[str], test_fraction: float | None = None, test_seed: int = 0
) -> LoadedImages:
    """The second half of :func:`finish`: a test part where there is none, out of images whose units are settled."""
    notes, data = list(notes), parts["train"]
    if "test" in parts:
        return LoadedImages(data, parts["test"], parts.get("val"), tuple(notes))
    counts = data.counts().tolist()
    target = max(1, round((test_fraction or 0.2) * len(data) / sum(n > 0 for n in counts)))
    chosen = lot(data.labels, data.ids, [min(target, n // 2) for n in counts], test_seed, "test", data.units)
    if not chosen.any():
        why = "no class has two images" if data.units is None else "no images that belong together can be spared"
        raise DataError(f"{data.name}: {why}, so there is nothing to test on. Add a test part.")
    notes.append(f"{int(chosen.sum()):,} of {len(data):,} {NOUNS[data.kind]} were put aside as test part")
    single = [name for name, n in zip(data.class_names, counts, strict=True) if n == 1]
    if single:
        notes.append(f"no test image, since there is only one image: {first_few(single)}")
    test = data.subset(chosen)
    tested = test.counts().tolist()
    bound = [name for name, n, m in zip(data.class_names, counts, tested, strict=True) if n > 1 and not m]
    if bound:
        notes.append(f"no test image, since its images belong together: {first_few(bound)}")
    return LoadedImages(data.subset(~chosen), test, None, tuple(notes))


def bind(parts: Mapping[str, Examples], split_by: str) -> tuple[dict[str, Examples], list[str]]:
    """The first half of :func:`finish`: images with their units, and notes on units that lie in two parts already."""
    if split_by not in ("none", "group", "duplicates"):
        raise ArgumentError(f"Expected split_by to be 'none', 'group' or 'duplicates', got {split_by!r}.")
    name = parts["train"].name
    parts = {part: parts[part] for part in ("train", "val", "test") if part in parts}
    if split_by == "none":
        return {part: replace(data, units=None) for part, data in parts.items()}, []
    if split_by == "group":
        for part, data in parts.items():
            if data.units is None:
                raise DataError(
                    f"{name} names no groups, and split_by is 'group' (data.split_by in a configuration). Expected a "
                    "manifest with a column 'group' (the patient, the camera), or split_by 'none' or 'duplicates'."
                )
            blank = [data.ids[i] for i, unit in enumerate(data.units) if not unit.strip()]
            if blank:
                raise DataError(f"{name}: {len(blank):,} images of {part} have no group: {first_few(blank)}. Name one.")
        bound = dict(parts)
    else:
        which = _duplicates(list(parts.values()))
        ids = [i for data in parts.values() for i in data.ids]
        bound, start = {}, 0
        for part, data in parts.items():
            units = tuple(ids[first] for first in which[start : start + len(data)])
            bound[part], start = replace(data, units=units), start + len(data)
    notes = []
    for one, other in itertools.combinations(bound, 2):
        both = sorted(set(bound[one].units or ()) & set(bound[other].units or ()))
        if both and split_by == "group":
            raise DataError(
                f"{name}: {len(both):,} groups lie in {one} and in {other}: {first_few(both)}. Move each to one part, "
                "leave the split out so that one is made, or accept it with split_by 'none'."
            )
        if both:
            notes.append(f"{len(both):,} images with near-duplicates in {one} and in {other}: {first_few(both)}")
    return bound, notes


def _duplicates(parts: Sequence[Examples]) -> list[int]:
    """For each row of all parts the first that it is a near-duplicate of; of other kinds than images, a copy of."""
    if all(isinstance(data, ImageData) for data in parts):
        from .duplicates import near_duplicates, picture_hashes

        hashes = [picture_hashes(data.inputs) for data in parts]
        return near_duplicates(*(np.concatenate(found) for found in zip(*hashes, strict=True))).tolist()
    from .tables import same_rows

    first: dict[str, int] = {}
    return [first.setdefault(row, i) for i, row in enumerate(row for data in parts for row in same_rows(data))]


def _joined(failures: dict[str, dict[int, str]], ids: dict[str, list[str]]) -> dict[int, str]:
    """Failures of all parts, by position in the parts' ids put one after the other."""
    joined, offset = {}, 0
    for part, found in ids.items():
        joined.update({offset + i: why for i, why in failures[part].items()})
        offset += len(found)
    return joined


def common_size(headers: Sequence[Header]) -> tuple[int, int]:
    """The size that all images have; sizes that differ are an error that names them."""
    sizes = Counter(header.size for header in headers)
    if len(sizes) == 1:
        return headers[0].size
    common = [f"{W}x{H} ({count:,})" for (H, W), count in sizes.most_common(4)]
    more = f" and {len(sizes) - 4:,} more sizes" if len(sizes) > 4 else ""
    raise DataError(
        f"The images have different sizes: {', '.join(common)}{more}. Set image_size (data.image_size in a "
        "configuration) to the side in pixels that all are to have, such as 64."
    )
