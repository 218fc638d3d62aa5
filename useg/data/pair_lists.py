"""Tables of paths, such as ``train.csv`` with ``image,mask`` -> pairs of images and masks.

JSON lines are tables too: ``metadata.jsonl`` of Hugging Face, the manifests of SageMaker.
"""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from useg.data.dataset import SPLIT_FOLDERS, DetectedLayout, Pair, pick_evenly
from useg.data.file_names import IMAGE_WORDS, MASK_WORDS, split_name
from useg.data.mask_content import is_photograph
from useg.data.split_files import find_by_tail, path_tails, split_of_list, split_rows
from useg.errors import DataError, format_count
from useg.files import list_files, natural_key
from useg.images.image_files import list_image_files
from useg.parsing import decode_text, parse_json, read_limited

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".manifest")
_LIST_SUFFIXES = (".csv", ".tsv", ".txt", ".lst", *_JSON_SUFFIXES)
# Cells are counted before they are read: each takes some 60 bytes more than its text.
_MAX_LIST_BYTES, _MAX_CELLS = 50_000_000, 4_000_000
# Each line of JSON lines gets a cell for each key of the first line.
_MAX_KEYS = 50
# Most rows name files that are there, so there are not many more rows than files.
_MAX_ROWS, _MAX_ROWS_PER_FILE = 100_000, 10
# Rows that show which columns name files, and the share of them that must name files.
_NUM_SAMPLED_ROWS = 20
_MIN_NAMED = 0.8
_NUM_SAMPLED = 4
_SPLIT_HEADERS = ("split", "set", "subset", "partition", "usage")

# The parts at the end of a path -> the files that have them.
_Tails = Mapping[str, set[Path]]


@dataclass(frozen=True)
class _Listed:
    """What a table names: images and masks row by row, and the split of each row or ``""``."""

    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    splits: tuple[str, ...]


def find_table_pairs(root: Path) -> DetectedLayout | None:
    """Pair the images and masks that tables list in two columns, or return None.

    Raises:
        DataError: A table names two masks for one image.
    """
    files = list_image_files(root)
    tables = list_files(root, _LIST_SUFFIXES) if len(files) > 1 else []
    # Many text files are annotations, one for each image.
    if not tables or len(tables) > len(files) // 2 + 2:
        return None
    tails = _tails_of(files, root)
    pairs: dict[Path, Pair] = {}
    used = []
    for table in tables:
        listed = _read_table(table, tails)
        if listed is None:
            continue
        used.append(table.relative_to(root).as_posix())
        for image, mask, split in zip(listed.images, listed.masks, listed.splits, strict=True):
            pair = pairs.setdefault(image, Pair(image, mask, split))
            if pair.mask != mask:
                raise DataError(
                    f"'{table}' names two masks for '{image}': '{pair.mask}' and '{mask}'; keep one"
                )
    if not pairs:
        return None
    rest = len(files) - len({path for pair in pairs.values() for path in (pair.image, pair.mask)})
    notes = [f"images and masks are paired as in {', '.join(used)}"]
    if rest:
        notes.append(f"{format_count(rest, 'other image file')} not named in any table: left out")
    return DetectedLayout(
        "table of paths",
        tuple(sorted(pairs.values(), key=lambda pair: natural_key(pair.image))),
        notes=tuple(notes),
    )


def _tails_of(files: Sequence[Path], root: Path) -> _Tails:
    tails: dict[str, set[Path]] = defaultdict(set)
    for path in files:
        for tail in path_tails(path, root):
            tails[tail].add(path)
    return tails


def _find_file(cell: str, tails: _Tails) -> Path | None:
    """Return the file that a cell names: a path, whose beginning may be another machine's."""
    parts = [part for part in cell.strip().replace("\\", "/").split("/") if part not in ("", ".")]
    return find_by_tail(parts, tails)


