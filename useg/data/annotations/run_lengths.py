"""Kaggle's tables of run lengths -> the shapes on each image.

A table (``train.csv`` with ``ImageId,ClassId,EncodedPixels``) has a row for each object, or for
each class of an image: ``start length start length ...``. It does not say whether the runs follow
the columns or the rows of the image. In the true order the shapes have shorter boundaries; where
images are square, stronger edges lie along them. It does not say either whether pixels are counted
from 1 or from 0, or from the end of the run before.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from useg.data.annotations.formats import (
    AnnotatedImage,
    Annotations,
    Reading,
    normalize_class_name,
)
from useg.data.annotations.rasterize import Drawing, RunLengths, Shape, decode_rle
from useg.data.dataset import pick_evenly
from useg.data.scribbles import edge_ratio
from useg.errors import DataError, UsageError, format_count
from useg.images.files import natural_key, read_image
from useg.parsing import open_file

_RUNS = re.compile(r"[0-9]+ [0-9]+( [0-9]+ [0-9]+)*")
_RUNS_HEADER = re.compile(r"encod|\brle|run.?length|segmentation|annotation|mask", re.IGNORECASE)
_IMAGE_HEADER = re.compile(r"id|(image|img|file)(?!.*(mask|width|height)).*", re.IGNORECASE)
_CLASS_HEADER = re.compile(r".*(class|label|categor|type).*", re.IGNORECASE)
# The beginning of a table shows whether it has run lengths.
_NUM_BYTES_LOOKED_AT = 1 << 16
# A line with more cells is skipped.
_MAX_COLUMNS = 100
# Images whose masks show the order of the runs, and how much better one order must be.
_NUM_ORDERED = 8
_MIN_GAIN = 1.1
# So many runs begin or end at a border of the image if they are counted from 0, and so many times
# more than if they are counted from 1.
_MIN_AT_BORDER, _MIN_BORDER_GAIN = 6, 4


@dataclass(frozen=True)
class _RunColumns:
    """Which columns of a table have the image, the runs, and the class or None."""

    image: int
    runs: int
    kind: int | None


def is_run_length_csv(path: Path) -> bool:
    """Return whether a CSV file has masks as run lengths, other than a sample of a submission."""
    if "submission" in path.stem.casefold():
        return False
    try:
        with open_file(path) as file:
            text = file.read(_NUM_BYTES_LOOKED_AT).decode("utf-8-sig", "replace")
    except OSError:
        return False
    rows = _split_table(text)
    columns = _find_run_columns(next(rows, []))
    if columns is None:
        return False
    cells = [row[columns.runs] for row in rows if len(row) > columns.runs]
    # The last one may be cut.
    shown = [cell for cell in cells if cell not in ("", "-1")][:-1] or cells
    return bool(shown) and all(map(_RUNS.match, shown))


def _split_table(text: str) -> Iterator[list[str]]:
    """Yield the rows of a table, whose cells may be longer than those of :mod:`csv`."""
    for line in io.StringIO(text, newline=None):
        if line.count(",") >= _MAX_COLUMNS:
            continue
        try:
            cells = next(csv.reader([line])) if '"' in line[:1000] else line.split(",")
        except csv.Error:
            cells = line.replace('"', "").split(",")
        yield [cell.strip() for cell in cells]


def _find_run_columns(header: Sequence[str]) -> _RunColumns | None:
    runs = next((k for k, name in enumerate(header) if _RUNS_HEADER.search(name)), None)
    names = [(k, name) for k, name in enumerate(header) if k != runs]
    image = next((k for k, name in names if _IMAGE_HEADER.fullmatch(name)), None)
    kind = next((k for k, name in names if k != image and _CLASS_HEADER.fullmatch(name)), None)
    return None if runs is None or image is None else _RunColumns(image, runs, kind)


def read_run_lengths(path: Path, content: bytes, reading: Reading) -> Annotations:
    """Read a table of run lengths.

    Raises:
        DataError: The content does not fit the format.
    """
    rows = _split_table(content.decode("utf-8-sig"))
    columns = _find_run_columns(next(rows))
    assert columns is not None
    entries: dict[str, AnnotatedImage] = {}
    found: dict[str, list[tuple[str, NDArray[np.int64]]]] = {}
    for row in rows:
        if len(row) <= max(columns.image, columns.runs, columns.kind or 0):
            continue
        image, kind = row[columns.image], "" if columns.kind is None else row[columns.kind]
        if image not in entries and reading.find(_entry(path, image)) is None and "_" in image:
            # The columns ImageId_ClassId and Image_Label have both.
            image, _, kind = image.rpartition("_")
        entry = entries.setdefault(image, _entry(path, image))
        listed = found.setdefault(image, [])
        if row[columns.runs] not in ("", "-1") and reading.find(entry) is not None:
            with reading.skipping(path, "run lengths", image):
                name = normalize_class_name(
                    f"class {kind}" if kind.isdecimal() else kind or "foreground"
                )
                listed.append((name, _parse_runs(row[columns.runs], entry)))
    start, notes = _find_start(runs for listed in found.values() for _, runs in listed)
    for image, listed in found.items():
        counted: list[tuple[str, NDArray[np.int64]]] = []
        with reading.skipping(path, "run lengths", image):
            counted = [
                (name, _count_from_one(runs, start, entries[image], reading))
                for name, runs in listed
            ]
        found[image] = counted
    by_columns, note = _find_order(found, entries, reading)
    if start == 1 and _reach_borders_from_zero(found, entries, by_columns, reading):
        notes = (
            "so many of the run lengths reach the borders of the images from 0, that pixels "
            "are counted from 0",
        )
        found = {
            image: [(name, np.add(runs, [[1], [0]])) for name, runs in listed]
            for image, listed in found.items()
        }
    elif start == 1:
        notes = ("pixels of the run lengths are counted from 1, as is usual",)
    drawn = []
    for image, entry in entries.items():
        size = reading.size(entry)
        shapes = (
            Shape(name, runs=_to_run_lengths(runs, size, by_columns)) for name, runs in found[image]
        )
        drawn.append(replace(entry, drawing=Drawing(tuple(shapes), size)))
    names = sorted({name for listed in found.values() for name, _ in listed}, key=natural_key)
    notes = (note, *notes, *_describe_unlisted(path, entries.values(), reading))
    return Annotations("run lengths", tuple(drawn), tuple(names), notes=notes)


def _entry(path: Path, image: str) -> AnnotatedImage:
    return AnnotatedImage(path, image, Drawing((), (0, 0)))


def _parse_runs(text: str, entry: AnnotatedImage) -> NDArray[np.int64]:
    """Return the starts and the lengths of runs ``(2, N)`` as they are written.

    Raises:
        DataError: They are no runs.
    """
    if not _RUNS.fullmatch(text):
        raise DataError(
            f"'{entry.file}' ({entry.image}) has {text[:20]!r} where it should have run lengths, "
            "start length start length ...; correct or remove that row"
        )
    return np.array(text.split(), np.int64).reshape(-1, 2).T


def _find_start(listed: Iterable[NDArray[np.int64]]) -> tuple[int | None, tuple[str, ...]]:
    """Return the number of the first pixel, or None if runs count from the one before; and a note.

    The starts of runs rise, unless they are distances from the end of the run before.
    """
    num_rising = num_falling = 0
    has_zero = False
    for starts, _ in listed:
        has_zero |= bool((starts == 0).any())
        if len(starts) > 1:
            is_falling = bool((starts[1:] < starts[:-1]).any())
            num_falling += is_falling
            num_rising += not is_falling
    if num_falling > num_rising:
        return None, (
            "the starts of the run lengths do not rise, so they are counted from the end of the "
            "run before, the first from 0",
        )
    note = "a run begins at 0, so the run lengths count pixels from 0"
    return (0, (note,)) if has_zero else (1, ())


def _count_from_one(
    runs: NDArray[np.int64], start: int | None, entry: AnnotatedImage, reading: Reading
) -> NDArray[np.int64]:
    """Return runs whose starts count pixels from 1, from the first to the last.

    Raises:
        DataError: They overlap, or go beyond the end of the image.
    """
    width, height = reading.size(entry)
    # The sum of two larger numbers could overflow.
    runs = np.minimum(runs, width * height + 1)
    if start is None:
        before = np.append(0, runs[:, :-1].sum(0)).cumsum()
        runs = np.stack([before + runs[0] + 1, runs[1]])
    else:
        runs = runs[:, np.argsort(runs[0], kind="stable")]
        runs = np.add(runs, [[1 - start], [0]])
    starts, ends = runs[0], runs.sum(0) - 1
    if starts[0] < 1 or (ends[:-1] >= starts[1:]).any() or ends.max() > width * height:
        raise DataError(
            f"'{entry.file}' ({entry.image}) has run lengths from pixel {starts[0]} to "
            f"{ends.max()}, which do not fit its image of {width}x{height} pixels counted from 1, "
            "or overlap; draw them into PNGs of class ids that are called like their images"
        )
    return runs


def _reach_borders_from_zero(
    found: Mapping[str, Sequence[tuple[str, NDArray[np.int64]]]],
    entries: Mapping[str, AnnotatedImage],
    by_columns: bool,
    reading: Reading,
) -> bool:
    """Return whether runs begin and end at the borders of images only if they count from 0."""
    counts = [0, 0]
    for name, listed in found.items():
        if not listed:
            continue
        size = reading.size(entries[name])
        runs = np.concatenate([runs for _, runs in listed], axis=1)
        if runs.sum(0).max() > size[0] * size[1]:
            return False
        ends = np.concatenate([runs[0] - 1, runs.sum(0) - 1])
        for first in (0, 1):
            counts[first] += int(((ends + 1 - first) % size[int(by_columns)] == 0).sum())
    return counts[0] >= _MIN_AT_BORDER and counts[0] > _MIN_BORDER_GAIN * counts[1]


def _to_run_lengths(runs: NDArray[np.int64], size: tuple[int, int], by_columns: bool) -> RunLengths:
    """Return starts and lengths as the lengths of uncovered and covered runs in turn."""
    width, height = size
    borders = np.stack([runs[0] - 1, runs.sum(0) - 1], axis=1).ravel()
    counts = np.diff(np.concatenate([[0], borders, [width * height]]))
    return RunLengths(counts.astype(np.uint32).tobytes(), width, height, by_columns=by_columns)


def _unite(listed: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return the runs ``(2, N)`` that cover what any of the given ones covers."""
    starts, lengths = np.concatenate(listed, axis=1)
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate((starts + lengths)[order])
    is_first = np.append(True, starts[1:] > ends[:-1])
    starts, ends = starts[is_first], ends[np.append(is_first[1:], True)]
    return np.stack([starts, ends - starts])


