from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from krdistill.anchors import align_anchors, balanced_anchors
from krdistill.errors import ConfigError, ModelError
from krdistill.losses import ETFHead, Projector, balanced_softmax, kd_divergence
from krdistill.objective import Objective, ObjectiveContext, TeacherProfile
from krdistill.outputs import LossTerms, Outputs, Step
from krdistill.priors import ClassPrior
from krdistill.recipes import Options, recipe
from krdistill.recipes.distill import resolve_tau
from krdistill.rectify import (
    auto_tau,
    blend_features,
    correct_errors,
    mean_prediction,
    per_class_tau,
    rarity,
    refit_classifier,
    remove_prior,
)
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


def _head() -> nn.Linear:
    head = nn.utils.skip_init(nn.Linear, D_T, K)
    with torch.no_grad():
        head.weight.normal_(generator=_generator())
        head.bias.normal_(generator=_generator())
    return head


def _context(seed: int = 0) -> ObjectiveContext:
    return ObjectiveContext(
        prior=PRIOR, groups=PRIOR.groups("thirds"), student_dim=D_S, teacher=_profile(), seed=seed, teacher_head=_head()
    )


def _batch() -> tuple[Outputs, Outputs, torch.Tensor]:
    g = _generator()
    student = Outputs(torch.randn(B, K, generator=g), torch.randn(B, D_S, generator=g))
    teacher = Outputs(2 * torch.randn(B, K, generator=g), torch.randn(B, D_T, generator=g))
    return student, teacher, torch.randint(0, K, (B,), generator=g)


# The recipe with a part of every kind, whatever its defaults are.
FULL = {
    "krdistill": {"prior": "label", "correction": "lift", "rectify": "blend"},
    "krdistill-lrd": {"correction": "lift"},
}


def _resolve(name: str, options: dict[str, object]) -> Options:
    return recipe(name).resolve({**FULL.get(name, {}), **options})


def _build(name: str, **options: object) -> Objective:
    return recipe(name).build(_resolve(name, options), _context())


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
        ("prior", ("none", "label", "teacher", "refit")),
        ("tau", (1.0, 1.5, "auto", "per-class")),
        ("correction", ("none", "lift", "swap")),
        ("prior_side", ("teacher", "student")),
        ("lrd_weighting", ("none", "inverse-sqrt", "effective-number", "group")),
        ("rrd_weighting", ("none", "inverse-sqrt", "effective-number", "group")),
        ("contrast_weight", (0.0, 0.5, 1.0)),
        ("classifier_weight", (0.0, 0.5, 1.0)),
        ("feature_weight", (5.0, 1.0)),
        ("rectify", ("none", "recentre", "blend", "variance-transfer")),
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
    context = ObjectiveContext(prior, prior.groups("shot"), D_S, _profile())
    out = recipe("krdistill-lrd").build(_resolve("krdistill-lrd", {}), context)(Step(student, labels, right))
    assert torch.allclose(out.terms["lrd"], kd_divergence(student.logits, right.logits, temperature=4.0), atol=1e-4)
    assert torch.allclose(
        out.terms["classification"], F.cross_entropy(student.logits, labels, reduction="none"), atol=1e-5
    )
    assert not out.stats["corrected"].any()


def test_auto_tau_and_teacher_prior_come_from_the_profile() -> None:
    options = _resolve("krdistill", {"tau": "auto", "prior": "teacher"})
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


@pytest.mark.parametrize(
    ("name", "options", "terms"),
    [
        ("krdistill", {}, {"classification", "lrd", "rrd"}),
        ("krdistill", {"contrast_weight": 1.0}, {"classification", "lrd", "rrd", "contrast"}),
        ("krdistill", {"classifier_weight": 1.0}, {"classification", "lrd", "rrd", "classifier"}),
        ("krdistill", {"feature_weight": 0, "rectify": "none"}, {"classification", "lrd"}),
        ("krdistill-rrd", {"contrast_weight": 1.0}, {"classification", "rrd", "contrast"}),
        ("krdistill-lrd", {"contrast_weight": 1.0, "logit_weight": 0, "prior": "none", "correction": "none"},
         {"classification", "contrast"}),
        ("krdistill-lrd", {"classifier_weight": 1.0, "logit_weight": 0}, {"classification", "classifier"}),
    ],
)  # fmt: skip
def test_a_weight_of_0_leaves_a_term_out(name: str, options: dict[str, object], terms: set[str]) -> None:
    student, teacher, labels = _batch()
    objective = _build(name, **options)
    out = objective(Step(student, labels, teacher)).terms
    assert set(out) == terms
    assert objective.needs_teacher == bool(terms & {"lrd", "rrd", "classifier"})
    assert objective.needs_features == ("rrd" in terms)  # the others take no feature of the teacher's in a step
    projectors = {id(m) for m in objective.modules() if isinstance(m, Projector)}
    assert len(projectors) == bool(terms & {"rrd", "contrast", "classifier"})
    assert all(torch.isfinite(v).all() and v.shape == (B,) for v in out.values())


