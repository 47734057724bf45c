"""The whole job, stage by stage; a stage whose result is already in the folder is not done again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..distributed import World
from ..events import Events
from ..runfolder import BANK, REPORT
from .answers import bank_stage
from .folder import at_work, stop_here
from .plan import Plan
from .results import evaluation_stage, export_stage
from .student import student_stage
from .teacher import diagnosis_stage, teacher_stage


def run(
    plan: Plan,
    out: Path,
    *,
    events: Events | None = None,
    report: bool = True,
    world: World | None = None,
    stop: Callable[[], bool] | None = None,
    opened: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Runs every stage that is not done yet, in a run folder, which no other process can work in meanwhile.

    Args:
        plan: what to do.
        out: the run folder.
        events: hears what goes on.
        report: whether ``report.html`` is written; without it, a given teacher's diagnosis is taken as it stands in
            its own run folder.
        world: the processes that train together (:func:`krdistill.distributed.join`); every one calls this function.
        stop: asked after every step and between stages; where it says yes, the state is saved and the run ends. Of
            many processes, that of the first counts.
        opened: called when the folder is this run's, before anything is trained.

    Returns:
        The metrics, as in ``metrics.json``.

    Raises:
        StoppedError: ``stop`` said so.
        DiskError: the disk is full; the message says what is safe.
    """
    events = events or Events()
    with at_work(plan, out, world, stop) as folder:
        if opened is not None:
            opened()
        for note in plan.notes:
            events.note(note)
        teacher = None if plan.answers is not None else teacher_stage(folder, plan, events)
        profile = diagnosis_stage(folder, plan, teacher, events, again=report)
        answers = plan.answers if teacher is None else bank_stage(folder, plan, teacher, events)
        for stage, config, recipe, options in plan.recipes:
            student_stage(folder, plan, stage, config, recipe, options, teacher, profile, answers, events)
        if plan.config.bank.views == "auto" and folder.writes:
            shutil.rmtree(folder.path / BANK, ignore_errors=True)  # nobody asked for it, and nobody needs it any more
        metrics = evaluation_stage(folder, plan, teacher, profile, events)
        if not folder.writes:
            return metrics
        if plan.config.export.onnx:
            export_stage(folder, plan, events)
        if not report:
            return metrics
        from ..reporting import write_report  # matplotlib is not needed before

        stop_here(folder)
        events.stage("report", REPORT)
        with folder.timed("report"):
            write_report(folder.path)
        return metrics


def run_teacher(plan: Plan, out: Path, *, events: Events | None = None) -> dict[str, Any]:
    """Runs the teacher's part alone: its training, diagnosis and evaluation, for the runs that will share it.

    Returns:
        The metrics, as in ``metrics.json``; no student is among them.
    """
    events = events or Events()
    with at_work(plan, out) as folder:
        teacher = teacher_stage(folder, plan, events)
        profile = diagnosis_stage(folder, plan, teacher, events)
        return evaluation_stage(folder, plan, teacher, profile, events, students=False)
