"""Cross-entropy, per sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import at_least_float32, check_labels, check_logits, check_number, like
from ._rows import once, piece_rows, row_slices, some


def cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    r"""Cross-entropy with the labels.

    .. math:: -\sum_k q_k \log \operatorname{softmax}(z)_k, \qquad q = (1 - s) \, e_y + s / K

    Args:
        logits: z, shape ``(B, K)``.
        labels: y, shape ``(B,)``.
        label_smoothing: s in [0, 1).

    Returns:
        Shape ``(B,)``; float32, or float64 where the logits are.

    Raises:
        ArgumentError: shapes or labels that do not fit.

    Logits of more than 1 MiB can be differentiated once only; a second time is refused.
    """
    return shifted_cross_entropy(logits, labels, None, label_smoothing)


def shifted_cross_entropy(logits: Tensor, labels: Tensor, offset: Tensor | None, label_smoothing: float) -> Tensor:
    """:func:`cross_entropy` of the logits plus an offset ``(K,)``, which is not checked."""
    labels = check_labels(labels, check_logits("logits", logits).shape[0], logits.shape[1])
    smoothing = check_number("label_smoothing", label_smoothing, at_least=0, below=1)
    z = at_least_float32(logits)
    return softmax_loss(z, labels, smoothing=smoothing, offset=None if offset is None else like(offset, z))


def softmax_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    smoothing: float | Tensor = 0.0,
    scale: float | Tensor = 1.0,
    offset: Tensor | None = None,
    margin: Tensor | None = None,
) -> Tensor:
    r"""The kernel of the losses that are a cross-entropy; arguments are not checked, and no gradient flows to them.

    Logits of more than a piece (:mod:`~krdistill.losses._rows`) keep one array of their size and cannot be
    differentiated twice; fewer are left to torch.

    .. math:: \operatorname{CE}\big(v \odot (z - \Delta \, e_y) + o, \; y\big)

    Args:
        logits: z, shape ``(B, K)``, float32 or float64.
        labels: y, shape ``(B,)``, int64.
        smoothing: of the labels, in [0, 1], a number, or one per row ``(B, 1)``.
        scale: v, a number, or one per row ``(B, 1)``.
        offset: o, shape ``(K,)``, or None for 0.
        margin: Delta, shape ``(B, 1)``, or None for 0.

    Returns:
        Shape ``(B,)``.
    """
    column = labels.unsqueeze(1)
    if piece_rows(logits) >= len(logits):
        z = _shifted(logits, column, scale, offset, margin)
        if isinstance(smoothing, Tensor):
            return _smoothed(z.log_softmax(1), column, smoothing).squeeze(1)
        return F.cross_entropy(z, labels, reduction="none", label_smoothing=smoothing)
    return _SoftmaxLoss.apply(logits, column, smoothing, scale, offset, margin)


def _shifted(z: Tensor, column: Tensor, scale: float | Tensor, offset: Tensor | None, margin: Tensor | None) -> Tensor:
    if margin is not None:
        z = z.scatter_add(1, column, -margin)
    if isinstance(scale, Tensor) or scale != 1:
        z = z * scale
    if offset is not None:
        z = z + offset
    return z


def _smoothed(log_p: Tensor, column: Tensor, smoothing: float | Tensor) -> Tensor:
    """The loss ``(B, 1)``."""
    loss = -log_p.gather(1, column)
    if isinstance(smoothing, Tensor) or smoothing > 0:
        loss = (1 - smoothing) * loss - smoothing * log_p.mean(1, keepdim=True)
    return loss


class _SoftmaxLoss(torch.autograd.Function):
    """Keeps the log-softmax alone; the backward pass makes one array of its size, where torch's own makes two."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        column: Tensor,
        smoothing: float | Tensor,
        scale: float | Tensor,
        offset: Tensor | None,
        margin: Tensor | None,
    ) -> Tensor:
        log_p, loss = torch.empty_like(logits), logits.new_empty(len(logits), 1)
        for rows in row_slices(logits):
            at = column[rows]
            z = _shifted(logits[rows], at, some(scale, rows), offset, None if margin is None else margin[rows])
            piece = torch.log_softmax(z, 1, out=log_p[rows])
            loss[rows] = _smoothed(piece, at, some(smoothing, rows))
        ctx.save_for_backward(log_p, column)
        ctx.smoothing, ctx.scale = smoothing, scale
        return loss.squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        log_p, column = ctx.saved_tensors
        pull = grad.detach().unsqueeze(1) * ctx.scale
        result = torch.empty_like(log_p)
        for rows in row_slices(log_p):
            piece = torch.exp(log_p[rows], out=result[rows]).mul_(pull[rows])
            if isinstance(ctx.smoothing, Tensor) or ctx.smoothing > 0:
                piece.sub_(pull[rows] * some(ctx.smoothing, rows) / log_p.shape[1])
        return once(result.scatter_add_(1, column, pull * (ctx.smoothing - 1))), None, None, None, None, None


class CrossEntropy(nn.Module):
    """:func:`cross_entropy` as a module."""

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = check_number("label_smoothing", label_smoothing, at_least=0, below=1)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def extra_repr(self) -> str:
        return f"label_smoothing={self.label_smoothing}"
