"""Drawings of U-Nets: every feature map and every layer appears once."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from useg.errors import UsageError
from useg.models.baselines import FCN
from useg.models.describe import describe
from useg.models.drawing import arrange, drawing
from useg.models.unet import UNet

pytestmark = pytest.mark.wheel

COURSE_UNET = UNet(3, 23, width=32, padding="same", dropout=0.3, up_kernel=3, extra_conv=True)


@pytest.mark.parametrize(
    ("network", "size"),
    [(UNet(), (572, 572)), (COURSE_UNET, (128, 96)), (UNet(1, 2, width=4, depth=1), (28, 20))],
)
def test_the_drawing_shows_every_feature_map(network: UNet, size: tuple[int, int]) -> None:
    text = drawing(network, size)
    picture = ElementTree.fromstring(text)
    words = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    layers = describe(network, size).layers
    for layer in layers:
        assert f"{layer.shape[2]}\u00d7{layer.shape[1]}" in words
    assert f"{size[0]}\u00d7{size[1]}" in words
    # One of each kind is in the legend.
    arrows = {
        kind: text.count(f"url(#{kind})") - 1 for kind in ("conv", "pool", "up", "skip", "head")
    }
    convolutions = sum(layer.kind == "Conv2d 3x3" for layer in layers)
    assert arrows == {
        "conv": convolutions,
        "pool": network.depth,
        "up": network.depth,
        "skip": network.depth,
        "head": 1,
    }
    assert text.count("stroke-dasharray") == (network.depth if network.padding == "valid" else 0)
    assert ("crop and copy" in words) == (network.padding == "valid")


def test_the_boxes_of_the_drawing_lie_inside_it_and_apart() -> None:
    boxes, _ = arrange(describe(UNet(), (572, 572)))
    assert all(
        left.right < right.left
        for left in boxes
        for right in boxes
        if left.level == right.level and left.left < right.left
    )
    assert max(box.level for box in boxes) == 4
    assert {box.level for box in (boxes[0], boxes[-1])} == {0}


def test_only_a_plain_unet_can_be_drawn() -> None:
    with pytest.raises(UsageError, match="a FCN cannot be drawn"):
        drawing(FCN(), (64, 64))
