"""Batches of examples on the device that trains."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable
from queue import SimpleQueue

import torch
from torch import Tensor

from .._checks import check_integer
from .cache import MappedImages
from .containers import Examples

_COPY_BYTES = 64 * 2**20


class Feed:
    """Gives batches of a data set on a device.

    Images that fit there are kept there whole: on the CPU those in memory, on another device those that take at most a
    third of its free memory. Otherwise a thread reads ahead: memory-mapped rows in the order they have in the file,
    into pinned memory where the device is CUDA, from which they are copied without waiting.

    Args:
        data: the examples.
        device: where batches are wanted.
        depth: batches that are read ahead, at least 1.

    Raises:
        ArgumentError: a wrong ``depth``.
    """

    def __init__(self, data: Examples, device: torch.device, *, depth: int = 4) -> None:
        self.device = device
        self.depth = check_integer("depth", depth, at_least=1)
        self.labels = data.labels.to(device)
        self._source = data.inputs
        self._resident = _moved(data.inputs, device) if _fits(data.inputs, device) else None

    def run(self, batches: Iterable[Tensor]) -> Generator[tuple[Tensor, Tensor, Tensor], None, None]:
        """For each batch of row numbers ``(B,)``: rows, the examples as the data set has them (images uint8
        ``(B, H, W, C)``), labels, all on the device.

        Where a thread reads ahead, it draws from ``batches`` too. It ends with the iterator, when that is closed early
        as well; what goes wrong in it is raised here.
        """
        if self._resident is None:
            yield from self._read_ahead(batches)
            return
        for batch in batches:
            rows = batch.to(self.device)
            yield rows, self._resident.index_select(0, rows), self.labels[rows]

    def _read_ahead(self, batches: Iterable[Tensor]) -> Generator[tuple[Tensor, Tensor, Tensor], None, None]:
        ready: SimpleQueue[tuple[Tensor, Tensor] | BaseException | None] = SimpleQueue()
        free, closed = threading.Semaphore(self.depth), threading.Event()

        def read() -> None:
            try:
                for batch in batches:
                    free.acquire()
                    if closed.is_set():
                        return
                    ready.put(self._read(batch))
                ready.put(None)
            except BaseException as error:  # whatever it is, the consumer must not wait for ever
                ready.put(error)

        thread = threading.Thread(target=read, name="krdistill-feed", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                free.release()
                rows, images = (part.to(self.device, non_blocking=True) for part in item)
                yield rows, images, self.labels[rows]
        finally:
            closed.set()
            free.release()
            thread.join()

    def _read(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and images in memory that the device can be given from."""
        pin = self.device.type == "cuda"
        rows, source = batch.cpu(), self._source
        images = torch.empty((len(rows), *source.shape[1:]), dtype=source.dtype, pin_memory=pin)
        if isinstance(source, MappedImages):
            file, there = source.file.numpy(), images.numpy()
            for row, place in zip(*(part.tolist() for part in source.rows[rows].sort()), strict=True):
                there[place] = file[row]
        else:
            torch.index_select(source, 0, rows, out=images)
        return rows.pin_memory() if pin else rows, images


def _fits(images: Tensor, device: torch.device) -> bool:
    if device.type == "cpu":
        return not isinstance(images, MappedImages)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif device.type == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    else:
        return not isinstance(images, MappedImages)
    return images.numel() * images.itemsize <= free / 3


def _moved(images: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, made piece by piece; the images themselves where they are there."""
    if images.device == device and not isinstance(images, MappedImages):
        return images
    there = torch.empty(images.shape, dtype=images.dtype, device=device)
    rows = max(1, _COPY_BYTES // (images[0].numel() * images.itemsize))
    for start in range(0, len(images), rows):
        there[start : start + rows] = images[start : start + rows].to(device)
    return there
