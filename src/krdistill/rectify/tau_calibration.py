"""Calibration by class: how much of its prior every class has to lose for all to be answered alike."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_integer, check_labels, check_logits, check_number, check_per_class
from ..errors import DataError
from .prior_removal import _chunks


def per_class_tau(
    logits: Tensor, labels: Tensor, log_prior: Tensor, *, tolerance: float = 1e-3, max_steps: int = 100
) -> tuple[Tensor, float]:
    r"""A tau for every class, such that all classes are answered with the same confidence; our formulation.

    .. math::
        c_k(b) = \operatorname{mean}_{x \in \text{class } k} \operatorname{softmax}(z(x) - b)_k, \qquad
        c_1(b) = \dots = c_K(b), \qquad \tau_k = b_k / \log \pi_k

    :func:`auto_tau` brings the confidences as near to each other as one number can; this makes them equal. It is the
    limit of

    .. math:: b_k \leftarrow b_k + \log c_k(b)

    which exists, is unique up to a constant added to b, and is reached from every start, at a linear rate. Proof: with
    :math:`w = e^{-b}` the step is :math:`w_k \leftarrow w_k / c_k`, the harmonic mean over the class's images of
    :math:`\sum_j e^{z_j - z_k} w_j`. That is linear with positive coefficients, so a contraction of Hilbert's
    projective metric (Birkhoff), followed by a monotone and homogeneous mean, which never expands it. So no damping is
    needed, the spread of the log c_k falls in every step, and a search that is cut short is only less even.

    The constant in b is chosen so that, with :math:`\bar\tau` the slope of b over log pi (least squares),
    :math:`b - \bar\tau \log \pi` has mean 0. Classes without a sample are left out, their columns too, and get
    :math:`\bar\tau`. A class of few samples has a noisy tau.

    Args:
        logits: the teacher's z, shape ``(N, K)``, on images it was not fitted to, as for :func:`auto_tau`.
        labels: shape ``(N,)``.
        log_prior: log pi, shape ``(K,)``, finite, below 0.
        tolerance: stop where the largest and the smallest log c_k are so near.
        max_steps: or after so many steps.

    Returns:
        tau, shape ``(K,)``, float64, on the CPU, and its common part :math:`\bar\tau`, which is 0 for a uniform prior.

    Raises:
        ArgumentError: arguments that do not fit.
        DataError: fewer than two classes with a sample, or logits that are not finite.

    Cost: a softmax over all logits a step, in float64, in pieces of 16 MB, on the CPU.
    """
    K = check_logits("logits", logits).shape[1]
    labels = check_labels(labels.cpu() if isinstance(labels, Tensor) else labels, logits.shape[0], K)
    check_per_class("log_prior", log_prior, K, high=-1e-12, expected="the finite logarithm of a prior below 1")
    tolerance = check_number("tolerance", tolerance, above=0)
    max_steps = check_integer("max_steps", max_steps, at_least=0)
    number = torch.bincount(labels, minlength=K)
    present = number > 0
    if int(present.sum()) < 2:
        raise DataError(f"labels: expected samples of at least 2 classes, but got {int(present.sum())}.")
    prior = log_prior.detach().cpu().double()
    place = present.cumsum(0) - 1

    def log_confidence(b: Tensor) -> Tensor:
        total = torch.zeros(len(b), dtype=torch.float64)
        for z, y in _chunks(logits, labels):
            adjusted = (z if bool(present.all()) else z[:, present]) - b
            row = place[y]
            own = adjusted.gather(1, row.unsqueeze(1)).squeeze(1)
            total.index_add_(0, row, (own - adjusted.logsumexp(1)).exp())
        return (total / number[present]).clamp_min(1e-300).log()

    x = prior[present] - prior[present].mean()
    b = prior[present].clone()
    for _ in range(max_steps):
        step = log_confidence(b)
        if not bool(torch.isfinite(step).all()):
            raise DataError("logits: expected finite numbers, but got NaN or infinity.")
        if float(step.max() - step.min()) <= tolerance:
            break
        b += step - step.mean()
    spread = float(x.square().sum())
    common = float((x * (b - b.mean())).sum()) / spread if spread > 1e-12 else 0.0
    tau = torch.full((K,), common, dtype=torch.float64)
    tau[present] += (b - b.mean() - common * x) / prior[present]
    return tau, common
