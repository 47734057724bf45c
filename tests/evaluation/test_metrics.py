from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference
from torch import Tensor
from torchmetrics.classification import MulticlassCalibrationError

from krdistill.errors import ArgumentError
from krdistill.evaluation import confusion_matrix, evaluate_predictions, prediction_record, reliability_curve
from krdistill.evaluation import metrics as module
from krdistill.priors import ClassGroups, ClassPrior


def made_up(N: int, K: int, *, seed: int = 0, skill: float = 1.5) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    labels = torch.randint(K, (N,), generator=gen)
    logits = torch.randn(N, K, generator=gen)
    logits[torch.arange(N), labels] += skill
    return logits, labels


def thirds(K: int) -> ClassGroups:
    return ClassGroups(("head", "medium", "tail"), torch.arange(K) * 3 // K, "thirds by class index")


def names(K: int) -> list[str]:
    return [f"c{k}" for k in range(K)]


def loop_ece(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> float:
    """ECE by its definition, image by image."""
    total, N = 0.0, len(labels)
    for b in range(bins):
        low, high = b / bins, (b + 1) / bins
        hits, confidences = [], []
        for p, y in zip(probabilities, labels, strict=True):
            c = p.max()
            if low <= c < high or (b == bins - 1 and c == 1.0):
                hits.append(float(p.argmax() == y))
                confidences.append(c)
        if hits:
            total += len(hits) / N * abs(np.mean(hits) - np.mean(confidences))
    return total


def softmax(logits: Tensor) -> np.ndarray:
    z = logits.double().numpy()
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("K", [3, 12])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_against_scikit_learn(K: int, dtype: torch.dtype) -> None:
    logits, labels = made_up(400, K)
    logits = logits.to(dtype)
    got = evaluate_predictions(logits, labels, thirds(K), class_names=names(K))
    p, y = softmax(logits), labels.numpy()
    predicted = p.argmax(1)
    recall = reference.recall_score(y, predicted, average=None, labels=range(K))
    assert got["images"] == 400
    assert got["top1"] == pytest.approx(reference.accuracy_score(y, predicted))
    assert got["balanced_accuracy"] == pytest.approx(reference.balanced_accuracy_score(y, predicted))
    assert got["per_class"] == pytest.approx(recall.tolist())
    assert got["nll"] == pytest.approx(reference.log_loss(y, p, labels=range(K)), rel=1e-6)
    assert got["harmonic_mean"] == pytest.approx(K / sum(1 / r for r in recall))
    assert got["worst_class"] == {
        "name": f"c{recall.argmin()}",
        "accuracy": pytest.approx(recall.min()),
        "classes": (recall == recall.min()).sum(),
    }
    assert got["ece"] == pytest.approx(loop_ece(p, y, 15), abs=1e-9)
    if K == 3:
        assert got["top5"] is None
    else:
        assert got["top5"] == pytest.approx(reference.top_k_accuracy_score(y, p, k=5, labels=range(K)))
    groups = np.arange(K) * 3 // K
    for g, name in enumerate(("head", "medium", "tail")):
        mine = groups[y] == g
        row = got["groups"][name]
        assert row["classes"] == int((groups == g).sum())
        assert row["images"] == int(mine.sum())
        assert row["accuracy"] == pytest.approx(recall[groups == g].mean())
        assert row["ece"] == pytest.approx(loop_ece(p[mine], y[mine], 15), abs=1e-9)
        assert sum(got["group_confusion"][name].values()) == pytest.approx(1.0)
        for h, other in enumerate(("head", "medium", "tail")):
            shares = [(groups[predicted[y == k]] == h).mean() for k in range(K) if groups[k] == g]
            assert got["group_confusion"][name][other] == pytest.approx(np.mean(shares))
    json.dumps(got, allow_nan=False)


def test_ece_is_torchmetrics_multiclass_ece() -> None:
    logits, labels = made_up(600, 7)
    metric = MulticlassCalibrationError(7, n_bins=10, norm="l1")
    metric.update(logits.double().softmax(1), labels)
    got = evaluate_predictions(logits, labels, thirds(7), class_names=names(7), ece_bins=10)
    assert got["ece"] == pytest.approx(float(metric.compute()), abs=1e-6)


def test_a_confidence_of_exactly_one_stays_in_the_last_bin() -> None:
    # Two images at confidence 1 (one wrong), two at 0.95 (both right): one bin of accuracy 3/4, confidence 0.975.
    sure, less = [800.0, 0.0], [math.log(0.95 / 0.05), 0.0]
    logits = torch.tensor([sure, sure, less, less], dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 0])
    groups = ClassGroups(("all",), torch.zeros(2, dtype=torch.int64), "all")
    got = evaluate_predictions(logits, labels, groups, class_names=names(2), ece_bins=10)
    assert got["ece"] == pytest.approx(0.225)


def test_by_hand() -> None:
    # Class 0: 2 of 2 right; class 1: 1 of 2, the other taken for 2; class 2: 0 of 1, taken for 0.
    predicted, labels = [0, 0, 1, 2, 0], torch.tensor([0, 0, 1, 1, 2])
    logits = torch.eye(3)[predicted] * 2
    groups = ClassGroups(("many", "few"), torch.tensor([0, 1, 1]), "by hand")
    got = evaluate_predictions(logits, labels, groups, class_names=["a", "b", "c"])
    assert got["top1"] == pytest.approx(3 / 5)
    assert got["per_class"] == [1.0, 0.5, 0.0]
    assert got["balanced_accuracy"] == pytest.approx(0.5)
    assert got["harmonic_mean"] == 0.0
    assert got["worst_class"] == {"name": "c", "accuracy": 0.0, "classes": 1}
    confidence = math.exp(2) / (math.exp(2) + 2)
    assert got["ece"] == pytest.approx(abs(3 / 5 - confidence))
    assert got["groups"]["few"] == {
        "classes": 2, "images": 3, "accuracy": pytest.approx(0.25), "ece": pytest.approx(abs(1 / 3 - confidence)),
    }  # fmt: skip
    assert got["group_confusion"] == {
        "many": {"many": 1.0, "few": 0.0},
        "few": {"many": pytest.approx(0.5), "few": pytest.approx(0.5)},
    }
    assert got["nll"] == pytest.approx(-(3 * math.log(confidence) + 2 * math.log((1 - confidence) / 2)) / 5)


def test_an_empty_group_is_not_available_and_never_zero() -> None:
    counts = [int(500 * 10 ** (-k / 99)) for k in range(100)]  # CIFAR-100-LT, imbalance factor 10: no few-shot class
    groups = ClassPrior.from_counts(counts).groups("shot")
    logits, labels = made_up(800, 100)
    got = evaluate_predictions(logits, labels, groups, class_names=names(100))
    assert got["groups"]["few"] == {"classes": 0, "images": 0, "accuracy": None, "ece": None}
    assert got["group_confusion"]["few"] == {"many": None, "medium": None, "few": None}
    assert (got["groups"]["many"]["classes"], got["groups"]["medium"]["classes"]) == (69, 31)
    json.dumps(got, allow_nan=False)


def test_a_class_absent_from_the_test_set_is_left_out() -> None:
    logits = torch.eye(4)[[0, 0, 1, 3]] * 5
    labels = torch.tensor([0, 0, 1, 1])  # classes 2 and 3 have no image; one image is taken for class 3
    groups = ClassGroups(("head", "tail", "rest"), torch.tensor([0, 0, 1, 2]), "by hand")
    got = evaluate_predictions(logits, labels, groups, class_names=list("abcd"))
    assert got["per_class"] == [1.0, 0.5, None, None]
    assert got["balanced_accuracy"] == pytest.approx(0.75)
    assert got["harmonic_mean"] == pytest.approx(2 / (1 + 2))
    assert got["worst_class"]["name"] == "b"
    assert got["groups"]["tail"] == {"classes": 1, "images": 0, "accuracy": None, "ece": None}
    assert got["group_confusion"]["head"] == {"head": pytest.approx(0.75), "tail": 0.0, "rest": pytest.approx(0.25)}


def test_a_network_that_says_nothing_is_at_chance() -> None:
    """Ties count in class order: a constant answer is right for one class, not for all of them."""
    K = 20
    got = evaluate_predictions(torch.zeros(K, K), torch.arange(K), thirds(K), class_names=names(K))
    assert got["top1"] == pytest.approx(1 / K)
    assert got["top5"] == pytest.approx(5 / K)
    assert got["worst_class"] == {"name": "c1", "accuracy": 0.0, "classes": K - 1}
    assert got["nll"] == pytest.approx(math.log(K))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = made_up(101, 9)
    whole = evaluate_predictions(logits, labels, thirds(9), class_names=names(9))
    monkeypatch.setattr(module, "CHUNK_VALUES", 40)
    assert evaluate_predictions(logits, labels, thirds(9), class_names=names(9)) == whole


def test_many_classes() -> None:
    K = 8142
    logits, labels = made_up(1500, K, skill=6.0)
    got = evaluate_predictions(logits, labels, thirds(K), class_names=names(K))
    assert got["top1"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert sum(a is None for a in got["per_class"]) == K - len(labels.unique())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 8), st.floats(-50, 50))
