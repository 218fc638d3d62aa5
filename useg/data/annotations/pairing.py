"""A folder with annotation files (COCO, CVAT, LabelMe, ...) -> pairs of an image and its shapes.

Images are found by the names in the files, wherever they lie in the folder; nothing outside it is
read. An image that no file names is left out, since annotation files often cover only a part of
the images. An image that is named without shapes is background everywhere.

A file that cannot be read, or is of another tool, does not stop the rest: it is skipped and
listed. Only if nothing is left to read, its reason becomes the error.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from useg.data.annotations.drawing_tools import (
    is_cityscapes,
    is_cvat,
    is_imagescope,
    is_labelme,
    is_via,
    is_via_csv,
    read_cityscapes,
    read_cvat,
    read_imagescope,
    read_labelme,
    read_via,
    read_via_csv,
)
from useg.data.annotations.formats import (
    AnnotatedImage,
    Annotations,
    Reading,
    find_entry_split,
    join_annotations,
    read_bytes,
    read_json,
    read_json_lines,
    read_xml,
)
from useg.data.annotations.interchange import (
    begins_like_yolo,
    find_label_file,
    is_coco,
    is_coco_panoptic,
    is_polygon_list,
    read_coco,
    read_coco_panoptic,
    read_polygon_list,
    read_yolo,
)
from useg.data.annotations.platforms import (
    find_brush_masks,
    is_label_studio,
    is_supervisely,
    read_label_studio,
    read_supervisely,
)
from useg.data.annotations.run_lengths import (
    is_run_length_csv,
    is_run_length_json,
    read_run_length_json,
    read_run_lengths,
)
from useg.data.annotations.shapes import Drawing
from useg.data.dataset import DetectedLayout, Pair
from useg.data.official_splits import find_official_splits
from useg.errors import DataError, format_count, join_names
from useg.files import list_files, natural_key
from useg.images.image_files import list_image_files, read_size
from useg.machine import paused_garbage_collection

Test = Callable[[Any], bool]
Read = Callable[[Path, Any, Reading], Annotations]

# Formats of JSON files: name, how it is recognised, how it is read.
_JSON_FORMATS: tuple[tuple[str, Test, Read], ...] = (
    ("COCO", is_coco, read_coco),
    ("COCO for panoptic segmentation", is_coco_panoptic, read_coco_panoptic),
    ("LabelMe", is_labelme, read_labelme),
    ("Supervisely", is_supervisely, read_supervisely),
    ("Label Studio", is_label_studio, read_label_studio),
    ("VIA", is_via, read_via),
    ("Cityscapes' polygons", is_cityscapes, read_cityscapes),
    ("polygons by image", is_polygon_list, read_polygon_list),
    ("run lengths", is_run_length_json, read_run_length_json),
)

# If files of several formats annotate the images, the first of these counts: a tool's own files may
# lie beside its export.
_PRIORITY = (
    *("coco", "cvat", "supervisely", "label studio", "via", "labelme", "cityscapes polygons"),
    *("imagescope", "polygons by image", "run lengths", "coco panoptic"),
)


# Formats whose masks are pictures that the annotation file describes.
_DESCRIBED = ("coco panoptic", "label studio")


def _has(*keys: str) -> Test:
    return lambda content: isinstance(content, dict) and content.keys() >= set(keys)


def _lists(*keys: str) -> Test:
    return lambda content: isinstance(content, list) and bool(content) and _has(*keys)(content[0])


# JSON of other tools: name, how it is recognised, what to do.
_OTHER_JSON: tuple[tuple[str, Test, str], ...] = (
    ("VoTT", _has("asset", "regions"), "convert it to COCO, for example with Datumaro"),
    ("VoTT", _has("assets", "tags"), "convert it to COCO, for example with Datumaro"),
    ("Darwin (V7)", _has("item", "annotations"), "export COCO in V7"),
    ("Datumaro", _has("items", "categories"), "export it as COCO"),
    ("ISAT", _has("info", "objects"), "export COCO or LabelMe in ISAT"),
    ("GeoJSON", _has("type", "features"), "rasterise it to a mask for each image, for example "
     "with gdal_rasterize, or in QuPath by exporting labelled images"),
    ("COCO's results", _lists("image_id", "category_id"), "add images and categories: useg needs "
     "the annotation file, not a model's predictions"),
    ("Encord", _lists("label_hash"), "export COCO in Encord"),
    ("Labelbox", _lists("data_row"), "export masks in Labelbox, or convert it to COCO"),
    ("Labelbox", _has("data_row"), "export masks in Labelbox, or convert it to COCO"),
    ("CreateML", _lists("image", "annotations"), "it has boxes only: export outlines"),
    ("Hasty", _has("export_format_version", "images"), "export COCO in Hasty"),
    ("SuperAnnotate", _has("metadata", "instances"), "convert it to COCO with SuperAnnotate's SDK"),
    ("Kili", _lists("jsonResponse"), "export COCO in Kili"),
    ("nuImages", _lists("sample_data_token", "mask"), "save the masks that get_segmentation of "
     "nuImages' devkit returns"),
    ("Dataloop", _has("filename", "annotations"), "export COCO in Dataloop"),
    ("Scale", _lists("task_id", "response"), "convert it to COCO"),
    ("Segment Anything (SA-1B)", _has("image", "annotations"), "its masks have no classes: draw "
     "those of your classes into a mask for each image"),
)  # fmt: skip


def find_annotated(root: Path) -> DetectedLayout | None:
    """Return the annotated images of a folder, or None if it has no annotation files.

    Raises:
        DataError: No annotation file can be read, or none of its images is there; or a name fits
            several images.
    """
    images = list_image_files(root)
    if not images:
        return None
    reading = Reading(root, images)
    files = list_files(root, _READERS)
    found = _pair_files(reading, files) or _find_yolo(reading)
    if found is None and reading.skipped:
        raise DataError(reading.skipped[0].reason)
    if found is None and find_brush_masks(images):
        raise DataError(
            f"'{root}' has masks of Label Studio, such as task-1-annotation-2-by-3-tag-NAME-0.png, "
            "whose names do not say to which image they belong; export the project as JSON too "
            "and put it there, or export COCO"
        )
    return found


def find_described(root: Path, masks: Sequence[Path]) -> DetectedLayout | None:
    """Return what annotation files say of masks whose pixels do not name their classes, or None.

    Raises:
        DataError: Masks of Label Studio lie there without the project's JSON.
    """
    try:
        described = find_annotated(root)
    except DataError:
        if find_brush_masks(masks):
            raise
        return None
    return described if described and described.layout in _DESCRIBED else None


def pair_annotated(
    root: Path, images: Sequence[Path], files: Sequence[Path]
) -> DetectedLayout | None:
    """Pair these images with these annotation files; other files are skipped.

    Raises:
        DataError: As :func:`find_annotated`.
    """
    reading = Reading(root, images)
    found = _pair_files(reading, files)
    if found is None and reading.skipped:
        raise DataError(reading.skipped[0].reason)
    return found


def _pair_files(reading: Reading, files: Sequence[Path]) -> DetectedLayout | None:
    annotations = _read_files(files, reading)
    if annotations is None:
        return None
    located = [(reading.find(entry), entry) for entry in annotations.entries]
    if annotations.layout == "labelme":
        _refuse_crossed(reading, located)
    alone = [entry for image, entry in located if image is None]
    if alone and len(alone) == len(located):
        raise DataError(
            f"'{alone[0].file}' names images such as '{alone[0].image}', but '{reading.root}' has "
            "none of them; put them there, or write a dataset.toml with the place of the images: "
            f'images = "../photos/*.jpg", masks = "{alone[0].file.name}"'
        )
    found = _to_layout(
        reading, annotations, [(image, entry) for image, entry in located if image is not None]
    )
    return replace(found, masks=tuple(Path(f"{entry.file}#{entry.image}") for entry in alone))


def _refuse_crossed(
    reading: Reading, located: Sequence[tuple[Path | None, AnnotatedImage]]
) -> None:
    """Refuse a file that names an image, but lies beside another one that has the file's name."""
    beside = {path.with_suffix(""): path for path in reading.images}
    for image, entry in located:
        own = beside.get(entry.file.with_suffix(""))
        if image and own and image.with_suffix("") != own.with_suffix(""):
            raise DataError(
                f"'{entry.file}' says that it annotates '{entry.image}', but the image beside it "
                f"with the same name is '{own.name}'; correct the imagePath in it, or rename one "
                "of them"
            )


