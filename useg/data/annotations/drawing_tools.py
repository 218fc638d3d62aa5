"""JSON of LabelMe, Supervisely and VIA -> the shapes on each image.

Later shapes lie over earlier ones. What the formats leave open is decided so:

- LabelMe, also as X-AnyLabeling, ISAT and CVAT write it: lines and points have no width in the
  file; they get those of LabelMe's own converter, 10 pixels and a radius of 5. A rectangle has two
  opposite corners or all four.
- Supervisely: corners are whole pixels, which belong to the shape. A line is one pixel wide, a
  point covers nothing.
- VIA, versions 1 to 3: the class is the attribute of a region that most regions have. Regions
  without attributes are of one class, ``object``. Points cover nothing, a polyline is one pixel
  wide.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

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
    encode_rle,
    pack_ellipse,
    pack_outline,
    pack_points,
    pack_rings,
)
from useg.errors import DataError, format_count
from useg.images.files import decode_coverage, decode_size

LABELME_LINE_WIDTH_PIXELS = 10.0
LABELME_POINT_RADIUS_PIXELS = 5.0
THIN_LINE_WIDTH_PIXELS = 1.0

# The class of regions that have none.
UNNAMED = "object"


def read_embedded_mask(
    content: bytes, place: tuple[int, int], entry: AnnotatedImage, reading: Reading
) -> RunLengths | None:
    """Read an image in an annotation file as a mask; None if the annotated image is not there.

    Args:
        content: The image, such as a PNG; see :func:`useg.images.files.decode_coverage`.
        place: The column and row of the annotated image at which it lies.
        entry: The annotated image.
        reading: Knows its size, which the mask must not exceed.

    Raises:
        DataError: The mask is damaged, or larger than the image.
    """
    name, size = f"{entry.file}: a mask", reading.size(entry)
    if size == (0, 0):
        return None
    width, height = decode_size(content, name)
    if width > size[0] + 1 or height > size[1] + 1:
        raise DataError(
            f"'{entry.file}' ({entry.image}) has a mask of {width}x{height} pixels, but its image "
            f"has {size[0]}x{size[1]}; export it again"
        )
    return encode_rle(decode_coverage(content, name), *place)


# LabelMe


def is_labelme(content: Any) -> bool:
    """Return whether JSON content has LabelMe's format."""
    return isinstance(content, dict) and content.keys() >= {"shapes", "imagePath"}


def read_labelme(path: Path, content: dict[str, Any], reading: Reading) -> Annotations:
    """Read the content of a LabelMe file, which annotates one image.

    Raises:
        DataError: The content does not fit the format.
    """
    size = parse_declared_size(content.get("imageWidth"), content.get("imageHeight"))
    name = str(content["imagePath"])
    # An image may have been renamed together with its annotation file.
    entry = AnnotatedImage(path, name, Drawing((), size), others=(path.stem,))
    shapes = []
    for shape in content["shapes"]:
        with reading.passing_over(path, "LabelMe", name):
            shapes.append(_read_labelme_shape(shape, entry, reading))
    drawing = Drawing(tuple(shape for shape in shapes if not shape.is_empty), size)
    return Annotations("labelme", (AnnotatedImage(path, name, drawing, others=entry.others),))


def _read_labelme_shape(shape: dict[str, Any], entry: AnnotatedImage, reading: Reading) -> Shape:
    name, kind = normalize_class_name(shape["label"]), shape.get("shape_type") or "polygon"
    points: Points = [(float(x), float(y)) for x, y in shape["points"]]
    if not all(math.isfinite(value) for point in points for value in point):
        raise DataError(
            f"'{entry.file}' has a shape with a coordinate that is NaN or infinite; "
            "draw it again, or remove it"
        )
    if kind == "mask":
        content = base64.b64decode(shape["mask"], validate=True)
        place = round(points[0][0]), round(points[0][1])
        return Shape(name, runs=read_embedded_mask(content, place, entry, reading))
    return Shape(name, tuple(_labelme_outlines(str(kind), points, f"'{entry.file}'")))


