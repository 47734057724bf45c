from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from krdistill.errors import ArgumentError
from krdistill.losses.kd import kd_divergence
from krdistill.priors import ClassPrior, effective_number_weights
from krdistill.rectify.class_reweighting import reweight_classes
from krdistill.rectify.prior_removal import remove_prior


def _case(B: int, K: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return (3 * torch.randn(B, K, generator=g, dtype=torch.float64)).to(dtype), 0.1 + torch.rand(
        K, generator=g, dtype=torch.float64
    )


@pytest.mark.parametrize(("B", "K", "T"), [(4, 6, 2.0), (1, 2, 1.0), (3, 100, 4.0)])
def test_softened_prediction_is_the_reweighted_one(B: int, K: int, T: float) -> None:
    z, w = _case(B, K)
    got = torch.softmax(reweight_classes(z, w, temperature=T) / T, dim=1).numpy()
    for n in range(B):
        p = np.exp(z[n].numpy() / T - np.max(z[n].numpy() / T))
        p /= p.sum()
        np.testing.assert_allclose(got[n], [w[k] * p[k] / sum(w.numpy() * p) for k in range(K)], rtol=1e-9)


def test_by_hand() -> None:
    z = torch.tensor([[0.8, 0.2]], dtype=torch.float64).log()
    weights = torch.tensor([1.0, 4.0])
    torch.testing.assert_close(
        torch.softmax(reweight_classes(z, weights, temperature=1), dim=1), torch.tensor([[0.5, 0.5]]).double()
    )
    # at T = 2 the softened prediction is (2, 1) / 3, reweighted (2, 4) / 6
    torch.testing.assert_close(
        torch.softmax(reweight_classes(z, weights, temperature=2) / 2, dim=1), torch.tensor([[1 / 3, 2 / 3]]).double()
    )


def test_equal_weights_and_common_factors_make_no_difference() -> None:
    z, w = _case(4, 6)
    assert torch.equal(reweight_classes(z, torch.ones(6), temperature=3), z)
    s = z.flip(0)
    plain = kd_divergence(s, z, temperature=3)
    same = kd_divergence(s, reweight_classes(z, torch.full((6,), 7.5), temperature=3), temperature=3)
    torch.testing.assert_close(same, plain)
    a, b = (torch.softmax(reweight_classes(z, x, temperature=3) / 3, dim=1) for x in (w, 1000 * w))
    torch.testing.assert_close(a, b)


def test_inverse_frequencies_at_temperature_one_remove_the_prior() -> None:
    z, _ = _case(4, 3)
    prior = ClassPrior.from_counts([100, 10, 1])
    torch.testing.assert_close(
        reweight_classes(z, 1 / prior.frequencies, temperature=1), remove_prior(z, prior.log_prior)
    )


def test_the_temperature_reaches_the_logits() -> None:
    z, w = _case(4, 6)
    difference = reweight_classes(z, w, temperature=4) - z
    torch.testing.assert_close(difference, 4 * (reweight_classes(z, w, temperature=1) - z))
    assert float(difference.abs().max()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("K", [2, 8142])
def test_low_precision_many_classes_and_huge_logits(dtype: torch.dtype, K: int) -> None:
    z, _ = _case(2, K, dtype)
    w = effective_number_weights(torch.arange(K, 0, -1))
    got = reweight_classes(z, w, temperature=4)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), reweight_classes(z.double(), w, temperature=4), rtol=1e-5, atol=1e-5)
    assert bool(torch.isfinite(reweight_classes(1e4 * z.float().sign(), w, temperature=4)).all())


def test_the_arguments_are_left_alone() -> None:
    z, w = _case(3, 4)
    before = z.clone(), w.clone()
    reweight_classes(z, w, temperature=2).zero_()
    assert torch.equal(z, before[0]) and torch.equal(w, before[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_weights_that_are_not_positive_are_refused(bad: float, dtype: torch.dtype) -> None:
    z, w = _case(3, 4)
    w[2] = bad
    with pytest.raises(ArgumentError, match=r"weights: expected finite weights > 0, but got .* for class 2"):
        reweight_classes(z, w.to(dtype), temperature=1)


def test_bad_input_is_refused() -> None:
    z, w = _case(3, 4)
    for call in (
        lambda: reweight_classes(z, w[:3], temperature=1),
        lambda: reweight_classes(z, w.view(1, 4), temperature=1),
        lambda: reweight_classes(z, torch.ones(4, dtype=torch.int64), temperature=1),
        lambda: reweight_classes(z, w.tolist(), temperature=1),  # type: ignore[arg-type]
        lambda: reweight_classes(z[0], w, temperature=1),
        lambda: reweight_classes(z[:, :1], w[:1], temperature=1),
        lambda: reweight_classes(z, w, temperature=0),
    ):
        with pytest.raises(ArgumentError, match=r"expected .*but got"):
            call()


def test_nan_stays_in_its_row() -> None:
    z, w = _case(3, 4)
    z[1, 2] = math.nan
    assert reweight_classes(z, w, temperature=1).isnan().any(1).tolist() == [False, True, False]
