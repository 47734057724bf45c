"""A network that can be used alone: backbone, normalisation, class names, input size and feature tap in one module."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import ModelError
from ..outputs import Outputs
from .assemble import assemble

_WEIGHTS, _CARD = "model.safetensors", "network.json"


class Network(nn.Module):
    """Wraps any classifier with what it needs to be used alone.

    The feature is the input of the last linear layer. A backbone that has ``forward_features`` and ``head`` is asked
    directly; of any other, the input of its last :class:`torch.nn.Linear` (or the one named by ``head``) is recorded.

    Args:
        backbone: a module from float images ``(B, C, H, W)`` to logits ``(B, K)``.
        class_names: K names, in the order of the logits.
        mean: per-channel mean of images in [0, 1], ``(C,)``.
        std: per-channel standard deviation, ``(C,)``.
        image_size: (H, W) of its input.
        head: dotted name of the last linear layer, where the last one found is not the classifier.
        architecture: what :func:`~krdistill.models.assemble.assemble` rebuilds the backbone from.

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
        image_size: tuple[int, int],
        head: str | None = None,
        architecture: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if len(mean) != len(std) or not mean or min(std) <= 0:
            raise ModelError(f"Expected a mean and a positive std per channel, got mean {mean} and std {std}.")
        self.backbone = backbone
        self.class_names = tuple(class_names)
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.architecture = dict(architecture) if architecture is not None else None
        self.head_name, layer = _find_head(backbone, head)
        if layer.out_features != len(self.class_names):
            raise ModelError(
                f"The network answers {layer.out_features} classes (layer {self.head_name!r}) but "
                f"{len(self.class_names)} class names were given. Give a network with {len(self.class_names)} outputs, "
                "or the names of its own classes."
            )
        self.feature_dim = int(layer.in_features)
        self.direct = head is None and hasattr(backbone, "forward_features") and hasattr(backbone, "head")
        shape = (1, len(mean), 1, 1)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(shape))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(shape))

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def channels(self) -> int:
        return int(self.mean.shape[1])

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.backbone.parameters())

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 images, or float images in [0, 1], to normalised float32."""
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        return (images - self.mean) / self.std

    @property
    def map_channels(self) -> tuple[int, ...]:
        """Channels of its stages; empty where the backbone does not show them."""
        return tuple(getattr(self.backbone, "map_channels", ()))

    def forward(self, images: Tensor, *, maps: bool = False) -> Outputs:
        """Answers a batch.

        Args:
            images: shape ``(B, C, H, W)``, uint8 or float in [0, 1].
            maps: give the output of every stage too; the backbone must be one of krdistill's own.
        """
        x = self.normalise(images)
        if maps:
            if not self.map_channels:
                raise ModelError(f"{type(self.backbone).__name__} does not show the output of its stages.")
            stages = self.backbone.forward_maps(x)  # type: ignore[operator]
            feature = self.backbone.pool(stages[-1])  # type: ignore[operator]
            return Outputs(self.backbone.head(feature), feature, stages)  # type: ignore[operator]
        if self.direct:
            feature = self.backbone.forward_features(x)  # type: ignore[operator]
            return Outputs(self.backbone.head(feature), feature)  # type: ignore[operator]
        seen: list[Tensor] = []
        layer = self.backbone.get_submodule(self.head_name)
        handle = layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
        try:
            logits = self.backbone(x)
        finally:
            handle.remove()
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
            "architecture": self.architecture,
            "class_names": list(self.class_names),
            "mean": [float(v) for v in self.mean.flatten()],
            "std": [float(v) for v in self.std.flatten()],
            "image_size": list(self.image_size),
            "head": self.head_name,
            "feature_dim": self.feature_dim,
            "parameters": self.parameter_count,
        }


def build_network(
    model: str, *, class_names: Sequence[str], head: str = "linear", images: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None, image_size: tuple[int, int] | None = None, seed: int = 0,
) -> Network:  # fmt: skip
    """A network of ours by name, normalised for the given training images.

    Args:
        model: a name of ``krdistill list models``.
        class_names: K names.
        head: the last layer: ``linear``, ``cosine`` (for margin losses) or ``etf`` (fixed anchors).
        images: training images uint8 ``(N, H, W, C)``; mean, std and size are measured on them unless given.
        mean: per channel, in [0, 1].
        std: per channel.
        image_size: (H, W).
        seed: of the initial weights.
    """
    if images is not None:
        measured_mean, measured_std = channel_statistics(images)
        mean, std = mean or measured_mean, std or measured_std
        image_size = image_size or (int(images.shape[1]), int(images.shape[2]))
    if mean is None or std is None or image_size is None:
        raise ModelError("Expected training images, or mean, std and image_size; got neither.")
    sizes = {"num_classes": len(class_names), "in_channels": len(mean), "image_size": image_size[0]}
    arguments: dict[str, Any] = {"name": model, **sizes}
    if head != "linear":
        arguments["head"] = head
    backbone = assemble(arguments, seed=seed)
    return Network(backbone, class_names=class_names, mean=mean, std=std, image_size=image_size, architecture=arguments)


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of uint8 images ``(N, H, W, C)``, on the scale [0, 1]."""
    mean, std = [], []
    for c in range(images.shape[3]):
        histogram = torch.bincount(images[..., c].reshape(-1).to(torch.int32), minlength=256).to(torch.float64)
        levels = torch.arange(256, dtype=torch.float64) / 255
        m = float((histogram * levels).sum() / histogram.sum())
        v = float((histogram * (levels - m) ** 2).sum() / histogram.sum())
        mean.append(m)
        std.append(max(v**0.5, 1 / 255))  # a constant channel must not divide by zero
    return mean, std


