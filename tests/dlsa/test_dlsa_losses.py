"""The losses of DLSA against hand-computed values, and what is counted in a division."""

from __future__ import annotations

import math

import pytest
import torch

from krdistill.dlsa.clusters import (
    class_distributions,
    cluster_counts,
    head_tail_ratio,
    others_distributions,
    pure_clusters,
    purity,
    size_entropy,
)
from krdistill.dlsa.losses import (
    RunningShares,
    balance_loss,
    likelihood_loss,
    likelihood_weights,
    mixture_log_joint,
    purity_loss,
)
from krdistill.errors import ArgumentError


def close(a: torch.Tensor | float, b: object, **how: float) -> None:
    how = {"rtol": 1e-6, "atol": 1e-9, **how}
    torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), **how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mixture_is_that_of_torch_distributions(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    u, centres = torch.randn(7, 3, generator=g, dtype=dtype), torch.randn(5, 3, generator=g, dtype=dtype)
    found = mixture_log_joint(u, centres)
    normal = torch.distributions.Normal(centres, torch.ones_like(centres))
    close(found, normal.log_prob(u[:, None]).sum(2) - math.log(5), rtol=1e-5, atol=1e-5)
    assert found.dtype == dtype


def test_a_mixture_integrates_to_one() -> None:
    x = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    density = mixture_log_joint(x[:, None], torch.tensor([[-2.0], [0.5], [3.0]], dtype=torch.float64)).exp().sum(1)
    close(torch.trapezoid(density, x), 1.0)


def test_likelihood_weights_by_hand() -> None:
    # ratios 1, 2, 4 -> squares 1, 4, 16 of 21
    close(likelihood_weights(torch.tensor([8.0, 4.0, 2.0])), [1 / 21, 4 / 21, 16 / 21])
    close(likelihood_weights(torch.tensor([8.0, 0.0, 2.0]), power=1), [1 / 5, 0.0, 4 / 5])
    close(likelihood_weights(torch.tensor([3.0, 1.0]), power=0), [0.5, 0.5])
    close(likelihood_weights(torch.tensor([1e9, 1.0], dtype=torch.float64), power=40), [0.0, 1.0])


def test_likelihood_loss_by_hand() -> None:
    found = likelihood_loss(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 1, 1]), torch.tensor([0.25, 0.75]))
    close(found, (0.25 * 1 + 0.75 * 2 + 0.75 * 4) / 3)


def test_purity_loss_by_hand_and_one_side_alone_is_learnt() -> None:
    one = torch.tensor([[0.5, 0.5], [1.0, 0.0]]).clamp_min(1e-30).log().requires_grad_()
    other = torch.tensor([[0.25, 0.75], [0.1, 0.9]]).log().requires_grad_()
    found = purity_loss(one, other)
    close(found, (0.5 * math.log(0.25) + 0.5 * math.log(0.75) + math.log(0.1)) / 2, rtol=1e-5)
    found.backward()
    assert one.grad is None and other.grad is not None


def test_rows_in_clusters_apart_are_purer_than_rows_together() -> None:
    sure, together = torch.tensor([[0.98, 0.02]]).log(), torch.tensor([[0.02, 0.98]]).log()
    assert purity_loss(sure, together) < purity_loss(sure, sure)


def test_balance_loss_is_the_divergence_to_equal_shares() -> None:
    close(balance_loss(torch.full((8,), 1 / 8)), 0.0, atol=1e-6)
    close(balance_loss(torch.tensor([1.0, 0.0, 0.0, 0.0])), math.log(4))
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    close(balance_loss(p), torch.sum(p * (p * 3).log()))
    close(balance_loss(p), balance_loss(p.flip(0)))


