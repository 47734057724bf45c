"""The examples run as a stranger runs them, and what they print is better than chance."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
# Example: packages that must be there.
RUNS: dict[str, list[str]] = {
    "image_folder.py": [],
    "cifar_lt.py": [],
    "text.py": [],
    "black_box_teacher.py": [],
    "device.py": ["onnx", "onnxruntime", "onnxscript"],
    "own_loop.py": [],
    "lightning_module.py": ["pytorch_lightning"],
    "hf_trainer.py": ["transformers", "accelerate"],
}
# CIFAR is not at hand everywhere, and takes minutes: the same script on digits, by its own overrides.
ARGUMENTS = {
    "cifar_lt.py": [
        "--data.source", "digits", "--data.imbalance_factor", "20", "--data.groups", "thirds", "--train.epochs", "8",
        "--teacher.model", "mlp64", "--student.model", "mlp32", "--train.augmentation", "crop-only",
        "--train.lr", "0.1", "--name", "small", "--export.onnx", "false",
    ],
}  # fmt: skip
LEAVES = {"cifar_lt.py": {"runs"}}


def test_every_example_is_run_and_described() -> None:
    found = {path.name for path in EXAMPLES.glob("*.py")}
    assert found == set(RUNS)
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(\w+\.py)`", readme)) == found


@pytest.mark.parametrize("name", RUNS)
def test_an_example_is_short_and_says_what_it_is_not(name: str) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 50
    header = text.split('"""')[1]
    assert "not a paper's" in " ".join(header.split()) and f"python examples/{name}" in header


@pytest.mark.parametrize("name", RUNS)
def test_an_example_learns(name: str, tmp_path: Path) -> None:
    for package in RUNS[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{name} needs {package}, which is not installed")
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *ARGUMENTS.get(name, [])],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    accuracies = dict(re.findall(r"^(\w+): balanced accuracy ([0-9.]+)$", done.stdout, flags=re.MULTILINE))
    assert "student" in accuracies, done.stdout
    # Ten classes: chance is 0.1 whatever the prior, as is the answer "always the commonest class".
    assert all(0.25 < float(accuracy) <= 1 for accuracy in accuracies.values()), accuracies
    left = {path.name for path in tmp_path.iterdir()} - {"hf"} - LEAVES.get(name, set())
    assert not left, f"the example left {left} behind"
