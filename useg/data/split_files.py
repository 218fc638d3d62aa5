"""Files with the split of each image -> the images of each split: tables, JSON, YAML, split.csv.

Whoever made a data set put such files into it. A ``split.csv`` is written for a run, and by a user
who wants other splits.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from useg.data.dataset import SPLIT_FOLDERS, SPLITS, Dataset, Pair, pair_name, pick_evenly
from useg.data.file_names import split_folder
from useg.errors import DataError
from useg.files import replacing
from useg.images.formats import ALL_PAGES
from useg.ownership import is_own_split
from useg.parsing import (
    decode_text,
    find_separator,
    open_file,
    parse_json,
    parse_yaml,
    read_limited,
    shorten,
    to_cell,
)

Named = TypeVar("Named")

# Words in the names of files that list one split, and of files that list several.
_LIST_WORDS = frozenset(
    [
        *("list", "lists", "split", "splits", "id", "ids", "file", "files", "name", "names"),
        *("set", "image", "images", "img", "imgs", "seg", "filenames", "gt", "label", "labels"),
        *("mask", "masks"),
    ]
)
_SPLIT_WORDS = frozenset(
    ["split", "splits", "partition", "partitions", "subset", "subsets", "fold", "folds", "kfold"]
)
# At most this many parts at the end of a path are compared; the time grows with their square.
MAX_TAIL_PARTS = 64
# A JSON list may name as many images, or half as many with two values each.
_MAX_LIST_BYTES, _MAX_JSON_ITEMS = 50_000_000, 1_000_000
# A line for each of a million images.
_MAX_CSV_BYTES, _MAX_ROWS = 256 << 20, 1_000_000
_MAX_LINE_LENGTH = 1_000_000
# Without libyaml, PyYAML reads a megabyte in ten seconds.
_MAX_YAML_BYTES = 150_000
# Columns of a table of splits, or divisions in one file; and cells of a table in JSON.
_MAX_COLUMNS, _MAX_CELLS = 1000, 4_000_000
_MAX_SHOWN_LENGTH = 200
# The beginning of a table, or some records in JSON, show whether there are splits.
_BEGINNING_BYTES, _NUM_RECORDS_LOOKED_AT = 1 << 16, 10_000
# Columns of a table of splits; the values of some say by 1 and 0 whether an image is in a split.
_IMAGE_COLUMNS = frozenset(
    [
        *("image", "filename", "file_name", "file", "name", "path", "image_path", "id", "image_id"),
        *("image_name", "imagename", "imageid", "img", "img_name", "img_path", "image_file"),
        *("filepath", "file_path", "sample", "case", "slide_id", "tile", "stem", "key"),
    ]
)
_SPLIT_COLUMNS = frozenset(["split", "set", "subset", "partition", "phase", "usage"])
_FLAG_COLUMN = re.compile(r"(?:is_)?(train|training|val|valid|validation|test|testing)")
_FOLD_COLUMN = re.compile(r"(k_?)?folds?(_?(id|[0-9]+))?|(cv|split|partition)_?[0-9]+")
# Lists of the images of a split, and images with their split.
_SPLIT_KEY = re.compile(
    rb'"(train(ing)?|val(id(ation)?)?)"\s*:\s*\['
    rb'|"(split|set|subset|partition|phase|usage)"\s*:\s*"(train|val|test)'
)
_SPLIT_KEY_OF_YAML = re.compile(
    rb"^(train(ing)?|val(id(ation)?)?)\s*:\s*(\[|[\r\n]\s*- )", re.MULTILINE
)
_YES = frozenset(["1", "1.0", "true", "yes", "y", "x"])
_NO = frozenset(["", "0", "0.0", "false", "no", "n"])
_YAML_SUFFIXES = (".yaml", ".yml")


def split_of_list(stem: str) -> str:
    """Return the split in the name of a list, or ``""``."""
    words = re.findall(r"[^\W\d_]+", stem.casefold())
    splits = {word for word in words if word in SPLIT_FOLDERS}
    is_plain = all(word in _LIST_WORDS or word in splits for word in words)
    return SPLIT_FOLDERS[splits.pop()] if is_plain and len(splits) == 1 else ""


def read_split_file(path: Path) -> tuple[dict[str, list[str]], bool]:
    """Return the images of each split that a file lists, and whether it has several divisions."""
    suffix, has_word = path.suffix.lower(), has_split_word(path)
    with suppress(OSError, ValueError, RecursionError, csv.Error):
        if suffix in (".csv", ".tsv", ".txt"):
            return _read_split_table(path)
        if suffix in _YAML_SUFFIXES and (has_word or _begins_with_splits(path)):
            text = decode_text(read_limited(path, _MAX_YAML_BYTES))
            return _divide_content(parse_yaml(text))
        if suffix == ".json" and (has_word or _begins_with_splits(path)):
            text = decode_text(read_limited(path, _MAX_LIST_BYTES))
            if max(map(text.count, "[{,:")) > _MAX_JSON_ITEMS:
                raise ValueError("it has very many items, which take far more memory than text")
            content, split = parse_json(text), split_of_list(path.stem)
            return _divide_content({split: content} if split else content)
    return {}, False


def has_split_word(path: Path) -> bool:
    """Return whether a file's name has a word such as split or fold."""
    return not _SPLIT_WORDS.isdisjoint(map(str.casefold, split_folder(path.stem)))


