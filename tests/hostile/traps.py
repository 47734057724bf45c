"""A small run, and what leaves a mark where anything runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"source": "digits", "profile": "exp", "imbalance_factor": 10, "groups": "thirds", "n_max": 40},
    "teacher": {"model": "resnet8w8"},
    "student": {"model": "resnet8w8"},
    "train": {"epochs": 1, "batch_size": 32, "augmentation": "crop-only", "evaluate_every": 1},
    "recipe": "kd",
    "export": {"onnx": False},
}


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)
