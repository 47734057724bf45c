from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from krdistill.anchors import align_anchors, balanced_anchors
from krdistill.errors import ArgumentError, DataError
from krdistill.losses import (
    LogitRectifiedDistillation,
    RepresentationRectifiedDistillation,
    cosine_distance,
    group_sample_weights,
    kd_divergence,
    lrd_loss,
    rectify_logits,
    rrd_loss,
    squared_distance,
)
from krdistill.priors import ClassPrior
from krdistill.rectify import (
    blend_features,
    class_means,
    correct_errors,
    errors,
    rarity,
    recentre_features,
    remove_prior,
)

K, D, D_S, B = 5, 12, 7, 24
PRIOR = ClassPrior.from_counts([200, 90, 40, 10, 4])


def _logits() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(B) % K
    return torch.randn(B, K, generator=g), 2 * torch.randn(B, K, generator=g), y


def _features() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    y = torch.arange(B) % K
    f_s, f_t = torch.randn(B, D, generator=g), torch.randn(B, D, generator=g) + 1
    means = class_means(f_t, y, K)
    return f_s, f_t, y, means, align_anchors(balanced_anchors(K, D), means)


def test_rectify_logits_by_hand() -> None:
    # counts 3 : 1, so removing the prior lifts class 1 by log 3 against class 0
    z = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    log_prior = torch.tensor([0.75, 0.25]).log()
    y = torch.tensor([0, 1])
    out, fired = rectify_logits(z, y, log_prior=log_prior)
    assert fired.tolist() == [True, True]  # 1 < log 3 < 2: row 0 now says class 1, row 1 still says class 0
    difference = (out[:, 0] - out[:, 1]).tolist()
    assert difference == pytest.approx([0, 0], abs=1e-6)
    out, _ = rectify_logits(z, y, log_prior=log_prior, correction="swap")
    assert (out[:, 0] - out[:, 1]).tolist() == pytest.approx([math.log(3) - 1, math.log(3) - 2], abs=1e-6)
    out, fired = rectify_logits(z, y, log_prior=log_prior, correction="none")
    assert (out[:, 0] - out[:, 1]).tolist() == pytest.approx([1 - math.log(3), 2 - math.log(3)], abs=1e-6)
    assert fired.tolist() == [False, False]
    _, fired = rectify_logits(z, y, log_prior=log_prior, tau=0)
    assert fired.tolist() == [False, True]


@pytest.mark.parametrize("correction", ["lift", "swap", "none"])
@pytest.mark.parametrize("tau", [0.0, 1.0, 1.7])
def test_lrd_is_its_parts(correction: str, tau: float) -> None:
    s, t, y = _logits()
    weights = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0], dtype=torch.float64)
    target = correct_errors(remove_prior(t, PRIOR.log_prior, tau), y, correction)  # type: ignore[arg-type]
    want = weights.float()[y] * kd_divergence(s, target, temperature=2)
    options = {"tau": tau, "correction": correction, "temperature": 2, "class_weights": weights}
    got = lrd_loss(s, t, y, log_prior=PRIOR.log_prior, **options)  # type: ignore[arg-type]
    assert torch.allclose(got, want)
    module = LogitRectifiedDistillation(PRIOR.log_prior, **options)  # type: ignore[arg-type]
    assert torch.allclose(module(s, t, y), want, atol=1e-5)
    fired = (
        errors(remove_prior(t, PRIOR.log_prior, tau), y) if correction != "none" else torch.zeros(B, dtype=torch.bool)
    )
    assert torch.equal(module.corrected(t, y), fired)
    assert torch.allclose(module.rectify(t, y)[0], target, atol=1e-5)


def test_every_lrd_option_changes_the_loss() -> None:
    s, t, y = _logits()
    base: dict[str, object] = {"log_prior": PRIOR.log_prior}
    options: list[dict[str, object]] = [
        {},
        {"tau": 0.5},
        {"correction": "swap"},
        {"correction": "none"},
        {"temperature": 2.0},
        {"class_weights": torch.full((K,), 2.0)},
        {"log_prior": torch.zeros(K)},
    ]
    values = {round(float(lrd_loss(s, t, y, **{**base, **o}).sum()), 4) for o in options}  # type: ignore[arg-type]
    assert len(values) == len(options)


