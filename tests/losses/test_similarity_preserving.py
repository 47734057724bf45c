from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from krdistill.errors import ArgumentError
from krdistill.losses.similarity_preserving import SimilarityPreserving, similarity_preserving_loss


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _similarity(x: Tensor) -> np.ndarray:
    q = x.double().numpy().reshape(len(x), -1)
    g = np.array([[sum(a * b for a, b in zip(u, v, strict=True)) for v in q] for u in q])
    return g / np.sqrt((g**2).sum(1, keepdims=True))


@pytest.mark.parametrize("shapes", [((6, 5), (6, 9)), ((4, 2, 3, 3), (4, 5, 2, 2)), ((3, 4), (3, 2, 3, 1))])
def test_follows_the_paper(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    s, t = _randn(*shapes[0]), _randn(*shapes[1], seed=1)
    difference = _similarity(s) - _similarity(t)
    loss = similarity_preserving_loss(s, t)
    np.testing.assert_allclose(loss, (difference**2).sum(1) / len(s), rtol=1e-9)
    assert float(loss.mean()) == pytest.approx((difference**2).sum() / len(s) ** 2)  # ||.||_F^2 / b^2
    assert torch.equal(SimilarityPreserving()(s, t, torch.zeros(len(s))), loss)


def test_by_hand() -> None:
    s = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # all different: similarity is the unit matrix
    t = torch.tensor([[1.0], [2.0]])  # all alike: every normalised row is (1, 2) / sqrt 5
    r = 1 / math.sqrt(5)
    expected = torch.tensor([((1 - r) ** 2 + (2 * r) ** 2) / 2, (r**2 + (1 - 2 * r) ** 2) / 2])
    torch.testing.assert_close(similarity_preserving_loss(s, t), expected)


def test_scale_rotation_and_order() -> None:
    s, t = _randn(5, 4), _randn(5, 6, seed=1)
    loss = similarity_preserving_loss(s, t)
    rotation = torch.linalg.qr(_randn(4, 4, seed=2))[0]
    torch.testing.assert_close(similarity_preserving_loss(-7 * s @ rotation, 1e-3 * t), loss)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(similarity_preserving_loss(s[order], t[order]), loss[order])
    assert float(similarity_preserving_loss(3 * s @ rotation, s).abs().max()) < 1e-12  # alike up to that: 0


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_scale_neither_overflows_nor_vanishes(scale: float) -> None:
    s, t = _randn(5, 4, dtype=torch.float32), _randn(5, 6, seed=1, dtype=torch.float32)
    expected = similarity_preserving_loss(s, t)
    torch.testing.assert_close(similarity_preserving_loss(scale * s, scale * t), expected, rtol=1e-4, atol=1e-6)


def test_gradients() -> None:
    s, t = _randn(4, 2, 2, 2), _randn(4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: similarity_preserving_loss(x, t), s.requires_grad_())
    similarity_preserving_loss(s, t).sum().backward()
    assert t.grad is None and s.grad is not None


def test_a_batch_of_one_and_features_of_zero() -> None:
    one = _randn(1, 4).requires_grad_()
    loss = similarity_preserving_loss(one, _randn(1, 3, seed=1))
    loss.sum().backward()
    assert float(loss.detach()) < 1e-24 and one.grad is not None and bool(torch.isfinite(one.grad).all())
    for zeros in (torch.zeros(3, 4), _randn(3, 4, dtype=torch.float32) * torch.tensor([[1.0], [0.0], [1.0]])):
        s = zeros.clone().requires_grad_()
        loss = similarity_preserving_loss(s, _randn(3, 5, seed=1, dtype=torch.float32))
        loss.sum().backward()
        assert bool(torch.isfinite(loss).all()) and s.grad is not None and bool(torch.isfinite(s.grad).all())
        assert float(loss.detach()[1]) == pytest.approx(1 / 3)  # row 0 minus a row of length 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_lifted_under_autocast_too(dtype: torch.dtype) -> None:
    s, t = (100 * _randn(6, 16)).to(dtype), (100 * _randn(6, 8, seed=1)).to(dtype)
    expected = similarity_preserving_loss(s.double(), t.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = similarity_preserving_loss(s, t)
    for loss in (similarity_preserving_loss(s, t), mixed):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)


def test_nan_is_not_hidden() -> None:
    s, t = _randn(3, 4), _randn(3, 4, seed=1)
    t[1, 2] = math.nan
    assert bool(similarity_preserving_loss(s, t).isnan().all())


def test_bad_input_is_refused() -> None:
    s = _randn(3, 4)
    for a, b in ((s, s[:2]), (s[0], s[0]), (s.long(), s), (s, s.tolist()), (s[:0], s[:0]), (s, s[:0])):
        with pytest.raises(ArgumentError, match=r"_features: expected .*but got"):
            similarity_preserving_loss(a, b)  # type: ignore[arg-type]
