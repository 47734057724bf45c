from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from krdistill.errors import ArgumentError, DataError
from krdistill.outputs import Outputs
from krdistill.rectify import classifier_refit
from krdistill.rectify.classifier_refit import RefittedTeacher, refit_classifier, seconds_to_fit

COUNTS = (120, 40, 6)


def _samples(seed: int = 0, dim: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS))
    centres = torch.randn(3, dim, generator=generator)
    return centres[labels] + torch.randn(len(labels), dim, generator=generator), labels


@pytest.mark.parametrize("tau", [1.0, 0.0, 1.7])
def test_it_is_the_optimum_of_its_formula(tau: float) -> None:
    features, labels = _samples()
    weight, bias = refit_classifier(features, labels, 3, tau=tau, weight_decay=1e-2)
    scale = features.double().square().sum(1).mean().sqrt()
    W = (weight.double() * scale).requires_grad_()
    b = bias.double().requires_grad_()
    log_prior = (torch.tensor(COUNTS).double() / sum(COUNTS)).log()

    def objective(W: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        logits = features.double() / scale @ W.T + b + tau * log_prior
        return F.cross_entropy(logits, labels) + 0.5 * 1e-2 * W.square().sum()

    gradient = torch.autograd.grad(objective(W, b), (W, b))
    assert all(g.abs().max() < 1e-4 for g in gradient)
    assert abs(float(bias.mean())) < 1e-6
    assert weight.dtype == bias.dtype == torch.float32


def test_without_a_bias_it_is_the_optimum_over_the_weight_alone() -> None:
    features, labels = _samples()
    weight, bias = refit_classifier(features, labels, 3, bias=False, weight_decay=1e-2)
    scale = features.double().square().sum(1).mean().sqrt()
    W = (weight.double() * scale).requires_grad_()
    log_prior = (torch.tensor(COUNTS).double() / sum(COUNTS)).log()
    objective = F.cross_entropy(features.double() / scale @ W.T + log_prior, labels) + 0.5 * 1e-2 * W.square().sum()
    assert torch.autograd.grad(objective, W)[0].abs().max() < 1e-4
    assert not bool(bias.any())
    assert not torch.allclose(weight, refit_classifier(features, labels, 3, weight_decay=1e-2)[0], atol=1e-2)


def test_what_is_fitted_has_no_prior_in_it() -> None:
    """Features that tell nothing: an ordinary classifier answers with the frequencies, this one with equal shares."""
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS))
    weight, bias = refit_classifier(torch.ones(len(labels), 2), labels, 3, weight_decay=1e-3)
    assert torch.allclose((torch.ones(2) @ weight.T + bias).softmax(0), torch.full((3,), 1 / 3), atol=1e-3)


def test_more_tau_is_more_for_the_tail() -> None:
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS))
    weight, bias = refit_classifier(torch.ones(len(labels), 2), labels, 3, tau=2.0, weight_decay=1e-3)
    share = 1 / torch.tensor(COUNTS, dtype=torch.float32)  # pi^(1 - 2), made to sum to 1
    assert torch.allclose((torch.ones(2) @ weight.T + bias).softmax(0), share / share.sum(), atol=1e-3)
    with pytest.raises(ArgumentError, match="tau"):
        refit_classifier(torch.ones(len(labels), 2), labels, 3, tau=-0.1)


def test_scale_and_class_order_change_nothing() -> None:
    features, labels = _samples()
    weight, bias = refit_classifier(features, labels, 3, weight_decay=1e-2)
    logits = features @ weight.T + bias
    larger = refit_classifier(1000 * features, labels, 3, weight_decay=1e-2)
    assert torch.allclose(1000 * features @ larger[0].T + larger[1], logits, atol=1e-3)
    order = torch.tensor([2, 0, 1])  # class k is called order[k]
    other = refit_classifier(features, order[labels], 3, weight_decay=1e-2)
    assert torch.allclose((features @ other[0].T + other[1])[:, order], logits, atol=1e-3)


def test_the_tail_gains() -> None:
    features, labels = _samples(seed=1)
    test, truth = _samples(seed=1)
    test = test + 0.5 * torch.randn(test.shape, generator=torch.Generator().manual_seed(9))
    plain = torch.nn.Linear(5, 3).requires_grad_()
    optimizer = torch.optim.LBFGS(plain.parameters(), max_iter=200)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(features), labels)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    weight, bias = refit_classifier(features, labels, 3)
    tail = truth == 2
    own, refitted = (z[tail].argmax(1).eq(2).float().mean() for z in (plain(test), test @ weight.T + bias))
    assert refitted > own


