"""Tables of layers, against torch's own counts and receptive fields found by trial."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracles import rows_reached
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from useg.classes import ClassTable
from useg.errors import UsageError
from useg.models.baselines import FCN, PixelClassifier
from useg.models.describe import INPUT_FIELD, describe, field_of, largest_feature_map
from useg.models.encoders import EncoderUNet
from useg.models.segmenter import NETWORKS, Segmenter, build_network, on_meta
from useg.models.unet import UNet

pytestmark = pytest.mark.wheel


def course_unet() -> UNet:
    return UNet(3, 23, width=32, padding="same", dropout=0.3, up_kernel=3, extra_conv=True)


@pytest.mark.parametrize("encoder", list(NETWORKS))
def test_totals_equal_the_parameters_and_flops_of_the_network(encoder: str) -> None:
    network = build_network(
        {
            "encoder": encoder,
            "channels": 3,
            "classes": 5,
            "width": 8,
            "padding": "same",
            "normalize": True,
        }
    )
    description = describe(network, (96, 64))
    assert description.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert description.layers[-1].shape == (5, 64, 96) or encoder == "cnn"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, 3, 64, 96))
    assert 2 * description.macs == counter.get_total_flops()


@pytest.mark.parametrize("encoder", list(NETWORKS))
def test_the_largest_feature_map_is_that_of_the_table(encoder: str) -> None:
    with on_meta("the model"):
        network = build_network({"encoder": encoder, "channels": 3, "classes": 5, "width": 8})
    side = network.valid_size(64)
    description = describe(network, (side, side))
    largest = max(math.prod(layer.shape) for layer in description.layers)
    assert largest_feature_map(network, side) == largest


def test_course_unet_equals_counts_by_hand() -> None:
    description = describe(course_unet(), (128, 96))
    by_hand = 0
    for level, (inputs, width) in enumerate(((3, 32), (32, 64), (64, 128), (128, 256), (256, 512))):
        pixels = 96 * 128 // 4**level
        by_hand += pixels * 9 * (inputs * width + width * width)  # down
        if level < 4:
            by_hand += pixels * 9 * (2 * width * width + width * width)  # merge
            # up: 3x3 transposed, from the level below
            by_hand += pixels // 4 * 9 * 2 * width * width
    by_hand += 96 * 128 * (9 * 32 * 32 + 32 * 23)  # extra and head
    assert description.macs == by_hand
    assert round(2 * description.macs / 1e9, 2) == 5.02
    assert description.parameters == 8_640_471


def test_paper_unet_has_the_known_receptive_fields() -> None:
    description = describe(UNet(), (572, 572))
    assert round(2 * description.macs / 1e9, 1) == 300.9
    assert description.layers[-1].shape == (2, 388, 388)
    fields = [layer.field for layer in description.layers if layer.kind == "MaxPool2d 2x2 /2"]
    assert fields == [6, 16, 36, 76]
    assert max(layer.field for layer in description.layers if layer.name.startswith("down")) == 140
    assert description.field == 204


@pytest.mark.parametrize(
    ("network", "height"),
    [
        (UNet(1, 2, width=2, depth=2), 92),
        (UNet(1, 2, width=2, depth=2, padding="same"), 80),
        (UNet(1, 2, width=2, depth=2, padding="same", up_kernel=3, extra_conv=True), 96),
        (PixelClassifier(1, 2, width=2, depth=2), 64),
    ],
    ids=["valid", "same", "course", "cnn"],
)
def test_the_receptive_field_is_how_far_nan_pixels_spread(network: Any, height: int) -> None:
    reached = rows_reached(network.double().eval(), height, network.valid_size(1), range(height))
    middle = slice(reached.shape[1] // 2 - 4, reached.shape[1] // 2 + 4)
    field = _logits_field(network.float(), height)
    assert int(reached.sum(0)[middle].max()) == field
    assert field <= network.stride + 2 * network.context


def _logits_field(network: nn.Module, height: int) -> int:
    """Return the field of the logits, which for a classifier are not a layer's output."""
    width = network.valid_size(1)  # type: ignore[operator]
    x = torch.zeros(1, 1, height, width, requires_grad=True)
    picture = x.view_as(x)
    assert picture.grad_fn
    return field_of(network(picture), {picture.grad_fn: INPUT_FIELD}).size


@pytest.mark.parametrize(
    "network",
    [EncoderUNet("lite0", 1, 2), EncoderUNet("resnet50", 1, 2), FCN(1, 2, width=2)],
    ids=["lite0", "resnet50", "fcn8s"],
)
def test_the_receptive_field_of_a_deep_network_fits_its_context(network: Any) -> None:
    field = describe(network, (64, 64)).field
    assert network.context < field <= network.stride + 2 * network.context


def test_a_segmenter_is_described_as_its_network_is() -> None:
    settings = {
        "encoder": "plain",
        "channels": 3,
        "classes": 2,
        "width": 4,
        "depth": 2,
        "padding": "same",
    }
    model = Segmenter(
        settings, ClassTable(("a", "b"), ((0, 0, 0), (9, 9, 9))), [1.0] * 3, [2.0] * 3
    )
    inner, outer = describe(model.network, (32, 16)), describe(model, (32, 16))
    assert (outer.title, inner.title) == ("Segmenter", "UNet")
    assert [(layer.shape, layer.macs, layer.field) for layer in outer.layers] == [
        (layer.shape, layer.macs, layer.field) for layer in inner.layers
    ]
    assert model.training
    assert model.mean.device.type == "cpu"


def test_a_layer_called_twice_has_its_parameters_once() -> None:
    conv = nn.Conv2d(1, 1, 3)
    description = describe(nn.Sequential(conv, conv), (8, 8))
    assert [(layer.parameters, layer.macs, layer.field) for layer in description.layers] == [
        (10, 9 * 36, 3),
        (0, 9 * 16, 5),
    ]


def test_str_is_an_aligned_table() -> None:
    lines = str(describe(UNet(3, 2, width=4, depth=1, padding="same"), (32, 16))).splitlines()
    assert lines[0] == "UNet on an image of 3 x 16 x 32"
    assert lines[4].split() == [
        "down.0.0",
        "Conv2d",
        "3x3",
        "4",
        "x",
        "16",
        "x",
        "32",
        "112",
        "0.1",
        "3",
    ]
    assert lines[-1].split() == ["total", "1,722", "0.5", "18"]  # summed by hand
    assert len({len(line) for line in lines[1:]}) == 1


def test_a_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="100x100 pixels"):
        describe(course_unet(), (100, 100))


def test_an_operation_without_a_rule_is_named() -> None:
    with pytest.raises(UsageError, match=r"operation 'Sigmoid' is unknown"):
        describe(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Sigmoid()), (8, 8))
