"""Counts, labels, logits and features of any kind, in every loss, rectifier, recipe and measure."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from fuzzing import ODD_FLOATS, floats, fuzz
from hypothesis import strategies as st
from torch import Tensor, nn

import krdistill.losses
import krdistill.rectify
from krdistill import anchors
from krdistill.errors import KrdistillError
from krdistill.evaluation import diagnose_teacher, evaluate_predictions, prediction_record
from krdistill.evaluation.metrics import confusion_matrix, per_image, reliability_curve
from krdistill.objective import Objective, ObjectiveContext, TeacherProfile
from krdistill.outputs import Outputs, Step
from krdistill.priors import ClassGroups, ClassPrior, effective_number_weights
from krdistill.recipes import list_recipes

# Parts that the public functions are made of: what they are given was checked before.
_INNER = {"by_rows", "piece_rows", "row_slices", "some", "once", "softened_divergence", "softmax_loss",
          "shifted_cross_entropy", "nce_loss", "unit_scale", "unit_rows", "apply_second_stage"}  # fmt: skip


def _functions() -> list[Callable[..., Any]]:
    found = []
    for package in (krdistill.losses, krdistill.rectify):
        for info in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            found += [
                f for name, f in vars(module).items()
                if inspect.isfunction(f) and f.__module__ == module.__name__ and not name.startswith("_")
                and name not in _INNER
            ]  # fmt: skip
    return [*found, anchors.simplex_etf, anchors.orthogonal_simplices, anchors.balanced_anchors, anchors.align_anchors]


FUNCTIONS = _functions()
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool)


@st.composite
def tensors(draw: st.DrawFn, *shape: int) -> Tensor:
    """Numbers of one size, with odd ones among them; now and then of another shape or type."""
    size = list(shape)
    if draw(st.integers(0, 11)) == 0:
        at = draw(st.integers(0, len(size) - 1))
        size[at] = draw(st.sampled_from([0, 1, size[at] + 1]))
    if draw(st.integers(0, 19)) == 0:
        size = draw(st.sampled_from([[], [3], [2, 3, 4], [0]]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x = torch.randn(size, generator=generator, dtype=torch.float64) * draw(
        st.sampled_from([0.0, 1e-300, 1e-40, 1.0, 1.0, 1.0, 30.0, 1e4, 1e30, 1e300])
    )
    if x.numel() and draw(st.integers(0, 2)) == 0:
        for _ in range(draw(st.integers(1, 3))):
            x.flatten()[draw(st.integers(0, x.numel() - 1))] = draw(st.sampled_from(ODD_FLOATS))
    if x.ndim == 2 and x.numel() and draw(st.integers(0, 5)) == 0:
        x[draw(st.integers(0, len(x) - 1))] = draw(st.sampled_from(ODD_FLOATS))
    return x.to(draw(st.sampled_from([torch.float32] * 12 + list(DTYPES))))


@st.composite
def class_indices(draw: st.DrawFn, rows: int, K: int) -> Any:
    if draw(st.integers(0, 9)) == 0:
        return draw(tensors(rows))
    low, high = draw(st.sampled_from([(0, K - 1)] * 6 + [(-1, K - 1), (0, K), (0, 2**62)]))
    rows = draw(st.sampled_from([rows] * 12 + [rows + 1, 0]))
    given = draw(st.lists(st.integers(low, high), min_size=rows, max_size=rows))
    return torch.tensor(given, dtype=draw(st.sampled_from([torch.int64] * 5 + [torch.int32, torch.uint8])) if high < 200
                        and low >= 0 else torch.int64)  # fmt: skip


whole = st.integers(0, 2000) | st.sampled_from([-1, 0, 1, 2**31, 2**53, 2**62, 2**63 - 1, 10**30])
odd_counts = st.one_of(
    st.lists(whole | floats | st.booleans(), max_size=7), st.lists(whole, min_size=2, max_size=6),
    st.lists(whole, min_size=2, max_size=6).map(lambda v: np.array(v, dtype=object)),
    st.lists(st.integers(0, 300), min_size=1, max_size=6).map(torch.tensor),
    st.lists(floats, min_size=1, max_size=6).map(np.array), st.sampled_from([None, "abc", 5, [[1, 2], [3, 4]], {}]),
    st.dictionaries(st.text(max_size=3), whole, max_size=4),
)  # fmt: skip


@st.composite
def groups_of(draw: st.DrawFn, K: int) -> Any:
    if draw(st.booleans()):
        return draw(class_indices(K, 3))
    names = draw(st.lists(st.text(max_size=3), max_size=4))
    index = draw(class_indices(K, max(1, len(names))))
    try:
        return ClassGroups(tuple(names), index, "any")
    except KrdistillError:
        return index


@st.composite
def calls(draw: st.DrawFn) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A function with arguments that fit each other, as a rule."""
    function = draw(st.sampled_from(FUNCTIONS))
    B, K, D = draw(st.integers(1, 6)), draw(st.integers(2, 6)), draw(st.integers(1, 7))
    hints = typing.get_type_hints(function)
    given: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind == parameter.VAR_KEYWORD:
            continue
        if parameter.default is not parameter.empty and name != "epochs" and draw(st.booleans()):
            continue
        given[name] = draw(_argument(name, hints.get(name, Any), B, K, D))
    return function, given


