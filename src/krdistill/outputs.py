"""What networks give and what objectives give: small records that every floor shares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


class Outputs(NamedTuple):
    """What a network says of a batch.

    Attributes:
        logits: shape ``(B, K)``.
        feature: the input of the last linear layer, shape ``(B, D)``.
        maps: the output of every stage ``(B, C_i, H_i, W_i)``, the deepest last; empty where nobody asked.
    """

    logits: Tensor
    feature: Tensor
    maps: tuple[Tensor, ...] = ()


class Step(NamedTuple):
    """What the terms of an objective may look at.

    Attributes:
        student: the student's outputs.
        labels: shape ``(B,)``.
        teacher: the teacher's outputs, or None.
        rows: numbers of the training images, shape ``(B,)``, or None outside a training set.
        progress: share of the training that is done, in [0, 1).
    """

    student: Outputs
    labels: Tensor
    teacher: Outputs | None = None
    rows: Tensor | None = None
    progress: float = 0.0


@dataclass(frozen=True)
class LossTerms:
    """Named, weighted, per-sample loss terms.

    Attributes:
        terms: name to a tensor of shape ``(B,)``, the term's weight already in it.
        stats: name to a per-sample statistic of shape ``(B,)`` that is logged but not trained on, such as whether
            error correction fired.
    """

    terms: dict[str, Tensor]
    stats: dict[str, Tensor] = field(default_factory=dict)

    def total(self) -> Tensor:
        """Sum over the terms, per sample, shape ``(B,)``."""
        return sum(self.terms.values(), start=next(iter(self.terms.values())).new_zeros(()))

    def mixed(self, other: LossTerms, share: Tensor | float) -> LossTerms:
        """``share`` of these terms plus ``1 - share`` of the other's: the loss of a mixed label (mixup)."""
        return LossTerms(
            {k: share * v + (1 - share) * other.terms[k] for k, v in self.terms.items()},
            self.stats,
        )
