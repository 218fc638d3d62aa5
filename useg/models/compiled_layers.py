"""Compiled versions of single layers for training, as autograd functions.

Features in bf16, channels last, in; the same out. Each compiled function has a Python function
beside it, which makes the results' tensors. What PyTorch needs for gradients is at the end.
:mod:`useg.models.kernels` compiles the functions and decides where they are used.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Channels are computed in groups of this size.
LANES = 16

# Channels of 1x1 convolutions are multiples of this.
PAIRED = 8

# The compiled loss takes at most this many classes.
MAX_LOSS_CLASSES = 256

# Lower and upper limit of the output of each activation.
_LIMITS = {
    type(None): (-math.inf, math.inf),
    nn.ReLU: (0.0, math.inf),
    nn.ReLU6: (0.0, 6.0),
}

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


class NormStructure(ctypes.Structure):
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


def describe_norm(
    norm: nn.BatchNorm2d, activation: nn.Module | None, statistics: int
) -> NormStructure:
    """Describe a normalisation whose statistics are written to an address, and read from there."""
    parameters, buffers = norm._parameters.values(), norm._buffers.values()
    pointers = [tensor.data_ptr() for tensor in (*parameters, *buffers) if tensor is not None]
    return NormStructure(
        *pointers, statistics, None, norm.momentum, norm.eps, *_LIMITS[type(activation)]
    )


class _Normalization:
    """A batch normalisation and its activation in one step of training.

    The forward pass writes the statistics, the backward pass reads them.
    """

    def __init__(self, norm: nn.BatchNorm2d, activation: nn.Module | None) -> None:
        self.statistics = torch.empty(4, norm.num_features)
        self.values = describe_norm(norm, activation, self.statistics.data_ptr())
        # What ctypes passes to a function.
        self._as_parameter_ = ctypes.byref(self.values)

    def make_gradients(self) -> tuple[Tensor, Tensor]:
        """Return the gradients of weight and bias, yet to be computed."""
        gradients = torch.empty(2, self.statistics.shape[1])
        self.values.gradients = gradients.data_ptr()
        return gradients[0], gradients[1]


_Normalizations = tuple[_Normalization | None, _Normalization | None]


@dataclass(frozen=True)
class _Convolution:
    """Compiled functions of a convolution between two normalisations, for features of one size.

    Args:
        forward: The function.
        backward: That of its gradients.
        sizes: Their first argument.
        shape: The shape of the result.
    """

    forward: Any
    backward: Any
    sizes: Any
    shape: tuple[int, ...]


def depthwise_convolution(
    kernels: ctypes.CDLL, x: Tensor, weight: Tensor, stride: int
) -> _Convolution:
    """Return a depthwise convolution of (N, C, H, W)."""
    N, C, H, W = x.shape
    sizes = filter_sizes((N, H, W), weight, stride)
    functions = kernels.useg_filter_forward, kernels.useg_filter_backward
    return _Convolution(*functions, (c_int64 * 9)(*sizes), (N, C, *sizes[-2:]))


def filter_sizes(shape: Sequence[int], weight: Tensor, stride: int) -> tuple[int, ...]:
    """Return what the depthwise convolution needs to know, with the size of its result last."""
    (N, H, W), C, kernel = shape, weight.shape[0], weight.shape[-1]
    return N, H, W, C, kernel, stride, (kernel - stride) // 2, -(-H // stride), -(-W // stride)


def square_convolution(kernels: ctypes.CDLL, x: Tensor, weight: Tensor) -> _Convolution:
    """Return a 3x3 convolution of (N, C, H, W)."""
    N, C, H, W = x.shape
    sizes = (c_int64 * 5)(N, H, W, C, weight.shape[0])
    functions = kernels.useg_convolution_forward, kernels.useg_convolution_backward
    return _Convolution(*functions, sizes, (N, weight.shape[0], H, W))


def _convolve(
    conv: _Convolution, norms: _Normalizations, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what the backward pass needs, and the result."""
    convolved = torch.empty(conv.shape, dtype=x.dtype, memory_format=torch.channels_last)
    y = convolved if norms[1] is None else torch.empty_like(convolved)
    pointers = (each.data_ptr() for each in (x, weight, convolved, y))
    check_status(conv.forward(conv.sizes, *norms, *pointers))
    return convolved, y


