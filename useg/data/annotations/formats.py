"""Annotation files of COCO, LabelMe, CVAT and YOLO -> the shapes that are drawn on each image.

Each format has a section with its reader. JSON, XML and YAML are read safely, since annotation
files come from anywhere. What the formats leave open is decided so:

- COCO (``instances_train2017.json``, Roboflow's ``_annotations.coco.json``) does not say what lies
  on top. The larger shape is painted first, so that a small one stays visible; between shapes of
  one size the later annotation wins. A crowd (``iscrowd``) is painted as its class. An annotation
  that is only a box paints nothing.
- LabelMe: later shapes lie over earlier ones. Lines and points have no width in the file; they get
  those of LabelMe's own converter, 10 pixels and a radius of 5.
- CVAT ("CVAT for images 1.1"): shapes are painted by ``z_order`` and then in the file's order. A
  polyline is one pixel wide. Points, tags and skeletons cover nothing.
- YOLO: ``images/a.jpg`` has its outlines in ``labels/a.txt`` (the last folder called ``images``
  counts), one line per object, ``class x y x y ...`` in fractions of the image. An image without a
  text file is background, as for Ultralytics. ``names:`` in ``data.yaml`` (or in any other YAML
  file of DATA) or ``classes.txt`` names the classes.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import numpy as np
import yaml

from useg.classes import ClassTable, Color, spread_colors
from useg.data.annotations.rasterize import (
    BACKGROUND,
    IGNORE_NAME,
    Drawing,
    Points,
    RunLengths,
    Shape,
    box_outline,
    compute_shape_area,
    decompress_rle,
    ellipse_outline,
    encode_rle,
    line_outlines,
    pack_outline,
)
from useg.errors import DataError
from useg.images.files import decode_image

LABELME_LINE_WIDTH_PIXELS = 10.0
LABELME_POINT_RADIUS_PIXELS = 5.0
CVAT_LINE_WIDTH_PIXELS = 1.0

# A list of class names is far smaller: 30 kB name 1,203 classes.
MAX_YAML_BYTES = 1_000_000


@dataclass(frozen=True)
class AnnotatedImage:
    """One image in an annotation file.

    Args:
        file: The annotation file.
        image: The image's name or path, as that file has it.
        drawing: The shapes; their ``size`` is (0, 0) if the file does not have it.
        split: The split as the file has it, or ``""``.
    """

    file: Path
    image: str
    drawing: Drawing
    split: str = ""


@dataclass(frozen=True)
class Annotations:
    """All images of one format, and the class names in order, with colours if there are any."""

    layout: str
    entries: tuple[AnnotatedImage, ...]
    names: tuple[str, ...]
    colors: tuple[Color | None, ...] = ()

    @property
    def classes(self) -> ClassTable:
        """The class table: ``background`` first, then the annotated classes."""
        colors = dict(zip(self.names, self.colors, strict=False))
        names = (
            BACKGROUND,
            *(name for name in dict.fromkeys(self.names) if name not in (BACKGROUND, IGNORE_NAME)),
        )
        spread = spread_colors(len(names))
        return ClassTable(
            names, tuple(colors.get(name) or spread[k] for k, name in enumerate(names))
        )


def normalize_class_name(name: Any) -> str:
    """Return a class's name as text; what the formats call background becomes ``background``."""
    text = str(name).strip()
    return BACKGROUND if text.casefold() in (BACKGROUND, "_background_") else text


