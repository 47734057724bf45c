"""What keeps the losses on logits small: value and gradient are computed together, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError

_PIECE = 1 << 20  # bytes: a few arrays of this size stay in a processor's cache


def by_rows(logits: Tensor, kernel: Callable[[slice], tuple[Tensor, Tensor]], *, out: Tensor | None = None) -> Tensor:
    """A loss whose gradient is written out: it is all that is kept, and the backward pass makes one array of its size.

    What the kernel needs on the way is of some rows only. Differentiating the result twice is refused.

    Args:
        logits: what the gradient goes to, shape ``(B, K)``, float32 or float64.
        kernel: takes a slice of the rows and gives their values ``(b,)`` and the gradient of each to its row of the
            logits ``(b, K)``, both new tensors. It runs without a graph.
        out: where the gradient may be written, ``(B, K)``: a temporary of which the kernel reads the given rows alone.

    Returns:
        Shape ``(B,)``.
    """
    return _ByRows.apply(logits, kernel, out)


def piece_rows(logits: Tensor) -> int:
    """How many rows of the logits ``(B, K)`` are worked on at once.

    On the CPU 1 MiB of them; on other devices, where every operation has to be launched, no less than a quarter of
    all; under compilation, which fuses the operations instead, all.
    """
    B, K = logits.shape
    if torch.compiler.is_compiling():
        return B
    rows = max(1, _PIECE // (K * logits.element_size()))
    return rows if logits.device.type == "cpu" else max(rows, -(-B // 4))


def row_slices(logits: Tensor) -> Iterator[slice]:
    """The rows in slices of :func:`piece_rows`; of no rows, one empty slice."""
    step = max(1, piece_rows(logits))
    return (slice(start, start + step) for start in range(0, max(1, len(logits)), step))


def some(x: float | Tensor, rows: slice) -> float | Tensor:
    """Those rows of a tensor; a number is the same for all."""
    return x[rows] if isinstance(x, Tensor) else x


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, kernel: Callable[[slice], tuple[Tensor, Tensor]], out: Tensor | None
    ) -> Tensor:
        if piece_rows(logits) >= len(logits):
            values, gradient = kernel(slice(None))
        else:
            values, gradient = logits.new_empty(len(logits)), torch.empty_like(logits) if out is None else out
            for rows in row_slices(logits):
                values[rows], gradient[rows] = kernel(rows)
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return once(gradient * grad.detach().unsqueeze(1)), None, None


def once(gradient: Tensor) -> Tensor:
    """A gradient that was made without a graph, for the end of a ``backward``; to differentiate it is refused.

    ``torch.autograd.function.once_differentiable`` refuses only where the upstream gradient has a graph, and a penalty
    on the gradient of a plain sum would pass and do nothing.
    """
    return _Refuse.apply(gradient.requires_grad_()) if torch.is_grad_enabled() else gradient


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ArgumentError(
            "A loss on logits keeps its gradient and no more, and cannot be differentiated twice. Leave out the "
            "penalty on its gradient, or write the loss with torch's own functions."
        )
