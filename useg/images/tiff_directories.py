"""A TIFF's own directories -> its pages, and how its description arranges them.

Pages are counted here, from the file itself. tifffile gets one page at a time, with only the tags
that hold or describe pixels: it would trust the metadata of microscopes and slide scanners about
sizes, counts and other files.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast
from xml.parsers import expat

import numpy as np
from numpy.typing import NDArray

from useg.images.formats import MAX_BANDS, UnreadableError, file_bytes, silence_package

MAX_PAGES = 20_000
# Maximum number of values of a tag, such as offsets of tiles: 100,000 x 100,000 pixels in tiles of
# 128.
MAX_VALUES = 1 << 20
MAX_DESCRIPTION_BYTES = 16 << 20
_MAX_JSON_BYTES = 4 << 20
_MAX_TAGS = 4096
# OME-XML is parsed in pieces, each of which has at least one element.
_PIECE_BYTES, _MAX_ELEMENTS = 1 << 20, 200_000

# Struct formats of a value, by TIFF type (TIFF 6.0, section 2, and BigTIFF).
_FORMATS = {
    1: "B",
    2: "s",
    3: "H",
    4: "I",
    5: "II",
    6: "b",
    7: "s",
    8: "h",
    9: "i",
    10: "ii",
    11: "f",
    12: "d",
    13: "I",
    16: "Q",
    17: "q",
    18: "Q",
}
# Tags of GeoTIFF 1.1: scale, tie points, transformation and keys; the last two hold their longer
# values.
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)
DESCRIPTION, SOFTWARE, COLOR_MAP, NO_DATA = 270, 305, 320, 42113
_WIDTH, _LENGTH, _BITS, _COMPRESSION, _SAMPLES, _PREDICTOR = 256, 257, 258, 259, 277, 317
# Pages with equal values of these tags belong to one stack: size, bits, colours, samples, depth.
_FORM = (_WIDTH, _LENGTH, _BITS, 262, _SAMPLES, 284, 338, 339, 32997)
# Offsets and lengths of strips and of tiles. Tiles have at least 256 pixels, strips whole rows.
_SEGMENTS, _FEW_SEGMENTS, _PIXELS_PER_SEGMENT = (273, 279, 324, 325), 4096, 256
# Tags that tifffile gets: these, and those of tiles and strips, resolution, palette, JPEG,
# georeference.
_STORAGE = (254, 266, 273, 274, 278, 279, 282, 283, 292, 296, 322, 323, 324, 325, 347, 530, 32998)
_SEEN = {*_FORM, *_STORAGE, *GEO_TAGS, _COMPRESSION, _PREDICTOR, COLOR_MAP, NO_DATA}
# Tags of MetaMorph (one value per plane) and of Zeiss LSM.
_METAMORPH_PLANES, _LSM = 33629, 34412
# Tags that only this module reads.
_OURS = {DESCRIPTION, SOFTWARE, _METAMORPH_PLANES, _LSM}
_MAX_SOFTWARE_BYTES = 1 << 16


@dataclass(frozen=True)
class Entry:
    """One tag as stored: its type, its number of values, and their bytes in the file's order."""

    kind: int
    count: int
    content: bytes


@dataclass(frozen=True)
class Layout:
    """The axes of a stack, as its description gives them.

    Args:
        axes: one letter each; ``C`` counts channels.
        lengths: of the axes; the last one changes fastest.
        order: page number of each position along the axes; None if pages are in that order.
        one_directory: whether one directory may stand for all pages, which are then consecutive.
    """

    axes: str
    lengths: tuple[int, ...]
    order: tuple[int, ...] | None = None
    one_directory: bool = False

    @property
    def num_planes(self) -> int:
        """Number of planes that the description counts."""
        return math.prod(self.lengths)


