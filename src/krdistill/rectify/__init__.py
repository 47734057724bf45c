"""Rectifiers: pure functions that change what the teacher says, before the student is pulled to it."""

from .anchor_rectification import blend_features, class_means, rarity, recentre_features
from .error_correction import correct_errors, errors
from .prior_removal import auto_tau, mean_prediction, remove_prior

__all__ = [
    "auto_tau",
    "blend_features",
    "class_means",
    "correct_errors",
    "errors",
    "mean_prediction",
    "rarity",
    "recentre_features",
    "remove_prior",
]
