"""Write the outputs of a prediction: label maps, overlays, probabilities, polygons, COCO, areas.

The label map of an image is written last, so if it exists, all other outputs of the image do too.

``coco.json`` and ``areas.csv`` summarize a whole job. They are made at the end from the label maps
on disk, so they are the same after a restart and for a job that several machines share: each calls
:func:`write_summaries` when its part is done, and the last one finds all label maps.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, ClassTable, Label, most_probable, palette, softmax
from useg.errors import DataError, SettingsError, choose
from useg.files import locked_folder, make_folder, replacing
from useg.images.decode import IMAGE_SUFFIXES
from useg.images.files import Image, has_mark, read_mask, read_size, write_label, write_picture
from useg.images.tiff import NO_DATA_TAG
from useg.inference.annotation_tools import TOOL_FILES, LabelledImage
from useg.machine import in_parallel
from useg.ownership import (
    AREAS_HEADER,
    COCO_START,
    GEOJSON_START,
    OBJECTS_HEADER,
    UNKEPT_LABEL_MARK,
    Recognizer,
    is_own_annotation,
    is_own_coco,
    is_own_csv,
    is_own_geojson,
    is_own_label_map,
    is_own_picture,
    is_own_tiff,
)
from useg.parsing import to_cell
from useg.pictures import add_legend, overlay, to_picture

if TYPE_CHECKING:
    from useg.images.tiff import GeoReference
    from useg.inference.predictor import Predictor
    from useg.objects.table import FoundObjects

Probabilities = NDArray[np.float32]  # (K, H, W)

# TIFF tags: the program that wrote the file, and GDAL's XML, where GDAL and QGIS read band names.
SOFTWARE_TAG = 305
_GDAL_METADATA_TAG = 42112

_LABEL_SUFFIXES = {"png": ".png", "tif": ".tif"}

# Files with these suffixes have no georeference.
_NO_MAP_SUFFIXES = IMAGE_SUFFIXES - {".tif", ".tiff"}


@dataclass(frozen=True)
class OutputOptions:
    """Outputs of a prediction job. The default: label maps as PNG, and overlays.

    Args:
        labels: Format of the label maps, ``STEM.png`` or ``STEM.tif``. Both have the colours of
            the classes as palette.
        overlays: Write ``overlays/STEM.png``.
        probabilities: Write ``probabilities/STEM.tif`` with one band per class, as ``"uint8"``
            (255 is 1) or ``"float16"``; None: do not.
        confidence: Write the probability of the most probable class, as ``confidence/STEM.png``
            (``"png"``: uint8, 255 is 1) or ``.tif`` (``"tif"``: float32); None: do not.
        polygons: Write ``polygons/STEM.geojson`` with all regions except those of the class
            ``background``.
        coco: Write one ``coco.json`` for all images.
        areas: Write one ``areas.csv`` for all images.
        min_region: Regions with fewer pixels take the class around them
            (``useg.inference.polygons``). Probabilities do not change.
        max_hole: Holes with fewer pixels are filled.
        objects: Write ``objects/STEM.tif`` with the number of each pixel's object, its table
            ``objects/STEM.csv``, and one ``objects.csv`` for all images. Polygons, COCO's
            annotations and counts are then those of objects.
        tool: Also write what an annotation tool imports: ``"labelme"`` (``labelme/STEM.json``),
            ``"cvat"`` (``cvat.xml``) or ``"label-studio"`` (``label_studio.json``); None: do not.

    Raises:
        SettingsError: An unknown format or a negative number of pixels.
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
    tool: str | None = None
    objects: bool = False

    def __post_init__(self) -> None:
        if self.tool is not None:
            choose("the annotation tool", self.tool, TOOL_FILES)
        choose("the format of label maps", self.labels, _LABEL_SUFFIXES)
        if self.probabilities is not None:
            choose("the format of probabilities", self.probabilities, _PROBABILITY_TYPES)
        if self.confidence is not None:
            choose("the format of confidence maps", self.confidence, _CONFIDENCE_WRITERS)
        for name, pixels in (("min_region", self.min_region), ("max_hole", self.max_hole)):
            if pixels < 0:
                raise SettingsError(
                    f"{name} is {pixels} pixels, but it cannot be negative; "
                    f"0 leaves label maps unchanged"
                )

    @property
    def only_labels(self) -> bool:
        """Whether label maps are not cleaned, and only they, overlays and objects are written."""
        return self == OutputOptions(self.labels, self.overlays, objects=self.objects)

    @property
    def of_each(self) -> str:
        """The outputs of a single image, as text; jobs with the same text write the same files."""
        text = repr(replace(self, coco=False, areas=False, tool=None))
        # Jobs of earlier versions, which had no such option, go on.
        return text.replace(", tool=None", "").replace(", objects=False", "")

    @property
    def needs_probabilities(self) -> bool:
        """Whether an output needs class probabilities."""
        return self.probabilities is not None or self.confidence is not None


