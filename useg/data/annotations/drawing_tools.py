"""Annotation files of tools that draw shapes -> the shapes on each image.

Later shapes lie over earlier ones, in CVAT those of a higher ``z_order``. What the formats leave
open is decided so:

- LabelMe, also as X-AnyLabeling and dacl10k write it: lines and points have no width in the file;
  they get those of LabelMe's own converter, 10 pixels and a radius of 5. A rectangle has two
  opposite corners or all four.
- VIA, versions 1 to 3: the class is the attribute of a region that most regions have. Regions
  without attributes are of one class, ``object``.
- CVAT ("CVAT for images 1.1"): a cuboid is its two faces and what lies between them.
- Cityscapes' polygons, which IDD has too: every pixel is meant to be labelled, so what no polygon
  covers is ignored, as are the places that its own tools ignore everywhere. A ``cargroup`` is cars.
- ImageScope (Aperio's XML, as MoNuSeg has it): the class is the name of a layer, or ``object``. An
  ellipse has two corners of its box. What is cut out of a region is background.
- A polyline of VIA and CVAT is one pixel wide. Their points, skeletons and tags cover nothing.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from useg.data.annotations.formats import (
    AnnotatedImage,
    Annotations,
    Reading,
    normalize_class_name,
    parse_color,
    parse_declared_size,
    read_embedded_mask,
)
from useg.data.annotations.shapes import (
    BACKGROUND,
    IGNORE_NAME,
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
from useg.errors import DataError, format_count
from useg.parsing import open_file

LABELME_LINE_WIDTH_PIXELS = 10.0
LABELME_POINT_RADIUS_PIXELS = 5.0
THIN_LINE_WIDTH_PIXELS = 1.0

# The class of regions that have none.
UNNAMED = "object"


# Cityscapes' labels that are not classes.
_NO_CLASSES = ("unlabeled", "ego vehicle", "rectification border", "out of roi", "license plate")


# Cityscapes


def is_cityscapes(content: Any) -> bool:
    """Return whether JSON content has the format of Cityscapes' ``gtFine_polygons`` files."""
    return isinstance(content, dict) and content.keys() >= {"imgHeight", "imgWidth", "objects"}


def read_cityscapes(path: Path, content: dict[str, Any], reading: Reading) -> Annotations:
    """Read the polygons of one image: ``gtFine/.../a_gtFine_polygons.json``.

    Raises:
        DataError: The content does not fit the format.
    """
    stem = re.sub(r"_gt(Fine|Coarse)_polygons$", "", path.stem)
    image = (path.parent / f"{stem}_leftImg8bit").as_posix()
    shapes = []
    for entry in content["objects"]:
        with reading.skipping(path, "Cityscapes' polygons", image):
            if not entry.get("deleted"):
                shapes.append(_read_labelled_polygon(entry, f"'{path}'"))
    size = parse_declared_size(content["imgWidth"], content["imgHeight"])
    drawing = Drawing(tuple(shape for shape in shapes if not shape.is_empty), size)
    entries = (AnnotatedImage(path, image, drawing, others=(stem,)),)
    return Annotations("cityscapes polygons", entries, has_background=False)


def _read_labelled_polygon(entry: dict[str, Any], source: str) -> Shape:
    name = normalize_class_name(entry["label"])
    if name.endswith("group") and name not in ("group", "polegroup"):
        name = name.removesuffix("group")
    outline = pack_outline([(float(x), float(y)) for x, y in entry["polygon"]], source)
    return Shape(IGNORE_NAME if name in _NO_CLASSES else name, (outline,))


# LabelMe


def is_labelme(content: Any) -> bool:
    """Return whether JSON content has LabelMe's format, or that of dacl10k."""
    names = {"imagePath", "imageName"}
    return isinstance(content, dict) and "shapes" in content and bool(names & content.keys())


def read_labelme(path: Path, content: dict[str, Any], reading: Reading) -> Annotations:
    """Read the content of a LabelMe file, which annotates one image.

    Raises:
        DataError: The content does not fit the format.
    """
    size = parse_declared_size(content.get("imageWidth"), content.get("imageHeight"))
    name = str(content.get("imagePath", content.get("imageName")))
    # An image may have been renamed together with its annotation file.
    entry = AnnotatedImage(path, name, Drawing((), size), others=(path.stem,))
    shapes = []
    for shape in content["shapes"]:
        with reading.skipping(path, "LabelMe", name):
            shapes.append(_read_labelme_shape(shape, entry, reading))
    drawing = Drawing(tuple(shape for shape in shapes if not shape.is_empty), size)
    return Annotations("labelme", (AnnotatedImage(path, name, drawing, others=entry.others),))


