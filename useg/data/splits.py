"""A data set -> the same with a split for every pair, so that validation measures learning and not memory.

Neighbouring frames of a film or slices of a stack are nearly the same picture. A random split puts them on both sides, and the score
then measures memory; so numbered names are cut into contiguous blocks with a gap between, and what shows one patient, slide or scene (by
its name) or nearly the same picture (by its pixels) stays on one side. The rest is drawn by lot, and rare classes are shared out.
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

from useg.classes import ClassTable
from useg.config import Settings
from useg.data.dataset import SPLIT_FOLDERS, Dataset, Pair, pair_name
from useg.data.duplicates import (
    compute_signatures,
    count_class_pixels,
    group_near_duplicates,
    is_quick_to_compare,
)
from useg.data.layouts import find_dataset
from useg.data.pairing import strip_role_words
from useg.errors import DataError, SettingsError, choose
from useg.images.files import natural_key

MIN_GROUPS = 5  # groups: with fewer, holding one out whole says little


_LARGEST = 0.5  # share of the pictures that one group may have


def group_by_name(names: Sequence[str]) -> list[str] | None:
    """Return each picture's group, or None where names show none: ``P03_slice_004`` -> ``P03``, ``tile_12_0_256`` -> ``tile_12``.

    A name is a row of parts between ``/ _ - .`` and blanks (or, without these, numbers with the letters before them: ``s03t12``). The first
    parts that differ from picture to picture name the group: as few of them as make at least five groups, of two pictures each on average,
    none with more than half of all. One of them must have a digit: ``cat_12`` and ``dog_12`` are kinds, not places.

    Args:
        names: paths without suffix, as they are unique in a data set.
    """
    rows = _parts(names)
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
        if has_id and len(sizes) >= MIN_GROUPS and max(sizes.values()) <= _LARGEST * len(rows):
            return groups
    return None


def _parts(names: Sequence[str]) -> list[list[str]]:
    split = [re.split(r"[/_\-. ]+", name) for name in names]
    if max(map(len, split), default=0) > 1:
        return split
    forms = {re.sub(r"\d+", "0", name) for name in names}
    return [re.findall(r"\D*\d+|\D+$", name) for name in names] if len(forms) == 1 else split


_SLACK = 2.0  # factor by which a class's share may miss the wanted one


_SIZE_SLACK = 1.25  # and the number of pictures


def choose_holdout(
    contents: NDArray[np.int64],
    sizes: NDArray[np.int64],
    draws: NDArray[np.float64],
    holdout: float,
) -> NDArray[np.bool_]:
    """Choose units: by lot first, then as few as possible change sides until shares fit.

    Since the lot is each unit's own and shares may miss by a factor, a further unit moves few others.

    Args:
        contents: ``(N, K)`` how much of each class a unit (a picture, or pictures that belong together) holds; classes in a single unit are
            passed over. K may be 0.
        sizes: ``(N,)`` pictures in each unit.
        draws: ``(N,)`` 0..1, each unit's lot: below ``holdout`` it is held out. It also settles ties.
        holdout: share of the pictures, and of each class, to hold out.

    Returns:
        ``(N,)`` true where held out; never all, never none. N is at least 2.
    """
    known = contents[:, (contents > 0).sum(0) > 1]
    shares = np.column_stack((known, sizes)).astype(np.float64)
    shares /= shares.sum(0)
    slack = np.log([_SLACK] * known.shape[1] + [_SIZE_SLACK])
    held = draws < holdout
    held[np.argmin(draws)], held[np.argmax(draws)] = True, False
    for _ in range(len(held)):
        now = shares[held].sum(0)
        moved = now + np.where(held, -1, 1)[:, None] * shares
        costs = _misses(moved, holdout, slack)
        if held.sum() == 1:
            costs[held] = np.inf
        if (~held).sum() == 1:
            costs[~held] = np.inf
        best = np.lexsort((draws, costs))[0]
        if costs[best] >= _misses(now[None], holdout, slack)[0] - 1e-9:
            break
        held[best] = not held[best]
    return held


def _misses(
    shares: NDArray[np.float64], wanted: float, slack: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return how badly the held out shares ``(N, K)`` miss, ``(N,)``; a share of nothing is as bad as one of a hundredth of the wanted."""
    off = np.zeros(len(shares))
    for side, aim in ((shares, wanted), (1 - shares, 1 - wanted)):
        ratio = np.abs(np.log((np.maximum(side, 0) + 0.01 * aim) / (1.01 * aim)))
        off += (np.maximum(0, ratio - slack) ** 2).sum(1)
    return off


