"""Calibration errors and proper scores, against torchmetrics, scikit-learn and by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from sklearn import metrics as reference
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from krdistill.errors import ArgumentError
from krdistill.evaluation import evaluate_calibration, evaluate_predictions
from krdistill.evaluation.calibration import MEASURES, adaptive_error
from krdistill.priors import ClassGroups


def groups_of(K: int) -> ClassGroups:
    return ClassGroups(("head", "medium", "tail"), torch.arange(K) * 3 // K, "thirds by class index")


ONE = ClassGroups(("all",), torch.zeros(2, dtype=torch.int64), "all")


def made_up(N: int = 500, K: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    y = torch.randint(K, (N,), generator=gen)
    z = 2 * torch.randn(N, K, generator=gen, dtype=torch.float64)
    z[torch.arange(N), y] += 1.5
    return z, y


@pytest.mark.parametrize("bins", [5, 15])
def test_against_torchmetrics_and_scikit_learn(bins: int) -> None:
    z, y = made_up()
    p = z.softmax(1)
    got = evaluate_calibration(p, y, groups_of(6), bins=bins)
    assert got["ece"] == pytest.approx(float(multiclass_calibration_error(p, y, 6, n_bins=bins, norm="l1")), abs=1e-7)
    by_class = [float(binary_calibration_error(p[:, k], (y == k).long(), n_bins=bins, norm="l1")) for k in range(6)]
    assert got["classwise_ece"] == pytest.approx(np.mean(by_class), abs=1e-7)
    brier = sum(reference.brier_score_loss((y == k).int(), p[:, k]) for k in range(6))
    assert got["brier"] == pytest.approx(brier)
    assert got["nll"] == pytest.approx(reference.log_loss(y, p))
    assert got["top1"] == pytest.approx(reference.accuracy_score(y, p.argmax(1)))
    assert got["confidence"] == pytest.approx(float(p.amax(1).mean()))
    for g, name in enumerate(("head", "medium", "tail")):
        mine = (y * 3 // 6) == g
        row, q, t = got["groups"][name], p[mine], y[mine]
        expected = float(multiclass_calibration_error(q, t, 6, n_bins=bins, norm="l1"))
        assert row["ece"] == pytest.approx(expected, abs=1e-7)
        assert row["classwise_ece"] == pytest.approx(np.mean(by_class[2 * g : 2 * g + 2]), abs=1e-7)
        assert row["nll"] == pytest.approx(reference.log_loss(t, q, labels=range(6)))
        assert row["images"] == int(mine.sum())
    json.dumps(got, allow_nan=False)


def test_it_agrees_with_the_metrics_of_a_run() -> None:
    z, y = made_up()
    got = evaluate_calibration(z.softmax(1), y, groups_of(6))
    known = evaluate_predictions(z, y, groups_of(6), class_names=list("abcdef"))
    assert got["ece"] == pytest.approx(known["ece"], abs=1e-9)
    assert got["nll"] == pytest.approx(known["nll"])
    for name, row in known["groups"].items():
        assert got["groups"][name]["ece"] == pytest.approx(row["ece"], abs=1e-9)


def test_by_hand() -> None:
    # Confidence 0.85 twice (one right), 0.62 twice (both right); class 1 is true in rows 1 and 3.
    p = np.array([[0.85, 0.15], [0.85, 0.15], [0.62, 0.38], [0.38, 0.62]])
    y = np.array([0, 1, 0, 1])
    got = evaluate_calibration(p, y, ONE, bins=5)
    assert got["ece"] == pytest.approx(0.5 * 0.35 + 0.5 * 0.38)
    # Class 0: bins of 0.85 (share right 1/2), 0.62 (1), 0.38 (0); class 1 the mirror image of it.
    assert got["classwise_ece"] == pytest.approx(0.5 * 0.35 + 0.25 * 0.38 + 0.25 * 0.38)
    assert got["brier"] == pytest.approx((2 * 0.15**2 + 2 * 0.85**2 + 4 * 0.38**2) / 4)
    assert got["nll"] == pytest.approx(-(math.log(0.85) + math.log(0.15) + 2 * math.log(0.62)) / 4)
    assert got["groups"]["all"]["ece"] == pytest.approx(got["ece"])


def test_balanced_ece_weighs_classes_alike() -> None:
    # Class 0 has three images, all right; class 1 one, taken for 0; every confidence is 0.9.
    p, y = np.array([[0.9, 0.1]] * 4), np.array([0, 0, 0, 1])
    got = evaluate_calibration(p, y, ONE)
    assert got["ece"] == pytest.approx(0.15)
    assert got["balanced_ece"] == pytest.approx(0.4)  # as of one right and one wrong
    z, y2 = made_up(600)
    z, y2 = z[y2.argsort()], y2.sort().values
    rows = torch.cat([(y2 == k).nonzero()[:50, 0] for k in range(6)])
    even = evaluate_calibration(z[rows].softmax(1), y2[rows], groups_of(6))
    assert even["balanced_ece"] == pytest.approx(even["ece"], abs=1e-9)


def test_adaptive_error_by_hand() -> None:
    confidence = np.array([0.2, 0.9, 0.3, 0.8])
    correct = np.array([True, True, False, False])
    # Bins {0.2, 0.3} and {0.8, 0.9}: |1 - 0.5| / 4 + |1 - 1.7| / 4.
    assert adaptive_error(confidence, correct, 2) == pytest.approx((0.5 + 0.7) / 4)
    assert adaptive_error(confidence, correct, 1) == pytest.approx(abs(2 - 2.2) / 4)
    assert adaptive_error(confidence, correct, 9) == pytest.approx((0.8 + 0.3 + 0.8 + 0.1) / 4)


def test_adaptive_error_does_not_depend_on_the_order_of_equal_confidences() -> None:
    rng = np.random.default_rng(0)
    confidence, correct = rng.choice([0.3, 0.6, 0.9], 200), rng.random(200) < 0.5
    order = rng.permutation(200)
    assert adaptive_error(confidence, correct) == pytest.approx(adaptive_error(confidence[order], correct[order]))


def test_what_is_calibrated_has_little_error() -> None:
    rng = np.random.default_rng(2)
    p = rng.dirichlet(np.ones(6), 40_000)
    y = (p.cumsum(1) > rng.random(40_000)[:, None]).argmax(1)
    good = evaluate_calibration(p, y, groups_of(6))
    sharp = p**2 / (p**2).sum(1, keepdims=True)
    bad = evaluate_calibration(sharp, y, groups_of(6))
    for key in ("ece", "balanced_ece", "adaptive_ece"):
        assert good[key] < 0.01 < 0.1 < bad[key]
    for key in MEASURES:
        assert good[key] < bad[key]


def test_groups_without_images_and_certainty() -> None:
    p = np.eye(3)[[0, 1, 0]]
    got = evaluate_calibration(p, np.array([0, 1, 1]), groups_of(3))
    assert got["groups"]["tail"] is None
    assert got["ece"] == pytest.approx(1 / 3)
    assert got["brier"] == pytest.approx(2 / 3)
    assert got["nll"] == pytest.approx(-math.log(2.0**-149) / 3)  # impossible by float32's account


def test_what_is_no_probability_is_refused() -> None:
    z, y = made_up(20)
    p = z.softmax(1).numpy()
    with pytest.raises(ArgumentError, match="Give probabilities, not logits"):
        evaluate_calibration(z, y, groups_of(6))
    broken = p.copy()
    broken[4] = np.nan
    with pytest.raises(ArgumentError, match=r"1 of 20 rows are none \(the first is row 4\)"):
        evaluate_calibration(broken, y, groups_of(6))
    with pytest.raises(ArgumentError, match="expected shape"):
        evaluate_calibration(p[:0], y[:0], groups_of(6))
    with pytest.raises(ArgumentError, match=r"class indices in 0..5, but got 6"):
        evaluate_calibration(p, torch.full((20,), 6), groups_of(6))
    with pytest.raises(ArgumentError, match="groups of 6 classes"):
        evaluate_calibration(p, y, groups_of(3))
