"""Running a study: what is ready is begun, what ends is written down, and one failure stops nobody else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .execution import Executor
from .plan import StudyPlan
from .store import StudyFolder

State = Literal["waiting", "running", "done", "failed"]
TICK_SECONDS = 0.5


@dataclass
class Status:
    """Where a study stands.

    Attributes:
        plan: of the study.
        states: item to state.
        results: of the items that are done.
        failures: item to message.
        began: when the running items were begun (``time.monotonic``).
        slots: how many items run at once.
    """

    plan: StudyPlan
    states: dict[str, State]
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    began: dict[str, float] = field(default_factory=dict)
    slots: int = 1

    @property
    def failed_cells(self) -> list[str]:
        return [c.id for c in self.plan.cells if self.states[c.item] == "failed"]


class StudyEvents:
    """What a caller hears while a study goes on; every method may be overridden, none has to be.

    It is a context around the study, for those that draw on a screen.
    """

    def __enter__(self) -> StudyEvents:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def started(self, key: str, status: Status) -> None:
        """An item was begun."""

    def finished(self, key: str, status: Status) -> None:
        """An item is done."""

    def failed(self, key: str, message: str, status: Status) -> None:
        """An item failed, or the teacher it waits for did."""

    def tick(self, status: Status) -> None:
        """Some time has passed."""


def survey(plan: StudyPlan, folder: StudyFolder) -> Status:
    """Where a study stands by the files in its folder."""
    status = Status(plan, {})
    for key, item in plan.items.items():
        result, failure = folder.result(key), folder.failure(key)
        if result is not None:
            status.states[key], status.results[key] = "done", result
        elif failure is not None:
            status.states[key], status.failures[key] = "failed", failure["message"]
        elif item.waits_for is not None and status.states[item.waits_for] == "failed":
            status.states[key], status.failures[key] = "failed", _no_teacher(item.waits_for)
        else:
            status.states[key] = "waiting"
    return status


def run_study(
    plan: StudyPlan, folder: StudyFolder, executor: Executor, *, retry: bool = False, events: StudyEvents | None = None
) -> Status:
    """Runs every item of a study that is not done yet.

    What is done is never done again, what was interrupted goes on from its checkpoint, and what failed before is left
    alone unless ``retry``.

    Args:
        plan: the study.
        folder: where it is kept.
        executor: who does the work; it is closed at the end.
        retry: whether items that failed before are tried again.
        events: hears what goes on.

    Raises:
        RunFolderError: the folder is not this study's, or another process is running it.
    """
    events = events or StudyEvents()
    try:
        with folder.opened(plan):
            if retry:
                for key in plan.items:
                    folder.forget_failure(key)
            status = survey(plan, folder)
            status.slots = executor.slots
            with events:
                events.tick(status)
                _run(status, folder, executor, events)
            cells = [plan.items[c.item].config for c in plan.cells]
            if set(status.states.values()) == {"done"} and all(c.bank.views == "auto" for c in cells):
                folder.drop_banks()
            return status
    finally:
        executor.close()


def _run(status: Status, folder: StudyFolder, executor: Executor, events: StudyEvents) -> None:
    items, states = status.plan.items, status.states

    def fail(key: str, message: str) -> None:
        states[key], status.failures[key] = "failed", message
        events.failed(key, message, status)
        for other in items.values():
            if other.waits_for == key and states[other.key] == "waiting":
                fail(other.key, _no_teacher(key))

    while True:
        for key, item in items.items():
            running = sum(s == "running" for s in states.values())
            if running >= executor.slots:
                break
            if states[key] == "waiting" and (item.waits_for is None or states[item.waits_for] == "done"):
                states[key], status.began[key] = "running", time.monotonic()
                executor.start(folder, item)
                events.started(key, status)
        if not any(s == "running" for s in states.values()):
            return
        for key, broke_off in executor.ended(TICK_SECONDS):
            status.began.pop(key, None)
            result = folder.result(key)
            if result is not None:
                states[key], status.results[key] = "done", result
                events.finished(key, status)
                continue
            if broke_off is not None:
                folder.fail(key, broke_off, "process")
            failure = folder.failure(key)
            fail(key, failure["message"] if failure else f"it left no result; see {folder.log(key)}")
        events.tick(status)


def _no_teacher(key: str) -> str:
    return f"its teacher failed ({key})"


def seconds_left(status: Status, cells: Mapping[str, str]) -> float | None:
    """How long the cells of a part of the study will still take, judged by those of the same kind that are done.

    Args:
        status: where the study stands.
        cells: item to the name of its kind, such as its method: items of one kind take about as long as each other.

    Returns:
        Seconds, over the study's slots; None while no item of any kind is done.
    """
    known: dict[str, list[float]] = {}
    for cell in status.plan.cells:
        if cell.item in status.results:
            known.setdefault(cell.method, []).append(status.results[cell.item]["seconds"])
    every = [s for values in known.values() for s in values]
    if not every:
        return None
    left = 0.0
    for key, kind in cells.items():
        if status.states[key] in ("waiting", "running"):
            values = known.get(kind, every)
            spent = time.monotonic() - status.began[key] if key in status.began else 0.0
            left += max(0.0, sum(values) / len(values) - spent)
    return left / max(1, status.slots)
