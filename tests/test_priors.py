from __future__ import annotations

import json
import math
import time
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from krdistill.errors import ArgumentError, DataError
from krdistill.priors import ClassGroups, ClassPrior, effective_number_weights


def _cifar100_lt(imbalance_factor: float) -> list[int]:
    return [int(500 * imbalance_factor ** (-k / 99)) for k in range(100)]


def test_a_hand_computed_prior() -> None:
    prior = ClassPrior.from_counts([6, 3, 1], class_names=("cat", "dog", "owl"))
    assert (prior.num_classes, prior.total, prior.imbalance_factor) == (3, 10, 6.0)
    assert prior.frequencies.tolist() == [0.6, 0.3, 0.1]
    assert prior.log_prior.tolist() == pytest.approx([math.log(0.6), math.log(0.3), math.log(0.1)], abs=1e-15)
    assert prior.counts.dtype == prior.kept.dtype == torch.int64
    assert prior.log_prior.dtype == prior.frequencies.dtype == torch.float64
    assert prior.kept.tolist() == [0, 1, 2]
    assert ClassPrior.from_counts([6, 3, 1]).class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    "counts",
    [
        [6, 3, 1],
        (6, 3, 1),
        np.array([6, 3, 1], dtype=np.uint8),
        np.array([6.0, 3.0, 1.0]),
        torch.tensor([6, 3, 1], dtype=torch.int32),
        torch.tensor([6, 3, 1], dtype=torch.bfloat16),
    ],
    ids=["list", "tuple", "uint8", "float64", "int32", "bfloat16"],
)
def test_counts_come_in_many_forms(counts: object) -> None:
    prior = ClassPrior.from_counts(counts)  # type: ignore[arg-type]
    assert prior.counts.tolist() == [6, 3, 1]


def test_the_prior_keeps_a_copy() -> None:
    counts = torch.tensor([6, 3, 1])
    prior = ClassPrior.from_counts(counts)
    counts[0] = 0
    assert prior.counts.tolist() == [6, 3, 1]


def test_from_labels_counts_them() -> None:
    labels = np.random.default_rng(0).integers(0, 7, 500)
    expected = [int((labels == k).sum()) for k in range(7)]
    assert ClassPrior.from_labels(labels.tolist()).counts.tolist() == expected
    assert ClassPrior.from_labels(torch.from_numpy(labels), num_classes=7).counts.tolist() == expected
    with pytest.raises(DataError, match="1 of 8 classes have no training image: '7'"):
        ClassPrior.from_labels(labels, num_classes=8)
    assert ClassPrior.from_labels([0, 1, 1], class_names=["a", "b"]).class_names == ("a", "b")


def test_an_empty_class_is_named_and_can_be_dropped() -> None:
    counts, names = [5, 0, 3, 0, 2], ["ant", "bee", "cat", "dog", "emu"]
    with pytest.raises(DataError, match=r"2 of 5 classes have no training image: 'bee', 'dog'.*empty=\"drop\""):
        ClassPrior.from_counts(counts, class_names=names)
    prior = ClassPrior.from_counts(counts, class_names=names, empty="drop")
    assert prior.class_names == ("ant", "cat", "emu")
    assert prior.counts.tolist() == [5, 3, 2]
    assert prior.kept.tolist() == [0, 2, 4]
    with pytest.raises(DataError, match="'1', '2', '3', '4', '5' and 15 more"):
        ClassPrior.from_counts([1] + [0] * 20)
    with pytest.raises(DataError, match="at least 2 classes with images, but got 1"):
        ClassPrior.from_counts([5, 0], empty="drop")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([3, -1], r"numbers >= 0, but got -1 for class '1'"),
        ([3, 1.5], r"whole numbers, but got 1.5 at position 1"),
        ([3, float("nan")], r"whole numbers, but got nan at position 1"),
        ([3, float("inf")], r"whole numbers, but got inf"),
        (["3", "1"], r"whole numbers, but got values of type <U1"),
        ([True, False], r"values of type bool"),
        ([[1, 2], [3, 4]], r"one dimension, but got an array of shape \(2, 2\)"),
        ([[1], [2, 3]], r"uneven depth"),
        ([], r"at least one number"),
        ([3, 2**63], r"whole numbers, but got 9.22"),
        (np.array([3, 2**63], dtype=np.uint64), r"whole numbers, but got 9223372036854775808 at position 1"),
        ([4], r"at least 2 classes"),
    ],
)
def test_bad_counts_are_refused(counts: list[object], message: str) -> None:
    with pytest.raises((ArgumentError, DataError), match=message) as caught:
        ClassPrior.from_counts(counts)  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)


