"""Baselines against bilinear interpolation and sums by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import context_is_exact, moves_with_the_picture, unreached
from torch import Tensor, nn
from torch.nn import functional as F

from useg.errors import UsageError
from useg.models import segmenter
from useg.models.baselines import BASELINES, FCN, PixelClassifier, make_upsampling

NETWORKS: dict[str, Any] = {
    "cnn": lambda channels, **settings: PixelClassifier(channels, 4, width=4, **settings),
    "fcn32s": lambda channels, **settings: FCN(channels, 4, step=32, width=4, **settings),
    "fcn16s": lambda channels, **settings: FCN(channels, 4, step=16, width=4, **settings),
    "fcn8s": lambda channels, **settings: FCN(channels, 4, step=8, width=4, **settings),
}
every_network = pytest.mark.parametrize("name", list(NETWORKS))


@pytest.mark.parametrize("factor", [2, 8, 32])
def test_transposed_convolutions_start_as_bilinear_interpolation(factor: int) -> None:
    up = FCN(1, 3, step=factor).enlarge if factor > 2 else FCN(1, 3, step=16).up[0]
    place = torch.arange(6.0)
    ramp = (2 * place[:, None] - 3 * place + 1).expand(1, 3, 6, 6).contiguous()
    fine = (torch.arange(6 * factor) + 0.5) / factor - 0.5
    wanted = 2 * fine[:, None] - 3 * fine + 1
    inner = slice(factor, -factor)
    with torch.no_grad():
        torch.testing.assert_close(up(ramp)[0, 1][inner, inner], wanted[inner, inner])
        noise = torch.randn(2, 3, 5, 7)
        bilinear = F.interpolate(
            noise, scale_factor=float(factor), mode="bilinear", align_corners=False
        )
        torch.testing.assert_close(up(noise)[..., inner, inner], bilinear[..., inner, inner])


def test_upsampling_keeps_classes_apart() -> None:
    assert make_upsampling(5, 4)(torch.zeros(1, 5, 3, 2)).shape == (1, 5, 12, 8)
    assert make_upsampling(5, 4).weight.shape == (5, 1, 8, 8)


@every_network
@pytest.mark.parametrize(("height", "width"), [(32, 32), (96, 32), (160, 224)])
def test_logits_have_the_size_of_the_picture(name: str, height: int, width: int) -> None:
    network = NETWORKS[name](3).eval()
    assert network.margin == 0
    assert network(torch.zeros(2, 3, height, width)).shape == (2, 4, height, width)


@every_network
def test_a_size_that_does_not_fit_is_refused(name: str) -> None:
    network = NETWORKS[name](3)
    wanted = network.valid_size(50)
    assert wanted % network.stride == 0
    with pytest.raises(
        UsageError,
        match=rf"50x{wanted} pixels.*multiples of {network.stride}; "
        rf"the next size is {wanted}x{wanted}",
    ):
        network(torch.zeros(1, 3, wanted, 50))


@every_network
def test_context_is_exact(name: str) -> None:
    assert context_is_exact(NETWORKS[name](1, window=5), 512)


@every_network
def test_logits_shift_with_the_image(name: str) -> None:
    torch.manual_seed(0)
    assert moves_with_the_picture(NETWORKS[name](1), 480)


@every_network
@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_reach_every_parameter(name: str, normalize: bool) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name](3, normalize=normalize)
    if name in ("fcn16s", "fcn8s"):
        for up in (*network.up, network.enlarge):
            assert up.weight.requires_grad
    assert unreached(network, 3, 96, 64) == []


def test_a_dense_layer_is_a_convolution_as_large_as_its_window() -> None:
    network = PixelClassifier(3, 4, width=4, depth=2, window=3)
    conv: Any = network.dense[0]
    features = torch.randn(1, 8, 9, 9)
    dense = nn.Linear(8 * 3 * 3, 16)
    dense.load_state_dict({"weight": conv.weight.flatten(1), "bias": conv.bias})
    torch.testing.assert_close(
        conv(features)[0, :, 4, 6], dense(features[0, :, 3:6, 5:8].flatten())
    )


def scores_added_by_hand(network: Any, x: Tensor) -> Tensor:
    """FCN-8s once more, as figure 3 of the paper draws it."""
    pools = []
    for block in network.down:
        x = block(x)
        pools.append(x)
    score = network.score(network.dense(x))
    for pool, head, up in (
        (pools[3], network.score_pool[0], network.up[0]),
        (pools[2], network.score_pool[1], network.up[1]),
    ):
        score = (
            F.conv_transpose2d(score, up.weight, stride=2, padding=1, groups=4)
            + torch.einsum("nchw,kcij->nkhw", pool, head.weight)
            + head.bias[:, None, None]
        )
    return F.conv_transpose2d(score, network.enlarge.weight, stride=8, padding=4, groups=4)


def test_fcn_8s_adds_the_scores_of_pool4_and_pool3() -> None:
    torch.manual_seed(0)
    network = NETWORKS["fcn8s"](3).eval()
    for score in network.score_pool:
        nn.init.normal_(score.weight)
        nn.init.normal_(score.bias)
    x = torch.randn(1, 3, 96, 64)
    torch.testing.assert_close(network(x), scores_added_by_hand(network, x), rtol=1e-4, atol=1e-4)


def test_finer_networks_start_from_the_coarser_one() -> None:
    torch.manual_seed(0)
    fine = NETWORKS["fcn8s"](3).eval()
    x = torch.randn(1, 3, 160, 160)
    coarse = fine.score(fine.dense(nn.Sequential(*fine.down)(x)))
    torch.testing.assert_close(fine(x), fine.enlarge(fine.up[1](fine.up[0](coarse))))


def test_only_steps_32_16_and_8_and_odd_windows_are_possible() -> None:
    with pytest.raises(UsageError, match=r"FCN step '4' is not known; choose one of 16, 32, 8"):
        FCN(step=4)
    with pytest.raises(
        UsageError, match=r"a window of 4x4 features has no centre; give an odd size, such as 5"
    ):
        PixelClassifier(window=4)


@pytest.mark.parametrize("name", list(BASELINES))
def test_settings_make_every_network(name: str) -> None:
    settings = {
        "encoder": name,
        "channels": 2,
        "classes": 3,
        "width": 4,
        "padding": "same",
        "dropout": 0.1,
        "normalize": True,
    }
    network = segmenter.build_network({**settings, "up_kernel": 2, "extra_conv": False})
    assert network.eval()(torch.zeros(1, 2, 64, 32)).shape == (1, 3, 64, 32)
    assert (
        sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
        == 2 * (4 if name == "cnn" else 5) + 2
    )
    assert isinstance(network.dense, nn.Sequential)
    assert all(module.bias is None for module in network.dense if isinstance(module, nn.Conv2d))
    assert {module.p for module in network.modules() if isinstance(module, nn.Dropout)} == {0.1}


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("cnn", "padding", "valid"),
        ("fcn8s", "depth", 4),
        ("fcn32s", "extra_conv", True),
        ("cnn", "up_kernel", 3),
    ],
)
def test_a_setting_that_cannot_be_followed_is_refused(name: str, key: str, value: object) -> None:
    with pytest.raises(
        UsageError, match=rf"model.{key} = {value!r} is not possible with model.encoder {name}"
    ):
        segmenter.build_network({"encoder": name, "channels": 3, "classes": 2, key: value})