@dataclass(frozen=True)
class ImagePrediction:
    """An image and what the model predicts for it.

    Args:
        image: Pixels as read, for the overlay.
        label: Predicted class ids ``(H, W)``.
        probabilities: ``(K, H, W)``; None if no output needs them.
        place: Where the image lies on a map, for the coordinates of polygons and TIFFs.
        objects: Its objects; None if they are not wanted.
        name: The file name of the image, for the table of its objects.
    """

    image: Image
    label: Label
    probabilities: Probabilities | None = None
    place: GeoReference | None = None
    objects: FoundObjects | None = None
    name: str = ""


def label_path(out: Path, stem: str, wanted: OutputOptions) -> Path:
    """Return where the label map of an image goes."""
    return out / f"{stem}{_LABEL_SUFFIXES[wanted.labels]}"


def list_outputs(out: Path, stem: str, wanted: OutputOptions) -> list[tuple[Path, Recognizer]]:
    """List what :func:`write_outputs` writes for an image, with what recognizes such files."""
    outputs: list[tuple[Path, Recognizer]] = [(label_path(out, stem, wanted), is_own_label_map)]
    if wanted.overlays:
        outputs.append((out / "overlays" / f"{stem}.png", is_own_picture))
    if wanted.probabilities:
        outputs.append((out / "probabilities" / f"{stem}.tif", is_own_tiff))
    if wanted.confidence:
        is_own = is_own_picture if wanted.confidence == "png" else is_own_tiff
        outputs.append((out / "confidence" / f"{stem}.{wanted.confidence}", is_own))
    if wanted.polygons:
        outputs.append((out / "polygons" / f"{stem}.geojson", is_own_geojson))
    if wanted.tool == "labelme":
        outputs.append((out / "labelme" / f"{stem}.json", is_own_annotation))
    if wanted.objects:
        from useg.objects.files import list_object_files

        outputs += list_object_files(out, stem)
    return outputs


def list_summaries(out: Path, wanted: OutputOptions) -> list[tuple[Path, Recognizer]]:
    """List what :func:`write_summaries` writes, with what recognizes such files."""
    summaries: list[tuple[Path, Recognizer]] = []
    if wanted.coco:
        summaries.append((out / "coco.json", is_own_coco))
    if wanted.areas:
        summaries.append((out / "areas.csv", is_own_csv(*AREAS_HEADER)))
    if wanted.objects:
        summaries.append((out / "objects.csv", is_own_csv(*OBJECTS_HEADER)))
    if wanted.tool and wanted.tool != "labelme":
        summaries.append((out / TOOL_FILES[wanted.tool][0], is_own_annotation))
    return summaries


def make_folders(out: Path, wanted: OutputOptions) -> None:
    """Create the folders of all outputs.

    Raises:
        UsageError: A folder cannot be written.
    """
    folders = {
        "overlays": wanted.overlays,
        "probabilities": wanted.probabilities,
        "confidence": wanted.confidence,
        "polygons": wanted.polygons,
        "labelme": wanted.tool == "labelme",
        "objects": wanted.objects,
    }
    for folder in (out, *(out / name for name, is_wanted in folders.items() if is_wanted)):
        make_folder(folder)


def find_georeference(path: Path) -> GeoReference | None:
    """Return where an image lies on a map, or None; only TIFFs can tell.

    Raises:
        UsageError: A damaged TIFF.
    """
    if path.suffix.lower() in _NO_MAP_SUFFIXES:
        return None
    from useg.images.tiff import read_georeference

    return read_georeference(path)


