"""Cross-entropy, per sample."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import at_least_float32, check_labels, check_logits, check_number


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
    """
    labels = check_labels(labels, check_logits("logits", logits).shape[0], logits.shape[1])
    smoothing = check_number("label_smoothing", label_smoothing, at_least=0, below=1)
    return F.cross_entropy(at_least_float32(logits), labels, reduction="none", label_smoothing=smoothing)


class CrossEntropy(nn.Module):
    """:func:`cross_entropy` as a module."""

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = check_number("label_smoothing", label_smoothing, at_least=0, below=1)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def extra_repr(self) -> str:
        return f"label_smoothing={self.label_smoothing}"
