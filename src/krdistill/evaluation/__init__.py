"""What predictions are worth (metrics) and whom a teacher favours (diagnosis)."""

from .abstaining import coverage_table
from .calibration import evaluate_calibration
from .cost import multiply_accumulates
from .diagnosis import diagnose_teacher, predictions
from .metrics import confusion_matrix, evaluate_predictions, prediction_record, reliability_curve

__all__ = [
    "confusion_matrix",
    "coverage_table",
    "diagnose_teacher",
    "evaluate_calibration",
    "evaluate_predictions",
    "multiply_accumulates",
    "prediction_record",
    "predictions",
    "reliability_curve",
]
