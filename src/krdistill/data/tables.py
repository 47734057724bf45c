"""Tables and archives that hold the examples themselves: sentences, or rows of numbers."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from ..errors import ArgumentError, DataError, MissingDependencyError
from ..files import read_arrays
from ..kinds import MAX_BYTES, clean, encode_texts
from ..priors import MOST_CLASSES
from .containers import Examples, FeatureData, TextData, first_few
from .listing import PART_NAMES, number_labels, part_of

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
LABELS = ("label", "category", "intent")
_BESIDE = ("split", "group", "id")
_KEYS = "x_train, y_train, x_test, y_test and, if wanted, x_val, y_val and class_names"


@dataclass(frozen=True)
class Table:
    """A table as it was read.

    Attributes:
        where: its file, for messages.
        columns: name, in lower case, to cells: texts, or of a Parquet file an array of numbers.
        lines: the line of each row in a text file; empty of a Parquet file.
    """

    where: str
    columns: Mapping[str, Sequence[Any]]
    lines: Sequence[int] = ()

    def line(self, i: int) -> str:
        return f"line {self.lines[i]:,}" if self.lines else f"row {i:,}"


def kind_of_table(path: Path) -> Literal["text", "features"] | None:
    """What a table or a NumPy archive holds, from its header: sentences (columns ``text`` and a label), rows of numbers
    (a label and columns of numbers, or arrays ``x_train``), or something else (None), such as the paths of images."""
    suffix = path.suffix.lower()
    if not path.is_file() or suffix not in (*TABLE_SUFFIXES, ".npz"):
        return None
    try:
        if suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return "features" if "x_train" in archive.files else None
        if suffix == ".parquet":
            names, numbers = _parquet_header(path)
        else:
            names, numbers = _text_header(path)
    except Exception:  # zipfile and NumPy's reader of headers have no common base
        return None  # whoever reads it whole will say what is wrong
    if "path" in names or not set(LABELS) & set(names):
        return None
    return "text" if "text" in names else "features" if numbers else None


def _text_header(path: Path) -> tuple[list[str], bool]:
    """Names of the columns, and whether any that may hold numbers has one in the first row."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        head = file.readline()
        separator = _separator(head)
        if separator is None:
            return [], False
        file.seek(0)
        rows = csv.reader(file, delimiter=separator)
        names, first = [_name(cell) for cell in next(rows)], next(rows, [])
    taken = {*LABELS, *_BESIDE}
    return names, any(_is_number(c) for name, c in zip(names, first, strict=False) if name not in taken)


def _parquet_header(path: Path) -> tuple[list[str], bool]:
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError:
        return [], False
    try:
        schema = parquet.ParquetFile(path).schema_arrow
    except ArrowException:
        return [], False
    names = [_name(name) for name in schema.names]
    taken = {*LABELS, *_BESIDE}
    numeric = [types.is_integer(t) or types.is_floating(t) for t in schema.types]
    return names, any(n for name, n in zip(names, numeric, strict=True) if name not in taken)


def _separator(head: str) -> str | None:
    """The separator by which a header has a column of labels."""
    for separator in SEPARATORS:
        cells = [_name(cell) for cell in head.split(separator)]
        if len(cells) > 1 and set(LABELS) & set(cells):
            return separator
    return None


def _name(cell: str) -> str:
    return cell.strip().strip('"').strip().lower()


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def read_table(path: Path) -> Table:
    """Reads a table whole: a ``.csv`` or ``.tsv`` file in UTF-8 with a header line, or a ``.parquet`` file.

    Raises:
        DataError: a file that cannot be read, or lines of different lengths.
        MissingDependencyError: a Parquet file, and no pyarrow.
    """
    return _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_text(path)


