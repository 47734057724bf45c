"""What predictions are worth (metrics) and whom a teacher favours (diagnosis)."""

from .abstaining import coverage_table
from .calibration import evaluate_calibration
from .diagnosis import diagnose_teacher
from .metrics import confusion_matrix, evaluate_predictions, prediction_record, reliability_curve

__all__ = [
    "confusion_matrix",
    "coverage_table",
    "diagnose_teacher",
    "evaluate_calibration",
    "evaluate_predictions",
    "prediction_record",
    "reliability_curve",
]
