"""The contracting path of a ResNet: normalised pixels to features at strides 2, 4, 8, 16 and 32.

He, Zhang, Ren and Sun (2015), with the stride in the 3x3 convolution. The layers have the names of
torchvision, so its weight files load.
"""

from __future__ import annotations

from torch import Tensor, nn

from useg.errors import choose

# Whether the blocks are bottlenecks, and the number of blocks of each stage.
RESNET_SIZES: dict[str, tuple[bool, tuple[int, int, int, int]]] = {
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet34": (False, (3, 4, 6, 3)),
    "resnet50": (True, (3, 4, 6, 3)),
}


def shortcut(channels: int, width: int, stride: int) -> nn.Sequential | None:
    """Make the projection of a block's input where its shape differs from the output, else None."""
    if stride == 1 and channels == width:
        return None
    return nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection.

    (N, C, H, W) -> (N, width, H / stride, W / stride).
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the features of the block."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        x = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(y + x)
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a residual connection.

    (N, C, H, W) -> (N, 4 * width, H / stride, W / stride).
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(channels, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the features of the block."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        x = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(y + x)
        return out


def stage(bottleneck: bool, channels: int, width: int, repeat: int, stride: int) -> nn.Sequential:
    """Make ``repeat`` blocks in sequence; the first takes ``channels`` and has the stride."""
    if bottleneck:
        return nn.Sequential(
            Bottleneck(channels, width, stride),
            *(Bottleneck(4 * width, width, 1) for _ in range(repeat - 1)),
        )
    return nn.Sequential(
        BasicBlock(channels, width, stride),
        *(BasicBlock(width, width, 1) for _ in range(repeat - 1)),
    )


class ResNet(nn.Module):
    """ResNet without its classifier, for images whose height and width are multiples of 32.

    Args:
        name: ``"resnet18"``, ``"resnet34"`` or ``"resnet50"``.
        channels: number of bands of the image.

    Attributes:
        widths: numbers of channels of the five feature maps.
        windows: for each feature map, the (kernel, stride, padding before) of the layers that
            compute it from the previous one.

    >>> import torch
    >>> [tuple(level.shape) for level in ResNet("resnet18", 3)(torch.zeros(1, 3, 64, 32))]
    [(1, 64, 32, 16), (1, 64, 16, 8), (1, 128, 8, 4), (1, 256, 4, 2), (1, 512, 2, 1)]
    """

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        bottleneck, repeats = choose("ResNet", name, RESNET_SIZES)
        wide = 4 if bottleneck else 1
        self.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = stage(bottleneck, 64, 64, repeats[0], 1)
        self.layer2 = stage(bottleneck, 64 * wide, 128, repeats[1], 2)
        self.layer3 = stage(bottleneck, 128 * wide, 256, repeats[2], 2)
        self.layer4 = stage(bottleneck, 256 * wide, 512, repeats[3], 2)
        self.widths = [64, 64 * wide, 128 * wide, 256 * wide, 512 * wide]
        self.windows: list[list[tuple[int, int, int]]] = [[(7, 2, 3)], [(3, 2, 1)], [], [], []]
        for windows, repeat, stride in zip(self.windows[1:], repeats, (1, 2, 2, 2), strict=True):
            windows += [(3, stride, 1)] + [(3, 1, 1)] * (repeat * (1 if bottleneck else 2) - 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute the features of normalised pixels (N, C, H, W) at strides 2, 4, 8, 16 and 32."""
        features = [self.relu(self.bn1(self.conv1(x)))]  #    (N, 64, H / 2, W / 2)
        x = self.maxpool(features[-1])  #                     (N, 64, H / 4, W / 4)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            features.append(x)
        return features
