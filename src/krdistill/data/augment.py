"""Batched, replayable augmentation: what training uses, by name.

A view of an image is a pure function of (seed, epoch, image index): the same image, seed and epoch give the same view,
whatever else is in the batch, so that a view can be replayed and a teacher's answer to it can be stored. Everything
works on whole batches, on the device that holds them.
"""

from __future__ import annotations

from .._checks import check_integer
from ..errors import ArgumentError, unknown_name
from .augment_names import AUGMENTATIONS
from .augmentation.automatic import RandAugment, TrivialAugmentWide
from .augmentation.base import Augmentation, Compose
from .augmentation.mixing import mixup
from .augmentation.spatial import Cutout, HorizontalFlip, RandomCrop

__all__ = [
    "Augmentation",
    "Compose",
    "Cutout",
    "HorizontalFlip",
    "RandAugment",
    "RandomCrop",
    "TrivialAugmentWide",
    "build_augmentation",
    "mixup",
]


def build_augmentation(name: str, image_size: int) -> Augmentation:
    """An augmentation by name, scaled to the size of the images.

    Lengths are the field's at 32 pixels (padding 4, hole 16) and keep their share of the side at other sizes.

    Args:
        name: one of :func:`krdistill.data.augment_names.list_augmentations`.
        image_size: the images' side in pixels (their height, where they are not square).

    Returns:
        A function of ``(images, index, seed=, epoch=)``; see :class:`Augmentation`.

    Raises:
        ArgumentError: an unknown name, or ``image_size`` below 1.

    Source: crop and flip, He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385;
    before RandAugment or TrivialAugment, and Cutout behind them, as those papers do on CIFAR.
    """
    if name not in AUGMENTATIONS:
        hint = "`krdistill list augmentations` describes them."
        raise ArgumentError(unknown_name("augmentation", str(name), AUGMENTATIONS, hint=hint))
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
