"""Tables and list files that name images: what they become, and everything that can be wrong with one."""

from __future__ import annotations

import csv
import gzip
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from krdistill.config import DataConfig
from krdistill.data import load_data, load_images
from krdistill.data.lists import list_lists
from krdistill.data.manifest import list_manifest
from krdistill.data.selection import lot
from krdistill.errors import DataError, MissingDependencyError
from krdistill.stages import load_configured_data

Row = tuple[str, ...]


def picture(path: Path, seed: int, side: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (side, side, 3)).astype(np.uint8)).save(path)
    return path


def table(file: Path, rows: list[Row], header: str = "path,label", separator: str = ",") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened, delimiter=separator)
        writer.writerow(header.split(","))
        writer.writerows(rows)
    return file


def pictures(root: Path, counts: dict[str, int]) -> list[Row]:
    rows = []
    for k, (label, count) in enumerate(counts.items()):
        for i in range(count):
            name = f"images/{label} {i}.png"
            picture(root / name, 100 * k + i)
            rows.append((name, label))
    return rows


# Manifests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t"), ("csv", ";"), ("csv", "|")])
def test_a_manifest_is_what_the_same_folder_is(tmp_path: Path, suffix: str, separator: str) -> None:
    rows = pictures(tmp_path, {"bär": 7, "cat": 5, "öl": 1})
    for name, label in rows:
        (tmp_path / "folder" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / label / Path(name).name).symlink_to(tmp_path / name)
    file = table(tmp_path / f"my list.{suffix}", rows, separator=separator)
    ours, folder = load_images(file), load_images(tmp_path / "folder")
    assert ours.train.name == "my list" and ours.train.class_names == folder.train.class_names == ("bär", "cat", "öl")
    # which images are put aside goes by their ids, how many by the classes alone
    assert ours.train.counts().tolist() == folder.train.counts().tolist() == [6, 4, 1]
    pixels = {Path(i).name: x for part in folder[:2] for i, x in zip(part.ids, part.images, strict=True)}
    for part in ours[:2]:
        for name, label, image in zip(part.ids, part.labels.tolist(), part.images, strict=True):
            assert (image == pixels[Path(name).name]).all() and Path(name).name.startswith(part.class_names[label])


def test_split_column_root_and_column_order(tmp_path: Path) -> None:
    rows = pictures(tmp_path / "elsewhere", {"10": 4, "9": 4})
    parts = ["Train", "train", "TEST", "valid"] * 2
    full = [(part, label, "x", path) for (path, label), part in zip(rows, parts, strict=True)]
    file = table(tmp_path / "lists" / "m.csv", full, "split, Label ,note,PATH")
    train, test, val, notes = load_images(str(file), root=tmp_path / "elsewhere")
    assert train.class_names == ("9", "10") and val is not None and notes == ()
    assert [p.counts().tolist() for p in (train, test, val)] == [[2, 2], [1, 1], [1, 1]]
    assert set(test.ids) == {"images/10 2.png", "images/9 2.png"}
    config = DataConfig(source=str(file), root=str(tmp_path / "elsewhere"))
    assert load_configured_data(config).split["counts"]["train"] == [2, 2]
    with pytest.raises(DataError, match=r"8 of 8 images that m\.csv names are not there, such as .*data\.root"):
        load_images(file)
    only_val = [row for row in full if row[0] != "TEST"]
    train, test, val, _ = load_images(table(file, only_val, "split,label,note,path"), root=tmp_path / "elsewhere")
    assert val is None and test.counts().tolist() == [1, 1]


