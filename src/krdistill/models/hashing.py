"""Words and n-grams of sentences as numbers, by hashing; in arithmetic that an exported graph can do itself.

All hashes are polynomials over the prime field of M = 2^31 - 1: two factors below M never leave int64, so that every
device gets the same numbers. A device then needs no vocabulary and no tokeniser: the bytes of a sentence go in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kinds import MAX_BYTES

PRIME = 2**31 - 1
_BASE, _PAIR, _SPREAD = 1_103_515_245, 1_597_334_677, 741_103_597  # any numbers below PRIME will do
_BLANK, _APOSTROPHE = 32, 39


def spread(hashes: Tensor, salt: int, buckets: int) -> Tensor:
    r"""Bucket numbers of hashes.

    .. math:: b = (((h + s) \cdot c) \bmod M) \bmod \text{buckets}, \qquad c = 741103597

    Args:
        hashes: int64 in [0, M).
        salt: s; another one for every kind of hash.
        buckets: how many there are.

    Returns:
        int64 in [0, buckets), of the shape of ``hashes``.
    """
    return (hashes + salt) % PRIME * _SPREAD % PRIME % buckets


def lower(text: Tensor) -> Tensor:
    """Bytes ``(B, L)`` as int64, A to Z in lower case."""
    codes = text.to(torch.int64)
    return codes + 32 * ((codes >= 65) & (codes <= 90)).to(torch.int64)


def char_hashes(codes: Tensor, n: int) -> tuple[Tensor, Tensor]:
    r"""Hashes of all runs of n bytes of a sentence that has one blank before and one behind it.

    .. math:: h_i = \sum_{j=0}^{n-1} (c_{i+j} + 1)\, 1103515245^{\,n-1-j} \bmod M

    Args:
        codes: bytes in lower case, ``(B, L)`` int64, zeros behind them.
        n: at least 1.

    Returns:
        Hashes ``(B, L + 3 - n)`` and which of them are of the sentence; none where it is shorter than n - 2 bytes.
    """
    framed = torch.nn.functional.pad(codes, (1, max(1, n - 2)))
    position = torch.arange(framed.shape[1], device=codes.device)
    length = (codes > 0).sum(1, keepdim=True)
    framed = torch.where((position == 0) | (position == length + 1), _BLANK, framed)
    width = framed.shape[1] + 1 - n
    hashes = torch.zeros_like(framed[:, :width])
    for j in range(n):
        hashes = (hashes * _BASE + framed[:, j : j + width] + 1) % PRIME
    return hashes, position[:width] + n <= length + 2


def place_powers() -> Tensor:
    """Powers of the base, and of its inverse, modulo M, for every place in a sentence and one more.

    Shape ``(2, MAX_BYTES + 1)``, int64. (The one more: no sentence has as many places as the table, which a graph for
    sentences of any length would have to rule out.)
    """
    bases = (_BASE, pow(_BASE, -1, PRIME))
    return torch.tensor([[pow(base, i, PRIME) for i in range(MAX_BYTES + 1)] for base in bases])


def word_hashes(codes: Tensor, powers: Tensor) -> tuple[Tensor, Tensor]:
    r"""Hashes of the words of sentences, in their order.

    .. math:: h_w = \sum_{j=0}^{m-1} (c_j + 1)\, 1103515245^{\,j} \bmod M

    A word is a run of letters, digits, apostrophes and bytes beyond ASCII.

    Args:
        codes: as in :func:`char_hashes`.
        powers: :func:`place_powers`.

    Returns:
        Hashes ``(B, L // 2 + 1)``, the words first, and which of them are words.
    """
    inside = ((codes >= 97) & (codes <= 122)) | ((codes >= 48) & (codes <= 57)) | (codes == _APOSTROPHE)
    inside = (inside | (codes >= 128)).to(torch.int64)
    before = torch.nn.functional.pad(inside, (1, 0))[:, :-1]
    starts = inside * (1 - before)
    word = (starts.cumsum(1) - 1).clamp_min(0)
    # Every byte is weighted by its place in the sentence; the power of the word's first place is then divided out.
    power, inverse = powers[:, : codes.shape[1]]
    blank = codes.new_zeros(codes.shape[0], codes.shape[1] // 2 + 1)
    sums = blank.scatter_add(1, word, (codes + 1) * power % PRIME * inside) % PRIME
    first = blank.scatter_add(1, word, inverse * starts)
    return sums * first % PRIME, first > 0


def pair_hashes(words: Tensor) -> Tensor:
    r"""Hashes of neighbouring words ``(B, W - 1)`` from those of words ``(B, W)``.

    .. math:: h = (1597334677\, h_w + h_{w+1}) \bmod M
    """
    return (words[:, :-1] * _PAIR + words[:, 1:]) % PRIME
