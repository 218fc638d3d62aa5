"""A batch of normalised pictures -> logits: what came before the U-Net, and what a U-Net is compared with.

Read top to bottom it is the road there: a classifier asked about every place at once (coarse), then the fully convolutional network
that learns to enlarge its coarse answer and mends it with scores from earlier layers (FCN). A U-Net carries over features instead of
scores, and refines them on the way up.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from useg.errors import UsageError, choose
from useg.models.geometry import next_multiple
from useg.models.unet import (
    DoubleConv,
    Dropout,
    check_input_size,
    in_fp32,
    initialize,
    network_settings,
)

FCN_DEPTH = 5  # poolings; the 32, 16 and 8 in the names count from there


class PixelClassifier(nn.Module):
    """A plain convolutional classifier that labels every pixel: its dense layers are convolutions, its coarse answer is enlarged.

    A dense layer that looks at a window of k x k features is a k x k convolution, evaluated at every place at once. Nothing here brings
    back the detail that pooling has thrown away: borders come out as smooth blobs.

    Args:
        channels: bands of the picture.
        classes: K, the number of classes.
        width: channels of the first block; each block below has twice as many, the two dense layers twice as many as the last.
        depth: number of blocks, each two 3x3 convolutions and a pooling.
        dropout: share of features dropped after each dense layer.
        normalize: batch normalisation after each convolution but the last.
        window: height and width of the features that the first dense layer looks at; odd. VGG has 7.

    Attributes:
        margin: 0: zeros are added outside, no pixel is lost.
        stride: ``2**depth``: shifting the input by a multiple of it shifts the output and, far from the edges, changes nothing else.
        context: how far outside a block of output pixels aligned to ``stride`` its inputs reach, in pixels.

    Raises:
        UsageError: an even window, and in ``forward`` a height or width that is no multiple of ``stride``.

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
        self.context = fcn_path_context(
            depth, -1, 2, window
        )  # enlarging looks at the neighbours of the coarse pixel
        self.down = contracting_path(channels, width, depth, normalize)
        self.dense = dense_layers(
            width * 2 ** (depth - 1), width * 2**depth, window, dropout, normalize
        )
        self.score = nn.Conv2d(width * 2**depth, classes, 1)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, K, H, W) for normalised pixels (N, C, H, W)."""
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
    """Fully convolutional network: FCN-32s, FCN-16s or FCN-8s (Long, Shelhamer, Darrell 2015, figure 3).

    The classifier above, with three changes: the enlargement is a transposed convolution that starts as bilinear interpolation and is
    learned; and the coarse scores are enlarged in steps of two, to each of which the scores that a 1x1 convolution makes of an earlier,
    finer feature map are added. In the paper the contracting path is VGG-16; here it is that of a U-Net, with same padding.

    Args:
        channels: bands of the picture.
        classes: K, the number of classes.
        step: 32, 16 or 8: the stride of the finest scores, from which the last enlargement starts.
        width: channels of the first block; each of the five blocks has twice as many as the one before.
        dropout: share of features dropped after each dense layer (0.5 in the paper).
        normalize: batch normalisation after each convolution but those that make scores (not in the paper).
        window: height and width of the features that the first dense layer looks at; odd. 7 in the paper.

    Attributes:
        margin: 0: zeros are added outside, no pixel is lost.
        stride: 32: shifting the input by a multiple of it shifts the output and, far from the edges, changes nothing else.
        context: how far outside a block of output pixels aligned to ``stride`` its inputs reach, in pixels.

    Raises:
        UsageError: another step, an even window, and in ``forward`` a height or width that is no multiple of 32.

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
        mended = choose(
            "FCN step", str(step), {"32": 0, "16": 1, "8": 2}
        )  # by the scores of pool4 and pool3
        self.margin = 0
        self.stride: int = 2**FCN_DEPTH
        self.context = fcn_context(mended, window)
        self.down = contracting_path(channels, width, FCN_DEPTH, normalize)
        self.dense = dense_layers(16 * width, 32 * width, window, dropout, normalize)
        self.score = nn.Conv2d(32 * width, classes, 1)
        self.score_pool = nn.ModuleList(
            nn.Conv2d(size, classes, 1) for size in (8 * width, 4 * width)[:mended]
        )  # pool4, pool3
        self.up = nn.ModuleList(enlargement(classes, 2) for _ in range(mended))
        self.enlarge = enlargement(classes, step)
        initialize(self)
        for up in (*self.up, self.enlarge):
            up.weight.data.copy_(bilinear_kernel(up.stride[0]))
        for parameter in self.score_pool.parameters():
            nn.init.zeros_(
                parameter
            )  # so that learning starts from the coarser network (section 4.2)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, K, H, W) for normalised pixels (N, C, H, W)."""
        check_input_size(x, self.stride)
        pools = []
        for block in self.down:
            x = block(x)  #                          (N, width * 2**level, h / 2, w / 2)
            pools.append(x)
        x = self.score(self.dense(x))  #             (N, K, H / 32, W / 32)
        for up, score, pool in zip(self.up, self.score_pool, pools[-2::-1], strict=False):
            x = in_fp32(up, x) + score(
                pool
            )  #      (N, K, H / 16, W / 16), then (N, K, H / 8, W / 8)
        return in_fp32(self.enlarge, x)  #           (N, K, H, W)

    def valid_size(self, size: int) -> int:
        """Return the smallest multiple of 32 that is at least ``size``."""
        return next_multiple(size, self.stride)


