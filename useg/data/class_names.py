"""Files beside the masks -> the classes that they list, with their names, ids and colours.

People keep them in any form: ``_classes.csv``, ``labelmap.txt``, ``codes.txt``, ``dataset.json``,
``classes.json`` with hex colours, ``data.yaml``, GDAL's categories in XML. A file is read for what
it contains, whatever its columns or keys are called. It counts only if the masks fit it
(:mod:`useg.data.classes_from_masks`).
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from useg.classes import MAX_CLASSES, Color
from useg.data.annotations.formats import read_xml
from useg.data.dataset import pick_evenly
from useg.data.file_names import plain_stem
from useg.errors import UsageError
from useg.files import list_files
from useg.images.image_files import list_image_files
from useg.parsing import decode_text, parse_yaml, read_limited

NAME_FILE_SUFFIXES = (
    ".csv",
    ".txt",
    ".tsv",
    ".json",
    ".yaml",
    ".yml",
    ".xml",
    ".qml",
    ".names",
    ".ctbl",
)
_MAX_BYTES = 1 << 20
# 255 classes need less. Without libyaml, a megabyte of YAML takes ten seconds; a table takes five.
_MAX_YAML_BYTES, _MAX_TABLE_BYTES = 1 << 15, 1 << 17

# Files of one suffix that are read in a folder. Where there are more, each image has one.
_MAX_FILES_OF_A_SUFFIX = 8
# Values of nested JSON that are looked at.
_MAX_NODES = 100_000
# Fields of a class in a list of lists: its name, id and colour, and some more.
_MAX_ROW_LENGTH = 10

# Files that list names alone; other lists are those of images.
_IS_LIST_OF_NAMES = re.compile(
    r"class|code|label|name|categor|palette|legend|mapping", re.IGNORECASE
)

_NAME_KEYS = (
    "name",
    "title",
    "label",
    "class",
    "class_name",
    "category",
    "classes",
    "label_name",
    "labelname",
)
_ID_KEYS = (
    *("id", "value", "pixel value", "pixel_value", "label_id", "class_id", "index", "idx", "code"),
    *("pixel", "ids", "label id", "class id", "trainid", "train_id", "number", "label_key"),
)
_COLOR_KEYS = (
    *("color", "colour", "color_rgb", "rgb", "hex", "color_hex", "hex_color", "palette"),
    *("pixel_value", "pixelvalue", "class_color", "label_color"),
)
_CHANNELS = (("r", "red"), ("g", "green"), ("b", "blue"))

# Numbers in brackets, as in "sky: (120, 170, 230)".
_IN_BRACKETS = re.compile(r"[(\[{]([\d\s,;.]+)[)\]}]")
_ID, _IN_NAME = re.compile(r"\d{1,5}"), re.compile(r"[^\d\s,;:|]")
# {"class_0": "sky"}
_NUMBERED_KEY = re.compile(r"(?:class|label|category|value|id)[_\- ]?(\d{1,5})", re.IGNORECASE)
_SHARE = re.compile(r"0?\.\d+|1\.0+|\d(\.\d+)?e-0*[1-9]\d*")
# Of a row in the tables of 3D Slicer and FreeSurfer (id, colour, alpha), and of ITK-SNAP, which
# adds two columns and may give alpha as a fraction.
_TABLE_NUMBERS = (5, 6, 7)
_HEX_COLOR = re.compile(r"(?:#|0x)([0-9a-fA-F]{6})(?:[0-9a-fA-F]{2})?")
_UNLABELLED = re.compile(
    r"void|ignored?|ignore[ _-]?label|un-?label+ed|not[ _-]?label+ed|no[ _-]?data|unknown"
    r"|don'?t[ _-]?care|unclassified|un-?annotated|unassigned|excluded?"
    r"|out(side)?[ _-](of[ _-])?roi",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class NamedClass:
    """A class as a file has it: its name, its id or None, its colour or None."""

    name: str
    id: int | None = None
    color: Color | None = None


@dataclass(frozen=True)
class NamedClasses:
    """The classes that a file lists, in its order."""

    file: Path
    classes: tuple[NamedClass, ...]

    @property
    def has_ids(self) -> bool:
        """Whether every class has an id of its own."""
        ids = [each.id for each in self.classes]
        return None not in ids and len(set(ids)) == len(ids)

    @property
    def has_colors(self) -> bool:
        """Whether every class has a colour of its own."""
        colors = [each.color for each in self.classes]
        return None not in colors and len(set(colors)) == len(colors)


def means_unlabelled(name: str) -> bool:
    """Whether a class's name says that its pixels have no label, also after a group (Mapillary's).

    >>> [means_unlabelled(name) for name in ("Unlabeled", "void--unlabeled", "background")]
    [True, True, False]
    """
    return _UNLABELLED.fullmatch(name.rpartition("--")[2].strip()) is not None


def find_class_names(root: Path) -> list[NamedClasses]:
    """Read the files in a folder that list classes; others are skipped.

    Of the same list in several places, as in the folder of each split, the first counts. Tables
    about the images list no classes.
    """
    files = list_files(root, NAME_FILE_SUFFIXES)
    places: dict[tuple[Path, str], list[Path]] = {}
    for file in files:
        places.setdefault((file.parent, file.suffix.lower()), []).append(file)
    found: dict[tuple[NamedClass, ...], NamedClasses] = {}
    for group in places.values():
        few = pick_evenly(group, _MAX_FILES_OF_A_SUFFIX)
        for file in few:
            for named in read_name_file(file):
                found.setdefault(named.classes, named)
    stems = {plain_stem(path) for path in list_image_files(root)} if found else set()
    return [named for named in found.values() if not _lists_images(named, stems)]


def _lists_images(named: NamedClasses, stems: Set[str]) -> bool:
    """Whether most names in a list are those of image files."""
    return 2 * sum(plain_stem(Path(each.name)) in stems for each in named.classes) > len(
        named.classes
    )


def find_contradiction(
    named: NamedClasses, others: Iterable[NamedClasses], places: Set[Path]
) -> NamedClasses | None:
    """Return another file that means other classes by the same values or colours, or None.

    The ids of LabelMe's ``label_names.txt`` and the colours of Omniverse count for one image. Only
    files that lie beside masks (in ``places``) and are called alike are compared.
    """
    family = re.sub(r"[0-9]+", "0", named.file.name)
    homes = {*places, *(place.parent for place in places)}
    alike = (
        other
        for other in others
        if other.file != named.file
        and re.sub(r"[0-9]+", "0", other.file.name) == family
        and {named.file.parent, other.file.parent} <= homes
    )
    return next((other for other in alike if _contradict(named, other)), None)


def _contradict(one: NamedClasses, other: NamedClasses) -> bool:
    """Whether two lists give a name another value or colour, or a value another name."""
    names, others = (
        {
            each.color if named.has_colors else each.id if named.has_ids else k: each.name
            for k, each in enumerate(named.classes)
        }
        for named in (one, other)
    )
    values = {name: value for value, name in others.items()}
    return any(
        others.get(value, name) != name or values.get(name, value) != value
        for value, name in names.items()
    )


def read_name_file(file: Path) -> list[NamedClasses]:
    """Read the lists of classes in a file; none if it has none or cannot be read."""
    suffix = file.suffix.lower()
    try:
        if suffix in (".xml", ".qml"):
            lists = _lists_of_xml(read_xml(file))
        else:
            is_yaml, is_json = suffix in (".yaml", ".yml"), suffix == ".json"
            most = _MAX_YAML_BYTES if is_yaml else _MAX_BYTES if is_json else _MAX_TABLE_BYTES
            text = decode_text(read_limited(file, most), "replace")
            if is_json:
                lists = _lists_of(json.loads(text), file.stem)
            elif is_yaml:
                lists = _lists_of(parse_yaml(text), file.stem)
            else:
                lists = iter([_read_table(text, _IS_LIST_OF_NAMES.search(file.stem) is not None)])
        found = [tuple(dict.fromkeys(classes)) for classes in lists]
    # Other programs' files may hold anything.
    except (OSError, UsageError, ValueError, RecursionError, csv.Error):
        return []
    return [NamedClasses(file, classes) for classes in found if classes and _are_unique(classes)]


def _are_unique(classes: Sequence[NamedClass]) -> bool:
    names = [each.name for each in classes]
    return len(set(names)) == len(names) and all(name and len(name) < 200 for name in names)


# Tables in text


def _read_table(text: str, is_list_of_names: bool) -> list[NamedClass]:
    """Read lines of a name with an id, a colour or both; or of names alone."""
    lines = [_IN_BRACKETS.sub(r" \1 ", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("# ", "//", "##"))]
    classes = _read_rows([_split_line(line) for line in lines])
    if any(each.id is not None or each.color for each in classes):
        return classes
    numbered = [named for line in lines if (named := _name_before_id(line))] if classes else []
    if len(numbered) == len(lines) > 1 and len({each.id for each in numbered}) == len(lines):
        return numbered
    return classes if is_list_of_names else []


def _read_rows(rows: Sequence[Sequence[str]]) -> list[NamedClass]:
    """Read the rows of a table, with a header or without; none if a row names no class."""
    if not rows:
        return []
    words = rows[0][0].split() if len(rows[0]) == 1 < len(rows) else []
    if len(words) == len(rows[-1]):
        # Spaces separate the columns, and so the names in the header.
        rows = [words, *rows[1:]]
    header = {field.casefold(): k for k, field in enumerate(rows[0])}
    if header.keys() & {*_NAME_KEYS} and not _has_number(rows[0]):
        return [each for row in rows[1:] for each in _class_of_row(row, header)]
    # A first row without numbers above rows with some is a header, in whatever language.
    is_header = len(rows) > 2 and not _has_number(rows[0]) and all(map(_has_number, rows[1:]))
    rows = rows[1:] if is_header else rows
    classes = [each for row in rows for each in _class_without_header(row)]
    return classes if len(classes) == len(rows) else []


def _has_number(row: Sequence[str]) -> bool:
    return any(_to_int(field) is not None or _HEX_COLOR.fullmatch(field) for field in row)


def _name_before_id(line: str) -> NamedClass | None:
    """Read ``traffic light 3``."""
    # A regular expression for the whole line would take minutes for a long one.
    name, *number = line.rsplit(maxsplit=1)
    if number and _ID.fullmatch(number[0]) and _IN_NAME.search(name):
        return NamedClass(name, int(number[0]))
    return None


def _split_line(line: str) -> list[str]:
    for delimiter in ("\t", ";", "|", ","):
        if delimiter in line:
            fields = next(csv.reader([line], delimiter=delimiter))
            break
    else:
        fields = [line]
    parts: list[str] = []
    for field in fields:
        # "house:48,112,32::" and "3: car" are name and numbers too.
        for part in re.split(r":(?!//)", field):
            parts += _split_spaces(part.strip())
    return [part.strip("\"' ") for part in parts if part.strip("\"' ")]


def _split_spaces(text: str) -> list[str]:
    """``"64 128 64 traffic light"`` -> ``["64", "128", "64", "traffic light"]``."""
    words = text.split()
    is_number = [
        _to_int(word) is not None or bool(_HEX_COLOR.fullmatch(word) or _SHARE.fullmatch(word))
        for word in words
    ]
    if not any(is_number) or all(is_number):
        return words if all(is_number) else [text]
    first, last = is_number.index(False), len(words) - is_number[::-1].index(False)
    # "class 3" is a name; "3 car" and "car 3" are not.
    if all(is_number[:first]) and all(is_number[last:]) and (first > 0 or len(words) - last >= 3):
        return [*words[:first], " ".join(words[first:last]), *words[last:]]
    return [text]


def _class_of_row(row: Sequence[str], header: Mapping[str, int]) -> Iterator[NamedClass]:
    def field(*keys: str) -> str:
        return next((row[header[key]] for key in keys if header.get(key, len(row)) < len(row)), "")

    texts = [text for key in _NAME_KEYS if (text := field(key)) and _to_int(text) is None]
    numbers = [
        number
        for key in (*_ID_KEYS, "label", "class")
        if (number := _to_int(field(key))) is not None
    ]
    parts = [_to_int(field(*keys)) for keys in _CHANNELS]
    color = _to_color([part for part in parts if part is not None])
    color = color or _to_color(_add_hash(field(*_COLOR_KEYS)))
    if color is None and (place := next((header[k] for k in _COLOR_KEYS if k in header), None)):
        # "255 0 0" in one column was split at its spaces.
        color = _to_color([_to_int(part) for part in row[place : place + 3]])
    if texts:
        yield NamedClass(texts[0], numbers[0] if numbers else None, color)


def _class_without_header(row: Sequence[str]) -> Iterator[NamedClass]:
    numbers = [number for number in map(_to_int, row) if number is not None]
    hexes = [color for part in row if (color := _to_color(part))]
    names = [
        part
        for part in row
        if _to_int(part) is None and not (_HEX_COLOR.fullmatch(part) or _SHARE.fullmatch(part))
    ]
    if not names:
        return
    starts_with_id = _to_int(row[0]) is not None
    if starts_with_id and len(numbers) in _TABLE_NUMBERS:
        yield NamedClass(names[0], numbers[0], _to_color(numbers[1:4]))
    if len(numbers) == 4:
        number, *parts = numbers if starts_with_id else [numbers[3], *numbers[:3]]
        yield NamedClass(names[0], number, _to_color(parts))
    elif len(numbers) == 3 and not hexes:
        yield NamedClass(names[0], None, _to_color(numbers))
    # Several texts without a number are a table of something else, such as diagnoses.
    elif len(numbers) == 1 or (not numbers and (hexes or len(names) == 1)):
        yield NamedClass(names[0], next(iter(numbers), None), hexes[0] if hexes else None)


def _to_int(text: Any) -> int | None:
    if isinstance(text, bool):
        return None
    if isinstance(text, int):
        return text
    if isinstance(text, str) and re.fullmatch(r"-?\d{1,9}(\.0+)?", text.strip()):
        return int(float(text))
    return None


def _to_color(value: Any) -> Color | None:
    """Return a colour given as three numbers, as hex, or as text of three numbers."""
    if isinstance(value, str):
        if match := _HEX_COLOR.fullmatch(value.strip()):
            code = int(match[1], 16)
            return code >> 16, code >> 8 & 255, code & 255
        value = re.sub(r"^\s*rgba?(?=\()", "", value)
        value = re.findall(r"\d+", value) if re.fullmatch(r"[\s\d,()\[\]]+", value) else []
    if isinstance(value, Mapping):
        value = [value.get(short, value.get(long)) for short, long in _CHANNELS]
    parts: list[int | None] = []
    if isinstance(value, list | tuple):
        # Unity writes channels from 0.0 to 1.0.
        are_shares = all(_SHARE.fullmatch(str(part)) for part in value)
        parts = [round(float(part) * 255) if are_shares else _to_int(part) for part in value]
    if len(parts) not in (3, 4) or any(part is None or not 0 <= part <= 255 for part in parts):
        return None
    r, g, b = (part or 0 for part in parts[:3])
    return r, g, b


def _add_hash(value: Any) -> Any:
    """Write six hexadecimal digits as a colour: ``3C1098`` -> ``#3C1098``; return others as is."""
    is_bare = isinstance(value, str) and re.fullmatch("[0-9a-fA-F]{6}", value.strip())
    return f"#{value.strip()}" if is_bare else value


