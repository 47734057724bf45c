"""Tail weighting: weights by class for the terms of a distillation, which leave the size of the loss as it is."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .._checks import check_choice
from ..errors import ArgumentError
from ..priors import ClassGroups, ClassPrior, CountsLike
from .krdistill import group_sample_weights

Weighting = Literal["none", "inverse-sqrt", "effective-number", "group"]

WEIGHTINGS = ("none", "inverse-sqrt", "effective-number", "group")


def tail_weights(
    counts: CountsLike, weighting: Weighting, *, groups: ClassGroups | None = None, beta: float = 0.9999
) -> Tensor | None:
    r"""Class weights that rise towards the tail, with mean 1 over the training images.

    .. math:: w_k \propto
        \begin{cases}
        n_k^{-1/2} & \text{inverse-sqrt} \\
        (1 - \beta) / (1 - \beta^{n_k}) & \text{effective-number} \\
        1 / N_{g(k)} & \text{group}
        \end{cases} \qquad \frac{1}{N} \sum_k n_k w_k = 1

    N_g are the training images of group g. Over an epoch in which every image comes once the mean weight is 1, so the
    term keeps its size; equal counts give every class the weight 1, but for ``group``, whose groups may differ in size.

    Args:
        counts: images per class n_k, ``(K,)``, every one at least 1.
        weighting: which of them; ``none`` is no weight at all.
        groups: the classes' groups, for ``group``.
        beta: in [0, 1), for ``effective-number``.

    Returns:
        Shape ``(K,)``, float64, on the CPU; None for ``none``.

    Raises:
        ArgumentError, DataError: arguments that do not fit.

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, arXiv 1901.05555
    (``effective-number``).
    Deviation: the mean over the images is 1, not that over the classes. The others are our formulation.
    """
    check_choice("weighting", weighting, WEIGHTINGS)
    prior = ClassPrior.from_counts(counts)
    if weighting == "none":
        return None
    if weighting == "group":
        if groups is None:
            raise ArgumentError("groups: weighting='group' needs the classes' groups, but got None.")
        return group_sample_weights(prior.counts, groups)
    n = prior.counts.double()
    weights = n.rsqrt() if weighting == "inverse-sqrt" else prior.effective_number_weights(beta)
    return weights * (n.sum() / (n * weights).sum())
