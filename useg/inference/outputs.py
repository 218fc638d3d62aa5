"""An image's prediction -> the files that somebody asked for; the label map comes last, so that where it is, all of them are."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, ClassTable, Label, most_probable, palette, softmax
from useg.data.annotations.rasterize import BACKGROUND, compress_rle
from useg.errors import UsageError, choose
from useg.files import make_folder, replacing
from useg.images.files import Image, has_mark, read_mask, read_size, write_label, write_picture
from useg.images.ome_zarr import SUFFIX, mark_of
from useg.images.tiff import GeoReference, read_place
from useg.inference.polygons import clean_label_map, to_geojson, to_polygons
from useg.inference.predictor import Predictor
from useg.machine import in_parallel
from useg.pictures import add_legend, overlay, to_picture
from useg.scoring.regions import regions

Probabilities = NDArray[np.float32]  # (K, H, W)


_LABELS = {"png": ".png", "tif": ".tif"}


SOFTWARE_TAG = 305  # the tag of a TIFF that says what made it


_GDAL_METADATA_TAG = (
    42112  # XML of GDAL's own: the one place where it and QGIS look for the names of bands
)


@dataclass(frozen=True)
class OutputOptions:
    """What is written of every image, and of all together. By default: label maps as PNG, and overlays.

    Args:
        labels: form of the label maps, ``STEM.png`` or ``STEM.tif``; both with the classes' colours as palette.
        overlays: ``overlays/STEM.png``.
        probabilities: ``probabilities/STEM.tif`` with a band for each class, as ``"uint8"`` (255 is 1) or ``"float16"``; None: not written.
        confidence: ``confidence/STEM.png`` (uint8, 255 is 1) or ``.tif`` (float32): the probability of the most probable class; None: not written.
        polygons: ``polygons/STEM.geojson``: each region that is not of the class ``background``.
        coco: one ``coco.json`` for all images.
        areas: one ``areas.csv`` for all images.
        min_region: regions of fewer pixels take the class around them (:mod:`useg.inference.polygons`); probabilities stay what they are.
        max_hole: holes of fewer pixels are filled.

    Raises:
        UsageError: a form that is not known, or a negative number of pixels.
    """

    labels: str = "png"
    overlays: bool = True
    probabilities: str | None = None
    confidence: str | None = None
    polygons: bool = False
    coco: bool = False
    areas: bool = False
    min_region: int = 0
    max_hole: int = 0

    def __post_init__(self) -> None:
        choose("the form of label maps", self.labels, _LABELS)
        if self.probabilities is not None:
            choose("the form of probabilities", self.probabilities, _BANDS)
        if self.confidence is not None:
            choose("the form of confidence maps", self.confidence, _CONFIDENCE)
        for what, pixels in (
            ("the smallest region", self.min_region),
            ("the largest hole", self.max_hole),
        ):
            if pixels < 0:
                raise UsageError(
                    f"{what} is {pixels} pixels, but it cannot be negative; 0 leaves label maps as they are"
                )

    @property
    def only_labels(self) -> bool:
        """Whether nothing but label maps and overlays is written, and these as the model said."""
        return self == OutputOptions(self.labels, self.overlays)

    @property
    def of_each(self) -> str:
        """What is written of every image, as a text: two jobs that say the same write the same files, but for those of all images together."""
        return repr(replace(self, coco=False, areas=False))

    @property
    def needs_probabilities(self) -> bool:
        """Whether label maps alone do not do."""
        return self.probabilities is not None or self.confidence is not None


def label_path(out: Path, stem: str, wanted: OutputOptions) -> Path:
    """Return where the label map of an image goes."""
    return out / f"{stem}{_LABELS[wanted.labels]}"


def make_folders(out: Path, wanted: OutputOptions) -> None:
    """Make the folders that outputs go to.

    Raises:
        UsageError: one of them cannot be written.
    """
    asked = {
        "overlays": wanted.overlays,
        "probabilities": wanted.probabilities,
        "confidence": wanted.confidence,
        "polygons": wanted.polygons,
    }
    for folder in (out, *(out / name for name, wish in asked.items() if wish)):
        make_folder(folder)


def label_image(
    predictor: Predictor, image: Image, wanted: OutputOptions, tile: int | None = None
) -> tuple[Label, Probabilities | None]:
    """Return an image's label map ``(H, W)``, and its probabilities ``(K, H, W)`` where they are needed; else as a call of the predictor."""
    if not wanted.needs_probabilities:
        return predictor(image, tile), None
    logits = predictor.logits(image, tile)
    return most_probable(logits), softmax(logits, predictor.temperature)


