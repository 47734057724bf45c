"""A finished run's folder, at hand in every test here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from synthetic_run import MakeRun, build_run

from krdistill.reporting import write_report


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(name: str = "a-run", **options: Any) -> Path:
        return build_run(tmp_path / name, **{"epochs": 5, **options})

    return make


@pytest.fixture
def lean_run(make_run: MakeRun) -> Path:
    """A run whose page has few figures, for tests that are not about them."""
    run = make_run(baselines=["kd"])
    for name in ("log.jsonl", "predictions.npz", "teacher/diagnosis.json"):
        (run / name).unlink()
    return run


@pytest.fixture(scope="session")
def reported_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with its report; not to be changed."""
    run = build_run(tmp_path_factory.mktemp("runs") / "whole")
    write_report(run)
    return run
