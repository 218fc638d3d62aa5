"""Write the outputs of an image: label map, overlay, probabilities, confidence, polygons, objects.

The label map of an image is written last, so if it exists, all other outputs of the image do too.
It stores a mark of what it was made from: the model, the options, and the image. What summarises
a whole job is made afterwards (:mod:`useg.inference.summaries`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, ClassTable, Label, most_probable, palette, softmax
from useg.errors import DataError, SettingsError, choose
from useg.files import make_folder, replacing
from useg.images.formats import IMAGE_SUFFIXES
from useg.images.image_files import Image, has_mark, write_label, write_picture
from useg.images.tiff import NO_DATA_TAG
from useg.models.segmenter import model_file
from useg.ownership import (
    AREAS_HEADER,
    GEOJSON_START,
    LABEL_MARK,
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
from useg.parsing import open_file, read_limited
from useg.visualization import add_legend, overlay, to_picture

if TYPE_CHECKING:
    from useg.images.tiff import GeoReference
    from useg.inference.predictor import Predictor
    from useg.objects.table import FoundObjects

Probabilities = NDArray[np.float32]  # (K, H, W)

# TIFF tags: the program that wrote the file, and GDAL's XML, where GDAL and QGIS read band names.
SOFTWARE_TAG = 305
_GDAL_METADATA_TAG = 42112

# What is written for each annotation tool: a file, or a folder with a file for each image.
TOOL_FILES = {"labelme": "labelme", "cvat": "cvat.xml", "label-studio": "label_studio.json"}

# Of larger files only the first and the last megabyte are digested.
MAX_DIGESTED_BYTES = 256 << 20

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
        # Jobs that an earlier version began, without this option, can continue.
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
    """List what :func:`write_outputs` writes for an image, with what recognises such files."""
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
        from useg.objects.table import list_object_files

        outputs += list_object_files(out, stem)
    return outputs


def list_summaries(out: Path, wanted: OutputOptions) -> list[tuple[Path, Recognizer]]:
    """List what :mod:`useg.inference.summaries` writes, with what recognises such files."""
    summaries: list[tuple[Path, Recognizer]] = []
    if wanted.coco:
        summaries.append((out / "coco.json", is_own_coco))
    if wanted.areas:
        summaries.append((out / "areas.csv", is_own_csv(*AREAS_HEADER)))
    if wanted.objects:
        summaries.append((out / "objects.csv", is_own_csv(*OBJECTS_HEADER)))
    if wanted.tool and wanted.tool != "labelme":
        summaries.append((out / TOOL_FILES[wanted.tool], is_own_annotation))
    return summaries


def make_folders(out: Path, wanted: OutputOptions) -> None:
    """Create the folders of all outputs.

    Raises:
        UsageError: A folder cannot be written.
    """
    outputs = list_outputs(out, "", wanted)
    for folder in dict.fromkeys((out, *(path.parent for path, _ in outputs))):
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
    Small regions and holes of the label are removed if ``wanted`` asks for it. The errors are those
    of a call of the predictor.
    """
    if not wanted.needs_probabilities and not wanted.objects:
        return ImagePrediction(image, _clean(predictor(image), wanted, missing))
    outputs = predictor.pixel_outputs(image) if wanted.objects else None
    logits = outputs.logits if outputs else predictor.logits(image)
    label, probabilities, objects = _clean(most_probable(logits), wanted, missing), None, None
    if wanted.needs_probabilities:
        probabilities = softmax(logits, predictor.temperature)
    if probabilities is not None and missing is not None:
        probabilities[:, missing] = 0
    if outputs:
        from useg.objects.table import find_objects

        objects = find_objects(outputs, predictor.object_classes, predictor.temperature, label)
    return ImagePrediction(image, label, probabilities, objects=objects)


