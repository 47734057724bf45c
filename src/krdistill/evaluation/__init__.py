"""What predictions are worth (metrics) and whom a teacher favours (diagnosis)."""

from .calibration import evaluate_calibration
from .diagnosis import diagnose_teacher
from .metrics import confusion_matrix, evaluate_predictions, prediction_record, reliability_curve

__all__ = [
    "confusion_matrix",
    "diagnose_teacher",
    "evaluate_calibration",
    "evaluate_predictions",
    "prediction_record",
    "reliability_curve",
]
