"""Annotation files of COCO and YOLO, and lists of polygons -> the shapes on each image.

COCO (``instances_train2017.json``, Roboflow's ``_annotations.coco.json``, the export of CVAT, Label
Studio, Supervisely, VIA and others) does not say what lies on top. The larger shape is painted
first, so that a small one stays visible; between shapes of one size the later annotation wins. A
crowd (``iscrowd``) is painted as its class. What is known of an annotation without an outline is
only its box: the pixels in it that no other shape covers are ignored. Panoptic segmentation has a
PNG for each image, whose colours are the numbers of its segments.

YOLO: ``images/a.jpg`` has its outlines in ``labels/a.txt`` (the last folder called ``images``
counts), one line per object, ``class x y x y ...`` in fractions of the image. An image without a
text file is background, as for Ultralytics. ``names:`` in ``data.yaml`` (or in any other YAML file
of DATA) or ``classes.txt`` names the classes.
"""

from __future__ import annotations

import io
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from useg.classes import pack_color
from useg.data.annotations.formats import (
    MAX_DRAWN_CLASSES,
    AnnotatedImage,
    Annotations,
    Reading,
    normalize_class_name,
    parse_declared_size,
    read_class_names,
)
from useg.data.annotations.shapes import (
    IGNORE_NAME,
    Drawing,
    RunLengths,
    Shape,
    StoredMask,
    box_outline,
    compute_shape_area,
    decompress_rle,
    pack_coordinates,
    pack_outline,
)
from useg.errors import DataError, format_count
from useg.parsing import open_file, read_limited

# COCO


def is_coco(content: Any) -> bool:
    """Return whether JSON content has COCO's format, but no panoptic segmentation."""
    return (
        isinstance(content, dict)
        and content.keys() >= {"images", "annotations", "categories"}
        and not is_coco_panoptic(content)
    )


def is_coco_panoptic(content: Any) -> bool:
    """Return whether JSON content has COCO's format for panoptic segmentation."""
    annotations = content.get("annotations") if isinstance(content, dict) else None
    return (
        isinstance(annotations, list)
        and bool(annotations)
        and "images" in content
        and isinstance(annotations[0], dict)
        and "segments_info" in annotations[0]
    )


def read_coco(path: Path, content: dict[str, Any], reading: Reading) -> Annotations:
    """Read the content of a COCO file.

    Raises:
        DataError: The content does not fit the format, or all annotations are boxes.
    """
    names = _read_categories(content)
    images = _read_images(path, content, reading)
    shapes: dict[Any, list[Shape]] = {key: [] for key in images}
    boxes: dict[Any, list[Shape]] = {key: [] for key in images}
    for annotation in content["annotations"]:
        with reading.skipping(path, "COCO", _image_of(annotation, images)):
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
            shape = _read_shape(
                names[category], annotation.get("segmentation"), images[key], reading
            )
            shapes[key] += [] if shape.is_empty else [shape]
            boxes[key] += [] if annotation.get("segmentation") else _read_box(annotation, path)
    num_boxes = sum(map(len, boxes.values()))
    if num_boxes and not any(shapes.values()):
        raise DataError(
            f"the annotations in '{path}' are boxes without outlines, but useg needs the "
            "outlines ('segmentation'); export it with outlines"
        )
    if num_boxes:
        reading.skip(
            path,
            f"'{path}' has {format_count(num_boxes, 'annotation')} without an outline, whose "
            "pixels are ignored; draw the outlines, or remove the boxes",
        )
    entries = (
        replace(
            entry,
            drawing=Drawing(
                (*boxes[key], *sorted(shapes[key], key=compute_shape_area, reverse=True)),
                entry.drawing.size,
            ),
        )
        if boxes[key] or shapes[key]
        else entry
        for key, entry in images.items()
    )
    return Annotations("coco", tuple(entries), tuple(names.values()))


def _read_categories(content: dict[str, Any]) -> dict[Any, str]:
    return {
        category["id"]: normalize_class_name(category["name"])
        for category in sorted(content["categories"], key=lambda category: category["id"])
    }


def _read_images(
    path: Path, content: dict[str, Any], reading: Reading
) -> dict[Any, AnnotatedImage]:
    """Return an entry without shapes for each image, by the image's id."""
    entries = {}
    reading.check_count(path, len(content["images"]))
    for image in content["images"]:
        with reading.skipping(path, "COCO"):
            size = parse_declared_size(image.get("width"), image.get("height"))
            # LVIS has no names, but addresses.
            is_named = "file_name" in image or "coco_url" not in image
            name = image["file_name"] if is_named else str(image["coco_url"]).rpartition("/")[2]
            entries[image["id"]] = AnnotatedImage(path, str(name), Drawing((), size))
    return entries


