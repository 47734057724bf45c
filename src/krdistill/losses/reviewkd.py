"""Knowledge review (ReviewKD): the student's stages, fused from deep to shallow, follow the teacher's stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import at_least_float32, check_integer, describe
from ..errors import ArgumentError

_LEVELS = (4, 2, 1)
_WIDEST = 512


def hierarchical_context_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    r"""HCL: mean squared difference of two maps at several sizes.

    .. math:: \frac{\sum_l 2^{-l} \operatorname{mse}_l}{\sum_l 2^{-l}}

    Level 0 is the maps as they are; the next are the maps averaged to 4x4, 2x2 and 1x1. A size that is not below the
    map's own (its shorter side) is left out, and the weights go to those that remain: 1, 1/2, 1/4, 1/8 in their order.

    Args:
        student_map: shape ``(B, C, H, W)``.
        teacher_map: the same shape; no gradient flows to it.

    Returns:
        Shape ``(B,)``, each level a mean over channels and positions; float32, or float64 where the maps are.

    Raises:
        ArgumentError: shapes that do not fit.

    Source: Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv 2104.09044.
    """
    _check_map("student_map", student_map)
    _check_map("teacher_map", teacher_map, tuple(student_map.shape))
    s, t = at_least_float32(student_map), at_least_float32(teacher_map.detach())
    sizes = [level for level in _LEVELS if level < min(s.shape[2:])]
    loss, weight, total = (s - t).square().mean((1, 2, 3)), 1.0, 1.0
    for size in sizes:
        weight /= 2
        total += weight
        difference = F.adaptive_avg_pool2d(s, size) - F.adaptive_avg_pool2d(t, size)
        loss = loss + weight * difference.square().mean((1, 2, 3))
    return loss / total


class ReviewKD(nn.Module):
    """Each stage of the teacher is compared with the student's stages from there on downwards, fused.

    From the deepest stage to the shallowest: the student's map goes through a 1x1 convolution to ``mid_channels``; the
    fused map of the deeper stage, resized, is added, both weighted per position by attention over the two; a 3x3
    convolution turns the sum into the teacher's channels, and :func:`hierarchical_context_loss` compares.

    Where the networks have different numbers of stages, the last of each are matched, as many as the smaller number.
    Maps are resized to the neighbour they meet by nearest neighbours: a deeper map to the student's shallower one, and
    the fused map to the teacher's.

    Weights are drawn from the global generator, like any layer's: fork and seed it around the constructor.

    Args:
        student_channels: channels of the student's stages, the deepest last.
        teacher_channels: channels of the teacher's stages, likewise.
        mid_channels: width of the fused maps; by default the channels of the student's deepest map, at most 512.

    Raises:
        ArgumentError: no stages, or channels below 1.

    Source: Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv 2104.09044.
    Deviation: the paper's code compares maps before their last ReLU and adds the pooled feature as one more, deepest
    stage; here the maps are those given, and a caller may append a pooled feature as a 1x1 map. It carries the fused
    map on in the teacher's size, we in the student's, which differs where the two sizes do. The growth of the weight
    over the first epochs belongs to the training.
    """

    def __init__(
        self, student_channels: Sequence[int], teacher_channels: Sequence[int], *, mid_channels: int | None = None
    ) -> None:
        super().__init__()
        self.student_channels = _check_channels("student_channels", student_channels)
        self.teacher_channels = _check_channels("teacher_channels", teacher_channels)
        mid = min(_WIDEST, self.student_channels[-1]) if mid_channels is None else mid_channels
        self.mid_channels = mid = check_integer("mid_channels", mid, at_least=1)
        self.depth = min(len(self.student_channels), len(self.teacher_channels))
        pairs = zip(self.student_channels[-self.depth :], self.teacher_channels[-self.depth :], strict=True)
        self.fusions = nn.ModuleList(
            _Fusion(inside, mid, outside, deepest=i == self.depth - 1) for i, (inside, outside) in enumerate(pairs)
        )

    def forward(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
        """The loss of a batch.

        Args:
            student_maps: one map ``(B, C, H, W)`` per stage of the student, the deepest last.
            teacher_maps: one per stage of the teacher, of any sizes; no gradient flows to them.

        Returns:
            Shape ``(B,)``, the sum over the matched stages; float32 at least, under autocast too.

        Raises:
            ArgumentError: maps that do not fit; or, in training mode, a batch that leaves batch normalisation one
                value per channel (one image with a 1x1 map).
        """
        _check_maps("student_maps", student_maps, self.student_channels)
        _check_maps("teacher_maps", teacher_maps, self.teacher_channels, len(student_maps[0]))
        pairs = list(zip(student_maps[-self.depth :], teacher_maps[-self.depth :], strict=True))
        if self.training:
            for pair in pairs:
                _check_batch_statistics(pair[0])
                _check_batch_statistics(pair[1])
        losses = []
        fused: Tensor | None = None
        for fusion, (s, t) in zip(reversed(self.fusions), reversed(pairs), strict=True):
            answer, fused = fusion(s, fused, t.shape[2:])
            losses.append(hierarchical_context_loss(answer, t))
        return torch.stack(losses).sum(0)

    def extra_repr(self) -> str:
        return f"{self.student_channels} -> {self.teacher_channels}, mid_channels={self.mid_channels}"


class _Fusion(nn.Module):
    """One stage: the student's map joined with the fused map of the deeper stage (attention-based fusion, ABF)."""

    def __init__(self, inside: int, mid: int, outside: int, *, deepest: bool) -> None:
        super().__init__()
        self.enter, self.enter_norm = nn.Conv2d(inside, mid, 1, bias=False), nn.BatchNorm2d(mid)
        self.attention = None if deepest else nn.Conv2d(2 * mid, 2, 1)
        self.leave, self.leave_norm = nn.Conv2d(mid, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside)
        for convolution in (self.enter, self.leave):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, x: Tensor, deeper: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        x = self.enter_norm(self.enter(x.to(self.enter.weight.dtype)))
        if self.attention is not None and deeper is not None:
            deeper = _resize(deeper, x.shape[2:])
            own, other = self.attention(torch.cat([x, deeper], dim=1)).sigmoid().split(1, dim=1)
            x = own * x + other * deeper
        return self.leave_norm(self.leave(_resize(x, size))), x


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, size=tuple(size), mode="nearest")


