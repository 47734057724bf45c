from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from krdistill.anchors import align_anchors, balanced_anchors
from krdistill.errors import ModelError
from krdistill.losses import balanced_softmax, kd_divergence
from krdistill.objective import Objective, ObjectiveContext, TeacherProfile
from krdistill.outputs import LossTerms, Outputs, Step
from krdistill.priors import ClassPrior
from krdistill.recipes import recipe
from krdistill.recipes.distill import resolve_tau
from krdistill.rectify import auto_tau, blend_features, correct_errors, mean_prediction, rarity, remove_prior
from krdistill.rng import derive_seed

K, D_T, D_S, B = 5, 12, 6, 16
PRIOR = ClassPrior.from_counts([100, 50, 20, 9, 3])


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _profile() -> TeacherProfile:
    g = _generator()
    means = F.normalize(torch.randn(K, D_T, generator=g), dim=1)
    logits = 2 * torch.randn(100, K, generator=g) + PRIOR.log_prior.float()
    labels = torch.arange(100) % K
    return TeacherProfile(means, logits, labels, "random", torch.randn(100, D_T, generator=g), labels)


def _context(seed: int = 0) -> ObjectiveContext:
    return ObjectiveContext(prior=PRIOR, groups=PRIOR.groups("thirds"), student_dim=D_S, teacher=_profile(), seed=seed)


def _batch() -> tuple[Outputs, Outputs, torch.Tensor]:
    g = _generator()
    student = Outputs(torch.randn(B, K, generator=g), torch.randn(B, D_S, generator=g))
    teacher = Outputs(2 * torch.randn(B, K, generator=g), torch.randn(B, D_T, generator=g))
    return student, teacher, torch.randint(0, K, (B,), generator=g)


def _build(name: str, **options: object) -> Objective:
    entry = recipe(name)
    return entry.build(entry.resolve(options), _context())


def test_kd_is_its_formula() -> None:
    student, teacher, labels = _batch()
    terms = _build("kd")(Step(student, labels, teacher)).terms
    assert set(terms) == {"classification", "kd"}
    assert torch.allclose(terms["classification"], 0.1 * F.cross_entropy(student.logits, labels, reduction="none"))
    want = (
        0.9
        * 16
        * F.kl_div((student.logits / 4).log_softmax(1), (teacher.logits / 4).softmax(1), reduction="none").sum(1)
    )
    assert torch.allclose(terms["kd"], want, atol=1e-5)


def test_krdistill_is_classification_plus_lrd_plus_rrd() -> None:
    student, teacher, labels = _batch()
    objective = _build("krdistill", correction="swap", tau=1.2, temperature=3.0, feature_weight=2.0)
    out = objective(Step(student, labels, teacher))
    terms = out.terms
    log_prior = PRIOR.log_prior
    assert torch.allclose(
        terms["classification"], balanced_softmax(student.logits, labels, log_prior.float()), atol=1e-5
    )
    target = correct_errors(remove_prior(teacher.logits, log_prior, 1.2), labels, "swap")
    assert torch.allclose(terms["lrd"], kd_divergence(student.logits, target, temperature=3.0), atol=1e-4)
    means = _profile().class_means
    anchors = align_anchors(balanced_anchors(K, D_T, seed=derive_seed(0, "anchors") % 2**31), means)
    goal = blend_features(teacher.feature, labels, anchors, rarity(PRIOR.counts, 0.5))
    projected = objective.terms[2].module.projector(student.feature)
    assert torch.allclose(terms["rrd"], 2 * (1 - F.cosine_similarity(projected, goal)), atol=1e-5)
    fired = remove_prior(teacher.logits, log_prior, 1.2).argmax(1) != labels
    assert torch.equal(out.stats["corrected"].bool(), fired)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("classification", ("cross-entropy", "balanced-softmax")),
        ("classification_weight", (1.0, 0.5)),
        ("logit_weight", (1.0, 2.0)),
        ("temperature", (4.0, 2.0)),
        ("prior", ("none", "label", "teacher")),
        ("tau", (1.0, 1.5, "auto")),
        ("correction", ("none", "lift", "swap")),
        ("group_weights", (False, True)),
        ("feature_weight", (5.0, 1.0)),
        ("rectify", ("none", "recentre", "blend")),
        ("blend_strength", (0.5, 0.9)),
        ("distance", ("cosine", "squared")),
    ],
)
def test_every_option_changes_the_loss(option: str, values: tuple[object, ...]) -> None:
    student, teacher, labels = _batch()
    losses = [
        float(_build("krdistill", **{option: v})(Step(student, labels, teacher)).total().sum().detach()) for v in values
    ]
    assert len({round(v, 5) for v in losses}) == len(values)


