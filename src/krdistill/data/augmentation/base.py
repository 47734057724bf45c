"""What an augmentation is, and several in a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..._checks import describe
from ...errors import ArgumentError
from ...kinds import NOUNS, Kind


def to_pixels(images: Tensor) -> Tensor:
    """``(B, C, H, W)`` in any layout as contiguous ``(B, H, W, C)``; no copy where it is channels-last already."""
    return images.permute(0, 2, 3, 1).contiguous()


def from_pixels(pixels: Tensor, like: Tensor) -> Tensor:
    """``(B, H, W, C)`` as ``(B, C, H, W)``: contiguous where ``like`` is, else channels-last."""
    images = pixels.permute(0, 3, 1, 2)
    return images.contiguous() if like.is_contiguous() else images


class Augmentation(ABC):
    """A random change of examples of one kind: a pure function of (seed, epoch, row number).

    A subclass names its random streams and works on contiguous pixels ``(B, H, W, C)``, or on the rows of another
    kind; layouts and checks are here.
    """

    kind: ClassVar[Kind] = "image"

    @property
    @abstractmethod
    def streams(self) -> tuple[str, ...]:
        """Names of the random streams it draws from."""

    @abstractmethod
    def apply(self, pixels: Tensor, index: Tensor, *, seed: int, epoch: int) -> Tensor:
        """The views of contiguous uint8 pixels ``(B, H, W, C)``, contiguous as well, or of the rows of another kind.

        The input is left as it is."""

    def __call__(self, images: Tensor, index: Tensor, *, seed: int, epoch: int) -> Tensor:
        """One view of each image.

        Args:
            images: uint8, ``(B, C, H, W)``, one or three channels, on any device, in any layout; or rows of the kind
                that this augmentation is for (:mod:`krdistill.kinds`).
            index: which images they are (row numbers in the data set), ``(B,)``, integers.
            seed: the run's seed.
            epoch: the epoch, or the number of the view.

        Returns:
            Views of the same shape, dtype and device; contiguous where ``images`` is, else channels-last. They may
            share memory with ``images`` where nothing was changed.

        Raises:
            ArgumentError: ``images`` or ``index`` of another dtype or shape.
        """
        if self.kind != "image":
            _check_rows(self.kind, images, index)
            return self.apply(images, index.to(images.device), seed=seed, epoch=epoch)
        _check(images, index)
        views = self.apply(to_pixels(images), index.to(images.device), seed=seed, epoch=epoch)
        return from_pixels(views, like=images)


class Piece(Augmentation):
    """An augmentation that draws from one stream."""

    stream: str

    @property
    def streams(self) -> tuple[str, ...]:
        return (self.stream,)


@dataclass(frozen=True)
class Compose(Augmentation):
    """Augmentations one after the other; of none at all, the images as they are.

    Args:
        parts: in the order in which they are applied.
        kind: of the examples; that of the parts.

    Raises:
        ArgumentError: two parts draw from the same stream, and so would make the same choices.
    """

    parts: tuple[Augmentation, ...] = ()
    kind: Kind = field(default="image", repr=False)  # type: ignore[misc]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        wrong = [part for part in self.parts if not isinstance(part, Augmentation)]
        if wrong:
            raise ArgumentError(f"parts: expected augmentations, but got {describe(wrong[0])}.")
        other = [part for part in self.parts if part.kind != self.kind]
        if other:
            raise ArgumentError(f"parts: expected augmentations of {NOUNS[self.kind]}, but got {other[0]!r}.")
        twice = [stream for stream, count in Counter(self.streams).items() if count > 1]
        if twice:
            raise ArgumentError(
                f"parts: expected every part to draw from a random stream of its own, but {twice[0]!r} comes twice. "
                f"Give one of them another name: stream='{twice[0]}-2'."
            )

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(stream for part in self.parts for stream in part.streams)

    def apply(self, pixels: Tensor, index: Tensor, *, seed: int, epoch: int) -> Tensor:
        for part in self.parts:
            pixels = part.apply(pixels, index, seed=seed, epoch=epoch)
        return pixels


def _check_rows(kind: Kind, rows: Any, index: Any) -> None:
    dtype, words = (torch.uint8, "uint8") if kind == "text" else (torch.float32, "float32")
    if not isinstance(rows, Tensor) or rows.dtype != dtype or rows.ndim != 2:
        raise ArgumentError(f"rows: expected {NOUNS[kind]}, {words} of shape (B, D), but got {describe(rows)}.")
    _check_index(rows, index)


def _check(images: Any, index: Any) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4:
        raise ArgumentError(
            f"images: expected uint8 of shape (B, C, H, W), but got {describe(images)}. "
            "Augment before anything is scaled or normalised."
        )
    if images.shape[1] not in (1, 3) or 0 in images.shape:
        hint = " For (B, H, W, C), call images.permute(0, 3, 1, 2)." if images.shape[3] in (1, 3) else ""
        raise ArgumentError(
            f"images: expected (B, C, H, W) with 1 or 3 channels and at least one pixel, "
            f"but got {describe(images)}.{hint}"
        )
    _check_index(images, index)


def _check_index(images: Tensor, index: Any) -> None:
    if (
        not isinstance(index, Tensor)
        or index.is_floating_point()
        or index.is_complex()
        or index.dtype == torch.bool
        or index.shape != images.shape[:1]
    ):
        raise ArgumentError(
            f"index: expected one row number per image, integers of shape ({len(images)},), but got {describe(index)}."
        )
