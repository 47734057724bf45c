"""The list files that long-tailed benchmarks are published as: a line ``path label`` per image, a file per part."""

from __future__ import annotations

import gzip
import lzma
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..priors import MOST_CLASSES
from .containers import first_few
from .listing import PART_NAMES, ListedPart, Listing, part_of, val_as_test

_LONGEST, _LONGEST_LINE = 2**30, 2**16  # characters; a few kilobytes may unpack to any number of them
_SUFFIX = re.compile(r"\.txt(\.xz|\.gz)?$", re.IGNORECASE)
_OPEN: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}


def is_list(path: Path) -> bool:
    """Whether a file has the name of a list: ``.txt``, also compressed as ``.txt.xz`` or ``.txt.gz``."""
    return _SUFFIX.search(path.name) is not None


def find_lists(folder: Path) -> dict[str, dict[str, Path]]:
    """Sets of list files in a folder: the name that they share, such as ``ImageNet_LT``, to the file of each part.

    A list names its part as a word of its file name: ``ImageNet_LT_train.txt``, ``val.txt``. Only files whose first
    line reads as path and whole number count.
    """
    sets: dict[str, dict[str, Path]] = {}
    for file in sorted(folder.iterdir()):
        if not is_list(file) or not file.is_file() or file.name.startswith("."):
            continue
        words = re.split(r"([^A-Za-z0-9]+)", _SUFFIX.sub("", file.name))
        at = [i for i, word in enumerate(words) if part_of(word)]
        if len(at) == 1 and _reads_as_list(file):
            part = str(part_of(words[at[0]]))
            name = "".join(words[: at[0]] + words[at[0] + 1 :]).strip("_-. ")
            found = sets.setdefault(name, {})
            if part in found:
                raise DataError(f"{folder} has two lists of {part}, {found[part].name} and {file.name}; keep one.")
            found[part] = file
    return sets


def list_lists(path: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None) -> Listing:
    """The image files that list files name, unopened.

    Lines are ``path label``, the label a whole number from 0; a path may hold spaces. A path is absolute or starts
    from ``root``. Classes carry the names of the folders that their training images lie in, where that tells them
    apart, else their numbers. Where there is a validation but no test list, that is the test part.

    Args:
        path: a folder with one set of lists (``*_train.txt``, ``*_val.txt``, ``*_test.txt``), or one list of the set.
        root: what relative paths start from; by default the folder of the lists.

    Raises:
        DataError: no lists, no training list, several sets in one folder, a line that is not ``path label``, an image
            with several labels or in several parts, or a label of another part that the training part lacks.
    """
    place = Path(path).expanduser()
    folder = place if place.is_dir() else place.parent
    if not place.exists():
        raise DataError(f"{place} is not there; expected a list with lines 'path label', or the folder of such lists.")
    sets = find_lists(folder)
    if not place.is_dir():
        sets = {name: parts for name, parts in sets.items() if place in parts.values()}
        if not sets:
            if not is_list(place) or not _reads_as_list(place):
                raise DataError(f"{place.name}: expected lines 'path label', the label a whole number.")
            sets = {_SUFFIX.sub("", place.name): {"train": place}}
    elif len(sets) > 1:
        shown = first_few(f"{n} ({', '.join(p)})" for n, p in sets.items())
        raise DataError(
            f"{folder} holds several sets of lists: {shown}. "
            f"Name one list of the set, such as {next(iter(next(iter(sets.values())).values()))}."
        )
    elif not sets:
        raise DataError(f"{folder} holds no lists such as train.txt, with lines 'path label'.")
    ((name, files),) = sets.items()
    if "train" not in files:
        raise DataError(
            f"{folder} has lists of {name or 'these images'} for {' and '.join(files)} but none for train; expected "
            f"{next(iter(files.values())).name.replace(next(iter(files)), 'train')} beside."
        )
    notes: list[str] = []
    order = [part for part in PART_NAMES if part in files]
    rows = {part: _read(files[part], notes) for part in order}
    _check_single(rows)
    names = _class_names(*rows["train"])
    known = set(rows["train"][1].tolist())
    for part, (_, labels) in rows.items():
        strange = sorted(set(labels.tolist()) - known)
        if strange:
            raise DataError(
                f"{files[part].name}: {len(strange):,} labels of {part} are not in train: "
                f"{first_few(map(str, strange))}. Expected labels of "
                f"{files['train'].name}, from {min(known)} to {max(known)}."
            )
    base = Path(root).expanduser() if root is not None else folder
    start = os.fspath(base)
    parts = {part: ListedPart([Path(start, p) for p in paths], paths, labels) for part, (paths, labels) in rows.items()}
    return Listing(name or folder.resolve().name, files["train"], names, val_as_test(parts), tuple(notes), base)


