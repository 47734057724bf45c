from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import krdistill.losses.rkd as module
from krdistill.errors import ArgumentError
from krdistill.losses.rkd import RKD, rkd_angle_loss, rkd_distance_loss, rkd_loss


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _huber(a: float, b: float) -> float:
    d = abs(a - b)
    return d * d / 2 if d <= 1 else d - 0.5


def _distances(x: np.ndarray) -> np.ndarray:
    B = len(x)
    d = np.array([[math.sqrt(((x[i] - x[j]) ** 2).sum()) for j in range(B)] for i in range(B)])
    return d / np.mean([d[i, j] for i in range(B) for j in range(B) if i != j])


def _cosine(x: np.ndarray, i: int, j: int, k: int) -> float:
    """Of the angle at j."""
    a, b = x[i] - x[j], x[k] - x[j]
    length = math.sqrt((a**2).sum() * (b**2).sum())
    return float(a @ b) / length if length else 0.0


@pytest.mark.parametrize(("B", "student", "teacher"), [(5, 3, 3), (2, 1, 4), (6, 2, 9)])
def test_follows_the_paper(B: int, student: int, teacher: int) -> None:
    s, t = _randn(B, student), 5 * _randn(B, teacher, seed=1)
    a, b = s.numpy(), t.numpy()
    d_s, d_t = _distances(a), _distances(b)
    pairs = np.array([[_huber(d_s[i, j], d_t[i, j]) for j in range(B)] for i in range(B)])
    np.testing.assert_allclose(rkd_distance_loss(s, t), pairs.mean(1), rtol=1e-9, atol=1e-12)
    angles = np.array([
        [[_huber(_cosine(a, i, j, k), _cosine(b, i, j, k)) for k in range(B)] for i in range(B)] for j in range(B)
    ])  # fmt: skip
    np.testing.assert_allclose(rkd_angle_loss(s, t), angles.mean((1, 2)), rtol=1e-9, atol=1e-12)
    loss = rkd_loss(s, t, distance_weight=2, angle_weight=3)
    assert float(loss.mean()) == pytest.approx(2 * pairs.mean() + 3 * angles.mean())


def test_by_hand() -> None:
    s = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # a right angle at the first point
    t = torch.tensor([[0.0], [1.0], [3.0]])  # on a line
    # the angles' cosines: at point 0: 0 against 1; at 1: 1/sqrt 2 against -1; at 2: 1/sqrt 2 against 1
    r = math.sqrt(0.5)
    expected = torch.tensor([2 * 0.5, 2 * (r + 1 - 0.5), 2 * (1 - r) ** 2 / 2]) / 9
    torch.testing.assert_close(rkd_angle_loss(s, t), expected)
    # distances over their means: 1, 1, sqrt 2 over (2 + sqrt 2) / 3 against 1, 3, 2 over 2
    mean = (2 + math.sqrt(2)) / 3
    d01, d02, d12 = (1 / mean - 0.5) ** 2 / 2, (1 / mean - 1.5) ** 2 / 2, (math.sqrt(2) / mean - 1) ** 2 / 2
    expected = torch.tensor([d01 + d02, d01 + d12, d02 + d12]) / 3
    torch.testing.assert_close(rkd_distance_loss(s, t), expected)


def test_scale_shift_rotation_and_order() -> None:
    s, t = _randn(6, 4), _randn(6, 5, seed=1)
    loss = rkd_loss(s, t)
    rotation = torch.linalg.qr(_randn(4, 4, seed=2))[0]
    moved = 1e-4 * s @ rotation + 3e-4
    torch.testing.assert_close(rkd_loss(moved, 1e6 * t - 1e6), loss, rtol=1e-7, atol=1e-9)
    assert float(rkd_loss(moved, s).abs().max()) < 1e-9  # alike up to that: 0
    order = torch.tensor([3, 0, 5, 4, 1, 2])
    torch.testing.assert_close(rkd_loss(s[order], t[order]), loss[order])


def test_gradients() -> None:
    s, t = _randn(5, 3), _randn(5, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rkd_distance_loss(x, t), s.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: rkd_angle_loss(x, t), s)
    rkd_loss(s, t).sum().backward()
    assert t.grad is None and s.grad is not None


