"""Knowledge distillation: the Kullback-Leibler divergence of softened predictions."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import at_least_float32, check_logits, check_number


def kd_divergence(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0) -> Tensor:
    r"""How far the student's softened prediction is from the teacher's.

    .. math:: T^2 \, \operatorname{KL}\big(\operatorname{softmax}(z_t / T) \,\|\, \operatorname{softmax}(z_s / T)\big)

    The factor T^2 keeps the gradient's size independent of T, to first order.

    Args:
        student_logits: z_s, shape ``(B, K)``.
        teacher_logits: z_t, shape ``(B, K)``; no gradient flows to them.
        temperature: T > 0.

    Returns:
        Shape ``(B,)``; float32, or float64 where either logits are, under autocast too. Log-space throughout: the
        logarithm of a softmax is never formed, so huge logits stay finite.

    Raises:
        ArgumentError: shapes that do not fit, or a temperature that is not above 0.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531.
    """
    check_logits("student_logits", student_logits)
    check_logits("teacher_logits", teacher_logits, rows=student_logits.shape[0], columns=student_logits.shape[1])
    T = check_number("temperature", temperature, above=0)
    log_s = F.log_softmax(at_least_float32(student_logits) / T, dim=1)
    log_t = F.log_softmax(at_least_float32(teacher_logits.detach()) / T, dim=1)
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1) * T**2


class KDDivergence(nn.Module):
    """:func:`kd_divergence` as a module; labels are taken, for a common call, and not used."""

    def __init__(self, *, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = check_number("temperature", temperature, above=0)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        return kd_divergence(student_logits, teacher_logits, temperature=self.temperature)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
