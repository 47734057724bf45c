"""What a data set holds, before anything is trained on it: counts, sizes, files that cannot be read, copies."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..config import DataConfig
from ..errors import DataError
from ..kinds import NOUNS
from ..priors import ClassPrior
from .arrays import load_npz, open_hub
from .containers import Examples, ImageData, LoadedImages
from .decoding import ImageFile, decode, read_headers
from .duplicates import difference_hashes, exact_duplicates, near_duplicates, thumbnails
from .listing import bind, put_test_aside
from .sources import is_path, list_files, load_images, load_rows
from .splits import cut_loaded
from .tables import same_rows

_SIDE = 64  # what images are decoded to for their hashes; a JPEG of many megapixels is then decoded at an eighth
_CHUNK = 128
_SHOWN = 5
_Rows = dict[str, tuple[Sequence[str], npt.NDArray[np.int64], Sequence[str] | None]]


@dataclass
class _Seen:
    """What was seen of every image, row by row over all parts."""

    sizes: list[tuple[int, int] | None] = field(default_factory=list)
    grey: list[bool | None] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    thumbs: list[npt.NDArray[np.uint8]] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    unreadable: dict[int, str] = field(default_factory=dict)


def inspect_data(config: DataConfig, on_progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Looks at every image, sentence or row of a source, and at the parts that a run of this configuration would have.

    Nothing stops at a file that is not there or cannot be read: such are counted, and stay in the counts of images
    unless ``on_unreadable`` is ``skip``. Image files are opened and decoded once, small; none is kept. Of lists
    without their images, counts and groups are all there is to see, and ``unseen`` says so.

    Args:
        config: the source, and how it is cut and split.
        on_progress: called with the images looked at so far and their number.

    Returns:
        Plain data: ``name``; ``parts`` (part to images, classes with images, largest and smallest class, imbalance
        factor); ``groups`` (``rule`` and rows of name, classes and images per part); ``classes`` (rows of name, group
        and images per part, in class order); ``sizes`` (width, height, images; the most frequent first), ``grey`` and
        ``colour`` (images); ``missing`` and ``unreadable`` (number and the first few); ``copies`` and
        ``near_duplicates`` (clusters, images beyond the first of each, clusters with several labels, clusters across
        two parts, and examples; see :mod:`krdistill.data.duplicates`); ``split_groups`` (groups, and those across two
        parts); ``without_training`` and ``without_test`` (classes); ``unseen``; ``notes``; and
        ``noun``, what the examples are called. Of sentences and rows, ``copies`` are equal ones (in upper or lower
        case), and what is said of image files is not there.

    Raises:
        DataError: a source that cannot be listed, or a cut that it cannot supply.
        ArgumentError: as :func:`krdistill.data.load_data`.
    """
    rows_of = load_rows(config.source, config.root)
    if rows_of is not None:
        return _inspect_rows(*rows_of, config)
    name, classes, parts, files, notes = _open(config)
    seen = _Seen()
    total = sum(len(labels) for _, labels, _ in parts.values())
    for part in parts:
        _look(files[part], seen, total, on_progress)
    gone = {*seen.missing, *seen.unreadable}
    ids = [i for found, _, _ in parts.values() for i in found]
    clusters = _clusters(seen, gone)
    standing, start = {}, 0
    for part, (found, labels, groups) in parts.items():
        rows = [r for r in range(len(found)) if start + r not in gone or config.on_unreadable == "error"]
        if rows:
            units = None if groups is None else tuple(groups[r] for r in rows)
            if config.split_by == "duplicates":
                units = tuple(ids[clusters[1][start + r]] for r in rows)
            image = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(len(rows), 1, 1, 1)  # stands for any
            mine = tuple(found[r] for r in rows)
            standing[part] = ImageData(image, torch.from_numpy(labels[rows]), classes, mine, name, units)
        start += len(found)
    if "train" not in standing:
        raise DataError(f"{name}: none of {total:,} images can be read: {_reasons(seen, ids)[0]}.")
    named_groups = {part: data.units for part, data in standing.items() if config.split_by != "duplicates"}
    bundle, notes = _split(standing, config, notes)
    of_row = {i: part for part, data in bundle.items() for i in data.ids}
    place = [of_row.get(i, "") for i in ids]
    counts = {part: data.counts().tolist() for part, data in bundle.items()}
    names = bundle["train"].class_names
    labels_of = np.concatenate([labels for _, labels, _ in parts.values()])
    result: dict[str, Any] = {
        "name": name,
        "noun": "images",
        "parts": {part: _part(values) for part, values in counts.items()},
        **_groups(counts, names, config),
        "sizes": [[W, H, n] for (H, W), n in Counter(s for s in seen.sizes if s is not None).most_common()],
        "grey": sum(g is True for g in seen.grey),
        "colour": sum(g is False for g in seen.grey),
        "missing": {"number": len(seen.missing), "first": [ids[i] for i in seen.missing[:_SHOWN]]},
        "unreadable": {"number": len(seen.unreadable), "first": _reasons(seen, ids)},
        "copies": _copies(clusters[0], place, labels_of, ids),
        "near_duplicates": _copies(clusters[1], place, labels_of, ids),
        "without_training": [c for c in classes if c not in set(names)],
        "without_test": [c for c, n in zip(names, counts["test"], strict=True) if not n] if "test" in counts else [],
        "unseen": f"{len(seen.missing):,} images are not there: their sizes, whether they can be read and whether they "
        "are copies could not be looked at"
        if seen.missing
        else "",
        "notes": notes,
    }
    owner = {
        i: unit
        for part, units in named_groups.items()
        for i, unit in zip(standing[part].ids, units or (), strict=False)
    }
    if owner:
        where: dict[str, set[str]] = {}
        for i, unit in owner.items():
            where.setdefault(unit, set()).add(of_row.get(i, ""))
        result["split_groups"] = {"number": len(where), "across": _across(where.values())}
    return result


