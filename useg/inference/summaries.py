"""The label maps of a whole job -> one COCO file, one table of areas.

Both are made at the end, of what lies on disk: so they are the same after a restart, and for a job that several machines share. Each of them
may call :func:`write_summaries` when its own part is done: the last one finds all label maps.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, ClassTable, Label
from useg.data.drawn.coco import compress
from useg.data.georeference import read_place
from useg.data.images import read_mask, read_size
from useg.data.parallel import in_parallel
from useg.data.shapes import BACKGROUND
from useg.files import replacing
from useg.inference.outputs import Wanted
from useg.scoring.components import regions


@dataclass(frozen=True)
class Entry:
    """An image of a job: its number in the whole job, from 1, and its label map."""

    number: int
    image: Path
    label: Path


def write_summaries(
    out: Path,
    pairs: Sequence[tuple[Path, Path]],
    table: ClassTable,
    wanted: Wanted,
    *,
    done: Callable[[Path, Path], bool] = lambda image, label: label.exists(),
) -> list[Path]:
    """Write ``coco.json`` and ``areas.csv``, whichever is wanted, of the label maps that are there; images without one are left out.

    Args:
        out: the folder to write into.
        pairs: all images of the job and their label maps, whoever makes them, in the order in which they are to be listed.
        table: the classes.
        wanted: what to write.
        done: whether an image's label map is there, and is the one that is meant.

    Returns:
        The files written.

    Raises:
        UsageError: a file cannot be written, or a label map cannot be read.
    """
    numbered = [Entry(number, *pair) for number, pair in enumerate(pairs, 1)]
    written: list[Entry] = []
    while (entries := [entry for entry in numbered if done(entry.image, entry.label)]) != written:
        if wanted.coco:
            write_coco(out / "coco.json", entries, table)
        if wanted.areas:
            write_areas(out / "areas.csv", entries, table)
        written = entries  # if others have made more meanwhile, once more: so whoever writes last has seen all
    asked = {"coco.json": wanted.coco, "areas.csv": wanted.areas}
    return [out / name for name, wish in asked.items() if wish and written]


def write_coco(target: Path, entries: Sequence[Entry], table: ClassTable) -> None:
    """Write label maps as COCO's JSON: an annotation (``iscrowd`` 0, compressed runs) for each 4-connected region.

    A category's id is the class id, the number in the label maps. The class ``background`` is listed, but has no annotations: it is what none
    covers, as for the reader of such files. Nothing is kept in memory but a few images' annotations.
    """
    categories = [{"id": k, "name": name, "supercategory": ""} for k, name in enumerate(table.names)]
    sizes = [read_size(entry.label) for entry in entries]
    images = [{"id": e.number, "file_name": e.image.name, "width": w, "height": h} for e, (w, h) in zip(entries, sizes, strict=True)]
    background = table.names.index(BACKGROUND) if BACKGROUND in table.names else IGNORE
    number = 0
    with replacing(target) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(f'{{"images": {json.dumps(images)},\n"categories": {json.dumps(categories)},\n"annotations": [')
        found = in_parallel(lambda entry: find_annotations(read_mask(entry.label), background), entries)
        for entry, annotations in zip(entries, found, strict=True):
            for annotation in annotations:
                number += 1
                file.write(",\n" if number > 1 else "\n")
                file.write(json.dumps({"id": number, "image_id": entry.number, **annotation}))
        file.write("]}\n")


def find_annotations(label: Label, background: int = IGNORE) -> list[dict[str, Any]]:
    """Describe each 4-connected region of a label map ``(H, W)`` as COCO does; ``IGNORE`` and ``background`` have none.

    Returns:
        ``category_id``, ``segmentation`` (runs down the columns), ``area`` in pixels, ``bbox`` (left, top, width, height), ``iscrowd``.
    """
    height, width = label.shape
    flat = regions(label).ravel("F")
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    ends = np.append(starts[1:], flat.size)
    owners = flat[starts]
    order = np.argsort(owners, kind="stable")
    bounds = np.searchsorted(owners[order], np.arange(int(owners.max()) + 2))
    found = []
    for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        runs = order[first:last]
        begins, stops = starts[runs], ends[runs]
        column, row = divmod(int(begins[0]), height)
        value = int(label[row, column])
        if value in (IGNORE, background):
            continue
        found.append(
            {
                "category_id": value,
                "segmentation": {"size": [height, width], "counts": compress(_lengths(begins, stops, flat.size))},
                "area": int((stops - begins).sum()),
                "bbox": _box(begins, stops - 1, height),
                "iscrowd": 0,
            }
        )
    return found


def _lengths(begins: NDArray[np.int64], stops: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Return the lengths of the runs outside and inside a region, by turns."""
    lengths = np.diff(np.stack([begins, stops], axis=1).ravel(), prepend=0)
    return np.append(lengths, size - stops[-1]) if stops[-1] < size else lengths


def _box(begins: NDArray[np.int64], lasts: NDArray[np.int64], height: int) -> list[int]:
    """Return left, top, width and height of what runs down columns of ``height`` pixels cover; a run may go on in the next column."""
    left, right = int(begins[0]) // height, int(lasts[-1]) // height
    wraps = bool((begins // height != lasts // height).any())
    top, bottom = (0, height - 1) if wraps else (int((begins % height).min()), int((lasts % height).max()))
    return [left, top, right - left + 1, bottom - top + 1]


def write_areas(target: Path, entries: Sequence[Entry], table: ClassTable) -> None:
    """Write how much of each image is of each class: a line ``image,class,pixels,share`` for each of its classes.

    Shares are of the pixels that have a class. Where an image's file says where it lies on a map, ``area`` follows, in square units of the map:
    square metres, where its unit is the metre.
    """
    places = [read_place(entry.image) for entry in entries]
    head = ["image", "class", "pixels", "share", *(["area"] if any(places) else [])]
    counted = in_parallel(lambda entry: np.bincount(read_mask(entry.label).ravel(), minlength=256)[: len(table)], entries)
    with replacing(target) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(head)
        for entry, place, counts in zip(entries, places, counted, strict=True):
            for name, pixels in zip(table.names, counts.tolist(), strict=True):
                area = [pixels * place.pixel_area if place else ""] if any(places) else []
                lines.writerow([entry.image.name, name, pixels, f"{pixels / max(1, counts.sum()):.6f}", *area])
