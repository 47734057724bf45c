"""Knowledge distillation: the Kullback-Leibler divergence of softened predictions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import at_least_float32, check_logits, check_number
from ._rows import by_rows


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
    s, t = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    return softened_divergence(s, t, T)


def softened_divergence(
    student: Tensor, target: Tensor, temperature: float, *, offset: Tensor | None = None, owned: bool = False
) -> Tensor:
    r"""The kernel of :func:`kd_divergence`, for targets that were computed for it; arguments are not checked.

    .. math:: T^2 \, \operatorname{KL}\big(\operatorname{softmax}(t / T) \,\|\, \operatorname{softmax}((s + o) / T)\big)

    One array of the size of the logits is kept for the backward pass, which makes one more.

    Args:
        student: s, shape ``(B, K)``, float32 or float64.
        target: t, shape ``(B, K)``, float32 or float64, without a graph.
        temperature: T > 0.
        offset: o, shape ``(K,)``, added to the student's logits, or None.
        owned: whether ``target`` is a temporary of the caller's that may be overwritten.
    """
    dtype = torch.promote_types(student.dtype, target.dtype)
    student, target = student.to(dtype), target.to(dtype)

    def kernel(rows: slice) -> tuple[Tensor, Tensor]:
        log_t = (target[rows] / temperature).log_softmax(1)
        s = student[rows] / temperature if offset is None else (student[rows] + offset).div_(temperature)
        log_s = s.log_softmax(1)
        p_t = log_t.exp()
        return log_t.sub_(log_s).mul_(p_t).sum(1).mul_(temperature**2), log_s.exp_().sub_(p_t).mul_(temperature)

    return by_rows(student, kernel, out=target if owned else None)


class KDDivergence(nn.Module):
    """:func:`kd_divergence` as a module; labels are taken, for a common call, and not used."""

    def __init__(self, *, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = check_number("temperature", temperature, above=0)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        return kd_divergence(student_logits, teacher_logits, temperature=self.temperature)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
