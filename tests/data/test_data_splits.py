"""The cut and the validation part, on real data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from krdistill.data import (
    DataBundle,
    ImageData,
    LoadedImages,
    carve_validation,
    cut_long_tail,
    load_data,
    long_tail_counts,
)
from krdistill.data.selection import choose
from krdistill.errors import ArgumentError, DataError


def plain(counts: list[int], name: str = "made") -> ImageData:
    labels = np.repeat(np.arange(len(counts)), counts)
    images = (np.arange(len(labels))[:, None, None] % 256 * np.ones((1, 4, 4))).astype(np.uint8)
    return ImageData.from_arrays(images, labels, [f"c{k}" for k in range(len(counts))], name=name)


@pytest.mark.parametrize(("factor", "total"), [(10, 19573), (100, 10847)])
def test_cifar100_lt(cifar100: LoadedImages, factor: float, total: int) -> None:
    train = cut_long_tail(cifar100.train, "exp", factor)
    assert len(train) == total and train.counts().tolist() == long_tail_counts(100, 500, factor)
    rows = [int(i.removeprefix("train/")) for i in train.ids]
    assert torch.equal(train.images, cifar100.train.images[rows])
    assert torch.equal(train.labels, cifar100.train.labels[rows])
    assert train.labels.tolist() == sorted(train.labels.tolist())


def test_cifar100_lt_through_the_front_door(cifar100_root: Path, cifar100: LoadedImages) -> None:
    bundle = load_data("cifar100", root=cifar100_root, profile="exp", imbalance_factor=100)
    rows = np.array([int(i.removeprefix("train/")) for i in bundle.train.ids])
    assert hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest() == (
        "e0d58a4d2700c46062da852554e5d185bbee74d3c612b052ea2a839bdadf939e"
    )
    assert bundle.test.checksum() == cifar100.test.checksum()
    assert (bundle.split["n_max"], bundle.split["seed"], bundle.split["source"]) == (500, 0, "cifar100")


def test_split_is_recorded_in_full() -> None:
    options = {"profile": "exp", "imbalance_factor": 8, "n_max": 80, "seed": 3, "val_fraction": 0.2, "image_size": 16}
    bundle = load_data("digits", **options)
    split = bundle.split
    assert {k: split[k] for k in options} == options
    assert (split["source"], split["name"], split["num_classes"], split["notes"]) == ("digits", "digits", 10, [])
    assert bundle.val is not None and bundle.train.image_size == bundle.val.image_size == (16, 16)
    together = (bundle.train.counts() + bundle.val.counts()).tolist()
    assert together == long_tail_counts(10, 80, 8) and split["counts"]["test"] == [50] * 10
    assert json.loads(json.dumps(split)) == split
    again = {
        k: split[k] for k in ("source", "profile", "imbalance_factor", "n_max", "seed", "val_fraction", "image_size")
    }
    assert load_data(**again).split == split


def test_every_argument_that_should_move_the_split_does() -> None:
    base = {"profile": "exp", "imbalance_factor": 10.0, "val_fraction": 0.2}
    changes: list[dict[str, object]] = [
        {},
        {"profile": "step"},
        {"profile": "pareto"},
        {"imbalance_factor": 20.0},
        {"n_max": 100},
        {"seed": 1},
        {"seed": 1, "val_fraction": 0.0},
        {"val_fraction": 0.0},
        {"val_fraction": 0.3},
        {"val_fraction": 0.0, "val_per_class": 2},
        {"test_seed": 1},
    ]
    sums = [load_data("digits", **{**base, **change}).split["checksum"] for change in changes]
    assert len(set(sums)) == len(sums)
    assert load_data("digits", **base, image_size=16).split["checksum"] == sums[0]


def test_the_seed_is_of_the_cut_and_of_the_validation_part() -> None:
    for options in ({"profile": "exp", "imbalance_factor": 10.0}, {"val_fraction": 0.2}, {"val_per_class": 5}):
        parts = [load_data("digits", seed=seed, **options) for seed in (0, 0, 1)]
        assert parts[0].train.ids == parts[1].train.ids != parts[2].train.ids
        assert parts[0].test.ids == parts[2].test.ids


def test_the_global_generators_are_left_alone() -> None:
    np.random.seed(5)
    torch.manual_seed(5)
    expected = (np.random.rand(), torch.rand(1).item())
    np.random.seed(5)
    torch.manual_seed(5)
    load_data("digits", profile="exp", imbalance_factor=10, val_fraction=0.1)
    assert (np.random.rand(), torch.rand(1).item()) == expected


def test_uncut_is_untouched() -> None:
    bundle = load_data("digits")
    assert len(bundle.train) == 1297 and bundle.val is None and bundle.split["n_max"] is None
    data = plain([5, 3, 9])
    assert cut_long_tail(data, "none", 1) is data


def test_n_max_by_default_is_what_every_class_can_supply() -> None:
    data = plain([90, 110, 100, 95])
    assert cut_long_tail(data, "exp", 10).counts().tolist() == long_tail_counts(4, 90, 10)
    assert cut_long_tail(data, "exp", 1).counts().tolist() == [90] * 4
    assert cut_long_tail(plain([110, 60, 60, 60]), "step", 10, n_max=60).counts().tolist() == [60, 60, 6, 6]


def test_a_cut_of_long_tailed_data_is_explained() -> None:
    tailed = plain(long_tail_counts(5, 100, 20))
    with pytest.raises(
        DataError, match=r"made is not balanced, classes have from 5 \(c4\) to 100 images.*profile 'none'"
    ):
        cut_long_tail(tailed, "exp", 10)
    with pytest.raises(DataError, match=r"class c1 \(56 asked for, 47 there\).*every class can supply is 59"):
        cut_long_tail(tailed, "exp", 10, n_max=100)
    assert cut_long_tail(tailed, "exp", 10, n_max=59).counts().tolist() == long_tail_counts(5, 59, 10)
    with pytest.raises(DataError, match="every class can supply is 8"):
        cut_long_tail(plain([8, 50, 50]), "exp", 8, n_max=20)
    with pytest.raises(DataError, match="no n_max can be supplied"):
        cut_long_tail(plain([8, 50, 50]), "exp", 10, n_max=20)


def test_cuts_that_cannot_be() -> None:
    with pytest.raises(DataError, match=r"from 10 \(c0\) to 12 images, too few for an imbalance factor of 50"):
        cut_long_tail(plain([10, 12]), "exp", 50)
    with pytest.raises(ArgumentError, match="write 100"):
        load_data("digits", profile="exp", imbalance_factor=0.01)
    with pytest.raises(ArgumentError, match="cuts nothing"):
        load_data("digits", imbalance_factor=10)
    with pytest.raises(ArgumentError, match="n_max 50 has no effect; profile 'exp' with imbalance factor 1"):
        load_data("digits", n_max=50)
    with pytest.raises(ArgumentError, match="exp, step, pareto"):
        load_data("digits", profile="zipf")


def test_validation_is_stratified_and_leaves_an_image() -> None:
    data = plain([100, 50, 7, 2, 1])
    train, val = carve_validation(data, 0.1)
    assert val.counts().tolist() == [10, 5, 1, 0, 0] and train.counts().tolist() == [90, 45, 6, 2, 1]
    assert sorted((*train.ids, *val.ids)) == sorted(data.ids) and not set(train.ids) & set(val.ids)
    train, val = carve_validation(data, 0.9)
    assert val.counts().tolist() == [90, 45, 6, 1, 0] and train.counts().tolist() == [10, 5, 1, 1, 1]
    for part in (train, val):  # rows stay together
        assert all((part.images[i] == int(part.ids[i].split("/")[1]) % 256).all() for i in range(len(part)))


def test_balanced_validation() -> None:
    train, val = carve_validation(plain([100, 50, 7]), per_class=6)
    assert val.counts().tolist() == [6, 6, 6] and train.counts().tolist() == [94, 44, 1]
    with pytest.raises(DataError, match=r"nothing to train on in c2 \(7\)\. Use at most 6 per class"):
        carve_validation(plain([100, 50, 7]), per_class=7)


def test_validation_refuses() -> None:
    with pytest.raises(DataError, match="is none; use a larger val_fraction"):
        carve_validation(plain([4, 4]), 0.1)
    with pytest.raises(ArgumentError, match="got neither"):
        carve_validation(plain([4, 4]))
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(ArgumentError, match="at least 0 and below 1"):
            load_data("digits", val_fraction=fraction)
    for number in (0, -2, 1.5):
        with pytest.raises(ArgumentError, match="val_per_class"):
            load_data("digits", val_per_class=number)
    with pytest.raises(ArgumentError, match="either val_fraction or val_per_class"):
        load_data("digits", val_fraction=0.1, val_per_class=2)


def test_choice_depends_on_seed_purpose_and_id_alone() -> None:
    data = plain([60, 40])
    chosen = choose(data, [10, 5], 0, "test")
    assert torch.bincount(data.labels[chosen]).tolist() == [10, 5]
    order = torch.from_numpy(np.random.RandomState(0).permutation(100))
    shuffled = choose(data.subset(order), [10, 5], 0, "test")
    assert torch.equal(shuffled, chosen[order])
    smaller = choose(data, [9, 5], 0, "test")
    assert (chosen | smaller).equal(chosen)  # one fewer is the same ones but one
    assert not torch.equal(choose(data, [10, 5], 1, "test"), chosen)
    assert not torch.equal(choose(data, [10, 5], 0, "validation"), chosen)
    assert not choose(data, [0, 0], 0, "test").any()


def test_choice_is_fair() -> None:
    """Over many seeds, every image is chosen about equally often."""
    data = plain([20])
    times = torch.stack([choose(data, [5], seed, "test") for seed in range(800)]).sum(0).numpy()
    # 200 expected, standard deviation 12.2: five of them
    assert np.abs(times - 200).max() < 62


def test_own_arrays_can_be_cut_too() -> None:
    data = plain([40] * 4)
    train, val = carve_validation(cut_long_tail(data, "exp", 8), 0.25)
    bundle = DataBundle(train, data, val)
    assert (np.array(bundle.split["counts"]["train"]) + bundle.split["counts"]["val"]).tolist() == [40, 20, 10, 5]
