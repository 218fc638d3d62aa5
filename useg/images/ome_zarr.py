"""OME-Zarr images: read any rectangle, and write label maps.

Reads NGFF 0.4 (Zarr v2) and 0.5 (Zarr v3), https://ngff.openmicroscopy.org: axes y and x,
channels as bands; other axes must have length 1. A label map is an ``image-label`` with the
classes' names and colours, each level half of the one before, so that viewers show it over the
image.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, ClassTable, Label
from useg.errors import UsageError, need
from useg.images.formats import (
    MAX_SEGMENT_BYTES,
    StoredPixels,
    check_declared_size,
    check_mostly_stored,
    clear_errors,
    pixel_limit,
)
from useg.images.image_files import Image, as_image
from useg.images.large_tiff import (
    TILE_CACHE_BYTES,
    TILE_SIDE,
    columns_held,
    fill,
    halved,
    level_sizes,
)
from useg.images.zarr_limits import MAX_METADATA_BYTES, ChunkLimits, open_group
from useg.parsing import parse_json, read_limited

SUFFIX = ".zarr"


METADATA = (".zattrs", "zarr.json")  # of Zarr v2 and v3


MAX_ENTRIES = 16  # axes, or coordinate transformations of a level
_STEPS = "coordinateTransformations"


CELL = 256  # pixels: of smaller chunks, several are read at a time
# Bytes of them, and chunks of an image: each takes 30 microseconds. Programs write 64 kB or more.
_MAX_CELL_BYTES = 4 * MAX_SEGMENT_BYTES
_MAX_CHUNKS, _BYTES_PER_CHUNK = 30_000, 4096


@dataclass(frozen=True)
class Placement:
    """Where an OME-Zarr image lies in space.

    Args:
        version: of NGFF, ``"0.4"`` or ``"0.5"``.
        axes: what it says of the axes y and x.
        scale: size of a pixel along y and x, in the axes' units.
        translation: place of the first pixel along y and x.
    """

    version: str
    axes: tuple[Mapping[str, Any], Mapping[str, Any]]
    scale: tuple[float, float]
    translation: tuple[float, float]


class ZarrImage:
    """An open OME-Zarr image ``(H, W, C)``, read by rectangles like a ``large_tiff.Raster``.

    Args:
        name: of the folder, for error messages.
        array: the full resolution.
        names: of its axes.
        placement: where the image lies.
    """

    def __init__(self, name: str, array: Any, names: list[str], placement: Placement) -> None:
        self.placement = placement
        self._name, self._array, self._bands = name, array, "c" in names
        self._index = [slice(None) if axis == "c" else 0 for axis in names[:-2]]
        bands = array.shape[names.index("c")] if self._bands else 1
        self.shape = (*array.shape[-2:], bands)
        high, wide = (
            min(length, side * -(-CELL // side))
            for side, length in zip(array.chunks[-2:], array.shape[-2:], strict=True)
        )
        self._cell = high, wide
        pixel_bytes = max(bands, int(np.prod(array.chunks[:-2]))) * array.dtype.itemsize
        check_declared_size(wide, high, pixel_bytes, pixel_limit(None))
        if (cell_bytes := high * wide * pixel_bytes) > max(_chunk_bytes(array), _MAX_CELL_BYTES):
            raise ValueError(f"{wide}x{high} pixels of it have {cell_bytes:,} bytes")
        self._held = max(1, TILE_CACHE_BYTES // (high * wide * pixel_bytes))
        self._decoded = functools.lru_cache(self._held)(self._decode)
        self.dtype = self[0:1, 0:1].dtype

    def band(self, rows: int) -> int:
        """Return how wide a band of the image may be, so that ``rows`` of its rows stay decoded."""
        return columns_held(self._held, self._cell, rows)

    def missing(self, place: tuple[slice, slice]) -> NDArray[np.bool_]:
        """Return which pixels have no data: none, since the format cannot express it."""
        return np.zeros([some.stop - some.start for some in place], bool)

    def __getitem__(self, place: tuple[slice, slice]) -> Image:
        """Return the image at these rows and columns, which lie inside."""
        rows, columns = place
        pixels = np.empty(
            (rows.stop - rows.start, columns.stop - columns.start, self.shape[2]),
            self._array.dtype.newbyteorder("="),
        )
        with clear_errors(self._name):
            fill(pixels, place, self._cell, self._decoded)
        return as_image(StoredPixels(pixels.astype(np.uint8) if pixels.dtype == bool else pixels))

    def _decode(self, i: int, j: int) -> NDArray[Any]:
        """Read one chunk or shard ``(h, w, C)``, cut off at the image's edge."""
        high, wide = self._cell
        pixels: NDArray[Any] = np.asarray(
            self._array[
                (*self._index, slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide))
            ]
        )
        return np.moveaxis(pixels, 0, -1) if self._bands else pixels[..., None]


