"""Coresets: a few real examples of every class."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_finite, check_integer, check_labels, check_matrix
from ..errors import DataError
from ..rng import generator


def random_rows(labels: Tensor, num_classes: int, ipc: int, *, seed: int = 0) -> Tensor:
    """So many rows of every class, by lot.

    A class with fewer rows gives all of them in turn until it has as many: every class counts alike in what is made.

    Args:
        labels: shape ``(N,)``, int64; every class has a row.
        num_classes: K.
        ipc: rows per class.
        seed: of the lots; a class's do not depend on the other classes, and with more rows the first stay.

    Returns:
        Row numbers, shape ``(K * ipc,)``, int64, class by class.

    Raises:
        ArgumentError: labels that do not fit, or ``ipc`` below 1.
        DataError: a class without a row, or fewer than ``ipc`` rows in every class.
    """
    members = _members(labels, num_classes, ipc)
    chosen = [rows[torch.randperm(len(rows), generator=generator(seed, "condense", k))] for k, rows in members]
    return torch.cat([in_turn(rows, ipc) for rows in chosen])


def herd(features: Tensor, labels: Tensor, num_classes: int, ipc: int) -> Tensor:
    r"""So many rows of every class whose mean feature is near the class's: herding.

    With :math:`\varphi(x)` the features scaled to length 1 and :math:`\mu` their mean over the class, one after the
    other

    .. math:: p_m = \arg\min_{x \text{ not chosen}} \Big\lVert \mu - \frac1m \Big( \varphi(x) + \sum_{j<m}
        \varphi(p_j) \Big) \Big\rVert

    The first m are the choice for m. A class with fewer rows gives all of them, in this order, in turn until it has as
    many.

    Args:
        features: shape ``(N, D)``, floating point, finite.
        labels: shape ``(N,)``, int64; every class has a row.
        num_classes: K.
        ipc: rows per class.

    Returns:
        Row numbers, shape ``(K * ipc,)``, int64, class by class, in the order of the choice; of equals the first row.

    Raises:
        ArgumentError: arguments that do not fit, or features that are not finite.
        DataError: a class without a row, or fewer than ``ipc`` rows in every class.

    Source: Welling, "Herding dynamical weights to learn", ICML 2009, as iCaRL (Rebuffi et al., CVPR 2017,
    arXiv 1611.07725, algorithm 4) uses it.
    Deviation: there the class mean is scaled to length 1 too, which bounds what the mean of the chosen can come to.
    """
    check_matrix("features", features, "(N, D)")
    check_finite("features", features)
    members = _members(labels, num_classes, ipc, rows=len(features))
    unit = torch.nn.functional.normalize(features.detach().cpu().double(), dim=1)
    return torch.cat([in_turn(rows[_herd(unit[rows], min(ipc, len(rows)))], ipc) for _, rows in members])


def _herd(unit: Tensor, number: int) -> Tensor:
    mean, total = unit.mean(0), torch.zeros_like(unit[0])
    left = torch.ones(len(unit), dtype=torch.bool)
    order = []
    for m in range(1, number + 1):
        distance = (mean - (total + unit) / m).square().sum(1)
        best = int(torch.where(left, distance, torch.inf).argmin())
        left[best] = False
        total += unit[best]
        order.append(best)
    return torch.tensor(order)


def in_turn(rows: Tensor, number: int) -> Tensor:
    """So many of the rows, again from the first where there are too few."""
    return rows[torch.arange(number) % len(rows)]


def _members(labels: Tensor, num_classes: int, ipc: int, rows: int | None = None) -> list[tuple[int, Tensor]]:
    ipc = check_integer("ipc", ipc, at_least=1)
    labels = check_labels(labels, len(labels) if rows is None else rows, num_classes).cpu()
    counts = torch.bincount(labels, minlength=num_classes)
    if not bool((counts > 0).all()):
        raise DataError(f"labels: no row of class {int((counts == 0).nonzero()[0])}; expected one of every class.")
    check_enough(counts, ipc)
    return [(k, (labels == k).nonzero().squeeze(1)) for k in range(num_classes)]


def check_enough(counts: Tensor, ipc: int) -> None:
    """Refuses to choose as many images as the largest class has not.

    Raises:
        DataError: fewer than ``ipc`` in every class.
    """
    if ipc > int(counts.max()):
        raise DataError(
            f"ipc {ipc:,}: the largest class has {int(counts.max()):,} images, so nothing would be left out. Take "
            "fewer per class, or method dm, which makes images."
        )
