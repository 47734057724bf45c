"""What one example is: an image, a vector of features, or a sentence.

Everything that depends on it asks here. Rows of a data set are one tensor: images uint8 ``(N, H, W, C)``, vectors
float32 ``(N, D)``, sentences uint8 ``(N, L)``, the bytes of their UTF-8 text with zeros behind it. A network takes
sentences as bytes and cuts them up as it needs: two networks with different vocabularies see the same sentence, and
what an augmentation does to it, both see. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from .errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["image", "features", "text"]

NOUNS: dict[Kind, str] = {"image": "images", "features": "rows", "text": "sentences"}
MAX_BYTES = 1024  # of a sentence; what is longer is cut


def noun_of(split: Mapping[str, Any] | None) -> str:
    """What the data of a run are, in a word, by its ``split.json``; folders of old, which do not say, hold images."""
    return NOUNS.get((split or {}).get("kind", "image"), "images")


def kind_of(rows: Tensor) -> Kind:
    """What the rows of a data set, or the examples of a batch, are.

    Raises:
        ArgumentError: none of the three.
    """
    if rows.ndim == 4:
        return "image"
    if rows.ndim == 2:
        return "features" if rows.is_floating_point() else "text"
    raise ArgumentError(
        "Expected images (N, H, W, C), vectors float (N, D) or sentences uint8 (N, L), got "
        f"{str(rows.dtype).removeprefix('torch.')} of shape {tuple(rows.shape)}."
    )


def as_batch(rows: Tensor) -> Tensor:
    """Rows of a data set as networks take them: images ``(B, H, W, C)`` become ``(B, C, H, W)``, a channels-last view;
    others are as they are."""
    return rows.permute(0, 3, 1, 2) if rows.ndim == 4 else rows


def as_rows(batch: Tensor) -> Tensor:
    """The way back from :func:`as_batch`."""
    return batch.permute(0, 2, 3, 1) if batch.ndim == 4 else batch


def encode_texts(texts: Sequence[str]) -> npt.NDArray[np.uint8]:
    """Sentences as bytes.

    White space at the ends goes, and inside it becomes one blank; control characters are white space. What is longer
    than ``MAX_BYTES`` is cut there, never within a character.

    Args:
        texts: N sentences.

    Returns:
        uint8, shape ``(N, L)``, L the length of the longest; their UTF-8 bytes, and zeros behind them.
    """
    encoded = [cut(clean(text).encode()) for text in texts]
    rows = np.zeros((len(encoded), max([1, *map(len, encoded)])), dtype=np.uint8)
    for row, text in zip(rows, encoded, strict=True):
        row[: len(text)] = np.frombuffer(text, dtype=np.uint8)
    return rows


def decode_texts(rows: npt.NDArray[np.uint8]) -> list[str]:
    """The way back from :func:`encode_texts`; what an augmentation cut apart comes as replacement characters."""
    return [row.tobytes().rstrip(b"\0").decode("utf-8", "replace") for row in rows]


def clean(text: str) -> str:
    """A sentence without control characters and superfluous white space."""
    printable = text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)
    return " ".join(printable.split())


def cut(encoded: bytes) -> bytes:
    """At most ``MAX_BYTES`` of UTF-8 text, whole characters alone."""
    return encoded if len(encoded) <= MAX_BYTES else encoded[:MAX_BYTES].decode("utf-8", "ignore").encode()
