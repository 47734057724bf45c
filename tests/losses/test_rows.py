"""The losses on logits, worked on in pieces of the rows: the same values, one array kept, a backward pass as any."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from krdistill.errors import ArgumentError
from krdistill.losses import (
    LTKD,
    ExpertDistillation,
    LabelAwareSmoothing,
    LogitAdjustedLoss,
    _rows,
    balanced_softmax,
    bkd_loss,
    cckd_loss,
    cross_entropy,
    dkd_loss,
    focal_loss,
    kd_divergence,
    ldam_loss,
    logit_mse,
    lrd_loss,
)
from krdistill.priors import ClassPrior

B, K = 7, 6
COUNTS = torch.tensor([90, 60, 30, 12, 5, 2])
LOG_PRIOR = (COUNTS / COUNTS.sum()).double().log()
GROUPS = torch.tensor([2, 0, 1, 0, 2, 1])  # not in the order of the classes


def _experts(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return ExpertDistillation(ClassPrior.from_counts(COUNTS).groups("thirds")).eval()(s, t, y, 0.3)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda s, t, y: cross_entropy(s, y),
    "smoothed": lambda s, t, y: cross_entropy(s, y, label_smoothing=0.1),
    "balanced_softmax": lambda s, t, y: balanced_softmax(s, y, LOG_PRIOR),
    "logit_adjusted": lambda s, t, y: LogitAdjustedLoss(COUNTS, tau=0.7, label_smoothing=0.2)(s, y),
    "label_aware": lambda s, t, y: LabelAwareSmoothing(COUNTS)(s, y),
    "ldam": lambda s, t, y: ldam_loss(s / 20, y, torch.linspace(0.1, 0.5, K), scale=10),
    "focal": lambda s, t, y: focal_loss(s, y, class_weights=1 / COUNTS.double()),
    "kd": lambda s, t, y: kd_divergence(s, t, temperature=3),
    "lrd": lambda s, t, y: lrd_loss(s, t, y, log_prior=LOG_PRIOR),
    "lrd_student": lambda s, t, y: lrd_loss(s, t, y, log_prior=LOG_PRIOR, prior_side="student"),
    "bkd": lambda s, t, y: bkd_loss(s, t, class_weights=1 / COUNTS.double()),
    "cckd": lambda s, t, y: cckd_loss(s, t, teacher_log_prior=LOG_PRIOR / 2, student_log_prior=LOG_PRIOR),
    "dkd": lambda s, t, y: dkd_loss(s, t, y, alpha=0.7, beta=3, temperature=2),
    "ltkd": lambda s, t, y: LTKD(GROUPS, alpha=0.6, beta=1.7, temperature=2)(s, t),
    "ltkd_plain": lambda s, t, y: LTKD(GROUPS, rebalance=False, reweight=False)(s, t),
    "logit_mse": lambda s, t, y: logit_mse(s, t),
    "lfme": _experts,
}
OWN = sorted(LOSSES.keys() - {"lfme"})  # one function, one array
names = pytest.mark.parametrize("name", LOSSES)


def _batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    s, t = (3 * torch.randn(2, B, K, generator=g, dtype=torch.float64)).to(dtype)
    return s.requires_grad_(), t, torch.randint(K, (B,), generator=g)


def _loss_and_gradient(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    s, t, y = _batch(dtype)
    before = t.clone()
    loss = LOSSES[name](s, t, y)
    loss.backward(torch.linspace(0.5, 2, B, dtype=loss.dtype))
    assert s.grad is not None and torch.equal(t, before)
    return loss.detach(), s.grad


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows of float64 at once: three, three and one."""
    monkeypatch.setattr(_rows, "_PIECE", 3 * K * 8)


@names
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pieces_change_nothing(name: str, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _loss_and_gradient(name, dtype)
    monkeypatch.setattr(_rows, "_PIECE", rows * K * (8 if dtype == torch.float64 else 4))
    torch.testing.assert_close(_loss_and_gradient(name, dtype), whole)


@names
def test_gradients_of_pieces(name: str, small_pieces: None) -> None:
    s, t, y = _batch()
    assert _rows.piece_rows(s) == 3
    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, t, y), (s,))


@names
@pytest.mark.parametrize("pieces", [False, True])
def test_backward_may_run_again_where_the_graph_is_kept(
    name: str, pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pieces:
        monkeypatch.setattr(_rows, "_PIECE", 3 * K * 8)
    s, t, y = _batch()
    total = LOSSES[name](s, t, y).square().sum()  # upstream gradients that differ by row
    (first,) = torch.autograd.grad(total, s, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(total, s, retain_graph=True)
    (third,) = torch.autograd.grad(total, s)
    assert torch.equal(first, kept) and torch.equal(second, kept) and torch.equal(third, kept)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total.backward()


@names
@pytest.mark.parametrize("linear", [True, False])
def test_a_gradient_of_the_gradient_is_refused(name: str, linear: bool, small_pieces: None) -> None:
    s, t, y = _batch()
    loss = LOSSES[name](s, t, y)
    (gradient,) = torch.autograd.grad((loss if linear else loss.square()).sum(), s, create_graph=True)
    with pytest.raises(ArgumentError, match="differentiated twice"):
        (loss.sum() + gradient.square().sum()).backward()


def test_small_cross_entropies_are_torchs_own_and_differentiable_twice() -> None:
    s, _, y = _batch()
    assert torch.equal(cross_entropy(s, y), F.cross_entropy(s, y, reduction="none"))
    assert torch.autograd.gradgradcheck(lambda s: cross_entropy(s, y, label_smoothing=0.1), (s,))


@pytest.mark.parametrize("name", OWN)
def test_one_array_of_the_logits_size_is_kept(name: str, small_pieces: None) -> None:
    s, t, y = _batch()
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.data_ptr() != s.data_ptr():
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = LOSSES[name](s, t, y)
    large = [size for size in kept.values() if size >= s.nbytes]
    assert loss.shape == (B,) and large == [s.nbytes]


@names
def test_no_rows(name: str) -> None:
    if name == "lfme":
        pytest.skip("takes the accuracy of a batch")
    s, t, y = _batch()
    s = s.detach()[:0].requires_grad_()
    loss = LOSSES[name](s, t[:0], y[:0])
    loss.sum().backward()
    assert loss.shape == (0,) and s.grad is not None and s.grad.shape == (0, K)


@names
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_values_without_a_graph(
    name: str, mode: Callable[[], AbstractContextManager[None]], small_pieces: None
) -> None:
    s, t, y = _batch()
    with mode():
        loss = LOSSES[name](s, t, y)
        detached = LOSSES[name](s.detach(), t, y)
    assert not loss.requires_grad
    torch.testing.assert_close(loss.clone(), LOSSES[name](s, t, y).detach())
    torch.testing.assert_close(detached, loss)


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "kd", "dkd", "ltkd"])
def test_compiled_gradients(name: str) -> None:
    s, t, y = _batch()
    want = torch.autograd.grad(LOSSES[name](s, t, y).sum(), s)
    compiled = torch.compile(LOSSES[name], backend="eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(s, t, y).sum(), s), want)