def test_terms_beside_the_match_do_not_change_it() -> None:
    student, teacher, labels = _batch()
    step = Step(student, labels, teacher)
    plain = _build("krdistill")(step).terms
    more = _build("krdistill", contrast_weight=0.7, classifier_weight=0.3)(step).terms
    assert all(torch.equal(v, more[k]) for k, v in plain.items())


@pytest.mark.parametrize("to", ["anchors", "means"])
def test_the_contrast_is_its_formula(to: str) -> None:
    student, teacher, labels = _batch()
    objective = _build(
        "krdistill", contrast_weight=0.7, contrast_to=to, contrast_temperature=0.2, rrd_weighting="inverse-sqrt"
    )
    out = objective(Step(student, labels, teacher)).terms
    means = _profile().class_means
    anchors = align_anchors(balanced_anchors(K, D_T, seed=derive_seed(0, "anchors") % 2**31), means)
    projected = objective.terms[2].module.projector(student.feature)
    weights = PRIOR.counts.double().rsqrt()
    weights = weights * PRIOR.counts.sum() / (PRIOR.counts * weights).sum()
    cosines = F.normalize(projected) @ (anchors if to == "anchors" else means).T
    want = F.cross_entropy(cosines / 0.2 + PRIOR.log_prior.float(), labels, reduction="none")
    assert torch.allclose(out["contrast"], 0.7 * weights.float()[labels] * want, atol=1e-4)


def test_the_classifier_is_its_formula_and_its_head_is_not_trained() -> None:
    student, teacher, labels = _batch()
    options = {"classifier_weight": 0.5, "tau": "auto", "prior": "teacher", "temperature": 2.0, "correction": "swap"}
    objective = _build("krdistill-lrd", **options)
    log_prior, tau = resolve_tau(recipe("krdistill-lrd").resolve(options), _context())  # type: ignore[arg-type]
    head, module = _head(), objective.terms[-1].module
    said = head(module.projector(student.feature)) - tau * log_prior.float()
    target = correct_errors(remove_prior(teacher.logits, log_prior, tau), labels, "swap")
    out = objective(Step(student, labels, teacher)).terms["classifier"]
    assert torch.allclose(out, 0.5 * kd_divergence(said, target, temperature=2.0), atol=1e-4)
    assert {n for n, _ in module.named_parameters()} == {"projector.linear.weight", "projector.linear.bias"}


def test_a_refitted_classifier_answers_for_the_teacher() -> None:
    student, teacher, labels = _batch()
    options = {"prior": "refit", "classifier_weight": 0.5, "correction": "swap"}
    objective = _build("krdistill", **options)
    assert objective.needs_features and not objective.summary
    profile = _profile()
    weight, bias = refit_classifier(profile.features, profile.labels, K)
    anew = teacher._replace(logits=teacher.feature @ weight.T + bias)
    out = objective(Step(student, labels, teacher)).terms
    want = _build("krdistill", prior="none", correction="swap")(Step(student, labels, anew)).terms
    assert all(torch.allclose(out[k], v, atol=1e-4) for k, v in want.items())
    module = objective.terms[-1].module
    said = module.projector(student.feature) @ weight.T + bias
    target = correct_errors(anew.logits, labels, "swap")
    assert torch.allclose(out["classifier"], 0.5 * kd_divergence(said, target, temperature=4.0), atol=1e-4)
    assert not any("classifier" in n for n, p in objective.named_parameters() if p.requires_grad)


def test_tau_of_a_refitted_classifier_is_that_of_its_fit() -> None:
    student, teacher, labels = _batch()
    skewed = (torch.arange(100) % 15).clamp_max(K - 1)  # even counts have no prior to speak of
    profile = replace(_profile(), labels=skewed)

    def lrd(tau: float) -> torch.Tensor:
        options = recipe("krdistill").resolve({"tau": tau})
        objective = recipe("krdistill").build(options, replace(_context(), teacher=profile))
        return objective(Step(student, labels, teacher)).terms["lrd"]

    weight, bias = refit_classifier(profile.features, skewed, K, tau=1.5)
    want = kd_divergence(student.logits, teacher.feature @ weight.T + bias, temperature=4.0)
    assert torch.allclose(lrd(1.5), want, atol=1e-4)
    assert not torch.allclose(lrd(1.0), want, atol=1e-2)


def test_refitting_needs_features() -> None:
    entry = recipe("krdistill-lrd")
    options = entry.resolve({"prior": "refit"})
    assert "features" in entry.needs_with(options) and "features" not in entry.needs_with(entry.resolve({}))
    profile = replace(_profile(), features=torch.zeros(K, 0), class_means=torch.zeros(K, 0))
    with pytest.raises(ModelError, match=r"prior 'refit' .* take prior 'label'"):
        entry.build(options, replace(_context(), teacher=profile))


