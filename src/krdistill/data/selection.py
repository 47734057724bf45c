"""Choosing a given number of images per class."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .containers import ImageData


def choose(data: ImageData, per_class: Sequence[int], seed: int, purpose: str) -> Tensor:
    """Marks ``per_class[k]`` images of every class k.

    Each image draws a number from (seed, purpose, its id), and the smallest numbers of a class are chosen. So the
    choice depends neither on the order of the images nor on any generator's state, and images that are added later
    move few others across.

    Args:
        data: the images.
        per_class: how many of each class, at most as many as there are.
        seed: another seed, another choice.
        purpose: choices for different purposes are independent.

    Returns:
        Shape ``(N,)``, bool.
    """
    chosen = torch.zeros(len(data), dtype=torch.bool)
    prefix = f"{purpose}\0{seed}\0".encode()
    for k, count in enumerate(per_class):
        rows = torch.nonzero(data.labels == k).squeeze(1).tolist() if count else []
        rows.sort(key=lambda i: hashlib.sha256(prefix + data.ids[i].encode("utf-8", "surrogatepass")).digest())
        chosen[rows[:count]] = True
    return chosen
