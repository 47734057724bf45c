"""Files are written beside their place and then renamed: a reader never meets half a file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import KrdistillError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_TORCH = re.compile("PytorchStreamWriter failed|iostream error")
_HALF = re.compile(r"\.(.+)\.[a-z0-9_]{1,8}(\.[^.]+)")


class DiskError(KrdistillError, OSError):
    """A file could not be written, for the disk is full or fails.

    Args:
        message: what a person reads.
        number: the ``errno``.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(number, message)

    def __str__(self) -> str:
        return str(self.strerror)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A block that writes ``path``; a disk that is full or fails ends it in a :class:`DiskError`.

    PyTorch and safetensors report a full disk each in its own way, with and without the system's number.
    """
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        number = _disk_number(error)
        if number is None:
            raise
        place = next(p for p in (path.parent, *path.parent.parents) if p.exists())
        raise DiskError(
            f"Writing {path} failed: {os.strerror(number)} ({shutil.disk_usage(place).free / 2**20:,.0f} MiB are free "
            "there). What stood in its place before is whole. Make room (or lift the limit), and give the same command "
            "again.",
            number,
        ) from None


def _disk_number(error: BaseException) -> int | None:
    """The system's number of an error that is the disk's; of a writer that does not pass it on, ``EIO``."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _DISK:
            return seen.errno
        found = next((n for n in _DISK if os.strerror(n) in str(seen)), None)
        if found is not None:
            return found
        if isinstance(seen, RuntimeError) and _TORCH.search(str(seen)):
            return errno.EIO
        seen = seen.__cause__ or seen.__context__
    return None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, which takes the place of ``path`` when the block ends well.

    What a process leaves that is killed meanwhile is known by its name: see :func:`half_written`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as d, replacing(Path(d) / "a.txt") as part:
    ...     _ = part.write_text("whole")

    Raises:
        DiskError: the disk is full or fails; what stood in its place is untouched.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_ending(path.name), dir=path.parent)
        os.close(handle)
        part = Path(name)
        try:
            yield part
            with part.open("rb") as written:
                os.fsync(written.fileno())
            part.chmod(0o644)
            os.replace(part, path)
            _sync_folder(path.parent)
        finally:
            part.unlink(missing_ok=True)


def _ending(name: str) -> str:
    return Path(name).suffix or ".part"


def _sync_folder(folder: Path) -> None:
    """Has a new name outlast a loss of power, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def half_written(path: Path) -> str | None:
    """The name of the file that a killed process was writing (:func:`replacing`) as ``path``; None of other files.

    >>> half_written(Path("run/.config.yaml.x2_9ab41.yaml")), half_written(Path("run/config.yaml"))
    ('config.yaml', None)
    """
    found = _HALF.fullmatch(path.name)
    return found[1] if found is not None and found[2] == _ending(found[1]) else None


def remove_half_written(folder: Path) -> None:
    """Removes what killed processes left in a folder and below; nobody may be writing there meanwhile."""
    for path in folder.rglob(".*"):
        if half_written(path) is not None and path.is_file():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, *, busy: Callable[[], None] | None = None) -> Iterator[None]:
    """A block that one process at a time runs; the lock of a process that died is free.

    A disk that has no locks, as some clusters', gives none: the block is not guarded there.

    Args:
        path: of the lock's file, which stays.
        busy: called where another process holds it; by default the block waits. Raise from it to refuse instead.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if busy is not None:
                busy()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes plain data as JSON, whole; a number that is not finite is an error, never silent."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_arrays(path: Path) -> dict[str, Any]:
    """The arrays of a NumPy archive (``.npz``), which a stranger may have made. Nothing in it is unpickled.

    Raises:
        ValueError: it is no archive, is damaged, holds Python objects, or would unpack to more than the machine's
            memory.
        OSError: it cannot be read.
    """
    import numpy as np

    try:
        check_unpacked(path)
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (ValueError, OSError):
        raise
    except MemoryError:
        raise ValueError("an array says of itself that it is larger than the memory") from None
    except Exception as error:  # zipfile, zlib and NumPy's reader of headers have no common base
        raise ValueError(str(error) or type(error).__name__) from None


def check_unpacked(path: Path, *, stored: bool = False) -> None:
    """Refuses a zip archive that would unpack to more than the machine's memory.

    Args:
        path: the archive; a file that is none passes.
        stored: whether what wrote it does not compress: it may then not hold more than its own size.

    Raises:
        ValueError: it would.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError):
        return
    most = path.stat().st_size if stored else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > most:
        raise ValueError(f"{path.name} would unpack to {size:,} bytes; expected at most {most:,}")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()
