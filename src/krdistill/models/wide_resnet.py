"""Wide residual networks.

Source: Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016, arXiv 1605.07146.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import Backbone


class WideResNet(Backbone):
    """A pre-activation residual network of depth 6n + 4 and widths 16k, 32k, 64k after a stem of 16 channels.

    The maps are the outputs of the three stages. The first two are sums that no ReLU has seen yet; the last is after
    the final normalisation and ReLU, as it is pooled.

    Args:
        blocks: n, residual blocks per stage.
        widen: k.
        in_channels: channels of the image.
        num_classes: K.

    Deviation: no dropout, as in the distillation literature (CRD, arXiv 1910.10699).
    """

    def __init__(self, *, blocks: int, widen: int, in_channels: int, num_classes: int) -> None:
        stages, channels, inside = [], [16 * widen, 32 * widen, 64 * widen], 16
        for i, width in enumerate(channels):
            stage: list[nn.Module] = []
            for j in range(blocks):
                stage.append(_PreActivation(inside, width, 2 if i > 0 and j == 0 else 1))
                inside = width
            stages.append(stage)
        stages[-1] += [nn.BatchNorm2d(inside), nn.ReLU(inplace=True)]
        super().__init__(
            nn.Conv2d(in_channels, 16, 3, padding=1, bias=False),
            [nn.Sequential(*stage) for stage in stages],
            channels,
            in_channels=in_channels,
            num_classes=num_classes,
        )


class _PreActivation(nn.Module):
    """x + branch(relu(norm(x))); where the shape changes, a 1x1 convolution of the activated input stands for x."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inside)
        self.branch = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(inplace=True),
            nn.Conv2d(outside, outside, 3, padding=1, bias=False),
        )
        same = stride == 1 and inside == outside
        self.shortcut = None if same else nn.Conv2d(inside, outside, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm(x), inplace=True)
        return self.branch(active) + (x if self.shortcut is None else self.shortcut(active))