def test_bad_names_labels_and_choices_are_refused() -> None:
    with pytest.raises(ArgumentError, match="expected 3 names, one per class, but got 2"):
        ClassPrior.from_counts([3, 2, 1], class_names=["a", "b"])
    with pytest.raises(ArgumentError, match="the string 'abc'"):
        ClassPrior.from_counts([3, 2, 1], class_names="abc")
    with pytest.raises(ArgumentError, match=r"class indices in 0\.\.2, but got 3 at position 1"):
        ClassPrior.from_labels([0, 3, 1], num_classes=3)
    with pytest.raises(ArgumentError, match="but got -1 at position 2"):
        ClassPrior.from_labels([0, 1, -1])
    with pytest.raises(ArgumentError, match="num_classes: expected a whole number >= 1, but got 0"):
        ClassPrior.from_labels([0, 1], num_classes=0)
    with pytest.raises(ArgumentError, match="'error' or 'drop', but got 'keep'"):
        ClassPrior.from_counts([1, 2], empty="keep")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="at least 1 image per class"):
        ClassPrior(torch.tensor([1, 0]), ("a", "b"), torch.arange(2))
    with pytest.raises(ArgumentError, match="kept"):
        ClassPrior(torch.tensor([1, 2]), ("a", "b"), torch.tensor([1, 1]))


def test_a_hundred_thousand_classes_are_instant() -> None:
    start = time.perf_counter()
    prior = ClassPrior.from_counts(np.arange(1, 100_001))
    prior.groups("thirds"), prior.groups("shot").sizes(), prior.effective_number_weights(), prior.log_prior
    assert time.perf_counter() - start < 2
    assert prior.imbalance_factor == 100_000


def test_effective_number_weights_against_exact_arithmetic() -> None:
    getcontext().prec = 60
    counts = [1, 2, 50, 5000, 10**6, 10**12]
    for beta in (0.0, 0.9, 0.9999, 1 - 1e-12):
        base = Decimal(beta)
        exact = [(1 - base) / (1 - base ** Decimal(n)) if beta else Decimal(1) for n in counts]
        want = [float(w * len(counts) / sum(exact)) for w in exact]
        got = effective_number_weights(counts, beta)
        assert got.dtype == torch.float64
        assert got.tolist() == pytest.approx(want, rel=1e-12)
    assert ClassPrior.from_counts([4, 2]).effective_number_weights(0.9).tolist() == pytest.approx(
        effective_number_weights([4, 2], 0.9).tolist()
    )


def test_effective_number_limits_and_errors() -> None:
    assert effective_number_weights([1000, 10, 1], 0).tolist() == [1, 1, 1]
    near_one = effective_number_weights([1000, 10, 1], 1 - 1e-13)
    assert (near_one * torch.tensor([1000.0, 10, 1])).tolist() == pytest.approx([float(near_one[2])] * 3, rel=1e-6)
    for beta in (1, 1.5, -0.1, float("nan"), "0.9", True):
        with pytest.raises(ArgumentError, match=r"beta: expected a number in \[0, 1\)"):
            effective_number_weights([2, 1], beta)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="numbers >= 1, but got 0 for class 1"):
        effective_number_weights([2, 0])


@pytest.mark.parametrize(
    ("factor", "classes", "thirds"),
    [
        (10, (69, 31, 0), (11638, 5498, 2437)),
        (50, (41, 41, 18), (9386, 2572, 650)),
        (100, (35, 35, 30), (8615, 1864, 368)),
        (200, (30, 31, 39), (7938, 1359, 205)),
    ],
)
def test_groups_of_the_usual_benchmarks(factor: int, classes: tuple[int, ...], thirds: tuple[int, ...]) -> None:
    prior = ClassPrior.from_counts(_cifar100_lt(factor))
    shot = prior.groups()
    assert tuple(shot.sizes().values()) == classes
    assert shot.names == ("many", "medium", "few")
    assert shot.rule == "many > 100, medium 20-100, few < 20 training images"
    third = prior.groups("thirds")
    assert third.sizes() == {"head": 33, "medium": 34, "tail": 33}
    assert tuple(int(prior.counts[third.members(g)].sum()) for g in third.names) == thirds
    assert "33/34/33 classes" in third.rule