def _inspect_rows(parts: Mapping[str, Examples], notes: Sequence[str], config: DataConfig) -> dict[str, Any]:
    """The same of sentences, or rows of numbers."""
    bound, found = bind(parts, config.split_by)
    bundle, notes = _parted(bound, config, [*notes, *found])
    counts = {part: data.counts().tolist() for part, data in bundle.items()}
    first, train = parts["train"], bundle["train"]
    ids = [i for data in bundle.values() for i in data.ids]
    place = [part for part, data in bundle.items() for _ in data.ids]
    labels = np.concatenate([data.labels.numpy() for data in bundle.values()])
    _, which = np.unique([row for data in bundle.values() for row in same_rows(data)], return_inverse=True)
    result = {
        "name": first.name,
        "noun": NOUNS[first.kind],
        "parts": {part: _part(values) for part, values in counts.items()},
        **_groups(counts, train.class_names, config, NOUNS[first.kind]),
        "sizes": [],
        "copies": _copies(which, place, labels, ids),
        "without_training": [c for c in first.class_names if c not in set(train.class_names)],
        "without_test": [c for c, n in zip(train.class_names, counts.get("test", ()), strict=False) if not n],
        "unseen": "",
        "notes": notes,
    }
    if config.split_by == "group":
        where: dict[str, set[str]] = {}
        for part, data in bundle.items():
            for unit in data.units or ():
                where.setdefault(unit, set()).add(part)
        result["split_groups"] = {"number": len(where), "across": _across(where.values())}
    return result