def test_a_right_teacher_under_a_uniform_prior_leaves_plain_kd() -> None:
    s, t, y = _logits()
    t = t + 30 * torch.nn.functional.one_hot(y, K)
    got = lrd_loss(s, t, y, log_prior=ClassPrior.from_counts([7] * K).log_prior)
    assert torch.allclose(got, kd_divergence(s, t), atol=1e-4)


def test_a_student_at_the_rectified_target_has_no_loss() -> None:
    _, t, y = _logits()
    target, fired = rectify_logits(t, y, log_prior=PRIOR.log_prior)
    assert fired.any() and not fired.all()
    assert torch.equal(lrd_loss(target, t, y, log_prior=PRIOR.log_prior), torch.zeros(B))


def test_group_sample_weights_by_hand_and_by_their_purpose() -> None:
    groups = PRIOR.groups()  # many: 200; medium: 90, 40; few: 10, 4; 344 images
    weights = group_sample_weights(PRIOR.counts, groups)
    assert weights.dtype == torch.float64
    assert weights.tolist() == pytest.approx([344 / 3 / n for n in (200, 130, 130, 14, 14)])
    assert torch.equal(weights, group_sample_weights(PRIOR.counts.tolist(), groups.index))
    total = PRIOR.counts.double() * weights
    shares = [float(total[groups.members(name)].sum()) for name in groups.names]
    assert shares == pytest.approx([344 / 3] * 3)
    assert float(total.sum()) / 344 == pytest.approx(1)


def test_group_sample_weights_pass_over_empty_groups() -> None:
    prior = ClassPrior.from_counts([300, 150, 8])
    assert prior.groups().sizes()["medium"] == 0
    weights = group_sample_weights(prior.counts, prior.groups())
    assert weights.tolist() == pytest.approx([458 / 2 / 450, 458 / 2 / 450, 458 / 2 / 8])
    with pytest.raises(ArgumentError, match=r"groups: expected one group number >= 0 per class, shape \(3,\)"):
        group_sample_weights(prior.counts, torch.tensor([0, 1]))
    with pytest.raises(ArgumentError, match="groups"):
        group_sample_weights(prior.counts, torch.tensor([0.0, 1, 1]))
    with pytest.raises(DataError, match="no training image"):
        group_sample_weights([3, 0, 1], torch.tensor([0, 1, 1]))


@pytest.mark.parametrize("distance", ["cosine", "squared"])
@pytest.mark.parametrize("rectify", ["recentre", "blend", "none"])
def test_rrd_is_its_parts(rectify: str, distance: str) -> None:
    f_s, f_t, y, means, anchors = _features()
    strength = rarity(PRIOR.counts, 0.7)
    target = {
        "recentre": recentre_features(f_t, y, means, anchors),
        "blend": blend_features(f_t, y, anchors, strength),
        "none": f_t,
    }[rectify]
    want = {"cosine": cosine_distance, "squared": squared_distance}[distance](f_s, target)
    options = {"anchors": anchors, "rectify": rectify, "class_means": means, "strength": strength, "distance": distance}
    got = rrd_loss(f_s, f_t, y, **options)  # type: ignore[arg-type]
    assert got.shape == (B,) and torch.allclose(got, want, atol=1e-6)
    assert torch.allclose(rrd_loss(target, f_t, y, **options), torch.zeros(B), atol=1e-5)  # type: ignore[arg-type]
    module = RepresentationRectifiedDistillation(student_dim=D_S, **options)  # type: ignore[arg-type]
    narrow = torch.randn(B, D_S, generator=torch.Generator().manual_seed(5))
    projected = module.projector(narrow)
    assert torch.allclose(module(narrow, f_t, y), rrd_loss(projected, f_t, y, **options), atol=1e-6)  # type: ignore[arg-type]