def _begins_with_splits(path: Path) -> bool:
    """Return whether a JSON or YAML file begins with a list of names or of images of a split.

    Its name, or a key in it, is that of a list of a split, and it begins with a text.
    """
    with open_file(path) as file:
        beginning = file.read(_BEGINNING_BYTES)
    if path.suffix.lower() in _YAML_SUFFIXES:
        return _SPLIT_KEY_OF_YAML.search(beginning) is not None
    if b'"annotations"' in beginning:
        return False
    has_names = re.match(rb'\s*\[\s*"', beginning) is not None
    return _SPLIT_KEY.search(beginning) is not None or (
        has_names and split_of_list(path.stem) != ""
    )


def _read_split_table(path: Path) -> tuple[dict[str, list[str]], bool]:
    with open_file(path) as file:
        beginning = file.read(_BEGINNING_BYTES)
    rows = list(split_rows(io.StringIO(decode_text(beginning, "replace"), newline=None)))
    columns = _find_split_columns(rows[:-1] if len(beginning) == _BEGINNING_BYTES else rows)
    if columns is None or columns.has_folds:
        return {}, columns is not None
    return columns.divide(_read_table_rows(path, _MAX_LIST_BYTES, "surrogateescape")), False


def _read_table_rows(path: Path, max_bytes: int, errors: str) -> Iterator[list[str]]:
    """Yield the rows of a table.

    Raises:
        OSError: It cannot be read.
        ValueError: It is too large, or no text.
    """
    content = read_limited(path, max_bytes)
    if (num_lines := max(map(content.count, (b"\n", b"\r")))) > _MAX_ROWS:
        raise ValueError(f"it has {num_lines:,} lines, and {_MAX_ROWS:,} are allowed")
    yield from split_rows(io.StringIO(decode_text(content, errors), newline=None))


def split_rows(lines: Iterable[str]) -> Iterator[list[str]]:
    """Yield the rows of a table, whose first line shows what separates its cells.

    Raises:
        ValueError: A line is very long.
        csv.Error: A cell is very long.
    """
    filled = (line for line in lines if _is_filled(line))
    first = next(filled, "")
    delimiter = find_separator(first)
    rows = itertools.chain((first,), filled)
    if delimiter:
        yield from csv.reader(rows, delimiter=delimiter)
    else:
        yield from (re.split(r"\s+", line.strip()) for line in rows)


def _is_filled(line: str) -> bool:
    if len(line) > _MAX_LINE_LENGTH:
        raise ValueError(f"it has a line of {len(line):,} characters")
    return not line.isspace()


