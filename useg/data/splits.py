"""A data set -> the same with a split for every pair, so that validation measures learning and not memory.

Neighbouring frames of a film or slices of a stack are nearly the same picture. A random split puts them on both sides, and the score
then measures memory; so numbered names are cut into contiguous blocks with a gap between, or whole sequences are held out.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from useg.data.dataset import Dataset, Pair
from useg.data.images import natural_key
from useg.data.matching import bare
from useg.errors import UsageError, choose
from useg.files import replacing

Cut = Callable[[Sequence[Pair], float], tuple[list[Pair], str]]  # (pairs, share) -> pairs with splits, and how in words

SPLIT_FOLDERS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test", "testing": "test"}
SPLITS = ("train", "val", "test", "gap")
_LONG = 30  # a sequence of this many images gives a block of its own; shorter ones are held out whole when there are several
_FILM = 5  # a sequence of this many numbered names looks like a film


def assign_splits(dataset: Dataset, mode: str = "auto", holdout: float = 0.2) -> Dataset:
    """Give every pair a split: ``train``, ``val``, ``test``, or ``gap`` (too near to ``val`` to train on).

    Args:
        dataset: as :func:`useg.data.layouts.find` returns it.
        mode: ``auto`` (official splits if there are any, blocks when the names look like a film or a stack, otherwise random), ``blocks``,
            ``random`` (by a hash of the name, so that added images do not reshuffle the others) or ``official``.
        holdout: share of the images for validation, where it is cut here.

    Returns:
        The data set with all splits decided; ``splits_by`` says how. Official splits are kept (``test`` in every mode); without ``val``,
        it is cut from ``train``.

    Raises:
        UsageError: an unknown mode, a share outside 0..1, no official splits in mode ``official``, or too few images.
    """
    cut = choose("the split mode", mode, _MODES)
    if not 0 < holdout < 1:
        raise UsageError(f"the share held out for validation is {holdout}, but it must lie between 0 and 1; 0.2 is usual")
    has_official = any(pair.split for pair in dataset.pairs)
    if mode == "official" and not has_official:
        raise UsageError(
            f"'{dataset.root}' has no official splits; choose the split auto, blocks or random, or make folders train/ and val/ or a split.csv"
        )
    if mode in ("auto", "official") and has_official:
        return _complete(dataset, holdout)
    return _recut(dataset, cut, [pair for pair in dataset.pairs if pair.split != "test"], holdout, "")


def _complete(dataset: Dataset, holdout: float) -> Dataset:
    """Keep the official splits; cut ``val`` from ``train`` where there is none."""
    missing = [pair.image for pair in dataset.pairs if not pair.split]
    if missing:
        raise UsageError(
            f"{len(missing)} of {len(dataset.pairs)} images are in no split while the others are, such as '{missing[0]}'; "
            f"put them into train, val or test, name them in split.csv, or choose the split blocks or random"
        )
    train, val = dataset.of("train"), dataset.of("val")
    how = dataset.splits_by or "official"
    if val:
        _enough((*train[:1], *val[:1]))
        return replace(dataset, splits_by=how)
    return _recut(dataset, _auto, train, holdout, f"{how}; val cut from train: ")


def _recut(dataset: Dataset, cut: Cut, pairs: Sequence[Pair], holdout: float, prefix: str) -> Dataset:
    """Cut ``pairs`` anew; the other pairs of the data set keep their splits."""
    chosen, how = cut(_enough(pairs), holdout)
    splits = {pair.image: pair.split for pair in chosen}
    kept = tuple(replace(pair, split=splits.get(pair.image, pair.split)) for pair in dataset.pairs)
    return replace(dataset, pairs=kept, splits_by=prefix + how)


def _enough(pairs: Sequence[Pair]) -> Sequence[Pair]:
    if len(pairs) < 2:
        raise UsageError(
            f"the number of images for training and validation is {len(pairs)}, but each needs at least one of its own; add images with masks"
        )
    return pairs


def _auto(pairs: Sequence[Pair], holdout: float) -> tuple[list[Pair], str]:
    return (_blocks if looks_filmed(pairs) else _random)(pairs, holdout)


def looks_filmed(pairs: Sequence[Pair]) -> bool:
    """Tell whether at least half of the images carry running numbers, as frames of a film and slices of a stack do."""
    return sum(len(sequence) for sequence in sequences(pairs) if len(sequence) >= _FILM) * 2 >= len(pairs)


def sequences(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Group images whose folder and name agree but for the last number, each in natural order: ``A_1, A_2, B_1`` -> ``[A_1, A_2], [B_1]``.

    Folders called train, val or test are passed over: the same film may lie in several of them.
    """
    groups: dict[tuple[str, str, str], list[Pair]] = defaultdict(list)
    for pair in sorted(pairs, key=lambda pair: natural_key(pair.image)):
        stem = bare(pair.image.stem)
        number = re.search(r"[0-9]+(?=[^0-9]*$)", stem)
        name = (stem[: number.start()], stem[number.end() :]) if number else (stem, "")
        folder = "/".join(part for part in pair.image.parent.parts if part.casefold() not in SPLIT_FOLDERS)
        groups[folder, *name].append(pair)
    return [sorted(group, key=lambda pair: natural_key(pair.image.stem)) for group in groups.values()]


