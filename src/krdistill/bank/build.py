"""Building a view bank: every view is asked for once, in chunks; what is done is never done again."""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.augment import Augmentation
from ..data.containers import Examples
from ..distributed import World, barrier, broadcast, first_then_all
from ..files import locked, read_json, write_json
from ..kinds import as_batch
from ..outputs import Outputs
from .coding import Coding
from .store import CARD, CHUNK, DONE, MARKS, BankError, BankKey, ViewBank, checksum, free_bytes, open_bank

_SYNC_SECONDS = 2.0
_RESERVE = 256 * 2**20  # left free on the disk


def build_bank(
    teacher: nn.Module,
    data: Examples,
    augment: Augmentation,
    *,
    views: int,
    root: Path,
    seed: int,
    coding: Coding,
    device: torch.device,
    world: World | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> ViewBank:
    """Asks a teacher for its answers to ``views`` views of every image, and stores them under ``root``.

    View v of row i is ``augment(images[i], i, seed=seed, epoch=v)``. A bank that is there is opened; one that is
    unfinished, after a kill for instance, is gone on with; one with fewer views is extended. Two processes that build
    the same bank wait for each other; a lock whose owner died is free.

    Args:
        teacher: gives :class:`~krdistill.outputs.Outputs` of uint8 images ``(B, C, H, W)``.
        data: the training images.
        augment: as the student will see them.
        views: V, at least 1.
        root: where banks are kept; this one in a folder named by its key.
        seed: of the augmentation's draws.
        coding: how answers are stored.
        device: where the teacher is asked.
        world: the processes that build it together, each a part of the chunks; they must see the same disk.
        on_step: called with (chunks done, chunks in all).

    Raises:
        BankError: the disk has no room for it (the figure is named), or a file could not be written.
    """
    key = BankKey.of(teacher, data, augment, seed, coding)
    world = world or World.alone()
    folder = root / key.name
    there = open_bank(root, key, views)
    if broadcast(there is not None, world):  # one answer for all: a later look may find more
        return there or ViewBank(folder, views=views)
    part, parts = world.rank, world.size
    with locked(root / f"{key.name}.{part}.lock"):
        first_then_all(lambda: _lay_out(folder, key, views) if world.first else None, world)
        marks = np.memmap(folder / MARKS, dtype=np.int64, mode="r+")
        marks.shape = (-1, math.ceil(key.rows / CHUNK))
        todo = [(int(v), int(c)) for v, c in np.argwhere(marks[:views] == 0) if c % parts == part]
        teacher.eval().to(device)
        with _writer(folder, coding, marks, key.rows) as write:
            for done, (view, chunk) in enumerate(todo):
                rows = torch.arange(chunk * CHUNK, min((chunk + 1) * CHUNK, key.rows))
                images = as_batch(data.inputs[rows[0] : rows[-1] + 1].to(device))
                with torch.no_grad():
                    outputs = teacher(augment(images, rows, seed=seed, epoch=view))
                write(view, chunk, outputs)
                if on_step is not None:
                    on_step(done + 1, len(todo))
    barrier(world)
    return ViewBank(folder, views=views)


def _lay_out(folder: Path, key: BankKey, views: int) -> None:
    """Makes the bank's files, or lengthens them; nothing that is written is lost."""
    card = folder / CARD
    had = int(read_json(card)["views"]) if card.is_file() else 0
    total = max(had, views)
    sizes = {f"{n}.bin": key.rows * d.itemsize * math.prod(s) for n, (d, s) in key.coding.fields.items()}
    sizes[MARKS] = math.ceil(key.rows / CHUNK) * 8
    lacking = sum(max(0, total * size - _allocated(folder / name)) for name, size in sizes.items())
    free = free_bytes(folder) - _RESERVE
    if lacking > free:
        raise BankError(
            f"A bank of {views} views of {key.rows:,} images takes {key.bytes(views) / 2**20:,.0f} MiB, of which "
            f"{lacking / 2**20:,.0f} MiB are still to be written; {max(0, free) / 2**20:,.0f} MiB are free at "
            f"{folder.parent}. Choose another disk (bank.folder), fewer views (bank.views), or fewer logits "
            "(bank.top_k)."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with _disk_errors(folder):
        for name, size in sizes.items():
            with (folder / name).open("ab") as file:
                if file.tell() < total * size:
                    file.truncate(total * size)
                if hasattr(os, "posix_fallocate"):  # a full disk shows here, not in the middle
                    os.posix_fallocate(file.fileno(), 0, total * size)
        write_json(card, {"key": key.as_dict(), "views": total})


def _allocated(path: Path) -> int:
    return path.stat().st_blocks * 512 if path.is_file() else 0


@contextmanager
def _writer(
    folder: Path, coding: Coding, marks: np.memmap[Any, Any], rows: int
) -> Iterator[Callable[[int, int, Outputs], None]]:
    """Writes chunks to their places; a chunk is marked as done only after its data are on the disk."""
    waiting: list[tuple[int, int, int]] = []
    synced = time.monotonic()
    with ExitStack() as stack, _disk_errors(folder):
        files = {name: stack.enter_context((folder / f"{name}.bin").open("r+b")) for name in coding.fields}

        def sync() -> None:
            for file in files.values():
                os.fsync(file.fileno())
            for view, chunk, mark in waiting:
                marks[view, chunk] = mark
            marks.flush()
            waiting.clear()

        def write(view: int, chunk: int, outputs: Outputs) -> None:
            nonlocal synced
            arrays = coding.encode(outputs)
            for name, array in arrays.items():
                row = array[0].nbytes
                os.pwrite(files[name].fileno(), array.numpy().data, (view * rows + chunk * CHUNK) * row)
            waiting.append((view, chunk, checksum(arrays.values()) | DONE))
            if time.monotonic() - synced > _SYNC_SECONDS:
                sync()
                synced = time.monotonic()

        try:
            yield write
        finally:
            sync()


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
            raise
        raise BankError(
            f"Writing {folder} failed: {error.strerror}. What was written before is kept and gone on with; "
            "make room, or choose another disk (bank.folder)."
        ) from None
