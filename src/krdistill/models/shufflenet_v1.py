"""ShuffleNet (V1) for small images.

Source: Zhang, Zhou, Lin, Sun, "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices",
CVPR 2018, arXiv 1707.01083; in the form that the distillation literature uses (CRD, arXiv 1910.10699).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import Backbone, conv_norm

_STEM = 24


class ShuffleNetV1(Backbone):
    """Grouped 1x1 convolutions with the channels shuffled in between; three stages that each halve the map.

    A 32x32 image gives maps of 16, 8 and 4 pixels, an 8x8 image ends in 1x1. The maps are the outputs of the stages.

    Args:
        blocks: units per stage.
        widths: channels per stage.
        groups: of the 1x1 convolutions; the very first is not grouped.
        in_channels: channels of the image.
        num_classes: K.

    Deviation: against the paper, and with RepDistiller's students: a 1x1, stride 1 stem, no max pool, and a ReLU after
    the 3x3 convolution of each unit.
    """

    def __init__(
        self, *, blocks: Sequence[int], widths: Sequence[int], groups: int, in_channels: int, num_classes: int
    ) -> None:
        stages, inside = [], _STEM
        for count, width in zip(blocks, widths, strict=True):
            stage = []
            for j in range(count):
                stage.append(_Unit(inside, width, groups, first=inside == _STEM, down=j == 0))
                inside = width
            stages.append(nn.Sequential(*stage))
        super().__init__(
            conv_norm(in_channels, _STEM, 1), stages, widths, in_channels=in_channels, num_classes=num_classes
        )


class _Unit(nn.Module):
    """A bottleneck of a quarter of the channels; halving units append the pooled input instead of adding it."""

    def __init__(self, inside: int, outside: int, groups: int, *, first: bool, down: bool) -> None:
        super().__init__()
        made = outside - inside if down else outside
        middle = made // 4
        self.groups = 1 if first else groups
        self.squeeze = conv_norm(inside, middle, 1, groups=self.groups)
        self.expand = nn.Sequential(
            conv_norm(middle, middle, 3, stride=2 if down else 1, groups=middle),
            conv_norm(middle, made, 1, groups=groups, relu=False),
        )
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if down else None

    def forward(self, x: Tensor) -> Tensor:
        made = self.expand(shuffle_channels(self.squeeze(x), self.groups))
        return F.relu(made + x if self.pool is None else torch.cat((made, self.pool(x)), 1))


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Deals the channels of each group out to all groups: channel ``i`` of group ``g`` becomes ``i * groups + g``.

    Args:
        x: shape ``(B, C, H, W)``, C divisible by ``groups``.
        groups: how many.

    Returns:
        Shape ``(B, C, H, W)``, in the memory format of ``x``.
    """
    if groups == 1:
        return x
    if x.is_contiguous(memory_format=torch.channels_last):  # else the copy below would leave that format
        parts = x.permute(0, 2, 3, 1).unflatten(3, (groups, -1))
        return parts.transpose(3, 4).flatten(3, 4).permute(0, 3, 1, 2)
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)
