"""Fits a calibrator by its method's name, after a look at what cannot be fitted to."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from ..errors import ArgumentError, unknown_name
from .arrays import FloatArray
from .calibrator import METHODS, Calibrator


@dataclass(frozen=True, eq=False)
class FeatureEvidence:
    """The features that head-to-tail calibration needs.

    Attributes:
        features: of the validation images, shape ``(N, D)``, in the order of their logits.
        train_features: of the training images, shape ``(M, D)``.
        train_labels: theirs, shape ``(M,)``.
    """

    features: Any
    train_features: Any
    train_labels: Any


def fit_calibrator(method: str, logits: Any, labels: Any, *, evidence: FeatureEvidence | None = None) -> Calibrator:
    """Fits a calibrator to a network's logits on images that it was not trained on.

    Deterministic, in float64, on the CPU.

    Args:
        method: one of ``METHODS``; each has its formula and source in the file of its name.
        logits: array or tensor of shape ``(N, K)``, finite.
        labels: shape ``(N,)``, integers in [0, K). Classes without a row are allowed.
        evidence: for ``head-to-tail``; the other methods do not look at it.

    Raises:
        ArgumentError: an unknown method, shapes that do not fit, no rows, labels out of range, numbers that are not
            finite, or no features for ``head-to-tail``.
    """
    if method not in METHODS:
        raise ArgumentError(unknown_name("calibration method", method, METHODS))
    z, y = _matrix("logits", logits), _array(labels)
    if z.shape[1] < 2:
        raise ArgumentError(f"logits: expected at least 2 classes (columns), got shape {z.shape}.")
    K = z.shape[1]
    y = _labels("labels", y, len(z), K)
    known: dict[str, Any] = {}
    if method == "head-to-tail":
        if evidence is None or not all(np.size(_array(f)) for f in (evidence.features, evidence.train_features)):
            raise ArgumentError(
                "head-to-tail: expected features of the validation and the training images, got none. Take a method "
                "that needs logits alone, such as temperature."
            )
        f, g = _matrix("features", evidence.features), _matrix("train_features", evidence.train_features)
        if len(f) != len(z) or f.shape[1] != g.shape[1]:
            raise ArgumentError(
                f"features: expected {len(z)} rows and as many columns as train_features, got {f.shape} and {g.shape}."
            )
        seen = _labels("train_labels", _array(evidence.train_labels), len(g), K)
        known = {"features": f, "train_features": g, "train_labels": seen}
    made = import_module(f".{method.replace('-', '_')}", __package__)
    return Calibrator(method, K, made.fit(z, y, **known))


def _array(x: Any) -> np.ndarray:
    """A NumPy array of anything array-like; of a tensor, without importing torch."""
    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)


def _matrix(name: str, x: Any) -> FloatArray:
    found = _array(x.detach().cpu().double() if hasattr(x, "detach") else x)
    if found.ndim != 2 or found.dtype.kind not in "fiu":
        raise ArgumentError(f"{name}: expected numbers of shape (N, columns), got shape {found.shape}.")
    if not len(found):
        raise ArgumentError(f"{name}: expected at least one row, got none. Is this part of the data empty?")
    made = found.astype(np.float64)
    bad = np.asarray(~np.isfinite(made).all(axis=1))
    if bad.any():
        raise ArgumentError(
            f"{name}: {int(bad.sum())} of {len(bad)} rows hold NaN or infinity (the first is row {int(bad.argmax())}). "
            "The network diverged, or its input is broken."
        )
    return made


def _labels(name: str, y: np.ndarray, rows: int, K: int) -> np.ndarray:
    if y.shape != (rows,) or y.dtype.kind not in "iu":
        raise ArgumentError(f"{name}: expected {rows} whole numbers, one per row, got {y.dtype} of shape {y.shape}.")
    if y.min() < 0 or y.max() >= K:
        raise ArgumentError(f"{name}: expected class indices in 0..{K - 1}, got {y.min()} to {y.max()}.")
    return y.astype(np.int64)
