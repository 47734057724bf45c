"""Head-to-tail calibration step by step: against plain loops, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from krdistill.calibration import FeatureEvidence, fit_calibrator
from krdistill.calibration.head_to_tail import (
    HEAVIEST,
    LIGHTEST,
    ClassStatistics,
    class_statistics,
    head_classes,
    importance_weights,
    transferred_statistics,
)
from krdistill.calibration.temperature import best_temperature
from krdistill.errors import ArgumentError

COUNTS = (40, 25, 12, 3, 1)


def training(D: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(5), COUNTS)
    return rng.normal(size=(5, D))[y] + rng.normal(size=(len(y), D)) * (0.5 + 0.2 * y[:, None]), y


def test_statistics_by_hand() -> None:
    f, y = np.array([[0.0], [2.0], [5.0]]), np.array([0, 0, 1])
    found = class_statistics(f, y, 3)
    within = 2 / 3  # squares 1 + 1 + 0 over three rows
    assert found.mean[:, 0].tolist() == [1.0, 5.0, 0.0]
    assert found.deviation[:, 0] ** 2 == pytest.approx([(2 + within) / 3, within / 2, within])
    assert found.counts.tolist() == [2, 1, 0]


def test_statistics_come_near_the_plain_ones_with_many_images() -> None:
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, 20_000)
    f = rng.normal(size=(20_000, 3)) * np.array([1.0, 2.0])[y][:, None]
    found = class_statistics(f, y, 2)
    for k in range(2):
        assert found.mean[k] == pytest.approx(f[y == k].mean(0))
        assert found.deviation[k] == pytest.approx(f[y == k].std(0), rel=1e-3)


def test_the_head_is_two_fifths_of_the_classes_with_images() -> None:
    assert head_classes(np.array([1.0, 9, 5, 5, 0])).tolist() == [False, True, True, False, False]
    assert head_classes(np.array([3.0, 3.0])).tolist() == [True, False]
    assert head_classes(500.0 / np.arange(1, 11)).sum() == 4  # as in the paper's demonstration


def test_transfer_against_plain_loops() -> None:
    known = class_statistics(*training(), 5)
    head = np.array([True, True, False, False, False])
    moved = transferred_statistics(known, head, alpha=0.7)
    for j in (2, 3, 4):
        d = [
            ((known.mean[j] - known.mean[i]) ** 2).sum() + ((known.deviation[j] - known.deviation[i]) ** 2).sum()
            for i in (0, 1)
        ]
        a = np.exp(-np.array(d) / np.sqrt(4))
        a /= a.sum()
        assert moved.mean[j] == pytest.approx(0.7 * known.mean[j] + 0.3 * (a[0] * known.mean[0] + a[1] * known.mean[1]))
        mixed = a[0] * known.deviation[0] + a[1] * known.deviation[1]
        assert moved.deviation[j] == pytest.approx(0.7 * known.deviation[j] + 0.3 * mixed)
    assert (moved.mean[:2] == known.mean[:2]).all() and (moved.deviation[:2] == known.deviation[:2]).all()
    same = transferred_statistics(known, head, alpha=1.0)
    assert (same.mean == known.mean).all()


def test_weights_against_scipy() -> None:
    f, y = training()
    known = class_statistics(f, y, 5)
    moved = transferred_statistics(known, head_classes(known.counts), alpha=0.9)
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 5, 60)
    seen = known.mean[labels] + rng.normal(size=(60, 4))
    got = importance_weights(seen, labels, known, moved)
    for i, k in enumerate(labels):
        ratio = norm.pdf(seen[i], moved.mean[k], moved.deviation[k]) / norm.pdf(
            seen[i], known.mean[k], known.deviation[k]
        )
        assert got[i] == pytest.approx(np.clip(ratio.prod(), 0.3, 5.0))
    assert (got[labels < 2] == 1.0).all()
    assert ((got >= LIGHTEST) & (got <= HEAVIEST)).all() and len(set(got[labels >= 2])) > 10


def test_weights_are_clipped_and_dead_features_left_out() -> None:
    one = np.array([[1.0, 0.0]])
    known = ClassStatistics(np.array([[0.0, 3.0]]), one, np.array([5.0]))
    moved = ClassStatistics(np.array([[1.0, 3.0]]), one, np.array([5.0]))
    features, labels = np.array([[0.5, 9.0], [60.0, 9.0], [-60.0, 9.0]]), np.zeros(3, dtype=np.int64)
    assert importance_weights(features, labels, known, moved) == pytest.approx([1.0, HEAVIEST, LIGHTEST])


def test_the_temperature_is_the_weighted_one() -> None:
    f, y = training()
    rng = np.random.default_rng(7)
    labels = rng.integers(0, 5, 80)
    logits = 4 * rng.normal(size=(80, 5)) + 3 * np.eye(5)[labels]
    seen = rng.normal(size=(80, 4))
    known = class_statistics(f, y, 5)
    weights = importance_weights(seen, labels, known, transferred_statistics(known, head_classes(known.counts)))
    found = fit_calibrator("head-to-tail", logits, labels, evidence=FeatureEvidence(seen, f, y)).parameters
    assert found["temperature"] == best_temperature(logits, labels, weights)
    assert found["mean_weight"] == pytest.approx(weights[labels >= 2].mean())

    def loss(T: float) -> float:
        z = logits / T
        return float(weights @ (np.log(np.exp(z).sum(1)) - z[np.arange(80), labels]))

    assert loss(found["temperature"]) < min(loss(found["temperature"] * 1.01), loss(found["temperature"] / 1.01))


def test_weights_repeat_rows() -> None:
    """An image of weight 3 counts as three images."""
    rng = np.random.default_rng(8)
    z, y = 3 * rng.normal(size=(30, 4)), rng.integers(0, 4, 30)
    times = rng.integers(1, 4, 30)
    assert best_temperature(z, y, times.astype(float)) == pytest.approx(
        best_temperature(np.repeat(z, times, 0), np.repeat(y, times)), rel=1e-9
    )


def test_without_features_it_is_refused() -> None:
    z, y = np.eye(3), np.arange(3)
    empty = FeatureEvidence(np.zeros((3, 0)), np.zeros((9, 0)), np.arange(9) % 3)
    for evidence in (None, empty):
        with pytest.raises(ArgumentError, match="expected features of the validation and the training"):
            fit_calibrator("head-to-tail", z, y, evidence=evidence)
    with pytest.raises(ArgumentError, match="as many columns as train_features"):
        fit_calibrator(
            "head-to-tail", z, y, evidence=FeatureEvidence(np.ones((3, 2)), np.ones((9, 3)), np.arange(9) % 3)
        )
    with pytest.raises(ArgumentError, match="features: 1 of 3 rows hold NaN"):
        broken = np.array([[1.0], [np.nan], [2.0]])
        fit_calibrator("head-to-tail", z, y, evidence=FeatureEvidence(broken, np.ones((9, 1)), np.arange(9) % 3))


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 4], [0, 0, 1, 1, 1]])
def test_one_image_per_class_and_heads_alone(labels: list[int]) -> None:
    f, y = training()
    first = [int(np.flatnonzero(y == k)[0]) for k in range(5)]
    z, seen = 3 * np.eye(5) + 0.1, f[first]
    z[1] = z[0]
    fitted = fit_calibrator("head-to-tail", z, np.array(labels), evidence=FeatureEvidence(seen, f[first], np.arange(5)))
    assert 0.05 <= fitted.parameters["temperature"] <= 20.0
    assert (fitted.parameters["mean_weight"] is None) == (max(labels) < 2)