def test_the_classifier_needs_a_linear_head() -> None:
    entry = recipe("krdistill")
    options = entry.resolve({"classifier_weight": 1.0, "prior": "label"})
    for head, said in ((None, "got none"), (ETFHead(D_T, K), "got ETFHead")):
        with pytest.raises(ModelError, match=f"classifier_weight needs a teacher whose last layer is linear.*{said}"):
            entry.build(options, replace(_context(), teacher_head=head))


@pytest.mark.parametrize("weight", ["feature_weight", "contrast_weight", "classifier_weight"])
def test_a_teacher_without_features_is_refused(weight: str) -> None:
    entry = recipe("kd")
    profile = replace(_profile(), class_means=torch.zeros(K, 0), features=torch.zeros(100, 0))
    with pytest.raises(ModelError, match=r"need the teacher's features, and it shows none.*teacher\.tap"):
        entry.build(entry.resolve({weight: 1.0}), replace(_context(), teacher=profile))


def test_a_tau_per_class_makes_the_views_answers_even() -> None:
    student, teacher, labels = _batch()
    options = _resolve("krdistill", {"tau": "per-class"})
    log_prior, tau = resolve_tau(options, _context())  # type: ignore[arg-type]
    profile = _profile()
    found, common = per_class_tau(profile.view_logits, profile.view_labels, PRIOR.log_prior)
    assert tau == common and torch.allclose(tau * log_prior, found * PRIOR.log_prior)
    p = remove_prior(profile.view_logits, log_prior, tau).softmax(1)
    by_class = torch.stack([p[profile.view_labels == k, k].mean() for k in range(K)])
    assert float(by_class.max() / by_class.min()) < 1.002
    objective = _build("krdistill-lrd", tau="per-class", correction="none")
    assert objective.summary == {"tau": tau}
    want = kd_divergence(student.logits, teacher.logits - (found * PRIOR.log_prior).float())
    assert torch.allclose(objective(Step(student, labels, teacher)).terms["lrd"], want, atol=1e-4)


def test_a_tau_per_class_of_even_counts_has_no_common_part() -> None:
    even = ClassPrior.from_counts([7] * K)
    context = replace(_context(), prior=even)
    log_prior, tau = resolve_tau(_resolve("krdistill", {"tau": "per-class"}), context)  # type: ignore[arg-type]
    assert tau == 1.0
    found, _ = per_class_tau(_profile().view_logits, _profile().view_labels, even.log_prior)
    assert torch.allclose(log_prior, found * even.log_prior)


def test_deferred_rectification_follows_the_progress() -> None:
    student, teacher, labels = _batch()
    objective = _build("krdistill-lrd", lrd_warmup=0.5, tau=1.2)
    for progress, tau in ((0.0, 0.0), (0.25, 0.6), (0.5, 1.2), (0.9, 1.2)):
        out = objective(Step(student, labels, teacher, None, progress))
        now = _build("krdistill-lrd", tau=tau)(Step(student, labels, teacher, None, progress))
        assert torch.allclose(out.terms["lrd"], now.terms["lrd"], atol=1e-4)
        assert torch.equal(out.stats["corrected"], now.stats["corrected"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prior": "none", "prior_side": "student"}, "prior_side would have no effect, as prior is 'none'"),
        ({"prior": "none", "lrd_warmup": 0.5}, "lrd_warmup would have no effect, as prior is 'none'"),
        ({"prior": "refit", "tau": "auto"}, "give a number, or take prior label"),
        ({"prior": "none", "tau": 0.5}, "tau would have no effect, as prior is 'none'"),
        ({"tau": "per-class", "prior": "teacher"}, "take prior 'label'"),
        ({"tau": "per-image"}, "tau"),
        ({"contrast_temperature": 0.2}, "contrast_temperature would have no effect, as contrast_weight is 0"),
        ({"contrast_to": "means"}, "contrast_to would have no effect"),
        ({"logit_weight": 0, "lrd_weighting": "group", "prior": "none", "correction": "none"}, "lrd_weighting would"),
        ({"logit_weight": 0, "classifier_weight": 1, "lrd_warmup": 0.5}, "lrd_warmup would have no effect"),
        ({"feature_weight": 0, "rectify": "none", "rrd_weighting": "group"}, "rrd_weighting would have no effect"),
        ({"rectify": "none", "blend_strength": 0.4}, "blend_strength would have no effect, as rectify is 'none'"),
        ({"contrast_weight": -1}, "contrast_weight"),
        ({"classifier_weight": -1}, "classifier_weight"),
        ({"contrast_temperature": 0, "contrast_weight": 1}, "contrast_temperature"),
        ({"lrd_warmup": 1.5}, "lrd_warmup"),
        ({"lrd_weighting": "inverse"}, "lrd_weighting"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _resolve("krdistill", options)
