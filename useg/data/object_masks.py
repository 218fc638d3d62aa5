"""Several masks of one image -> the objects of that image, or a refusal.

They lie in a folder for each image (``ID/masks/*.png``), or are numbered beside each other
(``a_mask.png``, ``a_mask_1.png``). Objects become background and foreground. Masks by several
annotators, and one mask per class, are not objects.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from filecmp import cmp
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from useg.classes import ClassTable
from useg.data.dataset import DetectedLayout, Instances, Pair, pick_evenly
from useg.data.file_names import (
    IMAGE_WORDS,
    MASK_WORDS,
    Link,
    plain_stem,
    split_name,
    strip_role_words,
)
from useg.data.ground_truth import Candidate, OpenChoiceError
from useg.data.mask_content import is_photograph, is_two_valued, read_points
from useg.data.official_splits import find_official_splits, generalize_folder
from useg.errors import DataError, format_count
from useg.files import natural_key

_NUM_NAMED = 3

# The number of one of several masks of an image, at the end of its name.
_COUNTER = re.compile(r"[_\-. ]*\(?[0-9]+\)?$")

# Images whose several masks are compared, and masks of each. Masks of one object by several people
# overlap by more than this (intersection over union), and those of different objects by less.
_NUM_COMPARED_IMAGES, _NUM_COMPARED_MASKS = 6, 12
_MIN_SAME_OBJECT = 0.5

# Masks that together cover this share of every image are one per class.
_MIN_FULL_COVER = 0.99


# A set of masks is offered if it exists for this share of the images.
_MIN_SERIES = 0.5
# What browsers add to the name of a file that exists.
_SECOND_DOWNLOAD = re.compile(r" ?\([0-9]+\)$")

# What masks mark at the points of a grid, for a few images.
_Marked = list[list[NDArray[np.bool_]]]


def _are_named_by_class(folders: Iterable[Sequence[Path]]) -> bool:
    """Whether masks in several folders share a name without a number: that of a class."""
    names = Counter(path.stem for masks in folders for path in masks)
    return any(count > 2 and not re.search(r"[0-9]", stem) for stem, count in names.items())


class _ObjectFolder(NamedTuple):
    """An image, and the folder with a mask for each of its objects."""

    image: Path
    folder: Path
    masks: list[Path]


def find_object_masks(root: Path, paths: Sequence[Path]) -> DetectedLayout | None:
    """Pair each image with a folder of masks, one per object: ``ID/images/ID.png``, ``ID/masks/``.

    The folder may also have the name of the image: ``images/ID.png``, ``masks/ID/0.png``.
    """
    folders: dict[Path, list[Path]] = defaultdict(list)
    for path in paths:
        folders[path.parent].append(path)
    object_folders = _match_folders(folders)
    # A folder called 0 of many images' masks does not belong to the image 0 alone.
    image_folders = {each.image.parent for each in object_folders}
    beside = [path for folder in image_folders for path in folders[folder]]
    num_covered = sum(1 + len(each.masks) for each in object_folders)
    if (
        len(object_folders) < 2
        or 2 * len(object_folders) < len(beside)
        or 2 * num_covered < len(paths)
    ):
        return None
    if not _mark_objects(object_folders):
        return None
    splits = find_official_splits((each.image for each in object_folders), root)
    pairs = (
        Pair(image, folder, splits[image], truth=Instances(tuple(masks)))
        for image, folder, masks in object_folders
    )
    rest = sorted({*beside} - {each.image for each in object_folders}, key=natural_key)
    note = f"{format_count(len(rest), 'image')} without a folder of masks left out"
    return DetectedLayout(
        "instances",
        tuple(sorted(pairs, key=lambda pair: pair.image)),
        classes=ClassTable(("background", "foreground")),
        notes=(f"{note}, such as '{rest[0].relative_to(root)}'",) if rest else (),
    )


def _match_folders(folders: Mapping[Path, list[Path]]) -> list[_ObjectFolder]:
    """Return the folders that hold the masks of one image, among folders and their files."""
    stems: dict[str, list[Path]] = defaultdict(list)
    for path in chain.from_iterable(folders.values()):
        stems[plain_stem(path)].append(path)
    # Looking through all folders for each of them would take very long.
    of_images: dict[Path, list[Path]] = defaultdict(list)
    for folder in folders:
        if words_of_folder(folder) & IMAGE_WORDS:
            of_images[folder.parent].append(folder)
    object_folders = []
    for folder, masks in folders.items():
        if words_of_folder(folder) & MASK_WORDS:
            beside = of_images.get(folder.parent, [folder.parent])
            found = folders.get(beside[0], []) if len(beside) == 1 else []
        else:
            found = _outside_parents(folder, stems.get(folder.name, []))
        if len(found) == 1 and found[0] not in masks:
            object_folders.append(_ObjectFolder(found[0], folder, masks))
    return object_folders


def _mark_objects(object_folders: Sequence[_ObjectFolder]) -> bool:
    """Whether the masks of each image are those of single objects, and not of classes.

    Raises:
        DataError: They are by several annotators.
    """
    several = [each.masks for each in object_folders if len(each.masks) > 1]
    if (
        not several
        or _are_named_by_class(each.masks for each in object_folders)
        or any(_has_own_mask(each.image, each.masks) for each in object_folders)
        or is_photograph(several[0][0])
    ):
        return False
    marked = _read_marked(several)
    if _cover_whole_image(several, marked):
        return False
    _refuse_several_annotators(several, marked)
    return True


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


def _cover_whole_image(several: Sequence[Sequence[Path]], marked: _Marked) -> bool:
    """Return whether the masks of an image cover it, as one mask per class and background does."""
    return all(
        each and len(masks) <= _NUM_COMPARED_MASKS and np.any(each, 0).mean() >= _MIN_FULL_COVER
        for masks, each in zip(pick_evenly(several, _NUM_COMPARED_IMAGES), marked, strict=True)
    )


def _refuse_several_annotators(
    several: Sequence[Sequence[Path]], marked: _Marked, candidates: Sequence[Candidate] = ()
) -> None:
    """Refuse several masks of each image that show the same objects, as those of annotators do.

    Raises:
        OpenChoiceError: They do.
    """
    shares = [
        int((one & other).sum()) / union
        for each in marked
        for one, other in zip(each[1:], each[:-1], strict=True)
        if (union := int((one | other).sum()))
    ]
    if shares and (overlap := float(np.median(shares))) >= _MIN_SAME_OBJECT:
        listed = ", ".join(f"'{path}'" for path in several[0][:_NUM_NAMED])
        raise OpenChoiceError(
            f"images have several masks that mark nearly the same pixels (IoU {overlap:.2f}), such "
            f"as {listed}. They seem to come from several annotators, not to "
            "show different objects",
            candidates,
            candidates,
        )


def _has_own_mask(image: Path, masks: Sequence[Path]) -> bool:
    """Return whether one of several masks has the name of the image and so is not an object."""
    core = strip_role_words(image.stem)
    own = [path for path in masks if core in path.stem.casefold()]
    return 0 < len(own) < len(masks) or image.stem in {path.stem for path in masks}


def words_of_folder(folder: Path) -> set[str]:
    """Return the words in the name of a folder, in small letters."""
    return {part.casefold() for part in split_name(folder.name)}


def _outside_parents(folder: Path, named: Iterable[Path]) -> list[Path]:
    """Return the first two files that are not in a parent of a folder."""
    parents = set(folder.parents)
    return list(islice((path for path in named if path.parent not in parents), 2))


def join_masks(
    found: Mapping[Path, tuple[Path, ...]], splits: Mapping[Path, str]
) -> tuple[list[Pair], ClassTable | None]:
    """Make pairs; several masks of one image are joined if each has two values."""
    found = {image: _leave_out_copies(masks) for image, masks in found.items()}
    several = [masks for masks in found.values() if len(masks) > 1]
    if not several:
        return [Pair(image, masks[0], splits[image]) for image, masks in found.items()], None
    for masks in several:
        if not all(map(is_two_valued, masks)):
            listed = ", ".join(f"'{path}'" for path in masks)
            message = (
                f"one image has several masks ({listed}) with more than two values, so they cannot "
                "be joined as objects; "
            )
            if _are_apart(_read_marked([masks])[0]):
                raise DataError(
                    f"{message}they mark different pixels, so save one mask for each image: their "
                    "numpy.maximum"
                )
            raise OpenChoiceError(
                f"{message}save one mask for each image, for example their numpy.maximum, or "
                "choose those that count",
                _group_by_ending(found, _MIN_SERIES),
            )
    _refuse_second_downloads(found)
    marked = _read_marked(several)
    _refuse_several_annotators(several, marked, _group_by_ending(found, _MIN_SERIES))
    if _cover_whole_image(several, marked):
        listed = ", ".join(f"'{path}'" for path in sorted(several[0])[:_NUM_NAMED])
        candidates = _group_by_ending(found)
        raise OpenChoiceError(
            f"the masks of each image, such as {listed}, together cover all of it, so there "
            "seems to be one for each class, not for each object; list a glob for each class under "
            "[masks]",
            candidates,
            candidates,
        )
    return [
        Pair(image, masks[0], splits[image], truth=Instances(masks))
        for image, masks in found.items()
    ], ClassTable(("background", "foreground"))


def _are_apart(marked: Sequence[NDArray[np.bool_]]) -> bool:
    """Return whether no two masks mark the same pixels, so that none of them is the truth alone."""
    return len(marked) > 1 and not (np.sum(marked, axis=0) > 1).any()


def describe_joined(pairs: Sequence[Pair]) -> str:
    """Say that a few images have several masks, which may be by mistake; ``""`` if many have."""
    truths = [pair.truth.masks for pair in pairs if isinstance(pair.truth, Instances)]
    several = [masks for masks in truths if len(masks) > 1]
    if not several or 2 * len(several) > len(pairs):
        return ""
    have = "image has" if len(several) == 1 else "images have"
    masks = several[0]
    return (
        f"{len(several)} {have} several masks, such as '{masks[0].name}' and '{masks[1].name}', "
        "which are joined as objects"
    )


def _leave_out_copies(masks: tuple[Path, ...]) -> tuple[Path, ...]:
    """Leave out files that equal the first one, such as ``a(1).png`` of a second download."""
    return (*masks[:1], *(path for path in masks[1:] if not cmp(masks[0], path, shallow=False)))


def _refuse_second_downloads(found: Mapping[Path, tuple[Path, ...]]) -> None:
    """Refuse masks such as ``a (1).png`` that differ from ``a.png``, as an older version does.

    Raises:
        OpenChoiceError: There is one.
    """
    for masks in found.values():
        for path in masks[1:]:
            if _SECOND_DOWNLOAD.sub("", path.stem) == masks[0].stem:
                raise OpenChoiceError(
                    f"'{path}' has the name of a second download of '{masks[0]}', but differs from "
                    f"it. Keep one of them; if they are two objects, rename '{path.name}', for "
                    f"example to '{masks[0].stem}_1{path.suffix}'",
                    _group_by_ending(found, _MIN_SERIES),
                )


def _group_by_ending(found: Mapping[Path, tuple[Path, ...]], least: float = 0.0) -> list[Candidate]:
    """Return the sets of masks whose names add the same text to those of their images.

    ``least`` is the share of the images for which a set must exist.
    """
    sets: dict[str, dict[Path, Path]] = defaultdict(dict)
    for image, masks in found.items():
        for mask in masks:
            sets[mask.stem.replace(image.stem, "")][image] = mask
    chosen = [ending for ending, masks in sets.items() if len(masks) >= least * len(found)]
    return [Candidate(ending, sets[ending]) for ending in sorted(chosen, key=natural_key)]


def add_numbered_masks(link: Link, used: set[str], files: Mapping[str, Path]) -> Link:
    """Add images whose masks are all numbered: ``a_mask1`` and ``a_mask2`` beside ``b_mask``."""
    folders = {generalize_folder(name) for name in link.partners}
    taken = {*used, *link.partners, *link.partners.values()}
    rest = [name for name in files if name not in taken]
    images = [name for name in rest if generalize_folder(name) in folders]
    if not images:
        return link
    numbered: dict[str, list[str]] = defaultdict(list)
    for name in sorted(rest, key=natural_key):
        numbered[_COUNTER.sub("", name)].append(name)
    found = {
        image: numbered[target][0]
        for image in images
        for target in link.rule.apply(image)
        if len(numbered.get(target, ())) > 1 and target not in files
    }
    return Link(link.rule, {**link.partners, **found})


def find_further_masks(
    link: Link, claimed: set[str], files: Mapping[str, Path]
) -> dict[str, tuple[str, ...]]:
    """Find masks that are numbered beside those of a link: ``a_mask_1`` beside ``a_mask``."""
    used = {*link.partners, *link.partners.values(), *claimed}
    stems = {name: _stem_parts(plain_stem(files[name])) for name in link.partners}
    shared = frozenset.intersection(*stems.values()) if len(stems) > 1 else frozenset()
    owners: dict[tuple[Path, str], set[str]] = defaultdict(set)
    for image, mask in link.partners.items():
        path = files[mask]
        for stem in {plain_stem(path), _COUNTER.sub("", plain_stem(path))}:
            if stems[image] - shared <= _stem_parts(stem):
                owners[path.parent, stem].add(image)
    found: dict[str, list[str]] = defaultdict(list)
    for name in sorted(set(files) - used, key=natural_key):
        path = files[name]
        images = owners.get((path.parent, _COUNTER.sub("", plain_stem(path))), set())
        if len(images) == 1:
            found[next(iter(images))].append(name)
    return {image: tuple(names) for image, names in found.items()}


def _stem_parts(stem: str) -> frozenset[str]:
    """Return the words and numbers in a name, in lower case and without leading zeros."""
    return frozenset(
        part.casefold().lstrip("0") or "0" for part in split_name(stem) if part.isalnum()
    )
