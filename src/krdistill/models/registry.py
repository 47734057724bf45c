"""Networks by name. Listing them imports no torch; making one imports the module of its family.

All take any image of at least 8x8 pixels and any number of channels. The convolutional ones are the networks that the
distillation literature trains on CIFAR-100 (CRD, arXiv 1910.10699, and its toolbox RepDistiller; LTKD, arXiv
2506.18496). The same network, stem included, is built for every image size, as mdistiller does with its ResNet-18 and
ShuffleNetV2 for Tiny ImageNet (its MobileNetV2 there is another network, with a stem of stride 1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from ..errors import ModelError, unknown_name
from ..recipes import Source

if TYPE_CHECKING:
    from .backbone import Backbone

SMALLEST_IMAGE = 8
ORIGINS = ("timm", "torchvision", "hf", "module", "embedding")
# What the networks of other origins are for.
ORIGIN_KINDS = {
    "timm": ("image",), "torchvision": ("image",), "hf": ("image", "text"), "module": ("image", "features", "text"),
    "embedding": ("text",),
}  # fmt: skip
_HINT = "`krdistill list models` shows them all."


@dataclass(frozen=True)
class ModelName:
    """What a network is asked for by, as written in one text: ``NAME``, ``NAME?weights=W``, ``NAME?weights=W&tap=T``.

    Attributes:
        name: one of krdistill's own names, or ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME-or-folder``,
            ``module:package.path:factory``, ``embedding:NAME-or-folder``.
        weights: ``none`` (fresh ones), ``pretrained`` (of the network's own library), or a file that holds them.
        tap: dotted name of the last layer, whose input is the feature, where it is not to be found by itself.
    """

    name: str
    weights: str = "none"
    tap: str | None = None

    @property
    def origin(self) -> str:
        """Whose network it is: one of :data:`ORIGINS`, or the empty text for krdistill's own."""
        before, colon, _ = self.name.partition(":")
        return before if colon else ""

    def __str__(self) -> str:
        options = {"weights": self.weights if self.weights != "none" else None, "tap": self.tap}
        given = "&".join(f"{k}={quote(v, safe='/:~')}" for k, v in options.items() if v)
        return f"{self.name}?{given}" if given else self.name


def parse_model(text: str, *, weights: str | None = None, tap: str | None = None) -> ModelName:
    """Takes a network's name apart, without importing anything of the network's.

    Args:
        text: as in :class:`ModelName`.
        weights: where not in the text.
        tap: where not in the text.

    Raises:
        ModelError: no network of ours, no such origin, or an option that there is not.
    """
    if not isinstance(text, str):
        raise ModelError(f"Expected the name of a network, got {text!r}. {_HINT}")
    name, _, query = text.partition("?")
    options = {"weights": weights, "tap": tap}
    for part in query.split("&") if query else ():
        key, _, value = part.partition("=")
        if key not in options or not value:
            raise ModelError(f"Network {text!r}: expected {name}?weights=...&tap=..., got {part!r}.")
        options[key] = unquote(value)
    found = ModelName(name, options["weights"] or "none", options["tap"])
    if not found.origin:
        model_info(name)
    elif found.origin not in ORIGINS or not name.partition(":")[2]:
        raise ModelError(
            f"Unknown network {name!r}: expected a name of krdistill's own or one after "
            f"{', '.join(origin + ':' for origin in ORIGINS)}, such as timm:resnet18. {_HINT}"
        )
    elif found.origin == "module" and name.count(":") != 2:
        raise ModelError(f"Network {name!r}: expected module:package.path:factory, such as module:mynets.small:build.")
    return found


@dataclass(frozen=True)
class ModelInfo:
    """A named network.

    Attributes:
        name: as given to ``--student.model``.
        family: of one architecture, such as ``"ResNet"``.
        summary: one line.
        source: the paper of the architecture.
        parameters: how many, for 100 classes and 32x32 images with 3 channels.
        module: where its class is, beside this file.
        factory: its class.
        arguments: what tells it from its family.
        kinds: of examples that it takes: ``image``, ``features``, ``text``.
    """

    name: str
    family: str
    summary: str
    source: Source
    parameters: int
    module: str
    factory: str
    arguments: Mapping[str, Any] = field(hash=False)
    kinds: tuple[str, ...] = ("image",)


def list_models(kind: str = "image") -> list[ModelInfo]:
    """Every named network for examples of a kind; the summary says where a name is one of a pattern."""
    return [info for info in (*_LISTED.values(), *_OTHERS.values()) if kind in info.kinds]


def model_info(name: str) -> ModelInfo:
    """What is known of a network.

    Args:
        name: one of :func:`list_models`, or of a pattern named there. Case does not matter, nor ``-`` for ``_``, nor
            whether either stands beside a letter: ``WRN-40-2`` is ``wrn_40_2``, ``ResNet-20`` is ``resnet20``.

    Raises:
        ModelError: no such network.
    """
    if not isinstance(name, str):
        raise ModelError(f"Expected the name of a network, got {name!r}. {_HINT}")
    if ":" in name or "?" in name:
        raise ModelError(f"{name!r} is none of krdistill's own networks; build_network makes it. {_HINT}")
    key = _key(name)
    if key in _LISTED or key in _OTHERS:
        return _LISTED.get(key) or _OTHERS[key]
    if found := re.fullmatch(r"ngram([1-9][0-9]*)x([1-9][0-9]*)", key):
        return _ngram(int(found[1]), int(found[2]))
    if found := re.fullmatch(r"textcnn([1-9][0-9]*)", key):
        return _text_cnn(int(found[1]))
    if found := re.fullmatch(r"resnet([0-9]+)w([1-9][0-9]*)", key):
        depth, base = map(int, found.groups())
        return _cifar_resnet(f"resnet{depth}w{base}", _blocks(name, depth, 2), base, (base, 2 * base, 4 * base))
    if found := re.fullmatch(r"wrn([0-9]+)_([1-9][0-9]*)", key):
        depth, widen = map(int, found.groups())
        return _wide_resnet(f"wrn_{depth}_{widen}", _blocks(name, depth, 4), widen)
    if re.fullmatch(r"mlp[1-9][0-9]*(_[1-9][0-9]*)*", key):
        return _mlp(tuple(int(width) for width in key.removeprefix("mlp").split("_")))
    known = dict.fromkeys(info.name for kind in ("image", "features", "text") for info in list_models(kind))
    raise ModelError(unknown_name("network", name.lower(), known, hint=_HINT))


def create_model(
    name: str, *, num_classes: int, in_channels: int = 3, image_size: int = 32, seed: int | None = None
) -> Backbone:
    """A network of ours with fresh weights.

    The weights are drawn on the CPU from a generator of their own, then moved to torch's default device: they depend on
    ``seed`` alone, and no global generator is touched. Under ``torch.device("meta")`` nothing is drawn or allocated.

    Args:
        name: as in :func:`model_info`.
        num_classes: K, at least 2.
        in_channels: channels of the images.
        image_size: height and width of the images, at least 8. Only an MLP, which takes smaller ones too, is built for
            this size; the others answer any.
        seed: of the weights; without one they differ from call to call.

    Returns:
        A module from float images ``(B, C, H, W)``, vectors ``(B, D)`` or bytes ``(B, L)`` to logits ``(B, K)``, with
        ``forward_maps``, ``forward_features``, ``head``, ``feature_dim`` and ``map_channels``: see
        :class:`~krdistill.models.backbone.Backbone`.

    Raises:
        ModelError: an unknown name, or a number out of range.
    """
    info = model_info(name)
    flat = info.factory == "MLP"
    sizes = {
        "num_classes": _whole("num_classes", num_classes, 2),
        "in_channels": _whole("in_channels", in_channels, 1),
        "image_size": _whole("image_size", image_size, 1 if flat else SMALLEST_IMAGE),
    }
    if not flat:
        del sizes["image_size"]
    if "text" in info.kinds:
        del sizes["in_channels"]
    seed = None if seed is None else _whole("seed", seed)
    import torch

    from ..rng import derive_seed

    factory = getattr(import_module(f".{info.module}", __package__), info.factory)
    device = torch.get_default_device()
    if device.type == "meta":
        return factory(**sizes, **info.arguments)
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reach the generators of every device; this one is the CPU's, and is put back.
        if seed is None:
            torch.default_generator.seed()
        else:
            torch.default_generator.manual_seed(derive_seed(seed, "weights"))
        model = factory(**sizes, **info.arguments)
    return model.to(device)


# Names ----------------------------------------------------------------------------------------------------------------


def _key(name: str) -> str:
    """Lower case, with ``_`` between two numbers only."""
    return re.sub(r"(?<![0-9])_|_(?![0-9])", "", name.lower().replace("-", "_"))


def _blocks(name: str, depth: int, rest: int) -> int:
    """Blocks per stage of a network with three stages of two-layer blocks and ``rest`` other layers."""
    blocks, left = divmod(depth - rest, 6)
    if left or blocks < 1:
        below, above = (max(1, blocks) * 6 + rest, (max(1, blocks) + 1) * 6 + rest)
        raise ModelError(
            f"Unknown network {name!r}: its depth must be 6n + {rest}, such as {below} or {above}, not {depth}. {_HINT}"
        )
    return blocks


def _whole(name: str, value: Any, least: int | None = None) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise ModelError(f"{name}: expected a whole number{bound}, got {value!r}.")
    return int(value)


# The list -------------------------------------------------------------------------------------------------------------

_RESNET = Source("Deep Residual Learning for Image Recognition", 2016, "1512.03385")
_WIDE = Source("Wide Residual Networks", 2016, "1605.07146")
_VGG = Source("Very Deep Convolutional Networks for Large-Scale Image Recognition", 2015, "1409.1556")
_MOBILE = Source("MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018, "1801.04381")
_SHUFFLE1 = Source(
    "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices", 2018, "1707.01083"
)
_SHUFFLE2 = Source("ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", 2018, "1807.11164")
_MLP = Source("Learning representations by back-propagating errors (Nature)", 1986)
_FASTTEXT = Source("Bag of Tricks for Efficient Text Classification", 2017, "1607.01759")
_KIM = Source("Convolutional Neural Networks for Sentence Classification", 2014, "1408.5882")
_CLASSES = 100


def _cifar_resnet(name: str, blocks: int, stem: int, widths: tuple[int, int, int], summary: str = "") -> ModelInfo:
    """Depth 6n + 2. Counts convolutions, two numbers per normalised channel, projections and the head."""
    count, inside = 3 * 9 * stem + 2 * stem, stem
    for i, width in enumerate(widths):
        count += 9 * inside * width + (2 * blocks - 1) * 9 * width**2 + 2 * blocks * 2 * width
        count += inside * width + 2 * width if i > 0 or inside != width else 0
        inside = width
    summary = summary or f"CIFAR ResNet of depth {6 * blocks + 2}, {'/'.join(map(str, widths))} channels"
    arguments = {"blocks": (blocks,) * 3, "widths": widths, "stem": stem}
    return ModelInfo(
        name, "ResNet", summary, _RESNET, count + _CLASSES * (inside + 1), "resnet", "ResNet", arguments
    )  # fmt: skip


def _wide_resnet(name: str, blocks: int, widen: int, more: str = "") -> ModelInfo:
    """Depth 6n + 4. As above, but a normalisation stands before its convolution, and a projection has none."""
    count, inside = 3 * 9 * 16, 16
    for width in (16 * widen, 32 * widen, 64 * widen):
        count += 9 * inside * width + (2 * blocks - 1) * 9 * width**2 + 2 * inside + (2 * blocks - 1) * 2 * width
        count += inside * width if inside != width else 0
        inside = width
    count += 2 * inside + _CLASSES * (inside + 1)
    summary = f"wide ResNet of depth {6 * blocks + 4}, {16 * widen}/{32 * widen}/{64 * widen} channels{more}"
    return ModelInfo(
        name, "WideResNet", summary, _WIDE, count, "wide_resnet", "WideResNet", {"blocks": blocks, "widen": widen}
    )


def _mlp(hidden: tuple[int, ...], more: str = "") -> ModelInfo:
    widths = (3 * 32 * 32, *hidden, _CLASSES)
    count = sum((inside + 1) * outside for inside, outside in pairwise(widths))
    summary = f"perceptron, hidden layers of {' and '.join(map(str, hidden))}{more}"
    name, arguments = f"mlp_{'_'.join(map(str, hidden))}", {"hidden": hidden}
    return ModelInfo(name, "MLP", summary, _MLP, count, "mlp", "MLP", arguments, ("image", "features"))


def _ngram(buckets: int, dim: int, name: str = "", more: str = "") -> ModelInfo:
    hidden, K = 128, _CLASSES
    count = buckets * dim + 2 * dim + (dim + 1) * hidden + (hidden + 1) * K
    summary = f"bag of hashed words, pairs and runs of characters: {buckets:,} vectors of {dim} numbers{more}"
    arguments = {"buckets": buckets, "dim": dim, "hidden": (hidden,)}
    return ModelInfo(
        name or f"ngram{buckets}x{dim}", "NGram", summary, _FASTTEXT, count, "sentences", "NGramNet", arguments,
        ("text",),
    )  # fmt: skip


def _text_cnn(width: int, name: str = "", more: str = "") -> ModelInfo:
    buckets, dim, K = 4096, 32, _CLASSES
    count = buckets * dim + 6 * dim * width + 3 * width + 6 * width + (3 * width + 1) * K
    summary = f"convolutions over 1, 2 and 3 hashed words, {width} channels each{more}"
    arguments = {"buckets": buckets, "dim": dim, "width": width}
    return ModelInfo(
        name or f"text_cnn{width}", "TextCNN", summary, _KIM, count, "sentences", "TextCNN", arguments, ("text",)
    )


def _deep_resnet(depth: int, parameters: int, blocks: tuple[int, ...], bottleneck: bool = False) -> ModelInfo:
    summary = f"ResNet-{depth} with the stem for small images{', bottleneck blocks' if bottleneck else ''}"
    arguments = {"blocks": blocks, "widths": (64, 128, 256, 512), "stem": 64, "bottleneck": bottleneck}
    return ModelInfo(f"resnet{depth}", "ResNet", summary, _RESNET, parameters, "resnet", "ResNet", arguments)


def _vgg(depth: int, parameters: int, *convolutions: int) -> ModelInfo:
    widths = tuple((width,) * n for width, n in zip((64, 128, 256, 512, 512), convolutions, strict=True))
    summary = f"VGG-{depth} with batch normalisation and one linear layer"
    return ModelInfo(f"vgg{depth}", "VGG", summary, _VGG, parameters, "vgg", "VGG", {"widths": widths})


_PLAIN, _TIMES_4 = (16, 32, 64), (64, 128, 256)
_LISTED = {
    _key(info.name): info
    for info in (
        *(_cifar_resnet(f"resnet{6 * n + 2}", n, 16, _PLAIN) for n in (1, 2, 3, 5, 7, 9, 18)),
        _cifar_resnet("resnet8x4", 1, 32, _TIMES_4),
        _cifar_resnet("resnet32x4", 5, 32, _TIMES_4),
        _cifar_resnet(
            "resnet20w24", 3, 24, (24, 48, 96), "CIFAR ResNet, any width: resnet<depth>w<channels>, depth 6n + 2"
        ),
        _deep_resnet(18, 11_220_132, (2, 2, 2, 2)),
        _deep_resnet(34, 21_328_292, (3, 4, 6, 3)),
        _deep_resnet(50, 23_705_252, (3, 4, 6, 3), bottleneck=True),
        _wide_resnet("wrn_16_1", 2, 1),
        _wide_resnet("wrn_16_2", 2, 2),
        _wide_resnet("wrn_40_1", 6, 1),
        _wide_resnet("wrn_40_2", 6, 2, "; any wrn_<depth>_<factor>, depth 6n + 4"),
        _vgg(8, 3_965_028, 1, 1, 1, 1, 1),
        _vgg(11, 9_277_284, 1, 1, 2, 2, 2),
        _vgg(13, 9_462_180, 2, 2, 2, 2, 2),
        _vgg(16, 14_774_436, 2, 2, 3, 3, 3),
        _vgg(19, 20_086_692, 2, 2, 4, 4, 4),
        ModelInfo(
            "mobilenetv2", "MobileNetV2", "half as wide, stem of stride 2: the usual mobile student", _MOBILE, 812_836,
            "mobilenet_v2", "MobileNetV2", {"width": 0.5},
        ),
        ModelInfo(
            "shufflenetv1", "ShuffleNetV1", "3 groups, 240/480/960 channels", _SHUFFLE1, 949_258,
            "shufflenet_v1", "ShuffleNetV1", {"blocks": (4, 8, 4), "widths": (240, 480, 960), "groups": 3},
        ),
        ModelInfo(
            "shufflenetv2", "ShuffleNetV2", "116/232/464/1024 channels", _SHUFFLE2, 1_355_528,
            "shufflenet_v2", "ShuffleNetV2", {"blocks": (4, 8, 4), "widths": (116, 232, 464), "last": 1024},
        ),
        _mlp((256, 128), "; any mlp_<width>_<width>..., for vectors and tiny images"),
    )
}  # fmt: skip
# Kept apart: not for images, or not worth a line among those that are.
_OTHERS = {
    _key(info.name): info
    for info in (
        ModelInfo(
            "linear", "MLP", "linear classifier, without hidden layers", _MLP, (3 * 32 * 32 + 1) * _CLASSES, "mlp",
            "MLP", {"hidden": ()}, ("features",),
        ),
        _ngram(4096, 48, "ngram", "; any ngram<vectors>x<numbers>"),
        _text_cnn(64, "text_cnn", "; any text_cnn<channels>"),
    )
}  # fmt: skip
