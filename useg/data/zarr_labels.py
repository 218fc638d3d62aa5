"""A label map, tile by tile in any order -> an OME-Zarr with its classes' names and colours, each resolution half of the one before.

It is an image of its own, of axes y and x, that says ``image-label``, so that viewers of OME-Zarr show it as labels over the picture.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from useg.classes import IGNORE, ClassTable, Label
from useg.data.pyramids import SIDE, halved, level_sizes
from useg.data.zarrs import METADATA, Placement
from useg.errors import need

MARK = "useg"  # the attribute that says what made it
_ENCODING = {"0.4": {"name": "v2", "separator": "/"}, "0.5": {"name": "default", "separator": "/"}}  # of the names of chunks


class ZarrLabels:
    """A label map that is being written.

    Args:
        folder: empty.
        size: (width, height).
        table: whose names and colours it gets.
        placement: of the picture; it lies there too, and is of the same version.
    """

    def __init__(self, folder: Path, size: tuple[int, int], table: ClassTable, placement: Placement) -> None:
        self._table, self._placement = table, placement
        self._group = need("zarr", "zarr").open_group(folder, mode="a", zarr_format=2 if placement.version == "0.4" else 3)
        shapes = level_sizes((size[1], size[0]))
        names = {} if placement.version == "0.4" else {"dimension_names": ["y", "x"]}
        options: dict[str, Any] = {"dtype": "uint8", "chunks": (SIDE, SIDE), "fill_value": IGNORE, "chunk_key_encoding": _ENCODING[placement.version]}
        self._levels = [self._group.create_array(str(k), shape=shape, **options, **names) for k, shape in enumerate(shapes)]

    def write(self, row: int, column: int, label: Label, level: int = 0) -> None:
        """Write the tile in this row and column of tiles; at the lower and right edge it may be smaller than ``SIDE``."""
        top, left = row * SIDE, column * SIDE
        self._levels[level][top : top + label.shape[0], left : left + label.shape[1]] = label

    def finish(self, mark: str = "") -> None:
        """Make the smaller resolutions from the tiles, all of which are there now, and say what all of it is."""
        for level, (above, below) in enumerate(zip(self._levels[:-1], self._levels[1:], strict=True), 1):
            for row, column in np.ndindex(*(-(-length // SIDE) for length in below.shape)):
                top, left = 2 * SIDE * row, 2 * SIDE * column
                four = above[top : top + 2 * SIDE, left : left + 2 * SIDE]
                self.write(row, column, halved(np.pad(four, [(0, length % 2) for length in four.shape], "edge")), level)
        version, multiscales, labels = self._placement.version, [self._multiscale()], self._image_label()
        if version == "0.4":
            ome: dict[str, Any] = {"multiscales": [{"version": version, **multiscales[0]}], "image-label": {"version": version, **labels}}
        else:
            ome = {"ome": {"version": version, "multiscales": multiscales, "image-label": labels}}
        self._group.attrs.update({**ome, MARK: {"mark": mark}})

    def _multiscale(self) -> dict[str, Any]:
        """Say where each resolution is and what place in space its pixels have: the middle of those that they stand for."""
        place, datasets = self._placement, []
        for level in range(len(self._levels)):
            scale = [size * 2**level for size in place.scale]
            first = [start + size * (2**level - 1) / 2 for start, size in zip(place.translation, place.scale, strict=True)]
            steps = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": first}]
            datasets.append({"path": str(level), "coordinateTransformations": steps})
        return {"name": "labels", "axes": [dict(axis) for axis in place.axes], "datasets": datasets, "type": "most frequent class of four"}

    def _image_label(self) -> dict[str, Any]:
        colors = [{"label-value": k, "rgba": [*color, 255]} for k, color in enumerate(self._table.colors)]
        return {"colors": colors, "properties": [{"label-value": k, "name": name} for k, name in enumerate(self._table.names)]}


def mark_of(folder: Path) -> str | None:
    """Return the mark of a label map that :class:`ZarrLabels` finished, None for any other folder, or where there is none."""
    for name in METADATA:
        try:
            content = json.loads((folder / name).read_text("utf-8"))
            return str(content.get("attributes", content)[MARK]["mark"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None
