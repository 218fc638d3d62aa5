"""The layers that are trained in another way do what torch's do."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from useg.models import unet


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_transposed_convolution_equals_torch(options: dict[str, int], bias: bool) -> None:
    torch.manual_seed(0)
    ours = unet.ConvTranspose2d(6, 4, bias=bias, **options)
    theirs = nn.ConvTranspose2d(6, 4, bias=bias, **options)
    theirs.load_state_dict(ours.state_dict())
    x, found = torch.randn(2, 6, 5, 7), []
    for layer in (ours, theirs):
        pixels = x.clone().requires_grad_()
        y = layer(pixels)
        (y * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()
        found.append([y, pixels.grad, *(parameter.grad for parameter in layer.parameters())])
    torch.testing.assert_close(*found)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.train()(x).dtype == torch.bfloat16


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_convolution_without_cudnn_equals_torch(
    stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 6, 5, stride, 2, groups=6, bias=False)
    layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(2, 6, 8, 12).to(memory_format=torch.channels_last)
    given = []
    convolve = nn.functional.conv2d
    monkeypatch.setattr(
        unet.F,
        "conv2d",
        lambda *inputs, **more: (given.append(inputs), convolve(*inputs, **more))[1],
    )
    found = []
    for apply in (layer, partial(unet.convolve_natively, layer)):
        pixels = x.clone().requires_grad_()
        y = apply(pixels)
        assert y.is_contiguous(memory_format=torch.channels_last)
        y.square().sum().backward()
        found.append([y, pixels.grad, layer.weight.grad])
        layer.weight.grad = None
    torch.testing.assert_close(*found)
    # Channels-last tensors have the stride 1 between channels: with them, PyTorch takes cuDNN.
    features, weight = given[-1][:2]
    assert features.stride()[1] > 1
    assert weight.stride()[1] > 1


@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.99999])
def test_dropout_drops_its_share(p: float, form: torch.memory_format) -> None:
    layer, x = (
        unet.Dropout(p),
        torch.full((3, 7, 129, 65), 2.0).to(memory_format=form),
    )  # no multiple of 4 features
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x), first)
    assert torch.equal(second, first) == (p == 0)
    assert first.is_contiguous(memory_format=form)
    assert first[first != 0].unique().tolist() in ([pytest.approx(2 / (1 - p))], [])
    shares = (first == 0).float().mean((0, 2, 3))
    assert shares.tolist() == pytest.approx([p] * 7, abs=4 * (p * (1 - p) / 25155) ** 0.5 + 2**-16)
    assert torch.equal(layer.eval()(x), x)


def test_dropout_gradient_is_zero_where_features_were_dropped() -> None:
    layer, x = unet.Dropout(0.5), torch.ones(1, 3, 4, 4, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # type: ignore[arg-type]


def test_gradients_of_concatenate_are_contiguous() -> None:
    found = []
    parts = [torch.randn(2, channels, 4, 6, requires_grad=True) for channels in (3, 5)]
    doubled = [part * 2 for part in parts]
    for part in doubled:
        part.register_hook(lambda gradient: found.append(gradient) or gradient)
    joined = unet.concatenate(*doubled)
    assert torch.equal(joined, torch.cat(doubled, 1))
    weight = torch.randn(joined.shape)
    (joined * weight).sum().backward()
    assert all(gradient.is_contiguous(memory_format=torch.channels_last) for gradient in found)
    gradients = [part.grad for part in parts if part.grad is not None]
    assert torch.equal(torch.cat(gradients, 1), 2 * weight)
