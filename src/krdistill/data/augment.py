"""Batched, replayable augmentation: what training uses, by name.

A view of an image is a pure function of (seed, epoch, image index): the same image, seed and epoch give the same view,
whatever else is in the batch, so that a view can be replayed and a teacher's answer to it can be stored. Everything
works on whole batches, on the device that holds them.
"""

from __future__ import annotations

from .._checks import check_integer
from ..errors import ArgumentError, unknown_name
from ..kinds import NOUNS, Kind
from .augment_names import OF_KIND
from .augmentation.automatic import RandAugment, TrivialAugmentWide
from .augmentation.base import Augmentation, Compose
from .augmentation.mixing import mixup
from .augmentation.spatial import Cutout, HorizontalFlip, RandomCrop
from .augmentation.words import WordDropout
from .containers import Examples, ImageData

__all__ = [
    "Augmentation",
    "Compose",
    "Cutout",
    "HorizontalFlip",
    "RandAugment",
    "RandomCrop",
    "TrivialAugmentWide",
    "WordDropout",
    "augmentation_of",
    "build_augmentation",
    "mixup",
]


def build_augmentation(name: str, image_size: int | None, kind: Kind = "image") -> Augmentation:
    """An augmentation by name, scaled to the size of the images.

    Lengths are the field's at 32 pixels (padding 4, hole 16) and keep their share of the side at other sizes.

    Args:
        name: one of :func:`krdistill.data.augment_names.list_augmentations`.
        image_size: the images' side in pixels (their height, where they are not square); None for other kinds.
        kind: of the examples.

    Returns:
        A function of ``(images, index, seed=, epoch=)``; see :class:`Augmentation`.

    Raises:
        ArgumentError: an unknown name, one for another kind of examples, or ``image_size`` below 1.

    Source: crop and flip, He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385;
    before RandAugment or TrivialAugment, and Cutout behind them, as those papers do on CIFAR.
    """
    known = OF_KIND[kind]
    if name not in known:
        hint = "`krdistill list augmentations` describes them."
        others = [other for other, names in OF_KIND.items() if name in names]
        if others:
            raise ArgumentError(
                f"Augmentation {name!r} is for {NOUNS[others[0]]}; for {NOUNS[kind]} there are: "  # type: ignore[index]
                f"{', '.join(known)} (train.augmentation). {hint}"
            )
        raise ArgumentError(unknown_name("augmentation", str(name), known, hint=hint))
    if kind != "image":
        return Compose((WordDropout(),) if name == "word-dropout" else (), kind)
    size = check_integer("image_size", image_size, at_least=1)
    crop, flip, hole = RandomCrop(size // 8), HorizontalFlip(), Cutout(size // 2)
    parts: dict[str, tuple[Augmentation, ...]] = {
        "none": (),
        "crop-only": (crop,),
        "crop-flip": (crop, flip),
        "rand-augment": (crop, flip, RandAugment(), hole),
        "trivial-augment": (crop, flip, TrivialAugmentWide(), hole),
    }
    return Compose(parts[name])


def augmentation_of(name: str, data: Examples) -> Augmentation:
    """The augmentation of a name for these examples; see :func:`build_augmentation`."""
    return build_augmentation(name, data.image_size[0] if isinstance(data, ImageData) else None, data.kind)
