from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from krdistill.errors import ArgumentError
from krdistill.evaluation import diagnose_teacher, predictions
from krdistill.priors import ClassGroups, ClassPrior

COUNTS = [400, 300, 150, 60, 30, 12, 8, 4]


def biased(
    prior: ClassPrior, per_class: list[int], lean: float, *, seed: int = 0, skill: float = 2.0
) -> tuple[Tensor, Tensor]:
    """Logits of a teacher that leans to the head by ``lean`` times the log prior."""
    gen = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(prior.num_classes), torch.tensor(per_class))
    logits = torch.randn(len(labels), prior.num_classes, generator=gen) + lean * prior.log_prior.float()
    logits[torch.arange(len(labels)), labels] += skill
    return logits, labels


def setting(lean: float = 1.0, per_class: list[int] | None = None) -> tuple[Tensor, Tensor, ClassPrior, ClassGroups]:
    prior = ClassPrior.from_counts(COUNTS, class_names=[f"c{k}" for k in range(len(COUNTS))])
    return *biased(prior, per_class or [50] * 8, lean), prior, prior.groups("shot")


def test_against_loops() -> None:
    logits, labels, prior, groups = setting(per_class=[50, 10, 20, 5, 50, 7, 9, 11])
    got = diagnose_teacher(logits, labels, prior, groups)["before"]
    z = logits.double().numpy()
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    per_class = [p[labels.numpy() == c].mean(0) for c in range(8)]
    mean = np.mean(per_class, axis=0)
    entropy = [np.mean([-sum(q * math.log(q) for q in row) for row in p[labels.numpy() == c]]) for c in range(8)]
    assert got["mean_prediction"] == pytest.approx(mean.tolist())
    assert got["ratio"] == pytest.approx((mean * 8).tolist())
    assert got["total_variation"] == pytest.approx(0.5 * np.abs(mean - 1 / 8).sum())
    assert got["prior_correlation"] == pytest.approx(spearmanr(np.log(mean), np.log(COUNTS)).statistic)
    for g, name in enumerate(groups.names):
        members = np.flatnonzero(groups.index.numpy() == g)
        row = got["groups"][name]
        assert row["classes"] == len(members)
        assert row["mass"] == pytest.approx(mean[members].sum())
        assert row["fair_share"] == pytest.approx(len(members) / 8)
        assert row["ratio"] == pytest.approx(mean[members].sum() * 8 / len(members))
        assert row["entropy"] == pytest.approx(np.mean([entropy[k] for k in members]))
        hits = [(p[labels.numpy() == k].argmax(1) == k).mean() for k in members]
        assert row["accuracy"] == pytest.approx(np.mean(hits))


def test_a_fair_teacher_is_called_fair() -> None:
    logits, labels, prior, groups = setting()
    silent = torch.zeros_like(logits)
    got = diagnose_teacher(silent, labels, prior, groups)
    assert got["before"]["ratio"] == pytest.approx([1.0] * 8)
    assert got["before"]["total_variation"] == pytest.approx(0.0, abs=1e-12)
    assert got["before"]["prior_correlation"] is None  # all equal: there is no order to compare
    assert {n: g["entropy"] for n, g in got["before"]["groups"].items()} == pytest.approx(
        dict.fromkeys(groups.names, math.log(8))
    )
    assert got["verdict"] == [
        "The teacher treats the groups alike: each gets 1.00 to 1.00 of its fair share of probability."
    ]
    assert got["after"] is None and got["training"] is None


def test_bias_shows_and_rectification_takes_it_away() -> None:
    logits, labels, prior, groups = setting(lean=1.0)
    train_logits, train_labels = biased(prior, COUNTS, 1.0, seed=5, skill=3.0)
    got = diagnose_teacher(
        logits, labels, prior, groups, rectified_logits=logits - prior.log_prior.float(),
        train_predictions=predictions(train_logits), train_labels=train_labels,
    )  # fmt: skip
    before, after = got["before"], got["after"]
    assert before["groups"]["few"]["ratio"] < 0.5 < 1.5 < before["groups"]["many"]["ratio"]
    assert before["prior_correlation"] > 0.9
    assert all(0.9 < g["ratio"] < 1.1 for g in after["groups"].values())
    assert after["total_variation"] < 0.2 * before["total_variation"]
    assert after["groups"]["few"]["accuracy"] > before["groups"]["few"]["accuracy"] + 0.1
    wrong = (train_logits.argmax(1) != train_labels).double()
    for name in groups.names:
        rates = [float(wrong[train_labels == k].mean()) for k in groups.members(name).tolist()]
        assert got["training"]["groups"][name] == pytest.approx(np.mean(rates))
    assert got["training"]["error"] == pytest.approx(float(wrong.mean()))
    first = got["verdict"][0]
    few, many = (f"{before['groups'][n]['ratio']:.2f}" for n in ("few", "many"))
    assert first.startswith(f"The teacher gives few-shot classes {few} of their fair share")
    assert f"many-shot classes {many}; rectified {after['groups']['few']['ratio']:.2f} and" in first
    assert "overshoots" not in first
    assert any("would fire" in s for s in got["verdict"])
    json.dumps(got, allow_nan=False)