def _read_table(table: Path, tails: _Tails) -> _Listed | None:
    """Return the pairs of a table; None if no two of its columns name files."""
    try:
        rows = _read_rows(table, _MAX_ROWS + _MAX_ROWS_PER_FILE * len(tails))
    except (OSError, ValueError, csv.Error):
        return None
    if len(rows) < 2:
        return None
    has_header = not any(_find_file(cell, tails) for cell in rows[0])
    header = [cell.strip().casefold() for cell in rows[0]] if has_header else []
    rows = rows[has_header:]
    columns = list(_columns_of_files(rows, tails))
    if len(columns) != 2:
        return None
    images, masks = _order_columns(columns, rows, header, tails)
    place = next((k for k, name in enumerate(header) if name in _SPLIT_HEADERS), None)
    split = split_of_list(table.stem)
    found = [
        (image, mask, split if place is None else _split_in(row, place))
        for row in rows
        if max(columns) < len(row)
        and (image := _find_file(row[images], tails))
        and (mask := _find_file(row[masks], tails))
    ]
    return _Listed(*(tuple(column) for column in zip(*found, strict=True))) if found else None


def _read_rows(table: Path, most: int) -> list[list[str]]:
    """Return the rows of a table that are not empty; none if there are very many rows or cells.

    Raises:
        OSError: It cannot be read.
        ValueError: It is too large, or not a table.
        csv.Error: A cell is very long.
    """
    content = read_limited(table, _MAX_LIST_BYTES)
    num_rows = content.count(b"\n") + content.count(b"\r")
    num_separators = max(map(content.count, (b"\t", b";", b","))) or content.count(b" ")
    if num_rows > most or num_rows + num_separators > _MAX_CELLS:
        return []
    text = io.StringIO(decode_text(content), newline=None)
    lines = (line for line in text if not line.startswith("#"))
    is_json = table.suffix.lower() in _JSON_SUFFIXES
    rows = _split_json(lines) if is_json else split_rows(lines)
    return [row for row in rows if any(map(str.strip, row))]


def _split_json(lines: Iterable[str]) -> Iterator[list[str]]:
    """Yield the keys of the first line's texts, and then the texts of every line.

    Raises:
        ValueError: A line is not JSON, or the first line has very many texts.
    """
    keys: list[str] = []
    for line in lines:
        content = parse_json(line) if line.strip() else None
        if isinstance(content, dict):
            if not keys:
                keys = [key for key, value in content.items() if isinstance(value, str)]
                if len(keys) > _MAX_KEYS:
                    raise ValueError(f"its first line has {len(keys):,} texts")
                yield keys
            yield [str(content.get(key, "")) for key in keys]


def _columns_of_files(rows: Sequence[Sequence[str]], tails: _Tails) -> Iterator[int]:
    """Yield the columns that name files, another one in each row."""
    sampled = pick_evenly(rows, _NUM_SAMPLED_ROWS)
    for k in range(min(map(len, sampled))):
        found = [_find_file(row[k], tails) for row in sampled]
        named = [path for path in found if path is not None]
        if len(set(named)) >= max(2, _MIN_NAMED * len(sampled)):
            yield k


def _order_columns(
    columns: Sequence[int], rows: Sequence[Sequence[str]], header: Sequence[str], tails: _Tails
) -> Sequence[int]:
    """Return the column of images, then that of masks: by header, else by pixels, else in order."""
    for k, words in enumerate((IMAGE_WORDS, MASK_WORDS)):
        named = [
            column
            for column in columns
            if words & set(split_name("".join(header[column : column + 1])))
        ]
        if len(named) == 1:
            other = next(column for column in columns if column != named[0])
            return (named[0], other) if k == 0 else (other, named[0])
    num_photographs = [
        Counter(
            is_photograph(path)
            for row in pick_evenly(rows, _NUM_SAMPLED)
            if (path := _find_file(row[column], tails))
        )[True]
        for column in columns
    ]
    return columns if num_photographs[0] >= num_photographs[1] else columns[::-1]


def _split_in(row: Sequence[str], place: int) -> str:
    return SPLIT_FOLDERS.get(row[place].strip().casefold(), "") if place < len(row) else ""
