"""A table that names image files and their labels: CSV, TSV or Parquet."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError, MissingDependencyError
from .containers import first_few
from .listing import PART_NAMES, ListedPart, Listing, number_labels, part_of, val_as_test

MANIFEST_SUFFIXES = (".csv", ".tsv", ".parquet")
_COLUMNS = ("path", "label", "split", "group")
_SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
_EXPECTED = "the columns path and label, and, if wanted, split and group"
# Marks between the labels of one cell; a comma may be part of a name ("crane, bird").
_BETWEEN_LABELS = (";", "|")


def list_manifest(path: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None) -> Listing:
    """The image files that a table names, unopened.

    Columns are found by name, in any order and case; others are passed over. ``path`` is absolute or starts from
    ``root``; ``label`` is one class name; ``split`` is train, test or val (or one of their usual other names);
    ``group`` says which images belong together (the patient, the camera). Classes are numbered by sorted name, or by
    number where all names are whole numbers. Where ``split`` names a validation but no test part, that is the test
    part. A row that stands twice in one part counts once.

    Args:
        path: a ``.csv`` or ``.tsv`` file in UTF-8 with a header line, separated by comma, tab, semicolon or bar; or a
            ``.parquet`` file.
        root: what relative paths start from; by default the table's own folder.

    Raises:
        DataError: no such file, another separator, missing columns, empty cells, several labels of one image, labels
            in two spellings, or a label of another part that the training part lacks.
        MissingDependencyError: a Parquet file, and no pyarrow.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"{file} is not there; expected a table with {_EXPECTED}.")
    columns, lines = _read_parquet(file) if file.suffix.lower() == ".parquet" else _read_text(file)
    where = file.name

    def line(i: int) -> str:
        return f"line {lines[i]:,}" if lines else f"row {i:,}"

    paths, labels = columns["path"], columns["label"]
    for name in [c for c in ("path", "label", "split") if c in columns]:
        blank = [line(i) for i, cell in enumerate(columns[name]) if not cell.strip()]
        if blank:
            raise DataError(
                f"{where}: no {name} in {len(blank):,} rows: {first_few(blank)}. Fill them in or remove them."
            )
    _check_single_labels(labels, where, line)
    split = columns.get("split")
    if split is not None:
        strange = Counter(cell for cell in split if part_of(cell) is None)
        if strange:
            known = ", ".join(name for names in PART_NAMES.values() for name in names)
            raise DataError(
                f"{where}: unknown split {first_few(f'{name!r} ({n:,})' for name, n in strange.items())}; expected one "
                f"of {known}."
            )
    parts_of_rows = ["train"] * len(paths) if split is None else [str(part_of(cell)) for cell in split]
    rows, repeated = _distinct_rows(paths, labels, parts_of_rows, where, line)
    found: dict[str, list[int]] = {}
    for i in rows:
        found.setdefault(parts_of_rows[i], []).append(i)
    if "train" not in found:
        raise DataError(f"{where}: no row has split train, only {first_few(sorted(found))}.")
    names, numbers = number_labels({part: [labels[i] for i in at] for part, at in found.items()}, where)
    base = Path(root).expanduser() if root is not None else file.parent
    groups = columns.get("group")
    start = os.fspath(base)
    parts = {
        part: ListedPart(
            [Path(start, paths[i].strip()) for i in at],
            [paths[i].strip() for i in at],
            numbers[part],
            None if groups is None else [groups[i].strip() for i in at],
        )
        for part, at in found.items()
    }
    order = [part for part in ("train", "test", "val") if part in parts]
    notes = (f"{repeated:,} rows of {where} that stand there twice count once",) if repeated else ()
    return Listing(file.stem, file, names, val_as_test({part: parts[part] for part in order}), notes, base)


