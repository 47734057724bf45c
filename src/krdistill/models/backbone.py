"""What every network of ours is: a stem, a few stages, global average pooling and a linear head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..errors import ModelError


class Backbone(nn.Module):
    """A classifier that can be asked at three depths, each built on the one before.

    ``forward_maps`` gives the output of every stage, ``forward_features`` pools the last of them, ``forward`` puts the
    head on that. All stages are padded, so that any image of at least 8x8 pixels works, also one whose last maps are
    1x1. Nothing depends on the image size but the size of the maps.

    Weights: convolutions from a normal distribution with variance 2 / fan_out (He et al., "Delving Deep into
    Rectifiers", 2015, arXiv 1502.01852), where fan_out is kernel area times output channels, for grouped convolutions
    too; hidden linear layers with 2 / fan_in; their biases 0; normalisation layers scale 1 and shift 0, those that end
    a residual branch too; the head as :class:`torch.nn.Linear` draws it, uniform in +-1/sqrt(D).

    Deviation: one rule for all families. RepDistiller draws the heads of VGG and MobileNetV2 from N(0, 0.01) and leaves
    the convolutions of the ShuffleNets as :class:`torch.nn.Conv2d` draws them.

    Args:
        stem: from the image to the input of the first stage.
        stages: modules that run one after the other.
        map_channels: channels of each stage's output.
        in_channels: channels of the image.
        num_classes: K.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        map_channels: Sequence[int],
        *,
        in_channels: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.map_channels = tuple(map_channels)
        self.feature_dim = self.map_channels[-1]
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.head = nn.Linear(self.feature_dim, num_classes)
        for module in (*self.stem.modules(), *self.stages.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            else:
                continue
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward_maps(self, x: Tensor) -> tuple[Tensor, ...]:
        """The output of every stage.

        Args:
            x: images, shape ``(B, C, H, W)``, floating point.

        Returns:
            One map ``(B, map_channels[i], H_i, W_i)`` per stage, the deepest last: the one that is pooled.

        Raises:
            ModelError: not a batch of images with the network's channels.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ModelError(f"Expected images of shape (B, {self.in_channels}, H, W), got {tuple(x.shape)}.")
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return tuple(maps)

    def pool(self, deepest: Tensor) -> Tensor:
        """The feature ``(B, D)`` of the last map ``(B, D, H, W)``: its mean over positions."""
        return deepest.mean((2, 3))

    def forward_features(self, x: Tensor) -> Tensor:
        """The pooled feature ``(B, D)`` of images ``(B, C, H, W)``; ``head`` turns it into the logits."""
        return self.pool(self.forward_maps(x)[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, K)`` of images ``(B, C, H, W)``."""
        return self.head(self.forward_features(x))


def conv_norm(
    inside: int, outside: int, kernel: int, *, stride: int = 1, groups: int = 1, relu: bool = True
) -> nn.Sequential:
    """A padded convolution without bias, batch normalisation and, unless told otherwise, ReLU."""
    layers: list[nn.Module] = [
        nn.Conv2d(inside, outside, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outside),
    ]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if relu else nn.Sequential(*layers)
