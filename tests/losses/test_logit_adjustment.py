from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from krdistill.errors import ArgumentError, DataError
from krdistill.losses.balanced_softmax import BalancedSoftmax, balanced_softmax
from krdistill.losses.cross_entropy import cross_entropy
from krdistill.losses.logit_adjustment import LogitAdjustedLoss, adjust_logits, logit_adjusted_loss
from krdistill.rectify import remove_prior
from krdistill.sampling import SAMPLINGS, Sampling, draw_shares

COUNTS = [500, 100, 20, 5, 1]


def _case(B: int = 9, K: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 500, (K,), generator=gen).double()
    z = 3 * torch.randn(B, K, generator=gen, dtype=torch.float64)
    return z.to(dtype), torch.randint(0, K, (B,), generator=gen), (counts / counts.sum()).log()


def _reference(z: Tensor, y: Tensor, log_prior: Tensor, tau: float, smoothing: float = 0.0) -> np.ndarray:
    K = z.shape[1]
    out = []
    for row, label in zip(z.double().numpy(), y.tolist(), strict=True):
        shifted = row + tau * log_prior.numpy()
        top = shifted.max()
        log_p = shifted - top - math.log(sum(math.exp(v - top) for v in shifted))
        q = np.full(K, smoothing / K)
        q[label] += 1 - smoothing
        out.append(-(q * log_p).sum())
    return np.array(out)


@pytest.mark.parametrize(("B", "K"), [(9, 5), (1, 2), (3, 8142)])
@pytest.mark.parametrize(("tau", "smoothing"), [(1.0, 0.0), (0.5, 0.0), (2.0, 0.1), (0.0, 0.0)])
def test_value(B: int, K: int, tau: float, smoothing: float) -> None:
    z, y, prior = _case(B, K)
    loss = logit_adjusted_loss(z, y, prior, tau=tau, label_smoothing=smoothing)
    assert loss.shape == (B,) and loss.dtype == torch.float64
    np.testing.assert_allclose(loss.numpy(), _reference(z, y, prior, tau, smoothing), rtol=1e-12)


def test_by_hand() -> None:
    """Equal logits, priors 3/4 and 1/4: the probabilities are the priors, at tau = 2 in the ratio 9 to 1."""
    z, prior = torch.zeros(2, 2, dtype=torch.float64), torch.tensor([0.75, 0.25], dtype=torch.float64).log()
    y = torch.tensor([0, 1])
    torch.testing.assert_close(logit_adjusted_loss(z, y, prior).exp(), torch.tensor([4 / 3, 4.0]).double())
    torch.testing.assert_close(logit_adjusted_loss(z, y, prior, tau=2).exp(), torch.tensor([10 / 9, 10.0]).double())


def test_tau_one_is_balanced_softmax_tau_zero_and_equal_counts_are_cross_entropy() -> None:
    z, y, prior = _case()
    torch.testing.assert_close(logit_adjusted_loss(z, y, prior), balanced_softmax(z, y, prior), rtol=0, atol=0)
    torch.testing.assert_close(logit_adjusted_loss(z, y, prior, tau=0), cross_entropy(z, y), rtol=0, atol=0)
    torch.testing.assert_close(LogitAdjustedLoss([7] * 5, tau=1.5)(z, y), cross_entropy(z, y))


def test_every_parameter_changes_the_loss() -> None:
    z, y, _ = _case()
    base = LogitAdjustedLoss(COUNTS)(z, y)
    for other in (
        LogitAdjustedLoss(COUNTS, tau=1.3),
        LogitAdjustedLoss(COUNTS, label_smoothing=0.1),
        LogitAdjustedLoss(COUNTS[::-1]),
    ):
        assert not torch.allclose(other(z, y), base)


def test_invariant_to_shifts_of_logits_and_prior() -> None:
    z, y, prior = _case()
    base = logit_adjusted_loss(z, y, prior, tau=0.7)
    torch.testing.assert_close(logit_adjusted_loss(z + torch.arange(9.0).unsqueeze(1), y, prior, tau=0.7), base)
    torch.testing.assert_close(logit_adjusted_loss(z, y, prior + 4, tau=0.7), base)


def test_rare_classes_are_pushed_more() -> None:
    z = torch.zeros(5, 5)
    loss = LogitAdjustedLoss(COUNTS)(z, torch.arange(5))
    assert bool((loss.diff() > 0).all())