# Nested content


def _lists_of(content: Any, stem: str) -> Iterator[list[NamedClass]]:
    """Find lists of classes in what a JSON or YAML file holds, from the outside in."""
    nodes: list[tuple[str, Any]] = [(stem, content)]
    for key, node in nodes:
        if len(nodes) > _MAX_NODES:
            return
        if isinstance(node, list):
            yield _classes_of_list(key, node)
            nodes += [(key, each) for each in node if isinstance(each, dict | list)]
        elif isinstance(node, dict):
            yield _classes_of_dict(node)
            yield _classes_of_columns(node)
            nodes += [(str(inner), each) for inner, each in node.items()]


def _classes_of_list(key: str, node: Sequence[Any]) -> list[NamedClass]:
    """Read a list of records, of rows such as ``["road", [128, 64, 128]]``, or of names."""
    if all(isinstance(each, dict) for each in node):
        return _complete(_class_of_dict(each) for each in node)
    if len(node) > 1 and all(map(_is_row_with_text, node)):
        return _read_rows([_flatten_row(each) for each in node])
    is_named = _IS_LIST_OF_NAMES.search(key) is not None
    if is_named and all(isinstance(each, str) for each in node):
        return [NamedClass(each) for each in node]
    return []


def _is_row_with_text(row: Any) -> bool:
    is_short = isinstance(row, list) and len(row) <= _MAX_ROW_LENGTH
    return is_short and any(isinstance(part, str) for part in row)