def _check_batch_statistics(x: Tensor) -> None:
    """Batch normalisation in training mode needs more than one value per channel."""
    if x.shape[0] * x.shape[2] * x.shape[3] < 2:
        raise ArgumentError(
            f"Expected more than one value per channel for batch normalisation in training mode, but got "
            f"{describe(x)}. Use batches of at least 2 images, or eval()."
        )


def _check_channels(name: str, channels: Any) -> tuple[int, ...]:
    if not isinstance(channels, Sequence) or isinstance(channels, str) or not channels:
        raise ArgumentError(f"{name}: expected the channels of at least one stage, but got {channels!r}.")
    return tuple(check_integer(f"{name}[{i}]", c, at_least=1) for i, c in enumerate(channels))


def _check_map(name: str, x: Any, shape: tuple[int, ...] | None = None) -> None:
    fits = isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 4 and min(x.shape[1:]) > 0
    if not fits or shape not in (None, tuple(x.shape)):
        wanted = "(B, C, H, W)" if shape is None else f"(B, C, H, W) = {shape}"
        raise ArgumentError(f"{name}: expected a floating-point tensor of shape {wanted}, but got {describe(x)}.")


def _check_maps(name: str, maps: Any, channels: tuple[int, ...], rows: int | None = None) -> None:
    # a bare tensor is a sequence of its rows to Python, and would pass for maps without a batch
    if not isinstance(maps, tuple | list) or len(maps) != len(channels):
        came = f"{len(maps)} maps" if isinstance(maps, tuple | list) else describe(maps)
        raise ArgumentError(f"{name}: expected a tuple of {len(channels)} maps, one per stage, but got {came}.")
    for i, (x, wanted) in enumerate(zip(maps, channels, strict=True)):
        _check_map(f"{name}[{i}]", x)
        B = len(maps[0]) if rows is None else rows
        if x.shape[1] != wanted or len(x) != B:
            raise ArgumentError(f"{name}[{i}]: expected shape ({B}, {wanted}, H, W), but got {describe(x)}.")
