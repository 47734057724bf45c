"""ShuffleNetV2 for small images.

Source: Ma, Zhang, Zheng, Sun, "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", ECCV 2018,
arXiv 1807.11164; in the form that the distillation literature uses (CRD, arXiv 1910.10699).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .backbone import Backbone, conv_norm
from .shufflenet_v1 import shuffle_channels

_STEM = 24


class ShuffleNetV2(Backbone):
    """Units that leave half of the channels alone and shuffle the halves; three stages that each halve the map.

    A 32x32 image gives maps of 16, 8 and 4 pixels, an 8x8 image ends in 1x1. The maps are the outputs of the stages;
    the last is the one after the last 1x1 convolution.

    Args:
        blocks: units per stage, the halving one included.
        widths: channels per stage.
        last: channels of the last 1x1 convolution.
        in_channels: channels of the image.
        num_classes: K.

    Deviation: against the paper, and with RepDistiller's students: a 1x1, stride 1 stem and no max pool.
    """

    def __init__(
        self, *, blocks: Sequence[int], widths: Sequence[int], last: int, in_channels: int, num_classes: int
    ) -> None:
        stages, inside = [], _STEM
        for count, width in zip(blocks, widths, strict=True):
            stages.append([_Down(inside, width), *(_Unit(width) for _ in range(count - 1))])
            inside = width
        stages[-1].append(conv_norm(inside, last, 1))
        super().__init__(
            conv_norm(in_channels, _STEM, 1),
            [nn.Sequential(*stage) for stage in stages],
            [*widths[:-1], last],
            in_channels=in_channels,
            num_classes=num_classes,
        )


class _Unit(nn.Module):
    """One half passes, the other goes through 1x1, 3x3 per channel, 1x1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = _branch(half, half, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept, worked = x.chunk(2, 1)
        return shuffle_channels(torch.cat((kept, self.branch(worked)), 1), 2)


class _Down(nn.Module):
    """Halves the map: both branches see all channels and give half of the output each."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        half = outside // 2
        self.left = nn.Sequential(
            conv_norm(inside, inside, 3, stride=2, groups=inside, relu=False), conv_norm(inside, half, 1)
        )
        self.right = _branch(inside, half, 2)

    def forward(self, x: Tensor) -> Tensor:
        return shuffle_channels(torch.cat((self.left(x), self.right(x)), 1), 2)


def _branch(inside: int, outside: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        conv_norm(inside, outside, 1),
        conv_norm(outside, outside, 3, stride=stride, groups=outside, relu=False),
        conv_norm(outside, outside, 1),
    )