def _text(file: Path) -> str:
    opener: Callable[..., Any] = _OPEN.get(file.suffix.lower(), open)
    try:
        with opener(file, "rt", encoding="utf-8-sig") as opened:
            text = str(opened.read(_LONGEST))
            if len(text) == _LONGEST:
                raise DataError(f"{file.name} holds {_LONGEST:,} characters or more; expected a list of images.")
            return text
    except UnicodeDecodeError as error:
        raise DataError(f"{file.name} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}.") from error


def _reads_as_list(file: Path) -> bool:
    opener: Callable[..., Any] = _OPEN.get(file.suffix.lower(), open)
    try:
        with opener(file, "rt", encoding="utf-8-sig") as opened:
            words = opened.readline(_LONGEST_LINE).rsplit(None, 1)
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error):
        return False
    return len(words) == 2 and words[1].isascii() and words[1].isdigit()


def _read(file: Path, notes: list[str]) -> tuple[list[str], np.ndarray]:
    paths, labels, wrong = [], [], []
    seen: set[str] = set()
    repeated = 0
    for i, line in enumerate(_text(file).splitlines()):
        words = line.rsplit(None, 1)
        if line in seen:
            repeated += 1
            continue
        seen.add(line)
        if len(words) == 2 and words[1].isascii() and words[1].isdigit() and len(words[1]) < 19:
            paths.append(words[0])
            labels.append(int(words[1]))
        elif words:
            wrong.append(f"line {i + 1:,} ({line[:60]!r})")
    if wrong:
        raise DataError(
            f"{file.name}: expected 'path label' in every line, the label a whole number; got {first_few(wrong)}."
        )
    if not paths:
        raise DataError(f"{file.name} names no images.")
    if repeated:
        notes.append(f"{repeated:,} lines of {file.name} that stand there twice count once")
    return paths, np.array(labels, dtype=np.int64)


def _check_single(rows: dict[str, tuple[list[str], np.ndarray]]) -> None:
    seen: dict[str, tuple[str, int]] = {}
    twice = []
    for part, (paths, labels) in rows.items():
        for path, label in zip(paths, labels.tolist(), strict=True):
            before = seen.setdefault(path, (part, label))
            if before != (part, label):
                twice.append(f"{path} as {before[1]} in {before[0]} and as {label} in {part}")
    if twice:
        raise DataError(f"{len(twice):,} images with several labels or in several parts: {first_few(twice)}. Keep one.")


def _class_names(paths: list[str], labels: np.ndarray) -> tuple[str, ...]:
    K = int(labels.max()) + 1
    if K > MOST_CLASSES:
        raise DataError(f"Expected labels below {MOST_CLASSES:,}, counted from 0, got {K - 1:,}.")
    if K < 2:
        raise DataError("Expected at least two classes, got one.")
    folders: dict[int, set[str]] = {}
    for path, k in zip(paths, labels.tolist(), strict=True):
        folders.setdefault(k, set()).add(path.rpartition("/")[0].rpartition("/")[2])
    names = [next(iter(folders[k])) if len(folders.get(k, ())) == 1 else "" for k in range(K)]
    if all(names) and len(set(names)) == K:
        return tuple(names)
    return tuple(str(k) for k in range(K))