def _clean(label: Label, wanted: OutputOptions, missing: NDArray[np.bool_] | None) -> Label:
    """Remove small regions and holes, and the classes of pixels without data."""
    if missing is not None:
        label[missing] = IGNORE
    if not wanted.min_region and not wanted.max_hole:
        return label
    from useg.inference.polygons import clean_label_map

    return clean_label_map(label, wanted.min_region, wanted.max_hole)


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
        prediction: The image and what the model predicts.
        table: The classes.
        wanted: Outputs to write.
        mark: ASCII text to store in the label map, for :func:`is_done`.

    Returns:
        Path of the label map.

    Raises:
        UsageError: A file cannot be written.
    """
    label = prediction.label
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
        _write_label_tiff(target, prediction, table, mark)
    return target


def _write_label_tiff(
    target: Path, prediction: ImagePrediction, table: ClassTable, mark: str
) -> None:
    label = prediction.label
    _write_tiff(
        target,
        label,
        prediction.place,
        [(NO_DATA_TAG, "s", 0, str(IGNORE), True)] if (label == IGNORE).any() else (),
        photometric="palette",
        colormap=palette(table).T.astype(np.uint16) * 257,
        software=software_text(mark),
    )


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


def predictor_fingerprint(predictor: Predictor, wanted: OutputOptions) -> str:
    """Return :func:`model_fingerprint` of a loaded model; ``""`` if it was made in memory."""
    models = []
    for runtime in predictor.runtimes:
        path = model_file(runtime.source)
        if not path.is_file():
            return ""
        models.append((path, runtime.name))
    return model_fingerprint(models, predictor.augment, wanted)


def model_fingerprint(
    models: Iterable[tuple[Path, str]], augment: str, wanted: OutputOptions
) -> str:
    """Identify everything that determines a label map except its image.

    Args:
        models: Model files, each with the name of the runtime that computes it. An OpenVINO
            ``.xml`` contains a digest of its ``.bin``.
        augment: Test-time augmentation.
        wanted: Outputs to write.
    """
    digests = []
    for path, runtime in models:
        with open_file(path) as file:
            digests.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()} {runtime}")
    return f"{' '.join(digests)} {augment} {wanted.of_each}"


def identify_image(path: Path) -> str:
    """Identify the content of an image.

    That is the time of its file and a digest of it, so copies on several machines are the same
    image. Of a very large file, or of the folder of an OME-Zarr, it is a digest of its ends or its
    description, with its place, size and times.

    Raises:
        OSError: It cannot be read.
    """
    status = path.stat()
    place = f"{os.path.realpath(path)} {status.st_dev} {status.st_ino}"
    if path.is_dir():
        from useg.images.ome_zarr import MAX_METADATA_BYTES, METADATA, size_and_time

        texts = [path / name for name in METADATA if (path / name).is_file()]
        content = b"".join(read_limited(text, MAX_METADATA_BYTES) for text in texts)
        return f"{hashlib.sha256(content).hexdigest()} {size_and_time(path)} {place}"
    with open_file(path) as file:
        if status.st_size <= MAX_DIGESTED_BYTES:
            return f"{hashlib.file_digest(file, 'sha256').hexdigest()} {status.st_mtime_ns}"
        digest = hashlib.sha256(file.read(1 << 20))
        file.seek(-1 << 20, os.SEEK_END)
        digest.update(file.read())
    times = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    return f"{digest.hexdigest()} {times} {place}"


def mark_of_version(fingerprint: str, name: str, version: str) -> str:
    """Identify what a label map was made from, as a text with 64 hexadecimal digits.

    Args:
        fingerprint: Model and options, see :func:`model_fingerprint`.
        name: File name of the image.
        version: Identifies its content, see :func:`identify_image`.
    """
    content = f"{fingerprint} {version} ".encode("utf-8", "surrogateescape") + os.fsencode(name)
    return LABEL_MARK + hashlib.sha256(content).hexdigest()


def software_text(mark: str) -> str:
    """Return the text of the tag ``SOFTWARE`` in a TIFF."""
    return f"useg {mark}".rstrip()


def _write_objects(out: Path, stem: str, prediction: ImagePrediction, table: ClassTable) -> None:
    from useg.objects.table import map_path, table_path, write_object_map, write_object_table

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
    from useg.data.annotations.shapes import BACKGROUND
    from useg.inference.polygons import object_polygons, to_geojson, to_polygons

    if objects is None:
        polygons = [each for each in to_polygons(label) if table.names[each.value] != BACKGROUND]
    else:
        polygons = object_polygons(objects.numbers, objects.table.class_ids)
    content = to_geojson(polygons, table, place)
    # The mark comes first: a file is recognised by its start.
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