def _open(
    config: DataConfig,
) -> tuple[
    str,
    tuple[str, ...],
    _Rows,
    dict[str, Sequence[ImageFile] | ImageData],
    list[str],
]:
    """Name, classes, (ids, labels, groups) of every part, its files or images, and notes."""
    source = config.source
    listing = list_files(source, root=config.root) if is_path(source) else None
    if listing is not None:
        parts: _Rows = {part: (p.ids, p.labels, p.groups) for part, p in listing.parts.items()}
        return (
            listing.name,
            listing.class_names,
            parts,
            {k: p.paths for k, p in listing.parts.items()},
            list(listing.notes),
        )
    if is_path(source) and not source.lower().endswith(".npz"):
        name, classes, found = open_hub(source)
        rows: _Rows = {
            part: ([f"{part}/{i}" for i in range(len(f))], y, groups) for part, (f, y, groups) in found.items()
        }
        return name, classes, rows, {part: f for part, (f, _, _) in found.items()}, []
    if is_path(source):
        data, notes = load_npz(source)
    else:
        train, test, val, found_notes = load_images(source, root=config.root, on_unreadable=config.on_unreadable)
        loaded = {"train": train, "test": test, "val": val}
        data = {part: found for part, found in loaded.items() if isinstance(found, ImageData)}
        notes = list(found_notes)
    own: _Rows = {part: (d.ids, d.labels.numpy(), d.units) for part, d in data.items()}
    first = data["train"]
    return first.name, first.class_names, own, dict(data), notes


def _look(
    files: Sequence[ImageFile] | ImageData, seen: _Seen, total: int, on_progress: Callable[[int, int], None] | None
) -> None:
    for at in range(0, len(files), _CHUNK):
        if isinstance(files, ImageData):
            pixels = files.images[at : at + _CHUNK].numpy()
            seen.sizes += [files.image_size] * len(pixels)
            seen.grey += [files.channels == 1] * len(pixels)
            seen.digests += [hashlib.sha256(image.tobytes()).digest() for image in pixels]
            seen.thumbs.append(thumbnails(pixels))
        else:
            _look_at_files([files[i] for i in range(at, min(at + _CHUNK, len(files)))], seen)
        if on_progress is not None:
            on_progress(len(seen.digests), total)


def _look_at_files(files: Sequence[ImageFile], seen: _Seen) -> None:
    start = len(seen.digests)
    contents: list[ImageFile] = []
    failed: dict[int, str] = {}
    for i, file in enumerate(files):
        try:
            contents.append(file if isinstance(file, bytes) else file.read_bytes())
        except FileNotFoundError:
            seen.missing.append(start + i)
            contents.append(b"")
        except OSError as error:
            failed[i] = (error.strerror or str(error)).lower()
            contents.append(b"")
    gone = {i - start for i in seen.missing if i >= start}
    headers, unread = read_headers(contents)
    there = [i for i in range(len(files)) if i not in unread]
    pixels, undecoded = decode([contents[i] for i in there], size=(_SIDE, _SIDE), channels=3, resize=True)
    failed = {**unread, **{there[i]: why for i, why in undecoded.items()}, **failed}
    seen.unreadable.update({start + i: why for i, why in sorted(failed.items()) if i not in gone})
    whole = [None if i in failed or header is None else header for i, header in enumerate(headers)]
    seen.sizes += [None if header is None else header.size for header in whole]
    seen.grey += [None if header is None else header.grey for header in whole]
    seen.digests += [hashlib.sha256(c if isinstance(c, bytes) else b"").digest() for c in contents]
    thumbs = np.zeros((len(files), 8, 9), np.uint8)
    if there:
        thumbs[there] = thumbnails(pixels)
    seen.thumbs.append(thumbs)


