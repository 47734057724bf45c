"""Logit matching: the squared difference of the logits themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._checks import at_least_float32, check_logits
from ._rows import once, row_slices


def logit_mse(student_logits: Tensor, teacher_logits: Tensor, *, centre: bool = False) -> Tensor:
    r"""Mean squared difference of the logits.

    .. math:: \frac{1}{K} \sum_k (z_{s,k} - z_{t,k})^2

    Softmax does not see a constant added to a row of logits; this loss does: a student that differs from the teacher
    by a constant is pulled to it all the same. ``centre`` takes each row's mean off both sides first, and then such
    constants make no difference. Neither form is invariant to the scale of the logits.

    Args:
        student_logits: z_s, shape ``(B, K)``.
        teacher_logits: z_t, shape ``(B, K)``; no gradient flows to them.
        centre: see above.

    Returns:
        Shape ``(B,)``; float32, or float64 where either logits are.

    Raises:
        ArgumentError: shapes that do not fit.

    Source: Ba, Caruana, "Do Deep Nets Really Need to be Deep?", 2014, arXiv 1312.6184; Kim et al., "Comparing
    Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation", IJCAI 2021, arXiv 2105.08919.
    Deviation: the mean over classes, where the papers write the sum (the first with a factor 1/2), so that the weight
    of the term need not follow K. ``centre`` is ours.
    """
    B, K = check_logits("student_logits", student_logits).shape
    check_logits("teacher_logits", teacher_logits, rows=B, columns=K)
    s, t = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    if centre:  # before the difference, which would lose digits to large constants
        s, t = s - s.mean(1, keepdim=True), t - t.mean(1, keepdim=True)
    return _MeanSquare.apply(s - t)


class _MeanSquare(torch.autograd.Function):
    """The mean of squares by row, which keeps its input and makes one array in the backward pass."""

    @staticmethod
    def forward(ctx: Any, difference: Tensor) -> Tensor:
        ctx.save_for_backward(difference)
        return torch.cat([difference[rows].square().mean(1) for rows in row_slices(difference)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (difference,) = ctx.saved_tensors
        return once(difference * (grad.detach() * (2 / difference.shape[1])).unsqueeze(1))


class LogitMSE(nn.Module):
    """:func:`logit_mse` as a module; labels are taken, for a common call, and not used."""

    def __init__(self, *, centre: bool = False) -> None:
        super().__init__()
        self.centre = bool(centre)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        return logit_mse(student_logits, teacher_logits, centre=self.centre)

    def extra_repr(self) -> str:
        return f"centre={self.centre}"
