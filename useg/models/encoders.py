"""A U-Net whose contracting path is pretrained on ImageNet: EfficientNet-Lite or ResNet.

Normalised images in, logits out. Building the network and loading its ImageNet weights are
separate steps: a trained model is read from its own file and needs no package of weights.

EfficientNet-Lite is EfficientNet (Tan and Le 2019) without squeeze-and-excitation and with ReLU6
for Swish, which makes it small, fast and easy to quantise to 8 bits.

ResNet (He, Zhang, Ren and Sun 2015) has its stride in the 3x3 convolution. Its layers have
torchvision's names, so torchvision's weight files load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import interpolate

from useg.errors import choose
from useg.models.baselines import FIXED_SETTINGS
from useg.models.geometry import next_multiple
from useg.models.kernels import (
    Block,
    Level,
    compute_blocks,
    compute_levels,
    convolve_repeated,
    filter_normalized,
)
from useg.models.unet import (
    DoubleConv,
    Dropout,
    check_input_size,
    concatenate,
    convolve_depthwise,
    in_fp32,
    initialize,
    network_settings,
    normalize,
)

# Kernel, stride and expansion of the blocks of each stage.
LITE_STAGES = (
    (3, 1, 1),
    (3, 2, 6),
    (5, 2, 6),
    (3, 2, 6),
    (5, 1, 6),
    (5, 2, 6),
    (3, 1, 6),
)
# Number of blocks of each stage, and their channels.
LITE_SIZES = {
    "lite0": ((1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320)),
    "lite1": ((1, 3, 3, 4, 4, 5, 1), (16, 24, 40, 80, 112, 192, 320)),
    "lite2": ((1, 3, 3, 4, 4, 5, 1), (16, 24, 48, 88, 120, 208, 352)),
}


LITE_STEM_CHANNELS = 32
# Of the batch normalisation with which the ImageNet weights were trained.
LITE_EPSILON = 1e-3

# Feature maps at strides 2, 4, 8, 16 and 32.
LEVELS = 5
STRIDE = 32


# Whether the blocks are bottlenecks, and the number of blocks of each stage.
RESNET_SIZES: dict[str, tuple[bool, tuple[int, int, int, int]]] = {
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet34": (False, (3, 4, 6, 3)),
    "resnet50": (True, (3, 4, 6, 3)),
}


def pad_same(kernel: int, stride: int) -> nn.Module:
    """Pad as TensorFlow's ``same`` does for an even height and width.

    With stride 2 there is one pixel more after the image than before it.
    """
    before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
    return nn.ZeroPad2d((before, after, before, after))


class InvertedResidual(nn.Module):
    """Expand, depthwise convolution, project (Sandler and others 2018).

    (N, C, H, W) -> (N, D, H / stride, W / stride).
    """

    def __init__(self, channels: int, width: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        self.expand_conv = nn.Conv2d(channels, hidden, 1, bias=False) if expansion > 1 else None
        self.bn0 = nn.BatchNorm2d(hidden, eps=LITE_EPSILON) if expansion > 1 else None
        self.pad = pad_same(kernel, stride) if stride == 2 else None
        padding = 0 if stride == 2 else kernel // 2
        self.depthwise_conv = nn.Conv2d(
            hidden, hidden, kernel, stride, padding, groups=hidden, bias=False
        )
        self.bn1 = nn.BatchNorm2d(hidden, eps=LITE_EPSILON)
        self.project_conv = nn.Conv2d(hidden, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width, eps=LITE_EPSILON)
        self.relu = nn.ReLU6(inplace=True)
        self.stride, self.residual = stride, stride == 1 and channels == width
        # In training, on a CPU.
        self.slow_in_bf16 = kernel == 5 or stride == 2

    def forward(self, x: Tensor) -> Tensor:
        """Compute the features of the block."""
        y = x if self.expand_conv is None else self.expand_conv(x)  #      (N, hidden, H, W)
        y = self.filter(y)  #                              (N, hidden, H / stride, W / stride)
        return normalize(self.bn2, None, self.project_conv(y), x if self.residual else None)

    def filter(self, x: Tensor) -> Tensor:
        """Apply the depthwise convolution, and the normalisations before and after it."""
        conv = self.depthwise_conv
        norms = self.bn0, self.bn1
        if self.training and (y := filter_normalized(norms, conv, self.relu, x)) is not None:
            return y
        if self.bn0 is not None:
            x = normalize(self.bn0, self.relu, x)
        y = filter_normalized((None, None), conv, self.relu, x) if self.training else None
        if y is None:
            if self.pad is not None:
                x = self.pad(x)
            is_slow = self.slow_in_bf16 and self.training and x.device.type == "cpu"
            y = in_fp32(conv, x) if is_slow else convolve_depthwise(conv, x)
        return normalize(self.bn1, self.relu, y)


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite without its classifier, for sizes that are multiples of 32.

    Args:
        name: ``"lite0"``, ``"lite1"`` or ``"lite2"``.
        channels: number of bands of the image.

    Attributes:
        widths: numbers of channels of the five feature maps.
        windows: for each feature map, the (kernel, stride, padding before) of the layers that
            compute it from the previous one.

    >>> import torch
    >>> [tuple(level.shape) for level in EfficientNetLite("lite0", 3)(torch.zeros(1, 3, 64, 32))]
    [(1, 16, 32, 16), (1, 24, 16, 8), (1, 40, 8, 4), (1, 112, 4, 2), (1, 320, 2, 1)]
    """

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        repeats, widths = choose("EfficientNet-Lite", name, LITE_SIZES)
        self.pad = pad_same(3, 2)
        self.conv_stem = nn.Conv2d(channels, LITE_STEM_CHANNELS, 3, 2, bias=False)
        self.bn0 = nn.BatchNorm2d(LITE_STEM_CHANNELS, eps=LITE_EPSILON)
        self.relu = nn.ReLU6(inplace=True)
        self.widths: list[int] = []
        self.windows: list[list[tuple[int, int, int]]] = [[(3, 2, 0)]]
        blocks: list[nn.Module] = []
        source = LITE_STEM_CHANNELS
        for (kernel, stride, expansion), repeat, width in zip(
            LITE_STAGES, repeats, widths, strict=True
        ):
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
        """Compute the features of normalised pixels (N, C, H, W) at strides 2, 4, 8, 16 and 32."""
        x = normalize(self.bn0, self.relu, self.conv_stem(self.pad(x)))  #    (N, 32, H / 2, W / 2)
        compiled = compute_together(self.blocks, x) if self.training else None
        if compiled is not None:
            return [*compiled]
        features = []
        for block in self.blocks:
            if block.stride == 2:
                features.append(x)
            x = block(x)
        return [*features, x]


