"""Read TIFFs: the pixels of a page, and where a GeoTIFF lies on a map.

Structure, size, page, strips and tiles are checked before anything is decoded: for some damaged
TIFFs, tifffile itself would loop, fill the memory, or return half an image.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
import PIL.Image
from numpy.typing import NDArray

from useg.images.formats import (
    ALL_PAGES,
    EXTRA_BYTES,
    MAX_SEGMENT_BYTES,
    StoredPixels,
    UnreadableError,
    check_declared_size,
    check_held,
    check_page,
    check_scans,
    file_bytes,
    is_tiff,
    jpeg_segments,
    open_image_file,
    silence_package,
    turn_upright,
)
from useg.images.tiff_directories import GEO_TAGS, Directories, arranged

_ORIENTATION = 0x0112
_LZW = 5
# Maximum number of bands with a page each: spectral cameras have hundreds.
MAX_PLANES = 1024
# Maximum bytes of tiles that were never written; a raster that is read in parts may lack more.
MAX_MISSING_BYTES = 256 << 20
# Photometric interpretations that are not RGB; JPEG's decoder converts its own to RGB.
_OTHER_COLOURS = {6: "YCbCr", 8: "CIE Lab", 9: "ICC Lab", 10: "ITU Lab"}

SCALE, TIE_POINTS, TRANSFORMATION, KEYS = GEO_TAGS[:4]
# GDAL's tag: the value of pixels without data, as text.
NO_DATA_TAG = 42113
# Keys: the raster type, and coordinate systems (projected, geographic).
_RASTER_TYPE, _IS_POINT = 1025, 2
_SYSTEM_KEYS = (3072, 2048)
_USER_DEFINED = 32767
# Six numbers a, b, c, d, e, f in rasterio's order.
Transform = tuple[float, float, float, float, float, float]


JPEG = (7, 33007)
# Each strip or tile takes 30 microseconds, however small it is. Programs write tiles of 64 kB.
_MAX_SEGMENTS, _BYTES_PER_SEGMENT = 30_000, 4096
# Maximum bytes of pixels per byte of file, by compression. One bit of CCITT can encode a whole row,
# of up to 16,384 pixels on average; a ZSTD block repeats one byte over 128 kB.
_MAX_EXPANSION = {
    1: 1,
    2: 1 << 14,
    3: 1 << 14,
    4: 1 << 14,
    5: 4096,
    7: 4096,
    8: 1100,
    32773: 64,
    32946: 1100,
    33007: 4096,
    34925: 8192,
    50000: 1 << 16,
}


# Photometric interpretations of a TIFF.
_WHITE_IS_ZERO, _CMYK = 0, 5


@dataclass(frozen=True)
class Tiff:
    """The first image (full resolution) of an open TIFF: pages of equal form.

    Args:
        directories: of the file.
        first: tifffile's page of the first directory, whose tags apply to all planes.
        planes: ``(num_pages, num_planes)`` numbers of planes; a page has several planes if its
            bands are stored separately.
    """

    directories: Directories
    first: Any
    planes: NDArray[np.int64]

    def plane(self, number: int) -> Any:
        """Return tifffile's page of a plane."""
        places = self.directories.places
        if number < len(places):
            return self.directories.page(places[number]) if number else self.first
        # Consecutive planes may share one directory.
        plane = self.directories.page(places[0])
        plane.dataoffsets = tuple(place + number * plane.nbytes for place in plane.dataoffsets)
        return plane

    @property
    def num_pages(self) -> int:
        """Number of images of equal form in the file."""
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
        """The largest value of an integer with its bits; 1 for floats."""
        return (1 << self.first.bitspersample) - 1 if self.first.dtype.kind == "u" else 1

    @property
    def declared_alpha(self) -> tuple[int, ...]:
        """Bands that the file calls alpha, premultiplied (1) or not (2)."""
        start = self.first.samplesperpixel - len(self.first.extrasamples)
        return tuple(
            start + k
            for k, kind in enumerate(self.first.extrasamples)
            if kind in (1, 2) and start + k > 0
        )

    @property
    def no_data(self) -> float | None:
        """The value of pixels without data (GDAL's tag), or None."""
        try:
            return float(str(self.first.tags.valueof(NO_DATA_TAG, "")).strip("\0 "))
        except ValueError:
            return None

    @property
    def colors(self) -> NDArray[np.uint8] | None:
        """The palette ``(N, 3)`` of a file of indices, or None."""
        if self.first.photometric != 3 or self.first.colormap is None:
            return None
        colors: NDArray[Any] = self.first.colormap
        return (colors >> 8 if colors.max() > 255 else colors).T.astype(np.uint8)