def _flatten_row(row: Sequence[Any]) -> list[str]:
    """``["road", [128, 64, 128]]`` -> ``["road", "128", "64", "128"]``."""
    parts = [part if isinstance(part, list) else [part] for part in row]
    return [str(value) for part in parts for value in part]


def _class_of_dict(node: Mapping[Any, Any], name: str = "") -> NamedClass | None:
    lowered = {str(key).casefold(): value for key, value in node.items()}
    name = name or next(
        (lowered[key] for key in _NAME_KEYS if isinstance(lowered.get(key), str)), ""
    )
    # A label may be a number beside a name.
    keys = (*_ID_KEYS, *_NAME_KEYS)
    number = next((n for key in keys if (n := _to_int(lowered.get(key))) is not None), None)
    colors = (_to_color(_add_hash(lowered.get(key))) for key in _COLOR_KEYS)
    color = next(filter(None, colors), None)
    color = color or _to_color(lowered)
    if not name:
        name, number = _find_other_keys(lowered, number)
    has_more = number is not None or color is not None
    return NamedClass(name, number, color) if name and has_more else None


def _find_other_keys(node: Mapping[str, Any], number: int | None) -> tuple[str, int | None]:
    """Return the only text and the only number in a record with unknown keys, such as ``source``.

    The text is ``""`` if there are several.
    """
    values = node.values()
    texts = [text for text in values if isinstance(text, str) and _IN_NAME.match(text)]
    texts = [text for text in texts if _to_color(text) is None]
    numbers = [each for value in values if (each := _to_int(value)) is not None]
    if len(texts) != 1:
        return "", number
    return texts[0], numbers[0] if number is None and len(numbers) == 1 else number