def _image_of(annotation: Any, images: Mapping[Any, AnnotatedImage]) -> str:
    """Return the name of an annotation's image, or ``""``."""
    key = annotation.get("image_id") if isinstance(annotation, dict) else None
    return images[key].image if isinstance(key, str | int) and key in images else ""


def _read_shape(name: str, segmentation: Any, entry: AnnotatedImage, reading: Reading) -> Shape:
    """Read ``segmentation``: outlines as flat lists ``x, y, x, y, ...``, or run lengths.

    Outlines of two points, which COCO's own files have, cover nothing.
    """
    source = f"'{entry.file}' ({entry.image})"
    if not segmentation:
        return Shape(name)
    if isinstance(segmentation, dict):
        return Shape(name, runs=_read_rle(segmentation, entry, reading))
    outlines = segmentation if isinstance(segmentation[0], list) else [segmentation]
    packed = []
    for outline in outlines:
        if not isinstance(outline, list):
            raise DataError(f"{source} has an outline that is not a list; export it again")
        if len(outline) % 2:
            raise DataError(
                f"{source} has an outline of an odd number of coordinates; export it again"
            )
        if len(outline) >= 6:
            packed.append(pack_coordinates(outline, source))
    return Shape(name, tuple(packed))


def _read_box(annotation: Mapping[str, Any], path: Path) -> list[Shape]:
    box = annotation.get("bbox")
    if not box:
        return []
    left, top, width, height = (float(number) for number in box)
    outline = pack_outline(box_outline(left, top, left + width, top + height), f"'{path}'")
    return [Shape(IGNORE_NAME, (outline,))]


def _read_rle(
    segmentation: dict[str, Any], entry: AnnotatedImage, reading: Reading
) -> RunLengths | None:
    """Read run lengths; None if the image is not there."""
    height, width = (int(side) for side in segmentation["size"])
    true = reading.check_size(entry)
    if true == (0, 0):
        return None
    counts = segmentation["counts"]
    lengths = (
        decompress_rle(counts)
        if isinstance(counts, str)
        else np.frombuffer(array("q", map(int, counts)), np.int64)
    )
    total = sum(lengths.tolist())
    if (width, height) != true or total != width * height or lengths.min(initial=0) < 0:
        raise DataError(
            f"'{entry.file}' ({entry.image}) has run lengths for {width}x{height} pixels that add "
            f"up to {total}, but its image has {true[0]}x{true[1]}; export it again"
        )
    return RunLengths(lengths.astype(np.uint32).tobytes(), width, height, by_columns=True)


def read_coco_panoptic(path: Path, content: dict[str, Any], reading: Reading) -> Annotations:
    """Read the content of a COCO file for panoptic segmentation.

    Its PNGs lie in the folder of the same name, or elsewhere in the data set.

    Raises:
        DataError: The content does not fit the format.
    """
    names = _read_categories(content)
    images = _read_images(path, content, reading)
    entries = []
    for annotation in content["annotations"]:
        with reading.skipping(path, "COCO for panoptic segmentation"):
            entry = images[annotation["image_id"]]
            file_name = str(annotation["file_name"])
            png = reading.find(AnnotatedImage(path.with_suffix("") / "x", file_name, Drawing(())))
            if png is None:
                raise DataError(
                    f"'{path}' names the mask '{file_name}', which is not there; add it, or remove "
                    "the image from the file"
                )
            codes: dict[str, list[int]] = {}
            for segment in annotation["segments_info"]:
                number, name = int(segment["id"]), names[segment["category_id"]]
                # The number counts the red channel lowest.
                color = number & 255, number >> 8 & 255, number >> 16
                codes.setdefault(name, []).append(pack_color(color))
            shapes = (
                Shape(name, mask=StoredMask(png, tuple(found))) for name, found in codes.items()
            )
            entries.append(replace(entry, drawing=Drawing(tuple(shapes), entry.drawing.size)))
    return Annotations("coco panoptic", tuple(entries), tuple(names.values()))


# Polygons by image


def is_polygon_list(content: Any) -> bool:
    """Return whether JSON content lists images, each with its polygons, as HuBMAP's lines do."""
    first = content[0] if isinstance(content, list) and content else None
    if not isinstance(first, dict) or "id" not in first:
        return False
    shapes = first.get("annotations")
    return isinstance(shapes, list) and all(
        isinstance(shape, dict) and shape.keys() >= {"type", "coordinates"} for shape in shapes
    )