@contextmanager
def open_tiff(file: BinaryIO) -> Iterator[Tiff]:
    """Open a TIFF without decoding pixels."""
    directories = Directories(file)
    first = directories.page(directories.places[0])
    if first.imagedepth != 1:
        raise UnreadableError("it stores a volume in one page")
    # The directory may lack the size or the number of bits.
    if not first.shape or 0 in first.shape:
        raise ValueError(f"it declares a size of {first.imagewidth}x{first.imagelength}")
    count, layout = len(directories.places), None
    if count > 1 or is_mapped(first):
        layout = directories.layout()
    if count == 1 and layout is not None and layout.one_directory and is_mapped(first):
        count = _planes_behind(first, layout.num_planes, file_bytes(file))
    planes = arranged(layout, count, first.samplesperpixel)
    if planes.shape[1] > MAX_PLANES:
        raise UnreadableError(f"it stores {planes.shape[1]:,} bands, each in a page of its own")
    yield Tiff(directories, first, planes)


def _planes_behind(first: Any, described: int, size: int) -> int:
    """Return how many consecutive planes the only directory of a file stands for.

    ImageJ and MetaMorph write such stacks. But if a program extracts one image of a stack, the
    description of all of them may stay in its file.
    """
    held = (size - first.dataoffsets[0]) // first.nbytes
    if described == 1 or held < 2:
        return 1
    if described > held:
        raise ValueError(f"its description declares {described:,} images, but it holds {held:,}")
    return described


def is_mapped(plane: Any) -> bool:
    """Tell whether a plane is stored uncompressed and in one piece."""
    return bool(plane.dtype is not None and plane.nbytes and plane.is_final)


def read_tiff(tiff: Tiff, file: BinaryIO, max_pixels: int, page: int | None) -> NDArray[Any]:
    """Decode one page: ``(H, W, C)`` as stored, in native byte order.

    Args:
        tiff: what :func:`open_tiff` returned for it.
        file: the TIFF.
        max_pixels: the limit for :func:`useg.images.formats.check_declared_size`.
        page: number of the page; None if there is only one; ALL_PAGES: the bands of all pages.
    """
    if page == ALL_PAGES:
        numbers = tiff.planes.ravel()
    else:
        numbers = tiff.planes[check_page(page, tiff.num_pages)]
    first, (width, height) = tiff.first, tiff.size
    check_kind(first)
    num_bands = len(numbers) * first.samplesperpixel
    check_declared_size(width, height, num_bands * first.dtype.itemsize, max_pixels)
    planes = [_decoded(checked_plane(file, tiff, int(number))) for number in numbers]
    pixels = planes[0] if len(planes) == 1 else np.stack(planes, -1)
    if first.axes.startswith("S"):
        pixels = np.moveaxis(pixels, 0, -1)
    return pixels.reshape(height, width, num_bands).astype(
        np.uint8 if pixels.dtype == bool else pixels.dtype.newbyteorder("="), copy=False
    )


def _decoded(plane: Any) -> NDArray[Any]:
    missing = plane.databytecounts.count(0) * math.prod(plane.chunks) * plane.dtype.itemsize
    if missing > MAX_MISSING_BYTES:
        raise ValueError(f"{missing:,} bytes of its pixels are missing")
    pixels: NDArray[Any] = plane.asarray()
    return pixels


def check_kind(first: Any) -> None:
    """Refuse a plane of numbers that are not pixels, or of colours that are not RGB."""
    if first.dtype is None or first.dtype.kind not in "buif":
        raise UnreadableError(f"it stores {first.dtype or 'unknown'} numbers")
    if first.photometric in _OTHER_COLOURS and first.compression not in JPEG:
        raise UnreadableError(f"its colours are {_OTHER_COLOURS[first.photometric]}, not RGB")


def checked_plane(file: BinaryIO, tiff: Tiff, number: int) -> Any:
    """Return tifffile's page of a plane, ready to be decoded, after a check of its segments."""
    plane = tiff.plane(number)
    check_segments(file, plane)
    if plane.compression == _LZW:
        _let_libtiff_decode(plane)
    return plane