def test_repeated_rows_count_once_and_absolute_paths_stay(tmp_path: Path) -> None:
    rows = pictures(tmp_path, {"a": 4, "b": 4})
    rows[0] = (str(tmp_path / rows[0][0]), "a")
    train, test, _, notes = load_images(table(tmp_path / "m.csv", rows + rows[:3]))
    assert len(train) + len(test) == 8 and "3 rows of m.csv that stand there twice count once" in notes
    assert str(tmp_path / "images/a 0.png") in {*train.ids, *test.ids}


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    rows = pictures(tmp_path, {"a": 5, "b": 5})
    (tmp_path / rows[0][0]).unlink()
    file = table(tmp_path / "m.csv", rows)
    with pytest.raises(DataError, match=r"1 of 10 images that m\.csv names are not there, such as .*a 0\.png\. .*skip"):
        load_images(file)
    (tmp_path / rows[1][0]).write_bytes(b"")
    loaded = load_images(file, on_unreadable="skip")
    assert len(loaded.train) + len(loaded.test) == 8
    assert any("2 unreadable images were left out: images/a 0.png, images/a 1.png" in n for n in loaded.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,class\na.png,b\n", r"header line with the columns path and label, .* first line is 'file,class'"),
        ("path label\na.png b\n", "separated by comma, tab, semicolon, bar"),
        ("", "first line is ''"),
        ("path,label\n", "a header and no rows"),
        ("path,label\na.png,b,c\nb.png,d\n", r"expected 2 cells in every line, separated by comma, got 3 in line 2"),
        ("path,label\na.png,b\nb.png,\n\nc.png, \n", r"no label in 2 rows: line 3, line 5"),
        ("path,label\n,b\n", "no path in 1 rows: line 2"),
        ("path,label,split\na.png,b,\n", "no split in 1 rows"),
        ("path,label,split\na.png,b,dev\n", r"unknown split 'dev' \(1\); expected one of train, training, test"),
        ("path,label,split\na.png,b,test\n", "no row has split train, only test"),
        ("path,label\na.png,Cat\nb.png,cat\nc.png,cat\n", r"different spellings: 'Cat' \(1\) and 'cat' \(2\)"),
        ("path,label\na.png,cat\nb.png,cat \n", r"different spellings: 'cat' \(1\) and 'cat ' \(1\)"),
        ("path,label\na.png,red fox\nb.png,red  fox\n", "different spellings"),
        ("path,label\na.png,cat;dog\nb.png,cat\n", r"1 cells with several labels: 'cat;dog' \(line 2\)"),
        ('path,label\na.png,"cat,dog"\nb.png,cat\nc.png,dog\n', "1 cells with several labels"),
        ("path,label\na.png,cat\na.png,dog\n", r"a\.png as 'cat' \(line 2\) and 'dog' \(line 3\)"),
        ("path,label,split\na.png,a,train\na.png,a,test\nb.png,b,train\n", r"1 images in two parts: a\.png in train"),
        ("path,label,split\na.png,a,train\nb.png,b,train\nc.png,c,test\n", r"1 labels of test are not in train: 'c'"),
        ("path,label\na.png,cat\nb.png,cat\n", r"at least two classes, got 1 \(cat\)"),
        ("path,label,Path\na.png,cat,b.png\n", "the column path stands there twice"),
        ('path,label\n"a.png,cat\n', "no table separated by comma"),
    ],
)
def test_manifests_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_images(tmp_path / "m.csv")


