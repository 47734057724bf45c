"""Studies: methods x seeds x data sets x network pairs under one protocol, in one folder.

:func:`read_study` reads a study file, :func:`plan_study` turns it into cells and checks every one of them,
:func:`run_study` runs what is not done yet, :func:`collect` makes tables of what is.
"""

from __future__ import annotations

from .devices import measure_students
from .execution import Executor, LocalExecutor, RayExecutor
from .plan import Cell, Item, StudyConfig, StudyPlan, plan_study, read_study
from .results import collect
from .running import Status, StudyEvents, run_study
from .store import StudyFolder

__all__ = [
    "Cell",
    "Executor",
    "Item",
    "LocalExecutor",
    "RayExecutor",
    "Status",
    "StudyConfig",
    "StudyEvents",
    "StudyFolder",
    "StudyPlan",
    "collect",
    "measure_students",
    "plan_study",
    "read_study",
    "run_study",
]
