from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from krdistill.errors import ArgumentError
from krdistill.losses.kd import kd_divergence
from krdistill.losses.ltkd import (
    LTKD,
    cross_group_divergence,
    group_log_probabilities,
    ltkd_loss,
    within_group_divergence,
)
from krdistill.priors import ClassGroups, ClassPrior

GROUPS = torch.tensor([0, 2, 1, 0, 2, 2, 1])


def _case(B: int, K: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    s, t = (3 * torch.randn(2, B, K, generator=g, dtype=torch.float64)).to(dtype)
    return s, t


def _softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def _reference(
    student: Tensor, teacher: Tensor, groups: Tensor, T: float, rebalance: bool, reweight: bool
) -> tuple[np.ndarray, np.ndarray]:
    """By the formulas, in probabilities and loops."""
    p, q = _softmax(teacher.double().numpy() / T), _softmax(student.double().numpy() / T)
    members = [np.flatnonzero(groups.numpy() == g) for g in sorted(set(groups.tolist()))]
    B, G = len(p), len(members)
    p_group = np.array([[p[n, m].sum() for m in members] for n in range(B)])
    q_group = np.array([[q[n, m].sum() for m in members] for n in range(B)])
    total = p_group.sum(0)
    scale = (total.sum() / G) / total if rebalance else np.ones(G)
    cross, within = np.zeros(B), np.zeros(B)
    for n in range(B):
        target = scale * p_group[n] / (scale * p_group[n]).sum()
        for g, m in enumerate(members):
            cross[n] += target[g] * math.log(target[g] / q_group[n, g])
            inner = sum(
                p[n, k] / p_group[n, g] * math.log((p[n, k] / p_group[n, g]) / (q[n, k] / q_group[n, g])) for k in m
            )
            within[n] += inner * (1 if reweight else p_group[n, g])
    return cross, within


@pytest.mark.parametrize("rebalance", [True, False])
@pytest.mark.parametrize("reweight", [True, False])
@pytest.mark.parametrize(("B", "T"), [(6, 4.0), (1, 1.0), (4, 0.7)])
def test_parts_and_loss_follow_the_formulas(B: int, T: float, rebalance: bool, reweight: bool) -> None:
    s, t = _case(B, len(GROUPS))
    cross, within = _reference(s, t, GROUPS, T, rebalance, reweight)
    got = cross_group_divergence(s, t, GROUPS, temperature=T, rebalance=rebalance)
    np.testing.assert_allclose(got, cross, rtol=1e-9, atol=1e-12)
    got = within_group_divergence(s, t, GROUPS, temperature=T, reweight=reweight)
    np.testing.assert_allclose(got, within, rtol=1e-9, atol=1e-12)
    loss = ltkd_loss(
        s, t, GROUPS, alpha=0.3, beta=2.0, temperature=T, rebalance=rebalance, reweight=reweight
    )  # fmt: skip
    np.testing.assert_allclose(loss, T**2 * (0.3 * cross + 2 * within), rtol=1e-9, atol=1e-12)


def test_by_hand() -> None:
    # teacher (.4, .2 | .4), student (.2, .2 | .6); one sample, so the rebalanced target is (1/2, 1/2)
    t, s = torch.tensor([[0.4, 0.2, 0.4]]).log(), torch.tensor([[0.2, 0.2, 0.6]]).log()
    groups = torch.tensor([0, 0, 1])
    torch.testing.assert_close(group_log_probabilities(t, groups).exp(), torch.tensor([[0.6, 0.4]]))
    cross = cross_group_divergence(s, t, groups, temperature=1)
    assert float(cross) == pytest.approx(0.5 * math.log(0.5 / 0.4) + 0.5 * math.log(0.5 / 0.6), abs=1e-6)
    within = within_group_divergence(s, t, groups, temperature=1)
    assert float(within) == pytest.approx(2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3), abs=1e-6)


@given(
    B=st.integers(1, 5),
    groups=st.lists(st.integers(0, 3), min_size=2, max_size=9),
    T=st.floats(0.5, 8),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=40, deadline=None)
