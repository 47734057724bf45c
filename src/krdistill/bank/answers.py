"""What stands in for a teacher that is not asked: its answers, by epoch and row."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..outputs import Outputs


class Answers(ABC):
    """Stored answers to the training images.

    Attributes:
        feature_dim: width D of the features; 0 where there are none.
    """

    feature_dim: int

    @abstractmethod
    def replay(self, epoch: int) -> tuple[int, int] | None:
        """The (seed, view) that an epoch's images must show for its answers to be about them.

        None: the answers are about the images as they are, and the student may see any view.
        """

    @abstractmethod
    def read(self, epoch: int, index: Tensor, device: torch.device) -> Outputs:
        """The answers of an epoch to the images at these rows ``(B,)``: logits ``(B, K)``, features ``(B, D)``."""
