"""The bridge to other libraries' networks: timm, torchvision, transformers, and any importable factory.

Each is built with K outputs and fresh or given weights, and brings what it knows of itself: normalisation, input size,
class names. The libraries are optional and are imported when a network of theirs is asked for.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .._torchvision import import_torchvision, prepare_for_torchvision
from ..errors import MissingDependencyError, ModelError, unknown_name
from ..kinds import NOUNS, Kind
from ..rng import derive_seed
from .heads import answer_of, as_given, find_head
from .registry import ModelName, parse_model
from .weights import load_weights, read_weights

Size = tuple[int, int]
_USUAL_SIZE = 224


@dataclass(frozen=True)
class Foreign:
    """Another library's network, with what it knows of itself.

    Attributes:
        backbone: from normalised images to logits ``(B, K)``.
        architecture: plain data that :func:`rebuild_foreign` makes it from again.
        input_size: (H, W) that it works at, None where any will do.
        mean: that it was trained with, None where that is not known: the data's then.
        std: as ``mean``.
        tap: name of its classifier layer, where it was asked for or had to be found.
        notes: what a person should know, a sentence each.
    """

    backbone: nn.Module
    architecture: dict[str, Any]
    input_size: Size | None
    mean: list[float] | None
    std: list[float] | None
    tap: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Known:
    """What a library knows of one of its networks.

    Attributes:
        make: (K, channels, size) to a network with fresh weights; it uses the global generator.
        size: (H, W) that it was designed for, None where that is not known.
        otherwise: a size to try where the images' own does not work and ``size`` is not known.
        channels: that it must be given, None where any number will do.
        mean: of its pretrained weights.
        std: as ``mean``.
        config: what else it is rebuilt from.
        pretrained: gives the weights of its library and their class names, or raises ModelError.
        unused: beginnings of the names of weights that the network here has no place for.
    """

    make: Callable[[int, int, Size | None], nn.Module]
    size: Size | None = None
    otherwise: Size | None = None
    channels: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    config: Mapping[str, Any] | None = None
    pretrained: Callable[[], tuple[dict[str, Tensor], Sequence[str] | None]] | None = None
    unused: tuple[str, ...] = ()


def create_foreign(
    asked: ModelName, *, class_names: Sequence[str], channels: int, image_size: Size, seed: int | None = None
) -> Foreign:
    """A network of another library for the given classes and images.

    Fresh weights are drawn on the CPU from a generator of their own. With fresh weights the network is built for the
    images' own size where it can answer them, and for the images' channels; grey images are repeated for a network
    that takes three. Given weights keep the size, the channels and the normalisation that they were trained with.

    Args:
        asked: name, weights and tap.
        class_names: K names.
        channels: of the images.
        image_size: (H, W) of the images.
        seed: of fresh weights; without one they differ from call to call.

    Raises:
        ModelError: an unknown name, weights that cannot be had or do not fit, or a network for other channels.
        MissingDependencyError: the library is not installed.
    """
    given = asked.weights != "none"
    known = _know(asked.name, pretrained=given)
    K, notes = len(class_names), []
    state, their_names = None, None
    if asked.weights == "pretrained":
        if known.pretrained is None:
            raise ModelError(f"There are no pretrained weights for {asked.name!r}. Give a file as weights, or none.")
        with _drawing(seed):  # a library draws weights before it puts its own in their place
            state, their_names = known.pretrained()
    elif given:
        state = read_weights(asked.weights)
    own = known.size or known.otherwise
    sizes = [known.size] if given and known.size is not None else [image_size, *([own] if own is not None else [])]
    inside = known.channels or channels
    backbone, size = _build(asked.name, known, K, inside, sizes, seed)
    theirs = inside if state is None else _stem_channels(state, backbone, inside)
    if theirs != inside:
        inside = theirs
        backbone, size = _build(asked.name, known, K, inside, sizes, seed)
    if inside != channels and channels != 1:
        raise ModelError(
            f"{asked.name!r} takes images of {inside} channel(s), the data have {channels} "
            f"({image_size[0]}x{image_size[1]}x{channels}). Take a network for {channels} channels (timm builds any "
            "number, with fresh weights), or give the data as RGB."
        )
    if inside != channels:
        notes.append(f"{asked.name}: grey images are repeated over the network's {inside} channels.")
    architecture = {
        "name": asked.name, "num_classes": K, "in_channels": inside, "image_size": list(size)
    }  # fmt: skip
    if known.config is not None:
        architecture["config"] = dict(known.config)
    if size != image_size:
        notes.append(
            f"{asked.name}: images of {image_size[0]}x{image_size[1]} are resized to {size[0]}x{size[1]} inside it."
        )
    tap, layer = find_head(backbone, asked.tap, K, lambda: _noise(inside, size))
    if state is not None:
        found = load_weights(
            backbone, state, head=tap, class_names=class_names, their_names=their_names, unused=known.unused
        )
        notes += [f"{asked.name}: {note[0].lower()}{note[1:]}" for note in found]
    if isinstance(layer, nn.Conv2d):
        notes.append(
            f"{asked.name}: the classifier is a 1x1 convolution ({tap}); the feature is the mean of its input."
        )
    mean, std = (known.mean, known.std) if state is not None else (None, None)
    if mean is not None and len(mean) != inside:
        mean, std = None, None
    return Foreign(backbone, architecture, size, mean, std, tap, tuple(notes))


def create_for_rows(
    asked: ModelName, *, class_names: Sequence[str], kind: Kind, example: Tensor, seed: int | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """A network of a factory (``module:package.path:factory``) for rows of numbers or sentences.

    The factory is called with those of ``num_classes`` and, for rows, ``in_features`` or ``in_channels`` (the number of
    columns) that it takes. What it gives maps standardised rows ``(B, D)``, or the UTF-8 bytes of sentences, uint8
    ``(B, L)`` with zeros behind them, to logits ``(B, K)``; where it has an attribute ``takes_texts`` that is true, it
    is given a list of B texts in place of bytes.

    Args:
        asked: its name.
        class_names: K names.
        kind: ``features`` or ``text``.
        example: two rows, as the network will be given them.
        seed: of the weights.

    Returns:
        The network, and plain data that :func:`rebuild_foreign` makes it from again.

    Raises:
        ModelError: no such factory, or one whose network does not take such rows or answer K classes.
    """
    K = len(class_names)
    architecture = {
        "name": asked.name, "num_classes": K, "in_channels": example.shape[1] if kind == "features" else 1, "kind": kind
    }  # fmt: skip
    what = f"rows {tuple(example.shape)}" if kind == "features" else f"sentences as bytes, uint8 {tuple(example.shape)}"
    takes = "num_classes, in_features and in_channels" if kind == "features" else "num_classes"
    try:
        backbone = rebuild_foreign(architecture, seed=seed)
    except (MissingDependencyError, ModelError):
        raise
    except Exception as error:  # whatever the factory raises
        raise ModelError(
            f"{asked.name!r} could not be called for {NOUNS[kind]}: {_first_line(error)} A factory is given those of "
            f"{takes} that it takes; other arguments need a default."
        ) from None
    if kind == "text" and getattr(backbone, "takes_texts", False):
        what = f"a list of {len(example)} texts"
    modes = {module: module.training for module in backbone.modules()}
    try:
        with torch.no_grad():
            answer = answer_of(backbone.eval()(as_given(backbone, example)))
    except Exception as error:  # whatever the network raises
        raise ModelError(
            f"{asked.name!r} cannot answer {what}: {_first_line(error)} {_MEND[kind].format(example.shape[1])}"
        ) from None
    finally:
        for module, mode in modes.items():
            module.training = mode
    given = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
    if given != (len(example), K):
        raise ModelError(
            f"{asked.name!r} answers {what} with {given}; expected logits ({len(example)}, {K}), one per class of the "
            "data. Give its last layer num_classes outputs."
        )
    return backbone, architecture


_MEND = {
    "features": "The data have {} columns: let the factory take in_features, and build the first layer for it.",
    "text": "Take bytes, uint8 (B, L), L at least 1, or set takes_texts = True on the module to be given texts.",
}


def rebuild_foreign(architecture: Mapping[str, Any], *, seed: int | None = None) -> nn.Module:
    """The network of :attr:`Foreign.architecture`, with fresh weights; nothing is fetched."""
    name = parse_model(str(architecture["name"])).name
    if architecture.get("kind", "image") != "image":
        if not name.startswith("module:"):
            raise ModelError(f"{name!r} is for images; expected module:package.path:factory for other data.")
        width = int(architecture["in_channels"])
        own = {"in_features": width, "in_channels": width} if architecture["kind"] == "features" else {}
        with _drawing(seed):
            return _called(name.partition(":")[2], {"num_classes": int(architecture["num_classes"]), **own})
    known = _know(name, pretrained=False, config=architecture.get("config", {}))
    H, W = architecture["image_size"]
    with _drawing(seed):
        return known.make(int(architecture["num_classes"]), int(architecture["in_channels"]), (int(H), int(W)))


def _know(name: str, *, pretrained: bool, config: Mapping[str, Any] | None = None) -> _Known:
    origin, _, rest = name.partition(":")
    if origin == "timm":
        return _timm(rest)
    if origin == "torchvision":
        return _torchvision(rest)
    if origin == "hf":
        return _hf(rest, config, pretrained)
    return _module(rest)


def _build(
    name: str, known: _Known, K: int, channels: int, sizes: Sequence[Size], seed: int | None
) -> tuple[nn.Module, Size]:
    """The network for the first of the sizes that it can answer."""
    problem: Exception | None = None
    for size in dict.fromkeys(sizes):
        try:
            with _drawing(seed):
                backbone = known.make(K, channels, size)
        except (MissingDependencyError, ModelError):
            raise
        except Exception as error:  # whatever the library raises at a size it is not made for
            problem = error
            continue
        try:
            with torch.no_grad():
                backbone.eval()(_noise(channels, size))
        except Exception as error:  # as above
            problem = error
            continue
        return backbone.train(), size
    shown = " and ".join(f"{H}x{W}" for H, W in dict.fromkeys(sizes))
    raise ModelError(
        f"{name!r} cannot answer images of {shown} with {channels} channel(s): {_first_line(problem)} "
        "Take another network, or another data.image_size."
    )


def _stem_channels(state: Mapping[str, Tensor], network: nn.Module, channels: int) -> int:
    """How many channels weights take, where their shapes tell it apart from a network for ``channels``."""
    for name, own in network.state_dict().items():
        theirs = state.get(name)
        if theirs is not None and own.ndim == theirs.ndim == 4 and own.shape[1] == channels != theirs.shape[1]:
            return int(theirs.shape[1])
    return channels


def _noise(channels: int, size: Size) -> Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def _drawing(seed: int | None) -> Iterator[None]:
    """A block in which weights are drawn on the CPU, from a generator that is put back afterwards."""
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        if seed is None:
            torch.default_generator.seed()
        else:
            torch.default_generator.manual_seed(derive_seed(seed, "weights"))
        yield


# Importing ------------------------------------------------------------------------------------------------------------


def _library(package: str, extra: str) -> ModuleType:
    """A package of an extra; torchvision first, as timm and transformers import it."""
    try:
        if package == "torchvision":
            return import_torchvision()
        prepare_for_torchvision()
        return import_module(package)
    except ImportError as error:
        raise MissingDependencyError(
            f"Networks of {package} need the package {error.name or package}: pip install 'krdistill[{extra}]'."
        ) from None


def _fetched(name: str, fetch: Callable[[], Any], *, what: str = "pretrained weights") -> Any:
    """What a hub gives; its errors have no common base."""
    try:
        return fetch()
    except Exception as error:
        way = "a file as weights, or none" if what == "pretrained weights" else "a local folder, as hf:path/to/folder"
        raise ModelError(
            f"The {what} of {name!r} could not be had: {_first_line(error)} Without a network, give {way}."
        ) from None


def _first_line(error: Exception | None) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0][:200] if lines else repr(error)
    return text if text.endswith(".") else f"{text}."


# timm -----------------------------------------------------------------------------------------------------------------


def _timm(name: str) -> _Known:
    timm = _library("timm", "timm")
    if not timm.is_model(name):
        raise ModelError(unknown_name("timm network", name, timm.list_models(), hint="timm.list_models() lists them."))
    cfg = timm.get_pretrained_cfg(name)
    fixed = bool(cfg is not None and cfg.fixed_input_size)

    def make(K: int, channels: int, size: Size | None) -> nn.Module:
        sized = {"img_size": size} if fixed and size is not None else {}
        network: nn.Module = timm.create_model(name, pretrained=False, num_classes=K, in_chans=channels, **sized)
        child: Any
        for parent in list(network.modules()):
            for child_name, child in list(parent.named_children()):
                if type(child) is timm.layers.Linear:  # of old for scripting; what a plain one does otherwise
                    plain = nn.Linear(child.in_features, child.out_features, child.bias is not None, device="meta")
                    plain.weight, plain.bias = child.weight, child.bias
                    setattr(parent, child_name, plain)
        return network

    def pretrained() -> tuple[dict[str, Tensor], None]:
        if not timm.is_model_pretrained(name):
            raise ModelError(f"There are no pretrained weights for {name!r} in timm. Give a file as weights, or none.")
        network = _fetched(f"timm:{name}", lambda: timm.create_model(name, pretrained=True))
        return network.state_dict(), None

    _, H, W = cfg.input_size if cfg is not None else (3, _USUAL_SIZE, _USUAL_SIZE)
    mean, std = ([float(v) for v in values] for values in ((cfg.mean, cfg.std) if cfg is not None else ((), ())))
    return _Known(
        make, (H, W), mean=mean or None, std=std or None, pretrained=pretrained
    )  # fmt: skip


# torchvision ----------------------------------------------------------------------------------------------------------


def _torchvision(name: str) -> _Known:
    models = _library("torchvision", "timm").models
    names = models.list_models(module=models)
    if name not in names:
        raise ModelError(unknown_name("torchvision classifier", name, names))
    builder = models.get_model_builder(name)
    entry = models.get_model_weights(name).DEFAULT
    preset = entry.transforms()
    size = (int(preset.crop_size[0]), int(preset.crop_size[0]))
    mean, std = [float(v) for v in preset.mean], [float(v) for v in preset.std]
    two_heads = name in {"inception_v3", "googlenet"}
    if two_heads:  # their weights were made for images in [-1, 1]; torchvision turns the usual normalisation into that
        mean, std = [0.5] * 3, [0.5] * 3

    def make(K: int, channels: int, size: Size | None) -> nn.Module:
        options: dict[str, Any] = {"aux_logits": False, "init_weights": True} if two_heads else {}
        if name.startswith("vit_") and size is not None:
            if size[0] != size[1]:
                raise ValueError("it takes square images")
            options["image_size"] = size[0]
        network: nn.Module = builder(weights=None, num_classes=K, **options)
        return network

    def pretrained() -> tuple[dict[str, Tensor], Sequence[str]]:
        state = _fetched(
            f"torchvision:{name}",
            lambda: entry.get_state_dict(progress=False, check_hash=True, weights_only=True),
        )
        return dict(state), entry.meta["categories"]

    return _Known(make, size, None, 3, mean, std, pretrained=pretrained, unused=("AuxLogits.", "aux1.", "aux2."))


# transformers ---------------------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """A transformers backbone that has no classifier of its own, with a linear one on its pooled output.

    Args:
        base: gives ``pooler_output``, or a ``last_hidden_state`` that is averaged over its positions.
        width: D of the pooled output.
        num_classes: K.
    """

    def __init__(self, base: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.base = base
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, K)`` of normalised images ``(B, C, H, W)``."""
        logits: Tensor = self.classifier(pooled(self.base(x)))
        return logits


