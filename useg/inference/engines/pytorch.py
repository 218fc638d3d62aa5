"""A trained model -> the same as a function on numpy arrays, computed by PyTorch."""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from useg.errors import UsageError
from useg.inference.tiles import Network
from useg.models.segmenter import Segmenter


def network(model: Segmenter) -> Network:
    """Compute in fp32, where the weights lie."""
    return _network(model, bf16=False)


def network_bf16(model: Segmenter) -> Network:
    """Compute the convolutions in bf16, where the weights lie; all else as autocast decides, logits in fp32.

    Weights are cast once instead of with every call, which saves 10 % with one small picture at a time. Grouped convolutions stay in
    fp32 for ``in_fp32``, and are small.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.groups == 1:
            module.to(torch.bfloat16)
    return _network(model, bf16=True)


def network_gpu(model: Segmenter) -> Network:
    """Compute in bf16 on the first GPU.

    Raises:
        UsageError: PyTorch sees no GPU.
    """
    if not torch.cuda.is_available():
        raise UsageError("PyTorch sees no GPU here; choose --runtime auto, or install a build of torch for your GPU")
    return network_bf16(copy.deepcopy(model).to("cuda"))


def _network(model: Segmenter, *, bf16: bool) -> Network:
    device = model.mean.device

    def run(x: NDArray[np.generic]) -> NDArray[np.float32]:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits: NDArray[np.float32] = model(_to_tensor(x).to(device)).float().cpu().numpy()
        return logits

    return run


def _to_tensor(x: NDArray[np.generic]) -> torch.Tensor:
    if x.dtype == np.uint16:  # torch has few operations on uint16
        x = x.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(x))
