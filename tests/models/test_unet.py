"""The paper's numbers, and a second forward pass written independently."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from useg.errors import UsageError
from useg.models.unet import UNet

pytestmark = pytest.mark.wheel


def num_parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def course_unet() -> UNet:
    return UNet(3, 23, width=32, padding="same", dropout=0.3, up_kernel=3, extra_conv=True)


@pytest.mark.parametrize(
    ("network", "parameters"),
    [(UNet(), 31_030_658), (UNet(3, 21), 31_033_045), (course_unet(), 8_640_471)],
    ids=["paper", "paper in colour", "course"],
)
def test_number_of_parameters(network: UNet, parameters: int) -> None:
    assert num_parameters(network) == parameters


def test_geometry_of_the_paper() -> None:
    # Tensors of this device have a shape and no content.
    with torch.device("meta"):
        network, x = UNet().eval(), torch.zeros(1, 1, 572, 572)
    assert (network.margin, network.stride) == (92, 16)
    assert network(x).shape == (1, 2, 388, 388)


def test_paper_has_23_convolutions() -> None:
    kinds = [
        (type(m).__name__, m.kernel_size[0])
        for m in UNet(width=1).modules()
        if isinstance(m, torch.nn.Conv2d | torch.nn.ConvTranspose2d)
    ]
    assert [
        kinds.count(kind) for kind in (("Conv2d", 3), ("ConvTranspose2d", 2), ("Conv2d", 1))
    ] == [18, 4, 1]


def test_valid_sizes_of_the_paper() -> None:
    network = UNet(width=1)
    assert {network.valid_size(n) for n in range(1, 397)} == {16 * n + 12 for n in range(11, 25)}


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("extra_conv", [False, True])
def test_valid_padding_loses_the_margin(depth: int, extra_conv: bool) -> None:
    network = UNet(1, 2, width=1, depth=depth, extra_conv=extra_conv).eval()
    assert network.margin == 6 * 2**depth - 4 + extra_conv
    size = network.valid_size(1)
    with torch.inference_mode():
        assert network(torch.zeros(1, 1, size, size + network.stride)).shape[-2:] == (
            size - 2 * network.margin,
            size + network.stride - 2 * network.margin,
        )
    with pytest.raises(UsageError, match=f"the next size that does is {size}x{size}"):
        network(torch.zeros(1, 1, size - 1, size))


def test_same_padding_keeps_the_size_and_refuses_others() -> None:
    network = UNet(2, 5, width=2, depth=3, padding="same").eval()
    with torch.inference_mode():
        assert network(torch.zeros(1, 2, 24, 40)).shape == (1, 5, 24, 40)
    with pytest.raises(UsageError, match=r"image of 41x24 pixels does not fit .* is 48x24"):
        network(torch.zeros(1, 2, 24, 41))


def test_up_kernel_3_needs_same_padding() -> None:
    with pytest.raises(UsageError, match="up_kernel 3 with valid padding"):
        UNet(up_kernel=3)


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_equals_an_independent_forward_pass(padding: str) -> None:
    network = UNet(2, 3, width=4, depth=2, padding=padding).eval()  # type: ignore[arg-type]
    weights = list(
        network.state_dict().values()
    )  # in the order of construction: down, up, merge, head
    pad = int(padding == "same")
    x = torch.randn(2, 2, 60, 76, generator=torch.Generator().manual_seed(1))

    def double(x: torch.Tensor, place: int) -> torch.Tensor:
        x = F.conv2d(x, weights[place], weights[place + 1], padding=pad).clamp(min=0)
        return F.conv2d(x, weights[place + 2], weights[place + 3], padding=pad).clamp(min=0)

    first = double(x, 0)
    second = double(F.max_pool2d(first, 2), 4)
    bottom = double(F.max_pool2d(second, 2), 8)
    up = F.conv_transpose2d(bottom, weights[12], weights[13], stride=2)
    cut = (second.shape[-1] - up.shape[-1]) // 2
    up = double(
        torch.cat([second[:, :, cut : cut + up.shape[-2], cut : cut + up.shape[-1]], up], 1), 16
    )
    up = F.conv_transpose2d(up, weights[14], weights[15], stride=2)
    cut = (first.shape[-1] - up.shape[-1]) // 2
    up = double(
        torch.cat([first[:, :, cut : cut + up.shape[-2], cut : cut + up.shape[-1]], up], 1), 20
    )
    expected = F.conv2d(up, weights[24], weights[25])
    torch.testing.assert_close(network(x), expected)


@pytest.mark.parametrize(
    "make_network",
    [
        lambda: UNet(1, 2, width=2),
        course_unet,
        lambda: UNet(1, 2, width=2, normalize=True, padding="same"),
    ],
    ids=["paper", "course", "norm"],
)
def test_gradients_reach_every_parameter(make_network: Callable[[], UNet]) -> None:
    # With other weights, every feature of a narrow network may be below 0 at some layer.
    torch.manual_seed(0)
    network = make_network()
    size = network.valid_size(32)
    x = torch.randn(
        2, network.down[0][0].in_channels, size, size, generator=torch.Generator().manual_seed(0)
    )
    (network(x) ** 2).sum().backward()
    without = [
        name
        for name, parameter in network.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    assert without == []


def test_dropout_only_in_the_two_deepest_blocks() -> None:
    names = [
        name
        for name, module in UNet(dropout=0.5, width=1).named_modules()
        if isinstance(module, torch.nn.Dropout)
    ]
    assert [name.split(".")[:2] for name in names] == [["down", "3"], ["down", "4"]]


@pytest.mark.parametrize(
    ("up_kernel", "extra_conv", "depth"), [(2, False, 2), (3, True, 2), (2, True, 3), (3, False, 1)]
)
def test_context_is_exact(up_kernel: int, extra_conv: bool, depth: int) -> None:
    network = UNet(
        1, 1, width=2, depth=depth, padding="same", up_kernel=up_kernel, extra_conv=extra_conv
    )
    for module in (
        network.modules()
    ):  # all positive, so that no influence cancels or dies in a ReLU; average for max pooling
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            module.weight.data.abs_()
    network.pool = torch.nn.AvgPool2d(2)  # type: ignore[assignment]
    stride, size = network.stride, 2 * network.stride * (network.context // network.stride + 2)
    x = torch.ones(1, 1, size, size, dtype=torch.float64, requires_grad=True)
    start = size // 2
    network.double()(x)[..., start : start + stride, start : start + stride].sum().backward()
    seen = x.grad[0, 0].abs().sum(0).nonzero().flatten()  # type: ignore[index]
    assert max(start - int(seen[0]), int(seen[-1]) + 1 - start - stride) == network.context


def test_he_initialisation_keeps_the_scale_of_features() -> None:
    torch.manual_seed(0)
    network = UNet(1, 2, width=16, padding="same")
    x = torch.randn(1, 1, 128, 128)
    with torch.no_grad():
        for block in network.down:
            x = block(x)
            assert (
                0.2 < x.square().mean() < 20
            )  # max pooling lifts it a little; without the factor 2 it would fall to 0.01
            x = network.pool(x) if block is not network.down[-1] else x


def test_disabled_skip_carries_zeros() -> None:
    torch.manual_seed(0)
    whole, cut = (
        UNet(1, 2, width=4, depth=2, padding="same"),
        UNet(1, 2, width=4, depth=2, padding="same", skips=(False, True)),
    )
    cut.load_state_dict(whole.state_dict())
    x = torch.randn(1, 1, 16, 16)
    assert not torch.equal(whole(x), cut(x))
    with torch.no_grad():
        whole.merge[1][0].weight[:, :4] = (
            0  # the level at the top is merged last; the skip's features come first
        )
    torch.testing.assert_close(whole(x), cut(x))
    with pytest.raises(UsageError, match="3 skips are given for 2 levels"):
        UNet(depth=2, skips=(True, True, False))
