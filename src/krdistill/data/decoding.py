"""From image files to uint8 pixels: upright, without alpha, grey or RGB, at one size."""

from __future__ import annotations

import hashlib
import io
import math
import os
import signal
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from ..errors import DataError

if TYPE_CHECKING:
    from .containers import ImageData

ImageFile = Path | bytes
"""A file by its path, or its content."""

# Those of the suffixes that are read; not EPS, for which Pillow starts Ghostscript.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")
_GREY = ("1", "L", "LA", "La", "I", *_SIXTEEN_BIT)
_ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")
# Below this size threads only contend for the interpreter's lock: measured, 64x64 JPEGs are slower with two.
_THREADED_PIXELS = 96 * 96
_CHUNK = 64


@dataclass(frozen=True)
class Header:
    """What an image file says of itself: height and width when upright, and whether it is grey."""

    size: tuple[int, int]
    grey: bool


def read_headers(paths: Sequence[ImageFile]) -> tuple[list[Header | None], dict[int, str]]:
    """Sizes and kinds of image files, without decoding them.

    Returns:
        One header per file, None where it cannot be read, and the reasons by position. An image of so many pixels
        that Pillow suspects a decompression bomb (``PIL.Image.MAX_IMAGE_PIXELS``) counts as unreadable.
    """
    headers: list[Header | None] = []
    failures: dict[int, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for i, path in enumerate(paths):
            try:
                with _open(path) as image:
                    turned = _orientation(image, loaded=False) >= 5
                    if turned and image.format == "TIFF":  # newer Pillows turn these themselves
                        image.load()
                        turned = _orientation(image, loaded=True) >= 5
                    width, height = image.size
                    headers.append(Header((width, height) if turned else (height, width), image.mode in _GREY))
            except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
                failures[i] = _reason(error, path)
                headers.append(None)
    return headers, failures


def decode(
    paths: Sequence[ImageFile], *, size: tuple[int, int], channels: int, resize: bool = False
) -> tuple[npt.NDArray[np.uint8], dict[int, str]]:
    """Decodes image files, in several threads where that pays.

    EXIF orientation is applied; transparent parts become white; 16-bit images are scaled to 8 bits; of an animation
    the first frame is taken.

    Args:
        paths: the files, or their contents.
        size: height and width.
        channels: 1 for grey, 3 for RGB.
        resize: scale and crop to ``size`` (see :func:`fit`); otherwise an image of another size counts as unreadable.

    Returns:
        Pixels, uint8, shape ``(N, H, W, C)``, and the reasons, by position, why files could not be read; their rows
        are zero.

    Raises:
        DataError: the images would not fit into this machine's memory.
    """
    shape = (len(paths), *size, channels)
    _check_memory(shape)
    pixels = np.zeros(shape, np.uint8)
    failures: dict[int, str] = {}

    def work(start: int) -> None:
        for i in range(start, min(start + _CHUNK, len(paths))):
            try:
                pixels[i] = _decode_one(paths[i], size, channels, resize)
            except Exception as error:  # see read_headers
                failures[i] = _reason(error, paths[i])

    threads = min(8, os.cpu_count() or 1) if resize or size[0] * size[1] >= _THREADED_PIXELS else 1
    _run(work, range(0, len(paths), _CHUNK), threads)
    return pixels, failures


def decode_to_file(
    target: Path,
    first: int,
    paths: Sequence[Path | None],
    *,
    size: tuple[int, int],
    channels: int,
    resize: bool = False,
) -> tuple[bytes, dict[int, str]]:
    """Decodes image files, one after the other, into rows of a file of raw pixels; on return they are on the disk.

    Written, not mapped: a full disk is then an error to report, and not a signal that kills the process.

    Args:
        target: the file, uint8 ``(N, H, W, C)``.
        first: the row that the first image becomes.
        paths: the files; None leaves a row zero.
        size, channels, resize: as in :func:`decode`.

    Returns:
        SHA-256 of every row, one after the other, and the reasons, by position, why files could not be read; their
        rows are zero.

    Raises:
        OSError: ``target`` could not be written.
    """
    pixels = np.zeros((len(paths), *size, channels), np.uint8)
    failures: dict[int, str] = {}
    for i, path in enumerate(paths):
        if path is not None:
            try:
                pixels[i] = _decode_one(path, size, channels, resize)
            except MemoryError:  # says nothing of the file, and must not be kept as if it did
                raise
            except Exception as error:  # see read_headers
                failures[i] = _reason(error, path)
    with target.open("r+b") as file:
        file.seek(first * math.prod(pixels.shape[1:]))
        file.write(pixels.data)
        file.flush()
        os.fsync(file.fileno())
    return b"".join(hashlib.sha256(row.data).digest() for row in pixels), failures


def end_with_parent() -> None:
    """Makes a worker process end when the one that started it is killed, and leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scales so that the image covers ``size`` (height, width) and crops the centre; bicubic, antialiased."""
    return ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)