class Directories:
    """The chain of directories of an open TIFF.

    Args:
        file: the TIFF.

    Attributes:
        places: offsets of the pages that are like the first one, in the order of the file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size = file, file_bytes(file)
        file.seek(0)
        head = file.read(16).ljust(16, b"\0")
        self.order = "<" if head[:2] == b"II" else ">"
        big = head[2:4] in (b"+\0", b"\0+")
        self._number = struct.Struct(self.order + ("Q" if big else "H"))
        self._offset = struct.Struct(self.order + ("Q" if big else "I"))
        self._entry = struct.Struct(self.order + ("HHQ8s" if big else "HHI4s"))
        # Bytes that directories may still occupy or refer to.
        self._unclaimed: float = 2 * self._size + 4096
        (first,) = self._offset.unpack_from(head, 8 if big else 4)
        self.places = self._of_one_form(first)
        # Bytes that are counted once may be read again.
        self._unclaimed = math.inf

    def _of_one_form(self, first: int) -> tuple[int, ...]:
        seen: set[int] = set()
        kept, form, place = [], None, first
        while place or not seen:
            if not 8 <= place < self._size:
                raise ValueError("a directory lies beyond the end of the file")
            if place in seen:
                raise ValueError("its list of pages is circular")
            if len(seen) == MAX_PAGES:
                raise ValueError(f"it has more than {MAX_PAGES:,} pages")
            seen.add(place)
            raw, following = self._raw(place)
            own = tuple(self._numbers(raw[code]) if code in raw else () for code in _FORM)
            form = own if form is None else form
            if own == form:
                kept.append(place)
            place = following
        return tuple(kept)

    def _claim(self, num_bytes: int) -> None:
        """Count bytes, because a hostile file may refer to the same ones a thousand times."""
        self._unclaimed -= num_bytes
        if self._unclaimed < 0:
            raise ValueError("its directories declare more data than the file holds")

    def _raw(self, place: int) -> tuple[dict[int, tuple[int, int, bytes]], int]:
        """Return the tags of a directory as (type, count, value or its offset), and the next one.

        Tags that useg does not read are skipped, whatever their length.
        """
        self._file.seek(place)
        (count,) = self._number.unpack(self._file.read(self._number.size))
        if count > _MAX_TAGS or count * self._entry.size > self._size:
            raise ValueError("a directory is longer than the file")
        self._claim(count * self._entry.size)
        content = self._file.read(count * self._entry.size + self._offset.size)
        tags: dict[int, tuple[int, int, bytes]] = {}
        for code, kind, length, value in self._entry.iter_unpack(
            content[: count * self._entry.size]
        ):
            if code in _SEEN and kind in _FORMATS and code not in tags:
                self._claim(_value_bytes(kind, length))
                if length > MAX_VALUES:
                    raise ValueError(
                        f"its tag {code} has {length:,} values; {MAX_VALUES:,} are read"
                    )
                tags[code] = (kind, length, value)
            elif code in _OURS and code not in tags:
                tags[code] = (kind, length, value)
        return tags, self._offset.unpack_from(content, count * self._entry.size)[0]

    def _content(self, kind: int, length: int, value: bytes) -> bytes:
        num_bytes = _value_bytes(kind, length)
        if num_bytes <= len(value):
            return value[:num_bytes]
        (place,) = self._offset.unpack(value)
        if not 8 <= place <= self._size - num_bytes:
            raise ValueError("a tag lies beyond the end of the file")
        self._file.seek(place)
        return self._file.read(num_bytes)

    def _numbers(self, raw: tuple[int, int, bytes]) -> tuple[Any, ...]:
        form = _FORMATS[raw[0]]
        if form == "s":
            return (self._content(*raw),)
        return struct.unpack(f"{self.order}{form * raw[1]}", self._content(*raw))

    def entries(self, place: int) -> dict[int, Entry]:
        """Return the tags of a directory that tifffile may see."""
        raw, _ = self._raw(place)
        self._check_segments(raw)
        is_lsm = _LSM in raw
        if is_lsm and self._size >= 1 << 32:
            raise UnreadableError(
                "it is an LSM file of more than 4 GB, and its 32-bit offsets cannot reach all pages"
            )
        # LSM files name a predictor even if it was not applied, because pixels are not compressed.
        compression = self._numbers(raw[_COMPRESSION]) if _COMPRESSION in raw else (1,)
        if is_lsm and compression == (1,):
            raw.pop(_PREDICTOR, None)
        return {
            code: Entry(kind, length, self._content(kind, length, value))
            for code, (kind, length, value) in raw.items()
            if code in _SEEN
        }

    def _check_segments(self, raw: Mapping[int, tuple[int, int, bytes]]) -> None:
        """Refuse far more strips or tiles than pixels: each takes a hundred bytes of memory."""
        sides = [self._numbers(raw[code])[0] for code in (_WIDTH, _LENGTH, _SAMPLES) if code in raw]
        most = _FEW_SEGMENTS + math.prod(sides) // _PIXELS_PER_SEGMENT
        count = max((raw[code][1] for code in _SEGMENTS if code in raw), default=0)
        if count > most:
            raise ValueError(f"it has {count:,} strips or tiles for {math.prod(sides):,} values")

    def page(self, place: int) -> Any:
        """Return tifffile's page of a directory; it reads segments through an overlay."""
        import tifffile

        silence_package("tifffile")
        overlay = _Overlay(self._file, self._size, self.order, self.entries(place))
        page = tifffile.TiffFile(cast(BinaryIO, overlay)).pages[0]
        overlay.show_all()
        return page

    def software(self) -> str:
        """Return the tag SOFTWARE of the first page, or an empty text."""
        raw, _ = self._raw(self.places[0])
        kind, length, value = raw.get(SOFTWARE, (2, 0, b""))
        if kind != 2 or length > _MAX_SOFTWARE_BYTES:
            return ""
        return self._content(kind, length, value).rstrip(b"\0").decode("utf-8", "replace").strip()

    def layout(self) -> Layout | None:
        """Return how the description of the first page arranges all pages, or None."""
        raw, _ = self._raw(self.places[0])
        if _METAMORPH_PLANES in raw:
            return _checked("Z", [raw[_METAMORPH_PLANES][1]], one_directory=True)
        if DESCRIPTION not in raw or raw[DESCRIPTION][0] not in (1, 2, 7):
            return None
        kind, length, value = raw[DESCRIPTION]
        if length > MAX_DESCRIPTION_BYTES:
            raise ValueError(f"its description has {length:,} bytes")
        return read_layout(self._content(kind, length, value))


