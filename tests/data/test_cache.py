"""Images decoded once into a memory-mapped file: the same as in memory, whatever happens on the way."""

from __future__ import annotations

import copy
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from krdistill.config import DataConfig
from krdistill.data import cache, load_data, load_images
from krdistill.data import listing as listing_module
from krdistill.data.cache import DIGESTS, IMAGES, META, PROGRESS, MappedImages, build_cache, cache_key, open_cache
from krdistill.data.containers import ImageData
from krdistill.data.decoding import decode
from krdistill.data.folder import load_folder
from krdistill.errors import ArgumentError, DataError
from krdistill.stages import load_configured_data

SIDE = 1024  # of which a chunk holds two colour images, or eight grey ones


def save(path: Path, seed: int, size: tuple[int, int] = (11, 9), channels: int = 3, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], channels) if channels > 1 else (size[1], size[0])
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)).save(path, **options)
    return path


def mixed(root: Path, per_class: int = 8) -> Path:
    """Class folders with names of every kind, JPEG and PNG, of all sizes, some grey, one of each EXIF orientation."""
    for k, name in enumerate(("Straßen bahn", "猫 cat", "épée")):
        for i in range(per_class):
            exif = Image.Exif()
            exif[0x0112] = i % 8 + 1
            suffix, channels = ("jpg", "PNG")[i % 2], (3, 3, 1)[i % 3]
            stem = f"zwei\r\nzeilen {i}" if i == 5 else f"bild {i} ü"
            save(root / name / f"{stem}.{suffix}", 100 * k + i, (20 + i, 30 - 2 * k), channels, exif=exif)
    return root


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def icons(root: Path, count: int) -> list[Path]:
    return [save(root / f"{i:03}.png", i) for i in range(count)]