def label_image(
    predictor: Predictor,
    image: Image,
    wanted: OutputOptions,
    missing: NDArray[np.bool_] | None = None,
) -> ImagePrediction:
    """Return what a model predicts for an image: also probabilities and objects, if wanted.

    Where the image has no data (``missing``), the label is ``IGNORE`` and every probability is 0.
    The errors are those of a call of the predictor.
    """
    if not wanted.needs_probabilities and not wanted.objects:
        label = predictor(image)
        if missing is not None:
            label[missing] = IGNORE
        return ImagePrediction(image, label)
    logits, depth = predictor.logits_and_depth(image)
    label = most_probable(logits)
    probabilities = softmax(logits, predictor.temperature) if wanted.needs_probabilities else None
    if missing is not None:
        label[missing] = IGNORE
        if probabilities is not None:
            probabilities[:, missing] = 0
    objects = None
    if wanted.objects:
        from useg.objects.table import find_objects

        if wanted.min_region or wanted.max_hole:
            from useg.inference.polygons import clean_label_map

            label = clean_label_map(label, wanted.min_region, wanted.max_hole)
        temperature = predictor.temperature
        objects = find_objects(logits, depth, predictor.object_classes, temperature, label)
    return ImagePrediction(image, label, probabilities, objects=objects)


def write_outputs(
    out: Path,
    stem: str,
    prediction: ImagePrediction,
    table: ClassTable,
    wanted: OutputOptions,
    *,
    mark: str = "",
) -> Path:
    """Write all outputs of one image, each file whole or not at all.

    Args:
        out: Folder of the label maps; :func:`make_folders` created it and the others.
        stem: File name without suffix.
        prediction: The image and what the model predicts; small regions and holes are removed
            here, as ``wanted`` says.
        table: The classes.
        wanted: Outputs to write.
        mark: ASCII text to store in the label map, for :func:`is_done`.

    Returns:
        Path of the label map.

    Raises:
        UsageError: A file cannot be written.
    """
    label = prediction.label
    if wanted.min_region or wanted.max_hole:
        from useg.inference.polygons import clean_label_map

        label = clean_label_map(label, wanted.min_region, wanted.max_hole)
    if wanted.overlays:
        picture = overlay(to_picture(prediction.image), label, table)
        write_picture(out / "overlays" / f"{stem}.png", add_legend(picture, label, table))
    if wanted.needs_probabilities:
        _write_probabilities(out, stem, prediction, table, wanted)
    if wanted.objects:
        _write_objects(out, stem, prediction, table)
    if wanted.polygons:
        polygons = out / "polygons" / f"{stem}.geojson"
        _write_polygons(polygons, label, table, prediction.place, prediction.objects)
    target, mark = label_path(out, stem, wanted), mark or UNKEPT_LABEL_MARK
    if wanted.labels == "png":
        write_label(target, label, table, mark)
    else:
        _write_tiff(
            target,
            label,
            prediction.place,
            [(NO_DATA_TAG, "s", 0, str(IGNORE), True)] if (label == IGNORE).any() else (),
            photometric="palette",
            colormap=palette(table).T.astype(np.uint16) * 257,
            software=software_text(mark),
        )
    return target


def is_done(target: Path, mark: str) -> bool:
    """Whether a label map exists that was written with this mark; its pixels are not read."""
    if target.suffix == ".zarr":
        from useg.images.ome_zarr import mark_of

        return mark_of(target) == mark != ""
    if target.suffix == ".png" or not mark:
        return has_mark(target, mark)
    from useg.images.tiff import read_software

    try:
        return read_software(target) == software_text(mark)
    except DataError:
        return False


def software_text(mark: str) -> str:
    """Return the text of the tag ``SOFTWARE`` in a TIFF."""
    return f"useg {mark}".rstrip()


def _write_objects(out: Path, stem: str, prediction: ImagePrediction, table: ClassTable) -> None:
    from useg.objects.files import map_path, table_path, write_object_map, write_object_table

    found, place = prediction.objects, prediction.place
    assert found is not None
    shape = found.numbers.shape[0], found.numbers.shape[1]
    write_object_map(map_path(out, stem), found.numbers, shape, len(found), place)
    write_object_table(table_path(out, stem), prediction.name or stem, found.table, table, place)


