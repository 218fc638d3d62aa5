"""The cache holds what the files hold, at the working size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from useg import ClassTable, UsageError
from useg.data.cache import WorkingSize, build_cache, class_shares, fit_bands, pixel_statistics
from useg.data.dataset import Dataset, Pair


def make_set(folder: Path, count: int = 4, size: tuple[int, int] = (12, 8)) -> Dataset:
    rng = np.random.default_rng(0)
    pairs = []
    for k in range(count):
        pairs.append(Pair(folder / f"{k}.png", folder / f"{k}_mask.png", "train"))
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(pairs[-1].image)
        Image.fromarray(rng.integers(0, 3, (size[1], size[0]), np.uint8)).save(pairs[-1].mask)
    return Dataset(folder, "folders", tuple(pairs), ClassTable(("a", "b", "c")))


def test_holds_the_files_in_order(tmp_path: Path) -> None:
    dataset = make_set(tmp_path)
    done = []
    cache = build_cache(dataset, dataset.pairs, WorkingSize(), 3, "uint8", native=True, progress=lambda: done.append(1))
    assert len(done) == 4
    for pair, sample in zip(dataset.pairs, cache, strict=True):
        assert (sample.image == np.asarray(Image.open(pair.image))).all()
        assert (sample.label == np.asarray(Image.open(pair.mask))).all()
        assert sample.native is not None
        assert (sample.native == sample.label).all()


def test_reduces_to_the_working_size_but_keeps_the_native_label(tmp_path: Path) -> None:
    dataset = make_set(tmp_path)
    for sample in build_cache(dataset, dataset.pairs, WorkingSize((6, 4)), 3, "uint8", native=True):
        assert sample.image.shape == (4, 6, 3)
        assert sample.label.shape == (4, 6)
        assert sample.native is not None
        assert sample.native.shape == (8, 12)


def test_statistics_and_shares_equal_numpy(tmp_path: Path) -> None:
    dataset = make_set(tmp_path)
    cache = build_cache(dataset, dataset.pairs, WorkingSize(), 3, "uint8")
    pixels = np.concatenate([sample.image.reshape(-1, 3) for sample in cache]).astype(np.float64)
    mean, std = pixel_statistics(cache)
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-6)
    labels = np.concatenate([sample.label.ravel() for sample in cache])
    np.testing.assert_allclose(class_shares(cache, 3), [(labels == k).mean() for k in range(3)])


def test_a_constant_band_has_deviation_one(tmp_path: Path) -> None:
    dataset = make_set(tmp_path, 1)
    Image.fromarray(np.full((8, 12, 3), 7, np.uint8)).save(dataset.pairs[0].image)
    assert pixel_statistics(build_cache(dataset, dataset.pairs, WorkingSize(), 3, "uint8"))[1] == [1, 1, 1]


def test_bands_are_fitted_or_refused() -> None:
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    assert (fit_bands(grey, 3, "uint8", "x.png") == np.repeat(grey, 3, 2)).all()
    with pytest.raises(UsageError, match=r"x.png has 1 bands, but 4 are needed"):
        fit_bands(grey, 4, "uint8", "x.png")
    with pytest.raises(UsageError, match=r"x.png holds uint8 pixels, but .* uint16"):
        fit_bands(grey, 1, "uint16", "x.png")
