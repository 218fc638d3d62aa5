"""Layers of a network in training, computed by compiled functions, as functions of autograd.

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

# Channels are computed in groups of so many.
LANES = 16

# Channels of 1x1 convolutions are multiples of this.
PAIRED = 8

# Of the compiled loss.
MAX_LOSS_CLASSES = 256

# Where the activations cut values off.
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
    # sizes, x, weight, y
    "useg_pointwise_forward": (c_void_p,) * 4,
    # sizes, x, weight, gradient, what is added to that of x; then the gradients of x and weight
    "useg_pointwise_backward": (c_void_p,) * 7,
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


class _Normalization:
    """A batch normalisation and its activation in one step of training.

    The forward pass writes the statistics, the backward pass reads them.
    """

    def __init__(self, norm: nn.BatchNorm2d, activation: nn.Module | None) -> None:
        self.statistics = torch.empty(4, norm.num_features)
        tensors = (
            *(norm.weight, norm.bias, norm.running_mean, norm.running_var),
            *(norm.num_batches_tracked, self.statistics),
        )
        pointers = (tensor.data_ptr() for tensor in tensors if tensor is not None)
        numbers = norm.momentum, norm.eps, *_LIMITS[type(activation)]
        self.values = _Norm(*pointers, None, *numbers)
        # What ctypes passes to a function.
        self._as_parameter_ = ctypes.byref(self.values)

    def make_gradients(self) -> tuple[Tensor, Tensor]:
        """Return the gradients of weight and bias, yet to be computed."""
        gradients = torch.empty(2, self.statistics.shape[1])
        self.values.gradients = gradients.data_ptr()
        return gradients[0], gradients[1]


_Normalizations = tuple[_Normalization | None, _Normalization | None]


def _normalize(
    kernels: ctypes.CDLL, norm: _Normalization, x: Tensor, residual: Tensor | None
) -> Tensor:
    N, C, H, W = x.shape
    y, to_residual = torch.empty_like(x), None if residual is None else residual.data_ptr()
    _check(kernels.useg_norm_forward(norm, x.data_ptr(), to_residual, y.data_ptr(), N * H * W, C))
    return y


def _normalize_backward(
    kernels: ctypes.CDLL, norm: _Normalization, x: Tensor, gradient: Tensor
) -> Tensor:
    N, C, H, W = x.shape
    x_gradient = torch.empty_like(x)
    pointers = (each.data_ptr() for each in (x, gradient, x_gradient))
    _check(kernels.useg_norm_backward(norm, *pointers, N * H * W, C))
    return x_gradient


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
    kernel = weight.shape[-1]
    out_size = -(-H // stride), -(-W // stride)
    sizes = (c_int64 * 9)(N, H, W, C, kernel, stride, (kernel - stride) // 2, *out_size)
    functions = kernels.useg_filter_forward, kernels.useg_filter_backward
    return _Convolution(*functions, sizes, (N, C, *out_size))


def square_convolution(kernels: ctypes.CDLL, x: Tensor, weight: Tensor) -> _Convolution:
    """Return a 3x3 convolution of (N, C, H, W)."""
    N, C, H, W = x.shape
    sizes = (c_int64 * 7)(N, H, W, C, weight.shape[0], C, False)
    functions = kernels.useg_convolution_forward, kernels.useg_convolution_backward
    return _Convolution(*functions, sizes, (N, weight.shape[0], H, W))


def _convolve(
    conv: _Convolution, norms: _Normalizations, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what the backward pass needs, and the result."""
    convolved = torch.empty(conv.shape, dtype=x.dtype, memory_format=torch.channels_last)
    y = convolved if norms[1] is None else torch.empty_like(convolved)
    pointers = (each.data_ptr() for each in (x, weight, convolved, y))
    _check(conv.forward(conv.sizes, *norms, *pointers))
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
    _check(conv.backward(conv.sizes, *norms, *(each.data_ptr() for each in tensors)))
    return x_gradient, weight_gradient


def _multiply(kernels: ctypes.CDLL, x: Tensor, weight: Tensor) -> Tensor:
    """Apply a 1x1 convolution."""
    (N, C, H, W), D = x.shape, weight.shape[0]
    y = torch.empty((N, D, H, W), dtype=x.dtype, memory_format=torch.channels_last)
    sizes = (c_int64 * 3)(N * H * W, C, D)
    _check(kernels.useg_pointwise_forward(sizes, *(each.data_ptr() for each in (x, weight, y))))
    return y


