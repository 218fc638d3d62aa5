"""COCO's JSON (``instances_train2017.json``, Roboflow's ``_annotations.coco.json``) -> drawings.

Where things overlap, the larger is painted first, so that a small one stays visible: COCO says nothing of what lies on top. Between things of
one size the later annotation wins. A crowd (``iscrowd``) is painted as its class. Annotations that are boxes alone paint nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.data.drawn.entries import Annotations, Entry, class_name, clear_format, declared_size
from useg.data.shapes import Drawing, Runs, Shape, area, ring
from useg.errors import UsageError


def is_coco(content: Any) -> bool:
    """Tell COCO's JSON from other files."""
    return isinstance(content, dict) and content.keys() >= {"images", "annotations", "categories"}


def read_coco(path: Path, content: dict[str, Any]) -> Annotations:
    """Turn a COCO file's content into entries.

    Raises:
        UsageError: the file does not fit the format, names images or categories that it does not list, or has boxes alone.
    """
    with clear_format(path, "COCO"):
        names = {category["id"]: class_name(category["name"]) for category in sorted(content["categories"], key=lambda category: category["id"])}
        images = {image["id"]: image for image in content["images"]}
        sizes = {key: declared_size(image.get("width"), image.get("height")) for key, image in images.items()}
        shapes: dict[Any, list[Shape]] = {key: [] for key in images}
        for annotation in content["annotations"]:
            key, category = annotation["image_id"], annotation["category_id"]
            if key not in images:
                raise UsageError(f"'{path}' has an annotation of image {key!r}, which is not among its images; export it again")
            if category not in names:
                raise UsageError(f"'{path}' has an annotation of category {category!r}, which is not among its categories; export it again")
            shape = _read_shape(names[category], annotation.get("segmentation"), sizes[key], f"'{path}' ({images[key]['file_name']})")
            shapes[key] += [shape] if shape.rings or shape.runs else []
        if content["annotations"] and not any(shapes.values()):
            raise UsageError(
                f"the annotations in '{path}' are boxes without outlines; labels for pixels need 'segmentation': export it with outlines"
            )
        entries = (
            Entry(path, str(image["file_name"]), Drawing(tuple(sorted(shapes[key], key=area, reverse=True)), sizes[key]))
            for key, image in images.items()
        )
        return Annotations("coco", tuple(entries), tuple(names.values()))


def _read_shape(name: str, segmentation: Any, size: tuple[int, int], source: str) -> Shape:
    """Read ``segmentation``: outlines as flat lists ``x, y, x, y, ...`` or runs; two points, as COCO has them here and there, cover nothing."""
    if not segmentation:
        return Shape(name)
    if isinstance(segmentation, dict):
        return Shape(name, runs=_read_runs(segmentation, size, source))
    outlines = segmentation if isinstance(segmentation[0], list) else [segmentation]
    if any(len(outline) % 2 for outline in outlines):
        raise UsageError(f"{source} has an outline of an odd number of coordinates; export it again")
    return Shape(name, tuple(ring(zip(outline[::2], outline[1::2], strict=True), source) for outline in outlines if len(outline) >= 6))


def _read_runs(segmentation: dict[str, Any], size: tuple[int, int], source: str) -> Runs:
    height, width = (int(side) for side in segmentation["size"])
    counts = segmentation["counts"]
    lengths = decompress(counts) if isinstance(counts, str) else [int(count) for count in counts]
    if (width, height) != size or min(lengths, default=0) < 0 or sum(lengths) != width * height:
        raise UsageError(
            f"{source} has runs for {width}x{height} pixels that cover {sum(lengths)}, but its image has {size[0]}x{size[1]}; export it again"
        )
    return Runs(np.array(lengths, np.uint32).tobytes(), width, height, by_columns=True)


def compress(lengths: NDArray[np.int64]) -> str:
    """Write run lengths as COCO's compressed text; :func:`decompress` gives them back."""
    values = lengths.astype(np.int64)
    values[3:] -= lengths[1:-2]
    shifts = 5 * np.arange(8)
    more = values[:, None] >> (shifts + 4)  # what is left when it is neither 0 nor -1 is more than the sign
    goes_on = (more != 0) & (more != -1)
    characters = (values[:, None] >> shifts & 31) + 32 * goes_on + 48
    written = np.hstack([np.ones((len(values), 1), bool), goes_on[:, :-1]])
    return bytes(characters[written].tolist()).decode("ascii")


def decompress(text: str) -> list[int]:
    """Read COCO's compressed run lengths: five bits a character, from 48 on, the lowest first; from the fourth, changes to the last but one.

    Raises:
        ValueError: not such a text.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 35:
            raise ValueError(f"its compressed runs have {character!r} where no such character can be")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("its compressed runs end in the middle of a number")
    return lengths
