"""Logits of an image -> its numbered objects and their table, as arrays and as files.

A table has a row for each object: class, area, box, confidence. The files are a TIFF of the numbers
and a CSV of the table; ``objects.csv`` of a whole job is made of the tables of the images.

A network learns to separate touching objects of a certain size. If objects are larger, it predicts
valleys inside them; if they are smaller, it misses valleys between them. So useg measures the size
of the objects in a first prediction. If it differs from that of the training objects, it computes
a rescaled image, too: the depth is that of the rescaled image, the logits of the classes are the
mean of both or, if the scales are far apart, those of the rescaled image. Cellpose (Stringer et
al., 2021) rescales images for the same reason. ``docs/objects.md`` has the gain.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import ClassTable, Label, confidence, most_probable
from useg.errors import DataError
from useg.files import replacing
from useg.images.image_files import read_mask
from useg.objects.separation import (
    ObjectMap,
    Tile,
    choose_cuts,
    find_levels,
    separate,
    typical_side,
)
from useg.ownership import OBJECTS_HEADER, Recognizer, is_own_csv, is_own_tiff
from useg.parsing import from_cell, to_cell

if TYPE_CHECKING:
    from useg.images.tiff import GeoReference

# Maximum number of scales that are computed; each one improves the estimate of the object size.
MAX_PASSES = 4

# Scales are powers of two with exponents in steps of a quarter: a small difference in size, as by
# rounding, changes nothing.
STEPS_PER_OCTAVE = 4
# An image is scaled to at most four times and at least a 16th of its pixels, because the first
# prediction may only find parts of objects.
MIN_OCTAVES, MAX_OCTAVES = -2.0, 1.0
# From this scale on, the classes at the working size are too bad to be used.
MIN_FAR_OCTAVES = 1.0

_FOLDER = "objects"

# Tiles of a large map of objects, and the program that wrote it.
MAP_TILE_SIDE = 512
_SOFTWARE = "useg"
# The columns of a table that are not numbers.
_TEXTS = ("image", "class")

_MAX_SMALL = np.iinfo(np.uint16).max


@dataclass(frozen=True)
class ObjectTable:
    """The objects of an image; row k describes the object with the number k + 1.

    Args:
        class_ids: ``(N,)``: the class of most of its pixels; of equal ones, the lowest.
        areas: ``(N,)``: its pixels.
        centres: ``(N, 2)``: the mean x and y of its pixels; the first pixel is at 0.
        boxes: ``(N, 4)``: left, top, width and height in pixels.
        confidences: ``(N,)``: the mean probability of the predicted class of its pixels.
        at_edge: ``(N,)``: whether it touches the edge of the image, which may cut it.
    """

    class_ids: NDArray[np.int64]
    areas: NDArray[np.int64]
    centres: NDArray[np.float64]
    boxes: NDArray[np.int64]
    confidences: NDArray[np.float64]
    at_edge: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.areas)

    def rows(self, classes: ClassTable) -> list[dict[str, Any]]:
        """Return a row for each object as plain values; ``id`` is its number."""
        columns = zip(
            self.class_ids.tolist(),
            self.areas.tolist(),
            self.centres.round(2).tolist(),
            self.boxes.tolist(),
            self.confidences.round(4).tolist(),
            self.at_edge.tolist(),
            strict=True,
        )
        return [
            {
                "id": number,
                "class": classes.names[class_id],
                "class_id": class_id,
                "pixels": area,
                "center": centre,
                "bbox": box,
                "confidence": confidence,
                "at_edge": at_edge,
            }
            for number, (class_id, area, centre, box, confidence, at_edge) in enumerate(columns, 1)
        ]


@dataclass(frozen=True)
class FoundObjects:
    """The objects of an image, as ``Predictor.objects`` returns them.

    Args:
        numbers: ``(H, W)`` uint32: the object number of each pixel, from 1; 0 for no object, also
            in regions that are too small to be one.
        table: What is known about each.
        kept_apart: Whether the model has learned to keep touching objects apart. Otherwise each
            connected region of a class counts as one object.
    """

    numbers: ObjectMap
    table: ObjectTable
    kept_apart: bool

    def __len__(self) -> int:
        return len(self.table)


@dataclass(frozen=True)
class Regions:
    """The objects of a label map in memory, numbered.

    Args:
        label: The label map ``(H, W)``.
        object_classes: The classes that consist of objects.
        numbers: ``(H, W)`` uint32: the number of each pixel's object, from 1 on; 0 for none.
        count: How many objects there are.
        confidences: ``(H, W)``: the probability of each pixel's class.
    """

    label: Label
    object_classes: Sequence[int]
    numbers: ObjectMap
    count: int
    confidences: NDArray[np.float32]


@dataclass(frozen=True)
class PixelOutputs:
    """The outputs of a model for each pixel of an image.

    Args:
        logits: Those of the classes, ``(K, H, W)``.
        depth: Those of the depth (:mod:`useg.objects.separation`), ``(H, W)``; None if the model
            computes none.
        min_pixels: Smaller objects are dropped.
        side: Side of a typical object in pixels; 0 if it is unknown.
        are_larger: Whether the objects are larger than in all training images.
        regions: The objects, if they had to be numbered to compute the depth.
    """

    logits: NDArray[np.float32]
    depth: NDArray[np.float32] | None = None
    min_pixels: int = 0
    side: float = 0.0
    are_larger: bool = False
    regions: Regions | None = None


def find_objects(
    outputs: PixelOutputs,
    object_classes: Sequence[int],
    temperature: float = 1.0,
    label: Label | None = None,
) -> FoundObjects:
    """Find the objects of an image in memory.

    Args:
        outputs: What the model computes for the image.
        object_classes: The classes that consist of objects.
        temperature: Divisor of the logits for the confidences.
        label: The label map ``(H, W)``; by default the most probable classes.
    """
    logits, regions = outputs.logits, outputs.regions
    label = most_probable(logits) if label is None else label
    if (
        regions is None
        or tuple(regions.object_classes) != tuple(object_classes)
        or not np.array_equal(regions.label, label)
    ):
        regions = number_regions(label, outputs, object_classes, temperature)
    meter = ObjectMeter(regions.count, len(logits), label.shape)
    whole = slice(0, label.shape[0]), slice(0, label.shape[1])
    meter.add(regions.numbers, label, regions.confidences, whole)
    return FoundObjects(regions.numbers, meter.measure(), outputs.depth is not None)


def number_regions(
    label: Label, outputs: PixelOutputs, object_classes: Sequence[int], temperature: float
) -> Regions:
    """Number the objects of a label map in memory, as :func:`find_objects` does."""
    numbers = [np.zeros(label.shape, np.uint32) for _ in range(2)]
    by_class, cuts = outputs.depth is None, choose_cuts(outputs.are_larger)
    levels = find_levels(label, outputs.depth, object_classes, cuts)
    confidences = confidence(outputs.logits, temperature)
    count = separate(
        levels,
        numbers,
        by_class=by_class,
        min_pixels=outputs.min_pixels,
        side=outputs.side,
        cuts=cuts,
        confidences=None if by_class else confidences,
    )
    return Regions(label, object_classes, numbers[0], count, confidences)


def refine_outputs(
    outputs: PixelOutputs,
    compute: Callable[[float], PixelOutputs],
    object_classes: Sequence[int],
    trained_side: float,
    enlarged_biases: NDArray[np.float32],
    temperature: float = 1.0,
) -> PixelOutputs:
    """Return the outputs at the scale that suits the objects of the image.

    The logits of the classes are those of :func:`blend_logits`.

    Args:
        outputs: What the model computes at the working size.
        compute: Computes the same at a factor on the working size.
        object_classes: The classes that consist of objects.
        trained_side: As for :func:`choose_scale`.
        enlarged_biases: As for :func:`blend_logits`.
        temperature: As for :func:`find_objects`.
    """

    def measure() -> float:
        nonlocal outputs
        label = most_probable(outputs.logits)
        regions = number_regions(label, outputs, object_classes, temperature)
        outputs = replace(outputs, regions=regions)
        return choose_scale(np.bincount(regions.numbers.ravel())[1:], trained_side)

    logits = outputs.logits
    for scale in better_scales(measure):
        outputs = compute(scale)
        blend_logits(logits, outputs.logits, scale, enlarged_biases)
    return outputs


def blend_logits(
    at_working_size: NDArray[np.float32],
    at_scale: NDArray[np.float32],
    scale: float,
    enlarged_biases: NDArray[np.float32],
) -> None:
    """Turn the class logits ``(K, H, W)`` at a scale into those that count.

    They become the mean of both, unless the scale is a factor of two or more. Then those of an
    enlarged image get ``enlarged_biases`` ``(K,)``, because its blurred outlines are a little too
    far outside: class weights prefer rare classes, such as objects, where the network is unsure.
    """
    if abs(math.log2(scale)) < MIN_FAR_OCTAVES:
        at_scale += at_working_size
        at_scale *= np.float32(0.5)
    if scale > 1:
        at_scale += enlarged_biases[:, None, None]


def better_scales(measure: Callable[[], float]) -> Iterator[float]:
    """Yield the scales at which the image is computed once more, one after the other.

    Args:
        measure: Chooses a scale from the objects as they are found with the latest outputs.
    """
    scales = [1.0]
    while len(scales) < MAX_PASSES:
        better = measure()
        # A former scale would lead to the same ones again.
        if better in scales:
            return
        scales.append(better)
        yield better


def choose_scale(areas: NDArray[Any], trained_side: float) -> float:
    """Return the factor on the working size at which objects are as large as in training.

    Args:
        areas: The pixels of each object that was found, ``(n,)``.
        trained_side: Side of a typical object in the training images, in pixels.

    Returns:
        The factor, 1 if there are no objects.

    >>> import numpy as np
    >>> choose_scale(np.array([400, 420, 390]), 10.0)
    0.5
    """
    if not areas.size:
        return 1.0
    octaves = math.log2(trained_side / typical_side(areas))
    steps = round(STEPS_PER_OCTAVE * min(max(octaves, MIN_OCTAVES), MAX_OCTAVES))
    return float(2 ** (steps / STEPS_PER_OCTAVE))


class ObjectMeter:
    """Measures the objects of an image, one tile at a time.

    Args:
        count: The number of objects.
        num_classes: The number of classes.
        shape: (H, W) of the image.
    """

    def __init__(self, count: int, num_classes: int, shape: tuple[int, ...]) -> None:
        self._shape, self._size = shape, count + 1
        self._pixels = np.zeros((num_classes, self._size), np.int64)
        self._sums = np.zeros((3, self._size))
        # Top, left; then bottom and right with a minus.
        self._least = np.full((4, self._size), max(shape), np.int64)

    def add(
        self, numbers: ObjectMap, label: Label, confidence: NDArray[np.float32], place: Tile
    ) -> None:
        """Add a tile: numbers, class ids and probability of the predicted class, all ``(h, w)``."""
        rows, columns = np.nonzero(numbers)
        own, classes = numbers[rows, columns].astype(np.int64), label[rows, columns].astype(np.intp)
        pairs, pixels = np.unique(classes * self._size + own, return_counts=True)
        self._pixels.ravel()[pairs] += pixels
        values = (columns + place[1].start, rows + place[0].start, confidence[rows, columns])
        for sums, value in zip(self._sums, values, strict=True):
            sums += np.bincount(own, value, self._size)
        x, y = values[:2]
        for least, value in zip(self._least, (y, x, -y, -x), strict=True):
            np.minimum.at(least, own, value)

    def measure(self) -> ObjectTable:
        """Return the table of all objects."""
        areas = self._pixels.sum(0)[1:]
        means = self._sums[:, 1:] / np.maximum(areas, 1)
        top, left, bottom, right = (self._least * np.array([[1], [1], [-1], [-1]]))[:, 1:]
        height, width = self._shape
        at_edge = (top == 0) | (left == 0) | (bottom == height - 1) | (right == width - 1)
        return ObjectTable(
            self._pixels[:, 1:].argmax(0),
            areas,
            means[:2].T,
            np.stack([left, top, right - left + 1, bottom - top + 1], axis=1),
            means[2],
            at_edge,
        )


def map_path(out: Path, stem: str) -> Path:
    """Return where the map of an image's objects goes."""
    return out / _FOLDER / f"{stem}.tif"


