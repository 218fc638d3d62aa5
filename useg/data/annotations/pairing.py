"""A folder with annotation files (COCO, CVAT, LabelMe, YOLO) -> pairs of an image and its shapes.

Images are found by the names in the files, wherever they lie in the folder; nothing outside it is
read. An image that no file names is left out, since annotation files often cover only a part of
the images. An image that is named without shapes is background everywhere.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from useg.data.annotations.formats import (
    AnnotatedImage,
    Annotations,
    collect_class_names,
    find_label_file,
    is_coco,
    is_cvat,
    is_labelme,
    read_coco,
    read_cvat,
    read_json,
    read_labelme,
    read_xml,
    read_yolo,
)
from useg.data.annotations.rasterize import Drawing
from useg.data.dataset import SPLIT_FOLDERS, DetectedLayout, Pair
from useg.data.file_lists import list_files, list_image_files
from useg.data.official_splits import find_official_split
from useg.errors import DataError
from useg.images.files import natural_key, read_size


def find_annotated(root: Path) -> DetectedLayout | None:
    """Return the annotated images of a folder, or None if it has no annotation files.

    Raises:
        DataError: An annotation file is damaged or does not fit its format; none of its images is
            there, or a name fits several images.
    """
    images = list_image_files(root)
    if not images:
        return None
    files = list_files(root, (".json", ".xml"))
    return pair_annotated(root, images, files) or _find_yolo(root, images)


def pair_annotated(
    root: Path, images: Sequence[Path], files: Sequence[Path]
) -> DetectedLayout | None:
    """Pair these images with these JSON and XML files; files that are no annotations are skipped.

    Raises:
        DataError: As :func:`find_annotated`.
    """
    annotations = _read_files(files)
    if annotations is None:
        return None
    places: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        places[image.name].append(image)
        if annotations.layout == "labelme":
            # An image may have been renamed together with its annotation file.
            places[image.stem].append(image)
    located = [(_locate(entry, places, root), entry) for entry in annotations.entries]
    alone = [entry for image, entry in located if image is None]
    if alone and len(alone) == len(located):
        raise DataError(
            f"'{alone[0].file}' names images such as '{alone[0].image}', but '{root}' has none of "
            "them; put them there, or write a dataset.toml with the place of the images: "
            f'images = "../photos/*.jpg", masks = "{alone[0].file.name}"'
        )
    found = _to_layout(
        root, annotations, [(image, entry) for image, entry in located if image is not None]
    )
    return replace(found, masks=tuple(Path(f"{entry.file}#{entry.image}") for entry in alone))


def _read_files(files: Sequence[Path]) -> Annotations | None:
    """Read all annotations of one format.

    COCO comes before CVAT before LabelMe, since a tool's own files may lie beside its export.
    """
    # COCO has files with captions and key points of the same images beside these.
    instances = {path.parent for path in files if path.stem.startswith("instances")}
    coco, cvat, labelme = [], [], []
    for path in files:
        if path.suffix.lower() == ".xml":
            root = read_xml(path)
            cvat += [read_cvat(path, root)] if is_cvat(root) else []
        elif path.parent not in instances or path.stem.startswith("instances"):
            content = read_json(path)
            coco += [read_coco(path, content)] if is_coco(content) else []
            labelme += [read_labelme(path, content)] if is_labelme(content) else []
    if coco or cvat:
        return _join(coco or cvat)
    return Annotations("labelme", tuple(labelme), collect_class_names(labelme)) if labelme else None


def _join(parts: Sequence[Annotations]) -> Annotations:
    entries = tuple(entry for part in parts for entry in part.entries)
    return Annotations(
        parts[0].layout,
        entries,
        tuple(name for part in parts for name in part.names),
        tuple(color for part in parts for color in part.colors),
    )


def _locate(entry: AnnotatedImage, places: dict[str, list[Path]], root: Path) -> Path | None:
    """Find the image that an entry names.

    Of several images with that name, it is the one that agrees best with the path in the file and
    with the file's own place.

    Raises:
        DataError: Several images agree equally well.
    """
    named = PurePosixPath(entry.image.replace("\\", "/")).parts
    candidates = places.get(named[-1] if named else "") or places.get(entry.file.stem, [])
    scores = {path: _score_agreement(path, entry, named, root) for path in candidates}
    best = [path for path, score in scores.items() if score == max(scores.values())]
    if len(best) > 1:
        raise DataError(
            f"'{entry.file}' names the image '{entry.image}', which could be '{best[0]}' or "
            f"'{best[1]}'; give the images different names, or put each annotation file beside "
            "its images"
        )
    return best[0] if best else None


def _score_agreement(
    path: Path, entry: AnnotatedImage, named: Sequence[str], root: Path
) -> tuple[int, bool, int]:
    parts = path.relative_to(root).parts if path.is_relative_to(root) else path.parts
    return (
        _count_common(reversed(parts), reversed(named)),
        find_official_split(path, root) == _find_entry_split(entry),
        _count_common(path.parts[:-1], entry.file.parts[:-1]),
    )


def _count_common(some: Iterable[str], others: Iterable[str]) -> int:
    """Count the leading items that are equal."""
    count = 0
    for one, other in zip(some, others, strict=False):
        if one != other:
            break
        count += 1
    return count


def _find_entry_split(entry: AnnotatedImage) -> str:
    """Return an entry's split, from its file's content or name: ``instances_train2017.json``."""
    words = [entry.split, *re.split(r"[^a-z]+", entry.file.stem.casefold())]
    return next((SPLIT_FOLDERS[word] for word in words if word in SPLIT_FOLDERS), "")


def _to_layout(
    root: Path, annotations: Annotations, located: Sequence[tuple[Path, AnnotatedImage]]
) -> DetectedLayout:
    entries: dict[Path, AnnotatedImage] = {}
    for image, entry in located:
        if image in entries:
            raise DataError(
                f"'{image}' is annotated twice, in '{entries[image].file}' and in '{entry.file}'; "
                "keep one of them"
            )
        entries[image] = entry
    if not any(entry.drawing.shapes for entry in entries.values()):
        raise DataError(
            f"no image in '{root}' has a shape in its {annotations.layout} file, such as "
            f"'{located[0][1].file}'; annotate some"
        )
    pairs = (
        Pair(
            image,
            entry.file,
            _find_entry_split(entry) or find_official_split(image, root),
            truth=_with_size(entry, image),
        )
        for image, entry in sorted(entries.items(), key=lambda item: natural_key(item[0]))
    )
    return DetectedLayout(annotations.layout, tuple(pairs), classes=annotations.classes)


def _with_size(entry: AnnotatedImage, image: Path) -> Drawing:
    return (
        replace(entry.drawing, size=read_size(image))
        if entry.drawing.size == (0, 0)
        else entry.drawing
    )


def _find_yolo(root: Path, images: Sequence[Path]) -> DetectedLayout | None:
    places = [(image, find_label_file(image, root)) for image in images]
    pairs = [(image, labels) for image, labels in places if labels is not None]
    return pair_yolo(root, pairs) if any(labels.is_file() for _, labels in pairs) else None


def pair_yolo(root: Path, pairs: Sequence[tuple[Path, Path]]) -> DetectedLayout:
    """Read YOLO's text files; a YAML file or ``classes.txt`` in ``root`` may name the classes.

    Args:
        root: The folder.
        pairs: Images and their text files, which need not exist.

    Raises:
        DataError: As :func:`useg.data.annotations.formats.read_yolo`.
    """
    name_files = [
        *list_files(root, (".yaml", ".yml")),
        *(path for path in list_files(root, (".txt",)) if path.name == "classes.txt"),
    ]
    annotations = read_yolo(pairs, name_files)
    images = [image for image, _ in pairs]
    return _to_layout(root, annotations, list(zip(images, annotations.entries, strict=True)))
