"""Similarity-preserving distillation: images that the teacher finds alike, the student shall find alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._checks import at_least_float32, describe
from ..errors import ArgumentError
from ..rectify.anchor_rectification import unit_rows


def similarity_preserving_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    r"""Squared difference of the row-normalised similarities within the batch.

    .. math:: \frac{1}{B} \sum_j (\tilde G^s_{ij} - \tilde G^t_{ij})^2, \qquad
        G = Q Q^\top, \qquad \tilde G_i = G_i / \| G_i \|

    Q holds one image's flattened features or map per row. This is row i's share: the mean over the batch is the
    paper's :math:`\| \tilde G^s - \tilde G^t \|_F^2 / B^2`. A batch of one says nothing: 0.

    Args:
        student_features: shape ``(B, ...)``, features or maps.
        teacher_features: shape ``(B, ...)``, of any other width; no gradient flows to them.

    Returns:
        Shape ``(B,)``; float32, or float64 where the features are, under autocast too. The scale of the features makes
        no difference. An image whose features are all zero has similarity 0 to every other.

    Raises:
        ArgumentError: shapes that do not fit.

    Source: Tung, Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, arXiv 1907.09682.
    """
    s = _rows("student_features", student_features)
    t = _rows("teacher_features", teacher_features, len(s)).detach()
    with torch.autocast(s.device.type, enabled=False):
        difference = _similarity(at_least_float32(s)) - _similarity(at_least_float32(t))
    return difference.square().mean(1)


def _rows(name: str, x: Any, rows: int | None = None) -> Tensor:
    fits = isinstance(x, Tensor) and x.is_floating_point() and x.ndim >= 2 and x.numel() > 0
    if not fits or rows not in (None, len(x)):
        wanted = "(B, ...), not empty" if rows is None else f"({rows}, ...)"
        raise ArgumentError(f"{name}: expected a floating-point tensor of shape {wanted}, but got {describe(x)}.")
    flat: Tensor = x.flatten(1)
    return flat


def unit_scale(x: Tensor) -> Tensor:
    """``x`` divided by its largest magnitude, as a constant: for functions that the scale makes no difference to.

    Squares and their sums then neither overflow nor vanish.
    """
    largest = x.detach().abs().amax()
    return x / torch.where(largest > 0, largest, torch.ones_like(largest))


def _similarity(x: Tensor) -> Tensor:
    x = unit_scale(x)
    return unit_rows(x @ x.T)


class SimilarityPreserving(nn.Module):
    """:func:`similarity_preserving_loss` as a module; labels are taken, for a common call, and not used."""

    def forward(self, student_features: Tensor, teacher_features: Tensor, labels: Tensor | None = None) -> Tensor:
        return similarity_preserving_loss(student_features, teacher_features)
