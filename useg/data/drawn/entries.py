"""What annotation files have in common: entries of drawn pictures, and safe reading of JSON and XML from anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from useg.classes import ClassTable, Color, spread_colors
from useg.data.shapes import BACKGROUND, IGNORED, Drawing
from useg.errors import UsageError


@dataclass(frozen=True)
class Entry:
    """One picture in an annotation file.

    Args:
        file: the annotation file.
        image: the picture's name or path, as that file has it.
        drawing: what is drawn on it; its size is (0, 0) where the file does not say.
        split: as the file has it.
    """

    file: Path
    image: str
    drawing: Drawing
    split: str = ""


@dataclass(frozen=True)
class Annotations:
    """All entries of one format, and the names of the classes in their order, with colours where the files have them."""

    layout: str
    entries: tuple[Entry, ...]
    names: tuple[str, ...]
    colors: tuple[Color | None, ...] = ()

    @property
    def classes(self) -> ClassTable:
        """The class table: ``background`` first, then the drawn classes."""
        colors = dict(zip(self.names, self.colors, strict=False))
        names = (BACKGROUND, *(name for name in dict.fromkeys(self.names) if name not in (BACKGROUND, IGNORED)))
        spread = spread_colors(len(names))
        return ClassTable(names, tuple(colors.get(name) or spread[k] for k, name in enumerate(names)))


def class_name(name: Any) -> str:
    """Return a class's name as it is used here; the formats' words for what is no thing become ``background``."""
    text = str(name).strip()
    return BACKGROUND if text.casefold() in (BACKGROUND, "_background_") else text


@contextmanager
def clear_format(path: Path, what: str) -> Iterator[None]:
    """Turn whatever does not fit the format ``what`` into one sentence that names the file."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        said = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"'{path}' is not in the format {what} as it should be ({said}); export it again, or remove it") from error


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UsageError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"'{path}' is no JSON that can be read ({error}); save or copy it again, or remove it") from error


def read_xml(path: Path) -> Element:
    """Read an XML file; one that declares a document type (and could define entities) is refused.

    Raises:
        UsageError: it cannot be read, is no XML, or declares a document type.
    """
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = _refuse_doctype
    try:
        parser.Parse(path.read_bytes(), True)
        return builder.close()
    except (OSError, ValueError, expat.ExpatError) as error:
        raise UsageError(f"'{path}' is no XML that can be read ({error}); save or copy it again, or remove it") from error


def _refuse_doctype(*_: object) -> None:
    raise ValueError("it declares a document type, which annotations do not need")


def declared_size(width: Any, height: Any) -> tuple[int, int]:
    """Return a picture's size as whole numbers; (0, 0) when either is missing."""
    if width is None or height is None:
        return 0, 0
    size = int(width), int(height)
    if min(size) < 0:
        raise ValueError(f"a picture of {size[0]}x{size[1]} pixels")
    return size if min(size) else (0, 0)


def names_of(entries: Iterable[Entry]) -> tuple[str, ...]:
    """Return the names of all classes that are drawn somewhere, by the alphabet."""
    return tuple(sorted({shape.name for entry in entries for shape in entry.drawing.shapes}))