def test_too_much_rectification_is_said_to_be_too_much() -> None:
    logits, labels, prior, groups = setting(lean=1.0)
    got = diagnose_teacher(logits, labels, prior, groups, rectified_logits=logits - 2.5 * prior.log_prior.float())
    assert got["after"]["groups"]["few"]["ratio"] > 1.1
    assert got["after"]["prior_correlation"] < -0.5
    assert "overshoots" in got["verdict"][0]
    assert any("less even" in s for s in got["verdict"])
    opposite = diagnose_teacher(logits - 2.5 * prior.log_prior.float(), labels, prior, groups)
    assert any("runs against the training counts" in s for s in opposite["verdict"])


def test_a_teacher_that_never_errs_on_its_training_images() -> None:
    logits, labels, prior, groups = setting()
    train_labels = torch.repeat_interleave(torch.arange(8), prior.counts)
    got = diagnose_teacher(
        logits, labels, prior, groups, train_predictions=train_labels.clone(), train_labels=train_labels
    )
    assert got["training"] == {"images": sum(COUNTS), "error": 0.0, "groups": {"many": 0.0, "medium": 0.0, "few": 0.0}}
    assert "hardly ever" in got["verdict"][-1]


def test_the_number_of_images_of_a_class_does_not_matter() -> None:
    logits, labels, prior, groups = setting()
    twice = torch.cat([torch.arange(len(labels)), (labels < 2).nonzero().flatten()])
    one = diagnose_teacher(logits, labels, prior, groups)["before"]
    two = diagnose_teacher(logits[twice], labels[twice], prior, groups)["before"]
    assert two["mean_prediction"] == pytest.approx(one["mean_prediction"])
    assert two["prior_correlation"] == one["prior_correlation"]


def test_an_empty_group_and_a_class_without_images() -> None:
    prior = ClassPrior.from_counts([500, 400, 120, 50])
    groups = prior.groups("shot")  # no few-shot class
    logits, labels = biased(prior, [20, 20, 0, 20], 1.0)
    got = diagnose_teacher(logits, labels, prior, groups, rectified_logits=logits)
    before: dict[str, Any] = got["before"]
    assert before["ratio"][2] is None
    assert sum(before["mean_prediction"]) == pytest.approx(1.0)
    assert before["groups"]["few"] == {
        "classes": 0, "images": 0, "accuracy": None, "ece": None, "mass": None, "fair_share": None, "ratio": None,
        "entropy": None,
    }  # fmt: skip
    assert before["groups"]["many"]["fair_share"] == pytest.approx(2 / 3)
    assert "few" not in " ".join(got["verdict"])
    json.dumps(got, allow_nan=False)


def test_balanced_training_images_have_no_correlation() -> None:
    prior = ClassPrior.from_counts([200] * 5)
    logits, labels = biased(prior, [9] * 5, 0.0)
    got = diagnose_teacher(logits, labels, prior, prior.groups("shot"))
    assert got["before"]["prior_correlation"] is None
    assert got["verdict"] == []  # one group that holds every class, equal counts: there is nothing to favour


def test_bad_input_is_named() -> None:
    logits, labels, prior, groups = setting()
    with pytest.raises(ArgumentError, match="train_predictions and train_labels together"):
        diagnose_teacher(logits, labels, prior, groups, train_predictions=labels)
    with pytest.raises(ArgumentError, match="rectified logits of the same images"):
        diagnose_teacher(logits, labels, prior, groups, rectified_logits=logits[:5])
    broken = logits.clone()
    broken[9, 3] = math.nan
    predicted = predictions(broken)
    assert predicted[9] == -1 and torch.equal(predicted[:9], logits[:9].argmax(1))
    with pytest.raises(ArgumentError, match=r"1 of 400 are of logits that hold NaN or infinity \(the first is row 9\)"):
        diagnose_teacher(logits, labels, prior, groups, train_predictions=predicted, train_labels=labels)
    for wrong in (logits, labels[:-1], labels.float()):
        with pytest.raises(ArgumentError, match="train_predictions: expected an integer tensor"):
            diagnose_teacher(logits, labels, prior, groups, train_predictions=wrong, train_labels=labels)
    with pytest.raises(ArgumentError, match="at least one training image"):
        diagnose_teacher(logits, labels, prior, groups, train_predictions=labels[:0], train_labels=labels[:0])
    with pytest.raises(ArgumentError, match="got none"):
        diagnose_teacher(logits[:0], labels[:0], prior, groups)
    with pytest.raises(ArgumentError, match=r"Expected names and groups of 7 classes"):
        diagnose_teacher(logits[:, :7], labels % 7, prior, groups)