def _labelme_outlines(kind: str, points: Points, source: str) -> Outlines:
    if kind == "rectangle" and len(points) == 2:
        (x0, y0), (x1, y1) = points
        return [pack_outline(box_outline(x0, y0, x1, y1), source)]
    if kind in ("polygon", "rectangle", "rotation", "oriented_rectangle", "quadrilateral"):
        return [pack_outline(points, source)]
    if kind == "circle":
        center, edge = points
        radius = math.dist(center, edge)
        return [pack_ellipse((*center, radius, radius), source)]
    if kind in ("line", "linestrip"):
        return [Line(pack_points(points, source), LABELME_LINE_WIDTH_PIXELS)]
    if kind in ("point", "points"):
        diameter = 2 * LABELME_POINT_RADIUS_PIXELS
        return [Line(pack_points([point], source), diameter) for point in points]
    raise ValueError(f"shape_type is {kind[:40]!r}")


# Supervisely


def is_supervisely(content: Any) -> bool:
    """Return whether JSON content is an annotation of Supervisely, or its ``meta.json``."""
    if not isinstance(content, dict):
        return False
    return _is_supervisely_meta(content) or (
        isinstance(content.get("objects"), list) and isinstance(content.get("size"), dict)
    )


def _is_supervisely_meta(content: dict[str, Any]) -> bool:
    classes = content.get("classes")
    return (
        isinstance(classes, list)
        and bool(classes)
        and all(isinstance(each, dict) and {"title", "shape"} <= each.keys() for each in classes)
    )


def read_supervisely(path: Path, content: dict[str, Any], reading: Reading) -> Annotations:
    """Read the content of ``ann/a.jpg.json``, which annotates one image, or of ``meta.json``.

    Raises:
        DataError: The content does not fit the format.
    """
    if _is_supervisely_meta(content):
        classes = [(each["title"], each.get("color")) for each in content["classes"]]
        names = tuple(normalize_class_name(title) for title, _ in classes)
        colors = tuple(parse_color(color) for _, color in classes)
        return Annotations("supervisely", (), names, colors)
    size = parse_declared_size(content["size"].get("width"), content["size"].get("height"))
    # Older exports call the file a.json.
    entry = AnnotatedImage(path, path.stem, Drawing((), size), others=(path.stem,))
    shapes, skipped = [], Counter[str]()
    for drawn in content["objects"]:
        with reading.passing_over(path, "Supervisely", entry.image):
            kind = str(drawn["geometryType"])
            if kind in _SUPERVISELY_OUTLINES or kind in ("bitmap", "alpha_mask"):
                shapes.append(_read_supervisely_shape(kind, drawn, entry, reading))
            else:
                skipped[kind] += 1
    for kind, count in skipped.items():
        reading.pass_over(
            path,
            f"'{path}' has {format_count(count, 'object')} of the kind {kind[:40]!r}, which covers "
            "no pixels; draw a polygon or mask, or ignore this",
        )
    drawing = Drawing(tuple(shape for shape in shapes if not shape.is_empty), size)
    return Annotations(
        "supervisely", (AnnotatedImage(path, entry.image, drawing, others=entry.others),)
    )


def _read_supervisely_shape(
    kind: str, drawn: dict[str, Any], entry: AnnotatedImage, reading: Reading
) -> Shape:
    name = normalize_class_name(drawn["classTitle"])
    if kind in ("bitmap", "alpha_mask"):
        bitmap = drawn["bitmap"]
        left, top = (int(number) for number in bitmap["origin"])
        content = _inflate(base64.b64decode(bitmap["data"], validate=True))
        return Shape(name, runs=read_embedded_mask(content, (left, top), entry, reading))
    source = f"'{entry.file}'"
    return Shape(name, tuple(_SUPERVISELY_OUTLINES[kind](drawn["points"], source)))


def _inflate(content: bytes) -> bytes:
    """Decompress a PNG, which zlib can hardly make smaller again."""
    limit = 16 * len(content) + 65_536
    inflated = zlib.decompressobj().decompress(content, limit)
    if len(inflated) >= limit:
        raise ValueError("a bitmap is compressed more than a PNG can be")
    return inflated


