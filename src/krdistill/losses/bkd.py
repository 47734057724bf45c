"""Balanced knowledge distillation: the teacher's softened prediction, re-weighted by class rarity."""

from __future__ import annotations

from torch import Tensor, nn

from .._checks import at_least_float32, check_logits, check_number
from ..priors import CountsLike, effective_number_weights
from ..rectify.class_reweighting import reweight_classes
from .kd import softened_divergence


def bkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, class_weights: Tensor, temperature: float = 2.0
) -> Tensor:
    r"""How far the student is from the teacher's class-reweighted prediction.

    .. math:: T^2 \operatorname{KL}\big(q \,\|\, \operatorname{softmax}(z_s / T)\big), \qquad
        q_k \propto w_k \operatorname{softmax}(z_t / T)_k

    Args:
        student_logits: z_s, shape ``(B, K)``.
        teacher_logits: z_t, shape ``(B, K)``; no gradient flows to them.
        class_weights: w, shape ``(K,)``, above 0. They act on columns, so a factor common to all changes nothing.
        temperature: T > 0.

    Returns:
        Shape ``(B,)``; float32, or float64 where the logits are.

    Raises:
        ArgumentError: arguments that do not fit.

    With w = 1 / pi it is the label prior removed T times over, q = softmax((z_t - T log pi) / T): logit rectification
    with tau = T. The effective numbers' weights are near that where classes are small against 1 / (1 - beta).

    Source: Zhang et al., "Balanced Knowledge Distillation for Long-tailed Learning", 2021, arXiv 2104.10510.
    """
    check_logits("student_logits", student_logits)
    check_logits("teacher_logits", teacher_logits, rows=student_logits.shape[0], columns=student_logits.shape[1])
    T = check_number("temperature", temperature, above=0)
    target = reweight_classes(teacher_logits.detach(), class_weights, temperature=T)
    return softened_divergence(at_least_float32(student_logits), target, T, owned=True)


class BalancedDistillation(nn.Module):
    """:func:`bkd_loss` with effective-number weights; labels are taken, for a common call, and not used.

    Args:
        counts: training images per class, ``(K,)``.
        beta: of :func:`krdistill.priors.effective_number_weights`; 0 makes it plain distillation.
        temperature: T > 0.
    """

    class_weights: Tensor

    def __init__(self, counts: CountsLike, *, beta: float = 0.9999, temperature: float = 2.0) -> None:
        super().__init__()
        self.temperature = check_number("temperature", temperature, above=0)
        self.register_buffer("class_weights", effective_number_weights(counts, beta).float())

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        return bkd_loss(student_logits, teacher_logits, class_weights=self.class_weights, temperature=self.temperature)
