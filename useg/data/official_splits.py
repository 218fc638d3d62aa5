"""Folder names and lists -> the official splits: ``train/images``, ``images_val``, ``test.txt``."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from useg.data.dataset import SPLIT_FOLDERS, Pair
from useg.data.names import IMAGE_WORDS, MASK_WORDS, YEAR, plain_stem, split_folder
from useg.errors import DataError, format_count
from useg.parsing import read_limited

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
        if split and rest:
            found[rest].add(split)
    return frozenset(rest for rest, splits in found.items() if len(splits) > 1)


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
class ListedSplits:
    """Pairs with the splits of the lists ``files``; ``notes`` say what is in none of them."""

    pairs: tuple[Pair, ...]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def read_split_lists(
    files: Sequence[Path], pairs: Sequence[Pair], root: Path
) -> ListedSplits | None:
    """Split pairs by text files such as ``train.txt`` and ``ImageSets/Segmentation/val.txt``.

    The lists of one folder count: of those that name most pairs. Images in no list are for
    training if there is no list for training, and otherwise in the split ``gap``.

    Args:
        files: Text files in the data folder.
        pairs: The pairs, whose images or masks the lists name: by path, by name, or without the
            suffix.
        root: The data folder.

    Raises:
        DataError: An image is in two lists.
    """
    groups: dict[Path, dict[Path, str]] = defaultdict(dict)
    for path in files:
        if split := split_of_list(path.stem):
            groups[path.parent][path] = split
    names = _names_of(pairs, root) if groups else {}
    best: tuple[dict[Pair, str], tuple[Path, ...]] = ({}, ())
    for folder in sorted(groups, key=lambda path: (path.name != "Segmentation", path)):
        found = _read_group(groups[folder], names, root)
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
    """Return the split that the name of a list says, or ``""``."""
    words = re.findall(r"[^\W\d_]+", stem.casefold())
    splits = {word for word in words if word in SPLIT_FOLDERS}
    is_plain = all(word in _LIST_WORDS or word in splits for word in words)
    return SPLIT_FOLDERS[splits.pop()] if is_plain and len(splits) == 1 else ""


def _names_of(pairs: Sequence[Pair], root: Path) -> dict[str, set[Pair]]:
    names: dict[str, set[Pair]] = defaultdict(set)
    for pair in pairs:
        for path in (pair.image, pair.mask):
            inside = path.relative_to(root) if path.is_relative_to(root) else path
            for k in range(len(inside.parts)):
                text = PurePosixPath(*inside.parts[k:]).as_posix()
                names[text].add(pair)
                names[text.removesuffix(path.suffix)].add(pair)
            names[plain_stem(path)].add(pair)
    return names


def _read_group(
    files: Mapping[Path, str], names: Mapping[str, set[Pair]], root: Path
) -> tuple[dict[Pair, str], tuple[Path, ...]]:
    """Return the splits that the lists of one folder give, and which lists were used."""
    both = {path for path in files if path.stem.casefold() in ("trainval", "train_val")}
    is_divided = len({files[path] for path in set(files) - both}) > 1
    splits: dict[Pair, str] = {}
    places: dict[Pair, Path] = {}
    used = []
    for path, split in files.items():
        if path in both and is_divided:
            continue
        lines = _read_lines(path)
        if len(lines) > len(names) / _MIN_KNOWN:
            # Too few of them can be known.
            continue
        found = [pair for line in lines if (pair := _find_pair(line, names)) is not None]
        if not found or len(found) < _MIN_KNOWN * len(lines):
            continue
        used.append(path)
        for pair in found:
            if splits.setdefault(pair, split) != split:
                raise DataError(
                    f"'{places[pair]}' and '{path}' both name '{pair.image.name}'; keep it in one "
                    "of them, or write a split.csv with the columns image,split"
                )
            places[pair] = path
    return splits, tuple(used)


def _read_lines(path: Path) -> list[str]:
    try:
        text = read_limited(path, _MAX_LIST_BYTES).decode("utf-8-sig", "surrogateescape")
    except (OSError, ValueError):
        return []
    return [line.strip() for line in text.splitlines() if line.strip() and line[0] != "#"]


def _find_pair(line: str, names: Mapping[str, set[Pair]]) -> Pair | None:
    for cell in dict.fromkeys((line, *re.split(r"[,;\t ]+", line)[:2])):
        parts = [part for part in cell.strip("\"'").replace("\\", "/").split("/") if part]
        for k in range(len(parts)):
            found = names.get("/".join(parts[k:]), set())
            if len(found) == 1:
                return next(iter(found))
    return None


def leave_for_prediction(
    images: Sequence[Path], splits: Mapping[Path, str], labelled: Iterable[str]
) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Separate images of splits without any mask, which are there to be predicted.

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