def _read_text(file: Path) -> tuple[dict[str, list[str]], list[int]]:
    """Columns by name, and the line of each row."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            head = opened.readline()
            separator = _separator(head, file)
            opened.seek(0)
            rows = list(csv.reader(opened, delimiter=separator, strict=True))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file.name} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8."
        ) from error
    except csv.Error as error:
        raise DataError(f"{file.name} is no table separated by {_SEPARATORS[separator]}: {error}.") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from error
    width = len(rows[0])
    uneven = [(i, len(row)) for i, row in enumerate(rows) if row and len(row) != width]
    if uneven:
        i, cells = uneven[0]
        more = f" and {len(uneven) - 1:,} more such lines" if len(uneven) > 1 else ""
        raise DataError(
            f"{file.name}: expected {width} cells in every line, separated by {_SEPARATORS[separator]}, got {cells} in "
            f"line {i + 1:,} ({first_few(rows[i])}){more}. "
            "A cell that holds the separator stands in quotation marks."
        )
    lines = [i for i, row in enumerate(rows) if i and row]
    body = [rows[i] for i in lines]
    if not body:
        raise DataError(f"{file.name} has a header and no rows.")
    wanted = _wanted(rows[0], file.name)
    return {name: [row[at] for row in body] for name, at in wanted.items()}, [i + 1 for i in lines]


def _separator(head: str, file: Path) -> str:
    for separator in _SEPARATORS:
        cells = [cell.strip().strip('"').lower() for cell in head.split(separator)]
        if "path" in cells and "label" in cells:
            return separator
    shown = head.strip()
    raise DataError(
        f"{file.name}: expected a header line with {_EXPECTED}, separated by {', '.join(_SEPARATORS.values())}; the "
        f"first line is {(shown[:77] + '...' if len(shown) > 80 else shown)!r}. Name the columns so."
    )


def _wanted(header: Sequence[str], where: str) -> dict[str, int]:
    """Positions of the known columns."""
    names = [cell.strip().lower() for cell in header]
    twice = [name for name in _COLUMNS if names.count(name) > 1]
    if twice:
        raise DataError(f"{where}: the column {twice[0]} stands there twice; keep one.")
    lacking = [name for name in ("path", "label") if name not in names]
    if lacking:
        raise DataError(f"{where}: expected {_EXPECTED}; {' and '.join(lacking)} not among {first_few(header)}.")
    return {name: names.index(name) for name in _COLUMNS if name in names}


def _read_parquet(file: Path) -> tuple[dict[str, list[str]], list[int]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise MissingDependencyError(
            f"{file.name} is read by pyarrow, which is not installed: pip install 'krdistill[parquet]'."
        ) from None
    try:
        opened = parquet.ParquetFile(file)
        header = opened.schema_arrow.names
        wanted = _wanted(header, file.name)
        table = opened.read(columns=[header[at] for at in wanted.values()])
    except (ArrowException, OSError) as error:
        raise DataError(f"{file.name} cannot be read as Parquet: {str(error).splitlines()[0]}.") from error
    columns = {name: table.column(header[at]).to_pylist() for name, at in wanted.items()}
    for name, cells in columns.items():
        strange = next((cell for cell in cells if not isinstance(cell, (str, int, type(None)))), None)
        if strange is not None:
            many = " Several labels of one image are not supported." if isinstance(strange, list) else ""
            raise DataError(
                f"{file.name}: expected texts or whole numbers in the column {name}, got "
                f"{type(strange).__name__}.{many}"
            )
    if not len(table):
        raise DataError(f"{file.name} has no rows.")
    return {name: ["" if cell is None else str(cell) for cell in cells] for name, cells in columns.items()}, []


def _check_single_labels(labels: Sequence[str], where: str, line: Any) -> None:
    alone = {label.strip() for label in labels}
    many = []
    for i, label in enumerate(labels):
        pieces = [p.strip() for mark in _BETWEEN_LABELS if mark in label for p in label.split(mark)]
        if not pieces and "," in label:
            pieces = [p.strip() for p in label.split(",")]
            pieces = pieces if all(p in alone for p in pieces) else []
        if len(pieces) > 1:
            many.append(f"{label!r} ({line(i)})")
    if many:
        raise DataError(
            f"{where}: {len(many):,} cells with several labels: {first_few(many)}. Expected one class per image; "
            "several labels of one image are not supported. If this is one name, write it without ; and |."
        )


def _distinct_rows(
    paths: Sequence[str], labels: Sequence[str], parts: Sequence[str], where: str, line: Any
) -> tuple[list[int], int]:
    """Rows with every path once, and how many were left out."""
    first: dict[str, int] = {}
    rows: list[int] = []
    other_labels, other_parts = [], []
    for i, path in enumerate(paths):
        before = first.setdefault(path.strip(), i)
        if before == i:
            rows.append(i)
        elif labels[before].strip() != labels[i].strip():
            other_labels.append(f"{path} as {labels[before]!r} ({line(before)}) and {labels[i]!r} ({line(i)})")
        elif parts[before] != parts[i]:
            other_parts.append(f"{path} in {parts[before]} ({line(before)}) and {parts[i]} ({line(i)})")
    if other_labels:
        raise DataError(
            f"{where}: {len(other_labels):,} images with several labels: {first_few(other_labels)}. Expected one class "
            "per image; several labels of one image are not supported."
        )
    if other_parts:
        raise DataError(f"{where}: {len(other_parts):,} images in two parts: {first_few(other_parts)}. Keep one.")
    return rows, len(paths) - len(rows)