def _let_libtiff_decode(first: Any) -> None:
    """Let libtiff decode the LZW of a plane, and tifffile the rest.

    imagecodecs' own decoder does not check the first code after a clear code: a code that is not in
    the table yet makes it read outside its memory. libtiff checks this, and takes half the time.
    """
    import imagecodecs

    silence_package("imagecodecs")
    order, first.compression, first.fillorder = first.fillorder, 1, 1
    # With compression 1, tifffile decodes plain bytes.
    unpack = first.decode
    first.compression = _LZW
    rows, columns = (
        (first.tilelength, first.tilewidth)
        if first.is_tiled
        else (first.rowsperstrip, first.imagewidth)
    )
    samples = first.samplesperpixel if first.planarconfig == 1 else 1
    same_bits = isinstance(first.bitspersample, int)
    bits = first.bitspersample * samples if same_bits else sum(first.bitspersample)
    strips = math.ceil(first.imagelength / rows)

    def decode(content: bytes | None, number: int, /, **options: Any) -> Any:
        if content is not None:
            rest = first.imagelength - number % strips * rows
            num_bytes = (columns * bits + 7) // 8 * (rows if first.is_tiled else min(rows, rest))
            content = imagecodecs.tiff_decode(_lzw_as_tiff(content, num_bytes, order)).tobytes()
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


