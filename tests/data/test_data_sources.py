"""Known sources: upstream formats, real files, and what is refused."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import datasets

from krdistill.data import SOURCES, LoadedImages, data_root, list_sources, load_images
from krdistill.data.cifar import load_cifar
from krdistill.data.tiny_imagenet import load_tiny_imagenet
from krdistill.errors import ArgumentError, DataError


def test_table_of_sources() -> None:
    assert list(list_sources())[:4] == ["digits", "cifar10", "cifar100", "tiny-imagenet"]
    for name, info in SOURCES.items():
        assert info.name == name and info.description and info.citation
        for md5 in [*info.files.values(), info.archive.md5 if info.archive else None]:
            assert md5 is None or (len(md5) == 32 and int(md5, 16))


def test_the_table_needs_no_torch() -> None:
    code = (
        "import sys; from krdistill.data import list_sources, data_root, download; list_sources(); data_root(); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'PIL', 'sklearn')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_package_names() -> None:
    import krdistill.data as package
    from krdistill.data import downloading

    assert package.download is downloading.download
    assert {"load_data", "ImageData", "download"} <= set(dir(package))
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = package.nothing_like_it


def test_data_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KRDISTILL_DATA", str(tmp_path / "named"))
    assert data_root() == tmp_path / "named" and data_root(tmp_path) == tmp_path
    monkeypatch.delenv("KRDISTILL_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_root() == tmp_path / ".cache/krdistill/data" and data_root("~/x") == tmp_path / "x"


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny-imagenet"])
def test_missing_data_say_how_to_get_them(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_images(name, root=tmp_path)
    message, info = str(caught.value), SOURCES[name]
    assert f"krdistill data download {name} --root {tmp_path}" in message
    assert info.archive is not None and info.archive.url in message and f"{tmp_path}/{info.folder}" in message


def test_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "meta").touch()
    with pytest.raises(DataError, match="cifar-100-python lacks train, test"):
        load_images("cifar100", root=tmp_path)


def test_unknown_source_and_options() -> None:
    with pytest.raises(DataError, match=r"Unknown data source 'cifar-100'\. Did you mean 'cifar100'"):
        load_images("cifar-100")
    with pytest.raises(ArgumentError, match="image_size"):
        load_images("digits", image_size=0)
    with pytest.raises(ArgumentError, match="on_unreadable"):
        load_images("digits", on_unreadable="ignore")
    with pytest.raises(ArgumentError, match="test part of its own"):
        load_images("digits", test_fraction=0.1)


# CIFAR ----------------------------------------------------------------------------------------------------------------


def test_cifar100_is_upstreams(cifar100: LoadedImages) -> None:
    train, test, val, notes = cifar100
    assert (len(train), len(test), val, notes) == (50000, 10000, None, ())
    assert train.image_size == (32, 32) and train.channels == 3 and train.num_classes == 100
    assert train.counts().tolist() == [500] * 100 and test.counts().tolist() == [100] * 100
    assert train.class_names[:3] == ("apple", "aquarium_fish", "baby") and train.class_names[99] == "worm"
    assert (train.ids[0], train.ids[49999], test.ids[7]) == ("train/0", "train/49999", "test/7")
    # md5 of the upstream rows, (N, 3 * 32 * 32)
    for part, md5 in ((train, "e07b6859dfcb4ef6850fbc815e123615"), (test, "155ad486d683899b65629b069dab09ba")):
        rows = part.images.permute(0, 3, 1, 2).contiguous().numpy().tobytes()
        assert hashlib.md5(rows).hexdigest() == md5
    assert hashlib.sha256(train.labels.numpy().tobytes()).hexdigest() == (
        "8bf4935e7c77a3096270043c6f3b221b6ecb9c63d1a08608e9af66cff17e977a"
    )


def python2_pickle(fields: dict[str, object]) -> bytes:
    """A dict in the form of the upstream files: protocol 2 as Python 2 wrote it, with byte strings."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value

    def item(value: object) -> bytes:
        if isinstance(value, str):
            return text(value.encode("latin1"))
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, list):
            return b"](" + b"".join(map(item, value)) + b"e"
        assert isinstance(value, np.ndarray) and value.dtype == np.uint8
        kind = b"cnumpy\ndtype\n(" + text(b"u1") + item(0) + item(1) + b"tR"
        kind += b"(" + item(3) + text(b"|") + b"NNN" + item(-1) + item(-1) + item(0) + b"tb"
        empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + b"(" + item(0) + b"t" + text(b"b") + b"tR"
        shape = b"(" + b"".join(map(item, map(int, value.shape))) + b"t"
        return empty + b"(" + item(1) + shape + kind + b"\x89" + text(value.tobytes()) + b"tb"

    return b"\x80\x02}(" + b"".join(text(k.encode()) + item(v) for k, v in fields.items()) + b"u."


def write(folder: Path, files: dict[str, bytes]) -> dict[str, str | None]:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return {name: hashlib.md5(content).hexdigest() for name, content in files.items()}


NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def test_cifar10_in_the_upstream_format(tmp_path: Path) -> None:
    generator = np.random.RandomState(0)
    batches = {n: generator.randint(0, 256, (20, 3072)).astype(np.uint8) for n in SOURCES["cifar10"].files}
    meta = batches.pop("batches.meta")
    assert len(batches) == 6 and meta is not None
    labels = {n: generator.randint(0, 10, 20).tolist() for n in batches}
    files = {n: python2_pickle({"batch_label": n, "labels": labels[n], "data": x}) for n, x in batches.items()}
    files["batches.meta"] = python2_pickle({"num_cases_per_batch": 20, "label_names": NAMES})
    train, test, *_ = load_cifar(tmp_path / "c", write(tmp_path / "c", files), name="cifar10")
    assert (len(train), len(test), train.class_names) == (100, 20, tuple(NAMES))
    for i in (0, 19, 20, 99):
        name, row = f"data_batch_{i // 20 + 1}", i % 20
        assert train.labels[i] == labels[name][row] and train.ids[i] == f"train/{i}"
        for y, x, c in ((0, 0, 0), (3, 17, 1), (31, 31, 2)):  # upstream: 1024 red, 1024 green, 1024 blue, row by row
            assert train.images[i, y, x, c] == batches[name][row, c * 1024 + y * 32 + x]
    assert test.labels.tolist() == labels["test_batch"]


def test_a_file_with_another_checksum_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    mark = tmp_path / "executed"
    for name in ("train", "test", "meta"):
        (tmp_path / "cifar-100-python" / name).write_bytes(_payload(mark))
    with pytest.raises(DataError, match=r"meta is not the upstream file and was not opened: its md5 is \w+, expected"):
        load_images("cifar100", root=tmp_path)
    assert not mark.exists()


