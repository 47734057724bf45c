"""Images decoded once into a memory-mapped file, for folders larger than memory.

A cache is a folder ``<root>/<key>/``:

| file | what it holds |
|---|---|
| ``images.u8`` | uint8 pixels, ``(N, H, W, C)``, one row per source file, zero where that file cannot be read |
| ``progress.jsonl`` | while it is made: what is being made, then a line per chunk of rows that is on the disk |
| ``digests.u8`` | SHA-256 of every row, ``(N, 32)`` |
| ``meta.json`` | shape, and the files that cannot be read; written last: a cache without it is not finished |

The key says which files at which size (:func:`cache_key`), so that every split of a folder shares one cache, and a
folder that changed gets another one. Caches that are needed no more are for their owner to remove.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import shutil
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing import current_process, get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import ArgumentError, DataError
from ..files import locked, read_json, replacing, write_text
from .decoding import decode_to_file, end_with_parent

CACHE_ABOVE = 2**30
"""Bytes of decoded pixels above which ``cache="auto"`` uses a cache."""

RESERVE = 2**30
"""Bytes left free on the disk."""

IMAGES, PROGRESS, DIGESTS, META = "images.u8", "progress.jsonl", "digests.u8", "meta.json"
_FORMAT = 1
_CHUNK_BYTES, _CHUNK_ROWS = 8 * 2**20, 256
_CONSTANT = "Images in a cache cannot be changed; clone() gives a tensor that can."
_ELSE = (
    "name another folder in the environment variable KRDISTILL_CACHE, or, where memory is large enough, do without "
    "(cache='never', data.cache in a configuration)"
)
_DIGEST = hashlib.sha256().digest_size


class MappedImages(Tensor):
    """Rows of a memory-mapped file as a uint8 tensor ``(N, H, W, C)`` that no one writes to.

    Indexing with row numbers, a mask or a slice reads these rows alone and gives an ordinary tensor;
    :meth:`select_rows` reads nothing and gives other rows of the same file. Any other operation sees an ordinary
    tensor of all rows: without a copy where they lie one after the other in the file, else read into memory.

    Pickled, it is its place alone: another process opens the same file.

    Args:
        folder: the cache that the file belongs to.
        file: all rows of the file, uint8 ``(M, H, W, C)``.
        digests: SHA-256 of every one of them, uint8 ``(M, 32)``.
        rows: which of them, int64 ``(N,)``; by default all.
    """

    folder: Path
    file: Tensor
    digests: npt.NDArray[np.uint8]
    rows: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, folder: Path, file: Tensor, digests: npt.NDArray[np.uint8], rows: Tensor | None = None
    ) -> MappedImages:
        shape = file.shape if rows is None else (len(rows), *file.shape[1:])
        made: MappedImages = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.uint8, device=torch.device("cpu"))
        return made

    def __init__(self, folder: Path, file: Tensor, digests: npt.NDArray[np.uint8], rows: Tensor | None = None) -> None:
        self.folder, self.file, self.digests = folder, file, digests
        self.rows = torch.arange(len(file)) if rows is None else rows

    def select_rows(self, index: Tensor) -> MappedImages:
        """The rows at these positions, int64 ``(B,)``; nothing is read."""
        return MappedImages(self.folder, self.file, self.digests, self.rows[index])

    def row_digests(self) -> bytes:
        """SHA-256 of every row, one after the other, as they were when they were decoded."""
        return self.digests[self.rows.numpy()].tobytes()

    def plain(self) -> Tensor:
        """All rows as an ordinary tensor."""
        return self._read(self.rows)

    def _read(self, rows: Tensor) -> Tensor:
        if len(rows) and bool((rows.diff() == 1).all()):
            return self.file[int(rows[0]) : int(rows[-1]) + 1]
        return self.file.index_select(0, rows)

    def __getitem__(self, item: Any) -> Tensor:
        if isinstance(item, (int, np.integer, slice, list, np.ndarray, Tensor)):
            rows = self.rows[item]
            return self.file[rows] if rows.ndim != 1 else self._read(rows)
        return self.plain()[item]

    def __setitem__(self, item: Any, value: Any) -> None:
        raise ArgumentError(_CONSTANT)

    def __deepcopy__(self, memo: Any) -> MappedImages:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reopen, (self.folder, self.rows.numpy())

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def split(self, size: int | Sequence[int], dim: int = 0) -> Any:
        """As :meth:`torch.Tensor.split`; parts along the rows are read one at a time, as an iterator."""
        if not isinstance(size, int) or dim:
            return self.plain().split(size, dim)
        return (self[i : i + size] for i in range(0, len(self), size))

    def numpy(self, *, force: bool = False) -> npt.NDArray[Any]:
        return self.plain().numpy(force=force)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"MappedImages{tuple(self.shape)}"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable and isinstance(args[0], cls):
            raise ArgumentError(_CONSTANT)

        def unwrap(value: Any) -> Any:
            return value.plain() if isinstance(value, cls) else value

        return func(*tree_map(unwrap, args), **tree_map(unwrap, dict(kwargs or {})))


@dataclass(frozen=True, eq=False)
class Cache:
    """Decoded images, one row per source file.

    Attributes:
        folder: where they lie.
        images: all rows.
        unreadable: reasons by row, for the files that cannot be read.
    """

    folder: Path
    images: MappedImages
    unreadable: dict[int, str]


def cache_root(root: str | os.PathLike[str] | None = None) -> Path:
    """The folder of all caches: the argument, else ``$KRDISTILL_CACHE``, else ``~/.cache/krdistill/images``."""
    return Path(root or os.environ.get("KRDISTILL_CACHE") or "~/.cache/krdistill/images").expanduser()


def cache_key(paths: Sequence[Path], ids: Sequence[str], image_size: int | None) -> str:
    """Which files at which size, in hexadecimal.

    SHA-256 over the format's version, ``image_size``, and of every file its id, size in bytes, time of last change
    (ns) and whether it may be read. The pixels' own height, width and channels follow from these, so that a cache is
    found without opening a single image. Where the folder lies does not matter.

    Args:
        paths: the files.
        ids: their paths under the source's root.
        image_size: side in pixels; None for the size they have.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, image_size, len(paths)]).encode())
    for path, name in zip(paths, ids, strict=True):
        try:
            stat = path.stat()
            about = (stat.st_size, stat.st_mtime_ns, os.access(path, os.R_OK))
        except OSError:
            about = (-1, -1, False)
        digest.update(json.dumps([name, *about]).encode())
    return digest.hexdigest()