def save_network(network: Network, folder: Path) -> None:
    """Writes ``model.safetensors`` and ``network.json``, each beside its place and then renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu().contiguous() for k, v in network.backbone.state_dict().items()}
    temporary = folder / f".{_WEIGHTS}.part"
    save_file(state, temporary)
    os.replace(temporary, folder / _WEIGHTS)
    temporary = folder / f".{_CARD}.part"
    temporary.write_text(json.dumps(network.card(), indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, folder / _CARD)


def load_network(folder: Path, *, backbone: nn.Module | None = None) -> Network:
    """Reads what :func:`save_network` wrote.

    Args:
        folder: the folder that holds ``model.safetensors`` and ``network.json``.
        backbone: the module to load the weights into, where the network was not one of ours.

    Raises:
        ModelError: the folder holds no network, a damaged one, or one that needs ``backbone``.
    """
    missing = [name for name in (_WEIGHTS, _CARD) if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"No network in {folder}: {' and '.join(missing)} missing. Expected a folder of a finished run."
        )
    try:
        card = json.loads((folder / _CARD).read_text(encoding="utf-8"))
        state = load_file(folder / _WEIGHTS)
        architecture = card["architecture"]
        size = (int(card["image_size"][0]), int(card["image_size"][1]))
    except (ValueError, KeyError, TypeError, IndexError, SafetensorError, OSError) as error:
        raise ModelError(f"The network in {folder} is damaged: {error}. Train it again, or copy it again.") from None
    if backbone is None:
        if architecture is None:
            raise ModelError(
                f"The network in {folder} was not one of krdistill's own; "
                "give the module: load_network(folder, backbone=...)."
            )
        backbone = assemble(architecture)
    network = Network(
        backbone,
        class_names=card["class_names"],
        mean=card["mean"],
        std=card["std"],
        image_size=size,
        head=None if architecture is not None else card["head"],
        architecture=architecture,
    )
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"The weights in {folder} do not fit the network: {error}") from None
    return network


def _find_head(backbone: nn.Module, head: str | None) -> tuple[str, nn.Linear]:
    linears = {name: m for name, m in backbone.named_modules() if isinstance(m, nn.Linear)}
    if head is not None:
        if head not in linears:
            raise ModelError(f"No linear layer {head!r} in the network. Linear layers: {', '.join(linears) or 'none'}.")
        return head, linears[head]
    if "head" in linears and hasattr(backbone, "forward_features"):
        return "head", linears["head"]
    if not linears:
        raise ModelError(
            f"Expected a classifier that ends in a linear layer, got {type(backbone).__name__} without one."
        )
    name = list(linears)[-1]
    return name, linears[name]


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
