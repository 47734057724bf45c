"""The teacher's one door: frozen, with its own normalisation, feature tap and class order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..outputs import Outputs
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


def class_order(theirs: Sequence[str], ours: Sequence[str]) -> list[int]:
    """For each of our classes, the position of the same class among theirs.

    Raises:
        ModelError: the two sets of names differ.
    """
    if len(theirs) != len(ours):
        raise ModelError(
            f"The teacher knows {len(theirs)} classes, the data have {len(ours)}. "
            "Give a teacher that was trained on the data's classes."
        )
    position = {name: i for i, name in enumerate(theirs)}
    lost = [name for name in ours if name not in position]
    if lost:
        raise ModelError(
            f"{len(lost)} of the data's {len(ours)} classes are unknown to the teacher: "
            f"{', '.join(map(repr, lost[:5]))}{' ...' if len(lost) > 5 else ''}. "
            f"Its own are {', '.join(map(repr, list(theirs)[:5]))}{' ...' if len(theirs) > 5 else ''}."
        )
    return [position[name] for name in ours]
