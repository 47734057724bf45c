"""Images that are the same picture: exact copies, and copies that were scaled, recompressed or slightly changed.

A picture's hash has 64 bits (dHash): the image in grey at 9 x 8 pixels, each by the mean over its area, and one bit
for each pixel whether its right neighbour is brighter. Two images are *near-duplicates* if their hashes differ in at
most ``THRESHOLD`` bits and their 9 x 8 pixels by at most ``TOLERANCE`` grey levels in the mean; the second keeps flat
images, whose bits say little, apart. What is linked through others is one cluster.

Mirrored, rotated and cropped copies are not found, nor copies of very different brightness; two different pictures of
the same plain scene (an empty road, a blank slide) may be taken for copies.

Source: Krawetz, "Kind of Like That", The Hacker Factor Blog, 2013 (the hash). The banding is the pigeonhole principle:
hashes that differ in at most t bits agree in one of t + 1 bands of bits.
Deviation: the second test, on the pixels; areas are averaged rather than interpolated.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
from torch import Tensor

THRESHOLD = 3
"""Bits in which the hashes of near-duplicates may differ."""

TOLERANCE = 12.0
"""Mean difference of their 9 x 8 pixels, in grey levels from 0 to 255."""

_ROWS, _COLUMNS = 8, 9
_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601
_CHUNK = 1024
_ONES = np.array([bin(i).count("1") for i in range(1 << 16)], dtype=np.uint8)


def thumbnails(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Images in grey at 9 x 8 pixels, each by the mean over its area.

    Args:
        pixels: uint8, shape ``(N, H, W, C)`` with C = 1 or 3.

    Returns:
        uint8, shape ``(N, 8, 9)``.
    """
    grey = pixels[..., 0].astype(np.float32) if pixels.shape[3] == 1 else pixels.astype(np.float32) @ _GREY
    down, across = _areas(pixels.shape[1], _ROWS), _areas(pixels.shape[2], _COLUMNS)
    return np.rint(down @ grey @ across.T).clip(0, 255).astype(np.uint8)


def difference_hashes(thumbs: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """The 64-bit dHash of 9 x 8 thumbnails, uint8 ``(N, 8, 9)``, as uint64 ``(N,)``."""
    bits = thumbs[:, :, 1:] > thumbs[:, :, :-1]
    packed = np.packbits(bits.reshape(len(thumbs), 64), axis=1)
    return packed.view(">u8").reshape(-1).astype(np.uint64)


def picture_hashes(images: Tensor) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
    """Hashes and thumbnails of images in memory or memory-mapped, uint8 ``(N, H, W, C)``; some rows are read at a
    time."""
    thumbs = [thumbnails(images[i : i + _CHUNK].numpy()) for i in range(0, len(images), _CHUNK)]
    joined = np.concatenate(thumbs)
    return difference_hashes(joined), joined


def near_duplicates(
    hashes: npt.NDArray[np.uint64],
    thumbs: npt.NDArray[np.uint8],
    *,
    threshold: int = THRESHOLD,
    tolerance: float = TOLERANCE,
) -> npt.NDArray[np.int64]:
    """Clusters of near-duplicates.

    Args:
        hashes: 64-bit hashes, uint64, shape ``(N,)``.
        thumbs: the thumbnails they were made from, uint8, shape ``(N, 8, 9)``.
        threshold: bits in which they may differ, from 0 to 15.
        tolerance: mean difference of the thumbnails, in grey levels.

    Returns:
        For each image the smallest row of its cluster, shape ``(N,)``, int64; its own row where it has no duplicate.
    """
    flat = thumbs.reshape(len(thumbs), -1)
    # Copies with the same thumbnail to one row first: a thousand frames of a still camera are then one.
    _, first, same = np.unique(flat, axis=0, return_index=True, return_inverse=True)
    same = same.reshape(-1)  # NumPy 2.0 gives it another shape
    keys, pixels = hashes[first], flat[first].astype(np.int16)
    parent = np.arange(len(first))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    edges = np.linspace(0, 64, threshold + 2).astype(int)
    for low, high in itertools.pairwise(edges.tolist()):
        band = (keys >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(band, kind="stable")
        edge = np.flatnonzero(np.diff(band[order], prepend=~band[order[:1]], append=~band[order[-1:]]))
        many = np.flatnonzero(np.diff(edge) > 1)
        for start, end in zip(edge[many].tolist(), edge[many + 1].tolist(), strict=True):
            bucket = order[start:end]
            for at in range(len(bucket) - 1):
                i, others = bucket[at], bucket[at + 1 :]
                near = others[_distance(keys[i], keys[others]) <= threshold]
                if len(near):
                    near = near[np.abs(pixels[near] - pixels[i]).mean(1) <= tolerance]
                for j in near.tolist():
                    a, b = root(int(i)), root(j)
                    if a != b:
                        parent[max(a, b)] = min(a, b)
    roots = np.array([root(i) for i in range(len(first))], dtype=np.int64)[same]
    smallest = np.full(len(first), len(hashes), dtype=np.int64)
    np.minimum.at(smallest, roots, np.arange(len(hashes)))
    return smallest[roots]


def exact_duplicates(digests: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Clusters of equal digests.

    Args:
        digests: uint8, shape ``(N, D)``.

    Returns:
        For each row the first row with the same digest, shape ``(N,)``, int64.
    """
    _, first, same = np.unique(digests, axis=0, return_index=True, return_inverse=True)
    return first[same.reshape(-1)].astype(np.int64)


def _distance(one: np.uint64, others: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Bits in which hashes differ."""
    words = (others ^ one).view(np.uint16).reshape(-1, 4)
    return _ONES[words].sum(1, dtype=np.int64)


def _areas(size: int, cells: int) -> npt.NDArray[np.float32]:
    """Weights ``(cells, size)`` that average pixels over equal areas; a pixel on an edge counts by its share."""
    edges = np.linspace(0, size, cells + 1)
    at = np.arange(size)
    shares = np.minimum(edges[1:, None], at + 1) - np.maximum(edges[:-1, None], at)
    return (shares.clip(0) * (cells / size)).astype(np.float32)