def read_polygon_list(path: Path, content: list[Any], reading: Reading) -> Annotations:
    """Read polygons: ``{"id": "a", "annotations": [{"type": "cell", "coordinates": [[[x, y]]]}]}``.

    Later polygons lie over earlier ones.

    Raises:
        DataError: The content does not fit the format.
    """
    entries = []
    for record in content:
        with reading.skipping(path, "polygons by image"):
            image, shapes = str(record["id"]), []
            for shape in record["annotations"]:
                with reading.skipping(path, "polygons by image", image):
                    name = normalize_class_name(shape["type"])
                    outlines = [
                        pack_outline([(float(x), float(y)) for x, y in ring], f"'{path}' ({image})")
                        for ring in shape["coordinates"]
                    ]
                    shapes.append(Shape(name, tuple(outlines)))
            entries.append(AnnotatedImage(path, image, Drawing(tuple(shapes), (0, 0))))
    return Annotations("polygons by image", tuple(entries))


# YOLO

# Of an outline with 1,000 points in each of its 1,000 objects; no image may have more lines.
_MAX_TEXT_BYTES, _MAX_LINES = 20_000_000, 300_000


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


# Outlines may leave the image: fractions go up to this. Higher coordinates are in pixels.
_MAX_FRACTION = 2


def begins_like_yolo(path: Path) -> bool:
    """Return whether a text file begins with a line of YOLO: a class and fractions."""
    try:
        with open_file(path) as file:
            words = file.readline(_MAX_TEXT_BYTES).split()
        numbers = [float(word) for word in words[1:]]
    except (OSError, ValueError):
        return False
    has_class = bool(words) and words[0].isdigit()
    has_points = len(words) == 5 or (len(words) >= 7 and len(words) % 2 == 1)
    return has_class and has_points and all(-1 <= x <= _MAX_FRACTION for x in numbers)


def read_yolo(
    pairs: Sequence[tuple[Path, Path]], name_files: Iterable[Path], reading: Reading
) -> Annotations:
    """Read YOLO's outlines; other lines are skipped.

    Args:
        pairs: Images and their text files, which need not exist.
        name_files: YAML and text files that may list the class names; the first that does counts.
        reading: Notes what is skipped.

    Raises:
        DataError: A line is a box, or the names cannot be read.
    """
    outlines = {
        path: _read_outlines(image, path, reading) if path.is_file() else []
        for image, path in pairs
    }
    used = {index for lines in outlines.values() for _, index, _ in lines}
    names = read_class_names(name_files) or {
        index: f"class {index}" for index in range(max(used, default=0) + 1)
    }
    entries = []
    for image, path in pairs:
        shapes = []
        for number, index, outline in outlines[path]:
            if index in names:
                shapes.append(Shape(names[index], (outline,)))
            else:
                reading.skip(
                    path,
                    f"'{path}' has the class {index}, but only {_describe_range(names)} named; "
                    f"add its name, or correct the number in line {number}",
                    image.as_posix(),
                )
        entries.append(AnnotatedImage(path, image.as_posix(), Drawing(tuple(shapes))))
    return Annotations("yolo", tuple(entries), tuple(names[index] for index in sorted(names)))


def _describe_range(names: Mapping[int, str]) -> str:
    return f"{min(names)} to {max(names)} are" if len(names) > 1 else f"{min(names)} is"


def _read_outlines(image: Path, path: Path, reading: Reading) -> list[tuple[int, int, bytes]]:
    """Return the number of the line, the class and the outline of each object."""
    try:
        content = read_limited(path, _MAX_TEXT_BYTES)
        if content.count(b"\n") + content.count(b"\r") > _MAX_LINES:
            raise ValueError(f"it has more than {_MAX_LINES:,} lines")
        lines = io.StringIO(content.decode("utf-8"), newline=None)
    except (OSError, ValueError) as error:
        reason = f"'{path}' cannot be read as text ({error}); save or copy it again, or remove it"
        reading.skip(path, reason, image.as_posix())
        return []
    found = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if len(words) == 5:
            raise DataError(
                f"'{path}' line {number} has five numbers, so it is a box instead of an outline; "
                "export the labels for segmentation"
            )
        with reading.skipping(path, "YOLO", image.as_posix()):
            found += [(number, *_parse_outline(words, f"'{path}' line {number}"))] if words else []
    return found


def _parse_outline(words: Sequence[str], source: str) -> tuple[int, bytes]:
    if not words[0].isascii() or not words[0].isdigit() or len(words) < 7 or not len(words) % 2:
        raise DataError(
            f"{source} is not 'class x y x y x y ...' with a class number and at least three "
            "points; correct or remove it"
        )
    if len(words[0].lstrip("0")) > 3 or int(words[0]) >= MAX_DRAWN_CLASSES:
        raise DataError(
            f"{source} has the class {words[0][:20]}, but class numbers are 0 to "
            f"{MAX_DRAWN_CLASSES - 1}; correct or remove it"
        )
    outline = pack_coordinates(words[1:], source)
    highest = max(array("d", outline))
    if highest > _MAX_FRACTION:
        raise DataError(
            f"{source} has the coordinate {highest:g}, but coordinates are fractions of the "
            "image's width and height, 0 to 1; divide them by these"
        )
    return int(words[0]), outline
