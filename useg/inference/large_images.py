"""Label images larger than memory: a TIFF or an OME-Zarr in, a label map of the same kind out.

The result equals one pass over the whole image. The label map is made in blocks of whole tiles.
For each block the network computes the window that determines its labels, at the model's working
size; the logits are resized before the class is chosen, as for any other image. One block is read
ahead and one is written behind; nothing more is in memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, Label, most_probable
from useg.errors import DataError, SettingsError
from useg.files import replacing, replacing_folder
from useg.images.large_tiff import TILE_SIDE, Pyramid, open_raster, tiff_declared_pixels
from useg.images.ome_zarr import SUFFIX, ZarrLabels, is_zarr, mark_of, open_zarr
from useg.inference import tiles
from useg.inference.large_image_objects import LargeImageObjects, collect_objects
from useg.inference.outputs import SOFTWARE_TAG, software_text
from useg.inference.predictor import AugmentedView, Predictor
from useg.inference.resampling import (
    LogitsPart,
    Rectangle,
    ResizedView,
    bilinear_source,
    resize_logits_part,
)
from useg.inference.runtimes import Runtime, window_pixels
from useg.inference.tiles import TileWindow
from useg.machine import prefetch
from useg.models.description import ModelDescription
from useg.models.geometry import Geometry, fit_bands, standardize
from useg.objects.table import better_scales
from useg.ownership import UNKEPT_LABEL_MARK, is_own_label_map

# A TIFF with more pixels is labelled in blocks, into a TIFF.
MAX_IN_MEMORY_PIXELS = 40_000_000

# Memory for the activations of a window, unless the smallest window of a network takes more.
MAX_ACTIVATION_BYTES = 384 << 20

TIFF_SUFFIXES = (".tif", ".tiff")

# Files in an OME-Zarr: descriptions, and chunks by the numbers of level, row and column.
_ZARR_FILE = re.compile(r"(\d+/)?(zarr\.json|\.z(attrs|group|array|metadata)|(c/)?\d+/\d+)")


class LargeImage(Protocol):
    """An image on disk that is read by rectangles.

    Either a :class:`useg.images.large_tiff.Raster` or a :class:`useg.images.ome_zarr.ZarrImage`.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]

    def __getitem__(self, place: Rectangle, /) -> NDArray[Any]:
        """Return the pixels of these rows and columns."""
        ...

    def band(self, rows: int) -> int:
        """Return how wide a band of the image may be, so that ``rows`` of its rows stay decoded."""
        ...

    def missing(self, place: Rectangle) -> NDArray[np.bool_]:
        """Return which pixels have no data."""
        ...


class LabelMap(Protocol):
    """A label map on disk that is written tile by tile, in any order."""

    def write(self, row: int, column: int, label: Label) -> None:
        """Write the tile in this row and column of tiles."""
        ...


# Writes a block of the image whose outputs were computed.
WriteBlock = Callable[[Rectangle, LogitsPart], None]


def is_large_image(path: Path) -> bool:
    """Whether an image is labelled in blocks: an OME-Zarr, or a TIFF too large for memory.

    A damaged TIFF is not: reading it gives the error.
    """
    return is_zarr(path) or tiff_declared_pixels(path) > MAX_IN_MEMORY_PIXELS


def large_label_path(out: Path, path: Path) -> Path:
    """Return where the label map of such an image goes."""
    return out / f"{path.stem}{SUFFIX if is_zarr(path) else TIFF_SUFFIXES[0]}"


