"""Losses: one file per paper, pure functions first, a thin module over each; all give per-sample values ``(B,)``."""

from .balanced_softmax import BalancedSoftmax, balanced_softmax
from .cross_entropy import CrossEntropy, cross_entropy
from .feature_matching import Projector, cosine_distance, squared_distance
from .kd import KDDivergence, kd_divergence
from .krdistill import (
    LogitRectifiedDistillation,
    RepresentationRectifiedDistillation,
    group_sample_weights,
    lrd_loss,
    rectify_logits,
    rrd_loss,
)

__all__ = [
    "BalancedSoftmax",
    "CrossEntropy",
    "KDDivergence",
    "LogitRectifiedDistillation",
    "Projector",
    "RepresentationRectifiedDistillation",
    "balanced_softmax",
    "cosine_distance",
    "cross_entropy",
    "group_sample_weights",
    "kd_divergence",
    "lrd_loss",
    "rectify_logits",
    "rrd_loss",
    "squared_distance",
]