def pooled(output: Any) -> Tensor:
    """One feature ``(B, D)`` of what a transformers backbone gave."""
    found = getattr(output, "pooler_output", None)
    if found is not None:
        return found.flatten(1)
    last: Tensor = output.last_hidden_state  # a map (B, D, H, W) or tokens (B, N, D)
    return last.mean((2, 3)) if last.ndim == 4 else last.mean(1)


def _hf(name: str, config: Mapping[str, Any] | None, pretrained: bool) -> _Known:
    transformers = _library("transformers", "hf")
    settings: Any
    if config is not None:
        kind = str(config.get("model_type"))
        if kind not in transformers.CONFIG_MAPPING:
            raise ModelError(f"Unknown kind of transformers network {kind!r}; transformers may be too old for it.")
        settings = transformers.CONFIG_MAPPING[kind].from_dict(_plain(config))
    else:
        local = Path(name).expanduser()
        if local.exists() and not (local / "config.json").is_file():
            raise ModelError(f"hf:{name}: expected a folder with config.json, as save_pretrained writes it.")
        name = str(local) if local.exists() else name
        settings = _fetched(
            f"hf:{name}",
            lambda: transformers.AutoConfig.from_pretrained(name, trust_remote_code=False),
            what="configuration",
        )
    if settings.model_type == "timm_wrapper":
        raise ModelError(
            f"hf:{name} is a network of timm. Name it as timm:{getattr(settings, 'architecture', 'NAME')}."
        )
    classifies = type(settings) in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    their_names = [settings.id2label[i] for i in sorted(settings.id2label)]
    generic = all(label == f"LABEL_{i}" for i, label in enumerate(their_names))
    given = getattr(settings, "num_channels", 3)

    def make(K: int, channels: int, size: Size | None) -> nn.Module:
        own = type(settings).from_dict(_plain(settings))
        own.num_labels = K
        if hasattr(own, "num_channels"):
            own.num_channels = channels
        if size is not None and isinstance(getattr(own, "image_size", None), (int, list, tuple)):
            own.image_size = size[0] if size[0] == size[1] else list(size)
        if classifies:
            network: nn.Module = transformers.AutoModelForImageClassification.from_config(own, trust_remote_code=False)
            return network
        base = transformers.AutoModel.from_config(own, trust_remote_code=False)
        with torch.no_grad():
            shown = pooled(base.eval()(_noise(channels, size or (_USUAL_SIZE, _USUAL_SIZE))))
        return Pooled(base, shown.shape[1], K)

    def fetch() -> tuple[dict[str, Tensor], Sequence[str] | None]:
        auto = transformers.AutoModelForImageClassification if classifies else transformers.AutoModel
        bars = transformers.utils.logging
        shown = bars.is_progress_bar_enabled()
        bars.disable_progress_bar()  # it would be drawn into the command's own
        try:
            network = _fetched(
                f"hf:{name}", lambda: auto.from_pretrained(name, use_safetensors=True, trust_remote_code=False)
            )
        finally:
            if shown:
                bars.enable_progress_bar()
        state = network.state_dict()
        return (
            (state, None if generic else their_names)
            if classifies
            else (
                {f"base.{k}": v for k, v in state.items()},
                None,
            )
        )

    mean, std, size = _hf_processor(transformers, name) if pretrained and config is None else (None, None, None)
    own_size = getattr(settings, "image_size", None)
    if isinstance(own_size, int):
        size = (own_size, own_size)
    elif isinstance(own_size, (list, tuple)) and len(own_size) == 2:
        size = (int(own_size[0]), int(own_size[1]))
    return _Known(
        make,
        size,
        (_USUAL_SIZE, _USUAL_SIZE),
        None if hasattr(settings, "num_channels") and not pretrained else given,
        mean,
        std,
        config=_plain(settings),
        pretrained=fetch,
    )


