"""Counts and indices of long-tailed cuts, against the published splits."""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from krdistill.data import largest_n_max, long_tail_counts, long_tail_indices
from krdistill.errors import ArgumentError, DataError


@pytest.mark.parametrize(
    ("K", "n_max", "factor", "total", "smallest"),
    [
        (100, 500, 5, 24856, 100),
        (100, 500, 10, 19573, 50),
        (100, 500, 20, 15907, 25),
        (100, 500, 50, 12608, 10),
        (100, 500, 100, 10847, 5),
        (100, 500, 200, 9502, 2),
        (10, 5000, 10, 20431, 500),
        (10, 5000, 50, 13996, 100),
        (10, 5000, 100, 12406, 50),
        (10, 5000, 200, 11203, 25),
        (200, 500, 10, 39072, 50),
        (200, 500, 20, 31711, 25),
        (200, 500, 100, 21549, 5),
    ],
)
def test_exponential_counts_are_the_published_ones(
    K: int, n_max: int, factor: float, total: int, smallest: int
) -> None:
    counts = long_tail_counts(K, n_max, factor, "exp")
    assert (len(counts), sum(counts), counts[0], counts[-1]) == (K, total, n_max, smallest)


def test_step_by_hand() -> None:
    assert long_tail_counts(4, 100, 10, "step") == [100, 100, 10, 10]
    assert long_tail_counts(5, 100, 8, "step") == [100, 100, 12, 12, 12]


def test_none_is_level() -> None:
    assert long_tail_counts(3, 7, 1, "none") == [7, 7, 7]


def test_pareto_is_the_shape_of_imagenet_lt() -> None:
    """Class sizes of ImageNet-LT (Liu et al., 2019), sorted, at eleven ranks."""
    ranks = [0, 9, 24, 49, 99, 199, 332, 499, 749, 899, 999]
    published = [1280, 683, 481, 367, 272, 169, 116, 73, 33, 15, 5]
    counts = long_tail_counts(1000, 1280, 256, "pareto")
    ours = np.array([counts[r] for r in ranks])
    assert ours[0] == 1280 and ours[-1] == 5
    assert np.abs(np.log(ours / np.array(published))).max() < 0.15
    exponential = np.array([long_tail_counts(1000, 1280, 256, "exp")[r] for r in ranks])
    assert np.abs(np.log(exponential / np.array(published))).max() > 0.5  # the test can tell profiles apart


@pytest.mark.parametrize("profile", ["exp", "step", "pareto"])
@given(
    K=st.integers(1, 300),
    n_max=st.integers(1, 5000),
    share=st.floats(0, 1, allow_nan=False),
)
def test_counts_fall_and_keep_their_ends(profile: str, K: int, n_max: int, share: float) -> None:
    factor = 1 + share * (n_max - 1)
    counts = long_tail_counts(K, n_max, factor, profile)
    assert len(counts) == K and counts[0] == n_max and min(counts) >= 1
    assert all(a >= b for a, b in pairwise(counts))
    if K > 1:
        assert abs(counts[-1] - n_max / factor) <= 1