def _argument(name: str, hint: Any, B: int, K: int, D: int) -> st.SearchStrategy[Any]:
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    if choices:
        return st.sampled_from([*choices, *choices, "another"])
    if "map" in name:
        return tensors(B, D, 4, 4)
    by_name: dict[str, Callable[[], st.SearchStrategy[Any]]] = {
        "labels": lambda: class_indices(B, K),
        "groups": lambda: groups_of(K),
        "counts": lambda: st.lists(st.integers(0, 300), min_size=K, max_size=K) | odd_counts,
        "num_classes": lambda: st.sampled_from([K, K, K, K + 2, 1, 0, -1, 2.5, "3"]),
        "dim": lambda: st.integers(-1, 12) | floats,
        "epochs": lambda: st.sampled_from([1, 1, 0, -1]),
        "batch_size": lambda: st.sampled_from([2, 512, 0, -1]),
        "max_steps": lambda: st.sampled_from([1, 5, 0]),
        "seed": lambda: st.integers(0, 2**62),
        "bounds": lambda: st.tuples(floats, floats),
        "taus": lambda: st.lists(floats, max_size=3),
        "variation": lambda: st.tuples(tensors(D, D), tensors(K, D)) | st.none(),
        "dtype": lambda: st.sampled_from([torch.float32, torch.float64]),
        "assign": lambda: st.sampled_from([None, True, False]),
        "weight": lambda: tensors(K, D),
        "bias": lambda: tensors(K) | st.none() | st.booleans(),
        "basis": lambda: tensors(D, D),
        "variances": lambda: tensors(K, D),
    }
    if name in by_name:
        return by_name[name]()
    if name in ("anchors", "class_means", "prototypes"):
        return tensors(K, D)
    if "features" in name or name == "x":
        return tensors(B, D)
    if "logits" in name or name == "cosines":
        return tensors(B, K)
    if hint is float:
        return floats
    if hint is bool:
        return st.booleans()
    if hint is int:
        return st.integers(-1, 5)
    return st.one_of(tensors(K), st.none()) if "None" in str(hint) else tensors(K)


@fuzz(call=calls())
def test_functions(call: tuple[Callable[..., Any], dict[str, Any]]) -> None:
    function, given = call
    made = function(**given)
    for value in made if isinstance(made, tuple) else (made,):
        assert value is None or isinstance(value, (Tensor, float, ClassPrior))


rules = st.sampled_from(["shot", "thirds", "other", (100, 20), (1, 5), [3, 1], (2**70, 1)]) | st.tuples(floats, floats)


@fuzz(given=odd_counts, rule=rules,
      beta=floats, labels=class_indices(6, 4), names=st.none() | st.lists(st.text(max_size=3), max_size=6))  # fmt: skip
