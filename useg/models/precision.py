"""A layer and its input -> its output in fp32 where bf16 would be slower: the exception to autocast."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def in_fp32(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer in fp32 though autocast on a CPU says bf16; on a GPU, and without autocast, as it is.

    Meant for convolutions with as many groups as channels: with torch 2.13 (oneDNN 3) the gradients of strided and of 5x5 depthwise ones
    take 5 to 20 times as long in bf16 as in fp32, and FCN-32s' enlargement 60 times. The work is small, and so is what fp32 costs.

    Returns:
        What the layer returns, in the number type of ``x``.
    """
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        y: Tensor = layer(x)
        return y
    with torch.autocast("cpu", enabled=False):
        y = layer(x.float())
        return y.to(x.dtype)