def test_unbalanced_parts_make_up_the_whole_divergence(B: int, groups: list[int], T: float, seed: int) -> None:
    s, t = _case(B, len(groups), seed)
    loss = ltkd_loss(s, t, torch.tensor(groups), temperature=T, rebalance=False, reweight=False)
    torch.testing.assert_close(loss, kd_divergence(s, t, temperature=T), rtol=1e-9, atol=1e-11)


def test_rebalancing_evens_out_the_targets_over_the_batch() -> None:
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    _, t = _case(40, 6)
    t[:, :2] += 3  # a head-biased teacher
    same = t[:1].expand(40, 6)  # one that answers all images alike

    def mean_target(teacher: Tensor, rebalance: bool) -> Tensor:
        s = torch.zeros(40, 6, dtype=torch.float64, requires_grad=True)
        loss = cross_group_divergence(s, teacher, groups, temperature=1.0, rebalance=rebalance)
        (gradient,) = torch.autograd.grad(loss.sum(), s)
        # of -sum_G target_G log q_G, at a uniform student: (q_G - target_G) / 2 for each class of a group of two
        return (1 / 3 - 2 * gradient[:, ::2]).mean(0)

    shares = group_log_probabilities(t, groups).exp().mean(0)
    torch.testing.assert_close(mean_target(t, False), shares)
    assert float((mean_target(t, True) - 1 / 3).norm()) < 0.6 * float((shares - 1 / 3).norm())
    torch.testing.assert_close(mean_target(same, True), torch.full((3,), 1 / 3, dtype=torch.float64))


def test_groups_without_a_class_are_left_out() -> None:
    s, t = _case(5, 7)
    shifted = GROUPS * 10_000_000 + 5
    assert torch.equal(ltkd_loss(s, t, shifted), ltkd_loss(s, t, GROUPS))
    assert group_log_probabilities(t, shifted).shape == (5, 3)
    named = ClassGroups(("nobody", "a", "b", "c", "nobody either"), GROUPS + 1, "test")
    assert torch.equal(ltkd_loss(s, t, named), ltkd_loss(s, t, GROUPS))
    assert torch.equal(LTKD(named)(s, t), ltkd_loss(s, t, GROUPS))


def test_one_group_and_groups_of_one_class() -> None:
    s, t = _case(4, 5)
    one = torch.zeros(5, dtype=torch.int64)
    assert float(cross_group_divergence(s, t, one).abs().max()) == 0
    torch.testing.assert_close(16 * within_group_divergence(s, t, one), kd_divergence(s, t))
    alone = torch.arange(5)
    assert float(within_group_divergence(s, t, alone).abs().max()) == 0
    torch.testing.assert_close(16 * cross_group_divergence(s, t, alone, rebalance=False), kd_divergence(s, t))


def test_shares_are_normalised_and_the_order_of_classes_makes_no_difference() -> None:
    s, t = _case(5, 7)
    torch.testing.assert_close(group_log_probabilities(t, GROUPS).exp().sum(1), torch.ones(5, dtype=torch.float64))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ltkd_loss(s[:, order], t[:, order], GROUPS[order]), ltkd_loss(s, t, GROUPS))
    torch.testing.assert_close(ltkd_loss(s + 100, t - 50, GROUPS), ltkd_loss(s, t, GROUPS), rtol=1e-9, atol=1e-9)


def test_agreement() -> None:
    _, t = _case(6, 7)
    assert float(within_group_divergence(t, t, GROUPS).abs().max()) < 1e-12
    assert float(cross_group_divergence(t, t, GROUPS, rebalance=False).abs().max()) < 1e-12
    assert float(cross_group_divergence(t, t, GROUPS).max()) > 1e-3  # the balance is what is asked for


def test_two_classes_and_a_batch_of_one() -> None:
    s, t = _case(1, 2)
    loss = ltkd_loss(s.requires_grad_(), t, torch.tensor([0, 1]), temperature=1.0)
    q = torch.softmax(s, dim=1)
    torch.testing.assert_close(loss, -(0.5 * (2 * q).log()).sum(1))  # the target is uniform
    loss.sum().backward()
    assert s.grad is not None and bool(torch.isfinite(s.grad).all())


