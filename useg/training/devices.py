"""This machine -> where to compute, in which precision, and how fast that is."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WORTH = 1.3  # times as fast as fp32 must bf16 be; where it is emulated it is slower


def choose_device() -> torch.device:
    """Return the GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_precision(wanted: str | None, device: torch.device) -> torch.dtype | None:
    """Return the type of the autocast: that of ``"bf16"``, or None for ``"fp32"``; by default whichever is faster here."""
    if wanted is None:
        wanted = "bf16" if bf16_gain(device) >= WORTH else "fp32"
    return torch.bfloat16 if wanted == "bf16" else None


@cache
def bf16_gain(device: torch.device) -> float:
    """Measure how many times as fast a convolution is in bf16 as in fp32; takes some hundredths of a second, once a process."""
    x, weight = (torch.ones(shape, device=device).to(memory_format=torch.channels_last) for shape in ((1, 64, 64, 64), (64, 64, 3, 3)))
    coarse = x.bfloat16(), weight.bfloat16()
    seconds: dict[bool, float] = {}
    with torch.inference_mode():
        for k in range(12):  # taking turns, so that what else the machine does disturbs both; the best counts, because the first ones warm up
            used = _seconds(lambda k=k: F.conv2d(*(coarse if k % 2 else (x, weight)), padding=1), device)  # type: ignore[misc]
            seconds[k % 2 == 1] = min(seconds.get(k % 2 == 1, used), used)
    return seconds[False] / seconds[True]


def training_rate(network: nn.Module, x: Tensor, precision: torch.dtype | None) -> float:
    """Measure how many pixels a second a network can be trained on.

    Args:
        network: on the device of ``x``; only its gradients change.
        x: a batch ``(N, C, H, W)``.
        precision: of the autocast; None is fp32.
    """

    def step() -> None:
        with torch.autocast(x.device.type, precision, enabled=precision is not None):
            loss = network(x).float().square().mean()
        loss.backward()
        network.zero_grad(set_to_none=True)

    return x.shape[0] * x.shape[2] * x.shape[3] / min(_seconds(step, x.device) for _ in range(3))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
