"""Folder names and lists -> splits that the data set comes with: ``train/images``, ``test.txt``."""

from __future__ import annotations

import io
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from useg.data.dataset import SPLIT_FOLDERS, Pair
from useg.data.file_names import (
    IMAGE_WORDS,
    MASK_WORDS,
    SHORT_SPLITS,
    YEAR,
    join_comparable,
    plain_stem,
    split_folder,
    split_name,
)
from useg.data.split_files import (
    find_by_tail,
    has_split_word,
    path_tails,
    read_split_file,
    split_of_list,
)
from useg.errors import DataError, format_count
from useg.images.formats import IMAGE_SUFFIXES
from useg.parsing import decode_text, read_limited

# What may stand beside a split in a folder's name, apart from numbers: stage1_train, train_data.
_NEUTRAL_WORDS = frozenset(
    (*IMAGE_WORDS, *MASK_WORDS, "data", "dataset", "set", "split", "part", "stage", "task", "fold")
)
_MAX_LIST_BYTES = 50_000_000
# Names longer than a path and its mask's name no file.
_MAX_NAME_LENGTH = 10_000
_MAX_NAMED = 3
_MAX_FILES_OF_A_SUFFIX = 20
_FOLD_NAME = re.compile(r"(?<![a-z])k?folds?(?![a-z])|(cv|split|partition)[_ -]?[0-9]")
_SPREADSHEETS = (".xlsx", ".xls", ".ods")
_UNREAD_SUFFIXES = (".pkl", ".pickle", ".npz", ".mat", ".pt", ".parquet", *_SPREADSHEETS)
LIST_SUFFIXES = (".txt", ".csv", ".tsv", ".lst", ".json", ".yaml", ".yml", *_UNREAD_SUFFIXES)
_HOW_TO_CHOOSE = "to use them, write a split.csv with the columns image,split"
# A list counts if it names at least this share of files that are there.
_MIN_KNOWN = 0.5


def generalize_folder(name: str) -> str:
    """Return a file's folder without the names of splits and numbers."""
    parts = split_name(name.rpartition("/")[0])
    return "".join(
        "*" if part in SPLIT_FOLDERS else "0" if part.isdecimal() else part for part in parts
    )


def find_official_split(path: Path, root: Path, affixes: frozenset[str] = frozenset()) -> str:
    """Return the official split from a file's folders, or ``""``.

    Examples are ``train/images``, ``images/train``, ``train_images``, ``imagesTr``.

    Args:
        path: The file.
        root: The data folder.
        affixes: Other texts beside the name of a split, from :func:`learn_affixes`.
    """
    inside = path.relative_to(root) if path.is_relative_to(root) else path
    splits = (_split_of_folder(part, affixes) for part in reversed(inside.parts[:-1]))
    return next((split for split in splits if split), "")


def find_official_splits(
    images: Iterable[Path], root: Path, files: Iterable[Path] = ()
) -> dict[Path, str]:
    """Return the official split of each image; ``files`` are those whose folders show affixes."""
    images = list(images)
    affixes = learn_affixes(files or images, root)
    return {path: find_official_split(path, root, affixes) for path in images}


def find_splits(images: Sequence[Path], root: Path, files: Iterable[Path]) -> dict[Path, str]:
    """Return the split of each image that folders, or else names, show; ``""`` without one."""
    splits = find_official_splits(images, root, files)
    return splits if any(splits.values()) else {**splits, **split_by_stems(images)}


def split_by_masks(
    splits: Mapping[Path, str], masks: Mapping[Path, Path], root: Path
) -> dict[Path, str]:
    """Return the splits of images; if none has one, those of the folders of their masks.

    So the images of one folder are split by ``labels/train`` and ``labels/test``.
    """
    of_masks = {} if any(splits.values()) else find_official_splits(masks.values(), root)
    return {**splits, **{image: of_masks[mask] for image, mask in masks.items() if of_masks}}