SplitFunction = Callable[
    [Dataset, Sequence[Pair], float], tuple[list[str], str]
]  # (data set, pairs in order, share) -> their splits, and how in words


_LONG = 30  # a sequence of this many images gives a block of its own; shorter ones are held out whole when there are several


_FILM = 5  # a sequence of this many numbered names looks like a film


def assign_splits(dataset: Dataset, mode: str = "auto", holdout: float = 0.2) -> Dataset:
    """Give every pair a split: ``train``, ``val``, ``test``, or ``gap`` (too near to ``val`` to train on).

    Args:
        dataset: as :func:`useg.data.layouts.find_dataset` returns it.
        mode: ``official`` (as folders or files say); ``groups`` (what shows the same patient, slide or scene on one side, by the names, or by
            near twins where names say nothing); ``blocks`` (contiguous parts of films and stacks); ``random`` (by a hash of the name, so that
            added images do not reshuffle the others); ``stratified`` (the same, but near twins stay together and rare classes are on both
            sides); or ``auto``: the first of official, groups by name, blocks and stratified for which names or folders speak. It decodes
            pictures for ``stratified`` only, and only while they are few; more are ``random``.
        holdout: share of the images for validation, where it is cut here.

    Returns:
        The data set with all splits decided; ``splits_by`` says how. Official splits are kept (``test`` in every mode); without ``val``,
        it is cut from ``train``.

    Raises:
        DataError: an unknown mode, a share outside 0..1, no official splits in mode ``official``, or too few images.
    """
    cut = choose("the split mode", mode, _MODES)
    if not 0 < holdout < 1:
        raise SettingsError(
            f"the share held out for validation is {holdout}, but it must lie between 0 and 1; 0.2 is usual"
        )
    has_official = any(pair.split for pair in dataset.pairs)
    if mode == "official" and not has_official:
        raise DataError(
            f"'{dataset.root}' has no official splits; choose another split, such as auto, or make folders train/ and val/ or a split.csv"
        )
    if mode in ("auto", "official") and has_official:
        return _complete(dataset, holdout)
    return _recut(
        dataset, cut, [pair for pair in dataset.pairs if pair.split != "test"], holdout, ""
    )


def _complete(dataset: Dataset, holdout: float) -> Dataset:
    """Keep the official splits; cut ``val`` from ``train`` where there is none."""
    missing = [pair.image for pair in dataset.pairs if not pair.split]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(dataset.pairs)} images are in no split while the others are, such as '{missing[0]}'; "
            f"put them into train, val or test, name them in split.csv, or choose the split groups, blocks or random"
        )
    train, val = dataset.of("train"), dataset.of("val")
    how = dataset.splits_by or "official"
    if val:
        _enough((*train[:1], *val[:1]))
        return replace(dataset, splits_by=how)
    return _recut(dataset, _auto, train, holdout, f"{how}; val cut from train: ")


def _recut(
    dataset: Dataset, cut: SplitFunction, pairs: Sequence[Pair], holdout: float, prefix: str
) -> Dataset:
    """Cut ``pairs`` anew; the other pairs of the data set keep their splits."""
    ordered = sorted(_enough(pairs), key=lambda pair: natural_key(pair_name(pair, dataset.root)))
    chosen, how = cut(dataset, ordered, holdout)
    splits = {(pair.image, pair.page): split for pair, split in zip(ordered, chosen, strict=True)}
    kept = tuple(
        replace(pair, split=splits.get((pair.image, pair.page), pair.split))
        for pair in dataset.pairs
    )
    return replace(dataset, pairs=kept, splits_by=prefix + how)


def _enough(pairs: Sequence[Pair]) -> Sequence[Pair]:
    if len(pairs) < 2:
        raise DataError(
            f"the number of images for training and validation is {len(pairs)}, but each needs at least one of its own; add images with masks"
        )
    return pairs


