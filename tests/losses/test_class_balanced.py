from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from krdistill.errors import ArgumentError, DataError
from krdistill.losses.class_balanced import ClassBalancedCrossEntropy, ClassBalancedFocal, class_balanced_loss
from krdistill.losses.cross_entropy import cross_entropy
from krdistill.losses.focal import focal_loss

COUNTS = [5000, 800, 60, 9, 1]


def _case(B: int = 9, K: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(B, K, generator=gen, dtype=torch.float64)
    weights = torch.rand(K, generator=gen, dtype=torch.float64)
    return z, torch.randint(0, K, (B,), generator=gen), weights


def _cross_entropy(z: Tensor, y: Tensor) -> np.ndarray:
    rows = z.double().numpy()
    return np.array([np.log(np.exp(r - r.max()).sum()) + r.max() - r[k] for r, k in zip(rows, y.tolist(), strict=True)])


def _effective_weights(counts: list[int], beta: float) -> np.ndarray:
    """1 over 1 + beta + ... + beta^(n - 1), summed term by term, scaled to sum K."""
    w = np.array([1 / sum(beta**i for i in range(n)) for n in counts])
    return w * len(counts) / w.sum()


@pytest.mark.parametrize(("B", "K"), [(9, 5), (1, 2), (3, 8142)])
def test_value(B: int, K: int) -> None:
    z, y, w = _case(B, K)
    loss = class_balanced_loss(z, y, w)
    assert loss.shape == (B,) and loss.dtype == torch.float64
    np.testing.assert_allclose(loss.numpy(), w[y].numpy() * _cross_entropy(z, y), rtol=1e-12)
    smoothed = class_balanced_loss(z, y, w, label_smoothing=0.2)
    torch.testing.assert_close(smoothed, w[y] * cross_entropy(z, y, label_smoothing=0.2))


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999])
def test_modules_weigh_by_the_effective_number(beta: float) -> None:
    z, y, _ = _case()
    w = _effective_weights(COUNTS, beta)
    module = ClassBalancedCrossEntropy(COUNTS, beta=beta)
    np.testing.assert_allclose(module.weights.numpy(), w, rtol=1e-5)
    np.testing.assert_allclose(module(z, y).numpy(), w[y.numpy()] * _cross_entropy(z, y), rtol=1e-5)
    focal = ClassBalancedFocal(COUNTS, beta=beta, gamma=1.5)
    torch.testing.assert_close(focal(z, y), torch.from_numpy(w)[y] * focal_loss(z, y, gamma=1.5), rtol=1e-5, atol=1e-9)


def test_by_hand() -> None:
    """beta = 1/2, counts 1 and 2: effective numbers 1 and 3/2, weights 6/5 and 4/5."""
    z = torch.zeros(2, 2, dtype=torch.float64)
    loss = ClassBalancedCrossEntropy([1, 2], beta=0.5)(z, torch.tensor([0, 1]))
    torch.testing.assert_close(loss, math.log(2) * torch.tensor([1.2, 0.8], dtype=torch.float64), rtol=1e-6, atol=0)


def test_equal_counts_or_beta_zero_are_the_unweighted_parents() -> None:
    z, y, _ = _case()
    for counts, beta in (([7] * 5, 0.9999), (COUNTS, 0.0)):
        torch.testing.assert_close(ClassBalancedCrossEntropy(counts, beta=beta)(z, y), cross_entropy(z, y))
        torch.testing.assert_close(ClassBalancedFocal(counts, beta=beta, gamma=1)(z, y), focal_loss(z, y, gamma=1))


def test_beta_towards_one_gives_every_class_the_same_total_weight() -> None:
    counts = torch.tensor(COUNTS)
    total = ClassBalancedCrossEntropy(counts, beta=1 - 1e-12).weights * counts
    torch.testing.assert_close(total, total.mean().expand(5), rtol=1e-5, atol=0)


def test_every_parameter_changes_the_loss() -> None:
    z, y, _ = _case()
    cross, focal = ClassBalancedCrossEntropy(COUNTS)(z, y), ClassBalancedFocal(COUNTS)(z, y)
    assert not torch.allclose(ClassBalancedCrossEntropy(COUNTS, beta=0.99)(z, y), cross)
    assert not torch.allclose(ClassBalancedCrossEntropy(COUNTS, label_smoothing=0.1)(z, y), cross)
    assert not torch.allclose(ClassBalancedCrossEntropy(COUNTS[::-1])(z, y), cross)
    assert not torch.allclose(ClassBalancedFocal(COUNTS, beta=0.99)(z, y), focal)
    assert not torch.allclose(ClassBalancedFocal(COUNTS, gamma=1)(z, y), focal)


def test_invariant_to_shifts_and_gradients() -> None:
    z, y, w = _case(4)
    torch.testing.assert_close(class_balanced_loss(z - 7, y, w), class_balanced_loss(z, y, w))
    assert torch.autograd.gradcheck(lambda x: class_balanced_loss(x, y, w), z.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_and_huge_logits(dtype: torch.dtype) -> None:
    z, y, _ = _case()
    for module in (ClassBalancedCrossEntropy(COUNTS), ClassBalancedFocal(COUNTS)):
        loss = module(z.to(dtype), y)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), module(z.to(dtype).double(), y), rtol=1e-4, atol=1e-6)
        huge = module(torch.tensor([[1e4, -1e4, 0, 0, 0]]).to(dtype), torch.tensor([1]))
        assert float(huge) == pytest.approx(2e4 * float(module.weights[1]), rel=1e-2)


def test_modules_keep_their_weights_in_the_state_and_move_them() -> None:
    for module in (ClassBalancedCrossEntropy(COUNTS), ClassBalancedFocal(COUNTS)):
        assert list(module.state_dict()) == ["weights"] and module.weights.dtype == torch.float32
        assert float(module.weights.sum()) == pytest.approx(5)
        assert "beta=0.9999" in repr(module)
        assert module.to("meta").weights.device.type == "meta"


def test_bad_input() -> None:
    z, y, w = _case()
    for arguments, match in (
        ((z[0], y, w), "logits"),
        ((z, y + 5, w), "labels"),
        ((z, y, w[:2]), "weights"),
        ((z, y, w - 2), "weights"),
        ((z, y, w * math.nan), "weights"),
    ):
        with pytest.raises(ArgumentError, match=match):
            class_balanced_loss(*arguments)
    for make in (ClassBalancedCrossEntropy, ClassBalancedFocal):
        with pytest.raises(ArgumentError, match="beta"):
            make(COUNTS, beta=1.0)
        with pytest.raises(DataError, match="no training image"):
            make([4, 0])
    with pytest.raises(ArgumentError, match="gamma"):
        ClassBalancedFocal(COUNTS, gamma=-1)
    with pytest.raises(ArgumentError, match="label_smoothing"):
        ClassBalancedCrossEntropy(COUNTS, label_smoothing=-0.1)