@contextmanager
def explain_format_errors(path: Path, format_name: str) -> Iterator[None]:
    """Turn errors while a file's content is read into a :class:`DataError` that names the file."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"'{path}' is not valid {format_name} ({reason}); export it again, or remove it"
        ) from error


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: The file cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"'{path}' is not valid JSON ({error}); save or copy it again, or remove it"
        ) from error


def read_xml(path: Path) -> Element:
    """Read an XML file without a document type, which could define entities.

    Raises:
        DataError: The file cannot be read, is not XML, or declares a document type.
    """
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = _refuse_doctype
    try:
        parser.Parse(path.read_bytes(), True)
        return builder.close()
    except (OSError, ValueError, expat.ExpatError) as error:
        raise DataError(
            f"'{path}' is not valid XML ({error}); save or copy it again, or remove it"
        ) from error


def _refuse_doctype(*_: object) -> None:
    raise ValueError("it declares a document type, which annotations do not need")


def parse_declared_size(width: Any, height: Any) -> tuple[int, int]:
    """Return an image's (width, height); (0, 0) if either is missing.

    Raises:
        ValueError: A side is negative or not a number.
    """
    if width is None or height is None:
        return 0, 0
    size = int(width), int(height)
    if min(size) < 0:
        raise ValueError(f"an image of {size[0]}x{size[1]} pixels")
    return size if min(size) else (0, 0)


def collect_class_names(entries: Iterable[AnnotatedImage]) -> tuple[str, ...]:
    """Return the names of all annotated classes in alphabetical order."""
    return tuple(sorted({shape.name for entry in entries for shape in entry.drawing.shapes}))


# COCO


def is_coco(content: Any) -> bool:
    """Return whether JSON content has COCO's format."""
    return isinstance(content, dict) and content.keys() >= {"images", "annotations", "categories"}


def read_coco(path: Path, content: dict[str, Any]) -> Annotations:
    """Read the content of a COCO file.

    Raises:
        DataError: The content does not fit the format, an annotation belongs to an image or
            category that the file does not list, or all annotations are boxes without outlines.
    """
    with explain_format_errors(path, "COCO"):
        names = {
            category["id"]: normalize_class_name(category["name"])
            for category in sorted(content["categories"], key=lambda category: category["id"])
        }
        images = {image["id"]: image for image in content["images"]}
        sizes = {
            key: parse_declared_size(image.get("width"), image.get("height"))
            for key, image in images.items()
        }
        shapes: dict[Any, list[Shape]] = {key: [] for key in images}
        for annotation in content["annotations"]:
            key, category = annotation["image_id"], annotation["category_id"]
            if key not in images:
                raise DataError(
                    f"'{path}' has an annotation for image {key!r}, but does not list that image; "
                    "export it again"
                )
            if category not in names:
                raise DataError(
                    f"'{path}' has an annotation of category {category!r}, but does not list that "
                    "category; export it again"
                )
            shape = _read_coco_shape(
                names[category],
                annotation.get("segmentation"),
                sizes[key],
                f"'{path}' ({images[key]['file_name']})",
            )
            shapes[key] += [shape] if shape.outlines or shape.runs else []
        if content["annotations"] and not any(shapes.values()):
            raise DataError(
                f"the annotations in '{path}' are boxes without outlines, but useg needs the "
                "outlines ('segmentation'); export it with outlines"
            )
        entries = (
            AnnotatedImage(
                path,
                str(image["file_name"]),
                Drawing(
                    tuple(sorted(shapes[key], key=compute_shape_area, reverse=True)), sizes[key]
                ),
            )
            for key, image in images.items()
        )
        return Annotations("coco", tuple(entries), tuple(names.values()))


def _read_coco_shape(name: str, segmentation: Any, size: tuple[int, int], source: str) -> Shape:
    """Read ``segmentation``: outlines as flat lists ``x, y, x, y, ...``, or run lengths.

    Outlines of two points, which COCO's own files have, cover nothing.
    """
    if not segmentation:
        return Shape(name)
    if isinstance(segmentation, dict):
        return Shape(name, runs=_read_coco_rle(segmentation, size, source))
    outlines = segmentation if isinstance(segmentation[0], list) else [segmentation]
    if any(len(outline) % 2 for outline in outlines):
        raise DataError(f"{source} has an outline of an odd number of coordinates; export it again")
    return Shape(
        name,
        tuple(
            pack_outline(zip(outline[::2], outline[1::2], strict=True), source)
            for outline in outlines
            if len(outline) >= 6
        ),
    )


def _read_coco_rle(segmentation: dict[str, Any], size: tuple[int, int], source: str) -> RunLengths:
    height, width = (int(side) for side in segmentation["size"])
    counts = segmentation["counts"]
    lengths = (
        decompress_rle(counts) if isinstance(counts, str) else [int(count) for count in counts]
    )
    if (width, height) != size or min(lengths, default=0) < 0 or sum(lengths) != width * height:
        raise DataError(
            f"{source} has run lengths for {width}x{height} pixels that add up to {sum(lengths)}, "
            f"but its image has {size[0]}x{size[1]}; export it again"
        )
    return RunLengths(np.array(lengths, np.uint32).tobytes(), width, height, by_columns=True)