def compute_together(blocks: Iterable[nn.Module], x: Tensor) -> tuple[Tensor, ...] | None:
    """Compute all blocks in one compiled layer.

    Args:
        blocks: Those of an :class:`EfficientNetLite`.
        x: (N, C, H, W).

    Returns:
        The features before each block with stride 2, and the last; None if PyTorch has to compute
        them.
    """
    own = [block for block in blocks if isinstance(block, InvertedResidual)]
    are_kept = [*(block.stride == 2 for block in own[1:]), True]
    return compute_blocks([*map(describe_block, own, are_kept)], x)


def describe_block(block: InvertedResidual, is_kept: bool) -> Block:
    """Describe a block to :func:`useg.models.kernels.compute_blocks`."""
    expand = None if block.expand_conv is None else block.expand_conv.weight
    weights = expand, block.depthwise_conv.weight, block.project_conv.weight
    norms = block.bn0, block.bn1, block.bn2
    return Block(weights, norms, block.relu, block.stride, block.residual, is_kept)


def expand_together(
    levels: Iterable[nn.Module], x: Tensor, skips: Sequence[Tensor]
) -> Tensor | None:
    """Compute all levels of an expanding path in one compiled layer.

    Args:
        levels: Those of an :class:`EncoderUNet`.
        x: (N, C, h, w).
        skips: The skip connections, that of the first level last.

    Returns:
        The features of the last level; None if PyTorch has to compute them.
    """
    described = [describe_level(level) for level in levels if isinstance(level, DoubleConv)]
    missing = [None] * (len(described) - len(skips))
    return compute_levels(described, x, [*reversed(skips), *missing])


def describe_level(level: DoubleConv) -> Level:
    """Describe a level with batch normalisation to :func:`useg.models.kernels.compute_levels`."""
    convolutions = [layer for layer in level if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in level if isinstance(layer, nn.BatchNorm2d)]
    weights = convolutions[0].weight, convolutions[1].weight
    return Level(weights, (norms[0], norms[1]), level[2])


def convolve_upsampled(conv: nn.Conv2d, x: Tensor, skip: Tensor | None) -> Tensor:
    """Upsample ``x`` by repeating pixels, concatenate it with ``skip``, and convolve with 3x3.

    Args:
        conv: The convolution, with zero padding and without a bias.
        x: (N, C, h, w).
        skip: (N, S, 2h, 2w), or None.

    Returns:
        (N, D, 2h, 2w).
    """
    y = convolve_repeated(conv, x, skip) if conv.training else None
    if y is None:
        x = interpolate(x, scale_factor=2.0, mode="nearest")  #             (N, C, 2h, 2w)
        y = conv(x if skip is None else concatenate(x, skip))
    return y