def test_gradients() -> None:
    s, t = _case(3, 7)
    t.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ltkd_loss(x, t, GROUPS, temperature=2.0), s.requires_grad_())
    ltkd_loss(s, t, GROUPS).sum().backward()
    assert t.grad is None and s.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_lifted(dtype: torch.dtype) -> None:
    s, t = _case(4, 7, dtype=dtype)
    s.requires_grad_()
    loss = ltkd_loss(s, t, GROUPS)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), ltkd_loss(s.double(), t.double(), GROUPS), rtol=1e-4, atol=1e-5)
    loss.sum().backward()
    assert s.grad is not None and bool(torch.isfinite(s.grad).all())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ltkd_loss(s, t, GROUPS), loss)


@pytest.mark.parametrize("K", [3, 8142])
def test_huge_logits_and_many_classes_stay_finite(K: int) -> None:
    s, t = _case(3, K, dtype=torch.float32)
    counts = torch.arange(K, 0, -1)
    groups = ClassPrior.from_counts(counts).groups("thirds")
    s = (1e4 * s.sign()).requires_grad_()
    loss = ltkd_loss(s, -1e4 * t.sign(), groups)
    loss.sum().backward()
    assert bool(torch.isfinite(loss).all()) and s.grad is not None and bool(torch.isfinite(s.grad).all())


def test_every_setting_reaches_the_loss() -> None:
    s, t = _case(4, 7)
    base = LTKD(GROUPS)(s, t, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(base, ltkd_loss(s, t, GROUPS, alpha=1, beta=1, temperature=4))
    settings: list[dict[str, Any]] = [
        {"alpha": 2.0},
        {"beta": 2.0},
        {"temperature": 2.0},
        {"rebalance": False},
        {"reweight": False},
    ]
    for setting in settings:
        assert float((LTKD(GROUPS, **setting)(s, t) - base).abs().max()) > 1e-3, setting
        torch.testing.assert_close(LTKD(GROUPS, **setting)(s, t), ltkd_loss(s, t, GROUPS, **setting))
    assert float((LTKD(GROUPS.flip(0))(s, t) - base).abs().max()) > 1e-3
    assert "group sizes [2, 2, 3]" in repr(LTKD(GROUPS))


def test_the_groups_are_a_buffer_that_no_state_holds() -> None:
    module = LTKD(GROUPS)
    assert [name for name, _ in module.named_buffers()] == ["order"] and not module.state_dict()
    assert module.to(torch.bfloat16).order.dtype == torch.int64
    module.order.zero_()
    assert GROUPS.tolist() == [0, 2, 1, 0, 2, 2, 1]


def test_nan_reaches_the_whole_batch_through_the_balance_and_its_row_alone_without() -> None:
    s, t = _case(3, 7)
    t[1, 2] = math.nan
    assert ltkd_loss(s, t, GROUPS, rebalance=False).isnan().tolist() == [False, True, False]
    assert bool(ltkd_loss(s, t, GROUPS).isnan().all())


def test_bad_input_is_refused() -> None:
    s, t = _case(3, 7)
    for bad in (
        lambda: ltkd_loss(s, t[:, :3], GROUPS),
        lambda: ltkd_loss(s[:2], t, GROUPS),
        lambda: ltkd_loss(s, t, GROUPS[:5]),
        lambda: ltkd_loss(s, t, GROUPS - 1),
        lambda: ltkd_loss(s, t, GROUPS.double()),
        lambda: ltkd_loss(s, t, GROUPS.tolist()),  # type: ignore[arg-type]
        lambda: ltkd_loss(s, t, ClassGroups(("a",), torch.zeros(5), "test")),
        lambda: group_log_probabilities(s, GROUPS[:5]),
        lambda: ltkd_loss(s, t, GROUPS, alpha=-1),
        lambda: ltkd_loss(s, t, GROUPS, beta=math.inf),
        lambda: ltkd_loss(s, t, GROUPS, temperature=0),
        lambda: LTKD(GROUPS, temperature=0),
        lambda: LTKD(GROUPS.view(1, 7)),
        lambda: LTKD(GROUPS)(s[:, :5], t[:, :5]),
    ):
        with pytest.raises(ArgumentError, match=r"expected .*but got"):
            bad()
