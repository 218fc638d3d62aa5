"""Inverted residual blocks in training, computed by one compiled function, as one of autograd.

Features in bf16, channels last, in; those that are kept out. The blocks are described to
``blocks.c``, which computes one after the other and keeps what their gradients need.
:mod:`useg.models.kernels` decides where they are used.
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
        pairs = [number for number in ctx.channels for _ in range(2)]
        of_norms = torch.split(torch.empty(sum(pairs)), pairs)
        # The first block may lack the first normalisation.
        missing = 3 * len(described) - len(ctx.channels)
        norms = [norm for block in described for norm in block.norms][missing:]
        for norm, of_weight in zip(norms, of_norms[::2], strict=True):
            norm.gradients = of_weight.data_ptr()
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


def _addresses(tensors: Sequence[Tensor | None]) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]
