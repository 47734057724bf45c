"""Networks, ours and others', with another last layer than their own where asked; rebuilt from plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import ModelError
from ..losses.etf_classifier import ETFHead
from ..losses.ldam import NormedLinear
from ..losses.simkd import ReusedClassifier
from ..rng import derive_seed, forked
from .registry import create_model

HEADS = ("linear", "cosine", "etf")


def assemble(architecture: Mapping[str, Any], *, seed: int | None = None) -> nn.Module:
    """A network from its architecture, as plain data.

    Args:
        architecture: the arguments of :func:`~krdistill.models.create_model` (of another library's network: what
            :func:`~krdistill.models.foreign.create_foreign` left, with ``kind`` where it is not for images), and
            optionally ``head`` (``linear``, ``cosine`` for margins, ``etf`` for fixed anchors), ``tap`` (the name of
            the layer it replaces) and ``reuse``
            (``teacher_dim`` and ``factor`` of a teacher's classifier that takes the head's place).
        seed: of the weights.

    Raises:
        ModelError: an unknown network, head or key.
        MissingDependencyError: the network's library is not installed.
    """
    own = dict(architecture)
    head, tap, reuse = own.pop("head", "linear"), own.pop("tap", "head"), own.pop("reuse", None)
    foreign = ":" in str(own.get("name"))
    known = {"name", "num_classes", "in_channels", "image_size"} | ({"config", "kind"} if foreign else set())
    if set(own) - known or head not in HEADS:
        raise ModelError(f"Expected a network with a head of {', '.join(HEADS)}, got {dict(architecture)!r}.")
    backbone: nn.Module
    if str(own["name"]).startswith("embedding:"):
        from .encoder import EmbeddingClassifier

        with forked(seed or 0, "weights"):
            backbone = EmbeddingClassifier(own["config"], num_classes=int(own["num_classes"]))
    elif str(own["name"]).startswith("hf:") and own.get("kind") == "text":
        from .transformer import rebuild_transformer

        backbone = rebuild_transformer(own, seed=seed)
    elif foreign:
        from .foreign import rebuild_foreign

        backbone = rebuild_foreign(own, seed=seed)
    else:
        backbone = create_model(**own, seed=seed)
    if head != "linear":
        replace_head(backbone, head, tap, seed=seed or 0)
    if reuse is not None:
        teacher_head = nn.Linear(int(reuse["teacher_dim"]), int(own["num_classes"]))
        with forked(seed or 0, "projector"):
            backbone = ReusedClassifier(backbone, teacher_head, factor=int(reuse["factor"]))
    return backbone


def replace_head(backbone: nn.Module, head: str, name: str = "head", *, seed: int = 0) -> None:
    """Puts another last layer in, in place of the linear one of this name: ``cosine`` or ``etf``.

    Raises:
        ModelError: the layer is no linear one.
    """
    parent, _, leaf = name.rpartition(".")
    holder = backbone.get_submodule(parent)
    old = getattr(holder, leaf, None)
    if not isinstance(old, nn.Linear):
        raise ModelError(f"A head of {head!r} takes the place of a linear layer; {name!r} is {type(old).__name__}.")
    new: nn.Module
    if head == "etf":
        new = ETFHead(old.in_features, old.out_features, seed=derive_seed(seed, "anchors") % 2**31)
    else:
        with forked(seed, "head"):
            new = NormedLinear(old.in_features, old.out_features, scale=30.0)
    setattr(holder, leaf, new)
