"""A plain multi-layer perceptron, for vectors and for very small images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from ..errors import ModelError
from .backbone import Backbone


class MLP(Backbone):
    """Linear layers with ReLU on the flattened input.

    Its maps are the hidden layers, each as a map of one pixel, so that methods that work on maps take it as it is. It
    answers vectors ``(B, D)`` too: make it with ``in_channels=D, image_size=1``.

    Args:
        hidden: width of every hidden layer; with none, the feature is the input, and the network a linear classifier.
        in_channels: channels of the image.
        image_size: height and width of the image; unlike a convolutional network it takes no other.
        num_classes: K.

    Source: Rumelhart, Hinton, Williams, "Learning representations by back-propagating errors", Nature 1986; ReLU: Nair,
    Hinton, "Rectified Linear Units Improve Restricted Boltzmann Machines", ICML 2010.
    """

    def __init__(self, *, hidden: Sequence[int], in_channels: int, image_size: int, num_classes: int) -> None:
        in_features = in_channels * image_size**2
        stages = [
            nn.Sequential(nn.Linear(inside, outside), nn.ReLU(inplace=True))
            for inside, outside in pairwise((in_features, *hidden))
        ]
        super().__init__(
            nn.Flatten(), stages, hidden or [in_features], in_channels=in_channels, num_classes=num_classes
        )
        self.in_features = in_features

    def forward_maps(self, x: Tensor) -> tuple[Tensor, ...]:
        """The hidden layers of images ``(B, C, H, W)`` or vectors ``(B, D)``, each ``(B, hidden[i], 1, 1)``.

        Raises:
            ModelError: as many numbers per row as the network was made for are expected.
        """
        flat = self.stem(x)
        if flat.shape[1] != self.in_features:
            raise ModelError(f"Expected {self.in_features} numbers per image, got {tuple(x.shape)}.")
        maps = [] if self.stages else [flat[:, :, None, None]]
        for stage in self.stages:
            flat = stage(flat)
            maps.append(flat[:, :, None, None])
        return tuple(maps)