def _value_bytes(kind: int, length: int) -> int:
    return struct.calcsize(f"<{_FORMATS.get(kind, 'B')}") * length


class _Overlay(io.RawIOBase):
    """A TIFF with a header and one directory of our own; all other bytes are the file's.

    Args:
        file: the TIFF.
        size: its bytes.
        order: "<" or ">".
        entries: the tags of the directory, which lies behind the file's end.
    """

    def __init__(self, file: BinaryIO, size: int, order: str, entries: Mapping[int, Entry]) -> None:
        self._file, self._size, self._place = file, size, 0
        mark = b"II" if order == "<" else b"MM"
        self._head = mark + struct.pack(f"{order}HHHQ", 43, 8, 0, size)
        values = size + 8 + 20 * len(entries) + 8
        directory, behind = struct.pack(f"{order}Q", len(entries)), b""
        for code, entry in sorted(entries.items()):
            place = struct.pack(f"{order}Q", values + len(behind))
            # tifffile reads a colour map by its offset, however short it is.
            if len(entry.content) > 8 or code == COLOR_MAP:
                behind += entry.content
            else:
                place = entry.content.ljust(8, b"\0")
            directory += struct.pack(f"{order}HHQ", code, entry.kind, entry.count) + place
        self._tail = directory + bytes(8) + behind

    def show_all(self) -> None:
        """Restore the file's own first bytes: pixels may begin within our header."""
        self._head = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        starts = (0, self._place, self._size + len(self._tail))
        self._place = starts[whence] + offset
        return self._place

    def readinto(self, buffer: Any, /) -> int:
        view, place = memoryview(buffer).cast("B"), self._place
        if place < len(self._head):
            content = self._head[place : place + len(view)]
        elif place < self._size:
            self._file.seek(place)
            content = self._file.read(min(len(view), self._size - place))
        else:
            content = self._tail[place - self._size : place - self._size + len(view)]
        view[: len(content)] = content
        self._place += len(content)
        return len(content)