def _find_order(
    found: Mapping[str, Sequence[tuple[str, NDArray[np.int64]]]],
    entries: Mapping[str, AnnotatedImage],
    reading: Reading,
) -> tuple[bool, str]:
    """Return whether runs follow the columns of the images, and a note about it."""
    lengths, edges = np.zeros(2), np.zeros(2)
    for name in pick_evenly([name for name, runs in found.items() if runs], _NUM_ORDERED):
        size = reading.size(entries[name])
        union = _unite([runs for _, runs in found[name]])
        masks = [decode_rle(_to_run_lengths(union, size, order)) for order in (True, False)]
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
        f"the run lengths in {file} are taken to follow the columns of the images, as is usual, "
        "although the images do not show it; look at some masks on the page of useg inspect --html"
    )


def _describe_unlisted(
    path: Path, entries: Iterable[AnnotatedImage], reading: Reading
) -> Iterator[str]:
    """Say that there are images beside the listed ones, which may have no objects."""
    listed = {image for entry in entries if (image := reading.find(entry)) is not None}
    places = {image.parent for image in listed}
    rest = [image for image in reading.images if image.parent in places and image not in listed]
    if rest:
        yield (
            f"{format_count(len(rest), 'image')} such as '{rest[0].name}' left out, which no row "
            f"of {path.name} names; if nothing is on them, add a row with empty run lengths each"
        )
