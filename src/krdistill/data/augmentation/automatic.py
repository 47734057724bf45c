"""Augmentation policies without a search: RandAugment and TrivialAugment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..._checks import check_integer
from ...errors import ArgumentError
from ...rng import uniform
from . import operations
from .base import Piece

OPERATIONS = (
    "identity", "shear-x", "shear-y", "translate-x", "translate-y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
"""The fourteen operations, in the order in which they are drawn."""

MAX_MAGNITUDE = 30
"""Magnitudes are whole numbers from 0 to this."""


@dataclass(frozen=True)
class _Ranges:
    """The strength of each operation at magnitude 30; at 0 it is none, and it grows linearly (posterize: bits lost)."""

    shear: float
    translate_x: float
    translate_y: float
    rotate: float
    enhance: float
    posterize: int

    def signed(self, operation: str) -> float:
        """The greatest strength of an operation that works both ways, 0 for the others."""
        return {
            "shear-x": self.shear,
            "shear-y": self.shear,
            "translate-x": self.translate_x,
            "translate-y": self.translate_y,
            "rotate": self.rotate,
            "brightness": self.enhance,
            "color": self.enhance,
            "contrast": self.enhance,
            "sharpness": self.enhance,
        }.get(operation, 0.0)


@lru_cache(maxsize=64)
def _strengths(ranges: _Ranges, height: int, width: int) -> tuple[Tensor, Tensor]:
    """What every operation does at every magnitude, plus (0) and minus (1).

    Worked out in Python numbers, so that a view is the same on every device.

    Returns:
        Factor, bits or threshold, float32 ``(14, 31, 2)``; affine maps, int32 ``(14, 31, 2, 6)``.
    """
    values, maps = [], []
    for operation in OPERATIONS:
        for magnitude in range(MAX_MAGNITUDE + 1):
            for sign in (1, -1):
                strength = sign * ranges.signed(operation) * magnitude / MAX_MAGNITUDE
                value = 1.0 + strength
                if operation == "posterize":
                    value = 8 - round(magnitude * ranges.posterize / MAX_MAGNITUDE)
                elif operation == "solarize":
                    value = 255 * (MAX_MAGNITUDE - magnitude) / MAX_MAGNITUDE
                values.append(value)
                maps.append(_matrix(operation, strength, height, width))
    shape = (len(OPERATIONS), MAX_MAGNITUDE + 1, 2)
    table = torch.tensor(values, dtype=torch.float32, device="cpu").view(shape)
    return table, operations.fixed_point(maps).view(*shape, 6)


def _matrix(operation: str, strength: float, height: int, width: int) -> operations.Matrix:
    if operation == "shear-x":
        return operations.shear_x(strength)
    if operation == "shear-y":
        return operations.shear_y(strength)
    if operation == "translate-x":
        return operations.translation(int(strength), 0)
    if operation == "translate-y":
        return operations.translation(0, int(strength))
    if operation == "rotate":
        return operations.rotation(strength, height, width)
    return operations.translation(0, 0)


_FIRST_POINTWISE = OPERATIONS.index("brightness")
_POINTWISE: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    operations.brightness,
    operations.color,
    operations.contrast,
    operations.sharpness,
    operations.posterize,
    operations.solarize,
    lambda pixels, _: operations.autocontrast(pixels),
    lambda pixels, _: operations.equalize(pixels),
)


def _apply(pixels: Tensor, ranges: _Ranges, operation: Tensor, magnitude: Tensor, minus: Tensor) -> Tensor:
    """One operation on each image: ``operation``, ``magnitude`` and ``minus`` are int64, ``(B,)``."""
    all_values, all_maps = (t.to(pixels.device) for t in _strengths(ranges, *pixels.shape[1:3]))
    values, maps = all_values[operation, magnitude, minus], all_maps[operation, magnitude, minus]
    # 0 is identity, 1 all the operations that move pixels (one grid serves them all), 2 and up one each of the others.
    kind = torch.where(operation < _FIRST_POINTWISE, operation.clamp(max=1), operation - (_FIRST_POINTWISE - 2))
    order = kind.argsort(stable=True)
    kinds = torch.arange(2 + len(_POINTWISE), device=pixels.device)
    # The group sizes are the one thing that is read back from the device.
    _, moved, *groups = order.split((kind.unsqueeze(1) == kinds).sum(0).tolist())
    views = pixels.clone()
    if len(moved):
        views.index_copy_(0, moved, operations.affine(pixels.index_select(0, moved), maps.index_select(0, moved)))
    for change, rows in zip(_POINTWISE, groups, strict=True):
        if len(rows):
            views.index_copy_(0, rows, change(pixels.index_select(0, rows), values.index_select(0, rows)))
    return views


@dataclass(frozen=True)
class RandAugment(Piece):
    """Some operations one after the other, each drawn uniformly from fourteen, at a fixed magnitude.

    At magnitude m of 30: shear 0.3 m/30, translation by 150/331 of the side times m/30 in whole pixels, rotation by
    30 m/30 degrees, brightness, colour, contrast and sharpness by 1 +- 0.9 m/30, posterizing to 8 - round(4 m/30) bits,
    solarizing at 255 (1 - m/30); signs are drawn as well. Nearest pixel, black outside.

    Args:
        num_ops: operations per image, >= 1.
        magnitude: of all of them, 0 to 30.
        stream: name of the random stream.

    Source: Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space", NeurIPS
    2020, arXiv 1909.13719; operations, their order and ranges as in torchvision's ``RandAugment``.
    """

    num_ops: int = 2
    magnitude: int = 9
    stream: str = "rand-augment"

    def __post_init__(self) -> None:
        check_integer("num_ops", self.num_ops, at_least=1)
        if check_integer("magnitude", self.magnitude, at_least=0) > MAX_MAGNITUDE:
            raise ArgumentError(f"magnitude: expected 0 to {MAX_MAGNITUDE}, but got {self.magnitude!r}.")

    def apply(self, pixels: Tensor, index: Tensor, *, seed: int, epoch: int) -> Tensor:
        H, W = pixels.shape[1:3]
        ranges = _Ranges(0.3, 150 / 331 * W, 150 / 331 * H, 30.0, 0.9, 4)
        u = uniform(seed, self.stream, epoch, index, 2 * self.num_ops)
        magnitude = torch.full_like(index, self.magnitude, dtype=torch.int64)
        for draws in u.split(2, dim=1):
            which, sign = draws.unbind(1)
            operation = (which * len(OPERATIONS)).long()
            pixels = _apply(pixels, ranges, operation, magnitude, (sign < 0.5).long())
        return pixels


@dataclass(frozen=True)
class TrivialAugmentWide(Piece):
    """One operation, drawn uniformly from fourteen, at a magnitude drawn uniformly from 0 to 30.

    At magnitude m of 30: shear 0.99 m/30, translation by 32 m/30 in whole pixels, rotation by 135 m/30 degrees,
    brightness, colour, contrast and sharpness by 1 +- 0.99 m/30, posterizing to 8 - round(6 m/30) bits, solarizing at
    255 (1 - m/30); signs are drawn as well. Nearest pixel, black outside.

    Args:
        stream: name of the random stream.

    Source: Müller and Hutter, "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation", ICCV 2021,
    arXiv 2103.10158; operations, their order and ranges as in torchvision's ``TrivialAugmentWide``.
    Deviation: images below 32 pixels are translated by their own side at most, so that as small a share of them ends
    up black as at 32 pixels. Magnitude 15 is 16 pixels; torchvision's float32 table has 15.99.. there, cut to 15.
    """

    stream: str = "trivial-augment"

    def apply(self, pixels: Tensor, index: Tensor, *, seed: int, epoch: int) -> Tensor:
        H, W = pixels.shape[1:3]
        ranges = _Ranges(0.99, min(32, W), min(32, H), 135.0, 0.99, 6)
        which, strength, sign = uniform(seed, self.stream, epoch, index, 3).unbind(1)
        operation = (which * len(OPERATIONS)).long()
        return _apply(pixels, ranges, operation, (strength * (MAX_MAGNITUDE + 1)).long(), (sign < 0.5).long())