def _read_text(path: Path) -> Table:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path.name} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8."
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    separator = _separator(content.partition("\n")[0]) or ","
    try:
        rows = _cells(content, separator, csv.QUOTE_MINIMAL)
    except csv.Error as error:
        if separator != "\t":
            raise DataError(
                f"{path.name} is no table separated by {SEPARATORS[separator]}: {error}. Are all quotation marks "
                "closed?"
            ) from None
        try:
            rows = _cells(content, separator, csv.QUOTE_NONE)  # between tabs, a quotation mark may stand for itself
        except csv.Error as worse:
            raise DataError(f"{path.name} is no table separated by {SEPARATORS[separator]}: {worse}.") from None
    if not rows:
        raise DataError(f"{path.name} is empty; expected a line of column names, and rows below it.")
    width = len(rows[0][1])
    uneven = [(line, cells) for line, cells in rows if len(cells) != width]
    if uneven:
        line, cells = uneven[0]
        more = f" and {len(uneven) - 1:,} more such lines" if len(uneven) > 1 else ""
        raise DataError(
            f"{path.name}: expected {width} cells in every line, separated by {SEPARATORS[separator]}, got "
            f"{len(cells)} in line {line:,} ({first_few(c[:40] for c in cells)}){more}. A cell that holds the "
            "separator stands in quotation marks."
        )
    names = [_name(cell) for cell in rows[0][1]]
    _check_names(names, path.name)
    body = rows[1:]
    if not body:
        raise DataError(f"{path.name} has a header and no rows.")
    columns = {name: [cells[at] for _, cells in body] for at, name in enumerate(names)}
    return Table(path.name, columns, [line for line, _ in body])


def _cells(content: str, separator: str, quoting: Any) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=separator, strict=True, quoting=quoting)
    limit = csv.field_size_limit()
    try:
        csv.field_size_limit(2**31 - 1)
        return [(reader.line_num, row) for row in reader if row]
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path) -> Table:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise MissingDependencyError(
            f"{path.name} is read by pyarrow, which is not installed: pip install 'krdistill[parquet]'."
        ) from None
    try:
        table = parquet.ParquetFile(path).read()
        names = [_name(name) for name in table.column_names]
        _check_names(names, path.name)
        columns = {name: table.column(i).to_numpy(zero_copy_only=False) for i, name in enumerate(names)}
    except (ArrowException, OSError) as error:
        raise DataError(f"{path.name} cannot be read as Parquet: {str(error).splitlines()[0]}.") from None
    if not len(table):
        raise DataError(f"{path.name} has no rows.")
    return Table(path.name, columns)


def _check_names(names: Sequence[str], where: str) -> None:
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise DataError(f"{where}: the column {twice[0]!r} stands there twice; keep one.")


def load_table(
    path: Path, kind: Literal["text", "features"], *, label: str | None = None
) -> tuple[dict[str, Examples], list[str]]:
    """The examples of a table: sentences in its column ``text``, or rows of numbers in all columns but those below.

    ``label`` (or ``category``, ``intent``) is the class of each row; ``split`` is train, test or val; ``group`` says
    which rows belong together; ``id`` names them. A validation part without a test part is the test part. Columns
    are found by name, in any order and case.

    Args:
        path: the file.
        kind: what it holds (:func:`kind_of_table`).
        label: the column of labels, where it has another name.

    Returns:
        The parts, and notes. Ids are part and row, such as ``train/7``.

    Raises:
        DataError: missing columns or cells, empty sentences, text, NaN or infinity where a number is expected, labels
            in two spellings, or a label of another part that the training part lacks.
    """
    table = read_table(path)
    where, names = table.where, list(table.columns)
    label = label or next((name for name in LABELS if name in names), None)
    if label is None or label not in names or (kind == "text" and "text" not in names):
        raise DataError(
            f"{where}: expected the columns {'text and ' if kind == 'text' else ''}label, got {first_few(names)}. Is "
            f"the separator one of {', '.join(SEPARATORS.values())}?"
        )
    labels = _texts(table, label, "label")
    strange = Counter(str(cell) for cell in table.columns.get("split", ()) if part_of(str(cell)) is None)
    if strange:
        known = ", ".join(name for found in PART_NAMES.values() for name in found)
        raise DataError(
            f"{where}: unknown split {first_few(f'{name!r} ({n:,})' for name, n in strange.items())}; expected one of "
            f"{known}."
        )
    split = (
        [str(part_of(str(cell))) for cell in table.columns["split"]] if "split" in names else ["train"] * len(labels)
    )
    groups = _texts(table, "group", "group") if "group" in names else None
    ids = _texts(table, "id", "id") if "id" in names else None
    inputs: Sequence[str] | npt.NDArray[np.float32]
    if kind == "text":
        inputs = _texts(table, "text", "text")
    else:
        inputs = _numbers(table, [name for name in names if name not in (label, *_BESIDE)])
    rows: dict[str, list[int]] = {}
    for i, part in enumerate(split):
        rows.setdefault(part, []).append(i)
    parts = {}
    for part, at in rows.items():
        mine = inputs[at] if isinstance(inputs, np.ndarray) else [inputs[i] for i in at]
        units = None if groups is None else [groups[i] for i in at]
        own = None if ids is None else [ids[i] for i in at]
        parts[part] = Rows(mine, [labels[i] for i in at], units, own)
    return make_parts(parts, path.stem, where)


