"""Read PNM, NPY, AVIF, HEIC and DICOM: what a file declares, and its pixels."""

from __future__ import annotations

import importlib
import io
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import PIL
import PIL.Image
from numpy.typing import NDArray
from PIL.AvifImagePlugin import AvifImageFile

from useg.errors import need
from useg.images.formats import (
    EXTRA_BYTES,
    FLAT_HELD,
    FLAT_PIXELS,
    JPEG_HELD,
    MAX_BANDS,
    BlockCount,
    Container,
    PageError,
    StoredPixels,
    UnreadableError,
    file_bytes,
    silence_package,
)

# DICOM: the group of items of a sequence, kinds of values with long lengths, where pixels begin.
_DICOM_ITEM, _PIXEL_DATA = 0xFFFE, b"\xe0\x7f\x10\0"
_LONG_KINDS = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT"}
# Maximum bytes of files that are read whole, because their header cannot be read alone.
_MAX_WHOLE_BYTES = 1 << 29
_MAX_NPY_HEADER = 10_000
# Least number of values of an image in a stack; otherwise a small file could declare very many
# images.
_MIN_PAGE_VALUES = 64
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


# Brands of the ISO base media format; an AVIF may call itself mif1.
_AVIF_BRANDS = (b"avif", b"avis")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1")
NPY_START = b"\x93NUMPY"


# The transfer syntax of DICOM that pydicom decodes in Python (run lengths), and the maximum bytes
# of such a frame: every two bytes become up to 128, however small the image is.
_DICOM_RUNS, _MAX_RUNS_BYTES = "1.2.840.10008.1.2.5", 4_000_000