def learn_affixes(files: Iterable[Path], root: Path) -> frozenset[str]:
    """Return texts beside splits in folders' names: ``crop`` for ``traincrop`` and ``valcrop``.

    Each stands beside several splits, or all folders of one folder have a split in their names:
    ``SBUTrain4K`` and ``SBU-Test``.
    """
    parents = {path.parent for path in files}
    folders = {each for path in parents for each in (path, *path.parents) if root in each.parents}
    found: dict[str, set[str]] = defaultdict(set)
    beside: dict[Path, list[tuple[str, str]]] = defaultdict(list)
    for folder in folders:
        split, rest = divide_folder(folder.name)
        beside[folder.parent].append((split, rest))
        if not split:
            split, rest = _divide_short(folder.name)
        if split and rest:
            found[rest].add(split)
    for divided in beside.values():
        splits = {split for split, _ in divided}
        if "" not in splits and len(splits) > 1:
            for _, rest in divided:
                found[rest] |= splits
    return frozenset(rest for rest, splits in found.items() if len(splits) > 1)


def _divide_short(folder: str) -> tuple[str, str]:
    """Return the split whose short name is in a folder's name, and the rest, which is not empty."""
    parts = [part.casefold() for part in split_folder(folder)]
    splits = {SHORT_SPLITS[part] for part in parts if part in SHORT_SPLITS}
    rest = "".join(part for part in parts if part not in SHORT_SPLITS and part.isalpha())
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


def _split_of_folder(folder: str, affixes: frozenset[str]) -> str:
    split, rest = divide_folder(folder)
    if not split:
        short, rest = _divide_short(folder)
        return short if rest in affixes else ""
    words = re.findall(r"[^\W\d_]+", rest)
    parts = (part.casefold() for part in split_folder(folder) if part.isalpha())
    is_plain = all(part in _NEUTRAL_WORDS or part in SPLIT_FOLDERS for part in parts)
    return split if not words or is_plain or rest in affixes else ""


def split_by_stems(images: Sequence[Path]) -> dict[Path, str]:
    """Return the splits that names begin or end with: ``train-volume``, ``a_test``.

    They count if every name has one, and not all have the same.
    """
    found: dict[Path, str] = {}
    for path in images:
        splits = _splits_of_stem(path)
        if len(splits) != 1:
            return {}
        found[path] = splits.pop()
    return found if len(set(found.values())) > 1 else {}


def _splits_of_stem(path: Path) -> set[str]:
    """Return the splits that a file's name begins and ends with."""
    words = [part.casefold() for part in split_folder(plain_stem(path)) if part.isalpha()]
    return {SPLIT_FOLDERS[word] for word in (*words[:1], *words[-1:]) if word in SPLIT_FOLDERS}


@dataclass(frozen=True)
class _SplitList:
    """A list of images of one split: the lines, or None if they are those of the file."""

    file: Path
    split: str
    lines: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ListedSplits:
    """Pairs with the splits of the lists ``files``, if there are any, and notes about them."""

    pairs: tuple[Pair, ...]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def read_split_lists(files: Sequence[Path], pairs: Sequence[Pair], root: Path) -> ListedSplits:
    """Split pairs by text files such as ``train.txt`` and ``ImageSets/Segmentation/val.txt``.

    A line names an image, or a folder of images: DAVIS lists its videos. Lists are also tables with
    the split of each image, or with flags such as ``is_valid``, and JSON or YAML such as
    ``{"train": [...], "val": [...]}``.

    The lists of one folder count: of those that name most pairs. Images in no list keep the split
    of their folder. Otherwise they are for training if there is no list for training, and else in
    the split ``gap``. Images in a folder for testing stay there.

    Args:
        files: Text, JSON and YAML files in the data folder, and others with their suffixes.
        pairs: The pairs, whose images or masks the lists name: by path, by name, or without the
            suffix.
        root: The data folder.

    Raises:
        DataError: An image is in two lists.
    """
    groups, with_folds = _group_lists(files)
    splits, used = _read_best_group(groups, pairs, root) if groups else ({}, ())
    if not splits and (others := _group_other_lists(files)):
        read = [_read_best_group({key: others[key]}, pairs, root) for key in sorted(others)]
        known = [each for each in read if each[0]]
        if len(known) == 1:
            splits, used = known[0]
        else:
            with_folds += [path for each in known for path in each[1]]
    is_split = any(pair.split for pair in pairs)
    if is_split and "val" not in splits.values():
        # Such lists say no more than the folders.
        splits, used = {}, ()
    notes = tuple(_describe_unused_lists(files, with_folds, used, root))
    if not splits:
        return ListedSplits(tuple(pairs), (), notes)
    rest = "" if is_split else "gap" if "train" in splits.values() else "train"
    num_rest = len(pairs) - len(splits)
    if num_rest:
        where = {"gap": "left out", "train": "for training"}
        what = where.get(rest, "in the split of their folder")
        shown = ", ".join(path.name for path in used)
        notes = (f"{format_count(num_rest, 'image')} not listed in {shown}: {what}", *notes)
    found = []
    for pair in pairs:
        split = splits.get(pair, pair.split or rest)
        found.append(pair if pair.split == "test" else replace(pair, split=split))
    return ListedSplits(tuple(found), used, notes)