def _blocks(pairs: Sequence[Pair], holdout: float) -> tuple[list[Pair], str]:
    groups = sequences(pairs)
    long = [group for group in groups if len(group) >= _LONG]
    short = [group for group in groups if len(group) < _LONG]
    splits: dict[Pair, str] = {}
    said = []
    if len(short) * holdout >= 1:
        held = _whole(short, holdout)
        splits |= {pair: "val" for group in held for pair in group}
        said.append(f"{len(held)} of {len(short)} short sequences held out whole")
    else:
        # Too few short ones to hold out whole: each is cut like a long one, and single names are taken together.
        long = long + [group for group in short if len(group) >= _FILM]
        loose = [pair for group in short if len(group) < _FILM for pair in group]
        long = long if long else [loose]
    for group in long:
        splits |= zip(group, _cut(len(group), holdout), strict=True)
    if long:
        gap = sum(split == "gap" for split in splits.values())
        each = f"each of {len(long)} sequences" if len(long) > 1 else "the sequence"
        said.append(f"the last {holdout:.0%} of {each}, {gap} image{'s' * (gap != 1)} before {'them' if len(long) > 1 else 'it'} left out")
    return [replace(pair, split=splits.get(pair, "train")) for pair in pairs], "blocks: " + "; ".join(said)


def _cut(count: int, holdout: float) -> list[str]:
    """Return the splits of a sequence of ``count`` images: its end for validation, with a gap of about 5 % (1 to 10 images) before it."""
    val = min(max(1, round(count * holdout)), count - 1)
    gap = min(max(1, min(10, round(count * 0.05))), count - val - 1)
    return ["train"] * (count - val - gap) + ["gap"] * gap + ["val"] * val


def _whole(groups: list[list[Pair]], holdout: float) -> list[list[Pair]]:
    """Choose whole sequences, in the order of their names' hashes, until the share is reached; never all of them."""
    wanted = holdout * sum(len(group) for group in groups)
    held: list[list[Pair]] = []
    for group in sorted(groups, key=lambda group: _hash(group[0].image.parent.name + "/" + group[0].image.stem))[:-1]:
        if held and sum(len(other) for other in held) + len(group) / 2 > wanted:
            break
        held.append(group)
    return held


def _random(pairs: Sequence[Pair], holdout: float) -> tuple[list[Pair], str]:
    hashes = {pair: _hash(pair.image.stem) for pair in pairs}
    count = sum(value < holdout for value in hashes.values())
    held = set(sorted(pairs, key=lambda pair: (hashes[pair], pair.image))[: min(max(1, count), len(pairs) - 1)])
    return [replace(pair, split="val" if pair in held else "train") for pair in pairs], "random, by a hash of the name"


def _hash(name: str) -> float:
    """Map a name to 0..1, the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64


def read_split_csv(path: Path, dataset: Dataset) -> Dataset:
    """Give the pairs the splits of a CSV file with the columns ``image`` (path below the root, name or stem) and ``split``.

    Raises:
        UsageError: no such file or columns, an unknown split, or an image that is not there, named twice, not clear, or not named.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text("utf-8-sig")), restval=""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"'{path}' cannot be read ({error}); it needs the columns image,split") from error
    if not rows or not {"image", "split"} <= rows[0].keys():
        raise UsageError(
            f"'{path}' needs a first line with the columns image,split and one line per image; it has {', '.join(rows[0]) if rows else 'none'}"
        )
    names: dict[str, set[Pair]] = defaultdict(set)
    for pair in dataset.pairs:
        inside = _name(pair, dataset)
        for name in (inside, inside.rpartition(".")[0], pair.image.name, pair.image.stem):
            names[name].add(pair)
    splits: dict[Pair, str] = {}
    for row in rows:
        found, split = names.get(row["image"], set()), SPLIT_FOLDERS.get(row["split"], row["split"])
        if split not in SPLITS:
            raise UsageError(f"'{path}' puts '{row['image']}' into the split {split!r}; known are {', '.join(SPLITS)}")
        if len(found) != 1:
            say = "more than one image has this name: give its path below the data folder" if found else "there is no such image with a mask"
            raise UsageError(f"'{path}' names '{row['image']}', but {say}")
        if splits.setdefault(next(iter(found)), split) != split:
            raise UsageError(f"'{path}' puts '{row['image']}' into two splits; keep one")
    missing = [pair for pair in dataset.pairs if pair not in splits]
    if missing:
        raise UsageError(
            f"'{path}' does not name {len(missing)} of {len(dataset.pairs)} images, such as '{missing[0].image}'; add them (gap leaves one out)"
        )
    return replace(dataset, pairs=tuple(replace(pair, split=splits[pair]) for pair in dataset.pairs), splits_by=path.name)


def write_split_csv(path: Path, dataset: Dataset) -> None:
    """Write every image's split as CSV (``image,split``); :func:`read_split_csv` gives the same splits back.

    Raises:
        UsageError: the file cannot be written.
    """
    target = io.StringIO()
    rows = csv.writer(target, lineterminator="\n")
    rows.writerow(("image", "split"))
    rows.writerows((_name(pair, dataset), pair.split) for pair in dataset.pairs)
    with replacing(path) as temporary:
        temporary.write_text(target.getvalue(), "utf-8")


def _name(pair: Pair, dataset: Dataset) -> str:
    return (pair.image.relative_to(dataset.root) if pair.image.is_relative_to(dataset.root) else pair.image).as_posix()


_MODES: dict[str, Cut] = {
    "auto": _auto,
    "blocks": _blocks,
    "random": _random,
    "official": _auto,
}