def write_outputs(
    out: Path,
    stem: str,
    image: Image,
    prediction: Label,
    probabilities: Probabilities | None,
    table: ClassTable,
    wanted: OutputOptions,
    *,
    place: GeoReference | None = None,
    mark: str = "",
) -> Path:
    """Write all that is wanted of one image into the folders that :func:`make_folders` made, each file whole or not at all.

    Args:
        out: the folder for label maps.
        stem: name of the files, without suffix.
        image: as read, for the overlay.
        prediction: label map ``(H, W)``; it is tidied here.
        probabilities: ``(K, H, W)``, needed when ``wanted.needs_probabilities``.
        table: the classes.
        wanted: what to write.
        place: where the image lies on a map: polygons are in its coordinates, and TIFFs carry its tags.
        mark: ASCII text in the label map, for :func:`is_done`.

    Returns:
        The label map.

    Raises:
        UsageError: a file cannot be written.
    """
    label = clean_label_map(prediction, wanted.min_region, wanted.max_hole)
    if wanted.overlays:
        write_picture(
            out / "overlays" / f"{stem}.png",
            add_legend(overlay(to_picture(image), label, table), label, table),
        )
    if wanted.needs_probabilities:
        assert probabilities is not None
        if wanted.probabilities:
            _write_bands(
                out / "probabilities" / f"{stem}.tif",
                _BANDS[wanted.probabilities](probabilities),
                table.names,
                place,
            )
        if wanted.confidence:
            _CONFIDENCE[wanted.confidence](
                out / "confidence" / f"{stem}.{wanted.confidence}", probabilities.max(0), place
            )
    if wanted.polygons:
        found = (
            polygon for polygon in to_polygons(label) if table.names[polygon.value] != BACKGROUND
        )
        with replacing(out / "polygons" / f"{stem}.geojson") as temporary:
            temporary.write_text(
                json.dumps(to_geojson(found, table, place), separators=(",", ":")), "utf-8"
            )
    target = label_path(out, stem, wanted)
    if wanted.labels == "png":
        write_label(target, label, table, mark)
    else:
        _write_tiff(
            target,
            label,
            place,
            photometric="palette",
            colormap=palette(table).T.astype(np.uint16) * 257,
            software=software_text(mark),
        )
    return target


def is_done(target: Path, mark: str) -> bool:
    """Say whether a label map is there that was written with this mark; its pixels are not read."""
    if target.suffix == SUFFIX:
        return mark_of(target) == mark != ""
    if target.suffix == ".png" or not mark:
        return has_mark(target, mark)
    import tifffile

    try:
        with tifffile.TiffFile(target) as file:
            return bool(file.pages.first.tags.valueof(SOFTWARE_TAG) == software_text(mark))
    except (OSError, ValueError, IndexError, struct.error):  # tifffile's own error is a ValueError
        return False


def software_text(mark: str) -> str:
    """Return what a TIFF says in its tag ``SOFTWARE``."""
    return f"useg {mark}"


def _write_bands(
    path: Path, bands: NDArray[Any], names: tuple[str, ...], place: GeoReference | None
) -> None:
    """Write ``(K, H, W)`` as a TIFF whose bands have names: as JSON in ImageDescription, and as GDAL keeps them."""
    description = json.dumps({"bands": names, "one": 255 if bands.dtype == np.uint8 else 1})
    escaped = [escape(escape(name)) for name in names]  # GDAL undoes it twice
    items = "".join(
        f'<Item name="DESCRIPTION" sample="{k}" role="description">{name}</Item>'
        for k, name in enumerate(escaped)
    )
    tags = [(_GDAL_METADATA_TAG, "s", 0, f"<GDALMetadata>{items}</GDALMetadata>".encode(), True)]
    _write_tiff(
        path,
        bands,
        place,
        tags,
        photometric="minisblack",
        planarconfig="separate" if len(bands) > 1 else None,
        description=description,
    )


def _write_tiff(
    path: Path,
    pixels: NDArray[Any],
    place: GeoReference | None,
    tags: list[Any] | None = None,
    **options: Any,
) -> None:
    """Deflate in its fastest form, on differences: half the time of the usual one, and fewer bytes."""
    import tifffile

    extra = [*(tags or ()), *(place.tags if place else ())]
    fast = {
        "compression": "deflate",
        "compressionargs": {"level": 1},
        "predictor": options["photometric"] != "palette",
    }
    with replacing(path) as temporary:
        tifffile.imwrite(temporary, pixels, metadata=None, extratags=extra, **fast, **options)