def test_invariances(seed: int, K: int, shift: float) -> None:
    """A shift of all logits, the order of the images and the names of the classes change no number."""
    logits, labels = made_up(60, K, seed=seed)
    logits = logits.double()
    groups = thirds(K)
    one = evaluate_predictions(logits, labels, groups, class_names=names(K))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    classes = torch.randperm(K, generator=torch.Generator().manual_seed(seed + 1))
    where = classes.argsort()  # new place of each class
    two = evaluate_predictions(
        logits[order][:, classes] + shift, where[labels[order]],
        ClassGroups(groups.names, groups.index[classes], groups.rule), class_names=[f"c{k}" for k in classes.tolist()],
    )  # fmt: skip
    for key in ("top1", "balanced_accuracy", "harmonic_mean", "ece", "nll"):
        assert two[key] == pytest.approx(one[key], abs=1e-9)
    assert two["worst_class"]["accuracy"] == one["worst_class"]["accuracy"]
    for name, row in one["groups"].items():
        assert two["groups"][name]["accuracy"] == (None if row["accuracy"] is None else pytest.approx(row["accuracy"]))
    assert [two["per_class"][k] for k in where.tolist()] == one["per_class"]


def test_the_input_is_not_changed() -> None:
    logits, labels = made_up(20, 4)
    kept = logits.clone()
    evaluate_predictions(logits.requires_grad_(), labels.int(), thirds(4), class_names=names(4))
    assert torch.equal(logits, kept)