def _supervisely_polygon(points: Mapping[str, Any], source: str) -> Outlines:
    outer = [(x + 0.5, y + 0.5) for x, y in points["exterior"]]
    holes = [[(x + 0.5, y + 0.5) for x, y in ring] for ring in points.get("interior") or ()]
    border = Line(pack_points([*outer, *outer[:1]], source), THIN_LINE_WIDTH_PIXELS)
    return [pack_rings([outer, *holes], source), border]


def _supervisely_rectangle(points: Mapping[str, Any], source: str) -> Outlines:
    (x0, y0), (x1, y1) = points["exterior"]
    corners = min(x0, x1), min(y0, y1), max(x0, x1) + 1, max(y0, y1) + 1
    return [pack_outline(box_outline(*corners), source)]


def _supervisely_line(points: Mapping[str, Any], source: str) -> Outlines:
    line = [(x + 0.5, y + 0.5) for x, y in points["exterior"]]
    return [Line(pack_points(line, source), THIN_LINE_WIDTH_PIXELS)]


_SUPERVISELY_OUTLINES: dict[str, Callable[[Mapping[str, Any], str], Outlines]] = {
    "polygon": _supervisely_polygon,
    "rectangle": _supervisely_rectangle,
    "line": _supervisely_line,
    "polyline": _supervisely_line,
}


# VIA

# Names that people give to the attribute that holds the class, if several attributes are common.
_CLASS_ATTRIBUTES = ("class", "label", "name", "type", "category", "object")
# VIA 3 stores the kind of a shape as a number.
_VIA3_SHAPES = {
    2: "rect",
    3: "circle",
    4: "ellipse",
    5: "polyline",
    6: "polyline",
    7: "polygon",
    8: "rect",
    9: "circle",
}


def is_via(content: Any) -> bool:
    """Return whether JSON content has a format of VIA: a project or its annotations."""
    if not isinstance(content, dict) or not content:
        return False
    if "_via_img_metadata" in content or _is_via3(content):
        return True
    return all(
        isinstance(image, dict) and {"filename", "regions"} <= image.keys()
        for image in content.values()
    )


def _is_via3(content: dict[str, Any]) -> bool:
    return content.keys() >= {"project", "file", "metadata", "view"}


def read_via(path: Path, content: dict[str, Any], reading: Reading) -> Annotations:
    """Read the content of a file of VIA 1, 2 or 3.

    Raises:
        DataError: The content does not fit the format.
    """
    if _is_via3(content):
        return _read_via_images(path, _list_via3(content), reading)
    images = content.get("_via_img_metadata", content)
    listed = []
    for image in images.values():
        with reading.passing_over(path, "VIA"):
            regions = image["regions"]
            regions = list(regions.values()) if isinstance(regions, dict) else regions
            listed.append(
                (
                    str(image["filename"]),
                    [
                        (region["shape_attributes"], region["region_attributes"])
                        for region in regions
                    ],
                )
            )
    return _read_via_images(path, listed, reading)


def is_via_csv(path: Path) -> bool:
    """Return whether a CSV file is VIA's."""
    try:
        with path.open("rb") as file:
            return b"region_shape_attributes" in file.readline(1000)
    except OSError:
        return False


def read_via_csv(path: Path, content: bytes, reading: Reading) -> Annotations:
    """Read VIA's annotations as CSV: one line per region.

    Raises:
        DataError: The content does not fit the format.
    """
    rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig").lstrip("#")))
    listed: dict[str, list[tuple[Any, Any]]] = {}
    for row in rows:
        regions = listed.setdefault(row["filename"], [])
        with reading.passing_over(path, "VIA"):
            shape = json.loads(row["region_shape_attributes"] or "{}")
            if shape:
                regions.append((shape, json.loads(row["region_attributes"] or "{}")))
    return _read_via_images(path, listed.items(), reading)


def _list_via3(content: dict[str, Any]) -> list[tuple[str, list[tuple[Any, Any]]]]:
    """Return the regions of each image of VIA 3, in the form of VIA 2."""
    described = content.get("attribute") or {}
    regions: dict[str, list[tuple[Any, Any]]] = {view: [] for view in content["view"]}
    for region in content["metadata"].values():
        kind, *numbers = region.get("xy") or (0,)
        attributes = {}
        for key, value in (region.get("av") or {}).items():
            about = described.get(key) or {}
            attributes[about.get("aname", key)] = (about.get("options") or {}).get(value, value)
        shape = _via3_shape(_VIA3_SHAPES.get(kind, "point"), numbers)
        regions[str(region["vid"])].append((shape, attributes))
    files = content["file"]
    names = {
        view: str(files[str(about["fid_list"][0])]["fname"])
        for view, about in content["view"].items()
    }
    return [(names[view], found) for view, found in regions.items()]