def predict_large_image(
    predictor: Predictor,
    path: Path,
    target: Path,
    *,
    mark: str = "",
    objects_out: Path | None = None,
) -> None:
    """Label a TIFF, BigTIFF, GeoTIFF or OME-Zarr of any size.

    The label map of a TIFF is a tiled, deflated BigTIFF with the colours of the classes, overviews
    and the georeference of the image. Where the image has no data according to GDAL's tag, the
    label is 255, and the label map has that tag, too. The label map of an OME-Zarr is an OME-Zarr
    of the same version, with names and colours of the classes, that lies over the image. Both are
    written whole or not at all.

    The labels are those of one pass over the whole image, except for rounding. Networks with a
    very large receptive field, the pretrained ones, are an exception: their windows overlap by the
    smallest margin that keeps 99.9 % of the labels in the middle of the image, see
    :func:`useg.inference.tiles.overlap_geometry`.

    Args:
        predictor: One model, without augmentation.
        path: The image, in tiles or in strips that are not too high.
        target: The label map, ``.tif`` or ``.zarr``.
        mark: ASCII text to store in the label map, for :func:`useg.inference.outputs.is_done`.
        objects_out: Folder in whose ``objects`` a map and a table of the objects are written.

    Raises:
        UsageError: A file cannot be read, does not fit the model, or cannot be written.
    """
    if os.path.realpath(target) == os.path.realpath(path):
        raise DataError(
            f"the label map of {path} would overwrite the image itself; "
            f"choose another folder or name"
        )
    if not predictor.is_single:
        raise SettingsError(
            f"{path} is labelled in blocks, which ensembles and augmentation do not support; "
            f"give one model, without augmentation"
        )
    description = predictor.runtime.description
    open_files = _zarr_files if is_zarr(path) else _tiff_files
    with open_files(path, target, description, mark) as (raster, labels), ExitStack() as stack:
        native = raster.shape[0], raster.shape[1]
        fitted = FittedBands(raster, description, str(path))
        objects = (
            stack.enter_context(collect_objects(predictor, objects_out, native))
            if objects_out
            else None
        )
        output = _BlockWriter(raster, labels, len(description.classes), objects)

        def compute(scale: float) -> None:
            size = AugmentedView(scale).size(*description.working.of(native[1], native[0]))
            image: tiles.PixelSource = ResizedView(fitted, raster.dtype, size)
            if description.working.standardize:
                # Such a model reduces the whole image to a size that fits into memory.
                image = standardize(image[0 : size[1], 0 : size[0]])
            _compute_blocks(predictor.runtime, image, raster, partial(output.write, scale))

        compute(1.0)
        if objects:
            for scale in better_scales(objects.better_scale):
                compute(scale)
            output.write_kept(objects)
            objects.write(path)


def _compute_blocks(
    runtime: Runtime,
    image: tiles.PixelSource,
    raster: LargeImage,
    write: WriteBlock,
) -> None:
    """Compute an image block by block, and have each written while the next is computed."""
    description, native = runtime.description, (raster.shape[0], raster.shape[1])
    geometry = tiles.overlap_geometry(runtime.class_logits, image, description.geometry)
    max_pixels = window_pixels(description, MAX_ACTIVATION_BYTES)
    blocks, windows = plan_blocks(image, native, geometry, max_pixels, raster.band)
    computed = tiles.tile_logits(prefetch(tiles.tile_batches(windows, geometry)), runtime.run)
    working = image.shape[0], image.shape[1]
    with ThreadPoolExecutor(1) as writer:
        pending: Future[None] | None = None
        for block, (window, logits) in zip(blocks, computed, strict=True):
            if pending:
                pending.result()
            corner = window.rows.first, window.columns.first
            pending = writer.submit(write, block, LogitsPart(logits, corner, working))
    assert pending
    pending.result()