@dataclass(frozen=True)
class _SplitColumns:
    """Where a table has splits.

    Args:
        image: The column that names images; None if each column lists the images of a split.
        splits: What the cells of other columns mean, in lower case; or the split of all.
        has_header: Whether the first row holds the names of the columns, not an image.
        has_folds: Whether there are several divisions, so that none of them is meant.
    """

    image: int | None
    splits: Mapping[int, Mapping[str, str] | str]
    has_header: bool = True
    has_folds: bool = False

    def divide(self, rows: Iterable[list[str]]) -> dict[str, list[str]]:
        """Return the images of each split; none if there is only one."""
        found: dict[str, list[str]] = defaultdict(list)
        for row in itertools.islice(rows, int(self.has_header), None):
            for k, meaning in self.splits.items():
                cell = row[k].strip() if k < len(row) else ""
                split = meaning if isinstance(meaning, str) else meaning.get(cell.casefold(), "")
                name = cell if self.image is None else "".join(row[self.image : self.image + 1])
                if split and name:
                    found[split].append(name)
        return found if len(found) > 1 else {}


def _find_split_columns(rows: Sequence[Sequence[str]]) -> _SplitColumns | None:
    """Find the columns of a table that give its images splits, or None.

    That is a column with the split of each image, or columns with the names of the splits.
    """
    if len(rows) < 2 or len(rows[0]) > _MAX_COLUMNS:
        return None
    header = [re.sub(r"[\s-]+", "_", cell.strip().casefold()) for cell in rows[0]]
    below = [
        {row[k].strip().casefold() for row in rows[1:] if k < len(row)} for k in range(len(header))
    ]
    named = [
        k
        for k, cells in enumerate(below)
        if cells & SPLIT_FOLDERS.keys()
        and (header[k] in _SPLIT_COLUMNS or cells - {""} <= SPLIT_FOLDERS.keys())
    ]
    has_header = not any(header[k] in SPLIT_FOLDERS for k in named)
    others = [k for k, name in enumerate(header) if k not in named and name]
    image = next((k for k in others if header[k] in _IMAGE_COLUMNS), None)
    usual = [k for k in named if header[k] in _SPLIT_COLUMNS]
    if len(named) == 1 or len(usual) == 1:
        image = next(iter(others), None) if image is None else image
        splits = dict.fromkeys(usual[:1] or named, SPLIT_FOLDERS)
        return None if image is None else _SplitColumns(image, splits, has_header)
    by_flags = _find_flag_columns(header, below, image)
    if by_flags is not None:
        return by_flags
    has_folds = image is not None and any(map(_FOLD_COLUMN.fullmatch, header))
    return _SplitColumns(image, {}, has_folds=True) if has_folds or len(named) > 1 else None


def _find_flag_columns(
    header: Sequence[str], below: Sequence[Set[str]], image: int | None
) -> _SplitColumns | None:
    """Find columns with the names of splits: with flags beside the images, or lists of the images.

    Args:
        header: The names of the columns.
        below: The different cells below each of them.
        image: The column that names images, or None.
    """
    flags = {
        k: SPLIT_FOLDERS[match[1]]
        for k, name in enumerate(header)
        if (match := _FLAG_COLUMN.fullmatch(name)) and below[k] - _NO
    }
    if image is not None and flags and all(below[k] <= _YES | _NO for k in flags):
        other = "" if len(flags) > 1 else "test" if "train" in flags.values() else "train"
        meanings = {
            k: dict.fromkeys(_YES, split) | dict.fromkeys(_NO, other) for k, split in flags.items()
        }
        return _SplitColumns(image, meanings)
    if image is None and len(set(flags.values())) > 1 and "train" in flags.values():
        return _SplitColumns(None, flags)
    return None


def path_tails(path: Path, root: Path) -> Iterator[str]:
    """Yield what a list may call a file: the ends of its path, each also without the suffix.

    ``root/a/b.png`` gives ``a/b.png``, ``a/b``, ``b.png`` and ``b``.
    """
    inside = path.relative_to(root) if path.is_relative_to(root) else path
    for k in range(len(inside.parts)):
        tail = PurePosixPath(*inside.parts[k:]).as_posix()
        yield tail
        yield tail.removesuffix(path.suffix)


