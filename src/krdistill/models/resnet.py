"""Residual networks.

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import Backbone, conv_norm


class ResNet(Backbone):
    """A residual network with the 3x3, stride 1 stem for small images.

    Two of the paper's designs are told apart by their arguments: the CIFAR design with depth 6n + 2 (three stages of n
    basic blocks, widths 16, 32, 64), and the ImageNet design (four stages, widths 64 to 512), here without its 7x7 stem
    and its pooling. Every stage but the first halves the map. The maps are the outputs of the stages, after their ReLU.

    Args:
        blocks: residual blocks per stage.
        widths: channels per stage; a bottleneck puts out four times as many.
        stem: channels of the stem.
        bottleneck: blocks of 1x1, 3x3, 1x1 convolutions instead of two 3x3; the 3x3 one carries the stride.
        in_channels: channels of the image.
        num_classes: K.

    Deviation: the paper's CIFAR networks widen with zeros (its option A); as in the distillation literature (CRD,
    arXiv 1910.10699, and its successors) a 1x1 convolution does it here (option B).
    """

    def __init__(
        self,
        *,
        blocks: Sequence[int],
        widths: Sequence[int],
        stem: int,
        bottleneck: bool = False,
        in_channels: int,
        num_classes: int,
    ) -> None:
        expansion = 4 if bottleneck else 1
        stages, channels, inside = [], [width * expansion for width in widths], stem
        for i, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            stage = []
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(_Residual(inside, width, channels[i], stride, bottleneck))
                inside = channels[i]
            stages.append(nn.Sequential(*stage))
        super().__init__(
            conv_norm(in_channels, stem, 3), stages, channels, in_channels=in_channels, num_classes=num_classes
        )


class _Residual(nn.Module):
    """relu(branch(x) + shortcut(x)); the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, inside: int, width: int, outside: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        if bottleneck:
            self.branch = nn.Sequential(
                conv_norm(inside, width, 1),
                conv_norm(width, width, 3, stride=stride),
                conv_norm(width, outside, 1, relu=False),
            )
        else:
            self.branch = nn.Sequential(
                conv_norm(inside, width, 3, stride=stride), conv_norm(width, outside, 3, relu=False)
            )
        same = stride == 1 and inside == outside
        self.shortcut = nn.Identity() if same else conv_norm(inside, outside, 1, stride=stride, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))
