"""A data set -> the same with a split for every pair, so that validation measures generalisation.

Neighbouring frames of a video or slices of a stack are near duplicates. A random split puts them
on both sides, and the score then measures memorisation. So numbered names are cut into contiguous
blocks with a gap between them, and images of one patient, slide or scene (by their names) or near
duplicates (by their pixels) stay on one side. The rest is split at random, and rare classes are
divided between the sides.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from useg.config import Settings
from useg.data.dataset import MISSING_ADVICE, SPLIT_FOLDERS, Dataset, Pair, pair_name
from useg.data.duplicates import (
    compute_signatures,
    count_class_pixels,
    group_near_duplicates,
    is_quick_to_compare,
)
from useg.data.file_names import strip_role_words
from useg.data.layouts import find_dataset
from useg.errors import DataError, SettingsError, choose, format_count
from useg.files import natural_key
from useg.images.formats import ALL_PAGES

# With fewer groups, a score on one held-out group means little.
MIN_GROUPS = 5
# Share of the images that one group may have.
_MAX_GROUP_SHARE = 0.5

# Factors by which the share of a class, and the number of images, may miss the wanted share.
_CLASS_TOLERANCE = 2.0
_COUNT_TOLERANCE = 1.25

# This many numbered names look like a video.
_MIN_SEQUENCE_LENGTH = 5
# A sequence of this length gives a block of its own. Several shorter ones are held out whole.
MIN_BLOCK_LENGTH = 30

# Called with the data set, pairs in order and the share to hold out; returns the pairs' splits and
# how they were made, in words.
SplitFunction = Callable[[Dataset, Sequence[Pair], float], tuple[list[str], str]]


def group_by_name(names: Sequence[str]) -> list[str] | None:
    """Return each image's group, or None if the names show no groups.

    ``P03_slice_004`` is in the group ``P03``, ``tile_12_0_256`` in ``tile_12``. A name consists of
    parts between ``/ _ - .`` and spaces (or, without these, of numbers with the letters before
    them: ``s03t12``). The first parts that differ between images name the group: as few of them as
    make at least five groups, with two images on average, none with more than half of all images.
    One of these parts must have a digit: ``cat_12`` and ``dog_12`` are kinds, not places.

    Args:
        names: Paths without suffix, which are unique in a data set.
    """
    rows = _split_names(names)
    width = Counter(map(len, rows)).most_common(1)[0][0] if rows else 0
    if sum(len(row) == width for row in rows) < len(rows):
        return None
    differing = [k for k in range(width) if len({row[k] for row in rows}) > 1]
    for count in range(1, len(differing)):
        first = differing[:count]
        groups = ["_".join(row[: first[-1] + 1]) for row in rows]
        sizes = Counter(groups)
        if 2 * len(sizes) > len(rows):
            return None
        has_id = any(all(re.search(r"\d", row[k]) for row in rows) for k in first)
        if (
            has_id
            and len(sizes) >= MIN_GROUPS
            and max(sizes.values()) <= _MAX_GROUP_SHARE * len(rows)
        ):
            return groups
    return None


def _split_names(names: Sequence[str]) -> list[list[str]]:
    split = [re.split(r"[/_\-. ]+", name) for name in names]
    if max(map(len, split), default=0) > 1:
        return split
    forms = {re.sub(r"\d+", "0", name) for name in names}
    return [re.findall(r"\D*\d+|\D+$", name) for name in names] if len(forms) == 1 else split


def choose_holdout(
    contents: NDArray[np.int64],
    sizes: NDArray[np.int64],
    draws: NDArray[np.float64],
    holdout: float,
) -> NDArray[np.bool_]:
    """Choose the groups to hold out: at random, and then as few as possible move until shares fit.

    Since a group's draw does not depend on the others, and shares may miss by a factor, an added
    group moves few others.

    Args:
        contents: ``(N, K)`` pixels of each class in each group; classes that a single group has do
            not count. K may be 0.
        sizes: ``(N,)`` images in each group.
        draws: ``(N,)`` random numbers from 0 to 1: a group is held out if its number is below
            ``holdout``. They also decide ties.
        holdout: Share of the images, and of each class, to hold out.

    Returns:
        ``(N,)`` whether each group is held out; never all, never none. N is at least 2.
    """
    known = contents[:, (contents > 0).sum(0) > 1]
    shares = np.column_stack((known, sizes)).astype(np.float64)
    shares /= shares.sum(0)
    tolerance = np.log([_CLASS_TOLERANCE] * known.shape[1] + [_COUNT_TOLERANCE])
    held = draws < holdout
    held[np.argmin(draws)], held[np.argmax(draws)] = True, False
    for _ in range(len(held)):
        now = shares[held].sum(0)
        moved = now + np.where(held, -1, 1)[:, None] * shares
        costs = _measure_misses(moved, holdout, tolerance)
        if held.sum() == 1:
            costs[held] = np.inf
        if (~held).sum() == 1:
            costs[~held] = np.inf
        best = np.lexsort((draws, costs))[0]
        if costs[best] >= _measure_misses(now[None], holdout, tolerance)[0] - 1e-9:
            break
        held[best] = not held[best]
    return held


def _measure_misses(
    shares: NDArray[np.float64], wanted: float, tolerance: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return how far the held out shares ``(N, K)`` miss the wanted one, ``(N,)``.

    A share of 0 counts like a hundredth of the wanted one.
    """
    misses = np.zeros(len(shares))
    for side, target in ((shares, wanted), (1 - shares, 1 - wanted)):
        ratio = np.abs(np.log((np.maximum(side, 0) + 0.01 * target) / (1.01 * target)))
        misses += (np.maximum(0, ratio - tolerance) ** 2).sum(1)
    return misses