def find_by_tail(parts: Sequence[str], tails: Mapping[str, set[Named]]) -> Named | None:
    """Return what the longest known end of a path names alone, or None.

    Args:
        parts: The parts of the path, whose beginning may be another machine's.
        tails: What has each of the ends of :func:`path_tails`.
    """
    for k in range(max(0, len(parts) - MAX_TAIL_PARTS), len(parts)):
        found = tails.get("/".join(parts[k:]), set())
        if len(found) == 1:
            return next(iter(found))
    return None


def _name_in_list(item: Any) -> str:
    """Return the image that an item of a list names, alone or beside its mask, or ``""``."""
    if isinstance(item, dict):
        named = (item[key] for key in item if str(key).casefold() in _IMAGE_COLUMNS)
        item = next(named, "")
    return str(item) if isinstance(item, str | int) else ""


def _rows_of_records(
    records: Iterable[Mapping[str, Any]], keys: Iterable[str]
) -> Iterator[list[str]]:
    return ([str(each.get(key, "")) for key in keys] for each in records)


def _split_of_value(value: Any) -> str:
    """Return the split that a text or a record (``{"split": "train"}``) names, or ``""``."""
    if isinstance(value, dict):
        value = next((value[key] for key in value if str(key).casefold() in _SPLIT_COLUMNS), "")
    return SPLIT_FOLDERS.get(value.casefold(), "") if isinstance(value, str) else ""


def _divide_content(content: Any, depth: int = 0) -> tuple[dict[str, list[str]], bool]:
    """Return the images of each split in JSON or YAML, and whether it has several divisions."""
    found: dict[str, list[str]] = defaultdict(list)
    if isinstance(content, list) and content and isinstance(content[0], dict):
        keys = [key for key, value in content[0].items() if not isinstance(value, dict | list)]
        if len(keys) > min(_MAX_COLUMNS, _MAX_CELLS // len(content)):
            return found, False
        records = [each for each in content if isinstance(each, dict)]
        rows = _rows_of_records(pick_evenly(records, _NUM_RECORDS_LOOKED_AT), keys)
        columns = _find_split_columns([list(map(str, keys)), *rows])
        if columns is not None:
            rows = _rows_of_records(records, keys)
            return columns.divide(itertools.chain([[]], rows)), columns.has_folds
    for name, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, list) and (split := SPLIT_FOLDERS.get(str(name).casefold())):
            found[split] += filter(None, map(_name_in_list, value))
        elif split := _split_of_value(value):
            found[split].append(str(name))
    if found or depth > 0 or not isinstance(content, dict | list):
        return found, False
    inner = content.values() if isinstance(content, dict) else content
    parts = (_divide_content(part, 1)[0] for part in itertools.islice(inner, _MAX_COLUMNS))
    divisions = list(itertools.islice((each for each in parts if len(each) > 1), 2))
    return (divisions[0], False) if len(divisions) == 1 else ({}, len(divisions) > 1)


def read_split_csv(path: Path, dataset: Dataset) -> Dataset:
    """Give the pairs the splits of a CSV file with the columns ``image`` and ``split``.

    An image is named by its path below the root, its file name, or that without the suffix.

    Raises:
        DataError: There is no such file or column; a split is unknown; an image does not exist, is
            in two splits, is in none, or shares its name with another.
    """
    names = _pairs_by_name(dataset)
    splits: dict[Pair, str] = {}
    for name, split in _split_rows(path):
        found = names.get(name, set())
        if len(found) != 1:
            problem = "several images have that name; give the path below the data folder"
            if not found:
                problem = "there is no such image with a mask; correct or remove the line"
            raise DataError(f"'{path}' names {shorten(name, _MAX_SHOWN_LENGTH)}, but {problem}")
        if splits.setdefault(next(iter(found)), split) != split:
            raise DataError(f"'{path}' puts '{name}' into two splits; keep one")
    missing = [pair for pair in dataset.pairs if pair not in splits]
    if missing:
        raise DataError(
            f"'{path}' does not name {len(missing)} of {len(dataset.pairs)} images, such as "
            f"'{missing[0].image}'; add them (the split gap leaves an image out)"
        )
    return replace(
        dataset,
        pairs=tuple(replace(pair, split=splits[pair]) for pair in dataset.pairs),
        splits_by=path.name,
    )


