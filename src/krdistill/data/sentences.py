"""The known sets of sentences, from the files they are published as."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

from ..errors import DataError
from .containers import Examples
from .tables import Rows, make_parts, read_table


def load_sentences(name: str, folder: Path) -> tuple[dict[str, Examples], list[str]]:
    """Banking77, TREC (fine labels), HWU64 (fold 1), CLINC150 or its imbalanced version.

    Upstream's parts are kept. The out-of-scope sentences of CLINC150 belong to no class and are left out. Ids are part
    and upstream row, such as ``train/7``.

    Args:
        name: of the source.
        folder: that holds its files (:data:`krdistill.data.SOURCES`).

    Returns:
        The parts, and notes.

    Raises:
        DataError: a file that is damaged or of another form.
    """
    try:
        rows = _READERS[name](folder)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{name}: the files in {folder} are not as they were published ({error}).") from None
    return make_parts(rows, name, name)


def _banking77(folder: Path) -> dict[str, Rows]:
    rows = {}
    for part in ("train", "test"):
        columns = read_table(folder / f"banking77_{part}.csv").columns
        rows[part] = Rows(list(columns["text"]), list(columns["category"]))
    return rows


def _trec(folder: Path) -> dict[str, Rows]:
    rows = {}
    for part, file in (("train", "trec_train_5500.label"), ("test", "trec_TREC_10.label")):
        lines = [line for line in (folder / file).read_text(encoding="latin-1").split("\n") if line.strip()]
        pairs = [line.strip().split(" ", 1) for line in lines]
        rows[part] = Rows([text for _, text in pairs], [label for label, _ in pairs])
    return rows


def _hwu64(folder: Path) -> dict[str, Rows]:
    with (folder / "hwu64_fold1.tsv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return {
        part: Rows(
            [line["text"] for line in lines if line["split"] == part],
            [line["scenario_intent"] for line in lines if line["split"] == part],
        )
        for part in ("train", "test")
    }


def _clinc(file: str) -> Callable[[Path], dict[str, Rows]]:
    def read(folder: Path) -> dict[str, Rows]:
        parts = json.loads((folder / file).read_text(encoding="utf-8"))
        return {
            part: Rows([text for text, _ in parts[part]], [label for _, label in parts[part]])
            for part in ("train", "test", "val")
        }

    return read


_READERS: dict[str, Callable[[Path], dict[str, Rows]]] = {
    "banking77": _banking77,
    "trec": _trec,
    "hwu64": _hwu64,
    "clinc150": _clinc("clinc150_data_full.json"),
    "clinc150-imbalanced": _clinc("clinc150_data_imbalanced.json"),
}
