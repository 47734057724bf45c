"""Class reweighting: the teacher's probabilities are multiplied by class weights and renormalised."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import at_least_float32, check_logits, check_number, check_per_class, like


def reweight_classes(teacher_logits: Tensor, weights: Tensor, *, temperature: float) -> Tensor:
    r"""Logits whose softened prediction is the teacher's, reweighted by class.

    .. math:: \tilde z_k = z_k + T \log w_k \quad\Rightarrow\quad
        \operatorname{softmax}(\tilde z / T)_k =
        \frac{w_k \operatorname{softmax}(z / T)_k}{\sum_j w_j \operatorname{softmax}(z / T)_j}

    A common factor of the weights makes no difference to that prediction, and equal weights none at all. With T = 1
    and w = 1 / pi it is :func:`remove_prior` with tau = 1.

    Args:
        teacher_logits: z, shape ``(B, K)``.
        weights: w, shape ``(K,)``, finite, > 0; the paper's are
            :func:`krdistill.priors.effective_number_weights`.
        temperature: T > 0, the one that the logits are softened with afterwards.

    Returns:
        Shape ``(B, K)``, on the device of ``teacher_logits``; float32, or float64 where the logits are.

    Raises:
        ArgumentError: shapes that do not fit, a weight that is not above 0 (its class could never be answered, and
            the divergence from the student would be infinite), or a temperature that is not above 0.

    Source: Zhang et al., "Balanced Knowledge Distillation for Long-tailed Learning", 2021, arXiv 2104.10510.
    """
    K = check_logits("teacher_logits", teacher_logits).shape[1]
    expected = "finite weights > 0"
    check_per_class("weights", weights, K, low=0, expected=expected)
    weights = at_least_float32(weights)
    check_per_class("weights", weights, K, low=torch.finfo(torch.float32).tiny, expected=expected)
    T = check_number("temperature", temperature, above=0)
    z = at_least_float32(teacher_logits)
    return z + T * like(weights.log(), z)
