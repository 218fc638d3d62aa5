"""A picture larger than memory, a TIFF or an OME-Zarr -> its label map on disk, of the same kind, as one pass over the whole would give it.

The label map is made in blocks of whole tiles. For each block the network looks at the window that decides its labels, at the model's working
size, and the logits are enlarged before the label is taken, as for any other picture. One block is read ahead and one is written behind; no
more is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL
from numpy.typing import NDArray

from useg.classes import IGNORE, Label, most_probable
from useg.errors import UsageError
from useg.files import replacing, replacing_folder
from useg.images.large_tiff import TILE_SIDE, Pyramid, open_raster, tiff_declared_pixels
from useg.images.ome_zarr import SUFFIX, ZarrLabels, is_zarr, mark_of, open_zarr
from useg.inference import tiles
from useg.inference.outputs import SOFTWARE_TAG, software_text
from useg.inference.predictor import Predictor
from useg.inference.runtimes import window_pixels
from useg.inference.tiles import TileWindow
from useg.machine import prefetch
from useg.models.geometry import Geometry, fit_bands
from useg.models.segmenter import ModelDescription

MAX_READ_PIXELS = 8_000_000  # pixels of the picture that are read at a time


_PILLOW_13 = (
    int(PIL.__version__.split(".")[0]) >= 13
)  # pictures that lose much height, which before went across first as all others


_WEIGHT_BITS = 22  # of the whole numbers that Pillow multiplies 8-bit pixels with


class ResizedView:
    """A picture ``(H, W, C)`` at another size, computed where it is asked for; equal to ``useg.images.files.resize_image`` of the whole.

    Args:
        source: a picture that gives any rectangle of itself: ``source[rows, columns]``.
        dtype: of its pixels.
        size: (width, height) wanted.
    """

    def __init__(self, source: Any, dtype: np.dtype[Any], size: tuple[int, int]) -> None:
        self.source = source
        self.shape = (size[1], size[0], source.shape[2])
        self._dtype = dtype
        self._exact = dtype == np.uint8 and source.shape[2] in (
            1,
            3,
        )  # Pillow computes these in whole numbers
        lost = [
            before - after for before, after in zip(source.shape[:2], self.shape[:2], strict=True)
        ]
        self._order = (
            (0, 1) if _PILLOW_13 and lost[0] > max(0, 2 * lost[1]) else (1, 0)
        )  # between the two 8-bit pixels are rounded
        self._taps = [
            _triangle_taps(*lengths, whole=self._exact)
            for lengths in zip(source.shape[:2], self.shape[:2], strict=True)
        ]

    def __getitem__(self, place: tuple[slice, slice]) -> NDArray[Any]:
        """Return the pixels of these rows and columns."""
        if self.shape == self.source.shape:
            return np.asarray(self.source[place])
        rows, columns = place
        part = np.empty(
            (rows.stop - rows.start, columns.stop - columns.start, self.shape[2]), self._dtype
        )
        for some in self._pieces(rows, columns):
            part[some.start - rows.start : some.stop - rows.start] = self._computed(some, columns)
        return part

    def _pieces(self, rows: slice, columns: slice) -> Iterator[slice]:
        """Cut rows into pieces for each of which about ``PIECE`` pixels of the picture are read."""
        wide = _source_range(self._taps[1], columns)
        pixels = max(1, self.source.shape[0] // self.shape[0]) * (wide.stop - wide.start)
        step = max(1, MAX_READ_PIXELS // pixels)
        return (
            slice(top, min(top + step, rows.stop)) for top in range(rows.start, rows.stop, step)
        )

    def _computed(self, rows: slice, columns: slice) -> NDArray[Any]:
        read = [
            _source_range(taps, wanted)
            for taps, wanted in zip(self._taps, (rows, columns), strict=True)
        ]
        pixels = np.asarray(self.source[read[0], read[1]])
        pixels = pixels if self._exact else pixels.astype(np.float32)
        for axis in self._order:
            pixels = _apply_taps(
                pixels, self._taps[axis], (rows, columns)[axis], read[axis].start, axis
            )
        return pixels if self._exact or self._dtype.kind == "f" else np.rint(pixels)


Taps = tuple[
    NDArray[np.intp], NDArray[Any]
]  # (n, taps): which pixels each new pixel is a mean of, and their weights


def _triangle_taps(source: int, target: int, whole: bool) -> Taps:
    """Return where each of ``target`` pixels comes from: a triangle over its place, at least as wide as a pixel of either size."""
    scale = source / target
    support = max(scale, 1.0)
    centers = 0.0 + (np.arange(target) + 0.5) * scale
    first = np.maximum((centers - support + 0.5).astype(np.intp), 0)
    last = np.minimum((centers + support + 0.5).astype(np.intp), source)
    index = first[:, None] + np.arange((last - first).max())
    weights = np.maximum(1 - np.abs((index - centers[:, None] + 0.5) * (1 / support)), 0) * (
        index < last[:, None]
    )
    weights /= weights.cumsum(1)[:, -1:]  # added one after the other, as Pillow does
    return np.minimum(index, source - 1), (weights * (1 << _WEIGHT_BITS) + 0.5).astype(
        np.int32
    ) if whole else weights


def _source_range(taps: Taps, wanted: slice) -> slice:
    index = taps[0][wanted]
    return slice(int(index[0, 0]), int(index[-1].max()) + 1)


def _apply_taps(
    pixels: NDArray[Any], taps: Taps, wanted: slice, start: int, axis: int
) -> NDArray[Any]:
    """Return weighted means along one axis of pixels of which the first is number ``start``."""
    index, weights = taps[0][wanted] - start, taps[1][wanted]
    weights = weights[:, :, None, None] if axis == 0 else weights[:, :, None]
    total: NDArray[Any] = np.array(
        1 << _WEIGHT_BITS - 1 if weights.dtype == np.int32 else 0.0, weights.dtype
    )
    for k in range(index.shape[1]):
        total = total + pixels.take(index[:, k], axis) * weights[:, k]
    return (
        (total >> _WEIGHT_BITS).astype(np.uint8)
        if weights.dtype == np.int32
        else total.astype(np.float32)
    )


def bilinear_neighbours(
    source: int, target: int, wanted: slice
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """Return between which two of ``source`` places each of the wanted ones of ``target`` lies, and how near to the second, 0 to 1.

    As PyTorch's bilinear enlargement with the corners not aligned: in float32, product and difference rounded once.
    """
    scale = np.float32(source) / np.float32(target)
    at = np.maximum(
        (np.arange(wanted.start, wanted.stop) + 0.5) * np.float64(scale) - 0.5, 0
    ).astype(np.float32)
    low = np.minimum(at.astype(np.intp), source - 1)
    return low, np.minimum(low + 1, source - 1), at - low.astype(np.float32)


def bilinear_source(source: int, target: int, wanted: slice) -> slice:
    """Return which of ``source`` rows :func:`enlarged` needs for the wanted rows of ``target``."""
    low, high, _ = bilinear_neighbours(source, target, slice(wanted.start, wanted.stop))
    return slice(int(low[0]), int(high[-1]) + 1)


def resize_logits_part(
    logits: NDArray[np.float32],
    corner: tuple[int, int],
    size: tuple[int, int],
    native: tuple[int, int],
    rows: slice,
    columns: slice,
) -> NDArray[np.float32]:
    """Return a part of the logits at another size.

    Args:
        logits: (K, h, w), a part that holds all that is :func:`needed`.
        corner: its first row and column in the whole.
        size: (height, width) of the whole.
        native: (height, width) to which the whole is brought.
        rows, columns: which part of that is wanted.
    """
    if size == native:
        return logits[
            :,
            rows.start - corner[0] : rows.stop - corner[0],
            columns.start - corner[1] : columns.stop - corner[1],
        ]
    for axis, wanted in ((0, rows), (1, columns)):
        low, high, near = bilinear_neighbours(size[axis], native[axis], wanted)
        near = near[:, None] if axis == 0 else near
        before = logits.take(low - corner[axis], axis + 1)
        logits = before * (1 - near) + logits.take(high - corner[axis], axis + 1) * near
    return logits


MAX_IN_MEMORY_PIXELS = 40_000_000  # a TIFF of more pixels is labelled in blocks, into a TIFF


TIFF_SUFFIXES = (".tif", ".tiff")


MAX_ACTIVATION_BYTES = (
    384 << 20
)  # that a window may take, unless the network's smallest windows take more


class Scan(Protocol):
    """A picture on disk that is read by rectangles: a :class:`useg.images.large_tiff.Raster` or a :class:`useg.images.ome_zarr.ZarrImage`."""

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]

    def __getitem__(self, place: tuple[slice, slice], /) -> NDArray[Any]:
        """Return the image at these rows and columns."""
        ...

    def band(self, rows: int) -> int:
        """Return how wide a band is of which so many rows stay decoded."""
        ...

    def missing(self, place: tuple[slice, slice]) -> NDArray[np.bool_]:
        """Return where there is no picture."""
        ...


class LabelMap(Protocol):
    """A label map on disk that is written tile by tile, in any order."""

    def write(self, row: int, column: int, label: Label) -> None:
        """Write the tile in this row and column of tiles."""
        ...


def is_scan(path: Path) -> bool:
    """Say whether a picture goes through :func:`predict_scan`: an OME-Zarr, or a TIFF of so many pixels; a damaged TIFF does not."""
    return is_zarr(path) or tiff_declared_pixels(path) > MAX_IN_MEMORY_PIXELS


def scan_path(out: Path, path: Path) -> Path:
    """Return where the label map of such a picture goes."""
    return out / f"{path.stem}{SUFFIX if is_zarr(path) else TIFF_SUFFIXES[0]}"


def predict_scan(
    predictor: Predictor,
    path: Path,
    target: Path,
    *,
    mark: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Label a TIFF, BigTIFF, GeoTIFF or OME-Zarr of any size.

    The label map of a TIFF is a BigTIFF in tiles, deflated, with the classes' colours, overviews, and the tags that place the picture on earth,
    so that it lies over the picture. Where the picture says by GDAL's tag that it has no data, the label is 255, and the label map says so too.
    That of an OME-Zarr is an OME-Zarr of the same version, with the classes' names and colours, that lies over the picture.
    It is there whole or not at all.

    The labels are those of one pass over the whole picture, but for rounding. Only of networks that see further than ``margins.EXACT`` pixels, the
    pretrained ones, the windows overlap by the smallest margin that keeps 99.9 % of the labels in the middle of the picture; it is said.

    Args:
        predictor: the model.
        path: the picture; in tiles, or strips that are not too high.
        target: the label map, ``.tif`` or ``.zarr``.
        mark: ASCII text in the label map, for :func:`useg.inference.outputs.is_done`.
        progress: called with (blocks done, blocks in all).
        say: told the margin where one is measured.

    Raises:
        UsageError: a file that cannot be read, does not fit the model, or cannot be written.
    """
    if target.resolve() == path.resolve():
        raise UsageError(
            f"the label map of {path} would overwrite the picture itself; choose another folder or name"
        )
    if not predictor.is_single:
        raise UsageError(
            f"{path} is labelled in blocks, not by several models or views at once; give one model, without augmentation"
        )
    description = predictor.runtime.description
    with (_zarr_files if is_zarr(path) else _tiff_files)(path, target, description, mark) as (
        scan,
        labels,
    ):
        height, width = native = scan.shape[0], scan.shape[1]
        image = ResizedView(
            FittedBands(scan, description, str(path)),
            scan.dtype,
            description.working.of(width, height),
        )
        geometry = tiles.overlap_geometry(predictor.runtime.run, image, description.geometry, say)
        blocks, windows = plan_blocks(
            image, native, geometry, window_pixels(description, MAX_ACTIVATION_BYTES), scan.band
        )

        def write(
            place: tuple[slice, slice], window: TileWindow, logits: NDArray[np.float32]
        ) -> None:
            for rows, columns in _split(place, TILE_SIDE):
                corner = window.rows.first, window.columns.first
                label = most_probable(
                    resize_logits_part(logits, corner, image.shape[:2], native, rows, columns)
                )
                label[scan.missing((rows, columns))] = IGNORE
                labels.write(rows.start // TILE_SIDE, columns.start // TILE_SIDE, label)

        with ThreadPoolExecutor(1) as writer:
            behind: Future[None] | None = None
            answers = tiles.tile_logits(
                prefetch(tiles.tile_batches(windows, geometry)), predictor.runtime.run
            )
            for k, (place, (window, logits)) in enumerate(zip(blocks, answers, strict=True)):
                if behind:
                    behind.result()
                behind = writer.submit(write, place, window, logits)
                progress(k + 1, len(blocks))
        assert behind
        behind.result()


@contextmanager
def _tiff_files(
    path: Path, target: Path, description: ModelDescription, mark: str
) -> Iterator[tuple[Scan, LabelMap]]:
    if target.suffix.lower() not in TIFF_SUFFIXES:
        raise UsageError(
            f"the label map of a large TIFF is a TIFF, but '{target.name}' was asked for; end the name in .tif"
        )
    with (
        open_raster(path, description.channels) as raster,
        replacing(target) as temporary,
        temporary.open("rb+") as file,
    ):
        tags = {**raster.tags, SOFTWARE_TAG: (2, software_text(mark))} if mark else raster.tags
        pyramid = Pyramid(
            file,
            (raster.shape[1], raster.shape[0]),
            description.classes,
            tags,
            no_data=raster.no_data is not None,
        )
        yield raster, pyramid
        pyramid.finish()


@contextmanager
def _zarr_files(
    path: Path, target: Path, description: ModelDescription, mark: str
) -> Iterator[tuple[Scan, LabelMap]]:
    if target.suffix.lower() != SUFFIX:
        raise UsageError(
            f"the label map of an OME-Zarr is one too, but '{target.name}' was asked for; end the name in {SUFFIX}"
        )
    if target.exists() and mark_of(target) is None:
        raise UsageError(
            f"{target} is there, and is no label map that useg wrote; choose another folder, or remove it"
        )
    image = open_zarr(path)
    with replacing_folder(target) as temporary:
        labels = ZarrLabels(
            temporary, (image.shape[1], image.shape[0]), description.classes, image.placement
        )
        yield image, labels
        labels.finish(mark)


class FittedBands:
    """A scan with the bands that a model takes; where a float picture has holes or overflows, the mean of the training pictures stands.

    (A picture that is in memory as a whole gets its own mean there, which a larger one shows only at its end.)
    """

    def __init__(self, scan: Scan, description: ModelDescription, source: str) -> None:
        self.shape = (*scan.shape[:2], description.channels)
        self._scan, self._description, self._source = scan, description, source

    def __getitem__(self, place: tuple[slice, slice]) -> NDArray[Any]:
        pixels = self._scan[place]
        if pixels.dtype.kind == "f":
            mean = np.array(self._description.mean, np.float32)[: pixels.shape[2]]
            pixels = np.where(np.isfinite(pixels), pixels, mean)
        return fit_bands(pixels, self._description.channels, self._description.pixels, self._source)


def plan_blocks(
    image: tiles.PixelSource,
    native: tuple[int, int],
    geometry: Geometry,
    most_pixels: int,
    band: Callable[[int], int],
) -> tuple[list[tuple[slice, slice]], Iterator[TileWindow]]:
    """Cut a label map into blocks, and say for each which window of the picture, at the working size, decides its labels.

    Neighbouring windows overlap. So that what they share is decoded once, the blocks go down the picture in bands that are narrow enough for
    the lowest rows of a row of windows to be still there for the next one.

    Args:
        image: the picture at the working size.
        native: (height, width) of the label map.
        geometry: the network's.
        most_pixels: of a window. Of all blocks of whole tiles that keep to it, those are taken that compute the fewest pixels in all.
        band: how wide a band of so many rows of the picture, at its native size, may be.
    """
    working = image.shape[0], image.shape[1]

    def size(side: int) -> tuple[int, int]:
        extents = [
            min(-(-side * length // whole) + 2, length)
            for length, whole in zip(working, native, strict=True)
        ]
        high, wide = (
            tiles.block_size(extent, length, geometry)
            for extent, length in zip(extents, working, strict=True)
        )
        return high, wide

    def pixels(side: int) -> int:
        return size(side)[0] * size(side)[1]

    sides = range(TILE_SIDE, max(native) + TILE_SIDE, TILE_SIDE)
    side = min(
        (each for each in sides if pixels(each) <= most_pixels),
        key=lambda each: pixels(each) * _count_blocks(native, each),
        default=TILE_SIDE,
    )
    high, wide = (
        -(-extent * whole // length)
        for extent, whole, length in zip(size(side), native, working, strict=True)
    )  # of a window
    most = band(high)
    step = (
        native[1] if most >= native[1] else max(1, (most - wide) // side + 1) * side
    )  # from one band to the next
    bands = [slice(left, min(left + step, native[1])) for left in range(0, native[1], step)]
    blocks = [block for columns in bands for block in _split((slice(0, native[0]), columns), side)]

    def window(block: tuple[slice, slice]) -> TileWindow:
        rows, columns = (
            tiles.block_span(some.start, some.stop, long, length, geometry)
            for some, long, length in zip(
                map(bilinear_source, working, native, block), size(side), working, strict=True
            )
        )
        return TileWindow(image, rows, columns, size(side))

    return blocks, map(window, blocks)


def _split(place: tuple[slice, slice], side: int) -> list[tuple[slice, slice]]:
    rows, columns = (
        [slice(start, min(start + side, some.stop)) for start in range(some.start, some.stop, side)]
        for some in place
    )
    return list(product(rows, columns))


def _count_blocks(native: tuple[int, int], side: int) -> int:
    return -(-native[0] // side) * -(-native[1] // side)
