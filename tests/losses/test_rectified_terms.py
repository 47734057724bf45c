"""Options of LRD and RRD: the prior's side, its warm-up, tail weights, prototype contrast, the teacher's classifier."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from krdistill.errors import ArgumentError, DataError
from krdistill.losses import (
    LogitRectifiedDistillation,
    Projector,
    PrototypeContrast,
    RectifiedClassifier,
    RepresentationRectifiedDistillation,
    cckd_loss,
    cross_entropy,
    group_sample_weights,
    kd_divergence,
    lrd_loss,
    prototype_contrast_loss,
    rectified_classifier_loss,
    rectify_logits,
    rrd_loss,
    tail_weights,
)
from krdistill.priors import ClassPrior
from krdistill.rectify import class_means, rarity, transfer_variance, within_class_variation

K, D, D_S, B = 5, 12, 7, 20
COUNTS = [200, 90, 40, 10, 4]
PRIOR = ClassPrior.from_counts(COUNTS)
UNIFORM = ClassPrior.from_counts([30] * K)
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0], dtype=torch.float64)


def _logits(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    s, t = 2 * torch.randn(2, B, K, generator=g, dtype=torch.float64)
    return s.to(dtype), t.to(dtype), torch.arange(B) % K


def _features(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    f_s, f_t = torch.randn(2, B, D, generator=g, dtype=torch.float64)
    y = torch.arange(B) % K
    return f_s.to(dtype), f_t.to(dtype), y, class_means(f_t, y, K).to(dtype)


def _head() -> nn.Linear:
    head = nn.utils.skip_init(nn.Linear, D, K)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        head.weight.normal_(generator=g)
        head.bias.normal_(generator=g)
    return head


def _projector(narrow: int = D_S) -> Projector:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Projector(narrow, D)


def _log_softmax(z: np.ndarray) -> np.ndarray:
    top = z.max(1, keepdims=True)
    return z - top - np.log(np.exp(z - top).sum(1, keepdims=True))


def _kl(target: np.ndarray, said: np.ndarray, T: float) -> np.ndarray:
    a, b = _log_softmax(target / T), _log_softmax(said / T)
    return T**2 * (np.exp(a) * (a - b)).sum(1)


# The prior's side ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.0, 0.7, 1.5])
def test_the_prior_on_the_students_side_against_numpy(tau: float) -> None:
    s, t, y = _logits()
    lp = PRIOR.log_prior.numpy()
    got = lrd_loss(
        s, t, y, log_prior=PRIOR.log_prior, tau=tau, correction="none", temperature=3, prior_side="student",
        class_weights=WEIGHTS,
    )  # fmt: skip
    want = WEIGHTS.numpy()[y] * _kl(t.numpy(), s.numpy() + tau * lp, 3)
    assert np.allclose(got.numpy(), want, atol=1e-12)


@pytest.mark.parametrize("correction", ["lift", "swap", "none"])
def test_both_sides_have_the_same_optimum(correction: str) -> None:
    _, t, y = _logits()
    best, _ = rectify_logits(t, y, log_prior=PRIOR.log_prior, tau=1.2, correction=correction)  # type: ignore[arg-type]
    s = best.clone().requires_grad_()
    for side in ("teacher", "student"):
        loss = lrd_loss(
            s, t, y, log_prior=PRIOR.log_prior, tau=1.2, correction=correction, prior_side=side  # type: ignore[arg-type]
        )  # fmt: skip
        assert torch.allclose(loss, torch.zeros(B, dtype=torch.float64), atol=1e-12)
        (gradient,) = torch.autograd.grad(loss.sum(), s)
        assert gradient.abs().max() < 1e-12


def test_on_the_students_side_and_without_correction_it_is_cckd_for_a_teacher_without_bias() -> None:
    s, t, y = _logits()
    got = lrd_loss(
        s, t, y, log_prior=PRIOR.log_prior, correction="none", prior_side="student", temperature=2.0
    )  # fmt: skip
    nothing = torch.zeros(K, dtype=torch.float64)
    want = cckd_loss(s, t, teacher_log_prior=nothing, student_log_prior=PRIOR.log_prior, temperature=2.0)
    assert torch.allclose(got, want)


def test_under_a_uniform_prior_the_side_makes_no_difference() -> None:
    s, t, y = _logits()
    both = [lrd_loss(s, t, y, log_prior=UNIFORM.log_prior, prior_side=p) for p in ("teacher", "student")]  # type: ignore[arg-type]
    assert torch.allclose(*both)
    plain = lrd_loss(s, t, y, log_prior=UNIFORM.log_prior, prior_side="student", correction="none")
    assert torch.allclose(plain, kd_divergence(s, t))


def test_gradients_of_the_students_side_and_its_inputs_stay() -> None:
    s, t, y = _logits()
    before = t.clone()
    x = s.clone().requires_grad_()
    t.requires_grad_()
    for correction in ("none", "swap"):
        assert torch.autograd.gradcheck(
            lambda x, c=correction: lrd_loss(x, t, y, log_prior=PRIOR.log_prior, prior_side="student", correction=c),
            (x,),
        )
    assert torch.equal(t, before) and t.grad is None
    with pytest.raises(ArgumentError, match="prior_side: expected one of 'teacher', 'student', but got 'both'"):
        lrd_loss(s, t, y, log_prior=PRIOR.log_prior, prior_side="both")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="prior_side"):
        LogitRectifiedDistillation(PRIOR.log_prior, prior_side="both")  # type: ignore[arg-type]


# Deferred rectification ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_tau_rises_from_0_to_its_value(side: str) -> None:
    s, t, y = _logits(torch.float32)
    module = LogitRectifiedDistillation(PRIOR.log_prior, tau=1.4, warmup=0.5, prior_side=side)  # type: ignore[arg-type]
    for progress, tau in ((0.0, 0.0), (0.125, 0.35), (0.25, 0.7), (0.5, 1.4), (0.9, 1.4)):
        assert module.tau_at(progress) == pytest.approx(tau)
        want = lrd_loss(s, t, y, log_prior=PRIOR.log_prior, tau=tau, prior_side=side)  # type: ignore[arg-type]
        assert torch.allclose(module(s, t, y, progress), want, atol=1e-5)
        wrong = rectify_logits(t, y, log_prior=PRIOR.log_prior, tau=tau)[1]
        assert torch.equal(module.corrected(t, y, progress), wrong)
        assert torch.equal(module.rectify(t, y, progress)[1], wrong)
    at_once = LogitRectifiedDistillation(PRIOR.log_prior, tau=1.4, prior_side=side)  # type: ignore[arg-type]
    assert torch.equal(at_once(s, t, y, 0.0), at_once(s, t, y, 1.0))
    assert "warmup=0.5" in repr(module)
    for warmup in (-0.1, 1.1, math.nan):
        with pytest.raises(ArgumentError, match="warmup"):
            LogitRectifiedDistillation(PRIOR.log_prior, warmup=warmup)


# Tail weights --------------------------------------------------------------------------------------------------------


def test_tail_weights_by_hand() -> None:
    assert tail_weights(COUNTS, "none") is None
    weights = tail_weights([16, 4, 1], "inverse-sqrt")  # 1/4, 1/2, 1; images times weight: 4 + 2 + 1 = 7 of 21
    assert weights is not None and weights.tolist() == pytest.approx([0.75, 1.5, 3])
    weights = tail_weights([2, 1], "effective-number", beta=0.5)  # 1 / 0.75, 1 / 0.5: 8/3 + 2 = 14/3 of 3
    assert weights is not None and weights.tolist() == pytest.approx([(4 / 3) * 9 / 14 * 0.5 * 2, 2 * 9 / 14])
    groups = PRIOR.groups()
    by_group = tail_weights(COUNTS, "group", groups=groups)
    assert by_group is not None and torch.equal(by_group, group_sample_weights(COUNTS, groups))


@pytest.mark.parametrize("weighting", ["inverse-sqrt", "effective-number", "group"])
def test_tail_weights_rise_to_the_tail_and_keep_the_mean(weighting: str) -> None:
    groups = PRIOR.groups("thirds")
    weights = tail_weights(COUNTS, weighting, groups=groups)  # type: ignore[arg-type]
    assert weights is not None and weights.dtype == torch.float64
    labels = torch.repeat_interleave(torch.arange(K), PRIOR.counts)  # an epoch
    assert float(weights[labels].mean()) == pytest.approx(1)
    assert bool((weights[1:] >= weights[:-1]).all()) and weights[-1] > weights[0]
    even = tail_weights([30] * 6, weighting, groups=ClassPrior.from_counts([30] * 6).groups("thirds"))  # type: ignore[arg-type]
    assert even is not None and even.tolist() == pytest.approx([1] * 6)


def test_tail_weights_refuse_what_does_not_fit() -> None:
    with pytest.raises(
        ArgumentError, match=r"weighting: expected one of .*'effective-number', 'group', but got 'inverse'"
    ):
        tail_weights(COUNTS, "inverse")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="groups: weighting='group' needs"):
        tail_weights(COUNTS, "group")
    with pytest.raises(ArgumentError, match="beta"):
        tail_weights(COUNTS, "effective-number", beta=1.0)
    with pytest.raises(DataError, match="no training image"):
        tail_weights([3, 0], "inverse-sqrt")


# Features ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rectify", ["recentre", "blend", "variance-transfer", "none"])
def test_class_weights_on_features(rectify: str) -> None:
    f_s, f_t, y, means = _features()
    options = {
        "anchors": means.flip(0), "class_means": means, "strength": rarity(COUNTS), "rectify": rectify,
        "variation": within_class_variation(f_t, y, means),
    }  # fmt: skip
    plain = rrd_loss(f_s, f_t, y, **options)  # type: ignore[arg-type]
    got = rrd_loss(f_s, f_t, y, class_weights=WEIGHTS, **options)  # type: ignore[arg-type]
    assert torch.allclose(got, plain * WEIGHTS[y])
    options.pop("rectify")
    module = RepresentationRectifiedDistillation(
        student_dim=D_S, rectify=rectify, class_weights=WEIGHTS, teacher_dim=D, **options  # type: ignore[arg-type]
    )  # fmt: skip
    narrow = torch.randn(B, D_S, generator=torch.Generator().manual_seed(5))
    want = rrd_loss(
        module.projector(narrow), f_t.float(), y, rectify=rectify, class_weights=WEIGHTS, **options  # type: ignore[arg-type]
    )  # fmt: skip
    assert torch.allclose(module(narrow, f_t.float(), y), want, atol=1e-5)
    assert torch.autograd.gradcheck(
        lambda x: rrd_loss(x, f_t[:5], y[:5], rectify=rectify, class_weights=WEIGHTS, **options),  # type: ignore[arg-type]
        (f_s[:5].clone().requires_grad_(),),
    )


@pytest.mark.parametrize("distance", ["cosine", "squared"])
def test_variance_transfer_as_a_target(distance: str) -> None:
    f_s, f_t, y, means = _features()
    variation = within_class_variation(f_t, y, means)
    strength = rarity(COUNTS)
    options = {"anchors": None, "class_means": means, "strength": strength, "variation": variation}
    target = transfer_variance(f_t, y, means, *variation, strength)
    got = rrd_loss(f_s, f_t, y, rectify="variance-transfer", distance=distance, **options)  # type: ignore[arg-type]
    assert torch.allclose(got, rrd_loss(f_s, target, y, anchors=None, rectify="none", distance=distance))  # type: ignore[arg-type]
    equal = {**options, "strength": rarity([9] * K)}  # equal counts leave plain matching
    got = rrd_loss(f_s, f_t, y, rectify="variance-transfer", **equal)  # type: ignore[arg-type]
    assert torch.allclose(got, rrd_loss(f_s, f_t, y, anchors=None, rectify="none"))
    module = RepresentationRectifiedDistillation(None, student_dim=D_S, rectify="variance-transfer", **{
        k: v for k, v in options.items() if k != "anchors"
    })  # type: ignore[arg-type]  # fmt: skip
    assert {"basis", "variances", "class_means", "strength"} < set(module.state_dict())


def test_what_variance_transfer_needs_is_asked_for() -> None:
    f_s, f_t, y, means = _features()
    full = {
        "class_means": means, "strength": rarity(COUNTS), "variation": within_class_variation(f_t, y, means),
    }  # fmt: skip
    for name in full:
        less = {k: v for k, v in full.items() if k != name}
        with pytest.raises(ArgumentError, match=f"{name}: rectify='variance-transfer' needs it, but got None"):
            rrd_loss(f_s, f_t, y, anchors=None, rectify="variance-transfer", **less)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match=f"{name}: rectify='variance-transfer' needs it, but got None"):
            RepresentationRectifiedDistillation(None, student_dim=D_S, rectify="variance-transfer", **less)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="basis"):
        RepresentationRectifiedDistillation(
            None, student_dim=D_S, rectify="variance-transfer",
            **{**full, "variation": (torch.eye(D - 1), torch.ones(D))},  # type: ignore[arg-type]
        )  # fmt: skip
    with pytest.raises(ArgumentError, match=r"class_weights: .* \(5,\)"):
        RepresentationRectifiedDistillation(
            None, student_dim=D_S, rectify="variance-transfer", class_weights=torch.ones(K + 1), **full  # type: ignore[arg-type]
        )  # fmt: skip
    with pytest.raises(ArgumentError, match="class indices"):
        rrd_loss(f_s, f_t, y, anchors=None, rectify="none", class_weights=torch.ones(K - 1))


# Prototype contrast --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.05, 0.1, 1.0])
def test_contrast_against_numpy(t: float) -> None:
    f_s, _, y, means = _features()
    got = prototype_contrast_loss(
        f_s, y, prototypes=3 * means, log_prior=PRIOR.log_prior, temperature=t, class_weights=WEIGHTS
    )
    f, c = f_s.numpy(), means.numpy()
    want = np.zeros(B)
    for i, k in enumerate(y.tolist()):
        cosine = [f[i] @ c[j] / np.linalg.norm(f[i]) / np.linalg.norm(c[j]) for j in range(K)]
        scores = [COUNTS[j] * math.exp(cosine[j] / t) for j in range(K)]
        want[i] = -float(WEIGHTS[k]) * math.log(scores[k] / sum(scores))
    assert np.allclose(got.numpy(), want, atol=1e-10)


def test_contrast_under_a_uniform_prior_is_infonce() -> None:
    f_s, _, y, means = _features()
    got = prototype_contrast_loss(f_s, y, prototypes=means, log_prior=UNIFORM.log_prior)
    want = F.cross_entropy(F.normalize(f_s) @ means.T / 0.1, y, reduction="none")
    assert torch.allclose(got, want)
    assert torch.allclose(got, cross_entropy(F.normalize(f_s) @ means.T / 0.1, y))


def test_contrast_with_the_prior_asks_more_of_the_tail() -> None:
    f_s, _, y, means = _features()
    adjusted, plain = (
        prototype_contrast_loss(f_s, y, prototypes=means, log_prior=p.log_prior) for p in (PRIOR, UNIFORM)
    )
    assert bool((adjusted[y == K - 1] > plain[y == K - 1]).all()) and bool((adjusted[y == 0] < plain[y == 0]).all())


# The teacher's classifier --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [True, False])
def test_classifier_against_numpy(with_bias: bool) -> None:
    f_s, _, y, _ = _features()
    _, t, _ = _logits()
    head = _head().double()
    W, b = head.weight.detach(), head.bias.detach() if with_bias else None
    got = rectified_classifier_loss(
        f_s, t, y, weight=W, bias=b, log_prior=PRIOR.log_prior, tau=0.8, temperature=2, class_weights=WEIGHTS
    )
    lp = 0.8 * PRIOR.log_prior.numpy()
    said = f_s.numpy() @ W.numpy().T + (0 if b is None else b.numpy()) - lp
    assert np.allclose(got.numpy(), WEIGHTS.numpy()[y] * _kl(t.numpy() - lp, said, 2), atol=1e-10)


def test_the_teachers_own_feature_has_no_loss() -> None:
    _, f_t, y, _ = _features()
    head = _head().double()
    t = head(f_t).detach()
    options = {"weight": head.weight, "bias": head.bias, "log_prior": PRIOR.log_prior}
    assert torch.allclose(
        rectified_classifier_loss(f_t, t, y, **options),  # type: ignore[arg-type]
        torch.zeros(B, dtype=torch.float64),
        atol=1e-12,
    )
    corrected = rectified_classifier_loss(f_t, t, y, correction="swap", **options)  # type: ignore[arg-type]
    fired = rectify_logits(t, y, log_prior=PRIOR.log_prior)[1]
    assert torch.equal(corrected > 1e-9, fired) and bool(fired.any())


def test_classifier_without_a_prior_is_distillation_through_the_head() -> None:
    f_s, _, y, _ = _features()
    _, t, _ = _logits()
    head = _head().double()
    got = rectified_classifier_loss(
        f_s, t, y, weight=head.weight, bias=head.bias, log_prior=UNIFORM.log_prior
    )  # fmt: skip
    assert torch.allclose(got, kd_divergence(head(f_s), t))


# What both have in common --------------------------------------------------------------------------------------------


def _contrast(f: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return prototype_contrast_loss(f, y, prototypes=_features()[3], log_prior=PRIOR.log_prior)


def _classifier(f: Tensor, t: Tensor, y: Tensor) -> Tensor:
    head = _head()
    return rectified_classifier_loss(f, t, y, weight=head.weight, bias=head.bias, log_prior=PRIOR.log_prior)


terms = pytest.mark.parametrize("term", [_contrast, _classifier])


@terms
def test_gradients(term: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    f_s, _, y, _ = _features()
    _, t, _ = _logits()
    t.requires_grad_()
    f_s.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: term(f, t, y), (f_s,))
    term(f_s, t, y).sum().backward()
    assert f_s.grad is not None and t.grad is None


@terms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_and_autocast(term: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    f_s, _, y, _ = _features(dtype)
    _, t, _ = _logits(dtype)
    exact = term(f_s.double(), t.double(), y)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            got = term(f_s, t, y)
        assert got.dtype == torch.float32
        assert torch.allclose(got.double(), exact, rtol=1e-4, atol=1e-4)
    assert torch.allclose(term(f_s[:1], t[:1], y[:1]), got[:1], atol=1e-5)


@terms
def test_a_feature_of_nan_is_seen_and_a_zero_one_is_finite(term: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    f_s, _, y, _ = _features()
    _, t, _ = _logits()
    assert not bool(torch.isfinite(term(f_s * math.nan, t, y)).any())
    zero = torch.zeros(B, D, dtype=torch.float64, requires_grad=True)
    term(zero, t, y).sum().backward()
    assert zero.grad is not None and bool(torch.isfinite(zero.grad).all())


def _modules(projector: Projector) -> list[tuple[nn.Module, bool]]:
    means = _features()[3]
    return [
        (PrototypeContrast(means, PRIOR.log_prior, projector=projector, temperature=0.2, class_weights=WEIGHTS), False),
        (RectifiedClassifier(_head(), PRIOR.log_prior, projector=projector, class_weights=WEIGHTS, tau=0.9), True),
    ]


def test_modules_are_their_functions_and_share_a_projector() -> None:
    projector = _projector()
    _, t, y = _logits(torch.float32)
    narrow = torch.randn(B, D_S, generator=torch.Generator().manual_seed(5))
    wide, head = projector(narrow), _head()
    (contrast, _), (classifier, _) = _modules(projector)
    want = prototype_contrast_loss(
        wide, y, prototypes=_features()[3], log_prior=PRIOR.log_prior, temperature=0.2, class_weights=WEIGHTS
    )
    assert torch.allclose(contrast(narrow, y), want, atol=1e-5)
    want = rectified_classifier_loss(
        wide, t, y, weight=head.weight, bias=head.bias, log_prior=PRIOR.log_prior, tau=0.9, class_weights=WEIGHTS
    )
    assert torch.allclose(classifier(narrow, t, y), want, atol=1e-5)
    both = nn.ModuleList([contrast, classifier])
    assert len(list(both.parameters())) == 2  # the projector's, once; the teacher's head is not trained
    (contrast(narrow, y).sum() + classifier(narrow, t, y).sum()).backward()
    assert projector.linear.weight.grad is not None
    twin = nn.ModuleList([m for m, _ in _modules(_projector(D_S))])
    with torch.no_grad():
        twin[1].weight.zero_()
    twin.load_state_dict(both.state_dict())
    assert torch.equal(twin[1](narrow, t, y), classifier(narrow, t, y))
    assert "temperature=0.2" in repr(contrast) and "tau=0.9" in repr(classifier)


def test_modules_hold_copies() -> None:
    head, means, log_prior = _head(), _features(torch.float32)[3], PRIOR.log_prior.float()
    classifier = RectifiedClassifier(head, log_prior, projector=_projector())
    contrast = PrototypeContrast(means, log_prior, projector=_projector())
    for module in (classifier, contrast):
        for buffer in module.buffers():
            buffer.zero_()
    assert head.weight.abs().sum() > 0 and means.abs().sum() > 0 and torch.equal(log_prior, PRIOR.log_prior.float())


def test_what_does_not_fit_is_refused() -> None:
    f_s, _, y, means = _features()
    _, t, _ = _logits()
    lp = PRIOR.log_prior
    with pytest.raises(ArgumentError, match=r"prototypes: expected shape \(K, D\) = \(5, 12\), but got .*\(5, 9\)"):
        prototype_contrast_loss(f_s, y, prototypes=means[:, :9], log_prior=lp)
    with pytest.raises(ArgumentError, match="temperature: expected a finite number > 0"):
        prototype_contrast_loss(f_s, y, prototypes=means, log_prior=lp, temperature=0)
    with pytest.raises(ArgumentError, match="log_prior"):
        prototype_contrast_loss(f_s, y, prototypes=means, log_prior=lp[1:])
    with pytest.raises(ArgumentError, match=r"class indices in 0\.\.4, but got 5"):
        prototype_contrast_loss(f_s, y + 1, prototypes=means, log_prior=lp)
    with pytest.raises(ArgumentError, match="class_weights"):
        prototype_contrast_loss(f_s, y, prototypes=means, log_prior=lp, class_weights=-WEIGHTS)
    with pytest.raises(ArgumentError, match="prototypes: expected finite numbers, but row 0"):
        PrototypeContrast(means * math.nan, lp, projector=_projector())
    with pytest.raises(ArgumentError, match="-inf for class 1"):
        PrototypeContrast(means[:2], torch.tensor([1.0, 0.0]).log(), projector=_projector())
    head = _head().double()
    options = {"weight": head.weight, "bias": head.bias, "log_prior": lp}
    with pytest.raises(ArgumentError, match=r"weight: expected shape \(K, D\) = \(5, 9\)"):
        rectified_classifier_loss(f_s[:, :9], t, y, **options)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"teacher_logits: expected shape \(B, K\) = \(20, 5\)"):
        rectified_classifier_loss(f_s, t[:, 1:], y, **options)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="bias"):
        rectified_classifier_loss(f_s, t, y, **{**options, "bias": head.bias[1:]})  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="class indices"):
        rectified_classifier_loss(f_s, t, y + 1, **options)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="correction: expected one of"):
        RectifiedClassifier(_head(), lp, projector=_projector(), correction="shift")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="temperature"):
        RectifiedClassifier(_head(), lp, projector=_projector(), temperature=-1)
    with pytest.raises(ArgumentError, match="log_prior"):
        RectifiedClassifier(_head(), lp[1:], projector=_projector())


@pytest.mark.parametrize("name", ["student side", "student side, corrected", "contrast", "classifier"])
def test_memory_of_many_classes(name: str) -> None:
    """Four arrays of the size of the logits at most, forward and backward together."""
    rows, classes = 128, 8142
    g = torch.Generator().manual_seed(0)
    s = torch.randn(rows, classes, generator=g).requires_grad_()
    f = torch.randn(rows, D, generator=g).requires_grad_()
    W, t, y = torch.randn(classes, D, generator=g), torch.randn(rows, classes, generator=g), torch.arange(rows)
    lp = ClassPrior.from_counts([1000] * 10 + [1] * (classes - 10)).log_prior.float()
    job: dict[str, Callable[[], Tensor]] = {
        "student side": lambda: lrd_loss(s, t, y, log_prior=lp, prior_side="student", correction="none"),
        "student side, corrected": lambda: lrd_loss(s, t, y, log_prior=lp, prior_side="student"),
        "contrast": lambda: prototype_contrast_loss(f, y, prototypes=W, log_prior=lp),
        "classifier": lambda: rectified_classifier_loss(f, t, y, weight=W, bias=None, log_prior=lp),
    }
    assert _peak(lambda: job[name]().sum().backward()) <= 4 * rows * classes * 4


def _peak(job: Callable[[], object]) -> int:
    """The most bytes of tensors alive at once of those that the job makes."""
    job()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        job()
    assert record.profiler is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak > 0
    return peak
