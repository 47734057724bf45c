"""Networks of ours with another last layer than the family's own, rebuilt from plain data."""

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
        architecture: the arguments of :func:`~krdistill.models.create_model`, and optionally ``head`` (``linear``,
            ``cosine`` for margins, ``etf`` for fixed anchors) and ``reuse`` (``teacher_dim`` and ``factor`` of a
            teacher's classifier that takes the head's place).
        seed: of the weights.

    Raises:
        ModelError: an unknown network, head or key.
    """
    own = dict(architecture)
    head, reuse = own.pop("head", "linear"), own.pop("reuse", None)
    unknown = set(own) - {"name", "num_classes", "in_channels", "image_size"}
    if unknown or head not in HEADS:
        raise ModelError(f"Expected a network with a head of {', '.join(HEADS)}, got {dict(architecture)!r}.")
    backbone: nn.Module = create_model(**own, seed=seed)
    if head != "linear":
        replace_head(backbone, head, seed=seed or 0)
    if reuse is not None:
        teacher_head = nn.Linear(int(reuse["teacher_dim"]), int(own["num_classes"]))
        with forked(seed or 0, "projector"):
            backbone = ReusedClassifier(backbone, teacher_head, factor=int(reuse["factor"]))
    return backbone


def replace_head(backbone: nn.Module, head: str, *, seed: int = 0) -> None:
    """Puts another last layer in, in place: ``cosine`` or ``etf``."""
    old = backbone.head
    assert isinstance(old, nn.Linear)
    if head == "etf":
        backbone.head = ETFHead(old.in_features, old.out_features, seed=derive_seed(seed, "anchors") % 2**31)
        return
    with forked(seed, "head"):
        backbone.head = NormedLinear(old.in_features, old.out_features, scale=30.0)
