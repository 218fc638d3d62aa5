"""Annotation files of CVAT ("CVAT for images 1.1") -> the shapes on each image.

Shapes are painted by ``z_order`` and then in the file's order. A polyline is one pixel wide, a
cuboid is its two faces and what lies between them. Points, skeletons and tags cover nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from useg.data.annotations.formats import (
    AnnotatedImage,
    Annotations,
    Reading,
    normalize_class_name,
    parse_color,
    parse_declared_size,
)
from useg.data.annotations.rasterize import (
    Drawing,
    Line,
    Outlines,
    Points,
    RunLengths,
    Shape,
    box_outline,
    pack_ellipse,
    pack_outline,
    pack_points,
    rotate_outline,
)
from useg.errors import DataError

LINE_WIDTH_PIXELS = 1.0

# They cover no pixels.
_WITHOUT_AREA = ("points", "skeleton")


def is_cvat(root: Element) -> bool:
    """Return whether XML content has one of CVAT's formats."""
    return root.tag == "annotations" and (
        root.find("image") is not None or root.find("track") is not None
    )


def read_cvat(path: Path, root: Element, reading: Reading) -> Annotations:
    """Read the content of a file in the format "CVAT for images".

    Raises:
        DataError: The content has CVAT's format for video.
    """
    if root.find("image") is None or root.find("track") is not None:
        raise DataError(
            f"'{path}' has the format 'CVAT for video', which useg does not read; "
            "export the task as 'CVAT for images 1.1'"
        )
    entries = []
    for image in root.iter("image"):
        with reading.passing_over(path, "CVAT for images"):
            entries.append(_read_image(path, image, reading))
    skipped = Counter(shape.tag for kind in _WITHOUT_AREA for shape in root.iter(kind))
    if skipped:
        counts = " and ".join(f"{count} <{kind}>" for kind, count in skipped.items())
        reading.pass_over(
            path,
            f"'{path}' has {counts}, which cover no pixels; "
            "draw what they mark as polygons or masks, or ignore this",
        )
    colors = {
        normalize_class_name(label.findtext("name")): parse_color(label.findtext("color"))
        for listed in root.iter("labels")
        for label in listed
        if label.find("parent") is None and label.findtext("name")
    }
    used = (shape.name for entry in entries for shape in entry.drawing.shapes)
    colors |= {name: None for name in used if name not in colors}
    return Annotations("cvat", tuple(entries), tuple(colors), tuple(colors.values()))


def _read_image(path: Path, image: Element, reading: Reading) -> AnnotatedImage:
    size = parse_declared_size(image.attrib["width"], image.attrib["height"])
    name, split = image.attrib["name"], image.get("subset", "").casefold()
    entry = AnnotatedImage(path, name, Drawing((), size), split)
    drawn: list[tuple[int, Shape]] = []
    for child in image:
        if child.tag not in _OUTLINES and child.tag != "mask":
            continue
        with reading.passing_over(path, "CVAT for images", name):
            drawn.append((int(child.get("z_order", 0)), _read_shape(child, entry, reading)))
    shapes = (shape for _, shape in sorted(drawn, key=lambda item: item[0]) if not shape.is_empty)
    return AnnotatedImage(path, name, Drawing(tuple(shapes), size), split)


def _read_shape(drawn: Element, entry: AnnotatedImage, reading: Reading) -> Shape:
    name, source = normalize_class_name(drawn.attrib["label"]), f"'{entry.file}' ({entry.image})"
    if drawn.tag == "mask":
        return Shape(name, runs=_read_rle(drawn, entry, reading))
    return Shape(name, tuple(_OUTLINES[drawn.tag](drawn, source)))


def _read_rle(mask: Element, entry: AnnotatedImage, reading: Reading) -> RunLengths | None:
    """Read run lengths; None if the image is not there, or has another size than declared."""
    left, top, width, height = (int(mask.attrib[key]) for key in ("left", "top", "width", "height"))
    size = reading.size(entry)
    if size != entry.drawing.size:
        return None
    if width > size[0] or height > size[1]:
        raise DataError(
            f"'{entry.file}' ({entry.image}) has a mask of {width}x{height} pixels, but its image "
            f"has {size[0]}x{size[1]}; export it again"
        )
    lengths = [int(length) for length in mask.attrib["rle"].split(",")]
    if min(width, height, *lengths) < 0 or sum(lengths) != width * height:
        raise DataError(
            f"'{entry.file}' ({entry.image}) has a mask of {width}x{height} pixels whose run "
            f"lengths add up to {sum(lengths)}; export it again"
        )
    return RunLengths(np.array(lengths, np.uint32).tobytes(), width, height, left, top)


def _numbers(drawn: Element, *keys: str) -> list[float]:
    values = [float(drawn.attrib[key]) for key in keys]
    if not all(map(math.isfinite, values)):
        raise ValueError(f"a <{drawn.tag}> has a coordinate that is NaN or infinite")
    return values


def _points(drawn: Element) -> Points:
    pairs = [point.split(",") for point in drawn.attrib["points"].split(";")]
    points = [(float(x), float(y)) for x, y in pairs]
    if not all(math.isfinite(value) for point in points for value in point):
        raise ValueError(f"a <{drawn.tag}> has a coordinate that is NaN or infinite")
    return points


def _polygon(drawn: Element, source: str) -> Outlines:
    return [pack_outline(_points(drawn), source)]


def _polyline(drawn: Element, source: str) -> Outlines:
    return [Line(pack_points(_points(drawn), source), LINE_WIDTH_PIXELS)]


def _box(drawn: Element, source: str) -> Outlines:
    x0, y0, x1, y1 = _numbers(drawn, "xtl", "ytl", "xbr", "ybr")
    (degrees,) = _numbers(drawn, "rotation") if "rotation" in drawn.attrib else (0.0,)
    center = (x0 + x1) / 2, (y0 + y1) / 2
    return [pack_outline(rotate_outline(box_outline(x0, y0, x1, y1), degrees, center), source)]


def _ellipse(drawn: Element, source: str) -> Outlines:
    return [
        pack_ellipse(_numbers(drawn, "cx", "cy", "rx", "ry"), source, drawn.get("rotation", 0.0))
    ]


def _cuboid(drawn: Element, source: str) -> Outlines:
    """Return the front, the back, and the four sides between them."""
    corners = ("tl", "tr", "br", "bl")
    front, back = (
        [
            (x, y)
            for corner in corners
            for x, y in [_numbers(drawn, f"x{corner}{k}", f"y{corner}{k}")]
        ]
        for k in (1, 2)
    )
    sides = [[front[k], front[(k + 1) % 4], back[(k + 1) % 4], back[k]] for k in range(4)]
    return [pack_outline(face, source) for face in (front, back, *sides)]


_OUTLINES: dict[str, Callable[[Element, str], Outlines]] = {
    "polygon": _polygon,
    "polyline": _polyline,
    "box": _box,
    "ellipse": _ellipse,
    "cuboid": _cuboid,
}
