"""Prior removal: what the class frequencies put into the teacher's logits is taken out again."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from .._checks import at_least_float32, check_labels, check_logits, check_number, check_per_class, like
from ..errors import ArgumentError, DataError

_CHUNK_VALUES = 1 << 21  # float64 values worked on at once: 16 MB
_GRID = 25


def remove_prior(logits: Tensor, log_prior: Tensor, tau: float = 1.0) -> Tensor:
    r"""Logits without the class prior.

    .. math:: \tilde z_k = z_k - \tau \log \pi_k

    Args:
        logits: z, shape ``(B, K)``, floating point.
        log_prior: log pi, shape ``(K,)``, finite; the prior need not sum to one.
        tau: how much of it; 0 gives the logits back, a negative value puts the prior in.

    Returns:
        Shape ``(B, K)``, on the device of ``logits``; float32, or float64 where the logits are.

    Raises:
        ArgumentError: shapes that do not fit, or a prior that is not finite.

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, arXiv 2007.07314 (post-hoc form).
    """
    check_logits("logits", logits)
    check_per_class("log_prior", log_prior, logits.shape[1], expected="a finite log prior (no class without images)")
    tau = check_number("tau", tau)
    z = at_least_float32(logits)
    return z - tau * like(log_prior, z)


def auto_tau(logits: Tensor, labels: Tensor, log_prior: Tensor, *, bounds: tuple[float, float] = (0.0, 3.0)) -> float:
    r"""How much of the prior to remove so that every class is answered with the same confidence.

    .. math::
        \tau^* = \arg\min_\tau \operatorname{std}_k c_k(\tau), \qquad
        c_k(\tau) = \operatorname{mean}_{x \in \text{class } k} \operatorname{softmax}(z(x) - \tau \log \pi)_k

    A grid of 25 values finds the valley, Brent's bounded search its bottom. Classes without a sample are left out.

    Args:
        logits: the teacher's, shape ``(N, K)``, on images it was not fitted to: a validation part, or strongly
            augmented training images. On its own training images it is sure of everything, and the rule says nothing.
        labels: shape ``(N,)``.
        log_prior: shape ``(K,)``, finite.
        bounds: lowest and highest tau considered.

    Returns:
        tau within ``bounds``, to about 1e-4; the lowest of them where tau makes no difference (a uniform prior).

    Raises:
        ArgumentError: shapes that do not fit, or bounds that are no interval.
        DataError: fewer than two classes with a sample, or logits that are not finite.

    Cost: about 40 softmaxes over all logits, in float64, in pieces of 16 MB, on the CPU.

    Source: Jiang et al., "Rectifying Soft-Label Entangled Bias in Long-Tailed Dataset Distillation", NeurIPS 2025,
    arXiv 2511.17914 (ADSA): this is its rule, with the same confidence, spread and prior.
    Deviation: there the images held out are the distilled ones (as in :func:`krdistill.condense.soft_labels`), here
    the caller says which; the interval and the search are ours, since those of the paper are not known to us.
    """
    K = check_logits("logits", logits).shape[1]
    labels = check_labels(labels.cpu() if isinstance(labels, Tensor) else labels, logits.shape[0], K)
    check_per_class("log_prior", log_prior, K, expected="a finite log prior (no class without images)")
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise ArgumentError(f"bounds: expected (lowest, highest), but got {bounds!r}.")
    low = check_number("bounds[0]", bounds[0])
    high = check_number("bounds[1]", bounds[1], above=low)
    if len(labels.unique()) < 2:
        raise DataError(f"labels: expected samples of at least 2 classes, but got {len(labels.unique())}.")
    prior = log_prior.detach().cpu().double()

    def spread(taus: Tensor) -> Tensor:
        """Standard deviation over classes of the class-mean confidence, at each tau."""
        total = torch.zeros(K, len(taus), dtype=torch.float64)
        for z, y in _chunks(logits, labels):
            column = y.unsqueeze(1)
            for t, adjustment in enumerate(torch.outer(taus, prior)):
                adjusted = z - adjustment
                confidence = (adjusted.gather(1, column).squeeze(1) - adjusted.logsumexp(1)).exp()
                total[:, t].index_add_(0, y, confidence)
        number = torch.bincount(labels, minlength=K)
        return (total[number > 0] / number[number > 0].unsqueeze(1)).std(dim=0, correction=0)

    grid = torch.linspace(low, high, _GRID, dtype=torch.float64)
    values = spread(grid)
    if not bool(torch.isfinite(values).all()):
        raise DataError("logits: expected finite numbers, but got NaN or infinity.")
    if float(values.max() - values.min()) < 1e-12:
        return low
    best = int(values.argmin())
    found = minimize_scalar(
        lambda tau: float(spread(torch.tensor([tau], dtype=torch.float64))),
        bounds=(float(grid[max(best - 1, 0)]), float(grid[min(best + 1, _GRID - 1)])),
        method="bounded",
        options={"xatol": 1e-5 * (high - low)},
    )
    return float(found.x) if found.fun < float(values[best]) else float(grid[best])


def mean_prediction(logits: Tensor, labels: Tensor) -> Tensor:
    r"""The teacher's own prior: its mean prediction on class-balanced data.

    .. math:: m = \frac{1}{|P|} \sum_{k \in P} \operatorname{mean}_{x \in \text{class } k} \operatorname{softmax}(z(x))

    P are the classes with a sample. A teacher without bias gives 1 / K to every class. On training images that the
    teacher has learnt by heart m is nearly uniform, whatever its bias: use held-out images or augmented views.

    Args:
        logits: shape ``(N, K)``.
        labels: shape ``(N,)``; they balance the mean and nothing else.

    Returns:
        Shape ``(K,)``, float64, on the CPU, non-negative, sums to one. Its logarithm is a prior for
        :func:`remove_prior`.

    Raises:
        ArgumentError: shapes that do not fit.
        DataError: no sample, or logits that are not finite.

    Source: the teacher's prior in Class-Conditional Knowledge Distillation (CCKD; Li, Li, Ye, Zhan, ICML 2024).
    Deviation: there the data are balanced by construction, here by weighting.
    """
    K = check_logits("logits", logits).shape[1]
    labels = check_labels(labels.cpu() if isinstance(labels, Tensor) else labels, logits.shape[0], K)
    if len(labels) == 0:
        raise DataError("logits: expected at least one sample, but got none.")
    number = torch.bincount(labels, minlength=K)
    weight = 1.0 / (number.double() * int((number > 0).sum()))
    mean = torch.zeros(K, dtype=torch.float64)
    for z, y in _chunks(logits, labels):
        mean += weight[y] @ z.softmax(1)
    if not bool(torch.isfinite(mean).all()):
        raise DataError("logits: expected finite numbers, but got NaN or infinity.")
    return mean


def _chunks(logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of the samples, the logits as float64 on the CPU."""
    rows = max(1, _CHUNK_VALUES // logits.shape[1])
    for start in range(0, len(labels), rows):
        yield logits[start : start + rows].detach().cpu().double(), labels[start : start + rows]
