"""The tags of a GeoTIFF -> where on a map its pixels lie (numpy and GDAL are not needed)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from useg.data.limits import clear_errors
from useg.data.tiff import is_tiff, open_tiff

SCALE, TIE_POINTS, TRANSFORMATION, KEYS = 33550, 33922, 34264, 34735  # tags of GeoTIFF 1.1, with those of the keys' longer values behind
_TAGS = (SCALE, TIE_POINTS, TRANSFORMATION, KEYS, 34736, 34737)
_RASTER_TYPE, _IS_POINT = 1025, 2  # keys
_SYSTEMS = (3072, 2048)  # a projection, degrees
_USER_DEFINED = 32767

Transform = tuple[float, float, float, float, float, float]


@dataclass(frozen=True)
class Place:
    """Where a picture lies on a map.

    Args:
        transform: six numbers ``a, b, c, d, e, f`` (rasterio's order): the pixel corner (x, y) lies at ``(a x + b y + c, d x + e y + f)``.
        crs: the map's coordinate system, such as ``"EPSG:32632"``; empty where it is not known by a number.
        tags: what says so in a GeoTIFF, as tifffile's ``extratags``: (code, type, count, value, True).
    """

    transform: Transform
    crs: str = ""
    tags: tuple[tuple[int, int, int, Any, bool], ...] = ()

    @property
    def pixel_area(self) -> float:
        """Area of a pixel in square units of the map."""
        a, b, _, d, e, _ = self.transform
        return abs(a * e - b * d)


def read_place(path: Path) -> Place | None:
    """Return where a picture lies on a map; None where its file does not say so, or is no TIFF.

    Raises:
        UsageError: no such file, or a damaged TIFF.
    """
    with clear_errors(str(path)), path.open("rb") as file:
        if not is_tiff(file):
            return None
        with open_tiff(file) as tiff:
            return place_of({tag.code: (int(tag.dtype), tag.value) for tag in tiff.first.tags if tag.code in _TAGS})


def place_of(tags: Mapping[int, tuple[int, Any]]) -> Place | None:
    """Make a place of a TIFF's tags: code -> (type, value); None where they do not hold one (control points alone are none)."""
    values = {code: value for code, (_, value) in tags.items()}
    transform = _transform(values)
    if transform is None:
        return None
    keys = _keys(values.get(KEYS, ()))
    if keys.get(_RASTER_TYPE) == _IS_POINT:  # whole coordinates are the middles of pixels
        a, b, c, d, e, f = transform
        transform = (a, b, c - (a + b) / 2, d, e, f - (d + e) / 2)
    system = next((keys[key] for key in _SYSTEMS if keys.get(key, _USER_DEFINED) not in (0, _USER_DEFINED)), None)
    kept = tuple((code, kind, 0 if isinstance(value, str) else len(value), value, True) for code, (kind, value) in tags.items() if code in _TAGS)
    return Place(transform, f"EPSG:{system}" if system else "", kept)


def _transform(values: Mapping[int, Any]) -> Transform | None:
    if len(matrix := values.get(TRANSFORMATION, ())) == 16:
        return matrix[0], matrix[1], matrix[3], matrix[4], matrix[5], matrix[7]
    scale, ties = values.get(SCALE, ()), values.get(TIE_POINTS, ())
    if len(scale) < 2 or len(ties) < 6:
        return None
    column, row, _, x, y = ties[:5]
    return scale[0], 0.0, x - column * scale[0], 0.0, -scale[1], y + row * scale[1]


def _keys(directory: Sequence[int]) -> dict[int, int]:
    """Read the keys whose values are numbers, from four numbers each: key, where its value is (0: here), how many, the value."""
    entries = [directory[k : k + 4] for k in range(4, len(directory) - 3, 4)]
    return {entry[0]: entry[3] for entry in entries if entry[1] == 0}
