"""Augmentation: against Pillow and plain loops, replayable, even, and clear about what it refuses.

The references are Pillow's own operations, one image at a time, and NumPy loops that take the same random numbers from
``rng.uniform``. All comparisons are exact except two. Blends (brightness, colour, contrast, sharpness) may differ by
one grey level off x86: there a C compiler may fuse Pillow's multiplication and addition into one rounding. Autocontrast
may lie one level above Pillow, which evaluates its formula in float64 and cuts rounding errors off (254.99... to 254).
"""

from __future__ import annotations

import platform
import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats
from sklearn import datasets
from torch import Tensor

from krdistill.data import augment
from krdistill.data.augment import (
    Augmentation,
    Compose,
    Cutout,
    HorizontalFlip,
    RandAugment,
    RandomCrop,
    TrivialAugmentWide,
    build_augmentation,
    mixup,
)
from krdistill.data.augment_names import list_augmentations
from krdistill.data.augmentation import automatic, operations
from krdistill.errors import ArgumentError
from krdistill.rng import uniform

Pixels = npt.NDArray[np.uint8]

NAMES = tuple(list_augmentations())
BLEND_LEVELS = 0 if platform.machine() in ("x86_64", "AMD64") else 1
DEVICES = [
    name for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())) if there
]


def _random(n: int, height: int, width: int, channels: int, seed: int = 0) -> Pixels:
    return np.random.RandomState(seed).randint(0, 256, (n, height, width, channels)).astype(np.uint8)


def _digits(n: int) -> Pixels:
    """Real handwritten digits, 8x8, grey."""
    return np.rint(datasets.load_digits().images[:n] * (255 / 16)).astype(np.uint8)[..., None]


def _photos(side: int) -> Pixels:
    """Pieces of two real colour photographs."""
    pieces = [
        photo[y : y + side, x : x + side]
        for photo in datasets.load_sample_images().images
        for y in range(0, 400 - side, 90)
        for x in range(0, 600 - side, 140)
    ]
    return np.stack(pieces)


def _flat() -> Pixels:
    """One colour each, among them black and white."""
    colors = np.array([[0, 0, 0], [255, 255, 255], [128, 128, 128], [255, 0, 3]], dtype=np.uint8)
    return np.broadcast_to(colors[:, None, None], (4, 16, 16, 3)).copy()


