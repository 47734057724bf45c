from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from krdistill.errors import ArgumentError, DataError
from krdistill.rectify import blend_features, class_means, rarity, transfer_variance, within_class_variation

K, D, N = 4, 6, 200
COUNTS = [120, 60, 15, 5]


def _features(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.repeat_interleave(torch.arange(K), torch.tensor(COUNTS))
    centre = 3 * torch.randn(K, D, generator=g, dtype=torch.float64)
    noise = torch.randn(N, D, generator=g, dtype=torch.float64) * torch.tensor([2.0, 1.5, 1, 0.5, 0.1, 0])
    f = (centre[y] + noise).to(dtype)
    return f, y, class_means(f, y, K)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_variation_is_the_second_moment_in_loops() -> None:
    f, y, means = _features()
    basis, s = within_class_variation(f, y, means)
    total = np.zeros((D, D))
    for row, k in zip(_unit(f.numpy()), y.tolist(), strict=True):
        total += np.outer(row - means[k].numpy(), row - means[k].numpy()) / N
    assert np.allclose((basis * s) @ basis.T, total, atol=1e-12)
    assert torch.allclose(basis.T @ basis, torch.eye(D, dtype=torch.float64))
    assert bool((s >= 0).all()) and bool((s[1:] >= s[:-1]).all())


def test_variation_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    f, y, means = _features()
    _, whole = within_class_variation(f, y, means)
    monkeypatch.setattr("krdistill.rectify.variance_transfer._CHUNK_ROWS", 7)
    assert torch.allclose(within_class_variation(f, y, means)[1], whole)


def test_it_is_the_posterior_mean_of_a_gaussian() -> None:
    """Against the textbook form, Sigma (Sigma + nu I)^-1, solved row by row."""
    f, y, means = _features()
    basis, s = within_class_variation(f, y, means)
    strength = rarity(COUNTS, 0.9)
    got = transfer_variance(f, y, means, basis, s, strength)
    cov = ((basis * s) @ basis.T).numpy()
    for i in range(0, N, 9):
        share, m = float(strength[y[i]]), means[y[i]].numpy()
        nu = s.mean().item() * share / (1 - share)
        want = m + cov @ np.linalg.solve(cov + nu * np.eye(D), _unit(f[i].numpy()) - m) if nu else f[i].numpy()
        assert np.allclose(got[i].numpy(), _unit(want), atol=1e-10)


def test_draws_from_the_posterior_cost_a_constant_more_than_their_mean() -> None:
    """The closed form: the expected squared distance differs from the mean's by a number that no student changes."""
    f, y, means = _features()
    basis, s = (x.numpy() for x in within_class_variation(f, y, means))
    share, m, x = 0.4, means[3].numpy(), _unit(f[-1].numpy())
    nu = s.mean() * share / (1 - share)
    gain = s / (s + nu)
    mean = m + basis @ (gain * (basis.T @ (x - m)))
    draws = mean + (np.random.default_rng(0).normal(size=(200_000, D)) * np.sqrt(gain * nu)) @ basis.T
    extra = [
        np.square(student - draws).sum(1).mean() - np.square(student - mean).sum()
        for student in (x, m, _unit(np.ones(D)))
    ]
    assert extra == pytest.approx([(gain * nu).sum()] * 3, abs=5e-3)


def test_the_head_keeps_its_features_and_equal_counts_keep_all() -> None:
    f, y, means = _features()
    variation = within_class_variation(f, y, means)
    got = transfer_variance(f, y, means, *variation, rarity(COUNTS))
    head = y == 0
    assert torch.allclose(got[head], F.normalize(f[head]))
    assert not torch.allclose(got[~head], F.normalize(f[~head]), atol=1e-3)
    same = transfer_variance(f, y, means, *variation, rarity([9] * K))
    assert torch.allclose(same, F.normalize(f))


def test_equal_variances_are_a_blend_with_the_class_means() -> None:
    f, y, means = _features()
    strength = rarity(COUNTS, 0.8)
    got = transfer_variance(f, y, means, torch.eye(D), torch.full((D,), 0.3), strength)
    assert torch.allclose(got, blend_features(f, y, means, strength))


def test_the_limits() -> None:
    f, y, means = _features()
    basis, s = within_class_variation(f, y, means)
    everything = transfer_variance(f, y, means, basis, s, torch.ones(K))
    assert torch.allclose(everything, means[y])
    still = transfer_variance(f, y, means, basis, torch.zeros(D), torch.zeros(K))
    assert torch.allclose(still, F.normalize(f))
    nothing_varies = torch.tensor([0.0, 0, 0, 0, 0, 1])
    one_way = transfer_variance(f, y, means, torch.eye(D), nothing_varies, torch.full((K,), 0.5))
    assert bool(torch.isfinite(one_way).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_is_float32_at_least_also_under_autocast(dtype: torch.dtype) -> None:
    f, y, means = _features(dtype)
    basis, s = within_class_variation(f, y, means.float())
    exact = transfer_variance(f.double(), y, means.double(), basis, s, rarity(COUNTS))
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            got = transfer_variance(f, y, means, basis, s, rarity(COUNTS))
        assert got.dtype == torch.float32
        assert torch.allclose(got.double(), exact, atol=1e-5)


def test_gradients() -> None:
    f, y, means = _features()
    variation = within_class_variation(f, y, means)
    x = f[-6:].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: transfer_variance(x, y[-6:], means, *variation, rarity(COUNTS)), (x,))


def test_what_does_not_fit_is_refused() -> None:
    f, y, means = _features()
    basis, s = within_class_variation(f, y, means)
    share = rarity(COUNTS)
    with pytest.raises(ArgumentError, match=r"class_means: expected shape \(K, D\) = \(4, 6\)"):
        transfer_variance(f, y, means[:, :5], basis, s, share)
    with pytest.raises(ArgumentError, match=r"basis: expected shape \(D, D\) = \(6, 6\)"):
        transfer_variance(f, y, means, basis[:5], s, share)
    with pytest.raises(ArgumentError, match="variances: expected finite numbers >= 0"):
        transfer_variance(f, y, means, basis, s - 9, share)
    with pytest.raises(ArgumentError, match=r"strength: expected numbers in \[0, 1\]"):
        transfer_variance(f, y, means, basis, s, share + 1)
    with pytest.raises(ArgumentError, match=r"class indices in 0\.\.3"):
        transfer_variance(f, y + 1, means, basis, s, share)
    with pytest.raises(DataError, match="at least one image"):
        within_class_variation(f[:0], y[:0], means)
    with pytest.raises(ArgumentError, match="features: expected finite numbers"):
        within_class_variation(f * float("nan"), y, means)
    with pytest.raises(ArgumentError, match="class_means"):
        within_class_variation(f, y, means[:, 1:])