def _read_files(files: Sequence[Path], reading: Reading) -> Annotations | None:
    """Read all annotations of one format; those of others are skipped."""
    # COCO has files with captions and key points of the same images beside these.
    instances = {path.parent for path in files if path.stem.startswith("instances")}
    parts: dict[str, list[Annotations]] = defaultdict(list)
    for path in files:
        if path.parent in instances and not path.stem.startswith("instances"):
            continue
        with paused_garbage_collection():
            found = _READERS[path.suffix.lower()](path, reading)
        if found is not None:
            parts[found.layout].append(found)
    full = [name for name in _PRIORITY if any(part.entries for part in parts[name])]
    if not full:
        return None
    for name in full[1:]:
        _skip_other(full[0], parts[name], reading)
    return join_annotations(parts[full[0]])


def _skip_other(layout: str, parts: Sequence[Annotations], reading: Reading) -> None:
    entries = [entry for part in parts for entry in part.entries]
    reading.skip(
        entries[0].file,
        f"{format_count(len(entries), 'image')} in {parts[0].layout} files, such as "
        f"'{entries[0].file}', are not read, because other files have the format {layout}; to "
        f"read the {parts[0].layout} files, remove the others, or name the files in dataset.toml",
    )


def _read_json_file(path: Path, reading: Reading) -> Annotations | None:
    with reading.skipping(path, "JSON"):
        has_lines = path.suffix.lower() != ".json"
        content = read_json_lines(path) if has_lines else read_json(path)
        for name, is_format, read in _JSON_FORMATS:
            if is_format(content):
                with reading.skipping(path, name):
                    return read(path, content, reading)
                return None
        for name, is_other, advice in _OTHER_JSON:
            if is_other(content):
                reading.skip(
                    path, f"'{path}' has the format {name}, which useg does not read; {advice}"
                )
                break
    return None


