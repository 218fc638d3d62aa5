"""Label maps and tables of objects on disk -> one ``coco.json``, ``areas.csv`` and ``objects.csv``.

They summarise a whole job, so they are the same after a restart and for a job that several machines
share: each calls :func:`write_summaries` when its part is done, and the last one finds all label
maps.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, ClassTable, Label, count_pixels
from useg.errors import DataError
from useg.files import locked_folder, replacing
from useg.images.image_files import read_mask, read_size
from useg.inference.annotation_tools import TOOL_FILES, LabelledImage
from useg.inference.outputs import OutputOptions, find_georeference, list_summaries
from useg.machine import in_parallel
from useg.ownership import AREAS_HEADER, COCO_START, is_own_coco, is_own_csv
from useg.parsing import to_cell


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
                name, write = TOOL_FILES[wanted.tool]
                write(out / name, entries, table)
            written = entries
    return [path for path, _ in list_summaries(out, wanted) if written]


def write_coco(
    target: Path, entries: Sequence[LabelledImage], table: ClassTable, objects: Path | None = None
) -> None:
    """Write label maps as COCO JSON.

    Every object, or every 4-connected region if there is no folder ``objects``, is one annotation
    (``iscrowd`` 0, compressed run lengths). A category's id is the class id in the label maps. The
    class ``background`` is a category without annotations: readers of COCO files give it to the
    uncovered pixels. Only the annotations of a few images are in memory at a time.
    """
    from useg.data.annotations.shapes import BACKGROUND

    categories = [
        {"id": k, "name": name, "supercategory": ""} for k, name in enumerate(table.names)
    ]
    sizes = [read_size(entry.label) for entry in entries]
    images = [
        {"id": e.number, "file_name": e.name, "width": w, "height": h}
        for e, (w, h) in zip(entries, sizes, strict=True)
    ]
    background = table.names.index(BACKGROUND) if BACKGROUND in table.names else IGNORE
    number = 0
    with replacing(target, is_own_coco) as draft, draft.open("w", encoding="utf-8") as file:
        file.write(f'{COCO_START.decode()},\n"images": {json.dumps(images)},\n')
        file.write(f'"categories": {json.dumps(categories)},\n"annotations": [')

        def annotate(entry: LabelledImage) -> list[dict[str, Any]]:
            if objects is None:
                return coco_annotations(read_mask(entry.label), background)
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
        counts = compress_rle(_run_lengths(run_starts, run_ends, flat.size))
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


def _run_lengths(
    starts: NDArray[np.int64], ends: NDArray[np.int64], size: int
) -> NDArray[np.int64]:
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