def _of_255(fractions: NDArray[np.float32]) -> NDArray[np.uint8]:
    scaled: NDArray[np.uint8] = np.rint(fractions * np.float32(255)).astype(np.uint8)
    return scaled


def _write_confidence_png(
    path: Path, confidence: NDArray[np.float32], place: GeoReference | None
) -> None:
    write_picture(path, _of_255(confidence))


def _write_confidence_tiff(
    path: Path, confidence: NDArray[np.float32], place: GeoReference | None
) -> None:
    _write_tiff(path, confidence, place, photometric="minisblack")


_BANDS: dict[str, Callable[[Probabilities], NDArray[Any]]] = {
    "uint8": _of_255,
    "float16": lambda fractions: fractions.astype(np.float16),
}


_CONFIDENCE = {"png": _write_confidence_png, "tif": _write_confidence_tiff}


@dataclass(frozen=True)
class LabelledImage:
    """An image of a job: its number in the whole job, from 1, and its label map."""

    number: int
    image: Path
    label: Path


def write_summaries(
    out: Path,
    pairs: Sequence[tuple[Path, Path]],
    table: ClassTable,
    wanted: OutputOptions,
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
    numbered = [LabelledImage(number, *pair) for number, pair in enumerate(pairs, 1)]
    written: list[LabelledImage] = []
    while (entries := [entry for entry in numbered if done(entry.image, entry.label)]) != written:
        if wanted.coco:
            write_coco(out / "coco.json", entries, table)
        if wanted.areas:
            write_areas(out / "areas.csv", entries, table)
        written = entries  # if others have made more meanwhile, once more: so whoever writes last has seen all
    asked = {"coco.json": wanted.coco, "areas.csv": wanted.areas}
    return [out / name for name, wish in asked.items() if wish and written]


def write_coco(target: Path, entries: Sequence[LabelledImage], table: ClassTable) -> None:
    """Write label maps as COCO's JSON: an annotation (``iscrowd`` 0, compressed runs) for each 4-connected region.

    A category's id is the class id, the number in the label maps. The class ``background`` is listed, but has no annotations: it is what none
    covers, as for the reader of such files. Nothing is kept in memory but a few images' annotations.
    """
    categories = [
        {"id": k, "name": name, "supercategory": ""} for k, name in enumerate(table.names)
    ]
    sizes = [read_size(entry.label) for entry in entries]
    images = [
        {"id": e.number, "file_name": e.image.name, "width": w, "height": h}
        for e, (w, h) in zip(entries, sizes, strict=True)
    ]
    background = table.names.index(BACKGROUND) if BACKGROUND in table.names else IGNORE
    number = 0
    with replacing(target) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(
            f'{{"images": {json.dumps(images)},\n"categories": {json.dumps(categories)},\n"annotations": ['
        )
        found = in_parallel(
            lambda entry: coco_annotations(read_mask(entry.label), background), entries
        )
        for entry, annotations in zip(entries, found, strict=True):
            for annotation in annotations:
                number += 1
                file.write(",\n" if number > 1 else "\n")
                file.write(json.dumps({"id": number, "image_id": entry.number, **annotation}))
        file.write("]}\n")


def coco_annotations(label: Label, background: int = IGNORE) -> list[dict[str, Any]]:
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
                "segmentation": {
                    "size": [height, width],
                    "counts": compress_rle(_lengths(begins, stops, flat.size)),
                },
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
    top, bottom = (
        (0, height - 1) if wraps else (int((begins % height).min()), int((lasts % height).max()))
    )
    return [left, top, right - left + 1, bottom - top + 1]


def write_areas(target: Path, entries: Sequence[LabelledImage], table: ClassTable) -> None:
    """Write how much of each image is of each class: a line ``image,class,pixels,share`` for each of its classes.

    Shares are of the pixels that have a class. Where an image's file says where it lies on a map, ``area`` follows, in square units of the map:
    square metres, where its unit is the metre.
    """
    places = [read_place(entry.image) for entry in entries]
    head = ["image", "class", "pixels", "share", *(["area"] if any(places) else [])]
    counted = in_parallel(
        lambda entry: np.bincount(read_mask(entry.label).ravel(), minlength=256)[: len(table)],
        entries,
    )
    with replacing(target) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(head)
        for entry, place, counts in zip(entries, places, counted, strict=True):
            for name, pixels in zip(table.names, counts.tolist(), strict=True):
                area = [pixels * place.pixel_area if place else ""] if any(places) else []
                lines.writerow(
                    [entry.image.name, name, pixels, f"{pixels / max(1, counts.sum()):.6f}", *area]
                )
