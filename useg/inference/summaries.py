"""Label maps and tables of objects on disk -> files about a whole job.

These are ``coco.json``, ``areas.csv`` and ``objects.csv``, and files that LabelMe, CVAT and Label
Studio import for corrections by hand. They are the same after a restart and for a job that several
machines share: each calls :func:`write_summaries` when its part is done, and the last one finds all
label maps.

Of the annotation tools, CVAT and Label Studio get masks, which are exact. LabelMe gets polygons
whose corners lie less than a pixel from the regions' borders, since its polygons are corrected
corner by corner. All of them, and COCO, leave out the class ``background``: what nothing covers is
background when the files are read again.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, ClassTable, Label, count_pixels
from useg.errors import DataError
from useg.files import locked_folder, replacing
from useg.images.image_files import read_mask, read_size
from useg.inference.outputs import TOOL_FILES, OutputOptions, find_georeference, list_summaries
from useg.machine import in_parallel
from useg.ownership import (
    AREAS_HEADER,
    COCO_START,
    CVAT_START,
    LABEL_STUDIO_START,
    LABELME_START,
    is_own_annotation,
    is_own_coco,
    is_own_csv,
)
from useg.parsing import to_cell

if TYPE_CHECKING:
    from useg.inference.polygons import Ring

# Half a step of a staircase of pixels is 0.71 from the line through its middle.
_TOLERANCE_PIXELS = 0.75

_FROM_NAME, _TO_NAME = "tag", "image"


@dataclass(frozen=True)
class LabelledImage:
    """An image of a job, or a page of a stack, and its label map.

    Args:
        number: Its number in the whole job, from 1.
        image: The image file.
        label: Its label map, which may not exist yet.
        name: The name of the file, or of a page: ``z_0003.tif`` for the fourth of ``z.tif``.
        page: Page of a stack, from 0; None for a file of one image; ALL_PAGES: the pages of a TIFF
            are the bands of one image.
    """

    number: int
    image: Path
    label: Path
    name: str
    page: int | None = None


def write_summaries(
    out: Path,
    images: Sequence[LabelledImage],
    table: ClassTable,
    wanted: OutputOptions,
    *,
    done: Callable[[LabelledImage], bool] = lambda image: image.label.exists(),
) -> list[Path]:
    """Write ``coco.json``, ``areas.csv`` and ``objects.csv``, as far as ``wanted`` asks for them.

    They are made from the existing label maps and the tables of objects beside them.

    Args:
        out: Folder to write into.
        images: All images of the job, in the order of the summaries, whichever process labels
            them. Images without label map are left out.
        table: The classes.
        wanted: Outputs to write.
        done: Whether the label map of an image exists and belongs to this job.

    Returns:
        The files written.

    Raises:
        UsageError: A file cannot be written, or a label map cannot be read.
    """
    written: list[LabelledImage] = []
    # One process at a time. It repeats its work if others finished images meanwhile, so the last
    # writer includes all of them, also on a disk without locks.
    with locked_folder(out, wait=True):
        while (entries := [image for image in images if done(image)]) != written:
            folder = out / "objects" if wanted.objects else None
            if wanted.coco:
                write_coco(out / "coco.json", entries, table, folder)
            if wanted.areas:
                write_areas(out / "areas.csv", entries, table, folder)
            if folder:
                from useg.objects.table import write_objects_csv

                tables = [folder / f"{entry.label.stem}.csv" for entry in entries]
                write_objects_csv(out / "objects.csv", tables)
            if wanted.tool:
                _TOOL_WRITERS[wanted.tool](out / TOOL_FILES[wanted.tool], entries, table)
            written = entries
    return [path for path, _ in list_summaries(out, wanted) if written]


def background_id(table: ClassTable) -> int:
    """Return the id of the class ``background``; ``IGNORE`` if there is none."""
    from useg.data.annotations.shapes import BACKGROUND

    return table.names.index(BACKGROUND) if BACKGROUND in table.names else IGNORE


def write_coco(
    target: Path, entries: Sequence[LabelledImage], table: ClassTable, objects: Path | None = None
) -> None:
    """Write label maps as COCO JSON.

    Every object, or every 4-connected region if there is no folder ``objects``, is one annotation
    (``iscrowd`` 0, compressed run lengths). A category's id is the class id in the label maps. The
    class ``background`` is a category without annotations: readers of COCO files give it to the
    uncovered pixels. Only the annotations of a few images are in memory at a time.
    """
    categories = [
        {"id": k, "name": name, "supercategory": ""} for k, name in enumerate(table.names)
    ]
    sizes = [read_size(entry.label) for entry in entries]
    images = [
        {"id": e.number, "file_name": e.name, "width": w, "height": h}
        for e, (w, h) in zip(entries, sizes, strict=True)
    ]
    number = 0
    with replacing(target, is_own_coco) as draft, draft.open("w", encoding="utf-8") as file:
        file.write(f'{COCO_START.decode()},\n"images": {json.dumps(images)},\n')
        file.write(f'"categories": {json.dumps(categories)},\n"annotations": [')

        def annotate(entry: LabelledImage) -> list[dict[str, Any]]:
            if objects is None:
                return coco_annotations(read_mask(entry.label), background_id(table))
            return _object_annotations(objects, entry, table)

        found = in_parallel(annotate, entries)
        for entry, annotations in zip(entries, found, strict=True):
            for annotation in annotations:
                number += 1
                file.write(",\n" if number > 1 else "\n")
                file.write(json.dumps({"id": number, "image_id": entry.number, **annotation}))
        file.write("]}\n")


def coco_annotations(label: Label, background: int = IGNORE) -> list[dict[str, Any]]:
    """Describe the 4-connected regions of a label map ``(H, W)`` as COCO annotations.

    Regions of ``IGNORE`` and ``background`` are left out.

    Returns:
        For each region ``category_id``, ``segmentation`` (run lengths down the columns), ``area``
        in pixels, ``bbox`` (left, top, width, height) and ``iscrowd``.
    """
    from useg.scoring.metrics import regions

    numbers = regions(label)
    values = np.empty(int(numbers.max()) + 1, np.int64)
    values[numbers] = label
    values[values == background] = IGNORE
    return annotate_regions(numbers, values)


def _object_annotations(
    folder: Path, entry: LabelledImage, table: ClassTable
) -> list[dict[str, Any]]:
    """Describe the objects of an image, from their map and their table; the score is confidence.

    Raises:
        DataError: The map and the table do not belong together, or not to the label map.
    """
    from useg.objects.table import read_object_map, read_object_rows

    stem = entry.label.stem
    rows = list(read_object_rows(folder / f"{stem}.csv"))
    numbers = read_object_map(folder / f"{stem}.tif")
    ids = {to_cell(name): k for k, name in enumerate(table.names)}
    # Number 0, which is outside, has no row.
    values = np.array([IGNORE, *(ids.get(row["class"], IGNORE) for row in rows)], np.int64)
    fits = numbers.shape == read_size(entry.label)[::-1] and numbers.max() <= len(rows)
    annotations = annotate_regions(numbers, values) if fits else []
    if not fits or len(annotations) != len(rows):
        raise DataError(
            f"the objects in '{folder / stem}.tif' are not those of '{stem}.csv'; delete both and "
            "label the image again"
        )
    for row, annotation in zip(rows, annotations, strict=True):
        annotation["score"] = float(row["confidence"] or 0)
    return annotations


def annotate_regions(numbers: NDArray[Any], values: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Describe the regions of a map ``(H, W)`` in the order of their numbers.

    Args:
        numbers: The number of each pixel's region.
        values: The class of each number; ``IGNORE`` leaves it out.
    """
    from useg.data.annotations.shapes import compress_rle

    height, width = numbers.shape
    flat = numbers.ravel("F").astype(np.int64)
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    ends = np.append(starts[1:], flat.size)
    owners = flat[starts]
    order = np.argsort(owners, kind="stable")
    bounds = np.searchsorted(owners[order], np.arange(len(values) + 1))
    annotations = []
    for value, first, last in zip(values.tolist(), bounds[:-1], bounds[1:], strict=True):
        runs = order[first:last]
        if value == IGNORE or not runs.size:
            continue
        run_starts, run_ends = starts[runs], ends[runs]
        counts = compress_rle(_count_runs(run_starts, run_ends, flat.size))
        annotations.append(
            {
                "category_id": value,
                "segmentation": {"size": [height, width], "counts": counts},
                "area": int((run_ends - run_starts).sum()),
                "bbox": _bounding_box(run_starts, run_ends - 1, height),
                "iscrowd": 0,
            }
        )
    return annotations


