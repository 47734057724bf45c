"""The teacher's one door: frozen, with its own normalisation, feature tap and class order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..outputs import Outputs
from .ensemble import class_order as class_order
from .network import Network


class Teacher(nn.Module):
    """A frozen network that answers in the class order of the data.

    Args:
        network: the trained network.
        class_names: the data's class names. The same names in another order are remapped; other names are refused.

    Raises:
        ModelError: the teacher's classes are not the data's.
    """

    order: Tensor

    def __init__(self, network: Network, *, class_names: Sequence[str]) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        order = class_order(network.class_names, class_names)
        self.identity = order == list(range(len(order)))
        self.register_buffer("order", torch.tensor(order))

    @property
    def feature_dim(self) -> int:
        return self.network.feature_dim

    def train(self, mode: bool = True) -> Teacher:
        """A teacher stays in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor, *, maps: bool = False) -> Outputs:
        """Answers a batch without keeping a graph; the result can be used in a loss."""
        with torch.inference_mode():
            logits, feature, stages = self.network(images, maps=maps)
            if not self.identity:
                logits = logits[:, self.order]
        # Tensors made in inference mode cannot be saved for a backward pass; a copy of these small ones can.
        return Outputs(logits.clone(), feature.clone(), tuple(m.clone() for m in stages))
