"""MobileNetV2 for small images.

Source: Sandler, Howard, Zhu, Zhmoginov, Chen, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018,
arXiv 1801.04381; in the form that the distillation literature uses (RCO, arXiv 1904.09149; CRD, arXiv 1910.10699).
"""

from __future__ import annotations

from torch import Tensor, nn

from .backbone import Backbone, conv_norm

# One row per map size; in it (expansion, channels at width 1, blocks). Every row but the first halves the map.
_ROWS = (((1, 16, 1), (6, 24, 2)), ((6, 32, 3),), ((6, 64, 4), (6, 96, 3)), ((6, 160, 3), (6, 320, 1)))
_LAST = 1280


class MobileNetV2(Backbone):
    """Inverted residual blocks, four map sizes, a last 1x1 convolution to 1280 channels.

    The stem has stride 2, as the published students have it: a 32x32 image gives maps of 16, 8, 4 and 2 pixels, an 8x8
    image ends in 1x1. The maps are the outputs at each size; the last is the one after the 1x1 convolution.

    Args:
        width: factor on all channels but the last 1280.
        in_channels: channels of the image.
        num_classes: K.

    Deviation: against the paper, and with RepDistiller's students: ReLU instead of ReLU6, no dropout, stride 1 in the
    24-channel blocks, and an expansion convolution also where the expansion is 1.
    """

    def __init__(self, *, width: float, in_channels: int, num_classes: int) -> None:
        inside = stem = int(32 * width)
        stages, channels = [], []
        for i, row in enumerate(_ROWS):
            stage: list[nn.Module] = []
            for expansion, full, blocks in row:
                for _ in range(blocks):
                    outside = int(full * width)
                    stage.append(_InvertedResidual(inside, outside, 2 if i > 0 and not stage else 1, expansion))
                    inside = outside
            stages.append(stage)
            channels.append(inside)
        stages[-1].append(conv_norm(inside, _LAST, 1))
        channels[-1] = _LAST
        super().__init__(
            conv_norm(in_channels, stem, 3, stride=2),
            [nn.Sequential(*stage) for stage in stages],
            channels,
            in_channels=in_channels,
            num_classes=num_classes,
        )


class _InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow without an activation; add the input where the shape stays."""

    def __init__(self, inside: int, outside: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inside * expansion
        self.branch = nn.Sequential(
            conv_norm(inside, wide, 1),
            conv_norm(wide, wide, 3, stride=stride, groups=wide),
            conv_norm(wide, outside, 1, relu=False),
        )
        self.same = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x) if self.same else self.branch(x)
