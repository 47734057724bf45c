"""NumPy archives and saved Hugging Face data sets."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from krdistill.data import load_data, load_images
from krdistill.errors import ArgumentError, DataError, MissingDependencyError


def arrays(N: int = 30, K: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.RandomState(seed)
    return draw.randint(0, 256, (N, 9, 8, 3)).astype(np.uint8), np.arange(N) % K


def test_archive_with_parts(tmp_path: Path) -> None:
    x, y = arrays()
    u, v = arrays(6, seed=1)
    np.savez(tmp_path / "a.npz", images=x, labels=y, class_names=["x", "y", "z"], test_images=u, test_labels=v, note=1)
    train, test, val, notes = load_images(tmp_path / "a.npz")
    assert (train.images.numpy() == x).all() and (train.labels.numpy() == y).all() and val is None
    assert (test.images.numpy() == u).all() and test.ids[2] == "test/2" and train.class_names == ("x", "y", "z")
    assert notes == ("arrays that were passed over: note",)
    assert load_images(str(tmp_path / "a.npz"), image_size=4).test.image_size == (4, 4)
    with pytest.raises(ArgumentError, match="test_fraction does not apply"):
        load_images(tmp_path / "a.npz", test_fraction=0.5)
    with pytest.raises(ArgumentError, match="cache 'always' does not apply"):
        load_images(tmp_path / "a.npz", cache="always")


def test_archive_without_test_part_and_a_class_with_one_image(tmp_path: Path) -> None:
    x, y = arrays()
    y[-1] = 3
    np.savez_compressed(tmp_path / "a.npz", images=x[..., 0], labels=y.astype(np.uint8))
    bundle = load_data(tmp_path / "a.npz", test_fraction=0.4)
    assert bundle.class_names == ("0", "1", "2", "3") and bundle.train.channels == 1
    assert bundle.split["counts"] == {"train": [7, 7, 6, 1], "val": None, "test": [3, 3, 3, 0]}


def test_the_keys_of_medmnist(tmp_path: Path) -> None:
    x, y = arrays()
    parts = {f"{p}_images": x[i::3] for i, p in enumerate(("train", "val", "test"))}
    labels = {f"{p}_labels": y[:10, None] for p in ("train", "val", "test")}
    np.savez(tmp_path / "m.npz", **parts, **labels)
    train, test, val, _ = load_images(tmp_path / "m.npz")
    assert val is not None and (train.images.numpy() == x[::3]).all() and (test.images.numpy() == x[2::3]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "labels not among images"),
        ({"images": None}, "images not among labels"),
        ({"images": np.zeros((30, 8, 8, 3))}, "uint8 pixels from 0 to 255"),
        ({"labels": np.arange(29)}, "as many labels as images, got 29 for 30"),
        ({"labels": np.zeros((30, 14), int)}, r"shape \(N,\), got \(30, 14\)"),
        ({"labels": np.array(["a"] * 30)}, "expected labels as whole numbers, got <U1"),
        ({"labels": np.array([{}] * 30)}, "holds Python objects, which are not loaded"),
        ({"class_names": np.array(["a"])}, "Expected labels from 0 to 0 for 1 class names"),
        ({"class_names": np.arange(3)}, "expected class_names as texts"),
        ({"test_images": np.zeros((2, 9, 8, 3), np.uint8)}, "test_images without test_labels"),
        (
            {"test_images": np.zeros((2, 9, 8, 3), np.uint8), "test_labels": np.array([0, 5])},
            "1 labels of test are not in train: 5",
        ),
    ],
)
def test_archives_that_cannot_be_used(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    x, y = arrays()
    content = {k: v for k, v in {"images": x, "labels": y, **change}.items() if v is not None}
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(DataError, match=message):
        load_images(tmp_path / "a.npz")


def test_files_that_are_no_archives(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("text")
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    np.savez(tmp_path / "cut.npz", images=arrays()[0], labels=arrays()[1])
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:2000])
    for name, message in (
        ("text", "text.npz "),
        ("one", "holds a single array"),
        ("cut", "damaged"),
        ("no", "not there"),
    ):
        with pytest.raises(DataError, match=message):
            load_images(tmp_path / f"{name}.npz")


def test_no_library_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text("{}")
    try:
        import datasets  # noqa: F401
    except ImportError:
        with pytest.raises(MissingDependencyError, match=r"pip install 'krdistill\[datasets\]'"):
            load_images(tmp_path)
    else:
        with pytest.raises(DataError):
            load_images(tmp_path)


def encoded(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def test_saved_hugging_face_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    x, y = arrays()
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["x", "y", "z"]),
            "group": datasets.Value("string"),
        }
    )
    rows = {
        "image": [{"bytes": encoded(i), "path": None} for i in x],
        "label": y.tolist(),
        "group": [f"g{i // 5}" for i in range(30)],
    }
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(str(tmp_path / "one"))
    train, test, *_ = load_images(tmp_path / "one")
    assert train.class_names == ("x", "y", "z") and len(train) + len(test) == 30
    for part in (train, test):
        for name, image, label in zip(part.ids, part.images.numpy(), part.labels.tolist(), strict=True):
            i = int(name.split("/")[1])
            assert (image == x[i]).all() and label == y[i]
    grouped = load_images(tmp_path / "one", split_by="group")
    assert grouped.test.units and not set(grouped.train.units or ()) & set(grouped.test.units)
    halves = made.train_test_split(test_size=10, seed=0)
    datasets.DatasetDict({"train": halves["train"], "validation": halves["test"]}).save_to_disk(str(tmp_path / "two"))
    train, test, val, _ = load_images(str(tmp_path / "two"), image_size=6)
    assert (len(train), len(test), val) == (20, 10, None) and train.image_size == (6, 6)
    rows["image"][3] = {"bytes": b"not an image", "path": None}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "bad"))
    with pytest.raises(DataError, match=r"1 of 30 images in bad cannot be read: train/3 \(no image format"):
        load_images(tmp_path / "bad")
    loaded = load_images(tmp_path / "bad", on_unreadable="skip")
    assert len(loaded.train) + len(loaded.test) == 29
    made.remove_columns("label").save_to_disk(str(tmp_path / "nolabel"))
    with pytest.raises(DataError, match="expected one column of labels, named label, among image, group"):
        load_images(tmp_path / "nolabel")
    texts = datasets.Dataset.from_dict({**rows, "image": rows["image"][:3] * 10, "label": ["a", "A", "b"] * 10})
    texts.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "texts"))
    with pytest.raises(DataError, match="different spellings"):
        load_images(tmp_path / "texts")
