"""Label maps -> files that LabelMe, CVAT and Label Studio import, for corrections by hand.

CVAT and Label Studio get masks, which are exact. LabelMe gets polygons whose corners lie less than
a pixel from the regions' borders, since its polygons are corrected corner by corner. The class
``background`` is left out: what nothing covers is background when the files are read again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, ClassTable, Label
from useg.files import replacing
from useg.images.image_files import read_mask
from useg.ownership import CVAT_START, LABEL_STUDIO_START, LABELME_START, is_own_annotation

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


def background_id(table: ClassTable) -> int:
    """Return the id of the class ``background``; ``IGNORE`` if there is none."""
    from useg.data.annotations.shapes import BACKGROUND

    return table.names.index(BACKGROUND) if BACKGROUND in table.names else IGNORE


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


# What is written for each tool: a file, or a folder with a file for each image.
TOOL_FILES: dict[str, tuple[str, Callable[[Path, Sequence[LabelledImage], ClassTable], None]]] = {
    "labelme": ("labelme", write_labelme),
    "cvat": ("cvat.xml", write_cvat),
    "label-studio": ("label_studio.json", write_label_studio),
}