# LabelMe


def is_labelme(content: Any) -> bool:
    """Return whether JSON content has LabelMe's format."""
    return isinstance(content, dict) and content.keys() >= {"shapes", "imagePath"}


def read_labelme(path: Path, content: dict[str, Any]) -> AnnotatedImage:
    """Read the content of a LabelMe file, which annotates one image.

    Raises:
        DataError: The content does not fit the format.
    """
    with explain_format_errors(path, "LabelMe"):
        size = parse_declared_size(content.get("imageWidth"), content.get("imageHeight"))
        return AnnotatedImage(
            path,
            str(content["imagePath"]),
            Drawing(tuple(_read_labelme_shape(shape, path) for shape in content["shapes"]), size),
        )


def _read_labelme_shape(shape: dict[str, Any], path: Path) -> Shape:
    name, kind = normalize_class_name(shape["label"]), shape.get("shape_type") or "polygon"
    points: Points = [(float(x), float(y)) for x, y in shape["points"]]
    if not all(math.isfinite(value) for point in points for value in point):
        raise DataError(
            f"'{path}' has a shape with a coordinate that is NaN or infinite; "
            "draw it again, or remove it"
        )
    if kind == "mask":
        pixels = decode_image(base64.b64decode(shape["mask"], validate=True), f"{path}: a mask")
        return Shape(
            name, runs=encode_rle(np.any(pixels, axis=2), int(points[0][0]), int(points[0][1]))
        )
    return Shape(
        name,
        tuple(pack_outline(outline, f"'{path}'") for outline in _labelme_outlines(kind, points)),
    )


def _labelme_outlines(kind: str, points: Points) -> list[Points]:
    if kind == "polygon":
        return [points]
    if kind == "rectangle":
        (x0, y0), (x1, y1) = points
        return [box_outline(x0, y0, x1, y1)]
    if kind == "circle":
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        return [ellipse_outline(x, y, radius, radius)]
    if kind in ("line", "linestrip"):
        return line_outlines(points, LABELME_LINE_WIDTH_PIXELS)
    if kind in ("point", "points"):
        return [
            ellipse_outline(x, y, LABELME_POINT_RADIUS_PIXELS, LABELME_POINT_RADIUS_PIXELS)
            for x, y in points
        ]
    raise ValueError(f"shape_type is {kind!r}")


# CVAT


def is_cvat(root: Element) -> bool:
    """Return whether XML content has one of CVAT's formats."""
    return root.tag == "annotations" and (
        root.find("image") is not None or root.find("track") is not None
    )


def read_cvat(path: Path, root: Element) -> Annotations:
    """Read the content of a file in the format "CVAT for images".

    Raises:
        DataError: The content does not fit the format, or has CVAT's format for video.
    """
    with explain_format_errors(path, "CVAT for images"):
        if root.find("track") is not None:
            raise DataError(
                f"'{path}' has the format 'CVAT for video', which useg does not read; "
                "export the task as 'CVAT for images 1.1'"
            )
        entries = tuple(_read_cvat_image(path, image) for image in root.iter("image"))
        labels = [
            label
            for listed in root.iter("labels")
            for label in listed
            if label.find("parent") is None
        ]
        colors = {
            normalize_class_name(label.findtext("name")): _color(label.findtext("color") or "")
            for label in labels
        }
        colors |= {
            shape.name: None
            for entry in entries
            for shape in entry.drawing.shapes
            if shape.name not in colors
        }
        return Annotations("cvat", entries, tuple(colors), tuple(colors.values()))


