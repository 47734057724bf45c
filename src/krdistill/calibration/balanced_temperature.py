"""Temperature scaling with every class counting the same."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import FloatArray, IntArray
from .temperature import apply as apply
from .temperature import best_temperature


def fit(logits: FloatArray, labels: IntArray) -> dict[str, Any]:
    r"""The temperature of :func:`~krdistill.calibration.temperature.best_temperature` for a world where all classes are
    equally frequent.

    .. math:: \omega_i \propto 1 / n_{y_i}, \qquad n_k = \#\{i : y_i = k\}

    Args:
        logits: z, shape ``(N, K)``, float64, finite.
        labels: y, shape ``(N,)``, integers. Classes without a row have no say.

    Returns:
        ``temperature``.

    Source: importance weights of a shift of the class frequencies (Saerens et al., Neural Computation 14, 2002). As a
        rival of head-to-tail calibration it is ours: no paper of the field that we know of has it in its tables.
    """
    return {"temperature": best_temperature(logits, labels, 1.0 / np.bincount(labels)[labels])}
