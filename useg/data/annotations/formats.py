"""What the readers of annotation files share: safe parsing, class names, and the images named.

Annotation files come from anywhere: what a file declares is compared with its size, and with the
image that it names, before anything is made of it. Whatever cannot be read (a file, an image's
entry, one shape) is skipped and reported, and the rest is read.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from useg.classes import MAX_CLASSES, ClassTable, Color, spread_colors
from useg.data.annotations.shapes import BACKGROUND, IGNORE_NAME, Drawing, RunLengths, encode_rle
from useg.data.dataset import SPLIT_FOLDERS, SkippedPart
from useg.data.official_splits import find_official_split
from useg.errors import DataError
from useg.images.formats import IMAGE_SUFFIXES
from useg.images.image_files import decode_coverage, decode_size, read_size
from useg.parsing import open_file, parse_yaml, read_limited, shorten

# A list of class names is far smaller: 30 kB name 1,203 classes. Parsing as much takes a second.
MAX_YAML_BYTES = 100_000

# The largest file of COCO has 470 MB. In files above the second size, a JSON list or
# object and an XML element must have at least this many bytes on average, since each takes up to 30
# times as much memory as its text.
MAX_ANNOTATION_BYTES = 1_000_000_000
_LARGE_BYTES, _MIN_BYTES_PER_ITEM = 5_000_000, 7
# Formats with a file for each image store each point as such an item. One image has far fewer.
_ONE_IMAGE_KEYS = (b'"imagePath"', b'"imageName"', b'"imgHeight"', b'"geometryType"', b"<Vertex")
_MAX_ITEMS_OF_AN_IMAGE = 500_000
# Letters as escapes, or UTF-16, would hide these keys; no tool writes so many points like that.
_HIDDEN_KEYS = re.compile(rb"\\u00[4-7]|\0")
_UP_TO_NUMBER = re.compile(r"^[^0-9]+[0-9]+(?=[^0-9])")

# Most attributes of an XML element, and most different names in a file: each takes time and memory.
_MAX_XML_NAMES = 1000
# XML is parsed in parts of this size, and names are counted after each. An incomplete element is
# read again with each further part, so there are at most this many.
_XML_PART_BYTES, _MAX_XML_PARTS = 1 << 20, 16

# At most this many images of one file may be missing, because people keep parts of data sets.
# COCO's largest file names 123,403, Kaggle's table of ships 192,556.
MAX_MISSING_IMAGES = 200_000

# Longest path on Linux.
MAX_IMAGE_NAME_LENGTH = 4096

# Parts of one file that are skipped, each with a sentence; a file with more is refused.
MAX_SKIPPED = 10_000

# Classes that a label map can hold in addition to the background.
MAX_DRAWN_CLASSES = MAX_CLASSES - 1

# Errors that content of the wrong form raises.
_FORM_ERRORS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class AnnotatedImage:
    """One image in an annotation file.

    Args:
        file: The annotation file.
        image: The image's name or path, as that file has it.
        drawing: The shapes; their ``size`` is (0, 0) if the file does not have it.
        split: The split as the file has it, or ``""``.
        others: Names that the image may have instead, with or without a suffix.
    """

    file: Path
    image: str
    drawing: Drawing
    split: str = ""
    others: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.image) > MAX_IMAGE_NAME_LENGTH:
            raise ValueError(
                f"the image name {shorten(self.image)} has {len(self.image):,} characters"
            )


@dataclass(frozen=True)
class Annotations:
    """Images of one format, and the class names in order, with colours if there are any.

    Without names, the classes are those of the shapes, in alphabetical order. Pixels that no shape
    covers are of the class ``background``, or, if the format labels every pixel, ignored. ``notes``
    say what was decided.
    """

    layout: str
    entries: tuple[AnnotatedImage, ...]
    names: tuple[str, ...] = ()
    colors: tuple[Color | None, ...] = ()
    has_background: bool = True
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> ClassTable:
        """The class table: ``background`` first, if there is one, then the annotated classes.

        Raises:
            DataError: There are too many classes.
        """
        colors = dict(zip(self.names, self.colors, strict=False))
        annotated = self.names or collect_class_names(self.entries)
        drawn = [name for name in dict.fromkeys(annotated) if name not in (BACKGROUND, IGNORE_NAME)]
        names = (*([BACKGROUND] if self.has_background or not drawn else []), *drawn)
        if len(names) - 1 > MAX_DRAWN_CLASSES:
            raise DataError(
                f"'{self.entries[0].file}' has {len(names) - 1:,} classes, but at most "
                f"{MAX_DRAWN_CLASSES} are possible in addition to the background; export "
                "fewer classes"
            )
        spread = spread_colors(len(names))
        return ClassTable(
            names, tuple(colors.get(name) or spread[k] for k, name in enumerate(names))
        )


def join_annotations(parts: Sequence[Annotations]) -> Annotations:
    """Join what several files of one format have."""
    entries = tuple(entry for part in parts for entry in part.entries)
    names = tuple(name for part in parts for name in part.names)
    colors = (part.colors or (None,) * len(part.names) for part in parts)
    return replace(
        parts[0],
        entries=entries,
        names=names,
        colors=tuple(color for part in colors for color in part),
        notes=tuple(note for part in parts for note in part.notes),
    )


def collect_class_names(entries: Iterable[AnnotatedImage]) -> tuple[str, ...]:
    """Return the names of all annotated classes in alphabetical order."""
    return tuple(sorted({shape.name for entry in entries for shape in entry.drawing.shapes}))


def normalize_class_name(name: Any) -> str:
    """Return a class's name as text; what the formats call background becomes ``background``.

    Raises:
        ValueError: It is neither text nor a number, or empty.
    """
    text = str(name).strip() if isinstance(name, str | int | float) else ""
    if not text:
        raise ValueError(f"{str(name)[:40]!r} is not a class name")
    return BACKGROUND if text.casefold() in (BACKGROUND, "_background_") else text


def parse_declared_size(width: Any, height: Any) -> tuple[int, int]:
    """Return an image's (width, height); (0, 0) if either is missing.

    Raises:
        ValueError: A side is negative or not a number.
    """
    if width is None or height is None:
        return 0, 0
    size = int(width), int(height)
    if min(size) < 0:
        raise ValueError(f"an image of {size[0]}x{size[1]} pixels")
    return size if min(size) else (0, 0)


def parse_color(text: Any) -> Color | None:
    """Read ``#rrggbb``; None for anything else."""
    if not isinstance(text, str) or not re.fullmatch("#?[0-9a-fA-F]{6}", text):
        return None
    red, green, blue = bytes.fromhex(text.removeprefix("#"))
    return red, green, blue


