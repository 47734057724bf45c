from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from krdistill.errors import ArgumentError
from krdistill.losses.dkd import DKD, dkd_loss, non_target_class_divergence, target_class_divergence
from krdistill.losses.kd import kd_divergence


def _case(B: int, K: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    s, t = (3 * torch.randn(2, B, K, generator=g, dtype=torch.float64)).to(dtype)
    return s, t, torch.randint(K, (B,), generator=g)


def _softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def _reference(student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> tuple[np.ndarray, np.ndarray]:
    """By the definition, one sample and one class at a time."""
    tckd, nckd = [], []
    for s, t, y in zip(student.double().numpy(), teacher.double().numpy(), labels.tolist(), strict=True):
        p, q = _softmax(t / T), _softmax(s / T)
        tckd.append(p[y] * math.log(p[y] / q[y]) + (1 - p[y]) * math.log((1 - p[y]) / (1 - q[y])))
        total = 0.0
        for k in range(len(p)):
            if k != y:
                hat_p, hat_q = p[k] / (1 - p[y]), q[k] / (1 - q[y])
                total += hat_p * math.log(hat_p / hat_q)
        nckd.append(total)
    return np.array(tckd), np.array(nckd)


@pytest.mark.parametrize(("B", "K", "T"), [(5, 7, 4.0), (1, 3, 1.0), (8, 2, 2.0), (3, 100, 0.5)])
def test_parts_and_loss_follow_the_definition(B: int, K: int, T: float) -> None:
    s, t, y = _case(B, K)
    tckd, nckd = _reference(s, t, y, T)
    np.testing.assert_allclose(target_class_divergence(s, t, y, temperature=T), tckd, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(non_target_class_divergence(s, t, y, temperature=T), nckd, rtol=1e-9, atol=1e-12)
    loss = dkd_loss(s, t, y, alpha=0.7, beta=3.0, temperature=T)
    np.testing.assert_allclose(loss, T**2 * (0.7 * tckd + 3 * nckd), rtol=1e-9, atol=1e-12)


def test_by_hand() -> None:
    # teacher (1/2, 1/4, 1/4), student (1/4, 1/2, 1/4), label 0
    t, s = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    y = torch.tensor([0])
    tckd = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    nckd = 0.5 * math.log(3 / 4) + 0.5 * math.log(3 / 2)
    assert float(target_class_divergence(s, t, y, temperature=1)) == pytest.approx(tckd, abs=1e-6)
    assert float(non_target_class_divergence(s, t, y, temperature=1)) == pytest.approx(nckd, abs=1e-6)


@given(B=st.integers(1, 6), K=st.integers(2, 12), T=st.floats(0.5, 8), seed=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_the_parts_make_up_the_whole_divergence(B: int, K: int, T: float, seed: int) -> None:
    s, t, y = _case(B, K, seed)
    p_y = torch.softmax(t / T, dim=1).gather(1, y.unsqueeze(1)).squeeze(1)
    parts = target_class_divergence(s, t, y, temperature=T) + (1 - p_y) * non_target_class_divergence(
        s, t, y, temperature=T
    )
    torch.testing.assert_close(T**2 * parts, kd_divergence(s, t, temperature=T), rtol=1e-9, atol=1e-11)


def test_two_classes_have_no_non_target_part() -> None:
    s, t, y = _case(6, 2)
    s.requires_grad_()
    part = non_target_class_divergence(s, t, y)
    assert torch.equal(part, torch.zeros(6, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(part.sum(), s)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    (gradient,) = torch.autograd.grad(dkd_loss(s, t, y).sum(), s)
    assert bool(torch.isfinite(gradient).all()) and float(gradient.abs().max()) > 0


def test_the_label_logit_does_not_leak_into_the_other_classes() -> None:
    s, t, y = _case(4, 5)
    before = non_target_class_divergence(s, t, y)
    column = y.unsqueeze(1)
    # -1000 as a mask would let these through
    lifted = non_target_class_divergence(s.scatter(1, column, 1e6), t.scatter(1, column, 5e4), y)
    assert torch.equal(before, lifted)


def test_agreement_is_zero_and_constants_make_no_difference() -> None:
    s, t, y = _case(6, 9)
    assert float(dkd_loss(t, t, y).abs().max()) < 1e-12
    assert float(dkd_loss(s, t, y).min()) > 0
    torch.testing.assert_close(dkd_loss(s + 100, t - 50, y), dkd_loss(s, t, y), rtol=1e-9, atol=1e-9)


def test_gradients() -> None:
    s, t, y = _case(3, 4)
    t.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dkd_loss(x, t, y, temperature=2.0), s.requires_grad_())
    dkd_loss(s, t, y).sum().backward()
    assert t.grad is None and s.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_lifted(dtype: torch.dtype) -> None:
    s, t, y = _case(4, 10, dtype=dtype)
    s.requires_grad_()
    loss = dkd_loss(s, t, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), dkd_loss(s.double(), t.double(), y), rtol=1e-4, atol=1e-5)
    loss.sum().backward()
    assert s.grad is not None and bool(torch.isfinite(s.grad).all())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dkd_loss(s, t, y), loss)


@pytest.mark.parametrize("K", [2, 10, 8142])
def test_huge_logits_and_many_classes_stay_finite(K: int) -> None:
    s, t, y = _case(3, K, dtype=torch.float32)
    s = (1e4 * s.sign()).requires_grad_()
    loss = dkd_loss(s, -1e4 * t.sign(), y)
    loss.sum().backward()
    assert bool(torch.isfinite(loss).all()) and s.grad is not None and bool(torch.isfinite(s.grad).all())


def test_every_setting_reaches_the_loss() -> None:
    s, t, y = _case(4, 6)
    base = DKD()(s, t, y)
    torch.testing.assert_close(base, dkd_loss(s, t, y, alpha=1, beta=8, temperature=4))
    for setting in ({"alpha": 2.0}, {"beta": 2.0}, {"temperature": 2.0}):
        assert float((DKD(**setting)(s, t, y) - base).abs().min()) > 1e-4, setting
        torch.testing.assert_close(DKD(**setting)(s, t, y), dkd_loss(s, t, y, **setting))
    assert repr(DKD(beta=2)) == "DKD(alpha=1.0, beta=2.0, temperature=4.0)"


def test_nan_stays_in_its_row() -> None:
    s, t, y = _case(3, 4)
    t[1, 2] = math.nan
    assert dkd_loss(s, t, y).isnan().tolist() == [False, True, False]


def test_bad_input_is_refused() -> None:
    s, t, y = _case(3, 4)
    for bad in (
        lambda: dkd_loss(s, t[:, :3], y),
        lambda: dkd_loss(s[:2], t, y),
        lambda: dkd_loss(s[:, :1], t[:, :1], y * 0),
        lambda: dkd_loss(s, t, y[:2]),
        lambda: dkd_loss(s, t, y + 4),
        lambda: dkd_loss(s, t, y.double()),
        lambda: dkd_loss(s.long(), t, y),
        lambda: dkd_loss(s, t, y, alpha=-1),
        lambda: dkd_loss(s, t, y, beta=math.nan),
        lambda: dkd_loss(s, t, y, temperature=0),
        lambda: DKD(temperature=-1),
        lambda: DKD(alpha=-1),
    ):
        with pytest.raises(ArgumentError, match=r"expected .*but got"):
            bad()
