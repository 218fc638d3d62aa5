"""Tiled = whole: for every plain U-Net, image size and tile size."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from useg import UNet
from useg.inference import tiles
from useg.inference.tiles import Geometry


@lru_cache
def network(depth: int, padding: str, up_kernel: int, extra_conv: bool) -> tuple[UNet, Geometry]:
    torch.manual_seed(depth)
    unet = UNet(2, 3, width=2, depth=depth, padding=padding, up_kernel=up_kernel, extra_conv=extra_conv).double().eval()  # type: ignore[arg-type]
    return unet, Geometry(unet.margin, unet.stride, unet.context, unet.valid_size)


def logits(image: NDArray[np.generic], unet: UNet, geometry: Geometry, tile: int) -> NDArray[np.float32]:
    def run(x: NDArray[np.generic]) -> NDArray[np.float32]:
        assert x.shape[2:] == (unet.valid_size(x.shape[2]), unet.valid_size(x.shape[3]))
        with torch.inference_mode():
            answer: NDArray[np.float32] = unet(torch.from_numpy(x).double()).numpy()
        return answer

    return tiles.predict(image, run, geometry, tile)


@settings(max_examples=60)
@given(st.data())
def test_tiled_equals_whole(data: st.DataObject) -> None:
    depth = data.draw(st.integers(1, 4), "depth")
    padding = data.draw(st.sampled_from(["valid", "same"]), "padding")
    unet, geometry = network(depth, padding, 3 if padding == "same" and data.draw(st.booleans(), "3x3 up") else 2, data.draw(st.booleans(), "extra"))
    longest = 3 * tiles.window_size(1, geometry) if depth < 4 else 450
    height, width = data.draw(st.integers(1, longest), "height"), data.draw(st.integers(1, longest), "width")
    tile = data.draw(st.integers(1, longest), "tile")
    image = np.random.default_rng(height * width).normal(size=(height, width, 2))
    whole = logits(image, unet, geometry, 0)
    assert whole.shape == (3, height, width)
    np.testing.assert_allclose(logits(image, unet, geometry, tile), whole, atol=1e-6)


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_windows_are_really_used_and_of_one_size(padding: str) -> None:
    unet, geometry = network(2, padding, 2, False)
    sizes = []

    def run(x: NDArray[np.generic]) -> NDArray[np.float32]:
        sizes.append(x.shape[2:])
        return np.zeros((1, 3, x.shape[2] - 2 * unet.margin, x.shape[3] - 2 * unet.margin), np.float32)

    tiles.predict(np.zeros((300, 200, 2)), run, geometry, 100)
    assert len(sizes) > 6
    assert len(set(sizes)) == 1
    assert max(sizes[0]) <= 100


def test_windows_off_the_stride_are_noticed() -> None:
    unet, geometry = network(3, "valid", 2, False)
    image = np.random.default_rng(0).normal(size=(200, 90, 2))
    whole = logits(image, unet, geometry, 0)
    off = Geometry(geometry.margin, 1, geometry.context, geometry.valid_size)  # windows may start anywhere
    length = tiles.window_size(120, geometry) - 2 * geometry.margin
    assert length % geometry.stride != 0  # so that windows laid side by side do start off the grid
    tiled = logits(image, unet, off, tiles.window_size(120, geometry))
    assert (np.abs(tiled - whole) > 1e-3).mean() > 0.2
