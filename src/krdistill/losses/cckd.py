"""CCKD: distillation between class-conditional predictions, the teacher's prior removed and the student's put in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import at_least_float32, check_logits, check_number, check_per_class, like
from ..rectify.prior_removal import remove_prior
from .kd import softened_divergence


def cckd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    teacher_log_prior: Tensor,
    student_log_prior: Tensor,
    temperature: float = 2.0,
) -> Tensor:
    r"""How far the student, with the training prior put in, is from the teacher, with its own prior removed.

    .. math:: T^2 \operatorname{KL}\big(\operatorname{softmax}((z_t - \log p_t) / T) \,\|\,
        \operatorname{softmax}((z_s + \log \pi) / T)\big)

    Args:
        student_logits: z_s, shape ``(B, K)``.
        teacher_logits: z_t, shape ``(B, K)``; no gradient flows to them.
        teacher_log_prior: log p_t, the teacher's mean prediction on balanced data, ``(K,)``, finite.
        student_log_prior: log pi, the training prior, ``(K,)``, finite; a constant added to it changes nothing.
        temperature: T > 0.

    Returns:
        Shape ``(B,)``; float32, or float64 where the logits are.

    Raises:
        ArgumentError: arguments that do not fit.

    Source: Li, Li, Ye, Zhan, ICML 2024, PMLR 235:28204, "Class-Conditional Knowledge Distillation" (CCKD), as a third
    party re-implemented it; the authors' code was not at hand.
    """
    check_logits("student_logits", student_logits)
    check_per_class("student_log_prior", student_log_prior, student_logits.shape[1])
    check_logits("teacher_logits", teacher_logits, rows=student_logits.shape[0], columns=student_logits.shape[1])
    T = check_number("temperature", temperature, above=0)
    student = at_least_float32(student_logits)
    target = remove_prior(teacher_logits.detach(), teacher_log_prior)
    return softened_divergence(student, target, T, offset=like(student_log_prior, student), owned=True)


class ClassConditionalDistillation(nn.Module):
    """:func:`cckd_loss` as a module; labels are taken, for a common call, and not used.

    Args:
        teacher_log_prior: shape ``(K,)``.
        student_log_prior: shape ``(K,)``.
        temperature: T > 0.
    """

    teacher_log_prior: Tensor
    student_log_prior: Tensor

    def __init__(self, teacher_log_prior: Tensor, student_log_prior: Tensor, *, temperature: float = 2.0) -> None:
        super().__init__()
        self.temperature = check_number("temperature", temperature, above=0)
        for name, value in (("teacher_log_prior", teacher_log_prior), ("student_log_prior", student_log_prior)):
            check_per_class(name, value, len(teacher_log_prior))
            self.register_buffer(name, value.detach().to(torch.float32, copy=True))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        return cckd_loss(
            student_logits,
            teacher_logits,
            teacher_log_prior=self.teacher_log_prior,
            student_log_prior=self.student_log_prior,
            temperature=self.temperature,
        )