def _clusters(seen: _Seen, gone: set[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The first row of each row's copies and near-duplicates; what could not be read is on its own."""
    rows = np.array([i for i in range(len(seen.digests)) if i not in gone], dtype=np.int64)
    exact, near = np.arange(len(seen.digests)), np.arange(len(seen.digests))
    if len(rows):
        digests = np.frombuffer(b"".join(seen.digests), np.uint8).reshape(len(seen.digests), -1)[rows]
        thumbs = np.concatenate(seen.thumbs)[rows]
        exact[rows] = rows[exact_duplicates(digests)]
        near[rows] = rows[near_duplicates(difference_hashes(thumbs), thumbs)]
    return exact, near


def _split(
    standing: Mapping[str, Examples], config: DataConfig, notes: Sequence[str]
) -> tuple[dict[str, Examples], list[str]]:
    """The parts of a run, and notes."""
    if config.split_by == "duplicates":  # their units are set
        bound = dict(standing)
    else:
        bound, found = bind(standing, config.split_by)
        notes = [*notes, *found]
    return _parted(bound, config, notes)


def _parted(
    bound: Mapping[str, Examples], config: DataConfig, notes: Sequence[str]
) -> tuple[dict[str, Examples], list[str]]:
    try:
        loaded = put_test_aside(bound, notes)
    except DataError as error:
        if "test" in bound:
            raise
        loaded = LoadedImages(bound["train"], bound["train"], None, (*notes, str(error)))
    bundle = cut_loaded(
        loaded,
        profile=config.profile,
        imbalance_factor=config.imbalance_factor,
        n_max=config.n_max,
        seed=config.cut_seed,
        val_fraction=config.val_fraction,
        empty="drop",
    )
    parts = {"train": bundle.train, "val": bundle.val, "test": None if loaded.test is loaded.train else bundle.test}
    return {part: data for part, data in parts.items() if data is not None}, bundle.split["notes"]


def _part(counts: Sequence[int]) -> dict[str, Any]:
    there = [n for n in counts if n]
    return {
        "images": sum(counts),
        "classes": len(there),
        "largest": max(counts),
        "smallest": min(there),
        "imbalance_factor": max(counts) / min(there),
    }


def _groups(
    counts: Mapping[str, list[int]], names: Sequence[str], config: DataConfig, noun: str = "images"
) -> dict[str, Any]:
    prior = ClassPrior.from_counts(counts["train"], class_names=names)
    groups = prior.groups(config.groups, noun=noun)
    index = groups.index.numpy()
    rows = [
        {"name": g, "classes": int((index == k).sum())}
        | {part: int(np.array(values)[index == k].sum()) for part, values in counts.items()}
        for k, g in enumerate(groups.names)
    ]
    classes = [
        {"name": names[k], "group": groups.names[index[k]], **{part: values[k] for part, values in counts.items()}}
        for k in range(len(names))
    ]
    return {"groups": {"rule": groups.rule, "rows": rows}, "classes": classes}


def _copies(
    which: npt.NDArray[np.int64], place: Sequence[str], labels: npt.NDArray[np.int64], ids: Sequence[str]
) -> dict[str, Any]:
    members: dict[int, list[int]] = {}
    for row, first in enumerate(which.tolist()):
        if place[row]:
            members.setdefault(first, []).append(row)
    many = [rows for rows in members.values() if len(rows) > 1]
    many.sort(key=lambda rows: -len({place[r] for r in rows}))  # those across parts first
    return {
        "clusters": len(many),
        "images": sum(len(rows) - 1 for rows in many),
        "several_labels": sum(len(set(labels[rows].tolist())) > 1 for rows in many),
        "across": _across({place[r] for r in rows} for rows in many),
        "examples": [[ids[r] for r in rows[:4]] for rows in many[:_SHOWN]],
    }


def _across(places: Any) -> dict[str, int]:
    """How often something lies in two parts, by their names such as ``train/test``."""
    found: Counter[str] = Counter()
    for parts in places:
        for one, other in itertools.combinations(("train", "val", "test"), 2):
            found[f"{one}/{other}"] += one in parts and other in parts
    return {pair: count for pair, count in found.items() if count}


def _reasons(seen: _Seen, ids: Sequence[str]) -> list[str]:
    return [f"{ids[i]} ({why})" for i, why in itertools.islice(seen.unreadable.items(), _SHOWN)]
