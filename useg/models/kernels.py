"""Compiled layers for training in bf16 on a CPU; without a C compiler, PyTorch's own layers.

With torch 2.13, half of a training step of EfficientNet-Lite goes into layers that compute little:
the gradients of depthwise convolutions are many times slower than the memory allows, and batch
normalisation and its activation pass over the features again and again. ``kernels.c`` computes
them in as few passes as possible.

It is compiled when a network first needs it, in about a second, and loaded only if it computes
what PyTorch computes. ``USEG_KERNELS=off`` turns it off.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Environment variable that turns the compiled layers off.
KERNELS_VARIABLE = "USEG_KERNELS"

COMPILERS = ("cc", "gcc", "clang")
# OpenMP is not linked: its functions are those that PyTorch has loaded.
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC")
MAX_COMPILE_SECONDS = 900

# Relative difference to PyTorch's results in fp32, from rounding to bf16, which has 8 bits.
MAX_DIFFERENCE = 0.01

# Channels are computed in groups of so many.
LANES = 16

# Of the compiled loss.
MAX_LOSS_CLASSES = 256

_DEPTHWISE = (*[c_void_p] * 3, *[c_int64] * 9)
_SIGNATURES = {
    # x, residual, y, pixels, channels, weight, bias, three statistics, momentum, epsilon, kind,
    # mean, scale
    "useg_norm_forward": (
        *(*[c_void_p] * 3, c_int64, c_int64, *[c_void_p] * 5, c_float, c_float, c_int),
        *(c_void_p, c_void_p),
    ),
    # x, gradient, its result, pixels, channels, mean, scale, kind, gradients of weight and bias
    "useg_norm_backward": (
        *(*[c_void_p] * 3, c_int64, c_int64, c_void_p, c_void_p, c_int),
        *(c_void_p, c_void_p),
    ),
    # Two inputs, the output, the sizes.
    "useg_depthwise_forward": _DEPTHWISE,
    "useg_depthwise_input_gradient": _DEPTHWISE,
    "useg_depthwise_weight_gradient": _DEPTHWISE,
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
    source, compiled, library = Path(__file__).with_suffix(".c"), folder / "k.o", folder / "k.so"
    for words in (
        [*FLAGS, "-c", str(source), "-o", str(compiled)],
        ["-shared", str(compiled), "-o", str(library), "-lm"],
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
    K = 48
    x = torch.randn(2, K, 9, 7, generator=random).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(K, 1, 5, 5, generator=random)
    target = (torch.arange(2 * 9 * 7) % K).view(2, 9, 7)
    results = []
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        for is_compiled in (True, False):
            norm, w = nn.BatchNorm2d(K), weight.clone().requires_grad_()
            a = x.bfloat16() if is_compiled else x.bfloat16().float()
            a.requires_grad_()
            if is_compiled:
                y = _Depthwise.apply(a, w, 1, 2, kernels)  # type: ignore[no-untyped-call]
                y = _NormActivation.apply(y, norm.weight, norm.bias, None, norm, 2, kernels)  # type: ignore[no-untyped-call]
                loss = _Loss.apply(y, target, torch.ones(K), 1.0, 1.0, kernels)  # type: ignore[no-untyped-call]
            else:
                y = F.relu6(norm(F.conv2d(a, w, None, 1, 2, 1, K)))
                p, truth = y.softmax(1), F.one_hot(target, K).permute(0, 3, 1, 2)
                scores = 2 * (p * truth).sum((0, 2, 3)) / (p + truth).sum((0, 2, 3))
                loss = F.cross_entropy(y, target) + 1 - scores.mean()
            loss.backward()
            gradients = a.grad, w.grad, norm.weight.grad
            results.append([y.detach(), loss.detach(), norm.running_var, *gradients])
    return all(
        float((found.float() - expected).norm() / expected.norm()) < MAX_DIFFERENCE
        for found, expected in zip(*results, strict=True)
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
    # In a group of processes the layer has another class.
    is_simple = type(norm) is nn.BatchNorm2d and norm.training and x.numel() > x.shape[1]
    kernels = _usable_kernels(x) if is_simple else None
    if kernels is None:
        return None
    if residual is not None:
        residual = residual.to(x.dtype).contiguous(memory_format=torch.channels_last)
    kind = {type(None): 0, nn.ReLU: 1, nn.ReLU6: 2}[type(activation)]
    normalized: Tensor = _NormActivation.apply(  # type: ignore[no-untyped-call]
        x, norm.weight, norm.bias, residual, norm, kind, kernels
    )
    return normalized


def filter_channels(conv: nn.Conv2d, x: Tensor) -> Tensor | None:
    """Apply a depthwise convolution whose padding is TensorFlow's ``same``.

    The layer's own padding does not count: with stride 2 there is one pixel more after the image
    than before it.

    Returns:
        (N, C, H / stride, W / stride), or None if PyTorch has to compute it.
    """
    kernels = _usable_kernels(x) if conv.training else None
    if kernels is None or conv.kernel_size not in ((3, 3), (5, 5)) or x.shape[1] % LANES:
        return None
    stride = conv.stride[0]
    padding = (conv.kernel_size[0] - stride) // 2
    y: Tensor = _Depthwise.apply(x, conv.weight, stride, padding, kernels)  # type: ignore[no-untyped-call]
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


class _NormActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        norm: nn.BatchNorm2d,
        kind: int,
        kernels: ctypes.CDLL,
    ) -> Tensor:
        N, C, H, W = x.shape
        y = torch.empty_like(x)
        # Mean and 1 / deviation; scale and offset.
        statistics = torch.empty(4, C)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        _check(
            kernels.useg_norm_forward(
                x.data_ptr(),
                None if residual is None else residual.data_ptr(),
                y.data_ptr(),
                N * H * W,
                C,
                weight.data_ptr(),
                bias.data_ptr(),
                norm.running_mean.data_ptr(),
                norm.running_var.data_ptr(),
                norm.num_batches_tracked.data_ptr(),
                norm.momentum,
                norm.eps,
                kind,
                statistics.data_ptr(),
                statistics[2].data_ptr(),
            )
        )
        ctx.save_for_backward(x, statistics)
        ctx.kind, ctx.kernels, ctx.is_sum = kind, kernels, residual is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, statistics = ctx.saved_tensors
        N, C, H, W = x.shape
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        x_gradient, gradients = torch.empty_like(x), torch.empty(2, C)
        _check(
            ctx.kernels.useg_norm_backward(
                x.data_ptr(),
                gradient.data_ptr(),
                x_gradient.data_ptr(),
                N * H * W,
                C,
                statistics.data_ptr(),
                statistics[2].data_ptr(),
                ctx.kind,
                gradients[0].data_ptr(),
                gradients[1].data_ptr(),
            )
        )
        of_residual = gradient if ctx.is_sum else None
        return x_gradient, gradients[0], gradients[1], of_residual, None, None, None


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int, kernels: ctypes.CDLL
    ) -> Tensor:
        N, C, H, W = x.shape
        out_size = -(-H // stride), -(-W // stride)
        weight = weight.contiguous()
        ctx.sizes = N, H, W, C, weight.shape[-1], stride, padding, *out_size
        y = torch.empty((N, C, *out_size), dtype=x.dtype, memory_format=torch.channels_last)
        _check(
            kernels.useg_depthwise_forward(
                x.data_ptr(), weight.data_ptr(), y.data_ptr(), *ctx.sizes
            )
        )
        ctx.save_for_backward(x, weight)
        ctx.kernels = kernels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        x_gradient, weight_gradient = torch.empty_like(x), torch.empty_like(weight)
        for function, inputs in (
            (ctx.kernels.useg_depthwise_input_gradient, (gradient, weight, x_gradient)),
            (ctx.kernels.useg_depthwise_weight_gradient, (x, gradient, weight_gradient)),
        ):
            _check(function(*(each.data_ptr() for each in inputs), *ctx.sizes))
        return x_gradient, weight_gradient, None, None, None


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


def _check(status: int) -> None:
    if status:
        raise MemoryError("a compiled layer got no memory")
