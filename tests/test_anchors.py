from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from krdistill.anchors import align_anchors, balanced_anchors, orthogonal_simplices, simplex_etf, sphere_anchors
from krdistill.errors import ArgumentError, DataError


def _off_diagonal(anchors: Tensor) -> np.ndarray:
    x = anchors.double().numpy()
    return (x @ x.T)[~np.eye(len(x), dtype=bool)]


def _uniformity(anchors: Tensor, temperature: float = 0.07) -> float:
    x = anchors.double().numpy()
    total = 0.0
    for i in range(len(x)):
        total += math.log(sum(math.exp(float(x[i] @ x[j]) / temperature) for j in range(len(x)) if j != i))
    return total / len(x)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _objective(anchors: Tensor, means: Tensor) -> float:
    return float(F.cosine_similarity(anchors.double(), means.double()).sum())


@pytest.mark.parametrize(("K", "D"), [(2, 1), (2, 2), (2, 64), (3, 2), (4, 3), (10, 9), (10, 64), (65, 64), (100, 256)])
def test_simplex_etf_is_exact(K: int, D: int) -> None:
    anchors = simplex_etf(K, D, seed=3)
    assert anchors.shape == (K, D) and anchors.dtype == torch.float64
    assert np.abs(_off_diagonal(anchors) + 1 / (K - 1)).max() < 1e-10
    assert float((anchors.norm(dim=1) - 1).abs().max()) < 1e-12
    assert float(anchors.sum(0).abs().max()) < 1e-10


@given(K=st.integers(2, 40), spare=st.integers(-1, 20), seed=st.integers(0, 2**40))
@settings(max_examples=25, deadline=None)
def test_simplex_etf_at_any_size(K: int, spare: int, seed: int) -> None:
    anchors = simplex_etf(K, K + spare, seed=seed)
    assert np.abs(_off_diagonal(anchors) + 1 / (K - 1)).max() < 1e-6


@pytest.mark.parametrize(("K", "D"), [(4, 2), (7, 5), (10, 5), (100, 64), (128, 64), (100, 90)])
def test_orthogonal_simplices_have_no_positive_cosine(K: int, D: int) -> None:
    anchors = orthogonal_simplices(K, D)
    cosines = _off_diagonal(anchors)
    assert cosines.max() < 1e-12
    assert np.abs(cosines.reshape(K, K - 1).sum(1) + 1).max() < 1e-10  # every class has the same room
    assert float((anchors.norm(dim=1) - 1).abs().max()) < 1e-12
    assert np.linalg.matrix_rank(anchors.numpy()) == D


def test_orthogonal_simplices_against_the_descent_they_replace() -> None:
    exact, found = orthogonal_simplices(100, 64), sphere_anchors(100, 64)
    assert _off_diagonal(exact).max() < _off_diagonal(found).max()
    assert _uniformity(exact) < _uniformity(found) + 0.05
    assert _uniformity(exact) < _uniformity(F.normalize(_randn(100, 64), dim=1)) - 1


@pytest.mark.parametrize(("K", "D"), [(200, 64), (150, 32)])
def test_sphere_anchors_spread_far_better_than_chance(K: int, D: int) -> None:
    anchors = sphere_anchors(K, D)
    chance = F.normalize(_randn(K, D), dim=1)
    assert anchors.dtype == torch.float32
    assert float((anchors.norm(dim=1) - 1).abs().max()) < 1e-6
    assert _uniformity(anchors) < _uniformity(chance) - 0.5
    assert _off_diagonal(anchors).max() < 0.6 * _off_diagonal(chance).max()
    welch = (K - D) / (D * (K - 1))  # least possible mean squared cosine
    assert welch - 1e-6 <= np.square(_off_diagonal(anchors)).mean() < 1.01 * welch


def test_sphere_anchors_find_known_optima() -> None:
    pentagon = sphere_anchors(5, 2)
    assert _off_diagonal(pentagon).max() == pytest.approx(math.cos(2 * math.pi / 5), abs=1e-3)
    icosahedron = sphere_anchors(12, 3)
    assert _off_diagonal(icosahedron).max() == pytest.approx(1 / math.sqrt(5), abs=2e-3)