def _low_contrast() -> Pixels:
    return (_random(8, 20, 20, 3, seed=3) // 9 + 100).astype(np.uint8)


IMAGES: dict[str, Callable[[], Pixels]] = {
    "random": lambda: _random(12, 32, 32, 3),
    "random-grey": lambda: _random(12, 28, 28, 1),
    "oblong": lambda: _random(6, 18, 33, 3),
    "digits": lambda: _digits(40),
    "large-digits": lambda: _digits(30).repeat(4, axis=1).repeat(4, axis=2),
    "photos": lambda: _photos(32),
    "large-photos": lambda: _photos(96)[:6],
    "low-contrast": _low_contrast,
    "flat": _flat,
    "1x1": lambda: _random(5, 1, 1, 3),
    "2x3": lambda: _random(5, 2, 3, 1),
    "3x3": lambda: _random(5, 3, 3, 3),
}


@pytest.fixture(scope="module", params=list(IMAGES))
def pixels(request: pytest.FixtureRequest) -> Pixels:
    return IMAGES[request.param]()


def _to_pil(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _from_pil(image: Image.Image) -> Pixels:
    return np.asarray(image).reshape(image.height, image.width, -1)


def _images(pixels: Pixels) -> Tensor:
    """As a batch in training is: ``(B, C, H, W)``, channels-last."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _pixels(images: Tensor) -> Pixels:
    return images.permute(0, 2, 3, 1).numpy()


def _levels(ours: Pixels, theirs: Pixels) -> tuple[int, int]:
    """By how much we lie below and above, at most."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == np.uint8
    difference = ours.astype(int) - theirs.astype(int)
    return int(difference.min()), int(difference.max())


def _pil_operation(image: Image.Image, operation: str, strength: float) -> Image.Image:
    """One operation in Pillow. ``strength`` is signed, as the papers give it; bits or threshold where it has one."""
    size, nearest = image.size, Image.Resampling.NEAREST
    affine = Image.Transform.AFFINE
    if operation == "identity":
        return image
    if operation == "shear-x":
        return image.transform(size, affine, (1, strength, 0, 0, 1, 0), nearest)
    if operation == "shear-y":
        return image.transform(size, affine, (1, 0, 0, strength, 1, 0), nearest)
    if operation == "translate-x":
        return image.transform(size, affine, (1, 0, -int(strength), 0, 1, 0), nearest)
    if operation == "translate-y":
        return image.transform(size, affine, (1, 0, 0, 0, 1, -int(strength)), nearest)
    if operation == "rotate":
        return image.rotate(strength, nearest)
    if operation == "posterize":
        return ImageOps.posterize(image, int(strength))
    if operation == "solarize":
        return ImageOps.solarize(image, strength)  # type: ignore[arg-type]
    if operation == "autocontrast":
        return ImageOps.autocontrast(image)
    if operation == "equalize":
        return ImageOps.equalize(image)
    enhance = {
        "brightness": ImageEnhance.Brightness,
        "color": ImageEnhance.Color,
        "contrast": ImageEnhance.Contrast,
        "sharpness": ImageEnhance.Sharpness,
    }
    return enhance[operation](image).enhance(1 + strength)


def _by_pil(pixels: Pixels, operation: str, strengths: list[float]) -> Pixels:
    done = [_from_pil(_pil_operation(_to_pil(image), operation, s)) for image, s in zip(pixels, strengths, strict=True)]
    return np.stack(done)


# Operations against Pillow --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["brightness", "color", "contrast", "sharpness"])
def test_blends_are_pillows(pixels: Pixels, operation: str) -> None:
    factors = np.random.RandomState(1).uniform(0, 2.2, len(pixels))
    factors[:3] = 0, 1, 2
    ours = getattr(operations, operation)(torch.from_numpy(pixels), torch.tensor(factors, dtype=torch.float32))
    low, high = _levels(ours.numpy(), _by_pil(pixels, operation, list(factors - 1)))
    assert low >= -BLEND_LEVELS and high <= BLEND_LEVELS


def test_posterize_is_pillows(pixels: Pixels) -> None:
    bits = [float(i % 8 + 1) for i in range(len(pixels))]
    ours = operations.posterize(torch.from_numpy(pixels), torch.tensor(bits))
    assert np.array_equal(ours.numpy(), _by_pil(pixels, "posterize", bits))


def test_solarize_is_pillows(pixels: Pixels) -> None:
    thresholds = [(0.0, 255.0, 127.5, 128.0, 8.5)[i % 5] for i in range(len(pixels))]
    ours = operations.solarize(torch.from_numpy(pixels), torch.tensor(thresholds))
    assert np.array_equal(ours.numpy(), _by_pil(pixels, "solarize", thresholds))


def test_equalize_is_pillows(pixels: Pixels) -> None:
    ours = operations.equalize(torch.from_numpy(pixels)).numpy()
    assert np.array_equal(ours, _by_pil(pixels, "equalize", [0.0] * len(pixels)))
    if pixels.shape[1] * pixels.shape[2] < 256:
        assert np.array_equal(ours, pixels), "too few pixels for a histogram of 256 steps"


def test_equalize_stops_at_white() -> None:
    """400 pixels: the step is 1, and more than 255 of them lie below the brightest."""
    pixels = np.arange(400).clip(max=255).astype(np.uint8).reshape(1, 20, 20, 1)
    pixels[0, 0, :10] = np.arange(100, 110)[:, None]
    pixels[0, 15:] = np.arange(100)[:, None].reshape(5, 20, 1)
    ours = operations.equalize(torch.from_numpy(pixels)).numpy()
    assert np.array_equal(ours, _by_pil(pixels, "equalize", [0.0]))
    assert (ours == 255).sum() > (pixels == 255).sum()


def test_autocontrast_is_pillows_but_for_its_rounding_errors(pixels: Pixels) -> None:
    ours = operations.autocontrast(torch.from_numpy(pixels)).numpy()
    theirs = _by_pil(pixels, "autocontrast", [0.0] * len(pixels))
    low, high = _levels(ours, theirs)
    assert low >= 0 and high <= 1
    if pixels.shape[1] * pixels.shape[2] >= 64:
        assert (ours != theirs).mean() < 0.01


def test_autocontrast_is_exact_for_every_value_and_range() -> None:
    value = np.arange(256)
    for low in range(255):
        high = np.arange(low + 1, 256)[:, None]
        seen = np.clip(value, low, high)
        expected = 255 * (seen - low) // (high - low)
        ours = operations.autocontrast(torch.from_numpy(seen.astype(np.uint8))[:, None, :, None])
        assert np.array_equal(ours[:, 0, :, 0].numpy(), expected)


def test_flat_images_stay_where_there_is_nothing_to_stretch() -> None:
    flat = torch.from_numpy(_flat())
    grey = flat[2:3]
    for operation in (operations.autocontrast, operations.equalize):
        assert torch.equal(operation(flat), flat)
    for blend in (operations.color, operations.contrast, operations.sharpness):
        assert torch.equal(blend(grey, torch.tensor([1.9])), grey)


@pytest.mark.parametrize("name", ["random", "oblong", "digits", "large-digits", "photos", "1x1", "2x3"])
def test_maps_are_pillows(name: str) -> None:
    pixels = IMAGES[name]()
    H, W = pixels.shape[1:3]
    random = np.random.RandomState(2)
    strengths = {
        "shear-x": [*random.uniform(-1, 1, 8), 0.0, 0.99, -0.99],
        "shear-y": [*random.uniform(-1, 1, 8), 0.0, 0.99, -0.99],
        "translate-x": [*random.uniform(-W, W, 8), 0.0, W, -W],
        "translate-y": [*random.uniform(-H, H, 8), 0.0, H, -H],
        "rotate": [*random.uniform(-135, 135, 8), 0.0, 90.0, -90.0, 45.0, 180.0, 135.0],
    }
    matrix: dict[str, Callable[[float], operations.Matrix]] = {
        "shear-x": operations.shear_x,
        "shear-y": operations.shear_y,
        "translate-x": lambda s: operations.translation(int(s), 0),
        "translate-y": lambda s: operations.translation(0, int(s)),
        "rotate": lambda s: operations.rotation(s, H, W),
    }
    for operation, values in strengths.items():
        rows = [pixels[i % len(pixels)] for i in range(len(values))]
        maps = operations.fixed_point([matrix[operation](float(s)) for s in values])
        ours = operations.affine(torch.from_numpy(np.stack(rows)), maps).numpy()
        assert np.array_equal(ours, _by_pil(np.stack(rows), operation, values)), operation


# Crop, flip, cutout against loops -------------------------------------------------------------------------------------

INDEX = torch.tensor([0, 1, 7, 50_000, 3, 12, 99, 100, 101, 2**40, 5, 6])
SEED, EPOCH = 11, 4


def _draws(stream: str, count: int) -> npt.NDArray[np.float32]:
    result: npt.NDArray[np.float32] = uniform(SEED, stream, EPOCH, INDEX, count).numpy()
    return result


@pytest.mark.parametrize("shape", [(32, 32, 3), (8, 8, 1), (18, 33, 3), (1, 1, 3)])
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_crop(shape: tuple[int, int, int], padding: int) -> None:
    H, W, C = shape
    pixels = _random(len(INDEX), H, W, C)
    expected = np.zeros_like(pixels)
    for i, u in enumerate(_draws("crop", 2)):
        top, left = (int(v * (2 * padding + 1)) - padding for v in u)
        for y in range(H):
            for x in range(W):
                if 0 <= y + top < H and 0 <= x + left < W:
                    expected[i, y, x] = pixels[i, y + top, x + left]
    ours = RandomCrop(padding)(_images(pixels), INDEX, seed=SEED, epoch=EPOCH)
    assert np.array_equal(_pixels(ours), expected)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
def test_flip(p: float) -> None:
    pixels = _random(len(INDEX), 9, 6, 3)
    flips = _draws("flip", 1)[:, 0] < p
    expected = np.stack([image[:, ::-1] if flip else image for image, flip in zip(pixels, flips, strict=True)])
    ours = HorizontalFlip(p)(_images(pixels), INDEX, seed=SEED, epoch=EPOCH)
    assert np.array_equal(_pixels(ours), expected)
    assert p not in (0.0, 1.0) or flips.mean() == p


@pytest.mark.parametrize("length", [0, 1, 7, 16, 100])
def test_cutout(length: int) -> None:
    H, W = 20, 32
    pixels = _random(len(INDEX), H, W, 3).clip(min=1)  # nothing is black before
    expected = pixels.copy()
    for image, u in zip(expected, _draws("cutout", 2), strict=True):
        y, x = int(u[0] * H) - length // 2, int(u[1] * W) - length // 2
        image[max(0, y) : max(0, y + length), max(0, x) : max(0, x + length)] = 0
    ours = Cutout(length)(_images(pixels), INDEX, seed=SEED, epoch=EPOCH)
    assert np.array_equal(_pixels(ours), expected)


# Policies against Pillow ----------------------------------------------------------------------------------------------

SIGNED = {"shear-x", "shear-y", "translate-x", "translate-y", "rotate", "brightness", "color", "contrast", "sharpness"}


def _strength(policy: str, operation: str, magnitude: int, side: int) -> float:
    """The papers' ranges, as torchvision gives them; ``side`` is the length along which images are translated."""
    wide = policy == "trivial-augment"
    top = {"shear": 0.99 if wide else 0.3, "rotate": 135 if wide else 30}
    top["translate"] = min(32, side) if wide else 150 / 331 * side
    if operation == "posterize":
        return 8 - round(magnitude / (30 / (6 if wide else 4)))
    if operation == "solarize":
        return 255 - 8.5 * magnitude
    if operation in SIGNED:
        return top.get(operation.split("-")[0], 0.99 if wide else 0.9) * magnitude / 30
    return 0.0


def _policy_by_pil(pixels: Pixels, policy: str, draws: list[tuple[str, int, bool]]) -> tuple[Pixels, set[str]]:
    """One operation per image; also which operations were drawn."""
    H, W = pixels.shape[1:3]
    views = []
    for image, (operation, magnitude, minus) in zip(pixels, draws, strict=True):
        strength = _strength(policy, operation, magnitude, W if operation == "translate-x" else H)
        if minus and operation in SIGNED:
            strength = -strength
        views.append(_from_pil(_pil_operation(_to_pil(image), operation, strength)))
    return np.stack(views), {operation for operation, _, _ in draws}


@pytest.mark.parametrize("name", ["photos", "oblong", "random-grey", "digits"])
def test_trivial_augment_view_by_view(name: str) -> None:
    policy = "trivial-augment"
    images = IMAGES[name]()
    pixels = images[np.arange(300) % len(images)]
    index = torch.arange(1000, 1300)
    u = uniform(SEED, policy, EPOCH, index, 3).numpy()
    draws = [(automatic.OPERATIONS[int(a * 14)], int(b * 31), bool(c < 0.5)) for a, b, c in u]
    ours = _pixels(TrivialAugmentWide()(_images(pixels), index, seed=SEED, epoch=EPOCH))
    theirs, seen = _policy_by_pil(pixels, policy, draws)
    assert seen == set(automatic.OPERATIONS)
    for view, reference, (operation, _, _) in zip(ours, theirs, draws, strict=True):
        low, high = _levels(view, reference)
        slack = BLEND_LEVELS if operation in {"brightness", "color", "contrast", "sharpness"} else 0
        assert low >= -slack and high <= max(slack, operation == "autocontrast"), operation


@pytest.mark.skipif(BLEND_LEVELS > 0, reason="two operations in a row are compared exactly only where blends are exact")
@pytest.mark.parametrize("name", ["photos", "oblong", "random-grey", "digits"])
@pytest.mark.parametrize(("num_ops", "magnitude"), [(1, 0), (2, 9), (3, 30)])
def test_rand_augment_view_by_view(name: str, num_ops: int, magnitude: int) -> None:
    images = IMAGES[name]()
    pixels = images[np.arange(200) % len(images)]
    index = torch.arange(200)
    u = uniform(SEED, "rand-augment", EPOCH, index, 2 * num_ops).numpy()
    ours = _pixels(RandAugment(num_ops, magnitude)(_images(pixels), index, seed=SEED, epoch=EPOCH))
    theirs, exact = pixels, np.ones(len(pixels), dtype=bool)
    for k in range(num_ops):
        draws = [(automatic.OPERATIONS[int(a * 14)], magnitude, bool(b < 0.5)) for a, b in u[:, 2 * k : 2 * k + 2]]
        theirs, seen = _policy_by_pil(theirs, "rand-augment", draws)
        exact &= [operation != "autocontrast" for operation, _, _ in draws]  # its one level may grow afterwards
        assert seen == set(automatic.OPERATIONS)
    assert exact.sum() > 120
    assert np.array_equal(ours[exact], theirs[exact])


@pytest.mark.parametrize("side", [8, 16, 28, 32, 64, 224])
def test_strengths_are_torchvisions(side: int) -> None:
    """torchvision builds its tables with float32 ``linspace``, which may miss whole numbers by a rounding error."""
    wide = automatic._Ranges(0.99, 32, 32, 135.0, 0.99, 6)
    narrow = automatic._Ranges(0.3, 150 / 331 * side, 150 / 331 * side, 30.0, 0.9, 4)
    for ranges in (wide, narrow):
        values, maps = automatic._strengths(ranges, side, side)
        at = automatic.OPERATIONS.index
        for operation, top in (("brightness", ranges.enhance), ("contrast", ranges.enhance)):
            expected = torch.linspace(0.0, top, 31)
            torch.testing.assert_close(values[at(operation), :, 0], 1 + expected)
            torch.testing.assert_close(values[at(operation), :, 1], 1 - expected)
        bits = 8 - (torch.arange(31) / (30 / ranges.posterize)).round()
        assert torch.equal(values[at("posterize"), :, 0], bits)
        torch.testing.assert_close(values[at("solarize"), :, 0], torch.linspace(255.0, 0.0, 31))
        moved = torch.tensor([int(v + 1e-4) for v in torch.linspace(0.0, ranges.translate_x, 31)])
        assert torch.equal(maps[at("translate-x"), :, 0, 2], 32768 - 65536 * moved)
        assert torch.equal(maps[at("translate-y"), :, 1, 5], 32768 + 65536 * moved)
        shear = torch.linspace(0.0, ranges.shear, 31) * 65536
        assert (maps[at("shear-x"), :, 0, 1] - shear).abs().max() <= 0.51
        turn = torch.linspace(0.0, ranges.rotate, 31).deg2rad()
        assert (maps[at("rotate"), :, 0, 0] - 65536 * turn.cos()).abs().max() <= 0.6
        assert (maps[at("rotate"), :, 0, 3] - 65536 * turn.sin()).abs().max() <= 0.6


def test_small_images_are_not_translated_further_than_their_side() -> None:
    """At 8 pixels as large a share of translations as at 32 leaves something to see: all but the last magnitude."""
    for side in (8, 32):
        pixels = torch.full((1, side, side, 1), 255, dtype=torch.uint8)
        ranges = automatic._Ranges(0.99, min(32, side), min(32, side), 135.0, 0.99, 6)
        maps = automatic._strengths(ranges, side, side)[1][automatic.OPERATIONS.index("translate-x"), :, 0]
        left = operations.affine(pixels.expand(31, -1, -1, -1).contiguous(), maps).amax((1, 2, 3))
        assert left.tolist() == [255] * 30 + [0]


# A pure function of (seed, epoch, index) ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(32, 32, 3), (8, 8, 1), (18, 33, 3)])
def test_a_view_does_not_depend_on_the_batch(name: str, shape: tuple[int, int, int]) -> None:
    images = _images(_random(64, *shape))
    index = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))[:64]
    change = build_augmentation(name, shape[0])
    views = change(images, index, seed=1, epoch=2)
    for i in range(64):
        assert torch.equal(change(images[i : i + 1], index[i : i + 1], seed=1, epoch=2), views[i : i + 1])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(change(images[order], index[order], seed=1, epoch=2), views[order])
    assert torch.equal(change(images, index.int(), seed=1, epoch=2), views)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "none"])