def test_other_bad_files(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes(b"path,label\nb\xe4r.png,x\n")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        load_images(tmp_path / "m.csv")
    with pytest.raises(DataError, match=r"gone\.csv is not there"):
        load_images("gone.csv")
    (tmp_path / "m.pdf").touch()
    with pytest.raises(DataError, match=r"m\.pdf is a file; expected .*\.parquet.*\.npz"):
        load_images(tmp_path / "m.pdf")


def test_names_with_commas_and_a_byte_order_mark(tmp_path: Path) -> None:
    text = '\ufeffpath,label\na.png,"crane, bird"\nb.png,"crane, machine"\n'
    (tmp_path / "m.csv").write_text(text, encoding="utf-8")
    assert list_manifest(tmp_path / "m.csv").class_names == ("crane, bird", "crane, machine")


def test_a_hundred_thousand_rows_of_8142_classes_within_seconds(tmp_path: Path) -> None:
    labels = np.r_[np.arange(8142), np.random.RandomState(0).zipf(1.5, 91_858) % 8142]
    file = table(tmp_path / "m.csv", [(f"{i % 97}/{i}.jpg", f"species {k}") for i, k in enumerate(labels)])
    start = time.perf_counter()
    listing = list_manifest(file)
    part = listing.parts["train"]
    counts = np.bincount(part.labels)
    chosen = lot(torch.from_numpy(part.labels), part.ids, (counts // 2).tolist(), 0, "test")
    assert time.perf_counter() - start < 15
    names = np.array(listing.class_names)
    assert len(names) == 8142 and (names[part.labels] == [f"species {k}" for k in labels]).all()
    assert (np.bincount(part.labels[chosen.numpy()], minlength=8142) == counts // 2).all()


def test_parquet(tmp_path: Path) -> None:
    rows = pictures(tmp_path, {"a": 4, "b": 3})
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        (tmp_path / "m.parquet").touch()
        with pytest.raises(MissingDependencyError, match=r"pip install 'krdistill\[parquet\]'"):
            load_images(tmp_path / "m.parquet")
        return
    columns = {"label": [label for _, label in rows], "path": [path for path, _ in rows]}
    parquet.write_table(pa.table(columns), tmp_path / "m.parquet")
    loaded = load_images(tmp_path / "m.parquet")
    csv_file = table(tmp_path / "m.csv", rows)
    assert loaded.train.checksum() == load_images(csv_file).train.checksum()
    numbers = [int(label == "a") for label in columns["label"]]
    parquet.write_table(pa.table({**columns, "label": numbers}), tmp_path / "n.parquet")
    assert load_images(tmp_path / "n.parquet").train.class_names == ("0", "1")
    parquet.write_table(pa.table({**columns, "label": [[k] for k in columns["label"]]}), tmp_path / "many.parquet")
    with pytest.raises(DataError, match="Several labels of one image"):
        load_images(tmp_path / "many.parquet")
    parquet.write_table(pa.table({"path": columns["path"]}), tmp_path / "none.parquet")
    with pytest.raises(DataError, match="label not among path"):
        load_images(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_text("text")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        load_images(tmp_path / "bad.parquet")


# Lists ----------------------------------------------------------------------------------------------------------------


def lists(folder: Path, parts: dict[str, list[tuple[str, int]]], name: str = "Own_LT_{}.txt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        (folder / name.format(part)).write_text("".join(f"{path} {label}\n" for path, label in rows))
    return folder


def test_lists_with_images(tmp_path: Path) -> None:
    rows = [(f"train/n{k:02}/im age {i}.png", k) for k in range(3) for i in range(4 - k)]
    tests = [(f"val/{i}.png", i % 3) for i in range(6)]
    for seed, (path, _) in enumerate(rows + tests):
        picture(tmp_path / "data" / path, seed)
    folder = lists(tmp_path / "lists", {"train": rows, "val": tests[:3], "test": tests[3:]})
    train, test, val, _ = load_images(folder, root=tmp_path / "data")
    assert train.counts().tolist() == [4, 3, 2] and train.class_names == ("n00", "n01", "n02")
    assert train.name == "Own_LT" and val is not None and test.ids == ("val/3.png", "val/4.png", "val/5.png")
    again = load_images(folder / "Own_LT_test.txt", root=tmp_path / "data")
    assert again.train.checksum() == train.checksum() and again.test.checksum() == test.checksum()
    with pytest.raises(DataError, match=r"15 of 15 images that Own_LT_train\.txt names are not there, such as"):
        load_images(folder)
    lists(tmp_path / "data", {"train": rows, "val": tests}, "{}.txt")
    bundle = load_data(tmp_path / "data")  # lists win over the folder train/, whose part val has no class folders
    assert bundle.val is None and bundle.split["counts"]["test"] == [2, 2, 2]


def test_lists_without_images_give_counts(tmp_path: Path) -> None:
    folder = lists(tmp_path, {"train": [("a/1.jpg", 0), ("a/2.jpg", 2), ("a/2.jpg", 2)]})
    listing = list_lists(folder)
    assert listing.class_names == ("0", "1", "2") and listing.parts["train"].labels.tolist() == [0, 2]
    assert listing.notes == ("1 lines of Own_LT_train.txt that stand there twice count once",)
    (tmp_path / "z_train.txt.gz").write_bytes(gzip.compress(b"x/a.jpg 0\ny/b.jpg 1\n"))
    assert list_lists(tmp_path / "z_train.txt.gz").class_names == ("x", "y")
    with pytest.raises(DataError, match=r"several sets of lists: Own_LT \(train\), z \(train\)\. Name one"):
        load_images(tmp_path)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"test": [("a", 0), ("b", 1)]}, "lists of Own_LT for test but none for train; expected Own_LT_train.txt"),
        ({"train": [("a", 0), ("b", 0)]}, "two classes"),
        (
            {"train": [("a", 0), ("b", 1), ("a", 1)]},
            "1 images with several labels or in several parts: a as 0 in train",
        ),
        ({"train": [("a", 0), ("b", 1)], "test": [("a", 0)]}, "a as 0 in train and as 0 in test"),
        ({"train": [("a", 0), ("b", 1)], "test": [("c", 7)]}, "1 labels of test are not in train: 7. .* from 0 to 1"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, parts: dict[str, list[tuple[str, int]]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_images(lists(tmp_path, parts))


def test_lines_that_are_no_path_and_label(tmp_path: Path) -> None:
    (tmp_path / "a_train.txt").write_text("x/1.jpg 0\nx/2.jpg\n\nx/3.jpg -1\n")
    with pytest.raises(DataError, match=r"line 2 \('x/2.jpg'\), line 4 \('x/3.jpg -1'\)"):
        load_images(tmp_path)
    (tmp_path / "b.txt").write_text("hello\n")
    with pytest.raises(DataError, match="expected lines 'path label'"):
        load_images(tmp_path / "b.txt")


def test_the_published_lists(data_root: Path) -> None:
    folder = data_root / "lt_index"
    if not (folder / "Places_LT_train.txt.xz").is_file():
        pytest.skip(f"{folder} holds no Places_LT_train.txt.xz")
    start = time.perf_counter()
    listing = list_lists(folder / "Places_LT_train.txt.xz")
    counts = np.bincount(listing.parts["train"].labels)
    assert time.perf_counter() - start < 10
    assert len(counts) == 365 and counts.sum() == 62_500 and (counts.max(), counts.min()) == (4980, 5)
    assert [len(listing.parts[p].ids) for p in ("test", "val")] == [36_500, 7_300]
    assert listing.name == "Places_LT" and listing.class_names[0] == "airfield"
    with pytest.raises(DataError, match=r"106,300 of 106,300 images .* are not there, such as"):
        load_images(folder / "Places_LT_train.txt.xz")
    with pytest.raises(DataError, match="lists of iNaturalist18 for val but none for train"):
        list_lists(folder / "iNaturalist18_val.txt.xz")
