"""Feature matching: the student's projected feature is pulled to a target feature."""

from __future__ import annotations

from torch import Tensor, nn

from .._checks import at_least_float32, check_integer, check_matrix
from ..rectify.anchor_rectification import unit_rows


def cosine_distance(student_features: Tensor, target_features: Tensor) -> Tensor:
    r"""One minus the cosine.

    .. math:: 1 - \operatorname{norm}(f_s)^\top \operatorname{norm}(r)

    Args:
        student_features: f_s, shape ``(B, D)``, projected to the target's width.
        target_features: r, shape ``(B, D)``; no gradient flows to them.

    Returns:
        Shape ``(B,)``, in [0, 2]; float32, or float64 where either input is. A zero vector has distance 1 to
        everything, and a finite gradient.

    Raises:
        ArgumentError: shapes that do not fit.
    """
    f, r = _unit_pair(student_features, target_features)
    return 1 - (f * r).sum(1)


def squared_distance(student_features: Tensor, target_features: Tensor) -> Tensor:
    r"""Squared distance of directions; twice :func:`cosine_distance` where both are non-zero.

    .. math:: \| \operatorname{norm}(f_s) - \operatorname{norm}(r) \|^2

    Args, returns and errors as in :func:`cosine_distance`; in [0, 4].
    """
    f, r = _unit_pair(student_features, target_features)
    return (f - r).square().sum(1)


def _unit_pair(student: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    check_matrix("student_features", student, "(B, D)")
    check_matrix("target_features", target, "(B, D)", rows=student.shape[0], columns=student.shape[1])
    return unit_rows(at_least_float32(student)), unit_rows(at_least_float32(target.detach()))


class Projector(nn.Module):
    """A learned affine map from the student's feature to the teacher's width, also where the widths are equal.

    The weight starts orthogonal, so that at first the student's geometry is kept as far as the widths allow; the bias
    starts at zero. Drawn from the global generator, like any layer: fork and seed it around the constructor.

    Args:
        student_dim: D_s.
        teacher_dim: D_t.
    """

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        student_dim = check_integer("student_dim", student_dim, at_least=1)
        teacher_dim = check_integer("teacher_dim", teacher_dim, at_least=1)
        self.linear = nn.utils.skip_init(nn.Linear, student_dim, teacher_dim)
        nn.init.orthogonal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """``(B, D_s)`` to ``(B, D_t)``; half-precision features outside autocast are taken in the weight's dtype."""
        check_matrix("student_features", features, "(B, D_s)", columns=self.linear.in_features)
        projected: Tensor = self.linear(features.to(self.linear.weight.dtype))
        return projected
