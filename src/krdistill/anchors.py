"""Balanced class anchors: K unit vectors that give every class the same room on the sphere.

Which arrangement, and why it is the balanced one:

======================= ============================================ ===========================================
classes                 arrangement                                  largest pairwise cosine
======================= ============================================ ===========================================
K <= D + 1              simplex ETF                                  -1 / (K - 1), the least possible
D + 1 < K <= 2 D        K - D simplices in orthogonal subspaces      0, the least possible
K > 2 D                 minimum of the uniformity loss, by descent   small, found numerically
======================= ============================================ ===========================================
"""

from __future__ import annotations

import math
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from .errors import ArgumentError, DataError

_STEP_BUDGET = 1.2e12  # floating-point operations of one descent: a quarter of a minute on one core
_MIN_STEPS, _MAX_STEPS = 12, 300
_STARTS, _START_BUDGET = 32, 4_000_000  # alignments tried, fewer where K * K is large
_GAIN = 1e-9  # a smaller gain in mean cosine is rounding


def _check_sizes(num_classes: Any, dim: Any) -> tuple[int, int]:
    for name, value, least in (("num_classes", num_classes, 2), ("dim", dim, 1)):
        if isinstance(value, bool | Tensor) or not hasattr(value, "__index__") or value < least:
            raise ArgumentError(f"{name}: expected a whole number >= {least}, but got {value!r}.")
    return int(num_classes), int(dim)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise ArgumentError(f"dtype: expected torch.float32 or torch.float64, but got {dtype!r}.")


def _generator(seed: Any) -> torch.Generator:
    if isinstance(seed, bool | Tensor) or not hasattr(seed, "__index__") or not 0 <= seed < 2**63:
        raise ArgumentError(f"seed: expected a whole number in [0, 2**63), but got {seed!r}.")
    return torch.Generator(device="cpu").manual_seed(int(seed))


def _random_frame(rows: int, dim: int, seed: int) -> Tensor:
    """``rows`` orthonormal vectors of ``dim`` numbers, uniformly distributed, ``(rows, dim)``, float64."""
    noise = torch.randn(dim, rows, generator=_generator(seed), dtype=torch.float64)
    Q, R = torch.linalg.qr(noise)
    return (Q * R.diagonal().sign()).T  # without the sign the distribution would depend on the QR routine


def _simplex(n: int) -> Tensor:
    """The n vertices of a regular simplex on the unit sphere of n - 1 dimensions, ``(n, n - 1)``, float64.

    The columns are the Helmert contrasts, an orthonormal basis of the vectors that sum to zero.
    """
    j = torch.arange(1, n, dtype=torch.float64)
    row = torch.arange(n).unsqueeze(1)
    column = torch.arange(n - 1).unsqueeze(0)
    contrast = (row <= column).double() - (row == column + 1).double() * j
    return contrast * (j * (j + 1)).rsqrt() * math.sqrt(n / (n - 1))


