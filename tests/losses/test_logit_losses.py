"""Every loss on logits against NumPy in float64, at the edges, in every dtype, with its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from krdistill.errors import ArgumentError, DataError
from krdistill.losses import (
    BalancedSoftmax,
    CrossEntropy,
    KDDivergence,
    balanced_softmax,
    cross_entropy,
    kd_divergence,
    lrd_loss,
)
from krdistill.priors import ClassPrior

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def _ce(z: np.ndarray, y: np.ndarray, smoothing: float = 0.0) -> np.ndarray:
    K = z.shape[1]
    return -(((1 - smoothing) * np.eye(K)[y] + smoothing / K) * _log_softmax(z)).sum(1)


def _kd(z_s: np.ndarray, z_t: np.ndarray, T: float) -> np.ndarray:
    s, t = _log_softmax(z_s / T), _log_softmax(z_t / T)
    return T * T * (np.exp(t) * (t - s)).sum(1)


def _lrd(z_s: np.ndarray, z_t: np.ndarray, y: np.ndarray, log_prior: np.ndarray, T: float) -> np.ndarray:
    z = z_t - log_prior
    for i, label in enumerate(y):
        z[i, label] = z[i].max()
    return _kd(z_s, z, T)


def _counts(K: int) -> Tensor:
    return torch.linspace(400, 3, K).round().long()


def _log_prior(K: int) -> Tensor:
    counts = _counts(K).double()
    return (counts / counts.sum()).log()


LOSSES: dict[str, tuple[Loss, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]]] = {
    "cross_entropy": (lambda s, t, y: cross_entropy(s, y), lambda s, t, y: _ce(s, y)),
    "smoothed": (lambda s, t, y: cross_entropy(s, y, label_smoothing=0.1), lambda s, t, y: _ce(s, y, 0.1)),
    "balanced_softmax": (
        lambda s, t, y: balanced_softmax(s, y, _log_prior(s.shape[-1])),
        lambda s, t, y: _ce(s + _log_prior(s.shape[-1]).numpy(), y),
    ),
    "kd": (lambda s, t, y: kd_divergence(s, t), lambda s, t, y: _kd(s, t, 4.0)),
    "kd_T1": (lambda s, t, y: kd_divergence(s, t, temperature=1), lambda s, t, y: _kd(s, t, 1.0)),
    "lrd": (
        lambda s, t, y: lrd_loss(s, t, y, log_prior=_log_prior(s.shape[-1])),
        lambda s, t, y: _lrd(s, t, y, _log_prior(s.shape[-1]).numpy(), 4.0),
    ),
}
loss_names = pytest.mark.parametrize("name", LOSSES)


def _batch(B: int, K: int, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(B * 1000 + K)
    s, t = (scale * torch.randn(B, K, generator=g)).to(dtype), (scale * torch.randn(B, K, generator=g)).to(dtype)
    return s, t, torch.randint(0, K, (B,), generator=g)


def _exact(name: str, s: Tensor, t: Tensor, y: Tensor) -> np.ndarray:
    return LOSSES[name][1](s.detach().double().numpy(), t.detach().double().numpy(), y.numpy())


@loss_names
@pytest.mark.parametrize(("B", "K"), [(32, 10), (1, 10), (8, 2), (1, 2), (4, 8142)])
def test_values_against_numpy(name: str, B: int, K: int) -> None:
    s, t, y = _batch(B, K)
    got = LOSSES[name][0](s, t, y)
    assert got.shape == (B,) and got.dtype == torch.float32
    assert np.allclose(got.numpy(), _exact(name, s, t, y), rtol=2e-5, atol=2e-5)
    doubles = LOSSES[name][0](s.double(), t.double(), y)
    assert doubles.dtype == torch.float64
    assert np.allclose(doubles.numpy(), _exact(name, s, t, y), rtol=1e-11, atol=1e-11)


@loss_names
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("K", [10, 8142])
def test_half_precision_inputs_give_float32_losses(name: str, dtype: torch.dtype, K: int) -> None:
    s, t, y = _batch(6, K, dtype=dtype)
    s.requires_grad_()
    got = LOSSES[name][0](s, t, y)
    assert got.dtype == torch.float32
    assert np.allclose(got.detach().numpy(), _exact(name, s, t, y), rtol=2e-5, atol=2e-5)
    got.sum().backward()
    assert s.grad is not None and s.grad.dtype == dtype and torch.isfinite(s.grad).all()


@loss_names
def test_autocast_does_not_lower_the_precision(name: str) -> None:
    s, t, y = _batch(6, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = LOSSES[name][0](s, t, y)
    assert got.dtype == torch.float32
    assert torch.allclose(got, LOSSES[name][0](s, t, y), rtol=1e-6)


@loss_names
@pytest.mark.parametrize("scale", [1e4, 6e4])
def test_huge_logits_stay_finite_and_right(name: str, scale: float) -> None:
    s, t, y = _batch(16, 10, scale / 4, torch.float16)
    s, t = s.clamp(-scale, scale).requires_grad_(), t.clamp(-scale, scale)
    s.data[0], t[0] = scale, -scale
    s.data[0, int(y[0])], t[0, int(y[0])] = -scale, scale
    got = LOSSES[name][0](s, t, y)
    got.sum().backward()
    assert torch.isfinite(got).all() and s.grad is not None and torch.isfinite(s.grad).all()
    assert np.allclose(got.detach().numpy(), _exact(name, s, t, y), rtol=1e-4, atol=1e-2)


@loss_names
def test_gradients(name: str) -> None:
    s, t, y = _batch(5, 4, dtype=torch.float64)
    s.requires_grad_()
    t.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: LOSSES[name][0](z, t, y), (s,))
    LOSSES[name][0](s, t, y).sum().backward()
    assert t.grad is None
    assert s.grad is not None and torch.allclose(s.grad.sum(1), torch.zeros(5).double(), atol=1e-12)


@loss_names
def test_a_constant_added_to_all_logits_changes_nothing(name: str) -> None:
    s, t, y = _batch(5, 4, dtype=torch.float64)
    assert torch.allclose(LOSSES[name][0](s + 100, t - 40, y), LOSSES[name][0](s, t, y), atol=1e-10)


@loss_names
def test_samples_do_not_see_each_other_and_inputs_stay(name: str) -> None:
    s, t, y = _batch(7, 5)
    copies = s.clone(), t.clone(), y.clone()
    together = LOSSES[name][0](s, t, y)
    alone = torch.cat([LOSSES[name][0](s[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(7)])
    assert torch.allclose(together, alone, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip((s, t, y), copies, strict=True))
    assert LOSSES[name][0](s[:0], t[:0], y[:0]).shape == (0,)


@loss_names
def test_bad_shapes_and_labels_are_refused(name: str) -> None:
    s, t, y = _batch(6, 5)
    loss = LOSSES[name][0]
    with pytest.raises(ArgumentError, match="at least 2 classes"):
        loss(s[:, :1], t[:, :1], y)
    with pytest.raises(ArgumentError, match=r"floating-point tensor of shape \(B, K\)"):
        loss(s[0], t[0], y)
    with pytest.raises(ArgumentError, match="floating-point"):
        loss(s.long(), t, y)
    if name.startswith("kd") or name == "lrd":
        with pytest.raises(ArgumentError, match=r"teacher_logits|log_prior"):
            loss(s, t[:, :4], y)
        with pytest.raises(ArgumentError, match=r"teacher_logits|labels"):
            loss(s, t[:5], y)
    if not name.startswith("kd"):
        with pytest.raises(ArgumentError, match=r"class indices in 0\.\.4, but got 5"):
            loss(s, t, torch.full_like(y, 5))
        with pytest.raises(ArgumentError, match="but got -100"):
            loss(s, t, torch.full_like(y, -100))
        with pytest.raises(ArgumentError, match="labels: expected an integer tensor"):
            loss(s, t, y.float())
        with pytest.raises(ArgumentError, match=r"labels: .* shape \(6,\)"):
            loss(s, t, y.unsqueeze(1))


def test_hand_computed_values() -> None:
    z = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    y = torch.tensor([0, 1])
    assert cross_entropy(z, y).tolist() == pytest.approx([math.log(2), math.log(4)])
    # counts 3 : 1 turn the first row into softmax (3/4, 1/4), the second into (9/10, 1/10)
    log_counts = torch.tensor([3.0, 1.0]).log()
    assert balanced_softmax(z, y, log_counts).tolist() == pytest.approx([math.log(4 / 3), math.log(10)])
    # KL((3/4, 1/4) || (1/2, 1/2)) at T = 1, and with doubled logits at T = 2 four times that
    want = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kd_divergence(z[:1], z[1:], temperature=1).item() == pytest.approx(want, rel=1e-5)
    assert kd_divergence(2 * z[:1], 2 * z[1:], temperature=2).item() == pytest.approx(4 * want, rel=1e-5)


def test_balanced_softmax_with_a_uniform_prior_is_cross_entropy() -> None:
    s, _, y = _batch(9, 6)
    uniform = ClassPrior.from_counts([12] * 6)
    assert torch.allclose(balanced_softmax(s, y, uniform.log_prior), cross_entropy(s, y), atol=1e-6)
    with_counts = balanced_softmax(s, y, _counts(6).double().log())
    assert torch.allclose(with_counts, balanced_softmax(s, y, _log_prior(6)), atol=1e-5)
    with pytest.raises(ArgumentError, match=r"no class without images\), but got -inf for class 1"):
        balanced_softmax(s, y, torch.tensor([1.0, 0, 1, 1, 1, 1]).log())


def test_balanced_softmax_learns_a_balanced_classifier() -> None:
    # Two classes 99 : 1 without any feature: cross-entropy learns the prior, balanced softmax an even answer.
    y = torch.tensor([0] * 99 + [1])
    for loss, want in (
        (cross_entropy, 0.01),
        (lambda z, y: balanced_softmax(z, y, torch.tensor([0.99, 0.01]).log()), 0.5),
    ):
        z = torch.zeros(2, requires_grad=True)
        optimiser = torch.optim.LBFGS([z], max_iter=100, line_search_fn="strong_wolfe")

        def step(z: Tensor = z, loss=loss, optimiser=optimiser) -> Tensor:  # type: ignore[no-untyped-def]
            optimiser.zero_grad()
            value = loss(z.expand(100, 2), y).mean()
            value.backward()
            return value

        optimiser.step(step)
        assert float(z.detach().softmax(0)[1]) == pytest.approx(want, abs=1e-3)


def test_kd_divergence_is_a_divergence() -> None:
    s, t, _ = _batch(50, 7)
    assert torch.equal(kd_divergence(s, s), torch.zeros(50))
    assert (kd_divergence(s, t) > 0).all()
    assert not torch.allclose(kd_divergence(s, t), kd_divergence(t, s), rtol=1e-2)
    values = [kd_divergence(s, t, temperature=T).sum().item() for T in (1, 2, 4, 8)]
    assert len(set(values)) == 4
    # for T to infinity: half the squared distance of the centred logits, divided by K
    limit = ((s - t) - (s - t).mean(1, keepdim=True)).square().mean(1) / 2
    got = kd_divergence(s.double(), t.double(), temperature=1e4)
    assert torch.allclose(got.float(), limit, rtol=1e-2)


def test_kd_gradient_by_formula() -> None:
    s, t, _ = _batch(4, 6, dtype=torch.float64)
    s.requires_grad_()
    kd_divergence(s, t, temperature=3).sum().backward()
    assert s.grad is not None
    assert torch.allclose(s.grad, 3 * ((s / 3).softmax(1) - (t / 3).softmax(1)).detach(), atol=1e-12)


def test_modules_are_their_functions() -> None:
    s, t, y = _batch(9, 6)
    assert torch.equal(CrossEntropy(label_smoothing=0.2)(s, y), cross_entropy(s, y, label_smoothing=0.2))
    assert torch.equal(KDDivergence(temperature=2)(s, t), kd_divergence(s, t, temperature=2))
    module = BalancedSoftmax(_counts(6), label_smoothing=0.1)
    assert torch.equal(module(s, y), balanced_softmax(s, y, _log_prior(6).float(), label_smoothing=0.1))
    assert set(module.state_dict()) == {"log_prior"} and not list(module.parameters())
    assert torch.allclose(
        BalancedSoftmax([3, 1])(s[:, :2], y % 2),
        F.cross_entropy(s[:, :2] + torch.tensor([0.75, 0.25]).log(), y % 2, reduction="none"),
        atol=1e-6,
    )
    assert "0.1" in repr(module) and "temperature=2" in repr(KDDivergence(temperature=2))


def test_bad_hyper_parameters_are_refused_at_construction() -> None:
    for T in (0, -1, math.nan, math.inf, "4", True):
        with pytest.raises(ArgumentError, match="temperature: expected a finite number > 0"):
            KDDivergence(temperature=T)  # type: ignore[arg-type]
    for smoothing in (1, -0.1, math.nan):
        for build in (CrossEntropy, lambda label_smoothing: BalancedSoftmax([1, 2], label_smoothing=label_smoothing)):
            with pytest.raises(ArgumentError, match="label_smoothing: expected a finite number >= 0 and < 1"):
                build(label_smoothing=smoothing)
    with pytest.raises(DataError, match="no training image"):
        BalancedSoftmax([5, 0])


@loss_names
def test_losses_compile_without_a_graph_break(name: str) -> None:
    s, t, y = _batch(4, 5)
    compiled = torch.compile(LOSSES[name][0], backend="eager", fullgraph=True)
    assert torch.allclose(compiled(s, t, y), LOSSES[name][0](s, t, y), atol=1e-6)


@loss_names
def test_checks_read_no_values_off_the_cpu(name: str) -> None:
    # A meta tensor has no values: whatever would wait for a device to read one raises here.
    s, t, y = (x.to("meta") for x in _batch(4, 5))
    assert LOSSES[name][0](s, t, y).shape == (4,)
    with pytest.raises(ArgumentError, match=r"labels|teacher_logits"):
        LOSSES[name][0](s, t[:3], y[:3])
