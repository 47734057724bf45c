"""Logit adjustment: the class prior in the training loss, or taken out of the logits afterwards."""

from __future__ import annotations

from torch import Tensor

from .._checks import at_least_float32, check_logits, check_number, check_per_class, like
from ..priors import CountsLike
from ..rectify.prior_removal import remove_prior
from ..sampling import Sampling
from .balanced_softmax import DrawnPrior
from .cross_entropy import shifted_cross_entropy


def logit_adjusted_loss(
    logits: Tensor, labels: Tensor, log_prior: Tensor, *, tau: float = 1.0, label_smoothing: float = 0.0
) -> Tensor:
    r"""Cross-entropy of logits that carry the prior; the plain logits then are a balanced classifier at test time.

    .. math:: \operatorname{CE}(z + \tau \log \pi, y)

    With tau = 1 it is :func:`~krdistill.losses.balanced_softmax`, with tau = 0 cross-entropy. At test time the logits
    are used as they are: :func:`adjust_logits` is the other way to the same end, not a second step.

    Args:
        logits: z, shape ``(B, K)``.
        labels: y, shape ``(B,)``.
        log_prior: log pi, shape ``(K,)``, finite; log counts give the same loss.
        tau: how much of the prior, >= 0.
        label_smoothing: in [0, 1).

    Returns:
        Shape ``(B,)``; float32, or float64 where the logits are.

    Raises:
        ArgumentError: shapes or labels that do not fit, a prior that is not finite, or a negative tau.

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, arXiv 2007.07314.
    """
    tau = check_number("tau", tau, at_least=0)
    check_logits("logits", logits)
    check_per_class("log_prior", log_prior, logits.shape[1], expected="a finite log prior (no class without images)")
    return shifted_cross_entropy(logits, labels, tau * like(log_prior, at_least_float32(logits[:0])), label_smoothing)


def adjust_logits(logits: Tensor, log_prior: Tensor, *, tau: float = 1.0) -> Tensor:
    r"""Post-hoc logit adjustment, for a network that was trained with cross-entropy.

    .. math:: \tilde z_k = z_k - \tau \log \pi_k

    The same as :func:`krdistill.rectify.remove_prior`, whose arguments, result and errors it has.

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, arXiv 2007.07314.
    """
    return remove_prior(logits, log_prior, tau)


class LogitAdjustedLoss(DrawnPrior):
    """:func:`logit_adjusted_loss` as a module.

    Args:
        counts: training images per class, ``(K,)``, every one at least 1.
        tau: how much of the prior, >= 0.
        label_smoothing: in [0, 1).
        sampling: how the training images are drawn, as of :class:`~krdistill.losses.BalancedSoftmax`.
    """

    def __init__(
        self, counts: CountsLike, *, tau: float = 1.0, label_smoothing: float = 0.0, sampling: Sampling = "instance"
    ) -> None:
        super().__init__(counts, sampling)
        self.tau = check_number("tau", tau, at_least=0)
        self.label_smoothing = check_number("label_smoothing", label_smoothing, at_least=0, below=1)

    def forward(self, logits: Tensor, labels: Tensor, progress: float = 0.0) -> Tensor:
        log_prior = self.drawn_log_prior(progress)
        return logit_adjusted_loss(logits, labels, log_prior, tau=self.tau, label_smoothing=self.label_smoothing)

    def extra_repr(self) -> str:
        drawn = "" if self.sampling == "instance" else f", sampling={self.sampling!r}"
        return f"num_classes={len(self.log_prior)}, tau={self.tau}, label_smoothing={self.label_smoothing}{drawn}"
