"""Several masks of one image -> its objects, unless they are opinions or one mask per class.

They lie in a folder for each image (``ID/masks/*.png``), or are numbered beside each other
(``a_mask.png``, ``a_mask_1.png``). Objects become background and foreground.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from useg.classes import ClassTable
from useg.data.dataset import DetectedLayout, Instances, Pair, pick_evenly
from useg.data.names import IMAGE_WORDS, MASK_WORDS, plain_stem, split_name, strip_role_words
from useg.data.official_splits import find_official_split
from useg.data.truth import is_photograph, is_two_valued, read_points
from useg.errors import DataError, format_count
from useg.images.files import natural_key

_NUM_NAMED = 3

# Images whose several masks are compared, and masks of each. Masks of one object by several people
# overlap by more than this (intersection over union), and those of different objects by less.
_NUM_COMPARED_IMAGES, _NUM_COMPARED_MASKS = 6, 12
_MIN_SAME_OBJECT = 0.5
# Masks that together cover this share of every image are one per class.
_MIN_FULL_COVER = 0.99

# What masks mark at the points of a grid, for a few images.
_Marked = list[list[NDArray[np.bool_]]]


def find_object_masks(root: Path, paths: Sequence[Path]) -> DetectedLayout | None:
    """Pair each image with a folder of masks, one per object: ``ID/images/ID.png``, ``ID/masks/``.

    The folder may also be called like the image: ``images/ID.png``, ``masks/ID/0.png``.
    """
    folders: dict[Path, list[Path]] = defaultdict(list)
    for path in paths:
        folders[path.parent].append(path)
    stems: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        stems[plain_stem(path)].append(path)
    places = []
    for folder, masks in folders.items():
        image = _image_of_folder(folder, folders, stems)
        if image is not None and image not in masks:
            places.append((image, folder, masks))
    several = [masks for image, _, masks in places if len(masks) > 1]
    names = Counter(path.stem for _, _, masks in places for path in masks)
    words = [stem for stem, count in names.items() if count > 2 and not re.search(r"[0-9]", stem)]
    covered = sum(1 + len(masks) for _, _, masks in places)
    # A folder called 0 of many images' masks does not belong to the image 0 alone.
    homes = {image.parent for image, _, _ in places}
    beside = [path for home in homes for path in folders[home]]
    if (
        len(places) < 2
        or 2 * len(places) < len(beside)
        or not several
        or words
        or 2 * covered < len(paths)
        or any(_has_own_mask(image, masks) for image, _, masks in places)
        or is_photograph(several[0][0])
    ):
        return None
    marked = _read_marked(several)
    if _cover_everything(several, marked):
        return None
    _refuse_opinions(several, marked)
    pairs = (
        Pair(image, folder, find_official_split(image, root), truth=Instances(tuple(masks)))
        for image, folder, masks in places
    )
    rest = sorted({*beside} - {image for image, _, _ in places}, key=natural_key)
    note = f"{format_count(len(rest), 'image')} without a folder of masks left out"
    return DetectedLayout(
        "instances",
        tuple(sorted(pairs, key=lambda pair: pair.image)),
        classes=ClassTable(("background", "foreground")),
        notes=(f"{note}, such as '{rest[0].relative_to(root)}'",) if rest else (),
    )


def _read_marked(several: Sequence[Sequence[Path]]) -> _Marked:
    """Return what a few masks of a few images mark, at the points of a grid."""
    found = []
    for masks in pick_evenly(several, _NUM_COMPARED_IMAGES):
        read = [
            points
            for path in masks[:_NUM_COMPARED_MASKS]
            if (points := read_points(path)) is not None
        ]
        found.append([points != 0 for points in read if points.shape == read[0].shape])
    return found


def _cover_everything(several: Sequence[Sequence[Path]], marked: _Marked) -> bool:
    """Return whether the masks of an image cover it, as one mask per class and background does."""
    return all(
        each and len(masks) <= _NUM_COMPARED_MASKS and np.any(each, 0).mean() >= _MIN_FULL_COVER
        for masks, each in zip(pick_evenly(several, _NUM_COMPARED_IMAGES), marked, strict=True)
    )


def _refuse_opinions(several: Sequence[Sequence[Path]], marked: _Marked) -> None:
    """Refuse several masks of each image that show the same objects, as those of annotators do.

    Raises:
        DataError: They do.
    """
    shares = [
        int((one & other).sum()) / union
        for each in marked
        for one, other in zip(each[1:], each[:-1], strict=True)
        if (union := int((one | other).sum()))
    ]
    if shares and (overlap := float(np.median(shares))) >= _MIN_SAME_OBJECT:
        listed = ", ".join(f"'{path}'" for path in several[0][:_NUM_NAMED])
        raise DataError(
            f"images have several masks that mark nearly the same pixels (IoU {overlap:.2f}), such "
            f"as {listed}, so they seem to be by several annotators, and not of several objects; "
            "name the masks that count in a dataset.toml"
        )


def _has_own_mask(image: Path, masks: Sequence[Path]) -> bool:
    """Return whether one of several masks is called like the image, so that it is no object."""
    core = strip_role_words(image.stem)
    own = [path for path in masks if core in path.stem.casefold()]
    return 0 < len(own) < len(masks) or image.stem in {path.stem for path in masks}


def _image_of_folder(
    folder: Path, folders: Mapping[Path, list[Path]], stems: Mapping[str, list[Path]]
) -> Path | None:
    """Return the only image in the folder beside one of masks, or the image of its name."""
    words = {part.casefold() for part in split_name(folder.name)}
    if words & MASK_WORDS:
        beside = [
            files
            for other, files in folders.items()
            if other.parent == folder.parent
            and {part.casefold() for part in split_name(other.name)} & IMAGE_WORDS
        ] or [folders.get(folder.parent, [])]
        return beside[0][0] if len(beside) == 1 and len(beside[0]) == 1 else None
    named = [path for path in stems.get(folder.name, []) if path.parent not in folder.parents]
    return named[0] if len(named) == 1 and named[0].parent != folder else None


def join_masks(
    found: Mapping[Path, tuple[Path, ...]], splits: Mapping[Path, str]
) -> tuple[list[Pair], ClassTable | None]:
    """Make pairs; several masks of one image are joined if each has two values."""
    several = [masks for masks in found.values() if len(masks) > 1]
    if not several:
        return [Pair(image, masks[0], splits[image]) for image, masks in found.items()], None
    for masks in several:
        if not all(map(is_two_valued, masks)):
            listed = ", ".join(f"'{path}'" for path in masks)
            raise DataError(
                f"one image has several masks ({listed}) with more than two values, so they cannot "
                "be joined; choose those that count in a dataset.toml"
            )
    marked = _read_marked(several)
    _refuse_opinions(several, marked)
    if _cover_everything(several, marked):
        listed = ", ".join(f"'{path}'" for path in several[0][:_NUM_NAMED])
        raise DataError(
            f"the masks of each image, such as {listed}, together cover all of it, so they seem to "
            "be one per class, and not one per object; list a glob for each class under [masks] in "
            "a dataset.toml"
        )
    return [
        Pair(image, masks[0], splits[image], truth=Instances(masks))
        for image, masks in found.items()
    ], ClassTable(("background", "foreground"))
