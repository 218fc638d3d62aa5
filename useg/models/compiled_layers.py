"""Compiled versions of layers for training, as autograd functions: single layers, whole blocks.

Features in bf16, channels last, in; the same out. Functions such as :func:`apply_convolution` make
the results' tensors and call a compiled function. The inverted residual blocks of EfficientNet are
described to ``blocks.c``, the levels of an expanding path to ``decoder.c``; each computes one after
the other and keeps what the gradients need. :mod:`useg.models.kernels` compiles the functions and
decides where they are used.
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

# Lower and upper limit of the output of each activation.
_LIMITS = {
    type(None): (-math.inf, math.inf),
    nn.ReLU: (0.0, math.inf),
    nn.ReLU6: (0.0, 6.0),
}


class _NormStructure(ctypes.Structure):
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


def _describe_norm(
    norm: nn.BatchNorm2d, activation: nn.Module | None, statistics: int
) -> _NormStructure:
    """Describe a normalisation whose statistics are written to an address, and read from there."""
    parameters, buffers = norm._parameters.values(), norm._buffers.values()
    pointers = [tensor.data_ptr() for tensor in (*parameters, *buffers) if tensor is not None]
    return _NormStructure(
        *pointers, statistics, None, norm.momentum, norm.eps, *_LIMITS[type(activation)]
    )


class _Normalization:
    """A batch normalisation and its activation in one step of training.

    The forward pass writes the statistics, the backward pass reads them.
    """

    def __init__(self, norm: nn.BatchNorm2d, activation: nn.Module | None) -> None:
        self.statistics = torch.empty(4, norm.num_features)
        self.values = _describe_norm(norm, activation, self.statistics.data_ptr())
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
    sizes = _filter_sizes((N, H, W), weight, stride)
    functions = kernels.useg_filter_forward, kernels.useg_filter_backward
    return _Convolution(*functions, (c_int64 * 9)(*sizes), (N, C, *sizes[-2:]))


def _filter_sizes(shape: Sequence[int], weight: Tensor, stride: int) -> tuple[int, ...]:
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
    _check_status(conv.forward(conv.sizes, *norms, *pointers))
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
    _check_status(conv.backward(conv.sizes, *norms, *(each.data_ptr() for each in tensors)))
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
    return _call(_NormalizedConvolution, x, weight, *_list_parameters(norms), *rest)


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


def _list_parameters(norms: Sequence[nn.BatchNorm2d | None]) -> list[Tensor | None]:
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


def _to_channels_last(x: Tensor) -> Tensor:
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
        _check_status(kernels.useg_norm_forward(ctx.norm, *pointers, N * H * W, C))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,), gradient = ctx.saved_tensors, _to_channels_last(gradient)
        gradients = ctx.norm.make_gradients()
        (N, C, H, W), x_gradient = x.shape, torch.empty_like(x)
        pointers = x.data_ptr(), gradient.data_ptr(), x_gradient.data_ptr()
        _check_status(ctx.kernels.useg_norm_backward(ctx.norm, *pointers, N * H * W, C))
        return x_gradient, gradient if ctx.is_sum else None, *gradients, None, None, None


class _NormalizedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        # Before it: the parameters of the normalisations.
        *_, ctx.conv, norms, activation = rest
        ctx.norms = _describe(norms, activation)
        weight = _to_channels_last(weight)
        convolved, y = _convolve(ctx.conv, ctx.norms, x, weight)
        ctx.save_for_backward(x, weight, convolved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _make_gradients(ctx.norms)
        tensors = *ctx.saved_tensors, _to_channels_last(gradient)
        return *_convolve_backward(ctx.conv, ctx.norms, *tensors), *gradients, None, None, None


class _RepeatedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, skip: Tensor | None, weight: Tensor, kernels: ctypes.CDLL
    ) -> Tensor:
        C, D, S = x.shape[1], weight.shape[0], weight.shape[1] - x.shape[1]
        weight = _to_channels_last(weight)
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
        needed, gradient = ctx.needs_input_grad, _to_channels_last(gradient)
        x_gradient, of_sums, _ = torch.ops.aten.convolution_backward(
            *(gradient, x, sums, None, [2, 2], [1, 1], [1, 1], True, [0, 0], 1),
            [needed[0], True, False],
        )
        of_sums = _to_channels_last(of_sums)
        skip_gradient, of_rest = None, rest
        weight_gradient = torch.empty_like(weight)
        if skip is not None:
            skip_gradient, of_rest, _ = torch.ops.aten.convolution_backward(
                *(gradient, skip, rest, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
                [needed[1], True, False],
            )
            of_rest = _to_channels_last(of_rest)
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
        _check_status(
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
        _check_status(
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


@dataclass(frozen=True)
class Block:
    """An inverted residual block: expand, depthwise convolution, project; each is normalised.

    Args:
        weights: Those of the three convolutions; None instead of the first: do not expand.
        norms: The normalisation after each of them.
        activation: After the first two normalisations.
        stride: That of the depthwise convolution.
        is_sum: Whether x is added to the result.
        is_kept: Whether the result is needed outside.
    """

    weights: tuple[Tensor | None, Tensor, Tensor]
    norms: tuple[nn.BatchNorm2d | None, nn.BatchNorm2d, nn.BatchNorm2d]
    activation: nn.Module
    stride: int
    is_sum: bool
    is_kept: bool


class _BlockStructure(ctypes.Structure):
    """The same with its sizes, as ``block`` in ``blocks.c``."""

    _fields_ = (
        ("sizes", c_int64 * 9),
        ("channels", c_int64),
        ("out_channels", c_int64),
        ("is_sum", c_int64),
        ("norms", _NormStructure * 3),
        ("weights", c_void_p * 3),
        ("weight_gradients", c_void_p * 3),
        ("y", c_void_p),
        ("gradient", c_void_p),
    )


@dataclass(frozen=True)
class Level:
    """A level of an expanding path: upsample, concatenate, and two normalised 3x3 convolutions.

    Args:
        weights: Those of the convolutions.
        norms: The normalisation after each of them.
        activation: After each normalisation.
    """

    weights: tuple[Tensor, Tensor]
    norms: tuple[nn.BatchNorm2d, nn.BatchNorm2d]
    activation: nn.Module


class _LevelStructure(ctypes.Structure):
    """The same with its sizes and its skip connection, as ``level`` in ``decoder.c``."""

    _fields_ = (
        ("sizes", c_int64 * 6),
        ("norms", _NormStructure * 2),
        ("weights", c_void_p * 2),
        ("weight_gradients", c_void_p * 2),
        ("skip", c_void_p),
        ("skip_gradient", c_void_p),
    )


def apply_blocks(kernels: ctypes.CDLL, x: Tensor, blocks: Sequence[Block]) -> tuple[Tensor, ...]:
    """Apply blocks one after the other, and return the results that are kept.

    Only the first block may have no first convolution; then x is not added. A result that is kept
    is not added to that of the next block.
    """
    weights = [weight for block in blocks for weight in block.weights]
    parameters = _list_parameters([norm for block in blocks for norm in block.norms])
    inputs = x, blocks, kernels, *weights, *parameters
    results: tuple[Tensor, ...] = _Blocks.apply(*inputs)  # type: ignore[no-untyped-call]
    return results


def apply_levels(
    kernels: ctypes.CDLL, x: Tensor, skips: Sequence[Tensor | None], levels: Sequence[Level]
) -> Tensor:
    """Apply levels one after the other, each with its skip connection."""
    weights = [_to_channels_last(weight) for level in levels for weight in level.weights]
    parameters = _list_parameters([norm for level in levels for norm in level.norms])
    inputs = x, levels, kernels, *skips, *weights, *parameters
    y: Tensor = _Levels.apply(*inputs)  # type: ignore[no-untyped-call]
    return y


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, blocks: Sequence[Block], kernels: ctypes.CDLL, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.channels = [norm.num_features for block in blocks for norm in block.norms if norm]
        statistics = torch.empty(4 * sum(ctx.channels))
        ctx.described, kept = _describe_blocks(x, blocks, statistics.data_ptr())
        given, ctx.kernels = (ctx.described, len(blocks)), kernels
        features = torch.empty(kernels.useg_blocks_length(*given), dtype=x.dtype)
        _check_status(kernels.useg_blocks_forward(*given, x.data_ptr(), features.data_ptr()))
        ctx.save_for_backward(x, features, statistics, *parameters[: 3 * len(blocks)], *kept)
        return tuple(kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        (x, features, _, *saved), described = ctx.saved_tensors, ctx.described
        weights, kept = saved[: 3 * len(described)], saved[3 * len(described) :]
        of_kept = [None if each is None else _to_channels_last(each) for each in gradients]
        if of_kept[-1] is None:
            of_kept[-1] = torch.zeros_like(kept[-1])
        for block, of_y in zip([each for each in described if each.y], of_kept, strict=True):
            block.gradient = None if of_y is None else of_y.data_ptr()
        of_weights = [None if each is None else torch.empty_like(each) for each in weights]
        for k, block in enumerate(described):
            block.weight_gradients[:] = _addresses(of_weights[3 * k : 3 * k + 3])
        # The first block may lack the first normalisation.
        missing = 3 * len(described) - len(ctx.channels)
        norms = [norm for block in described for norm in block.norms][missing:]
        of_norms = _make_norm_gradients(norms, ctx.channels)
        x_gradient = torch.empty_like(x)
        pointers = x.data_ptr(), features.data_ptr(), x_gradient.data_ptr()
        _check_status(ctx.kernels.useg_blocks_backward(described, len(described), *pointers))
        return x_gradient, None, None, *of_weights, *[None] * (2 * missing), *of_norms


def _describe_blocks(
    x: Tensor, blocks: Sequence[Block], statistics: int
) -> tuple[ctypes.Array[_BlockStructure], list[Tensor]]:
    """Describe blocks with the memory for their statistics; return the results that are kept."""
    described, kept, (N, C, H, W) = (_BlockStructure * len(blocks))(), [], x.shape
    for own, block in zip(described, blocks, strict=True):
        _, depthwise, project = block.weights
        own.sizes = sizes = _filter_sizes((N, H, W), depthwise, block.stride)
        own.channels, own.is_sum = C, block.is_sum
        C, H, W = own.out_channels, _, _ = project.shape[0], *sizes[-2:]
        own.weights[:] = _addresses(block.weights)
        for k, norm in enumerate(block.norms):
            if norm is not None:
                activation = block.activation if k < 2 else None
                own.norms[k] = _describe_norm(norm, activation, statistics)
                statistics += 16 * norm.num_features
        if block.is_kept:
            y = torch.empty((N, C, H, W), dtype=x.dtype, memory_format=torch.channels_last)
            kept.append(y)
            own.y = y.data_ptr()
    return described, kept


class _Levels(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, levels: Sequence[Level], kernels: ctypes.CDLL, *tensors: Tensor
    ) -> Tensor:
        ctx.channels = [norm.num_features for level in levels for norm in level.norms]
        ctx.kernels, used = kernels, tensors[: 3 * len(levels)]
        statistics = torch.empty(4 * sum(ctx.channels))
        ctx.described, shape = _describe_levels(x, levels, used, statistics.data_ptr())
        given = ctx.described, len(levels)
        features = torch.empty(kernels.useg_levels_length(*given), dtype=x.dtype)
        y = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        pointers = x.data_ptr(), features.data_ptr(), y.data_ptr()
        _check_status(kernels.useg_levels_forward(*given, *pointers))
        ctx.save_for_backward(x, features, statistics, *used)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, features, _, *used), described = ctx.saved_tensors, ctx.described
        number, gradient = len(described), _to_channels_last(gradient)
        of_used = [None if each is None else torch.empty_like(each) for each in used]
        for k, level in enumerate(described):
            level.skip_gradient = _addresses(of_used[k : k + 1])[0]
            level.weight_gradients[:] = _addresses(of_used[number + 2 * k : number + 2 * k + 2])
        norms = [norm for level in described for norm in level.norms]
        of_norms, x_gradient = _make_norm_gradients(norms, ctx.channels), torch.empty_like(x)
        tensors = x, features, gradient, x_gradient
        pointers = (each.data_ptr() for each in tensors)
        _check_status(ctx.kernels.useg_levels_backward(described, number, *pointers))
        return x_gradient, None, None, *of_used, *of_norms


def _describe_levels(
    x: Tensor, levels: Sequence[Level], used: Sequence[Tensor | None], statistics: int
) -> tuple[ctypes.Array[_LevelStructure], tuple[int, ...]]:
    """Describe levels with their skip connections and weights; return the shape of the result."""
    described, number, (N, C, H, W) = (_LevelStructure * len(levels))(), len(levels), x.shape
    for k, (own, level) in enumerate(zip(described, levels, strict=True)):
        D, whole = level.weights[0].shape[:2]
        own.sizes[:] = N, H, W, C, whole - C, D
        addresses = _addresses([used[k], *used[number + 2 * k : number + 2 * k + 2]])
        own.skip, own.weights[:] = addresses[0], addresses[1:]
        for j, norm in enumerate(level.norms):
            own.norms[j] = _describe_norm(norm, level.activation, statistics)
            statistics += 16 * D
        C, H, W = D, 2 * H, 2 * W
    return described, (N, C, H, W)


def _make_norm_gradients(norms: Sequence[Any], channels: Sequence[int]) -> tuple[Tensor, ...]:
    """Return the gradients of weights and biases, yet to be computed."""
    pairs = [number for number in channels for _ in range(2)]
    gradients = torch.split(torch.empty(sum(pairs)), pairs)
    for norm, of_weight in zip(norms, gradients[::2], strict=True):
        norm.gradients = of_weight.data_ptr()
    return gradients


def _addresses(tensors: Sequence[Tensor | None]) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _check_status(status: int) -> None:
    """Raise a MemoryError if a compiled function has failed."""
    if status:
        raise MemoryError("a compiled layer could not allocate memory")
