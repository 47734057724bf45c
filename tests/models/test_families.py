"""Every named network: size, shapes, wiring, weights, and what it says to a wrong name or number."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from krdistill.errors import ModelError
from krdistill.models import create_model, list_models, model_info
from krdistill.models.backbone import Backbone
from krdistill.models.shufflenet_v1 import shuffle_channels

M = TypeVar("M", bound=nn.Module)
NAMES = [info.name for info in list_models()]
HEAVY = {
    "resnet44", "resnet56", "resnet110", "resnet32x4", "resnet18", "resnet34", "resnet50", "wrn_40_1", "wrn_40_2",
    "vgg11", "vgg13", "vgg16", "vgg19",
}  # fmt: skip
CONVOLUTIONAL = ["resnet8", "resnet8x4", "resnet50", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2"]


def _images(batch: int, size: int = 8, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def _model(name: str, *, classes: int = 5, channels: int = 3, size: int = 32, seed: int = 0) -> Backbone:
    return create_model(name, num_classes=classes, in_channels=channels, image_size=size, seed=seed)


def _live(name: str, size: int = 8) -> Backbone:
    """In evaluation mode, with normalisation layers that are no longer the identity."""
    model = _model(name, size=size).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in norms:
            module.momentum = 1.0  # the running statistics become those of this batch
        model(_images(8, size, seed=2))
        for module in norms:
            module.weight.add_(torch.rand(module.weight.shape, generator=draws) - 0.5)
            module.bias.add_(torch.rand(module.bias.shape, generator=draws) - 0.5)
    return model.eval()


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# How many parameters --------------------------------------------------------------------------------------------------
# Counted here layer by layer from the architectures' definitions, not from the modules.


def _conv(inside: int, outside: int, kernel: int, groups: int = 1) -> int:
    """A convolution without bias and its normalisation."""
    return inside // groups * outside * kernel * kernel + 2 * outside


def _resnet(n: int, stem: int, a: int, b: int, c: int) -> int:
    total, inside = _conv(3, stem, 3), stem
    for width in (a, b, c):
        for _ in range(n):
            total += _conv(inside, width, 3) + _conv(width, width, 3)
            if inside != width:
                total += _conv(inside, width, 1)
            inside = width
    return total + 100 * c + 100


def _imagenet_resnet(blocks: tuple[int, ...], bottleneck: bool) -> int:
    total, inside = _conv(3, 64, 3), 64
    for count, width in zip(blocks, (64, 128, 256, 512), strict=True):
        outside = 4 * width if bottleneck else width
        for _ in range(count):
            if bottleneck:
                total += _conv(inside, width, 1) + _conv(width, width, 3) + _conv(width, outside, 1)
            else:
                total += _conv(inside, width, 3) + _conv(width, width, 3)
            if inside != outside:
                total += _conv(inside, outside, 1)
            inside = outside
    return total + 100 * inside + 100


def _wrn(depth: int, k: int) -> int:
    total, inside = 27 * 16, 16
    for width in (16 * k, 32 * k, 64 * k):
        for _ in range((depth - 4) // 6):
            total += 2 * inside + 9 * inside * width + 2 * width + 9 * width * width
            if inside != width:
                total += inside * width
            inside = width
    return total + 2 * inside + 100 * inside + 100


def _vgg(*counts: int) -> int:
    total, inside = 0, 3
    for width, count in zip((64, 128, 256, 512, 512), counts, strict=True):
        for _ in range(count):
            total += _conv(inside, width, 3) + width  # with bias
            inside = width
    return total + 100 * 512 + 100


def _mobilenet() -> int:
    total, inside = _conv(3, 16, 3), 16
    table = [(1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)]
    for expansion, channels, repeats in table:
        for _ in range(repeats):
            wide, outside = inside * expansion, channels // 2
            total += _conv(inside, wide, 1) + _conv(wide, wide, 3, wide) + _conv(wide, outside, 1)
            inside = outside
    return total + _conv(160, 1280, 1) + 100 * 1280 + 100


def _shuffle1() -> int:
    total, inside = _conv(3, 24, 1), 24
    for width, units in ((240, 4), (480, 8), (960, 4)):
        for j in range(units):
            made = width - inside if j == 0 else width  # the first unit appends its input
            quarter = made // 4
            total += _conv(inside, quarter, 1, 1 if inside == 24 else 3)
            total += _conv(quarter, quarter, 3, quarter) + _conv(quarter, made, 1, 3)
            inside = width
    return total + 100 * 960 + 100


def _shuffle2() -> int:
    total, inside = _conv(3, 24, 1), 24
    for width, units in ((116, 4), (232, 8), (464, 4)):
        half = width // 2
        total += _conv(inside, inside, 3, inside) + _conv(inside, half, 1)
        total += _conv(inside, half, 1) + _conv(half, half, 3, half) + _conv(half, half, 1)
        for _ in range(units - 1):
            total += 2 * _conv(half, half, 1) + _conv(half, half, 3, half)
        inside = width
    return total + _conv(464, 1024, 1) + 100 * 1024 + 100


COUNTED = {
    **{f"resnet{6 * n + 2}": _resnet(n, 16, 16, 32, 64) for n in (1, 2, 3, 5, 7, 9, 18)},
    "resnet8x4": _resnet(1, 32, 64, 128, 256),
    "resnet32x4": _resnet(5, 32, 64, 128, 256),
    "resnet20w24": _resnet(3, 24, 24, 48, 96),
    "resnet18": _imagenet_resnet((2, 2, 2, 2), False),
    "resnet34": _imagenet_resnet((3, 4, 6, 3), False),
    "resnet50": _imagenet_resnet((3, 4, 6, 3), True),
    **{f"wrn_{d}_{k}": _wrn(d, k) for d in (16, 40) for k in (1, 2)},
    "vgg8": _vgg(1, 1, 1, 1, 1),
    "vgg11": _vgg(1, 1, 2, 2, 2),
    "vgg13": _vgg(2, 2, 2, 2, 2),
    "vgg16": _vgg(2, 2, 3, 3, 3),
    "vgg19": _vgg(2, 2, 4, 4, 4),
    "mobilenetv2": _mobilenet(),
    "shufflenetv1": _shuffle1(),
    "shufflenetv2": _shuffle2(),
    "mlp_256_128": (3072 + 1) * 256 + (256 + 1) * 128 + (128 + 1) * 100,
}

# Millions at 100 classes. CRD: as quoted for the networks of CRD's toolbox, RepDistiller; zoo: public CIFAR-100 model
# lists of the same designs (11.22, 21.33 and 23.71 for ResNets, and da2so/DA2Lite for VGG-19).
PUBLISHED = {
    "resnet8": (0.08, "CRD"),
    "resnet20": (0.28, "CRD"),
    "resnet32": (0.47, "CRD"),
    "resnet56": (0.86, "CRD"),
    "resnet110": (1.74, "CRD"),
    "resnet8x4": (1.23, "CRD"),
    "resnet32x4": (7.43, "CRD"),
    "wrn_16_2": (0.70, "CRD"),
    "wrn_40_1": (0.57, "CRD"),
    "wrn_40_2": (2.26, "CRD"),
    "vgg8": (3.97, "CRD"),
    "vgg13": (9.46, "CRD"),
    "mobilenetv2": (0.81, "CRD"),
    "shufflenetv1": (0.95, "CRD"),
    "shufflenetv2": (1.36, "CRD"),
    "resnet18": (11.22, "zoo"),
    "resnet34": (21.33, "zoo"),
    "resnet50": (23.71, "zoo"),
    "vgg19": (20.09, "zoo"),
}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_as_counted_by_hand(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=100)
    assert _count(model) == COUNTED[name] == model_info(name).parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name: str) -> None:
    assert round(model_info(name).parameters / 1e6, 2) == PUBLISHED[name][0]


@pytest.mark.parametrize(
    ("depth", "millions", "digits"), [(20, 0.27, 2), (32, 0.46, 2), (44, 0.66, 2), (56, 0.85, 2), (110, 1.7, 1)]
)
def test_without_projections_the_resnets_are_those_of_the_paper(depth: int, millions: float, digits: int) -> None:
    """He et al. 2016 (arXiv 1512.03385), table 6: CIFAR-10, shortcuts without parameters."""
    with torch.device("meta"):
        model = create_model(f"resnet{depth}", num_classes=10)
    projections = sum(_count(m) for name, m in model.named_modules() if name.endswith(".shortcut"))
    assert projections == 16 * 32 + 64 + 32 * 64 + 128
    assert round((_count(model) - projections) / 1e6, digits) == millions


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("wrn-40-1", 0.6),
        ("wrn-40-2", 2.2),
        ("wrn-40-4", 8.9),
        ("wrn-28-10", 36.5),
        ("wrn-22-8", 17.2),
        ("wrn-16-8", 11.0),
    ],
)
def test_any_wide_resnet_is_that_of_the_paper(name: str, millions: float) -> None:
    """Zagoruyko and Komodakis 2016 (arXiv 1605.07146), table 4: CIFAR-10."""
    with torch.device("meta"):
        model = create_model(name, num_classes=10)
    assert round(_count(model) / 1e6, 1) == millions
    assert _count(model) + 90 * (model.feature_dim + 1) == model_info(name).parameters


# How much work they do: strides and places, which a parameter count does not see -------------------------------------


def _multiplications(model: nn.Module, size: int) -> float:
    total = 0

    def add(module: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total += module.weight.numel()

    for module in model.modules():
        module.register_forward_hook(add)
    model(torch.empty(1, 3, size, size, device="meta"))
    return total / 1e6


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        # 3x3 convolutions at 32, 16, 8 pixels: 16 * 27 * 1024 + 6 * 2304 * 1024 + (5 * 9216 + 4608) * 256 + ... by hand
        ("resnet20", (442_368 + 14_155_776 + 12_976_128 + 12_976_128 + 131_072 * 2 + 6_400) / 1e6),
        ("resnet18", 555.0),  # public lists: 0.56 G
        ("resnet34", 1159.0),  # 1.16 G
        ("resnet50", 1300.0),  # 1.30 G
        # profiled on other definitions of the same networks; MobileNetV2 is this cheap by its stride 2 stem
        ("mobilenetv2", 6.5),
        ("wrn_40_2", 327.6),
        ("resnet32x4", 1083.0),
        # stages at 32, 16, 8, 4, 4 pixels
        (
            "vgg8",
            (27 * 64 * 1024 + 9 * (64 * 128 * 256 + 128 * 256 * 64 + 256 * 512 * 16 + 512 * 512 * 16) + 51_200) / 1e6,
        ),
    ],
)
def test_multiplications_for_one_image(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=100)
    assert _multiplications(model, 32) == pytest.approx(millions, rel=0.005)


def _halvings(name: str) -> tuple[int, ...]:
    """How often the image has been halved at each map."""
    if name.startswith("mobilenet"):
        return (1, 2, 3, 4)
    if name.startswith("shufflenet"):
        return (1, 2, 3)
    if name.startswith("vgg"):
        return (0, 1, 2, 3, 3)
    return (0, 1, 2, 3) if name in {"resnet18", "resnet34", "resnet50"} else (0, 1, 2)


FEATURES = {
    "resnet8x4": 256, "resnet32x4": 256, "resnet20w24": 96, "resnet18": 512, "resnet34": 512, "resnet50": 2048,
    "wrn_16_2": 128, "wrn_40_2": 128, "mobilenetv2": 1280, "shufflenetv1": 960, "shufflenetv2": 1024,
    "mlp_256_128": 128,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_shapes_at_every_size_and_channel_count(name: str) -> None:
    """The heavy networks run here at one size each, without values; the next tests run them at 8 and 16 pixels."""
    device = torch.device("meta" if name in HEAVY else "cpu")
    feature = FEATURES.get(name, 512 if name.startswith("vgg") else 64)
    sizes = (28,) if name in HEAVY else (8, 28, 32, 64)
    for size, channels in ((size, channels) for size in sizes for channels in (1, 3)):
        with device:
            model = create_model(name, num_classes=7, in_channels=channels, image_size=size).eval()
            x = torch.zeros(2, channels, size, size)
        with torch.no_grad():
            maps, pooled, logits = model.forward_maps(x), model.forward_features(x), model(x)
        assert logits.shape == (2, 7)
        assert pooled.shape == (2, feature) and model.feature_dim == feature
        assert tuple(m.shape[1] for m in maps) == model.map_channels and model.map_channels[-1] == feature
        if name.startswith("mlp"):
            assert [tuple(m.shape) for m in maps] == [(2, 256, 1, 1), (2, 128, 1, 1)]
            continue
        sides = []
        for times in _halvings(name):
            side = size
            for _ in range(times):
                side = side // 2 if name.startswith("vgg") else math.ceil(side / 2)
            sides.append((side, side))
        assert [tuple(m.shape[2:]) for m in maps] == sides


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_one_computation_at_three_depths(name: str) -> None:
    model = _model(name, size=8)
    x = _images(2)
    assert torch.isfinite(model.train()(x)).all()  # two images, maps down to 1x1, in training mode
    model.eval()
    passes = []
    model.stem.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        logits = model(x)
        assert len(passes) == 1
        feature = model.forward_features(x)
        maps = model.forward_maps(x)
    assert len(passes) == 3
    assert torch.equal(model.head(feature), logits)
    assert torch.equal(model.pool(maps[-1]), feature)
    assert torch.allclose(maps[-1].double().mean((2, 3)).float(), feature, atol=1e-5)
    assert isinstance(model.head, nn.Linear) and model.head.in_features == model.feature_dim


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_is_deterministic_and_each_image_is_alone(name: str) -> None:
    model = _live(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = _images(3)
    with torch.no_grad():
        a, b, alone = model(x), model(x), model(x[1:2])
    assert torch.equal(a, b)
    assert _distance(alone, a[1:2]) < 1e-4 < _distance(a[0], a[1])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name: str) -> None:
    model = _model(name, size=16).train()
    F.cross_entropy(model(_images(4, 16)), torch.tensor([0, 1, 2, 3])).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
        layer, _, kind = key.rpartition(".")
        if kind == "bias" and isinstance(model.get_submodule(layer), nn.Conv2d):
            continue  # the normalisation behind it takes a constant away again
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_images_need_not_be_square_nor_of_the_size_named(name: str) -> None:
    model = _model(name, size=8).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 13, 9)).shape == (1, 5)
        big = torch.randn(1, 3, 16, 16)
        assert torch.equal(model(big), _model(name, size=64).eval()(big))


# Wiring ---------------------------------------------------------------------------------------------------------------


def test_shuffle_deals_channels_out_in_turn() -> None:
    x = _images(2, 3, channels=12)
    for groups in (1, 2, 3, 4):
        want = np.empty((2, 12, 3, 3), dtype=np.float32)
        per = 12 // groups
        for g in range(groups):
            for i in range(per):
                want[:, i * groups + g] = x[:, g * per + i].numpy()
        plain, last = (
            shuffle_channels(x, groups),
            shuffle_channels(x.contiguous(memory_format=torch.channels_last), groups),
        )
        np.testing.assert_array_equal(plain.numpy(), want)
        np.testing.assert_array_equal(last.numpy(), want)
        assert plain.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)


def _norm(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Evaluation mode, by the formula."""
    shape = (1, -1, 1, 1)
    assert norm.running_mean is not None and norm.running_var is not None
    x = (x - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()
    return x * norm.weight.view(shape) + norm.bias.view(shape)


def _flat(module: nn.Module, kind: type[M]) -> Iterator[M]:
    """The layers of one kind, in reading order."""
    return (m for m in module.modules() if isinstance(m, kind))


@pytest.mark.parametrize(
    ("name", "stride"), [("resnet8x4", 1), ("mobilenetv2", 2), ("shufflenetv1", 1), ("wrn_16_1", 1)]
)
@torch.no_grad()
def test_stems_by_their_formulas(name: str, stride: int) -> None:
    x = _images(2)
    stem = _live(name).stem
    (conv,) = _flat(stem, nn.Conv2d)
    want = F.conv2d(x, conv.weight, stride=stride, padding=0 if name.startswith("shuffle") else 1)
    for norm in _flat(stem, nn.BatchNorm2d):
        want = _norm(want, norm).relu()
    torch.testing.assert_close(stem(x), want)


@pytest.mark.parametrize(("name", "width"), [("wrn_16_1", 32), ("mobilenetv2", 48), ("shufflenetv2", 232)])
@torch.no_grad()
def test_last_layers_before_pooling_by_their_formulas(name: str, width: int) -> None:
    model = _live(name)
    x = _images(2, 4, channels=width)
    *blocks, tail = model.stages[-1].children()
    if name.startswith("wrn"):
        norm = blocks.pop()
        assert isinstance(tail, nn.ReLU) and isinstance(norm, nn.BatchNorm2d)
    want = nn.Sequential(*blocks)(x)
    if not name.startswith("wrn"):
        (conv,), (norm,) = _flat(tail, nn.Conv2d), _flat(tail, nn.BatchNorm2d)
        want = F.conv2d(want, conv.weight)
    torch.testing.assert_close(model.stages[-1](x), _norm(want, norm).relu())


@torch.no_grad()
def test_residual_blocks_by_their_formulas() -> None:
    """The block that changes shape, at the head of the second stage, computed from its layers in reading order."""
    x = _images(2, 8, channels=16).relu()
    block = _live("resnet8").stages[1]
    c1, c2, c3 = _flat(block, nn.Conv2d)
    n1, n2, n3 = _flat(block, nn.BatchNorm2d)
    inner = _norm(F.conv2d(x, c1.weight, stride=2, padding=1), n1).relu()
    want = (_norm(F.conv2d(inner, c2.weight, padding=1), n2) + _norm(F.conv2d(x, c3.weight, stride=2), n3)).relu()
    torch.testing.assert_close(block(x), want)

    x = _images(2, 8, channels=16)
    block = _live("wrn_16_1").stages[1][0]  # type: ignore[index]
    c1, c2, c3 = _flat(block, nn.Conv2d)
    n1, n2 = _flat(block, nn.BatchNorm2d)
    active = _norm(x, n1).relu()
    inner = _norm(F.conv2d(active, c1.weight, stride=2, padding=1), n2).relu()
    want = F.conv2d(inner, c2.weight, padding=1) + F.conv2d(active, c3.weight, stride=2)
    torch.testing.assert_close(block(x), want)

    x = _images(2, 8, channels=256).relu()
    block = _live("resnet50").stages[1][0]  # type: ignore[index]
    c1, c2, c3, c4 = _flat(block, nn.Conv2d)
    n1, n2, n3, n4 = _flat(block, nn.BatchNorm2d)
    inner = _norm(F.conv2d(x, c1.weight), n1).relu()
    inner = _norm(F.conv2d(inner, c2.weight, stride=2, padding=1), n2).relu()
    want = (_norm(F.conv2d(inner, c3.weight), n3) + _norm(F.conv2d(x, c4.weight, stride=2), n4)).relu()
    torch.testing.assert_close(block(x), want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_mobile_blocks_by_their_formulas() -> None:
    x = _images(2, 8, channels=12)
    block = _live("mobilenetv2").stages[0][2]  # type: ignore[index]
    c1, c2, c3 = _flat(block, nn.Conv2d)
    n1, n2, n3 = _flat(block, nn.BatchNorm2d)
    inner = _norm(F.conv2d(x, c1.weight), n1).relu()
    inner = _norm(F.conv2d(inner, c2.weight, padding=1, groups=72), n2).relu()
    torch.testing.assert_close(block(x), x + _norm(F.conv2d(inner, c3.weight), n3))

    model = _live("shufflenetv1")
    down, unit = model.stages[1][0], model.stages[1][1]  # type: ignore[index]
    x = _images(2, 8, channels=240).relu()
    c1, c2, c3 = _flat(down, nn.Conv2d)
    n1, n2, n3 = _flat(down, nn.BatchNorm2d)
    inner = _norm(F.conv2d(x, c1.weight, groups=3), n1).relu()
    inner = torch.stack([inner[:, g * 20 + i] for i in range(20) for g in range(3)], 1)
    inner = _norm(F.conv2d(inner, c2.weight, stride=2, padding=1, groups=60), n2).relu()
    made = _norm(F.conv2d(inner, c3.weight, groups=3), n3)
    want = torch.cat((made, F.avg_pool2d(x, 3, 2, 1)), 1).relu()
    torch.testing.assert_close(down(x), want)
    last_norm = list(_flat(unit, nn.BatchNorm2d))[-1]
    nn.init.zeros_(last_norm.weight), nn.init.zeros_(last_norm.bias)
    torch.testing.assert_close(unit(want), want)  # only the shortcut is left

    model = _live("shufflenetv2")
    down, unit = model.stages[1][0], model.stages[1][1]  # type: ignore[index]
    x = _images(2, 8, channels=116)
    c1, c2, c3, c4, c5 = _flat(down, nn.Conv2d)
    n1, n2, n3, n4, n5 = _flat(down, nn.BatchNorm2d)
    left = _norm(F.conv2d(x, c1.weight, stride=2, padding=1, groups=116), n1)
    left = _norm(F.conv2d(left, c2.weight), n2).relu()
    right = _norm(F.conv2d(x, c3.weight), n3).relu()
    right = _norm(F.conv2d(right, c4.weight, stride=2, padding=1, groups=116), n4)
    right = _norm(F.conv2d(right, c5.weight), n5).relu()
    got = down(x)
    torch.testing.assert_close(got[:, 0::2], left)
    torch.testing.assert_close(got[:, 1::2], right)
    c1, c2, c3 = _flat(unit, nn.Conv2d)
    n1, n2, n3 = _flat(unit, nn.BatchNorm2d)
    worked = _norm(F.conv2d(got[:, 116:], c1.weight), n1).relu()
    worked = _norm(F.conv2d(worked, c2.weight, padding=1, groups=116), n2)
    worked = _norm(F.conv2d(worked, c3.weight), n3).relu()
    torch.testing.assert_close(unit(got)[:, 0::2], got[:, :116])
    torch.testing.assert_close(unit(got)[:, 1::2], worked)


@torch.no_grad()
def test_vgg_and_perceptron_by_their_formulas() -> None:
    x = _images(2, 16)
    model = _live("vgg8", 16)
    want, maps = x, model.forward_maps(x)
    for i, (conv, norm) in enumerate(zip(_flat(model, nn.Conv2d), _flat(model, nn.BatchNorm2d), strict=True)):
        want = F.max_pool2d(want, 2) if i in (1, 2, 3) else want
        want = _norm(F.conv2d(want, conv.weight, conv.bias, padding=1), norm).relu()
        torch.testing.assert_close(maps[i], want, atol=1e-4, rtol=1e-4)

    model = _model("mlp-6-4", size=8)
    hidden = x[:, :, :8, :8].reshape(2, -1).double()
    first, second = (m for m in _flat(model.stages, nn.Linear))
    hidden = (hidden @ first.weight.double().T + first.bias.double()).clamp_min(0)
    hidden = (hidden @ second.weight.double().T + second.bias.double()).clamp_min(0)
    torch.testing.assert_close(model.forward_features(x[:, :, :8, :8]), hidden.float())


def test_perceptron_takes_vectors() -> None:
    model = create_model("mlp_16", num_classes=3, in_channels=10, image_size=1, seed=0)
    x = torch.randn(4, 10)
    assert model(x).shape == (4, 3) and torch.equal(model(x), model(x[:, :, None, None]))
    with pytest.raises(ModelError, match=r"Expected 10 numbers per image, got \(4, 11\)"):
        model(torch.randn(4, 11))


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_weights_are_drawn_as_documented(name: str) -> None:
    model = _model(name, classes=100)
    seen = 0
    for module in (*model.stem.modules(), *model.stages.modules()):
        if isinstance(module, nn.Conv2d):
            assert module.bias is None or not module.bias.any()
            if module.weight.numel() >= 5000:
                fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
                error = 5 / math.sqrt(2 * module.weight.numel())  # five standard deviations
                assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=error)
                seen += 1
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and not module.bias.any()
    assert seen
    assert model.head.weight.abs().max() <= 1 / math.sqrt(model.feature_dim)
    assert model.head.weight.std().item() == pytest.approx(1 / math.sqrt(3 * model.feature_dim), rel=0.05)


@pytest.mark.parametrize("name", ["resnet8", "shufflenetv2", "mlp_256_128"])
def test_a_seed_decides_the_weights_and_the_global_generator_does_not(name: str) -> None:
    def weights(seed: int | None) -> dict[str, Tensor]:
        return create_model(name, num_classes=5, seed=seed).state_dict()

    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = weights(4)
    torch.rand(3)
    torch.manual_seed(2)
    b, other, free, again = weights(4), weights(5), weights(None), weights(None)
    torch.manual_seed(1)
    weights(4), weights(None)
    assert torch.equal(torch.get_rng_state(), before)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    for x, y in pairwise((a, other, free, again)):
        assert not torch.equal(x["head.weight"], y["head.weight"])
    assert all(torch.equal(a[key], value) for key, value in weights(np.int64(4)).items())
    assert not torch.equal(weights(-4)["head.weight"], a["head.weight"])


def test_the_meta_device_costs_nothing_and_weights_do_not_depend_on_a_device_context() -> None:
    state = torch.get_rng_state()
    with torch.device("meta"):
        model = create_model("wrn_40_20", num_classes=5)
    assert all(p.device.type == "meta" for p in model.parameters()) and _count(model) > 2e8
    with torch.device("cpu"):
        a = _model("resnet8")
    assert torch.equal(a.head.weight, _model("resnet8").head.weight)
    assert torch.equal(torch.get_rng_state(), state)


# Running elsewhere ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_channels_last_stays_and_answers_the_same(name: str) -> None:
    model = _live(name, 16)
    x = _images(2, 16)
    with torch.no_grad():
        want = model.forward_maps(x)
        last = model.to(memory_format=torch.channels_last).forward_maps(x.contiguous(memory_format=torch.channels_last))
    for a, b in zip(want, last, strict=True):
        assert _distance(b, a) < 1e-4
        assert b.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["resnet8", "shufflenetv2", "mlp_16_8"])
