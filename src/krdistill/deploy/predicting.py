"""Predictions for any number of image files, in order and in constant memory. Nothing here imports torch."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..calibration import Calibrator
from ..data.decoding import decode
from ..kinds import encode_texts
from .inputs import Entry
from .runtime import DeviceModel, with_prior

_Decoded = tuple[npt.NDArray[Any], dict[int, str]]
_SHOWN = 5
# Those of full width are taken for the others in East Asian spreadsheets.
_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
# What JSON allows in a text and a terminal may obey; written as \uXXXX, which says the same.
_OBEYED = (*range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_ESCAPED = {c: f"\\u{c:04x}" for c in _OBEYED}


@dataclass(frozen=True)
class Prediction:
    """What was seen in one image.

    Attributes:
        path: as it was given.
        classes: names of the likeliest classes, the best first; empty where there is an ``error``.
        probabilities: theirs.
        error: why the image could not be looked at, or None.
    """

    path: str
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Summary:
    """How a stream of predictions ended: images in all, how many failed, the first of those in words, and how many
    were left open for want of confidence."""

    images: int
    failed: int
    first: tuple[str, ...]
    abstained: int = 0


def predict(
    model: DeviceModel,
    images: Iterable[Entry],
    *,
    top: int = 1,
    weights: npt.NDArray[np.float64] | None = None,
    calibrator: Calibrator | None = None,
    batch: int = 64,
) -> Iterator[Prediction]:
    """Looks at images one batch at a time, while the next batches are decoded.

    Images are decoded as for training (:func:`krdistill.data.decoding.decode`): upright, without alpha, grey or RGB as
    the model wants them, scaled and cropped to its size. One that cannot be read is a prediction with an error.

    Args:
        model: the student.
        images: what to look at, in order.
        top: how many classes to give, at most K.
        weights: a class prior (:func:`~krdistill.deploy.runtime.class_weights`); None stands for a uniform one.
        calibrator: applied to the model's probabilities, before the class prior; the model's own is
            ``model.calibrator``. None leaves them as they are.
        batch: images at a time.

    Yields:
        One prediction per image, in the order of ``images``.

    Raises:
        ModelError: the model cannot be run.
    """
    for group, (pixels, failures) in _ahead(model, images, batch):
        kept = [i for i in range(len(group)) if i not in failures]
        p = np.empty((0, len(model.class_names)))
        if kept:
            answer = model(pixels)
            p = with_prior(answer if calibrator is None else calibrator.from_probabilities(answer), weights)
        best = np.argsort(-p, axis=1, kind="stable")[:, :top]
        row = {i: r for r, i in enumerate(kept)}
        for i, entry in enumerate(group):
            if i in failures:
                yield Prediction(entry.shown, error=failures[i])
            elif not np.isfinite(p[row[i]]).all():
                yield Prediction(entry.shown, error="the model answers numbers that are not finite")
            else:
                order = best[row[i]]
                names = tuple(model.class_names[k] for k in order)
                yield Prediction(entry.shown, names, tuple(p[row[i], order].tolist()))


def write_predictions(
    predictions: Iterable[Prediction],
    stream: TextIO,
    *,
    form: str,
    top: int,
    abstain_below: float = 0.0,
    what: str = "path",
) -> Summary:
    """Writes predictions as they come.

    Args:
        predictions: from :func:`predict`.
        stream: text, opened with ``newline=""``.
        form: ``csv``: columns ``path``, ``class``, ``probability``, then ``class_2``, ``probability_2`` and so on, and
            ``error``; a cell of text that a spreadsheet would take for a formula is prefixed by an apostrophe.
            ``jsonl``: an object per line with ``path``, ``class``, ``probability``, ``top`` and, if any, ``error``.
        top: how many classes a row has.
        abstain_below: the class is left empty (null in JSON) where its probability is below this.
        what: name of the first column: ``path``, of sentences ``text``, of rows of numbers ``row``.

    Returns:
        How many there were.
    """
    rows = csv.writer(stream, lineterminator="\n")
    # Python leaves a lone \r without quotation marks, and it would end the row.
    quoted = csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_ALL)
    if form == "csv":
        more = [f"{name}_{i}" for i in range(2, top + 1) for name in ("class", "probability")]
        rows.writerow([what, "class", "probability", *more, "error"])
    count, failed, abstained = 0, 0, 0
    first: list[str] = []
    for p in predictions:
        count += 1
        if p.error is not None:
            failed += 1
            if len(first) < _SHOWN:
                first.append(f"{p.path!r} ({p.error})")
        sure = bool(p.classes) and p.probabilities[0] >= abstain_below
        abstained += bool(p.classes) and not sure
        if form == "jsonl":
            stream.write(json.dumps(_object(p, sure, what), ensure_ascii=False).translate(_ESCAPED) + "\n")
            continue
        cells: list[str] = []
        for i in range(top):
            there = i < len(p.classes)
            cells += [
                _safe(p.classes[i]) if there and (i or sure) else "",
                f"{p.probabilities[i]:.6f}" if there else "",
            ]
        cells = [_safe(p.path), *cells, _safe(p.error or "")]
        (quoted if any("\r" in cell for cell in cells) else rows).writerow(cells)
    return Summary(count, failed, tuple(first), abstained)


@contextlib.contextmanager
def refusing_bombs() -> Iterator[None]:
    """As for training, an image of more than ``PIL.Image.MAX_IMAGE_PIXELS`` is unreadable inside this block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _ahead(model: DeviceModel, images: Iterable[Entry], batch: int) -> Iterator[tuple[Sequence[Entry], _Decoded]]:
    """Batches of images with their pixels, decoded a few batches ahead of where they are needed."""
    workers = min(8, os.cpu_count() or 1)
    source = iter(images)
    waiting: deque[tuple[list[Entry], Future[_Decoded]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            while group := list(islice(source, batch)):
                waiting.append((group, pool.submit(_decode, model, group)))
                if len(waiting) > workers:
                    done, pixels = waiting.popleft()
                    yield done, pixels.result()
            while waiting:
                done, pixels = waiting.popleft()
                yield done, pixels.result()
        finally:
            for _, pixels in waiting:
                pixels.cancel()


def _decode(model: DeviceModel, group: Sequence[Entry]) -> _Decoded:
    """Pixels of the entries that can be read, and the reasons of the others by position."""
    failures = {i: entry.error for i, entry in enumerate(group) if entry.error is not None}
    there = [i for i in range(len(group)) if i not in failures]
    if model.kind == "text":
        return encode_texts([str(group[i].value) for i in there]), failures
    if model.kind == "features":
        return np.array([group[i].value for i in there], dtype=np.float32).reshape(-1, model.channels), failures
    pixels, failed = decode([group[i].path for i in there], size=model.image_size, channels=model.channels, resize=True)
    failures.update({there[i]: reason for i, reason in failed.items()})
    return pixels[[i not in failed for i in range(len(there))]], failures


def _object(p: Prediction, sure: bool, what: str) -> dict[str, Any]:
    made: dict[str, Any] = {
        what: p.path,
        "class": p.classes[0] if sure else None,
        "probability": round(p.probabilities[0], 6) if p.classes else None,
        "top": [{"class": n, "probability": round(v, 6)} for n, v in zip(p.classes, p.probabilities, strict=True)],
    }
    return made if p.error is None else {**made, "error": p.error}


def _safe(text: str) -> str:
    """A spreadsheet runs a cell that begins like a formula; one that has an apostrophe before it gets another."""
    return f"'{text}" if text.lstrip("'").startswith(_FORMULAS) else text