def table_path(out: Path, stem: str) -> Path:
    """Return where the table of an image's objects goes."""
    return out / _FOLDER / f"{stem}.csv"


def list_object_files(out: Path, stem: str) -> list[tuple[Path, Recognizer]]:
    """List the files of an image's objects, with what recognises them."""
    is_own = is_own_csv(*OBJECTS_HEADER)
    return [(map_path(out, stem), is_own_tiff), (table_path(out, stem), is_own)]


def number_type(count: int) -> type[np.uint16] | type[np.uint32]:
    """Return the data type of a map with this number of objects."""
    return np.uint16 if count <= _MAX_SMALL else np.uint32


def write_object_map(
    path: Path,
    tiles: Iterator[NDArray[Any]] | ObjectMap,
    shape: tuple[int, int],
    count: int,
    place: GeoReference | None,
) -> None:
    """Write the numbers of objects as a TIFF: uint16, or uint32 for more than 65,535 objects.

    Args:
        path: The file.
        tiles: The map ``(H, W)``, or its tiles of ``MAP_TILE_SIDE``, row by row, for a BigTIFF.
        shape: (H, W).
        count: The number of objects.
        place: Where the image lies on a map.
    """
    import tifffile

    kind = number_type(count)
    options: dict[str, Any] = {}
    content: Any = tiles
    if isinstance(tiles, np.ndarray):
        content = tiles.astype(kind)
    else:
        content = (tile.astype(kind) for tile in tiles)
        options = {"tile": (MAP_TILE_SIDE, MAP_TILE_SIDE), "bigtiff": True}
    with replacing(path, is_own_tiff) as draft:
        tifffile.imwrite(
            draft,
            content,
            shape=shape,
            dtype=kind,
            metadata=None,
            software=_SOFTWARE,
            photometric="minisblack",
            compression="deflate",
            compressionargs={"level": 1},
            extratags=place.tags if place else (),
            **options,
        )


