"""Near-duplicates, and splits that keep together what belongs together."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from krdistill.data import ImageData, carve_validation, load_data, load_images
from krdistill.data.duplicates import (
    TOLERANCE,
    difference_hashes,
    exact_duplicates,
    near_duplicates,
    picture_hashes,
    thumbnails,
)
from krdistill.data.selection import lot
from krdistill.errors import ArgumentError, DataError


def scene(seed: int, side: int = 72) -> Image.Image:
    """A smooth random picture: what photographs are at 9 x 8 pixels."""
    blocks = np.random.RandomState(seed).randint(0, 256, (9, 9, 3)).astype(np.uint8)
    return Image.fromarray(blocks).resize((side, side), Image.Resampling.BICUBIC)


def test_thumbnails_are_means_over_areas() -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (3, 24, 36, 1)).astype(np.uint8)
    expected = pixels.reshape(3, 8, 3, 9, 4).astype(float).mean((2, 4))
    assert np.abs(thumbnails(pixels) - expected).max() <= 0.51
    odd = np.random.RandomState(1).randint(0, 256, (1, 11, 13, 3)).astype(np.uint8)
    grey = odd[0] @ np.array([0.299, 0.587, 0.114])
    fine = grey.repeat(8, 0).repeat(9, 1).reshape(8, 11, 9, 13).mean((1, 3))  # every area is whole small pixels
    assert np.abs(thumbnails(odd)[0] - fine).max() <= 0.51


def test_hash_is_the_definition() -> None:
    thumbs = np.random.RandomState(0).randint(0, 256, (20, 8, 9)).astype(np.uint8)
    for thumb, value in zip(thumbs, difference_hashes(thumbs).tolist(), strict=True):
        bits = "".join("1" if thumb[i, j + 1] > thumb[i, j] else "0" for i in range(8) for j in range(8))
        assert value == int(bits, 2)


@pytest.mark.parametrize("threshold", [0, 3, 7])
def test_clusters_are_those_of_all_pairs(threshold: int) -> None:
    draw = np.random.RandomState(threshold)
    base = draw.randint(0, 256, (40, 8, 9))
    noisy = [(b + draw.randint(-30, 31, b.shape)).clip(0, 255) for b in base for _ in range(5)]
    thumbs = np.concatenate([np.array(noisy), np.full((3, 8, 9), 9), np.full((3, 8, 9), 200)]).astype(np.uint8)
    thumbs = thumbs[draw.permutation(len(thumbs))]
    hashes = difference_hashes(thumbs)
    N = len(thumbs)
    which = list(range(N))
    for i in range(N):
        for j in range(i):
            bits = bin(int(hashes[i]) ^ int(hashes[j])).count("1")
            if bits <= threshold and np.abs(thumbs[i].astype(int) - thumbs[j]).mean() <= TOLERANCE:
                old, new = max(which[i], which[j]), min(which[i], which[j])
                which = [new if w == old else w for w in which]
    ours = near_duplicates(hashes, thumbs, threshold=threshold)
    assert ours.tolist() == which
    assert sorted(Counter(which).values())[-1] >= 3  # the flat ones, black and white apart


def test_copies_are_found_and_others_are_not(tmp_path: Path) -> None:
    kinds = []
    for seed in range(30):
        picture = scene(seed)
        picture.save(tmp_path / "a.jpg", quality=40)
        kinds += [picture, Image.open(tmp_path / "a.jpg").convert("RGB"), picture.resize((64, 64)).resize((72, 72))]
        kinds += [picture.filter(ImageFilter.GaussianBlur(1)), picture.point(lambda v: min(255, v + 6))]
    images = torch.from_numpy(np.stack([np.asarray(k) for k in kinds]))
    which = near_duplicates(*picture_hashes(images))
    assert which.tolist() == [5 * (i // 5) for i in range(150)]


def test_exact_duplicates() -> None:
    digests = np.array([[1, 2], [3, 4], [1, 2], [5, 6], [3, 4], [1, 2]], np.uint8)
    assert exact_duplicates(digests).tolist() == [0, 1, 0, 3, 1, 0]


def test_the_known_copies_of_tiny_imagenet(tiny_imagenet_root: Path) -> None:
    """Its documented flaw: copies between training and validation images, found among a third of the classes."""
    folder = tiny_imagenet_root / "tiny-imagenet-200"
    files = sorted((folder / "train" / "n01855672" / "images").glob("*.JPEG"))
    files += [folder / "val" / "images" / f"val_{i}.JPEG" for i in range(2000, 2400)]
    pixels = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files])
    which = near_duplicates(*picture_hashes(torch.from_numpy(pixels)))
    pairs = [(files[j].name, files[i].name) for i, j in enumerate(which.tolist()) if i != j]
    assert pairs == [("n01855672_44.JPEG", "val_2157.JPEG")]


# Splits ---------------------------------------------------------------------------------------------------------------


def patients(seed: int = 0) -> tuple[torch.Tensor, list[str], list[str]]:
    """Labels, ids and units: 60 patients with 1 to 12 images of one to three of 6 classes."""
    draw = np.random.RandomState(seed)
    labels, units = [], []
    for p in range(60):
        own = draw.choice(6, draw.randint(1, 4), replace=False, p=[0.4, 0.2, 0.15, 0.1, 0.1, 0.05])
        for _ in range(draw.randint(1, 13)):
            labels.append(int(draw.choice(own)))
            units.append(f"patient {p}")
    return torch.tensor(labels), [f"{i}" for i in range(len(labels))], units


@pytest.mark.parametrize("seed", range(8))
def test_no_unit_on_both_sides_and_every_class_on_both(seed: int) -> None:
    labels, ids, units = patients(seed)
    counts = torch.bincount(labels, minlength=6)
    wanted = (counts // 4).tolist()
    chosen = lot(labels, ids, wanted, seed, "test", units)
    sides = [{u for u, c in zip(units, chosen.tolist(), strict=True) if c is side} for side in (True, False)]
    assert not sides[0] & sides[1]
    got = torch.bincount(labels[chosen], minlength=6)
    assert (got > 0).all() and (got < counts).all()
    assert 0.5 * sum(wanted) <= int(got.sum()) <= 1.5 * sum(wanted)
    shuffled = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    again = lot(labels[shuffled], [ids[i] for i in shuffled], wanted, seed, "test", [units[i] for i in shuffled])
    assert (again == chosen[shuffled]).all()


def test_units_of_one_image_change_nothing() -> None:
    labels, ids, _ = patients()
    wanted = (torch.bincount(labels) // 3).tolist()
    assert (lot(labels, ids, wanted, 1, "test", ids) == lot(labels, ids, wanted, 1, "test")).all()


def test_a_class_of_one_patient_stays_in_training() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    units = ["a", "b", "c", "d", "e", "e", "e"]
    chosen = lot(labels, [str(i) for i in range(7)], [1, 1], 0, "test", units)
    assert int(chosen[:4].sum()) == 1 and not chosen[4:].any()


def manifest(tmp_path: Path, split: bool = False) -> Path:
    """12 patients with 4 images each of two classes."""
    rows = [["path", "label", "group", *(["split"] if split else [])]]
    for p in range(12):
        for i in range(4):
            scene(100 * p + i, 16).save(tmp_path / f"{p}-{i}.png")
            rows.append(
                [f"{p}-{i}.png", "ab"[p % 2], f"p{p}", *([("train", "test")[i == 3 and p == 5]] if split else [])]
            )
    with (tmp_path / "m.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return tmp_path / "m.csv"


def test_split_by_group_from_a_manifest(tmp_path: Path) -> None:
    file = manifest(tmp_path)
    assert load_images(file).train.units is None
    bundle = load_data(file, split_by="group", val_fraction=0.2)
    assert bundle.val is not None and bundle.split["split_by"] == "group"
    owners = [set(part.units or ()) for part in (bundle.train, bundle.val, bundle.test)]
    assert not owners[0] & owners[1] and not owners[0] & owners[2] and not owners[1] & owners[2]
    assert set().union(*owners) == {f"p{p}" for p in range(12)}
    assert all((part.counts() > 0).all() for part in (bundle.train, bundle.val, bundle.test))
    plain = load_images(file)
    mixed = {i.split("-")[0] for i in plain.train.ids} & {i.split("-")[0] for i in plain.test.ids}
    assert mixed  # without it, patients are on both sides


def test_groups_that_cannot_be_kept(tmp_path: Path) -> None:
    file = manifest(tmp_path, split=True)
    with pytest.raises(DataError, match=r"1 groups lie in train and in test: p5\. Move each to one part"):
        load_images(file, split_by="group")
    assert len(load_images(file).test) == 1
    text = file.read_text().replace(",p3,", ",,")
    file.write_text(text)
    with pytest.raises(DataError, match=r"4 images of train have no group: 3-0.png"):
        load_images(file, split_by="group")
    with pytest.raises(DataError, match=r"digits names no groups, .*column 'group'"):
        load_images("digits", split_by="group")
    with pytest.raises(ArgumentError, match="Expected split_by"):
        load_images("digits", split_by="patient")  # type: ignore[arg-type]


def test_split_by_duplicates(tmp_path: Path) -> None:
    for k, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        for i in range(10):
            for copy, quality in enumerate((95, 60)):
                scene(100 * k + i).save(tmp_path / name / f"{i}-{copy}.jpg", quality=quality)
    train, test, _, notes = load_images(tmp_path, split_by="duplicates")
    pictures = [{i.rpartition("-")[0] for i in part.ids} for part in (train, test)]
    assert not pictures[0] & pictures[1] and len(pictures[1]) == len(test) // 2 and (test.counts() > 0).all()
    assert "4 of 40 images" in notes[0] or "8 of 40 images" in notes[0]
    plain = load_images(tmp_path)
    assert {i.rpartition("-")[0] for i in plain.train.ids} & {i.rpartition("-")[0] for i in plain.test.ids}


def test_duplicates_across_given_parts_are_noted(tmp_path: Path) -> None:
    for part, seeds in (("train", range(8)), ("test", (6, 20, 21, 5))):
        for i, seed in enumerate(seeds):
            path = tmp_path / part / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            scene(seed).save(path)
    notes = load_images(tmp_path, split_by="duplicates").notes
    assert notes == ("2 images with near-duplicates in train and in test: train/a/6.png, train/b/5.png",)


def test_units_are_kept_by_subsets_and_checked() -> None:
    labels, ids, units = patients()
    images = torch.zeros(len(ids), 2, 2, 1, dtype=torch.uint8)
    data = ImageData(images, labels, tuple("abcdef"), tuple(ids), "x", tuple(units))
    assert data.subset([3, 1]).units == (units[3], units[1])
    kept = data.keep_classes([0, 2])
    assert kept.units == tuple(u for u, y in zip(units, labels.tolist(), strict=True) if y in (0, 2))
    train, val = carve_validation(data, 0.25)
    assert not set(train.units or ()) & set(val.units or ())
    with pytest.raises(ArgumentError, match="as many units as images"):
        ImageData(images, labels, tuple("abcdef"), tuple(ids), "x", ("a",))
