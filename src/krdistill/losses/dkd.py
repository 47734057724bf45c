"""Decoupled knowledge distillation (DKD): target class and non-target classes weighted apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .._checks import check_labels, check_logits, check_number
from ._rows import by_rows


def target_class_divergence(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float = 4.0
) -> Tensor:
    r"""TCKD: the divergence of "the label's class or another".

    .. math:: \operatorname{KL}\big((p_y, 1 - p_y) \,\|\, (q_y, 1 - q_y)\big), \qquad
        p = \operatorname{softmax}(z_t / T), \; q = \operatorname{softmax}(z_s / T)

    With :func:`non_target_class_divergence`, NCKD, it makes up the whole divergence:
    :math:`\operatorname{KL}(p \| q) = \text{TCKD} + (1 - p_y) \, \text{NCKD}`. Neither holds the factor T^2.

    Args:
        student_logits: z_s, shape ``(B, K)``.
        teacher_logits: z_t, shape ``(B, K)``; no gradient flows to them.
        labels: y, shape ``(B,)``.
        temperature: T > 0.

    Returns:
        Shape ``(B,)``; float32, or float64 where either logits are. In log-space: log(1 - p_y) is the log-sum-exp of
        the other classes, never the logarithm of a difference.

    Raises:
        ArgumentError: shapes or labels that do not fit, or a temperature that is not above 0.

    Source: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679.
    """
    return _decoupled(student_logits, teacher_logits, labels, temperature, 1.0, 0.0)


def non_target_class_divergence(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float = 4.0
) -> Tensor:
    r"""NCKD: the divergence among the other classes, the label's class left out.

    .. math:: \operatorname{KL}(\hat p \,\|\, \hat q), \qquad \hat p_k = p_k / (1 - p_y) \;\; (k \ne y)

    The label's column is taken out exactly, so that no logit, however large, leaks through a mask. With K = 2 one class
    remains: exactly 0, with zero gradient.

    Args, returns, errors and source as in :func:`target_class_divergence`.

    Deviation: the paper's code puts -1000 on the label's logit instead.
    """
    return _decoupled(student_logits, teacher_logits, labels, temperature, 0.0, 1.0)


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    r"""Decoupled knowledge distillation.

    .. math:: T^2 \, (\alpha \, \text{TCKD} + \beta \, \text{NCKD})

    Args:
        student_logits: z_s, shape ``(B, K)``.
        teacher_logits: z_t, shape ``(B, K)``; no gradient flows to them.
        labels: y, shape ``(B,)``.
        alpha: weight of :func:`target_class_divergence`, >= 0.
        beta: weight of :func:`non_target_class_divergence`, >= 0; the paper's depends on the pair of networks, 8 is
            that of ResNet32x4 to ResNet8x4 on CIFAR-100.
        temperature: T > 0.

    Returns:
        Shape ``(B,)``; float32, or float64 where either logits are, under autocast too.

    Raises:
        ArgumentError: arguments that do not fit.

    Source: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679.
    Deviation: the paper's code lets the weight of the whole grow linearly over the first 20 epochs; that belongs to
    the training, not to the loss.
    """
    alpha, beta = check_number("alpha", alpha, at_least=0), check_number("beta", beta, at_least=0)
    T = check_number("temperature", temperature, above=0)
    return _decoupled(student_logits, teacher_logits, labels, T, alpha * T**2, beta * T**2)


def _decoupled(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float, beta: float
) -> Tensor:
    """alpha TCKD + beta NCKD, ``(B,)``, with the gradient written out, so that one array is all that is kept.

    With d = q_y - p_y: TCKD's gradient to z_s / T is d on the label and -d q^ on the others, NCKD's is q^ - p^ on the
    others.
    """
    B, K = check_logits("student_logits", student).shape
    check_logits("teacher_logits", teacher, rows=B, columns=K)
    column = check_labels(labels, B, K).unsqueeze(1)
    T = check_number("temperature", temperature, above=0)
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    student, teacher = student.to(dtype), teacher.detach().to(dtype)

    def kernel(rows: slice) -> tuple[Tensor, Tensor]:
        y = column[rows]
        log_t, log_ty, log_tn = _split(teacher[rows] / T, y)
        log_s, log_sy, log_sn = _split(student[rows] / T, y)
        p_y, q_y = log_ty.exp(), log_sy.exp()
        target = p_y * (log_ty - log_sy) + log_tn.exp() * (log_tn - log_sn)
        p = log_t.exp()  # 0 on the label
        ratio = log_t.sub_(log_s).scatter_(1, y, 0.0)  # the label's is -inf less -inf
        others = ratio.mul_(p).sum(1)
        pull = alpha * (q_y - p_y)
        gradient = log_s.exp_().mul_(beta - pull).sub_(p, alpha=beta).scatter_(1, y, pull)
        return alpha * target.squeeze(1) + beta * others, gradient.div_(T)

    return by_rows(student, kernel)


def _split(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the other classes among themselves (-inf on the label), of the label, and of the others.

    ``z`` is overwritten and given back first, ``(B, K)``; the other two are ``(B, 1)``.
    """
    label = z.gather(1, y)
    z.scatter_(1, y, -math.inf)
    z.sub_(top := z.amax(1, keepdim=True))
    normaliser = z.logsumexp(1, keepdim=True)
    z.sub_(normaliser)
    rest = top + normaliser
    whole = torch.logaddexp(label, rest)
    return z, label - whole, rest - whole


class DKD(nn.Module):
    """:func:`dkd_loss` as a module."""

    def __init__(self, *, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> None:
        super().__init__()
        self.alpha = check_number("alpha", alpha, at_least=0)
        self.beta = check_number("beta", beta, at_least=0)
        self.temperature = check_number("temperature", temperature, above=0)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        return dkd_loss(
            student_logits, teacher_logits, labels, alpha=self.alpha, beta=self.beta, temperature=self.temperature
        )

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}"