def _via3_shape(kind: str, numbers: list[Any]) -> dict[str, Any]:
    keys = {
        "rect": ("x", "y", "width", "height"),
        "circle": ("cx", "cy", "r"),
        "ellipse": ("cx", "cy", "rx", "ry"),
    }
    if kind in keys:
        return {"name": kind, **dict(zip(keys[kind], numbers, strict=False))}
    return {"name": kind, "all_points_x": numbers[::2], "all_points_y": numbers[1::2]}


def _read_via_images(
    path: Path, images: Iterable[tuple[str, list[tuple[Any, Any]]]], reading: Reading
) -> Annotations:
    images = list(images)
    key = _choose_attribute(attributes for _, regions in images for _, attributes in regions)
    entries, num_points = [], 0
    for name, regions in images:
        shapes = []
        for shape, attributes in regions:
            with reading.passing_over(path, "VIA", name):
                if shape["name"] == "point":
                    num_points += 1
                    continue
                outlines = _VIA_OUTLINES[shape["name"]](shape, f"'{path}' ({name})")
                shapes.append(Shape(_via_class(attributes, key), tuple(outlines)))
        entries.append(AnnotatedImage(path, name, Drawing(tuple(shapes), (0, 0))))
    if num_points:
        reading.pass_over(
            path,
            f"'{path}' has {format_count(num_points, 'point')}, which cover no pixels; "
            "draw what they mark as polygons, or ignore this",
        )
    return Annotations("via", tuple(entries))


def _choose_attribute(regions: Iterable[Any]) -> str:
    """Return the attribute that holds the class: the one that most regions have a value for."""
    counts = Counter(
        key
        for attributes in regions
        if isinstance(attributes, dict)
        for key, value in attributes.items()
        if value not in ("", {}, None)
    )
    ranks = {name: -rank for rank, name in enumerate(_CLASS_ATTRIBUTES)}
    return max(
        counts, key=lambda key: (counts[key], ranks.get(str(key).casefold(), -99)), default=""
    )


def _via_class(attributes: Any, key: str) -> str:
    value = attributes.get(key) if isinstance(attributes, dict) else None
    if isinstance(value, dict):
        # A checkbox: the options that are ticked.
        value = "+".join(sorted(str(option) for option, ticked in value.items() if ticked))
    return normalize_class_name(value if value not in (None, "") else UNNAMED)


def _via_points(shape: Mapping[str, Any]) -> list[tuple[float, float]]:
    pairs = zip(shape["all_points_x"], shape["all_points_y"], strict=True)
    return [(float(x), float(y)) for x, y in pairs]


def _via_rectangle(shape: Mapping[str, Any], source: str) -> Outlines:
    x, y, width, height = (float(shape[key]) for key in ("x", "y", "width", "height"))
    return [pack_outline(box_outline(x, y, x + width, y + height), source)]


def _via_circle(shape: Mapping[str, Any], source: str) -> Outlines:
    return [pack_ellipse((shape["cx"], shape["cy"], shape["r"], shape["r"]), source)]


def _via_ellipse(shape: Mapping[str, Any], source: str) -> Outlines:
    numbers = (shape["cx"], shape["cy"], shape["rx"], shape["ry"])
    return [pack_ellipse(numbers, source, math.degrees(float(shape.get("theta", 0))))]


_VIA_OUTLINES: dict[str, Callable[[Mapping[str, Any], str], Outlines]] = {
    "polygon": lambda shape, source: [pack_outline(_via_points(shape), source)],
    "polyline": lambda shape, source: [
        Line(pack_points(_via_points(shape), source), THIN_LINE_WIDTH_PIXELS)
    ],
    "rect": _via_rectangle,
    "circle": _via_circle,
    "ellipse": _via_ellipse,
}
