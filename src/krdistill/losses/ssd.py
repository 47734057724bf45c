"""SSD: a teacher whose logits were re-scaled class by class teaches a soft head; a hard head learns the labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import at_least_float32, check_logits, check_matrix, check_number, check_per_class, describe, like
from ..errors import ArgumentError
from .cross_entropy import cross_entropy
from .kd import softened_divergence


class AuxiliaryHead(nn.Module):
    """A linear head beside the network's own, used in training alone: cross-entropy of its logits.

    Args:
        feature_dim: D.
        num_classes: K.

    Weights are drawn from the global generator, as :class:`torch.nn.Linear` draws them: fork and seed it around.
    """

    def __init__(self, feature_dim: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(feature_dim, num_classes)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Features ``(B, D)`` and labels ``(B,)`` to ``(B,)``."""
        check_matrix("features", features, "(B, D)", columns=self.linear.in_features)
        return cross_entropy(self.linear(features.to(self.linear.weight.dtype)), labels)


class ScaledTeacherDistillation(nn.Module):
    r"""Distillation from a teacher whose logits are multiplied by one learnt scale per class.

    .. math:: T^2 \operatorname{KL}\big(\operatorname{softmax}(s \odot z_t / T) \,\|\,
        \operatorname{softmax}(z_s / T)\big)

    Args:
        scales: s, shape ``(K,)``, finite: those of a teacher's balanced second stage (LWS).
        temperature: T > 0.

    Source: Li, Wang, Wu, "Self Supervision to Distillation for Long-Tailed Visual Recognition", ICCV 2021, arXiv
    2109.04075.
    """

    scales: Tensor

    def __init__(self, scales: Tensor, *, temperature: float = 2.0) -> None:
        super().__init__()
        if not isinstance(scales, Tensor) or scales.ndim != 1:
            raise ArgumentError(f"scales: expected shape (K,), but got {describe(scales)}.")
        check_per_class("scales", scales, len(scales))
        self.register_buffer("scales", scales.detach().to(torch.float32, copy=True))
        self.temperature = check_number("temperature", temperature, above=0)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        check_logits("student_logits", student_logits)
        check_logits("teacher_logits", teacher_logits, rows=student_logits.shape[0], columns=student_logits.shape[1])
        told = at_least_float32(teacher_logits.detach())
        target = told * like(self.scales, told)
        return softened_divergence(at_least_float32(student_logits), target, self.temperature, owned=True)
