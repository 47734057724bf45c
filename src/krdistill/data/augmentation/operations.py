"""Image operations on a batch, each image with its own strength, in Pillow's arithmetic.

All take contiguous pixels, uint8 ``(B, H, W, C)``, C one or three, and give new ones. Where Pillow works in fixed point
or float32, so do these functions, with the same result bit by bit; the one exception is :func:`autocontrast`.

Source: Pillow's ``ImageEnhance``, ``ImageOps`` and ``Image.transform``, whose results are the definition here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Matrix = tuple[float, float, float, float, float, float]
"""Affine map (a, b, c, d, e, f) from output to input: ``x_in = a x + b y + c``, ``y_in = d x + e y + f``."""


def shear_x(level: float) -> Matrix:
    """Rows pushed sideways by ``level`` times their distance from the upper edge."""
    return (1.0, level, 0.0, 0.0, 1.0, 0.0)


def shear_y(level: float) -> Matrix:
    """Columns pushed up or down by ``level`` times their distance from the left edge."""
    return (1.0, 0.0, 0.0, level, 1.0, 0.0)


def translation(right: int, down: int) -> Matrix:
    """The whole image moved by whole pixels."""
    return (1.0, 0.0, -float(right), 0.0, 1.0, -float(down))


def rotation(degrees: float, height: int, width: int) -> Matrix:
    """A turn about the image's centre, counter-clockwise."""
    angle = -math.radians(degrees % 360.0)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = width / 2, height / 2
    return (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)


def fixed_point(matrices: Sequence[Matrix]) -> Tensor:
    """What :func:`affine` works with: int32, ``(B, 6)``, steps of 1/65536 pixel, from pixel centres on."""
    centred = ((a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5) for a, b, c, d, e, f in matrices)
    return torch.tensor(
        [[math.floor(v * 65536 + 0.5) for v in matrix] for matrix in centred], dtype=torch.int32, device="cpu"
    )


def affine(pixels: Tensor, maps: Tensor) -> Tensor:
    """Every image under a map of its own, to the nearest pixel; black where the map points outside.

    Args:
        pixels: uint8, ``(B, H, W, C)``.
        maps: int32, ``(B, 6)``, from :func:`fixed_point`; |coefficients| times image side below 2**31.
    """
    B, H, W, C = pixels.shape
    a, b, c, d, e, f = maps[:, :, None, None].unbind(1)
    x = torch.arange(W, device=pixels.device, dtype=torch.int32)
    y = torch.arange(H, device=pixels.device, dtype=torch.int32).unsqueeze(1)
    column = (a * x + (b * y + c)) >> 16
    row = (d * x + (e * y + f)) >> 16
    inside = (column >= 0) & (column < W) & (row >= 0) & (row < H)
    first = torch.arange(B, device=pixels.device).view(B, 1, 1) * (H * W)
    source = torch.where(inside, row * W + column + first, B * H * W)
    with_black = torch.cat([pixels.view(-1, C), pixels.new_zeros(1, C)])
    return with_black.index_select(0, source.flatten()).view(B, H, W, C)


def brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    """Towards black (factor below 1) or away from it; ``factor`` float32, ``(B,)``, >= 0."""
    return _blend(torch.zeros((), device=pixels.device), pixels, factor)


def color(pixels: Tensor, factor: Tensor) -> Tensor:
    """Towards grey (factor below 1) or away from it; ``factor`` float32, ``(B,)``, >= 0. Grey images stay."""
    if pixels.shape[3] == 1:
        return pixels.clone()
    return _blend(_luminance(pixels).to(torch.float32), pixels, factor)


def contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    """Towards the image's mean grey (factor below 1) or away from it; ``factor`` float32, ``(B,)``, >= 0."""
    n = pixels.shape[1] * pixels.shape[2]
    total = _luminance(pixels).sum((1, 2, 3), keepdim=True)
    mean = (2 * total + n) // (2 * n)  # rounded to the next whole number, halves upwards
    return _blend(mean.to(torch.float32), pixels, factor)


