"""Relational knowledge distillation (RKD): distances and angles between the images of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .._checks import at_least_float32, check_matrix, check_number, describe
from ..errors import ArgumentError
from ..rectify.anchor_rectification import unit_rows
from .similarity_preserving import unit_scale

_PIECE_VALUES = 1 << 19  # values of one piece of the angle term: 2 MiB in float32


def rkd_distance_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    r"""Distance-wise relations: how far the images of a batch lie from each other.

    .. math:: \frac{1}{B} \sum_j \ell_\delta\big(\psi(s_i, s_j), \psi(t_i, t_j)\big), \qquad
        \psi(a_i, a_j) = \frac{\| a_i - a_j \|}{\mu}, \qquad
        \mu = \operatorname{mean}_{i \ne j} \| a_i - a_j \|

    with the Huber loss of threshold 1. This is row i's share: the mean over the batch is the mean over all B^2 pairs.

    Args:
        student_features: s, shape ``(B, D_s)``.
        teacher_features: t, shape ``(B, D_t)``; no gradient flows to them.

    Returns:
        Shape ``(B,)``; float32, or float64 where the features are. Invariant to scaling, shifting and rotating either
        side. Coincident points have distance 0 and no gradient from that pair; a batch of one gives 0.

    Raises:
        ArgumentError: shapes that do not fit.

    Source: Park et al., "Relational Knowledge Distillation", CVPR 2019, arXiv 1904.05068.
    Deviation: the mean over all B^2 pairs (a point and itself add 0), as in the public code that the usual weights
    belong to, where the paper writes the sum; that code leaves coincident points out of mu, the paper and we do not.
    """
    s, t = _pair(student_features, teacher_features)
    return F.huber_loss(_distances(s), _distances(t), reduction="none").mean(1)


def rkd_angle_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    r"""Angle-wise relations: the angles of the triangles that the images of a batch form.

    .. math:: \frac{1}{B^2} \sum_{i,k} \ell_\delta\big(\cos \angle s_i s_j s_k, \; \cos \angle t_i t_j t_k\big)

    with the Huber loss of threshold 1. This is the share of row j, the vertex: the mean over the batch is the mean
    over all B^3 triplets.

    Args, returns and errors as in :func:`rkd_distance_loss`; two coincident points have no direction, and the cosine
    of an angle with such a side is 0.

    Source: Park et al., "Relational Knowledge Distillation", CVPR 2019, arXiv 1904.05068.
    Deviation: the mean over all B^3 triplets, as above.

    Cost: 2 B^3 (D_s + D_t) operations forward, about twice that backward. Never all B^3 angles at
    once: the vertices are taken in pieces of at most 2 MiB per tensor in float32 (or one vertex, where that is more),
    under 20 MiB in all with 256 images and features of width 256; backward computes each piece again.
    """
    s, t = _pair(student_features, teacher_features)
    loss: Tensor = _Angles.apply(s, t)
    return loss


def rkd_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
) -> Tensor:
    """Weighted sum of :func:`rkd_distance_loss` and :func:`rkd_angle_loss`.

    Args:
        student_features: shape ``(B, D_s)``.
        teacher_features: shape ``(B, D_t)``; no gradient flows to them.
        distance_weight: >= 0; by default that of the public code for CIFAR-100.
        angle_weight: >= 0; likewise. A term of weight 0 is not computed.

    Returns:
        Shape ``(B,)``, each row's share; float32, or float64 where the features are, under autocast too.

    Raises:
        ArgumentError: shapes or weights that do not fit.
    """
    distance_weight = check_number("distance_weight", distance_weight, at_least=0)
    angle_weight = check_number("angle_weight", angle_weight, at_least=0)
    _pair(student_features, teacher_features)
    loss = at_least_float32(student_features).new_zeros(len(student_features))
    if distance_weight:
        loss = loss + distance_weight * rkd_distance_loss(student_features, teacher_features)
    if angle_weight:
        loss = loss + angle_weight * rkd_angle_loss(student_features, teacher_features)
    return loss


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    check_matrix("student_features", student, "(B, D_s)")
    check_matrix("teacher_features", teacher, "(B, D_t)", rows=student.shape[0])
    if not student.numel() or not teacher.numel():
        raise ArgumentError(
            f"student_features, teacher_features: expected at least one row and one column, but got "
            f"{describe(student)} and {describe(teacher)}."
        )
    return unit_scale(at_least_float32(student)), unit_scale(at_least_float32(teacher.detach()))


def _distances(x: Tensor) -> Tensor:
    """Distances divided by their mean ``(B, B)``; the gradient at a distance of 0 is 0."""
    # not through a matrix product, which cancels digits of close points
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distance.sum() / max(len(x) * (len(x) - 1), 1)
    return distance / torch.where(mean > 0, mean, torch.ones_like(mean))


class _Angles(torch.autograd.Function):
    """The angle term piece by piece; backward computes each piece again, so that none is kept."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor) -> Tensor:
        ctx.save_for_backward(s, t)
        return torch.cat([_angle_piece(s, t, start, stop) for start, stop in _pieces(s, t)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        s, t = ctx.saved_tensors
        total = torch.zeros_like(s)
        for start, stop in _pieces(s, t):
            with torch.enable_grad():
                leaf = s.detach().requires_grad_()
                piece = _angle_piece(leaf, t, start, stop)
            total += torch.autograd.grad(piece, leaf, grad[start:stop])[0]
        return total, None


def _pieces(s: Tensor, t: Tensor) -> list[tuple[int, int]]:
    B = len(s)
    step = max(1, _PIECE_VALUES // (B * max(B, s.shape[1], t.shape[1])))
    return [(start, min(start + step, B)) for start in range(0, B, step)]


def _angle_piece(s: Tensor, t: Tensor, start: int, stop: int) -> Tensor:
    """Shares of the vertices from ``start`` to ``stop``."""
    with torch.autocast(s.device.type, enabled=False):
        return F.huber_loss(_cosines(s, start, stop), _cosines(t, start, stop), reduction="none").mean((1, 2))


def _cosines(x: Tensor, start: int, stop: int) -> Tensor:
    """Cosines of the angles at some vertices, ``(vertices, B, B)``."""
    sides = x.unsqueeze(0) - x[start:stop].unsqueeze(1)  # (vertices, B, D)
    sides = unit_rows(sides.flatten(0, 1)).view_as(sides)
    return sides @ sides.mT


class RKD(nn.Module):
    """:func:`rkd_loss` as a module; labels are taken, for a common call, and not used."""

    def __init__(self, *, distance_weight: float = 25.0, angle_weight: float = 50.0) -> None:
        super().__init__()
        self.distance_weight = check_number("distance_weight", distance_weight, at_least=0)
        self.angle_weight = check_number("angle_weight", angle_weight, at_least=0)

    def forward(self, student_features: Tensor, teacher_features: Tensor, labels: Tensor | None = None) -> Tensor:
        return rkd_loss(
            student_features,
            teacher_features,
            distance_weight=self.distance_weight,
            angle_weight=self.angle_weight,
        )

    def extra_repr(self) -> str:
        return f"distance_weight={self.distance_weight}, angle_weight={self.angle_weight}"
