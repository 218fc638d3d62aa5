"""Kaggle's tables of run lengths, also as JSON -> the shapes on each image.

A table (``train.csv`` with ``ImageId,ClassId,EncodedPixels``) has a row for each object, or for
each class of an image: ``start length start length ...``; or a column for each class. It does not
say whether the runs follow the columns or the rows of the image. In the true order the shapes have
shorter boundaries; where images are square, stronger edges lie along them. It does not say either
whether pixels are counted from 1 or from 0, or from the end of the run before.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.data.annotations.formats import (
    MAX_DRAWN_CLASSES,
    AnnotatedImage,
    Annotations,
    Reading,
    normalize_class_name,
)
from useg.data.annotations.shapes import Drawing, RunLengths, Shape, decode_rle
from useg.data.dataset import pick_evenly
from useg.data.scribbles import edge_ratio
from useg.errors import DataError, UsageError
from useg.files import natural_key
from useg.images.image_files import read_image
from useg.parsing import decode_text, find_separator, open_file

# Possessive, because remembering where each run begins takes 100 times as much memory as text.
_RUNS = re.compile(r"[0-9]+ [0-9]+(?: [0-9]+ [0-9]+)*+")
_FEW_RUNS = re.compile(r"[0-9]+ [0-9]+ [0-9]+ [0-9]+ [0-9]+ [0-9]+")
_RUNS_HEADER = re.compile(
    r"encoded.?pixels?|encod(ed|ing)?|(?<![a-z])rles?(?![a-z])|run.?lengths?"
    r"|segmentation|annotation|masks?",
    re.IGNORECASE,
)
_IMAGE_HEADER = re.compile(r"id|(image|img|file)(?!.*(mask|width|height)).*", re.IGNORECASE)
_CLASS_HEADER = re.compile(r".*(class|label|categor|type).*", re.IGNORECASE)
# The beginning of a table shows whether it has run lengths.
_BEGINNING_BYTES = 1 << 16
# Cells without runs.
_EMPTY = ("", "-1", "nan")
# A line with more cells is skipped.
_MAX_COLUMNS = 100
# Most rows of a table (Kaggle's largest has 333,415) and of one image (more could not be drawn).
_MAX_ROWS, _MAX_ROWS_OF_AN_IMAGE = 500_000, 50_000
# Images whose masks show the order of the runs, and how much better one order must be.
_NUM_ORDERED = 8
_MIN_GAIN = 1.1
# Pixels are counted from 0 if then at least this many runs begin or end at a border of the image,
# and this many times more than if they are counted from 1.
_MIN_AT_BORDER, _MIN_BORDER_GAIN = 6, 4


@dataclass(frozen=True)
class _RunColumns:
    """Which columns of a table have the image, the runs, and the class or None.

    Each of several columns of runs has a class, which its header names.
    """

    image: int
    runs: Sequence[int]
    kind: int | None
    names: Sequence[str]


@dataclass(frozen=True)
class _Rows:
    """What a table has of one image: there can be very many rows of few runs each.

    Args:
        names: The class of each row.
        runs: Starts and lengths of the runs of all rows ``(2, N)``.
        ends: How many of them each row and those before it have.
    """

    names: Sequence[str] = ()
    runs: NDArray[np.int64] = field(default_factory=lambda: np.zeros((2, 0), np.int64))
    ends: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def sizes(self) -> NDArray[np.int64]:
        """How many runs each row has."""
        return np.diff(self.ends, prepend=0)

    @property
    def numbers(self) -> NDArray[np.int64]:
        """The row of each run."""
        return np.repeat(np.arange(len(self.ends)), self.sizes)


def is_run_length_csv(path: Path) -> bool:
    """Return whether a CSV file has masks as run lengths, other than a sample of a submission."""
    if "submission" in path.stem.casefold():
        return False
    try:
        with open_file(path) as file:
            return _find_columns_of(file.read(_BEGINNING_BYTES)) is not None
    except OSError:
        return False


def is_run_length_json(content: Any) -> bool:
    """Return whether JSON content has masks as run lengths: in records, or by image."""
    rows = list(itertools.islice(_rows_of_json(content), _MAX_COLUMNS))
    if isinstance(content, dict) and not any(_FEW_RUNS.match(row[-1]) for row in rows):
        # Two numbers may be anything.
        return False
    return _find_run_columns(rows) is not None


def _rows_of_json(content: Any) -> Iterator[list[str]]:
    """Yield the rows of a table: of records, ``{image: runs}`` or ``{image: {class: runs}}``.

    Instead of one text with runs, there may be a list of them. Other content has no rows.
    """
    if isinstance(content, list) and content and isinstance(content[0], dict):
        keys = list(itertools.islice(content[0], _MAX_COLUMNS))
        yield keys
        for record in (each for each in content if isinstance(each, dict)):
            cells = (record.get(key) for key in keys)
            yield ["" if cell is None else str(cell).strip() for cell in cells]
    elif isinstance(content, dict):
        yield ["image", "class", "rle"]
        for image, value in content.items():
            runs_of = value if isinstance(value, dict) else {"": value}
            for kind, runs in runs_of.items():
                texts = runs if isinstance(runs, list) else [runs]
                for text in texts:
                    yield [str(image), str(kind), text.strip() if isinstance(text, str) else "?"]


def _split_table(text: str) -> Iterator[list[str]]:
    """Yield the rows of a table, whose cells may be longer than those of :mod:`csv`."""
    separator = ""
    for line in io.StringIO(text, newline=None):
        separator = separator or find_separator(line)
        if not separator or line.count(separator) >= _MAX_COLUMNS:
            continue
        try:
            is_quoted = '"' in line[:1000]
            rows = csv.reader([line], delimiter=separator) if is_quoted else [line.split(separator)]
            cells = next(iter(rows))
        except csv.Error:
            cells = line.replace('"', "").split(separator)
        yield [cell.strip() for cell in cells]


def _find_columns_of(content: bytes) -> _RunColumns | None:
    """Find the columns by the beginning of a table, whose last row may be cut."""
    rows = list(_split_table(decode_text(content[:_BEGINNING_BYTES], "replace")))
    return _find_run_columns(rows[:-1] if len(rows) > 2 else rows)


def _find_run_columns(rows: Sequence[list[str]]) -> _RunColumns | None:
    """Find the columns by the first rows of a table, of which the very first is the header."""
    header, *rows = rows or [[]]
    cells = {
        k: [row[k] for row in rows if len(row) > k and row[k] not in _EMPTY]
        for k in range(len(header))
    }
    runs = _choose_columns_of_runs(header, cells)
    names = [(k, name) for k, name in enumerate(header) if k not in runs]
    image = next((k for k, name in names if _IMAGE_HEADER.fullmatch(name)), None)
    kind = next((k for k, name in names if k != image and _CLASS_HEADER.fullmatch(name)), None)
    # Among several columns, those of rare classes may begin with empty cells.
    full = [k for k in runs if cells[k]]
    if not full or image is None:
        return None
    if kind is not None or len(runs) == 1:
        return _RunColumns(image, full[:1], kind, [""])
    kinds = [_RUNS_HEADER.sub("", header[k], count=1).strip(" _-.:()[]") for k in runs]
    return _RunColumns(image, runs, None, kinds)


def _choose_columns_of_runs(
    header: Sequence[str], cells: Mapping[int, Sequence[str]]
) -> Sequence[int]:
    """Return the columns of run lengths: those with that name, or all if named after classes.

    Args:
        header: The names of the columns.
        cells: The cells of each column that are not empty.
    """
    possible = [k for k in cells if all(map(_RUNS.match, cells[k]))]
    called_so = [k for k in possible if _RUNS_HEADER.search(header[k])]
    if any(cells[k] for k in called_so):
        return called_so
    # Two numbers alone may be anything.
    has_runs = any(_FEW_RUNS.match(cell) for k in possible for cell in cells[k])
    return possible if has_runs else []


def read_run_lengths(path: Path, content: bytes, reading: Reading) -> Annotations:
    """Read a table of run lengths.

    Raises:
        DataError: The content does not fit the format.
    """
    columns = _find_columns_of(content)
    return _read_table(path, _split_table(decode_text(content, "strict")), columns, reading)


def read_run_length_json(path: Path, content: Any, reading: Reading) -> Annotations:
    """Read run lengths in JSON: records, or runs by image.

    Raises:
        DataError: The content does not fit the format.
    """
    rows = _rows_of_json(content)
    first = list(itertools.islice(rows, _MAX_COLUMNS))
    return _read_table(path, itertools.chain(first, rows), _find_run_columns(first), reading)


def _read_table(
    path: Path, table: Iterable[list[str]], columns: _RunColumns | None, reading: Reading
) -> Annotations:
    assert columns is not None
    entries, found = _read_rows(path, table, columns, reading)
    start, notes = _find_start(found.values())
    for image, rows in found.items():
        found[image] = _Rows()
        with reading.skipping(path, "run lengths", image):
            found[image] = _count_from_one(rows, start, entries[image], reading)
    by_columns, note = _find_order(found, entries, reading)
    if start == 1:
        found, notes = _confirm_start(found, entries, by_columns, reading)
    drawn = tuple(
        entry
        if reading.find(entry) is None
        else replace(entry, drawing=_draw_rows(found.get(image), reading.size(entry), by_columns))
        for image, entry in entries.items()
    )
    all_names = {name for rows in found.values() for name in rows.names}
    names = tuple(sorted(all_names, key=natural_key))
    return Annotations("run lengths", drawn, names, notes=(note, *notes))


def _read_rows(
    path: Path, table: Iterable[list[str]], columns: _RunColumns, reading: Reading
) -> tuple[dict[str, AnnotatedImage], dict[str, _Rows]]:
    """Return an entry for each image of a table, and the rows of those that have some."""
    entries: dict[str, AnnotatedImage] = {}
    # The class of each row, starts and lengths in turn, and how many runs there are so far.
    listed: dict[str, tuple[list[str], list[NDArray[np.int64]], list[int]]] = {}
    classes: set[str] = set()
    for row in _limit_rows(path, table):
        if len(row) <= max(columns.image, *columns.runs, columns.kind or 0):
            continue
        image, kind = row[columns.image], "" if columns.kind is None else row[columns.kind]
        if "_" in image and image not in entries and reading.find(_entry(path, image)) is None:
            # The columns ImageId_ClassId and Image_Label have both.
            image, _, kind = image.rpartition("_")
        if image not in entries:
            entries[image] = _entry(path, image)
            reading.check_count(path, len(entries))
            if reading.find(entries[image]) is not None:
                listed[image] = [], [], [0]
        for column, of_column in zip(columns.runs, columns.names, strict=True):
            if row[column] in _EMPTY or image not in listed:
                continue
            with reading.skipping(path, "run lengths", image):
                name = of_column or kind or "foreground"
                name = normalize_class_name(f"class {name}" if name.isdecimal() else name)
                runs = _parse_runs(row[column], entries[image], reading)
                names, numbers, ends = listed[image]
                numbers.append(runs)
                names.append(name)
                ends.append(ends[-1] + len(runs) // 2)
                classes.add(name)
        _check_counts(path, image, listed.get(image, ((),))[0], classes)
    return entries, {
        image: _Rows(names, np.concatenate(numbers).reshape(-1, 2).T, np.array(ends[1:], np.int64))
        for image, (names, numbers, ends) in listed.items()
        if names
    }


def _limit_rows(path: Path, table: Iterable[list[str]]) -> Iterator[list[str]]:
    for count, row in enumerate(table):
        if count > _MAX_ROWS:
            raise DataError(
                f"'{path}' has more than {_MAX_ROWS:,} rows of run lengths; remove those of images "
                "that are not there"
            )
        # The first one is the header.
        if count:
            yield row


def _check_counts(path: Path, image: str, rows: Sequence[str], classes: Collection[str]) -> None:
    if len(rows) > _MAX_ROWS_OF_AN_IMAGE:
        raise DataError(
            f"'{path}' has more than {_MAX_ROWS_OF_AN_IMAGE:,} rows of run lengths of '{image}'; "
            "remove some"
        )
    if len(classes) > MAX_DRAWN_CLASSES:
        raise DataError(
            f"'{path}' has more than {MAX_DRAWN_CLASSES} classes; check which column has the "
            "classes, or export fewer"
        )


def _confirm_start(
    found: Mapping[str, _Rows],
    entries: Mapping[str, AnnotatedImage],
    by_columns: bool,
    reading: Reading,
) -> tuple[dict[str, _Rows], tuple[str]]:
    """Move runs by a pixel if they count from 0 after all; also return a note."""
    if not _reach_borders_from_zero(found, entries, by_columns, reading):
        return dict(found), ("pixels of the run lengths are counted from 1, as is usual",)
    note = (
        "pixels of the run lengths are counted from 0, because only then do many runs end at the "
        "borders of the images"
    )
    moved = {
        image: replace(rows, runs=np.add(rows.runs, [[1], [0]])) for image, rows in found.items()
    }
    return moved, (note,)


def _draw_rows(rows: _Rows | None, size: tuple[int, int], by_columns: bool) -> Drawing:
    """Return a shape for each row of an image; none if the table has no rows of it."""
    if rows is None:
        return Drawing((), size)
    masks = _to_run_lengths(rows, size, by_columns)
    shapes = (Shape(name, runs=runs) for name, runs in zip(rows.names, masks, strict=True))
    return Drawing(tuple(shapes), size)


def _entry(path: Path, image: str) -> AnnotatedImage:
    return AnnotatedImage(path, image, Drawing((), (0, 0)))


def _parse_runs(text: str, entry: AnnotatedImage, reading: Reading) -> NDArray[np.int64]:
    """Return the starts and the lengths of runs in turn, as they are written.

    Raises:
        DataError: They are not runs, or cover more pixels than the image has.
    """
    if not _RUNS.fullmatch(text):
        raise DataError(
            f"'{entry.file}' ({entry.image}) has {text[:20]!r} where it should have run lengths, "
            "start length start length ...; correct or remove that row"
        )
    width, height = reading.size(entry)
    count = text.count(" ") // 2 + 1
    if count > width * height:
        raise DataError(
            f"'{entry.file}' ({entry.image}) has a row of {count:,} run lengths for an image of "
            f"{width}x{height} pixels; correct or remove that row"
        )
    # Numbers that are too large become the largest.
    return np.fromstring(text, np.int64, sep=" ")


def _find_start(found: Iterable[_Rows]) -> tuple[int | None, tuple[str, ...]]:
    """Return the number of the first pixel, or None if runs count from the one before; and a note.

    The starts of runs rise, unless they are distances from the end of the run before.
    """
    num_rising = num_falling = 0
    has_zero = False
    for rows in found:
        starts, numbers = rows.runs[0], rows.numbers
        has_zero |= bool((starts == 0).any())
        is_falling = (starts[1:] < starts[:-1]) & (numbers[1:] == numbers[:-1])
        falling = len(np.unique(numbers[1:][is_falling]))
        num_falling += falling
        num_rising += int((rows.sizes > 1).sum()) - falling
    if num_falling > num_rising:
        return None, (
            "the starts of the runs do not increase, so each is counted from the end of the "
            "previous run, and the first from 0",
        )
    note = "a run begins at 0, so the run lengths count pixels from 0"
    return (0, (note,)) if has_zero else (1, ())


def _count_from_one(
    rows: _Rows, start: int | None, entry: AnnotatedImage, reading: Reading
) -> _Rows:
    """Return runs whose starts count pixels from 1, in each row from the first to the last.

    Raises:
        DataError: The runs of a row overlap, or go beyond the end of the image.
    """
    width, height = reading.size(entry)
    numbers = rows.numbers
    # The sum of two larger numbers could overflow.
    runs = np.minimum(rows.runs, width * height + 1)
    if start is None:
        before = np.append(0, runs.sum(0).cumsum())
        # Without the rows before.
        before = before[:-1] - np.repeat(before[rows.ends - rows.sizes], rows.sizes)
        runs = np.stack([before + runs[0] + 1, runs[1]])
    else:
        runs = np.add(runs[:, np.lexsort((runs[0], numbers))], [[1 - start], [0]])
    starts, ends = runs[0], runs.sum(0) - 1
    is_wrong = (starts < 1) | (ends > width * height)
    is_wrong[1:] |= (ends[:-1] >= starts[1:]) & (numbers[1:] == numbers[:-1])
    if is_wrong.any():
        row = numbers == numbers[is_wrong.argmax()]
        raise DataError(
            f"'{entry.file}' ({entry.image}) has run lengths from pixel {starts[row].min()} to "
            f"{ends[row].max()}, which overlap or do not fit its image of {width}x{height} pixels "
            "counted from 1; save the masks as PNG files of class ids, named like their images"
        )
    return replace(rows, runs=runs)


def _reach_borders_from_zero(
    found: Mapping[str, _Rows],
    entries: Mapping[str, AnnotatedImage],
    by_columns: bool,
    reading: Reading,
) -> bool:
    """Return whether runs begin and end at the borders of images only if they count from 0."""
    counts = [0, 0]
    for name, rows in found.items():
        if not rows.names:
            continue
        size, runs = reading.size(entries[name]), rows.runs
        if runs.sum(0).max() > size[0] * size[1]:
            return False
        ends = np.concatenate([runs[0] - 1, runs.sum(0) - 1])
        for first in (0, 1):
            counts[first] += int(((ends + 1 - first) % size[int(by_columns)] == 0).sum())
    return counts[0] >= _MIN_AT_BORDER and counts[0] > _MIN_BORDER_GAIN * counts[1]


def _to_run_lengths(rows: _Rows, size: tuple[int, int], by_columns: bool) -> Iterator[RunLengths]:
    """Yield for each row the lengths of uncovered and covered runs in turn."""
    width, height = size
    borders = np.stack([rows.runs[0] - 1, rows.runs.sum(0) - 1], axis=1).ravel()
    lengths = np.diff(np.append(borders, 0), prepend=0)
    lengths[2 * (rows.ends - rows.sizes)] = borders[2 * (rows.ends - rows.sizes)]
    # A row ends with the pixels behind its last run.
    rest = width * height - borders[2 * rows.ends - 1]
    lengths = np.insert(lengths[:-1], 2 * rows.ends, rest).astype(np.uint32)
    content, begin = lengths.tobytes(), 0
    for end in (lengths.itemsize * (2 * rows.ends + 1 + np.arange(len(rows.ends)))).tolist():
        yield RunLengths(content[begin:end], width, height, by_columns=by_columns)
        begin = end


def _unite(runs: NDArray[np.int64]) -> _Rows:
    """Return the runs, as one row, that cover what any of the given ones ``(2, N)`` covers."""
    starts, lengths = runs
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate((starts + lengths)[order])
    is_first = np.append(True, starts[1:] > ends[:-1])
    starts, ends = starts[is_first], ends[np.append(is_first[1:], True)]
    return _Rows([""], np.stack([starts, ends - starts]), np.array([len(starts)]))


def _find_order(
    found: Mapping[str, _Rows],
    entries: Mapping[str, AnnotatedImage],
    reading: Reading,
) -> tuple[bool, str]:
    """Return whether runs follow the columns of the images, and a note about it."""
    lengths, edges = np.zeros(2), np.zeros(2)
    for name in pick_evenly([name for name, rows in found.items() if rows.names], _NUM_ORDERED):
        size = reading.size(entries[name])
        union = _unite(found[name].runs)
        masks = [
            decode_rle(runs)
            for order in (True, False)
            for runs in _to_run_lengths(union, size, order)
        ]
        lengths += [np.diff(mask, axis=0).sum() + np.diff(mask, axis=1).sum() for mask in masks]
        path = reading.find(entries[name])
        assert path is not None
        with suppress(UsageError):
            image = read_image(path)
            edges += [edge_ratio(image, mask) or 0.0 for mask in masks]
    file = next(iter(entries.values())).file.name if entries else ""
    for columns, rows in ((lengths[1], lengths[0]), (edges[0], edges[1])):
        if max(columns, rows) > _MIN_GAIN * min(columns, rows):
            how = "columns" if columns > rows else "rows"
            return bool(columns > rows), f"the run lengths in {file} follow the {how} of the images"
    return True, (
        f"the run lengths in {file} are read down the columns of the images, as is usual, but the "
        "images do not confirm it; check some masks on the page of useg inspect --html"
    )
