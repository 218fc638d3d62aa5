"""What each photometric change does to pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from useg.training.augment import (
    PhotometricRange,
    PixelChange,
    apply_changes,
    draw_change,
    draw_uniform,
    match_colours,
    measure_colours,
)

LIMIT = 255.0
ALL = PhotometricRange(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, LIMIT)


def plain(channels: int = 3) -> PixelChange:
    return PixelChange(np.eye(channels, dtype=np.float32))


def images(channels: int = 3) -> torch.Tensor:
    random = np.random.default_rng(0).uniform(20, 230, (2, 24, 32, channels))
    return torch.from_numpy(random.astype(np.float32))


def changed(change: PixelChange) -> torch.Tensor:
    return apply_changes(images(), [change, plain()], LIMIT, LIMIT)


def test_the_default_photometric_change_changes_nothing() -> None:
    assert torch.allclose(changed(plain()), images(), atol=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"gamma": 1.5},
        {"shading": np.ones((3, 3), np.float32) / 2},
        {"fog": (0.6, 0.2), "fog_color": 0.8},
        {"blur": 1.0},
        {"noise": 0.05},
        {"colors": np.full((3, 3), 1 / 3, np.float32)},
    ],
)
def test_a_photometric_change_applies_to_its_own_crop_alone(change: dict[str, object]) -> None:
    result = changed(replace(plain(), **change))  # type: ignore[arg-type]
    assert not torch.allclose(result[0], images()[0], atol=1)
    assert torch.allclose(result[1], images()[1], atol=1e-3)
    assert result.min() >= 0
    assert result.max() <= LIMIT


def test_gamma_above_1_darkens() -> None:
    assert torch.all(changed(replace(plain(), gamma=1.5))[0] <= images()[0] + 1e-3)


def test_fog_is_densest_where_its_share_is_largest() -> None:
    foggy = changed(replace(plain(), fog=(0.8, 0.1), fog_color=0.9))[0]
    assert foggy[:4].std() < 0.5 * images()[0, :4].std()
    assert foggy[-4:].std() > 0.7 * images()[0, -4:].std()
    assert foggy[:4].mean() > images()[0, :4].mean() + 50


def test_blur_keeps_the_mean_and_lowers_the_contrast() -> None:
    blurred = changed(replace(plain(), blur=1.5))[0]
    assert float(blurred.mean()) == pytest.approx(float(images()[0].mean()), rel=0.03)
    assert blurred.std() < 0.5 * images()[0].std()


def test_noise_is_that_of_its_seed() -> None:
    noisy = [changed(replace(plain(), noise=0.05, seed=seed)) for seed in (1, 1, 2)]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])


def test_gray_crops_have_equal_bands_and_keep_their_brightness() -> None:
    ranges = PhotometricRange(grayscale=1.0, limit=LIMIT)
    change = draw_change(np.random.default_rng(0), 3, ranges)
    result = apply_changes(images(), [change, change], LIMIT, LIMIT)
    assert torch.allclose(result[..., 0], result[..., 2], atol=1e-2)
    assert float(result.mean()) == pytest.approx(float(images().mean()), rel=0.05)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("limit", [LIMIT, None])
def test_any_bands_with_or_without_a_limit(channels: int, limit: float | None) -> None:
    ranges = replace(ALL, limit=limit)
    changes = [draw_change(np.random.default_rng(k), channels, ranges) for k in range(2)]
    result = apply_changes(images(channels), changes, limit, 100.0)
    assert result.shape == images(channels).shape
    assert bool(torch.isfinite(result).all())
    if limit is None:
        assert [change.fog for change in changes] == [(0.0, 0.0)] * 2


@pytest.mark.parametrize("limit", [LIMIT, None])
def test_changes_of_a_batch_at_once_equal_those_of_one_crop_after_the_other(
    limit: float | None,
) -> None:
    ranges = replace(ALL, shading=0.5, fog=0.5, blur=0.5, noise=0.5, limit=limit)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        changes = [draw_change(rng, 3, ranges) for _ in range(2)]
        alone, at_once = (
            apply_changes(images(), changes, limit, 100.0, at_once=at_once)
            for at_once in (False, True)
        )
        torch.testing.assert_close(at_once, alone, rtol=1e-5, atol=1e-3)


def test_uniform_numbers_are_those_of_numpy() -> None:
    ours, numpys = (np.random.default_rng(3) for _ in range(2))
    for low, high in ((-0.3, 0.3), (0.0, 1e-9), (5.0, 700.0)) * 100:
        assert draw_uniform(ours, low, high) == numpys.uniform(low, high)


def test_another_exposure_darkens_some_crops_and_brightens_others() -> None:
    ranges = PhotometricRange(exposure=1.0, limit=LIMIT)
    means = [
        float(
            apply_changes(
                images(), [draw_change(np.random.default_rng(k), 3, ranges)] * 2, LIMIT, 1
            ).mean()
        )
        for k in range(30)
    ]
    plain_mean = float(images().mean())
    assert min(means) < 0.3 * plain_mean
    assert max(means) > 1.2 * plain_mean


def test_the_exposure_leaves_pixels_without_a_limit_as_they_are() -> None:
    change = draw_change(np.random.default_rng(0), 3, PhotometricRange(exposure=1.0))
    assert np.allclose(change.colors, np.eye(3), atol=1e-6)


def test_nothing_is_drawn_without_a_range() -> None:
    assert not PhotometricRange(limit=LIMIT)
    change = draw_change(np.random.default_rng(0), 3, PhotometricRange(limit=LIMIT))
    assert torch.allclose(
        apply_changes(images(), [change, change], LIMIT, LIMIT), images(), atol=1e-2
    )


def test_an_image_takes_the_colours_of_another() -> None:
    rng = np.random.default_rng(0)
    image = rng.uniform(20, 80, (24, 30, 3)).astype(np.float32)
    other = (200 + 40 * rng.normal(size=(40, 20, 3))).astype(np.float32)
    old, new = measure_colours(image), measure_colours(other)
    matched = match_colours(torch.from_numpy(image), old, new)
    assert np.allclose(measure_colours(matched.numpy()), new, atol=2.5)
    # A part of the image changes as the whole, and brighter pixels stay brighter.
    part = match_colours(torch.from_numpy(image[4:9, 7:20]), old, new)
    assert torch.equal(part, matched[4:9, 7:20])
    order = image[..., 1].ravel().argsort()
    assert (matched[..., 1].ravel()[order].diff() >= 0).all()
    same = match_colours(torch.from_numpy(image), old, old)
    assert torch.allclose(same, torch.from_numpy(image), atol=0.1)
    flat = torch.full((4, 4, 3), 7.0)
    assert match_colours(flat, measure_colours(flat.numpy()), new).isfinite().all()


def test_colours_are_matched_before_all_other_changes() -> None:
    x = torch.from_numpy(np.random.default_rng(0).uniform(0, 99, (1, 8, 8, 3)).astype(np.float32))
    old = measure_colours(x[0].numpy())
    change = PixelChange(2 * np.eye(3, dtype=np.float32), matched=(old, np.zeros_like(old) + 50))
    assert torch.allclose(apply_changes(x, [change], LIMIT, LIMIT), torch.tensor(100.0))