def _count_runs(starts: NDArray[np.int64], ends: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Return the lengths of the runs outside and inside a region, alternating."""
    lengths = np.diff(np.stack([starts, ends], axis=1).ravel(), prepend=0)
    return np.append(lengths, size - ends[-1]) if ends[-1] < size else lengths


def _bounding_box(firsts: NDArray[np.int64], lasts: NDArray[np.int64], height: int) -> list[int]:
    """Return left, top, width and height of runs down the columns of an image.

    Args:
        firsts: First pixel of each run, counted down the columns.
        lasts: Last pixel of each run; it can lie in a later column.
        height: Pixels in a column.
    """
    left, right = int(firsts[0]) // height, int(lasts[-1]) // height
    top, bottom = 0, height - 1
    if (firsts // height == lasts // height).all():
        top, bottom = int((firsts % height).min()), int((lasts % height).max())
    return [left, top, right - left + 1, bottom - top + 1]


def write_areas(
    target: Path, entries: Sequence[LabelledImage], table: ClassTable, objects: Path | None = None
) -> None:
    """Write the area of each class in each image as CSV: ``image,class,pixels,share``.

    ``share`` is the share of all pixels that have a class. If there is a folder ``objects``, the
    number of objects of the class follows. If an image is georeferenced, a column ``area`` follows,
    in square units of the map: square metres if its unit is the metre.
    """
    from useg.objects.table import count_objects

    images = dict.fromkeys(entry.image for entry in entries)
    places = {image: find_georeference(image) for image in images}
    counted_column = ["objects"] if objects else []
    header = [*AREAS_HEADER, *counted_column, *(["area"] if any(places.values()) else [])]
    counted = in_parallel(
        lambda entry: count_pixels(read_mask(entry.label), len(table)),
        entries,
    )
    is_own = is_own_csv(*AREAS_HEADER)
    with replacing(target, is_own) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(header)
        for entry, counts in zip(entries, counted, strict=True):
            place = places[entry.image]
            found = count_objects(objects / f"{entry.label.stem}.csv") if objects else {}
            for name, pixels in zip(table.names, counts.tolist(), strict=True):
                area = [pixels * place.pixel_area if place else ""] if any(places.values()) else []
                number = [found.get(to_cell(name), 0)] if objects else []
                share = f"{pixels / max(1, counts.sum()):.6f}"
                cells = [to_cell(entry.name), to_cell(name), pixels, share]
                rows.writerow([*cells, *number, *area])


def write_labelme(folder: Path, entries: Sequence[LabelledImage], table: ClassTable) -> None:
    """Write label maps as LabelMe's JSON, one file for each: a polygon per 4-connected region."""
    for entry in entries:
        target = folder / f"{entry.label.stem}.json"
        _write_labelme_file(target, entry.name, read_mask(entry.label), table)


def _write_labelme_file(target: Path, image: str, label: Label, table: ClassTable) -> None:
    from useg.inference.polygons import to_polygons

    shapes = [
        {
            "label": table.names[polygon.value],
            "points": _keyhole([_simplify(ring) for ring in polygon.rings]).tolist(),
            "group_id": None,
            "description": "",
            "shape_type": "polygon",
            "flags": {},
        }
        for polygon in to_polygons(label)
        if polygon.value != background_id(table)
    ]
    content = {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": image,
        "imageData": None,
        "imageHeight": label.shape[0],
        "imageWidth": label.shape[1],
    }
    text = LABELME_START.decode() + json.dumps(content).removeprefix("{")
    with replacing(target, is_own_annotation) as draft:
        draft.write_text(text, "utf-8")


def write_cvat(target: Path, entries: Sequence[LabelledImage], table: ClassTable) -> None:
    """Write label maps as XML of "CVAT for images 1.1": a mask for each 4-connected region."""
    labels = "".join(
        f"<label><name>{quoteattr(name)[1:-1]}</name><color>#{bytes(color).hex()}</color>"
        "<type>any</type><attributes></attributes></label>"
        for k, (name, color) in enumerate(zip(table.names, table.colors, strict=True))
        if k != background_id(table)
    )
    with replacing(target, is_own_annotation) as draft, draft.open("w", encoding="utf-8") as file:
        file.write(
            f"{CVAT_START.decode()}\n<annotations><version>1.1</version>"
            f"<meta><task><labels>{labels}</labels></task></meta>\n"
        )
        for k, entry in enumerate(entries):
            label = read_mask(entry.label)
            height, width = label.shape
            file.write(
                f'<image id="{k}" name={quoteattr(entry.name)} width="{width}" height="{height}">\n'
            )
            for value, left, top, mask in _list_regions(label, table):
                lengths = ", ".join(map(str, _run_lengths(mask)))
                file.write(
                    f'<mask label={quoteattr(table.names[value])} source="auto" occluded="0" '
                    f'rle="{lengths}" left="{left}" top="{top}" width="{mask.shape[1]}" '
                    f'height="{mask.shape[0]}" z_order="0"></mask>\n'
                )
            file.write("</image>\n")
        file.write("</annotations>\n")


def write_label_studio(target: Path, entries: Sequence[LabelledImage], table: ClassTable) -> None:
    """Write label maps as Label Studio's tasks with predictions: a brush mask for each class.

    The labelling interface needs ``<Image name="image" value="$image"/>`` and ``<BrushLabels
    name="tag" toName="image">`` with the classes. Images are named as in local storage.
    """
    with replacing(target, is_own_annotation) as draft, draft.open("w", encoding="utf-8") as file:
        file.write("[")
        for k, entry in enumerate(entries):
            task = {
                "data": {"image": f"/data/local-files/?d={quote(entry.name)}"},
                "predictions": [{"model_version": "useg", "result": _brush_regions(entry, table)}],
            }
            file.write(",\n" if k else "")
            file.write(LABEL_STUDIO_START.decode()[1:] + json.dumps(task).removeprefix("{"))
        file.write("]\n")


def _brush_regions(entry: LabelledImage, table: ClassTable) -> list[dict[str, Any]]:
    from useg.data.annotations.platforms import encode_brush_rle

    label = read_mask(entry.label)
    return [
        {
            "id": f"useg{value}",
            "type": "brushlabels",
            "from_name": _FROM_NAME,
            "to_name": _TO_NAME,
            "original_width": label.shape[1],
            "original_height": label.shape[0],
            "image_rotation": 0,
            "value": {
                "format": "rle",
                "rle": encode_brush_rle(label == value),
                "brushlabels": [table.names[value]],
            },
        }
        for value in np.unique(label).tolist()
        if value < len(table) and value != background_id(table)
    ]


def _list_regions(
    label: Label, table: ClassTable
) -> Iterator[tuple[int, int, int, NDArray[np.bool_]]]:
    """Yield the 4-connected regions: class, left column, top row and mask."""
    from useg.inference.polygons import to_polygons
    from useg.scoring.metrics import regions

    numbers = regions(label)
    for polygon in to_polygons(label):
        if polygon.value == background_id(table):
            continue
        (left, top), (right, bottom) = polygon.rings[0].min(0), polygon.rings[0].max(0)
        crop = numbers[top:bottom, left:right]
        # Some pixel of the region lies in the first row of its box.
        first = polygon.rings[0][polygon.rings[0][:, 1] == top, 0].min()
        yield polygon.value, int(left), int(top), crop == numbers[top, first]


def _run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    from useg.data.annotations.shapes import encode_rle

    lengths: list[int] = np.frombuffer(encode_rle(mask).lengths, np.uint32).tolist()
    return lengths


def _simplify(ring: Ring) -> Ring:
    """Leave out corners of a ring that lie nearly on the line between those that stay.

    Source: Douglas and Peucker (1973).
    """
    if len(ring) < 8:
        return ring
    far = int(np.argmax(((ring - ring[0]) ** 2).sum(1)))
    closed = np.concatenate([ring, ring[:1]]).astype(float)
    keep = np.zeros(len(closed), bool)
    keep[[0, far, len(ring)]] = True
    parts = [(0, far), (far, len(ring))]
    while parts:
        start, end = parts.pop()
        if end - start < 2:
            continue
        along = closed[end] - closed[start]
        rest = closed[start + 1 : end] - closed[start]
        distances = np.abs(along[0] * rest[:, 1] - along[1] * rest[:, 0])
        worst = start + 1 + int(np.argmax(distances))
        if distances[worst - start - 1] > _TOLERANCE_PIXELS * np.hypot(*along):
            keep[worst] = True
            parts += [(start, worst), (worst, end)]
    kept = ring[keep[:-1]]
    return kept if len(kept) >= 3 else ring


def _keyhole(rings: Sequence[Ring]) -> Ring:
    """Join an outer ring and its holes to one outline: to every hole, around it and back."""
    if len(rings) == 1:
        return rings[0]
    start = rings[0][:1]
    closed = [part for ring in rings for part in (ring, ring[:1], start)]
    return np.concatenate(closed)


# How the file or folder of each tool is written; their names are in TOOL_FILES.
_TOOL_WRITERS: dict[str, Callable[[Path, Sequence[LabelledImage], ClassTable], None]] = {
    "labelme": write_labelme,
    "cvat": write_cvat,
    "label-studio": write_label_studio,
}