def test_gradients() -> None:
    z, y, prior = _case(4)
    assert torch.autograd.gradcheck(lambda x: logit_adjusted_loss(x, y, prior, tau=1.3), z.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision(dtype: torch.dtype) -> None:
    z, y, prior = _case(dtype=dtype)
    loss = logit_adjusted_loss(z, y, prior)
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(loss.numpy(), _reference(z, y, prior, 1.0), rtol=1e-5, atol=1e-5)


def test_huge_logits() -> None:
    z = torch.tensor([[1e4, -1e4], [1e4, -1e4]], requires_grad=True)
    loss = LogitAdjustedLoss([9, 1])(z, torch.tensor([0, 1]))
    assert loss.tolist() == [0, pytest.approx(2e4 + math.log(9))]
    loss.sum().backward()
    assert bool(torch.isfinite(z.grad).all())  # type: ignore[arg-type]


def test_adjust_logits_makes_a_bayes_classifier_balanced() -> None:
    """Logits log(pi_k p(x | k)) become log p(x | k): the class-balanced Bayes rule."""
    likelihood = torch.tensor([[0.2, 0.3], [0.6, 0.1]], dtype=torch.float64)
    prior = torch.tensor([0.9, 0.1], dtype=torch.float64).log()
    adjusted = adjust_logits(likelihood.log() + prior, prior)
    torch.testing.assert_close(adjusted, likelihood.log())
    assert (likelihood.log() + prior).argmax(1).tolist() == [0, 0] and adjusted.argmax(1).tolist() == [1, 0]
    torch.testing.assert_close(adjust_logits(likelihood, prior, tau=0.3), remove_prior(likelihood, prior, 0.3))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_prior_is_that_of_the_draws(sampling: Sampling) -> None:
    z, y, _ = _case()
    for progress in (0.0, 0.3, 1.0):
        drawn = draw_shares(sampling, COUNTS, progress=progress).log()
        for module, tau in (
            (BalancedSoftmax(COUNTS, sampling=sampling), 1.0),
            (LogitAdjustedLoss(COUNTS, tau=0.5, sampling=sampling), 0.5),
        ):
            want = torch.nn.functional.cross_entropy(z + tau * drawn, y, reduction="none")
            torch.testing.assert_close(module(z, y, progress), want, rtol=1e-5, atol=1e-5)
    if sampling == "class-balanced":  # all classes are shown alike: nothing is left to make up for
        plain = torch.nn.functional.cross_entropy(z, y, reduction="none")
        torch.testing.assert_close(BalancedSoftmax(COUNTS, sampling=sampling)(z, y), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampling", ["instance", "square-root", "class-balanced"])
def test_however_images_are_drawn_the_logits_come_to_the_same(sampling: Sampling) -> None:
    """Features that tell nothing of the class: a balanced classifier answers with equal shares, whatever was shown."""
    shares = draw_shares(sampling, COUNTS)
    z = torch.zeros(len(COUNTS), requires_grad=True)
    module = BalancedSoftmax(COUNTS, sampling=sampling)
    rows = torch.arange(len(COUNTS))
    loss = (shares.float() * module(z.expand(len(COUNTS), -1), rows)).sum()
    loss.backward()
    assert float(z.grad.abs().max()) < 1e-6  # type: ignore[union-attr]


def test_module_keeps_its_prior_in_the_state_and_moves_it() -> None:
    module = LogitAdjustedLoss(COUNTS, tau=0.5)
    assert list(module.state_dict()) == ["log_prior"] and module.log_prior.dtype == torch.float32
    assert module.to("meta").log_prior.device.type == "meta"
    moved = LogitAdjustedLoss(COUNTS, tau=0.5).double()
    z, y, _ = _case()
    torch.testing.assert_close(moved(z, y), LogitAdjustedLoss(COUNTS, tau=0.5)(z, y), rtol=1e-6, atol=1e-6)
    assert "tau=0.5" in repr(module)


def test_bad_input() -> None:
    z, y, prior = _case()
    for arguments, match in (
        ((z[0], y, prior), "logits"),
        ((z, y[:3], prior), "labels"),
        ((z, y.double(), prior), "labels"),
        ((z, y + 5, prior), "labels"),
        ((z, y, prior[:4]), "log_prior"),
        ((z, y, torch.full((5,), -math.inf)), "log_prior"),
    ):
        with pytest.raises(ArgumentError, match=match):
            logit_adjusted_loss(*arguments)
    with pytest.raises(ArgumentError, match="tau"):
        logit_adjusted_loss(z, y, prior, tau=-1)
    with pytest.raises(ArgumentError, match="tau"):
        LogitAdjustedLoss(COUNTS, tau=math.nan)
    with pytest.raises(ArgumentError, match="label_smoothing"):
        LogitAdjustedLoss(COUNTS, label_smoothing=1.0)
    with pytest.raises(DataError, match="no training image"):
        LogitAdjustedLoss([3, 0, 1])