def test_counts(given: Any, rule: Any, beta: float, labels: Any, names: Any) -> None:
    errors: list[KrdistillError] = []
    for make in (
        lambda: ClassPrior.from_counts(given, class_names=names),
        lambda: ClassPrior.from_labels(labels),
        lambda: effective_number_weights(given, beta),
    ):
        try:
            prior = make()
        except KrdistillError as error:
            errors.append(error)
            continue
        if isinstance(prior, ClassPrior):
            assert abs(float(prior.frequencies.sum()) - 1) < 1e-4 and prior.imbalance_factor >= 1
            assert ClassPrior.from_dict(prior.as_dict()).as_dict() == prior.as_dict()
            prior.effective_number_weights(0.99)
            groups = prior.groups(rule)
            assert sum(groups.sizes().values()) == prior.num_classes
            assert ClassGroups.from_dict(groups.as_dict()).as_dict() == groups.as_dict()
            groups.mean_over([0.5] * prior.num_classes)
    assert all(str(error) for error in errors)


RECIPES = [r for r in list_recipes() if r.name != "lfme"]  # it asks experts
K, D_S, D_T = 4, 6, 8


@functools.cache
def _objective(name: str) -> tuple[Any, Objective]:
    recipe = next(r for r in RECIPES if r.name == name)
    generator = torch.Generator().manual_seed(1)
    prior, labels = ClassPrior.from_counts([120, 40, 9, 2]), torch.arange(4 * K) % K
    profile = TeacherProfile(
        nn.functional.normalize(torch.randn(K, D_T, generator=generator), dim=1),
        torch.randn(4 * K, K, generator=generator), labels, "random", torch.randn(4 * K, D_T, generator=generator),
        labels,
    )  # fmt: skip
    context = ObjectiveContext(
        prior=prior, groups=prior.groups("thirds"), student_dim=D_S, teacher=profile, student_maps=(4, D_S),
        teacher_maps=(5, D_T), labels=torch.arange(12 * K) % K, teacher_head=nn.Linear(D_T, K),
    )  # fmt: skip
    light = {"negatives": 16, "embed_dim": 8} if name == "crd" else {}
    return recipe, recipe.build(recipe.resolve(light), context)


@st.composite
def outputs(draw: st.DrawFn, B: int, dim: int, maps: tuple[int, ...]) -> Outputs:
    return Outputs(
        draw(tensors(B, K)), draw(tensors(B, dim)),
        tuple(draw(tensors(B, c, 4 // (i + 1), 4 // (i + 1))) for i, c in enumerate(maps)),
    )  # fmt: skip


@st.composite
def steps(draw: st.DrawFn) -> tuple[str, Step]:
    recipe, B = draw(st.sampled_from(RECIPES)), draw(st.integers(1, 6))
    student = draw(outputs(B, D_S, (4, D_T) if recipe.reuses_classifier else (4, D_S)))
    teacher = draw(
        outputs(B, D_T, (5, D_T)) | st.none() if draw(st.integers(0, 20)) == 0 else outputs(B, D_T, (5, D_T))
    )
    index = draw(class_indices(B, 12 * K) | st.none() if draw(st.integers(0, 9)) == 0 else class_indices(B, 12 * K))
    return recipe.name, Step(student, draw(class_indices(B, K)), teacher, index, draw(st.floats(0, 1)))


@fuzz(given=steps())
def test_objectives(given: tuple[str, Step]) -> None:
    name, step = given
    _, objective = _objective(name)
    terms = objective(step)
    total = terms.total()
    assert total.shape == step.labels.shape and total.dtype.is_floating_point


@fuzz(
    logits=tensors(6, K),
    other=tensors(6, K),
    labels=class_indices(6, K),
    groups=groups_of(K),
    bins=st.integers(-1, 20) | floats,
    confidence=st.lists(floats, max_size=6),
    correct=st.lists(st.booleans() | floats, max_size=6),
)
def test_evaluation(
    logits: Tensor, other: Tensor, labels: Any, groups: Any, bins: Any, confidence: list[float], correct: list[Any]
) -> None:
    prior = ClassPrior.from_counts([120, 40, 9, 2])
    names, groups = prior.class_names, groups if isinstance(groups, ClassGroups) else prior.groups("thirds")
    for measure in (
        lambda: evaluate_predictions(logits, labels, groups, class_names=names),
        lambda: per_image(logits, labels),
        lambda: prediction_record(logits, labels),
        lambda: confusion_matrix(labels, labels, K),
        lambda: reliability_curve(confidence, correct, bins),
        lambda: diagnose_teacher(logits, labels, prior, prior.groups("thirds"), rectified_logits=other),
    ):
        try:
            measure()
        except KrdistillError as error:
            assert str(error)