def test_uniform_prior_and_right_teacher_make_lrd_plain_kd() -> None:
    student, teacher, labels = _batch()
    prior = ClassPrior.from_counts([7] * K)
    right = Outputs(teacher.logits + 50 * F.one_hot(labels, K), teacher.feature)
    entry = recipe("krdistill-lrd")
    context = ObjectiveContext(prior, prior.groups("shot"), D_S, _profile())
    out = entry.build(entry.resolve({}), context)(Step(student, labels, right))
    assert torch.allclose(out.terms["lrd"], kd_divergence(student.logits, right.logits, temperature=4.0), atol=1e-4)
    assert torch.allclose(
        out.terms["classification"], F.cross_entropy(student.logits, labels, reduction="none"), atol=1e-5
    )
    assert not out.stats["corrected"].any()


def test_auto_tau_and_teacher_prior_come_from_the_profile() -> None:
    options = recipe("krdistill").resolve({"tau": "auto", "prior": "teacher"})
    log_prior, tau = resolve_tau(options, _context())  # type: ignore[arg-type]
    profile = _profile()
    assert torch.allclose(log_prior.exp(), mean_prediction(profile.view_logits, profile.view_labels))
    assert tau == auto_tau(profile.view_logits, profile.view_labels, log_prior)
    assert _build("krdistill", tau="auto", prior="teacher").summary["tau"] == pytest.approx(tau)


def test_gradients_reach_the_student_and_the_projector_only() -> None:
    student, teacher, labels = _batch()
    leaves = [t.clone().requires_grad_() for t in (*student[:2], *teacher[:2])]
    objective = _build("krdistill")
    objective(Step(Outputs(*leaves[:2]), labels, Outputs(*leaves[2:]))).total().mean().backward()
    assert leaves[0].grad is not None and leaves[1].grad is not None
    assert leaves[2].grad is None and leaves[3].grad is None
    assert all(p.grad is not None for p in objective.parameters())


def test_objectives_are_reproducible_and_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    a, b = _build("krdistill"), _build("krdistill")
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    entry = recipe("krdistill")
    other = entry.build(entry.resolve({}), _context(seed=1))
    assert not torch.equal(next(a.parameters()), next(other.parameters()))


def test_a_missing_teacher_is_said() -> None:
    student, _, labels = _batch()
    with pytest.raises(ModelError, match="teacher"):
        _build("kd")(Step(student, labels))
    entry = recipe("krdistill")
    bare = ObjectiveContext(PRIOR, PRIOR.groups("shot"), D_S, None)
    with pytest.raises(ModelError, match="needs a teacher"):
        entry.build(entry.resolve({}), bare)


def test_loss_terms_add_and_mix() -> None:
    a = LossTerms({"x": torch.tensor([1.0, 2.0]), "y": torch.tensor([3.0, 4.0])})
    b = LossTerms({"x": torch.zeros(2), "y": torch.ones(2)})
    assert a.total().tolist() == [4.0, 6.0]
    assert a.mixed(b, 0.25).total().tolist() == [0.25 * 4 + 0.75, 0.25 * 6 + 0.75]
