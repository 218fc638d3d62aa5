"""Compiled versions of whole blocks for training, each as one autograd function.

Features in bf16, channels last, in; the results out. The inverted residual blocks of EfficientNet
are described to ``blocks.c``, the levels of an expanding path to ``decoder.c``; each computes one
after the other and keeps what the gradients need. :mod:`useg.models.kernels` decides where they are
used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from useg.models.compiled_layers import (
    NormStructure,
    check_status,
    describe_norm,
    filter_sizes,
    list_parameters,
    to_channels_last,
)


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
        ("norms", NormStructure * 3),
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
        ("norms", NormStructure * 2),
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
    parameters = list_parameters([norm for block in blocks for norm in block.norms])
    inputs = x, blocks, kernels, *weights, *parameters
    results: tuple[Tensor, ...] = _Blocks.apply(*inputs)  # type: ignore[no-untyped-call]
    return results


def apply_levels(
    kernels: ctypes.CDLL, x: Tensor, skips: Sequence[Tensor | None], levels: Sequence[Level]
) -> Tensor:
    """Apply levels one after the other, each with its skip connection."""
    weights = [to_channels_last(weight) for level in levels for weight in level.weights]
    parameters = list_parameters([norm for level in levels for norm in level.norms])
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
        check_status(kernels.useg_blocks_forward(*given, x.data_ptr(), features.data_ptr()))
        ctx.save_for_backward(x, features, statistics, *parameters[: 3 * len(blocks)], *kept)
        return tuple(kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        (x, features, _, *saved), described = ctx.saved_tensors, ctx.described
        weights, kept = saved[: 3 * len(described)], saved[3 * len(described) :]
        of_kept = [None if each is None else to_channels_last(each) for each in gradients]
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
        check_status(ctx.kernels.useg_blocks_backward(described, len(described), *pointers))
        return x_gradient, None, None, *of_weights, *[None] * (2 * missing), *of_norms


def _describe_blocks(
    x: Tensor, blocks: Sequence[Block], statistics: int
) -> tuple[ctypes.Array[_BlockStructure], list[Tensor]]:
    """Describe blocks with the memory for their statistics; return the results that are kept."""
    described, kept, (N, C, H, W) = (_BlockStructure * len(blocks))(), [], x.shape
    for own, block in zip(described, blocks, strict=True):
        _, depthwise, project = block.weights
        own.sizes = sizes = filter_sizes((N, H, W), depthwise, block.stride)
        own.channels, own.is_sum = C, block.is_sum
        C, H, W = own.out_channels, _, _ = project.shape[0], *sizes[-2:]
        own.weights[:] = _addresses(block.weights)
        for k, norm in enumerate(block.norms):
            if norm is not None:
                activation = block.activation if k < 2 else None
                own.norms[k] = describe_norm(norm, activation, statistics)
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
        check_status(kernels.useg_levels_forward(*given, *pointers))
        ctx.save_for_backward(x, features, statistics, *used)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, features, _, *used), described = ctx.saved_tensors, ctx.described
        number, gradient = len(described), to_channels_last(gradient)
        of_used = [None if each is None else torch.empty_like(each) for each in used]
        for k, level in enumerate(described):
            level.skip_gradient = _addresses(of_used[k : k + 1])[0]
            level.weight_gradients[:] = _addresses(of_used[number + 2 * k : number + 2 * k + 2])
        norms = [norm for level in described for norm in level.norms]
        of_norms, x_gradient = _make_norm_gradients(norms, ctx.channels), torch.empty_like(x)
        tensors = x, features, gradient, x_gradient
        pointers = (each.data_ptr() for each in tensors)
        check_status(ctx.kernels.useg_levels_backward(described, number, *pointers))
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
            own.norms[j] = describe_norm(norm, level.activation, statistics)
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
