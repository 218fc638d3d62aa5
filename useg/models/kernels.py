"""Compiled layers for training in bf16 on a CPU; without a C compiler, PyTorch's own layers.

With torch 2.13, half of a training step of EfficientNet-Lite goes into layers that compute little:
the gradients of depthwise convolutions are many times slower than the memory allows, and batch
normalisation and its activation pass over the features again and again. ``kernels.c`` and
``convolutions.c`` compute them in as few passes as possible.

They are compiled when a network first needs them, in about a second, and loaded only if they
compute what PyTorch computes. ``USEG_KERNELS=off`` turns them off.
"""

from __future__ import annotations

import ctypes
import math
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from ctypes import c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Environment variable that turns the compiled layers off.
KERNELS_VARIABLE = "USEG_KERNELS"

SOURCES = ("kernels.c", "convolutions.c")
COMPILERS = ("cc", "gcc", "clang")
# OpenMP is not linked: its functions are those that PyTorch has loaded.
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC")
MAX_COMPILE_SECONDS = 900

# Relative difference to PyTorch's results in fp32, from rounding to bf16, which has 8 bits.
MAX_DIFFERENCE = 0.02

# Channels are computed in groups of so many.
LANES = 16

# Where the activations cut values off.
_LIMITS = {
    type(None): (-math.inf, math.inf),
    nn.ReLU: (0.0, math.inf),
    nn.ReLU6: (0.0, 6.0),
}

# Of the compiled loss.
MAX_LOSS_CLASSES = 256


class _Norm(ctypes.Structure):
    """A batch normalisation and its activation, as ``norm`` in ``kernels.c``."""

    _fields_ = (
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("running_mean", c_void_p),
        ("running_var", c_void_p),
        ("tracked", c_void_p),
        ("statistics", c_void_p),
        ("gradients", c_void_p),
        ("momentum", c_float),
        ("epsilon", c_float),
        ("low", c_float),
        ("high", c_float),
    )