def test_group_thresholds_are_inclusive_where_the_rule_says() -> None:
    prior = ClassPrior.from_counts([101, 100, 20, 19])
    assert prior.groups("shot").index.tolist() == [0, 1, 1, 2]
    own = prior.groups((50, 19))
    assert own.index.tolist() == [0, 0, 1, 1]
    assert own.rule == "many > 50, medium 19-50, few < 19 training images"
    assert prior.groups([50, 19]).rule == own.rule


def test_thirds_break_ties_by_class_index_and_follow_counts() -> None:
    assert ClassPrior.from_counts([5] * 10).groups("thirds").index.tolist() == [0] * 3 + [1] * 4 + [2] * 3
    assert ClassPrior.from_counts([1, 9, 1, 9, 5]).groups("thirds").index.tolist() == [2, 0, 2, 0, 1]


@given(st.integers(2, 2000))
@settings(max_examples=60, deadline=None)
def test_thirds_cover_every_class_evenly(K: int) -> None:
    groups = ClassPrior.from_counts(range(K, 0, -1)).groups("thirds")
    head, medium, tail = groups.sizes().values()
    assert head + medium + tail == K and head == tail
    assert abs(head - 0.33 * K) <= 0.5
    assert groups.index.tolist() == sorted(groups.index.tolist())


@pytest.mark.parametrize("rule", ["quarters", (20, 100), (100,), (100, 0), (100.5, 20), None])
def test_bad_rules_are_refused(rule: object) -> None:
    with pytest.raises(ArgumentError, match="rule"):
        ClassPrior.from_counts([3, 2]).groups(rule)  # type: ignore[arg-type]


def test_groups_by_name() -> None:
    prior = ClassPrior.from_counts([5, 5, 5], class_names=["a", "b", "c"])
    groups = prior.groups({"many": ["c"], "medium": [], "few": ["a", "b"]})
    assert groups.names == ("many", "medium", "few") and groups.index.tolist() == [2, 2, 0]
    for rule, words in (
        ({"x": ["a", "b"]}, "'c' is in none"),
        ({"x": ["a", "b", "c"], "y": ["a"]}, "'a' is in two groups"),
        ({"x": ["a", "b", "c", "d"]}, "'d' is no class of the data"),
        ({}, "'a' is in none"),
    ):
        with pytest.raises(ArgumentError, match=words):
            prior.groups(rule)


def test_mean_over_leaves_out_nan_and_says_none_for_an_empty_group() -> None:
    groups = ClassPrior.from_counts([300, 200, 50, 40]).groups()
    values = [0.5, float("nan"), 0.25, 0.75]
    assert groups.mean_over(values) == {"many": 0.5, "medium": 0.5, "few": None}
    assert groups.mean_over(torch.tensor(values)) == groups.mean_over(np.array(values))
    assert groups.mean_over([math.nan, math.nan, 0, 0]) == {"many": None, "medium": 0.0, "few": None}
    with pytest.raises(ArgumentError, match="one value per class"):
        groups.mean_over([1.0, 2.0])


def test_members_and_group_errors() -> None:
    groups = ClassGroups(("a", "b"), torch.tensor([1, 0, 1]), "by hand")
    assert groups.members("b").tolist() == [0, 2]
    assert groups.sizes() == {"a": 1, "b": 2}
    with pytest.raises(ArgumentError, match="one of the groups a, b, but got 'c'"):
        groups.members("c")
    with pytest.raises(ArgumentError, match=r"group numbers in 0\.\.1"):
        ClassGroups(("a", "b"), torch.tensor([0, 2]), "")
    with pytest.raises(ArgumentError, match="different group names"):
        ClassGroups(("a", "a"), torch.tensor([0, 1]), "")


def test_json_round_trips() -> None:
    prior = ClassPrior.from_counts([5, 0, 3], class_names=["ä", "b", "c"], empty="drop")
    again = ClassPrior.from_dict(json.loads(json.dumps(prior.as_dict())))
    assert again.as_dict() == prior.as_dict()
    assert again.kept.tolist() == [0, 2] and again.class_names == ("ä", "c")
    groups = prior.groups()
    back = ClassGroups.from_dict(json.loads(json.dumps(groups.as_dict())))
    assert back.as_dict() == groups.as_dict() and back.names == groups.names
    with pytest.raises(DataError, match="'kept'"):
        ClassPrior.from_dict({"counts": [1, 2], "class_names": ["a", "b"]})
    with pytest.raises(DataError, match="'rule'"):
        ClassGroups.from_dict({"names": ["a"], "index": [0]})
