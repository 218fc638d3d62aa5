"""Compiled layers for training in bf16 on a CPU; without a C compiler, PyTorch's own layers.

With torch 2.13, half of a training step of EfficientNet-Lite goes into layers that compute little:
the gradients of depthwise convolutions are many times slower than the memory allows, and batch
normalisation and its activation pass over the features again and again. ``kernels.c`` and
``depthwise.c`` compute them in as few passes as possible. With what remains, preparing a layer
takes longer than computing it where features are small, so ``convolutions.c``, ``upsampling.c`` and
``pointwise.c`` have the other convolutions, and ``blocks.c`` and ``decoder.c`` call many layers at
once.

They are compiled when a network first needs them, in a few seconds, and loaded only if they compute
what PyTorch computes. ``USEG_KERNELS=off`` turns them off. :mod:`useg.models.compiled_layers` calls
them.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from ctypes import c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from useg.machine import in_parallel
from useg.models.compiled_layers import (
    Block,
    Level,
    apply_blocks,
    apply_convolution,
    apply_levels,
    apply_loss,
    apply_norm,
    apply_repeated,
    depthwise_convolution,
    square_convolution,
)

# The types of each function's arguments.
Signatures = Mapping[str, Sequence[Any]]

# Environment variable that turns the compiled layers off.
KERNELS_VARIABLE = "USEG_KERNELS"

# The arguments of each function.
SIGNATURES = {
    # normalisation, x, residual, y, pixels, channels
    "useg_norm_forward": (*[c_void_p] * 4, c_int64, c_int64),
    # normalisation, x, gradient, its result, pixels, channels
    "useg_norm_backward": (*[c_void_p] * 4, c_int64, c_int64),
    # sizes, normalisations before and after, x, weight, filtered, y
    "useg_filter_forward": (c_void_p,) * 7,
    # The same, gradient instead of y; then the gradients of x and weight.
    "useg_filter_backward": (c_void_p,) * 9,
    # sizes, normalisations before and after, x, weight, convolved, y
    "useg_convolution_forward": (c_void_p,) * 7,
    # The same, gradient instead of y; then the gradients of x and weight.
    "useg_convolution_backward": (c_void_p,) * 9,
    # blocks, their number
    "useg_blocks_length": (c_void_p, c_int64),
    # blocks, their number, x, memory for all features
    "useg_blocks_forward": (c_void_p, c_int64, c_void_p, c_void_p),
    # The same; then the gradient of x.
    "useg_blocks_backward": (c_void_p, c_int64, c_void_p, c_void_p, c_void_p),
    # levels, their number
    "useg_levels_length": (c_void_p, c_int64),
    # levels, their number, x, memory for all features, y
    "useg_levels_forward": (c_void_p, c_int64, *[c_void_p] * 3),
    # The same, gradient instead of y; then the gradient of x.
    "useg_levels_backward": (c_void_p, c_int64, *[c_void_p] * 4),
    # weight, its sizes D, C and S, sums, rest
    "useg_upsampling_weights": (c_void_p, *[c_int64] * 3, c_void_p, c_void_p),
    # gradients of sums and rest, the sizes, gradient of the weight
    "useg_upsampling_weight_gradient": (c_void_p, c_void_p, *[c_int64] * 3, c_void_p),
    # logits, target, pixels, classes, weight; then factors, loss and coefficients
    "useg_loss_forward": (
        *(c_void_p, c_void_p, c_int64, c_int64, c_void_p),
        *(c_float, c_float, c_void_p, c_void_p),
    ),
    # The same; then coefficients, gradient of the loss and that of the logits.
    "useg_loss_backward": (
        *(c_void_p, c_void_p, c_int64, c_int64, c_void_p),
        *(c_void_p, c_float, c_void_p),
    ),
}

SOURCES = (
    "kernels.c",
    "depthwise.c",
    "convolutions.c",
    "upsampling.c",
    "pointwise.c",
    "blocks.c",
    "decoder.c",
)
COMPILERS = ("cc", "gcc", "clang")
# OpenMP is not linked: its functions are those that PyTorch has loaded.
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC")
MAX_COMPILE_SECONDS = 900

# Relative difference to PyTorch's results in fp32, from rounding to bf16, which has 8 bits.
MAX_DIFFERENCE = 0.02

# Channels are computed in groups of this size.
LANES = 16

# Channels of 1x1 convolutions are multiples of this.
PAIRED = 8

# The compiled loss takes at most this many classes.
MAX_LOSS_CLASSES = 256

# The features (N, C, H, W) on which the kernels are tried.
_TRIED_SHAPE = 2, 48, 10, 8


@cache
def load_kernels() -> ctypes.CDLL | None:
    """Compile and load the kernels; None where they cannot be used."""
    kernels = compile_sources([Path(__file__).with_name(name) for name in SOURCES], SIGNATURES)
    if kernels:
        for function in (kernels.useg_blocks_length, kernels.useg_levels_length):
            function.restype = c_int64
    return kernels if kernels and _agrees(kernels) else None


def compile_sources(sources: Sequence[Path], signatures: Signatures) -> ctypes.CDLL | None:
    """Compile C files and load their functions; None if that is impossible or turned off."""
    given = os.environ.get("CC")
    found = next(filter(shutil.which, COMPILERS), None)
    compiler = shlex.split(given) if given else [found] if found else None
    if not compiler or os.environ.get(KERNELS_VARIABLE) == "off":
        return None
    with suppress(OSError, subprocess.SubprocessError, AttributeError):
        with tempfile.TemporaryDirectory() as folder:
            kernels = _compile(compiler, sources, Path(folder))
        for name, types in signatures.items():
            getattr(kernels, name).argtypes = types
        return kernels
    return None


def _compile(compiler: list[str], sources: Sequence[Path], folder: Path) -> ctypes.CDLL:
    def run(words: list[str]) -> None:
        subprocess.run(
            [*compiler, *words],
            check=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=MAX_COMPILE_SECONDS,
        )

    compiled, library = [str(folder / f"{source.stem}.o") for source in sources], folder / "k.so"
    pairs = zip(sources, compiled, strict=True)
    list(in_parallel(run, ([*FLAGS, "-c", str(source), "-o", each] for source, each in pairs)))
    run(["-shared", *compiled, "-o", str(library), "-lm"])
    return ctypes.CDLL(str(library))


def _agrees(kernels: ctypes.CDLL) -> bool:
    """Return whether the layers and their gradients are those of PyTorch in fp32."""
    results = [_try_layers(kernels, is_compiled) for is_compiled in (True, False)]
    return all(
        float((found.float() - expected).norm() / expected.norm()) < MAX_DIFFERENCE
        for found, expected in zip(*results, strict=True)
        if found is not None and expected is not None
    )


def _try_layers(kernels: ctypes.CDLL, is_compiled: bool) -> list[Tensor | None]:
    """Compute small layers in bf16 by the kernels, or in fp32 by PyTorch.

    Returns:
        Logits, loss, the running variances of the norms, and the gradients.
    """
    random = torch.Generator().manual_seed(0)
    N, C, H, W = _TRIED_SHAPE
    features = (N, C, H, W), (N, 24, H // 2, W // 2), (N, 8, H, W)
    shapes = *features, (C, 1, 5, 5), (C, C, 3, 3), (C, C, 1, 1), (C, 32, 3, 3)
    inputs = [
        torch.randn(shape, generator=random).contiguous(memory_format=torch.channels_last)
        for shape in shapes
    ]
    # The logits shall be near 1.
    inputs[-1] *= 0.05
    norms = [nn.BatchNorm2d(C) for _ in range(10)]
    # Rounding moves features across the limits of ReLU6, where there are many.
    for norm, bias in zip((norms[1], *norms[5:7], *norms[8:]), (3, 3, 1, 3, 3), strict=True):
        nn.init.constant_(norm.bias, bias)
    rounded = [x.bfloat16() if x.shape[0] == N else x for x in inputs]
    if not is_compiled:
        rounded = [x.float() for x in rounded]
    leaves = [x.clone().requires_grad_() for x in rounded]
    compute = _compute_by_kernels if is_compiled else _compute_by_pytorch
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        y, loss = compute(kernels, leaves, norms)
        loss.backward()  # type: ignore[no-untyped-call]
    # Within the block, the biases hardly count.
    gradients = [each.grad for each in (*leaves, *(norm.bias for norm in norms[:5]))]
    return [y.detach(), loss.detach(), *(norm.running_var for norm in norms), *gradients]


def _tried_target() -> Tensor:
    N, C, H, W = _TRIED_SHAPE
    return (torch.arange(N * H * W) % C).view(N, H, W)


def _compute_by_kernels(
    kernels: ctypes.CDLL, leaves: Sequence[Tensor], norms: Sequence[nn.BatchNorm2d]
) -> tuple[Tensor, Tensor]:
    """Return the logits and the loss of :func:`_try_layers`."""
    x, coarse, skip, weight, square, flat, wide = leaves
    conv = depthwise_convolution(kernels, x, weight, 1)
    y = apply_convolution(conv, x, weight, norms[:2], nn.ReLU6())
    y = apply_norm(kernels, x, y, norms[2], None)
    if kernels.useg_has_convolutions():
        conv = square_convolution(kernels, x, square)
        y = y + apply_convolution(conv, x, square, norms[3:5], nn.ReLU())
        layers = (flat, weight, flat), (norms[5], norms[6], norms[7]), nn.ReLU6()
        y = y + apply_blocks(kernels, x, [Block(*layers, 1, True, True)])[0]
        small = x[:, :, ::2, ::2].contiguous(memory_format=torch.channels_last)
        merging = torch.cat([square, square[:, :8]], 1)
        level = Level((merging, square), (norms[8], norms[9]), nn.ReLU())
        y = y + apply_levels(kernels, small, [skip], [level])
    y = y + apply_repeated(kernels, coarse, skip, wide)
    return y, apply_loss(kernels, y, _tried_target(), torch.ones(x.shape[1]), (1.0, 1.0))


def _compute_by_pytorch(
    kernels: ctypes.CDLL, leaves: Sequence[Tensor], norms: Sequence[nn.BatchNorm2d]
) -> tuple[Tensor, Tensor]:
    """Return what :func:`_compute_by_kernels` returns, without the kernels."""
    x, coarse, skip, weight, square, flat, wide = leaves
    C, target = x.shape[1], _tried_target()
    y = F.conv2d(F.relu6(norms[0](x)), weight, None, 1, 2, 1, C)
    y = norms[2](x) + F.relu6(norms[1](y))
    if kernels.useg_has_convolutions():
        y = y + F.relu(norms[4](F.conv2d(F.relu(norms[3](x)), square, padding=1)))
        hidden = F.relu6(norms[5](F.conv2d(x, flat)))
        hidden = F.relu6(norms[6](F.conv2d(hidden, weight, None, 1, 2, 1, C)))
        y = y + norms[7](F.conv2d(hidden, flat)) + x
        small, merging = x[:, :, ::2, ::2], torch.cat([square, square[:, :8]], 1)
        whole = torch.cat([F.interpolate(small, scale_factor=2.0), skip], 1)
        hidden = F.relu(norms[8](F.conv2d(whole, merging, padding=1)))
        y = y + F.relu(norms[9](F.conv2d(hidden, square, padding=1)))
    whole = torch.cat([F.interpolate(coarse, scale_factor=2.0), skip], 1)
    y = y + F.conv2d(whole, wide, padding=1)
    p, truth = y.softmax(1), F.one_hot(target, C).permute(0, 3, 1, 2)
    scores = 2 * (p * truth).sum((0, 2, 3)) / (p + truth).sum((0, 2, 3))
    return y, F.cross_entropy(y, target) + 1 - scores.mean()


def _usable_kernels(x: Tensor) -> ctypes.CDLL | None:
    """Return the kernels if they take an input (N, C, H, W)."""
    if (
        x.dtype is not torch.bfloat16
        or x.device.type != "cpu"
        or not torch.is_grad_enabled()
        or not x.is_contiguous(memory_format=torch.channels_last)
    ):
        return None
    return load_kernels()


def normalize_compiled(
    norm: nn.BatchNorm2d, activation: nn.Module | None, x: Tensor, residual: Tensor | None
) -> Tensor | None:
    """Do what :func:`useg.models.unet.normalize` does; None if PyTorch has to."""
    kernels = _usable_kernels(x) if _is_simple(norm) and x.numel() > x.shape[1] else None
    if kernels is None:
        return None
    if residual is not None:
        residual = residual.to(x.dtype).contiguous(memory_format=torch.channels_last)
    return apply_norm(kernels, x, residual, norm, activation)


def filter_normalized(
    norms: Sequence[nn.BatchNorm2d | None], conv: nn.Conv2d, activation: nn.Module, x: Tensor
) -> Tensor | None:
    """Normalise, apply a depthwise convolution with TensorFlow's ``same`` padding, normalise.

    The layer's own padding does not count: with stride 2 there is one pixel more after the image
    than before it.

    Args:
        norms: Before and after; None does nothing.
        conv: The convolution, without a bias.
        activation: ReLU or ReLU6, after either normalisation.
        x: (N, C, H, W).

    Returns:
        (N, C, H / stride, W / stride), or None if PyTorch has to compute it.
    """
    weight, stride, num_pixels = conv.weight, conv.stride[0], x.numel() // x.shape[1]
    fits = conv.training and _takes_filter(weight, stride, norms, num_pixels)
    kernels = _usable_kernels(x) if fits else None
    if kernels is None:
        return None
    filtering = depthwise_convolution(kernels, x, weight, stride)
    return apply_convolution(filtering, x, weight, norms, activation)


def _takes_convolution(kernels: ctypes.CDLL, x: Tensor, out_channels: int) -> bool:
    """Return whether there is a compiled 3x3 convolution from (N, C, H, W) to D channels."""
    _, C, _, W = x.shape
    # Pairs of pixels are multiplied at once.
    fits = not (C % LANES or out_channels % LANES or W % 2)
    return fits and bool(kernels.useg_has_convolutions())


def _takes_filter(
    weight: Tensor, stride: int, norms: Sequence[nn.BatchNorm2d | None], num_pixels: int
) -> bool:
    """Return whether there is a compiled depthwise convolution for this number of pixels."""
    return (
        weight.shape[-2:] in ((3, 3), (5, 5))
        and not weight.shape[0] % LANES
        and stride * stride < num_pixels
        and all(norm is None or _is_simple(norm) for norm in norms)
    )


def compute_blocks(blocks: Sequence[Block], x: Tensor) -> tuple[Tensor, ...] | None:
    """Compute inverted residual blocks (:class:`useg.models.encoders.InvertedResidual`).

    Args:
        blocks: The layers of each.
        x: (N, C, H, W).

    Returns:
        The results that are kept, or None if PyTorch has to compute some block.
    """
    kernels = _usable_kernels(x)
    if kernels is None or not kernels.useg_has_convolutions():
        return None
    (N, C, H, W), is_kept = x.shape, False
    for k, block in enumerate(blocks):
        expand, depthwise, project = block.weights
        # What else leads a gradient to the block's x is added by the first convolution.
        fits = block.is_sum + is_kept <= (expand is not None) and (expand is not None or k == 0)
        if C % PAIRED or not fits:
            return None
        if not _takes_filter(depthwise, block.stride, block.norms, N * H * W):
            return None
        C, H, W = project.shape[0], -(-H // block.stride), -(-W // block.stride)
        is_kept = block.is_kept
    return None if C % PAIRED else apply_blocks(kernels, x, blocks)


def compute_levels(
    levels: Sequence[Level], x: Tensor, skips: Sequence[Tensor | None]
) -> Tensor | None:
    """Compute the levels of an expanding path (:class:`useg.models.encoders.EncoderUNet`).

    Args:
        levels: The layers of each.
        x: (N, C, h, w).
        skips: For each level, its skip connection, with twice the height and width of its x; None
            if there is none.

    Returns:
        The features of the last level; None if PyTorch has to compute some level.
    """
    kernels = _usable_kernels(x)
    if kernels is None or not kernels.useg_has_convolutions():
        return None
    C, used = x.shape[1], []
    for level, skip in zip(levels, skips, strict=True):
        S, D = 0 if skip is None else skip.shape[1], level.weights[0].shape[0]
        if C % LANES or S % PAIRED or D % LANES or not all(map(_is_simple, level.norms)):
            return None
        C = D
        if skip is not None:
            skip = skip.to(x.dtype).contiguous(memory_format=torch.channels_last)
        used.append(skip)
    return apply_levels(kernels, x, used, levels)


def convolve_normalized(
    layers: Sequence[nn.Module], x: Tensor
) -> tuple[Tensor, Iterator[nn.Module]]:
    """Compute normalisation, ReLU, 3x3 convolution, normalisation and ReLU at once.

    Args:
        layers: Of a :class:`useg.models.unet.DoubleConv`, from the second on.
        x: The result of the first, (N, C, H, W).

    Returns:
        The result (N, D, H, W) and the layers that follow; x and all layers if PyTorch has to
        compute them.
    """
    kernels = _usable_kernels(x)
    match layers[:5]:
        case [nn.BatchNorm2d() as before, _, nn.Conv2d() as conv, nn.BatchNorm2d() as after, last]:
            is_simple = _is_simple(before) and _is_simple(after) and conv.padding == (1, 1)
            if kernels and is_simple and _takes_convolution(kernels, x, conv.out_channels):
                convolving = square_convolution(kernels, x, conv.weight)
                y = apply_convolution(convolving, x, conv.weight, (before, after), last)
                return y, iter(layers[5:])
    return x, iter(layers)


def _is_simple(norm: nn.BatchNorm2d) -> bool:
    # In a group of processes the layer has another class.
    is_plain = type(norm) is nn.BatchNorm2d and norm.running_mean is not None
    return is_plain and norm.training and norm.weight.dtype is torch.float32


def convolve_repeated(conv: nn.Conv2d, x: Tensor, skip: Tensor | None) -> Tensor | None:
    """Repeat each pixel of ``x`` in both directions, concatenate ``skip``, and convolve with 3x3.

    Of each 3x3 window, only 2x2 pixels of ``x`` are different. The weights of equal pixels are
    added first. What remains is a transposed convolution, in 4/9 of the work, and nothing is
    repeated or concatenated.

    Args:
        conv: The convolution, with zero padding and without a bias.
        x: (N, C, h, w).
        skip: (N, S, 2h, 2w), or None.

    Returns:
        (N, D, 2h, 2w), or None if PyTorch has to compute it.
    """
    kernels = _usable_kernels(x) if conv.training else None
    if kernels is None or conv.weight.dtype is not torch.float32:
        return None
    if skip is not None:
        skip = skip.to(x.dtype).contiguous(memory_format=torch.channels_last)
    return apply_repeated(kernels, x, skip, conv.weight)


def cross_entropy_and_dice(
    logits: Tensor, target: Tensor, weight: Tensor | None, entropy_factor: float, dice_factor: float
) -> Tensor | None:
    """Return cross-entropy plus Dice loss (:mod:`useg.scoring.losses`), each times a factor.

    Args:
        logits: (N, K, h, w).
        target: Class ids (N, h, w), int64; ids from K on do not count.
        weight: Class weights (K,) of the cross-entropy.
        entropy_factor, dice_factor: The factors.

    Returns:
        A scalar, fp32; None if PyTorch has to compute it.
    """
    kernels = _usable_kernels(logits)
    if kernels is None or not target.is_contiguous() or logits.shape[1] > MAX_LOSS_CLASSES:
        return None
    if weight is None:
        weight = torch.ones(logits.shape[1])
    return apply_loss(kernels, logits, target, weight, (entropy_factor, dice_factor))