def is_zarr(path: Path) -> bool:
    """Tell whether a folder is an OME-Zarr: named ``.zarr``, or with such metadata in it."""
    return path.is_dir() and (
        path.suffix.lower() == SUFFIX or any(_lists_scales(path / name) for name in METADATA)
    )


def size_and_time(path: Path) -> tuple[int, int]:
    """Return the bytes of a file or folder, and its latest change in nanoseconds."""
    inside = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    stats = [os.stat(name) for name in inside] if path.is_dir() else [path.stat()]
    return sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)


def open_zarr(path: Path) -> ZarrImage:
    """Open the full resolution of an OME-Zarr image.

    Raises:
        DataError: it is not an OME-Zarr image, too old, damaged, or has several planes or times.
    """
    need("zarr", "zarr")
    with clear_errors(str(path)):
        limits = ChunkLimits(path)
        try:
            group = open_group(path, limits)
        except FileNotFoundError as error:
            raise _no_image(path) from error
        is_v3 = group.metadata.zarr_format == 3
        ome = group.attrs.get("ome", {}) if is_v3 else group.attrs
        if any(key in ome for key in ("plate", "well", "bioformats2raw.layout")):
            raise UsageError(
                f"'{path}' holds several OME-Zarr images; give one of them, a folder such as "
                f"'{path.name}/A/1/0' or '{path.name}/0'"
            )
        if "multiscales" not in ome:
            raise _no_image(path)
        scales = ome["multiscales"][0]
        axes = scales.get("axes", [])
        steps = [scales, scales["datasets"][0]]
        if max(len(axes), *(len(each.get(_STEPS, ())) for each in steps)) > MAX_ENTRIES:
            raise ValueError(f"it has more than {MAX_ENTRIES} axes or coordinate transformations")
        if not axes or not all(isinstance(axis, dict) for axis in axes):
            raise UsageError(
                f"'{path}' is an OME-Zarr older than 0.4, whose axes have no types; "
                "convert it to 0.4 or 0.5"
            )
        names = [
            "c" if axis.get("type") == "channel" else str(axis["name"]).lower() for axis in axes
        ]
        array = group[scales["datasets"][0]["path"]]
        _check(path, array, names)
        limits.set_array(array.metadata.to_dict(), array.chunks, array.dtype.itemsize)
        return ZarrImage(
            str(path),
            array,
            names,
            Placement("0.5" if is_v3 else "0.4", (axes[-2], axes[-1]), *_placed(scales)),
        )


def _no_image(path: Path) -> UsageError:
    return UsageError(
        f"'{path}' is not an OME-Zarr image: it has no 'multiscales' in {' or '.join(METADATA)}; "
        "give the folder of an image that has"
    )