def _classes_of_dict(node: Mapping[Any, Any]) -> list[NamedClass]:
    """Read ``{name: id}``, ``{name: colour}``, ``{id: name}`` or ``{colour: name}``."""

    def read(one: Any, other: Any) -> NamedClass | None:
        if isinstance(other, list) and len(other) == 1:
            other = other[0]
        number = _to_int(one)
        if isinstance(other, str) and _to_int(other) is None:
            key = _NUMBERED_KEY.fullmatch(str(one))
            if key or number is not None:
                return NamedClass(other, int(key[1]) if key else number)
        if isinstance(other, str) and (color := _to_color(str(one))):
            return NamedClass(other, None, color)
        if isinstance(other, Mapping) and (number is not None or _to_color(str(one))):
            # Omniverse: "(255, 0, 0, 255)": {"class": "car"}.
            name = next((other[key] for key in _NAME_KEYS if isinstance(other.get(key), str)), "")
            inner = _class_of_dict(other)
            color = _to_color(str(one)) or (inner.color if inner else None)
            return NamedClass(name, number, color) if name else None
        if not isinstance(one, str) or number is not None:
            return None
        if (number := _to_int(other)) is not None:
            return NamedClass(one, number)
        if isinstance(other, Mapping):
            return _class_of_dict(other, one)
        color = _to_color(other)
        return NamedClass(one, None, color) if color else None

    whole = [_add_hash(value) for value in node.values()]
    if all(isinstance(value, str) and value.startswith("#") for value in whole):
        node = dict(zip(node, whole, strict=True))
    return _complete(read(one, other) for one, other in node.items()) if len(node) > 1 else []