def test_every_rrd_option_changes_the_loss() -> None:
    f_s, f_t, y, means, anchors = _features()
    base: dict[str, object] = {"anchors": anchors, "class_means": means, "strength": rarity(PRIOR.counts)}
    options: list[dict[str, object]] = [
        {"rectify": "recentre"},
        {"rectify": "recentre", "distance": "squared"},
        {"rectify": "recentre", "anchors": -anchors},
        {"rectify": "recentre", "class_means": -means},
        {"rectify": "blend"},
        {"rectify": "blend", "strength": rarity(PRIOR.counts, 0.9)},
        {"rectify": "none"},
    ]
    values = {round(float(rrd_loss(f_s, f_t, y, **{**base, **o}).sum()), 4) for o in options}  # type: ignore[arg-type]
    assert len(values) == len(options)


@pytest.mark.parametrize("rectify", ["recentre", "blend", "none"])
def test_rrd_gradients(rectify: str) -> None:
    f_s, f_t, y, means, anchors = (x.double() if x.is_floating_point() else x for x in _features())
    options = {"anchors": anchors, "rectify": rectify, "class_means": means, "strength": rarity(PRIOR.counts)}
    f_s, f_t = f_s[:4].requires_grad_(), f_t[:4].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rrd_loss(x, f_t, y[:4], **options), (f_s,))  # type: ignore[arg-type]
    rrd_loss(f_s, f_t, y[:4], **options).sum().backward()  # type: ignore[arg-type]
    assert f_s.grad is not None and f_t.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rectify", ["recentre", "blend", "none"])
def test_rrd_in_half_precision_one_sample_and_autocast(rectify: str, dtype: torch.dtype) -> None:
    f_s, f_t, y, means, anchors = _features()
    f_s, f_t = f_s.to(dtype), (100 * f_t).to(dtype)
    options = {"anchors": anchors, "rectify": rectify, "class_means": means, "strength": rarity(PRIOR.counts)}
    exact = rrd_loss(f_s.double(), f_t.double(), y, **options)  # type: ignore[arg-type]
    for context in (torch.autocast("cpu", enabled=False), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            got = rrd_loss(f_s, f_t, y, **options)  # type: ignore[arg-type]
            assert got.dtype == torch.float32
            assert torch.allclose(got.double(), exact, atol=1e-5)
            one = rrd_loss(f_s[:1], f_t[:1], y[:1], **options)  # type: ignore[arg-type]
            assert torch.allclose(one, got[:1], atol=1e-6)


def test_modules_hold_buffers_that_are_copies() -> None:
    _, _, y, means, anchors = _features()
    log_prior = PRIOR.log_prior.float()
    lrd = LogitRectifiedDistillation(log_prior, class_weights=torch.ones(K))
    lrd.log_prior.zero_()
    assert torch.equal(log_prior, PRIOR.log_prior.float())
    assert set(lrd.state_dict()) == {"log_prior", "class_weights"} and not list(lrd.parameters())
    assert set(LogitRectifiedDistillation(log_prior).state_dict()) == {"log_prior"}
    rrd = RepresentationRectifiedDistillation(anchors, student_dim=D_S, class_means=means)
    assert set(rrd.state_dict()) == {"anchors", "class_means", "projector.linear.weight", "projector.linear.bias"}
    assert len(list(rrd.parameters())) == 2
    twin = RepresentationRectifiedDistillation(-anchors, student_dim=D_S, class_means=-means)
    twin.load_state_dict(rrd.state_dict())
    f_s, f_t = torch.ones(B, D_S), torch.ones(B, D)
    assert torch.equal(twin(f_s, f_t, y), rrd(f_s, f_t, y))
    plain = RepresentationRectifiedDistillation(None, student_dim=D_S, teacher_dim=D, rectify="none")
    assert set(plain.state_dict()) == {"projector.linear.weight", "projector.linear.bias"}
    assert "recentre" in repr(rrd) and "lift" in repr(lrd)


def test_bad_settings_are_refused_at_construction() -> None:
    _, _, _, means, anchors = _features()
    with pytest.raises(ArgumentError, match="correction: expected one of 'lift', 'swap', 'none', but got 'shift'"):
        LogitRectifiedDistillation(PRIOR.log_prior, correction="shift")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="tau: expected a finite number, but got 'auto'"):
        LogitRectifiedDistillation(PRIOR.log_prior, tau="auto")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="temperature"):
        LogitRectifiedDistillation(PRIOR.log_prior, temperature=0)
    with pytest.raises(ArgumentError, match=r"finite numbers >= 0, but got -1\.0 for class 2"):
        LogitRectifiedDistillation(PRIOR.log_prior, class_weights=torch.tensor([1.0, 1, -1, 1, 1]))
    with pytest.raises(ArgumentError, match="-inf for class 0"):
        LogitRectifiedDistillation(torch.tensor([0.0, 1.0]).log())
    with pytest.raises(ArgumentError, match="log_prior: expected shape"):
        LogitRectifiedDistillation(torch.zeros(1))

    def build(**options: object) -> RepresentationRectifiedDistillation:
        return RepresentationRectifiedDistillation(**{"anchors": anchors, "student_dim": D_S, **options})  # type: ignore[arg-type]

    with pytest.raises(ArgumentError, match="class_means: rectify='recentre' needs it, but got None"):
        build()
    with pytest.raises(ArgumentError, match="strength: rectify='blend' needs it"):
        build(rectify="blend")
    with pytest.raises(ArgumentError, match="anchors: rectify='blend' needs it"):
        build(anchors=None, rectify="blend", strength=torch.zeros(K))
    with pytest.raises(ArgumentError, match="teacher_dim: expected the width"):
        build(anchors=None, rectify="none")
    with pytest.raises(
        ArgumentError, match=r"rectify: expected one of .recentre., .blend., .*, .none., but got .move."
    ):
        build(rectify="move")
    with pytest.raises(ArgumentError, match="distance: expected one of 'cosine', 'squared', but got 'l1'"):
        build(class_means=means, distance="l1")
    with pytest.raises(ArgumentError, match=r"class_means: expected shape \(K, D\) = \(5, 12\)"):
        build(class_means=means[:, :3])
    with pytest.raises(ArgumentError, match="anchors: expected finite numbers, but row 0"):
        build(anchors=anchors * math.nan, class_means=means)
    with pytest.raises(ArgumentError, match=r"strength: expected numbers in \[0, 1\], but got 2.0"):
        build(rectify="blend", strength=torch.full((K,), 2.0))
    with pytest.raises(ArgumentError, match=r"anchors: expected shape \(K, D\) = \(5, 9\)"):
        build(class_means=means, teacher_dim=9)


