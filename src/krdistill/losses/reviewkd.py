"""Knowledge review (ReviewKD): the student's stages, fused from deep to shallow, follow the teacher's stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .._checks import at_least_float32, check_integer, describe
from ..errors import ArgumentError

_LEVELS = (4, 2, 1)
_WIDEST = 512
_CACHE = 4 << 20


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
    difference = s - t  # averaging is linear: the averages' difference is the difference's average
    loss, weight, total = _MeanSquare.apply(difference), 1.0, 1.0
    for size in [level for level in _LEVELS if level < min(s.shape[2:])]:
        weight /= 2
        total += weight
        average = F.adaptive_avg_pool2d(difference, size)
        loss = loss + weight * average.square().mean((1, 2, 3))
        if difference.shape[2] % size == difference.shape[3] % size == 0:  # windows of one size: averages compose
            difference = average
    return loss / total


class _MeanSquare(torch.autograd.Function):
    """Mean of the squares of every map ``(B,)``, which makes no map on the way, and one for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.linalg.vector_norm(x, dim=(1, 2, 3)).square_().div_(x.shape[1:].numel())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x * (grad * (2 / x.shape[1:].numel())).view(-1, 1, 1, 1)


class ReviewKD(nn.Module):
    """Each stage of the teacher is compared with the student's stages from there on downwards, fused.

    From the deepest stage to the shallowest: the student's map goes through a 1x1 convolution to ``mid_channels``; the
    fused map of the deeper stage, resized, is added, both weighted per position by attention over the two; a 3x3
    convolution turns the sum into the teacher's channels, and :func:`hierarchical_context_loss` compares.

    Where the networks have different numbers of stages, the last of each are matched, as many as the smaller number.
    Maps are resized to the neighbour they meet by nearest neighbours: a deeper map to the student's shallower one, and
    the fused map to the teacher's.

    The convolutions here are trained, so the loss is not cheap: for ResNet-32x4 to ResNet-8x4 on 32x32 images they take
    885 million multiplications per image, forward and backward, which is 55 % of the 1,613 million of a training step
    without the loss (the student forward and backward, the teacher forward).

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
            with torch.autocast(x.device.type, enabled=False):
                dtype = self.attention.weight.dtype
                x = _Join.apply(x.to(dtype), deeper.to(dtype), self.attention.weight, self.attention.bias)
        return self.leave_norm(self.leave(_resize(x, size))), x


def _join(x: Tensor, deeper: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Both maps, weighted per position by attention over the two: a 1x1 convolution of the two maps, stacked."""
    own, other = weight.flatten(1).split(x.shape[1], dim=1)
    # the deeper map's part is convolved before it is resized; as matrix products, which suit so few channels
    seen = F.linear(x.permute(0, 2, 3, 1), own, bias).permute(0, 3, 1, 2)
    below = F.linear(deeper.permute(0, 2, 3, 1), other).permute(0, 3, 1, 2)
    own, other = (seen + _resize(below, x.shape[2:])).sigmoid().split(1, dim=1)
    return torch.addcmul(own * x, other, _resize(deeper, x.shape[2:]))


class _Join(torch.autograd.Function):
    """:func:`_join`, on the CPU a few images at a time: they stay in its cache, and nothing in between is kept."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        x, deeper, weight, bias = inputs
        out = torch.empty_like(x)
        for rows in _pieces(x):
            out[rows] = _join(x[rows], deeper[rows], weight, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        inputs = ctx.saved_tensors
        slopes = (*(torch.empty_like(m) for m in inputs[:2]), *(torch.zeros_like(p) for p in inputs[2:]))
        for rows in _pieces(inputs[0]):
            with torch.enable_grad():
                piece = [x.detach().requires_grad_() for x in (*(m[rows] for m in inputs[:2]), *inputs[2:])]
                joined = _join(*piece)
            x, deeper, weight, bias = torch.autograd.grad(joined, piece, grad[rows])
            slopes[0][rows], slopes[1][rows] = x, deeper
            slopes[2].add_(weight)
            slopes[3].add_(bias)
        return slopes


def _pieces(x: Tensor) -> list[slice]:
    """The rows of a batch, on the CPU so many at a time as take 4 MiB."""
    step = max(1, _CACHE // max(1, x[:1].nbytes)) if x.device.type == "cpu" else len(x)
    return [slice(start, start + step) for start in range(0, len(x), step)]


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