def test_running_shares_are_the_weighted_mean_of_the_batches() -> None:
    batches = [torch.rand(4, 3, generator=torch.Generator().manual_seed(s)).log_softmax(1) for s in range(3)]
    running = RunningShares(0.7)
    found = [running.update(b) for b in batches]
    means = [b.exp().mean(0) for b in batches]
    close(found[0], means[0])
    weights = [0.3 * 0.7**2, 0.3 * 0.7, 0.3]
    close(found[2], sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights))
    close(found[2].sum(), 1.0)
    newest = batches[0].clone().requires_grad_()
    balance_loss(running.update(newest)).backward()
    assert newest.grad is not None


def test_what_is_counted_by_hand() -> None:
    clusters, labels = torch.tensor([0, 0, 0, 2, 2, 0]), torch.tensor([0, 0, 1, 2, 1, 0])
    counts = cluster_counts(clusters, labels, 3, 3)
    assert counts.tolist() == [[3, 1, 0], [0, 0, 0], [0, 1, 1]]
    close(purity(counts), [0.75, 0.0, 0.5])
    close(class_distributions(counts), [[0.75, 0.25, 0.0], [0.5, 1 / 3, 1 / 6], [0.0, 0.5, 0.5]])
    found = others_distributions(counts, clusters[[0, 2, 3]], labels[[0, 2, 3]])
    close(found, [[2 / 3, 1 / 3, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    alone = torch.tensor([[0, 1], [3, 1]])
    close(others_distributions(alone, torch.tensor([0]), torch.tensor([1])), [[3 / 5, 2 / 5]])
    assert pure_clusters(counts, above=0.7, larger_than=3) == 1
    assert pure_clusters(counts, above=0.7, larger_than=4) == 0
    head, tail = torch.tensor([True, False, False]), torch.tensor([False, False, True])
    assert head_tail_ratio(counts, head, tail) == 0.0  # its one row stands in the third cluster
    assert head_tail_ratio(counts, head, torch.tensor([False, True, False])) == pytest.approx(3 / 2)
    assert head_tail_ratio(counts.sum(0, keepdim=True), head, tail) == pytest.approx(3.0)


def test_counts_do_not_depend_on_the_order_of_the_rows() -> None:
    g = torch.Generator().manual_seed(1)
    clusters, labels = torch.randint(4, (50,), generator=g), torch.randint(3, (50,), generator=g)
    order = torch.randperm(50, generator=g)
    assert torch.equal(cluster_counts(clusters, labels, 4, 3), cluster_counts(clusters[order], labels[order], 4, 3))


def test_entropy_of_sizes() -> None:
    assert size_entropy(torch.tensor([5, 5, 5, 5])) == pytest.approx(1.0)
    assert size_entropy(torch.tensor([9, 0, 0])) == 0.0
    assert size_entropy(torch.tensor([3])) == 1.0
    found = size_entropy(torch.tensor([1, 3]))
    assert found == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mixture_log_joint(torch.zeros(3, 2), torch.zeros(4, 3)), "centres: expected shape"),
        (lambda: likelihood_weights(torch.tensor([1.0, -1.0])), "counts >= 0"),
        (lambda: likelihood_weights(torch.zeros(3)), "at least one class with a row"),
        (lambda: likelihood_weights(torch.ones(3), power=-1), "power: expected"),
        (lambda: likelihood_loss(torch.zeros(2), torch.tensor([0, 2]), torch.ones(2)), "class indices in 0..1"),
        (lambda: purity_loss(torch.zeros(3, 2), torch.zeros(2, 2)), "other: expected shape"),
        (lambda: RunningShares(1.0), "decay: expected"),
        (lambda: cluster_counts(torch.tensor([0, 4]), torch.tensor([0, 1]), 4, 2), "0..3, but got 4"),
        (lambda: cluster_counts(torch.tensor([0]), torch.tensor([0, 1]), 4, 2), "integer tensor of shape"),
        (lambda: head_tail_ratio(torch.ones(2, 3), torch.ones(3), torch.ones(3)), "bool tensors"),
        (lambda: head_tail_ratio(torch.ones(2, 2), torch.ones(2).bool(), torch.zeros(2).bool()), "none has"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_words(call: object, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        call()  # type: ignore[operator]