def _group_lists(files: Sequence[Path]) -> tuple[dict[Path, list[_SplitList]], list[Path]]:
    """Return the lists of each folder, or of one file with several, and the files with folds."""
    groups: dict[Path, list[_SplitList]] = defaultdict(list)
    with_folds: list[Path] = []
    counts = Counter((path.parent, path.suffix) for path in files)
    for path in files:
        listed: dict[str, list[str]] = {}
        # Where there are many files, each image has one.
        is_few = counts[path.parent, path.suffix] <= _MAX_FILES_OF_A_SUFFIX
        if is_few or has_split_word(path):
            listed, has_folds = read_split_file(path)
            with_folds += [path] if has_folds else []
        split = split_of_list(path.stem)
        if len(listed) > 1:
            groups[path] += [_SplitList(path, each, tuple(listed[each])) for each in listed]
        elif split and (path.suffix.lower() != ".json" or split in listed):
            lines = tuple(listed[split]) if split in listed else None
            groups[path.parent].append(_SplitList(path, split, lines))
    return groups, with_folds


def _group_other_lists(files: Sequence[Path]) -> dict[Path, list[_SplitList]]:
    """Return lists with other words in their names, such as ``drive_train_frames.txt``.

    Those of a group differ only by the split, and have at least two.
    """
    texts = [path for path in files if path.suffix in (".txt", ".lst")]
    counts = Counter(path.parent for path in texts)
    groups: dict[Path, list[_SplitList]] = defaultdict(list)
    for path in texts:
        # Where there are many files, each image has one.
        if counts[path.parent] > _MAX_FILES_OF_A_SUFFIX:
            continue
        parts = split_folder(path.stem)
        words = [word for word in parts if word.casefold() in SPLIT_FOLDERS]
        if len(words) == 1:
            rest = "".join("*" if part == words[0] else part for part in parts)
            split = SPLIT_FOLDERS[words[0].casefold()]
            groups[path.parent / rest].append(_SplitList(path, split))
    return {key: each for key, each in groups.items() if len({one.split for one in each}) > 1}


def _read_best_group(
    groups: Mapping[Path, Sequence[_SplitList]], pairs: Sequence[Pair], root: Path
) -> tuple[dict[Pair, str], tuple[Path, ...]]:
    """Return the splits by the lists that name most pairs, and these lists."""
    names, folders = _names_of(pairs, root), _folders_of(pairs, root)
    best: tuple[dict[Pair, str], tuple[Path, ...]] = ({}, ())
    for place in sorted(groups, key=lambda path: (path.name != "Segmentation", path)):
        found = _read_group(groups[place], names, folders)
        best = found if len(found[0]) > len(best[0]) else best
    return best if best[0] else _read_short_names(groups, pairs)


def _read_short_names(
    groups: Mapping[Path, Sequence[_SplitList]], pairs: Sequence[Pair]
) -> tuple[dict[Pair, str], tuple[Path, ...]]:
    """Return the splits by lists that call images by the part of their names that differs.

    ``7`` and ``007.jpg`` stand for ``img_007_sat.png``. All lines of all lists must name an image.
    """
    names = _short_names_of(pairs)
    best: tuple[dict[Pair, str], tuple[Path, ...]] = ({}, ())
    for place in sorted(groups):
        lists = []
        for each in groups[place]:
            lines = each.lines
            if lines is None:
                lines = tuple(_read_lines(each.file, len(names)))
            lists.append(replace(each, lines=tuple(map(_shorten_line, lines))))
        if all(each.lines and names.keys() >= {*each.lines} for each in lists):
            found = _read_group(lists, names, {})
            best = found if len(found[0]) > len(best[0]) else best
    return best