def check_segments(file: BinaryIO, plane: Any) -> None:
    """Refuse a plane whose strips or tiles are missing, cut off, or cannot hold its pixels.

    Args:
        file: the open TIFF.
        plane: tifffile's page.
    """
    import tifffile

    if plane.compression not in _MAX_EXPANSION:
        known = plane.compression in set(tifffile.COMPRESSION)
        name = tifffile.COMPRESSION(plane.compression).name if known else str(plane.compression)
        raise UnreadableError(f"it is compressed by {name}")
    segment = math.prod(plane.chunks) * plane.dtype.itemsize
    if segment > max(plane.nbytes, MAX_SEGMENT_BYTES):
        raise ValueError(
            f"one of its strips or tiles has {segment:,} bytes of pixels, the whole image only "
            f"{plane.nbytes:,}"
        )
    held = _find_segments(plane, file_bytes(file))
    num_bytes = sum(count for _, count in held)
    if num_bytes > 4 * file_bytes(file) + plane.nbytes:
        raise ValueError("its strips or tiles overlap")
    if max(count for _, count in held) > 4 * segment + EXTRA_BYTES:
        raise ValueError("one of its strips or tiles is longer than its pixels")
    # The last strip may be smaller.
    pixels = len(held) * segment if plane.is_tiled else min(plane.nbytes, len(held) * segment)
    bits = plane.bitspersample
    mean = sum(bits) / len(bits) if isinstance(bits, tuple) else bits
    stored_bytes = int(pixels // plane.dtype.itemsize * mean) // 8
    check_held(stored_bytes, num_bytes, _MAX_EXPANSION[plane.compression])
    if plane.compression in JPEG:
        width, height = (
            (plane.tilewidth, plane.tilelength)
            if plane.is_tiled
            else (plane.imagewidth, plane.rowsperstrip)
        )
        num_pixels = plane.imagewidth * plane.imagelength
        for offset, count in held:
            file.seek(offset)
            _check_jpeg(file.read(count), width, height, num_pixels)


def _find_segments(plane: Any, size: int) -> list[tuple[int, int]]:
    """Return the places and lengths of the strips or tiles that a file of ``size`` bytes holds."""
    number, offsets, counts = math.prod(plane.chunked), plane.dataoffsets, plane.databytecounts
    # tifffile would fill the rest with zeros and only log it.
    if min(len(offsets), len(counts)) < number:
        raise ValueError(f"it has {min(len(offsets), len(counts))} of {number} strips or tiles")
    if number > _MAX_SEGMENTS + plane.nbytes // _BYTES_PER_SEGMENT:
        raise ValueError(f"it has {number:,} strips or tiles, more than any image needs")
    held = [
        (offset, count)
        for offset, count in zip(offsets[:number], counts, strict=False)
        if offset and count
    ]
    if not held or any(offset + count > size for offset, count in held):
        raise ValueError("its pixels lie beyond the end of the file")
    return held


def _check_jpeg(content: bytes, width: int, height: int, num_pixels: int) -> None:
    """Refuse a JPEG segment with more pixels than its strip or tile, or that is cut off.

    The decoder would allocate the former, and would not notice that the latter is cut off.
    """
    if not content.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise ValueError("one of its strips or tiles is cut off")
    check_scans(content, num_pixels)
    for marker, place, _ in jpeg_segments(content):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            declared = struct.unpack_from(">HH", content, place + 5)
            if declared[0] > height or declared[1] > width:
                raise ValueError(
                    f"one of its strips or tiles of {width}x{height} pixels declares "
                    f"{declared[1]}x{declared[0]}"
                )
            return
    raise ValueError("one of its strips or tiles declares no size")


@dataclass(frozen=True)
class GeoReference:
    """Where an image lies on a map.

    Args:
        transform: the pixel corner (x, y) lies at ``(a x + b y + c, d x + e y + f)``.
        crs: coordinate reference system such as ``"EPSG:32632"``; empty if it has no number.
        tags: the GeoTIFF tags, as tifffile's ``extratags``: (code, type, count, value, True).
    """

    transform: Transform
    crs: str = ""
    tags: tuple[tuple[int, int, int, Any, bool], ...] = ()

    @property
    def pixel_area(self) -> float:
        """Area of a pixel in square units of the map."""
        a, b, _, d, e, _ = self.transform
        return abs(a * e - b * d)


def decode_tiff(file: BinaryIO, max_pixels: int, page: int | None) -> StoredPixels:
    """Decode one page of a TIFF, as :func:`read_tiff` does: upright, without transparency."""
    with open_tiff(file) as tiff:
        first, declared_alpha = tiff.first, tiff.declared_alpha
        pixels = read_tiff(tiff, file, max_pixels, page)
        if first.photometric == _CMYK and pixels.dtype == np.uint8 and pixels.shape[2] == 4:
            pixels = np.asarray(PIL.Image.fromarray(pixels, "CMYK").convert("RGB"))
            declared_alpha = ()
        alpha = None
        if declared_alpha and _is_transparency(pixels, declared_alpha, tiff.highest):
            alpha = turn_upright(pixels[..., declared_alpha[0]], tiff.orientation)
            pixels, declared_alpha = np.delete(pixels, declared_alpha, axis=2), ()
        highest = tiff.highest if first.bitspersample < 8 else 0
        return StoredPixels(
            turn_upright(pixels, tiff.orientation),
            tiff.colors,
            highest,
            first.photometric == _WHITE_IS_ZERO,
            declared_alpha,
            alpha,
            tiff.no_data,
        )


def _is_transparency(pixels: NDArray[Any], bands: tuple[int, ...], highest: int) -> bool:
    """Tell whether bands that a TIFF calls alpha are transparency.

    They are if they are mostly 0 or the highest value where there is any colour. GDAL calls the
    fourth of four 8-bit bands alpha, whatever it is, and near infrared must not be lost for that.
    """
    coloured = np.delete(pixels, bands, axis=2).any(axis=2)
    alpha = pixels[..., bands][coloured]
    return bool(((alpha == 0) | (alpha == highest)).mean() >= 0.5) if alpha.size else True


def read_georeference(path: Path) -> GeoReference | None:
    """Return where an image lies on a map, or None if its file does not say.

    Raises:
        DataError: the file is missing or a damaged TIFF.
    """
    with open_image_file(path) as file:
        if not is_tiff(file):
            return None
        with open_tiff(file) as tiff:
            tags = [tag for tag in tiff.first.tags if tag.code in GEO_TAGS]
            return georeference_from_tags({tag.code: (int(tag.dtype), tag.value) for tag in tags})


def read_software(path: Path) -> str:
    """Return the name of the program that wrote a TIFF, or nothing.

    Raises:
        DataError: the file is missing or a damaged TIFF.
    """
    with open_image_file(path) as file:
        return Directories(file).software() if is_tiff(file) else ""


def georeference_from_tags(tags: Mapping[int, tuple[int, Any]]) -> GeoReference | None:
    """Make a georeference of a TIFF's tags: code -> (type, value).

    Returns None if they do not define one; control points alone do not.
    """
    values = {code: value for code, (_, value) in tags.items()}
    transform = _transform(values)
    if transform is None:
        return None
    keys = _keys(values.get(KEYS, ()))
    # With this raster type, whole coordinates are the centres of pixels.
    if keys.get(_RASTER_TYPE) == _IS_POINT:
        a, b, c, d, e, f = transform
        transform = (a, b, c - (a + b) / 2, d, e, f - (d + e) / 2)
    system = next(
        (
            keys[key]
            for key in _SYSTEM_KEYS
            if keys.get(key, _USER_DEFINED) not in (0, _USER_DEFINED)
        ),
        None,
    )
    kept = tuple(
        (code, kind, 0 if isinstance(value, str) else len(value), value, True)
        for code, (kind, value) in tags.items()
        if code in GEO_TAGS
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
    """Read the keys with a number as value.

    Each has four numbers: the key, the place of its value (0: here), the count, the value.
    """
    entries = [directory[k : k + 4] for k in range(4, len(directory) - 3, 4)]
    return {entry[0]: entry[3] for entry in entries if entry[1] == 0}
