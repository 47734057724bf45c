"""Several networks that answer as one, and whose classes stand in which order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError


class Ensemble(nn.Module):
    r"""Frozen networks that answer together, as the backbone of one :class:`~krdistill.models.network.Network`.

    .. math:: z = \log \frac{1}{M} \sum_m \operatorname{softmax}(z_m), \qquad f = (f_1, \dots, f_M)

    The mean of the predicted probabilities, in log space. What a rectifier does to it later (taking a prior off is one
    shift of all logits) is done once to this answer, and not to every member's.

    Args:
        networks: M networks for the same classes and images; each brings its own normalisation.

    Raises:
        ModelError: fewer than two, or networks of other classes, image sizes or channels than the first's.
    """

    def __init__(self, networks: Sequence[Any]) -> None:
        super().__init__()
        if len(networks) < 2:
            raise ModelError(f"Expected at least two networks to answer together, got {len(networks)}.")
        first = networks[0]
        orders = []
        for i, network in enumerate(networks):
            if network.kind != first.kind:
                raise ModelError(
                    f"Networks that answer together must take the same examples: the first takes {first.takes_words}, "
                    f"number {i + 1} {network.takes_words}."
                )
            shapes = [(n.image_size, n.channels) for n in (first, network)]
            if shapes[0] != shapes[1]:
                (own, channels), (other, others) = shapes
                raise ModelError(
                    f"Networks that answer together must take the same images: the first takes {own[0]}x{own[1]} with "
                    f"{channels} channel(s), number {i + 1} {other[0]}x{other[1]} with {others}."
                )
            orders.append(torch.tensor(class_order(network.class_names, first.class_names)))
        self.networks = nn.ModuleList(networks)
        for i, order in enumerate(orders):
            self.register_buffer(f"order_{i}", order)
        self.num_classes = int(first.num_classes)
        self.feature_dim = sum(network.feature_dim for network in networks)
        self.has_feature = all(network.has_feature for network in networks)
        self.parameter_count = sum(network.parameter_count for network in networks)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Ensemble:
        """The members stay in evaluation mode."""
        return super().train(False)

    def answer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(B, K)`` in the first network's class order, and all features side by side ``(B, D_1 + ... + D_M)``.

        Args:
            images: float in [0, 1], shape ``(B, C, H, W)``.
        """
        answers = [network(images) for network in self.networks]
        logs = [a.logits.float().log_softmax(1)[:, self.get_buffer(f"order_{i}")] for i, a in enumerate(answers)]
        logits = torch.stack(logs).logsumexp(0) - math.log(len(logs))
        return logits, torch.cat([a.feature for a in answers], 1)


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
