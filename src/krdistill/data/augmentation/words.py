"""Augmentations of sentences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..._checks import check_number
from ...kinds import MAX_BYTES, Kind
from ...rng import uniform
from .base import Piece

_BLANK = 32
_MOST_WORDS = MAX_BYTES // 2 + 1


@dataclass(frozen=True)
class WordDropout(Piece):
    """Leaves every word of a sentence out with the same probability.

    Word i of a sentence goes where ``u_i < probability``; a sentence that would lose all its words keeps them. A word
    is what stands between blanks.

    Args:
        probability: in [0, 1).
        stream: name of the random stream.

    Source: Iyyer et al., "Deep Unordered Composition Rivals Syntactic Methods for Text Classification", ACL 2015.
    """

    kind: ClassVar[Kind] = "text"

    probability: float = 0.1
    stream: str = "words"

    def __post_init__(self) -> None:
        check_number("probability", self.probability, at_least=0, below=1)

    def apply(self, pixels: Tensor, index: Tensor, *, seed: int, epoch: int) -> Tensor:
        blank, there = pixels == _BLANK, pixels != 0
        word = blank.cumsum(1)  # a blank goes with the word behind it
        drawn = uniform(seed, self.stream, epoch, index, _MOST_WORDS)
        kept = there & (drawn.gather(1, word) >= self.probability)
        kept = torch.where(kept.any(1, keepdim=True), kept, there)
        kept &= ~(blank & (kept.cumsum(1) == 1))  # no blank in front
        order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)
        behind = torch.arange(pixels.shape[1], device=pixels.device) >= kept.sum(1, keepdim=True)
        return pixels.gather(1, order).masked_fill(behind, 0)