def test_bad_input_is_named() -> None:
    logits, labels = made_up(10, 4)

    def refused(match: str, logits: Tensor = logits, labels: Tensor = labels, K: int = 4, **options: int) -> None:
        with pytest.raises(ArgumentError, match=match):
            evaluate_predictions(logits, labels, thirds(K), class_names=names(K), **options)

    broken = logits.clone()
    broken[3, 1], broken[7, 0], broken[7, 2] = math.nan, math.inf, math.nan
    refused("2 of 10 rows of the logits hold NaN or infinity .the first is row 3.", broken)
    refused(r"\(N, K\)|\(B, K\)", logits[0])
    refused("float", logits.long())
    refused("at least 2 classes", logits[:, :1])
    refused("shape", labels=labels[:9])
    refused("shape|integer", labels=labels.float())
    refused(r"0\.\.3", labels=labels + 1)
    refused(r"0\.\.3", labels=labels - 4)
    refused("got none", logits[:0], labels[:0])
    refused("4 classes.*5 names", K=5)
    refused("ece_bins", ece_bins=0)


def test_confusion_matrix_against_scikit_learn() -> None:
    logits, labels = made_up(300, 6)
    predicted = logits.argmax(1)
    got = confusion_matrix(predicted, labels, 6)
    assert got.dtype == torch.int64
    assert np.array_equal(got.numpy(), reference.confusion_matrix(labels, predicted, labels=range(6)))
    by_hand = confusion_matrix(torch.tensor([1, 1, 0]), torch.tensor([0, 0, 1]), 3)
    assert by_hand.tolist() == [[0, 2, 0], [1, 0, 0], [0, 0, 0]]


def test_confusion_matrix_refuses() -> None:
    good = torch.tensor([0, 1])
    for predictions, labels in ((good, good[:1]), (good, torch.tensor([0, 3])), (torch.tensor([-1, 0]), good)):
        with pytest.raises(ArgumentError):
            confusion_matrix(predictions, labels, 2)
    with pytest.raises(ArgumentError):
        confusion_matrix(good.double(), good, 2)


def test_prediction_record_is_enough_to_measure_again() -> None:
    logits, labels = made_up(200, 12)
    record = prediction_record(logits, labels)
    assert {k: str(v.dtype) for k, v in record.items()} == {
        "prediction": "int32", "confidence": "float32", "rank": "int32",
    }  # fmt: skip
    got = evaluate_predictions(logits, labels, thirds(12), class_names=names(12))
    p = softmax(logits)
    assert np.array_equal(record["prediction"], p.argmax(1))
    assert np.allclose(record["confidence"], p.max(1), atol=1e-7)
    assert (record["rank"] == 0).mean() == pytest.approx(got["top1"])
    assert (record["rank"] < 5).mean() == pytest.approx(got["top5"])
    before = (p > p[np.arange(200), labels.numpy()][:, None]).sum(1)
    assert np.array_equal(record["rank"], before)


def test_reliability_curve_is_the_ece_drawn() -> None:
    logits, labels = made_up(500, 5)
    record = prediction_record(logits, labels)
    curve = reliability_curve(record["confidence"], record["prediction"] == labels.numpy(), bins=12)
    assert sum(curve["count"]) == 500
    ece = sum(
        n / 500 * abs(a - c)
        for n, a, c in zip(curve["count"], curve["accuracy"], curve["confidence"], strict=True)
        if n
    )
    got = evaluate_predictions(logits, labels, thirds(5), class_names=names(5), ece_bins=12)
    assert ece == pytest.approx(got["ece"], abs=1e-6)


def test_reliability_curve_by_hand() -> None:
    curve = reliability_curve([0.1, 0.5, 0.6, 1.0], [True, False, True, True], bins=4)
    assert curve["center"] == [0.125, 0.375, 0.625, 0.875]
    assert curve["count"] == [1, 0, 2, 1]
    assert curve["accuracy"] == [1.0, None, 0.5, 1.0]
    assert curve["confidence"] == [0.1, None, pytest.approx(0.55), 1.0]
    json.dumps(curve, allow_nan=False)
    for confidence, correct, bins in (([0.1], [1, 0], 4), ([1.2], [1], 4), ([math.nan], [1], 4), ([0.5], [1], 0)):
        with pytest.raises(ArgumentError):
            reliability_curve(confidence, correct, bins)