def _write_polygons(
    path: Path,
    label: Label,
    table: ClassTable,
    place: GeoReference | None,
    objects: FoundObjects | None,
) -> None:
    from useg.data.annotations.rasterize import BACKGROUND
    from useg.inference.polygons import object_polygons, to_geojson, to_polygons

    if objects is None:
        polygons = [each for each in to_polygons(label) if table.names[each.value] != BACKGROUND]
    else:
        polygons = object_polygons(objects.numbers, objects.table.class_ids)
    content = to_geojson(polygons, table, place)
    # The mark comes first: a file is recognized by its start.
    text = GEOJSON_START.decode() + json.dumps(content, separators=(",", ":")).removeprefix(
        '{"type":"FeatureCollection"'
    )
    with replacing(path, is_own_geojson) as draft:
        draft.write_text(text, "utf-8")


def _write_probabilities(
    out: Path, stem: str, prediction: ImagePrediction, table: ClassTable, wanted: OutputOptions
) -> None:
    probabilities = prediction.probabilities
    assert probabilities is not None
    if wanted.probabilities:
        bands = _PROBABILITY_TYPES[wanted.probabilities](probabilities)
        _write_bands(out / "probabilities" / f"{stem}.tif", bands, table.names, prediction.place)
    if wanted.confidence:
        path = out / "confidence" / f"{stem}.{wanted.confidence}"
        _CONFIDENCE_WRITERS[wanted.confidence](path, probabilities.max(0), prediction.place)


def _write_bands(
    path: Path, bands: NDArray[Any], names: tuple[str, ...], place: GeoReference | None
) -> None:
    """Write ``(K, H, W)`` as a TIFF with named bands.

    The names stand as JSON in ImageDescription, and in GDAL's own tag.
    """
    description = json.dumps({"bands": names, "one": 255 if bands.dtype == np.uint8 else 1})
    # GDAL decodes the names twice.
    escaped = [escape(escape(name)) for name in names]
    items = "".join(
        f'<Item name="DESCRIPTION" sample="{k}" role="description">{name}</Item>'
        for k, name in enumerate(escaped)
    )
    metadata = f"<GDALMetadata>{items}</GDALMetadata>".encode()
    _write_tiff(
        path,
        bands,
        place,
        [(_GDAL_METADATA_TAG, "s", 0, metadata, True)],
        photometric="minisblack",
        planarconfig="separate" if len(bands) > 1 else None,
        description=description,
    )


def _write_tiff(
    path: Path,
    pixels: NDArray[Any],
    place: GeoReference | None,
    tags: Sequence[Any] = (),
    **options: Any,
) -> None:
    """Write a deflated TIFF.

    Level 1 with a horizontal predictor takes half the time of the default, and fewer bytes.
    """
    import tifffile

    options = {"software": software_text(""), **options}
    is_own = is_own_label_map if "colormap" in options else is_own_tiff
    with replacing(path, is_own) as draft:
        tifffile.imwrite(
            draft,
            pixels,
            metadata=None,
            extratags=[*tags, *(place.tags if place else ())],
            compression="deflate",
            compressionargs={"level": 1},
            predictor=options["photometric"] != "palette",
            **options,
        )


def _to_uint8(fractions: NDArray[np.float32]) -> NDArray[np.uint8]:
    scaled: NDArray[np.uint8] = np.rint(fractions * np.float32(255)).astype(np.uint8)
    return scaled


def _write_confidence_png(
    path: Path, confidence: NDArray[np.float32], place: GeoReference | None
) -> None:
    write_picture(path, _to_uint8(confidence))


def _write_confidence_tiff(
    path: Path, confidence: NDArray[np.float32], place: GeoReference | None
) -> None:
    _write_tiff(path, confidence, place, photometric="minisblack")


_PROBABILITY_TYPES: dict[str, Callable[[Probabilities], NDArray[Any]]] = {
    "uint8": _to_uint8,
    "float16": lambda fractions: fractions.astype(np.float16),
}

_CONFIDENCE_WRITERS = {"png": _write_confidence_png, "tif": _write_confidence_tiff}


