"""ImageData and DataBundle: what they hold, what they refuse, and what their checksums see."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from krdistill.data import DataBundle, ImageData
from krdistill.errors import ArgumentError, DataError


def make(n: int = 12, K: int = 3, side: int = 5, channels: int = 3, seed: int = 0) -> ImageData:
    generator = np.random.RandomState(seed)
    images = generator.randint(0, 256, (n, side, side, channels)).astype(np.uint8)
    return ImageData.from_arrays(images, np.arange(n) % K, [f"class {k}" for k in range(K)], name="made")


def test_properties() -> None:
    data = ImageData(
        torch.zeros(4, 6, 7, 1, dtype=torch.uint8), torch.tensor([2, 0, 2, 2]), ("a", "b", "c"), ("w", "x", "y", "z")
    )
    assert (len(data), data.num_classes, data.image_size, data.channels) == (4, 3, (6, 7), 1)
    assert data.counts().tolist() == [1, 0, 3] and data.counts().dtype == torch.int64
    assert repr(data) == "ImageData('images', 4 images, 6x7x1, 3 classes)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.zeros(4, 6, 6, 1)}, "uint8 of shape .*got float32"),
        ({"inputs": torch.zeros(4, 6, 6, dtype=torch.uint8)}, "got uint8 of shape"),
        ({"inputs": torch.zeros(0, 6, 6, 1, dtype=torch.uint8)}, "at least one image"),
        ({"labels": torch.zeros(4)}, "int64 of shape"),
        ({"labels": torch.zeros(4, 1, dtype=torch.int64)}, "int64 of shape"),
        ({"labels": torch.tensor([0, 1, 2])}, "4 images, 3 labels and 4 ids"),
        ({"labels": torch.tensor([0, 1, 2, 3])}, "labels from 0 to 2 for 3 class names, got 0 to 3"),
        ({"labels": torch.tensor([0, -1, 2, 1])}, "got -1 to 2"),
        ({"ids": ("a",)}, "1 ids"),
        ({"class_names": ("a", "b", "a")}, "'a' twice"),
        ({"class_names": ("a", "", "b")}, "non-empty class names"),
        ({"class_names": ()}, "non-empty class names"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "inputs": torch.zeros(4, 6, 6, 1, dtype=torch.uint8),
        "labels": torch.tensor([0, 1, 2, 0]),
        "class_names": ("a", "b", "c"),
        "ids": ("1", "2", "3", "4"),
    }
    ImageData(**good)
    with pytest.raises(ArgumentError, match=message):
        ImageData(**{**good, **change})


def test_subset_by_rows_and_by_mask() -> None:
    data = make()
    rows = [7, 2, 2]
    for index in (rows, np.array(rows), torch.tensor(rows), torch.tensor(rows, dtype=torch.int32)):
        part = data.subset(index)
        assert torch.equal(part.images, data.images[rows]) and part.labels.tolist() == [1, 2, 2]
        assert part.ids == ("made/7", "made/2", "made/2") and part.class_names == data.class_names
    mask = data.labels == 1
    assert data.subset(mask).labels.tolist() == [1] * 4
    assert data.subset(mask.numpy()).ids == data.subset([1, 4, 7, 10]).ids


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([12], "rows from 0 to 11, got 12"),
        ([-1], "got -1"),
        ([], "non-empty"),
        ([0.5], "whole numbers"),
        ([[0, 1]], r"shape \(1, 2\)"),
        ([True, False], "mask over 12 rows, got 2"),
        ([False] * 12, "at least one of 12 rows, got none"),
    ],
)
def test_subset_refuses(index: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make().subset(index)


def test_keep_classes_relabels_in_order() -> None:
    data = make()
    part = data.keep_classes([0, 2])
    assert part.class_names == ("class 0", "class 2") and part.labels.tolist() == [0, 1] * 4
    assert part.ids == tuple(f"made/{i}" for i in range(12) if i % 3 != 1)
    assert torch.equal(part.images, data.images[data.labels != 1])
    assert data.keep_classes(torch.tensor([True, False, True])).checksum() == part.checksum()
    assert data.keep_classes([2, 0]).class_names == ("class 2", "class 0")
    assert data.keep_classes([0, 1, 2]) is data
    with pytest.raises(ArgumentError, match="every class once"):
        data.keep_classes([1, 1])
    with pytest.raises(ArgumentError, match="classes from 0 to 2, got 3"):
        data.keep_classes([3])
    with pytest.raises(ArgumentError, match="none of the 1 classes"):
        data.subset([0, 3]).keep_classes([1])


def test_checksum_sees_everything_and_nothing_else() -> None:
    data = make(n=9)
    same = make(n=9)
    assert data.checksum() == same.checksum() == data.checksum()
    strided = ImageData(data.images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), *_rest(data))
    assert not strided.images.is_contiguous() and strided.checksum() == data.checksum()
    pixel = data.images.clone()
    pixel[8, 4, 4, 2] ^= 1
    label = data.labels.clone()
    label[0] = 1
    sums = {
        data.checksum(),
        ImageData(pixel, *_rest(data)).checksum(),
        ImageData(data.images, label, data.class_names, data.ids).checksum(),
        ImageData(data.images, data.labels, ("class 0", "class 1", "class two"), data.ids).checksum(),
        ImageData(data.images, data.labels, data.class_names, (*data.ids[:8], "x")).checksum(),
        ImageData(
            data.images, data.labels, data.class_names, (data.ids[0] + data.ids[1], "", *data.ids[2:])
        ).checksum(),
        ImageData(data.images.reshape(9, 3, 5, 5), *_rest(data)).checksum(),
        data.subset([1, 0, *range(2, 9)]).checksum(),
    }
    assert len(sums) == 8


def _rest(data: ImageData) -> tuple[torch.Tensor, tuple[str, ...], tuple[str, ...]]:
    return data.labels, data.class_names, data.ids


def test_ids_of_any_file_name_can_be_hashed() -> None:
    odd = ImageData.from_arrays(np.zeros((2, 2, 2), np.uint8), [0, 1], ids=["caf\udce9.jpg", "a\nb"])
    assert len(odd.checksum()) == 64


def test_from_arrays_takes_numpy_and_torch_colour_and_grey() -> None:
    colour = np.random.RandomState(0).randint(0, 256, (6, 8, 9, 3)).astype(np.uint8)
    labels = [0, 1, 2, 0, 1, 2]
    data = ImageData.from_arrays(colour, labels)
    assert data.class_names == ("0", "1", "2") and data.ids[5] == "arrays/5" and (data.images.numpy() == colour).all()
    assert ImageData.from_arrays(torch.from_numpy(colour), torch.tensor(labels)).checksum() == data.checksum()
    for kind in (np.uint8, np.uint16, np.int32, np.uint64):
        assert ImageData.from_arrays(colour, np.array(labels, kind)).checksum() == data.checksum()
    grey = ImageData.from_arrays(colour[..., 0], labels)
    assert grey.channels == 1 and (grey.images.numpy()[..., 0] == colour[..., 0]).all()
    backwards = ImageData.from_arrays(colour[::-1], labels)
    assert (backwards.images[0].numpy() == colour[5]).all()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), [0, 1], "got float32 of shape .*multiply by 255"),
        (torch.zeros(2, 8, 8, 3), [0, 1], "Normalisation is the network's business"),
        (np.zeros((2, 8, 8, 3), np.int64), [0, 1], "got int64.*convert"),
        (np.zeros((2, 8), np.uint8), [0, 1], r"\(N, H, W, C\) or \(N, H, W\), got \(2, 8\)"),
        (np.zeros((2, 3, 8, 8), np.uint8), [0, 1], r"looks like \(N, C, H, W\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), [0], "1 for 2 images"),
        (np.zeros((2, 8, 8, 3), np.uint8), [0.0, 1.0], "class numbers"),
        (np.zeros((2, 8, 8, 3), np.uint8), [[1, 0], [0, 1]], "one-hot"),
        (np.zeros((2, 8, 8, 3), np.uint8), [True, False], "class numbers"),
        (np.zeros((2, 8, 8, 3), np.uint8), ["cat", "dog"], "array of numbers"),
        (np.zeros((2, 8, 8, 3), np.uint8), [0, -1], "got -1 to 0"),
        (np.zeros((0, 8, 8, 3), np.uint8), [], "at least one label"),
        (["a.png", "b.png"], [0, 1], "array of numbers"),
    ],
)
def test_from_arrays_refuses(images: Any, labels: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ImageData.from_arrays(images, labels)


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows: list[Any], classes: list[str] | None = None) -> None:
        self.rows = rows
        if classes:
            self.classes = classes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]


def test_from_dataset_takes_what_data_sets_give() -> None:
    pixels = np.random.RandomState(1).randint(0, 256, (4, 6, 7, 3)).astype(np.uint8)
    labels = [1, np.int64(0), torch.tensor(1), np.array(0)]
    kinds = [
        Image.fromarray(pixels[0]),
        pixels[1],
        torch.from_numpy(pixels[2]).permute(2, 0, 1),
        Image.fromarray(pixels[3]),
    ]
    data = ImageData.from_dataset(Rows(list(zip(kinds, labels, strict=True)), ["no", "yes"]), name="mixed")
    assert (data.images.numpy() == pixels).all() and data.labels.tolist() == [1, 0, 1, 0]
    assert data.class_names == ("no", "yes") and data.ids[3] == "mixed/3"
    named = ImageData.from_dataset(Rows([(pixels[0], 0), (pixels[1], 1)]), ["a", "b"])
    assert named.class_names == ("a", "b")


def test_from_dataset_grey() -> None:
    grey = np.random.RandomState(2).randint(0, 256, (3, 4, 4)).astype(np.uint8)
    data = ImageData.from_dataset(Rows([(Image.fromarray(g), i) for i, g in enumerate(grey)]))
    assert data.channels == 1 and (data.images[..., 0].numpy() == grey).all()
    colour = np.random.RandomState(3).randint(0, 256, (4, 4, 3)).astype(np.uint8)
    both = ImageData.from_dataset(Rows([(Image.fromarray(grey[0]), 0), (Image.fromarray(colour), 1)]))
    assert both.channels == 3 and all((both.images[0, ..., c].numpy() == grey[0]).all() for c in range(3))


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (iter([]), ArgumentError, "length and rows to index"),
        (Rows([]), DataError, "empty"),
        (Rows([np.zeros((4, 4))]), ArgumentError, r"give \(image, label\)"),
        (Rows([(torch.zeros(3, 4, 4), 0)]), ArgumentError, "without transforms such as ToTensor"),
        (Rows([("a.png", 0)]), ArgumentError, "PIL image, an array or a tensor"),
        (Rows([(np.zeros((4, 4), np.uint8), "cat")]), ArgumentError, "class number as label, got 'cat' at row 0"),
        (Rows([(np.zeros((4, 4), np.uint8), 0.5)]), ArgumentError, "got 0.5"),
        (Rows([(np.zeros((3, 4, 40), np.uint8), 0)]), ArgumentError, "channels last"),
        (
            Rows([(np.zeros((4, 4), np.uint8), 0), (np.zeros((4, 5), np.uint8), 0)]),
            DataError,
            r"one size, got 4x4 \(1\), 5x4 \(1\)",
        ),
        (Rows([(np.zeros((4, 4, 3), np.uint8), 0), (np.zeros((4, 4, 4), np.uint8), 0)]), DataError, "channels"),
        (Rows([(np.zeros((4, 4), np.uint8), 5)], ["a", "b"]), ArgumentError, "labels from 0 to 1"),
    ],
)
def test_from_dataset_refuses(dataset: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ImageData.from_dataset(dataset)


def test_bundle_records_its_split() -> None:
    train, test, val = make(), make(6, seed=1), make(3, seed=2)
    bundle = DataBundle(train, test, val, split={"profile": "none"})
    assert bundle.name == "made" and bundle.num_classes == 3 and bundle.class_names == train.class_names
    assert bundle.split["counts"] == {"train": [4, 4, 4], "val": [1, 1, 1], "test": [2, 2, 2]}
    assert bundle.split["profile"] == "none" and json.loads(json.dumps(bundle.split)) == bundle.split
    assert DataBundle(train, test).split["counts"]["val"] is None


def test_split_checksum_by_hand() -> None:
    """ids and labels of train, val, test: the bytes as documented, put together here by loops."""
    bundle = DataBundle(make(4, 2), make(2, 2, seed=1))
    stream = b""
    for texts, labels in (
        (["train", "made/0", "made/1", "made/2", "made/3"], [0, 1, 0, 1]),
        (["val"], []),
        (["test", "made/0", "made/1"], [0, 1]),
    ):
        stream += len(texts).to_bytes(8, "little")
        for text in texts:
            stream += len(text).to_bytes(8, "little") + text.encode()
        for label in labels:
            stream += label.to_bytes(8, "little")
    assert bundle.split["checksum"] == hashlib.sha256(stream).hexdigest()


def test_split_checksum_tells_splits_apart() -> None:
    train, test = make(), make(6, seed=1)
    sums = {
        DataBundle(train, test).split["checksum"],
        DataBundle(train.subset(range(11)), test).split["checksum"],
        DataBundle(train.subset([1, 0, *range(2, 12)]), test).split["checksum"],
        DataBundle(train.subset(range(9)), test, train.subset([9, 10, 11])).split["checksum"],
        DataBundle(test, train).split["checksum"],
    }
    assert len(sums) == 5


def test_bundle_refuses_parts_that_do_not_fit() -> None:
    train = make()
    other = ImageData(train.images, train.labels, ("class 0", "class 2", "class 1"), train.ids)
    with pytest.raises(ArgumentError, match="class 1 is 'class 1' there and 'class 2' here"):
        DataBundle(train, other)
    with pytest.raises(ArgumentError, match="there are 3 there and 2 here"):
        DataBundle(train, make(4, 2))
    with pytest.raises(ArgumentError, match=r"val images of shape \(5, 5, 3\) as in train, got \(6, 6, 3\)"):
        DataBundle(train, train, make(side=6))


def test_bundle_keep_classes() -> None:
    bundle = DataBundle(make(), make(6, seed=1), make(3, seed=2)).keep_classes([0, 2])
    assert bundle.class_names == ("class 0", "class 2") and bundle.split["kept_classes"] == ["class 0", "class 2"]
    assert bundle.split["counts"] == {"train": [4, 4], "val": [1, 1], "test": [2, 2]}
    assert bundle.test.labels.tolist() == [0, 1, 0, 1]


def test_bundle_from_arrays() -> None:
    x = np.zeros((4, 8, 8), np.uint8)
    bundle = DataBundle.from_arrays(x, [0, 0, 1, 1], x[:2], [2, 0], name="mine")
    assert bundle.num_classes == 3 and bundle.train.counts().tolist() == [2, 2, 0] and bundle.name == "mine"
    assert bundle.train.ids[0] == "train/0" and bundle.test.ids[1] == "test/1" and bundle.split["source"] == "mine"
    with pytest.raises(ArgumentError, match="test_labels as test_images, got 3 and 2"):
        DataBundle.from_arrays(x, [0, 0, 1, 1], x[:2], [0, 1, 1])
    with pytest.raises(ArgumentError, match="train_images to be uint8"):
        DataBundle.from_arrays(x / 255, [0, 0, 1, 1], x[:2], [0, 1])
    with pytest.raises(ArgumentError, match="labels from 0 to 1"):
        DataBundle.from_arrays(x, [0, 0, 1, 2], x[:2], [0, 1], ["a", "b"])