def test_torch_export_with_any_batch(name: str) -> None:
    model = _model(name, channels=1, size=8).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (_images(2, channels=1),), dynamic_shapes=({0: batch},)).module()
    for count in (1, 2, 5):
        x = _images(count, channels=1, seed=count)
        torch.testing.assert_close(program(x), model(x))


@pytest.mark.parametrize("name", ["wrn_10_1", "shufflenetv1"])
def test_torch_compile_traces_it_in_one_piece(name: str) -> None:
    model = _model(name, size=8).eval()
    traced: Callable[[Tensor], Tensor] = torch.compile(model, backend="eager", fullgraph=True)
    x = _images(2).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(traced(x), model(x))


def test_listing_imports_no_torch() -> None:
    code = (
        "import sys\nfrom krdistill.models import list_models, model_info\n"
        "assert len(list_models()) > 20 and model_info('wrn-28-10')\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# Names and numbers ----------------------------------------------------------------------------------------------------


def test_every_network_is_described() -> None:
    assert len(set(NAMES)) == len(NAMES)
    for info in list_models():
        assert model_info(info.name) is info
        assert info.summary and info.source.title and info.source.year and info.parameters > 0 and info.family


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("ResNet-32x4", "resnet32x4"),
        ("WRN-40-2", "wrn_40_2"),
        ("wrn40_2", "wrn_40_2"),
        ("MobileNet-V2", "mobilenetv2"),
        ("MLP-256-128", "mlp_256_128"),
        ("resnet_20_w24", "resnet20w24"),
        ("WRN-28-10", "wrn_28_10"),
        ("resnet26W8", "resnet26w8"),
        ("mlp-7", "mlp_7"),
    ],
)
def test_case_and_separators_do_not_matter(given: str, name: str) -> None:
    assert model_info(given).name == name
    assert model_info(given) == model_info(name)