def test_factor_equal_to_n_max_leaves_one_image() -> None:
    assert int(49 * (1 / 49)) == 0  # the floating-point trap
    assert long_tail_counts(7, 49, 49, "exp")[-1] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 500, 0.01), "where a paper writes 0.01, write 100"),
        ((10, 500, 0), "at least 1, got 0"),
        ((10, 500, -3), "at least 1, got -3"),
        ((10, 500, math.nan), "got nan"),
        ((10, 500, math.inf), "got inf"),
        ((10, 500, "10"), "to be a number"),
        ((10, 50, 100), "smallest class would have 0.5 images.*n_max of at least 100"),
        ((10, 0, 1), "n_max to be a whole number"),
        ((10, 50.5, 1), "n_max to be a whole number"),
        ((0, 500, 10), "num_classes"),
        ((10, 500, 10, "linear"), "exp, step, pareto"),
        ((10, 500, 10, "none"), "cuts nothing"),
    ],
)
def test_counts_refuse(arguments: tuple, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        long_tail_counts(*arguments)


# sha256 of the int64 row numbers of the CIFAR-100-LT index files in use since LDAM-DRW, seed 0.
GOLDEN = {
    10: "b4fbf1bf0a7f33381467493f50b953ce21b03a2b6d45b0d5e8da5d95d9ffd736",
    20: "1410f105fffda31596c5af26b044a4545124854811b80ec57538a067be3420e4",
    50: "561fa940cc7d3551d441643e310c7e439bf84f86b7863a3f7364963522d2984a",
    100: "e0d58a4d2700c46062da852554e5d185bbee74d3c612b052ea2a839bdadf939e",
    200: "2f00ccd33da379d5e64ce9442512a16e9e1eb3f1bb3a90316aac08c69a441157",
}


@pytest.mark.parametrize("factor", sorted(GOLDEN))
def test_indices_are_the_canonical_cifar100_lt(cifar100, factor: int) -> None:
    labels = cifar100.train.labels.numpy()
    rows = long_tail_indices(labels, long_tail_counts(100, 500, factor))
    assert hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest() == GOLDEN[factor]


def test_indices_leave_the_global_generator_alone() -> None:
    np.random.seed(7)
    before = np.random.get_state()[1].copy()
    long_tail_indices(np.arange(100) % 10, [3] * 10)
    assert (np.random.get_state()[1] == before).all()


def test_indices_equal_the_global_recipe() -> None:
    """The field's code seeds NumPy's global generator and shuffles class by class."""
    labels = np.random.RandomState(3).randint(0, 5, 400)
    counts = [40, 30, 20, 10, 0]
    state = np.random.get_state()
    try:
        np.random.seed(11)
        expected = []
        for k, count in enumerate(counts):
            rows = np.where(labels == k)[0]
            np.random.shuffle(rows)
            expected.extend(rows[:count].tolist())
    finally:
        np.random.set_state(state)
    assert long_tail_indices(labels, counts, seed=11).tolist() == expected
    assert long_tail_indices(labels, counts, seed=12).tolist() != expected


def test_smaller_cuts_are_nested() -> None:
    labels = np.repeat(np.arange(10), 200)
    larger = set(long_tail_indices(labels, long_tail_counts(10, 200, 10)).tolist())
    assert set(long_tail_indices(labels, long_tail_counts(10, 200, 100)).tolist()) < larger


def test_indices_refuse() -> None:
    labels = np.array([0, 0, 1, 2])
    with pytest.raises(DataError, match=r"class dog \(3 asked for, 1 there\)\."):
        long_tail_indices(labels, [2, 3, 1], class_names=["cat", "dog", "eel"])
    with pytest.raises(DataError, match=r"class 1 \(3 asked for, 1 there\)"):
        long_tail_indices(labels, [2, 3, 1])
    with pytest.raises(ArgumentError, match="labels from 0 to 1, got 0 to 2"):
        long_tail_indices(labels, [1, 1])
    with pytest.raises(ArgumentError, match="whole numbers"):
        long_tail_indices(labels.astype(float), [1, 1, 1])
    with pytest.raises(ArgumentError, match="none negative"):
        long_tail_indices(labels, [1, -1, 1])
    with pytest.raises(ArgumentError, match="seed"):
        long_tail_indices(labels, [1, 1, 1], seed=-1)


@given(
    available=st.lists(st.integers(0, 300), min_size=1, max_size=12),
    factor=st.floats(1, 60),
    profile=st.sampled_from(["exp", "step", "pareto"]),
)
def test_largest_n_max_by_trying_all(available: list[int], factor: float, profile: str) -> None:
    best = 0
    for n_max in range(1, max(available) + 1):
        try:
            counts = long_tail_counts(len(available), n_max, factor, profile)
        except ArgumentError:
            continue
        if all(c <= a for c, a in zip(counts, available, strict=True)):
            best = n_max
    assert largest_n_max(available, factor, profile) == best