def test_wrong_inputs_are_refused() -> None:
    f_s, f_t, y, means, anchors = _features()
    with pytest.raises(ArgumentError, match="anchors: expected the width of the features, 8, but got 12"):
        rrd_loss(f_s, f_t[:, :8], y, anchors=anchors, class_means=means)
    with pytest.raises(ArgumentError, match=r"target_features: expected shape \(B, D\)"):
        rrd_loss(f_s[:, :8], f_t, y, anchors=anchors, class_means=means)
    with pytest.raises(ArgumentError, match=r"class indices in 0\.\.4, but got 5"):
        rrd_loss(f_s, f_t, y + 1, anchors=anchors, class_means=means)
    with pytest.raises(ArgumentError, match="teacher_features"):
        rrd_loss(f_s, None, y, anchors=anchors, class_means=means)  # type: ignore[arg-type]
    s, t, y = _logits()
    with pytest.raises(ArgumentError, match="class_weights"):
        lrd_loss(s, t, y, log_prior=PRIOR.log_prior, class_weights=torch.ones(K + 1))
    with pytest.raises(ArgumentError, match="correction"):
        lrd_loss(s, t, y, log_prior=PRIOR.log_prior, correction="shift")  # type: ignore[arg-type]


def test_a_few_steps_pull_the_student_to_both_rectified_targets() -> None:
    f_s, f_t, y, means, anchors = _features()
    _, t, _ = _logits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rrd = RepresentationRectifiedDistillation(anchors, student_dim=D, class_means=means)
        head = torch.nn.Linear(D, K)
    lrd = LogitRectifiedDistillation(PRIOR.log_prior, correction="swap")
    feature = f_s.clone().requires_grad_()
    optimiser = torch.optim.Adam([feature, *rrd.parameters(), *head.parameters()], lr=0.05)
    losses = []
    for _ in range(150):
        loss = lrd(head(feature), t, y).mean() + rrd(feature, f_t, y).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]
    assert errors(t, y).any()
    assert float((head(feature).argmax(1) == y).float().mean()) > 0.9