def _auto(dataset: Dataset, pairs: Sequence[Pair], holdout: float) -> tuple[list[str], str]:
    if group_by_name(_names(dataset, pairs)):
        return _groups(dataset, pairs, holdout)
    if is_film(pairs):
        return _blocks(dataset, pairs, holdout)
    if is_quick_to_compare(pairs):
        return _stratified(dataset, pairs, holdout)
    splits, how = _random(dataset, pairs, holdout)
    return splits, f"{how}; too many pictures to look into unasked (data.split = stratified does)"


def _names(dataset: Dataset, pairs: Sequence[Pair]) -> list[str]:
    """What tells pictures apart: their paths below the root without suffix, and without folders called train, val or test."""
    found = []
    for pair in pairs:
        folders = (
            pair.image.relative_to(dataset.root).parts[:-1]
            if pair.image.is_relative_to(dataset.root)
            else pair.image.parts[:-1]
        )
        found.append(
            "/".join(
                (*(part for part in folders if part.casefold() not in SPLIT_FOLDERS), _stem(pair))
            )
        )
    return found


def _stem(pair: Pair) -> str:
    return pair.image.stem + ("" if pair.page is None else f"#{pair.page}")


def is_film(pairs: Sequence[Pair]) -> bool:
    """Tell whether at least half of the images carry running numbers, as frames of a film and slices of a stack do."""
    return sum(
        len(sequence) for sequence in find_sequences(pairs) if len(sequence) >= _FILM
    ) * 2 >= len(pairs)