def _convolve_backward(
    conv: _Convolution,
    norms: _Normalizations,
    x: Tensor,
    weight: Tensor,
    convolved: Tensor,
    gradient: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight."""
    x_gradient, weight_gradient = torch.empty_like(x), torch.empty_like(weight)
    tensors = x, weight, convolved, gradient, x_gradient, weight_gradient
    check_status(conv.backward(conv.sizes, *norms, *(each.data_ptr() for each in tensors)))
    return x_gradient, weight_gradient


def apply_norm(
    kernels: ctypes.CDLL,
    x: Tensor,
    residual: Tensor | None,
    norm: nn.BatchNorm2d,
    activation: nn.Module | None,
) -> Tensor:
    """Normalise (N, C, H, W), then apply the activation or add the residual."""
    parameters = norm.weight, norm.bias
    return _call(_NormActivation, x, residual, *parameters, norm, activation, kernels)


def apply_convolution(
    conv: _Convolution,
    x: Tensor,
    weight: Tensor,
    norms: Sequence[nn.BatchNorm2d | None],
    activation: nn.Module,
) -> Tensor:
    """Apply a convolution between two normalisations, or none."""
    rest = conv, norms, activation
    return _call(_NormalizedConvolution, x, weight, *list_parameters(norms), *rest)


def apply_repeated(kernels: ctypes.CDLL, x: Tensor, skip: Tensor | None, weight: Tensor) -> Tensor:
    """Repeat each pixel of x, concatenate the skip connection, and convolve with 3x3."""
    return _call(_RepeatedConvolution, x, skip, weight, kernels)


def apply_loss(
    kernels: ctypes.CDLL, logits: Tensor, target: Tensor, weight: Tensor, factors: Sequence[float]
) -> Tensor:
    """Return cross-entropy and Dice loss, each times its factor, added."""
    return _call(_Loss, logits, target, weight, *factors, kernels)


def _call(function: type[torch.autograd.Function], *inputs: object) -> Tensor:
    result: Tensor = function.apply(*inputs)  # type: ignore[no-untyped-call]
    return result


def takes_convolution(kernels: ctypes.CDLL, x: Tensor, out_channels: int) -> bool:
    """Return whether there is a compiled 3x3 convolution from (N, C, H, W) to D channels."""
    _, C, _, W = x.shape
    # Pairs of pixels are multiplied at once.
    fits = not (C % LANES or out_channels % LANES or W % 2)
    return fits and bool(kernels.useg_has_convolutions())


def list_parameters(norms: Sequence[nn.BatchNorm2d | None]) -> list[Tensor | None]:
    """Return weights and biases: what has a gradient is an argument of a function of autograd."""
    return [
        parameter
        for norm in norms
        for parameter in ((None, None) if norm is None else (norm.weight, norm.bias))
    ]


def _describe(
    norms: Sequence[nn.BatchNorm2d | None], activation: nn.Module | None
) -> _Normalizations:
    before, after = (None if norm is None else _Normalization(norm, activation) for norm in norms)
    return before, after


def _make_gradients(norms: Sequence[_Normalization | None]) -> list[Tensor | None]:
    return [
        each for norm in norms for each in ((None, None) if norm is None else norm.make_gradients())
    ]


def to_channels_last(x: Tensor) -> Tensor:
    """Return a tensor (N, C, H, W) in this order of memory."""
    return x.contiguous(memory_format=torch.channels_last)


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
        ctx.norm, ctx.kernels = _Normalization(norm, activation), kernels
        ctx.is_sum = residual is not None
        ctx.save_for_backward(x)
        (N, C, H, W), y = x.shape, torch.empty_like(x)
        to_residual = None if residual is None else residual.data_ptr()
        pointers = x.data_ptr(), to_residual, y.data_ptr()
        check_status(kernels.useg_norm_forward(ctx.norm, *pointers, N * H * W, C))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,), gradient = ctx.saved_tensors, to_channels_last(gradient)
        gradients = ctx.norm.make_gradients()
        (N, C, H, W), x_gradient = x.shape, torch.empty_like(x)
        pointers = x.data_ptr(), gradient.data_ptr(), x_gradient.data_ptr()
        check_status(ctx.kernels.useg_norm_backward(ctx.norm, *pointers, N * H * W, C))
        return x_gradient, gradient if ctx.is_sum else None, *gradients, None, None, None


class _NormalizedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        # Before it: the parameters of the normalisations.
        *_, ctx.conv, norms, activation = rest
        ctx.norms = _describe(norms, activation)
        weight = to_channels_last(weight)
        convolved, y = _convolve(ctx.conv, ctx.norms, x, weight)
        ctx.save_for_backward(x, weight, convolved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _make_gradients(ctx.norms)
        tensors = *ctx.saved_tensors, to_channels_last(gradient)
        return *_convolve_backward(ctx.conv, ctx.norms, *tensors), *gradients, None, None, None


class _RepeatedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, skip: Tensor | None, weight: Tensor, kernels: ctypes.CDLL
    ) -> Tensor:
        C, D, S = x.shape[1], weight.shape[0], weight.shape[1] - x.shape[1]
        weight = to_channels_last(weight)
        sums = torch.empty((C, D, 4, 4), dtype=x.dtype, memory_format=torch.channels_last)
        rest = None
        if skip is not None:
            rest = torch.empty((D, S, 3, 3), dtype=x.dtype, memory_format=torch.channels_last)
        to_rest = None if rest is None else rest.data_ptr()
        kernels.useg_upsampling_weights(weight.data_ptr(), D, C, S, sums.data_ptr(), to_rest)
        y = F.conv_transpose2d(x, sums, stride=2, padding=1)
        if skip is not None and rest is not None:
            y += F.conv2d(skip, rest, padding=1)
        ctx.save_for_backward(x, skip, weight, sums, rest)
        ctx.kernels = kernels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, skip, weight, sums, rest = ctx.saved_tensors
        (C, D), S = sums.shape[:2], weight.shape[1] - x.shape[1]
        needed, gradient = ctx.needs_input_grad, to_channels_last(gradient)
        x_gradient, of_sums, _ = torch.ops.aten.convolution_backward(
            *(gradient, x, sums, None, [2, 2], [1, 1], [1, 1], True, [0, 0], 1),
            [needed[0], True, False],
        )
        of_sums = to_channels_last(of_sums)
        skip_gradient, of_rest = None, rest
        weight_gradient = torch.empty_like(weight)
        if skip is not None:
            skip_gradient, of_rest, _ = torch.ops.aten.convolution_backward(
                *(gradient, skip, rest, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
                [needed[1], True, False],
            )
            of_rest = to_channels_last(of_rest)
        ctx.kernels.useg_upsampling_weight_gradient(
            of_sums.data_ptr(),
            None if of_rest is None else of_rest.data_ptr(),
            *(D, C, S, weight_gradient.data_ptr()),
        )
        return x_gradient, skip_gradient, weight_gradient, None


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
        check_status(
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
        check_status(
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


def check_status(status: int) -> None:
    """Raise a MemoryError if a compiled function has failed."""
    if status:
        raise MemoryError("a compiled layer could not allocate memory")
