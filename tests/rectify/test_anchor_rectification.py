from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from krdistill.anchors import align_anchors, balanced_anchors
from krdistill.errors import ArgumentError, DataError
from krdistill.rectify import blend_features, class_means, rarity, recentre_features


def _norm(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _data(N: int = 60, K: int = 5, D: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(N) % K
    f = torch.randn(N, D, generator=g) + 3 * torch.randn(K, D, generator=g)[y]
    means = class_means(f, y, K)
    return f, y, means, align_anchors(balanced_anchors(K, D), means)


def test_class_means_against_numpy() -> None:
    f, y, means, _ = _data()
    unit = _norm(f.double().numpy())
    want = _norm(np.stack([unit[y.numpy() == k].mean(0) for k in range(5)]))
    assert means.dtype == torch.float32
    assert np.allclose(means.numpy(), want, atol=1e-7)
    assert np.allclose(class_means(f.double(), y, 5).numpy(), want, atol=1e-14)
    assert torch.allclose(class_means(1000 * f, y, 5), means, atol=1e-6)  # a feature's length does not count
    assert class_means(f.to(torch.bfloat16), y, 5).dtype == torch.float32


def test_class_means_in_pieces_and_without_touching_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    f, y, means, _ = _data()
    f64, copy = f.double(), f.double().clone()
    monkeypatch.setattr("krdistill.rectify.anchor_rectification._CHUNK_ROWS", 7)
    assert torch.allclose(class_means(f64, y, 5).float(), means, atol=1e-6)
    assert torch.equal(f64, copy)


def test_class_means_name_what_is_missing() -> None:
    f, y, _, _ = _data()
    with pytest.raises(DataError, match=r"2 of 7 classes have no image.*class 5, 6\."):
        class_means(f, y, 7)
    g = f.clone()
    g[y == 2] = 0
    with pytest.raises(DataError, match=r"1 of 5 classes have features that cancel out or are zero.*class 2\."):
        class_means(g, y, 5)
    g[y == 2] = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0]) * torch.tensor([1.0, -1] * 6).unsqueeze(1)
    with pytest.raises(DataError, match="cancel out"):
        class_means(g, y, 5)
    with pytest.raises(ArgumentError, match="features: expected finite numbers, but row 3 holds"):
        class_means(torch.where(torch.arange(60).unsqueeze(1) == 3, math.nan, f), y, 5)
    with pytest.raises(ArgumentError, match="num_classes"):
        class_means(f, y, 1)
    with pytest.raises(ArgumentError, match=r"class indices in 0\.\.3, but got 4"):
        class_means(f, y, 4)


def test_recentre_against_numpy_and_by_hand() -> None:
    f, y, means, anchors = _data()
    want = _norm(_norm(f.numpy()) - means.numpy()[y] + anchors.numpy()[y])
    got = recentre_features(f, y, means, anchors)
    assert np.allclose(got.numpy(), want, atol=1e-6)
    assert torch.allclose(recentre_features(7 * means, torch.arange(5), means, anchors), anchors, atol=1e-6)
    assert torch.allclose(recentre_features(f, y, means, means), torch.nn.functional.normalize(f, dim=1), atol=1e-6)


def test_recentred_class_means_are_balanced() -> None:
    # Features lean to a common direction, as after a ReLU; recentred, the classes stand evenly apart.
    g = torch.Generator().manual_seed(1)
    K, D = 5, 16
    y = torch.arange(500) % K
    f = torch.relu(torch.randn(K, D, generator=g) + 1)[y] + 0.1 * torch.randn(500, D, generator=g)
    means = class_means(f, y, K)
    after = class_means(recentre_features(f, y, means, align_anchors(balanced_anchors(K, D), means)), y, K)
    off = ~torch.eye(K, dtype=torch.bool)
    assert float((means @ means.T)[off].min()) > 0.3
    assert torch.allclose((after @ after.T)[off], torch.tensor(-0.25), atol=0.02)


def test_blend_against_numpy_and_limits() -> None:
    f, y, _, anchors = _data()
    strength = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    share = strength.numpy()[y][:, None]
    want = _norm((1 - share) * _norm(f.numpy()) + share * anchors.numpy()[y])
    got = blend_features(f, y, anchors, strength)
    assert np.allclose(got.numpy(), want, atol=1e-6)
    assert torch.allclose(got[y == 0], torch.nn.functional.normalize(f[y == 0], dim=1), atol=1e-6)
    assert torch.allclose(got[y == 4], anchors[4].expand(12, -1), atol=1e-6)


def test_rarity_by_hand() -> None:
    assert rarity([100, 50, 1]).tolist() == [0.0, 0.25, 0.495]
    assert rarity(torch.tensor([100, 50, 1]), 1.0).tolist() == [0.0, 0.5, 0.99]
    assert rarity([3, 3], 0.8).tolist() == [0.0, 0.0]
    assert rarity([3, 1], 0).tolist() == [0.0, 0.0]
    assert rarity([3, 1]).dtype == torch.float64
    for strength in (-0.1, 1.1, math.nan):
        with pytest.raises(ArgumentError, match="strength: expected a finite number >= 0 and <= 1"):
            rarity([3, 1], strength)
    with pytest.raises(DataError, match="no training image"):
        rarity([3, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_zero_features(dtype: torch.dtype) -> None:
    f, y, means, anchors = _data()
    half = f.to(dtype)
    half[0] = 0
    strength = torch.full((5,), 0.5, dtype=torch.float64)
    for got, exact in (
        (recentre_features(half, y, means, anchors), recentre_features(half.double(), y, means, anchors)),
        (blend_features(half, y, anchors, strength), blend_features(half.double(), y, anchors, strength)),
    ):
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.isfinite(got).all()
        assert torch.allclose(got.double(), exact, atol=1e-6)


def test_one_image_and_shapes_that_do_not_fit() -> None:
    f, y, means, anchors = _data()
    one = recentre_features(f[:1], y[:1], means, anchors)
    assert torch.allclose(one, recentre_features(f, y, means, anchors)[:1], atol=1e-6)
    with pytest.raises(ArgumentError, match="anchors: expected the width of the features, 8, but got 7"):
        recentre_features(f, y, means, anchors[:, :7])
    with pytest.raises(ArgumentError, match=r"class_means: expected shape \(K, D\) = \(5, 8\)"):
        recentre_features(f, y, means[:4], anchors)
    with pytest.raises(ArgumentError, match=r"class indices in 0\.\.4, but got 5"):
        blend_features(f, y + 1, anchors, torch.zeros(5))
    with pytest.raises(ArgumentError, match=r"strength: expected numbers in \[0, 1\], but got 1\.5 for class 3"):
        blend_features(f, y, anchors, torch.tensor([0, 0, 0, 1.5, 0]))
    with pytest.raises(ArgumentError, match=r"strength: .* shape \(K,\) = \(5,\)"):
        blend_features(f, y, anchors, torch.zeros(4))