def test_another_seed_epoch_or_index_gives_another_view(name: str) -> None:
    images = _images(_random(32, 32, 32, 3))
    index = torch.arange(32)
    change = build_augmentation(name, 32)
    views = change(images, index, seed=0, epoch=0)
    for other in (
        change(images, index, seed=1, epoch=0),
        change(images, index, seed=0, epoch=1),
        change(images, index + 32, seed=0, epoch=0),
    ):
        assert (other == views).flatten(1).all(1).float().mean() < 0.2


def test_a_part_draws_the_same_numbers_alone_and_among_others() -> None:
    images, index = _images(_random(16, 32, 32, 3)), torch.arange(16)
    alone = TrivialAugmentWide()(
        build_augmentation("crop-flip", 32)(images, index, seed=3, epoch=5), index, seed=3, epoch=5
    )
    together = Compose((Compose((RandomCrop(), HorizontalFlip())), TrivialAugmentWide()))
    assert torch.equal(together(images, index, seed=3, epoch=5), alone)


@pytest.mark.parametrize("name", NAMES)
def test_the_global_generators_are_neither_used_nor_moved(name: str) -> None:
    images, index = _images(_random(16, 32, 32, 3)), torch.arange(16)
    change = build_augmentation(name, 32)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    views = change(images, index, seed=0, epoch=0)
    mixed = mixup(images, alpha=0.4, seed=0, epoch=0, step=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(change(images, index, seed=0, epoch=0), views)
    assert torch.equal(mixup(images, alpha=0.4, seed=0, epoch=0, step=0).images, mixed.images)


@pytest.mark.parametrize(
    ("name", "checksum"), [("crop-flip", 2261030714), ("rand-augment", 962375281), ("trivial-augment", 3797415725)]
)
def test_views_stay_the_same_from_version_to_version(name: str, checksum: int) -> None:
    """A stored answer of a teacher belongs to a view; a change of these numbers would spoil it."""
    ramp = np.arange(32, dtype=np.uint8)[:, None]
    images = _images((_random(64, 32, 32, 3) // 2 + ramp).astype(np.uint8))
    views = build_augmentation(name, 32)(images, torch.arange(64), seed=0, epoch=0)
    assert zlib.crc32(_pixels(views).tobytes()) == checksum


@pytest.mark.parametrize("device", DEVICES or [pytest.param("cpu", marks=pytest.mark.skip(reason="no other device"))])
@pytest.mark.parametrize("name", NAMES)
def test_views_are_the_same_on_every_device(name: str, device: str) -> None:
    images, index = _images(_photos(32)), torch.arange(len(_photos(32)))
    change = build_augmentation(name, 32)
    views = change(images.to(device), index.to(device), seed=0, epoch=0)
    assert views.device.type == device
    assert torch.equal(views.cpu(), change(images, index, seed=0, epoch=0))
    assert torch.equal(change(images.to(device), index, seed=0, epoch=0), views)


@pytest.mark.parametrize("name", NAMES)
def test_torchs_default_device_does_not_matter(name: str) -> None:
    images, index = _images(_random(16, 8, 8, 3)), torch.arange(16)
    views = build_augmentation(name, 8)(images, index, seed=0, epoch=0)
    mixed = mixup(images, alpha=0.4, seed=0, epoch=0, step=0).images
    automatic._strengths.cache_clear()
    with torch.device("meta"):
        assert torch.equal(build_augmentation(name, 8)(images, index, seed=0, epoch=0), views)
        assert torch.equal(mixup(images, alpha=0.4, seed=0, epoch=0, step=0).images, mixed)


# Layouts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_layout_is_kept_and_does_not_matter(name: str, channels: int) -> None:
    last = _images(_random(12, 16, 16, channels))
    first = last.contiguous()
    index = torch.arange(12)
    change = build_augmentation(name, 16)
    kept = last.clone()
    a = change(last, index, seed=0, epoch=0)
    assert a.shape == last.shape and a.dtype == torch.uint8
    assert a.is_contiguous(memory_format=torch.channels_last)
    b = change(first, index, seed=0, epoch=0)
    assert b.is_contiguous()
    assert torch.equal(a, b)
    wide = torch.zeros(12, channels, 32, 48, dtype=torch.uint8)
    wide[:, :, ::2, ::3] = first
    strided = wide[:, :, ::2, ::3]
    c = change(strided, index, seed=0, epoch=0)
    assert torch.equal(c, b) and c.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, kept) and torch.equal(strided, kept), "the input was written to"


@pytest.mark.parametrize("name", NAMES)
def test_one_image_many_times_without_copies(name: str) -> None:
    image = _images(_random(1, 16, 16, 3))
    index = torch.arange(20)
    change = build_augmentation(name, 16)
    expected = change(image.repeat(20, 1, 1, 1), index, seed=0, epoch=0)
    assert torch.equal(change(image.expand(20, -1, -1, -1), index, seed=0, epoch=0), expected)


# Distributions, seen in the views -------------------------------------------------------------------------------------

MANY = torch.arange(20_000)


def _uniform(counts: npt.ArrayLike, p: float = 1e-3) -> bool:
    return bool(stats.chisquare(counts).pvalue > p)


def test_crops_are_uniform_over_all_places() -> None:
    images = torch.zeros(len(MANY), 1, 9, 9, dtype=torch.uint8)
    images[:, :, 4, 4] = 1
    views = RandomCrop(4)(images, MANY, seed=0, epoch=0)
    assert (views.sum((1, 2, 3)) == 1).all()
    assert _uniform(views.sum((0, 1), dtype=torch.int64).flatten().numpy())


def test_half_of_the_images_are_flipped_whatever_their_crop() -> None:
    images = torch.zeros(len(MANY), 1, 9, 10, dtype=torch.uint8)
    images[:, :, 4, 4] = 1  # 3 to 5 after the crop, 4 to 6 if flipped then
    views = Compose((RandomCrop(1), HorizontalFlip()))(images, MANY, seed=0, epoch=0)
    seen = views.sum((0, 1, 2), dtype=torch.int64)
    assert stats.chisquare(seen[3:7].numpy(), np.array([1, 2, 2, 1]) * len(MANY) / 6).pvalue > 1e-3


@pytest.mark.parametrize("p", [0.5, 0.1])
def test_as_many_images_are_flipped_as_asked(p: float) -> None:
    images = torch.tensor([[[[0, 1]]]], dtype=torch.uint8).expand(len(MANY), 1, 1, 2)
    flipped = HorizontalFlip(p)(images, MANY, seed=0, epoch=0)[:, 0, 0, 0]
    assert abs(float(flipped.float().mean()) - p) < 4 * (p * (1 - p) / len(MANY)) ** 0.5


def test_holes_are_centred_anywhere() -> None:
    images = torch.ones(len(MANY), 1, 8, 8, dtype=torch.uint8)
    views = Cutout(1)(images, MANY, seed=0, epoch=0)
    assert (views.sum((1, 2, 3)) == 63).all()
    assert _uniform((1 - views).sum((0, 1), dtype=torch.int64).flatten().numpy())


def test_operations_magnitudes_and_signs_are_drawn_uniformly(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Tensor, Tensor, Tensor]] = []

    def note(pixels: Tensor, ranges: Any, operation: Tensor, magnitude: Tensor, minus: Tensor) -> Tensor:
        drawn.append((operation, magnitude, minus))
        return pixels

    monkeypatch.setattr(automatic, "_apply", note)
    images = torch.zeros(len(MANY), 1, 1, 1, dtype=torch.uint8)
    TrivialAugmentWide()(images, MANY, seed=0, epoch=0)
    RandAugment(2, 9)(images, MANY, seed=0, epoch=0)
    (op, magnitude, minus), (first, fixed, sign), (second, _, _) = drawn
    assert _uniform(torch.bincount(op * 31 + magnitude, minlength=14 * 31).numpy())
    assert _uniform(torch.bincount(op * 2 + minus, minlength=28).numpy())
    assert _uniform(torch.bincount(first * 14 + second, minlength=196).numpy())
    assert _uniform(torch.bincount(first * 2 + sign, minlength=28).numpy())
    assert (fixed == 9).all()


# By name --------------------------------------------------------------------------------------------------------------


def test_every_name_is_listed_and_built() -> None:
    built = {name: build_augmentation(name, 32) for name in NAMES}
    crop, flip, hole = RandomCrop(4), HorizontalFlip(0.5), Cutout(16)
    assert built == {
        "none": Compose(()),
        "crop-only": Compose((crop,)),
        "crop-flip": Compose((crop, flip)),
        "rand-augment": Compose((crop, flip, RandAugment(2, 9), hole)),
        "trivial-augment": Compose((crop, flip, TrivialAugmentWide(), hole)),
    }
    assert all(isinstance(change, Augmentation) for change in built.values())
    assert all(text and "\n" not in text for text in list_augmentations().values())


@pytest.mark.parametrize(
    ("size", "padding", "length"), [(4, 0, 2), (8, 1, 4), (28, 3, 14), (64, 8, 32), (224, 28, 112)]
)
def test_lengths_follow_the_image_size(size: int, padding: int, length: int) -> None:
    parts = build_augmentation("rand-augment", size).parts  # type: ignore[attr-defined]
    assert (parts[0], parts[-1]) == (RandomCrop(padding), Cutout(length))


def test_none_changes_nothing() -> None:
    images = _images(_random(3, 8, 8, 3))
    assert torch.equal(build_augmentation("none", 8)(images, torch.arange(3), seed=0, epoch=0), images)


def test_listing_imports_no_torch() -> None:
    code = (
        "import sys; from krdistill.data.augment_names import list_augmentations as names; "
        "assert 'torch' not in sys.modules; print(*names())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(NAMES)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("crop-flop", "Unknown augmentation 'crop-flop'. Did you mean 'crop-flip'.*krdistill list augmentations"),
        ("trivialaugment", "Did you mean 'trivial-augment'"),
        ("", "Known: crop-flip, crop-only, none, rand-augment, trivial-augment"),
        (None, "Unknown augmentation 'None'"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        build_augmentation(name, 32)


# What is refused ------------------------------------------------------------------------------------------------------

GOOD = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize("change", [build_augmentation(name, 8) for name in NAMES], ids=NAMES)
@pytest.mark.parametrize(
    ("images", "index", "message"),
    [
        (GOOD.float(), torch.arange(4), "images: expected uint8 .* dtype float32. Augment before"),
        (GOOD.long(), torch.arange(4), "dtype int64"),
        (GOOD[0], torch.arange(3), r"shape \(B, C, H, W\), but got a tensor of shape \(3, 8, 8\)"),
        (GOOD.numpy(), torch.arange(4), "but got ndarray"),
        (GOOD.permute(0, 2, 3, 1), torch.arange(4), r"1 or 3 channels .*\(4, 8, 8, 3\).*permute\(0, 3, 1, 2\)"),
        (GOOD[:, :2], torch.arange(4), "1 or 3 channels"),
        (GOOD[:0], torch.arange(0), "at least one"),
        (GOOD[:, :, :0], torch.arange(4), "at least one pixel"),
        (GOOD, torch.arange(5), r"index: expected one row number per image, integers of shape \(4,\).*\(5,\)"),
        (GOOD, torch.arange(4)[:, None], "index: .*but got a tensor of shape"),
        (GOOD, torch.arange(4.0), "index: .*dtype float32"),
        (GOOD, torch.ones(4, dtype=torch.bool), "index: .*dtype bool"),
        (GOOD, [0, 1, 2, 3], "index: .*but got list"),
    ],
)
def test_wrong_batches_are_refused(change: Augmentation, images: Any, index: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        change(images, index, seed=0, epoch=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RandomCrop(-1), "padding: expected a whole number >= 0, but got -1"),
        (lambda: RandomCrop(1.5), "padding"),  # type: ignore[arg-type]
        (lambda: HorizontalFlip(1.1), "p: expected a finite number >= 0 and <= 1, but got 1.1"),
        (lambda: HorizontalFlip(float("nan")), "p: "),
        (lambda: Cutout(-2), "length"),
        (lambda: RandAugment(0), "num_ops: expected a whole number >= 1"),
        (lambda: RandAugment(2, 31), "magnitude: expected 0 to 30, but got 31"),
        (lambda: RandAugment(2, -1), "magnitude"),
        (lambda: Compose((RandomCrop(), RandomCrop(2))), "'crop' comes twice.*stream='crop-2'"),
        (lambda: Compose((RandomCrop(), Compose((HorizontalFlip(), RandomCrop())))), "'crop' comes twice"),
        (lambda: Compose((RandomCrop,)), "parts: expected augmentations"),  # type: ignore[arg-type]
        (lambda: build_augmentation("crop-flip", 0), "image_size: expected a whole number >= 1, but got 0"),
        (lambda: build_augmentation("crop-flip", (32, 32)), "image_size"),  # type: ignore[arg-type]
    ],
)
def test_wrong_settings_are_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        build()


def test_the_same_part_twice_with_streams_of_their_own() -> None:
    images, index = _images(_random(40, 8, 8, 1)), torch.arange(40)
    twice = Compose([HorizontalFlip(), HorizontalFlip(stream="flip-2")])  # type: ignore[arg-type]
    views = twice(images, index, seed=0, epoch=0)
    same = (views == images).flatten(1).all(1)
    assert 0 < same.sum() < 40, "two flips in step would undo each other"
    assert isinstance(twice.parts, tuple)


# mixup ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "contiguous"])
@pytest.mark.parametrize("floating", [True, False], ids=["float", "uint8"])
def test_mixup_is_the_papers_formula(last: bool, floating: bool) -> None:
    pixels = _random(9, 5, 6, 3)
    images = _images(pixels) if last else _images(pixels).contiguous()
    mixed = mixup(images.double() / 255 if floating else images, alpha=1.0, seed=0, epoch=1, step=2)
    assert mixed.images.dtype == torch.float32 and mixed.images.shape == images.shape
    assert mixed.images.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    assert sorted(mixed.partner.tolist()) == list(range(9)) and mixed.partner.dtype == torch.int64
    x = pixels.astype(np.float64) / 255
    expected = mixed.lam * x + (1 - mixed.lam) * x[mixed.partner.numpy()]
    np.testing.assert_allclose(_pixels(mixed.images), expected, atol=2e-7)
    assert mixed.images.min() >= 0 and mixed.images.max() <= 1


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 5.0])
def test_mixups_share_is_beta_distributed(alpha: float) -> None:
    images = torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
    shares = np.array([mixup(images, alpha=alpha, seed=0, epoch=0, step=step).lam for step in range(2000)])
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert abs(shares.mean() - 0.5) < 4 * shares.std() / len(shares) ** 0.5
    np.testing.assert_allclose(shares.var(), 1 / (4 * (2 * alpha + 1)), rtol=0.1)