def _multiply_backward(
    kernels: ctypes.CDLL, x: Tensor, weight: Tensor, gradient: Tensor, added: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, plus ``added``, and that of the weight."""
    (N, C, H, W), D = x.shape, weight.shape[0]
    x_gradient, weight_gradient = torch.empty_like(x), torch.empty_like(weight)
    sizes = (c_int64 * 3)(N * H * W, C, D)
    read = x.data_ptr(), weight.data_ptr(), gradient.data_ptr()
    to_added = None if added is None else added.data_ptr()
    written = x_gradient.data_ptr(), weight_gradient.data_ptr()
    _check(kernels.useg_pointwise_backward(sizes, *read, to_added, *written))
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
    return _call(_NormalizedConvolution, x, weight, *_parameters(norms), *rest)


def apply_inverted_residual(
    kernels: ctypes.CDLL,
    x: Tensor,
    weights: Sequence[Tensor | None],
    stride: int,
    norms: Sequence[nn.BatchNorm2d | None],
    activation: nn.Module,
    *,
    is_sum: bool,
) -> Tensor:
    """Expand, apply a depthwise convolution, project; each is normalised.

    Args:
        kernels: The compiled functions.
        x: (N, C, H, W).
        weights: Those of the three convolutions; None instead of the first: do not expand.
        stride: That of the depthwise convolution.
        norms: The three normalisations.
        activation: After the first two of them.
        is_sum: Whether x is added to the result.
    """
    rest = stride, norms, activation, is_sum, kernels
    return _call(_InvertedResidual, x, *weights, *_parameters(norms), *rest)


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


def _parameters(norms: Sequence[nn.BatchNorm2d | None]) -> list[Tensor | None]:
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


def _channels_last(x: Tensor) -> Tensor:
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
        return _normalize(kernels, ctx.norm, x, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,), gradient = ctx.saved_tensors, _channels_last(gradient)
        gradients = ctx.norm.make_gradients()
        x_gradient = _normalize_backward(ctx.kernels, ctx.norm, x, gradient)
        return x_gradient, gradient if ctx.is_sum else None, *gradients, None, None, None


class _NormalizedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        # Before it: the parameters of the normalisations.
        *_, ctx.conv, norms, activation = rest
        ctx.norms = _describe(norms, activation)
        weight = _channels_last(weight)
        convolved, y = _convolve(ctx.conv, ctx.norms, x, weight)
        ctx.save_for_backward(x, weight, convolved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _make_gradients(ctx.norms)
        tensors = *ctx.saved_tensors, _channels_last(gradient)
        return *_convolve_backward(ctx.conv, ctx.norms, *tensors), *gradients, None, None, None


class _InvertedResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        expand: Tensor | None,
        depthwise: Tensor,
        project: Tensor,
        *rest: Any,
    ) -> Tensor:
        # Before them: the parameters of the normalisations.
        *_, stride, norms, activation, ctx.is_sum, kernels = rest
        ctx.norms = *_describe(norms[:2], activation), _Normalization(norms[2], None)
        ctx.kernels = kernels
        hidden = x if expand is None else _multiply(kernels, x, expand)
        ctx.filter = depthwise_convolution(kernels, hidden, depthwise, stride)
        filtered, normalized = _convolve(ctx.filter, ctx.norms[:2], hidden, depthwise)
        projected = _multiply(kernels, normalized, project)
        ctx.save_for_backward(
            *(x, expand, hidden, depthwise, filtered, normalized, project, projected)
        )
        return _normalize(kernels, ctx.norms[2], projected, x if ctx.is_sum else None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, expand, hidden, depthwise, filtered, normalized, project, projected = ctx.saved_tensors
        kernels, norms, gradient = ctx.kernels, ctx.norms, _channels_last(gradient)
        of_norms, added = _make_gradients(norms), gradient if ctx.is_sum else None
        of_projected = _normalize_backward(kernels, norms[2], projected, gradient)
        of_normalized, of_project = _multiply_backward(
            kernels, normalized, project, of_projected, None
        )
        of_hidden, of_depthwise = _convolve_backward(
            ctx.filter, norms[:2], hidden, depthwise, filtered, of_normalized
        )
        if expand is None:
            of_x, of_expand = of_hidden if added is None else of_hidden + added, None
        else:
            of_x, of_expand = _multiply_backward(kernels, x, expand, of_hidden, added)
        return of_x, of_expand, of_depthwise, of_project, *of_norms, *[None] * 5


class _RepeatedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, skip: Tensor | None, weight: Tensor, kernels: ctypes.CDLL
    ) -> Tensor:
        C, D, S = x.shape[1], weight.shape[0], weight.shape[1] - x.shape[1]
        weight = _channels_last(weight)
        sums = torch.empty((C, D, 4, 4), dtype=x.dtype, memory_format=torch.channels_last)
        ctx.sizes = rest = None
        if skip is not None and takes_convolution(kernels, skip, D):
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
        gradient = _channels_last(gradient)
        x_gradient, of_sums, _ = torch.ops.aten.convolution_backward(
            *(gradient, x, sums, None, [2, 2], [1, 1], [1, 1], True, [0, 0], 1),
            [needed[0], True, False],
        )
        of_sums = _channels_last(of_sums)
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
            of_rest = _channels_last(of_rest)
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


def _check(status: int) -> None:
    if status:
        raise MemoryError("a compiled layer got no memory")
