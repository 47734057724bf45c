from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from krdistill.errors import ArgumentError
from krdistill.losses.cross_entropy import cross_entropy
from krdistill.losses.focal import FocalLoss, focal_loss


def _case(B: int = 9, K: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(B, K, generator=gen, dtype=torch.float64)
    weights = torch.rand(K, generator=gen, dtype=torch.float64)
    return z, torch.randint(0, K, (B,), generator=gen), weights


def _reference(z: Tensor, y: Tensor, gamma: float, weights: Tensor | None = None) -> np.ndarray:
    out = []
    for row, label in zip(z.double().numpy(), y.tolist(), strict=True):
        e = np.exp(row - row.max())
        p = e / e.sum()
        rest = p.sum() - p[label]
        out.append((1.0 if weights is None else float(weights[label])) * rest**gamma * -math.log(p[label]))
    return np.array(out)


@pytest.mark.parametrize(("B", "K"), [(9, 5), (1, 2), (3, 8142)])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_value(B: int, K: int, gamma: float, weighted: bool) -> None:
    z, y, w = _case(B, K)
    loss = focal_loss(z, y, gamma=gamma, class_weights=w if weighted else None)
    assert loss.shape == (B,) and loss.dtype == torch.float64
    np.testing.assert_allclose(loss.numpy(), _reference(z, y, gamma, w if weighted else None), rtol=1e-9)


def test_by_hand() -> None:
    """p = 3/4: (1/4)^2 log(4/3); the other class (3/4)^2 log 4."""
    z = torch.tensor([[math.log(3), 0.0]] * 2, dtype=torch.float64)
    expected = torch.tensor([math.log(4 / 3) / 16, 9 / 16 * math.log(4)], dtype=torch.float64)
    torch.testing.assert_close(focal_loss(z, torch.tensor([0, 1])), expected)


def test_gamma_zero_is_cross_entropy_and_equal_weights_change_nothing() -> None:
    z, y, _ = _case()
    torch.testing.assert_close(focal_loss(z, y, gamma=0), cross_entropy(z, y))
    torch.testing.assert_close(focal_loss(z, y, class_weights=torch.ones(5)), focal_loss(z, y))


def test_every_parameter_changes_the_loss_and_easy_samples_count_less() -> None:
    z, y, w = _case()
    base = FocalLoss()(z, y)
    assert not torch.allclose(FocalLoss(gamma=1.5)(z, y), base)
    assert not torch.allclose(FocalLoss(class_weights=w)(z, y), base)
    easy = torch.tensor([[6.0, 0.0], [0.0, 0.0]])
    share = focal_loss(easy, torch.zeros(2, dtype=torch.long)) / cross_entropy(easy, torch.zeros(2, dtype=torch.long))
    assert share[0] < 1e-4 and share[1] == pytest.approx(0.25)


def test_invariant_to_shifts() -> None:
    z, y, w = _case()
    shifted = z + torch.arange(9.0).unsqueeze(1)
    torch.testing.assert_close(focal_loss(shifted, y, class_weights=w), focal_loss(z, y, class_weights=w))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradients(gamma: float) -> None:
    z, y, w = _case(4)
    assert torch.autograd.gradcheck(lambda x: focal_loss(x, y, gamma=gamma, class_weights=w), z.requires_grad_())


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
def test_huge_logits_have_finite_loss_and_gradient(gamma: float) -> None:
    """At p = 1 exactly, (1 - p)^gamma has an infinite slope for gamma < 1: the gradient must not be NaN."""
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [40.0, 0.0, 0.0]], requires_grad=True)
    loss = focal_loss(z, torch.tensor([0, 0, 0]), gamma=gamma)
    assert loss.tolist()[:2] == [0, pytest.approx(2e4)]
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert bool(torch.isfinite(gradient).all())
    torch.testing.assert_close(gradient[1], torch.tensor([-1.0, 1.0, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision(dtype: torch.dtype) -> None:
    z, y, w = _case()
    loss = focal_loss(z.to(dtype), y, class_weights=w)
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(loss.numpy(), _reference(z.to(dtype), y, 2.0, w), rtol=1e-4, atol=1e-7)


def test_module_keeps_a_copy_of_its_weights_and_moves_it() -> None:
    z, y, w = _case()
    module = FocalLoss(gamma=1, class_weights=w)
    torch.testing.assert_close(module(z, y), focal_loss(z, y, gamma=1, class_weights=w), rtol=1e-6, atol=1e-7)
    w32 = torch.ones(5)
    module = FocalLoss(class_weights=w32)
    w32.zero_()
    assert list(module.state_dict()) == ["class_weights"] and module.class_weights is not None
    assert float(module.class_weights.sum()) == 5
    assert module.to("meta").class_weights.device.type == "meta"  # type: ignore[union-attr]
    assert FocalLoss().state_dict() == {} and "gamma=2.0" in repr(FocalLoss())


def test_bad_input() -> None:
    z, y, w = _case()
    for arguments, match in (
        ({"logits": z[:, :1]}, "logits"),
        ({"labels": y - 9}, "labels"),
        ({"labels": y[:2]}, "labels"),
        ({"gamma": -0.1}, "gamma"),
        ({"gamma": True}, "gamma"),
        ({"class_weights": w[:3]}, "class_weights"),
        ({"class_weights": -w}, "class_weights"),
    ):
        with pytest.raises(ArgumentError, match=match):
            focal_loss(**{"logits": z, "labels": y, **arguments})  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="gamma"):
        FocalLoss(gamma=math.inf)
    with pytest.raises(ArgumentError, match="class_weights"):
        FocalLoss(class_weights=[1.0, 2.0])  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="class_weights"):
        FocalLoss(class_weights=torch.tensor([1.0, math.nan]))