def open_cache(folder: Path) -> Cache | None:
    """The cache in a folder; None if there is none that is finished and whole."""
    try:
        meta = read_json(folder / META)
        shape = tuple(int(n) for n in meta["shape"])
        unreadable = {int(row): str(why) for row, why in meta["unreadable"].items()}
        digests = np.fromfile(folder / DIGESTS, np.uint8).reshape(shape[0], _DIGEST)
        whole = meta["format"] == _FORMAT and (folder / IMAGES).stat().st_size == math.prod(shape)
        return Cache(folder, MappedImages(folder, _map(folder / IMAGES, shape), digests), unreadable) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):  # damaged, in one way or another
        return None


def build_cache(
    folder: Path,
    paths: Sequence[Path],
    *,
    size: tuple[int, int],
    channels: int,
    resize: bool = False,
    unreadable: Mapping[int, str] | None = None,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    reserve: int = RESERVE,
) -> Cache:
    """Decodes image files into a cache, or opens the one that is there.

    A process that is killed leaves what it finished, and the next one goes on from there. Of several processes one
    decodes and the others wait for it. A damaged cache is made again. The pixels are those of
    :func:`krdistill.data.decoding.decode`, whatever the number of workers.

    Args:
        folder: of this cache (:func:`cache_root`, :func:`cache_key`).
        paths: the files, one per row.
        size: height and width.
        channels: 1 for grey, 3 for RGB.
        resize: scale and crop to ``size``; otherwise an image of another size counts as unreadable.
        unreadable: rows known to be unreadable, with the reasons; these files are not tried.
        workers: processes that decode; by default one per processor. 0 decodes in this one.
        on_progress: called with the images decoded so far and their number.
        reserve: bytes to leave free on the disk.

    Raises:
        DataError: the disk has no room for it (the message names needed and free bytes), a file could not be written,
            or a worker process died.
    """
    shape = (len(paths), *size, channels)
    per_chunk = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // math.prod(shape[1:])))
    known = {int(row): why for row, why in (unreadable or {}).items()}
    plan = {"format": _FORMAT, "shape": list(shape), "rows_per_chunk": per_chunk, "unreadable": _texts(known)}
    try:
        with locked(folder.with_name(f"{folder.name}.lock")):
            there = open_cache(folder)
            if there is not None:
                return there
            done = _resume(folder, plan, reserve)
            tried = [None if i in known else path for i, path in enumerate(paths)]
            chunks = [
                (c, tried[c * per_chunk : (c + 1) * per_chunk])
                for c in range(math.ceil(len(paths) / per_chunk))
                if c not in done
            ]
            with (folder / PROGRESS).open("a", encoding="utf-8") as journal:
                decoded = len(paths) - sum(len(part) for _, part in chunks)
                with closing(_decoded(folder / IMAGES, chunks, per_chunk, shape, resize, workers)) as results:
                    for c, rows, digests, failures in results:
                        done[c] = (digests, {c * per_chunk + i: why for i, why in failures.items()})
                        line = {"chunk": c, "digests": digests.hex(), "unreadable": _texts(done[c][1])}
                        journal.write(json.dumps(line) + "\n")
                        journal.flush()
                        os.fsync(journal.fileno())
                        decoded += rows
                        if on_progress is not None:
                            on_progress(decoded, len(paths))
            _finish(folder, plan, done, known)
    except BrokenProcessPool as error:
        raise DataError(
            f"A process that decodes images for {folder} died, most likely for want of memory. What is finished is "
            "kept: run it again to go on."
        ) from error
    except OSError as error:
        raise DataError(
            f"The images could not be kept in {folder}: {error.strerror or error}. What is finished is kept: make room "
            f"and run it again, {_ELSE}."
        ) from error
    made = open_cache(folder)
    if made is None:
        raise DataError(f"{folder} was changed by someone else while it was made; run it again.")
    return made


