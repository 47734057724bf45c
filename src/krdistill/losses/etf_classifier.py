"""A classifier that is fixed from the start: balanced anchors instead of learned weights, and the loss that fits it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import at_least_float32, check_integer, check_labels, check_logits, check_matrix, check_number, like
from ..anchors import balanced_anchors
from ..errors import ArgumentError
from ..rectify.anchor_rectification import unit_rows


def dot_regression_loss(features: Tensor, labels: Tensor, anchors: Tensor, *, length: float = 1.0) -> Tensor:
    r"""Dot-regression loss: the feature's part along its class's anchor is pulled to a fixed length.

    .. math:: \frac{\big(h^\top m_y - L\big)^2}{2 L}, \qquad L = \sqrt{E_W E_H}

    There is no push from the other classes, which on long-tailed data comes from the head classes mostly.

    Args:
        features: h, shape ``(B, D)``; normalised in the paper: :meth:`ETFHead.normalise`.
        labels: y, shape ``(B,)``.
        anchors: m, shape ``(K, D)``, row k for class k; no gradient flows to them.
        length: L > 0, the anchors' length times the features'.

    Returns:
        Shape ``(B,)``; float32, or float64 where the features are.

    Raises:
        ArgumentError: shapes or labels that do not fit, or a length that is not above 0.

    Source: Yang et al., "Inducing Neural Collapse in Imbalanced Learning: Do We Really Need a Learnable Classifier at
    the End of Deep Neural Network?", NeurIPS 2022, arXiv 2203.09081.
    """
    check_matrix("features", features, "(B, D)")
    check_matrix("anchors", anchors, "(K, D)", columns=features.shape[1])
    labels = check_labels(labels, features.shape[0], anchors.shape[0])
    length = check_number("length", length, above=0)
    h = at_least_float32(features)
    dot = (h * like(anchors.detach(), h)[labels]).sum(1)
    return (dot - length).square() / (2 * length)


class DotRegression(nn.Module):
    """:func:`dot_regression_loss` on the logits of an :class:`ETFHead`, which hold the dot products.

    Args:
        scale: the head's.
        length: as in :func:`dot_regression_loss`; 1 for a head's unit features and anchors.
    """

    def __init__(self, *, scale: float = 30.0, length: float = 1.0) -> None:
        super().__init__()
        self.scale = check_number("scale", scale, above=0)
        self.length = check_number("length", length, above=0)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        labels = check_labels(labels, check_logits("logits", logits).shape[0], logits.shape[1])
        dot = at_least_float32(logits).gather(1, labels.unsqueeze(1)).squeeze(1) / self.scale
        return (dot - self.length).square() / (2 * self.length)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, length={self.length}"


class ETFHead(nn.Linear):
    r"""A head whose class directions are balanced anchors that never change.

    .. math:: z_k = s \, h^\top c_k, \qquad h = \operatorname{norm}(\operatorname{BatchNorm}(f))

    It takes the place of a network's last linear layer; the anchors are its ``weight``, a buffer. Only the batch
    normalisation is learned. The prediction is the nearest anchor.

    Args:
        feature_dim: D.
        num_classes: K >= 2.
        seed: of the anchors' orientation; the global generator is not touched.
        scale: s > 0; the prediction does not depend on it, a softmax over the logits does.

    Raises:
        ArgumentError: sizes out of range.

    Source: Yang et al., NeurIPS 2022, arXiv 2203.09081.
    Deviation: where K - 1 > D there is no simplex, and the most even arrangement there is takes its place
    (:func:`krdistill.anchors.balanced_anchors`). The scale is ours: the paper needs the argmax alone.
    """

    weight: Tensor

    def __init__(self, feature_dim: int, num_classes: int, *, seed: int = 0, scale: float = 30.0) -> None:
        feature_dim = check_integer("feature_dim", feature_dim, at_least=1)
        num_classes = check_integer("num_classes", num_classes, at_least=2)
        # On the meta device the parent draws no random weight; the anchors take its place.
        super().__init__(feature_dim, num_classes, bias=False, device="meta")
        del self.weight
        self.register_buffer("weight", balanced_anchors(num_classes, feature_dim, seed=seed))
        self.scale = check_number("scale", scale, above=0)
        self.norm = nn.BatchNorm1d(feature_dim)

    def normalise(self, features: Tensor) -> Tensor:
        """h ``(B, D)``, unit rows, of features f ``(B, D)``."""
        check_matrix("features", features, "(B, D)", columns=self.in_features)
        if self.norm.training and len(features) < 2:
            raise ArgumentError(
                "features: expected at least 2 rows in training, as the head normalises over the batch, but got "
                f"{len(features)}. Use a larger batch, or eval()."
            )
        return unit_rows(self.norm(features.to(self.weight.dtype)))

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(B, K)`` of features ``(B, D)``."""
        return self.scale * F.linear(self.normalise(features), self.weight)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scale={self.scale}"