class Reading:
    """What readers share: the images of a folder by their names, and what was skipped."""

    def __init__(self, root: Path, images: Sequence[Path]) -> None:
        self.root = root
        self.images = images
        self.skipped: list[SkippedPart] = []
        self._num_skipped: Counter[Path] = Counter()
        self._damaged: set[tuple[Path, str]] = set()
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        self._by_stem: dict[str, list[Path]] = defaultdict(list)
        self._sizes: dict[Path, tuple[int, int]] = {}
        # Files may name hundreds of thousands of images, which are asked for again and again.
        self._candidates: dict[tuple[str, tuple[str, ...]], list[Path]] = {}
        self._chosen: dict[tuple[object, ...], Path] = {}
        for image in images:
            self._by_name[image.name.casefold()].append(image)
            self._by_stem[image.stem.casefold()].append(image)

    def skip(self, file: Path, reason: str, image: str = "") -> None:
        """Note that a file, or a part of it, is not read.

        Args:
            file: The file.
            reason: A sentence with what to do.
            image: The image, as the file names it, that lacks a shape for that.

        Raises:
            DataError: The file has very many such parts.
        """
        self._num_skipped[file] += 1
        if self._num_skipped[file] > MAX_SKIPPED:
            raise DataError(
                f"'{file}' has more than {MAX_SKIPPED:,} parts that cannot be read, such as "
                f"this: {reason}"
            )
        self.skipped.append(SkippedPart(file, reason))
        self._damaged |= {(file, image)} if image else set()

    def is_lost(self, entry: AnnotatedImage) -> bool:
        """Whether all shapes of an image were skipped, so that its background is not known."""
        return not entry.drawing.shapes and (entry.file, entry.image) in self._damaged

    @contextmanager
    def skipping(self, file: Path, format_name: str, image: str = "") -> Iterator[None]:
        """Skip what raises an error because its content is wrong; see :meth:`skip`."""
        try:
            yield
        except DataError as error:
            self.skip(file, str(error), image)
        except _FORM_ERRORS as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)[:200]
            self.skip(
                file,
                f"'{file}' is not valid {format_name} ({reason}); export it again, or remove it",
                image,
            )

    def check_count(self, file: Path, count: int) -> None:
        """Refuse a file that names so many images that very many of them must be missing.

        Raises:
            DataError: There are too many.
        """
        if count > len(self.images) + MAX_MISSING_IMAGES:
            raise DataError(
                f"'{file}' names {count:,} images, but the data set has {len(self.images):,}; put "
                "the images there, or remove the others from the file"
            )

    def find(self, entry: AnnotatedImage) -> Path | None:
        """Find the image that an entry names.

        Of several images with that name, it is the one that agrees best with the path in the file
        and with the file's own place.

        Raises:
            DataError: Several images agree equally well.
        """
        name = entry.image, entry.others
        candidates = self._candidates.get(name)
        if candidates is None:
            candidates = self._candidates[name] = self._find_candidates(entry)
        if len(candidates) < 2:
            return candidates[0] if candidates else None
        key = *name, entry.file, entry.split
        if key not in self._chosen:
            self._chosen[key] = self._choose(candidates, entry)
        return self._chosen[key]

    def _find_candidates(self, entry: AnnotatedImage) -> list[Path]:
        named = _parts_of_name(entry.image)
        name = named[-1] if named else ""
        tried = dict.fromkeys((name, unquote(name), *entry.others))
        found = next(filter(None, map(self._named, tried)), [])
        return found or self._by_folder.get(name.casefold(), [])

    @cached_property
    def _by_folder(self) -> dict[str, list[Path]]:
        """Images by a folder and their stem, or what it begins with up to its first number.

        UW-Madison's tables call ``case1_day0/scans/slice_0001_266.png`` ``case1_day0_slice_0001``.
        """
        found: dict[str, list[Path]] = defaultdict(list)
        for image in self.images:
            starts = {image.stem, *_UP_TO_NUMBER.findall(image.stem)}
            for folder in image.parts[-3:-1]:
                for start in starts:
                    found[f"{folder}_{start}".casefold()].append(image)
        return found

    def _choose(self, candidates: Sequence[Path], entry: AnnotatedImage) -> Path:
        named = _parts_of_name(entry.image)
        scores = {path: self._score(path, entry, named) for path in candidates}
        most = max(scores.values())
        best = [path for path, score in scores.items() if score == most]
        if len(best) > 1:
            raise DataError(
                f"'{entry.file}' names the image '{entry.image}', which could be '{best[0]}' or "
                f"'{best[1]}'; give the images different names, or put each annotation file beside "
                "its images"
            )
        return best[0]

    def size(self, entry: AnnotatedImage) -> tuple[int, int]:
        """Return the (width, height) of the image that an entry names; (0, 0) if it is not there.

        Raises:
            DataError: The image cannot be read.
        """
        path = self.find(entry)
        if path is None:
            return 0, 0
        if path not in self._sizes:
            self._sizes[path] = read_size(path)
        return self._sizes[path]

    def check_size(self, entry: AnnotatedImage) -> tuple[int, int]:
        """Return :meth:`size` after a check that the file declares the same.

        Raises:
            DataError: It declares another size.
        """
        size, declared = self.size(entry), entry.drawing.size
        if size != (0, 0) and declared not in ((0, 0), None, size):
            raise DataError(
                f"'{entry.file}' declares {declared[0]}x{declared[1]} pixels for the image "
                f"'{entry.image}', which has {size[0]}x{size[1]}; export it again"
            )
        return size

    def _named(self, name: str) -> list[Path]:
        found = self._by_name.get(name.casefold()) or self._by_stem.get(name.casefold(), [])
        if not found:
            return []
        if name and not _has_image_suffix(name):
            found = self._by_stem.get(name.casefold(), found)
        elif found and found[0].name.casefold() != name.casefold():
            found = []
        return [path for path in found if name in (path.name, path.stem)] or found

    def _score(
        self, path: Path, entry: AnnotatedImage, named: Sequence[str]
    ) -> tuple[int, bool, int]:
        root = self.root
        parts = path.relative_to(root).parts if path.is_relative_to(root) else path.parts
        if not _has_image_suffix(entry.image):
            parts = (*parts[:-1], path.stem)
        return (
            _count_common(reversed(parts), reversed(named)),
            find_official_split(path, root) == find_entry_split(entry),
            _count_common(path.parts[:-1], entry.file.parts[:-1]),
        )


