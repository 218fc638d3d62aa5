"""Statistics of samples equal those of numpy, and outliers hardly change them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from made_data import build_samples, write_random_dataset, write_tiff_dataset

from useg.training.batches import class_shares, pixel_statistics


def test_statistics_and_class_shares_equal_those_of_numpy(tmp_path: Path) -> None:
    samples = build_samples(write_random_dataset(tmp_path))
    pixels = np.concatenate([sample.image.reshape(-1, 3) for sample in samples]).astype(np.float64)
    mean, std = pixel_statistics(samples)
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-9)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-9)
    labels = np.concatenate([sample.label.ravel() for sample in samples])
    np.testing.assert_allclose(class_shares(samples), [(labels == k).mean() for k in range(3)])


def test_a_constant_band_has_deviation_one(tmp_path: Path) -> None:
    dataset = write_random_dataset(tmp_path, 1)
    PIL.Image.fromarray(np.full((8, 12, 3), 7, np.uint8)).save(dataset.pairs[0].image)
    assert pixel_statistics(build_samples(dataset))[1] == [1, 1, 1]


@pytest.mark.parametrize(("dtype", "unit"), [("uint16", 1.0), ("float32", 1.0), ("float32", 1e-9)])
def test_hot_pixels_hardly_change_the_statistics(dtype: str, unit: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    clean = [(rng.normal(1000, 100, (40, 50, 2)) * unit).astype(dtype) for _ in range(3)]
    hot = [picture.copy() for picture in clean]
    for picture in hot:
        picture[::20, 7] = 65535 * unit
    for pictures in (clean, hot):
        mean, std = pixel_statistics(
            build_samples(write_tiff_dataset(tmp_path, pictures), 2, dtype)
        )
        np.testing.assert_allclose(mean, [1000 * unit] * 2, rtol=0.01)
        np.testing.assert_allclose(std, [100 * unit] * 2, rtol=0.05)


def test_rare_bright_pixels_on_a_constant_background_count(tmp_path: Path) -> None:
    picture = np.zeros((100, 100, 1), np.uint16)
    picture[:6, :5] = 30000
    assert (
        pixel_statistics(build_samples(write_tiff_dataset(tmp_path, [picture]), 1, "uint16"))[1][0]
        > 1000
    )
