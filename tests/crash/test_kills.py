"""Runs that are killed again and again come to what a run comes to that nobody stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(600)  # of one busy core
@pytest.mark.skipif(sys.platform == "darwin", reason="processes are forked off after torch is imported")
def test_killed_runs_end_the_same(tmp_path: Path) -> None:
    result = tmp_path / "crash.json"
    command = [sys.executable, str(Path(__file__).with_name("harness.py")), "--kills", "25", "--json", str(result)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=560, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(result.read_text())
    assert found["kills"] == 25 and found["runs_that_differ"] == {}
    stages = {"opening", "teacher", "diagnosis", "bank", "baselines/kd", "student", "evaluation", "report"}
    assert set(found["by_stage"]) == stages and sum(n > 0 for n in found["by_stage"].values()) >= 6