def assign_splits(dataset: Dataset, mode: str = "auto", holdout: float = 0.2) -> Dataset:
    """Give every pair a split: ``train``, ``val``, ``test``, or ``gap`` (too close to ``val``).

    The modes are:

    - ``official``: the splits of folders or files;
    - ``groups``: images of the same patient, slide or scene on one side, by their names, or near
      duplicates if the names show no groups;
    - ``blocks``: contiguous parts of videos and stacks;
    - ``random``: by a hash of the name, so that added images do not change the others' splits;
    - ``stratified``: the same, but near duplicates stay together and rare classes are on both
      sides;
    - ``auto``: the first of official, groups by name, blocks and stratified that fits the names and
      folders. It decodes images only for ``stratified``, and only if there are few; otherwise it is
      ``random``.

    Args:
        dataset: As :func:`useg.data.layouts.find_dataset` returns it.
        mode: The mode.
        holdout: Share of the images for validation, if there is no official split.

    Returns:
        The data set with all splits decided; ``splits_by`` says how. Official splits are kept
        (``test`` in every mode); if there is no ``val``, it is taken from ``train``.

    Raises:
        DataError: There are too few images, or no official splits in the mode ``official``.
        SettingsError: The mode is unknown, or the share is not between 0 and 1.
    """
    split = choose("the split mode", mode, _MODES)
    if not 0 < holdout < 1:
        raise SettingsError(
            f"the share held out for validation is {holdout}, but it must be between 0 and 1; "
            "0.2 is usual"
        )
    has_official = any(pair.split for pair in dataset.pairs)
    if mode == "official" and not has_official:
        raise DataError(
            f"'{dataset.root}' has no official splits; choose another split, such as auto, or make "
            "folders train/ and val/ or a split.csv"
        )
    if mode in ("auto", "official") and has_official:
        return _complete(dataset, holdout)
    pairs = [pair for pair in dataset.pairs if pair.split != "test"]
    return _resplit(dataset, split, pairs, holdout, "")


def _complete(dataset: Dataset, holdout: float) -> Dataset:
    """Keep the official splits; take ``val`` from ``train`` if there is none."""
    missing = [pair.image for pair in dataset.pairs if not pair.split]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(dataset.pairs)} images have no split, such as '{missing[0]}', "
            "but the others have one; put them into train, val or test, name them in split.csv, or "
            "choose the split groups, blocks or random"
        )
    train, val = dataset.of("train"), dataset.of("val")
    how = dataset.splits_by or "official"
    if val and not train:
        raise DataError(_describe_few(0, dataset))
    if val:
        return replace(dataset, splits_by=how)
    return _resplit(dataset, _split_auto, train, holdout, f"{how}; val taken from train: ")