def write_object_table(
    path: Path, name: str, table: ObjectTable, classes: ClassTable, place: GeoReference | None
) -> None:
    """Write the table of an image's objects; ``name`` is that of the image.

    ``area`` is in square map units, and empty if the image is not georeferenced.
    """
    with (
        replacing(path, is_own_csv(*OBJECTS_HEADER)) as draft,
        draft.open("w", encoding="utf-8", newline="") as file,
    ):
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(OBJECTS_HEADER)
        for row in table.rows(classes):
            area = row["pixels"] * place.pixel_area if place else ""
            measured = (*row["center"], *row["bbox"], row["confidence"], int(row["at_edge"]), area)
            cells = (to_cell(name), row["id"], to_cell(row["class"]), row["pixels"])
            rows.writerow((*cells, *measured))


def read_object_rows(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a table that :func:`write_object_table` wrote: names and numbers.

    Raises:
        DataError: It cannot be read, or is another table.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            if tuple(rows.fieldnames or ()) != OBJECTS_HEADER:
                raise ValueError("it has other columns")
            yield from map(_check_row, rows)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(
            f"'{path}' is not a table of objects ({error}); delete it and label the image again"
        ) from error


def _check_row(row: dict[str, str]) -> dict[str, str]:
    """Return a row with its texts made safe, or raise if a cell is missing or not finite."""
    if row.keys() != set(OBJECTS_HEADER) or None in row.values():
        raise ValueError("a row has a different number of cells")
    for name in OBJECTS_HEADER:
        if name in _TEXTS:
            row[name] = to_cell(from_cell(row[name]))
        elif row[name] and not math.isfinite(float(row[name])):
            raise ValueError(f"{row[name]!r} is not finite")
    return row


def read_object_map(path: Path) -> NDArray[Any]:
    """Read a map of objects ``(H, W)`` that :func:`write_object_map` wrote.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return read_mask(path)
    except DataError as error:
        raise DataError(f"{error}; or delete it and label the image again") from error


def count_objects(table: Path) -> Counter[str]:
    """Count the objects of an image by the name of their class, from its table."""
    return Counter(row["class"] for row in read_object_rows(table))


def write_objects_csv(target: Path, tables: Sequence[Path]) -> None:
    """Join the tables of all images to one, in their order."""
    with (
        replacing(target, is_own_csv(*OBJECTS_HEADER)) as draft,
        draft.open("w", encoding="utf-8", newline="") as file,
    ):
        rows = csv.DictWriter(file, OBJECTS_HEADER, lineterminator="\n")
        rows.writeheader()
        for table in tables:
            rows.writerows(read_object_rows(table))