def _reopen(folder: Path, rows: npt.NDArray[np.int64]) -> MappedImages:
    cache = open_cache(folder)
    if cache is None:
        raise DataError(f"The decoded images in {folder} are gone or damaged; load the data again.")
    return cache.images.select_rows(torch.from_numpy(rows))


def _map(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A file's bytes as a tensor. Private pages: whoever writes to them changes the own copy, never the file; nothing
    is set aside for such copies, else the kernel refuses files larger than memory."""
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # named from Python 3.11 on
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | no_reserve, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return torch.frombuffer(mapped, dtype=torch.uint8).view(shape)


def _resume(folder: Path, plan: dict[str, Any], reserve: int) -> dict[int, tuple[bytes, dict[int, str]]]:
    """The finished chunks of an unfinished cache; where there is nothing to go on from, an empty one is laid out."""
    images, journal = folder / IMAGES, folder / PROGRESS
    total = math.prod(plan["shape"])
    done: dict[int, tuple[bytes, dict[int, str]]] = {}
    try:
        text = journal.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]  # a line that was cut short counts for nothing
        first, *lines = [json.loads(line) for line in whole.splitlines()]
        sound = first == plan and images.stat().st_size == total
        for line in lines:
            failures = {int(row): str(why) for row, why in line["unreadable"].items()}
            done[int(line["chunk"])] = (bytes.fromhex(line["digests"]), failures)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        done = {}
        if folder.exists():
            shutil.rmtree(folder)
    _check_room(folder, total + 4 * _DIGEST * plan["shape"][0], images, plan["shape"], reserve)
    if sound:
        os.truncate(journal, len(whole))
        return done
    folder.mkdir(parents=True)
    images.touch()
    os.truncate(images, total)
    write_text(journal, json.dumps(plan) + "\n")
    return done


def _check_room(folder: Path, total: int, images: Path, shape: Sequence[int], reserve: int) -> None:
    needed = max(0, total - (images.stat().st_blocks * 512 if images.exists() else 0))
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free - reserve:
        N, H, W, C = shape
        raise DataError(
            f"{N:,} images of {W}x{H}x{C}, decoded, take {_human(needed)} in {folder.parent}, where {_human(free)} are "
            f"free and {_human(reserve)} are to stay free. Make room, set a smaller image_size (data.image_size in a "
            f"configuration), {_ELSE}."
        )


def _decoded(
    images: Path,
    chunks: Sequence[tuple[int, list[Path | None]]],
    per_chunk: int,
    shape: tuple[int, ...],
    resize: bool,
    workers: int | None,
) -> Generator[tuple[int, int, bytes, dict[int, str]], None, None]:
    """Chunk, rows, digests and failures of every chunk, when its pixels are on the disk."""
    about: dict[str, Any] = {"size": shape[1:3], "channels": shape[3], "resize": resize}
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if current_process().daemon:  # a daemon may not have processes of its own
        workers = 0
    workers = min(workers, len(chunks))
    if not workers:
        for c, part in chunks:
            yield c, len(part), *decode_to_file(images, c * per_chunk, part, **about)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=end_with_parent)
    try:
        with _no_main_module():
            futures = {
                pool.submit(decode_to_file, images, c * per_chunk, part, **about): (c, len(part)) for c, part in chunks
            }
        for future in as_completed(futures):
            yield *futures.pop(future), *future.result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _no_main_module() -> Iterator[None]:
    """A block in which processes are started that do not run the caller's script again: they need none of it, and a
    script without ``if __name__ == "__main__"`` would begin from its top in each of them."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _finish(
    folder: Path, plan: dict[str, Any], done: Mapping[int, tuple[bytes, dict[int, str]]], known: Mapping[int, str]
) -> None:
    unreadable = dict(known)
    for _, failures in done.values():
        unreadable |= failures
    with replacing(folder / DIGESTS) as part:
        part.write_bytes(b"".join(done[c][0] for c in sorted(done)))
    meta = {"format": _FORMAT, "shape": plan["shape"], "unreadable": _texts(dict(sorted(unreadable.items())))}
    write_text(folder / META, json.dumps(meta, indent=1) + "\n")  # in ASCII: a reason may name a file of any bytes
    (folder / PROGRESS).unlink()


def _texts(reasons: Mapping[int, str]) -> dict[str, str]:
    return {str(row): why for row, why in reasons.items()}


def _human(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"
