"""Crops: exact copies when nothing is asked, the same place in image and label, and a pure function of the draw."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from useg.data.cache import CachedSample
from useg.models.geometry import reflect_indices
from useg.training.batches import Crop, draw_crop, take


def sample(height: int, width: int) -> CachedSample:
    """The label numbers the pixels; the image says the same in its first band."""
    label = (np.arange(height * width) % 251).astype(np.uint8).reshape(height, width)
    return CachedSample(np.stack([label, 255 - label], 2), label, None)


@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(-30, 30),
    st.integers(-30, 30),
    st.integers(0, 9),
    st.booleans(),
    st.booleans(),
)
def test_whole_pixels_are_copied_and_mirrored_outside(
    height: int, width: int, top: int, left: int, margin: int, mirror: bool, turn: bool
) -> None:
    image, label = take(
        sample(height, width), Crop(top, left, mirror=mirror, turn=turn), (7, 5), margin
    )
    pad = 60
    expected = np.pad(sample(height, width).label, pad, mode="symmetric")
    window = expected[
        pad + top - margin : pad + top + 5 + margin, pad + left - margin : pad + left + 7 + margin
    ]
    window = window[:: -1 if turn else 1, :: -1 if mirror else 1]
    assert (image[..., 0] == window).all()
    assert (image[..., 1] == 255 - window).all()
    assert (label == window[margin : margin + 5, margin : margin + 7]).all()


def test_zoom_samples_a_ramp_at_the_right_places() -> None:
    ramp = np.tile(np.arange(40, dtype=np.uint8), (40, 1))
    image, label = take(
        CachedSample(ramp[..., None], ramp, None), Crop(10, 8, zoom=0.5), (12, 10), 0
    )
    expected = 8 + (np.arange(12) + 0.5) * 0.5 - 0.5
    np.testing.assert_allclose(image[..., 0], np.tile(expected, (10, 1)), atol=1e-5)
    assert (np.abs(label - expected) <= 0.5).all()


def test_gain_and_offset_reach_the_image_alone() -> None:
    image, label = take(sample(8, 8), Crop(0, 0, gain=2.0, offset=np.float32([1, -1])), (8, 8), 0)
    np.testing.assert_allclose(image, sample(8, 8).image * np.float32(2) + np.float32([1, -1]))
    assert (label == sample(8, 8).label).all()


@pytest.mark.parametrize("flips", ["horizontal", "all"])
def test_draws_stay_inside_when_they_fit_and_depend_on_the_seed_alone(flips: str) -> None:
    mean, std = np.float32([100, 100]), np.float32([50, 50])
    draws = [
        draw_crop(np.random.default_rng((seed, 1)), 100, 200, (60, 40), flips, mean, std)
        for seed in range(300)
    ]
    again = draw_crop(np.random.default_rng((5, 1)), 100, 200, (60, 40), flips, mean, std)
    assert (again.top, again.left, again.zoom, again.mirror, again.turn) == (
        draws[5].top,
        draws[5].left,
        draws[5].zoom,
        draws[5].mirror,
        draws[5].turn,
    )
    assert all(
        crop.top >= 0
        and crop.top + 40 * crop.zoom <= 100
        and crop.left >= 0
        and crop.left + 60 * crop.zoom <= 200
        for crop in draws
    )
    assert {crop.mirror for crop in draws} == {True, False}
    assert {crop.turn for crop in draws} == ({False} if flips == "horizontal" else {True, False})


def test_mirrored() -> None:
    assert reflect_indices(np.arange(-4, 7), 3).tolist() == [2, 2, 1, 0, 0, 1, 2, 2, 1, 0, 0]
    assert reflect_indices(np.arange(-3, 3), 1).tolist() == [0] * 6
