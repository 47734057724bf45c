"""Answers that were computed elsewhere: a black-box teacher's logits or probabilities, by image id."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..data.containers import DataBundle, Examples
from ..errors import DataError, ModelError
from ..files import read_arrays
from ..kinds import NOUNS
from ..models.teacher import class_order
from ..outputs import Outputs
from .answers import Answers

_SMALLEST = 1e-8  # probabilities below are read as this


@dataclass(frozen=True, eq=False)
class ExternalAnswers(Answers):
    """A teacher of whom nothing is known but its answers to the images as they are.

    The student still sees augmented views; the answer to a view is then the answer to its image.

    Attributes:
        train: to the training images, in their order.
        val: to the validation images, where there are any.
        test: to the test images, where the file holds them.
    """

    train: Outputs
    val: Outputs | None = None
    test: Outputs | None = None

    @property
    def feature_dim(self) -> int:  # type: ignore[override]
        return self.train.feature.shape[1]

    def replay(self, epoch: int) -> None:
        return None

    def read(self, epoch: int, index: Tensor, device: torch.device) -> Outputs:
        rows = index.to(self.train.logits.device)
        return Outputs(self.train.logits[rows].to(device), self.train.feature[rows].to(device))


def load_answers(path: Path, data: DataBundle) -> ExternalAnswers:
    """Reads stored answers and puts them in the order of the data.

    The file is ``.npz`` or ``.safetensors`` and holds ``logits`` or ``probabilities`` ``(M, K)``, floating point, and
    if at hand ``features`` ``(M, D)``. The ids of the M images are an array of texts ``ids`` in a ``.npz`` file, and a
    JSON list under the key ``ids`` of the metadata of a ``.safetensors`` file; so are ``class_names``, which may be
    left out where the columns are in the order of the data's classes. Ids are those of the data: the path of an
    image under its folder, or part and upstream row, such as ``train/123``.

    Every training image must be there, all or none of the validation and of the test images; other ids are an error.

    Raises:
        DataError: no such file, one that is not of this form, ids that do not fit the data, or numbers that are not
            finite.
    """
    arrays, ids, names = _read(path)
    key = "logits" if "logits" in arrays else "probabilities"
    K = data.num_classes
    answers = _matrix(path, key, arrays.get(key), len(ids))
    if answers.shape[1] != K:
        raise DataError(f"{path}: {key} have {answers.shape[1]} columns; the data have {K} classes.")
    features = _matrix(path, "features", arrays["features"], len(ids)) if "features" in arrays else None
    if names is not None:
        try:
            answers = answers[:, class_order(names, data.class_names)]
        except ModelError as error:
            raise DataError(f"{path}: {error}") from None
    if key == "probabilities":
        if bool((answers < 0).any()) or bool(((answers.sum(1) - 1).abs() > 0.01).any()):
            raise DataError(
                f"{path}: expected probabilities >= 0 that sum to 1 in every row. Store raw scores as logits."
            )
        answers = answers.clamp_min(_SMALLEST).log()
    twice = [name for name, count in Counter(ids).items() if count > 1]
    if twice:
        raise DataError(f"{path}: {len(twice)} ids stand there twice, such as {twice[0]!r}.")
    place = {name: i for i, name in enumerate(ids)}
    parts: dict[str, Outputs | None] = {}
    known: set[str] = set()
    for part, images in (("train", data.train), ("val", data.val), ("test", data.test)):
        known.update(images.ids if images is not None else ())
        parts[part] = _select(path, part, images, place, answers, features) if images is not None else None
    strange = [name for name in ids if name not in known]
    if strange:
        raise DataError(
            f"{path}: {len(strange)} of {len(ids)} ids are no {NOUNS[data.train.kind]} of {data.name}, such as "
            f"{strange[0]!r}; the data's own look like {data.train.ids[0]!r}."
        )
    train = parts["train"]
    assert train is not None  # _select insists on it
    return ExternalAnswers(train, parts["val"], parts["test"])


def _select(
    path: Path, part: str, images: Examples, place: dict[str, int], answers: Tensor, features: Tensor | None
) -> Outputs | None:
    lost, noun = [name for name in images.ids if name not in place], NOUNS[images.kind]
    if lost and (part == "train" or len(lost) < len(images)):
        raise DataError(
            f"{path}: no answers to {len(lost)} of the {len(images)} {part} {noun}, such as {lost[0]!r}. "
            + (f"All training {noun} need one." if part == "train" else f"Give all {part} {noun}, or none.")
        )
    if lost:
        return None
    rows = torch.tensor([place[name] for name in images.ids])
    empty = answers.new_zeros(len(rows), 0)
    return Outputs(answers[rows], features[rows] if features is not None else empty)


def _matrix(path: Path, name: str, array: Any, rows: int) -> Tensor:
    if array is None:
        raise DataError(f"{path}: expected 'logits' or 'probabilities' of shape (M, K), found neither.")
    if array.dtype.kind != "f" or array.ndim != 2 or array.shape[0] != rows:
        raise DataError(
            f"{path}: expected {name} to be floating point of shape ({rows}, ...), one row per id, "
            f"got {array.dtype} {tuple(array.shape)}."
        )
    values = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    bad = int((~torch.isfinite(values)).any(1).sum())
    if bad:
        raise DataError(f"{path}: {bad} rows of {name} hold numbers that are not finite.")
    return values


def _read(path: Path) -> tuple[dict[str, Any], list[str], Sequence[str] | None]:
    """Arrays, ids and class names of a file; nothing in it is executed."""
    if not path.is_file():
        raise DataError(f"No file {str(path)!r} of stored answers.")
    try:
        if path.suffix == ".npz":
            arrays = read_arrays(path)
            texts = {name: arrays.pop(name).tolist() for name in ("ids", "class_names") if name in arrays}
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="numpy") as stored:
                arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
                texts = {name: json.loads(text) for name, text in (stored.metadata() or {}).items() if name in _TEXTS}
        else:
            raise DataError(f"{path}: expected a .npz or .safetensors file of stored answers.")
    except (ValueError, OSError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read as stored answers: {error}.") from None
    ids = texts.get("ids")
    if not isinstance(ids, list) or not ids or not all(isinstance(name, str) for name in ids):
        raise DataError(f"{path}: expected 'ids', a list of texts that says whose answers these are.")
    names = texts.get("class_names")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise DataError(f"{path}: expected 'class_names' to be a list of texts.")
    return arrays, ids, names


_TEXTS = ("ids", "class_names")
