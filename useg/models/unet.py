"""The U-Net of Ronneberger, Fischer and Brox (2015), layer by layer: normalised images to logits.

The contracting path extracts features at ever coarser resolution, the expanding path brings them
back to full resolution, and the skip connections restore the detail that pooling discards. The
defaults are the paper's. Some layers are faster equivalents of PyTorch's on CPUs (torch 2.13).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from useg.device import avoids_compiling
from useg.errors import DataError, SettingsError
from useg.models.geometry import next_multiple, round_up
from useg.models.kernels import convolve_normalized, normalize_compiled


class ConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution that adds its bias in a separate step.

    For large maps, oneDNN's gradient of a built-in bias takes nearly as long as the gradients of
    the weights and the input together.
    """

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return (N, D, H', W') for (N, C, H, W)."""
        if (
            not self.training
            or self.bias is None
            or x.device.type != "cpu"
            or output_size is not None
        ):
            return super().forward(x, output_size)
        y = F.conv_transpose2d(
            x,
            self.weight,
            None,
            self.stride,
            self.padding,  # type: ignore[arg-type]
            self.output_padding,
            self.groups,
            self.dilation,
        )
        return y + self.bias.to(y.dtype)[:, None, None]


class Dropout(nn.Dropout):
    """Dropout that draws 16 random bits per feature; torch draws 53, one feature at a time.

    The dropped share is exact to 2**-16.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Set a share ``p`` of x (N, C, H, W) to 0 and scale the rest by ``1 / (1 - p)``."""
        if not self.training or not self.p or x.device.type != "cpu":
            return super().forward(x)
        N, C, H, W = x.shape
        bits = (
            torch.empty(-(-x.numel() // 4), dtype=torch.int64)
            .random_(-(2**63), None)
            .view(torch.int16)[: x.numel()]
        )
        # In channels-last order, as x is.
        kept = bits.view(N, H, W, C).permute(0, 3, 1, 2) >= int(self.p * 2**16) - 2**15
        return x * (kept.to(x.dtype) / (1 - self.p))


def concatenate(*parts: Tensor) -> Tensor:
    """Concatenate feature maps (N, C_k, H, W) to (N, sum of C_k, H, W).

    Each part gets a contiguous gradient. torch's own gradients are slices of the gradient of the
    whole, with which the backward pass of an upsampling is ten times as slow.
    """
    if torch.is_grad_enabled() and not torch.jit.is_tracing():  # type: ignore[no-untyped-call]
        # A part may have other consumers: the hook sees only the gradient of this view.
        parts = tuple(part[...] for part in parts)
        for part in parts:
            if part.requires_grad:
                part.register_hook(_make_contiguous)  # type: ignore[no-untyped-call]
    return torch.cat(parts, 1)


def _make_contiguous(gradient: Tensor) -> Tensor:
    return gradient.contiguous(memory_format=torch.channels_last)


def normalize(
    norm: nn.BatchNorm2d, activation: nn.Module | None, x: Tensor, residual: Tensor | None = None
) -> Tensor:
    """Apply batch normalisation to (N, C, H, W), then ReLU or ReLU6, or add a residual."""
    if norm.training:
        compiled = normalize_compiled(norm, activation, x, residual)
        if compiled is not None:
            return compiled
    y: Tensor = norm(x) if activation is None else activation(norm(x))
    return y if residual is None else residual + y


Padding = Literal["valid", "same"]


class DoubleConv(nn.Sequential):
    """Two 3x3 convolutions, each with ReLU.

    (N, C, H, W) -> (N, D, H - 4, W - 4), or (N, D, H, W) with same padding.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        padding: Padding,
        normalize: bool = False,
        dropout: float = 0.0,
    ) -> None:
        layers: list[nn.Module] = []
        for source in (channels, width):
            layers.append(
                nn.Conv2d(
                    source, width, 3, padding=1 if padding == "same" else 0, bias=not normalize
                )
            )
            if normalize:
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU(inplace=True))
        if dropout:
            layers.append(Dropout(dropout))
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the features (N, D, H', W')."""
        return self.finish(self[0](x))

    def finish(self, x: Tensor) -> Tensor:
        """Compute what follows the first convolution."""
        x, layers = convolve_normalized([*self][1:], x) if self.training else (x, iter([*self][1:]))
        for layer in layers:
            x = normalize(layer, next(layers), x) if isinstance(layer, nn.BatchNorm2d) else layer(x)
        return x


class UNet(nn.Module):
    """U-Net (Ronneberger, Fischer, Brox 2015, figure 1) of any width, depth, bands and classes.

    Args:
        channels: number of bands of the image.
        classes: K, the number of classes.
        width: channels of the first level; the number doubles at each level below.
        depth: number of poolings; the paper has 4.
        padding: ``"valid"`` as in the paper (the output loses ``margin`` pixels on each side) or
            ``"same"`` (zero padding, nothing is lost).
        dropout: share of features dropped after the two deepest blocks of the contracting path
            (section 3.1).
        normalize: batch normalisation after each 3x3 convolution (not in the paper).
        up_kernel: 2 for the paper's 2x2 up-convolutions; 3 for overlapping 3x3 ones, which need
            same padding.
        extra_conv: one more 3x3 convolution with ReLU before the final 1x1 one.
        skips: for each level from the top, whether its skip connection carries features or zeros;
            to study what each contributes. By default all carry features.

    Attributes:
        margin: pixels lost on each side: ``6 * 2**depth - 4`` with valid padding (92 in the
            paper), 0 with same padding.
        stride: ``2**depth``. A shift of the input by a multiple of it shifts the output and
            changes nothing else.
        skips: as above; may be changed in a trained network, whose parameters stay the same.
        context: how far the inputs of a block of output pixels aligned to ``stride`` reach beyond
            the block, in pixels.

    Raises:
        SettingsError: impossible settings.
        DataError: in ``forward``, a height or width that the network does not take.

    >>> UNet(1, 2)(torch.zeros(1, 1, 188, 188)).shape
    torch.Size([1, 2, 4, 4])
    """

    def __init__(
        self,
        channels: int = 1,
        classes: int = 2,
        *,
        width: int = 64,
        depth: int = 4,
        padding: Padding = "valid",
        dropout: float = 0.0,
        normalize: bool = False,
        up_kernel: int = 2,
        extra_conv: bool = False,
        skips: Sequence[bool] | None = None,
    ) -> None:
        super().__init__()
        if up_kernel not in (2, 3) or (up_kernel == 3 and padding == "valid"):
            raise SettingsError(
                f"up_kernel {up_kernel} with {padding} padding is not possible; "
                "use 2, or 3 together with same padding"
            )
        if skips is not None and len(skips) != depth:
            raise SettingsError(
                f"{len(skips)} skips are given for {depth} levels; "
                "give True or False for each level"
            )
        self.skips = tuple(skips) if skips is not None else (True,) * depth
        self.padding = padding
        self.depth = depth
        self.stride: int = 2**depth
        self.margin = 6 * self.stride - 4 + int(extra_conv) if padding == "valid" else 0
        self.context = unet_context(depth, up_kernel, extra_conv)

        # 64, 128, 256, 512 and 1024 in the paper.
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(
            DoubleConv(
                source,
                size,
                padding=padding,
                normalize=normalize,
                dropout=dropout if level >= depth - 1 else 0.0,
            )
            for level, (source, size) in enumerate(zip([channels, *widths], widths, strict=False))
        )
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(
            ConvTranspose2d(
                2 * size,
                size,
                up_kernel,
                stride=2,
                padding=up_kernel - 2,
                output_padding=up_kernel - 2,
            )
            for size in widths[-2::-1]
        )
        self.merge = nn.ModuleList(
            DoubleConv(2 * size, size, padding=padding, normalize=normalize)
            for size in widths[-2::-1]
        )
        self.extra = (
            nn.Conv2d(width, width, 3, padding=1 if padding == "same" else 0)
            if extra_conv
            else None
        )
        self.head = nn.Conv2d(width, classes, 1)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits (N, K, H - 2 margin, W - 2 margin) of normalised pixels (N, C, H, W)."""
        H, W = x.shape[-2:]
        if (self.valid_size(H), self.valid_size(W)) != (H, W):
            raise DataError(
                f"an image of {W}x{H} pixels does not fit this U-Net "
                f"({self.padding} padding, depth {self.depth}); "
                f"the next size that does is {self.valid_size(W)}x{self.valid_size(H)}"
            )
        skips = []
        for block, kept in zip(self.down[:-1], self.skips, strict=True):
            x = block(x)  #                                  (N, width * 2**level, h, w)
            skips.append(x if kept else torch.zeros_like(x))
            x = self.pool(x)  #                              (N, width * 2**level, h / 2, w / 2)
        x = self.down[-1](x)  #                              (N, width * 2**depth, h, w)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = up(x)  #                                     (N, width * 2**level, 2h, 2w)
            skip = skips.pop() if self.padding == "same" else crop(skips.pop(), x)
            x = torch.cat([skip, x], 1)  #                   (N, 2 * width * 2**level, 2h, 2w)
            # Valid padding loses another 4 pixels of height and width here.
            x = merge(x)  #                                  (N, width * 2**level, 2h, 2w)
        if self.extra is not None:
            x = torch.relu(self.extra(x))
        logits: Tensor = self.head(x)  #                     (N, K, h, w)
        return logits

    def valid_size(self, size: int) -> int:
        """Return the smallest height or width that the network takes, at least ``size``.

        In the paper the valid sizes are ``16 n + 12``, from 188 on.
        """
        # Input pixels that the convolutions of the contracting path lose.
        lost = 4 * (self.stride - 1) if self.padding == "valid" else 0
        # At least one pixel must come out.
        smallest = 2 * self.margin + 1
        return round_up(max(size, smallest) - lost, self.stride) + lost


