"""Layers that are computed in fp32 under bf16 autocast."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from useg.models import kernels
from useg.models.baselines import FCN
from useg.models.encoders import EncoderUNet
from useg.models.unet import in_fp32


def test_autocast_is_kept_off_and_the_number_type_kept() -> None:
    layer, x = nn.Conv2d(4, 4, 3, groups=4), torch.rand(1, 4, 9, 9)
    seen: list[torch.dtype] = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert in_fp32(layer, x.bfloat16()).dtype == torch.bfloat16
    assert in_fp32(layer, x).dtype == torch.float32
    assert seen == [torch.float32, torch.float32]
    torch.testing.assert_close(in_fp32(layer, x), layer(x))


def dtypes(network: nn.Module, kind: type[nn.Module]) -> set[torch.dtype]:
    """Number types that the grouped layers of one kind give under autocast."""
    seen = set()
    for module in network.modules():
        if (
            isinstance(module, kind)
            and module.groups > 1
            and (module.kernel_size[0] > 3 or module.stride[0] > 1)
        ):  # type: ignore[attr-defined]
            module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.rand(2, 3, 64, 64))
    return seen


def test_grouped_layers_that_are_slow_in_bf16_are_computed_in_fp32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As where nothing can be compiled.
    monkeypatch.setattr(kernels, "load_kernels", lambda: None)
    assert dtypes(FCN(3, 2, step=8, width=2), nn.ConvTranspose2d) == {torch.float32}
    assert dtypes(EncoderUNet("lite0", 3, 2, width=2).train(), nn.Conv2d) == {torch.float32}
    assert dtypes(EncoderUNet("lite0", 3, 2, width=2).eval(), nn.Conv2d) == {torch.bfloat16}
