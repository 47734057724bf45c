"""Which images to look at: files, folders, lists and streams of paths; one after the other, never all at once."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..kinds import Kind, clean

# Those of krdistill.data.folder, which needs torch; a test holds them equal.
IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
_LISTS = (".csv", ".tsv", ".txt")
_BLOCK = 1 << 16
_BESIDE_NUMBERS = ("label", "category", "intent", "split", "group", "id")
_LARGEST = 3e38  # of float32


@dataclass(frozen=True)
class Entry:
    """One image to look at.

    Attributes:
        shown: the path as it was given.
        path: where the file is.
        error: why there is nothing to look at, or None.
        value: the sentence, or the numbers of a row, where they stand in the list itself.
    """

    shown: str
    path: Path
    error: str | None = None
    value: str | tuple[float, ...] | None = None


def listed_entries(inputs: Iterable[str], kind: Kind, width: int, stdin: BinaryIO | None = None) -> Iterator[Entry]:
    """The sentences, or rows of numbers, of files that hold them, in order.

    Args:
        inputs: sentences: a ``.csv`` or ``.tsv`` file with a column ``text``, any other file with one per line, ``-``
            for lines on ``stdin`` (else standard input). Rows: ``.csv`` or ``.tsv`` files with a header and ``width``
            columns of numbers, beside which ``label``, ``split``, ``group`` and ``id`` are passed over.
        kind: ``text`` or ``features``.
        width: numbers per row.
        stdin: see above.
    """
    for given in inputs:
        path = Path(given)
        if given == "-" and kind == "text":
            for line in stdin or sys.stdin.buffer:
                yield _sentence(line.decode("utf-8", "replace").rstrip("\r\n"), path)
            continue
        table = path.suffix.lower() in (".csv", ".tsv")
        if kind == "features" and not table:
            yield Entry(given, path, "expected a .csv or .tsv file with a header and rows of numbers")
            continue
        try:
            with path.open(newline="" if table else None, encoding="utf-8-sig", errors="replace") as file:
                if not table:
                    yield from (_sentence(line.rstrip("\r\n"), path) for line in file)
                    continue
                rows = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
                names = [name.strip().lower() for name in next(rows, [])]
                if kind == "text" and "text" not in names:
                    yield Entry(given, path, f"expected a column 'text', got {', '.join(names) or 'an empty file'}")
                    continue
                wanted = [i for i, name in enumerate(names) if name not in _BESIDE_NUMBERS]
                if kind == "features" and len(wanted) != width:
                    yield Entry(given, path, f"expected {width} columns of numbers, got {len(wanted)}")
                    continue
                for row in rows:
                    if not row:
                        continue
                    if kind == "text":
                        at = names.index("text")
                        yield _sentence(row[at] if at < len(row) else "", path)
                    else:
                        yield _numbers(row, wanted, f"{given}:{rows.line_num}", path)
        except (OSError, csv.Error) as error:
            reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else str(error)
            yield Entry(given, path, reason)


def _sentence(text: str, path: Path) -> Entry:
    return Entry(text, path, None if clean(text) else "an empty sentence", text)


def _numbers(row: Sequence[str], wanted: Sequence[int], shown: str, path: Path) -> Entry:
    try:
        values = tuple(float(row[i]) for i in wanted)
    except (ValueError, IndexError):
        return Entry(shown, path, "expected a number in every column")
    if not all(abs(value) < _LARGEST for value in values):
        return Entry(shown, path, "NaN, infinity or a number that is too large")
    return Entry(shown, path, None, values)


def entries(inputs: Iterable[str], stdin: BinaryIO | None = None) -> Iterator[Entry]:
    """The images that a command line names, in its order.

    A folder stands for the images in it at any depth, sorted by name in each folder, hidden ones left out; a ``.txt``
    file for the paths on its lines; a ``.csv`` or ``.tsv`` file for those in its column ``path`` (both relative to the
    folder the file lies in); ``-`` for the paths on ``stdin`` (else standard input), one per line, or separated by
    NUL as ``find -print0`` writes them. Anything else is an image file. What cannot be listed becomes an entry with an
    error.
    """
    for given in inputs:
        path = Path(given)
        if given == "-":
            for name in _lines(stdin or sys.stdin.buffer):
                yield Entry(name, Path(name))
        elif os.path.isdir(given):
            yield from _in_folder(path)
        elif path.suffix.lower() in _LISTS:
            yield from _in_list(path)
        else:
            yield Entry(given, path)


def _in_folder(root: Path) -> Iterator[Entry]:
    failed: list[OSError] = []
    seen, found = set(), False
    for place, folders, files in os.walk(root, followlinks=True, onerror=failed.append):
        try:
            stat = os.stat(place)
        except OSError as gone:  # since it was listed
            failed.append(gone)
            continue
        if (stat.st_dev, stat.st_ino) in seen:  # links may lead in a circle
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                found = True
                yield Entry(os.path.join(place, name), Path(place, name))
    for error in failed:
        yield Entry(str(error.filename), Path(error.filename), (error.strerror or "cannot be listed").lower())
    if not found and not failed:
        known = ", ".join(sorted(IMAGE_SUFFIXES))
        yield Entry(str(root), root, f"a folder without images (known suffixes: {known})")


def _in_list(path: Path) -> Iterator[Entry]:
    kind = path.suffix.lower()
    try:
        # File names may hold bytes that are no UTF-8.
        with path.open(newline="\n" if kind == ".txt" else "", encoding="utf-8-sig", errors="surrogateescape") as file:
            if kind == ".txt":
                for line in file:
                    if name := line.rstrip("\r\n"):
                        yield Entry(name, path.parent / name)
                return
            rows = csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ",")
            columns = rows.fieldnames or ()
            if "path" not in columns:
                yield Entry(str(path), path, f"expected a column 'path', got {', '.join(columns) or 'an empty file'}")
                return
            for row in rows:
                if name := row["path"]:
                    yield Entry(name, path.parent / name)
                else:
                    yield Entry(f"{path}:{rows.line_num}", path, "no path in this line")
    except (OSError, csv.Error) as error:
        reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else str(error)
        yield Entry(str(path), path, reason)


def _lines(stream: BinaryIO) -> Iterator[str]:
    rest, separator = b"", b""
    read = getattr(stream, "read1", stream.read)  # read1 gives what is there, and does not wait for more
    while block := read(_BLOCK):
        separator = separator or (b"\0" if b"\0" in block else b"\n")
        *names, rest = (rest + block).split(separator)
        yield from (os.fsdecode(name) for name in map(_trimmed, names) if name)
    if rest := _trimmed(rest):
        yield os.fsdecode(rest)


def _trimmed(name: bytes) -> bytes:
    return name.rstrip(b"\r")