def crop(skip: Tensor, x: Tensor) -> Tensor:
    """Crop ``skip`` at its centre to the height and width of ``x``.

    This is a padding by a negative number: the gradient of a slice is copied, channels
    first, which costs a sixth of a training step. How much is cut off depends on the level alone,
    not on the size.
    """
    top, left = (int(skip.shape[k] - x.shape[k]) // 2 for k in (-2, -1))
    return F.pad(skip, [-left, -left, -top, -top])


def unet_context(depth: int, up_kernel: int, extra_conv: bool) -> int:
    """Compute how far the inputs of a block of ``2**depth`` output pixels reach beyond the block.

    The block's first and last pixel are followed back through the network.
    """
    block: int = 2**depth
    low, high = 0, block
    if extra_conv:
        low, high = low - 1, high + 1
    # Through the expanding path, from its end to the bottom.
    for _ in range(depth):
        low, high = low - 2, high + 2
        low, high = low // 2, (high // 2 + 1 if up_kernel == 3 else -(-high // 2))
    low, high = low - 2, high + 2
    # Through the contracting path.
    for _ in range(depth):
        low, high = 2 * low - 2, 2 * high + 2
    return max(-low, high - block)


def initialize(network: nn.Module) -> None:
    """Apply He initialisation (section 3 of the paper), in place.

    The variance is 2 / fan-in before a ReLU and 1 / fan-in where none follows; biases are 0.
    """
    for module in network.modules():
        if isinstance(module, nn.ConvTranspose2d):
            # Kernel weights that contribute to one output pixel.
            weights = math.prod(module.kernel_size) / math.prod(module.stride)
            nn.init.normal_(module.weight, std=math.sqrt(1 / (module.in_channels * weights)))
        elif isinstance(module, nn.Conv2d):
            nonlinearity: Literal["linear", "relu"] = (
                "linear" if module.kernel_size == (1, 1) else "relu"
            )
            nn.init.kaiming_normal_(module.weight, nonlinearity=nonlinearity)
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
            nn.init.zeros_(module.bias)


def in_fp32(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer in fp32 where bf16 autocast is on and the device is a CPU; else as it is.

    For convolutions with as many groups as channels. With torch 2.13 (oneDNN 3), the gradients of
    strided and of 5x5 depthwise convolutions take 5 to 20 times as long in bf16 as in fp32, and
    those of the upsampling of FCN-32s 60 times. These layers are small, so fp32 costs little.

    Returns:
        The layer's output, in the number type of ``x``.
    """
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        y: Tensor = layer(x)
        return y
    with torch.autocast("cpu", enabled=False):
        y = layer(x.float())
        return y.to(x.dtype)


def convolve_depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a convolution with as many groups as channels; without cuDNN, if that compiles."""
    return convolve_natively(conv, x) if avoids_compiling(x.device) else conv(x)


def convolve_natively(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a depthwise convolution with PyTorch's kernels.

    PyTorch takes them if neither the features nor the weights are channels-last.
    """
    weight = conv.weight.flatten(1).view(conv.weight.shape)
    y = F.conv2d(x.contiguous(), weight, conv.bias, conv.stride, conv.padding, groups=conv.groups)
    return y.contiguous(memory_format=torch.channels_last)


def check_input_size(x: Tensor, stride: int) -> None:
    """Raise a DataError if the height or width of ``x`` is not a multiple of ``stride``."""
    H, W = x.shape[-2:]
    wanted = next_multiple(W, stride), next_multiple(H, stride)
    if wanted != (W, H):
        raise DataError(
            f"an image of {W}x{H} pixels does not fit this network, which takes multiples of "
            f"{stride}; the next size is {wanted[0]}x{wanted[1]}"
        )


def network_settings(
    settings: Mapping[str, Any], accepted: Collection[str], fixed: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """Select the settings that a network takes; those that are None are left to its defaults.

    Args:
        settings: ``ModelSettings`` with the numbers of channels and classes.
        accepted: names of the settings that the network takes.
        fixed: allowed values of settings that the network does not take; the first is what it does.

    Raises:
        SettingsError: a setting has a value that the network cannot have.
    """
    for key, possible in fixed.items():
        if settings.get(key, possible[0]) not in possible:
            encoder = settings["encoder"]
            raise SettingsError(
                f"model.{key} = {settings[key]!r} is not possible with model.encoder {encoder}: "
                f"it is always {possible[0]!r}"
            )
    return {key: settings[key] for key in accepted if settings.get(key) is not None}
