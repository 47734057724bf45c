"""What is left, and how right it is, where a network does not answer below a confidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError

THRESHOLDS = (0.0, 0.3, 0.5, 0.7, 0.9)


def coverage_table(
    confidence: npt.NDArray[np.floating[Any]],
    correct: npt.NDArray[np.bool_],
    *,
    groups: Mapping[str, npt.NDArray[np.bool_]] | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
) -> list[dict[str, Any]]:
    r"""Share of examples that are answered, and accuracy on those, by the confidence that is asked for.

    .. math:: \operatorname{coverage}(t) = \operatorname{mean}_i [c_i \ge t], \qquad
        \operatorname{accuracy}(t) = \operatorname{mean}_{i : c_i \ge t} [\hat y_i = y_i]

    A long-tailed network that is less sure of rare classes than of frequent ones leaves the tail out first; the groups
    show it.

    Args:
        confidence: c, the probability of the predicted class, shape ``(N,)``, in [0, 1].
        correct: whether the prediction is right, shape ``(N,)``.
        groups: name to which of the examples belong to it, shape ``(N,)`` each; of their true classes, as everywhere.
        thresholds: t, each in [0, 1].

    Returns:
        For every threshold ``threshold``, ``coverage``, ``accuracy`` (None where nothing is answered) and ``groups``:
        name to ``coverage`` and ``accuracy``, or None for a group without examples.

    Raises:
        ArgumentError: shapes that do not fit, no example, or numbers outside of [0, 1].

    Source: Geifman, El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017, arXiv 1705.08500.
    """
    c, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct)
    if c.ndim != 1 or not len(c) or right.shape != c.shape or right.dtype != np.bool_:
        raise ArgumentError(
            "Expected confidence (N,) and correct, bool (N,), with N > 0, "
            f"got {c.shape} and {right.dtype} {right.shape}."
        )
    parts = {name: np.asarray(there) for name, there in (groups or {}).items()}
    for name, there in parts.items():
        if there.shape != c.shape or there.dtype != np.bool_:
            raise ArgumentError(f"groups: expected bool {c.shape} for {name!r}, got {there.dtype} {there.shape}.")
    for what, values in (("confidence", c), ("thresholds", np.asarray(thresholds, dtype=np.float64))):
        if not ((values >= 0) & (values <= 1)).all():  # NaN is not either
            raise ArgumentError(
                f"{what}: expected numbers in [0, 1], got {values[~((values >= 0) & (values <= 1))][0]}."
            )

    def share(there: npt.NDArray[np.bool_], t: float) -> dict[str, float | None]:
        answered = there & (c >= t)
        n = int(answered.sum())
        return {"coverage": n / int(there.sum()), "accuracy": float(right[answered].mean()) if n else None}

    everything = np.ones(len(c), dtype=np.bool_)
    return [
        {
            "threshold": float(t),
            **share(everything, t),
            "groups": {name: share(there, t) if there.any() else None for name, there in parts.items()},
        }
        for t in thresholds
    ]