def test_mixup_depends_on_seed_epoch_and_step_and_its_share_on_nothing_else() -> None:
    images = _images(_random(16, 4, 4, 1))
    first = mixup(images, alpha=0.5, seed=0, epoch=0, step=0)
    again = mixup(images, alpha=0.5, seed=0, epoch=0, step=0)
    assert torch.equal(first.images, again.images) and torch.equal(first.partner, again.partner)
    for other in ({"seed": 1}, {"epoch": 1}, {"step": 1}):
        mixed = mixup(images, **{"alpha": 0.5, "seed": 0, "epoch": 0, "step": 0, **other})  # type: ignore[arg-type]
        assert mixed.lam != first.lam and not torch.equal(mixed.partner, first.partner)
    assert mixup(images[:3], alpha=0.5, seed=0, epoch=0, step=0).lam == first.lam


def test_mixups_partners_are_uniform() -> None:
    images = torch.zeros(5, 1, 1, 1, dtype=torch.uint8)
    counts = np.zeros((5, 5))
    for step in range(1000):
        counts[np.arange(5), mixup(images, alpha=1.0, seed=0, epoch=0, step=step).partner.numpy()] += 1
    assert all(_uniform(row) for row in counts)


def test_mixing_one_image_or_like_images_changes_nothing() -> None:
    one = _images(_random(1, 4, 4, 3))
    assert torch.equal(mixup(one, alpha=0.3, seed=0, epoch=0, step=0).images, one / 255)
    like = one.expand(6, -1, -1, -1)
    assert torch.equal(mixup(like, alpha=0.3, seed=0, epoch=0, step=0).images, like / 255)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0}, "alpha: expected a finite number > 0, but got 0"),
        ({"alpha": -1.0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"alpha": float("inf")}, "alpha"),
        ({"images": GOOD[0]}, r"images: expected \(B, C, H, W\)"),
        ({"images": GOOD.long()}, "uint8 or floating point"),
        ({"images": GOOD.float() + 255}, r"in \[0, 1\], but got 255 to 255. Mix before normalisation"),
        ({"images": GOOD.float() - 0.5}, "but got -0.5"),
        ({"images": GOOD.float() * float("nan")}, "but got nan"),
        ({"images": None}, "but got NoneType"),
    ],
)
def test_wrong_mixups_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"images": GOOD, "alpha": 0.2, "seed": 0, "epoch": 0, "step": 0}
    mixup(**arguments)
    with pytest.raises(ArgumentError, match=message):
        mixup(**{**arguments, **changes})


def test_public_names_resolve() -> None:
    assert all(getattr(augment, name) is not None for name in augment.__all__)