def test_sphere_anchors_beat_adam_on_the_same_objective() -> None:
    K, D = 60, 16
    parameters = sphere_anchors(K, D, steps=0).double().requires_grad_()
    adam = torch.optim.Adam([parameters], lr=1e-2)
    mask = torch.eye(K, dtype=torch.bool)
    for _ in range(300):
        unit = F.normalize(parameters, dim=1)
        loss = (unit @ unit.T / 0.07).masked_fill(mask, -math.inf).logsumexp(1).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert _uniformity(sphere_anchors(K, D)) < _uniformity(F.normalize(parameters.detach(), dim=1)) + 0.005


def test_sphere_anchor_steps_never_raise_the_loss_and_chunks_do_not_matter() -> None:
    losses = [_uniformity(sphere_anchors(60, 16, steps=n)) for n in (0, 1, 3, 10, 40, 160)]
    assert losses == sorted(losses, reverse=True)
    whole, pieces = sphere_anchors(60, 16, steps=5, chunk=1000), sphere_anchors(60, 16, steps=5, chunk=7)
    assert torch.allclose(whole, pieces, atol=1e-5)
    warm = sphere_anchors(60, 16, temperature=2.0)
    assert _uniformity(warm, 2.0) < _uniformity(sphere_anchors(60, 16), 2.0)