@dataclass(frozen=True, eq=False)
class Rows:
    """One part before its labels are numbered: sentences or numbers, labels as texts, groups and ids."""

    inputs: Sequence[str] | npt.NDArray[np.float32]
    labels: Sequence[str]
    groups: Sequence[str] | None = None
    ids: Sequence[str] | None = None


def make_parts(rows: Mapping[str, Rows], name: str, where: str) -> tuple[dict[str, Examples], list[str]]:
    """Parts with numbered labels, and notes on sentences that were cut or stand there several times.

    Args:
        rows: of every part.
        name: of the data set.
        where: its file, for messages.

    Raises:
        DataError: no training part, or labels as for :func:`krdistill.data.listing.number_labels`.
    """
    if "train" not in rows:
        raise DataError(f"{where}: no row has split train, only {first_few(sorted(rows))}.")
    if "test" not in rows and "val" in rows:
        rows = {"test" if part == "val" else part: found for part, found in rows.items()}
    classes, numbers = number_labels({part: list(found.labels) for part, found in rows.items()}, where)
    parts: dict[str, Examples] = {}
    notes: list[str] = []
    for part in (p for p in ("train", "test", "val") if p in rows):
        found = rows[part]
        ids = tuple(found.ids or (f"{part}/{i}" for i in range(len(found.labels))))
        units = None if found.groups is None else tuple(found.groups)
        given: tuple[Any, ...] = (torch.from_numpy(numbers[part]), classes, ids, name, units)
        if isinstance(found.inputs, np.ndarray):
            parts[part] = FeatureData(torch.from_numpy(found.inputs), *given)
        else:
            parts[part] = TextData(torch.from_numpy(encode_texts(found.inputs)), *given)
            long = sum(len(clean(text).encode()) > MAX_BYTES for text in found.inputs)
            if long:
                notes.append(f"{long:,} sentences of {part} are longer than {MAX_BYTES:,} bytes, and were cut there")
    if not isinstance(rows["train"].inputs, np.ndarray):
        notes += _repeated(rows)
    return parts, notes


def _repeated(rows: Mapping[str, Rows]) -> list[str]:
    """Notes on sentences with several labels, and on those of another part that are among the training ones."""
    labels: dict[str, set[str]] = {}
    for found in rows.values():
        for text, label in zip(found.inputs, found.labels, strict=True):
            labels.setdefault(clean(str(text)).casefold(), set()).add(label.strip())
    several = sum(len(of) > 1 for of in labels.values())
    notes = [f"{several:,} sentences stand there under several labels"] if several else []
    known = {clean(str(text)).casefold() for text in rows["train"].inputs}
    for part, found in rows.items():
        again = sum(clean(str(text)).casefold() in known for text in found.inputs) if part != "train" else 0
        if again:
            notes.append(f"{again:,} sentences of {part} are also in train")
    return notes


