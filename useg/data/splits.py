"""A data set -> the same with a split for every pair, so that validation measures learning and not memory.

Neighbouring frames of a film or slices of a stack are nearly the same picture. A random split puts them on both sides, and the score
then measures memory; so numbered names are cut into contiguous blocks with a gap between, and what shows one patient, slide or scene (by
its name) or nearly the same picture (by its pixels) stays on one side. The rest is drawn by lot, and rare classes are shared out.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from useg.data.balance import hold_out
from useg.data.dataset import Dataset, Pair, pair_name
from useg.data.glances import affordable, class_pixels, signatures
from useg.data.groups import name_groups
from useg.data.images import natural_key
from useg.data.matching import bare
from useg.data.twins import clusters
from useg.errors import UsageError, choose
from useg.files import replacing

Cut = Callable[[Dataset, Sequence[Pair], float], tuple[list[str], str]]  # (data set, pairs in order, share) -> their splits, and how in words

SPLIT_FOLDERS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test", "testing": "test"}
SPLITS = ("train", "val", "test", "gap")
_LONG = 30  # a sequence of this many images gives a block of its own; shorter ones are held out whole when there are several
_FILM = 5  # a sequence of this many numbered names looks like a film


def assign_splits(dataset: Dataset, mode: str = "auto", holdout: float = 0.2) -> Dataset:
    """Give every pair a split: ``train``, ``val``, ``test``, or ``gap`` (too near to ``val`` to train on).

    Args:
        dataset: as :func:`useg.data.layouts.find` returns it.
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
        UsageError: an unknown mode, a share outside 0..1, no official splits in mode ``official``, or too few images.
    """
    cut = choose("the split mode", mode, _MODES)
    if not 0 < holdout < 1:
        raise UsageError(f"the share held out for validation is {holdout}, but it must lie between 0 and 1; 0.2 is usual")
    has_official = any(pair.split for pair in dataset.pairs)
    if mode == "official" and not has_official:
        raise UsageError(
            f"'{dataset.root}' has no official splits; choose another split, such as auto, or make folders train/ and val/ or a split.csv"
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
            f"put them into train, val or test, name them in split.csv, or choose the split groups, blocks or random"
        )
    train, val = dataset.of("train"), dataset.of("val")
    how = dataset.splits_by or "official"
    if val:
        _enough((*train[:1], *val[:1]))
        return replace(dataset, splits_by=how)
    return _recut(dataset, _auto, train, holdout, f"{how}; val cut from train: ")


def _recut(dataset: Dataset, cut: Cut, pairs: Sequence[Pair], holdout: float, prefix: str) -> Dataset:
    """Cut ``pairs`` anew; the other pairs of the data set keep their splits."""
    ordered = sorted(_enough(pairs), key=lambda pair: natural_key(pair_name(pair, dataset.root)))
    chosen, how = cut(dataset, ordered, holdout)
    splits = {(pair.image, pair.page): split for pair, split in zip(ordered, chosen, strict=True)}
    kept = tuple(replace(pair, split=splits.get((pair.image, pair.page), pair.split)) for pair in dataset.pairs)
    return replace(dataset, pairs=kept, splits_by=prefix + how)


def _enough(pairs: Sequence[Pair]) -> Sequence[Pair]:
    if len(pairs) < 2:
        raise UsageError(
            f"the number of images for training and validation is {len(pairs)}, but each needs at least one of its own; add images with masks"
        )
    return pairs


def _auto(dataset: Dataset, pairs: Sequence[Pair], holdout: float) -> tuple[list[str], str]:
    if name_groups(_names(dataset, pairs)):
        return _groups(dataset, pairs, holdout)
    if looks_filmed(pairs):
        return _blocks(dataset, pairs, holdout)
    if affordable(pairs):
        return _stratified(dataset, pairs, holdout)
    splits, how = _random(dataset, pairs, holdout)
    return splits, f"{how}; too many pictures to look into unasked (data.split = stratified does)"


def _names(dataset: Dataset, pairs: Sequence[Pair]) -> list[str]:
    """What tells pictures apart: their paths below the root without suffix, and without folders called train, val or test."""
    found = []
    for pair in pairs:
        folders = pair.image.relative_to(dataset.root).parts[:-1] if pair.image.is_relative_to(dataset.root) else pair.image.parts[:-1]
        found.append("/".join((*(part for part in folders if part.casefold() not in SPLIT_FOLDERS), _stem(pair))))
    return found


def _stem(pair: Pair) -> str:
    return pair.image.stem + ("" if pair.page is None else f"#{pair.page}")


def looks_filmed(pairs: Sequence[Pair]) -> bool:
    """Tell whether at least half of the images carry running numbers, as frames of a film and slices of a stack do."""
    return sum(len(sequence) for sequence in sequences(pairs) if len(sequence) >= _FILM) * 2 >= len(pairs)


def sequences(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Group images whose folder and name agree but for the last number, each in natural order: ``A_1, A_2, B_1`` -> ``[A_1, A_2], [B_1]``.

    Folders called train, val or test are passed over: the same film may lie in several of them.
    """
    groups: dict[tuple[str, str, str], list[Pair]] = defaultdict(list)
    for pair in sorted(pairs, key=lambda pair: natural_key(pair_name(pair))):
        stem = bare(_stem(pair))
        number = re.search(r"[0-9]+(?=[^0-9]*$)", stem)
        name = (stem[: number.start()], stem[number.end() :]) if number else (stem, "")
        folder = "/".join(part for part in pair.image.parent.parts if part.casefold() not in SPLIT_FOLDERS)
        groups[folder, *name].append(pair)
    return [sorted(group, key=lambda pair: natural_key(_stem(pair))) for group in groups.values()]


