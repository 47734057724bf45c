from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from krdistill.errors import ArgumentError
from krdistill.losses.logit_matching import LogitMSE, logit_mse


def _case(B: int, K: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    s, t = (3 * torch.randn(2, B, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)
    return s, t


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize(("B", "K"), [(5, 7), (1, 2)])
def test_follows_the_formula(B: int, K: int, centre: bool) -> None:
    s, t = _case(B, K)
    for row, got in enumerate(logit_mse(s, t, centre=centre)):
        a, b = s[row].numpy(), t[row].numpy()
        if centre:
            a, b = a - a.sum() / K, b - b.sum() / K
        assert float(got) == pytest.approx(sum((a[k] - b[k]) ** 2 for k in range(K)) / K, rel=1e-12)


def test_by_hand() -> None:
    s, t = torch.tensor([[1.0, 2.0, 6.0]]), torch.tensor([[1.0, 0.0, 2.0]])
    assert float(logit_mse(s, t)) == pytest.approx(20 / 3)
    assert float(logit_mse(s, t, centre=True)) == pytest.approx((2**2 + 0 + 2**2) / 3)  # (-2, -1, 3) and (0, -1, 1)
    np.testing.assert_allclose(logit_mse(t, t), [0.0])


def test_constants_count_unless_centred() -> None:
    s, t = _case(4, 5)
    torch.testing.assert_close(logit_mse(t + 3, t), torch.full((4,), 9.0, dtype=torch.float64))
    torch.testing.assert_close(logit_mse(s + 100, t - 7, centre=True), logit_mse(s, t, centre=True))
    assert float(logit_mse(t + 3, t, centre=True).max()) < 1e-24


def test_gradients() -> None:
    s, t = _case(3, 4)
    t.requires_grad_()
    for centre in (False, True):
        assert torch.autograd.gradcheck(lambda x, c=centre: logit_mse(x, t, centre=c), s.requires_grad_())
    logit_mse(s, t).sum().backward()
    assert t.grad is None and s.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("K", [2, 8142])
def test_half_precision_huge_logits_and_many_classes(dtype: torch.dtype, K: int) -> None:
    s, t = _case(3, K, dtype)
    torch.testing.assert_close(logit_mse(s, t).double(), logit_mse(s.double(), t.double()), rtol=1e-5, atol=1e-6)
    huge = (1e4 * s.sign()).requires_grad_()
    loss = LogitMSE()(huge, -huge.detach())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), 4 * huge.detach().double().square().mean(1))
    loss.sum().backward()
    assert huge.grad is not None and bool(torch.isfinite(huge.grad).all())


def test_the_setting_reaches_the_loss() -> None:
    s, t = _case(4, 5)
    assert torch.equal(LogitMSE()(s, t, torch.zeros(4)), logit_mse(s, t))
    assert torch.equal(LogitMSE(centre=True)(s, t), logit_mse(s, t, centre=True))
    assert float((LogitMSE(centre=True)(s, t) - LogitMSE()(s, t)).abs().min()) > 1e-3
    assert repr(LogitMSE(centre=True)) == "LogitMSE(centre=True)"


def test_nan_stays_in_its_row() -> None:
    s, t = _case(3, 4)
    t[1, 2] = math.nan
    assert logit_mse(s, t, centre=True).isnan().tolist() == [False, True, False]


def test_bad_input_is_refused() -> None:
    s, t = _case(3, 4)
    for a, b in ((s, t[:, :3]), (s[:2], t), (s[:, :1], t[:, :1]), (s.long(), t), (s, t.unsqueeze(0)), (s, None)):
        with pytest.raises(ArgumentError, match=r"expected .*but got"):
            logit_mse(a, b)  # type: ignore[arg-type]