def find_sequences(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Group images whose folder and name agree but for the last number, each in natural order: ``A_1, A_2, B_1`` -> ``[A_1, A_2], [B_1]``.

    Folders called train, val or test are passed over: the same film may lie in several of them.
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


def _blocks(dataset: Dataset, pairs: Sequence[Pair], holdout: float) -> tuple[list[str], str]:
    groups = find_sequences(pairs)
    if all(len(group) < _FILM for group in groups):
        groups = [
            list(pairs)
        ]  # names without running numbers: their order is the only one there is
    long = [group for group in groups if len(group) >= _LONG]
    short = [group for group in groups if len(group) < _LONG]
    splits: dict[Pair, str] = {}
    said = []
    if len(short) * holdout >= 1:
        held = _whole(short, holdout)
        splits |= {pair: "val" for group in held for pair in group}
        said.append(f"{len(held)} of {len(short)} short sequences held out whole")
    else:
        long = (
            long + [group for group in short if len(group) >= _FILM]
        ) or short  # too few to hold out whole: each is cut like a long one
    for group in long:
        splits |= zip(group, _cut(len(group), holdout), strict=True)
    if long:
        gap = sum(split == "gap" for split in splits.values())
        each = f"each of {len(long)} sequences" if len(long) > 1 else "the sequence"
        said.append(
            f"the last {holdout:.0%} of {each}, {gap} image{'s' * (gap != 1)} before {'them' if len(long) > 1 else 'it'} left out"
        )
    return [splits.get(pair, "train") for pair in pairs], "blocks: " + "; ".join(said)


def _cut(count: int, holdout: float) -> list[str]:
    """Return the splits of a sequence of ``count`` images: its end for validation, with a gap of about 5 % (1 to 10 images) before it."""
    val = min(max(1, round(count * holdout)), count - 1)
    gap = min(max(1, min(10, round(count * 0.05))), count - val - 1)
    return ["train"] * (count - val - gap) + ["gap"] * gap + ["val"] * val


def _whole(groups: list[list[Pair]], holdout: float) -> list[list[Pair]]:
    """Choose whole sequences, in the order of their names' hashes, until the share is reached; never all of them."""
    wanted = holdout * sum(len(group) for group in groups)
    held: list[list[Pair]] = []
    for group in sorted(
        groups, key=lambda group: _hash(group[0].image.parent.name + "/" + group[0].image.stem)
    )[:-1]:
        if held and sum(len(other) for other in held) + len(group) / 2 > wanted:
            break
        held.append(group)
    return held


def _groups(dataset: Dataset, pairs: Sequence[Pair], holdout: float) -> tuple[list[str], str]:
    contents = (
        count_class_pixels(dataset, pairs)
        if is_quick_to_compare(pairs)
        else np.zeros((len(pairs), 0), np.int64)
    )
    named = group_by_name(_names(dataset, pairs))
    groups = named or _twins(dataset, pairs)
    count = len(set(groups))
    if count in (1, len(pairs)):
        raise DataError(
            f"neither names nor pixels of the {len(pairs)} images in '{dataset.root}' show groups to keep on one side; name them "
            f"GROUP_NUMBER with a number in each group's name, put them into folders of such names, or choose another split, such as auto"
        )
    held, _ = _drawn(groups, contents, holdout)
    example = next(group for group, is_held in zip(groups, held, strict=True) if is_held)
    how = (
        f"by the names (such as {example.rpartition('/')[2]})"
        if named
        else "by their pixels: nearly the same pictures stay together"
    )
    num_held = len({group for group, is_held in zip(groups, held, strict=True) if is_held})
    return _sides(held), f"groups: {num_held} of {count} held out whole, {how}"


def _stratified(dataset: Dataset, pairs: Sequence[Pair], holdout: float) -> tuple[list[str], str]:
    groups = _twins(dataset, pairs)
    if max(Counter(groups).values()) > max(1, len(pairs) // 2):
        splits, how = _blocks(dataset, pairs, holdout)
        return splits, f"{how} (most of the pictures are nearly the same, as in a film)"
    contents = count_class_pixels(dataset, pairs)
    if len(set(groups)) == len(pairs) and not contents.any():
        return _random(dataset, pairs, holdout)
    held, num_moved = _drawn(groups, contents, holdout)
    num_twins = sum(count for count in Counter(groups).values() if count > 1)
    said = [f"{num_twins} near twins kept together"] if num_twins else []
    said += [f"{num_moved} moved to share out the classes"] if num_moved else []
    return _sides(held), "; ".join(("random, by a hash of the name", *said))


def _twins(dataset: Dataset, pairs: Sequence[Pair]) -> list[str]:
    """Name each picture's group of near twins after the first of them; pictures of one name are one group."""
    return [
        _stem(pairs[first]) for first in group_near_duplicates(compute_signatures(dataset, pairs))
    ]


def _drawn(
    groups: Sequence[str], contents: NDArray[np.int64], holdout: float
) -> tuple[list[bool], int]:
    """Draw whole groups; tells for each picture whether it is held out, and how many changed sides for the classes' sake."""
    names, group_of = np.unique(groups, return_inverse=True)
    joined = np.zeros((len(names), contents.shape[1]), np.int64)
    np.add.at(joined, group_of, contents)
    draws = np.array([_hash(str(name)) for name in names])
    held = choose_holdout(joined, np.bincount(group_of), draws, holdout)
    return held[group_of].tolist(), int((held != (draws < holdout))[group_of].sum())


def _sides(held: Sequence[bool]) -> list[str]:
    return ["val" if is_held else "train" for is_held in held]


def _random(dataset: Dataset, pairs: Sequence[Pair], holdout: float) -> tuple[list[str], str]:
    hashes = [_hash(_stem(pair)) for pair in pairs]
    count = min(max(1, sum(value < holdout for value in hashes)), len(pairs) - 1)
    held = set(sorted(range(len(pairs)), key=lambda k: (hashes[k], pairs[k].image))[:count])
    return _sides([k in held for k in range(len(pairs))]), "random, by a hash of the name"


def _hash(name: str) -> float:
    """Map a name to 0..1, the same on every machine."""
    return (
        int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")
        / 2**64
    )


_MODES: dict[str, SplitFunction] = {
    "auto": _auto,
    "groups": _groups,
    "blocks": _blocks,
    "stratified": _stratified,
    "random": _random,
    "official": _auto,
}


def open_dataset(
    data: str | Path, settings: Settings | None = None, classes: ClassTable | None = None
) -> Dataset:
    """Find the pairs in a folder (or ``dataset.toml``) and say which train and which are held out.

    Args:
        data: the folder or file.
        settings: its ``data.*`` settings count.
        classes: how masks are to be read; by default as the folder says, or as the values found suggest.

    Raises:
        DataError: no such folder, no pairs, or too few to hold some out.
    """
    choices = (settings or Settings()).data
    dataset = find_dataset(Path(data), Path(choices.classes) if choices.classes else classes)
    return assign_splits(dataset, choices.split, choices.holdout)
