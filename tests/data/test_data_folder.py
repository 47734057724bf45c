"""Anybody's own folder: layouts, image kinds, and everything that can be wrong with one."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from krdistill.data import load_data, load_images
from krdistill.data.decoding import decode, read_headers
from krdistill.errors import ArgumentError, DataError


def noise(side: int = 8, seed: int = 0, channels: int = 3) -> np.ndarray:
    shape = (side, side, channels) if channels > 1 else (side, side)
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def put(path: Path, seed: int = 0, side: int = 8, channels: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(side, seed, channels)).save(path)
    return path


def animals(root: Path, counts: dict[str, int], **options: int) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            put(root / name / f"{i:03}.png", seed=i + 1000 * ord(name[0]), **options)
    return root


# Layouts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [("train", "test"), ("train", "val"), ("Train", "Validation"), ("training", "TEST")])
def test_parts_by_their_usual_names(tmp_path: Path, parts: tuple[str, str]) -> None:
    for seed, (part, n) in enumerate(zip(parts, (3, 2), strict=True)):
        for name in ("cat", "dog"):
            for i in range(n):
                put(tmp_path / part / name / f"{i}.png", seed=10 * seed + i)
    (tmp_path / "notes").mkdir()
    (tmp_path / "README.txt").touch()
    train, test, val, notes = load_images(tmp_path)
    assert train.counts().tolist() == [3, 3] and test.counts().tolist() == [2, 2] and val is None and notes == ()
    assert train.class_names == ("cat", "dog") and train.name == tmp_path.name
    assert train.ids[0] == f"{parts[0]}/cat/0.png" and test.ids[3] == f"{parts[1]}/dog/1.png"
    assert (test.images[3].numpy() == noise(8, 11)).all()


def test_test_and_validation_part(tmp_path: Path) -> None:
    for k, part in enumerate(("train", "test", "val")):
        animals(tmp_path / part, {"cat": 3 - k, "dog": 3 - k})
    train, test, val, _ = load_images(tmp_path)
    assert val is not None and (len(train), len(test), len(val)) == (6, 4, 2)
    assert load_data(tmp_path).split["counts"] == {"train": [3, 3], "val": [1, 1], "test": [2, 2]}
    cut = load_data(tmp_path, profile="exp", imbalance_factor=3).split
    assert cut["n_max"] == 3 and cut["counts"] == {"train": [3, 1], "val": [1, 1], "test": [2, 2]}
    with pytest.raises(ArgumentError, match="validation part of its own"):
        load_data(tmp_path, val_fraction=0.5)
    with pytest.raises(ArgumentError, match="test_fraction does not apply"):
        load_images(tmp_path, test_fraction=0.5)


def test_without_test_part_one_is_put_aside(tmp_path: Path) -> None:
    animals(tmp_path, {"a": 60, "b": 20, "c": 5, "d": 2, "e": 1})
    train, test, val, notes = load_images(tmp_path)
    # 0.2 * 88 / 5 = 3.52, so four of each, but no more than half of a class
    assert test.counts().tolist() == [4, 4, 2, 1, 0] and train.counts().tolist() == [56, 16, 3, 1, 1] and val is None
    assert not set(train.ids) & set(test.ids) and list(train.ids) == sorted(train.ids)
    assert notes == ("11 of 88 images were put aside as test part", "no test image, since there is only one image: e")
    assert load_images(tmp_path).test.ids == test.ids
    assert load_images(tmp_path, test_seed=1).test.ids != test.ids
    assert load_images(tmp_path, test_fraction=0.5).test.counts().tolist() == [9, 9, 2, 1, 0]


def test_one_more_image_leaves_the_rest_of_the_test_part_alone(tmp_path: Path) -> None:
    animals(tmp_path, {"a": 40, "b": 40})
    before = set(load_images(tmp_path).test.ids)
    put(tmp_path / "a" / "new.png")
    after = set(load_images(tmp_path).test.ids)
    assert len(after) == 16 and len(before - after) <= 1


def test_test_part_of_a_folder_does_not_depend_on_where_it_lies(tmp_path: Path) -> None:
    animals(tmp_path / "here", {"a": 10, "b": 10})
    first = load_data(tmp_path / "here").split["checksum"]
    (tmp_path / "here").rename(tmp_path / "there")
    assert load_data(tmp_path / "there").split["checksum"] == first


def test_deep_folders_links_and_clutter(tmp_path: Path) -> None:
    root = tmp_path / "own"
    put(root / "cat" / "2020" / "may" / "1.png", seed=1)
    put(root / "cat" / "2.png", seed=2)
    put(root / "dog" / "1.png", seed=3)
    put(tmp_path / "elsewhere" / "9.png", seed=4)
    put(root / "dog" / ".hidden.png")
    put(root / "dog" / ".cache" / "3.png")
    put(root / ".git" / "x" / "1.png")
    for name in ("Thumbs.db", ".DS_Store", "labels.csv", "NOTES"):
        (root / "dog" / name).write_text("text")
    os.symlink(tmp_path / "elsewhere" / "9.png", root / "dog" / "linked.png")
    os.symlink(tmp_path / "elsewhere", root / "cat" / "linked")
    os.symlink(root / "cat", root / "cat" / "loop")
    train, test, _, notes = load_images(root, test_fraction=0.01)
    ids = sorted((*train.ids, *test.ids))
    assert ids == ["cat/2.png", "cat/2020/may/1.png", "cat/linked/9.png", "dog/1.png", "dog/linked.png"]
    assert any("passed over (1 without suffix, 1 .csv)" in note for note in notes)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    animals(tmp_path, {"plane": 4, "train": 4})
    assert load_images(tmp_path).train.class_names == ("plane", "train")


def test_paths_as_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    animals(tmp_path / "own", {"a": 3, "b": 3})
    animals(tmp_path / "digits", {"a": 3, "b": 3})
    monkeypatch.chdir(tmp_path)
    for source in ("own", "./own", "own/", str(tmp_path / "own"), tmp_path / "own"):
        assert load_images(source).train.class_names == ("a", "b")
    assert load_images("digits").train.num_classes == 10 and load_images("./digits").train.num_classes == 2
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_images("~/own").train.name == "own"


# Image kinds ----------------------------------------------------------------------------------------------------------


def read(path: Path, channels: int = 3, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    pixels, failures = decode([path], size=size, channels=channels)
    assert not failures, failures
    return pixels[0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    path = tmp_path / f"turned.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise(16, 5)[:8]).save(path, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(path))
    (header,), failures = read_headers([path])
    assert header is not None and not failures and header.size == (expected.height, expected.width)
    assert (read(path, size=header.size) == np.asarray(expected)).all()


def test_every_kind_of_image_becomes_rgb(tmp_path: Path) -> None:
    base = Image.fromarray(noise(8, 1))
    kinds = {
        "rgb.png": base,
        "grey.png": base.convert("L"),
        "bit.png": base.convert("1"),
        "palette.png": base.quantize(16),
        "palette.gif": base.quantize(16),
        "cmyk.jpg": base.convert("CMYK"),
        "plain.bmp": base,
        "plain.ppm": base,
        "plain.tif": base,
        "lossless.webp": base,
    }
    for name, image in kinds.items():
        image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        pixels = read(tmp_path / name)
        assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
        assert (pixels == np.asarray(Image.open(tmp_path / name).convert("RGB"))).all()
    assert (read(tmp_path / "rgb.png") == noise(8, 1)).all()


def test_transparent_parts_become_white(tmp_path: Path) -> None:
    pixels = noise(8, 2, 4)
    pixels[:4, :, 3], pixels[4:, :, 3] = 0, 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    seen = read(tmp_path / "a.png")
    assert (seen[:4] == 255).all() and (seen[4:] == pixels[4:, :, :3]).all()
    pixels[..., 3] = 128
    Image.fromarray(pixels).save(tmp_path / "half.png")
    expected = pixels[..., :3] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(read(tmp_path / "half.png") - expected).max() <= 1
    palette = Image.fromarray(noise(8, 3)).quantize(8)
    palette.save(tmp_path / "p.png", transparency=0)
    index = np.asarray(palette)
    seen = read(tmp_path / "p.png")
    assert (seen[index == 0] == 255).all()
    assert (seen[index != 0] == np.asarray(palette.convert("RGB"))[index != 0]).all()
    Image.merge("LA", (Image.new("L", (8, 8), 9), Image.new("L", (8, 8), 0))).save(tmp_path / "la.png")
    assert (read(tmp_path / "la.png", 1) == 255).all()


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, name: str) -> None:
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    if name.endswith("pgm"):
        (tmp_path / name).write_bytes(b"P5 8 8 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(tmp_path / name)
    seen = read(tmp_path / name, 1)[..., 0]
    assert np.abs(seen - values / 257.0).max() <= 0.5
    (header,), _ = read_headers([tmp_path / name])
    assert header is not None and header.grey
    assert (read(tmp_path / name, 3)[..., 2] == seen).all()


def test_grey_only_if_all_are(tmp_path: Path) -> None:
    animals(tmp_path / "grey", {"a": 4, "b": 4}, channels=1)
    assert load_images(tmp_path / "grey").train.channels == 1
    put(tmp_path / "grey" / "b" / "colour.png")
    assert load_images(tmp_path / "grey").train.channels == 3


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.fromarray(noise(8, i)).quantize(16) for i in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (read(tmp_path / "a.gif") == np.asarray(Image.open(tmp_path / "a.gif").convert("RGB"))).all()


def test_image_size_scales_and_crops_the_centre(tmp_path: Path) -> None:
    stripes = np.zeros((40, 120, 3), np.uint8)
    stripes[:, :40], stripes[:, 40:80], stripes[:, 80:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.fromarray(stripes if i else stripes.transpose(1, 0, 2)).save(tmp_path / name / f"{i}.png")
    train, test, *_ = load_images(tmp_path, image_size=20)
    for part in (train, test):
        assert part.image_size == (20, 20)
        assert (part.images[:, 2:-2, 2:-2].float().mean((0, 1, 2)).round() == part.images.new_tensor([0, 255, 0])).all()


def test_large_jpegs_scaled_down_stay_close_to_the_slow_way(tmp_path: Path) -> None:
    blocks = np.random.RandomState(0).randint(0, 256, (20, 27, 3)).astype(np.uint8)
    path = tmp_path / "photo.jpg"
    Image.fromarray(blocks.repeat(45, 0).repeat(45, 1)).save(path, quality=95)
    pixels, failures = decode([path], size=(64, 64), channels=3, resize=True)
    slow = ImageOps.fit(Image.open(path).convert("RGB"), (64, 64), Image.Resampling.BICUBIC)
    difference = np.abs(pixels[0].astype(int) - np.asarray(slow))
    assert not failures and difference.mean() < 1.5 and difference.max() < 25


def test_threads_give_what_one_gives(tmp_path: Path) -> None:
    paths = [put(tmp_path / f"{i}.png", seed=i, side=100) for i in range(150)]
    (tmp_path / "77.png").write_bytes(b"nothing")
    pixels, failures = decode(paths, size=(100, 100), channels=3)
    assert set(failures) == {77} and (pixels[77] == 0).all()
    assert all((pixels[i] == noise(100, i)).all() for i in range(150) if i != 77)


# What is wrong with it ------------------------------------------------------------------------------------------------


def damaged(root: Path) -> Path:
    animals(root, {"cat": 4, "dog": 4}, side=32)
    whole = (root / "cat" / "000.png").read_bytes()
    (root / "cat" / "empty.png").write_bytes(b"")
    (root / "cat" / "half.png").write_bytes(whole[: len(whole) // 2])
    (root / "dog" / "text.jpg").write_text("<html>404</html>")
    os.symlink(root / "nowhere.png", root / "dog" / "gone.png")
    return root


def test_unreadable_images_are_all_listed(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_images(damaged(tmp_path))
    message = str(caught.value)
    assert "3 of 12 images" in message and "on_unreadable='skip'" in message
    for part in ("cat/empty.png (empty file)", "dog/text.jpg (no image format", "dog/gone.png (no such file"):
        assert part in message
    (tmp_path / "cat" / "empty.png").unlink()
    (tmp_path / "dog" / "text.jpg").unlink()
    (tmp_path / "dog" / "gone.png").unlink()
    with pytest.raises(DataError, match=r"1 of 9 images .*cat/half.png \(.*truncated"):
        load_images(tmp_path)


def test_unreadable_images_are_skipped_on_request_only(tmp_path: Path) -> None:
    bundle = load_data(damaged(tmp_path), on_unreadable="skip")
    assert len(bundle.train) + len(bundle.test) == 8
    assert any("4 unreadable images were left out: cat/empty.png, cat/half.png" in n for n in bundle.split["notes"])
    assert bundle.split["on_unreadable"] == "skip"
    clean = animals(tmp_path.parent / f"{tmp_path.name}-clean", {"cat": 4, "dog": 4}, side=32)
    assert bundle.train.checksum() == load_images(clean).train.checksum()


def test_many_unreadable_images_are_counted(tmp_path: Path) -> None:
    animals(tmp_path, {"a": 2, "b": 2})
    for i in range(9):
        (tmp_path / "a" / f"bad{i}.jpg").write_text("x")
    with pytest.raises(DataError, match=r"9 of 13 images .*bad4.jpg \(.*\) and 4 more\."):
        load_images(tmp_path)
    for path in tmp_path.glob("*/*.png"):
        path.write_text("x")
    with pytest.raises(DataError, match="13 of 13 images"):
        load_images(tmp_path, on_unreadable="skip")


def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    animals(tmp_path, {"a": 2, "b": 2})
    put(tmp_path / "a" / "big.png", side=64)
    for limit in (3000, 1000):  # Pillow warns above the limit and refuses above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match=rf"a/big.png \(more than {limit:,} pixels\)"):
            load_images(tmp_path, image_size=8)


def test_floating_point_images_are_refused_with_a_reason(tmp_path: Path) -> None:
    animals(tmp_path, {"a": 2, "b": 2})
    Image.fromarray(np.random.RandomState(0).rand(8, 8).astype(np.float32)).save(tmp_path / "a" / "f.tiff")
    with pytest.raises(DataError, match="32-bit pixels have no fixed range"):
        load_images(tmp_path)


def test_different_sizes_ask_for_image_size(tmp_path: Path) -> None:
    animals(tmp_path, {"a": 3, "b": 3})
    put(tmp_path / "b" / "z.png", side=9)
    with pytest.raises(DataError, match=r"different sizes: 8x8 \(6\), 9x9 \(1\)\. Set image_size"):
        load_images(tmp_path)
    for i in range(10, 16):
        put(tmp_path / "b" / f"z{i}.png", side=i)
    with pytest.raises(DataError, match="and 4 more sizes"):
        load_images(tmp_path)
    assert load_images(tmp_path, image_size=8).train.image_size == (8, 8)


def test_too_large_for_memory(tmp_path: Path) -> None:
    animals(tmp_path, {"a": 2, "b": 2})
    with pytest.raises(DataError, match=r"take .* GiB, and this machine has .* Set a smaller image_size"):
        load_images(tmp_path, image_size=2_000_000, cache="never")


def nothing(root: Path) -> None:
    root.mkdir()


def loose(root: Path) -> None:
    put(root / "1.png")
    put(root / "2.png")


def one_class(root: Path) -> None:
    animals(root, {"only": 3})


def no_images(root: Path) -> None:
    (root / "a").mkdir(parents=True)
    (root / "b").mkdir()


def foreign(root: Path) -> None:
    animals(root, {"a": 3, "b": 0})
    (root / "b" / "1.heic").touch()
    (root / "b" / "README").touch()


def lacks_train(root: Path) -> None:
    animals(root / "test", {"a": 2, "b": 2})


def two_tests(root: Path) -> None:
    for part in ("train", "test", "testing"):
        animals(root / part, {"a": 2, "b": 2})


def parts_and_classes(root: Path) -> None:
    animals(root / "train", {"a": 2, "b": 2})
    animals(root, {"c": 2})


def other_classes(root: Path) -> None:
    animals(root / "train", {"cat": 2, "dog": 2, "eel": 2})
    animals(root / "test", {"Cat": 2, "dog": 2, "eel": 1})


def empty_test(root: Path) -> None:
    animals(root / "train", {"a": 2, "b": 2})
    animals(root / "test", {"a": 0, "b": 0})


def single_images(root: Path) -> None:
    animals(root, {"a": 1, "b": 1})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nothing, "at least two class folders .* got 0\\."),
        (loose, "got 0 and 2 images outside of any"),
        (one_class, "got 1\\."),
        (no_images, "holds no images"),
        (foreign, r"b holds no images, only \*\.heic, README; known suffixes are .*\.jpg"),
        (lacks_train, "has test/ but no train/"),
        (two_tests, "two test parts, test and testing"),
        (parts_and_classes, "has train/ with folders in it, and images in c too"),
        (other_classes, "different class folders: cat only in .*train; Cat only in .*test. .*empty folder"),
        (empty_test, "test holds no images"),
        (single_images, "no class has two images"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "own")
    with pytest.raises(DataError, match=message):
        load_images(tmp_path / "own")


def test_paths_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere is not there; expected a folder"):
        load_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is a file"):
        load_images(put(tmp_path / "a.png"))
    animals(tmp_path / "own", {"a": 2, "b": 2})
    for fraction in (0, 1, -0.1, 1.5):
        with pytest.raises(ArgumentError, match="test_fraction between 0 and 1"):
            load_images(tmp_path / "own", test_fraction=fraction)


def test_classes_without_test_images_are_allowed_by_an_empty_folder(tmp_path: Path) -> None:
    animals(tmp_path / "train", {"a": 2, "b": 2})
    animals(tmp_path / "test", {"a": 2, "b": 0})
    assert load_images(tmp_path).test.counts().tolist() == [2, 0]


def test_empty_classes_are_an_error_or_dropped(tmp_path: Path) -> None:
    animals(tmp_path / "train", {"a": 3, "b": 0, "c": 2})
    animals(tmp_path / "test", {"a": 2, "b": 2, "c": 1})
    with pytest.raises(DataError, match=r"no training image of 1 of 3 classes: b\. .*empty='drop'"):
        load_data(tmp_path)
    bundle = load_data(tmp_path, empty="drop")
    assert bundle.class_names == ("a", "c") and bundle.split["dropped_classes"] == ["b"]
    assert bundle.split["counts"] == {"train": [3, 2], "val": None, "test": [2, 1]}
    assert bundle.test.ids == ("test/a/000.png", "test/a/001.png", "test/c/000.png")
    with pytest.raises(ArgumentError, match="'error' or 'drop'"):
        load_data(tmp_path, empty="keep")


# Files from the wild: each is named with its reason, and the rest is not lost -----------------------------------------


def bomb(path: Path) -> None:
    """A PNG of a few bytes whose header promises 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")))


