"""The device that computes: chosen, measured, and compared with the CPU before it is trusted."""

from __future__ import annotations

import torch

from useg import device
from useg.models.unet import UNet

CPU = torch.device("cpu")


def test_speeds_are_measured() -> None:
    assert 0.01 < device.measure_speedup(CPU, torch.bfloat16) < 100
    small, large = (
        device.measure_training_speed(
            UNet(3, 2, width=width, padding="same"), torch.ones(1, 3, 64, 64), None
        )
        for width in (2, 32)
    )
    assert small > large > 0
    assert device.choose_precision("fp32", CPU) is None
    assert device.choose_precision("bf16", CPU) == torch.bfloat16
