"""The augmentations by name; imports no torch, so that they can be listed at no cost."""

from __future__ import annotations

AUGMENTATIONS = {
    "none": "images as they are",
    "crop-only": "zero padding of 1/8 of the side, random crop; for digits and characters, which a flip would change",
    "crop-flip": "crop-only, then a horizontal flip of half the images; the usual recipe for natural images",
    "rand-augment": "crop-flip, RandAugment (2 operations, magnitude 9 of 30), black hole of half the side (Cutout)",
    "trivial-augment": "crop-flip, TrivialAugment (1 operation, any magnitude), black hole of half the side (Cutout)",
}


OF_KIND: dict[str, dict[str, str]] = {
    "image": AUGMENTATIONS,
    "text": {"none": "sentences as they are", "word-dropout": "every word left out with a probability of 0.1"},
    "features": {"none": "rows as they are"},
}


def list_augmentations(kind: str = "image") -> dict[str, str]:
    """Every augmentation that :func:`krdistill.data.augment.build_augmentation` knows for a kind of examples
    (``image``, ``text``, ``features``): name to what it does."""
    return dict(OF_KIND[kind])
