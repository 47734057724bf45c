"""`krdistill inspect`: what it finds, what it says, and what it cannot be given."""

from __future__ import annotations

import csv
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from krdistill import cli
from krdistill.config import DataConfig
from krdistill.data import load_data, load_images
from krdistill.data.inspection import inspect_data
from krdistill.errors import ArgumentError, DataError


def scene(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    blocks = np.random.RandomState(seed).randint(0, 256, (9, 9, 3)).astype(np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def bomb(path: Path) -> Path:
    """A PNG of a few bytes whose header promises 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    path.write_bytes(data)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Training and test images with copies, near-duplicates, and files that cannot be read."""
    root = tmp_path / "own data"
    for i in range(6):
        save(root / "train" / "bär" / f"{i}.png", scene(i))
    for i in range(3):
        save(root / "train" / "cat" / f"{i}.jpg", scene(10 + i, (50, 50)))
    save(root / "train" / "eel" / "0.png", scene(20).convert("L"))
    save(root / "test" / "bär" / "x.png", scene(30))
    (root / "test" / "eel").mkdir()
    (root / "test" / "cat").mkdir()
    (root / "test" / "cat" / "copy.jpg").write_bytes((root / "train" / "cat" / "1.jpg").read_bytes())
    save(root / "test" / "cat" / "near.jpg", scene(12, (50, 50)).resize((35, 35)), quality=60)
    (root / "train" / "cat" / "again.png").write_bytes((root / "train" / "bär" / "2.png").read_bytes())
    whole = (root / "train" / "bär" / "5.png").read_bytes()
    (root / "train" / "bär" / "half.png").write_bytes(whole[: len(whole) // 2])
    (root / "train" / "bär" / "empty.png").write_bytes(b"")
    bomb(root / "train" / "bär" / "bomb.png")
    return root


def test_everything_that_is_to_be_found(folder: Path) -> None:
    found = inspect_data(DataConfig(source=str(folder), on_unreadable="skip"))
    assert found["parts"]["train"] == {
        "images": 11, "classes": 3, "largest": 6, "smallest": 1, "imbalance_factor": 6.0,
    }  # fmt: skip
    assert found["parts"]["test"]["images"] == 3 and found["without_test"] == ["eel"]
    assert found["classes"][0] == {"name": "bär", "group": "few", "train": 6, "test": 1}
    assert sorted(map(tuple, found["sizes"])) == [(35, 35, 1), (40, 30, 9), (50, 50, 4)]
    assert (found["grey"], found["colour"]) == (1, 13)
    assert found["unreadable"]["number"] == 3 and found["missing"]["number"] == 0 and found["unseen"] == ""
    reasons = dict(line.split(" (", 1) for line in found["unreadable"]["first"])
    assert reasons["train/bär/empty.png"] == "empty file)" and "truncated" in reasons["train/bär/half.png"]
    assert "pixels" in reasons["train/bär/bomb.png"]
    copies = found["copies"]
    assert (copies["clusters"], copies["images"], copies["several_labels"]) == (2, 2, 1)
    assert copies["across"] == {"train/test": 1}
    assert sorted(copies["examples"][0]) == ["test/cat/copy.jpg", "train/cat/1.jpg"]
    near = found["near_duplicates"]
    assert (near["clusters"], near["across"]) == (3, {"train/test": 2})
    kept = inspect_data(DataConfig(source=str(folder)))
    assert kept["parts"]["train"]["images"] == 14  # a run would refuse them, here they are counted


def test_counts_are_those_of_the_run(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"profile": "exp", "imbalance_factor": 10, "val_fraction": 0.2}
    bundle, found = load_data("digits", **options), inspect_data(DataConfig(source="digits", **options))
    for part in ("train", "val", "test"):
        assert [c[part] for c in found["classes"]] == bundle.split["counts"][part]
    assert found["sizes"] == [[8, 8, 1797]] and found["parts"]["train"]["largest"] == bundle.split["counts"]["train"][0]
    own = folder / "train"  # no test part: one is put aside
    bundle, found = (
        load_data(own, image_size=16, on_unreadable="skip"),
        inspect_data(DataConfig(source=str(own), on_unreadable="skip")),
    )
    assert [c["test"] for c in found["classes"]] == bundle.split["counts"]["test"]
    assert any("were put aside as test part" in note for note in found["notes"])


def test_a_manifest_with_groups(tmp_path: Path) -> None:
    rows = [["path", "label", "group", "split"]]
    for i in range(12):
        save(tmp_path / f"{i}.png", scene(i))
        rows.append([f"{i}.png", "ab"[i % 2], f"p{i // 3}", "test" if i > 9 else "train"])
    with (tmp_path / "m.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    found = inspect_data(DataConfig(source=str(tmp_path / "m.csv")))
    assert found["split_groups"] == {"number": 4, "across": {"train/test": 1}}
    with pytest.raises(DataError, match="1 groups lie in train and in test: p3"):
        inspect_data(DataConfig(source=str(tmp_path / "m.csv"), split_by="group"))


def test_lists_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"img/{k}/{i}.jpg {k}\n" for k, n in enumerate((150, 40, 3)) for i in range(n)]
    (tmp_path / "Own_LT_train.txt").write_text("".join(lines))
    (tmp_path / "Own_LT_test.txt").write_text("t/0.jpg 0\nt/1.jpg 1\n")
    cli.main(["inspect", str(tmp_path), "--out", str(tmp_path / "a.png")])
    said = capsys.readouterr().out
    for words in ("193", "many", "medium", "few", "195 images", "not looked at", "1 classes: 2"):
        assert words in said, said
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 20) or ()) > 3
    found = inspect_data(DataConfig(source=str(tmp_path)))
    assert found["missing"]["number"] == 195 and found["sizes"] == [] and "195 images are not there" in found["unseen"]
    assert [g["classes"] for g in found["groups"]["rows"]] == [1, 1, 1]


def test_on_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["inspect", str(folder), "--json", "--data.groups", "thirds", "--out", str(tmp_path / "a.html")])
    found = json.loads(capsys.readouterr().out)
    assert [g["name"] for g in found["groups"]["rows"]] == ["head", "medium", "tail"]
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<svg" in page and "<td>bär</td>" in page and "near-duplicates" in page and "src=" not in page
    cli.main(["inspect", str(folder)])
    said = " ".join(capsys.readouterr().out.split())
    for words in ("own data", "1 across train and test", "3 images: train/bär/bomb.png", "40x30 (9)"):
        assert words in said, said


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere/"], "nowhere is not there"),
        (["no-such-set"], "Unknown data source 'no-such-set'"),
        (["digits", "--seed", "1"], "inspect takes --data.KEY VALUE only"),
        (["digits", "--data.groop", "thirds"], "groups"),
        (["digits", "--out", "a.txt"], "suffix .html, .png, .svg or .pdf, got a.txt"),
        (["digits", "--data.split_by", "group"], "names no groups"),
    ],
)
def test_mistakes_are_one_message(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["inspect", *args])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_bad_files_do_not_lose_the_rest(folder: Path) -> None:
    """What a run does with the same folder: a message that names them, or all the others."""
    with pytest.raises(DataError, match=r"3 of 17 images .*data\.on_unreadable|2 of 17 images .*data\.on_unreadable"):
        load_images(folder, image_size=16)
    loaded = load_images(folder, image_size=16, on_unreadable="skip")
    assert len(loaded.train) + len(loaded.test) == 14
    with pytest.raises(ArgumentError, match="has a test part of its own"):
        load_images(folder, image_size=16, test_fraction=0.3)
