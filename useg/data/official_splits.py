"""Folder names and files -> splits that the user decided: ``train/images``, ``test.txt``, CSV.

Folders and lists such as ``train.txt`` are found in a data set. A ``split.csv`` is written for a
run, and by a user who wants other splits.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from useg.data.dataset import SPLIT_FOLDERS, SPLITS, Dataset, Pair, pair_name
from useg.data.names import (
    IMAGE_WORDS,
    MASK_WORDS,
    SHORT_SPLITS,
    YEAR,
    find_by_tail,
    path_tails,
    plain_stem,
    split_folder,
)
from useg.errors import DataError, format_count
from useg.files import replacing
from useg.images.formats import ALL_PAGES
from useg.ownership import is_own_split
from useg.parsing import decode_text, open_file, parse_json, read_limited, to_cell

# What may stand beside a split in a folder's name, apart from numbers: stage1_train, train_data.
_NEUTRAL_WORDS = frozenset(
    (*IMAGE_WORDS, *MASK_WORDS, "data", "dataset", "set", "split", "part", "stage", "task", "fold")
)

# Text files that may list a split, and words beside the split in their names.
_LIST_WORDS = frozenset(
    [
        *("list", "lists", "split", "splits", "id", "ids", "file", "files", "name", "names"),
        *("set", "image", "images", "img", "imgs", "seg", "filenames"),
    ]
)
_MAX_LIST_BYTES = 50_000_000
# A line for each of a million images.
_MAX_CSV_BYTES = 256 << 20
# Columns of a CSV file of splits.
_IMAGE_COLUMNS = (
    "image",
    "filename",
    "file_name",
    "file",
    "name",
    "path",
    "image_path",
    "id",
    "image_id",
)
_SPLIT_COLUMNS = ("split", "set", "subset", "partition")
_MAX_HEADER_BYTES = 10_000
# Words in the names of JSON files that list splits.
_SPLIT_WORDS = frozenset(["split", "splits", "partition", "partitions", "subset", "subsets"])
# A list counts if it names at least this share of files that are there.
_MIN_KNOWN = 0.5


def find_official_split(path: Path, root: Path, rests: frozenset[str] = frozenset()) -> str:
    """Return the official split from a file's folders, or ``""``.

    Examples are ``train/images``, ``images/train``, ``train_images``, ``imagesTr``.

    Args:
        path: The file.
        root: The data folder.
        rests: Other texts beside the name of a split, from :func:`learn_rests`.
    """
    inside = path.relative_to(root) if path.is_relative_to(root) else path
    splits = (_split_of_folder(part, rests) for part in reversed(inside.parts[:-1]))
    return next((split for split in splits if split), "")


def learn_rests(folders: Iterable[str]) -> frozenset[str]:
    """Return texts that stand beside several splits: ``crop`` for ``traincrop``, ``valcrop``."""
    found: dict[str, set[str]] = defaultdict(set)
    for folder in folders:
        split, rest = divide_folder(folder)
        if not split:
            split, rest = _divide_short(folder)
        if split and rest:
            found[rest].add(split)
    return frozenset(rest for rest, splits in found.items() if len(splits) > 1)


def _divide_short(folder: str) -> tuple[str, str]:
    """Return the split whose short name is in a folder's name, and the rest, which is not empty."""
    parts = [part.casefold() for part in split_folder(folder)]
    splits = {SHORT_SPLITS[part] for part in parts if part in SHORT_SPLITS}
    rest = "".join(part for part in parts if part not in SHORT_SPLITS and part.isalnum())
    return (splits.pop(), rest or "in short") if len(splits) == 1 else ("", "")


def divide_folder(folder: str) -> tuple[str, str]:
    """Return the split in a folder's name, and the rest of the name in lower case.

    >>> divide_folder("stage1_Train"), divide_folder("train_val"), divide_folder("images")
    (('train', 'stage1'), ('train', ''), ('', 'images'))
    """
    name = YEAR.sub("", folder)
    if name.casefold() in SPLIT_FOLDERS:
        return SPLIT_FOLDERS[name.casefold()], ""
    parts = [part.casefold() for part in split_folder(name)]
    splits = {SPLIT_FOLDERS[part] for part in parts if part in SPLIT_FOLDERS}
    rest = "".join(part for part in parts if part not in SPLIT_FOLDERS and part.isalnum())
    if len(splits) == 1:
        return splits.pop(), rest
    return ("train" if splits == {"train", "val"} else ""), rest


def _split_of_folder(folder: str, rests: frozenset[str]) -> str:
    split, rest = divide_folder(folder)
    if not split:
        short, rest = _divide_short(folder)
        return short if rest in rests else ""
    words = re.findall(r"[^\W\d_]+", rest)
    parts = (part.casefold() for part in split_folder(folder) if part.isalpha())
    is_plain = all(part in _NEUTRAL_WORDS or part in SPLIT_FOLDERS for part in parts)
    return split if not words or is_plain or rest in rests else ""