def simplex_etf(num_classes: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    r"""Simplex equiangular tight frame: K unit vectors with every pairwise cosine :math:`-1 / (K - 1)`.

    .. math:: C = \sqrt{\tfrac{K}{K - 1}} \, (I - \tfrac{1}{K} 1 1^\top) \, U, \qquad U U^\top = I

    Args:
        num_classes: K >= 2.
        dim: D >= K - 1.
        seed: of the random orientation U; the global generator is not touched.
        dtype: float64, or float32 (computed in float64 all the same).

    Returns:
        Anchors, shape ``(K, D)``, on the CPU. They sum to zero.

    Raises:
        ArgumentError: K - 1 > D: there is no such frame; use :func:`balanced_anchors`.

    Source: Yang et al., "Inducing Neural Collapse in Imbalanced Learning: Do We Really Need a Learnable Classifier at
    the End of Deep Neural Network?", NeurIPS 2022, arXiv 2203.09081.
    Deviation: K - 1 <= D is enough here (there: K <= D), as the simplex is built in its own K - 1 dimensions.
    """
    K, D = _check_sizes(num_classes, dim)
    _check_dtype(dtype)
    if K - 1 > D:
        raise ArgumentError(
            f"A simplex of {K} classes needs at least {K - 1} dimensions, but got dim={D}. "
            "Use balanced_anchors, which takes the best arrangement there is for the size."
        )
    return (_simplex(K) @ _random_frame(K - 1, D, seed)).to(dtype)


def orthogonal_simplices(num_classes: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    r"""K - D simplices of (nearly) equal size in orthogonal subspaces: no two of K <= 2 D anchors are closer than 90°.

    More than D + 1 unit vectors in D dimensions cannot all have negative cosines, so the largest cosine is at least 0
    (Rankin); this arrangement reaches 0 exactly. Each simplex sums to zero, so every anchor has the same sum of
    cosines to the others, -1. The simplices' sizes differ by at most one.

    Args:
        num_classes: K, with D + 2 <= K <= 2 D.
        dim: D.
        seed: of the random orientation; the global generator is not touched.
        dtype: float64, or float32 (computed in float64 all the same).

    Returns:
        Anchors, shape ``(K, D)``, on the CPU. The members of a simplex are neighbouring rows.

    Raises:
        ArgumentError: K outside D + 2 .. 2 D.

    Source: Rankin, "The closest packing of spherical caps in n dimensions", Proc. Glasgow Math. Assoc. 2, 1955.
    """
    K, D = _check_sizes(num_classes, dim)
    _check_dtype(dtype)
    if not D + 2 <= K <= 2 * D:
        raise ArgumentError(
            f"Orthogonal simplices need dim + 2 <= num_classes <= 2 dim, but got num_classes={K} and dim={D}. "
            "Use balanced_anchors, which takes the best arrangement there is for the size."
        )
    groups = K - D
    sizes = [K // groups + (g < K % groups) for g in range(groups)]
    anchors = torch.block_diag(*(_simplex(n) for n in sizes)) @ _random_frame(D, D, seed)
    return anchors.to(dtype)


def sphere_anchors(
    num_classes: int,
    dim: int,
    *,
    seed: int = 0,
    temperature: float = 0.07,
    steps: int | None = None,
    chunk: int = 1024,
) -> Tensor:
    r"""K unit vectors spread over the sphere by descent on the uniformity loss, for K > D + 1.

    .. math:: L = \frac{1}{K} \sum_i \log \sum_{j \ne i} \exp(c_i^\top c_j / t)

    Gradient descent on the sphere with momentum, from random unit vectors: the step grows by 5 % while the loss falls;
    a step that raises it is undone, the momentum dropped and the step halved. So the loss returned is never above the
    starting one. Time is :math:`6 K^2 D` operations a step; memory is ``chunk * K`` plus a few ``K * D`` numbers.

    Args:
        num_classes: K > D + 1.
        dim: D >= 2.
        seed: of the start; the global generator is not touched.
        temperature: t; the lower, the more the nearest neighbours count.
        steps: by default 300, and fewer where K is large (12 at K = 8,142, D = 512, where a random start is good
            already and this takes the largest cosine from 0.24 to 0.14).
        chunk: rows worked on at once; it changes the memory and, beyond rounding, nothing else.

    Returns:
        Anchors, shape ``(K, D)``, float32, on the CPU.

    Raises:
        ArgumentError: K <= D + 1 (the simplex is exact there), D < 2, or a parameter out of range.

    Source: Li et al., "Targeted Supervised Contrastive Learning for Long-Tailed Recognition", CVPR 2022,
    arXiv 2111.13998.
    Deviation: the sum leaves out j = i, whose term is the same for all; descent with an adaptive step instead of 10,000
    steps of Adam: on K = 200, D = 64 it ends lower, in 300 steps.
    """
    K, D = _check_sizes(num_classes, dim)
    if D < 2 or K <= D + 1:
        raise ArgumentError(
            f"sphere_anchors: expected dim >= 2 and num_classes > dim + 1, but got num_classes={K}, dim={D}. "
            "For num_classes <= dim + 1 use simplex_etf, which is exact."
        )
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise ArgumentError(f"temperature: expected a finite number > 0, but got {temperature!r}.")
    for name, value, least in (("steps", steps, 0), ("chunk", chunk, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ArgumentError(f"{name}: expected a whole number >= {least}, but got {value!r}.")
    if steps is None:
        steps = min(_MAX_STEPS, max(_MIN_STEPS, round(_STEP_BUDGET / (6.0 * K * K * D))))
    start = torch.randn(K, D, generator=_generator(seed), dtype=torch.float32)
    return _descend(F.normalize(start, dim=1), float(temperature), steps, chunk)


def _descend(anchors: Tensor, temperature: float, steps: int, chunk: int) -> Tensor:
    best, gradient = anchors, torch.zeros_like(anchors)
    velocity = torch.zeros_like(anchors)
    loss, length = math.inf, 0.5
    for step in range(steps + 1):
        new_loss, new_gradient = _uniformity_gradient(anchors, temperature, chunk)
        if new_loss <= loss:
            loss, best, gradient = new_loss, anchors, new_gradient
            length *= 1.05
        else:
            velocity.zero_()
            length *= 0.5
        if step == steps:
            break
        velocity.mul_(0.9).sub_(gradient, alpha=length * temperature)
        velocity.sub_(best * (velocity * best).sum(1, keepdim=True))  # keep it tangent to the sphere
        anchors = F.normalize(best + velocity, dim=1)
    return best


def _uniformity_gradient(anchors: Tensor, temperature: float, chunk: int) -> tuple[float, Tensor]:
    """L, and the tangent part of K dL/dC, which does not shrink with K."""
    K = len(anchors)
    gradient = torch.zeros_like(anchors)
    loss = 0.0
    buffer = anchors.new_empty(min(chunk, K), K)
    for start in range(0, K, chunk):
        rows = anchors[start : start + chunk]
        weights = torch.mm(rows, anchors.T, out=buffer[: len(rows)]).div_(temperature)
        weights.diagonal(start).fill_(-math.inf)
        top = weights.amax(1, keepdim=True)
        total = weights.sub_(top).exp_().sum(1, keepdim=True)
        loss += float((total.log() + top).double().sum())
        weights.div_(total)
        gradient[start : start + chunk].addmm_(weights, anchors)  # c_i as the one that looks
        gradient.addmm_(weights.T, rows)  # c_j as the one looked at
    gradient.div_(temperature)
    gradient.sub_(anchors * (gradient * anchors).sum(1, keepdim=True))
    return loss / K, gradient


def balanced_anchors(num_classes: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The most even arrangement of K unit vectors there is for the size.

    :func:`simplex_etf` where K - 1 <= D, :func:`orthogonal_simplices` up to K = 2 D, :func:`sphere_anchors` beyond.
    The first two have the least possible largest cosine, exactly and at no cost. In the second case the uniformity
    loss at t = 0.07 could be a little lower with simplices of unequal size (by 0.03 at K = 100, D = 64, where random
    unit vectors stand 1.5 above), which would give classes unequal room.

    Args:
        num_classes: K >= 2.
        dim: D >= 1; more than two classes need D >= 2.
        seed: of the orientation or the start; the global generator is not touched.
        dtype: float32 or float64.

    Returns:
        Anchors, shape ``(K, D)``, on the CPU, unit rows.

    Raises:
        ArgumentError: sizes out of range.
    """
    K, D = _check_sizes(num_classes, dim)
    _check_dtype(dtype)
    if K - 1 <= D:
        return simplex_etf(K, D, seed=seed, dtype=dtype)
    if D < 2:
        raise ArgumentError(f"dim: {K} classes have no different places in 1 dimension; expected dim >= 2.")
    if K <= 2 * D:
        return orthogonal_simplices(K, D, seed=seed, dtype=dtype)
    return F.normalize(sphere_anchors(K, D, seed=seed).to(dtype), dim=1)


def align_anchors(anchors: Tensor, class_means: Tensor, *, assign: bool | None = None) -> Tensor:
    r"""Turns anchors towards a teacher's class means, and gives each class its anchor.

    .. math:: \max_{R^\top R = I,\ \sigma} \; \sum_k \cos(m_k, R \, c_{\sigma(k)})

    For a fixed assignment the best R is orthogonal Procrustes: with the singular value decomposition
    :math:`C_\sigma^\top M = U S V^\top`, it is :math:`C_\sigma U V^\top`. For a fixed R the best assignment is the
    Hungarian one. They alternate, assignment first (rotating first ends lower), until the objective stops rising; each
    can only raise it. That ends in a local optimum, so small problems are tried from several orientations: 32 for
    K <= 353, one for K > 1414.
    Anchors whose pairwise cosines are all equal (a simplex ETF) need no assignment, as R can realise any.

    Args:
        anchors: shape ``(K, D)``, unit rows, floating point.
        class_means: shape ``(K, D)``, one row per class, of any length but zero; normalised here.
        assign: whether to assign; by default where the anchors are not equiangular.

    Returns:
        Shape ``(K, D)``, dtype and device of ``anchors``: row k is the anchor of class k. Pairwise cosines are those
        of ``anchors``, with the rows in another order. R may hold a reflection.

    Raises:
        ArgumentError: shapes or dtypes that do not fit.
        DataError: a class mean that is zero or not finite (a class without features); the message names the classes.

    Cost: :math:`K D \min(K, D)` a round and, with assignment, a float64 K x K cost matrix (530 MB at K = 8,142; there
    the first assignment takes up to a minute, and each of the two or three that follow takes seconds). Runs on the
    CPU, in float64.

    Source: Schönemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 31, 1966;
    assignment between targets and class centres: arXiv 2111.13998 (Targeted Supervised Contrastive Learning, 2022).
    """
    for name, x in (("anchors", anchors), ("class_means", class_means)):
        if not isinstance(x, Tensor) or x.ndim != 2 or not x.is_floating_point():
            came = f"shape {tuple(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ArgumentError(f"{name}: expected a floating-point tensor of shape (K, D), but got {came}.")
    if anchors.shape != class_means.shape:
        raise ArgumentError(
            f"class_means: expected the shape of the anchors, {tuple(anchors.shape)}, but got "
            f"{tuple(class_means.shape)}. Make the anchors with one row per class, as wide as the teacher's features."
        )
    C = anchors.detach().cpu().double()
    M = class_means.detach().cpu().double()
    if not bool(torch.isfinite(C).all()):
        raise ArgumentError("anchors: expected finite numbers, but got NaN or infinity.")
    length = M.norm(dim=1)
    bad = (~((length > 0) & torch.isfinite(length))).nonzero().flatten().tolist()
    if bad:
        raise DataError(
            f"class_means: expected a direction for every class, but {len(bad)} of {len(M)} are zero or not finite: "
            f"class {', '.join(map(str, bad[:5]))}{' ...' if len(bad) > 5 else ''}. "
            "Has each class an image, and did the teacher give finite features?"
        )
    M = M / length.unsqueeze(1)
    if assign is None:
        assign = not _equiangular(C)
    if not assign:
        return _rotate(C, M).to(anchors.dtype).to(anchors.device)
    best, objective = _alternate(C, M)
    for start in range(1, min(_STARTS, _START_BUDGET // len(C) ** 2)):
        other, reached = _alternate(C @ _random_frame(C.shape[1], C.shape[1], start), M)
        if reached > objective + _GAIN * len(M):
            best, objective = other, reached
    return best.to(anchors.dtype).to(anchors.device)


def _alternate(anchors: Tensor, means: Tensor) -> tuple[Tensor, float]:
    """Assignment and rotation in turn until the objective stops rising; the anchors by class, and the objective."""
    best, objective = anchors, -math.inf
    while True:
        # One K x K matrix at a time: already negated, float64 and contiguous, SciPy takes it without a copy.
        order = torch.from_numpy(linear_sum_assignment(torch.mm(-means, best.T).numpy())[1])
        turned = _rotate(best[order], means)
        reached = float((turned * means).sum())
        if reached <= objective + _GAIN * len(means):
            return best, objective
        best, objective = turned, reached


def _equiangular(anchors: Tensor) -> bool:
    """Whether all pairwise cosines are equal; at most D + 1 vectors can have that."""
    K, D = anchors.shape
    if K > D + 1:
        return False
    gram = anchors @ anchors.T
    off = gram[~torch.eye(K, dtype=torch.bool)]
    return K < 3 or bool(off.max() - off.min() < 1e-5)


def _rotate(anchors: Tensor, means: Tensor) -> Tensor:
    """The anchors under the orthogonal map that brings them closest to the means, row by row."""
    K, D = anchors.shape
    if K < D:
        # The anchors span at most K dimensions: work in those, rather than with a D x D decomposition.
        _, coordinates = torch.linalg.qr(anchors.T)
        anchors = coordinates.T
        U, _, Vh = torch.linalg.svd(anchors.T @ means, full_matrices=False)
    else:
        U, _, Vh = torch.linalg.svd(anchors.T @ means)
    return anchors @ (U @ Vh)