def build(folder: Path, paths: list[Path], **options: Any) -> cache.Cache:
    return build_cache(folder, paths, **{"size": (SIDE, SIDE), "channels": 3, "resize": True, "workers": 0, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# The same as in memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_cache_equals_memory(tmp_path: Path, workers: int) -> None:
    root = mixed(tmp_path / "set")
    options: dict[str, Any] = {"image_size": 16, "cache_folder": tmp_path / "cache", "workers": workers}
    there = load_folder(root, cache="never", **options)
    assert not (tmp_path / "cache").exists()
    mapped = load_folder(root, cache="always", **options)
    again = load_folder(root, cache="always", **options)
    for part in ("train", "test"):
        expected = getattr(there, part)
        for data in (getattr(mapped, part), getattr(again, part)):
            assert isinstance(data.images, MappedImages) and data.images.device.type == "cpu"
            assert torch.equal(data.images, expected.images) and torch.equal(data.labels, expected.labels)
            assert data.ids == expected.ids and data.class_names == expected.class_names
            assert data.checksum() == expected.checksum()
    assert mapped.notes == there.notes and len(there.train) + len(there.test) == 24


def test_every_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    paths = icons(tmp_path / "set", 9)
    truncate(paths[4])
    for workers in (0, 1, 3):
        build(tmp_path / str(workers), paths, workers=workers)
    first = contents(tmp_path / "0")
    assert set(first) == {IMAGES, DIGESTS, META} and len(first[IMAGES]) == 9 * 3 * SIDE**2
    assert contents(tmp_path / "1") == contents(tmp_path / "3") == first
    pixels, failures = decode(paths, size=(SIDE, SIDE), channels=3, resize=True)
    assert first[IMAGES] == pixels.tobytes() and list(failures) == [4]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"val_fraction": 0.3},
        {"profile": "exp", "imbalance_factor": 3, "val_per_class": 1},
        {"image_size": None},
        {"test_fraction": 0.4, "test_seed": 3},
    ],
)
def test_splits_do_not_depend_on_the_cache(tmp_path: Path, monkeypatch: Any, options: dict[str, Any]) -> None:
    monkeypatch.setenv("KRDISTILL_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "set"
    for k, name in enumerate("abc"):
        for i in range(10):
            save(root / name / f"{i}.png", 10 * k + i)
    save(root / "a" / "x.png", 99, (300, 400) if "image_size" not in options else (11, 9))
    truncate(root / "a" / "3.png")
    (root / "b" / "4.png").write_bytes(b"")
    options = {"image_size": 12, "on_unreadable": "skip", **options}
    mapped, memory = (load_data(root, cache=use, **options) for use in ("always", "never"))
    assert mapped.split == memory.split and any("2 unreadable" in note for note in memory.split["notes"])
    for part in ("train", "val", "test"):
        ours, theirs = getattr(mapped, part), getattr(memory, part)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert isinstance(ours.images, MappedImages) and torch.equal(ours.images, theirs.images)
            assert ours.checksum() == theirs.checksum()
    assert torch.equal(mapped.train.keep_classes([2, 0]).images, memory.train.keep_classes([2, 0]).images)
    assert isinstance(mapped.train.keep_classes([2, 0]).images, MappedImages)
    assert len(list((tmp_path / "cache").glob("*.lock"))) == 1


def test_parts_with_a_validation_part_share_one_cache(tmp_path: Path) -> None:
    for seed, part in enumerate(("train", "test", "val")):
        for name in ("cat", "dog"):
            save(tmp_path / "set" / part / name / "1.png", seed, channels=1)
    loaded = load_folder(tmp_path / "set", cache="always", cache_folder=tmp_path / "cache", workers=0)
    memory = load_folder(tmp_path / "set", cache="never")
    assert loaded.val is not None and memory.val is not None and loaded.val.channels == 1
    for part in ("train", "test", "val"):
        assert torch.equal(getattr(loaded, part).images, getattr(memory, part).images)
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def test_unreadable_files_as_without_a_cache(tmp_path: Path) -> None:
    root = mixed(tmp_path / "set")
    truncate(root / "猫 cat" / "bild 2 ü.jpg")
    said = []
    for use in ("never", "always", "always"):
        with pytest.raises(DataError, match=r"1 of 24 images .*bild 2 ü\.jpg \(image file is truncated") as caught:
            load_folder(root, image_size=16, cache=use, cache_folder=tmp_path / "cache", workers=0)
        said.append(str(caught.value))
    assert said[1] == said[2] and said[1].startswith(said[0]) and str(tmp_path / "cache") in said[1]
    (root / "épée" / "bild 0 ü.jpg").write_bytes(b"no image")  # its first bytes say so, before anything is decoded
    found = {path.name for path in (tmp_path / "cache").iterdir()}
    with pytest.raises(DataError, match=r"1 of 24 images .*épée/bild 0 ü\.jpg \(no image format that Pillow knows\)"):
        load_folder(root, image_size=16, cache="always", cache_folder=tmp_path / "cache", workers=0)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == found
    loaded = load_folder(root, image_size=16, cache="always", cache_folder=tmp_path / "cache", on_unreadable="skip")
    assert len(loaded.train) + len(loaded.test) == 22
    for path in root.rglob("*.*"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="24 of 24 images"):
        load_folder(root, image_size=16, cache="always", cache_folder=tmp_path / "cache", on_unreadable="skip")


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_names_that_are_no_text(tmp_path: Path) -> None:
    for name in (b"a", b"\xff b"):
        for i in range(3):
            save(tmp_path / "set" / os.fsdecode(name) / os.fsdecode(b"\xfe%d.png" % i), i)
    truncate(tmp_path / "set" / "a" / os.fsdecode(b"\xfe2.png"))
    loaded, memory = (
        load_folder(tmp_path / "set", cache=use, cache_folder=tmp_path / "cache", workers=1, on_unreadable="skip")
        for use in ("always", "never")
    )
    assert loaded.train.checksum() == memory.train.checksum() and len(loaded.train) + len(loaded.test) == 5


# When it is used ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [None, 10])
def test_auto_goes_by_the_decoded_size(tmp_path: Path, monkeypatch: Any, image_size: int | None) -> None:
    monkeypatch.setenv("KRDISTILL_CACHE", str(tmp_path / "cache"))
    for name in "ab":
        for i in range(3):
            save(tmp_path / "set" / name / f"{i}.png", i, (10, 10), 1)
    monkeypatch.setattr(listing_module, "CACHE_ABOVE", 600)
    assert type(load_images(tmp_path / "set", image_size=image_size).train.images) is torch.Tensor
    monkeypatch.setattr(listing_module, "CACHE_ABOVE", 599)
    assert isinstance(load_images(tmp_path / "set", image_size=image_size).train.images, MappedImages)
    never = load_images(tmp_path / "set", image_size=image_size, cache="never")
    assert type(never.train.images) is torch.Tensor


def test_configured(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("KRDISTILL_CACHE", str(tmp_path / "cache"))
    root = mixed(tmp_path / "set")
    told: list[tuple[int, int]] = []
    config = DataConfig(source=str(root), image_size=16, cache="always")
    bundle = load_configured_data(config, lambda done, total: told.append((done, total)))
    assert isinstance(bundle.train.images, MappedImages) and told[-1] == (24, 24)
    assert DataConfig().cache == "auto"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "sometimes"}, "cache to be 'auto', 'always' or 'never', got 'sometimes'"),
        ({"workers": -1}, "workers to be a whole number"),
        ({"workers": 1.5}, "workers to be a whole number"),
    ],
)
def test_wrong_arguments(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        load_folder(mixed(tmp_path, 1), **options)


def test_sources_in_memory_have_no_cache() -> None:
    with pytest.raises(ArgumentError, match="'always' does not apply to digits"):
        load_images("digits", cache="always")


def test_key(tmp_path: Path) -> None:
    paths = icons(tmp_path / "set", 3)
    ids = [path.name for path in paths]
    keys = {cache_key(paths, ids, 16)}
    assert keys == {cache_key(paths, ids, 16)} and len(next(iter(keys))) == 64
    shutil.copytree(tmp_path / "set", tmp_path / "moved")  # copies the times too
    assert {cache_key([tmp_path / "moved" / name for name in ids], ids, 16)} == keys
    keys |= {cache_key(paths, ids, 17), cache_key(paths, ids, None), cache_key(paths[:2], ids[:2], 16)}
    keys.add(cache_key(paths, ["a.png", *ids[1:]], 16))
    os.utime(paths[1], ns=(0, 1))
    keys.add(cache_key(paths, ids, 16))
    paths[2].write_bytes(b"other")
    keys.add(cache_key(paths, ids, 16))
    paths[2].unlink()
    keys.add(cache_key(paths, ids, 16))
    assert len(keys) == 8


def test_cache_root(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("KRDISTILL_CACHE", "~/here")
    assert cache.cache_root() == Path.home() / "here" and cache.cache_root(tmp_path) == tmp_path
    monkeypatch.delenv("KRDISTILL_CACHE")
    assert cache.cache_root() == Path.home() / ".cache" / "krdistill" / "images"


# The disk -------------------------------------------------------------------------------------------------------------


def test_no_room(tmp_path: Path) -> None:
    paths = icons(tmp_path / "set", 2)
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(
        DataError, match=r"2 images of 1024x1024x3, decoded, take 6\.0 MiB in .* are free and .* are to"
    ) as e:
        build(tmp_path / "cache" / "x", paths, reserve=free - 2**20)
    for advice in ("KRDISTILL_CACHE", "image_size", "cache='never'"):
        assert advice in str(e.value)
    assert not (tmp_path / "cache" / "x").exists()
    assert len(build(tmp_path / "cache" / "x", paths, reserve=0).images) == 2


def test_no_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"could not be kept in .*file/cache/x: .* KRDISTILL_CACHE"):
        build(tmp_path / "file" / "cache" / "x", icons(tmp_path / "set", 2))


def test_full_disk_is_an_error_and_nothing_is_lost(tmp_path: Path) -> None:
    paths = icons(tmp_path / "set", 8)
    code = f"""
import resource, signal
from pathlib import Path
from krdistill.data.cache import build_cache
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def limit(done, total):
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000_000, resource.RLIM_INFINITY))
build_cache(Path({str(tmp_path / "cache")!r}), sorted(Path({str(tmp_path / "set")!r}).iterdir()),
            size=({SIDE}, {SIDE}), channels=3, resize=True, workers=0, on_progress=limit)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode and "File too large. What is finished is kept" in done.stderr, done.stderr
    told: list[int] = []
    build(tmp_path / "cache", paths, on_progress=lambda done, total: told.append(done))
    assert told == [4, 6, 8]
    build(tmp_path / "clean", paths)
    assert contents(tmp_path / "cache") == contents(tmp_path / "clean")


# Interrupted and damaged ----------------------------------------------------------------------------------------------


BUILDER = """
import time
from pathlib import Path
from krdistill.data.cache import build_cache
def tell(done, total):
    print(done, flush=True)
    if done >= {stop}:
        time.sleep(60)
build_cache(Path({folder!r}), sorted(Path({images!r}).iterdir()),
            size=({side}, {side}), channels=3, resize=True, workers={workers}, on_progress=tell)
"""


def builder(folder: Path, images: Path, workers: int, stop: int = 10**9) -> subprocess.Popen[str]:
    code = BUILDER.format(images=str(images), folder=str(folder), workers=workers, stop=stop, side=SIDE)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed(tmp_path: Path, workers: int) -> None:
    paths = icons(tmp_path / "set", 24)
    build(tmp_path / "clean", paths)
    process = builder(tmp_path / "cache", tmp_path / "set", workers, stop=6)
    assert process.stdout is not None
    while process.stdout.readline().strip() != "6":
        pass
    started = children(process.pid) if sys.platform == "linux" else []
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    lines = (tmp_path / "cache" / PROGRESS).read_text().splitlines()[1:]
    finished = {json.loads(line)["chunk"] for line in lines}
    assert len(finished) == 3 and open_cache(tmp_path / "cache") is None
    for chunk in finished:  # whoever decodes them again would see it
        for path in paths[2 * chunk : 2 * chunk + 2]:
            path.write_bytes(b"changed")
    told: list[int] = []
    resumed = build(tmp_path / "cache", paths, on_progress=lambda done, total: told.append(done))
    assert told == list(range(8, 25, 2)) and not resumed.unreadable
    assert contents(tmp_path / "cache") == contents(tmp_path / "clean")
    assert bool(started) == (workers > 0 and sys.platform == "linux")
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() and "Z" not in _state(pid) for pid in started):
        assert time.monotonic() < deadline, "processes of the killed one go on"
        time.sleep(0.05)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


def test_stopped_at_any_byte_of_the_journal(tmp_path: Path) -> None:
    paths = icons(tmp_path / "set", 6)
    truncate(paths[3])
    states: list[dict[str, bytes]] = []
    build(tmp_path / "clean", paths, on_progress=lambda done, total: states.append(contents(tmp_path / "clean")))
    clean, journal = contents(tmp_path / "clean"), states[-1][PROGRESS]
    starts = [0, *(i + 1 for i, byte in enumerate(journal) if byte == 10)]
    assert len(starts) == 5 and starts[-1] == len(journal)
    for line, (start, end) in enumerate(itertools.pairwise(starts)):
        for cut in {start, start + 1, (start + end) // 2, end - 1}:
            folder = tmp_path / f"{cut}"
            folder.mkdir()
            (folder / PROGRESS).write_bytes(journal[:cut])
            done = 2 * 3 * SIDE**2 * max(0, line - 1)  # what no line speaks for may be anything
            (folder / IMAGES).write_bytes(clean[IMAGES][:done] + b"\xaa" * (len(clean[IMAGES]) - done))
            told: list[int] = []
            build(folder, paths, on_progress=lambda done, total, told=told: told.append(done))
            assert contents(folder) == clean and told == [2, 4, 6][max(0, line - 1) :]
            shutil.rmtree(folder)
    for name in (DIGESTS, META):  # between the last chunk and the end
        folder = tmp_path / "end"
        shutil.copytree(tmp_path / "clean", folder)
        (folder / PROGRESS).write_bytes(journal)
        if name == DIGESTS:
            (folder / META).unlink()
        told = []
        build(folder, paths, on_progress=lambda done, total, told=told: told.append(done))
        assert told == [] and {**contents(folder), PROGRESS: b""} == {**clean, PROGRESS: b""}
        shutil.rmtree(folder)


def shorten(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 1)


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def half_meta_and_a_foreign_journal(folder: Path) -> None:
    truncate(folder / META)
    (folder / PROGRESS).write_text('{"format": 1}\n')


@pytest.mark.parametrize(
    "damage",
    [
        shorten(IMAGES),
        shorten(DIGESTS),
        lambda folder: (folder / IMAGES).unlink(),
        lambda folder: (folder / DIGESTS).unlink(),
        lambda folder: (folder / META).unlink(),
        write(META, ""),
        write(META, "[1]"),
        write(META, '{"format": 1, "shape": []}'),
        write(META, '{"format": 1, "shape": [3, 4], "unreadable": {}}'),
        write(META, '{"format": 0, "shape": [4, 1024, 1024, 3], "unreadable": {}}'),
        write(META, '{"format": 1, "shape": [4, 1024, 1024, 3], "unreadable": {"x": 1}}'),
        half_meta_and_a_foreign_journal,
    ],
)
def test_damaged_is_made_again(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    paths = icons(tmp_path / "set", 4)
    build(tmp_path / "cache", paths)
    clean = contents(tmp_path / "cache")
    damage(tmp_path / "cache")
    assert open_cache(tmp_path / "cache") is None
    told: list[int] = []
    build(tmp_path / "cache", paths, on_progress=lambda done, total: told.append(done))
    assert told == [2, 4] and contents(tmp_path / "cache") == clean
    build(tmp_path / "cache", paths, on_progress=lambda done, total: told.append(done))
    assert told == [2, 4]


def test_two_at_once(tmp_path: Path) -> None:
    paths = icons(tmp_path / "set", 16)
    processes = [builder(tmp_path / "cache", tmp_path / "set", workers) for workers in (0, 1)]
    said = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert min(said) == [] and list(map(int, max(said))) == list(range(2, 17, 2))
    build(tmp_path / "clean", paths)
    assert contents(tmp_path / "cache") == contents(tmp_path / "clean")


def test_a_script_without_main_guard_runs_once(tmp_path: Path) -> None:
    mixed(tmp_path / "set")
    script = tmp_path / "script.py"
    script.write_text(
        "print('top')\nfrom krdistill.data.folder import load_folder\n"
        f"data = load_folder({str(tmp_path / 'set')!r}, image_size=16, cache='always', workers=2, "
        f"cache_folder={str(tmp_path / 'cache')!r})\nprint(len(data.train))\nimport __main__\nassert __main__.data\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.split()[0] == "top" and done.stdout.count("top") == 1, done.stderr


def test_a_worker_that_dies(tmp_path: Path) -> None:
    paths = icons(tmp_path / "set", 40)

    def kill(done: int, total: int) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    with pytest.raises(DataError, match=r"process that decodes images for .* died.* run it again"):
        build(tmp_path / "cache", paths, workers=1, on_progress=kill)
    told: list[int] = []
    build(tmp_path / "cache", paths, on_progress=lambda done, total: told.append(done))
    assert 4 <= told[0] < told[-1] == 40


def test_daemons_decode_by_themselves(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(cache.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    assert len(build(tmp_path / "cache", icons(tmp_path / "set", 2), workers=2).images) == 2


# Mapped images --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> tuple[MappedImages, torch.Tensor]:
    paths = icons(tmp_path / "set", 12)
    mapped = build(tmp_path / "cache", paths, size=(6, 7)).images
    return mapped, torch.from_numpy(decode(paths, size=(6, 7), channels=3, resize=True)[0])


@pytest.mark.parametrize("rows", [None, [3, 4, 5, 6], [9, 2, 2, 7, 0]])
def test_mapped_images_are_a_tensor(pair: tuple[MappedImages, torch.Tensor], rows: list[int] | None) -> None:
    mapped, plain = pair
    if rows is not None:
        mapped, plain = mapped.select_rows(torch.tensor(rows)), plain[rows]
    n = len(plain)
    assert mapped.shape == plain.shape and mapped.dtype == torch.uint8 and mapped.ndim == 4 and len(mapped) == n
    index = torch.tensor([2, 0, 3, 3])
    mask = torch.arange(n) % 2 == 1
    for item in (
        0,
        -1,
        np.int64(2),
        slice(1, 3),
        slice(None),
        slice(0, 0),
        index,
        [1, 2],
        index.numpy(),
        mask,
        (0, 1),
        (..., 2),
    ):
        got = mapped[item]
        assert type(got) is torch.Tensor and torch.equal(got, plain[item]), item
    assert torch.equal(mapped[index.view(2, 2)], plain[index.view(2, 2)])
    assert torch.equal(mapped[1:3, :, 2], plain[1:3, :, 2])
    assert torch.equal(mapped, plain) and torch.equal(mapped.permute(0, 3, 1, 2), plain.permute(0, 3, 1, 2))
    assert (mapped.numpy() == plain.numpy()).all() and float(mapped.float().mean()) == float(plain.float().mean())
    assert all(torch.equal(a, b) for a, b in zip(mapped, plain, strict=True))
    for size in (1, 3, 100):
        assert all(torch.equal(a, b) for a, b in zip(mapped.split(size), plain.split(size), strict=True))
    assert torch.equal(mapped.split([2, n - 2])[1], plain[2:])
    assert torch.equal(torch.cat([mapped, mapped.flip(0)]), torch.cat([plain, plain.flip(0)]))
    assert torch.equal(mapped.select_rows(index)[1:], plain[index][1:])
    assert torch.equal(pickle.loads(pickle.dumps(mapped)), plain) and len(pickle.dumps(mapped)) < 2000
    assert copy.deepcopy(mapped) is mapped and repr(mapped) == f"MappedImages({n}, 6, 7, 3)"
    with pytest.raises(IndexError):
        mapped[n]
    labels = torch.zeros(n, dtype=torch.int64)
    named = [ImageData(x, labels, ("a",), tuple(map(str, range(n)))) for x in (mapped, plain)]
    assert named[0].checksum() == named[1].checksum()
    assert named[0].subset([2, 1]).checksum() == named[1].subset([2, 1]).checksum() != named[0].checksum()


def test_mapped_images_are_not_written_to(pair: tuple[MappedImages, torch.Tensor]) -> None:
    mapped, plain = pair
    for change in (lambda: mapped.zero_(), lambda: mapped.add_(1), lambda: mapped.__setitem__(0, 1)):
        with pytest.raises(ArgumentError, match=r"cannot be changed; clone\(\)"):
            change()
    mapped[2:4].zero_()  # an ordinary tensor, whose pages are this process's own
    again = open_cache(mapped.folder)
    assert again is not None and torch.equal(again.images, plain)
    mapped.clone().zero_()
    shutil.rmtree(mapped.folder)
    assert torch.equal(mapped[5:], plain[5:])  # the file lives as long as it is mapped
    with pytest.raises(DataError, match="gone or damaged; load the data again"):
        pickle.loads(pickle.dumps(mapped))


# Memory ---------------------------------------------------------------------------------------------------------------


MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
from krdistill.data import load_data
from krdistill.data.feed import Feed

def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))

peak, stop = 0, threading.Event()
def watch():
    global peak
    while not stop.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.01)

load_data(sys.argv[1] + "/small", cache="always", image_size=8)  # what is imported on the way
before = anonymous()
threading.Thread(target=watch).start()
bundle = load_data(sys.argv[1] + "/large", cache="always", image_size=512, profile="exp", imbalance_factor=2,
                   val_fraction=0.1, test_fraction=0.1)
pixels = sum(part.images.numel() for part in (bundle.train, bundle.val, bundle.test))
bundle.train.checksum()
seen = 0
for rows, images, labels in Feed(bundle.train, torch.device("cpu")).run(torch.randperm(len(bundle.train)).split(8)):
    seen += images.numel()
assert seen == bundle.train.images.numel() > 200e6
growth, whole = peak - before, bundle.train.images.clone()  # what everything in memory would take, to be seen too
time.sleep(0.1)
stop.set()
print(growth, peak - before, pixels)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc/self/smaps_rollup")
def test_memory_stays_far_below_the_decoded_size(tmp_path: Path) -> None:
    for name in "ab":
        for i in range(4):
            save(tmp_path / "small" / name / f"{i}.png", i)
        save(tmp_path / "large" / name / "000.png", ord(name))
        for i in range(1, 256):  # 512 images, 400 MB of pixels
            os.link(tmp_path / "large" / name / "000.png", tmp_path / "large" / name / f"{i:03}.png")
    environment = {**os.environ, "KRDISTILL_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    growth, whole, pixels = map(int, done.stdout.split())
    assert pixels > 280e6 and growth < 100e6 and whole > 200e6, (growth, whole, pixels)
