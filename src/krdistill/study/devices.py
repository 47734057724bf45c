"""What the students of a study's pairs cost where they run, measured once nothing else runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import MissingDependencyError
from ..models.network import load_network
from ..models.registry import parse_model
from .plan import StudyPlan
from .store import StudyFolder


def measure_students(
    plan: StudyPlan, folder: StudyFolder, *, seconds: float = 1.0, on_step: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Measures one student of every place whose pair is one of several, as an ONNX file: one thread, one example.

    Time depends on a student's architecture and not on what it learned, so one stands for all of its place. What was
    measured before is not measured again.

    Args:
        plan: the study.
        folder: where it was run.
        seconds: how long each measurement is repeated.
        on_step: hears what is measured, in words.

    Returns:
        Place (``data/pair/teacher``) to ``item``, the cell that was measured, and either ``bytes``, ``macs``,
        ``processor``, ``median_ms``, ``p95_ms`` and ``peak_bytes``, or ``left_out``, why it was not. It is kept in the
        study's folder.
    """
    known = folder.devices()
    if len(plan.study.pairs) < 2:
        return known
    for place in plan.places:
        done = (c for c in plan.cells if c.place == place and folder.result(c.item) is not None)
        cell = next(done, None)
        name = "/".join(v or "-" for v in place)
        if cell is None or "median_ms" in known.get(name, {}):
            continue
        try:
            from ..deploy.costs import measure_networks

            config = plan.items[cell.item].config
            network = load_network(
                folder.path / cell.item / "student", allow_factories=[parse_model(config.student.model).name]
            )
            found = measure_networks(
                {"student": network}, precisions=("float32",), threads=(1,), batches=(1,), seconds=seconds,
                on_step=lambda words, name=name: on_step(f"{name}: {words}") if on_step is not None else None,  # type: ignore[misc]
            )  # fmt: skip
        except MissingDependencyError as error:
            known[name] = {"item": cell.item, "left_out": str(error)}
            continue
        if not found["files"]:
            known[name] = {"item": cell.item, "left_out": found["left_out"]["student"]}
            continue
        (file,) = found["files"]
        (run,) = file["runs"]
        known[name] = {
            "item": cell.item,
            **{k: file[k] for k in ("bytes", "macs", "processor")},
            **{k: run[k] for k in ("threads", "batch", "median_ms", "p95_ms", "peak_bytes")},
        }
    folder.write_devices(known)
    return known