def restore_splits(path: Path, dataset: Dataset, splits_by: str) -> Dataset | None:
    """Give the pairs the splits that a run had, even if images were added or removed since.

    So an image that the run was trained on is never held out.

    Args:
        path: The CSV file that :func:`write_split_csv` wrote for the run.
        dataset: As :func:`useg.data.layouts.find_dataset` returns it now.
        splits_by: How the splits were made for the run, in words.

    Returns:
        The data set; images that were added are in ``gap``, or in ``test`` if their folder says so.
        None if it has none of the run's images.

    Raises:
        DataError: There is no such file or column, or a split is unknown.
    """
    names = _pairs_by_name(dataset)
    splits = {pair: split for name, split in _split_rows(path) for pair in names.get(name, ())}
    if not splits:
        return None
    num_added = len(dataset.pairs) - len(splits)
    pairs = tuple(
        replace(pair, split=splits.get(pair, "test" if pair.split == "test" else "gap"))
        for pair in dataset.pairs
    )
    return replace(
        dataset,
        pairs=pairs,
        splits_by=f"{splits_by}; {num_added} images were added after training"
        if num_added
        else splits_by,
    )


def _split_rows(path: Path) -> Iterator[tuple[str, str]]:
    """Yield a CSV file's images with their splits, row by row: short rows are very many."""
    try:
        rows = _read_table_rows(path, _MAX_CSV_BYTES, "strict")
        header = next(rows, [])
        image, split = (
            next((k for k, name in enumerate(header) if name.strip().casefold() in names), None)
            for names in (_IMAGE_COLUMNS, _SPLIT_COLUMNS)
        )
        if image is None or split is None:
            columns = ", ".join(header[:_MAX_SHOWN_LENGTH])[:_MAX_SHOWN_LENGTH] or "(none)"
            raise DataError(
                f"'{path}' has the columns {columns}, but it needs "
                "image,split in its first line, and one line per image"
            )
        for row in rows:
            name, named = (row[k] if k < len(row) else "" for k in (image, split))
            part = SPLIT_FOLDERS.get(named.strip().casefold(), named)
            if part not in SPLITS:
                raise DataError(
                    f"'{path}' puts {shorten(name, _MAX_SHOWN_LENGTH)} into the split "
                    f"{shorten(part)}; choose one of {', '.join(SPLITS)}"
                )
            yield name, part
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(
            f"'{path}' cannot be read ({error}); it needs the columns image,split"
        ) from error


def _pairs_by_name(dataset: Dataset) -> dict[str, set[Pair]]:
    """Return the pairs by all names of their images: paths, file names, both without suffix too."""
    names: dict[str, set[Pair]] = defaultdict(set)
    for pair in dataset.pairs:
        inside = pair_name(replace(pair, page=None), dataset.root)
        page = "" if pair.page in (None, ALL_PAGES) else f"#{pair.page}"
        for name in (inside, inside.rpartition(".")[0], pair.image.name, pair.image.stem):
            names[name + page].add(pair)
            names[to_cell(name + page)].add(pair)
    return names


def write_split_csv(path: Path, dataset: Dataset) -> None:
    """Write every image's split as CSV (``image,split``); :func:`read_split_csv` reads it.

    Raises:
        DataError: The file cannot be written.
    """
    target = io.StringIO()
    rows = csv.writer(target, lineterminator="\n")
    rows.writerow(("image", "split"))
    rows.writerows((to_cell(pair_name(pair, dataset.root)), pair.split) for pair in dataset.pairs)
    with replacing(path, is_own_split) as draft:
        draft.write_text(target.getvalue(), "utf-8")
