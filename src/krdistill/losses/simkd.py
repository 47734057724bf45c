"""SimKD: the student keeps the teacher's own classifier and learns to feed it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .._checks import at_least_float32, check_integer, describe
from ..errors import ArgumentError, ModelError


class MapBackbone(Protocol):
    """What is asked of the student: the channels of its stages, and their maps, the deepest last."""

    map_channels: Sequence[int]

    def forward_maps(self, x: Tensor) -> tuple[Tensor, ...]: ...


def simkd_loss(projected_map: Tensor, teacher_map: Tensor) -> Tensor:
    r"""Mean squared difference of the student's projected map and the teacher's last map.

    .. math:: \frac{1}{C H W} \| P(F_s) - F_t \|^2

    Where the maps' sizes differ, the larger is averaged to the smaller one's.

    Args:
        projected_map: the student's, projected to the teacher's channels, shape ``(B, C, H, W)``.
        teacher_map: shape ``(B, C, H', W')``; no gradient flows to it.

    Returns:
        Shape ``(B,)``; float32, or float64 where the maps are.

    Raises:
        ArgumentError: shapes that do not fit.

    Source: Chen et al., "Knowledge Distillation with the Reused Teacher Classifier", CVPR 2022, arXiv 2203.14001.
    Deviation: where the student's map is the larger one, the paper's code averages it before the projector, we after
    it, so that the student does not depend on the size of the teacher's maps.
    """
    for name, x in (("projected_map", projected_map), ("teacher_map", teacher_map)):
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim != 4 or min(x.shape[1:]) < 1:
            raise ArgumentError(
                f"{name}: expected a floating-point tensor of shape (B, C, H, W), but got {describe(x)}."
            )
    if projected_map.shape[:2] != teacher_map.shape[:2]:
        raise ArgumentError(
            f"teacher_map: expected shape {(*projected_map.shape[:2], 'H', 'W')}, but got {describe(teacher_map)}. "
            "The student's map must be projected to the teacher's channels."
        )
    s, t = at_least_float32(projected_map), at_least_float32(teacher_map.detach())
    size = (min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3]))
    s, t = (x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (s, t))
    loss: Tensor = _MeanSquaredDifference.apply(s, t)
    return loss


class _MeanSquaredDifference(torch.autograd.Function):
    """Keeps the two maps, which are there anyway; each pass makes one map, the difference."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor) -> Tensor:
        ctx.save_for_backward(s, t)
        return (s - t).square_().mean((1, 2, 3))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        s, t = ctx.saved_tensors
        return (s - t).mul_((grad * (2 / s.shape[1:].numel())).view(-1, 1, 1, 1)), None


class SimKD(nn.Module):
    """:func:`simkd_loss` as a module; labels are taken, for a common call, and not used."""

    def forward(self, projected_map: Tensor, teacher_map: Tensor, labels: Tensor | None = None) -> Tensor:
        return simkd_loss(projected_map, teacher_map)


class ReusedClassifier(nn.Module):
    """A student whose last map is projected to the teacher's width, and classified by the teacher's frozen head.

    It is a backbone of its own, to be asked at the same three depths as any: the projected map comes as one more
    stage, the deepest, so that ``forward_maps(x)[-1]`` is what :func:`simkd_loss` compares. It needs no teacher after
    training.

    The projector is three convolutions, 1x1, 3x3 and 1x1, each with batch normalisation and ReLU, through a bottleneck
    of D_t / factor channels. Its weights are drawn as those of :class:`krdistill.models.backbone.Backbone` are, from
    the global generator: fork and seed it around the constructor.

    Args:
        student: a module with ``forward_maps`` and ``map_channels``. It is taken over, not copied; its own
            ``head``, if it has one, is not used any more and is replaced by :class:`torch.nn.Identity`.
        teacher_head: the teacher's last linear layer, from D_t to K; copied and frozen.
        factor: of the bottleneck.

    Raises:
        ModelError: a student without maps, or a head that is no linear layer.
        ArgumentError: a factor below 1.

    Source: Chen et al., "Knowledge Distillation with the Reused Teacher Classifier", CVPR 2022, arXiv 2203.14001.
    """

    def __init__(self, student: nn.Module, teacher_head: nn.Linear, *, factor: int = 2) -> None:
        super().__init__()
        channels: Any = getattr(student, "map_channels", None)
        if not isinstance(student, nn.Module) or not callable(getattr(student, "forward_maps", None)) or not channels:
            raise ModelError(
                f"student: expected a network that shows its stages (forward_maps, map_channels), but got "
                f"{type(student).__name__}. The networks of krdistill.models do."
            )
        if not isinstance(teacher_head, nn.Linear):
            raise ModelError(f"teacher_head: expected a linear layer, but got {type(teacher_head).__name__}.")
        D = teacher_head.in_features
        mid = max(1, D // check_integer("factor", factor, at_least=1))
        if isinstance(getattr(student, "head", None), nn.Module):
            student.head = nn.Identity()
        self.student = student
        self.projector = nn.Sequential(
            *_conv_norm(channels[-1], mid, 1), *_conv_norm(mid, mid, 3), *_conv_norm(mid, D, 1)
        )
        self.head = copy.deepcopy(teacher_head).requires_grad_(False)
        self.feature_dim = D
        self.map_channels = (*channels, D)
        for module in self.projector:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_maps(self, x: Tensor) -> tuple[Tensor, ...]:
        """The maps of the student's stages, and last the projected one ``(B, D_t, H, W)``, of images ``(B, C, H, W)``.

        In training mode a batch of one image whose last map is 1x1 is refused by batch normalisation, as in any
        network that has it.
        """
        student: MapBackbone = self.student  # type: ignore[assignment]
        maps = student.forward_maps(x)
        return (*maps, self.projector(maps[-1]))

    def pool(self, deepest: Tensor) -> Tensor:
        """The feature ``(B, D_t)`` of the projected map: its mean over positions."""
        return deepest.mean((2, 3))

    def forward_features(self, x: Tensor) -> Tensor:
        """The pooled feature ``(B, D_t)`` of images ``(B, C, H, W)``."""
        return self.pool(self.forward_maps(x)[-1])

    def forward(self, x: Tensor) -> Tensor:
        """The teacher's classifier on the projected feature: logits ``(B, K)`` of images ``(B, C, H, W)``."""
        logits: Tensor = self.head(self.forward_features(x))
        return logits


def _conv_norm(inside: int, outside: int, kernel: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inside, outside, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outside),
        nn.ReLU(inplace=True),
    ]
