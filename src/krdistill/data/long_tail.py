"""Long-tailed cuts of balanced data: how many images each class keeps, and which ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, DataError

Profile = Literal["none", "exp", "step", "pareto"]


def _none(K: int, n_max: float, imbalance_factor: float) -> list[float]:
    return [n_max] * K


def _exp(K: int, n_max: float, imbalance_factor: float) -> list[float]:
    # In this order of operations, since the last bit decides whether a class has one image more.
    mu = 1 / imbalance_factor
    return [n_max * (mu ** (k / (K - 1.0))) for k in range(K)] if K > 1 else [n_max]


def _step(K: int, n_max: float, imbalance_factor: float) -> list[float]:
    head = max(1, K // 2)
    return [n_max] * head + [n_max * (1 / imbalance_factor)] * (K - head)


def _pareto(K: int, n_max: float, imbalance_factor: float) -> list[float]:
    alpha = 6.0
    n_min = n_max / imbalance_factor
    draws = [((k + 1) / K) ** (-1 / alpha) - 1 for k in range(K)]
    return [n_max, *(n_min + (n_max - n_min) * x / draws[0] for x in draws[1:])]


_PROFILES: dict[str, Callable[[int, float, float], list[float]]] = {
    "none": _none,
    "exp": _exp,
    "step": _step,
    "pareto": _pareto,
}


def long_tail_counts(num_classes: int, n_max: int, imbalance_factor: float, profile: Profile = "exp") -> list[int]:
    r"""Images per class of a long-tailed cut, the first class the largest.

    .. math::
        \text{exp:}\quad n_k = \lfloor n_{max} \cdot IF^{-k / (K - 1)} \rfloor \\
        \text{step:}\quad n_k = n_{max} \text{ if } k < \lfloor K / 2 \rfloor
            \text{ else } \lfloor n_{max} / IF \rfloor \\
        \text{pareto:}\quad n_k = \lfloor n_{min} + (n_{max} - n_{min}) \frac{x_k}{x_0} \rfloor, \quad
            x_k = \left(\frac{k + 1}{K}\right)^{-1/6} - 1, \quad n_{min} = \frac{n_{max}}{IF}

    The imbalance factor IF is the largest class over the smallest. ``exp`` is the profile of CIFAR-10-LT and
    CIFAR-100-LT. ``pareto`` takes the quantiles of the Pareto II distribution with the power value 6 that ImageNet-LT
    was drawn from, scaled so that largest over smallest is IF; where ImageNet-LT is one random draw, this is the same
    every time. ``none`` gives every class ``n_max``.

    Args:
        num_classes: K.
        n_max: images of the largest class.
        imbalance_factor: at least 1, at most ``n_max``.
        profile: ``exp``, ``step``, ``pareto`` or ``none``.

    Returns:
        K counts, none below 1.

    Raises:
        ArgumentError: a value out of range; or ``n_max`` below the imbalance factor, so that the smallest class would
            have no image.

    Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019,
    arXiv 1906.07413 (exp, step); Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019,
    arXiv 1904.05160 (pareto).
    Deviation: with an odd number of classes, ``step`` gives the middle one to the tail.
    """
    _check(num_classes, imbalance_factor, profile)
    if not _is_whole(n_max) or n_max < 1:
        raise ArgumentError(f"Expected n_max to be a whole number of images, at least 1, got {n_max!r}.")
    if profile != "none" and num_classes > 1 and n_max < imbalance_factor:
        raise ArgumentError(
            f"With n_max {n_max} and imbalance factor {imbalance_factor:g} the smallest class would have "
            f"{n_max / imbalance_factor:.2g} images. Expected n_max of at least {math.ceil(imbalance_factor)}, or an "
            f"imbalance factor of at most {n_max}."
        )
    # n_max / IF of exactly 1 can come out as 0.999...: never below one image.
    return [max(1, int(n)) for n in _PROFILES[profile](num_classes, n_max, imbalance_factor)]


def largest_n_max(available: Sequence[int], imbalance_factor: float, profile: Profile = "exp") -> int:
    """The largest ``n_max`` whose cut every class can supply; 0 if there is none.

    For balanced data this is the class size.

    Args:
        available: images per class.
        imbalance_factor: at least 1.
        profile: as in :func:`long_tail_counts`.
    """
    K = len(available)
    _check(K, imbalance_factor, profile)
    bottom = (math.ceil(imbalance_factor) if profile != "none" and K > 1 else 1) - 1
    low, high = bottom, max(available)
    while low < high:
        middle = (low + high + 1) // 2
        wanted = long_tail_counts(K, middle, imbalance_factor, profile)
        if all(w <= a for w, a in zip(wanted, available, strict=True)):
            low = middle
        else:
            high = middle - 1
    return low if low > bottom else 0


def long_tail_indices(
    labels: npt.ArrayLike, counts: Sequence[int], *, seed: int = 0, class_names: Sequence[str] | None = None
) -> npt.NDArray[np.int64]:
    """Which images a long-tailed cut keeps: the canonical CIFAR-LT recipe.

    For each class in turn its rows are shuffled and the first ``counts[k]`` kept. With seed 0 and CIFAR's labels these
    are, row for row, the CIFAR-10-LT and CIFAR-100-LT of the literature. The generator is a local one.

    Args:
        labels: class numbers, shape ``(N,)``.
        counts: images to keep per class, K of them.
        seed: of the shuffles, in [0, 2**32).
        class_names: to be used in error messages.

    Returns:
        Row numbers, class by class, shape ``(sum(counts),)``.

    Raises:
        ArgumentError: labels that are no class numbers, negative counts, a seed out of range.
        DataError: a class has fewer images than asked for; the message names it.

    Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019,
    arXiv 1906.07413, and the data of its code.
    """
    marks = np.asarray(labels)
    if marks.ndim != 1 or marks.dtype.kind not in "iu":
        raise ArgumentError(f"Expected labels as whole numbers of shape (N,), got {marks.dtype} {marks.shape}.")
    if not _is_whole(seed) or not 0 <= seed < 2**32:
        raise ArgumentError(f"Expected a seed from 0 to 2**32 - 1, got {seed!r}.")
    if not len(counts) or not all(_is_whole(n) and n >= 0 for n in counts):
        raise ArgumentError(f"Expected counts to be whole numbers, none negative, got {list(counts)}.")
    if len(marks) and (marks.min() < 0 or marks.max() >= len(counts)):
        raise ArgumentError(f"Expected labels from 0 to {len(counts) - 1}, got {marks.min()} to {marks.max()}.")
    available = np.bincount(marks, minlength=len(counts))
    short = [k for k, wanted in enumerate(counts) if wanted > available[k]]
    if short:
        shown = [
            f"{class_names[k] if class_names else k} ({counts[k]} asked for, {available[k]} there)" for k in short[:5]
        ]
        more = f" and {len(short) - 5} more" if len(short) > 5 else ""
        raise DataError(f"Too few images for this cut in class {', '.join(shown)}{more}.")
    generator = np.random.RandomState(seed)
    kept = []
    for k, count in enumerate(counts):
        rows = np.where(marks == k)[0]
        generator.shuffle(rows)
        kept.append(rows[:count])
    return np.concatenate(kept).astype(np.int64)


def _is_whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _check(num_classes: int, imbalance_factor: float, profile: str) -> None:
    if profile not in _PROFILES:
        raise ArgumentError(f"Expected profile to be one of {', '.join(_PROFILES)}, got {profile!r}.")
    if not _is_whole(num_classes) or num_classes < 1:
        raise ArgumentError(f"Expected num_classes to be a whole number, at least 1, got {num_classes!r}.")
    if isinstance(imbalance_factor, bool) or not isinstance(imbalance_factor, (int, float, np.integer, np.floating)):
        raise ArgumentError(f"Expected the imbalance factor to be a number, got {imbalance_factor!r}.")
    if not math.isfinite(imbalance_factor) or imbalance_factor < 1:
        inverse = ""
        if 0 < imbalance_factor < 1:
            inverse = f"; where a paper writes {imbalance_factor:g}, write {1 / imbalance_factor:g}"
        raise ArgumentError(
            f"Expected an imbalance factor of at least 1, got {imbalance_factor}. It is the largest class over the "
            f"smallest{inverse}."
        )
    if profile == "none" and imbalance_factor != 1:
        raise ArgumentError(
            f"Profile 'none' cuts nothing, so an imbalance factor of {imbalance_factor:g} has no effect; "
            "expected profile exp, step or pareto, or an imbalance factor of 1."
        )
