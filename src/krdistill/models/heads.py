"""Which layer of a network is its classifier: the one whose input is the feature."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..kinds import decode_texts


def is_head(module: nn.Module) -> bool:
    """Whether a layer can be a classifier: a linear one, or a 1x1 convolution."""
    if isinstance(module, nn.Conv2d):
        return tuple(module.kernel_size) == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def width(layer: nn.Module) -> int:
    """The number of classes a head answers."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels  # type: ignore[return-value]


def find_head(
    backbone: nn.Module, tap: str | None, num_classes: int, example: Callable[[], Tensor | list[str]] | None = None
) -> tuple[str, nn.Module]:
    """The classifier layer of a network.

    The last linear layer, or 1x1 convolution, that answers the right number of classes. Where several do, an example
    is shown to the network, and the one whose output is the network's answer is taken.

    Args:
        backbone: any classifier.
        tap: dotted name of the layer, where it is not to be searched for.
        num_classes: K.
        example: gives normalised images, or what else the network is given, for networks with several layers of that
            width.

    Returns:
        The layer's name and the layer; one of another width where none has the right one.

    Raises:
        ModelError: no such layer, or several make the answer together.
    """
    layers = {name: module for name, module in backbone.named_modules() if name and is_head(module)}
    if tap is not None:
        if tap not in layers:
            linear = [name for name, module in layers.items() if isinstance(module, nn.Linear)]
            raise ModelError(f"No linear layer {tap!r} in the network. Linear layers: {', '.join(linear) or 'none'}.")
        return tap, layers[tap]
    if "head" in layers and hasattr(backbone, "forward_maps"):
        return "head", layers["head"]
    linear = [name for name, module in layers.items() if isinstance(module, nn.Linear)]
    fitting = [name for name in linear if width(layers[name]) == num_classes]
    if not fitting and layers:
        last = list(layers)[-1]
        if width(layers[last]) == num_classes:
            fitting = [last]
    if not fitting:
        if not linear:
            raise ModelError(
                f"Expected a classifier that ends in a linear layer, got {type(backbone).__name__} without one."
            )
        return linear[-1], layers[linear[-1]]
    if len(fitting) > 1 and example is not None:
        answering = _answering(backbone, {name: layers[name] for name in fitting}, example())
        if not answering:
            raise ModelError(
                f"{type(backbone).__name__} makes its answer from several layers or changes it afterwards; of the "
                f"right width are {', '.join(fitting)}. Name the one whose input is the feature: tap: {fitting[0]} "
                "(teacher.tap, student.tap), or head=... in Python."
            )
        fitting = answering
    return fitting[-1], layers[fitting[-1]]


def as_given(backbone: nn.Module, rows: Tensor) -> Tensor | list[str]:
    """A batch as a backbone takes it: sentences become texts for one whose ``takes_texts`` is true."""
    return decoded(rows) if getattr(backbone, "takes_texts", False) else rows


@torch.compiler.disable
def decoded(rows: Tensor) -> list[str]:
    """The texts of a batch of sentences, uint8 ``(B, L)``."""
    return decode_texts(rows.cpu().numpy())


def answer_of(given: object) -> object:
    """The logits of what a network gave: a tensor, or the ``logits`` of a record that holds them."""
    return getattr(given, "logits", given)


def _answering(backbone: nn.Module, layers: dict[str, nn.Module], images: Tensor | list[str]) -> list[str]:
    """Names of the layers whose output is the network's answer."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            seen[name] = output

        return hook

    modes = {module: module.training for module in backbone.modules()}
    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        backbone.eval()
        with torch.no_grad():
            logits = answer_of(backbone(images))
    except (RuntimeError, ValueError):
        return list(layers)  # it cannot answer such images; a probe will say so better
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if not isinstance(logits, Tensor):
        return []
    return [name for name, out in seen.items() if out.shape == logits.shape and torch.equal(out, logits)]
