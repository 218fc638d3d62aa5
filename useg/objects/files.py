"""The objects of an image -> files: a map of their numbers, a table as CSV, polygons, COCO.

``objects.csv`` of a whole job is made of the tables of the images.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import ClassTable
from useg.errors import DataError
from useg.files import replacing
from useg.images.files import read_mask
from useg.objects.separation import ObjectMap
from useg.objects.table import ObjectTable
from useg.ownership import OBJECTS_HEADER, Recognizer, is_own_csv, is_own_tiff
from useg.parsing import from_cell, to_cell

if TYPE_CHECKING:
    from useg.images.tiff import GeoReference

_FOLDER = "objects"

# Tiles of a large map of objects, and the program that wrote it.
MAP_TILE_SIDE = 512
_SOFTWARE = "useg"
# The columns of a table that are no numbers.
_TEXTS = ("image", "class")

_MAX_SMALL = np.iinfo(np.uint16).max


def map_path(out: Path, stem: str) -> Path:
    """Return where the map of an image's objects goes."""
    return out / _FOLDER / f"{stem}.tif"


def table_path(out: Path, stem: str) -> Path:
    """Return where the table of an image's objects goes."""
    return out / _FOLDER / f"{stem}.csv"


def list_object_files(out: Path, stem: str) -> list[tuple[Path, Recognizer]]:
    """List the files of an image's objects, with what recognizes them."""
    is_own = is_own_csv(*OBJECTS_HEADER)
    return [(map_path(out, stem), is_own_tiff), (table_path(out, stem), is_own)]


def number_type(count: int) -> type[np.uint16] | type[np.uint32]:
    """Return the number type of a map of so many objects."""
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

    ``area`` is in square units of the map, and empty if the image lies on none.
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
            for row in rows:
                if row.keys() != set(OBJECTS_HEADER) or None in row.values():
                    raise ValueError("a row has another number of cells")
                for name in OBJECTS_HEADER:
                    if name in _TEXTS:
                        row[name] = to_cell(from_cell(row[name]))
                    elif row[name] and not math.isfinite(float(row[name])):
                        raise ValueError(f"{row[name]!r} is not finite")
                yield row
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(
            f"'{path}' is not a table of objects ({error}); delete it and label the image again"
        ) from error


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
