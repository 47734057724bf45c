"""VGG networks for small images.

Source: Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015,
arXiv 1409.1556; in the form that the distillation literature uses (CRD, arXiv 1910.10699).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .backbone import Backbone


class VGG(Backbone):
    """Five stages of 3x3 convolutions with batch normalisation; one linear layer instead of three.

    Halving max pools stand before the second, third and fourth stage, so that a 32x32 image ends in 4x4 maps and an 8x8
    image in 1x1; the last pool of the paper is the global average. The maps are the outputs of the stages, after ReLU.
    The convolutions keep their biases although a normalisation follows, as the published parameter counts have them.

    Args:
        widths: channels of every convolution, one row per stage.
        in_channels: channels of the image.
        num_classes: K.

    Deviation: RepDistiller inserts a fourth max pool for inputs of exactly 64x64; here the layers do not depend on the
    image size.
    """

    def __init__(self, *, widths: Sequence[Sequence[int]], in_channels: int, num_classes: int) -> None:
        stages, inside = [], in_channels
        for i, row in enumerate(widths):
            stage: list[nn.Module] = [nn.MaxPool2d(2)] if i in (1, 2, 3) else []
            for width in row:
                stage += [nn.Conv2d(inside, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                inside = width
            stages.append(nn.Sequential(*stage))
        super().__init__(
            nn.Identity(), stages, [row[-1] for row in widths], in_channels=in_channels, num_classes=num_classes
        )
