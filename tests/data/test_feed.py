"""Batches of any data set on the device: what plain indexing gives, read ahead or not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from krdistill.data import feed as feed_module
from krdistill.data.cache import MappedImages, build_cache
from krdistill.data.containers import ImageData
from krdistill.data.feed import Feed
from krdistill.errors import ArgumentError

CPU = torch.device("cpu")
CLASSES = ("a", "b", "c")


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    """Fifty images in a cache, of which 45 in another order are the data."""
    folder = tmp_path_factory.mktemp("feed")
    paths = []
    for i in range(50):
        paths.append(folder / f"{i:02}.{'jpg' if i % 2 else 'png'}")
        Image.fromarray(np.random.RandomState(i).randint(0, 256, (9, 8, 3)).astype(np.uint8)).save(paths[-1])
    images = build_cache(folder / "cache", paths, size=(9, 8), channels=3, workers=0).images
    rows = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:45]
    return ImageData(images.select_rows(rows), rows % 3, CLASSES, tuple(map(str, rows.tolist())))


@pytest.fixture(scope="module")
def memory(mapped: ImageData) -> ImageData:
    return ImageData(mapped.images.clone(), mapped.labels, CLASSES, mapped.ids)


def batches(n: int = 45, size: int = 7) -> list[Tensor]:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    return [*order.split(size), torch.tensor([3, 3, 0, 44, 3]), torch.tensor([], dtype=torch.int64), torch.tensor([8])]


def reading() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "krdistill-feed"]


def check(data: ImageData, expected: ImageData, device: torch.device, **options: Any) -> None:
    given = batches()
    feed = Feed(data, device, **options)
    for _ in range(2):
        got = list(feed.run(iter(given)))
        assert len(got) == len(given)
        for rows, (index, images, labels) in zip(given, got, strict=True):
            assert {index.device.type, images.device.type, labels.device.type} == {device.type}
            assert index.dtype == labels.dtype == torch.int64 and images.dtype == torch.uint8
            assert type(images) is Tensor and torch.equal(index.cpu(), rows)
            assert torch.equal(images.cpu(), expected.images[rows])
            assert torch.equal(labels.cpu(), expected.labels[rows])
    assert not reading()


@pytest.mark.parametrize("depth", [1, 2, 4, 100])
def test_mapped_images(mapped: ImageData, memory: ImageData, depth: int) -> None:
    assert isinstance(mapped.images, MappedImages)
    check(mapped, memory, CPU, depth=depth)


def test_images_in_memory_need_no_thread(memory: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "Thread", None)
    check(memory, memory, CPU)
    assert Feed(memory, CPU)._resident is memory.images  # not a copy


def test_images_in_memory_too_many_for_the_device(memory: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "_fits", lambda images, device: False)
    check(memory, memory, CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fits", [True, False])
def test_cuda(mapped: ImageData, memory: ImageData, monkeypatch: pytest.MonkeyPatch, fits: bool) -> None:
    if not fits:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * memory.images.numel() - 1, 0))
    for data in (mapped, memory):
        assert (Feed(data, torch.device("cuda"))._resident is not None) == fits
        check(data, memory, torch.device("cuda"))


def test_a_third_of_the_device(memory: ImageData, mapped: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    size = memory.images.numel()
    for free, fits in ((3 * size, True), (3 * size - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 * size))
        assert feed_module._fits(memory.images, torch.device("cuda")) == fits
        assert feed_module._fits(mapped.images, torch.device("cuda")) == fits


def test_a_resident_copy_is_made_piece_by_piece(
    memory: ImageData, mapped: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "_COPY_BYTES", 4 * 9 * 8 * 3 + 1)
    seen: list[int] = []
    read = MappedImages.__getitem__

    def counted(self: MappedImages, item: Any) -> Tensor:
        seen.append(read(self, item).numel())
        return read(self, item)

    monkeypatch.setattr(MappedImages, "__getitem__", counted)
    there = feed_module._moved(mapped.images, CPU)
    assert type(there) is Tensor and torch.equal(there, memory.images)
    assert max(seen) == 4 * 9 * 8 * 3 and len(seen) >= 12


def test_no_more_than_depth_batches_are_read_ahead(mapped: ImageData) -> None:
    drawn = 0

    def counted() -> Iterator[Tensor]:
        nonlocal drawn
        for batch in batches(size=3):
            drawn += 1
            yield batch

    run = Feed(mapped, CPU, depth=2).run(counted())
    for taken in range(1, 6):
        next(run)
        deadline = time.monotonic() + 5
        while drawn < taken + 3 and time.monotonic() < deadline:  # two ready, and one in the thread's hand
            time.sleep(0.001)
        time.sleep(0.01)
        assert drawn == taken + 3
    run.close()
    assert not reading()


def test_closing_early_stops_the_thread(mapped: ImageData) -> None:
    feed = Feed(mapped, CPU, depth=1)
    for taken in (1, 3):
        run = feed.run(batches())
        for _ in range(taken):
            next(run)
        assert len(reading()) == 1
        run.close()
        assert not reading()
    for _ in feed.run(batches()):
        break  # the iterator is dropped here
    assert not reading()
    feed.run(batches())  # never begun
    assert not reading()
    with pytest.raises(KeyError):
        for _ in feed.run(batches()):
            raise KeyError
    deadline = time.monotonic() + 5
    while reading() and time.monotonic() < deadline:  # the traceback held the iterator
        time.sleep(0.001)
    assert not reading()


def test_errors_of_the_thread_arrive(mapped: ImageData) -> None:
    def broken() -> Iterator[Tensor]:
        yield torch.tensor([0, 1])
        raise RuntimeError("no more batches")

    run = Feed(mapped, CPU).run(broken())
    assert len(next(run)[0]) == 2
    with pytest.raises(RuntimeError, match="no more batches"):
        next(run)
    with pytest.raises(IndexError):
        list(Feed(mapped, CPU).run([torch.tensor([45])]))
    assert not reading()


@pytest.mark.parametrize("depth", [0, -1, 1.5, None])
def test_wrong_depth(memory: ImageData, depth: Any) -> None:
    with pytest.raises(ArgumentError, match="depth: expected a whole number >= 1"):
        Feed(memory, CPU, depth=depth)