def _texts(table: Table, column: str, what: str) -> list[str]:
    cells = table.columns[column]
    strange = next((c for c in cells if not isinstance(c, (str, int, np.integer, type(None))) and c == c), None)
    if strange is not None:
        many = " Several labels of one row are not supported." if isinstance(strange, (list, np.ndarray)) else ""
        raise DataError(
            f"{table.where}: expected texts or whole numbers in the column {column}, got "
            f"{type(strange).__name__}.{many}"
        )
    found = ["" if c is None or c != c else str(c) for c in cells]
    blank = [table.line(i) for i, cell in enumerate(found) if not clean(cell)]
    if blank:
        raise DataError(
            f"{table.where}: no {what} in {len(blank):,} rows: {first_few(blank)}. Fill them in or remove them."
        )
    return found


def _numbers(table: Table, names: Sequence[str]) -> npt.NDArray[np.float32]:
    """The columns of numbers, float32 ``(N, D)``."""
    if not names:
        raise DataError(f"{table.where}: expected columns of numbers beside the label, got none.")
    made = [_column(table, name) for name in names]
    return np.ascontiguousarray(np.stack(made, axis=1))


def _column(table: Table, name: str) -> npt.NDArray[np.float32]:
    cells = table.columns[name]
    advice = "Fill them in, leave the rows out, or remove the column."
    if isinstance(cells, np.ndarray) and cells.dtype.kind in "biuf":
        wide = cells.astype(np.float64)
    else:
        numbers = [_number(cell) for cell in cells]
        wrong = [f"{cells[i]!r} ({table.line(i)})" for i, number in enumerate(numbers) if number is None]
        if wrong:
            raise DataError(
                f"{table.where}: expected numbers in the column {name!r}, got other cells in {len(wrong):,} rows: "
                f"{first_few(wrong)}. {advice} Columns that are no numbers are to be encoded as numbers or removed."
            )
        wide = np.array(numbers, dtype=np.float64)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(narrow)).tolist()
    if bad:
        raise DataError(
            f"{table.where}: NaN, infinity or no number in the column {name!r} in {len(bad):,} rows: "
            f"{first_few(table.line(i) for i in bad)}. {advice}"
        )
    return narrow


def _number(cell: Any) -> float | None:
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return float("nan")
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