def test_the_teacher_answers_anew_from_its_feature() -> None:
    features, labels = _samples()
    weight, bias = refit_classifier(features, labels, 3)
    answer = Outputs(torch.zeros(4, 3), features[:4].half(), (torch.ones(4, 1, 1, 1),))
    fixed = RefittedTeacher(weight, bias)(answer)
    assert torch.allclose(fixed.logits, features[:4].half().float() @ weight.T + bias, atol=1e-6)
    assert fixed.feature is answer.feature and fixed.maps is answer.maps
    assert not any(p.requires_grad for p in RefittedTeacher(weight, bias).parameters())


def test_bad_input() -> None:
    features, labels = _samples()
    with pytest.raises(DataError, match="1 of 4 classes have no row, among them class 3"):
        refit_classifier(features, labels, 4)
    with pytest.raises(DataError, match="all of them are zero"):
        refit_classifier(torch.zeros_like(features), labels, 3)
    features[3, 1] = float("nan")
    with pytest.raises(ArgumentError, match="features"):
        refit_classifier(features, labels, 3)
    with pytest.raises(ArgumentError, match="weight_decay"):
        refit_classifier(_samples()[0], labels, 3, weight_decay=0)
    with pytest.raises(ArgumentError):
        refit_classifier(_samples()[0], labels[:-1], 3)


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fit is a large one, of which 7 rows of 3 classes are in work at once."""
    monkeypatch.setattr(classifier_refit, "_WHOLE", 0)
    monkeypatch.setitem(classifier_refit._PIECE, "cpu", 21)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_in_pieces_it_finds_the_same(bias: bool, weighted: bool, request: pytest.FixtureRequest) -> None:
    features, labels = _samples()
    options = {
        "bias": bias,
        "weight_decay": 1e-2,
        "row_weights": torch.linspace(0, 2, len(labels)) if weighted else None,
    }
    whole = refit_classifier(features, labels, 3, **options)
    request.getfixturevalue("in_pieces")
    before = features.clone()
    pieces = refit_classifier(features, labels, 3, **options)
    assert torch.equal(features, before), "the caller's features are the caller's"
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)
    halves = refit_classifier(features.half(), labels, 3, **options)
    assert halves[0].dtype == halves[1].dtype == torch.float32
    torch.testing.assert_close(whole[0], halves[0], atol=2e-2, rtol=2e-2)


def test_in_pieces_no_matrix_of_all_logits_is_made(in_pieces: None, monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = _samples()
    made = []
    softmax = torch.log_softmax
    monkeypatch.setattr(torch, "log_softmax", lambda z, dim: made.append(tuple(z.shape)) or softmax(z, dim))
    refit_classifier(features, labels, 3, weight_decay=1e-2)
    assert set(made) == {(7, 3), (len(labels) % 7, 3)} and all(z.numel() <= 21 for z in map(torch.empty, made))


@pytest.mark.parametrize("large", [True, False])
def test_a_class_of_a_hundred_thousandth_of_the_rows_is_fitted_too(large: bool, request: pytest.FixtureRequest) -> None:
    """Its part of the gradient is below the usual tolerance from the start."""
    if large:
        request.getfixturevalue("in_pieces")
        classifier_refit._PIECE["cpu"] = 90_000
    labels = torch.tensor([0] * 100_000 + [1] * 100_000 + [2])
    features = torch.eye(3)[labels]
    weight, bias = refit_classifier(features, labels, 3, weight_decay=1e-9)
    assert (torch.eye(3) @ weight.T + bias).argmax(1).tolist() == [0, 1, 2]
    log_prior = labels.bincount().double().div(len(labels)).log()
    assert float((weight[:, 2].double() + bias + log_prior).softmax(0)[2]) > 0.5


@pytest.mark.parametrize(("K", "weight_decay"), [(3, 1e-5), (100, 1e-5), (400, 2.5e-6)])
def test_the_default_penalty_is_smaller_where_classes_are_many(K: int, weight_decay: float) -> None:
    labels = torch.arange(2 * K) % K
    features = torch.randn(2 * K, 4, generator=torch.Generator().manual_seed(0))
    found, expected = (
        refit_classifier(features, labels, K, max_steps=5, **o) for o in ({}, {"weight_decay": weight_decay})
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_how_long_it_will_take_grows_with_the_rows_and_is_soon_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(classifier_refit._PIECE, "cpu", 20_000)
    asked = []
    objective = classifier_refit._objective

    def counted(f: torch.Tensor, *rest: object, **options: object) -> object:
        asked.append((f.dtype, len(f)))
        return objective(f, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(classifier_refit, "_objective", counted)
    few, many = seconds_to_fit(300, 100, 8), seconds_to_fit(3_000_000, 100, 8)
    assert 0 < few < many
    assert asked == [(torch.float64, 300), (torch.float32, 600), (torch.float32, 200)]
