"""Predecessors of the U-Net, to compare it with: a pixel classifier and FCN-32s, -16s and -8s.

Read from top to bottom, this is the way to the U-Net. First a convolutional classifier, applied at
every position at once, whose coarse logits are upsampled. Then the fully convolutional network
(FCN), which learns the upsampling and adds scores from earlier, finer layers. The U-Net passes on
features instead of scores, and refines them on the way up. Normalised images in, logits out.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from useg.errors import SettingsError, choose
from useg.models.geometry import next_multiple
from useg.models.unet import (
    DoubleConv,
    Dropout,
    check_input_size,
    in_fp32,
    initialize,
    network_settings,
)

# Number of poolings: the stride of the coarsest features is 2**5 = 32, as in FCN-32s.
FCN_DEPTH = 5


class PixelClassifier(nn.Module):
    """A convolutional classifier that labels every pixel: dense layers become convolutions.

    A dense layer on a window of k x k features is a k x k convolution, evaluated at every position
    at once. Its coarse logits are upsampled. Nothing restores the detail that pooling discards, so
    borders come out as smooth blobs.

    Args:
        channels: number of bands of the image.
        classes: K, the number of classes.
        width: channels of the first block; the number doubles with each block, and once more in the
            two dense layers.
        depth: number of blocks, each two 3x3 convolutions and a pooling.
        dropout: share of features dropped after each dense layer.
        normalize: batch normalisation after each convolution except the last.
        window: height and width of the window of the first dense layer, in features; odd. 7 in
            VGG.

    Attributes:
        margin: 0: with zero padding, no pixel is lost.
        stride: ``2**depth``. A shift of the input by a multiple of it shifts the output, and
            changes nothing else far from the edges.
        context: how far the inputs of a block of output pixels aligned to ``stride`` reach beyond
            the block, in pixels.

    Raises:
        SettingsError: an even window.
        DataError: in ``forward``, a height or width that is not a multiple of ``stride``.

    >>> PixelClassifier(3, 13, width=8, depth=3)(torch.zeros(1, 3, 96, 128)).shape
    torch.Size([1, 13, 96, 128])
    """

    def __init__(
        self,
        channels: int = 3,
        classes: int = 2,
        *,
        width: int = 32,
        depth: int = 4,
        dropout: float = 0.0,
        normalize: bool = False,
        window: int = 3,
    ) -> None:
        super().__init__()
        self.margin = 0
        self.stride: int = 2**depth
        # Bilinear upsampling also uses the neighbours of the coarse pixel.
        self.context = fcn_path_context(depth, -1, 2, window)
        self.down = contracting_path(channels, width, depth, normalize)
        self.dense = dense_layers(
            width * 2 ** (depth - 1), width * 2**depth, window, dropout, normalize
        )
        self.score = nn.Conv2d(width * 2**depth, classes, 1)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits (N, K, H, W) of normalised pixels (N, C, H, W)."""
        check_input_size(x, self.stride)
        for block in self.down:
            x = block(x)  #          (N, width * 2**level, h / 2, w / 2)
        x = self.dense(x)  #         (N, width * 2**depth, H / stride, W / stride)
        x = self.score(x)  #         (N, K, H / stride, W / stride)
        return interpolate(x, scale_factor=float(self.stride), mode="bilinear", align_corners=False)

    def valid_size(self, size: int) -> int:
        """Return the smallest multiple of ``stride`` that is at least ``size``."""
        return next_multiple(size, self.stride)