def test_not_even_a_file_with_the_right_checksum_can_run_code(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    payload = _payload(mark)
    files = write(tmp_path / "c", {"meta": payload, "train": payload, "test": payload})
    with pytest.raises(DataError, match=r"it wants posix\.system"):
        load_cifar(tmp_path / "c", files, name="cifar100")
    assert not mark.exists()
    pickle.loads(payload)
    assert mark.exists()  # the payload is a live one


def _payload(mark: Path) -> bytes:
    return b"cposix\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR."


@pytest.mark.parametrize(
    ("meta", "train", "message"),
    [
        (b"not a pickle", b"", "meta cannot be read as a CIFAR file"),
        (b"\x80\x02](e.", b"", "expected a dict, got list"),
        (python2_pickle({"names": ["a"]}), b"", "no field 'fine_label_names'; it has names"),
        (None, python2_pickle({"fine_labels": [0, 0]}), "no field 'data'"),
        (None, python2_pickle({"fine_labels": [0], "data": np.zeros((2, 3072), np.uint8)}), "expected 1 rows of 3072"),
        (None, python2_pickle({"fine_labels": [0], "data": [1, 2]}), "expected 1 rows of 3072"),
    ],
)
def test_damaged_cifar(tmp_path: Path, meta: bytes | None, train: bytes, message: str) -> None:
    good = python2_pickle({"fine_label_names": ["a", "b"]})
    files = write(tmp_path / "c", {"meta": meta or good, "train": train, "test": train})
    with pytest.raises(DataError, match=message):
        load_cifar(tmp_path / "c", files, name="cifar100")


# Tiny ImageNet --------------------------------------------------------------------------------------------------------


def test_tiny_imagenet_real(tiny_imagenet_root: Path, tmp_path: Path) -> None:
    """Up to five training images of every class and the first 1,000 test images, linked from the real folder."""
    real, folder = tiny_imagenet_root / "tiny-imagenet-200", tmp_path / "tiny-imagenet-200"
    (folder / "val").mkdir(parents=True)
    for name in ("wnids.txt", "words.txt", "words_200.txt", "val/images"):
        if (real / name).exists():
            (folder / name).symlink_to(real / name)
    lines = (real / "val" / "val_annotations.txt").read_text().splitlines()[:1000]
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    wnids = sorted(f.name for f in (real / "train").iterdir())
    for wnid in wnids:
        (folder / "train" / wnid / "images").mkdir(parents=True)
        for k in (11, 0, 2, 1, 10):
            name = f"train/{wnid}/images/{wnid}_{k}.JPEG"
            if (real / name).exists():
                (folder / name).symlink_to(real / name)

    train, test, _, notes = load_images("tiny-imagenet", root=tmp_path)
    assert train.counts().tolist() == [len(list((folder / "train" / w / "images").iterdir())) for w in wnids]
    assert len(test) == 1000 and train.image_size == (64, 64) and train.channels == 3 and notes == ()
    assert train.class_names[:3] == ("goldfish", "European fire salamander", "bullfrog")
    assert train.ids[:5] == tuple(f"train/{wnids[0]}/images/{wnids[0]}_{k}.JPEG" for k in (0, 1, 2, 10, 11))
    of_image = dict(line.split("\t")[:2] for line in lines)
    assert [wnids[k] for k in test.labels.tolist()] == [of_image[i.removeprefix("val/images/")] for i in test.ids]
    for part in (train, test):
        for i in range(0, len(part), 7):
            assert (np.asarray(Image.open(real / part.ids[i]).convert("RGB")) == part.images[i].numpy()).all()
            assert part is test or wnids[int(part.labels[i])] in part.ids[i]


def tiny(folder: Path) -> Path:
    """Three classes in the upstream layout, real JPEGs, one of them grey."""
    generator = np.random.RandomState(0)
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("n3\nn1\nn2\n")
    (folder / "words.txt").write_text("n0\tentity\nn1\tcrane\nn2\tegret, white bird\nn3\tcrane, lifting device\n")
    for k, wnid in enumerate(("n1", "n2", "n3")):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        for i in (0, 2, 10)[: 3 - k]:
            grey = (k, i) == (1, 0)
            pixels = generator.randint(0, 256, (64, 64) if grey else (64, 64, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG")
    rows = []
    for i, wnid in enumerate(("n2", "n3", "n1", "n2")):
        Image.fromarray(generator.randint(0, 256, (64, 64, 3)).astype(np.uint8)).save(
            folder / "val" / "images" / f"val_{i}.JPEG"
        )
        rows.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(rows))
    return folder


def test_tiny_imagenet_layout(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "tiny-imagenet-200")
    train, test, *_ = load_images("tiny-imagenet", root=tmp_path)
    assert train.class_names == ("crane (n1)", "egret", "crane (n3)")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 2] and test.labels.tolist() == [1, 2, 0, 1]
    assert train.ids[:3] == tuple(f"train/n1/images/n1_{i}.JPEG" for i in (0, 2, 10))
    assert (train.images[3] == train.images[3, ..., :1]).all()  # the grey one
    assert (test.images[2].numpy() == np.asarray(Image.open(folder / test.ids[2]))).all()
    assert load_images("tiny-imagenet", root=tmp_path, image_size=32).train.image_size == (32, 32)
    (folder / "words.txt").unlink()
    assert load_tiny_imagenet(folder).train.class_names == ("n1", "n2", "n3")


def test_tiny_imagenet_damaged(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "t")
    (folder / "train" / "n1" / "images" / "n1_2.JPEG").write_bytes(b"\xff\xd8\xff broken")
    (folder / "val" / "images" / "val_1.JPEG").unlink()
    with pytest.raises(DataError, match=r"1 of 6 images .*train/n1/images/n1_2.JPEG \(.*\).*on_unreadable='skip'"):
        load_tiny_imagenet(folder)
    train, test, _, notes = load_tiny_imagenet(folder, on_unreadable="skip")
    assert train.labels.tolist() == [0, 0, 1, 1, 2] and test.labels.tolist() == [1, 0, 1]
    assert train.ids[1] == "train/n1/images/n1_10.JPEG"
    assert notes == ("1 unreadable images of train were left out", "1 unreadable images of val were left out")
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn9\t0\n")
    with pytest.raises(DataError, match=r"line 1: expected a class of wnids.txt, got 'n9'"):
        load_tiny_imagenet(folder, on_unreadable="skip")
    shutil.rmtree(folder / "train" / "n2")
    with pytest.raises(DataError, match=r"wnids\.txt lists n2"):
        load_tiny_imagenet(folder)


# Digits ---------------------------------------------------------------------------------------------------------------


def test_digits() -> None:
    train, test, val, _ = load_images("digits")
    raw = datasets.load_digits()
    assert (len(train) + len(test), val) == (1797, None) and train.channels == 1 and train.image_size == (8, 8)
    assert test.counts().tolist() == [50] * 10 and train.counts().min() == 124 and train.counts().max() == 133
    assert not set(train.ids) & set(test.ids)
    for part in (train, test):
        rows = [int(i.split("/")[1]) for i in part.ids]
        assert rows == sorted(rows) and part.labels.tolist() == raw.target[rows].tolist()
        assert np.abs(part.images[..., 0].numpy() * (16 / 255) - raw.images[rows]).max() < 0.5 * 16 / 255 + 1e-9
    assert int(train.images.max()) == 255
    other = load_images("digits", test_seed=1).test
    assert other.ids != test.ids and other.counts().tolist() == [50] * 10
    assert load_images("digits").test.checksum() == test.checksum()


def test_resizing_any_source() -> None:
    small, large = load_images("digits").train, load_images("digits", image_size=16).train
    assert large.image_size == (16, 16) and large.ids == small.ids and torch.equal(large.labels, small.labels)
    for i in (0, 100):
        expected = Image.fromarray(small.images[i, ..., 0].numpy()).resize((16, 16), Image.Resampling.BICUBIC)
        assert (np.asarray(expected) == large.images[i, ..., 0].numpy()).all()
    assert load_images("digits", image_size=8).train.checksum() == small.checksum()
