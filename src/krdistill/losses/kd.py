"""Knowledge distillation: the Kullback-Leibler divergence of softened predictions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
    s, t = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    return softened_divergence(s, t, T)


def softened_divergence(
    student: Tensor, target: Tensor, temperature: float, *, offset: Tensor | None = None, owned: bool = False
) -> Tensor:
    r"""The kernel of :func:`kd_divergence`, for targets that were computed for it; arguments are not checked.

    .. math:: T^2 \, \operatorname{KL}\big(\operatorname{softmax}(t / T) \,\|\, \operatorname{softmax}((s + o) / T)\big)

    At most three arrays of the size of the logits are alive at once, in the forward and in the backward pass.

    Args:
        student: s, shape ``(B, K)``, float32 or float64.
        target: t, shape ``(B, K)``, float32 or float64, without a graph.
        temperature: T > 0.
        offset: o, shape ``(K,)``, added to the student's logits, or None.
        owned: whether ``target`` is a temporary of the caller's that may be overwritten.
    """
    dtype = torch.promote_types(student.dtype, target.dtype)
    return _SoftenedDivergence.apply(student.to(dtype), target.to(dtype), temperature, offset, owned)


class _SoftenedDivergence(torch.autograd.Function):
    """Keeps the two predictions alone; the gradient is their difference, times T."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, target: Tensor, temperature: float, offset: Tensor | None, owned: bool
    ) -> Tensor:
        log_t = target.div_(temperature) if owned else target / temperature
        _normalise_(log_t)
        log_s = student / temperature if offset is None else (student + offset).div_(temperature)
        _normalise_(log_s)
        p_t = log_t.exp()
        loss = log_t.sub_(log_s).mul_(p_t).sum(1)
        ctx.save_for_backward(log_s.exp_(), p_t)
        ctx.temperature = temperature
        return loss.mul_(temperature**2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        p_s, p_t = ctx.saved_tensors
        return (p_s - p_t).mul_((grad * ctx.temperature).unsqueeze(1)), None, None, None, None


def _normalise_(z: Tensor) -> None:
    """Log-softmax in place. The largest is taken off first: next to huge logits, the normaliser would be rounded."""
    z.sub_(z.amax(1, keepdim=True))
    z.sub_(z.logsumexp(1, keepdim=True))


class KDDivergence(nn.Module):
    """:func:`kd_divergence` as a module; labels are taken, for a common call, and not used."""

    def __init__(self, *, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = check_number("temperature", temperature, above=0)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        return kd_divergence(student_logits, teacher_logits, temperature=self.temperature)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
