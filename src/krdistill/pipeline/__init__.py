"""The main job in a run folder: data, teacher, diagnosis, distillation, evaluation, export, report.

The stages themselves are functions of :mod:`krdistill.stages`; here they are put in order, and a stage whose result is
already in the folder is not done again.
"""

from .answers import build_bank_of
from .estimate import estimate_seconds
from .folder import open_folder
from .plan import Plan, check_names, checksums, prepare
from .running import run, run_teacher

__all__ = [
    "Plan",
    "build_bank_of",
    "check_names",
    "checksums",
    "estimate_seconds",
    "open_folder",
    "prepare",
    "run",
    "run_teacher",
]
