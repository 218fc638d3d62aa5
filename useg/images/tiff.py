"""TIFF -> the pixels of one of its pages: structure, size and page are checked before anything is decoded."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from useg.images.limits import (
    JPEG,
    UnreadableError,
    check_declared_size,
    check_directories,
    check_held,
    check_page,
    check_segments,
    clear_errors,
    file_bytes,
    silence_package,
)

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


_ORIENTATION = 0x0112


_LZW = 5


_MOST_PLANES = 1_000_000


_OTHER_COLOURS = {
    6: "YCbCr",
    8: "CIE Lab",
    9: "ICC Lab",
    10: "ITU Lab",
}  # of JPEG, the decoder makes RGB


@dataclass(frozen=True)
class Tiff:
    """The first picture (full resolution) of an open TIFF: pages of equal form, each made of one or more planes.

    Args:
        series: tifffile's series of planes.
        planes: ``(num_pages, num_planes)`` numbers of planes; a page has several where its bands are stored one by one.
    """

    series: Any
    planes: NDArray[np.int64]

    @property
    def first(self) -> Any:
        """The plane whose tags hold for all."""
        return self.series.keyframe

    @property
    def num_pages(self) -> int:
        """How many pictures of equal form the file holds."""
        return len(self.planes)

    @property
    def size(self) -> tuple[int, int]:
        """``(width, height)`` as stored."""
        return int(self.first.imagewidth), int(self.first.imagelength)

    @property
    def orientation(self) -> int:
        """As in EXIF; 1 is upright."""
        turn = self.first.tags.valueof(_ORIENTATION, 1)
        return turn if turn in range(1, 9) else 1

    @property
    def highest(self) -> int:
        """The largest value of a whole number of its bits; 1 for fractions."""
        return (1 << self.first.bitspersample) - 1 if self.first.dtype.kind == "u" else 1

    @property
    def called_alpha(self) -> tuple[int, ...]:
        """The bands that the file calls alpha, premultiplied (1) or not (2); 0 says nothing about a band."""
        start = self.first.samplesperpixel - len(self.first.extrasamples)
        return tuple(
            start + k
            for k, kind in enumerate(self.first.extrasamples)
            if kind in (1, 2) and start + k > 0
        )

    @property
    def colors(self) -> NDArray[np.uint8] | None:
        """The palette ``(N, 3)`` of a file of indices."""
        if self.first.photometric != 3 or self.first.colormap is None:
            return None
        colors: NDArray[Any] = self.first.colormap
        return (colors >> 8 if colors.max() > 255 else colors).T.astype(np.uint8)


def is_tiff(file: BinaryIO) -> bool:
    """Say whether a file starts as TIFF or BigTIFF do."""
    file.seek(0)
    start = file.read(4)
    file.seek(0)
    if not start:
        raise ValueError("the file is empty")
    return start in TIFF_STARTS


@contextmanager
def open_tiff(file: BinaryIO) -> Iterator[Tiff]:
    """Open a TIFF; no pixels are decoded."""
    import tifffile

    silence_package("tifffile")
    check_directories(file)
    file.seek(0)
    with tifffile.TiffFile(
        file, _multifile=False
    ) as opened:  # an OME-TIFF may name other files, which nobody asked to read
        series = opened.series[0]
        yield Tiff(series, _planes(series))


def _planes(series: Any) -> NDArray[np.int64]:
    """Sort a series' planes into pages: its axis C counts bands, unless each plane has several itself; all other axes count pages."""
    first, axes, shape = (
        series.keyframe,
        series.get_axes(squeeze=False),
        series.get_shape(squeeze=False),
    )
    before = min(axes.index(axis) for axis in "SYX" if axis in axes)
    axes, shape = axes[:before], shape[:before]
    if first.imagedepth != 1:
        raise UnreadableError("it stores a volume in one page")
    if math.prod(shape) > _MOST_PLANES or math.prod(shape) * math.prod(first.shape) != series.size:
        raise ValueError(
            f"its description of {' x '.join(map(str, series.shape))} does not fit its pages"
        )
    bands = [k for k, axis in enumerate(axes) if axis == "C" and first.samplesperpixel == 1]
    planes = np.moveaxis(
        np.arange(math.prod(shape)).reshape(shape),
        bands,
        range(len(shape) - len(bands), len(shape)),
    )
    return planes.reshape(-1, math.prod(shape[k] for k in bands))


def read_tiff(file: BinaryIO, tiff: Tiff, max_pixels: int, page: int | None) -> NDArray[Any]:
    """Decode one page: ``(H, W, C)`` as stored, in native byte order.

    Args:
        file: the TIFF.
        tiff: what :func:`open_tiff` says about it.
        max_pixels: the limit for :func:`check_size`.
        page: which; None when there is only one.
    """
    numbers = tiff.planes[check_page(page, tiff.num_pages)]
    first, (width, height) = tiff.first, tiff.size
    check_kind(first)
    num_bands = len(numbers) * first.samplesperpixel
    check_declared_size(width, height, num_bands * first.dtype.itemsize, max_pixels)
    planes = [_read_plane(file, tiff.series, int(number)) for number in numbers]
    pixels = planes[0] if len(planes) == 1 else np.stack(planes, -1)
    if first.axes.startswith("S"):
        pixels = np.moveaxis(pixels, 0, -1)
    return pixels.reshape(height, width, num_bands).astype(
        np.uint8 if pixels.dtype == bool else pixels.dtype.newbyteorder("="), copy=False
    )


