"""Headers that say more than a size: PNM, NPY, AVIF and HEIC, DICOM.

They are read twice: for what a file declares (containers.py), and for its pixels (decode.py).
"""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import PIL
import PIL.Image
from PIL.AvifImagePlugin import AvifImageFile

from useg.errors import need
from useg.images.limits import BlockCount, UnreadableError, file_bytes, silence_package

# DICOM: the group of items of a sequence, kinds of values with long lengths, where pixels begin.
_DICOM_ITEM, _PIXEL_DATA = 0xFFFE, b"\xe0\x7f\x10\0"
_LONG_KINDS = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT"}
# Files whose header is not read apart from their pixels.
_MAX_WHOLE_BYTES = 1 << 29
_MAX_NPY_HEADER = 10_000
# An array of more bands is no image.
_MAX_BANDS = 64
# These transfer syntaxes compress a whole DICOM file.
_DEFLATED = (b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.4.95")
_DICOM_TAGS = (
    *("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "NumberOfFrames"),
    *("RescaleSlope", "RescaleIntercept", "RedPaletteColorLookupTableDescriptor"),
    *("GreenPaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableDescriptor"),
    *("RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData"),
    *("BluePaletteColorLookupTableData",),
)


@dataclass(frozen=True)
class PnmHeader:
    """The header of a PBM, PGM or PPM: its kind 1 to 6, size, highest value and length."""

    kind: int
    width: int
    height: int
    highest: int
    length: int

    @property
    def bands(self) -> int:
        """Bands of a pixel."""
        return 3 if self.kind in (3, 6) else 1


def read_pnm_header(start: bytes) -> PnmHeader:
    """Read the header of a PBM, PGM or PPM."""
    kind = start[1] - ord("0")
    # Possessive: with \s+ and without the second plus, 30 line breaks would take minutes.
    number = rb"(?:\s|#[^\n\r]*[\n\r])++([0-9]{1,9})"
    is_bitmap = kind in (1, 4)
    found = re.match(rb"P[1-6]" + number * (2 if is_bitmap else 3) + rb"\s?", start)
    if found is None:
        raise PIL.UnidentifiedImageError("its header is damaged")
    width, height, highest = map(int, (*found.groups(), b"1") if is_bitmap else found.groups())
    if not 1 <= highest <= 65535:
        raise ValueError(f"its highest value is {highest}")
    return PnmHeader(kind, width, height, highest, found.end())


def read_npy_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    """Read a .npy file up to its values: shape, type, and whether columns come first."""
    file.seek(0)
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise UnreadableError(f"it is a .npy file of version {version[0]}.{version[1]}")
    length = int.from_bytes(file.read(2 if version == (1, 0) else 4), "little")
    # Python parses the header, and prints a warning of odd escapes in it.
    if b"\\" in file.read(min(length, _MAX_NPY_HEADER)):
        raise ValueError("its header has a backslash")
    file.seek(8)
    shape, by_columns, dtype = read(file, max_header_size=_MAX_NPY_HEADER)
    if dtype.kind not in "buif":
        raise UnreadableError(f"it stores {dtype} and not numbers")
    return shape, dtype, by_columns


def npy_axes(shape: tuple[int, ...]) -> tuple[tuple[int, int, int], bool]:
    """Return the (height, width, bands) of an array, and whether its bands come first.

    ``(H, W)`` has one band. Of three axes, the bands are the first if it is shorter than the last,
    otherwise the last.
    """
    if len(shape) == 2:
        return (shape[0], shape[1], 1), False
    if len(shape) == 3 and min(shape[0], shape[2]) <= _MAX_BANDS:
        if shape[0] < shape[2]:
            return (shape[1], shape[2], shape[0]), True
        return (shape[0], shape[1], shape[2]), False
    raise UnreadableError(f"it is an array of the shape {shape}, and not one image")


def open_iso_media(form: str, content: bytes, file: BinaryIO | None = None) -> PIL.Image.Image:
    """Open an AVIF or HEIC with its decoder, which reads the header only."""
    if file is not None:
        content = _read_all(file)
    try:
        if form == "AVIF":
            return AvifImageFile(io.BytesIO(content))
        plugin: Any = need("pillow_heif", "heic")
        opened: PIL.Image.Image = plugin.HeifImageFile(io.BytesIO(content))
        return opened
    except SyntaxError as error:
        raise PIL.UnidentifiedImageError(str(error)) from error


def read_dicom(file: BinaryIO, *, with_pixels: bool) -> Any:
    """Read what decides the pixels of a DICOM file; no other element is kept."""
    pydicom: Any = need("pydicom", "dicom")
    silence_package("pydicom")
    content = _read_all(file)
    if any(syntax in content for syntax in _DEFLATED):
        raise UnreadableError("it is a DICOM file that is compressed as a whole")
    _count_elements(content)
    tags = [*_DICOM_TAGS, *(["PixelData"] if with_pixels else [])]
    return pydicom.dcmread(
        io.BytesIO(content), stop_before_pixels=not with_pixels, specific_tags=tags
    )


def _count_elements(content: bytes) -> None:
    """Refuse a DICOM file of very many elements (PS3.5, section 7.1); order is little-endian."""
    blocks, place = BlockCount(len(content)), 132
    while place + 12 <= len(content) and content[place : place + 4] != _PIXEL_DATA:
        blocks.count()
        group, _, kind, length = struct.unpack_from("<HH2sH", content, place)
        head = 8
        if group == _DICOM_ITEM or not kind.isupper():
            (length,) = struct.unpack_from("<I", content, place + 4)
        elif kind in _LONG_KINDS:
            (length,) = struct.unpack_from("<I", content, place + 8)
            head = 12
        # What has no length ends with an element of its own: its parts are counted, too.
        place += head + (0 if length == 0xFFFFFFFF else length)


def _read_all(file: BinaryIO) -> bytes:
    if file_bytes(file) > _MAX_WHOLE_BYTES:
        raise UnreadableError(f"it has more than {_MAX_WHOLE_BYTES:,} bytes")
    file.seek(0)
    return file.read()