def write_summaries(
    out: Path,
    pairs: Sequence[tuple[Path, Path]],
    table: ClassTable,
    wanted: OutputOptions,
    *,
    done: Callable[[Path, Path], bool] = lambda image, label: label.exists(),
) -> list[Path]:
    """Write ``coco.json``, ``areas.csv`` and ``objects.csv``, as ``wanted`` says, from files.

    They are made from the existing label maps and the tables of objects beside them.

    Args:
        out: Folder to write into.
        pairs: All images of the job and their label maps, in the order of the summaries, whichever
            process makes them. Images without label map are left out.
        table: The classes.
        wanted: Outputs to write.
        done: Whether the label map of an image exists and belongs to this job.

    Returns:
        The files written.

    Raises:
        UsageError: A file cannot be written, or a label map cannot be read.
    """
    numbered = [LabelledImage(number, *pair) for number, pair in enumerate(pairs, 1)]
    written: list[LabelledImage] = []
    # One process at a time. It repeats its work if others finished images meanwhile, so the last
    # writer includes all of them, also on a disk without locks.
    with locked_folder(out, wait=True):
        while (entries := [one for one in numbered if done(one.image, one.label)]) != written:
            folder = out / "objects" if wanted.objects else None
            if wanted.coco:
                write_coco(out / "coco.json", entries, table, folder)
            if wanted.areas:
                write_areas(out / "areas.csv", entries, table, folder)
            if folder:
                from useg.objects.files import write_objects_csv

                tables = [folder / f"{entry.image.stem}.csv" for entry in entries]
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
    from useg.data.annotations.rasterize import BACKGROUND

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
    with replacing(target, is_own_coco) as draft, draft.open("w", encoding="utf-8") as file:
        file.write(f'{COCO_START.decode()},\n"images": {json.dumps(images)},\n')
        file.write(f'"categories": {json.dumps(categories)},\n"annotations": [')

        def annotate(entry: LabelledImage) -> list[dict[str, Any]]:
            if objects is None:
                return coco_annotations(read_mask(entry.label), background)
            return _object_annotations(objects, entry.image.stem, table)

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
    from useg.scoring.regions import regions

    numbers = regions(label)
    values = np.empty(int(numbers.max()) + 1, np.int64)
    values[numbers] = label
    values[values == background] = IGNORE
    return annotate_regions(numbers, values)


def _object_annotations(folder: Path, stem: str, table: ClassTable) -> list[dict[str, Any]]:
    """Describe the objects of an image, from their map and their table; the score is confidence."""
    from useg.objects.files import read_object_map, read_object_rows

    rows = list(read_object_rows(folder / f"{stem}.csv"))
    ids = {to_cell(name): k for k, name in enumerate(table.names)}
    # Number 0, which is outside, has no row.
    values = np.array([IGNORE, *(ids[row["class"]] for row in rows)], np.int64)
    annotations = annotate_regions(read_object_map(folder / f"{stem}.tif"), values)
    for row, annotation in zip(rows, annotations, strict=True):
        annotation["score"] = float(row["confidence"])
    return annotations


def annotate_regions(numbers: NDArray[Any], values: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Describe the regions of a map ``(H, W)`` in the order of their numbers.

    Args:
        numbers: The number of each pixel's region.
        values: The class of each number; ``IGNORE`` leaves it out.
    """
    from useg.data.annotations.rasterize import compress_rle

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
    from useg.objects.files import count_objects

    places = [find_georeference(entry.image) for entry in entries]
    counted_column = ["objects"] if objects else []
    header = [*AREAS_HEADER, *counted_column, *(["area"] if any(places) else [])]
    counted = in_parallel(
        lambda entry: np.bincount(read_mask(entry.label).ravel(), minlength=256)[: len(table)],
        entries,
    )
    is_own = is_own_csv(*AREAS_HEADER)
    with replacing(target, is_own) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(header)
        for entry, place, counts in zip(entries, places, counted, strict=True):
            found = count_objects(objects / f"{entry.image.stem}.csv") if objects else {}
            for name, pixels in zip(table.names, counts.tolist(), strict=True):
                area = [pixels * place.pixel_area if place else ""] if any(places) else []
                number = [found.get(to_cell(name), 0)] if objects else []
                share = f"{pixels / max(1, counts.sum()):.6f}"
                cells = [to_cell(entry.image.name), to_cell(name), pixels, share]
                rows.writerow([*cells, *number, *area])