def _plain(config: Any) -> dict[str, Any]:
    """What a configuration says of the architecture, and nothing that would make transformers fetch code."""
    values = config if isinstance(config, Mapping) else json.loads(config.to_json_string(use_diff=True))
    left_out = ("_", "auto_map", "attn_implementation", "quantization_config", "id2label", "label2id")
    return {k: v for k, v in values.items() if not k.startswith(left_out)}


def _hf_processor(transformers: Any, name: str) -> tuple[list[float] | None, list[float] | None, Size | None]:
    """Mean, std and size of the image processor that stands beside the weights."""
    try:
        values, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError):
        return None, None, None
    mean, std = values.get("image_mean"), values.get("image_std")
    asked = values.get("crop_size") if values.get("do_center_crop") else values.get("size")
    asked = asked if isinstance(asked, Mapping) else {"shortest_edge": asked} if isinstance(asked, int) else {}
    H, W = (asked.get(key, asked.get("shortest_edge")) for key in ("height", "width"))
    if mean is None or std is None or not values.get("do_normalize", True):
        mean = std = None
    return mean, std, (int(H), int(W)) if H and W else None


# Any factory ----------------------------------------------------------------------------------------------------------


def _factory(rest: str) -> Callable[..., Any]:
    package, _, attribute = rest.partition(":")
    try:
        module = import_module(package)
    except ImportError as error:
        raise ModelError(
            f"module:{rest}: {_first_line(error)} Expected an importable module; put its folder on PYTHONPATH."
        ) from None
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ModelError(
            unknown_name(f"factory in {package}", attribute, [n for n, v in vars(module).items() if callable(v)])
        )

    found: Callable[..., Any] = factory
    return found


def _called(rest: str, offered: Mapping[str, Any]) -> nn.Module:
    """What a factory makes of those of the arguments that it takes."""
    factory = _factory(rest)
    takes = inspect.signature(factory).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in takes):
        names = {p.name for p in takes if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        offered = {k: v for k, v in offered.items() if k in names}
    network = factory(**offered)
    if not isinstance(network, nn.Module):
        raise ModelError(f"module:{rest}: expected a torch.nn.Module, got {type(network).__name__}.")
    return network


def _module(rest: str) -> _Known:
    _factory(rest)  # a module that cannot be imported is said before anything is built

    def make(K: int, channels: int, size: Size | None) -> nn.Module:
        return _called(rest, {"num_classes": K, "in_channels": channels, "image_size": size})

    return _Known(make)
