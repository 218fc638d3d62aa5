"""CVAT's XML ("CVAT for images 1.1") -> drawings: polygons, boxes, ellipses, masks and polylines, by ``z_order`` and then as listed.

A polyline has no width in the file: it is painted one pixel wide. Points, tags and skeletons cover nothing.
"""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from useg.classes import Color
from useg.data.drawn.entries import Annotations, Entry, class_name, clear_format, declared_size
from useg.data.shapes import Drawing, Points, Runs, Shape, box, ellipse, line, ring
from useg.errors import UsageError

LINE_WIDTH = 1.0


def is_cvat(root: Element) -> bool:
    """Tell CVAT's XML from other files with annotations."""
    return root.tag == "annotations" and (root.find("image") is not None or root.find("track") is not None)


def read_cvat(path: Path, root: Element) -> Annotations:
    """Turn a CVAT file's content into entries.

    Raises:
        UsageError: the file does not fit the format, or is CVAT's format for video.
    """
    with clear_format(path, "CVAT for images"):
        if root.find("track") is not None:
            raise UsageError(f"'{path}' is CVAT's format for video, which is not read; export the task as 'CVAT for images 1.1'")
        entries = tuple(_read_image(path, image) for image in root.iter("image"))
        labels = [label for listed in root.iter("labels") for label in listed if label.find("parent") is None]
        colors = {class_name(label.findtext("name")): _color(label.findtext("color") or "") for label in labels}
        colors |= {shape.name: None for entry in entries for shape in entry.drawing.shapes if shape.name not in colors}
        return Annotations("cvat", entries, tuple(colors), tuple(colors.values()))


def _read_image(path: Path, image: Element) -> Entry:
    size = declared_size(image.attrib["width"], image.attrib["height"])
    drawn = sorted((child for child in image if child.tag in _OUTLINES or child.tag == "mask"), key=lambda child: int(child.get("z_order", 0)))
    shapes = tuple(_read_shape(child, size, f"'{path}' ({image.attrib['name']})") for child in drawn)
    return Entry(path, image.attrib["name"], Drawing(shapes, size), image.get("subset", "").casefold())


def _read_shape(drawn: Element, size: tuple[int, int], source: str) -> Shape:
    name = class_name(drawn.attrib["label"])
    if drawn.tag == "mask":
        return Shape(name, runs=_read_runs(drawn, size, source))
    return Shape(name, tuple(ring(outline, source) for outline in _OUTLINES[drawn.tag](drawn)))


def _read_runs(mask: Element, size: tuple[int, int], source: str) -> Runs:
    left, top, width, height = (int(mask.attrib[key]) for key in ("left", "top", "width", "height"))
    if width > size[0] or height > size[1]:
        raise UsageError(f"{source} has a mask of {width}x{height} pixels, but its picture has {size[0]}x{size[1]}; export it again")
    lengths = [int(length) for length in mask.attrib["rle"].split(",")]
    if min(width, height, *lengths) < 0 or sum(lengths) != width * height:
        raise UsageError(f"{source} has a mask of {width}x{height} pixels whose runs cover {sum(lengths)}; export it again")
    return Runs(np.array(lengths, np.uint32).tobytes(), width, height, left, top)


def _numbers(drawn: Element, *keys: str) -> list[float]:
    values = [float(drawn.attrib[key]) for key in keys]
    if not all(map(math.isfinite, values)):
        raise ValueError(f"a <{drawn.tag}> has a coordinate that is no finite number")
    return values


def _points(drawn: Element) -> Points:
    pairs = [point.split(",") for point in drawn.attrib["points"].split(";")]
    points = [(float(x), float(y)) for x, y in pairs]
    if not all(math.isfinite(value) for point in points for value in point):
        raise ValueError(f"a <{drawn.tag}> has a coordinate that is no finite number")
    return points


def _turned(points: Points, degrees: float) -> Points:
    """Turn an outline clockwise (y points down) about the middle of its bounds."""
    x, y = ((min(side) + max(side)) / 2 for side in zip(*points, strict=True))
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [(x + (px - x) * cos - (py - y) * sin, y + (px - x) * sin + (py - y) * cos) for px, py in points]


def _box(drawn: Element) -> list[Points]:
    x0, y0, x1, y1 = _numbers(drawn, "xtl", "ytl", "xbr", "ybr")
    return [_turned(box(x0, y0, x1, y1), float(drawn.get("rotation", 0)))]


def _ellipse(drawn: Element) -> list[Points]:
    x, y, across, down = _numbers(drawn, "cx", "cy", "rx", "ry")
    return [_turned(ellipse(x, y, across, down), float(drawn.get("rotation", 0)))]


def _color(text: str) -> Color | None:
    """Read ``#rrggbb``."""
    try:
        red, green, blue = bytes.fromhex(text.removeprefix("#"))
    except ValueError:
        return None
    return red, green, blue


_OUTLINES = {
    "polygon": lambda drawn: [_points(drawn)],
    "polyline": lambda drawn: line(_points(drawn), LINE_WIDTH),
    "box": _box,
    "ellipse": _ellipse,
}