_SIGNATURES = {
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


@cache
def load_kernels() -> ctypes.CDLL | None:
    """Compile and load the kernels; None where they cannot be used."""
    if os.environ.get(KERNELS_VARIABLE) == "off":
        return None
    given = os.environ.get("CC")
    found = next(filter(shutil.which, COMPILERS), None)
    compiler = shlex.split(given) if given else [found] if found else None
    if not compiler:
        return None
    try:
        with tempfile.TemporaryDirectory() as folder:
            kernels = _compile(compiler, Path(folder))
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None
    return kernels if _agrees(kernels) else None


def _compile(compiler: list[str], folder: Path) -> ctypes.CDLL:
    sources = [Path(__file__).with_name(name) for name in SOURCES]
    compiled, library = [folder / f"{source.stem}.o" for source in sources], folder / "k.so"
    for words in (
        *(
            [*FLAGS, "-c", str(source), "-o", str(each)]
            for source, each in zip(sources, compiled, strict=True)
        ),
        ["-shared", *map(str, compiled), "-o", str(library), "-lm"],
    ):
        subprocess.run(
            [*compiler, *words],
            check=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=MAX_COMPILE_SECONDS,
        )
    kernels = ctypes.CDLL(str(library))
    for name, types in _SIGNATURES.items():
        getattr(kernels, name).argtypes = types
    return kernels


def _agrees(kernels: ctypes.CDLL) -> bool:
    """Return whether the layers and their gradients are those of PyTorch in fp32."""
    random = torch.Generator().manual_seed(0)
    N, C, H, W = 2, 48, 10, 8
    features = (N, C, H, W), (N, 24, H // 2, W // 2), (N, 8, H, W)
    shapes = *features, (C, 1, 5, 5), (C, C, 3, 3), (C, 32, 3, 3)
    inputs = [
        torch.randn(shape, generator=random).contiguous(memory_format=torch.channels_last)
        for shape in shapes
    ]
    # The logits shall be near 1.
    inputs[-1] *= 0.05
    has_convolutions = kernels.useg_has_convolutions()
    target = (torch.arange(N * H * W) % C).view(N, H, W)
    results = []
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        for is_compiled in (True, False):
            norms = [nn.BatchNorm2d(C) for _ in range(5)]
            # Rounding moves features across the limits of ReLU6, where there are many.
            nn.init.constant_(norms[1].bias, 3)
            rounded = [x.bfloat16() if x.shape[0] == N else x for x in inputs]
            if not is_compiled:
                rounded = [x.float() for x in rounded]
            leaves = [x.clone().requires_grad_() for x in rounded]
            x, coarse, skip, weight, square, wide = leaves
            if is_compiled:
                y = _filter(x, weight, 1, norms[0], norms[1], nn.ReLU6(), kernels)
                y = _normalize(x, y, norms[2], None, kernels)
                if has_convolutions:
                    y = y + _convolve(x, square, norms[3], norms[4], nn.ReLU(), kernels)
                y = y + _RepeatedConvolution.apply(coarse, skip, wide, kernels)  # type: ignore[no-untyped-call]
                loss = _Loss.apply(y, target, torch.ones(C), 1.0, 1.0, kernels)  # type: ignore[no-untyped-call]
            else:
                y = F.conv2d(F.relu6(norms[0](x)), weight, None, 1, 2, 1, C)
                y = norms[2](x) + F.relu6(norms[1](y))
                if has_convolutions:
                    y = y + F.relu(norms[4](F.conv2d(F.relu(norms[3](x)), square, padding=1)))
                whole = torch.cat([F.interpolate(coarse, scale_factor=2.0), skip], 1)
                y = y + F.conv2d(whole, wide, padding=1)
                p, truth = y.softmax(1), F.one_hot(target, C).permute(0, 3, 1, 2)
                scores = 2 * (p * truth).sum((0, 2, 3)) / (p + truth).sum((0, 2, 3))
                loss = F.cross_entropy(y, target) + 1 - scores.mean()
            loss.backward()
            gradients = [each.grad for each in (*leaves, *(norm.bias for norm in norms))]
            variances = (norm.running_var for norm in norms)
            results.append([y.detach(), loss.detach(), *variances, *gradients])
    return all(
        float((found.float() - expected).norm() / expected.norm()) < MAX_DIFFERENCE
        for found, expected in zip(*results, strict=True)
        if found is not None and expected is not None
    )


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
    return _normalize(x, residual, norm, activation, kernels)


def filter_normalized(
    before: nn.BatchNorm2d | None,
    conv: nn.Conv2d,
    after: nn.BatchNorm2d | None,
    activation: nn.Module,
    x: Tensor,
) -> Tensor | None:
    """Normalise, apply a depthwise convolution with TensorFlow's ``same`` padding, normalise.

    The layer's own padding does not count: with stride 2 there is one pixel more after the image
    than before it.

    Args:
        before: The first normalisation, or None for x as it is.
        conv: The convolution, without a bias.
        after: The second normalisation, or None.
        activation: ReLU or ReLU6, after either normalisation.
        x: (N, C, H, W).

    Returns:
        (N, C, H / stride, W / stride), or None if PyTorch has to compute it.
    """
    N, C, H, W = x.shape
    stride = conv.stride[0]
    is_simple = all(norm is None or _is_simple(norm) for norm in (before, after))
    kernels = _usable_kernels(x) if is_simple and conv.training else None
    if (
        kernels is None
        or conv.kernel_size not in ((3, 3), (5, 5))
        or C % LANES
        or stride * stride >= N * H * W
    ):
        return None
    return _filter(x, conv.weight, stride, before, after, activation, kernels)


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
                return _convolve(x, conv.weight, before, after, last, kernels), iter(layers[5:])
    return x, iter(layers)


def _takes_convolution(kernels: ctypes.CDLL, x: Tensor, out_channels: int) -> bool:
    """Return whether there is a compiled convolution from (N, C, H, W) to D channels."""
    _, C, _, W = x.shape
    # Pairs of pixels are multiplied at once.
    fits = not (C % LANES or out_channels % LANES or W % 2)
    return fits and bool(kernels.useg_has_convolutions())


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
    y: Tensor = _RepeatedConvolution.apply(x, skip, conv.weight, kernels)  # type: ignore[no-untyped-call]
    return y


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
    loss: Tensor = _Loss.apply(logits, target, weight, entropy_factor, dice_factor, kernels)  # type: ignore[no-untyped-call]
    return loss


def _describe(
    norm: nn.BatchNorm2d | None, activation: nn.Module | None
) -> tuple[_Norm | None, Tensor | None]:
    """Return a normalisation as ``kernels.c`` takes it, and its statistics, yet to be computed."""
    if norm is None:
        return None, None
    statistics = torch.empty(4, norm.num_features)
    tensors = norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked
    pointers = (tensor.data_ptr() for tensor in tensors if tensor is not None)
    numbers = norm.momentum, norm.eps, *_LIMITS[type(activation)]
    return _Norm(*pointers, statistics.data_ptr(), None, *numbers), statistics


def _make_gradients(norm: _Norm | None, statistics: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of weight and bias, yet to be computed."""
    if norm is None or statistics is None:
        return None, None
    gradients = torch.empty(2, statistics.shape[1])
    norm.gradients = gradients.data_ptr()
    return gradients[0], gradients[1]


def _normalize(
    x: Tensor,
    residual: Tensor | None,
    norm: nn.BatchNorm2d,
    activation: nn.Module | None,
    kernels: ctypes.CDLL,
) -> Tensor:
    parameters = norm.weight, norm.bias
    y: Tensor = _NormActivation.apply(x, residual, *parameters, norm, activation, kernels)  # type: ignore[no-untyped-call]
    return y


def _filter(
    x: Tensor,
    weight: Tensor,
    stride: int,
    before: nn.BatchNorm2d | None,
    after: nn.BatchNorm2d | None,
    activation: nn.Module,
    kernels: ctypes.CDLL,
) -> Tensor:
    N, C, H, W = x.shape
    kernel = weight.shape[-1]
    out_size = -(-H // stride), -(-W // stride)
    sizes = (c_int64 * 9)(N, H, W, C, kernel, stride, (kernel - stride) // 2, *out_size)
    functions = kernels.useg_filter_forward, kernels.useg_filter_backward
    shape = N, C, *out_size
    return _call(x, weight, (before, after), activation, shape, sizes, functions)


def _convolve(
    x: Tensor,
    weight: Tensor,
    before: nn.BatchNorm2d | None,
    after: nn.BatchNorm2d | None,
    activation: nn.Module,
    kernels: ctypes.CDLL,
) -> Tensor:
    N, C, H, W = x.shape
    sizes = (c_int64 * 7)(N, H, W, C, weight.shape[0], C, False)
    functions = kernels.useg_convolution_forward, kernels.useg_convolution_backward
    shape = N, weight.shape[0], H, W
    return _call(x, weight, (before, after), activation, shape, sizes, functions)


def _call(
    x: Tensor,
    weight: Tensor,
    norms: tuple[nn.BatchNorm2d | None, nn.BatchNorm2d | None],
    activation: nn.Module,
    shape: tuple[int, ...],
    sizes: Any,
    functions: tuple[Any, Any],
) -> Tensor:
    """Call functions of a convolution between two normalisations; y has the given shape."""
    # What has a gradient is an argument.
    parameters = [
        parameter
        for norm in norms
        for parameter in ((None, None) if norm is None else (norm.weight, norm.bias))
    ]
    rest = norms, activation, shape, sizes, functions
    y: Tensor = _NormalizedConvolution.apply(x, weight, *parameters, *rest)  # type: ignore[no-untyped-call]
    return y


class _NormActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        norm: nn.BatchNorm2d,
        activation: nn.Module | None,
        kernels: ctypes.CDLL,
    ) -> Tensor:
        N, C, H, W = x.shape
        y = torch.empty_like(x)
        ctx.norm, statistics = _describe(norm, activation)
        _check(
            kernels.useg_norm_forward(
                ctypes.byref(ctx.norm),
                x.data_ptr(),
                None if residual is None else residual.data_ptr(),
                y.data_ptr(),
                N * H * W,
                C,
            )
        )
        ctx.save_for_backward(x, statistics)
        ctx.kernels, ctx.is_sum = kernels, residual is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, statistics = ctx.saved_tensors
        N, C, H, W = x.shape
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        x_gradient, gradients = torch.empty_like(x), _make_gradients(ctx.norm, statistics)
        _check(
            ctx.kernels.useg_norm_backward(
                ctypes.byref(ctx.norm),
                x.data_ptr(),
                gradient.data_ptr(),
                x_gradient.data_ptr(),
                N * H * W,
                C,
            )
        )
        return x_gradient, gradient if ctx.is_sum else None, *gradients, None, None, None


class _NormalizedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        before_weight: Tensor | None,
        before_bias: Tensor | None,
        after_weight: Tensor | None,
        after_bias: Tensor | None,
        norms: tuple[nn.BatchNorm2d | None, nn.BatchNorm2d | None],
        activation: nn.Module,
        shape: tuple[int, ...],
        sizes: Any,
        functions: tuple[Any, Any],
    ) -> Tensor:
        weight = weight.contiguous(memory_format=torch.channels_last)
        convolved = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        y = convolved if norms[1] is None else torch.empty_like(convolved)
        (ctx.before, before_statistics), (ctx.after, after_statistics) = (
            _describe(norm, activation) for norm in norms
        )
        _check(
            functions[0](
                sizes,
                *map(_address, (ctx.before, ctx.after)),
                *(each.data_ptr() for each in (x, weight, convolved, y)),
            )
        )
        ctx.save_for_backward(x, weight, convolved, before_statistics, after_statistics)
        ctx.sizes, ctx.function = sizes, functions[1]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, convolved, before_statistics, after_statistics = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        x_gradient, weight_gradient = torch.empty_like(x), torch.empty_like(weight)
        of_before = _make_gradients(ctx.before, before_statistics)
        of_after = _make_gradients(ctx.after, after_statistics)
        _check(
            ctx.function(
                ctx.sizes,
                *map(_address, (ctx.before, ctx.after)),
                *(
                    each.data_ptr()
                    for each in (x, weight, convolved, gradient, x_gradient, weight_gradient)
                ),
            )
        )
        return x_gradient, weight_gradient, *of_before, *of_after, *[None] * 5


class _RepeatedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, skip: Tensor | None, weight: Tensor, kernels: ctypes.CDLL
    ) -> Tensor:
        C, D, S = x.shape[1], weight.shape[0], weight.shape[1] - x.shape[1]
        weight = weight.contiguous(memory_format=torch.channels_last)
        sums = torch.empty((C, D, 4, 4), dtype=x.dtype, memory_format=torch.channels_last)
        ctx.sizes = rest = None
        if skip is not None and _takes_convolution(kernels, skip, D):
            ctx.sizes = (c_int64 * 7)(*(skip.shape[k] for k in (0, 2, 3, 1)), D, C + S, True)
        elif skip is not None:
            rest = torch.empty((D, S, 3, 3), dtype=x.dtype, memory_format=torch.channels_last)
        to_rest = None if rest is None else rest.data_ptr()
        kernels.useg_upsampling_weights(weight.data_ptr(), D, C, S, sums.data_ptr(), to_rest)
        y = F.conv_transpose2d(x, sums, stride=2, padding=1)
        if skip is not None and ctx.sizes is not None:
            pointers = skip.data_ptr(), _skip_weights(weight, C), y.data_ptr(), y.data_ptr()
            _check(kernels.useg_convolution_forward(ctx.sizes, None, None, *pointers))
        elif skip is not None and rest is not None:
            y += F.conv2d(skip, rest, padding=1)
        ctx.save_for_backward(x, skip, weight, sums, rest)
        ctx.kernels = kernels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, skip, weight, sums, rest = ctx.saved_tensors
        (C, D), S = sums.shape[:2], weight.shape[1] - x.shape[1]
        needed, kernels = ctx.needs_input_grad, ctx.kernels
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        x_gradient, of_sums, _ = torch.ops.aten.convolution_backward(
            *(gradient, x, sums, None, [2, 2], [1, 1], [1, 1], True, [0, 0], 1),
            [needed[0], True, False],
        )
        of_sums = of_sums.contiguous(memory_format=torch.channels_last)
        skip_gradient, of_rest = None, rest
        weight_gradient = torch.empty_like(weight)
        if ctx.sizes is not None:
            skip_gradient = torch.empty_like(skip)
            read = skip.data_ptr(), _skip_weights(weight, C), None, gradient.data_ptr()
            written = skip_gradient.data_ptr(), _skip_weights(weight_gradient, C)
            _check(kernels.useg_convolution_backward(ctx.sizes, None, None, *read, *written))
        elif skip is not None:
            skip_gradient, of_rest, _ = torch.ops.aten.convolution_backward(
                *(gradient, skip, rest, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
                [needed[1], True, False],
            )
            of_rest = of_rest.contiguous(memory_format=torch.channels_last)
        kernels.useg_upsampling_weight_gradient(
            of_sums.data_ptr(),
            None if of_rest is None else of_rest.data_ptr(),
            *(D, C, S, weight_gradient.data_ptr()),
        )
        return x_gradient, skip_gradient, weight_gradient, None


def _skip_weights(weight: Tensor, channels: int) -> int:
    """Return where the weights (D, C + S, 3, 3) of the skip connection begin."""
    return weight.data_ptr() + channels * weight.element_size()


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor,
        entropy_factor: float,
        dice_factor: float,
        kernels: ctypes.CDLL,
    ) -> Tensor:
        num_classes = logits.shape[1]
        loss, coefficients = torch.empty(()), torch.empty(2 * num_classes + 1)
        _check(
            kernels.useg_loss_forward(
                logits.data_ptr(),
                target.data_ptr(),
                target.numel(),
                num_classes,
                weight.data_ptr(),
                entropy_factor,
                dice_factor,
                loss.data_ptr(),
                coefficients.data_ptr(),
            )
        )
        ctx.save_for_backward(logits, target, weight, coefficients)
        ctx.kernels = kernels
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, weight, coefficients = ctx.saved_tensors
        logits_gradient = torch.empty_like(logits)
        _check(
            ctx.kernels.useg_loss_backward(
                logits.data_ptr(),
                target.data_ptr(),
                target.numel(),
                logits.shape[1],
                weight.data_ptr(),
                coefficients.data_ptr(),
                float(gradient),
                logits_gradient.data_ptr(),
            )
        )
        return logits_gradient, None, None, None, None, None


def _address(norm: _Norm | None) -> Any:
    return None if norm is None else ctypes.byref(norm)


def _check(status: int) -> None:
    if status:
        raise MemoryError("a compiled layer got no memory")
