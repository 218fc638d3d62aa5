"""Exports of Label Studio and Supervisely -> the shapes on each image, and back for corrections.

Label Studio (JSON, JSON-MIN, masks as PNG): regions are painted in the file's order. Of several
annotations of a task, the one marked as ground truth is read, otherwise the newest; cancelled ones
and predictions are not. A task that nobody has annotated is left out.
``task-40-annotation-7-by-1-tag-house-0.png`` is a mask of the export "Brush labels to PNG". Only
the project's JSON says which image it belongs to.

Supervisely: later shapes lie over earlier ones. Corners are whole pixels, which belong to the
shape. A line is one pixel wide, a point covers nothing.
"""

from __future__ import annotations

import base64
import os
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

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
    Drawing,
    Line,
    Outlines,
    RunLengths,
    Shape,
    StoredMask,
    box_outline,
    encode_rle,
    pack_ellipse,
    pack_outline,
    pack_points,
    pack_rings,
    rotate_outline,
)
from useg.errors import DataError, format_count
from useg.images.formats import IMAGE_SUFFIXES

# Label Studio

# Brush masks of Label Studio.
BRUSH_MASK_NAME = re.compile(
    r"task-(?P<task>[0-9]+)-annotation-(?P<annotation>[0-9]+)-by-.*?-tag-(?P<name>.+)-[0-9]+",
    re.ASCII,
)
# Uploads get eight characters in front of their names.
_UPLOAD_PREFIX = re.compile(r"[0-9a-f]{8}-")

# The bands of Label Studio's run lengths: red, green, blue, alpha. Alpha is the mask.
_NUM_BANDS = 4


def is_label_studio(content: Any) -> bool:
    """Return whether JSON content is Label Studio's: tasks, JSON-MIN, or one annotation."""
    tasks = content if isinstance(content, list) else [content]
    return (
        bool(tasks)
        and isinstance(tasks[0], dict)
        and (_is_task(tasks[0]) or _is_minimal(tasks[0]) or {"task", "result"} <= tasks[0].keys())
    )


def _is_task(task: dict[str, Any]) -> bool:
    return isinstance(task.get("data"), dict) and (
        "annotations" in task or "completions" in task or "predictions" in task
    )


def _is_minimal(task: dict[str, Any]) -> bool:
    return "data" not in task and {"id", "annotation_id", "annotator"} <= task.keys()


def find_brush_masks(images: Sequence[Path]) -> dict[int, list[tuple[int, str, Path]]]:
    """Return Label Studio's masks by task: (annotation, class, file)."""
    found: dict[int, list[tuple[int, str, Path]]] = defaultdict(list)
    for path in images:
        if match := BRUSH_MASK_NAME.fullmatch(path.stem):
            found[int(match["task"])].append((int(match["annotation"]), match["name"], path))
    return dict(found)


def read_label_studio(path: Path, content: Any, reading: Reading) -> Annotations:
    """Read the content of an export of Label Studio.

    Raises:
        DataError: The content does not fit the format.
    """
    masks = find_brush_masks(reading.images)
    entries, num_open, num_many = [], 0, 0
    tasks = content if isinstance(content, list) else [content]
    reading.check_count(path, len(tasks))
    for task in tasks:
        with reading.skipping(path, "Label Studio"):
            annotations = _list_annotations(task)
            if not annotations:
                num_open += 1
                continue
            num_many += len(annotations) > 1
            best = max(enumerate(annotations), key=lambda item: (*_rank(item[1]), item[0]))[1]
            entries.append(_read_task(path, task, best, masks, reading))
    if num_open:
        reading.skip(
            path,
            f"'{path}' has {format_count(num_open, 'task')} without an annotation, whose images "
            "are left out; annotate them, or remove them from the project",
        )
    if num_many:
        reading.skip(
            path,
            f"'{path}' has {format_count(num_many, 'task')} with several annotations, of which "
            "useg reads the one marked as ground truth, or else the newest; keep one for each "
            "image",
        )
    return Annotations("label studio", tuple(entries))


