"""The objects of an image larger than memory: labels and depths by blocks in, map and table out.

The outputs of the network are kept in unnamed files beside the results: 14 bytes per pixel, and 4
more for each class if the image may be computed at another scale. When all blocks are there,
:mod:`useg.objects.separation` works on them tile by tile.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from useg.classes import Label, confidence
from useg.inference.outputs import find_georeference
from useg.inference.predictor import Predictor
from useg.objects.separation import Cuts, Tile, choose_cuts, find_levels, separate, split_tiles
from useg.objects.table import (
    MAP_TILE_SIDE,
    ObjectMeter,
    blend_logits,
    choose_scale,
    map_path,
    table_path,
    write_object_map,
    write_object_table,
)

# Side of the tiles that are in memory at a time, in pixels.
WORKING_TILE_SIDE = 1024

# Levels, label map, confidences, and two maps of numbers.
WORKING_TYPES = (np.uint8, np.uint8, np.float32, np.uint32, np.uint32)


class MappedArray:
    """An array of zeros in an unnamed file; only what is read or written is in memory.

    Args:
        file: An empty file.
        shape: (H, W), or with a further axis.
        dtype: Its number type.
    """

    def __init__(self, file: BinaryIO, shape: tuple[int, ...], dtype: Any) -> None:
        self.shape, self.size, self._dtype = shape, math.prod(shape), np.dtype(dtype)
        self._file = file
        self._file.truncate(self.size * self._dtype.itemsize)

    def __getitem__(self, place: Tile) -> NDArray[Any]:
        return np.array(self._map("r")[place])

    def __setitem__(self, place: Tile, values: Any) -> None:
        self._map("r+")[place] = values

    def _map(self, mode: Any) -> NDArray[Any]:
        # A mapping that ends gives its memory back.
        return np.memmap(self._file, self._dtype, mode, shape=self.shape)


class LargeImageObjects:
    """Collects what the objects of an image are made of, and writes their map and their table.

    Args:
        predictor: The model.
        out: The folder of the outputs.
        shape: (H, W) of the image.
        files: An empty file for each of ``WORKING_TYPES``.
        logits_file: An empty file if the image may be computed at another scale, else None.
    """

    def __init__(
        self,
        predictor: Predictor,
        out: Path,
        shape: tuple[int, int],
        files: Sequence[BinaryIO],
        logits_file: BinaryIO | None = None,
    ) -> None:
        self._predictor, self._out, self._shape = predictor, out, shape
        self._arrays = [
            MappedArray(file, shape, kind) for file, kind in zip(files, WORKING_TYPES, strict=True)
        ]
        # The logits of the classes at the working size, (H, W, K).
        self._logits: MappedArray | None = None
        if logits_file:
            self._logits = MappedArray(logits_file, (*shape, len(predictor.classes)), np.float32)
        # The factor on the working size of what was added last.
        self._scale = 1.0
        # How many objects are numbered; None before the first time, and when a level has changed.
        self._count: int | None = None

    @property
    def _cuts(self) -> Cuts:
        return choose_cuts(self._predictor.are_objects_larger(self._scale))

    def blend(self, place: Tile, logits: NDArray[np.float32], scale: float) -> None:
        """Keep the class logits ``(K, h, w)`` of the working size, or blend later ones with them.

        Args:
            place: The rectangle.
            logits: Those at the scale; they receive the result.
            scale: The factor on the working size. It is 1 the first time.
        """
        self._scale = scale
        if self._logits is None:
            return
        if scale == 1:
            self._logits[place] = logits.transpose(1, 2, 0)
        else:
            at_working_size = self._logits[place].transpose(2, 0, 1)
            blend_logits(at_working_size, logits, scale, self._predictor.enlarged_biases)

    def add(self, place: Tile, label: Label, outputs: NDArray[np.float32]) -> None:
        """Add a rectangle: its label map ``(h, w)``, and what the network computes for it.

        What was added at another scale is replaced.
        """
        num_classes = len(self._predictor.classes)
        depth = outputs[num_classes] if self._predictor.has_objects else None
        levels, labels, confidences, *_ = self._arrays
        self._count = None
        levels[place] = find_levels(label, depth, self._predictor.object_classes, self._cuts)
        labels[place] = label
        confidences[place] = confidence(outputs[:num_classes], self._predictor.temperature)

    def label(self, place: Tile) -> Label:
        """Return the label map ``(h, w)`` of a rectangle that was added."""
        label: Label = self._arrays[1][place]
        return label

    def separate(self) -> int:
        """Number the objects, unless they are numbered already; return how many there are."""
        levels, _, confidences, *numbers = self._arrays
        if self._count is None:
            self._count = separate(
                levels,
                numbers,
                by_class=not self._predictor.has_objects,
                confidences=confidences if self._predictor.has_objects else None,
                min_pixels=self._predictor.min_pixels_at(self._scale),
                side=self._predictor.object_side / self._scale,
                cuts=self._cuts,
                tile=WORKING_TILE_SIDE,
            )
        return self._count

    def better_scale(self) -> float:
        """Return the factor on the working size at which the image is best computed."""
        trained_side = self._predictor.object_side
        if not trained_side:
            return 1.0
        areas = np.zeros(self.separate() + 1, np.int64)
        for place in split_tiles(self._shape, WORKING_TILE_SIDE):
            areas += np.bincount(self._arrays[3][place].ravel(), minlength=areas.size)
        return choose_scale(areas[1:], trained_side)

    def write(self, path: Path) -> int:
        """Write the map and the table of the image ``path``; return the number of objects.

        Raises:
            UsageError: A file cannot be written.
        """
        _, labels, confidences, *numbers = self._arrays
        count = self.separate()
        meter = ObjectMeter(count, len(self._predictor.classes), self._shape)
        for place in split_tiles(self._shape, WORKING_TILE_SIDE):
            meter.add(numbers[0][place], labels[place], confidences[place], place)
        georeference = find_georeference(path) if path.is_file() else None
        target = map_path(self._out, path.stem)
        write_object_map(target, _read_tiles(numbers[0]), self._shape, count, georeference)
        table, classes = meter.measure(), self._predictor.classes
        write_object_table(
            table_path(self._out, path.stem), path.name, table, classes, georeference
        )
        return count


@contextmanager
def collect_objects(
    predictor: Predictor, out: Path, shape: tuple[int, int]
) -> Iterator[LargeImageObjects]:
    """Yield :class:`LargeImageObjects` whose working files lie unnamed in ``out`` until the end."""
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile(dir=out)) for _ in WORKING_TYPES]
        logits_file: BinaryIO | None = None
        if predictor.object_side:
            logits_file = stack.enter_context(tempfile.TemporaryFile(dir=out))
        yield LargeImageObjects(predictor, out, shape, files, logits_file)


def _read_tiles(numbers: MappedArray) -> Iterator[NDArray[np.uint32]]:
    """Yield the tiles of a TIFF, those at the edges filled up with zeros."""
    for place in split_tiles(numbers.shape, MAP_TILE_SIDE):
        tile = np.zeros((MAP_TILE_SIDE, MAP_TILE_SIDE), np.uint32)
        part = numbers[place]
        tile[: part.shape[0], : part.shape[1]] = part
        yield tile