def _read_xml_file(path: Path, reading: Reading) -> Annotations | None:
    with reading.skipping(path, "XML"):
        root = read_xml(path)
        if is_cvat(root):
            with reading.skipping(path, "CVAT for images"):
                return read_cvat(path, root, reading)
        elif is_imagescope(root):
            return read_imagescope(path, root, reading)
        elif root.tag == "annotation" and root.find("object") is not None:
            name, advice = _describe_object_xml(root)
            reading.skip(
                path, f"'{path}' has the format {name}, which useg does not read; {advice}"
            )
    return None


def _describe_object_xml(root: Element) -> tuple[str, str]:
    if root.find("object/polygon") is not None:
        return "LabelMe's XML", "export LabelMe's JSON, COCO, or 'CVAT for images 1.1'"
    return (
        "of Pascal VOC for detection",
        "it has boxes only: use the masks in SegmentationClass, or export outlines",
    )


def _read_csv_file(path: Path, reading: Reading) -> Annotations | None:
    if is_via_csv(path):
        with reading.skipping(path, "VIA"):
            return read_via_csv(path, read_bytes(path), reading)
    elif is_run_length_csv(path):
        with reading.skipping(path, "run lengths"):
            return read_run_lengths(path, read_bytes(path), reading)
    return None


_READERS = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), _read_json_file),
    ".xml": _read_xml_file,
    **dict.fromkeys((".csv", ".tsv"), _read_csv_file),
}