def _list_annotations(task: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the annotations of a task that somebody has submitted."""
    if _is_minimal(task) or "result" in task:
        return [task]
    listed = task.get("annotations") or task.get("completions") or []
    return [each for each in listed if isinstance(each, dict) and not each.get("was_cancelled")]


def _rank(annotation: dict[str, Any]) -> tuple[bool, str]:
    moment = annotation.get("updated_at") or annotation.get("created_at") or ""
    return bool(annotation.get("ground_truth")), str(moment)


def _read_task(
    path: Path,
    task: dict[str, Any],
    annotation: dict[str, Any],
    masks: Mapping[int, list[tuple[int, str, Path]]],
    reading: Reading,
) -> AnnotatedImage:
    if _is_minimal(task):
        fields, regions = task, _list_minimal_regions(task)
    else:
        fields = task["task"]["data"] if "result" in task else task["data"]
        labels = _labels_by_id(annotation["result"])
        regions = [_label_region(region, labels) for region in annotation["result"]]
    name = _image_name(fields)
    others = (_UPLOAD_PREFIX.sub("", name, count=1),) if _UPLOAD_PREFIX.match(name) else ()
    entry = AnnotatedImage(path, name, Drawing((), _declared_size(regions)), others=others)
    if entry.drawing.size is None:
        entry = replace(entry, drawing=Drawing((), reading.size(entry)))
    shapes = []
    for region in regions:
        with reading.skipping(path, "Label Studio", name):
            shapes += _read_region(region, entry, reading)
    number, chosen = task.get("id"), annotation.get("id")
    stored = masks.get(number, []) if isinstance(number, int) else []
    if stored and not shapes:
        own = [mask for mask in stored if mask[0] == chosen] or stored
        shapes = [
            Shape(normalize_class_name(tag), mask=StoredMask(file)) for _, tag, file in sorted(own)
        ]
    return replace(entry, drawing=Drawing(tuple(shapes), entry.drawing.size)) if shapes else entry


def _image_name(fields: Mapping[str, Any]) -> str:
    """Return the path of a task's image: ``/data/upload/1/1f2e3d4c-a.jpg`` -> ``1f2e3d4c-a.jpg``.

    Raises:
        ValueError: The task has no image.
    """
    for value in fields.values():
        if not isinstance(value, str):
            continue
        parts = urlsplit(value) if "://" in value or "?" in value else None
        path = parts.path if parts else value
        if parts and (inside := parse_qs(parts.query).get("d")):
            path = inside[0]
        path = unquote(path).replace("\\", "/")
        # Files may have hundreds of thousands of tasks, for which pathlib takes seconds.
        if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES:
            return os.path.basename(path)
    raise ValueError("a task has no image file")


def _declared_size(regions: Sequence[Mapping[str, Any]]) -> tuple[int, int] | None:
    for region in regions:
        size = parse_declared_size(region.get("original_width"), region.get("original_height"))
        if size != (0, 0):
            return size
    return None


def _list_minimal_regions(task: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the regions of JSON-MIN, in the form of the full export."""
    values = (value for field in task.values() if isinstance(field, list) for value in field)
    return [{**value, "value": value} for value in values if isinstance(value, dict)]


def _labels_by_id(result: Iterable[Mapping[str, Any]]) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {}
    for region in result:
        if "id" in region and (names := _labels(region.get("value", {}))):
            found.setdefault(region["id"], names)
    return found


def _label_region(region: dict[str, Any], labels: Mapping[Any, list[Any]]) -> dict[str, Any]:
    """Give a region its labels, where another entry with the same id has them.

    The tags ``<Brush>`` and ``<Labels>`` make two entries of one region.
    """
    value = region["value"]
    if _labels(value) or region.get("id") not in labels:
        return region
    return {**region, "value": {**value, "labels": labels[region["id"]]}}


def _labels(value: Mapping[str, Any]) -> list[Any]:
    return next(
        (
            names
            for key, names in value.items()
            if key.endswith("labels") and isinstance(names, list) and names
        ),
        [],
    )


def _read_region(region: Mapping[str, Any], entry: AnnotatedImage, reading: Reading) -> list[Shape]:
    """Read a region: no shape for one that only repeats another's labels, or is not a drawing."""
    value, source = region["value"], f"'{entry.file}' ({entry.image})"
    kind = next((kind for kind, keys in _KINDS.items() if keys <= value.keys()), "")
    if not kind or str(region.get("type", "")) == "labels":
        return []
    if region.get("image_rotation"):
        raise DataError(
            f"{source} has a region on an image that was rotated in Label Studio; rotate the image "
            "file itself, and annotate that"
        )
    names = _labels(value)
    if not names:
        raise DataError(f"{source} has a region without a label; give it one, or remove it")
    name = normalize_class_name(names[0])
    if kind in _MASKS:
        return [Shape(name, runs=runs)] if (runs := _MASKS[kind](value, entry, reading)) else []
    width, height = entry.drawing.size or (0, 0)
    if not width:
        return []
    return [Shape(name, tuple(_OUTLINES[kind](value, (width / 100, height / 100), source)))]


Scale = tuple[float, float]


def _polygon(value: Mapping[str, Any], scale: Scale, source: str) -> Outlines:
    points = [(float(x) * scale[0], float(y) * scale[1]) for x, y in value["points"]]
    return [pack_outline(points, source)]


def _rectangle(value: Mapping[str, Any], scale: Scale, source: str) -> Outlines:
    x, y, width, height = (
        float(value[key]) * scale[k % 2] for k, key in enumerate(("x", "y", "width", "height"))
    )
    corners = box_outline(x, y, x + width, y + height)
    # A rectangle turns about its first corner.
    return [
        pack_outline(rotate_outline(corners, float(value.get("rotation") or 0), (x, y)), source)
    ]


def _ellipse(value: Mapping[str, Any], scale: Scale, source: str) -> Outlines:
    keys = ("x", "y", "radiusX", "radiusY")
    numbers = [float(value[key]) * scale[k % 2] for k, key in enumerate(keys)]
    return [pack_ellipse(numbers, source, value.get("rotation") or 0.0)]


def _vector(value: Mapping[str, Any], scale: Scale, source: str) -> Outlines:
    if not value.get("closed"):
        raise DataError(
            f"{source} has an open line, which covers no pixels; close it, or remove it"
        )
    points = [(point["x"], point["y"]) for point in value["vertices"]]
    return _polygon({"points": points}, scale, source)


def _brush(value: Mapping[str, Any], entry: AnnotatedImage, reading: Reading) -> RunLengths | None:
    size = reading.check_size(entry)
    if size == (0, 0):
        return None
    if value.get("format", "rle") != "rle":
        raise ValueError(f"a brush region has the format {str(value['format'])[:40]!r}")
    bands = decode_brush_rle(bytes(iter(value["rle"])), size[0] * size[1] * _NUM_BANDS)
    return encode_rle(bands.reshape(size[1], size[0], _NUM_BANDS)[..., -1] > 0)


def _bitmask(
    value: Mapping[str, Any], entry: AnnotatedImage, reading: Reading
) -> RunLengths | None:
    content = base64.b64decode(str(value["imageDataURL"]).rpartition(",")[2], validate=True)
    return read_embedded_mask(content, (0, 0), entry, reading)


# The kind of a region by what its value has.
_KINDS = {
    "brush": {"rle"},
    "bitmask": {"imageDataURL"},
    "polygon": {"points"},
    "vector": {"vertices"},
    "ellipse": {"x", "y", "radiusX", "radiusY"},
    "rectangle": {"x", "y", "width", "height"},
}
_MASKS: dict[str, Callable[[Mapping[str, Any], AnnotatedImage, Reading], RunLengths | None]] = {
    "brush": _brush,
    "bitmask": _bitmask,
}
_OUTLINES: dict[str, Callable[[Mapping[str, Any], Scale, str], Outlines]] = {
    "polygon": _polygon,
    "vector": _vector,
    "ellipse": _ellipse,
    "rectangle": _rectangle,
}


# Label Studio's run lengths are a stream of bits: the number of values (32 bits), the bits of a
# value less one (5), and the bits of a count less one, for four kinds of count (4 each). Then
# follow blocks: whether it repeats one value (1), the kind of its count (2), the count less one,
# and the value or values. Source: thi.ng's rle-pack, which Label Studio uses.
_WORD_BITS = 8
_COUNT_BITS = (3, 4, 8, 16)


def decode_brush_rle(content: bytes, num_values: int) -> NDArray[np.uint8]:
    """Decode a brush mask: ``num_values`` values uint8; :func:`encode_brush_rle` reverses it.

    Raises:
        ValueError: The content is damaged, or has another number of values.
    """
    bits = np.unpackbits(np.frombuffer(content, np.uint8))
    text = bits.tobytes().translate(bytes.maketrans(b"\0\1", b"01"))

    def number(place: int, size: int) -> int:
        if place + size > len(text):
            raise ValueError("the run lengths of a brush end too early")
        return int(text[place : place + size], 2)

    if number(0, 32) != num_values:
        raise ValueError(f"a brush has {number(0, 32):,} values, but its image {num_values:,}")
    if number(32, 5) + 1 != _WORD_BITS:
        raise ValueError(f"a brush has values of {number(32, 5) + 1} bits and not of {_WORD_BITS}")
    sizes = [number(37 + 4 * k, 4) + 1 for k in range(4)]
    values = np.zeros(num_values, np.uint8)
    place, done = 53, 0
    while done < num_values:
        repeats, size = number(place, 1), sizes[number(place + 1, 2)]
        count = min(number(place + 3, size) + 1, num_values - done)
        place += 3 + size
        if repeats:
            values[done : done + count] = number(place, _WORD_BITS)
            place += _WORD_BITS
        else:
            stored = bits[place : place + count * _WORD_BITS]
            if len(stored) < count * _WORD_BITS:
                raise ValueError("the run lengths of a brush end too early")
            values[done : done + count] = np.packbits(stored)
            place += count * _WORD_BITS
        done += count
    return values


def encode_brush_rle(mask: NDArray[np.bool_]) -> list[int]:
    """Encode a mask ``(H, W)`` as Label Studio's run lengths of red, green, blue and alpha."""
    flat = mask.ravel()
    starts = np.flatnonzero(np.diff(flat, prepend=~flat[:1])) * _NUM_BANDS
    num_values = flat.size * _NUM_BANDS
    parts = [f"{num_values:032b}{_WORD_BITS - 1:05b}"]
    parts += [f"{size - 1:04b}" for size in _COUNT_BITS]
    for start, end in zip(starts, np.append(starts[1:], num_values), strict=True):
        word = ("1" if flat[start // _NUM_BANDS] else "0") * _WORD_BITS
        for begin in range(int(start), int(end), 1 << _COUNT_BITS[-1]):
            count = min(int(end) - begin, 1 << _COUNT_BITS[-1]) - 1
            kind = next(k for k, size in enumerate(_COUNT_BITS) if count < 1 << size)
            parts.append(f"1{kind:02b}{count:0{_COUNT_BITS[kind]}b}{word}")
    text = "".join(parts)
    text += "0" * (-len(text) % 8)
    return [int(text[k : k + 8], 2) for k in range(0, len(text), 8)]


# Supervisely

_LINE_WIDTH_PIXELS = 1.0


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
        with reading.skipping(path, "Supervisely", entry.image):
            kind = str(drawn["geometryType"])
            if kind in _SUPERVISELY_OUTLINES or kind in ("bitmap", "alpha_mask"):
                shapes.append(_read_supervisely_shape(kind, drawn, entry, reading))
            else:
                skipped[kind] += 1
    for kind, count in skipped.items():
        reading.skip(
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
    border = Line(pack_points([*outer, *outer[:1]], source), _LINE_WIDTH_PIXELS)
    return [pack_rings([outer, *holes], source), border]


def _supervisely_rectangle(points: Mapping[str, Any], source: str) -> Outlines:
    (x0, y0), (x1, y1) = points["exterior"]
    corners = min(x0, x1), min(y0, y1), max(x0, x1) + 1, max(y0, y1) + 1
    return [pack_outline(box_outline(*corners), source)]


def _supervisely_line(points: Mapping[str, Any], source: str) -> Outlines:
    line = [(x + 0.5, y + 0.5) for x, y in points["exterior"]]
    return [Line(pack_points(line, source), _LINE_WIDTH_PIXELS)]


_SUPERVISELY_OUTLINES: dict[str, Callable[[Mapping[str, Any], str], Outlines]] = {
    "polygon": _supervisely_polygon,
    "rectangle": _supervisely_rectangle,
    "line": _supervisely_line,
    "polyline": _supervisely_line,
}
