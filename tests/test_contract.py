"""The contract that every recipe keeps, run over the registry: a new recipe is held to it without a new test."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from krdistill.config import Classification
from krdistill.errors import KrdistillError
from krdistill.objective import Objective, ObjectiveContext, TeacherProfile, classification_term
from krdistill.outputs import Outputs, Step
from krdistill.priors import ClassPrior
from krdistill.recipes import Recipe, list_recipes

_KRD = next(r for r in list_recipes() if r.name == "krdistill")
VARIANTS: dict[str, dict[str, object]] = {  # options that no recipe has among its defaults
    "student-side": {"prior": "label", "prior_side": "student", "lrd_weighting": "inverse-sqrt", "lrd_warmup": 0.5},
    "corrected": {"prior": "label", "correction": "lift", "rectify": "blend"},
    "variance-transfer": {"rectify": "variance-transfer", "rrd_weighting": "effective-number"},
    "contrast": {"contrast_weight": 0.5, "contrast_to": "means", "rrd_weighting": "group"},
    "classifier": {"classifier_weight": 0.5, "rectify": "none"},
}
RECIPES = [
    *list_recipes(),
    *(replace(_KRD, name=f"krdistill-{name}", defaults={**_KRD.defaults, **o}) for name, o in VARIANTS.items()),
]
D_S, D_T = 6, 10
MAPS_S, MAPS_T = (4, D_S), (5, D_T)
LIGHT = {"crd": {"negatives": 16, "embed_dim": 8}}  # no other option is needed to be tested fast


def _ids(entry: Recipe) -> str:
    return entry.name


def _counts(K: int) -> list[int]:
    return [max(1, round(200 * 0.02 ** (k / (K - 1)))) for k in range(K)]


def _context(K: int, counts: list[int] | None = None) -> ObjectiveContext:
    g = torch.Generator().manual_seed(1)
    prior = ClassPrior.from_counts(counts or _counts(K))
    labels = torch.arange(2 * K) % K
    profile = TeacherProfile(
        class_means=nn.functional.normalize(torch.randn(K, D_T, generator=g), dim=1),
        view_logits=2 * torch.randn(2 * K, K, generator=g),
        view_labels=labels,
        views="random",
        features=torch.randn(2 * K, D_T, generator=g),
        labels=labels,
    )
    head = nn.Linear(D_T, K)
    return ObjectiveContext(
        prior=prior, groups=prior.groups("thirds"), student_dim=D_S, teacher=profile, student_maps=MAPS_S,
        teacher_maps=MAPS_T, labels=torch.arange(12 * K) % K, teacher_head=head,
    )  # fmt: skip


def _build(entry: Recipe, K: int = 5, counts: list[int] | None = None) -> Objective:
    options = entry.resolve(LIGHT.get(entry.name, {}))
    torch.manual_seed(0)
    return entry.build(options, _context(K, counts))


def _outputs(B: int, K: int, dim: int, maps: tuple[int, ...], scale: float, seed: int) -> Outputs:
    g = torch.Generator().manual_seed(seed)
    return Outputs(
        scale * torch.randn(B, K, generator=g),
        torch.randn(B, dim, generator=g),
        tuple(torch.randn(B, c, 4 // (i + 1), 4 // (i + 1), generator=g) for i, c in enumerate(maps)),
    )


def _step(entry: Recipe, B: int = 8, K: int = 5, scale: float = 2.0) -> Step:
    student_maps = MAPS_S if not entry.reuses_classifier else (*MAPS_S[:-1], D_T)
    student = _outputs(B, K, D_S, student_maps, scale, 2)
    labels = torch.randint(0, K, (B,), generator=torch.Generator().manual_seed(4))
    return Step(student, labels, _outputs(B, K, D_T, MAPS_T, scale, 3), labels + K * torch.arange(B), 0.9)


def _leaves(step: Step) -> tuple[Step, list[Tensor], list[Tensor]]:
    """The step with every tensor a leaf; the student's and the teacher's."""
    said, told = (
        Outputs(
            out.logits.clone().requires_grad_(), out.feature.clone().requires_grad_(),
            tuple(m.clone().requires_grad_() for m in out.maps),
        )
        for out in (step.student, step.teacher or step.student)
    )  # fmt: skip
    flat = [[o.logits, o.feature, *o.maps] for o in (said, told)]
    return step._replace(student=said, teacher=told), flat[0], flat[1]


@pytest.mark.parametrize("entry", RECIPES, ids=_ids)
@pytest.mark.parametrize(("B", "K", "scale"), [(8, 5, 2.0), (8, 2, 2.0), (2, 5, 1e4), (8, 3, 0.0)])
def test_terms_are_finite_per_sample_and_at_least_float32(entry: Recipe, B: int, K: int, scale: float) -> None:
    if entry.name == "lfme" and K < 5:
        with pytest.raises(KrdistillError, match="at least two classes"):
            _build(entry, K)
        return
    objective = _build(entry, K)
    step, said, _ = _leaves(_step(entry, B, K, scale))
    out = objective(step)
    for name, term in out.terms.items():
        assert term.shape == (B,) and term.dtype == torch.float32, name
        assert torch.isfinite(term).all(), name
    total = out.total().mean()
    total.backward()
    assert all(torch.isfinite(t.grad).all() for t in said if t.grad is not None)
    assert any(t.grad is not None and t.grad.abs().sum() > 0 for t in said) or scale in (0.0, 1e4)


@pytest.mark.parametrize("entry", RECIPES, ids=_ids)
def test_a_batch_of_one_works_or_says_why(entry: Recipe) -> None:
    objective = _build(entry).eval()
    try:
        out = objective(_step(entry, B=1))
    except KrdistillError as error:
        assert str(error)
    else:
        assert all(torch.isfinite(t).all() and t.shape == (1,) for t in out.terms.values())


@pytest.mark.parametrize("entry", RECIPES, ids=_ids)
def test_no_gradient_reaches_the_teacher(entry: Recipe) -> None:
    step, _, told = _leaves(_step(entry))
    _build(entry)(step).total().mean().backward()
    assert all(t.grad is None or t.grad.abs().sum() == 0 for t in told)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("entry", RECIPES, ids=_ids)
def test_half_precision_inputs_are_close(entry: Recipe, dtype: torch.dtype) -> None:
    step = _step(entry)

    def cast(out: Outputs | None, to: torch.dtype) -> Outputs:
        assert out is not None
        return Outputs(out.logits.to(to), out.feature.to(to), tuple(m.to(to) for m in out.maps))

    objective = _build(entry).eval()
    if any(isinstance(m, nn.Conv2d) for m in objective.modules()):
        pytest.skip("its projector is a convolution, which autocast runs in its own precision")
    half = step._replace(student=cast(step.student, dtype), teacher=cast(step.teacher, dtype))
    full = half._replace(student=cast(half.student, torch.float32), teacher=cast(half.teacher, torch.float32))
    a, b = objective(half).total(), objective(full).total()
    assert a.dtype == torch.float32
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("entry", RECIPES, ids=_ids)
def test_a_constant_on_all_logits_changes_nothing(entry: Recipe) -> None:
    if entry.name in {"logit-matching", "ssd", "lfme"}:
        pytest.skip("matches the logits themselves, or scales them")
    step = _step(entry)
    assert step.teacher is not None
    moved = step._replace(
        student=step.student._replace(logits=step.student.logits + 3),
        teacher=step.teacher._replace(logits=step.teacher.logits - 5),
    )
    objective = _build(entry).eval()
    torch.testing.assert_close(objective(step).total(), objective(moved).total(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("entry", RECIPES, ids=_ids)
@pytest.mark.parametrize("wrong", ["label", "labels", "classes", "teacher", "rows"])
def test_what_does_not_fit_is_refused_in_words(entry: Recipe, wrong: str) -> None:
    step = _step(entry)
    assert step.teacher is not None
    objective = _build(entry)
    bad = {
        "label": step._replace(labels=step.labels.clone().fill_(5)),
        "labels": step._replace(labels=step.labels[:-1]),
        "classes": step._replace(student=step.student._replace(logits=step.student.logits[:, :-1])),
        "teacher": step._replace(teacher=None),
        "rows": step._replace(
            teacher=Outputs(*(t[:-1] if isinstance(t, Tensor) else tuple(m[:-1] for m in t) for t in step.teacher))
        ),  # type: ignore[arg-type]
    }[wrong]
    used = {t.name for t in objective._terms()}
    silent = (
        (wrong in {"teacher", "rows"} and not objective.needs_teacher)
        or (wrong in {"label", "classes"} and used == {"simkd"})
        or (wrong == "classes" and used == {"feature"})
    )
    if silent:
        objective(bad)
        return
    with pytest.raises(KrdistillError) as caught:
        objective(bad)
    assert len(str(caught.value)) > 20


@pytest.mark.parametrize("entry", RECIPES, ids=_ids)
def test_a_teacher_of_nan_does_not_pass_unseen(entry: Recipe) -> None:
    step = _step(entry)
    objective = _build(entry)
    if not objective.needs_teacher:
        return
    bad = _outputs(8, 5, D_T, MAPS_T, float("nan"), 3)
    bad = Outputs(bad.logits, bad.feature * float("nan"), tuple(m * float("nan") for m in bad.maps))
    try:
        total = objective(step._replace(teacher=bad)).total()
    except KrdistillError:
        return
    assert not torch.isfinite(total).all(), "a loss that stays finite would train on nonsense"


@pytest.mark.parametrize("entry", RECIPES, ids=_ids)
def test_many_classes(entry: Recipe) -> None:
    K = 8142
    # Anchors and a fitted classifier of this many classes take a minute: benchmarks/anchors.py, benchmarks/refit.py.
    options = {**LIGHT.get(entry.name, {}), **({"rectify": "none"} if "rectify" in entry.defaults else {})}
    context = _context(K, [1] * (K - 10) + [1000] * 10)
    assert context.teacher is not None
    context.teacher._refits[1.0] = (torch.randn(K, D_T), torch.randn(K))
    objective = entry.build(entry.resolve(options), context)
    out = objective(_step(entry, B=4, K=K))
    assert torch.isfinite(out.total()).all()


@pytest.mark.parametrize("entry", RECIPES, ids=_ids)
def test_empty_groups(entry: Recipe) -> None:
    context = _context(5)
    empty = replace(context, groups=context.prior.groups((10**6, 10**5)))
    assert list(empty.groups.sizes().values()) == [0, 0, 5]
    options = {**LIGHT.get(entry.name, {}), **({"lrd_weighting": "group"} if entry.name == "krdistill" else {})}
    out = entry.build(entry.resolve(options), empty)(_step(entry))
    assert torch.isfinite(out.total()).all()


@pytest.mark.parametrize("entry", RECIPES, ids=_ids)
def test_constants_are_buffers_and_state_round_trips(entry: Recipe) -> None:
    a, b = _build(entry), _build(entry)
    step = _step(entry)
    with torch.no_grad():
        for value in a.state_dict().values():
            if value.is_floating_point():
                value.add_(0.01)
    b.load_state_dict(a.state_dict())
    torch.testing.assert_close(a.eval()(step).total(), b.eval()(step).total())
    tensors = [v for m in a.modules() for k, v in vars(m).items() if isinstance(v, Tensor) and not k.startswith("_")]
    assert not tensors, "a tensor that is neither a parameter nor a buffer stays behind when the module moves"


@pytest.mark.parametrize("entry", RECIPES, ids=_ids)
def test_record_is_complete(entry: Recipe) -> None:
    assert entry.summary and entry.defaults_from and entry.source.title and entry.source.year >= 2015
    assert entry.needs <= {"teacher", "counts", "features", "maps", "memory", "experts", "two stages"}
    assert entry.options.__doc__
    json.dumps(entry.resolve({}).model_dump(mode="json"))
    for field in entry.options.model_fields:
        documented = any(field in (c.__doc__ or "") for c in entry.options.__mro__)
        assert documented, f"option {field} of {entry.name} is not documented"
    objective = _build(entry)
    assert objective.needs_teacher == bool(entry.needs & {"teacher", "experts"})
    assert objective.needs_maps == ("maps" in entry.needs)


@pytest.mark.parametrize("entry", RECIPES, ids=_ids)
def test_every_number_among_its_options_changes_the_loss(entry: Recipe) -> None:
    defaults = entry.resolve(LIGHT.get(entry.name, {}))
    step = _step(entry)

    def loss(**changes: object) -> float:
        options = entry.resolve({**LIGHT.get(entry.name, {}), **changes})
        torch.manual_seed(0)
        objective = entry.build(options, _context(5))
        objective(step)  # memories and running averages are filled by a first step
        return float(objective(step._replace(progress=0.05)).total().sum().detach())

    inactive = {"tau", "blend_strength"} if defaults.model_dump().get("prior", "none") in ("none", "refit") else set()
    if defaults.model_dump().get("rectify") not in ("blend", "variance-transfer"):
        inactive.add("blend_strength")
    if defaults.model_dump().get("contrast_weight") == 0:
        inactive.add("contrast_temperature")
    if entry.name in {"kd", "kd-balanced"}:
        inactive.add("feature_weight")
    base = loss()
    for name, value in defaults.model_dump().items():
        changes = isinstance(value, float) and name not in inactive and value != 0
        if name == "temperature" and defaults.model_dump().get("logit_weight") == 0:
            continue
        if changes and name not in {"momentum", "threshold"}:  # these act over several steps; tested by themselves
            assert loss(**{name: value * 0.5}) != pytest.approx(base, rel=1e-6), name


UNIFORM = [20] * 5


@pytest.mark.parametrize("name", ["balanced-softmax", "logit-adjusted", "class-balanced"])
def test_uniform_counts_make_classification_losses_cross_entropy(name: str) -> None:
    step = _step(RECIPES[0])
    prior = ClassPrior.from_counts(UNIFORM)
    got, want = (Objective([classification_term(n, prior)])(step).total() for n in (name, "cross-entropy"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "parent"),
    [
        ("bkd", {"temperature": 4.0}, {"classification_weight": 1.0, "logit_weight": 1.0}),
        ("krdistill-lrd", {"correction": "none"}, {"classification_weight": 1.0, "logit_weight": 1.0}),
        ("dive", {"power": 1.0, "temperature": 4.0}, {"classification_weight": 0.5, "logit_weight": 0.5}),
        ("kd-balanced", {}, {"classification_weight": 1.0, "logit_weight": 1.0}),
    ],
)
def test_uniform_counts_make_recipes_plain_distillation(name: str, options: dict, parent: dict) -> None:  # type: ignore[type-arg]
    by_name = {e.name: e for e in RECIPES}
    step = _step(by_name[name])
    got, want = (
        by_name[n].build(by_name[n].resolve(o), _context(5, UNIFORM))(step).total()
        for n, o in ((name, options), ("kd", parent))
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_every_classification_loss_is_built_and_finite() -> None:
    step = _step(RECIPES[0])
    prior = ClassPrior.from_counts(_counts(5))
    for name in Classification.__args__:  # type: ignore[attr-defined]
        total = Objective([classification_term(name, prior)])(step).total()
        assert total.shape == (8,) and torch.isfinite(total).all(), name
    with pytest.raises(KrdistillError, match="Did you mean 'balanced-softmax'"):
        classification_term("balance-softmax", prior)
