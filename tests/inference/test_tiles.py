"""Tiled = whole: for every plain U-Net, image size and tile size.

``USEG_SOAK=1`` (``make soak``) tries 500 of them instead of 40.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from useg.images.image_files import read_image
from useg.inference import tiles
from useg.inference.tiles import LogitsFunction, Span
from useg.models.geometry import Geometry
from useg.models.unet import UNet

pytestmark = pytest.mark.wheel

SOAK = os.environ.get("USEG_SOAK") == "1"
SHARED = Path(__file__).parents[3] / "shared/data"


@lru_cache
def unet(
    depth: int, padding: str, up_kernel: int = 2, extra_conv: bool = False, width: int = 2
) -> tuple[LogitsFunction, Geometry]:
    torch.manual_seed(depth)
    made = UNet(
        2, 3, width=width, depth=depth, padding=padding, up_kernel=up_kernel, extra_conv=extra_conv
    ).eval()  # type: ignore[arg-type]

    def run(x: NDArray[np.generic]) -> NDArray[np.float32]:
        assert x.shape[2:] == (made.valid_size(x.shape[2]), made.valid_size(x.shape[3]))
        with torch.inference_mode():
            logits: NDArray[np.float32] = made(
                torch.from_numpy(np.ascontiguousarray(x)).float()
            ).numpy()
        return logits

    return run, Geometry(made.margin, made.stride, made.context, made.valid_size)


def noise(height: int, width: int, bands: int = 2) -> NDArray[np.float32]:
    return (
        np.random.default_rng(height * width).normal(size=(height, width, bands)).astype(np.float32)
    )


def check_same_answer(tiled: NDArray[np.float32], whole: NDArray[np.float32]) -> None:
    """Logits differ by rounding only; labels only where rounding decides between two classes."""
    rounding = 2e-5 * max(1.0, float(np.abs(whole).max()))
    np.testing.assert_allclose(tiled, whole, rtol=0, atol=rounding)
    best = np.sort(whole, 0)
    sure = best[-1] - best[-2] > 2 * rounding
    assert (tiled.argmax(0) == whole.argmax(0))[sure].all()


@settings(max_examples=500 if SOAK else 40)
@given(st.data())
def test_tiled_equals_whole(data: st.DataObject) -> None:
    depth, width = data.draw(st.integers(1, 5), "depth"), data.draw(st.integers(1, 4), "width")
    padding = data.draw(st.sampled_from(["valid", "same"]), "padding")
    up_kernel = data.draw(st.sampled_from([2, 3]), "up kernel") if padding == "same" else 2
    run, geometry = unet(depth, padding, up_kernel, data.draw(st.booleans(), "extra"), width)
    smallest = tiles.window_size(1, geometry)
    tile = data.draw(st.integers(1, 2 * smallest), "tile")
    window = tiles.window_size(tile, geometry)
    step = window - 2 * (geometry.margin + geometry.halo)
    height, width = (
        data.draw(st.integers(1, window + most * step), name)
        for most, name in ((3, "height"), (2, "width"))
    )
    image = noise(height, width)
    whole = tiles.predict_tiled(image, run, geometry, 0)
    assert whole.shape == (3, height, width)
    check_same_answer(tiles.predict_tiled(image, run, geometry, tile), whole)


@settings(max_examples=200 if SOAK else 20)
@given(st.data())
def test_any_block_of_the_output_can_be_computed_alone(data: st.DataObject) -> None:
    run, geometry = unet(
        data.draw(st.integers(1, 3), "depth"),
        data.draw(st.sampled_from(["valid", "same"]), "padding"),
    )
    lengths = [data.draw(st.integers(1, 260), name) for name in ("height", "width")]
    extents = [min(data.draw(st.integers(1, 60), "extent"), length) for length in lengths]
    firsts = [
        data.draw(st.integers(0, length - extent), "first")
        for length, extent in zip(lengths, extents, strict=True)
    ]
    image = noise(*lengths)
    size = tuple(
        tiles.block_size(extent, length, geometry)
        for extent, length in zip(extents, lengths, strict=True)
    )
    rows, columns = (
        tiles.block_span(k, k + e, w, n, geometry)
        for k, e, w, n in zip(firsts, extents, size, lengths, strict=True)
    )
    ((window, part),) = tiles.tile_logits(
        tiles.tile_batches([tiles.TileWindow(image, rows, columns, size)], geometry), run
    )  # type: ignore[arg-type]
    check_same_answer(
        part,
        tiles.predict_tiled(image, run, geometry, 0)[
            :, window.rows.in_image, window.columns.in_image
        ],
    )


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_windows_are_really_used_and_of_one_size_and_several_at_a_time(padding: str) -> None:
    _, geometry = unet(2, padding)
    shapes = []

    def run(x: NDArray[np.generic]) -> NDArray[np.float32]:
        shapes.append(x.shape)
        return np.zeros(
            (len(x), 3, x.shape[2] - 2 * geometry.margin, x.shape[3] - 2 * geometry.margin),
            np.float32,
        )

    tiles.predict_tiled(np.zeros((600, 500, 2)), run, geometry, 100)
    assert len({shape[2:] for shape in shapes}) == 1
    assert max(shapes[0][2:]) <= 100
    assert sum(shape[0] for shape in shapes) > 60
    assert {shape[0] for shape in shapes[:-1]} == {
        tiles.MAX_TILE_BATCH_PIXELS // (shapes[0][2] * shapes[0][3])
    }


def test_a_batch_of_images_gives_the_outputs_of_single_images() -> None:
    run, geometry = unet(2, "same")
    images = [noise(40, 60), noise(90, 130), noise(37, 57), noise(38, 59), noise(40, 60)]
    counts = []

    def counted(x: NDArray[np.generic]) -> NDArray[np.float32]:
        counts.append(len(x))
        return run(x)

    for tile in (0, 64):
        for image, logits in zip(
            images, tiles.predict_tiled_many(images, counted, geometry, tile), strict=True
        ):
            check_same_answer(logits, tiles.predict_tiled(image, run, geometry, 0))
    assert counts[:3] == [1, 1, 3]  # in one pass each: of one padded size are the last three


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_windows_that_are_off_by_one_are_noticed(
    padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The property test fails if windows start off the pooling grid or keep spoiled output."""
    run, geometry = unet(3, padding)
    image, exact = noise(200, 90), tiles.tile_spans
    whole = tiles.predict_tiled(image, run, geometry, 0)
    check_same_answer(tiles.predict_tiled(image, run, geometry, 120), whole)

    def shifted(length: int, *rest: Any) -> list[Span]:
        return [
            replace(span, start=span.start - 1) if span.first > 0 and span.last < length else span
            for span in exact(length, *rest)
        ]

    monkeypatch.setattr(tiles, "tile_spans", shifted)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_same_answer(tiles.predict_tiled(image, run, geometry, 120), whole)
    monkeypatch.undo()
    if padding == "same":
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            check_same_answer(
                tiles.predict_tiled(
                    image, run, replace(geometry, context=geometry.context - geometry.stride), 120
                ),
                whole,
            )


