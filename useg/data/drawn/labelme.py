"""LabelMe's JSON, one file per picture -> drawings; later shapes lie over earlier ones.

Lines and points have no width in the file; they get those of LabelMe's own converter: 10 pixels, and a radius of 5.
"""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

import numpy as np

from useg.data.drawn.entries import Entry, class_name, clear_format, declared_size
from useg.data.images import decode_image
from useg.data.shapes import Drawing, Points, Shape, box, ellipse, encode_runs, line, ring
from useg.errors import UsageError

LINE_WIDTH = 10.0
POINT_RADIUS = 5.0


def is_labelme(content: Any) -> bool:
    """Tell LabelMe's JSON from other files."""
    return isinstance(content, dict) and content.keys() >= {"shapes", "imagePath"}


def read_labelme(path: Path, content: dict[str, Any]) -> Entry:
    """Turn a LabelMe file's content into its entry.

    Raises:
        UsageError: the file does not fit the format.
    """
    with clear_format(path, "LabelMe"):
        size = declared_size(content.get("imageWidth"), content.get("imageHeight"))
        return Entry(path, str(content["imagePath"]), Drawing(tuple(_read_shape(shape, path) for shape in content["shapes"]), size))


def _read_shape(shape: dict[str, Any], path: Path) -> Shape:
    name, kind = class_name(shape["label"]), shape.get("shape_type") or "polygon"
    points: Points = [(float(x), float(y)) for x, y in shape["points"]]
    if not all(math.isfinite(value) for point in points for value in point):
        raise UsageError(f"'{path}' has a shape with a coordinate that is no finite number; draw it again, or remove it")
    if kind == "mask":
        pixels = decode_image(base64.b64decode(shape["mask"], validate=True), f"{path}: a mask")
        return Shape(name, runs=encode_runs(np.any(pixels, axis=2), int(points[0][0]), int(points[0][1])))
    return Shape(name, tuple(ring(outline, f"'{path}'") for outline in _outlines(kind, points)))


def _outlines(kind: str, points: Points) -> list[Points]:
    if kind == "polygon":
        return [points]
    if kind == "rectangle":
        (x0, y0), (x1, y1) = points
        return [box(x0, y0, x1, y1)]
    if kind == "circle":
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        return [ellipse(x, y, radius, radius)]
    if kind in ("line", "linestrip"):
        return line(points, LINE_WIDTH)
    if kind in ("point", "points"):
        return [ellipse(x, y, POINT_RADIUS, POINT_RADIUS) for x, y in points]
    raise ValueError(f"shape_type is {kind!r}")