def _resplit(
    dataset: Dataset, split: SplitFunction, pairs: Sequence[Pair], holdout: float, prefix: str
) -> Dataset:
    """Split ``pairs`` again; the other pairs of the data set keep their splits."""
    ordered = sorted(
        _check_count(pairs, dataset), key=lambda pair: natural_key(pair_name(pair, dataset.root))
    )
    chosen, how = split(dataset, ordered, holdout)
    splits = {pair.identity: name for pair, name in zip(ordered, chosen, strict=True)}
    kept = tuple(
        replace(pair, split=splits.get(pair.identity, pair.split)) for pair in dataset.pairs
    )
    return replace(dataset, pairs=kept, splits_by=prefix + how)


def keep_every(dataset: Dataset, split: str, every: int) -> Dataset:
    """Keep every n-th image of a split, in the order of their names; the others are not used.

    So each part of a data set, and of a video, keeps its share.
    """
    pairs = sorted(dataset.of(split), key=lambda pair: natural_key(pair_name(pair, dataset.root)))
    unused = {pair.identity for pair in pairs}
    unused -= {pair.identity for pair in pairs[(every - 1) // 2 :: every] or pairs[:1]}
    return replace(
        dataset,
        pairs=tuple(
            replace(pair, split="gap") if pair.identity in unused else pair
            for pair in dataset.pairs
        ),
    )


def _check_count(pairs: Sequence[Pair], dataset: Dataset) -> Sequence[Pair]:
    if len(pairs) < 2:
        raise DataError(_describe_few(len(pairs), dataset))
    return pairs


def _describe_few(number: int, dataset: Dataset) -> str:
    if number == 1:
        return (
            "there is 1 image for training and validation, but each of them needs one; add images "
            "with masks"
        )
    if not dataset.pairs:
        return "there are no images for training and validation; add images with masks"
    splits = sorted({pair.split for pair in dataset.pairs})
    advice = (
        ", set data.split to blocks, groups, stratified or random"
        if len(dataset.of("val")) > 1
        else ""
    )
    others = format_count(len(dataset.images), "image")
    return (
        f"all {len(dataset.pairs)} images with masks are in the split {' or '.join(splits)}, so "
        f"none is left for training; add images with masks{advice}, or give some of these another "
        "split in a split.csv (image,split)"
        + (f". {others} without a mask: {MISSING_ADVICE}" if dataset.images else "")
    )


def _split_auto(dataset: Dataset, pairs: Sequence[Pair], holdout: float) -> tuple[list[str], str]:
    if group_by_name(names_below_root(dataset, pairs)):
        return _split_groups(dataset, pairs, holdout)
    if are_numbered(pairs):
        return _split_blocks(dataset, pairs, holdout)
    if is_quick_to_compare(pairs):
        return _split_stratified(dataset, pairs, holdout)
    splits, how = _split_random(dataset, pairs, holdout)
    how += "; too many images to compare by default (data.split = stratified compares them)"
    return splits, how


def names_below_root(dataset: Dataset, pairs: Sequence[Pair]) -> list[str]:
    """Return the images' paths below the root, without suffix and split folders."""
    names = []
    for pair in pairs:
        is_inside = pair.image.is_relative_to(dataset.root)
        path = pair.image.relative_to(dataset.root) if is_inside else pair.image
        folders = [part for part in path.parts[:-1] if part.casefold() not in SPLIT_FOLDERS]
        names.append("/".join((*folders, _stem(pair))))
    return names


def _stem(pair: Pair) -> str:
    return pair.image.stem + ("" if pair.page in (None, ALL_PAGES) else f"#{pair.page}")


def are_numbered(pairs: Sequence[Pair]) -> bool:
    """Return whether at least half of the images have running numbers, as in videos and stacks."""
    long = [sequence for sequence in find_sequences(pairs) if len(sequence) >= _MIN_SEQUENCE_LENGTH]
    return sum(map(len, long)) * 2 >= len(pairs)


def find_sequences(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Group images whose folders and names differ only in the last number, in natural order.

    ``A_1, A_2, B_1`` gives ``[A_1, A_2], [B_1]``. Folders called train, val or test do not count,
    since one video may lie in several of them.
    """
    groups: dict[tuple[str, str, str], list[Pair]] = defaultdict(list)
    for pair in sorted(pairs, key=lambda pair: natural_key(pair_name(pair))):
        stem = strip_role_words(_stem(pair))
        number = re.search(r"[0-9]+(?=[^0-9]*$)", stem)
        name = (stem[: number.start()], stem[number.end() :]) if number else (stem, "")
        folder = "/".join(
            part for part in pair.image.parent.parts if part.casefold() not in SPLIT_FOLDERS
        )
        groups[folder, *name].append(pair)
    return [sorted(group, key=lambda pair: natural_key(_stem(pair))) for group in groups.values()]


def _split_blocks(dataset: Dataset, pairs: Sequence[Pair], holdout: float) -> tuple[list[str], str]:
    groups = find_sequences(pairs)
    if all(len(group) < _MIN_SEQUENCE_LENGTH for group in groups):
        # The names have no running numbers, so their order is the only one.
        groups = [list(pairs)]
    long = [group for group in groups if len(group) >= MIN_BLOCK_LENGTH]
    short = [group for group in groups if len(group) < MIN_BLOCK_LENGTH]
    splits: dict[Pair, str] = {}
    parts = []
    if len(short) * holdout >= 1:
        held = _hold_out_whole(short, holdout)
        splits |= {pair: "val" for group in held for pair in group}
        parts.append(f"{len(held)} of {len(short)} short sequences held out whole")
    else:
        # These are too few to hold out whole: each is cut like a long one.
        long = (long + [group for group in short if len(group) >= _MIN_SEQUENCE_LENGTH]) or short
    for group in long:
        splits |= zip(group, _cut_sequence(len(group), holdout), strict=True)
    if long:
        gap = sum(split == "gap" for split in splits.values())
        each = f"each of {len(long)} sequences" if len(long) > 1 else "the sequence"
        parts.append(
            f"the last {100 * holdout:.0f} % of {each}, {gap} image{'s' * (gap != 1)} before "
            f"{'them' if len(long) > 1 else 'it'} left out"
        )
    return [splits.get(pair, "train") for pair in pairs], "blocks: " + "; ".join(parts)


def _cut_sequence(count: int, holdout: float) -> list[str]:
    """Return the splits of a sequence: its end is for validation, after a gap."""
    val = min(max(1, round(count * holdout)), count - 1)
    gap = min(gap_length(count), count - val - 1)
    return ["train"] * (count - val - gap) + ["gap"] * gap + ["val"] * val


def gap_length(count: int) -> int:
    """Return how many of ``count`` frames the gap next to held-out ones has: 5 %, from 1 to 10."""
    return max(1, min(10, round(count * 0.05)))


def _hold_out_whole(groups: list[list[Pair]], holdout: float) -> list[list[Pair]]:
    """Choose whole sequences in the order of their names' hashes until the share is reached.

    At least one sequence is left.
    """
    wanted = holdout * sum(len(group) for group in groups)
    held: list[list[Pair]] = []
    for group in sorted(
        groups,
        key=lambda group: draw_number(group[0].image.parent.name + "/" + group[0].image.stem),
    )[:-1]:
        if held and sum(len(other) for other in held) + len(group) / 2 > wanted:
            break
        held.append(group)
    return held


def _split_groups(dataset: Dataset, pairs: Sequence[Pair], holdout: float) -> tuple[list[str], str]:
    contents = (
        count_class_pixels(dataset, pairs)
        if is_quick_to_compare(pairs)
        else np.zeros((len(pairs), 0), np.int64)
    )
    named = group_by_name(names_below_root(dataset, pairs))
    groups = named or group_duplicates(dataset, pairs)
    count = len(set(groups))
    if count in (1, len(pairs)):
        raise DataError(
            f"neither the names nor the pixels of the {len(pairs)} images in '{dataset.root}' show "
            "groups; name the images GROUP_NUMBER with a number in each group's name, put them "
            "into folders of such names, or choose another split, such as auto"
        )
    held, _ = _draw_groups(groups, contents, holdout)
    example = next(group for group, is_held in zip(groups, held, strict=True) if is_held)
    how = (
        f"by the names (such as {example.rpartition('/')[2]})"
        if named
        else "by their pixels: near duplicates stay together"
    )
    num_held = len({group for group, is_held in zip(groups, held, strict=True) if is_held})
    return _to_splits(held), f"groups: {num_held} of {count} held out whole, {how}"


def _split_stratified(
    dataset: Dataset, pairs: Sequence[Pair], holdout: float
) -> tuple[list[str], str]:
    groups = group_duplicates(dataset, pairs)
    if max(Counter(groups).values()) > max(1, len(pairs) // 2):
        splits, how = _split_blocks(dataset, pairs, holdout)
        return splits, f"{how} (most of the images are near duplicates, as in a video)"
    contents = count_class_pixels(dataset, pairs)
    if len(set(groups)) == len(pairs) and not contents.any():
        return _split_random(dataset, pairs, holdout)
    held, num_moved = _draw_groups(groups, contents, holdout)
    num_duplicates = sum(count for count in Counter(groups).values() if count > 1)
    parts = ["random, by a hash of the name"]
    parts += [f"{num_duplicates} near duplicates kept together"] if num_duplicates else []
    if num_moved:
        parts.append(f"{num_moved} moved so that training and validation have all classes")
    return _to_splits(held), "; ".join(parts)


def group_duplicates(dataset: Dataset, pairs: Sequence[Pair]) -> list[str]:
    """Return the name of each image's group of near duplicates: that of the first of them."""
    groups = group_near_duplicates(compute_signatures(dataset, pairs))
    return [_stem(pairs[first]) for first in groups]


def _draw_groups(
    groups: Sequence[str], contents: NDArray[np.int64], holdout: float
) -> tuple[list[bool], int]:
    """Draw whole groups at random.

    Returns:
        Whether each image is held out, and how many images were moved to divide the classes.
    """
    names, group_of = np.unique(groups, return_inverse=True)
    joined = np.zeros((len(names), contents.shape[1]), np.int64)
    np.add.at(joined, group_of, contents)
    draws = np.array([draw_number(str(name)) for name in names])
    held = choose_holdout(joined, np.bincount(group_of), draws, holdout)
    return held[group_of].tolist(), int((held != (draws < holdout))[group_of].sum())


def _to_splits(held: Sequence[bool]) -> list[str]:
    return ["val" if is_held else "train" for is_held in held]


def _split_random(dataset: Dataset, pairs: Sequence[Pair], holdout: float) -> tuple[list[str], str]:
    hashes = [draw_number(_stem(pair)) for pair in pairs]
    count = min(max(1, sum(value < holdout for value in hashes)), len(pairs) - 1)
    held = set(sorted(range(len(pairs)), key=lambda k: (hashes[k], pairs[k].image))[:count])
    return _to_splits([k in held for k in range(len(pairs))]), "random, by a hash of the name"


def draw_number(name: str) -> float:
    """Return a number from 0 to 1 for a name, the same on every machine."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


_MODES: dict[str, SplitFunction] = {
    "auto": _split_auto,
    "groups": _split_groups,
    "blocks": _split_blocks,
    "stratified": _split_stratified,
    "random": _split_random,
    "official": _split_auto,
}


def open_dataset(data: str | Path, settings: Settings | None = None) -> Dataset:
    """Find the pairs in a folder (or ``dataset.toml``) and decide their splits.

    Args:
        data: The folder or file.
        settings: Settings; only ``data.*`` matter.

    Returns:
        The data set; each pair's ``split`` is ``train``, ``val``, ``test`` or ``gap`` (unused).

    Raises:
        DataError: There is no such folder, it has no pairs, or too few to hold some out.
    """
    choices = (settings or Settings()).data
    dataset = find_dataset(Path(data), choices.classes)
    return assign_splits(dataset, choices.split, choices.holdout)