def split_by_stems(images: Sequence[Path]) -> dict[Path, str]:
    """Return the splits that names begin or end with: ``train-volume``, ``a_test``.

    They count if every name has one, and not all have the same.
    """
    found: dict[Path, str] = {}
    for path in images:
        parts = split_folder(plain_stem(path))
        words = [part.casefold() for part in parts if part.isalpha()]
        splits = {
            SPLIT_FOLDERS[word] for word in (*words[:1], *words[-1:]) if word in SPLIT_FOLDERS
        }
        if len(splits) != 1:
            return {}
        found[path] = splits.pop()
    return found if len(set(found.values())) > 1 else {}


@dataclass(frozen=True)
class _SplitList:
    """A list of images of one split: the lines, or None if they are those of the file."""

    file: Path
    split: str
    lines: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ListedSplits:
    """Pairs with the splits of the lists ``files``; ``notes`` say what is in none of them."""

    pairs: tuple[Pair, ...]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def read_split_lists(
    files: Sequence[Path], pairs: Sequence[Pair], root: Path
) -> ListedSplits | None:
    """Split pairs by text files such as ``train.txt`` and ``ImageSets/Segmentation/val.txt``.

    A line names an image, or a folder of images: DAVIS lists its videos. Tables with the columns
    image and split, and JSON such as ``{"train": [...], "val": [...]}``, are lists too.

    The lists of one folder count: of those that name most pairs. Images in no list are for
    training if there is no list for training, and otherwise in the split ``gap``.

    Args:
        files: Text and JSON files in the data folder.
        pairs: The pairs, whose images or masks the lists name: by path, by name, or without the
            suffix.
        root: The data folder.

    Raises:
        DataError: An image is in two lists.
    """
    groups: dict[Path, list[_SplitList]] = defaultdict(list)
    for path in files:
        if split := split_of_list(path.stem):
            groups[path.parent].append(_SplitList(path, split))
        for split, lines in _read_split_table(path).items():
            groups[path].append(_SplitList(path, split, tuple(lines)))
    names = _names_of(pairs, root) if groups else {}
    folders = _folders_of(pairs, root) if groups else {}
    best: tuple[dict[Pair, str], tuple[Path, ...]] = ({}, ())
    for folder in sorted(groups, key=lambda path: (path.name != "Segmentation", path)):
        found = _read_group(groups[folder], names, folders)
        best = found if len(found[0]) > len(best[0]) else best
    splits, used = best
    if not splits:
        return None
    rest = "gap" if "train" in splits.values() else "train"
    num_rest = len(pairs) - len(splits)
    shown = ", ".join(path.name for path in used)
    what = "left out" if rest == "gap" else "for training"
    return ListedSplits(
        tuple(replace(pair, split=splits.get(pair, rest)) for pair in pairs),
        used,
        (f"{format_count(num_rest, 'image')} in none of {shown}: {what}",) if num_rest else (),
    )


def split_of_list(stem: str) -> str:
    """Return the split in the name of a list, or ``""``."""
    words = re.findall(r"[^\W\d_]+", stem.casefold())
    splits = {word for word in words if word in SPLIT_FOLDERS}
    is_plain = all(word in _LIST_WORDS or word in splits for word in words)
    return SPLIT_FOLDERS[splits.pop()] if is_plain and len(splits) == 1 else ""


def _names_of(pairs: Sequence[Pair], root: Path) -> dict[str, set[Pair]]:
    names: dict[str, set[Pair]] = defaultdict(set)
    for pair in pairs:
        for path in (pair.image, pair.mask):
            for tail in path_tails(path, root):
                names[tail].add(pair)
            names[plain_stem(path)].add(pair)
    return names


def _folders_of(pairs: Sequence[Pair], root: Path) -> dict[str, tuple[Pair, ...]]:
    """Return the pairs inside each folder, such as a video, by every end of its path."""
    inside: dict[Path, list[Pair]] = defaultdict(list)
    for pair in pairs:
        for folder in pair.image.parents:
            if folder != root and folder.is_relative_to(root):
                inside[folder].append(pair)
    ends: dict[str, set[Path]] = defaultdict(set)
    for folder in inside:
        parts = folder.relative_to(root).parts
        for k in range(len(parts)):
            ends["/".join(parts[k:])].add(folder)
    return {end: tuple(inside[min(found)]) for end, found in ends.items() if len(found) == 1}