@settings(max_examples=30)
@given(
    depth=st.integers(1, 5),
    padding=st.sampled_from(["valid", "same"]),
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
)
def test_the_chosen_tile_fits_and_computes_no_more_than_others(
    depth: int, padding: str, height: int, width: int
) -> None:
    _, geometry = unet(depth, padding)

    def size(tile: int) -> tuple[int, int]:
        return tiles.tile_windows(np.zeros((height, width, 0)), geometry, tile)[0].size

    def work(tile: int) -> int:
        return sum(
            window.size[0] * window.size[1]
            for window in tiles.tile_windows(np.zeros((height, width, 0)), geometry, tile)
        )

    chosen = tiles.choose_tile(height, width, geometry, 1_000_000)
    assert np.prod(size(chosen)) <= 1_000_000
    assert chosen == 0 or work(chosen) <= 1.1 * min(work(tile) for tile in (640, 800, 960))
    assert (chosen == 0) == (np.prod(size(0)) <= 1_000_000)


def test_the_smallest_window_is_used_even_if_it_exceeds_the_memory() -> None:
    _, geometry = unet(4, "same")
    assert tiles.choose_tile(4000, 3000, geometry, 1) == tiles.window_size(1, geometry)


@pytest.mark.parametrize("name", ["carla/CameraRGB", "isbi2012/image"])
def test_windows_fit_real_images(name: str) -> None:
    """Windows fit real images; benchmarks/tiles.py measures whether trained networks agree."""
    if not (SHARED / name).is_dir():
        pytest.skip("the real pictures are not beside this checkout")
    image = read_image(sorted((SHARED / name).iterdir())[0])[..., :1].repeat(2, 2) / np.float32(255)
    for padding in ("valid", "same"):
        run, geometry = unet(3, padding)
        check_same_answer(
            tiles.predict_tiled(image, run, geometry, 160),
            tiles.predict_tiled(image, run, geometry, 0),
        )
