"""A network that can be used alone: backbone, normalisation, class names, input size and feature tap in one module."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import KrdistillError, ModelError
from ..files import read_json, replacing, write_json
from ..kinds import NOUNS, Kind, encode_texts, kind_of
from ..outputs import Outputs
from .assemble import assemble, replace_head
from .ensemble import Ensemble
from .graphs import Graph, load_graph
from .heads import answer_of, as_given, decoded, find_head, width
from .registry import ORIGIN_KINDS, ModelName, list_models, model_info, parse_model
from .weights import load_weights

_PART = 1024
_WEIGHTS, _CARD = "model.safetensors", "network.json"
_LARGEST_SIDE = 8192  # a card that a stranger wrote may name any number
CONFIG_NAME = "config.json"  # what the card is called in the Hugging Face layout


class Network(nn.Module):
    """Wraps any classifier with what it needs to be used alone.

    The feature is the input of the classifier layer. A backbone of krdistill's own is asked for it directly; of any
    other it is recorded on the way (:func:`~krdistill.models.heads.find_head` says which layer that is). Where the
    classifier is a 1x1 convolution, the feature is the mean of its input over positions. A backbone that has
    ``answer`` gives logits and feature itself (a file, an ensemble). A backbone for sentences whose ``takes_texts`` is
    true is given them as a list of texts, in place of their bytes.

    Args:
        backbone: a module from float images ``(B, C, H, W)``, or what ``kind`` says, to logits ``(B, K)``.
        class_names: K names, in the order of the logits.
        mean: per-channel mean of images in [0, 1], ``(C,)``; of vectors per column, ``(D,)``; none of sentences.
        std: per-channel standard deviation, ``(C,)``, and so on.
        image_size: (H, W) of the images it is given; None for other kinds.
        input_size: (H, W) that the backbone works at; images of another size are resized (bilinear, antialiased
            where they shrink). None leaves them as they are.
        channels: of the images, where not as many as ``mean`` has: grey images (1) are repeated over its channels.
        head: dotted name of the classifier layer, where it is not to be searched for.
        architecture: what :func:`~krdistill.models.assemble.assemble` rebuilds the backbone from.
        notes: what a person should know of how it was made, a sentence each.
        kind: of the examples: ``image``; ``features``, float vectors ``(B, D)``; or ``text``, bytes ``(B, L)``
            (:mod:`krdistill.kinds`).

    Raises:
        ModelError: no linear layer, an unknown ``head``, or a class count that differs from the layer's width.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        class_names: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        image_size: tuple[int, int] | None,
        input_size: tuple[int, int] | None = None,
        channels: int | None = None,
        head: str | None = None,
        architecture: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
        kind: Kind = "image",
    ) -> None:
        super().__init__()
        if (kind == "image") != (image_size is not None):
            raise ModelError(f"Expected an image size of a network for images alone, got {image_size} for {kind!r}.")
        if kind != "text" and (len(mean) != len(std) or not mean or min(std) <= 0):
            raise ModelError(f"Expected a mean and a positive std per channel, got mean {mean} and std {std}.")
        if channels not in (None, 1, len(mean)):
            raise ModelError(
                f"The network takes images of {len(mean)} channel(s), the data have {channels}. "
                "Give a network for as many channels; only grey images are repeated."
            )
        self.backbone = backbone
        self.class_names = tuple(class_names)
        self.kind = kind
        self.image_size = (0, 0) if image_size is None else (int(image_size[0]), int(image_size[1]))
        self.input_size = None if input_size is None else (int(input_size[0]), int(input_size[1]))
        for size in (image_size and self.image_size, self.input_size):
            if size and not all(1 <= side <= _LARGEST_SIDE for side in size):
                raise ModelError(f"Expected images of 1 to {_LARGEST_SIDE:,} pixels a side, got {size[0]}x{size[1]}.")
        self.channels = len(mean) if channels is None else channels
        self.architecture = dict(architecture) if architecture is not None else None
        self.notes = tuple(notes)
        self.answers = hasattr(backbone, "answer")
        self.takes_texts = kind == "text" and bool(getattr(backbone, "takes_texts", False))
        if self.answers:
            known: Any = backbone
            self.head_name, outputs, self.feature_dim = "", int(known.num_classes), int(known.feature_dim)
        else:
            size, C = self.input_size or self.image_size, len(mean)

            def example() -> Tensor | list[str]:
                rows = _noise(C, size) if kind == "image" else self.example_inputs()
                return as_given(backbone, rows.to(_device(backbone))) if kind == "text" else rows.to(_device(backbone))

            self.head_name, layer = find_head(backbone, head, len(self.class_names), example)
            outputs = width(layer)
            self.feature_dim = int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)  # type: ignore[arg-type]
        if outputs != len(self.class_names):
            raise ModelError(
                f"The network answers {outputs} classes (layer {self.head_name!r}) but "
                f"{len(self.class_names)} class names were given. Give a network with {len(self.class_names)} outputs, "
                "or the names of its own classes."
            )
        self.direct = self.head_name == "head" and all(
            hasattr(backbone, name) for name in ("forward_maps", "forward_features", "pool")
        )
        shape = (1, len(mean), 1, 1) if kind == "image" else (1, len(mean))
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(shape))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(shape))

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def parameter_count(self) -> int:
        return int(getattr(self.backbone, "parameter_count", 0)) or sum(p.numel() for p in self.backbone.parameters())

    @property
    def has_feature(self) -> bool:
        """Whether it gives a feature; of a file where none was found, the logits stand in for it."""
        return bool(getattr(self.backbone, "has_feature", True))

    def takes(self, rows: Tensor) -> bool:
        """Whether it was made for rows such as these, as a data set has them."""
        if kind_of(rows) != self.kind or self.kind == "text":
            return kind_of(rows) == self.kind
        return rows.shape[-1] == self.channels and (self.kind == "features" or rows.shape[1:3] == self.image_size)

    @property
    def takes_words(self) -> str:
        """What it is given, in words: ``images of 32x32 with 3 channel(s)``."""
        if self.kind == "image":
            return f"images of {self.image_size[0]}x{self.image_size[1]} with {self.channels} channel(s)"
        return f"rows of {self.channels} numbers" if self.kind == "features" else "sentences"

    def example_inputs(self) -> Tensor:
        """A batch of two, as the network is given them, on the CPU: noise, or sentences."""
        if self.kind == "image":
            return _noise(self.channels, self.image_size).sigmoid()
        return example_rows(self.kind, self.channels)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 images, or float images in [0, 1], to normalised float32 of the backbone's size and channels.

        Vectors are standardised by column. Sentences stay bytes; what no sentence of the batch fills is cut off.
        """
        if self.kind == "text":
            if images.ndim != 2 or images.dtype != torch.uint8:
                raise ModelError(
                    f"Expected sentences as bytes, uint8 (B, L), got {images.dtype} {tuple(images.shape)}."
                )
            if images.device.type != "cpu" or torch.compiler.is_compiling():
                return images  # how long they are would have to be read from the device
            return images[:, : max(1, int((images != 0).sum(1).max()))]
        if self.kind == "features":
            if images.ndim != 2 or images.shape[1] != self.channels:
                raise ModelError(f"Expected vectors of shape (B, {self.channels}), got {tuple(images.shape)}.")
            return (images - self.mean) / self.std
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ModelError(f"Expected images of shape (B, {self.channels}, H, W), got {tuple(images.shape)}.")
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        if self.input_size is not None and (images.shape[2], images.shape[3]) != self.input_size:
            images = resize(images, self.input_size)
        return (images - self.mean) / self.std  # grey images meet several means: they are repeated

    @property
    def map_channels(self) -> tuple[int, ...]:
        """Channels of its stages; empty where the backbone does not show them."""
        return tuple(getattr(self.backbone, "map_channels", ()))

    def forward(self, images: Tensor, *, maps: bool = False) -> Outputs:
        """Answers a batch.

        Args:
            images: shape ``(B, C, H, W)``, uint8 or float in [0, 1]; or what the network's kind says.
            maps: give the output of every stage too; the backbone must be one of krdistill's own.
        """
        x: Any = self.normalise(images)
        if self.takes_texts:
            x = decoded(x)
        if maps:
            if not self.map_channels:
                raise ModelError(f"{type(self.backbone).__name__} does not show the output of its stages.")
            stages = self.backbone.forward_maps(x)  # type: ignore[operator]
            feature = self.backbone.pool(stages[-1])  # type: ignore[operator]
            return Outputs(self.backbone.head(feature), feature, stages)  # type: ignore[operator]
        if self.answers:
            return Outputs(*self.backbone.answer(x))  # type: ignore[operator]
        if self.direct:
            feature = self.backbone.forward_features(x)  # type: ignore[operator]
            return Outputs(self.backbone.head(feature), feature)  # type: ignore[operator]
        seen: list[Tensor] = []
        layer = self.backbone.get_submodule(self.head_name)
        handle = layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
        try:
            logits = answer_of(self.backbone(x))
        finally:
            handle.remove()
        if len(seen) == 1 and seen[0].ndim == 4 and isinstance(layer, nn.Conv2d):
            seen = [seen[0].mean((2, 3))]
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(seen) != 1 or seen[0].ndim != 2:
            raise ModelError(
                f"Expected logits (B, K) and one feature (B, D) at layer {self.head_name!r}, got "
                f"{_shape(logits)} and {[_shape(s) for s in seen]}. Name the classifier layer with head=..."
            )
        return Outputs(logits, seen[0])

    def card(self) -> dict[str, Any]:
        """What a stranger needs to rebuild the network, as plain data."""
        return {
            "format": 1,
            "kind": self.kind,
            "architecture": self.architecture,
            "class_names": list(self.class_names),
            "mean": [float(v) for v in self.mean.flatten()],
            "std": [float(v) for v in self.std.flatten()],
            "image_size": list(self.image_size) if self.kind == "image" else None,
            "input_size": list(self.input_size) if self.input_size is not None else None,
            "channels": self.channels,
            "head": self.head_name,
            "feature_dim": self.feature_dim,
            "parameters": self.parameter_count,
        }


def build_network(
    model: str, *, class_names: Sequence[str], head: str = "linear", images: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None, image_size: tuple[int, int] | None = None, seed: int = 0,
    weights: str | None = None, tap: str | None = None,
) -> Network:  # fmt: skip
    """A network by name, ready for the given training images.

    A network with fresh weights is normalised by the training images and works at their size (at its own, where it
    cannot). One of another library with given weights keeps the normalisation and the input size it was trained with,
    where they are known, and resizes inside. What was decided is in ``network.notes``.

    Args:
        model: a name of ``krdistill list models``, ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME-or-folder``,
            ``module:package.path:factory``, or ``embedding:NAME-or-folder``; options may follow, as in
            ``timm:resnet18?weights=pretrained&tap=fc``.
        class_names: K names.
        head: the last layer: ``linear``, ``cosine`` (for margin losses) or ``etf`` (fixed anchors).
        images: training images uint8 ``(N, H, W, C)``; mean, std and size are measured on them unless given. Or the
            rows of another kind (:mod:`krdistill.kinds`).
        mean: per channel, in [0, 1].
        std: per channel.
        image_size: (H, W).
        seed: of the initial weights.
        weights: ``none``, ``pretrained``, or a file of weights (safetensors, or torch's, read without unpickling); a
            classifier layer of another width in it is left out, and said so.
        tap: name of the classifier layer, where the one found by itself is not the one.

    Raises:
        ModelError: an unknown name, weights that cannot be had or do not fit, or no classifier layer.
        MissingDependencyError: the network's library is not installed.
    """
    asked = parse_model(model, weights=weights, tap=tap)
    kind = "image" if images is None else kind_of(images)
    _check_kind(asked, kind)
    if images is not None and kind != "image":
        return _for_rows(asked, class_names, head, images, kind, seed)
    if images is not None:
        measured_mean, measured_std = channel_statistics(images)
        mean, std = mean or measured_mean, std or measured_std
        image_size = image_size or (int(images.shape[1]), int(images.shape[2]))
    if mean is None or std is None or image_size is None:
        raise ModelError("Expected training images, or mean, std and image_size; got neither.")
    given: dict[str, Any] = {"class_names": class_names, "image_size": image_size}
    if asked.origin:
        from .foreign import create_foreign

        made = create_foreign(asked, class_names=class_names, channels=len(mean), image_size=image_size, seed=seed)
        architecture = made.architecture
        given |= {"channels": len(mean), "input_size": made.input_size, "notes": made.notes, "head": made.tap}
        repeated = architecture["in_channels"] // len(mean)  # grey images for a network of several channels
        mean, std, backbone = made.mean or [*mean] * repeated, made.std or [*std] * repeated, made.backbone
        if head != "linear":
            name, _ = find_head(backbone, made.tap, len(class_names))
            replace_head(backbone, head, name, seed=seed)
            architecture, given["head"] = {**architecture, "head": head, "tap": name}, name
        return Network(backbone, mean=mean, std=std, architecture=architecture, **given)
    architecture = {
        "name": asked.name, "num_classes": len(class_names), "in_channels": len(mean), "image_size": image_size[0]
    }  # fmt: skip
    if head != "linear":
        architecture["head"] = head
    backbone = assemble(architecture, seed=seed)
    if asked.weights == "pretrained":
        raise ModelError(
            f"There are no pretrained weights for krdistill's own {asked.name!r}. Give a file as weights, or none."
        )
    if asked.weights != "none":
        given["notes"] = load_weights(backbone, asked.weights, head="head", class_names=class_names)
    return Network(backbone, mean=mean, std=std, head=asked.tap, architecture=architecture, **given)


def _check_kind(asked: ModelName, kind: Kind) -> None:
    """Refuses a network for examples of another kind."""
    known = ORIGIN_KINDS.get(asked.origin) if asked.origin else model_info(asked.name).kinds
    if known is None or kind in known:
        return
    ours = ", ".join(info.name for info in list_models(kind)[:4])
    raise ModelError(
        f"The network {asked.name!r} is for {' or '.join(NOUNS[k] for k in known)}, the data are {NOUNS[kind]}. Take "  # type: ignore[index]
        f"one for them, such as {ours}: `krdistill list models` shows them all."
    )


def _for_rows(
    asked: ModelName, class_names: Sequence[str], head: str, rows: Tensor, kind: Kind, seed: int
) -> Network:  # fmt: skip
    """A network for vectors or sentences."""
    mean, std = column_statistics(rows) if kind == "features" else ([], [])
    given: dict[str, Any] = {"class_names": class_names, "mean": mean, "std": std, "image_size": None, "kind": kind}
    if asked.origin == "hf":
        from .transformer import create_transformer

        made, architecture, found = create_transformer(asked, class_names=class_names, seed=seed)
        if head != "linear":
            replace_head(made, head, seed=seed)
            architecture["head"] = head
        return Network(made, head=asked.tap, architecture=architecture, notes=found, **given)
    if asked.origin == "module":
        return _of_factory(asked, class_names, head, kind, seed, given)
    own: dict[str, Any] = {"in_channels": len(mean), "image_size": 1} if kind == "features" else {"in_channels": 1}
    architecture = {"name": asked.name, "num_classes": len(class_names), **own}
    if head != "linear":
        architecture["head"] = head
    if asked.origin == "embedding":
        from .encoder import describe_encoder

        architecture["config"] = describe_encoder(asked.name.partition(":")[2])
    backbone = assemble(architecture, seed=seed)
    notes: Sequence[str] = ()
    if asked.weights != "none":
        if asked.weights == "pretrained":
            raise ModelError(f"There are no pretrained weights for {asked.name!r}. Give a file as weights, or none.")
        notes = load_weights(backbone, asked.weights, head="head", class_names=class_names)
    return Network(backbone, head=asked.tap, architecture=architecture, notes=notes, **given)


def _of_factory(
    asked: ModelName, class_names: Sequence[str], head: str, kind: Kind, seed: int, given: Mapping[str, Any]
) -> Network:
    """A factory's network for vectors or sentences."""
    from .foreign import create_for_rows

    if asked.weights == "pretrained":
        raise ModelError(f"There are no pretrained weights for {asked.name!r}. Give a file as weights, or none.")
    example = example_rows(kind, len(given["mean"]))
    backbone, architecture = create_for_rows(asked, class_names=class_names, kind=kind, example=example, seed=seed)
    name, _ = find_head(backbone, asked.tap, len(class_names), lambda: as_given(backbone, example))
    notes: Sequence[str] = ()
    if asked.weights != "none":
        notes = load_weights(backbone, asked.weights, head=name, class_names=class_names)
    if head != "linear":
        replace_head(backbone, head, name, seed=seed)
        architecture |= {"head": head, "tap": name}
    return Network(backbone, head=name, architecture=architecture, notes=notes, **given)


def example_rows(kind: Kind, columns: int) -> Tensor:
    """Two rows of so many standardised numbers, or two sentences, as networks take them, on the CPU."""
    if kind == "features":
        return torch.randn(2, columns, generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(encode_texts(["what is this", "a second example of two"]))


def column_statistics(rows: Tensor) -> tuple[list[float], list[float]]:
    """Per-column mean and standard deviation of vectors ``(N, D)``; that of a column with one value alone is 1."""
    wide = rows.to(torch.float64)
    mean, std = wide.mean(0), wide.std(0, correction=0)
    constant = std <= 1e-6 * mean.abs().clamp_min(1e-30)
    return mean.tolist(), torch.where(constant, 1.0, std).tolist()


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Float images ``(B, C, H, W)`` to another size: bilinear, over all pixels that a new one covers (antialiased)."""
    shrinks = images.shape[2] > size[0] or images.shape[3] > size[1]
    return nn.functional.interpolate(images, size, mode="bilinear", align_corners=False, antialias=shrinks)


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of uint8 images ``(N, H, W, C)``, on the scale [0, 1]."""
    channels = images.shape[3]
    counts = torch.zeros(channels, 256, dtype=torch.int64)
    for part in images.split(_PART):  # a set on the disk is read once, and never held as a whole
        for c in range(channels):
            counts[c] += torch.bincount(part[..., c].reshape(-1).to(torch.int32), minlength=256)
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for histogram in counts.to(torch.float64):
        m = float((histogram * levels).sum() / histogram.sum())
        v = float((histogram * (levels - m) ** 2).sum() / histogram.sum())
        mean.append(m)
        std.append(max(v**0.5, 1 / 255))  # a constant channel must not divide by zero
    return mean, std


def file_network(path: Path, *, class_names: Sequence[str], images: Tensor, tap: str | None = None) -> Network:
    """A trained network that comes as an ``.onnx`` or ``.pt2`` file, to be a teacher (see :mod:`.graphs`).

    What the file says of class names, normalisation and image size is taken; of what it does not say, the data's is
    assumed and said so in ``notes``. A file that takes uint8 images normalises them itself.

    Args:
        path: the file.
        class_names: the data's K names.
        images: training images uint8 ``(N, H, W, C)``, or the rows of another kind.
        tap: name of the tensor that is the feature, where it is not found.

    Raises:
        ModelError: no such file, a damaged one, or one for other images, rows or classes.
        MissingDependencyError: an ONNX file, and the ``onnx`` extra is not installed.
    """
    kind = kind_of(images)
    shape = tuple(images.shape) if kind != "image" else tuple(images.shape[i] for i in (0, 3, 1, 2))
    graph = load_graph(path, tap=tap, fallback=shape[1:] if kind != "text" else ())
    card: Mapping[str, Any] = graph.facts.card
    notes: list[str] = []
    if graph.facts.kind != kind:
        raise ModelError(
            f"{path} takes {graph.facts.words}; the data are {NOUNS[kind]}, {_WANTED[kind].format(*shape)}. Give a "
            f"network for {NOUNS[kind]}."
        )
    names = card.get("class_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        names = list(class_names)
        notes.append(f"{path.name} names no classes: they are taken to be the data's {len(names)}, in their order.")
    if graph.num_classes != len(names):
        raise ModelError(
            f"{path} answers {graph.num_classes} classes, {'it names' if not notes else 'the data have'} {len(names)}. "
            "Give a network that was trained on the data's classes."
        )
    mean, std = card.get("mean") or [], card.get("std") or []
    if not graph.has_feature:
        notes.append(f"{path.name}: no feature was found in it; recipes that need predictions alone can be used.")
    if kind != "image":
        return _file_for_rows(path, graph, names, images, mean, std, notes)
    _, C, H, W = shape
    if graph.facts.dtype == torch.uint8:
        mean, std = [0.0] * graph.channels, [1.0] * graph.channels
    elif not (_numbers(mean, graph.channels) and _numbers(std, graph.channels)):
        mean, std = channel_statistics(images)
        repeated = graph.channels // C if C == 1 else 1
        mean, std = mean * repeated, std * repeated
        notes.append(f"{path.name} says no normalisation: the data's mean and standard deviation are taken.")
    size = graph.facts.image_size
    if size is not None and size != (H, W):
        notes.append(f"{path.name}: images of {H}x{W} are resized to {size[0]}x{size[1]} for it.")
    return Network(
        graph, class_names=names, mean=mean, std=std, image_size=(H, W), input_size=size, channels=C,
        architecture=graph.architecture, notes=notes,
    )  # fmt: skip


_WANTED = {
    "image": "(B, C, H, W) = (B, {1}, {2}, {3})", "features": "float32 (B, D) = (B, {1})",
    "text": "bytes, uint8 (B, L) with zeros behind each sentence",
}  # fmt: skip


def _file_for_rows(
    path: Path, graph: Graph, names: Sequence[str], rows: Tensor, mean: Any, std: Any, notes: list[str]
) -> Network:  # fmt: skip
    """The network of a file for vectors or sentences; what krdistill wrote standardises vectors by itself."""
    kind, D = graph.facts.kind, rows.shape[1]
    if kind == "text":
        mean = std = []
        if graph.facts.width is not None:
            notes.append(f"{path.name}: it takes {graph.facts.width} bytes; longer sentences are cut there for it.")
    elif graph.facts.card.get("kind") == "features" or not (_numbers(mean, D) and _numbers(std, D)):
        if graph.facts.card.get("kind") != "features":
            notes.append(f"{path.name} says no normalisation: rows are given as they are, and not standardised.")
        mean, std = [0.0] * D, [1.0] * D
    return Network(
        graph, class_names=names, mean=mean, std=std, image_size=None, kind=kind, architecture=graph.architecture,
        notes=notes,
    )  # fmt: skip


def ensemble(networks: Sequence[Network]) -> Network:
    """Several networks as one (see :class:`~krdistill.models.ensemble.Ensemble`), to be a teacher; one stays as it is.

    Raises:
        ModelError: none, or networks of other classes, image sizes or channels than the first's.
    """
    if len(networks) == 1:
        return networks[0]
    together = Ensemble(networks)
    first = networks[0]
    names = [str((n.architecture or {}).get("name", type(n.backbone).__name__)) for n in networks]
    return Network(
        together,
        class_names=first.class_names,
        mean=[0.0] * first.channels,
        std=[1.0] * first.channels,
        image_size=first.image_size if first.kind == "image" else None,
        kind=first.kind,
        architecture={"name": " + ".join(names), "members": len(networks)},
        notes=[note for network in networks for note in network.notes],
    )


def save_network(network: Network, folder: Path) -> None:
    """Writes ``network.json`` and the weights (``model.safetensors``), each beside its place and then renamed.

    Of a network that came as a file, that file is copied; the members of an ensemble get folders of their own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(network.backbone, Ensemble):
        for i, member in enumerate(network.backbone.networks):
            save_network(member, folder / f"member-{i}")  # type: ignore[arg-type]
    elif hasattr(network.backbone, "copy_to"):
        network.backbone.copy_to(folder)  # type: ignore[operator]
    else:
        # A copy: tensors that share memory, as tied layers do, cannot be written as one.
        state = {
            k: v.detach().cpu().clone(memory_format=torch.contiguous_format)
            for k, v in network.backbone.state_dict().items()
        }
        with replacing(folder / _WEIGHTS) as part:
            save_file(state, part)
    write_json(folder / _CARD, network.card())


def load_network(
    folder: Path, *, backbone: nn.Module | None = None, allow_factories: bool | Collection[str] = False
) -> Network:
    """Reads what :func:`save_network` wrote, or ``krdistill share``.

    Nothing is unpickled, and no module is imported unless that is allowed.

    Args:
        folder: the folder that holds ``network.json`` (or ``config.json``) and the weights.
        backbone: the module to load the weights into, where the network was not made by name.
        allow_factories: whether a network that was made by ``module:package.path:factory`` may import that module:
            True, or the names that may. A card is a text that a stranger may have written; importing runs code.

    Raises:
        ModelError: the folder holds no network, a damaged one, or one that needs ``backbone`` or
            ``allow_factories``.
        MissingDependencyError: the network's library is not installed.
    """
    described = next((folder / name for name in (_CARD, CONFIG_NAME) if (folder / name).is_file()), None)
    if described is None:
        raise ModelError(f"No network in {folder}: {_CARD} missing. Expected a folder of a finished run.")
    try:
        card = read_json(described)
        architecture = card["architecture"]
        kind = card.get("kind", "image")
        size = None if kind != "image" else (int(card["image_size"][0]), int(card["image_size"][1]))
        name = str((architecture or {}).get("name"))
        names = card["class_names"]
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise ValueError("expected class_names as a list of texts")
        if architecture and architecture.get("num_classes", len(names)) != len(names):
            raise ValueError(f"{len(names)} class names for {architecture['num_classes']} classes")
        own = bool(architecture) and (":" not in name or (kind == "text" and not name.startswith("module:")))
        arguments: dict[str, Any] = {
            "class_names": card["class_names"], "mean": card["mean"], "std": card["std"], "image_size": size,
            "input_size": card.get("input_size"), "channels": card.get("channels"), "architecture": architecture,
            "kind": kind,
        }  # fmt: skip
        if architecture and "file" in architecture:
            shape = (int(card["channels"]), *(size or ())) if kind != "text" else ()
            graph = load_graph(folder / Path(architecture["file"]).name, tap=architecture["tap"], fallback=shape)
            return Network(graph, **arguments)
        if architecture and "members" in architecture:
            members = [folder / f"member-{i}" for i in range(int(architecture["members"]))]
            return ensemble([load_network(m, allow_factories=allow_factories) for m in members])
        if not (folder / _WEIGHTS).is_file():
            raise ModelError(f"No network in {folder}: {_WEIGHTS} missing. Expected a folder of a finished run.")
        state = load_file(folder / _WEIGHTS)
        arguments["head"] = None if own else card["head"]
    except KrdistillError:
        raise
    except Exception as error:  # whatever a card that a stranger wrote may lead to
        raise ModelError(f"The network in {folder} is damaged: {error}. Train it again, or copy it again.") from None
    if backbone is None:
        if architecture is None:
            raise ModelError(
                f"The network in {folder} was not made by name; give the module: load_network(folder, backbone=...)."
            )
        allowed = allow_factories if isinstance(allow_factories, bool) else name in allow_factories
        if name.startswith("module:") and not allowed:
            raise ModelError(
                f"The network in {folder} is made by {name!r}, and making it would import and run that module. If you "
                f"trust it: load_network(folder, allow_factories=True), or --teacher.model {name} in a run."
            )
    try:
        backbone = assemble(architecture) if backbone is None else backbone
        network = Network(backbone, **arguments)
    except KrdistillError:
        raise
    except Exception as error:
        raise ModelError(
            f"The network in {folder} cannot be made: {error}. Train it again, or copy it again."
        ) from error
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"The weights in {folder} do not fit the network: {error}") from None
    return network


def probe(network: Network, *, what: str = "The network") -> None:
    """Shows a network a batch of two images, before hours are spent on it.

    Raises:
        ModelError: it cannot work at its size, answers another number of classes, or answers numbers that are not
            finite; the message names what went in, what came out and what to do.
    """
    images, seen = network.example_inputs(), network.takes_words
    if network.input_size is not None and network.input_size != network.image_size:
        seen += f", resized to {network.input_size[0]}x{network.input_size[1]}"
    modes = {module: module.training for module in network.modules()}
    device = network.mean.device
    try:
        with torch.no_grad():
            out = network.eval()(images.to(device))
    except KrdistillError:
        raise
    except Exception as error:  # whatever a foreign network raises
        raise ModelError(
            f"{what} cannot answer {seen}: {str(error).strip().splitlines()[0] if str(error).strip() else error!r} "
            f"{'Set data.image_size to a size it takes, or take' if network.kind == 'image' else 'Take'} another "
            "network."
        ) from None
    finally:
        for module, mode in modes.items():
            module.training = mode
    K, D = network.num_classes, network.feature_dim
    if tuple(out.logits.shape) != (2, K) or tuple(out.feature.shape) != (2, D):
        raise ModelError(
            f"{what} gives logits {tuple(out.logits.shape)} and features {tuple(out.feature.shape)} of two {seen}; "
            f"expected (2, {K}) and (2, {D}). Give a network with {K} outputs, or name its classifier layer with tap."
        )
    if not bool(out.logits.isfinite().all() and out.feature.isfinite().all()):
        raise ModelError(f"{what} answers {seen} with numbers that are not finite. Check its weights.")


def check_needs(recipe: str, needs: Collection[str], *, student: Network, teacher: Network | None) -> None:
    """Refuses a recipe that asks networks for what they do not show, before anything is trained.

    Args:
        recipe: its name.
        needs: :meth:`krdistill.recipes.Recipe.needs_with` its options.
        student: what will be trained.
        teacher: what it learns from, or None.

    Raises:
        ModelError: stages (maps) of a network that is not krdistill's own, or features of a file that gives none.
    """
    for who, network in (("student", student), ("teacher", teacher)):
        if network is None:
            continue
        if "maps" in needs and not network.map_channels:
            raise ModelError(
                f"The recipe {recipe!r} needs the stages of both networks, but the {who} "
                f"({(network.architecture or {}).get('name', type(network.backbone).__name__)}) does not show them; "
                "krdistill's own networks do. Take one, or a recipe that uses predictions or features."
            )
        if "features" in needs and not network.has_feature:
            raise ModelError(
                f"The recipe {recipe!r} needs the {who}'s features, and none was found in its file. Name the tensor "
                "that holds them with teacher.tap, or take a recipe that needs predictions alone, such as kd or ltkd."
            )


def _noise(channels: int, size: tuple[int, int]) -> Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _numbers(values: Any, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(isinstance(v, (int, float)) for v in values)


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