def contracting_path(channels: int, width: int, depth: int, normalize: bool) -> nn.ModuleList:
    """Return the blocks of a classifier: two 3x3 convolutions and a pooling each, (N, C, H, W) -> (N, D, H / 2, W / 2)."""
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
    """Return a classifier's two dense layers as convolutions, of ``window`` x ``window`` and 1 x 1: (N, C, h, w) -> (N, D, h, w)."""
    if window % 2 == 0:
        raise UsageError(
            f"a window of {window}x{window} features has no middle; give an odd one, such as {window + 1}"
        )
    layers: list[nn.Module] = []
    for source, kernel in ((channels, window), (width, 1)):
        layers.append(nn.Conv2d(source, width, kernel, padding=kernel // 2, bias=not normalize))
        if normalize:
            layers.append(nn.BatchNorm2d(width))
        layers += [nn.ReLU(inplace=True), Dropout(dropout)]
    return nn.Sequential(*layers)


def enlargement(classes: int, factor: int) -> nn.ConvTranspose2d:
    """Return a transposed convolution (N, K, h, w) -> (N, K, factor * h, factor * w) that enlarges the scores of each class by themselves."""
    return nn.ConvTranspose2d(
        classes, classes, 2 * factor, factor, factor // 2, groups=classes, bias=False
    )


def bilinear_kernel(factor: int) -> Tensor:
    """Return the weights (2 * factor, 2 * factor) with which a transposed convolution interpolates: a tent, 1 in the middle.

    >>> bilinear_kernel(2)[1]
    tensor([0.1875, 0.5625, 0.5625, 0.1875])
    """
    tent = 1 - (torch.arange(2 * factor) + 0.5 - factor).abs() / factor
    return tent[:, None] * tent[None, :]


def fcn_path_context(depth: int, low: int, high: int, window: int) -> int:
    """Follow the pixels from ``low`` to before ``high`` of the coarsest map back to the picture: how far outside the first block do they reach?"""
    low, high = low - window // 2, high + window // 2
    for _ in range(depth):
        low, high = 2 * low - 2, 2 * high + 2
    return max(-low, high - int(2**depth))


def fcn_context(mended: int, window: int) -> int:
    """As ``reach``, for a block of 32 output pixels and the ``mended`` enlargements by two, which look further than the scores added."""
    low, high = -1, 2**mended + 1
    for _ in range(mended):
        low, high = (low - 1) // 2, high // 2 + 1
    return fcn_path_context(FCN_DEPTH, low, high, window)


def build_baseline(settings: Mapping[str, Any]) -> PixelClassifier | FCN:
    """Make the untrained network that ``settings["encoder"]`` names: one of ``BASELINES``.

    Raises:
        UsageError: a setting that this network cannot follow.
    """
    step = choose("model.encoder", str(settings["encoder"]), BASELINES)
    taken = ("channels", "classes", "width", "dropout", "normalize")
    if step is None:
        return PixelClassifier(**network_settings(settings, (*taken, "depth"), SAME))
    return FCN(step=step, **network_settings(settings, taken, {**SAME, "depth": (FCN_DEPTH, None)}))


SAME: dict[str, tuple[Any, ...]] = {
    "padding": ("same",),
    "up_kernel": (2, None),
    "extra_conv": (False, None),
    "skips": (True, None),
}


BASELINES: dict[str, int | None] = {
    "cnn": None,
    "fcn32s": 32,
    "fcn16s": 16,
    "fcn8s": 8,
}  # the stride of the finest scores