def _check(path: Path, array: Any, names: list[str]) -> None:
    """Refuse arrays that are not pixels, not a single image, or larger than their files can
    encode."""
    if array.ndim != len(names) or names[-2:] != ["y", "x"]:
        raise UsageError(
            f"'{path}' has the axes {', '.join(names)} for {array.ndim} dimensions; "
            "give an image whose last axes are y and x"
        )
    if array.dtype.kind not in "biuf":
        raise UsageError(
            f"'{path}' holds {array.dtype}, not pixels; give an image of whole numbers or floats"
        )
    num_bytes, chunk_bytes = math.prod(array.shape) * array.dtype.itemsize, _chunk_bytes(array)
    if chunk_bytes > max(num_bytes, MAX_SEGMENT_BYTES):
        raise ValueError(f"a chunk of it has {chunk_bytes:,} bytes, more than the whole image")
    num_chunks = math.prod(
        -(-length // side) for length, side in zip(array.shape, array.chunks, strict=True)
    )
    if num_chunks > _MAX_CHUNKS + num_bytes // _BYTES_PER_CHUNK:
        raise ValueError(f"its {num_bytes:,} bytes are in {num_chunks:,} chunks")
    check_mostly_stored(math.prod(array.shape), size_and_time(path)[0])
    several = {
        name: length
        for name, length in zip(names[:-2], array.shape, strict=False)
        if length != 1 and name != "c"
    }
    if several:
        axis, length = next(iter(several.items()))
        raise UsageError(
            f"'{path}' has {length} images along its axis {axis!r}, but only one can be labelled "
            "at a time; save each as its own OME-Zarr"
        )


def _chunk_bytes(array: Any) -> int:
    """Return the bytes of one chunk after decompression."""
    return int(math.prod(array.chunks) * array.dtype.itemsize)


def _placed(scales: Mapping[str, Any]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the pixel size and the first pixel's place along y and x.

    The level's own transformations apply first, then those of all levels.
    """
    scale, translation = np.ones(2), np.zeros(2)
    for step in (
        *scales["datasets"][0].get(_STEPS, ()),
        *scales.get(_STEPS, ()),
    ):
        if step["type"] == "scale":
            factor = np.array(step["scale"][-2:], float)
            with np.errstate(all="ignore"):
                scale, translation = scale * factor, translation * factor
        elif step["type"] == "translation":
            translation = translation + np.array(step["translation"][-2:], float)
        if not np.isfinite([scale, translation]).all():
            raise ValueError("the size or place of its pixels is not finite")
    return (float(scale[0]), float(scale[1])), (float(translation[0]), float(translation[1]))


def _lists_scales(path: Path) -> bool:
    try:
        if not path.is_file() or path.stat().st_size > MAX_METADATA_BYTES:
            return False
        return '"multiscales"' in path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return False


MARK = "useg"  # the attribute that says what made it


_ENCODING = {
    "0.4": {"name": "v2", "separator": "/"},
    "0.5": {"name": "default", "separator": "/"},
}  # of the names of chunks


class ZarrLabels:
    """A label map that is being written.

    Args:
        folder: empty.
        size: (width, height).
        table: whose names and colours it gets.
        placement: of the image; the label map gets the same placement and version.
    """

    def __init__(
        self, folder: Path, size: tuple[int, int], table: ClassTable, placement: Placement
    ) -> None:
        self._table, self._placement = table, placement
        self._group = need("zarr", "zarr").open_group(
            folder, mode="a", zarr_format=2 if placement.version == "0.4" else 3
        )
        shapes = level_sizes((size[1], size[0]))
        names = {} if placement.version == "0.4" else {"dimension_names": ["y", "x"]}
        options: dict[str, Any] = {
            "dtype": "uint8",
            "chunks": (TILE_SIDE, TILE_SIDE),
            "fill_value": IGNORE,
            "chunk_key_encoding": _ENCODING[placement.version],
        }
        self._levels = [
            self._group.create_array(str(k), shape=shape, **options, **names)
            for k, shape in enumerate(shapes)
        ]

    def write(self, row: int, column: int, label: Label, level: int = 0) -> None:
        """Write a tile; at the lower and right edge it may be smaller than ``TILE_SIDE``."""
        top, left = row * TILE_SIDE, column * TILE_SIDE
        self._levels[level][top : top + label.shape[0], left : left + label.shape[1]] = label

    def finish(self, mark: str = "") -> None:
        """Make the smaller levels from the tiles, all of which are written, and the metadata."""
        for level, (above, below) in enumerate(
            zip(self._levels[:-1], self._levels[1:], strict=True), 1
        ):
            for row, column in np.ndindex(*(-(-length // TILE_SIDE) for length in below.shape)):
                top, left = 2 * TILE_SIDE * row, 2 * TILE_SIDE * column
                four = above[top : top + 2 * TILE_SIDE, left : left + 2 * TILE_SIDE]
                self.write(
                    row,
                    column,
                    halved(np.pad(four, [(0, length % 2) for length in four.shape], "edge")),
                    level,
                )
        version, multiscales, labels = (
            self._placement.version,
            [self._multiscale()],
            self._image_label(),
        )
        if version == "0.4":
            ome: dict[str, Any] = {
                "multiscales": [{"version": version, **multiscales[0]}],
                "image-label": {"version": version, **labels},
            }
        else:
            ome = {"ome": {"version": version, "multiscales": multiscales, "image-label": labels}}
        self._group.attrs.update({**ome, MARK: {"mark": mark}})

    def _multiscale(self) -> dict[str, Any]:
        """Describe each level and where its pixels lie: at the centre of those they replace."""
        place, datasets = self._placement, []
        for level in range(len(self._levels)):
            scale = [size * 2**level for size in place.scale]
            first = [
                start + size * (2**level - 1) / 2
                for start, size in zip(place.translation, place.scale, strict=True)
            ]
            steps = [
                {"type": "scale", "scale": scale},
                {"type": "translation", "translation": first},
            ]
            datasets.append({"path": str(level), "coordinateTransformations": steps})
        return {
            "name": "labels",
            "axes": [dict(axis) for axis in place.axes],
            "datasets": datasets,
            "type": "most frequent class of four",
        }

    def _image_label(self) -> dict[str, Any]:
        colors = [
            {"label-value": k, "rgba": [*color, 255]} for k, color in enumerate(self._table.colors)
        ]
        return {
            "colors": colors,
            "properties": [
                {"label-value": k, "name": name} for k, name in enumerate(self._table.names)
            ],
        }


def mark_of(folder: Path) -> str | None:
    """Return the mark of a label map that :class:`ZarrLabels` finished, or None."""
    for name in METADATA:
        try:
            content = parse_json(read_limited(folder / name, MAX_METADATA_BYTES))
            return str(content.get("attributes", content)[MARK]["mark"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None