def arranged(layout: Layout | None, num_planes: int, samples: int) -> NDArray[np.int64]:
    """Sort planes into pages: ``(num_pages, planes of a page)``.

    The axis C counts bands, unless each plane has several bands itself; all others count pages.

    Args:
        layout: of the file's description.
        num_planes: planes that the file has.
        samples: bands of a plane.

    Raises:
        ValueError: there are channels, and the planes do not fit them.
    """
    numbers = np.arange(num_planes)
    if layout is None or num_planes == 1:
        return numbers[:, None]
    channels = dict(zip(layout.axes, layout.lengths, strict=True)).get("C", 1)
    if layout.order is not None and layout.num_planes == num_planes:
        numbers = np.array(layout.order)
    if samples > 1 or channels == 1:
        return numbers[:, None]
    if num_planes % layout.num_planes:
        shape = " x ".join(map(str, layout.lengths))
        raise ValueError(f"its description of {shape} images does not fit its {num_planes} pages")
    # Axes that the description does not count come first.
    by_axis = numbers.reshape(-1, *layout.lengths)
    return np.moveaxis(by_axis, 1 + layout.axes.index("C"), -1).reshape(-1, channels)


def read_layout(description: bytes) -> Layout | None:
    """Read how a description arranges pages: of tifffile, OME or ImageJ; None for any other."""
    start = description.lstrip()[:10]
    if start.startswith(b"{"):
        return _tifffile_layout(description)
    if start.startswith((b"ImageJ=", b"SCIFIO=")):
        return _imagej_layout(description)
    if description.rstrip(b"\0 \r\n\t")[-4:] == b"OME>":
        return _OmeParser().read(description.rstrip(b"\0"))
    return None


def _checked(axes: str, lengths: Sequence[Any], *, one_directory: bool = False) -> Layout:
    whole = tuple(length for length in lengths if type(length) is int and length >= 1)
    if len(whole) < len(lengths) or len(axes) != len(lengths) or axes.count("C") > 1:
        raise ValueError(f"its description gives the axes {axes[:20]!r} impossible lengths")
    return Layout(axes, whole, one_directory=one_directory)


def _tifffile_layout(description: bytes) -> Layout | None:
    if len(description) > _MAX_JSON_BYTES or b'"shape":' not in description:
        return None
    try:
        stored = json.loads(description.rstrip(b"\0"))
    except ValueError:
        return None
    shape, axes = stored.get("shape", ()), stored.get("axes")
    if not isinstance(axes, str) or len(axes) != len(shape):
        return None
    kept = [(axis, length) for axis, length in zip(axes, shape, strict=True) if axis not in "YXS"]
    return _checked(
        "".join(axis for axis, _ in kept),
        [length for _, length in kept],
        one_directory=stored.get("truncated", True) is True,
    )


