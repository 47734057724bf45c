from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from krdistill.errors import ArgumentError, DataError
from krdistill.priors import ClassPrior
from krdistill.rectify import auto_tau, mean_prediction, remove_prior

PRIOR = ClassPrior.from_counts([1000, 300, 100, 30, 10])


def _softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def _biased_teacher(tau: float, per_class: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Evenly good on every class, then biased by ``tau`` times the log prior: the right answer is ``tau``.

    Class k's samples are those of class 0 with the classes turned round by k, so without bias every class is answered
    with exactly the same confidence.
    """
    K = PRIOR.num_classes
    base = np.random.default_rng(seed).normal(size=(per_class, K)) + 2.0 * np.eye(K)[0]
    z = np.concatenate([np.roll(base, k, axis=1) for k in range(K)]) + tau * PRIOR.log_prior.numpy()
    return torch.from_numpy(z), torch.arange(K).repeat_interleave(per_class)


def _spread(z: Tensor, y: Tensor, tau: float) -> float:
    p = _softmax(z.double().numpy() - tau * PRIOR.log_prior.numpy())
    labels = y.numpy()
    return float(np.std([p[labels == k, k].mean() for k in sorted(set(labels.tolist()))]))


def test_remove_prior_is_its_formula() -> None:
    z = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    got = remove_prior(z, PRIOR.log_prior, 0.7)
    assert got.dtype == torch.float32
    assert np.allclose(got.numpy(), z.numpy() - 0.7 * np.log(np.array([1000, 300, 100, 30, 10]) / 1440), atol=1e-6)
    assert torch.equal(remove_prior(z, PRIOR.log_prior, 0.0), z)
    assert torch.allclose(remove_prior(got, PRIOR.log_prior, -0.7), z, atol=1e-5)
    assert torch.allclose(remove_prior(z, PRIOR.log_prior), remove_prior(z, PRIOR.log_prior, 1.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_remove_prior_is_float32_at_least(dtype: torch.dtype) -> None:
    z = torch.tensor([[60000.0, 1.0, -3.0, 0.5, 2.0]]).to(dtype)
    got = remove_prior(z, PRIOR.log_prior, 2.0)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(got.double(), z.double() - 2 * PRIOR.log_prior, rtol=1e-6)


def test_a_uniform_prior_changes_no_prediction() -> None:
    z = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    got = remove_prior(z, ClassPrior.from_counts([9] * 4).log_prior, 1.3)
    assert torch.allclose(got.softmax(1), z.softmax(1), atol=1e-6)


def test_remove_prior_lets_gradients_through_and_leaves_its_input() -> None:
    z = torch.zeros(2, 5, requires_grad=True)
    remove_prior(z, PRIOR.log_prior, 1.0).sum().backward()
    assert z.grad is not None and torch.equal(z.grad, torch.ones(2, 5))
    assert not z.detach().any()


def test_remove_prior_refuses_what_does_not_fit() -> None:
    z = torch.zeros(2, 5)
    with pytest.raises(ArgumentError, match=r"log_prior: expected a floating-point tensor of shape \(K,\) = \(5,\)"):
        remove_prior(z, PRIOR.log_prior[:4])
    with pytest.raises(ArgumentError, match=r"no class without images\), but got -inf for class 2"):
        remove_prior(z, torch.tensor([1.0, 1, 0, 1, 1]).log())
    with pytest.raises(ArgumentError, match=r"logits: expected a floating-point tensor of shape \(B, K\)"):
        remove_prior(z[0], PRIOR.log_prior)
    with pytest.raises(ArgumentError, match="dtype int64"):
        remove_prior(z.long(), PRIOR.log_prior)
    for tau in (float("nan"), float("inf"), "auto", None):
        with pytest.raises(ArgumentError, match="tau: expected a finite number"):
            remove_prior(z, PRIOR.log_prior, tau)  # type: ignore[arg-type]


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0, 1.234, 2.9])
def test_auto_tau_finds_the_bias_put_in(tau: float) -> None:
    z, y = _biased_teacher(tau)
    assert auto_tau(z, y, PRIOR.log_prior) == pytest.approx(tau, abs=2e-3)
    assert auto_tau(z.float(), y, PRIOR.log_prior) == pytest.approx(tau, abs=2e-3)


@pytest.mark.parametrize("seed", range(4))
def test_auto_tau_against_brute_force(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 5, (80,), generator=g)
    z = torch.randn(80, 5, generator=g) * 2 + torch.nn.functional.one_hot(y, 5) + 1.2 * PRIOR.log_prior.float()
    found = auto_tau(z, y, PRIOR.log_prior)
    grid = np.linspace(0, 3, 1501)
    values = [_spread(z, y, t) for t in grid]
    assert _spread(z, y, found) <= min(values) + 1e-9
    assert found == pytest.approx(grid[int(np.argmin(values))], abs=3e-3)


def test_auto_tau_bounds_absent_classes_and_no_effect() -> None:
    z, y = _biased_teacher(1.0)
    assert auto_tau(z, y, PRIOR.log_prior, bounds=(0.0, 0.5)) == pytest.approx(0.5, abs=1e-4)
    assert auto_tau(z, y, PRIOR.log_prior, bounds=(1.5, 2)) == pytest.approx(1.5, abs=1e-4)
    some = (y != 1) & (y != 3)
    assert _spread(z[some], y[some], auto_tau(z[some], y[some], PRIOR.log_prior)) < 1e-3
    uniform = ClassPrior.from_counts([4] * 5).log_prior
    assert auto_tau(z, y, uniform) == 0.0
    assert auto_tau(z, y, uniform, bounds=(0.5, 1)) == 0.5
    assert auto_tau(z, y, PRIOR.log_prior) == auto_tau(z, y, PRIOR.log_prior)


def test_auto_tau_does_not_depend_on_sample_order_or_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    z, y = _biased_teacher(0.8)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    whole = auto_tau(z, y, PRIOR.log_prior)
    assert auto_tau(z[order], y[order], PRIOR.log_prior) == pytest.approx(whole, abs=1e-4)
    mean = mean_prediction(z, y)
    monkeypatch.setattr("krdistill.rectify.prior_removal._CHUNK_VALUES", 35)
    assert auto_tau(z, y, PRIOR.log_prior) == pytest.approx(whole, abs=1e-4)
    assert torch.allclose(mean_prediction(z, y), mean, atol=1e-12)


def test_auto_tau_with_huge_logits_is_finite() -> None:
    z, y = _biased_teacher(1.0)
    assert 0 <= auto_tau(z * 1e4, y, PRIOR.log_prior) <= 3


def test_mean_prediction_balances_classes() -> None:
    rng = np.random.default_rng(0)
    y = np.array([0] * 30 + [1] * 5 + [3] * 2)
    z = rng.normal(size=(37, 5)) * 3
    want = np.mean([_softmax(z[y == k]).mean(0) for k in (0, 1, 3)], axis=0)
    got = mean_prediction(torch.from_numpy(z).float(), torch.from_numpy(y))
    assert got.dtype == torch.float64 and got.device.type == "cpu"
    assert np.allclose(got.numpy(), want, atol=1e-7)
    assert float(got.sum()) == pytest.approx(1)
    assert torch.allclose(mean_prediction(torch.zeros(4, 5), torch.arange(4)), torch.full((5,), 0.2).double())


@pytest.mark.parametrize("function", [mean_prediction, lambda z, y: auto_tau(z, y, PRIOR.log_prior)])
def test_statistics_refuse_bad_input(function) -> None:  # type: ignore[no-untyped-def]
    z, y = _biased_teacher(1.0)
    with pytest.raises(DataError, match="NaN or infinity"):
        function(torch.where(torch.arange(5) == 2, float("nan"), z), y)
    with pytest.raises(ArgumentError, match=r"class indices in 0\.\.4, but got 5"):
        function(z, y + 1)
    with pytest.raises(ArgumentError, match=r"shape \(300,\)"):
        function(z, y[:-1])
    with pytest.raises(ArgumentError, match="integer tensor"):
        function(z, y.float())
    with pytest.raises(DataError, match="at least"):
        function(z[:0], y[:0])


def test_auto_tau_refuses_one_class_and_bad_bounds() -> None:
    z, y = _biased_teacher(1.0)
    with pytest.raises(DataError, match="at least 2 classes, but got 1"):
        auto_tau(z[:10], y[:10], PRIOR.log_prior)
    for bounds in ((1.0, 1.0), (2, 1), (0, float("inf")), (0, 1, 2), 3.0):
        with pytest.raises(ArgumentError, match="bounds"):
            auto_tau(z, y, PRIOR.log_prior, bounds=bounds)  # type: ignore[arg-type]