def truncated(path: Path) -> None:
    Image.fromarray(noise(64, 1)).save(path)
    path.write_bytes(path.read_bytes()[:-200])


def loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("cache", ["never", "always"])
@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("bomb.png", bomb, "more than 89,478,485 pixels"),
        ("cut off.jpg", truncated, "truncated"),
        ("schleife ü.png", loop, "too many levels of symbolic links"),
        ("pdf.jpg", lambda path: path.write_bytes(b"%PDF-1.7\n"), "no image format that Pillow knows"),
        ("bits.png", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40)), ""),
    ],
)
def test_one_bad_file_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, make: Any, reason: str, cache: Any
) -> None:
    monkeypatch.setenv("KRDISTILL_CACHE", str(tmp_path / "cache"))
    root = animals(tmp_path / "set", {"a b": 4, "日本": 4})
    make(root / "a b" / name)
    with pytest.raises(DataError, match=rf"1 of 9 images in .* cannot be read: a b/{name} \(.*{reason}.*on_unreadable"):
        load_images(root, image_size=8, cache=cache)
    loaded = load_images(root, image_size=8, on_unreadable="skip", cache=cache)
    assert len(loaded.train) + len(loaded.test) == 8 and any(f"left out: a b/{name}" in n for n in loaded.notes)


def test_folders_linked_in_a_ring(tmp_path: Path) -> None:
    animals(tmp_path / "set", {"a": 4, "b": 4})
    (tmp_path / "set" / "a" / "up").symlink_to(tmp_path / "set" / "a")
    (tmp_path / "set" / "b" / "self").symlink_to("self")
    loaded = load_images(tmp_path / "set")
    assert len(loaded.train) + len(loaded.test) == 8 and any(
        "passed over (1 without suffix)" in n for n in loaded.notes
    )