def check_kind(first: Any) -> None:
    """Refuse a plane of numbers that are no pixels, or of colours that are not RGB."""
    if first.dtype is None or first.dtype.kind not in "buif":
        raise UnreadableError(f"it stores {first.dtype or 'unknown'} numbers")
    if first.photometric in _OTHER_COLOURS and first.compression not in JPEG:
        raise UnreadableError(f"its colours are {_OTHER_COLOURS[first.photometric]}, not RGB")


def _read_plane(file: BinaryIO, series: Any, number: int) -> NDArray[Any]:
    first = series.keyframe
    if (
        series.dataoffset is not None
    ):  # one after the other in the file, perhaps without an entry of their own
        check_held(first.nbytes * (number + 1), file_bytes(file) - series.dataoffset, 1)
        handle = series.parent.filehandle
        handle.seek(series.dataoffset + number * first.nbytes)
        values: NDArray[Any] = handle.read_array(
            series.parent.byteorder + first.dtype.char, math.prod(first.shape)
        )
        return values.reshape(first.shape)
    pixels: NDArray[Any] = checked_plane(file, series, number).asarray()
    return pixels


def checked_plane(file: BinaryIO, series: Any, number: int) -> Any:
    """Return tifffile's page of a plane whose strips or tiles are all there, ready to be decoded."""
    plane = series[number]
    if plane is None:
        raise ValueError(f"plane {number} is missing")
    check_segments(file, plane, series.keyframe)
    if series.keyframe.compression == _LZW:
        _let_libtiff_decode(series.keyframe)
    return plane


def _let_libtiff_decode(first: Any) -> None:
    """Have a plane's LZW decoded by libtiff, and the rest done by tifffile.

    imagecodecs' own decoder trusts the first code behind a clear code: where that names a string not yet made, it follows a stray pointer.
    libtiff checks, and takes half the time.
    """
    import imagecodecs

    silence_package("imagecodecs")
    order, first.compression, first.fillorder = first.fillorder, 1, 1
    unpack = first.decode  # of bytes that are not compressed
    first.compression = _LZW
    rows, columns = (
        (first.tilelength, first.tilewidth)
        if first.is_tiled
        else (first.rowsperstrip, first.imagewidth)
    )
    samples = first.samplesperpixel if first.planarconfig == 1 else 1
    bits = (
        first.bitspersample * samples
        if isinstance(first.bitspersample, int)
        else sum(first.bitspersample)
    )
    strips = math.ceil(first.imagelength / rows)

    def decode(content: bytes | None, number: int, /, **options: Any) -> Any:
        if content is not None:
            height = (
                rows if first.is_tiled else min(rows, first.imagelength - number % strips * rows)
            )
            content = imagecodecs.tiff_decode(
                _lzw_as_tiff(content, (columns * bits + 7) // 8 * height, order)
            ).tobytes()
        return unpack(content, number, **options)

    first.decode = decode


def _lzw_as_tiff(content: bytes, num_bytes: int, order: int) -> bytes:
    """Wrap one strip or tile of LZW into the smallest TIFF: a row of bytes."""
    tags = {
        256: num_bytes,
        257: 1,
        258: 8,
        259: _LZW,
        262: 1,
        266: order,
        273: 134,
        277: 1,
        278: 1,
        279: len(content),
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + content


SCALE, TIE_POINTS, TRANSFORMATION, KEYS = (
    33550,
    33922,
    34264,
    34735,
)  # tags of GeoTIFF 1.1, with those of the keys' longer values behind


_TAGS = (SCALE, TIE_POINTS, TRANSFORMATION, KEYS, 34736, 34737)


_RASTER_TYPE, _IS_POINT = 1025, 2  # keys


_SYSTEMS = (3072, 2048)  # a projection, degrees


_USER_DEFINED = 32767


Transform = tuple[float, float, float, float, float, float]


@dataclass(frozen=True)
class GeoReference:
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


def read_place(path: Path) -> GeoReference | None:
    """Return where a picture lies on a map; None where its file does not say so, or is no TIFF.

    Raises:
        UsageError: no such file, or a damaged TIFF.
    """
    with clear_errors(str(path)), path.open("rb") as file:
        if not is_tiff(file):
            return None
        with open_tiff(file) as tiff:
            return place_of(
                {
                    tag.code: (int(tag.dtype), tag.value)
                    for tag in tiff.first.tags
                    if tag.code in _TAGS
                }
            )


def place_of(tags: Mapping[int, tuple[int, Any]]) -> GeoReference | None:
    """Make a place of a TIFF's tags: code -> (type, value); None where they do not hold one (control points alone are none)."""
    values = {code: value for code, (_, value) in tags.items()}
    transform = _transform(values)
    if transform is None:
        return None
    keys = _keys(values.get(KEYS, ()))
    if keys.get(_RASTER_TYPE) == _IS_POINT:  # whole coordinates are the middles of pixels
        a, b, c, d, e, f = transform
        transform = (a, b, c - (a + b) / 2, d, e, f - (d + e) / 2)
    system = next(
        (keys[key] for key in _SYSTEMS if keys.get(key, _USER_DEFINED) not in (0, _USER_DEFINED)),
        None,
    )
    kept = tuple(
        (code, kind, 0 if isinstance(value, str) else len(value), value, True)
        for code, (kind, value) in tags.items()
        if code in _TAGS
    )
    return GeoReference(transform, f"EPSG:{system}" if system else "", kept)


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
