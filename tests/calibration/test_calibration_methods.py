"""What each method fits, against independent references and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.isotonic import IsotonicRegression
from torch.nn import functional as F

from krdistill.calibration import METHODS, Calibrator, FeatureEvidence, fit_calibrator
from krdistill.calibration.temperature import HIGHEST, LOWEST
from krdistill.errors import ArgumentError

NEEDED = ("temperature", "balanced-temperature", "vector", "ets", "isotonic", "histogram")


def long_tailed(N: int = 400, K: int = 8, *, seed: int = 0, sure: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Overconfident logits and labels of which the last class has one row."""
    rng = np.random.default_rng(seed)
    y = np.minimum(rng.exponential(K / 5, N).astype(int), K - 2)
    y[0] = K - 1
    z = rng.normal(size=(N, K))
    z[np.arange(N), y] += 1.5
    return sure * z, y


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def nll(p: np.ndarray, y: np.ndarray) -> float:
    return float(-np.log(p[np.arange(len(y)), y]).mean())


def evidence_for(y: np.ndarray, K: int, D: int = 6) -> FeatureEvidence:
    rng = np.random.default_rng(5)
    train_y = np.repeat(np.arange(K), np.maximum(60 // (1 + np.arange(K)) ** 2, 1))
    centres = rng.normal(size=(K, D))
    return FeatureEvidence(
        centres[y] + 0.5 * rng.normal(size=(len(y), D)),
        centres[train_y] + 0.3 * rng.normal(size=(len(train_y), D)),
        train_y,
    )


def test_temperature_by_hand() -> None:
    # Three of four images right at logits (a, 0): the likeliest softmax is 3/4, so a / T = log 3.
    logits, labels = np.array([[2.0, 0.0]] * 4), np.array([0, 0, 0, 1])
    T = fit_calibrator("temperature", logits, labels).parameters["temperature"]
    assert pytest.approx(2.0 / math.log(3.0), abs=1e-12) == T


def test_temperature_against_torch_lbfgs() -> None:
    z, y = long_tailed()
    log_T = torch.zeros((), dtype=torch.float64, requires_grad=True)
    descent = torch.optim.LBFGS(
        [log_T], max_iter=200, tolerance_grad=1e-14, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        descent.zero_grad()
        loss = F.cross_entropy(torch.from_numpy(z) / log_T.exp(), torch.from_numpy(y))
        loss.backward()
        return loss

    descent.step(closure)
    found = fit_calibrator("temperature", z, y).parameters["temperature"]
    assert found == pytest.approx(float(log_T.detach().exp()), rel=1e-6)
    assert found > 2.0


@pytest.mark.parametrize("factor", [0.1, 7.0])
def test_temperature_follows_the_scale_of_the_logits(factor: float) -> None:
    z, y = long_tailed(sure=1.0)
    one, other = (fit_calibrator("temperature", v, y).parameters["temperature"] for v in (z, factor * z))
    assert other == pytest.approx(factor * one, rel=1e-9)


def test_balanced_temperature_is_that_of_a_balanced_part() -> None:
    z, y = long_tailed(60, 3)
    counts = np.bincount(y)
    times = np.lcm.reduce(counts) // counts
    even = fit_calibrator("temperature", np.repeat(z, times[y], 0), np.repeat(y, times[y]))
    found = fit_calibrator("balanced-temperature", z, y)
    assert found.parameters["temperature"] == pytest.approx(even.parameters["temperature"], rel=1e-9)
    assert found.parameters["temperature"] != fit_calibrator("temperature", z, y).parameters["temperature"]


def test_temperature_ends_at_its_bounds() -> None:
    right, y = 5.0 * np.eye(3)[[0, 1, 2, 0]], np.array([0, 1, 2, 0])
    assert fit_calibrator("temperature", right, y).parameters["temperature"] == LOWEST
    assert fit_calibrator("temperature", right, (y + 1) % 3).parameters["temperature"] == HIGHEST
    assert fit_calibrator("temperature", np.zeros((4, 3)), y).parameters["temperature"] == 1.0


def test_vector_against_a_search_without_gradients() -> None:
    z, y = long_tailed(120, 3)
    T = fit_calibrator("temperature", z, y).parameters["temperature"]
    x = np.log(softmax(z))

    def loss(v: np.ndarray) -> float:
        w, b = v[:3], v[3:]
        return nll(softmax(x * w + b), y) * len(y) + 0.5 * ((T * w - 1) ** 2).sum() + 0.5 * (b**2).sum()

    found = fit_calibrator("vector", z, y).parameters
    mine = np.array(found["scale"] + found["offset"])
    best = minimize(
        loss,
        np.r_[np.ones(3) / T, np.zeros(3)],
        method="Nelder-Mead",
        options={"maxiter": 20000, "fatol": 1e-12, "xatol": 1e-10},
    )
    assert loss(mine) <= best.fun + 1e-8
    assert mine == pytest.approx(best.x, abs=1e-3)


def test_vector_ignores_a_constant_on_all_logits() -> None:
    z, y = long_tailed()
    moved = z + np.random.default_rng(1).normal(size=(len(z), 1)) * 10
    one, other = fit_calibrator("vector", z, y), fit_calibrator("vector", moved, y)
    assert one(z) == pytest.approx(other(moved), abs=1e-5)


def test_ets_shares_satisfy_the_optimality_conditions() -> None:
    z, y = long_tailed(seed=3)
    found = fit_calibrator("ets", z, y).parameters
    w, rows = np.array(found["weights"]), np.arange(len(y))
    parts = np.stack(
        [softmax(z / found["temperature"])[rows, y], softmax(z)[rows, y], np.full(len(y), 1 / z.shape[1])], 1
    )
    gain = (parts / (parts @ w)[:, None]).mean(
        0
    )  # of a mixture's likelihood: at most 1, and 1 where the share is not 0
    assert w.sum() == pytest.approx(1.0)
    assert gain.max() <= 1 + 1e-4
    assert gain[w > 1e-3] == pytest.approx(1.0, abs=1e-3)
    assert found["temperature"] == fit_calibrator("temperature", z, y).parameters["temperature"]


def test_isotonic_against_scikit_learn() -> None:
    z, y = long_tailed()
    p = softmax(z)
    expected = np.stack(
        [
            IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(p[:, k], y == k).predict(p[:, k])
            for k in range(8)
        ],
        1,
    )
    expected += 1e-3 * p
    got = fit_calibrator("isotonic", z, y)(z)
    assert got == pytest.approx(expected / expected.sum(1, keepdims=True), abs=1e-12)
    beyond = np.array([[30.0] + [0.0] * 7, [-30.0] + [0.0] * 7])
    assert np.isfinite(fit_calibrator("isotonic", z, y)(beyond)).all()


def test_histogram_by_hand() -> None:
    # Class 0's probability is 0.9 three times (right twice) and 0.5 once (right): bins 13 and 7 of 15.
    p = np.array([[0.9, 0.1]] * 3 + [[0.5, 0.5]])
    labels = np.array([0, 0, 1, 0])
    values = fit_calibrator("histogram", np.log(p), labels).parameters["values"]
    assert values[0][13] == pytest.approx(2 / 3)
    assert values[0][7] == 1.0
    assert values[1][1] == pytest.approx(1 / 3)
    assert values[0][3] == pytest.approx(3.5 / 15)  # empty: its middle
    q = np.array([2 / 3 + 1e-3 * 0.9, 1 / 3 + 1e-3 * 0.1])
    assert fit_calibrator("histogram", np.log(p), labels)(np.log(p))[0] == pytest.approx(q / q.sum())


@pytest.mark.parametrize("method", [m for m in METHODS if m != "none"])
def test_overconfidence_is_lessened(method: str) -> None:
    z, y = long_tailed(4000, seed=1)
    fresh, truth = long_tailed(4000, seed=2)
    fitted = fit_calibrator(method, z, y, evidence=evidence_for(y, 8))
    assert nll(fitted(fresh), truth) < nll(softmax(fresh), truth) - 0.1


@pytest.mark.parametrize("method", ["none", "temperature", "balanced-temperature", "head-to-tail", "ets"])
def test_the_predicted_class_stays(method: str) -> None:
    z, y = long_tailed()
    fresh = long_tailed(seed=9)[0]
    fitted = fit_calibrator(method, z, y, evidence=evidence_for(y, 8))
    assert (fitted(fresh).argmax(1) == fresh.argmax(1)).all()


def test_vector_scaling_may_change_the_predicted_class() -> None:
    z = np.array([[1.0, 0.0]] * 10)
    fitted = fit_calibrator("vector", z, np.array([1] * 9 + [0]))
    assert fitted(z).argmax(1).tolist() == [1] * 10


@pytest.mark.parametrize("method", NEEDED)
def test_rows_in_another_order_fit_the_same(method: str) -> None:
    z, y = long_tailed()
    order = np.random.default_rng(4).permutation(len(y))
    one, other = fit_calibrator(method, z, y), fit_calibrator(method, z[order], y[order])
    assert one(z) == pytest.approx(other(z), abs=1e-5)
    assert fit_calibrator(method, z, y).as_dict() == one.as_dict()


@pytest.mark.parametrize("method", NEEDED)
def test_classes_in_another_order_fit_the_same(method: str) -> None:
    z, y = long_tailed()
    order = np.random.default_rng(6).permutation(8)
    place = np.argsort(order)
    one, other = fit_calibrator(method, z, y), fit_calibrator(method, z[:, order], place[y])
    assert one(z)[:, order] == pytest.approx(other(z[:, order]), abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", ["absent", "perfect", "one row", "huge"])
def test_hard_cases_give_probabilities(method: str, case: str) -> None:
    z, y = long_tailed()
    if case == "absent":
        y = np.where(y >= 5, 0, y)
    elif case == "perfect":
        z = 40.0 * np.eye(8)[y]
    elif case == "one row":
        z, y = z[:1], y[:1]
    else:
        z = 1e6 * z
    fitted = fit_calibrator(method, z, y, evidence=evidence_for(y, 8))
    p = fitted(long_tailed(seed=9)[0])
    assert np.isfinite(p).all() and (p >= 0).all()
    assert p.sum(1) == pytest.approx(1.0)
    if method in ("vector", "isotonic", "histogram"):
        assert (p[:, 6] > 0).all()  # a class that was never seen can still be answered


@pytest.mark.parametrize("method", NEEDED)
def test_what_cannot_be_fitted_to_is_refused(method: str) -> None:
    z, y = long_tailed()
    broken = z.copy()
    broken[7, 2] = np.nan
    with pytest.raises(ArgumentError, match=r"1 of 400 rows hold NaN or infinity \(the first is row 7\)"):
        fit_calibrator(method, broken, y)
    with pytest.raises(ArgumentError, match=r"class indices in 0..7, got 0 to 8"):
        fit_calibrator(method, z, np.r_[y[:-1], 8])
    with pytest.raises(ArgumentError, match="at least one row"):
        fit_calibrator(method, z[:0], y[:0])
    with pytest.raises(ArgumentError, match="400 whole numbers"):
        fit_calibrator(method, z, y[:-1])
    with pytest.raises(ArgumentError, match="at least 2 classes"):
        fit_calibrator(method, z[:, :1], y)


def test_an_unknown_method_is_named() -> None:
    z, y = long_tailed()
    with pytest.raises(ArgumentError, match="Did you mean 'temperature'"):
        fit_calibrator("temprature", z, y)
    with pytest.raises(ArgumentError, match="Did you mean 'vector'"):
        Calibrator("vectors", 3, {})