class FCN(nn.Module):
    """Fully convolutional network: FCN-32s, -16s or -8s (Long, Shelhamer, Darrell 2015, figure 3).

    It changes the classifier above in two ways. The upsampling is a learned transposed
    convolution that starts as bilinear interpolation. And the coarse scores are upsampled in steps
    of two; after each step, scores are added that a 1x1 convolution computes from an earlier, finer
    feature map. The contracting path is VGG-16 in the paper; here it is that of a U-Net with same
    padding.

    Args:
        channels: number of bands of the image.
        classes: K, the number of classes.
        step: 32, 16 or 8: the stride of the finest scores, where the last upsampling starts.
        width: channels of the first block; the number doubles with each of the five blocks.
        dropout: share of features dropped after each dense layer (0.5 in the paper).
        normalize: batch normalisation after each convolution except those that compute scores (not
            in the paper).
        window: height and width of the window of the first dense layer, in features; odd. 7 in the
            paper.

    Attributes:
        margin: 0: with zero padding, no pixel is lost.
        stride: 32. A shift of the input by a multiple of it shifts the output, and changes nothing
            else far from the edges.
        context: how far the inputs of a block of output pixels aligned to ``stride`` reach beyond
            the block, in pixels.

    Raises:
        SettingsError: another step, or an even window.
        DataError: in ``forward``, a height or width that is not a multiple of 32.

    >>> FCN(3, 13, step=8, width=8)(torch.zeros(1, 3, 96, 128)).shape
    torch.Size([1, 13, 96, 128])
    """

    def __init__(
        self,
        channels: int = 3,
        classes: int = 2,
        *,
        step: int = 8,
        width: int = 32,
        dropout: float = 0.0,
        normalize: bool = False,
        window: int = 3,
    ) -> None:
        super().__init__()
        # Number of finer maps whose scores are added: pool4, then pool3.
        num_added = choose("FCN step", str(step), {"32": 0, "16": 1, "8": 2})
        self.margin = 0
        self.stride: int = 2**FCN_DEPTH
        self.context = fcn_context(num_added, window)
        self.down = contracting_path(channels, width, FCN_DEPTH, normalize)
        self.dense = dense_layers(16 * width, 32 * width, window, dropout, normalize)
        self.score = nn.Conv2d(32 * width, classes, 1)
        self.score_pool = nn.ModuleList(
            nn.Conv2d(size, classes, 1) for size in (8 * width, 4 * width)[:num_added]
        )
        self.up = nn.ModuleList(make_upsampling(classes, 2) for _ in range(num_added))
        self.enlarge = make_upsampling(classes, step)
        initialize(self)
        for up in (*self.up, self.enlarge):
            up.weight.data.copy_(bilinear_kernel(up.stride[0]))
        # Training starts from the coarser network (section 4.2).
        for parameter in self.score_pool.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits (N, K, H, W) of normalised pixels (N, C, H, W)."""
        check_input_size(x, self.stride)
        pools = []
        for block in self.down:
            x = block(x)  #                          (N, width * 2**level, h / 2, w / 2)
            pools.append(x)
        x = self.score(self.dense(x))  #             (N, K, H / 32, W / 32)
        for up, score, pool in zip(self.up, self.score_pool, pools[-2::-1], strict=False):
            # (N, K, H / 16, W / 16), then (N, K, H / 8, W / 8)
            x = in_fp32(up, x) + score(pool)
        return in_fp32(self.enlarge, x)  #           (N, K, H, W)

    def valid_size(self, size: int) -> int:
        """Return the smallest multiple of 32 that is at least ``size``."""
        return next_multiple(size, self.stride)


def contracting_path(channels: int, width: int, depth: int, normalize: bool) -> nn.ModuleList:
    """Make the blocks of a classifier: two 3x3 convolutions and a pooling each.

    Each block: (N, C, H, W) -> (N, D, H / 2, W / 2).
    """
    widths = [channels, *(width * 2**level for level in range(depth))]
    return nn.ModuleList(
        nn.Sequential(
            DoubleConv(source, size, padding="same", normalize=normalize), nn.MaxPool2d(2)
        )
        for source, size in pairwise(widths)
    )


def dense_layers(
    channels: int, width: int, window: int, dropout: float, normalize: bool
) -> nn.Sequential:
    """Make the two dense layers of a classifier as convolutions: (N, C, h, w) -> (N, D, h, w).

    Raises:
        SettingsError: the window is even.
    """
    if window % 2 == 0:
        raise SettingsError(
            f"a window of {window}x{window} features has no centre; "
            f"give an odd size, such as {window + 1}"
        )
    layers: list[nn.Module] = []
    for source, kernel in ((channels, window), (width, 1)):
        layers.append(nn.Conv2d(source, width, kernel, padding=kernel // 2, bias=not normalize))
        if normalize:
            layers.append(nn.BatchNorm2d(width))
        layers += [nn.ReLU(inplace=True), Dropout(dropout)]
    return nn.Sequential(*layers)


def make_upsampling(classes: int, factor: int) -> nn.ConvTranspose2d:
    """Make a transposed convolution that upsamples the scores of each class on its own.

    (N, K, h, w) -> (N, K, factor * h, factor * w).
    """
    return nn.ConvTranspose2d(
        classes, classes, 2 * factor, factor, factor // 2, groups=classes, bias=False
    )


def bilinear_kernel(factor: int) -> Tensor:
    """Return the weights of a transposed convolution that interpolates bilinearly.

    A tent with its peak in the middle, of shape (2 * factor, 2 * factor).

    >>> bilinear_kernel(2)[1]
    tensor([0.1875, 0.5625, 0.5625, 0.1875])
    """
    tent = 1 - (torch.arange(2 * factor) + 0.5 - factor).abs() / factor
    return tent[:, None] * tent[None, :]


def fcn_path_context(depth: int, low: int, high: int, window: int) -> int:
    """Follow coarse pixels back to the image: how far do they reach beyond the first block?

    The pixels are those from ``low`` to before ``high`` of the coarsest map.
    """
    low, high = low - window // 2, high + window // 2
    for _ in range(depth):
        low, high = 2 * low - 2, 2 * high + 2
    return max(-low, high - int(2**depth))


def fcn_context(num_added: int, window: int) -> int:
    """Compute the context of an FCN: like :func:`fcn_path_context`, for 32 output pixels.

    The ``num_added`` upsamplings by two reach further than the scores that are added.
    """
    low, high = -1, 2**num_added + 1
    for _ in range(num_added):
        low, high = (low - 1) // 2, high // 2 + 1
    return fcn_path_context(FCN_DEPTH, low, high, window)


def build_baseline(settings: Mapping[str, Any]) -> PixelClassifier | FCN:
    """Build the untrained network that ``settings["encoder"]`` names: one of ``BASELINES``.

    Raises:
        SettingsError: a setting has a value that this network cannot have.
    """
    step = choose("model.encoder", str(settings["encoder"]), BASELINES)
    accepted = ("channels", "classes", "width", "dropout", "normalize")
    if step is None:
        return PixelClassifier(**network_settings(settings, (*accepted, "depth"), FIXED_SETTINGS))
    return FCN(
        step=step,
        **network_settings(settings, accepted, {**FIXED_SETTINGS, "depth": (FCN_DEPTH, None)}),
    )


# Settings of a U-Net with only one possible value here (None leaves it to the network).
FIXED_SETTINGS: dict[str, tuple[Any, ...]] = {
    "padding": ("same",),
    "up_kernel": (2, None),
    "extra_conv": (False, None),
    "skips": (True, None),
}


# The stride of an FCN's finest scores by name; None for the pixel classifier.
BASELINES: dict[str, int | None] = {"cnn": None, "fcn32s": 32, "fcn16s": 16, "fcn8s": 8}