def _to_layout(
    reading: Reading, annotations: Annotations, located: Sequence[tuple[Path, AnnotatedImage]]
) -> DetectedLayout:
    entries: dict[Path, AnnotatedImage] = {}
    for image, entry in located:
        if reading.is_lost(entry):
            continue
        if image in entries and entries[image].drawing != entry.drawing:
            raise DataError(
                f"'{image}' is annotated twice, in '{entries[image].file}' and in '{entry.file}'; "
                "keep one of them"
            )
        entries.setdefault(image, entry)
    if not any(entry.drawing.shapes for entry in entries.values()):
        if reading.skipped:
            raise DataError(reading.skipped[0].reason)
        raise DataError(
            f"no image in '{reading.root}' has a shape in its {annotations.layout} file, such as "
            f"'{located[0][1].file}'; annotate some"
        )
    splits = find_official_splits(entries, reading.root)
    pairs = (
        Pair(
            image,
            entry.file,
            find_entry_split(entry) or splits[image],
            truth=_with_size(entry, image),
        )
        for image, entry in sorted(entries.items(), key=lambda item: natural_key(item[0]))
    )
    classes = annotations.classes
    drawings = (entry.drawing for _, entry in located)
    stored = {shape.mask.path for each in drawings for shape in each.shapes if shape.mask}
    others = {*reading.images} - {image for image, _ in located} - stored
    folders = {image.parent for image in entries}
    return DetectedLayout(
        annotations.layout,
        tuple(pairs),
        classes=classes,
        notes=(*annotations.notes, *_describe_spellings(classes.names)),
        skipped=tuple(dict.fromkeys(reading.skipped)),
        unnamed=tuple(path for path in reading.images if path in others and path.parent in folders),
    )


def _describe_spellings(names: Sequence[str]) -> Iterator[str]:
    """Say that names of classes differ only in capitals, spaces or the like."""
    spellings: dict[str, list[str]] = defaultdict(list)
    for name in names:
        spellings[re.sub(r"[\s_-]+", " ", name).strip().casefold()].append(name)
    for found in spellings.values():
        if len(found) > 1:
            listed = join_names([repr(name) for name in found])
            yield (
                f"the classes {listed} have nearly the same "
                "name, but count as different classes; if they are one class, give them one name "
                "in the annotation files"
            )


def _with_size(entry: AnnotatedImage, image: Path) -> Drawing:
    return (
        replace(entry.drawing, size=read_size(image))
        if entry.drawing.size == (0, 0)
        else entry.drawing
    )


def _find_yolo(reading: Reading) -> DetectedLayout | None:
    root = reading.root
    places = [(image, find_label_file(image, root)) for image in reading.images]
    pairs = [(image, labels) for image, labels in places if labels is not None]
    if any(labels.is_file() for _, labels in pairs):
        return _pair_yolo(reading, pairs)
    # Darknet keeps the text files beside the images.
    texts = set(list_files(root, (".txt",)))
    beside = [(image, image.with_suffix(".txt")) for image in reading.images] if texts else []
    folders = {path.parent for _, path in beside if path in texts and begins_like_yolo(path)}
    pairs = [(image, path) for image, path in beside if path.parent in folders]
    return _pair_yolo(reading, pairs) if pairs else None


def pair_yolo(root: Path, pairs: Sequence[tuple[Path, Path]]) -> DetectedLayout:
    """Read YOLO's text files; a YAML file or ``classes.txt`` in ``root`` may name the classes.

    Args:
        root: The folder.
        pairs: Images and their text files, which need not exist.

    Raises:
        DataError: As :func:`useg.data.annotations.interchange.read_yolo`.
    """
    return _pair_yolo(Reading(root, [image for image, _ in pairs]), pairs)


def _pair_yolo(reading: Reading, pairs: Sequence[tuple[Path, Path]]) -> DetectedLayout:
    name_files = [
        *list_files(reading.root, (".yaml", ".yml")),
        *(path for path in list_files(reading.root, (".txt",)) if path.name == "classes.txt"),
        *list_files(reading.root, (".names",)),
    ]
    with paused_garbage_collection():
        annotations = read_yolo(pairs, name_files, reading)
    images = [image for image, _ in pairs]
    return _to_layout(reading, annotations, list(zip(images, annotations.entries, strict=True)))