class ExpandingLevel(DoubleConv):
    """Upsampling, a skip connection, and two 3x3 convolutions with ReLU."""

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Compute (N, D, 2h, 2w) of ``x`` (N, C, h, w) and ``skip`` (N, S, 2h, 2w)."""
        assert isinstance(self[0], nn.Conv2d)
        return self.finish(convolve_upsampled(self[0], x, skip))


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


class EncoderUNet(nn.Module):
    """U-Net with an ImageNet encoder and a light expanding path, for any bands and classes.

    Each level of the expanding path upsamples by repeating pixels, and has two 3x3 convolutions
    with batch normalisation and ReLU: 128, 64, 48, 32 and, at full resolution, 16 channels. The
    first features of the encoder have only half the resolution of the image, which loses lines a
    pixel or two wide. So two convolutions on the image itself feed the skip connection at full
    resolution.

    Args:
        encoder: name of the contracting path, one of ``ENCODERS``.
        channels: number of bands of the image.
        classes: K, the number of classes.
        width: channels of the expanding path at full resolution; the levels below have 2, 3, 4 and
            8 times as many.
        dropout: share of features dropped at the two deepest levels of the contracting path.
        detail: add the skip connection at full resolution: ``width`` features from two 3x3
            convolutions on the image.

    Attributes:
        encoder: the contracting path. ``load_pretrained`` fills ``encoder.parameters()``, which
            need a lower learning rate.
        margin: 0: with zero padding, no pixel is lost.
        stride: 32. A shift of the input by a multiple of it shifts the output, and changes nothing
            else far from the edges.
        context: how far the inputs of a block of output pixels aligned to ``stride`` reach beyond
            the block, in pixels; most of these inputs have little effect.

    Raises:
        SettingsError: an unknown encoder.
        DataError: in ``forward``, a height or width that is not a multiple of 32.

    >>> EncoderUNet("lite0", 3, 13)(torch.zeros(1, 3, 96, 128)).shape
    torch.Size([1, 13, 96, 128])
    """

    def __init__(
        self,
        encoder: str,
        channels: int = 3,
        classes: int = 2,
        *,
        width: int = 16,
        dropout: float = 0.0,
        detail: bool = True,
    ) -> None:
        super().__init__()
        self.encoder_name = encoder
        self.encoder = choose("model.encoder", encoder, ENCODERS)(encoder, channels)
        self.margin = 0
        self.stride = STRIDE
        self.context = encoder_unet_context(self.encoder.windows)

        self.dropout = Dropout(dropout)
        widths = [8 * width, 4 * width, 3 * width, 2 * width, width]
        # In lite0: 320, and 112, 40, 24 and 16.
        deepest, *skips = reversed(self.encoder.widths)
        skips.append(width if detail else 0)
        self.detail = (
            DoubleConv(channels, width, padding="same", normalize=True) if detail else None
        )
        sources = [below + skip for below, skip in zip([deepest, *widths], skips, strict=False)]
        self.merge = nn.ModuleList(
            ExpandingLevel(source, size, padding="same", normalize=True)
            for source, size in zip(sources, widths, strict=True)
        )
        self.head = nn.Conv2d(width, classes, 1)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits (N, K, H, W) of normalised pixels (N, C, H, W)."""
        check_input_size(x, self.stride)
        details = [] if self.detail is None else [self.detail(x)]  #  (N, width, H, W)
        # (N, widths[level], H / 2**(level + 1), W / 2**(level + 1))
        skips = self.encoder(x)
        skips[-2:] = [self.dropout(skip) for skip in skips[-2:]]
        x, skips = skips.pop(), details + skips
        compiled = expand_together(self.merge, x, skips) if self.training else None
        for merge in self.merge if compiled is None else ():
            x = merge(x, skips.pop() if skips else None)  #  (N, 128 to 16, 2h, 2w)
        logits: Tensor = self.head(x if compiled is None else compiled)  #  (N, K, H, W)
        return logits

    def valid_size(self, size: int) -> int:
        """Return the smallest multiple of 32 that is at least ``size``."""
        return next_multiple(size, self.stride)


def encoder_unet_context(levels: Sequence[Sequence[tuple[int, int, int]]]) -> int:
    """Compute how far the inputs of a block of 32 aligned output pixels reach beyond the block.

    Args:
        levels: for each feature map, the (kernel, stride, padding before) of the layers that
            compute it from the previous one.
    """
    low, high = 0, STRIDE
    skips = []
    # Through the expanding path, from its end to the bottom.
    for _ in levels:
        low, high = low - 2, high + 2
        skips.append((low, high))
        low, high = low // 2, -(-high // 2)
    # Through the contracting path.
    for windows, (skip_low, skip_high) in zip(reversed(levels), reversed(skips), strict=True):
        for kernel, stride, padding in reversed(windows):
            low, high = stride * low - padding, stride * (high - 1) - padding + kernel
        if windows is not levels[0]:
            low, high = min(low, skip_low), max(high, skip_high)
    return max(-low, high - STRIDE)


def build_encoder_unet(settings: Mapping[str, Any]) -> EncoderUNet:
    """Build the untrained network from ``ModelSettings`` with numbers of channels and classes.

    Raises:
        SettingsError: an unknown encoder, or a setting has a value that this network cannot have.
    """
    return EncoderUNet(
        str(settings["encoder"]),
        **network_settings(
            settings, ("channels", "classes", "width", "dropout"), ENCODER_FIXED_SETTINGS
        ),
    )


ENCODER_FIXED_SETTINGS: dict[str, tuple[Any, ...]] = {
    **FIXED_SETTINGS,
    "normalize": (True, None),
    "depth": (LEVELS, None),
}


ENCODERS: dict[str, Callable[[str, int], EfficientNetLite | ResNet]] = {
    **dict.fromkeys(LITE_SIZES, EfficientNetLite),
    **dict.fromkeys(RESNET_SIZES, ResNet),
}
