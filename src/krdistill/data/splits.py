"""From a data source to the images of a run: the long-tailed cut and the validation part."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch

from ..errors import ArgumentError, DataError
from .containers import DataBundle, E, LoadedImages, first_few
from .long_tail import Profile, largest_n_max, long_tail_counts, long_tail_indices
from .selection import choose
from .sources import CacheUse, OnUnreadable, SplitBy, load_images

# Above this ratio of largest to smallest class the data count as unequal, and a default n_max would be a guess.
_BALANCED = 2.0


def load_data(
    source: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    profile: Profile = "none",
    imbalance_factor: float = 1.0,
    n_max: int | None = None,
    seed: int = 0,
    val_fraction: float = 0.0,
    val_per_class: int | None = None,
    image_size: int | None = None,
    on_unreadable: OnUnreadable = "error",
    empty: Literal["error", "drop"] = "error",
    test_fraction: float | None = None,
    test_seed: int = 0,
    split_by: SplitBy = "none",
    cache: CacheUse = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> DataBundle:
    """Reads a source, cuts its training part long-tailed, and puts a validation part aside.

    The test part is never cut. The validation part comes out of what the cut leaves, so that training and validation
    together are the canonical split.

    Args:
        source: ``digits``, ``cifar10``, ``cifar100``, ``tiny-imagenet``, or the path of a folder of images, a manifest,
            lists, a NumPy archive or a Hugging Face data set (see :func:`krdistill.data.load_images`).
        root: folder that holds the known data sets; by default ``$KRDISTILL_DATA``, else ``~/.cache/krdistill/data``.
            For a manifest or lists: what their relative paths start from, by default their own folder.
        profile: ``exp``, ``step`` or ``pareto`` (:func:`krdistill.data.long_tail_counts`); ``none`` keeps the data.
        imbalance_factor: largest over smallest class of the cut, at least 1.
        n_max: images of the largest class of the cut; by default as many as every class can supply.
        seed: of the cut and of the validation part; 0 gives the CIFAR-LT of the literature. Keep it the same over runs
            that are compared, whatever their own seed.
        val_fraction: share of the training images to put aside for validation, class by class, so that validation
            is as long-tailed as training; at least one image per class stays in training.
        val_per_class: instead: this many images of every class, a balanced validation part.
        image_size: side in pixels; None keeps the size the images have.
        on_unreadable: ``skip`` leaves unreadable image files out; by default they are an error.
        empty: ``drop`` leaves classes without a training image out, in every part; by default they are an error.
        test_fraction: see :func:`krdistill.data.load_images`.
        test_seed: see :func:`krdistill.data.load_images`.
        split_by: see :func:`krdistill.data.load_images`; the validation part heeds it too, and then its shares are met
            as nearly as whole groups allow.
        cache: see :func:`krdistill.data.load_images`; the parts are the same with and without.
        on_progress: see :func:`krdistill.data.load_images`.

    Returns:
        The parts. Their ``split`` records every argument that defines them, ``n_max`` resolved, with counts, notes
        and checksum.

    Raises:
        DataError: as :func:`krdistill.data.load_images`; a cut that the data cannot supply; empty classes; or a
            validation part that would take all of a class.
        ArgumentError: an argument out of range, or two that exclude each other.
    """
    if empty not in ("error", "drop"):
        raise ArgumentError(f"Expected empty to be 'error' or 'drop', got {empty!r}.")
    _check_validation(val_fraction, val_per_class)
    loaded = load_images(
        source,
        root=root,
        image_size=image_size,
        on_unreadable=on_unreadable,
        test_fraction=test_fraction,
        test_seed=test_seed,
        split_by=split_by,
        cache=cache,
        on_progress=on_progress,
    )
    return cut_loaded(
        loaded,
        profile=profile,
        imbalance_factor=imbalance_factor,
        n_max=n_max,
        seed=seed,
        val_fraction=val_fraction,
        val_per_class=val_per_class,
        empty=empty,
        record={
            "source": os.fspath(source),
            "image_size": image_size,
            "on_unreadable": on_unreadable,
            "test_fraction": test_fraction,
            "test_seed": test_seed,
            "split_by": split_by,
        },
    )


def cut_loaded(
    loaded: LoadedImages,
    *,
    profile: Profile = "none",
    imbalance_factor: float = 1.0,
    n_max: int | None = None,
    seed: int = 0,
    val_fraction: float = 0.0,
    val_per_class: int | None = None,
    empty: Literal["error", "drop"] = "error",
    record: Mapping[str, Any] | None = None,
) -> DataBundle:
    """The second half of :func:`load_data`: from a source's parts to the parts of a run.

    Args:
        loaded: what a source holds.
        profile, imbalance_factor, n_max, seed, val_fraction, val_per_class, empty: as in :func:`load_data`.
        record: what else defines the split, for its record.
    """
    train, test, val, notes = loaded
    if val is not None and (val_fraction or val_per_class):
        raise ArgumentError(f"{train.name} has a validation part of its own; leave val_fraction and val_per_class out.")
    bundle = DataBundle(train=train, test=test, val=val)
    absent = [train.class_names[k] for k in torch.nonzero(train.counts() == 0).squeeze(1).tolist()]
    if absent:
        if empty == "error":
            raise DataError(
                f"{train.name}: no training image of {len(absent)} of {train.num_classes} classes: {first_few(absent)}"
                ". Add images, or leave the classes out with empty='drop' (data.empty in a configuration)."
            )
        bundle = bundle.keep_classes(train.counts() > 0)
        notes = (*notes, f"classes without a training image were left out: {first_few(absent)}")
    train, val = bundle.train, bundle.val
    if profile != "none" or n_max is not None or imbalance_factor != 1:
        train = cut_long_tail(train, profile, imbalance_factor, n_max=n_max, seed=seed)
        n_max = None if profile == "none" else int(train.counts().max())
    if val_fraction or val_per_class:
        train, val = carve_validation(train, val_fraction, per_class=val_per_class, seed=seed)
    return DataBundle(
        train=train,
        test=bundle.test,
        val=val,
        split={
            "name": train.name,
            "profile": profile,
            "imbalance_factor": float(imbalance_factor),
            "n_max": n_max,
            "seed": seed,
            "val_fraction": val_fraction,
            "val_per_class": val_per_class,
            "empty": empty,
            **(record or {}),
            "dropped_classes": absent,
            "notes": list(notes),
        },
    )


def cut_long_tail(data: E, profile: Profile, imbalance_factor: float, *, n_max: int | None = None, seed: int = 0) -> E:
    """A long-tailed cut of balanced data; class 0 stays the largest.

    Args:
        data: the images, about as many of each class.
        profile: ``exp``, ``step`` or ``pareto`` (:func:`krdistill.data.long_tail_counts`).
        imbalance_factor: largest over smallest class, at least 1.
        n_max: images of the largest class; by default as many as every class can supply, which for balanced data is
            the class size.
        seed: which images are kept (:func:`krdistill.data.long_tail_indices`).

    Returns:
        The images kept, class by class.

    Raises:
        ArgumentError: a value out of range, or ``n_max`` with profile ``none``.
        DataError: classes with too few images; among them data that are long-tailed already.
    """
    if profile == "none" and n_max is not None:
        raise ArgumentError(
            f"Profile 'none' cuts nothing, so n_max {n_max} has no effect; profile 'exp' with imbalance factor 1 gives "
            "every class n_max images."
        )
    available = data.counts().tolist()
    possible = largest_n_max(available, imbalance_factor, profile)
    if profile == "none":
        return data
    smallest = int(np.argmin(available))
    spread = f"classes have from {available[smallest]:,} ({data.class_names[smallest]}) to {max(available):,} images"
    if min(available) == max(available):
        spread = f"every class has {max(available):,} images"
    advice = f"the largest n_max that every class can supply is {possible}" if possible else "no n_max can be supplied"
    if n_max is None:
        if max(available) > _BALANCED * available[smallest]:
            raise DataError(
                f"{data.name} is not balanced, {spread}, and a long-tailed cut is made of balanced data. Use profile "
                f"'none' to take the imbalance it has, or set n_max ({advice})."
            )
        if not possible:
            raise DataError(
                f"{data.name}: {spread}, too few for an imbalance factor of {imbalance_factor:g}; expected at most "
                f"{available[smallest]}."
            )
        n_max = possible
    counts = long_tail_counts(data.num_classes, n_max, imbalance_factor, profile)
    try:
        rows = long_tail_indices(data.labels.numpy(), counts, seed=seed, class_names=data.class_names)
    except DataError as error:
        raise DataError(f"{data.name}: {error} Here, {spread}; {advice}.") from None
    return data.subset(rows)


def carve_validation(data: E, fraction: float = 0.0, *, per_class: int | None = None, seed: int = 0) -> tuple[E, E]:
    """Puts a part of the images aside.

    Args:
        data: the images.
        fraction: share of every class, rounded to the nearest number of images; at least one stays.
        per_class: instead: this many of every class.
        seed: which images (:func:`krdistill.data.selection.choose`).

    Returns:
        What stays and what was put aside, both in the order they had.

    Raises:
        ArgumentError: neither or both of ``fraction`` and ``per_class``, or one out of range.
        DataError: nothing would be put aside, or all of a class.
    """
    _check_validation(fraction, per_class)
    counts = data.counts().tolist()
    if per_class:
        short = [f"{data.class_names[k]} ({n})" for k, n in enumerate(counts) if n <= per_class]
        if short:
            raise DataError(
                f"{data.name}: {per_class} validation images per class would leave nothing to train on in "
                f"{first_few(short)}. Use at most {max(0, min(counts) - 1)} per class, or val_fraction."
            )
        wanted = [per_class] * len(counts)
    elif fraction:
        wanted = [max(0, min(n - 1, int(n * fraction + 0.5))) for n in counts]
        if not any(wanted):
            raise DataError(
                f"{data.name}: a share of {fraction:g} of {max(counts)} images in the largest class is none; use a "
                "larger val_fraction."
            )
    else:
        raise ArgumentError("Expected a share or a number of images per class to put aside, got neither.")
    chosen = choose(data, wanted, seed, "validation")
    if not chosen.any():
        raise DataError(
            f"{data.name}: the images that belong together cannot be parted, so there is nothing to validate on. Leave "
            "val_fraction and val_per_class out, or use split_by 'none' (data.split_by in a configuration)."
        )
    return data.subset(~chosen), data.subset(chosen)


def _check_validation(fraction: float, per_class: int | None) -> None:
    if not 0 <= fraction < 1:
        raise ArgumentError(f"Expected val_fraction of at least 0 and below 1, got {fraction}.")
    if per_class is not None and (not isinstance(per_class, int) or per_class < 1):
        raise ArgumentError(f"Expected val_per_class to be a whole number, at least 1, got {per_class!r}.")
    if fraction and per_class:
        raise ArgumentError(f"Expected either val_fraction or val_per_class, got {fraction} and {per_class}.")