@dataclass(frozen=True)
class _BlockWriter:
    """Turns the logits of blocks into labels at the native size and writes them.

    Args:
        raster: The image.
        labels: Its label map.
        num_classes: The number of classes K.
        objects: Collects the objects; None if they are not wanted.
    """

    raster: LargeImage
    labels: LabelMap
    num_classes: int
    objects: LargeImageObjects | None = None

    def write(self, scale: float, block: Rectangle, part: LogitsPart) -> None:
        """Write a block of whole tiles, from its outputs ``(K, h, w)`` at a scale.

        If objects are wanted, it may be computed at another scale, so that its labels are kept.
        """
        native = self.raster.shape[0], self.raster.shape[1]
        for place in _split(block, TILE_SIDE):
            outputs = resize_logits_part(part, native, *place)
            logits = outputs[: self.num_classes]
            if self.objects:
                self.objects.blend(place, logits, scale)
            label = most_probable(logits)
            label[self.raster.missing(place)] = IGNORE
            if self.objects:
                self.objects.add(place, label, outputs)
            else:
                self._write_tile(place, label)

    def write_kept(self, objects: LargeImageObjects) -> None:
        """Write the label map that was kept with the objects."""
        height, width, _ = self.raster.shape
        for place in _split((slice(0, height), slice(0, width)), TILE_SIDE):
            self._write_tile(place, objects.label(place))

    def _write_tile(self, place: Rectangle, label: Label) -> None:
        self.labels.write(place[0].start // TILE_SIDE, place[1].start // TILE_SIDE, label)


@contextmanager
def _tiff_files(
    path: Path, target: Path, description: ModelDescription, mark: str
) -> Iterator[tuple[LargeImage, LabelMap]]:
    if target.suffix.lower() not in TIFF_SUFFIXES:
        raise SettingsError(
            f"the label map of a large TIFF is a TIFF, but the target is '{target.name}'; "
            f"end the name in .tif"
        )
    with (
        open_raster(path, description.channels) as raster,
        replacing(target, is_own_label_map) as draft,
        draft.open("rb+") as file,
    ):
        size = raster.shape[1], raster.shape[0]
        tags = {**raster.tags, SOFTWARE_TAG: (2, software_text(mark or UNKEPT_LABEL_MARK))}
        pyramid = Pyramid(file, size, description.classes, tags, no_data=raster.may_lack_data)
        yield raster, pyramid
        pyramid.finish()


@contextmanager
def _zarr_files(
    path: Path, target: Path, description: ModelDescription, mark: str
) -> Iterator[tuple[LargeImage, LabelMap]]:
    if target.suffix.lower() != SUFFIX:
        raise SettingsError(
            f"the label map of an OME-Zarr is an OME-Zarr, but the target is '{target.name}'; "
            f"end the name in {SUFFIX}"
        )
    image = open_zarr(path)
    size = image.shape[1], image.shape[0]
    with replacing_folder(target, is_own_zarr) as draft:
        labels = ZarrLabels(draft, size, description.classes, image.placement)
        yield image, labels
        labels.finish(mark)


def is_own_zarr(path: Path) -> bool:
    """Recognise a label map of useg to which no other files were added."""
    if path.is_symlink() or mark_of(path) is None:
        return False
    inside = (file for file in path.rglob("*") if file.is_symlink() or not file.is_dir())
    return all(_ZARR_FILE.fullmatch(file.relative_to(path).as_posix()) for file in inside)


class FittedBands:
    """An image on disk with the bands that a model takes.

    Pixels without data, NaN and infinity become the mean of the training images. (An image in
    memory gets its own mean there, which is unknown before the whole image was read.)

    Args:
        raster: The image.
        description: The model's.
        source: Name of the image in messages.
    """

    def __init__(self, raster: LargeImage, description: ModelDescription, source: str) -> None:
        self.shape = (*raster.shape[:2], description.channels)
        self._raster, self._description, self._source = raster, description, source

    def __getitem__(self, place: Rectangle) -> NDArray[Any]:
        pixels, missing = self._raster[place], self._raster.missing(place)
        mean = np.array(self._description.mean, np.float32)[: pixels.shape[2]]
        if missing.any():
            pixels = np.where(missing[..., None], mean.astype(pixels.dtype), pixels)
        if pixels.dtype.kind == "f":
            pixels = np.where(np.isfinite(pixels), pixels, mean)
        return fit_bands(pixels, self._description.channels, self._description.pixels, self._source)


def plan_blocks(
    image: tiles.PixelSource,
    native: tuple[int, int],
    geometry: Geometry,
    max_pixels: int,
    band: Callable[[int], int],
) -> tuple[list[Rectangle], Iterator[TileWindow]]:
    """Split a label map into blocks, and find the window that determines the labels of each.

    Neighbouring windows overlap. To decode what they share only once, the blocks go down the image
    in bands, so narrow that the lowest rows of one row of windows stay decoded for the next.

    Args:
        image: The image at the working size.
        native: (height, width) of the label map.
        geometry: The network's.
        max_pixels: Largest number of pixels in a window. Of all blocks of whole tiles within this
            limit, those are taken that compute the fewest pixels in all.
        band: Returns the width of a band of this many rows of the image, at its native size.

    Returns:
        The blocks, and their windows in the same order.
    """
    working = image.shape[0], image.shape[1]

    def window_shape(side: int) -> tuple[int, int]:
        high, wide = (
            tiles.block_size(min(-(-side * length // whole) + 2, length), length, geometry)
            for length, whole in zip(working, native, strict=True)
        )
        return high, wide

    def pixels(side: int) -> int:
        return window_shape(side)[0] * window_shape(side)[1]

    sides = range(TILE_SIDE, max(native) + TILE_SIDE, TILE_SIDE)
    side = min(
        (each for each in sides if pixels(each) <= max_pixels),
        key=lambda each: pixels(each) * _count_blocks(native, each),
        default=TILE_SIDE,
    )
    shape = window_shape(side)
    window_height, window_width = (
        -(-shape[axis] * native[axis] // working[axis]) for axis in (0, 1)
    )
    band_width = band(window_height)
    step = native[1]
    if band_width < native[1]:
        step = max(1, (band_width - window_width) // side + 1) * side
    bands = [slice(left, min(left + step, native[1])) for left in range(0, native[1], step)]
    blocks = [block for columns in bands for block in _split((slice(0, native[0]), columns), side)]

    def window(block: Rectangle) -> TileWindow:
        sources = map(bilinear_source, working, native, block)
        rows, columns = (
            tiles.block_span(source.start, source.stop, size, length, geometry)
            for source, size, length in zip(sources, shape, working, strict=True)
        )
        return TileWindow(image, rows, columns, shape)

    return blocks, map(window, blocks)


def _split(place: Rectangle, side: int) -> list[Rectangle]:
    """Split a rectangle into squares of ``side`` pixels, row by row."""
    rows, columns = (
        [slice(start, min(start + side, axis.stop)) for start in range(axis.start, axis.stop, side)]
        for axis in place
    )
    return list(product(rows, columns))


def _count_blocks(native: tuple[int, int], side: int) -> int:
    return -(-native[0] // side) * -(-native[1] // side)