def resize_images(data: ImageData, side: int) -> ImageData:
    """The same images at ``side`` x ``side`` (see :func:`fit`)."""
    import torch  # not needed by the processes that decode

    if data.image_size == (side, side):
        return data
    _check_memory((len(data), side, side, data.channels))
    pixels = np.empty((len(data), side, side, data.channels), np.uint8)
    for i, array in enumerate(data.images.numpy()):
        image = fit(Image.fromarray(array.squeeze(2) if data.channels == 1 else array), (side, side))
        pixels[i] = np.asarray(image).reshape(pixels.shape[1:])
    return replace(data, inputs=torch.from_numpy(pixels))


def pixels_of(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Pixels of an opened image as they are stored, uint8, shape ``(H, W, 1)`` if it is grey, else ``(H, W, 3)``."""
    plain = _plain(image, 1 if image.mode in _GREY else 3)
    return np.asarray(plain).reshape(plain.height, plain.width, -1)


def unreadable_message(paths: Sequence[str], failures: dict[int, str], what: str) -> str:
    """One error for all the files that could not be read."""
    first = [f"{paths[i]} ({failures[i]})" for i in sorted(failures)[:5]]
    more = f" and {len(failures) - 5:,} more" if len(failures) > 5 else ""
    return (
        f"{len(failures):,} of {len(paths):,} images in {what} cannot be read: {', '.join(first)}{more}. Repair or "
        "remove them, or leave them out with on_unreadable='skip' (data.on_unreadable in a configuration)."
    )


def _decode_one(path: ImageFile, size: tuple[int, int], channels: int, resize: bool) -> npt.NDArray[np.uint8]:
    with _open(path) as image:
        if resize:
            # A JPEG can be decoded at a half, a quarter or an eighth: photographs of many megapixels, much faster.
            image.draft(None, (2 * max(size), 2 * max(size)))
        image.load()
        plain = _plain(image, channels)
        turn = _TURNS.get(_orientation(image, loaded=True))
    if turn is not None:
        plain = plain.transpose(turn)
    if resize:
        plain = fit(plain, size)
    elif plain.size != (size[1], size[0]):
        raise ValueError(f"{plain.width}x{plain.height} pixels, expected {size[1]}x{size[0]}")
    return np.asarray(plain).reshape(*size, channels)


def _open(file: ImageFile) -> Image.Image:
    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=_FORMATS)


def _plain(image: Image.Image, channels: int) -> Image.Image:
    """In mode L or RGB."""
    if image.mode in _SIXTEEN_BIT or (image.mode == "I" and image.format in ("PNG", "PPM")):
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no fixed range; save it with 8 or 16 bits")
    elif image.mode in _ALPHA or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _orientation(image: Image.Image, *, loaded: bool) -> int:
    # A PNG's EXIF block may stand behind its pixels, and asking for it decodes them.
    if image.format == "PNG" and not loaded and "exif" not in image.info:
        return 1
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # damaged EXIF leaves the pixels as they are
        return 1
    return value if isinstance(value, int) else 1


def _reason(error: Exception, path: ImageFile) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        size = len(path) if isinstance(path, bytes) else path.stat().st_size
        return "empty file" if size == 0 else "no image format that Pillow knows"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than {Image.MAX_IMAGE_PIXELS or 0:,} pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return (str(error) or type(error).__name__).splitlines()[0]


def _run(work: Callable[[int], None], starts: Sequence[int], threads: int) -> None:
    if threads == 1 or len(starts) < 2:
        for start in starts:
            work(start)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, starts):
            pass


def _check_memory(shape: tuple[int, ...]) -> None:
    needed = int(np.prod(shape, dtype=np.int64))
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise DataError(
            f"{shape[0]:,} images of {shape[2]}x{shape[1]}x{shape[3]} take {needed / 2**30:.1f} GiB, and this machine "
            f"has {there / 2**30:.1f} GiB of memory. Set a smaller image_size (data.image_size in a configuration)."
        )