def pnm_container(file: BinaryIO) -> Container:
    """Read what a PBM, PGM or PPM declares."""
    size = file_bytes(file)
    file.seek(0)
    header = read_pnm_header(file.read(4096))
    depth = 2 if header.highest > 255 else 1
    row = header.width * header.bands
    # Text has one character per pixel of a bitmap, otherwise two.
    row_bytes = {1: row, 2: 2 * row, 3: 2 * row, 4: -(-header.width // 8)}.get(
        header.kind, row * depth
    )
    return Container(
        "PNM",
        (header.width, header.height),
        header.bands * depth,
        ((0, size),),
        (header.height * row_bytes, size - header.length + 1, 1),
    )


def npy_container(file: BinaryIO) -> Container:
    """Read what a .npy file declares: an image, or a stack of images along its first axis."""
    array = _read_npy_array(file)
    shape, pages = array.shape, _count_npy_pages(array.shape)
    if len(shape) == 4 and shape[0] == 1:
        return _page_container(array, 0)
    height, width, bands = npy_axes(shape if pages == 1 else shape[1:])[0]
    value_bytes = array.dtype.itemsize
    held = (math.prod(shape) * value_bytes, array.stored, 1)
    parts = ((0, array.start + array.stored),)
    return Container("NPY", (width, height), bands * value_bytes, parts, held, pages=pages)


def npy_page(file: BinaryIO, page: int) -> Container:
    """Read what a .npy file declares of one image of a stack: only its bytes are read later."""
    return _page_container(_read_npy_array(file), page)


class _NpyArray(NamedTuple):
    """An array in a .npy file: ``stored`` bytes of values from the byte ``start`` on."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int
    stored: int


def _page_container(array: _NpyArray, page: int) -> Container:
    """Return what a file declares of one image of a stack."""
    shape, dtype = array.shape, array.dtype
    if not shape or not 0 <= page < shape[0]:
        raise PageError(shape[0] if shape else 1, page)
    height, width, bands = npy_axes(shape[1:])[0]
    num_bytes = math.prod(shape[1:]) * dtype.itemsize
    header = io.BytesIO()
    description = {"descr": dtype.str, "fortran_order": False, "shape": shape[1:]}
    np.lib.format.write_array_header_1_0(header, description)
    parts = (header.getvalue(), (array.start + page * num_bytes, num_bytes))
    held = (num_bytes, num_bytes, 1)
    return Container("NPY", (width, height), bands * dtype.itemsize, parts, held)


def _read_npy_array(file: BinaryIO) -> _NpyArray:
    """Read the header of a .npy file, and check that its values follow."""
    size = file_bytes(file)
    shape, dtype, by_columns = read_npy_header(file)
    start = file.tell()
    stored = size - start
    if math.prod(shape) * dtype.itemsize > stored:
        raise ValueError(
            f"it declares {'x'.join(map(str, shape))} values of {dtype}, but is shorter"
        )
    if by_columns and _count_npy_pages(shape) > 1:
        raise UnreadableError(
            "its values are in Fortran order, so each of its images is scattered over the file",
            "save it in C order, in Python: "
            "numpy.save(file, numpy.ascontiguousarray(numpy.load(file)))",
        )
    return _NpyArray(shape, dtype, start, stored)


def _count_npy_pages(shape: tuple[int, ...]) -> int:
    """Return how many images an array holds along its first axis: 1 unless it must be a stack.

    ``(N, H, W)`` may also be an image of N or W bands if they are few; ``(N, H, W, C)`` may not.
    """
    is_deep = len(shape) == 4 or (len(shape) == 3 and min(shape[0], shape[2]) > MAX_BANDS)
    return shape[0] if is_deep and math.prod(shape[1:]) >= _MIN_PAGE_VALUES else 1


def find_npy_shape(file: BinaryIO) -> tuple[int, ...]:
    """Return the shape of the array in a .npy file; ``()`` for other files."""
    file.seek(0)
    is_npy = file.read(len(NPY_START)) == NPY_START
    return _read_npy_array(file).shape if is_npy else ()


def iso_media_container(file: BinaryIO) -> Container:
    """Read what an AVIF or HEIC declares."""
    size = file_bytes(file)
    file.seek(8)
    brand = file.read(4)
    form = "AVIF" if brand in _AVIF_BRANDS else "HEIF"
    file.seek(0)
    start = file.read(64)
    if form == "HEIF" and any(known in start for known in _AVIF_BRANDS):
        form = "AVIF"
    # The size stands in several boxes that refer to each other, so the decoder reads them.
    with open_iso_media(form, _read_all(file)) as opened:
        width, height = opened.size
        exif = opened.info.get("exif") or b""
    return Container(
        form,
        (width, height),
        2 * len(opened.getbands()),
        ((0, size),),
        (width * height, size + FLAT_PIXELS // FLAT_HELD, FLAT_HELD),
        exif,
    )


def dicom_container(file: BinaryIO) -> Container:
    """Read what a DICOM file declares."""
    header = read_dicom(file, with_pixels=False)
    width, height = int(header.Columns), int(header.Rows)
    pages = int(header.get("NumberOfFrames") or 1)
    bits = int(header.BitsAllocated)
    bands = int(header.get("SamplesPerPixel", 1))
    size = file_bytes(file)
    pixel_bits = bands * bits
    if not (pages >= 1 and bits in (1, 8, 16, 32) and bands in (1, 3)):
        raise ValueError(f"it declares {pages} frames of {bands} bands of {bits} bits")
    return Container(
        "DICOM",
        (width, height),
        max(1, pixel_bits // 8),
        ((0, size),),
        (width * height * pixel_bits // 8, size, JPEG_HELD),
        pages=min(pages, 1 + size // 8),
    )


def is_iso_media(start: bytes) -> bool:
    """Tell whether a file that starts like this is an AVIF or HEIC."""
    return start[4:8] == b"ftyp" and start[8:12] in (*_AVIF_BRANDS, *_HEIF_BRANDS)


@dataclass(frozen=True)
class PnmHeader:
    """The header of a PBM, PGM or PPM: its type (1 to 6), size, maximum value and length."""

    kind: int
    width: int
    height: int
    highest: int
    length: int

    @property
    def bands(self) -> int:
        """Number of bands."""
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
    # Python parses the header, and would print a warning about invalid escapes in it.
    if length > _MAX_NPY_HEADER or b"\\" in file.read(length):
        raise ValueError("its header is too long, or has a backslash")
    file.seek(8)
    try:
        shape, by_columns, dtype = read(file)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        # The messages of NumPy and Python are for programmers.
        raise ValueError("its header is not that of an array") from error
    if dtype.kind not in "buif":
        raise UnreadableError(f"it stores {dtype} instead of numbers")
    if min(shape, default=0) < (1 if len(shape) > 2 else 0):
        raise ValueError(f"it declares the shape {shape}")
    return shape, dtype, by_columns


def npy_axes(shape: tuple[int, ...]) -> tuple[tuple[int, int, int], bool]:
    """Return the (height, width, bands) of an array, and whether its bands come first.

    ``(H, W)`` has one band. Of three axes, the bands are the first if it is shorter than the last,
    otherwise the last.
    """
    if len(shape) == 2:
        return (shape[0], shape[1], 1), False
    if len(shape) == 3 and min(shape[0], shape[2]) <= MAX_BANDS:
        if shape[0] < shape[2]:
            return (shape[1], shape[2], shape[0]), True
        return (shape[0], shape[1], shape[2]), False
    raise UnreadableError(
        f"it is an array of the shape {shape}, and neither an image (H, W) or (H, W, C) nor a "
        "stack of images (N, H, W) or (N, H, W, C)"
    )


def open_iso_media(form: str, content: bytes) -> PIL.Image.Image:
    """Open an AVIF or HEIC with its decoder, which reads the header only."""
    try:
        if form == "AVIF":
            return AvifImageFile(io.BytesIO(content))
        plugin: Any = need("pillow_heif", "heic")
        opened: PIL.Image.Image = plugin.HeifImageFile(io.BytesIO(content))
        return opened
    except SyntaxError as error:
        raise PIL.UnidentifiedImageError(str(error)) from error


def read_dicom(file: BinaryIO, *, with_pixels: bool) -> Any:
    """Read the elements of a DICOM file that describe its pixels; all others are dropped."""
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


def decode_pnm(content: bytes, _: int) -> StoredPixels:
    """Decode a PBM, PGM or PPM."""
    header = read_pnm_header(content[:4096])
    shape = header.height, header.width, header.bands
    body = content[header.length :]
    if header.kind == 1:
        digits = np.frombuffer(body.translate(None, b" \t\r\n\v\f"), np.uint8) - ord("0")
        pixels: NDArray[Any] = digits[: math.prod(shape)]
    elif header.kind in (2, 3):
        if body.translate(None, b"0123456789 \t\r\n\v\f"):
            raise ValueError("it contains text that is not a number")
        pixels = np.fromstring(body, np.int64, math.prod(shape), sep=" ")
    elif header.kind == 4:
        row = -(-header.width // 8)
        packed = np.frombuffer(body[: row * header.height], np.uint8).reshape(header.height, row)
        pixels = np.unpackbits(packed, axis=1)[:, : header.width]
    else:
        dtype = np.dtype(">u2" if header.highest > 255 else np.uint8)
        pixels = np.frombuffer(body, dtype, math.prod(shape))
    if pixels.size and not 0 <= pixels.min() <= pixels.max() <= header.highest:
        raise ValueError(f"it has a value outside of 0 to {header.highest}")
    kind = np.uint16 if header.highest > 255 else np.uint8
    pixels = pixels.astype(kind, copy=not pixels.flags.writeable).reshape(shape)
    # In a bitmap, 1 is black.
    return StoredPixels(
        pixels, None, header.highest if header.highest < 255 else 0, header.kind in (1, 4)
    )


def decode_npy(content: bytes, _: int) -> StoredPixels:
    """Decode a .npy file."""
    file = io.BytesIO(content)
    shape, dtype, by_columns = read_npy_header(file)
    values = np.frombuffer(content, dtype, math.prod(shape), file.tell())
    pixels = values.reshape(shape, order="F" if by_columns else "C")
    size, is_band_first = npy_axes(shape)
    pixels = np.moveaxis(pixels, 0, -1) if is_band_first else pixels.reshape(size)
    if dtype.kind == "b":
        return StoredPixels(pixels.astype(np.uint8), None, 1)
    if dtype.kind == "f":
        return StoredPixels(pixels.astype(np.float32))
    return StoredPixels(pixels.astype(dtype.newbyteorder("="), copy=False))


def decode_iso_media(form: str, content: bytes) -> StoredPixels:
    """Decode an AVIF or HEIC."""
    with open_iso_media(form, content) as opened:
        if opened.mode not in ("L", "LA", "I;16", "RGB", "RGBA"):
            opened = opened.convert("RGB")
        pixels = np.array(opened)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return StoredPixels(pixels[..., : 1 if pixels.shape[2] < 3 else 3])


def _check_dicom_frame(
    dataset: Any, page: int, read_container: Callable[[BinaryIO], Container]
) -> None:
    """Check a compressed frame like an image file: pydicom would decode whatever it declares."""
    syntax = getattr(dataset.file_meta, "TransferSyntaxUID", None)
    if syntax is None or not syntax.is_encapsulated:
        return
    encaps: Any = importlib.import_module("pydicom.encaps")
    num_frames = int(dataset.get("NumberOfFrames") or 1)
    frame = encaps.get_frame(dataset.PixelData, page, number_of_frames=num_frames)
    size = int(dataset.Columns), int(dataset.Rows)
    if syntax == _DICOM_RUNS:
        most = size[0] * size[1] * int(dataset.BitsAllocated) * int(dataset.SamplesPerPixel) // 4
        if len(frame) > min(most + EXTRA_BYTES, _MAX_RUNS_BYTES):
            raise UnreadableError("it is a large DICOM file with run-length encoding")
        return
    file = io.BytesIO(frame)
    container = read_container(file)
    if container.form not in ("JPEG", "JPEG2000") or container.size != size:
        raise ValueError(f"it declares {size[0]}x{size[1]} pixels, but holds another image")
    container.content(file)


def decode_dicom(
    content: bytes, page: int, read_container: Callable[[BinaryIO], Container]
) -> StoredPixels:
    """Decode a frame, and rescale its values to units such as Hounsfield units.

    Args:
        content: of the file.
        page: number of the frame.
        read_container: reads what a file declares: a compressed frame is one.
    """
    pixel_functions: Any = importlib.import_module("pydicom.pixels")
    dataset = read_dicom(io.BytesIO(content), with_pixels=True)
    dataset.file_meta = getattr(dataset, "file_meta", None)
    if "PixelData" not in dataset:
        raise ValueError("it ends before its pixels do")
    _check_dicom_frame(dataset, page, read_container)
    pixels: NDArray[Any] = pixel_functions.pixel_array(dataset, index=page)
    kind = dataset.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        colors = pixel_functions.apply_color_lut(pixels, dataset)
        pixels = colors if colors.dtype == np.uint8 else (colors >> 8).astype(np.uint8)
    if kind == "MONOCHROME1" and pixels.dtype.kind == "u":
        pixels = (1 << int(dataset.BitsStored)) - 1 - pixels
    slope = float(dataset.get("RescaleSlope") or 1)
    intercept = float(dataset.get("RescaleIntercept") or 0)
    if (slope, intercept) != (1, 0):
        pixels = pixels.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    highest = 1 if int(dataset.BitsAllocated) == 1 else 0
    return StoredPixels(pixels[..., None] if pixels.ndim == 2 else pixels, None, highest)