def test_a_pattern_meets_the_named_network() -> None:
    assert model_info("resnet20w16").parameters == model_info("resnet20").parameters == _resnet(3, 16, 16, 32, 64)
    with torch.device("meta"):
        for name in ("resnet14w5", "wrn_10_3", "mlp_7_6_5"):
            assert _count(create_model(name, num_classes=100)) == model_info(name).parameters
    a, b = _model("resnet8w16"), _model("resnet8")
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet33", r"Unknown network 'resnet33'\. Did you mean 'resnet\d+'.*krdistill list models"),
        ("ShuffelNetV2", "Did you mean 'shufflenetv2'"),
        ("alexnet", "Unknown network 'alexnet'.*krdistill list models"),
        ("", "Unknown network ''"),
        ("resnet21w16", r"depth must be 6n \+ 2, such as 20 or 26, not 21"),
        ("resnet2w16", r"6n \+ 2, such as 8 or 14, not 2"),
        ("wrn_17_2", r"'wrn_17_2': its depth must be 6n \+ 4, such as 16 or 22, not 17"),
        ("wrn_16_0", "Unknown network"),
        ("mlp", "Unknown network"),
        ("mlp_0", "Unknown network"),
        ("resnet20w0", "Unknown network"),
        (None, "Expected the name of a network, got None"),
    ],
)
def test_unknown_names_say_what_there_is(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        create_model(name, num_classes=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 7}, "image_size: expected a whole number of at least 8, got 7"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": -32}, "image_size"),
        ({"image_size": 32.0}, r"image_size: expected a whole number of at least 8, got 32\.0"),
        ({"num_classes": 1}, "num_classes: expected a whole number of at least 2, got 1"),
        ({"num_classes": True}, "num_classes"),
        ({"in_channels": 0}, "in_channels: expected a whole number of at least 1, got 0"),
        ({"in_channels": "3"}, "in_channels"),
        ({"seed": 0.5}, r"seed: expected a whole number, got 0\.5"),
        ({"seed": False}, "seed"),
    ],
)
def test_wrong_numbers_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        create_model("resnet8", **{"num_classes": 5, **arguments})  # type: ignore[arg-type]


def test_a_perceptron_has_a_smaller_smallest_image() -> None:
    assert create_model("mlp_4", num_classes=2, image_size=2, seed=0)(_images(1, 2)).shape == (1, 2)
    with pytest.raises(ModelError, match="image_size: expected a whole number of at least 1, got 0"):
        create_model("mlp_4", num_classes=2, image_size=0)


@pytest.mark.parametrize("name", [*CONVOLUTIONAL, "mlp_4"])
def test_images_of_another_shape_are_refused(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=5, image_size=8)
        with pytest.raises(ModelError, match=r"Expected .*got \(2, 1, 8, 8\)"):
            model(torch.empty(2, 1, 8, 8))
        if name != "mlp_4":
            with pytest.raises(ModelError, match=r"shape \(B, 3, H, W\), got \(3, 8, 8\)"):
                model(torch.empty(3, 8, 8))