def _read_cvat_image(path: Path, image: Element) -> AnnotatedImage:
    size = parse_declared_size(image.attrib["width"], image.attrib["height"])
    drawn = sorted(
        (child for child in image if child.tag in _CVAT_OUTLINES or child.tag == "mask"),
        key=lambda child: int(child.get("z_order", 0)),
    )
    shapes = tuple(
        _read_cvat_shape(child, size, f"'{path}' ({image.attrib['name']})") for child in drawn
    )
    return AnnotatedImage(
        path, image.attrib["name"], Drawing(shapes, size), image.get("subset", "").casefold()
    )


def _read_cvat_shape(drawn: Element, size: tuple[int, int], source: str) -> Shape:
    name = normalize_class_name(drawn.attrib["label"])
    if drawn.tag == "mask":
        return Shape(name, runs=_read_cvat_rle(drawn, size, source))
    return Shape(
        name, tuple(pack_outline(outline, source) for outline in _CVAT_OUTLINES[drawn.tag](drawn))
    )


def _read_cvat_rle(mask: Element, size: tuple[int, int], source: str) -> RunLengths:
    left, top, width, height = (int(mask.attrib[key]) for key in ("left", "top", "width", "height"))
    if width > size[0] or height > size[1]:
        raise DataError(
            f"{source} has a mask of {width}x{height} pixels, but its image has "
            f"{size[0]}x{size[1]}; export it again"
        )
    lengths = [int(length) for length in mask.attrib["rle"].split(",")]
    if min(width, height, *lengths) < 0 or sum(lengths) != width * height:
        raise DataError(
            f"{source} has a mask of {width}x{height} pixels whose run lengths add up to "
            f"{sum(lengths)}; export it again"
        )
    return RunLengths(np.array(lengths, np.uint32).tobytes(), width, height, left, top)


def _read_coordinates(drawn: Element, *keys: str) -> list[float]:
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


def _rotate(points: Points, degrees: float) -> Points:
    """Rotate an outline clockwise (y points down) about the middle of its bounding box."""
    x, y = ((min(side) + max(side)) / 2 for side in zip(*points, strict=True))
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [
        (x + (px - x) * cos - (py - y) * sin, y + (px - x) * sin + (py - y) * cos)
        for px, py in points
    ]


def _box(drawn: Element) -> list[Points]:
    x0, y0, x1, y1 = _read_coordinates(drawn, "xtl", "ytl", "xbr", "ybr")
    return [_rotate(box_outline(x0, y0, x1, y1), float(drawn.get("rotation", 0)))]


def _ellipse(drawn: Element) -> list[Points]:
    x, y, across, down = _read_coordinates(drawn, "cx", "cy", "rx", "ry")
    return [_rotate(ellipse_outline(x, y, across, down), float(drawn.get("rotation", 0)))]


def _color(text: str) -> Color | None:
    """Read ``#rrggbb``."""
    try:
        red, green, blue = bytes.fromhex(text.removeprefix("#"))
    except ValueError:
        return None
    return red, green, blue


_CVAT_OUTLINES = {
    "polygon": lambda drawn: [_points(drawn)],
    "polyline": lambda drawn: line_outlines(_points(drawn), CVAT_LINE_WIDTH_PIXELS),
    "box": _box,
    "ellipse": _ellipse,
}


# YOLO


def find_label_file(image: Path, root: Path) -> Path | None:
    """Return where YOLO keeps an image's outlines: ``labels/a.txt`` for ``images/a.jpg``.

    The file need not exist, but its folder does; None if it does not, or if the image is in no
    ``images`` folder of ``root``.
    """
    parts = image.relative_to(root).parts
    places = [k for k, part in enumerate(parts[:-1]) if part.casefold() == "images"]
    if not places:
        return None
    parent, inside = root.joinpath(*parts[: places[-1]]), parts[places[-1] + 1 :]
    folder = parent / ("Labels" if parts[places[-1]] == "Images" else "labels")
    path = folder.joinpath(*inside).with_suffix(".txt")
    return path if path.parent.is_dir() else None


