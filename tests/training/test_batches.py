"""Crops copy the right pixels, and batches are a function of (seed, number) alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from useg.data.cache import CachedSample
from useg.models.geometry import reflect_indices
from useg.training.augment import PhotometricRange, measure_colours
from useg.training.batches import Batches, Crop, DeviceSamples, cut_crop, draw_crop


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
    crop = Crop(top, left, flip_left_right=mirror, flip_top_bottom=turn)
    image, label = cut_crop(sample(height, width), crop, (7, 5), margin)
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
    image, label = cut_crop(
        CachedSample(ramp[..., None], ramp, None), Crop(10, 8, zoom=0.5), (12, 10), 0
    )
    expected = 8 + (np.arange(12) + 0.5) * 0.5 - 0.5
    np.testing.assert_allclose(image[..., 0], np.tile(expected, (10, 1)), atol=1e-5)
    assert (np.abs(label - expected) <= 0.5).all()


def test_gain_and_offset_change_only_the_image() -> None:
    image, label = cut_crop(
        sample(8, 8), Crop(0, 0, gain=2.0, offset=np.float32([1, -1])), (8, 8), 0
    )
    np.testing.assert_allclose(image, sample(8, 8).image * np.float32(2) + np.float32([1, -1]))
    assert (label == sample(8, 8).label).all()


@pytest.mark.parametrize("flips", ["horizontal", "all"])
def test_drawn_crops_stay_inside_and_depend_on_the_seed_alone(flips: str) -> None:
    mean, std = np.float32([100, 100]), np.float32([50, 50])
    draws = [
        draw_crop(
            np.random.default_rng((seed, 1)), (100, 200), (60, 40), flips, mean, std, (0.6, 1.15)
        )
        for seed in range(300)
    ]
    again = draw_crop(
        np.random.default_rng((5, 1)), (100, 200), (60, 40), flips, mean, std, (0.6, 1.15)
    )
    for name in ("top", "left", "zoom", "flip_left_right", "flip_top_bottom"):
        assert getattr(again, name) == getattr(draws[5], name)
    for crop in draws:
        assert 0 <= crop.top <= crop.top + 40 * crop.zoom <= 100
        assert 0 <= crop.left <= crop.left + 60 * crop.zoom <= 200
    assert {crop.flip_left_right for crop in draws} == {True, False}
    top_bottom = {False} if flips == "horizontal" else {True, False}
    assert {crop.flip_top_bottom for crop in draws} == top_bottom


def test_indices_outside_are_mirrored() -> None:
    assert reflect_indices(np.arange(-4, 7), 3).tolist() == [2, 2, 1, 0, 0, 1, 2, 2, 1, 0, 0]
    assert reflect_indices(np.arange(-3, 3), 1).tolist() == [0] * 6


def batches(flips: str | None, margin: int = 0) -> Batches:
    samples = []
    for k in range(5):
        label = np.full((12, 16), k, np.uint8)
        samples.append(CachedSample(np.repeat(label[..., None], 3, 2), label, None))
    mean, std = np.zeros(3, np.float32), np.ones(3, np.float32)
    return Batches(samples, (16, 12), 2, 0, flips, mean, std, margin, torch.device("cpu"))


def test_photometric_changes_apply_to_images_alone_and_depend_on_seed_and_number_alone() -> None:
    plain = replace(batches("all"), zoom=(0.5, 2.0))
    changed = replace(
        plain, photometric=PhotometricRange(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, limit=255.0)
    )
    for number in (0, 3):
        x, target = changed.at(number)
        again, _ = changed.at(number)
        before, same = plain.at(number)
        assert torch.equal(x, again)
        assert torch.equal(target, same)
        assert not torch.allclose(x, before, atol=1)


def test_crops_take_other_colours_only_where_asked_to() -> None:
    others = np.stack([measure_colours(np.full((4, 4, 3), level)) for level in (90.0, 91.0)])
    plain = batches("all")
    changed = replace(plain, colours=others)
    numbers = range(20)
    assert all(torch.equal(changed.at(k)[0], plain.at(k)[0]) for k in numbers)
    stream = zip(changed.stream(0, is_matched=lambda number: number >= 5), numbers, strict=False)
    matched = 0
    for (x, target), number in stream:
        before, same = plain.at(number)
        assert torch.equal(target, same)
        for crop, own in zip(x, before, strict=True):
            is_matched = bool((crop >= 90).all())
            assert is_matched or torch.allclose(crop, own, atol=1e-4)
            assert not is_matched or number >= 5
            matched += is_matched
    assert 8 < matched < 22


def test_epoch_visits_every_sample_once_in_a_new_order() -> None:
    seen = [
        int(label[0, 0]) for _, target in islice(batches(None).stream(0), 5) for label in target
    ]
    assert sorted(seen[:5]) == sorted(seen[5:]) == [0, 1, 2, 3, 4]
    assert seen[:5] != seen[5:]


def test_batch_is_a_function_of_its_number_alone() -> None:
    streamed = list(islice(batches("all", 4).stream(0), 4))
    x, target = batches("all", 4).at(3)
    assert torch.equal(streamed[3][0], x)
    assert torch.equal(streamed[3][1], target)
    assert (x.shape, target.shape) == ((2, 3, 20, 24), (2, 12, 16))
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_crops_without_augmentation_are_the_samples() -> None:
    x, target = batches(None).at(0)
    assert torch.equal(x[:, 0].long(), target)


@pytest.mark.parametrize("pixels", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("flips", [None, "horizontal", "all"])
def test_crops_cut_on_the_device_equal_those_cut_on_the_cpu(pixels: str, flips: str | None) -> None:
    rng = np.random.default_rng(0)
    shapes = [(12, 16), (30, 9), (5, 40), (12, 16), (64, 48)]
    images = [(rng.random((*shape, 4)) * 250).astype(pixels) for shape in shapes]
    labels = [rng.integers(0, 9, shape, np.uint8) for shape in shapes]
    samples = [CachedSample(*pair, None) for pair in zip(images, labels, strict=True)]
    mean, std = np.full(4, 120, np.float32), np.full(4, 40, np.float32)
    device = torch.device("cpu")
    on_cpu = Batches(samples, (16, 12), 5, 0, flips, mean, std, 6, device, zoom=(0.5, 2.0))
    on_device = replace(on_cpu, device_samples=DeviceSamples(samples, device))
    for number in range(20):
        expected, found = on_cpu.at(number), on_device.at(number)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-3)
        assert torch.equal(found[1], expected[1])
        assert found[0].stride() == expected[0].stride()


def test_first_batches_are_at_half_size() -> None:
    ramp = np.tile(np.arange(0, 128, 2, dtype=np.uint8), (32, 1))
    sample = CachedSample(ramp[..., None], ramp, None)
    mean, std = np.zeros(1, np.float32), np.ones(1, np.float32)
    device = torch.device("cpu")
    full = Batches([sample], (64, 32), 1, 0, None, mean, std, 0, device)
    both = replace(full, coarse_size=(32, 16))
    shapes = [tuple(x.shape) for x, _ in islice(both.stream(0, lambda number: number < 2), 4)]
    assert shapes == [(1, 1, 16, 32)] * 2 + [(1, 1, 32, 64)] * 2
    x, target = both.at(1, coarse=True)
    # Each pixel is the mean of two neighbours.
    torch.testing.assert_close(x[0, 0, 0], torch.arange(1.0, 128, 4))
    assert (target[0] - x[0, 0]).abs().max() <= 1
    assert torch.equal(both.at(2)[0], full.at(2)[0])
    # A random crop shows the same place at both sizes.
    augmented = replace(both, flips="all")
    for number in range(9):
        means = [augmented.at(number, coarse)[0].mean() for coarse in (False, True)]
        torch.testing.assert_close(*means, rtol=0, atol=3)
