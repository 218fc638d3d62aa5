"""A data set -> K folds, in which every image is held out once: whole groups where there are any.

Groups are what names show: patients, slides, places, or the recordings of several videos. Where
there are groups, each fold also keeps a few images of its training groups back: the model's score
on them is that for images like those that it was trained on, and its score on the held-out groups
is that for a new group.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from useg.data.dataset import Dataset, Pair, pair_name
from useg.data.duplicates import is_quick_to_compare
from useg.data.splits import (
    MIN_BLOCK_LENGTH,
    are_numbered,
    draw_number,
    find_sequences,
    gap_length,
    group_by_name,
    group_duplicates,
    names_below_root,
)
from useg.errors import DataError, SettingsError
from useg.files import natural_key

# Share of the training images that is kept back to score images of the training groups.
NEAR_SHARE = 0.1

# The fewest recordings that are groups; more give a better estimate.
_MIN_RECORDINGS = 2


@dataclass(frozen=True)
class Fold:
    """One fold.

    Args:
        dataset: The data set: ``val`` is held out, ``gap`` is used for nothing in training.
        near: Images in ``gap`` of groups that the fold trains on; empty without groups.
    """

    dataset: Dataset
    near: tuple[Pair, ...] = ()


@dataclass(frozen=True)
class Folds:
    """The folds of a data set.

    Args:
        folds: The folds.
        groups: For each pair that a fold holds out, its group; empty without groups.
        by: How the folds were made, in words.
    """

    folds: tuple[Fold, ...]
    groups: dict[tuple[Path, int | None], str]
    by: str


def find_groups(dataset: Dataset, pairs: Sequence[Pair]) -> list[str] | None:
    """Return each image's group by its name, or None: patients, places, or recordings.

    The videos of a data set are groups if their names have digits: ``seq1_004`` and ``seq2_017``,
    but not ``cat_004`` and ``dog_017``.
    """
    names = names_below_root(dataset, pairs)
    if found := group_by_name(names):
        return found
    if not are_numbered(pairs):
        return None
    name_of = dict(zip(pairs, names, strict=True))
    recordings: dict[Pair, str] = {}
    for sequence in find_sequences(pairs):
        first = name_of[sequence[0]]
        recording = re.sub(r"[0-9]+(?=[^0-9]*$)", "", first).rstrip("_-. /")
        recordings |= dict.fromkeys(sequence, recording)
    groups = [recordings[pair] for pair in pairs]
    has_ids = all(re.search(r"[0-9]", name) for name in set(groups))
    return groups if has_ids and len(set(groups)) >= _MIN_RECORDINGS else None


def find_groups_by_split(dataset: Dataset, held_out: str) -> tuple[set[str], set[str]] | None:
    """Return the groups of the training images and of those held out; None if names show none."""
    pairs = [pair for pair in dataset.pairs if pair.split in ("train", held_out)]
    groups = find_groups(dataset, pairs)
    if groups is None:
        return None
    sides: dict[str, set[str]] = {"train": set(), held_out: set()}
    for pair, group in zip(pairs, groups, strict=True):
        sides[pair.split].add(group)
    return sides["train"], sides[held_out]


def describe_score(dataset: Dataset) -> str:
    """Describe to which images a score on the held-out images applies, and to which it does not.

    Empty if neither names nor numbers show that images belong together.
    """
    sides = find_groups_by_split(dataset, "val")
    if sides is None:
        if not are_numbered([pair for pair in dataset.pairs if pair.split in ("train", "val")]):
            return ""
        return (
            "the held-out images come from the same recording as the training images: the score "
            "applies to images like these, and scores on other recordings are not known"
        )
    train, held_out = sides
    if not train & held_out:
        group = min(held_out)
        return f"whole groups are held out (such as {group}): the score applies to new groups"
    return (
        f"the held-out images come from the same {len(train | held_out)} groups (such "
        f"as {min(held_out)}) as the training images: the score applies to images like these; "
        "expect less on a new group, and measure how much with five folds (--folds 5, or "
        "train_folds in Python)"
    )


def make_folds(dataset: Dataset, count: int) -> Folds:
    """Divide a data set into folds of about the same size.

    Args:
        dataset: As :func:`useg.data.layouts.find_dataset` returns it. Official test images, and
            those of the split ``gap``, take no part.
        count: Number of folds, at least 2. There are at most as many as groups or images.

    Raises:
        SettingsError: There are fewer than 2 folds.
        DataError: There are too few images.
    """
    if count < 2:
        raise SettingsError(f"{count} folds are not possible; choose 2 or more (5 is usual)")
    parts = [pair for pair in dataset.pairs if pair.split not in ("test", "gap")]
    pairs = sorted(parts, key=lambda pair: natural_key(pair_name(pair, dataset.root)))
    if len(pairs) < 2:
        raise DataError(
            f"'{dataset.root}' has {len(pairs)} images with masks, but folds need 2 or more; add "
            "images with masks"
        )
    groups = find_groups(dataset, pairs)
    sequences = find_sequences(pairs) if not groups and are_numbered(pairs) else []
    if groups:
        numbers, count = _divide_units(groups, count)
        by = (
            f"{count} folds of whole groups; file names show {len(set(groups))} groups, such as "
            f"{groups[0]}"
        )
    elif sequences:
        numbers, count = _cut_blocks(pairs, sequences, count)
        by = f"{count} folds; each holds out one block of every sequence"
    else:
        is_quick = is_quick_to_compare(pairs)
        units = group_duplicates(dataset, pairs) if is_quick else [str(p.image) for p in pairs]
        numbers, count = _divide_units(units, count)
        by = f"{count} random folds; near duplicates stay together"
    folds = tuple(
        _make_fold(dataset, pairs, numbers, fold, groups, sequences) for fold in range(count)
    )
    by_pair = {p.identity: group for p, group in zip(pairs, groups or (), strict=False)}
    return Folds(folds, by_pair, by)


def _divide_units(units: Sequence[str], count: int) -> tuple[list[int], int]:
    """Put whole units into folds, the largest first, each into the smallest fold."""
    sizes = Counter(units)
    count = min(count, len(sizes))
    if count < 2:
        raise DataError(
            "all images are near duplicates of each other, so none can be held out; add different "
            "ones"
        )
    held = [0] * count
    fold_of = {}
    for unit in sorted(sizes, key=lambda unit: (-sizes[unit], draw_number(unit))):
        smallest = held.index(min(held))
        fold_of[unit] = smallest
        held[smallest] += sizes[unit]
    return [fold_of[unit] for unit in units], count


def _cut_blocks(
    pairs: Sequence[Pair], sequences: Sequence[Sequence[Pair]], count: int
) -> tuple[list[int], int]:
    """Cut each sequence into one block for each fold; short sequences are divided whole."""
    numbers: dict[Pair, int] = {}
    count = min(count, max(len(sequences), *map(len, sequences)))
    for number, sequence in enumerate(sequences):
        for k, pair in enumerate(sequence):
            is_long = len(sequence) >= max(count, MIN_BLOCK_LENGTH) or len(sequences) == 1
            numbers[pair] = k * count // len(sequence) if is_long else number % count
    return [numbers[pair] for pair in pairs], count


def _make_fold(
    dataset: Dataset,
    pairs: Sequence[Pair],
    numbers: Sequence[int],
    fold: int,
    groups: Sequence[str] | None,
    sequences: Sequence[Sequence[Pair]],
) -> Fold:
    """Make one fold: its own images are held out, and neighbours of what is scored are left out."""
    splits = {
        pair: "val" if number == fold else "train"
        for pair, number in zip(pairs, numbers, strict=True)
    }
    near: set[Pair] = set()
    if groups:
        near = _keep_back(pairs, groups, splits, fold)
    elif sequences:
        held_out = {pair for pair in pairs if splits[pair] == "val"}
        for sequence in sequences:
            _leave_gaps(sequence, held_out, splits)
    by_file = {pair.identity: split for pair, split in splits.items()}
    own = tuple(
        replace(pair, split=by_file.get(pair.identity, pair.split or "gap"))
        for pair in dataset.pairs
    )
    by = f"fold {fold + 1} of {max(numbers) + 1}"
    fold_data = replace(dataset, pairs=own, splits_by=by)
    kept_back = {pair.identity for pair in near}
    return Fold(fold_data, tuple(pair for pair in own if pair.identity in kept_back))


def _keep_back(
    pairs: Sequence[Pair], groups: Sequence[str], splits: dict[Pair, str], fold: int
) -> set[Pair]:
    """Take about a tenth of the training images: a block of each large group, else every tenth.

    It is another tenth in every fold. The neighbours of a block are left out.
    """
    members: dict[str, list[Pair]] = defaultdict(list)
    for pair, group in zip(pairs, groups, strict=True):
        if splits[pair] == "train":
            members[group].append(pair)
    every = round(1 / NEAR_SHARE)
    kept: set[Pair] = set()
    small: list[Pair] = []
    for own in members.values():
        if len(own) < MIN_BLOCK_LENGTH:
            small += own[1:]
            continue
        length = round(NEAR_SHARE * len(own))
        first = (fold * 3 % every) * (len(own) - length) // (every - 1)
        block = set(own[first : first + length])
        _leave_gaps(own, block, splits)
        kept |= block
    kept |= set(small[fold % every :: every] or small[:1])
    splits |= dict.fromkeys(kept, "gap")
    return kept


def _leave_gaps(sequence: Sequence[Pair], scored: set[Pair], splits: dict[Pair, str]) -> None:
    """Leave out the neighbours of scored frames: they are nearly the same image."""
    gap = min(gap_length(len(sequence)), max(0, len(sequence) // 10))
    for k, pair in enumerate(sequence):
        around = sequence[max(0, k - gap) : k + gap + 1]
        if pair not in scored and scored.intersection(around):
            splits[pair] = "gap"
