"""What is counted in a division of rows into clusters: their sizes, purity, and how long-tailed they are inside."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_integer, check_labels, check_matrix
from ..errors import ArgumentError


def cluster_counts(clusters: Tensor, labels: Tensor, num_clusters: int, num_classes: int) -> Tensor:
    """Rows of every class in every cluster.

    Args:
        clusters: each row's, shape ``(N,)``, in 0..M-1.
        labels: each row's class, shape ``(N,)``.
        num_clusters: M.
        num_classes: K.

    Returns:
        Shape ``(M, K)``, int64, on the device of ``labels``.
    """
    M, K = (check_integer(n, v, at_least=1) for n, v in (("num_clusters", num_clusters), ("num_classes", num_classes)))
    labels = check_labels(labels, len(labels), K)
    clusters = check_labels(clusters, len(labels), M).to(labels.device)
    return torch.bincount(clusters * K + labels, minlength=M * K).view(M, K)


def class_distributions(counts: Tensor) -> Tensor:
    """The class distribution of every cluster; that of all rows for a cluster that is empty.

    Args:
        counts: of :func:`cluster_counts`, shape ``(M, K)``.

    Returns:
        P, shape ``(M, K)``, rows of sum 1, float64.
    """
    rows = torch.where(counts.sum(1, keepdim=True) > 0, counts, counts.sum(0)).double()
    return rows / rows.sum(1, keepdim=True)


def others_distributions(counts: Tensor, clusters: Tensor, labels: Tensor) -> Tensor:
    """The class distribution of every row's cluster without the row itself; that of all rows where it is alone.

    Args:
        counts: of :func:`cluster_counts` of rows with these, shape ``(M, K)``.
        clusters, labels: of some of those rows, shape ``(N,)``.

    Returns:
        Shape ``(N, K)``, rows of sum 1, float64.
    """
    own = torch.nn.functional.one_hot(labels, counts.shape[1])
    rows = counts[clusters] - own
    rows = torch.where(rows.sum(1, keepdim=True) > 0, rows, counts.sum(0)).double()
    return rows / rows.sum(1, keepdim=True)


def purity(counts: Tensor) -> Tensor:
    """The share of the commonest class in every cluster ``(M,)``, float64; 0 for an empty one."""
    return counts.max(1).values.double() / counts.sum(1).clamp_min(1)


def pure_clusters(counts: Tensor, *, above: float = 0.7, larger_than: int = 10) -> int:
    """How many clusters are purer than ``above`` and have more than ``larger_than`` rows; the authors choose by it."""
    return int(((purity(counts) > above) & (counts.sum(1) > larger_than)).sum())


def size_entropy(sizes: Tensor) -> float:
    """How equal the clusters' sizes ``(M,)`` are: their entropy over log M; 1 for equal ones, 0 where one has all."""
    if len(sizes) < 2:
        return 1.0
    shares = sizes.double() / sizes.sum()
    return float(-torch.xlogy(shares, shares).sum() / torch.tensor(float(len(sizes))).double().log())


def head_tail_ratio(counts: Tensor, head: Tensor, tail: Tensor) -> float:
    r"""How many rows of head classes stand beside one of a tail class, in its cluster.

    .. math:: \frac{\sum_{c: t_c > 0} h_c}{\sum_c t_c}

    the mean over the tail's rows of their cluster's ratio h : t. Of an undivided set it is the set's own.

    Args:
        counts: of :func:`cluster_counts`, shape ``(M, K)``.
        head: bool, shape ``(K,)``: the classes that count as h.
        tail: bool, shape ``(K,)``: those that count as t.

    Raises:
        ArgumentError: no row of a tail class, or masks of another length.
    """
    check_matrix("counts", counts.double(), "(M, K)", columns=len(head))
    if head.shape != tail.shape or head.dtype != torch.bool or tail.dtype != torch.bool:
        raise ArgumentError("head, tail: expected two bool tensors of shape (K,).")
    h, t = counts[:, head].sum(1), counts[:, tail].sum(1)
    if not bool(t.any()):
        raise ArgumentError("tail: expected classes that have a row; none has.")
    return float(h[t > 0].sum() / t.sum())