def _blocks(dataset: Dataset, pairs: Sequence[Pair], holdout: float) -> tuple[list[str], str]:
    groups = sequences(pairs)
    if all(len(group) < _FILM for group in groups):
        groups = [list(pairs)]  # names without running numbers: their order is the only one there is
    long = [group for group in groups if len(group) >= _LONG]
    short = [group for group in groups if len(group) < _LONG]
    splits: dict[Pair, str] = {}
    said = []
    if len(short) * holdout >= 1:
        held = _whole(short, holdout)
        splits |= {pair: "val" for group in held for pair in group}
        said.append(f"{len(held)} of {len(short)} short sequences held out whole")
    else:
        long = (long + [group for group in short if len(group) >= _FILM]) or short  # too few to hold out whole: each is cut like a long one
    for group in long:
        splits |= zip(group, _cut(len(group), holdout), strict=True)
    if long:
        gap = sum(split == "gap" for split in splits.values())
        each = f"each of {len(long)} sequences" if len(long) > 1 else "the sequence"
        said.append(f"the last {holdout:.0%} of {each}, {gap} image{'s' * (gap != 1)} before {'them' if len(long) > 1 else 'it'} left out")
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
    for group in sorted(groups, key=lambda group: _hash(group[0].image.parent.name + "/" + group[0].image.stem))[:-1]:
        if held and sum(len(other) for other in held) + len(group) / 2 > wanted:
            break
        held.append(group)
    return held


def _groups(dataset: Dataset, pairs: Sequence[Pair], holdout: float) -> tuple[list[str], str]:
    contents = class_pixels(dataset, pairs) if affordable(pairs) else np.zeros((len(pairs), 0), np.int64)
    named = name_groups(_names(dataset, pairs))
    groups = named or _twins(dataset, pairs)
    count = len(set(groups))
    if count in (1, len(pairs)):
        raise UsageError(
            f"neither names nor pixels of the {len(pairs)} images in '{dataset.root}' show groups to keep on one side; name them "
            f"GROUP_NUMBER with a number in each group's name, put them into folders of such names, or choose another split, such as auto"
        )
    held, _ = _drawn(groups, contents, holdout)
    example = next(group for group, is_held in zip(groups, held, strict=True) if is_held)
    how = f"by the names (such as {example.rpartition('/')[2]})" if named else "by their pixels: nearly the same pictures stay together"
    num_held = len({group for group, is_held in zip(groups, held, strict=True) if is_held})
    return _sides(held), f"groups: {num_held} of {count} held out whole, {how}"


