"""Where a GeoTIFF's pixels lie is what rasterio says, and is written again as it was read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tifffile
from made_inference import UTM, rasterio_open

from useg.errors import UsageError
from useg.images.tiff import georeference_from_tags, read_georeference

# 10 m pixels in UTM 32N: ModelPixelScale, ModelTiepoint, GeoKeyDirectory (projected, pixel is area,
# EPSG:32632)
PIXELS = np.zeros((3, 4), np.uint8)
MATRIX = (34264, "d", 16, (0.6, -0.8, 0.0, 7.0, -0.8, -0.6, 0.0, 9.0, *(0.0,) * 7, 1.0), True)
DEGREES = (34735, "H", 12, (1, 1, 0, 2, 1024, 0, 1, 2, 2048, 0, 1, 4326), True)
POINTS = (34735, "H", 16, (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 2, 3072, 0, 1, 32632), True)


@pytest.mark.parametrize(
    ("tags", "crs"),
    [
        (UTM.tags, "EPSG:32632"),
        (
            (UTM.tags[0], (33922, "d", 6, (2.0, 3.0, 0.0, 5.0, 6.0, 0.0), True), DEGREES),
            "EPSG:4326",
        ),
        ((*UTM.tags[:2], POINTS), "EPSG:32632"),
        ((MATRIX, POINTS), "EPSG:32632"),
        ((MATRIX,), ""),
        ((*UTM.tags[:2], (34735, "H", 8, (1, 1, 0, 1, 3072, 0, 1, 32767), True)), ""),
    ],
)
def test_georeferences_equal_those_of_rasterio(tags: tuple, crs: str, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", PIXELS, extratags=tags)
    place = read_georeference(tmp_path / "a.tif")
    assert place
    assert place.crs == crs
    with rasterio_open(tmp_path / "a.tif") as opened:
        np.testing.assert_allclose(place.transform, tuple(opened.transform)[:6])
        assert crs in ("", opened.crs and opened.crs.to_string())
    tifffile.imwrite(tmp_path / "b.tif", PIXELS, extratags=place.tags)
    assert read_georeference(tmp_path / "b.tif") == place


def test_files_without_a_georeference_have_none(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", PIXELS)
    PIL.Image.fromarray(PIXELS).save(tmp_path / "a.png")
    assert read_georeference(tmp_path / "a.tif") is read_georeference(tmp_path / "a.png") is None
    assert (
        georeference_from_tags(
            {33922: (12, (0.0, 0.0, 0.0, 1.0, 2.0, 0.0, 5.0, 5.0, 0.0, 2.0, 3.0, 0.0))}
        )
        is None
    ), "control points alone"
    with pytest.raises(UsageError, match=r"none\.tif' does not exist"):
        read_georeference(tmp_path / "none.tif")
