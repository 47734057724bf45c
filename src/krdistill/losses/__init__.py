"""Losses: one file per paper, pure functions first, a thin module over each; all give per-sample values ``(B,)``."""

from .balanced_softmax import BalancedSoftmax, balanced_softmax
from .bkd import BalancedDistillation, bkd_loss
from .cckd import ClassConditionalDistillation, cckd_loss
from .class_balanced import ClassBalancedCrossEntropy, ClassBalancedFocal, class_balanced_loss
from .crd import ContrastiveRepresentationDistillation, nce_loss
from .cross_entropy import CrossEntropy, cross_entropy
from .dive import VirtualExamples, dive_loss
from .dkd import DKD, dkd_loss, non_target_class_divergence, target_class_divergence
from .etf_classifier import DotRegression, ETFHead, dot_regression_loss
from .feature_matching import Projector, cosine_distance, squared_distance
from .focal import FocalLoss, focal_loss
from .kd import KDDivergence, kd_divergence
from .krdistill import (
    LogitRectifiedDistillation,
    RepresentationRectifiedDistillation,
    group_sample_weights,
    lrd_loss,
    rectify_logits,
    rrd_loss,
)
from .label_aware_smoothing import LabelAwareSmoothing, smoothing_factors
from .ldam import LDAM, NormedLinear, ldam_loss, ldam_margins
from .lfme import ExpertDistillation
from .logit_adjustment import LogitAdjustedLoss, adjust_logits, logit_adjusted_loss
from .logit_matching import LogitMSE, logit_mse
from .ltkd import LTKD, cross_group_divergence, group_log_probabilities, ltkd_loss, within_group_divergence
from .prototype_contrast import PrototypeContrast, prototype_contrast_loss
from .rectified_classifier import RectifiedClassifier, rectified_classifier_loss
from .reviewkd import ReviewKD, hierarchical_context_loss
from .rkd import RKD, rkd_angle_loss, rkd_distance_loss, rkd_loss
from .similarity_preserving import SimilarityPreserving, similarity_preserving_loss
from .simkd import ReusedClassifier, SimKD, simkd_loss
from .ssd import AuxiliaryHead, ScaledTeacherDistillation
from .tail_weighting import tail_weights

__all__ = [
    "DKD",
    "LDAM",
    "LTKD",
    "RKD",
    "AuxiliaryHead",
    "BalancedDistillation",
    "BalancedSoftmax",
    "ClassBalancedCrossEntropy",
    "ClassBalancedFocal",
    "ClassConditionalDistillation",
    "ContrastiveRepresentationDistillation",
    "CrossEntropy",
    "DotRegression",
    "ETFHead",
    "ExpertDistillation",
    "FocalLoss",
    "KDDivergence",
    "LabelAwareSmoothing",
    "LogitAdjustedLoss",
    "LogitMSE",
    "LogitRectifiedDistillation",
    "NormedLinear",
    "Projector",
    "PrototypeContrast",
    "RectifiedClassifier",
    "RepresentationRectifiedDistillation",
    "ReusedClassifier",
    "ReviewKD",
    "ScaledTeacherDistillation",
    "SimKD",
    "SimilarityPreserving",
    "VirtualExamples",
    "adjust_logits",
    "balanced_softmax",
    "bkd_loss",
    "cckd_loss",
    "class_balanced_loss",
    "cosine_distance",
    "cross_entropy",
    "cross_group_divergence",
    "dive_loss",
    "dkd_loss",
    "dot_regression_loss",
    "focal_loss",
    "group_log_probabilities",
    "group_sample_weights",
    "hierarchical_context_loss",
    "kd_divergence",
    "ldam_loss",
    "ldam_margins",
    "logit_adjusted_loss",
    "logit_mse",
    "lrd_loss",
    "ltkd_loss",
    "nce_loss",
    "non_target_class_divergence",
    "prototype_contrast_loss",
    "rectified_classifier_loss",
    "rectify_logits",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "rkd_loss",
    "rrd_loss",
    "similarity_preserving_loss",
    "simkd_loss",
    "smoothing_factors",
    "squared_distance",
    "tail_weights",
    "target_class_divergence",
    "within_group_divergence",
]