def _read_labelme_shape(shape: dict[str, Any], entry: AnnotatedImage, reading: Reading) -> Shape:
    name = normalize_class_name(shape["label"])
    kind = shape.get("shape_type") or shape.get("shapeType") or "polygon"
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
        reading.check_count(path, len(content["view"]))
        return _read_via_images(path, _list_via3(content), reading)
    images = content.get("_via_img_metadata", content)
    reading.check_count(path, len(images))
    listed = []
    for image in images.values():
        with reading.skipping(path, "VIA"):
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
        with open_file(path) as file:
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
        reading.check_count(path, len(listed))
        with reading.skipping(path, "VIA"):
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
            with reading.skipping(path, "VIA", name):
                if shape["name"] == "point":
                    num_points += 1
                    continue
                outlines = _VIA_OUTLINES[shape["name"]](shape, f"'{path}' ({name})")
                shapes.append(Shape(_via_class(attributes, key), tuple(outlines)))
        entries.append(AnnotatedImage(path, name, Drawing(tuple(shapes), (0, 0))))
    if num_points:
        reading.skip(
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


# ImageScope


def is_imagescope(root: Element) -> bool:
    """Return whether XML content has the format of Aperio's ImageScope."""
    return root.tag == "Annotations" and root.find("Annotation/Regions") is not None


def read_imagescope(path: Path, root: Element, reading: Reading) -> Annotations:
    """Read the content of a file of ImageScope, which annotates the image of the same name."""
    shapes = []
    for layer in root.iter("Annotation"):
        name = normalize_class_name(layer.get("Name", "").strip() or _name_by_attribute(layer))
        for region in layer.iter("Region"):
            with reading.skipping(path, "ImageScope", path.stem):
                shapes.append(_read_region(name, region, f"'{path}'"))
    drawing = Drawing(tuple(shape for shape in shapes if not shape.is_empty), (0, 0))
    return Annotations("imagescope", (AnnotatedImage(path, path.stem, drawing),))


def _name_by_attribute(layer: Element) -> str:
    """Return the class of a layer without a name: its first attribute, as MoNuSAC has it."""
    attribute = layer.find("Attributes/Attribute")
    if attribute is None:
        return UNNAMED
    name, value = (attribute.get(key, "").strip() for key in ("Name", "Value"))
    return value or (name if name.casefold() != "description" else "") or UNNAMED


def _read_region(name: str, region: Element, source: str) -> Shape:
    points = [
        (float(vertex.attrib["X"]), float(vertex.attrib["Y"])) for vertex in region.iter("Vertex")
    ]
    if region.get("NegativeROA") == "1":
        name = BACKGROUND
    if region.get("Type") != "2":
        return Shape(name, (pack_outline(points, source),))
    (x0, y0), (x1, y1) = points
    numbers = ((x0 + x1) / 2, (y0 + y1) / 2, abs(x1 - x0) / 2, abs(y1 - y0) / 2)
    return Shape(name, (pack_ellipse(numbers, source),))


# CVAT

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
    reading.check_count(path, sum(1 for _ in root.iter("image")))
    for image in root.iter("image"):
        with reading.skipping(path, "CVAT for images"):
            entries.append(_read_image(path, image, reading))
    skipped = Counter(shape.tag for kind in _WITHOUT_AREA for shape in root.iter(kind))
    if skipped:
        counts = " and ".join(f"{count} <{kind}>" for kind, count in skipped.items())
        reading.skip(
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
        if child.tag not in _CVAT_OUTLINES and child.tag != "mask":
            continue
        with reading.skipping(path, "CVAT for images", name):
            drawn.append((int(child.get("z_order", 0)), _read_shape(child, entry, reading)))
    shapes = (shape for _, shape in sorted(drawn, key=lambda item: item[0]) if not shape.is_empty)
    return AnnotatedImage(path, name, Drawing(tuple(shapes), size), split)


def _read_shape(drawn: Element, entry: AnnotatedImage, reading: Reading) -> Shape:
    name, source = normalize_class_name(drawn.attrib["label"]), f"'{entry.file}' ({entry.image})"
    if drawn.tag == "mask":
        return Shape(name, runs=_read_rle(drawn, entry, reading))
    return Shape(name, tuple(_CVAT_OUTLINES[drawn.tag](drawn, source)))


def _read_rle(mask: Element, entry: AnnotatedImage, reading: Reading) -> RunLengths | None:
    """Read run lengths; None if the image is not there."""
    left, top, width, height = (int(mask.attrib[key]) for key in ("left", "top", "width", "height"))
    size = reading.check_size(entry)
    if size == (0, 0):
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


def _points(drawn: Element) -> Iterator[Sequence[str]]:
    return (point.split(",") for point in drawn.attrib["points"].split(";"))


def _polygon(drawn: Element, source: str) -> Outlines:
    return [pack_outline(_points(drawn), source)]


def _polyline(drawn: Element, source: str) -> Outlines:
    return [Line(pack_points(_points(drawn), source), THIN_LINE_WIDTH_PIXELS)]


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


_CVAT_OUTLINES: dict[str, Callable[[Element, str], Outlines]] = {
    "polygon": _polygon,
    "polyline": _polyline,
    "box": _box,
    "ellipse": _ellipse,
    "cuboid": _cuboid,
}