def test_pieces_change_neither_values_nor_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    s, t = _randn(7, 3).requires_grad_(), _randn(7, 4, seed=1)
    weight = _randn(7, seed=2)
    results = []
    for values in (1 << 20, 7 * 7 * 3, 1):  # all at once, three vertices, one vertex
        monkeypatch.setattr(module, "_PIECE_VALUES", values)
        loss = rkd_angle_loss(s, t)
        results.append((loss.detach(), torch.autograd.grad((weight * loss).sum(), s)[0]))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-12, atol=1e-14)


class _Largest(TorchDispatchMode):
    """The most values any tensor held that was made meanwhile."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.values = max(self.values, x.numel())
        return out


def test_a_batch_of_256_never_holds_all_angles() -> None:
    s, t = _randn(256, 32, dtype=torch.float32).requires_grad_(), _randn(256, 64, seed=1, dtype=torch.float32)
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with _Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = rkd_angle_loss(s, t).mean()
        loss.backward()
    assert largest.values <= module._PIECE_VALUES < 256**3 / 10
    assert 0 < sum(kept) < 8 * 256 * 64
    assert s.grad is not None and bool(torch.isfinite(s.grad).all()) and float(s.grad.abs().max()) > 0


def test_coincident_points_have_finite_gradients() -> None:
    s = _randn(5, 3, dtype=torch.float32)
    s[1] = s[0]
    for points in (s, torch.zeros(5, 3), torch.full((5, 3), 1e4)):
        points = points.clone().requires_grad_()
        loss = rkd_loss(points, _randn(5, 4, seed=1, dtype=torch.float32))
        loss.sum().backward()
        assert bool(torch.isfinite(loss).all()) and points.grad is not None
        assert bool(torch.isfinite(points.grad).all()) and float(points.grad.abs().max()) < 1e6
    assert bool(torch.isfinite(rkd_loss(s, torch.zeros(5, 4))).all())


def test_a_batch_of_one_says_nothing() -> None:
    s = _randn(1, 3).requires_grad_()
    loss = rkd_loss(s, _randn(1, 4, seed=1))
    loss.sum().backward()
    assert float(loss.detach()) == 0 and s.grad is not None and float(s.grad.abs().max()) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_lifted_under_autocast_too(dtype: torch.dtype) -> None:
    s, t = (100 * _randn(8, 16)).to(dtype), (100 * _randn(8, 8, seed=1)).to(dtype)
    expected = rkd_loss(s.double(), t.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = rkd_loss(s, t)
    for loss in (rkd_loss(s, t), mixed):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_scale_neither_overflows_nor_vanishes(scale: float) -> None:
    s, t = _randn(5, 4, dtype=torch.float32), _randn(5, 6, seed=1, dtype=torch.float32)
    torch.testing.assert_close(rkd_loss(scale * s, scale * t), rkd_loss(s, t), rtol=1e-4, atol=1e-5)


def test_every_setting_reaches_the_loss() -> None:
    s, t = _randn(5, 4), _randn(5, 6, seed=1)
    base = RKD()(s, t, torch.zeros(5))
    torch.testing.assert_close(base, 25 * rkd_distance_loss(s, t) + 50 * rkd_angle_loss(s, t))
    for setting in ({"distance_weight": 1.0}, {"angle_weight": 1.0}, {"angle_weight": 0.0}, {"distance_weight": 0}):
        assert float((RKD(**setting)(s, t) - base).abs().min()) > 1e-3
        torch.testing.assert_close(RKD(**setting)(s, t), rkd_loss(s, t, **setting))
    assert float(rkd_loss(s, t, distance_weight=0, angle_weight=0).abs().max()) == 0
    assert repr(RKD()) == "RKD(distance_weight=25.0, angle_weight=50.0)"


def test_nan_is_not_hidden() -> None:
    s, t = _randn(3, 4), _randn(3, 4, seed=1)
    t[1, 2] = math.nan
    assert bool(rkd_distance_loss(s, t).isnan().all()) and bool(rkd_angle_loss(s, t).isnan().all())


def test_bad_input_is_refused() -> None:
    s = _randn(3, 4)
    for bad in (
        lambda: rkd_loss(s, s[:2]),
        lambda: rkd_distance_loss(s, s.unsqueeze(2)),
        lambda: rkd_angle_loss(s.long(), s),
        lambda: rkd_loss(s[:0], s[:0]),
        lambda: rkd_loss(s, s[:, :0]),
        lambda: rkd_loss(s, s, distance_weight=-1),
        lambda: rkd_loss(s, s, angle_weight=math.nan),
        lambda: RKD(angle_weight=-1),
    ):
        with pytest.raises(ArgumentError, match=r"expected .*but got"):
            bad()