def read_yolo(pairs: Sequence[tuple[Path, Path]], name_files: Iterable[Path]) -> Annotations:
    """Read YOLO's outlines.

    Args:
        pairs: Images and their text files, which need not exist.
        name_files: YAML and text files that may list the class names; the first that does counts.

    Raises:
        DataError: A line is not an outline, a class has no name, or the names cannot be read.
    """
    outlines = {path: _read_outlines(path) if path.is_file() else [] for _, path in pairs}
    used = {index for lines in outlines.values() for index, _ in lines}
    names = read_class_names(name_files) or {
        index: f"class {index}" for index in range(max(used, default=0) + 1)
    }
    entries = []
    for image, path in pairs:
        for index, _ in outlines[path]:
            if index not in names:
                raise DataError(
                    f"'{path}' has the class {index}, but only {_describe_range(names)} named; "
                    "add its name, or correct the number"
                )
        shapes = tuple(Shape(names[index], (outline,)) for index, outline in outlines[path])
        entries.append(AnnotatedImage(path, image.as_posix(), Drawing(shapes)))
    return Annotations("yolo", tuple(entries), tuple(names[index] for index in sorted(names)))


def _describe_range(names: Mapping[int, str]) -> str:
    return f"{min(names)} to {max(names)} are" if len(names) > 1 else f"{min(names)} is"


def _read_outlines(path: Path) -> list[tuple[int, bytes]]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"'{path}' cannot be read as text ({error}); save or copy it again, or remove it"
        ) from error
    return [
        _parse_outline(line.split(), f"'{path}' line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def _parse_outline(words: Sequence[str], source: str) -> tuple[int, bytes]:
    if len(words) == 5:
        raise DataError(
            f"{source} has five numbers, which are a box and not an outline; "
            "export the labels for segmentation"
        )
    if not words[0].isascii() or not words[0].isdigit() or len(words) < 7 or not len(words) % 2:
        raise DataError(
            f"{source} is not 'class x y x y x y ...' with a class number and at least three "
            "points; correct or remove it"
        )
    return int(words[0]), pack_outline(zip(words[1::2], words[2::2], strict=True), source)


def read_class_names(files: Iterable[Path]) -> dict[int, str]:
    """Return the class names by number from the first file that lists some; {} if none does.

    Raises:
        DataError: A YAML file has ``names:``, but they cannot be read.
    """
    for path in files:
        try:
            with path.open("rb") as file:
                content = file.read(MAX_YAML_BYTES + 1)
            errors = "strict" if len(content) <= MAX_YAML_BYTES else "replace"
            text = content.decode("utf-8-sig", errors)
        except (OSError, UnicodeDecodeError):
            continue
        if path.suffix == ".txt":
            names = dict(enumerate(text.split("\n")))
        else:
            names = parse_yaml_names(text, f"'{path}'")
        if names:
            return {i: normalize_class_name(name) for i, name in names.items() if name.strip()}
    return {}


def parse_yaml_names(text: str, source: str) -> dict[int, str]:
    """Read ``names:`` of a YAML file: a list, or a mapping from numbers; {} if there is none.

    Every name is text, also ``no`` and ``1e3``, which YAML's usual types would change.

    Args:
        text: The file's content.
        source: The file's name, for the error message.

    Raises:
        DataError: The text has ``names:``, but is too long, is not YAML, or the names are not text.
    """
    if not re.search(r"^['\"]?names['\"]?[ \t]*:", text, re.MULTILINE):
        return {}
    if len(text.encode()) > MAX_YAML_BYTES:
        raise DataError(
            f"{source} has more than {MAX_YAML_BYTES:,} bytes, too many for a list of class names; "
            "move it elsewhere, or keep only 'names:' in it"
        )
    try:
        # BaseLoader makes text, lists and mappings only. It builds what an alias refers to once,
        # so that nested aliases take no memory.
        content = yaml.load(text, yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        raise DataError(
            f"{source} is not valid YAML ({' '.join(str(error).split())}); correct it, or remove it"
        ) from error
    listed = content.get("names") if isinstance(content, dict) else None
    if isinstance(listed, list):
        listed = {str(k): name for k, name in enumerate(listed)}
    if not isinstance(listed, dict):
        return {}
    for number, name in listed.items():
        if not re.fullmatch("[0-9]{1,9}", number) or not isinstance(name, str):
            raise DataError(
                f"{source} has an entry in 'names:' that is not a number with a name "
                f"({number!r:.40}); write for example '0: car'"
            )
    return {int(number): name for number, name in listed.items()}
