"""What the flow of DLSA is fitted by: likelihood, purity and balance. All of them are minimised.

r is a row's posterior over the M clusters, ``softmax_k log p(x, k)``.

Source: Xu et al., ECCV 2022, arXiv 2208.02567.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import check_labels, check_matrix, check_number, check_per_class
from ..errors import ArgumentError


def mixture_log_joint(latent: Tensor, centres: Tensor) -> Tensor:
    r"""A mixture of M unit Gaussians with equal weights.

    .. math:: \log p(u, k) = -\tfrac12 \|u - \mu_k\|^2 - \tfrac D2 \log 2\pi - \log M

    Args:
        latent: u, shape ``(N, D)``.
        centres: mu, shape ``(M, D)``.

    Returns:
        Shape ``(N, M)``; its logsumexp over the clusters is the density's logarithm.

    Deviation: the authors leave out log M, which moves all rows alike; with it the density integrates to 1.
    """
    check_matrix("latent", latent, "(N, D)")
    check_matrix("centres", centres, "(M, D)", columns=latent.shape[1])
    M, D = centres.shape
    squares = latent.square().sum(1, keepdim=True) + centres.square().sum(1) - 2 * latent @ centres.T
    return -0.5 * squares - 0.5 * D * math.log(2 * math.pi) - math.log(M)


def likelihood_weights(counts: Tensor, *, power: float = 2.0) -> Tensor:
    r"""What a row of each class counts in the likelihood: the rare classes are what the flow has to describe.

    .. math:: v_k = \frac{(n_{\max} / n_k)^q}{\sum_j (n_{\max} / n_j)^q}

    Args:
        counts: n, shape ``(K,)``; a class without a row has weight 0.
        power: q >= 0; 0 weighs all classes alike.

    Returns:
        Shape ``(K,)``, of sum 1.

    Raises:
        ArgumentError: counts below 0, or none above 0.
    """
    power = check_number("power", power, at_least=0)
    check_per_class("counts", counts, len(counts), low=0, expected="counts >= 0")
    if not bool((counts > 0).any()):
        raise ArgumentError("counts: expected at least one class with a row, but all counts are 0.")
    # In logarithms, from the largest: a power of a large ratio is not finite.
    ratios = -power * counts.double().clamp_min(1e-300).log()
    v = torch.where(counts > 0, ratios, -math.inf).softmax(0)
    return v.to(counts.dtype)


def likelihood_loss(log_density: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    r"""Weighted negative log-likelihood.

    .. math:: L_{lh} = \operatorname{mean}_x \big( -v_{y(x)} \log p(x) \big)

    Args:
        log_density: log p(x), shape ``(N,)``.
        labels: y, shape ``(N,)``.
        weights: v of :func:`likelihood_weights`, shape ``(K,)``.

    Returns:
        A scalar.
    """
    labels = check_labels(labels, len(log_density), len(weights))
    return -(weights[labels] * log_density).mean()


def purity_loss(one: Tensor, other: Tensor) -> Tensor:
    r"""How much rows of different classes share their clusters.

    .. math:: L_{pur} = \operatorname{mean} \sum_k r_k(x^+) \log r_k(x^-)

    Row by row :math:`x^+` and :math:`x^-` are of different classes. The first posterior is not differentiated. Not
    bounded below: the more a cluster of the one excludes the other, the lower.

    Args:
        one: log r(x+), shape ``(B, M)``.
        other: log r(x-), shape ``(B, M)``.

    Returns:
        A scalar <= 0.
    """
    check_matrix("one", one, "(B, M)")
    check_matrix("other", other, "(B, M)", rows=one.shape[0], columns=one.shape[1])
    return (one.detach().exp() * other).sum(1).mean()


def balance_loss(shares: Tensor) -> Tensor:
    r"""How far the clusters are from equal size: the Kullback-Leibler divergence of their shares to 1 / M.

    .. math:: L_{bal} = \sum_k \bar p_k \log \bar p_k + \log M

    Args:
        shares: the running mean of the posteriors (:class:`RunningShares`), shape ``(M,)``, of sum 1.

    Returns:
        A scalar in [0, log M].
    """
    return torch.xlogy(shares, shares).sum() + math.log(len(shares))


class RunningShares:
    r"""The clusters' shares over the last batches, without the bias of a start at zero.

    .. math:: m_t = \rho\, m_{t-1} + (1 - \rho)\, \operatorname{mean}_x r(x), \qquad \bar p_t = m_t / (1 - \rho^t)

    Only the newest batch is differentiated.

    Args:
        decay: rho, in [0, 1); the authors' is 0.7.
    """

    def __init__(self, decay: float = 0.7) -> None:
        self.decay = check_number("decay", decay, at_least=0, below=1)
        self.steps = 0
        self.mean: Tensor | None = None

    def update(self, log_posterior: Tensor) -> Tensor:
        """Takes a batch's log r ``(B, M)``; gives the shares ``(M,)``."""
        new = (1 - self.decay) * log_posterior.exp().mean(0)
        mean = new if self.mean is None else self.decay * self.mean + new
        self.steps += 1
        self.mean = mean.detach()
        return mean / (1 - self.decay**self.steps)
