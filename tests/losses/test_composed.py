"""BKD, DiVE, CCKD, SSD and LFME: rectified or re-scaled targets, against references in NumPy or plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from krdistill.errors import ArgumentError
from krdistill.losses import (
    AuxiliaryHead,
    BalancedDistillation,
    ClassConditionalDistillation,
    ExpertDistillation,
    ScaledTeacherDistillation,
    VirtualExamples,
    bkd_loss,
    cckd_loss,
    dive_loss,
    kd_divergence,
)
from krdistill.priors import ClassGroups, ClassPrior, effective_number_weights
from krdistill.rectify import remove_prior

B, K = 6, 5
PRIOR = ClassPrior.from_counts([500, 100, 30, 9, 2])


def _logits(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 3 * torch.randn(B, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def _kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * (np.log(p) - np.log(q))).sum(axis=1)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_bkd_with_inverse_counts_is_the_prior_removed_as_often_as_the_temperature(temperature: float) -> None:
    zs, zt = _logits(0), _logits(1)
    log_prior = PRIOR.log_prior
    got = bkd_loss(zs, zt, class_weights=(-log_prior).exp(), temperature=temperature)
    want = kd_divergence(zs, remove_prior(zt, log_prior, temperature), temperature=temperature)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_bkd_equals_its_reference() -> None:
    zs, zt = _logits(0), _logits(1)
    weights = effective_number_weights(PRIOR.counts, 0.999)
    target = weights.numpy() * _softmax(zt.numpy() / 2)
    target /= target.sum(axis=1, keepdims=True)
    want = 4 * _kl(target, _softmax(zs.numpy() / 2))
    np.testing.assert_allclose(bkd_loss(zs, zt, class_weights=weights, temperature=2.0).numpy(), want, rtol=1e-9)
    module = BalancedDistillation(PRIOR.counts, beta=0.999, temperature=2.0)
    np.testing.assert_allclose(module(zs, zt).numpy(), want, rtol=1e-5)
    # The weight acts on columns: one common to all of them changes nothing.
    assert torch.allclose(
        bkd_loss(zs, zt, class_weights=7 * weights), bkd_loss(zs, zt, class_weights=weights), atol=1e-12
    )
    assert torch.allclose(BalancedDistillation(PRIOR.counts, beta=0)(zs, zt), kd_divergence(zs, zt, temperature=2.0))


def test_dive_equals_its_reference() -> None:
    zs, zt = _logits(0), _logits(1)
    target = _softmax(zt.numpy() / 3) ** 0.5
    target /= target.sum(axis=1, keepdims=True)
    want = 9 * _kl(target, _softmax(zs.numpy() / 3))
    np.testing.assert_allclose(dive_loss(zs, zt, power=0.5, temperature=3.0).numpy(), want, rtol=1e-9)
    assert torch.allclose(dive_loss(zs, zt, power=1.0), kd_divergence(zs, zt, temperature=3.0))
    removed = VirtualExamples(PRIOR.log_prior)(zs, zt)
    assert torch.allclose(removed, dive_loss(zs, zt - PRIOR.log_prior), atol=1e-5)
    with pytest.raises(ArgumentError, match="power"):
        dive_loss(zs, zt, power=0.0)


def test_cckd_equals_its_reference() -> None:
    zs, zt = _logits(0), _logits(1)
    p = np.array([0.4, 0.3, 0.2, 0.08, 0.02])
    pi = PRIOR.frequencies.numpy()
    target = _softmax((zt.numpy() - np.log(p)) / 2)
    want = 4 * _kl(target, _softmax((zs.numpy() + np.log(pi)) / 2))
    got = cckd_loss(zs, zt, teacher_log_prior=torch.tensor(np.log(p)), student_log_prior=PRIOR.log_prior)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-9)
    module = ClassConditionalDistillation(torch.tensor(np.log(p)), PRIOR.log_prior)
    np.testing.assert_allclose(module(zs, zt).numpy(), want, rtol=1e-4)
    flat = torch.zeros(K, dtype=torch.float64)
    plain = cckd_loss(zs, zt, teacher_log_prior=flat, student_log_prior=flat)
    assert torch.allclose(plain, kd_divergence(zs, zt, temperature=2.0))
    with pytest.raises(ArgumentError, match="student_log_prior"):
        cckd_loss(zs, zt, teacher_log_prior=flat, student_log_prior=flat[:-1])


def test_ssd_scales_the_teacher_and_trains_a_second_head() -> None:
    zs, zt = _logits(0), _logits(1)
    scales = torch.tensor([0.8, 0.9, 1.0, 1.3, 1.6])
    got = ScaledTeacherDistillation(scales)(zs, zt)
    want = 4 * _kl(_softmax(zt.numpy() * scales.double().numpy() / 2), _softmax(zs.numpy() / 2))
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-6)
    head = AuxiliaryHead(3, K)
    features, labels = torch.randn(B, 3), torch.arange(B) % K
    want_ce = F.cross_entropy(head.linear(features), labels, reduction="none")
    assert torch.allclose(head(features, labels), want_ce)
    with pytest.raises(ArgumentError, match="scales"):
        ScaledTeacherDistillation(torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize("loss", [bkd_loss, dive_loss, cckd_loss])
def test_gradients(loss: object) -> None:
    extra = {
        bkd_loss: {"class_weights": PRIOR.effective_number_weights()},
        dive_loss: {},
        cckd_loss: {"teacher_log_prior": PRIOR.log_prior.flip(0), "student_log_prior": PRIOR.log_prior},
    }[loss]  # type: ignore[index]
    zs, zt = _logits(0).requires_grad_(), _logits(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, zt, **extra), (zs,))  # type: ignore[operator]
    loss(zs, zt, **extra).sum().backward()  # type: ignore[operator]
    assert zt.grad is None


GROUPS = ClassGroups(("many", "few"), torch.tensor([0, 0, 1, 1, 1]), "by hand")


def test_lfme_equals_a_loop() -> None:
    zs, zt = _logits(0), _logits(1)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    module = ExpertDistillation(GROUPS, temperature=2.0).eval()
    module.accuracy.copy_(torch.tensor([[0.6, 0.1], [0.8, 0.9]]))
    weight = [(1 - 0.6 / 0.8) / 0.7, 1.0]  # the second: 0.1 is below 0.3 of 0.9
    progress = 0.2
    for n in range(B):
        want = 0.0
        for e, classes in enumerate(([0, 1], [2, 3, 4])):
            p = _softmax(zt[n : n + 1, classes].numpy() / 2)
            q = _softmax(zs[n : n + 1, classes].numpy() / 2)
            want += weight[e] * _kl(p, q)[0]
        classes = [0, 1] if labels[n] < 2 else [2, 3, 4]
        start = _softmax(zt[n : n + 1, classes].numpy())[0][classes.index(int(labels[n]))]
        v = start + (1 - start) * 0.4
        want += -np.log(_softmax(v * zs[n : n + 1].numpy())[0, int(labels[n])])
        assert module(zs, zt, labels, progress)[n].item() == pytest.approx(want, rel=1e-5)


def test_lfme_paces_itself() -> None:
    module = ExpertDistillation(GROUPS, momentum=0.5)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    right = 9.0 * F.one_hot(labels, K).double()
    wrong = 9.0 * F.one_hot((labels + 1) % K, K).double()
    module(wrong, right, labels)
    assert module.accuracy.tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert module.expert_weights().tolist() == [1.0, 1.0]
    for _ in range(12):
        module(right, right, labels)
    assert module.expert_weights().max() < 0.01  # the student has caught up
    before = module.accuracy.clone()
    module.eval()(wrong, right, labels)
    assert torch.equal(module.accuracy, before)  # nothing is learnt in evaluation
    loose, strict = (ExpertDistillation(GROUPS, threshold=t) for t in (0.1, 0.6))
    for m in (loose, strict):
        m.accuracy.copy_(torch.tensor([[0.5, 0.5], [1.0, 1.0]]))
    assert loose.expert_weights()[0] < strict.expert_weights()[0]


def test_lfme_group_without_expert_and_bad_input() -> None:
    lonely = ClassGroups(("many", "few"), torch.tensor([0, 0, 0, 0, 1]), "by hand")
    loss = ExpertDistillation(lonely)(_logits(0), _logits(1), torch.tensor([0, 1, 2, 3, 4, 4]))
    assert torch.isfinite(loss).all()
    with pytest.raises(ArgumentError, match="at least two classes"):
        ExpertDistillation(ClassGroups(("a", "b"), torch.tensor([0, 1]), "by hand"))
    with pytest.raises(ArgumentError, match="labels"):
        ExpertDistillation(GROUPS)(_logits(0), _logits(1), torch.full((B,), 7))
