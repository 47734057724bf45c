"""Sentences and rows of numbers from tables, archives and the known sets."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from krdistill.data import DataBundle, FeatureData, TextData, load_data, load_images
from krdistill.data.augment import Compose, RandomCrop, WordDropout, augmentation_of, build_augmentation
from krdistill.data.feed import Feed
from krdistill.data.tables import kind_of_table
from krdistill.errors import ArgumentError, DataError
from krdistill.kinds import decode_texts, encode_texts

ROWS = [("where is my card", "card"), ("I lost it, help", "lost"), ("card?", "card"), ("gone", "lost")] * 3


def write(path: Path, rows: list[Any], header: str, separator: str = ",") -> Path:
    lines = [separator.join(f'"{c}"' if separator in str(c) else str(c) for c in row) for row in rows]
    path.write_text("\n".join([header.replace(",", separator), *lines]) + "\n", encoding="utf-8")
    return path


def texts(data: Any) -> list[str]:
    return decode_texts(data.inputs.numpy())


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
def test_a_table_of_sentences(tmp_path: Path, separator: str) -> None:
    path = write(tmp_path / "a.csv", ROWS, "text,label", separator)
    train, test, val, notes = load_images(path)
    assert isinstance(train, TextData) and val is None and train.class_names == ("card", "lost") and train.name == "a"
    assert sorted(texts(train) + texts(test)) == sorted(text for text, _ in ROWS)
    assert all("card" in text for text, y in zip(texts(train), train.labels, strict=True) if y == 0)
    assert any("put aside as test part" in note and "sentences" in note for note in notes)
    assert repr(train) == f"TextData('a', {len(train)} sentences, 2 classes)"


def test_parts_groups_ids_and_notes(tmp_path: Path) -> None:
    rows = [
        ("u1", "Hello there", "greet", "train", "p"), ("u2", "bye now", "leave", "train", "p"),
        ("u3", "hello  THERE", "greet", "valid", "q"), ("u4", "x" * 2000, "leave", "test", "r"),
        ("u5", "bye now", "greet", "train", "s"),
    ]  # fmt: skip
    path = write(tmp_path / "b.tsv", rows, "id,Text,Intent,split,group", "\t")
    train, test, val, notes = load_images(path, split_by="group")
    assert train.ids == ("u1", "u2", "u5") and train.units == ("p", "p", "s") and val is not None and val.ids == ("u3",)
    assert len(texts(test)[0]) == 1024
    assert [n for n in notes if "longer than 1,024 bytes" in n and "test" in n]
    assert "1 sentences stand there under several labels" in notes and "1 sentences of val are also in train" in notes


def test_duplicates_are_not_parted(tmp_path: Path) -> None:
    rows = [
        (f"sentence number {i // 4}".upper() if i % 2 else f"sentence number {i // 4}", "ab"[i // 40])
        for i in range(80)
    ]
    path = write(tmp_path / "c.csv", rows, "text,label")
    train, test, *_ = load_images(path, split_by="duplicates")
    assert not {t.lower() for t in texts(train)} & {t.lower() for t in texts(test)} and len(test) >= 8


def test_quotes_newlines_and_tabs(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,category\n"\nsaid ""hi""\nand left\u2028now",x\nplain,y\n', encoding="utf-8-sig")
    assert sorted(texts(load_data_of(path))) == ["plain", 'said "hi" and left now']
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"quoted\tx\nhe said 5" of snow"\ty\n', encoding="utf-8")
    assert sorted(texts(load_data_of(path))) == ['"quoted', 'he said 5" of snow"']


def load_data_of(path: Path) -> Any:
    from krdistill.data.tables import load_table

    kind = kind_of_table(path)
    assert kind is not None
    return load_table(path, kind)[0]["train"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("text,label\na,x\n  ,y\n\x07,y\n", r"no text in 2 rows: line 3, line 4. Fill them in"),
        ("text,label\na,x\nb,\n", "no label in 1 rows: line 3"),
        ("text,label\na,x\nb,y,z\n", r"expected 2 cells in every line, separated by comma, got 3 in line 3"),
        ("text,label\na,Card\nb,card \n", "the same class in different spellings"),
        ("text,label\na,x\nb,x\n", "at least two classes"),
        ("text,label,split\na,x,train\nb,y,train\nc,z,test\n", "1 labels of test are not in train: 'z'"),
        ("text,label,split\na,x,train\nb,y,later\n", "unknown split 'later'"),
        ("text,label,split\na,x,test\nb,y,test\n", "no row has split train"),
        ("text,label,text\na,x,b\n", "'text' stands there twice"),
        ("text,label\n", "a header and no rows"),
        ('text,label\n"a,x\nb,y\n', "Are all quotation marks closed"),
        ("age,label\n1,x\nold,y\n,x\n", r"the column 'age', got other cells in 1 rows: 'old' \(line 3\)"),
        ("age,label\n1,x\n,y\nnan,x\ninf,y\n", "NaN, infinity or no number in the column 'age' in 3 rows: line 3"),
        ("age,label\n1,x\n1e39,y\n", "infinity .* line 3"),
        ("age,label\n1,x\n2,\n", "no label in 1 rows"),
    ],
)  # fmt: skip
def test_bad_tables(tmp_path: Path, body: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(body, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_images(path)


def test_what_a_table_holds(tmp_path: Path) -> None:
    def kind(header: str, row: str = "1,2,3") -> str | None:
        path = tmp_path / "k.csv"
        path.write_text(f"{header}\n{row}\n")
        return kind_of_table(path)

    assert kind("text,label,x") == kind('"Text";"Label"') == "text"
    assert kind("a,b,label") == "features" and kind("a,b,label", "x,y,3") is None
    assert kind("path,label,text") is None and kind("a,b,c") is None and kind("label") is None
    (tmp_path / "latin.csv").write_bytes("text,label\nä,x\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"label|UTF-8"):
        load_images(tmp_path / "latin.csv")
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("text:label\na:x\n")
    with pytest.raises(DataError, match="separated by comma, tab, semicolon, bar"):
        load_images(wrong)


def test_rows_of_numbers(tmp_path: Path) -> None:
    rows = [(i, i % 3, "odd" if i % 2 else "even", "train" if i < 30 else "test", -0.5 * i) for i in range(40)]
    path = write(tmp_path / "n.csv", rows, "a,b,label,split,c")
    train, test, _, _ = load_images(path)
    assert isinstance(train, FeatureData) and train.inputs.dtype == torch.float32 and len(test) == 10
    assert (
        train.inputs[7].tolist() == [7, 1, -3.5]
        and train.class_names == ("even", "odd")
        and train.shape == "of 3 numbers"
    )
    cut = load_data(path, profile="exp", imbalance_factor=5)
    assert cut.train.counts().tolist() == [15, 3] and cut.split["checksum"] and cut.train.kind == "features"
    with pytest.raises(ArgumentError, match=r"image_size does not apply to .*rows"):
        load_data(path, image_size=32)


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    y = ["p", "q"] * 10
    parquet.write_table(pa.table({"a": np.arange(20.0), "b": list(range(20)), "label": y}), tmp_path / "n.parquet")
    parquet.write_table(pa.table({"text": [f"s {i}" for i in range(20)], "label": y}), tmp_path / "t.parquet")
    parquet.write_table(pa.table({"a": [1.0, None] * 10, "label": y}), tmp_path / "none.parquet")
    assert load_images(tmp_path / "n.parquet").train.inputs.shape[1] == 2
    assert load_images(tmp_path / "t.parquet").train.kind == "text"
    with pytest.raises(DataError, match=r"no number in the column 'a' in 10 rows: row 1"):
        load_images(tmp_path / "none.parquet")


def test_an_archive_of_rows(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).normal(size=(30, 4)), np.arange(30) % 3
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[:9], y_test=y[:9], class_names=["p", "q", "r"])
    train, test, _, _ = load_images(tmp_path / "a.npz")
    assert (
        train.class_names == ("p", "q", "r")
        and train.ids[4] == "train/4"
        and torch.equal(test.inputs, train.inputs[:9])
    )
    np.savez(
        tmp_path / "b.npz",
        x_train=x,
        y_train=np.array(["u", "v", "w"])[y],
        x_val=x[:9],
        y_val=np.array(["u", "v", "w"])[y[:9]],
        more=1,
    )
    again = load_images(tmp_path / "b.npz")
    assert again.train.class_names == ("u", "v", "w") and torch.equal(again.train.labels, train.labels)
    assert again.notes == ("arrays that were passed over: more",) and len(again.test) == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_train": None}, "x_train without y_train"),
        ({"x_train": np.ones((4, 2, 2))}, r"x_train as numbers of shape \(N, D\), got float64 \(4, 2, 2\)"),
        ({"x_train": np.full((4, 2), "a")}, "expected x_train as numbers"),
        ({"x_train": np.array([[1, 2], [3, np.nan], [5, 6], [np.inf, 0]])}, "NaN or infinity in 2 rows of x_train"),
        ({"y_train": np.array([0.0, 1, 0, 1])}, "y_train as whole numbers or texts"),
        ({"y_train": np.eye(4, dtype=int)}, "Several labels of one row"),
        ({"y_train": np.array([0, 1, 0])}, "x_train has 4 rows, y_train 3 labels"),
        ({"x_test": np.ones((2, 3)), "y_test": np.array([0, 1])}, "x_test has 3 columns, x_train 2"),
        ({"x_test": np.ones((2, 2)), "y_test": np.array([0, 2])}, "1 labels of test are not in train: 2"),
        ({"class_names": np.array(["a"])}, "labels from 0 to 0"),
        ({"y_train": np.array([0, -1, 0, 1])}, "got -1"),
    ],
)  # fmt: skip
def test_bad_archives(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = {"x_train": np.arange(8.0).reshape(4, 2), "y_train": np.array([0, 1, 0, 1])}
    np.savez(tmp_path / "a.npz", **{k: v for k, v in {**good, **change}.items() if v is not None})
    with pytest.raises(DataError, match=message):
        load_images(tmp_path / "a.npz")


def test_parts_of_one_kind() -> None:
    y, names = torch.tensor([0, 1]), ("a", "b")
    rows = FeatureData(torch.zeros(2, 3), y, names, ("0", "1"))
    words = TextData(torch.from_numpy(encode_texts(["a", "b c"])), y, names, ("0", "1"))
    longer = TextData(torch.from_numpy(encode_texts(["a", "b c d e"])), y, names, ("0", "1"))
    assert DataBundle(words, longer).num_classes == 2  # sentences may be longer there
    with pytest.raises(ArgumentError, match="test to be sentences as in train, got rows"):
        DataBundle(words, rows)
    with pytest.raises(ArgumentError, match="NaN or infinity in 1 rows: 1"):
        FeatureData(torch.tensor([[1.0], [float("nan")]]), y, names, ("0", "1"))
    with pytest.raises(ArgumentError, match="float32 of shape"):
        FeatureData(torch.zeros(2, 3, dtype=torch.float64), y, names, ("0", "1"))
    assert rows.checksum() != words.checksum() and rows.subset([1]).ids == ("1",)
    index, x, labels = next(Feed(rows, torch.device("cpu")).run([torch.tensor([1, 0])]))
    assert x.dtype == torch.float32 and labels.tolist() == [1, 0] and index.tolist() == [1, 0]


# Augmentation ---------------------------------------------------------------------------------------------------------


def test_words_are_dropped_whole_and_again_alike() -> None:
    sentences = ["one two three four five six seven", "ä ö", "single", "a b c d e f g h i j k l m"] * 50
    rows, index = torch.from_numpy(encode_texts(sentences)), torch.arange(200)
    augment = WordDropout(0.3)
    views = augment(rows, index, seed=1, epoch=2)
    shown = decode_texts(views.numpy())
    kept = 0
    for before, after in zip(sentences, shown, strict=True):
        words, left = before.split(), after.split()
        assert after == " ".join(left) and left and [w for w in words if w in left] == left
        kept += len(left)
    total = sum(len(s.split()) for s in sentences)
    assert abs(kept / total - 0.7) < 0.05 and views.shape == rows.shape
    assert torch.equal(views, augment(rows, index, seed=1, epoch=2))
    assert not torch.equal(views, augment(rows, index, seed=1, epoch=3))
    some = torch.tensor([150, 3, 77])
    narrow = torch.from_numpy(encode_texts([sentences[i] for i in some]))  # another batch, another width
    assert decode_texts(augment(narrow, some, seed=1, epoch=2).numpy()) == [shown[i] for i in some]
    assert torch.equal(WordDropout(0.0)(rows, index, seed=1, epoch=0), rows)


def test_augmentations_are_for_one_kind() -> None:
    words = TextData(torch.from_numpy(encode_texts(["a", "b"])), torch.tensor([0, 1]), ("a", "b"), ("0", "1"))
    assert isinstance(augmentation_of("word-dropout", words), Compose)
    with pytest.raises(ArgumentError, match="'crop-flip' is for images; for sentences there are: none, word-dropout"):
        augmentation_of("crop-flip", words)
    with pytest.raises(ArgumentError, match="'word-dropout' is for sentences; for images"):
        build_augmentation("word-dropout", 32)
    with pytest.raises(ArgumentError, match=r"Unknown augmentation 'word-drop'.*word-dropout"):
        build_augmentation("word-drop", None, "text")
    with pytest.raises(ArgumentError, match="expected augmentations of sentences"):
        Compose((RandomCrop(2),), "text")
    with pytest.raises(ArgumentError, match="sentences, uint8 of shape"):
        WordDropout()(torch.zeros(2, 3), torch.arange(2), seed=0, epoch=0)
    with pytest.raises(ArgumentError, match="one row number"):
        WordDropout()(words.inputs, torch.arange(3), seed=0, epoch=0)


# The known sets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes", "classes", "largest", "smallest"),
    [
        ("banking77", (10_003, 3_080, None), 77, 187, 35),
        ("trec", (5_452, 500, None), 50, 962, 4),
        ("hwu64", (9_960, 1_076, None), 64, 175, 35),
        ("clinc150", (15_000, 4_500, 3_000), 150, 100, 100),
        ("clinc150-imbalanced", (10_525, 4_500, 3_000), 150, 100, 25),
    ],
)
def test_the_known_sets(name: str, sizes: tuple[Any, ...], classes: int, largest: int, smallest: int) -> None:
    root = os.environ.get("KRDISTILL_DATA")
    if not root or not (Path(root) / "text").is_dir():
        pytest.skip("the sets of sentences are not at hand: KRDISTILL_DATA names no folder with text/")
    train, test, val, _ = load_images(name)
    assert (len(train), len(test), None if val is None else len(val)) == sizes and train.num_classes == classes
    assert int(train.counts().max()) == largest and int(train.counts().min()) == smallest
    assert all(text for text in texts(train.subset(torch.arange(0, len(train), 97))))


def test_known_sets_that_are_not_there_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"Put banking77_train.csv and banking77_test.csv there, from https://github.com"
    ):
        load_images("banking77", root=tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "clinc150_data_full.json").write_text(json.dumps({"train": [["a"]]}))
    with pytest.raises(DataError, match=r"clinc150: the files in .* are not as they were published"):
        load_images("clinc150", root=tmp_path)


def test_the_digits_as_numbers() -> None:
    pytest.importorskip("sklearn")
    train, test, _, _ = load_images("digits-features")
    images = load_images("digits")
    assert isinstance(train, FeatureData) and len(train) + len(test) == len(images.train) + len(images.test)
    row = images.train.ids.index(next(i for i in train.ids if i in images.train.ids))
    mine = train.inputs[train.ids.index(images.train.ids[row])]
    assert torch.equal((mine * 255 / 16).round().to(torch.uint8), images.train.inputs[row].flatten())


def test_looking_at_sentences_and_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from krdistill.cli import main
    from krdistill.config import DataConfig
    from krdistill.data.inspection import inspect_data

    rows = [(f"say {i}", "ab"[i % 3 == 0], "train") for i in range(30)]
    rows += [("SAY 3", "b", "test"), ("say 4", "b", "test"), ("new", "a", "test")]
    path = write(tmp_path / "i.csv", rows, "text,label,split")
    found = inspect_data(DataConfig(source=str(path)))
    assert (
        found["noun"] == "sentences"
        and found["parts"]["train"]["images"] == 30
        and found["parts"]["train"]["largest"] == 20
    )
    assert found["copies"]["clusters"] == 2 and found["copies"]["across"] == {"train/test": 2}
    assert found["copies"]["several_labels"] == 1 and ["train/3", "test/0"] in found["copies"]["examples"]
    main(["inspect", str(path), "--out", str(tmp_path / "i.html")])
    shown = capsys.readouterr().out
    assert "2 sentences in 2 clusters, 2 across train and test" in " ".join(shown.split()) and "unreadable" not in shown
    assert "training sentences" in (tmp_path / "i.html").read_text()
    np.savez(tmp_path / "f.npz", x_train=np.ones((6, 2)), y_train=np.arange(6) % 2)
    rows_found = inspect_data(DataConfig(source=str(tmp_path / "f.npz")))
    assert rows_found["noun"] == "rows" and rows_found["copies"]["images"] == 5
