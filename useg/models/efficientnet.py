"""Normalised pixels -> feature maps at strides 2, 4, 8, 16 and 32: the contracting path of EfficientNet-Lite, layer by layer.

EfficientNet (Tan and Le 2019) without squeeze-and-excitation and with ReLU6 for Swish: small, fast, and kind to 8-bit numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from useg.errors import choose
from useg.models.precision import in_fp32

STAGES = ((3, 1, 1), (3, 2, 6), (5, 2, 6), (3, 2, 6), (5, 1, 6), (5, 2, 6), (3, 1, 6))  # kernel, stride, expansion
SIZES = {  # blocks of each stage and their channels
    "lite0": ((1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320)),
    "lite1": ((1, 3, 3, 4, 4, 5, 1), (16, 24, 40, 80, 112, 192, 320)),
    "lite2": ((1, 3, 3, 4, 4, 5, 1), (16, 24, 48, 88, 120, 208, 352)),
}
STEM = 32
EPSILON = 1e-3  # of the batch normalisation with which the ImageNet weights were trained


def pad_same(kernel: int, stride: int) -> nn.Module:
    """Pad as TensorFlow's ``same`` does for an even height and width: with stride 2 one pixel more after than before."""
    before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
    return nn.ZeroPad2d((before, after, before, after))


class InvertedResidual(nn.Module):
    """Widen, filter each channel on its own, narrow (Sandler and others 2018): (N, C, H, W) -> (N, D, H / stride, W / stride)."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        self.expand_conv = nn.Conv2d(channels, hidden, 1, bias=False) if expansion > 1 else None
        self.bn0 = nn.BatchNorm2d(hidden, eps=EPSILON) if expansion > 1 else None
        self.pad = pad_same(kernel, stride) if stride == 2 else None
        self.depthwise_conv = nn.Conv2d(hidden, hidden, kernel, stride, 0 if stride == 2 else kernel // 2, groups=hidden, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden, eps=EPSILON)
        self.project_conv = nn.Conv2d(hidden, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width, eps=EPSILON)
        self.relu = nn.ReLU6(inplace=True)
        self.stride = stride
        self.slow_in_bf16 = kernel == 5 or stride == 2  # on a CPU, and when it learns
        self.residual = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's features."""
        y = x
        if self.expand_conv is not None and self.bn0 is not None:
            y = self.relu(self.bn0(self.expand_conv(y)))  #    (N, hidden, H, W)
        if self.pad is not None:
            y = self.pad(y)
        y = in_fp32(self.depthwise_conv, y) if self.slow_in_bf16 and self.training else self.depthwise_conv(y)
        y = self.relu(self.bn1(y))  #                          (N, hidden, H / stride, W / stride)
        y = self.bn2(self.project_conv(y))  #                  (N, D, H / stride, W / stride)
        out: Tensor = x + y if self.residual else y
        return out


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite up to its last stage, for pictures whose height and width are multiples of 32.

    Args:
        name: ``"lite0"``, ``"lite1"`` or ``"lite2"``.
        channels: bands of the picture.

    Attributes:
        widths: channels of the five feature maps.
        windows: for each feature map the (kernel, stride, padding before) of the layers that lead to it from the one before.

    >>> import torch
    >>> [tuple(level.shape) for level in EfficientNetLite("lite0", 3)(torch.zeros(1, 3, 64, 32))]
    [(1, 16, 32, 16), (1, 24, 16, 8), (1, 40, 8, 4), (1, 112, 4, 2), (1, 320, 2, 1)]
    """

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        repeats, widths = choose("EfficientNet-Lite", name, SIZES)
        self.pad = pad_same(3, 2)
        self.conv_stem = nn.Conv2d(channels, STEM, 3, 2, bias=False)
        self.bn0 = nn.BatchNorm2d(STEM, eps=EPSILON)
        self.relu = nn.ReLU6(inplace=True)
        self.widths: list[int] = []
        self.windows: list[list[tuple[int, int, int]]] = [[(3, 2, 0)]]
        blocks: list[nn.Module] = []
        source = STEM
        for (kernel, stride, expansion), repeat, width in zip(STAGES, repeats, widths, strict=True):
            if stride == 2:
                self.widths.append(source)
                self.windows.append([])
            for step in [stride] + [1] * (repeat - 1):
                blocks.append(InvertedResidual(source, width, kernel, step, expansion))
                self.windows[-1].append((kernel, step, (kernel - step) // 2))
                source = width
        self.widths.append(source)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the feature maps at strides 2, 4, 8, 16 and 32 of normalised pixels (N, C, H, W)."""
        features = []
        x = self.relu(self.bn0(self.conv_stem(self.pad(x))))  #    (N, 32, H / 2, W / 2)
        for block in self.blocks:
            if block.stride == 2:
                features.append(x)
            x = block(x)
        return [*features, x]


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors of a published EfficientNet-Lite file our names, without those of the classifier that we do not have.

    >>> import torch
    >>> list(rename({"_blocks.0._bn1.weight": torch.zeros(1), "_fc.bias": torch.zeros(1)}))
    ['blocks.0.bn1.weight']
    """
    ours = {re.sub(r"(^|\.)_", r"\1", name): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in ours.items() if not name.startswith(("conv_head.", "bn1.", "fc."))}
