from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor, nn

from krdistill.errors import ArgumentError, DataError, ModelError
from krdistill.losses.ldam import NormedLinear
from krdistill.rectify import refit_classifier
from krdistill.rectify.second_stage import METHODS, TAUS, apply_second_stage, choose_tau, crt, lws, ncm, tau_norm

K, D = 8, 24


def _sample(counts: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Gaussian classes around fixed centres, sparse and positive like features after a ReLU."""
    gen = torch.Generator().manual_seed(0)
    centres = 1.5 * torch.rand(K, D, generator=gen) * (torch.rand(K, D, generator=gen) < 0.4)
    y = torch.repeat_interleave(torch.tensor(counts))
    noise = torch.randn(len(y), D, generator=torch.Generator().manual_seed(seed))
    return (centres[y] + 0.55 * noise).relu(), y


@lru_cache
def _problem() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Long-tailed training part, balanced held-out part, balanced test part."""
    return _sample([600, 250, 110, 48, 21, 12, 8, 5], 1), _sample([30] * K, 2), _sample([200] * K, 3)


@lru_cache
def _plain() -> tuple[Tensor, Tensor]:
    """The plain head: cross-entropy on the long-tailed data with weight decay, by an independent solver."""
    (f, y), _, _ = _problem()
    fit = LogisticRegression(C=0.1, max_iter=2000).fit(f.numpy(), y.numpy())
    return torch.from_numpy(fit.coef_).float(), torch.from_numpy(fit.intercept_).float()


def _layer(bias: bool = True) -> nn.Linear:
    layer = nn.Linear(D, K, bias=bias)
    weight, offset = _plain()
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias:
            layer.bias.copy_(offset)
    return layer


def _balanced_accuracy(weight: Tensor, bias: Tensor | None = None, part: int = 2) -> float:
    f, y = _problem()[part]
    logits = f @ weight.T if bias is None else f @ weight.T + bias
    return float(balanced_accuracy_score(y.numpy(), logits.argmax(1).numpy()))


def test_every_method_is_better_balanced_than_the_plain_head() -> None:
    train, held_out, _ = _problem()
    plain = _balanced_accuracy(*_plain())
    assert plain < 0.6
    options = {"crt": {"batch_size": 64}, "lws": {"batch_size": 64}, "tau-norm": {"held_out": held_out}}
    for method in METHODS:
        layer = _layer()
        record = apply_second_stage(layer, method, *train, **options.get(method, {}))  # type: ignore[arg-type]
        after = _balanced_accuracy(layer.weight.detach(), layer.bias.detach())
        assert after > plain + 0.2, (method, plain, after)
        assert record == ({"tau": pytest.approx(record["tau"])} if method == "tau-norm" else {})


def test_crt_reaches_the_optimum_of_the_class_balanced_problem() -> None:
    """Against an independent solver: weighted cross-entropy with the same L2 penalty on weight and bias."""
    (f, y), _, _ = _problem()
    f, penalty = f.double(), 0.05
    weight, bias = crt(f, y, K, epochs=120, batch_size=32, lr=0.3, momentum=0.0, weight_decay=penalty)
    assert weight.dtype == bias.dtype == torch.float64
    w = (1 / torch.bincount(y).double())[y] / K
    x = torch.cat([f, torch.ones(len(f), 1)], 1).numpy()
    exact = LogisticRegression(C=1 / penalty, fit_intercept=False, tol=1e-8, max_iter=5000)
    exact.fit(x, y.numpy(), sample_weight=w.numpy())

    def objective(matrix: np.ndarray) -> float:
        logits = torch.from_numpy(x @ matrix.T)
        nll = nn.functional.cross_entropy(logits, y, reduction="none")
        return float((w * nll).sum()) + 0.5 * penalty * float((matrix**2).sum())

    found, best = objective(torch.cat([weight, bias.unsqueeze(1)], 1).numpy()), objective(exact.coef_)
    assert best <= found < best + 0.01 * (math.log(K) - best)


def test_crt_steps_against_gradient_descent_by_hand() -> None:
    """Equal counts, one batch: every step is the full gradient, at lr, 3/4 lr and 1/4 lr, with momentum and decay."""
    f, y = _sample([5] * K, 4)
    f = f.double()
    weight, bias = crt(f, y, K, epochs=3, lr=0.4, momentum=0.5, weight_decay=0.1)
    W, b = torch.zeros(K, D).double(), torch.zeros(K).double()
    vW, vb = torch.zeros_like(W), torch.zeros_like(b)
    for lr in (0.4, 0.3, 0.1):
        error = ((f @ W.T + b).softmax(1) - nn.functional.one_hot(y, K)) / len(y)
        vW, vb = 0.5 * vW + error.T @ f + 0.1 * W, 0.5 * vb + error.sum(0) + 0.1 * b
        W, b = W - lr * vW, b - lr * vb
    torch.testing.assert_close(weight, W)
    torch.testing.assert_close(bias, b)


def test_crt_is_deterministic_and_takes_every_option() -> None:
    (f, y), _, _ = _problem()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    settings = {"epochs": 2, "batch_size": 64}
    base = crt(f, y, K, **settings)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    again = crt(f, y, K, **settings)  # type: ignore[arg-type]
    assert torch.equal(base[0], again[0]) and torch.equal(base[1], again[1])
    for change in (
        {"seed": 1},
        {"epochs": 3},
        {"lr": 0.1},
        {"batch_size": 100},
        {"momentum": 0.5},
        {"weight_decay": 0.01},
        {"bias": False},
    ):
        other = crt(f, y, K, **{**settings, **change})  # type: ignore[arg-type]
        assert not torch.equal(other[0], base[0]), change
    assert bool((crt(f, y, K, bias=False, **settings)[1] == 0).all()) and bool((base[1] != 0).any())
    with torch.no_grad():
        assert torch.equal(crt(f, y, K, **settings)[0], base[0])  # type: ignore[arg-type]
    assert not base[0].requires_grad


def test_crt_sees_every_class_equally_often() -> None:
    """Features that say nothing: the bias alone is fitted, and ends at equal probabilities."""
    y = torch.repeat_interleave(torch.tensor([500, 40, 3]))
    _, bias = crt(torch.zeros(len(y), 2), y, 3, batch_size=64, epochs=20)
    torch.testing.assert_close(bias.softmax(0), torch.full((3,), 1 / 3), rtol=0, atol=0.01)


def test_tau_norm() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
    assert torch.equal(tau_norm(weight, 0), weight)
    torch.testing.assert_close(tau_norm(weight, 1), torch.tensor([[0.6, 0.8], [0.0, 1.0], [0.0, 0.0]]))
    torch.testing.assert_close(tau_norm(weight, 2), torch.tensor([[0.12, 0.16], [0.0, 0.5], [0.0, 0.0]]))
    w = torch.randn(20, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(tau_norm(w, 0.7).norm(dim=1), w.norm(dim=1) ** 0.3)
    assert tau_norm(w.half(), 0.5).dtype == torch.float32
    assert not tau_norm(w.requires_grad_(), 0.5).requires_grad


def test_choose_tau_is_the_best_by_balanced_accuracy() -> None:
    _, held_out, _ = _problem()
    weight, _ = _plain()
    scores = [_balanced_accuracy(tau_norm(weight, tau), part=1) for tau in TAUS]
    assert TAUS[0] == 0 and TAUS[-1] == 2 and len(TAUS) == 21
    tau = choose_tau(weight, *held_out)
    assert tau == TAUS[scores.index(max(scores))] and tau > 0
    assert choose_tau(weight, *held_out, taus=[1.5, 0.0, 0.4]) == max(
        (0.0, 0.4, 1.5), key=lambda t: (_balanced_accuracy(tau_norm(weight, t), part=1), -t)
    )


def test_choose_tau_counts_classes_not_rows_and_leaves_absent_classes_out() -> None:
    """Tau 0 is right on the many rows of class 0, tau 1 on the few of the others."""
    weight = torch.tensor([[10.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    f = torch.cat([torch.tensor([[1.0, 1.5]]).repeat(50, 1), torch.tensor([[1.0, 1.2]])])
    y = torch.tensor([0] * 50 + [1])
    assert choose_tau(weight, f, y, taus=[0.0, 1.0]) == 0.0  # 1/2 each: the smaller
    f = torch.cat([f, torch.tensor([[1.0, -1.2]])])
    y = torch.cat([y, torch.tensor([2])])
    assert choose_tau(weight, f, y, taus=[0.0, 1.0]) == 1.0  # 2/3 against 1/3, though 2 rows of 52


def test_lws_learns_the_scales_and_nothing_else() -> None:
    (f, y), _, _ = _problem()
    weight, bias = _plain()
    copy = weight.clone()
    scales = lws(weight, bias, f, y, batch_size=64)
    assert scales.shape == (K,) and torch.equal(weight, copy) and not scales.requires_grad
    assert torch.equal(scales, lws(weight, bias, f, y, batch_size=64))
    for change in ({"seed": 1}, {"epochs": 2}, {"lr": 0.02}, {"batch_size": 50}, {"momentum": 0}, {"weight_decay": 0}):
        assert not torch.equal(lws(weight, bias, f, y, **{"batch_size": 64, **change}), scales), change  # type: ignore[arg-type]

    def balanced_loss(s: Tensor) -> float:
        nll = nn.functional.cross_entropy(s * (f @ weight.T + bias), y, reduction="none")
        return float(torch.stack([nll[y == k].mean() for k in range(K)]).mean())

    assert balanced_loss(scales) < balanced_loss(torch.ones(K)) - 0.05
    tiny = lws(weight, bias, f, y, lr=1e-9, epochs=1)
    torch.testing.assert_close(tiny, torch.ones(K), rtol=0, atol=1e-5)


def test_ncm_is_the_nearest_class_mean_by_cosine() -> None:
    (f, y), _, (test, _) = _problem()
    weight = ncm(f, y, K)
    unit = f.double().numpy() / np.linalg.norm(f.double().numpy(), axis=1, keepdims=True)
    means = np.stack([unit[y.numpy() == k].mean(0) for k in range(K)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(weight.numpy(), means, atol=1e-6)
    for row, choice in zip(test[:100].double().numpy(), (test @ weight.T).argmax(1).tolist(), strict=False):
        distance = np.linalg.norm(means - row / np.linalg.norm(row), axis=1)
        assert distance[choice] <= distance.min() + 1e-6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_apply_puts_the_result_into_the_layer(method: str, bias: bool) -> None:
    (f, y), held_out, _ = _problem()
    layer = _layer(bias)
    parameter, old = layer.weight, layer.weight.detach().clone()
    offset = layer.bias.detach().clone() if bias else None
    options = {"epochs": 1, "batch_size": 64, "seed": 3} if method in ("crt", "lws") else {}
    if method == "tau-norm":
        options = {"tau": 0.5}  # type: ignore[dict-item]
    record = apply_second_stage(layer, method, f, y, **options)  # type: ignore[arg-type]
    assert layer.weight is parameter and layer.weight.requires_grad and (layer.bias is not None) == bias
    zero = torch.zeros(K)
    if method == "balanced-softmax":
        weight, expected = refit_classifier(f, y, K, bias=bias)
        assert bias or not bool(expected.any())
    elif method == "crt":
        weight, expected = crt(f, y, K, bias=bias, **options)
    elif method == "lws":
        scales = lws(old, offset, f, y, **options)
        weight, expected = scales.unsqueeze(1) * old, scales * offset if offset is not None else zero
    elif method == "tau-norm":
        assert record == {"tau": 0.5}
        weight, expected = tau_norm(old, 0.5), zero
        again = _layer(bias)
        assert apply_second_stage(again, "tau-norm", f, y, held_out=held_out, taus=[0.3])["tau"] == 0.3
        torch.testing.assert_close(again.weight.detach(), tau_norm(old, 0.3))
    else:
        weight, expected = ncm(f, y, K), zero
    assert torch.equal(layer.weight.detach(), weight)
    if bias:
        assert torch.equal(layer.bias.detach(), expected)


def test_apply_keeps_the_layer_s_dtype() -> None:
    (f, y), _, _ = _problem()
    layer = _layer().half()
    apply_second_stage(layer, "lws", f, y, epochs=1)
    apply_second_stage(layer, "ncm", f.double(), y)
    assert layer.weight.dtype == layer.bias.dtype == torch.float16


def test_two_classes_and_half_precision_features() -> None:
    f = torch.cat([torch.randn(90, 3, generator=torch.Generator().manual_seed(0)) + 2, -2 * torch.ones(10, 3)]).half()
    y = torch.tensor([0] * 90 + [1] * 10)
    weight, bias = crt(f, y, 2, batch_size=10)
    assert weight.dtype == torch.float32 and weight.shape == (2, 3)
    assert bool(((f.float() @ weight.T + bias).argmax(1) == y)[90:].all())
    assert lws(weight, bias, f, y).dtype == torch.float32 and ncm(f, y, 2).dtype == torch.float32


def test_bad_input() -> None:
    (f, y), held_out, _ = _problem()
    weight, bias = _plain()
    with pytest.raises(ArgumentError, match="features"):
        crt(f[0], y, K)
    with pytest.raises(ArgumentError, match="features: expected finite"):
        crt(f * math.nan, y, K)
    with pytest.raises(ArgumentError, match="labels"):
        crt(f, y, K - 1)
    with pytest.raises(DataError, match="1 of 9 classes have no row: class 8"):
        crt(f, y, K + 1)
    for change, match in (
        ({"epochs": 0}, "epochs"),
        ({"lr": 0}, "lr"),
        ({"batch_size": 0}, "batch_size"),
        ({"momentum": 1}, "momentum"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(ArgumentError, match=match):
            crt(f, y, K, **change)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="diverged"):
        crt(1e30 * f, y, K, lr=1e30, epochs=1)
    with pytest.raises(ArgumentError, match="weight"):
        lws(weight[0], bias, f, y)
    with pytest.raises(ArgumentError, match="bias"):
        lws(weight, bias[:3], f, y)
    with pytest.raises(ArgumentError, match="features"):
        lws(weight, bias, f[:, :5], y)
    with pytest.raises(ArgumentError, match="tau"):
        tau_norm(weight, -0.1)
    for taus in ([], "0.5", 0.5, [0.1, -1]):
        with pytest.raises(ArgumentError, match="taus"):
            choose_tau(weight, *held_out, taus=taus)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no row"):
        choose_tau(weight, f[:0], y[:0])
    with pytest.raises(DataError, match="no image"):
        ncm(f, y, K + 1)


def test_apply_refuses_what_it_cannot_do() -> None:
    (f, y), held_out, _ = _problem()
    with pytest.raises(ArgumentError, match="method"):
        apply_second_stage(_layer(), "finetune", f, y)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="NormedLinear"):
        apply_second_stage(NormedLinear(D, K), "crt", f, y)
    with pytest.raises(ModelError, match="Conv1d"):
        apply_second_stage(nn.Conv1d(1, 1, 1), "crt", f, y)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="features"):
        apply_second_stage(_layer(), "crt", f[:, :3], y)
    with pytest.raises(ArgumentError, match=r"'lws' takes epochs, .* but got tau"):
        apply_second_stage(_layer(), "lws", f, y, tau=1.0)
    with pytest.raises(ArgumentError, match="bias"):
        apply_second_stage(_layer(), "crt", f, y, bias=False)
    with pytest.raises(ArgumentError, match="takes none"):
        apply_second_stage(_layer(), "ncm", f, y, epochs=3)
    with pytest.raises(ArgumentError, match="neither"):
        apply_second_stage(_layer(), "tau-norm", f, y)
    with pytest.raises(ArgumentError, match="both"):
        apply_second_stage(_layer(), "tau-norm", f, y, tau=1.0, held_out=held_out)
    with pytest.raises(ArgumentError, match="held_out"):
        apply_second_stage(_layer(), "tau-norm", f, y, held_out=f)
