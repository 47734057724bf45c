"""Argument checks shared by the rectifiers and the losses: what was expected, what came, what to do.

Shapes and dtypes are always checked. Values are checked only where looking at them is free of a device
synchronisation: Python numbers, and tensors on the CPU outside compilation.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .errors import ArgumentError

_LARGEST = 1e100


def describe(x: Any) -> str:
    """What came, in few words."""
    if isinstance(x, Tensor):
        return f"a tensor of shape {tuple(x.shape)} and dtype {str(x.dtype).removeprefix('torch.')}"
    return f"{type(x).__name__} {x!r:.80}"


def readable(x: Tensor) -> bool:
    """Whether the values of ``x`` may be looked at: it costs no device synchronisation and no graph break."""
    return x.device.type == "cpu" and x.numel() > 0 and not torch.compiler.is_compiling()


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_matrix(name: str, x: Any, shape: str, *, rows: int | None = None, columns: int | None = None) -> Tensor:
    """A 2-D floating-point tensor, with the rows and columns given; ``shape`` is how to write it, as ``"(B, K)"``."""
    if not isinstance(x, Tensor) or x.ndim != 2 or not x.is_floating_point():
        raise ArgumentError(f"{name}: expected a floating-point tensor of shape {shape}, but got {describe(x)}.")
    expected = (x.shape[0] if rows is None else rows, x.shape[1] if columns is None else columns)
    if tuple(x.shape) != expected:
        raise ArgumentError(f"{name}: expected shape {shape} = {expected}, but got {describe(x)}.")
    return x


def check_logits(name: str, x: Any, *, rows: int | None = None, columns: int | None = None) -> Tensor:
    """Logits ``(B, K)`` of at least two classes."""
    check_matrix(name, x, "(B, K)", rows=rows, columns=columns)
    if x.shape[1] < 2:
        raise ArgumentError(f"{name}: expected at least 2 classes (columns), but got {describe(x)}.")
    return x


def check_labels(labels: Any, rows: int, num_classes: int) -> Tensor:
    """Class indices ``(rows,)`` in ``[0, num_classes)``, as int64."""
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype == torch.bool
        or labels.shape != (rows,)
    ):
        raise ArgumentError(
            f"labels: expected an integer tensor of shape ({rows},), one class index per row, "
            f"but got {describe(labels)}."
        )
    if readable(labels):
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise ArgumentError(
                f"labels: expected class indices in 0..{num_classes - 1}, but got {low if low < 0 else high}. "
                "Labels must be counted in the same class order as the logits, features or counts."
            )
    return labels.long()


def check_per_class(
    name: str,
    x: Any,
    num_classes: int,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    expected: str = "finite numbers",
) -> Tensor:
    """One finite number per class, ``(K,)``, in ``[low, high]``; ``expected`` says so in words."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.shape != (num_classes,):
        raise ArgumentError(
            f"{name}: expected a floating-point tensor of shape (K,) = ({num_classes},), but got {describe(x)}."
        )
    if readable(x):
        bad = ~(torch.isfinite(x) & (x >= low) & (x <= high))
        if bool(bad.any()):
            index = int(bad.nonzero()[0])
            raise ArgumentError(f"{name}: expected {expected}, but got {float(x[index])} for class {index}.")
    return x


def check_finite(name: str, x: Tensor) -> Tensor:
    """No NaN and no infinity, where that can be seen for free."""
    if readable(x) and not bool(torch.isfinite(x).all()):
        row = int((~torch.isfinite(x)).reshape(x.shape[0], -1).any(1).nonzero()[0])
        raise ArgumentError(f"{name}: expected finite numbers, but row {row} holds NaN or infinity.")
    return x


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> float:
    """A finite number within the bounds given; none is so large (1e100) that its square is not finite."""
    bounds = [(">", above), (">=", at_least), ("<=", at_most), ("<", below)]
    limit: Any = _LARGEST  # compared as it is: a whole number may be too large for a float
    ok = isinstance(value, Real) and not isinstance(value, bool) and bool(-limit <= value <= limit)
    if ok:
        number = float(value)
        ok = (
            (above is None or number > above)
            and (at_least is None or number >= at_least)
            and (at_most is None or number <= at_most)
            and (below is None or number < below)
        )
    if not ok:
        limits = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
        raise ArgumentError(f"{name}: expected a finite number{' ' + limits if limits else ''}, but got {value!r}.")
    return float(value)


def check_integer(name: str, value: Any, *, at_least: int) -> int:
    """A whole number, not below ``at_least``."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or isinstance(value, Tensor) or value < at_least:
        raise ArgumentError(f"{name}: expected a whole number >= {at_least}, but got {value!r}.")
    return int(value)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """One of a few names."""
    if value not in choices:
        raise ArgumentError(f"{name}: expected one of {', '.join(map(repr, choices))}, but got {value!r}.")
    return str(value)


def like(x: Tensor, other: Tensor) -> Tensor:
    """``x`` in the dtype and on the device of ``other`` (dtype first: not every device has float64)."""
    return x.to(other.dtype).to(other.device)
