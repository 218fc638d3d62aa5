"""Outlines of YOLO -> the shapes on each image.

``images/a.jpg`` has its outlines in ``labels/a.txt`` (the last folder called ``images`` counts),
one line per object, ``class x y x y ...`` in fractions of the image. An image without a text file
is background, as for Ultralytics. ``names:`` in ``data.yaml`` (or in any other YAML file of DATA)
or ``classes.txt`` names the classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from useg.data.annotations.formats import (
    MAX_CLASSES,
    AnnotatedImage,
    Annotations,
    Reading,
    read_class_names,
)
from useg.data.annotations.rasterize import Drawing, Shape, pack_outline
from useg.errors import DataError
from useg.parsing import read_limited

# Of an outline with 100,000 points in each of its 1,000 objects.
_MAX_TEXT_BYTES = 200_000_000


def find_label_file(image: Path, root: Path) -> Path | None:
    """Return where YOLO keeps an image's outlines: ``labels/a.txt`` for ``images/a.jpg``.

    The file need not exist, but its folder does; None if it does not, or if the image is in no
    ``images`` folder of ``root``.
    """
    parts = image.relative_to(root).parts
    places = [k for k, part in enumerate(parts[:-1]) if part.casefold() == "images"]
    if not places:
        return None
    parent, inside = root.joinpath(*parts[: places[-1]]), parts[places[-1] + 1 :]
    folder = parent / ("Labels" if parts[places[-1]] == "Images" else "labels")
    path = folder.joinpath(*inside).with_suffix(".txt")
    return path if path.parent.is_dir() else None


def read_yolo(
    pairs: Sequence[tuple[Path, Path]], name_files: Iterable[Path], reading: Reading
) -> Annotations:
    """Read YOLO's outlines; lines that are no outlines are passed over.

    Args:
        pairs: Images and their text files, which need not exist.
        name_files: YAML and text files that may list the class names; the first that does counts.
        reading: Notes what is passed over.

    Raises:
        DataError: A line is a box, or the names cannot be read.
    """
    outlines = {
        path: _read_outlines(image, path, reading) if path.is_file() else []
        for image, path in pairs
    }
    used = {index for lines in outlines.values() for _, index, _ in lines}
    names = read_class_names(name_files) or {
        index: f"class {index}" for index in range(max(used, default=0) + 1)
    }
    entries = []
    for image, path in pairs:
        shapes = []
        for number, index, outline in outlines[path]:
            if index in names:
                shapes.append(Shape(names[index], (outline,)))
            else:
                reading.pass_over(
                    path,
                    f"'{path}' has the class {index}, but only {_describe_range(names)} named; "
                    f"add its name, or correct the number in line {number}",
                    image.as_posix(),
                )
        entries.append(AnnotatedImage(path, image.as_posix(), Drawing(tuple(shapes))))
    return Annotations("yolo", tuple(entries), tuple(names[index] for index in sorted(names)))


def _describe_range(names: Mapping[int, str]) -> str:
    return f"{min(names)} to {max(names)} are" if len(names) > 1 else f"{min(names)} is"


def _read_outlines(image: Path, path: Path, reading: Reading) -> list[tuple[int, int, bytes]]:
    """Return the number of the line, the class and the outline of each object."""
    try:
        lines = read_limited(path, _MAX_TEXT_BYTES).decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = f"'{path}' cannot be read as text ({error}); save or copy it again, or remove it"
        reading.pass_over(path, reason, image.as_posix())
        return []
    found = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if len(words) == 5:
            raise DataError(
                f"'{path}' line {number} has five numbers, which are a box and not an outline; "
                "export the labels for segmentation"
            )
        with reading.passing_over(path, "YOLO", image.as_posix()):
            found += [(number, *_parse_outline(words, f"'{path}' line {number}"))] if words else []
    return found


def _parse_outline(words: Sequence[str], source: str) -> tuple[int, bytes]:
    if not words[0].isascii() or not words[0].isdigit() or len(words) < 7 or not len(words) % 2:
        raise DataError(
            f"{source} is not 'class x y x y x y ...' with a class number and at least three "
            "points; correct or remove it"
        )
    if len(words[0].lstrip("0")) > 3 or int(words[0]) >= MAX_CLASSES:
        raise DataError(
            f"{source} has the class {words[0][:20]}, but class numbers are 0 to "
            f"{MAX_CLASSES - 1}; correct or remove it"
        )
    return int(words[0]), pack_outline(zip(words[1::2], words[2::2], strict=True), source)
