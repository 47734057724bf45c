"""The fitted object: stored, read back, applied to arrays and tensors and to an exported file's probabilities."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from krdistill.calibration import METHODS, Calibrator, FeatureEvidence, fit_calibrator
from krdistill.errors import ArgumentError, ModelError


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    return 3.0 * np.random.default_rng(1).normal(size=(50, 5))


@pytest.fixture(scope="module")
def fitted() -> dict[str, Calibrator]:
    rng = np.random.default_rng(0)
    z, y = 2.0 * rng.normal(size=(300, 5)), rng.integers(0, 4, 300)  # the last class is absent
    z[np.arange(300), y] += 2.0
    f = rng.normal(size=(300, 3))
    return {m: fit_calibrator(m, z, y, evidence=FeatureEvidence(f, f, y)) for m in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_stored_and_read_back(method: str, fitted: dict[str, Calibrator], logits: np.ndarray, tmp_path: Path) -> None:
    fitted[method].save(tmp_path / "c.json")
    read = Calibrator.load(tmp_path / "c.json")
    assert read == fitted[method]
    assert (read(logits) == fitted[method](logits)).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_tensors_are_answered_as_arrays(
    method: str, dtype: torch.dtype, fitted: dict[str, Calibrator], logits: np.ndarray
) -> None:
    z = torch.from_numpy(logits).to(dtype)
    p = fitted[method](z)
    assert isinstance(p, torch.Tensor) and p.dtype == torch.float64
    assert p.numpy() == pytest.approx(fitted[method](z.numpy()), abs=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_probabilities_suffice(method: str, fitted: dict[str, Calibrator], logits: np.ndarray) -> None:
    p = torch.from_numpy(logits).softmax(1).float()
    assert fitted[method].from_probabilities(p.numpy()) == pytest.approx(fitted[method](logits), abs=1e-5)
    sure = np.array([[1.0, 0.0, 0.0, 0.0, 0.0]], dtype=np.float32)  # float32 rounded the others to 0
    assert np.isfinite(fitted[method].from_probabilities(sure)).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_row_of_nan_stays_nan(method: str, fitted: dict[str, Calibrator], logits: np.ndarray) -> None:
    z = logits.copy()
    z[3] = np.nan
    for p in (fitted[method](z), fitted[method](torch.from_numpy(z)).numpy()):
        assert np.isnan(p[3]).all()
        assert np.isfinite(np.delete(p, 3, axis=0)).all()


@pytest.mark.parametrize("method", ["temperature", "vector", "ets"])
def test_gradients_flow_to_the_logits(method: str, fitted: dict[str, Calibrator]) -> None:
    z = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(fitted[method], (z,))


@pytest.mark.parametrize(
    ("method", "parameters", "expected"),
    [
        ("temperature", {}, "a temperature above 0"),
        ("temperature", {"temperature": -1.0}, "a temperature above 0"),
        ("head-to-tail", {"temperature": float("nan")}, "a temperature above 0"),
        ("ets", {"temperature": 1.0, "weights": [0.5, 0.6, 0.0]}, "three weights"),
        ("vector", {"scale": [1.0, 1.0], "offset": [0.0]}, "scale and offset of 2 numbers"),
        ("isotonic", {"knots": [{"at": [0.5, 0.1], "value": [0.0, 1.0]}] * 2}, "knots of 2 classes, ascending"),
        ("histogram", {"values": [[0.5], [2.0]]}, "values of 2 classes"),
        ("none", None, "a mapping"),
    ],
)
def test_damaged_parameters_are_refused(method: str, parameters: Any, expected: str) -> None:
    with pytest.raises(ArgumentError, match=expected):
        Calibrator.from_dict({"method": method, "num_classes": 2, "parameters": parameters})


def test_other_files_and_shapes_are_refused(tmp_path: Path, fitted: dict[str, Calibrator]) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"method": "temperature"}))
    with pytest.raises(ModelError, match=r"c.json is no calibrator \(A calibrator has method"):
        Calibrator.load(tmp_path / "c.json")
    with pytest.raises(ModelError, match="no calibrator"):
        Calibrator.load(tmp_path / "missing.json")
    with pytest.raises(ArgumentError, match=r"K = 5, got \(2, 4\)"):
        fitted["vector"](np.zeros((2, 4)))


def test_applying_one_imports_neither_torch_nor_scipy() -> None:
    code = (
        "import sys, numpy as np\nfrom krdistill.calibration import Calibrator\n"
        "c = Calibrator('isotonic', 2, {'knots': [{'at': [0.1, 0.9], 'value': [0.0, 1.0]}] * 2})\n"
        "p = c.from_probabilities(np.array([[0.75, 0.25]], dtype=np.float32))\n"
        "assert abs(p.sum() - 1) < 1e-9 and p[0, 0] > 0.75, p\n"
        "heavy = {'torch', 'scipy', 'sklearn'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
