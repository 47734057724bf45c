"""Several networks that answer as one teacher, each for the classes it knows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..outputs import Outputs
from .network import Network


class Experts(nn.Module):
    """Frozen experts; every expert's logits stand in the columns of its classes, 0 stands in the others.

    Args:
        networks: the experts.
        members: class indices of each, in the order of its logits.
        num_classes: K.

    Raises:
        ModelError: no expert, or one whose width is not the number of its classes.
    """

    def __init__(self, networks: Sequence[Network], members: Sequence[Tensor], num_classes: int) -> None:
        super().__init__()
        if not networks or any(n.num_classes != len(m) for n, m in zip(networks, members, strict=True)):
            raise ModelError("Expected at least one expert, each with one logit per class of its group.")
        self.networks = nn.ModuleList(networks)
        self.eval().requires_grad_(False)
        self.num_classes = num_classes
        for i, classes in enumerate(members):
            self.register_buffer(f"members_{i}", classes.clone())

    def train(self, mode: bool = True) -> Experts:
        """Experts stay in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor, *, maps: bool = False) -> Outputs:
        """Logits ``(B, K)`` of images ``(B, C, H, W)``; there is no common feature, its width is 0."""
        if maps:
            raise ModelError("Experts have no common stages.")
        logits = torch.zeros(len(images), self.num_classes, device=images.device)
        with torch.inference_mode():
            answers = [network(images).logits.float() for network in self.networks]
        for i, answer in enumerate(answers):
            logits[:, self.get_buffer(f"members_{i}")] = answer
        return Outputs(logits, logits.new_zeros(len(images), 0))