def _short_names_of(pairs: Sequence[Pair]) -> dict[str, set[Pair]]:
    """Return pairs by their stems, with and without what all stems begin and end with."""
    found: dict[str, set[Pair]] = defaultdict(set)
    for paths in ([pair.image for pair in pairs], [pair.mask for pair in pairs]):
        rows = [split_name(plain_stem(path)) for path in paths]
        width = min(map(len, rows)) - 1
        start, end = (
            next(
                (k for k in range(width) if len({row[k * step + shift] for row in rows}) > 1), width
            )
            for step, shift in ((1, 0), (-1, -1))
        )
        for pair, row in zip(pairs, rows, strict=True):
            for parts in (row, row[start:], row[start : max(start + 1, len(row) - end)]):
                found[join_comparable(parts)].add(pair)
    return {name: named for name, named in found.items() if name and len(named) == 1}


def _shorten_line(line: str) -> str:
    """``images/007.jpg masks/007.png`` -> ``7``."""
    cell = re.split(r"[,;\t ]+", line, maxsplit=1)[0].strip("\"'").replace("\\", "/")
    path = Path(cell[:_MAX_NAME_LENGTH].rpartition("/")[2])
    stem = plain_stem(path) if path.suffix.casefold() in IMAGE_SUFFIXES else path.name
    return join_comparable(split_name(stem))


def _describe_unused_lists(
    files: Sequence[Path], with_folds: Sequence[Path], used: Sequence[Path], root: Path
) -> Iterator[str]:
    """Say which files seem to have splits that are not used: of folds, of other images, unread."""
    taken = f"only {used[0].relative_to(root).as_posix()}" if used else "none of them"
    reasons = {
        "folds": f"not used, because there are several folds or splits; useg uses {taken}",
        "unread": "not used as splits, because useg does not read such files",
        "unknown": (
            "not used as splits, because too few of their lines name an image that has a mask, or "
            "because they are too large"
        ),
    }
    unused: dict[str, list[str]] = {reason: [] for reason in reasons}
    for path in files:
        reason = "" if path in used else _why_unused(path, with_folds, root, are_used=bool(used))
        if reason:
            unused[reason].append(path.relative_to(root).as_posix())
    for reason, names in unused.items():
        if names:
            more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
            listed = ", ".join(names[:_MAX_NAMED])
            yield f"{listed}{more}: {reasons[reason]}; {_HOW_TO_CHOOSE}"


def _why_unused(path: Path, with_folds: Sequence[Path], root: Path, *, are_used: bool) -> str:
    """Return why a file that is not used may still have splits, or ``""`` if it hardly has."""
    has_word = has_split_word(path)
    is_list = path.suffix in (".txt", ".lst") and bool(split_of_list(path.stem))
    is_fold = _FOLD_NAME.search(path.relative_to(root).as_posix().casefold()) is not None
    if path in with_folds or (is_fold and (has_word or is_list)):
        return "folds"
    if path.suffix.lower() in _UNREAD_SUFFIXES:
        is_table = path.suffix.lower() in _SPREADSHEETS and bool(split_of_list(path.stem))
        return "unread" if has_word or is_table else ""
    return "unknown" if not are_used and (has_word or is_list) else ""


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
    if len(line) > _MAX_NAME_LENGTH:
        return ()
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

    So are images with names such as ``test_a``, if no image with a mask is called like that.

    Args:
        images: Images without a mask.
        splits: Their splits.
        labelled: The splits in which images have masks.

    Returns:
        The other images without a mask, and notes.
    """
    known = {"", "train", *labelled}
    if not any(map(_splits_of_stem, splits.keys() - {*images})):
        tests = [path for path in images if not splits[path] and _splits_of_stem(path) == {"test"}]
        splits = {**splits, **dict.fromkeys(tests, "test")}
    counts = Counter(splits[path] for path in images if splits[path] not in known)
    return (
        tuple(path for path in images if splits[path] in known),
        tuple(
            f"{format_count(count, 'image')} of the split {split} without a mask: "
            "left for prediction"
            for split, count in counts.items()
        ),
    )