def _parts_of_name(image: str) -> list[str]:
    # Like the parts of a path, but pathlib takes seconds for hundreds of thousands.
    return [part for part in image.replace("\\", "/").split("/") if part not in ("", ".")]


def _has_image_suffix(name: str) -> bool:
    """Return whether a name ends like an image file; the numbers of DICOM have points, too."""
    return os.path.splitext(name)[1].casefold() in IMAGE_SUFFIXES


def _count_common(some: Iterable[str], others: Iterable[str]) -> int:
    """Count the leading items that are equal."""
    count = 0
    for one, other in zip(some, others, strict=False):
        if one != other:
            break
        count += 1
    return count


def find_entry_split(entry: AnnotatedImage) -> str:
    """Return an entry's split, from its file's content or name: ``instances_train2017.json``."""
    words = [entry.split, *re.split(r"[^a-z]+", entry.file.stem.casefold())]
    return next((SPLIT_FOLDERS[word] for word in words if word in SPLIT_FOLDERS), "")


def read_embedded_mask(
    content: bytes, place: tuple[int, int], entry: AnnotatedImage, reading: Reading
) -> RunLengths | None:
    """Read an image in an annotation file as a mask; None if the annotated image is not there.

    Args:
        content: The image, such as a PNG; see :func:`useg.images.image_files.decode_coverage`.
        place: The column and row of the annotated image at which it lies.
        entry: The annotated image.
        reading: Knows its size, which the mask must not exceed.

    Raises:
        DataError: The mask is damaged, or larger than the image.
    """
    name, size = f"{entry.file}: a mask", reading.size(entry)
    if size == (0, 0):
        return None
    width, height = decode_size(content, name)
    if width > size[0] + 1 or height > size[1] + 1:
        raise DataError(
            f"'{entry.file}' ({entry.image}) has a mask of {width}x{height} pixels, but its image "
            f"has {size[0]}x{size[1]}; export it again"
        )
    return encode_rle(decode_coverage(content, name), *place)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: The file cannot be read, is too large, or is not JSON.
    """
    try:
        return json.loads(read_bytes(path, b"[{", b"{"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"'{path}' is not valid JSON ({error}); save or copy it again, or remove it"
        ) from error


def read_json_lines(path: Path) -> list[Any]:
    """Read a file with one JSON value in each line.

    Raises:
        DataError: The file cannot be read, is too large, or is not JSON.
    """
    try:
        content = read_bytes(path, b"[{\n", b"\n").removeprefix(codecs.BOM_UTF8)
        lines = [line for line in content.splitlines() if line.strip()]
        # Parsing each line by itself takes ten times as long.
        values: list[Any] = json.loads(b"[" + b",\n".join(lines) + b"]")
        if len(values) != len(lines):
            raise ValueError(f"{len(lines):,} lines have {len(values):,} values")
        return values
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"'{path}' does not have a JSON value in each line ({error}); save or copy it again, "
            "or remove it"
        ) from error


def read_xml(path: Path) -> Element:
    """Read an XML file without a document type, which could define entities.

    Raises:
        DataError: The file cannot be read, is too large, is not XML, or declares a document type.
    """
    builder = TreeBuilder()
    parser = expat.ParserCreate(intern={})
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = _refuse_doctype
    try:
        _parse_xml(parser, read_bytes(path, b"<", b"="))
        return builder.close()
    except (OSError, ValueError, expat.ExpatError) as error:
        raise DataError(
            f"'{path}' is not valid XML ({error}); save or copy it again, or remove it"
        ) from error


def _parse_xml(parser: expat.XMLParserType, content: bytes) -> None:
    """Parse XML in parts.

    Raises:
        ValueError: There are too many different names, or attributes of one element.
    """
    step = max(_XML_PART_BYTES, len(content) // _MAX_XML_PARTS)
    for start in range(0, len(content), step):
        parser.Parse(content[start : start + step], False)
        # An element that is not complete has not been counted.
        place = max(0, parser.CurrentByteIndex)
        if max(len(parser.intern), content.count(b"=", place, start + step)) > _MAX_XML_NAMES:
            raise ValueError(f"it has more than {_MAX_XML_NAMES:,} different names")
    parser.Parse(b"", True)


def read_bytes(path: Path, opening: bytes = b"\n", costly: bytes = b"") -> bytes:
    """Read a file unless it, or the number of items that it opens, is too large.

    Args:
        path: The file.
        opening: The characters each of which begins an item.
        costly: Characters each of which takes as much memory as one more item.

    Raises:
        ValueError: It is too large.
    """
    content = read_limited(path, MAX_ANNOTATION_BYTES)
    count, more = (
        sum(content.count(bytes([character])) for character in each) for each in (opening, costly)
    )
    if len(content) > _LARGE_BYTES and (count + more) * _MIN_BYTES_PER_ITEM > len(content):
        raise ValueError(f"it has {count + more:,} nested items in {len(content):,} bytes")
    if count > _MAX_ITEMS_OF_AN_IMAGE and (
        any(key in content for key in _ONE_IMAGE_KEYS) or _HIDDEN_KEYS.search(content)
    ):
        raise ValueError(
            f"it has {count:,} points and other items for one image, more than the allowed "
            f"{_MAX_ITEMS_OF_AN_IMAGE:,}"
        )
    return content


def _refuse_doctype(*_: object) -> None:
    raise ValueError("it declares a document type, which annotations do not need")


def read_class_names(files: Iterable[Path]) -> dict[int, str]:
    """Return the class names by number from the first file that lists some; {} if none does.

    Raises:
        DataError: A YAML file has ``names:``, but they cannot be read.
    """
    for path in files:
        try:
            with open_file(path) as file:
                content = file.read(MAX_YAML_BYTES + 1)
            errors = "strict" if len(content) <= MAX_YAML_BYTES else "replace"
            text = content.decode("utf-8-sig", errors)
        except (OSError, UnicodeDecodeError):
            continue
        if path.suffix in (".txt", ".names"):
            names = dict(enumerate(text.split("\n")))
        else:
            names = parse_yaml_names(text, f"'{path}'")
        if names:
            return {i: normalize_class_name(name) for i, name in names.items() if name.strip()}
    return {}


def parse_yaml_names(text: str, source: str) -> dict[int, str]:
    """Read ``names:`` of a YAML file: a list, or a mapping from numbers; {} if there is none.

    Args:
        text: The file's content.
        source: The file's name, for the error message.

    Raises:
        DataError: The text has ``names:``, but is too long, is not YAML, or the names are not text.
    """
    if not re.search(r"^['\"]?names['\"]?[ \t]*:", text, re.MULTILINE):
        return {}
    if len(text.encode()) > MAX_YAML_BYTES:
        raise DataError(
            f"{source} has more than {MAX_YAML_BYTES:,} bytes, too many for a list of class names; "
            "move it elsewhere, or keep only 'names:' in it"
        )
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise DataError(
            f"{source} is not valid YAML ({error}); correct it, or remove it"
        ) from error
    listed = content.get("names") if isinstance(content, dict) else None
    if isinstance(listed, list):
        listed = {str(k): name for k, name in enumerate(listed)}
    if not isinstance(listed, dict):
        return {}
    for number, name in listed.items():
        if not re.fullmatch("[0-9]{1,9}", number) or not isinstance(name, str):
            raise DataError(
                f"{source} has an entry in 'names:' that is not a number with a name "
                f"({number!r:.40}); write for example '0: car'"
            )
    return {int(number): name for number, name in listed.items()}