def sharpness(pixels: Tensor, factor: Tensor) -> Tensor:
    """Towards a smoothed image (factor below 1) or away from it; ``factor`` float32, ``(B,)``, >= 0.

    Smoothing is a 3 x 3 mean in which the centre counts 5 times; pixels on the border are left as they are.
    """
    if min(pixels.shape[1:3]) < 3:
        return pixels.clone()
    smooth = pixels.to(torch.float32)
    centre = smooth[:, 1:-1, 1:-1]
    columns = smooth[:, :-2] + smooth[:, 1:-1] + smooth[:, 2:]
    total = columns[:, :, :-2] + columns[:, :, 1:-1] + columns[:, :, 2:] + 4 * centre
    smooth[:, 1:-1, 1:-1] = ((total + 6.5) / 13).floor()  # total / 13, rounded; 13 is odd, so no halves arise
    return _blend(smooth, pixels, factor)


def posterize(pixels: Tensor, bits: Tensor) -> Tensor:
    """Only the highest ``bits`` bits of every value; ``(B,)``, whole numbers from 1 to 8."""
    mask = (255 << (8 - bits.to(torch.int32))).to(torch.uint8)
    return pixels & mask.view(-1, 1, 1, 1)


def solarize(pixels: Tensor, threshold: Tensor) -> Tensor:
    """Values at or above a threshold inverted; ``threshold`` float32, ``(B,)``."""
    return torch.where(pixels >= threshold.view(-1, 1, 1, 1), 255 - pixels, pixels)


def autocontrast(pixels: Tensor) -> Tensor:
    r"""Every channel stretched so that its darkest value becomes 0 and its brightest 255; flat channels stay.

    .. math:: v \mapsto \lfloor 255 (v - lo) / (hi - lo) \rfloor

    Deviation: exact. Pillow evaluates ``v * scale - lo * scale`` in float64, whose rounding errors can take a value
    that should be whole to the one below (255 to 254, for one); not every device has float64.
    """
    low, high = pixels.amin((1, 2), keepdim=True), pixels.amax((1, 2), keepdim=True)
    span = (high - low).clamp(min=1).to(torch.float32)
    # Numerator below 2**24 and denominator below 2**8: the float32 quotient cannot be rounded up to a whole number.
    stretched = ((pixels - low).to(torch.float32) * 255 / span).to(torch.uint8)
    return torch.where(high > low, stretched, pixels)


def equalize(pixels: Tensor) -> Tensor:
    """Every channel's histogram evened out.

    With counts h and ``step = (pixels - h[brightest]) // 255``, v becomes ``(step // 2 + sum of h below v) // step``,
    at most 255. Channels where ``step`` is 0 stay: images of fewer than 256 pixels, and flat ones.
    """
    B, H, W, C = pixels.shape
    values = pixels.view(B, H * W, C).long()
    counts = torch.zeros(B, 256, C, dtype=torch.int64, device=pixels.device)
    counts.scatter_add_(1, values, torch.ones_like(values))
    brightest = counts.gather(1, values.amax(1, keepdim=True))
    step = (H * W - brightest) // 255
    below = counts.cumsum(1) - counts
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    evened = table.gather(1, values).to(torch.uint8).view(B, H, W, C)
    return torch.where(step.view(B, 1, 1, C) > 0, evened, pixels)


def _blend(other: Tensor, pixels: Tensor, factor: Tensor) -> Tensor:
    """``other + factor * (pixels - other)``, clipped and cut to whole numbers (not rounded), in float32 like Pillow."""
    mixed = other + factor.view(-1, 1, 1, 1) * (pixels.to(torch.float32) - other)
    return mixed.clamp(0, 255).to(torch.uint8)


def _luminance(pixels: Tensor) -> Tensor:
    """Grey values ``(B, H, W, 1)``, int32: ITU-R 601-2 weights in units of 1/65536, rounded."""
    if pixels.shape[3] == 1:
        return pixels.to(torch.int32)
    red, green, blue = pixels.to(torch.int32).split(1, dim=3)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