def load_features(path: str | os.PathLike[str]) -> tuple[dict[str, Examples], list[str]]:
    """Reads a NumPy archive of rows of numbers: ``x_train``, float or whole numbers ``(N, D)``, ``y_train``, whole
    numbers or texts ``(N,)``, and, where there are such parts, ``x_test``, ``y_test``, ``x_val``, ``y_val``;
    ``class_names`` are K texts for labels 0 to K - 1. Nothing in it is unpickled.

    Raises:
        DataError: a damaged archive, missing keys, arrays that do not fit each other, NaN or infinity.
    """
    file = Path(path).expanduser()
    try:
        arrays = read_arrays(file)
    except (OSError, ValueError) as error:
        what = "holds Python objects, which are not loaded" if "pickle" in str(error) else "is damaged"
        raise DataError(f"{file.name} {what} ({error}). Expected plain arrays {_KEYS}.") from None
    names = arrays.get("class_names")
    if names is not None and (names.ndim != 1 or names.dtype.kind != "U"):
        raise DataError(f"{file.name}: expected class_names as texts, shape (K,), got {names.dtype} {names.shape}.")
    found: dict[str, tuple[npt.NDArray[np.float32], npt.NDArray[Any]]] = {}
    for part in ("train", "test", "val"):
        if f"x_{part}" in arrays:
            if f"y_{part}" not in arrays:
                raise DataError(f"{file.name}: x_{part} without y_{part}. Expected {_KEYS}.")
            found[part] = _checked(arrays[f"x_{part}"], arrays[f"y_{part}"], part, file.name)
    if "train" not in found:
        raise DataError(f"{file.name}: x_train not among {first_few(arrays)}. Expected {_KEYS}.")
    D = found["train"][0].shape[1]
    for part, (x, y) in found.items():
        if x.shape[1] != D:
            raise DataError(f"{file.name}: x_{part} has {x.shape[1]} columns, x_train {D}. Expected the same columns.")
        if y.dtype.kind != found["train"][1].dtype.kind and "U" in (y.dtype.kind, found["train"][1].dtype.kind):
            raise DataError(f"{file.name}: y_train and y_{part} are of different types; give texts or numbers in both.")
    taken = {"class_names", *(f"{x}_{part}" for part in found for x in "xy")}
    over = sorted(set(arrays) - taken)
    notes = [f"arrays that were passed over: {first_few(over)}"] if over else []
    if found["train"][1].dtype.kind == "U":
        made, more = make_parts(
            {part: Rows(x, y.tolist()) for part, (x, y) in found.items()}, file.stem, file.name
        )  # fmt: skip
        return made, notes + more
    K = 1 + max(int(y.max()) for _, y in found.values())
    if K > MOST_CLASSES:
        raise DataError(f"{file.name}: expected labels below {MOST_CLASSES:,}, counted from 0, got {K - 1:,}.")
    classes = tuple(map(str, names.tolist())) if names is not None else tuple(str(k) for k in range(K))
    parts: dict[str, Examples] = {}
    if "test" not in found and "val" in found:
        found["test"] = found.pop("val")
    for part, (x, y) in found.items():
        ids = tuple(f"{part}/{i}" for i in range(len(x)))
        try:
            parts[part] = FeatureData(
                torch.from_numpy(x), torch.from_numpy(y.astype(np.int64)), classes, ids, file.stem
            )  # fmt: skip
        except ArgumentError as error:
            raise DataError(f"{file.name}, {part}: {error}") from None
        lost = torch.nonzero((parts[part].counts() > 0) & (parts["train"].counts() == 0)).flatten().tolist()
        if lost:
            raise DataError(
                f"{file.name}: {len(lost):,} labels of {part} are not in train: {first_few(classes[k] for k in lost)}."
            )
    return parts, notes


def _checked(
    x: npt.NDArray[Any], y: npt.NDArray[Any], part: str, where: str
) -> tuple[npt.NDArray[np.float32], npt.NDArray[Any]]:
    """A part of an archive: rows as float32, labels."""
    if x.ndim != 2 or x.dtype.kind not in "biuf" or 0 in x.shape:
        hint = " Arrays of images are called images and labels (docs/howto-data.md)." if x.ndim in (3, 4) else ""
        raise DataError(f"{where}: expected x_{part} as numbers of shape (N, D), got {x.dtype} {x.shape}.{hint}")
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim != 1 or y.dtype.kind not in "iuU":
        hint = " Several labels of one row are not supported." if y.ndim == 2 else ""
        raise DataError(
            f"{where}: expected y_{part} as whole numbers or texts of shape (N,), got {y.dtype} {y.shape}.{hint}"
        )
    if len(x) != len(y):
        raise DataError(f"{where}: x_{part} has {len(x):,} rows, y_{part} {len(y):,} labels. Expected as many.")
    with np.errstate(over="ignore"):
        narrow = np.ascontiguousarray(x, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(narrow).all(1)).tolist()
    if bad:
        raise DataError(
            f"{where}: NaN or infinity in {len(bad):,} rows of x_{part}: {first_few(map(str, bad))}. Fill them in or "
            "leave the rows out."
        )
    return narrow, y


def same_rows(data: Examples) -> list[str]:
    """What stands for each row where equal ones are to be found: sentences in any case, numbers as they are."""
    rows = data.inputs.numpy()
    if data.kind == "text":
        rows = np.where((rows >= 65) & (rows <= 90), rows + 32, rows)
    found = (row.tobytes() if data.kind != "text" else row.tobytes().rstrip(b"\0") for row in rows)
    return [hashlib.sha256(row).hexdigest() for row in found]