def _stratified(dataset: Dataset, pairs: Sequence[Pair], holdout: float) -> tuple[list[str], str]:
    groups = _twins(dataset, pairs)
    if max(Counter(groups).values()) > max(1, len(pairs) // 2):
        splits, how = _blocks(dataset, pairs, holdout)
        return splits, f"{how} (most of the pictures are nearly the same, as in a film)"
    contents = class_pixels(dataset, pairs)
    if len(set(groups)) == len(pairs) and not contents.any():
        return _random(dataset, pairs, holdout)
    held, num_moved = _drawn(groups, contents, holdout)
    num_twins = sum(count for count in Counter(groups).values() if count > 1)
    said = [f"{num_twins} near twins kept together"] if num_twins else []
    said += [f"{num_moved} moved to share out the classes"] if num_moved else []
    return _sides(held), "; ".join(("random, by a hash of the name", *said))


def _twins(dataset: Dataset, pairs: Sequence[Pair]) -> list[str]:
    """Name each picture's group of near twins after the first of them; pictures of one name are one group."""
    return [_stem(pairs[first]) for first in clusters(signatures(dataset, pairs))]


def _drawn(groups: Sequence[str], contents: NDArray[np.int64], holdout: float) -> tuple[list[bool], int]:
    """Draw whole groups; tells for each picture whether it is held out, and how many changed sides for the classes' sake."""
    names, group_of = np.unique(groups, return_inverse=True)
    joined = np.zeros((len(names), contents.shape[1]), np.int64)
    np.add.at(joined, group_of, contents)
    draws = np.array([_hash(str(name)) for name in names])
    held = hold_out(joined, np.bincount(group_of), draws, holdout)
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
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64


def read_split_csv(path: Path, dataset: Dataset) -> Dataset:
    """Give the pairs the splits of a CSV file with the columns ``image`` (path below the root, name or stem) and ``split``.

    Raises:
        UsageError: no such file or columns, an unknown split, or an image that is not there, named twice, not clear, or not named.
    """
    names = _pairs_by_name(dataset)
    splits: dict[Pair, str] = {}
    for name, split in _split_rows(path):
        found = names.get(name, set())
        if len(found) != 1:
            say = "more than one image has this name: give its path below the data folder" if found else "there is no such image with a mask"
            raise UsageError(f"'{path}' names '{name}', but {say}")
        if splits.setdefault(next(iter(found)), split) != split:
            raise UsageError(f"'{path}' puts '{name}' into two splits; keep one")
    missing = [pair for pair in dataset.pairs if pair not in splits]
    if missing:
        raise UsageError(
            f"'{path}' does not name {len(missing)} of {len(dataset.pairs)} images, such as '{missing[0].image}'; add them (gap leaves one out)"
        )
    return replace(dataset, pairs=tuple(replace(pair, split=splits[pair]) for pair in dataset.pairs), splits_by=path.name)


def recall_splits(path: Path, dataset: Dataset, splits_by: str) -> Dataset | None:
    """Give the pairs the splits that a run had, though images may have come or gone since: what it has trained on is never held out now.

    Args:
        path: the CSV file that :func:`write_split_csv` wrote then.
        dataset: as :func:`useg.data.layouts.find` returns it now.
        splits_by: how the splits came about then, in words.

    Returns:
        The data set; images that came later are in ``gap``, or in ``test`` where their folder says so. None if it has no image of then.

    Raises:
        UsageError: no such file or columns, or an unknown split.
    """
    names = _pairs_by_name(dataset)
    splits = {pair: split for name, split in _split_rows(path) for pair in names.get(name, ())}
    if not splits:
        return None
    later = len(dataset.pairs) - len(splits)
    pairs = tuple(replace(pair, split=splits.get(pair, "test" if pair.split == "test" else "gap")) for pair in dataset.pairs)
    return replace(dataset, pairs=pairs, splits_by=f"{splits_by}; {later} images came after training" if later else splits_by)


def _split_rows(path: Path) -> list[tuple[str, str]]:
    """Return a CSV file's images with their splits."""
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text("utf-8-sig")), restval=""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"'{path}' cannot be read ({error}); it needs the columns image,split") from error
    if not rows or not {"image", "split"} <= rows[0].keys():
        raise UsageError(
            f"'{path}' needs a first line with the columns image,split and one line per image; it has {', '.join(rows[0]) if rows else 'none'}"
        )
    named = [(row["image"], SPLIT_FOLDERS.get(row["split"], row["split"])) for row in rows]
    for name, split in named:
        if split not in SPLITS:
            raise UsageError(f"'{path}' puts '{name}' into the split {split!r}; known are {', '.join(SPLITS)}")
    return named


def _pairs_by_name(dataset: Dataset) -> dict[str, set[Pair]]:
    """Return the pairs by all that an image may be called: its path below the root, its name, with and without suffix."""
    names: dict[str, set[Pair]] = defaultdict(set)
    for pair in dataset.pairs:
        inside, page = pair_name(replace(pair, page=None), dataset.root), "" if pair.page is None else f"#{pair.page}"
        for name in (inside, inside.rpartition(".")[0], pair.image.name, pair.image.stem):
            names[name + page].add(pair)
    return names


def write_split_csv(path: Path, dataset: Dataset) -> None:
    """Write every image's split as CSV (``image,split``); :func:`read_split_csv` gives the same splits back.

    Raises:
        UsageError: the file cannot be written.
    """
    target = io.StringIO()
    rows = csv.writer(target, lineterminator="\n")
    rows.writerow(("image", "split"))
    rows.writerows((pair_name(pair, dataset.root), pair.split) for pair in dataset.pairs)
    with replacing(path) as temporary:
        temporary.write_text(target.getvalue(), "utf-8")


_MODES: dict[str, Cut] = {
    "auto": _auto,
    "groups": _groups,
    "blocks": _blocks,
    "stratified": _stratified,
    "random": _random,
    "official": _auto,
}
