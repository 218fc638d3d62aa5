"""A folder with annotation files (COCO, CVAT, LabelMe, YOLO) -> pairs of picture and drawing.

Pictures are found by the names in the files, wherever they lie in the folder; nothing outside it is read. A picture that no file names is left
out: annotation files often cover a part of the pictures. One that is named without shapes is all background.
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
from useg.data.pairing import find_official_split, list_files, list_image_files
from useg.errors import DataError
from useg.images.files import natural_key, read_size


def find_annotated(root: Path) -> DetectedLayout | None:
    """Return what annotation files in a folder say, or None when there are none.

    Raises:
        DataError: an annotation file that is damaged or does not fit its format; pictures that are missing altogether or not clear.
    """
    pictures = list_image_files(root)
    if not pictures:
        return None
    return pair_annotated(root, pictures, list_files(root, (".json", ".xml"))) or _find_yolo(
        root, pictures
    )


def pair_annotated(
    root: Path, pictures: Sequence[Path], files: Sequence[Path]
) -> DetectedLayout | None:
    """As :func:`find_drawn`, for these pictures and JSON and XML files; files that are no annotations are passed over."""
    annotations = _read_files(files)
    if annotations is None:
        return None
    places: dict[str, list[Path]] = defaultdict(list)
    for picture in pictures:
        places[picture.name].append(picture)
        if annotations.layout == "labelme":
            places[picture.stem].append(
                picture
            )  # a picture may have been renamed together with its file
    located = [(_locate(entry, places, root), entry) for entry in annotations.entries]
    alone = [entry for image, entry in located if image is None]
    if alone and len(alone) == len(located):
        raise DataError(
            f"'{alone[0].file}' names pictures such as '{alone[0].image}', but none that it names is in '{root}'; put them there, "
            f'or say in a dataset.toml where they are: images = "../photos/*.jpg", masks = "{alone[0].file.name}"'
        )
    found = _found(
        root, annotations, [(image, entry) for image, entry in located if image is not None]
    )
    return replace(found, masks=tuple(Path(f"{entry.file}#{entry.image}") for entry in alone))


def _read_files(files: Sequence[Path]) -> Annotations | None:
    """Read all annotations of one format: COCO before CVAT before LabelMe, since a tool's own files may lie beside what it exported."""
    instances = {
        path.parent for path in files if path.stem.startswith("instances")
    }  # COCO has captions and keypoints of the same pictures
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
        return _joined(coco or cvat)
    return Annotations("labelme", tuple(labelme), collect_class_names(labelme)) if labelme else None


def _joined(parts: Sequence[Annotations]) -> Annotations:
    entries = tuple(entry for part in parts for entry in part.entries)
    return Annotations(
        parts[0].layout,
        entries,
        tuple(name for part in parts for name in part.names),
        tuple(color for part in parts for color in part.colors),
    )


def _locate(entry: AnnotatedImage, places: dict[str, list[Path]], root: Path) -> Path | None:
    """Find the picture that an entry names: of several with that name, the one that agrees best with the path as named and with the file's place.

    Raises:
        DataError: two agree alike.
    """
    named = PurePosixPath(entry.image.replace("\\", "/")).parts
    candidates = places.get(named[-1] if named else "") or places.get(entry.file.stem, [])
    ranks = {path: _agreement(path, entry, named, root) for path in candidates}
    best = [path for path, rank in ranks.items() if rank == max(ranks.values())]
    if len(best) > 1:
        raise DataError(
            f"'{entry.file}' names the picture '{entry.image}', which could be '{best[0]}' or '{best[1]}'; give pictures names of their own, or "
            f"put each annotation file beside its pictures"
        )
    return best[0] if best else None


def _agreement(
    path: Path, entry: AnnotatedImage, named: Sequence[str], root: Path
) -> tuple[int, bool, int]:
    parts = path.relative_to(root).parts if path.is_relative_to(root) else path.parts
    same_end = _common(reversed(parts), reversed(named))
    return (
        same_end,
        find_official_split(path, root) == _split_said(entry),
        _common(path.parts[:-1], entry.file.parts[:-1]),
    )


def _common(some: Iterable[str], others: Iterable[str]) -> int:
    """Count the leading items that agree."""
    count = 0
    for one, other in zip(some, others, strict=False):
        if one != other:
            break
        count += 1
    return count


def _split_said(entry: AnnotatedImage) -> str:
    """Return the split that an entry, or the name of its file, says: ``instances_train2017.json`` -> ``train``."""
    words = [entry.split, *re.split(r"[^a-z]+", entry.file.stem.casefold())]
    return next((SPLIT_FOLDERS[word] for word in words if word in SPLIT_FOLDERS), "")


def _found(
    root: Path, annotations: Annotations, located: Sequence[tuple[Path, AnnotatedImage]]
) -> DetectedLayout:
    entries: dict[Path, AnnotatedImage] = {}
    for image, entry in located:
        if image in entries:
            raise DataError(
                f"'{image}' is annotated twice, in '{entries[image].file}' and in '{entry.file}'; keep one of them"
            )
        entries[image] = entry
    if not any(entry.drawing.shapes for entry in entries.values()):
        raise DataError(
            f"no picture in '{root}' has a shape ({annotations.layout} files such as '{located[0][1].file}'); draw some"
        )
    pairs = (
        Pair(
            image,
            entry.file,
            _split_said(entry) or find_official_split(image, root),
            truth=_sized(entry, image),
        )
        for image, entry in sorted(entries.items(), key=lambda item: natural_key(item[0]))
    )
    return DetectedLayout(annotations.layout, tuple(pairs), classes=annotations.classes)


def _sized(entry: AnnotatedImage, image: Path) -> Drawing:
    return (
        replace(entry.drawing, size=read_size(image))
        if entry.drawing.size == (0, 0)
        else entry.drawing
    )


def _find_yolo(root: Path, pictures: Sequence[Path]) -> DetectedLayout | None:
    places = [(image, find_label_file(image, root)) for image in pictures]
    pairs = [(image, labels) for image, labels in places if labels is not None]
    return pair_yolo(root, pairs) if any(labels.is_file() for _, labels in pairs) else None


def pair_yolo(root: Path, pairs: Sequence[tuple[Path, Path]]) -> DetectedLayout:
    """Pair pictures with YOLO's text files, whose classes a YAML file or ``classes.txt`` in ``root`` may name."""
    listed = [
        *list_files(root, (".yaml", ".yml")),
        *(path for path in list_files(root, (".txt",)) if path.name == "classes.txt"),
    ]
    annotations = read_yolo(pairs, listed)
    return _found(
        root,
        annotations,
        list(zip((image for image, _ in pairs), annotations.entries, strict=True)),
    )