@pytest.mark.parametrize(("K", "D"), [(2, 1), (10, 16), (17, 16), (18, 16), (32, 16), (33, 16), (100, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_balanced_anchors_at_every_kind_of_size(K: int, D: int, dtype: torch.dtype) -> None:
    anchors = balanced_anchors(K, D, dtype=dtype)
    assert anchors.shape == (K, D) and anchors.dtype == dtype and anchors.device.type == "cpu"
    assert float((anchors.norm(dim=1) - 1).abs().max()) < (1e-6 if dtype == torch.float32 else 1e-12)
    largest = _off_diagonal(anchors).max()
    if K <= D + 1:
        assert largest == pytest.approx(-1 / (K - 1), abs=1e-6)
    elif K <= 2 * D:
        assert largest == pytest.approx(0, abs=1e-6)
    else:
        assert largest < 0.75


@pytest.mark.parametrize(("K", "D"), [(10, 16), (30, 16), (60, 16)])
def test_anchors_depend_on_the_seed_alone(K: int, D: int) -> None:
    before = torch.random.get_rng_state()
    first = balanced_anchors(K, D, seed=5)
    torch.manual_seed(99)
    assert torch.equal(first, balanced_anchors(K, D, seed=5))
    torch.random.set_rng_state(before)
    assert not torch.allclose(first, balanced_anchors(K, D, seed=6))
    assert torch.equal(before, torch.random.get_rng_state())


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"at least 9 dimensions, but got dim=8.*balanced_anchors"):
        simplex_etf(10, 8)
    with pytest.raises(ArgumentError, match="simplex_etf"):
        sphere_anchors(9, 8)
    with pytest.raises(ArgumentError, match="dim \\+ 2 <= num_classes <= 2 dim"):
        orthogonal_simplices(9, 8)
    with pytest.raises(ArgumentError, match="no different places in 1 dimension"):
        balanced_anchors(3, 1)
    for bad in (1, 0, -3, 2.5, True, "10"):
        with pytest.raises(ArgumentError, match="num_classes: expected a whole number >= 2"):
            balanced_anchors(bad, 8)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="dim: expected a whole number >= 1, but got 0"):
        balanced_anchors(4, 0)
    with pytest.raises(ArgumentError, match=r"float32 or torch.float64, but got torch.float16"):
        balanced_anchors(4, 8, dtype=torch.float16)
    with pytest.raises(ArgumentError, match="seed"):
        balanced_anchors(4, 8, seed=-1)
    with pytest.raises(ArgumentError, match="temperature"):
        sphere_anchors(30, 8, temperature=0)
    with pytest.raises(ArgumentError, match="steps"):
        sphere_anchors(30, 8, steps=-1)
    with pytest.raises(ArgumentError, match="chunk"):
        sphere_anchors(30, 8, chunk=0)


@pytest.mark.parametrize(("K", "D"), [(2, 1), (5, 4), (5, 12), (10, 8), (12, 6), (40, 8)])
def test_alignment_keeps_the_arrangement_and_turns_it_to_the_means(K: int, D: int) -> None:
    anchors, means = balanced_anchors(K, D, dtype=torch.float64), 3 * _randn(K, D, seed=7)
    aligned = align_anchors(anchors, means)
    assert aligned.dtype == anchors.dtype
    assert np.allclose(np.sort(_off_diagonal(aligned)), np.sort(_off_diagonal(anchors)), atol=1e-10)
    assert _objective(aligned, means) >= _objective(anchors, means)
    assert torch.equal(means, 3 * _randn(K, D, seed=7)) and torch.equal(
        anchors, balanced_anchors(K, D, dtype=torch.float64)
    )
    assert torch.equal(aligned, align_anchors(anchors, means))
    for seed in range(20):  # no other orthogonal map does better
        Q = torch.linalg.qr(_randn(D, D, seed=seed))[0]
        assert _objective(anchors @ Q, means) <= _objective(aligned, means) + 1e-9


def test_alignment_undoes_a_hidden_rotation_and_order() -> None:
    for K, D in [(6, 9), (9, 6), (40, 8)]:
        anchors = balanced_anchors(K, D, dtype=torch.float64)
        Q = torch.linalg.qr(_randn(D, D, seed=1))[0]
        means = anchors @ Q * (1 + torch.arange(K)).unsqueeze(1)
        assert _objective(align_anchors(anchors, means, assign=False), means) == pytest.approx(K, abs=1e-9)
        shuffled = anchors[torch.randperm(K, generator=torch.Generator().manual_seed(2))]
        small_turn = torch.linalg.matrix_exp(0.02 * (lambda A: A - A.T)(_randn(D, D, seed=3)))
        aligned = align_anchors(shuffled, anchors @ small_turn)
        assert _objective(aligned, anchors @ small_turn) == pytest.approx(K, abs=1e-9)


def test_a_simplex_needs_no_assignment() -> None:
    anchors, means = simplex_etf(5, 8), _randn(5, 8, seed=4)
    best = max(
        _objective(align_anchors(anchors[list(order)], means, assign=False), means)
        for order in itertools.permutations(range(5))
    )
    aligned = align_anchors(anchors, means)
    assert _objective(aligned, means) == pytest.approx(best, abs=1e-9)
    assert torch.equal(aligned, align_anchors(anchors, means, assign=False))
    assert np.abs(_off_diagonal(aligned) + 0.25).max() < 1e-10


def test_assignment_is_near_the_best_of_all_orders() -> None:
    anchors, means = orthogonal_simplices(6, 4), _randn(6, 4, seed=5)
    scores = sorted(
        _objective(align_anchors(anchors[list(order)], means, assign=False), means)
        for order in itertools.permutations(range(6))
    )
    reached = _objective(align_anchors(anchors, means), means)
    assert reached <= scores[-1] + 1e-9
    assert reached > np.quantile(scores, 0.95)
    assert reached >= _objective(align_anchors(anchors, means, assign=False), means) - 1e-9


def test_alignment_of_duplicate_and_degenerate_means_is_still_orthogonal() -> None:
    means = torch.ones(6, 9, dtype=torch.float64)
    for anchors in (balanced_anchors(6, 9, dtype=torch.float64), balanced_anchors(6, 4, dtype=torch.float64)):
        aligned = align_anchors(anchors, means[:, : anchors.shape[1]])
        assert np.allclose(np.sort(_off_diagonal(aligned)), np.sort(_off_diagonal(anchors)), atol=1e-10)


def test_alignment_keeps_dtype() -> None:
    aligned = align_anchors(balanced_anchors(5, 8), _randn(5, 8).to(torch.bfloat16))
    assert aligned.dtype == torch.float32
    assert float((aligned.norm(dim=1) - 1).abs().max()) < 1e-6


def test_bad_alignment_input_is_refused() -> None:
    anchors, means = balanced_anchors(5, 8), _randn(5, 8)
    with pytest.raises(ArgumentError, match=r"class_means: expected the shape of the anchors, \(5, 8\), .*\(5, 7\)"):
        align_anchors(anchors, means[:, :7])
    with pytest.raises(ArgumentError, match="floating-point"):
        align_anchors(anchors, torch.zeros(5, 8, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="anchors: expected finite"):
        align_anchors(anchors * math.nan, means)
    for bad in (0.0, math.nan, math.inf):
        broken = means.clone()
        broken[[1, 3]] = bad
        with pytest.raises(DataError, match=r"2 of 5 are zero or not finite: class 1, 3\."):
            align_anchors(anchors, broken)
