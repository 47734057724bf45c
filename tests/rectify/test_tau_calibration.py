from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from krdistill.errors import ArgumentError, DataError
from krdistill.priors import ClassPrior
from krdistill.rectify import auto_tau, per_class_tau, remove_prior

PRIOR = ClassPrior.from_counts([1000, 300, 100, 30, 10])
K = 5


def _teacher(bias: Tensor, per_class: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Class k's samples are those of class 0 with the classes turned round by k, and then biased."""
    base = np.random.default_rng(seed).normal(size=(per_class, K)) + 2.0 * np.eye(K)[0]
    z = torch.from_numpy(np.concatenate([np.roll(base, k, axis=1) for k in range(K)]))
    return z + bias, torch.arange(K).repeat_interleave(per_class)


def _uneven(seed: int = 3, samples: int = 400) -> tuple[Tensor, Tensor]:
    """A teacher whose classes differ in more than a bias."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(K, (samples,), generator=g)
    skill = torch.tensor([4.0, 3.0, 1.0, 2.0, 0.5])
    z = 1.5 * torch.randn(samples, K, generator=g) + PRIOR.log_prior.float()
    return z + skill[y].unsqueeze(1) * torch.nn.functional.one_hot(y, K), y


def _confidences(z: Tensor, y: Tensor, b: np.ndarray) -> np.ndarray:
    """Mean confidence of each class, in loops."""
    total, number = np.zeros(K), np.zeros(K)
    for row, k in zip(z.double().numpy() - b, y.tolist(), strict=True):
        e = np.exp(row - row.max())
        total[k] += e[k] / e.sum()
        number[k] += 1
    with np.errstate(invalid="ignore"):
        return total / number


@pytest.mark.parametrize("tau", [0.0, 0.4, 1.3, 2.5])
def test_a_bias_of_the_prior_alone_is_found_for_every_class(tau: float) -> None:
    z, y = _teacher(tau * PRIOR.log_prior)
    found, common = per_class_tau(z, y, PRIOR.log_prior, tolerance=1e-9, max_steps=1000)
    assert found.dtype == torch.float64 and found.shape == (K,)
    assert found.tolist() == pytest.approx([tau] * K, abs=1e-6)
    assert common == pytest.approx(tau, abs=1e-6)


def test_a_bias_of_any_shape_is_found() -> None:
    bias = 1.1 * PRIOR.log_prior + torch.tensor([0.5, -1.0, 0.0, 2.0, -0.3], dtype=torch.float64)
    z, y = _teacher(bias)
    found, common = per_class_tau(z, y, PRIOR.log_prior, tolerance=1e-10, max_steps=1000)
    got = found * PRIOR.log_prior
    assert torch.allclose(got - got.mean(), bias - bias.mean(), atol=1e-7)
    # the common part is the slope of a straight line through the offsets, as NumPy fits it
    assert common == pytest.approx(np.polyfit(PRIOR.log_prior.numpy(), bias.numpy(), 1)[0], abs=1e-6)
    assert float((got - common * PRIOR.log_prior).mean()) == pytest.approx(0, abs=1e-9)


def test_confidences_come_out_equal_where_one_number_leaves_them_uneven() -> None:
    z, y = _uneven()
    one = auto_tau(z, y, PRIOR.log_prior) * PRIOR.log_prior.numpy()
    tau, _ = per_class_tau(z, y, PRIOR.log_prior)
    own = (tau * PRIOR.log_prior).numpy()
    spread = [np.ptp(np.log(_confidences(z, y, b))) for b in (one, own)]
    assert spread[0] > 0.3 and spread[1] <= 1e-3 + 1e-9


def test_every_step_brings_them_nearer() -> None:
    z, y = _uneven()
    log_prior = PRIOR.log_prior
    spreads = []
    for steps in range(0, 30):
        tau, _ = per_class_tau(z, y, log_prior, tolerance=1e-12, max_steps=steps)
        spreads.append(np.ptp(np.log(_confidences(z, y, (tau * log_prior).numpy()))))
    assert all(b < a for a, b in pairwise(spreads))
    rates = np.array(spreads[11:]) / np.array(spreads[10:-1])  # linear: the ratio settles below 1
    assert rates.max() < 0.95 and np.ptp(rates) < 0.02


@pytest.mark.parametrize("seed", range(4))
def test_the_answer_does_not_depend_on_where_the_search_starts(seed: int) -> None:
    """Logits moved by a vector are a search from another start; the answer moves by that vector alone."""
    z, y = _uneven(seed)
    moved = 3 * torch.randn(K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a, b = (
        per_class_tau(x, y, PRIOR.log_prior, tolerance=1e-10, max_steps=5000)[0] * PRIOR.log_prior
        for x in (z.double(), z.double() + moved)
    )
    difference = b - a - moved
    assert float(difference.max() - difference.min()) < 1e-6


def test_a_uniform_prior_and_an_even_teacher_leave_the_logits_alone() -> None:
    z, y = _teacher(torch.zeros(K, dtype=torch.float64))
    uniform = ClassPrior.from_counts([7] * K).log_prior
    tau, common = per_class_tau(z, y, uniform)
    assert common == 0 and tau.abs().max() < 1e-6
    assert torch.allclose(remove_prior(z, tau * uniform), z, atol=1e-6)


def test_classes_without_a_sample_are_left_out_and_get_the_common_part() -> None:
    z, y = _uneven()
    kept = y != 2
    tau, common = per_class_tau(z[kept], y[kept], PRIOR.log_prior, tolerance=1e-10, max_steps=1000)
    assert float(tau[2]) == common
    seen = [0, 1, 3, 4]
    less = torch.where(y > 2, y - 1, y)[kept]
    without, slope = per_class_tau(z[kept][:, seen], less, PRIOR.log_prior[seen], tolerance=1e-10, max_steps=1000)
    assert torch.allclose(tau[seen], without) and common == pytest.approx(slope)


def test_it_works_in_pieces_and_on_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    z, y = _uneven()
    whole, _ = per_class_tau(z, y, PRIOR.log_prior)
    monkeypatch.setattr("krdistill.rectify.prior_removal._CHUNK_VALUES", 7 * K)
    assert torch.allclose(per_class_tau(z, y, PRIOR.log_prior)[0], whole, atol=1e-9)
    assert torch.allclose(per_class_tau(z.bfloat16(), y, PRIOR.log_prior)[0], whole, atol=0.05)


def test_logits_far_apart_stay_finite() -> None:
    z, y = _uneven()
    tau, _ = per_class_tau(1e4 * z, y, PRIOR.log_prior, max_steps=3)
    assert bool(torch.isfinite(tau).all())


def test_what_does_not_fit_is_refused() -> None:
    z, y = _uneven()
    prior = PRIOR.log_prior
    with pytest.raises(ArgumentError, match=r"labels: expected an integer tensor of shape \(400,\)"):
        per_class_tau(z, y[:-1], prior)
    with pytest.raises(ArgumentError, match=r"log_prior: expected .* below 1, but got 0\.0 for class 3"):
        per_class_tau(z, y, torch.tensor([-1.0, -1, -1, 0, -1]))
    with pytest.raises(ArgumentError, match="-inf for class 0"):
        per_class_tau(z, y, torch.tensor([0, 0.25, 0.25, 0.25, 0.25]).log())
    with pytest.raises(ArgumentError, match="tolerance: expected a finite number > 0"):
        per_class_tau(z, y, prior, tolerance=0)
    with pytest.raises(ArgumentError, match="max_steps: expected a whole number >= 0"):
        per_class_tau(z, y, prior, max_steps=-1)
    with pytest.raises(DataError, match="at least 2 classes, but got 1"):
        per_class_tau(z[y == 1], y[y == 1], prior)
    with pytest.raises(DataError, match="NaN or infinity"):
        per_class_tau(z * float("nan"), y, prior)
