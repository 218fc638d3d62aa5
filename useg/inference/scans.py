"""A picture larger than memory -> its label map on disk, as one pass over the whole would give it.

The label map is made in blocks of whole tiles. For each block the network looks at the window that decides its labels, at the model's working
size, and the logits are enlarged before the label is taken, as for any other picture. One block is read ahead and one is written behind; no
more is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE
from useg.data.cache import fit_bands
from useg.data.pyramids import SIDE, Pyramid
from useg.data.rasters import Raster, declared_pixels, open_raster
from useg.data.resampling import Resized, enlarged, needed
from useg.errors import UsageError
from useg.files import replacing
from useg.inference import margins, tiles
from useg.inference.budget import window_pixels
from useg.inference.card import Card
from useg.inference.outputs import SOFTWARE, marked
from useg.inference.predictor import Predictor
from useg.inference.tiles import Geometry, Window
from useg.scoring.answers import most_probable

SCAN_PIXELS = 40_000_000  # a TIFF of more pixels is labelled in blocks, into a TIFF
SUFFIXES = (".tif", ".tiff")
ACTIVATION_BYTES = 384 << 20  # that a window may take, unless the network's smallest windows take more
T = TypeVar("T")


def is_scan(path: Path) -> bool:
    """Say whether a file is a TIFF of so many pixels that it goes through :func:`predict_scan`; a damaged one is not."""
    return declared_pixels(path) > SCAN_PIXELS


def predict_scan(
    predictor: Predictor,
    path: Path,
    target: Path,
    *,
    mark: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Label a TIFF, BigTIFF or GeoTIFF of any size.

    The label map is a BigTIFF in tiles, deflated, with the classes' colours, overviews, and the tags that place the picture on earth, so that
    it lies over the picture. Where the picture says by GDAL's tag that it has no data, the label is 255, and the label map says so too.
    The file is there whole or not at all.

    The labels are those of one pass over the whole picture, but for rounding. Only of networks that see further than ``margins.EXACT`` pixels, the
    pretrained ones, the windows overlap by the smallest margin that keeps 99.9 % of the labels in the middle of the picture; it is said.

    Args:
        predictor: the model.
        path: the picture; in tiles, or strips that are not too high.
        target: the label map, ``.tif``.
        mark: ASCII text in the label map, for :func:`useg.inference.outputs.is_done`.
        progress: called with (blocks done, blocks in all).
        say: told the margin where one is measured.

    Raises:
        UsageError: a file that cannot be read, does not fit the model, or cannot be written.
    """
    if target.suffix.lower() not in SUFFIXES:
        raise UsageError(f"the label map of a large TIFF is a TIFF, but '{target.name}' was asked for; end the name in .tif")
    if target.resolve() == path.resolve():
        raise UsageError(f"the label map of {path} would overwrite the picture itself; choose another folder or name")
    if not predictor.is_alone:
        raise UsageError(f"{path} is too large for several models or views at once; give one model, without augmentation")
    card = predictor.runtime.card
    with open_raster(path, card.channels) as raster, replacing(target) as temporary, temporary.open("rb+") as file:
        height, width = native = raster.shape[0], raster.shape[1]
        tags = {**raster.tags, SOFTWARE: (2, marked(mark))} if mark else raster.tags
        pyramid = Pyramid(file, (width, height), card.classes, tags, no_data=raster.no_data is not None)
        image = Resized(Fitted(raster, card, str(path)), raster.dtype, card.working.of(width, height))
        geometry = margins.affordable(predictor.runtime.run, image, card.geometry, say)
        blocks, windows = plan(image, native, geometry, window_pixels(card, ACTIVATION_BYTES), raster.band)

        def write(place: tuple[slice, slice], window: Window, logits: NDArray[np.float32]) -> None:
            for rows, columns in _cut(place, SIDE):
                corner = window.rows.first, window.columns.first
                label = most_probable(enlarged(logits, corner, image.shape[:2], native, rows, columns))
                label[raster.missing((rows, columns))] = IGNORE
                pyramid.write(rows.start // SIDE, columns.start // SIDE, label)

        with ThreadPoolExecutor(1) as writer:
            behind: Future[None] | None = None
            answers = tiles.answers(ahead(tiles.batches(windows, geometry)), predictor.runtime.run)
            for k, (place, (window, logits)) in enumerate(zip(blocks, answers, strict=True)):
                if behind:
                    behind.result()
                behind = writer.submit(write, place, window, logits)
                progress(k + 1, len(blocks))
        assert behind
        behind.result()
        pyramid.finish()


class Fitted:
    """A raster with the bands that a model takes; where a float picture has holes or overflows, the mean of the training pictures stands.

    (A picture that is in memory as a whole gets its own mean there, which a larger one shows only at its end.)
    """

    def __init__(self, raster: Raster, card: Card, source: str) -> None:
        self.shape = (*raster.shape[:2], card.channels)
        self._raster, self._card, self._source = raster, card, source

    def __getitem__(self, place: tuple[slice, slice]) -> NDArray[Any]:
        pixels = self._raster[place]
        if pixels.dtype.kind == "f":
            mean = np.array(self._card.mean, np.float32)[: pixels.shape[2]]
            pixels = np.where(np.isfinite(pixels), pixels, mean)
        return fit_bands(pixels, self._card.channels, self._card.pixels, self._source)


def plan(
    image: tiles.Pixels, native: tuple[int, int], geometry: Geometry, most_pixels: int, band: Callable[[int], int]
) -> tuple[list[tuple[slice, slice]], Iterator[Window]]:
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
        extents = [min(-(-side * length // whole) + 2, length) for length, whole in zip(working, native, strict=True)]
        high, wide = (tiles.block_size(extent, length, geometry) for extent, length in zip(extents, working, strict=True))
        return high, wide

    def pixels(side: int) -> int:
        return size(side)[0] * size(side)[1]

    sides = range(SIDE, max(native) + SIDE, SIDE)
    side = min((each for each in sides if pixels(each) <= most_pixels), key=lambda each: pixels(each) * _count(native, each), default=SIDE)
    high, wide = (-(-extent * whole // length) for extent, whole, length in zip(size(side), native, working, strict=True))  # of a window
    most = native[1]
    step = native[1] if most >= native[1] else max(1, (most - wide) // side + 1) * side  # from one band to the next
    bands = [slice(left, min(left + step, native[1])) for left in range(0, native[1], step)]
    blocks = [block for columns in bands for block in _cut((slice(0, native[0]), columns), side)]

    def window(block: tuple[slice, slice]) -> Window:
        rows, columns = (
            tiles.block_span(some.start, some.stop, long, length, geometry)
            for some, long, length in zip(map(needed, working, native, block), size(side), working, strict=True)
        )
        return Window(image, rows, columns, size(side))

    return blocks, map(window, blocks)


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield items, each of which was made while the one before it was used."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]


def _cut(place: tuple[slice, slice], side: int) -> list[tuple[slice, slice]]:
    rows, columns = ([slice(start, min(start + side, some.stop)) for start in range(some.start, some.stop, side)] for some in place)
    return list(product(rows, columns))


def _count(native: tuple[int, int], side: int) -> int:
    return -(-native[0] // side) * -(-native[1] // side)
