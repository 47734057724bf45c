"""Calibration after training: how sure a network may be, fitted on images that it was not trained on.

One file per method, with what is fitted (``fit``) and how it answers (``apply``). A :class:`Calibrator` is plain data;
nothing here imports torch, and applying one needs NumPy alone.
"""

from .calibrator import METHODS, Calibrator
from .fitting import FeatureEvidence, fit_calibrator

__all__ = ["METHODS", "Calibrator", "FeatureEvidence", "fit_calibrator"]