def _read_split_table(path: Path) -> dict[str, list[str]]:
    """Return the images of each split that a CSV or JSON file lists; none for other files."""
    found: dict[str, list[str]] = defaultdict(list)
    is_json = path.suffix.lower() == ".json"
    if is_json and _SPLIT_WORDS.isdisjoint(map(str.casefold, split_folder(path.stem))):
        return found
    try:
        with open_file(path) as file:
            header = file.readline(_MAX_HEADER_BYTES).decode("utf-8-sig", "replace")
        if not is_json and not all(_find_columns(header.strip().split(","))):
            return found
        text = decode_text(read_limited(path, _MAX_LIST_BYTES))
        if is_json:
            content = parse_json(text)
            for name, listed in content.items() if isinstance(content, dict) else ():
                if name.casefold() in SPLIT_FOLDERS and isinstance(listed, list):
                    found[SPLIT_FOLDERS[name.casefold()]] += map(str, listed)
        else:
            rows = csv.DictReader(io.StringIO(text), restval="")
            image, split = _find_columns(rows.fieldnames or ())
            for row in rows:
                if (named := SPLIT_FOLDERS.get(row[split].strip().casefold())) is not None:
                    found[named].append(row[image])
    except (OSError, ValueError, csv.Error):
        return {}
    return found if len(found) > 1 else {}


def _find_columns(header: Sequence[str]) -> tuple[str, str]:
    """Return the columns of images and of splits, or ``""``."""
    image, split = (
        next((column for column in header if column in names), "")
        for names in (_IMAGE_COLUMNS, _SPLIT_COLUMNS)
    )
    return image, split


def _read_group(
    files: Sequence[_SplitList],
    names: Mapping[str, set[Pair]],
    folders: Mapping[str, tuple[Pair, ...]],
) -> tuple[dict[Pair, str], tuple[Path, ...]]:
    """Return the splits that the lists of one folder give, and which lists were used."""
    both = [each for each in files if each.file.stem.casefold() in ("trainval", "train_val")]
    is_divided = len({each.split for each in files if each not in both}) > 1
    splits: dict[Pair, str] = {}
    places: dict[Pair, Path] = {}
    used = []
    for each in files:
        if each in both and is_divided:
            continue
        path, split = each.file, each.split
        most = int(len(names) / _MIN_KNOWN)
        lines = _read_lines(path, most) if each.lines is None else each.lines
        if len(lines) > most:
            # Too few of them can be known.
            continue
        found = [_find_pairs(line, names, folders) for line in lines]
        known = [pairs for pairs in found if pairs]
        if not known or len(known) < _MIN_KNOWN * len(lines):
            continue
        used.append(path)
        for pair in itertools.chain.from_iterable(known):
            if splits.setdefault(pair, split) != split:
                raise DataError(
                    f"'{places[pair]}' and '{path}' both name '{pair.image.name}'; keep it in one "
                    "of them, or write a split.csv with the columns image,split"
                )
            places[pair] = path
    return splits, tuple(dict.fromkeys(used))


def _read_lines(path: Path, most: int) -> list[str]:
    """Return the lines of a list, at most one more than ``most``."""
    try:
        text = decode_text(read_limited(path, _MAX_LIST_BYTES))
    except (OSError, ValueError):
        return []
    lines = (line.strip() for line in io.StringIO(text, newline=None) if line[0] != "#")
    return list(itertools.islice(filter(None, lines), most + 1))


def _find_pairs(
    line: str, names: Mapping[str, set[Pair]], folders: Mapping[str, tuple[Pair, ...]]
) -> tuple[Pair, ...]:
    """Return the pair that a line names, or all pairs of the folder that it names."""
    for cell in dict.fromkeys((line, *re.split(r"[,;\t ]+", line, maxsplit=2)[:2])):
        parts = [part for part in cell.strip("\"'").replace("\\", "/").split("/") if part]
        if (found := find_by_tail(parts, names)) is not None:
            return (found,)
        if inside := folders.get("/".join(parts), ()):
            return inside
    return ()


def leave_for_prediction(
    images: Sequence[Path], splits: Mapping[Path, str], labelled: Iterable[str]
) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Separate images of splits without any mask: they are for prediction.

    Args:
        images: Images without a mask.
        splits: Their splits.
        labelled: The splits in which images have masks.

    Returns:
        The other images without a mask, and notes.
    """
    known = {"", "train", *labelled}
    counts = Counter(splits[path] for path in images if splits[path] not in known)
    return (
        tuple(path for path in images if splits[path] in known),
        tuple(
            f"{format_count(count, 'image')} of the split {split} without masks, for predicting"
            for split, count in counts.items()
        ),
    )


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
            raise DataError(f"'{path}' names '{name}', but {problem}")
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
        text = read_limited(path, _MAX_CSV_BYTES).decode("utf-8-sig")
        rows = csv.DictReader(io.StringIO(text), restval="")
        header = rows.fieldnames or ()
        image, split = _find_columns(header)
        if not image or not split:
            columns = ", ".join(header) or "(none)"
            raise DataError(
                f"'{path}' has the columns {columns}, but it needs "
                "image,split in its first line, and one line per image"
            )
        for row in rows:
            name, named = row[image], row[split]
            part = SPLIT_FOLDERS.get(named.strip().casefold(), named)
            if part not in SPLITS:
                raise DataError(
                    f"'{path}' puts '{name}' into the split {part!r}; "
                    f"choose one of {', '.join(SPLITS)}"
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
