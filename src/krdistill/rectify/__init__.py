"""Rectifiers: pure functions that change what the teacher says, before the student is pulled to it."""

from .anchor_rectification import blend_features, class_means, rarity, recentre_features
from .class_reweighting import reweight_classes
from .classifier_refit import refit_classifier
from .error_correction import correct_errors, errors
from .power_normalisation import power_normalise
from .prior_removal import auto_tau, mean_prediction, remove_prior
from .tau_calibration import per_class_tau
from .variance_transfer import transfer_variance, within_class_variation

__all__ = [
    "auto_tau",
    "blend_features",
    "class_means",
    "correct_errors",
    "errors",
    "mean_prediction",
    "per_class_tau",
    "power_normalise",
    "rarity",
    "recentre_features",
    "refit_classifier",
    "remove_prior",
    "reweight_classes",
    "transfer_variance",
    "within_class_variation",
]
