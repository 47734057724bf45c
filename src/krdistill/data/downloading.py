"""Fetches a data set from its publishers: resumable, checked, and never half there."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import lzma
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from .. import __version__
from ..errors import ArgumentError, DataError
from .sources import SourceInfo, data_root, source_info

Progress = Callable[[int, "int | None"], None]
"""Called with the bytes there are and, where the server says it, the bytes there will be."""

_ATTEMPTS = 10
_CHUNK = 1 << 20


def download(
    source: str | SourceInfo,
    root: str | os.PathLike[str] | None = None,
    *,
    url: str | None = None,
    progress: Progress | None = None,
    timeout: float = 60.0,
    opener: Callable[..., Any] = urllib.request.urlopen,
) -> Path:
    """Downloads and unpacks a data set, unless it is there.

    The archive is written to a ``.part`` file, which a later call resumes; its checksum has to be the published one;
    it is unpacked beside the place where it belongs and then renamed, so that the folder is either whole or absent. An
    archive that was put under the root by hand is used, and kept. A second process waits for the first.

    Args:
        source: name of a known source, or its record.
        root: folder that holds data sets; by default ``$KRDISTILL_DATA``, else ``~/.cache/krdistill/data``.
        url: another address of the same file, such as a mirror's. Its checksum stays the published one.
        progress: told how far the download is.
        timeout: seconds without an answer after which the connection counts as broken.
        opener: what opens a ``urllib.request.Request``; for a proxy or credentials of your own.

    Returns:
        The data set's folder.

    Raises:
        DataError: no connection, an answer that is no file, a wrong checksum, an unsafe or damaged archive, no room or
            no right to write; the message says what to do and where to put the file by hand.
        ArgumentError: a source that has no files, or an address that is not http or https.
    """
    info = source_info(source) if isinstance(source, str) else source
    if info.folder is None or info.archive is None:
        raise ArgumentError(f"{info.name} needs no download.")
    address = url or info.archive.url
    if urllib.parse.urlsplit(address).scheme not in ("http", "https"):
        raise ArgumentError(f"Expected an address that begins with http:// or https://, got {address!r}.")
    base = data_root(root)
    target = base / info.folder
    archive = base / info.archive.filename
    try:
        base.mkdir(parents=True, exist_ok=True)
        with _only_one(base):
            if target.exists():
                missing = [name for name in info.files if not (target / name).exists()]
                if missing:
                    raise DataError(f"{target} is there but lacks {', '.join(missing)}; remove it and try again.")
                return target
            by_hand = archive.exists()
            if by_hand:
                _check(archive, info.archive.md5)
            else:
                _fetch(address, archive, info.archive.md5, progress, timeout, opener)
            _unpack(archive, target)
            if not by_hand:
                archive.unlink()
    except OSError as error:
        raise DataError(f"{info.name} cannot be written under {base}: {error}.") from error
    return target


class _BrokenError(Exception):
    """The connection broke; what arrived is in the file."""


def _fetch(
    url: str, archive: Path, md5: str, progress: Progress | None, timeout: float, opener: Callable[..., Any]
) -> None:
    part = archive.with_name(archive.name + ".part")
    resumed = part.exists()
    most = -1
    for _ in range(_ATTEMPTS):
        try:
            _receive(url, part, archive, progress, timeout, opener)
        except _BrokenError as error:
            there = part.stat().st_size if part.exists() else 0
            if there <= most or not there:
                raise DataError(
                    f"The download of {url} broke off after {there:,} bytes: {error}. What arrived is kept in {part}, "
                    "and another try resumes it."
                    if there
                    else _no_connection(url, archive, error)
                ) from None
            most, resumed = there, True
            continue
        try:
            _check(part, md5)
        except DataError as error:
            begin = part.read_bytes()[:64].lstrip()
            part.unlink()
            if resumed:  # the first bytes may have been of another file: once more from the start
                resumed, most = False, -1
                continue
            page = " It looks like a web page, not an archive." if begin[:1] == b"<" else ""
            raise DataError(f"{url} gave a wrong file, which was removed. {error}{page}") from None
        part.replace(archive)
        return
    raise DataError(f"The download of {url} broke off {_ATTEMPTS} times. Another try resumes {part}.")


def _receive(
    url: str, part: Path, archive: Path, progress: Progress | None, timeout: float, opener: Callable[..., Any]
) -> None:
    """One request; appends to the part file where the server can, else starts it again."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": f"krdistill/{__version__}", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        answer = opener(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:  # nothing is left to send: the checksum decides
            return
        if error.code >= 500 and have:
            raise _BrokenError(f"the server answered {error.code} {error.reason}") from None
        raise DataError(
            f"{url} answered {error.code} {error.reason}. Give a mirror's address with url, or get the file by hand "
            f"and put it at {archive}."
        ) from None
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise _BrokenError(str(getattr(error, "reason", error)) or type(error).__name__) from None
    with answer:
        if answer.status != 206:  # the server cannot resume; a wrong piece would be found by the checksum
            have = 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length and length.isdigit() else None
        with open(part, "ab" if have else "wb") as file:
            while True:
                try:
                    block = answer.read(_CHUNK)
                except http.client.IncompleteRead as error:
                    file.write(error.partial)
                    raise _BrokenError("the server sent less than it announced") from None
                except (http.client.HTTPException, OSError) as error:
                    raise _BrokenError(str(error) or type(error).__name__) from None
                if not block:
                    break
                file.write(block)
                have += len(block)
                if progress is not None:
                    progress(have, total)
    if total is not None and have < total:
        raise _BrokenError("the server sent less than it announced")


def _no_connection(url: str, archive: Path, error: Exception) -> str:
    return (
        f"No connection to {url} ({error}). On a machine with a connection, download it and put it at {archive}; then "
        "run this again."
    )


def _check(path: Path, md5: str) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    if digest.hexdigest() != md5:
        raise DataError(f"{path} has md5 {digest.hexdigest()}, expected {md5}; remove it and try again.")


def _unpack(archive: Path, target: Path) -> None:
    """Unpacks beside the target, and renames the one folder that is wanted."""
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as place:
        try:
            if archive.suffix == ".zip":
                _unpack_zip(archive, Path(place))
            else:
                _unpack_tar(archive, Path(place))
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"{archive} is damaged: {error}. Remove it and try again.") from error
        inner = Path(place) / target.name
        if not inner.is_dir():
            raise DataError(f"{archive} has no folder {target.name}; it is not the archive that was expected.")
        inner.rename(target)


def _unpack_tar(archive: Path, place: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            path = _safe(member.name, place, archive)
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
            elif member.isfile():
                _write(tar.extractfile(member), path)
            else:
                raise DataError(f"{archive} was not unpacked: {member.name!r} is neither a file nor a folder.")


def _unpack_zip(archive: Path, place: Path) -> None:
    with zipfile.ZipFile(archive) as package:
        for member in package.infolist():
            path = _safe(member.filename, place, archive)
            kind = (member.external_attr >> 16) & 0o170000
            if member.is_dir():
                path.mkdir(parents=True, exist_ok=True)
            elif kind in (0, 0o100000):
                _write(package.open(member), path)
            else:
                raise DataError(f"{archive} was not unpacked: {member.filename!r} is neither a file nor a folder.")


def _safe(name: str, place: Path, archive: Path) -> Path:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise DataError(f"{archive} was not unpacked: {name!r} would lie outside of its folder.")
    return place / path


def _write(source: IO[bytes] | None, path: Path) -> None:
    assert source is not None  # tarfile gives None only for what is no file
    path.parent.mkdir(parents=True, exist_ok=True)
    with source, open(path, "wb") as file:
        shutil.copyfileobj(source, file, _CHUNK)


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, so that two processes do not write the same file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
