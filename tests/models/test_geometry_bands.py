"""Images get the bands and finite values that a model needs, or are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_data import build_samples, write_tiff_dataset

from useg.errors import UsageError
from useg.models.geometry import WorkingSize, fit_bands
from useg.training.batches import pixel_statistics


def test_nan_and_infinity_are_replaced_before_resizing(tmp_path: Path) -> None:
    image = np.arange(24, dtype=np.float32).reshape(3, 4, 2)
    image[0, 0] = np.nan
    image[1, 1, 0], image[2, 2, 1] = np.inf, -np.inf
    image[:, 3, 1] = np.nan
    band = image[..., 0][np.isfinite(image[..., 0])]
    fitted = fit_bands(image, 2, "float32", "x.tif")
    assert np.isfinite(fitted).all()
    assert (fitted[0, 0, 0], fitted[1, 1, 0]) == (np.float32(band.mean()), band.max())
    assert fitted[2, 2, 1] == np.nanmin(image[..., 1][np.isfinite(image[..., 1])])
    known = np.isfinite(image)
    assert (fitted[known] == image[known]).all()
    assert not fit_bands(np.full((2, 2, 1), np.nan, np.float32), 1, "float32", "x.tif").any()
    sample = build_samples(
        write_tiff_dataset(tmp_path, [image]), 2, "float32", WorkingSize(scale=2.0)
    )[0]
    assert np.isfinite(sample.image).all(), "before resizing, which would spread it"
    assert np.isfinite(
        pixel_statistics(build_samples(write_tiff_dataset(tmp_path, [image]), 2, "float32"))
    ).all()


def test_bands_are_repeated_or_refused() -> None:
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    assert (fit_bands(grey, 3, "uint8", "x.png") == np.repeat(grey, 3, 2)).all()
    with pytest.raises(UsageError, match=r"x.png has 1 bands, but 4 are needed"):
        fit_bands(grey, 4, "uint8", "x.png")
    with pytest.raises(UsageError, match=r"x.png holds uint8 pixels, but .* uint16"):
        fit_bands(grey, 1, "uint16", "x.png")