def _classes_of_columns(node: Mapping[Any, Any]) -> list[NamedClass]:
    """Read ``{"classes": [names], "palette": [colours]}``, or ids instead of colours."""
    columns = [
        (str(key), value)
        for key, value in node.items()
        if isinstance(value, list) and 1 < len(value) <= MAX_CLASSES
    ]
    for key, names in columns:
        if not _IS_LIST_OF_NAMES.search(key) or not all(isinstance(name, str) for name in names):
            continue
        for _, values in columns:
            colors, ids = [*map(_to_color, values)], [*map(_to_int, values)]
            rows = zip(names, ids, colors, strict=False)
            if len(values) == len(names) and (None not in colors or None not in ids):
                return [NamedClass(name, number, color) for name, number, color in rows]
    return []


def _complete(classes: Iterable[NamedClass | None]) -> list[NamedClass]:
    """Return the classes if all of them could be read, otherwise none."""
    found = list(classes)
    complete = [each for each in found if each is not None]
    return complete if len(complete) == len(found) else []


def _lists_of_xml(root: Element) -> Iterator[list[NamedClass]]:
    """Read GDAL's categories, and elements with a name and an id or a colour."""
    for parent in root.iter():
        children = list(parent)
        if parent.tag == "CategoryNames":
            yield [NamedClass((child.text or "").strip()) for child in children]
        else:
            fields = [
                {**child.attrib, **{inner.tag: inner.text or "" for inner in child}}
                for child in children
            ]
            yield [each for node in fields if (each := _class_of_dict(node))]
