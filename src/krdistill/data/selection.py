"""Choosing a given number of images per class."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .containers import Examples


def choose(data: Examples, per_class: Sequence[int], seed: int, purpose: str) -> Tensor:
    """Marks ``per_class[k]`` images of every class k; where images belong together (``data.units``), about as many.

    Args:
        data: the images.
        per_class: how many of each class, at most as many as there are.
        seed: another seed, another choice.
        purpose: choices for different purposes are independent.

    Returns:
        Shape ``(N,)``, bool.
    """
    return lot(data.labels, data.ids, per_class, seed, purpose, data.units)


def lot(
    labels: Tensor,
    ids: Sequence[str],
    per_class: Sequence[int],
    seed: int,
    purpose: str,
    units: Sequence[str] | None = None,
) -> Tensor:
    """Marks ``per_class[k]`` images of every class k.

    Each image draws a number from (seed, purpose, its id), and the smallest numbers of a class are chosen. So the
    choice depends neither on the order of the images nor on any generator's state, and images that are added later
    move few others across.

    With ``units``, each unit draws the number, and is taken whole or not at all. In the order of their numbers, a unit
    is taken if that brings the chosen images closer to what is wanted,

        sum_k |per_class[k] - chosen[k]| / per_class[k]

    over the classes of the unit, and leaves no class without an image on the other side. Then every class that is
    still without gets the unit that disturbs this sum least, if one can be spared.

    Args:
        labels: class numbers, int64, shape ``(N,)``.
        ids: a text per image.
        per_class: how many of each class, at most as many as there are.
        seed: another seed, another choice.
        purpose: choices for different purposes are independent.
        units: the unit that each image belongs to.

    Returns:
        Shape ``(N,)``, bool.
    """
    prefix = f"{purpose}\0{seed}\0".encode()

    def number(text: str) -> bytes:
        return hashlib.sha256(prefix + text.encode("utf-8", "surrogatepass")).digest()

    chosen = torch.zeros(len(ids), dtype=torch.bool)
    y = labels.numpy()
    if units is None:
        order = np.argsort(y, kind="stable")
        starts = np.searchsorted(y[order], np.arange(len(per_class) + 1))
        for k, count in enumerate(per_class):
            if count:
                rows = order[starts[k] : starts[k + 1]].tolist()
                rows.sort(key=lambda i: number(ids[i]))
                chosen[rows[:count]] = True
        return chosen

    members: dict[str, list[int]] = {}
    for i, unit in enumerate(units):
        members.setdefault(unit, []).append(i)
    sizes = {unit: np.unique(y[rows], return_counts=True) for unit, rows in members.items()}
    wanted, taken = np.array(per_class), np.zeros(len(per_class), np.int64)
    left = np.bincount(y, minlength=len(per_class))
    share = 1.0 / np.maximum(wanted, 1)
    picked: set[str] = set()

    def gain(unit: str) -> float:
        k, n = sizes[unit]
        short = wanted[k] - taken[k]
        return float(((np.abs(short) - np.abs(short - n)) * share[k]).sum())

    def spared(unit: str) -> bool:
        k, n = sizes[unit]
        return unit not in picked and bool((left[k] > n).all())

    def take(unit: str) -> None:
        k, n = sizes[unit]
        taken[k] += n
        left[k] -= n
        picked.add(unit)
        chosen[members[unit]] = True

    order_of_units = sorted(members, key=number)
    for unit in order_of_units:
        if gain(unit) > 0 and spared(unit):
            take(unit)
    homes: dict[int, list[str]] = {int(k): [] for k in np.flatnonzero((taken == 0) & (wanted > 0))}
    for unit in order_of_units if homes else ():
        for k in sizes[unit][0].tolist():
            if k in homes:
                homes[k].append(unit)
    for k, found in homes.items():
        there = [unit for unit in found if spared(unit)]
        if there and not taken[k]:
            take(max(there, key=gain))
    return chosen