def _imagej_layout(description: bytes) -> Layout:
    """Read ImageJ's lines ``name=value``; its usual order is TZC, channels changing fastest."""
    lines = description[: 1 << 16].decode("latin-1").splitlines()
    stored = dict(line.split("=", 1) for line in lines if "=" in line)
    counts = {
        "C": int(stored.get("channels", "1")),
        "Z": int(stored.get("slices", "1")),
        "T": int(stored.get("frames", "1")),
    }
    if counts["Z"] == counts["T"] == 1 and counts["C"] > MAX_BANDS:
        # tifffile calls the first axis of any array channels if nobody names it.
        return _checked("Z", [counts["C"]], one_directory=True)
    if math.prod(counts.values()) == 1:
        return _checked("Z", [int(stored.get("images", "1"))], one_directory=True)
    order = stored.get("order", "").strip().upper()
    axes = order[::-1] if sorted(order) == ["C", "T", "Z"] else "TZC"
    return _checked(axes, [counts[axis] for axis in axes], one_directory=True)


class _ParsedError(Exception):
    """The first image of an OME-XML is read: the rest is of no use."""


class _OmeParser:
    """Reads the first image's axes from OME-XML; no tree is built and no entity expanded."""

    def __init__(self) -> None:
        self._pixels: Mapping[str, str] = {}
        self._samples = ""
        self._names: set[str] = set()
        self._planes: list[Mapping[str, str]] = []
        self._num_elements = 0

    def read(self, text: bytes) -> Layout | None:
        parser = expat.ParserCreate()
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.StartDoctypeDeclHandler = self._refuse
        with contextlib.suppress(_ParsedError, expat.ExpatError):
            for start in range(0, len(text), _PIECE_BYTES):
                before = self._num_elements
                parser.Parse(text[start : start + _PIECE_BYTES], False)
                if not before < self._num_elements <= _MAX_ELEMENTS:
                    raise ValueError("its description has too many or too long elements")
        if not self._pixels or len(self._names) > 1:
            # The image is spread over several files: only the pages of this one count.
            return None
        axes = self._pixels["DimensionOrder"][::-1].removesuffix("YX")
        if sorted(axes) != ["C", "T", "Z"]:
            raise ValueError(f"its description has the dimension order {axes[:20]!r}")
        lengths = [int(self._pixels[f"Size{axis}"]) for axis in axes]
        channel = axes.index("C")
        lengths[channel] //= max(int(self._samples or 1), 1)
        layout = _checked(axes, lengths)
        return Layout(axes, layout.lengths, self._order(layout))

    def _order(self, layout: Layout) -> tuple[int, ...] | None:
        """Return the page of each plane, or None if the description does not say it of all."""
        total = layout.num_planes
        if total > MAX_PAGES:
            return None
        pages: dict[int, int] = {}
        for plane in self._planes:
            first = int(plane.get("IFD", 0))
            given = plane.get(
                "PlaneCount", plane.get("NumPlanes", "1" if "IFD" in plane else total)
            )
            place = 0
            for axis, length in zip(layout.axes, layout.lengths, strict=True):
                place = place * length + int(plane.get(f"First{axis}", 0))
            if not 0 <= place < total:
                return None
            # A count is used only as far as there are planes.
            for k in range(min(int(given), total - place)):
                if place + k in pages:
                    return None
                pages[place + k] = first + k
        is_whole = sorted(pages) == sorted(pages.values()) == list(range(total))
        return tuple(pages[k] for k in range(total)) if is_whole else None

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        name = name.rpartition(":")[2]
        self._num_elements += 1
        if name == "Pixels":
            self._pixels = attributes
        elif name == "Channel" and self._pixels:
            self._samples = self._samples or attributes.get("SamplesPerPixel", "1")
        elif name == "TiffData" and self._pixels and len(self._planes) < MAX_PAGES:
            self._planes.append(attributes)
        elif name == "UUID" and self._pixels and len(self._names) < 2:
            self._names.add(attributes.get("FileName", ""))

    def _end(self, name: str) -> None:
        if name.rpartition(":")[2] == "Pixels":
            raise _ParsedError

    def _refuse(self, *_: Any) -> None:
        raise ValueError("its description defines XML entities")
