from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from krdistill.errors import ArgumentError
from krdistill.rectify.power_normalisation import power_normalise


def _logits(B: int, K: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (3 * torch.randn(B, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize(("B", "K"), [(4, 6), (1, 2)])
@pytest.mark.parametrize("T", [1.0, 3.0])
@pytest.mark.parametrize("power", [0.25, 0.5, 1.0, 2.0])
def test_softened_prediction_is_the_power_renormalised(B: int, K: int, T: float, power: float) -> None:
    z = _logits(B, K)
    got = torch.softmax(power_normalise(z, power=power) / T, dim=1).numpy()
    for n in range(B):
        p = np.exp(z[n].numpy() / T - np.max(z[n].numpy() / T))
        p /= p.sum()
        np.testing.assert_allclose(got[n], [p[k] ** power / sum(p**power) for k in range(K)], rtol=1e-9)


def test_by_hand() -> None:
    z = torch.tensor([[0.8, 0.2]], dtype=torch.float64).log()
    got = torch.softmax(power_normalise(z, power=0.5), dim=1)
    torch.testing.assert_close(got, torch.tensor([[2 / 3, 1 / 3]], dtype=torch.float64))


def test_power_one_is_the_identity_and_the_default_is_one_half() -> None:
    z = _logits(4, 6)
    assert torch.equal(power_normalise(z, power=1), z)
    assert torch.equal(power_normalise(z), power_normalise(z, power=0.5))


def test_power_is_a_temperature_of_the_teacher_alone() -> None:
    z = _logits(4, 6)
    torch.testing.assert_close(torch.softmax(power_normalise(z, power=0.5) / 3, 1), torch.softmax(z / 6, 1))


def test_below_one_is_flatter_and_keeps_the_order() -> None:
    z = _logits(8, 6)

    def entropy(x: Tensor) -> Tensor:
        p = torch.softmax(x, dim=1)
        return -(p * p.log()).sum(1)

    flat, sharp = power_normalise(z, power=0.5), power_normalise(z, power=2)
    assert bool((entropy(flat) > entropy(z)).all()) and bool((entropy(sharp) < entropy(z)).all())
    assert torch.equal(flat.argsort(1), z.argsort(1))
    uniform = torch.full((1, 5), 2.0)
    torch.testing.assert_close(torch.softmax(power_normalise(uniform), 1), torch.full((1, 5), 0.2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("K", [2, 8142])
def test_low_precision_many_classes_and_huge_logits(dtype: torch.dtype, K: int) -> None:
    z = _logits(2, K, dtype)
    got = power_normalise(z, power=0.3)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), 0.3 * z.double(), rtol=1e-6, atol=1e-6)
    assert bool(torch.isfinite(power_normalise(6e4 * z.sign(), power=8)).all())  # beyond float16


def test_bad_input_is_refused() -> None:
    z = _logits(3, 4)
    for call in (
        lambda: power_normalise(z, power=0),
        lambda: power_normalise(z, power=-0.5),
        lambda: power_normalise(z, power=math.nan),
        lambda: power_normalise(z[0]),
        lambda: power_normalise(z[:, :1]),
        lambda: power_normalise(z.long()),
    ):
        with pytest.raises(ArgumentError, match=r"expected .*but got"):
            call()


def test_nan_stays_in_its_row() -> None:
    z = _logits(3, 4)
    z[1, 2] = math.nan
    assert power_normalise(z).isnan().any(1).tolist() == [False, True, False]
